"""What sparse_window_attention computes: by hand, and in float64 against torch's own attention."""

import math

import pytest
import torch
import torch.nn.functional as F
from accuracy import HALF_ULP, ROUNDOFF, SLACK
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokcore.ops import sparse_window_attention
from tokcore.ops.sparse_window_attention import _reference, _seen

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INF, NAN = math.inf, math.nan


def draw(sizes, dtype, *, lists=0, listed=0, seed=0, spread=1.0):
    """Query, key, value; and for each list up to ``listed`` ascending positions, then -1."""
    batch, heads, key_heads, queries, keys, dim = sizes
    generator = torch.Generator().manual_seed(seed)
    rows = [
        (spread * torch.randn(batch, h, n, dim, generator=generator)).to(dtype)
        for h, n in ((heads, queries), (key_heads, keys), (key_heads, keys))
    ]
    if lists == 0:
        return rows, None
    index = torch.full((batch, lists, listed), -1, dtype=torch.int32)
    for row in index.view(batch * lists, listed):
        most = min(listed, keys)
        count = int(torch.randint(most // 2, most + 1, (), generator=generator))
        row[:count] = torch.randperm(keys, generator=generator)[:count].sort().values
    return rows, index


def torch_attention(query, key, value, window, index, *, scale=None):
    """What a user has: a mask of all pairs."""
    seen = _seen(query, key, window, index)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=seen, scale=scale, enable_gqa=True
    )


def upstream_of(like):
    """In values that every dtype holds."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(-8, 9, like.shape, generator=generator).div(4).to(like.dtype)


def run(function, rows, window, index, *, device="cpu", upstream=None, **options):
    """The output, and the gradients by all rows of a random multiple of it."""
    rows = [x.detach().to(device).requires_grad_() for x in rows]
    index = None if index is None else index.to(device)
    output = function(*rows, window, index, **options)
    upstream = upstream_of(rows[0].cpu()) if upstream is None else upstream
    grads = torch.autograd.grad(output, rows, upstream.to(device))
    return [x.detach().cpu() for x in (output, *grads)]


def bounds(rows, window, index, *, scale=None):
    """How far rounding may take each result of ``run``: SLACK roundoffs of what enters it.

    A weight is off by the roundoffs of its score, of its row's greatest one and of the logarithm of
    their number, which are those of lse too.
    """
    query, key, value = (x.double() for x in rows)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    u = SLACK * ROUNDOFF[torch.float64 if rows[0].dtype == torch.float64 else torch.float32]
    group, seen = query.shape[1] // key.shape[1], _seen(query, key, window, index)
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    sizes = (query.abs() @ key.abs().mT * abs(scale)).masked_fill(~seen, 0)
    count = seen.sum(3, keepdim=True)
    sizes = 1 + 2 * sizes.amax(3, keepdim=True) + count.log()
    p = (query @ key.mT * scale).masked_fill(~seen, -INF).softmax(3)
    upstream = upstream_of(rows[0]).double().abs()
    pushed = upstream @ value.abs().mT
    slopes = p * sizes * (pushed + (p * pushed).sum(3, keepdim=True)) * abs(scale)
    found = [p * sizes @ value.abs(), slopes @ key.abs(), slopes.mT @ query.abs()]
    found += [(p * sizes).mT @ upstream]
    found[2:] = [x.unflatten(1, (-1, group)).sum(2) for x in found[2:]]
    return [u * bound for bound in found]


def assert_no_worse(rows, window, index, device, **options):
    """|operator - truth| <= |torch's attention - truth| + bound, each element of each result."""
    truth = run(_reference, [x.double() for x in rows], window, index, **options)
    plain = run(torch_attention, rows, window, index, **options)
    got = run(sparse_window_attention, rows, window, index, device=device, **options)
    allowed = bounds(rows, window, index, **options)
    names = ("output", "query", "key", "value")
    for name, found, was, true, bound in zip(names, got, plain, truth, allowed, strict=True):
        assert (found.dtype, found.shape) == (was.dtype, was.shape), name
        relative, absolute = HALF_ULP[found.dtype]
        bound = bound + relative * true.abs() + absolute
        excess = (found.double() - true).abs() - (was.double() - true).abs() - bound
        assert bool((excess <= 0).all()), f"{name}: off by {excess.max():.3g} too much"


def index_of(*lists, device="cpu"):
    """(1, Hg, M) of lists."""
    most = max(map(len, lists))
    return torch.tensor([[[*x, *[-1] * (most - len(x))] for x in lists]]).int().to(device)


# ---- by hand --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "listed", "want"),
    [
        (1, None, [8.0, 0.0, 2.0, 6.0]),
        (2, None, [8.0, 4.0, 1.0, 4.0]),
        (3, None, [8.0, 4.0, 10 / 3, 8 / 3]),
        (4, None, [8.0, 4.0, 10 / 3, 4.0]),
        (9, None, [8.0, 4.0, 10 / 3, 4.0]),
        (1, [0], [8.0, 4.0, 5.0, 7.0]),
        (2, [0], [8.0, 4.0, 10 / 3, 16 / 3]),  # within the window it counts once
        (1, [0, 2], [8.0, 4.0, 5.0, 16 / 3]),
        (1, [3], [8.0, 0.0, 2.0, 6.0]),  # nobody looks ahead
        (2, [0, 1, 2, 3], [8.0, 4.0, 10 / 3, 4.0]),
        (1, [-1, -1], [8.0, 0.0, 2.0, 6.0]),
    ],
)
def test_means_by_hand(backend, window, listed, want):
    """Equal scores: the output is the mean of the values seen."""
    value = torch.tensor([8.0, 0.0, 2.0, 6.0], device=backend.device).view(1, 1, 4, 1)
    zeros = torch.zeros_like(value)
    index = None if listed is None else index_of(listed, device=backend.device)
    got = sparse_window_attention(zeros, zeros, value, window, index)
    torch.testing.assert_close(got.flatten().cpu(), torch.tensor(want))
    # The last two queries alone stand where they stood.
    got = sparse_window_attention(zeros[:, :, 2:], zeros, value, window, index)
    torch.testing.assert_close(got.flatten().cpu(), torch.tensor(want[2:]))


