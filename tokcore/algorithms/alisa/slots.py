"""The keys and values of one attention layer, with what is known of each token, in packed slots.

Slots ascend in position; slots [0, count) are in use. Everything is an explicit tensor that the
operators change in place.
"""

import torch
from torch import Tensor

from tokcore.ops import kv_append, kv_compact

GRAIN = 64  # slots are allocated in multiples
QUANTIZATION_GROUP = 64  # channels of INT8 keys or values that share a scale

# Tensors with a row for each sequence: what selecting, repeating and reordering rows acts on.
ROWS = (
    "key",
    "value",
    "key_quantization",
    "value_quantization",
    "position",
    "count",
    "score",
    "ring",
    "last_selected",
    "oldest",
    "length",
    "index",
    "selected",
)
# Tensors with a slot for each token, the dimension of the slots, and what is in a free one.
SLOTS = {
    "key": (2, 0),
    "value": (2, 0),
    "key_quantization": (2, 0),
    "value_quantization": (2, 0),
    "position": (2, -1),
    "score": (2, 0),
    "ring": (3, 0),
    "last_selected": (2, -1),
}


class Slots:
    """B sequences, H KV heads, Hs lists (1, or H with shared=False), C slots.

    Attributes, None before the first token:
        key, value: (B, H, C, D), uint8 with int8.
        key_quantization, value_quantization: (B, H, C, Z, 2) float32 scale and offset, or None.
        position: (B, Hs, C) int32, -1 in free slots; the token's place in its own sequence.
        count: (B, Hs) int32 slots in use.
        score: (B, Hs, C) int64, weights in units of 2 ** -40.
        ring: (B, Hs, R, C) float32, the row of step t in t % R.
        last_selected: (B, Hs, C) int32, a step, or -1.
        oldest: (B,) int32, the first step in the score.
        length: (B,) int32, the tokens of each sequence, padding not counted.
        seen: columns appended, padding counted.
        slots: at least as many as any list has in use.
    """

    def __init__(self, *, shared: bool, int8: bool):
        self.shared, self.int8 = shared, int8
        self.reset()

    def reset(self) -> None:
        for name in ROWS:
            setattr(self, name, None)
        self.dtype: torch.dtype | None = None
        self.seen = self.slots = 0
        self._ragged = False  # whether sequences differ in length: else a number says it all

    @property
    def is_empty(self) -> bool:
        return self.key is None

    @property
    def capacity(self) -> int:
        return self.key.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = [getattr(self, name) for name in ROWS]
        return sum(x.numel() * x.element_size() for x in tensors if x is not None)

    @property
    def _tokens(self) -> Tensor | int:
        """How many tokens each sequence has; one number where they have as many."""
        return self.length if self._ragged else self.seen

    def _each(self, number: Tensor | int) -> Tensor:
        """(B,) int32 of a number for all sequences, or of one for each."""
        if isinstance(number, Tensor):
            return number
        shape = self.length.shape
        return torch.full(shape, number, dtype=torch.int32, device=self.length.device)

    def append(
        self, key: Tensor, value: Tensor, valid: Tensor | None = None, *, rows: int = 0
    ) -> Tensor:
        """Puts the last valid[b] of Q tokens into the next slots; returns valid.

        The ring gets so many rows at least.
        """
        tokens = key.shape[2]
        self._reserve(key, tokens, rows)
        if valid is None:
            valid = self._each(tokens)
        else:
            self._ragged = True
        kv_append(
            self.key,
            self.value,
            self.position,
            self.last_selected,
            self.count,
            key,
            value,
            self.length,
            valid,
            key_quantization=self.key_quantization,
            value_quantization=self.value_quantization,
        )
        self.length += valid
        self.seen += tokens
        self.slots += tokens
        return valid

    def keep(self, since: Tensor | int, local: Tensor | int, *, sinks: int, room: int) -> None:
        """Drops all but what was selected since, the last `local` and the first `sinks` slots.

        Waits for the device, and gives memory back where half of it would stay free with so much
        room for what comes.
        """
        kv_compact(
            self.key,
            self.value,
            self.position,
            self.score,
            self.ring,
            self.last_selected,
            self.count,
            self._each(since),
            self._each(local),
            sinks=sinks,
            key_quantization=self.key_quantization,
            value_quantization=self.value_quantization,
        )
        self.slots = int(self.count.max())
        if self.capacity > 2 * (self.slots + room):
            self._resize(_rounded(self.slots + room))
        self.index = self.selected = None

    def readable(self, stored: Tensor, quantization: Tensor | None) -> Tensor:
        """Keys or values of the slots in use as the queries' dtype."""
        stored = stored[:, :, : self.slots]
        if quantization is None:
            return stored
        quantization = quantization[:, :, : self.slots]
        groups = stored.unflatten(3, (quantization.shape[3], -1)).float()
        return (groups * quantization[..., :1] + quantization[..., 1:]).flatten(3).to(self.dtype)

    # ---- rows of the batch ------------------------------------------------------------------

    def select_rows(self, rows: Tensor) -> None:
        """Keeps these sequences, in this order; indices may repeat."""
        if not self.is_empty:
            rows = rows.to(self.key.device)
            for name in ROWS:
                if getattr(self, name) is not None:
                    setattr(self, name, getattr(self, name)[rows])

    def repeat_rows(self, repeats: int) -> None:
        """Each sequence so many times, one copy after the other."""
        if not self.is_empty:
            rows = torch.arange(self.key.shape[0], device=self.key.device)
            self.select_rows(rows.repeat_interleave(repeats))

    def crop(self, tokens: int) -> None:
        """Takes the last tokens of each sequence back; scores are not touched."""
        if not 0 <= tokens <= int(self.length.min()):
            raise ValueError(
                f"Slots: crop takes at most the {int(self.length.min())} tokens of the shortest "
                f"sequence, got {tokens}"
            )
        self.seen -= tokens
        self.slots -= tokens
        self.length -= tokens
        self.count -= tokens
        free = torch.arange(self.capacity, device=self.key.device) >= self.count.unsqueeze(2)
        self.position.masked_fill_(free, -1)

    # ---- parts ------------------------------------------------------------------------------

    def _reserve(self, key: Tensor, tokens: int, rows: int) -> None:
        if self.is_empty:
            self._allocate(key, tokens)
        slots = self.slots + tokens
        if slots > self.capacity:
            self._resize(_rounded(max(slots, self.capacity * 5 // 4)))
        if rows > self.ring.shape[2]:
            self._widen(max(rows, self.ring.shape[2] * 5 // 4))

    def _allocate(self, key: Tensor, tokens: int) -> None:
        batch, heads, _, dim = key.shape
        slots = _rounded(tokens + GRAIN)  # the first steps after a prompt must not copy it
        lists = 1 if self.shared else heads
        self.dtype = key.dtype
        int32 = {"dtype": torch.int32, "device": key.device}
        stored = torch.uint8 if self.int8 else key.dtype
        self.key = key.new_zeros((batch, heads, slots, dim), dtype=stored)
        self.value = torch.zeros_like(self.key)
        if self.int8:
            groups = dim // QUANTIZATION_GROUP if dim % QUANTIZATION_GROUP == 0 else 1
            shape = (batch, heads, slots, groups, 2)
            self.key_quantization = key.new_zeros(shape, dtype=torch.float32)
            self.value_quantization = torch.zeros_like(self.key_quantization)
        self.position = torch.full((batch, lists, slots), -1, **int32)
        self.last_selected = self.position.clone()
        self.score = torch.zeros((batch, lists, slots), dtype=torch.int64, device=key.device)
        self.ring = key.new_zeros((batch, lists, 0, slots), dtype=torch.float32)
        self.count = torch.zeros((batch, lists), **int32)
        self.length = torch.zeros((batch,), **int32)
        self.oldest = torch.zeros((batch,), **int32)

    def _resize(self, slots: int) -> None:
        for name, (dim, free) in SLOTS.items():
            old = getattr(self, name)
            if old is None:
                continue
            shape = list(old.shape)
            shape[dim] = slots
            new = old.new_full(shape, free)
            kept = min(slots, old.shape[dim])
            new.narrow(dim, 0, kept).copy_(old.narrow(dim, 0, kept))
            setattr(self, name, new)

    def _widen(self, rows: int) -> None:
        """Moves each row to step % rows: the last steps are those that the ring held."""
        old = self.ring
        before = old.shape[2]
        self.ring = old.new_zeros((*old.shape[:2], rows, old.shape[3]))
        if not before:
            return
        steps = self.length.unsqueeze(1) - 1 - torch.arange(before, device=old.device)  # (B, R)
        for b_steps, b_old, b_new in zip(steps.clamp(min=-1), old, self.ring, strict=True):
            known = b_steps >= 0
            source = torch.where(known, b_steps % before, 0)
            rows_of = torch.where(known.view(1, -1, 1), b_old[:, source], 0)
            b_new.index_add_(1, torch.where(known, b_steps % rows, 0), rows_of)


def _rounded(slots: int) -> int:
    return -(-slots // GRAIN) * GRAIN
