"""Songs as tokens, windows and batches, against the authors' datasets.

songmass_data.json: MusicMtDataset of microsoft/muzic at 2b87396, songmass/mass.
"""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokcore.algorithms.songmass import (
    ALIGN,
    MELODY_SIZE,
    REST,
    SEPARATOR,
    SPECIALS,
    Example,
    LyricVocabulary,
    Note,
    Song,
    Window,
    Word,
    collate,
    decode_lyric,
    decode_melody,
    encode_line,
    encode_lyric,
    encode_melody,
    lyric_vocabulary,
    make_windows,
    note_positions,
    pair_example,
    syllable_pieces,
    word_notes,
    words_of,
)

GOLDEN = Path(__file__).parents[1] / "golden"
DATA = json.loads((GOLDEN / "songmass_data.json").read_text())


def word(text: str, *pitches: int, syllables: tuple[str, ...] = ()) -> Word:
    return Word(text, tuple(Note(pitch, 1.0) for pitch in pitches), syllables)


# ---- vocabularies -----------------------------------------------------------------------------


def test_the_indices_are_those_of_the_authors_dictionaries():
    dicts = DATA["dicts"]
    names = {"<pad>": "pad", "</s>": "eos", "<unk>": "unk", "<mask>": "mask"}
    for piece, name in names.items() | {("[sep]", "sep"), ("[align]", "align")}:
        assert SPECIALS.index(piece) == dicts[name]
    assert (dicts["melody_vocab"], 7 + 128) == (MELODY_SIZE, REST)
    song = Song("s", ((Word("", (Note(0, 0.25, 4.0), Note(127, 4.0), Note(60, 1.25))),),))
    rest, lowest, highest, middle = (135, 136 + 15), (7, 136), (134, 136 + 15), (67, 136 + 4)
    assert encode_melody(song) == [[*rest, *lowest, *highest, *middle, ALIGN, SEPARATOR]]


def test_a_vocabulary_holds_the_pieces_of_songs_by_frequency():
    gloria = word("Gloria", 60, 62, 64, 65, syllables=("Glo", "", "ri", "a"))
    song = Song("s", ((gloria, word("A"), word("ri"), word("a")), (word("ri"), word("", 60))))
    vocabulary = lyric_vocabulary([song])
    assert vocabulary.pieces == ("a", "ri", "glo@@", "ri@@")
    assert [vocabulary.piece(t) for t in range(len(vocabulary))] == [*SPECIALS, *vocabulary.pieces]
    assert lyric_vocabulary([song], least=2).pieces == ("a", "ri")
    letters = lyric_vocabulary([song], split=lambda w: list(w.text.lower()))
    assert letters.encode(word("lira")) == [letters.pieces.index(c) + 7 for c in "lira"]
    assert syllable_pieces(Word("", ())) == []


def test_unknown_pieces_are_counted():
    song = Song("s", ((word("la"), word("le"), word("la")), (word("lu"),)))
    encoded = encode_lyric(song, LyricVocabulary(("la",)))
    assert encoded.sentences == [[7, 6, 3, 6, 7, 6, 5], [3, 6, 5]]
    assert (encoded.pieces, encoded.unknown) == (4, 2)


def test_words_keep_their_numbers_where_one_side_has_nothing():
    """A word without text, or one without notes, leaves its [align]: the others still match."""
    song = Song("s", ((word("la", 60), word("", 62), word("lo")), (word("", 60),), (word("lu"),)))
    lyric = encode_lyric(song, LyricVocabulary(("la", "lo", "lu"))).sentences
    melody = encode_melody(song)
    assert lyric == [[7, 6, 6, 8, 6, 5], [], [9, 6, 5]]
    assert melody == [[67, 139, 6, 69, 139, 6, 6, 5], [67, 139, 6, 5], []]
    found = make_windows([(lyric, melody)])
    assert found == ([Window(0, (0,), (lyric[0], melody[0]))], 2, 0)
    example = pair_example(*found.windows[0].lines)
    assert example.source_words.tolist() == [0, 2, 3, 4]
    assert example.target_words.tolist() == [0, 0, 1, 1, 3, 4]


@pytest.mark.parametrize(("note", "value"), [((60, 0.3), 0.3), ((60, 1, 4.25), 4.25)])
def test_a_song_off_the_grid_is_refused(note, value):
    song = Song("mine", ((word("a", 60), Word("b", (Note(*note),))),))
    with pytest.raises(
        ValueError, match=f"encode_melody: .*got {value} in song 'mine', sentence 0, word 'b'"
    ):
        encode_melody(song)


# ---- lines and batches ------------------------------------------------------------------------


@pytest.mark.parametrize("case", DATA["mt"])
def test_lines_equal_the_authors(case):
    source = encode_line(case["src_in"], side="source")
    target = encode_line(case["tgt_in"], side="target")
    for line, side, other in ((source, "source", "source"), (target, "target", "target")):
        assert line.tokens.tolist() == case[side]
        assert line.sentences.tolist() == case[f"{other}_sent_ids"]
        assert line.words.tolist() == case[f"{other}_word_ids"]


