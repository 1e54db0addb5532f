"""Liger-Kernel's and TRL's own fused functions, where they are installed and a GPU can run them.

Their Triton kernels have no CPU path. What they offer is the nearest thing rather than the same:
each docstring says what is missing.
"""

import importlib.util

from benchmarks.baselines import upcast


def installed(package):
    return importlib.util.find_spec(package) is not None


def liger_cross_entropy(logits, target):
    """Writes the gradient over the logits during the forward; losses in the logits' dtype."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    losses = liger_cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="none")
    return -losses.view(target.shape)


def liger_kl_div(policy_logits, reference_logits, target):
    """KL alone. Takes log-probabilities, so that two log_softmax run outside of it."""
    from liger_kernel.transformers.functional import liger_kl_div

    policy = upcast(policy_logits).log_softmax(-1).flatten(0, -2)
    reference = upcast(reference_logits).log_softmax(-1).flatten(0, -2)
    return liger_kl_div(policy, reference, reduction="none", log_target=True).sum(-1)


def liger_kl_div_scalar(policy_logits, reference_logits, target):
    """One sum over all positions: no weight a position, which TDPO needs."""
    from liger_kernel.transformers.functional import liger_kl_div

    policy = upcast(policy_logits).log_softmax(-1).flatten(0, -2)
    reference = upcast(reference_logits).log_softmax(-1).flatten(0, -2)
    return liger_kl_div(policy, reference, reduction="sum", log_target=True)


def trl_selective_log_softmax(logits, target):
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax(logits, target)


def trl_selective_log_softmax_and_entropy(logits, target):
    """TRL 1.14 and later."""
    from trl.trainer.utils import selective_log_softmax_and_entropy

    return selective_log_softmax_and_entropy(logits, target)
