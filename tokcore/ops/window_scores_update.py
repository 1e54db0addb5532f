"""Sums of attention weights over a window of steps, kept exactly."""

import torch
from torch import Tensor

from tokcore import _checks, _library

UNIT = 2.0**40  # a weight of 1
MOST_WEIGHT = 2048.0


def window_scores_update(
    score: Tensor,
    ring: Tensor,
    last_selected: Tensor,
    oldest: Tensor,
    rows: Tensor,
    index: Tensor | None,
    count: Tensor,
    step: Tensor,
    window: Tensor,
) -> None:
    r"""Brings the scores of a sparse key-value cache on by one step or several, in place.

    Equivalent to, for list s of row b, with the one row w (M,) of step t and n slots listed,

        row = zeros(C); row[index[:n]] = w[:n]
        for u in range(oldest, t + 1 - window):  # rows that leave
            score -= (ring[u % R].double() * 2**40).round().long(); ring[u % R] = 0
        score += (row.double() * 2**40).round().long(); ring[t % R] = row
        last_selected[index[:n]] = maximum(last_selected[index[:n]], t)
        oldest = maximum(oldest, t + 1 - window)

    .. math::
        S_j = \sum_{u = \max(t - W + 1,\, o)}^{t} \operatorname{round}(2^{40} w_{uj})

    Scores are integers: what is added is taken away again without a residue, in any order, on any
    device. Beyond 2^23 weights of 1 in one sum they wrap. The ring holds exactly the rows that are
    in the sum, zeros elsewhere; a window that grows brings nothing back.

    Args:
        score: (B, Hs, C) int64, written. Of a new state 0.
        ring: (B, Hs, R, C) float32, written: the row of step u at u % R. With R = 0 nothing ever
            leaves the sum, whatever the window. Of a new state 0.
        last_selected: (B, Hs, C) int32, written: the last step at which a slot was listed. Of a new
            state -1.
        oldest: (B,) int32, written: the oldest step whose row is in the sum. Of a new state 0.
        rows: (B, Hs, Q, M) float32, the weights of the steps step - Q + 1 to step, at most 2048 in
            size. Rows of negative steps do not exist and are not read.
        index: (B, Hs, M) int32, ascending slots, those of `rows`; or None: slots 0, 1, ... with
            M = C, of which row i weighs those below count - (Q - 1 - i), as in a prompt.
        count: (B, Hs) int32 in [0, M], how many entries of index (without one: slots) count.
        step: (B,) int32, the last of the steps, at least -1. Each step is given once.
        window: (B,) int32 in [0, R]: how many rows, up to `step`, are in the sum afterwards.

    Raises:
        TypeError, ValueError: an argument of a wrong dtype, shape, device or value; a written one
            that is not contiguous.
        RuntimeError: on the CPU, a count, index, step, window, oldest or weight out of range;
            nothing is written. On CUDA score and last_selected of that list become -1 and its ring
            NaN (all lists, and oldest -1, where a value of the row is wrong; one slot of score,
            where a weight is).
        NotImplementedError: an argument requires grad, outside torch.no_grad().

    Not differentiable. On CUDA two launches, no synchronisation.

    >>> score, last = torch.zeros(1, 1, 4, dtype=torch.int64), torch.full((1, 1, 4), -1).int()
    >>> ring, oldest = torch.zeros(1, 1, 2, 4), torch.zeros(1).int()
    >>> index, one = torch.tensor([[[0, 2]]]).int(), torch.ones(1).int()
    >>> for step in range(3):
    ...     rows = torch.tensor([[[[0.25, 0.75]]]])
    ...     window_scores_update(
    ...         score, ring, last, oldest, rows, index, 2 * one[None], step * one, 2 * one)
    >>> score / 2**40, last, oldest
    (tensor([[[0.5000, 0.0000, 1.5000, 0.0000]]]),
     tensor([[[ 2, -1,  2, -1]]], dtype=torch.int32), tensor([1], dtype=torch.int32))

    Source: ALISA (arXiv 2403.17312), the local attention sum of Algorithm 1 in section IV.B; with
    R = 0 the accumulated scores of FMInference/H2O:h2o_hf/utils_hh/modify_llama.py.
    """
    op = "window_scores_update"
    _checks.tensor(op, "score", score)
    _checks.tensor(op, "ring", ring)
    _checks.tensor(op, "rows", rows)
    if score.dim() != 3 or score.shape[1] < 1:
        raise ValueError(f"{op}: score must have shape (B, Hs, C), got {tuple(score.shape)}")
    for name, value, letters in (("ring", ring, "(B, Hs, R, C)"), ("rows", rows, "(B, Hs, Q, M)")):
        if value.dim() != 4:
            raise ValueError(f"{op}: {name} must have shape {letters}, got {tuple(value.shape)}")
    batch, lists, slots = score.shape
    queries, listed = rows.shape[2:]
    _checks.state(op, "score", score, torch.int64, score.shape, score)
    _checks.state(op, "ring", ring, torch.float32, (batch, lists, ring.shape[2], slots), score)
    _checks.state(op, "last_selected", last_selected, torch.int32, score.shape, score)
    _checks.state(op, "oldest", oldest, torch.int32, (batch,), score)
    _checks.typed(op, "rows", rows, torch.float32, (batch, lists, queries, listed), score)
    if index is not None:
        _checks.typed(op, "index", index, torch.int32, (batch, lists, listed), score)
    elif listed != slots:
        raise ValueError(
            f"{op}: rows must weigh all {slots} slots where there is no index, got {listed}"
        )
    _checks.typed(op, "count", count, torch.int32, (batch, lists), score)
    _checks.typed(op, "step", step, torch.int32, (batch,), score)
    _checks.typed(op, "window", window, torch.int32, (batch,), score)
    if _checks.debugged(score):
        _check_values(op, ring, oldest, rows, index, count, step, window)
    _library.native().window_scores_update(
        score, ring, last_selected, oldest, rows, index, count, step, window
    )


