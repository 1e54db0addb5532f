"""sparse_window_attention of prompts, beside torch's attention with the same mask.

A tenth of the tokens is the window, and as many are listed: ALISA's share of 0.2, chosen for a
whole prompt. Query, key and value are one tensor, as a projection makes them, so that its gradient
is all three.
"""

import torch

from benchmarks.baselines import sparse_window_attention as baseline
from benchmarks.suite import PROMPTS, Shape, Suite, Variant
from tokcore.ops import sparse_window_attention

HEADS = 8


def _inputs(shape, dtype, device):
    tokens = shape.rows // shape.sequences
    generator = torch.Generator().manual_seed(0)
    size = (3, shape.sequences, HEADS, tokens, shape.vocabulary // HEADS)
    packed = torch.randn(size, generator=generator).to(device, dtype)
    window = tokens // 10
    index = torch.randperm(tokens, generator=generator)[:window].sort().values.to(device)
    mask = baseline.seen(tokens, window, index, device)
    lists = index.int().expand(shape.sequences, 1, -1)
    return packed, window, lists, mask, baseline.block_mask(mask)


def _tokcore(packed, window, index, mask, blocks):
    return sparse_window_attention(*packed.unbind(), window, index)


def _variants(dtype, device):
    return [
        Variant("tokcore", "tokcore", _tokcore),
        Variant("torch attention, mask given", "eager", baseline.with_mask),
        Variant("torch attention, mask made", "eager", baseline.making_mask),
        Variant("FlexAttention, blocks given", "compile", baseline.flex()),
    ]


SUITES = (
    Suite(
        "sparse_window_attention",
        _inputs,
        _variants,
        streams=1,
        shapes=PROMPTS,
        tiny=Shape("tiny", 90, 64, 2),
    ),
)


def test_sparse_window_attention(benchmark, case):
    case.run(benchmark)
