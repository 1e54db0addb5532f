"""dtw: every path of small matrices, a loop over the cells of larger ones, the dtw package's."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lattices import INF, SIZES, assert_items_do_not_mix, batches, ragged, whole_numbers

from tokcore.ops import dtw
from tokcore.ops.dtw import _reference

GOLDEN = Path(__file__).parents[1] / "golden" / "songmass_metrics.json"
CASES = [case for case in json.loads(GOLDEN.read_text())["cases"] if case.get("path")]
MOVES = [(1, 1), (1, 0), (0, 1)]  # the tie rule
few_examples = settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def items_of(result):
    """(cost, path) of each item; behind the end of a path there is nothing but -1."""
    for cost, path, length in zip(*(part.cpu() for part in result), strict=True):
        assert (path[length:] == -1).all()
        yield cost.item(), [tuple(cell) for cell in path[:length].tolist()]


def run(matrices, backend, dtype=torch.float64):
    batch, rows, columns = ragged(matrices, backend.device)
    return list(items_of(dtw(batch, rows, columns, dtype=dtype)))


def every_path(rows: int, columns: int, cell: tuple[int, int] = (0, 0)):
    """(cells, moves) of every path from ``cell`` to the last one."""
    if cell == (rows - 1, columns - 1):
        yield [cell], []
    for move in MOVES:
        following = cell[0] + move[0], cell[1] + move[1]
        if following[0] < rows and following[1] < columns:
            for cells, moves in every_path(rows, columns, following):
                yield [cell, *cells], [MOVES.index(move), *moves]


def best_path(cost: list[list[float]]):
    """By looking at all of them; of equals the one whose last move comes first in MOVES, and so on
    from the end.
    """
    costs = [
        (sum(cost[i][j] for i, j in cells), moves[::-1], cells)
        for cells, moves in every_path(len(cost), len(cost[0]))
    ]
    least, _, cells = min(costs)
    return least, cells if least < INF else []


def loop(cost: list[list[float]]):
    """The recurrence and the walk back in Python's floats."""
    rows, columns = len(cost), len(cost[0])
    best = {(-1, -1): 0.0}

    def before(i, j):
        return [(i - a, j - b) for a, b in MOVES]

    for i in range(rows):
        for j in range(columns):
            best[i, j] = cost[i][j] + min(best.get(cell, INF) for cell in before(i, j))
    cell = rows - 1, columns - 1
    least, path = best[cell], []
    while least < INF and cell != (-1, -1):
        path.append(cell)
        cell = min(before(*cell), key=lambda other: best.get(other, INF))
    return least, path[::-1]


# ---- values -----------------------------------------------------------------------------------


def test_cases_by_hand(backend):
    cases = [
        ([[3.0]], 3.0, [(0, 0)]),
        ([[1.0, 2.0, 4.0]], 7.0, [(0, 0), (0, 1), (0, 2)]),
        ([[1.0], [2.0], [4.0]], 7.0, [(0, 0), (1, 0), (2, 0)]),
        ([[0.0, 5, 9], [4, 1, 2]], 3.0, [(0, 0), (1, 1), (1, 2)]),
        # A corner may be cut.
        ([[1.0, 1, 1], [9, 9, 1], [9, 9, 1]], 4.0, [(0, 0), (0, 1), (1, 2), (2, 2)]),
        # The diagonal before its equals.
        ([[0.0, 0], [0, 0]], 0.0, [(0, 0), (1, 1)]),
        ([[1.0, 0], [0, 1]], 2.0, [(0, 0), (1, 1)]),
        # Negative costs make the longer path the cheaper one; from above before from the left.
        ([[-1.0, -1], [-1, -1]], -3.0, [(0, 0), (0, 1), (1, 1)]),
        ([[0.0, -1], [-1, 0]], -1.0, [(0, 0), (0, 1), (1, 1)]),
        # Closed cells: one way left, none left, closed at either end.
        ([[0.0, INF], [2, 1]], 1.0, [(0, 0), (1, 1)]),
        ([[0.0, 1, 1], [INF, INF, 1]], 2.0, [(0, 0), (0, 1), (1, 2)]),
        ([[0.0, 1], [INF, INF], [1, 1]], INF, []),
        ([[0.0, INF, 1], [INF, INF, 1]], INF, []),
        ([[INF, 0.0], [0, 0]], INF, []),
        ([[0.0, 0.0], [0, INF]], INF, []),
        ([[INF, INF], [INF, INF]], INF, []),
    ]
    matrices = [torch.tensor(cost) for cost, _, _ in cases]
    wanted = [(total, path) for _, total, path in cases]
    assert run(matrices, backend) == wanted
    assert run(matrices, backend, torch.float32) == wanted


