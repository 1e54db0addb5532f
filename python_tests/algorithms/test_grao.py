"""GRAO against numbers computed from the paper's Eqs. 2 to 4 (golden), limits, masks, packing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad

from tokcore.algorithms import grao
from tokcore.masking import pad_rows
from tokcore.ops import PolicyLoss, policy_loss
from tokcore.ops.policy_loss_rules import Reinforce

GOLDEN = Path(__file__).parents[1] / "golden" / "grpo_grao_formula.npz"
CONVENTIONS = {"samples": "samples", "samples_plus_reference": "samples_plus_ref"}
TIGHT = {"rtol": 1e-12, "atol": 1e-12}
PROPERTY = settings(max_examples=40, deadline=None)
both_conventions = pytest.mark.parametrize("convention", CONVENTIONS)


@pytest.fixture
def golden():
    """In the layout of tokcore: (36, 11), eight samples and the reference of query 0, and so on."""
    archive = np.load(GOLDEN)
    arrays = {key: torch.from_numpy(np.array(archive[key])) for key in archive.files}
    for key, samples, references in (
        ("logprob", "in/logps", "in/ref_answer_logps"),
        ("mask", "in/mask", "in/ref_answer_mask"),
        ("samples/gradient", "samples/grad_logps", "samples/grad_ref_answer_logps"),
        (
            "samples_plus_ref/gradient",
            "samples_plus_ref/grad_logps",
            "samples_plus_ref/grad_ref_answer_logps",
        ),
    ):
        arrays[key] = torch.cat([arrays[samples], pad(arrays[references], (0, 2))[:, None]], 1)
        arrays[key] = arrays[key].flatten(0, 1)
    for key, samples, references in (
        ("rewards", "in/rewards", "in/reward_ref"),
        ("samples/advantages", "samples/adv", "samples/adv_ref"),
        ("samples/weights", "samples/weight_samples", "samples/weight_ref"),
        ("samples_plus_ref/advantages", "samples_plus_ref/adv", "samples_plus_ref/adv_ref"),
        (
            "samples_plus_ref/weights",
            "samples_plus_ref/weight_samples",
            "samples_plus_ref/weight_ref",
        ),
    ):
        arrays[key] = torch.cat([arrays[samples], arrays[references][:, None]], 1).flatten()
    arrays["mask"] = arrays["mask"].bool()
    return arrays


def run(logprob, advantages, group, **options):
    logprob = logprob.clone().requires_grad_()
    loss, metrics = grao.grao_loss_from_tokens(logprob, advantages, group, **options)
    (gradient,) = torch.autograd.grad(loss, logprob)
    return loss.detach(), metrics, gradient


@both_conventions
def test_advantages_weights_loss_and_gradient_equal_the_golden_numbers(golden, convention):
    of = CONVENTIONS[convention]
    settings = {"beta": golden["beta"].item(), "lambda_": golden["lambda"].item()}
    assert settings == {"beta": 0.5, "lambda_": 0.6}  # also the defaults
    advantages = grao.grao_advantages(golden["rewards"], 9, convention=convention)
    torch.testing.assert_close(advantages, golden[f"{of}/advantages"], **TIGHT)
    weights = grao.grao_weights(advantages, 9)
    torch.testing.assert_close(weights, golden[f"{of}/weights"], **TIGHT)
    torch.testing.assert_close(grao.grao_weights(advantages, 9, **settings), weights)
    loss, metrics, gradient = run(golden["logprob"], advantages, 9, mask=golden["mask"])
    torch.testing.assert_close(loss, golden[f"{of}/loss"], **TIGHT)
    torch.testing.assert_close(gradient, golden[f"{of}/gradient"], **TIGHT)
    expected = {
        "logps_train/samples": golden[f"{of}/J_expl"].mean(),
        "logps_train/references": golden[f"{of}/J_imit"].mean(),
        "advantages_train/samples": golden[f"{of}/adv"].mean(),
        "advantages_train/references": golden[f"{of}/adv_ref"].mean(),
        # query 2: all samples win, which is no signal to "samples" alone
        "tied_train": torch.tensor(0.25 if convention == "samples" else 0.0).double(),
        "loss/train": golden[f"{of}/loss"],
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value, **TIGHT)
        assert not metrics[name].requires_grad


# --- the collapsed form is Eq. 3 ---------------------------------------------------------------


def literal_loss(rows, advantages, beta, lambda_):
    """Eqs. 2 and 3 as printed: rows are kept log-probabilities, a query's reference last."""

    def mean(row):
        return row.sum() / max(len(row), 1)

    objectives = []
    for (*samples, reference), (*of_samples, of_reference) in zip(rows, advantages, strict=True):
        terms = [
            a * mean(o)
            + beta * of_reference * mean(reference)
            + lambda_ * a * (mean(o) - mean(reference))
            for o, a in zip(samples, of_samples, strict=True)
        ]
        objectives.append(sum(terms) / len(terms))
    return -sum(objectives) / len(objectives)


