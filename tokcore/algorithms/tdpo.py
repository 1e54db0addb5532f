"""TDPO, token-level direct preference optimisation (arXiv 2404.11999), with DPO beside it.

A preference pair is a chosen and a rejected response to one prompt; pi is the policy, q the frozen
reference. With

    m = sum_t log pi(y_t) - log q(y_t)        margin of a row
    k = sum_t KL(q(.|s_t) || pi(.|s_t))       its sequential KL, exact over the vocabulary

the three losses are -log sigmoid(beta h), averaged over pairs:

    DPO     h = m_c - m_r
    TDPO1   h = m_c - m_r - (k_r - k_c)
    TDPO2   h = m_c - m_r - alpha (k_r - sg(k_c))        sg: no gradient

All functions take chosen rows first, then the rejected rows in the same order.
docs/algorithms/tdpo.md lists where paper, authors' code
(Vance0124/Token-level-Direct-Preference-Optimization at 2a736ec, trainers.py) and these functions
differ.
"""

from __future__ import annotations

import math
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor

from tokcore.masking import row_sum, shift_labels
from tokcore.ops import sequential_kl, token_logprob

VARIANTS = ("tdpo1", "tdpo2")


def tdpo_loss(
    policy_logits: Tensor,
    reference_logits: Tensor,
    labels: Tensor,
    *,
    variant: str,
    alpha: float = 0.5,
    beta: float = 0.1,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    split: str = "train",
) -> tuple[Tensor, dict[str, Tensor]]:
    """TDPO1 or TDPO2 loss of a batch of preference pairs, from the logits of both models.

    Equivalent to (float32, at every position whose next label y is not ignore_index)::

        log_p, log_q = policy_logits.log_softmax(-1), reference_logits.log_softmax(-1)
        k = (log_q.exp() * (log_q - log_p)).sum(-1)          # summed over the row
        m = log_p[y] - log_q[y]                              # summed over the row
        h = (m[:B] - m[B:]) - (k[B:] - k[:B])                                      # tdpo1
        h = (m[:B] - m[B:]) - alpha * (k[B:] - k[:B].detach())                     # tdpo2
        loss = -logsigmoid(beta * h).mean()

    in one pass over both logits, without a (2B, T, V) temporary; ignored positions are not read.
    With g = -beta sigmoid(-beta h) / B the gradient with respect to the policy logits is::

        tdpo1    chosen g (1_y - q)    rejected g (q - 1_y)
        tdpo2    chosen g (1_y - p)    rejected g (-1_y + (1 - alpha) p + alpha q)

    TDPO1's needs no policy softmax: KL and log-probability receive the same upstream number, so the
    coefficient of p is exactly 0.

    Args:
        policy_logits: (2B, T, V) float, chosen rows first. Not shifted and not sliced: position t
            predicts label t + 1.
        reference_logits: (2B, T, V), dtype of policy_logits; compute them under torch.no_grad().
        labels: (2B, T) int64 or int32, ignore_index at prompt and padding. Position 0 is never
            used.
        variant: "tdpo1" or "tdpo2". No default: the authors' code silently trains TDPO1 when its
            flag is left out.
        alpha: weight of the KL difference in TDPO2, >= 0; 0 is DPO. TDPO1 does not use it.
        beta: inverse temperature of the preference model, > 0.
        ignore_index: label of positions to leave out.
        inplace_backward: overwrite policy_logits with their gradient; saves one (2B, T, V) tensor.
        split: "train" or "eval", the word in the names of the metrics.
    Returns:
        loss: scalar, float32 (float64 for double); mean over the B pairs, 0 when there are none.
        metrics: the authors' names, one detached value per pair (B,): rewards_train/chosen,
            /rejected, /accuracies, /margins (a reward is beta (m + k) whatever alpha is),
            kl_train/chosen, /rejected, /margin (signed, chosen - rejected), logps_train/chosen,
            /rejected, loss/train.
    Raises:
        ValueError, TypeError: a named error for a wrong setting, shape or dtype.

    >>> _ = torch.manual_seed(0)
    >>> logits = torch.randn(2, 4, 11)
    >>> labels = torch.tensor([[-100, 3, 1, 4], [-100, 2, 7, -100]])
    >>> loss, metrics = tdpo_loss(logits, logits, labels, variant="tdpo2")  # policy = reference
    >>> round(loss.item(), 4), metrics["kl_train/rejected"].tolist()  # ln 2, no divergence
    (0.6931, [0.0])

    Source: arXiv 2404.11999; the authors' trainers.py, _tdpo_get_batch_logps and tdpo_loss.
    """
    _check_settings("tdpo_loss", beta, alpha, variant)
    _check_logits("tdpo_loss", policy_logits, reference_logits, labels)
    target = shift_labels(labels, ignore_index=ignore_index)
    tokens = sequential_kl(
        policy_logits,
        reference_logits,
        target,
        ignore_index=ignore_index,
        inplace_backward=inplace_backward,
    )
    return tdpo_loss_from_tokens(
        tokens.kl,
        tokens.policy_logprob,
        tokens.reference_logprob,
        target != ignore_index,
        variant=variant,
        alpha=alpha,
        beta=beta,
        split=split,
    )


