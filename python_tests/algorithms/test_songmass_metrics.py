"""PD, DD and MD against the authors' scripts, alignment accuracy and perplexity.

songmass_metrics.json: microsoft/muzic at 2b87396, songmass/evaluate, with dtw 1.4.0.
"""

import json
import math
from itertools import chain
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokcore.algorithms.songmass import (
    alignment_accuracy,
    decode_melody,
    metrics,
    perplexity,
    songmass_curve,
    songmass_scores,
    telemelody_scores,
)

GOLDEN = Path(__file__).parents[1] / "golden"
METRICS = json.loads((GOLDEN / "songmass_metrics.json").read_text())
CASES = METRICS["cases"]


def notes_of(pairs: list[list[str]]) -> list[tuple[int, int]]:
    return [(int(pitch), int(duration) - 128) for pitch, duration in pairs]


def same(found: float, expected: float | None) -> bool:
    if expected is None:
        return math.isnan(found)
    return found == pytest.approx(expected, abs=1e-12, rel=1e-12)


# ---- SongMASS ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_scores_of_a_song_equal_the_authors(case):
    target, hypothesis = notes_of(case["target"]), notes_of(case["hypo"])
    assert songmass_curve(target) == case["sampled_target"]
    assert songmass_curve(hypothesis) == case["sampled_hypo"]
    found = songmass_scores([target], [hypothesis])
    assert same(found.pitch_similarity, case["pd"])
    assert same(found.duration_similarity, case["dd"])
    assert same(found.melody_distance, case["md"])
    assert (found.songs, found.without_distance) == (1, case["md"] is None)


def test_scores_of_a_corpus_are_means_over_songs():
    targets = [notes_of(case["target"]) for case in CASES]
    hypotheses = [notes_of(case["hypo"]) for case in CASES]
    found, expected = songmass_scores(targets, hypotheses), METRICS["corpus"]
    assert same(found.pitch_similarity, expected["pd"])
    assert same(found.duration_similarity, expected["dd"])
    assert same(found.melody_distance, expected["md"])
    assert found.songs == len(CASES)
    assert found.without_distance == sum(case["md"] is None for case in CASES)


def test_the_authors_pipeline_from_generated_text_to_printed_numbers():
    pipeline = METRICS["pipeline"]
    names = {"[sep]": 5, "[align]": 6, "<unk>": 3}

    def tokens(text: str) -> list[int]:
        return [names[t] if t in names else 7 + int(t) for t in text.split()]

    lines = [line.split("\t") for line in pipeline["hypo"] if line.startswith("H-")]
    generated = {int(name[2:]): tokens(text) for name, _, text in lines}
    hypotheses, targets = [[], []], [[], []]
    for window, song in enumerate(pipeline["song_ids"]):
        wanted = pipeline["lyric"][window].split().count("[sep]")
        notes = decode_melody(generated[window], sentences=wanted).sentences
        hypotheses[song] += chain.from_iterable(notes)
        targets[song] += chain.from_iterable(
            decode_melody(tokens(pipeline["melody"][window])).sentences
        )
    assert hypotheses == [notes_of(song) for song in pipeline["hypos_parsed"]]
    assert targets == [notes_of(song) for song in pipeline["targets_parsed"]]
    found = songmass_scores(targets, hypotheses)
    printed = [float(line.split()[-1].rstrip(".")) for line in pipeline["printed"]]
    assert list(found[:3]) == pytest.approx(printed, abs=1e-12)


NOTES = st.lists(st.tuples(st.integers(0, 128), st.integers(1, 16)), max_size=6)


def brute_force_distance(x: list[int], y: list[int]) -> float:
    """The cheapest of all warping paths, by recursion over every one of them."""
    a, b = ([v - sum(c) / len(c) for v in c] for c in (x, y))

    def cheapest(i: int, j: int) -> float:
        steps = [(i - 1, j - 1), (i - 1, j), (i, j - 1)]
        before = [cheapest(*step) for step in steps if min(step) >= 0]
        return abs(a[i] - b[j]) + min(before, default=0.0)

    return cheapest(len(x) - 1, len(y) - 1) / len(y)


