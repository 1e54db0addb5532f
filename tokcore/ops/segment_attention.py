"""Attention within segments, and the token-level constraint on its weights, from ids alone."""

from typing import NamedTuple

import torch
from torch import Tensor

from tokcore import _checks, _library

MOST_HEAD_DIM = 256


class SegmentAttention(NamedTuple):
    """Output (B, H, T, D); constraint (B, T) and weights (B, T, S), None unless asked for."""

    output: Tensor
    constraint: Tensor | None
    weights: Tensor | None


def segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_segments: Tensor,
    key_segments: Tensor,
    *,
    query_words: Tensor | None = None,
    key_words: Tensor | None = None,
    scale: float | None = None,
    return_weights: bool = False,
) -> SegmentAttention:
    r"""Attention of each query to the keys of its own segment, and how far it is from word weights.

    Equivalent to ``scaled_dot_product_attention(query, key, value, attn_mask=same.unsqueeze(1))``
    with ``same = query_segments.unsqueeze(2) == key_segments.unsqueeze(1)``, but nothing of the
    size (B, T, S) is written, only pairs of one segment are computed, and a query without a key
    gives 0 and not NaN. With words also ``((weights - target).square() * mean).sum(2)``, where
    ``target`` is ``query_words.unsqueeze(2) == key_words.unsqueeze(1)`` over its row sums, and
    ``mean`` is ``same`` over its row sums.

    .. math::
        A_{hts} = \frac{[g_t = g_s] \, e^{\sigma q_{ht} \cdot k_{hs}}}
                       {\sum_{s'} [g_t = g_{s'}] \, e^{\sigma q_{ht} \cdot k_{hs'}}}, \quad
        o_{ht} = \sum_s A_{hts} v_{hs}, \quad
        \bar A_{ts} = \frac{1}{H} \sum_h A_{hts}

    .. math::
        c_t = \sum_s (\bar A_{ts} - W_{ts})^2 m_{ts}, \quad
        W_{ts} = \frac{[w_t = w_s]}{\max(1, \sum_{s'} [w_t = w_{s'}])}, \quad
        m_{ts} = \frac{[g_t = g_s]}{\max(1, \sum_{s'} [g_t = g_{s'}])}

    g are the segments (sentences), w the words, :math:`\sigma` the scale. The sentence mask and
    the attention loss of SongMASS are this with the ids of its data.

    Args:
        query: (B, H, T, D), float32, float64, float16 or bfloat16; 1 <= D <= 256, H >= 1.
        key, value: (B, H, S, D), of the same dtype.
        query_segments: (B, T) int64 or int32, any integers, in any order. For padding take an id
            that matches nothing on the other side: by convention -2 here, -1 in ``key_segments``.
            Padding may stand on either side, or anywhere; ids and tokens must agree about where.
        key_segments: (B, S) int64 or int32.
        query_words, key_words: (B, T) and (B, S) int64 or int32, both or neither. Word weights
            W count the equal words of all keys; only keys of the segment add to the constraint.
        scale: a finite number. Default D ** -0.5.
        return_weights: also the weights, the mean of A over the heads; (B, T, S) is written.

    Returns:
        SegmentAttention. output is of the query's dtype; accumulation is float32 (float64 for
        float64). constraint and weights are float32 (float64 for float64); constraint is None
        without words, weights None without ``return_weights``. A query that matches nothing
        gives output 0, constraint 0, weights 0, and gradients 0. Keys, values and queries that
        match nothing have no effect, NaN and infinity included, and get gradients of 0.

    Raises:
        TypeError, ValueError: an argument of a wrong dtype, shape, device or value. Nothing is
            broadcast.
        NotImplementedError: a gradient reaches weights, or a second derivative is taken.

    Differentiable once, by output and constraint, in query, key and value; W is a constant.
    weights are for reading alignments: detach them before they enter a loss.

    >>> query, key = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 3, 4)
    >>> value = torch.tensor([1.0, 3.0, 7.0]).expand(1, 1, 4, 3).mT
    >>> output, constraint, _ = segment_attention(
    ...     query, key, value, torch.tensor([[0, -2]]), torch.tensor([[0, 0, 1]]),
    ...     query_words=torch.tensor([[5, -2]]), key_words=torch.tensor([[5, 6, 7]]))
    >>> output[0, 0, :, 0], constraint
    (tensor([2., 0.]), tensor([[0.2500, 0.0000]]))

    Source: SongMASS (arXiv 2012.05168), microsoft/muzic:songmass/mass/masked_mh_attention.py and
    songmass/mass/label_smoothed_cross_entropy_with_align.py.
    """
    op = "segment_attention"
    _check_tensors(op, query, key, value)
    _check_ids(op, "segments", query_segments, key_segments, query, key)
    if (query_words is None) != (key_words is None):
        given = "query_words" if key_words is None else "key_words"
        raise ValueError(f"{op}: query_words and key_words go together, got {given} alone")
    if query_words is not None:
        _check_ids(op, "words", query_words, key_words, query, key)
    if scale is None:
        scale = query.shape[-1] ** -0.5
    else:
        _checks.number(op, "scale", scale, least=-torch.inf)
    output, constraint, weights, _ = _library.native().segment_attention(
        query,
        key,
        value,
        query_segments,
        key_segments,
        query_words,
        key_words,
        float(scale),
        bool(return_weights),
    )
    return SegmentAttention(
        output,
        None if query_words is None else constraint,
        weights if return_weights else None,
    )


