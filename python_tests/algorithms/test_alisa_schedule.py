"""What lies where: the cuts by hand, and for any plan that nothing is lost, moved twice or back."""

import numpy as np
import pytest
from alisa_cases import half, plans
from hypothesis import given, settings
from hypothesis import strategies as st

from tokcore.algorithms.alisa import (
    NEVER,
    Budget,
    Capacity,
    Placement,
    Plan,
    RowSchedule,
    Stored,
    capacity,
    half_budget,
    place,
    place_all,
    steps,
)

# --- by hand --------------------------------------------------------------------------------------


def test_half_budget_rounds_halves_up_and_keeps_one():
    assert half_budget(10, 0.5) == Budget(3, 3)  # 2.5
    assert half_budget(9, 0.5) == Budget(2, 2)  # 2.25
    assert half_budget(100, 0.001) == Budget(1, 1)
    assert half_budget(1, 0.5) == Budget(1, 0)
    assert half_budget(7, 1.0) == Budget(4, 3)  # 4 + 4 > 7: all of them


def test_the_three_phases_by_hand():
    """s = 8, r = 1/2, so k = 2, 2, 3, 3, 3 for n = 8 to 12; alpha = beta = 1/2, p1 = 1, p2 = 2.

    host = 0, then round(4.5, 5, 5.5, 6) = 5, 5, 6, 6; half of it deleted from step 2 on.
    """
    placed = place_all(Plan(0.5, 0.5, 1, 2), steps(8, 4, half(0.5)))
    assert placed.phase.tolist() == [1, 2, 3, 3, 3]
    assert placed.host.tolist() == [0, 5, 5, 6, 6]
    assert placed.deleted.tolist() == [0, 0, 3, 3, 3]


def test_the_local_window_stays():
    assert place(Plan(alpha=1.0, p1=0), 0, 10, 4) == Placement(2, 0, 6)
    assert place(Plan(alpha=1.0, p1=0), 0, 3, 4) == Placement(2, 0, 0)


def test_beta_of_all_tokens():
    plan = Plan(0.5, 0.25, 0, 0)
    assert place(plan, 0, 16, 2) == Placement(3, 2, 8)
    assert place(plan, 0, 16, 2, beta_of="length") == Placement(3, 4, 8)
    assert place(plan._replace(beta=0.75), 0, 16, 2, beta_of="length") == Placement(3, 8, 8)


def test_a_plan_as_it_stands_moves_nothing():
    row = RowSchedule(Plan(), 3, half(0.4), Capacity(20, 0, 0, 0))
    assert row.append(3) == Stored(range(3), range(0), range(0))
    for n in range(3, 20):
        assert row.append(1) == Stored(range(n, n + 1), range(0), range(0))
        loaded = row.load(range(n))
        assert loaded.slot.tolist() == list(range(n))
        assert len(loaded.fetch) == len(loaded.recompute) == 0
    assert row.placement == Placement(1, 0, 0)


def test_moves_by_hand():
    """The plan of the three phases: what each append moves, and where loads put things."""
    plan, ahead = Plan(0.5, 0.5, 1, 2), steps(8, 4, half(0.5))
    room = capacity(plan, ahead)
    assert room == Capacity(device=8, stage=3, host=5, inputs=3)
    row = RowSchedule(plan, 8, half(0.5), room)
    assert row.append(8) == Stored(range(8), range(0), range(0))
    assert row.append(1) == Stored(range(8, 9), range(5), range(0))
    first = row.load([2, 4, 7, 8])
    assert first.slot.tolist() == [8, 9, 7, 0]  # the ring has 8 slots: token 8 took that of 0
    assert first.fetch.tolist() == [2, 4]
    assert first.fetch_slot.tolist() == [8, 9]
    assert row.append(1) == Stored(range(9, 10), range(5, 5), range(3))
    second = row.load([1, 2, 3, 7, 8, 9])  # 2 is there still, 1 is deleted
    assert second.slot.tolist() == [10, 8, 9, 7, 0, 1]  # the empty slot, then that of 4
    assert (second.fetch.tolist(), second.fetch_slot.tolist()) == ([3], [9])
    assert (second.recompute.tolist(), second.recompute_slot.tolist()) == ([1], [10])
    assert row.append(1) == Stored(range(10, 11), range(5, 6), range(3, 3))


