"""monotonic_align of float64 scores, beside its authors' NumPy and a plain loop in C++.

On the CPU it keeps no back-pointers (the walk back computes few cells again), but cells and running
sums, 16 bytes a cell of each thread's matrix; on CUDA 2 bytes a cell. The bar is 4.
"""

from benchmarks.baselines import monotonic_align as baseline
from benchmarks.suite import (
    FORWARD,
    MATRICES,
    Shape,
    Suite,
    Variant,
    draw_scores,
    with_one_thread,
)
from tokcore.ops import monotonic_align


def _inputs(shape, dtype, device):
    return (draw_scores(shape, dtype, device),)


def _variants(dtype, device):
    variants = with_one_thread(monotonic_align, device)
    if device.type == "cpu":
        variants += [
            Variant("plain loop", "loop", baseline.plain_loop),
            Variant("authors' NumPy", "authors", baseline.authors, most=1e6),
        ]
    return variants


SUITES = (
    Suite(
        "monotonic_align",
        _inputs,
        _variants,
        streams=1,
        passes=(FORWARD,),
        shapes=MATRICES,
        dtypes=("float64",),
        warm=True,
        tiny=Shape("tiny", 24, 12, 2),
    ),
)


def test_monotonic_align(benchmark, case):
    case.run(benchmark)
