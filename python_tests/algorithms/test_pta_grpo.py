"""PTA-GRPO: the paper's formulas (golden/grpo_pta_formula.npz), the template, the loss."""

import math
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokcore.algorithms import pta_grpo
from tokcore.algorithms.pta_grpo import Template
from tokcore.ops import token_logprob

GOLDEN = Path(__file__).parents[1] / "golden" / "grpo_pta_formula.npz"
TIGHT = {"rtol": 1e-12, "atol": 1e-12}
quickly = settings(deadline=None, max_examples=60)


# --- rewards and advantages -----------------------------------------------------------------------


def test_rewards_and_advantages_equal_the_golden_numbers():
    golden = {key: torch.from_numpy(np.array(value)) for key, value in np.load(GOLDEN).items()}
    rewards = pta_grpo.pta_grpo_rewards(
        *(golden[f"in/{name}"] for name in ("correct", "format_ok", "length"))
    )
    expected = {
        "plan_accuracy": golden["plan_accuracy"],
        "analytic": golden["r_analytic"],
        "outcome": golden["in/correct"],
        "structure": 0.2 * golden["in/format_ok"],
        "length": golden["r_length"],
        "total": golden["r_total"],
    }
    assert rewards._fields == tuple(expected)
    for name, value in expected.items():
        torch.testing.assert_close(getattr(rewards, name), value, **TIGHT)
    advantages = pta_grpo.pta_grpo_advantages(rewards.total)
    torch.testing.assert_close(advantages, golden["advantage_population_std"], **TIGHT)
    assert (rewards.length[1] == 0).all()  # no right answer
    assert (rewards.length[4] == 0.1).all()  # one length


@st.composite
def groups(draw):
    """correct and format_ok bool, length int64, all (Q, m, z)."""
    shape = [draw(st.integers(1, most)) for most in (3, 6, 4)]
    count = math.prod(shape)
    fields = (st.booleans(), st.booleans(), st.integers(0, 40))
    rows = [draw(st.lists(field, min_size=count, max_size=count)) for field in fields]
    return [torch.tensor(row).view(shape) for row in rows]


@quickly
@given(groups(), st.floats(0.01, 5), st.sampled_from(["all", "correct"]))
def test_properties_of_the_rewards(group, tau, length_reward_for):
    correct, format_ok, length = group
    rewards = pta_grpo.pta_grpo_rewards(*group, tau=tau, length_reward_for=length_reward_for)
    assert all(part.dtype == torch.float32 for part in rewards)
    sums = rewards.analytic.sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))
    best = rewards.plan_accuracy == rewards.plan_accuracy.amax(-1, keepdim=True)
    assert (rewards.analytic[best] >= 1 / correct.shape[1] - 1e-6).all()
    is_hopeless = ~correct.flatten(1).any(1)
    assert (rewards.length[is_hopeless] == 0).all()
    assert (rewards.length >= 0).all()
    assert (rewards.length <= 0.1).all()
    for q in (~is_hopeless).nonzero().flatten():
        shortest = length[q][correct[q]].min()
        assert (rewards.length[q][correct[q] & (length[q] == shortest)] == 0.1).all()
        if length_reward_for == "correct":
            assert (rewards.length[q][~correct[q]] == 0).all()
        else:
            assert (rewards.length[q] > 0).any()
    parts = rewards.outcome + 0.5 * rewards.analytic[..., None] + rewards.structure + rewards.length
    torch.testing.assert_close(rewards.total, parts)


@quickly
@given(groups(), st.integers(1, 40))
def test_one_length_earns_alpha_and_one_reward_has_no_advantage(group, length):
    correct, format_ok, lengths = group
    same = torch.full_like(lengths, length)
    rewards = pta_grpo.pta_grpo_rewards(correct, format_ok, same, alpha=0.3)
    is_hopeful = correct.flatten(1).any(1)
    assert (rewards.length[is_hopeful] == torch.tensor(0.3)).all()
    for every in (torch.ones_like(correct), torch.zeros_like(correct)):
        total = pta_grpo.pta_grpo_rewards(every, every, same).total
        assert (pta_grpo.pta_grpo_advantages(total) == 0).all()


