"""window_select of a fifth of the slots, beside torch.topk and a sort of what it found.

One list for all heads, and one for each of 8. Scores are sums of softmax weights, a third of them
0, as tokcore's windows leave them.
"""

import math
from functools import partial

import torch

from benchmarks.baselines import kv_cache as baseline
from benchmarks.suite import CACHES, FORWARD, Shape, Suite, Variant, with_one_thread
from tokcore.ops import window_select

UNIT, RATIO = 2.0**40, 0.2


def _inputs(shape, dtype, device, *, lists):
    slots = shape.rows // shape.sequences
    generator = torch.Generator().manual_seed(0)
    drawn = 3 * torch.randn(shape.sequences, lists, slots, generator=generator)
    weights = drawn.softmax(-1) * (torch.rand(drawn.shape, generator=generator) > 1 / 3)
    score = (weights.double() * UNIT).long().to(device)
    keep = math.floor(slots * RATIO / 2 + 0.5)
    count = torch.full(score.shape[:2], slots, dtype=torch.int32, device=device)
    half = torch.full((shape.sequences,), keep, dtype=torch.int32, device=device)
    return score, count, half, keep, score.double().div(UNIT).float()


def _tokcore(score, count, half, keep, weights):
    return window_select(score, count, half, half, size=2 * keep).index


def _torch(function):
    return lambda score, count, half, keep, weights: function(score, keep)


def _torch_float(score, count, half, keep, weights):
    return baseline.topk(weights, keep)


def _variants(dtype, device):
    return [
        *with_one_thread(_tokcore, device),
        Variant("torch topk, sort", "eager", _torch(baseline.topk)),
        Variant("torch topk, sort, float32", "eager", _torch_float, exact=False),
        Variant("torch stable sort", "eager", _torch(baseline.stable_sort)),
    ]


_suite = partial(
    Suite,
    variants=_variants,
    streams=1,
    passes=(FORWARD,),
    shapes=CACHES,
    dtypes=("int64",),
    warm=True,
    tiny=Shape("tiny", 2 * 100, 8, 2),
)
SUITES = (
    _suite("window_select", partial(_inputs, lists=1)),
    _suite("window_select_heads", partial(_inputs, lists=8)),
)


def test_window_select(benchmark, case):
    case.run(benchmark)
