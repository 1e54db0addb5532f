"""The SongMASS transformer: golden masks and attention, and what must and must not matter."""

from pathlib import Path

import numpy as np
import pytest
import torch
from songmass_batches import LYRIC_SIZE, MELODY_SIZE, batch, inputs, song

from tokcore.algorithms.songmass import layers
from tokcore.algorithms.songmass.layers import CrossAttention, Segments, sinusoid
from tokcore.algorithms.songmass.loss import songmass_loss
from tokcore.algorithms.songmass.model import SongMass, decoder_input, target_sentence_ids

GOLDEN = Path(__file__).parents[1] / "golden"
KINDS = ("lyric", "melody")
DIRECTIONS = [(source, target) for source in KINDS for target in KINDS]
SONGS = [song((2, 3), 0), song((1,), 1), song((2, 1, 1), 2)]
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def small(**options):
    torch.manual_seed(0)
    sizes = {"width": 12, "heads": 3, "feed_forward": 20, "layers": 2, "dropout": 0.0}
    return SongMass(LYRIC_SIZE, MELODY_SIZE, **{**sizes, **options}).double()


def run(model, tensors, source_kind, target_kind, **options):
    return model(**inputs(tensors), source_kind=source_kind, target_kind=target_kind, **options)


def load(file):
    archive = np.load(GOLDEN / f"{file}.npz")
    return {name: torch.from_numpy(np.array(archive[name])) for name in archive.files}


# ---- golden ----------------------------------------------------------------------------------


def test_cross_attention_equals_the_authors():
    golden, ids = load("songmass_masked_attention"), load("songmass_sentmask")
    source, target = ids["hand_source_sent_ids"], ids["hand_target_sent_ids"]
    assert torch.equal(golden["mask"], source.unsqueeze(1) != target.unsqueeze(2))
    module = CrossAttention(golden["q_in"].shape[-1], int(golden["num_heads"])).double()
    for ours, theirs in {"query": "q", "key": "k", "value": "v", "output": "out"}.items():
        for part in ("weight", "bias"):
            getattr(getattr(module, ours), part).data = golden[f"param_{theirs}_proj.{part}"]
    encoded = golden["kv_in"].transpose(0, 1)
    segments = Segments(target, source, return_attention=True)
    output, constraint, weights = module(
        golden["q_in"].transpose(0, 1), module.keys_values(encoded), segments
    )
    single = {"rtol": 0, "atol": 1e-6}  # their softmax is float32
    torch.testing.assert_close(output, golden["out"].transpose(0, 1), **single)
    torch.testing.assert_close(weights, golden["weights_headmean"].double(), **single)
    assert constraint is None
    empty = golden["mask"].all(2)
    assert empty.any()
    assert (weights[empty] == 0).all()
    assert torch.equal(output[empty], module.output.bias.expand_as(output[empty]))


def test_ids_and_input_of_a_target_equal_the_authors():
    golden = load("songmass_sentmask")
    target = golden["rightpad_target"]
    assert torch.equal(target_sentence_ids(target), golden["rightpad_target_sent_ids"])
    assert torch.equal(decoder_input(target), golden["rightpad_prev_output_tokens"])


def test_sentences_of_incremental_decoding_equal_the_authors():
    golden = load("songmass_sentmask")
    source, previous = golden["inc_source_sent_ids"], golden["inc_prev"]
    model = small(layers=1)
    tokens = torch.where(source < 0, 2, 7)
    state = model.start(tokens, source, source_kind="lyric", target_kind="melody")
    for step, token in enumerate(previous.unbind(1)):
        model.step(state, token.unsqueeze(1))
        assert torch.equal(state.closed != source, golden["inc_mask"][:, step])


# ---- decoding step by step -------------------------------------------------------------------


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(("source_kind", "target_kind"), DIRECTIONS)
def test_step_by_step_equals_teacher_forcing(source_kind, target_kind, left):
    model = small()
    tensors = batch(SONGS, source_kind, target_kind, left=left)
    forced = run(model, tensors, source_kind, target_kind).logits
    state = model.start(
        tensors["source"],
        tensors["source_sentences"],
        source_kind=source_kind,
        target_kind=target_kind,
    )
    keep = tensors["previous"] != 1
    # Without padding each row is decoded as it stands: padding on the left is skipped.
    rows = [row[kept] for row, kept in zip(tensors["previous"], keep, strict=True)]
    longest = max(len(row) for row in rows)
    logits = []
    for step in range(longest):
        token = torch.stack([row[min(step, len(row) - 1)] for row in rows])
        logits.append(model.step(state, token.unsqueeze(1)).squeeze(1))
    logits = torch.stack(logits, 1)
    for row, kept in enumerate(keep):
        torch.testing.assert_close(logits[row, : kept.sum()], forced[row, kept], **TIGHT)


