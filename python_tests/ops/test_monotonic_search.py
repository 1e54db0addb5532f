"""monotonic_search and maximum_path: every assignment of small matrices, a loop over larger ones,
and the loops of the Cython functions that maximum_path replaces.
"""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lattices import INF, NAN, SIZES, assert_items_do_not_mix, batches, ragged, whole_numbers

from tokcore.ops import monotonic_search
from tokcore.ops.monotonic_search import _reference, maximum_path

WIDE = [(rows, columns) for rows, columns in SIZES if rows <= columns]
few_examples = settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def items_of(result, sizes):
    """(score, row of each column) of each item; durations say the same, and -1 stands behind."""
    parts = zip(*(part.cpu() for part in result), sizes, strict=True)
    for score, assigned, durations, (rows, columns) in parts:
        assert (assigned[columns:] == -1).all()
        assert (durations[rows:] == -1).all()
        if (assigned == -1).all():
            assert (durations == -1).all()
            yield score.item(), []
        else:
            assigned = assigned[:columns]
            assert torch.equal(torch.bincount(assigned, minlength=rows), durations[:rows].long())
            yield score.item(), assigned.tolist()


def run(matrices, backend, dtype=torch.float64):
    batch, rows, columns = ragged(matrices, backend.device)
    result = monotonic_search(batch, rows, columns, dtype=dtype)
    return list(items_of(result, [tuple(matrix.shape) for matrix in matrices]))


def every_assignment(rows: int, columns: int):
    """The row of each column: the first is 0, the last rows - 1, each the one before or the next.

    In the order of the tie rule: from the end, the same row before the one above it.
    """
    if columns == 1:
        if rows == 1:
            yield [0]
        return
    if rows > 0:
        for before in (rows, rows - 1):
            for assigned in every_assignment(before, columns - 1):
                yield [*assigned, rows - 1]


def best_assignment(scores: list[list[float]]):
    """The first of the greatest, by looking at all of them."""
    sums = [
        (sum(scores[row][column] for column, row in enumerate(assigned)), assigned)
        for assigned in every_assignment(len(scores), len(scores[0]))
    ]
    greatest, assigned = max(sums, key=lambda found: found[0])
    return greatest, assigned if greatest > -INF else []


def loop(scores: list[list[float]]):
    """The recurrence and the walk back in Python's floats."""
    rows, columns = len(scores), len(scores[0])
    best = [[-INF] * columns for _ in range(rows)]
    best[0][0] = scores[0][0]
    for j in range(1, columns):
        for i in range(rows):
            above = best[i - 1][j - 1] if i > 0 else -INF
            best[i][j] = scores[i][j] + max(best[i][j - 1], above)
    row, assigned = rows - 1, [rows - 1]
    for j in range(columns - 1, 0, -1):
        if row > 0 and best[row - 1][j - 1] > best[row][j - 1]:
            row -= 1
        assigned.append(row)
    greatest = best[rows - 1][columns - 1]
    return greatest, assigned[::-1] if greatest > -INF else []


def by_columns(scores: np.ndarray):
    """The same, all rows that a path can visit in a column at once."""
    rows, columns = scores.shape
    best, steps = np.full(rows, -INF), np.zeros((columns, rows), bool)
    best[0] = scores[0, 0]
    for j in range(1, columns):
        band = slice(max(0, rows + j - columns), min(rows, j + 1))
        above = np.concatenate([[-INF], best[:-1]])[band]
        steps[j, band] = above > best[band]
        best[band] = scores[band, j] + np.where(steps[j, band], above, best[band])
    assigned = np.full(columns, rows - 1)
    for j in range(columns - 1, 0, -1):
        assigned[j - 1] = assigned[j] - steps[j, assigned[j]]
    return float(best[-1]), assigned.tolist()


# ---- monotonic_search -------------------------------------------------------------------------


