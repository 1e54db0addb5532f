"""Songs as scores that one can open and hear."""

from __future__ import annotations

from pathlib import Path

from music21 import articulations, exceptions21, instrument, metadata, note, stream

from tokcore.algorithms.songmass.song import Song, Word
from tokcore.integrations.music21.heads import ScoreError

FORMATS = {
    ".musicxml": "musicxml",
    ".xml": "musicxml",
    ".mxl": "mxl",
    ".mid": "midi",
    ".midi": "midi",
}


def write_score(song: Song, path: str | Path) -> None:
    """Write a song as MusicXML or MIDI, its lyrics under the notes.

    A syllable stands under its note, hyphened within a word; a word whose syllables are unknown
    stands under its first note, and its other notes are a melisma. A sentence ends in a breath
    mark; in MIDI, which has none, in a lyric that ends its line, as karaoke players want it.

    ``read_score`` gives the same sentences back, with ``sentences=AS_MARKED`` wherever they end,
    but for this: unknown syllables are known then, a word without text after one with text is its
    melisma, and in MIDI the words of a melody without lyrics have no line to end.

    Args:
        song: at least one word, every word with notes.
        path: ends in .musicxml, .mxl, .xml, .mid or .midi.

    Raises:
        ScoreError: naming song, sentence, word and rule.

    >>> import tempfile
    >>> from tokcore.algorithms.songmass.song import Note
    >>> from tokcore.integrations.music21 import read_score
    >>> word = Word("gloria", (Note(60, 1.0), Note(62, 0.5), Note(64, 2.5)), ("glo", "ri", "a"))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_score(Song("hymn", ((word,),)), f"{folder}/hymn.musicxml")
    ...     [song], counts = read_score(f"{folder}/hymn.musicxml")
    >>> song == Song("hymn", ((word,),))
    True
    """
    path = Path(path)
    written = FORMATS.get(path.suffix.lower())
    if written is None:
        raise ScoreError(f"write_score: path must end in one of {sorted(FORMATS)}, got {path}")
    if not any(song.sentences):
        raise ScoreError(f"write_score: song {song.name!r} must have words, got none")
    part = stream.Part([instrument.Vocalist()])
    for index, sentence in enumerate(song.sentences):
        for position, word in enumerate(sentence):
            place = f"write_score: song {song.name!r}, sentence {index}, word {position}"
            lyrics = _lyrics(word, place)
            if written == "midi":
                _spell_out(lyrics, ends_line=position == len(sentence) - 1)
            for sung, lyric in zip(word.notes, lyrics, strict=True):
                if sung.rest:
                    part.append(note.Rest(quarterLength=sung.rest))
                struck = note.Note(sung.pitch, quarterLength=sung.duration)
                if lyric is not None:
                    struck.lyrics.append(lyric)
                part.append(struck)
        if sentence and written != "midi":
            struck.articulations.append(articulations.BreathMark())
    score = stream.Score([part])
    score.metadata = metadata.Metadata(title=song.name)
    try:
        score.write(written, path)
    except exceptions21.Music21Exception as error:
        raise ScoreError(
            f"write_score: song {song.name!r} must have durations and rests that are note "
            f"values: {error}"
        ) from error


def _lyrics(word: Word, place: str) -> list[note.Lyric | None]:
    """One for each note of the word, None where its melisma goes on."""
    if not word.notes:
        raise ScoreError(f"{place}: a word must have notes, got none for {word.text!r}")
    syllables = word.syllables or (word.text, *[""] * (len(word.notes) - 1))
    if "".join(syllables) != word.text or len(syllables) != len(word.notes):
        raise ScoreError(
            f"{place}: syllables must make up the text {word.text!r}, one for each of the "
            f"{len(word.notes)} notes, got {syllables}"
        )
    last = sum(map(bool, syllables)) - 1
    lyrics: list[note.Lyric | None] = []
    count = 0
    for syllable in syllables:
        lyrics.append(None)
        if syllable:
            name = ("begin" if last else "single", "middle", "end")[
                0 if count == 0 else 1 + (count == last)
            ]
            lyrics[-1] = note.Lyric(number=1, text=syllable, syllabic=name, applyRaw=True)
            count += 1
    return lyrics


def _spell_out(lyrics: list[note.Lyric | None], *, ends_line: bool) -> None:
    """MIDI keeps the text alone: hyphens, and the end of a line, go into it."""
    sung = [lyric for lyric in lyrics if lyric is not None]
    for lyric in sung[:-1]:
        lyric.text += "-"
    if sung and ends_line:
        sung[-1].text += "\r"
