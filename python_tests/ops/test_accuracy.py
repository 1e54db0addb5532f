"""Every operator, values and gradients, against float64 and plain torch at its own dtype."""

import pytest
import torch
from accuracy import (
    OPERATORS,
    SEQUENTIAL_KL,
    TOKEN_LOGPROB,
    assert_no_worse,
    draw,
    draw_target,
    gradients,
    leaves,
    upstream_of,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokcore.ops import sequential_kl

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
every_operator = pytest.mark.parametrize("operator", OPERATORS, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def inputs(backend, operator, dtype, rows, size, kind="normal", seed=0):
    logits = [
        draw(kind, *rows, size, seed=seed + 10 * side).to(backend.device, dtype)
        for side in range(operator.logits)
    ]
    return logits, draw_target(rows, size, seed).to(backend.device)


def skip_double_on_cuda(backend, dtype):
    if backend.name != "cpu" and dtype == torch.float64:
        pytest.skip("double is for the CPU")


@every_operator
@every_dtype
@pytest.mark.parametrize("kind", ["normal", "wide", "peaked", "offset", "below"])
@pytest.mark.parametrize("size", [1, 2, 31, 129, 1003])
def test_sizes(backend, operator, dtype, kind, size):
    skip_double_on_cuda(backend, dtype)
    assert_no_worse(operator, *inputs(backend, operator, dtype, (5,), size, kind))


@every_operator
@every_dtype
@pytest.mark.parametrize("rows", [(), (1,), (2, 3), (2, 1, 2)], ids=str)
@pytest.mark.parametrize("temperature", [0.5, 3.0, "per row"])
def test_temperature_and_leading_dimensions(backend, operator, dtype, rows, temperature):
    skip_double_on_cuda(backend, dtype)
    logits, target = inputs(backend, operator, dtype, rows, 77, "wide")
    if temperature == "per row":
        temperature = draw("normal", *rows).abs().add(0.3).to(backend.device, torch.float32)
    assert_no_worse(operator, logits, target, temperature=temperature)


@every_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["normal", "peaked"])
def test_large_vocabulary(backend, operator, dtype, kind):
    size = 5_003 if backend.name == "emulated" else 262_144
    assert_no_worse(operator, *inputs(backend, operator, dtype, (2,), size, kind))


@every_dtype
@pytest.mark.parametrize("softcap", [30.0, 2.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_softcap(backend, dtype, softcap, temperature):
    skip_double_on_cuda(backend, dtype)
    logits, target = inputs(backend, TOKEN_LOGPROB, dtype, (5,), 129, "wide")
    assert_no_worse(TOKEN_LOGPROB, logits, target, softcap=softcap, temperature=temperature)


@every_dtype
@pytest.mark.parametrize("count", [1, 3, 40])
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
def test_several_targets(backend, dtype, count, index_dtype):
    """With duplicates: 40 draws of 31 tokens. Their gradients add up."""
    skip_double_on_cuda(backend, dtype)
    logits, _ = inputs(backend, TOKEN_LOGPROB, dtype, (4,), 31)
    target = draw_target((4, count), 31).to(backend.device, index_dtype)
    assert_no_worse(TOKEN_LOGPROB, logits, target)


@every_operator
@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 7, 2**31 - 1])
def test_int32_targets_and_ignore_index(backend, operator, ignore_index):
    logits, target = inputs(backend, operator, torch.float32, (9,), 31)
    target = torch.where(target == -100, ignore_index, target).int()
    assert_no_worse(operator, logits, target, ignore_index=ignore_index)


@every_dtype
def test_kl_with_mask(backend, dtype):
    skip_double_on_cuda(backend, dtype)
    logits, target = inputs(backend, SEQUENTIAL_KL, dtype, (8,), 65)
    mask = (torch.arange(8) % 3 != 0).to(backend.device)
    assert_no_worse(SEQUENTIAL_KL, logits, target, mask=mask)


@every_operator
@every_dtype
def test_sliced_inputs_are_read_where_they_lie(backend, operator, dtype):
    """Offsets and strides that are no multiple of a vector, and a transposed batch."""
    skip_double_on_cuda(backend, dtype)
    whole, _ = inputs(backend, operator, dtype, (4, 5), 139)
    logits = [x.transpose(0, 1)[1:, ::2, 3:134] for x in whole]
    assert_no_worse(operator, logits, draw_target((4, 2), 131).to(backend.device))


@every_operator
def test_last_dimension_that_is_not_contiguous(backend, operator):
    logits, target = inputs(backend, operator, torch.float32, (37,), 6)
    assert_no_worse(operator, [x.t() for x in logits], target[:6] % 37)


@every_operator
@every_dtype
def test_expanded_rows_and_gradients(backend, operator, dtype):
    skip_double_on_cuda(backend, dtype)
    logits, target = inputs(backend, operator, dtype, (1,), 33)
    logits = leaves([x.expand(6, 33) for x in logits])
    values = operator.call(logits, target.expand(6).clamp(min=0))
    plain = operator.reference(logits, target.expand(6).clamp(min=0))
    # the gradient of a sum is one number, expanded
    grads = torch.autograd.grad([value.sum() for value in values], logits)
    expected = torch.autograd.grad([value.sum() for value in plain], logits)
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(dtype, 1e-5)
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@every_operator
def test_only_some_outputs_are_differentiated(backend, operator):
    """Absent upstream gradients are absent terms."""
    logits, target = inputs(backend, operator, torch.float32, (5,), 67)
    for chosen in range(operator.values):
        leaf = leaves(logits)
        values = operator.call(leaf, target)
        upstream = upstream_of(values)
        grads = gradients([values[chosen]], leaf, [upstream[chosen]])
        exact = leaves([x.cpu() for x in logits], torch.float64)
        truth = operator.reference(exact, target.cpu())
        true = gradients([truth[chosen]], exact, [upstream[chosen].cpu()])
        for got, want in zip(grads, true, strict=True):
            torch.testing.assert_close(got.cpu().double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", [0, 1])
def test_only_one_of_the_logits_requires_grad(backend, side):
    logits, target = inputs(backend, SEQUENTIAL_KL, torch.float32, (5,), 67)
    both = leaves(logits)
    values = SEQUENTIAL_KL.call(both, target)
    upstream = upstream_of(values)
    expected = gradients(values, both, upstream)[side]
    logits[side].requires_grad_()
    values = SEQUENTIAL_KL.call(logits, target)
    assert torch.equal(gradients(values, [logits[side]], upstream)[0], expected)
    for chosen in range(SEQUENTIAL_KL.values):  # what is read depends on what is asked for
        one = SEQUENTIAL_KL.call(both, target)[chosen], SEQUENTIAL_KL.call(logits, target)[chosen]
        if one[1].requires_grad:
            expected = gradients(one[:1], both, upstream[chosen : chosen + 1])[side]
            (got,) = gradients(one[1:], [logits[side]], upstream[chosen : chosen + 1])
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("unread", ["policy", "reference"])
def test_a_side_that_the_gradient_does_not_need(backend, unread):
    """TDPO1 (KL and log-probability with one weight) leaves 1_y - q, the log-probability alone
    1_y - p; the other side's logits, here far below 0, have no say."""
    (policy, reference), target = inputs(backend, SEQUENTIAL_KL, torch.float32, (5,), 67)
    target = target.clamp(min=0)
    read = reference if unread == "policy" else policy
    want = torch.nn.functional.one_hot(target, 67) - read.double().softmax(-1)
    policy, reference = policy - 1000 * (unread == "policy"), reference - 1000 * (read is policy)
    leaf = policy.requires_grad_()
    values = sequential_kl(leaf, reference, target)
    loss = values.policy_logprob + (values.kl if unread == "policy" else 0)
    (got,) = torch.autograd.grad(loss.sum(), leaf)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


@every_operator
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("probability", [0.9, 0.99, 0.999])
def test_gradient_at_the_label_is_formed_before_rounding(backend, operator, dtype, probability):
    """p - 1 from a rounded p would be off by 100 % at p = 0.999 in bf16."""
    size = 64
    x = torch.zeros(1, size, dtype=dtype, device=backend.device)
    x[0, 5] = torch.logit(torch.tensor(probability, dtype=torch.float64)).item() + torch.log(
        torch.tensor(size - 1.0)
    )
    target = torch.tensor([5], device=backend.device)
    leaf = x.clone().requires_grad_()
    logits = [leaf, torch.zeros_like(x)][: operator.logits]
    values = operator.call(logits, target)
    values[0 if operator is TOKEN_LOGPROB else 1].sum().backward()
    truth = 1 - x.double().softmax(-1)[0, 5]
    assert abs(leaf.grad[0, 5].double() - truth) <= 0.005 * truth


@every_operator
@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.lists(st.integers(0, 4), max_size=3),
    size=st.integers(1, 300),
    kind=st.sampled_from(["normal", "wide", "peaked", "offset"]),
    dtype=st.sampled_from(DTYPES[:3]),
    temperature=st.floats(0.125, 10.0),
    seed=st.integers(0, 2**16),
)
def test_any_shape_and_value(backend, operator, rows, size, kind, dtype, temperature, seed):
    logits, target = inputs(backend, operator, dtype, tuple(rows), size, kind, seed)
    if logits[0].numel() <= (2_000 if backend.name == "emulated" else 50_000):
        assert_no_worse(operator, logits, target, temperature=temperature)
