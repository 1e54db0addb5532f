"""A sparse key-value cache twice: as tensors under the operators, and from scratch in numpy, which
keeps every token and every row of weights that there ever was.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tokcore.ops import kv_append, kv_compact, window_scores_update, window_select

UNIT = 2.0**40


def int32(values, device="cpu") -> Tensor:
    return torch.as_tensor(np.asarray(values), dtype=torch.int32).to(device)


def fixed_point(weight) -> int:
    return int(np.rint(np.float64(np.float32(weight)) * UNIT))


@dataclass
class State:
    key: Tensor
    value: Tensor
    position: Tensor
    score: Tensor
    ring: Tensor
    last_selected: Tensor
    oldest: Tensor
    count: Tensor
    key_quantization: Tensor | None = None
    value_quantization: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if value is not None}

    def clone(self) -> "State":
        return State(**{name: value.clone() for name, value in self.tensors().items()})

    def to(self, device) -> "State":
        return State(**{name: value.to(device) for name, value in self.tensors().items()})

    @property
    def quantization(self) -> dict[str, Tensor | None]:
        return {
            "key_quantization": self.key_quantization,
            "value_quantization": self.value_quantization,
        }

    def append(self, new_key, new_value, length, valid, *, by=kv_append) -> None:
        by(
            self.key,
            self.value,
            self.position,
            self.last_selected,
            self.count,
            new_key,
            new_value,
            length,
            valid,
            **self.quantization,
        )

    def update(self, rows, index, count, step, window, *, by=window_scores_update) -> None:
        state = (self.score, self.ring, self.last_selected, self.oldest)
        by(*state, rows, index, count, step, window)

    def select(self, local, top, *, size, sinks=0):
        return window_select(self.score, self.count, local, top, size=size, sinks=sinks)

    def compact(self, since, local, *, sinks=0, by=kv_compact) -> None:
        by(
            self.key,
            self.value,
            self.position,
            self.score,
            self.ring,
            self.last_selected,
            self.count,
            since,
            local,
            sinks=sinks,
            **self.quantization,
        )


def new_state(
    batch, lists, heads, slots, dim, ring_rows, *, dtype=torch.float32, groups=0, device="cpu"
) -> State:
    """Nothing in use; keys and values of free slots hold what must not matter."""

    def full(value, *shape, dtype):
        return torch.full(shape, value, dtype=dtype, device=device)

    pairs = {}
    if groups > 0:
        dtype = torch.uint8
        for name in ("key_quantization", "value_quantization"):
            shape = (batch, heads, slots, groups, 2)
            pairs[name] = full(77.0, *shape, dtype=torch.float32)
    return State(
        key=full(77, batch, heads, slots, dim, dtype=dtype),
        value=full(77, batch, heads, slots, dim, dtype=dtype),
        position=full(-1, batch, lists, slots, dtype=torch.int32),
        score=full(0, batch, lists, slots, dtype=torch.int64),
        ring=full(0, batch, lists, ring_rows, slots, dtype=torch.float32),
        last_selected=full(-1, batch, lists, slots, dtype=torch.int32),
        oldest=full(0, batch, dtype=torch.int32),
        count=full(0, batch, lists, dtype=torch.int32),
        **pairs,
    )


def filled(state: State, seed: int = 0) -> State:
    """A full state of random values, as no history would make it: for one operator at a time."""
    generator = torch.Generator().manual_seed(seed)

    def draw(most, like):
        return torch.randint(0, most, like.shape, generator=generator).to(like)

    state.key.copy_(draw(200, state.key))
    state.value.copy_(draw(200, state.value))
    slots = state.position.shape[-1]
    state.position.copy_(torch.arange(slots) * 2)
    state.ring.copy_(draw(9, state.ring) / 8)
    state.score.copy_((state.ring.double() * UNIT).long().sum(2))
    state.last_selected.copy_(draw(9, state.last_selected) - 1)
    state.count.copy_(draw(slots + 1, state.count))
    for pair in (state.key_quantization, state.value_quantization):
        if pair is not None:
            pair.copy_(draw(50, pair))
    return state


def assert_states(got: State, want: State) -> None:
    for name, value in got.tensors().items():
        other = getattr(want, name)
        assert torch.equal(value.cpu(), other.cpu()), name


@dataclass
class Model:
    """Of each row all tokens; of each list which of them live, and all rows of weights by step."""

    batch: int
    lists: int
    heads: int
    ring_rows: int
    tokens: list = field(init=False)  # [row][position] -> (key (Hkv, D), value)
    live: list = field(init=False)  # [row][list] -> positions, ascending
    rows: list = field(init=False)  # [row][list][step] -> {position: weight}
    last: list = field(init=False)  # [row][list] -> {position: step}
    oldest: list = field(init=False)

    def __post_init__(self):
        self.tokens = [[] for _ in range(self.batch)]
        self.oldest = [0] * self.batch
        self.live, self.rows, self.last = (
            [[kind() for _ in range(self.lists)] for _ in range(self.batch)]
            for kind in (list, dict, dict)
        )

    def append(self, new_key, new_value, valid) -> None:
        for b, added in enumerate(valid):
            for i in range(new_key.shape[2] - added, new_key.shape[2]):
                for live in self.live[b]:
                    live.append(len(self.tokens[b]))
                self.tokens[b].append((new_key[b, :, i], new_value[b, :, i]))

    def update(self, rows, index, count, window) -> None:
        queries = rows.shape[2]
        for b in range(self.batch):
            step = len(self.tokens[b]) - 1
            for s in range(self.lists):
                for i in range(queries):
                    at = step - (queries - 1) + i
                    if at < 0:
                        continue
                    slots = range(max(0, count[b][s] - (queries - 1 - i)))
                    if index is not None:
                        slots = index[b, s, : count[b][s]].tolist()
                    seen = [self.live[b][s][j] for j in slots]
                    weights = rows[b, s, i].tolist()[: len(seen)]
                    self.rows[b][s][at] = dict(zip(seen, weights, strict=True))
                    self.last[b][s] |= dict.fromkeys(seen, at)
            if self.ring_rows > 0:
                self.oldest[b] = max(self.oldest[b], step + 1 - window[b])

    def score(self, b: int, s: int, position: int) -> int:
        rows = self.rows[b][s].items()
        inside = [row for step, row in rows if step >= self.oldest[b] and position in row]
        return sum(fixed_point(row[position]) for row in inside)

    def select(self, b: int, s: int, local: int, top: int, sinks: int) -> list[int]:
        live = self.live[b][s]
        first = min(sinks, len(live))
        last = max(first, len(live) - local)
        scores = [self.score(b, s, position) for position in live]
        ranked = sorted(range(first, last), key=lambda j: (-scores[j], j))[:top]
        return [*range(first), *sorted(ranked), *range(last, len(live))]

    def compact(self, since, local, sinks: int) -> None:
        for b in range(self.batch):
            for s in range(self.lists):
                live = self.live[b][s]
                self.live[b][s] = [
                    position
                    for j, position in enumerate(live)
                    if self.last[b][s].get(position, -1) >= since[b]
                    or j >= len(live) - local[b]
                    or j < sinks
                ]

    def assert_state(self, state: State) -> None:
        """Everything but what lies in the keys and values of free slots."""
        state = state.to("cpu")
        assert state.oldest.tolist() == self.oldest
        for b in range(self.batch):
            for s in range(self.lists):
                live = self.live[b][s]
                n, free = len(live), state.position.shape[-1] - len(live)
                assert state.count[b, s] == n
                assert state.position[b, s].tolist() == live + [-1] * free
                want = [self.score(b, s, position) for position in live]
                assert state.score[b, s].tolist() == want + [0] * free
                want = [self.last[b][s].get(position, -1) for position in live]
                assert state.last_selected[b, s].tolist() == want + [-1] * free
                ring = np.zeros(state.ring.shape[2:], dtype=np.float32)
                for step, row in self.rows[b][s].items():
                    if self.ring_rows > 0 and step >= self.oldest[b]:
                        ring[step % self.ring_rows, :n] = [row.get(p, 0) for p in live]
                assert np.array_equal(state.ring[b, s].numpy(), ring)
                for h in range(self.heads) if self.lists == 1 else [s]:
                    for side, stored in enumerate((state.key, state.value)):
                        want = [self.tokens[b][position][side][h] for position in live]
                        assert stored[b, h, :n].tolist() == [row.tolist() for row in want]
