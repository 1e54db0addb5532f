"""KL divergence of two next-token distributions at each position, from one read of both logits."""

from typing import NamedTuple

import torch
from torch import Tensor

from tokcore import _checks, _library

_DIRECTIONS = {"forward": 1, "reverse": 2, "both": 3}


class SequentialKL(NamedTuple):
    """What :func:`sequential_kl` returns; None where it was not asked for."""

    kl: Tensor  # the divergence of the direction asked for; the forward one for "both"
    policy_logprob: Tensor | None  # with a target
    reference_logprob: Tensor | None  # with a target
    entropy: Tensor | None  # of the policy, with return_entropy
    reverse_kl: Tensor | None  # for "both"


def sequential_kl(
    policy_logits: Tensor,
    reference_logits: Tensor,
    target: Tensor | None = None,
    *,
    direction: str = "forward",
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    return_entropy: bool = False,
    inplace_backward: bool = False,
) -> SequentialKL:
    r"""KL divergence at each position, both log-probabilities of the target and the entropy.

    Equivalent to, with ``p = (policy_logits.float() / temperature).log_softmax(-1)`` and ``q`` of
    the reference, ``(q.exp() * (q - p)).sum(-1)``, ``p.gather(-1, target[..., None])`` and so on,
    but nothing of the size of the logits is written in the forward, and only the gradients
    themselves in the backward. A KL of 1e-6 is right to 1e-3 of itself in float32, where the
    expression above is noise; it is never negative, and 0 for equal logits.

    .. math::
        \mathrm{KL}(q \| p) = \sum\nolimits_j q_j (\log q_j - \log p_j)
                            = \sum\nolimits_j q_j (e^{u_j} - 1 - u_j), \quad
        u_j = \log p_j - \log q_j

    with q = softmax(reference / T), p = softmax(policy / T). "forward" is KL(reference || policy),
    the sequential KL of TDPO (arXiv 2404.11999); "reverse" is KL(policy || reference).

    Args:
        policy_logits: (..., V), float32, bfloat16, float16 or float64. Leading dimensions may have
            any strides; the last one is copied once unless it is contiguous.
        reference_logits: the same shape, dtype and device.
        target: token ids (...), int64 or int32. Default None: divergences only.
        direction: "forward", "reverse" or "both". Default "forward".
        temperature: T in [1e-30, 1e30], or a floating point tensor (...) of one for each row, used
            as float32. Default 1.0.
        ignore_index: a row with this target is not read; all its outputs and gradients are 0.
            Default -100.
        mask: bool (...), True = keep; other rows are treated like ignored ones. Default None.
        return_entropy: also return the policy's entropy. Default False.
        inplace_backward: the backward writes the policy's gradient over ``policy_logits`` and so
            needs no memory of its own. Whoever else saved them for a backward gets an error then,
            and so does a second backward. Not where the reference requires grad. Default False.

    Returns:
        SequentialKL(kl, policy_logprob, reference_logprob, entropy, reverse_kl), each (...) and
        float32 (float64 for float64 logits), or None where not asked for. ``kl`` is the divergence
        of ``direction``, the forward one for "both", where ``reverse_kl`` holds the other.

        An entry at -inf in both adds 0; one at -inf in the policy where the reference is finite
        makes the forward KL +inf, and the mirror image the reverse one. A row that is all -inf in
        either, or holds +inf or NaN, gives NaN in that row only. Rows do not depend on each other,
        nor on the number of threads.

    Raises:
        TypeError, ValueError: an argument of a wrong dtype, shape, device or value; vocabularies
            that differ. Nothing is broadcast.
        RuntimeError: on the CPU, a target that is neither in [0, V) nor ``ignore_index``. On CUDA
            that row is NaN, and TOKCORE_DEBUG=1 raises.

    Differentiable in both logits (the reference's gradient is computed only if it requires grad),
    and once: a second derivative raises NotImplementedError. ``temperature`` is a constant.

    >>> policy, reference = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    >>> sequential_kl(policy, reference, torch.tensor([1])).kl
    tensor([0.1109])
    """
    op = "sequential_kl"
    _checks.logits(op, "policy_logits", policy_logits)
    _checks.logits(op, "reference_logits", reference_logits)
    _checks.same_vocabulary(op, policy_logits, reference_logits)
    ignore_index = _checks.integer(op, "ignore_index", ignore_index)
    if target is not None:
        _checks.target(op, target, policy_logits, ignore_index, several=False)
    if mask is not None:
        _checks.mask(op, mask, policy_logits)
    bits = _checks.choice(op, "direction", direction, _DIRECTIONS)
    scalar, per_row = _checks.temperature(op, temperature, policy_logits)
    inplace = bool(inplace_backward) and _checks.inplace_backward(
        op, "policy_logits", policy_logits
    )
    if inplace:
        _checks.separate(op, "reference_logits", reference_logits, policy_logits)
    kl, reverse_kl, policy_logprob, reference_logprob, entropy, _ = _library.native().sequential_kl(
        policy_logits,
        reference_logits,
        target,
        mask,
        per_row,
        scalar,
        ignore_index,
        bits,
        bool(return_entropy),
        inplace,
    )
    return SequentialKL(
        kl=reverse_kl if direction == "reverse" else kl,
        policy_logprob=None if target is None else policy_logprob,
        reference_logprob=None if target is None else reference_logprob,
        entropy=entropy if return_entropy else None,
        reverse_kl=reverse_kl if direction == "both" else None,
    )


