"""Songs, their text file and their preparation."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokcore.algorithms.songmass import (
    Note,
    Song,
    Word,
    longest_run,
    normalise_key,
    prepare_songs,
    quantise,
    read_songs,
    write_songs,
)


def melody(*pitches: int, duration: float = 1.0) -> Song:
    return Song("m", ((Word("", tuple(Note(p, duration) for p in pitches)),),))


def pitches(song: Song) -> list[int]:
    return [note.pitch for note in song.notes()]


# ---- values -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((128, 1.0), "Note: pitch must be an integer in 0..127, got 128"),
        ((60.5, 1.0), "got 60.5"),
        ((60, 0), "Note: duration must be positive beats, got 0"),
        ((60, float("nan")), "duration .* got nan"),
        ((60, 1, -0.5), "Note: rest must be beats and not negative, got -0.5"),
        ((60, 1, float("inf")), "rest .* got inf"),
    ],
)
def test_a_wrong_note_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Note(*arguments)


def test_syllables_are_one_for_each_note():
    notes = (Note(60, 1), Note(62, 1))
    assert Word("glo", notes, ("glo", "")).syllables == ("glo", "")
    assert Word("", notes, ("", "")).syllables == ("", "")
    with pytest.raises(ValueError, match="one for each of the 2 notes of 'gloria'"):
        Word("gloria", notes, ("glo", "ri", "a"))
    with pytest.raises(ValueError, match="first of the syllables must not be empty"):
        Word("glo", notes, ("", "glo"))


# ---- preparation ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("beats", "rounded"),
    # 0.375 and 0.625 are halves of the grid: to even, 2 and 2 steps. 1/3 of a triplet is 1 step.
    [(0.375, 0.5), (0.625, 0.5), (0.875, 1.0), (1 / 3, 0.25), (Fraction(2, 3), 0.75), (4.1, 4.0)],
)
def test_durations_and_rests_move_to_the_grid_and_are_counted(beats, rounded):
    song = Song("s", ((Word("la", (Note(60, beats, beats),)),),))
    found, moved, *lost = quantise(song, strict=True)
    assert list(found.notes()) == [Note(60, rounded, rounded)]
    assert (moved, lost) == (2, [0, 0, 0])


def test_what_the_grid_changes_beyond_rounding_is_counted():
    notes = (Note(60, 0.125, 0.125), Note(62, 4.5, 20), Note(64, 0.01), Note(65, 4.0, 0.0))
    found = quantise(Song("s", ((Word("la", notes),),)))
    expected = [Note(60, 0.25), Note(62, 4.0, 4.0), Note(64, 0.25), Note(65, 4.0)]
    assert list(found.song.notes()) == expected
    assert found[1:] == (0, 2, 1, 2)
    assert quantise(found.song)[1:] == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("note", "message"),
    [
        (Note(60, 0.1), "duration must .* got 0.1 in song 's', sentence 0, word 'la'"),
        (Note(60, 5), "duration must be at most 4.0 beats"),
        (Note(60, 1, 0.1), "rest must .* not round to 0, got 0.1"),
        (Note(60, 1, 5), "rest must .* got 5"),
    ],
)
def test_strict_quantising_refuses_it(note, message):
    with pytest.raises(ValueError, match=f"quantise: {message}"):
        quantise(Song("s", ((Word("la", (note,)),),)), strict=True)


@pytest.mark.parametrize(
    ("given", "expected", "tonic", "scale"),
    [
        # D major, up an octave: d f# a d -> c e g c
        ((50, 54, 57, 62), (60, 64, 67, 72), 2, "major"),
        # B harmonic minor (a# and g): its own, no other scale holds all of it -> A, where four of
        # eight notes are in octave 5 only after the move
        ((71, 73, 74, 76, 78, 79, 82, 83), (57, 59, 60, 62, 64, 65, 68, 69), 11, "harmonic minor"),
        # C major and A natural minor hold the same notes; C comes first
        ((69, 71, 60, 64), (69, 71, 60, 64), 0, "major"),
        # one note is in every scale that holds it: C major first
        ((60,), (60,), 0, "major"),
        # c# alone: C major does not hold it, C natural minor neither, C# major does
        ((61,), (60,), 1, "major"),
    ],
)
def test_the_key_is_normalised_by_the_first_of_equal_scales(given, expected, tonic, scale):
    found = normalise_key(melody(*given))
    assert (found.tonic, found.scale) == (tonic, scale)
    assert tuple(p - found.shift for p in pitches(found.song)) == given
    assert pitches(found.song) == list(expected)


def test_of_octaves_equally_common_the_first_heard_becomes_the_fifth():
    assert pitches(normalise_key(melody(48, 60)).song) == [60, 72]
    assert pitches(normalise_key(melody(60, 48)).song) == [60, 48]
    assert pitches(normalise_key(melody(60, 48, 50)).song) == [72, 60, 62]


STEPS = {
    "major": "2212221",
    "natural minor": "2122122",
    "harmonic minor": "2122131",
    "melodic minor": "2122221",
}


@given(st.lists(st.integers(30, 90), min_size=1, max_size=12))
def test_the_scale_is_the_first_of_those_with_the_largest_share(values):
    best = (-1.0, 0, "")
    for tonic in range(12):
        for scale, steps in STEPS.items():
            inside = {(tonic + sum(map(int, steps[:i]))) % 12 for i in range(7)}
            share = sum(v % 12 in inside for v in values) / len(values)
            if share > best[0]:
                best = (share, tonic, scale)
    found = normalise_key(melody(*values))
    assert (found.tonic, found.scale) == best[1:]
    assert {a - b for a, b in zip(pitches(found.song), values, strict=True)} == {found.shift}
    assert (found.tonic + found.shift) % 12 == (0 if found.scale == "major" else 9)
    octaves = [p // 12 for p in pitches(found.song)]
    assert octaves.count(5) == max(map(octaves.count, octaves))


def test_a_song_too_wide_for_its_key_is_refused():
    with pytest.raises(ValueError, match=r"song 'm' must stay within pitches 0..127 .* got 60..1"):
        normalise_key(melody(0, 2, 4, 127))
    with pytest.raises(ValueError, match="song 'm' must hold a note"):
        normalise_key(melody())


def test_runs_of_one_pitch_reject_a_song_also_at_its_end():
    """The authors' filter looks at a run when the pitch changes, so it never sees the last one."""
    early, late = melody(*[60] * 6, 62), melody(62, *[60] * 6)
    assert [longest_run(s) for s in (early, late, melody(60, 62), melody())] == [6, 6, 1, 0]
    assert [longest_run(s, final=False) for s in (early, late, melody(60))] == [6, 1, 0]
    several = [early, Song("late", late.sentences), melody(*[60] * 5, 62)]
    found = prepare_songs(several)
    assert found.rejected == ["m", "late"]
    assert found.songs == [melody(*[60] * 5, 62)]


