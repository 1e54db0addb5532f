"""segment_attention of sentences of 20 tokens, beside torch's attention with a mask of pairs.

Query, key and value are one tensor, as a projection makes them, so that its gradient is all three.
"""

import torch

from benchmarks.baselines import segment_attention as baseline
from benchmarks.suite import WIDTHS, Shape, Suite, Variant
from tokcore.ops import segment_attention

HEADS, SENTENCE = 8, 20


def _inputs(shape, dtype, device):
    tokens = shape.rows // shape.sequences
    size = (3, shape.sequences, HEADS, tokens, shape.vocabulary // HEADS)
    packed = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    segments = (torch.arange(tokens, device=device) // SENTENCE).repeat(shape.sequences, 1)
    return packed, segments, baseline.same(segments)


def _tokcore(packed, segments, mask):
    return segment_attention(*packed.unbind(), segments, segments).output


def _variants(dtype, device):
    return [
        Variant("tokcore", "tokcore", _tokcore),
        Variant("torch attention, mask given", "eager", baseline.with_mask),
        Variant("torch attention, mask made", "eager", baseline.making_mask),
    ]


SUITES = (
    Suite(
        "segment_attention",
        _inputs,
        _variants,
        streams=1,
        shapes=WIDTHS,
        tiny=Shape("tiny", 90, 64, 2),
    ),
)


def test_segment_attention(benchmark, case):
    case.run(benchmark)
