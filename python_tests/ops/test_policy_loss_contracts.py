"""What policy_loss owes to torch and to whoever calls it wrongly."""

import math
import re
from dataclasses import replace

import pytest
import torch
from test_policy_loss import draw, evaluate, to
from torch.autograd import forward_ad
from torch.library import opcheck

from tokcore import _library
from tokcore.ops import PolicyLoss, policy_loss
from tokcore.ops.policy_loss_rules import (
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
    numbers_of,
)

# torch deprecates what its own compiler and forward mode import.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
INF, NAN = math.inf, math.nan
ALL = PolicyLoss(
    Clip(),
    "sequence",
    kl=Kl(0.3, corrected=True),
    sampler=Sampler(),
    off_policy_threshold=0.1,
    top_entropy=0.6,
    entropy_coefficient=0.2,
)


def arguments_on(backend, dtype=torch.float32, **options):
    return to(draw(**options), backend.device, dtype)


def call(arguments, rules=ALL, **other):
    arguments = arguments | other
    logprob, advantages = arguments.pop("logprob"), arguments.pop("advantages")
    return policy_loss(logprob, advantages, rules, **arguments)


# ---- torch ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["all", "few", "packed", "empty"])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_opcheck(backend, kind, needs_grad):
    """Every optional argument present or absent, with and without gradients."""
    a = arguments_on(backend, rows=0 if kind == "empty" else 3, length=5)
    tokens = [a["logprob"], a["old_logprob"], a["reference_logprob"], a["sampler_logprob"]]
    tokens += [a["entropy"], a["mask"]]
    logprob, old, reference, sampler, entropy, mask = (
        [x.flatten() for x in tokens] if kind == "packed" else tokens
    )
    ends = torch.tensor([0, 4, 4, 15], device=backend.device) if kind == "packed" else None
    scalar = torch.tensor(2.0, device=backend.device, dtype=torch.float64)
    rules, importance = (PolicyLoss(Sapo()), 0) if kind == "few" else (ALL, 3)
    optional = [old, reference, sampler, None, entropy, mask, ends, scalar, scalar]
    if kind == "few":
        optional = [None] * 9
    with_entropy = needs_grad and kind != "few"
    if needs_grad:
        logprob = logprob.clone().requires_grad_()
        if with_entropy:
            optional[4] = entropy.clone().requires_grad_()
    numbers = numbers_of(rules, importance, True)
    forward = (logprob, a["advantages"], *optional, *numbers, needs_grad, with_entropy)
    opcheck(_library.native().policy_loss, forward)
    if needs_grad:
        with torch.no_grad():
            loss, _, *saved = _library.native().policy_loss(*forward)
        opcheck(_library.native().policy_loss_backward, (loss * 2, logprob.detach(), *saved))


