"""PTA-GRPO, plan-then-action reasoning with GRPO (arXiv 2510.01833, ICML 2026).

A response is a high-level plan, then reasoning, then an answer. Stage 1 (template) builds such
responses from existing reasoning, for supervised training. Stage 2 samples m plans for a question
and z continuations of each plan; the same m * z responses score the plans (rewards) and train the
policy (loss). The prompt and the plan that z responses share go through the model once (tree).

No code of the authors is public, and the paper leaves several constants open:
docs/algorithms/pta_grpo.md lists which defaults are the paper's and which are ours.
"""

from tokcore.algorithms.pta_grpo.loss import pta_grpo_loss, pta_grpo_loss_from_tokens
from tokcore.algorithms.pta_grpo.rewards import PlanRewards, pta_grpo_advantages, pta_grpo_rewards
from tokcore.algorithms.pta_grpo.template import (
    Response,
    Template,
    build_response,
    cold_start_response,
    parse_response,
)
from tokcore.algorithms.pta_grpo.tree import PlanTree, pack_tree, tree_logprob

__all__ = [
    "PlanRewards",
    "PlanTree",
    "Response",
    "Template",
    "build_response",
    "cold_start_response",
    "pack_tree",
    "parse_response",
    "pta_grpo_advantages",
    "pta_grpo_loss",
    "pta_grpo_loss_from_tokens",
    "pta_grpo_rewards",
    "tree_logprob",
]
