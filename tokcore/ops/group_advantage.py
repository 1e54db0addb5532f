"""Advantages relative to a group: each reward against those of the same prompt."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tokcore import _checks, _library

CENTERS = {"mean": 0, "leave_one_out": 1, "length_weighted_mean": 2, "best": 3, "none": 4}
SCALES = {"none": 0, "std": 1, "batch_std": 0, "mean": 2}
SINGLETONS = {"zero": 0, "reward": 1}


class GroupAdvantage(NamedTuple):
    """Advantages (B,), with mean and standard deviation (B,) of the group that each row is of."""

    advantage: Tensor
    mean: Tensor
    std: Tensor


def group_advantage(
    rewards: Tensor,
    group: int | Tensor,
    *,
    center: str = "mean",
    scale: str = "std",
    ddof: int = 1,
    eps: float = 1e-4,
    weights: Sequence[float] | None = None,
    combine: str = "sum_then_normalize",
    lengths: Tensor | None = None,
    singleton: str = "zero",
    infinite: str = "error",
    contiguous: bool = False,
    return_statistics: bool = False,
    compat: str | None = None,
) -> Tensor | GroupAdvantage:
    r"""Advantage of each row: its reward against the rewards of its group.

    Equivalent, for groups of G rows in a row and the defaults (GRPO), to
    ``r = rewards.view(-1, G); (r - r.mean(1, True)) / (r.std(1, keepdim=True) + 1e-4)``,
    but with statistics in float64 over differences from a reward of the group, so that equal
    rewards give exactly 0 and small spreads keep their digits, and for groups of any sizes in any
    order.

    .. math::
        A_i = \frac{r_i - c}{s + \epsilon}

    ====================  =======================================================================
    center                :math:`c`, over the scored rewards of the group
    ====================  =======================================================================
    mean                  :math:`\mu` (GRPO, arXiv 2402.03300; Dr. GRPO, 2503.20783)
    leave_one_out         the mean of the others (RLOO, 2402.14740)
    length_weighted_mean  :math:`\sum n r / \sum n`, n the ``lengths`` (OPO, 2505.23585)
    best                  the second best, for the best alone; all others get 0 (pass@k)
    none                  0
    ====================  =======================================================================

    ==========  =================================================================================
    scale       :math:`s + \epsilon` is
    ==========  =================================================================================
    std         the group's standard deviation about :math:`\mu`, over k - ddof, plus eps
    batch_std   that of all scored rewards together, plus eps
    mean        :math:`\mu`, without eps, and the advantage 0 where :math:`\mu \le 0` (MaxRL,
                2602.02710)
    none        1
    ==========  =================================================================================

    Args:
        rewards: (B,), or (B, F) from F reward functions; float32, float64, float16 or bfloat16. NaN
            is not scored: it counts in no statistic and gets 0. A row of several functions is
            scored where one of them is.
        group: a size G, for groups of G rows in a row, or ids (B,) int64 or int32, in any order.
        center, scale: as above.
        ddof: 1 (the sample's deviation) or 0 (the population's). The deviation of fewer than
            ddof + 1 rewards is 0.
        eps: >= 0, added to a standard deviation.
        weights: F weights of the reward functions. Default: all 1.
        combine: "sum_then_normalize" takes the weighted sum of the rewards of a row, then the
            advantage. "normalize_then_sum" takes the advantages of each function, their weighted
            sum, and that sum's (q - mean) / (std + eps) over the batch (GDPO, arXiv 2601.05242).
        lengths: (B,) numbers of tokens, for center "length_weighted_mean".
        singleton: what a row gets that is alone in its group, or the only one scored: "zero", or
            "reward", the reward itself (verl's GRPO).
        infinite: "error", or "unscored": infinite rewards are taken as NaN.
        contiguous: group ids of one group stand side by side: nothing is sorted, and every run of
            one id is a group. Saves a sort on CUDA.
        return_statistics: also mean and std of the group of each row (of the sums of rewards; not
            with normalize_then_sum).
        compat: "trl" repeats TRL's float32 arithmetic, whose equal rewards give up to 0.0012 and
            not 0 (group must be a size; center "mean"; scale "std", "batch_std" or "none").

    Returns:
        (B,) float32 (float64 for float64 rewards), or GroupAdvantage with ``return_statistics``.

    Raises:
        TypeError, ValueError: an argument of a wrong dtype, shape, device or value; a size that
            does not divide B; contradictory options.
        RuntimeError: on the CPU, infinite rewards, rewards that are all NaN, a group whose lengths
            sum to 0. On CUDA an infinity or such lengths make the group NaN.

    Not differentiable: rewards must not require grad.

    >>> group_advantage(torch.tensor([1.0, 0.0, 2.0, 2.0]), 2, scale="none")
    tensor([ 0.5000, -0.5000,  0.0000,  0.0000])
    >>> ids = torch.tensor([7, 3, 7, 3, 7])
    >>> group_advantage(torch.tensor([1.0, 5, 2, 6, 3]), ids, center="leave_one_out", scale="none")
    tensor([-1.5000, -1.0000,  0.0000,  1.0000,  1.5000])

    Source: the table of trainers in docs/algorithms/grpo.md.
    """
    op = "group_advantage"
    options = _Options(center, scale, ddof, eps, singleton, infinite, contiguous)
    _check(op, rewards, options, combine, lengths, return_statistics)
    rewards = rewards.float() if rewards.dtype in (torch.float16, torch.bfloat16) else rewards
    if infinite == "unscored":
        rewards = torch.where(rewards.isinf(), torch.nan, rewards)
    elif rewards.dim() == 2:
        _refuse_infinities(op, rewards)
    factors = _weights(op, weights, rewards)
    size, ids = _groups(op, group, rewards)
    if compat is not None:
        _checks.choice(op, "compat", compat, {"trl": 0})
        return _as_trl(rewards, size, factors, center, scale, combine)
    order = None
    if ids is not None and not contiguous and not _on_native_cpu(rewards):
        order = torch.sort(ids, stable=True).indices
    grouped = (size, ids, order)
    if combine == "normalize_then_sum":
        return _normalize_then_sum(rewards, factors, grouped, lengths, options)
    several = rewards.dim() == 2
    summed = _weighted_sum(rewards.double(), factors) if several else rewards
    result = _run(summed, grouped, options, lengths, statistics=return_statistics)
    if scale == "batch_std":
        wide = summed.double()
        centered = _run(wide, grouped, options, lengths).advantage
        scaled = centered / (_batch(wide, options, "none", statistics=True).std + eps)
        scaled = torch.where(centered == 0, centered, scaled)
        if singleton == "reward":  # is the reward itself, not scaled
            others = _run(wide, grouped, options._replace(singleton="zero"), lengths).advantage
            scaled = torch.where(centered == others, scaled, centered)
        result = result._replace(advantage=scaled)
    if result.advantage.dtype != rewards.dtype:
        result = GroupAdvantage(*(value.to(rewards.dtype) for value in result))
    return result if return_statistics else result.advantage


class _Options(NamedTuple):
    center: str
    scale: str
    ddof: int
    eps: float
    singleton: str
    infinite: str
    contiguous: bool


def _check(op, rewards, options, combine, lengths, return_statistics) -> None:
    _checks.tensor(op, "rewards", rewards)
    _checks.floating(op, "rewards", rewards)
    _checks.constant(op, "rewards", rewards)
    if rewards.dim() not in (1, 2) or (rewards.dim() == 2 and rewards.shape[1] == 0):
        raise ValueError(
            f"{op}: rewards must have shape (B,) or (B, F), got {tuple(rewards.shape)}"
        )
    _checks.choice(op, "center", options.center, CENTERS)
    _checks.choice(op, "scale", options.scale, SCALES)
    _checks.choice(op, "singleton", options.singleton, SINGLETONS)
    _checks.choice(op, "infinite", options.infinite, {"error": 0, "unscored": 1})
    _checks.choice(op, "combine", combine, {"sum_then_normalize": 0, "normalize_then_sum": 1})
    if options.ddof not in (0, 1):
        raise ValueError(f"{op}: ddof must be 0 or 1, got {options.ddof!r}")
    _checks.number(op, "eps", options.eps, least=0.0)
    if options.center == "none" and options.scale not in ("none", "batch_std"):
        raise ValueError(
            f"{op}: center 'none' goes with scale 'none' or 'batch_std', got {options.scale!r}"
        )
    if (options.center == "length_weighted_mean") != (lengths is not None):
        raise ValueError(
            f"{op}: lengths are for center 'length_weighted_mean' and needed by it, got center "
            f"{options.center!r} and lengths {'given' if lengths is not None else None}"
        )
    if lengths is not None:
        _checks.tensor(op, "lengths", lengths)
        _checks.constant(op, "lengths", lengths)
        if lengths.shape != rewards.shape[:1] or lengths.device != rewards.device:
            raise ValueError(
                f"{op}: lengths must have shape {tuple(rewards.shape[:1])} on {rewards.device}, "
                f"got {tuple(lengths.shape)} on {lengths.device}"
            )
    if combine == "normalize_then_sum" and (return_statistics or options.scale == "batch_std"):
        raise ValueError(
            f"{op}: combine 'normalize_then_sum' normalises over the batch itself and has no "
            "statistics of one reward, got scale "
            f"{options.scale!r}, return_statistics={return_statistics}"
        )


def _weights(op: str, weights, rewards: Tensor) -> Tensor | None:
    if weights is None:
        return None
    factors = torch.as_tensor(weights, dtype=torch.float64, device=rewards.device)
    if rewards.dim() != 2 or factors.shape != rewards.shape[1:]:
        raise ValueError(
            f"{op}: weights must be one for each reward function of rewards (B, F), got "
            f"{tuple(factors.shape)} for rewards {tuple(rewards.shape)}"
        )
    return factors


def _groups(op: str, group, rewards: Tensor) -> tuple[int, Tensor | None]:
    rows = rewards.shape[0]
    if not isinstance(group, Tensor):
        size = _checks.integer(op, "group", group)
        if size < 1 or rows % size:
            raise ValueError(
                f"{op}: group as a size must be positive and divide the {rows} rewards, got {size}"
            )
        return size, None
    _checks.tensor(op, "group", group)
    if group.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: group ids must be int64 or int32, got {group.dtype}")
    if group.shape != (rows,) or group.device != rewards.device:
        raise ValueError(
            f"{op}: group ids must have shape ({rows},) on {rewards.device}, got "
            f"{tuple(group.shape)} on {group.device}"
        )
    return 0, group.long()


def _on_native_cpu(rewards: Tensor) -> bool:
    """Where the operator sorts ids as it needs and raises for values; the CUDA kernel (emulated
    too) takes an order, and makes NaN.
    """
    return rewards.device.type == "cpu" and _library.native() is torch.ops.tokcore


def _refuse_infinities(op: str, rewards: Tensor) -> None:
    """Before several rewards are summed: sums of infinities are NaN, which means not scored."""
    readable = _on_native_cpu(rewards) and _checks.readable(rewards)
    if readable and bool(rewards.isinf().any()):
        raise RuntimeError(
            f"{op}: rewards must be finite (NaN = not scored; infinite='unscored' drops "
            "infinities), got an infinity"
        )


def _weighted_sum(values: Tensor, factors: Tensor | None) -> Tensor:
    """Of the scored columns; NaN where there is none, infinite where one of them is."""
    weighted = values if factors is None else values * factors
    weighted = torch.where(values.isinf(), torch.inf, weighted)
    return torch.where(values.isnan().all(1), torch.nan, weighted.nansum(1))


def _run(
    rewards, grouped, options: _Options, lengths=None, *, statistics: bool = False
) -> GroupAdvantage:
    size, ids, order = grouped
    arguments = (
        rewards,
        ids,
        order,
        None if lengths is None else lengths.to(rewards.dtype),
        size,
        CENTERS[options.center],
        SCALES[options.scale],
        options.ddof,
        SINGLETONS[options.singleton],
        float(options.eps),
        bool(options.contiguous),
        statistics,
    )
    return GroupAdvantage(*_library.call_constant("group_advantage", *arguments))


def _batch(rewards, options: _Options, scale: str, *, statistics: bool = False) -> GroupAdvantage:
    """Against all rewards as one group."""
    options = options._replace(center="mean", scale=scale, singleton="zero")
    grouped = (len(rewards), None, None)
    if len(rewards) == 0:
        return GroupAdvantage(rewards, rewards, rewards)
    return _run(rewards, grouped, options, statistics=statistics)


def _normalize_then_sum(rewards, factors, grouped, lengths, options: _Options) -> Tensor:
    columns = rewards.double() if rewards.dim() == 2 else rewards.double().unsqueeze(1)
    advantages = []
    for column in columns.unbind(1):
        if not _all_unscored(column):
            scores = _run(column, grouped, options, lengths).advantage
            # On CUDA an infinity has made its group NaN, which must not pass for "not scored".
            scores = torch.where(scores.isnan(), torch.inf, scores)
            column = torch.where(column.isnan(), torch.nan, scores)
        advantages.append(column)
    summed = _weighted_sum(torch.stack(advantages, 1), factors)
    infinite = summed.isinf()
    found = _batch(torch.where(infinite, torch.nan, summed), options, "std").advantage
    return torch.where(infinite, torch.nan, found).to(rewards.dtype)


def _all_unscored(column: Tensor) -> bool:
    """Of one reward function among several, which may; only the CPU operator would mind."""
    readable = _on_native_cpu(column) and _checks.readable(column)
    return readable and bool(column.isnan().all())


def _as_trl(rewards, size: int, factors, center: str, scale: str, combine: str) -> Tensor:
    """TRL's GRPOTrainer, float32 and its order of operations (huggingface/trl:grpo_trainer.py)."""
    op = "group_advantage"
    if size == 0 or center != "mean" or scale not in ("std", "batch_std", "none"):
        raise ValueError(
            f"{op}: compat 'trl' takes a group size, center 'mean' and scale 'std', 'batch_std' or "
            f"'none', got size {size}, {center!r}, {scale!r}"
        )
    columns = rewards.float() if rewards.dim() == 2 else rewards.float().unsqueeze(1)
    factors = torch.ones(columns.shape[1], device=columns.device) if factors is None else factors
    factors, unscored = factors.float(), columns.isnan().all(1)
    if combine == "normalize_then_sum":
        grouped = columns.view(-1, size, columns.shape[1])
        mean = grouped.nanmean(1, keepdim=True)
        columns = ((grouped - mean) / (_nanstd(grouped, 1) + 1e-4)).view_as(columns)
    summed = (columns * factors).nansum(1)
    summed = torch.where(unscored, torch.nan, summed)
    if combine == "normalize_then_sum":
        advantage = (summed - summed.nanmean()) / (_nanstd(summed, 0) + 1e-4)
    else:
        grouped = summed.view(-1, size)
        advantage = (grouped - grouped.nanmean(1, keepdim=True)).flatten()
        if scale == "std":
            advantage = (advantage.view(-1, size) / (_nanstd(grouped, 1) + 1e-4)).flatten()
        elif scale == "batch_std":
            advantage = advantage / (_nanstd(summed, 0) + 1e-4)
    return advantage.nan_to_num(0.0).to(rewards.dtype)


def _nanstd(values: Tensor, dim: int) -> Tensor:
    if values.shape[dim] < 2:
        return torch.zeros_like(values)
    scored = (~values.isnan()).sum(dim, keepdim=True)
    variance = (values - values.nanmean(dim, keepdim=True)).square().nanmean(dim, keepdim=True)
    return (variance * scored / (scored - 1)).sqrt()


def _reference(
    rewards: Tensor,
    group: Tensor,
    *,
    center: str = "mean",
    scale: str = "std",
    ddof: int = 1,
    eps: float = 1e-4,
    lengths: Tensor | None = None,
    singleton: str = "zero",
) -> Tensor:
    """The definition in plain torch for rewards (B,) and ids, a group at a time."""
    advantage = torch.zeros_like(rewards)
    everyone = rewards[~rewards.isnan()]
    for identity in group.unique():
        rows = ((group == identity) & ~rewards.isnan()).nonzero().flatten()
        r = rewards[rows]
        if len(rows) == 0 or (len(rows) == 1 and center != "none"):
            if singleton == "reward":
                advantage[rows] = r
            continue
        if center == "leave_one_out":
            value = r - (r.sum() - r) / (len(r) - 1)
        elif center == "length_weighted_mean":
            n = lengths[rows].to(r.dtype)
            value = r - (n * r).sum() / n.sum()
        elif center == "best":
            top = r.topk(2).values
            value = torch.where(r == top[0], r - top[1], 0)
        else:
            value = r - (r.mean() if center == "mean" else 0)
        if scale == "mean":
            value = value / r.mean() if r.mean() > 0 else torch.zeros_like(r)
        elif scale != "none":
            spread = r if scale == "std" else everyone
            value = value / ((spread.std(correction=ddof) if len(spread) > ddof else 0) + eps)
        advantage[rows] = value
    return advantage


def _fake(rewards, group, order, weights, *rules):
    statistics = rewards.new_empty(rewards.shape if rules[-1] else (0,))
    return rewards.new_empty(rewards.shape), statistics, torch.empty_like(statistics)


_library.register_operator("group_advantage", fake=_fake, over_rows=False)
