"""TDPO as its authors compute it, written from the equations: all positions, masked afterwards."""

import torch.nn.functional as F

from benchmarks.baselines.sequential_kl import authors


def sequence_sums(policy_logits, reference_logits, labels):
    """Sums of log p - log q, KL(q || p) and log p over the scored positions of each row.

    The shift slices the logits; masked positions are computed, then multiplied by zero.
    """
    labels = labels[:, 1:].clone()
    mask = labels != -100
    labels[~mask] = 0
    kl, logprob, reference_logprob = authors(
        policy_logits[:, :-1], reference_logits[:, :-1], labels
    )
    margin = logprob - reference_logprob
    return (margin * mask).sum(-1), (kl * mask).sum(-1), (logprob * mask).sum(-1)


def losses(policy_logits, reference_logits, labels, *, variant, alpha=0.5, beta=0.1):
    """Loss of each pair: chosen rows first, rejected second."""
    margin, kl, _ = sequence_sums(policy_logits, reference_logits, labels)
    chosen_margin, rejected_margin = margin.chunk(2)
    chosen_kl, rejected_kl = kl.chunk(2)
    if variant == "tdpo1":
        correction = rejected_kl - chosen_kl
    else:
        correction = alpha * (rejected_kl - chosen_kl.detach())
    return -F.logsigmoid(beta * (chosen_margin - rejected_margin - correction))


def tdpo2_loss(policy_logits, reference_logits, labels):
    return losses(policy_logits, reference_logits, labels, variant="tdpo2").mean()
