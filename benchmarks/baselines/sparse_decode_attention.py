"""Attention of one token to a cache as torch composes it, with and without the slots' weights."""

import torch
import torch.nn.functional as F


def _listed(key, value, index):
    """The rows of one list for all, gathered: a copy of what is then read again."""
    slots = index[0, 0].long()
    return key.index_select(2, slots), value.index_select(2, slots)


def _grouped(query, key):
    """Query heads of a KV head as its queries: (B, Hkv, G, D)."""
    return query.unflatten(1, (key.shape[1], -1))


def attention(query, key, value, index=None):
    """What a model calls: heads repeated by torch itself."""
    if index is not None:
        key, value = _listed(key, value, index)
    return F.scaled_dot_product_attention(query.unsqueeze(2), key, value, enable_gqa=True)


def grouped_attention(query, key, value, index=None):
    if index is not None:
        key, value = _listed(key, value, index)
    return F.scaled_dot_product_attention(_grouped(query, key), key, value).flatten(1, 2)


def with_weights(query, key, value, index=None):
    if index is not None:
        key, value = _listed(key, value, index)
    scores = _grouped(query, key) @ key.mT * query.shape[-1] ** -0.5
    weights = scores.float().softmax(-1)
    return (weights.to(value.dtype) @ value).flatten(1, 2), weights.sum((1, 2))


def prompt_scores(key, query, count):
    """Rows of the last queries of a full cache, all heads' weights at once."""
    queries, slots = query.shape[2], key.shape[2]
    of_heads = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # (B, Hkv, G * Q, D)
    scores = (of_heads @ key.mT * query.shape[-1] ** -0.5).float()
    scores = scores.unflatten(2, (-1, queries))
    own = torch.arange(slots - queries, slots, device=key.device).unsqueeze(1)
    later = torch.arange(slots, device=key.device) > own
    return scores.masked_fill(later, -torch.inf).softmax(-1).sum((1, 2))
