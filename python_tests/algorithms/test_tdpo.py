"""TDPO against the numbers of the authors' own code (golden/tdpo_*.npz), and its error table."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tokcore.algorithms import tdpo
from tokcore.masking import row_sum, shift_labels
from tokcore.ops import sequential_kl

GOLDEN = Path(__file__).parents[1] / "golden"
VARIANTS = (
    "tdpo1",
    "tdpo1_b05",
    "tdpo2_a05",
    "tdpo2_a01",
    "tdpo2_a07",
    "tdpo2_a10",
    "tdpo2_b05_a05",
)
CASES = [("tdpo_f64_v37", "", variant) for variant in VARIANTS]
CASES += [("tdpo_degenerate", "", "tdpo1"), ("tdpo_degenerate", "", "tdpo2_a05")]
CASES += [("tdpo_underflow", "f64/", "tdpo1"), ("tdpo_underflow", "f64/", "tdpo2_a05")]
TIGHT = {"rtol": 1e-12, "atol": 1e-13}


def load(file, prefix=""):
    archive = np.load(GOLDEN / f"{file}.npz")
    return {
        key.removeprefix(prefix): torch.from_numpy(np.array(archive[key]))
        for key in archive.files
        if key.startswith(prefix)
    }


def run(golden, variant, **options):
    """Loss, metrics and gradient at one golden setting."""
    policy = golden["policy_logits"].clone().requires_grad_()
    loss, metrics = tdpo.tdpo_loss(
        policy,
        golden["reference_logits"],
        golden["labels"],
        variant="tdpo2" if golden[f"{variant}/if_tdpo2"] else "tdpo1",
        alpha=golden[f"{variant}/alpha"].item(),
        beta=golden[f"{variant}/beta"].item(),
        **options,
    )
    (gradient,) = torch.autograd.grad(loss, policy)
    return loss.detach(), metrics, gradient


def expected_metrics(golden, variant):
    """The authors' metrics, from the arrays their functions returned."""
    kl_c, kl_r = golden["position_kl"].chunk(2)
    logps_c, logps_r = golden["policy_logps"].chunk(2)
    chosen, rejected = golden[f"{variant}/chosen_rewards"], golden[f"{variant}/rejected_rewards"]
    return {
        "rewards_train/chosen": chosen,
        "rewards_train/rejected": rejected,
        "rewards_train/accuracies": (chosen > rejected).to(chosen.dtype),
        "rewards_train/margins": chosen - rejected,
        "kl_train/chosen": kl_c,
        "kl_train/rejected": kl_r,
        "kl_train/margin": kl_c - kl_r,
        "logps_train/chosen": logps_c,
        "logps_train/rejected": logps_r,
        "loss/train": golden[f"{variant}/losses"],
    }


@pytest.mark.parametrize(("file", "prefix", "variant"), CASES)
def test_loss_metrics_and_gradient_equal_the_authors(file, prefix, variant):
    golden = load(file, prefix)
    loss, metrics, gradient = run(golden, variant)
    torch.testing.assert_close(loss, golden[f"{variant}/loss"], **TIGHT)
    torch.testing.assert_close(gradient, golden[f"{variant}/grad_policy_logits"], **TIGHT)
    expected = expected_metrics(golden, variant)
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        if file == "tdpo_degenerate" and name == "rewards_train/accuracies":
            continue  # policy = reference: the authors' sign is that of their rounding noise
        torch.testing.assert_close(
            metrics[name], value, **TIGHT, msg=lambda text, n=name: f"{n}: {text}"
        )
        assert not metrics[name].requires_grad


