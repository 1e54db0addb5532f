"""What sparse_decode_attention computes: by hand, by goldens, and in float64."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from caches import (
    DTYPES,
    assert_no_worse_than,
    draw_cache,
    draw_lists,
    draw_query,
    numbers,
    unit,
)

from tokcore.ops import sparse_decode_attention
from tokcore.ops.sparse_decode_attention import _reference

GOLDEN = Path(__file__).parents[1] / "golden"
INF, NAN = math.inf, math.nan


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def call(function, query, rows, index, count, pairs=(None, None), *, device="cpu", **options):
    """Any of its tensors may be None."""
    moved = [None if x is None else x.to(device) for x in (query, *rows, index, count, *pairs)]
    *tensors, key_pairs, value_pairs = moved
    named = {"key_quantization": key_pairs, "value_quantization": value_pairs}
    return function(*tensors, **named, **options)


def bounds(query, rows, index, count, pairs, scale):
    """Of output, weight_row and lse: SLACK roundoffs of what enters them.

    A score is off by the sizes of its products, a weight by that of its score and of the sum, the
    results by those of their weights.
    """
    (keys, key_sizes), (values, value_sizes) = (
        numbers(x, y) for x, y in zip(rows, pairs, strict=True)
    )
    lists, group = count.shape[1], query.shape[1] // keys.shape[1]
    output, lse = (torch.zeros(shape).double() for shape in (query.shape, query.shape[:2]))
    listed = keys.shape[2] if index is None else index.shape[2]
    weights = torch.zeros(*count.shape, listed).double()
    for b in range(query.shape[0]):
        for head in range(query.shape[1]):
            h = head // group
            s = h if lists > 1 else 0
            n = int(count[b, s])
            if n == 0:
                continue
            slots = slice(n) if index is None else index[b, s, :n].long()
            q = query[b, head].double()
            scores = keys[b, h, slots] @ q * scale
            size = 1 + 2 * (key_sizes[b, h, slots] @ q.abs() * abs(scale)).max()
            p = scores.softmax(0) * size
            output[b, head] = p @ value_sizes[b, h, slots]
            weights[b, s, :n] += p
            lse[b, head] = size + scores.abs().max()
    return [unit(query.dtype) * bound for bound in (output, weights, lse)]


def assert_no_worse(query, rows, index, count, pairs, device, *, scale=None):
    given = query.shape[-1] ** -0.5 if scale is None else scale
    inputs = (query, rows, index, count, pairs)
    exact = [numbers(x, y)[0] for x, y in zip(rows, pairs, strict=True)]
    truth = call(_reference, query.double(), exact, index, count, scale=given)
    plain = call(_reference, *inputs, scale=given)
    got = call(sparse_decode_attention, *inputs, device=device, scale=scale)
    assert_no_worse_than(got._fields, got, plain, truth, bounds(*inputs, given))


# ---- by hand --------------------------------------------------------------------------------


def test_a_case_by_hand(backend):
    """Scores ln 3 and 0, then 0 and 0, of the listed slots; another between them is NaN."""
    query = torch.tensor([[[1.0], [0.0]]])
    key = torch.tensor([[[[math.log(3)], [NAN], [0.0]]]])
    value = torch.tensor([[[[4.0], [NAN], [8.0]]]])
    index, count = int32([[[0, 2, 77]]]), int32([[2]])
    got = call(
        sparse_decode_attention,
        query,
        (key, value),
        index,
        count,
        device=backend.device,
        scale=1.0,
    )
    torch.testing.assert_close(got.output.cpu(), torch.tensor([[[5.0], [6.0]]]))
    torch.testing.assert_close(got.weight_row.cpu(), torch.tensor([[[1.25, 0.75, 0.0]]]))
    torch.testing.assert_close(got.lse.cpu(), torch.tensor([[math.log(4), math.log(2)]]))


def test_lists_of_one_head_and_of_all(backend):
    """Equal scores: a shared list gives each slot the sum over all four heads, own lists two."""
    query, zeros = torch.zeros(1, 4, 3), torch.zeros(1, 2, 5, 3)
    value = torch.arange(10.0).view(1, 2, 5, 1).expand(1, 2, 5, 3)
    shared = int32([[[1, 3]]]), int32([[2]])
    got = call(sparse_decode_attention, query, (zeros, value), *shared, device=backend.device)
    assert got.weight_row.tolist() == [[[2.0, 2.0]]]
    assert got.output[0, :, 0].tolist() == [2.0, 2.0, 7.0, 7.0]
    own = int32([[[1, 3], [4, -5]]]), int32([[2, 1]])
    got = call(sparse_decode_attention, query, (zeros, value), *own, device=backend.device)
    assert got.weight_row.tolist() == [[[1.0, 1.0], [2.0, 0.0]]]
    assert got.output[0, :, 0].tolist() == [2.0, 2.0, 9.0, 9.0]
    assert got.lse[0].tolist() == pytest.approx([math.log(2)] * 2 + [0.0] * 2)


def test_quantized_by_hand(backend):
    """Groups (1, 0) and (0.5, -1): the key's entries mean 2, 0 and 0, 3."""
    key = torch.tensor([[[[2, 2], [0, 8]]]], dtype=torch.uint8)
    pairs = torch.tensor([[1.0, 0.0], [0.5, -1.0]]).expand(1, 1, 2, 2, 2)
    got = call(
        sparse_decode_attention,
        torch.tensor([[[1.0, 1.0]]]),
        (key, key),
        None,
        int32([[2]]),
        (pairs, pairs),
        device=backend.device,
        scale=math.log(3),
    )
    torch.testing.assert_close(got.weight_row.cpu(), torch.tensor([[[0.25, 0.75]]]))
    torch.testing.assert_close(got.output.cpu(), torch.tensor([[[0.5, 2.25]]]))


