"""New tokens behind those that a sparse key-value cache holds."""

import torch
from torch import Tensor

from tokcore import _checks, _library

QUANTIZED_FROM = (torch.float32, torch.float16, torch.bfloat16)


def kv_append(
    key: Tensor,
    value: Tensor,
    position: Tensor,
    last_selected: Tensor,
    count: Tensor,
    new_key: Tensor,
    new_value: Tensor,
    length: Tensor,
    valid: Tensor,
    *,
    key_quantization: Tensor | None = None,
    value_quantization: Tensor | None = None,
) -> None:
    r"""Writes the last tokens of each row into its next free slots, in place.

    Equivalent to, for head h of row b with v = valid[b] and n = count[b, s] of its list s,

        key[b, h, n : n + v] = new_key[b, h, Q - v :]  # and value
        position[b, s, n : n + v] = arange(length[b], length[b] + v)
        last_selected[b, s, n : n + v] = -1
        count[b, s] = n + v

    The first Q - v tokens are the padding of a batch of prompts on its left: they do not exist, so
    a row counts from its own first token. Keys and values of dtype uint8 are quantised as they are
    written, each token and each of Z equal groups of its D entries by itself:

    .. math::
        \lambda = \frac{\max x - \min x}{255}, \quad
        z = \left\lfloor -\frac{\min x}{\lambda} + \tfrac12 \right\rfloor, \quad
        q = \operatorname{clip}\left(\left\lfloor \frac{x}{\lambda} + \tfrac12 \right\rfloor + z,
            0, 255\right), \quad x \approx \lambda q + o, \quad o = -\lambda z

    in float64, of which :math:`(\lambda, o)` are stored as float32. A constant group has scale 0,
    q = 0 and the constant as its offset; one with NaN or infinity has q = 0, scale and offset NaN.

    Args:
        key, value: (B, Hkv, C, D) float32, float64, float16, bfloat16 or uint8, written.
        position: (B, Hs, C) int32, written; Hs = 1, or Hkv with slots of its own for each head.
        last_selected: (B, Hs, C) int32, written.
        count: (B, Hs) int32, written: how many slots are in use.
        new_key, new_value: (B, Hkv, Q, D), of the dtype of key; float32, float16 or bfloat16 where
            that is uint8.
        length: (B,) int32, how many tokens the row has seen before these: the position of the first
            of them.
        valid: (B,) int32 in [0, Q], how many of the Q tokens are the row's, the last ones.
        key_quantization, value_quantization: (B, Hkv, C, Z, 2) float32, written: scale and offset
            of each group; with uint8, and only then. Z divides D; keys and values each have theirs.

    Raises:
        TypeError, ValueError: an argument of a wrong dtype, shape, device or value; a written one
            that is not contiguous.
        RuntimeError: on the CPU, a list without room, or a count, length or valid out of range (a
            length has to exceed the last position in use); nothing is written. On CUDA the count of
            that list becomes -1, which every operator takes for wrong, and nothing else.
        NotImplementedError: an argument requires grad, outside torch.no_grad().

    Not differentiable. On CUDA two launches, no synchronisation.

    >>> key, value = torch.zeros(2, 1, 1, 4, 2).unbind()
    >>> position, last = torch.full((2, 1, 1, 4), -1, dtype=torch.int32).unbind()
    >>> count, zero = torch.zeros(1, 1).int(), torch.zeros(1).int()
    >>> new = torch.tensor([[[[0.0, 0.0], [1.0, 2.0], [3.0, 4.0]]]])  # the first is padding
    >>> kv_append(key, value, position, last, count, new, -new, zero, zero + 2)
    >>> key[0, 0], position, count
    (tensor([[1., 2.], [3., 4.], [0., 0.], [0., 0.]]),
     tensor([[[ 0,  1, -1, -1]]], dtype=torch.int32), tensor([[2]], dtype=torch.int32))

    Source: ALISA (arXiv 2403.17312), section V.B for the quantisation, Store in Algorithm 2.
    """
    op = "kv_append"
    _checks.kv_store(
        op, key, value, position, last_selected, count, key_quantization, value_quantization
    )
    batch, heads, slots, dim = key.shape
    _checks.tensor(op, "new_key", new_key)
    dtype = new_key.dtype
    if key.dtype == torch.uint8 and dtype not in QUANTIZED_FROM:
        raise TypeError(
            f"{op}: new_key must be float32, float16 or bfloat16 to be quantised, got {dtype}"
        )
    if new_key.dim() != 4:
        raise ValueError(
            f"{op}: new_key must have shape (B, Hkv, Q, D), got {tuple(new_key.shape)}"
        )
    dtype = dtype if key.dtype == torch.uint8 else key.dtype
    shape = (batch, heads, new_key.shape[2], dim)
    _checks.typed(op, "new_key", new_key, dtype, shape, key)
    _checks.typed(op, "new_value", new_value, dtype, shape, key)
    _checks.typed(op, "length", length, torch.int32, (batch,), key)
    _checks.typed(op, "valid", valid, torch.int32, (batch,), key)
    if _checks.debugged(key):
        _check_values(op, position, count, length, valid, new_key.shape[2], slots)
    _library.native().kv_append(
        key,
        value,
        position,
        last_selected,
        count,
        new_key,
        new_value,
        length,
        valid,
        key_quantization,
        value_quantization,
    )