def test_cases_by_hand(backend):
    cases = [
        ([[3.0]], 3.0, [0]),
        ([[1.0, 2, 4]], 7.0, [0, 0, 0]),
        ([[0.0, 2, 9], [5, 1, 7]], 9.0, [0, 0, 1]),
        ([[0.0, 2, 9], [5, 3, 7]], 10.0, [0, 1, 1]),
        # As many rows as columns: no choice, however bad.
        ([[1.0, 9, 9], [9, -8, 9], [9, 9, 1]], -6.0, [0, 1, 2]),
        # On ties a column stays with the row of the one after it: the last row gets the most.
        ([[0.0, 0, 0, 0], [0, 0, 0, 0]], 0.0, [0, 1, 1, 1]),
        ([[0.0] * 5] * 3, 0.0, [0, 1, 2, 2, 2]),
        # A forbidden cell is gone around, or nothing is left.
        ([[0.0, 1, 1], [9, -INF, 2]], 3.0, [0, 0, 1]),
        ([[0.0, -INF, 1], [9, -INF, 2]], -INF, []),
        ([[-INF, 1.0]], -INF, []),
        ([[1.0, 1.0], [1.0, -INF]], -INF, []),
        ([[-INF, -INF], [-INF, -INF]], -INF, []),
    ]
    matrices = [torch.tensor(scores) for scores, _, _ in cases]
    wanted = [(score, assigned) for _, score, assigned in cases]
    assert run(matrices, backend) == wanted
    assert run(matrices, backend, torch.float32) == wanted


@few_examples
@given(
    matrices=batches(st.integers(-2, 3) | st.just(-INF), most=7, wide=True),
    exponent=st.sampled_from([0, -3, 40, -900]),
)
def test_the_first_of_all_assignments_of_the_greatest_score(backend, matrices, exponent):
    """Small whole numbers times a power of two: sums are exact, ties are many."""
    matrices = [matrix * 2.0**exponent for matrix in matrices]
    assert run(matrices, backend) == [best_assignment(matrix.tolist()) for matrix in matrices]


@few_examples
@given(matrices=batches(st.floats(-8, 8, width=16) | st.integers(-1, 1), most=6, wide=True))
def test_the_reference(backend, matrices):
    assert run(matrices, backend) == [_reference(matrix) for matrix in matrices]
    matrices = [matrix.float() / 3 for matrix in matrices]
    assert run(matrices, backend, torch.float32) == [_reference(matrix) for matrix in matrices]
    assert run(matrices, backend) == [_reference(matrix.double()) for matrix in matrices]


@pytest.mark.parametrize("kind", ["ties", "random", "tiny", "mixed"])
def test_sizes(backend, kind):
    """One batch of all sizes, NaN behind their ends; the same bits as the loop."""
    generator = torch.Generator().manual_seed(2)
    if kind == "ties":
        matrices = whole_numbers(WIDE, 0.25, -INF)
    else:
        scale = 1e-310 if kind == "tiny" else 1.0  # denormal
        matrices = [torch.rand(s, generator=generator, dtype=torch.float64) * scale for s in WIDE]
    if kind == "mixed":
        for matrix in matrices:
            exponents = torch.randint(-300, 300, matrix.shape, generator=generator)
            matrix.mul_(10.0 ** exponents.double())
    assert run(matrices, backend) == [loop(matrix.tolist()) for matrix in matrices]


def test_bands(backend):
    """Every small size; squares, whose band is the diagonal; one row; more rows than a block has
    threads. Closed outside of the band, which is nothing to a path.
    """
    sizes = [(rows, columns) for columns in range(1, 10) for rows in range(1, columns + 1)]
    sizes += [(n, n) for n in (31, 32, 33, 65, 257)] + [(1, 300), (255, 257), (257, 300)]
    generator = torch.Generator().manual_seed(4)
    matrices = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    for matrix, (rows, columns) in zip(matrices, sizes, strict=True):
        for row in range(0, rows, 2):
            matrix[row, :row] = matrix[row, columns - rows + row + 1 :] = -INF
    assert run(matrices, backend) == [loop(matrix.tolist()) for matrix in matrices]
    for size in sizes:
        alone = [matrix for matrix in matrices if matrix.shape == size]
        assert run(alone, backend) == [loop(matrix.tolist()) for matrix in alone]


