"""The truth in float64, plain torch at the same dtype, and how far an operator may be from them.

|operator - truth| <= |plain torch - truth| + bound, element by element. The bounds follow the
rounding of the formulas: u is the unit roundoff of the accumulation, and each quantity is allowed
SLACK times the u of what enters it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor

from tokcore.ops import sequential_kl, token_logprob

SLACK = 8
# float64 is no truth for float64: it gets a few more of its own roundoffs
ROUNDOFF = {torch.float32: 2**-24, torch.float64: 8 * 2**-53}
# Of a stored gradient: half a unit in the last place; and what may be 0 instead, which is half the
# smallest subnormal, or a probability that the vectorised exponential flushes.
FLUSHED = 2**-116
HALF_ULP = {
    torch.float32: (2**-24, FLUSHED),
    torch.float64: (2**-53, FLUSHED),
    torch.bfloat16: (2**-9, FLUSHED),
    torch.float16: (2**-12, 2**-25),
}


@dataclass(frozen=True)
class Operator:
    """One calling convention for all: every output that can be had, as a tuple."""

    name: str
    logits: int
    call: Callable
    reference: Callable
    values: int  # outputs
    several: bool  # takes K targets a row
    softcap: bool

    def __str__(self) -> str:
        return self.name


def _all_logprob(function):
    def call(logits, target, **options):
        return function(logits[0], target, return_entropy=True, **options)

    return call


def _all_kl(function):
    def call(logits, target, **options):
        return function(*logits, target, direction="both", return_entropy=True, **options)

    return call


def reference_of(name: str) -> Callable:
    return import_module(f"tokcore.ops.{name}")._reference


TOKEN_LOGPROB = Operator(
    "token_logprob",
    1,
    _all_logprob(token_logprob),
    _all_logprob(reference_of("token_logprob")),
    2,
    True,
    True,
)
SEQUENTIAL_KL = Operator(
    "sequential_kl",
    2,
    _all_kl(sequential_kl),
    _all_kl(reference_of("sequential_kl")),
    5,
    False,
    False,
)
OPERATORS = [TOKEN_LOGPROB, SEQUENTIAL_KL]


def draw(kind: str, *shape: int, seed: int = 0) -> Tensor:
    """Logits in float64. Flat ones prove little: every probability is near 0."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "peaked":  # a few outliers a row hold nearly all of the mass
        return torch.where(torch.rand(shape, generator=generator) < 0.03, 20 * x, x)
    return {"normal": x, "wide": 8 * x, "offset": x + 1000, "below": x - 1000}[kind]


def draw_target(rows: tuple[int, ...], size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    target = torch.randint(size, rows, generator=generator)
    return torch.where(torch.rand(rows, generator=generator) < 0.2, -100, target)


def leaves(logits: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    return [x.detach().to(dtype or x.dtype).requires_grad_() for x in logits]


def upstream_of(outputs, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed + 2)
    return [
        torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device)
        for out in outputs
    ]


def gradients(outputs, inputs, upstream) -> tuple[Tensor, ...]:
    upstream = [g.to(out.dtype) for g, out in zip(upstream, outputs, strict=True)]
    return torch.autograd.grad(list(outputs), inputs, upstream, materialize_grads=True)


def assert_no_worse(operator: Operator, logits: list[Tensor], target: Tensor, **options) -> None:
    """Values and gradients of ``operator`` on ``logits`` against truth and plain torch."""
    exact = leaves([x.cpu() for x in logits], torch.float64)
    on_host = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in options.items()}
    truth = operator.reference(exact, target.cpu(), **on_host)
    upstream = upstream_of(truth)
    truth_grads = gradients(truth, exact, upstream)
    plain_in = leaves([x.cpu() for x in logits])
    plain = operator.reference(plain_in, target.cpu(), **on_host)
    plain_grads = gradients(plain, plain_in, upstream)
    inputs = leaves(logits)
    values = operator.call(inputs, target, **options)
    grads = gradients(values, inputs, [g.to(target.device) for g in upstream])
    bounds = Bounds(exact, target.cpu(), logits[0].dtype, **on_host)
    for i, names in enumerate(zip(values, plain, truth, bounds.values(operator), strict=True)):
        _assert_within(f"{operator} output {i}", *names)
    for i, (got, was, true) in enumerate(zip(grads, plain_grads, truth_grads, strict=True)):
        assert got.dtype == logits[0].dtype
        _assert_within(
            f"{operator} gradient {i}", got, was, true, bounds.gradient(operator, i, upstream, true)
        )


