"""What every operator owes to torch: opcheck, gradcheck, compile, autocast, vmap, determinism."""

import pytest
import torch
from accuracy import OPERATORS, SEQUENTIAL_KL, TOKEN_LOGPROB, draw, draw_target, leaves
from torch.autograd import forward_ad
from torch.library import opcheck

from tokcore import _library

# torch deprecates what its own inductor and forward mode import.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
every_operator = pytest.mark.parametrize("operator", OPERATORS, ids=str)


def inputs(backend, operator, *shape, dtype=torch.float32, seed=0):
    logits = [draw("wide", *shape, seed=seed + s) for s in range(operator.logits)]
    target = draw_target(shape[:-1], shape[-1], seed)
    return [x.to(backend.device, dtype) for x in logits], target.to(backend.device)


def token_logprob_arguments(device, rows, dtype, *, full):
    """Arguments of the forward and backward schemas, every optional one present or absent."""
    x, y = (torch.randn(rows, 17, device=device, dtype=dtype) for _ in range(2))
    column = torch.rand(rows, device=device) + 0.5
    target = draw_target((rows,), 17).to(device)
    t = column if full else None
    forward = (x, target, t, 1.5, 3.0 if full else 0.0, -100, full, False)
    stats = _library.native().token_logprob(*forward)
    backward = (column, column if full else None, x, target, stats[1], stats[2], *forward[2:6])
    return {"token_logprob": forward, "token_logprob_backward": backward}, y


def sequential_kl_arguments(device, rows, dtype, *, full):
    x, y = (torch.randn(rows, 17, device=device, dtype=dtype) for _ in range(2))
    column = torch.rand(rows, device=device) + 0.5
    target = draw_target((rows,), 17).to(device) if full else None
    mask = column > 0.8 if full else None
    options = (column if full else None, 1.5, -100)
    forward = (x, y, target, mask, *options, 3 if full else 1, full, False)
    kl, reverse_kl, _, _, entropy, stats = _library.native().sequential_kl(*forward)
    upstream = (column,) * 5 if full else (column, None, None, None, None)
    backward = (*upstream, x, y, target, mask, kl, reverse_kl, entropy, stats, *options, True, full)
    return {"sequential_kl": forward, "sequential_kl_backward": backward}, y


@pytest.mark.parametrize("arguments", [token_logprob_arguments, sequential_kl_arguments])
@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("full", [False, True])
def test_opcheck(backend, arguments, rows, dtype, full):
    cases, _ = arguments(backend.device, rows, dtype, full=full)
    for name, values in cases.items():
        operator = getattr(_library.native(), name)
        opcheck(operator, values)
        if not name.endswith("_backward"):
            logits = len([v for v in values[:2] if torch.is_floating_point(v)])
            opcheck(operator, (*leaves(list(values[:logits])), *values[logits:]))
        else:  # the in-place twin, without the two flags that it does not take
            count = len(getattr(_library.native(), f"{name}_").default._schema.arguments)
            opcheck(getattr(_library.native(), f"{name}_"), values[:count])


@every_operator
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"temperature": "per row"}], ids=str)
def test_gradcheck_in_double(backend, operator, options):
    if backend.name != "cpu":
        pytest.skip("double is for the CPU")
    logits, target = inputs(backend, operator, 3, 13, dtype=torch.float64)
    if options.get("temperature") == "per row":
        options = {"temperature": torch.tensor([0.5, 1.0, 2.0])}
    if operator is TOKEN_LOGPROB:
        options = {**options, "softcap": 9.0}
        target = torch.stack([target, target.flip(0), target], -1)
    else:
        options = {**options, "mask": torch.tensor([True, True, False])}
    assert torch.autograd.gradcheck(
        lambda *x: operator.call(list(x), target, **options), leaves(logits)
    )


@every_operator
def test_second_derivatives_raise_and_name_the_operator(backend, operator):
    logits, target = inputs(backend, operator, 3, 13)
    leaf = leaves(logits)
    (grad, *_) = torch.autograd.grad(operator.call(leaf, target)[0].sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"{operator}_backward.*double backward"):
        grad.sum().backward()