def test_a_softmax_and_its_gradients_by_hand(backend):
    """Query 2 sees token 0 (listed, weight 3/4) and itself (1/4), not token 1."""
    key = torch.tensor([math.log(3), 9.0, 0.0], device=backend.device).view(1, 1, 3, 1)
    value = torch.tensor([4.0, 100.0, 8.0], device=backend.device).view(1, 1, 3, 1)
    query = torch.ones(1, 1, 1, 1, device=backend.device)
    rows = [x.requires_grad_() for x in (query, key, value)]
    output = sparse_window_attention(*rows, 1, index_of([0], device=backend.device))
    assert output.item() == pytest.approx(5.0)
    of_query, of_key, of_value = torch.autograd.grad(output, rows, 2 * torch.ones_like(output))
    # slopes 2 * p * (v - 5): -1.5 and 1.5
    assert of_query.item() == pytest.approx(-1.5 * math.log(3), rel=1e-5)
    torch.testing.assert_close(of_key.flatten().cpu(), torch.tensor([-1.5, 0.0, 1.5]))
    torch.testing.assert_close(of_value.flatten().cpu(), torch.tensor([1.5, 0.0, 0.5]))


def test_heads_share_keys_and_lists(backend):
    """Four heads, two KV heads: heads 0, 1 read KV head 0. One list for all, or one for each."""
    zeros = torch.zeros(1, 4, 1, 1, device=backend.device)
    value = torch.tensor([[1.0, 2.0, 4.0], [10.0, 20.0, 40.0]], device=backend.device)
    value = value.view(1, 2, 3, 1)
    key = torch.zeros_like(value)
    for index, want in (
        (index_of([0]), [2.5, 2.5, 25.0, 25.0]),
        (index_of([0], [1]), [2.5, 2.5, 30.0, 30.0]),
        (index_of([0, 1], []), [7 / 3, 7 / 3, 40.0, 40.0]),
    ):
        got = sparse_window_attention(zeros, key, value, 1, index.to(backend.device))
        torch.testing.assert_close(got.flatten().cpu(), torch.tensor(want))


