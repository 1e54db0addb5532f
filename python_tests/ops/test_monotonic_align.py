"""monotonic_align: every partition of small matrices in exact arithmetic, the authors' results, and
running sums a column at a time, bit for bit, for larger ones.
"""

import math
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lattices import INF, NAN, SIZES, assert_items_do_not_mix, batches, ragged, whole_numbers

from tokcore.ops import monotonic_align
from tokcore.ops.monotonic_align import _reference

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "songmass_dp.npz")
CASES = list(enumerate(GOLDEN["names"].tolist()))
DYADIC = ("zeros_", "ones_", "half_", "eye_", "quant")
few_examples = settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def items_of(result, sizes):
    """(score, groups) of each item, which cover it in order; the other outputs say the same."""
    parts = zip(*(part.cpu() for part in result), sizes, strict=True)
    for score, groups, count, row_ranges, column_ranges, (rows, columns) in parts:
        assert (groups[count:] == -1).all()
        want_rows, want_columns = (
            torch.full_like(row_ranges, -1),
            torch.full_like(column_ranges, -1),
        )
        row = column = 0
        for row, rows_end, column, columns_end in groups[:count].tolist():
            assert 1 in (rows_end - row, columns_end - column)
            assert (want_rows[:row] >= 0).all()
            assert (want_columns[:column] >= 0).all()
            assert (want_rows[row:] == -1).all()
            assert (want_columns[column:] == -1).all()
            want_rows[row:rows_end] = torch.tensor([column, columns_end])
            want_columns[column:columns_end] = torch.tensor([row, rows_end])
        if count > 0:
            assert ((want_rows >= 0).sum(0) == rows).all()
            assert ((want_columns >= 0).sum(0) == columns).all()
        assert torch.equal(row_ranges, want_rows)
        assert torch.equal(column_ranges, want_columns)
        yield score.item(), [tuple(group) for group in groups[:count].tolist()]


def run(matrices, backend, penalty=0.5, dtype=torch.float64):
    batch, rows, columns = ragged(matrices, backend.device)
    result = monotonic_align(batch, rows, columns, length_penalty=penalty, dtype=dtype)
    return list(items_of(result, [tuple(matrix.shape) for matrix in matrices]))


def every_partition(rows: int, columns: int):
    """(groups, whether each is one of rows) in the order of the tie rule, from the last group."""
    if (rows, columns) == (0, 0):
        yield [], []
    elif rows > 0 and columns > 0:
        last = [((k, rows, columns - 1, columns), True) for k in range(rows)]
        last += [((rows - 1, rows, k, columns), False) for k in range(columns)]
        for group, of_rows in last:
            for groups, kinds in every_partition(group[0], group[2]):
                yield [*groups, group], [*kinds, of_rows]


def value_of(scores, groups, kinds, penalty):
    """Exact; -inf with a forbidden cell."""
    value = Fraction(0)
    for (row, rows_end, column, columns_end), of_rows in zip(groups, kinds, strict=True):
        cells = [scores[i][j] for i in range(row, rows_end) for j in range(column, columns_end)]
        if -INF in cells:
            return -INF
        length = len(scores) if of_rows else len(scores[0])
        value += sum(map(Fraction, cells)) / len(cells)
        value -= Fraction(penalty) * len(cells) / length
    return value


def best_partition(scores: list[list[float]], penalty: float):
    """The first of the greatest, by looking at all of them."""
    found = [
        (value_of(scores, groups, kinds, penalty), groups)
        for groups, kinds in every_partition(len(scores), len(scores[0]))
    ]
    value, groups = max(found, key=lambda one: one[0])
    return float(value), groups if value > -INF else []


