"""Log-probability of given tokens, and the entropy, from one read of the logits."""

import torch
from torch import Tensor

from tokcore import _checks, _library


def token_logprob(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Log-probabilities of the target tokens under softmax(logits), and the entropy of each row.

    Equivalent to ``(logits.float() / temperature).log_softmax(-1).gather(-1, target[..., None])``
    without its last dimension, but nothing of the size of the logits is written in the forward,
    and only the gradient itself in the backward.

    .. math::
        z_j = \frac{1}{T}\, c \tanh(x_j / c), \quad
        \log p_j = z_j - \log \sum\nolimits_i e^{z_i}, \quad
        H = -\sum\nolimits_j p_j \log p_j

    with :math:`z_j = x_j / T` where there is no softcap :math:`c`. Maximum and sum come from one
    sweep (online softmax, arXiv 1805.02867); the log-probabilities are the
    :math:`\log \pi(y_t \mid s_t)` of DPO and TDPO (arXiv 2404.11999).

    Args:
        logits: (..., V), float32, bfloat16, float16 or float64. Leading dimensions may have any
            strides; the last one is copied once unless it is contiguous.
        target: token ids, int64 or int32. (...) for one a row, or (..., K) for K a row.
        temperature: T in [1e-30, 1e30], or a floating point tensor (...) of one for each row, used
            as float32. Default 1.0.
        softcap: c in [1e-30, 1e30], applied before the temperature. Default None: no softcap.
        ignore_index: targets of this value get 0, and no gradient. A row of nothing else is not
            read. Default -100.
        return_entropy: also return the entropy of each row. Default False.
        inplace_backward: the backward writes the gradient over ``logits`` and so needs no memory
            of its own. Whoever else saved the logits for a backward gets an error then, and so
            does a second backward. Default False.

    Returns:
        The log-probabilities, in the shape of ``target``, float32 (float64 for float64 logits).
        With ``return_entropy`` a pair (log-probabilities, entropy (...)) of that dtype.

        A target at -inf gives -inf; entries at -inf add 0 to the entropy. A row that is all -inf,
        or that holds +inf or NaN, gives NaN in that row only (a softcap makes infinities finite
        first). Rows do not depend on each other, nor on the number of threads.

    Raises:
        TypeError, ValueError: an argument of a wrong dtype, shape, device or value. Nothing is
            broadcast.
        RuntimeError: on the CPU, a target that is neither in [0, V) nor ``ignore_index``. On CUDA
            that row is NaN, and TOKCORE_DEBUG=1 raises.

    Differentiable in ``logits`` alone, and once: a second derivative raises NotImplementedError.
    ``temperature`` and ``softcap`` are constants.

    >>> logits = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    >>> token_logprob(logits, torch.tensor([1, -100]))
    tensor([-0.6931,  0.0000])
    """
    op = "token_logprob"
    _checks.logits(op, "logits", logits)
    ignore_index = _checks.integer(op, "ignore_index", ignore_index)
    _checks.target(op, target, logits, ignore_index, several=True)
    scalar, per_row = _checks.temperature(op, temperature, logits)
    cap = _checks.softcap(op, softcap)
    inplace = bool(inplace_backward) and _checks.inplace_backward(op, "logits", logits)
    logprob, entropy, _ = _library.native().token_logprob(
        logits, target, per_row, scalar, cap, ignore_index, bool(return_entropy), inplace
    )
    return (logprob, entropy) if return_entropy else logprob


def _reference(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition in plain torch: differentiable, and exact enough for a truth in float64."""
    several = target.dim() == logits.dim()
    ids = (target if several else target.unsqueeze(-1)).long()
    wanted = ids != ignore_index
    keep = wanted.any(-1)
    # Selected, not multiplied: what stands in an ignored row has no effect on any gradient.
    x = torch.where(keep.unsqueeze(-1), logits, 0)
    x = x.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature.float().to(x.dtype).unsqueeze(-1)
    logp = torch.log_softmax(x / temperature, -1)
    logprob = torch.where(wanted, logp.gather(-1, torch.where(wanted, ids, 0)), 0)
    logprob = logprob if several else logprob.squeeze(-1)
    if not return_entropy:
        return logprob
    finite = torch.where(logp == -torch.inf, 0, logp)  # p log p is 0 at p = 0
    return logprob, torch.where(keep, -(logp.exp() * finite).sum(-1), 0)


def _fake(
    logits,
    target,
    row_temperature,
    temperature,
    softcap,
    ignore_index,
    with_entropy,
    inplace_backward,
):
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows = logits.shape[:-1]
    return (
        logits.new_empty(target.shape, dtype=dtype),
        logits.new_empty(rows if with_entropy else (0,), dtype=dtype),
        logits.new_empty((*rows, 2), dtype=dtype),
    )


def _fake_backward(grad_logprob, grad_entropy, logits, *rest):
    return logits.new_empty(logits.shape)


def _setup_context(ctx, inputs, output):
    logits, target, row_temperature, *ctx.constants, with_entropy, ctx.inplace = inputs
    _, entropy, stats = output
    ctx.save_for_backward(logits, target, entropy, stats, row_temperature)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*((stats,) if with_entropy else (entropy, stats)))


def _backward(operators, ctx, grad_logprob, grad_entropy, grad_stats):
    grad = None
    if ctx.needs_input_grad[0] and not (grad_logprob is None and grad_entropy is None):
        saved = ctx.saved_tensors
        arguments = (grad_logprob, grad_entropy, *saved, *ctx.constants)
        if ctx.inplace:
            _checks.no_create_graph("token_logprob")
            operators.token_logprob_backward_(*arguments)
            grad = saved[0].detach()
        else:
            grad = operators.token_logprob_backward(*arguments)
    return grad, *(None,) * 7


_library.register_operator(
    "token_logprob",
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    backward=_backward,
    written=2,
)
