"""Log-probability of the target, and the entropy, from logits (..., V) and target (...)."""

import torch
import torch.nn.functional as F

from benchmarks.baselines import gather, upcast


def log_softmax(logits, target):
    return gather(upcast(logits).log_softmax(-1), target)


def log_softmax_in_dtype(logits, target):
    """Half the memory of the upcast on bf16, and off by 0.07: not the accuracy of the others."""
    return gather(logits.log_softmax(-1), target)


def logsumexp(logits, target):
    logits = upcast(logits)
    return gather(logits, target) - logits.logsumexp(-1)


def cross_entropy(logits, target):
    rows = upcast(logits).flatten(0, -2)
    return -F.cross_entropy(rows, target.flatten(), reduction="none").view(target.shape)


def trl_selective_log_softmax(logits, target):
    """TRL's eager form (up to 1.12): one batch row at a time, the result in the logits' dtype."""
    if logits.dtype in (torch.float32, torch.float64):
        normaliser = torch.stack([row.logsumexp(-1) for row in logits])
        return gather(logits, target) - normaliser
    rows = zip(logits, target, strict=True)
    return torch.stack([gather(row.log_softmax(-1), labels) for row, labels in rows])


def entropy(logits):
    logprobs = upcast(logits).log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def trl_entropy_from_logits(logits, chunk_size=128):
    """TRL's eager form: 128 rows at a time, in the logits' dtype."""
    parts = []
    for chunk in logits.flatten(0, -2).split(chunk_size):
        logprobs = chunk.log_softmax(-1)
        parts.append(-(logprobs.exp() * logprobs).sum(-1))
    return torch.cat(parts).view(logits.shape[:-1])


def logprob_and_entropy(logits, target):
    """Both from one log_softmax, the most that plain torch can share."""
    logprobs = upcast(logits).log_softmax(-1)
    return gather(logprobs, target), -(logprobs.exp() * logprobs).sum(-1)


def trl_logprob_and_entropy(logits, target):
    return trl_selective_log_softmax(logits, target), trl_entropy_from_logits(logits)