def test_nothing_listed(backend):
    """Output 0, no weight, lse -inf, in that batch alone; NaN is nowhere read."""
    rows, _ = draw_cache((2, 2, 4, 3), torch.float32)
    for x in rows:
        x[0] = NAN
    index, count = draw_lists(2, 1, 4, 4)
    count.copy_(int32([[0], [4]]))
    index[1] = int32([[0, 1, 2, 3]])
    query = draw_query((2, 4, 3), torch.float32)
    for given in (index, None):
        got = call(sparse_decode_attention, query, rows, given, count, device=backend.device)
        assert got.output[0].eq(0).all()
        assert got.weight_row[0].eq(0).all()
        assert got.lse[0].eq(-INF).all()
        torch.testing.assert_close(got.weight_row[1].sum().cpu(), torch.tensor(4.0))


# ---- goldens --------------------------------------------------------------------------------


@pytest.mark.parametrize("with_index", [True, False])
def test_steps_of_the_golden(backend, with_index):
    """Outputs and weights of sparse steps on given lists; without index, of the packed cache."""
    data = np.load(GOLDEN / "alisa_gqa_window2_r40.npz")
    query, key, value = (torch.tensor(data[name]) for name in "qkv")
    for step in range(int(data["n_decode"])):
        t = int(data["prefill_len"]) + step
        index = torch.tensor(data["index"][step], dtype=torch.int32)
        count = (index >= 0).sum(-1, dtype=torch.int32)
        rows = (key, value)
        if not with_index:
            slots = index[0, 0, : int(count)].long()
            index, rows = None, (key[:, :, slots], value[:, :, slots])
        got = call(
            sparse_decode_attention, query[:, :, t], rows, index, count, device=backend.device
        )
        np.testing.assert_allclose(got.output.cpu(), data["out"][step], atol=2e-6)
        kept = data["kept"][step][0, 0]
        want = data["weights"][step][0].sum(0)[kept]
        np.testing.assert_allclose(got.weight_row[0, 0, : len(want)].cpu(), want, atol=2e-6)


def test_a_cache_quantised_as_the_golden(backend):
    data = np.load(GOLDEN / "alisa_int8_kv.npz")
    cache = torch.tensor(data["token_q"])
    scale, zero = (torch.tensor(data[f"token_{name}"]) for name in ("scale", "zero"))
    pairs = torch.stack([scale, -scale * zero], -1).float()  # one group: (1, 2, 40, 1, 2)
    exact = torch.tensor(data["token_dequant"])
    query, count = draw_query((1, 4, 16), torch.float32), int32([[40]])
    inputs = (query, (cache, cache), None, count, (pairs, pairs))
    got = call(sparse_decode_attention, *inputs, device=backend.device)
    want = call(_reference, query.double(), (exact, exact), None, count)
    for found, true, bound in zip(got, want, bounds(*inputs, 0.25), strict=True):
        # Beside the arithmetic's: scale and offset are rounded to float32.
        assert bool(((found.cpu() - true).abs() <= 2 * bound + 2**-23 * true.abs()).all())


