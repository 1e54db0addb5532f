"""What TDPO must obey whatever the numbers (the algebra behind docs/algorithms/tdpo.md)."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokcore.algorithms import tdpo
from tokcore.masking import row_sum, shift_labels
from tokcore.ops import sequential_kl

PROPERTY = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 2**31)
variants = st.sampled_from(["tdpo1", "tdpo2"])


def problem(seed, pairs=2, time=6, vocabulary=11, dtype=torch.float64):
    """Random logits of both models and labels with prompts, tails and holes masked."""
    generator = torch.Generator().manual_seed(seed)

    def logits():
        shape = (2 * pairs, time, vocabulary)
        return 2 * torch.randn(shape, generator=generator, dtype=dtype)

    labels = torch.randint(vocabulary, (2 * pairs, time), generator=generator)
    ignored = torch.rand(labels.shape, generator=generator) < 0.3
    return logits(), logits(), labels.masked_fill(ignored, -100)


def loss_and_gradient(policy, reference, labels, loss_of=tdpo.tdpo_loss, **setting):
    policy = policy.clone().requires_grad_()
    loss, metrics = loss_of(policy, reference, labels, **setting)
    (gradient,) = torch.autograd.grad(loss, policy)
    return loss.detach(), gradient, metrics


def upstream(metrics, beta, split="train"):
    """g = dL/dh per pair, from the logged losses: sigmoid(-beta h) = 1 - exp(-loss)."""
    losses = metrics[f"loss/{split}"]
    return beta * torch.expm1(-losses) / len(losses)


@PROPERTY
@given(seeds)
def test_tdpo1_is_linear_in_the_policy_logits(seed):
    policy, reference, labels = problem(seed)
    _, gradient, metrics = loss_and_gradient(policy, reference, labels, variant="tdpo1")
    target = shift_labels(labels)
    kept = target != -100
    delta, q = policy - reference, reference.softmax(-1)
    at_label = delta.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    linear = row_sum(at_label - (q * delta).sum(-1), kept)
    rewards = torch.cat([metrics["rewards_train/chosen"], metrics["rewards_train/rejected"]])
    torch.testing.assert_close(rewards, 0.1 * linear, rtol=1e-10, atol=1e-12)

    one_hot = torch.zeros_like(q).scatter_(-1, target.clamp(min=0).unsqueeze(-1), 1.0)
    g = torch.cat([upstream(metrics, 0.1), -upstream(metrics, 0.1)])
    expected = torch.where(kept[..., None], g[:, None, None] * (one_hot - q), 0.0)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-14)


@PROPERTY
@given(seeds, st.floats(0, 2))
def test_tdpo2_has_the_gradient_of_the_specification(seed, alpha):
    policy, reference, labels = problem(seed)
    _, gradient, metrics = loss_and_gradient(
        policy, reference, labels, variant="tdpo2", alpha=alpha
    )
    target = shift_labels(labels)
    p, q = policy.softmax(-1), reference.softmax(-1)
    one_hot = torch.zeros_like(q).scatter_(-1, target.clamp(min=0).unsqueeze(-1), 1.0)
    g = upstream(metrics, 0.1)[:, None, None]
    pairs = len(g)
    chosen = g * (one_hot - p)[:pairs]
    rejected = g * (-one_hot + (1 - alpha) * p + alpha * q)[pairs:]
    expected = torch.where((target != -100)[..., None], torch.cat([chosen, rejected]), 0.0)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-14)


@PROPERTY
@given(seeds, variants)
def test_constants_per_position_change_nothing(seed, variant):
    policy, reference, labels = problem(seed)
    before = loss_and_gradient(policy, reference, labels, variant=variant)
    generator = torch.Generator().manual_seed(seed + 1)
    offsets = [
        50 * torch.randn(*labels.shape, 1, generator=generator, dtype=policy.dtype) for _ in "pq"
    ]
    after = loss_and_gradient(policy + offsets[0], reference + offsets[1], labels, variant=variant)
    torch.testing.assert_close(after[0], before[0], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(after[1], before[1], rtol=1e-10, atol=1e-13)


@PROPERTY
@given(seeds)
def test_alpha_zero_is_dpo(seed):
    policy, reference, labels = problem(seed)
    tdpo2 = loss_and_gradient(policy, reference, labels, variant="tdpo2", alpha=0)
    dpo = loss_and_gradient(policy, reference, labels, tdpo.dpo_loss)
    torch.testing.assert_close(tdpo2[0], dpo[0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(tdpo2[1], dpo[1], rtol=1e-12, atol=1e-16)


@PROPERTY
@given(seeds)
def test_alpha_one_has_the_loss_of_tdpo1_and_its_gradient_on_rejected_rows(seed):
    policy, reference, labels = problem(seed)
    tdpo1 = loss_and_gradient(policy, reference, labels, variant="tdpo1")
    tdpo2 = loss_and_gradient(policy, reference, labels, variant="tdpo2", alpha=1.0)
    torch.testing.assert_close(tdpo2[0], tdpo1[0], rtol=1e-12, atol=1e-14)
    half = len(labels) // 2
    torch.testing.assert_close(tdpo2[1][half:], tdpo1[1][half:], rtol=1e-10, atol=1e-14)


@PROPERTY
@given(seeds, variants, st.sampled_from([torch.float32, torch.float64]))
def test_at_the_start_loss_is_ln_2_and_the_gradient_is_that_of_dpo(seed, variant, dtype):
    policy, _, labels = problem(seed, dtype=dtype)
    loss, gradient, metrics = loss_and_gradient(policy, policy, labels, variant=variant)
    dpo = loss_and_gradient(policy, policy, labels, tdpo.dpo_loss)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    assert (metrics["kl_train/chosen"] == 0).all()
    assert (metrics["kl_train/rejected"] == 0).all()
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-8} if dtype is torch.float32 else {"rtol": 1e-10, "atol": 1e-15}
    )
    torch.testing.assert_close(gradient, dpo[1], **tolerance)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kl_and_logprob_of_tdpo1_receive_the_same_bits(dtype, packed):
    """Then the coefficient of the policy softmax is exactly 0 and the backward leaves it out."""
    torch.manual_seed(3)
    kl, policy = (torch.rand(6, 5, dtype=dtype).requires_grad_() for _ in "kp")
    reference, index = torch.rand(6, 5, dtype=dtype), torch.rand(6, 5) < 0.7
    inputs = [kl, policy, reference]
    if packed:
        inputs, index = [x.reshape(-1) for x in inputs], torch.tensor([0, 5, 7, 12, 12, 20, 30])
    loss, _ = tdpo.tdpo_loss_from_tokens(*inputs, index, variant="tdpo1", beta=0.3)
    for_kl, for_policy = torch.autograd.grad(loss, (kl, policy))
    assert torch.equal(for_kl, for_policy)
    assert for_kl.count_nonzero() > 0


def test_tdpo2_sends_no_gradient_to_the_chosen_kl():
    kl, policy = (torch.rand(4, 3).requires_grad_() for _ in "kp")
    mask = torch.ones(4, 3, dtype=torch.bool)
    loss, _ = tdpo.tdpo_loss_from_tokens(kl, policy, torch.rand(4, 3), mask, variant="tdpo2")
    for_kl, for_policy = torch.autograd.grad(loss, (kl, policy))
    assert (for_kl[:2] == 0).all()
    assert (for_kl[2:] > 0).all()
    assert (for_policy[:2] < 0).all()


def test_tdpo1_gradient_does_not_depend_on_the_policy_softmax():
    """A policy that is certain of the label is still pushed, by exactly g (1_y - q)."""
    policy, reference, labels = problem(5, dtype=torch.float32)
    labels = labels.clamp(min=0)
    policy.scatter_(-1, shift_labels(labels, ignore_index=0).unsqueeze(-1), 80.0)
    _, gradient, metrics = loss_and_gradient(policy, reference, labels, variant="tdpo1", beta=1e-3)
    g = torch.cat([upstream(metrics, 1e-3), -upstream(metrics, 1e-3)])
    one_hot = torch.nn.functional.one_hot(labels[:, 1:], policy.shape[-1])
    expected = g[:, None, None] * (one_hot - reference[:, :-1].softmax(-1))
    torch.testing.assert_close(gradient[:, :-1], expected, rtol=1e-4, atol=1e-10)


@PROPERTY
@given(seeds, variants)
def test_packed_equals_padded(seed, variant):
    policy, reference, labels = problem(seed, pairs=3)
    target = shift_labels(labels)
    kept = target != -100
    padded = loss_and_gradient(policy, reference, labels, variant=variant)
    policy = policy.clone().requires_grad_()
    tokens = sequential_kl(policy[kept], reference[kept], target[kept])
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)]).int()
    loss, metrics = tdpo.tdpo_loss_from_tokens(*tokens[:3], cu_seqlens, variant=variant)
    (gradient,) = torch.autograd.grad(loss, policy)
    torch.testing.assert_close(loss.detach(), padded[0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, padded[1], rtol=1e-11, atol=1e-15)
    for name, value in padded[2].items():
        torch.testing.assert_close(metrics[name], value, rtol=1e-12, atol=1e-13)


@PROPERTY
@given(seeds)
def test_swapping_the_responses_mirrors_dpo_and_tdpo1(seed):
    policy, reference, labels = problem(seed)
    swapped = [torch.cat([x[2:], x[:2]]) for x in (policy, reference, labels)]
    for loss_of, setting in ((tdpo.dpo_loss, {}), (tdpo.tdpo_loss, {"variant": "tdpo1"})):
        _, metrics = loss_of(policy, reference, labels, **setting)
        _, mirrored = loss_of(*swapped, **setting)
        margins = metrics["rewards_train/margins"]
        torch.testing.assert_close(mirrored["rewards_train/margins"], -margins)
        # softplus(-x) - softplus(x) = -x
        torch.testing.assert_close(metrics["loss/train"] - mirrored["loss/train"], -margins)


@pytest.mark.parametrize("variant", ["tdpo1", "tdpo2"])
def test_gradcheck(variant):
    policy, reference, labels = problem(1, pairs=1, time=4, vocabulary=5)

    def loss(policy):
        return tdpo.tdpo_loss(policy, reference, labels, variant=variant, alpha=0.5)[0]

    if variant == "tdpo1":
        assert torch.autograd.gradcheck(loss, policy.requires_grad_())
        return
    # The stop-gradient makes TDPO2's gradient that of a loss whose chosen KL is a constant.
    target = shift_labels(labels)
    fixed = sequential_kl(policy, reference, target).kl.detach()

    def with_constant(policy):
        tokens = sequential_kl(policy, reference, target)
        kl = torch.cat([fixed[:1], tokens.kl[1:]])
        return tdpo.tdpo_loss_from_tokens(
            kl, tokens.policy_logprob, tokens.reference_logprob, target != -100, variant=variant
        )[0]

    assert torch.autograd.gradcheck(with_constant, policy.requires_grad_())
    torch.testing.assert_close(
        *(torch.autograd.grad(f(policy), policy)[0] for f in (loss, with_constant)),
        rtol=1e-12,
        atol=1e-15,
    )
    assert torch.autograd.gradcheck(
        lambda policy: tdpo.dpo_loss(policy, reference, labels)[0], policy
    )


def test_infinite_divergence_stays_in_its_pair():
    """A policy that forbids what the reference allows: that pair's KL is infinite, no other is."""
    policy, reference, labels = problem(2, pairs=3)
    labels[:, 1:] = 3
    before = tdpo.tdpo_loss(policy, reference, labels, variant="tdpo2")[1]["loss/train"]
    policy[4, 2, 7] = float("-inf")  # rejected row of pair 1
    _, metrics = tdpo.tdpo_loss(policy, reference, labels, variant="tdpo2")
    assert metrics["kl_train/rejected"][1] == math.inf
    assert torch.equal(metrics["loss/train"][[0, 2]], before[[0, 2]])
    _, dpo = tdpo.tdpo_loss(policy, reference, labels, variant="tdpo2", alpha=0)
    assert dpo["loss/train"].isfinite().all()
