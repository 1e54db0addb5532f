"""kv_append by hand, left padding, quantisation against golden numbers and against float64."""

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from kv_states import assert_states, filled, int32, new_state

_reference = import_module("tokcore.ops.kv_append")._reference
GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "alisa_int8_kv.npz")
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
nan, inf = float("nan"), float("inf")


def test_by_hand(backend):
    state = new_state(2, 1, 1, 4, 2, 0, device=backend.device)
    tokens = torch.tensor(
        [[[[nan, nan], [1, 2], [3, 4]]], [[[5, 6], [7, 8], [9, 10]]]], device=backend.device
    )
    state.append(tokens, -tokens, *(int32(x, backend.device) for x in ([0, 0], [2, 3])))
    assert state.key[0, 0].tolist() == [[1, 2], [3, 4], [77, 77], [77, 77]]
    assert state.value[1, 0].tolist() == [[-5, -6], [-7, -8], [-9, -10], [77, 77]]
    assert state.position.tolist() == [[[0, 1, -1, -1]], [[0, 1, 2, -1]]]
    assert state.count.tolist() == [[2], [3]]
    state.append(tokens, tokens, *(int32(x, backend.device) for x in ([40, 0], [1, 0])))
    assert state.key[0, 0].tolist() == [[1, 2], [3, 4], [3, 4], [77, 77]]
    assert state.position.tolist() == [[[0, 1, 40, -1]], [[0, 1, 2, -1]]]
    assert state.last_selected.eq(-1).all()
    assert state.count.tolist() == [[3], [3]]


def test_heads_with_slots_of_their_own(backend):
    """After an eviction that took different slots from each head."""
    state = new_state(1, 2, 2, 4, 1, 0, device=backend.device)
    state.count.copy_(int32([[3, 1]]))
    state.position.copy_(int32([[[0, 3, 5, -1], [4, -1, -1, -1]]]))
    tokens = torch.tensor([[[[1.0]], [[2.0]]]], device=backend.device)
    state.append(tokens, -tokens, *(int32(x, backend.device) for x in ([6], [1])))
    assert state.key[0, :, :, 0].tolist() == [[77, 77, 77, 1], [77, 2, 77, 77]]
    assert state.value[0, :, :, 0].tolist() == [[77, 77, 77, -1], [77, -2, 77, 77]]
    assert state.position[0].tolist() == [[0, 3, 5, 6], [4, 6, -1, -1]]
    assert state.count.tolist() == [[4, 2]]


def test_a_slot_is_new_whatever_stood_there(backend):
    state = filled(new_state(1, 1, 1, 3, 2, 0, device=backend.device))
    state.count.fill_(0)
    state.append(
        *torch.ones(2, 1, 1, 2, 2, device=backend.device), *int32([[7], [2]], backend.device)
    )
    assert state.last_selected[0, 0, :2].tolist() == [-1, -1]
    assert state.position[0, 0, :2].tolist() == [7, 8]


