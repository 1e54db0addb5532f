"""Windows of songs, their sentence and word ids, and padded batches.

Ids tell a model which source tokens a target token may see (its sentence's) and which it belongs to
(its word's). They are counted in each window from 0; what matches nothing has -1 on the source side
and -2 on the target side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tokcore.algorithms.songmass.tokens import ALIGN, END, PAD, SEPARATOR
from tokcore.masking import pad_rows

NOWHERE = {"source": -1, "target": -2}


class Window(NamedTuple):
    """Whole sentences of one song, joined to a line a side."""

    song: int  # index of the song
    sentences: tuple[int, ...]  # indices of its sentences
    lines: tuple[list[int], ...]


class Windows(NamedTuple):
    """The windows of all songs, and the sentences that are in none."""

    windows: list[Window]
    incomplete: int  # sentences without tokens on some side
    too_long: int  # sentences longer than a window


class Line(NamedTuple):
    """A line as a model takes it, (T,) int64 each."""

    tokens: Tensor  # without [align], </s> at the end
    sentences: Tensor  # number of the sentence, [sep] included; -1 or -2 at </s>
    words: Tensor  # number of the word; [sep] and </s> are words of their own


class Example(NamedTuple):
    """A source and a target: (S,) and (T,) int64, or (B, S) and (B, T) in a batch."""

    source: Tensor
    source_sentences: Tensor
    source_words: Tensor | None  # None: no words are to be aligned
    previous: Tensor  # input of the decoder
    target: Tensor  # what it predicts, <pad> where nothing
    target_sentences: Tensor  # of what is predicted
    target_words: Tensor | None
    positions: Tensor | None  # of previous; None: 0, 1, 2, ...


_PADDING = Example(PAD, -1, -1, PAD, PAD, -2, -2, 0)


def make_windows(
    songs: Sequence[Sequence[list[list[int]]]], *, longest: int = 500, stride: int | None = 250
) -> Windows:
    """Cut songs into windows of whole sentences, at most ``longest`` tokens on each side.

    Sentences that lack a side, or are longer than a window, are left out and counted; a window does
    not reach over one that was too long.

    Args:
        songs: the sides of each song: (lyric, melody), or one side for what is unpaired; a side is
            a list of tokens for each sentence. [align] and [sep] count.
        longest: tokens of a window, [align] and [sep] included.
        stride: by how many tokens of a side the end of a window moves on at most, unless the next
            sentence alone is longer: overlapping windows for training. None: windows one behind the
            other, for evaluation.
    Returns:
        Windows.

    >>> side = [[7, 6, 5], [8, 6, 5], [9, 6, 5]]
    >>> [window.sentences for window in make_windows([[side]], longest=6, stride=3).windows]
    [(0, 1), (1, 2)]
    >>> [window.sentences for window in make_windows([[side]], longest=6, stride=None).windows]
    [(0, 1), (2,)]

    Source: microsoft/muzic:songmass/data/generate_lmd_dataset.py. There the start of a sliding
    window is two sentences too early, so that windows exceed the limit, and a sentence beyond the
    limit never returns.
    """
    name = "make_windows"
    if longest < 1 or (stride is not None and not 1 <= stride <= longest):
        raise ValueError(
            f"{name}: stride must be positive and at most longest, got stride {stride} and longest "
            f"{longest}"
        )
    windows, incomplete, too_long = [], 0, 0
    for song, sides in enumerate(songs):
        if len({len(side) for side in sides}) != 1:
            counts = [len(side) for side in sides]
            raise ValueError(
                f"{name}: the sides of song {song} must have one number of sentences, got {counts}"
            )
        run: list[int] = []
        for index in range(len(sides[0])):
            parts = [side[index] for side in sides]
            if not all(parts):
                incomplete += 1
            elif max(map(len, parts)) > longest:
                too_long += 1
                windows += _windows_of_run(song, sides, run, longest, stride)
                run = []
            else:
                run.append(index)
        windows += _windows_of_run(song, sides, run, longest, stride)
    return Windows(windows, incomplete, too_long)


def encode_line(line: Sequence[int], *, side: str) -> Line:
    """Take [align] out of a line, add </s>, and number sentences and words.

    A word number rises after each [align] and after each [sep], so that the words of both sides,
    their [sep] and their </s> have equal numbers.

    Args:
        line: token ids that end with [sep]: a side of a window.
        side: "source" or "target": whether </s> belongs to sentence -1 or -2.
    Returns:
        Line.
    Raises:
        ValueError: a line that does not end with [sep].

    >>> encode_line([20, 6, 21, 22, 6, 5], side="source")
    Line(tokens=tensor([20, 21, 22,  5,  2]),
         sentences=tensor([ 0,  0,  0,  0, -1]),
         words=tensor([0, 1, 1, 2, 3]))

    Source: microsoft/muzic:songmass/mass/music_mt_dataset.py.
    """
    if side not in NOWHERE:
        raise ValueError(f"encode_line: side must be 'source' or 'target', got {side!r}")
    if not line or line[-1] != SEPARATOR:
        raise ValueError(f"encode_line: line must end with [sep] ({SEPARATOR}), got {line[-3:]}")
    tokens, sentences, words, sentence, word = [], [], [], 0, 0
    for token in line:
        if token != ALIGN:
            tokens.append(token)
            sentences.append(sentence)
            words.append(word)
        sentence += token == SEPARATOR
        word += token in (ALIGN, SEPARATOR)
    ids = ((*tokens, END), (*sentences, NOWHERE[side]), (*words, word))
    return Line(*(torch.tensor(values) for values in ids))


def pair_example(source: Sequence[int], target: Sequence[int]) -> Example:
    """A supervised example of two sides of a window, with words to be aligned.

    >>> example = pair_example([20, 6, 5], [67, 136, 6, 5])
    >>> example.previous, example.target
    (tensor([  2,  67, 136,   5]), tensor([ 67, 136,   5,   2]))
    """
    given, wanted = encode_line(source, side="source"), encode_line(target, side="target")
    previous = torch.cat([torch.tensor([END]), wanted.tokens[:-1]])
    return Example(*given, previous, *wanted, positions=None)


def collate(examples: Sequence[Example], *, left: bool = False) -> Example:
    """Pad examples to a batch, tokens and ids on the same side.

    The authors' batches have the source's tokens padded on the left and its ids on the right, which
    shifts ids against tokens in all rows but the longest.

    Args:
        examples: of one kind: a field is None in all or in none.
        left: pad on the left, source and target.
    Returns:
        Example of (B, S) and (B, T): tokens padded with <pad>, source ids with -1, target ids with
        -2, positions with 0.
    Raises:
        ValueError: no example, or examples of different kinds.

    >>> batch = collate([pair_example([20, 6, 5], [67, 136, 6, 5]), pair_example([5], [5])])
    >>> batch.source, batch.source_sentences
    (tensor([[20,  5,  2],
             [ 5,  2,  1]]), tensor([[ 0,  0, -1],
                                     [ 0, -1, -1]]))

    Source: microsoft/muzic:songmass/mass/music_mt_dataset.py.
    """
    if not examples:
        raise ValueError("collate: examples must not be empty, got none")
    fields = []
    for field, rows, padding in zip(
        Example._fields, zip(*examples, strict=True), _PADDING, strict=True
    ):
        missing = sum(row is None for row in rows)
        if missing not in (0, len(rows)):
            raise ValueError(
                f"collate: {field} must be given in all examples or in none, got it in "
                f"{len(rows) - missing} of {len(rows)}"
            )
        fields.append(None if missing else pad_rows(rows, padding, left=left))
    return Example(*fields)


def _windows_of_run(song, sides, run, longest, stride) -> list[Window]:
    ends = [[0] for _ in sides]  # running lengths of each side over the sentences of the run
    for total, side in zip(ends, sides, strict=True):
        for index in run:
            total.append(total[-1] + len(side[index]))

    def length(first: int, end: int) -> int:
        return max(total[end] - total[first] for total in ends)

    found, first, end = [], 0, 0
    while end < len(run):
        start, limit = end, stride if found and stride is not None else longest
        end += 1  # the stride may be less than a sentence
        while end < len(run) and length(start, end + 1) <= limit:
            end += 1
        if stride is None:
            first = start
        while length(first, end) > longest:
            first += 1
        indices = tuple(run[first:end])
        lines = tuple([token for i in indices for token in side[i]] for side in sides)
        found.append(Window(song, indices, lines))
    return found
