"""Translation edit rate (TER) with shifts, its alignments, and tags of translations from them."""

import numbers
from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate, chain, count
from typing import NamedTuple

import numpy as np

try:
    from tokcore import _host
except ImportError as error:
    raise ImportError(
        f"tokcore.text: the module tokcore._host cannot be imported: {error}. Build it with "
        "`pip install --no-build-isolation .` in a clone.",
        name="tokcore._host",
    ) from error


class Shift(NamedTuple):
    """Words [start, end] of the order before it moved behind its word ``target``, which belongs to
    word ``reference`` of the reference; -1 is the front.
    """

    start: int
    end: int
    reference: int
    target: int


class TER(NamedTuple):
    """One entry for each pair, as `ter` describes them."""

    edits: np.ndarray
    reference_length: np.ndarray
    score: np.ndarray
    reference: np.ndarray
    shifts: list[list[Shift]]
    permutation: list[np.ndarray]
    alignment: list[str]
    word_tags: list[list[str]]
    gap_tags: list[list[str]]


class CorpusTER(NamedTuple):
    """score = edits / reference_length, both summed over the corpus."""

    score: float
    edits: int
    reference_length: float


def ter(
    hypotheses: Sequence,
    references: Sequence,
    *,
    shifts: bool = True,
    case_sensitive: bool = False,
    beam: int | None = 20,
    max_shift_distance: int = 50,
    end_of_sentence: bool = False,
    case_mismatch_is_bad: bool = False,
    threads: int | None = None,
) -> TER:
    r"""Edits that turn each hypothesis into its reference, moves of blocks included, as tercom.

    .. math::
        \mathrm{TER} = \frac{\text{insertions} + \text{deletions} + \text{substitutions} +
            \text{shifts}}{\text{words of the reference}}

    A shift moves one block of up to 10 words and costs 1. Shifts are sought greedily: the block of
    the hypothesis that stands in the reference elsewhere and whose move saves most, longer ones
    first, as long as one saves an edit. Alignments are those of least cost which, read from the
    end, prefer aligned words, then extra ones, then missing ones. All choices are tercom's, so
    edits, shifts and alignments are too. As there, long sentences of few distinct words that are
    unlike take long (1000 of 3 distinct words: a minute); Ctrl-C ends it.

    Args:
        hypotheses: N sentences. A sentence is a str, split at white space (``str.split``); or a
            list of words; or a list or NumPy array of integers (token ids). One kind in a call.
        references: N sentences of that kind, or lists of several sentences, of which the first
            with the fewest edits counts.
        shifts: False for the plain edit distance (tercom's ``-d 0``).
        case_sensitive: False compares ``str.lower()``.
        beam: cells dearer than the best of their column by more are dropped. It changes nothing
            where edits without shifts are at most as many. None: no beam.
        max_shift_distance: how far a block may move, in words.
        end_of_sentence: word tags as from WMT 2022 on: one more, of the end, and where words are
            missing the word to their right is BAD (the end, if there is none).
        case_mismatch_is_bad: words that match but for their case are BAD, though no edit (the
            tagger of WMT's word-level tasks). Nothing to integers.
        threads: how many share the pairs, fewer where they are little work. Default: one a
            processor.

    Returns:
        TER of

        - edits (N,) int64, shifts included;
        - reference_length (N,) float64, the average over a pair's references;
        - score (N,) float64, edits / reference_length; of an empty reference 1, or 0 where there
          is nothing to edit;
        - reference (N,) int64, which of the references it was;
        - shifts, a list of Shift for each pair, in their order;
        - permutation, an int64 array for each pair: word i after all shifts was word
          permutation[i] of the hypothesis;
        - alignment, a str for each pair over " " (match), "S" (substitution), "I" (extra word of
          the hypothesis), "D" (missing word of the reference), of the order after all shifts;
        - word_tags, OK or BAD for each word in the hypothesis' own order: BAD is extra or
          substituted. A word that was shifted and matches is OK;
        - gap_tags, one more than words: BAD where words are missing before this word (the last:
          at the end) in the order after all shifts.

    Raises:
        TypeError, ValueError: a sentence of no known or another kind (bytes, say, which have to be
            decoded), a wrong number of references, an option out of range.

    Not sacrebleu's TER, though most often equal to it: that has a beam of another shape, ranks
    shifts by what they save, tries at most 1000, and returns edits and lengths alone (edits differ
    on 71 of 3000 pairs of few distinct words). Its normalisations are not here.

    The authors of DCSQE (NJUNLP/njuqe:scripts/ter/convert_label.py) leave tags in the order after
    shifts, where they are other words'; `permutation` is what puts them right.

    >>> result = ter(["cat the sat on the mat"], ["The cat sat on the old mat"])
    >>> result.edits, result.score
    (array([2]), array([0.286]))
    >>> result.alignment, result.permutation
    (['     D '], [array([1, 0, 2, 3, 4, 5])])
    >>> result.word_tags, result.gap_tags[0][5]
    ([['OK', 'OK', 'OK', 'OK', 'OK', 'OK']], 'BAD')
    >>> ter([[7, 8, 9]], [[[7, 9], [8, 9]]], end_of_sentence=True).word_tags
    [['OK', 'BAD', 'OK', 'OK']]

    Source: M. Snover et al., A Study of Translation Edit Rate with Targeted Human Annotation, AMTA
    2006; jhclark/tercom:src/ter/core/TerScorer.java;
    deep-spin/qe-corpus-builder:corpus_generation/tools/generate_BAD_tags.py (the tags).
    """
    corpus = _Corpus("ter", hypotheses, references)
    out = corpus.run(
        shifts,
        case_sensitive,
        beam,
        max_shift_distance,
        threads,
        end_of_sentence=_flag("ter", "end_of_sentence", end_of_sentence),
        case_mismatch_is_bad=_flag("ter", "case_mismatch_is_bad", case_mismatch_is_bad),
    )
    moves = [list(map(Shift._make, of_pair)) for of_pair in out.pop("shifts")]
    rates = map(_rate, out["edits"].tolist(), out["reference_length"].tolist())
    return TER(score=np.array(list(rates), dtype=float), shifts=moves, **out)


