"""TER against tercom's own numbers; tags; wrong input."""

import json
import random
import signal
import subprocess
import sys
from itertools import chain, count
from pathlib import Path

import numpy as np
import pytest

from tokcore import _host
from tokcore.text import CorpusTER, Shift, corpus_ter, ter

GOLDEN = json.loads((Path(__file__).parent / "golden" / "dcsqe_ter.json").read_text())["pairs"]
HYPOTHESES = [pair["hyp"] for pair in GOLDEN]
REFERENCES = [pair["ref"] for pair in GOLDEN]
RUNS = {
    "tercom_shift": {},
    "tercom_noshift": {"shifts": False},
    "tercom_noshift_casesensitive": {"shifts": False, "case_sensitive": True},
}


# ---- tercom's own numbers -------------------------------------------------------------------


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(("threads", "times"), [(1, 1), (3, 20)])  # few are not worth a thread
def test_everything_that_tercom_reports(run, threads, times):
    result = ter(HYPOTHESES * times, REFERENCES * times, threads=threads, **RUNS[run])
    for i, pair in enumerate(GOLDEN * times):
        want = pair[run]
        after = [pair["hyp"][k].lower() for k in result.permutation[i]]
        assert result.edits[i] == want["edits"], pair
        assert result.alignment[i] == want["alignment"], pair
        assert result.shifts[i] == [
            Shift(s["start"], s["end"], s["moveto"], s["newloc"]) for s in want["shifts"]
        ], pair
        assert after == [w.lower() for w in want["after_shift"]], pair
        assert result.reference_length[i] == want["words"]
        assert result.score[i] == pytest.approx(want["score"], rel=1e-15)
        # njuqe's tags stand in the order after shifts
        assert [result.word_tags[i][k] for k in result.permutation[i]] == want["njuqe_tags"], pair
        assert result.score[i] == pytest.approx(want["njuqe_score"], rel=1e-6)


@pytest.mark.parametrize("kind", ["text", "words", "integers", "arrays"])
def test_kinds_of_sentences_agree(kind):
    hypotheses = [[w.lower() for w in words] for words in HYPOTHESES]
    references = [[w.lower() for w in words] for words in REFERENCES]
    numbers = {w: 7 * k - 50 for k, w in enumerate(sorted({*chain(*hypotheses, *references)}))}
    convert = {
        "text": " ".join,
        "words": tuple,
        "integers": lambda words: [numbers[w] for w in words],
        "arrays": lambda words: np.array([numbers[w] for w in words], dtype=np.int16),
    }[kind]
    got = ter([convert(words) for words in hypotheses], [convert(words) for words in references])
    want = ter(HYPOTHESES, REFERENCES)
    assert got.shifts == want.shifts
    assert got.alignment == want.alignment
    assert got.word_tags == want.word_tags
    assert got.gap_tags == want.gap_tags


def test_word_and_gap_tags_of_the_tagger_of_wmt():
    result = ter(HYPOTHESES, REFERENCES, shifts=False, case_mismatch_is_bad=True)
    for i, pair in enumerate(GOLDEN):
        tags = [None] * (2 * len(pair["hyp"]) + 1)
        tags[0::2], tags[1::2] = result.gap_tags[i], result.word_tags[i]
        assert tags == pair["corpus_builder"]["normal"]["target"], pair


def test_edits_of_sacrebleu_without_shifts():
    """Its letters the other way round: i is a missing word, d an extra one."""
    result = ter(HYPOTHESES, REFERENCES, shifts=False)
    letters = {"i": "D", "d": "I", "s": "S", " ": " "}
    for i, pair in enumerate(GOLDEN):
        trace = pair["sacrebleu"]["trace_ref2hyp_noshift"]
        assert result.alignment[i] == "".join(letters[x] for x in trace), pair
        assert result.edits[i] == pair["sacrebleu"]["levenshtein"], pair


# ---- tags -----------------------------------------------------------------------------------


