"""window_scores_update of one decode step that lists a fifth of the slots, a window of 64 rows.

Beside it torch's scatter into a ring of float32 rows with a running sum, which keeps residues, and
with the sum of the ring anew. Each call begins by taking `oldest` one step back, so that a row
leaves as it does in every step.
"""

import math

import torch

from benchmarks.baselines import kv_cache as baseline
from benchmarks.suite import CACHES, FORWARD, Shape, Suite, Variant, with_one_thread
from tokcore.ops import window_scores_update

RATIO, WINDOW = 0.2, 64
STEP = 100 * WINDOW


def _inputs(shape, dtype, device):
    batch, slots = shape.sequences, shape.rows // shape.sequences
    listed = 2 * math.floor(slots * RATIO / 2 + 0.5)
    generator = torch.Generator().manual_seed(0)
    chosen = [
        torch.randperm(slots, generator=generator)[:listed].sort().values for _ in range(batch)
    ]
    index = torch.stack(chosen).view(batch, 1, listed).to(device)
    rows = torch.rand(batch, 1, 1, listed, generator=generator).softmax(-1).to(device)
    ring = torch.zeros(batch, 1, WINDOW, slots, device=device)
    ring.scatter_(
        -1, index.unsqueeze(2).expand(-1, -1, WINDOW, -1), rows.expand(-1, -1, WINDOW, -1)
    )
    score = (ring.double() * 2.0**40).long().sum(2)
    last = torch.full((batch, 1, slots), -1, dtype=torch.int32, device=device)

    def of_rows(value):
        return torch.full((batch,), value, dtype=torch.int32, device=device)

    numbers = (of_rows(listed).unsqueeze(1), of_rows(STEP), of_rows(WINDOW), of_rows(0))
    return score, ring, last, rows, index.int(), *numbers, index, ring.sum(2)


def _tokcore(score, ring, last, rows, index, count, step, window, oldest, *others):
    oldest.fill_(STEP - WINDOW)
    window_scores_update(score, ring, last, oldest, rows, index, count, step, window)
    return score


def _torch(function):
    def call(score, ring, last, rows, *others):
        *_, index, weights = others
        return function(weights, ring, last, rows.squeeze(2), index, STEP)

    return call


def _variants(dtype, device):
    return [
        *with_one_thread(_tokcore, device),
        Variant("torch running sum", "eager", _torch(baseline.running_sum), exact=False),
        Variant("torch sum of the ring", "eager", _torch(baseline.sum_of_ring)),
    ]


SUITES = (
    Suite(
        "window_scores_update",
        _inputs,
        _variants,
        streams=1,
        passes=(FORWARD,),
        shapes=CACHES,
        dtypes=("float32",),
        warm=True,
        tiny=Shape("tiny", 2 * 100, 8, 2),
    ),
)


def test_window_scores_update(benchmark, case):
    case.run(benchmark)