def test_preparation_adds_up_its_counts_and_passes_lyrics_on():
    lyric = Song("lyric", ((Word("love", ()),),))
    found = prepare_songs([melody(61, duration=0.3), lyric, melody(60, duration=0.01)])
    assert found.songs == [melody(60, duration=0.25), lyric, melody(60, duration=0.25)]
    assert (found.moved, found.raised, found.vanished, found.capped) == (1, 1, 0, 0)
    with pytest.raises(ValueError, match="not round to 0"):
        prepare_songs([melody(60, duration=0.01)], strict=True)


# ---- the text file ----------------------------------------------------------------------------


def test_the_text_file_reads_as_documented(tmp_path):
    path = tmp_path / "songs.txt"
    path.write_bytes(
        b"\xef\xbb\xbf# two songs\r\n\n= Kyrie eleison \n"
        b"Ky|ri|e: 60/1 62/0.5 64/1/3 e|lei|son: _/1.5 65/1 64/1 60/2\n"
        b"  |la: 60/1  glo||ri|a: 1/1 2/1 3/1 4/1 la\\sla:: 5/4\n"
        b"= \n: 60/1 62/1 : 64/1\nlove: me:\n"
    )
    n = Note
    assert read_songs(path) == [
        Song(
            "Kyrie eleison",
            (
                (
                    Word("Kyrie", (n(60, 1), n(62, 0.5), n(64, Fraction(1, 3))), ("Ky", "ri", "e")),
                    Word("eleison", (n(65, 1, 1.5), n(64, 1), n(60, 2)), ("e", "lei", "son")),
                ),
                (
                    Word("la", (n(60, 1),), ("la",)),
                    Word("gloria", tuple(n(p, 1) for p in (1, 2, 3, 4)), ("glo", "", "ri", "a")),
                    Word("la la:", (n(5, 4),)),
                ),
            ),
        ),
        Song(
            "",
            (
                (Word("", (n(60, 1), n(62, 1))), Word("", (n(64, 1),))),
                (Word("love", ()), Word("me", ())),
            ),
        ),
    ]


