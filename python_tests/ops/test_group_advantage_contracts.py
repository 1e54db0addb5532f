"""What group_advantage owes to torch, to infinities, and to whoever calls it wrongly."""

import math

import numpy as np
import pytest
import torch
from torch.library import opcheck

from tokcore import _library
from tokcore.ops import group_advantage
from tokcore.ops.group_advantage import CENTERS, SCALES

# torch deprecates what its own compiler imports.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
INF, NAN = math.inf, math.nan
R = torch.tensor([1.0, 2.0, 4.0, 8.0])
IDS = torch.tensor([0, 1, 0, 1])
LENGTHS = torch.tensor([3, 4, 5, 6])


def on(backend, arguments):
    return backend.place(arguments)


# ---- values that are wrong ------------------------------------------------------------------


@pytest.mark.parametrize("bad", [INF, -INF])
@pytest.mark.parametrize("place", [0, 1, 70])
@pytest.mark.parametrize(
    ("center", "scale"),
    [(c, s) for c in CENTERS for s in ("none", "std", "mean") if c != "none" or s == "none"],
)
def test_an_infinite_reward(backend, center, scale, bad, place):
    """Raises where a look costs nothing; elsewhere its group is NaN and the others are right."""
    rewards = torch.arange(1.0, 76.0)
    group = torch.tensor([7] * 71 + [8] * 4)
    lengths = {"lengths": torch.ones(75)} if center == "length_weighted_mean" else {}
    want = group_advantage(rewards, group, center=center, scale=scale, **lengths)
    rewards[place] = bad
    options = on(backend, {"center": center, "scale": scale} | lengths)
    arguments = rewards.to(backend.device), group.to(backend.device)
    if backend.checks_values:
        with pytest.raises(RuntimeError, match=r"^group_advantage: rewards must be finite"):
            group_advantage(*arguments, **options)
    else:
        got = group_advantage(*arguments, **options).cpu()
        assert got[:71].isnan().all()
        torch.testing.assert_close(got[71:], want[71:])


@pytest.mark.parametrize("options", [{"scale": "batch_std"}, {"combine": "normalize_then_sum"}])
def test_an_infinite_reward_of_a_batch_that_is_normalised_as_a_whole(backend, options):
    rewards = torch.tensor([1.0, INF, 3.0, 4.0], device=backend.device)
    if backend.checks_values:
        with pytest.raises(RuntimeError, match=r"^group_advantage: rewards must be finite"):
            group_advantage(rewards, 2, **options)
    else:
        assert group_advantage(rewards, 2, **options).isnan().any()


@pytest.mark.parametrize(
    "rewards", [[[INF, -INF], [1.0, 2.0]], [[INF, 1.0], [1.0, 2.0]], [[1.0, NAN], [2.0, INF]]]
)
@pytest.mark.parametrize("weights", [None, [0.0, 0.0], [1.0, -1.0]])
def test_infinities_that_would_cancel_in_a_sum(backend, rewards, weights):
    rewards = torch.tensor(rewards, device=backend.device)
    if backend.checks_values:
        with pytest.raises(RuntimeError, match=r"^group_advantage: rewards must be finite"):
            group_advantage(rewards, 2, weights=weights)
    else:
        assert group_advantage(rewards, 2, weights=weights).isnan().all()


def test_a_group_of_empty_completions(backend):
    arguments = on(
        backend,
        {"rewards": R, "group": IDS, "lengths": torch.tensor([0, 2, 0, 3])},
    )
    options = {"center": "length_weighted_mean", "scale": "none"}
    if backend.checks_values:
        with pytest.raises(
            RuntimeError, match=r"^group_advantage: lengths must .*\(are all of its"
        ):
            group_advantage(**arguments, **options)
    else:
        got = group_advantage(**arguments, **options)
        assert got.isnan().tolist() == [True, False, True, False]
        assert got[1].item() == pytest.approx(2 - 28 / 5)


def test_the_length_of_what_is_not_scored_does_not_count(backend):
    rewards = torch.tensor([1.0, NAN, 4.0], device=backend.device)
    lengths = torch.tensor([1, 100, 2], device=backend.device)
    got = group_advantage(rewards, 3, center="length_weighted_mean", scale="none", lengths=lengths)
    assert got.tolist() == [-2.0, 0.0, 1.0]


def test_nothing_scored(backend):
    for rewards in (torch.full((4,), NAN), torch.full((4, 2), NAN)):
        rewards = rewards.to(backend.device)
        if backend.checks_values:
            with pytest.raises(RuntimeError, match="rewards must hold one that is not NaN, got 4"):
                group_advantage(rewards, 2)
        else:
            assert group_advantage(rewards, 2).tolist() == [0.0] * 4