@quickly
@given(groups())
def test_advantages_of_a_group_are_centred_and_of_unit_deviation(group):
    total = pta_grpo.pta_grpo_rewards(group[0].double(), *group[1:]).total
    advantages = pta_grpo.pta_grpo_advantages(total)
    assert advantages.shape == total.shape
    for rewards, row in zip(total.flatten(1), advantages.flatten(1), strict=True):
        if (rewards == rewards[0]).all():
            assert (row == 0).all()
        else:
            torch.testing.assert_close(row.mean().item(), 0.0, rtol=0, atol=1e-9)
            torch.testing.assert_close(row.std(correction=0).item(), 1.0, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("tau", "expected"),
    [
        (1.0, [0.418, 0.214, 0.214, 0.154]),
        (0.5, [0.601, 0.159, 0.159, 0.081]),
        (0.2, [0.928, 0.033, 0.033, 0.006]),
    ],
)
def test_a_colder_softmax_prefers_the_better_plan(tau, expected):
    correct = torch.tensor([[[1, 1, 1], [1, 0, 0], [0, 0, 1], [0, 0, 0]]], dtype=torch.bool)
    rewards = pta_grpo.pta_grpo_rewards(correct, correct, correct.long(), tau=tau)
    torch.testing.assert_close(rewards.analytic, torch.tensor([expected]), rtol=0, atol=6e-4)


def test_settings_of_the_rewards_by_hand():
    correct = torch.tensor([[[1.0, 0.0], [0.25, 1.0]]], dtype=torch.float64)
    format_ok, length = correct == 1, torch.tensor([[[10, 4], [8, 12]]])
    run = partial(pta_grpo.pta_grpo_rewards, correct, format_ok, length)
    rewards = run(alpha=1.0, beta=2.0, structure_reward=0.5, max_length=60)
    # T* is 10: 4 tokens gave a wrong answer, 8 a quarter of the right one.
    closeness = [[0.0, 6 / 50], [2 / 50, 2 / 50]]
    torch.testing.assert_close(rewards.length, (-torch.tensor([closeness]).double()).exp())
    torch.testing.assert_close(rewards.plan_accuracy, torch.tensor([[0.5, 0.625]]).double())
    analytic = torch.tensor([[1.0, 1.25]]).double().softmax(-1)
    total = correct + 2 * analytic[..., None] + 0.5 * format_ok + rewards.length
    torch.testing.assert_close(rewards.total, total)
    only = run(alpha=1.0, max_length=60, length_reward_for="correct")
    torch.testing.assert_close(only.length, torch.where(correct == 1, rewards.length, 0))
    # The longest response is the only right one: T_max = T*, and all get alpha.
    last = torch.tensor([[[0, 0], [0, 1]]])
    assert (pta_grpo.pta_grpo_rewards(last, last, length, alpha=1.0).length == 1).all()


