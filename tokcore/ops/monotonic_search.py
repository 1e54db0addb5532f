"""Monotonic alignment search: which row each column belongs to, as in Glow-TTS and VITS."""

from typing import NamedTuple

import torch
from torch import Tensor

from tokcore import _checks, _library


class MonotonicSearch(NamedTuple):
    """Scores (B,), the row of each column (B, L) int32, the columns of each row (B, M) int32."""

    score: Tensor
    rows: Tensor
    durations: Tensor


def monotonic_search(
    scores: Tensor,
    row_lengths: Tensor | None = None,
    column_lengths: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float64,
) -> MonotonicSearch:
    r"""The best assignment of columns (frames) to rows (text), each row in turn, none left out.

    Equivalent to a loop over columns, ``Q[i, j] = scores[i, j] + max(Q[i, j-1], Q[i-1, j-1])``,
    and a walk back, for every matrix of the batch at once. Always an assignment of the greatest
    sum; on ties a column stays with the row of the column after it.

    .. math::
        Q_{ij} = s_{ij} + \max(Q_{i,j-1}, Q_{i-1,j-1}), \quad Q_{00} = s_{00}

    Args:
        scores: (B, M, L) float32, float64, float16 or bfloat16, finite; ``-inf`` forbids a cell.
            Any strides (copied once where not contiguous).
        row_lengths: (B,) int64 or int32 in [0, M]: rows beyond are not read. Default: M.
        column_lengths: (B,) likewise, in [0, L], at least the item's row_lengths.
        dtype: of the sums, float64 or (not for float64 scores) float32.

    Returns:
        MonotonicSearch: score (B,) in ``dtype``; rows (B, L) int32, the row of each column;
        durations (B, M) int32, how many columns each row has; -1 behind the lengths of the item.
        An item whose every assignment holds ``-inf``, or with columns but no rows, has score
        ``-inf`` and -1 throughout; an empty one has score 0.

    Raises:
        TypeError, ValueError: an argument of a wrong dtype, shape or device.
        RuntimeError: on the CPU, a length out of range; more rows than columns; a score that is
            NaN, ``inf`` or too large to be summed. On CUDA such an item has score NaN and -1
            throughout (with TOKCORE_DEBUG=1 it raises).

    Not differentiable: scores must not require grad. Assignments are the same on every device.

    >>> found = monotonic_search(torch.tensor([[[0.0, 2, 9], [5, 1, 7]]]))
    >>> found.score.item(), found.rows.tolist(), found.durations.tolist()
    (9.0, [[0, 0, 1]], [[2, 1]])

    Source: arXiv 2005.11129, section 3 (Algorithm 1); jaywalnut310/glow-tts:monotonic_align.
    """
    op = "monotonic_search"
    arguments = _checks.lattice(op, "scores", scores, row_lengths, column_lengths, dtype)
    found = MonotonicSearch(*_library.call_constant("monotonic_search", *arguments))
    _checks.lattice_results(op, "scores", found[0])
    return found


def maximum_path(value: Tensor, mask: Tensor, *, frames_first: bool = False) -> Tensor:
    """Glow-TTS's and VITS's ``maximum_path``: the best assignment as a matrix of zeros and ones.

    Equivalent to the Cython functions of that name, but exact in float64, for text that is not
    longer than its frames (theirs read beyond their arrays there), and without a copy to the host.

    Args:
        value: (B, text, frames) as in Glow-TTS, or (B, frames, text) with ``frames_first``, as in
            VITS. Not overwritten.
        mask: of that shape, any dtype: nonzero over the first ``text`` and ``frames`` of each
            item.
        frames_first: as above.

    Returns:
        value's shape and dtype, 1 where a frame belongs to a token, 0 elsewhere (everywhere, if
        every assignment holds ``-inf``). Not differentiable.

    Raises:
        as :func:`monotonic_search`, whose name its texts bear; on CUDA an infeasible item is NaN
        throughout.

    >>> maximum_path(torch.tensor([[[0.0, 2, 9], [5, 1, 7]]]), torch.ones(1, 2, 3))
    tensor([[[1., 1., 0.],
             [0., 0., 1.]]])
    """
    op = "maximum_path"
    _checks.tensor(op, "value", value)
    _checks.tensor(op, "mask", mask)
    if value.dim() != 3 or mask.shape != value.shape or mask.device != value.device:
        raise ValueError(
            f"{op}: value must have shape (B, text, frames) and mask the same, on one device, got "
            f"{tuple(value.shape)} on {value.device} and {tuple(mask.shape)} on {mask.device}"
        )
    if frames_first:
        value, mask = value.transpose(1, 2), mask.transpose(1, 2)
    kept = mask != 0
    text = kept[:, :, 0].sum(1) if value.shape[2] else kept.new_zeros(len(kept), dtype=torch.long)
    frames = kept[:, 0].sum(1) if value.shape[1] else torch.zeros_like(text)
    _refuse_holes(op, kept, text, frames)
    found = monotonic_search(value.detach(), text, frames)
    background = torch.where(found.score.isnan(), torch.nan, 0.0).to(value.dtype)
    path = background.view(-1, 1, 1).expand(value.shape).contiguous()
    if value.shape[1]:
        ones = torch.where(found.rows < 0, background.unsqueeze(1), 1)
        path.scatter_(1, found.rows.clamp(min=0).long().unsqueeze(1), ones.unsqueeze(1))
    return path.transpose(1, 2) if frames_first else path


def _refuse_holes(op: str, kept: Tensor, text: Tensor, frames: Tensor) -> None:
    """Where looking at values costs no synchronisation."""
    if kept.device.type != "cpu" or not _checks.readable(kept):
        return
    row = torch.arange(kept.shape[1]) < text.unsqueeze(1)
    column = torch.arange(kept.shape[2]) < frames.unsqueeze(1)
    rectangle = row.unsqueeze(2) & column.unsqueeze(1)
    if not torch.equal(kept, rectangle):
        item = int((kept != rectangle).flatten(1).any(1).nonzero()[0])
        raise ValueError(
            f"{op}: mask must be nonzero over the first text and frames of an item and zero "
            f"elsewhere, got another form in item {item}"
        )


def _reference(scores: Tensor) -> tuple[float, list[int]]:
    """The definition for one matrix (M, L), a cell at a time: score and the row of each column."""
    rows, columns = scores.shape
    best = torch.full((rows + 1, columns + 1), -torch.inf, dtype=scores.dtype)
    best[0, 0] = 0
    for j in range(columns):
        for i in range(rows):
            best[i + 1, j + 1] = scores[i, j] + max(best[i + 1, j], best[i, j])
        best[0, 0] = -torch.inf
    row, assigned = rows, []
    for j in range(columns, 0, -1):
        assigned.append(row - 1)
        if j > 1 and not best[row, j - 1] >= best[row - 1, j - 1]:
            row -= 1
    return best[rows, columns].item(), assigned[::-1]


def _fake(scores, row_lengths, column_lengths, wide):
    batch, rows, columns = scores.shape
    return (
        scores.new_empty((batch,), dtype=torch.float64 if wide else torch.float32),
        scores.new_empty((batch, columns), dtype=torch.int32),
        scores.new_empty((batch, rows), dtype=torch.int32),
    )


_library.register_operator("monotonic_search", fake=_fake, over_rows=False)
