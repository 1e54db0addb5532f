"""The model of SongMASS: an encoder and a decoder for lyrics, and one of each for melodies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokcore.algorithms.songmass.batches import NOWHERE
from tokcore.algorithms.songmass.layers import DecoderLayer, EncoderLayer, Segments, sinusoid
from tokcore.algorithms.songmass.tokens import END, MASK, PAD, SEPARATOR, SPECIALS
from tokcore.masking import may_look

KINDS = ("lyric", "melody")
# Sentence and word ids of what has none: they never meet.
_SOURCE_NONE, _TARGET_NONE = NOWHERE["source"], NOWHERE["target"]


class SongMassOutput(NamedTuple):
    """Logits (B, T, V); mean over the layers of the attention constraint (B, T), or None; weights
    of the last layer's cross-attention, mean over the heads, (B, T, S), without gradient, or None.
    """

    logits: Tensor
    constraint: Tensor | None = None
    attention: Tensor | None = None


@dataclass
class DecoderState:
    """What decoding one position after another keeps; made by SongMass.start."""

    target_kind: str
    source_sentences: Tensor  # (B, S)
    keys_values: list[tuple[Tensor, Tensor]]  # of the source, (B, H, S, D) for each layer
    past: list[tuple[Tensor, Tensor]]  # of the decoder, (B, K, H, t, D) for each layer
    closed: Tensor  # (B, K): sentences closed so far, the id of the one being written

    def select(self, parents: Tensor) -> None:
        """Let hypothesis k of each source continue hypothesis parents[b, k], (B, K) int64."""
        rows = torch.arange(len(parents), device=parents.device).unsqueeze(1)
        self.past = [(key[rows, parents], value[rows, parents]) for key, value in self.past]
        self.closed = self.closed[rows, parents]


class SongMass(nn.Module):
    r"""Encoder-decoder transformer from lyric or melody to lyric or melody.

    Four stacks: an encoder and a decoder for each kind. Within one kind a single table embeds the
    input of the encoder and of the decoder and, transposed, makes the logits; nothing is shared
    between the kinds. The layers are those of arXiv 1706.03762, post-norm, with

    .. math::
        x_t = \sqrt{d}\, E[w_t] + \mathrm{pos}(t), \quad
        \mathrm{logits}_t = E\, h_t

    - t counts from the first token that is not padding, so both sides may be padded left or right;
    - keys of the encoder's self-attention are all tokens but <pad> and <mask>;
    - a target token's cross-attention sees the source tokens of its own sentence and no others, in
      every layer (tokcore.ops.segment_attention); the sentence is that of the token being
      predicted.

    Tokens are those of tokcore.algorithms.songmass.tokens, int64; [align] never gets here.

    Args:
        lyric_size, melody_size: sizes of the vocabularies, specials included, >= 8; MELODY_SIZE
            (152) for melodies.
        width: d, even and divisible by heads. Default 512.
        heads: H. Default 8.
        feed_forward: width inside a layer. Default 2048.
        layers: of each stack, >= 1. Default 6.
        dropout: of embeddings, residual branches, inside the feed-forward and of the
            self-attention's weights, in [0, 1). The weights of the cross-attention, which the
            constraint is about, have none. Default 0.1.
        max_positions: longest source and target. Default 1024.

    >>> model = SongMass(20, 152, width=8, heads=2, feed_forward=16, layers=1).eval()
    >>> lyric, melody = torch.tensor([[7, 8, 5, 2]]), torch.tensor([[67, 136, 69, 137, 5, 2]])
    >>> output = model(
    ...     lyric, decoder_input(melody), source_kind="lyric", target_kind="melody",
    ...     source_sentences=torch.tensor([[0, 0, 0, -1]]),
    ...     target_sentences=target_sentence_ids(melody),
    ... )
    >>> output.logits.shape
    torch.Size([1, 6, 152])

    Source: arXiv 2012.05168; microsoft/muzic:songmass/mass/xtransformer.py.
    """

    def __init__(
        self,
        lyric_size: int,
        melody_size: int,
        *,
        width: int = 512,
        heads: int = 8,
        feed_forward: int = 2048,
        layers: int = 6,
        dropout: float = 0.1,
        max_positions: int = 1024,
    ) -> None:
        super().__init__()
        sizes = {"lyric": lyric_size, "melody": melody_size}
        for kind, size in sizes.items():
            if size <= len(SPECIALS):
                least = len(SPECIALS) + 1
                raise ValueError(f"SongMass: {kind}_size must be at least {least}, got {size}")
        if heads < 1 or width % 2 or width < 2 or width % heads:
            raise ValueError(
                f"SongMass: width must be even and divisible by heads, got {width} and {heads}"
            )
        if layers < 1 or feed_forward < 1 or max_positions < 1:
            raise ValueError(
                "SongMass: layers, feed_forward and max_positions must be at least 1, got "
                f"{layers}, {feed_forward}, {max_positions}"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"SongMass: dropout must be in [0, 1), got {dropout}")
        self.width, self.max_positions = width, max_positions
        self.dropout = nn.Dropout(dropout)
        shape = (width, heads, feed_forward, dropout)
        self.embedding, self.encoder, self.decoder = (nn.ModuleDict() for _ in range(3))
        for kind, size in sizes.items():
            table = self.embedding[kind] = nn.Embedding(size, width, padding_idx=PAD)
            nn.init.normal_(table.weight, std=width**-0.5)
            nn.init.zeros_(table.weight[PAD])
            self.encoder[kind] = nn.ModuleList(EncoderLayer(*shape) for _ in range(layers))
            self.decoder[kind] = nn.ModuleList(DecoderLayer(*shape) for _ in range(layers))

    def forward(
        self,
        source: Tensor,
        previous: Tensor,
        *,
        source_kind: str,
        target_kind: str,
        source_sentences: Tensor,
        target_sentences: Tensor,
        source_words: Tensor | None = None,
        target_words: Tensor | None = None,
        positions: Tensor | None = None,
        return_attention: bool = False,
    ) -> SongMassOutput:
        """Logits of every target position, given the tokens before it.

        Args:
            source: (B, S) int64, padded with 1 on either side.
            previous: (B, T) int64, the decoder's input: decoder_input(target), or what MASS made.
            source_kind, target_kind: "lyric" or "melody".
            source_sentences: (B, S) int64, ids 0, 1, ...; -1 at </s> and padding.
            target_sentences: (B, T) int64, of the token being predicted; -2 at </s> and padding.
            source_words, target_words: (B, S), (B, T) int64, both or none: equal ids should attend
                to each other. With them the constraint is computed.
            positions: (B, T) int64, of the decoder's input; default: counted.
            return_attention: return the weights of the last layer's cross-attention.
        Returns:
            SongMassOutput. The constraint of position t is the mean over the layers of

                sum_s (A[t, s] - W[t, s])^2 m[t, s]

            A: cross-attention, mean over heads; W: 1 / count over the source tokens of the same
            word; m: 1 / count over those of the same sentence. Positions without a sentence have 0.
        Raises:
            ValueError, TypeError: a named error for a wrong shape, dtype, kind or length; on the
                CPU also for a token outside the vocabulary or an id where there should be none.
        """
        name = "SongMass"
        self._check_tokens(name, "source", source, source_kind)
        self._check_tokens(name, "previous", previous, target_kind)
        _check_ids(name, "source_sentences", source_sentences, source, _SOURCE_NONE)
        _check_ids(name, "target_sentences", target_sentences, previous, _TARGET_NONE)
        if (source_words is None) != (target_words is None):
            raise ValueError(f"{name}: source_words and target_words must be given both or neither")
        if source_words is not None:
            _check_ids(name, "source_words", source_words, source, _SOURCE_NONE)
            _check_ids(name, "target_words", target_words, previous, _TARGET_NONE)
        if positions is None:
            positions = _positions(previous)
        elif positions.shape != previous.shape or positions.dtype != torch.int64:
            raise ValueError(
                f"{name}: positions must be int64 of shape {tuple(previous.shape)}, got "
                f"{positions.dtype}, {tuple(positions.shape)}"
            )
        encoded = self.encode(source, source_kind)
        x = self._embed(previous, target_kind, positions)
        size = previous.shape[1]
        itself = torch.eye(size, dtype=torch.bool, device=x.device)
        # Padding sees itself: a row that sees nothing is NaN in some attention kernels.
        allowed = (previous != PAD).unsqueeze(1) & itself.new_ones(size, size).tril() | itself
        segments = Segments(target_sentences, source_sentences, target_words, source_words)
        last = segments._replace(return_attention=return_attention)
        stack, constraints = self.decoder[target_kind], []
        for layer in stack:
            x, constraint, attention = layer(
                x, allowed.unsqueeze(1), encoded, last if layer is stack[-1] else segments
            )
            constraints.append(constraint)
        mean = None if source_words is None else torch.stack(constraints).mean(0)
        attention = attention.detach() if return_attention else None
        return SongMassOutput(self._logits(x, target_kind), mean, attention)

    def encode(self, source: Tensor, source_kind: str) -> Tensor:
        """Encode (B, S) tokens: (B, S, width)."""
        x = self._embed(source, source_kind, _positions(source))
        keep = (source != PAD) & (source != MASK)
        itself = torch.eye(source.shape[1], dtype=torch.bool, device=x.device)
        # A row of nothing but <pad> and <mask> sees itself.
        allowed = keep.unsqueeze(1) | itself & ~keep.any(1)[:, None, None]
        for layer in self.encoder[source_kind]:
            x = layer(x, allowed.unsqueeze(1))
        return x

    def start(
        self,
        source: Tensor,
        source_sentences: Tensor,
        *,
        source_kind: str,
        target_kind: str,
        hypotheses: int = 1,
    ) -> DecoderState:
        """Encode sources (B, S) and make ready to decode K hypotheses of each, step by step."""
        name = "SongMass.start"
        self._check_tokens(name, "source", source, source_kind)
        _check_ids(name, "source_sentences", source_sentences, source, _SOURCE_NONE)
        if target_kind not in KINDS:
            raise ValueError(f"{name}: target_kind must be one of {KINDS}, got {target_kind!r}")
        encoded = self.encode(source, source_kind)
        stack = self.decoder[target_kind]
        keys_values = [layer.cross_attention.keys_values(encoded) for layer in stack]
        batch, heads, _, size = keys_values[0][0].shape
        empty = encoded.new_empty(batch, hypotheses, heads, 0, size)
        return DecoderState(
            target_kind,
            source_sentences,
            keys_values,
            [(empty, empty) for _ in stack],
            source.new_zeros(batch, hypotheses),
        )

    def step(self, state: DecoderState, tokens: Tensor) -> Tensor:
        """Logits (B, K, V) of the token after tokens (B, K), which are added to the state.

        The first tokens are </s>. The sentence of the token being predicted is the number of [sep]
        so far. Without dropout, position for position what forward gives.
        """
        written = state.past[0][0].shape[3]
        if tokens.shape != state.closed.shape:
            raise ValueError(
                f"SongMass.step: tokens must have shape {tuple(state.closed.shape)}, got "
                f"{tuple(tokens.shape)}"
            )
        if written >= self.max_positions:
            raise ValueError(
                f"SongMass.step: max_positions is {self.max_positions}, and all are written"
            )
        state.closed = state.closed + (tokens == SEPARATOR)
        x = self._embed(tokens, state.target_kind, torch.full_like(tokens, written))
        segments = Segments(state.closed, state.source_sentences)
        past = []
        for layer, kept, source in zip(
            self.decoder[state.target_kind], state.past, state.keys_values, strict=True
        ):
            x, own = layer.step(x, kept, source, segments)
            past.append(own)
        state.past = past
        return self._logits(x, state.target_kind)

    def _embed(self, tokens: Tensor, kind: str, positions: Tensor) -> Tensor:
        x = self.width**0.5 * self.embedding[kind](tokens)
        return self.dropout(x + sinusoid(positions, self.width).to(x.dtype))

    def _logits(self, x: Tensor, kind: str) -> Tensor:
        return F.linear(x, self.embedding[kind].weight)

    def _check_tokens(self, name: str, key: str, tokens: Tensor, kind: str) -> None:
        if kind not in KINDS:
            raise ValueError(f"{name}: the kind of {key} must be one of {KINDS}, got {kind!r}")
        if tokens.dtype != torch.int64:
            raise TypeError(f"{name}: {key} must be int64, got {tokens.dtype}")
        if tokens.dim() != 2 or tokens.shape[1] > self.max_positions:
            raise ValueError(
                f"{name}: {key} must be (B, length) with at most {self.max_positions} positions, "
                f"got {tuple(tokens.shape)}"
            )
        size = self.embedding[kind].num_embeddings
        if may_look(tokens):
            bad = tokens[(tokens < 0) | (tokens >= size)]
            if len(bad) > 0:
                raise ValueError(
                    f"{name}: {key} must be in [0, {size}), the {kind} vocabulary, got "
                    f"{bad[0].item()}"
                )


def decoder_input(target: Tensor) -> Tensor:
    """The decoder's input for a target: </s>, then the target without its last token.

    Args:
        target: (B, T) int64, padded with 1 on either side.
    Returns:
        (B, T) int64; padding stays where it is.

    >>> decoder_input(torch.tensor([[7, 5, 2, 1], [1, 7, 5, 2]]))
    tensor([[2, 7, 5, 1],
            [1, 2, 7, 5]])
    """
    keep = target != PAD
    before = F.pad(target, (1, 0), value=PAD)[:, :-1]
    first = keep & (keep.cumsum(1) == 1)
    return torch.where(first, END, torch.where(keep, before, PAD))


def target_sentence_ids(target: Tensor) -> Tensor:
    """Sentence ids (B, T) of a target whose sentences end with [sep]; -2 at </s> and padding.

    >>> target_sentence_ids(torch.tensor([[7, 5, 8, 5, 2, 1]]))
    tensor([[ 0,  0,  1,  1, -2, -2]])
    """
    separator = (target == SEPARATOR).long()
    outside = (target == PAD) | (target == END)
    return torch.where(outside, _TARGET_NONE, separator.cumsum(1) - separator)


def _positions(tokens: Tensor) -> Tensor:
    """Counted from the first token that is not padding."""
    return ((tokens != PAD).cumsum(1) - 1).clamp(min=0)


def _check_ids(name: str, key: str, ids: Tensor, tokens: Tensor, none: int) -> None:
    if ids.shape != tokens.shape or ids.dtype != torch.int64:
        raise ValueError(
            f"{name}: {key} must be int64 of shape {tuple(tokens.shape)}, got {ids.dtype}, "
            f"{tuple(ids.shape)}"
        )
    if not may_look(ids):
        return
    bad = ids[(ids < 0) & (ids != none)]
    if len(bad) > 0:
        raise ValueError(f"{name}: {key} must be 0, 1, ... or {none} for none, got {bad[0].item()}")
    bad = ids[(tokens == PAD) & (ids != none)]
    if len(bad) > 0:
        raise ValueError(
            f"{name}: {key} must be {none} at padding, got {bad[0].item()}; are tokens and ids "
            "padded on the same side?"
        )
