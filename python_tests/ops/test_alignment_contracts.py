"""What dtw, monotonic_search and monotonic_align owe to torch, to hardware, and to whoever calls
them wrongly.
"""

import math
import os
import subprocess
import sys

import pytest
import torch
from lattices import INF, NAN, ragged, whole_numbers
from torch.library import opcheck

import tokcore
from tokcore import _library
from tokcore.ops import dtw, monotonic_align, monotonic_search

# torch deprecates what its own compiler imports.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
OPERATORS = {"dtw": dtw, "monotonic_search": monotonic_search, "monotonic_align": monotonic_align}
ARGUMENT = {"dtw": "cost", "monotonic_search": "scores", "monotonic_align": "scores"}
CLOSED = {"dtw": INF, "monotonic_search": -INF, "monotonic_align": -INF}
every_operator = pytest.mark.parametrize("name", OPERATORS)
SUMS = [torch.float64, torch.float32]
# Wide, as the search needs them; one of each around 4 rows, 16 lanes, 32 threads.
SIZES = [(3, 5), (4, 4), (33, 40), (17, 70), (1, 9)]


def draw(seed=1, sizes=SIZES, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator, dtype=dtype) for size in sizes]


def assert_same(got, want):
    """Bit for bit, NaN included."""
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=0, atol=0, equal_nan=True)


def assert_wrong(result, item):
    """A sum that is NaN, -1 in everything else."""
    value, *integers = (part[item].cpu() for part in result)
    assert value.isnan()
    assert all((part == -1).all() for part in integers)


def assert_only_one_is_wrong(name, arguments, item, text, good, **options):
    """On the CPU an error that says ``text``; elsewhere ``item`` is undefined and the others are
    those of the ``good`` arguments.
    """
    if good is None:
        with pytest.raises(RuntimeError, match=f"^{name}: {text} in item {item}$"):
            OPERATORS[name](*arguments, **options)
        return
    got, want = OPERATORS[name](*arguments, **options), OPERATORS[name](*good, **options)
    assert_wrong(got, item)
    others = [other for other in range(len(arguments[0])) if other != item]
    assert_same([part[others] for part in got], [part[others] for part in want])


# ---- values that are wrong ----------------------------------------------------------------------


@every_operator
@pytest.mark.parametrize("dtype", SUMS, ids=str)
@pytest.mark.parametrize("place", [(0, 0), (32, 39), (16, 35)])
@pytest.mark.parametrize("bad", ["nan", "infinite", "large"])
def test_a_value_that_is_wrong(backend, name, dtype, place, bad):
    batch, *lengths = ragged(draw(dtype=dtype), backend.device)
    largest = torch.finfo(dtype).max / (4 * (33 + 40 + 1))
    value = {"nan": NAN, "infinite": -CLOSED[name], "large": -1.000001 * largest}[bad]
    wrong = batch.clone()
    wrong[(2, *place)] = value
    text = rf"{ARGUMENT[name]} must be finite or -?inf and at most .* in size, got .*"
    good = None if backend.checks_values else (batch, *lengths)
    assert_only_one_is_wrong(name, (wrong, *lengths), 2, text, good, dtype=dtype)
    if bad == "large" and dtype == torch.float32:
        OPERATORS[name](wrong, *lengths)  # not too large for sums in float64


@every_operator
def test_the_first_wrong_item_is_named(name):
    cost = torch.zeros(100, 3, 4)
    cost[[97, 31, 60]] = NAN
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 8):
            torch.set_num_threads(number)
            with pytest.raises(RuntimeError, match=r"got nan in item 31$"):
                OPERATORS[name](cost)
    finally:
        torch.set_num_threads(threads)


