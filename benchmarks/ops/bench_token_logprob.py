"""token_logprob, with and without the entropy, beside torch, torch.compile, TRL, Liger-Kernel."""

from functools import partial

import torch

from benchmarks.baselines import peers
from benchmarks.baselines import token_logprob as baseline
from benchmarks.suite import Suite, Variant, compiled, draw_logits, draw_target
from tokcore.ops import token_logprob


def _inputs(shape, dtype, device):
    return *draw_logits(shape, dtype, device), draw_target(shape, device)


def _tokcore(**options):
    return [
        Variant("tokcore", "tokcore", partial(token_logprob, **options)),
        Variant(
            "tokcore, in place",
            "tokcore",
            partial(token_logprob, inplace_backward=True, **options),
            overwrites=True,
        ),
    ]


def _logprob(dtype, device):
    full = dtype == torch.float32  # what computes in the logits' dtype is exact only there
    variants = [
        *_tokcore(),
        Variant("torch log_softmax + gather", "eager", baseline.log_softmax),
        Variant("torch gather - logsumexp", "eager", baseline.logsumexp),
        Variant("torch cross_entropy", "eager", baseline.cross_entropy),
        Variant("TRL formula", "eager", baseline.trl_selective_log_softmax, exact=full),
        Variant("compiled log_softmax + gather", "compile", compiled(baseline.log_softmax)),
        Variant("compiled gather - logsumexp", "compile", compiled(baseline.logsumexp)),
    ]
    if not full:
        in_dtype = baseline.log_softmax_in_dtype
        name = "torch log_softmax + gather in bf16"
        variants.append(Variant(name, "eager", in_dtype, exact=False))
    if device.type == "cuda" and peers.installed("liger_kernel"):
        function = peers.liger_cross_entropy
        name = "Liger cross_entropy"
        variants.append(Variant(name, "fused", function, exact=full, overwrites=True))
    if device.type == "cuda" and peers.installed("trl"):
        function = peers.trl_selective_log_softmax
        variants.append(Variant("TRL selective_log_softmax", "fused", function, exact=full))
    return variants


def _logprob_and_entropy(dtype, device):
    full = dtype == torch.float32
    function = baseline.logprob_and_entropy
    variants = [
        *_tokcore(return_entropy=True),
        Variant("torch log_softmax", "eager", function),
        Variant("TRL formulas", "eager", baseline.trl_logprob_and_entropy, exact=full),
        Variant("compiled log_softmax", "compile", compiled(function)),
    ]
    if device.type == "cuda" and peers.installed("trl"):
        function = peers.trl_selective_log_softmax_and_entropy
        name = "TRL selective_log_softmax_and_entropy"
        variants.append(Variant(name, "fused", function, exact=full))
    return variants


SUITES = (
    Suite("token_logprob", _inputs, _logprob, streams=1),
    Suite("token_logprob_entropy", _inputs, _logprob_and_entropy, streams=1, differentiated=2),
)


def test_token_logprob(benchmark, case):
    case.run(benchmark)
