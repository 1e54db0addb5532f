"""Advantages by hand, against float64, and at every edge that rewards have: ties, NaN, infinity."""

import math
from importlib import import_module

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokcore.ops import GroupAdvantage, group_advantage

INF, NAN = math.inf, math.nan
_reference = import_module("tokcore.ops.group_advantage")._reference

CENTERS = ["mean", "leave_one_out", "length_weighted_mean", "best", "none"]
SCALES = ["none", "std", "batch_std", "mean"]
RULES = [(c, s) for c in CENTERS for s in SCALES if c != "none" or s in ("none", "batch_std")]
every_rule = pytest.mark.parametrize(("center", "scale"), RULES)


def row(backend, *values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype, device=backend.device)


def ids(backend, *values):
    return torch.tensor(values, device=backend.device)


def lengths_of(center, lengths):
    return {"lengths": lengths} if center == "length_weighted_mean" else {}


def assert_equal(got, want, **tolerance):
    torch.testing.assert_close(got.cpu(), torch.as_tensor(want, dtype=got.dtype), **tolerance)


# ---- by hand --------------------------------------------------------------------------------

# Group 0: 1, 2, 6, mean 3, squares of the differences 14. Group 1: 5, 5. All: mean 3.8, 18.8.
REWARDS, GROUP, LENGTHS = (1.0, 5.0, 2.0, 6.0, 5.0), (0, 1, 0, 0, 1), (1, 7, 1, 2, 3)
CENTERED = {
    "mean": [-2, 0, -1, 3, 0],
    "leave_one_out": [-3, 0, -1.5, 4.5, 0],
    "length_weighted_mean": [-2.75, 0, -1.75, 2.25, 0],  # 15 / 4
    "best": [0, 0, 0, 4, 0],
    "none": [1, 5, 2, 6, 5],
}
DIVIDED = {
    ("none", 0): 1.0,
    ("none", 1): 1.0,
    ("std", 0): math.sqrt(14 / 3) + 0.5,
    ("std", 1): math.sqrt(7) + 0.5,
    ("batch_std", 0): math.sqrt(3.76) + 0.5,
    ("batch_std", 1): math.sqrt(4.7) + 0.5,
    ("mean", 0): 3.0,
    ("mean", 1): 3.0,
}


@every_rule
@pytest.mark.parametrize("ddof", [0, 1])
def test_rules_by_hand(backend, center, scale, ddof):
    options = {"center": center, "scale": scale, "ddof": ddof, "eps": 0.5}
    options |= lengths_of(center, ids(backend, *LENGTHS))
    want = [value / DIVIDED[scale, ddof] for value in CENTERED[center]]
    got = group_advantage(row(backend, *REWARDS), ids(backend, *GROUP), **options)
    assert_equal(got, want, rtol=1e-14, atol=0)


def test_groups_of_one_size_are_rows_in_a_row(backend):
    rewards = row(backend, 1.0, 3.0, 7.0, 4.0)
    assert_equal(group_advantage(rewards, 2, scale="none"), [-1.0, 1.0, 1.5, -1.5])
    assert_equal(group_advantage(rewards, 4, scale="none"), [-2.75, -0.75, 3.25, 0.25])
    assert_equal(group_advantage(rewards, 1), [0.0] * 4)


