"""Kinks, poison, overflow, nothing to do, packed rows: values known by hand."""

import math

import pytest
import torch
from test_policy_loss import ANY_LEVEL, ONE_LEVEL, SAMPLERS, draw, evaluate, to

from tokcore import _library
from tokcore.ops import PolicyLoss, policy_loss
from tokcore.ops.policy_loss import _reference, top_entropy_threshold
from tokcore.ops.policy_loss_rules import (
    CispoCap,
    Clip,
    Dppo,
    Gmpo,
    Kl,
    Reinforce,
    Sampler,
    Sapo,
    Vespo,
)

INF, NAN = math.inf, math.nan
EVERYTHING = [
    PolicyLoss(
        surrogate,
        level,
        kl=Kl(0.3, corrected=True),
        off_policy_threshold=0.1,
        top_entropy=0.6,
        entropy_coefficient=0.2,
        sampler=sampler,
    )
    for surrogate, level, sampler in [
        (Clip(delta=1.3, dual=2.0), "token", SAMPLERS[0]),
        (Clip(), "sequence", SAMPLERS[3]),
        (CispoCap(1.2), "sequence_token", SAMPLERS[1]),
        (Sapo(), "sequence_sum", SAMPLERS[2]),
        (Vespo(), "token", SAMPLERS[0]),
        (Gmpo(), "sequence", SAMPLERS[0]),
        (Dppo(), "token", SAMPLERS[2]),
        (Reinforce(), "token", None),
    ]
]
every_rule = pytest.mark.parametrize(
    "rules", EVERYTHING, ids=lambda rules: f"{type(rules.surrogate).__name__}-{rules.level}"
)


def one(backend, rules, log_ratio, advantage, **tokens):
    """Loss and gradient of a single token whose old log-probability is -1."""
    arguments = {
        "logprob": torch.tensor([[log_ratio - 1.0]], dtype=torch.float64),
        "advantages": torch.tensor([advantage], dtype=torch.float64),
        "old_logprob": torch.tensor([[-1.0]], dtype=torch.float64),
    }
    arguments |= {k: torch.tensor([[v]], dtype=torch.float64) for k, v in tokens.items()}
    loss, gradient, *_ = evaluate(policy_loss, rules, to(arguments, backend.device))
    return loss.item(), gradient.item()


def everything(backend, rules, arguments):
    """Loss, gradients and metrics in one list."""
    values = evaluate(policy_loss, rules, to(arguments, backend.device))
    arguments = to(arguments, backend.device)
    logprob, advantages = arguments.pop("logprob"), arguments.pop("advantages")
    _, metrics = policy_loss(logprob, advantages, rules, **arguments)
    return [*values, *metrics.values()]


# ---- kinks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("advantage", [1.5, -1.5])
@pytest.mark.parametrize("level", ["token", "sequence", "sequence_token", "sequence_sum"])
def test_on_policy_the_gradient_is_that_of_reinforce(backend, advantage, level):
    """A ratio of exactly 1, even where the bounds are 1: torch.clamp has them inside."""
    for clip in (Clip(), Clip(0.0, 0.0), Clip(0.0, 0.0, delta=1.0)):
        got = one(backend, PolicyLoss(clip, level), 0.0, advantage)
        assert got == (-advantage, -advantage)


def test_a_ratio_at_its_bound(backend):
    """The bound is inside; where the dual clip equals the loss, half of each."""
    if backend.name == "cuda":
        pytest.skip("another exp: the ratio would not be the bound")
    bound, low = math.exp(0.25), math.exp(-0.25)
    high = Clip(low=0.0, high=bound - 1)
    assert 1 + high.high == bound  # exactly: a difference of neighbours is
    assert one(backend, PolicyLoss(high), 0.25, 2.0) == (-2 * bound, -2 * bound)
    assert one(backend, PolicyLoss(high), 0.25 + 1e-9, 2.0)[1] == 0
    assert one(backend, PolicyLoss(Clip(1 - low, 0.0)), -0.25, -2.0) == (2 * low, 2 * low)
    assert one(backend, PolicyLoss(Clip(1 - low, 0.0)), -0.25 - 1e-9, -2.0)[1] == 0
    delta = Clip(high=0.0, delta=bound)
    assert one(backend, PolicyLoss(delta), 0.25, -2.0) == (2 * bound, 2 * bound)
    assert one(backend, PolicyLoss(delta), 0.25 + 1e-9, -2.0) == (2 * bound, 0)
    dual = Clip(high=0.0, dual=bound)
    assert one(backend, PolicyLoss(dual), 0.25, -2.0) == (2 * bound, bound)
    assert one(backend, PolicyLoss(dual), 0.25 + 1e-9, -2.0) == (2 * bound, 0)