@given(NOTES, NOTES)
def test_songmass_against_its_definition(target, hypothesis):
    found = songmass_scores([target], [hypothesis])
    for side, value in ((0, found.pitch_similarity), (1, found.duration_similarity)):
        shares = [
            [[n[side] for n in notes].count(v) / max(len(notes), 1) for v in range(129)]
            for notes in (target, hypothesis)
        ]
        assert value == pytest.approx(sum(map(min, *shares)), abs=1e-12)
    curves = [songmass_curve(notes)[:6] for notes in (target, hypothesis)]
    if all(curves):
        short = [[(pitch, 2) for pitch in curve] for curve in curves]
        expected = brute_force_distance(*curves)
        assert songmass_scores(*([s] for s in short)).melody_distance == pytest.approx(expected)


@given(st.lists(st.tuples(st.integers(30, 90), st.integers(1, 16)), min_size=1, max_size=6))
def test_a_melody_is_nearest_to_itself_and_as_near_transposed(notes):
    notes = [*notes, (60, 2)]
    found = songmass_scores([notes], [notes])
    assert found[:2] == pytest.approx((1.0, 1.0))
    assert found.melody_distance == 0.0
    moved = songmass_scores([notes], [[(pitch + 7, steps) for pitch, steps in notes]])
    assert moved.melody_distance == pytest.approx(0.0, abs=1e-9)
    assert moved.duration_similarity == pytest.approx(1.0)


def test_songs_share_calls_of_the_operator(monkeypatch):
    seen, operator = [], metrics.dtw

    def counted(cost, *lengths):
        seen.append(len(cost))
        return operator(cost, *lengths)

    monkeypatch.setattr(metrics, "dtw", counted)
    songs = [[(60 + i % 3, 2 + i % 5), (70, 2)] for i in range(40)]
    hypotheses = [song[::-1] for song in songs]
    hypotheses[3] = []
    found = songmass_scores(songs, hypotheses)
    assert seen == [32, 7]
    each = [
        songmass_scores([a], [b]).melody_distance for a, b in zip(songs, hypotheses, strict=True)
    ]
    known = [value for value in each if not math.isnan(value)]
    assert found.melody_distance == pytest.approx(sum(known) / 39)
    assert found.without_distance == 1


# ---- TeleMelody -------------------------------------------------------------------------------


def test_telemelody_folds_pitches_into_two_octaves():
    """p <= 60 to 60..71, p >= 84 to 72..83; the rest has no share, unlike in SongMASS."""
    pitches = [0, 47, 48, 59, 60, 61, 71, 72, 83, 84, 95, 127]
    folded = [60, 71, 60, 71, 60, 61, 71, 72, 83, 72, 83, 79]
    for pitch, expected in zip(pitches, folded, strict=True):
        one = telemelody_scores([[[(128, 1), (pitch, 1)]]], [[[(expected, 1)]]])
        assert one.pitch_similarity == 1.0
        other = telemelody_scores([[[(pitch, 1)]]], [[[(expected + 1 - 24 * (expected == 83), 1)]]])
        assert other.pitch_similarity == 0.0


def test_telemelody_durations_are_of_words_in_multiples_of_the_shortest():
    # words of 2, 4 + 1 (a rest), 7 steps: multiples 1, 2 (5 / 2 down), 3 (7 / 2 down)
    target = [[(60, 2)], [(128, 1), (62, 3), (64, 1)], [(60, 7)]]
    # words of 3, 3, 6, 10: multiples 1, 1, 2, 3: shares .5, .25, .25 against a third each
    hypothesis = [[(60, 3)], [(60, 1), (60, 2)], [(60, 6)], [(60, 10)]]
    found = telemelody_scores([target], [hypothesis])
    assert found.duration_similarity == pytest.approx(1 / 3 + 1 / 4 + 1 / 4)
    # a word longer than 33 beats has no bin, the longest with one shares the last
    long = [[(60, 132), (60, 1)], [(60, 1)]]
    assert telemelody_scores([long], [[[(60, 1)]]]).duration_similarity == 1.0
    last = [[[(60, 132)], [(60, 1)]], [[(60, 131)], [(60, 1)]]]
    assert telemelody_scores(last[:1], last[1:]).duration_similarity == 1.0


