"""Any sequence of the four operators on a sparse key-value cache leaves the state that a model
computes from scratch, on every backend.
"""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kv_states import Model, int32, new_state

DIM, SLOTS = 3, 24
RELAXED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


class Walk:
    """A state and its model, moved on together."""

    def __init__(self, backend, seed, batch, lists, heads, ring_rows):
        self.random = np.random.default_rng(seed)
        self.device = backend.device
        self.shape = batch, lists
        self.heads, self.ring_rows = heads, ring_rows
        self.model = Model(batch, lists, heads, ring_rows)
        self.state = new_state(batch, lists, heads, SLOTS, DIM, ring_rows, device=backend.device)

    def int32(self, values):
        return int32(values, self.device)

    def each_row(self, low, high):
        return self.random.integers(low, high + 1, self.shape[0]).tolist()

    def counts(self):
        return [[len(live) for live in lists] for lists in self.model.live]

    def append(self, queries, valid):
        length = [len(tokens) for tokens in self.model.tokens]
        shape = (2, self.shape[0], self.heads, queries, DIM)
        tokens = torch.from_numpy(self.random.normal(size=shape).astype(np.float32))
        # Padding is not there to be read.
        for b, real in enumerate(valid):
            tokens[:, b, :, : queries - real] = torch.nan
        self.model.append(*tokens, valid)
        given_ = tokens.to(self.device)
        self.state.append(*given_, self.int32(length), self.int32(valid))
        self.model.assert_state(self.state)

    def update(self, rows, index, count):
        window = self.each_row(0, self.ring_rows)
        step = [len(tokens) - 1 for tokens in self.model.tokens]
        self.model.update(rows, index, count, window)
        index = None if index is None else index.to(self.device)
        numbers = (self.int32(count), self.int32(step), self.int32(window))
        self.state.update(rows.to(self.device), index, *numbers)
        self.model.assert_state(self.state)

    def weights(self, *shape):
        """Some of them 0, as they are where float32 ends."""
        drawn = self.random.random(shape) * (self.random.random(shape) < 0.8)
        return torch.from_numpy(drawn.astype(np.float32))

    def chunk(self, queries, valid, scored):
        """Tokens whose last rows of weights are given; the others leave no row."""
        self.append(queries, valid)
        rows, count = self.weights(*self.shape, scored, SLOTS), self.counts()
        for b, s, i in np.ndindex(*self.shape, scored):
            visible = max(0, count[b][s] - (scored - 1 - i))
            rows[b, s, i, visible:] = torch.nan
            if len(self.model.tokens[b]) - scored + i < 0:
                rows[b, s, i] = torch.nan
        self.update(rows, None, count)

    def decode(self):
        self.append(1, [1] * self.shape[0])
        local, top = self.each_row(0, 5), self.each_row(0, 5)
        sinks = int(self.random.integers(3))
        size = max(map(sum, zip(local, top, strict=True))) + sinks + int(self.random.integers(3))
        found = self.state.select(self.int32(local), self.int32(top), size=size, sinks=sinks)
        index, selected = found.index.cpu(), found.selected.tolist()
        for b, s in np.ndindex(*self.shape):
            want = self.model.select(b, s, local[b], top[b], sinks)
            assert selected[b][s] == len(want)
            assert index[b, s].tolist() == want + [-1] * (size - len(want))
        rows = self.weights(*self.shape, 1, size)
        for b, s in np.ndindex(*self.shape):
            rows[b, s, :, selected[b][s] :] = torch.nan
        self.update(rows, index, selected)

    def compact(self):
        since = [len(tokens) - int(self.random.integers(5)) for tokens in self.model.tokens]
        local, sinks = self.each_row(0, 4), int(self.random.integers(3))
        self.model.compact(since, local, sinks)
        self.state.compact(self.int32(since), self.int32(local), sinks=sinks)
        self.model.assert_state(self.state)


@settings(max_examples=25, deadline=None, suppress_health_check=RELAXED, derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    shared=st.booleans(),
    ring_rows=st.integers(0, 5),
    moves=st.lists(st.sampled_from(["decode", "decode", "decode", "chunk", "compact"]), max_size=9),
)
def test_any_sequence(backend, seed, batch, heads, shared, ring_rows, moves):
    walk = Walk(backend, seed, batch, 1 if shared else heads, heads, ring_rows)
    queries = int(walk.random.integers(1, 7))
    walk.chunk(queries, walk.each_row(0, queries), int(walk.random.integers(1, queries + 2)))
    for move in moves:
        if max(map(max, walk.counts())) + 4 > SLOTS:
            walk.compact()
        if move == "decode":
            walk.decode()
        elif move == "compact":
            walk.compact()
        else:
            # Further chunks have no padding, and rows of their own tokens only.
            queries = int(walk.random.integers(1, 5))
            walk.chunk(queries, [queries] * batch, int(walk.random.integers(1, queries + 1)))


@pytest.mark.parametrize("window", [1, 3])
def test_what_eviction_drops_would_never_have_been_chosen(backend, window):
    """A fixed window, local and top: with slots dropped every step and with all of them kept, the
    same positions are selected and have the same scores. A score is above 0 wherever it can be.
    """
    random = np.random.default_rng(window)
    local = top = int32([3], backend.device)
    states = [new_state(1, 1, 1, 40, DIM, window, device=backend.device) for _ in range(2)]
    for step in range(36):
        at = int32([step], backend.device)
        token = torch.full((1, 1, 1, DIM), float(step), device=backend.device)
        drawn = torch.from_numpy(random.random((1, 1, 1, 6)).astype(np.float32) + 0.01)
        chosen = []
        for state in states:
            state.append(token, token, at, int32([1], backend.device))
            index, selected = state.select(local, top, size=6)
            slots = index[0, 0, : int(selected)].long()
            chosen.append((state.position[0, 0, slots].tolist(), state.score[0, 0, slots].tolist()))
            rows = drawn.to(backend.device)
            state.update(rows, index, selected, at, int32([window], backend.device))
        assert chosen[0] == chosen[1]
        # What the rows of the next sum list, and the next local slots.
        states[0].compact(at + 1 - window, int32([2], backend.device))
    assert int(states[0].count) < 12
    assert int(states[1].count) == 36