# Everything at these kinks is exact in floating point, so that the definition is there as well.
KINKS = {
    "log_ratio_limit": (PolicyLoss(Sapo(), log_ratio_limit=0.5), {}),
    "log_ratio_limit of a sequence": (PolicyLoss(Sapo(), "sequence", log_ratio_limit=0.5), {}),
    "gmpo": (PolicyLoss(Gmpo(0.5, 0.5), "sequence"), {}),
    "kl log_limit": (PolicyLoss(kl=Kl(1.0, "k2", log_limit=2.0)), {"reference_logprob": 2.0}),
    "kl limit, k1": (PolicyLoss(kl=Kl(1.0, "k1", limit=2.0)), {"reference_logprob": 2.0}),
    "kl limit, k2": (PolicyLoss(kl=Kl(1.0, "k2", limit=2.0)), {"reference_logprob": 2.0}),
    "kl limit, abs": (PolicyLoss(kl=Kl(1.0, "abs", limit=2.0)), {"reference_logprob": 2.0}),
    "kl 0, abs": (PolicyLoss(kl=Kl(1.0, "abs")), {"reference_logprob": 0.0}),
    "kl 0, k3": (PolicyLoss(kl=Kl(1.0, "k3")), {"reference_logprob": 0.0}),
    "threshold": (PolicyLoss(off_policy_threshold=0.5), {}),
}


@pytest.mark.parametrize(("rules", "gaps"), KINKS.values(), ids=KINKS)
@pytest.mark.parametrize("log_ratio", [0.5, -0.5])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_kinks_as_torch_has_them(backend, rules, gaps, log_ratio, advantage):
    arguments = {
        "logprob": torch.full((1, 2), log_ratio - 1.0).double(),
        "advantages": torch.tensor([advantage]).double(),
        "old_logprob": torch.full((1, 2), -1.0).double(),
    }
    for name, gap in gaps.items():
        for sign in (1, -1):
            arguments[name] = arguments["logprob"] + sign * gap
            want = evaluate(_reference, rules, arguments)
            got = evaluate(policy_loss, rules, to(arguments, backend.device))
            torch.testing.assert_close([x.cpu() for x in got], want, rtol=1e-14, atol=0)
    if not gaps:
        want = evaluate(_reference, rules, arguments)
        got = evaluate(policy_loss, rules, to(arguments, backend.device))
        torch.testing.assert_close([x.cpu() for x in got], want, rtol=1e-14, atol=0)


def test_a_ratio_to_the_sampler_at_its_bounds_is_inside(backend):
    for bounds in ({"most": 1.0}, {"most": 3.0, "least": 1.0}):
        for level in ("token", "sequence"):
            rules = PolicyLoss(Reinforce(), sampler=Sampler(level, "mask", **bounds))
            assert one(backend, rules, -1.0, 1.0, sampler_logprob=-1.0) == (2.0, -1.0)


def test_an_entropy_at_the_threshold_is_kept(backend):
    entropy = torch.tensor([[1.0, 2.0, 3.0]], device=backend.device)
    logprob = torch.full((1, 3), -1.0, device=backend.device)
    rules = PolicyLoss(Reinforce(), aggregation="token-sum", top_entropy=0.5)
    one_row = torch.ones(1, device=backend.device)
    loss, metrics = policy_loss(logprob, one_row, rules, entropy=entropy)
    assert loss.item() == 2.0  # the median and what is above it
    assert metrics["focused"].item() == pytest.approx(2 / 3)
    threshold = torch.tensor(3.0, device=backend.device)
    loss, _ = policy_loss(logprob, one_row, rules, entropy=entropy, entropy_threshold=threshold)
    assert loss.item() == 1.0


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("size", [1, 2, 10, 101])
def test_threshold_of_the_entropy_is_torchs_quantile(fraction, size):
    entropy = torch.randn(size, dtype=torch.float64).abs()
    mask = torch.rand(size) < 0.7
    mask[0] = True
    got = top_entropy_threshold(torch.where(mask, entropy, NAN), fraction, mask)
    want = torch.quantile(entropy[mask], 1 - fraction)
    torch.testing.assert_close(got, want, rtol=1e-14, atol=0)
    assert top_entropy_threshold(entropy, 0.0) == entropy.max()
    assert top_entropy_threshold(entropy, 1.0) == entropy.min()


