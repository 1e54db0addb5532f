"""Each metric against a value worked out by hand."""

import math

import pytest
import torch
from test_policy_loss import to

from tokcore.ops import PolicyLoss, policy_loss
from tokcore.ops.policy_loss import METRICS
from tokcore.ops.policy_loss_rules import (
    CispoBand,
    CispoCap,
    Dppo,
    Gmpo,
    Kl,
    Sampler,
    Sapo,
    Vespo,
)

INF, NAN = math.inf, math.nan
# Three tokens: ratios 2 and 1/2 of A = 1, and 1/2 of A = -1; what is masked has no say.
LN2 = math.log(2)
TOKENS = {
    "logprob": torch.tensor([[-1.0, -1.0], [-1.0, NAN]], dtype=torch.float64),
    "advantages": torch.tensor([1.0, -1.0], dtype=torch.float64),
    "old_logprob": torch.tensor([[-1 - LN2, -1 + LN2], [-1 + LN2, NAN]], dtype=torch.float64),
    "reference_logprob": torch.tensor([[-2.0, -4.0], [-5.0, NAN]], dtype=torch.float64),
    "entropy": torch.tensor([[1.0, 2.0], [6.0, NAN]], dtype=torch.float64),
    "mask": torch.tensor([[True, True], [True, False]]),
}
NONE = {
    "tokens": 3,
    "kl": 0,
    "entropy": 3,
    "clip_low": 0,
    "clip_high": 0,
    "ratio": 1,
    "importance_ratio": 1,
    "focused": 1,
    "off_policy": 0,
    "phi": 0,
}
OF_RULES = {
    "clip": (PolicyLoss(), {"clip_low": 1 / 3, "clip_high": 1 / 3}),
    "cispo": (PolicyLoss(CispoBand()), {"clip_low": 1 / 3, "clip_high": 1 / 3}),
    "cispo cap": (PolicyLoss(CispoCap(1.5)), {"clip_high": 1 / 3}),
    "sapo": (PolicyLoss(Sapo()), {}),
    # e^-1 - e^-1 / 2 = 0.18, e^-1 - 2 e^-1 = -0.37
    "dppo": (PolicyLoss(Dppo(0.3, 0.1)), {"clip_low": 1 / 3, "clip_high": 1 / 3}),
    # the ratio of the first row is 1, of the second 1/2: means over rows
    "sequence": (PolicyLoss(level="sequence"), {"ratio": 0.75, "clip_low": 0.5}),
    # the tokens are what is clipped: 2 to e^0.5, and 1/2 to e^-0.5
    "gmpo": (
        PolicyLoss(Gmpo(0.5, 0.5), "sequence"),
        {
            "ratio": (math.exp(0.25 - LN2 / 2) + math.exp(-0.5)) / 2,
            "clip_low": 1 / 3,
            "clip_high": 1 / 3,
        },
    ),
    "k1": (PolicyLoss(Sapo(), kl=Kl(0.5, "k1")), {"kl": 8 / 3}),
    "k2": (PolicyLoss(Sapo(), kl=Kl(0.5, "k2")), {"kl": (0.5 + 4.5 + 8) / 3}),
    "corrected": (PolicyLoss(Sapo(), kl=Kl(0.5, "k1", corrected=True)), {"kl": 5.5 / 3}),
    "limited": (PolicyLoss(Sapo(), kl=Kl(0.5, "k1", limit=2.0)), {"kl": 5 / 3}),
    "focus": (PolicyLoss(Sapo(), top_entropy=0.5), {"focused": 2 / 3}),
    # drift: 0 of the first row, ln 2 of the second, whose advantage is negative
    "off policy": (PolicyLoss(Sapo(), off_policy_threshold=0.5), {"off_policy": 1 / 3}),
    "nearly": (PolicyLoss(Sapo(), off_policy_threshold=0.7), {"off_policy": 0.0}),
    # w = 1 and 1/2: exp(3 - 3) = 1, exp(2 - 3 ln 2 - 1) = e / 8
    "vespo": (PolicyLoss(Vespo()), {"phi": (1 + math.e / 8) / 2}),
}


@pytest.mark.parametrize(("rules", "changed"), OF_RULES.values(), ids=OF_RULES)
def test_metrics_by_hand(backend, rules, changed):
    arguments = to(TOKENS, backend.device)
    logprob, advantages = arguments.pop("logprob"), arguments.pop("advantages")
    _, metrics = policy_loss(logprob, advantages, rules, **arguments)
    assert tuple(metrics) == METRICS
    assert not any(value.requires_grad for value in metrics.values())
    got = {name: value.item() for name, value in metrics.items()}
    assert got == pytest.approx(NONE | changed, rel=1e-14, abs=1e-15)


@pytest.mark.parametrize(
    ("sampler", "want"),
    [
        (Sampler(most=INF), (2 + 0.25 + 4) / 3),
        (Sampler(most=3.0), (2 + 0.25 + 3) / 3),
        (Sampler(bound="mask", most=3.0, least=0.5), 2 / 3),
        (Sampler("sequence", most=INF), (0.5 + 0.5 + 4) / 3),
        (Sampler("sequence", "mask"), (0.5 + 0.5) / 3),
    ],
    ids=str,
)
def test_mean_of_the_ratio_to_the_sampler(backend, sampler, want):
    """Ratios 2, 1/4 and 4."""
    ratio = torch.tensor([[2.0, 0.25], [4.0, NAN]], dtype=torch.float64)
    sampler_logprob = TOKENS["old_logprob"] - ratio.log()
    arguments = to(TOKENS | {"sampler_logprob": sampler_logprob}, backend.device)
    logprob, advantages = arguments.pop("logprob"), arguments.pop("advantages")
    _, metrics = policy_loss(logprob, advantages, PolicyLoss(sampler=sampler), **arguments)
    assert metrics["importance_ratio"].item() == pytest.approx(want, rel=1e-14)
