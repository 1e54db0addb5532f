"""Memory stays where it is over many calls of every operator.

Measured in a process of its own: after other tests the heap holds so much freed memory that a leak
would vanish in it, as the planted one shows.
"""

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tokcore import _library
from tokcore.ops import sequential_kl, token_logprob

STATM = Path("/proc/self/statm")
pytestmark = pytest.mark.skipif(not STATM.exists(), reason="needs /proc")
PAGE = 4096
# 13 bytes a call would show over 5,000 calls (130 over the 500 emulated ones).
ALLOWED = 64 * 1024


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


STEPS = {"token_logprob": step_token_logprob, "sequential_kl": step_sequential_kl}


def forward_and_backward(device, step, inplace, calls):
    x = torch.randn(2, 7, device=device, requires_grad=True)
    y = torch.randn(2, 7, device=device)
    target, column = torch.tensor([1, -100], device=device), torch.ones(2, device=device)

    def run(times: int) -> None:
        for _ in range(times):
            torch.autograd.grad(step(x, y, target, column, inplace), x)

    return growth(run, calls)


def errors(device, step, calls):
    """A refusal comes before any allocation, and gives back what it was handed."""
    x, y = torch.randn(2, 2, 7)
    target, column = torch.tensor([1, 7]), torch.ones(2)

    def run(times: int) -> None:
        for _ in range(times):
            with pytest.raises(RuntimeError, match="target"):
                step(x, y, target, column, False)

    return growth(run, calls)


def planted(calls):
    kept = []

    def run(times: int) -> None:
        kept.extend(bytes(15) for _ in range(times))  # 48 bytes each, without the list's own 8

    return growth(run, calls)


def measure(backend: str) -> dict[str, int]:
    device = "cuda" if backend == "cuda" else "cpu"
    calls = 500 if backend == "emulated" else 5_000
    grown = {}
    with _library.use("emulated" if backend == "emulated" else "native"):
        for name, step in STEPS.items():
            grown[name] = forward_and_backward(device, step, False, calls)
            grown[f"{name} in place"] = forward_and_backward(device, step, True, calls)
            if backend == "cpu":  # elsewhere a label out of range does not raise
                grown[f"{name} errors"] = errors(device, step, calls)
    grown["planted"] = planted(5_000)
    return grown


def test_memory_stays(backend):
    command = [sys.executable, __file__, backend.name]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    grown = json.loads(result.stdout)
    assert grown.pop("planted") > ALLOWED, "a leak of 48 bytes a call would not show"
    assert {case: size for case, size in grown.items() if size > ALLOWED} == {}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
