"""Dynamic time warping of a batch of cost matrices, with the path."""

from typing import NamedTuple

import torch
from torch import Tensor

from tokcore import _checks, _library


class DTW(NamedTuple):
    """Costs (B,), paths (B, M + L - 1, 2) int32 behind whose ends stands -1, lengths (B,) int32."""

    cost: Tensor
    path: Tensor
    path_length: Tensor


def dtw(
    cost: Tensor,
    row_lengths: Tensor | None = None,
    column_lengths: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float64,
) -> DTW:
    r"""The cheapest monotone path from the first cell of each matrix to the last.

    Equivalent to a loop over cells, ``D[i, j] = cost[i, j] + min(D[i-1, j-1], D[i-1, j],
    D[i, j-1])``, and a walk back, for every matrix of the batch at once. Always a path of the least
    cost, on ties too: a cell is reached diagonally before from above (i - 1) before from the left.

    .. math::
        D_{ij} = c_{ij} + \min(D_{i-1,j-1}, D_{i-1,j}, D_{i,j-1}), \quad D_{00} = c_{00}

    Args:
        cost: (B, M, L) float32, float64, float16 or bfloat16, finite; ``inf`` closes a cell. Any
            strides (copied once where not contiguous).
        row_lengths: (B,) int64 or int32 in [0, M]: rows beyond are not read. Default: M.
        column_lengths: (B,) likewise, in [0, L].
        dtype: of the sums, float64 or (not for a float64 cost) float32.

    Returns:
        DTW: cost (B,) in ``dtype``; path (B, M + L - 1, 2) int32, cells (row, column) in order, -1
        behind the end; path_length (B,) int32. A matrix that every path leaves through a closed
        cell costs ``inf`` and has no path (length 0), like one with rows but no columns; one with
        neither costs 0.

    Raises:
        TypeError, ValueError: an argument of a wrong dtype, shape or device.
        RuntimeError: on the CPU, a length out of range; a cost that is NaN, ``-inf`` or too large
            to be summed. On CUDA such a matrix has cost NaN and length -1 (with TOKCORE_DEBUG=1 it
            raises).

    Not differentiable: cost must not require grad. Paths are the same on every device.

    >>> total, path, length = dtw(torch.tensor([[[0.0, 5, 9], [4, 1, 2]]]))
    >>> total, path[0, : length[0]].tolist()
    (tensor([3.], dtype=torch.float64), [[0, 0], [1, 1], [1, 2]])

    Source: the recurrence and tie order of pierre-rouanet/dtw:dtw/dtw.py (1.4.0).
    """
    op = "dtw"
    arguments = _checks.lattice(op, "cost", cost, row_lengths, column_lengths, dtype)
    found = DTW(*_library.call_constant("dtw", *arguments))
    _checks.lattice_results(op, "cost", found[0])
    return found


def _reference(cost: Tensor) -> tuple[float, list[tuple[int, int]]]:
    """The definition for one matrix (M, L), a cell at a time."""
    rows, columns = cost.shape
    total = torch.full((rows + 1, columns + 1), torch.inf, dtype=cost.dtype)
    total[0, 0] = 0
    for i in range(rows):
        for j in range(columns):
            total[i + 1, j + 1] = cost[i, j] + min(total[i, j], total[i, j + 1], total[i + 1, j])
    i, j = rows, columns
    path = []
    while True:
        path.append((i - 1, j - 1))
        if (i, j) == (1, 1):
            return total[rows, columns].item(), path[::-1]
        steps = ((i - 1, j - 1), (i - 1, j), (i, j - 1))
        i, j = min(steps, key=lambda cell: total[cell].item())


def _fake(cost, row_lengths, column_lengths, wide):
    batch, rows, columns = cost.shape
    return (
        cost.new_empty((batch,), dtype=torch.float64 if wide else torch.float32),
        cost.new_empty((batch, torch.sym_max(rows + columns - 1, 0), 2), dtype=torch.int32),
        cost.new_empty((batch,), dtype=torch.int32),
    )


_library.register_operator("dtw", fake=_fake, over_rows=False)
