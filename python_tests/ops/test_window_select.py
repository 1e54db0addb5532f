"""window_select by hand, on ties and extremes, and against a stable sort."""

from importlib import import_module

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kv_states import int32

from tokcore.ops import WindowSelection, window_select

_reference = import_module("tokcore.ops.window_select")._reference
LEAST, MOST = -(2**63), 2**63 - 1


def select(backend, scores, count, local, top, **options):
    """Of lists of lists of scores."""
    score = torch.tensor(scores, dtype=torch.int64, device=backend.device)
    numbers = [int32(value, backend.device) for value in (count, local, top)]
    return window_select(score, *numbers, **options)


def one(backend, scores, count, local, top, **options):
    """The slots of one list."""
    got = select(backend, [[scores]], [[count]], [local], [top], **options)
    n = int(got.selected)
    assert got.index[0, 0, n:].eq(-1).all()
    return got.index[0, 0, :n].tolist()


SCORES = [9, 1, 0, 3, 0, 2, 0, 0]


@pytest.mark.parametrize(
    ("count", "local", "top", "sinks", "want"),
    [
        (7, 2, 2, 0, [0, 3, 5, 6]),
        (8, 2, 3, 0, [0, 3, 5, 6, 7]),
        (8, 2, 3, 1, [0, 1, 3, 5, 6, 7]),
        (8, 0, 2, 0, [0, 3]),
        (8, 2, 0, 0, [6, 7]),
        (8, 0, 0, 2, [0, 1]),
        (8, 0, 0, 0, []),
        (0, 2, 2, 1, []),
        (1, 2, 2, 1, [0]),
        (3, 2, 2, 2, [0, 1, 2]),  # first and last overlap
        (5, 2, 4, 0, [0, 1, 2, 3, 4]),  # fewer than asked for
        (6, 1, 5, 0, [0, 1, 2, 3, 4, 5]),
        (8, 1, 5, 0, [0, 1, 2, 3, 5, 7]),  # ties of 0: the lowest slot
        (8, 1, 6, 0, [0, 1, 2, 3, 4, 5, 7]),
    ],
)
def test_by_hand(backend, count, local, top, sinks, want):
    assert one(backend, SCORES, count, local, top, size=8, sinks=sinks) == want


def test_all_results(backend):
    got = select(backend, [[SCORES, SCORES[::-1]]] * 2, [[8, 0], [3, 8]], [1, 2], [1, 0], size=3)
    assert isinstance(got, WindowSelection)
    want = [[[0, 7, -1], [-1, -1, -1]], [[1, 2, -1], [6, 7, -1]]]
    assert got.index.tolist() == want
    assert got.selected.tolist() == [[2, 0], [2, 2]]
    assert (got.index.dtype, got.selected.dtype) == (torch.int32, torch.int32)


@pytest.mark.parametrize("value", [0, 5, -1, LEAST, MOST])
def test_equal_scores_take_the_lowest_slots(backend, value):
    assert one(backend, [value] * 40, 37, 4, 6, size=10) == [*range(6), 33, 34, 35, 36]


def test_extremes_of_int64(backend):
    scores = [0, MOST, LEAST, -1, MOST - 1, LEAST + 1, 1, MOST]
    for top, want in enumerate([[], [1], [1, 7], [1, 4, 7], [1, 4, 6, 7], [0, 1, 4, 6, 7]]):
        assert one(backend, scores, 8, 0, top, size=5) == want
    assert one(backend, scores, 8, 0, 6, size=6) == [0, 1, 3, 4, 6, 7]
    assert one(backend, scores, 8, 0, 7, size=7) == [0, 1, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("bit", range(64))
def test_every_bit_counts(backend, bit):
    """The greater of two scores that differ in one bit only, and the slots of both orders."""
    low = 0x5A5A5A5A5A5A5A5A & ~(1 << bit) & MOST
    high = low | (1 << bit)
    if bit == 63:  # the sign: the other way round
        low, high = low - 2**63, low
    assert one(backend, [low, high, low, low], 4, 0, 1, size=1) == [1]
    assert one(backend, [low, high, low, high, high], 5, 0, 2, size=2) == [1, 3]
    assert one(backend, [high, low, high, high], 4, 0, 3, size=3) == [0, 2, 3]


@pytest.mark.parametrize("slots", [1, 31, 32, 33, 255, 257, 511, 512, 513, 1500])
@pytest.mark.parametrize("most", [2, 50, 2**20, 2**62])
def test_sizes_and_digits(backend, slots, most):
    """More slots than threads; scores that share none, some or all of their digits."""
    generator = torch.Generator().manual_seed(slots)
    score = torch.randint(0, most, (2, 2, slots), generator=generator).to(backend.device)
    score[1] -= most // 2
    count = int32([[slots, slots // 2], [max(0, slots - 1), slots]], backend.device)
    for local, top, sinks in ((0, 1, 0), (2, slots // 3, 1), (1, slots // 2 + 1, 0)):
        numbers = (count, int32([local, 0], backend.device), int32([top, top], backend.device))
        size = local + top + sinks
        got = window_select(score, *numbers, size=size, sinks=sinks)
        want = _reference(score, *numbers, size=size, sinks=sinks)
        assert torch.equal(got.index, want.index)
        assert torch.equal(got.selected, want.selected)


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_scores(backend, data):
    integers = st.one_of(st.integers(-3, 3), st.integers(LEAST, MOST))
    batch, lists, slots = (data.draw(st.integers(1, n)) for n in (2, 2, 12))
    row = st.lists(integers, min_size=slots, max_size=slots)
    scores = [[data.draw(row) for _ in range(lists)] for _ in range(batch)]
    count = [[data.draw(st.integers(0, slots)) for _ in range(lists)] for _ in range(batch)]
    local, top = (
        data.draw(st.lists(st.integers(0, 6), min_size=batch, max_size=batch)) for _ in range(2)
    )
    sinks = data.draw(st.integers(0, 3))
    size = max(map(sum, zip(local, top, strict=True))) + sinks
    got = select(backend, scores, count, local, top, size=size, sinks=sinks)
    for b, s in np.ndindex(batch, lists):
        n = count[b][s]
        first = min(sinks, n)
        last = max(first, n - local[b])
        ranked = sorted(range(first, last), key=lambda j: (-scores[b][s][j], j))[: top[b]]
        want = [*range(first), *sorted(ranked), *range(last, n)]
        assert got.index[b, s].tolist() == want + [-1] * (size - len(want))
        assert got.selected[b, s] == len(want)


@pytest.mark.parametrize("shape", [(0, 1, 4), (2, 1, 0)])
def test_nothing_to_select_from(backend, shape):
    score = torch.zeros(shape, dtype=torch.int64, device=backend.device)
    numbers = [
        torch.zeros(n, dtype=torch.int32, device=backend.device)
        for n in ((*shape[:2],), shape[0], shape[0])
    ]
    got = window_select(score, *numbers, size=3)
    assert got.index.shape == (*shape[:2], 3)
    assert got.index.eq(-1).all()
    assert got.selected.eq(0).all()


def test_any_strides(backend):
    score = torch.randint(0, 9, (2, 3, 16), device=backend.device)
    count = int32([[8, 7, 6], [5, 8, 8]], backend.device)
    numbers = [int32([2, 2], backend.device)] * 2
    view = torch.empty(2, 3, 32, dtype=torch.int64, device=backend.device)[..., ::2]
    view.copy_(score)
    want = window_select(score, count, *numbers, size=4)
    got = window_select(view, count.T.contiguous().T, *numbers, size=4)
    assert torch.equal(got.index, want.index)
