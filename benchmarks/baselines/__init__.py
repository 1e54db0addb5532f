"""What a user has today: plain torch, and the formulas of other libraries written anew.

python_tests/test_benchmarks.py holds each against float64 or the golden numbers: only what computes
the same thing is worth timing.
"""

import torch


def upcast(logits):
    """float32 for half precision, as trainers do for accuracy; float32 and float64 stay."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def gather(values, target):
    return values.gather(-1, target.unsqueeze(-1)).squeeze(-1)
