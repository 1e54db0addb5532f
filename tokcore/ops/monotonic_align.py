"""Monotonic alignment by groups: one row with several columns, or one column with several rows."""

from typing import NamedTuple

import torch
from torch import Tensor

from tokcore import _checks, _library


class MonotonicAlignment(NamedTuple):
    """Scores (B,), groups (B, M + L - 1, 4), group counts (B,), ranges (B, M, 2) and (B, L, 2)."""

    score: Tensor
    groups: Tensor
    group_count: Tensor
    row_ranges: Tensor
    column_ranges: Tensor


def monotonic_align(
    scores: Tensor,
    row_lengths: Tensor | None = None,
    column_lengths: Tensor | None = None,
    *,
    length_penalty: float = 0.5,
    dtype: torch.dtype = torch.float64,
) -> MonotonicAlignment:
    r"""The best partition of rows and columns, in order, into groups of one with several.

    Equivalent to a loop over cells, with the maximum over every last group of one column (rows
    k to i) or one row (columns k to j), and a walk back, for every matrix of the batch at once.
    SongMASS aligns the notes (rows) of a sentence with its syllables (columns) by it.

    .. math::
        F_{ij} = \max\Bigl(\max_{k<i} F_{k,j-1} + \overline{S_{k..i-1,\,j-1}} -
        \lambda\frac{i-k}{M},\ \max_{k<j} F_{i-1,k} + \overline{S_{i-1,\,k..j-1}} -
        \lambda\frac{j-k}{L}\Bigr)

    with :math:`F_{00} = 0`, the other borders :math:`-\infty`, M and L the item's own lengths.
    Ties: the first maximum, in the order of the formula with k rising (the longest group of rows
    first, groups of rows before groups of columns). Means are differences of running sums over
    their count, a division each; every cell takes min(M, L) steps that wait for each other.

    Args:
        scores: (B, M, L) float32, float64, float16 or bfloat16, finite, M and L at most 32767;
            ``-inf`` forbids a cell. Any strides (copied once where not contiguous).
        row_lengths: (B,) int64 or int32 in [0, M]: rows beyond are not read. Default: M.
        column_lengths: (B,) likewise, in [0, L].
        length_penalty: :math:`\lambda`, in [-1e30, 1e30].
        dtype: of all sums and of the score: float64 or (not for float64 scores) float32, whose
            rounding decides between means that are equal or nearly so. A large finite score where
            ``-inf`` is meant leaves the running sums behind it few digits.

    Returns:
        MonotonicAlignment, integers int32 and -1 behind the lengths of an item: score (B,); groups
        (B, M + L - 1, 4), in order, half-open (row, rows' end, column, columns' end); group_count
        (B,); row_ranges (B, M, 2), the half-open range of columns that each row is grouped with;
        column_ranges (B, L, 2) likewise. An item without any partition (rows but no columns, or
        every one holds ``-inf``) has score ``-inf`` and no groups; an empty one has score 0.

    Raises:
        TypeError, ValueError: an argument of a wrong dtype, shape, device or value.
        RuntimeError: on the CPU, a length out of range; a score that is NaN, ``inf`` or too large
            to be summed. On CUDA such an item has score NaN, count -1 and -1 throughout (with
            TOKCORE_DEBUG=1 it raises).

    Not differentiable: scores must not require grad. Groups are the same on every device.

    >>> attention = torch.tensor([[[0.9, 0.1], [0.8, 0.2], [0.1, 0.7]]])
    >>> found = monotonic_align(attention)
    >>> found.groups[0, : found.group_count[0]].tolist()
    [[0, 2, 0, 1], [2, 3, 1, 2]]

    Source: arXiv 2012.05168; microsoft/muzic:relyme/songmass_en/gen_at/11_l2m_dp_bak.py.
    """
    op = "monotonic_align"
    arguments = _checks.lattice(op, "scores", scores, row_lengths, column_lengths, dtype)
    # Times a length, and summed with scores, it stays in float32.
    _checks.number(op, "length_penalty", length_penalty, least=-1e30, most=1e30)
    *tensors, wide = arguments
    found = MonotonicAlignment(
        *_library.call_constant("monotonic_align", *tensors, float(length_penalty), wide)
    )
    _checks.lattice_results(op, "scores", found.score)
    return found


def _reference(
    scores: Tensor, length_penalty: float = 0.5
) -> tuple[float, list[tuple[int, int, int, int]]]:
    """The definition for one matrix (M, L), a candidate at a time: score and groups."""
    rows, columns = scores.shape
    if rows == 0 or columns == 0:
        return (0.0 if rows == columns else -torch.inf), []
    best = torch.full((rows + 1, columns + 1), -torch.inf, dtype=scores.dtype)
    best[0, 0] = 0
    last = {}
    for i in range(1, rows + 1):
        for j in range(1, columns + 1):
            along_rows = [
                (best[k, j - 1] + scores[k:i, j - 1].mean() - length_penalty * (i - k) / rows, k)
                for k in range(i)
            ]
            along_columns = [
                (best[i - 1, k] + scores[i - 1, k:j].mean() - length_penalty * (j - k) / columns, k)
                for k in range(j)
            ]
            groups = [(value, (k, i, j - 1, j)) for value, k in along_rows]
            groups += [(value, (i - 1, i, k, j)) for value, k in along_columns]
            # max returns the first of equals
            best[i, j], last[i, j] = max(groups, key=lambda candidate: candidate[0].item())
    score, cell, found = best[rows, columns].item(), (rows, columns), []
    while score > -torch.inf and cell != (0, 0):
        group = last[cell]
        found.append(group)
        cell = (group[0], group[2])
    return score, found[::-1]


def _fake(scores, row_lengths, column_lengths, length_penalty, wide):
    batch, rows, columns = scores.shape
    shapes = ((batch, torch.sym_max(rows + columns - 1, 0), 4), (batch,))
    shapes += ((batch, rows, 2), (batch, columns, 2))
    score = scores.new_empty((batch,), dtype=torch.float64 if wide else torch.float32)
    return score, *(scores.new_empty(shape, dtype=torch.int32) for shape in shapes)


_library.register_operator("monotonic_align", fake=_fake, over_rows=False)