@every_operator
@pytest.mark.parametrize("dtype", SUMS, ids=str)
def test_as_large_as_may_be(backend, name, dtype):
    """Times a power of two just below the limit: the same paths, the sums as large."""
    options = {"length_penalty": 0.0} if name == "monotonic_align" else {}
    matrices = [matrix.clamp(-1, 1) for matrix in draw(2, dtype=dtype)]
    scale = 2.0 ** math.floor(math.log2(torch.finfo(dtype).max / (4 * (17 + 70 + 1))))
    batch, *lengths = ragged(matrices, backend.device)
    want = OPERATORS[name](batch, *lengths, dtype=dtype, **options)
    got = OPERATORS[name](batch * scale, *lengths, dtype=dtype, **options)
    assert got[0].isfinite().all()
    assert_same(got, (want[0] * scale, *want[1:]))


@every_operator
@pytest.mark.parametrize("which", ["row_lengths", "column_lengths"])
@pytest.mark.parametrize("bad", [-1, 1, 2**31, 2**62, -(2**63)], ids=str)
def test_a_length_out_of_range(backend, name, which, bad, monkeypatch):
    matrices = [matrix[:3, :5] for matrix in draw() if matrix.shape[0] > 2]
    batch = torch.stack([torch.nn.functional.pad(m, (0, 5 - m.shape[1])) for m in matrices])
    batch = batch.to(backend.device)
    full = {"row_lengths": 3, "column_lengths": 5}
    lengths = torch.full((len(batch),), full[which], device=backend.device)
    good = {which: lengths.clone()}
    lengths[1] = full[which] + 1 if bad == 1 else bad
    text = r"row_lengths and column_lengths must be in \[0, 3\] and \[0, 5\], got .* in item 1$"
    if backend.checks_values:
        with pytest.raises(RuntimeError, match=f"^{name}: {text}"):
            OPERATORS[name](batch, **{which: lengths})
    else:
        got, want = OPERATORS[name](batch, **{which: lengths}), OPERATORS[name](batch, **good)
        assert_wrong(got, 1)
        assert_same([part[[0, 2, 3]] for part in got], [part[[0, 2, 3]] for part in want])
    monkeypatch.setenv("TOKCORE_DEBUG", "1")
    text = rf"^{name}: {which} must lie in \[0, {full[which]}\], got .*{lengths[1].item()}"
    with pytest.raises(ValueError, match=text):
        OPERATORS[name](batch, **{which: lengths})
    assert_same(OPERATORS[name](batch, **good), OPERATORS[name](batch))


@every_operator
def test_a_wrong_value_raises_everywhere_when_debugging(backend, name, monkeypatch):
    monkeypatch.setenv("TOKCORE_DEBUG", "1")
    batch = torch.zeros(3, 2, 4, device=backend.device)
    OPERATORS[name](batch)
    batch[1, 0, 0] = NAN
    with pytest.raises((RuntimeError, ValueError), match=rf"^{name}: .* in item 1$"):
        OPERATORS[name](batch)


# ---- inputs of every form -----------------------------------------------------------------------


@every_operator
def test_strides(backend, name):
    """Transposed, sliced, every other item, expanded; and nothing is written to."""
    operator = OPERATORS[name]
    generator = torch.Generator().manual_seed(6)
    batch = torch.randn(3, 5, 7, generator=generator).to(backend.device)
    want = operator(batch)
    turned = batch.transpose(1, 2).contiguous().transpose(1, 2)
    inside = torch.full((6, 9, 12), NAN, device=backend.device)
    inside[::2, 2:7, 4:11] = batch
    before = inside.clone()
    for view in (turned, inside[::2, 2:7, 4:11], batch.permute(2, 0, 1).clone().permute(1, 2, 0)):
        assert_same(operator(view), want)
    torch.testing.assert_close(inside, before, rtol=0, atol=0, equal_nan=True)
    once = batch[:1].expand(3, 5, 7)
    assert_same(operator(once), [part[:1].expand_as(part) for part in want])
    lengths = torch.tensor([[5, 9], [3, 9], [0, 9]], device=backend.device)
    want = operator(batch, lengths[:, 0].contiguous(), lengths[:, 0] + 2)
    assert_same(operator(batch, lengths[:, 0], (lengths[:, 0] + 2).int()), want)
    assert_same(operator(batch, lengths[:, 0].int(), lengths[:, 0] + 2), want)


