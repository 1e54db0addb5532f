"""Where the KL is small, equal or impossible for the textbook formula in float32."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accuracy import draw, reference_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokcore.ops import sequential_kl

GOLDEN = Path(__file__).parents[1] / "golden"
OFFSETS = [0.0, 10.0, 1000.0, -1000.0]
_reference = reference_of("sequential_kl")


def exact(policy: torch.Tensor, reference: torch.Tensor):
    """Both KLs in float64 by E[expm1(u) - u], good to 1e-9 of a KL of 1e-6."""
    p = policy.cpu().double().log_softmax(-1)
    q = reference.cpu().double().log_softmax(-1)
    u = p - q
    return (q.exp() * (u.expm1() - u)).sum(-1), (p.exp() * ((-u).expm1() + u)).sum(-1)


def assert_accurate(backend, policy, reference):
    """To 1e-3 of itself, however small, down to 1e-9."""
    policy, reference = policy.to(backend.device), reference.to(backend.device)
    result = sequential_kl(policy, reference, direction="both")
    for got, want in zip((result.kl, result.reverse_kl), exact(policy, reference), strict=True):
        assert ((got.cpu() - want).abs() <= 1e-3 * want + 1e-12).all(), (got, want)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("size", [31, 1003, 5003])
@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_small_kl_under_a_common_offset(backend, offset, size, spread):
    """KL near 1e-6, where the textbook sum is noise. What the logits are is what is compared."""
    x = spread * draw("normal", 4, size)
    noise = 1.5e-3 * draw("normal", 4, size, seed=1)
    policy, reference = (x + offset).float(), (x + noise + offset).float()
    assert_accurate(backend, policy, reference)


@pytest.mark.parametrize("shift", [0.25, 10.0, -1000.0])
def test_an_offset_of_one_side_alone(backend, shift):
    """Softmax does not see it; the rounded inputs do, and the comparison is with them."""
    x = draw("normal", 4, 1003)
    policy, reference = x.float(), (x + 1.5e-3 * draw("normal", 4, 1003, seed=1) + shift).float()
    assert_accurate(backend, policy, reference)


@pytest.mark.parametrize("position", ["largest", "smallest", "last"])
@pytest.mark.parametrize("move", [1e-3, 0.03, 0.3, 1.0, 3.0, -1.0, -8.0])
@pytest.mark.parametrize("kind", ["normal", "uniform", "peaked"])
@pytest.mark.parametrize("size", [257, 4099, 32_768])
def test_one_token_moved(backend, position, move, kind, size):
    """All of the KL comes from one entry, which may become the maximum that anchors the sums."""
    backend.skip_above(size, emulated=5_000)
    x = torch.zeros(1, size).double() if kind == "uniform" else draw(kind, 1, size)
    reference = x.float()
    at = {"largest": int(x.argmax()), "smallest": int(x.argmin()), "last": size - 1}[position]
    policy = reference.clone()
    policy[0, at] += move
    assert_accurate(backend, policy, reference)


@pytest.mark.parametrize("scale", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("size", [129, 8_192])
def test_down_to_tiny_divergences(backend, scale, size):
    backend.skip_above(2 * size, emulated=5_000)
    x = draw("normal", 2, size).float()
    reference = (x + scale * draw("normal", 2, size, seed=1)).float()
    assert_accurate(backend, x, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["normal", "peaked", "offset"])
def test_equal_logits_have_no_divergence(backend, dtype, kind):
    if backend.name != "cpu" and dtype == torch.float64:
        pytest.skip("double is for the CPU")
    x = draw(kind, 5, 515).to(backend.device, dtype)
    x[3, 7] = -torch.inf
    policy = x.clone().requires_grad_()
    result = sequential_kl(policy, x, direction="both")
    assert (result.kl == 0).all()
    assert (result.reverse_kl == 0).all()
    (result.kl + result.reverse_kl).sum().backward()
    assert (policy.grad == 0).all()


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    size=st.integers(1, 700),
    spread=st.floats(0.0, 30.0),
    scale=st.sampled_from([0.0, 1e-7, 1e-5, 1e-3, 0.1, 10.0]),
    offset=st.sampled_from(OFFSETS),
    seed=st.integers(0, 2**16),
)
def test_never_negative(backend, size, spread, scale, offset, seed):
    x = spread * draw("normal", 3, size, seed=seed) + offset
    y = x + scale * draw("normal", 3, size, seed=seed + 1)
    result = sequential_kl(
        x.float().to(backend.device), y.float().to(backend.device), direction="both"
    )
    assert (result.kl >= 0).all()
    assert (result.reverse_kl >= 0).all()


def golden(name: str, prefix: str = ""):
    with np.load(GOLDEN / name) as arrays:
        return {
            key.removeprefix(prefix): torch.from_numpy(arrays[key])
            for key in arrays.files
            if key.startswith(prefix)
        }


def run_golden(backend, values, dtype):
    """Per position outputs on the authors' inputs, labels shifted onto the logits."""
    policy = values["policy_logits"].to(backend.device, dtype).requires_grad_()
    reference = values["reference_logits"].to(backend.device, dtype)
    target = torch.full_like(values["labels"], -100)
    target[:, :-1] = values["labels"][:, 1:]
    result = sequential_kl(policy, reference, target.to(backend.device))
    return policy, target, result


