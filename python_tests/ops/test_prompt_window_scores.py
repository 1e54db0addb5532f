"""What prompt_window_scores computes, by hand, by a golden and in float64, and its contracts."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from caches import (
    DTYPES,
    assert_no_worse_than,
    draw_cache,
    draw_query,
    numbers,
    unit,
)
from torch.library import opcheck

from tokcore import _library
from tokcore.ops import prompt_window_scores, sparse_decode_attention
from tokcore.ops.prompt_window_scores import _reference

GOLDEN = Path(__file__).parents[1] / "golden"
INF, NAN = math.inf, math.nan


def int32(values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


def run(query, key, count, pairs=None, *, device="cpu", **options):
    query, key, count, pairs = (
        None if x is None else x.to(device) for x in (query, key, count, pairs)
    )
    return prompt_window_scores(query, key, count, key_quantization=pairs, **options)


def assert_no_worse(query, key, count, pairs, device, **options):
    """Weights are off by SLACK roundoffs of the sizes of their scores' products."""
    scale = options.get("scale", query.shape[-1] ** -0.5)
    exact, size = numbers(key, pairs)
    truth = _reference(query.double(), exact, count, **options)
    plain = _reference(query, key, count, key_quantization=pairs, **options)
    got = run(query, key, count, pairs, device=device, **options)
    group = query.shape[1] // key.shape[1]
    products = query.double().abs() @ size.repeat_interleave(group, 1).mT * abs(scale)
    most = 1 + 2 * products.amax((1, 3)) if key.shape[2] else torch.ones(len(key), 1)
    bound = unit(query.dtype) * most.unsqueeze(1).unsqueeze(3) * truth
    assert_no_worse_than(["rows"], [got], [plain], [truth], [bound])


def test_a_case_by_hand(backend):
    """Queries see 0, 1 and 2 slots; scores ln 3 and 0 of one head, equal ones of the other."""
    query = torch.tensor([[[[9.0], [9.0], [1.0]], [[9.0], [9.0], [0.0]]]])
    key = torch.tensor([[[[math.log(3)], [0.0], [NAN]]]])
    got = run(query, key, int32([[2]]), device=backend.device, scale=1.0).cpu()
    want = [[[0.0, 0.0, 0.0], [2.0, 0.0, 0.0], [1.25, 0.75, 0.0]]]
    torch.testing.assert_close(got, torch.tensor([want]))


def test_the_sum_before_the_first_step_of_the_golden(backend):
    """Its window is two rows; NaN where a slot is no candidate."""
    data = np.load(GOLDEN / "alisa_gqa_window2_r40.npz")
    length, window = int(data["prefill_len"]), int(data["window"])
    query = torch.tensor(data["q"][:, :, length - window : length])
    got = run(query, torch.tensor(data["k"]), int32([[length]]), device=backend.device)
    want = data["score"][0]
    found = got.sum(2).cpu().numpy()
    known = ~np.isnan(want)
    assert known.any()
    np.testing.assert_allclose(found[known], want[known], atol=2e-6)


# (B, Hq, Hkv, C, D), Q, lists
CASES = [
    ((2, 4, 2, 23, 16), 5, 1),
    ((2, 4, 2, 23, 16), 4, 2),
    ((1, 3, 1, 31, 64), 1, 1),
    ((1, 2, 1, 9, 1), 12, 1),
    ((1, 6, 2, 20, 80), 3, 2),
    ((1, 2, 1, 20, 130), 2, 1),
    ((1, 40, 2, 12, 3), 2, 1),
    ((1, 2, 1, 560, 6), 5, 1),
    ((1, 4, 2, 1300, 32), 21, 1),
]