def _assert_within(name: str, got: Tensor, plain: Tensor, truth: Tensor, bound: Tensor) -> None:
    got, plain = got.detach().cpu().double(), plain.detach().double()
    truth = truth.detach()
    assert got.shape == truth.shape, name
    same = (got == truth) | (got.isnan() & truth.isnan())  # infinities and NaN included
    excess = (got - truth).abs() - ((plain - truth).abs().nan_to_num(0.0, 0.0) + bound)
    wrong = ~same & ~(excess <= 0)
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} elements off; at {at}: got "
            f"{got[at]:.9g}, truth {truth[at]:.9g}, plain {plain[at]:.9g}, bound {bound[at]:.3g}"
        )


class Bounds:
    """Rounding bounds of every output and gradient, in float64, elementwise."""

    def __init__(
        self, logits, target, dtype, *, temperature=1.0, softcap=None, ignore_index=-100, mask=None
    ):
        self.dtype = dtype
        self.u = SLACK * ROUNDOFF[torch.float64 if dtype == torch.float64 else torch.float32]
        several = target.dim() == logits[0].dim()
        self.target = target if several else target.unsqueeze(-1)
        self.one_target = not several
        self.wanted = self.target != ignore_index
        keep = self.wanted.any(-1) if mask is None else self.wanted.any(-1) & mask
        t = temperature.double().unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
        self.scale = 1 / t
        self.softcap = softcap
        self.keep = keep.unsqueeze(-1)
        self.sides = [self._side(x.detach()) for x in logits]

    def _side(self, x: Tensor):
        x = torch.where(self.keep, x, 0)
        capped = x if self.softcap is None else self.softcap * torch.tanh(x / self.softcap)
        logp = (capped * self.scale).log_softmax(-1)
        top = logp.max(-1, keepdim=True).values
        # z_j - max z and the log of the sum are rounded once or twice each; a softcap rounds
        # before the maximum is taken off
        size = torch.where(logp == -torch.inf, 0, top - logp) - top + 1
        if self.softcap is not None:
            size = size + capped.abs() * self.scale
        return logp, logp.exp(), size  # relative error of p, absolute error of log p: u * size

    def values(self, operator: Operator) -> list[Tensor]:
        logp, p, size = self.sides[0]
        entropy = self.u * (1 + (p * size * (1 + size)).sum(-1))
        at = torch.where(self.wanted, self.target, 0).long()
        logprobs = [self.u * side[2].gather(-1, at) for side in self.sides]
        logprobs = [x.squeeze(-1) if self.one_target else x for x in logprobs]
        if operator is TOKEN_LOGPROB:
            return [logprobs[0], entropy]
        kl = [self.u * (1 + (w * (size + self.sides[1][2])).sum(-1)) for w in self._weights()]
        return [kl[0], logprobs[0], logprobs[1], entropy, kl[1]]

    def _weights(self):
        return self.sides[1][1], self.sides[0][1]

    def gradient(self, operator: Operator, side: int, upstream: list[Tensor], truth: Tensor):
        """Of the logits ``side``: the terms of the formula, each with the error of its factors."""
        logp, p, size = self.sides[side]
        column = [g.unsqueeze(-1).abs() for g in upstream]
        finite = torch.where(logp == -torch.inf, 0, logp).abs()
        entropy = (p * finite).sum(-1, keepdim=True)
        if operator is TOKEN_LOGPROB:
            of_target = column[0] if self.one_target else upstream[0].abs()
            terms = p * (of_target.sum(-1, keepdim=True) + column[1] * (finite + entropy + size))
        else:
            of_target = column[1 + side]
            other_logp, other, other_size = self.sides[1 - side]
            gap = (logp - other_logp).abs().nan_to_num(0.0, 0.0, 0.0)
            gap = gap + (p * gap).sum(-1, keepdim=True) + size + other_size
            divergence, crossed = (column[0], column[4]) if side else (column[4], column[0])
            terms = p * (of_target + crossed + divergence * gap)
            terms = terms + crossed * other * (1 + other_size / size)
            if side == 0:
                terms = terms + p * column[3] * (finite + entropy + size)
        of_target = torch.where(self.wanted, of_target, 0).expand(self.target.shape)
        label = torch.zeros_like(p).scatter_add(
            -1, torch.where(self.wanted, self.target, 0).long(), of_target
        )
        relative, absolute = HALF_ULP[self.dtype]
        rounding = self.u * self.scale * (terms * size + label)
        return rounding + 1.01 * relative * truth.abs() + absolute