def _check_tensors(op: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _checks.tensor(op, name, tensor)
        _checks.floating(op, name, tensor)
        _checks.no_functional_derivative(op, name, tensor)
    if query.dim() != 4 or query.shape[1] < 1 or not 1 <= query.shape[3] <= MOST_HEAD_DIM:
        raise ValueError(
            f"{op}: query must have shape (B, H, T, D) with H >= 1 and 1 <= D <= {MOST_HEAD_DIM}, "
            f"got {tuple(query.shape)}"
        )
    batch, heads, _, dim = query.shape
    rule = f"({batch}, {heads}, S, {dim})"
    if key.dim() != 4 or (*key.shape[:2], key.shape[3]) != (batch, heads, dim):
        raise ValueError(
            f"{op}: key must have shape {rule} for query {tuple(query.shape)}, got "
            f"{tuple(key.shape)}"
        )
    _checks.like_query(op, query, key, value)


def _check_ids(op: str, kind: str, of_queries, of_keys, query: Tensor, key: Tensor) -> None:
    for name, ids, like in ((f"query_{kind}", of_queries, query), (f"key_{kind}", of_keys, key)):
        _checks.tensor(op, name, ids)
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{op}: {name} must be int64 or int32, got {ids.dtype}")
        shape = (like.shape[0], like.shape[2])
        if ids.shape != shape or ids.device != query.device:
            raise ValueError(
                f"{op}: {name} must have shape {shape} on {query.device}, got "
                f"{tuple(ids.shape)} on {ids.device}"
            )


def _reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_segments: Tensor,
    key_segments: Tensor,
    *,
    query_words: Tensor | None = None,
    key_words: Tensor | None = None,
    scale: float | None = None,
    return_weights: bool = False,
) -> SegmentAttention:
    """The definition in plain torch, with all masks written out: differentiable.

    NaN in what matches nothing has no effect here too; in a key of another segment it would.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    same = query_segments.unsqueeze(2) == key_segments.unsqueeze(1)
    some, used = same.any(2), same.any(1)
    q = torch.where(some[:, None, :, None], query, 0).to(wide)
    k, v = (torch.where(used[:, None, :, None], x, 0).to(wide) for x in (key, value))
    scores = (q @ k.mT * scale).masked_fill((~same & some.unsqueeze(2)).unsqueeze(1), -torch.inf)
    attention = scores.softmax(-1).masked_fill(~same.unsqueeze(1), 0)
    output, weights = (attention @ v).to(query.dtype), attention.mean(1)
    constraint = None
    if query_words is not None:
        equal = query_words.unsqueeze(2) == key_words.unsqueeze(1)
        target = equal / equal.sum(2, keepdim=True).clamp(min=1).to(wide)
        mean = same / same.sum(2, keepdim=True).clamp(min=1).to(wide)
        constraint = ((weights - target).square() * mean).sum(2)
    return SegmentAttention(output, constraint, weights.detach() if return_weights else None)


def _fake(
    query,
    key,
    value,
    query_segments,
    key_segments,
    query_words,
    key_words,
    scale,
    with_weights,
):
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    batch, heads, queries, _ = query.shape
    with_words = query_words is not None
    return (
        query.new_empty(query.shape),
        query.new_empty((batch, queries) if with_words else (0,), dtype=dtype),
        query.new_empty((batch, queries, key.shape[2]) if with_weights else (0,), dtype=dtype),
        query.new_empty((batch, heads, queries, 2), dtype=dtype),
    )


def _fake_backward(grad_output, grad_constraint, query, key, value, *rest):
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.scale, with_weights = inputs
    _, constraint, weights, stats = output
    ctx.save_for_backward(*tensors, stats)
    ctx.set_materialize_grads(False)
    absent = [] if tensors[5] is not None else [constraint]
    absent += [] if with_weights else [weights]
    ctx.mark_non_differentiable(*absent, stats)


def _backward(operators, ctx, grad_output, grad_constraint, grad_weights, grad_stats):
    if grad_weights is not None:
        raise NotImplementedError(
            "segment_attention: weights are not differentiable, for reading alignments only; "
            "detach them, or use the constraint"
        )
    grads = (None, None, None)
    if not (grad_output is None and grad_constraint is None):
        saved = ctx.saved_tensors
        if grad_output is None:
            grad_output = torch.zeros_like(saved[0])
        grads = operators.segment_attention_backward(
            grad_output, grad_constraint, *saved, ctx.scale
        )
    return *grads, *(None,) * 6


_library.register_operator(
    "segment_attention",
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    backward=_backward,
    over_rows=False,
)
