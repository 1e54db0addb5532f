"""Song-level MASS against the authors' dataset, as far as it does not hang on their random numbers.

songmass_data.json, "mass": MusicMassDataset of microsoft/muzic at 2b87396, songmass/mass.
"""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokcore.algorithms.songmass import Example, collate, mass_example

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "songmass_data.json").read_text())["mass"]
ALIGN, SEPARATOR, MASK, END, PAD = 6, 5, 4, 2, 1


def size_of(kind: str) -> int:
    return 60 if kind == "lyric" else 152


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ours(case: dict, seed: int, **options) -> Example:
    kind = case["lang"]
    return mass_example(
        case["item"],
        kind=kind,
        size=size_of(kind),
        mode="code",
        ratio=case["ratio"],
        generator=seeded(seed),
        **options,
    )


def official(case: dict) -> Example:
    names = ("source", "source_sent_ids", None, "target", "output", "target_sent_ids", None, None)
    return Example(*(torch.tensor(case[name]) if name else None for name in names))


def replaced(before: list[int], after: list[int], kind: str, early: int) -> bool:
    """Whether each token, or each note of a melody, is <mask>, random in its range, or kept."""
    if kind == "lyric":
        units = zip(before, after, strict=True)
        return all(new in (MASK, old) or 7 - early <= new < 60 for old, new in units)
    old, new = (list(zip(side[::2], side[1::2], strict=True)) for side in (before, after))
    return all(
        note in ((MASK, MASK), kept) or (7 <= note[0] < 135 and 136 - early <= note[1] < 152)
        for kept, note in zip(old, new, strict=True)
    )


def check_structure(case: dict, example: Example, early: int) -> None:
    """Everything about an example that the rules fix, found again from its tokens alone."""
    kind, ratio = case["lang"], case["ratio"]
    tokens, ids, sentence = [], [], 0
    for token in case["item"]:
        if token not in (ALIGN, SEPARATOR):
            tokens.append(token)
            ids.append(sentence)
        sentence += token == SEPARATOR
    source, target = example.source.tolist(), example.target.tolist()
    assert source[-1] == END
    assert example.source_sentences.tolist() == [*ids, -1]
    segments = max(1, round(len(tokens) * ratio / 10))
    width, start, done = len(tokens) // segments, 0, 0
    for number in range(segments):
        end = len(tokens) if number == segments - 1 else (number + 1) * width
        end -= end % 2 if kind == "melody" else 0
        n = round((end - start) * ratio)
        n = max(2, n - n % 2) if kind == "melody" else max(1, n)
        chunk = target[done : done + n]
        previous = example.previous[done : done + n].tolist()
        step = 2 if kind == "melody" else 1
        places = []
        for a in range(start, end - n + 1, step):
            before = [END, *tokens][a : a + n]
            turned = step - 1  # a melody's decoder input is drawn as notes, from its first pitch
            inputs = before[turned:] + before[:turned], previous[turned:] + previous[:turned]
            if (
                chunk == tokens[a : a + n]
                and example.target_sentences[done : done + n].tolist() == ids[a : a + n]
                and source[start:a] == tokens[start:a]
                and source[a + n : end] == tokens[a + n : end]
                and replaced(tokens[a : a + n], source[a : a + n], kind, early)
                and replaced(inputs[0], inputs[1], kind, early)
            ):
                places.append(a)
        assert places, (number, start, end, n)
        start, done = end, done + n
    assert done == len(target) == len(example.previous) == len(example.target_sentences)


@pytest.mark.parametrize("case", CASES)
def test_structure_is_that_of_the_authors_code(case):
    """The same check takes the authors' examples (random tokens one index early) and ours."""
    check_structure(case, official(case), early=1)
    for seed in range(5):
        found = ours(case, seed)
        check_structure(case, found, early=0)
        check_structure(case, ours(case, seed, official_ranges=True), early=1)
        assert found.target.shape == official(case).target.shape
        assert found.source_words is None
        assert found.positions is None


def test_the_authors_random_durations_include_the_rest():
    """Index 135 in a duration's place, in their examples and with official_ranges only."""
    rests = Counter()
    for case in CASES:
        if case["lang"] == "melody":
            for seed in range(5):
                for early in (False, True):
                    example = ours(case, seed, official_ranges=early)
                    rests[early] += (example.source[1::2] == 135).sum().item()
    assert any(135 in c["source"][1::2] or 135 in c["target"][::2] for c in CASES)
    assert rests[True] > 0
    assert rests[False] == 0


@pytest.mark.parametrize("kind", ["lyric", "melody"])
def test_shares_of_masked_random_and_kept_tokens(kind):
    torch.manual_seed(0)
    pairs = torch.stack([torch.randint(7, 135, (4000,)), torch.randint(136, 152, (4000,))], 1)
    line = pairs.flatten() if kind == "melody" else torch.full((8000,), 7)
    size = 1_000_000 if kind == "lyric" else 152  # a random piece is almost never the old one
    example = mass_example(
        [*line.tolist(), 5], kind=kind, size=size, mode="code", ratio=0.5, generator=seeded(1)
    )
    unit = 1 if kind == "lyric" else 2
    for found in (example.source[:-1], example.previous):
        masked = (found == MASK).sum().item() / len(example.target)
        assert masked == pytest.approx(0.8, abs=0.02)
    changed = (example.source[:-1] != line) & (example.source[:-1] != MASK)
    assert changed.sum().item() / len(example.target) == pytest.approx(0.1, abs=0.02)
    assert len(example.target) == pytest.approx(4000, abs=40 * unit)