def tdpo_loss_from_tokens(
    kl: Tensor,
    policy_logprob: Tensor,
    reference_logprob: Tensor,
    mask_or_cu_seqlens: Tensor,
    *,
    variant: str,
    alpha: float = 0.5,
    beta: float = 0.1,
    split: str = "train",
) -> tuple[Tensor, dict[str, Tensor]]:
    """TDPO1 or TDPO2 loss from per-token numbers, padded or packed.

    Equivalent to tdpo_loss after tokcore.ops.sequential_kl; the equations are there. For trainers
    that hold such numbers already, or pack their sequences.

    Args:
        kl: (2B, T) padded or (total,) packed float, KL(reference || policy) per position.
        policy_logprob, reference_logprob: same shape, log-probability of the label.
        mask_or_cu_seqlens: (2B, T) bool, True = keep, for padded tokens; (2B + 1,) int32 or int64
            row ends for packed ones, where positions to leave out hold 0, as the operators return
            at ignored labels.
        variant, alpha, beta, split: as in tdpo_loss.
    Returns:
        loss and metrics as tdpo_loss.

    >>> kl, logprob = torch.tensor([[0.5, 0.5], [2.0, 9.0]]), -torch.ones(2, 2)
    >>> mask = torch.tensor([[True, True], [True, False]])
    >>> loss, metrics = tdpo_loss_from_tokens(kl, logprob, logprob, mask, variant="tdpo1", beta=1)
    >>> round(loss.item(), 4), metrics["kl_train/margin"].tolist()  # softplus(2 - 1)
    (1.3133, [-1.0])

    Source: arXiv 2404.11999; the authors' trainers.py, tdpo_loss.
    """
    name = "tdpo_loss_from_tokens"
    _check_settings(name, beta, alpha, variant)
    _check_tokens(
        name,
        mask_or_cu_seqlens,
        kl=kl,
        policy_logprob=policy_logprob,
        reference_logprob=reference_logprob,
    )
    kl, policy_logprob = _full(kl), _full(policy_logprob)
    margin_c, margin_r = _rows(policy_logprob - _full(reference_logprob), mask_or_cu_seqlens)
    kl_c, kl_r = _rows(kl, mask_or_cu_seqlens)
    if variant == "tdpo1":
        # Only additions between here and the tokens: kl and policy_logprob get one and the same
        # upstream number.
        logit = (margin_c - margin_r) - (kl_r - kl_c)
    elif alpha == 0:
        logit = margin_c - margin_r  # 0 * inf would be NaN where a KL is infinite
    else:
        logit = (margin_c - margin_r) - alpha * (kl_r - kl_c.detach())
    return _loss_and_metrics(
        beta * logit,
        (beta * (margin_c + kl_c), beta * (margin_r + kl_r)),
        _rows(policy_logprob.detach(), mask_or_cu_seqlens),
        (kl_c, kl_r),
        split,
    )


