"""Which slots of a sparse key-value cache a query attends to."""

from typing import NamedTuple

import torch
from torch import Tensor

from tokcore import _checks, _library


class WindowSelection(NamedTuple):
    """index (B, Hs, size), ascending, -1 at the end; selected (B, Hs). Both int32."""

    index: Tensor
    selected: Tensor


def window_select(
    score: Tensor, count: Tensor, local: Tensor, top: Tensor, *, size: int, sinks: int = 0
) -> WindowSelection:
    r"""The last slots, the first, and those of the greatest scores between them, in their order.

    Equivalent to, for list s of row b, with n slots in use, l local ones and k ranked ones,

        between = score[b, s, sinks : n - l]
        ranked = sinks + between.argsort(descending=True, stable=True)[:k].sort().values
        index[b, s] = cat(arange(sinks), ranked, arange(n - l, n))  # then -1

    without sorting: a radix select on the integers finds the least score that is taken.

    .. math::
        I = \{0, \dots, f-1\} \cup \operatorname*{argtop}_{f \le j < n - l}{}_k\, S_j
            \cup \{n-l, \dots, n-1\}

    Of equal scores the lowest slots are taken: slots are in the order of positions, so these are
    the oldest tokens. Where fewer slots are in use than are asked for, all of them are taken.

    Args:
        score: (B, Hs, C) int64, any integers: sums of weights as `window_scores_update` keeps them.
        count: (B, Hs) int32 in [0, C], how many slots are in use.
        local: (B,) int32, at least 0: the last slots, of each list.
        top: (B,) int32, at least 0: how many are taken by their score.
        size: entries of a list of the result; local + top + sinks must fit in every row.
        sinks: the first slots that are always taken. Default 0.

    Returns:
        WindowSelection of

        - index (B, Hs, size) int32: the slots, ascending, then -1;
        - selected (B, Hs) int32: how many they are.

    Raises:
        TypeError, ValueError: an argument of a wrong dtype, shape, device or value.
        RuntimeError: on the CPU, a count, local or top out of range, or a size too small. On CUDA
            that list is -1 and its selected -1.

    Not differentiable. On CUDA one launch.

    >>> score = torch.tensor([[[9, 1, 0, 3, 0, 2, 0, 0]]])
    >>> one = torch.ones(1, dtype=torch.int32)
    >>> window_select(score, 7 * one[None], 2 * one, 2 * one, size=5)
    WindowSelection(index=tensor([[[ 0,  3,  5,  6, -1]]], dtype=torch.int32),
                    selected=tensor([[4]], dtype=torch.int32))

    Source: ALISA (arXiv 2403.17312), Algorithm 1 in section IV.B.
    """
    op = "window_select"
    _checks.tensor(op, "score", score)
    if score.dim() != 3 or score.shape[1] < 1:
        raise ValueError(f"{op}: score must have shape (B, Hs, C), got {tuple(score.shape)}")
    _checks.typed(op, "score", score, torch.int64, score.shape, score)
    _checks.typed(op, "count", count, torch.int32, score.shape[:2], score)
    _checks.typed(op, "local", local, torch.int32, score.shape[:1], score)
    _checks.typed(op, "top", top, torch.int32, score.shape[:1], score)
    for name, value in (("size", size), ("sinks", sinks)):
        if _checks.integer(op, name, value) < 0:
            raise ValueError(f"{op}: {name} must be at least 0, got {value}")
    if _checks.debugged(score):
        right = (count >= 0) & (count <= score.shape[2])
        _checks.holds(op, "count", count, right, f"lie in [0, {score.shape[2]}]")
        _checks.holds(op, "local", local, local >= 0, "be at least 0")
        _checks.holds(op, "top", top, top >= 0, "be at least 0")
        asked = local.long() + top + sinks
        _checks.holds(op, "local + top + sinks", asked, asked <= size, f"fit in size = {size}")
    return WindowSelection(
        *_library.call_constant("window_select", score, count, local, top, size, sinks)
    )


def _reference(
    score: Tensor, count: Tensor, local: Tensor, top: Tensor, *, size: int, sinks: int = 0
) -> WindowSelection:
    """List by list, by a stable sort."""
    index = torch.full((*score.shape[:2], size), -1, dtype=torch.int32, device=score.device)
    selected = torch.zeros_like(count)
    for b, s in torch.cartesian_prod(*(torch.arange(n) for n in score.shape[:2])).tolist():
        n = int(count[b, s])
        first = min(sinks, n)
        last = max(first, n - int(local[b]))
        between = score[b, s, first:last].argsort(descending=True, stable=True)[: int(top[b])]
        slots = torch.arange(n, device=score.device)
        taken = torch.cat([slots[:first], first + between.sort().values, slots[last:]])
        index[b, s, : len(taken)] = taken
        selected[b, s] = len(taken)
    return WindowSelection(index, selected)


def _fake(score, count, local, top, size, sinks):
    lists = score.shape[:2]
    return (
        score.new_empty((*lists, size), dtype=torch.int32),
        score.new_empty(lists, dtype=torch.int32),
    )


_library.register_operator("window_select", fake=_fake, over_rows=False)