@pytest.mark.parametrize("bad", [NAN, INF, -1.7e308], ids=str)
@pytest.mark.parametrize("cell", [(4, 0), (0, 7), (3, 2), (2, 6)], ids=str)
def test_a_wrong_value_that_no_path_can_visit(backend, cell, bad):
    """Is looked at all the same; behind the lengths it is not."""
    scores = torch.zeros(3, 6, 9, device=backend.device, dtype=torch.float64)
    scores[(1, *cell)] = bad
    rows, columns = torch.tensor([[5, 5, 2], [8, 8, 9]], device=backend.device)
    if backend.checks_values:
        with pytest.raises(RuntimeError, match=r"^monotonic_search: scores must .* in item 1$"):
            monotonic_search(scores, rows, columns)
    else:
        got = monotonic_search(scores, rows, columns)
        want = monotonic_search(torch.zeros_like(scores), rows, columns)
        assert got.score[1].isnan()
        assert (torch.cat([got.rows[1], got.durations[1]]) == -1).all()
        assert all(torch.equal(a[::2], b[::2]) for a, b in zip(got, want, strict=True))
    rows[1] = columns[1] = min(cell)
    assert not monotonic_search(scores, rows, columns).score.isnan().any()


def test_a_wrong_value_anywhere(backend):
    """One an item, around what 4 warps of 32 threads look at together."""
    cells = [(row, column) for row in (0, 1, 3, 4, 69) for column in (0, 1, 31, 32, 63, 64, 96)]
    scores = torch.zeros(len(cells) + 1, 70, 97, device=backend.device)
    for item, cell in enumerate(cells):
        scores[(item, *cell)] = NAN
    if backend.checks_values:
        for item in range(len(cells)):
            with pytest.raises(RuntimeError, match=r"got nan in item 0$"):
                monotonic_search(scores[item:])
    else:
        assert monotonic_search(scores).score.isnan().tolist() == [True] * len(cells) + [False]


def test_large():
    """On the CPU, from the diagonal alone to a band as wide as long."""
    generator = torch.Generator().manual_seed(5)
    sizes = [(2000, 2000), (1997, 2000), (1000, 2000), (3, 1999)]
    scores = torch.randn(len(sizes), 2000, 2000, generator=generator)
    rows, columns = torch.tensor(sizes).unbind(1)
    found = items_of(monotonic_search(scores, rows, columns), sizes)
    for got, matrix, (m, n) in zip(found, scores.double().numpy(), sizes, strict=True):
        assert got == by_columns(matrix[:m, :n])


def test_more_items_than_blocks(backend):
    assert_items_do_not_mix(backend, monotonic_search, -INF)


def test_empty_items(backend):
    """Columns without a row have no assignment; neither is an assignment of score 0."""
    ones = torch.ones(3, 2, 4, device=backend.device)
    rows = torch.tensor([0, 0, 2], device=backend.device)
    columns = torch.tensor([4, 0, 3], device=backend.device)
    found = list(items_of(monotonic_search(ones, rows, columns), [(0, 4), (0, 0), (2, 3)]))
    assert found == [(-INF, []), (0.0, []), (3.0, [0, 1, 1])]
    for shape, score in (((2, 0, 0), 0.0), ((2, 0, 3), -INF)):
        result = monotonic_search(torch.zeros(shape, device=backend.device))
        assert list(items_of(result, [shape[1:]] * 2)) == [(score, [])] * 2
    result = monotonic_search(torch.zeros(0, 3, 4, device=backend.device))
    assert [tuple(part.shape) for part in result] == [(0,), (0, 4), (0, 3)]