def test_the_defaults_are_those_of_grpo(backend):
    r = torch.randn(6, 4, dtype=torch.float64)
    want = (r - r.mean(1, True)) / (r.std(1, keepdim=True) + 1e-4)
    got = group_advantage(r.flatten().to(backend.device), 4)
    assert_equal(got, want.flatten(), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(
    ("rewards", "want"),
    [
        ((2.0, 4.0), [-1 / 3, 1 / 3]),
        ((-2.0, 2.0), [0.0, 0.0]),  # mean 0
        ((-4.0, 2.0), [0.0, 0.0]),  # below
        ((0.0, 0.0), [0.0, 0.0]),
    ],
)
def test_scale_by_the_mean(backend, rewards, want):
    assert_equal(group_advantage(row(backend, *rewards), 2, scale="mean"), want)


@pytest.mark.parametrize(("center", "scale"), [rule for rule in RULES if rule[0] != "none"])
def test_alone_in_a_group_or_the_only_one_scored(backend, center, scale):
    rewards, group = row(backend, 5.0, 2.0, NAN, 1.0, 1.0), ids(backend, 0, 1, 1, 2, 2)
    options = {"center": center, "scale": scale} | lengths_of(center, torch.ones_like(rewards))
    assert group_advantage(rewards, group, **options).tolist() == [0.0] * 5
    kept = group_advantage(rewards, group, singleton="reward", **options)
    assert kept.tolist() == [5.0, 2.0, 0.0, 0.0, 0.0]


def test_without_a_center_nobody_is_alone(backend):
    rewards = row(backend, 5.0, 2.0, NAN)
    assert group_advantage(rewards, 1, center="none", scale="none").tolist() == [5.0, 2.0, 0.0]


@pytest.mark.parametrize(
    ("rewards", "want"),
    [
        ((3.0, 3.0, 1.0, 2.0), [0.0, 0.0, 0.0, 0.0]),  # two are best
        ((NAN, 3.0, -1.0, NAN), [0.0, 4.0, 0.0, 0.0]),
        ((-5.0, -3.0, -4.0, -6.0), [0.0, 1.0, 0.0, 0.0]),
    ],
)
def test_best(backend, rewards, want):
    got = group_advantage(row(backend, *rewards), 4, center="best", scale="none")
    assert got.tolist() == want


def test_unscored_rewards_count_in_nothing(backend):
    rewards, group = (
        row(backend, 1.0, NAN, 3.0, NAN, NAN, 4.0, 8.0),
        ids(backend, 0, 0, 0, 1, 1, 2, 2),
    )
    result = group_advantage(rewards, group, eps=0.0, return_statistics=True)
    half = math.sqrt(0.5)
    assert_equal(result.advantage, [-half, 0, half, 0, 0, -half, half])
    assert_equal(result.mean, [2.0, 2, 2, NAN, NAN, 6, 6], equal_nan=True)
    assert_equal(result.std, [2 * half] * 3 + [0, 0] + [4 * half] * 2)
    batch = group_advantage(rewards, group, scale="batch_std", eps=0.0)
    assert_equal(batch, [x / math.sqrt(26 / 3) for x in (-1, 0, 1, 0, 0, -2, 2)])


def test_statistics_are_those_of_each_rows_group(backend):
    result = group_advantage(
        row(backend, *REWARDS), ids(backend, *GROUP), ddof=0, return_statistics=True
    )
    assert isinstance(result, GroupAdvantage)
    assert_equal(result.mean, [3.0, 5, 3, 3, 5])
    assert_equal(result.std, [math.sqrt(14 / 3) if g == 0 else 0.0 for g in GROUP])
    alone = group_advantage(row(backend, 7.0), 1, scale="none", return_statistics=True)
    assert [value.item() for value in alone] == [0.0, 7.0, 0.0]


def test_infinite_rewards_as_unscored(backend):
    for bad in (INF, -INF):
        infinite = row(backend, 1.0, bad, 3.0, bad, bad, 4.0)
        unscored = torch.where(infinite.isinf(), NAN, infinite)
        for scale in SCALES:
            got = group_advantage(infinite, 3, scale=scale, infinite="unscored")
            assert torch.equal(got, group_advantage(unscored, 3, scale=scale))


# ---- several reward functions ---------------------------------------------------------------

COLUMNS = [[1.0, NAN], [3.0, 1.0], [2.0, 0.0], [NAN, NAN]]


def test_weighted_sums_then_advantage(backend):
    rewards = row(backend, *COLUMNS)
    assert_equal(group_advantage(rewards, 2, scale="none"), [-1.5, 1.5, 0, 0])  # 1, 4; 2, unscored
    assert_equal(group_advantage(rewards, 2, scale="none", weights=(2.0, -1.0)), [-1.5, 1.5, 0, 0])
    none = group_advantage(rewards, 2, center="none", scale="none", weights=[1, 10])
    assert none.tolist() == [1.0, 13.0, 2.0, 0.0]


def test_advantages_of_each_function_then_their_sum(backend):
    columns = [[1.0, 5.0], [3.0, 1.0], [2.0, 0.0], [2.0, 4.0]]
    options = {"combine": "normalize_then_sum", "eps": 0.0, "weights": [1.0, 3.0]}
    half = math.sqrt(0.5)
    q = row(backend, -half + 3 * half, half - 3 * half, -3 * half, 3 * half)
    got = group_advantage(row(backend, *columns), 2, **options)
    assert_equal(got, (q / q.std()).cpu(), rtol=1e-14, atol=1e-15)
    # what one function does not score, the other does; a row that none scores is out of the batch
    part = [[1.0, NAN], [3.0, NAN], [NAN, NAN], [2.0, 6.0], [4.0, 8.0]]
    q = row(backend, -half, half, -4 * half, 4 * half)
    got = group_advantage(row(backend, *part), ids(backend, 0, 0, 1, 1, 1), **options)
    assert_equal(got[[0, 1, 3, 4]], (q / q.std()).cpu(), rtol=1e-14, atol=1e-15)
    assert got[2] == 0


@pytest.mark.parametrize("combine", ["sum_then_normalize", "normalize_then_sum"])
def test_one_function_as_a_column(backend, combine):
    rewards = row(backend, 1.0, 4.0, NAN, 2.0, 2.0, 7.0)
    assert torch.equal(
        group_advantage(rewards[:, None], 3, combine=combine),
        group_advantage(rewards, 3, combine=combine),
    )


@pytest.mark.parametrize("combine", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("shape", ["one column", "several", "a whole column"])
def test_infinities_as_unscored_are_nan_in_every_way_of_combining(backend, combine, shape):
    infinite = {
        "one column": row(backend, 1.0, 2.0, INF, 5.0),
        "several": row(backend, [1.0, INF], [3.0, 1.0], [-INF, INF], [2.0, 7.0]),
        "a whole column": row(backend, [1.0, INF], [3.0, -INF], [4.0, INF], [2.0, INF]),
    }[shape]
    unscored = torch.where(infinite.isinf(), NAN, infinite)
    got = group_advantage(infinite, 2, combine=combine, infinite="unscored")
    assert torch.equal(got, group_advantage(unscored, 2, combine=combine))


# ---- accuracy -------------------------------------------------------------------------------

# A thread of the CUDA kernel takes groups of up to 64 rows, a block longer ones.
SIZES = [1, 2, 63, 64, 65, 300, 1000]


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equal_rewards_are_exactly_zero(backend, center, scale, dtype):
    """At every size, for rewards whose mean is not themselves in floating point."""
    if center == "none":
        pytest.skip("measures against nothing")
    values = [1.2, 0.1, 1e30, 1e-42, -0.7]
    groups = [(value, size) for size in SIZES for value in values]
    rewards = torch.cat([torch.full((size,), value, dtype=dtype) for value, size in groups])
    group = torch.cat([torch.full((size,), i) for i, (_, size) in enumerate(groups)])
    options = {"center": center, "scale": scale}
    options |= lengths_of(center, torch.arange(len(group)).add(1).to(backend.device))
    got = group_advantage(rewards.to(backend.device), group.to(backend.device), **options)
    assert (got == 0).all()


@pytest.mark.parametrize("combine", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("base", [1.0, 100.0, -3.0])
def test_tiny_spreads_keep_their_digits(backend, combine, base):
    """1 + 1e-6 i in float32: the textbook formula in float32 is off by 7 %."""
    rewards = (base + 1e-6 * torch.arange(12)).float()
    exact = (rewards.double() - base).view(2, 6)  # a difference of floats is exact
    want = (exact - exact.mean(1, True)) / (exact.std(1, keepdim=True) + 1e-4)
    if combine == "normalize_then_sum":
        want = (want - want.mean()) / (want.std() + 1e-4)
    got = group_advantage(rewards.to(backend.device), 6, combine=combine)
    # one rounding to float32, and 1e-10 of the double sums about a mean of 1e-6
    assert_equal(got.double(), want.flatten(), rtol=2**-24 + 1e-9, atol=1e-15)


@st.composite
def batches(draw):
    """Rewards on a grid of 1/8, so that ties are frequent and no mean is 0 by rounding alone."""
    sizes = draw(st.lists(st.sampled_from([1, 1, 2, 3, 5, 8, 17, 70, 130]), max_size=5))
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    group = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes).long())
    group = group[torch.randperm(len(group), generator=generator)] * draw(
        st.sampled_from([1, -3, 2**40])
    )
    spread = draw(st.sampled_from([2, 40]))
    rewards = torch.randint(-spread, spread + 1, (len(group),), generator=generator) / 8
    rewards = rewards.double() + draw(st.sampled_from([0.0, 0.0, 1000.0]))
    unscored = torch.rand(len(group), generator=generator) < draw(st.sampled_from([0.0, 0.2]))
    unscored[:1] = False  # one is scored
    lengths = torch.randint(1, 500, (len(group),), generator=generator)
    return torch.where(unscored, NAN, rewards), group, lengths


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    batch=batches(),
    rule=st.sampled_from(RULES),
    ddof=st.sampled_from([0, 1]),
    eps=st.sampled_from([1e-4, 1e-6, 0.5]),
    singleton=st.sampled_from(["zero", "reward"]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
)
def test_any_groups_against_float64(backend, batch, rule, ddof, eps, singleton, dtype):
    rewards, group, lengths = batch
    center, scale = rule
    rewards = rewards.to(dtype)
    options = {"center": center, "scale": scale, "ddof": ddof, "eps": eps, "singleton": singleton}
    of = lengths_of(center, lengths)
    truth = _reference(rewards.double(), group, **options, **of)
    of = lengths_of(center, lengths.to(backend.device))
    got = group_advantage(rewards.to(backend.device), group.to(backend.device), **options, **of)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # Sums of n doubles of size m are off by n m u, here and in the truth; they are the numerator
    # and the denominator of the advantage. The result is rounded once to its dtype.
    largest = rewards.double().nan_to_num(0).abs().max() if len(rewards) else torch.tensor(0.0)
    wrong = 8 * (len(rewards) + 2) * largest * 2**-53
    least = {"none": 1.0, "mean": 1 / 8 / max(len(rewards), 1)}.get(scale, eps)
    bound = wrong / least * (1 + truth.abs())
    bound = bound + truth.abs() * (2**-52 if dtype == torch.float64 else 2**-24)
    assert ((got.cpu().double() - truth).abs() <= bound).all(), (got, truth)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", ["std", "none"])
def test_sizes(backend, size, scale):
    """Two groups of a size, and a short one in between, with unscored rewards in front."""
    generator = torch.Generator().manual_seed(size)
    rewards = torch.randn(2 * size + 3, generator=generator, dtype=torch.float64)
    rewards[: size // 2 : 2] = NAN
    group = torch.tensor([5] * size + [-1] * 3 + [6] * size)
    for center in CENTERS[:4]:
        of = lengths_of(center, torch.arange(len(group)) + 1)
        truth = _reference(rewards, group, center=center, scale=scale, **of)
        of = {name: value.to(backend.device) for name, value in of.items()}
        for contiguous in (False, True):
            got = group_advantage(
                rewards.to(backend.device),
                group.to(backend.device),
                center=center,
                scale=scale,
                contiguous=contiguous,
                **of,
            )
            assert_equal(got, truth, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("size", [4, 8, 16, 5])
@pytest.mark.parametrize("center", ["mean", "leave_one_out", "best"])
def test_many_groups_of_one_size(backend, size, center):
    """The CPU kernel takes several at once; what is unscored or equal in one stays in it."""
    generator = torch.Generator().manual_seed(size)
    rewards = torch.randn(37, size, generator=generator, dtype=torch.float64)
    rewards[20, 1:3] = NAN
    rewards[21] = NAN
    rewards[22] = 0.1
    rewards[23] *= 1e-170  # whose squares are 0
    truth = _reference(rewards.flatten(), torch.arange(37).repeat_interleave(size), center=center)
    for dtype in (torch.float64, torch.float32):
        got = group_advantage(rewards.flatten().to(backend.device, dtype), size, center=center)
        tolerance = {"rtol": 1e-11, "atol": 1e-12} if dtype == torch.float64 else {}
        assert_equal(got, truth.to(dtype), **tolerance)
        assert (got.view(37, size)[21:23] == 0).all()
