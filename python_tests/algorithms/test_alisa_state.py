"""The state of a layer: what is dropped changes nothing, and batches are rows by themselves."""

import copy
import math

import numpy as np
import pytest
import torch

from tokcore.algorithms.alisa import LayerState, alisa, dense, h2o, state

HEADS, KV_HEADS, DIM = 4, 2, 8


def tokens(count, batch=1, seed=0, dtype=torch.float64, peak=2.0):
    """q (B, Hq, T, D), k, v (B, Hkv, T, D); peaked, so that a few tokens take most of a row."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, h, count, DIM) for h in (HEADS, KV_HEADS, KV_HEADS)]
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return (q * peak).to(dtype), (k * peak).to(dtype), v.to(dtype)


def feed(layer, qkv, prompt, valid=None):
    """A prompt and the rest step by step: outputs (B, Hq, D), positions read of each list."""
    outputs, lists = [layer.attend(*(x[:, :, :prompt] for x in qkv), valid=valid)], []
    for t in range(prompt, qkv[0].shape[2]):
        outputs.append(layer.attend(*(x[:, :, t : t + 1] for x in qkv)))
        lists.append(positions(layer))
    return torch.cat(outputs, 2), lists


def positions(layer):
    return [
        [
            layer.position[b, s, layer.index[b, s, :n].long()].tolist()
            for s, n in enumerate(selected.tolist())
        ]
        for b, selected in enumerate(layer.selected)
    ]


# ---- the reference ------------------------------------------------------------------------------


def reference(q, k, v, prompt, ratio, window, shared):
    """Algorithm 1 for one sequence in float64, with the full history of weights."""
    q, k, v = (x[0].numpy() for x in (q, k, v))
    heads, count, dim = q.shape
    group = heads // k.shape[0]
    lists = 1 if shared else k.shape[0]
    history = np.zeros((heads, count, count))
    outputs, kept = np.zeros((heads, count, dim)), []
    for t in range(count):
        half = max(1, math.floor((t + 1) * ratio / 2 + 0.5))
        rows = half if window is None else window
        chosen = []
        for s in range(lists):
            members = range(heads) if shared else range(s * group, (s + 1) * group)
            if t < prompt or 2 * half >= t + 1:
                chosen.append(list(range(t + 1)))
                continue
            score = history[list(members), max(0, t - rows) : t].sum((0, 1))[: t - half + 1]
            top = np.argsort(-score, kind="stable")[:half]
            chosen.append(sorted(top.tolist()) + list(range(t - half + 1, t + 1)))
        for h in range(heads):
            i = chosen[0 if shared else h // group]
            logits = k[h // group, i] @ q[h, t] / math.sqrt(dim)
            weights = np.exp(logits - logits.max())
            history[h, t, i] = weights / weights.sum()
            outputs[h, t] = history[h, t, i] @ v[h // group, i]
        kept.append(chosen)
    return outputs, kept[prompt:]


@pytest.mark.parametrize("evict", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("ratio", "window"), [(0.2, None), (0.2, 4), (0.5, 8), (0.9, 6), (1.0, 4)])
def test_equals_the_reference(ratio, window, shared, evict):
    qkv = tokens(90, seed=3, peak=1.0)
    want, kept = reference(*qkv, 24, ratio, window, shared)
    layer = LayerState(alisa(ratio, window=window), shared=shared, evict=evict)
    out, lists = feed(layer, qkv, 24)
    assert [one[0] for one in lists] == kept
    np.testing.assert_allclose(out[0].numpy(), want, rtol=0, atol=1e-13)


# ---- eviction -----------------------------------------------------------------------------------

KNOBS = {
    "growing": alisa(0.2, window=None),
    "window 1": alisa(0.5, window=1),
    "window 4": alisa(0.2, window=4),
    "window 64": alisa(0.2),
    "ratio .9": alisa(0.9, window=2),
    "reselect": alisa(0.3, window=4, reselect_every=5),
    "sinks": alisa(0.2, window=8, sinks=3),
    "mostly local": alisa(0.4, window=8, local_fraction=0.8),
    "mostly global": alisa(0.7, window=2, local_fraction=0.3),
    "budget": alisa(budget=12, window=4),
}


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("knobs", KNOBS)
def test_what_is_dropped_changes_nothing(knobs, shared, monkeypatch):
    """Bit for bit, whenever it is dropped; peaked weights, of which many are 0 in 2 ** -40."""
    qkv = tokens(110, batch=2, seed=5, peak=6.0)
    runs = []
    for evict, slack in ((False, 64), (True, 64), (True, 7)):
        monkeypatch.setattr(state, "SLACK", slack)
        layer = LayerState(KNOBS[knobs], shared=shared, evict=evict)
        runs.append((*feed(layer, qkv, 30), layer))
    for out, lists, layer in runs[1:]:
        assert lists == runs[0][1]
        assert torch.equal(out, runs[0][0])
        assert int(layer.count.max()) < 110
    assert int(runs[0][2].count.min()) == 110


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("int8", [False, True])
def test_what_is_dropped_changes_nothing_in_other_types(dtype, int8):
    qkv = tokens(100, seed=6, dtype=dtype)
    policy = alisa(0.2, window=8)
    layers = [LayerState(policy, evict=evict, int8=int8) for evict in (False, True)]
    (want, kept), (out, lists) = (feed(layer, qkv, 30) for layer in layers)
    assert lists == kept
    assert torch.equal(out[:, :, 30:], want[:, :, 30:])
    assert out.dtype == dtype
    assert layers[1].key.dtype == (torch.uint8 if int8 else dtype)


def test_slots_of_drifting_queries_stay_bounded():
    """Queries whose picks keep changing: 2k + window + slack slots hold all that may be read."""
    steps, window = 400, 16
    generator = torch.Generator().manual_seed(1)
    q, k, v = tokens(64 + steps, seed=2, dtype=torch.float32, peak=1.0)
    drift = torch.randn((steps + 64, DIM), generator=generator).cumsum(0) / 4
    q = q + drift
    layer = LayerState(alisa(0.2, window=window))
    layer.attend(*(x[:, :, :64] for x in (q, k, v)))
    for t in range(64, 64 + steps):
        layer.attend(*(x[:, :, t : t + 1] for x in (q, k, v)))
        half = math.floor((t + 1) * 0.1 + 0.5)
        if t > 64 + window:
            assert int(layer.count.max()) <= 2 * half + window + state.SLACK, t
        assert layer.slots >= int(layer.count.max())
    assert layer.capacity <= 2 * (layer.slots + state.SLACK) + state.SLACK


def test_memory_goes_back_after_a_long_prompt():
    qkv = tokens(2048 + 8, dtype=torch.float32)
    layer = LayerState(alisa(0.1, window=4))
    layer.attend(*(x[:, :, :2048] for x in qkv))
    full = layer.nbytes
    for t in range(2048, 2056):
        layer.attend(*(x[:, :, t : t + 1] for x in qkv))
    assert layer.nbytes < full / 4


def test_the_first_score_sums_the_last_rows_of_the_prompt():
    q, k, v = tokens(21, seed=7)
    layer = LayerState(alisa(0.4, window=3))
    layer.attend(*(x[:, :, :20] for x in (q, k, v)))
    rows = (q[0].unflatten(0, (KV_HEADS, -1)) @ k[0].unsqueeze(1).mT / DIM**0.5)[..., :20, :20]
    later = torch.ones(20, 20, dtype=torch.bool).triu(1)
    weights = rows.masked_fill(later, -torch.inf).softmax(-1)[:, :, -3:].sum((0, 1, 2))
    # a float32 weight of a row is off by 2 ** -25, of 4 heads and 3 rows
    torch.testing.assert_close(
        layer.score[0, 0, :20].double() / 2**40, weights, rtol=0, atol=12 * 2**-25
    )


def test_reselecting_every_few_steps_reads_one_selection_and_what_came_since():
    qkv = tokens(60, seed=4)
    _, lists = feed(LayerState(alisa(0.3, window=4, reselect_every=4)), qkv, 20)
    _, every = feed(LayerState(alisa(0.3, window=4)), qkv, 20)
    assert lists[0] == every[0]  # until the second step they have seen the same
    for i, (one,) in enumerate(x[0] for x in lists):
        base = lists[i - i % 4][0][0]
        assert one == base + list(range(20 + i - i % 4 + 1, 20 + i + 1))


# ---- batches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("window", [None, 4])
def test_padded_rows_equal_single_runs(window, int8):
    dtype = torch.float32 if int8 else torch.float64
    lengths, longest, steps = [30, 1, 0, 17], 30, 40
    qkv = tokens(longest + steps, batch=4, seed=11, dtype=dtype)
    valid = torch.tensor(lengths, dtype=torch.int32)
    layer = LayerState(alisa(0.3, window=window), int8=int8)
    out, lists = feed(layer, qkv, longest, valid)
    assert not out[2, :, :longest].any()
    for b, length in enumerate(lengths):
        own = tuple(x[b : b + 1, :, longest - length :] for x in qkv)
        single = LayerState(alisa(0.3, window=window), int8=int8)
        if length > 1:
            want, alone = feed(single, own, length)
            assert [one[b] for one in lists] == [one[0] for one in alone]
            start = longest - length
        else:  # one token alone is a decode step, none is no prompt
            parts = [single.attend(*(x[:, :, t : t + 1] for x in own)) for t in range(steps)]
            want, start = torch.cat(parts, 2), longest - length
            want = want[:, :, length:]
            start += length
        torch.testing.assert_close(out[b : b + 1, :, start : start + want.shape[2]], want)


@pytest.mark.parametrize("evict", [True, False])
def test_a_further_turn_reads_all_that_is_there(evict):
    q, k, v = tokens(60, seed=20)
    layer = LayerState(alisa(0.2, window=4), evict=evict)
    feed(layer, tuple(x[:, :, :50] for x in (q, k, v)), 20)
    out = layer.attend(*(x[:, :, 50:] for x in (q, k, v)))
    there = layer.position[0, 0, : layer.count[0, 0]].long()
    assert (len(there) == 60) == (not evict)
    visible = there <= torch.arange(50, 60).unsqueeze(1)
    want = torch.nn.functional.scaled_dot_product_attention(
        q[:, :, 50:], k[:, :, there], v[:, :, there], attn_mask=visible, enable_gqa=True
    )
    torch.testing.assert_close(out, want)


def test_a_padded_further_turn_equals_single_runs():
    """Row 1's second turn is shorter: padding stands between its turns."""
    q, k, v = tokens(60, batch=2, seed=12)
    layer = LayerState(alisa(0.3, window=6))
    feed(layer, tuple(x[:, :, :24] for x in (q, k, v)), 12)
    valid = torch.tensor([10, 3], dtype=torch.int32)
    turn = layer.attend(*(x[:, :, 24:34] for x in (q, k, v)), valid=valid)
    rest = [layer.attend(*(x[:, :, t : t + 1] for x in (q, k, v))) for t in range(34, 60)]
    for b, real in enumerate([10, 3]):
        single = LayerState(alisa(0.3, window=6))
        own = tuple(x[b : b + 1] for x in (q, k, v))
        feed(single, tuple(x[:, :, :24] for x in own), 12)
        want = single.attend(*(x[:, :, 34 - real : 34] for x in own))
        torch.testing.assert_close(turn[b : b + 1, :, 10 - real :], want)
        for t, out in zip(range(34, 60), rest, strict=True):
            want = single.attend(*(x[:, :, t : t + 1] for x in own))
            torch.testing.assert_close(out[b : b + 1], want)
        n = int(single.count)
        assert layer.score[b, :, :n].tolist() == single.score[0, :, :n].tolist()


