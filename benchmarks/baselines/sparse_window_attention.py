"""Attention to a window and listed tokens through torch's own, by a mask of pairs or of blocks."""

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.suite import compiled


def seen(tokens, window, index, device):
    """(1, 1, T, T) bool."""
    p = torch.arange(tokens, device=device)
    listed = torch.zeros(tokens, dtype=torch.bool, device=device).index_fill_(0, index, True)
    return ((p <= p[:, None]) & ((p > p[:, None] - window) | listed))[None, None]


def block_mask(mask):
    """Of the same pairs, for FlexAttention; its kernels skip blocks of 128 x 128 without any."""

    def is_seen(batch, head, query, key):
        return mask[0, 0, query, key]

    tokens = mask.shape[-1]
    return create_block_mask(is_seen, None, None, tokens, tokens, device=mask.device)


def with_mask(packed, window, index, mask, blocks):
    """The mask made once for all layers, outside of the time."""
    return F.scaled_dot_product_attention(*packed.unbind(), attn_mask=mask)


def making_mask(packed, window, index, mask, blocks):
    tokens = packed.shape[-2]
    mask = seen(tokens, window, index.flatten().long(), packed.device)
    return F.scaled_dot_product_attention(*packed.unbind(), attn_mask=mask)


def flex():
    """Its blocks made outside of the time too. On the CPU it has no backward (torch 2.13)."""
    attention = compiled(flex_attention)

    def call(packed, window, index, mask, blocks):
        return attention(*packed.unbind(), block_mask=blocks)

    return call
