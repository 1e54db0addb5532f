"""The TDPO2 loss, forward and backward, beside its authors' formula.

Half of the positions are prompt: masked, which tokcore skips and the formula computes.
"""

from functools import partial

from benchmarks.baselines import tdpo as baseline
from benchmarks.suite import BACKWARD, Suite, Variant, compiled, draw_logits, draw_target
from tokcore.algorithms.tdpo import tdpo_loss

PROMPT = 0.5


def _inputs(shape, dtype, device):
    labels = draw_target(shape, device)
    labels[:, : int(PROMPT * labels.shape[1])] = -100
    return *draw_logits(shape, dtype, device, count=2), labels


def _tokcore(policy_logits, reference_logits, labels, **options):
    loss, _ = tdpo_loss(policy_logits, reference_logits, labels, variant="tdpo2", **options)
    return loss


def _variants(dtype, device):
    return [
        Variant("tokcore", "tokcore", _tokcore),
        Variant(
            "tokcore, in place",
            "tokcore",
            partial(_tokcore, inplace_backward=True),
            overwrites=True,
        ),
        Variant("authors' formula", "eager", baseline.tdpo2_loss),
        Variant("compiled authors' formula", "compile", compiled(baseline.tdpo2_loss)),
    ]


SUITES = (Suite("tdpo", _inputs, _variants, streams=2, kept=1 - PROMPT, passes=(BACKWARD,)),)


def test_tdpo(benchmark, case):
    case.run(benchmark)
