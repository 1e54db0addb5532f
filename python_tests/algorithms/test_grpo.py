"""GRPO and its relatives against numbers from TRL's own trainers, and where we differ from them.

grpo_trl_losses_f32.npz: GRPOTrainer._compute_loss (TRL 1.10.0.dev0 at f2cd577).
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tokcore.algorithms import grpo
from tokcore.ops import PolicyLoss, policy_loss, token_logprob
from tokcore.ops.policy_loss_rules import CispoCap, Clip, Kl, Sapo, Vespo

GOLDEN = Path(__file__).parents[1] / "golden"
LOSSES = np.load(GOLDEN / "grpo_trl_losses_f32.npz")
LOSS_CASES = {case["name"]: case for case in json.loads(str(LOSSES["cases_json"]))}
MAX_LENGTH, NORMALIZER = 12, 57.0
# TRL's own float32 rounding, as its file states it: loss 1.6e-7, gradients 2.7e-8 (of values near 1
# and 0.1), metrics 1.2e-8.
LOSS, GRADIENT, METRIC = 3e-7, 5e-8, 3e-7

AGGREGATIONS = {
    "grpo": "seq-mean-token-mean",
    "sapo": "seq-mean-token-mean",
    "luspo": "seq-mean-token-sum",
    "dr_grpo": "seq-mean-token-sum-norm",
}
METRICS = {
    "kl": "kl",
    "entropy": "entropy",
    "clip_ratio/low_mean": "clip_low",
    "clip_ratio/high_mean": "clip_high",
    "cispo_clip_ratio": "clip_high",
    "vespo/phi_seq_mean": "phi",
}


def given(name: str, dtype=torch.float32) -> torch.Tensor:
    value = torch.from_numpy(LOSSES[f"in/{name}"].copy())
    return value.to(dtype) if value.is_floating_point() else value


def rules_of(case: dict, compat: str | None = "trl") -> PolicyLoss:
    surrogate = Clip(case["epsilon"], case["epsilon_high"], case["delta"] or math.inf)
    if case["loss_type"] == "cispo":
        surrogate = CispoCap(case["epsilon_high"])
    elif case["loss_type"] == "sapo":
        surrogate = Sapo(case["sapo_pos"], case["sapo_neg"])
    elif case["loss_type"] == "vespo":
        surrogate = Vespo(*case["vespo"])
    return PolicyLoss(
        surrogate,
        level=case["level"],
        kl=Kl(case["beta"], corrected=case["bias_kl"]) if case["beta"] else None,
        aggregation=AGGREGATIONS.get(case["loss_type"], "token-mean"),
        length=MAX_LENGTH if case["loss_type"] == "dr_grpo" else None,
        off_policy_threshold=math.inf if case["opsm"] is None else case["opsm"],
        top_entropy=case["top_entropy"],
        entropy_coefficient=case["entropy_coef"],
        accumulation_steps=case["accum"] if case["mode"] == "train" else 1,
        compat=compat,
    )


def tensors_of(case: dict, dtype):
    """-> logprob, advantages, the rest by keyword."""
    mask = given("mask").bool() & (given("tool_mask").bool() if case["tool"] else True)
    rest = {"mask": mask, "entropy": given("entropies", dtype)}
    if case["loss_type"] in ("dapo", "cispo", "vespo"):
        rest["normalizer"] = NORMALIZER
    logprob = given("logps", dtype)
    if case["old"]:
        rest["old_logprob"] = given("old_logps", dtype)
    if case["beta"]:
        rest["reference_logprob"] = given("ref_logps", dtype)
    if case["opsm_use_sampling"]:
        rest["sampler_logprob"] = given("sampling_logps", dtype)
    if case["is_ratio"]:
        ratio = given(case["is_ratio"], dtype)
        rest["importance_ratio"] = ratio.squeeze(-1) if ratio.shape[1] == 1 else ratio
    poison = {"old_neginf": -math.inf, "ref_nan": math.nan, "logp_nan": math.nan}
    if case["poison"]:
        where = {"old_neginf": "old_logprob", "ref_nan": "reference_logprob"}
        poisoned = rest.get(where.get(case["poison"]), logprob)
        poisoned[~mask] = poison[case["poison"]]
    return logprob.requires_grad_(), given(case["adv"], dtype), rest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", [n for n, case in LOSS_CASES.items() if not case["poison"]])
def test_losses_gradients_and_metrics_are_those_of_trl(backend, name, dtype):
    if backend.name == "cuda" and dtype == torch.float64:
        pytest.skip("double is for the CPU")
    case = LOSS_CASES[name]
    logprob, advantages, rest = tensors_of(case, dtype)
    rest["entropy"].requires_grad_()
    leaves = logprob, rest["entropy"]
    on = {k: v.to(backend.device) if torch.is_tensor(v) else v for k, v in rest.items()}
    loss, metrics = policy_loss(
        logprob.to(backend.device), advantages.to(backend.device), rules_of(case), **on
    )
    gradients = torch.autograd.grad(loss, leaves, materialize_grads=True)
    assert loss.item() == pytest.approx(float(LOSSES[f"{name}/loss"]), abs=LOSS, rel=LOSS)
    for gradient, key in zip(gradients, ("grad_logps", "grad_entropies"), strict=True):
        expected = LOSSES.get(f"{name}/{key}", 0.0)
        np.testing.assert_allclose(gradient.numpy(), expected, atol=GRADIENT, rtol=3e-7)
    logged = [key for key in METRICS if f"{name}/metric/{key}" in LOSSES]
    assert logged
    for key in logged:
        if name == "grpo_token_delta1.1" and key == "clip_ratio/high_mean":
            # TRL looks at the ratio after delta = 1.1, which cannot exceed 1 + 0.28; 3 of 31 do
            assert LOSSES[f"{name}/metric/{key}"] == 0
            assert metrics["clip_high"].item() == pytest.approx(3 / 31)
            continue
        expected = float(LOSSES[f"{name}/metric/{key}"])
        assert metrics[METRICS[key]].item() == pytest.approx(expected, abs=METRIC), key


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("grpo_token_poison_oldneginf", 0.26625358),
        ("grpo_token_poison_refnan", 0.26869586),
        ("dapo_token_poison_logpnan", 0.08682917),
    ],
)
def test_what_is_masked_has_no_effect_where_trl_has_nan(name, right):
    assert math.isnan(LOSSES[f"{name}/loss"])
    case = LOSS_CASES[name]
    logprob, advantages, rest = tensors_of(case, torch.float32)
    loss, _ = policy_loss(logprob, advantages, rules_of(case, None), **rest)
    (gradient,) = torch.autograd.grad(loss, logprob)
    assert loss.item() == pytest.approx(right, abs=LOSS)
    assert gradient.isfinite().all()
    clean, advantages, rest = tensors_of({**case, "poison": None}, torch.float32)
    other, _ = policy_loss(clean, advantages, rules_of(case, None), **rest)
    assert torch.equal(other, loss)
    assert torch.equal(torch.autograd.grad(other, clean)[0], gradient)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_luspo_leaves_padding_alone_where_trl_does_not(level):
    case = LOSS_CASES[f"luspo_{'token' if level == 'token' else 'seq'}_b0.04"]
    mask = given("mask").bool()
    assert np.abs(LOSSES[f"{case['name']}/grad_logps"][~mask.numpy()]).max() > 1e-3
    logprob, advantages, rest = tensors_of(case, torch.float64)
    rules = rules_of(case, None)
    loss, _ = policy_loss(logprob, advantages, rules, **rest)
    (gradient,) = torch.autograd.grad(loss, logprob)
    assert (gradient[~mask] == 0).all()
    # sum of n_i times the mean of a row's tokens, over rows
    n = mask.sum(1)
    by_row = PolicyLoss(rules.surrogate, level=level, kl=rules.kl, aggregation="token-sum")
    rows = []
    for i in range(len(n)):
        one = {k: v[i : i + 1] for k, v in rest.items()}
        rows.append(policy_loss(logprob[i : i + 1], advantages[i : i + 1], by_row, **one)[0])
    assert loss.item() == pytest.approx(torch.stack(rows).sum().item() / len(n), rel=1e-13)


def test_vespo_reads_no_ratio_of_padding_where_trl_does():
    case = LOSS_CASES["vespo_token_istok"]
    _, advantages, rest = tensors_of(case, torch.float64)
    logprob, mask = given("logps", torch.float64), rest["mask"]
    loss, _ = policy_loss(logprob, advantages, rules_of(case, None), **rest)
    rest["importance_ratio"] = torch.where(mask, rest["importance_ratio"], 1.0)
    repaired, _ = policy_loss(logprob, advantages, rules_of(case), **rest)
    assert loss.item() == pytest.approx(repaired.item(), rel=1e-14)
    assert abs(loss.item() - float(LOSSES[f"{case['name']}/loss"])) > 1e-3


def test_sapo_keeps_its_temperature_where_trl_rounds_it_to_float32():
    case = LOSS_CASES["sapo_token_b0.0"]
    logprob, advantages, rest = tensors_of(case, torch.float64)
    exact, _ = policy_loss(logprob, advantages, rules_of(case), **rest)
    case = {**case, "sapo_neg": float(np.float32(case["sapo_neg"]))}
    rounded, _ = policy_loss(logprob, advantages, rules_of(case), **rest)
    assert 1e-9 < abs(exact - rounded).item() < 1e-7


# --- methods by name -------------------------------------------------------------------------

BY_NAME = {
    "grpo_token_b0.04": (grpo.grpo_loss, {"epsilon_high": 0.28}),
    "grpo_token_delta1.5": (grpo.grpo_loss, {"epsilon_high": 0.28, "delta": 1.5}),
    "bnpo_token_b0.04": (grpo.bnpo_loss, {"epsilon_high": 0.28}),
    "dr_grpo_token_b0.04": (
        grpo.dr_grpo_loss,
        {"epsilon_high": 0.28, "max_completion_length": MAX_LENGTH},
    ),
    "dapo_token_b0.04": (grpo.dapo_loss, {}),
    "grpo_seq_b0.04": (grpo.gspo_loss, {"epsilon": 0.2, "epsilon_high": 0.28}),
    "luspo_seq_b0.0": (grpo.luspo_loss, {"epsilon_high": 0.28}),
    "cispo_token_b0.04": (grpo.cispo_loss, {}),
    "sapo_token_b0.04": (grpo.sapo_loss, {}),
    "vespo_token_b0.04": (grpo.vespo_loss, {}),
    "dapo_token_entcoef": (grpo.dapo_loss, {"entropy_coefficient": 0.01}),
    "grpo_token_topent0.4": (grpo.grpo_loss, {"epsilon_high": 0.28, "top_entropy": 0.4}),
}


@pytest.mark.parametrize("name", BY_NAME)
def test_each_name_is_the_method_that_trl_calls_so(name):
    function, options = BY_NAME[name]
    case = LOSS_CASES[name]
    logprob, advantages, rest = tensors_of(case, torch.float64)
    loss, _ = function(logprob, advantages, beta=case["beta"], **options, **rest)
    assert loss.item() == pytest.approx(float(LOSSES[f"{name}/loss"]), abs=LOSS)


def a_batch(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    logits, ids = draw(4, 6, 11), torch.randint(11, (4, 6), generator=generator)
    mask = torch.arange(6) < torch.tensor([[6], [4], [1], [0]])
    old = logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1) + 0.3 * draw(4, 6)
    return logits, ids, mask, old, draw(4)


# Written out once more, by another hand than the operator's reference: (c, l, l_old, A, mask) -> L
def _rows(token, mask):
    return (torch.where(mask, token, 0).sum(1) / mask.sum(1).clamp(min=1)).mean()


def _clip(c, a, low=0.2, high=0.2):
    return -torch.minimum(c * a, c.clamp(1 - low, 1 + high) * a)


def _sequence(r, mask, mean=True):
    n = mask.sum(1, keepdim=True).clamp(min=1) if mean else 1
    return (torch.where(mask, r, 0).sum(1, keepdim=True) / n).exp()


WRITTEN_OUT = {
    grpo.gspo_token_loss: lambda r, lp, old, a, m: _rows(
        _clip(_sequence(r, m).detach() * (lp - lp.detach()).exp(), a, 3e-4, 4e-4), m
    ),
    grpo.rloo_loss: lambda r, lp, old, a, m: _rows(
        _clip(_sequence(r, m, mean=False), a).expand_as(r), m
    ),
    grpo.reinforce_loss: lambda r, lp, old, a, m: -(a * lp)[m].sum() / m.sum(),
    grpo.cispo_band_loss: lambda r, lp, old, a, m: (
        -(r.exp().detach().clamp(0.8, 1.2) * a * lp)[m].sum() / m.sum()
    ),
    grpo.gmpo_loss: lambda r, lp, old, a, m: _rows(
        -a
        * _sequence(
            torch.where(
                a > 0, torch.minimum(r, r.clamp(-0.4, 0.4)), torch.maximum(r, r.clamp(-0.4, 0.4))
            ),
            m,
        ).expand_as(r),
        m,
    ),
    grpo.dppo_loss: lambda r, lp, old, a, m: (
        (
            torch.where(
                torch.where(a > 0, lp.exp() - old.exp() <= 0.2, lp.exp() - old.exp() >= -0.2),
                -a * r.exp(),
                0,
            )
            + 1e-3 * r**2
        )[m].sum()
        / m.sum()
    ),
}


@pytest.mark.parametrize("function", WRITTEN_OUT, ids=lambda f: f.__name__)
def test_each_name_is_the_equation_of_its_docstring(function):
    logits, ids, mask, old, advantages = a_batch()
    logprob = token_logprob(logits, ids).detach().requires_grad_()
    loss, _ = function(logprob, advantages, old_logprob=old, mask=mask)
    a = advantages.unsqueeze(1)
    expected = WRITTEN_OUT[function](logprob - old, logprob, old, a, mask)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-13)
    got, want = (torch.autograd.grad(x, logprob)[0] for x in (loss, expected))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


METHODS = [getattr(grpo, name) for name in grpo.__all__ if name.endswith("_loss")]


@pytest.mark.parametrize("method", METHODS, ids=lambda f: f.__name__)
def test_from_logits_padded_or_packed_it_is_the_same(backend, method):
    if backend.name == "cuda":
        pytest.skip("double is for the CPU")
    logits, ids, mask, old, advantages = a_batch()
    options = {"max_completion_length": 7} if method is grpo.dr_grpo_loss else {}
    plain = logits.clone().requires_grad_()
    logprob = (plain / 0.7).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    entropy = torch.distributions.Categorical(logits=plain / 0.7).entropy()
    options |= {"entropy_coefficient": 0.01}
    expected, metrics = method(
        logprob, advantages, old_logprob=old, entropy=entropy, mask=mask, **options
    )
    expected.backward()

    fused = logits.clone()
    fused[~mask] = math.nan  # not read
    fused.requires_grad_()
    policy = grpo.Logits(fused, ids, temperature=0.7)
    loss, again = method(policy, advantages, old_logprob=old, mask=mask, **options)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert {k: v.item() for k, v in again.items()} == pytest.approx(
        {k: v.item() for k, v in metrics.items()}, rel=1e-12, abs=1e-15
    )
    torch.testing.assert_close(fused.grad, plain.grad, rtol=1e-10, atol=1e-13)

    packed = logits[mask].clone().requires_grad_()
    ends = torch.tensor([0, 6, 10, 11, 11])
    policy = grpo.Logits(packed, ids[mask], temperature=0.7)
    loss, _ = method(policy, advantages, old_logprob=old[mask], cu_seqlens=ends, **options)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(packed.grad, plain.grad[mask], rtol=1e-10, atol=1e-13)


def test_a_field_of_the_rules_overrides_the_method():
    logits, ids, mask, old, advantages = a_batch()
    loss, _ = grpo.grpo_loss(
        grpo.Logits(logits, ids), advantages, old_logprob=old, mask=mask, aggregation="token-mean"
    )
    other, _ = grpo.bnpo_loss(grpo.Logits(logits, ids), advantages, old_logprob=old, mask=mask)
    assert torch.equal(loss, other)
    with pytest.raises(TypeError, match="not_an_option"):
        grpo.grpo_loss(grpo.Logits(logits, ids), advantages, not_an_option=1)


def test_logits_in_place_and_with_entropy():
    logits, ids, mask, old, advantages = a_batch()
    leaf = logits.clone().requires_grad_()
    head = leaf * 1.0
    policy = grpo.Logits(head, ids, inplace_backward=True, with_entropy=True)
    loss, metrics = grpo.dapo_loss(policy, advantages, old_logprob=old, mask=mask)
    loss.backward()
    other = logits.clone().requires_grad_()
    expected, plain = grpo.dapo_loss(
        grpo.Logits(other, ids), advantages, old_logprob=old, mask=mask
    )
    expected.backward()
    assert torch.equal(leaf.grad, other.grad)
    assert metrics["entropy"] > 0 == plain["entropy"]


def test_reinforce_plus_plus_returns_and_whitening():
    rewards = torch.tensor([[1.0, 2, 4], [0, 8, math.nan]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    returns = torch.tensor([1 + 0.5 * (2 + 0.5 * 4), 2 + 0.5 * 4, 4, 0.5 * 8, 8])
    expected = (returns - returns.mean()) / (returns.var() + 1e-8).sqrt()
    found = grpo.reinforce_plus_plus_advantages(rewards, mask, gamma=0.5)
    torch.testing.assert_close(found[mask], expected.double(), rtol=1e-6, atol=1e-7)
    assert found[1, 2] == 0
    equal = grpo.reinforce_plus_plus_advantages(torch.full((3, 1), 1.2), torch.ones(3, 1) > 0)
    assert (equal == 0).all()
    with pytest.raises(ValueError, match="gamma must be in"):
        grpo.reinforce_plus_plus_advantages(rewards, mask, gamma=2.0)
