"""Value and gradients of every rule against the definition in float64."""

import math
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokcore.ops import PolicyLoss, policy_loss
from tokcore.ops.policy_loss_rules import (
    AGGREGATIONS,
    KL_ESTIMATORS,
    LEVELS,
    CispoBand,
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

_reference = import_module("tokcore.ops.policy_loss")._reference

# Bounds that the ratios of `draw` reach on both sides.
ANY_LEVEL = [
    Clip(),
    Clip(0.1, 0.3, delta=1.2),
    Clip(0.1, 0.3, delta=1.5, dual=1.4),
    Clip(dual=3.0),
    CispoCap(1.1),
    CispoBand(0.1, 0.2),
    Sapo(),
    Sapo(0.5, 3.0),
]
ONE_LEVEL = [
    (Vespo(), "token"),
    (Vespo(1.0, 0.5, 0.5, 0.0), "token"),
    (Gmpo(0.2, 0.3), "sequence"),
    (Dppo(0.02, 0.01, penalty=0.1), "token"),
    (Reinforce(), "token"),
]
SURROGATES = [(surrogate, level) for surrogate in ANY_LEVEL for level in LEVELS] + ONE_LEVEL
every_surrogate = pytest.mark.parametrize(("surrogate", "level"), SURROGATES, ids=str)
SAMPLERS = [
    Sampler(level, bound, most, 0.8)
    for level in ("token", "sequence")
    for bound, most in (("truncate", 1.2), ("mask", 1.3))
]


def draw(rows=4, length=7, *, seed=0, per_token=False, spread=0.4):
    """Every tensor that policy_loss takes, in float64: rows of any length (the last has no token
    at all), with holes.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    logprob = -normal(rows, length).abs()
    old = logprob + spread * normal(rows, length)
    sizes = torch.randint(1, length + 1, (rows, 1), generator=generator) if length else 0
    mask = (torch.arange(length) < sizes) & (torch.rand(rows, length, generator=generator) < 0.8)
    mask[-1:] = False
    return {
        "logprob": logprob,
        "advantages": normal(rows, length) if per_token else normal(rows),
        "old_logprob": old,
        "reference_logprob": logprob + normal(rows, length),
        "sampler_logprob": old + spread * normal(rows, length),
        "entropy": normal(rows, length).abs(),
        "mask": mask,
    }


def to(arguments, device, dtype=None):
    """Tensors on the device, floating ones in the dtype."""
    return {
        name: value.to(device, dtype if value.is_floating_point() else None)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in arguments.items()
    }


def evaluate(function, rules, arguments):
    """The loss, and its gradients by log-probability and entropy (0 where it has none)."""
    arguments = dict(arguments)
    leaves = [arguments.pop("logprob").detach().requires_grad_()]
    if arguments.get("entropy") is not None:
        arguments["entropy"] = arguments["entropy"].detach().requires_grad_()
        leaves.append(arguments["entropy"])
    loss = function(leaves[0], arguments.pop("advantages"), rules, **arguments)
    loss = loss[0] if isinstance(loss, tuple) else loss
    if not loss.requires_grad:
        return [loss.detach(), *(torch.zeros_like(leaf) for leaf in leaves)]
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return [loss.detach(), *grads]


def assert_right(backend, rules, arguments, dtype=torch.float64):
    narrow = to(arguments, "cpu", dtype)
    truth = evaluate(_reference, rules, to(narrow, "cpu", torch.float64))
    got = evaluate(policy_loss, rules, to(narrow, backend.device))
    assert all(value.dtype == dtype for value in got)
    got = [value.cpu().double() for value in got]
    if dtype == torch.float64:
        torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-12)
        return
    # The loss is rounded once, from float64: no plain float32 can be nearer. A gradient is
    # rounded as a token's own part, with its row's part, and as the product with what is known
    # last; parts that nearly cancel are no larger than the row's largest, with or without the KL.
    assert (got[0] - truth[0]).abs() <= 2**-24 * truth[0].abs() + 1e-12
    alone = evaluate(_reference, replace(rules, kl=None), to(narrow, "cpu", torch.float64))
    for value, true, other in zip(got[1:], truth[1:], alone[1:], strict=True):
        if true.numel() > 0:
            largest = (true.abs() + other.abs()).amax(-1, keepdim=True)
            assert ((value - true).abs() <= 4 * 2**-24 * largest + 1e-12).all()


@every_surrogate
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_surrogates(backend, surrogate, level, dtype):
    for seed in range(3):
        rules = PolicyLoss(surrogate, level)
        assert_right(backend, rules, draw(seed=seed), dtype)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("surrogate", ANY_LEVEL[::2], ids=str)
def test_advantages_of_each_token(backend, surrogate, level):
    rules = PolicyLoss(surrogate, level, kl=Kl(0.3), aggregation="token-mean")
    assert_right(backend, rules, draw(per_token=True))


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("corrected", [False, True])
def test_kl(backend, estimator, level, corrected):
    """The limits are in reach: d is a standard normal."""
    for limits in ({}, {"log_limit": 0.8}, {"limit": 0.2}, {"log_limit": 1.5, "limit": 0.9}):
        rules = PolicyLoss(Clip(), level, kl=Kl(0.7, estimator, corrected, **limits))
        assert_right(backend, rules, draw())
    assert_right(backend, rules, draw(seed=1), torch.float32)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
@every_surrogate
def test_ratio_to_the_sampler(backend, surrogate, level, sampler):
    rules = PolicyLoss(surrogate, level, sampler=sampler, kl=Kl(0.2))
    assert_right(backend, rules, draw())


@pytest.mark.parametrize("by_row", [True, False], ids=["rows", "tokens"])
@every_surrogate
def test_a_ratio_to_the_sampler_that_is_given(backend, surrogate, level, by_row):
    arguments = draw()
    ratio = arguments["logprob"].exp() * 2
    ratio[0, :2] = 0.0
    arguments["importance_ratio"] = ratio.sum(-1) / 4 if by_row else ratio
    assert_right(backend, PolicyLoss(surrogate, level, kl=Kl(0.2)), arguments)


def test_a_log_weight_of_vespo_beyond_its_bounds(backend):
    """Of a token 20 and -20; of a sequence 20 and ln 1e-8, with what the sampler adds."""
    for shift in (-30.0, -8.0, 3.0, 30.0):
        for sampler in (None, Sampler(bound="mask"), Sampler("sequence", most=math.inf)):
            arguments = draw()
            arguments["old_logprob"][:, ::2] += shift
            rules = PolicyLoss(Vespo(0.5, 0.01, 0.5, 0.01), sampler=sampler)
            assert_right(backend, rules, arguments)


@pytest.mark.parametrize("count_empty", [True, False])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_aggregations(backend, aggregation, count_empty):
    length = 9.0 if aggregation == "seq-mean-token-sum-norm" else None
    for level in ("token", "sequence"):
        for steps, normalizer in ((1, None), (4, None), (4, 7.5), (1, torch.tensor(5.0))):
            rules = PolicyLoss(
                level=level,
                aggregation=aggregation,
                length=length,
                count_empty=count_empty,
                entropy_coefficient=0.3,
                accumulation_steps=steps,
            )
            assert_right(backend, rules, draw(rows=5) | {"normalizer": normalizer})


@every_surrogate
def test_what_drops_tokens_and_rows(backend, surrogate, level):
    """Off-policy rows, tokens of low entropy, both and a bonus for the entropy of the rest."""
    for options in (
        {"off_policy_threshold": 0.05},
        {"top_entropy": 0.4, "entropy_coefficient": -0.2},
        {"top_entropy": 0.0, "off_policy_threshold": -0.1, "sampler": SAMPLERS[0]},
    ):
        rules = PolicyLoss(surrogate, level, kl=Kl(0.3, "k2"), **options)
        assert_right(backend, rules, draw(rows=6, seed=2))


@pytest.mark.parametrize("level", LEVELS)
def test_limit_of_the_log_ratio(backend, level):
    for surrogate in (Clip(10.0, 10.0), Sapo(), CispoCap(1.2)):
        rules = PolicyLoss(surrogate, level, log_ratio_limit=0.15, kl=Kl(0.3, corrected=True))
        assert_right(backend, rules, draw())


@pytest.mark.parametrize("absent", ["old_logprob", "mask", "sampler_logprob"])
@pytest.mark.parametrize("level", LEVELS)
def test_what_may_be_absent(backend, absent, level):
    rules = PolicyLoss(Clip(), level, kl=Kl(0.3), off_policy_threshold=0.0)
    arguments = draw()
    del arguments[absent]
    assert_right(backend, rules, arguments)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 257, 1000])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_lengths(backend, length, level):
    """Several warps of the CUDA kernel, and not full ones."""
    rules = PolicyLoss(level=level, kl=Kl(0.1, corrected=True), entropy_coefficient=0.1)
    assert_right(backend, rules, draw(rows=3, length=length))
    if level == "sequence" and length > 31:
        assert_right(backend, replace(rules, surrogate=Gmpo()), draw(rows=2, length=length))


def test_more_rows_than_threads(backend):
    assert_right(backend, PolicyLoss(), draw(rows=300, length=2))


@st.composite
def any_rules(draw):
    surrogate, level = draw(st.sampled_from(SURROGATES))
    aggregation = draw(st.sampled_from(list(AGGREGATIONS)))
    limit = st.sampled_from([math.inf, 0.7])
    kl = st.builds(
        Kl,
        st.sampled_from([0.0, 0.5]),
        st.sampled_from(list(KL_ESTIMATORS)),
        st.booleans(),
        limit,
        limit,
    )
    return PolicyLoss(
        surrogate,
        level,
        kl=draw(st.none() | kl),
        aggregation=aggregation,
        length=20 if aggregation == "seq-mean-token-sum-norm" else None,
        count_empty=draw(st.booleans()),
        log_ratio_limit=draw(limit),
        sampler=draw(st.none() | st.sampled_from(SAMPLERS)),
        off_policy_threshold=draw(st.sampled_from([math.inf, 0.0])),
        top_entropy=draw(st.sampled_from([1.0, 0.6])),
        entropy_coefficient=draw(st.sampled_from([0.0, 0.2])),
        accumulation_steps=draw(st.integers(1, 3)),
    )


@settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rules=any_rules(),
    rows=st.integers(1, 5),
    length=st.integers(1, 40),
    per_token=st.booleans(),
    normalizer=st.none() | st.floats(1.0, 50.0),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 2**16),
)
def test_any_rules_and_shapes(backend, rules, rows, length, per_token, normalizer, dtype, seed):
    per_token = per_token and not isinstance(rules.surrogate, Gmpo | Vespo)
    arguments = draw(rows, length, seed=seed, per_token=per_token, spread=0.5)
    assert_right(backend, rules, arguments | {"normalizer": normalizer}, dtype)


# The weights of CISPO and VESPO are constants by design, and so is what GSPO-token does not move:
# their gradient is not that of their value.
WITHOUT_CONSTANTS = [
    (surrogate, level)
    for surrogate, level in SURROGATES
    if level != "sequence_token" and not isinstance(surrogate, CispoCap | CispoBand | Vespo)
]


@pytest.mark.parametrize(("surrogate", "level"), WITHOUT_CONSTANTS, ids=str)
def test_gradcheck(backend, surrogate, level):
    """By finite differences, which know nothing of the definition."""
    if backend.name == "cuda":
        pytest.skip("says the same, slowly")
    rules = PolicyLoss(
        surrogate, level, kl=Kl(0.3, corrected=True), entropy_coefficient=0.3, top_entropy=0.7
    )
    arguments = to(draw(rows=3, length=4, seed=5), backend.device)
    logprob, entropy = (arguments.pop(name).requires_grad_() for name in ("logprob", "entropy"))
    threshold = torch.tensor(0.5, device=backend.device).double()
    advantages = arguments.pop("advantages")

    def loss(logprob, entropy):
        return policy_loss(
            logprob, advantages, rules, entropy=entropy, entropy_threshold=threshold, **arguments
        )[0]

    assert torch.autograd.gradcheck(loss, (logprob, entropy))
