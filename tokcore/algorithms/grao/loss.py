"""Advantages, weights of the rows, loss; the package has the equations and the layout of rows."""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch
from torch import Tensor

from tokcore.masking import may_look, row_sum, shift_labels
from tokcore.ops import PolicyLoss, group_advantage, policy_loss, token_logprob
from tokcore.ops.policy_loss_rules import Reinforce

CONVENTIONS = ("samples_plus_reference", "samples")
_MEANS = {"scale": "none", "contiguous": True, "return_statistics": True}  # of runs of one id


def grao_advantages(
    rewards: Tensor, group: int | Tensor, *, convention: str = "samples_plus_reference"
) -> Tensor:
    """Advantages of samples and references, each against the rewards of its query.

    Equivalent, for a size, to::

        r = rewards.view(-1, group)
        counted = r if convention == "samples_plus_reference" else r[:, :-1]
        (r - counted.mean(1, True)) / counted.std(1, correction=0, keepdim=True)

    but exactly 0 where the counted rewards are equal, where this is 0 / 0.

    Args:
        rewards: (N,) float, of each sample against its reference (see grao_rewards), and of the
            reference itself: 0, as it ties with itself. From (Q, G) rewards of samples:
            ``torch.nn.functional.pad(rewards, (0, 1)).flatten()``. NaN is not scored: it counts in
            no statistic and gets 0.
        group: size or ids, see the package.
        convention: "samples_plus_reference" counts all G + 1 rewards, as the text below Eq. 3 has
            it; "samples" the G samples, as Eq. 4 is printed: no signal where all win or all lose.
    Returns:
        (N,), dtype of rewards, computed in float64. Not differentiable.
    Raises:
        ValueError, TypeError: a named error for a wrong setting, shape or dtype; on the CPU for a
            query without samples.
        RuntimeError: of group_advantage, on the CPU: rewards that are infinite, or all NaN.

    >>> all_lose = torch.tensor([-1.0, -1, -1, -1, 0])
    >>> grao_advantages(all_lose, 5)
    tensor([-0.5000, -0.5000, -0.5000, -0.5000,  2.0000])
    >>> grao_advantages(all_lose, 5, convention="samples")
    tensor([0., 0., 0., 0., 0.])

    Source: arXiv 2508.07750, "Optimization Objective", Eq. 4 and the list below Eq. 3.
    """
    name = "grao_advantages"
    if convention not in CONVENTIONS:
        raise ValueError(f"{name}: convention must be one of {CONVENTIONS}, got {convention!r}")
    query, is_reference = _layout(name, group, rewards=rewards)
    wide, options = rewards.double(), {"ddof": 0, "eps": 0.0, "contiguous": True}
    if convention == "samples_plus_reference":
        return group_advantage(wide, query, **options).to(rewards.dtype)
    counted = torch.where(is_reference, torch.nan, wide)
    advantage, mean, std = group_advantage(counted, query, return_statistics=True, **options)
    of_reference = torch.where((std > 0) & ~wide.isnan(), (wide - mean) / std, 0)
    return torch.where(is_reference, of_reference, advantage).to(rewards.dtype)


def grao_weights(
    advantages: Tensor,
    group: int | Tensor,
    *,
    beta: float = 0.5,
    lambda_: float = 0.6,
    clamp_reference: bool = False,
) -> Tensor:
    """Weights of the rows, to which the objective collapses.

    Equivalent, for a size, to::

        a, y = advantages.view(-1, group).split((group - 1, 1), 1)
        w = (1 + lambda_) * a / (group - 1)
        w_y = beta * y - lambda_ * a.mean(1, True)
        w_y = w_y.clamp(min=0) if clamp_reference else w_y
        torch.cat([w, w_y], 1).flatten()

    Args:
        advantages: (N,) float.
        group: size or ids, see the package.
        beta: weight of the imitation term, >= 0.
        lambda_: weight of the alignment regulariser, >= 0.
        clamp_reference: push no reference down. Where most samples beat it, its weight is negative,
            and without clip and KL nothing bounds how far its probability falls. The whole weight
            is clamped: with A_y alone the regulariser would still push, by lambda A_y / G.
    Returns:
        (N,), dtype of advantages.
    Raises: as grao_advantages.

    >>> grao_weights(torch.tensor([1.0, -0.5, -0.5]), 3)
    tensor([ 0.8000, -0.4000, -0.4000])

    Source: arXiv 2508.07750, Eq. 3, collected by rows.
    """
    name = "grao_weights"
    for key, value in (("beta", beta), ("lambda_", lambda_)):
        if not (_is_number(value, Real) and 0 <= value < math.inf):
            raise ValueError(f"{name}: {key} must be a number, finite and >= 0, got {value!r}")
    query, is_reference = _layout(name, group, advantages=advantages)
    wide = advantages.double()
    samples = torch.where(is_reference, torch.nan, wide)  # NaN: not part of the mean
    mean = group_advantage(samples, query, **_MEANS).mean
    size = torch.searchsorted(query, query, right=True) - torch.searchsorted(query, query) - 1
    of_reference = beta * wide - lambda_ * mean
    if clamp_reference:
        of_reference = of_reference.clamp(min=0)
    weights = torch.where(is_reference, of_reference, (1 + lambda_) * wide / size)
    return weights.to(advantages.dtype)


