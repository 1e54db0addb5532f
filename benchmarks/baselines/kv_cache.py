"""A sparse key-value cache in plain torch: what a user composes without tokcore.

Sums of weights are float32 there. A running sum keeps residues of rows that have left; the sum of
the ring anew has none.
"""

import torch


def topk(score, keep):
    """Sorted slots of the last `keep` and the `keep` greatest before them; any of equal scores."""
    slots = score.shape[-1]
    ranked = score[..., : slots - keep].topk(keep, sorted=False).indices.sort().values
    local = torch.arange(slots - keep, slots, device=score.device).expand(*score.shape[:-1], -1)
    return torch.cat([ranked, local], -1)


def stable_sort(score, keep):
    """The same with ties as tokcore has them."""
    slots = score.shape[-1]
    order = score[..., : slots - keep].sort(descending=True, stable=True).indices
    ranked = order[..., :keep].sort().values
    local = torch.arange(slots - keep, slots, device=score.device).expand(*score.shape[:-1], -1)
    return torch.cat([ranked, local], -1)


def _enter(ring, last, rows, index, step):
    row = ring[:, :, step % ring.shape[2]].zero_()
    row.scatter_(-1, index, rows)
    last.scatter_(-1, index, step)
    return row


def running_sum(score, ring, last, rows, index, step):
    score -= ring[:, :, step % ring.shape[2]]
    score += _enter(ring, last, rows, index, step)
    return score


def sum_of_ring(score, ring, last, rows, index, step):
    _enter(ring, last, rows, index, step)
    return torch.sum(ring, 2, out=score)


def index_copy(stored, tokens, position, last, slots, length):
    """`stored` and `tokens`: keys and values, or one of them."""
    for x, new in zip(stored, tokens, strict=True):
        x.index_copy_(2, slots, new)
    position[..., slots] = torch.arange(length, length + len(slots), dtype=torch.int32)
    last[..., slots] = -1
    return stored


def cat(stored, tokens, *others):
    """As transformers' DynamicCache: everything is copied at each step."""
    return [torch.cat([x, new], 2) for x, new in zip(stored, tokens, strict=True)]


def quantized(x, groups):
    """uint8 with scale and offset of each group, in float32."""
    x = x.unflatten(-1, (groups, -1)).float()
    least, greatest = x.aminmax(dim=-1, keepdim=True)
    scale = (greatest - least) / 255
    zero = (0.5 - least / scale).floor()
    q = ((x / scale + 0.5).floor() + zero).clamp(0, 255).to(torch.uint8)
    return q.flatten(-2), torch.cat([scale, -scale * zero], -1)


def gather(of_heads, of_lists, ring, last, since, local):
    """Copies of what stays, by one index of each row; as many in each."""
    slot = torch.arange(last.shape[-1], device=last.device)
    kept = (last >= since) | (slot >= len(slot) - local)
    index = kept.nonzero()[:, -1].view(*kept.shape[:-1], -1)
    moved = [
        x.gather(2, index.unsqueeze(-1).expand(-1, x.shape[1], -1, x.shape[3])) for x in of_heads
    ]
    moved += [x.gather(-1, index) for x in of_lists]
    moved.append(ring.gather(-1, index.unsqueeze(2).expand(-1, -1, ring.shape[2], -1)))
    return moved
