"""How near a generated melody is to the real one, and an alignment and a model to the truth.

Pitch similarity (PD), duration similarity (DD) and melody distance (MD) are published under one
name with two definitions, which must not be mixed:

                    songmass_scores                   telemelody_scores (also ReLyMe)
    PD  pitches     0..127 and the rest               folded into 60..83, without rests
    DD  durations   of notes and rests, 0.25 beats    of words, rests included, in multiples of the
                                                      song's shortest
    MD  pitches     as they are                       folded into 60..83
        sampled     every 0.5 beats                   every shortest note or rest of the song

A note is (pitch, steps): pitch 128 is a rest, a step 0.25 beats, as decode_melody gives them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokcore.ops import dtw

Notes = Sequence[tuple[int, int]]
_REST = 128
_STEPS = 132  # bins of durations: 33 beats
_SONGS_AT_ONCE = 32  # in one batch of dtw, whose costs are (songs, longest, longest)


class MelodyScores(NamedTuple):
    """Means over songs."""

    pitch_similarity: float  # PD, 0..1
    duration_similarity: float  # DD, 0..1
    melody_distance: float  # MD, >= 0; NaN where no song has one
    songs: int
    without_distance: int  # songs in which either melody is too short to have one


class AlignmentAccuracy(NamedTuple):
    """The share of notes that are sung on the right word."""

    accuracy: float
    correct: int
    notes: int


def songmass_scores(targets: Sequence[Notes], hypotheses: Sequence[Notes]) -> MelodyScores:
    """PD, DD and MD as SongMASS defines them, averaged over songs.

    ::

        PD = sum_b min(p_b, q_b)     p, q: shares of the 129 pitches, rest included
        DD = sum_b min(p_b, q_b)     p, q: shares of the durations, those of rests included
        MD = DTW(x - mean x, y - mean y) / len(y)     x, y: songmass_curve of target, hypothesis

    with |x - y| as the cost and steps (1, 1), (1, 0), (0, 1) in DTW.

    Args:
        targets: the real melodies, (pitch, steps) of each note and rest.
        hypotheses: the generated ones, in the same order.
    Returns:
        MelodyScores.
    Raises:
        ValueError: no song, different numbers of songs, a pitch or duration out of range.

    >>> songmass_scores([[(60, 4), (62, 4)]], [[(60, 4), (64, 4)]])
    MelodyScores(pitch_similarity=0.5, duration_similarity=1.0, melody_distance=1.0, songs=1,
                 without_distance=0)

    Source: microsoft/muzic:songmass/evaluate (evaluate_histo.py, evaluate_timeseries.py, dtw 1.4.0;
    dtw before 1.4.0 divides by both lengths, so that the official numbers depend on its version).
    """
    name = "songmass_scores"
    _check_songs(name, targets, hypotheses)
    for song in (*targets, *hypotheses):
        _check_notes(name, song)
    curves = [[songmass_curve(song) for song in side] for side in (targets, hypotheses)]
    return _scores(
        [_overlap(*(_pitches(song) for song in pair)) for pair in _pairs(targets, hypotheses)],
        [_overlap(*(_durations(song) for song in pair)) for pair in _pairs(targets, hypotheses)],
        _distances(*curves),
    )


def telemelody_scores(
    targets: Sequence[Sequence[Notes]], hypotheses: Sequence[Sequence[Notes]]
) -> MelodyScores:
    """PD, DD and MD as TeleMelody and ReLyMe define them, averaged over songs.

    The equations are those of songmass_scores; pitches, durations and curves are those of the table
    above. A pitch of 60 or less becomes 60 + p % 12, one of 84 or more 72 + p % 12. The duration of
    a word is the sum of its notes and rests, divided by the song's shortest word and rounded down;
    words longer than 33 beats are left out. The shortest note or rest, not word, samples a curve.

    Args:
        targets: the real melodies: the (pitch, steps) of each word of each song.
        hypotheses: the generated ones, their words as aligned.
    Returns:
        MelodyScores.
    Raises:
        ValueError: as songmass_scores.

    >>> telemelody_scores([[[(60, 2)], [(62, 4)]]], [[[(48, 4)], [(62, 8)]]])
    MelodyScores(pitch_similarity=1.0, duration_similarity=1.0, melody_distance=0.0, songs=1,
                 without_distance=0)

    Source: microsoft/muzic:telemelody/evaluation (cal_similarity.py, cal_dtw.py).
    """
    name = "telemelody_scores"
    _check_songs(name, targets, hypotheses)
    for song in (*targets, *hypotheses):
        for word in song:
            _check_notes(name, word)
    sides = [
        [[(_fold(pitch), steps) for word in song for pitch, steps in word] for song in side]
        for side in (targets, hypotheses)
    ]
    curves = [
        [_curve(song, min((s for _, s in song), default=1)) for song in side] for side in sides
    ]
    heard = [[[note for note in song if note[0] != _REST] for song in side] for side in sides]
    return _scores(
        [_overlap(*(_pitches(song) for song in pair)) for pair in _pairs(*heard)],
        [_overlap(*(_word_durations(song) for song in p)) for p in _pairs(targets, hypotheses)],
        _distances(*curves),
    )


def songmass_curve(notes: Notes) -> list[int]:
    """The pitch at every second step of 0.25 beats: what SongMASS's melody distance compares.

    A rest holds the pitch before it; rests at the start are left out.

    >>> songmass_curve([(128, 4), (60, 3), (128, 2), (62, 1)])
    [60, 60, 60]

    Source: microsoft/muzic:songmass/evaluate/evaluate_timeseries.py.
    """
    return _curve(notes, 2)


def alignment_accuracy(
    predicted: Sequence[Sequence[Sequence[int]]], reference: Sequence[Sequence[int]]
) -> AlignmentAccuracy:
    """The share of notes, over all sentences, whose predicted word is the real one.

    The paper's definition is not known; this one is ours: a note counts as right where it is sung
    on its word and on no other.

    Args:
        predicted: for each sentence the words of each note, as note_words gives them.
        reference: for each sentence the word of each note, -1 for a rest, which does not count
            (real_words).
    Returns:
        AlignmentAccuracy.
    Raises:
        ValueError: sentences or notes that differ in number; no note that counts.

    >>> alignment_accuracy([[(0,), (), (0, 1), (1,)]], [[0, -1, 1, 1]])
    AlignmentAccuracy(accuracy=0.6666666666666666, correct=2, notes=3)
    """
    name = "alignment_accuracy"
    counts = [[len(sentence) for sentence in side] for side in (predicted, reference)]
    if counts[0] != counts[1]:
        raise ValueError(
            f"{name}: predicted and reference must have the same notes in each sentence, got "
            f"{counts[0]} and {counts[1]}"
        )
    right = [
        tuple(words) == (word,)
        for several, sentence in zip(predicted, reference, strict=True)
        for words, word in zip(several, sentence, strict=True)
        if word != -1
    ]
    if not right:
        raise ValueError(f"{name}: reference must hold a note that is no rest, got none")
    return AlignmentAccuracy(sum(right) / len(right), sum(right), len(right))


def perplexity(logprob: Tensor, mask: Tensor) -> float:
    """exp of the mean negative log-probability of the tokens that count.

    Equivalent to ``torch.exp(-logprob[mask].mean())``, in float64.

    Args:
        logprob: (...) float, natural log-probability of each target token (tokcore.ops.
            token_logprob).
        mask: (...) bool, True = counts. Whether [sep] and </s> count is not known of the paper.
    Returns:
        The perplexity, inf where a token has probability 0.
    Raises:
        TypeError, ValueError: wrong dtypes or shapes, no token that counts.

    >>> logprob = torch.tensor([[0.5, 0.125, 0.0]]).log()
    >>> perplexity(logprob, torch.tensor([[True, True, False]]))
    4.0
    """
    if not logprob.is_floating_point() or mask.dtype != torch.bool:
        raise TypeError(
            "perplexity: logprob must be floating point and mask bool, got "
            f"{logprob.dtype} and {mask.dtype}"
        )
    if logprob.shape != mask.shape:
        raise ValueError(
            "perplexity: logprob and mask must have one shape, got "
            f"{tuple(logprob.shape)} and {tuple(mask.shape)}"
        )
    kept = logprob.detach()[mask].double()
    if kept.numel() == 0:
        raise ValueError("perplexity: mask must keep a token, got none")
    return torch.exp(-kept.mean()).item()


def _pairs(targets, hypotheses):
    return zip(targets, hypotheses, strict=True)


def _scores(pitch: list[float], duration: list[float], distance: list[float]) -> MelodyScores:
    known = [value for value in distance if not math.isnan(value)]
    return MelodyScores(
        float(np.mean(pitch)),
        float(np.mean(duration)),
        float(np.mean(known)) if known else math.nan,
        len(pitch),
        len(distance) - len(known),
    )


def _overlap(target: np.ndarray, hypothesis: np.ndarray) -> float:
    p, q = (counts / max(counts.sum(), 1) for counts in (target, hypothesis))
    return float(((p + q - np.abs(p - q)) / 2).sum())


def _pitches(notes: Notes) -> np.ndarray:
    return np.bincount([pitch for pitch, _ in notes], minlength=_REST + 1)


def _durations(notes: Notes) -> np.ndarray:
    return np.bincount([steps - 1 for _, steps in notes], minlength=_STEPS)


def _word_durations(words: Sequence[Notes]) -> np.ndarray:
    sums = [sum(steps for _, steps in word) for word in words]
    sums = [total for total in sums if 0 < total <= _STEPS]
    # A duration of exactly 33 beats in a song whose shortest is 0.25 lands in the last bin.
    multiples = [min(total // min(sums), _STEPS - 1) for total in sums]
    return np.bincount(multiples, minlength=_STEPS)


def _fold(pitch: int) -> int:
    if pitch == _REST or 60 <= pitch < 84:
        return pitch
    return (60 if pitch < 60 else 72) + pitch % 12


def _curve(notes: Notes, every: int) -> list[int]:
    values: list[int] = []
    for pitch, steps in notes:
        if pitch != _REST:
            values += [pitch] * steps
        elif values:
            values += [values[-1]] * steps
    return values[: len(values) // every * every : every]


def _distances(targets: list[list[int]], hypotheses: list[list[int]]) -> list[float]:
    """DTW over the length of the hypothesis, NaN where a curve is empty."""
    found = [math.nan] * len(targets)
    full = [i for i, pair in enumerate(_pairs(targets, hypotheses)) if all(pair)]
    for start in range(0, len(full), _SONGS_AT_ONCE):
        part = full[start : start + _SONGS_AT_ONCE]
        rows = torch.tensor([len(targets[i]) for i in part])
        columns = torch.tensor([len(hypotheses[i]) for i in part])
        cost = torch.zeros(len(part), int(rows.max()), int(columns.max()), dtype=torch.float64)
        for item, i in zip(cost, part, strict=True):
            x, y = (torch.tensor(c, dtype=torch.float64) for c in (targets[i], hypotheses[i]))
            difference = (x - x.mean()).unsqueeze(1) - (y - y.mean())
            item[: len(x), : len(y)] = difference.abs()
        distances = dtw(cost, rows, columns).cost / columns
        for i, distance in zip(part, distances.tolist(), strict=True):
            found[i] = distance
    return found


def _check_songs(name: str, targets, hypotheses) -> None:
    if len(targets) != len(hypotheses) or not targets:
        raise ValueError(
            f"{name}: targets and hypotheses must be as many songs, one at least, got "
            f"{len(targets)} and {len(hypotheses)}"
        )


def _check_notes(name: str, notes: Notes) -> None:
    for pitch, steps in notes:
        if not 0 <= pitch <= _REST or not 1 <= steps <= _STEPS:
            raise ValueError(
                f"{name}: a note must be (pitch 0..{_REST}, steps 1..{_STEPS}), got "
                f"{(pitch, steps)}"
            )
