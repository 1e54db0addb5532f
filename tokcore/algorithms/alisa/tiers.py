"""One layer's keys and values on two tiers: the device, and the host's memory beside it.

A token is one contiguous record, K and V of every head. The device tier is a ring of the newest
tokens and, behind it, the stage of those brought from beyond; the host tier is a ring too. What the
schedule decides in integers is done here in copies, a few for the whole batch:

    append   ring -> host, of the tokens that leave; new tokens -> ring, or straight to the host;
             layer inputs -> their store, of the tokens that will be deleted once
    load     host -> stage of the selected that are there; inputs -> recompute -> stage of the
             selected that are deleted

On CUDA the host's side of each copy is pinned memory and the copies run on a stream of their own:
what leaves is written to the host tier at the next call, so that no step waits for it; what comes
is waited for by the current stream alone. On the CPU the same code runs with both tiers in RAM.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokcore.algorithms.alisa.link import Link
from tokcore.algorithms.alisa.schedule import (
    Budget,
    Capacity,
    Plan,
    RowSchedule,
    capacity,
    steps,
)

Recompute = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Traffic(NamedTuple):
    """What a store has moved so far, all sequences together."""

    offloaded: int = 0  # records to the host; a record is a token, or a token of one KV head
    fetched: int = 0  # records from the host
    recomputed: int = 0  # records
    bytes_to_host: int = 0  # layer inputs included
    bytes_to_device: int = 0


class TwoTierStore:
    """Keys and values of one layer, some of them beyond the device, some deleted.

    Equivalent to ``key[:, :, index]`` and ``value[:, :, index]`` of all tokens ever appended, in
    bits, but for deleted tokens, which are what ``recompute`` gives: in bits too where its
    arithmetic does not depend on how many tokens it is called with (a matrix product may). Not
    differentiable.

    Args:
        plan: Plan, or one for each of the B sequences: they may be in different phases.
        prompts: tokens of each sequence's prompt.
        count: most tokens that follow a prompt; memory is reserved for so many.
        budget: length -> Budget, e.g. ``lambda n: half_budget(n, 0.2)``: the local window stays on
            the device, and `top` tokens are the most that a step needs from beyond.
        kv_heads, head_dim: Hkv, D.
        dtype: float32 (default), bfloat16, float16 or float64.
        device: of the device tier. Default "cpu".
        lists: Hs, 1 (default) for one list of selected tokens that all heads share, or Hkv.
        stage: tokens of the stage; default what a step needs at most. A larger one keeps tokens
            for longer: as the live set of exact eviction does, but on demand.
        reuse: keep staged tokens from step to step. Default True; False is the paper's.
        recompute: (inputs (N, E), positions (N,) int64) -> key, value (N, Hkv, D), of dtype; on the
            device. Needed where the plan deletes. E.g. norm, projection and rotation of a layer.
        input_dim: E, where the plan deletes.
        inputs_on: tier of the layer inputs, "host" (default) or "device".
        beta_of: as in ``place``.
    Raises:
        ValueError: a named error for each argument.

    >>> from tokcore.algorithms.alisa.schedule import half_budget
    >>> store = TwoTierStore(Plan(alpha=0.75, p1=0), [8], 4, lambda n: half_budget(n, 0.5),
    ...                      kv_heads=1, head_dim=2)
    >>> key = torch.arange(16.0).view(1, 1, 8, 2)
    >>> store.append(key, -key)
    >>> store.gather(torch.tensor([[[1, 3, 6, 7]]]), torch.tensor([[4]])).key[0, 0]
    tensor([[ 2.,  3.],
            [ 6.,  7.],
            [12., 13.],
            [14., 15.]])
    >>> store.traffic
    Traffic(offloaded=6, fetched=2, recomputed=0, bytes_to_host=96, bytes_to_device=32)

    Source: arXiv 2403.17312, section V.A; that inputs are stored is our reading of "recompute".
    """

    def __init__(
        self,
        plan: Plan | Sequence[Plan],
        prompts: Sequence[int],
        count: int,
        budget: Callable[[int], Budget],
        *,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        lists: int = 1,
        stage: int | None = None,
        reuse: bool = True,
        recompute: Recompute | None = None,
        input_dim: int | None = None,
        inputs_on: str = "host",
        beta_of: str = "host",
    ) -> None:
        name, batch = "TwoTierStore", len(prompts)
        plans = [plan] * batch if isinstance(plan, Plan) else list(plan)
        if not 0 < batch == len(plans):
            raise ValueError(
                f"{name}: prompts and plans must be of one number, positive, got {batch} and "
                f"{len(plans)}"
            )
        if kv_heads < 1 or head_dim < 1:
            raise ValueError(
                f"{name}: kv_heads and head_dim must be positive, got {kv_heads} and {head_dim}"
            )
        if lists not in (1, kv_heads):
            raise ValueError(f"{name}: lists must be 1 or kv_heads = {kv_heads}, got {lists}")
        if dtype not in DTYPES:
            raise ValueError(f"{name}: dtype must be one of {DTYPES}, got {dtype}")
        if inputs_on not in ("host", "device"):
            raise ValueError(f"{name}: inputs_on must be 'host' or 'device', got {inputs_on!r}")
        each = [
            capacity(one, steps(s, count, budget), beta_of=beta_of)
            for one, s in zip(plans, prompts, strict=True)
        ]
        room = Capacity(*(max(of_rows) for of_rows in zip(*each, strict=True)))
        if stage is not None:
            if stage < room.stage:
                raise ValueError(f"{name}: stage must be {room.stage} at least, got {stage}")
            room = room._replace(stage=stage)
        if room.inputs and (recompute is None or input_dim is None):
            raise ValueError(
                f"{name}: recompute and input_dim must be given to a plan that deletes "
                f"{room.inputs} tokens, got {recompute} and {input_dim}"
            )
        self.capacity, self.lists, self.traffic = room, lists, Traffic()
        self._heads, self._dim, self._recompute = kv_heads, head_dim, recompute
        self._rows = [
            RowSchedule(one, s, budget, room, lists=lists, reuse=reuse, beta_of=beta_of)
            for one, s in zip(plans, prompts, strict=True)
        ]
        self._link = Link(torch.device(device))
        record = (kv_heads, 2, head_dim)
        self._near = torch.zeros(
            batch, room.device + room.stage, *record, dtype=dtype, device=device
        )
        self._far = torch.zeros(batch, room.host, *record, dtype=dtype)
        self._inputs = torch.zeros(
            batch,
            room.inputs,
            input_dim or 0,
            dtype=dtype,
            device=device if inputs_on == "device" else "cpu",
        )
        self._inputs_travel = inputs_on == "host"

    @property
    def key(self) -> Tensor:
        """(B, Hkv, C, D): the device tier, ring and stage, a view. ``load`` says what is where."""
        return self._near[:, :, :, 0].transpose(1, 2)

    @property
    def value(self) -> Tensor:
        """(B, Hkv, C, D), as ``key``."""
        return self._near[:, :, :, 1].transpose(1, 2)

    @property
    def lengths(self) -> list[int]:
        """Tokens appended to each sequence."""
        return [row.length for row in self._rows]

    @property
    def phases(self) -> list[int]:
        """1, 2 or 3 of each sequence."""
        return [row.placement.phase for row in self._rows]

    @property
    def device_bytes(self) -> int:
        """Reserved on the device."""
        return self._near.nbytes + (0 if self._inputs_travel else self._inputs.nbytes)

    @property
    def host_bytes(self) -> int:
        """Reserved on the host, without the buffers that copies pass through."""
        return self._far.nbytes + (self._inputs.nbytes if self._inputs_travel else 0)

    @torch.no_grad()
    def append(
        self,
        key: Tensor,
        value: Tensor,
        inputs: Tensor | None = None,
        *,
        valid: Sequence[int] | None = None,
    ) -> None:
        """Take in new tokens and send away what the plan says; the store of Algorithm 2.

        Args:
            key, value: (B, Hkv, Q, D), on the device, keys rotated already.
            inputs: (B, Q, E), layer inputs of the same tokens, where the plan deletes.
            valid: how many of the last tokens of each sequence are real, the ones before being
                left padding. Default all.
        Raises:
            TypeError, ValueError: a wrong dtype or shape, missing inputs, more tokens than memory
                was reserved for. Nothing is changed then.
        """
        new = self._check_new(key, value, inputs, valid)
        after = [row.after(n) for row, n in zip(self._rows, new, strict=True)]
        queries, room = key.shape[2], self.capacity
        fresh = torch.stack([key.transpose(1, 2), value.transpose(1, 2)], 3).flatten(0, 1)
        leave, gone, straight, landed, enter, placed, kept, held = ([] for _ in range(8))
        for b, (row, (stored, _)) in enumerate(zip(self._rows, after, strict=True)):
            first = (b + 1) * queries - new[b] - row.length  # a position's row of fresh, less it
            going, coming = np.arange(*_ends(stored.offload)), np.arange(*_ends(stored.device))
            old, young = going[going < row.length], going[going >= row.length]
            leave.append(b * self._near.shape[1] + old % max(room.device, 1))
            gone.append(b * room.host + old % max(room.host, 1))
            straight.append(first + young)
            landed.append(b * room.host + young % max(room.host, 1))
            enter.append(first + coming)
            placed.append(b * self._near.shape[1] + coming % max(room.device, 1))
            end = min(row.length + new[b], room.inputs)
            known = np.arange(min(row.length, end), end)
            kept.append(first + known)
            held.append(b * room.inputs + known)
        near, far = self._near.flatten(0, 1), self._far.flatten(0, 1)
        self._link.settle()
        self._to_host(near, leave, far, gone)
        self._to_host(fresh, straight, far, landed)
        _copy(fresh, enter, near, placed)
        if inputs is not None and room.inputs:
            source, target = inputs.flatten(0, 1), self._inputs.flatten(0, 1)
            if self._inputs_travel:
                self._to_host(source, kept, target, held)
            else:
                _copy(source, kept, target, held)
        self._count(offloaded=self.lists * sum(len(stored.offload) for stored, _ in after))
        for row, n, (_, placement) in zip(self._rows, new, after, strict=True):
            row.move_on(n, placement)

    @torch.no_grad()
    def load(self, index: Tensor, count: Tensor) -> Tensor:
        """Bring to the device what a step attends to; the load and recomputation of Algorithm 2.

        On CUDA this reads index and count back to the host: the schedule is the host's. The copies
        run on the store's stream, and only the current stream waits for them: to hide them, call it
        as soon as the selection is known, and attend later.

        Args:
            index: (B, Hs, M) int32 or int64: positions, ascending; ignored from count on.
            count: (B, Hs) int32 or int64.
        Returns:
            (B, Hs, M) int64 slots in ``key`` and ``value``, on the device; 0 from count on. Not
            ascending: the ring wraps.
        Raises:
            TypeError, ValueError: a wrong dtype or shape; positions that are not ascending or not
                there; more of them beyond the device than the stage holds.
        """
        self._check_list(index, count)
        try:
            return self._load(index, count)
        except BaseException:
            # The schedule may already count on tokens that were not brought.
            for row in self._rows:
                row.forget()
            raise

    @torch.no_grad()
    def gather(self, index: Tensor, count: Tensor) -> Gathered:
        """``load``, and the selected tokens packed in the order of index.

        Args:
            index, count: as in ``load``.
        Returns:
            Gathered: key and value (B, Hkv, M, D), on the device, views; from count on they are any
            token. For ``sparse_decode_attention(query, *gathered, None, count)``.
        """
        slots = self.load(index, count)
        batch, lists, size = slots.shape
        rows = torch.arange(batch, device=slots.device).view(-1, 1, 1) * self._near.shape[1] + slots
        rows = rows * lists + torch.arange(lists, device=slots.device).view(1, -1, 1)
        found = self._by_list(self._near).index_select(0, rows.flatten())
        found = found.view(batch, lists, size, -1, 2, self._dim).transpose(2, 3).flatten(1, 2)
        return Gathered(found[:, :, :, 0], found[:, :, :, 1])

    def reorder(self, rows: Sequence[int]) -> None:
        """Row i becomes a copy of what row rows[i] was, as beam search needs it.

        Args:
            rows: of any number, each in [0, B).
        Raises:
            ValueError: none, or one that is not there.
        """
        batch = len(self._rows)
        if not len(rows) or not all(0 <= row < batch for row in rows):
            raise ValueError(
                f"TwoTierStore.reorder: rows must be some in [0, {batch}), got {list(rows)}"
            )
        self._link.settle()
        chosen = torch.tensor([int(row) for row in rows])
        for name in ("_near", "_far", "_inputs"):
            tier = getattr(self, name)
            setattr(self, name, tier.index_select(0, chosen.to(tier.device)))
        self._rows = [copy.deepcopy(self._rows[row]) for row in chosen.tolist()]

    def _load(self, index: Tensor, count: Tensor) -> Tensor:
        chosen, counts = index.cpu().numpy(), count.cpu().numpy()
        if ((counts < 0) | (counts > chosen.shape[2])).any():
            raise ValueError(
                f"TwoTierStore.load: count must lie in [0, {chosen.shape[2]}], got "
                f"{counts.tolist()}"
            )
        slots = np.zeros(chosen.shape, np.int64)
        fetch, into, again, lost = [], [], [], []
        width, room = self._near.shape[1], self.capacity
        for b, row in enumerate(self._rows):
            for s in range(self.lists):
                loaded = row.load(chosen[b, s, : counts[b, s]], s)
                slots[b, s, : counts[b, s]] = loaded.slot
                from_host = b * room.host + loaded.fetch % max(room.host, 1)
                fetch.append(from_host * self.lists + s)
                into.append((b * width + loaded.fetch_slot) * self.lists + s)
                again.append((b * width + loaded.recompute_slot) * self.lists + s)
                lost.append(b * room.inputs + loaded.recompute)
        near = self._by_list(self._near)
        fetch, into, again, lost = (np.concatenate(each) for each in (fetch, into, again, lost))
        self._link.settle()
        if len(fetch):
            records = self._to_device(self._by_list(self._far), fetch)
            near.index_copy_(0, self._ids(into), records)
        if len(lost):
            # Lists of several heads may ask for one token: it is computed once.
            tokens, which = np.unique(lost, return_inverse=True)
            records = self._recomputed(tokens).flatten(0, 1).view(-1, near.shape[1])
            heads = which * self.lists + again % self.lists
            near.index_copy_(0, self._ids(again), records.index_select(0, self._ids(heads)))
        self._count(fetched=len(fetch), recomputed=len(lost))
        return self._ids(slots)

    def _recomputed(self, tokens: np.ndarray) -> Tensor:
        """Records (N, Hkv, 2, D) of deleted tokens, by their rows of the inputs."""
        inputs = self._inputs.flatten(0, 1)
        if self._inputs_travel:
            inputs = self._to_device(inputs, tokens)
        else:
            inputs = inputs.index_select(0, self._ids(tokens))
        key, value = self._recompute(inputs, self._ids(tokens % self.capacity.inputs))
        shape = (len(tokens), self._heads, self._dim)
        for name, one in (("key", key), ("value", value)):
            if one.shape != shape or one.dtype != self._near.dtype:
                raise ValueError(
                    f"TwoTierStore: recompute must return a {name} of shape {shape} and "
                    f"{self._near.dtype}, got {tuple(one.shape)} and {one.dtype}"
                )
        return torch.stack([key, value], 2)

    def _by_list(self, tier: Tensor) -> Tensor:
        """(tokens * Hs, rest of a record): a row is what one list moves of one token."""
        rows = tier.shape[0] * tier.shape[1] * self.lists
        return tier.view(rows, self._heads // self.lists * 2 * self._dim)

    def _ids(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(rows)).to(self._near.device)

    def _to_host(self, source: Tensor, rows: list, target: Tensor, into: list) -> None:
        rows, into = np.concatenate(rows), np.concatenate(into)
        if len(rows):
            moving = source.index_select(0, self._ids(rows))
            self._link.to_host(moving, target, torch.from_numpy(into))
            self._count(bytes_to_host=moving.nbytes)

    def _to_device(self, source: Tensor, rows: np.ndarray) -> Tensor:
        found = self._link.to_device(source, torch.from_numpy(rows))
        self._count(bytes_to_device=found.nbytes)
        return found

    def _count(self, **more: int) -> None:
        self.traffic = self.traffic._replace(
            **{name: getattr(self.traffic, name) + n for name, n in more.items()}
        )

    def _check_new(self, key, value, inputs, valid) -> list[int]:
        name, like = "TwoTierStore.append", self._near
        batch = len(self._rows)
        for argument, tensor in (("key", key), ("value", value)):
            if tensor.dtype != like.dtype or tensor.device != like.device:
                raise TypeError(
                    f"{name}: {argument} must be {like.dtype} on {like.device}, got "
                    f"{tensor.dtype} on {tensor.device}"
                )
            shape = (batch, self._heads, key.shape[2] if key.dim() == 4 else "Q", self._dim)
            if tensor.shape != shape:
                raise ValueError(f"{name}: {argument} must be {shape}, got {tuple(tensor.shape)}")
        queries = key.shape[2]
        if inputs is None and self.capacity.inputs:
            raise ValueError(f"{name}: inputs must be given, the plan deletes; got None")
        if inputs is not None and self.capacity.inputs:
            shape = (batch, queries, self._inputs.shape[-1])
            if inputs.shape != shape or inputs.dtype != like.dtype:
                raise ValueError(
                    f"{name}: inputs must be {shape} of {like.dtype}, got "
                    f"{tuple(inputs.shape)} of {inputs.dtype}"
                )
        new = [queries] * batch if valid is None else [int(n) for n in valid]
        if len(new) != batch or any(not 0 <= n <= queries for n in new):
            raise ValueError(f"{name}: valid must be {batch} numbers in [0, {queries}], got {new}")
        return new

    def _check_list(self, index: Tensor, count: Tensor) -> None:
        name, lists = "TwoTierStore.load", (len(self._rows), self.lists)
        for argument, tensor in (("index", index), ("count", count)):
            if tensor.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"{name}: {argument} must be int32 or int64, got {tensor.dtype}")
        if index.dim() != 3 or index.shape[:2] != lists or count.shape != lists:
            raise ValueError(
                f"{name}: index must be {(*lists, 'M')} and count {lists}, got "
                f"{tuple(index.shape)} and {tuple(count.shape)}"
            )


class Gathered(NamedTuple):
    key: Tensor  # (B, Hkv, M, D)
    value: Tensor


def _ends(positions: range) -> tuple[int, int]:
    return positions.start, max(positions.start, positions.stop)


def _copy(source: Tensor, rows: list, target: Tensor, into: list) -> None:
    rows, into = (torch.from_numpy(np.concatenate(x)).to(target.device) for x in (rows, into))
    target.index_copy_(0, into, source.index_select(0, rows))
