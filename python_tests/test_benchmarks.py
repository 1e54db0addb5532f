"""The benchmarks measure what they say: the baselines are right, and so is the counting."""

import functools
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # behind an installed tokcore

from benchmarks import bars, floors, measure, report, run, study  # noqa: E402
from benchmarks.baselines import group_advantage as advantage_baselines  # noqa: E402
from benchmarks.baselines import grpo as grpo_baselines  # noqa: E402
from benchmarks.baselines import sequential_kl as kl_baselines  # noqa: E402
from benchmarks.baselines import tdpo as tdpo_baseline  # noqa: E402
from benchmarks.baselines import token_logprob as logprob_baselines  # noqa: E402
from benchmarks.suite import (  # noqa: E402
    BACKWARD,
    BATCHES,
    DTYPES,
    FORWARD,
    LOGITS,
    MODELS,
    SHAPES,
    Call,
    suites,
)
from tokcore.ops import PolicyLoss, policy_loss  # noqa: E402
from tokcore.ops.policy_loss_rules import Clip, Kl  # noqa: E402

GOLDEN = Path(__file__).with_name("golden")
SUITES = suites()
CPU = torch.device("cpu")
# The others' baselines are in test_benchmarks_alignment.py.
TOKEN_SUITES = {n: s for n, s in SUITES.items() if {*s.shapes} <= {*MODELS, *BATCHES}}

needs_compiler = pytest.mark.skipif(
    shutil.which(floors.compiler()) is None, reason="the floors are compiled on the spot"
)


# --- baselines ------------------------------------------------------------------------------------


def variants(*kinds):
    """(suite, dtype, variant): each variant of these kinds, on each dtype."""
    return [
        pytest.param(suite, DTYPES[dtype], variant, id=f"{name}-{variant.name}-{dtype}"[:80])
        for name, suite in TOKEN_SUITES.items()
        for dtype in suite.dtypes
        for variant in suite.variants(DTYPES[dtype], CPU)
        if variant.kind in kinds
    ]


