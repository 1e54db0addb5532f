"""kv_compact to three quarters of the slots, beside copies by gather: keys, values and all else.

Which slots go is drawn anew for each eighth, so that runs are short. Each call begins by writing
last_selected and the count back, which is part of its time.
"""

import torch

from benchmarks.baselines import kv_cache as baseline
from benchmarks.suite import CACHES, FORWARD, Shape, Suite, Variant, with_one_thread
from tokcore.ops import kv_compact

HEADS, WINDOW, SINCE, LOCAL = 8, 64, 5, 4


def _inputs(shape, dtype, device):
    batch, slots = shape.sequences, shape.rows // shape.sequences
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(2, 1, 1, slots, shape.vocabulary // HEADS, generator=generator)
    stored = block.to(device, dtype).repeat(1, batch, HEADS, 1, 1)
    kept = torch.ones(batch, 1, slots, dtype=torch.int32)
    for row in kept.view(batch, slots):
        row[torch.randperm(slots - LOCAL, generator=generator)[: slots // 4]] = 0
    selected = (SINCE * kept).to(device)
    position = torch.arange(slots, dtype=torch.int32, device=device).repeat(batch, 1, 1)
    score, ring = position.long(), torch.ones(batch, 1, WINDOW, slots, device=device)

    def of_rows(value):
        return torch.full((batch,), value, dtype=torch.int32, device=device)

    state = (position, score, ring, selected.clone(), of_rows(slots).unsqueeze(1))
    return stored, *state, of_rows(SINCE), of_rows(LOCAL), selected


def _tokcore(stored, position, score, ring, last, count, since, local, selected):
    last.copy_(selected)
    count.fill_(last.shape[-1])
    kv_compact(*stored, position, score, ring, last, count, since, local)
    return stored


def _gather(stored, position, score, ring, last, count, since, local, selected):
    return baseline.gather(stored, (position, score, selected), ring, selected, SINCE, LOCAL)


def _variants(dtype, device):
    return [*with_one_thread(_tokcore, device), Variant("torch gather", "eager", _gather)]


SUITES = (
    Suite(
        "kv_compact",
        _inputs,
        _variants,
        streams=1,
        passes=(FORWARD,),
        shapes=CACHES,
        warm=True,
        tiny=Shape("tiny", 2 * 40, 64, 2),
    ),
)


def test_kv_compact(benchmark, case):
    case.run(benchmark)
