"""window_scores_update by hand: the fixed point, the ring, rows that enter and leave."""

from importlib import import_module

import numpy as np
import pytest
import torch
from kv_states import UNIT, assert_states, filled, fixed_point, int32, new_state

_reference = import_module("tokcore.ops.window_scores_update")._reference


class One:
    """A cache of one list, with slots in use."""

    def __init__(self, backend, slots=4, ring_rows=2):
        self.device = backend.device
        self.state = new_state(1, 1, 1, slots, 1, ring_rows, device=backend.device)

    def update(self, rows, step, window, *, index=None, count=None):
        """`rows` of one list; an index of one list."""
        rows = torch.tensor(rows, dtype=torch.float32, device=self.device)[None, None]
        if index is not None:
            count, index = len(index), int32([[index]], self.device)
        numbers = [int32(x, self.device) for x in ([[count]], [step], [window])]
        self.state.update(rows, index, *numbers)

    @property
    def score(self):
        return (self.state.score[0, 0].cpu().double() / UNIT).tolist()

    @property
    def ring(self):
        return self.state.ring[0, 0].tolist()

    @property
    def last(self):
        return self.state.last_selected[0, 0].tolist()

    @property
    def oldest(self):
        return int(self.state.oldest)


def test_by_hand(backend):
    one = One(backend)
    one.update([[0.25, 0.75]], 0, 2, index=[0, 2])
    assert (one.score, one.ring) == ([0.25, 0, 0.75, 0], [[0.25, 0, 0.75, 0], [0] * 4])
    assert (one.last, one.oldest) == ([0, -1, 0, -1], 0)
    one.update([[0.5, 0.5]], 1, 2, index=[0, 1])
    assert (one.score, one.oldest) == ([0.75, 0.5, 0.75, 0], 0)
    one.update([[1.0]], 2, 2, index=[3])  # over the row of step 0, which leaves
    assert (one.score, one.ring) == ([0.5, 0.5, 0, 1], [[0, 0, 0, 1], [0.5, 0.5, 0, 0]])
    assert (one.last, one.oldest) == ([1, 1, 0, 2], 1)


def test_a_window_that_shrinks_and_grows(backend):
    one = One(backend, ring_rows=3)
    for step in range(3):
        one.update([[1.0 + step]], step, 3, index=[step])
    assert one.score == [1, 2, 3, 0]
    one.update([[4.0]], 3, 1, index=[3])
    assert (one.score, one.oldest) == ([0, 0, 0, 4], 3)
    assert one.ring == [[0, 0, 0, 4], [0] * 4, [0] * 4]
    one.update([[5.0]], 4, 3, index=[0])  # brings nothing back
    assert (one.score, one.oldest) == ([5, 0, 0, 4], 3)


def test_a_window_of_nothing(backend):
    one = One(backend)
    one.update([[1.0]], 0, 0, index=[1])
    assert (one.score, one.oldest, one.last) == ([0] * 4, 1, [-1, 0, -1, -1])
    assert one.ring == [[0] * 4, [0] * 4]


def test_without_a_ring_nothing_leaves(backend):
    one = One(backend, ring_rows=0)
    for step in range(5):
        one.update([[0.5, 0.25]], step, step, index=[0, 3])
    assert (one.score, one.oldest) == ([2.5, 0, 0, 1.25], 0)
    assert one.ring == []


def test_prompt_rows_see_the_slots_before_them(backend):
    """Query i of Q sees slots [0, count - (Q - 1 - i)); what lies beyond is not read."""
    nan = float("nan")
    one = One(backend, slots=5, ring_rows=4)
    rows = [[1, nan, nan, nan, nan], [2, 2, nan, nan, nan], [4, 4, 4, nan, nan]]
    one.update(rows, 2, 4, count=3)
    assert one.score == [7, 6, 4, 0, 0]
    assert one.ring == [[1, 0, 0, 0, 0], [2, 2, 0, 0, 0], [4, 4, 4, 0, 0], [0] * 5]
    assert one.last == [2, 2, 2, -1, -1]
    one = One(backend, slots=5, ring_rows=4)
    one.update([[nan] * 5, *rows], 2, 2, count=3)  # a row of step -1; of the others the last two
    assert (one.score, one.oldest) == ([6, 6, 4, 0, 0], 1)
    assert one.ring == [[0] * 5, [2, 2, 0, 0, 0], [4, 4, 4, 0, 0], [0] * 5]


def test_more_queries_than_slots_in_use(backend):
    one = One(backend, slots=3, ring_rows=4)
    nan = float("nan")
    one.update([[nan] * 3, [nan] * 3, [2, nan, nan]], 9, 4, count=1)
    assert one.score == [2, 0, 0]


def test_rows_before_the_first_step_are_not_there(backend):
    one = One(backend)
    one.update([[float("nan")] * 4], -1, 2, count=0)
    assert (one.score, one.oldest, one.last) == ([0] * 4, 0, [-1] * 4)


def test_listed_prompt_rows(backend):
    one = One(backend, ring_rows=3)
    one.update([[1, 2], [4, 8]], 5, 3, index=[1, 3])
    assert one.score == [0, 5, 0, 10]
    assert (one.last, one.oldest) == ([-1, 5, -1, 5], 3)
    assert one.ring == [[0] * 4, [0, 1, 0, 2], [0, 4, 0, 8]]  # steps 3 (never given), 4, 5


