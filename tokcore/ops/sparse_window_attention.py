"""Causal attention to a window of recent tokens and to listed tokens before it."""

import torch
from torch import Tensor

from tokcore import _checks, _library

MOST_HEAD_DIM = 256


def sparse_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    global_index: Tensor | None = None,
    *,
    scale: float | None = None,
) -> Tensor:
    r"""Causal attention of each query to the last ``window`` tokens and to listed earlier ones.

    Equivalent to ``scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale,
    enable_gqa=True)`` with ``p = torch.arange(S - T, S).unsqueeze(1)``, ``j = torch.arange(S)`` and
    ``seen = (j <= p) & ((j > p - window) | listed)``, ``listed`` (B, Hq, 1, S) the tokens of
    ``global_index``; but only the pairs that are seen are computed, nothing of the size (T, S) is
    written, and memory is that of inputs, outputs and one number a query.

    .. math::
        o_{ht} = \sum_{j \in N_t} \frac{e^{\sigma q_{ht} \cdot k_{gj}}}
                 {\sum_{i \in N_t} e^{\sigma q_{ht} \cdot k_{gi}}} v_{gj}, \quad
        N_t = \{j : p_t - W < j \le p_t\} \cup \{j \in L_g : j \le p_t\}, \quad
        p_t = S - T + t

    W is the window, :math:`L_g` the list of the KV head g that serves head h, :math:`\sigma` the
    scale. A listed token within a query's window counts once.

    Args:
        query: (B, Hq, T, D), float32, float64, float16 or bfloat16; 1 <= D <= 256, Hq >= 1. The
            last T tokens of S.
        key, value: (B, Hkv, S, D), of the same dtype; Hkv divides Hq, and head h reads the KV head
            h // (Hq / Hkv); S >= T.
        window: how many tokens a query sees, itself included; at least 1. From S on all of them.
        global_index: (B, Hg, M) int32, Hg either 1 (one list for all heads) or Hkv: ascending,
            distinct positions in [0, S), then -1. Default: none.
        scale: a finite number. Default D ** -0.5.

    Returns:
        (B, Hq, T, D) of the query's dtype; accumulation is float32 (float64 for float64). A key
        that a query does not see has no effect on it, NaN and infinity included.

    Raises:
        TypeError, ValueError: an argument of a wrong dtype, shape, device or value.
        RuntimeError: on the CPU, a list that is not ascending positions and then -1. On CUDA the
            heads that share it are NaN, gradients too (with TOKCORE_DEBUG=1 it raises ValueError).
        NotImplementedError: a second derivative is taken.

    Differentiable once, in query, key and value.

    >>> x = torch.zeros(1, 1, 4, 1)
    >>> value = torch.tensor([8.0, 0.0, 2.0, 4.0]).view(1, 1, 4, 1)
    >>> sparse_window_attention(x, x, value, 2).flatten()
    tensor([8., 4., 1., 3.])
    >>> sparse_window_attention(x, x, value, 1, torch.tensor([[[0, 3, -1]]]).int()).flatten()
    tensor([8., 4., 5., 6.])

    Source: ALISA (arXiv 2403.17312), section IV.B: a static window and tokens that are chosen, for
    a whole prompt at once; the window alone is that of Longformer (arXiv 2004.05150), section 3.1.
    """
    op = "sparse_window_attention"
    _check_tensors(op, query, key, value)
    _checks.number(op, "window", _checks.integer(op, "window", window), least=1)
    if global_index is not None:
        _check_index(op, global_index, query, key)
    if scale is None:
        scale = query.shape[-1] ** -0.5
    else:
        _checks.number(op, "scale", scale, least=-torch.inf)
    return _library.native().sparse_window_attention(
        query, key, value, global_index, window, float(scale)
    )[0]


