"""Batches of matrices of unequal sizes, for the tests of the alignment operators."""

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

INF, NAN = math.inf, math.nan
# (rows, columns) around what is done at one time: 4 rows, 8 to 64 lanes, 32 and more threads.
SIZES = [(1, 1), (2, 1), (1, 2), (31, 2), (2, 33), (1, 129), (129, 1), (33, 31), (31, 33), (9, 129)]


def ragged(matrices: list[Tensor], device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """(B, M, L) with NaN behind the lengths, where nothing may be read, and both lengths."""
    rows = torch.tensor([matrix.shape[0] for matrix in matrices])
    columns = torch.tensor([matrix.shape[1] for matrix in matrices])
    shape = len(matrices), int(rows.max()), int(columns.max())
    batch = torch.full(shape, NAN, dtype=matrices[0].dtype)
    for item, matrix in zip(batch, matrices, strict=True):
        item[: matrix.shape[0], : matrix.shape[1]] = matrix
    return batch.to(device), rows.to(device), columns.to(device)


def whole_numbers(sizes: list[tuple[int, int]], step: float, closed: float) -> list[Tensor]:
    """Few different multiples of ``step``: ties everywhere, sums exact; some cells ``closed``."""
    generator = torch.Generator().manual_seed(len(sizes))
    drawn = [torch.randint(0, 24, size, generator=generator) for size in sizes]
    return [torch.where(x == 23, closed, (x % 4).double() * step) for x in drawn]


@st.composite
def batches(draw, values: st.SearchStrategy, most: int, wide: bool = False) -> list[Tensor]:
    """One to three matrices of up to ``most`` rows and columns; ``wide``: never more rows."""
    matrices = []
    for _ in range(draw(st.integers(1, 3))):
        columns = draw(st.integers(1, most))
        rows = draw(st.integers(1, columns if wide else most))
        drawn = draw(st.lists(values, min_size=rows * columns, max_size=rows * columns))
        matrices.append(torch.tensor(drawn, dtype=torch.float64).view(rows, columns))
    return matrices
