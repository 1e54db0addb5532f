"""inplace_backward: the same gradient without memory of its own, and no silent harm."""

import pytest
import torch
from accuracy import OPERATORS, SEQUENTIAL_KL, draw, draw_target, leaves, upstream_of

from tokcore import _library

every_operator = pytest.mark.parametrize("operator", OPERATORS, ids=str)


def hidden(backend, operator, *shape, dtype=torch.float32):
    """A leaf whose double is the logits that may be overwritten, the reference, the target."""
    leaf = draw("wide", *shape).to(backend.device, dtype).requires_grad_()
    reference = draw("wide", *shape, seed=1).to(backend.device, dtype)
    target = draw_target(shape[:-1], shape[-1]).to(backend.device)
    return leaf, [reference][: operator.logits - 1], target


@every_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1, 31, 1003])
def test_gradient_is_bit_equal_and_lies_in_the_logits(backend, operator, dtype, size):
    leaf, reference, target = hidden(backend, operator, 5, size, dtype=dtype)
    values = operator.call([leaf * 2, *reference], target, temperature=0.8)
    upstream = [g.to(v.dtype) for g, v in zip(upstream_of(values), values, strict=True)]
    differentiable = [i for i, value in enumerate(values) if value.requires_grad]

    def backward(logits, **options):
        values = operator.call([logits, *reference], target, temperature=0.8, **options)
        torch.autograd.backward(
            [values[i] for i in differentiable], [upstream[i] for i in differentiable]
        )
        return values

    logits = leaf * 2
    want = backward(logits)
    want_grad, leaf.grad = leaf.grad, None
    logits = leaf * 2
    before = logits._version
    got = backward(logits, inplace_backward=True)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    assert torch.equal(leaf.grad, want_grad)
    assert torch.equal(2 * logits, want_grad)
    assert logits._version == before + 1


@every_operator
def test_slices_are_overwritten_where_they_lie(backend, operator):
    leaf, reference, target = hidden(backend, operator, 3, 4, 41)
    reference = [x[:, 1:] for x in reference]
    whole = leaf * 2
    copy = whole.detach().clone()
    operator.call([whole[:, 1:], *reference], target[:, 1:], inplace_backward=True)[
        0
    ].sum().backward()
    got, leaf.grad = leaf.grad, None
    operator.call([(leaf * 2)[:, 1:], *reference], target[:, 1:])[0].sum().backward()
    assert torch.equal(got, leaf.grad)
    assert torch.equal(whole[:, :1], copy[:, :1])
    assert not torch.equal(whole[:, 1:], copy[:, 1:])


@every_operator
def test_other_savers_and_a_second_backward_raise(backend, operator):
    leaf, reference, target = hidden(backend, operator, 3, 41)
    logits = leaf * 2
    squares = (logits * logits).sum()  # saves the logits
    loss = operator.call([logits, *reference], target, inplace_backward=True)[0].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_operator
def test_gradients_of_others_who_did_not_save_are_added(backend, operator):
    leaf, reference, target = hidden(backend, operator, 3, 41)

    def gradient(**options):
        logits = leaf * 2
        value = operator.call([logits, *reference], target, **options)[0]
        return torch.autograd.grad(value.sum() + (3 * logits).sum() + logits.mean(), leaf)[0]

    assert torch.equal(gradient(inplace_backward=True), gradient())


@every_operator
def test_two_operators_on_the_same_logits(backend, operator):
    """The second one's backward would read the first one's gradient: an error, not a number."""
    leaf, reference, target = hidden(backend, operator, 3, 41)
    logits = leaf * 2
    losses = [
        operator.call([logits, *reference], target, inplace_backward=True)[0].sum()
        for _ in range(2)
    ]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(losses).backward()


@every_operator
def test_without_a_backward_it_is_a_forward(backend, operator):
    leaf, reference, target = hidden(backend, operator, 3, 41)
    expected = operator.call([leaf.detach(), *reference], target)
    with torch.no_grad():
        unrecorded = operator.call([leaf, *reference], target, inplace_backward=True)
    frozen = operator.call([leaf.detach(), *reference], target, inplace_backward=True)
    for outputs in (unrecorded, frozen):
        assert not any(output.requires_grad for output in outputs)
        assert all(map(torch.equal, outputs, expected))


