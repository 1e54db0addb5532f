"""Generation with sentence control: against exhaustive search, plain beam search, frequencies."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from songmass_batches import LYRIC_SIZE, MELODY_SIZE, batch, inputs, song

from tokcore.algorithms.songmass.generate import generate
from tokcore.algorithms.songmass.loss import songmass_loss
from tokcore.algorithms.songmass.model import SongMass, decoder_input, target_sentence_ids
from tokcore.masking import pad_rows

SIZES = {"lyric_size": 10, "melody_size": 140}
SONGS = [song((2, 3), 0), song((1,), 1), song((2, 1, 1), 2)]
TIGHT = {"rtol": 1e-9, "atol": 1e-9}


def small(lyric_size=LYRIC_SIZE, melody_size=MELODY_SIZE, **options):
    torch.manual_seed(0)
    sizes = {"width": 12, "heads": 3, "feed_forward": 20, "layers": 2, "dropout": 0.3}
    model = SongMass(lyric_size, melody_size, **{**sizes, **options}).double()
    for table in model.embedding.values():
        table.weight.data *= 2  # less even distributions: paths differ
    return model


@pytest.fixture(scope="module")
def trained():
    """A model that has learned how songs end, and little else."""
    model = small(**SIZES, layers=1, dropout=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for step in range(40):
        words = torch.randint(1, 4, (8, 3), generator=torch.Generator().manual_seed(step)).tolist()
        songs = [song(one[: 1 + row % 3], step * 8 + row, **SIZES) for row, one in enumerate(words)]
        for source_kind, target_kind in (("lyric", "melody"), ("melody", "lyric")):
            tensors = batch(songs, source_kind, target_kind)
            kinds = {"source_kind": source_kind, "target_kind": target_kind}
            loss, _ = songmass_loss(model(**inputs(tensors), **kinds), tensors["target"])
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def sources(kind, songs=SONGS, *, left=False):
    tensors = batch(songs, kind, "melody", left=left)
    return tensors["source"], tensors["source_sentences"]


def alone_of(source, sentences, row):
    keep = source[row] != 1
    return source[row : row + 1, keep], sentences[row : row + 1, keep]


def logprobs_of(model, source, sentences, songs, target_kind):
    """Teacher-forced log-probabilities (songs, T, V) of songs of one source."""
    target = pad_rows([torch.tensor(one) for one in songs], 1)
    model.eval()
    output = model(
        source.expand(len(songs), -1),
        decoder_input(target),
        source_kind="melody" if target_kind == "lyric" else "lyric",
        target_kind=target_kind,
        source_sentences=sentences.expand(len(songs), -1),
        target_sentences=target_sentence_ids(target),
    )
    return output.logits.detach().log_softmax(-1)


def scores_of(model, source, sentences, songs, target_kind, length_penalty=1.0):
    logprobs = logprobs_of(model, source, sentences, songs, target_kind)
    return [
        sum(logprob[t, token].item() for t, token in enumerate(one)) / len(one) ** length_penalty
        for one, logprob in zip(songs, logprobs, strict=True)
    ]


def continuations(prefix, sentences, kind, size):
    """What may follow a prefix, written down a second time."""
    if prefix.count(5) == sentences:
        return [2]
    starts = not prefix or prefix[-1] == 5
    if kind == "lyric":
        return [*([] if starts else [5]), *range(7, size)]
    if not starts and prefix[-1] < 136:
        return list(range(136, size))
    return [*([] if starts else [5]), *range(7, 136)]


def every_song(sentences, kind, size, max_length):
    """All closed token lists, and all of max_length that are not closed."""
    closed, cut, stack = [], [], [[]]
    while stack:
        prefix = stack.pop()
        if prefix and prefix[-1] == 2:
            closed.append(prefix)
        elif len(prefix) == max_length:
            cut.append(prefix)
        else:
            stack += [[*prefix, token] for token in continuations(prefix, sentences, kind, size)]
    return closed, cut


def rows(generation, source=0):
    """Token lists of one source's hypotheses, without padding."""
    return [[t for t in row if t != 1] for row in generation.tokens[source].tolist()]