def by_columns(scores: np.ndarray, penalty: float):
    """The recurrence with running sums, all rows of a column at once, in the type of ``scores``."""
    real = scores.dtype.type
    rows, columns = scores.shape
    closed = scores == -INF
    plain = np.where(closed, real(0), scores)
    border = np.zeros((1, columns), scores.dtype), np.zeros((rows, 1), scores.dtype)
    row_sums = np.concatenate([border[0], np.cumsum(plain, 0, dtype=real)], 0)
    column_sums = np.concatenate([border[1], np.cumsum(plain, 1, dtype=real)], 1)
    i, x, y = (np.arange(1, n + 1) for n in (rows, rows, columns))
    row_least = np.maximum.accumulate(np.where(closed, i[:, None], 0), 0)
    column_least = np.maximum.accumulate(np.where(closed, y, 0), 1)
    row_costs = np.concatenate([[real(0)], real(penalty) * x.astype(real) / real(rows)])
    column_costs = np.concatenate([[real(0)], real(penalty) * y.astype(real) / real(columns)])
    sizes = i[:, None] - np.arange(rows)
    counts, costs = np.maximum(sizes, 1).astype(real), row_costs[np.maximum(sizes, 0)]
    best = np.full((rows + 1, columns + 1), -INF, real)
    best[0, 0] = 0
    first, several_rows = (np.zeros((rows, columns), dtype) for dtype in (int, bool))
    for j in range(1, columns + 1):
        sums = row_sums[:, j - 1]
        along = (best[:-1, j - 1] + (sums[1:, None] - sums[:-1]) / counts) - costs
        allowed = (sizes > 0) & (np.arange(rows) >= row_least[:, j - 1 : j])
        along = np.where(allowed, along, -INF)
        lengths = j - np.arange(j)
        means = (column_sums[:, j : j + 1] - column_sums[:, :j]) / lengths.astype(real)
        across = (best[:-1, :j] + means) - column_costs[lengths]
        across = np.where(np.arange(j) >= column_least[:, j - 1 : j], across, -INF)
        several_rows[:, j - 1] = along.max(1) >= across.max(1)
        first[:, j - 1] = np.where(several_rows[:, j - 1], along.argmax(1), across.argmax(1))
        best[1:, j] = np.maximum(along.max(1), across.max(1))
    assert best.dtype == real
    groups, row, column = [], rows, columns
    while best[rows, columns] > -INF and row > 0:
        k, of_rows = int(first[row - 1, column - 1]), several_rows[row - 1, column - 1]
        groups.append((k if of_rows else row - 1, row, column - 1 if of_rows else k, column))
        row, column = groups[-1][0], groups[-1][2]
    return float(best[rows, columns]), groups[::-1]


# ---- values -----------------------------------------------------------------------------------


def test_cases_by_hand(backend):
    cases = [
        ([[3.0]], 0.5, 2.5, [(0, 1, 0, 1)]),
        ([[3.0]], 0.0, 3.0, [(0, 1, 0, 1)]),
        # One group: the mean less the whole penalty.
        ([[1.0, 2, 6]], 0.5, 2.5, [(0, 1, 0, 3)]),
        ([[1.0], [2], [6]], 0.5, 2.5, [(0, 3, 0, 1)]),
        # Two rows share a column: (1 + 3) / 2 - 2 / 4 + 5 - 1 / 4, the single group paying 1 / L.
        ([[1.0, 0], [3, 0], [0, 5], [0, 5]], 0.0, 7.0, [(0, 2, 0, 1), (2, 4, 1, 2)]),
        ([[1.0, 3, 0, 0], [0, 0, 5, 5]], 0.0, 7.0, [(0, 1, 0, 2), (1, 2, 2, 4)]),
        # A one-to-one group pays 1 / max(M, L) of the penalty.
        ([[4.0, 0], [0, 4], [0, 4]], 3.0, 8.0 - 3.0, [(0, 1, 0, 1), (1, 3, 1, 2)]),
        # Everything equal: the longest group of rows last, however the rest has to go.
        ([[0.0, 0], [0, 0], [0, 0]], 0.0, 0.0, [(0, 1, 0, 1), (1, 3, 1, 2)]),
        ([[0.0, 0, 0], [0, 0, 0]], 0.0, 0.0, [(0, 1, 0, 2), (1, 2, 2, 3)]),
        # Below 0 the penalty is a reward for length.
        ([[2.0, 2], [2, 2]], -1.0, 5.0, [(0, 1, 0, 1), (1, 2, 1, 2)]),
        # Forbidden cells: gone around, or nothing is left.
        ([[1.0, -INF], [1, 1]], 0.0, 2.0, [(0, 1, 0, 1), (1, 2, 1, 2)]),
        ([[1.0, -INF], [-INF, -INF]], 0.0, -INF, []),
        ([[-INF, 1.0], [1, 1]], 0.0, -INF, []),
        ([[1.0, 1, -INF]], 0.0, -INF, []),
        ([[-INF, -INF], [-INF, -INF]], 0.5, -INF, []),
    ]
    for scores, penalty, score, groups in cases:
        for dtype in (torch.float64, torch.float32):
            found = run([torch.tensor(scores)], backend, penalty, dtype)
            assert found == [(score, groups)]


