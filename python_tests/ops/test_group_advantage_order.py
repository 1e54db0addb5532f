"""The order of rows, ids, threads and blocks changes no bit."""

import pytest
import torch

from tokcore import _library
from tokcore.ops import group_advantage


@pytest.mark.parametrize("identities", ["small", "wide", "extreme", "int32"])
def test_any_order_of_the_groups_gives_the_same_bits(backend, identities):
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(6, (400,), generator=generator)
    index[:90] = 3  # one of them beyond a thread of the CUDA kernel
    known = {
        "small": torch.tensor([3, -2, 0, 5, 1, 4]),
        "wide": torch.tensor([10**12, -5, 7, 10**15, -(10**17), 2]),
        "extreme": torch.tensor([2**63 - 1, -(2**63), 0, -1, 2**62, 1]),
        "int32": torch.tensor([2**31 - 1, -(2**31), 0, 7, -1, 1], dtype=torch.int32),
    }[identities]
    group = known[index].to(backend.device)
    rewards = torch.randn(400, generator=generator).to(backend.device)
    rewards[5] = float("nan")
    order = torch.sort(group, stable=True).indices
    for options in ({}, {"center": "leave_one_out", "scale": "batch_std"}, {"center": "best"}):
        got = group_advantage(rewards, group, **options)
        want = group_advantage(rewards[order], group[order], contiguous=True, **options)
        assert torch.equal(got[order], want)
        assert torch.equal(group_advantage(rewards[order], group[order], **options), want)


def test_many_scattered_groups(backend):
    """Enough for the CPU kernel to bring them together in parts."""
    rows = 2_000 if backend.name == "emulated" else 120_000
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(rows, generator=generator).to(backend.device)
    for identities in (rows // 8, 3, 2**40):
        group = torch.randint(identities, (rows,), generator=generator)
        if identities == 2**40:
            group = group[torch.randint(rows // 8, (rows,), generator=generator)]
        group = group.to(backend.device)
        order = torch.sort(group, stable=True).indices
        got = group_advantage(rewards, group)
        want = group_advantage(rewards[order], group[order], contiguous=True)
        assert torch.equal(got[order], want)


def test_runs_of_one_id_are_groups_of_their_own_where_that_is_asked_for(backend):
    rewards, group = torch.tensor([1.0, 3.0, 5.0, 9.0]), torch.tensor([4, 4, 2, 4])
    rewards, group = rewards.to(backend.device), group.to(backend.device)
    got = group_advantage(rewards, group, scale="none", contiguous=True)
    assert got.tolist() == [-1.0, 1.0, 0.0, 0.0]


def test_a_size_is_ids_in_a_row(backend):
    rewards = torch.randn(12, device=backend.device)
    group = torch.arange(12, device=backend.device) // 4
    assert torch.equal(group_advantage(rewards, 4), group_advantage(rewards, group))
    wide = torch.randn(12, 2, device=backend.device)[:, 1]  # strides are no matter
    assert torch.equal(group_advantage(wide, 4), group_advantage(wide.clone(), 4))


def test_threads_do_not_change_the_bits(backend):
    if backend.name != "cpu":
        pytest.skip("the threads of the CPU kernel")
    threads = torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(60_000, generator=generator)
    group = torch.randint(300, (60_000,), generator=generator)
    try:
        want = group_advantage(rewards, group)
        by_size = group_advantage(rewards, 30_000)
        for count in (1, 2, 5, 8):
            torch.set_num_threads(count)
            assert torch.equal(group_advantage(rewards, group), want)
            assert torch.equal(group_advantage(rewards, 30_000), by_size)
    finally:
        torch.set_num_threads(threads)


def test_any_order_of_blocks_and_threads(backend):
    if backend.name != "emulated":
        pytest.skip("the emulation's order is what a seed can change")
    rewards = torch.randn(500)
    group = torch.tensor([1] * 300 + [2] * 5 + [3] * 195)
    want = group_advantage(rewards, group, center="best", return_statistics=True)
    for seed in range(6):
        with _library.use("emulated", seed=seed):
            got = group_advantage(rewards, group, center="best", return_statistics=True)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
