"""Songs as plain values: notes, words and sentences; and a text file for them.

A song is a tuple of sentences, a sentence of words, a word of the notes it is sung on. A melody
alone is a song whose words have the text ''; a lyric alone one whose words have no notes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral, Real
from os import PathLike
from pathlib import Path


@dataclass(frozen=True)
class Note:
    """A pitch in semitones (MIDI, 60 is middle C), its duration and the silence before it in beats.

    >>> Note(60, 1.0, rest=0.5)
    Note(pitch=60, duration=1.0, rest=0.5)
    """

    pitch: int
    duration: float
    rest: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.pitch, Integral) or not 0 <= self.pitch <= 127:
            raise ValueError(f"Note: pitch must be an integer in 0..127, got {self.pitch!r}")
        if not _is_time(self.duration) or self.duration == 0:
            raise ValueError(f"Note: duration must be positive beats, got {self.duration!r}")
        if not _is_time(self.rest):
            raise ValueError(f"Note: rest must be beats and not negative, got {self.rest!r}")


@dataclass(frozen=True)
class Word:
    """A word and the notes it is sung on.

    syllables holds one string for each note, '' on the later notes of a melisma (and throughout
    where there is no text); it is empty where nobody knows which syllable is sung on which note.

    >>> word = Word("gloria", (Note(60, 1), Note(62, 1), Note(64, 1), Note(60, 2)),
    ...             ("glo", "", "ri", "a"))
    """

    text: str
    notes: tuple[Note, ...]
    syllables: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.syllables and len(self.syllables) != len(self.notes):
            raise ValueError(
                f"Word: syllables must be one for each of the {len(self.notes)} notes of "
                f"{self.text!r}, or none, got {self.syllables}"
            )
        if self.text and self.syllables and not self.syllables[0]:
            raise ValueError(
                f"Word: the first of the syllables must not be empty, got {self.syllables}"
            )


@dataclass(frozen=True)
class Song:
    """A name and the sentences, each a tuple of words."""

    name: str
    sentences: tuple[tuple[Word, ...], ...]

    def notes(self) -> Iterator[Note]:
        """All notes in order."""
        return (note for sentence in self.sentences for word in sentence for note in word.notes)


def write_songs(songs: Iterable[Song], path: str | PathLike) -> None:
    r"""Write songs to a text file that people can read and write, UTF-8, one line a sentence.

    ::

        = Kyrie                                  the name of the song that follows
        # a comment, where # is the first character of a line
        Ky|ri|e: 60/1 62/0.5 64/1/3 e|lei|son: _/1 65/1 64/1 60/2

    A word ends in ``:`` and its notes follow it, ``PITCH/BEATS``, beats as a decimal number or a
    fraction; ``_/BEATS`` is silence before the next note. ``|`` parts the syllables, one a note
    (``glo||ri|a:`` sings glo on two notes); a word without it has unknown syllables, and ``|la:``
    is a known single one. A lone ``:`` is a word without text, of a melody alone; a word without
    notes belongs to a lyric alone. In a text, ``\s`` is a space, ``\|`` ``\#`` ``\\`` are
    themselves. Reading gives the same songs back, exactly.

    Raises:
        ValueError: what a line cannot hold: a name that is not one line, an empty sentence, white
            space other than a space, syllables that do not make up the text.

    >>> import pathlib, tempfile
    >>> song = Song("Ah", ((Word("gloria", (Note(60, 1), Note(62, 2.5, 1), Note(60, 1)),
    ...                          ("glo", "ri", "a")),),))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "songs.txt"
    ...     write_songs([song], path)
    ...     print(path.read_text(encoding="utf-8"), end="")
    ...     read_songs(path) == [song]
    = Ah
    glo|ri|a: 60/1 _/1 62/2.5 60/1
    True
    """
    lines = []
    for song in songs:
        if song.name != song.name.strip() or len(song.name.splitlines()) > 1:
            raise ValueError(
                "write_songs: a name must be one line without white space around it, got "
                f"{song.name!r}"
            )
        lines.append(f"= {song.name}".rstrip())
        for index, sentence in enumerate(song.sentences):
            if not sentence:
                raise ValueError(
                    f"write_songs: a sentence must hold a word, got none in sentence {index} of "
                    f"song {song.name!r}"
                )
            lines.append(" ".join(_format_word(word, song.name) for word in sentence))
    Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


def read_songs(path: str | PathLike) -> list[Song]:
    """Read songs from a text file; write_songs says how it looks.

    Raises:
        ValueError: naming file, line, rule and what stands there.
    """
    songs: list[tuple[str, list]] = []
    data = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    for number, raw in enumerate(data.split(b"\n"), start=1):
        place = f"read_songs: {path}, line {number}"
        try:
            line = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            byte = raw[error.start : error.start + 1]
            raise ValueError(f"{place}: text must be UTF-8, got byte {byte!r}") from None
        if not line or line.startswith("#"):
            continue
        if line.split()[0] == "=":
            songs.append((line[1:].strip(), []))
        elif not songs:
            raise ValueError(f"{place}: a line '= NAME' must come before sentences, got {line!r}")
        else:
            songs[-1][1].append(_parse_sentence(line, place))
    return [Song(name, tuple(sentences)) for name, sentences in songs]


def _is_time(value: float) -> bool:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value >= 0


def _format_word(word: Word, song: str) -> str:
    if word.syllables and "".join(word.syllables) != word.text:
        raise ValueError(
            f"write_songs: syllables must make up the text, got {word.syllables} for "
            f"{word.text!r} in song {song!r}"
        )
    if re.search(r"[^\S ]", word.text):
        raise ValueError(
            f"write_songs: a text must hold no white space but spaces, got {word.text!r} in song "
            f"{song!r}"
        )
    parts = [_escape(part) for part in word.syllables or (word.text,)]
    marked = len(word.syllables) == 1 or (word.syllables and not parts[0])
    text = ("|" if marked else "") + "|".join(parts) + ":"
    for note in word.notes:
        text += f" _/{_format_time(note.rest)}" if note.rest else ""
        text += f" {note.pitch}/{_format_time(note.duration)}"
    return text


def _escape(text: str) -> str:
    return re.sub(r"([\\|#])", r"\\\1", text).replace(" ", r"\s")


def _unescape(text: str) -> str:
    return re.sub(r"\\(.)", lambda found: " " if found[1] == "s" else found[1], text)


def _format_time(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)


def _parse_sentence(line: str, place: str) -> tuple[Word, ...]:
    words: list[tuple[str, list[Note]]] = []
    rest = 0.0
    # A text may end in ':' itself, and so may a note never: what ends in ':' is a word.
    for token in [*line.split(), ":"]:
        if token.endswith(":"):
            if rest:
                raise ValueError(f"{place}: a note must follow the rest _/{rest}, got {token!r}")
            words.append((token[:-1], []))
            continue
        pitch, slash, beats = token.partition("/")
        if not words:
            raise ValueError(f"{place}: a sentence must begin with a word and ':', got {token!r}")
        try:
            if not slash:
                raise ValueError("a note must be PITCH/BEATS")
            time = Fraction(beats) if "/" in beats else float(beats)
            if pitch == "_":
                if not _is_time(time) or time == 0 or rest:
                    raise ValueError("a rest must be positive beats, one before a note")
                rest = time
            else:
                words[-1][1].append(Note(int(pitch), time, rest))
                rest = 0.0
        except (ValueError, ZeroDivisionError) as error:
            raise ValueError(f"{place}: {error}, got {token!r}") from None
    try:
        return tuple(_parse_word(text, tuple(notes)) for text, notes in words[:-1])
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def _parse_word(text: str, notes: tuple[Note, ...]) -> Word:
    if not re.fullmatch(r"(?:[^\\]|\\.)*", text):
        raise ValueError(f"a backslash must stand before a character, got {text!r}")
    parts = [_unescape(part) for part in re.findall(r"\|((?:[^|\\]|\\.)*)", "|" + text)]
    known = len(parts) > 1
    if known and not parts[0]:
        parts = parts[1:]  # the | before a single syllable, or before an empty one
    return Word("".join(parts), notes, tuple(parts) if known else ())
