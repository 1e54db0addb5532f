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
from tokcore.ops import (
    PolicyLoss,
    dtw,
    edit_align,
    group_advantage,
    kv_append,
    kv_compact,
    monotonic_align,
    monotonic_search,
    policy_loss,
    prompt_window_scores,
    sequential_kl,
    sparse_decode_attention,
    sparse_window_attention,
    token_logprob,
    window_scores_update,
    window_select,
)

STATM = Path("/proc/self/statm")
pytestmark = pytest.mark.skipif(not STATM.exists(), reason="needs /proc")
PAGE = 4096
# 13 bytes a call would show over 5,000 calls, 66 over the 1,000 of the operators that take long in
# Python, ten times that in emulation, which gets a tenth of the calls.
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


RULES = PolicyLoss(entropy_coefficient=0.1, top_entropy=0.5, off_policy_threshold=1.0)


def step_policy_loss(x, y, target, column, inplace):
    ends = torch.tensor([0, 5, int(target[1] == 7) * 7 + 7], device=x.device)
    tokens = (x * 1)[0]
    loss, metrics = policy_loss(
        tokens, column, RULES, old_logprob=y[0], entropy=tokens, mask=y[1] < 1, cu_seqlens=ends
    )
    return loss + metrics["kl"]


def step_group_advantage(x, y, target, column, inplace):
    rewards = torch.where(target == 7, torch.inf, column)
    result = group_advantage(
        rewards, target.flip(0), center="best", scale="batch_std", return_statistics=True
    )
    return sum(value.sum() for value in result)


def align(operator):
    """A target of 7 asks for more rows than there are."""

    def step(x, y, target, column, inplace):
        result = operator(y.unsqueeze(0).repeat(2, 1, 1), target.clamp(0, 7))
        return sum(value.sum() for value in result)

    return step


def step_edit_align(x, y, target, column, inplace):
    ids = (x * 10).long()
    result = edit_align(ids, ids[:, :6], reference_lengths=target.clamp(min=0))
    return sum(value.sum() for value in result)


def step_segment_attention(x, y, target, column, inplace):
    ids = target.new_zeros(1, 7 + int(target[1] == 7))
    rows, values = (x * 1).view(1, 2, 7, 1), y.view(1, 2, 7, 1)
    output, constraint, _, _ = _library.native().segment_attention(
        rows, values, values, ids, ids, ids, ids, 1.0, True
    )
    return output.sum() + constraint.sum()


def cache_of(x, y):
    """Of one list with 7 slots: keys and values, three integers of each, a ring, and no rows."""
    key, value = y.view(2, 1, 1, 7, 1).clone()
    position, last, score = torch.arange(21, device=y.device).view(3, 1, 1, 7)
    return key, value, position.int(), last.int(), score.clone(), y.view(1, 1, 2, 7).clone()


def step_window_select(x, y, target, column, inplace):
    """A target of 7 does not fit."""
    *_, score, _ = cache_of(x, y)
    count, top = target[:1].int(), target[1:].clamp(min=0).int()
    result = window_select(score, count.unsqueeze(1), count, top, size=3)
    return sum(value.sum() for value in result)


def step_window_scores_update(x, y, target, column, inplace):
    """A window of 7 is more than the ring has rows."""
    _, _, index, last, score, ring = cache_of(x, y)
    one, window = target[:1].int(), target[1:].clamp(min=0).int()
    rows = ring[:, :, :1].contiguous()
    window_scores_update(score, ring, last, one * 1, rows, index, one.unsqueeze(1), one, window)
    return score.sum()


def step_kv_append(x, y, target, column, inplace):
    """Seven tokens are more than there are."""
    key, value, position, last, _, _ = cache_of(x, y)
    one, valid = target[:1].int(), target[1:].clamp(min=0).int()
    new = y[:, :2].view(2, 1, 1, 2, 1)
    kv_append(key, value, position, last, one.view(1, 1).clone(), *new, one * 100, valid)
    return key.sum()


def step_kv_compact(x, y, target, column, inplace):
    """Less than no local slots."""
    key, value, position, last, score, ring = cache_of(x, y)
    count, since = 7 * target[:1].int().view(1, 1), target[:1].int()
    local = torch.where(target[1:] == 7, -1, 2).int()
    kv_compact(key, value, position, score, ring, last, count, since * 10, local)
    return key.sum()


