"""Alignment of sentences and songs against the authors' code.

songmass_align_sent.json: align_sent and align_song of microsoft/muzic at 2b87396,
relyme/songmass_en/gen_at/11_l2m_dp_bak.py.
"""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokcore.algorithms.songmass import (
    Group,
    Note,
    SentenceAlignment,
    Song,
    SongAlignment,
    Word,
    align,
    align_sentence,
    align_sentences,
    align_song,
    aligned_song,
    alignment_accuracy,
    encode_line,
    encode_lyric,
    encode_melody,
    lyric_vocabulary,
    make_windows,
    note_words,
    piece_words,
    quantise,
    real_words,
)

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "songmass_align_sent.json").read_text())
SENTENCES = [case for case in CASES if case["kind"] == "align_sent"]
SONGS = [case for case in CASES if case["kind"] == "align_song"]
SEPARATOR, END = 5, 2


def melody_tokens(texts: list[str]) -> list[int]:
    """Pitches and durations both lie 7 beyond their text."""
    return [SEPARATOR if text == "[sep]" else 7 + int(text) for text in texts]


def lyric_tokens(texts: list[str]) -> list[int]:
    return [SEPARATOR if text == "[sep]" else 7 + int(text[1:]) for text in texts]


def attention_of(case: dict, tokens: int, pieces: int) -> torch.Tensor:
    return torch.tensor(case["attn"], dtype=torch.float64).reshape(-1, tokens, pieces)


def as_text(found: SentenceAlignment) -> tuple[list, list]:
    """Groups as the authors write them, with their notes and words for what is not there."""
    melody = [
        [[str(found.notes[i][0]), str(found.notes[i][1] + 128)] for i in group.notes]
        or [["128", "129"]]
        for group in found.groups
    ]
    lyric = [[f"w{found.pieces[i] - 7}" for i in group.pieces] or ["-"] for group in found.groups]
    return melody, lyric


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """How many sentences each call of the operator was given."""
    seen, operator = [], align.monotonic_align

    def counted(scores, *arguments, **options):
        seen.append(len(scores))
        return operator(scores, *arguments, **options)

    monkeypatch.setattr(align, "monotonic_align", counted)
    return seen


# ---- golden -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SENTENCES)
def test_sentences_equal_the_authors(case):
    melody, lyric = melody_tokens(case["melody"]), lyric_tokens(case["lyric"])
    (attention,) = attention_of(case, len(melody), len(lyric))
    found = align_sentence(attention, melody, lyric, length_penalty=case["len_pen"])
    assert as_text(found) == (case["out_melody"], case["out_lyric"])
    assert found.dropped == 0


def test_a_batch_is_one_call_and_equals_its_sentences(calls):
    melodies = [melody_tokens(case["melody"]) for case in SENTENCES]
    lyrics = [lyric_tokens(case["lyric"]) for case in SENTENCES]
    attentions = [
        attention_of(case, len(melody), len(lyric))[0]
        for case, melody, lyric in zip(SENTENCES, melodies, lyrics, strict=True)
    ]
    found = align_sentences(attentions, melodies, lyrics)
    for case, one in zip(SENTENCES, found, strict=True):
        assert as_text(one) == (case["out_melody"], case["out_lyric"])
    only_rests = sum(all(t == "128" for t in case["melody"][::2]) for case in SENTENCES)
    assert calls == [len(SENTENCES) - only_rests]


@pytest.mark.parametrize("end", [[], [END], [END, 1, 1]])
@pytest.mark.parametrize("case", SONGS)
def test_songs_equal_the_authors(case, end, calls):
    melody = melody_tokens(case["melody"])
    lyric = lyric_tokens([text for text in case["lyric"] if text != "[align]"])
    attention = attention_of(case, len(melody), len(lyric))[case["target_layer"]]
    shape = (len(melody) + len(end), len(lyric) + len(end))
    padded = torch.full(shape, torch.nan, dtype=torch.float64)
    padded[: len(melody), : len(lyric)] = attention
    found = align_song([padded], [melody + end], [lyric + end])
    assert (found.unmatched, found.dropped) == (0, 0)
    groups = [as_text(sentence) for sentence in found.sentences]
    for side, name in enumerate(("out_melody", "out_lyric")):
        assert [x for group in groups for x in (*group[side], "[sep]")] == case[name]
    assert len(calls) == 1


