"""GRPO's loss from logits, forward and backward, beside TRL's and verl's own path.

Every token is scored: padding, which tokcore skips and the formulas compute, would only widen the
gap. token_logprob's own forward and backward is the yardstick: what the loss takes beyond it is the
policy arithmetic.
"""

from functools import partial

import torch

from benchmarks.baselines import grpo as baseline
from benchmarks.suite import BACKWARD, Suite, Variant, compiled, draw_logits, draw_target
from tokcore.algorithms.grpo import Logits, grpo_loss
from tokcore.ops import token_logprob

TEMPERATURE = baseline.TEMPERATURE
SPREAD = 0.5  # of log-ratios: on both sides of the clip range, a few beyond the bound


def _inputs(shape, dtype, device):
    (logits,) = draw_logits(shape, dtype, device)
    ids = draw_target(shape, device)
    generator = torch.Generator().manual_seed(3)
    draw = lambda *size: torch.randn(size, generator=generator).to(device)  # noqa: E731
    logprob = token_logprob(logits, ids, temperature=TEMPERATURE)
    old, reference = (logprob + SPREAD * draw(*ids.shape) for _ in range(2))
    return logits, ids, draw(shape.sequences), old, reference, torch.ones_like(ids).bool()


def _tokcore(logits, ids, advantages, old, reference, mask, *, entropy, **options):
    loss, metrics = grpo_loss(
        Logits(logits, ids, temperature=TEMPERATURE, with_entropy=entropy, **options),
        advantages,
        epsilon=baseline.EPSILON,
        delta=baseline.BOUND,
        beta=baseline.BETA,
        old_logprob=old,
        reference_logprob=reference,
        mask=mask,
    )
    return (loss, metrics["entropy"]) if entropy else loss


def _yardstick(logits, ids, *tokens, entropy, **options):
    return token_logprob(logits, ids, temperature=TEMPERATURE, return_entropy=entropy, **options)


def _ours(name, kind, function):
    in_place = partial(function, inplace_backward=True)
    return [
        Variant(name, kind, function),
        Variant(f"{name}, in place", kind, in_place, overwrites=True),
    ]


def _after(divide, loss):
    return lambda logits, *rest: loss(divide(logits), *rest)


def _variants(dtype, device, *, entropy):
    full = dtype == torch.float32  # the trainers compute in the logits' dtype
    trl = baseline.trl_with_entropy if entropy else baseline.trl
    verl = baseline.verl_with_entropy if entropy else baseline.verl
    variants = [
        *_ours("tokcore", "tokcore", partial(_tokcore, entropy=entropy)),
        *_ours("token_logprob", "yardstick", partial(_yardstick, entropy=entropy)),
    ]
    for name, loss in (("TRL formula", trl), ("verl formula", verl)):
        in_place, upcast = (_after(d, loss) for d in (baseline.divide_, baseline.divided))
        variants.append(Variant(name, "eager", in_place, exact=full, overwrites=True))
        if not full:
            variants.append(Variant(f"{name} in float32", "eager", upcast))
        variants.append(Variant(f"compiled {name}", "compile", compiled(upcast)))
    return variants


SUITES = tuple(
    Suite(name, _inputs, partial(_variants, entropy=entropy), streams=1, passes=(BACKWARD,))
    for name, entropy in (("grpo", False), ("grpo_entropy", True))
)


def test_grpo(benchmark, case):
    case.run(benchmark)
