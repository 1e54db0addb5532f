"""Scores as music21 has them, taken apart into voices and their note heads, one after another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

from music21 import articulations, chord, converter, harmony, midi, note, percussion, stream


class ScoreError(ValueError):
    """A score that cannot be read or written; says which, where in it, and the rule."""


class NoLyricsError(ScoreError):
    """A score in which nobody sings the verse that was asked for."""


@dataclass
class Head:
    """What is struck once: a note with those tied to it, in beats from the start of the part."""

    onset: Fraction
    end: Fraction
    pitch: int
    step: int  # its line or space on the staff
    measure: int
    lyrics: list[note.Lyric] = field(default_factory=list)
    breath: bool = False  # a breath mark after it


def parse(
    reader: str, source: str | Path | stream.Stream, counts: Counter[str]
) -> tuple[str, stream.Stream]:
    """The name that songs of this source get, and the source as music21 has it."""
    if isinstance(source, stream.Stream):
        return (source.metadata and source.metadata.bestTitle) or "score", source
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"{reader}: {path} is not a file")
    try:
        if path.suffix.lower() in (".mid", ".midi"):
            return path.stem, _parse_midi(path, counts)
        return path.stem, converter.parseFile(path)
    except Exception as error:  # as many kinds as there are formats
        raise ScoreError(
            f"{reader}: {path} must be a score that music21 reads, got "
            f"{type(error).__name__}: {error}"
        ) from error


def _parse_midi(path: Path, counts: Counter[str]) -> stream.Stream:
    """As the converter, but times are not rounded, and a lyric's line ends stay in it."""
    file = midi.MidiFile()
    file.open(path)
    try:
        file.read()
    finally:
        file.close()
    parsed = midi.translate.midiFileToStream(file, quantizePost=False)
    events = (event for track in file.tracks for event in track.events)
    lost = sum(event.type == midi.MetaEvents.LYRIC for event in events)
    for element in parsed.recurse().notes:
        if element.lyrics:
            lost -= 1
            text = "\n".join(lyric.rawText for lyric in element.lyrics)
            element.lyrics = [note.Lyric(text=text, number=1, applyRaw=True)]
    counts["lyrics away from any note dropped"] += lost
    return parsed


def scores(name: str, parsed: stream.Stream) -> Iterator[tuple[str, stream.Stream]]:
    """The pieces of a file, an ABC file of many tunes for one, with the name of each."""
    if not isinstance(parsed, stream.Opus):
        yield name, parsed
        return
    for number, score in enumerate(parsed.scores, start=1):
        title = (score.metadata and score.metadata.bestTitle) or ""
        yield " ".join(f"{name}/{number} {title}".split()), score


def voices(name: str, score: stream.Stream) -> Iterator[tuple[str, stream.Stream]]:
    """The voices of a score at sounding pitch; a part of several voices gives one of each."""
    parts = list(score.getElementsByClass(stream.Part)) or [score]
    for position, part in enumerate(parts, start=1):
        label = name
        if len(parts) > 1:
            label = " ".join(f"{name}/{position} {part.partName or ''}".split())
        if any(found.transposition for found in part.getInstruments(recurse=True)):
            part = part.toSoundingPitch()
        if not part.recurse().getElementsByClass(stream.Voice):
            yield label, part
            continue
        split = [voice for voice in part.voicesToParts().parts if voice.recurse().notes]
        for index, voice in enumerate(split, start=1):
            yield (label if len(split) == 1 else f"{label}, voice {index}"), voice


def heads(place: str, part: stream.Stream, counts: Counter[str]) -> list[Head]:
    """The heads of a voice in order of time, none beginning before the last has ended."""
    found: list[Head] = []
    carried: list[note.Lyric] = []  # of a grace note, for the note that it leans on
    elements = part.recurse().notes
    for element in elements:
        # getOffsetInHierarchy is wrong for the second half of a MIDI note that crosses a bar line
        onset = Fraction(elements.currentHierarchyOffset())
        measure = element.measureNumber or 0
        reason = _unsung(element)
        if reason is not None:
            counts[f"{reason} dropped"] += 1
            carried += element.lyrics
            continue
        top = element
        if isinstance(element, chord.Chord):
            top = max(element.notes, key=lambda one: one.pitch.ps)
            counts["chord notes dropped"] += len(element.notes) - 1
        pitch = round(top.pitch.ps)
        if not 0 <= pitch <= 127:
            raise ScoreError(f"{place}, measure {measure}: a pitch must lie in 0..127, got {pitch}")
        counts["microtones rounded"] += pitch != top.pitch.ps
        lyrics = [*element.lyrics]
        if carried and lyrics:
            counts["syllables of grace notes dropped"] += len(carried)
        head = Head(
            onset,
            onset + Fraction(element.quarterLength),
            pitch,
            top.pitch.diatonicNoteNum,
            measure,
            lyrics or carried,
            any(isinstance(mark, articulations.BreathMark) for mark in element.articulations),
        )
        carried = []
        if top.tie is None or top.tie.type == "start" or not _tied(found, head, counts):
            found.append(head)
    counts["syllables of grace notes dropped"] += len(carried)
    return _one_by_one(found, counts)


def _unsung(element: note.NotRest) -> str | None:
    """What makes an element of a score no note of a melody."""
    if isinstance(element, harmony.Harmony):
        return "chord symbols"
    if isinstance(element, note.Unpitched | percussion.PercussionChord) or not element.pitches:
        return "unpitched notes"
    if element.duration.isGrace:
        return "grace notes"
    return "notes without length" if element.quarterLength == 0 else None


def _tied(found: list[Head], head: Head, counts: Counter[str]) -> bool:
    """Whether a head was merged into the one before; a syllable of its own begins a new one.

    A tie carries the accidental over the bar line, which music21 forgets in ABC files.
    """
    before = found[-1] if found else None
    if before is None or before.end != head.onset:
        return False
    if before.pitch != head.pitch and before.step != head.step:
        return False
    if any(lyric.text for lyric in head.lyrics):
        counts["ties broken by a syllable"] += 1
        return False
    before.end = head.end
    before.breath |= head.breath
    counts["tied notes merged"] += 1
    return True


def _one_by_one(found: list[Head], counts: Counter[str]) -> list[Head]:
    """At one onset the highest note is sung; a note that sounds into the next is cut there."""
    kept: list[Head] = []
    for head in sorted(found, key=lambda one: one.onset):
        before = kept[-1] if kept else None
        if before is not None and before.onset == head.onset:
            counts["chord notes dropped"] += 1
            if head.lyrics and before.lyrics:
                counts["syllables of chord notes dropped"] += len(before.lyrics)
            head.lyrics = head.lyrics or before.lyrics
            if before.pitch > head.pitch:
                before.lyrics = head.lyrics
                continue
            kept.pop()
        elif before is not None and before.end > head.onset:
            before.end = head.onset
            counts["overlapping notes shortened"] += 1
        kept.append(head)
    return kept