@pytest.mark.parametrize("combine", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("scale", ["std", "batch_std"])
@pytest.mark.parametrize("group", ["size", "ids"])
def test_no_rewards(backend, combine, scale, group):
    if combine == "normalize_then_sum" and scale == "batch_std":
        scale = "mean"
    nobody = torch.zeros(0, dtype=torch.long, device=backend.device)
    for shape in ((0,), (0, 3)):
        got = group_advantage(
            torch.zeros(shape, device=backend.device),
            8 if group == "size" else nobody,
            combine=combine,
            scale=scale,
        )
        assert got.shape == (0,)
        assert got.dtype == torch.float32


# ---- torch ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 6])
@pytest.mark.parametrize("kind", ["size", "ids", "everything"])
def test_opcheck(backend, rows, kind):
    rewards = torch.randn(rows, device=backend.device, dtype=torch.float64)
    group = torch.arange(rows, device=backend.device) // 3
    order = torch.arange(rows, device=backend.device)
    tensors = {
        "size": (rewards, None, None, None, 3),
        "ids": (rewards, group, None, None, 0),
        "everything": (rewards, group, order, rewards.abs() + 1, 0),
    }[kind]
    full = kind == "everything"
    center = CENTERS["length_weighted_mean" if full else "mean"]
    rules = (center, SCALES["std"], 1, 0, 1e-4, False, full)
    opcheck(_library.native().group_advantage, (*tensors, *rules))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": "batch_std", "center": "leave_one_out"},
        {"combine": "normalize_then_sum", "weights": [1.0, 2.0]},
        {"center": "length_weighted_mean", "lengths": LENGTHS},
    ],
    ids=lambda options: " ".join(options) or "defaults",
)
@pytest.mark.parametrize("group", [2, IDS], ids=["size", "ids"])
def test_compile_without_graph_breaks(backend, options, group):
    torch._dynamo.reset()
    options, group = on(backend, options), on(backend, {"group": group})["group"]

    def step(rewards):
        return group_advantage(rewards * 2, group, **options) + 1

    rewards = torch.stack([R, R.flip(0) * 3], 1) if "weights" in options else R
    rewards = rewards.to(backend.device)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(rewards), step(rewards))


def test_vmap_is_a_clear_error(backend):
    rewards = torch.zeros(3, 4, device=backend.device)
    with pytest.raises(NotImplementedError, match="group_advantage: cannot be batched by torch"):
        torch.vmap(lambda r: group_advantage(r, 2))(rewards)


def test_there_is_no_derivative(backend):
    """Not in silence either, where the operator is called by itself."""
    rewards = R.clone().to(backend.device).requires_grad_()
    with pytest.raises(ValueError, match=r"^group_advantage: rewards must not require grad"):
        group_advantage(rewards, 2)
    rules = (0, 1, 1, 0, 1e-4, False, False)
    got, *_ = _library.native().group_advantage(rewards, None, None, None, 2, *rules)
    with pytest.raises(NotImplementedError, match="group_advantage: has no derivative"):
        got.sum().backward()


