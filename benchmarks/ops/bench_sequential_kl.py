"""sequential_kl with both log-probabilities, beside torch, torch.compile, TDPO's authors, Liger."""

from functools import partial

import torch

from benchmarks.baselines import peers
from benchmarks.baselines import sequential_kl as baseline
from benchmarks.suite import Suite, Variant, compiled, draw_logits, draw_target
from tokcore.ops import sequential_kl


def _inputs(shape, dtype, device):
    return *draw_logits(shape, dtype, device, count=2), draw_target(shape, device)


def _tokcore(policy_logits, reference_logits, target, **options):
    return sequential_kl(policy_logits, reference_logits, target, **options)[:3]


def _variants(dtype, device):
    variants = [
        Variant("tokcore", "tokcore", _tokcore),
        Variant(
            "tokcore, in place",
            "tokcore",
            partial(_tokcore, inplace_backward=True),
            overwrites=True,
        ),
        Variant("torch log_softmax", "eager", baseline.log_softmax),
        Variant("torch F.kl_div", "eager", baseline.kl_div),
        Variant("TDPO authors' formula", "eager", baseline.authors),
        Variant("compiled log_softmax", "compile", compiled(baseline.log_softmax)),
        Variant("compiled logsumexp", "compile", compiled(baseline.logsumexp)),
        Variant("compiled, KL alone", "compile", compiled(baseline.kl_alone)),
    ]
    if dtype != torch.float32:
        in_dtype = baseline.log_softmax_in_dtype
        variants.append(Variant("torch log_softmax in bf16", "eager", in_dtype, exact=False))
    if device.type == "cuda" and peers.installed("liger_kernel"):
        variants += [
            Variant("Liger kl_div, KL alone", "fused", peers.liger_kl_div),
            Variant("Liger kl_div, one sum", "fused", peers.liger_kl_div_scalar),
        ]
    return variants


SUITES = (Suite("sequential_kl", _inputs, _variants, streams=2, differentiated=2),)


def test_sequential_kl(benchmark, case):
    case.run(benchmark)