def grao_loss(
    logits: Tensor,
    labels: Tensor,
    advantages: Tensor,
    group: int | Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    **options,
) -> tuple[Tensor, dict[str, Tensor]]:
    """GRAO loss from the logits of the policy.

    Equivalent to grao_loss_from_tokens of the log-probabilities of the next labels. The vocabulary
    is read once in the forward and once in the backward, not at all at ignored positions, and not
    in the backward of rows of weight 0. With p the policy and n the labels of a row, the gradient
    at a kept position is w (p - 1_y) / (n Q).

    Args:
        logits: (N, T, V), or (total, V) packed. Not shifted and not sliced: position t predicts
            label t + 1.
        labels: (N, T) or (total,) int64 or int32, ignore_index at prompt and padding. The first
            position of a row is never used.
        advantages, group, cu_seqlens, options: as in grao_loss_from_tokens.
        ignore_index, inplace_backward: as in token_logprob.
    Returns:
        loss and metrics as grao_loss_from_tokens.

    >>> logits, labels = torch.zeros(3, 2, 7), torch.tensor([[-100, 1], [-100, 2], [-100, 3]])
    >>> loss, metrics = grao_loss(logits, labels, torch.tensor([1.0, -0.5, -0.5]), 3)
    >>> round(metrics["logps_train/references"].item(), 4)  # -ln 7
    -1.9459

    Source: arXiv 2508.07750, Eqs. 2 and 3.
    """
    if logits.dim() != (3 if cu_seqlens is None else 2) or labels.shape != logits.shape[:-1]:
        raise ValueError(
            "grao_loss: logits and labels must be (N, T, V) and (N, T), not shifted, or (total, V) "
            f"and (total,) with cu_seqlens, got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if cu_seqlens is not None:
        # What stands first in a row must not become the target of the row before.
        starts = cu_seqlens[:-1].long().clamp(0, len(labels))
        extended = torch.cat([labels, labels.new_full((1,), ignore_index)])
        labels = extended.index_fill(0, starts, ignore_index)[:-1]
    target = shift_labels(labels, ignore_index=ignore_index)
    logprob = token_logprob(
        logits, target, ignore_index=ignore_index, inplace_backward=inplace_backward
    )
    mask = target != ignore_index
    return grao_loss_from_tokens(
        logprob, advantages, group, mask=mask, cu_seqlens=cu_seqlens, **options
    )


def grao_loss_from_tokens(
    logprob: Tensor,
    advantages: Tensor,
    group: int | Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    beta: float = 0.5,
    lambda_: float = 0.6,
    clamp_reference: bool = False,
    split: str = "train",
) -> tuple[Tensor, dict[str, Tensor]]:
    """GRAO loss from per-token log-probabilities, padded or packed.

    Equivalent, over all rows, one that keeps no token adding 0, to::

        mean = torch.where(mask, logprob, 0).sum(-1) / mask.sum(-1).clamp(min=1)
        loss = -(grao_weights(advantages, group) * mean).sum() / Q

    Args:
        logprob: (N, T), or (total,) packed, float; of the policy being trained.
        advantages: (N,) float, of grao_advantages.
        group, beta, lambda_, clamp_reference: as in grao_weights.
        mask: bool in the shape of logprob, True = the token counts. Default: all tokens.
        cu_seqlens: (N + 1,) int64 or int32, the row ends of packed rows.
        split: "train" or "eval", the word in the names of the metrics.
    Returns:
        loss: scalar, float32 (float64 for double); mean over the queries, 0 when there are none.
        metrics: detached scalars: logps_train/samples, /references (mean over the rows with tokens
            of a row's mean), advantages_train/samples, /references (means), tied_train (fraction
            of queries without signal, all advantages 0), loss/train.
    Raises: as grao_advantages and policy_loss.

    >>> logprob = torch.tensor([[-1.0, -3.0], [-2.0, float("nan")], [-1.0, -1.0]])
    >>> mask = torch.tensor([[True, True], [True, False], [True, True]])
    >>> advantages = torch.tensor([1.0, -0.5, -0.5])
    >>> grao_loss_from_tokens(logprob, advantages, 3, mask=mask)[0]  # 0.8 * 2 - 0.4 * 2 - 0.4
    tensor(0.4000)

    Source: arXiv 2508.07750, Eqs. 2 and 3.
    """
    name = "grao_loss_from_tokens"
    query, is_reference = _layout(name, group, advantages=advantages)
    rows = logprob.shape[:1] if cu_seqlens is None else (cu_seqlens.numel() - 1,)
    if advantages.shape != rows:
        raise ValueError(
            f"{name}: advantages must be one a row, {tuple(rows)}, got {tuple(advantages.shape)}"
        )
    settings = {"beta": beta, "lambda_": lambda_, "clamp_reference": clamp_reference}
    weights = grao_weights(advantages, group, **settings)
    logprob = logprob.float() if logprob.dtype in (torch.float16, torch.bfloat16) else logprob
    loss, _ = policy_loss(
        logprob,
        weights.to(logprob.dtype),
        PolicyLoss(Reinforce(), aggregation="seq-mean-token-mean"),
        mask=mask,
        cu_seqlens=cu_seqlens,
        normalizer=is_reference.sum(),
    )
    values = logprob.detach()
    kept = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    index = kept if cu_seqlens is None else cu_seqlens
    tokens = row_sum(kept.to(values.dtype), index)
    mean = row_sum(torch.where(kept, values, 0), index) / tokens
    is_tied = group_advantage(advantages.double().abs(), query, **_MEANS).mean == 0
    metrics = {
        f"logps_{split}/samples": _mean(mean, ~is_reference & (tokens > 0)),
        f"logps_{split}/references": _mean(mean, is_reference & (tokens > 0)),
        f"advantages_{split}/samples": _mean(advantages, ~is_reference),
        f"advantages_{split}/references": _mean(advantages, is_reference),
        f"tied_{split}": _mean(is_tied.to(values.dtype), is_reference),
        f"loss/{split}": loss.detach(),
    }
    return loss, metrics


def _layout(name: str, group: int | Tensor, **rows: Tensor) -> tuple[Tensor, Tensor]:
    """The number (N,) of the query of each row, rising, and whether a row is a reference (N,)."""
    ((key, values),) = rows.items()
    if values.dim() != 1 or not values.is_floating_point() or values.requires_grad:
        raise ValueError(
            f"{name}: {key} must be (N,), floating point and without gradient, got "
            f"{tuple(values.shape)} {values.dtype}"
        )
    count, is_last = len(values), torch.ones_like(values, dtype=torch.bool)
    if not isinstance(group, Tensor):
        if not _is_number(group, Integral) or group < 2 or count % group:
            raise ValueError(
                f"{name}: group must be ids, or a size of at least 2, a sample and its reference, "
                f"that divides the {count} rows, got {group!r}"
            )
        is_last.view(-1, group)[:, :-1] = False
    else:
        is_integer = group.dtype in (torch.int32, torch.int64)
        if not is_integer or group.shape != (count,) or group.device != values.device:
            raise ValueError(
                f"{name}: group ids must be int64 or int32, ({count},) on {values.device}, got "
                f"{group.dtype}, {tuple(group.shape)} on {group.device}"
            )
        is_last[:-1] = group[1:] != group[:-1]
        is_alone = is_last & torch.cat([is_last.new_ones(1), is_last])[:-1]
        # Where nobody looks, the row's weight is NaN.
        if may_look(values) and bool(is_alone.any()):
            raise ValueError(
                f"{name}: every query must have at least 1 sample and its reference, got 1 row of "
                f"id {group[is_alone][0].item()}"
            )
    return is_last.cumsum(0) - is_last.long(), is_last


def _is_number(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _mean(values: Tensor, keep: Tensor) -> Tensor:
    return torch.where(keep, values, 0).sum() / keep.sum().clamp(min=1)