def corpus_ter(
    hypotheses: Sequence,
    references: Sequence,
    *,
    shifts: bool = True,
    case_sensitive: bool = False,
    beam: int | None = 20,
    max_shift_distance: int = 50,
    threads: int | None = None,
) -> CorpusTER:
    """TER of a corpus: the edits of all pairs over the (average) lengths of all references.

    Equivalent to ``t = ter(...); t.edits.sum() / t.reference_length.sum()``; 0 edits of nothing
    are 0, edits of empty references alone 1.

    Args, Raises: as `ter`.

    Returns:
        CorpusTER of score (float), edits (int) and reference_length (float).

    >>> corpus_ter(["a b c", "d"], ["a c", "d e"])
    CorpusTER(score=0.5, edits=2, reference_length=4.0)
    """
    corpus = _Corpus("corpus_ter", hypotheses, references)
    out = corpus.run(shifts, case_sensitive, beam, max_shift_distance, threads, only_numbers=True)
    edits, length = int(out["edits"].sum()), float(out["reference_length"].sum())
    return CorpusTER(_rate(edits, length), edits, length)


def _rate(edits: int, length: float) -> float:
    return edits / length if length > 0 else float(edits > 0)


class _Corpus:
    """Sentences as the native module takes them: one after the other, with their bounds."""

    def __init__(self, op: str, hypotheses, references) -> None:
        self.op = op
        for name, value in (("hypotheses", hypotheses), ("references", references)):
            if isinstance(value, str | bytes) or not hasattr(value, "__len__"):
                raise TypeError(
                    f"{op}: {name} must be a sequence of sentences, got {type(value).__name__}"
                )
        if len(hypotheses) != len(references):
            raise ValueError(
                f"{op}: references must be as many as hypotheses, {len(hypotheses)}, got "
                f"{len(references)}"
            )
        self._kind, self._kind_of = None, ""
        sentences = [
            self._sentence(f"hypotheses[{i}]", sentence) for i, sentence in enumerate(hypotheses)
        ]
        self.several = [
            self._several(f"references[{i}]", value) for i, value in enumerate(references)
        ]
        self.sentences = [*sentences, *chain.from_iterable(self.several)]

    def run(
        self,
        shifts,
        case_sensitive,
        beam,
        max_shift_distance,
        threads,
        *,
        end_of_sentence: bool = False,
        case_mismatch_is_bad: bool = False,
        only_numbers: bool = False,
    ) -> dict:
        distance = _integer(self.op, "max_shift_distance", max_shift_distance, least=0)
        words = self._ids(exact=_flag(self.op, "case_sensitive", case_sensitive))
        return _host.ter(
            words=words,
            written=self._ids(exact=True) if case_mismatch_is_bad else words,
            sentence_offsets=_offsets(0, self.sentences),
            reference_offsets=_offsets(len(self.several), self.several),
            max_shift_distance=distance if _flag(self.op, "shifts", shifts) else 0,
            beam=-1 if beam is None else _integer(self.op, "beam", beam, least=0),
            end_of_sentence=end_of_sentence,
            only_numbers=only_numbers,
            threads=0 if threads is None else _integer(self.op, "threads", threads, least=1),
        )

    def _several(self, name: str, value) -> list:
        """The references of a pair, one or more."""
        text = self._kind == "text"
        if not isinstance(value, list | tuple) or (not text and not _holds_sentences(value)):
            return [self._sentence(name, value)]
        if len(value) == 0:
            raise ValueError(f"{self.op}: {name} must hold at least one reference, got none")
        return [self._sentence(f"{name}[{k}]", sentence) for k, sentence in enumerate(value)]

    def _sentence(self, name: str, value):
        """A list of words or an array of integers."""
        kind = _kind(self.op, name, value)
        if kind is not None and self._kind is None:
            self._kind, self._kind_of = kind, name
        if kind not in (None, self._kind) or (kind is None and self._kind == "text"):
            raise TypeError(
                f"{self.op}: {name} must be of the kind of {self._kind_of} ({self._kind}), got "
                f"{kind or 'an empty list'}"
            )
        if kind == "text":
            return value.split()
        return _integers(self.op, name, value) if kind == "integers" else list(value)

    def _ids(self, *, exact: bool) -> np.ndarray:
        """A number for each word."""
        if self._kind == "integers":
            empty = np.zeros(0, dtype=np.int64)
            return np.concatenate([empty, *(s for s in self.sentences if len(s) > 0)])
        words = chain.from_iterable(self.sentences)
        words = words if exact else map(str.lower, words)
        numbers_of = defaultdict(count().__next__)
        return np.fromiter(map(numbers_of.__getitem__, words), dtype=np.int64)