@every_operator
def test_refusals(backend, operator):
    leaf, reference, target = hidden(backend, operator, 3, 41)

    def refuses(logits, text, target=target, reference=reference):
        with pytest.raises(ValueError, match=f"{operator}: inplace_backward .*{text}"):
            operator.call([logits, *reference], target, inplace_backward=True)

    refuses(leaf, "leaf that requires grad")
    refuses(leaf[:, :], "leaf that requires grad")
    refuses(leaf.view(3, 41), "leaf that requires grad")
    refuses((leaf[:1] * 2).expand(3, 41), "share memory")
    windows = (leaf.flatten() * 2).unfold(0, 41, 7)[:3]
    refuses(windows, "share memory")
    wide = (leaf.t().contiguous() * 2).t()
    refuses(wide, "last dimension")


def test_refusals_of_the_reference(backend):
    leaf, (reference,), target = hidden(backend, SEQUENTIAL_KL, 3, 41)
    text = r"sequential_kl: inplace_backward .*reference_logits"
    with pytest.raises(ValueError, match=text):
        SEQUENTIAL_KL.call([leaf * 2, reference.requires_grad_()], target, inplace_backward=True)
    both = torch.cat([leaf, leaf]) * 2
    with pytest.raises(ValueError, match=text):
        SEQUENTIAL_KL.call([both[:3], both[3:].detach()], target, inplace_backward=True)


@every_operator
def test_create_graph_is_refused(backend, operator):
    leaf, reference, target = hidden(backend, operator, 3, 41)
    logits = leaf * 2
    loss = operator.call([logits, *reference], target, inplace_backward=True)[0].sum()
    with pytest.raises(RuntimeError, match=f"{operator}: inplace_backward .*create_graph"):
        torch.autograd.grad(loss, leaf, create_graph=True)
    assert torch.equal(logits, leaf * 2)


@every_operator
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_tracing_is_refused(backend, operator):
    torch._dynamo.reset()
    leaf, reference, target = hidden(backend, operator, 3, 41)

    def step(leaf):
        return operator.call([leaf * 2, *reference], target, inplace_backward=True)[0].sum()

    with pytest.raises(Exception, match="inplace_backward cannot be traced"):
        torch.compile(step, fullgraph=True, backend="aot_eager")(leaf)
    with pytest.raises(ValueError, match=f"{operator}: inplace_backward cannot be traced"):
        torch.vmap(lambda x: step(x))(leaf.expand(2, 3, 41))


@every_operator
def test_the_overwriting_operator_alone(backend, operator):
    """Called directly it has no derivative and no batching, and bumps the version."""
    native = _library.native()
    x, y = leaves([draw("wide", 3, 41).float().to(backend.device)] * 2)
    target = draw_target((3,), 41).to(backend.device)
    g = torch.ones(3, device=backend.device)
    if operator is SEQUENTIAL_KL:
        options = (target, None, None, 1.0, -100)
        out = native.sequential_kl(x.detach(), y.detach(), *options, 1, False, False)
        kept = (target, None, out[0], out[1], out[4], out[5], None, 1.0, -100)
        overwrite, name = native.sequential_kl_backward_, "sequential_kl_backward_"

        def arguments(x):
            return g, None, None, None, None, x, y.detach(), *kept
    else:
        out = native.token_logprob(x.detach(), target, None, 1.0, 0.0, -100, False, False)
        kept = (target, out[1], out[2], None, 1.0, 0.0, -100)
        overwrite, name = native.token_logprob_backward_, "token_logprob_backward_"

        def arguments(x):
            return g, None, x, *kept

    with pytest.raises(NotImplementedError, match=f"{name}: .*double backward"):
        overwrite(*arguments(x))
    with torch.no_grad():
        version = x._version
        overwrite(*arguments(x))
        assert x._version == version + 1
    with pytest.raises(NotImplementedError, match=f"{name}: .*vmap"):
        torch.vmap(lambda z: overwrite(*arguments(z)))(torch.zeros(2, 3, 41, device=backend.device))