# ---- what must have no effect ---------------------------------------------------------------


@every_rule
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_masked_positions_have_no_effect(backend, rules, poison):
    """On no bit of loss, gradients and metrics, whichever tensor it stands in."""
    for_rows = isinstance(rules.surrogate, Vespo | Gmpo)
    clean = draw(per_token=not for_rows)
    if rules.sampler is None:
        clean["importance_ratio"] = clean["logprob"].exp()
    mask = clean["mask"]
    assert (~mask[:-1]).any()
    poisoned = {
        name: torch.where(mask, value, poison) if value.shape == mask.shape else value
        for name, value in clean.items()
    } | {"mask": mask}
    if for_rows:  # the last row has no token at all
        poisoned["advantages"] = torch.cat([clean["advantages"][:-1], torch.tensor([poison])])
    want, got = everything(backend, rules, clean), everything(backend, rules, poisoned)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert (got[1].cpu()[~mask] == 0).all()
    assert (got[2].cpu()[~mask] == 0).all()


@every_rule
def test_packed_rows_are_padded_rows(backend, rules):
    padded = draw(rows=5, length=6)
    sizes = [4, 0, 6, 1, 3]
    inside = torch.arange(6) < torch.tensor(sizes)[:, None]
    padded["mask"] = inside & (torch.rand(5, 6) < 0.8)
    packed = {k: v[inside] if v.shape == inside.shape else v for k, v in padded.items()}
    ends = torch.tensor([0, *sizes]).cumsum(0)
    want = everything(backend, rules, padded)
    for dtype in (torch.int64, torch.int32):
        got = everything(backend, rules, packed | {"cu_seqlens": ends.to(dtype)})
        where = inside.to(backend.device)
        same = [want[0], want[1][where], want[2][where], *want[3:]]
        if backend.name == "cpu":
            assert all(torch.equal(a, b) for a, b in zip(got, same, strict=True))
        else:  # other threads take the tokens, and add them up in another order
            torch.testing.assert_close(got, same, rtol=1e-13, atol=1e-15)


@every_rule
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (3, 4)], ids=str)
def test_nothing_to_do(backend, rules, shape):
    arguments = {
        name: torch.full(shape, NAN, dtype=torch.float64)
        for name in ("logprob", "old_logprob", "reference_logprob", "sampler_logprob", "entropy")
    }
    arguments |= {"advantages": torch.ones(shape[0]).double(), "mask": torch.zeros(shape).bool()}
    loss, *gradients = everything(backend, rules, arguments)[:3]
    assert loss == 0
    assert all(g.shape == shape and (g == 0).all() for g in gradients)


@pytest.mark.parametrize("rows", [0, 2])
def test_nothing_to_do_in_packed_rows(backend, rows):
    rules = PolicyLoss(Reinforce(), entropy_coefficient=0.1)
    nothing = torch.zeros(0, device=backend.device)
    leaves = [nothing.clone().requires_grad_() for _ in range(2)]
    loss, _ = policy_loss(
        leaves[0],
        torch.ones(rows, device=backend.device),
        rules,
        entropy=leaves[1],
        cu_seqlens=torch.zeros(rows + 1, dtype=torch.long, device=backend.device),
    )
    assert loss == 0
    assert [g.shape for g in torch.autograd.grad(loss, leaves)] == [(0,), (0,)]


def test_a_loss_that_nobody_differentiates(backend):
    """An upstream gradient of 0 is a gradient of 0, even of a loss that overflowed."""
    leaf = torch.tensor([[-1.0]], device=backend.device, requires_grad=True)
    loss, _ = policy_loss(
        leaf, -torch.ones(1, device=backend.device), PolicyLoss(), old_logprob=leaf.detach() - 1000
    )
    assert loss == INF
    (loss * 0).nan_to_num(0).backward()
    assert leaf.grad == 0


# ---- overflow -------------------------------------------------------------------------------

BOUNDED = [
    (Clip(), "token"),
    (Clip(), "sequence"),
    (Clip(), "sequence_token"),
    (Clip(), "sequence_sum"),
    (Clip(delta=2.0), "token"),
    (Sapo(), "token"),
    (Sapo(), "sequence"),
    (Gmpo(), "sequence"),
    (Dppo(), "token"),
]