@every_operator
def test_dtypes(backend, name):
    """Half precision is read as it is; sums are in ``dtype``."""
    batch = torch.stack(whole_numbers([(4, 6)] * 3, 0.25, CLOSED[name])).to(backend.device)
    wide, narrow = OPERATORS[name](batch), OPERATORS[name](batch.float(), dtype=torch.float32)
    assert wide[0].dtype == torch.float64
    assert narrow[0].dtype == torch.float32
    assert {part.dtype for part in (*wide[1:], *narrow[1:])} == {torch.int32}
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert_same(OPERATORS[name](batch.to(dtype)), wide)
        assert_same(OPERATORS[name](batch.to(dtype), dtype=torch.float32), narrow)


@every_operator
def test_full_lengths_are_the_default(backend, name):
    batch = torch.stack(draw(sizes=[(3, 5)] * 2)).to(backend.device)
    rows, columns = torch.tensor([[3, 3], [5, 5]], device=backend.device)
    want = OPERATORS[name](batch)
    for lengths in ((rows,), (None, columns), (rows, columns)):
        assert_same(OPERATORS[name](batch, *lengths), want)


@every_operator
def test_an_item_depends_on_itself_alone(backend, name):
    """Not on what stands beside it, how much is padded, its place, or the number of threads."""
    matrices = [*draw(), *whole_numbers(SIZES, 0.25, CLOSED[name])]
    want = OPERATORS[name](*ragged(matrices, backend.device))
    order = [7, 2, 2, 0, 9]
    moved = OPERATORS[name](*ragged([matrices[i] for i in order], backend.device))
    assert_same([moved[0]], [want[0][order]])
    for position, i in enumerate(order):
        alone = OPERATORS[name](*ragged([matrices[i]], backend.device))
        for a, b in zip(alone[1:], (part[position] for part in moved[1:]), strict=True):
            inner = b[tuple(slice(size) for size in a[0].shape)]
            assert torch.equal(inner, a[0])
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3, 8):
            torch.set_num_threads(number)
            assert_same(OPERATORS[name](*ragged(matrices, backend.device)), want)
    finally:
        torch.set_num_threads(threads)


@every_operator
def test_emulated_threads_in_any_order_give_what_the_cpu_gives(backend, name):
    if backend.name != "emulated":
        pytest.skip("there is nothing to reorder")
    arguments = ragged([*draw(3), *whole_numbers(SIZES, 0.25, CLOSED[name])])
    with _library.use("native"):
        want = OPERATORS[name](*arguments)
    for seed in range(1, 6):
        with _library.use("emulated", seed=seed):
            assert_same(OPERATORS[name](*arguments), want)


PROGRAM = """
import sys, torch, tokcore
calls = torch.load(sys.argv[1])
found = []
for name, arguments, dtype in calls:
    found.append(tuple(getattr(tokcore.ops, name)(*arguments, dtype=dtype)))
torch.save((tokcore.build_info()["isa"], found), sys.argv[1])
"""


def awkward(dtype, name):
    """Scores of every size: where an inverse would not do for a division, and far above."""
    limits = torch.finfo(dtype)
    small = 2.0**-900 if dtype == torch.float64 else 2.0**-60
    plain = draw(4, [(33, 40), (70, 129)])
    units = [x.sign() * (1 + (x * 4).round().abs() * limits.eps) for x in plain]
    large = limits.max / 1024
    matrices = [*plain, *units, *whole_numbers([(33, 40)] * 2, 0.25, CLOSED[name])]
    matrices += [x * small for x in units] + [x * small / 2 for x in units]
    matrices += [x * limits.tiny for x in units] + [x * limits.smallest_normal / 3 for x in plain]
    matrices += [torch.where(x > 0, x * small, x) for x in plain]
    matrices += [x * large for x in (x.clamp(-1, 1) for x in plain)]
    return [matrix.to(dtype) for matrix in matrices]


