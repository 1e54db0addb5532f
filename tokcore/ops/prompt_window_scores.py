"""The weights that the last tokens of a prompt give to a key-value cache, summed over heads."""

import torch
from torch import Tensor

from tokcore import _checks, _library


def prompt_window_scores(
    query: Tensor,
    key: Tensor,
    count: Tensor,
    *,
    scale: float | None = None,
    key_quantization: Tensor | None = None,
) -> Tensor:
    r"""What each of the last Q tokens weighs each slot of a cache with, summed over the heads.

    Equivalent, for a batch of one, one KV head and a full cache, to
    ``(query @ key.mT * scale).masked_fill(later, -inf).softmax(-1).sum(heads)``, where ``later``
    are the slots beyond the query's own; but nothing of the size (B, Hq, Q, C) is written.

    .. math::
        R_{ij} = \sum_h \frac{[j < n_i] \, e^{\sigma q_{hi} \cdot k_j}}
                             {\sum_{l < n_i} e^{\sigma q_{hi} \cdot k_l}}, \quad
        n_i = \max(0, n - (Q - 1 - i))

    The queries are those of the last Q tokens in the cache, n of whose slots are in use. The sum
    is over the query heads that share a list, in their order; query head h reads KV head
    ``h // (Hq / Hkv)``. With it the steps after a prompt have rows of weights to begin with, while
    the prompt itself runs through any fused attention.

    Args:
        query: (B, Hq, Q, D), float32, float64, float16 or bfloat16; 1 <= D <= 256.
        key: (B, Hkv, C, D) of the query's dtype, Hkv a divisor of Hq; or uint8, with its
            quantization. Any strides but the last: a part of a larger cache is not copied.
        count: (B, Hs) int32 in [0, C], Hs = 1 (one list for all heads) or Hkv: slots in use.
        scale: a finite number. Default D ** -0.5.
        key_quantization: (B, Hkv, C, Z, 2) float32, (scale, offset) of each of Z equal groups of
            the D entries: an entry u of a uint8 cache means ``scale * u + offset``. Not with a
            float64 query.

    Returns:
        (B, Hs, Q, C) float32 (float64 for float64). 0 in slots that a query does not see; a query
        that sees none has a row of 0. A NaN or +inf among the scores of a head, or nothing but
        -inf, makes what its query sees NaN. Slots that are not in use have no effect.

    Raises:
        TypeError, ValueError: an argument of a wrong dtype, shape or device. Nothing is broadcast.
        RuntimeError: on the CPU, a count out of range. On CUDA the rows of such a list are NaN
            (with TOKCORE_DEBUG=1 it raises).
        NotImplementedError: a gradient is taken.

    Not differentiable. Sums do not depend on the number of threads.

    >>> query, key = torch.ones(1, 1, 2, 1), torch.tensor([[[[0.0], [1.0986123]]]])
    >>> prompt_window_scores(query, key, torch.tensor([[2]]).int())
    tensor([[[[1.0000, 0.0000],
              [0.2500, 0.7500]]]])

    Source: the prompt's rows of ALISA's sum (arXiv 2403.17312, section IV.B), found from the last
    queries alone as in FasterDecoding/SnapKV:snapkv/monkeypatch/snapkv_utils.py.
    """
    op = "prompt_window_scores"
    _checks.cached(op, query, key, count, key_quantization, dims=4)
    if scale is None:
        scale = query.shape[-1] ** -0.5
    else:
        _checks.number(op, "scale", scale, least=-torch.inf)
    _checks.slots_in_use(op, count, None, key.shape[2])
    return _library.native().prompt_window_scores(query, key, count, key_quantization, float(scale))


def _reference(
    query: Tensor,
    key: Tensor,
    count: Tensor,
    *,
    scale: float | None = None,
    key_quantization: Tensor | None = None,
    wide: torch.dtype | None = None,
) -> Tensor:
    """The definition in plain torch, query by query, all of it in ``wide``."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if wide is None:
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    keys = key.to(wide)
    if key_quantization is not None:
        by, plus = key_quantization.to(wide).split(1, -1)
        groups = keys.unflatten(-1, (key_quantization.shape[3], -1))
        keys = (groups * by + plus).flatten(-2)
    batch, heads, queries, _ = query.shape
    lists, group = count.shape[1], heads // key.shape[1]
    rows = torch.zeros(batch, lists, queries, key.shape[2], dtype=wide, device=query.device)
    for b in range(batch):
        for head in range(heads):
            h = head // group
            s = h if lists > 1 else 0
            for i in range(queries):
                n = int(count[b, s]) - (queries - 1 - i)
                if n > 0:
                    scores = keys[b, h, :n] @ query[b, head, i].to(wide) * scale
                    rows[b, s, i, :n] += scores.softmax(0)
    return rows


def _fake(query, key, count, key_quantization, scale):
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty((*count.shape, query.shape[2], key.shape[2]), dtype=dtype)


_library.register_operator("prompt_window_scores", fake=_fake, over_rows=False)