def _check_values(op, ring, oldest, rows, index, count, step, window) -> None:
    ring_rows, slots = ring.shape[2:]
    queries, listed = rows.shape[2:]
    most = window if ring_rows == 0 else window.new_tensor(ring_rows)
    _checks.holds(op, "count", count, (count >= 0) & (count <= listed), f"lie in [0, {listed}]")
    _checks.holds(op, "step", step, step >= -1, "be at least -1")
    right = (window >= 0) & (window <= most)
    _checks.holds(op, "window", window, right, f"lie in [0, R = {ring_rows}]")
    _checks.holds(
        op, "oldest", oldest, (oldest >= 0) & (oldest <= step + 1), "lie in [0, step + 1]"
    )
    entry = torch.arange(listed, device=rows.device)
    counted = entry < count.unsqueeze(-1)
    if index is not None:
        before = torch.nn.functional.pad(index[..., :-1], (1, 0), value=-1)
        right = ~counted | ((index > before) & (index < slots))
        _checks.holds(op, "index", index, right, f"hold ascending slots in [0, C = {slots})")
    seen = counted.unsqueeze(2)
    query = torch.arange(queries, device=rows.device)
    if index is None:
        ends = count.unsqueeze(-1) - (queries - 1 - query)
        seen = entry < ends.unsqueeze(-1)
    at = step.unsqueeze(-1) - (queries - 1) + query
    first = oldest if ring_rows == 0 else torch.maximum(oldest, step + 1 - window)
    enters = (at >= 0) & (at >= first.unsqueeze(-1))
    right = ~(seen & enters[:, None, :, None]) | (rows.abs() <= MOST_WEIGHT)
    _checks.holds(op, "rows", rows, right, f"be finite and at most {MOST_WEIGHT:.0f} in size")


def _reference(score, ring, last_selected, oldest, rows, index, count, step, window) -> None:
    """List by list, in place."""
    batch, lists, slots = score.shape
    ring_rows, queries = ring.shape[2], rows.shape[2]
    for b in range(batch):
        t, first = int(step[b]), int(oldest[b])
        if ring_rows > 0:
            first = max(first, t + 1 - int(window[b]))
        for s in range(lists):
            for at in range(int(oldest[b]), min(first, int(oldest[b]) + ring_rows)):
                score[b, s] -= _fixed_point(ring[b, s, at % ring_rows])
                ring[b, s, at % ring_rows] = 0
            n = int(count[b, s])
            for i in range(queries):
                at, seen = t - (queries - 1) + i, n
                if index is None:
                    seen = max(0, n - (queries - 1 - i))
                slot = torch.arange(seen) if index is None else index[b, s, :seen].long()
                if at >= 0:
                    last_selected[b, s, slot] = last_selected[b, s, slot].clamp(min=at)
                if at >= 0 and at >= first:
                    row = torch.zeros(slots, device=rows.device)
                    row[slot] = rows[b, s, i, :seen]
                    score[b, s] += _fixed_point(row)
                    if ring_rows > 0:
                        ring[b, s, at % ring_rows] = row
        oldest[b] = first


def _fixed_point(weights: Tensor) -> Tensor:
    return (weights.double() * UNIT).round().long()


_library.register_state_operator("window_scores_update")