def test_tags_stand_in_the_order_of_the_hypothesis():
    """x is extra; d e is shifted, and right."""
    result = ter(["d e a x b c"], ["a b c d e"])
    assert result.edits.tolist() == [2]
    assert result.permutation[0].tolist() == [2, 3, 4, 5, 0, 1]
    assert result.alignment == [" I    "]
    assert result.word_tags == [["OK", "OK", "OK", "BAD", "OK", "OK"]]
    assert result.gap_tags == [["OK"] * 7]


def test_missing_words_are_tagged_to_their_right():
    result = ter(["b d"], ["a b c d e"])
    assert result.alignment == ["D D D"]
    assert result.word_tags == [["OK", "OK"]]
    assert result.gap_tags == [["BAD", "BAD", "BAD"]]
    result = ter(["b d", "a", ""], ["a b c d e", "a", "z"], end_of_sentence=True)
    assert result.word_tags == [["BAD", "BAD", "BAD"], ["OK", "OK"], ["BAD"]]
    assert result.gap_tags == [["BAD", "BAD", "BAD"], ["OK", "OK"], ["BAD"]]


def test_a_gap_moves_with_the_word_to_its_right():
    """After the shift the order is b1 b2 a1 a2, where m is missing before a1: it is word 0."""
    result = ter(["a1 a2 a3 b1 b2 b3"], ["b1 b2 b3 m a1 a2 a3"])
    assert result.permutation[0].tolist() == [3, 4, 5, 0, 1, 2]
    assert result.alignment == ["   D   "]
    assert result.gap_tags == [["BAD", "OK", "OK", "OK", "OK", "OK", "OK"]]


def test_case():
    assert ter(["Hello world"], ["hello World"]).edits.tolist() == [0]
    assert ter(["Hello world"], ["hello World"], case_sensitive=True).edits.tolist() == [2]
    result = ter(["Hello world"], ["hello world"], case_mismatch_is_bad=True)
    assert (result.edits.tolist(), result.word_tags) == ([0], [["BAD", "OK"]])
    # against the reference that was chosen, at the words that were aligned
    result = ter(
        ["A x B", "Q"],
        [["z z z z", "extra a b"], ["w", "q"]],
        case_mismatch_is_bad=True,
        shifts=False,
    )
    assert result.reference.tolist() == [1, 1]
    assert result.word_tags == [["BAD", "BAD", "BAD"], ["BAD"]]
    result = ter(["A x B"], [["z z z z", "A B"]], case_mismatch_is_bad=True)
    assert result.word_tags == [["OK", "BAD", "OK"]]


# ---- several references, corpora, empty -----------------------------------------------------


def test_the_first_reference_with_the_fewest_edits_counts():
    result = ter(["a b c"], [["a x y", "a b d e f", "a b e"]])
    assert result.reference.tolist() == [2]
    assert result.edits.tolist() == [1]
    assert result.reference_length.tolist() == [11 / 3]
    assert result.score.tolist() == [1 / (11 / 3)]
    assert ter(["a b c"], [["a b d", "a b e"]]).reference.tolist() == [0]
    mixed = ter([[1, 2], [3]], [[[1, 2], [4]], [3]])
    assert mixed.reference_length.tolist() == [1.5, 1.0]


def test_a_corpus_is_its_edits_over_its_lengths():
    result = ter(HYPOTHESES, REFERENCES)
    corpus = corpus_ter(HYPOTHESES, REFERENCES)
    assert corpus.edits == result.edits.sum() == sum(p["tercom_shift"]["edits"] for p in GOLDEN)
    assert corpus.reference_length == result.reference_length.sum()
    assert corpus.score == pytest.approx(corpus.edits / corpus.reference_length)
    assert corpus_ter(["a", "b"], [["a", "a c"], "x"]) == CorpusTER(1 / 2.5, 1, 2.5)


