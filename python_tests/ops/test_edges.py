"""Values worked out by hand, and what happens at the edges: infinities, NaN, nothing to do."""

import math

import pytest
import torch
from accuracy import (
    OPERATORS,
    SEQUENTIAL_KL,
    draw,
    draw_target,
    gradients,
    leaves,
    upstream_of,
)

from tokcore.ops import sequential_kl, token_logprob

every_operator = pytest.mark.parametrize("operator", OPERATORS, ids=str)
SIDES = [(operator, side) for operator in OPERATORS for side in range(operator.logits)]
INF, NAN = float("inf"), float("nan")
LN2, LN3, LN4 = math.log(2), math.log(3), math.log(4)


def row(backend, *values, dtype=torch.float32):
    return torch.tensor([values], device=backend.device, dtype=dtype)


def one(backend, value):
    return torch.tensor([value], device=backend.device)


@pytest.mark.parametrize(
    ("logits", "target", "options", "logprob", "entropy"),
    [
        ([0.0], 0, {}, 0.0, 0.0),  # V = 1
        ([5.0, 5.0], 1, {}, -LN2, LN2),
        ([0.0, LN3], 0, {}, -LN4, LN4 - 0.75 * LN3),  # p = 1/4, 3/4
        ([0.0, LN3], 1, {}, LN3 - LN4, LN4 - 0.75 * LN3),
        ([1000.0, 1000.0 + LN3], 0, {}, -LN4, LN4 - 0.75 * LN3),  # only differences count
        ([0.0, 2 * LN3], 0, {"temperature": 2.0}, -LN4, LN4 - 0.75 * LN3),
        ([0.0, 100.0], 0, {"softcap": LN3}, -LN4, LN4 - 0.75 * LN3),  # tanh(100 / c) = 1
        ([0.0, INF], 0, {"softcap": LN3}, -LN4, LN4 - 0.75 * LN3),  # a finite logit then
        ([0.0, 100.0], 0, {"softcap": 2 * LN3, "temperature": 2.0}, -LN4, LN4 - 0.75 * LN3),
        ([0.0, 9.0, -INF], 1, {"temperature": 1e30}, -LN2, LN2),  # the ends of what T may be
        ([0.0, 9.0, -INF], 1, {"temperature": 1e-30}, 0.0, 0.0),
        ([0.0, 0.0, -INF], 0, {}, -LN2, LN2),  # as if the entry were not there
        ([0.0, 0.0, -INF], 2, {}, -INF, LN2),
        ([0.0, -INF, -INF], 0, {}, 0.0, 0.0),
        ([0.0, -200.0], 1, {}, -200.0, 0.0),  # p underflows, log p does not
        ([1.0, 2.0], -100, {}, 0.0, 0.0),  # ignored
        ([1.0, 2.0], 1, {"ignore_index": 1}, 0.0, 0.0),
    ],
)
def test_token_logprob_by_hand(backend, logits, target, options, logprob, entropy):
    got = token_logprob(row(backend, *logits), one(backend, target), return_entropy=True, **options)
    want = (one(backend, logprob), one(backend, entropy))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=2e-6 if logits[0] < 999 else 1e-4)


@pytest.mark.parametrize(
    ("policy", "reference", "forward", "reverse"),
    [
        ([0.0], [7.0], 0.0, 0.0),  # V = 1
        ([0.0, 0.0], [5.0, 5.0], 0.0, 0.0),
        ([0.0, 0.0], [0.0, LN3], 0.75 * LN3 - LN2, 2 * LN2 - LN3 + 0.5 * LN3 - LN2 + 0.0),
        ([0.0, 0.0, -INF], [0.0, 0.0, -INF], 0.0, 0.0),
        ([0.0, 0.0, -INF], [0.0, 0.0, 0.0], INF, LN3 - LN2),
        ([0.0, 0.0, 0.0], [0.0, 0.0, -INF], LN3 - LN2, INF),
        ([0.0, -INF], [-INF, 0.0], INF, INF),  # nothing in common
        ([0.0, 300.0], [300.0, 0.0], 300.0, 300.0),
        ([-INF, 0.0], [-INF, 3.0], 0.0, 0.0),
    ],
)
def test_sequential_kl_by_hand(backend, policy, reference, forward, reverse):
    policy, reference = row(backend, *policy), row(backend, *reference)
    both = sequential_kl(policy, reference, direction="both")
    want = (one(backend, forward), one(backend, reverse))
    torch.testing.assert_close((both.kl, both.reverse_kl), want, rtol=1e-6, atol=1e-6)
    assert torch.equal(sequential_kl(policy, reference).kl, both.kl)
    assert torch.equal(sequential_kl(policy, reference, direction="reverse").kl, both.reverse_kl)


