"""dtw of the squared differences of two series, beside the packages that are installed.

It keeps 1 byte a cell; the bar is 4, of all that a call takes.
"""

import torch

from benchmarks.baselines import dtw as baseline
from benchmarks.baselines.peers import installed
from benchmarks.suite import FORWARD, MATRICES, Shape, Suite, Variant, with_one_thread
from tokcore.ops import dtw

PEERS = {
    "whisper": baseline.whisper,
    "librosa": baseline.librosa,
    "tslearn": baseline.tslearn,
    "dtaidistance": baseline.dtaidistance,
}


def _inputs(shape, dtype, device):
    """Costs, and the series (random walks) that they come from."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = (
        torch.randn(shape.sequences, length, generator=generator, dtype=dtype).cumsum(1).to(device)
        for length in (shape.rows // shape.sequences, shape.vocabulary)
    )
    return (rows.unsqueeze(2) - columns.unsqueeze(1)).square(), rows, columns


def _tokcore(cost, rows, columns):
    return dtw(cost)


def _variants(dtype, device):
    variants = with_one_thread(_tokcore, device)
    if device.type == "cpu":
        variants += [Variant(n, "peer", PEERS[n]) for n in PEERS if installed(n)]
    return variants


SUITES = (
    Suite(
        "dtw",
        _inputs,
        _variants,
        streams=1,
        passes=(FORWARD,),
        shapes=MATRICES,
        dtypes=("float64",),
        warm=True,
        tiny=Shape("tiny", 24, 13, 2),
    ),
)


def test_dtw(benchmark, case):
    case.run(benchmark)