def dpo_loss(
    policy_logits: Tensor,
    reference_logits: Tensor,
    labels: Tensor,
    *,
    beta: float = 0.1,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    split: str = "train",
) -> tuple[Tensor, dict[str, Tensor]]:
    """DPO loss (arXiv 2305.18290) of a batch of preference pairs, from the logits of both models.

    Equivalent to tdpo_loss(..., variant="tdpo2", alpha=0) without the KL: two gathers of
    log-probabilities, h = (m_c - m_r), loss = -logsigmoid(beta h).mean().

    Args: as tdpo_loss. With reference log-probabilities computed beforehand, use
        dpo_loss_from_tokens.
    Returns:
        loss and metrics as tdpo_loss, without the kl_ metrics; a reward is beta m.

    >>> logits, labels = torch.zeros(2, 3, 5), torch.tensor([[-100, 1, 2], [-100, 3, -100]])
    >>> loss, metrics = dpo_loss(logits, logits, labels)
    >>> round(loss.item(), 4), round(metrics["logps_train/rejected"].item(), 4)  # ln 2, -ln 5
    (0.6931, -1.6094)

    Source: arXiv 2305.18290; the TDPO authors' trainers.py, preference_loss.
    """
    _check_settings("dpo_loss", beta)
    _check_logits("dpo_loss", policy_logits, reference_logits, labels)
    target = shift_labels(labels, ignore_index=ignore_index)
    policy_logprob = token_logprob(
        policy_logits, target, ignore_index=ignore_index, inplace_backward=inplace_backward
    )
    reference_logprob = token_logprob(reference_logits, target, ignore_index=ignore_index)
    return dpo_loss_from_tokens(
        policy_logprob, reference_logprob, target != ignore_index, beta=beta, split=split
    )


def dpo_loss_from_tokens(
    policy_logprob: Tensor,
    reference_logprob: Tensor,
    mask_or_cu_seqlens: Tensor,
    *,
    beta: float = 0.1,
    split: str = "train",
) -> tuple[Tensor, dict[str, Tensor]]:
    """DPO loss (arXiv 2305.18290) from per-token log-probabilities, padded or packed.

    Args: as tdpo_loss_from_tokens.
    Returns:
        loss and metrics as dpo_loss.

    >>> policy, reference = torch.tensor([-1.0, -2.0, -3.0]), torch.full((3,), -2.0)
    >>> loss, metrics = dpo_loss_from_tokens(policy, reference, torch.tensor([0, 1, 3]))
    >>> metrics["rewards_train/margins"]  # 0.1 ((-1 + 2) - (-5 + 4))
    tensor([0.2000])

    Source: arXiv 2305.18290; the TDPO authors' trainers.py, preference_loss.
    """
    _check_settings("dpo_loss_from_tokens", beta)
    _check_tokens(
        "dpo_loss_from_tokens",
        mask_or_cu_seqlens,
        policy_logprob=policy_logprob,
        reference_logprob=reference_logprob,
    )
    policy_logprob = _full(policy_logprob)
    margin_c, margin_r = _rows(policy_logprob - _full(reference_logprob), mask_or_cu_seqlens)
    return _loss_and_metrics(
        beta * (margin_c - margin_r),
        (beta * margin_c, beta * margin_r),
        _rows(policy_logprob.detach(), mask_or_cu_seqlens),
        None,
        split,
    )