def test_every_instruction_set_gives_the_same_bits(tmp_path):
    calls = [(name, ragged(awkward(dtype, name)), dtype) for name in OPERATORS for dtype in SUMS]
    want = [tuple(OPERATORS[name](*given, dtype=dtype)) for name, given, dtype in calls]
    info = tokcore.build_info()
    for level in info["isas_available"]:
        if level == info["isa"]:
            continue
        file = tmp_path / level
        torch.save(calls, file)
        environment = dict(os.environ, TOKCORE_ISA=level)
        subprocess.run([sys.executable, "-c", PROGRAM, file], env=environment, check=True)
        used, found = torch.load(file)
        assert used == level
        for got, expected in zip(found, want, strict=True):
            assert_same(got, expected)


# ---- torch --------------------------------------------------------------------------------------


@every_operator
@pytest.mark.parametrize("shape", [(2, 3, 4), (0, 3, 4), (2, 0, 0)], ids=str)
def test_opcheck(backend, name, shape):
    scores = torch.randn(shape, device=backend.device)
    lengths = torch.full(shape[:1], min(shape[1], 2), device=backend.device)
    penalty = (0.5,) if name == "monotonic_align" else ()
    for rows, columns, wide in ((None, None, True), (lengths, lengths + 0, False)):
        opcheck(getattr(_library.native(), name), (scores, rows, columns, *penalty, wide))


@every_operator
def test_compile_without_graph_breaks(backend, name):
    """Also where sizes are symbols."""
    torch._dynamo.reset()
    operator = OPERATORS[name]

    def step(scores, lengths):
        return operator(scores * 2, lengths, lengths + 1)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((3, 4, 5), (2, 6, 9)):
        generator = torch.Generator().manual_seed(7)
        scores = torch.randn(shape, generator=generator).to(backend.device)
        lengths = torch.tensor([4, 2, 0][: shape[0]], device=backend.device)
        assert_same(compiled(scores, lengths), step(scores, lengths))


@every_operator
def test_vmap_is_a_clear_error(backend, name):
    scores = torch.zeros(2, 3, 4, 5, device=backend.device)
    with pytest.raises(NotImplementedError, match=f"^{name}: cannot be batched by torch.vmap"):
        torch.vmap(lambda one: OPERATORS[name](one)[0])(scores)


@every_operator
def test_there_is_no_derivative(backend, name):
    """Not in silence either, where the operator is called by itself."""
    scores = torch.rand(2, 3, 4, device=backend.device, requires_grad=True)
    text = f"^{name}: {ARGUMENT[name]} must not require grad"
    with pytest.raises(ValueError, match=text):
        OPERATORS[name](scores)
    with pytest.raises(ValueError, match=text):
        torch.func.grad(lambda x: OPERATORS[name](x)[0].sum())(scores.detach())
    penalty = (0.5,) if name == "monotonic_align" else ()
    value, *_ = getattr(_library.native(), name)(scores, None, None, *penalty, True)
    with pytest.raises(NotImplementedError, match=f"{name}: has no derivative"):
        value.sum().backward()


@every_operator
def test_autocast_changes_nothing(backend, name):
    scores = torch.stack(draw(sizes=[(3, 5)], dtype=torch.float32)).to(backend.device)
    want = OPERATORS[name](scores)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        assert_same(OPERATORS[name](scores), want)


@every_operator
def test_meta_tensors_have_the_shapes_and_types_of_real_ones(name):
    for shape in ((2, 3, 4), (2, 0, 0), (0, 3, 3)):
        for dtype in SUMS:
            want = OPERATORS[name](torch.zeros(shape), dtype=dtype)
            got = OPERATORS[name](torch.zeros(shape, device="meta"), dtype=dtype)
            for a, b in zip(got, want, strict=True):
                assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