def test_a_prompt_that_does_not_fit_goes_straight_to_the_host():
    row = RowSchedule(Plan(alpha=0.75, p1=0), 8, half(0.25), Capacity(2, 1, 6, 0))
    assert row.append(8) == Stored(range(6, 8), range(6), range(0))


def test_what_is_deleted_at_once_is_never_sent():
    row = RowSchedule(Plan(0.75, 0.5, 0, 0), 8, half(0.25), Capacity(2, 1, 3, 3))
    assert row.append(8) == Stored(range(6, 8), range(3, 6), range(0))


def test_chunks_of_a_prompt_are_step_0():
    plan = Plan(alpha=1.0, p1=1)
    row = RowSchedule(plan, 9, half(0.25), capacity(plan, steps(9, 4, half(0.25))))
    for chunk in (4, 3, 2):
        assert row.append(chunk).offload == range(0)
    assert row.append(1).offload == range(9)


def test_the_least_recently_used_gives_way():
    row = RowSchedule(Plan(1.0, 0.0, 0), 8, lambda n: Budget(1, 2), Capacity(4, 3, 20, 0))
    row.append(8)
    assert row.load([0, 1, 7]).slot.tolist()[:2] == [4, 5]
    row.append(1)
    assert row.load([1, 2, 8]).slot.tolist()[:2] == [5, 6]
    row.append(1)
    again = row.load([2, 3])  # 0 was used longest ago
    assert again.slot.tolist() == [6, 4]
    row.append(1)
    assert row.load([1, 3]).fetch.tolist() == []


def test_lists_have_stages_of_their_own():
    row = RowSchedule(Plan(1.0, 0.0, 0), 8, half(0.25), Capacity(4, 1, 8, 0), lists=2)
    row.append(8)
    assert row.load([3, 7], 0).fetch.tolist() == [3]
    assert row.load([3, 7], 1).fetch.tolist() == [3]
    assert row.load([3, 7], 0).fetch.tolist() == []
    row.forget()
    assert row.load([3, 7], 0).fetch.tolist() == [3]


# --- for any plan ---------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(plans(), st.integers(1, 20), st.integers(0, 12), st.floats(0.05, 1), st.booleans())
def test_cuts_only_grow_and_leave_the_window(plan, prompt, count, ratio, of_length):
    ahead = steps(prompt, count, half(ratio))
    placed = place_all(plan, ahead, beta_of="length" if of_length else "host")
    assert (np.diff(placed.host) >= 0).all()
    assert (np.diff(placed.deleted) >= 0).all()
    assert (placed.deleted <= placed.host).all()
    assert (placed.host <= ahead.length - ahead.local).all()
    j = np.arange(count + 1)
    assert (placed.host[j < plan.p1] == 0).all()
    assert (placed.deleted[j < plan.p2] == 0).all()
    assert placed.phase.tolist() == [1 + (i >= plan.p1) + (i >= plan.p2) for i in j]


