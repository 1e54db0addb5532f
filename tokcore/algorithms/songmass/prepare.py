"""Preparation of songs: the grid of durations, the key, and what is rejected.

It follows the authors' data script (microsoft/muzic:songmass/data/generate_lmd_dataset.py), with
what it loses counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from tokcore.algorithms.songmass.song import Note, Song

STEP = 0.25  # beats: the grid of durations and rests
CAP = 4.0  # beats: the longest duration or rest that has a token
SCALES = {
    "major": (0, 2, 4, 5, 7, 9, 11),
    "natural minor": (0, 2, 3, 5, 7, 8, 10),
    "harmonic minor": (0, 2, 3, 5, 7, 8, 11),
    "melodic minor": (0, 2, 3, 5, 7, 9, 11),
}
_A, _OCTAVE = (
    9,
    5,
)  # where minor goes, and where the most common octave goes (C to B above middle C)


class Quantised(NamedTuple):
    """A song on the grid of tokens, and how many values the grid changed by more than rounding."""

    song: Song
    moved: int  # durations and rests that were not multiples of 0.25 beats, and lie within the cap
    raised: int  # durations nearer to 0 than to 0.25: now 0.25
    vanished: int  # rests nearer to 0 than to 0.25: now none
    capped: int  # durations and rests beyond 4 beats: now 4


class KeyNormalised(NamedTuple):
    """A song in C major or A minor, and what it was."""

    song: Song
    tonic: int  # 0 = C ... 11 = B
    scale: str  # a key of SCALES
    shift: int  # semitones added


class Prepared(NamedTuple):
    """Songs ready to be encoded, the rejected ones, and the counts of Quantised over all songs."""

    songs: list[Song]
    rejected: list[str]  # names of songs with one pitch six times or more in a row
    moved: int
    raised: int
    vanished: int
    capped: int


def quantise(song: Song, *, strict: bool = False) -> Quantised:
    """Round durations and rests to multiples of 0.25 beats, at most 4: what has a token.

    Equivalent to ``min(round(x / 0.25) * 0.25, 4.0)``, halves rounding to even, but a duration that
    would become 0 becomes 0.25 (the authors' script fails there).

    Args:
        song: any song.
        strict: raise instead of counting a raised, vanished or capped value.
    Returns:
        Quantised: the song and the counts.
    Raises:
        ValueError: with strict, naming song, sentence, word and value.

    >>> from tokcore.algorithms.songmass.song import Word
    >>> song = Song("s", ((Word("la", (Note(60, 1 / 3), Note(62, 6.0, rest=0.1))),),))
    >>> quantise(song)._replace(song=None)
    Quantised(song=None, moved=1, raised=0, vanished=1, capped=1)
    """
    counts: Counter[str] = Counter()

    def on_grid(value: float, smallest: float, place: str, kind: str) -> float:
        rounded = float(round(value / STEP) * STEP)
        if rounded > CAP:
            change, rounded = "capped", CAP
        elif value > 0 and rounded == 0:
            change, rounded = ("raised" if smallest else "vanished"), smallest
        else:
            counts["moved"] += rounded != value
            return rounded
        if strict:
            rule = f"{kind} must be at most {CAP} beats and not round to 0"
            raise ValueError(f"quantise: {rule}, got {value} in {place}")
        counts[change] += 1
        return rounded

    sentences = []
    for index, sentence in enumerate(song.sentences):
        words = []
        for word in sentence:
            place = f"song {song.name!r}, sentence {index}, word {word.text!r}"
            notes = tuple(
                Note(
                    note.pitch,
                    on_grid(note.duration, STEP, place, "duration"),
                    on_grid(note.rest, 0.0, place, "rest"),
                )
                for note in word.notes
            )
            words.append(replace(word, notes=notes))
        sentences.append(tuple(words))
    song = replace(song, sentences=tuple(sentences))
    return Quantised(song, *(counts[name] for name in Quantised._fields[1:]))


def normalise_key(song: Song) -> KeyNormalised:
    """Transpose a song to C major or A minor, and its most common octave to 60..71.

    For each tonic C, C#, ..., B and each scale major, natural, harmonic, melodic minor, in this
    order, the notes inside the scale are counted; the first maximum wins. Among octaves equally
    common, the one heard first wins.

    Returns:
        KeyNormalised.
    Raises:
        ValueError: a song without notes, or one so wide that a pitch would leave 0..127.

    >>> from tokcore.algorithms.songmass.song import Word
    >>> song = Song("s", ((Word("", tuple(Note(p, 1) for p in (50, 54, 57, 61, 62))),),))
    >>> result = normalise_key(song)  # d f# a c# d
    >>> [note.pitch for note in result.song.notes()], result.tonic, result.scale, result.shift
    ([60, 64, 67, 71, 72], 2, 'major', 10)
    """
    pitches = [note.pitch for note in song.notes()]
    if not pitches:
        raise ValueError(f"normalise_key: song {song.name!r} must hold a note, got none")
    classes = Counter(pitch % 12 for pitch in pitches)
    inside = {
        (tonic, scale): sum(classes[(tonic + degree) % 12] for degree in degrees)
        for tonic in range(12)
        for scale, degrees in SCALES.items()
    }
    tonic, scale = max(inside, key=inside.__getitem__)  # the first of equals
    shift = (0 if scale == "major" else _A) - tonic
    octaves = Counter((pitch + shift) // 12 for pitch in pitches)
    shift += 12 * (_OCTAVE - octaves.most_common(1)[0][0])
    lowest, highest = min(pitches) + shift, max(pitches) + shift
    if lowest < 0 or highest > 127:
        raise ValueError(
            f"normalise_key: song {song.name!r} must stay within pitches 0..127 when moved by "
            f"{shift} semitones, got {lowest}..{highest}"
        )
    sentences = tuple(
        tuple(
            replace(word, notes=tuple(replace(n, pitch=n.pitch + shift) for n in word.notes))
            for word in sentence
        )
        for sentence in song.sentences
    )
    return KeyNormalised(replace(song, sentences=sentences), tonic, scale, shift)


def longest_run(song: Song, *, final: bool = True) -> int:
    """How often one pitch is repeated without another in between, at most; rests do not interrupt.

    Args:
        final: False leaves out the run that ends the song: the authors' filter overlooks it.

    >>> from tokcore.algorithms.songmass.song import Word
    >>> song = Song("s", ((Word("", tuple(Note(p, 1) for p in (60, 60, 62, 62, 62))),),))
    >>> longest_run(song), longest_run(song, final=False)
    (3, 2)
    """
    runs, previous = [0], None
    for note in song.notes():
        if note.pitch != previous:
            runs.append(0)
        runs[-1] += 1
        previous = note.pitch
    return max(runs if final else runs[:-1], default=0)


def prepare_songs(songs: Iterable[Song], *, strict: bool = False) -> Prepared:
    """Reject songs that repeat a pitch six times or more, normalise the key, quantise.

    Args:
        songs: paired songs, or melodies alone; a song without notes is passed on as it is.
        strict: as in quantise.
    Returns:
        Prepared: songs, the names of the rejected ones, and counts.

    >>> from tokcore.algorithms.songmass.song import Word
    >>> drone = Song("drone", ((Word("la", (Note(60, 1),) * 6),),))
    >>> prepare_songs([drone, Song("one", ((Word("la", (Note(62, 9),)),),))]).rejected
    ['drone']
    """
    kept, rejected, counts = [], [], [0] * 4
    for song in songs:
        if longest_run(song) >= 6:
            rejected.append(song.name)
            continue
        if any(True for _ in song.notes()):
            song, *lost = quantise(normalise_key(song).song, strict=strict)
            counts = [total + one for total, one in zip(counts, lost, strict=True)]
        kept.append(song)
    return Prepared(kept, rejected, *counts)
