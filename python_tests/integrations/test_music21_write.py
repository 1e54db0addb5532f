"""Songs written as MusicXML and MIDI, and read again."""

import pytest

pytest.importorskip("music21")

from hypothesis import given, settings
from hypothesis import strategies as st
from music21 import common
from tiny_scores import lyrics_of_parts, phrases

from tokcore.algorithms.songmass.song import Note, Song, Word
from tokcore.integrations.music21 import AS_MARKED, ScoreError, read_score, write_score

SYLLABLES = st.lists(st.text("abcèü'", min_size=1, max_size=3) | st.just(""), max_size=4)
TIMES = st.sampled_from([0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 5.25, 1 / 3, 2 / 3])
NOTES = st.builds(Note, st.integers(36, 96), TIMES, st.just(0.0) | TIMES)


@st.composite
def sung_words(draw):
    syllables = (draw(st.text("abcèü'", min_size=1, max_size=3)), *draw(SYLLABLES))
    notes = draw(st.lists(NOTES, min_size=len(syllables), max_size=len(syllables)))
    return Word("".join(syllables), tuple(notes), syllables)


SONGS = st.lists(st.lists(sung_words(), min_size=1, max_size=3).map(tuple), min_size=1, max_size=3)


@settings(max_examples=10, deadline=None)
@given(sentences=SONGS.map(tuple), suffix=st.sampled_from([".musicxml", ".mxl", ".mid"]))
def test_songs_come_back(tmp_path_factory, sentences, suffix):
    path = tmp_path_factory.mktemp("songs") / f"song{suffix}"
    write_score(Song("song", sentences), path)
    [song], counts = read_score(path, sentences=AS_MARKED)
    assert song == Song("song", sentences)


@pytest.mark.parametrize("suffix", [".xml", ".midi"])
@pytest.mark.parametrize(
    "score", ["monteverdi/madrigal.4.1.mxl", "trecento/PMFC_06_Giovanni-01-Angnel_son_biancho.xml"]
)
def test_real_songs_come_back(tmp_path, score, suffix):
    songs, _ = read_score(common.getCorpusFilePath() / score)
    path = tmp_path / f"song{suffix}"
    write_score(songs[0], path)
    [song], _ = read_score(path)
    assert song.sentences == songs[0].sentences


def test_hyphens_of_a_written_score(tmp_path):
    path = tmp_path / "song.musicxml"
    notes = tuple(Note(pitch, 1.0) for pitch in (60, 62, 64, 65))
    word = Word("gloria", notes, ("glo", "", "ri", "a"))
    write_score(Song("song", ((word, Word("Deo", notes[:2]), Word("a", notes[:1], ("a",))),)), path)
    assert lyrics_of_parts(path) == [
        [("glo", "begin"), ("ri", "middle"), ("a", "end"), ("Deo", "single"), ("a", "single")]
    ]
    assert ">song</movement-title>" in path.read_text(encoding="utf-8")


def test_a_melody_without_words_is_written(tmp_path):
    song = Song("melody", ((Word("", (Note(60, 1.0), Note(62, 1.0, 2.0))),),))
    write_score(song, tmp_path / "melody.mid")
    assert phrases(tmp_path / "melody.mid")[0] == [[[60], [62]]]


def test_songs_that_cannot_be_written(tmp_path):
    good = Word("a", (Note(60, 1.0),), ("a",))
    for sentences, message in (
        ((), "song 'x' must have words, got none"),
        (((good,), (good, Word("lyric", ()))), "sentence 1, word 1: a word must have notes"),
        (((Word("ab", (Note(60, 1.0),), ("a",)),),), "syllables must make up the text 'ab'"),
    ):
        with pytest.raises(ScoreError, match=f"write_score: .*{message}"):
            write_score(Song("x", sentences), tmp_path / "x.mid")
    with pytest.raises(ScoreError, match=r"path must end in one of .*, got .*x\.pdf"):
        write_score(Song("x", ((good,),)), tmp_path / "x.pdf")
    assert list(tmp_path.iterdir()) == []
