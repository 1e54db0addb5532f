"""What one attention layer keeps of the tokens it has seen: explicit tensors, changed in place.

Slots are packed and ascend in position. A decode step appends, selects, attends and adds its
weights to the scores; what can never be selected again is dropped every `SLACK` steps, and only
that waits for the device, to learn how many slots are left.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tokcore.algorithms.alisa.policy import Policy
from tokcore.ops import (
    kv_append,
    kv_compact,
    prompt_window_scores,
    sparse_decode_attention,
    window_scores_update,
    window_select,
)

SLACK = 64  # decode steps between two compactions: that many dead slots at most
QUANTIZATION_GROUP = 64  # channels of INT8 keys or values that share a scale
SCORED_QUERIES = 64  # of a prompt, whose rows of weights are in memory at a time
MASK_ELEMENTS = 1 << 24  # of the mask of one block of a prompt's queries

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


class LayerState:
    """Keys, values and scores of one attention layer, of which each step reads what a policy says.

    Args:
        policy: which tokens a decode step reads.
        shared: one list of tokens for all heads, as in the paper; else one for each KV head.
        evict: drop what the policy can never select again. Without it every token stays; a decode
            step reads the same, but several queries at once (a further turn) read all tokens. Only
            for `alisa` and `dense`.
        int8: keep keys and values as INT8, with a scale for each token and 64 channels.

    Attributes, None before the first token, of B sequences, H KV heads, Hs lists, C slots:
        key, value: (B, H, C, D), uint8 with int8.
        key_quantization, value_quantization: (B, H, C, Z, 2) float32 scale and offset, or None.
        position: (B, Hs, C) int32, -1 in free slots; the token's place in its own sequence.
        count: (B, Hs) int32 slots in use, [0, count).
        score: (B, Hs, C) int64, weights in units of 2 ** -40; -1 where a token may not return.
        ring: (B, Hs, R, C) float32, the row of step t in t % R.
        last_selected: (B, Hs, C) int32. oldest, length: (B,) int32, the first step in the score
            and the tokens of each sequence, padding not counted.
        seen: columns appended, padding counted. slots: at least as many as any list has in use.

    >>> from tokcore.algorithms.alisa import alisa
    >>> state = LayerState(alisa(0.5))
    >>> for _ in range(8):
    ...     out = state.attend(*(torch.ones(1, 1, 1, 4) for _ in range(3)))
    >>> state.index[0, 0, :state.selected[0, 0]]  # k = 2: equal weights, the lowest win
    tensor([0, 1, 6, 7], dtype=torch.int32)
    """

    def __init__(
        self, policy: Policy, *, shared: bool = True, evict: bool = True, int8: bool = False
    ):
        if policy.permanent and not policy.is_dense and not evict:
            raise ValueError(
                "LayerState: evict must be True for a policy whose tokens never return, got False"
            )
        self.policy, self.shared, self.int8 = policy, shared, int8
        self.evict = evict and not policy.is_dense
        self.reset()

    def reset(self) -> None:
        """Forgets everything; the next tokens may have another batch size, dtype or device."""
        for name in ROWS:
            setattr(self, name, None)
        self.seen = self.slots = 0
        self._since_select = self._since_compact = self._since_chunk = 0
        self._settled = True
        self._dtype = None

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

    # ---- tokens in, attention out -----------------------------------------------------------

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        valid: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Appends tokens and gives the attention of their queries.

        One query is a decode step: it reads what the policy selects. Several are a prompt or a
        further turn: each reads every token that is there and not after itself.

        Args:
            query: (B, Hq, Q, D) float32, bfloat16, float16 or float64.
            key, value: (B, H, Q, D) of the same dtype, H a divisor of Hq.
            valid: (B,) int32, the last so many of the Q tokens are real, the others left padding.
                Default all.
            scale: default D ** -0.5.

        Returns:
            (B, Hq, Q, D); 0 for a query that has no token to read.
        """
        self._check(query, key, value, valid)
        if scale is None:
            scale = query.shape[-1] ** -0.5
        if query.shape[2] == 1:
            return self._decode(query, key, value, valid, scale)
        return self._prompt(query, key, value, valid, scale)

    def _decode(self, query, key, value, valid, scale) -> Tensor:
        selecting = self.index is None or self._since_select >= self.policy.reselect_every
        if selecting and not self.is_empty and not self.policy.is_dense:
            self._forget()
        idle = None if valid is None or self.seen == 0 else valid == 0
        valid = self.append(key, value, valid)
        if self.policy.is_dense:
            index, count = None, self.count
        elif selecting:
            index, count = self.select()
        else:
            index, count = self._extend(valid)
        output, row, _ = sparse_decode_attention(
            query.squeeze(2),
            self.key,
            self.value,
            index,
            count,
            scale=scale,
            key_quantization=self.key_quantization,
            value_quantization=self.value_quantization,
        )
        if not self.policy.is_dense:
            self.observe(row.unsqueeze(2), index, count, idle=idle)
        self._since_select += 1
        self._since_compact += 1
        self._since_chunk += 1
        return output.unsqueeze(2)

    def _prompt(self, query, key, value, valid, scale) -> Tensor:
        if self.evict and not self.is_empty:
            self.compact()  # what is read must not depend on when dead slots were dropped last
        elif not self.is_empty and not self.policy.is_dense:
            self.score.clamp_(min=0)  # all are read, so all may return
        first, padded = self.seen == 0, valid is not None
        valid = self.append(key, value, valid)
        if first and not padded and not self.int8:
            output = F.scaled_dot_product_attention(
                query,
                key,
                value,
                is_causal=True,
                scale=scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        else:
            output = self._dense_rows(query, scale)
        if not self.policy.is_dense:
            self._observe_prompt(query, valid, scale, rowwise=padded and not first)
        self.index = self.selected = None
        self._since_compact = self._since_chunk = 0
        self._settled = False
        return output

    def append(self, key: Tensor, value: Tensor, valid: Tensor | None = None) -> Tensor:
        """Puts the last valid[b] of Q tokens into the next slots; returns valid."""
        batch, _, tokens, _ = key.shape
        self._reserve(key, tokens)
        if valid is None:
            valid = torch.full((batch,), tokens, dtype=torch.int32, device=key.device)
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

    def select(self) -> tuple[Tensor, Tensor]:
        """The slots that this step reads, (B, Hs, M) int32 ascending, and how many, (B, Hs)."""
        local, top = self.policy.amounts(self.length)
        most = torch.tensor([self.seen], dtype=torch.int32)
        size = int(sum(self.policy.amounts(most))) + self.policy.sinks
        score = self.score
        if self.policy.stride:
            score = (self.position % self.policy.stride == 0).long()
        index, self.selected = window_select(
            score, self.count, local, top, size=size, sinks=self.policy.sinks
        )
        self.index = F.pad(index, (0, self.policy.reselect_every - 1), value=-1)
        self._since_select = 0
        return self.index, self.selected

    def observe(
        self,
        rows: Tensor,
        index: Tensor | None,
        count: Tensor,
        *,
        after: int = 0,
        idle: Tensor | None = None,
    ) -> None:
        """Adds rows (B, Hs, Q, M) of weights to the scores: those of the last Q steps.

        Of the last but `after`, that is; idle (B,) are sequences that have no such steps.
        """
        step = (self.length - 1 - after).clamp(min=-1)
        written = self.score, self.ring, self.last_selected, self.oldest
        if idle is not None:
            step = torch.where(idle, self.oldest, step)  # what is done there is undone
            before = [x[idle] for x in written]
        window_scores_update(
            *written,
            rows.to(torch.float32),
            index,
            count,
            step,
            self.policy.rows(self.length + 1),
        )
        if idle is not None:
            for x, rows_before in zip(written, before, strict=True):
                x[idle] = rows_before

    def compact(self) -> None:
        """Drops the tokens that no later step can select, and the memory that this frees."""
        kv_compact(
            self.key,
            self.value,
            self.position,
            self.score,
            self.ring,
            self.last_selected,
            self.count,
            self.length - self.policy.horizon(self.length + 1),
            self.policy.amounts(self.length)[0],
            sinks=self.policy.sinks,
            key_quantization=self.key_quantization,
            value_quantization=self.value_quantization,
        )
        self.slots = int(self.count.max())
        if self.capacity > 2 * (self.slots + SLACK):
            self._resize(_rounded(self.slots + SLACK))
        self.index = self.selected = None
        self._since_compact = 0

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
        """Takes the last tokens back, in a dense layer: elsewhere they left traces."""
        if tokens == 0 or self.is_empty:
            return
        if not self.policy.is_dense:
            raise NotImplementedError(
                f"LayerState: {tokens} tokens cannot be taken back, their weights are in the "
                "scores and others were dropped for them; copy.deepcopy the cache before"
            )
        self.seen -= tokens
        self.slots -= tokens
        self.length -= tokens
        self.count -= tokens
        free = torch.arange(self.capacity, device=self.key.device) >= self.count.unsqueeze(2)
        self.position.masked_fill_(free, -1)

    # ---- parts ------------------------------------------------------------------------------

    def _check(self, query, key, value, valid) -> None:
        batch, heads, tokens, dim = key.shape
        if value.shape != key.shape:
            raise ValueError(
                f"LayerState: value must have the shape of key, {tuple(key.shape)}, got "
                f"{tuple(value.shape)}"
            )
        if query.shape[0] != batch or query.shape[2:] != key.shape[2:] or query.shape[1] % heads:
            raise ValueError(
                f"LayerState: query must have shape ({batch}, Hq, {tokens}, {dim}) with Hq a "
                f"multiple of {heads}, got {tuple(query.shape)}"
            )
        if self.int8 and query.dtype == torch.float64:
            raise TypeError("LayerState: int8 takes no float64, got a query of torch.float64")
        if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
            raise NotImplementedError(
                "LayerState: no gradients pass through it; call it under torch.no_grad()"
            )
        if valid is not None and (valid.shape != (batch,) or valid.dtype != torch.int32):
            raise ValueError(
                f"LayerState: valid must be ({batch},) int32, got {tuple(valid.shape)} "
                f"{valid.dtype}"
            )
        if self.is_empty:
            return
        kept = (self.key.shape[0], self.key.shape[1], self.key.shape[3])
        if (batch, heads, dim) != kept or key.dtype != self._dtype:
            raise ValueError(
                f"LayerState: key must be ({kept[0]}, {kept[1]}, Q, {kept[2]}) {self._dtype} as "
                f"before, got {tuple(key.shape)} {key.dtype}; call reset() for another batch"
            )

    def _reserve(self, key: Tensor, tokens: int) -> None:
        """Room for so many more tokens, and for the rows of the window."""
        if self.is_empty:
            self._allocate(key, tokens)
        slots = self.slots + tokens
        most = torch.tensor([self.seen + tokens + 1], dtype=torch.int32)
        rows = 0 if self.policy.is_dense else int(self.policy.rows(most))
        if slots > self.capacity:
            self._resize(_rounded(max(slots, self.capacity * 5 // 4)))
        if rows > self.ring.shape[2]:
            self._widen(max(rows, self.ring.shape[2] * 5 // 4))

    def _allocate(self, key: Tensor, tokens: int) -> None:
        batch, heads, _, dim = key.shape
        slots = _rounded(tokens)
        lists = 1 if self.shared else heads
        self._dtype = key.dtype
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

    def _forget(self) -> None:
        """Before a selection: what was not selected for long may not return, or is dropped."""
        horizon = self.policy.horizon(self.length + 1)
        if self.evict and self._compaction_is_due():
            self.compact()
            self._settled = True
            return
        dead = self.last_selected < (self.length - horizon).view(-1, 1, 1)
        self.score.masked_fill_(dead & (self.position >= 0), -1)

    def _compaction_is_due(self) -> bool:
        if self._since_compact >= SLACK:
            return True
        # All of a prompt is alive until its own rows have left the horizon; then most of it dies.
        most = torch.tensor([self.seen + 1], dtype=torch.int32)
        return not self._settled and self._since_chunk >= int(self.policy.horizon(most))

    def _extend(self, valid: Tensor) -> tuple[Tensor, Tensor]:
        """The last selection, and the token appended since: its slot is the last in use."""
        self.index.scatter_(2, self.selected.long().unsqueeze(2), (self.count - 1).unsqueeze(2))
        self.selected += valid.unsqueeze(1)
        return self.index, self.selected

    def _observe_prompt(self, query, valid, scale, *, rowwise: bool) -> None:
        """Adds the rows that the next score needs; of a later chunk with padding one by one."""
        most = torch.tensor([self.seen + 1], dtype=torch.int32)
        tokens = query.shape[2]
        wanted = int(self.policy.rows(most)) or tokens
        block = 1 if rowwise else SCORED_QUERIES
        for start in range(max(0, tokens - wanted), tokens, block):
            stop = min(start + block, tokens)
            after = tokens - stop
            count = (self.count - after).clamp(min=0)
            rows = prompt_window_scores(
                query[:, :, start:stop],
                self.key,
                count,
                scale=scale,
                key_quantization=self.key_quantization,
            )
            self.observe(rows, None, count, after=after, idle=valid <= after if rowwise else None)

    def _dense_rows(self, query: Tensor, scale: float) -> Tensor:
        """Attention of the last Q tokens to all slots before each, heads packed by group."""
        batch, heads, tokens, dim = query.shape
        kv_heads = self.key.shape[1]
        group = heads // kv_heads
        query = query.reshape(batch * kv_heads, group, tokens, dim)
        output = torch.empty_like(query)
        block = max(1, MASK_ELEMENTS // (batch * kv_heads * self.slots))
        key = self._readable(self.key, self.key_quantization).flatten(0, 1).unsqueeze(1)
        value = self._readable(self.value, self.value_quantization).flatten(0, 1).unsqueeze(1)
        for start in range(0, tokens, block):
            stop = min(start + block, tokens)
            slots = self.slots - (tokens - stop)  # none of the block's queries reads further
            before = torch.arange(tokens - 1 - start, tokens - 1 - stop, -1, device=query.device)
            end = self.count.unsqueeze(2) - before
            visible = torch.arange(slots, device=query.device) < end.unsqueeze(3)
            some = (end > 0).unsqueeze(3)
            visible[..., :1] |= ~some  # a softmax of nothing is NaN; its output is set to 0 below
            visible, some = (
                x.expand(-1, kv_heads, -1, -1).reshape(batch * kv_heads, 1, stop - start, -1)
                for x in (visible, some)
            )
            part = F.scaled_dot_product_attention(
                query[:, :, start:stop],
                key[:, :, :slots].expand(-1, group, -1, -1),
                value[:, :, :slots].expand(-1, group, -1, -1),
                attn_mask=visible,
                scale=scale,
            )
            output[:, :, start:stop] = part.masked_fill(~some, 0)
        return output.reshape(batch, heads, tokens, dim)

    def _readable(self, stored: Tensor, quantization: Tensor | None) -> Tensor:
        """Keys or values of the slots in use as the queries' dtype."""
        stored = stored[:, :, : self.slots]
        if quantization is None:
            return stored
        quantization = quantization[:, :, : self.slots]
        groups = stored.unflatten(3, (quantization.shape[3], -1)).float()
        return (groups * quantization[..., :1] + quantization[..., 1:]).flatten(3).to(self._dtype)


def _rounded(slots: int) -> int:
    return -(-slots // SLACK) * SLACK
