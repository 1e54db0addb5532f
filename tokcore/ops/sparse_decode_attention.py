"""Attention of one new token to listed slots of a key-value cache, with the slots' weights."""

from typing import NamedTuple

import torch
from torch import Tensor

from tokcore import _checks, _library


class SparseDecode(NamedTuple):
    """Output (B, Hq, D), weight_row (B, Hs, M), lse (B, Hq)."""

    output: Tensor
    weight_row: Tensor
    lse: Tensor


def sparse_decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor | None,
    count: Tensor,
    *,
    scale: float | None = None,
    key_quantization: Tensor | None = None,
    value_quantization: Tensor | None = None,
) -> SparseDecode:
    r"""Attention of one query a head to the listed slots of a cache, and what each slot weighs.

    Equivalent, for a batch of one, one KV head and ``i = index[0, 0, : count[0, 0]]``, to
    ``w = (query @ key[0, 0, i].T * scale).softmax(-1)``, ``output = w @ value[0, 0, i]``,
    ``weight_row = w.sum(heads)``; but no row of the cache is copied, and keys and values are read
    once for all query heads of their KV head.

    .. math::
        w_{hj} = \frac{e^{\sigma q_h \cdot k_{i_j}}}{\sum_{l < n} e^{\sigma q_h \cdot k_{i_l}}},
        \quad o_h = \sum_{j < n} w_{hj} v_{i_j}, \quad W_j = \sum_{h} w_{hj}, \quad
        L_h = \log \sum_{j < n} e^{\sigma q_h \cdot k_{i_j}}

    n is the list's count; W sums over the query heads that share the list, in their order. Query
    head h reads KV head ``h // (Hq / Hkv)``.

    Args:
        query: (B, Hq, D), float32, float64, float16 or bfloat16; 1 <= D <= 256.
        key, value: (B, Hkv, C, D) of the query's dtype, Hkv a divisor of Hq; or uint8, with
            their quantization. Any strides but the last: a part of a larger cache is not copied.
        index: (B, Hs, M) int32, Hs = 1 (one list for all heads) or Hkv: ascending slots in [0, C)
            in the first ``count`` entries, anything behind. None: slots 0, 1, ..., and M = C.
        count: (B, Hs) int32 in [0, M]: how many slots of the list are attended to.
        scale: a finite number. Default D ** -0.5.
        key_quantization, value_quantization: (B, Hkv, C, Z, 2) float32, (scale, offset) of each
            of Z equal groups of the D entries: an entry u of a uint8 cache means
            ``scale * u + offset``. Both or neither; not with a float64 query.

    Returns:
        SparseDecode: output of the query's dtype; weight_row (B, Hs, M) and lse (B, Hq) float32
        (float64 for float64). weight_row is 0 from ``count`` on. A count of 0 gives output 0 and
        lse -inf. A NaN or +inf among a head's scores, or nothing but -inf, gives NaN in the head's
        output and lse and in the weights of its list. Slots that are not listed have no effect.

    Raises:
        TypeError, ValueError: an argument of a wrong dtype, shape or device. Nothing is broadcast.
        RuntimeError: on the CPU, a count out of range, or listed slots that do not ascend in
            [0, C). On CUDA the results of such a list are NaN (with TOKCORE_DEBUG=1 it raises).
        NotImplementedError: a gradient is taken.

    Not differentiable. Sums do not depend on the number of threads.

    >>> key = torch.tensor([[[[1.0], [9.0], [1.0]]]])
    >>> value = torch.tensor([[[[4.0], [0.0], [8.0]]]])
    >>> index, count = torch.tensor([[[0, 2, -1]]]).int(), torch.tensor([[2]]).int()
    >>> output, row, _ = sparse_decode_attention(torch.ones(1, 1, 1), key, value, index, count)
    >>> output, row
    (tensor([[[6.]]]), tensor([[[0.5000, 0.5000, 0.0000]]]))

    Source: Algorithm 1 of ALISA (arXiv 2403.17312, section IV.B).
    """
    op = "sparse_decode_attention"
    _checks.cached(op, query, key, count, key_quantization, dims=3)
    if (key_quantization is None) != (value_quantization is None):
        given = "value_quantization" if key_quantization is None else "key_quantization"
        raise ValueError(
            f"{op}: key_quantization and value_quantization go together, got {given} alone"
        )
    _checks.cache_tensor(op, "value", value, value_quantization, query)
    pairs = (
        (key, value, "value", "key"),
        (key_quantization, value_quantization, "value_q", "key_q"),
    )
    for one, other, name, like in pairs:
        if one is not None and one.shape != other.shape:
            name, like = (x.replace("_q", "_quantization") for x in (name, like))
            raise ValueError(
                f"{op}: {name} must have the shape of {like}, {tuple(one.shape)}, got "
                f"{tuple(other.shape)}"
            )
    if index is not None:
        _checks.tensor(op, "index", index)
        if index.dtype != torch.int32:
            raise TypeError(f"{op}: index must be int32, got {index.dtype}")
        if index.dim() != 3 or index.shape[:2] != count.shape or index.device != query.device:
            raise ValueError(
                f"{op}: index must have shape {(*count.shape, 'M')} on {query.device}, got "
                f"{tuple(index.shape)} on {index.device}"
            )
    if scale is None:
        scale = query.shape[-1] ** -0.5
    else:
        _checks.number(op, "scale", scale, least=-torch.inf)
    _checks.slots_in_use(op, count, index, key.shape[2])
    return SparseDecode(
        *_library.native().sparse_decode_attention(
            query, key, value, index, count, key_quantization, value_quantization, float(scale)
        )
    )