RIGHT = torch.ones(2, 3, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tau": 0.0}, ValueError, "tau must be positive, got 0.0"),
        ({"tau": -1}, ValueError, "tau must be finite and not negative, got -1"),
        ({"alpha": -0.1}, ValueError, "alpha must be finite and not negative, got -0.1"),
        ({"beta": float("nan")}, ValueError, "beta must be finite and not negative, got nan"),
        ({"structure_reward": "0.2"}, TypeError, "structure_reward must be a number, got str"),
        ({"length_reward_for": "right"}, ValueError, "must be 'all' or 'correct', got 'right'"),
        ({"max_length": 6}, ValueError, r"length must be in \[0, 6\], got 7"),
        ({"correct": RIGHT[0]}, ValueError, r"shape \(Q, m, z\) with m >= 1 and .* got \(3, 4\)"),
        ({"correct": RIGHT[:, :0]}, ValueError, r"correct must have shape .* got \(2, 0, 4\)"),
        ({"correct": RIGHT[..., :0]}, ValueError, r"correct must have shape .* got \(2, 3, 0\)"),
        ({"format_ok": RIGHT[:1]}, ValueError, r"format_ok must have the shape of correct"),
        ({"length": RIGHT[..., :1]}, ValueError, r"length must .* \(2, 3, 4\), .* \(2, 3, 1\)"),
        ({"correct": 2 * RIGHT}, ValueError, r"correct must be in \[0, 1\], got 2"),
        ({"correct": RIGHT * math.nan}, ValueError, r"correct must be in \[0, 1\], got nan"),
        ({"format_ok": -0.5 * RIGHT}, ValueError, r"format_ok must be in \[0, 1\], got -0.5"),
        ({"length": RIGHT * math.inf}, ValueError, "length must not be negative and finite"),
    ],
)
def test_rewards_name_the_error(change, error, message):
    arguments = {"correct": RIGHT, "format_ok": RIGHT, "length": 7 * RIGHT}
    with pytest.raises(error, match=f"pta_grpo_rewards: .*{message}"):
        pta_grpo.pta_grpo_rewards(**(arguments | change))


def test_advantages_name_the_error():
    with pytest.raises(ValueError, match=r"pta_grpo_advantages: rewards .* got \(2, 3\)"):
        pta_grpo.pta_grpo_advantages(torch.zeros(2, 3))
    assert pta_grpo.pta_grpo_advantages(torch.zeros(0, 3, 4)).shape == (0, 3, 4)


# --- template -------------------------------------------------------------------------------------

BOXED = Template(answer=("\\boxed{", "}"))


@quickly
@given(*[st.text("abc <>/{}\\\n", min_size=1).filter(str.strip)] * 3)
def test_what_is_built_is_parsed(plan, think, answer):
    for template in (Template(), BOXED):
        try:
            response = pta_grpo.build_response(plan, think, answer, template=template)
        except ValueError:
            assert template is BOXED  # braces of the answer that do not pair up
            assert "{" in answer or "}" in answer
            continue
        sections = pta_grpo.parse_response(f" {response}\n", template=template)
        assert sections == (plan.strip(), think.strip(), answer.strip())


P, T, A = "<plan>p</plan>", "<think>t</think>", "<answer>a</answer>"


@pytest.mark.parametrize(
    "response",
    [
        "",
        "text",
        T + A,  # missing
        P + A,
        P + T,
        T + P + A,  # reordered
        P + A + T,
        P + P + T + A,  # repeated
        P + T + T + A,
        P + T + A + A,
        f"so {P}{T}{A}",  # other text
        f"{P} and {T}{A}",
        f"{P}{T} so {A}",
        f"{P}{T}{A}.",
        f"<plan>p {T}</plan>{T}{A}",  # nested
        f"{P}<think>t {P}</think>{A}",
        f"{P}<think>t <answer></think>{A}",
        f"{P}{T}<answer><answer>a</answer></answer>",
        f"{P}{T}<answer>a</plan></answer>",
        f"<plan>p{T}{A}",  # unclosed
        f"{P}<think>t{A}",
        f"{P}{T}<answer>a",
        f"<plan>p<plan>{T}{A}",
        f"<plan> </plan>{T}{A}",  # empty
        f"{P}<think></think>{A}",
        f"{P}{T}<answer>\n</answer>",
        (P + T + A).upper(),
    ],
)
def test_what_does_not_follow_the_template_is_rejected(response):
    assert pta_grpo.parse_response(response) is None
    assert pta_grpo.parse_response(P + T + A) == ("p", "t", "a")


def test_a_boxed_answer_may_hold_pairs_of_braces():
    parse = partial(pta_grpo.parse_response, template=BOXED)
    assert parse(P + "<think>{t</think>" + r"\boxed{\frac{1}{2}}").answer == r"\frac{1}{2}"
    assert parse(P + T + r"\boxed{\{1, 2\}}").answer == r"\{1, 2\}"
    assert parse(P + T + r"\boxed{\left\{ 1}").answer == r"\left\{ 1"  # an escaped brace is text
    assert parse(P + T + r"\boxed{1} or {2}") is None
    assert parse(P + T + r"\boxed{1{}") is None
    assert parse(P + T + r"\boxed{1}}") is None
    assert parse(P + r"<think>\boxed{1}</think>\boxed{1}") is None
    assert parse(P + T + A) is None