def test_a_sequence_without_a_token_waits():
    q, k, v = tokens(50, batch=2, seed=13)
    layer, single = LayerState(alisa(0.3, window=4)), LayerState(alisa(0.3, window=4))
    feed(layer, tuple(x[:, :, :20] for x in (q, k, v)), 12)
    feed(single, tuple(x[1:, :, :20] for x in (q, k, v)), 12)
    for t in range(20, 50):
        waits = t % 3 == 0
        valid = torch.tensor([1, 0 if waits else 1], dtype=torch.int32)
        out = layer.attend(*(x[:, :, t : t + 1] for x in (q, k, v)), valid=valid)
        if not waits:
            want = single.attend(*(x[1:, :, t : t + 1] for x in (q, k, v)))
            torch.testing.assert_close(out[1:], want)
    assert layer.length.tolist() == [50, 40]


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("chunks", [[40], [16, 24], [3, 2, 30, 5]])
def test_a_prompt_in_chunks_equals_one(chunks, int8):
    qkv = tokens(70, batch=2, seed=14, dtype=torch.float32)
    once = LayerState(alisa(0.3, window=8), shared=False, int8=int8)
    want, lists = feed(once, qkv, 40)
    layer = LayerState(alisa(0.3, window=8), shared=False, int8=int8)
    outputs, start = [], 0
    for size in chunks[:-1]:
        outputs.append(layer.attend(*(x[:, :, start : start + size] for x in qkv)))
        start += size
    rest, chunked = feed(layer, tuple(x[:, :, start:] for x in qkv), chunks[-1])
    assert chunked == lists
    torch.testing.assert_close(torch.cat([*outputs, rest], 2), want)