# ---- against torch's attention and the truth ------------------------------------------------

CASES = [  # B, Hq, Hkv, T, S, D; window; lists, listed
    ((1, 1, 1, 1, 1, 1), 1, 0, 0),
    ((2, 2, 2, 5, 5, 3), 2, 1, 3),
    ((1, 4, 2, 7, 7, 5), 3, 2, 4),
    ((1, 3, 1, 9, 9, 31), 1, 1, 2),
    ((2, 4, 2, 1, 40, 33), 7, 2, 9),
    ((1, 2, 1, 6, 70, 8), 40, 1, 35),
    ((1, 2, 2, 70, 71, 8), 5, 2, 70),
    ((1, 1, 1, 67, 67, 64), 100, 1, 5),
    ((1, 2, 1, 4, 9, 65), 3, 1, 9),
    ((1, 2, 2, 3, 5, 129), 2, 1, 2),
    ((1, 1, 1, 3, 4, 256), 2, 1, 2),
    ((1, 70, 1, 3, 4, 4), 2, 1, 2),
    ((1, 1, 1, 130, 130, 16), 33, 0, 0),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("sizes", "window", "lists", "listed"), CASES, ids=str)
def test_no_worse_than_torch(backend, sizes, window, lists, listed, dtype):
    rows, index = draw(sizes, dtype, lists=lists, listed=listed)
    assert_no_worse(rows, window, index, backend.device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [1, 2, 12, 13, 2**62])
@pytest.mark.parametrize("listed", ["none", "all", "the first", "-1 only", "no room"])
def test_windows_and_lists(backend, window, listed, dtype):
    rows, _ = draw((1, 4, 2, 12, 12, 8), dtype)
    index = {
        "none": None,
        "all": index_of(range(12), range(12)),
        "the first": index_of([0, 1]),
        "-1 only": index_of([-1, -1, -1], [-1, -1, -1]),
        "no room": torch.empty(1, 1, 0, dtype=torch.int32),
    }[listed]
    assert_no_worse(rows, window, index, backend.device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, -0.3, 0.0])
def test_scales_and_peaked_weights(backend, scale, dtype):
    rows, index = draw((2, 2, 1, 20, 24, 16), dtype, lists=1, listed=6, spread=4.0)
    assert_no_worse(rows, 5, index, backend.device, scale=scale)


def test_scores_far_from_0(backend):
    rows, index = draw((1, 2, 2, 40, 40, 4), torch.float32, lists=1, listed=4)
    rows[0][..., 0], rows[1][..., 0] = 60.0, 100.0
    assert_no_worse(rows, 6, index, backend.device)


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    sizes=st.tuples(*(st.integers(1, most) for most in (2, 3, 3, 45, 20, 40))),
    window=st.integers(1, 70),
    listed=st.integers(0, 40),
    shared=st.booleans(),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
)
def test_any_sizes(backend, sizes, window, listed, shared, seed, dtype):
    batch, group, key_heads, queries, more, dim = sizes
    backend.skip_above(
        batch * group * key_heads * queries * (queries + more) * dim, emulated=100_000
    )
    sizes = (batch, group * key_heads, key_heads, queries, queries + more - 1, dim)
    lists = 0 if listed == 0 else 1 if shared else key_heads
    rows, index = draw(sizes, dtype, lists=lists, listed=listed, seed=seed)
    assert_no_worse(rows, window, index, backend.device)