@pytest.mark.parametrize("variant", ["tdpo1", "tdpo2_a05"])
def test_float32_is_finite_and_right_where_the_authors_give_nan(variant):
    golden, truth = load("tdpo_underflow", "f32/"), load("tdpo_underflow", "f64/")
    assert golden[f"{variant}/loss"].isnan()
    loss, metrics, gradient = run(golden, variant)
    tolerance = {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(loss.double(), truth[f"{variant}/loss"], **tolerance)
    torch.testing.assert_close(
        gradient.double(), truth[f"{variant}/grad_policy_logits"], **tolerance
    )
    for name, value in expected_metrics(truth, variant).items():
        if name == "rewards_train/accuracies":
            continue
        torch.testing.assert_close(metrics[name].double(), value, **tolerance)


@pytest.mark.parametrize("file", ["tdpo_f64_v37", "tdpo_degenerate"])
def test_row_sums_and_weighted_gradient_equal_the_authors(file):
    golden = load(file)
    policy = golden["policy_logits"].clone().requires_grad_()
    target = shift_labels(golden["labels"])
    tokens = sequential_kl(policy, golden["reference_logits"], target)
    sums = [
        row_sum(value, target != -100)
        for value in (
            tokens.policy_logprob - tokens.reference_logprob,
            tokens.kl,
            tokens.policy_logprob,
        )
    ]
    for name, value in zip(("logps_margin", "position_kl", "policy_logps"), sums, strict=True):
        torch.testing.assert_close(value.detach(), golden[name], **TIGHT)
    weights = golden["vjp/cotangents_margin_kl_logps"]
    weighted = sum((w * s).sum() for w, s in zip(weights, sums, strict=True))
    (gradient,) = torch.autograd.grad(weighted, policy)
    torch.testing.assert_close(gradient, golden["vjp/grad_policy_logits"], **TIGHT)


@pytest.mark.parametrize("variant", ["tdpo1", "tdpo2_a05"])
def test_masked_and_last_positions_are_exactly_zero_whatever_they_hold(variant):
    golden = load("tdpo_f64_v37")
    loss, metrics, gradient = run(golden, variant)
    unused = shift_labels(golden["labels"]) == -100
    assert unused[:, -1].all()
    assert (gradient[unused] == 0).all()
    golden["policy_logits"][unused] = float("nan")
    golden["reference_logits"][unused] = float("inf")
    again = run(golden, variant)
    assert torch.equal(again[0], loss)
    assert torch.equal(again[2], gradient)
    assert all(torch.equal(again[1][name], value) for name, value in metrics.items())


def test_rows_without_a_label_sum_to_exactly_zero():
    golden = load("tdpo_f64_v37")
    golden["labels"][1::4] = -100  # both rows of pair 1
    loss, metrics, gradient = run(golden, "tdpo2_a05")
    for name in (
        "kl_train/chosen",
        "kl_train/rejected",
        "logps_train/chosen",
        "rewards_train/margins",
    ):
        assert metrics[name][1] == 0
    assert metrics["loss/train"][1] == torch.tensor(2.0, dtype=torch.float64).log()
    assert (gradient[1::4] == 0).all()
    assert loss.isfinite()


def test_no_pairs_give_a_loss_of_zero():
    policy = torch.zeros(0, 4, 7, requires_grad=True)
    labels = torch.zeros(0, 4, dtype=torch.int64)
    for loss, metrics in (
        tdpo.tdpo_loss(policy, policy.detach(), labels, variant="tdpo1"),
        tdpo.dpo_loss(policy, policy.detach(), labels),
    ):
        assert loss == 0
        assert all(value.shape == (0,) for value in metrics.values())
        loss.backward()


def test_dpo_equals_its_formula_and_names_its_metrics():
    golden = load("tdpo_f64_v37")
    policy = golden["policy_logits"].clone().requires_grad_()
    loss, metrics = tdpo.dpo_loss(
        policy, golden["reference_logits"], golden["labels"], split="eval"
    )
    margin_c, margin_r = golden["logps_margin"].chunk(2)
    expected = torch.nn.functional.softplus(-0.1 * (margin_c - margin_r))
    torch.testing.assert_close(metrics["loss/eval"], expected, **TIGHT)
    torch.testing.assert_close(metrics["rewards_eval/chosen"], 0.1 * margin_c, **TIGHT)
    torch.testing.assert_close(loss.detach(), expected.mean(), **TIGHT)
    assert {name.split("_")[0] for name in metrics} == {"rewards", "logps", "loss/eval"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_give_float32_numbers_and_half_gradients(dtype):
    golden = load("tdpo_f64_v37")
    for name in ("policy_logits", "reference_logits"):
        golden[name] = golden[name].to(dtype)
    loss, metrics, gradient = run(golden, "tdpo2_a05")
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    for name in ("policy_logits", "reference_logits"):
        golden[name] = golden[name].double()
    truth = run(golden, "tdpo2_a05")
    torch.testing.assert_close(loss.double(), truth[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        gradient.double(), truth[2], rtol=2 * torch.finfo(dtype).eps, atol=1e-6
    )
    for name, value in metrics.items():
        torch.testing.assert_close(value.double(), truth[1][name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss_of", [tdpo.dpo_loss, tdpo.tdpo_loss])
def test_inplace_backward_reuses_the_logits_for_the_same_gradient(loss_of):
    golden = load("tdpo_f64_v37")
    setting = {"variant": "tdpo2"} if loss_of is tdpo.tdpo_loss else {}
    gradients = []
    for inplace in (False, True):
        weight = golden["policy_logits"].clone().requires_grad_()
        policy = weight * 1.0  # logits of a model are no leaf
        loss, _ = loss_of(
            policy,
            golden["reference_logits"],
            golden["labels"],
            inplace_backward=inplace,
            **setting,
        )
        loss.backward()
        gradients.append(weight.grad)
        overwritten = not torch.equal(policy.detach(), golden["policy_logits"])
        assert overwritten == inplace
    assert torch.equal(*gradients)


LOGITS, LABELS = torch.zeros(4, 3, 5), torch.zeros(4, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"variant": "tdpo3"}, ValueError, "variant must be 'tdpo1' or 'tdpo2', got 'tdpo3'"),
        ({"beta": 0.0}, ValueError, "beta must be finite and positive, got 0.0"),
        ({"beta": -0.1}, ValueError, "beta must be finite and positive, got -0.1"),
        ({"beta": float("nan")}, ValueError, "beta must be finite and positive, got nan"),
        ({"beta": "0.1"}, TypeError, "beta must be a number, got str"),
        ({"alpha": -1}, ValueError, "alpha must be finite and not negative, got -1"),
        ({"alpha": float("inf")}, ValueError, "alpha must be finite and not negative, got inf"),
        ({"alpha": True}, TypeError, "alpha must be a number, got bool"),
        (
            {"policy_logits": LOGITS[0]},
            ValueError,
            r"policy_logits must be \(2B, T, V\), got \(3, 5\)",
        ),
        ({"reference_logits": torch.zeros(4, 3, 8)}, ValueError, "is one vocabulary padded"),
        (
            {"reference_logits": torch.zeros(2, 3, 5)},
            ValueError,
            r"shape of policy_logits \(4, 3, 5\)",
        ),
        ({"labels": LABELS[:, 1:]}, ValueError, r"labels must have shape \(4, 3\), not shifted"),
        ({"labels": LABELS.float()}, TypeError, "labels must be integers, got torch.float32"),
        (
            {"policy_logits": LOGITS[:3], "reference_logits": LOGITS[:3], "labels": LABELS[:3]},
            ValueError,
            "rows must be chosen and rejected in equal number, got 3",
        ),
    ],
)
def test_tdpo_loss_names_the_error(change, error, message):
    arguments = {"policy_logits": LOGITS, "reference_logits": LOGITS, "labels": LABELS}
    with pytest.raises(error, match=message):
        tdpo.tdpo_loss(**(arguments | {"variant": "tdpo2"} | change))


def test_the_variant_has_no_default():
    with pytest.raises(TypeError, match="variant"):
        tdpo.tdpo_loss(LOGITS, LOGITS, LABELS)


@pytest.mark.parametrize(
    ("tokens", "index", "error", "message"),
    [
        (
            torch.zeros(4, 3),
            torch.ones(4, 3),
            TypeError,
            "bool mask, True = keep, got torch.float32",
        ),
        (
            torch.zeros(4, 3),
            torch.ones(4, 2, dtype=torch.bool),
            ValueError,
            r"mask must have shape \(4, 3\)",
        ),
        (torch.zeros(3, 3), torch.ones(3, 3, dtype=torch.bool), ValueError, "equal number, got 3"),
        (
            torch.zeros(6),
            torch.ones(6, dtype=torch.bool),
            TypeError,
            "cu_seqlens in int32 or int64",
        ),
        (torch.zeros(6), torch.tensor([0, 2, 4, 6]), ValueError, "equal number, got 3"),
        (
            torch.zeros(6),
            torch.tensor([0, 4, 2, 5, 6]),
            ValueError,
            "cu_seqlens must rise from 0 to the 6",
        ),
        (torch.zeros(6), torch.tensor([0, 2, 5]), ValueError, "cu_seqlens must rise"),
        (
            torch.zeros(6),
            torch.tensor(6),
            ValueError,
            r"cu_seqlens must have shape \(2B \+ 1,\), got \(\)",
        ),
        (
            torch.zeros(2, 2, 2),
            torch.ones(2, 2, dtype=torch.bool),
            ValueError,
            r"\(2B, T\) or packed",
        ),
        (
            LABELS,
            torch.ones(4, 3, dtype=torch.bool),
            TypeError,
            "must be floating point, got torch.int64",
        ),
    ],
)
def test_losses_from_tokens_name_the_error(tokens, index, error, message):
    with pytest.raises(error, match=message):
        tdpo.tdpo_loss_from_tokens(tokens, tokens, tokens, index, variant="tdpo1")
    with pytest.raises(error, match=message):
        tdpo.dpo_loss_from_tokens(tokens, tokens, index)
