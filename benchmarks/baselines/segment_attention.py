"""Attention within segments through torch's own, which takes a mask of pairs."""

import torch.nn.functional as F


def same(segments):
    return (segments.unsqueeze(2) == segments.unsqueeze(1)).unsqueeze(1)


def with_mask(packed, segments, mask):
    """The mask made once for all layers, outside of the time."""
    return F.scaled_dot_product_attention(*packed.unbind(), attn_mask=mask)


def making_mask(packed, segments, mask):
    return F.scaled_dot_product_attention(*packed.unbind(), attn_mask=same(segments))
