"""kv_append of one token to 8 heads of 128, of a prompt of 1024, and of one that is quantised.

Beside it index_copy_ into the same memory, and the torch.cat of a cache that grows at each step.
Each call begins by setting the count back.
"""

from functools import partial

import torch

from benchmarks.baselines import kv_cache as baseline
from benchmarks.suite import CACHES, FORWARD, Shape, Suite, Variant, with_one_thread
from tokcore.ops import kv_append

HEADS, PROMPT, GROUPS = 8, 1024, 2


def _inputs(shape, dtype, device, *, tokens, quantized=False):
    batch, slots = shape.sequences, shape.rows // shape.sequences
    tokens, dim = min(tokens, slots // 2), shape.vocabulary // HEADS
    generator = torch.Generator().manual_seed(0)
    new = torch.randn(2, batch, HEADS, tokens, dim, generator=generator).to(device, dtype)
    stored = torch.zeros(
        2, batch, HEADS, slots, dim, dtype=torch.uint8 if quantized else dtype, device=device
    )
    pairs = torch.zeros(2, batch, HEADS, slots, GROUPS, 2, device=device) if quantized else None

    def of_rows(value):
        return torch.full((batch,), value, dtype=torch.int32, device=device)

    used = slots - tokens
    position = torch.arange(slots, dtype=torch.int32, device=device).repeat(batch, 1, 1)
    slot = torch.arange(used, slots, device=device)
    count = of_rows(used).unsqueeze(1)
    return (
        new,
        stored,
        position,
        position.clone(),
        count,
        of_rows(used),
        of_rows(tokens),
        pairs,
        slot,
    )


def _tokcore(new, stored, position, last, count, length, valid, pairs, slot):
    count.fill_(stored.shape[3] - new.shape[3])
    key_pairs, value_pairs = (None, None) if pairs is None else pairs
    kv_append(
        *stored,
        position,
        last,
        count,
        *new,
        length,
        valid,
        key_quantization=key_pairs,
        value_quantization=value_pairs,
    )
    return stored


def _index_copy(new, stored, position, last, count, length, valid, pairs, slot):
    if pairs is None:
        baseline.index_copy(stored, new, position, last, slot, stored.shape[3] - new.shape[3])
        return stored
    codes, new_pairs = baseline.quantized(new, GROUPS)
    baseline.index_copy(stored, codes, position, last, slot, stored.shape[3] - new.shape[3])
    pairs[:, :, :, slot] = new_pairs
    return stored


def _cat(new, stored, position, last, *others):
    return baseline.cat(stored[:, :, :, : stored.shape[3] - new.shape[3]], new)


def _variants(dtype, device, *, quantized=False):
    variants = with_one_thread(_tokcore, device)
    # Codes of float32 arithmetic may be one off.
    variants.append(Variant("torch index_copy_", "eager", _index_copy, exact=not quantized))
    if not quantized:
        variants.append(Variant("torch cat", "eager", _cat))
    return variants


_suite = partial(
    Suite, streams=1, passes=(FORWARD,), shapes=CACHES, warm=True, tiny=Shape("tiny", 2 * 9, 64, 2)
)
SUITES = (
    _suite("kv_append", partial(_inputs, tokens=1), _variants),
    _suite("kv_append_prompt", partial(_inputs, tokens=PROMPT), _variants),
    _suite(
        "kv_append_int8",
        partial(_inputs, tokens=PROMPT, quantized=True),
        partial(_variants, quantized=True),
    ),
)


def test_kv_append(benchmark, case):
    case.run(benchmark)
