"""Songs as tokens, and back: vocabularies, encoding, decoding.

A line is a list of token ids. Lyrics are pieces of words, melodies a pitch and a duration a note,
with a rest as a note of its own before the note that follows it. [align] closes a word and [sep] a
sentence, on both sides, so the k-th [align] of the lyric and of the melody close the same word:

    lyric     twin@@ kle [align] twin@@ kle [align] [sep]
    melody    60 1/4 60 1/4 [align] rest 1/4 67 1/4 67 1/4 [align] [sep]

The ids are those of the authors' dictionaries (microsoft/muzic:songmass/mass): the specials below;
pitch p is 7 + p, a rest 135, and a duration of n steps of 0.25 beats (1 to 16) is 135 + n.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from tokcore.algorithms.songmass.prepare import CAP, STEP
from tokcore.algorithms.songmass.song import Song, Word

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>", "[sep]", "[align]")
BEGIN, PAD, END, UNKNOWN, MASK, SEPARATOR, ALIGN = range(len(SPECIALS))
FIRST_PITCH = len(SPECIALS)
REST = FIRST_PITCH + 128
FIRST_DURATION = REST + 1  # of one step
MELODY_SIZE = FIRST_DURATION + int(CAP / STEP)
CONTINUES = "@@"  # ends a piece of a word that goes on


def syllable_pieces(word: Word) -> list[str]:
    """A word's known syllables in lower case, each but the last marked ``@@``; else the word.

    >>> from tokcore.algorithms.songmass import Note
    >>> syllable_pieces(Word("Gloria", (Note(60, 1),) * 4, ("Glo", "", "ri", "a")))
    ['glo@@', 'ri@@', 'a']
    >>> syllable_pieces(Word("Gloria", ()))
    ['gloria']
    """
    pieces = [syllable.lower() for syllable in word.syllables or (word.text,) if syllable]
    return [piece + CONTINUES for piece in pieces[:-1]] + pieces[-1:]


@dataclass(frozen=True)
class LyricVocabulary:
    """The pieces of words that have a token, and how a word is split into pieces.

    Args:
        pieces: the piece of token 7, 8, ...
        split: (word) -> pieces. A piece that ends in ``@@`` is joined with the next; a word without
            text has no piece.

    >>> vocabulary = LyricVocabulary(("glo@@", "ria"), lambda word: ["glo@@", word.text[3:]])
    >>> vocabulary.encode(Word("gloria", ())), vocabulary.encode(Word("glory", ()))
    ([7, 8], [7, 3])
    >>> len(vocabulary), vocabulary.piece(8), vocabulary.piece(5)
    (9, 'ria', '[sep]')
    """

    pieces: tuple[str, ...]
    split: Callable[[Word], list[str]] = syllable_pieces

    @cached_property
    def _tokens(self) -> dict[str, int]:
        return {piece: token for token, piece in enumerate(self.pieces, start=len(SPECIALS))}

    def __len__(self) -> int:
        return len(SPECIALS) + len(self.pieces)

    def encode(self, word: Word) -> list[int]:
        """The tokens of a word, <unk> for a piece that has none."""
        return [self._tokens.get(piece, UNKNOWN) for piece in self.split(word)]

    def piece(self, token: int) -> str:
        """The piece of a token, or the name of a special."""
        return (SPECIALS + self.pieces)[token]


class EncodedLyric(NamedTuple):
    """A list of tokens for each sentence of a song, [] for one without text."""

    sentences: list[list[int]]
    pieces: int  # encoded in all
    unknown: int  # of them without a token: <unk>


class DecodedMelody(NamedTuple):
    """(pitch, steps) of each note, a list a sentence; pitch 128 is a rest, a step 0.25 beats."""

    sentences: list[list[tuple[int, int]]]
    dropped: int  # tokens that are not in a pair of a pitch and a duration after it
    excess: int  # sentences beyond the number asked for


class DecodedLyric(NamedTuple):
    """The words of each sentence."""

    sentences: list[list[str]]
    dropped: int  # tokens that are no piece, such as <unk>
    excess: int  # sentences beyond the number asked for


def lyric_vocabulary(
    songs: Iterable[Song],
    *,
    split: Callable[[Word], list[str]] = syllable_pieces,
    least: int = 1,
) -> LyricVocabulary:
    """The vocabulary of the pieces that occur in songs, the most frequent first, then by text.

    Args:
        songs: training songs.
        split: as in LyricVocabulary.
        least: how often a piece must occur; a rarer one is <unk>.

    >>> song = Song("s", ((Word("la", ()), Word("La", ()), Word("love", ())),))
    >>> lyric_vocabulary([song]).pieces
    ('la', 'love')
    """
    words = (word for song in songs for sentence in song.sentences for word in sentence)
    counts = Counter(piece for word in words if word.text for piece in split(word))
    pieces = sorted(counts, key=lambda piece: (-counts[piece], piece))
    return LyricVocabulary(tuple(p for p in pieces if counts[p] >= least), split)


def encode_lyric(song: Song, vocabulary: LyricVocabulary) -> EncodedLyric:
    """The lyric of a song as tokens: pieces, [align] after each word, [sep] after each sentence.

    A word without text leaves its [align] alone, so that words keep their numbers.

    >>> song = Song("s", ((Word("la", ()), Word("lu", ())), (Word("", ()),)))
    >>> encode_lyric(song, LyricVocabulary(("la",)))
    EncodedLyric(sentences=[[7, 6, 3, 6, 5], []], pieces=2, unknown=1)
    """
    sentences, pieces, unknown = [], 0, 0
    for sentence in song.sentences:
        words = [vocabulary.encode(word) if word.text else [] for word in sentence]
        pieces += sum(map(len, words))
        unknown += sum(word.count(UNKNOWN) for word in words)
        sentences.append(_close(words))
    return EncodedLyric(sentences, pieces, unknown)


def encode_melody(song: Song) -> list[list[int]]:
    """The melody of a song as tokens: notes, [align] after each word, [sep] after each sentence.

    Returns:
        A list of tokens for each sentence, [] for one without notes.
    Raises:
        ValueError: a duration or rest off the grid (quantise the song first), naming its place.

    >>> from tokcore.algorithms.songmass import Note
    >>> encode_melody(Song("s", ((Word("la", (Note(60, 1.0), Note(62, 4.0, rest=0.25))),),)))
    [[67, 139, 135, 136, 69, 151, 6, 5]]

    Source: microsoft/muzic:songmass/data/generate_lmd_dataset.py.
    """
    return [
        _close([_note_tokens(song, index, word) for word in sentence])
        for index, sentence in enumerate(song.sentences)
    ]


def word_notes(song: Song) -> list[list[tuple[int, int]]]:
    """The (pitch, steps) of the notes and rests of each word, as telemelody_scores takes them.

    Joined, ``[note for word in word_notes(song) for note in word]``, they are what songmass_scores
    takes; so are the sentences of decode_melody.

    Raises:
        ValueError: as encode_melody.

    >>> from tokcore.algorithms.songmass import Note
    >>> word_notes(Song("s", ((Word("la", (Note(60, 1.0), Note(62, 4.0, rest=0.25))),),)))
    [[(60, 4), (128, 1), (62, 16)]]
    """
    words = (
        _note_tokens(song, index, word)
        for index, sentence in enumerate(song.sentences)
        for word in sentence
    )
    return [
        [(p - FIRST_PITCH, d - REST) for p, d in zip(word[::2], word[1::2], strict=True)]
        for word in words
    ]


def note_positions(tokens: Sequence[int]) -> list[tuple[int, int]]:
    """Where the well-formed notes of a melody sentence are: a pitch (or rest), then its duration.

    Tokens that are neither are passed over; of pitches in a row the last one counts, of durations
    in a row the first.

    >>> note_positions([67, 69, 137, 138, 3, 70, 3, 136])
    [(1, 2), (5, 7)]

    Source: microsoft/muzic:songmass/evaluate/utils.py.
    """
    places = [i for i, t in enumerate(tokens) if FIRST_PITCH <= t < MELODY_SIZE]
    return [(p, d) for p, d in pairwise(places) if tokens[p] <= REST < tokens[d]]


def decode_melody(tokens: Sequence[int], *, sentences: int | None = None) -> DecodedMelody:
    """Generated melody tokens as notes, malformed ones filtered out and counted.

    Args:
        tokens: token ids, with or without [align] and </s>; <pad> is passed over.
        sentences: how many sentences there should be, those of the source; further ones are cut.
    Returns:
        DecodedMelody. What follows the last [sep] is a sentence too.
    Raises:
        ValueError: a token outside the melody vocabulary.

    >>> decode_melody([67, 139, 69, 5, 135, 136, 67, 137, 5, 2], sentences=1)
    DecodedMelody(sentences=[[(60, 4)]], dropped=1, excess=1)
    """
    parts, excess = _sentences("decode_melody", tokens, MELODY_SIZE, sentences)
    notes, dropped = [], 0
    for part in parts:
        found = note_positions(part)
        dropped += len(part) - 2 * len(found)
        notes.append([(part[p] - FIRST_PITCH, part[d] - REST) for p, d in found])
    return DecodedMelody(notes, dropped, excess)


def words_of(tokens: Sequence[int], vocabulary: LyricVocabulary) -> list[list[int]]:
    """The positions of the pieces of each word of a lyric sentence; specials are passed over.

    >>> words_of([7, 3, 8, 8], LyricVocabulary(("glo@@", "ria")))
    [[0, 2], [3]]
    """
    words, goes_on = [], False
    for position, token in enumerate(tokens):
        if token >= len(SPECIALS):
            if not goes_on:
                words.append([])
            words[-1].append(position)
            goes_on = vocabulary.piece(token).endswith(CONTINUES)
    return words


def decode_lyric(
    tokens: Sequence[int], vocabulary: LyricVocabulary, *, sentences: int | None = None
) -> DecodedLyric:
    """Generated lyric tokens as words.

    Args:
        tokens: token ids, with or without [align] and </s>; <pad> is passed over.
        sentences: as in decode_melody.
    Returns:
        DecodedLyric.
    Raises:
        ValueError: a token outside the vocabulary.

    >>> decode_lyric([7, 8, 8, 3, 5, 2], LyricVocabulary(("glo@@", "ria")))
    DecodedLyric(sentences=[['gloria', 'ria']], dropped=1, excess=0)
    """
    parts, excess = _sentences("decode_lyric", tokens, len(vocabulary), sentences)
    decoded, dropped = [], 0
    for part in parts:
        words = words_of(part, vocabulary)
        dropped += len(part) - sum(map(len, words))
        texts = ("".join(_bare(vocabulary.piece(part[i])) for i in word) for word in words)
        decoded.append(list(texts))
    return DecodedLyric(decoded, dropped, excess)


def _bare(piece: str) -> str:
    return piece.removesuffix(CONTINUES)


def _close(words: list[list[int]]) -> list[int]:
    if not any(words):
        return []
    return [token for word in words for token in (*word, ALIGN)] + [SEPARATOR]


def _note_tokens(song: Song, sentence: int, word: Word) -> list[int]:
    tokens = []
    for note in word.notes:
        for pitch, beats in ((REST, note.rest), (FIRST_PITCH + note.pitch, note.duration)):
            steps = beats / STEP
            if not 0 <= steps <= CAP / STEP or steps != int(steps):
                raise ValueError(
                    f"encode_melody: durations and rests must be multiples of {STEP} beats up to "
                    f"{CAP} (quantise the song first), got {beats} in song {song.name!r}, sentence "
                    f"{sentence}, word {word.text!r}"
                )
            if steps:  # of a rest only: no note is without a duration
                tokens += [pitch, FIRST_DURATION + int(steps) - 1]
    return tokens


def _sentences(
    name: str, tokens: Sequence[int], size: int, wanted: int | None
) -> tuple[list[list[int]], int]:
    """Parts between [sep], without <pad>, [align] and </s>; those wanted, and how many were cut."""
    parts: list[list[int]] = [[]]
    for token in tokens:
        if not 0 <= token < size:
            raise ValueError(f"{name}: tokens must be in [0, {size}), got {token}")
        if token == SEPARATOR:
            parts.append([])
        elif token not in (PAD, ALIGN, END):
            parts[-1].append(token)
    if not parts[-1]:
        parts.pop()
    kept = parts if wanted is None else parts[:wanted]
    return kept, len(parts) - len(kept)
