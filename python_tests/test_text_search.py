"""TER against tercom's search for shifts written plainly, cell by cell and shift by shift."""

import random
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokcore.text import Shift, ter


def plain_alignment(hypothesis, reference, beam):
    """Every cell that the beam keeps, in tercom's order: forwards, strictly less wins."""
    rows, columns = len(reference), len(hypothesis)
    cost, letter = {(0, 0): 0}, {}
    first, last, best = 0, 0, float("inf")

    def offer(i, j, value, name):
        if value < cost.get((i, j), float("inf")):
            cost[i, j], letter[i, j] = value, name
            return True
        return False

    for j in range(columns + 1):
        kept, next_best, i = [], float("inf"), first
        while i <= min(rows, last):
            value = cost.get((i, j))
            if value is not None and not (j < columns and value > best + beam):
                kept.append(i)
                if i < rows and j < columns:
                    same = reference[i] == hypothesis[j]
                    taken = offer(i + 1, j + 1, value + (not same), " " if same else "S")
                    if same or taken:
                        next_best = min(next_best, value + (not same))
                if j < columns:
                    offer(i, j + 1, value + 1, "I")
                if i < rows and offer(i + 1, j, value + 1, "D"):
                    last = max(last, i + 1)
            i += 1
        first, last, best = kept[0], kept[-1] + 1, next_best
    i, j, letters = rows, columns, ""
    while i or j:
        letters += letter[i, j]
        i, j = i - (letter[i, j] != "I"), j - (letter[i, j] != "D")
    return cost[rows, columns], letters[::-1]


def plain_move(order, start, end, target):
    block, rest = order[start : end + 1], order[:start] + order[end + 1 :]
    if target < start:
        at = target + 1
    elif target > end:
        at = target - len(block) + 1
    else:
        at = target
    return rest[:at] + block + rest[at:]


def plain_candidates(order, reference, letters, distance):
    hypothesis_wrong, reference_wrong, partner = [], [], []
    for letter in letters:
        if letter != "D":
            hypothesis_wrong.append(letter != " ")
        if letter != "I":
            partner.append(len(hypothesis_wrong) - 1)
            reference_wrong.append(letter != " ")
    found = {length: [] for length in range(1, 11)}

    def places(block):
        n = len(block)
        return [m for m in range(len(reference) - n + 1) if reference[m : m + n] == block]

    for start in range(len(order)):
        if not any(
            partner[m] != start
            and partner[m] - start <= distance
            and start - partner[m] - 1 <= distance
            for m in places(order[start : start + 1])
        ):
            continue
        for end in range(start, min(start + 10, len(order))):
            block = order[start : end + 1]
            if not places(block):
                break
            if not any(hypothesis_wrong[start : end + 1]):
                continue
            reachable = [
                m
                for m in places(block)
                if not start <= partner[m] <= end and abs(partner[m] - start) <= distance
            ]
            for m in reachable:
                if not any(reference_wrong[m : m + len(block)]):
                    continue
                for o in range(-1, len(block)):
                    if o == -1 and m == 0:
                        found[len(block)].append(Shift(start, end, -1, -1))
                    elif partner[m + o] != start and (o == 0 or partner[m + o] != partner[m]):
                        found[len(block)].append(Shift(start, end, m + o, partner[m + o]))
            if not reachable:
                break
    return found


def hopeless(edits, best, chosen, length):
    saved = edits - best - (chosen is not None)
    return saved > 2 * length or (chosen is not None and saved == 2 * length)