@few_examples
@given(
    matrices=batches(st.integers(-2, 3) | st.just(-INF), most=4),
    penalty=st.sampled_from([0, 1, 4, -1]),
    exponent=st.sampled_from([0, -3, 40, -120, -1060]),
)
def test_the_first_of_all_partitions_of_the_greatest_score(backend, matrices, penalty, exponent):
    """Multiples of 12 times a power of two, of which means and penalties are exact: many ties."""
    scale = 12 * 2.0**exponent
    matrices = [matrix * scale for matrix in matrices]
    want = [best_partition(matrix.tolist(), penalty * scale) for matrix in matrices]
    assert run(matrices, backend, penalty * scale) == want
    if exponent > -200:
        narrow = [matrix.float() for matrix in matrices]
        assert run(narrow, backend, penalty * scale, torch.float32) == want


@few_examples
@given(
    matrices=batches(st.floats(-8, 8) | st.just(-INF), most=4),
    penalty=st.floats(-2, 2),
)
def test_no_partition_is_better(backend, matrices, penalty):
    for matrix, (score, groups) in zip(matrices, run(matrices, backend, penalty), strict=True):
        best, _ = best_partition(matrix.tolist(), penalty)
        assert score == pytest.approx(best, abs=1e-13)
        if groups:
            kinds = [
                # a one-to-one group pays the smaller of its two penalties
                rows_end - row > 1
                or (
                    columns_end - column == 1
                    and penalty / matrix.shape[0] < penalty / matrix.shape[1]
                )
                for row, rows_end, column, columns_end in groups
            ]
            value = value_of(matrix.tolist(), groups, kinds, penalty)
            assert float(value) == pytest.approx(best, abs=1e-13)


@few_examples
@given(
    matrices=batches(st.integers(-8, 8) | st.just(-INF), most=5),
    penalty=st.sampled_from([0.5, 0.0, 0.25, 3.0]),
)
def test_the_reference(backend, matrices, penalty):
    for (score, _), matrix in zip(run(matrices, backend, penalty), matrices, strict=True):
        want, _ = _reference(matrix, penalty)
        assert score == pytest.approx(want, abs=1e-13)
        # Multiples of 60 have exact means, and ties are ties in any arithmetic.
        exact = _reference(matrix * 60, penalty * 60)
        assert run([matrix * 60], backend, penalty * 60) == [exact]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["ties", "random", "tiny", "edge", "mixed"])
def test_sizes(backend, kind, dtype):
    """One batch of all sizes, NaN behind their ends; the same bits as sums a column at a time."""
    generator = torch.Generator().manual_seed(3)
    # Where the CPU begins to divide instead of multiplying by an inverse; denormal.
    edge, tiny = (2.0**-900, 1e-310) if dtype == torch.float64 else (2.0**-60, 1e-42)
    scale = {"edge": edge, "tiny": tiny}.get(kind, 1.0)
    if kind == "ties":
        matrices = whole_numbers(SIZES, 0.25, -INF)
    else:
        matrices = [torch.randn(s, generator=generator, dtype=torch.float64) for s in SIZES]
    if kind == "edge":
        # The least that still counts as large, and neighbours of it that cancel.
        matrices = [
            x.sign() * (1 + (x * 4).round().abs() * torch.finfo(dtype).eps) for x in matrices
        ]
    if kind == "mixed":
        most = 300 if dtype == torch.float64 else 34
        for matrix in matrices:
            exponents = torch.randint(-most, most, matrix.shape, generator=generator)
            matrix.mul_(10.0 ** exponents.double())
    matrices = [(matrix * scale).to(dtype) for matrix in matrices]
    for penalty in (0.5, 0.0) if kind == "ties" else (0.0 if scale < 1 else 0.5,):
        want = [by_columns(matrix.numpy(), penalty) for matrix in matrices]
        assert run(matrices, backend, penalty, dtype) == want


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((300, 400), "attention"),
        ((300, 400), "closed"),
        ((400, 300), "ties"),
        ((1, 2000), "attention"),
        ((2000, 3), "ties"),
    ],
)
def test_large(backend, shape, kind):
    if backend.name == "emulated":
        pytest.skip("too many candidates to emulate")
    generator = torch.Generator().manual_seed(4)
    scores = torch.randn(shape, generator=generator, dtype=torch.float64).mul(3).softmax(1)
    if kind == "ties":
        scores = (scores * 4).round() / 4
    if kind == "closed":
        scores[torch.rand(shape, generator=generator) < 0.01] = -INF
    assert run([scores], backend) == [by_columns(scores.numpy(), 0.5)]