@pytest.mark.parametrize("case", SONGS)
def test_windows_of_a_song_are_its_sentences(case):
    melody = melody_tokens(case["melody"])
    lyric = lyric_tokens([text for text in case["lyric"] if text != "[align]"])
    attention = attention_of(case, len(melody), len(lyric))[5]
    whole = align_song([attention], [melody], [lyric])
    rows, columns = melody.index(SEPARATOR) + 1, lyric.index(SEPARATOR) + 1
    parts = align_song(
        [attention[:rows, :columns], attention[rows:, columns:]],
        [melody[:rows], melody[rows:]],
        [lyric[:columns], lyric[columns:]],
    )
    assert parts == whole


# ---- what is not there, what is malformed ------------------------------------------------------


def test_sentences_without_one_side_are_one_group(calls):
    notes, rests = [67, 136, 135, 137, 69, 136], [135, 136, 135, 136]
    for melody, lyric, groups in (
        ([], [8, 9], [Group((), (0, 1))]),
        (rests, [8, 9], [Group((), (0, 1))]),
        (notes, [], [Group((0, 2), ())]),
        ([], [], []),
        (rests, [], []),
    ):
        found = align_sentence(torch.zeros(len(melody), len(lyric)), melody, lyric)
        assert found.groups == groups
        assert found.pieces == lyric
    assert calls == []
    assert align_song([], [], []) == SongAlignment([], 0, 0)


def test_malformed_notes_are_left_out_and_counted():
    """Their rows may hold anything: only rows of pitches and durations in pairs are read."""
    torch.manual_seed(0)
    attention = torch.rand(6, 3)
    melody = [67, 136, 135, 137, 69, 138]
    expected = align_sentence(attention, melody, [8, 9, 10])
    rows = torch.full((10, 3), torch.nan)
    rows[[1, 3, 5, 6, 7, 8]] = attention
    found = align_sentence(rows, [71, 67, 3, 136, 141, 135, 137, 69, 138, 70], [8, 9, 10])
    assert found == expected._replace(dropped=4)


def test_a_sentence_without_a_partner_is_counted():
    melody, lyric = [67, 136, 5, 69, 136, 5, 71, 136], [8, 5]
    found = align_song([torch.ones(8, 2)], [melody], [lyric])
    assert [one.notes for one in found.sentences] == [[(60, 1)]]
    assert found.unmatched == 2
    for ending, unmatched in (([5, 2], 2), ([5, 11], 3), ([11, 2], 2)):
        lyric = [8, 5, 9, 5, 10, *ending]
        found = align_song([torch.ones(2, 7)], [[69, 5]], [lyric])
        assert found == ([SentenceAlignment([], [8], [Group((), (0,))], 1)], unmatched, 1)


def test_attention_is_not_differentiated():
    attention = torch.eye(2, requires_grad=True)
    found = align_sentence(attention, [67, 136], [8, 9])
    assert found.groups == [Group((0,), (0, 1))]


@pytest.mark.parametrize(
    ("attention", "melody", "lyric", "message"),
    [
        (torch.zeros(2, 2), [67, 136], [8], r"sentence 0: attention must be .* shape \(2, 1\), a"),
        (torch.zeros(2, 1).long(), [67, 136], [8], r"must be floating point .*, got torch.int64"),
        (torch.zeros(2, 1), [67, 5], [8], r"melody must hold no \[sep\] \(5\) nor .*, got 5"),
        (torch.zeros(2, 2), [67, 136], [8, 6], r"lyric must hold no \[sep\] .*, got 6"),
        (torch.full((2, 1), -torch.inf), [67, 136], [8], "sentence 0: attention must be finite"),
        (torch.full((2, 1), torch.nan), [67, 136], [8], "sentence 0: attention must be finite"),
    ],
)
def test_wrong_sentences_are_refused(attention, melody, lyric, message):
    with pytest.raises(ValueError, match=f"align_sentences: .*{message}"):
        align_sentence(attention, melody, lyric)