def test_a_response_that_repeats_its_tags_is_rejected_in_no_time():
    start = time.perf_counter()
    assert pta_grpo.parse_response((P + T + "<answer>") * 5000) is None
    assert time.perf_counter() - start < 5


def test_a_cold_start_response_holds_the_plan_of_the_summariser():
    seen = []

    def summarise(question, reasoning):
        seen.append((question, reasoning))
        return " Add them. "

    response = pta_grpo.cold_start_response("7 + 5?", "7 + 5 = 12", "12", summarise=summarise)
    assert seen == [("7 + 5?", "7 + 5 = 12")]
    assert pta_grpo.parse_response(response) == ("Add them.", "7 + 5 = 12", "12")
    with pytest.raises(ValueError, match="build_response: plan must not be empty"):
        pta_grpo.cold_start_response("q", "t", "a", summarise=lambda question, reasoning: " ")
    with pytest.raises(TypeError, match="build_response: plan must be a str, got NoneType"):
        pta_grpo.cold_start_response("q", "t", "a", summarise=lambda question, reasoning: None)


def test_templates_and_responses_name_the_error():
    with pytest.raises(ValueError, match="Template: plan must be two tags"):
        Template(plan=("", "</plan>"))
    with pytest.raises(ValueError, match="Template: all tags must differ"):
        Template(plan=("<think>", "</plan>"))
    with pytest.raises(TypeError, match="parse_response: response must be a str, got int"):
        pta_grpo.parse_response(3)


# --- loss -----------------------------------------------------------------------------------------


