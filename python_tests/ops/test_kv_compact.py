"""kv_compact by hand and against the definition: what stays, what is left behind, nothing else."""

from importlib import import_module

import numpy as np
import pytest
import torch
from kv_states import assert_states, filled, int32, new_state

_reference = import_module("tokcore.ops.kv_compact")._reference


def compact(backend, state, since, local, sinks=0, **options):
    state.compact(
        int32(since, backend.device), int32(local, backend.device), sinks=sinks, **options
    )


def by_hand(backend):
    state = new_state(1, 1, 1, 6, 1, 2, device=backend.device)
    state.key.copy_(torch.arange(6.0).view(1, 1, 6, 1))
    state.value.copy_(-torch.arange(6.0).view(1, 1, 6, 1))
    state.position.copy_(int32([[[2, 3, 5, 7, 11, -1]]]))
    state.score.copy_(torch.tensor([[[10, 20, 30, 40, 50, 0]]]))
    state.last_selected.copy_(int32([[[4, 9, 8, -1, 3, -1]]]))
    state.ring.copy_(torch.arange(12.0).view(1, 1, 2, 6))
    state.count.fill_(5)
    return state


def test_by_hand(backend):
    state = by_hand(backend)
    compact(backend, state, [8], [1])
    assert state.count.tolist() == [[3]]
    assert state.key[0, 0, :, 0].tolist() == [1, 2, 4, 3, 4, 5]  # free ones as they were
    assert state.value[0, 0, :3, 0].tolist() == [-1, -2, -4]
    assert state.position[0, 0].tolist() == [3, 5, 11, -1, -1, -1]
    assert state.score[0, 0].tolist() == [20, 30, 50, 0, 0, 0]
    assert state.last_selected[0, 0].tolist() == [9, 8, 3, -1, -1, -1]
    assert state.ring[0, 0].tolist() == [[1, 2, 4, 0, 0, 5], [7, 8, 10, 0, 0, 11]]


@pytest.mark.parametrize(
    ("since", "local", "sinks", "want"),
    [
        (100, 0, 0, []),
        (100, 2, 0, [7, 11]),
        (100, 0, 2, [2, 3]),
        (100, 1, 1, [2, 11]),
        (100, 9, 0, [2, 3, 5, 7, 11]),
        (100, 0, 9, [2, 3, 5, 7, 11]),
        (9, 0, 0, [3]),
        (4, 0, 0, [2, 3, 5]),
        (-1, 0, 0, [2, 3, 5, 7, 11]),
        (-(2**31), 0, 0, [2, 3, 5, 7, 11]),
        (2**31 - 1, 1, 0, [11]),
    ],
)
def test_what_stays(backend, since, local, sinks, want):
    state = by_hand(backend)
    compact(backend, state, [since], [local], sinks)
    assert state.position[0, 0].tolist() == want + [-1] * (6 - len(want))
    assert int(state.count) == len(want)


def test_all_stays_as_it_is(backend):
    state = filled(new_state(2, 3, 3, 40, 5, 2, device=backend.device))
    want = state.clone()
    compact(backend, state, [-1, 7], [0, 40])
    assert_states(state, want)


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 3, 72])
@pytest.mark.parametrize(("lists", "heads"), [(1, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("slots", [1, 33, 300])
def test_against_the_reference(backend, dtype, dim, lists, heads, slots):
    batch = 2
    groups = 0 if dtype != torch.uint8 else 3 if dim % 3 == 0 else 1
    state = new_state(batch, lists, heads, slots, dim, 3, dtype=dtype, groups=groups)
    got = filled(state).to(backend.device)
    want = got.clone()
    for since, local, sinks in (([4, 0], [2, 0], 0), ([6, 7], [0, 5], 2), ([9, 9], [1, 3], 1)):
        compact(backend, got, since, local, sinks)
        compact(backend, want, since, local, sinks, by=_reference)
        assert_states(got, want)


@pytest.mark.parametrize("kept", ["first", "last", "every second", "runs"])
def test_long_ways_and_short_ones(backend, kept):
    """Slots that move by one, by many, or not at all, over more than a block of threads at once."""
    slots = 2100
    backend.skip_above(slots * 12)
    slot = torch.arange(slots)
    stays = {
        "first": slot < 1500,
        "last": slot >= 900,
        "every second": slot % 2 == 1,
        "runs": slot // 37 % 3 != 1,
    }[kept]
    state = new_state(1, 1, 1, slots, 8, 1)
    state.key.copy_(torch.randn(state.key.shape, generator=torch.Generator().manual_seed(0)))
    state.value.copy_(-state.key)
    state.position.copy_(slot * 3)
    state.score.copy_(slot)
    state.ring.copy_(slot)
    state.last_selected.copy_(stays.int())
    state.count.fill_(slots)
    got = state.clone().to(backend.device)
    compact(backend, got, [1], [0])
    n = int(stays.sum())
    assert torch.equal(got.key[0, 0, :n].cpu(), state.key[0, 0, stays])
    assert torch.equal(got.value[0, 0, :n].cpu(), state.value[0, 0, stays])
    assert torch.equal(got.position[0, 0, :n].cpu(), 3 * slot[stays].int())
    assert torch.equal(got.score[0, 0, :n].cpu(), slot[stays])
    assert torch.equal(got.ring[0, 0, 0, :n].cpu(), slot[stays].float())
    assert got.position[0, 0, n:].eq(-1).all()
    assert got.score[0, 0, n:].eq(0).all()


@pytest.mark.parametrize("shape", [(0, 1, 1, 4), (2, 1, 2, 0)])
def test_empty_states(backend, shape):
    state = new_state(*shape, 3, 2, device=backend.device)
    want = state.clone()
    compact(backend, state, [0] * shape[0], [1] * shape[0])
    assert_states(state, want)


def test_many_compactions(backend):
    """The same as one with the last of the conditions, as each lets through what the next does."""
    once = filled(new_state(2, 2, 2, 50, 4, 2, device=backend.device))
    often = once.clone()
    for since in range(8):
        compact(backend, often, [since, since], [3, 3], 1)
    compact(backend, once, [7, 7], [3, 3], 1)
    n = np.asarray(once.count.cpu())
    assert torch.equal(often.position, once.position)
    assert torch.equal(often.score, once.score)
    for b, h in np.ndindex(2, 2):
        assert torch.equal(often.key[b, h, : n[b, h]], once.key[b, h, : n[b, h]])