@pytest.mark.parametrize(("surrogate", "level"), BOUNDED, ids=str)
def test_a_ratio_that_overflows_is_bounded_like_any_other(backend, surrogate, level):
    want = {Clip: -1.2, Sapo: -4.0, Gmpo: -math.exp(0.4), Dppo: 1e-3 * 999**2}[type(surrogate)]
    loss, gradient = one(backend, PolicyLoss(surrogate, level), 0.0, 1.0, old_logprob=-1000.0)
    assert loss == pytest.approx(want, rel=1e-14)
    assert gradient == (pytest.approx(2e-3 * 999) if surrogate == Dppo() else 0)


@pytest.mark.parametrize(
    ("surrogate", "level"),
    [(s, level) for s in ANY_LEVEL for level in ("token", "sequence")] + ONE_LEVEL,
    ids=str,
)
@pytest.mark.parametrize("old", [-1000.0, -INF])
def test_no_advantage_means_no_loss_whatever_the_ratio(backend, surrogate, level, old):
    if isinstance(surrogate, Dppo):
        if old == -INF:
            pytest.skip("the penalty itself is infinite")
        penalty = surrogate.penalty
        want = (pytest.approx(penalty * 999**2), pytest.approx(2 * penalty * 999))
    else:
        want = (0, 0)
    assert one(backend, PolicyLoss(surrogate, level), 0.0, 0.0, old_logprob=old) == want


def test_half_precision_ratios_do_not_overflow(backend):
    """exp(12) is beyond float16; log-probabilities of it are taken as float32."""
    logprob = torch.tensor([[-1.0]], dtype=torch.float16, device=backend.device).requires_grad_()
    one_row = torch.ones(1, dtype=torch.float16, device=backend.device)
    loss, _ = policy_loss(
        logprob, -one_row, PolicyLoss(), old_logprob=torch.full_like(logprob, -13.0).detach()
    )
    assert loss.item() == pytest.approx(math.exp(12))
    assert loss.dtype == torch.float32
    logprob = logprob.detach().requires_grad_()
    loss, _ = policy_loss(logprob, one_row, PolicyLoss(), old_logprob=logprob.detach() - 0.125)
    (gradient,) = torch.autograd.grad(loss, logprob)
    assert gradient.dtype == torch.float16
    assert gradient.item() == pytest.approx(-math.exp(0.125), rel=2**-11)


# ---- threads, order, malformed rows ---------------------------------------------------------


@every_rule
def test_threads_do_not_change_the_bits(backend, rules):
    if backend.name != "cpu":
        pytest.skip("the threads of the CPU kernel")
    threads = torch.get_num_threads()
    arguments = draw(rows=67, length=130)
    try:
        want = everything(backend, rules, arguments)
        for count in (1, 2, 5, 8):
            torch.set_num_threads(count)
            got = everything(backend, rules, arguments)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    finally:
        torch.set_num_threads(threads)


@every_rule
def test_any_order_of_blocks_and_threads(backend, rules):
    if backend.name != "emulated":
        pytest.skip("the emulation's order is what a seed can change")
    arguments = draw(rows=5, length=70)
    want = everything(backend, rules, arguments)
    for seed in range(4):
        with _library.use("emulated", seed=seed):
            got = everything(backend, rules, arguments)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    "ends",
    [[1, 3, 6], [0, 4, 3, 6], [0, 3, 5], [0, 3, 7], [0, -1, 6], [0, 2**62, 6], [0], [6], [0, 0]],
    ids=str,
)
@pytest.mark.parametrize("normalizer", [None, 3.0])
def test_malformed_row_ends(backend, ends, normalizer):
    """Raise where a look costs nothing; elsewhere the loss is NaN, and nothing is read out of
    bounds (which the sanitizer build would see).
    """
    leaf = torch.full((6,), -1.0, device=backend.device, requires_grad=True)
    cu_seqlens = torch.tensor(ends, device=backend.device)
    advantages = torch.ones(len(ends) - 1, device=backend.device)

    def run():
        return policy_loss(
            leaf, advantages, PolicyLoss(), cu_seqlens=cu_seqlens, normalizer=normalizer
        )[0]

    if backend.checks_values:
        with pytest.raises(RuntimeError, match=r"^policy_loss: cu_seqlens must rise from 0 to the"):
            run()
    else:
        assert run().isnan()
