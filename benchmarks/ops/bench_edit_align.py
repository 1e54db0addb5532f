"""edit_align of token ids, beside rapidfuzz and jiwer, which know no tie rule of translation.

Theirs are lists of words, made before the clock starts, as tokcore's tensors are.
"""

from benchmarks.baselines import edits as baseline
from benchmarks.baselines.peers import installed
from benchmarks.suite import (
    FORWARD,
    MATRICES,
    Shape,
    Suite,
    Variant,
    draw_pairs,
    with_one_thread,
)
from tokcore.ops import edit_align


def _inputs(shape, dtype, device):
    pairs = draw_pairs(shape, device)
    lists = [baseline.words(ids) for ids in pairs]
    return *pairs, *lists, *([" ".join(words) for words in sentences] for sentences in lists)


def _tokcore(hypothesis, reference, *others):
    return edit_align(hypothesis, reference)


def _of_words(function):
    return lambda ids, reference, *rest: function(*rest[:2])


def _of_sentences(function):
    return lambda ids, reference, *rest: function(*rest[2:])


def _variants(dtype, device):
    variants = with_one_thread(_tokcore, device)
    if device.type == "cpu" and installed("rapidfuzz"):
        distance = _of_words(baseline.rapidfuzz_distance)
        variants += [
            Variant("rapidfuzz", "peer", _of_words(baseline.rapidfuzz)),
            Variant("rapidfuzz, distance alone", "peer", distance, exact=False),
        ]
    if device.type == "cpu" and installed("jiwer"):
        variants.append(Variant("jiwer", "peer", _of_sentences(baseline.jiwer)))
    return variants


SUITES = (
    Suite(
        "edit_align",
        _inputs,
        _variants,
        streams=2,
        passes=(FORWARD,),
        shapes=MATRICES,
        dtypes=("int64",),
        warm=True,
        tiny=Shape("tiny", 24, 13, 2),
    ),
)


def test_edit_align(benchmark, case):
    case.run(benchmark)