def test_empty():
    result = ter(["", "a b", "", "a"], ["", "", "a b", ["", "b"]])
    assert result.edits.tolist() == [0, 2, 2, 1]
    assert result.reference_length.tolist() == [0.0, 0.0, 2.0, 0.5]
    assert result.score.tolist() == [0.0, 1.0, 1.0, 2.0]
    assert result.alignment == ["", "II", "DD", "I"]
    assert result.gap_tags == [["OK"], ["OK"] * 3, ["BAD"], ["OK"] * 2]
    assert [p.tolist() for p in result.permutation] == [[], [0, 1], [], [0]]
    nothing = ter([], [])
    assert nothing.edits.shape == (0,)
    assert nothing.word_tags == nothing.shifts == []
    assert corpus_ter([], []) == CorpusTER(0.0, 0, 0.0)
    assert corpus_ter([[]], [[]]) == CorpusTER(0.0, 0, 0.0)
    assert corpus_ter([[1]], [[]]).score == 1.0
    assert ter([[], [1]], [[2], []]).alignment == ["D", "I"]


def test_words_of_any_letters():
    result = ter(["naïve ΣΊΣΥΦΟΣ 東京 \ud800"], ["NAÏVE σίσυφος 東京 \ud800"])
    assert result.edits.tolist() == [0]


def test_equal_words_without_end():
    """Every block stands everywhere: the search ends, and soon."""
    result = ter([[1] * 49 + [2], [1] * 60 + [2]], [[2] + [1] * 49, [2] + [1] * 60])
    assert result.edits.tolist() == [1, 2]  # 60 words are too far


# ---- wrong input ----------------------------------------------------------------------------

ERRORS = [
    (("a b", ["a b"]), {}, TypeError, "hypotheses must be a sequence of sentences, got str"),
    ((["a"], "a"), {}, TypeError, "references must be a sequence of sentences, got str"),
    ((None, ["a"]), {}, TypeError, "hypotheses must be a sequence .*got NoneType"),
    ((["a"], ["a", "b"]), {}, ValueError, "references must be as many as hypotheses, 1, got 2"),
    (([b"caf\xe9"], ["a"]), {}, TypeError, r"hypotheses\[0\] must be .*got bytes: decode it"),
    ((["a"], [b"a"]), {}, TypeError, r"references\[0\] must be .*got bytes: decode it"),
    ((["a"], [["b", b"a"]]), {}, TypeError, r"references\[0\]\[1\] must be .*got bytes"),
    (([["a", b"b"]], [["a"]]), {}, TypeError, r"hypotheses\[0\] must hold only .*bytes b'b'"),
    (([["a", 1]], [["a"]]), {}, TypeError, r"hypotheses\[0\] must hold only .*int 1"),
    (([[1, "a"]], [[1]]), {}, TypeError, r"hypotheses\[0\] must hold only .*str 'a'"),
    (([[True]], [[1]]), {}, TypeError, r"hypotheses\[0\] must hold only .*bool True"),
    (([[1.5]], [[1]]), {}, TypeError, r"hypotheses\[0\] must hold only .*float 1.5"),
    (([None], ["a"]), {}, TypeError, r"hypotheses\[0\] must be a str.*got NoneType"),
    (([np.ones(2)], [[1]]), {}, TypeError, r"hypotheses\[0\] must .*float64 and shape \(2,\)"),
    (([np.ones((1, 2), int)], [[1]]), {}, TypeError, r"hypotheses\[0\] must .*shape \(1, 2\)"),
    (
        (["a", ["b"]], ["a", "b"]),
        {},
        TypeError,
        r"hypotheses\[1\] must be of the kind of hyp.*words",
    ),
    (
        (["a", []], ["a", "b"]),
        {},
        TypeError,
        r"hypotheses\[1\] must be of the kind .*an empty list",
    ),
    (([[1]], [["a"]]), {}, TypeError, r"references\[0\] must be of the kind .*\(integers\).*words"),
    ((["a"], [[]]), {}, ValueError, r"references\[0\] must hold at least one reference"),
    (([[2**63]], [[1]]), {}, ValueError, r"hypotheses\[0\] must hold integers of 64 bits"),
    (([np.array([2**63], np.uint64)], [[1]]), {}, ValueError, "must hold integers of 64 bits"),
    ((["a"], ["a"]), {"beam": -1}, ValueError, r"beam must be in \[0, .*got -1"),
    ((["a"], ["a"]), {"beam": 2.5}, TypeError, "beam must be an int, got 2.5"),
    ((["a"], ["a"]), {"max_shift_distance": -1}, ValueError, "max_shift_distance must be in"),
    ((["a"], ["a"]), {"max_shift_distance": 2**40}, ValueError, "max_shift_distance must be in"),
    ((["a"], ["a"]), {"threads": 0}, ValueError, r"threads must be in \[1, .*got 0"),
    ((["a"], ["a"]), {"threads": True}, TypeError, "threads must be an int, got True"),
    ((["a"], ["a"]), {"shifts": 1}, TypeError, "shifts must be a bool, got 1"),
    ((["a"], ["a"]), {"case_sensitive": None}, TypeError, "case_sensitive must be a bool"),
]


