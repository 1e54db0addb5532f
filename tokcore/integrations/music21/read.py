"""Songs from scores with lyrics, and melodies from any score."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from itertools import accumulate, groupby, pairwise
from operator import itemgetter
from pathlib import Path

from music21 import abcFormat, stream

from tokcore.algorithms.songmass.song import Song
from tokcore.integrations.music21.heads import (
    Head,
    NoLyricsError,
    ScoreError,
    heads,
    parse,
    scores,
    voices,
)
from tokcore.integrations.music21.lyrics import (
    HYPHENS,
    Sentences,
    SungWord,
    cut,
    shorten,
    sung_words,
    verse_of,
)

Counts = Counter[str]


def read_score(
    source: str | Path | stream.Stream,
    *,
    verse: int = 1,
    sentences: Sentences | None = None,
    hyphens: str = HYPHENS,
) -> tuple[list[Song], Counts]:
    """Songs of a score with lyrics, one for each voice that sings, and what was left out.

    Notes: tied notes are one note; of a chord, and of notes struck at once, the highest is sung;
    grace notes are dropped and their syllable goes to the next note, if that has none. Durations
    and rests are exact, tuplets too. Repeats are read once, as written. Transposing instruments
    are read at sounding pitch. What is dropped counts as silence, so onsets stay.

    Words: syllables are joined as the syllabics of a voice say; where these do not say both what
    begins and what ends a word, as hyphens say; where spaces are kept (MIDI), as these say. Notes
    without a syllable continue the one before. A hyphen where syllables meet is not kept
    ("peut-être" on two notes is "peutêtre"); several words on one note are one, with ‿ between
    them. A syllable is never dropped without being counted.

    Formats: what music21 parses. It has no lyrics from ABC (``w:`` lines), from kern those of a
    ``**text`` spine that names its ``*staff``, of several the last; from MIDI lyrics in UTF-8, in
    the track of their notes.

    Args:
        source: a file, or a music21 stream.
        verse: which line of lyrics.
        sentences: where a sentence ends, by default ``Sentences()``.
        hyphens: characters that at the end of a syllable say that its word goes on.

    Returns:
        The songs, named FILE/PART, and how many songs, sentences, words and notes were read and
        how many of what was dropped, joined or changed; a reason that did not occur is absent.

    Raises:
        NoLyricsError: nobody sings this verse.
        ScoreError: naming file, part, measure and rule.

    >>> import music21
    >>> part = music21.converter.parse("tinyNotation: 3/4 c4 d8 e8 f4 r2 a2.")
    >>> for note, text in zip(part.recurse().notes, ["glo-", "", "-ri-", "-a,", "Dio!"]):
    ...     note.lyric = text
    >>> [song], counts = read_score(part)
    >>> for sentence in song.sentences:
    ...     print([(word.text, word.syllables) for word in sentence])
    [('gloria,', ('glo', '', 'ri', 'a,'))]
    [('Dio!', ('Dio!',))]
    >>> song.sentences[1][0].notes
    (Note(pitch=69, duration=3.0, rest=2.0),)
    >>> counts["words"], counts["notes"]
    (2, 5)
    """
    if verse < 1:
        raise ValueError(f"read_score: verse must be at least 1, got {verse}")
    rule = sentences or Sentences()
    verses: set[int] = set()

    def sing(
        score: stream.Stream, voice: stream.Stream, found: list[Head], counts: Counts
    ) -> list[list[SungWord]]:
        sung = {verse_of(lyric) for head in found for lyric in head.lyrics if lyric.text}
        verses.update(sung)
        if verse not in sung:
            counts["voices without lyrics dropped"] += 1
            counts["notes of voices without lyrics dropped"] += len(found)
            counts["syllables of other verses dropped"] += sum(
                bool(lyric.text) for head in found for lyric in head.lyrics
            )
            return []
        return cut(sung_words(found, verse, hyphens, rule.rest, counts), rule, counts)

    songs, counts = _read("read_score", source, sing)
    if not songs:
        raise NoLyricsError(
            f"read_score: {source} must have lyrics of verse {verse}, got verses {sorted(verses)}"
        )
    return songs, counts


def read_melody(
    source: str | Path | stream.Stream,
    *,
    rest: float = 2.0,
    measures: int | None = None,
    lines: bool = False,
    longest: int = 64,
) -> tuple[list[Song], Counts]:
    """Melodies of a score, one for each voice, lyrics or not; every note a word with the text ''.

    Notes are read as by ``read_score``. A sentence is a phrase as written, between ``{`` and ``}``
    of a kern file of one voice, or a line of an ABC file where ``lines`` says so; else it is
    ``measures`` measures; else it ends where the voice rests.

    Args:
        source: a file, or a music21 stream.
        rest: the least silence (beats) that ends a sentence.
        measures: how many measures are a sentence, an upbeat with the first of them.
        lines: whether the lines of an ABC file are its phrases, as in the Essen collection.
        longest: most notes of a sentence; a longer one is cut as ``Sentences`` says.

    Returns:
        As ``read_score``.

    Raises:
        ScoreError: naming file, part, measure and rule; or the score has no notes.

    >>> import music21
    >>> part = music21.converter.parse("tinyNotation: 4/4 c4 d4 e2 r2 f2 g1")
    >>> [song], counts = read_melody(part)
    >>> [[word.notes[0].pitch for word in sentence] for sentence in song.sentences]
    [[60, 62, 64], [65, 67]]
    """
    for name, value in (("rest", rest), ("measures", measures), ("longest", longest)):
        if value is not None and not value > 0:
            raise ValueError(f"read_melody: {name} must be positive, got {value}")

    def phrase(
        score: stream.Stream, voice: stream.Stream, found: list[Head], counts: Counts
    ) -> list[list[SungWord]]:
        sizes = _written_phrases(source, score, lines)
        if sizes and sum(sizes) != len(found):
            counts["voices whose written phrases do not fit"] += 1
            sizes = []
        if sizes:
            numbers = [number for number, size in enumerate(sizes) for _ in range(size)]
        elif measures is not None:
            bars = _bars(voice)
            numbers = [max(bisect_right(bars, head.onset) - 1, 0) // measures for head in found]
        else:
            rests = (there.onset - here.end >= rest for here, there in pairwise(found))
            numbers = list(accumulate(rests, initial=0))
        words = [
            (number, SungWord([head], [""])) for number, head in zip(numbers, found, strict=False)
        ]
        return [
            piece
            for _, sentence in groupby(words, key=itemgetter(0))
            for piece in shorten([word for _, word in sentence], longest, counts)
        ]

    songs, counts = _read("read_melody", source, phrase)
    if not songs:
        raise ScoreError(f"read_melody: {source} must have notes, got none")
    return songs, counts


def _read(
    reader: str,
    source: str | Path | stream.Stream,
    sentences_of: Callable[
        [stream.Stream, stream.Stream, list[Head], Counts], list[list[SungWord]]
    ],
) -> tuple[list[Song], Counts]:
    songs: list[Song] = []
    counts: Counts = Counter()
    name, parsed = parse(reader, source, counts)
    for title, score in scores(name, parsed):
        for label, voice in voices(title, score):
            found = heads(f"{reader}: {label}", voice, counts)
            sentences = sentences_of(score, voice, found, counts)
            if sentences:
                songs.append(_song(label, sentences))
    for song in songs:
        counts["songs"] += 1
        counts["sentences"] += len(song.sentences)
        counts["words"] += sum(map(len, song.sentences))
        counts["notes"] += sum(len(word.notes) for line in song.sentences for word in line)
    return songs, +counts  # + leaves out what counts to 0


def _song(name: str, sentences: list[list[SungWord]]) -> Song:
    silent_since = Fraction(0)
    finished = []
    for sentence in sentences:
        words = []
        for sung in sentence:
            words.append(sung.word(silent_since))
            silent_since = sung.heads[-1].end
        finished.append(tuple(words))
    return Song(name, tuple(finished))


def _bars(voice: stream.Stream) -> list[Fraction]:
    """Where the measures begin; an upbeat belongs to the first whole one, however numbered."""
    bars = list(voice.getElementsByClass(stream.Measure))
    upbeat = bool(bars) and bars[0].duration.quarterLength < bars[0].barDuration.quarterLength
    return [Fraction(bar.offset) for bar in bars[upbeat:]]


def _written_phrases(
    source: str | Path | stream.Stream, score: stream.Stream, lines: bool
) -> list[int]:
    """How many notes, tied ones as one, begin in each phrase that a file marks; none: []."""
    kind = "" if isinstance(source, stream.Stream) else Path(source).suffix.lower()
    if kind == ".krn":
        return _kern_phrases(Path(source).read_text(encoding="utf-8", errors="replace"))
    if kind != ".abc" or not lines:
        return []
    text = Path(source).read_text(encoding="utf-8", errors="replace")
    if score.metadata and score.metadata.number:
        text = abcFormat.ABCFile.extractReferenceNumber(text, int(score.metadata.number))
    return _abc_phrases(text)


def _abc_phrases(text: str) -> list[int]:
    sizes, tied, grace = [], False, False
    for line in text.splitlines():
        if re.match(r"\s*(%|\w:|$)", line):
            continue
        handler = abcFormat.ABCHandler()
        handler.tokenize(line)
        sizes.append(0)
        for token in handler.tokens:
            if isinstance(token, abcFormat.ABCGraceStart | abcFormat.ABCGraceStop):
                grace = isinstance(token, abcFormat.ABCGraceStart)
            elif isinstance(token, abcFormat.ABCTie):
                tied = True
            elif isinstance(token, abcFormat.ABCNote) and not grace:  # chords are ABCNotes too
                # a name comes before octave and length, behind chord symbols and accidentals
                struck = re.match(r'("[^"]*"|[^a-gA-GzxZX"])*[a-gA-G]', token.src)
                sizes[-1] += struck is not None and not tied
                tied = False
    return [size for size in sizes if size]


def _kern_phrases(text: str) -> list[int]:
    """Empty unless there is one voice and it has phrase marks."""
    rows = [line.split("\t") for line in text.splitlines() if line and line[0] not in "!="]
    columns = [index for index, kind in enumerate(rows[0]) if kind == "**kern"] if rows else []
    if len(columns) != 1 or "{" not in text:
        return []
    sizes = [0]
    for row in rows:
        token = row[columns[0]] if len(row) > columns[0] else "*"
        if token[0] == "*" or token == "." or set(token) & set("rq]_"):
            continue  # rests, grace notes, and what is tied to a note before
        if "{" in token and sizes[-1]:
            sizes.append(0)
        sizes[-1] += 1
    return sizes