@pytest.mark.parametrize("dtype", [*FLOATS, torch.uint8], ids=str)
@pytest.mark.parametrize("dim", [1, 5, 72])
@pytest.mark.parametrize(("lists", "heads"), [(1, 1), (1, 3), (3, 3)])
@pytest.mark.parametrize("queries", [0, 1, 35])
def test_against_the_reference(backend, dtype, dim, lists, heads, queries):
    batch, slots = 3, 80
    groups = next(n for n in (3, 2, 1) if dim % n == 0) if dtype == torch.uint8 else 0
    state = new_state(
        batch, lists, heads, slots, dim, 2, dtype=dtype, groups=groups, device=backend.device
    )
    got = filled(state)
    got.count.copy_(torch.arange(batch * lists).view(batch, lists) % 10)
    generator = torch.Generator().manual_seed(dim)
    shape = (2, batch, heads, queries, dim)
    tokens = torch.randn(shape, generator=generator, dtype=torch.float64)
    if dtype == torch.uint8:
        tokens[0] *= 1e-3
        tokens[1] += 100
    for from_dtype in FLOATS if dtype == torch.uint8 else [dtype]:
        if dtype == torch.uint8 and from_dtype == torch.float64:
            continue
        new = tokens.to(from_dtype).to(backend.device)
        valid = [queries, queries // 2, 0]
        numbers = [int32(x, backend.device) for x in ([1000, 2000, 3000], valid)]
        mine, want = got.clone(), got.clone()
        mine.append(*new, *numbers)
        want.append(*new, *numbers, by=_reference)
        assert_states(mine, want)


def test_slices_are_copied_from(backend):
    """A projection's (B, Q, H, D), transposed; and state tensors as slices of one."""
    whole = torch.zeros(2, 2, 2, 6, 3, device=backend.device)
    state = new_state(2, 1, 2, 6, 3, 0, device=backend.device)
    state.key, state.value = whole.unbind()
    tokens = torch.randn(2, 2, 4, 2, 3, device=backend.device).transpose(2, 3)
    state.append(*tokens, *(int32(x, backend.device) for x in ([0, 0], [4, 4])))
    assert torch.equal(whole[..., :4, :], tokens)


@pytest.mark.parametrize("lists", [1, 2])
def test_quantisation_golden(backend, lists):
    """Each token a group: the very bits, of what float64 gives."""
    x = torch.from_numpy(GOLDEN["x"]).float()
    assert np.array_equal(x.double().numpy(), GOLDEN["x"])
    batch, heads, tokens, dim = x.shape
    state = new_state(batch, lists, heads, tokens, dim, 0, groups=1, device=backend.device)
    x = x.to(backend.device)
    state.append(x, x, *(int32(n, backend.device) for n in ([0], [tokens])))
    assert np.array_equal(state.key.cpu().numpy(), GOLDEN["token_q"])
    scale, offset = (value.numpy() for value in state.key_quantization.cpu().unbind(-1))
    assert np.array_equal(scale, GOLDEN["token_scale"].astype(np.float32))
    want = -GOLDEN["token_scale"] * GOLDEN["token_zero"]
    assert np.array_equal(offset, want.astype(np.float32))
    assert torch.equal(state.value, state.key)
    assert torch.equal(state.value_quantization, state.key_quantization)


def quantized(backend, *groups, dtype=torch.float32):
    """q, scale and offset of one token of equal groups."""
    token = torch.tensor([x for group in groups for x in group], dtype=dtype)
    token = token.view(1, 1, 1, -1).to(backend.device)
    state = new_state(1, 1, 1, 1, token.numel(), 0, groups=len(groups), device=backend.device)
    state.append(token, token, *(int32([n], backend.device) for n in (0, 1)))
    q = state.key.view(len(groups), -1).tolist()
    assert torch.equal(state.key, state.value)
    return q, *(value.tolist() for value in state.key_quantization.view(-1, 2).unbind(-1))


def test_quantisation_by_hand(backend):
    q, scale, offset = quantized(backend, [0, 51, 255], [-255, 0, 255], [1, 86, 256])
    # -127.5 rounds up to -127, and 127.5 to 128: the zero is 128
    assert q == [[0, 51, 255], [1, 128, 255], [0, 85, 255]]
    assert (scale, offset) == ([1, 2, 1], [0, -256, 1])


def test_constant_groups(backend):
    q, scale, offset = quantized(backend, [3.5, 3.5], [0, 0], [-2, -2], [1, 2])
    assert q == [[0, 0], [0, 0], [0, 0], [0, 255]]
    assert scale[:3] == [0, 0, 0]
    assert offset[:3] == [3.5, 0, -2]


def test_a_group_that_is_not_finite(backend):
    """NaN comes back as NaN, and the other groups are as they were."""
    q, scale, offset = quantized(backend, [1, nan], [inf, 0], [-inf, inf], [0, 255])
    assert q == [[0, 0], [0, 0], [0, 0], [0, 255]]
    assert [np.isnan(x) for x in scale] == [True, True, True, False]
    assert [np.isnan(x) for x in offset] == [True, True, True, False]


def test_extreme_ranges(backend):
    """From the ends of float32, far from 0, and between its smallest numbers."""
    most, least = torch.finfo(torch.float32).max, 2.0**-149
    near = float(np.nextafter(np.float32(1000), np.float32(2000)))
    groups = [[-most / 2, most / 2], [1000, near], [0, least], [most, most / 2]]
    q, scale, offset = quantized(backend, *groups)
    for x, codes, step, start in zip(groups, q, scale, offset, strict=True):
        assert min(codes) >= 0
        assert np.isfinite(step)
        assert np.isfinite(start)
        back = [step * code + start for code in codes]
        # The offset is a multiple of the scale, of which it may be half away, and rounds once.
        bound = 0.5 * step + 2.0**-23 * max(map(abs, x)) + 256 * 2.0**-149
        for a, b in zip(back, x, strict=True):
            assert abs(a - b) <= bound * 1.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_quantised_entries_are_half_a_step_away(backend, dtype):
    generator = torch.Generator().manual_seed(3)
    token = torch.randn(1, 2, 9, 128, generator=generator).to(dtype).to(backend.device)
    state = new_state(1, 1, 2, 9, 128, 0, groups=2, device=backend.device)
    state.append(token, token, *(int32(n, backend.device) for n in ([0], [9])))
    scale, offset = state.key_quantization.double().unbind(-1)
    back = state.key.double().unflatten(-1, (2, -1)) * scale.unsqueeze(-1) + offset.unsqueeze(-1)
    x = token.double().unflatten(-1, (2, -1))
    bound = 0.5 * scale.unsqueeze(-1) + 256 * 2**-23 * x.abs().amax(-1, keepdim=True)
    assert ((back - x).abs() <= bound).all()