def batch_of(seed, sizes, *, longest=5):
    """Rewards, query ids, padded log-probabilities and mask of queries of ``sizes`` samples."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(sizes) + len(sizes)
    ids = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes) + 1)
    rewards = torch.randint(-1, 2, (count,), generator=generator).double()
    logprob = -torch.rand(count, longest, generator=generator, dtype=torch.float64)
    lengths = torch.randint(0, longest + 1, (count, 1), generator=generator)
    return rewards, ids, logprob, torch.arange(longest) < lengths


@PROPERTY
@given(
    st.integers(0, 2**31),
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.floats(0, 2),
    st.floats(0, 2),
    st.sampled_from(list(CONVENTIONS)),
)
def test_the_weighted_sum_is_the_literal_objective(seed, sizes, beta, lambda_, convention):
    rewards, ids, logprob, mask = batch_of(seed, sizes)
    advantages = grao.grao_advantages(rewards, ids, convention=convention)
    loss, _, gradient = run(logprob, advantages, ids, mask=mask, beta=beta, lambda_=lambda_)
    leaf = logprob.clone().requires_grad_()
    counts = [size + 1 for size in sizes]
    kept = [row[keep] for row, keep in zip(leaf, mask, strict=True)]
    rows = [kept[sum(counts[:q]) : sum(counts[: q + 1])] for q in range(len(counts))]
    literal = literal_loss(rows, advantages.split(counts), beta, lambda_)
    torch.testing.assert_close(loss, literal.detach(), **TIGHT)
    (expected,) = torch.autograd.grad(literal, leaf)
    torch.testing.assert_close(gradient, expected, **TIGHT)


@PROPERTY
@given(
    st.integers(0, 2**31),
    st.lists(st.integers(1, 5), min_size=1, max_size=5),
    st.sampled_from(list(CONVENTIONS)),
)
def test_a_query_alone_gives_what_it_gives_in_a_batch(seed, sizes, convention):
    rewards, ids, *_ = batch_of(seed, sizes)
    together = grao.grao_advantages(rewards, ids, convention=convention)
    weights = grao.grao_weights(together, ids.int() * 7 - 3)
    for query, size in enumerate(sizes):
        of_query = ids == query
        alone = grao.grao_advantages(rewards[of_query], size + 1, convention=convention)
        assert torch.equal(alone, together[of_query])
        assert torch.equal(grao.grao_weights(alone, size + 1), weights[of_query])


# --- limits ------------------------------------------------------------------------------------


@both_conventions
def test_without_beta_and_lambda_it_is_group_reinforce(golden, convention):
    advantages = grao.grao_advantages(golden["rewards"], 9, convention=convention)
    options = {"mask": golden["mask"], "beta": 0.0, "lambda_": 0.0}
    loss, _, gradient = run(golden["logprob"], advantages, 9, **options)
    is_sample = torch.arange(36) % 9 < 8
    leaf = golden["logprob"][is_sample].requires_grad_()
    rules = PolicyLoss(Reinforce(), aggregation="seq-mean-token-mean")
    expected, _ = policy_loss(leaf, advantages[is_sample], rules, mask=golden["mask"][is_sample])
    torch.testing.assert_close(loss, expected.detach(), **TIGHT)
    expected.backward()
    torch.testing.assert_close(gradient[is_sample], leaf.grad, **TIGHT)
    assert (gradient[~is_sample] == 0).all()


def test_the_regulariser_moves_the_reference_only_where_the_reference_is_in_the_statistics(golden):
    is_reference = torch.arange(36) % 9 == 8
    samples = grao.grao_advantages(golden["rewards"], 9, convention="samples")
    with_it, without = (grao.grao_weights(samples, 9, lambda_=x) for x in (0.6, 0.0))
    torch.testing.assert_close(with_it[is_reference], without[is_reference], rtol=0, atol=1e-15)
    torch.testing.assert_close(with_it[~is_reference], 1.6 * without[~is_reference], **TIGHT)
    both = grao.grao_advantages(golden["rewards"], 9)
    weights = grao.grao_weights(both, 9, beta=0.5, lambda_=0.6)
    torch.testing.assert_close(weights[is_reference], 0.575 * both[is_reference], **TIGHT)
    torch.testing.assert_close(weights[~is_reference], 0.2 * both[~is_reference], **TIGHT)


@both_conventions
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("reward", [0.1, 1.2, -1e30])
def test_ties_have_exactly_no_advantage_and_no_gradient(convention, dtype, reward):
    rewards = torch.full((18,), reward, dtype=dtype)
    advantages = grao.grao_advantages(rewards, 9, convention=convention)
    assert advantages.dtype == grao.grao_weights(advantages, 9).dtype == dtype
    assert (advantages == 0).all()
    loss, metrics, gradient = run(-torch.rand(18, 4), advantages, 9)
    assert loss == 0
    assert (gradient == 0).all()
    assert metrics["tied_train"] == 1


@pytest.mark.parametrize("size", [1, 4, 8])
@pytest.mark.parametrize("outcome", [-1.0, 1.0])
def test_all_samples_lose_or_win(size, outcome):
    rewards = pad(torch.full((1, size), outcome).double(), (0, 1)).flatten()
    samples = grao.grao_advantages(rewards, size + 1, convention="samples")
    assert (samples == 0).all()
    advantages = grao.grao_advantages(rewards, size + 1)
    expected = pad(torch.full((size,), outcome / size**0.5), (0, 1), value=-outcome * size**0.5)
    torch.testing.assert_close(advantages, expected.double(), rtol=1e-6, atol=0)
    logprob = -torch.rand(size + 1, 3, dtype=torch.float64)
    _, metrics, gradient = run(logprob, advantages, size + 1)
    assert metrics["tied_train"] == 0
    # A step down the gradient: towards the reference where all lose, away from it where all win.
    assert ((gradient[:-1] < 0) == (outcome > 0)).all()
    assert ((gradient[-1] < 0) == (outcome < 0)).all()
    _, _, clamped = run(logprob, advantages, size + 1, clamp_reference=True)
    assert torch.equal(clamped[:-1], gradient[:-1])
    assert torch.equal(clamped[-1], gradient[-1] if outcome < 0 else torch.zeros(3).double())


def test_what_is_not_scored_counts_nowhere():
    nan = float("nan")
    for convention in CONVENTIONS:
        some = grao.grao_advantages(torch.tensor([1.0, nan, -1, 1, 0]), 5, convention=convention)
        without = grao.grao_advantages(torch.tensor([1.0, -1, 1, 0]), 4, convention=convention)
        assert torch.equal(some[[0, 2, 3, 4]], without)
        assert some[1] == 0
        no_reference = grao.grao_advantages(torch.tensor([1.0, -1, nan]), 3, convention=convention)
        assert no_reference.tolist() == [1, -1, 0]


def test_the_fraction_of_tied_queries_counts_queries_and_not_rows():
    ids = torch.tensor([4, 4, 2, 2, 2, 2])
    advantages = grao.grao_advantages(torch.tensor([0.0, 0, 1, -1, 0, 0]), ids)
    _, metrics, _ = run(torch.zeros(6, 1), advantages, ids)
    assert metrics["tied_train"] == 0.5


# --- masks, packing, logits ----------------------------------------------------------------------


def test_masked_positions_have_no_effect_whatever_they_hold(golden):
    advantages = grao.grao_advantages(golden["rewards"], 9)
    found = run(golden["logprob"], advantages, 9, mask=golden["mask"])
    for poison in (float("nan"), float("inf"), -float("inf")):
        logprob = torch.where(golden["mask"], golden["logprob"], poison)
        again = run(logprob, advantages, 9, mask=golden["mask"])
        assert torch.equal(again[0], found[0])
        assert torch.equal(again[2], found[2])
        assert all(torch.equal(again[1][name], value) for name, value in found[1].items())
    assert (found[2][~golden["mask"]] == 0).all()


@pytest.mark.parametrize("keeps_masked", [False, True])
def test_packed_rows_equal_padded_ones(keeps_masked):
    rewards, ids, logprob, mask = batch_of(5, [3, 1, 4])
    mask[[2, 8]] = False  # a sample and the last but one row keep nothing
    advantages = grao.grao_advantages(rewards, ids)
    padded = run(logprob, advantages, ids, mask=mask)
    stored = torch.ones_like(mask) if keeps_masked else mask
    ends = pad(stored.sum(1).cumsum(0), (1, 0)).int()
    packed_mask = mask[stored] if keeps_masked else None
    packed = run(logprob[stored], advantages, ids, mask=packed_mask, cu_seqlens=ends)
    torch.testing.assert_close(packed[0], padded[0], **TIGHT)
    torch.testing.assert_close(packed[2], padded[2][stored], **TIGHT)
    for name, value in padded[1].items():
        torch.testing.assert_close(packed[1][name], value, **TIGHT)


def test_rows_without_a_token_add_nothing():
    rewards, ids, logprob, mask = batch_of(6, [2, 2])
    mask[:] = True
    mask[1], mask[5] = False, False
    advantages = grao.grao_advantages(rewards, ids)
    loss, metrics, gradient = run(logprob, advantages, ids, mask=mask)
    means = torch.where(mask, logprob, 0).mean(1)
    expected = -(grao.grao_weights(advantages, ids) * means).sum() / 2
    torch.testing.assert_close(loss, expected, **TIGHT)
    assert (gradient[[1, 5]] == 0).all()
    torch.testing.assert_close(metrics["logps_train/samples"], means[[0, 3, 4]].mean(), **TIGHT)
    torch.testing.assert_close(metrics["logps_train/references"], means[2], **TIGHT)


def logits_and_labels():
    """Prompts and responses of several lengths: six rows, two queries of G = 2, V = 13."""
    generator = torch.Generator().manual_seed(3)
    prompts, lengths = (2, 2, 2, 3, 3, 3), (4, 1, 3, 2, 0, 4)
    labels = [
        torch.cat([torch.full((p,), -100), torch.randint(0, 13, (n,), generator=generator)])
        for p, n in zip(prompts, lengths, strict=True)
    ]
    logits = [torch.randn(len(row), 13, generator=generator).double() for row in labels]
    advantages = grao.grao_advantages(torch.tensor([1.0, -1, 0, -1, -1, 0]).double(), 3)
    return logits, labels, advantages


def test_the_gradient_to_the_logits_is_its_formula():
    logits, labels, advantages = logits_and_labels()
    padded_labels = pad_rows(labels, -100)
    leaf = torch.nn.utils.rnn.pad_sequence(logits, True).requires_grad_()
    loss, metrics = grao.grao_loss(leaf, padded_labels, advantages, 3, split="eval")
    loss.backward()
    weights, total = grao.grao_weights(advantages, 3), 0.0
    expected = torch.zeros_like(leaf)
    for row, (x, label) in enumerate(zip(logits, labels, strict=True)):
        keep = (label[1:] != -100).nonzero().flatten()
        target = label[1:][keep]
        log_p = x[keep].log_softmax(-1)
        n, w = max(len(keep), 1), weights[row]
        total -= w * log_p.gather(1, target[:, None]).sum() / n / 2
        one_hot = torch.nn.functional.one_hot(target, 13)
        expected[row, keep] = w * (log_p.exp() - one_hot) / (n * 2)
    torch.testing.assert_close(loss.detach(), total, **TIGHT)
    torch.testing.assert_close(leaf.grad, expected, **TIGHT)
    assert {name.split("/")[0] for name in metrics if name[:4] in ("logp", "adva")} == {
        "logps_eval",
        "advantages_eval",
    }
    assert "loss/eval" in metrics


def test_packed_logits_equal_padded_ones_also_where_a_row_starts_with_a_label():
    logits, labels, advantages = logits_and_labels()
    for row in labels:
        row[0] = 5  # of no use to its own row, and no target of the row before
    padded = torch.nn.utils.rnn.pad_sequence(logits, True).requires_grad_()
    loss, metrics = grao.grao_loss(padded, pad_rows(labels, -100), advantages, 3)
    loss.backward()
    ends = torch.tensor([0, *(len(row) for row in labels)]).cumsum(0)
    packed = torch.cat(logits).requires_grad_()
    again, packed_metrics = grao.grao_loss(
        packed, torch.cat(labels), advantages, 3, cu_seqlens=ends
    )
    again.backward()
    torch.testing.assert_close(again, loss, **TIGHT)
    for row, gradient in enumerate(packed.grad.split([len(row) for row in labels])):
        torch.testing.assert_close(gradient, padded.grad[row, : len(gradient)], **TIGHT)
    for name, value in metrics.items():
        torch.testing.assert_close(packed_metrics[name], value, **TIGHT)


def test_logits_at_ignored_positions_are_not_read_and_inplace_gives_the_same_gradient():
    logits, labels, advantages = logits_and_labels()
    weight, target = torch.nn.utils.rnn.pad_sequence(logits, True), pad_rows(labels, -100)
    gradients = []
    for poison, inplace in ((0.0, False), (float("nan"), False), (float("inf"), True)):
        is_used = pad(target[:, 1:] != -100, (0, 1))
        leaf = torch.where(is_used[..., None], weight, poison).requires_grad_()
        logits = leaf * 1.0  # those of a model are no leaf
        loss, _ = grao.grao_loss(logits, target, advantages, 3, inplace_backward=inplace)
        loss.backward()
        is_same = torch.where(is_used[..., None], logits == leaf, True).all()
        assert is_same != inplace
        gradients.append(torch.where(is_used[..., None], leaf.grad, 0))
        assert gradients[-1].isfinite().all()
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_give_a_float32_loss_and_half_gradients(dtype):
    logits, labels, advantages = logits_and_labels()
    half = torch.nn.utils.rnn.pad_sequence(logits, True).to(dtype).requires_grad_()
    wide = half.detach().double().requires_grad_()
    for leaf, a in ((half, advantages.float()), (wide, advantages)):
        loss, _ = grao.grao_loss(leaf, pad_rows(labels, -100), a, 3)
        loss.backward()
        assert loss.dtype == (torch.float64 if leaf is wide else torch.float32)
    assert half.grad.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(half.grad.double(), wide.grad, rtol=2 * eps, atol=1e-6)
    tokens = torch.tensor([[-0.5], [-1.0], [-2.0]], dtype=dtype)  # exact, unlike the weights
    loss, _ = grao.grao_loss_from_tokens(tokens, torch.tensor([1.0, -0.5, -0.5]), 3)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(0.8 * 0.5 - 0.4 * 1 - 0.4 * 2, abs=1e-6)