def test_the_dense_rows_do_not_depend_on_the_block(monkeypatch):
    qkv = tokens(33, batch=2, seed=15)
    valid = torch.tensor([33, 20], dtype=torch.int32)
    want = LayerState(alisa(0.3)).attend(*qkv, valid=valid)
    monkeypatch.setattr(state, "MASK_ELEMENTS", 700)
    monkeypatch.setattr(state, "SCORED_QUERIES", 3)
    layer = LayerState(alisa(0.3))
    torch.testing.assert_close(layer.attend(*qkv, valid=valid), want)


def test_rows_are_selected_and_repeated():
    qkv = tokens(60, batch=3, seed=16)
    rows = torch.tensor([2, 0, 2])
    for policy in (alisa(0.3, window=4, reselect_every=3), dense()):
        layer, chosen = LayerState(policy), LayerState(policy)
        first = tuple(x[:, :, :40] for x in qkv)
        feed_quietly(layer, first, 20)
        feed_quietly(chosen, tuple(x[rows] for x in first), 20)
        layer.select_rows(rows)
        for t in range(40, 50):
            step = [x[rows, :, t : t + 1] for x in qkv]
            assert torch.equal(layer.attend(*step), chosen.attend(*step))
        layer.repeat_rows(2)
        for t in range(50, 60):
            step = [x[rows, :, t : t + 1] for x in qkv]
            out = layer.attend(*(x.repeat_interleave(2, 0) for x in step))
            assert torch.equal(out, chosen.attend(*step).repeat_interleave(2, 0))