@few_examples
@given(
    matrices=batches(st.integers(-2, 3) | st.just(INF), most=5),
    exponent=st.sampled_from([0, -3, 40, -900]),
)
def test_the_first_of_all_paths_of_the_least_cost(backend, matrices, exponent):
    """Small whole numbers times a power of two: sums are exact, ties are many."""
    matrices = [matrix * 2.0**exponent for matrix in matrices]
    assert run(matrices, backend) == [best_path(matrix.tolist()) for matrix in matrices]


@few_examples
@given(matrices=batches(st.floats(-8, 8, width=16) | st.integers(-1, 1), most=6))
def test_the_reference(backend, matrices):
    assert run(matrices, backend) == [_reference(matrix) for matrix in matrices]
    matrices = [matrix.float() / 3 for matrix in matrices]
    assert run(matrices, backend, torch.float32) == [_reference(matrix) for matrix in matrices]
    doubles = [_reference(matrix.double()) for matrix in matrices]
    assert run(matrices, backend) == doubles


@pytest.mark.parametrize("kind", ["ties", "random", "tiny", "mixed"])
def test_sizes(backend, kind):
    """One batch of all sizes, NaN behind their ends; the same bits as the loop."""
    generator = torch.Generator().manual_seed(1)
    if kind == "ties":
        matrices = whole_numbers(SIZES, 0.25, INF)
    else:
        scale = 1e-310 if kind == "tiny" else 1.0  # denormal
        matrices = [torch.rand(s, generator=generator, dtype=torch.float64) * scale for s in SIZES]
    if kind == "mixed":
        for matrix in matrices:
            exponents = torch.randint(-300, 300, matrix.shape, generator=generator)
            matrix.mul_(10.0 ** exponents.double())
    assert run(matrices, backend) == [loop(matrix.tolist()) for matrix in matrices]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_golden(backend, case):
    """microsoft/muzic:songmass/evaluate/evaluate_timeseries.py with dtw 1.4.0."""
    curves = [torch.tensor(case[name]).double() for name in ("sampled_target", "sampled_hypo")]
    target, hypothesis = (curve - curve.mean() for curve in curves)
    cost = (target.unsqueeze(1) - hypothesis).abs()
    ((total, path),) = run([cost], backend)
    assert total == pytest.approx(case["dtw"], rel=1e-12, abs=1e-12)
    assert path == list(zip(*case["path"], strict=True))


def test_more_items_than_blocks(backend):
    assert_items_do_not_mix(backend, dtw, INF)


def test_empty_items(backend):
    """A row without a column costs inf; neither costs nothing. Between items that are neither."""
    one = torch.ones(3, 2, 4, device=backend.device)
    rows = torch.tensor([2, 0, 0], device=backend.device)
    columns = torch.tensor([0, 4, 0], device=backend.device)
    assert list(items_of(dtw(one, rows, columns))) == [(INF, []), (INF, []), (0.0, [])]
    mixed = torch.tensor([1, 0, 2], device=backend.device)
    diagonal = [(0, 0), (1, 1)]
    assert list(items_of(dtw(one[:, :, :2], mixed, mixed))) == [
        (1.0, [(0, 0)]),
        (0.0, []),
        (2.0, diagonal),
    ]
    for shape, cost in (((2, 0, 0), 0.0), ((2, 0, 3), INF), ((2, 3, 0), INF), ((2, 1, 0), INF)):
        result = dtw(torch.zeros(shape, device=backend.device))
        assert list(items_of(result)) == [(cost, [])] * 2
        assert result.path.shape == (2, max(sum(shape) - 3, 0), 2)
    result = dtw(torch.zeros(0, 3, 4, device=backend.device))
    assert [tuple(part.shape) for part in result] == [(0,), (0, 6, 2), (0,)]