def test_sequential_kl_gradient_by_hand(backend):
    """p = (1/2, 1/2), q = (1/4, 3/4): p - q, and log-probabilities beside it."""
    policy, reference = row(backend, 0.0, 0.0), row(backend, 0.0, LN3)
    policy.requires_grad_()
    result = sequential_kl(policy, reference, one(backend, 1))
    torch.testing.assert_close(result.policy_logprob, one(backend, -LN2))
    torch.testing.assert_close(result.reference_logprob, one(backend, LN3 - LN4))
    (result.kl + 2 * result.policy_logprob).sum().backward()
    torch.testing.assert_close(policy.grad, row(backend, 0.25 - 1.0, -0.25 + 1.0))


def test_what_was_not_asked_for_is_none(backend):
    policy, reference = row(backend, 0.0, 1.0), row(backend, 1.0, 1.0)
    bare = sequential_kl(policy, reference)
    assert [name for name, value in bare._asdict().items() if value is not None] == ["kl"]
    full = sequential_kl(policy, reference, one(backend, 0), direction="both", return_entropy=True)
    assert all(value is not None and value.shape == (1,) for value in full)


@pytest.mark.parametrize(("operator", "side"), SIDES, ids=str)
@pytest.mark.parametrize("poison", [NAN, INF, "all -inf"])
@pytest.mark.parametrize("size", [3, 600])
def test_a_poisoned_row_is_nan_and_no_other(backend, operator, poison, side, size):
    logits = [draw("normal", 5, size, seed=s).float() for s in range(operator.logits)]
    clean = operator.call(
        [x.to(backend.device) for x in logits], torch.zeros(5).long().to(backend.device)
    )
    if poison == "all -inf":
        logits[side][2] = -INF
    else:
        logits[side][2, size - 2] = poison
    leaf = leaves([x.to(backend.device) for x in logits])
    values = operator.call(leaf, torch.zeros(5).long().to(backend.device))
    grads = gradients(values, leaf, upstream_of(values))
    others = torch.tensor([0, 1, 3, 4], device=backend.device)
    for got, want in zip(values, clean, strict=True):
        assert got[2].isnan()
        assert torch.equal(got[others], want[others])
    for grad in grads:
        assert grad[others].isfinite().all()


@every_operator
def test_gradients_are_finite_wherever_the_values_are(backend, operator):
    """-inf in both logits (a banned token), as target or not."""
    logits = [draw("normal", 4, 37, seed=s).float().to(backend.device) for s in range(2)]
    for x in logits:
        x[1:, 5] = -INF
        x[2, 8:] = -INF
    target = torch.tensor([5, 4, 5, 7], device=backend.device)
    leaf = leaves(logits[: operator.logits])
    values = operator.call(leaf, target)
    grads = gradients(values, leaf, upstream_of(values))
    exact = leaves([x.cpu() for x in leaf], torch.float64)
    truth = gradients(operator.reference(exact, target.cpu()), exact, upstream_of(values))
    for got, want in zip(grads, truth, strict=True):
        torch.testing.assert_close(got.cpu().double(), want, rtol=1e-5, atol=1e-6)