TIMES = st.one_of(
    st.floats(0.01, 100), st.fractions(Fraction(1, 24), 9, max_denominator=24), st.integers(1, 9)
)
NOTES = st.builds(Note, st.integers(0, 127), TIMES, st.one_of(st.just(0.0), TIMES))
TEXTS = st.just("") | st.text(st.sampled_from("aé'ß:|#\\ =_/.-0"), max_size=5)


@st.composite
def words(draw) -> Word:
    notes = tuple(draw(st.lists(NOTES, max_size=3)))
    syllables = tuple(draw(TEXTS) for _ in notes)
    text = "".join(syllables)
    if syllables and (syllables[0] or not text) and draw(st.booleans()):
        return Word(text, notes, syllables)
    return Word(draw(TEXTS), notes)


SONGS = st.builds(
    Song,
    st.text(st.sampled_from("ab #=:"), max_size=4).map(str.strip),
    st.lists(st.lists(words(), min_size=1, max_size=3).map(tuple), max_size=3).map(tuple),
)


@settings(max_examples=50)
@given(st.lists(SONGS, max_size=2))
def test_what_was_written_is_read_back(tmp_path_factory, songs):
    path = tmp_path_factory.getbasetemp() / "songs.txt"
    write_songs(songs, path)
    assert read_songs(path) == songs


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"la: 60/1", "line 2: a line '= NAME' must come before sentences, got 'la: 60/1'"),
        (b"= s\n60/1 la: 60/1", "line 3: a sentence must begin with a word and ':', got '60/1'"),
        (b"= s\nla: 60", "line 3: a note must be PITCH/BEATS, got '60'"),
        (b"= s\nla: 60/x", "line 3: .*'x', got '60/x'"),
        (b"= s\nla: 60/1/0", "line 3: .*, got '60/1/0'"),
        (b"= s\nla: c4/1", "line 3: .*, got 'c4/1'"),
        (b"= s\nla: 200/1", "line 3: Note: pitch must be .* got 200, got '200/1'"),
        (b"= s\nla: 60/0", "line 3: Note: duration must be positive beats"),
        (b"= s\nla: 60/inf", "line 3: Note: duration must be positive beats, got inf"),
        (b"= s\nla: _/1 _/1 60/1", "line 3: a rest must be positive beats, one before a note"),
        (b"= s\nla: _/-1 60/1", "line 3: a rest must be positive beats"),
        (b"= s\nla: 60/1 _/1", "line 3: a note must follow the rest _/1.0"),
        (b"= s\nla: _/1 le: 60/1", "line 3: a note must follow the rest _/1.0, got 'le:'"),
        (b"= s\nglo|ri|a: 60/1", "line 3: Word: syllables must be one for each of the 1 notes"),
        (b"= s\nla\\: 60/1", "line 3: a backslash must stand before a character"),
        (b"= s\nl\xe4: 60/1", "line 3: text must be UTF-8, got byte b'.xe4'"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, message):
    path = tmp_path / "mine.txt"
    path.write_bytes(b"\n" + line)
    with pytest.raises(ValueError, match=f"read_songs: .*mine.txt, {message}"):
        read_songs(path)


@pytest.mark.parametrize(
    ("song", "message"),
    [
        (Song("two\nlines", ()), "a name must be one line"),
        (Song(" s", ()), "without white space around it, got ' s'"),
        (Song("s", ((),)), "got none in sentence 0 of song 's'"),
        (Song("s", ((Word("a\tb", ()),),)), r"no white space but spaces, got 'a\\tb' in song 's'"),
        (Song("s", ((Word("ab", (Note(60, 1),), ("a",)),),)), "syllables must make up the text"),
    ],
)
def test_what_the_file_cannot_hold_is_refused(tmp_path, song, message):
    with pytest.raises(ValueError, match=f"write_songs: .*{message}"):
        write_songs([song], tmp_path / "s.txt")
    assert not (tmp_path / "s.txt").exists()