@pytest.mark.parametrize("combine", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("scale", ["std", "none"])
def test_dtypes(backend, combine, scale):
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        rewards = R.to(backend.device, dtype)  # exact in all of them
        result = group_advantage(rewards, 2, combine=combine, scale=scale)
        assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        wide = group_advantage(rewards.double(), 2, combine=combine, scale=scale)
        assert torch.equal(result, wide.to(result.dtype))
    statistics = group_advantage(R.half().to(backend.device), 2, return_statistics=True)
    assert {value.dtype for value in statistics} == {torch.float32}


def test_autocast_changes_nothing(backend):
    want = group_advantage(R.to(backend.device), 2)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        assert torch.equal(group_advantage(R.to(backend.device), 2), want)


def test_meta_tensors_have_the_right_shapes():
    result = group_advantage(R.to("meta"), 2, scale="batch_std", return_statistics=True)
    assert all(value.shape == (4,) for value in result)


# ---- errors ---------------------------------------------------------------------------------

ERRORS = [
    ({"rewards": R.tolist()}, TypeError, "rewards must be a torch.Tensor, got list"),
    ({"rewards": R.long()}, TypeError, "rewards must be float32.*got torch.int64"),
    ({"rewards": R[0]}, ValueError, r"rewards must have shape \(B,\) or \(B, F\), got \(\)"),
    ({"rewards": R[None, None]}, ValueError, r"rewards must have shape .*got \(1, 1, 4\)"),
    ({"rewards": R[:, None][:, :0]}, ValueError, r"rewards must have shape .*got \(4, 0\)"),
    ({"group": 3}, ValueError, "group as a size must .*divide the 4 rewards, got 3"),
    ({"group": 0}, ValueError, "group as a size must be positive .*got 0"),
    ({"group": -2}, ValueError, "group as a size must be positive .*got -2"),
    ({"group": 2.0}, TypeError, "group must be an int, got 2.0"),
    ({"group": True}, TypeError, "group must be an int, got True"),
    ({"group": [0, 0, 1, 1]}, TypeError, "group must be an int, got "),
    ({"group": IDS.float()}, TypeError, "group ids must be int64 or int32, got torch.float32"),
    ({"group": IDS[:2]}, ValueError, r"group ids must have shape \(4,\) .*got \(2,\)"),
    ({"group": IDS[:, None]}, ValueError, r"group ids must have shape \(4,\) .*got \(4, 1\)"),
    ({"group": IDS.to("meta")}, ValueError, "group ids must have shape .*got .* on meta"),
    ({"center": "median"}, ValueError, "center must be one of mean, .*got 'median'"),
    ({"center": None}, ValueError, "center must be one of mean, .*got None"),
    ({"scale": "group"}, ValueError, "scale must be one of none, .*got 'group'"),
    ({"singleton": "nan"}, ValueError, "singleton must be one of zero, reward, got 'nan'"),
    ({"infinite": "nan"}, ValueError, "infinite must be one of error, unscored, got 'nan'"),
    ({"combine": "sum"}, ValueError, "combine must be one of sum_then_normalize, .*got 'sum'"),
    ({"compat": "verl"}, ValueError, "compat must be one of trl, got 'verl'"),
    ({"ddof": 2}, ValueError, "ddof must be 0 or 1, got 2"),
    ({"eps": -1e-4}, ValueError, "eps must be in .*got -0.0001"),
    ({"eps": NAN}, ValueError, "eps must be in .*got nan"),
    ({"eps": INF}, ValueError, "eps must be in .*got inf"),
    ({"eps": None}, TypeError, "eps must be a number, got None"),
    ({"center": "none"}, ValueError, "center 'none' goes with scale 'none' .*got 'std'"),
    ({"center": "length_weighted_mean"}, ValueError, "lengths are for center .*lengths None"),
    ({"lengths": LENGTHS}, ValueError, "lengths are for center .*got center 'mean'"),
    (
        {"center": "length_weighted_mean", "lengths": LENGTHS[:3]},
        ValueError,
        r"lengths must have shape \(4,\) .*got \(3,\)",
    ),
    (
        {"center": "length_weighted_mean", "lengths": LENGTHS.to("meta")},
        ValueError,
        "lengths must have shape .*on meta",
    ),
    ({"weights": [1.0]}, ValueError, r"weights must be one for .*got \(1,\) for rewards \(4,\)"),
    (
        {"rewards": R.view(2, 2), "group": 1, "weights": [1.0, 2.0, 3.0]},
        ValueError,
        r"weights must be one for each .*got \(3,\) for rewards \(2, 2\)",
    ),
    (
        {"combine": "normalize_then_sum", "return_statistics": True},
        ValueError,
        "combine 'normalize_then_sum' .*return_statistics=True",
    ),
    (
        {"combine": "normalize_then_sum", "scale": "batch_std"},
        ValueError,
        "combine 'normalize_then_sum' .*got scale 'batch_std'",
    ),
    ({"compat": "trl", "group": IDS}, ValueError, "compat 'trl' takes a group size.*got size 0"),
    ({"compat": "trl", "center": "best"}, ValueError, "compat 'trl' takes .*'best'"),
    ({"compat": "trl", "scale": "mean"}, ValueError, "compat 'trl' takes .*'mean', 'mean'"),
]


@pytest.mark.parametrize(("wrong", "error", "text"), ERRORS)
def test_named_errors(backend, wrong, error, text):
    arguments = on(backend, {"rewards": R, "group": 2} | wrong)
    with pytest.raises(error, match=f"^group_advantage: {text}"):
        group_advantage(**arguments)


def test_numbers_of_other_kinds_are_numbers(backend):
    want = group_advantage(R.to(backend.device), 2, eps=1.0)
    got = group_advantage(R.to(backend.device), np.int64(2), ddof=np.int64(1), eps=np.float32(1))
    assert torch.equal(got, want)


def test_the_native_operator_checks_once_more(backend):
    rewards, rules = R.to(backend.device), (0, 1, 1, 0, 1e-4, False, False)
    group = IDS.to(backend.device)
    for tensors, text in (
        ((rewards.half(), None, None, None, 2), "rewards must be float32 or float64, got Half"),
        ((rewards[None], None, None, None, 2), "rewards must have shape .B,., got"),
        ((rewards, None, None, None, 3), "group of size 3 must divide .* got 4"),
        ((rewards, None, None, None, 0), "group must be ids or a size, one of the two"),
        ((rewards, group, None, None, 2), "group must be ids or a size, one of the two"),
        ((rewards, group.int(), None, None, 0), "group must "),
    ):
        with pytest.raises(RuntimeError, match=f"group_advantage: {text}"):
            _library.native().group_advantage(*tensors, *rules)
