"""What lies where at each step: integers on the CPU, no tensor, no device.

A sequence of n tokens is cut in three by two counts that only ever grow, deleted <= host:

    positions   0 .. deleted-1      deleted .. host-1      host .. n-1
                deleted             host tier              device tier

Step j is the j-th token after the prompt of s tokens, n = s + j, and the prompt itself is step 0.

    phase I    j < p1          host = 0
    phase II   p1 <= j < p2    host = min(round(alpha n), n - local): the local window stays
    phase III  p2 <= j         deleted = round(beta host), the oldest of them

Selected tokens that are not on the device pass through its stage: slots of their own, which keep a
token for the next steps until another needs the slot.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tokcore.algorithms.alisa.policy import Policy

NEVER = 1 << 62  # a step that no sequence reaches
BETA_OF = ("host", "length")


class Plan(NamedTuple):
    """The four parameters of the schedule. As it stands: everything on the device, for ever."""

    alpha: float = 0.0  # share of all tokens that lies beyond the device, from step p1 on
    beta: float = 0.0  # share of these that is deleted, from step p2 on
    p1: int = NEVER
    p2: int = NEVER


class Budget(NamedTuple):
    """Tokens that a step attends to: the last `local`, and `top` of those before."""

    local: int
    top: int


class Steps(NamedTuple):
    """A prompt and what follows it, an entry a step, from step 0, the prompt, on: int64 arrays."""

    length: np.ndarray  # n, the tokens of the sequence
    local: np.ndarray
    top: np.ndarray


class Placement(NamedTuple):
    """Phase 1, 2 or 3, and the two cuts; integers, or arrays with an entry a step."""

    phase: int
    deleted: int
    host: int


class Capacity(NamedTuple):
    """Tokens of one sequence that each part of the store must hold."""

    device: int  # the ring of the newest tokens
    stage: int  # tokens from beyond the device, while a step needs them
    host: int
    inputs: int  # layer inputs to recompute from: those of the tokens that are ever deleted


class Stored(NamedTuple):
    """What an append does: ranges of positions."""

    device: range  # new tokens written to the device
    offload: range  # device, or straight from the new tokens, to the host
    delete: range  # dropped from the host


class Loaded(NamedTuple):
    """What a step's selection asks for: int64 arrays."""

    slot: np.ndarray  # of each selected token on the device: ring first, then stage
    fetch: np.ndarray  # positions, ascending, to bring from the host
    fetch_slot: np.ndarray  # into these device slots
    recompute: np.ndarray  # positions, ascending, to compute again
    recompute_slot: np.ndarray


