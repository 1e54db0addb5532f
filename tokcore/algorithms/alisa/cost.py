"""Bytes and seconds of a plan, step by step; the profile that the seconds come from.

A token of the whole batch, in all l layers, has T = 2 b l Hkv D e bytes of K and V (the paper's
4 b l h: e = 2, Hkv D = h) and I = b l E e bytes of layer input, E wide. Of step j, in tokens:

    down_j   newly offloaded, host_j - host_{j-1}, but for what is deleted at once
    up_j     (1 - reuse) top_j times the share of globals in [deleted, host)
    again_j  (1 - reuse) top_j times the share of globals in [0, deleted)

    transfer  = (T down_j + I kept_j) / B_down + (T up_j + I again_j) / B_up
    recompute = l R(again_j)      compute = l C(local_j + top_j)      R, C: profiled, one layer

kept_j are those of the step's new tokens whose input is stored since they will be deleted once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokcore.algorithms.alisa.schedule import Plan, Steps, capacity, place_all

INPUTS_ON = ("host", "device")


class Shape(NamedTuple):
    """What the KV cache of a model is made of."""

    batch: int
    layers: int
    kv_heads: int
    head_dim: int
    input_dim: int  # E: width of the layer input that keys and values are recomputed from
    itemsize: int = 2

    @property
    def token_bytes(self) -> int:
        """Of the K and V of one token in all layers, for the whole batch."""
        return 2 * self.batch * self.layers * self.kv_heads * self.head_dim * self.itemsize

    @property
    def input_bytes(self) -> int:
        """Of the layer inputs of one token in all layers, for the whole batch."""
        return self.batch * self.layers * self.input_dim * self.itemsize


class Machine(NamedTuple):
    """Memory for the KV cache on either side, in bytes, and bytes a second between the two."""

    device_bytes: int
    host_bytes: int
    to_host: float
    to_device: float


class Profile(NamedTuple):
    """Seconds of one layer, for the whole batch, on one machine."""

    attended: tuple[int, ...]  # tokens of each sequence, ascending
    attend_seconds: tuple[float, ...]
    recomputed: tuple[int, ...]  # tokens of each sequence, ascending
    recompute_seconds: tuple[float, ...]
    to_host: float  # bytes a second
    to_device: float
    device: str

    def to_json(self) -> str:
        return json.dumps(self._asdict())

    @classmethod
    def from_json(cls, text: str) -> Profile:
        return cls(
            **{k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(text).items()}
        )


class Costs(NamedTuple):
    """An entry a step, step 0 being the prompt: tokens, bytes, seconds."""

    offloaded: np.ndarray  # tokens to the host
    fetched: np.ndarray  # tokens to the device, expected
    recomputed: np.ndarray  # tokens, expected
    inputs_kept: np.ndarray  # tokens whose layer input is stored
    bytes_to_host: np.ndarray
    bytes_to_device: np.ndarray
    compute_seconds: np.ndarray
    transfer_seconds: np.ndarray
    recompute_seconds: np.ndarray
    seconds: np.ndarray


class Memory(NamedTuple):
    """Bytes that a plan reserves, whole batch, all layers."""

    device_bytes: int
    host_bytes: int


def memory(
    plan: Plan, steps: Steps, shape: Shape, *, beta_of: str = "host", inputs_on: str = "host"
) -> Memory:
    """Bytes of the two tiers that a plan needs.

    Args:
        plan, steps, shape: Plan, Steps, Shape.
        beta_of: as in ``place``.
        inputs_on: the tier of the layer inputs, "host" (default) or "device". The paper does not
            say what is recomputed from.

    >>> from tokcore.algorithms.alisa.schedule import half_budget, steps
    >>> memory(Plan(0.5, 0.5, 1, 2), steps(8, 8, lambda n: half_budget(n, 0.5)),
    ...        Shape(batch=1, layers=2, kv_heads=2, head_dim=4, input_dim=8))
    Memory(device_bytes=768, host_bytes=448)
    """
    _check_choice("memory", "inputs_on", inputs_on, INPUTS_ON)
    room = capacity(plan, steps, beta_of=beta_of)
    inputs = room.inputs * shape.input_bytes
    on_host = inputs_on == "host"
    return Memory(
        (room.device + room.stage) * shape.token_bytes + (0 if on_host else inputs),
        room.host * shape.token_bytes + (inputs if on_host else 0),
    )


def costs(
    plan: Plan,
    steps: Steps,
    shape: Shape,
    machine: Machine,
    profile: Profile,
    *,
    beta_of: str = "host",
    inputs_on: str = "host",
    reuse: float = 0.0,
    spread: Callable[[np.ndarray], np.ndarray] | None = None,
    resend: bool = False,
    overlap: bool = False,
) -> Costs:
    """What each step of a plan moves and takes.

    Args:
        plan, steps, shape, machine, profile: Plan, Steps, Shape, Machine, Profile. Bandwidths are
            the machine's; the profile's are what was measured where it was made.
        beta_of: as in ``place``.
        inputs_on: as in ``memory``. On the device, inputs do not travel.
        reuse: share in [0, 1] of the globals beyond the device that are in the stage still.
            Default 0: fetched on demand, at every step, as the paper has it.
        spread: x -> share of the globals that lie among the oldest part x of the tokens before the
            local window, both in [0, 1], rising. Default x, globals anywhere alike.
        resend: as the paper's theta^c = alpha (j + s) reads, send all that lies beyond the device
            down at every step. Default False: only what is new there.
        overlap: whether transfers run beside the rest, so that a step takes the longer of the two.
            Default False, the paper's sum.
    Returns:
        Costs.
    Raises:
        ValueError: a named error for a wrong plan or setting.

    Source: arXiv 2403.17312, section V.A.
    """
    _check_choice("costs", "inputs_on", inputs_on, INPUTS_ON)
    if not 0 <= reuse <= 1:
        raise ValueError(f"costs: reuse must lie in [0, 1], got {reuse}")
    _, deleted, host = place_all(plan, steps, beta_of=beta_of)
    offloaded = host - np.minimum(np.maximum(_before(host), deleted), host)
    if resend:
        offloaded = host - deleted
    kept = np.minimum(steps.length, deleted[-1]) - np.minimum(_before(steps.length), deleted[-1])

    older = np.maximum(steps.length - steps.local, 1)
    share = spread or (lambda x: x)
    beyond, gone = (share(np.minimum(x / older, 1.0)) for x in (host, deleted))
    needed = (1 - reuse) * steps.top
    needed[0] = 0  # the prompt attends to itself before it is stored
    fetched, recomputed = needed * (beyond - gone), needed * gone

    travels = shape.input_bytes if inputs_on == "host" else 0
    down = offloaded * shape.token_bytes + kept * travels
    up = fetched * shape.token_bytes + recomputed * travels
    transfer = down / machine.to_host + up / machine.to_device
    compute = shape.layers * interpolate(
        profile.attended, profile.attend_seconds, steps.local + steps.top
    )
    compute[0] = 0.0  # no plan changes the prompt's own attention
    again = shape.layers * interpolate(profile.recomputed, profile.recompute_seconds, recomputed)
    rest = compute + again
    seconds = np.maximum(rest, transfer) if overlap else rest + transfer
    return Costs(offloaded, fetched, recomputed, kept, down, up, compute, transfer, again, seconds)


def interpolate(tokens: Sequence[int], seconds: Sequence[float], at) -> np.ndarray:
    """Seconds at any number of tokens: straight lines from (0, 0) on, the last one continued.

    >>> interpolate([10, 20], [1.0, 3.0], [5, 15, 30]).tolist()
    [0.5, 2.0, 5.0]
    """
    x, y = np.array([0, *tokens], float), np.array([0, *seconds], float)
    if len(x) < 2 or len(x) != len(y) or not (np.diff(x) > 0).all() or (y < 0).any():
        raise ValueError(
            "interpolate: tokens must be positive, ascending and one for each of seconds, none of "
            f"them negative, got {list(tokens)} and {list(seconds)}"
        )
    at = np.asarray(at, float)
    slope = (y[-1] - y[-2]) / (x[-1] - x[-2])
    return np.interp(at, x, y) + np.maximum(at - x[-1], 0) * max(slope, 0.0)


def profile(
    attend: Callable[[Tensor, Tensor], object],
    recompute: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    shape: Shape,
    *,
    attended: Sequence[int],
    recomputed: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    rounds: int = 5,
) -> Profile:
    """Time one layer's attention and recomputation, and copies between the tiers, on this machine.

    Args:
        attend: (key, value) of (B, Hkv, M, D), packed: one step's attention over M tokens.
        recompute: (inputs (N, E), positions (N,) int64) -> key, value (N, Hkv, D), as the store
            takes it; N = B times the tokens of each sequence.
        shape: Shape; its layers and itemsize are not used.
        attended, recomputed: tokens of a sequence at which to measure, ascending.
        dtype, device: of the tensors.
        rounds: the median of so many calls is taken, after one that is not counted.
    Returns:
        Profile.
    Raises:
        ValueError: tokens that are not positive and ascending, rounds below 1.
    """
    if rounds < 1:
        raise ValueError(f"profile: rounds must be positive, got {rounds}")
    for name, tokens in (("attended", attended), ("recomputed", recomputed)):
        if not len(tokens) or tokens[0] < 1 or (np.diff(tokens) <= 0).any():
            raise ValueError(f"profile: {name} must be positive and ascending, got {list(tokens)}")
    device, kind = torch.device(device), {"dtype": dtype, "device": device}
    attend_seconds, recompute_seconds = [], []
    for count in attended:
        key, value = torch.randn(2, shape.batch, shape.kv_heads, count, shape.head_dim, **kind)
        attend_seconds.append(_median(lambda k=key, v=value: attend(k, v), device, rounds))
    for count in recomputed:
        inputs = torch.randn(shape.batch * count, shape.input_dim, **kind)
        positions = torch.arange(count, device=device).repeat(shape.batch)
        recompute_seconds.append(
            _median(lambda i=inputs, p=positions: recompute(i, p), device, rounds)
        )
    pinned = device.type == "cuda"
    near = torch.zeros(1 << 26, dtype=torch.uint8, device=device)
    far = torch.zeros(1 << 26, dtype=torch.uint8, pin_memory=pinned)
    to_host = near.nbytes / _median(lambda: far.copy_(near, non_blocking=True), device, rounds)
    to_device = near.nbytes / _median(lambda: near.copy_(far, non_blocking=True), device, rounds)
    return Profile(
        tuple(attended),
        tuple(attend_seconds),
        tuple(recomputed),
        tuple(recompute_seconds),
        to_host,
        to_device,
        str(device),
    )


def _median(run: Callable[[], object], device: torch.device, rounds: int) -> float:
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[1:]))


def _before(x: np.ndarray) -> np.ndarray:
    """The value after the previous step; 0 before the prompt."""
    return np.concatenate([[0], x[:-1]])


def _check_choice(name: str, argument: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: {argument} must be one of {choices}, got {value!r}")