# ---- against float64 ------------------------------------------------------------------------

# (B, Hq, Hkv, C, D), listed, lists
CASES = [
    ((2, 4, 2, 37, 16), 20, 1),
    ((2, 8, 2, 37, 16), 37, 2),
    ((1, 7, 1, 31, 64), 12, 1),
    ((3, 3, 3, 9, 1), 9, 3),
    ((1, 6, 2, 130, 2), 129, 1),
    ((1, 2, 1, 33, 80), 31, 1),
    ((1, 1, 1, 40, 128), 2, 1),
    ((1, 10, 2, 24, 5), 17, 2),
    ((1, 2, 1, 20, 256), 20, 1),
    ((1, 9, 1, 40, 31), 33, 1),
    ((1, 4, 2, 700, 4), 650, 1),
    ((1, 4, 1, 3000, 24), 2600, 1),
]


@pytest.mark.parametrize(("sizes", "listed", "lists"), CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_index", [True, False])
def test_no_worse_than_torch(backend, sizes, listed, lists, dtype, with_index):
    batch, heads, kv_heads, capacity, dim = sizes
    backend.skip_above(batch * heads * capacity * dim)
    rows, pairs = draw_cache((batch, kv_heads, capacity, dim), dtype)
    index, count = draw_lists(batch, lists, capacity, listed)
    query = draw_query((batch, heads, dim), dtype)
    index = index if with_index else None
    assert_no_worse(query, rows, index, count, pairs, backend.device)


# dim, groups: whole packs and units, and groups that are neither
@pytest.mark.parametrize(("dim", "groups"), [(128, 2), (64, 1), (16, 2), (10, 2), (80, 1), (3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("with_index", [True, False])
@pytest.mark.parametrize("group", [1, 3, 4])
def test_quantized_no_worse_than_torch(backend, dim, groups, dtype, with_index, group):
    batch, kv_heads, capacity, listed = 2, 2, 40, 37
    rows, pairs = draw_cache((batch, kv_heads, capacity, dim), dtype, groups=groups)
    index, count = draw_lists(batch, kv_heads, capacity, listed)
    query = draw_query((batch, kv_heads * group, dim), dtype)
    index = index if with_index else None
    assert_no_worse(query, rows, index, count, pairs, backend.device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", [12.0, 1e-3])
@pytest.mark.parametrize("scale", [None, 1.0, -0.3, 0.0])
def test_peaked_and_flat(backend, dtype, spread, scale):
    rows, pairs = draw_cache((2, 2, 40, 8), dtype, spread=spread)
    index, count = draw_lists(2, 1, 40, 33)
    query = draw_query((2, 6, 8), dtype)
    assert_no_worse(query, rows, index, count, pairs, backend.device, scale=scale)


def test_blocks_far_apart(backend):
    """Whole blocks of slots below what float32 can still add, before and behind the greatest."""
    size = 1100
    key = torch.linspace(-300, 300, size)[torch.arange(size) * 7 % size].view(1, 1, size, 1)
    key[:, :, :520] = -400.0
    rows = [key, torch.arange(float(size)).view(1, 1, size, 1)]
    query = torch.ones(1, 1, 1)
    count = int32([[size]])
    assert_no_worse(query, rows, None, count, (None, None), backend.device, scale=1.0)


# ---- infinities, NaN ------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [NAN, INF, -INF])
@pytest.mark.parametrize("lists", [1, 2])
def test_what_is_not_listed_is_not_read(backend, wrong, lists):
    rows, pairs = draw_cache((2, 2, 30, 4), torch.float32)
    index, count = draw_lists(2, lists, 30, 25)
    query = draw_query((2, 4, 4), torch.float32)
    want = call(sparse_decode_attention, query, rows, index, count, device=backend.device)
    for b in range(2):
        for h in range(2):
            s = h if lists > 1 else 0
            unused = torch.ones(30, dtype=torch.bool)
            unused[index[b, s, : count[b, s]].long()] = False
            for x in rows:
                x[b, h, unused] = wrong
    got = call(sparse_decode_attention, query, rows, index, count, device=backend.device)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("wrong", [NAN, INF])
def test_a_listed_key_that_is_wrong(backend, wrong):
    """NaN for the heads of that KV head and the weights of the list; the others as before."""
    rows, _ = draw_cache((2, 2, 6, 3), torch.float32)
    count = int32([[6, 5], [6, 6]])
    query = draw_query((2, 4, 3), torch.float32).abs()
    want = call(sparse_decode_attention, query, rows, None, count, device=backend.device)
    rows[0][0, 1, 2] = wrong
    got = call(sparse_decode_attention, query, rows, None, count, device=backend.device)
    assert got.output[0, 2:].isnan().all()
    assert got.lse[0, 2:].isnan().all()
    assert got.weight_row[0, 1, :5].isnan().all()
    assert got.weight_row[0, 1, 5] == 0
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a[1], b[1])
    assert torch.equal(got.output[0, :2], want.output[0, :2])
    assert torch.equal(got.weight_row[0, 0], want.weight_row[0, 0])


def test_scores_of_minus_infinity(backend):
    """Weight 0 beside others, whole blocks too; NaN where there is nothing else."""
    size = 1100
    key = torch.zeros(2, 1, size, 1)
    key[0, 0, 3:] = -INF
    key[1] = -INF
    value = torch.arange(float(size)).view(1, 1, size, 1).expand(2, 1, size, 1)
    count = int32([[size], [4]])
    query = torch.ones(2, 2, 1)
    got = call(sparse_decode_attention, query, (key, value), None, count, device=backend.device)
    assert got.output[0].flatten().tolist() == [1.0, 1.0]
    torch.testing.assert_close(got.weight_row[0, 0, :4].cpu(), torch.tensor([2, 2, 2, 0]) / 3)
    assert got.weight_row[0, 0, 3:].eq(0).all()
    assert got.output[1].isnan().all()
    assert got.lse[1].isnan().all()
    assert got.weight_row[1, 0, :4].isnan().all()


def test_a_value_that_is_nan_stays_in_its_entry(backend):
    rows, _ = draw_cache((1, 1, 5, 3), torch.float32)
    rows[1][0, 0, 2, 1] = NAN
    query = draw_query((1, 2, 3), torch.float32)
    got = call(sparse_decode_attention, query, rows, None, int32([[5]]), device=backend.device)
    assert got.output.isnan().tolist() == [[[False, True, False]] * 2]
    assert not got.weight_row.isnan().any()


# ---- one result, however it is asked for -----------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [2, 3, 5, 8])
def test_heads_do_not_depend_on_each_other(backend, dtype, group):
    """A head of a group gives the bits that it gives alone, with the KV head of its own."""
    rows, _ = draw_cache((1, 2, 21, 24), dtype)
    query, count = draw_query((1, 2 * group, 24), dtype), int32([[21, 13]])
    got = call(sparse_decode_attention, query, rows, None, count, device=backend.device)
    alone = [x.repeat_interleave(group, 1) for x in rows]
    counts = count.repeat_interleave(group, 1)
    want = call(sparse_decode_attention, query, alone, None, counts, device=backend.device)
    assert torch.equal(got.output, want.output)
    assert torch.equal(got.lse, want.lse)
    added = want.weight_row[:, ::group].clone()
    for g in range(1, group):
        added += want.weight_row[:, g::group]
    torch.testing.assert_close(got.weight_row, added, rtol=1e-6, atol=0)


def test_lists_of_everything_are_no_list(backend):
    rows, _ = draw_cache((2, 2, 50, 8), torch.bfloat16)
    query, count = draw_query((2, 4, 8), torch.bfloat16), int32([[50], [31]])
    index = torch.arange(50, dtype=torch.int32).expand(2, 1, 50)
    got = call(sparse_decode_attention, query, rows, index, count, device=backend.device)
    want = call(sparse_decode_attention, query, rows, None, count, device=backend.device)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_list_is_the_packed_cache(backend):
    """Gathered rows give the bits of rows that lie side by side."""
    rows, _ = draw_cache((1, 2, 600, 8), torch.float32)
    index, _ = draw_lists(1, 1, 600, 530)
    query, count = draw_query((1, 4, 8), torch.float32), int32([[530]])
    packed = [x[:, :, index[0, 0].long()] for x in rows]
    got = call(sparse_decode_attention, query, rows, index, count, device=backend.device)
    want = call(sparse_decode_attention, query, packed, None, count, device=backend.device)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