@pytest.mark.parametrize(("sizes", "queries", "lists"), CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", [1.0, 12.0])
def test_no_worse_than_torch(backend, sizes, queries, lists, dtype, spread):
    batch, heads, kv_heads, capacity, dim = sizes
    backend.skip_above(batch * heads * queries * capacity * dim, emulated=90_000)
    (key, _), _ = draw_cache((batch, kv_heads, capacity, dim), dtype, spread=spread)
    count = torch.randint(0, capacity + 1, (batch, lists), dtype=torch.int32)
    count.view(-1)[:1] = capacity
    query = draw_query((batch, heads, queries, dim), dtype)
    assert_no_worse(query, key, count, None, backend.device)


@pytest.mark.parametrize(("dim", "groups"), [(64, 2), (64, 1), (10, 2), (3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_quantized_no_worse_than_torch(backend, dim, groups, dtype, scale):
    (key, _), (pairs, _) = draw_cache((2, 2, 17, dim), dtype, groups=groups)
    query = draw_query((2, 6, 3, dim), dtype)
    assert_no_worse(query, key, int32([[17, 9], [1, 2]]), pairs, backend.device, scale=scale)


@pytest.mark.parametrize("lists", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_what_a_step_would_give(backend, lists, dtype):
    """Row i is the weight_row of query i with the slots that it sees, up to rounding."""
    (key, value), _ = draw_cache((2, 2, 19, 8), dtype)
    count = int32([[19, 4], [2, 7]])[:, :lists]
    query = draw_query((2, 4, 3, 8), dtype)
    got = run(query, key, count, device=backend.device)
    for i in range(3):
        seen = (count - (2 - i)).clamp(min=0)
        arguments = [x.to(backend.device) for x in (query[:, :, i], key, value)]
        step = sparse_decode_attention(*arguments, None, seen.to(backend.device))
        torch.testing.assert_close(got[:, :, i], step.weight_row, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("wrong", [NAN, INF, -INF])
def test_what_is_not_seen_has_no_effect(backend, wrong):
    (key, _), _ = draw_cache((1, 1, 9, 4), torch.float32)
    query = draw_query((1, 2, 3, 4), torch.float32)
    count = int32([[7]])
    want = run(query, key, count, device=backend.device)
    key[:, :, 7:] = wrong
    assert torch.equal(run(query, key, count, device=backend.device), want)
    key[0, 0, 6] = NAN  # which the last query alone sees
    got = run(query, key, count, device=backend.device)
    assert torch.equal(got[:, :, :2], want[:, :, :2])
    assert got[0, 0, 2, :7].isnan().all()
    assert got[0, 0, 2, 7:].eq(0).all()


def test_bits_do_not_depend_on_the_threads(backend):
    if backend.name != "cpu":
        pytest.skip("threads are the CPU's")
    (key, _), _ = draw_cache((2, 2, 1100, 16), torch.bfloat16)
    query, count = draw_query((2, 4, 20, 16), torch.bfloat16), int32([[1100], [700]])
    threads = torch.get_num_threads()
    try:
        found = []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(run(query, key, count))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, found[0]) for x in found)


@pytest.mark.parametrize("seed", [2, 3])
def test_bits_do_not_depend_on_the_order_of_threads(backend, seed):
    if backend.name != "emulated":
        pytest.skip("the emulation's seed")
    (key, _), _ = draw_cache((1, 2, 270, 4), torch.float32)
    query = draw_query((1, 4, 5, 4), torch.float32)
    found = []
    for number in (0, seed):
        with _library.use("emulated", seed=number):
            found.append(run(query, key, int32([[270]])))
    assert torch.equal(*found)


# ---- contracts ------------------------------------------------------------------------------


def inputs(device="cpu", dtype=torch.float32, sizes=(2, 4, 2, 3, 7, 5), groups=None):
    batch, heads, kv_heads, queries, capacity, dim = sizes
    (key, _), (pairs, _) = draw_cache((batch, kv_heads, capacity, dim), dtype, groups=groups)
    query = draw_query((batch, heads, queries, dim), dtype).to(device)
    count = torch.full((batch, 1), capacity, dtype=torch.int32, device=device)
    return query, key.to(device), count, None if pairs is None else pairs.to(device)


@pytest.mark.parametrize("sizes", [(2, 4, 2, 3, 7, 5), (0, 4, 2, 3, 7, 5), (2, 4, 2, 0, 7, 5)])
@pytest.mark.parametrize("groups", [None, 5])
def test_opcheck(backend, sizes, groups):
    query, key, count, pairs = inputs(backend.device, sizes=sizes, groups=groups)
    opcheck(_library.native().prompt_window_scores, (query, key, count, pairs, 0.5))


@pytest.mark.parametrize("empty", [0, 3, 4])
def test_empty_inputs(backend, empty):
    sizes = [2, 4, 2, 3, 7, 5]
    sizes[empty] = 0
    query, key, count, _ = inputs(backend.device, sizes=sizes)
    got = prompt_window_scores(query, key, count)
    assert got.shape == (sizes[0], 1, sizes[3], sizes[4])


def test_compile_without_graph_breaks(backend):
    torch._dynamo.reset()

    def step(query, key, count):
        return prompt_window_scores(query * 2, key, count) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for sizes in ((2, 4, 2, 3, 7, 5), (3, 4, 2, 4, 9, 5)):
        query, key, count, _ = inputs(backend.device, sizes=sizes)
        assert torch.equal(compiled(query, key, count), step(query, key, count))


def test_strides_cost_no_copy_and_change_nothing(backend):
    query, key, count, _ = inputs(backend.device)
    want = prompt_window_scores(query, key, count)
    larger = torch.full((2, 12, 2, 5), NAN, device=backend.device).transpose(1, 2)
    larger[:, :, 2:9] = key
    spread = torch.stack([query, query], -1)[..., 0]
    assert torch.equal(prompt_window_scores(spread, larger[:, :, 2:9], count), want)


def test_no_derivative(backend):
    query, key, count, _ = inputs(backend.device)
    with pytest.raises(NotImplementedError, match="prompt_window_scores: has no derivative"):
        prompt_window_scores(query.requires_grad_(), key, count).sum().backward()
    with pytest.raises(NotImplementedError, match="prompt_window_scores: cannot be batched"):
        torch.vmap(lambda x: prompt_window_scores(x, key, count))(torch.stack([query.detach()] * 2))


QUERY, KEY, COUNT, _ = inputs()
BYTES, PAIRS = inputs(groups=1)[1::2]
ERRORS = [
    ({"query": [1.0]}, TypeError, "query must be a torch.Tensor, got list"),
    ({"query": QUERY.long()}, TypeError, "query must be float32.*got torch.int64"),
    ({"query": QUERY[0]}, ValueError, r"query must have shape \(B, Hq, Q, D\) .*got \(4, 3, 5\)"),
    ({"key": KEY[0]}, ValueError, r"key must have shape \(2, Hkv, C, 5\) .*got \(2, 7, 5\)"),
    (
        {"key": KEY.half()},
        TypeError,
        "key must have the dtype of query, torch.float32, or be uint8",
    ),
    ({"key": KEY[:, :1].expand(2, 3, 7, 5)}, ValueError, "key must have Hkv heads, a divisor of"),
    ({"key": KEY.to("meta")}, ValueError, "key must be on the device of query, cpu, got meta"),
    ({"count": COUNT.long()}, TypeError, "count must be int32, got torch.int64"),
    ({"count": COUNT[0]}, ValueError, r"count must have shape \(2, Hs\) .*got \(1,\)"),
    ({"key_quantization": PAIRS}, TypeError, "key must be uint8 with key_quantization, got"),
    ({"scale": INF}, ValueError, "scale must be .*got inf"),
    (
        {"key": BYTES, "key_quantization": PAIRS[..., :1]},
        ValueError,
        r"key_quantization must have shape .*got \(2, 2, 7, 1, 1\)",
    ),
]


@pytest.mark.parametrize(("wrong", "error", "text"), ERRORS)
def test_named_errors(backend, wrong, error, text):
    arguments = backend.place({"query": QUERY, "key": KEY, "count": COUNT} | wrong)
    text = text.replace("cpu", backend.device)
    with pytest.raises(error, match=f"^prompt_window_scores: {text}"):
        prompt_window_scores(**arguments)


@pytest.mark.parametrize("wrong", [-1, 8, -(2**31)])
def test_counts_out_of_range(backend, wrong, monkeypatch):
    """The CPU raises; elsewhere the rows of that list are NaN and those of others are not."""
    query, key, count, _ = inputs(backend.device)
    want = prompt_window_scores(query, key, count)
    count[1] = wrong
    if backend.checks_values:
        text = rf"prompt_window_scores: count must lie in \[0, 7\], got {wrong} in batch 1, list 0"
        with pytest.raises(RuntimeError, match=text):
            prompt_window_scores(query, key, count)
    else:
        got = prompt_window_scores(query, key, count)
        assert torch.equal(got[0], want[0])
        assert got[1].isnan().all()
    monkeypatch.setenv("TOKCORE_DEBUG", "1")
    with pytest.raises(ValueError, match=r"prompt_window_scores: count must lie in \[0, 7\], got"):
        prompt_window_scores(query, key, count)


def test_the_native_operator_checks_once_more(backend):
    query, key, count, _ = inputs(backend.device)
    pairs = torch.zeros(2, 2, 7, 1, 2, device=backend.device)
    for arguments, text in (
        ((query.long(), key, count, None), "query must be float32"),
        ((query[0], key, count, None), r"query must have shape \(B, Hq, Q, D\)"),
        ((query, key[0], count, None), "key must have shape"),
        ((query, key.half(), count, None), "key must be Float"),
        ((query, key, count.long(), None), "count must be Int"),
        ((query, key, count.expand(2, 3), None), "count must have shape"),
        ((query, key, count, pairs), "key must be uint8 with key_quantization"),
        ((query, key.byte(), count, pairs.half()), "key_quantization must be Float"),
        ((query, key.byte(), count, pairs.expand(2, 2, 7, 2, 2)), "key_quantization must have"),
        ((query.double(), key.byte(), count, pairs), "query must be float32, float16 or bfloat16"),
    ):
        with pytest.raises(RuntimeError, match=f"prompt_window_scores: {text}"):
            _library.native().prompt_window_scores(*arguments, 1.0)