@pytest.mark.parametrize("name", ["tdpo_f64_v37.npz", "tdpo_degenerate.npz"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_numbers_of_the_authors(backend, name, dtype):
    if backend.name != "cpu" and dtype == torch.float64:
        pytest.skip("double is for the CPU")
    values = golden(name)
    policy, _, result = run_golden(backend, values, dtype)
    exact_type = dtype == torch.float64
    close = {"rtol": 1e-12, "atol": 1e-13} if exact_type else {"rtol": 1e-5, "atol": 1e-5}
    mask = values["loss_mask"]
    for got, key in [
        (result.kl, "tok_kl_unmasked"),
        (result.policy_logprob, "tok_policy_logps_unmasked"),
        (result.policy_logprob - result.reference_logprob, "tok_logps_margin_unmasked"),
    ]:
        want = torch.where(mask, values[key], 0)
        torch.testing.assert_close(got[:, :-1].detach().cpu().double(), want, **close)
        assert (got[:, :-1].cpu()[~mask] == 0).all()
    margin, kl, logps = values["vjp/cotangents_margin_kl_logps"].to(backend.device, dtype)
    sums = [x.sum(-1) for x in (result.policy_logprob, result.reference_logprob, result.kl)]
    (margin @ (sums[0] - sums[1]) + kl @ sums[2] + logps @ sums[0]).backward()
    close = {"rtol": 1e-12, "atol": 1e-13} if exact_type else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(
        policy.grad.cpu().double(), values["vjp/grad_policy_logits"], **close
    )


def test_finite_where_the_authors_code_is_nan(backend):
    """A reference probability that underflows: their float32 gives NaN, their float64 does not."""
    values, truth = (golden("tdpo_underflow.npz", prefix) for prefix in ("f32/", "f64/"))
    policy, _, result = run_golden(backend, values, torch.float32)
    assert values["position_kl"].isnan().all()
    sums = result.kl.sum(-1).detach().cpu().double()
    torch.testing.assert_close(sums, truth["position_kl"], rtol=1e-5, atol=1e-4)
    margin, kl, logps = values["vjp/cotangents_margin_kl_logps"].to(backend.device)
    own, other = result.policy_logprob.sum(-1), result.reference_logprob.sum(-1)
    (margin @ (own - other) + kl @ result.kl.sum(-1) + logps @ own).backward()
    torch.testing.assert_close(
        policy.grad.cpu().double(), truth["vjp/grad_policy_logits"], rtol=1e-5, atol=1e-5
    )
