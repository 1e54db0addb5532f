"""Song-level MASS: masked spans all over a song, which the decoder writes from the rest.

Two modes, because the paper's figure and the authors' code differ in more than a constant:

                    "code"                              "paper"
    [sep]           left out                            kept, in encoder and decoder
    spans           one in each of round(T r / 10)      one in each sentence
                    segments of equal length
    encoder         80 % <mask>, 10 % random, 10 % kept  <mask>
    decoder input   the token before each of the        the token before it, where both are in the
                    span's, replaced likewise           span; <mask> elsewhere
    positions       0, 1, 2, ... over all spans         of the song
    decoder length  tokens in spans                     all tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from tokcore.algorithms.songmass.batches import Example
from tokcore.algorithms.songmass.tokens import (
    ALIGN,
    END,
    FIRST_DURATION,
    FIRST_PITCH,
    MASK,
    MELODY_SIZE,
    PAD,
    REST,
    SEPARATOR,
)

_TOKENS_IN_A_SPAN = 10
_MASKED, _RANDOM = 0.8, 0.1  # shares of the span's tokens; the rest is kept


def mass_example(
    line: Sequence[int],
    *,
    kind: str,
    size: int,
    mode: str,
    ratio: float = 0.25,
    official_ranges: bool = False,
    generator: torch.Generator | None = None,
) -> Example:
    """Mask spans of a line and make them the target: one unsupervised example.

    In both modes a span of n of L tokens has n = max(1, round(L ratio)), and in a melody, where
    notes stay whole, n even and at least 2. A span of "code" starts its segment with probability
    0.2, ends it with 0.2, else it lies anywhere; a span of "paper" lies anywhere in its sentence.

    Args:
        line: token ids, a side of a window; [align] is passed over.
        kind: "lyric" or "melody".
        size: of the vocabulary, to draw random tokens from.
        mode: "code" or "paper". No default: see the table above.
        ratio: share of tokens that is masked, in (0, 1]; 0.25 is the code's, the paper's is not
            known to us.
        official_ranges: draw random tokens of "code" as the authors do, one index too early: a
            lyric piece may become [align], a duration a rest.
        generator: of the spans and random tokens, on the CPU.
    Returns:
        Example without words. "code": target is the spans one behind the other. "paper": target is
        as long as the song, <pad> outside the spans, and positions are given.
    Raises:
        ValueError: a wrong setting, a line without tokens, a token outside the vocabulary, a melody
            that is not pitch and duration in turn.

    >>> line, rng = [7, 6, 8, 6, 5, 9, 6, 10, 6, 5], torch.Generator().manual_seed(1)
    >>> example = mass_example(line, kind="lyric", size=11, mode="paper", generator=rng)
    >>> example.source, example.previous, example.target  # of each sentence one token
    (tensor([7, 4, 5, 9, 4, 5, 2]), tensor([2, 4, 4, 5, 4, 4]), tensor([ 1,  8,  1,  1, 10,  1]))

    Source: microsoft/muzic:songmass/mass/music_mass_dataset.py and the figure beside it, arXiv
    2012.05168.
    """
    _check(line, kind, size, mode, ratio, official_ranges)
    pairs = kind == "melody"
    tokens = torch.tensor([token for token in line if token != ALIGN])
    closes = tokens == SEPARATOR
    _check_tokens(tokens, closes, size, pairs)
    sentences = closes.cumsum(0) - closes.long()
    if mode == "code":
        tokens, sentences = tokens[~closes], sentences[~closes]
        segments = _equal_segments(len(tokens), ratio, pairs)
        spans = [_span(*segment, ratio, pairs, True, generator) for segment in segments]
        lowest = (FIRST_DURATION if pairs else FIRST_PITCH) - official_ranges

        def corrupt(part: Tensor) -> Tensor:
            return _corrupt(part, pairs, lowest, size, generator)

        return _code_example(tokens, sentences, spans, corrupt)
    ends = [-1, *closes.nonzero().flatten().tolist(), len(tokens)]
    segments = [(start + 1, end) for start, end in pairwise(ends) if start + 1 < end]
    spans = [_span(*segment, ratio, pairs, False, generator) for segment in segments]
    return _paper_example(tokens, sentences, spans)


def _code_example(tokens, sentences, spans, corrupt) -> Example:
    spans = [torch.arange(*span) for span in spans]
    inside = torch.cat(spans)
    source = tokens.clone()
    source[inside] = corrupt(tokens[inside])
    # Of a melody, the token before a pitch is a duration: turned by one, notes are whole again (the
    # last one with the duration before the span), and are drawn as notes.
    turned = torch.cat([span.roll(-1) for span in spans])
    previous = torch.cat([torch.tensor([END]), tokens[:-1]])
    previous[turned] = corrupt(previous[turned])
    return Example(
        *_close_source(source, sentences),
        source_words=None,
        previous=previous[inside],
        target=tokens[inside],
        target_sentences=sentences[inside],
        target_words=None,
        positions=None,
    )


def _paper_example(tokens, sentences, spans) -> Example:
    span_of = torch.full_like(tokens, -1)
    for number, (start, end) in enumerate(spans):
        span_of[start:end] = number
    before = torch.cat([torch.tensor([END]), tokens[:-1]])
    known = (before == SEPARATOR) | (before == END)
    known[1:] |= (span_of[1:] == span_of[:-1]) & (span_of[1:] >= 0)
    return Example(
        *_close_source(torch.where(span_of >= 0, MASK, tokens), sentences),
        source_words=None,
        previous=torch.where(known, before, MASK),
        target=torch.where(span_of >= 0, tokens, PAD),
        target_sentences=sentences,
        target_words=None,
        positions=torch.arange(len(tokens)),
    )


def _close_source(source: Tensor, sentences: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([source, torch.tensor([END])]), torch.cat([sentences, torch.tensor([-1])])


def _equal_segments(length: int, ratio: float, pairs: bool) -> list[tuple[int, int]]:
    count = max(1, round(length / (_TOKENS_IN_A_SPAN / ratio)))
    bounds = [index * (length // count) for index in range(count)] + [length]
    if pairs:
        bounds = [bound - bound % 2 for bound in bounds]
    return list(pairwise(bounds))


def _span(start, end, ratio, pairs, edges, generator) -> tuple[int, int]:
    length = round((end - start) * ratio)
    length = max(2, length - length % 2) if pairs else max(1, length)
    last = end - length
    where = torch.rand((), generator=generator).item() if edges else 0.0
    if where >= 0.8:
        begin = start
    elif where >= 0.6:
        begin = last
    else:
        begin = int(torch.randint(start, last + 1, (), generator=generator))
        begin -= (begin - start) % 2 if pairs else 0
    return begin, begin + length


def _corrupt(tokens: Tensor, pairs: bool, lowest: int, size: int, generator) -> Tensor:
    """80 % <mask>, 10 % random, 10 % kept, drawn for each token, or for each note of a melody."""
    width = 2 if pairs else 1
    draw = torch.rand(len(tokens) // width, 1, generator=generator)
    shape = draw.shape
    random = torch.randint(lowest, size, shape, generator=generator)
    if pairs:
        pitches = torch.randint(FIRST_PITCH, REST, shape, generator=generator)
        random = torch.cat([pitches, random], 1)
    found = torch.where(draw < _MASKED + _RANDOM, random, tokens.view(-1, width))
    return torch.where(draw < _MASKED, MASK, found).flatten()


def _check(line, kind, size, mode, ratio, official_ranges) -> None:
    name = "mass_example"
    for argument, value, choices in (
        ("kind", kind, ("lyric", "melody")),
        ("mode", mode, ("code", "paper")),
    ):
        if value not in choices:
            raise ValueError(f"{name}: {argument} must be one of {choices}, got {value!r}")
    if not 0 < ratio <= 1:
        raise ValueError(f"{name}: ratio must be in (0, 1], got {ratio}")
    if official_ranges and mode == "paper":
        raise ValueError(f"{name}: official_ranges is for mode 'code': 'paper' draws no tokens")
    least = FIRST_PITCH + 1 if kind == "lyric" else MELODY_SIZE
    if size < least:
        raise ValueError(f"{name}: size of a {kind} vocabulary must be {least} or more, got {size}")
    if all(token in (ALIGN, SEPARATOR) for token in line):
        raise ValueError(f"{name}: line must hold a token beside [align] and [sep], got none")


def _check_tokens(tokens: Tensor, closes: Tensor, size: int, pairs: bool) -> None:
    name = "mass_example"
    wrong = tokens[(tokens < 0) | (tokens >= size)]
    if len(wrong):
        raise ValueError(f"{name}: line must hold tokens in [0, {size}), got {wrong[0]}")
    if pairs:
        inside = (~closes).cumsum(0)  # tokens up to here that are no [sep]
        first, notes = inside % 2 == 1, tokens >= FIRST_PITCH
        alternate = notes & ((tokens <= REST) == first)
        if not bool(torch.where(closes, ~first, alternate).all()) or bool(first[-1]):
            raise ValueError(
                f"{name}: line of a melody must be pitch and duration in turn, got "
                f"{tokens[:8].tolist()} ..."
            )
