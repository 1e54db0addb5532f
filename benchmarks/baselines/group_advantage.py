"""(r - mean) / (std + eps) of each group, vectorised as trainers have it: float32 throughout."""

import torch

GROUP, EPS = 8, 1e-4


def of_size(rewards, size=GROUP):
    """Groups of `size` rows in a row (TRL, OpenRLHF)."""
    grouped = rewards.view(-1, size)
    centered = grouped - grouped.mean(1, keepdim=True)
    return (centered / (grouped.std(1, keepdim=True) + EPS)).flatten()


def of_ids(rewards, ids, add=torch.index_add):
    """Groups by ids that count from 0, as verl numbers its prompts: no table of other ids."""
    zeros = rewards.new_zeros(int(ids.max()) + 1)
    count = add(zeros, 0, ids, torch.ones_like(rewards))
    mean = add(zeros, 0, ids, rewards) / count
    centered = rewards - mean[ids]
    variance = add(zeros, 0, ids, centered.square()) / (count - 1)
    return centered / (variance.sqrt() + EPS)[ids]


def of_any_ids(rewards, ids):
    """Groups by any ids, which is what tokcore takes."""
    return of_ids(rewards, ids.unique(return_inverse=True)[1])