@pytest.mark.parametrize("kind", ["padded", "packed"])
@pytest.mark.parametrize("rules", [ALL, replace(ALL, top_entropy=1.0)], ids=["focus", "all"])
def test_compile_without_graph_breaks(backend, kind, rules):
    """Nothing looks at a value, which would also stall a GPU."""
    torch._dynamo.reset()

    def step(logprob, entropy, advantages, others):
        loss, metrics = policy_loss(logprob * 1, advantages, rules, entropy=entropy * 1, **others)
        return loss * 2, metrics["ratio"] + metrics["kl"]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for rows in (3, 4):
        others = arguments_on(backend, rows=rows)
        if kind == "packed":
            others = {k: v.flatten() if v.dim() == 2 else v for k, v in others.items()}
            others["cu_seqlens"] = torch.arange(rows + 1, device=backend.device) * 7
        logprob, entropy = others.pop("logprob"), others.pop("entropy")
        advantages = others.pop("advantages")
        results = []
        for function in (step, compiled):
            leaves = [x.clone().requires_grad_() for x in (logprob, entropy)]
            values = function(*leaves, advantages, others)
            results.append([*values, *torch.autograd.grad(values[0], leaves)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("of", ["the loss", "a function of it"])
def test_second_derivatives_raise_and_name_the_operator(backend, of):
    """A gradient penalty must not take the gradient for a constant."""
    arguments = arguments_on(backend)
    leaf = arguments["logprob"].requires_grad_()
    loss, _ = call(arguments)
    loss = loss if of == "the loss" else loss**2
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"policy_loss_backward.*double backward"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("name", ["logprob", "entropy"])
def test_forward_mode_and_functional_derivatives_raise(backend, name):
    """Forward mode would get a zero tangent without a word."""
    arguments = arguments_on(backend)

    def loss(x):
        return call(arguments, **{name: x})[0]

    message = r"policy_loss: .*torch\.func"
    value = arguments[name]
    with pytest.raises(NotImplementedError, match=message):
        torch.func.grad(loss)(value)
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(loss, (value,), (value,))
    with pytest.raises(NotImplementedError, match=message), forward_ad.dual_level():
        loss(forward_ad.make_dual(value, value))


def test_vmap_is_a_clear_error(backend):
    logprob = torch.zeros(2, 3, 4, device=backend.device)
    advantages = torch.ones(3, device=backend.device)
    with pytest.raises(NotImplementedError, match=r"policy_loss: cannot be batched by torch\.vmap"):
        torch.vmap(lambda x: policy_loss(x, advantages, PolicyLoss(Reinforce()))[0])(logprob)


def test_without_gradients(backend):
    arguments = arguments_on(backend)
    want, _ = call(arguments)
    leaf = arguments["logprob"].clone().requires_grad_()
    with torch.no_grad():
        loss, _ = call(arguments, logprob=leaf)
    assert not loss.requires_grad
    assert torch.equal(loss, want)
    loss, _ = call(arguments, logprob=leaf)
    assert loss.requires_grad
    assert torch.equal(loss.detach(), want)


def test_only_one_of_the_two_is_differentiated(backend):
    arguments = arguments_on(backend)
    both = evaluate(policy_loss, ALL, arguments)
    for i, name in ((1, "logprob"), (2, "entropy")):
        leaf = arguments[name].clone().requires_grad_()
        loss, _ = call(arguments, **{name: leaf})
        assert torch.equal(torch.autograd.grad(loss, leaf)[0], both[i])


def test_the_entropy_has_a_gradient_only_where_it_has_a_weight(backend):
    arguments = arguments_on(backend)
    rules = PolicyLoss(top_entropy=0.5)
    leaf, entropy = (arguments[k].clone().requires_grad_() for k in ("logprob", "entropy"))
    loss, metrics = call(arguments, rules, logprob=leaf, entropy=entropy)
    of_logprob, of_entropy = torch.autograd.grad(loss, [leaf, entropy], allow_unused=True)
    assert of_logprob.abs().sum() > 0
    assert of_entropy is None
    assert not metrics["entropy"].requires_grad


def test_upstream_gradients_multiply(backend):
    arguments = arguments_on(backend, torch.float64)
    leaf = arguments["logprob"].clone().requires_grad_()
    loss, _ = call(arguments, logprob=leaf)
    (one,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (more,) = torch.autograd.grad(loss * -3, leaf)
    torch.testing.assert_close(more, -3 * one, rtol=1e-15, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves_are_taken_as_float32(backend, dtype):
    halves = arguments_on(backend, dtype)
    want = evaluate(policy_loss, ALL, to(halves, backend.device, torch.float32))
    got = evaluate(policy_loss, ALL, halves)
    assert got[0].dtype == torch.float32
    assert torch.equal(got[0], want[0])
    for gradient, wide in zip(got[1:], want[1:], strict=True):
        assert torch.equal(gradient, wide.to(dtype))
    # beside float32 log-probabilities, a half widens
    mixed = halves | {"logprob": halves["logprob"].float()}
    assert torch.equal(call(mixed)[0], want[0])


def test_autocast_changes_nothing(backend):
    arguments = arguments_on(backend)
    want = call(arguments)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        got = call(arguments)
    assert got[0].dtype == torch.float32
    assert torch.equal(got[0], want[0])
    assert got[1] == want[1]


def test_strides_are_no_matter(backend):
    arguments = arguments_on(backend)
    want = evaluate(policy_loss, ALL, arguments)
    turned = {k: v.t().contiguous().t() if v.dim() == 2 else v for k, v in arguments.items()}
    assert not turned["logprob"].is_contiguous()
    got = evaluate(policy_loss, ALL, turned)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_meta_tensors_have_the_right_shapes():
    arguments = to(draw(), "meta", torch.float32)
    loss, metrics = call(arguments)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert all(value.shape == () for value in metrics.values())


# ---- errors ---------------------------------------------------------------------------------

X = torch.zeros(2, 3)
ROWS = torch.ones(2)
PLAIN = PolicyLoss()
ENDS = torch.tensor([0, 2, 3])
PACKED = {"logprob": X[0], "cu_seqlens": ENDS}
ERRORS = [
    ({"logprob": [0.0]}, TypeError, "logprob must be a torch.Tensor, got list"),
    ({"logprob": X.long()}, TypeError, "logprob must be float32.*got torch.int64"),
    ({"logprob": X[0]}, ValueError, r"logprob must have shape \(B, T\), or .*got \(3,\)"),
    ({"logprob": X[None]}, ValueError, r"logprob must have shape \(B, T\).*got \(1, 2, 3\)"),
    ({"rules": "grpo"}, TypeError, "rules must be a PolicyLoss, got str"),
    ({"advantages": 1.0}, TypeError, "advantages must be a torch.Tensor, got float"),
    ({"advantages": ROWS.long()}, TypeError, "advantages must be float32.*got torch.int64"),
    ({"advantages": ROWS[:1]}, ValueError, r"advantages must have shape \(2,\), or .*got \(1,\)"),
    ({"advantages": ROWS[:, None]}, ValueError, r"advantages must .*broadcast.*got \(2, 1\)"),
    ({"advantages": ROWS.clone().requires_grad_()}, ValueError, "advantages must not require"),
    ({"advantages": ROWS.double()}, TypeError, "advantages must have the dtype .*float64"),
    ({"advantages": ROWS.to("meta")}, ValueError, "advantages must .*on cpu.*on meta"),
    ({"old_logprob": X[:1]}, ValueError, r"old_logprob must have the shape .*got \(1, 3\)"),
    ({"old_logprob": X.double()}, TypeError, "old_logprob must have the dtype .*got torch.float64"),
    ({"old_logprob": X.clone().requires_grad_()}, ValueError, "old_logprob must not require grad"),
    ({"reference_logprob": X.int()}, TypeError, "reference_logprob must be float32.*int32"),
    ({"reference_logprob": X.to("meta")}, ValueError, "reference_logprob must .*on cpu.*on meta"),
    ({"sampler_logprob": X.t()}, ValueError, r"sampler_logprob must have the shape .*got \(3, 2\)"),
    ({"importance_ratio": ROWS[:1]}, ValueError, r"importance_ratio must have shape .*got \(1,\)"),
    ({"importance_ratio": X.clone().requires_grad_()}, ValueError, "importance_ratio must not"),
    ({"entropy": X[0]}, ValueError, r"entropy must have the shape .*got \(3,\)"),
    ({"mask": X}, TypeError, r"mask must be bool \(True = keep\), got torch.float32"),
    ({"mask": X[:1].bool()}, ValueError, r"mask must have the shape .*got \(1, 3\)"),
    ({"normalizer": torch.ones(1)}, ValueError, r"normalizer must be a scalar .*got \(1,\)"),
    ({"normalizer": -1.0}, ValueError, "normalizer must be in .*got -1.0"),
    ({"normalizer": NAN}, ValueError, "normalizer must be in .*got nan"),
    ({"normalizer": "3"}, TypeError, "normalizer must be a number, got '3'"),
    ({"entropy_threshold": ROWS}, ValueError, r"entropy_threshold must be a scalar .*got \(2,\)"),
    # cu_seqlens
    (PACKED | {"logprob": X}, ValueError, r"packed rows need logprob \(total,\) .*got \(2, 3\)"),
    (PACKED | {"cu_seqlens": ENDS.float()}, TypeError, "cu_seqlens must be int32 or int64"),
    (PACKED | {"cu_seqlens": ENDS[None]}, ValueError, r"packed rows need .*and \(1, 3\)"),
    (PACKED | {"cu_seqlens": ENDS[:0]}, ValueError, r"packed rows need .*and \(0,\)"),
    (PACKED | {"cu_seqlens": [0, 3]}, TypeError, "cu_seqlens must be a torch.Tensor, got list"),
    # what the rules need
    ({"rules": PolicyLoss(kl=Kl(0.1))}, ValueError, "reference_logprob is needed by"),
    ({"rules": PolicyLoss(Dppo())}, ValueError, "old_logprob is needed by"),
    ({"rules": PolicyLoss(sampler=Sampler())}, ValueError, "sampler_logprob is needed by"),
    ({"rules": PolicyLoss(off_policy_threshold=0.0)}, ValueError, "off_policy_threshold needs"),
    ({"rules": PolicyLoss(entropy_coefficient=1)}, ValueError, "entropy is needed by"),
    ({"rules": PolicyLoss(top_entropy=0.5)}, ValueError, "entropy is needed by"),
    (
        {"rules": PolicyLoss(sampler=Sampler()), "importance_ratio": X},
        ValueError,
        r"importance_ratio .*excludes rules\.sampler",
    ),
    (
        {"rules": PolicyLoss(Vespo()), "advantages": X},
        ValueError,
        "advantages must be one a row for Vespo",
    ),
    (
        {"rules": PolicyLoss(Gmpo(), "sequence"), "advantages": X},
        ValueError,
        "advantages must be one a row for Gmpo",
    ),
]


@pytest.mark.parametrize(("wrong", "error", "text"), ERRORS)
def test_named_errors(backend, wrong, error, text):
    arguments = {"logprob": X, "advantages": ROWS, "rules": PLAIN} | wrong
    arguments = backend.place(arguments)
    text = text.replace("on cpu", f"on {torch.zeros(0, device=backend.device).device}")
    with pytest.raises(error, match=f"^policy_loss: {text}"):
        policy_loss(**arguments)


RULES = [
    ({"surrogate": "clip"}, TypeError, "surrogate must be Clip, .*got 'clip'"),
    ({"surrogate": Clip}, TypeError, "surrogate must be Clip, "),
    ({"surrogate": Clip(low=-0.1)}, ValueError, "surrogate has a parameter out of .*low=-0.1"),
    ({"surrogate": Clip(high=NAN)}, ValueError, "surrogate has a parameter out of .*high=nan"),
    ({"surrogate": Clip(delta=0.0)}, ValueError, "surrogate has a parameter out of .*delta=0.0"),
    ({"surrogate": Clip(dual=1.0)}, ValueError, "surrogate has a parameter out of .*dual=1.0"),
    ({"surrogate": CispoCap(0.0)}, ValueError, "surrogate has a parameter out of .*cap=0.0"),
    ({"surrogate": CispoBand(-1.0)}, ValueError, "surrogate has a parameter out of .*low=-1.0"),
    ({"surrogate": Sapo(0.0)}, ValueError, "surrogate has a parameter out of .*positive=0.0"),
    ({"surrogate": Sapo(1.0, INF)}, ValueError, "surrogate has a parameter out of .*negative=inf"),
    ({"surrogate": Vespo(NAN)}, ValueError, "surrogate has a parameter out of .*k_positive=nan"),
    ({"surrogate": Dppo(penalty=-1)}, ValueError, "surrogate has a parameter out .*penalty=-1"),
    (
        {"surrogate": Gmpo(-0.1), "level": "sequence"},
        ValueError,
        "surrogate has a parameter out of .*low=-0.1",
    ),
    ({"surrogate": Gmpo()}, ValueError, "surrogate Gmpo goes with level 'sequence', got 'token'"),
    ({"surrogate": Vespo(), "level": "sequence"}, ValueError, "surrogate Vespo goes with level"),
    ({"surrogate": Reinforce(), "level": "sequence"}, ValueError, "surrogate Reinforce goes with"),
    ({"surrogate": Dppo(), "level": "sequence_sum"}, ValueError, "surrogate Dppo goes with level"),
    ({"level": "row"}, ValueError, "level must be one of token, sequence, .*got 'row'"),
    ({"aggregation": "mean"}, ValueError, "aggregation must be one of token-mean, .*got 'mean'"),
    ({"length": 5.0}, ValueError, "length is for aggregation 'seq-mean-token-sum-norm'"),
    ({"aggregation": "seq-mean-token-sum-norm"}, ValueError, "length is for aggregation"),
    (
        {"aggregation": "seq-mean-token-sum-norm", "length": 0.5},
        ValueError,
        r"length must be in \[1, .*got 0.5",
    ),
    ({"log_ratio_limit": 0.0}, ValueError, "log_ratio_limit must be positive, got 0.0"),
    ({"log_ratio_limit": NAN}, ValueError, "log_ratio_limit must be positive, got nan"),
    ({"off_policy_threshold": NAN}, ValueError, "off_policy_threshold must be a number, got nan"),
    ({"top_entropy": 1.5}, ValueError, r"top_entropy must be in \[0, 1\].*got 1.5"),
    ({"top_entropy": True}, TypeError, "top_entropy must be a number, got True"),
    ({"entropy_coefficient": INF}, ValueError, "entropy_coefficient must be in .*got inf"),
    ({"accumulation_steps": 0}, ValueError, "accumulation_steps must be positive, got 0"),
    ({"accumulation_steps": 1.5}, TypeError, "accumulation_steps must be an int, got 1.5"),
    ({"compat": "verl"}, ValueError, "compat must be one of trl, got 'verl'"),
    ({"kl": Kl(0.1, "k4")}, ValueError, "kl.estimator must be one of k1, .*got 'k4'"),
    ({"kl": Kl(-0.1)}, ValueError, r"kl.coefficient must be in \[0, .*got -0.1"),
    ({"kl": Kl(0.1, limit=0.0)}, ValueError, "kl.log_limit and kl.limit must be positive"),
    ({"sampler": Sampler("row")}, ValueError, "sampler.level must be one of token, .*got 'row'"),
    ({"sampler": Sampler(bound="clip")}, ValueError, "sampler.bound must be one of truncate"),
    ({"sampler": Sampler(most=1, least=2)}, ValueError, "sampler must have 0 <= least <= most"),
]


@pytest.mark.parametrize(("wrong", "error", "text"), RULES)
def test_named_errors_of_the_rules(wrong, error, text):
    with pytest.raises(error, match=f"^PolicyLoss: {text}"):
        PolicyLoss(**wrong)


def test_the_native_operator_checks_once_more(backend):
    x = X.to(backend.device)
    rest = [None] * 9
    numbers = numbers_of(PolicyLoss(kl=Kl(0.1)), 0, True)
    native = _library.native().policy_loss
    for tensors, text in (
        ((x, ROWS.to(backend.device)), "reference_logprob is needed by these rules, got none"),
        ((x.half(), ROWS.to(backend.device)), "logprob must be float32 or float64, got Half"),
        ((x[0], ROWS.to(backend.device)), "logprob must have shape (B, T), got"),
        ((x, ROWS[:1].to(backend.device)), "advantages must"),
    ):
        with pytest.raises(RuntimeError, match=f"policy_loss: {re.escape(text)}"):
            native(*tensors, *rest, *numbers, False, False)