@every_operator
@pytest.mark.parametrize("junk", [NAN, INF, -INF])
def test_ignored_rows_are_exactly_zero_whatever_they_hold(backend, operator, junk):
    logits = [draw("normal", 6, 41, seed=s).float() for s in range(operator.logits)]
    for x in logits:
        x[::2] = junk
    target = torch.tensor([-100, 3, -100, 4, -100, 40], device=backend.device)
    leaf = leaves([x.to(backend.device) for x in logits])
    values = operator.call(leaf, target)
    grads = gradients(values, leaf, upstream_of(values))
    for result in (*values, *grads):
        assert (result[::2] == 0).all()
        assert result[1::2].isfinite().all()
        assert (result[1::2] != 0).any()


@every_operator
def test_nan_in_the_upstream_of_an_ignored_row_is_harmless(backend, operator):
    logits = [
        draw("normal", 3, 41, seed=s).float().to(backend.device) for s in range(operator.logits)
    ]
    leaf = leaves(logits)
    values = operator.call(leaf, torch.tensor([-100, 3, -100], device=backend.device))
    upstream = upstream_of(values)
    for g in upstream:
        g[0], g[2] = NAN, INF
    for grad in gradients(values, leaf, upstream):
        assert grad.isfinite().all()
        assert (grad[::2] == 0).all()


def test_masked_rows_of_the_kl(backend):
    """A mask and an ignored target do the same, and either is enough."""
    logits = [draw("normal", 4, 41, seed=s).float() for s in range(2)]
    for x in logits:
        x[1:] = NAN
    logits = [x.to(backend.device) for x in logits]
    mask = torch.tensor([True, True, False, False], device=backend.device)
    target = torch.tensor([3, -100, 5, -100], device=backend.device)
    values = SEQUENTIAL_KL.call(logits, target, mask=mask)
    alone = SEQUENTIAL_KL.call([x[:1] for x in logits], target[:1])
    for got, want in zip(values, alone, strict=True):
        assert torch.equal(got, torch.cat([want, torch.zeros_like(got[1:])]))


@every_operator
@pytest.mark.parametrize("junk", [NAN, INF, -INF])
def test_a_row_whose_upstream_is_zero_is_not_read(backend, operator, junk):
    logits = [
        draw("normal", 2, 37, seed=s).float().to(backend.device) for s in range(operator.logits)
    ]
    for x in logits:
        x[1] = junk
    leaf = leaves(logits)
    values = operator.call(leaf, torch.tensor([3, 4], device=backend.device))
    upstream = [torch.tensor([1.0, 0.0], device=backend.device)] * len(values)
    for grad in gradients(values, leaf, upstream):
        assert (grad[1] == 0).all()
        assert grad[0].isfinite().all()


