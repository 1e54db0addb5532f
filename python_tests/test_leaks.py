"""Memory stays where it is over many calls of every operator."""

import gc
from pathlib import Path

import pytest
import torch

from tokcore.ops import sequential_kl, token_logprob

STATM = Path("/proc/self/statm")
pytestmark = pytest.mark.skipif(not STATM.exists(), reason="needs /proc")
PAGE = 4096
# 40 bytes a call would show; what the allocators keep back is less than this.
ALLOWED = 192 * 1024


def resident() -> int:
    gc.collect()
    return int(STATM.read_text().split()[1]) * PAGE


def step_token_logprob(x, y, target, column, inplace):
    logprob, entropy = token_logprob(
        x * 1,
        target,
        temperature=column,
        softcap=5.0,
        return_entropy=True,
        inplace_backward=inplace,
    )
    return logprob.sum() + entropy.sum()


def step_sequential_kl(x, y, target, column, inplace):
    result = sequential_kl(
        x * 1,
        y,
        target,
        direction="both",
        temperature=column,
        mask=column > 0,
        return_entropy=True,
        inplace_backward=inplace,
    )
    return sum(value.sum() for value in result)


@pytest.mark.parametrize("step", [step_token_logprob, step_sequential_kl])
@pytest.mark.parametrize("inplace", [False, True])
def test_forward_and_backward(backend, step, inplace):
    calls = 500 if backend.name == "emulated" else 5_000
    x = torch.randn(2, 7, device=backend.device, requires_grad=True)
    y = torch.randn(2, 7, device=backend.device)
    target = torch.tensor([1, -100], device=backend.device)
    column = torch.ones(2, device=backend.device)

    def run(times: int) -> None:
        for _ in range(times):
            torch.autograd.grad(step(x, y, target, column, inplace), x)

    run(calls // 5)
    before = resident()
    run(calls)
    assert resident() - before <= ALLOWED


@pytest.mark.parametrize("step", [step_token_logprob, step_sequential_kl])
def test_errors_leak_nothing_either(backend, step):
    """A refusal comes before any allocation, and gives back what it was handed."""
    if not backend.checks_values:
        pytest.skip("labels out of range do not raise here")
    x, y = torch.randn(2, 2, 7)
    target, column = torch.tensor([1, 7]), torch.ones(2)

    def run(times: int) -> None:
        for _ in range(times):
            with pytest.raises(RuntimeError, match="target"):
                step(x, y, target, column, False)

    run(500)
    before = resident()
    run(5_000)
    assert resident() - before <= ALLOWED
