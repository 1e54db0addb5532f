"""GRPO's loss from logits as TRL and verl compute it, written from the equations.

Both divide the logits by the sampling temperature in place, take log-probabilities of the sampled
tokens (and the entropy for the metrics, without gradient), then a dozen small tensors of tokens.
Clipped at 1 - EPSILON and 1 + EPSILON; BOUND is TRL's delta, and verl's dual clip: up to its clamps
of extreme ratios the same loss. Left out, to their advantage: the slice that shifts the logits,
whose backward copies them.
"""

import torch

from benchmarks.baselines import gather
from benchmarks.baselines.token_logprob import trl_entropy_from_logits, trl_selective_log_softmax

TEMPERATURE, EPSILON, BOUND, BETA = 0.7, 0.2, 3.0, 0.04


def divide_(logits):
    """As the trainers do, in the logits' dtype. Dividing by 1 costs them the same."""
    return logits.div_(TEMPERATURE)


def divided(logits):
    """For half precision into float32, in one sweep: the divisor's dtype wins."""
    return logits / torch.full((1,), TEMPERATURE, device=logits.device)


# --- TRL ---------------------------------------------------------------------------------------


def trl_policy_loss(
    logprob, advantages, old, reference, mask, *, high=EPSILON, delta=BOUND, beta=BETA
):
    """loss_type "grpo" with ratios of tokens: masks multiply, empty rows count."""
    advantages = advantages.unsqueeze(1)
    log_ratio = logprob - old
    ratio = torch.exp(log_ratio)
    clipped = torch.clamp(ratio, 1 - EPSILON, 1 + high)
    ratio = torch.clamp(ratio, max=delta)
    loss = -torch.min(ratio * advantages, clipped * advantages)
    kl = torch.exp(reference - logprob) - (reference - logprob) - 1
    loss = loss + beta * kl
    return ((loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()


def trl(logits, ids, *tokens):
    return trl_policy_loss(trl_selective_log_softmax(logits, ids), *tokens)


def trl_with_entropy(logits, ids, advantages, old, reference, mask):
    logprob = trl_selective_log_softmax(logits, ids)
    with torch.no_grad():
        entropy = trl_entropy_from_logits(logits)
    loss = trl_policy_loss(logprob, advantages, old, reference, mask)
    return loss, (entropy * mask).sum() / mask.sum().clamp(min=1.0)


# --- verl --------------------------------------------------------------------------------------


def verl_policy_loss(
    logprob, advantages, old, reference, mask, *, high=EPSILON, dual=BOUND, beta=BETA
):
    """ "vanilla" with dual clip, plus the "low_var_kl" loss, both "seq-mean-token-mean"."""
    advantages = advantages.unsqueeze(1)
    ratio = torch.exp(torch.clamp(logprob - old, min=-20.0, max=20.0))
    unclipped = -advantages * ratio
    clipped = -advantages * torch.clamp(ratio, 1 - EPSILON, 1 + high)
    loss = torch.maximum(unclipped, clipped)
    dual_clipped = torch.min(-advantages * dual, loss)
    loss = torch.where(advantages < 0, dual_clipped, loss)
    difference = torch.clamp(reference - logprob, min=-20.0, max=20.0)
    kl = torch.clamp(torch.exp(difference) - difference - 1, min=-10.0, max=10.0)
    return _mean_of_means(loss, mask) + beta * _mean_of_means(kl, mask)


def _mean_of_means(values, mask):
    """Rows without tokens do not count."""
    tokens = mask.sum(-1)
    rows = (tokens > 0).float()
    means = (values * mask).sum(-1) / (tokens + 1e-8)
    return (means * rows).sum() / rows.sum()


def verl(logits, ids, *tokens):
    return verl_policy_loss(gather(logits.log_softmax(-1), ids), *tokens)


def verl_with_entropy(logits, ids, advantages, old, reference, mask):
    """The entropy is logsumexp(x) - sum(p x)."""
    logprob = gather(logits.log_softmax(-1), ids)
    with torch.no_grad():
        entropy = logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)
    loss = verl_policy_loss(logprob, advantages, old, reference, mask)
    return loss, (entropy * mask).sum() / mask.sum()
