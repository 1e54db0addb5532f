"""The cost model against numbers worked by hand and against what the schedule really moves."""

import numpy as np
import pytest
import torch
from alisa_cases import half, plans
from hypothesis import given, settings
from hypothesis import strategies as st

from tokcore.algorithms.alisa import (
    Machine,
    Memory,
    Plan,
    Profile,
    RowSchedule,
    Shape,
    capacity,
    costs,
    memory,
    profile,
    steps,
)
from tokcore.algorithms.alisa.cost import interpolate

# 2 * 2 * 3 * 2 * 4 * 2 = 192 bytes a token, 2 * 3 * 8 * 2 = 96 bytes a layer input
SHAPE = Shape(batch=2, layers=3, kv_heads=2, head_dim=4, input_dim=8, itemsize=2)
MACHINE = Machine(device_bytes=10**6, host_bytes=10**6, to_host=1000.0, to_device=500.0)
TIMES = Profile((2, 10), (0.1, 0.5), (1, 3), (0.3, 0.4), 1.0, 1.0, "cpu")
PLAN, STEPS = Plan(0.5, 0.5, 1, 2), steps(8, 4, half(0.5))


def test_bytes_of_a_token():
    assert (SHAPE.token_bytes, SHAPE.input_bytes) == (192, 96)
    # The paper's 4 b l h, of OPT-13B at b = 64 and 512 tokens: "more than 25 GB".
    opt = Shape(batch=64, layers=40, kv_heads=40, head_dim=128, input_dim=5120)
    assert opt.token_bytes == 4 * 64 * 40 * 5120
    assert opt.token_bytes == 2 * opt.input_bytes  # a layer input is half of K and V
    assert 25 < opt.token_bytes * 512 / 1e9 < 27


def test_grouped_queries_make_the_layer_input_larger_than_what_it_replaces():
    llama = Shape(batch=1, layers=32, kv_heads=8, head_dim=128, input_dim=4096)
    assert llama.input_bytes == 2 * llama.token_bytes


def test_costs_by_hand():
    """The plan of test_alisa_schedule: host = 0 5 5 6 6, deleted = 0 0 3 3 3, older = . 7 7 8 9."""
    found = costs(PLAN, STEPS, SHAPE, MACHINE, TIMES)
    assert found.offloaded.tolist() == [0, 5, 0, 1, 0]
    assert found.inputs_kept.tolist() == [3, 0, 0, 0, 0]
    assert found.bytes_to_host.tolist() == [3 * 96, 5 * 192, 0, 192, 0]
    np.testing.assert_allclose(found.fetched, [0, 2 * 5 / 7, 3 * 2 / 7, 3 * 3 / 8, 3 * 3 / 9])
    np.testing.assert_allclose(found.recomputed, [0, 0, 3 * 3 / 7, 3 * 3 / 8, 3 * 3 / 9])
    up = [0, 10 / 7 * 192, 6 / 7 * 192 + 9 / 7 * 96, 9 / 8 * (192 + 96), 192 + 96]
    np.testing.assert_allclose(found.bytes_to_device, up)
    down = np.array([0.288, 0.96, 0, 0.192, 0])
    np.testing.assert_allclose(found.transfer_seconds, down + np.array(up) / 500)
    # 3 layers; 4, 6, 6, 6 tokens attended on the line from (2, .1) to (10, .5)
    np.testing.assert_allclose(found.compute_seconds, [0, 0.6, 0.9, 0.9, 0.9])
    again = [0, 0, 0.3 + 2 / 7 * 0.05, 0.3 + 1 / 8 * 0.05, 0.3]  # from (1, .3) to (3, .4)
    np.testing.assert_allclose(found.recompute_seconds, 3 * np.array(again))
    total = found.compute_seconds + found.transfer_seconds + found.recompute_seconds
    np.testing.assert_allclose(found.seconds, total)
    # What is reserved: 8 + 3 tokens; 5 tokens and 3 inputs.
    assert memory(PLAN, STEPS, SHAPE) == Memory(11 * 192, 5 * 192 + 3 * 96)
    assert memory(PLAN, STEPS, SHAPE, inputs_on="device") == Memory(11 * 192 + 3 * 96, 5 * 192)


def test_every_choice_changes_what_it_says():
    plain = costs(PLAN, STEPS, SHAPE, MACHINE, TIMES)

    near = costs(PLAN, STEPS, SHAPE, MACHINE, TIMES, inputs_on="device")
    np.testing.assert_allclose(near.bytes_to_device, plain.fetched * 192)
    np.testing.assert_array_equal(near.bytes_to_host, plain.offloaded * 192)

    reused = costs(PLAN, STEPS, SHAPE, MACHINE, TIMES, reuse=0.75)
    np.testing.assert_allclose(reused.fetched, plain.fetched / 4)
    np.testing.assert_allclose(reused.recomputed, plain.recomputed / 4)

    resent = costs(PLAN, STEPS, SHAPE, MACHINE, TIMES, resend=True)
    assert resent.offloaded.tolist() == [0, 5, 2, 3, 3]  # host - deleted, every step

    recent = costs(PLAN, STEPS, SHAPE, MACHINE, TIMES, spread=lambda x: x**2)
    np.testing.assert_allclose(recent.recomputed[2:], 3 * np.array([3 / 7, 3 / 8, 3 / 9]) ** 2)

    at_once = costs(PLAN, STEPS, SHAPE, MACHINE, TIMES, overlap=True)
    rest = plain.compute_seconds + plain.recompute_seconds
    np.testing.assert_allclose(at_once.seconds, np.maximum(rest, plain.transfer_seconds))
    assert (at_once.seconds < plain.seconds).any()

    of_length = costs(PLAN, STEPS, SHAPE, MACHINE, TIMES, beta_of="length")
    np.testing.assert_allclose(of_length.fetched[2:], 0)  # half of all tokens is all of host