def _dequantized(cache: Tensor, quantization: Tensor | None, wide: torch.dtype) -> Tensor:
    if quantization is None:
        return cache.to(wide)
    scale, offset = quantization.to(wide).split(1, -1)
    groups = cache.to(wide).unflatten(-1, (quantization.shape[3], -1))
    return (groups * scale + offset).flatten(-2)


def _reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor | None,
    count: Tensor,
    *,
    scale: float | None = None,
    key_quantization: Tensor | None = None,
    value_quantization: Tensor | None = None,
    wide: torch.dtype | None = None,
) -> SparseDecode:
    """The definition in plain torch, list by list, all of it in ``wide``."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if wide is None:
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    heads, lists = key.shape[1], count.shape[1]
    group = query.shape[1] // heads
    keys = _dequantized(key, key_quantization, wide)
    values = _dequantized(value, value_quantization, wide)
    output = torch.zeros_like(query)
    rows = torch.zeros(
        *count.shape, key.shape[2] if index is None else index.shape[2], dtype=wide
    ).to(query.device)
    lse = torch.full(query.shape[:2], -torch.inf, dtype=wide, device=query.device)
    for b in range(query.shape[0]):
        for h in range(heads):
            s = h if lists > 1 else 0
            n = int(count[b, s])
            if n == 0:
                continue
            slots = slice(n) if index is None else index[b, s, :n].long()
            of_group = slice(h * group, (h + 1) * group)
            scores = query[b, of_group].to(wide) @ keys[b, h, slots].T * scale
            weights = scores.softmax(1)
            output[b, of_group] = (weights @ values[b, h, slots]).to(query.dtype)
            rows[b, s, :n] += weights.sum(0)
            lse[b, of_group] = scores.logsumexp(1)
    return SparseDecode(output, rows, lse)


def _fake(query, key, value, index, count, key_quantization, value_quantization, scale):
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    listed = key.shape[2] if index is None else index.shape[2]
    return (
        query.new_empty(query.shape),
        query.new_empty((*count.shape, listed), dtype=dtype),
        query.new_empty(query.shape[:2], dtype=dtype),
    )


_library.register_operator("sparse_decode_attention", fake=_fake, over_rows=False)