def test_2000_by_2000():
    """On the CPU. Known groups hold cells of one positive score each, all other cells are negative.
    A row and a column are in one group only: at most one group has cells of a known one, and is
    worth no more than it. The penalty is 1 - groups / 4000, for which no group of negative cells
    is worth it. So the known groups are the best, and alone.
    """
    size, generator = 2000, torch.Generator().manual_seed(6)
    lengths = [*torch.randint(2, 9, (200,), generator=generator).tolist(), 300]
    shapes = [shape for length in lengths for shape in ((length, 1), (1, length))]
    shapes += [(1, 1)] * (size - sum(rows for rows, _ in shapes))
    scores = torch.rand(size, size, generator=generator, dtype=torch.float64) * -0.9 - 0.1
    groups, row, column = [], 0, 0
    for index in torch.randperm(len(shapes), generator=generator).tolist():
        rows, columns = shapes[index]
        groups.append((row, row + rows, column, column + columns))
        value = 0.5 + torch.rand((), generator=generator, dtype=torch.float64) / 2
        scores[row : row + rows, column : column + columns] = value
        row, column = row + rows, column + columns
    ((score, found),) = items_of(monotonic_align(scores.unsqueeze(0)), [(size, size)])
    assert found == groups
    values = [
        scores[row:rows_end, column:columns_end].mean().item()
        - 0.5 * max(rows_end - row, columns_end - column) / size
        for row, rows_end, column, columns_end in found
    ]
    assert score == pytest.approx(math.fsum(values), abs=1e-9)


def test_rows_for_columns(backend):
    """Without ties the transposed matrix has the transposed groups."""
    generator = torch.Generator().manual_seed(5)
    matrices = [torch.randn(size, generator=generator).double() for size in SIZES]
    turned = run([matrix.t() for matrix in matrices], backend)
    for (score, groups), (other, others) in zip(run(matrices, backend), turned, strict=True):
        assert score == pytest.approx(other, abs=1e-12)
        assert groups == [(*group[2:], *group[:2]) for group in others]


@pytest.mark.parametrize(("index", "name"), CASES, ids=[name for _, name in CASES])
def test_golden(backend, index, name):
    """microsoft/muzic:relyme/songmass_en/gen_at/11_l2m_dp_bak.py, with numpy's pairwise means."""
    scores = torch.from_numpy(GOLDEN[f"S_{index}"])
    if scores.numel() > 1000 and backend.name == "emulated":
        pytest.skip("too many candidates to emulate")
    want = [tuple(group) for group in GOLDEN[f"groups_{index}"].tolist()]
    penalty, score = GOLDEN[f"len_pen_{index}"].item(), GOLDEN[f"score_{index}"].item()
    ((found, groups),) = run([scores], backend, penalty)
    assert groups == want
    assert found == pytest.approx(score, abs=1e-9)
    ((found, groups),) = run([scores.float()], backend, penalty, torch.float32)
    assert found == pytest.approx(score, abs=1e-4)
    if GOLDEN[f"margin_{index}"] > 1e-4 or name.startswith(DYADIC):
        assert groups == want


def test_more_items_than_blocks(backend):
    assert_items_do_not_mix(backend, monotonic_align, -INF)


