"""What sparse_window_attention owes to torch, and to whoever calls it wrongly."""

import math

import pytest
import torch
from torch.library import opcheck

from tokcore import _library
from tokcore.ops import sparse_window_attention

# torch deprecates what its own compiler imports.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
B, HQ, HKV, T, S, D = 2, 4, 2, 5, 7, 4
WINDOW = 3


def inputs(device, dtype=torch.float32, *, sizes=(B, HQ, HKV, T, S, D), grad=True):
    """Rows, and a list for each KV head."""
    batch, heads, key_heads, queries, keys, dim = sizes
    generator = torch.Generator().manual_seed(0)
    rows = [
        torch.randn(batch, h, n, dim, generator=generator).to(device, dtype)
        for h, n in ((heads, queries), (key_heads, keys), (key_heads, keys))
    ]
    index = torch.full((batch, key_heads, 3), -1, dtype=torch.int32)
    if keys > 3:
        index[:, 0, :2] = torch.tensor([0, 3])
        index[:, -1, 0] = 1
    if grad:
        rows = [x.requires_grad_() for x in rows]
    return rows, index.to(device)


SIZES = [
    (B, HQ, HKV, T, S, D),
    (0, HQ, HKV, T, S, D),
    (B, HQ, HKV, 0, S, D),
    (B, HQ, HKV, 0, 0, D),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_lists", [False, True])
def test_opcheck(backend, sizes, dtype, with_lists):
    rows, index = inputs(backend.device, dtype, sizes=sizes)
    index = index if with_lists else None
    operators = _library.native()
    opcheck(operators.sparse_window_attention, (*rows, index, WINDOW, 0.5))
    rows = [x.detach() for x in rows]
    output, lse = operators.sparse_window_attention(*rows, index, WINDOW, 0.5)
    arguments = (torch.ones_like(output), *rows, index, lse, WINDOW, 0.5)
    opcheck(operators.sparse_window_attention_backward, arguments)


@pytest.mark.parametrize("sizes", SIZES[1:], ids=str)
def test_empty_inputs(backend, sizes):
    rows, index = inputs(backend.device, sizes=sizes)
    output = sparse_window_attention(*rows, WINDOW, index)
    assert output.shape == rows[0].shape
    grads = torch.autograd.grad(output.sum(), rows)
    assert [g.shape for g in grads] == [x.shape for x in rows]
    assert all(g.eq(0).all() for g in grads)


@pytest.mark.parametrize("window", [1, 2, 5])
@pytest.mark.parametrize("with_lists", [False, True])
def test_gradcheck(backend, window, with_lists):
    """Small, as it calls a hundred times."""
    rows, index = inputs(backend.device, torch.float64, sizes=(1, 2, 1, 3, 5, 2))
    torch.autograd.gradcheck(
        lambda *x: sparse_window_attention(*x, window, index if with_lists else None), rows
    )


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)])
def test_gradients_of_some(backend, needed):
    rows, index = inputs(backend.device)
    everything = torch.autograd.grad(sparse_window_attention(*rows, WINDOW, index).sum(), rows)
    some = [x if i in needed else x.detach() for i, x in enumerate(rows)]
    output = sparse_window_attention(*some, WINDOW, index)
    grads = torch.autograd.grad(output.sum(), [rows[i] for i in needed])
    assert all(torch.equal(g, everything[i]) for i, g in zip(needed, grads, strict=True))


def test_no_second_derivative(backend):
    rows, index = inputs(backend.device)
    output = sparse_window_attention(*rows, WINDOW, index)
    (grad,) = torch.autograd.grad(output.sum(), rows[0], create_graph=True)
    with pytest.raises(
        NotImplementedError, match="sparse_window_attention_backward: has no derivative"
    ):
        grad.sum().backward()


def test_what_is_saved(backend):
    """Beside the inputs one number a query."""
    rows, index = inputs(backend.device)
    sizes = []

    def pack(tensor):
        sizes.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        sparse_window_attention(*rows, WINDOW, index)
    assert sorted(sizes) == sorted([*(x.shape for x in (*rows, index)), (B, HQ, T)])


@pytest.mark.parametrize("with_lists", [False, True])
def test_compile_without_graph_breaks(backend, with_lists):
    torch._dynamo.reset()
    rows, index = inputs(backend.device)

    def step(*rows):
        lists = index if with_lists else None
        return sparse_window_attention(*(2 * x for x in rows), WINDOW, lists).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    want, got = step(*rows), compiled(*rows)
    assert torch.equal(got, want)
    for a, b in zip(torch.autograd.grad(got, rows), torch.autograd.grad(want, rows), strict=True):
        assert torch.equal(a, b)