def truth(name, inputs):
    """Outputs in float64, by formulas that no baseline shares: sums of powers, no log_softmax."""
    if name == "tdpo":
        policy, reference, labels = (value.double() for value in inputs)
        target = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1).long()
        kl, log_p, log_q = truth("sequential_kl", (policy, reference, target.clamp(min=0)))
        kept = target != -100
        m, k = ((torch.where(kept, x, 0.0)).sum(-1) for x in (log_p - log_q, kl))
        chosen, rejected = slice(0, len(m) // 2), slice(len(m) // 2, None)
        h = m[chosen] - m[rejected] - 0.5 * (k[rejected] - k[chosen].detach())
        return (torch.log1p((-0.1 * h).exp()).mean(),)
    if name.startswith("grpo"):
        return grpo_truth(*inputs)[: 2 if name == "grpo_entropy" else 1]
    if name.startswith("group_advantage"):
        return (advantage_truth(*inputs),)
    *logits, target = inputs
    weights = [value.double().exp() for value in logits]
    p = [weight / weight.sum(-1, keepdim=True) for weight in weights]
    at_target = [value.gather(-1, target[..., None])[..., 0].log() for value in p]
    if name == "token_logprob":
        return (at_target[0],)
    if name == "token_logprob_entropy":
        return at_target[0], -(p[0] * p[0].log()).sum(-1)
    return (p[1] * (p[1] / p[0]).log()).sum(-1), *at_target


def grpo_truth(logits, ids, advantages, old, reference, mask):
    """Loss and mean entropy: the clip by cases of the sign, the KL by its ratio of powers."""
    assert mask.all()
    weight = (logits / grpo_baselines.TEMPERATURE).exp()
    p = weight / weight.sum(-1, keepdim=True)
    at_id = p.gather(-1, ids[..., None])[..., 0]
    ratio, a = at_id / old.double().exp(), advantages.double()[:, None]
    surrogate = torch.where(a > 0, ratio.clamp(max=1.2), ratio.clamp(0.8, 3.0)) * a
    to_reference = reference.double().exp() / at_id
    losses = 0.04 * (to_reference - 1 - to_reference.log()) - surrogate
    return losses.mean(), -(p * p.log()).sum(-1).mean()


def advantage_truth(rewards, ids=None):
    """Variance from the differences of all pairs, a group at a time."""
    ids = torch.arange(len(rewards)) // 8 if ids is None else ids
    advantages = torch.empty_like(rewards)
    for identity in ids.unique():
        r = rewards[ids == identity]
        variance = (r[:, None] - r).square().sum() / (2 * len(r) * (len(r) - 1))
        advantages[ids == identity] = (r - r.sum() / len(r)) / (variance.sqrt() + 1e-4)
    return advantages


def outputs_and_gradient(function, suite, inputs):
    if BACKWARD not in suite.passes:
        outputs = function(*inputs)
        return (outputs,) if isinstance(outputs, torch.Tensor) else outputs, None
    leaf = inputs[0].detach().clone().requires_grad_()
    # A copy, which may be overwritten.
    outputs = function(leaf.clone(), *inputs[1:])
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    differentiated = [output.double() for output in outputs[: suite.differentiated]]
    weights = [
        torch.linspace(0.5, 1, max(1, o.numel())).double().view_as(o) for o in differentiated
    ]
    (gradient,) = torch.autograd.grad(differentiated, leaf, weights)
    return outputs, gradient


@pytest.mark.parametrize(("suite", "dtype", "variant"), variants("eager", "tokcore"))
def test_variant_against_float64(suite, dtype, variant):
    """What `exact` says is true both ways: no bar counts a result that is rounded to bf16."""
    inputs = suite.inputs(SHAPES["tiny"], dtype, CPU)
    wide = (inputs[0].double(), *inputs[1:])
    expected, expected_gradient = outputs_and_gradient(
        lambda *values: truth(suite.name, values), suite, wide
    )
    actual, gradient = outputs_and_gradient(variant.function, suite, inputs)
    errors = [(a - e).abs().max().item() for a, e in zip(actual, expected, strict=True)]
    if not variant.exact:
        assert max(errors) > 1e-3
        return
    assert max(errors) < 1e-4
    if gradient is None:
        return
    rounding = 1e-5 if dtype == torch.float32 else 2.0**-8
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=rounding, atol=1e-6)


@pytest.mark.parametrize(
    "function",
    [
        logprob_baselines.log_softmax,
        logprob_baselines.logsumexp,
        logprob_baselines.cross_entropy,
        logprob_baselines.trl_selective_log_softmax,
    ],
)
def test_logprob_by_hand(function):
    logits = torch.tensor([[[1.0, 3.0, 4.0]]], dtype=torch.float64).log()
    assert function(logits, torch.tensor([[1]])).item() == pytest.approx(math.log(3 / 8), abs=1e-15)


@pytest.mark.parametrize(
    "function", [logprob_baselines.entropy, logprob_baselines.trl_entropy_from_logits]
)
def test_entropy_by_hand(function):
    logits = torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64).log().expand(2, 150, 3)
    expected = torch.full((2, 150), 1.5 * math.log(2), dtype=torch.float64)
    torch.testing.assert_close(function(logits), expected, rtol=0, atol=1e-15)


def test_kl_by_hand():
    policy = torch.tensor([[1.0, 1.0]], dtype=torch.float64).log()
    reference = torch.tensor([[3.0, 1.0]], dtype=torch.float64).log()
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    for function in (kl_baselines.log_softmax, kl_baselines.logsumexp, kl_baselines.kl_div):
        kl, log_p, log_q = function(policy, reference, torch.tensor([0]))
        assert kl.item() == pytest.approx(expected, abs=1e-15)
        assert (log_p.item(), log_q.item()) == pytest.approx((math.log(0.5), math.log(0.75)))
    assert kl_baselines.kl_alone(policy, reference, None).item() == pytest.approx(expected)


# --- the authors' TDPO ----------------------------------------------------------------------------