def test_empty_items(backend):
    """An empty item is a partition of score 0; rows without columns have none, nor the reverse."""
    ones = torch.ones(4, 2, 3, device=backend.device)
    rows = torch.tensor([2, 0, 0, 1], device=backend.device)
    columns = torch.tensor([0, 3, 0, 1], device=backend.device)
    sizes = [(2, 0), (0, 3), (0, 0), (1, 1)]
    found = list(items_of(monotonic_align(ones, rows, columns), sizes))
    assert found == [(-INF, []), (-INF, []), (0.0, []), (0.5, [(0, 1, 0, 1)])]
    for shape, score in (((2, 0, 0), 0.0), ((2, 0, 3), -INF), ((2, 3, 0), -INF)):
        result = monotonic_align(torch.zeros(shape, device=backend.device))
        assert list(items_of(result, [shape[1:]] * 2)) == [(score, [])] * 2
        assert result.groups.shape == (2, max(sum(shape) - 3, 0), 4)
    result = monotonic_align(torch.zeros(0, 3, 4, device=backend.device))
    shapes = [(0,), (0, 6, 4), (0,), (0, 3, 2), (0, 4, 2)]
    assert [tuple(part.shape) for part in result] == shapes


# ---- the penalty ------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [np.float64(0.5), np.float32(0.5), Fraction(1, 2), 0.5])
def test_penalties_of_other_kinds_are_numbers(backend, penalty):
    scores = torch.tensor([[[1.0, 2.0], [2.0, 1.0]]], device=backend.device)
    assert monotonic_align(scores, length_penalty=penalty).score.item() == 1.5


@pytest.mark.parametrize("penalty", [NAN, INF, -INF, 1e39, -1e308, 10**400], ids=str)
def test_a_penalty_out_of_range(backend, penalty):
    """Its products would be infinite, and every partition as bad as a forbidden one."""
    scores = torch.zeros(1, 1, 1, device=backend.device)
    text = f"monotonic_align: length_penalty must be in [-1e+30, 1e+30], finite, got {penalty}"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        monotonic_align(scores, length_penalty=penalty)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_largest_penalty(backend, dtype):
    """One column at 1 / L and two at 2 / L; as a reward, the one column as one row at 1 / M."""
    scores = torch.zeros(1, 2, 3, device=backend.device)
    for penalty, score in ((1e30, -1e30), (-1e30, 1e30 / 2 + 2e30 / 3)):
        found = monotonic_align(scores, length_penalty=penalty, dtype=dtype)
        assert found.score.item() == pytest.approx(score, rel=1e-6)
        assert found.group_count.item() == 2


def test_a_penalty_that_changes_under_compile(backend):
    torch._dynamo.reset()
    scores = torch.tensor([[[1.0, 2.0], [2.0, 1.0]]], device=backend.device)

    def step(scores, penalty):
        return monotonic_align(scores, length_penalty=penalty).score

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert [compiled(scores, penalty).item() for penalty in (0.5, 0.25, 1.0)] == [1.5, 1.75, 1.0]


@pytest.mark.parametrize("penalty", [None, True, "0.5", 1j, torch.tensor(0.5)], ids=repr)
def test_a_penalty_that_is_not_a_number(backend, penalty):
    scores = torch.zeros(1, 1, 1, device=backend.device)
    with pytest.raises(TypeError, match=r"^monotonic_align: length_penalty must be a number, got "):
        monotonic_align(scores, length_penalty=penalty)


def test_more_rows_than_an_alignment_can_have(backend):
    for shape in ((0, 32768, 1), (0, 1, 32768)):
        with pytest.raises(RuntimeError, match=r"^monotonic_align: scores may have at most 32767 "):
            monotonic_align(torch.zeros(shape, device=backend.device))
    longest = torch.zeros(1, 32767, 1, device=backend.device)
    if backend.name != "emulated":
        result = monotonic_align(longest)
        assert list(items_of(result, [(32767, 1)])) == [(-0.5, [(0, 32767, 0, 1)])]
        turned = monotonic_align(longest.transpose(1, 2))
        assert list(items_of(turned, [(1, 32767)])) == [(-0.5, [(0, 1, 0, 32767)])]
    assert math.isclose(monotonic_align(longest[:, :9]).score.item(), -0.5)
