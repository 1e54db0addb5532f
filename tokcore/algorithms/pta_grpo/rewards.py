"""Stage 2 of PTA-GRPO: what a plan and its continuations earn, and their advantages."""

from __future__ import annotations

import math
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from tokcore.ops import group_advantage

LENGTH_REWARD_FOR = ("all", "correct")


class PlanRewards(NamedTuple):
    """Rewards of Q questions with m plans and z continuations of each plan, and their parts."""

    plan_accuracy: Tensor  # (Q, m)
    analytic: Tensor  # (Q, m), without beta
    outcome: Tensor  # (Q, m, z), as the others
    structure: Tensor
    length: Tensor
    total: Tensor


def pta_grpo_rewards(
    correct: Tensor,
    format_ok: Tensor,
    length: Tensor,
    *,
    tau: float = 0.5,
    alpha: float = 0.1,
    beta: float = 0.5,
    structure_reward: float = 0.2,
    max_length: float | None = None,
    length_reward_for: str = "all",
) -> PlanRewards:
    r"""The four rewards of each response, and their sum.

    Equivalent, for one question with a right answer, to::

        accuracy = correct.mean(-1)                                          # (m,)
        analytic = (accuracy / tau).softmax(-1)                              # (m,)
        shortest = length[correct == 1].min()
        reward_length = alpha * (-(length - shortest).abs() / (max_length - shortest)).exp()
        total = correct + beta * analytic[:, None] + structure_reward * format_ok + reward_length

    .. math::
        s_i = \frac1z \sum_k c_{ik}, \quad
        R_{ik} = c_{ik} + \beta\, \mathrm{softmax}(s / \tau)_i + r_{structure} f_{ik}
        + \alpha \exp\Big(-\frac{|l_{ik} - T^*|}{T_{max} - T^*}\Big)

    with :math:`T^*` the length of the question's shortest right response. A question without a
    right response has no :math:`T^*` and gets no length reward; where :math:`T_{max} = T^*` (one
    length for all, say) all its responses get alpha.

    Args:
        correct: (Q, m, z) bool, or a number in [0, 1]: the answer is right. Only 1 is right to
            :math:`T^*`; a part of 1 counts as such in accuracy and outcome.
        format_ok: (Q, m, z) likewise: the response follows the template (``parse_response``).
        length: (Q, m, z) tokens of plan and reasoning, any real dtype.
        tau: temperature of the softmax over plans, > 0. Not in the paper; 0.5 is ours.
        alpha: the largest length reward, >= 0. Not in the paper; 0.1 is ours.
        beta: weight of the analytic reward, >= 0. 0.5 is the paper's.
        structure_reward: for a response of the template, >= 0. 0.2 is the paper's.
        max_length: :math:`T_{max}`, at least the longest response. The paper says only that it is
            not the limit of generation. Default: each question's longest response.
        length_reward_for: "all", as Eq. 8 reads, or "correct", as its prose ("concise yet correct")
            does: 0 where correct is not 1.
    Returns:
        PlanRewards, float32 (float64 where correct is float64), computed in float64.
    Raises:
        TypeError, ValueError: a named error for a wrong setting, shape or value. Values are looked
            at on any device: rewards are few, and NaN would pass for "not scored" later on.

    >>> correct = torch.tensor([[[1, 1], [1, 0]]])
    >>> rewards = pta_grpo_rewards(correct, correct, torch.tensor([[[5, 7], [6, 9]]]), tau=1.0)
    >>> rewards.analytic  # softmax of the accuracies 1 and 1 / 2
    tensor([[0.6225, 0.3775]])
    >>> rewards.length  # 5 tokens are the fewest with a right answer, 9 the most
    tensor([[[0.1000, 0.0607],
             [0.0779, 0.0368]]])

    Source: arXiv 2510.01833, section 3.2, Eqs. 2-4 and 6-8.
    """
    name = "pta_grpo_rewards"
    _check_settings(name, tau, alpha, beta, structure_reward, max_length)
    if length_reward_for not in LENGTH_REWARD_FOR:
        raise ValueError(
            f"{name}: length_reward_for must be 'all' or 'correct', got {length_reward_for!r}"
        )
    _check_shape(name, "correct", correct)
    for key, value in (("format_ok", format_ok), ("length", length)):
        if value.shape != correct.shape or value.device != correct.device:
            raise ValueError(
                f"{name}: {key} must have the shape of correct, {tuple(correct.shape)}, on "
                f"{correct.device}, got {tuple(value.shape)} on {value.device}"
            )
    most = math.inf if max_length is None else max_length
    _check_values(name, "correct", correct, most=1)
    _check_values(name, "format_ok", format_ok, most=1)
    _check_values(name, "length", length, most=most)
    dtype = torch.float64 if correct.dtype == torch.float64 else torch.float32
    outcome, length = correct.double(), length.double()
    accuracy = outcome.mean(-1)
    analytic = (accuracy / tau).softmax(-1)
    structure = structure_reward * format_ok.double()
    length_reward = alpha * _closeness(outcome == 1, length, max_length)
    if length_reward_for == "correct":
        length_reward = torch.where(outcome == 1, length_reward, 0.0)
    total = outcome + beta * analytic.unsqueeze(-1) + (structure + length_reward)
    parts = (accuracy, analytic, outcome, structure, length_reward, total)
    return PlanRewards(*(part.to(dtype) for part in parts))


