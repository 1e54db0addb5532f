"""Notes as they are sung: ties, chords, graces, rests, voices; what is left out is counted."""

from fractions import Fraction

import pytest

pytest.importorskip("music21")

from music21 import chord, duration, harmony, instrument, note, stream, tie
from tiny_scores import only_notes, sung, words

from tokcore.algorithms.songmass.song import Note
from tokcore.integrations.music21 import ScoreError, read_score


def test_durations_and_rests_are_exact():
    third = Fraction(1, 3)
    part = sung((0, 1.5), (60, third, "a"), (0, third), (62, third, "b"), (64, 2.75, "c"))
    assert only_notes(part)[0] == [Note(60, 1 / 3, 1.5), Note(62, 1 / 3, 1 / 3), Note(64, 2.75)]


def test_tied_notes_are_one():
    part = sung((60, 3, "a"), (60, 4), (60, 1), (62, 1, "b"))
    for one, kind in zip(part.notes, ["start", "continue", "stop"], strict=False):
        one.tie = tie.Tie(kind)
    found, counts = only_notes(part)
    assert found == [Note(60, 8), Note(62, 1)]
    assert counts["tied notes merged"] == 2


@pytest.mark.parametrize("second", [(60, 1, "e"), (62, 1)])
def test_a_tie_holds_only_one_pitch_and_one_syllable(second):
    part = sung((60, 3, "a"), second)
    part.notes[0].tie, part.notes[1].tie = tie.Tie("start"), tie.Tie("stop")
    found, counts = only_notes(part)
    assert found == [Note(60, 3), Note(second[0], 1)]
    assert counts["ties broken by a syllable"] == (len(second) == 3)


def test_grace_notes_are_dropped_and_their_syllable_is_not():
    part = sung((60, 1, "a"))
    grace = note.Note(72).getGrace()
    grace.lyrics.append(note.Lyric(text="be", number=1, syllabic="single"))
    part.append(grace)
    sung((62, 1), part=part)
    found, counts = words(part)
    assert found == [("a", ("a",), (60,)), ("be", ("be",), (62,))]
    assert counts["grace notes dropped"] == 1

    part.notes[2].lyrics.append(note.Lyric(text="ce", number=1, syllabic="single"))
    found, counts = words(part)
    assert [word[0] for word in found] == ["a", "ce"]
    assert counts["syllables of grace notes dropped"] == 1


def test_the_highest_note_of_a_chord_is_sung():
    part = sung((60, 1, "a"))
    for kind, lyric in (("start", "b"), ("stop", None)):
        both = chord.Chord([55, 67, 62], quarterLength=2)
        for one in both.notes:
            one.tie = tie.Tie(kind)
        if lyric:
            both.addLyric(lyric)
        part.append(both)
    found, counts = only_notes(part)
    assert found == [Note(60, 1), Note(67, 4)]
    assert counts["chord notes dropped"] == 4


def test_what_is_not_a_note_is_counted():
    part = sung((60, 1, "a"), (62, 1, "b"))
    part.insert(0, harmony.ChordSymbol("Dm"))
    part.insert(2, note.Unpitched(quarterLength=1))
    part.insert(3, note.Note(64, duration=duration.Duration(0)))
    found, counts = only_notes(part)
    assert found == [Note(60, 1), Note(62, 1)]
    for reason in ("chord symbols", "unpitched notes", "notes without length"):
        assert counts[f"{reason} dropped"] == 1


def test_notes_that_nobody_sings_count_as_silence():
    part = sung((55, 2), (57, 2), (60, 1, "la."), (0, 4), (64, 1), (65, 1), (0, 1), (62, 1, "si"))
    found, counts = only_notes(part)
    assert found == [Note(60, 1, rest=4), Note(62, 1, rest=7)]
    assert counts["notes without a syllable dropped"] == 4


def test_overlapping_notes():
    part = stream.Part()
    for onset, pitch, beats, text in ((0, 60, 2, "a"), (1, 64, 2, "b"), (3, 60, 1, "c")):
        one = note.Note(pitch, quarterLength=beats)
        one.addLyric(text)
        part.insert(onset, one)
    part.insert(3, note.Note(72, quarterLength=0.5))
    part.insert(3, note.Note(48, quarterLength=2))
    found, counts = words(part)
    assert found == [("a", ("a",), (60,)), ("b", ("b",), (64,)), ("c", ("c",), (72,))]
    assert only_notes(part)[0] == [Note(60, 1), Note(64, 2), Note(72, 0.5)]
    assert counts["overlapping notes shortened"] == 1
    assert counts["chord notes dropped"] == 2


def test_microtones_are_rounded_and_wild_pitches_refused():
    part = sung((60.5, 1, "a"), (61, 1, "b"))
    assert only_notes(part)[1]["microtones rounded"] == 1
    measure = stream.Measure(number=7)
    measure.append(note.Note("C12", quarterLength=4))
    with pytest.raises(ScoreError, match=r"read_score: .*, measure 7: a pitch must lie in 0..127"):
        read_score(stream.Score([stream.Part([measure])]))


def test_transposing_instruments_sound():
    part = stream.Part([instrument.Clarinet()])
    part.atSoundingPitch = False
    assert only_notes(sung((62, 1, "a"), part=part))[0] == [Note(60, 1)]


def test_every_part_and_every_voice_that_sings_is_a_song():
    high, low, silent = sung((72, 4, "one")), sung((48, 4, "two")), sung((60, 2), (62, 2))
    high.partName, low.partName = "Canto", "Basso"
    bar = stream.Measure(number=1)
    for pitch, text in ((67, "up"), (50, "down")):
        voice = stream.Voice()
        sung((pitch, 4, text), part=voice)
        bar.insert(0, voice)
    songs, counts = read_score(stream.Score([high, silent, low, stream.Part([bar])]))
    assert [(song.name, song.sentences[0][0].text) for song in songs] == [
        ("score/1 Canto", "one"),
        ("score/3 Basso", "two"),
        ("score/4, voice 1", "up"),
        ("score/4, voice 2", "down"),
    ]
    assert counts["voices without lyrics dropped"] == 1
    assert counts["notes of voices without lyrics dropped"] == 2
    assert (counts["songs"], counts["words"], counts["notes"]) == (4, 4, 4)
