"""A row's bits depend on that row alone: not on neighbours, place, strides, threads or the run."""

import pytest
import torch
from accuracy import OPERATORS, draw, draw_target, gradients, leaves, upstream_of

from tokcore import _library
from tokcore.ops import sequential_kl, token_logprob

every_operator = pytest.mark.parametrize("operator", OPERATORS, ids=str)


@pytest.fixture(autouse=True)
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def values_and_gradients(operator, logits, target, upstream):
    leaf = leaves(logits)
    values = operator.call(leaf, target)
    return [*values, *gradients(values, leaf, upstream)]


def assert_equal(got, want):
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@every_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [131, 1003, 20_011])
def test_rows_are_independent(backend, operator, dtype, size):
    backend.skip_above(3 * size)
    rows = 7
    logits = [draw("wide", rows, size, seed=s).to(backend.device, dtype) for s in range(2)]
    logits = logits[: operator.logits]
    target = draw_target((rows,), size).clamp(min=0).to(backend.device)
    upstream = upstream_of(operator.call(logits, target))
    whole = values_and_gradients(operator, logits, target, upstream)
    for n in (0, 3, 6):  # alone, where the threads share one row
        part = slice(n, n + 1)
        alone = values_and_gradients(
            operator, [x[part] for x in logits], target[part], [g[part] for g in upstream]
        )
        assert_equal(alone, [x[part] for x in whole])
    order = torch.tensor([3, 0, 6, 6, 1], device=backend.device)
    moved = values_and_gradients(
        operator, [x[order] for x in logits], target[order], [g[order] for g in upstream]
    )
    assert_equal(moved, [x[order] for x in whole])
    # elsewhere in memory, off any vector's alignment
    wide = [torch.zeros(rows, size + 5, device=backend.device, dtype=dtype) for _ in logits]
    for x, w in zip(logits, wide, strict=True):
        w[:, 3 : size + 3] = x
    shifted = [w[:, 3 : size + 3] for w in wide]
    assert_equal(values_and_gradients(operator, shifted, target, upstream), whole)


@every_operator
@pytest.mark.parametrize("rows", [1, 2, 9])
def test_threads_and_runs(backend, operator, rows):
    if backend.name != "cpu":
        pytest.skip("the threads of the CPU kernels")
    size = 70_001
    logits = [draw("peaked", rows, size, seed=s).float() for s in range(operator.logits)]
    target = draw_target((rows,), size).clamp(min=0)
    upstream = upstream_of(operator.call(logits, target))
    want = values_and_gradients(operator, logits, target, upstream)
    for threads in (1, 2, 3, 8, 8):
        torch.set_num_threads(threads)
        assert_equal(values_and_gradients(operator, logits, target, upstream), want)


@every_operator
def test_run_to_run(backend, operator):
    logits = [draw("wide", 5, 517, seed=s).float().to(backend.device) for s in range(2)]
    logits = logits[: operator.logits]
    target = draw_target((5,), 517).to(backend.device)
    upstream = upstream_of(operator.call(logits, target))
    want = values_and_gradients(operator, logits, target, upstream)
    assert_equal(values_and_gradients(operator, logits, target, upstream), want)


@every_operator
@pytest.mark.parametrize("size", [67, 2051])
def test_any_order_of_blocks_and_threads(backend, operator, size):
    if backend.name != "emulated":
        pytest.skip("the emulation's order is what a seed can change")
    logits = [draw("wide", 3, size, seed=s).float() for s in range(operator.logits)]
    target = draw_target((3,), size).clamp(min=0)
    upstream = upstream_of(operator.call(logits, target))
    want = values_and_gradients(operator, logits, target, upstream)
    for seed in range(8):
        with _library.use("emulated", seed=seed):
            assert_equal(values_and_gradients(operator, logits, target, upstream), want)


@every_operator
def test_requests_do_not_change_the_bits(backend, operator):
    """The log-probability is the same with and without the entropy, the KL with and without all."""
    logits = [draw("wide", 4, 261, seed=s).float().to(backend.device) for s in range(2)]
    target = draw_target((4,), 261).to(backend.device)
    if operator.logits == 1:
        with_entropy, _ = token_logprob(logits[0], target, return_entropy=True)
        assert torch.equal(token_logprob(logits[0], target), with_entropy)
    else:
        full = sequential_kl(*logits, target, direction="both", return_entropy=True)
        assert torch.equal(sequential_kl(*logits, target).kl, full.kl)
        assert torch.equal(sequential_kl(*logits, target).policy_logprob, full.policy_logprob)
        reverse = sequential_kl(*logits, target, direction="reverse")
        # alone, it measures the log-ratio of the sums from the other side
        torch.testing.assert_close(reverse.kl, full.reverse_kl, rtol=1e-6, atol=0)


def allocate(backend, elements):
    """Address space, not memory: pages that nobody touches are never there."""
    try:
        return torch.empty(elements, dtype=torch.bfloat16, device=backend.device)
    except RuntimeError as error:
        pytest.skip(f"no {2 * elements} bytes of address space: {error}")


@every_operator
def test_rows_more_than_2_to_the_31_elements_apart(backend, operator):
    size, stride = 515, 2**31 + 8
    storage = allocate(backend, stride + size)
    far = storage.as_strided((2, size), (stride, 1))
    near = draw("wide", 2, size).to(backend.device, torch.bfloat16)
    far.copy_(near)
    other = [draw("wide", 2, size, seed=1).to(backend.device, torch.bfloat16)]
    other = other[: operator.logits - 1]
    target = torch.tensor([3, 514], device=backend.device)
    upstream = upstream_of(operator.call([near, *other], target))
    got = values_and_gradients(operator, [far, *other], target, upstream)
    assert_equal(got, values_and_gradients(operator, [near, *other], target, upstream))


@every_operator
def test_more_than_2_to_the_31_logits(backend, operator):
    """By strides: one stored row seen many times, and ignored but for the last few."""
    size = 32_771
    rows = 2**31 // size + 5
    backend.skip_above(rows)
    stored = [draw("wide", 1, size, seed=s).to(backend.device).bfloat16() for s in range(2)]
    stored = stored[: operator.logits]
    target = torch.full((rows,), -100, device=backend.device)
    target[-3:] = 7
    values = operator.call([x.expand(rows, size) for x in stored], target)
    want = operator.call(stored, target[-1:])
    for got, one in zip(values, want, strict=True):
        assert (got[:-3] == 0).all()
        assert (got[-3:] == one).all()
