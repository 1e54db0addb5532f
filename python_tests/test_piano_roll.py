"""The figure of a song: every note and syllable is there, and no two syllables overlap."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the extra [examples] is not installed")

from tokcore.algorithms.songmass.song import Note, Song, Word

# Third parties announce their own deprecations.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def piano_roll(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    monkeypatch.setenv("MPLBACKEND", "agg")
    import piano_roll

    yield piano_roll
    del sys.modules["piano_roll"]


def word(text, *syllables, beats=0.25, rest=0.0):
    notes = [Note(60 + index, beats, rest * (index == 0)) for index in range(len(syllables) or 2)]
    return Word(text, tuple(notes), syllables)


FIRST = (
    word("stretto", "stret", "to"),
    word("$trau$$", "$trau", "$$"),
    word("melisma", "me", "", "lisma"),
)
SONG = Song("song", (FIRST, (word("unknown", rest=3.0), word("", beats=4.0))))


def test_bars_and_syllables(piano_roll):
    figure, axis = piano_roll.plt.subplots()
    piano_roll.draw(SONG, axis, beat=10.0)
    bars = [bar for bar in axis.collections if type(bar).__name__ != "LineCollection"]
    corners = [bar.get_paths()[0].get_extents().bounds for bar in bars]
    assert len(corners) == sum(len(w.notes) for line in SONG.sentences for w in line)
    assert corners[1] == pytest.approx((10.25, 60.6, 0.25, 0.8))
    assert corners[-1] == pytest.approx((19.25, 60.6, 4.0, 0.8))
    assert axis.get_xlim() == (9.5, 23.75)
    texts = [text.get_text() for text in axis.texts]
    assert texts == ["stret", "-to", "$trau", "-$$", "me", "-lisma", "unknown"]
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axis.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    colours = {text.get_color() for text in axis.texts}
    assert colours == set(piano_roll.COLOURS[:2])
    piano_roll.plt.close(figure)


def test_a_song_of_several_rows(piano_roll, tmp_path):
    long = Song("long", SONG.sentences * 12)
    piano_roll.save(long, tmp_path / "long.png")
    one, many = tmp_path / "one.png", tmp_path / "long.png"
    piano_roll.save(SONG, one)
    assert one.read_bytes().startswith(b"\x89PNG")
    height = [int.from_bytes(path.read_bytes()[20:24], "big") for path in (one, many)]
    assert height[1] > 2 * height[0]
