"""What segment_attention owes to torch, and to whoever calls it wrongly."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from tokcore import _library
from tokcore.ops import SegmentAttention, segment_attention

# torch deprecates what its own compiler imports.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
B, H, T, S, D = 2, 3, 5, 7, 4


def inputs(device, dtype=torch.float32, *, sizes=(B, H, T, S, D), grad=True):
    """Rows, segments, words."""
    batch, heads, queries, keys, dim = sizes
    generator = torch.Generator().manual_seed(0)
    rows = [
        torch.randn(batch, heads, n, dim, generator=generator).to(device, dtype)
        for n in (queries, keys, keys)
    ]
    ids = [
        torch.randint(0, most, (batch, n), generator=generator).to(device)
        for most in (2, 3)
        for n in (queries, keys)
    ]
    if grad:
        rows = [x.requires_grad_() for x in rows]
    return rows, ids[:2], {"query_words": ids[2], "key_words": ids[3]}


SIZES = [(B, H, T, S, D), (0, H, T, S, D), (B, H, 0, S, D), (B, H, T, 0, D), (B, H, 0, 0, D)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_words", [False, True])
def test_opcheck(backend, sizes, dtype, with_words):
    rows, segments, words = inputs(backend.device, dtype, sizes=sizes)
    ids = (*segments, *(words.values() if with_words else (None, None)))
    operators = _library.native()
    opcheck(operators.segment_attention, (*rows, *ids, 0.5, False))
    rows = [x.detach() for x in rows]
    opcheck(operators.segment_attention, (*rows, *ids, 0.5, True))
    output, constraint, _, stats = operators.segment_attention(*rows, *ids, 0.5, False)
    upstream = (torch.ones_like(output), torch.ones_like(constraint) if with_words else None)
    opcheck(operators.segment_attention_backward, (*upstream, *rows, *ids, stats, 0.5))


@pytest.mark.parametrize("sizes", SIZES[1:], ids=str)
def test_empty_inputs(backend, sizes):
    rows, segments, words = inputs(backend.device, sizes=sizes)
    got = segment_attention(*rows, *segments, **words, return_weights=True)
    batch, heads, queries, keys, dim = sizes
    assert got.output.shape == (batch, heads, queries, dim)
    assert got.constraint.shape == (batch, queries)
    assert got.weights.shape == (batch, queries, keys)
    assert all(value.eq(0).all() for value in got)
    grads = torch.autograd.grad(got.output.sum() + got.constraint.sum(), rows)
    assert [g.shape for g in grads] == [x.shape for x in rows]
    assert all(g.eq(0).all() for g in grads)


@pytest.mark.parametrize("which", ["both", "output", "constraint"])
def test_gradcheck(backend, which):
    rows, segments, words = inputs(backend.device, torch.float64)

    def function(*rows):
        got = segment_attention(*rows, *segments, **words)
        return {"both": got[:2], "output": got.output, "constraint": got.constraint}[which]

    torch.autograd.gradcheck(function, rows)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)])
def test_gradients_of_some(backend, needed):
    rows, segments, words = inputs(backend.device)
    got = segment_attention(*rows, *segments, **words)
    everything = torch.autograd.grad(got.output.sum() + got.constraint.sum(), rows)
    some = [x if i in needed else x.detach() for i, x in enumerate(rows)]
    got = segment_attention(*some, *segments, **words)
    grads = torch.autograd.grad(got.output.sum() + got.constraint.sum(), [rows[i] for i in needed])
    assert all(torch.equal(g, everything[i]) for i, g in zip(needed, grads, strict=True))


def test_nothing_is_asked_for_twice(backend):
    rows, segments, words = inputs(backend.device)
    got = segment_attention(*rows, *segments)
    assert isinstance(got, SegmentAttention)
    assert got.constraint is None
    assert got.weights is None
    same = segments[0].unsqueeze(2) == segments[1].unsqueeze(1)
    want = F.scaled_dot_product_attention(*rows, attn_mask=same.unsqueeze(1))
    torch.testing.assert_close(got.output, want)


def test_weights_are_not_differentiable(backend):
    rows, segments, words = inputs(backend.device)
    got = segment_attention(*rows, *segments, return_weights=True)
    with pytest.raises(NotImplementedError, match="segment_attention: weights are not diff"):
        (got.output.sum() + got.weights.sum()).backward()
    got = segment_attention(*rows, *segments, return_weights=True)
    (got.output.sum() + got.weights.detach().sum()).backward()


def test_no_second_derivative(backend):
    rows, segments, words = inputs(backend.device)
    got = segment_attention(*rows, *segments, **words)
    (grad,) = torch.autograd.grad(got.constraint.sum(), rows[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="segment_attention_backward: has no derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("with_words", [False, True])
def test_compile_without_graph_breaks(backend, with_words):
    torch._dynamo.reset()
    rows, segments, words = inputs(backend.device)

    def step(*rows):
        got = segment_attention(*(2 * x for x in rows), *segments, **(words if with_words else {}))
        return got.output.sum() + (got.constraint.sum() if with_words else 0)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    want, got = step(*rows), compiled(*rows)
    assert torch.equal(got, want)
    for a, b in zip(torch.autograd.grad(got, rows), torch.autograd.grad(want, rows), strict=True):
        assert torch.equal(a, b)


def test_compile_serves_other_lengths(backend):
    torch._dynamo.reset()

    def step(rows, segments):
        return segment_attention(*rows, *segments, return_weights=True)[::2]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for sizes in ((2, 3, 5, 7, 4), (3, 3, 6, 9, 4)):
        rows, segments, _ = inputs(backend.device, sizes=sizes, grad=False)
        for got, want in zip(compiled(rows, segments), step(rows, segments), strict=True):
            assert torch.equal(got, want)


def test_autocast_changes_nothing(backend):
    rows, segments, words = inputs(backend.device)
    want = segment_attention(*rows, *segments, **words)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        got = segment_attention(*rows, *segments, **words)
    assert torch.equal(got.output, want.output)
    assert torch.equal(got.constraint, want.constraint)


def test_vmap_and_forward_mode_are_clear_errors(backend):
    rows, segments, _ = inputs(backend.device, grad=False)

    def function(query):
        return segment_attention(query, *rows[1:], *segments).output

    with pytest.raises(NotImplementedError, match="segment_attention: cannot be batched"):
        torch.vmap(function)(torch.stack([rows[0]] * 2))
    with pytest.raises(NotImplementedError, match="segment_attention: query cannot be diff"):
        torch.func.grad(lambda query: function(query).sum())(rows[0])


def test_meta_tensors_have_the_right_shapes():
    rows, segments, words = inputs("meta", torch.bfloat16, grad=False)
    got = segment_attention(*rows, *segments, **words, return_weights=True)
    assert [value.shape for value in got] == [(B, H, T, D), (B, T), (B, T, S)]
    assert [value.dtype for value in got] == [torch.bfloat16, torch.float32, torch.float32]


def test_any_strides(backend):
    rows, segments, words = inputs(backend.device, sizes=(B, H, T, T, D), grad=False)
    want = segment_attention(*rows, *segments, **words, return_weights=True)
    packed = torch.stack(rows, 3).permute(0, 2, 3, 1, 4).contiguous()  # (B, T, 3, H, D)
    views = [x.transpose(1, 2).requires_grad_() for x in packed.unbind(2)]
    wide = [torch.stack([x, x], 2)[:, :, 0] for x in (*segments, *words.values())]
    assert not any(x.is_contiguous() for x in (*views, *wide))
    named = dict(zip(words, wide[2:], strict=True))
    got = segment_attention(*views, *wide[:2], **named, return_weights=True)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    upstream = torch.ones((), device=backend.device).expand(got.output.shape)
    grads = torch.autograd.grad(got.output, views, upstream)
    plain = [x.requires_grad_() for x in rows]
    again = torch.autograd.grad(
        segment_attention(*plain, *segments).output, plain, upstream.contiguous()
    )
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))


def test_inputs_stay_as_they_are(backend):
    rows, segments, words = inputs(backend.device)
    tensors = [*rows, *segments, *words.values()]
    before = [x.detach().clone() for x in tensors]
    got = segment_attention(*rows, *segments, **words, return_weights=True)
    torch.autograd.grad(got.output.sum() + got.constraint.sum(), rows)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_bits_do_not_depend_on_the_threads(backend):
    if backend.name != "cpu":
        pytest.skip("threads are the CPU's")
    rows, segments, words = inputs("cpu", sizes=(3, 2, 90, 70, 24))

    def everything():
        got = segment_attention(*rows, *segments, **words)
        grads = torch.autograd.grad(got.output.sin().sum() + got.constraint.sum(), rows)
        return *got[:2], *grads

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = everything()
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            assert all(torch.equal(a, b) for a, b in zip(everything(), want, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_bits_do_not_depend_on_the_order_of_threads(backend, seed):
    if backend.name != "emulated":
        pytest.skip("the emulation's seed")
    rows, segments, words = inputs("cpu")
    runs = []
    for number in (0, seed):
        with _library.use("emulated", seed=number):
            got = segment_attention(*rows, *segments, **words)
            grads = torch.autograd.grad(got.output.sum() + got.constraint.sum(), rows)
            runs.append((*got[:2], *grads))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# ---- errors ---------------------------------------------------------------------------------

ROWS, IDS, WORDS = inputs("cpu", grad=False)
GOOD = dict(
    zip(("query", "key", "value", "query_segments", "key_segments"), (*ROWS, *IDS), strict=True)
)
BIG = torch.zeros(1, 1, 1, 257)
ERRORS = [
    ({"query": ROWS[0].tolist()}, TypeError, "query must be a torch.Tensor, got list"),
    ({"key": ROWS[1].long()}, TypeError, "key must be float32.*got torch.int64"),
    ({"value": ROWS[2].to_sparse()}, TypeError, "value must be a dense tensor"),
    ({"query": ROWS[0][0]}, ValueError, r"query must have shape .*got \(3, 5, 4\)"),
    ({"query": ROWS[0][:, :0]}, ValueError, r"query must have shape .* H >= 1 .*got \(2, 0, 5, 4"),
    ({"query": ROWS[0][..., :0]}, ValueError, r"query must have .*got \(2, 3, 5, 0\)"),
    ({"query": BIG}, ValueError, r"query must have .* D <= 256, got \(1, 1, 1, 257\)"),
    ({"key": ROWS[1][:1]}, ValueError, r"key must have shape \(2, 3, S, 4\) .*got \(1, 3, 7, 4\)"),
    ({"key": ROWS[1][0]}, ValueError, r"key must have shape .*got \(3, 7, 4\)"),
    ({"value": ROWS[2][:, :, :6]}, ValueError, r"value must have .*\(2, 3, 7, 4\), got \(2, 3, 6"),
    ({"key": ROWS[1].double()}, TypeError, "key must have the dtype of query, torch.float32, got"),
    ({"value": ROWS[2].half()}, TypeError, "value must have the dtype of query"),
    ({"value": ROWS[2].to("meta")}, ValueError, "value must be on the device of query, cpu, got m"),
    ({"query_segments": IDS[0].float()}, TypeError, "query_segments must be int64 or int32, got"),
    ({"key_segments": IDS[1].bool()}, TypeError, "key_segments must be int64 or int32, got"),
    ({"query_segments": IDS[1]}, ValueError, r"query_segments must .*\(2, 5\) .*got \(2, 7\)"),
    ({"key_segments": IDS[1][0]}, ValueError, r"key_segments must .*\(2, 7\) .*got \(7,\)"),
    ({"key_segments": IDS[1].to("meta")}, ValueError, "key_segments must .* on cpu, got .* meta"),
    ({"query_segments": None}, TypeError, "query_segments must be a torch.Tensor, got NoneType"),
    ({"query_words": IDS[0]}, ValueError, "query_words and key_words go together, got query_words"),
    ({"key_words": IDS[1]}, ValueError, "query_words and key_words go together, got key_words a"),
    (WORDS | {"key_words": IDS[0]}, ValueError, r"key_words must .*\(2, 7\) .*got \(2, 5\)"),
    (WORDS | {"key_words": IDS[1].half()}, TypeError, "key_words must be int64 or int32"),
    ({"scale": math.nan}, ValueError, "scale must be .*got nan"),
    ({"scale": math.inf}, ValueError, "scale must be .*got inf"),
    ({"scale": -math.inf}, ValueError, "scale must be .*got -inf"),
    ({"scale": "1"}, TypeError, "scale must be a number, got '1'"),
    ({"scale": True}, TypeError, "scale must be a number, got True"),
]


@pytest.mark.parametrize(("wrong", "error", "text"), ERRORS)
def test_named_errors(backend, wrong, error, text):
    arguments = backend.place(GOOD | wrong)
    text = text.replace("cpu", backend.device)
    with pytest.raises(error, match=f"^segment_attention: {text}"):
        segment_attention(**arguments)


def test_the_native_operator_checks_once_more(backend):
    rows, segments, words = inputs(backend.device, grad=False)
    queries, keys = segments
    forward = _library.native().segment_attention
    for tensors, text in (
        ((rows[0].long(), *rows[1:], queries, keys, None, None), "query must be float32"),
        ((rows[0][0], *rows[1:], queries, keys, None, None), "query must have shape"),
        ((rows[0], rows[1][0], rows[2], queries, keys, None, None), "key must have shape"),
        ((*rows[:2], rows[2][:1], queries, keys, None, None), "value must have shape"),
        ((*rows[:2], rows[2].double(), queries, keys, None, None), "value must be Float"),
        ((*rows, queries.float(), keys, None, None), "query_segments must be int64 or int32"),
        ((*rows, queries, queries, None, None), "key_segments must have shape"),
        ((*rows, queries, keys, queries, None), "query_words and key_words go together"),
    ):
        with pytest.raises(RuntimeError, match=f"segment_attention: {text}"):
            forward(*tensors, 1.0, False)
    output, _, _, stats = forward(*rows, queries, keys, None, None, 1.0, False)
    backward = _library.native().segment_attention_backward
    ids = (queries, keys, None, None)
    for upstream, saved, text in (
        ((output[0], None), stats, "grad_output must have shape"),
        ((output, output[:, 0, :, 0]), stats, "grad_constraint needs query_words"),
        ((output, None), stats[0], "stats must have shape"),
        ((output, None), stats.double(), "stats must be Float"),
    ):
        with pytest.raises(RuntimeError, match=f"segment_attention_backward: {text}"):
            backward(*upstream, *rows, *ids, saved, 1.0)