# ---- errors -------------------------------------------------------------------------------------

X, LENGTHS = torch.zeros(2, 3, 4), torch.tensor([3, 3])
ERRORS = [
    ({0: [[[1.0]]]}, TypeError, "ARGUMENT must be a torch.Tensor, got list"),
    ({0: X.long()}, TypeError, "ARGUMENT must be float32, .*, got torch.int64"),
    ({0: X.cfloat()}, TypeError, "ARGUMENT must be float32, .*, got torch.complex64"),
    ({0: X.to_sparse()}, TypeError, "ARGUMENT must be a dense tensor, got torch.sparse_coo"),
    ({0: X[0]}, ValueError, r"ARGUMENT must have shape \(B, M, L\), got \(3, 4\)"),
    ({0: X[None]}, ValueError, r"ARGUMENT must have shape \(B, M, L\), got \(1, 2, 3, 4\)"),
    ({0: X.double(), "dtype": torch.float32}, TypeError, "dtype float32 would round ARGUMENT, got"),
    ({"dtype": torch.float16}, TypeError, "dtype must be torch.float64 or .* got torch.float16"),
    ({"dtype": None}, TypeError, "dtype must be torch.float64 or torch.float32, got None"),
    ({1: [3, 3]}, TypeError, "row_lengths must be a torch.Tensor, got list"),
    ({2: 3}, TypeError, "column_lengths must be a torch.Tensor, got int"),
    ({1: LENGTHS.float()}, TypeError, "row_lengths must be int64 or int32, got torch.float32"),
    ({2: LENGTHS.short()}, TypeError, "column_lengths must be int64 or int32, got torch.int16"),
    ({1: LENGTHS > 0}, TypeError, "row_lengths must be int64 or int32, got torch.bool"),
    ({1: LENGTHS[:1]}, ValueError, r"row_lengths must have shape \(2,\) .* got \(1,\) on"),
    ({2: LENGTHS[:, None]}, ValueError, r"column_lengths must have shape \(2,\) .* got \(2, 1\)"),
    ({1: LENGTHS[0]}, ValueError, r"row_lengths must have shape \(2,\) .* got \(\) on"),
    ({2: LENGTHS.to("meta")}, ValueError, r"column_lengths must have shape .* on meta"),
]


@every_operator
@pytest.mark.parametrize(("wrong", "error", "text"), ERRORS)
def test_named_errors(backend, name, wrong, error, text):
    arguments = [X, LENGTHS, LENGTHS]
    options = {key: value for key, value in wrong.items() if isinstance(key, str)}
    for position in range(3):
        value = wrong.get(position, arguments[position])
        on_cpu = getattr(value, "is_cpu", False)
        arguments[position] = value.to(backend.device) if on_cpu else value
    with pytest.raises(error, match=f"^{name}: {text.replace('ARGUMENT', ARGUMENT[name])}"):
        OPERATORS[name](*arguments, **options)


@every_operator
def test_the_native_operator_checks_once_more(backend, name):
    scores, lengths = X.to(backend.device), LENGTHS.to(backend.device)
    penalty = (0.5,) if name == "monotonic_align" else ()
    value = ARGUMENT[name]
    for arguments, wide, text in (
        ((scores.half(), None, None), True, f"{value} must be float32 or float64, got Half"),
        ((scores[0], None, None), True, rf"{value} must have shape \(B, M, L\), got \(3, 4\)"),
        ((scores.double(), None, None), False, f"dtype float32 would round {value}, got Double"),
        ((scores, lengths.int(), None), True, "row_lengths must be Long, got Int"),
        ((scores, None, lengths[:1]), True, r"column_lengths must have shape \(2,\), got \(1,\)"),
    ):
        with pytest.raises(RuntimeError, match=f"{name}: {text}"):
            getattr(_library.native(), name)(*arguments, *penalty, wide)