def pta_grpo_advantages(rewards: Tensor) -> Tensor:
    r"""Advantage of each response within the m z responses of its question.

    Equivalent to ``r = rewards.flatten(1); (r - r.mean(1, True)) / r.std(1, True, correction=0)``
    in the shape of rewards, but exactly 0 where all responses of a question earn the same.

    .. math:: A_{ik} = (R_{ik} - \mu) / \sigma

    :math:`\sigma` is the deviation of the population, without an epsilon, as Eq. 10 prints it. For
    another deviation or an epsilon call tokcore.ops.group_advantage on the rewards.

    Args:
        rewards: (Q, m, z) floating point, PlanRewards.total. NaN is not scored: it gets 0.
    Returns:
        (Q, m, z), float32 (float64 for float64). All tokens of a response, those of the plan
        included, have its advantage; ``.flatten()`` has the order of the rows of ``pack_tree``.
    Raises:
        TypeError, ValueError: a wrong dtype or shape.

    >>> pta_grpo_advantages(torch.tensor([[[3.0, 1.0], [1.0, 3.0]], [[1.2, 1.2], [1.2, 1.2]]]))
    tensor([[[ 1., -1.],
             [-1.,  1.]],
            [[ 0.,  0.],
             [ 0.,  0.]]])

    Source: arXiv 2510.01833, section 3.2, Eq. 10.
    """
    _check_shape("pta_grpo_advantages", "rewards", rewards)
    responses = rewards.shape[1] * rewards.shape[2]
    return group_advantage(rewards.flatten(), responses, ddof=0, eps=0.0).view(rewards.shape)


def _closeness(right: Tensor, length: Tensor, max_length: float | None) -> Tensor:
    """exp(-|length - T*| / (T_max - T*)), (Q, m, z); 0 where a question has no right response."""
    shortest = torch.where(right, length, math.inf).amin((1, 2), keepdim=True)
    longest = length.amax((1, 2), keepdim=True) if max_length is None else max_length
    span, distance = longest - shortest, (length - shortest).abs()
    closeness = (-torch.where(span > 0, distance / span, 0.0)).exp()
    return torch.where(shortest < math.inf, closeness, 0.0)


def _check_settings(name, tau, alpha, beta, structure_reward, max_length) -> None:
    settings = {"tau": tau, "alpha": alpha, "beta": beta, "structure_reward": structure_reward}
    settings |= {} if max_length is None else {"max_length": max_length}
    for key, value in settings.items():
        if not isinstance(value, Real) or isinstance(value, bool):
            raise TypeError(f"{name}: {key} must be a number, got {type(value).__name__}")
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}: {key} must be finite and not negative, got {value}")
    if tau == 0:
        raise ValueError(f"{name}: tau must be positive, got {tau}")


def _check_shape(name: str, key: str, value: Tensor) -> None:
    if value.dim() != 3 or 0 in value.shape[1:]:
        raise ValueError(
            f"{name}: {key} must have shape (Q, m, z) with m >= 1 and z >= 1, got "
            f"{tuple(value.shape)}"
        )


def _check_values(name: str, key: str, value: Tensor, *, most: float) -> None:
    wrong = value[~((value >= 0) & (value <= most) & (value < math.inf))]
    if wrong.numel() > 0:
        rule = "not be negative and finite" if most == math.inf else f"be in [0, {most}]"
        raise ValueError(f"{name}: {key} must {rule}, got {wrong[0].item()}")