def test_compile_serves_other_lengths_and_windows(backend):
    torch._dynamo.reset()
    graphs = []

    def counted(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda rows, index, window: sparse_window_attention(*rows, window, index),
        fullgraph=True,
        backend=counted,
        dynamic=True,
    )
    for queries, keys, window in ((5, 7, 3), (6, 9, 4), (8, 12, 5)):
        rows, index = inputs(backend.device, sizes=(B, HQ, HKV, queries, keys, D), grad=False)
        want = sparse_window_attention(*rows, window, index)
        assert torch.equal(compiled(rows, index, window), want)
    assert len(graphs) == 1


def test_autocast_changes_nothing(backend):
    rows, index = inputs(backend.device)
    want = sparse_window_attention(*rows, WINDOW, index)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        got = sparse_window_attention(*rows, WINDOW, index)
    assert torch.equal(got, want)


def test_vmap_and_forward_mode_are_clear_errors(backend):
    rows, index = inputs(backend.device, grad=False)

    def function(query):
        return sparse_window_attention(query, *rows[1:], WINDOW, index)

    with pytest.raises(NotImplementedError, match="sparse_window_attention: cannot be batched"):
        torch.vmap(function)(torch.stack([rows[0]] * 2))
    with pytest.raises(NotImplementedError, match="sparse_window_attention: query cannot be diff"):
        torch.func.grad(lambda query: function(query).sum())(rows[0])


def test_meta_tensors_have_the_right_shapes():
    rows, index = inputs("meta", torch.bfloat16, grad=False)
    got = sparse_window_attention(*rows, WINDOW, index)
    assert (got.shape, got.dtype) == ((B, HQ, T, D), torch.bfloat16)
    _, lse = torch.ops.tokcore.sparse_window_attention(*rows, index, WINDOW, 1.0)
    assert (lse.shape, lse.dtype) == ((B, HQ, T), torch.float32)


def test_lse_is_the_log_of_the_sum(backend):
    rows, index = inputs(backend.device, torch.float64, grad=False)
    _, lse = _library.native().sparse_window_attention(*rows, index[:, :1], S, 0.5)
    scores = rows[0] @ rows[1].repeat_interleave(HQ // HKV, 1).mT * 0.5
    seen = torch.ones(T, S, dtype=torch.bool, device=backend.device).tril(S - T)
    want = scores.masked_fill(~seen, -math.inf).logsumexp(3)
    torch.testing.assert_close(lse, want)


def test_any_strides(backend):
    rows, index = inputs(backend.device, sizes=(B, HQ, HQ, T, T, D), grad=False)
    want = sparse_window_attention(*rows, WINDOW, index)
    packed = torch.stack(rows, 3).permute(0, 2, 3, 1, 4).contiguous()  # (B, T, 3, H, D)
    views = [x.transpose(1, 2).requires_grad_() for x in packed.unbind(2)]
    wide = torch.stack([index, index], 3)[..., 0]
    assert not any(x.is_contiguous() for x in (*views, wide))
    got = sparse_window_attention(*views, WINDOW, wide)
    assert torch.equal(got, want)
    upstream = torch.ones((), device=backend.device).expand(got.shape)
    grads = torch.autograd.grad(got, views, upstream)
    plain = [x.requires_grad_() for x in rows]
    again = torch.autograd.grad(
        sparse_window_attention(*plain, WINDOW, index), plain, upstream.contiguous()
    )
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))


def test_inputs_stay_as_they_are(backend):
    rows, index = inputs(backend.device)
    before = [x.detach().clone() for x in (*rows, index)]
    torch.autograd.grad(sparse_window_attention(*rows, WINDOW, index).sum(), rows)
    assert all(torch.equal(a, b) for a, b in zip((*rows, index), before, strict=True))


def everything(rows, window, index):
    output = sparse_window_attention(*rows, window, index)
    return output, *torch.autograd.grad(output.sin().sum(), rows)


def test_bits_do_not_depend_on_the_threads(backend):
    if backend.name != "cpu":
        pytest.skip("threads are the CPU's")
    rows, index = inputs("cpu", sizes=(3, 4, 2, 190, 270, 24))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = everything(rows, 40, index)
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            got = everything(rows, 40, index)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_bits_do_not_depend_on_the_order_of_threads(backend, seed):
    if backend.name != "emulated":
        pytest.skip("the emulation's seed")
    rows, index = inputs("cpu", sizes=(1, 2, 1, 35, 40, 4))
    runs = []
    for number in (0, seed):
        with _library.use("emulated", seed=number):
            runs.append(everything(rows, 20, index))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_memory_is_that_of_inputs_and_outputs():
    """No (T, S): at 8192 tokens a mask alone would be 64 MB."""
    from pathlib import Path

    def peak():
        text = Path("/proc/self/status").read_text()
        return 1024 * int(text.partition("VmHWM:")[2].split()[0])

    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs /proc")
    rows, _ = inputs("cpu", sizes=(1, 1, 1, 8192, 8192, 16))
    index = torch.arange(0, 8192, 1024, dtype=torch.int32).view(1, 1, -1)
    everything([x[:, :, :64] for x in rows], 32, None)  # pages in the code
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    everything(rows, 32, index)
    assert peak() - before < 16 * 2**20