def test_longer_than_any_tile(backend):
    """Windows and lists of several tiles, and a group whose heads do not divide the rows."""
    sizes = (1, 3, 1, 300, 333, 16)
    backend.skip_above(300 * 333)
    rows, index = draw(sizes, torch.float32, lists=1, listed=150)
    assert_no_worse(rows, 101, index, backend.device)


# ---- what is not seen, and what is not finite -----------------------------------------------


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_what_is_not_seen_cannot_poison(backend, poison):
    """Token 40 is seen by queries 40 to 44; token 3, which is listed, by itself and all after."""
    rows, _ = draw((1, 2, 1, 70, 70, 8), torch.float32)
    index = index_of([3, 9])
    want = run(sparse_window_attention, rows, 5, index, device=backend.device)
    rows[1][:, :, 40] = rows[2][:, :, 40] = poison
    got = run(sparse_window_attention, rows, 5, index, device=backend.device)
    t = torch.arange(70)
    clean = (t < 40) | (t >= 45)
    assert got[0][:, :, ~clean].isnan().any(3).all()
    for i in (0, 1):
        assert torch.equal(got[i][:, :, clean], want[i][:, :, clean])
    unseen = (t <= 35) & (t != 3) & (t != 9) | (t >= 45)  # by one of those queries
    for i in (2, 3):
        assert torch.equal(got[i][:, :, unseen], want[i][:, :, unseen])
    rows[1][:, :, 3] = poison
    got = run(sparse_window_attention, rows, 5, index, device=backend.device)
    assert torch.equal(got[0][:, :, :3], want[0][:, :, :3])
    if math.isnan(poison):
        assert got[0][:, :, 3:].isnan().any(3).all()


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    ("scores", "want"),
    [
        ([-INF, 0.0], 6.0),
        ([0.0, -INF], 4.0),
        ([-INF, -INF], NAN),
        ([INF, 0.0], NAN),
        ([NAN, 0.0], NAN),
        ([0.0, NAN], NAN),
    ],
)
def test_scores_that_are_not_finite(backend, scores, want, which):
    """As in softmax: within a window, and of a listed token and a window."""
    keys = [scores[0], *[7.0] * 40 * which, scores[1]]
    key = torch.tensor(keys, device=backend.device).view(1, 1, -1, 1)
    value = torch.full_like(key, 50.0)
    value[0, 0, 0], value[0, 0, -1] = 4.0, 6.0
    query = torch.ones(1, 1, 1, 1, device=backend.device)
    index = index_of([0], device=backend.device) if which else None
    got = sparse_window_attention(query, key, value, 1 if which else 2, index, scale=1.0)
    assert got.item() == pytest.approx(want, nan_ok=True)


def test_a_row_does_not_depend_on_its_neighbours(backend):
    """Bit for bit: of a batch, of a head, of the queries before it."""
    rows, index = draw((2, 2, 2, 50, 60, 8), torch.float32, lists=2, listed=20)
    want = run(sparse_window_attention, rows, 17, index, device=backend.device)[0]
    some = [x[1:, 1:] for x in rows]
    some[0] = some[0][:, :, 33:]
    got = run(sparse_window_attention, some, 17, index[1:, 1:], device=backend.device)[0]
    assert torch.equal(got, want[1:, 1:, 33:])


def test_the_gradients_of_unseen_keys_are_0(backend):
    """Before the window of the first query, and not listed."""
    rows, _ = draw((1, 2, 2, 4, 90, 4), torch.float32)
    grads = run(sparse_window_attention, rows, 3, index_of([20, 50]), device=backend.device)
    seen = torch.zeros(90, dtype=torch.bool)
    seen[[20, 50]] = seen[84:] = True
    for x in grads[2:]:
        assert x[:, :, ~seen].eq(0).all()
        assert x[:, :, seen].ne(0).any(3).all()
