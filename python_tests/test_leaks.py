"""Memory stays where it is over many calls of every operator."""

import gc
from pathlib import Path

import pytest
import torch

from tokcore.ops import sequential_kl, token_logprob

STATM = Path("/proc/self/statm")
pytestmark = pytest.mark.skipif(not STATM.exists(), reason="needs /proc")
PAGE = 4096
# 40 bytes a call would show over 5,000 calls (400 over the 500 emulated ones).
ALLOWED = 192 * 1024


def resident() -> int:
    gc.collect()
    return int(STATM.read_text().split()[1]) * PAGE


def growth(run, calls: int) -> int:
    """What most batches of calls add. One batch may stand out either way: memory freed by earlier
    tests hides a leak in it, or an allocator takes another chunk for itself.
    """
    run(calls // 5)
    grown = []
    for _ in range(3):
        before = resident()
        run(calls)
        grown.append(resident() - before)
    return sorted(grown)[1]


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

    assert growth(run, calls) <= ALLOWED


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

    assert growth(run, 5_000) <= ALLOWED


def test_a_leak_of_48_bytes_a_call_would_show():
    kept = []

    def run(times: int) -> None:
        kept.extend(bytes(15) for _ in range(times))  # 48 bytes each, without the list's own 8

    assert growth(run, 5_000) > ALLOWED