def golden(name, *prefix):
    arrays = np.load(GOLDEN / f"{name}.npz")
    read = lambda key: torch.from_numpy(arrays["/".join((*prefix, key))])  # noqa: E731
    return read, (read("policy_logits"), read("reference_logits"), read("labels"))


def test_tdpo_sums_golden():
    read, inputs = golden("tdpo_f64_v37")
    names = ("logps_margin", "position_kl", "policy_logps")
    for name, value in zip(names, tdpo_baseline.sequence_sums(*inputs), strict=True):
        torch.testing.assert_close(value, read(name), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["tdpo1", "tdpo1_b05", "tdpo2_a05", "tdpo2_a07", "tdpo2_b05_a05"])
def test_tdpo_loss_golden(name):
    read, (policy, reference, labels) = golden("tdpo_f64_v37")
    settings = {key: read(f"{name}/{key}").item() for key in ("alpha", "beta")}
    policy.requires_grad_()
    losses = tdpo_baseline.losses(policy, reference, labels, variant=name[:5], **settings)
    torch.testing.assert_close(losses, read(f"{name}/losses"), rtol=1e-12, atol=1e-13)
    losses.mean().backward()
    expected = read(f"{name}/grad_policy_logits")
    torch.testing.assert_close(policy.grad, expected, rtol=1e-12, atol=1e-13)


def test_tdpo_underflow_golden():
    """The formula that is timed is theirs to the fault: NaN in float32 where float64 is finite."""
    read, inputs = golden("tdpo_underflow", "f64")
    losses = tdpo_baseline.losses(*inputs, variant="tdpo2")
    torch.testing.assert_close(losses, read("tdpo2_a05/losses"), rtol=1e-12, atol=1e-13)
    _, inputs = golden("tdpo_underflow", "f32")
    assert tdpo_baseline.losses(*inputs, variant="tdpo2").isnan().any()


# --- the trainers' GRPO ---------------------------------------------------------------------------


def golden_tokens():
    arrays = np.load(GOLDEN / "grpo_trl_losses_f32.npz")
    names = ("logps", "adv", "old_logps", "ref_logps", "mask")
    tokens = [torch.from_numpy(arrays[f"in/{name}"]) for name in names]
    return arrays, tokens[0].requires_grad_(), tokens[1:]


