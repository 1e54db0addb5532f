"""The fused operators, one file each."""

from tokcore.ops.sequential_kl import SequentialKL, sequential_kl
from tokcore.ops.token_logprob import token_logprob

__all__ = ["SequentialKL", "sequential_kl", "token_logprob"]