def test_hypotheses_continue_the_parents_they_are_given():
    model, tensors = small(), batch(SONGS, "lyric", "melody")
    batch_size = len(SONGS)
    state = model.start(
        tensors["source"],
        tensors["source_sentences"],
        source_kind="lyric",
        target_kind="melody",
        hypotheses=2,
    )
    first = torch.tensor([[70, 5]]).repeat(batch_size, 1)
    model.step(state, torch.full((batch_size, 2), 2))
    model.step(state, first)
    state.select(torch.tensor([[1, 0], [1, 1], [0, 0]]))
    logits = model.step(state, torch.tensor([[140, 80]]).repeat(batch_size, 1))
    chosen = torch.tensor([[5, 70], [5, 5], [70, 70]])
    for k, last in enumerate((140, 80)):
        previous = torch.tensor([[2, int(row[k]), last] for row in chosen])
        forced = model(
            tensors["source"],
            previous,
            source_kind="lyric",
            target_kind="melody",
            source_sentences=tensors["source_sentences"],
            target_sentences=(previous == 5).cumsum(1),
        )
        torch.testing.assert_close(logits[:, k], forced.logits[:, -1], **TIGHT)


# ---- what must not matter ----------------------------------------------------------------------


@pytest.mark.parametrize(("source_kind", "target_kind"), DIRECTIONS)
def test_padding_left_equals_padding_right(source_kind, target_kind):
    model, results = small(), []
    for left in (False, True):
        tensors = batch(SONGS, source_kind, target_kind, left=left)
        output = run(model, tensors, source_kind, target_kind, return_attention=True)
        keep, columns = tensors["target"] != 1, tensors["source"] != 1
        pairs = keep.unsqueeze(2) & columns.unsqueeze(1)
        results.append((output.logits[keep], output.constraint[keep], output.attention[pairs]))
        assert (output.constraint[~keep] == 0).all()
    for right, left in zip(*results, strict=True):
        torch.testing.assert_close(right, left, **TIGHT)


def test_more_padding_and_neighbours_change_nothing():
    model = small()
    together = run(model, batch(SONGS, "lyric", "melody"), "lyric", "melody")
    for row, one in enumerate(SONGS):
        alone = run(model, batch([one], "lyric", "melody"), "lyric", "melody")
        length = alone.logits.shape[1]
        torch.testing.assert_close(together.logits[row, :length], alone.logits[0], **TIGHT)


def test_a_sentence_sees_no_other_sentence():
    """With self-attention off on both sides, cross-attention is the only way between tokens."""
    model = small()
    for stack in (model.encoder["lyric"], model.decoder["melody"]):
        for layer in stack:
            torch.nn.init.zeros_(layer.self_attention.output.weight)
    tensors = batch(SONGS[:1], "lyric", "melody")
    before = run(model, tensors, "lyric", "melody").logits
    changed = {**tensors, "source": tensors["source"].clone()}
    changed["source"][0, 0] = 7 + (tensors["source"][0, 0] - 6) % 13
    after = run(model, changed, "lyric", "melody").logits
    own = tensors["target_sentences"] == tensors["source_sentences"][0, 0]
    assert own.any()
    assert (~own).any()
    assert torch.equal(before[~own], after[~own])
    assert (before[own] != after[own]).any(-1).all()


def test_the_future_is_not_seen():
    model, tensors = small(), batch(SONGS, "melody", "lyric")
    before = run(model, tensors, "melody", "lyric").logits
    tensors["previous"][0, 4] = 7 + (tensors["previous"][0, 4] - 6) % 13
    after = run(model, tensors, "melody", "lyric").logits
    assert torch.equal(before[0, :4], after[0, :4])
    assert not torch.equal(before[0, 4:], after[0, 4:])


def test_mask_and_padding_are_no_keys_of_the_encoder():
    model = small()
    source = torch.tensor([[8, 4, 9, 2, 1], [8, 4, 4, 2, 1]])
    before = model.encode(source, "lyric")
    model.embedding["lyric"].weight.data[[1, 4]] += 1
    after = model.encode(source, "lyric")
    seen = (source != 4) & (source != 1)
    torch.testing.assert_close(before[seen], after[seen], **TIGHT)
    assert (before[source == 4] != after[source == 4]).any(-1).all()


def test_positions_may_be_given():
    model, tensors = small(), batch(SONGS, "lyric", "lyric", left=True)
    counted = ((tensors["previous"] != 1).cumsum(1) - 1).clamp(min=0)
    default = run(model, tensors, "lyric", "lyric").logits
    given = run(model, tensors, "lyric", "lyric", positions=counted).logits
    assert torch.equal(default, given)
    other = run(model, tensors, "lyric", "lyric", positions=counted + 3).logits
    assert not torch.allclose(default, other)


def test_sinusoids():
    table = sinusoid(torch.arange(3), 4)
    angles = torch.tensor([[0.0, 0.0], [1.0, 1e-4], [2.0, 2e-4]])
    torch.testing.assert_close(table, torch.cat([angles.sin(), angles.cos()], 1))


# ---- the constraint ------------------------------------------------------------------------------