# ---- beam search -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "count", "max_length", "length_penalty"),
    [("lyric", 1, 6, 0.0), ("lyric", 1, 6, 1.0), ("lyric", 2, 7, 1.0), ("melody", 1, 4, 1.0)],
)
def test_a_beam_as_wide_as_everything_is_exhaustive_search(kind, count, max_length, length_penalty):
    model, sizes = small(9, 138), {"lyric": 9, "melody": 138}
    source = torch.tensor([[8 if kind == "melody" else 70, 5] * count + [2]])
    sentences = torch.tensor([[i // 2 for i in range(2 * count)] + [-1]])
    closed, cut = every_song(count, kind, sizes[kind], max_length)
    beam = len(closed) + len(cut) + 3
    found = generate(
        model,
        source,
        sentences,
        target_kind=kind,
        max_length=max_length,
        beam=beam,
        length_penalty=length_penalty,
    )
    expected = ["closed"] * len(closed) + ["length"] * len(cut)
    assert found.ended[0] == [*expected, "none", "none", "none"]
    scores = scores_of(model, source, sentences, closed, kind, length_penalty)
    wanted = sorted(zip(scores, closed, strict=True), reverse=True)
    assert rows(found)[: len(closed)] == [one for _, one in wanted]
    best = torch.tensor([score for score, _ in wanted], dtype=torch.float64)
    torch.testing.assert_close(found.scores[0, : len(closed)], best, **TIGHT)
    rest = rows(found)[len(closed) : -3]
    assert sorted(rest) == sorted(cut)
    some = rest[:50]
    expected = scores_of(model, source, sentences, some, kind, length_penalty)
    assert expected == sorted(expected, reverse=True)
    end = len(closed) + len(some)
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found.scores[0, len(closed) : end], expected, **TIGHT)


def beam_search(model, source, sentences, count, kind, size, beam, max_length):
    """Beam search with lists of one source: what the batched one must find."""
    live, closed = [([], 0.0)], []
    for _ in range(max_length):
        candidates = []
        for prefix, total in live:
            logprob = logprobs_of(model, source, sentences, [[*prefix, 7]], kind)[0, -1]
            for token in continuations(prefix, count, kind, size):
                candidates.append(([*prefix, token], total + logprob[token].item()))
        candidates.sort(key=lambda candidate: -candidate[1])
        ends = [one for one in candidates[:beam] if one[0][-1] == 2]
        closed = [*closed, *((one, total / len(one)) for one, total in ends)]
        closed = sorted(closed, key=lambda one: -one[1])[:beam]
        live = [one for one in candidates if one[0][-1] != 2][:beam]
        if len(closed) == beam or not live:
            return closed
    cut = [(one, total / max_length) for one, total in live]
    return (closed + sorted(cut, key=lambda one: -one[1]))[:beam]


@pytest.mark.parametrize("kind", ["lyric", "melody"])
@pytest.mark.parametrize("beam", [1, 3])
@pytest.mark.parametrize("left", [False, True])
def test_a_batch_equals_plain_beam_search_of_each_source(trained, kind, beam, left):
    model, words = trained, ((1, 2), (1,), (2, 1, 1))
    songs = [song(one, seed, **SIZES) for seed, one in enumerate(words)]
    source, sentences = sources({"lyric": "melody", "melody": "lyric"}[kind], songs, left=left)
    found = generate(model, source, sentences, target_kind=kind, beam=beam, max_length=9)
    for row, one in enumerate(words):
        size = SIZES[f"{kind}_size"]
        alone = alone_of(source, sentences, row)
        wanted = beam_search(model, *alone, len(one), kind, size, beam, 9)
        assert rows(found, row)[: len(wanted)] == [one for one, _ in wanted]
        scores = torch.tensor([score for _, score in wanted], dtype=torch.float64)
        torch.testing.assert_close(found.scores[row, : len(wanted)], scores, **TIGHT)
        assert found.ended[row][: len(wanted)] == [
            "closed" if one[-1] == 2 else "length" for one, _ in wanted
        ]
    assert found.ended[1] == ["closed"] * beam


def test_hypotheses_that_do_not_exist_are_named():
    source, sentences = torch.tensor([[70, 136, 5, 2]]), torch.tensor([[0, 0, 0, -1]])
    found = generate(small(8), source, sentences, target_kind="lyric", beam=6, max_length=4)
    assert found.ended == [["closed", "closed", "length", "length", "none", "none"]]
    assert sorted(rows(found)[:2]) == [[7, 5, 2], [7, 7, 5, 2]]
    assert sorted(rows(found)[2:]) == [[], [], [7, 7, 7, 5], [7, 7, 7, 7]]
    assert found.sentences[0, 2:].sum() == 1  # a last [sep] closes the sentence, not the song
    assert (found.scores[0, 4:] == -math.inf).all()


# ---- sentences and grammar -----------------------------------------------------------------------


@given(
    words=st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=4), min_size=1, max_size=3),
    kind=st.sampled_from(["lyric", "melody"]),
    sampling=st.booleans(),
    left=st.booleans(),
    max_length=st.integers(1, 25),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=25, deadline=None)
def test_every_song_keeps_the_rules(trained, words, kind, sampling, left, max_length, seed):
    songs = [song(one, seed + row, **SIZES) for row, one in enumerate(words)]
    source, sentences = sources({"lyric": "melody", "melody": "lyric"}[kind], songs, left=left)
    found = generate(
        trained,
        source,
        sentences,
        target_kind=kind,
        beam=2,
        sampling=sampling,
        temperature=4.0 if sampling else 1.0,  # what is forbidden is tempting
        max_length=max_length,
        generator=torch.Generator().manual_seed(seed),
    )
    size = SIZES[f"{kind}_size"]
    assert found.tokens.shape[2] <= max_length
    for row, one in enumerate(words):
        for k, tokens in enumerate(rows(found, row)):
            for step, token in enumerate(tokens):
                assert token in continuations(tokens[:step], len(one), kind, size)
            assert found.sentences[row, k] == tokens.count(5)
            if found.ended[row][k] == "closed":
                assert tokens[-1] == 2
                assert tokens.count(5) == len(one)
            elif found.ended[row][k] == "length":
                assert len(tokens) == max_length
                assert 2 not in tokens


