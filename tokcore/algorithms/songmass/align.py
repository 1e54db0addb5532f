"""Which notes are sung on which pieces of the lyric: attention, cut by sentence and aligned.

A sentence's cross-attention from N notes (a pitch row and a duration row each) to L lyric pieces is
summed over the two rows, rests are taken out, and tokcore.ops.monotonic_align groups what is left,
M sounding notes and L pieces, in order and without gaps: one note on several pieces, or several
notes on one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tokcore.algorithms.songmass.batches import Line
from tokcore.algorithms.songmass.song import Note, Song, Word
from tokcore.algorithms.songmass.tokens import (
    ALIGN,
    CONTINUES,
    END,
    FIRST_PITCH,
    PAD,
    REST,
    SEPARATOR,
    STEP,
    note_positions,
)
from tokcore.ops import monotonic_align


class Group(NamedTuple):
    """Notes and pieces that belong together, as indices into those of their sentence."""

    notes: tuple[int, ...]  # () where the sentence has no sounding note
    pieces: tuple[int, ...]  # () where it has no lyric


class SentenceAlignment(NamedTuple):
    """A sentence and its groups, in order; every sounding note and every piece is in one group."""

    notes: list[tuple[int, int]]  # (pitch, steps of 0.25 beats); pitch 128 is a rest, in no group
    pieces: list[int]  # tokens
    groups: list[Group]
    dropped: int  # melody tokens that are not in a pair of a pitch and a duration after it


class SongAlignment(NamedTuple):
    """The sentences of all windows of a song, one behind the other."""

    sentences: list[SentenceAlignment]
    unmatched: int  # sentences of a window without one on the other side
    dropped: int  # melody tokens of the sentences that are in no note


def align_sentence(
    attention: Tensor,
    melody: Sequence[int],
    lyric: Sequence[int],
    *,
    length_penalty: float = 0.5,
) -> SentenceAlignment:
    """Align one sentence; align_sentences with a batch of one.

    >>> attention = torch.tensor([[.9, .1], [.8, .2], [.7, .3], [.9, .1], [.2, .8], [.1, .9]])
    >>> found = align_sentence(attention, [67, 136, 69, 136, 71, 136], [8, 9])
    >>> found.groups  # two notes on the first piece, one on the second
    [Group(notes=(0, 1), pieces=(0,)), Group(notes=(2,), pieces=(1,))]
    """
    return align_sentences([attention], [melody], [lyric], length_penalty=length_penalty)[0]


def align_sentences(
    attentions: Sequence[Tensor],
    melodies: Sequence[Sequence[int]],
    lyrics: Sequence[Sequence[int]],
    *,
    length_penalty: float = 0.5,
) -> list[SentenceAlignment]:
    """Align sentences by their cross-attention, all in one call of tokcore.ops.monotonic_align.

    Equivalent, for each sentence, to::

        scores = attention[pitch_rows].double() + attention[duration_rows].double()
        scores = scores[not_rests]                                   # (M, L)
        groups = the segmentation of (M, L) with the largest sum of the means of its groups, each
                 less length_penalty * notes / M (one piece) or * pieces / L (one note)

    Without a sounding note all pieces are one group, without a piece all notes are.

    Args:
        attentions: (T, L) float each: a row for each melody token, a column for each piece. For
            melody-to-lyric attention, its transpose.
        melodies: T token ids each, without [sep] and [align]. Rows of malformed notes are not used.
        lyrics: L token ids each, without [sep] and [align].
        length_penalty: against long groups; 0.5 is the authors'.
    Returns:
        A SentenceAlignment for each sentence.
    Raises:
        ValueError: naming the sentence: a shape that does not fit, a [sep] or [align] among the
            tokens, attention that is not finite in the rows of a sounding note.

    Source: microsoft/muzic:relyme/songmass_en/gen_at/11_l2m_dp_bak.py.
    """
    name = "align_sentences"
    if not len(attentions) == len(melodies) == len(lyrics):
        counts = (len(attentions), len(melodies), len(lyrics))
        raise ValueError(
            f"{name}: attentions, melodies and lyrics must be one a sentence, got {counts}"
        )
    found, sounding, matrices = [], [], []
    for index, (attention, melody, lyric) in enumerate(
        zip(attentions, melodies, lyrics, strict=True)
    ):
        _check_sentence(f"{name}: sentence {index}", attention, melody, lyric)
        rows = torch.tensor(note_positions(melody), dtype=torch.int64).view(-1, 2)
        notes = [(melody[p] - FIRST_PITCH, melody[d] - REST) for p, d in rows.tolist()]
        heard = [i for i, (pitch, _) in enumerate(notes) if pitch < REST - FIRST_PITCH]
        # float64, as the authors add numbers read from text.
        matrices.append(attention.detach()[rows[heard].to(attention.device)].double().sum(1))
        sounding.append(heard)
        found.append(SentenceAlignment(notes, list(lyric), [], len(melody) - 2 * len(notes)))
    groups = _group(matrices, length_penalty)
    return [
        sentence._replace(groups=[Group(tuple(heard[i] for i in notes), p) for notes, p in one])
        for sentence, heard, one in zip(found, sounding, groups, strict=True)
    ]


def align_song(
    attentions: Sequence[Tensor],
    melodies: Sequence[Sequence[int]],
    lyrics: Sequence[Sequence[int]],
    *,
    length_penalty: float = 0.5,
) -> SongAlignment:
    """Align the windows of a song, the k-th melody sentence with the k-th lyric sentence of each.

    Args:
        attentions: (T, S) float for each window: of the last decoder layer, mean of the heads, a
            row for each melody token and a column for each lyric token, [sep] and what follows the
            last [sep] included.
        melodies, lyrics: T and S token ids for each window, without [align]; <pad> and </s> may
            follow the last [sep] (or, of a melody that was never closed, the last token).
        length_penalty: as in align_sentences.
    Returns:
        SongAlignment. A sentence without a partner in its window is counted, not aligned. Attention
        between sentences, and so between windows, is never used.
    Raises:
        ValueError: as align_sentences, and windows that are not given once on each side.

    >>> attention = torch.eye(6)[:, [0, 2, 3, 5]]
    >>> song = align_song([attention], [[67, 136, 5, 69, 136, 5]], [[8, 5, 9, 5]])
    >>> [sentence.notes for sentence in song.sentences], song.unmatched
    ([[(60, 1)], [(62, 1)]], 0)

    Source: microsoft/muzic:relyme/songmass_en/gen_at/11_l2m_dp_bak.py.
    """
    if not len(attentions) == len(melodies) == len(lyrics):
        counts = (len(attentions), len(melodies), len(lyrics))
        raise ValueError(
            f"align_song: attentions, melodies and lyrics must be one a window, got {counts}"
        )
    parts, unmatched = [], 0
    for index, (attention, melody, lyric) in enumerate(
        zip(attentions, melodies, lyrics, strict=True)
    ):
        shape = (len(melody), len(lyric))
        if tuple(attention.shape) != shape:
            raise ValueError(
                f"align_song: attention of window {index} must have shape {shape}, a row for each "
                f"melody token and a column for each lyric token, got {tuple(attention.shape)}"
            )
        rows, columns = _bounds(melody), _bounds(lyric)
        unmatched += abs(len(rows) - len(columns))
        for (a, b), (c, d) in zip(rows, columns, strict=False):
            parts.append((attention[a:b, c:d], melody[a:b], lyric[c:d]))
    sides = zip(*parts, strict=True) if parts else ((), (), ())
    sentences = align_sentences(*map(list, sides), length_penalty=length_penalty)
    return SongAlignment(sentences, unmatched, sum(one.dropped for one in sentences))


def piece_words(line: Line) -> list[list[int]]:
    """The number of the word of each piece, a list a sentence, of a lyric line from encode_line.

    >>> from tokcore.algorithms.songmass.batches import encode_line
    >>> piece_words(encode_line([20, 21, 6, 5, 22, 6, 5], side="source"))
    [[0, 0], [2]]
    """
    tokens, words = line.tokens.tolist(), line.words.tolist()
    return [words[start:end] for start, end in _bounds(tokens)]


def real_words(line: Line) -> list[list[int]]:
    """The number of the word of each note, -1 for a rest, a list a sentence, of a melody line.

    >>> from tokcore.algorithms.songmass.batches import encode_line
    >>> real_words(encode_line([67, 136, 6, 135, 136, 69, 136, 6, 5], side="target"))
    [[0, -1, 1]]
    """
    tokens, words = line.tokens.tolist(), line.words.tolist()
    return [
        [
            -1 if tokens[start + pitch] == REST else words[start + pitch]
            for pitch, _ in note_positions(tokens[start:end])
        ]
        for start, end in _bounds(tokens)
    ]


def note_words(alignment: SentenceAlignment, words: Sequence[int]) -> list[tuple[int, ...]]:
    """The words that each note of a sentence is sung on; none for a rest.

    Args:
        alignment: of a sentence.
        words: the number of the word of each piece, from piece_words.

    >>> groups = [Group((0, 2), (0,)), Group((3,), (1, 2))]
    >>> sentence = SentenceAlignment([(60, 1), (128, 1), (62, 1), (64, 1)], [7, 8, 9], groups, 0)
    >>> note_words(sentence, [4, 4, 5])
    [(4,), (), (4,), (4, 5)]
    """
    if len(words) != len(alignment.pieces):
        raise ValueError(
            f"note_words: words must be one for each of the {len(alignment.pieces)} pieces, got "
            f"{len(words)}"
        )
    found: list[tuple[int, ...]] = [()] * len(alignment.notes)
    for group in alignment.groups:
        several = tuple(sorted({words[piece] for piece in group.pieces}))
        for note in group.notes:
            found[note] = several
    return found


def aligned_song(name: str, alignment: SongAlignment, pieces: Sequence[Sequence[str]]) -> Song:
    """The song that an alignment says, syllables under their notes.

    Words that share a note become one word with a space in its text; the silence before a note is
    the sum of the rests there, also of those that end the sentence before it.

    Args:
        name: of the song.
        alignment: from align_song.
        pieces: the text of each piece of each sentence, ``@@`` at the end of one that goes on.
    Returns:
        Song. A sentence without notes keeps its words, one without pieces its notes.
    Raises:
        ValueError: pieces that are not those of the alignment in number.

    >>> groups = [Group((0, 2), (0,)), Group((3,), (1, 2))]
    >>> sentence = SentenceAlignment([(60, 4), (128, 2), (62, 4), (64, 4)], [7, 8, 9], groups, 0)
    >>> song = aligned_song("s", SongAlignment([sentence], 0, 0), [["lu@@", "na", "e"]])
    >>> [(word.text, word.syllables) for word in song.sentences[0]]
    [('luna e', ('lu', '', 'na e'))]
    >>> list(song.notes())[1]
    Note(pitch=62, duration=1.0, rest=0.5)
    """
    counts = [len(sentence.pieces) for sentence in alignment.sentences]
    if counts != [len(texts) for texts in pieces]:
        raise ValueError(
            f"aligned_song: pieces must be those of the sentences, {counts} in number, got "
            f"{[len(texts) for texts in pieces]}"
        )
    sentences, silence = [], 0.0
    for sentence, texts in zip(alignment.sentences, pieces, strict=True):
        notes: list[Note | None] = []
        for pitch, steps in sentence.notes:
            rest = pitch == REST - FIRST_PITCH
            notes.append(None if rest else Note(pitch, steps * STEP, silence))
            silence = silence + steps * STEP if rest else 0.0
        sentences.append(tuple(_words(sentence.groups, notes, texts)))
    return Song(name, tuple(sentences))


def _words(groups: list[Group], notes: list[Note | None], texts: Sequence[str]) -> list[Word]:
    words: list[Word] = []
    syllables: list[str] = []
    sung: list[Note] = []
    for group in groups:
        mine = [notes[index] for index in group.notes]
        parts = [texts[index] for index in group.pieces]
        texts_here = (p.removesuffix(CONTINUES) if _goes_on(p) else f"{p} " for p in parts)
        syllable = "".join(texts_here).removesuffix(" ")
        if not mine:
            return [Word(text, ()) for text in syllable.split(" ")]
        if not parts:
            return [Word("", tuple(mine))]
        syllables += [syllable] + [""] * (len(mine) - 1)
        sung += mine
        if not _goes_on(parts[-1]) or group is groups[-1]:
            words.append(Word("".join(syllables), tuple(sung), tuple(syllables)))
            syllables, sung = [], []
    return words


def _goes_on(piece: str) -> bool:
    return piece.endswith(CONTINUES)


def _group(
    matrices: list[Tensor], length_penalty: float
) -> list[list[tuple[range, tuple[int, ...]]]]:
    """(rows, columns) of the groups of each matrix (M, L)."""
    found: list[list[tuple[range, tuple[int, ...]]]] = []
    full = [index for index, matrix in enumerate(matrices) if matrix.numel()]
    for matrix in matrices:
        rows, columns = matrix.shape
        found.append([(range(rows), tuple(range(columns)))] if rows + columns else [])
    if not full:
        return found
    lengths = torch.tensor([matrices[index].shape for index in full]).T.contiguous()
    scores = matrices[full[0]].new_zeros(len(full), *lengths.amax(1).tolist())
    for score, index in zip(scores, full, strict=True):
        rows, columns = matrices[index].shape
        score[:rows, :columns] = matrices[index]
    finite = scores.isfinite().all(-1).all(-1).tolist()
    if not all(finite):
        place = f"sentence {full[finite.index(False)]}"
        raise ValueError(f"align_sentences: {place}: attention must be finite")
    lengths = lengths.to(scores.device)
    result = monotonic_align(scores, *lengths, length_penalty=length_penalty)
    groups, counts = result.groups.tolist(), result.group_count.tolist()
    for index, several, count in zip(full, groups, counts, strict=True):
        found[index] = [(range(a, b), tuple(range(c, d))) for a, b, c, d in several[:count]]
    return found


def _bounds(tokens: Sequence[int]) -> list[tuple[int, int]]:
    """Where each sentence of a line starts and ends, its [sep] left out."""
    found, start = [], 0
    for position, token in enumerate(tokens):
        if token == SEPARATOR:
            found.append((start, position))
            start = position + 1
    end = len(tokens)
    while end > start and tokens[end - 1] in (PAD, END):
        end -= 1
    return found + ([(start, end)] if end > start else [])


def _check_sentence(place: str, attention: Tensor, melody, lyric) -> None:
    shape = (len(melody), len(lyric))
    if tuple(attention.shape) != shape or not attention.is_floating_point():
        raise ValueError(
            f"{place}: attention must be floating point of shape {shape}, a row for each melody "
            f"token and a column for each piece, got {attention.dtype} {tuple(attention.shape)}"
        )
    for side, tokens in (("melody", melody), ("lyric", lyric)):
        for token in (SEPARATOR, ALIGN):
            if token in tokens:
                raise ValueError(
                    f"{place}: {side} must hold no [sep] ({SEPARATOR}) nor [align] ({ALIGN}), got "
                    f"{token}"
                )