def _reference(
    policy_logits: Tensor,
    reference_logits: Tensor,
    target: Tensor | None = None,
    *,
    direction: str = "forward",
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    return_entropy: bool = False,
) -> SequentialKL:
    """The definition in plain torch: differentiable, and exact enough for a truth in float64."""
    keep = torch.ones(policy_logits.shape[:-1], dtype=torch.bool, device=policy_logits.device)
    keep = keep if mask is None else keep & mask
    keep = keep if target is None else keep & (target != ignore_index)
    dtype = torch.float64 if policy_logits.dtype == torch.float64 else torch.float32
    if isinstance(temperature, Tensor):
        temperature = temperature.float().to(dtype).unsqueeze(-1)

    def log_softmax(logits: Tensor) -> Tensor:
        # Selected, not multiplied: what stands in an ignored row has no effect on any gradient.
        return (torch.where(keep.unsqueeze(-1), logits, 0).to(dtype) / temperature).log_softmax(-1)

    def divergence(q: Tensor, p: Tensor) -> Tensor:
        gap = torch.where(q == -torch.inf, 0, q - torch.where(q == -torch.inf, 0, p))
        return (q.exp() * gap).sum(-1)

    def output(value: Tensor) -> Tensor:
        return torch.where(keep, torch.where(poisoned, torch.nan, value), 0)

    p, q = log_softmax(policy_logits), log_softmax(reference_logits)
    poisoned = p.isnan().any(-1) | q.isnan().any(-1)
    forward, reverse = output(divergence(q, p)), output(divergence(p, q))
    policy_logprob = reference_logprob = entropy = None
    if target is not None:
        ids = torch.where(keep, target, 0).long().unsqueeze(-1)
        policy_logprob = output(p.gather(-1, ids).squeeze(-1))
        reference_logprob = output(q.gather(-1, ids).squeeze(-1))
    if return_entropy:
        entropy = output(-(p.exp() * torch.where(p == -torch.inf, 0, p)).sum(-1))
    kl = reverse if direction == "reverse" else forward
    reverse_kl = reverse if direction == "both" else None
    return SequentialKL(kl, policy_logprob, reference_logprob, entropy, reverse_kl)


def _wanted(inputs) -> tuple[bool, ...]:
    """Which of the outputs before the statistics are asked for; the others have shape (0,)."""
    target, direction, with_entropy = inputs[2], inputs[7], inputs[8]
    has_target = target is not None
    return bool(direction & 1), bool(direction & 2), has_target, has_target, with_entropy


def _fake(*inputs):
    logits = inputs[0]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows = logits.shape[:-1]
    outputs = [logits.new_empty(rows if w else (0,), dtype=dtype) for w in _wanted(inputs)]
    return *outputs, logits.new_empty((*rows, 4), dtype=dtype)


def _fake_backward(*arguments):
    logits, (policy_needs_grad, reference_needs_grad) = arguments[5], arguments[-2:]
    return (
        logits.new_empty(logits.shape if policy_needs_grad else (0,)),
        logits.new_empty(logits.shape if reference_needs_grad else (0,)),
    )


def _setup_context(ctx, inputs, output):
    policy_logits, reference_logits, target, mask, row_temperature = inputs[:5]
    *ctx.constants, _, _, ctx.inplace = inputs[5:]
    *values, stats = output
    kl, reverse_kl, _, _, entropy = values
    logits = policy_logits, reference_logits
    ctx.save_for_backward(*logits, target, mask, kl, reverse_kl, entropy, stats, row_temperature)
    ctx.set_materialize_grads(False)
    wanted = _wanted(inputs)
    unwanted = [value for value, is_wanted in zip(values, wanted, strict=True) if not is_wanted]
    ctx.mark_non_differentiable(*unwanted, stats)


def _backward(operators, ctx, *grads):
    policy_grad = reference_grad = None
    *upstream, _ = grads
    for_policy, for_reference = ctx.needs_input_grad[:2]
    if any(grad is not None for grad in upstream):
        saved = ctx.saved_tensors
        arguments = (*upstream, *saved, *ctx.constants)
        if ctx.inplace:
            _checks.no_create_graph("sequential_kl")
            operators.sequential_kl_backward_(*arguments)
            policy_grad = saved[0].detach()
        else:
            both = operators.sequential_kl_backward(*arguments, for_policy, for_reference)
            policy_grad = both[0] if for_policy else None
            reference_grad = both[1] if for_reference else None
    return policy_grad, reference_grad, *(None,) * 8


_library.register_operator(
    "sequential_kl",
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    backward=_backward,
    written=5,
)