def authors_batch(left: bool) -> Example:
    """The authors' batch (padded on the right); on the left, each row turned by its padding."""
    golden = DATA["collate_left_pad_source_False"]
    names = ("src_tokens", "source_sent_ids", "source_word_ids", "prev_output_tokens", "target")
    names += ("target_sent_ids", "target_word_ids")
    fields = [torch.tensor(golden[name]) for name in names]
    if left:
        padding = [(fields[i] == 1).sum(1).tolist() for i in (0, 4)]  # of source and target
        for i, field in enumerate(fields):
            rows = zip(field, padding[i > 2], strict=True)
            fields[i] = torch.stack([row.roll(shift) for row, shift in rows])
    return Example(*fields, positions=None)


@pytest.mark.parametrize("left", [False, True])
def test_batches_equal_the_authors_padded_on_one_side(left):
    cases = [DATA["mt"][index] for index in DATA["collate_left_pad_source_False"]["id"]]
    batch = collate([pair_example(c["src_in"], c["tgt_in"]) for c in cases], left=left)
    for name, found, expected in zip(Example._fields, batch, authors_batch(left), strict=True):
        if name != "positions":
            assert found.tolist() == expected.tolist(), name
    assert batch.positions is None


def test_the_authors_own_batches_pad_tokens_and_ids_on_different_sides():
    """What collate does not reproduce: the ids of a shorter row belong to other tokens."""
    golden = DATA["collate_left_pad_source_True"]
    tokens, ids = golden["src_tokens"][2], golden["source_sent_ids"][2]
    assert tokens == [1, 1, 1, 1, 1, 1, 1, 1, 30, 5, 2]
    assert ids == [0, 0, -1, -1, -1, -1, -1, -1, -1, -1, -1]


def test_wrong_lines_and_batches_are_refused():
    with pytest.raises(ValueError, match=r"encode_line: line must end with \[sep\] .*got \[7, 6\]"):
        encode_line([7, 6], side="source")
    with pytest.raises(ValueError, match="side must be 'source' or 'target', got 'left'"):
        encode_line([7, 6, 5], side="left")
    with pytest.raises(ValueError, match="collate: examples must not be empty"):
        collate([])
    example = pair_example([7, 6, 5], [67, 136, 6, 5])
    with pytest.raises(ValueError, match=r"source_words must be given in all .* in 1 of 2"):
        collate([example, example._replace(source_words=None)])


# ---- windows ----------------------------------------------------------------------------------


def sides_of(lengths: list[tuple[int, int]]) -> tuple[list[list[int]], list[list[int]]]:
    lyric = [[7] * (a - 1) + [5] if a else [] for a, _ in lengths]
    return lyric, [[67] * (b - 1) + [5] if b else [] for _, b in lengths]


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12),
    st.integers(1, 20),
    st.integers(1, 20),
)
def test_sliding_windows_against_their_definition(lengths, longest, stride):
    stride = min(stride, longest)
    found = make_windows([sides_of(lengths)], longest=longest, stride=stride)
    fits = [min(pair) > 0 and max(pair) <= longest for pair in lengths]
    assert found.incomplete == sum(min(pair) == 0 for pair in lengths)
    assert found.too_long == len(lengths) - sum(fits) - found.incomplete
    lyric, melody = sides_of(lengths)
    covered, previous = set(), None
    for window in found.windows:
        first, last = window.sentences[0], window.sentences[-1]
        inside = [i for i in range(first, last + 1) if min(lengths[i])]
        assert list(window.sentences) == inside, "whole and without gaps but the incomplete"
        assert all(fits[i] for i in inside)
        assert window.lines[0] == [t for i in inside for t in lyric[i]]
        assert window.lines[1] == [t for i in inside for t in melody[i]]
        assert max(map(len, window.lines)) <= longest
        new = [i for i in inside if i not in covered]
        assert new == inside[-len(new) :]
        if previous is not None and inside[0] <= previous:  # it overlaps: its end moved by a stride
            assert len(new) == 1 or max(sum(lengths[i][s] for i in new) for s in (0, 1)) <= stride
        covered |= set(new)
        previous = last
    assert covered == {i for i, fit in enumerate(fits) if fit}, "every sentence is in a window"


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=12), st.integers(9, 20))
def test_windows_for_evaluation_follow_each_other_and_are_full(lengths, longest):
    windows = make_windows([sides_of(lengths)], longest=longest, stride=None).windows
    assert [i for window in windows for i in window.sentences] == list(range(len(lengths)))
    for window, following in pairwise(windows):
        joined = zip(window.lines, following.sentences[:1] * 2, (0, 1), strict=True)
        assert max(len(line) + lengths[i][side] for line, i, side in joined) > longest