@pytest.mark.parametrize("shape", [(3, 2), (1, 0), (129, 128)])
def test_more_rows_than_columns(backend, shape):
    """The CPU names the item; elsewhere it is undefined and the others are right."""
    rows, columns = shape
    scores = torch.ones(3, rows, columns + 1, device=backend.device)
    lengths = torch.tensor([columns + 1, columns, columns + 1], device=backend.device)
    if backend.checks_values:
        text = rf"^monotonic_search: scores must .* {rows} rows and {columns} columns in item 1$"
        with pytest.raises(RuntimeError, match=text):
            monotonic_search(scores, None, lengths)
        return
    score, assigned, durations = monotonic_search(scores, None, lengths)
    assert torch.equal(score.isnan(), torch.tensor([False, True, False]))
    assert (assigned[1] == -1).all()
    assert (durations[1] == -1).all()
    alone = monotonic_search(scores[:1])
    for part, want in zip((score, assigned, durations), alone, strict=True):
        assert torch.equal(part[0], want[0])
        assert torch.equal(part[2], want[0])


# ---- maximum_path -----------------------------------------------------------------------------


def path_of_the_cython_loop(value: torch.Tensor, text: int, frames: int) -> torch.Tensor:
    """One item of Glow-TTS's function as its source describes it: the sums overwrite the values of
    the cells that an assignment can reach, then a walk from the last frame on.
    """
    value = value.double().clone()
    path = torch.zeros_like(value)
    for y in range(frames):
        for x in range(max(0, text + y - frames), min(text, y + 1)):
            stay = -1e9 if x == y else value[x, y - 1].item()
            step = (0.0 if y == 0 else -1e9) if x == 0 else value[x - 1, y - 1].item()
            value[x, y] += max(stay, step)
    index = text - 1
    for y in range(frames - 1, -1, -1):
        path[index, y] = 1
        if index != 0 and (index == y or value[index, y - 1] < value[index - 1, y - 1]):
            index -= 1
    return path


@pytest.mark.parametrize("frames_first", [False, True])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_same_path_as_the_cython_loop(backend, frames_first, ties, dtype):
    generator = torch.Generator().manual_seed(3)
    sizes = [(1, 1), (1, 9), (9, 9), (5, 9), (2, 7), (7, 8), (0, 0)]
    value = torch.randn(len(sizes), 9, 9, generator=generator).to(dtype)
    value = value.sign() if ties else value
    mask = torch.zeros(value.shape)
    want = torch.zeros(value.shape, dtype=dtype)
    for item, (text, frames) in enumerate(sizes):
        mask[item, :text, :frames] = 1
        want[item] = path_of_the_cython_loop(value[item], text, frames)
    if frames_first:
        value, mask, want = (x.transpose(1, 2).contiguous() for x in (value, mask, want))
    value = value.to(backend.device)
    before = value.clone()
    for kind in (torch.float32, torch.bool, torch.int64, dtype):
        got = maximum_path(value, mask.to(backend.device, kind), frames_first=frames_first)
        assert got.dtype == dtype
        assert torch.equal(got.cpu(), want)
    assert torch.equal(value, before)


@pytest.mark.parametrize("frames_first", [False, True])
def test_masks_of_any_strides(backend, frames_first):
    generator = torch.Generator().manual_seed(6)
    value = torch.randn(3, 7, 7, generator=generator).to(backend.device)
    mask = torch.zeros(3, 7, 7, device=backend.device)
    mask[:, :5, :5] = -0.5
    want = maximum_path(value, mask, frames_first=frames_first)
    assert torch.equal(want[:, :5, :5].diagonal(dim1=1, dim2=2), torch.ones_like(want[:, 0, :5]))
    assert want.sum() == 15
    for view in (mask[:1].expand(3, 7, 7), mask.transpose(1, 2), mask.repeat(1, 1, 2)[:, :, :7]):
        assert torch.equal(maximum_path(value, view, frames_first=frames_first), want)
    turned = value.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(maximum_path(turned, mask, frames_first=frames_first), want)
    for shape in ((0, 2, 3), (2, 0, 3), (2, 3, 0), (2, 0, 0)):
        empty = torch.zeros(shape, device=backend.device)
        assert maximum_path(empty, empty, frames_first=frames_first).shape == shape