def _offsets(first: int, parts: list) -> np.ndarray:
    return np.fromiter(accumulate(map(len, parts), initial=first), dtype=np.int64)


def _holds_sentences(value) -> bool:
    return len(value) > 0 and isinstance(value[0], list | tuple | np.ndarray)


def _kind(op: str, name: str, value) -> str | None:
    """text, words or integers; None of an empty list."""
    if isinstance(value, str):
        return "text"
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "iu":
        return "integers"
    if not isinstance(value, list | tuple):
        what = f"{type(value).__name__}"
        if isinstance(value, bytes):
            what += ": decode it"
        elif isinstance(value, np.ndarray):
            what += f" of {value.dtype} and shape {value.shape}"
        raise TypeError(
            f"{op}: {name} must be a str, a list of str, or a list or one-dimensional array of "
            f"integers, got {what}"
        )
    types = set(map(type, value))
    if all(issubclass(kind, str) for kind in types):
        return "words" if types else None
    if all(issubclass(kind, numbers.Integral) and kind is not bool for kind in types):
        return "integers"
    like = str if isinstance(value[0], str) else numbers.Integral
    wrong = next(word for word in value if not isinstance(word, like) or isinstance(word, bool))
    raise TypeError(
        f"{op}: {name} must hold only str or only integers, got {type(wrong).__name__} {wrong!r}"
    )


def _integers(op: str, name: str, value) -> np.ndarray:
    if isinstance(value, np.ndarray):
        fits = value.dtype != np.uint64 or len(value) == 0 or value.max() < 2**63
    else:
        fits = all(-(2**63) <= word < 2**63 for word in value)
    if not fits:
        raise ValueError(f"{op}: {name} must hold integers of 64 bits, got one beyond")
    return np.asarray(value, dtype=np.int64)


def _integer(op: str, name: str, value, *, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{op}: {name} must be an int, got {value!r}")
    if not least <= value < 2**31:
        raise ValueError(f"{op}: {name} must be in [{least}, {2**31}), got {value}")
    return int(value)


def _flag(op: str, name: str, value) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a bool, got {value!r}")
    return value
