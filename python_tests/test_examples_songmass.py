"""examples/songmass.py as a user starts it, with scores of their own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("music21", reason="the extra [music] is not installed")
pytest.importorskip("matplotlib")

from tokcore.algorithms.songmass import Note, Song, Word
from tokcore.integrations.music21 import read_score, write_score

EXAMPLES = Path(__file__).parents[1] / "examples"
METHODS = ["full", "no pretraining", "no constraint"]


def song(number):
    """Two sentences; the tune goes up or down with the number."""
    words = []
    for i, text in enumerate(("gloria", "in", "excelsis", "deo.", "et", "in", "terra", "pax.")):
        notes = tuple(Note(60 + (number * i + j) % 12, 0.5) for j in range(1 + i % 3))
        words.append(Word(text, notes, (text, *[""] * (len(notes) - 1))))
    return Song(f"song{number}", (tuple(words[:4]), tuple(words[4:])))


def run(corpus, output, *flags):
    command = [sys.executable, EXAMPLES / "songmass.py", "--quick", "--corpus", corpus]
    command += ["--output", output, *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_your_own_scores(tmp_path):
    corpus, output = tmp_path / "scores", tmp_path / "run"
    corpus.mkdir()
    for number in range(5):
        write_score(song(number), corpus / f"song{number}.musicxml")
    (corpus / "broken.musicxml").write_text("no score")
    done = run(corpus, output, "--seeds", "2")
    assert done.returncode == 0, done.stderr
    assert "1 files without lyrics or notes" in done.stdout
    assert "1 test songs, 1 valid songs, 3 train songs" in done.stdout
    assert "mean of 2 seeds" in done.stdout
    runs = json.loads((output / "metrics.json").read_text())["runs"]
    assert list(runs) == ["0", "1"]
    for seed in runs.values():
        assert list(seed["methods"]) == METHODS
        for name, found in seed["methods"].items():
            updates = 3 if name == "no pretraining" else 5
            assert [row["step"] for row in found["history"]] == list(range(1, updates + 1))
            assert found["melody_perplexity"] > 1
            assert found["lyric_perplexity"] > 1
            for share in ("PD", "DD", "alignment_accuracy", "diagonal accuracy"):
                assert 0 <= found[share] <= 1
            assert found["unfinished windows"] == 0
    [written], counts = read_score(output / "song.musicxml")
    assert [word.text for sentence in written.sentences for word in sentence]
    assert (output / "song.mid").stat().st_size > 0
    assert (output / "song.png").read_bytes().startswith(b"\x89PNG")


def test_too_few_scores(tmp_path):
    write_score(song(0), tmp_path / "song.musicxml")
    done = run(tmp_path, tmp_path / "run")
    assert done.returncode != 0
    assert "a split needs three scores with lyrics, got 1" in done.stderr