def plain_ter(hypothesis, reference, beam=20, distance=50):
    order = [(word, k) for k, word in enumerate(hypothesis)]
    shifts = []
    while True:
        edits, letters = plain_alignment([w for w, _ in order], reference, beam)
        if distance == 0:
            break
        found = plain_candidates([w for w, _ in order], reference, letters, distance)
        best, chosen = edits, None
        for length in range(10, 0, -1):
            if hopeless(edits, best, chosen, length):
                break
            for shift in found[length]:
                if hopeless(edits, best, chosen, length):
                    break
                moved = plain_move(order, shift.start, shift.end, shift.target)
                after, _ = plain_alignment([w for w, _ in moved], reference, beam)
                gain = best + (chosen is not None) - (after + 1)
                if gain > 0 or (gain == 0 and chosen is None):
                    best, chosen = after, shift
        if chosen is None:
            break
        shifts.append(chosen)
        order = plain_move(order, chosen.start, chosen.end, chosen.target)
    return edits + len(shifts), shifts, [k for _, k in order], letters


def assert_plain(pairs, **options):
    plain = {"distance": options.get("max_shift_distance", 50), "beam": options.get("beam", 20)}
    plain["beam"] = float("inf") if plain["beam"] is None else plain["beam"]
    result = ter([h for h, _ in pairs], [r for _, r in pairs], threads=2, **options)
    for i, (hypothesis, reference) in enumerate(pairs):
        edits, shifts, order, letters = plain_ter(hypothesis, reference, **plain)
        got = result.edits[i], result.shifts[i], result.permutation[i].tolist(), result.alignment[i]
        assert got == (edits, shifts, order, letters), (hypothesis, reference)


sentences = st.lists(st.integers(0, 4), max_size=14)


@settings(deadline=None, max_examples=150)
@given(sentences, sentences, st.sampled_from([0, 1, 3, 50]), st.sampled_from([0, 1, 3, 20, None]))
def test_few_distinct_words(hypothesis, reference, distance, beam):
    assert_plain([(hypothesis, reference)], max_shift_distance=distance, beam=beam)


def edited(generator, words: int, vocabulary: int, edits: int):
    reference = [generator.randrange(vocabulary) for _ in range(words)]
    hypothesis = list(reference)
    for _ in range(edits):
        at = generator.randrange(len(hypothesis) + 1)
        kind = generator.randrange(4)
        if kind == 0:
            hypothesis[at : at + 1] = [generator.randrange(vocabulary)]
        elif kind == 1:
            del hypothesis[at : at + 1]
        elif kind == 2:
            hypothesis.insert(at, generator.randrange(vocabulary))
        else:
            block = hypothesis[at : at + 4]
            del hypothesis[at : at + 4]
            to = generator.randrange(len(hypothesis) + 1)
            hypothesis[to:to] = block
    return hypothesis, reference


@pytest.mark.parametrize(("words", "vocabulary", "edits"), [(25, 200, 6), (34, 12, 8), (30, 3, 4)])
def test_sentences_of_usual_lengths(words, vocabulary, edits):
    generator = random.Random(words)
    assert_plain([edited(generator, words, vocabulary, edits) for _ in range(6)])


def test_more_than_a_word_of_bits():
    generator = random.Random(5)
    assert_plain([edited(generator, 70, 60, 6), edited(generator, 66, 9, 5)])


@pytest.mark.parametrize("beam", [1, 2, 5])
def test_where_the_beam_matters(beam):
    """Lengths that differ by more than the beam, and by less."""
    generator = random.Random(beam)
    pairs = [
        tuple([generator.randrange(4) for _ in range(generator.randrange(2, 16))] for _ in range(2))
        for _ in range(150)
    ]
    assert_plain(pairs, beam=beam)
    with_beam, without = (
        ter(*zip(*pairs, strict=True), beam=b, shifts=False).edits for b in (beam, None)
    )
    assert (with_beam >= without).all()
    if beam == 1:
        assert (with_beam > without).any()


def test_all_short_pairs_of_two_words():
    pairs = [
        (list(tokens[:columns]), list(tokens[columns:]))
        for columns, rows in product(range(5), repeat=2)
        for tokens in product(range(2), repeat=columns + rows)
    ]
    assert_plain(pairs)