def test_constraint_is_the_mean_over_the_layers(monkeypatch):
    tensors, records = batch(SONGS, "lyric", "melody"), []

    def recording(*arguments, **options):
        seen = plain(*arguments, **{**options, "return_weights": True})
        records.append(seen.weights)
        return seen

    plain = layers.segment_attention
    monkeypatch.setattr(layers, "segment_attention", recording)
    output = run(small(layers=3), tensors, "lyric", "melody", return_attention=True)
    assert len(records) == 3
    torch.testing.assert_close(output.attention, records[-1])
    same = tensors["source_sentences"].unsqueeze(1) == tensors["target_sentences"].unsqueeze(2)
    word = tensors["source_words"].unsqueeze(1) == tensors["target_words"].unsqueeze(2)
    wanted, share = (x.double() / x.sum(2, keepdim=True).clamp(min=1) for x in (word, same))
    each = [((weights - wanted) ** 2 * share).sum(2) for weights in records]
    torch.testing.assert_close(output.constraint, torch.stack(each).mean(0), **TIGHT)


def test_without_words_there_is_no_constraint():
    tensors = batch(SONGS, "lyric", "lyric")
    del tensors["source_words"], tensors["target_words"]
    output = run(small(), tensors, "lyric", "lyric")
    assert output.constraint is None
    assert output.attention is None


# ---- gradients and parameters --------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_gradients_are_finite_where_rows_are_empty():
    tensors = batch([*SONGS, {"lyric": [(4, None, 0)], "melody": []}], "lyric", "melody")
    assert (tensors["target"][-1] == 1).all()
    model = small(dropout=0.3)
    with torch.autograd.detect_anomaly(check_nan=True):
        output = run(model, tensors, "lyric", "melody")
        loss, _ = songmass_loss(output, tensors["target"], label_smoothing=0.1)
        loss.backward()
    assert output.logits.isfinite().all()
    used = [p.grad for p in model.parameters() if p.grad is not None]
    assert used
    assert all(gradient.isfinite().all() for gradient in used)


def test_one_table_for_each_kind_and_nothing_shared_between_kinds():
    width, inner, depth = 12, 20, 2
    attention, norm = 4 * (width * width + width), 2 * width
    feed_forward = 2 * width * inner + width + inner
    encoder = depth * (attention + feed_forward + 2 * norm)
    decoder = depth * (2 * attention + feed_forward + 3 * norm)
    tables = (LYRIC_SIZE + MELODY_SIZE) * width
    model = small()
    assert sum(p.numel() for p in model.parameters()) == tables + 2 * (encoder + decoder)
    tensors = batch(SONGS, "lyric", "lyric")
    run(model, tensors, "lyric", "lyric").logits.sum().backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None}
    assert touched == {name for name, _ in model.named_parameters() if ".lyric." in name}
    # The table's gradient has all three uses: logits alone would leave other rows equal.
    assert len(model.embedding["lyric"].weight.grad.unique(dim=0)) > 2


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_of_training_and_reaches_the_self_attention(monkeypatch, training):
    rates, plain = set(), torch.nn.functional.scaled_dot_product_attention

    def recording(*arguments, **options):
        rates.add(options["dropout_p"])
        return plain(*arguments, **options)

    monkeypatch.setattr(layers.F, "scaled_dot_product_attention", recording)
    model, tensors = small(dropout=0.3).train(training), batch(SONGS, "lyric", "melody")
    first, second = (run(model, tensors, "lyric", "melody").logits for _ in range(2))
    assert torch.equal(first, second) != training
    assert rates == {0.3 if training else 0.0}


def test_default_is_the_base_model():
    with torch.device("meta"):
        model = SongMass(21904, 152)
    assert [len(model.encoder[kind]) for kind in KINDS] == [6, 6]
    layer = model.decoder["melody"][0]
    assert layer.self_attention.heads == 8
    assert layer.widen.weight.shape == (2048, 512)
    assert layer.dropout.p == 0.1


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty_inputs(shape):
    rows, sources, targets = shape
    source, previous = torch.full((rows, sources), 7), torch.full((rows, targets), 7)
    output = small()(
        source,
        previous,
        source_kind="lyric",
        target_kind="melody",
        source_sentences=torch.zeros_like(source),
        target_sentences=torch.zeros_like(previous),
        source_words=torch.zeros_like(source),
        target_words=torch.zeros_like(previous),
        return_attention=True,
    )
    assert output.logits.shape == (rows, targets, MELODY_SIZE)
    assert output.constraint.shape == (rows, targets)
    assert output.attention.shape == (rows, targets, sources)
    assert output.logits.isfinite().all()


def test_half_precision():
    model, tensors = small().bfloat16(), batch(SONGS, "lyric", "melody")
    output = run(model, tensors, "lyric", "melody")
    loss, _ = songmass_loss(output, tensors["target"])
    loss.backward()
    assert output.logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert loss.isfinite()
