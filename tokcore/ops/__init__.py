"""The fused operators, one file each."""

from tokcore.ops.group_advantage import GroupAdvantage, group_advantage
from tokcore.ops.policy_loss import policy_loss
from tokcore.ops.policy_loss_rules import PolicyLoss
from tokcore.ops.sequential_kl import SequentialKL, sequential_kl
from tokcore.ops.token_logprob import token_logprob

__all__ = [
    "GroupAdvantage",
    "PolicyLoss",
    "SequentialKL",
    "group_advantage",
    "policy_loss",
    "sequential_kl",
    "token_logprob",
]
