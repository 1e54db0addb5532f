"""The objective of PTA-GRPO, over the responses one by one or over their trees."""

from __future__ import annotations

import math
from numbers import Real

from torch import Tensor

from tokcore.masking import shift_labels
from tokcore.ops import PolicyLoss, policy_loss, token_logprob
from tokcore.ops.policy_loss_rules import Clip, Kl

AGGREGATIONS = ("seq-mean-token-sum", "token-mean")


def pta_grpo_loss(
    policy_logits: Tensor,
    labels: Tensor,
    advantages: Tensor,
    *,
    old_logprob: Tensor | None = None,
    reference_logprob: Tensor | None = None,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    kl_coefficient: float = 0.0,
    aggregation: str = "seq-mean-token-sum",
    temperature: float = 1.0,
    normalizer: float | Tensor | None = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PTA-GRPO loss of responses in rows of their own, from the policy's logits.

    Equivalent to ``pta_grpo_loss_from_tokens(logprob, target != ignore_index, advantages)`` after
    ``target = shift_labels(labels)`` and ``logprob = token_logprob(policy_logits, target)``; the
    equation is there. Rows that share a plan are cheaper as a tree: ``pack_tree``.

    Args:
        policy_logits: (N, T, V) float. Not shifted and not sliced: position t predicts label t + 1.
        labels: (N, T) int64 or int32, ignore_index at prompt and padding. Position 0 is never used.
        advantages: (N,), of pta_grpo_advantages.
        old_logprob, reference_logprob: (N, T), where position t holds the log-probability of label
            t + 1, as token_logprob gives them.
        temperature: that of the sampling. Default 1, the paper's.
        epsilon, epsilon_high, kl_coefficient, aggregation, normalizer: as in
            pta_grpo_loss_from_tokens.
        ignore_index: label of positions to leave out.
        inplace_backward: overwrite policy_logits with their gradient; saves one (N, T, V) tensor.
    Returns:
        loss and metrics as pta_grpo_loss_from_tokens.
    Raises:
        TypeError, ValueError: a named error for a wrong setting, shape or dtype.

    >>> import torch
    >>> logits, labels = torch.zeros(2, 3, 5), torch.tensor([[-100, 1, 2], [-100, 3, -100]])
    >>> loss, metrics = pta_grpo_loss(logits, labels, torch.tensor([1.0, -1.0]))
    >>> loss, metrics["tokens"]  # -(2 - 1) / 2 over three tokens
    (tensor(-0.5000), tensor(3.))

    Source: arXiv 2510.01833, section 3.2, Eq. 9.
    """
    if policy_logits.dim() != 3 or labels.shape != policy_logits.shape[:-1]:
        raise ValueError(
            "pta_grpo_loss: policy_logits must be (N, T, V) and labels (N, T), not shifted, got "
            f"{tuple(policy_logits.shape)} and {tuple(labels.shape)}"
        )
    target = shift_labels(labels, ignore_index=ignore_index)
    logprob = token_logprob(
        policy_logits,
        target,
        temperature=temperature,
        ignore_index=ignore_index,
        inplace_backward=inplace_backward,
    )
    return pta_grpo_loss_from_tokens(
        logprob,
        target != ignore_index,
        advantages,
        old_logprob=old_logprob,
        reference_logprob=reference_logprob,
        epsilon=epsilon,
        epsilon_high=epsilon_high,
        kl_coefficient=kl_coefficient,
        aggregation=aggregation,
        normalizer=normalizer,
    )


def pta_grpo_loss_from_tokens(
    logprob: Tensor,
    mask_or_cu_seqlens: Tensor,
    advantages: Tensor,
    *,
    old_logprob: Tensor | None = None,
    reference_logprob: Tensor | None = None,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    kl_coefficient: float = 0.0,
    aggregation: str = "seq-mean-token-sum",
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""PTA-GRPO loss from the log-probabilities of the responses' tokens, padded or packed.

    Equivalent, for the loss as printed and one advantage A a row, to::

        ratio = (logprob - old_logprob).exp()
        token = -torch.min(ratio * A, ratio.clamp(1 - epsilon, 1 + epsilon_high) * A)
        d = reference_logprob - logprob
        token = token + kl_coefficient * (d.exp() - d - 1)
        loss = torch.where(mask, token, 0).sum(-1).mean()

    .. math::
        L = -\frac1N \sum_i \sum_t \min\big(\rho_{it} A_i,
        \mathrm{clip}(\rho_{it}, 1 - \epsilon, 1 + \epsilon_{high}) A_i\big)
        + \beta_{KL}\, D_{KL}(\pi \| \pi_{ref})

    Args:
        logprob: (N, T) padded or (total,) packed, float: of ``tree_logprob``, or of any rows.
            Differentiable.
        mask_or_cu_seqlens: (N, T) bool, True = a token of the response, for padded rows; (N + 1,)
            int32 or int64 row ends for packed ones. What is masked has no effect, NaN included.
        advantages: (N,), of pta_grpo_advantages.
        old_logprob: shape of logprob, when the tokens were sampled. Default: logprob itself,
            without gradient, so that every ratio is 1.
        reference_logprob: shape of logprob, of the reference model; for the KL term.
        epsilon, epsilon_high: clip range, >= 0. Not in the paper; 0.2 is ours, and epsilon_high
            defaults to epsilon.
        kl_coefficient: :math:`\beta_{KL}`, >= 0. Not in the paper; 0 is ours. The estimator, k3 of
            each token, is ours too.
        aggregation: "seq-mean-token-sum", Eq. 9 as printed: without the length of the response; or
            "token-mean", the mean over all tokens.
        normalizer: the denominator, in place of the rows (tokens) at hand: those of the whole
            batch, where it comes in parts.
    Returns:
        loss: scalar, float32 (float64 for double).
        metrics: of tokcore.ops.policy_loss, detached.
    Raises:
        TypeError, ValueError: a named error for a wrong setting, shape or dtype, or for a KL term
            without reference_logprob.

    >>> import torch
    >>> logprob = torch.log(torch.tensor([[0.5, 0.5], [0.2, 0.9]]))
    >>> old, mask = torch.log(torch.full((2, 2), 0.4)), torch.tensor([[True, True], [True, False]])
    >>> loss, metrics = pta_grpo_loss_from_tokens(
    ...     logprob, mask, torch.tensor([1.0, -1.0]), old_logprob=old)
    >>> loss  # ratios 1.25, clipped to 1.2, twice; and 0.5, clipped to 0.8
    tensor(-0.8000)

    Source: arXiv 2510.01833, section 3.2, Eq. 9.
    """
    name = "pta_grpo_loss_from_tokens"
    epsilon_high = epsilon if epsilon_high is None else epsilon_high
    _check_settings(name, aggregation, epsilon, epsilon_high, kl_coefficient)
    is_packed = logprob.dim() == 1
    rules = PolicyLoss(
        Clip(epsilon, epsilon_high),
        kl=Kl(kl_coefficient) if kl_coefficient else None,
        aggregation=aggregation,
    )
    return policy_loss(
        logprob,
        advantages,
        rules,
        old_logprob=old_logprob,
        reference_logprob=reference_logprob,
        mask=None if is_packed else mask_or_cu_seqlens,
        cu_seqlens=mask_or_cu_seqlens if is_packed else None,
        normalizer=normalizer,
    )


def _check_settings(name, aggregation, epsilon, epsilon_high, kl_coefficient) -> None:
    if aggregation not in AGGREGATIONS:
        raise ValueError(
            f"{name}: aggregation must be 'seq-mean-token-sum' or 'token-mean', got {aggregation!r}"
        )
    settings = {"epsilon": epsilon, "epsilon_high": epsilon_high, "kl_coefficient": kl_coefficient}
    for key, value in settings.items():
        if not isinstance(value, Real) or isinstance(value, bool):
            raise TypeError(f"{name}: {key} must be a number, got {type(value).__name__}")
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}: {key} must be finite and not negative, got {value}")