def _full(values: Tensor) -> Tensor:
    """Sums run in float32 at least, also where a trainer kept its tokens in half precision."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _rows(values: Tensor, mask_or_cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    chosen, rejected = row_sum(values, mask_or_cu_seqlens).tensor_split(2)
    return chosen, rejected


def _loss_and_metrics(logit, rewards, logps, kls, split) -> tuple[Tensor, dict[str, Tensor]]:
    losses = -F.logsigmoid(logit)
    # A rank without pairs contributes 0 and not the NaN of an empty mean.
    loss = losses.sum() / max(losses.numel(), 1)
    chosen, rejected = rewards
    metrics = {
        f"rewards_{split}/chosen": chosen,
        f"rewards_{split}/rejected": rejected,
        f"rewards_{split}/accuracies": (chosen > rejected).to(chosen.dtype),
        f"rewards_{split}/margins": chosen - rejected,
    }
    if kls is not None:
        metrics[f"kl_{split}/chosen"], metrics[f"kl_{split}/rejected"] = kls
        metrics[f"kl_{split}/margin"] = kls[0] - kls[1]
    metrics[f"logps_{split}/chosen"], metrics[f"logps_{split}/rejected"] = logps
    metrics[f"loss/{split}"] = losses
    return loss, {name: value.detach() for name, value in metrics.items()}


def _check_settings(name: str, beta: float, alpha: float = 0.0, variant: str = "tdpo2") -> None:
    if variant not in VARIANTS:
        raise ValueError(f"{name}: variant must be 'tdpo1' or 'tdpo2', got {variant!r}")
    for key, value in (("beta", beta), ("alpha", alpha)):
        if not isinstance(value, Real) or isinstance(value, bool):
            raise TypeError(f"{name}: {key} must be a number, got {type(value).__name__}")
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"{name}: beta must be finite and positive, got {beta}")
    if not (math.isfinite(alpha) and alpha >= 0):
        raise ValueError(f"{name}: alpha must be finite and not negative, got {alpha}")


def _check_logits(name: str, policy: Tensor, reference: Tensor, labels: Tensor) -> None:
    if policy.dim() != 3:
        raise ValueError(f"{name}: policy_logits must be (2B, T, V), got {tuple(policy.shape)}")
    if policy.shape != reference.shape:
        message = (
            f"{name}: reference_logits must have the shape of policy_logits "
            f"{tuple(policy.shape)}, got {tuple(reference.shape)}"
        )
        if policy.shape[:-1] == reference.shape[:-1]:
            message += "; is one vocabulary padded? Cut both to the tokenizer's size"
        raise ValueError(message)
    if labels.shape != policy.shape[:-1]:
        raise ValueError(
            f"{name}: labels must have shape {tuple(policy.shape[:-1])}, not shifted, "
            f"got {tuple(labels.shape)}"
        )
    _check_even(name, policy.shape[0])


def _check_tokens(name: str, mask_or_cu_seqlens: Tensor, **tokens: Tensor) -> None:
    shapes = {key: tuple(value.shape) for key, value in tokens.items()}
    shape = next(iter(shapes.values()))
    if len(set(shapes.values())) > 1 or len(shape) not in (1, 2):
        raise ValueError(f"{name}: all tokens must be (2B, T) or packed (total,), got {shapes}")
    for key, value in tokens.items():
        if not value.is_floating_point():
            raise TypeError(f"{name}: {key} must be floating point, got {value.dtype}")
    index = mask_or_cu_seqlens
    if len(shape) == 2 and index.dtype != torch.bool:
        raise TypeError(f"{name}: padded tokens need a bool mask, True = keep, got {index.dtype}")
    if len(shape) == 1 and index.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"{name}: packed tokens need cu_seqlens in int32 or int64, got {index.dtype}"
        )
    if len(shape) == 2 and tuple(index.shape) != shape:
        raise ValueError(f"{name}: the mask must have shape {shape}, got {tuple(index.shape)}")
    if len(shape) == 1 and (index.dim() != 1 or index.numel() == 0):
        raise ValueError(f"{name}: cu_seqlens must have shape (2B + 1,), got {tuple(index.shape)}")
    _check_even(name, shape[0] if len(shape) == 2 else index.shape[0] - 1)


def _check_even(name: str, rows: int) -> None:
    if rows % 2:
        raise ValueError(
            f"{name}: rows must be chosen and rejected in equal number, got {rows} in all"
        )