def test_steps_left_out_have_no_rows(backend):
    """A chunk of which only the last rows are given: what stood at their places leaves once."""
    one = One(backend, ring_rows=2)
    one.update([[1.0]], 0, 2, index=[0])
    one.update([[2.0]], 1, 2, index=[1])
    one.update([[4.0]], 3, 2, index=[2])  # nothing of step 2, whose place step 0 had
    assert (one.score, one.oldest) == ([0, 0, 4, 0], 2)
    assert one.ring == [[0] * 4, [0, 0, 4, 0]]
    one.update([[8.0]], 4, 2, index=[3])
    assert one.score == [0, 0, 4, 8]
    one.update([[16.0]], 30, 2, index=[0])
    assert (one.score, one.oldest) == ([16, 0, 0, 0], 29)


def test_no_queries_only_move_the_window(backend):
    one = One(backend)
    one.update([[1.0]], 0, 2, index=[0])
    one.update([[2.0]], 1, 2, index=[0])
    rows = torch.zeros(1, 1, 0, 4, device=backend.device)
    numbers = [int32(x, backend.device) for x in ([[1]], [1], [1])]
    one.state.update(rows, None, *numbers)
    assert (one.score, one.oldest, one.last) == ([2, 0, 0, 0], 1, [1, -1, -1, -1])


def test_fixed_point_rounds_half_to_even(backend):
    tiny = 2.0**-41
    weights = [tiny, 3 * tiny, 5 * tiny, -tiny, -3 * tiny, 1 / 3, 2048.0, -2048.0, 2.0**-100, -0.0]
    one = One(backend, slots=len(weights))
    one.update([weights], 0, 2, count=len(weights))
    got = one.state.score[0, 0].tolist()
    assert got == [fixed_point(weight) for weight in weights]
    assert got[:5] == [0, 2, 2, 0, -2]
    assert got[6:8] == [2**51, -(2**51)]


def test_sums_are_exact_and_leave_nothing_behind(backend):
    """Weights from 1 to 2^-40 in a window of 7: after each step the sum of the rows themselves."""
    random = np.random.default_rng(0)
    slots, window, kept = 5, 7, []
    one = One(backend, slots=slots, ring_rows=window)
    for step in range(60):
        row = (random.random(slots) * 2.0 ** random.integers(-40, 1, slots)).astype(np.float32)
        kept = [*kept, row][-window:]
        one.update([row.tolist()], step, window, count=slots)
        want = [sum(fixed_point(row[j]) for row in kept) for j in range(slots)]
        assert one.state.score[0, 0].tolist() == want
    for step in range(60, 60 + window):
        one.update([[0.0] * slots], step, window, count=slots)
    assert one.score == [0] * slots


def test_sums_wrap_beyond_64_bits(backend):
    """And come back when rows leave."""
    one = One(backend, slots=1, ring_rows=1)
    one.state.score.fill_(2**63 - 1)
    one.update([[1.0]], 0, 1, count=1)
    assert one.state.score.item() == -(2**63) + 2**40 - 1
    one.update([[0.0]], 1, 1, count=1)
    assert one.state.score.item() == 2**63 - 1


@pytest.mark.parametrize("lists", [1, 3])
@pytest.mark.parametrize("ring_rows", [0, 1, 4])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("slots", [1, 37, 700])
def test_against_the_reference(backend, lists, ring_rows, queries, listed, slots):
    batch, size = 2, slots // 2 + 1
    got = filled(new_state(batch, lists, 3, slots, 1, ring_rows, device=backend.device))
    random = np.random.default_rng(slots)
    index = None
    count = random.integers(0, (size if listed else slots) + 1, (batch, lists))
    if listed:
        chosen = [np.sort(random.choice(slots, size, replace=False)) for _ in range(batch * lists)]
        index = int32(np.reshape(chosen, (batch, lists, size)), backend.device)
        for b, s in np.ndindex(batch, lists):
            index[b, s, count[b, s] :] = -7
    rows = random.random((batch, lists, queries, size if listed else slots)).astype(np.float32)
    rows = torch.from_numpy(rows).to(backend.device)
    got.oldest.fill_(3)
    want = got.clone()
    for step in (5, 5 + queries):
        window = random.integers(0, ring_rows + 1, batch)
        numbers = [int32(x, backend.device) for x in (count, [step, step + 4], window)]
        got.update(rows, index, *numbers)
        want.update(rows, index, *numbers, by=_reference)
        assert_states(got, want)


@pytest.mark.parametrize("shape", [(0, 1, 4, 2), (1, 1, 0, 2), (2, 1, 0, 0)])
def test_empty_states(backend, shape):
    batch, lists, slots, ring_rows = shape
    state = new_state(batch, lists, 1, slots, 1, ring_rows, device=backend.device)
    rows = torch.zeros(batch, lists, 1, slots, device=backend.device)
    zeros = int32([0] * batch, backend.device)
    state.update(rows, None, state.count, zeros, zeros)
    assert state.oldest.tolist() == ([1] * batch if ring_rows else [0] * batch)