@pytest.mark.parametrize(
    ("case", "settings"),
    [
        ("b0.0", {"high": 0.28, "delta": math.inf, "beta": 0.0}),
        ("b0.04", {"high": 0.28, "delta": math.inf}),
        ("delta1.5", {"high": 0.28, "delta": 1.5}),
        ("delta1.1", {"high": 0.28, "delta": 1.1, "beta": 0.0}),
        ("symclip", {"delta": math.inf, "beta": 0.0}),
    ],
)
def test_trl_policy_loss_golden(case, settings):
    arrays, logprob, tokens = golden_tokens()
    loss = grpo_baselines.trl_policy_loss(logprob, *tokens, **settings)
    (gradient,) = torch.autograd.grad(loss, logprob)
    for value, name in ((loss, "loss"), (gradient, "grad_logps")):
        expected = torch.from_numpy(arrays[f"grpo_token_{case}/{name}"])
        torch.testing.assert_close(value.detach(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shift", [0.0, 2.0, 30.0])
def test_verl_policy_loss(shift):
    """Against the operator, where it is the one that clips, bounds twice, or clamps."""
    _, logprob, (advantages, old, reference, mask) = golden_tokens()
    tokens = (advantages, old - shift, reference + shift / 4, mask)
    losses = [grpo_baselines.verl_policy_loss(logprob, *tokens, high=0.28)]
    rules = PolicyLoss(
        Clip(0.2, 0.28, dual=3.0),
        kl=Kl(0.04, log_limit=20.0, limit=10.0),
        count_empty=False,
        log_ratio_limit=20.0,
    )
    names = ("old_logprob", "reference_logprob", "mask")
    options = dict(zip(names, (*tokens[1:3], mask.bool()), strict=True))
    losses.append(policy_loss(logprob, advantages, rules, **options)[0])
    gradients = [torch.autograd.grad(loss, logprob)[0] for loss in losses]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_advantages_of_size_golden():
    arrays = np.load(GOLDEN / "grpo_trl_advantages.npz")
    for size in (2, 3, 4):
        rewards, expected = (
            torch.from_numpy(arrays[f"grpo_random_group_G{size}/{name}"]).flatten()
            for name in ("rewards_per_func", "advantages")
        )
        actual = advantage_baselines.of_size(rewards, size)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


# --- the harness ----------------------------------------------------------------------------------


class CountingTimer:
    """Stands in for a clock: each call takes one second and leaves its name."""

    def __init__(self):
        self.log = []

    def cool(self):
        self.log.append("cool")

    def time(self, call):
        self.log.append(call())
        return 1.0


def test_interleave_spreads_and_cools():
    timer = CountingTimer()
    runs = {}
    for name in "abc":
        prepare = functools.partial(timer.log.append, f"prepare {name}")
        runs[name] = (prepare, functools.partial(str, name))
    samples = measure.interleave(timer, runs, {"a": 12, "b": 12, "c": 3})
    assert {name: len(values) for name, values in samples.items()} == {"a": 12, "b": 12, "c": 3}
    calls = timer.log[2::3]
    assert timer.log[0::3] == [f"prepare {name}" for name in calls]
    assert set(timer.log[1::3]) == {"cool"}
    assert [calls[start : start + 9].count("c") for start in (0, 9, 18)] == [1, 1, 1]
    assert calls[:9] != calls[9:18]  # a new order each round


def test_summary():
    assert measure.summary([0.004, 0.001, 0.002]) == {
        "ms": 2.0,
        "min_ms": 1.0,
        "q1_ms": 1.0,
        "q3_ms": 4.0,
        "rounds": 3,
    }
    assert measure.summary([0.001])["q3_ms"] == 1.0


@needs_compiler
def test_peak_counts_pages():
    """Of large and small temporaries, also where the heap still holds the small ones' pages."""
    clock = measure.CpuClock()

    def temporaries(size, count):
        return [torch.ones(size // 4) for _ in range(count)] and None

    for size, count in ((64 << 20, 1), (256 << 10, 100)):
        temporaries(size, count)
        peak, seconds = clock.peak(lambda s=size, c=count: temporaries(s, c))
        assert peak == pytest.approx(size * count, rel=0.05)
        assert seconds > 0
    assert clock.peak(lambda: None)[0] < 0.5e6


@needs_compiler
def test_floors_move_the_bytes():
    """Odd line counts, and destinations right to the last line."""
    clock = measure.CpuClock()
    a, b = (torch.randint(1 << 30, (16 * 37,), dtype=torch.int32) for _ in range(2))
    result = torch.empty_like(a)
    clock.floors.read([a, b])
    clock.floors.write([a, b], result)
    assert torch.equal(result, a ^ b)
    clock.floors.write([], result[16:])
    assert not result[16:].any()
    assert torch.equal(result[:16], (a ^ b)[:16])
    assert 1e7 < clock.floors.exponentials_per_second(seconds=0.01) < 1e12


@pytest.mark.parametrize("name", [n for n, s in TOKEN_SUITES.items() if BACKWARD in s.passes])
def test_call_overwrites_and_restores(name):
    """A variant in place gives the gradient of the fresh one, as often as it is asked."""
    suite, dtype = SUITES[name], torch.float32
    inputs = suite.inputs(SHAPES["tiny"], dtype, CPU)
    variants = [v for v in suite.variants(dtype, CPU) if v.kind in ("tokcore", "eager")]
    (expected,) = Call(variants[0], suite, inputs, BACKWARD)()
    overwriting = [variant for variant in variants if variant.overwrites]
    assert bars.IN_PLACE in [variant.name for variant in overwriting]
    for variant in overwriting:
        call = Call(variant, suite, inputs, BACKWARD)
        for _ in range(2):
            call.prepare()
            (gradient,) = call()
            if variant.kind == "tokcore":
                assert torch.equal(gradient, expected)
            torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(inputs[0], suite.inputs(SHAPES["tiny"], dtype, CPU)[0])


def test_traffic():
    logits = torch.empty(4, 8)
    inputs = (logits, logits, torch.empty(4, dtype=torch.int64))
    assert SUITES["token_logprob"].traffic(inputs, FORWARD) == logits.nbytes
    assert SUITES["token_logprob"].traffic(inputs, BACKWARD) == 3 * logits.nbytes
    assert SUITES["sequential_kl"].traffic(inputs, BACKWARD) == 5 * logits.nbytes
    assert SUITES["tdpo"].traffic(inputs, BACKWARD) == 3 * logits.nbytes  # half of the rows skipped
    rewards = torch.empty(8)
    for name, nbytes in (("group_advantage", 4), ("group_advantage_ids", 4 + 8)):
        assert SUITES[name].traffic((rewards, torch.arange(8)), FORWARD) == 8 * nbytes


def test_groups():
    """A suite takes the shapes and dtypes that are its own, of those asked for."""
    assert SUITES["grpo"].groups(["llama3", "1e3", "tiny"], DTYPES) == [
        (shape, dtype, BACKWARD) for shape in ("llama3", "tiny") for dtype in LOGITS
    ]
    found = SUITES["group_advantage"].groups([*MODELS, *BATCHES], DTYPES)
    assert found == [(shape, "float32", FORWARD) for shape in BATCHES]


@needs_compiler
@pytest.mark.parametrize("name", ["group_advantage", "group_advantage_ids"])
def test_floor_reads_every_input(name, monkeypatch):
    clock, lengths = measure.CpuClock(), []
    inputs = SUITES[name].inputs(SHAPES["1e3"], torch.float32, CPU)
    read = lambda tensors, nbytes: lengths.append(nbytes * len(tensors))  # noqa: E731
    monkeypatch.setattr(clock.floors, "read", read)
    ((moved, floor),) = run.floor_runs(clock, SUITES[name], inputs, FORWARD).values()
    floor()
    assert sum(lengths) == moved == sum(value.nbytes for value in inputs)


@needs_compiler
def test_quick_report(tmp_path, capsys):
    """One suite end to end, resumed: JSON, table, bars."""
    arguments = ["--quick", "--only", "tdpo", "--dtypes", "float32", "--out", str(tmp_path)]
    report.main(arguments)
    document = json.loads((tmp_path / "tdpo.json").read_text())
    (group,) = document["runs"]["default"]["groups"].values()
    assert {"floor", "tokcore", "tokcore, in place", "authors' formula"} <= set(group["variants"])
    assert all("error" not in row and row["ms"] > 0 for row in group["variants"].values())
    assert "build_info" in document["runs"]["default"]["environment"]
    assert str(ROOT) not in (tmp_path / "tdpo.json").read_text()
    assert "| tdpo | tiny | float32 | forward + backward, in place |" in capsys.readouterr().out
    assert "authors' formula" in (tmp_path / "README.md").read_text()


def group(pass_name, *, ms, vocabulary=32768, noisy=False):
    gradient = 0.0 if pass_name == FORWARD else 100.0
    kinds = {"floor": "floor", "tokcore": "tokcore", "tokcore, in place": "tokcore"}
    rows = {
        name: {
            "kind": kinds.get(name, name.split()[0]),
            "exact": "inexact" not in name,
            "ms": value,
            "floor_ratio": value / ms["floor"],
            "peak_mb": 0.5 if "place" in name else gradient + 0.5,
        }
        for name, value in ms.items()
    }
    return {
        "vocabulary": vocabulary,
        "gradient_mb": gradient,
        "float32_logits_mb": 200.0,
        "noise": {"noisy": noisy},
        "variants": rows,
    }


def test_bars():
    forward = {"floor": 10.0, "tokcore": 16.0, "eager": 80.0, "eager inexact": 1.0, "compile": 23.0}
    backward = {"floor": 10.0, "tokcore": 19.0, "tokcore, in place": 16.0, "eager": 60.0}
    groups = {"llama2 float32 forward": group(FORWARD, ms=forward)}
    groups["llama2 float32 forward+backward"] = group(BACKWARD, ms=backward, noisy=True)
    groups["tiny float32 forward"] = group(FORWARD, ms=forward)
    found = bars.evaluate([{"suite": "token_logprob", "runs": {"default": {"groups": groups}}}])
    assert {(bar.rule, bar.value, bar.limit, bar.passed, bar.noisy) for bar in found} == {
        ("forward over floor", 1.6, 1.6, True, False),
        ("faster than torch.compile", 1.438, 1.5, False, False),
        ("faster than plain torch", 5.0, 5.0, True, False),
        ("peak above inputs and gradient, MB", 0.5, 1.0, True, False),
        ("in place over floor", 1.6, 1.5, False, True),
        ("faster than plain torch", 3.158, 5.0, False, True),
        ("peak above inputs and gradient, MB", 0.5, 1.0, True, True),
        ("peak in place, MB", 0.5, 1.0, True, True),
    }
    lines = report.bar_lines(found).splitlines()
    assert lines[0].startswith("5 of 8 bars met")
    assert len(lines) == 4


def test_bars_of_grpo():
    ms = {"floor": 10.0, "tokcore": 23.0, "tokcore, in place": 24.0, "eager": 120.0}
    ms |= {"token_logprob": 20.0, "token_logprob, in place": 20.0}
    groups = {"llama2 float32 forward+backward": group(BACKWARD, ms=ms)}
    found = bars.evaluate([{"suite": "grpo", "runs": {"huge pages": {"groups": groups}}}])
    assert {(bar.rule, bar.value, bar.limit, bar.passed) for bar in found} == {
        ("faster than plain torch", 5.217, 2.5, True),
        ("tokcore, over token_logprob", 1.15, 1.15, True),
        ("tokcore, in place, over token_logprob", 1.2, 1.15, False),
    }


def test_bars_of_group_advantage():
    ms = {"floor": 10.0, "tokcore": 31.0, "eager": 30.0}
    small, large = (group(FORWARD, ms=ms) | {"rows": rows} for rows in (1000, 10**7))
    groups = {"1e3 float32 forward": small, "1e7 float32 forward": large}
    found = bars.evaluate([{"suite": "group_advantage", "runs": {"default": {"groups": groups}}}])
    torch_bar = ("faster than vectorised torch", 0.968, 1.0, False)
    assert [(bar.rule, bar.value, bar.limit, bar.passed) for bar in found] == [
        torch_bar,
        ("reads of its inputs", 3.1, 3.0, False),
        torch_bar,
    ]


def test_small_times_keep_their_digits():
    row = {"ms": 0.0123, "gb_s": 0.4, "floor_ratio": 2.0, "kind": "tokcore", "exact": True}
    assert report._speed_cells({"variants": {"tokcore": row}}, "tokcore")[0] == "0.0123"


def test_bars_widen_for_bf16():
    ms = {"floor": 10.0, "tokcore": 20.0}
    for vocabulary, limit in ((32768, 2.6), (151936, 2.99)):
        groups = {"qwen2.5 bfloat16 forward": group(FORWARD, ms=ms, vocabulary=vocabulary)}
        found = bars.evaluate(
            [{"suite": "token_logprob", "runs": {"huge pages": {"groups": groups}}}]
        )
        assert [bar.limit for bar in found] == [limit]


def test_effort():
    assert [run.FULL.rounds(seconds) for seconds in (0.01, 0.1, 2.0)] == [11, 8, 2]


def test_study_table():
    runs = [{"methods": {"dpo": {"step": 6, "accuracy": value}}} for value in (0.5, 0.7)]
    assert study.table(runs).splitlines() == [
        "| | accuracy |",
        "| --- | --- |",
        "| dpo | 0.6 ± 0.14 |",
    ]
