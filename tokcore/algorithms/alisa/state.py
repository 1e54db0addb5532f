"""The attention of one layer to a part of the tokens it has seen, chosen by a policy.

A decode step appends, selects, attends and adds its weights to the scores; what can never be
selected again is dropped every `SLACK` steps, and only that waits for the device, to learn how many
slots are left.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tokcore.algorithms.alisa.policy import Policy
from tokcore.algorithms.alisa.slots import Slots
from tokcore.ops import (
    prompt_window_scores,
    sparse_decode_attention,
    window_scores_update,
    window_select,
)

SLACK = 64  # decode steps between two compactions: that many dead slots at most
SCORED_QUERIES = 64  # of a prompt, whose rows of weights are in memory at a time
MASK_ELEMENTS = 1 << 24  # of the mask of one block of a prompt's queries


class LayerState(Slots):
    """Keys, values and scores of one attention layer, of which each step reads what a policy says.

    Args:
        policy: which tokens a decode step reads.
        shared: one list of tokens for all heads, as in the paper; else one for each KV head.
        evict: drop what the policy can never select again. Without it every token stays; a decode
            step reads the same, but several queries at once (a further turn) read all tokens. Only
            for `alisa` and `dense`.
        int8: keep keys and values as INT8, with a scale for each token and 64 channels.

    Its tensors are those of `Slots`, and of the last decode step index (B, Hs, M) int32, the slots
    that it read, of which selected (B, Hs) count.

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
        self.policy = policy
        self.evict = evict and not policy.is_dense
        super().__init__(shared=shared, int8=int8)

    def reset(self) -> None:
        """Forgets everything; the next tokens may have another batch size, dtype or device."""
        super().reset()
        self._since_select = self._since_compact = self._since_chunk = 0
        self._settled = True

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
        if selecting and self.evict and self._compaction_is_due():
            self.compact()
            self._settled = True
        idle = None if valid is None or self.seen == 0 else valid == 0
        valid = self.append(key, value, valid, rows=self._ring_rows(key.shape[2]))
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
        first, padded = self.seen == 0, valid is not None
        valid = self.append(key, value, valid, rows=self._ring_rows(key.shape[2]))
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

    def select(self) -> tuple[Tensor, Tensor]:
        """The slots that this step reads, (B, Hs, M) int32 ascending, and how many, (B, Hs)."""
        policy = self.policy
        if policy.stride:
            rank = (self.position % policy.stride == 0).long()
        else:
            # Not selected for so long: behind all that may return, whatever the score.
            alive = self._tokens - 1 - policy.horizon(self._tokens)
            if isinstance(alive, Tensor):
                alive = alive.view(-1, 1, 1)
            rank = self.score.masked_fill(self.last_selected < alive, -1)
        local, top = policy.amounts(self._tokens)
        size = sum(policy.amounts(self.seen)) + policy.sinks
        self.index, self.selected = window_select(
            rank, self.count, self._each(local), self._each(top), size=size, sinks=policy.sinks
        )
        if policy.reselect_every > 1:
            self.index = F.pad(self.index, (0, policy.reselect_every - 1), value=-1)
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
        step = self._each(self._tokens - 1 - after)
        if self._ragged:
            step = step.clamp(min=-1)
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
            self._each(self.policy.rows(self._tokens + 1)),
        )
        if idle is not None:
            for x, rows_before in zip(written, before, strict=True):
                x[idle] = rows_before

    def compact(self) -> None:
        """Drops the tokens that no later step can select, and the memory that this frees."""
        self.keep(
            self._tokens - self.policy.horizon(self._tokens + 1),
            self.policy.amounts(self._tokens)[0],
            sinks=self.policy.sinks,
            room=SLACK,
        )
        self._since_compact = 0

    def crop(self, tokens: int) -> None:
        """Takes the last tokens back, in a dense layer: elsewhere they left traces."""
        if tokens == 0 or self.is_empty:
            return
        if not self.policy.is_dense:
            raise NotImplementedError(
                f"LayerState: {tokens} tokens cannot be taken back, their weights are in the "
                "scores and others were dropped for them; copy.deepcopy the cache before"
            )
        super().crop(tokens)

    # ---- parts ------------------------------------------------------------------------------

    def _check(self, query, key, value, valid) -> None:
        batch, heads, tokens, dim = key.shape
        if value.shape != key.shape:
            raise ValueError(
                f"LayerState: value must have the shape of key, {tuple(key.shape)}, got "
                f"{tuple(value.shape)}"
            )
        if not query.dtype == key.dtype == value.dtype:
            raise TypeError(
                f"LayerState: key and value must have the dtype of query, {query.dtype}, got "
                f"{key.dtype} and {value.dtype}"
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
        if (batch, heads, dim) != kept or key.dtype != self.dtype:
            raise ValueError(
                f"LayerState: key must be ({kept[0]}, {kept[1]}, Q, {kept[2]}) {self.dtype} as "
                f"before, got {tuple(key.shape)} {key.dtype}; call reset() for another batch"
            )

    def _ring_rows(self, tokens: int) -> int:
        """Rows that the ring needs once so many more tokens are there."""
        return 0 if self.policy.is_dense else self.policy.rows(self.seen + tokens + 1)

    def _compaction_is_due(self) -> bool:
        if self._since_compact >= SLACK:
            return True
        # All of a prompt is alive until its own rows have left the horizon; then most of it dies.
        return not self._settled and self._since_chunk >= self.policy.horizon(self.seen + 1)

    def _extend(self, valid: Tensor) -> tuple[Tensor, Tensor]:
        """The last selection, and the token appended since: its slot is the last in use."""
        self.index.scatter_(2, self.selected.long().unsqueeze(2), (self.count - 1).unsqueeze(2))
        self.selected += valid.unsqueeze(1)
        return self.index, self.selected

    def _observe_prompt(self, query, valid, scale, *, rowwise: bool) -> None:
        """Adds the rows that the next score needs; of a later chunk with padding one by one."""
        tokens = query.shape[2]
        wanted = self.policy.rows(self.seen + 1) or tokens
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
        key = self.readable(self.key, self.key_quantization).flatten(0, 1).unsqueeze(1)
        value = self.readable(self.value, self.value_quantization).flatten(0, 1).unsqueeze(1)
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