def step_sparse_window_attention(x, y, target, column, inplace):
    """Of a label of 7 a list that does not rise."""
    index = target.clamp(0, 6).flip(0).int() if target[1] == 7 else target[:1].int()
    rows, values = (x * 1).view(1, 2, 7, 1), y.view(1, 2, 7, 1)
    return sparse_window_attention(rows, values, values, 2, index.view(1, 1, -1)).sum()


def step_sparse_decode_attention(x, y, target, column, inplace):
    rows, cache = x.detach().view(2, 1, 7), y.view(2, 1, 1, 7)
    count = target.view(2, 1).clamp(min=0).int()
    index = torch.zeros(2, 1, 1, dtype=torch.int32, device=x.device)
    output, weights, _ = sparse_decode_attention(rows, cache, cache, index, count)
    return output.sum() + weights.sum()


def step_prompt_window_scores(x, y, target, column, inplace):
    count = target.view(2, 1).clamp(min=0).int()
    return prompt_window_scores(x.detach().view(2, 1, 1, 7), y.view(2, 1, 1, 7), count).sum()


STEPS = {
    "token_logprob": step_token_logprob,
    "sequential_kl": step_sequential_kl,
    "policy_loss": step_policy_loss,
    "group_advantage": step_group_advantage,
    "dtw": align(dtw),
    "monotonic_align": align(monotonic_align),
    "monotonic_search": align(monotonic_search),
    "segment_attention": step_segment_attention,
    "sparse_window_attention": step_sparse_window_attention,
    "sparse_decode_attention": step_sparse_decode_attention,
    "prompt_window_scores": step_prompt_window_scores,
    "edit_align": step_edit_align,
    "window_select": step_window_select,
    "window_scores_update": step_window_scores_update,
    "kv_append": step_kv_append,
    "kv_compact": step_kv_compact,
}
INPLACE = {"token_logprob", "sequential_kl"}
# What each refuses of a label of 7: itself, row ends beyond the tokens, an infinite reward, more
# ids than queries, a list that does not rise, more slots than there are, a length beyond the
# sequence, more rows than there are, and of the cache what its steps say.
REFUSED = {
    "policy_loss": "cu_seqlens must rise",
    "group_advantage": "rewards must be finite",
    "segment_attention": "query_segments must have shape",
    "sparse_window_attention": "global_index must hold ascending",
    "sparse_decode_attention": r"count must lie in \[0, 1\], got 7",
    "prompt_window_scores": r"count must lie in \[0, 1\], got 7",
    "edit_align": r"reference_lengths must lie in \[0, 6\]",
    "window_select": "size must hold local",
    "window_scores_update": r"window must lie in \[0, R = 2\], got 7",
    "kv_append": r"valid must lie in \[0, Q = 2\], got 7",
    "kv_compact": "local must be at least 0, got -1",
}
REFUSED |= dict.fromkeys(("dtw", "monotonic_align", "monotonic_search"), "row_lengths and column")


def forward_and_backward(device, step, inplace, calls):
    x = torch.randn(2, 7, device=device, requires_grad=True)
    y = torch.randn(2, 7, device=device)
    target, column = torch.tensor([1, -100], device=device), torch.ones(2, device=device)

    def run(times: int) -> None:
        for _ in range(times):
            result = step(x, y, target, column, inplace)
            if result.requires_grad:
                torch.autograd.grad(result, x)

    return growth(run, calls)


def errors(device, step, text, calls):
    """A refusal gives back what it was handed, and what it had allocated."""
    x, y = torch.randn(2, 2, 7)
    target, column = torch.tensor([1, 7]), torch.ones(2)

    def run(times: int) -> None:
        for _ in range(times):
            with pytest.raises(RuntimeError, match=text):
                step(x, y, target, column, False)

    return growth(run, calls)


def planted(calls):
    kept = []

    def run(times: int) -> None:
        kept.extend(bytes(15) for _ in range(times))  # 48 bytes each, without the list's own 8

    return growth(run, calls)


def measure(backend: str) -> dict[str, int]:
    device = "cuda" if backend == "cuda" else "cpu"
    grown = {}
    with _library.use("emulated" if backend == "emulated" else "native"):
        for name, step in STEPS.items():
            calls = 5_000 if name in INPLACE else 1_000
            calls //= 10 if backend == "emulated" else 1
            grown[name] = forward_and_backward(device, step, False, calls)
            if name in INPLACE:
                grown[f"{name} in place"] = forward_and_backward(device, step, True, calls)
            if backend == "cpu":  # elsewhere wrong values do not raise
                text = REFUSED.get(name, "target")
                grown[f"{name} errors"] = errors(device, step, text, calls)
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
