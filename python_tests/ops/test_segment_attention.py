"""What segment_attention computes: by hand, by the authors' numbers, and in float64."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from accuracy import HALF_ULP, ROUNDOFF, SLACK
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokcore.ops import segment_attention
from tokcore.ops.segment_attention import _reference

GOLDEN = Path(__file__).parents[1] / "golden"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INF, NAN = math.inf, math.nan


def golden(name):
    return np.load(GOLDEN / f"songmass_{name}.npz")


def draw(sizes, dtype, *, segments, seed=0, spread=1.0):
    """Query, key, value, and ids of segments and words, in any order and some unmatched."""
    batch, heads, queries, keys, dim = sizes
    generator = torch.Generator().manual_seed(seed)
    rows = [
        (spread * torch.randn(batch, heads, n, dim, generator=generator)).to(dtype)
        for n in (queries, keys, keys)
    ]
    ids = [
        torch.randint(-1, most, (batch, n), generator=generator)
        for most in (segments, 2 * segments)
        for n in (queries, keys)
    ]
    return rows, ids


def run(function, rows, ids, *, words=True, device="cpu", upstream=None, **options):
    """All outputs, and the gradients by all rows of random multiples of them."""
    rows = [x.detach().to(device).requires_grad_() for x in rows]
    ids = [x.to(device) for x in ids]
    named = {"query_words": ids[2], "key_words": ids[3]} if words else {}
    result = function(*rows, *ids[:2], **named, return_weights=True, **options)
    upstream = [x.to(device) for x in upstream or upstream_of(rows[0])]
    outputs = [result.output] + ([result.constraint] if words else [])
    grads = torch.autograd.grad(outputs, rows, upstream[: len(outputs)])
    return *outputs, result.weights.detach(), *grads


def upstream_of(like):
    """In values that every dtype holds."""
    generator = torch.Generator().manual_seed(7)
    shapes = (like.shape, (like.shape[0], like.shape[2]))
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    return [
        torch.randint(-8, 9, shape, generator=generator).div(4).to(dtype)
        for shape, dtype in zip(shapes, (like.dtype, wide), strict=True)
    ]


def bounds(rows, ids, *, words, scale=None):
    """How far rounding may take each result of ``run``: SLACK roundoffs of what enters it."""
    query, key, value = (x.double() for x in rows)
    dtype = rows[0].dtype
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    u = SLACK * ROUNDOFF[torch.float64 if dtype == torch.float64 else torch.float32]
    same = (ids[0].unsqueeze(2) == ids[1].unsqueeze(1)).unsqueeze(1)
    sizes = (query.abs() @ key.abs().mT * abs(scale)).masked_fill(~same, 0)
    sizes = 1 + 2 * sizes.amax(3, keepdim=True) if sizes.shape[3] else sizes
    scores = (query @ key.mT * scale).masked_fill(~same, -INF)
    p = (scores.softmax(3) if scores.shape[3] else scores).nan_to_num(0)
    upstream = [x.double().abs() for x in upstream_of(rows[0])]
    pushed = upstream[0] @ value.abs().mT
    if words:
        equal = ids[2].unsqueeze(2) == ids[3].unsqueeze(1)
        target = equal / equal.sum(2, keepdim=True).clamp(min=1).double()
        mean = same[:, 0] / same[:, 0].sum(2, keepdim=True).clamp(min=1).double()
        miss = p.mean(1) + target
        pull = 2 * upstream[1].unsqueeze(2) * mean * miss / query.shape[1]
        pushed = pushed + pull.unsqueeze(1)
    slopes = p * sizes * (pushed + (p * pushed).sum(3, keepdim=True)) * abs(scale)
    found = [p * sizes @ value.abs()]
    found += [2 * (mean * miss * (miss + (p * sizes).mean(1))).sum(2)] if words else []
    found += [(p * sizes).mean(1), slopes @ key.abs(), slopes.mT @ query.abs()]
    found += [(p * sizes).mT @ upstream[0]]
    return [u * bound for bound in found]


def assert_no_worse(rows, ids, device, *, words=True, **options):
    """|operator - truth| <= |plain torch - truth| + bound, for each element of each result."""
    truth = run(_reference, [x.double() for x in rows], ids, words=words, **options)
    plain = run(_reference, rows, ids, words=words, **options)
    got = run(segment_attention, rows, ids, words=words, device=device, **options)
    allowed = bounds(rows, ids, words=words, **options)
    names = ["output", *(["constraint"] if words else []), "weights", "query", "key", "value"]
    for name, *values, bound in zip(names, got, plain, truth, allowed, strict=True):
        found, was, true = (x.detach().cpu() for x in values)
        assert (found.dtype, found.shape) == (was.dtype, was.shape), name
        relative, absolute = HALF_ULP[found.dtype]
        bound = bound + relative * true.abs() + absolute
        excess = (found.double() - true).abs() - (was.double() - true).abs() - bound
        assert bool((excess <= 0).all()), f"{name}: off by {excess.max():.3g} too much"


# ---- by hand --------------------------------------------------------------------------------


def test_a_case_by_hand(backend):
    """Scores ln 3 and ln 1 in one segment; another key beside; words 1/2 each, then none."""
    query = torch.tensor([math.log(3), 0.0]).view(1, 1, 2, 1)
    key = torch.tensor([1.0, 0.0, 9.0]).view(1, 1, 3, 1)
    value = torch.tensor([4.0, 8.0, 100.0]).view(1, 1, 3, 1)
    got = segment_attention(
        *(x.to(backend.device) for x in (query, key, value)),
        torch.tensor([[5, 5]], device=backend.device),
        torch.tensor([[5, 5, 6]], device=backend.device),
        query_words=torch.tensor([[1, 2]], device=backend.device),
        key_words=torch.tensor([[1, 1, 3]], device=backend.device),
        return_weights=True,
    )
    # weights (3/4, 1/4) and (1/2, 1/2); targets (1/2, 1/2) and (0, 0); mean over two keys
    torch.testing.assert_close(got.output.flatten().cpu(), torch.tensor([5.0, 6.0]))
    torch.testing.assert_close(got.constraint.cpu(), torch.tensor([[0.0625, 0.25]]))
    want = torch.tensor([[[0.75, 0.25, 0.0], [0.5, 0.5, 0.0]]])
    torch.testing.assert_close(got.weights.cpu(), want)


def test_word_weights_count_the_keys_of_other_segments(backend):
    """W is 1/2 where one of the two equal words is of another sentence; only its own key adds."""
    zeros = torch.zeros(1, 2, 1, 3, device=backend.device)
    keys = torch.zeros(1, 2, 2, 3, device=backend.device)
    ids = torch.tensor([[0]], device=backend.device)
    got = segment_attention(
        zeros,
        keys,
        keys,
        ids,
        torch.tensor([[0, 1]], device=backend.device),
        query_words=ids,
        key_words=torch.tensor([[0, 0]], device=backend.device),
    )
    assert got.constraint.tolist() == [[0.25]]
    assert got.weights is None


def test_nothing_to_attend_to(backend):
    """Zero and not NaN, forward and backward, whatever the upstream."""
    rows = [torch.randn(1, 2, 3, 5, device=backend.device, requires_grad=True) for _ in range(3)]
    queries, keys = (torch.full((1, 3), pad, device=backend.device) for pad in (-2, -1))
    got = segment_attention(*rows, queries, keys, query_words=queries, key_words=keys)
    assert got.output.abs().max() == 0
    assert got.constraint.tolist() == [[0.0] * 3]
    upstream = torch.full_like(got.output, INF), torch.full_like(got.constraint, INF)
    for grad in torch.autograd.grad([got.output, got.constraint], rows, upstream):
        assert grad.abs().max() == 0


def test_any_integers_are_ids(backend):
    rows, ids = draw((1, 2, 4, 5, 3), torch.float32, segments=2)
    far = torch.tensor([2**62, -(2**63), 2**32])
    want = run(segment_attention, rows, ids, device=backend.device)
    for mapping in (far, torch.tensor([0, 2**31 - 1, -(2**31)], dtype=torch.int32)):
        mapped = [mapping[ids[0] + 1], mapping[ids[1] + 1], *ids[2:]]
        got = run(segment_attention, rows, mapped, device=backend.device)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# ---- the authors' numbers -------------------------------------------------------------------


def test_the_sentence_masks_of_the_authors(backend):
    data = golden("sentmask")
    cases = [
        (data[f"{case}_target_sent_ids"], data[f"{case}_source_sent_ids"], data[f"{case}_mask"])
        for case in ("rightpad", "leftpad_asis", "hand")
    ]
    # When decoding, the sentence is the number of [sep] = 5 so far.
    decoded = (data["inc_prev"] == 5).cumsum(1)
    cases.append((decoded, data["inc_source_sent_ids"], data["inc_mask"]))
    for queries, keys, blocked in cases:
        shape = (*queries.shape, keys.shape[1])
        q, k = torch.zeros(shape[0], 2, shape[1], 4), torch.zeros(shape[0], 2, shape[2], 4)
        arguments = q, k, k, torch.tensor(queries), torch.tensor(keys)
        got = segment_attention(*(x.to(backend.device) for x in arguments), return_weights=True)
        assert np.array_equal(got.weights.cpu().numpy() == 0, blocked)


def test_the_masked_attention_of_the_authors(backend):
    data, ids = golden("masked_attention"), golden("sentmask")
    assert np.array_equal(data["mask"], ids["hand_mask"])
    heads = int(data["num_heads"])

    def project(name, x):  # (T, B, E) to (B, H, T, D)
        x = x @ data[f"param_{name}.weight"].T + data[f"param_{name}.bias"]
        return torch.tensor(x.reshape(*x.shape[:2], heads, -1)).permute(1, 2, 0, 3)

    rows = (
        project("q_proj", data["q_in"]),
        *(project(name, data["kv_in"]) for name in ("k_proj", "v_proj")),
    )
    segments = [torch.tensor(ids[f"hand_{side}_sent_ids"]) for side in ("target", "source")]
    arguments = (x.to(backend.device) for x in (*rows, *segments))
    got = segment_attention(*arguments, return_weights=True)
    context = got.output.cpu().permute(2, 0, 1, 3).flatten(2).numpy()
    out = context @ data["param_out_proj.weight"].T + data["param_out_proj.bias"]
    np.testing.assert_allclose(out, data["out"], atol=1e-6)  # their softmax is float32
    np.testing.assert_allclose(got.weights.cpu(), data["weights_headmean"], atol=1e-7)


@pytest.mark.parametrize("case", ["c0", "c1", "c2", "c3"])
def test_the_attention_loss_of_the_authors(backend, case):
    """Keys are unit vectors and the scale 1, so that queries are logarithms of the weights."""
    data = {name[3:]: value for name, value in golden("align_loss").items() if name[:2] == case}
    attention = torch.tensor(data["attns"]).transpose(0, 1)  # (B, layers, T, S)
    segments, words = (
        [torch.tensor(data[f"{side}_{kind}_ids"]) for side in ("target", "source")]
        for kind in ("sent", "word")
    )
    layers, keys = attention.shape[1], torch.eye(attention.shape[3], dtype=torch.float64)
    keys = keys.expand(len(attention), 1, -1, -1)
    kept = torch.tensor(data["target"] != data["pad"]).double()
    total = 0.0
    for layer in range(layers):
        weights = attention[:, layer : layer + 1]
        query = torch.where(weights > 0, weights, 1.0).log()
        query, k, *ids = (x.to(backend.device) for x in (query, keys, *segments, *words))
        query.requires_grad_()
        got = segment_attention(
            query, k, k, *ids[:2], query_words=ids[2], key_words=ids[3], scale=1.0
        )
        loss = (got.constraint * kept.to(backend.device)).sum() / layers
        total += loss.item()
        (grad,) = torch.autograd.grad(loss, query)
        by_weight = torch.tensor(data["grad_attns"][layer]).unsqueeze(1)
        by_weight = by_weight / float(data["attn_loss_weight"])
        want = weights * (by_weight - (weights * by_weight).sum(3, keepdim=True))
        torch.testing.assert_close(grad.cpu(), want, atol=1e-6, rtol=0)
    assert total == pytest.approx(float(data["attn_loss"]), abs=1e-6)


# ---- against plain torch and the truth ------------------------------------------------------

SHAPES = [  # B, H, T, S, D; segments
    ((1, 1, 1, 1, 1), 1),
    ((2, 3, 5, 7, 5), 2),
    ((1, 5, 3, 9, 64), 1),
    ((2, 2, 9, 4, 31), 3),
    ((1, 2, 6, 40, 65), 2),
    ((1, 1, 40, 37, 33), 1),
    ((1, 4, 4, 5, 129), 1),
    ((1, 1, 3, 3, 256), 1),
    ((1, 2, 70, 71, 8), 9),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("sizes", "segments"), SHAPES, ids=str)
@pytest.mark.parametrize("words", [True, False], ids=["words", "no words"])
def test_no_worse_than_plain_torch(backend, sizes, segments, dtype, words):
    rows, ids = draw(sizes, dtype, segments=segments)
    assert_no_worse(rows, ids, backend.device, words=words)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, -0.3, 0.0])
def test_scales_and_peaked_weights(backend, scale, dtype):
    rows, ids = draw((2, 2, 6, 8, 16), dtype, segments=2, spread=4.0)
    assert_no_worse(rows, ids, backend.device, scale=scale)


def test_scores_far_from_0(backend):
    """The pair of maximum and sum keeps what a logarithm of 3000 + something would round away."""
    rows, ids = draw((1, 2, 4, 6, 4), torch.float32, segments=1)
    rows[0][..., 0], rows[1][..., 0] = 60.0, 100.0
    assert_no_worse(rows, ids, backend.device)


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    sizes=st.tuples(*(st.integers(1, most) for most in (2, 5, 9, 9, 40))),
    segments=st.integers(1, 4),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
    words=st.booleans(),
)
def test_any_sizes(backend, sizes, segments, seed, dtype, words):
    rows, ids = draw(sizes, dtype, segments=segments, seed=seed)
    assert_no_worse(rows, ids, backend.device, words=words)


@pytest.mark.parametrize("sizes", [(1, 5, 2, 1100, 2), (1, 5, 1100, 2, 2)], ids=str)
def test_more_than_a_block_holds(backend, sizes):
    """Positions beyond those whose pull stays in shared memory, and heads in two rounds."""
    rows, ids = draw(sizes, torch.float32, segments=1)
    ids[0][:, ::3] = 5
    assert_no_worse(rows, ids, backend.device)


@pytest.mark.parametrize("sizes", [(1, 2, 3, 17_000, 2), (1, 1, 3000, 3, 2)], ids=str)
def test_runs_of_many_pairs(backend, sizes):
    """On the CPU a run is cut where what it matches is much."""
    backend.skip_above(math.prod(sizes), emulated=1000)
    rows, ids = draw(sizes, torch.float64, segments=1)
    assert_no_worse(rows, ids, backend.device)


# ---- padding, order, poison -----------------------------------------------------------------


@pytest.mark.parametrize("left_queries", [False, True])
@pytest.mark.parametrize("left_keys", [False, True])
def test_padding_on_either_side(backend, left_queries, left_keys):
    """A short row gives what it gives alone, wherever ids and tokens say that it is padded."""
    rows, ids = draw((1, 2, 5, 7, 6), torch.float32, segments=2, seed=3)
    want = run(_reference, rows, ids)

    def pad(x, dim, left, value):
        blank = torch.full_like(x.narrow(dim, 0, 3), value)
        return torch.cat([blank, x] if left else [x, blank], dim)

    sides = (left_queries, left_keys, left_keys)
    padded = [pad(x, 2, left, NAN) for x, left in zip(rows, sides, strict=True)]
    of_ids = [
        pad(x, 1, (left_queries, left_keys)[i % 2], (-2, -3)[i % 2]) for i, x in enumerate(ids)
    ]
    upstream = [pad(x, x.dim() // 2, left_queries, 1.0) for x in upstream_of(rows[0])]
    got = run(segment_attention, padded, of_ids, device=backend.device, upstream=upstream)
    at, of = (3 if left else 0 for left in (left_queries, left_keys))
    got = [x.cpu() for x in got]
    kept = [
        got[0][:, :, at : at + 5],
        got[1][:, at : at + 5],
        got[2][:, at : at + 5, of : of + 7],
        got[3][:, :, at : at + 5],
        got[4][:, :, of : of + 7],
        got[5][:, :, of : of + 7],
    ]
    for found, true, whole in zip(kept, want, got, strict=True):
        torch.testing.assert_close(found, true)
        assert whole.abs().sum().item() == pytest.approx(found.abs().sum().item(), rel=1e-5)


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_other_segments_cannot_poison(backend, poison):
    """Nor what is padded. In its own segment it does, and there only."""
    rows, ids = draw((2, 3, 6, 8, 5), torch.float32, segments=3)
    ids[0][:], ids[1][:] = (
        torch.tensor([0, 1, 0, 1, 2, -2]),
        torch.tensor([1, 0, 0, 7, 1, 2, -1, 0]),
    )
    want = run(segment_attention, rows, ids, device=backend.device)
    for x, places in zip(rows, ([5], [3, 6], [3, 6]), strict=True):
        x[:, :, places] = poison  # matched by nothing
    got = run(segment_attention, rows, ids, device=backend.device)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    rows[1][:, :, 5], rows[2][:, :, 5] = poison, poison  # the key of segment 2, of query 4 alone
    got = run(segment_attention, rows, ids, device=backend.device)
    others, keys = [0, 1, 2, 3, 5], [0, 1, 2, 3, 4, 6, 7]
    assert got[0][:, :, 4].isnan().any()
    assert torch.equal(got[0][:, :, others], want[0][:, :, others])
    assert torch.equal(got[1][:, others], want[1][:, others])
    assert torch.equal(got[3][:, :, others], want[3][:, :, others])
    for i in (4, 5):
        assert torch.equal(got[i][:, :, keys], want[i][:, :, keys])


@pytest.mark.parametrize(
    ("scores", "want"),
    [
        ([-INF, 0.0], [0.0, 1.0]),
        ([0.0, -INF], [1.0, 0.0]),
        ([-INF, -INF], [NAN, NAN]),
        ([INF, 0.0], [NAN, NAN]),
        ([NAN, 0.0], [NAN, NAN]),
        ([0.0, NAN], [NAN, NAN]),
    ],
)
def test_scores_that_are_not_finite(backend, scores, want):
    """As in softmax, among the keys of one segment."""
    key = torch.tensor(scores, device=backend.device).view(1, 1, 2, 1)
    one, ids = (
        torch.ones(1, 1, 1, 1, device=backend.device),
        torch.zeros(1, 2, device=backend.device),
    )
    value, ids = torch.ones_like(key), ids.long()
    got = segment_attention(one, key, value, ids[:, :1], ids, scale=1.0, return_weights=True)
    torch.testing.assert_close(got.weights.flatten().cpu(), torch.tensor(want), equal_nan=True)
    assert got.output.isnan().item() == math.isnan(want[0])


def test_the_order_of_positions_does_not_matter(backend):
    rows, ids = draw((2, 2, 8, 9, 6), torch.float64, segments=3)
    want = run(segment_attention, rows, ids, device=backend.device)
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randperm(n, generator=generator) for n in (8, 9))
    mixed = [rows[0][:, :, q], rows[1][:, :, k], rows[2][:, :, k]]
    mixed_ids = [x[:, (q, k)[i % 2]] for i, x in enumerate(ids)]
    upstream = [x.index_select(x.dim() // 2, q) for x in upstream_of(rows[0])]
    got = run(segment_attention, mixed, mixed_ids, device=backend.device, upstream=upstream)
    for i, x in enumerate(want):
        if i == 2:
            x = x[:, :, k]
        x = x[:, :, q] if i in (0, 3) else x[:, :, k] if i in (4, 5) else x[:, q]
        torch.testing.assert_close(got[i], x)
