"""Batches of matrices of unequal sizes, for the tests of the alignment operators."""

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

INF, NAN = math.inf, math.nan
# (rows, columns) around what is done at one time: 4 rows, 8 to 64 lanes, 32 and more threads.
SIZES = [(1, 1), (2, 1), (1, 2), (31, 2), (2, 33), (1, 129), (129, 1), (33, 31), (31, 33), (9, 129)]
SMALL = [(2, 3), (1, 1), (2, 2), (1, 3), (3, 4)]


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


def assert_items_do_not_mix(backend, operator, closed: float) -> None:
    """More items than a grid has blocks (4096): some do a second one. The same bits as in batches
    where none does, and of wrong items (errors on the CPU) none before or after is the worse.
    """
    sizes = [SMALL[item % len(SMALL)] for item in range(4200)]
    batch, rows, columns = ragged(whole_numbers(sizes, 0.25, closed), backend.device)
    wrong = [] if backend.checks_values else [3, 4100]
    batch[wrong, 0, 0] = NAN
    whole = operator(batch, rows, columns)
    assert whole[0].isnan().nonzero().flatten().tolist() == wrong
    for half in (slice(0, 2100), slice(2100, 4200)):
        for got, want in zip(whole, operator(batch[half], rows[half], columns[half]), strict=True):
            torch.testing.assert_close(got[half], want, rtol=0, atol=0, equal_nan=True)


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
