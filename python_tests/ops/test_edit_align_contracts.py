"""What edit_align owes to torch, and to whoever calls it wrongly."""

import pytest
import torch
from torch.library import opcheck

from tokcore import _library
from tokcore.ops import edit_align

# torch deprecates what its own compiler imports.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
A = torch.tensor([[1, 2, 3, 4], [5, 5, 6, 7], [8, 8, 8, 8]])
B = torch.tensor([[2, 3, 9], [5, 6, 6], [7, 8, 7]])
LENGTHS = torch.tensor([4, 3, 0])


@pytest.mark.parametrize("pairs", [0, 3])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("cut", [False, True])
def test_opcheck(backend, pairs, dtype, cut):
    a, b = (value[:pairs].to(backend.device, dtype) for value in (A, B))
    lengths = LENGTHS[:pairs].to(backend.device, dtype)
    tensors = (a, b, lengths, lengths.clamp(max=3)) if cut else (a, b, None, None)
    opcheck(_library.native().edit_align, tensors)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(backend, dynamic):
    torch._dynamo.reset()

    def step(a, b, lengths):
        result = edit_align(a + 1, b + 1, lengths)
        return result.distance + 1, result.operations, result.gap_counts

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    arguments = [value.to(backend.device) for value in (A, B, LENGTHS)]
    for x, y in zip(compiled(*arguments), step(*arguments), strict=True):
        assert torch.equal(x, y)


def test_vmap_is_one_dimension_more(backend):
    a, b, lengths = (value.to(backend.device) for value in (A, B, LENGTHS))
    want = edit_align(a, b, lengths)
    for got in (
        torch.vmap(edit_align)(a, b, lengths),
        torch.vmap(edit_align, in_dims=(1, 0, 0))(a.T, b, lengths),
    ):
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    shared = torch.vmap(lambda row: edit_align(row, b[0]))(a)
    want = edit_align(a, b[:1].expand(3, 3))
    assert all(torch.equal(x, y) for x, y in zip(shared, want, strict=True))
    nested = torch.vmap(edit_align)(a.view(3, 1, 4), b.view(3, 1, 3))
    assert nested.operations.shape == (3, 1, 7)


def test_meta_tensors_have_the_right_shapes():
    result = edit_align(A.to("meta"), B.to("meta"))
    assert [tuple(value.shape) for value in result] == [(3,), (3, 7), (3,), (3, 4), (3, 5)]


ERRORS = [
    ({"hypothesis": A.tolist()}, TypeError, "hypothesis must be a torch.Tensor, got list"),
    ({"hypothesis": A.float()}, TypeError, "hypothesis must be int64 or int32, got torch.float32"),
    ({"reference": B.bool()}, TypeError, "reference must be int64 or int32, got torch.bool"),
    ({"reference": B.to_sparse()}, TypeError, "reference must be a dense tensor"),
    ({"hypothesis": A[0, 0]}, ValueError, "hypothesis must have at least one dimension"),
    ({"reference": B[:2]}, ValueError, r"reference must have shape \(3, R\).*got \(2, 3\)"),
    ({"reference": B[:1]}, ValueError, r"reference must have shape .*nothing is broadcast"),
    ({"reference": B[0]}, ValueError, r"reference must have shape \(3, R\).*got \(3,\)"),
    ({"reference": B.to("meta")}, ValueError, "reference must have shape .* on meta"),
    ({"hypothesis_lengths": [4, 4, 4]}, TypeError, "hypothesis_lengths must be a torch.Tensor"),
    ({"hypothesis_lengths": LENGTHS.float()}, TypeError, "hypothesis_lengths must be int64"),
    ({"reference_lengths": LENGTHS[:2]}, ValueError, r"reference_lengths must have shape \(3,\)"),
    ({"reference_lengths": B}, ValueError, r"reference_lengths must have shape .*got \(3, 3\)"),
    ({"reference_lengths": LENGTHS.to("meta")}, ValueError, "reference_lengths must .*on meta"),
]


@pytest.mark.parametrize(("wrong", "error", "text"), ERRORS)
def test_named_errors(backend, wrong, error, text):
    arguments = backend.place({"hypothesis": A, "reference": B} | wrong)
    with pytest.raises(error, match=f"^edit_align: {text}"):
        edit_align(**arguments)


def test_the_native_operator_checks_once_more(backend):
    a, b, lengths = (value.to(backend.device) for value in (A, B, LENGTHS))
    for tensors, text in (
        ((a.float(), b, None, None), "hypothesis must be int64 or int32, got Float"),
        ((a, b.short(), None, None), "reference must be int64 or int32, got Short"),
        ((a, b[:2], None, None), r"reference must have shape \(3, 3\), got \(2, 3\)"),
        ((a, b[0, 0], None, None), r"hypothesis and reference must have shapes .*and \(\)"),
        ((a, b, lengths[:2], None), r"hypothesis_lengths must have shape \(3,\), got \(2,\)"),
        ((a, b, None, lengths.float()), "reference_lengths must be int64 or int32, got Float"),
    ):
        with pytest.raises(RuntimeError, match=f"edit_align: {text}"):
            _library.native().edit_align(*tensors)
    huge = torch.zeros(1, 1, dtype=torch.int32, device=backend.device).expand(1, 2**31 - 1)
    with pytest.raises(RuntimeError, match=r"edit_align: .*fewer than 2147483647 tokens together"):
        _library.native().edit_align(huge, huge, None, None)


def test_autocast_changes_nothing(backend):
    want = edit_align(A.to(backend.device), B.to(backend.device))
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        got = edit_align(A.to(backend.device), B.to(backend.device))
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