def feed_quietly(layer, qkv, prompt):
    layer.attend(*(x[:, :, :prompt] for x in qkv))
    for t in range(prompt, qkv[0].shape[2]):
        layer.attend(*(x[:, :, t : t + 1] for x in qkv))


# ---- INT8, copies, bad input --------------------------------------------------------------------


def quantised(x):
    """x as INT8 keeps it: one group of DIM channels for each token."""
    low, high = x.double().aminmax(dim=-1, keepdim=True)
    scale = (high - low) / 255
    zero = (-low / scale + 0.5).floor()
    q = ((x.double() / scale + 0.5).floor() + zero).clamp(0, 255)
    return (q.float() * scale.float() + (-scale * zero).float()).to(x.dtype)


def test_int8_is_attention_to_quantised_keys_and_values():
    q, k, v = tokens(80, seed=17, dtype=torch.float32, peak=1.0)
    out, lists = feed(LayerState(alisa(0.3, window=8), int8=True), (q, k, v), 40)
    near = quantised(k), quantised(v)
    want, expected = feed(LayerState(alisa(0.3, window=8)), (q, *near), 40)
    assert lists == expected
    torch.testing.assert_close(out, want)
    bound = (k - near[0]).abs().max() <= (k.amax(-1) - k.amin(-1)).max() / 255
    assert bool(bound)


