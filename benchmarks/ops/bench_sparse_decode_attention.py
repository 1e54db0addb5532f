"""sparse_decode_attention of 32 query heads: all slots of a cache, the fifth of them that a sparse
cache keeps, packed, and as many listed in the whole one, half of them the last and half anywhere.

Beside torch's attention, which gives no weights, and what gives them. The floor reads as much.
"""

import dataclasses

import torch

from benchmarks.baselines import sparse_decode_attention as baseline
from benchmarks.suite import (
    CACHES,
    FORWARD,
    ONE_THREAD,
    Shape,
    Suite,
    Variant,
    on_one_thread,
)
from tokcore.ops import prompt_window_scores, sparse_decode_attention

QUERY_HEADS, HEAD_DIM, KEPT, WINDOW = 32, 128, 0.2, 16


def _cache(shape, dtype, device):
    """Key and value (B, Hkv, C, D), and a query."""
    slots, heads = shape.rows // shape.sequences, shape.vocabulary // HEAD_DIM
    generator = torch.Generator().manual_seed(0)
    size = (shape.sequences, heads, slots, HEAD_DIM)
    rows = [torch.randn(size, generator=generator).to(device, dtype) for _ in range(2)]
    query = torch.randn(shape.sequences, QUERY_HEADS, HEAD_DIM, generator=generator)
    return *rows, query.to(device, dtype)


def _kept(shape):
    return int(shape.rows // shape.sequences * KEPT)


def _full(slots, shape, device):
    return torch.full((shape.sequences, 1), slots, dtype=torch.int32, device=device)


def _all_inputs(shape, dtype, device):
    slots = shape.rows // shape.sequences
    return *_cache(shape, dtype, device), _full(slots, shape, device), None


def _packed_inputs(shape, dtype, device):
    kept = dataclasses.replace(shape, rows=shape.sequences * _kept(shape))
    return _all_inputs(kept, dtype, device)


def _listed_inputs(shape, dtype, device):
    slots, kept = shape.rows // shape.sequences, _kept(shape)
    near = torch.arange(slots - kept // 2, slots)
    far = torch.randperm(slots - len(near), generator=torch.Generator().manual_seed(1))
    index = torch.cat([far[: kept - len(near)].sort().values, near]).int().to(device)
    index = index.repeat(shape.sequences, 1, 1)
    return *_cache(shape, dtype, device), _full(kept, shape, device), index


def _prompt_inputs(shape, dtype, device):
    key, _, _ = _cache(shape, dtype, device)
    size = (shape.sequences, QUERY_HEADS, WINDOW, HEAD_DIM)
    query = torch.randn(size, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    return key, query, _full(key.shape[2], shape, device)


def _decode(key, value, query, count, index):
    return sparse_decode_attention(query, key, value, index, count)


def _from(function):
    return lambda key, value, query, count, index: function(query, key, value, index)


def _variants(dtype, device):
    full = dtype == torch.float32
    return [
        Variant("tokcore", "tokcore", _decode),
        Variant(ONE_THREAD, "tokcore", on_one_thread(_decode)),
        Variant("torch attention", "eager", _from(baseline.attention)),
        Variant("torch attention, heads as queries", "eager", _from(baseline.grouped_attention)),
        Variant("torch, with weights", "eager", _from(baseline.with_weights), exact=full),
    ]


def _prompt_scores(key, query, count):
    return prompt_window_scores(query, key, count)


def _prompt_variants(dtype, device):
    return [
        Variant("tokcore", "tokcore", _prompt_scores),
        Variant("torch", "eager", baseline.prompt_scores, exact=dtype == torch.float32),
    ]


TINY = Shape("tiny", 2 * 60, 256, 2)


def _suite(name, inputs, **options):
    return Suite(
        name,
        inputs,
        _variants,
        streams=2,
        passes=(FORWARD,),
        shapes=CACHES,
        tiny=TINY,
        **options,
    )


SUITES = (
    _suite("sparse_decode_attention", _all_inputs),
    _suite("sparse_decode_attention_packed", _packed_inputs),
    _suite("sparse_decode_attention_listed", _listed_inputs, kept=KEPT),
    Suite(
        "prompt_window_scores",
        _prompt_inputs,
        _prompt_variants,
        streams=1,
        passes=(FORWARD,),
        shapes=CACHES,
        tiny=TINY,
    ),
)


def test_sparse_decode_attention(benchmark, case):
    case.run(benchmark)