@every_operator
def test_forward_mode_and_functional_derivatives_raise(backend, operator):
    """Forward mode would get a zero tangent without a word."""
    logits, target = inputs(backend, operator, 3, 13)

    def loss(*x):
        return operator.call(list(x), target)[0].sum()

    message = f"{operator}: .*torch.func"
    with pytest.raises(NotImplementedError, match=message):
        torch.func.grad(loss)(*logits)
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(loss, tuple(logits), tuple(logits))
    with pytest.raises(NotImplementedError, match=message), forward_ad.dual_level():
        loss(*(forward_ad.make_dual(x, x) for x in logits))


@every_operator
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(backend, operator, dynamic):
    if backend.name == "emulated" and dynamic:
        pytest.skip("says the same as cpu, slowly")
    torch._dynamo.reset()

    def step(logits, target, temperature):
        values = operator.call(logits, target, temperature=temperature)
        return [value * 2 for value in values]

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 5):
        logits, target = inputs(backend, operator, rows, 37)
        for temperature in (0.7, torch.full((rows,), 1.3, device=backend.device)):
            eager, traced = leaves(logits), leaves(logits)
            want, got = step(eager, target, temperature), compiled(traced, target, temperature)
            assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
            sum(x.sum() for x in want).backward()
            sum(x.sum() for x in got).backward()
            assert all(torch.equal(a.grad, b.grad) for a, b in zip(eager, traced, strict=True))


def test_compile_with_inductor(backend):
    if backend.name == "emulated":
        pytest.skip("says the same as cpu, slowly")
    torch._dynamo.reset()
    logits, target = inputs(backend, TOKEN_LOGPROB, 3, 37)
    compiled = torch.compile(lambda x: TOKEN_LOGPROB.call([x * 2], target), fullgraph=True)
    want = TOKEN_LOGPROB.call([logits[0] * 2], target)
    torch.testing.assert_close(compiled(logits[0]), want)


@every_operator
def test_autocast_changes_nothing(backend, operator):
    logits, target = inputs(backend, operator, 3, 37)
    leaf = leaves(logits)
    want = operator.call(leaf, target)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        got = operator.call(leaf, target)
    assert all(
        torch.equal(a, b) and b.dtype == torch.float32 for a, b in zip(want, got, strict=True)
    )


@every_operator
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_vmap(backend, operator, dim):
    """A batch is one more leading dimension; what is not batched is shared."""
    logits, _ = inputs(backend, operator, 4, 3, 13)
    target = draw_target((3,), 13).to(backend.device)
    leaf = leaves(logits)
    want = operator.call(leaf, target.expand(4, 3), temperature=0.5)
    moved = [x.movedim(0, dim) for x in leaf]
    got = torch.vmap(
        lambda *x: operator.call(list(x), target, temperature=0.5), in_dims=(dim,) * len(leaf)
    )(*moved)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    expected = torch.autograd.grad(sum(x.sum() for x in want), leaf)
    grads = torch.autograd.grad(sum(x.sum() for x in got), leaf)
    assert all(torch.equal(a, b) for a, b in zip(expected, grads, strict=True))


def test_vmap_over_targets_temperatures_and_masks(backend):
    logits, _ = inputs(backend, SEQUENTIAL_KL, 3, 13)
    target = draw_target((4, 3), 13).to(backend.device)
    temperature = torch.rand(4, 3, device=backend.device) + 0.5
    mask = torch.rand(4, 3, device=backend.device) > 0.3
    got = torch.vmap(
        lambda y, t, m: SEQUENTIAL_KL.call(logits, y, temperature=t, mask=m),
    )(target, temperature, mask)
    expanded = [x.expand(4, 3, 13) for x in logits]
    want = SEQUENTIAL_KL.call(expanded, target, temperature=temperature, mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@every_operator
def test_meta_tensors_have_the_right_shapes(operator):
    logits = [torch.empty(2, 3, 7, device="meta", dtype=torch.bfloat16)] * operator.logits
    values = operator.call(logits, torch.empty(2, 3, device="meta", dtype=torch.long))
    assert all(value.shape == (2, 3) and value.dtype == torch.float32 for value in values)