@pytest.mark.parametrize("function", [ter, corpus_ter])
@pytest.mark.parametrize(("arguments", "options", "error", "text"), ERRORS)
def test_named_errors(function, arguments, options, error, text):
    with pytest.raises(error, match=f"^{function.__name__}: .*{text}"):
        function(*arguments, **options)


def test_flags_of_tags_are_bools():
    for name in ("end_of_sentence", "case_mismatch_is_bad"):
        with pytest.raises(TypeError, match=f"ter: {name} must be a bool, got 'yes'"):
            ter(["a"], ["a"], **{name: "yes"})


class Enough(Exception):
    pass


@pytest.mark.parametrize("pairs", [1, 2])
def test_a_signal_ends_a_long_search(pairs):
    """Its handler runs while the search does: a second time, too, before it has come to an end."""
    generator = random.Random(0)
    long = [[generator.randrange(3) for _ in range(1000)] for _ in range(2)]
    alarms = count(1)

    def handler(*_):
        if next(alarms) == 2:
            raise Enough

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.2, 0.2)
    try:
        with pytest.raises(Enough):
            ter([long[0], [1]][:pairs], [long[1], [1]][:pairs], threads=2)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


NATIVE = {
    "words": np.arange(5),
    "written": np.arange(5),
    "sentence_offsets": np.array([0, 1, 3, 4, 5]),
    "reference_offsets": np.array([2, 3, 4]),
    "max_shift_distance": 50,
    "beam": 20,
    "end_of_sentence": False,
    "only_numbers": False,
    "threads": 1,
}


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        ({"words": np.zeros((1, 5), int)}, ValueError, "words must have one dimension"),
        ({"words": np.arange(5.0)}, TypeError, "incompatible function arguments"),
        ({"written": np.zeros((1, 5), int)}, ValueError, "written must have one dimension"),
        ({"written": np.arange(4)}, ValueError, "written must be as many as words, 5, got 4"),
        ({"sentence_offsets": np.array([0, 1, 3, 4, 6])}, ValueError, "must run from 0 to 5"),
        ({"sentence_offsets": np.array([1, 1, 3, 4, 5])}, ValueError, "must run from 0 to 5"),
        ({"sentence_offsets": np.array([0, 9, 3, 4, 5])}, ValueError, "not fall, got 3 after 9"),
        ({"sentence_offsets": np.zeros(0, int)}, ValueError, "sentence_offsets must run"),
        ({"reference_offsets": np.zeros(0, int)}, ValueError, "reference_offsets must run"),
        ({"reference_offsets": np.array([2, 4, 4])}, ValueError, "a reference, got none for 1"),
        ({"reference_offsets": np.array([0, 3, 4])}, ValueError, "must run from 2 to 4"),
    ],
)
def test_the_native_module_reads_nothing_beyond(wrong, error, text):
    with pytest.raises(error, match=text):
        _host.ter(**(NATIVE | wrong))


def test_without_the_native_module_there_is_one_clear_error():
    program = "import sys; sys.modules['tokcore._host'] = None; import tokcore.text"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "ImportError: tokcore.text: the module tokcore._host cannot be imported" in result.stderr