def half_budget(length: int, ratio: float) -> Budget:
    """Half of the kept tokens local and half of them global, as Algorithm 1 has it.

    k = max(1, floor(n r / 2 + 1/2)); local = min(k, n), top = min(k, n - local).

    Args:
        length: n, the current token counted.
        ratio: r in (0, 1].

    >>> half_budget(10, 0.4), half_budget(3, 1.0)
    (Budget(local=2, top=2), Budget(local=2, top=1))

    Source: arXiv 2403.17312, Algorithm 1.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"half_budget: ratio must lie in (0, 1], got {ratio}")
    return Budget(*Policy(local=ratio / 2, top=ratio / 2).amounts(int(length)))


def steps(prompt: int, count: int, budget: Callable[[int], Budget]) -> Steps:
    """A prompt and `count` tokens after it.

    Args:
        prompt: s >= 1 tokens.
        count: steps after the prompt.
        budget: length -> Budget, e.g. ``lambda n: half_budget(n, 0.2)``.

    >>> steps(8, 2, lambda n: half_budget(n, 0.5)).local
    array([2, 2, 3])
    """
    if prompt < 1 or count < 0:
        raise ValueError(
            f"steps: prompt must be positive and count not negative, got {prompt} and {count}"
        )
    length = np.arange(prompt, prompt + count + 1)
    kept = np.array([budget(int(n)) for n in length], dtype=np.int64)
    wrong = (kept < 0).any(1) | (kept.sum(1) > length)
    if wrong.any():
        n, (local, top) = length[wrong][0], kept[wrong][0]
        raise ValueError(
            f"steps: budget must be of at most length tokens, got {local} + {top} of {n}"
        )
    return Steps(length, kept[:, 0], kept[:, 1])


def check_plan(name: str, plan: Plan, beta_of: str) -> None:
    """Raise the named errors of a plan."""
    for field in ("alpha", "beta"):
        if not 0 <= getattr(plan, field) <= 1:
            raise ValueError(f"{name}: {field} must lie in [0, 1], got {getattr(plan, field)}")
    if not 0 <= plan.p1 <= plan.p2:
        raise ValueError(f"{name}: 0 <= p1 <= p2 must hold, got {plan.p1} and {plan.p2}")
    if beta_of not in BETA_OF:
        raise ValueError(f"{name}: beta_of must be one of {BETA_OF}, got {beta_of!r}")


def place(plan: Plan, step, length, local, *, beta_of: str = "host") -> Placement:
    """Where the tokens lie after a step.

    Equivalent, in phase III, to ``host = min(floor(alpha * length + .5), length - local)`` and
    ``deleted = floor(beta * host + .5)``; deleted is 0 before, host too in phase I.

    Args:
        plan: Plan.
        step: j, tokens since the prompt. An integer, or an array of them.
        length: n, tokens in all.
        local: tokens of the local window, which do not leave the device.
        beta_of: what beta is a share of: "host" (default), the tokens beyond the device, so that
            the host tier holds (1 - beta) alpha n; or "length", all tokens, as alpha is. The paper
            says "beta-part" and no more.
    Raises:
        ValueError: alpha or beta outside [0, 1], p1 > p2, another beta_of.

    >>> place(Plan(alpha=0.5, beta=0.25, p1=2, p2=4), step=4, length=16, local=3)
    Placement(phase=3, deleted=2, host=8)

    Source: arXiv 2403.17312, Algorithm 2.
    """
    check_plan("place", plan, beta_of)
    length = np.asarray(length)
    second, third = np.greater_equal(step, plan.p1), np.greater_equal(step, plan.p2)
    older = np.maximum(length - local, 0)
    host = np.where(second, np.minimum(_nearest(plan.alpha * length), older), 0)
    part = host if beta_of == "host" else length
    deleted = np.where(third, np.minimum(_nearest(plan.beta * part), host), 0)
    phase = 1 + second.astype(int) + third
    return Placement(*(x if x.ndim else int(x) for x in (phase, deleted, host)))


def place_all(plan: Plan, steps: Steps, *, beta_of: str = "host") -> Placement:
    """``place`` after every step, as arrays. What has left the device does not come back to it."""
    phase, deleted, host = place(
        plan, np.arange(len(steps.length)), steps.length, steps.local, beta_of=beta_of
    )
    return Placement(phase, np.maximum.accumulate(deleted), np.maximum.accumulate(host))


def capacity(plan: Plan, steps: Steps, *, beta_of: str = "host") -> Capacity:
    """Tokens that a store needs room for to run a plan.

    Args:
        plan: Plan.
        steps: Steps, up to the longest that the sequence may become.
        beta_of: as in ``place``.

    >>> capacity(Plan(0.5, 0.5, 1, 2), steps(8, 8, lambda n: half_budget(n, 0.5)))
    Capacity(device=8, stage=4, host=5, inputs=4)
    """
    _, deleted, host = place_all(plan, steps, beta_of=beta_of)
    return Capacity(
        device=int((steps.length - host).max()),
        stage=int(np.minimum(steps.top, host).max()),
        host=int((host - deleted).max()),
        inputs=int(deleted[-1]),
    )


class RowSchedule:
    """The bookkeeping of one sequence, for any number of lists of selected tokens.

    Args:
        plan: Plan.
        prompt: s, tokens of the prompt: step j ends with s + j tokens, all before are step 0.
        budget: length -> Budget.
        capacity: Capacity, of ``capacity`` or larger. A larger stage keeps tokens longer.
        lists: Hs, lists of selected tokens: one for all heads, or one for each KV head.
        reuse: whether a token that was brought to the stage stays there until its slot is needed,
            the least recently used giving way (default). False brings every token at every step,
            as the paper describes it.
        beta_of: as in ``place``.

    >>> half = lambda n: half_budget(n, 0.5)
    >>> row = RowSchedule(Plan(alpha=0.5, p1=0), 8, half, Capacity(6, 3, 6, 0))
    >>> row.append(8)  # half of the prompt goes straight to the host
    Stored(device=range(4, 8), offload=range(0, 4), delete=range(0, 0))
    >>> row.load([1, 3, 6, 7]).slot
    array([6, 7, 0, 1])
    """

    def __init__(
        self,
        plan: Plan,
        prompt: int,
        budget: Callable[[int], Budget],
        capacity: Capacity,
        *,
        lists: int = 1,
        reuse: bool = True,
        beta_of: str = "host",
    ) -> None:
        check_plan("RowSchedule", plan, beta_of)
        self.plan, self.prompt, self.budget, self.capacity = plan, prompt, budget, capacity
        self.reuse, self.beta_of = reuse, beta_of
        self.placement = Placement(1, 0, 0)
        self.length = 0
        self._staged = np.full((lists, capacity.stage), -1, dtype=np.int64)  # positions
        self._used = np.zeros_like(self._staged)  # length at the last use

    def append(self, count: int) -> Stored:
        """Take in `count` tokens."""
        stored, placement = self.after(count)
        self.move_on(count, placement)
        return stored

    def after(self, count: int) -> tuple[Stored, Placement]:
        """What ``append(count)`` does and where it ends; nothing is changed."""
        if count < 0:
            raise ValueError(f"RowSchedule: count must not be negative, got {count}")
        old, length = self.placement, self.length + count
        if count == 0:
            return Stored(range(0), range(0), range(0)), old
        step, local = max(length - self.prompt, 0), self.budget(length).local
        phase, deleted, host = place(self.plan, step, length, local, beta_of=self.beta_of)
        deleted, host = max(deleted, old.deleted), max(host, old.host)
        tokens = {"device": length - host, "host": host - deleted, "inputs": deleted}
        for part, found in tokens.items():
            room = getattr(self.capacity, part)
            if found > room:
                raise ValueError(
                    f"RowSchedule: capacity.{part} must hold {found} tokens at length {length}, "
                    f"got {room}"
                )
        stored = Stored(
            device=range(max(self.length, host), length),
            offload=range(max(old.host, deleted), max(old.host, deleted, host)),
            delete=range(old.deleted, min(old.host, deleted)),
        )
        return stored, Placement(phase, deleted, host)

    def move_on(self, count: int, placement: Placement) -> None:
        """Do what ``after(count)`` has found."""
        self.length, self.placement = self.length + count, placement

    def forget(self) -> None:
        """Empty the stage."""
        self._staged[:] = -1

    def load(self, selected, list_: int = 0) -> Loaded:
        """Find room on the device for what a step attends to: distinct positions, ascending."""
        selected = np.asarray(selected, dtype=np.int64)
        if len(selected) and not (
            selected[0] >= 0 and selected[-1] < self.length and (np.diff(selected) > 0).all()
        ):
            raise ValueError(
                "RowSchedule: selected must be ascending, distinct and in "
                f"[0, {self.length}), got {selected.tolist()}"
            )
        staged, used = self._staged[list_], self._used[list_]
        if not self.reuse:
            staged[:] = -1
        wanted = selected[selected < self.placement.host]
        here = np.isin(staged, wanted)
        missing = np.setdiff1d(wanted, staged[here], assume_unique=True)
        free = np.flatnonzero(~here)
        if len(missing) > len(free):
            raise ValueError(
                f"RowSchedule: capacity.stage must hold the {len(wanted)} selected tokens that "
                f"are beyond the device, got {len(staged)}"
            )
        # Empty slots first, then the least recently used.
        into = free[np.lexsort((free, used[free], staged[free] >= 0))][: len(missing)]
        staged[into] = missing
        used[into] = used[here] = self.length
        slot = selected % max(self.capacity.device, 1)
        order = np.argsort(staged)
        slot[: len(wanted)] = self.capacity.device + order[np.searchsorted(staged[order], wanted)]
        into = into + self.capacity.device
        old = missing < self.placement.deleted
        return Loaded(slot, missing[~old], into[~old], missing[old], into[old])


def _nearest(x) -> np.ndarray:
    return np.floor(np.asarray(x) + 0.5).astype(np.int64)