def test_where_spans_lie():
    """With 0.2 at either end of the segment, else anywhere: 8 of 10 places in 0.6 of the cases."""
    starts, generator = Counter(), seeded(0)
    line = [*range(7, 17), 5]
    for _ in range(2000):
        example = mass_example(
            line, kind="lyric", size=20, mode="code", ratio=0.1, generator=generator
        )
        starts[example.target.item() - 7] += 1
    for place in range(10):
        share = 0.06 + 0.2 * (place in (0, 9))
        assert starts[place] / 2000 == pytest.approx(share, abs=0.03)


LINES = st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any)


def line_of(notes: list[int], kind: str) -> list[int]:
    """Sentences of so many notes or words, all tokens different but for durations."""
    line, word = [], 7
    for count in notes:
        for _ in range(count):
            line += [word, ALIGN] if kind == "lyric" else [word, 136 + word % 16, ALIGN]
            word += 1
        line.append(SEPARATOR)
    return line


@given(LINES, st.sampled_from(["lyric", "melody"]), st.sampled_from([0.25, 0.5, 1.0]))
def test_paper_mode_is_the_figure(counts, kind, ratio):
    line = line_of(counts, kind)
    example = mass_example(
        line, kind=kind, size=size_of(kind), mode="paper", ratio=ratio, generator=seeded(0)
    )
    tokens = [t for t in line if t != ALIGN]
    ids = [tokens[:i].count(SEPARATOR) for i in range(len(tokens))]
    target = example.target.tolist()
    inside = [t != PAD for t in target]
    assert [t for t, i in zip(tokens, inside, strict=True) if i] == [t for t in target if t != PAD]
    expected = [MASK if i else t for t, i in zip(tokens, inside, strict=True)] + [END]
    assert example.source.tolist() == expected
    assert example.source_sentences.tolist() == [*ids, -1]
    assert example.target_sentences.tolist() == ids
    assert example.positions.tolist() == list(range(len(tokens)))
    for t, token in enumerate(example.previous.tolist()):
        before = tokens[t - 1] if t else END
        seen = before in (SEPARATOR, END) or (inside[t] and inside[t - 1])
        assert token == (before if seen else MASK)
    unit = 2 if kind == "melody" else 1
    for number, count in enumerate(counts):
        places = [i for i, s in enumerate(ids) if s == number and inside[i]]
        n = round(count * unit * ratio)
        n = max(2, n - n % 2) if kind == "melody" else max(1, n)
        assert len(places) == (n if count else 0)
        assert places == list(range(places[0], places[0] + len(places))) if places else True
        assert not places or (places[0] - ids.index(number)) % unit == 0


@pytest.mark.parametrize("mode", ["code", "paper"])
def test_the_generator_decides_and_the_global_state_does_not(mode):
    line = line_of([30, 20], "lyric")
    options = {"kind": "lyric", "size": 60, "mode": mode}
    first = mass_example(line, **options, generator=seeded(3))
    torch.manual_seed(9)
    again = mass_example(line, **options, generator=seeded(3))
    other = mass_example(line, **options, generator=seeded(4))
    for a, b in zip(first, again, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert not torch.equal(first.source, other.source)


@pytest.mark.parametrize("mode", ["code", "paper"])
def test_examples_are_collated(mode):
    lines = [line_of([9, 4], "melody"), line_of([2], "melody")]
    rows = [
        mass_example(line, kind="melody", size=152, mode=mode, generator=seeded(0))
        for line in lines
    ]
    for left in (False, True):
        batch = collate(rows, left=left)
        shorter = slice(-len(rows[1].target), None) if left else slice(len(rows[1].target))
        assert torch.equal(batch.target[1, shorter], rows[1].target)
        assert torch.equal(batch.target_sentences[1, shorter], rows[1].target_sentences)
        padding = batch.target_sentences[1] == -2
        assert padding.sum() == batch.target.shape[1] - len(rows[1].target)
        assert (batch.positions is None) == (mode == "code")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "song"}, r"kind must be one of \('lyric', 'melody'\), got 'song'"),
        ({"mode": "mass"}, r"mode must be one of \('code', 'paper'\), got 'mass'"),
        ({"ratio": 0.0}, r"ratio must be in \(0, 1\], got 0.0"),
        ({"ratio": float("nan")}, "got nan"),
        ({"size": 151}, "size of a melody vocabulary must be 152 or more, got 151"),
        ({"mode": "paper", "official_ranges": True}, "official_ranges is for mode 'code'"),
        ({"line": [5, 6, 5]}, r"line must hold a token beside \[align\] and \[sep\]"),
        ({"line": [67, 152, 5]}, r"line must hold tokens in \[0, 152\), got 152"),
        ({"line": [-1, 136, 5]}, "got -1"),
        ({"line": [67, 68, 5]}, "line of a melody must be pitch and duration in turn"),
        ({"line": [67, 5, 136, 5]}, "pitch and duration in turn"),
        ({"line": [67, 136, 67]}, "pitch and duration in turn"),
        ({"line": [67, 136, 3, 136, 5]}, "pitch and duration in turn"),
        ({"line": [136, 67, 5]}, "pitch and duration in turn"),
    ],
)
def test_wrong_input_is_refused(change, message):
    arguments = {"line": [67, 136, 6, 5], "kind": "melody", "size": 152, "mode": "code"} | change
    with pytest.raises(ValueError, match=f"mass_example: .*{message}"):
        mass_example(arguments.pop("line"), **arguments)
    with pytest.raises(ValueError, match="size of a lyric vocabulary must be 8 or more, got 7"):
        mass_example([3, 6, 5], kind="lyric", size=7, mode="code")
