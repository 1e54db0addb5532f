"""The loss of SongMASS against the numbers of the authors' code, and the joint update."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from songmass_batches import LYRIC_SIZE, MELODY_SIZE, batch, inputs, song

from tokcore.algorithms.songmass.batches import Example, collate, pair_example
from tokcore.algorithms.songmass.loss import OBJECTIVES, songmass_joint_loss, songmass_loss
from tokcore.algorithms.songmass.mass import mass_example
from tokcore.algorithms.songmass.model import SongMass, SongMassOutput

GOLDEN = Path(__file__).parents[1] / "golden" / "songmass_align_loss.npz"
TIGHT = {"rtol": 1e-10, "atol": 1e-10}
AUTHORS = {"rtol": 0, "atol": 1e-6}  # constants of their attention loss are float32
SONGS = [song((2, 3), 0), song((1,), 1)]


def load(case):
    archive = np.load(GOLDEN)
    prefix = f"{case}_"
    names = [name for name in archive.files if name.startswith(prefix)]
    return {name.removeprefix(prefix): torch.from_numpy(np.array(archive[name])) for name in names}


def constraint(attention, golden):
    """Spec of the operator, for attention (layers, B, T, S): mean over the layers, (B, T)."""
    same = golden["source_sent_ids"].unsqueeze(1) == golden["target_sent_ids"].unsqueeze(2)
    word = golden["source_word_ids"].unsqueeze(1) == golden["target_word_ids"].unsqueeze(2)
    wanted, share = (x.double() / x.sum(2, keepdim=True).clamp(min=1) for x in (word, same))
    return ((attention - wanted).square() * share).sum(-1).mean(0)


def plain(logits, target, constraint, label_smoothing, attention_weight):
    keep = target != 1
    logp = logits.double().log_softmax(-1)
    nll = -logp.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    smooth = -logp.mean(-1)
    each = (1 - label_smoothing) * nll + label_smoothing * smooth + attention_weight * constraint
    return each[keep].sum()


@pytest.mark.parametrize("case", ["c0", "c1", "c2", "c3"])
def test_sums_and_gradients_equal_the_authors(case):
    golden = load(case)
    logits = golden["logits"].requires_grad_()
    attention = golden["attns"].requires_grad_()
    loss, metrics = songmass_loss(
        SongMassOutput(logits, constraint(attention, golden)),
        golden["target"],
        label_smoothing=golden["label_smoothing"].item(),
        attention_weight=golden["attn_loss_weight"].item(),
        reduction="sum",
    )
    for name in ("loss", "nll_loss", "attn_loss"):
        torch.testing.assert_close(metrics[name], golden[name], **AUTHORS)
    assert metrics["ntokens"] == (golden["target"] != golden["pad"]).sum()
    for_logits, for_attention = torch.autograd.grad(loss, (logits, attention))
    torch.testing.assert_close(for_logits, golden["grad_logits"], **AUTHORS)
    torch.testing.assert_close(for_attention, golden["grad_attns"], **AUTHORS)


def test_a_batch_without_words_has_no_attention_term():
    golden, sums = load("c3"), load("nowordids")
    loss, metrics = songmass_loss(
        SongMassOutput(golden["logits"]),
        golden["target"],
        label_smoothing=sums["label_smoothing"].item(),
        reduction="sum",
    )
    torch.testing.assert_close(loss, sums["loss"], **AUTHORS)
    torch.testing.assert_close(metrics["nll_loss"], sums["nll"], **AUTHORS)
    assert metrics["attn_loss"] == 0


@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(2, 40)),
    epsilon=st.floats(0, 0.9),
    alpha=st.floats(0, 3),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=60, deadline=None)
def test_loss_and_gradient_equal_the_definition(shape, epsilon, alpha, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 10 * torch.randn(shape, generator=generator, dtype=torch.float64)
    target = torch.randint(0, shape[-1], shape[:-1], generator=generator)
    penalty = torch.rand(shape[:-1], generator=generator, dtype=torch.float64)
    results = []
    for function in (plain, None):
        leaves = [logits.clone().requires_grad_(), penalty.clone().requires_grad_()]
        if function is None:
            options = {"label_smoothing": epsilon, "attention_weight": alpha}
            loss, metrics = songmass_loss(SongMassOutput(*leaves), target, **options)
            assert metrics["ntokens"] == (target != 1).sum()
        else:
            tokens = (target != 1).sum().clamp(min=1)
            loss = function(leaves[0], target, leaves[1], epsilon, alpha) / tokens
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, **TIGHT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_vocabularies_in_low_precision(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(1, 8, 21904, generator=generator) + 30).to(dtype)
    target = torch.randint(2, 21904, (1, 8), generator=generator)
    expected = plain(logits, target, torch.zeros(1, 8), 0.1, 1.0) / 8
    loss, _ = songmass_loss(SongMassOutput(logits), target, label_smoothing=0.1)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


def test_padding_may_hold_anything():
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(2, 3, 5, generator=generator), torch.tensor([[3, 1, 1], [1, 4, 0]])
    penalty = torch.rand(2, 3, generator=generator)
    results = []
    for filler in (0.0, float("nan")):
        leaves = [logits.clone(), penalty.clone()]
        for leaf in leaves:
            leaf[target == 1] = filler
            leaf.requires_grad_()
        loss, _ = songmass_loss(SongMassOutput(*leaves), target, label_smoothing=0.2)
        loss.backward()
        results.append((loss.detach(), *(leaf.grad for leaf in leaves)))
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)
        assert clean.isfinite().all()
    assert (results[0][1][target == 1] == 0).all()


def test_a_mean_is_the_sum_over_the_tokens_and_nothing_kept_is_0():
    logits, target = torch.randn(2, 3, 5), torch.tensor([[3, 1, 1], [1, 4, 0]])
    output = SongMassOutput(logits, torch.ones(2, 3))
    total, sums = songmass_loss(output, target, reduction="sum")
    mean, means = songmass_loss(output, target)
    torch.testing.assert_close(mean, total / 3)
    torch.testing.assert_close(means["attn_loss"], torch.tensor(1.0))
    for name in ("loss", "nll_loss", "attn_loss"):
        torch.testing.assert_close(means[name], sums[name] / 3)
    nothing, _ = songmass_loss(output, torch.ones_like(target), label_smoothing=0.1)
    assert nothing == 0


def test_another_padding_id():
    logits = torch.randn(1, 3, 5)
    one, _ = songmass_loss(SongMassOutput(logits), torch.tensor([[3, 1, 1]]))
    other, _ = songmass_loss(SongMassOutput(logits), torch.tensor([[3, -9, -9]]), padding=-9)
    assert one == other


# ---- the joint update ------------------------------------------------------------------------


def four_batches():
    batches = {}
    for name, kinds in OBJECTIVES.items():
        example = Example(**batch(SONGS, *kinds), positions=None)
        if kinds[0] == kinds[1]:  # MASS knows no words
            example = example._replace(source_words=None, target_words=None)
        batches[name] = example
    return batches


def tiny():
    torch.manual_seed(0)
    sizes = {"width": 8, "heads": 2, "feed_forward": 12, "layers": 1, "dropout": 0.0}
    return SongMass(LYRIC_SIZE, MELODY_SIZE, **sizes).double()


def test_the_joint_loss_weighs_every_token_alike():
    model, batches = tiny(), four_batches()
    options = {"label_smoothing": 0.1, "attention_weight": 2.0}
    loss, metrics = songmass_joint_loss(model, batches, **options)
    total, tokens = 0, 0
    for name, (source, target) in OBJECTIVES.items():
        example = batches[name]
        tensors = inputs(example._asdict())
        output = model(**tensors, source_kind=source, target_kind=target)
        one, own = songmass_loss(output, example.target, reduction="sum", **options)
        mean, means = songmass_loss(output, example.target, **options)
        for key, value in means.items():
            torch.testing.assert_close(metrics[f"{name}/{key}"], value)
        total, tokens = total + one, tokens + own["ntokens"]
    torch.testing.assert_close(loss, total / tokens, **TIGHT)
    torch.testing.assert_close(metrics["loss"], loss.detach())
    assert metrics["ntokens"] == tokens
    assert metrics["lyric/attn_loss"] == 0
    assert metrics["lyric_to_melody/attn_loss"] > 0


def test_one_backward_is_the_sum_of_four():
    model, batches = tiny(), four_batches()
    songmass_joint_loss(model, batches)[0].backward()
    joint = [p.grad.clone() for p in model.parameters()]
    assert all(gradient.abs().sum() > 0 for gradient in joint if gradient.dim() == 2)
    model.zero_grad()
    tokens = sum((one.target != 1).sum() for one in batches.values())
    for name, example in batches.items():
        loss, metrics = songmass_joint_loss(model, {name: example})
        (loss * metrics["ntokens"] / tokens).backward()
    for one, other in zip(joint, (p.grad for p in model.parameters()), strict=True):
        torch.testing.assert_close(one, other, **TIGHT)


def test_the_constraint_alone_teaches_where_to_look():
    """Minimising the attention term alone brings the weights to those of the words."""
    model, tensors = tiny(), batch(SONGS, "melody", "lyric")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    history = []
    for _ in range(60):
        output = model(**inputs(tensors), source_kind="melody", target_kind="lyric")
        penalty = output.constraint[tensors["target"] != 1].mean()
        history.append(penalty.item())
        optimizer.zero_grad()
        penalty.backward()
        optimizer.step()
    assert history[-1] < 0.1 * history[0]


def copying(attention_weight, steps=60, rows=32):
    """Share of words copied right, in songs not seen before, after a few dozen steps."""
    torch.manual_seed(0)
    sizes = {"width": 32, "heads": 2, "feed_forward": 64, "layers": 1, "dropout": 0.0}
    model = SongMass(LYRIC_SIZE, MELODY_SIZE, **sizes)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(steps + 1):
        songs = [song((2, 3, 2), step * rows + row) for row in range(rows)]
        tensors = batch(songs, "lyric", "lyric", left=bool(step % 2))
        output = model(**inputs(tensors), source_kind="lyric", target_kind="lyric")
        loss, _ = songmass_loss(output, tensors["target"], attention_weight=attention_weight)
        optimizer.zero_grad()
        loss.backward()
        if step < steps:
            optimizer.step()
    words = tensors["target"] >= 7
    return (output.logits.argmax(-1) == tensors["target"])[words].double().mean()


def test_a_tiny_model_learns_to_copy_sentences_and_the_constraint_helps():
    constrained = copying(attention_weight=20.0)
    assert constrained > 0.95  # 0.08 by chance
    assert constrained > copying(attention_weight=0.0) + 0.1


@pytest.mark.parametrize("mode", ["code", "paper"])
@pytest.mark.parametrize("left", [False, True])
def test_what_the_data_modules_make_can_be_trained_on(mode, left):
    lyrics = [[7, 8, 6, 9, 6, 5, 10, 6, 5], [11, 6, 5]]
    melodies = [[67, 136, 6, 135, 137, 69, 138, 6, 5, 70, 136, 6, 5], [71, 140, 6, 5]]
    generator = torch.Generator().manual_seed(0)
    options = {"mode": mode, "generator": generator}
    examples = {
        "lyric": [mass_example(one, kind="lyric", size=LYRIC_SIZE, **options) for one in lyrics],
        "melody": [
            mass_example(one, kind="melody", size=MELODY_SIZE, **options) for one in melodies
        ],
        "lyric_to_melody": list(map(pair_example, lyrics, melodies)),
        "melody_to_lyric": list(map(pair_example, melodies, lyrics)),
    }
    model = tiny()
    batches = {name: collate(rows, left=left) for name, rows in examples.items()}
    loss, metrics = songmass_joint_loss(model, batches)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert metrics["lyric_to_melody/ntokens"] == 15
    assert metrics["lyric_to_melody/attn_loss"] > 0
    other = {name: collate(rows, left=not left) for name, rows in examples.items()}
    torch.testing.assert_close(songmass_joint_loss(model, other)[0], loss, **TIGHT)


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), got 1.0"),
        ({"label_smoothing": float("nan")}, "label_smoothing must be in"),
        ({"attention_weight": -1.0}, "attention_weight must be finite and not negative, got -1.0"),
        ({"attention_weight": float("inf")}, "attention_weight must be finite"),
        ({"reduction": "none"}, "reduction must be 'mean' or 'sum', got 'none'"),
    ],
)
def test_wrong_settings_are_named(options, message):
    output, target = SongMassOutput(torch.zeros(1, 2, 5)), torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"songmass_loss: {message}"):
        songmass_loss(output, target, **options)


def test_wrong_shapes_and_targets_are_named():
    logits, target = torch.zeros(1, 2, 5), torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(
        ValueError, match=r"logits and target must be .* got \(1, 2, 5\) and \(2,\)"
    ):
        songmass_loss(SongMassOutput(logits), target[0])
    with pytest.raises(ValueError, match=r"constraint must have shape \(1, 2\), got \(1,\)"):
        songmass_loss(SongMassOutput(logits, torch.zeros(1)), target)
    with pytest.raises(TypeError, match="target must be int64 or int32"):
        songmass_loss(SongMassOutput(logits), target.double())
    for smoothing in (0.0, 0.1):
        with pytest.raises(RuntimeError, match="token_logprob: target must lie in"):
            songmass_loss(SongMassOutput(logits), target + 5, label_smoothing=smoothing)


def test_unknown_objectives_are_named():
    with pytest.raises(ValueError, match=r"songmass_joint_loss: batches must be of .* got \['x'\]"):
        songmass_joint_loss(tiny(), {"x": {}})
    with pytest.raises(ValueError, match=r"songmass_joint_loss: batches must be of .* got none"):
        songmass_joint_loss(tiny(), {})