@settings(deadline=None, max_examples=150)
@given(
    plans(), st.integers(1, 20), st.integers(0, 12), st.floats(0.05, 1), st.booleans(), st.data()
)
def test_a_token_is_where_the_moves_have_put_it(plan, prompt, count, ratio, reuse, data):
    """Three dictionaries follow the moves; each selected token is found in its slot."""
    ahead = steps(prompt, count, half(ratio))
    room = capacity(plan, ahead)
    row = RowSchedule(plan, prompt, half(ratio), room, reuse=reuse)
    ring, stage, host = {}, {}, set()
    for n, local, top in zip(*(x.tolist() for x in ahead), strict=True):
        old = row.length
        stored = row.append(n - old)
        for p in stored.offload:
            assert p >= old or ring[p % room.device] == p  # it was on the device, or is new
            assert p not in host
            host.add(p)
        host -= set(stored.delete)
        ring |= {p % room.device: p for p in stored.device}
        _, deleted, cut = row.placement
        assert host == set(range(deleted, cut))
        assert all(ring[p % room.device] == p for p in range(cut, n))
        assert n - cut <= room.device
        assert len(host) <= room.host
        older = st.lists(st.integers(0, max(n - local - 1, 0)), max_size=top, unique=True)
        chosen = sorted(data.draw(older)) if top else []
        loaded = row.load(chosen + list(range(n - local, n)))
        assert set(loaded.fetch) <= host
        assert all(p < deleted for p in loaded.recompute)
        brought = {*loaded.fetch.tolist(), *loaded.recompute.tolist()}
        beyond = {p for p in chosen if p < cut}
        assert brought == beyond - (set(stage.values()) if reuse else set())
        stage |= dict(zip(loaded.fetch_slot.tolist(), loaded.fetch.tolist(), strict=True))
        stage |= dict(zip(loaded.recompute_slot.tolist(), loaded.recompute.tolist(), strict=True))
        assert set(stage) <= set(range(room.device, room.device + room.stage))
        places = ring | stage
        assert [places[slot] for slot in loaded.slot.tolist()] == [
            *chosen,
            *range(n - local, n),
        ]


@settings(deadline=None, max_examples=60)
@given(plans(), st.integers(1, 20), st.integers(0, 12), st.floats(0.05, 1))
def test_capacity_is_what_is_needed_and_no_more(plan, prompt, count, ratio):
    ahead = steps(prompt, count, half(ratio))
    room = capacity(plan, ahead)

    def runs(room):
        row = RowSchedule(plan, prompt, half(ratio), room)
        for n, local, top in zip(*(x.tolist() for x in ahead), strict=True):
            row.append(n - row.length)
            row.load([*range(top), *range(n - local, n)])  # the oldest: beyond, if any are

    runs(room)
    for part in Capacity._fields:
        if getattr(room, part):
            with pytest.raises(ValueError, match=rf"capacity\.{part} must hold"):
                runs(room._replace(**{part: getattr(room, part) - 1}))


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan(alpha=1.5), r"place: alpha must lie in \[0, 1\], got 1.5"),
        (Plan(beta=float("nan")), r"place: beta must lie in \[0, 1\], got nan"),
        (Plan(p1=3, p2=2), "place: 0 <= p1 <= p2 must hold, got 3 and 2"),
        (Plan(p1=-1), "p1 <= p2 must hold, got -1"),
    ],
)
def test_a_wrong_plan_is_named(plan, message):
    with pytest.raises(ValueError, match=message):
        place(plan, 0, 1, 1)


def test_other_errors_are_named():
    for ratio in (0.0, 1.01, float("nan")):
        with pytest.raises(ValueError, match=r"half_budget: ratio must lie in \(0, 1\]"):
            half_budget(4, ratio)
    with pytest.raises(ValueError, match=r"beta_of must be one of .*, got 'device'"):
        place(Plan(), 0, 1, 1, beta_of="device")
    with pytest.raises(ValueError, match=r"prompt must be positive and count not neg.* 0 and 3"):
        steps(0, 3, half(0.5))
    with pytest.raises(ValueError, match=r"budget must be of at most length tokens, got 2 \+ 1"):
        steps(2, 1, lambda n: Budget(2, 1))
    row = RowSchedule(Plan(), 4, half(0.5), Capacity(4, 0, 0, 0))
    row.append(4)
    for wrong in ([3, 2], [1, 1], [-1, 0], [4]):
        with pytest.raises(ValueError, match=r"selected must be ascending, .* \[0, 4\), got"):
            row.load(wrong)
    with pytest.raises(ValueError, match="count must not be negative, got -1"):
        row.append(-1)
    with pytest.raises(ValueError, match=r"capacity\.device must hold 5 .* length 5, got 4"):
        row.append(1)
    assert row.length == 4
    assert NEVER > 1 << 40
