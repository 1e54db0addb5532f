"""ter of sentences, a fifth of their words replaced and a block moved, beside sacrebleu's TER.

corpus_ter returns what sacrebleu does, ter also alignments, shifts and tags. That they are tercom's
is held to tercom's own output in python_tests/test_text.py.
"""

import torch

from benchmarks.baselines import edits as baseline
from benchmarks.baselines.peers import installed
from benchmarks.suite import FORWARD, ONE_THREAD, Shape, Suite, Variant, draw_pairs
from tokcore.text import corpus_ter, ter

BLOCK = 4


def _inputs(shape, dtype, device):
    hypothesis, reference = draw_pairs(shape, device)
    hypothesis = torch.cat([hypothesis[:, BLOCK:], hypothesis[:, :BLOCK]], 1)
    texts = [[" ".join(words) for words in baseline.words(ids)] for ids in (hypothesis, reference)]
    return hypothesis, reference, *texts


def _of_text(function, **options):
    return lambda ids, reference_ids, *texts: function(*texts, **options)


def _of_ids(hypothesis, reference, *texts):
    return ter(list(hypothesis.numpy()), list(reference.numpy()), threads=1)


def _variants(dtype, device):
    variants = [
        Variant("tokcore", "tokcore", _of_text(ter)),
        Variant(ONE_THREAD, "tokcore", _of_text(ter, threads=1)),
        Variant("tokcore, one thread, ids", "tokcore", _of_ids),
        Variant("tokcore corpus_ter, one thread", "tokcore", _of_text(corpus_ter, threads=1)),
    ]
    if installed("sacrebleu"):
        variants.append(Variant("sacrebleu", "peer", _of_text(baseline.sacrebleu), most=2e7))
    return variants


SUITES = (
    Suite(
        "ter",
        _inputs,
        _variants,
        streams=2,
        passes=(FORWARD,),
        shapes=("1x30x30", "64x30x30", "4096x30x30", "1x200x200"),
        dtypes=("int64",),
        warm=True,
        tiny=Shape("tiny", 24, 12, 2),
    ),
)


def test_ter(benchmark, case):
    case.run(benchmark)