def _check_tensors(op: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _checks.tensor(op, name, tensor)
        _checks.floating(op, name, tensor)
        _checks.no_functional_derivative(op, name, tensor)
    if query.dim() != 4 or query.shape[1] < 1 or not 1 <= query.shape[3] <= MOST_HEAD_DIM:
        raise ValueError(
            f"{op}: query must have shape (B, Hq, T, D) with Hq >= 1 and 1 <= D <= "
            f"{MOST_HEAD_DIM}, got {tuple(query.shape)}"
        )
    batch, heads, queries, dim = query.shape
    if (
        key.dim() != 4
        or (key.shape[0], key.shape[3]) != (batch, dim)
        or key.shape[1] < 1
        or heads % key.shape[1] != 0
        or key.shape[2] < queries
    ):
        raise ValueError(
            f"{op}: key must have shape ({batch}, Hkv, S, {dim}) with Hkv a divisor of {heads} and "
            f"S >= {queries}, got {tuple(key.shape)}"
        )
    _checks.like_query(op, query, key, value)


def _check_index(op: str, index: Tensor, query: Tensor, key: Tensor) -> None:
    _checks.tensor(op, "global_index", index)
    if index.dtype != torch.int32:
        raise TypeError(f"{op}: global_index must be int32, got {index.dtype}")
    batch, heads, keys, _ = key.shape
    if index.dim() != 3 or index.shape[0] != batch or index.shape[1] not in (1, heads):
        raise ValueError(
            f"{op}: global_index must have shape ({batch}, Hg, M) with Hg 1 or {heads}, got "
            f"{tuple(index.shape)}"
        )
    _checks.on_device_of_query(op, "global_index", index, query)
    if _checks.debugged(index):
        wrong = (index < -1) | (index >= keys)
        before, after = index[..., :-1], index[..., 1:]
        wrong[..., 1:] |= (after != -1) & ((before == -1) | (after <= before))
        if bool(wrong.any()):
            at = tuple(wrong.nonzero()[0].tolist())
            raise ValueError(
                f"{op}: global_index must hold ascending positions in [0, {keys}), then -1, got "
                f"{index[at].item()} at {at}"
            )


def _reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    global_index: Tensor | None = None,
    *,
    scale: float | None = None,
) -> Tensor:
    """The definition in plain torch, with the mask written out: differentiable."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    group = query.shape[1] // key.shape[1]
    seen = _seen(query, key, window, global_index)
    k, v = (x.to(wide).repeat_interleave(group, 1) for x in (key, value))
    scores = (query.to(wide) @ k.mT * scale).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ v).to(query.dtype)


def _seen(query: Tensor, key: Tensor, window: int, global_index: Tensor | None) -> Tensor:
    """(B, Hq or 1, T, S) bool: whether the query attends to the key."""
    keys = key.shape[2]
    p = torch.arange(keys - query.shape[2], keys, device=query.device).unsqueeze(1)
    j = torch.arange(keys, device=query.device)
    near = (j > p - window)[None, None]
    if global_index is not None:
        batch, lists, _ = global_index.shape
        listed = torch.zeros(batch, lists, keys + 1, dtype=torch.bool, device=query.device)
        listed.scatter_(2, global_index.long().where(global_index >= 0, keys), True)
        listed = listed[:, :, None, :keys].repeat_interleave(query.shape[1] // lists, 1)
        near = near | listed
    return near & (j <= p)


def _fake(query, key, value, global_index, window, scale):
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=dtype)


def _fake_backward(grad_output, query, key, value, *rest):
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.window, ctx.scale = inputs
    lse = output[1]
    ctx.save_for_backward(*tensors, lse)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse)


def _backward(operators, ctx, grad_output, grad_lse):
    grads = (None, None, None)
    if grad_output is not None:
        grads = operators.sparse_window_attention_backward(
            grad_output, *ctx.saved_tensors, ctx.window, ctx.scale
        )
    return *grads, None, None, None


_library.register_operator(
    "sparse_window_attention",
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    backward=_backward,
    over_rows=False,
)
