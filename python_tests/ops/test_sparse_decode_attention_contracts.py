"""What sparse_decode_attention promises beside its numbers."""

import math

import pytest
import torch
from caches import draw_cache, draw_lists, draw_query
from torch.library import opcheck

from tokcore import _library
from tokcore.ops import SparseDecode, sparse_decode_attention

B, HQ, HKV, C, D, M = 2, 4, 2, 9, 6, 7


def inputs(device="cpu", dtype=torch.float32, *, sizes=(B, HQ, HKV, C, D, M), lists=1, groups=None):
    """query, key, value, index, count and both quantizations."""
    batch, heads, kv_heads, capacity, dim, listed = sizes
    rows, pairs = draw_cache((batch, kv_heads, capacity, dim), dtype, groups=groups)
    index, count = draw_lists(batch, lists, capacity, listed)
    query = draw_query((batch, heads, dim), dtype)
    tensors = (query, *rows, index, count, *pairs)
    return [None if x is None else x.to(device) for x in tensors]


SIZES = [(B, HQ, HKV, C, D, M), (0, HQ, HKV, C, D, M), (B, HQ, HKV, C, D, 0), (B, HQ, HKV, 0, D, 0)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("with_index", [True, False])
def test_opcheck(backend, sizes, dtype, with_index):
    tensors = inputs(backend.device, dtype, sizes=sizes)
    if not with_index:
        tensors[3:5] = None, torch.full_like(tensors[4], sizes[3])
    opcheck(_library.native().sparse_decode_attention, (*tensors, 0.5))


@pytest.mark.parametrize("lists", [1, 2])
def test_opcheck_quantized(backend, lists):
    tensors = inputs(backend.device, lists=lists, groups=2)
    opcheck(_library.native().sparse_decode_attention, (*tensors, 0.5))


@pytest.mark.parametrize("sizes", SIZES[1:], ids=str)
def test_empty_inputs(backend, sizes):
    batch, heads, _, _, dim, listed = sizes
    got = sparse_decode_attention(*inputs(backend.device, sizes=sizes)[:5])
    assert [x.shape for x in got] == [(batch, heads, dim), (batch, 1, listed), (batch, heads)]
    assert got.output.eq(0).all()
    assert got.lse.eq(-math.inf).all()


def test_what_comes_back(backend):
    got = sparse_decode_attention(*inputs(backend.device, torch.bfloat16)[:5])
    assert isinstance(got, SparseDecode)
    assert [x.dtype for x in got] == [torch.bfloat16, torch.float32, torch.float32]
    got = sparse_decode_attention(*inputs(backend.device, torch.float64)[:5])
    assert [x.dtype for x in got] == [torch.float64] * 3


def test_meta_tensors_have_the_right_shapes():
    got = sparse_decode_attention(*inputs("meta", torch.float16, lists=2)[:5])
    assert [x.shape for x in got] == [(B, HQ, D), (B, 2, M), (B, HQ)]
    assert [x.dtype for x in got] == [torch.float16, torch.float32, torch.float32]


@pytest.mark.parametrize("groups", [None, 2])
def test_compile_without_graph_breaks(backend, groups):
    torch._dynamo.reset()

    def step(query, key, value, index, count, key_pairs, value_pairs):
        got = sparse_decode_attention(
            query * 2,
            key,
            value,
            index,
            count,
            key_quantization=key_pairs,
            value_quantization=value_pairs,
        )
        return got.output + 1, got.weight_row, got.lse

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for sizes in (SIZES[0], (3, HQ, HKV, C + 4, D, M + 1)):
        tensors = inputs(backend.device, sizes=sizes, groups=groups)
        for got, want in zip(compiled(*tensors), step(*tensors), strict=True):
            assert torch.equal(got, want)


def test_autocast_changes_nothing(backend):
    tensors = inputs(backend.device)[:5]
    want = sparse_decode_attention(*tensors)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        got = sparse_decode_attention(*tensors)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("output", [0, 1, 2])
def test_no_derivative(backend, which, output):
    tensors = inputs(backend.device)[:5]
    tensors[which].requires_grad_()
    got = sparse_decode_attention(*tensors)
    with pytest.raises(NotImplementedError, match="sparse_decode_attention: has no derivative"):
        got[output].sum().backward()


def test_vmap_and_functional_derivatives_are_clear_errors(backend):
    query, *rest = inputs(backend.device)[:5]

    def function(x):
        return sparse_decode_attention(x, *rest).output

    with pytest.raises(NotImplementedError, match="sparse_decode_attention: cannot be batched"):
        torch.vmap(function)(torch.stack([query] * 2))
    with pytest.raises(NotImplementedError, match="sparse_decode_attention: query cannot be diff"):
        torch.func.grad(lambda x: function(x).sum())(query)


@pytest.mark.parametrize("groups", [None, 2])
def test_any_strides(backend, groups):
    """A cache is part of a larger one, tokens before heads; nothing around it is read."""
    tensors = inputs(backend.device, groups=groups, lists=2)
    names = ("key_quantization", "value_quantization")
    named = dict(zip(names, tensors[5:], strict=True))
    want = sparse_decode_attention(*tensors[:5], **named)
    views = []
    for x in (*tensors[1:3], *tensors[5:]):
        if x is None:
            views.append(x)
            continue
        fill = 255 if x.dtype == torch.uint8 else math.nan
        larger = x.new_full((B + 1, C + 3, HKV + 1, *x.shape[3:]), fill).transpose(1, 2)
        views.append(larger[1:, 1:, 2 : C + 2].copy_(x))
    spread = [torch.stack([x, x], -1)[..., 0] for x in (tensors[0], *tensors[3:5])]
    assert not any(x is not None and x.is_contiguous() for x in (*views, *spread))
    got = sparse_decode_attention(
        spread[0], *views[:2], *spread[1:], **dict(zip(names, views[2:], strict=True))
    )
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    across = [x if i in (3, 4) else x.mT.contiguous().mT for i, x in enumerate(tensors[:5])]
    got = sparse_decode_attention(*across, **named)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_inputs_stay_as_they_are(backend):
    tensors = inputs(backend.device)[:5]
    before = [x.clone() for x in tensors]
    sparse_decode_attention(*tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("sizes", [(1, 2, 1, 3000, 24, 2900), (3, 4, 2, 600, 16, 550)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_the_threads(backend, sizes, dtype):
    if backend.name != "cpu":
        pytest.skip("threads are the CPU's")
    tensors = inputs("cpu", dtype, sizes=sizes)[:5]
    threads = torch.get_num_threads()
    try:
        found = []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(sparse_decode_attention(*tensors))
    finally:
        torch.set_num_threads(threads)
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, found[0], strict=True))


@pytest.mark.parametrize("seed", [2, 3])
@pytest.mark.parametrize("groups", [None, 2])
def test_bits_do_not_depend_on_the_order_of_threads(backend, seed, groups):
    if backend.name != "emulated":
        pytest.skip("the emulation's seed")
    tensors = inputs("cpu", sizes=(1, 10, 2, 300, 6, 290), groups=groups)
    found = []
    for number in (0, seed):
        with _library.use("emulated", seed=number):
            found.append(_library.native().sparse_decode_attention(*tensors, 0.5))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# ---- errors ---------------------------------------------------------------------------------

NAMES = ("query", "key", "value", "index", "count")
GOOD = dict(zip(NAMES, inputs()[:5], strict=True))
Q, K, V, LISTS, N = GOOD.values()
QUANTIZED = inputs(groups=2)
BYTES = {
    "key": QUANTIZED[1],
    "value": QUANTIZED[2],
    "key_quantization": QUANTIZED[5],
    "value_quantization": QUANTIZED[6],
}
PAIRS = QUANTIZED[5]
ERRORS = [
    ({"query": Q.tolist()}, TypeError, "query must be a torch.Tensor, got list"),
    ({"query": Q.long()}, TypeError, "query must be float32.*got torch.int64"),
    ({"query": Q[0]}, ValueError, r"query must have shape \(B, Hq, D\) .*got \(4, 6\)"),
    ({"query": Q[:, :0]}, ValueError, r"query must have shape .* Hq >= 1 .*got \(2, 0, 6\)"),
    ({"query": torch.zeros(1, 1, 257)}, ValueError, r"query must .*<= 256, got \(1, 1, 257\)"),
    ({"key": K.to_sparse()}, TypeError, "key must be a dense tensor"),
    ({"key": K[0]}, ValueError, r"key must have shape \(2, Hkv, C, 6\) .*got \(2, 9, 6\)"),
    ({"key": K[:1]}, ValueError, r"key must have shape .*got \(1, 2, 9, 6\)"),
    ({"key": K[..., :5]}, ValueError, r"key must have shape .*got \(2, 2, 9, 5\)"),
    ({"key": K.half()}, TypeError, "key must have the dtype of query, torch.float32, or be uint8"),
    ({"key": K.byte()}, TypeError, "key must have the dtype of query, .* got torch.uint8"),
    ({"key": K.to("meta")}, ValueError, "key must be on the device of query, cpu, got meta"),
    ({"query": Q[:, :3]}, ValueError, "key must have Hkv heads, a divisor of Hq = 3, got 2"),
    ({"key": K[:, :0]}, ValueError, "key must have Hkv heads, a divisor of Hq = 4, got 0"),
    ({"value": V[..., :5]}, ValueError, r"value must have shape \(2, Hkv, C, 6\) .*got \(2, 2, 9"),
    ({"value": V[:, :, :8]}, ValueError, r"value must have the shape of key, \(2, 2, 9, 6\), got"),
    ({"value": V.double()}, TypeError, "value must have the dtype of query"),
    ({"count": N.long()}, TypeError, "count must be int32, got torch.int64"),
    ({"count": N[:1]}, ValueError, r"count must have shape \(2, Hs\) with Hs = 1 or 2, got \(1, 1"),
    ({"count": N.expand(2, 4)}, ValueError, r"count must have shape .*got \(2, 4\)"),
    ({"count": N.to("meta")}, ValueError, "count must be on the device of query, cpu, got meta"),
    ({"index": LISTS.long()}, TypeError, "index must be int32, got torch.int64"),
    ({"index": LISTS[0]}, ValueError, r"index must have shape \(2, 1, 'M'\) on cpu, got \(1, 7\)"),
    ({"index": LISTS.expand(2, 2, 7)}, ValueError, r"index must have shape .*got \(2, 2, 7\)"),
    ({"index": LISTS.to("meta")}, ValueError, "index must have shape .* on cpu, got .* on meta"),
    ({"scale": math.nan}, ValueError, "scale must be .*got nan"),
    ({"scale": -math.inf}, ValueError, "scale must be .*got -inf"),
    ({"scale": "1"}, TypeError, "scale must be a number, got '1'"),
    (BYTES | {"key": K}, TypeError, "key must be uint8 with key_quantization, got torch.float32"),
    (BYTES | {"value": V}, TypeError, "value must be uint8 with value_quantization, got"),
    ({"key_quantization": PAIRS}, TypeError, "key must be uint8 with key_quantization, got"),
    (BYTES | {"value_quantization": None}, ValueError, "key_quantization and .* key_.* alone"),
    (BYTES | {"query": Q.double()}, TypeError, "query must be float32, float16 or bfloat16 with"),
    (
        BYTES | {"key_quantization": PAIRS.half()},
        TypeError,
        "key_quantization must be float32, got",
    ),
    (BYTES | {"key_quantization": PAIRS[0]}, ValueError, r"key_quantization .*got \(2, 9, 2, 2\)"),
    (BYTES | {"key_quantization": PAIRS[:, :, :, :0]}, ValueError, "key_quantization must .* Z a"),
    (BYTES | {"value_quantization": PAIRS[:, :, :8]}, ValueError, "value_quantization must have s"),
    (
        BYTES | {"value_quantization": PAIRS[:, :, :, :1]},
        ValueError,
        r"value_quantization must have the shape of key_quantization, \(2, 2, 9, 2, 2\), got",
    ),
    (
        BYTES | {"key_quantization": PAIRS.repeat(1, 1, 1, 2, 1)},
        ValueError,
        r"key_quantization must have shape .* divisor of D = 6, got \(2, 2, 9, 4, 2\)",
    ),
]


@pytest.mark.parametrize(("wrong", "error", "text"), ERRORS)
def test_named_errors(backend, wrong, error, text):
    arguments = backend.place(GOOD | wrong)
    text = text.replace("cpu", backend.device)
    with pytest.raises(error, match=f"^sparse_decode_attention: {text}"):
        sparse_decode_attention(**arguments)


def test_the_native_operator_checks_once_more(backend):
    q, k, v, index, count, _, _ = inputs(backend.device)
    u, w, pairs = (x.to(backend.device) for x in (*QUANTIZED[1:3], PAIRS))
    none = (None, None)
    for arguments, text in (
        ((q.long(), k, v, index, count, *none), "query must be float32"),
        ((q[0], k, v, index, count, *none), r"query must have shape \(B, Hq, D\)"),
        ((q, k[0], v, index, count, *none), "key must have shape"),
        ((q, k[..., :3], v, index, count, *none), "key must have shape"),
        ((q, k, v[:, :1], index, count, *none), "value must have shape"),
        ((q, k, v.double(), index, count, *none), "value must be Float"),
        ((q, k, v, index, count.long(), *none), "count must be Int"),
        ((q, k, v, index, count[:1], *none), "count must have shape"),
        ((q, k, v, index[0], count, *none), "index must have shape"),
        ((q, k, v, index.long(), count, *none), "index must be Int"),
        ((q, k, v, index[:1], count, *none), "index must have shape"),
        ((q, u, w, index, count, pairs, None), "key_quantization and value_quantization go"),
        ((q, k, w, index, count, pairs, pairs), "key must be uint8"),
        ((q, u, w, index, count, pairs[0], pairs), "key_quantization must have shape"),
        ((q, u, w, index, count, pairs, pairs[:, :, :, :1]), "value_quantization must have shape"),
        ((q.double(), u, w, index, count, pairs, pairs), "query must be float32, float16 or"),
    ):
        with pytest.raises(RuntimeError, match=f"sparse_decode_attention: {text}"):
            _library.native().sparse_decode_attention(*arguments, 1.0)


WRONG_LISTS = [
    ("count", (1, 0), -1, r"count must lie in \[0, 7\], got -1"),
    ("count", (1, 0), 8, r"count must lie in \[0, 7\], got 8"),
    ("index", (1, 0, 0), -1, r"index must hold ascending slots in \[0, 9\), got -1"),
    ("index", (1, 0, 6), 9, r"index must hold ascending slots in \[0, 9\), got 9"),
    ("index", (1, 0, 6), 2**31 - 1, r"index must hold ascending slots in \[0, 9\), got 2147483647"),
    ("index", (1, 0, 3), 2, r"index must hold ascending slots in \[0, 9\), got 2"),
    ("index", (1, 0, 3), 1, r"index must hold ascending slots in \[0, 9\), got 1"),
]


@pytest.mark.parametrize(("which", "where", "wrong", "text"), WRONG_LISTS)
def test_lists_that_are_wrong(backend, which, where, wrong, text, monkeypatch):
    """The CPU raises; elsewhere all that comes of the list is NaN, and nothing else."""
    named = dict(zip(NAMES, inputs(backend.device)[:5], strict=True))
    named["index"] = torch.arange(M, dtype=torch.int32, device=backend.device).repeat(B, 1, 1)
    named["count"].fill_(M)
    want = sparse_decode_attention(**named)
    named[which][where] = wrong
    if backend.checks_values:
        with pytest.raises(RuntimeError, match=f"^sparse_decode_attention: {text}"):
            sparse_decode_attention(**named)
    else:
        got = sparse_decode_attention(**named)
        for found, true in zip(got, want, strict=True):
            assert torch.equal(found[0], true[0])
            assert found[1].isnan().all()
    monkeypatch.setenv("TOKCORE_DEBUG", "1")
    with pytest.raises(ValueError, match=f"^sparse_decode_attention: {text}"):
        sparse_decode_attention(**named)


def test_a_wrong_slot_in_a_later_split(backend):
    """All of the list's results are NaN, those of the other KV head's are not."""
    if backend.checks_values:
        pytest.skip("the CPU raises")
    query, key, value, _, _, _, _ = inputs(backend.device, sizes=(1, 4, 2, 600, 3, 600))
    index = torch.arange(600, dtype=torch.int32, device=backend.device).repeat(1, 2, 1)
    count = torch.full((1, 2), 600, dtype=torch.int32, device=backend.device)
    want = sparse_decode_attention(query, key, value, index, count)
    index[0, 1, 512] = 511  # the first of the third split, equal to the last of the second
    got = sparse_decode_attention(query, key, value, index, count)
    assert torch.equal(got.output[0, :2], want.output[0, :2])
    assert got.output[0, 2:].isnan().all()
    assert torch.equal(got.weight_row[0, 0], want.weight_row[0, 0])
    assert got.weight_row[0, 1].isnan().all()