# ---- errors ---------------------------------------------------------------------------------

ROWS, INDEX = inputs("cpu", grad=False)
GOOD = {
    **dict(zip(("query", "key", "value"), ROWS, strict=True)),
    "window": WINDOW,
    "global_index": INDEX,
}
BIG = torch.zeros(1, 1, 1, 257)
OF_KEYS = r"key must have shape \(2, Hkv, S, 4\) with Hkv a divisor of 4 and S >= 5, got "
ERRORS = [
    ({"query": ROWS[0].tolist()}, TypeError, "query must be a torch.Tensor, got list"),
    ({"key": ROWS[1].long()}, TypeError, "key must be float32.*got torch.int64"),
    ({"value": ROWS[2].to_sparse()}, TypeError, "value must be a dense tensor"),
    ({"query": ROWS[0][0]}, ValueError, r"query must have shape .*got \(4, 5, 4\)"),
    ({"query": ROWS[0][:, :0]}, ValueError, r"query must have .* Hq >= 1 .*got \(2, 0, 5, 4"),
    ({"query": ROWS[0][..., :0]}, ValueError, r"query must have .*got \(2, 4, 5, 0\)"),
    ({"query": BIG}, ValueError, r"query must have .* D <= 256, got \(1, 1, 1, 257\)"),
    ({"key": ROWS[1][:1]}, ValueError, OF_KEYS + r"\(1, 2, 7, 4\)"),
    ({"key": ROWS[1][0]}, ValueError, OF_KEYS + r"\(2, 7, 4\)"),
    ({"key": ROWS[1][..., :3]}, ValueError, OF_KEYS + r"\(2, 2, 7, 3\)"),
    ({"key": ROWS[1][:, :0]}, ValueError, OF_KEYS + r"\(2, 0, 7, 4\)"),
    ({"key": ROWS[1][:, [0, 1, 1]]}, ValueError, OF_KEYS + r"\(2, 3, 7, 4\)"),
    ({"key": ROWS[1][:, :, :4]}, ValueError, OF_KEYS + r"\(2, 2, 4, 4\)"),
    ({"value": ROWS[2][:, :, :6]}, ValueError, r"value must have .*\(2, 2, 7, 4\), got \(2, 2, 6"),
    ({"key": ROWS[1].double()}, TypeError, "key must have the dtype of query, torch.float32, got"),
    ({"value": ROWS[2].half()}, TypeError, "value must have the dtype of query"),
    ({"value": ROWS[2].to("meta")}, ValueError, "value must be on the device of query, cpu, got m"),
    ({"window": 0}, ValueError, "window must be in .*got 0"),
    ({"window": -3}, ValueError, "window must be in .*got -3"),
    ({"window": 2.0}, TypeError, "window must be an int, got 2.0"),
    ({"window": True}, TypeError, "window must be an int, got True"),
    ({"window": 2**63}, ValueError, "window must fit into 64 bits"),
    ({"global_index": [0]}, TypeError, "global_index must be a torch.Tensor, got list"),
    ({"global_index": INDEX.long()}, TypeError, "global_index must be int32, got torch.int64"),
    ({"global_index": INDEX[0]}, ValueError, r"global_index must have shape .*got \(2, 3\)"),
    ({"global_index": INDEX[:1]}, ValueError, r"global_index must .*Hg 1 or 2, got \(1, 2, 3\)"),
    ({"global_index": INDEX[:, [0, 1, 1]]}, ValueError, r"global_index must .*got \(2, 3, 3\)"),
    ({"global_index": INDEX[:, :0]}, ValueError, r"global_index must .*got \(2, 0, 3\)"),
    ({"global_index": INDEX.to("meta")}, ValueError, "global_index must be on .* cpu, got meta"),
    ({"scale": math.nan}, ValueError, "scale must be .*got nan"),
    ({"scale": math.inf}, ValueError, "scale must be .*got inf"),
    ({"scale": "1"}, TypeError, "scale must be a number, got '1'"),
    ({"scale": True}, TypeError, "scale must be a number, got True"),
]