def tokens(seed=0, shape=(6, 9)):
    """Log-probabilities of policy, old policy and reference, mask, advantages of both signs."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    logprob = -draw(shape).abs() - 0.1
    old, reference = logprob + 0.9 * draw(shape), logprob + 0.3 * draw(shape)
    mask = torch.rand(shape, generator=generator) < 0.7
    return logprob.requires_grad_(), old, reference, mask, draw(shape[0])


def formula(logprob, old, reference, mask, advantages, low, high, kl, aggregation):
    """Eq. 9 as it is printed, and its mean over tokens."""
    ratio, a = (logprob - old).exp(), advantages[:, None]
    d = reference - logprob
    token = torch.min(ratio * a, ratio.clamp(1 - low, 1 + high) * a) - kl * (d.exp() - d - 1)
    total = torch.where(mask, token, 0).sum()
    return -total / (len(a) if aggregation == "seq-mean-token-sum" else mask.sum())


@pytest.mark.parametrize("aggregation", ["seq-mean-token-sum", "token-mean"])
@pytest.mark.parametrize(("low", "high", "kl"), [(0.2, 0.2, 0.0), (0.2, 0.3, 0.01)])
def test_the_loss_equals_the_printed_formula(aggregation, low, high, kl):
    logprob, old, reference, mask, advantages = tokens()
    options = {"epsilon": low, "epsilon_high": high, "kl_coefficient": kl}
    options |= {"aggregation": aggregation}
    loss, metrics = pta_grpo.pta_grpo_loss_from_tokens(
        logprob, mask, advantages, old_logprob=old, reference_logprob=reference, **options
    )
    assert metrics["clip_low"] > 0
    assert metrics["clip_high"] > 0
    expected = formula(logprob, old, reference, mask, advantages, low, high, kl, aggregation)
    torch.testing.assert_close(loss, expected, **TIGHT)
    gradient, truth = (torch.autograd.grad(value, logprob)[0] for value in (loss, expected))
    torch.testing.assert_close(gradient, truth, **TIGHT)
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    packed, _ = pta_grpo.pta_grpo_loss_from_tokens(
        logprob[mask],
        ends,
        advantages,
        old_logprob=old[mask],
        reference_logprob=reference[mask],
        **options,
    )
    torch.testing.assert_close(packed, loss, **TIGHT)


def test_masked_tokens_have_no_effect_whatever_they_hold():
    logprob, old, reference, mask, advantages = tokens()
    mask[2] = False  # a row without a token

    def run(filler):
        leaf = torch.where(mask, logprob.detach(), filler).requires_grad_()
        others = [torch.where(mask, value, filler) for value in (old, reference)]
        loss, _ = pta_grpo.pta_grpo_loss_from_tokens(
            leaf,
            mask,
            advantages,
            old_logprob=others[0],
            reference_logprob=others[1],
            kl_coefficient=0.1,
        )
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    (loss, gradient), (again, gradient_again) = run(-1.0), run(math.nan)
    assert torch.equal(loss, again)
    assert torch.equal(gradient, gradient_again)
    assert (gradient[~mask] == 0).all()


def test_the_loss_from_logits_hands_its_options_on():
    torch.manual_seed(0)
    weight = torch.randn(6, 9, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 5, (6, 9)).where(torch.rand(6, 9) < 0.7, 9)
    target = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=9)
    logprob = token_logprob(weight / 0.7, target, ignore_index=9)
    _, noise, _, _, advantages = tokens()
    old, reference = logprob.detach() + 0.1 * noise, logprob.detach() - 0.1 * noise
    options = {"old_logprob": old, "reference_logprob": reference, "epsilon": 0.1}
    options |= {"epsilon_high": 0.4, "kl_coefficient": 0.3, "aggregation": "token-mean"}
    for normalizer in (None, 17.0):
        mask, options["normalizer"] = target != 9, normalizer
        expected, _ = pta_grpo.pta_grpo_loss_from_tokens(logprob, mask, advantages, **options)
        (truth,) = torch.autograd.grad(expected, weight, retain_graph=True)
        for inplace in (False, True):
            logits, more = weight * 1.0, {"temperature": 0.7, "ignore_index": 9}
            more |= {"inplace_backward": inplace}
            loss, _ = pta_grpo.pta_grpo_loss(logits, labels, advantages, **options, **more)
            (gradient,) = torch.autograd.grad(loss, weight)
            torch.testing.assert_close(loss, expected, **TIGHT)
            torch.testing.assert_close(gradient, truth, **TIGHT)
            assert torch.equal(logits.detach(), weight.detach()) != inplace
    count = formula(logprob, old, reference, mask, advantages, 0.1, 0.4, 0.3, "token-mean")
    torch.testing.assert_close(loss * 17, count * mask.sum(), **TIGHT)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"epsilon": -0.1}, ValueError, "epsilon must be finite and not negative, got -0.1"),
        ({"epsilon_high": "1"}, TypeError, "epsilon_high must be a number, got str"),
        ({"kl_coefficient": math.inf}, ValueError, "kl_coefficient must be finite"),
        ({"aggregation": "token-sum"}, ValueError, "aggregation must be .* got 'token-sum'"),
        ({"kl_coefficient": 0.1}, ValueError, "reference_logprob is needed"),
        ({"advantages": torch.zeros(5)}, ValueError, r"advantages must have shape \(6,\)"),
        ({"mask_or_cu_seqlens": torch.ones(6, 9)}, TypeError, "mask must be bool"),
        ({"old_logprob": torch.zeros(6, 8)}, ValueError, "old_logprob must have the shape"),
    ],
)
def test_losses_name_the_error(change, error, message):
    logprob, _, _, mask, advantages = tokens()
    arguments = {"logprob": logprob, "mask_or_cu_seqlens": mask, "advantages": advantages}
    with pytest.raises(error, match=message):
        pta_grpo.pta_grpo_loss_from_tokens(**(arguments | change))
    with pytest.raises(ValueError, match=r"pta_grpo_loss: policy_logits must be \(N, T, V\)"):
        pta_grpo.pta_grpo_loss(torch.zeros(6, 9, 3), torch.zeros(6, 8).long(), advantages)
