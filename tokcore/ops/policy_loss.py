"""The policy losses of the group-relative methods: one operator for all of them."""

import math

import torch
from torch import Tensor

from tokcore import _checks, _library
from tokcore.ops.policy_loss_rules import (
    CispoBand,
    CispoCap,
    Clip,
    Dppo,
    Gmpo,
    PolicyLoss,
    Sapo,
    Vespo,
    numbers_of,
)

# In the order in which the operator returns them.
METRICS = (
    "tokens",
    "kl",
    "entropy",
    "clip_low",
    "clip_high",
    "ratio",
    "importance_ratio",
    "focused",
    "off_policy",
    "phi",
)


def policy_loss(
    logprob: Tensor,
    advantages: Tensor,
    rules: PolicyLoss,
    *,
    old_logprob: Tensor | None = None,
    reference_logprob: Tensor | None = None,
    sampler_logprob: Tensor | None = None,
    importance_ratio: Tensor | None = None,
    entropy: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    entropy_threshold: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Loss and metrics of a batch of completions, from their per-token log-probabilities.

    Equivalent, for the rules of plain GRPO, to::

        ratio = (logprob - old_logprob).exp()
        token = -torch.min(ratio * A, ratio.clamp(1 - low, 1 + high) * A)
        loss = ((token * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()

    and in general to

    .. math::
        L = \sum_t W_t \Big( w_t\, \ell(c_t, A_t) + \beta\, k_t \Big) - \eta \bar H

    with the surrogate :math:`\ell` of the ratio :math:`c`, the ratio to the sampler (and the
    entropy and off-policy masks) :math:`w`, the KL estimate :math:`k` and the weights :math:`W` of
    the aggregation. All of it is computed in float64, the gradient with the loss, in one pass over
    the tokens; the vocabulary is not seen (tokcore.ops.token_logprob comes before).

    Args:
        logprob: (B, T), or (total,) packed with ``cu_seqlens``; float32, float64, float16 or
            bfloat16 (the last two are taken as float32). Differentiable.
        advantages: (B,), or one for each token. All tensors of tokens have the shape and the dtype
            of ``logprob``.
        rules: a PolicyLoss.
        old_logprob: log-probabilities when the tokens were sampled. Default: logprob itself,
            without gradient, so that every ratio is 1.
        reference_logprob: of the reference model, for the KL term.
        sampler_logprob: of the engine that sampled, for ``rules.sampler`` and the off-policy mask.
        importance_ratio: the ratio old / sampler where it is known already, (B,) or of each token.
        entropy: of each token, for the entropy bonus (differentiable), the entropy mask, the
            metric.
        mask: bool, True = the token counts (completion and tool mask in one). What stands at other
            positions has no effect, NaN and infinities included. Default: all tokens count.
        cu_seqlens: (B + 1,) int64 or int32, running ends of packed rows, from 0.
        entropy_threshold: (): tokens below it are out of the focus. Default: the entropy above
            which the fraction ``rules.top_entropy`` of the tokens at hand lies.
        normalizer: the denominator of the loss, in place of the one counted here: the tokens (or
            sequences) of the whole batch over the number of ranks (TRL: num_items_in_batch / P).
            Positive; a tensor of 0, a batch without tokens, is taken as 1.

    Returns:
        loss: () in float32 (float64 for float64).
        metrics: detached scalars: tokens; kl, entropy, clip_low, clip_high, ratio,
            importance_ratio, focused, off_policy (means over the tokens; over rows where the ratio
            is a row's); phi (mean over rows of VESPO's weights). focused and off_policy are the
            shares of tokens that the entropy mask keeps and the off-policy mask drops.

    Raises:
        TypeError, ValueError: an argument of a wrong dtype, shape or device, or one that the rules
            need and do not get.
        RuntimeError: on the CPU, cu_seqlens that fall or do not end with the tokens. On CUDA the
            loss is NaN then.

    Differentiable in ``logprob`` and ``entropy``, once.

    >>> from tokcore.ops.policy_loss_rules import Reinforce
    >>> logprob = torch.tensor([[-1.0, -2.0], [-1.5, float("nan")]])
    >>> mask = torch.tensor([[True, True], [True, False]])
    >>> advantages = torch.tensor([1.0, -1.0])
    >>> loss, metrics = policy_loss(logprob, advantages, PolicyLoss(Reinforce()), mask=mask)
    >>> loss, metrics["tokens"]
    (tensor(0.), tensor(3.))

    Source: docs/algorithms/grpo.md names the method, paper and code of each rule.
    """
    op = "policy_loss"
    _checks.tensor(op, "logprob", logprob)
    _checks.floating(op, "logprob", logprob)
    _checks.no_functional_derivative(op, "logprob", logprob)
    if not isinstance(rules, PolicyLoss):
        raise TypeError(f"{op}: rules must be a PolicyLoss, got {type(rules).__name__}")
    half = logprob.dtype in (torch.float16, torch.bfloat16)
    logprob = logprob.float() if half else logprob
    tokens = {
        "old_logprob": old_logprob,
        "reference_logprob": reference_logprob,
        "sampler_logprob": sampler_logprob,
    }
    tokens = {name: _constant_tokens(op, name, t, logprob) for name, t in tokens.items()}
    rows = _rows(op, logprob, cu_seqlens)
    advantages, by_row = _rows_or_tokens(op, "advantages", advantages, logprob, rows)
    if importance_ratio is not None:
        importance_ratio, ratio_by_row = _rows_or_tokens(
            op, "importance_ratio", importance_ratio, logprob, rows
        )
    if mask is not None:
        _checks.mask(op, mask, logprob.unsqueeze(-1))
    if entropy is not None:
        entropy = _tokens(op, "entropy", entropy, logprob)
        _checks.no_functional_derivative(op, "entropy", entropy)
    _check_needs(op, rules, tokens, by_row, importance_ratio, entropy)
    importance = 0
    if importance_ratio is not None:
        importance = 2 if ratio_by_row else 1
    elif rules.sampler is not None:
        importance = 4 if rules.sampler.level == "sequence" else 3
    if entropy_threshold is None and rules.top_entropy < 1:
        entropy_threshold = top_entropy_threshold(entropy, rules.top_entropy, mask)
    loss, metrics, *_ = _library.native().policy_loss(
        logprob,
        advantages,
        *tokens.values(),
        importance_ratio,
        entropy,
        mask,
        None if cu_seqlens is None else cu_seqlens.long(),
        _scalar(op, "entropy_threshold", entropy_threshold, logprob),
        _scalar(op, "normalizer", normalizer, logprob),
        *numbers_of(rules, importance, by_row),
        _differentiated(logprob),
        entropy is not None and rules.entropy_coefficient != 0 and _differentiated(entropy),
    )
    return loss, dict(zip(METRICS, metrics.detach().unbind(), strict=True))


def top_entropy_threshold(entropy: Tensor, fraction: float, mask: Tensor | None = None) -> Tensor:
    """Entropy above or at which ``fraction`` of the kept tokens lie, () float64.

    Equivalent to ``torch.quantile(entropy[mask], 1 - fraction)``, linear interpolation included,
    for any number of tokens (torch.quantile stops at 2^24). Over several ranks gather the entropies
    first.

    >>> top_entropy_threshold(torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]), 0.5)
    tensor(2., dtype=torch.float64)
    """
    values = entropy.detach().flatten()
    kept = torch.ones_like(values, dtype=torch.bool) if mask is None else mask.flatten()
    # What is masked sorts to the end, so that no size depends on the data.
    ordered = torch.where(kept, values, torch.inf).sort().values.double()
    if len(ordered) == 0:
        return ordered.new_full((), -torch.inf)
    last = (kept.sum() - 1).clamp(min=0)
    position = (1 - fraction) * last.double()
    low = position.floor().long()
    # Gathered, not indexed: the host need not know the places.
    below, above = ordered.gather(0, torch.stack([low, torch.minimum(low + 1, last)])).unbind()
    return torch.where(above > below, below + (above - below) * (position - low), below)


def _differentiated(value: Tensor) -> bool:
    return torch.is_grad_enabled() and value.requires_grad


def _rows(op: str, logprob: Tensor, cu_seqlens: Tensor | None) -> int:
    if cu_seqlens is None:
        if logprob.dim() != 2:
            raise ValueError(
                f"{op}: logprob must have shape (B, T), or (total,) with cu_seqlens, got "
                f"{tuple(logprob.shape)}"
            )
        return logprob.shape[0]
    _checks.tensor(op, "cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if logprob.dim() != 1 or cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
        raise ValueError(
            f"{op}: packed rows need logprob (total,) and cu_seqlens (B + 1,), got "
            f"{tuple(logprob.shape)} and {tuple(cu_seqlens.shape)}"
        )
    return len(cu_seqlens) - 1


def _tokens(op: str, name: str, value: Tensor, logprob: Tensor) -> Tensor:
    _checks.tensor(op, name, value)
    _checks.floating(op, name, value)
    if value.device != logprob.device or value.shape != logprob.shape:
        raise ValueError(
            f"{op}: {name} must have the shape of logprob, {tuple(logprob.shape)}, on "
            f"{logprob.device} (nothing is broadcast), got {tuple(value.shape)} on {value.device}"
        )
    return _as_logprob(op, name, value, logprob)


def _constant_tokens(op: str, name: str, value: Tensor | None, logprob: Tensor) -> Tensor | None:
    if value is None:
        return None
    value = _tokens(op, name, value, logprob)
    _checks.constant(op, name, value)
    return value


def _as_logprob(op: str, name: str, value: Tensor, logprob: Tensor) -> Tensor:
    """Halves widen; nothing narrows."""
    if value.dtype in (torch.float16, torch.bfloat16) or logprob.dtype == torch.float64:
        value = value.to(logprob.dtype)
    if value.dtype != logprob.dtype:
        raise TypeError(
            f"{op}: {name} must have the dtype of logprob, {logprob.dtype}, or a narrower one, got "
            f"{value.dtype}"
        )
    return value


def _rows_or_tokens(op, name, value, logprob, rows: int) -> tuple[Tensor, bool]:
    _checks.tensor(op, name, value)
    _checks.floating(op, name, value)
    _checks.constant(op, name, value)
    by_row = value.shape == (rows,)
    if not (by_row or value.shape == logprob.shape) or value.device != logprob.device:
        raise ValueError(
            f"{op}: {name} must have shape ({rows},), or that of logprob, {tuple(logprob.shape)}, "
            f"on {logprob.device} (nothing is broadcast), got {tuple(value.shape)} on "
            f"{value.device}"
        )
    return _as_logprob(op, name, value, logprob), by_row


def _scalar(op: str, name: str, value, logprob: Tensor) -> Tensor | None:
    if value is None:
        return None
    if not isinstance(value, Tensor):
        _checks.number(op, name, value, least=1e-300 if name == "normalizer" else -1e300)
        return torch.full((), float(value), dtype=torch.float64, device=logprob.device)
    if value.dim() != 0 or value.device != logprob.device:
        raise ValueError(
            f"{op}: {name} must be a scalar on {logprob.device}, got {tuple(value.shape)} on "
            f"{value.device}"
        )
    return value.detach().double()


def _check_needs(op, rules, tokens, by_row, importance_ratio, entropy) -> None:
    needed = {
        "reference_logprob": rules.kl is not None,
        "old_logprob": isinstance(rules.surrogate, Dppo),
        "sampler_logprob": rules.sampler is not None and importance_ratio is None,
    }
    for name, is_needed in needed.items():
        if is_needed and tokens[name] is None:
            raise ValueError(f"{op}: {name} is needed by {rules}, got None")
    if rules.off_policy_threshold < math.inf and all(
        tokens[name] is None for name in ("old_logprob", "sampler_logprob")
    ):
        raise ValueError(
            f"{op}: off_policy_threshold needs old_logprob or sampler_logprob, got neither"
        )
    if rules.needs_entropy and entropy is None:
        raise ValueError(
            f"{op}: entropy is needed by entropy_coefficient and top_entropy, got None"
        )
    if importance_ratio is not None and rules.sampler is not None:
        raise ValueError(
            f"{op}: importance_ratio is taken as it is and excludes rules.sampler, got both"
        )
    if not by_row and isinstance(rules.surrogate, Gmpo | Vespo):
        raise ValueError(
            f"{op}: advantages must be one a row for {type(rules.surrogate).__name__}, got one a "
            "token"
        )


# --- the definition in plain torch ------------------------------------------------------------


def _reference(
    logprob: Tensor,
    advantages: Tensor,
    rules: PolicyLoss,
    *,
    old_logprob: Tensor | None = None,
    reference_logprob: Tensor | None = None,
    sampler_logprob: Tensor | None = None,
    importance_ratio: Tensor | None = None,
    entropy: Tensor | None = None,
    mask: Tensor | None = None,
    normalizer: float | None = None,
) -> Tensor:
    """The loss of padded rows (B, T): differentiable, and a truth in float64."""
    mask = torch.ones_like(logprob, dtype=torch.bool) if mask is None else mask
    selected = [
        None if value is None else torch.where(mask, value, 0)
        for value in (logprob, old_logprob, reference_logprob, sampler_logprob, entropy)
    ]
    logprob, old, reference, sampler, entropy = selected
    old = logprob.detach() if old is None else old
    n = mask.sum(-1, keepdim=True)
    n1 = n.clamp(min=1)
    advantages = advantages if advantages.dim() == 2 else advantages.unsqueeze(-1)
    importance = _reference_importance(rules, importance_ratio, old, sampler, mask)
    ratio = _reference_ratio(rules, logprob, old, advantages, n1)
    loss = _reference_surrogate(rules, logprob, old, ratio, advantages, importance, mask)
    behaviour = old if sampler is None else sampler
    drift = ((behaviour - logprob).sum(-1, keepdim=True) / n1).detach()
    dropped = (drift > rules.off_policy_threshold) & (advantages < 0)
    focus = mask
    if rules.top_entropy < 1:
        focus = mask & (entropy >= top_entropy_threshold(entropy, rules.top_entropy, mask))
    kept = focus & ~dropped
    loss = torch.where(kept, loss, 0)
    if importance is not None and not isinstance(rules.surrogate, Vespo):
        loss = torch.where(kept, loss * importance, 0)
    if rules.kl is not None:
        loss = loss + rules.kl.coefficient * _reference_kl(rules.kl, reference - logprob, ratio)
    total = torch.where(mask, loss, 0).sum(-1, keepdim=True)
    rows = max(len(n) if rules.count_empty else int((n > 0).sum()), 1)
    if rules.aggregation == "seq-mean-token-mean":
        total = total / n1
    over = {
        "token-mean": n.sum().clamp(min=1),
        "token-sum": 1,
        "seq-mean-token-sum-norm": rows * (rules.length or 1),
    }.get(rules.aggregation, rows)
    over = over * rules.accumulation_steps if normalizer is None else normalizer
    loss = total.sum() / over
    if rules.entropy_coefficient:
        by_tokens = normalizer is not None and rules.aggregation == "token-mean"
        count = normalizer if by_tokens else focus.sum().clamp(min=1) * rules.accumulation_steps
        loss = loss - rules.entropy_coefficient * torch.where(focus, entropy, 0).sum() / count
    return loss


def _reference_importance(rules, given, old, sampler, mask) -> Tensor | None:
    if given is not None:
        return given if given.dim() == 2 else given.unsqueeze(-1)
    if rules.sampler is None:
        return None
    log = torch.where(mask, old - sampler, 0)
    raw = (log if rules.sampler.level == "token" else log.sum(-1, keepdim=True)).exp()
    bounded = raw.clamp(rules.sampler.least, rules.sampler.most)
    return bounded if rules.sampler.bound == "truncate" else torch.where(bounded == raw, raw, 0)


def _reference_ratio(rules, logprob, old, advantages, n1) -> Tensor:
    r = logprob - old
    limit = rules.log_ratio_limit
    if isinstance(rules.surrogate, Gmpo):
        clipped = r.clamp(-rules.surrogate.low, rules.surrogate.high)
        r = torch.where(advantages > 0, torch.minimum(r, clipped), torch.maximum(r, clipped))
    if rules.level == "token":
        return r.clamp(-limit, limit).exp()
    total = r.sum(-1, keepdim=True)
    log = (total if rules.level == "sequence_sum" else total / n1).clamp(-limit, limit)
    if rules.level == "sequence_token":
        moving = (log == (total / n1)).to(log.dtype)
        return (log.detach() + moving * (logprob - logprob.detach())).exp()
    return log.exp()


def _reference_surrogate(rules, logprob, old, ratio, advantages, importance, mask) -> Tensor:
    s = rules.surrogate
    if isinstance(s, Clip):
        first = ratio.clamp(max=s.delta) * advantages
        loss = -torch.minimum(first, ratio.clamp(1 - s.low, 1 + s.high) * advantages)
        dual = torch.minimum(loss, -s.dual * advantages) if s.dual < math.inf else loss
        return torch.where(advantages < 0, dual, loss)
    if isinstance(s, CispoCap | CispoBand):
        low, high = (0, s.cap) if isinstance(s, CispoCap) else (1 - s.low, 1 + s.high)
        return -ratio.detach().clamp(low, high) * advantages * logprob
    if isinstance(s, Sapo):
        # Python numbers alone would make a float32 tensor.
        positive = torch.full_like(advantages, s.positive)
        temperature = torch.where(advantages > 0, positive, s.negative)
        return -4 / temperature * torch.sigmoid(temperature * (ratio - 1)) * advantages
    if isinstance(s, Vespo):
        log = torch.where(mask, logprob - old, 0).detach().clamp(-20, 20).sum(-1, keepdim=True)
        least = math.log(1e-8)
        if importance is not None:
            of_sampler = importance.log().clamp(least, 20)
            by_token = of_sampler.shape == mask.shape
            log = log + (torch.where(mask, of_sampler, 0) if by_token else of_sampler).sum(-1, True)
        log = log.clamp(least, 20)
        one = torch.ones_like(advantages)
        k = torch.where(advantages >= 0, s.k_positive * one, s.k_negative)
        scale = torch.where(advantages >= 0, s.lambda_positive * one, s.lambda_negative)
        scale = scale.clamp(min=1e-4)
        return -(scale + k * log - scale * log.exp()).exp() * advantages * logprob
    if isinstance(s, Gmpo):
        return -ratio * advantages * torch.ones_like(logprob)
    if isinstance(s, Dppo):
        moved = logprob.detach().exp() - old.exp()
        keep = torch.where(advantages > 0, moved <= s.high, moved >= -s.low)
        return torch.where(keep, -advantages * ratio, 0) + s.penalty * (logprob - old) ** 2
    return -advantages * logprob


def _reference_kl(kl, d: Tensor, ratio: Tensor) -> Tensor:
    d = d.clamp(-kl.log_limit, kl.log_limit)
    estimate = {
        "k1": lambda: -d,
        "k2": lambda: d * d / 2,
        "k3": lambda: d.expm1() - d,
        "abs": d.abs,
    }[kl.estimator]().clamp(-kl.limit, kl.limit)
    return estimate * ratio if kl.corrected else estimate


# --- registration -----------------------------------------------------------------------------


def _fake(logprob, *rest):
    *_, logprob_needs_grad, entropy_needs_grad = rest
    return (
        logprob.new_empty(()),
        logprob.new_empty((len(METRICS),)),
        logprob.new_empty(logprob.shape if logprob_needs_grad else (0,)),
        logprob.new_empty(logprob.shape if entropy_needs_grad else (0,)),
        logprob.new_empty((2,), dtype=torch.float64),
    )


def _fake_backward(grad_loss, logprob, logprob_gradient, entropy_gradient, scales):
    return (
        logprob_gradient.new_empty(logprob_gradient.shape),
        entropy_gradient.new_empty(entropy_gradient.shape),
    )


def _setup_context(ctx, inputs, output):
    _, metrics, *gradients = output
    ctx.arguments, ctx.needs = len(inputs), inputs[-2:]
    ctx.save_for_backward(inputs[0], *gradients)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(metrics, *gradients)


def _backward(operators, ctx, grad_loss, *rest):
    grads = [None] * ctx.arguments
    if grad_loss is not None:
        found = operators.policy_loss_backward(grad_loss, *ctx.saved_tensors)
        for argument, needed, grad in zip((0, 6), ctx.needs, found, strict=True):
            grads[argument] = grad if needed and ctx.needs_input_grad[argument] else None
    return tuple(grads)


_library.register_operator(
    "policy_loss",
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    backward=_backward,
    over_rows=False,
)
