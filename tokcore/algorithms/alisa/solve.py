"""The plan of least time that fits into the memory of both tiers.

What can be said from capacity, bandwidth and KV size alone is said first:

    p1     the last step up to which all tokens fit on the device, beside the stage
    alpha  the least share that makes the last step fit there
    p2     the last step up to which what is beyond the device fits on the host
    beta   the least share that makes the last step fit there

What remains is a choice between bringing and recomputing, by the profiled seconds. A greedy search
settles it: one parameter after another, and p1 = p2 as one, is set to its best candidate, the
others held, until none improves. It starts from the analytic plan, from the same without deletion,
and for each share of deletion from the same and from everything beyond the device at once: deletion
needs room for layer inputs, and pays with all parameters moved together or not at all. The paper
publishes no search grid and no solution.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from tokcore.algorithms.alisa.cost import Costs, Machine, Profile, Shape, costs, memory
from tokcore.algorithms.alisa.schedule import NEVER, Plan, Steps, place_all


class Solution(NamedTuple):
    plan: Plan
    seconds: float  # of all steps
    costs: Costs
    evaluated: int  # plans


def solve(
    steps: Steps,
    shape: Shape,
    machine: Machine,
    profile: Profile,
    *,
    grid: int = 20,
    step_grid: int = 32,
    **options,
) -> Solution:
    """The plan of least total time that fits, by greedy search.

    Minimises over (alpha, beta, p1, p2)

        sum_j compute_j + transfer_j(alpha) + recompute_j(beta)

    Args:
        steps, shape, machine, profile: Steps, Shape, Machine, Profile.
        grid: alpha and beta are multiples of 1 / grid, or the analytic values. Default 20.
        step_grid: p1 and p2 are step_grid + 1 steps spread evenly, or the analytic values, or
            never. Default 32.
        options: those of ``costs``: beta_of, inputs_on, reuse, spread, resend, overlap.
    Returns:
        Solution. Where everything fits on the device, its plan is ``Plan()``: nothing is faster.
        Of two plans of one time the one searched first stands.
    Raises:
        ValueError: a grid below 1; no plan fits, with what the smallest needs.

    >>> from tokcore.algorithms.alisa.cost import Machine, Profile, Shape
    >>> from tokcore.algorithms.alisa.schedule import half_budget, steps
    >>> shape = Shape(batch=1, layers=1, kv_heads=1, head_dim=16, input_dim=16)  # 64 B a token
    >>> timed = Profile((64,), (1e-5,), (64,), (1e-2,), 1e6, 1e6, "cpu")
    >>> machine = Machine(device_bytes=24 * 64, host_bytes=1 << 20, to_host=1e6, to_device=1e6)
    >>> solve(steps(16, 16, lambda n: half_budget(n, 0.25)), shape, machine, timed).plan
    Plan(alpha=0.375, beta=0.0, p1=5, p2=4611686018427387904)

    Source: arXiv 2403.17312, section V.A, as far as it goes.
    """
    search = _Search("solve", steps, shape, machine, profile, grid, step_grid, options)
    first = search.analytic
    starts = [first._replace(beta=0.0, p2=search.never), first]
    # Stored inputs take room that the analytic plan has not counted: these start with all of it.
    for beta in reversed(search.shares_beta):
        starts += [first._replace(beta=beta, p2=first.p1), Plan(1.0, beta, 0, 0)]
    best, least = None, math.inf
    for start in starts:
        plan, seconds = search.descend(start)
        if seconds < least:
            best, least = plan, seconds
    return search.solution(best, least)


def solve_exhaustively(
    steps: Steps,
    shape: Shape,
    machine: Machine,
    profile: Profile,
    *,
    grid: int = 20,
    step_grid: int = 32,
    **options,
) -> Solution:
    """``solve`` by trying every candidate with every other: what the greedy search is held to.

    The arguments are those of ``solve``. About grid^2 step_grid^2 / 2 plans: for small problems.
    """
    search = _Search("solve_exhaustively", steps, shape, machine, profile, grid, step_grid, options)
    best, least = None, math.inf
    every = itertools.product(search.shares, search.shares_beta, search.times, search.times)
    for plan in (Plan(*found) for found in every if found[2] <= found[3]):
        seconds = search.seconds(plan)
        if seconds < least:
            best, least = plan, seconds
    return search.solution(best, least)


class _Search:
    """The candidates of one problem, and the time of each."""

    def __init__(self, name, steps, shape, machine, profile, grid, step_grid, options) -> None:
        for field, value in (("grid", grid), ("step_grid", step_grid)):
            if value < 1:
                raise ValueError(f"{name}: {field} must be positive, got {value}")
        self.name, self.steps, self.shape = name, steps, shape
        self.machine, self.profile, self.options = machine, profile, options
        self.of_memory = {k: options[k] for k in ("beta_of", "inputs_on") if k in options}
        self.never = len(steps.length)  # the first step that does not come
        self.known: dict[Plan, float] = {}
        self.analytic = analytic_plan(steps, shape, machine, beta_of=options.get("beta_of", "host"))
        shares = {i / grid for i in range(grid + 1)}
        self.shares = sorted(shares | {self.analytic.alpha})
        self.shares_beta = sorted(shares | {self.analytic.beta})
        times = {round(t) for t in np.linspace(0, self.never, step_grid + 1)}
        # Late ones first: of two plans of one time, that of the longer first phases stands.
        self.times = sorted(times | {self.analytic.p1, self.analytic.p2}, reverse=True)

    def seconds(self, plan: Plan) -> float:
        """Of all steps; infinite for a plan that does not fit."""
        if plan not in self.known:
            need = memory(plan, self.steps, self.shape, **self.of_memory)
            fits = (
                need.device_bytes <= self.machine.device_bytes
                and need.host_bytes <= self.machine.host_bytes
            )
            self.known[plan] = float(self.costs(plan).seconds.sum()) if fits else math.inf
        return self.known[plan]

    def costs(self, plan: Plan) -> Costs:
        return costs(plan, self.steps, self.shape, self.machine, self.profile, **self.options)

    def descend(self, plan: Plan) -> tuple[Plan, float]:
        least, moved = self.seconds(plan), True
        while moved:
            moved = False
            for candidates in (self._p1, self._alpha, self._p2, self._beta, self._both):
                for other in candidates(plan):
                    seconds = self.seconds(other)
                    if seconds < least:
                        plan, least, moved = other, seconds, True
        return plan, least

    def _p1(self, plan: Plan) -> Iterable[Plan]:
        return [plan._replace(p1=t) for t in self.times if t <= plan.p2]

    def _p2(self, plan: Plan) -> Iterable[Plan]:
        return [plan._replace(p2=t) for t in self.times if t >= plan.p1]

    def _both(self, plan: Plan) -> Iterable[Plan]:
        return [plan._replace(p1=t, p2=t) for t in self.times]

    def _alpha(self, plan: Plan) -> Iterable[Plan]:
        return [plan._replace(alpha=x) for x in self.shares]

    def _beta(self, plan: Plan) -> Iterable[Plan]:
        return [plan._replace(beta=x) for x in self.shares_beta]

    def solution(self, plan: Plan | None, seconds: float) -> Solution:
        if plan is None:
            most, first = Plan(1.0, 0.0, 0, self.never), self.analytic
            every, none = first._replace(beta=1.0, p2=first.p1), first._replace(beta=0.0)
            need = [
                memory(x, self.steps, self.shape, **self.of_memory) for x in (most, none, every)
            ]
            raise ValueError(
                f"{self.name}: no plan fits into machine.device_bytes = "
                f"{self.machine.device_bytes} and machine.host_bytes = {self.machine.host_bytes}; "
                f"the local window and the globals alone take {need[0].device_bytes} of the "
                f"device, the rest {need[1].host_bytes} of the host, and if deleted "
                f"{need[2].host_bytes}"
            )
        plan = _without_idle_parameters(plan, self.never)
        return Solution(plan, seconds, self.costs(plan), len(self.known))


def analytic_plan(steps: Steps, shape: Shape, machine: Machine, *, beta_of: str = "host") -> Plan:
    """The plan that capacity and KV size alone ask for; layer inputs are left out of the sum.

    Args:
        steps, shape, machine: Steps, Shape, Machine.
        beta_of: as in ``place``.
    Returns:
        Plan, ``Plan()`` with p1 = p2 = the number of steps where everything fits on the device.
    """
    count, length = len(steps.length), steps.length
    device = machine.device_bytes // shape.token_bytes
    if length[-1] <= device:
        return Plan(0.0, 0.0, count, count)
    ring = max(device - int(steps.top.max()), 0)
    p1 = int(np.searchsorted(length, ring, side="right"))
    alpha = min(1.0, float(((length - ring) / length)[p1:].max(initial=0.0)))
    plan = Plan(alpha, 0.0, p1, count)
    host = place_all(plan, steps).host
    room = machine.host_bytes // shape.token_bytes
    if host[-1] <= room:
        return plan
    p2 = int(np.searchsorted(host, room, side="right"))
    part = host if beta_of == "host" else length
    beta = min(1.0, float(((host - room)[p2:] / part[p2:]).max(initial=0.0)))
    return plan._replace(beta=beta, p2=max(p1, p2))


def _without_idle_parameters(plan: Plan, never: int) -> Plan:
    """A phase that never comes has no share, a share of 0 no phase."""
    p1 = plan.p1 if plan.p1 < never and plan.alpha > 0 else NEVER
    p2 = plan.p2 if plan.p2 < never and plan.beta > 0 and p1 < NEVER else NEVER
    return Plan(
        plan.alpha if p1 < NEVER else 0.0, plan.beta if p2 < NEVER else 0.0, p1, max(p1, p2)
    )
