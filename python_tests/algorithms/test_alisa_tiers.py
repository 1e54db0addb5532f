"""The two-tier store gives what one tensor of all tokens gives, through all three phases."""

import pytest
import torch
from alisa_cases import (
    DIM,
    HEADS,
    WIDTH,
    Everything,
    assert_equal_to_one_tier,
    half,
    layer,
    plans,
    selection,
    store_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from tokcore.algorithms.alisa import (
    Budget,
    Plan,
    Shape,
    Traffic,
    TwoTierStore,
    capacity,
    memory,
    steps,
)

# --- equal to one tier ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("lists", [1, HEADS])
@pytest.mark.parametrize("inputs_on", ["host", "device"])
def test_equal_to_one_tier_in_bits_over_all_phases(dtype, lists, inputs_on):
    """Three sequences of different lengths, left padded, in different phases at one time."""
    every = [Plan(0.6, 0.5, 4, 12), Plan(0.9, 1.0, 0, 3), Plan(0.5, 0.0, 2)]
    prompts, budget = [10, 7, 1], half(0.4)
    store = store_of(every, prompts, 30, budget, dtype=dtype, lists=lists, inputs_on=inputs_on)
    together = set()
    phases = assert_equal_to_one_tier(
        *(store, Everything(3, 40, dtype), prompts, 30, budget),
        check=lambda *_: together.add(tuple(store.phases)),
    )
    assert phases == {1, 2, 3}
    assert {(1, 2, 1), (1, 2, 2), (2, 3, 2), (3, 3, 2)} <= together
    assert store.traffic.fetched > 0
    assert store.traffic.recomputed > 0


@settings(deadline=None, max_examples=80)
@given(
    plans(),
    st.integers(1, 14),
    st.integers(0, 14),
    st.floats(0.05, 1),
    st.sampled_from([1, HEADS]),
    st.booleans(),
    st.integers(0, 5),
    st.sampled_from(["host", "length"]),
)
def test_equal_to_one_tier_for_any_plan(plan, prompt, count, ratio, lists, reuse, more, beta_of):
    budget = half(ratio)
    need = capacity(plan, steps(prompt, count, budget), beta_of=beta_of)
    store = store_of(
        *(plan, [prompt, prompt], count, budget),
        lists=lists,
        reuse=reuse,
        stage=need.stage + more,
        beta_of=beta_of,
    )
    assert_equal_to_one_tier(
        store, Everything(2, prompt + count), [prompt] * 2, count, budget, seed=prompt
    )


def test_a_matrix_product_is_recomputed_to_its_rounding():
    """The layer of a real model: |x W| is a sum of E terms, and each way to add them may round
    at every term, E eps |x| |W| in all; the key enters both ways.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(WIDTH, 2 * HEADS * DIM, generator=generator)
    project = lambda x, _: (x @ weight).view(-1, 2, HEADS, DIM).unbind(1)  # noqa: E731
    tokens, budget = Everything(1, 24), half(0.5)
    key, value = project(tokens.inputs[0], None)
    tokens.key, tokens.value = key.transpose(0, 1)[None], value.transpose(0, 1)[None]
    store = store_of(Plan(1.0, 1.0, 0, 0), [16], 0, budget, recompute=project)
    store.append(**tokens.new([0], [16]))
    index, count = selection([16], budget, 1, generator)
    kept, key, value = tokens.at(index, count)
    found = store.gather(index, count)
    assert store.traffic.recomputed == 4
    most = (tokens.inputs[0].abs() @ weight.abs()).max()
    bound = 2 * WIDTH * torch.finfo(torch.float32).eps * most
    assert (found.key - key).abs().max() <= bound
    assert (found.value - value).abs().max() <= bound


def test_slots_are_those_of_key_and_value():
    tokens, budget = Everything(2, 24), half(0.4)
    store = store_of(Plan(0.6, 0.5, 2, 4), [12, 8], 12, budget, lists=HEADS)

    def check(_, index, count):
        slots = store.load(index, count)
        assert slots.dtype == torch.int64
        rows = slots[..., None].expand(-1, -1, -1, DIM)
        kept, key, value = tokens.at(index, count)
        assert torch.equal(torch.where(kept, store.key.gather(2, rows), 0), key)
        assert torch.equal(torch.where(kept, store.value.gather(2, rows), 0), value)

    assert_equal_to_one_tier(store, tokens, [12, 8], 12, budget, check=check)
    assert store.key.shape[2] == store.capacity.device + store.capacity.stage


def test_chunks_and_turns():
    """A prompt in chunks, then several tokens at once in the midst of the phases."""
    tokens, budget = Everything(1, 30), half(0.4)
    store = store_of(Plan(0.7, 0.5, 2, 6), [9], 21, budget)
    generator, length = torch.Generator().manual_seed(0), 0
    for chunk in (4, 5, 1, 1, 7, 1, 11):
        store.append(**tokens.new([length], [length + chunk]))
        length += chunk
        index, count = selection([length], budget, 1, generator)
        assert torch.equal(store.gather(index, count).key, tokens.at(index, count)[1])
    assert store.phases == [3]
    assert store.traffic.recomputed > 0


def test_reorder_takes_everything_of_a_row_along():
    every, budget = [Plan(0.6, 0.5, 2, 4), Plan(0.9, 0.0, 0)], half(0.5)
    tokens = Everything(2, 20, seed=3)
    store = store_of(every, [8, 6], 12, budget)
    assert_equal_to_one_tier(store, tokens, [8, 6], 6, budget)
    store.reorder([1, 0, 1])
    rows = torch.tensor([1, 0, 1])
    for name in ("inputs", "key", "value"):
        setattr(tokens, name, getattr(tokens, name)[rows].clone())
    tokens.key[2, :, 12:] += 1  # from here on the copies go separate ways
    lengths, generator = [12, 14, 12], torch.Generator().manual_seed(1)
    assert store.lengths == lengths
    for _ in range(5):
        ends = [n + 1 for n in lengths]
        store.append(**tokens.new(lengths, ends))
        lengths = ends
        index, count = selection(lengths, budget, 1, generator)
        kept, key, _ = tokens.at(index, count)
        assert torch.equal(torch.where(kept, store.gather(index, count).key, 0), key)
    assert store.phases == [2, 3, 2]


# --- what moves -----------------------------------------------------------------------------------


def test_bytes_by_hand():
    """The example of the class, and one step on: a token is 2 * 2 * 4 = 16 bytes."""
    store = TwoTierStore(
        Plan(alpha=0.75, p1=0), [8], 4, half(0.5), kv_heads=1, head_dim=2, reuse=False
    )
    key = torch.arange(16.0).view(1, 1, 8, 2)
    index, count = torch.tensor([[[1, 3, 6, 7]]]), torch.tensor([[4]])
    store.append(key, -key)
    store.gather(index, count)
    assert store.traffic == Traffic(6, 2, 0, 6 * 16, 2 * 16)
    store.gather(index, count)  # nothing is kept: again
    assert store.traffic == Traffic(6, 4, 0, 6 * 16, 4 * 16)
    store.append(key[:, :, :1], key[:, :, :1])  # n = 9: round(6.75) = 7
    assert store.traffic.offloaded == 7
    ahead = steps(8, 4, half(0.5))
    room = capacity(Plan(alpha=0.75, p1=0), ahead)
    assert store.device_bytes == (room.device + room.stage) * 16
    assert store.host_bytes == room.host * 16


def test_inputs_travel_at_the_price_of_their_own():
    """4 tokens of 8 are deleted at once: their inputs go down, and come up to be computed."""
    plan = Plan(1.0, 1.0, 0, 0)
    kind = {"kv_heads": HEADS, "head_dim": DIM, "itemsize": 4, "input_dim": WIDTH}
    for inputs_on, moved in (("host", 1), ("device", 0)):
        store = store_of(plan, [8], 0, lambda n: Budget(4, 4), inputs_on=inputs_on)
        store.append(**Everything(1, 8).new([0], [8]))
        store.gather(torch.tensor([[[0, 2, 4, 5, 6, 7]]]), torch.tensor([[6]]))
        of_input = WIDTH * 4 * moved
        assert store.traffic == Traffic(0, 0, 2, 4 * of_input, 2 * of_input)
        need = memory(
            *(plan, steps(8, 0, lambda n: Budget(4, 4)), Shape(batch=1, layers=1, **kind)),
            inputs_on=inputs_on,
        )
        assert (store.device_bytes, store.host_bytes) == need


def test_reuse_moves_less_and_a_larger_stage_less_still():
    moved = []
    for options in ({"reuse": False}, {}, {"stage": 16}):
        store = store_of(Plan(alpha=0.9, p1=0), [16], 16, half(0.4), **options)
        assert_equal_to_one_tier(store, Everything(1, 32), [16], 16, half(0.4))
        moved.append(store.traffic.fetched)
    assert moved[0] > moved[1] > moved[2]


def test_all_on_the_device_moves_nothing():
    store = store_of(Plan(), [4], 12, half(0.5), recompute=None, input_dim=None)
    assert_equal_to_one_tier(store, Everything(1, 16), [4], 12, half(0.5))
    assert store.traffic == Traffic()
    assert store.host_bytes == 0


def test_nothing_is_differentiated():
    store = store_of(Plan(1.0, 0.5, 0, 0), [8], 2, half(0.5))
    new = Everything(1, 8).new([0], [8])
    store.append(**{k: v if k == "valid" else v.requires_grad_() for k, v in new.items()})
    found = store.gather(torch.tensor([[[0, 2, 6, 7]]]), torch.tensor([[4]]))
    assert not found.key.requires_grad


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "prompts and plans must be of one number, positive, got 0 and 0"),
        ({"plan": [Plan()]}, "must be of one number, positive, got 2 and 1"),
        ({"plan": Plan(alpha=2)}, r"alpha must lie in \[0, 1\], got 2"),
        ({"prompts": [4, 0]}, "prompt must be positive and .* got 0"),
        ({"kv_heads": 0}, "kv_heads and head_dim must be positive, got 0 and 4"),
        ({"lists": 3}, "lists must be 1 or kv_heads = 2, got 3"),
        ({"dtype": torch.uint8}, "dtype must be one of .*, got torch.uint8"),
        ({"inputs_on": "disk"}, "inputs_on must be 'host' or 'device', got 'disk'"),
        ({"stage": 1}, "stage must be 3 at least, got 1"),
        ({"recompute": None}, "recompute and input_dim must be given .* 5 tokens, got None"),
        ({"input_dim": None}, "recompute and input_dim must be given .* and None"),
        ({"beta_of": "all"}, "beta_of must be one of .*, got 'all'"),
    ],
)
def test_the_store_names_the_error(change, message):
    arguments = {"plan": Plan(0.75, 0.75, 0, 0), "prompts": [8, 6], "count": 2, "budget": half(0.5)}
    store_of(**arguments)
    with pytest.raises(ValueError, match=message):
        store_of(**(arguments | change))


def filled(**options):
    store = store_of(Plan(0.75, 0.5, 0, 0), [8], 2, half(0.5), **options)
    store.append(**Everything(1, 8).new([0], [8]))
    return store


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"key": torch.zeros(1, 2, 1, 4).double()}, TypeError, "key must be torch.float32 on cpu"),
        ({"value": torch.zeros(1, 2, 2, 4)}, ValueError, r"value must be \(1, 2, 1, 4\), got"),
        ({"key": torch.zeros(1, 2, 4)}, ValueError, r"key must be \(1, 2, 'Q', 4\), got"),
        ({"inputs": None}, ValueError, "inputs must be given, the plan deletes; got None"),
        ({"inputs": torch.zeros(1, 1, 5)}, ValueError, r"inputs must be \(1, 1, 6\) of"),
        ({"valid": [2]}, ValueError, r"valid must be 1 numbers in \[0, 1\], got \[2\]"),
        ({"valid": [1, 1]}, ValueError, "valid must be 1 numbers"),
    ],
)
def test_append_names_the_error(change, error, message):
    store = filled()
    with pytest.raises(error, match=f"TwoTierStore.append: {message}"):
        store.append(**(Everything(1, 9).new([8], [9]) | change))
    assert store.lengths == [8]


def test_a_full_store_says_so_and_stays_as_it_was():
    store, tokens = store_of(Plan(), [4, 4], 1, half(0.5)), Everything(2, 6)
    store.append(**tokens.new([0, 0], [4, 5]))
    with pytest.raises(ValueError, match=r"capacity\.device must hold 6 tokens at length 6, got 5"):
        store.append(**tokens.new([4, 5], [5, 6]))
    assert store.lengths == [4, 5]


@pytest.mark.parametrize(
    ("index", "count", "error", "message"),
    [
        ([[[1.0]]], [[1]], TypeError, "load: index must be int32 or int64, got torch.float32"),
        ([[1, 2]], [[1]], ValueError, r"load: index must be \(1, 1, 'M'\) and count \(1, 1\), got"),
        ([[[1, 2]]], [[3]], ValueError, r"load: count must lie in \[0, 2\], got \[\[3\]\]"),
        ([[[2, 1]]], [[2]], ValueError, r"selected must be ascending, .* got \[2, 1\]"),
        ([[[1, 8]]], [[2]], ValueError, r"in \[0, 8\), got \[1, 8\]"),
        ([[[0, 1, 2, 3, 4]]], [[5]], ValueError, r"capacity\.stage must hold the 5 sel.* got 3"),
    ],
)
def test_load_names_the_error(index, count, error, message):
    with pytest.raises(error, match=message):
        filled().load(torch.tensor(index), torch.tensor(count))


def test_what_an_error_left_half_done_is_brought_again():
    """The second list is wrong when the first is noted already; so is what recompute returns."""
    tokens = Everything(2, 8)
    fails = [True]

    def recompute(inputs, positions):
        key, value = layer(inputs, positions)
        return (key[:, :1] if fails.pop() else key), value

    store = store_of(Plan(0.75, 0.5, 0, 0), [8, 8], 2, half(0.5), recompute=recompute)
    store.append(**tokens.new([0, 0], [8, 8]))
    index = torch.tensor([[[1, 4, 7]], [[2, 5, 7]]])
    with pytest.raises(ValueError, match="ascending"):
        store.load(torch.tensor([[[1, 4, 7]], [[5, 2, 7]]]), torch.tensor([[3], [3]]))
    with pytest.raises(ValueError, match=r"recompute must return a key of shape \(2, 2, 4\) and"):
        store.load(index, torch.tensor([[3], [3]]))
    fails.append(False)
    found = store.gather(index, torch.tensor([[3], [3]]))
    assert torch.equal(found.key, tokens.at(index, torch.tensor([[3], [3]]))[1])


def test_reorder_names_the_error():
    for wrong in ([], [1], [-1]):
        with pytest.raises(ValueError, match=r"reorder: rows must be some in \[0, 1\), got"):
            filled().reorder(wrong)
