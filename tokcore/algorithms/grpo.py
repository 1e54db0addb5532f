r"""GRPO and its relatives: one loss function for each method, all over tokcore.ops.policy_loss.

The first argument of each is the policy: log-probabilities of the sampled tokens, (B, T) or packed
(total,), or ``Logits``, from which they are taken in one read of the vocabulary (the backward is
one more). The second are the advantages, (B,) or one a token: tokcore.ops.group_advantage.

Every function also takes, by keyword, the tensors of ``policy_loss`` (old_logprob, mask,
reference_logprob, sampler_logprob, importance_ratio, cu_seqlens, normalizer, ...) and the fields of
``PolicyLoss`` (entropy_coefficient, sampler, top_entropy, off_policy_threshold, ...), which
override the method's. Each returns (loss, metrics).

In the equations c is the ratio of a token (or, where it says so, a sequence) to the policy that
sampled it, A its advantage, l its log-probability, n the number of a row's tokens, B the rows, sg
no gradient. docs/algorithms/grpo.md has the table of defaults and what trainers do differently.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from tokcore.ops import PolicyLoss, policy_loss, token_logprob
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
)

__all__ = [
    "Kl",
    "Logits",
    "Sampler",
    "bnpo_loss",
    "cispo_band_loss",
    "cispo_loss",
    "dapo_loss",
    "dppo_loss",
    "dr_grpo_loss",
    "gmpo_loss",
    "grpo_loss",
    "gspo_loss",
    "gspo_token_loss",
    "luspo_loss",
    "reinforce_loss",
    "reinforce_plus_plus_advantages",
    "rloo_loss",
    "sapo_loss",
    "vespo_loss",
]

Result = tuple[Tensor, dict[str, Tensor]]
_VESPO = Vespo()


@dataclass(frozen=True)
class Logits:
    """A policy as its logits: what the losses take in place of log-probabilities.

    Args:
        logits: (B, T, V), or (total, V) packed; position t predicts ids[t].
        ids: (B, T) or (total,), the sampled tokens. Masked positions are not read.
        temperature, softcap, inplace_backward: as in tokcore.ops.token_logprob; the temperature is
            the sampling temperature.
        with_entropy: take the entropy along for the metrics even where no rule needs it.
    """

    logits: Tensor
    ids: Tensor
    temperature: float | Tensor = 1.0
    softcap: float | None = None
    inplace_backward: bool = False
    with_entropy: bool = False

    def tokens(self, mask: Tensor | None, entropy: bool) -> tuple[Tensor, Tensor | None]:
        ignored = -100
        target = self.ids if mask is None else torch.where(mask, self.ids, ignored)
        options = {
            "temperature": self.temperature,
            "softcap": self.softcap,
            "ignore_index": ignored,
            "inplace_backward": self.inplace_backward,
        }
        if not (entropy or self.with_entropy):
            return token_logprob(self.logits, target, **options), None
        return token_logprob(self.logits, target, return_entropy=True, **options)


def grpo_loss(
    policy: Tensor | Logits,
    advantages: Tensor,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float = math.inf,
    beta: float = 0.0,
    **options,
) -> Result:
    r"""GRPO (arXiv 2402.03300): PPO's clip, averaged over each sequence, then over sequences.

    .. math:: L = \frac1B \sum_i \frac1{n_i} \sum_t -\min(c A, \mathrm{clip}(c, 1 - \epsilon,
        1 + \epsilon_{high}) A) + \beta\, k_3

    Args:
        epsilon, epsilon_high: clip range; epsilon_high defaults to epsilon.
        delta: upper bound of the ratio on both signs (TRL's two-sided clip).
        beta: weight of the KL to reference_logprob.

    >>> logprob = torch.log(torch.tensor([[0.5, 0.25]])).requires_grad_()
    >>> loss, metrics = grpo_loss(logprob, torch.tensor([1.0]), old_logprob=logprob.detach())
    >>> loss.backward()
    >>> loss.item(), logprob.grad.tolist()
    (-1.0, [[-0.5, -0.5]])
    """
    rules = PolicyLoss(_clip(epsilon, epsilon_high, delta), kl=_kl(beta))
    return _loss(policy, advantages, rules, options)


def bnpo_loss(policy, advantages, *, epsilon=0.2, epsilon_high=None, beta=0.0, **options) -> Result:
    r"""BNPO as TRL names it: GRPO's clip, averaged over the tokens of the local batch."""
    rules = PolicyLoss(_clip(epsilon, epsilon_high), kl=_kl(beta), aggregation="token-mean")
    return _loss(policy, advantages, rules, options)


def dr_grpo_loss(
    policy,
    advantages,
    *,
    max_completion_length,
    epsilon=0.2,
    epsilon_high=None,
    beta=0.0,
    **options,
) -> Result:
    r"""Dr. GRPO (arXiv 2503.20783): the clip summed over tokens, over a constant length.

    .. math:: L = \frac1{B\, L_{max}} \sum_{it} -\min(c A, \mathrm{clip}(c) A)

    Advantages go with ``scale="none"``.
    """
    rules = PolicyLoss(
        _clip(epsilon, epsilon_high),
        kl=_kl(beta),
        aggregation="seq-mean-token-sum-norm",
        length=max_completion_length,
    )
    return _loss(policy, advantages, rules, options)


def dapo_loss(policy, advantages, *, epsilon=0.2, epsilon_high=0.28, beta=0.0, **options) -> Result:
    r"""DAPO (arXiv 2503.14476): asymmetric clip, averaged over all tokens.

    .. math::
        L = \frac1N \sum_{it} -\min(c A, \mathrm{clip}(c, 1 - \epsilon, 1 + \epsilon_{high}) A)

    N is ``normalizer``: the tokens of the whole generation batch over the number of ranks; without
    it, the tokens at hand.
    """
    rules = PolicyLoss(_clip(epsilon, epsilon_high), kl=_kl(beta), aggregation="token-mean")
    return _loss(policy, advantages, rules, options)


def gspo_loss(
    policy, advantages, *, epsilon=3e-4, epsilon_high=4e-4, beta=0.0, **options
) -> Result:
    r"""GSPO (arXiv 2507.18071): the ratio of a sequence, the geometric mean of its tokens'.

    .. math:: c_i = \exp\Big(\frac1{n_i} \sum_t \log \frac{\pi}{\pi_{old}}\Big)
    """
    rules = PolicyLoss(_clip(epsilon, epsilon_high), level="sequence", kl=_kl(beta))
    return _loss(policy, advantages, rules, options)


def gspo_token_loss(
    policy, advantages, *, epsilon=3e-4, epsilon_high=4e-4, beta=0.0, **options
) -> Result:
    r"""GSPO-token (arXiv 2507.18071): GSPO's ratio in value, each token's own gradient.

    .. math:: c_{it} = \mathrm{sg}(c_i)\, \pi_t / \mathrm{sg}(\pi_t)
    """
    rules = PolicyLoss(_clip(epsilon, epsilon_high), level="sequence_token", kl=_kl(beta))
    return _loss(policy, advantages, rules, options)


def luspo_loss(
    policy, advantages, *, epsilon=0.2, epsilon_high=None, beta=0.0, **options
) -> Result:
    r"""LUSPO: GSPO's sequence loss, each sequence weighted by its length.

    .. math:: L = \frac1B \sum_i n_i\, \ell_i

    TRL averages over padding where the loss is one of tokens (beta > 0): ``compat="trl"``.
    """
    rules = PolicyLoss(
        _clip(epsilon, epsilon_high),
        level="sequence",
        kl=_kl(beta),
        aggregation="seq-mean-token-sum",
    )
    return _loss(policy, advantages, rules, options)


def cispo_loss(policy, advantages, *, cap=5.0, beta=0.0, **options) -> Result:
    r"""CISPO (arXiv 2506.13585) as TRL and Liger have it: ``cap`` bounds the ratio itself.

    .. math:: L = \frac1N \sum -\mathrm{sg}(\min(c, cap)) A\, l

    TRL's epsilon_high is this cap; left at its default of 0.2 it scales every gradient by 0.2.
    """
    rules = PolicyLoss(CispoCap(cap), kl=_kl(beta), aggregation="token-mean")
    return _loss(policy, advantages, rules, options)


def cispo_band_loss(
    policy, advantages, *, epsilon=0.2, epsilon_high=0.2, beta=0.0, **options
) -> Result:
    r"""CISPO (arXiv 2506.13585) as verl and slime have it: the ratio within 1 - e and 1 + e'.

    .. math::
        L = \frac1N \sum -\mathrm{sg}(\mathrm{clip}(c, 1 - \epsilon, 1 + \epsilon_{high})) A\, l
    """
    rules = PolicyLoss(CispoBand(epsilon, epsilon_high), kl=_kl(beta), aggregation="token-mean")
    return _loss(policy, advantages, rules, options)


def sapo_loss(policy, advantages, *, positive=1.0, negative=1.05, beta=0.0, **options) -> Result:
    r"""SAPO: a sigmoid gate of the ratio in place of the clip.

    .. math:: L = \frac1B \sum_i \frac1{n_i} \sum_t -\frac4\tau \sigma(\tau (c - 1)) A

    with the temperature :math:`\tau` = ``positive`` where A > 0, ``negative`` elsewhere.
    """
    return _loss(policy, advantages, PolicyLoss(Sapo(positive, negative), kl=_kl(beta)), options)


def vespo_loss(policy, advantages, *, weights=_VESPO, beta=0.0, **options) -> Result:
    r"""VESPO: tokens weighted by a bump of the sequence's ratio, which has no gradient.

    .. math:: L = \frac1N \sum -\mathrm{sg}(\varphi_i) A\, l, \quad
        \varphi = e^{\lambda + k \ln w - \lambda w}

    w is the product of the sequence's ratios, and of its ratios to the sampler, in [1e-8, e^20].
    """
    rules = PolicyLoss(weights, kl=_kl(beta), aggregation="token-mean")
    return _loss(policy, advantages, rules, options)


def gmpo_loss(policy, advantages, *, epsilon=0.4, epsilon_high=0.4, beta=0.0, **options) -> Result:
    r"""GMPO (arXiv 2507.20673): the geometric mean of ratios clipped in log space.

    .. math:: L = \frac1B \sum_i -A_i \exp\Big(\frac1{n_i} \sum_t \mathrm{clip}^A(\log c_t)\Big)
    """
    rules = PolicyLoss(Gmpo(epsilon, epsilon_high), level="sequence", kl=_kl(beta))
    return _loss(policy, advantages, rules, options)


def rloo_loss(policy, advantages, *, epsilon=0.2, epsilon_high=None, **options) -> Result:
    r"""RLOO (arXiv 2402.14740) as TRL has it: the clip on the ratio of whole sequences.

    .. math:: L = \frac1B \sum_i -\min(c_i A_i, \mathrm{clip}(c_i) A_i), \quad
        c_i = \exp \sum_t \log \frac{\pi}{\pi_{old}}

    Advantages go with ``center="leave_one_out", scale="none"``; TRL puts the KL into the reward.
    """
    rules = PolicyLoss(_clip(epsilon, epsilon_high), level="sequence_sum")
    return _loss(policy, advantages, rules, options)


def reinforce_loss(policy, advantages, *, beta=0.0, **options) -> Result:
    r"""REINFORCE (GPG, REINFORCE++ and others without a ratio), averaged over tokens.

    .. math:: L = \frac1N \sum -A\, l
    """
    rules = PolicyLoss(Reinforce(), kl=_kl(beta), aggregation="token-mean")
    return _loss(policy, advantages, rules, options)


def dppo_loss(policy, advantages, *, low=0.2, high=0.2, penalty=1e-3, **options) -> Result:
    r"""DPPO as prime-rl has it: tokens leave when their probability moved, not their ratio.

    .. math:: L = \frac1N \sum -[\text{kept}]\, A c + \kappa (\log c)^2

    kept: p - p_old <= high where A > 0, >= -low elsewhere.
    """
    rules = PolicyLoss(Dppo(low, high, penalty), aggregation="token-mean")
    return _loss(policy, advantages, rules, options)


def reinforce_plus_plus_advantages(
    token_rewards: Tensor, mask: Tensor, *, gamma: float = 1.0, eps: float = 1e-8
) -> Tensor:
    r"""REINFORCE++ (arXiv 2501.03262): discounted returns, whitened over all tokens of the batch.

    Equivalent to ``R[t] = r[t] + gamma * R[t + 1]`` from the last token back, then
    ``(R - mean) * rsqrt(var + eps)`` with the moments (var over N - 1) of the kept tokens.

    Args:
        token_rewards: (B, T) floating point; what is masked does not count, NaN included.
        mask: (B, T) bool, True = keep.
        gamma: discount, in [0, 1].
        eps: added to the variance.
    Returns:
        (B, T), 0 at masked positions; exactly 0 where all returns are equal. Computed in float64.

    >>> rewards, mask = torch.tensor([[0.0, 1.0], [0.0, -1.0]]), torch.ones(2, 2, dtype=torch.bool)
    >>> reinforce_plus_plus_advantages(rewards, mask)
    tensor([[ 0.8660,  0.8660],
            [-0.8660, -0.8660]])

    Source: volcengine/verl:verl/trainer/ppo/core_algos.py.
    """
    name = "reinforce_plus_plus_advantages"
    if mask.dtype != torch.bool or mask.shape != token_rewards.shape or mask.dim() != 2:
        raise ValueError(
            f"{name}: token_rewards and a bool mask must be (B, T), got "
            f"{tuple(token_rewards.shape)} and {mask.dtype} {tuple(mask.shape)}"
        )
    if not 0 <= gamma <= 1:
        raise ValueError(f"{name}: gamma must be in [0, 1], got {gamma}")
    rewards = torch.where(mask, token_rewards.double(), 0)
    returns, running = torch.zeros_like(rewards), rewards.new_zeros(len(rewards))
    for t in range(rewards.shape[1] - 1, -1, -1):
        # A masked position neither adds nor discounts.
        running = torch.where(mask[:, t], rewards[:, t] + gamma * running, running)
        returns[:, t] = running
    count = mask.sum()
    anchor = torch.where(mask, returns, -torch.inf).amax() if mask.numel() else 0
    offset = torch.where(mask, returns - anchor, 0)
    offset = torch.where(mask, offset - offset.sum() / count, 0)
    variance = offset.square().sum() / (count - 1).clamp(min=1)
    return (offset * (variance + eps).rsqrt()).to(token_rewards.dtype)


def _loss(policy: Tensor | Logits, advantages: Tensor, rules: PolicyLoss, options: dict) -> Result:
    names = {field.name for field in fields(PolicyLoss)}
    changed = {name: value for name, value in options.items() if name in names}
    tensors = {name: value for name, value in options.items() if name not in names}
    rules = replace(rules, **changed) if changed else rules
    if isinstance(policy, Logits):
        mask = tensors.get("mask")
        policy, tensors["entropy"] = policy.tokens(mask, rules.needs_entropy)
    return policy_loss(policy, advantages, rules, **tensors)


def _clip(epsilon: float, epsilon_high: float | None, delta: float = math.inf) -> Clip:
    return Clip(epsilon, epsilon if epsilon_high is None else epsilon_high, delta)


def _kl(beta: float) -> Kl | None:
    return Kl(beta) if beta else None
