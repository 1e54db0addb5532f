"""Slots that are no longer needed taken out of a sparse key-value cache."""

import torch
from torch import Tensor

from tokcore import _checks, _library


def kv_compact(
    key: Tensor,
    value: Tensor,
    position: Tensor,
    score: Tensor,
    ring: Tensor,
    last_selected: Tensor,
    count: Tensor,
    since: Tensor,
    local: Tensor,
    *,
    sinks: int = 0,
    key_quantization: Tensor | None = None,
    value_quantization: Tensor | None = None,
) -> None:
    r"""Moves the slots that are kept to the front of every tensor of the state, in place.

    Equivalent to, for list s of row b with n = count[b, s] slots in use and its heads h,

        slot = arange(n)
        kept = (last_selected[b, s, :n] >= since[b]) | (slot >= n - local[b]) | (slot < sinks)
        m = kept.sum()
        key[b, h, :m] = key[b, h, :n][kept]  # and value, their quantisation, position, score,
        # last_selected, and each row of the ring
        position[b, s, m:n] = last_selected[b, s, m:n] = -1
        score[b, s, m:n] = ring[b, s, :, m:n] = 0
        count[b, s] = m

    without a second copy of anything. The order of slots, which is that of positions, stays. What
    was not listed within the last W steps has no weight in any row of a window of W: dropping it
    changes no score of what stays, so since = t + 1 - W, with the next local window kept, is exact.

    Args:
        key, value: (B, Hkv, C, D) float32, float64, float16, bfloat16 or uint8, written.
        position: (B, Hs, C) int32, written; Hs = 1, or Hkv with slots of its own for each head.
        score: (B, Hs, C) int64, written.
        ring: (B, Hs, R, C) float32, written.
        last_selected: (B, Hs, C) int32, written.
        count: (B, Hs) int32, written: how many slots are in use.
        since: (B,) int32: slots listed at this step or later stay.
        local: (B,) int32, at least 0: so many of the last slots in use stay.
        sinks: so many of the first slots stay. Default 0.
        key_quantization, value_quantization: (B, Hkv, C, Z, 2) float32, written; with uint8, and
            only then.

    Keys and values of slots that become free are left as they are.

    Raises:
        TypeError, ValueError: an argument of a wrong dtype, shape, device or value; a written one
            that is not contiguous.
        RuntimeError: on the CPU, a count or local out of range; nothing is written. On CUDA the
            count of that list becomes -1, which every operator takes for wrong, and nothing else.
        NotImplementedError: an argument requires grad, outside torch.no_grad().

    Not differentiable. On CUDA two launches, no synchronisation; 4 bytes a slot of each list beside
    the state.

    >>> key, value = torch.arange(8.0).view(2, 1, 1, 4, 1).unbind()
    >>> position, last = torch.tensor([[[[3, 5, 8, 9]]], [[[7, 1, -1, -1]]]]).int().unbind()
    >>> score, ring = torch.tensor([[[5, 6, 7, 8]]]), torch.ones(1, 1, 2, 4)
    >>> count, since, local = torch.tensor([[4]]).int(), *torch.tensor([[2], [1]]).int().unbind()
    >>> kv_compact(key, value, position, score, ring, last, count, since, local)
    >>> key.flatten(), position, score, count
    (tensor([0., 3., 2., 3.]), tensor([[[ 3,  9, -1, -1]]], dtype=torch.int32),
     tensor([[[5, 8, 0, 0]]]), tensor([[2]], dtype=torch.int32))

    Source: ALISA (arXiv 2403.17312), section IV.B: of the tokens outside I_l and I_g, those that
    its sum cannot bring back.
    """
    op = "kv_compact"
    _checks.kv_store(
        op, key, value, position, last_selected, count, key_quantization, value_quantization
    )
    batch, lists, slots = position.shape
    _checks.state(op, "score", score, torch.int64, position.shape, key)
    _checks.tensor(op, "ring", ring)
    if ring.dim() != 4:
        raise ValueError(f"{op}: ring must have shape (B, Hs, R, C), got {tuple(ring.shape)}")
    _checks.state(op, "ring", ring, torch.float32, (batch, lists, ring.shape[2], slots), key)
    _checks.typed(op, "since", since, torch.int32, (batch,), key)
    _checks.typed(op, "local", local, torch.int32, (batch,), key)
    if _checks.integer(op, "sinks", sinks) < 0:
        raise ValueError(f"{op}: sinks must be at least 0, got {sinks}")
    if _checks.debugged(key):
        _checks.holds(op, "count", count, (count >= 0) & (count <= slots), f"lie in [0, {slots}]")
        _checks.holds(op, "local", local, local >= 0, "be at least 0")
    _library.native().kv_compact(
        key,
        value,
        position,
        score,
        ring,
        last_selected,
        count,
        since,
        local,
        sinks,
        key_quantization,
        value_quantization,
    )


def _reference(
    key,
    value,
    position,
    score,
    ring,
    last_selected,
    count,
    since,
    local,
    *,
    sinks=0,
    key_quantization=None,
    value_quantization=None,
) -> None:
    """List by list, in place."""
    heads, lists = key.shape[1], position.shape[1]
    of_heads = [x for x in (key, value, key_quantization, value_quantization) if x is not None]
    for b, s in torch.cartesian_prod(*(torch.arange(n) for n in position.shape[:2])).tolist():
        n = int(count[b, s])
        slot = torch.arange(n, device=key.device)
        kept = (last_selected[b, s, :n] >= since[b]) | (slot >= n - local[b]) | (slot < sinks)
        m = int(kept.sum())
        for h in range(heads) if lists == 1 else [s]:
            for x in of_heads:
                x[b, h, :m] = x[b, h, :n][kept]
        for x, free in ((position, -1), (score, 0), (last_selected, -1)):
            x[b, s, :m] = x[b, s, :n][kept]
            x[b, s, m:n] = free
        ring[b, s, :, :m] = ring[b, s, :, :n][:, kept]
        ring[b, s, :, m:n] = 0
        count[b, s] = m


_library.register_state_operator("kv_compact")