def _check_values(op, position, count, length, valid, queries: int, slots: int) -> None:
    _checks.holds(op, "count", count, (count >= 0) & (count <= slots), f"lie in [0, {slots}]")
    right = (valid >= 0) & (valid <= queries)
    _checks.holds(op, "valid", valid, right, f"lie in [0, Q = {queries}]")
    right = (length >= 0) & (length.long() + valid < 2**31)
    _checks.holds(op, "length", length, right, "be at least 0, and below 2^31 with valid")
    right = count + valid.unsqueeze(-1) <= slots
    _checks.holds(
        op, "count", count, right, f"leave room for valid tokens of Q = {queries} in C = {slots}"
    )
    if slots > 0:
        last = position.gather(-1, (count.unsqueeze(-1) - 1).clamp(min=0).long()).squeeze(-1)
        follows = (count == 0) | (valid == 0).unsqueeze(-1) | (last < length.unsqueeze(-1))
        _checks.holds(op, "length", length, follows.all(-1), "exceed the last position in use")


def _reference(
    key,
    value,
    position,
    last_selected,
    count,
    new_key,
    new_value,
    length,
    valid,
    *,
    key_quantization=None,
    value_quantization=None,
) -> None:
    """Head by head, in place."""
    heads, queries = new_key.shape[1:3]
    sides = ((key, new_key, key_quantization), (value, new_value, value_quantization))
    for b, added in enumerate(valid.tolist()):
        for h in range(heads):
            n = int(count[b, h if count.shape[1] > 1 else 0])
            for stored, tokens, quantization in sides:
                token = tokens[b, h, queries - added :]
                if quantization is not None:
                    token, pair = _quantized(token, quantization.shape[3])
                    quantization[b, h, n : n + added] = pair
                stored[b, h, n : n + added] = token
        for s, n in enumerate(count[b].tolist()):
            at = torch.arange(added, device=key.device) + int(length[b])
            position[b, s, n : n + added] = at.int()
            last_selected[b, s, n : n + added] = -1
            count[b, s] = n + added


def _quantized(token: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """(Q, D) uint8, and the scale and offset of each group (Q, Z, 2) float32."""
    x = token.double().unflatten(-1, (groups, -1))
    least, greatest = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = (greatest - least) / 255
    zero = torch.where(scale > 0, (-least / scale + 0.5).floor(), 0)
    q = ((x / scale + 0.5).floor() + zero).clamp(0, 255)
    offset = torch.where(scale > 0, -scale * zero, least)
    wrong = ~x.isfinite().all(-1, keepdim=True)
    pair = torch.cat([scale, offset], -1).masked_fill(wrong, torch.nan)
    return torch.where((scale > 0) & ~wrong, q, 0).flatten(-2).to(torch.uint8), pair.float()


_library.register_state_operator("kv_append")