@pytest.mark.parametrize(("wrong", "error", "text"), ERRORS)
def test_named_errors(backend, wrong, error, text):
    arguments = backend.place(GOOD | wrong)
    text = text.replace("cpu", backend.device)
    with pytest.raises(error, match=f"^sparse_window_attention: {text}"):
        sparse_window_attention(**arguments)


WRONG_LISTS = [
    ([7, -1, -1], "7 at 0 of list 1"),
    ([-2, -1, -1], "-2 at 0 of list 1"),
    ([2, 2, -1], "2 after 2 at 1 of list 1"),
    ([4, 2, -1], "2 after 4 at 1 of list 1"),
    ([0, 3, 2**31 - 1], "2147483647 after 3 at 2 of list 1"),
    ([0, -1, 5], "5 at 2 of list 1"),
    ([-1, -1, 5], "5 at 2 of list 1"),
]


@pytest.mark.parametrize(("wrong", "text"), WRONG_LISTS, ids=str)
def test_lists_that_are_none(backend, wrong, text, monkeypatch):
    """On the CPU they raise; elsewhere the heads that share the list are NaN, and only those."""
    rows, index = inputs(backend.device)
    good = everything(rows, WINDOW, index)
    lse = _library.native().sparse_window_attention(*rows, index, WINDOW, 0.5)[1].detach()
    index = index.clone()
    index[0, 1] = torch.tensor(wrong)
    if backend.checks_values:
        match = f"^sparse_window_attention: global_index must hold .*got {text}"
        with pytest.raises(RuntimeError, match=match):
            sparse_window_attention(*rows, WINDOW, index)
        match = match.replace("attention:", "attention_backward:")
        plain = [x.detach() for x in rows]
        backward = _library.native().sparse_window_attention_backward
        with pytest.raises(RuntimeError, match=match):
            backward(plain[0], *plain, index, lse, WINDOW, 0.5)
    else:
        for got, want in zip(everything(rows, WINDOW, index), good, strict=True):
            heads = slice(got.shape[1] // 2, None)
            assert got[0, heads].isnan().all()
            assert torch.equal(got[0, : heads.start], want[0, : heads.start])
            assert torch.equal(got[1], want[1])
    monkeypatch.setenv("TOKCORE_DEBUG", "1")
    with pytest.raises(ValueError, match="sparse_window_attention: global_index must hold asc"):
        sparse_window_attention(*rows, WINDOW, index)


def test_one_wrong_list_of_all_heads(backend):
    if backend.checks_values:
        pytest.skip("raises")
    rows, index = inputs(backend.device)
    index = index[:, :1].clone()
    want = everything(rows, WINDOW, index)
    index[0, 0, 0] = S
    for got, good in zip(everything(rows, WINDOW, index), want, strict=True):
        assert got[0].isnan().all()
        assert torch.equal(got[1], good[1])


def test_the_native_operator_checks_once_more(backend):
    rows, index = inputs(backend.device, grad=False)
    query, key, value = rows
    forward = _library.native().sparse_window_attention
    for tensors, window, text in (
        ((query.long(), key, value, None), 1, "query must be float32"),
        ((query[0], key, value, None), 1, "query must have shape"),
        ((query, key[0], value, None), 1, "key must have shape"),
        ((query, key[:1], value, None), 1, "key must have shape"),
        ((query, key[:, :, :4], value, None), 1, r"key must have shape \(B, Hkv, S, D\)"),
        ((query[:, :3], key, value, None), 1, r"key must have shape \(B, Hkv, S, D\)"),
        ((query, key, value[:1], None), 1, "value must have shape"),
        ((query, key, value.double(), None), 1, "value must be Float"),
        ((query, key, value, index.long()), 1, "global_index must be Int"),
        ((query, key, value, index[0]), 1, "global_index must have shape"),
        ((query, key, value, index[:1]), 1, "global_index must have shape"),
        ((query, key, value, None), 0, "window must be at least 1, got 0"),
    ):
        with pytest.raises(RuntimeError, match=f"sparse_window_attention: {text}"):
            forward(*tensors, window, 1.0)
    output, lse = forward(*rows, index, WINDOW, 1.0)
    backward = _library.native().sparse_window_attention_backward
    for upstream, saved, text in (
        (output[0], lse, "grad_output must have shape"),
        (output.double(), lse, "grad_output must be Float"),
        (output, lse[0], "lse must have shape"),
        (output, lse.double(), "lse must be Float"),
    ):
        with pytest.raises(RuntimeError, match=f"sparse_window_attention_backward: {text}"):
            backward(upstream, *rows, index, saved, WINDOW, 1.0)
