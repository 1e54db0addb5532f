"""KL(reference || policy) a position, and both log-probabilities of the target, from two logits."""

import torch.nn.functional as F

from benchmarks.baselines import gather, upcast


def log_softmax(policy_logits, reference_logits, target):
    policy = upcast(policy_logits).log_softmax(-1)
    reference = upcast(reference_logits).log_softmax(-1)
    kl = (reference.exp() * (reference - policy)).sum(-1)
    return kl, gather(policy, target), gather(reference, target)


def log_softmax_in_dtype(policy_logits, reference_logits, target):
    """On bf16 more than half of a small KL is rounding: not the accuracy of the others."""
    policy, reference = policy_logits.log_softmax(-1), reference_logits.log_softmax(-1)
    kl = (reference.exp() * (reference - policy)).sum(-1)
    return kl, gather(policy, target), gather(reference, target)


def logsumexp(policy_logits, reference_logits, target):
    """KL = E_q[r - x] + lse(x) - lse(r), without the two log-softmax tensors."""
    policy, reference = upcast(policy_logits), upcast(reference_logits)
    policy_lse, reference_lse = policy.logsumexp(-1), reference.logsumexp(-1)
    weight = (reference - reference_lse.unsqueeze(-1)).exp()
    kl = (weight * (reference - policy)).sum(-1) + policy_lse - reference_lse
    return kl, gather(policy, target) - policy_lse, gather(reference, target) - reference_lse


def kl_div(policy_logits, reference_logits, target):
    policy = upcast(policy_logits).log_softmax(-1)
    reference = upcast(reference_logits).log_softmax(-1)
    kl = F.kl_div(policy, reference, reduction="none", log_target=True).sum(-1)
    return kl, gather(policy, target), gather(reference, target)


def kl_alone(policy_logits, reference_logits, target):
    """No log-probabilities: their gather costs a scatter in the backward, which a user of the KL
    alone does not pay."""
    policy = upcast(policy_logits).log_softmax(-1)
    reference = upcast(reference_logits).log_softmax(-1)
    return (reference.exp() * (reference - policy)).sum(-1)


def authors(policy_logits, reference_logits, target):
    """TDPO's equations as its authors code them: float32 copies, and softmax and then its
    logarithm for the reference. Every intermediate has a name and so lives to the end, as in their
    function: seven float32 tensors of the logits' size for bf16 logits."""
    policy_float, reference_float = upcast(policy_logits), upcast(reference_logits)
    policy = policy_float.log_softmax(-1)
    probability = reference_float.softmax(-1)
    reference = probability.log()
    difference = reference - policy
    product = probability * difference
    return product.sum(-1), gather(policy, target), gather(reference, target)