def test_wrong_input_is_refused():
    attentions = [torch.ones(2, 1), torch.full((2, 1), torch.nan)]
    with pytest.raises(ValueError, match="align_sentences: sentence 1: attention must be finite"):
        align_sentences(attentions, [[67, 136]] * 2, [[8]] * 2)
    with pytest.raises(ValueError, match=r"must be one a sentence, got \(1, 0, 0\)"):
        align_sentences([torch.zeros(0, 0)], [], [])
    with pytest.raises(ValueError, match=r"must be one a window, got \(0, 1, 0\)"):
        align_song([], [[5]], [])
    with pytest.raises(ValueError, match=r"attention of window 0 must have shape \(3, 2\), .* 3\)"):
        align_song([torch.zeros(3, 3)], [[67, 136, 5]], [[8, 5]])
    empty = SongAlignment([SentenceAlignment([], [8], [], 0)], 0, 0)
    with pytest.raises(ValueError, match=r"aligned_song: pieces must be .*\[1\] .*, got \[2\]"):
        aligned_song("s", empty, [["a", "b"]])
    with pytest.raises(ValueError, match="note_words: words must be one for each of the 1 pieces"):
        note_words(empty.sentences[0], [])


# ---- songs ------------------------------------------------------------------------------------


def test_an_alignment_becomes_a_song():
    """Syllables on their notes, melismas, two words on one note, rests, and sentences with a side
    missing; the rest that ends a sentence stands before the next.
    """
    sentences = [
        SentenceAlignment(
            [(128, 2), (60, 4), (62, 4), (64, 2), (65, 2), (128, 1), (128, 1)],
            [7, 8, 9, 10],
            [Group((1, 2), (0,)), Group((3,), (1, 2)), Group((4,), (3,))],
            0,
        ),
        SentenceAlignment([(128, 16)], [7, 9, 8], [Group((), (0, 1, 2))], 0),
        SentenceAlignment([(67, 4), (69, 1)], [], [Group((0, 1), ())], 0),
        SentenceAlignment([(71, 4)], [7], [Group((0,), (0,))], 0),
    ]
    pieces = [["glo@@", "ria", "e@@", "ra"], ["lu@@", "na", "e"], [], ["lo@@"]]
    assert aligned_song("s", SongAlignment(sentences, 0, 0), pieces) == Song(
        "s",
        (
            (
                Word(
                    "gloria era",
                    (Note(60, 1, 0.5), Note(62, 1), Note(64, 0.5), Note(65, 0.5)),
                    ("glo", "", "ria e", "ra"),
                ),
            ),
            (Word("luna", ()), Word("e", ())),
            (Word("", (Note(67, 1, 4.5), Note(69, 0.25))),),
            (Word("lo", (Note(71, 1),), ("lo",)),),
        ),
    )


@st.composite
def songs(draw) -> Song:
    sentences = []
    for _ in range(draw(st.integers(1, 3))):
        sentence = []
        for _ in range(draw(st.integers(1, 4))):
            notes = tuple(
                Note(draw(st.integers(40, 80)), draw(st.integers(1, 16)) / 4, rest)
                for rest in draw(
                    st.lists(st.sampled_from([0.0, 0.0, 1.25]), min_size=1, max_size=4)
                )
            )
            text = draw(st.sampled_from(["la", "lo", "lu"]))
            sentence.append(Word(text, notes, (text,) + ("",) * (len(notes) - 1)))
        sentences.append(tuple(sentence))
    return Song("s", tuple(sentences))


@settings(max_examples=40)
@given(songs())
def test_attention_on_the_right_words_gives_the_song_back(song):
    """Song to tokens, attention of 1 between the tokens of a word, alignment, and song again."""
    assert quantise(song).song == song
    vocabulary = lyric_vocabulary([song])
    lyric, melody = encode_lyric(song, vocabulary).sentences, encode_melody(song)
    (window,) = make_windows([(lyric, melody)]).windows
    source, target = (
        encode_line(line, side=side)
        for line, side in zip(window.lines, ("source", "target"), strict=True)
    )
    attention = (target.words.unsqueeze(1) == source.words).float()
    found = align_song([attention], [target.tokens.tolist()], [source.tokens.tolist()])
    pieces = [[vocabulary.piece(t) for t in one.pieces] for one in found.sentences]
    assert aligned_song("s", found, pieces) == song
    predicted = [
        note_words(one, words)
        for one, words in zip(found.sentences, piece_words(source), strict=True)
    ]
    assert alignment_accuracy(predicted, real_words(target)).accuracy == 1.0