def test_too_short_a_limit_is_reported():
    source, sentences = sources("lyric")
    found = generate(small(), source, sentences, target_kind="melody", max_length=6)
    assert found.ended[2] == ["length"] * 5  # three sentences need ten tokens
    assert (found.sentences[2] < 3).all()
    assert (found.tokens != 2).all(-1)[2].all()
    assert found.scores.isfinite().all()


def test_without_the_grammar_pitches_and_durations_mix():
    source, sentences = sources("lyric")
    options = {"target_kind": "melody", "sampling": True, "max_length": 40}
    found = generate(small(), source, sentences, melody_grammar=False, **options)
    kinds = found.tokens[0, 0] >= 136
    assert (kinds[1:] == kinds[:-1]).any()
    assert not torch.isin(found.tokens, torch.tensor([0, 3, 4, 6])).any()


def test_a_source_without_sentences_gives_the_end_alone():
    source, sentences = torch.tensor([[2, 1]]), torch.tensor([[-1, -1]])
    for sampling in (False, True):
        found = generate(small(), source, sentences, target_kind="melody", sampling=sampling)
        assert rows(found)[0] == [2]
        assert found.ended[0][0] == "closed"


def test_an_empty_batch():
    none = torch.zeros(0, 3, dtype=torch.int64)
    for sampling in (False, True):
        found = generate(small(), none, none, target_kind="melody", beam=2, sampling=sampling)
        assert found.tokens.shape == (0, 2, 0)
        assert found.scores.shape == (0, 2)
        assert found.ended == []


# ---- sampling ----------------------------------------------------------------------------------


def melodies():
    songs = [song(one, seed, **SIZES) for seed, one in enumerate(((2, 3), (1,), (2, 1, 1)))]
    return sources("melody", songs)


def sample(model, seed, **options):
    return generate(
        model,
        *melodies(),
        target_kind="lyric",
        sampling=True,
        generator=torch.Generator().manual_seed(seed),
        **{"beam": 3, "max_length": 30, **options},
    )


def test_one_seed_gives_one_result(trained):
    first, again, other = (sample(trained, seed) for seed in (1, 1, 2))
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.scores, again.scores)
    assert first.ended == again.ended
    assert not torch.equal(first.tokens, other.tokens)
    assert len({tuple(row) for row in rows(first)}) > 1


def test_the_global_generator_is_left_alone(trained):
    state = torch.get_rng_state()
    sample(trained, 0)
    generate(trained, *melodies(), target_kind="lyric", max_length=5)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("options", [{"top_k": 1}, {"temperature": 1e-40}])
def test_the_likeliest_token_alone_is_greedy_search(trained, options):
    model = copy.deepcopy(trained).float()  # where 1 / temperature is infinite
    greedy = generate(model, *melodies(), target_kind="lyric", beam=1, max_length=30)
    found = sample(model, 0, beam=1, **options)
    assert torch.equal(found.tokens, greedy.tokens)
    torch.testing.assert_close(found.scores, greedy.scores)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (2.0, None), (1.0, 2)])
def test_frequencies_are_the_probabilities(temperature, top_k):
    model, count = small(10), 4000
    source, sentences = torch.tensor([[70, 136, 5, 2]]), torch.tensor([[0, 0, 0, -1]])
    found = generate(
        model,
        source,
        sentences,
        target_kind="lyric",
        beam=count,
        sampling=True,
        temperature=temperature,
        top_k=top_k,
        max_length=2,
        generator=torch.Generator().manual_seed(0),
    )
    drawn = found.tokens[0, :, 0]
    allowed = torch.tensor([7, 8, 9])
    score = logprobs_of(model, source, sentences, [[7]], "lyric")[0, 0, allowed] / temperature
    if top_k is not None:
        score[score < score.sort(descending=True).values[top_k - 1]] = -math.inf
    expected = score.softmax(-1)
    share = torch.stack([(drawn == token).double().mean() for token in allowed])
    assert ((share - expected).abs() <= 4 * (expected * (1 - expected) / count).sqrt()).all()


def test_scores_are_those_of_the_model(trained):
    found, (source, sentences) = sample(trained, 0, length_penalty=0.5), melodies()
    assert len({len(one) for one in rows(found)}) > 1
    for row, scores in enumerate(found.scores):
        alone = alone_of(source, sentences, row)
        expected = scores_of(trained, *alone, rows(found, row), "lyric", length_penalty=0.5)
        torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), **TIGHT)
