"""Which tokens a decode step reads: ALISA and six others, as numbers for the same operators."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Policy:
    """How many of the latest tokens a step reads, and how many of the others by their scores.

    Make one with `alisa`, `h2o`, `streaming_llm`, `tova`, `local_window`, `strided` or `dense`.
    n is the number of tokens with the current one. An amount that is an int is that number of
    tokens; a float is that share of n, rounded half up, at least 1 unless it is 0.

    Attributes:
        local: the latest tokens, the current one among them. None: the policy is dense.
        top: the tokens of greatest score among the rest.
        sinks: the first tokens, read always; they are taken off top.
        window: rows of weights, of the steps before the current one, in a score. None: as many as
            top. 0: all.
        reselect_every: steps that share one selection; what is appended between is read too.
        permanent: a token that was not selected once never returns.
        stride: if not 0, position % stride == 0 takes the place of the score.
        revival: steps after which a token that was not selected never returns, if the window is
            shorter.
    """

    local: int | float | None
    top: int | float = 0
    sinks: int = 0
    window: int | None = 1
    reselect_every: int = 1
    permanent: bool = True
    stride: int = 0
    revival: int = 1

    @property
    def is_dense(self) -> bool:
        return self.local is None

    def amounts(self, tokens: Tensor | int) -> tuple[Tensor | int, Tensor | int]:
        """local and top for so many tokens: an int, or (B,) int32 for as many sequences."""
        local = _least(_most(_amount(self.local, tokens), 1), tokens)
        if self.stride:
            return local, (tokens - local + self.stride - 1) // self.stride
        top = _most(_amount(self.top, tokens) - self.sinks, 0)
        return local, _least(top, tokens - local)

    def rows(self, tokens: Tensor | int) -> Tensor | int:
        """Rows in the score of a step with so many tokens; 0 where all rows are."""
        if self.window is None:
            return _most(_amount(self.top, tokens), 1)
        return _amount(self.window, tokens)

    def horizon(self, tokens: Tensor | int) -> Tensor | int:
        """Steps without selection after which a token is dropped."""
        if self.permanent:
            return _amount(1, tokens)
        return _most(self.rows(tokens), self.revival)


def _amount(amount: int | float, tokens: Tensor | int) -> Tensor | int:
    whole = isinstance(amount, int)
    least = 1 if amount else 0
    if isinstance(tokens, int):
        return amount if whole else max(least, math.floor(tokens * amount + 0.5))
    if whole:
        return torch.full_like(tokens, amount)
    return (tokens.double() * amount + 0.5).floor().clamp(min=least).to(tokens.dtype)


def _most(x: Tensor | int, bound: int) -> Tensor | int:
    return max(x, bound) if isinstance(x, int) else x.clamp(min=bound)


def _least(x: Tensor | int, bound: Tensor | int) -> Tensor | int:
    return min(x, bound) if isinstance(x, int) else x.minimum(bound)


def alisa(
    ratio: float | None = None,
    *,
    budget: int | None = None,
    window: int | None = 64,
    sinks: int = 0,
    local_fraction: float = 0.5,
    reselect_every: int = 1,
) -> Policy:
    r"""Sparse window attention: the latest tokens, and those the last steps attended to most.

    Equivalent to, for token n - 1 and AW the (n, n) weights so far, summed over heads::

        k = max(1, floor(n * ratio / 2 + 0.5))
        score = AW[n - 1 - window : n - 1, : n - k].sum(0)
        kept = score.sort(descending=True, stable=True).indices[:k].tolist() + list(range(n - k, n))

    .. math::
        k = \max(1, \lfloor n r / 2 + 1/2 \rfloor), \quad
        S_j = \sum_{i=n-1-W}^{n-2} A_{ij}, \quad
        I = \{n-k, \dots, n-1\} \cup \operatorname{top}_k \{S_j : j < n - k\}

    Args:
        ratio: share of the tokens that a step reads, in (0, 1]; or
        budget: that many tokens, at least 1, whatever n is.
        window: steps W whose weights are summed. None: k, as in the paper, which grows with n.
        sinks: first tokens that are always read; they count towards ratio or budget.
        local_fraction: part of ratio or budget that goes to the latest tokens, in [0, 1]. The
            paper's is 0.5.
        reselect_every: steps that share a selection; the paper's is 1.

    Returns:
        Policy. A token is dropped when it was not selected in the last max(window, 1 / (1 - ratio))
        steps: its score is 0 then.

    Raises:
        TypeError, ValueError: an argument of a wrong type or value.

    >>> policy = alisa(0.4)
    >>> policy.amounts(torch.tensor([10, 11, 13], dtype=torch.int32))
    (tensor([2, 2, 3], dtype=torch.int32), tensor([2, 2, 3], dtype=torch.int32))

    Source: arXiv 2403.17312, section IV.B, Algorithm 1; docs/algorithms/alisa.md has the choices
    that the paper leaves open.
    """
    if (ratio is None) == (budget is None):
        raise ValueError(f"alisa: give ratio or budget, got {ratio} and {budget}")
    _share("alisa", "local_fraction", local_fraction, least=0.0)
    _whole("alisa", "sinks", sinks, least=0)
    _whole("alisa", "reselect_every", reselect_every, least=1)
    if window is not None:
        _whole("alisa", "window", window, least=1)
    if budget is not None:
        _whole("alisa", "budget", budget, least=1)
        local = max(1, math.floor(budget * local_fraction + 0.5))
        top, revival = budget - local, 2
    else:
        _share("alisa", "ratio", ratio)
        local, top = float(ratio * local_fraction), float(ratio * (1 - local_fraction))
        revival = 2 if ratio == 1 else max(2, math.ceil(1 / (1 - ratio)))
    return Policy(
        local=local,
        top=top,
        sinks=sinks,
        window=window,
        reselect_every=reselect_every,
        permanent=False,
        revival=revival,
    )


def h2o(heavy: int, recent: int) -> Policy:
    """H2O (arXiv 2306.14048): the recent tokens, and those with the greatest sums of all weights.

    A step reads the current token too, as in FMInference/H2O:h2o_hf/utils_real_drop, whose lists
    are one per KV head: shared=False.

    >>> h2o(6, 10).amounts(torch.tensor([40], dtype=torch.int32))
    (tensor([11], dtype=torch.int32), tensor([6], dtype=torch.int32))
    """
    _whole("h2o", "heavy", heavy, least=0)
    _whole("h2o", "recent", recent, least=0)
    return Policy(local=recent + 1, top=heavy, window=0)


def streaming_llm(start: int, recent: int) -> Policy:
    """StreamingLLM (arXiv 2309.17453): the first and the recent tokens, at their own positions.

    A step reads the current token too. mit-han-lab/streaming-llm renumbers positions within the
    cache; here keys keep their rotation.

    >>> streaming_llm(4, 12).amounts(torch.tensor([40], dtype=torch.int32))
    (tensor([13], dtype=torch.int32), tensor([0], dtype=torch.int32))
    """
    _whole("streaming_llm", "start", start, least=0)
    _whole("streaming_llm", "recent", recent, least=0)
    return Policy(local=recent + 1, sinks=start)


def tova(size: int) -> Policy:
    """TOVA (arXiv 2401.06104): drops the token to which the last query gave the least weight.

    A step reads the current token too, as in schwartz-lab-NLP/TOVA, whose list is one for all
    heads: shared=True.

    >>> tova(16).amounts(torch.tensor([40], dtype=torch.int32))
    (tensor([1], dtype=torch.int32), tensor([16], dtype=torch.int32))
    """
    _whole("tova", "size", size, least=1)
    return Policy(local=1, top=size)


def local_window(ratio: float | None = None, *, budget: int | None = None) -> Policy:
    """The latest tokens alone: a share of all, or a fixed number.

    >>> local_window(0.2).amounts(torch.tensor([40], dtype=torch.int32))
    (tensor([8], dtype=torch.int32), tensor([0], dtype=torch.int32))
    """
    if (ratio is None) == (budget is None):
        raise ValueError(f"local_window: give ratio or budget, got {ratio} and {budget}")
    if budget is not None:
        _whole("local_window", "budget", budget, least=1)
        return Policy(local=budget)
    _share("local_window", "ratio", ratio)
    return Policy(local=float(ratio))


def strided(ratio: float) -> Policy:
    """Half of a share as the latest tokens, half as each s-th of the rest, s = 2 / ratio - 1.

    The columns are fixed (position % s == 0), as in the fixed pattern of Sparse Transformer (arXiv
    1904.10509): those that move with the query would need every token kept.

    >>> strided(0.2).amounts(torch.tensor([40], dtype=torch.int32))
    (tensor([4], dtype=torch.int32), tensor([4], dtype=torch.int32))
    """
    _share("strided", "ratio", ratio)
    return Policy(local=ratio / 2, stride=math.floor(2 / ratio - 0.5))


def dense() -> Policy:
    """Every token.

    >>> dense().is_dense
    True
    """
    return Policy(local=None)


def _share(name: str, argument: str, value: float, *, least: float | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: {argument} must be a number, got {value!r}")
    if not (0 < value <= 1 or value == least):
        rule = "(0, 1]" if least is None else "[0, 1]"
        raise ValueError(f"{name}: {argument} must lie in {rule}, got {value}")


def _whole(name: str, argument: str, value: int, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: {argument} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: {argument} must be at least {least}, got {value}")
