"""Edit distance and TER of the packages people have.

    pip install --no-deps rapidfuzz jiwer sacrebleu

with click, portalocker, regex, tabulate, colorama and lxml.
"""


def words(ids):
    """Sentences as lists of words."""
    return [[f"w{token}" for token in row] for row in ids.tolist()]


def rapidfuzz(hypotheses, references):
    """Operations in a tie order of its own, without matches; no batch."""
    from rapidfuzz.distance import Levenshtein

    pairs = zip(hypotheses, references, strict=True)
    return [Levenshtein.editops(hypothesis, reference) for hypothesis, reference in pairs]


def rapidfuzz_distance(hypotheses, references):
    """No operations."""
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cpdist

    return cpdist(hypotheses, references, scorer=Levenshtein.distance)


def jiwer(hypotheses, references):
    """Of sentences; rapidfuzz's operations, in runs."""
    from jiwer import process_words

    return process_words(reference=references, hypothesis=hypotheses)


def sacrebleu(hypotheses, references):
    """Edits and length of the corpus: no alignment, no tags. Most often tercom's edits."""
    from sacrebleu.metrics import TER

    return TER().corpus_score(hypotheses, [references])
