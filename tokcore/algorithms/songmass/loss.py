"""The loss of SongMASS: label-smoothed likelihood, and the constraint on the attention."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from tokcore.algorithms.songmass.batches import Example
from tokcore.algorithms.songmass.model import SongMass, SongMassOutput
from tokcore.algorithms.songmass.tokens import PAD
from tokcore.ops import token_logprob

OBJECTIVES = {
    "lyric": ("lyric", "lyric"),
    "melody": ("melody", "melody"),
    "lyric_to_melody": ("lyric", "melody"),
    "melody_to_lyric": ("melody", "lyric"),
}


def songmass_loss(
    output: SongMassOutput,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    attention_weight: float = 1.0,
    padding: int = PAD,
    reduction: str = "mean",
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Loss of one batch of one objective.

    Equivalent, with ``c = output.constraint`` and ``keep = target != padding``, to::

        logp = output.logits.log_softmax(-1)[keep]
        nll = -logp.gather(-1, target[keep].unsqueeze(-1)).sum()
        smooth = -logp.mean(-1).sum()
        total = (1 - label_smoothing) * nll + label_smoothing * smooth
        loss = (total + attention_weight * c[keep].sum()) / keep.sum()

    in one read of the logits, two with smoothing:

    .. math::
        L = \frac{1}{N} \sum_t \Big[ -(1 - \epsilon) \log p(y_t)
            - \frac{\epsilon}{V} \sum\nolimits_v \log p(v) + \alpha\, c_t \Big]

    over the N tokens that are not padding. Without a constraint (MASS has none) its term is 0.

    Args:
        output: of SongMass, or SongMassOutput(logits (B, T, V), constraint (B, T) or None).
        target: (B, T) int64. Aligned with the logits: position t is predicted by logits t.
        label_smoothing: epsilon in [0, 1). Default 0, the authors'.
        attention_weight: alpha >= 0. Default 1, the authors'.
        padding: the id to leave out. Default 1.
        reduction: "mean" over tokens, or "sum".
    Returns:
        loss: scalar, float32 (float64 for double); 0 where nothing is kept.
        metrics: the authors' names, detached scalars: loss, nll_loss, attn_loss (not weighted),
            reduced as the loss is, in nats (the authors log base 2); ntokens.
    Raises:
        ValueError, TypeError: a named error for a wrong setting, shape or dtype.

    >>> logits, target = torch.zeros(1, 3, 4), torch.tensor([[0, 3, 1]])
    >>> loss, metrics = songmass_loss(SongMassOutput(logits, torch.full((1, 3), 0.5)), target)
    >>> round(metrics["nll_loss"].item(), 4), round(loss.item(), 4)  # ln 4, ln 4 + 0.5
    (1.3863, 1.8863)

    Source: arXiv 2012.05168;
    microsoft/muzic:songmass/mass/label_smoothed_cross_entropy_with_align.py.
    """
    name = "songmass_loss"
    _check(name, label_smoothing, attention_weight, reduction)
    logits, constraint = output.logits, output.constraint
    if logits.dim() != 3 or target.shape != logits.shape[:2]:
        raise ValueError(
            f"{name}: logits and target must be (B, T, V) and (B, T), got {tuple(logits.shape)} "
            f"and {tuple(target.shape)}"
        )
    if constraint is not None and constraint.shape != target.shape:
        raise ValueError(
            f"{name}: the constraint must have shape {tuple(target.shape)}, got "
            f"{tuple(constraint.shape)}"
        )
    keep = target != padding
    tokens = keep.sum()
    logprob = token_logprob(logits, target, ignore_index=padding)
    nll = -logprob.sum()
    total = nll
    if label_smoothing > 0:
        # log p(v) = z_v - z_y + log p(y), so their mean needs no log_softmax.
        score = logits.gather(-1, torch.where(keep, target, 0).unsqueeze(-1)).squeeze(-1)
        score = score.to(logprob.dtype)
        mean = logits.mean(-1, dtype=logprob.dtype) - score + logprob
        smooth = -torch.where(keep, mean, 0).sum()
        total = (1 - label_smoothing) * nll + label_smoothing * smooth
    attention = torch.zeros_like(nll)
    if constraint is not None:
        attention = torch.where(keep, constraint, 0).sum().to(nll.dtype)
    total = total + attention_weight * attention
    count = tokens.clamp(min=1) if reduction == "mean" else 1
    loss = total / count
    metrics = {"loss": loss, "nll_loss": nll / count, "attn_loss": attention / count}
    metrics["ntokens"] = tokens
    return loss, {key: value.detach() for key, value in metrics.items()}


def songmass_joint_loss(
    model: SongMass,
    batches: Mapping[str, Example],
    *,
    label_smoothing: float = 0.0,
    attention_weight: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of one joint update: the objectives summed, over the tokens of all of them.

    Equivalent, for the outputs of the model, to::

        sums = [songmass_loss(output, target, reduction="sum") for output, target in ...]
        loss = sum(loss for loss, _ in sums) / sum(metrics["ntokens"] for _, metrics in sums)

    which is what one update of the authors minimises: every token of the four batches weighs the
    same, not every objective.

    Args:
        model: a SongMass.
        batches: under "lyric" and "melody" what mass_example made of unpaired data, under
            "lyric_to_melody" and "melody_to_lyric" the supervised batches, collated; any of them
            may be absent.
        label_smoothing, attention_weight: as in songmass_loss.
    Returns:
        loss: scalar; backward() once.
        metrics: detached scalars: loss, ntokens, and those of each objective, means over its own
            tokens, as lyric/nll_loss.
    Raises:
        ValueError: an objective of another name, or none; and as songmass_loss.
    """
    name = "songmass_joint_loss"
    _check(name, label_smoothing, attention_weight, "sum")
    unknown = sorted(set(batches) - set(OBJECTIVES))
    if unknown or not batches:
        raise ValueError(f"{name}: batches must be of {tuple(OBJECTIVES)}, got {unknown or 'none'}")
    losses, counts, metrics = [], [], {}
    for objective, batch in batches.items():
        source_kind, target_kind = OBJECTIVES[objective]
        inputs = batch._asdict()
        target = inputs.pop("target")
        output = model(**inputs, source_kind=source_kind, target_kind=target_kind)
        loss, own = songmass_loss(
            output,
            target,
            label_smoothing=label_smoothing,
            attention_weight=attention_weight,
            reduction="sum",
        )
        losses.append(loss)
        counts.append(own["ntokens"])
        for key, value in own.items():
            mean = value if key == "ntokens" else value / own["ntokens"].clamp(min=1)
            metrics[f"{objective}/{key}"] = mean
    tokens = torch.stack(counts).sum()
    loss = torch.stack(losses).sum() / tokens.clamp(min=1)
    return loss, metrics | {"loss": loss.detach(), "ntokens": tokens}


def _check(name: str, label_smoothing: float, attention_weight: float, reduction: str) -> None:
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"{name}: label_smoothing must be in [0, 1), got {label_smoothing}")
    if not 0 <= attention_weight < math.inf:
        raise ValueError(
            f"{name}: attention_weight must be finite and not negative, got {attention_weight}"
        )
    if reduction not in ("mean", "sum"):
        raise ValueError(f"{name}: reduction must be 'mean' or 'sum', got {reduction!r}")
