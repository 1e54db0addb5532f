"""group_advantage over groups of 8, beside vectorised torch: by size, by ids side by side, by any.

The floor is one read of the inputs: rewards of 4 bytes and, where there are any, ids of 8.
"""

from functools import partial

import torch

from benchmarks.baselines import group_advantage as baseline
from benchmarks.suite import BATCHES, FORWARD, Suite, Variant
from tokcore.ops import group_advantage

GROUP = baseline.GROUP


def _rewards(shape, dtype, device):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape.rows, generator=generator).to(device, dtype),)


def _runs(shape, dtype, device):
    ids = torch.arange(shape.rows // GROUP, device=device).repeat_interleave(GROUP)
    return *_rewards(shape, dtype, device), ids


def _shuffled(shape, dtype, device):
    rewards, ids = _runs(shape, dtype, device)
    order = torch.randperm(shape.rows, generator=torch.Generator().manual_seed(1))
    return rewards, ids[order.to(device)]


def _by_size(dtype, device):
    return [
        Variant("tokcore", "tokcore", partial(group_advantage, group=GROUP)),
        Variant("torch view, mean, std", "eager", baseline.of_size),
    ]


def _by_ids(dtype, device, **options):
    scatter_add = partial(baseline.of_ids, add=torch.scatter_add)
    return [
        Variant("tokcore", "tokcore", partial(group_advantage, **options)),
        Variant("torch index_add", "eager", baseline.of_ids),
        Variant("torch scatter_add", "eager", scatter_add),
        Variant("torch unique, index_add", "eager", baseline.of_any_ids),
    ]


_suite = partial(Suite, passes=(FORWARD,), shapes=BATCHES, dtypes=("float32",))
SUITES = (
    _suite("group_advantage", _rewards, _by_size, streams=1),
    _suite("group_advantage_runs", _runs, partial(_by_ids, contiguous=True), streams=2),
    _suite("group_advantage_ids", _shuffled, _by_ids, streams=2),
)


def test_group_advantage(benchmark, case):
    case.run(benchmark)
