"""What the SongMASS transformer refuses, and the texts it refuses it with."""

import pytest
import torch

from tokcore.algorithms.songmass.model import SongMass


def small(**options):
    sizes = {"width": 12, "heads": 3, "feed_forward": 20, "layers": 1, "dropout": 0.0}
    return SongMass(20, 152, **sizes, **options)


CHANGES = [
    ({"source": torch.zeros(1, 3)}, "SongMass: source must be int64, got torch.float32"),
    ({"source": torch.full((1, 9), 7)}, r"source must be \(B, length\) with at most 8 positions"),
    ({"source": torch.tensor([[7, 20, 2]])}, r"source must be in \[0, 20\), the lyric vocab.* 20"),
    ({"source": torch.tensor([[7, -1, 2]])}, r"source must be in \[0, 20\).* got -1"),
    ({"previous": torch.tensor([[2, 152]])}, r"previous must be in \[0, 152\).* got 152"),
    ({"source_kind": "song"}, r"kind of source must be one of .* got 'song'"),
    ({"target_kind": None}, r"kind of previous must be one of .* got None"),
    ({"source_sentences": torch.zeros(1, 2).long()}, r"source_sentences must be int64 of shape"),
    ({"target_sentences": torch.zeros(1, 2)}, r"target_sentences must be int64 of shape"),
    ({"source_sentences": torch.tensor([[0, 0, -2]])}, r"source_sentences must be .* -1 .* got -2"),
    ({"target_sentences": torch.tensor([[0, -1]])}, r"target_sentences must be .* -2 .* got -1"),
    (
        {"source": torch.tensor([[1, 7, 2]]), "source_sentences": torch.tensor([[0, -1, -1]])},
        "must be -1 at padding, got 0; are tokens and ids padded on the same side?",
    ),
    ({"source_words": torch.zeros(1, 3).long()}, "source_words and target_words must be given"),
    (
        {"source_words": torch.zeros(1, 3).long(), "target_words": torch.zeros(1, 3).long()},
        "target_words must be int64 of shape",
    ),
    ({"positions": torch.zeros(1, 3).long()}, r"positions must be int64 of shape \(1, 2\)"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_wrong_inputs_are_named(change, message):
    good = {
        "source": torch.tensor([[7, 5, 2]]),
        "previous": torch.tensor([[2, 67]]),
        "source_kind": "lyric",
        "target_kind": "melody",
        "source_sentences": torch.tensor([[0, 0, -1]]),
        "target_sentences": torch.tensor([[0, 0]]),
    }
    model = small(max_positions=8)
    model(**good)
    with pytest.raises((ValueError, TypeError), match=message):
        model(**{**good, **change})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lyric_size": 7}, "lyric_size must be at least 8, got 7"),
        ({"melody_size": 0}, "melody_size must be at least 8, got 0"),
        ({"width": 10, "heads": 4}, "width must be even and divisible by heads, got 10 and 4"),
        ({"width": 9, "heads": 3}, "width must be even"),
        ({"heads": 0}, "width must be even and divisible by heads"),
        ({"layers": 0}, "must be at least 1"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": float("nan")}, "dropout must be in"),
    ],
)
def test_wrong_sizes_are_named(options, message):
    with pytest.raises(ValueError, match=f"SongMass: .*{message}"):
        SongMass(**{"lyric_size": 20, "melody_size": 152, "width": 12, "heads": 3, **options})


def test_a_step_names_what_is_wrong():
    model = small(max_positions=3)
    source = torch.tensor([[7, 5, 2]])
    sentences = torch.tensor([[0, 0, -1]])
    state = model.start(source, sentences, source_kind="lyric", target_kind="melody", hypotheses=2)
    with pytest.raises(ValueError, match=r"tokens must have shape \(1, 2\), got \(1, 1\)"):
        model.step(state, torch.tensor([[2]]))
    for _ in range(3):
        model.step(state, torch.tensor([[2, 2]]))
    with pytest.raises(ValueError, match="max_positions is 3"):
        model.step(state, torch.tensor([[2, 2]]))
    with pytest.raises(ValueError, match=r"target_kind must be one of .* got 'x'"):
        model.start(source, sentences, source_kind="lyric", target_kind="x")
