"""What generation is given and leaves: errors, the model's mode, and the attention of a target."""

import math

import pytest
import torch
from songmass_batches import LYRIC_SIZE, MELODY_SIZE, batch, inputs, song

from tokcore.algorithms.songmass.generate import attention_matrix, generate
from tokcore.algorithms.songmass.model import SongMass

SONGS = [song((2, 3), 0), song((1,), 1), song((2, 1, 1), 2)]


def small(lyric_size=LYRIC_SIZE, melody_size=MELODY_SIZE):
    torch.manual_seed(0)
    sizes = {"width": 12, "heads": 3, "feed_forward": 20, "layers": 2, "dropout": 0.3}
    return SongMass(lyric_size, melody_size, **sizes).double()


def lyrics():
    tensors = batch(SONGS, "lyric", "melody")
    return tensors["source"], tensors["source_sentences"]


def test_the_mode_of_the_model_is_left_as_it_was():
    model, (source, sentences) = small(), lyrics()
    model.decoder["melody"].eval()
    before = [module.training for module in model.modules()]
    assert True in before
    assert False in before
    generate(model, source, sentences, target_kind="melody", beam=1, max_length=3)
    target = torch.tensor([[70, 136, 5, 2]]).repeat(3, 1)
    attention_matrix(model, source, sentences, target, target_kind="melody")
    with pytest.raises(ValueError):
        generate(model, source, sentences[:, :1], target_kind="melody")
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(("source_kind", "target_kind"), [("lyric", "melody"), ("melody", "lyric")])
def test_attention_matrix(source_kind, target_kind, left):
    model, tensors = small(), batch(SONGS, source_kind, target_kind, left=left)
    found = attention_matrix(
        model,
        tensors["source"],
        tensors["source_sentences"],
        tensors["target"],
        target_kind=target_kind,
    )
    model.eval()
    kinds = {"source_kind": source_kind, "target_kind": target_kind}
    output = model(**inputs(tensors), **kinds, return_attention=True)
    assert torch.equal(found, output.attention)
    assert not found.requires_grad
    same = tensors["target_sentences"].unsqueeze(2) == tensors["source_sentences"].unsqueeze(1)
    assert (found[~same] == 0).all()
    inside = tensors["target_sentences"] >= 0
    torch.testing.assert_close(found.sum(2), inside.to(found.dtype), rtol=1e-10, atol=1e-10)


def test_a_diverged_model_is_named():
    model, (source, sentences) = small(), lyrics()
    model.embedding["melody"].weight.data.fill_(math.nan)
    for sampling in (False, True):
        with pytest.raises(ValueError, match="generate: the model's logits must be finite"):
            generate(model, source, sentences, target_kind="melody", sampling=sampling)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_kind": "song"}, r"target_kind must be one of .* got 'song'"),
        ({"beam": 0}, r"beam must be an int in \[1, inf\], got 0"),
        ({"beam": True}, "beam must be an int"),
        ({"max_length": 0}, r"max_length must be an int in \[1, 1024\], got 0"),
        ({"max_length": 1025}, r"max_length must be an int in \[1, 1024\], got 1025"),
        ({"sampling": True, "top_k": 0}, "top_k must be an int"),
        ({"sampling": True, "top_k": 2.0}, "top_k must be an int"),
        ({"sampling": True, "temperature": 0}, "temperature must be positive and finite, got 0"),
        ({"sampling": True, "temperature": math.nan}, "temperature must be positive"),
        ({"top_k": 3}, "temperature and top_k are of sampling, got 1.0 and 3"),
        ({"temperature": 0.5}, "temperature and top_k are of sampling, got 0.5 and None"),
        ({"length_penalty": -1}, "length_penalty must be finite and not negative, got -1"),
        ({"length_penalty": math.inf}, "length_penalty must be finite"),
    ],
)
def test_wrong_settings_are_named(options, message):
    with pytest.raises(ValueError, match=f"generate: {message}"):
        generate(small(), *lyrics(), **{"target_kind": "melody", **options})


def test_a_vocabulary_without_durations_has_no_grammar():
    source, sentences = lyrics()
    with pytest.raises(ValueError, match=r"needs a melody vocabulary with durations.* got 136"):
        generate(small(20, 136), source, sentences, target_kind="melody")
    options = {"target_kind": "melody", "max_length": 4, "melody_grammar": False}
    assert generate(small(20, 136), source, sentences, **options).tokens.shape == (3, 5, 4)
    with pytest.raises(ValueError, match=r"attention_matrix: target_kind must be one of"):
        attention_matrix(small(), source, sentences, source, target_kind="x")