def test_windows_name_their_song_and_do_not_join_songs():
    one, two = sides_of([(2, 2), (2, 2)]), sides_of([(3, 3)])
    found = make_windows([one, two, ([[7, 5]],)])
    assert [(w.song, w.sentences) for w in found.windows] == [(0, (0, 1)), (1, (0,)), (2, (0,))]
    assert found.windows[2].lines == ([7, 5],)


@pytest.mark.parametrize(("longest", "stride"), [(0, 250), (500, 0), (249, 250)])
def test_wrong_windows_are_refused(longest, stride):
    rule = "stride must be positive and at most longest"
    with pytest.raises(ValueError, match=f"{rule}, got stride {stride} and longest {longest}"):
        make_windows([], longest=longest, stride=stride)


def test_sides_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"sides of song 0 must .* sentences, got \[1, 2\]"):
        make_windows([([[5]], [[5], [5]])])


# ---- decoding ---------------------------------------------------------------------------------

METRICS = json.loads((GOLDEN / "songmass_metrics.json").read_text())


@pytest.mark.parametrize("case", METRICS["pitch_duration_sequence"])
def test_malformed_notes_are_filtered_as_the_authors_do(case):
    tokens = [7 + t for t in case["inp"]]  # pitches and durations both are 7 beyond their token
    found = note_positions(tokens)
    assert [str(tokens[i] - 7) for pair in found for i in pair] == case["out"]
    decoded = decode_melody(tokens)
    assert decoded.dropped == len(tokens) - len(case["out"])
    assert [n for s in decoded.sentences for n in s] == [
        (int(p), int(d) - 128) for p, d in zip(case["out"][::2], case["out"][1::2], strict=True)
    ]


def test_specials_between_pitch_and_duration_are_passed_over_and_counted():
    found = decode_melody([0, 67, 3, 138, 4, 6, 5, 69, 136, 2, 1, 1])
    assert found == ([[(60, 3)], [(62, 1)]], 3, 0)


def test_sentences_beyond_the_source_are_cut_and_counted():
    tokens = [67, 136, 5, 5, 69, 136, 5, 71]
    assert decode_melody(tokens) == ([[(60, 1)], [], [(62, 1)], []], 1, 0)
    assert decode_melody(tokens, sentences=2) == ([[(60, 1)], []], 0, 2)
    assert decode_melody([5]) == ([[]], 0, 0)
    assert decode_melody([]) == ([], 0, 0)


def test_lyrics_are_decoded_to_words():
    vocabulary = LyricVocabulary(("glo@@", "ri@@", "a", "la"))
    tokens = [7, 8, 9, 10, 5, 5, 3, 7, 4, 9, 5, 8, 2, 1]
    found = decode_lyric(tokens, vocabulary)
    assert found == ([["gloria", "la"], [], ["gloa"], ["ri"]], 2, 0)
    assert decode_lyric(tokens, vocabulary, sentences=1) == ([["gloria", "la"]], 0, 3)
    assert words_of([3, 7, 4, 9, 10], vocabulary) == [[1, 3], [4]]


@pytest.mark.parametrize("token", [-1, 152])
def test_a_token_outside_the_vocabulary_is_refused(token):
    message = rf"tokens must be in \[0, 152\), got {token}"
    with pytest.raises(ValueError, match=f"decode_melody: {message}"):
        decode_melody([67, token])
    with pytest.raises(ValueError, match=f"decode_lyric: {message}"):
        decode_lyric([token], LyricVocabulary(("a",) * 145))


WORDS = st.builds(
    lambda text, notes: Word(text, tuple(notes)),
    st.sampled_from(["la", "lo", "luna"]),
    st.lists(
        st.builds(
            Note,
            st.integers(0, 127),
            st.integers(1, 16).map(lambda n: n / 4),
            st.integers(0, 16).map(lambda n: n / 4),
        ),
        min_size=1,
        max_size=3,
    ),
)


@given(st.lists(st.lists(WORDS, min_size=1, max_size=3).map(tuple), min_size=1, max_size=3))
def test_decoding_undoes_encoding(sentences):
    song = Song("s", tuple(sentences))
    vocabulary = lyric_vocabulary([song])
    lyric, melody = encode_lyric(song, vocabulary), encode_melody(song)
    (window,) = make_windows([(lyric.sentences, melody)]).windows
    words = decode_lyric(window.lines[0], vocabulary)
    assert words == ([[w.text for w in sentence] for sentence in song.sentences], 0, 0)
    notes = decode_melody(window.lines[1])
    expected = [
        [
            (pitch, int(beats * 4))
            for w in sentence
            for n in w.notes
            for pitch, beats in ((128, n.rest), (n.pitch, n.duration))
            if beats
        ]
        for sentence in song.sentences
    ]
    assert notes == (expected, 0, 0)
    joined = [note for notes_of_word in word_notes(song) for note in notes_of_word]
    assert joined == [note for sentence in expected for note in sentence]
    assert [len(n) > 0 for n in word_notes(song)] == [True] * sum(map(len, song.sentences))