def test_telemelody_samples_by_the_shortest_note_of_each_song():
    # steps of 2: 60 60 62; steps of 4, an octave lower and folded: 60 60 62
    target, hypothesis = [[(60, 4)], [(62, 2)]], [[(48, 8), (50, 4)]]
    assert telemelody_scores([target], [hypothesis]).melody_distance == 0.0
    # a rest of 1 step is the shortest of the target, and holds 60: 60 60 60 62 62 62 62
    found = telemelody_scores([[[(60, 2), (128, 1), (62, 4)]]], [[[(60, 4), (62, 4)]]])
    low, high = 60 - 428 / 7, 62 - 428 / 7
    assert found.melody_distance == pytest.approx((3 * abs(low + 1) + 4 * abs(high - 1)) / 2)


def test_telemelody_of_empty_songs():
    found = telemelody_scores([[[(60, 2)]], []], [[], []])
    assert found[:2] == (0.0, 0.0)
    assert math.isnan(found.melody_distance)
    assert (found.songs, found.without_distance) == (2, 2)


@pytest.mark.parametrize("scores", [songmass_scores, telemelody_scores])
def test_wrong_songs_are_refused(scores):
    def song(*notes):
        return list(notes) if scores is songmass_scores else [list(notes)]

    name = scores.__name__
    with pytest.raises(ValueError, match=f"{name}: targets .* one at least, got 0 and 0"):
        scores([], [])
    with pytest.raises(ValueError, match=f"{name}: .*got 1 and 2"):
        scores([song((60, 1))], [song((60, 1))] * 2)
    for note in ((129, 1), (-1, 1), (60, 0), (60, 133)):
        with pytest.raises(
            ValueError, match=rf"{name}: a note must .*, got \({note[0]}, {note[1]}"
        ):
            scores([song((60, 1))], [song(note)])


# ---- alignment and perplexity -----------------------------------------------------------------


def test_alignment_accuracy_counts_notes_over_all_sentences():
    predicted = [[(0,), (0,), (), (1,)], [(3,), (3, 4), (4,)], []]
    reference = [[0, 1, -1, 1], [3, 4, 5], []]
    assert alignment_accuracy(predicted, reference) == (3 / 6, 3, 6)
    with pytest.raises(ValueError, match=r"the same notes .*, got \[1\] and \[2\]"):
        alignment_accuracy([[(0,)]], [[0, 1]])
    with pytest.raises(ValueError, match="reference must hold a note that is no rest"):
        alignment_accuracy([[()]], [[-1]])


def test_perplexity_is_over_kept_tokens():
    probability = torch.tensor([[0.25, 0.5], [0.125, 0.9]], dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, False]])
    assert perplexity(probability.log(), mask) == pytest.approx(64 ** (1 / 3))
    unread = probability.log().masked_fill(~mask, torch.nan)
    assert perplexity(unread, mask) == pytest.approx(64 ** (1 / 3))
    assert perplexity(torch.tensor([-torch.inf]), torch.tensor([True])) == math.inf
    with pytest.raises(ValueError, match="mask must keep a token"):
        perplexity(probability.log(), ~mask & mask)
    with pytest.raises(ValueError, match="one shape"):
        perplexity(probability.log(), mask[0])
    with pytest.raises(TypeError, match=r"mask bool, got .* and torch.int64"):
        perplexity(probability.log(), mask.long())