def test_all_on_the_device_costs_its_computation():
    found = costs(Plan(), STEPS, SHAPE, MACHINE, TIMES)
    assert found.transfer_seconds.sum() == found.recompute_seconds.sum() == 0
    np.testing.assert_array_equal(found.seconds, found.compute_seconds)
    assert memory(Plan(), STEPS, SHAPE) == Memory(12 * 192, 0)


@settings(deadline=None, max_examples=100)
@given(plans(), st.integers(2, 20), st.integers(0, 12), st.floats(0.05, 1), st.booleans())
def test_the_model_counts_what_the_schedule_moves(plan, prompt, count, ratio, of_length):
    """Exactly, what goes down; what comes up for globals that are the oldest tokens of all."""
    kind = {"beta_of": "length" if of_length else "host"}
    ahead = steps(prompt, count, half(ratio))
    found = costs(plan, ahead, SHAPE, MACHINE, TIMES, **kind)
    row = RowSchedule(plan, prompt, half(ratio), capacity(plan, ahead, **kind), reuse=False, **kind)
    for j, (n, _, top) in enumerate(zip(*(x.tolist() for x in ahead), strict=True)):
        stored = row.append(n - row.length)
        assert len(stored.offload) == found.offloaded[j]
        loaded = row.load(range(top))
        if j:
            # Were globals the oldest, they would all lie in a share top / older of the tokens.
            older = max(n - ahead.local[j], 1)
            oldest = costs(
                plan,
                ahead,
                SHAPE,
                MACHINE,
                TIMES,
                spread=lambda x: np.minimum(1, x * older / max(top, 1)),  # noqa: B023
                **kind,
            )
            assert len(loaded.fetch) == pytest.approx(oldest.fetched[j])
            assert len(loaded.recompute) == pytest.approx(oldest.recomputed[j])
    assert found.inputs_kept.sum() == row.placement.deleted


# --- the profile ----------------------------------------------------------------------------------


def test_interpolate():
    assert interpolate([10, 20], [1.0, 3.0], [0, 5, 10, 15, 20, 30]).tolist() == [
        *(0, 0.5, 1, 2, 3, 5)
    ]
    assert interpolate([10, 20], [3.0, 2.0], [40]).tolist() == [2]  # noise does not go below
    assert interpolate([4], [2.0], [2, 8]).tolist() == [1, 4]
    for tokens, seconds in (([2, 1], [1, 1]), ([0], [1]), ([1], [-1.0]), ([1, 2], [1]), ([], [])):
        with pytest.raises(ValueError, match="interpolate: tokens must be positive, ascending"):
            interpolate(tokens, seconds, 1)


def test_profile_times_the_given_functions_and_survives_json():
    seen = {"attend": [], "recompute": []}

    def attend(key, value):
        assert key.dtype == value.dtype == torch.float64
        seen["attend"].append(tuple(key.shape))

    def recompute(inputs, positions):
        assert positions.dtype == torch.int64
        seen["recompute"].append((tuple(inputs.shape), positions.tolist()))
        return inputs, inputs

    made = profile(
        *(attend, recompute, SHAPE),
        attended=[3, 5],
        recomputed=[1, 2],
        dtype=torch.float64,
        rounds=2,
    )
    assert seen["attend"] == [(2, 2, 3, 4)] * 3 + [(2, 2, 5, 4)] * 3
    assert seen["recompute"] == [((2, 8), [0, 0])] * 3 + [((4, 8), [0, 1, 0, 1])] * 3
    assert (made.attended, made.recomputed, made.device) == ((3, 5), (1, 2), "cpu")
    assert min(*made.attend_seconds, *made.recompute_seconds, made.to_host, made.to_device) > 0
    assert Profile.from_json(made.to_json()) == made
    costs(PLAN, STEPS, SHAPE, MACHINE, made)


def test_errors_are_named():
    with pytest.raises(ValueError, match=r"costs: inputs_on must be one of .*, got 'disk'"):
        costs(PLAN, STEPS, SHAPE, MACHINE, TIMES, inputs_on="disk")
    with pytest.raises(ValueError, match=r"memory: inputs_on must be one of .*, got 'disk'"):
        memory(PLAN, STEPS, SHAPE, inputs_on="disk")
    with pytest.raises(ValueError, match=r"costs: reuse must lie in \[0, 1\], got 2"):
        costs(PLAN, STEPS, SHAPE, MACHINE, TIMES, reuse=2)
    with pytest.raises(ValueError, match="alpha must lie in"):
        costs(Plan(alpha=-1), STEPS, SHAPE, MACHINE, TIMES)
    kind = {"attended": [1], "recomputed": [1], "dtype": torch.float32}
    for name, wrong in (("attended", []), ("attended", [2, 2]), ("recomputed", [0, 1])):
        with pytest.raises(ValueError, match=f"profile: {name} must be positive and ascending"):
            profile(None, None, SHAPE, **(kind | {name: wrong}))
    with pytest.raises(ValueError, match="profile: rounds must be positive, got 0"):
        profile(None, None, SHAPE, **kind, rounds=0)