@pytest.mark.parametrize(("direction", "side"), [("reverse", 0), ("forward", 1)])
def test_gradients_of_a_finite_kl_where_one_side_has_no_mass(backend, direction, side):
    """The weighting side is -inf where the other is finite: a term of 0, and finite gradients."""
    logits = [draw("normal", 2, 37, seed=s).float().to(backend.device) for s in range(2)]
    logits[side][:, 5] = -INF
    leaf = leaves(logits)
    got = torch.autograd.grad(sequential_kl(*leaf, direction=direction).kl.sum(), leaf)
    weighting, other = leaves([logits[side], logits[1 - side]], torch.float64)
    w = weighting.softmax(-1)
    kept = w > 0
    ratio = torch.where(kept, w.log() - other.log_softmax(-1), 0.0)
    mean = (w * ratio).sum(-1, keepdim=True)
    want = [(w * (ratio - mean)).detach(), (other.softmax(-1) - w).detach()]
    for grad, true in zip(got, want if side == 0 else want[::-1], strict=True):
        torch.testing.assert_close(grad.double(), true, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("direction", ["forward", "reverse", "both"])
def test_rows_without_statistics_and_without_a_target(backend, direction):
    """A dropped row and one without a finite logit write the outputs that there are, no others."""
    policy, reference = (draw("normal", 3, 9, seed=s).float().to(backend.device) for s in (0, 1))
    policy[2] = -INF
    mask = torch.tensor([True, False, True], device=backend.device)
    got = sequential_kl(policy, reference, mask=mask, direction=direction)
    want = sequential_kl(policy[:1], reference[:1], direction=direction)
    assert got.policy_logprob is None
    assert got.reference_logprob is None
    for value, first in ((got.kl, want.kl), (got.reverse_kl, want.reverse_kl)):
        if value is not None:
            assert torch.equal(value[:2], torch.stack([first[0], torch.zeros_like(first[0])]))
            assert value[2].isnan()


def test_one_ignored_target_of_several(backend):
    logits = draw("normal", 2, 9).float().to(backend.device).requires_grad_()
    target = torch.tensor([[3, -100, 4], [-100, -100, -100]], device=backend.device)
    logprob, entropy = token_logprob(logits, target, return_entropy=True)
    assert (logprob[target == -100] == 0).all()
    assert entropy[1] == 0
    logprob.sum().backward()
    want = token_logprob(logits, torch.tensor([[3, 4], [-100, -100]], device=backend.device))
    assert torch.equal(torch.autograd.grad(want.sum(), logits)[0], logits.grad)


def test_more_targets_than_threads(backend):
    """A thread of a GPU's block then takes several, of a row that is ignored as well."""
    logits = draw("normal", 2, 9).float().to(backend.device)
    target = torch.arange(600, device=backend.device).remainder(9).expand(2, -1).clone()
    target[1] = -100
    want = logits.double().log_softmax(-1)[0, target[0]].float()
    got = token_logprob(logits, target)
    torch.testing.assert_close(got[0], want, rtol=1e-6, atol=1e-6)
    assert (got[1] == 0).all()


@every_operator
@pytest.mark.parametrize("rows", [(0,), (2, 0), (0, 3)], ids=str)
def test_no_rows(backend, operator, rows):
    leaf = [
        torch.zeros(*rows, 7, device=backend.device, requires_grad=True)
        for _ in range(operator.logits)
    ]
    target = torch.zeros(rows, dtype=torch.long, device=backend.device)
    values = operator.call(leaf, target)
    assert all(value.shape == rows and value.dtype == torch.float32 for value in values)
    grads = gradients(values, leaf, upstream_of(values))
    assert all(grad.shape == (*rows, 7) for grad in grads)


@every_operator
def test_all_rows_ignored(backend, operator):
    leaf = leaves([draw("normal", 3, 7).float().to(backend.device)] * operator.logits)
    values = operator.call(leaf, torch.full((3,), -100, device=backend.device))
    grads = gradients(values, leaf, upstream_of(values))
    assert all((result == 0).all() for result in (*values, *grads))


@every_operator
@pytest.mark.parametrize("label", [-1, 41, 2**40, -(2**40)])
def test_label_out_of_range(backend, operator, label, monkeypatch):
    """The CPU raises; elsewhere that row is NaN, and TOKCORE_DEBUG=1 raises everywhere."""
    logits = [
        draw("normal", 3, 41, seed=s).float().to(backend.device) for s in range(operator.logits)
    ]
    target = torch.tensor([3, label, 4], device=backend.device)
    named = rf"{operator}: target .*{label}"
    if backend.checks_values:
        with pytest.raises((ValueError, RuntimeError), match=named):
            operator.call(logits, target)
    else:
        leaf = leaves(logits)
        values = operator.call(leaf, target)
        for result in (*values, *gradients(values, leaf, upstream_of(values))):
            assert result[1].isnan().all()
            assert result[::2].isfinite().all()
    monkeypatch.setenv("TOKCORE_DEBUG", "1")
    with pytest.raises((ValueError, RuntimeError), match=named):
        operator.call(logits, target)


@every_operator
def test_rows_of_zero_upstream_have_zero_gradient(backend, operator):
    leaf = leaves(
        [draw("normal", 3, 41, seed=s).float().to(backend.device) for s in range(operator.logits)]
    )
    values = operator.call(leaf, draw_target((3,), 41).clamp(min=0).to(backend.device))
    upstream = upstream_of(values)
    for g in upstream:
        g[1] = 0
    for grad in gradients(values, leaf, upstream):
        assert (grad[1] == 0).all()
        assert (grad[::2] != 0).any()
