"""Layers of the SongMASS transformer: the base layers of "Attention Is All You Need" (post-norm,
ReLU), whose cross-attention sees one sentence.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokcore.ops import segment_attention


class Segments(NamedTuple):
    """Who may look at whom in the cross-attention, and what is to be returned of it."""

    target_sentences: Tensor
    source_sentences: Tensor
    target_words: Tensor | None = None
    source_words: Tensor | None = None
    return_attention: bool = False


def sinusoid(positions: Tensor, width: int) -> Tensor:
    """Sines, then cosines, of positions (..., T) at width / 2 wave lengths; float32."""
    # Computed and not looked up: there is no position outside a table.
    half = width // 2
    exponent = torch.arange(half, device=positions.device, dtype=torch.float32)
    angle = positions.unsqueeze(-1) * torch.exp(exponent * (-math.log(10000) / max(half - 1, 1)))
    return torch.cat([angle.sin(), angle.cos()], -1)


class Attention(nn.Module):
    """The projections of multi-head attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        for name in ("query", "key", "value", "output"):
            projection = nn.Linear(width, width)
            # As if the three projections of the input were one matrix (3 width, width).
            gain = 1.0 if name == "output" else 2**-0.5
            nn.init.xavier_uniform_(projection.weight, gain)
            nn.init.zeros_(projection.bias)
            self.add_module(name, projection)

    def split(self, x: Tensor) -> Tensor:
        """(B, T, width) -> (B, H, T, D)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)

    def merge(self, x: Tensor) -> Tensor:
        """(B, H, T, D) -> (B, T, width), projected."""
        return self.output(x.transpose(-3, -2).flatten(-2))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))


class CrossAttention(Attention):
    """Attention to the source's tokens of the same sentence; where there are none, only a bias."""

    def keys_values(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        return self.split(self.key(encoded)), self.split(self.value(encoded))

    def forward(
        self, x: Tensor, keys_values: tuple[Tensor, Tensor], segments: Segments
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Output (B, T, width), constraint (B, T), weights (B, T, S)."""
        seen = segment_attention(
            self.split(self.query(x)),
            *keys_values,
            segments.target_sentences,
            segments.source_sentences,
            query_words=segments.target_words,
            key_words=segments.source_words,
            return_weights=segments.return_attention,
        )
        return self.merge(seen.output), seen.constraint, seen.weights


class Layer(nn.Module):
    """What encoder and decoder layers share: self-attention and the two linear maps."""

    def __init__(self, width: int, heads: int, feed_forward: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.self_attention = Attention(width, heads)
        self.self_norm = nn.LayerNorm(width)
        self.widen, self.narrow = nn.Linear(width, feed_forward), nn.Linear(feed_forward, width)
        self.last_norm = nn.LayerNorm(width)
        for linear in (self.widen, self.narrow):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def attend(self, x: Tensor, allowed: Tensor) -> Tensor:
        """Self-attention where allowed (B, 1, T or 1, T) is True."""
        query, key, value = self.self_attention.project(x)
        dropout = self.dropout.p if self.training else 0.0
        seen = F.scaled_dot_product_attention(
            query, key, value, attn_mask=allowed, dropout_p=dropout
        )
        return self.self_norm(x + self.dropout(self.self_attention.merge(seen)))

    def transform(self, x: Tensor) -> Tensor:
        inner = self.dropout(F.relu(self.widen(x)))
        return self.last_norm(x + self.dropout(self.narrow(inner)))


class EncoderLayer(Layer):
    """Self-attention to the keys that are allowed, then the feed-forward."""

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        return self.transform(self.attend(x, allowed))


class DecoderLayer(Layer):
    """Self-attention, attention to the source within segments, then the feed-forward."""

    def __init__(self, width: int, heads: int, feed_forward: int, dropout: float) -> None:
        super().__init__(width, heads, feed_forward, dropout)
        self.cross_attention = CrossAttention(width, heads)
        self.cross_norm = nn.LayerNorm(width)

    def forward(
        self, x: Tensor, allowed: Tensor, encoded: Tensor, segments: Segments
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x = self.attend(x, allowed)
        return self._look(x, self.cross_attention.keys_values(encoded), segments)

    def step(
        self,
        x: Tensor,
        past: tuple[Tensor, Tensor],
        keys_values: tuple[Tensor, Tensor],
        segments: Segments,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One position of the K hypotheses of each source, x (B, K, width).

        In the self-attention the hypotheses are apart, with keys and values (B, K, H, t, D) each;
        in the cross-attention they share those of their source, as if they were positions.
        """
        query, *new = (part.transpose(1, 2).unsqueeze(3) for part in self.self_attention.project(x))
        key, value = (torch.cat(pair, 3) for pair in zip(past, new, strict=True))
        seen = F.scaled_dot_product_attention(query, key, value).squeeze(3).transpose(1, 2)
        x = self.self_norm(x + self.self_attention.merge(seen))
        return self._look(x, keys_values, segments)[0], (key, value)

    def _look(
        self, x: Tensor, keys_values: tuple[Tensor, Tensor], segments: Segments
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        seen, constraint, weights = self.cross_attention(x, keys_values, segments)
        x = self.cross_norm(x + self.dropout(seen))
        return self.transform(x), constraint, weights
