"""monotonic_search of float32 scores, and its drop-in maximum_path, beside the packages installed.

The sums are float64, the packages' float32. It keeps 1 byte a cell; the bar is 4, of all that a
call takes.
"""

import torch

from benchmarks.baselines import monotonic_search as baseline
from benchmarks.baselines.peers import installed
from benchmarks.suite import (
    FORWARD,
    MATRICES,
    Shape,
    Suite,
    Variant,
    draw_scores,
    with_one_thread,
)
from tokcore.ops import maximum_path, monotonic_search


def _inputs(shape, dtype, device):
    scores = draw_scores(shape, dtype, device)
    return scores, torch.ones_like(scores)


def _tokcore(scores, mask):
    return monotonic_search(scores)


def _variants(dtype, device):
    variants = with_one_thread(_tokcore, device)
    variants.append(Variant("tokcore maximum_path", "tokcore", maximum_path))
    if device.type == "cpu" and installed("monotonic_alignment_search"):
        variants += [
            Variant("monotonic_alignment_search, Cython", "peer", baseline.cython),
            Variant("monotonic_alignment_search, NumPy", "peer", baseline.numpy),
        ]
    if device.type == "cpu" and installed("numba"):
        variants.append(Variant("Numba", "peer", baseline.numba))
    return variants


SUITES = (
    Suite(
        "monotonic_search",
        _inputs,
        _variants,
        streams=1,
        passes=(FORWARD,),
        shapes=MATRICES,
        dtypes=("float32",),
        warm=True,
        tiny=Shape("tiny", 24, 24, 2),
    ),
)


def test_monotonic_search(benchmark, case):
    case.run(benchmark)