def test_int8_takes_a_third_of_float32():
    qkv = tokens(1024, dtype=torch.float32)
    sizes = []
    for int8 in (True, False):
        layer = LayerState(dense(), int8=int8)
        layer.attend(*qkv)
        sizes.append(sum(x.nbytes for x in (layer.key, layer.value)))
    assert sizes[0] * 4 == sizes[1]


def test_a_copy_goes_on_by_itself():
    qkv = tokens(50, seed=18)
    layer = LayerState(alisa(0.3, window=4))
    feed(layer, tuple(x[:, :, :30] for x in qkv), 20)
    other = copy.deepcopy(layer)
    step = [x[:, :, 30:31] for x in qkv]
    assert torch.equal(layer.attend(*step), other.attend(*step))
    other.attend(*step)
    assert layer.length.tolist() == [31]
    assert other.length.tolist() == [32]


def test_only_dense_layers_are_cropped():
    qkv = tokens(40, seed=19)
    layer, short = LayerState(dense()), LayerState(dense())
    layer.attend(*(x[:, :, :30] for x in qkv))
    layer.crop(10)
    short.attend(*(x[:, :, :20] for x in qkv))
    step = [x[:, :, 30:31] for x in qkv]
    assert torch.equal(layer.attend(*step), short.attend(*step))
    sparse = LayerState(alisa(0.5))
    sparse.crop(3)  # nothing there
    sparse.attend(*(x[:, :, :30] for x in qkv))
    sparse.crop(0)
    with pytest.raises(NotImplementedError, match="3 tokens cannot be taken back"):
        sparse.crop(3)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda q, k, v: (q, k, v[..., :4]), ValueError, "value must have the shape of key"),
        (lambda q, k, v: (q, k, v.float()), TypeError, "key and value must have the dtype of"),
        (lambda q, k, v: (q[:, :3], k, v), ValueError, "Hq a multiple of 2, got"),
        (lambda q, k, v: (q[:, :, :0], k, v), ValueError, "query must have shape"),
        (lambda q, k, v: (q, k[:1], v[:1]), ValueError, "query must have shape"),
        (lambda q, k, v: (q[:1], k[:1], v[:1]), ValueError, r"key must be \(2, 2, Q, 8\)"),
        (lambda q, k, v: (q.float(), k.float(), v.float()), ValueError, "as before, got"),
        (lambda q, k, v: (q.requires_grad_(), k, v), NotImplementedError, "no gradients"),
    ],
)
def test_bad_tensors(change, error, text):
    layer = LayerState(h2o(2, 2))
    layer.attend(*tokens(10, batch=2))
    with pytest.raises(error, match=text):
        layer.attend(*change(*tokens(1, batch=2)))
    layer.attend(*tokens(1, batch=2))
    layer.reset()
    assert layer.is_empty
    layer.attend(*tokens(3, batch=1, dtype=torch.float32))


def test_bad_valid_and_int8_of_float64():
    with pytest.raises(ValueError, match=r"valid must be \(1,\) int32"):
        LayerState(dense()).attend(*tokens(4), valid=torch.tensor([4]))
    with pytest.raises(TypeError, match="int8 takes no float64"):
        LayerState(dense(), int8=True).attend(*tokens(4))