def test_a_path_of_something_that_requires_grad(backend):
    value = torch.rand(2, 3, 4, device=backend.device, requires_grad=True)
    assert not maximum_path(value * 1, torch.ones_like(value)).requires_grad


def test_a_path_under_compile(backend):
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(3)
    value = torch.randn(2, 3, 5, generator=generator).to(backend.device)
    mask = torch.ones_like(value)
    compiled = torch.compile(maximum_path, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(value, mask), maximum_path(value, mask))


HOLES = {
    "inside": [[1, 1, 1], [1, 0, 1]],
    "left": [[0, 1, 1], [0, 1, 1]],
    "above": [[0, 0, 0], [1, 1, 1]],
    "stairs": [[1, 1, 1], [1, 1, 0]],
}


@pytest.mark.parametrize("mask", HOLES.values(), ids=list(HOLES))
@pytest.mark.parametrize("frames_first", [False, True])
def test_a_mask_that_is_no_rectangle(backend, mask, frames_first):
    mask = torch.tensor([[[1, 1, 1], [1, 1, 1]], mask], device=backend.device)
    if frames_first:
        mask = mask.transpose(1, 2)
    if backend.device == "cpu":
        with pytest.raises(ValueError, match=r"^maximum_path: mask must be .* form in item 1$"):
            maximum_path(torch.zeros(mask.shape), mask, frames_first=frames_first)
    else:  # unspecified, not wild
        value = torch.zeros(mask.shape, device=backend.device)
        assert maximum_path(value, mask, frames_first=frames_first).shape == mask.shape


def test_a_path_of_text_that_is_longer_than_its_frames(backend):
    """Where the Cython functions read beyond their arrays."""
    value = torch.zeros(2, 3, 4, device=backend.device)
    mask = torch.ones_like(value)
    mask[0, :, 2:] = 0
    if backend.checks_values:
        with pytest.raises(RuntimeError, match=r"3 rows and 2 columns in item 0$"):
            maximum_path(value, mask)
    else:
        got = maximum_path(value, mask)
        assert got[0].isnan().all()
        assert torch.equal(got[1], maximum_path(value[1:], mask[1:])[0])


@pytest.mark.parametrize(
    ("value", "mask", "error", "text"),
    [
        ([[[1.0]]], torch.ones(1, 1, 1), TypeError, "value must be a torch.Tensor, got list"),
        (torch.ones(1, 1, 1), [[[1.0]]], TypeError, "mask must be a torch.Tensor, got list"),
        (torch.ones(1, 2, 3), torch.ones(1, 3, 2), ValueError, r"value must have .*\(1, 3, 2\)"),
        (torch.ones(2, 3), torch.ones(2, 3), ValueError, r"value must have shape \(B, text, fram"),
        (torch.ones(1, 2, 3), torch.ones(1, 2, 3, device="meta"), ValueError, "value .* meta$"),
    ],
)
def test_named_errors_of_maximum_path(value, mask, error, text):
    with pytest.raises(error, match=f"^maximum_path: {text}"):
        maximum_path(value, mask)


def test_a_path_of_values_that_are_wrong(backend):
    value = torch.tensor([[[0.0, 1.0]], [[0.0, NAN]], [[INF, 0.0]]], device=backend.device)
    mask = torch.ones_like(value)
    if backend.checks_values:
        with pytest.raises(RuntimeError, match=r"got nan in item 1$"):
            maximum_path(value, mask)
    else:
        got = maximum_path(value, mask)
        assert got[0].tolist() == [[1.0, 1.0]]
        assert got[1:].isnan().all()
    value[1:] = -INF  # no path at all, which is not an error
    assert maximum_path(value, mask).tolist() == [[[1.0, 1.0]], [[0.0, 0.0]], [[0.0, 0.0]]]
