"""The tree of PTA-GRPO: one copy of a prefix gives what a copy for each continuation gives."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tokcore.algorithms.pta_grpo import (
    pack_tree,
    pta_grpo_loss,
    pta_grpo_loss_from_tokens,
    tree_logprob,
)
from tokcore.masking import pad_rows

V = 23
# Of each tree: tokens of the prompt, of the plan, of each continuation.
SHAPES = {
    "several trees": [(3, 4, (2, 5, 1)), (1, 2, (6, 1, 3)), (5, 1, (1, 1, 1))],
    "z of 1": [(2, 3, (4,)), (4, 2, (2,))],
    "unequal z": [(2, 3, (4, 2)), (1, 5, (3,)), (2, 1, (1, 2, 2, 1))],
    "no plan": [(3, 0, (2, 3))],
}
NAMES = sorted(SHAPES)


def draw(shapes, seed=0):
    """prompts, plans, continuations of random ids."""
    generator = torch.Generator().manual_seed(seed)
    ids = lambda n: torch.randint(1, V, (n,), generator=generator).tolist()  # noqa: E731
    trees = [(ids(p), ids(t), [ids(n) for n in several]) for p, t, several in shapes]
    return [list(parts) for parts in zip(*trees, strict=True)]


def naive_rows(prompts, plans, continuations):
    """A row for each response: ids padded with 0, which draw() leaves out, and labels."""
    rows, labels = [], []
    for prompt, plan, several in zip(prompts, plans, continuations, strict=True):
        for one in several:
            rows.append(torch.tensor(prompt + plan + one))
            labels.append(torch.tensor([-100] * len(prompt) + plan + one))
    return pad_rows(rows, 0), pad_rows(labels, -100)


def test_a_small_tree_by_hand():
    tree = pack_tree([[1, 2], [9]], [[3, 4], []], [[[5, 6, 7], [8, 9]], [[3, 2]]], pad_id=20)
    assert tree.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9], [9, 3, 2, *[20] * 6]]
    assert tree.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 4, 5], [0, 1, 2, *[0] * 6]]
    x = -100
    first = [[x, x], [3, x], [4, x], [5, 8], [6, x], [7, x], [x, x], [9, x], [x, x]]
    assert tree.target.tolist() == [first, [[3, x], [2, x], *[[x, x]] * 7]]
    # Responses 3 4 5 6 7, then 3 4 8 9, then 3 2: where their predictions are in (2, 9, 2).
    assert tree.index.tolist() == [[2, 4, 6, 8, 10], [2, 4, 7, 14, 0], [18, 20, 0, 0, 0]]
    assert tree.mask.sum(1).tolist() == [5, 4, 2]
    assert tree.attention_mask.shape == (2, 1, 9, 9)
    sees = ["".join(" x"[seen] for seen in row) for row in tree.attention_mask[0, 0].tolist()]
    prefix = ["x        ", "xx       ", "xxx      ", "xxxx     "]
    first, second = ["xxxxx    ", "xxxxxx   ", "xxxxxxx  "], ["xxxx   x ", "xxxx   xx"]
    assert sees == prefix + first + second
    assert not tree.attention_mask[1, 0, :3, 3:].any()  # nothing sees padding
    assert tree.attention_mask.any(-1).all()  # a softmax over nothing would be NaN
    assert (tree.tokens, tree.tokens_saved) == (12, 4)
    additive = tree.additive_mask(torch.float16)
    assert additive.dtype == torch.float16
    assert torch.equal(additive == 0, tree.attention_mask)
    assert additive.min() == torch.finfo(torch.float16).min


@pytest.mark.parametrize("name", NAMES)
def test_the_tree_counts_its_tokens(name):
    sequences = draw(SHAPES[name])
    tree, (ids, labels) = pack_tree(*sequences), naive_rows(*sequences)
    assert tree.tokens == (tree.input_ids != 0).sum()
    assert tree.tokens + tree.tokens_saved == (ids != 0).sum()
    assert torch.equal(tree.mask.sum(1), (labels != -100).sum(1))
    assert torch.equal(tree.target.flatten()[tree.index[tree.mask]], labels[labels != -100])


def test_tensors_pack_as_lists_do_and_move():
    prompts, plans, continuations = draw(SHAPES["several trees"])
    tree = pack_tree(prompts, plans, continuations)
    tensors = [[torch.tensor(one, dtype=torch.int32) for one in many] for many in (prompts, plans)]
    again = pack_tree(*tensors, [[torch.tensor(one) for one in many] for many in continuations])
    moved = again.to("meta")
    for field, same, far in zip(tree, again, moved, strict=True):
        if isinstance(field, torch.Tensor):
            assert torch.equal(field, same)
            assert far.device.type == "meta"
        else:
            assert field == same == far


# --- with the models of transformers --------------------------------------------------------------


def model_of(kind, attention="eager"):
    transformers = pytest.importorskip("transformers", reason="the extra [examples] is missing")
    torch.manual_seed(1)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=32
        )
    else:
        config = transformers.LlamaConfig(
            vocab_size=V,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
        )
    config._attn_implementation = attention
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # far from the uniform distribution of a fresh model
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


class Double(TorchFunctionMode):
    """float64 where Llama takes norms and softmaxes in float32 whatever the dtype of the model."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        wide = lambda value: torch.float64 if value is torch.float32 else value  # noqa: E731
        keywords = {key: wide(value) for key, value in (kwargs or {}).items()}
        return function(*map(wide, args), **keywords)


def logits_of(model, **inputs):
    with Double():
        return model(use_cache=False, **inputs).logits


def of_tree(model, tree, mask=None):
    mask = tree.additive_mask(torch.float64) if mask is None else mask
    inputs = {"input_ids": tree.input_ids, "position_ids": tree.position_ids}
    return tree_logprob(logits_of(model, attention_mask=mask, **inputs), tree)


def losses(model, sequences, seed=0, **options):
    """Loss and parameter gradients of the tree and of naive rows, off policy, A of both signs."""
    tree, (ids, labels) = pack_tree(*sequences), naive_rows(*sequences)
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=generator).double()  # noqa: E731
    advantages = randn(len(ids))
    with torch.no_grad():
        fresh = of_tree(model, tree)
    old = torch.where(tree.mask, fresh + 0.4 * randn(*fresh.shape), torch.nan)
    reference = torch.where(tree.mask, fresh + 0.2 * randn(*fresh.shape), torch.nan)
    kept = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))
    rows = {}
    for name, value in (("old_logprob", old), ("reference_logprob", reference)):
        rows[name] = torch.full(ids.shape, torch.nan, dtype=torch.float64)
        rows[name][kept] = value[tree.mask]

    results = []
    for shape in ("tree", "rows"):
        model.zero_grad()
        if shape == "tree":
            loss, metrics = pta_grpo_loss_from_tokens(
                of_tree(model, tree),
                tree.mask,
                advantages,
                old_logprob=old,
                reference_logprob=reference,
                **options,
            )
        else:
            logits = logits_of(model, input_ids=ids, attention_mask=ids != 0)
            loss, metrics = pta_grpo_loss(logits, labels, advantages, **rows, **options)
        loss.backward()
        gradients = {key: p.grad.clone() for key, p in model.named_parameters()}
        results.append((loss.detach(), metrics, gradients))
    return results


@pytest.mark.parametrize("aggregation", ["seq-mean-token-sum", "token-mean"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_tree_gives_the_loss_and_gradients_of_naive_rows(kind, name, aggregation):
    model = model_of(kind)
    options = {"aggregation": aggregation, "kl_coefficient": 0.05, "epsilon_high": 0.3}
    (loss, metrics, gradients), (naive, naive_metrics, naive_gradients) = losses(
        model, draw(SHAPES[name]), **options
    )
    torch.testing.assert_close(loss, naive, rtol=1e-12, atol=1e-12)
    assert metrics["clip_low"] + metrics["clip_high"] > 0
    for key, value in naive_metrics.items():
        torch.testing.assert_close(metrics[key], value, rtol=1e-12, atol=1e-12)
    assert any(gradient.abs().max() > 0.1 for gradient in naive_gradients.values())
    for key, gradient in naive_gradients.items():
        torch.testing.assert_close(gradients[key], gradient, rtol=1e-10, atol=1e-10, msg=key)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_sdpa_takes_the_bool_mask_and_the_additive_one(kind):
    sequences = draw(SHAPES["several trees"])
    tree = pack_tree(*sequences)
    with torch.no_grad():
        expected = of_tree(model_of(kind), tree)
        model = model_of(kind, "sdpa")
        for mask in (tree.attention_mask, tree.additive_mask(torch.float64)):
            torch.testing.assert_close(of_tree(model, tree, mask), expected, rtol=0, atol=1e-12)


def test_what_fills_up_rows_and_the_other_branches_do_not_matter():
    prompts, plans, continuations = draw(SHAPES["several trees"])
    model = model_of("llama")
    with torch.no_grad():
        logprob = of_tree(model, pack_tree(prompts, plans, continuations))
        filled = of_tree(model, pack_tree(prompts, plans, continuations, pad_id=7))
        torch.testing.assert_close(filled, logprob, rtol=0, atol=1e-13)
        continuations[0][1] = [1 + one % (V - 1) for one in continuations[0][1]]
        other = of_tree(model, pack_tree(prompts, plans, continuations))
    unchanged = [n for n in range(len(logprob)) if n != 1]
    torch.testing.assert_close(other[unchanged], logprob[unchanged], rtol=0, atol=1e-13)
    plan = len(plans[0])
    torch.testing.assert_close(other[1, :plan], logprob[1, :plan], rtol=0, atol=1e-13)
    assert (other[1, plan:] - logprob[1, plan:]).abs().max() > 1e-3


# --- the loss over a tree -------------------------------------------------------------------------


def test_a_plan_token_gets_the_sum_of_its_clipped_terms():
    """Advantages 3 and -1 at the ratio 1.5: clipping cuts the first alone, and -(-1) 1.5 is left;
    one clip of the summed advantages, 2, would leave no gradient.
    """
    tree = pack_tree([[1]], [[2]], [[[3], [4]]])
    logits = torch.zeros(1, 4, 8, dtype=torch.float64, requires_grad=True)
    logprob = tree_logprob(logits, tree)
    old = logprob.detach().clone()
    old[:, 0] -= torch.log(torch.tensor(1.5))
    advantages = torch.tensor([3.0, -1.0]).double()
    loss, _ = pta_grpo_loss_from_tokens(logprob, tree.mask, advantages, old_logprob=old)
    (gradient,) = torch.autograd.grad(loss, logprob, retain_graph=True)
    torch.testing.assert_close(gradient[:, 0], torch.tensor([0.0, 1.5 / 2]).double())
    (gradient,) = torch.autograd.grad(loss, logits)
    onehot = torch.nn.functional.one_hot(torch.tensor(2), 8) - 1 / 8
    torch.testing.assert_close(gradient[0, 0], 1.5 / 2 * onehot.double())


def test_positions_that_predict_nothing_are_not_read():
    sequences = draw(SHAPES["several trees"])
    tree = pack_tree(*sequences)
    unused = (tree.target == -100).all(-1)
    assert unused.any()
    torch.manual_seed(0)
    logits = torch.randn(*tree.input_ids.shape, V, dtype=torch.float64)
    expected = tree_logprob(logits, tree)
    assert (expected[~tree.mask] == 0).all()
    poisoned = torch.where(unused.unsqueeze(-1), torch.nan, logits).requires_grad_()
    logprob = tree_logprob(poisoned, tree)
    assert torch.equal(logprob, expected)
    (gradient,) = torch.autograd.grad(logprob.sum(), poisoned)
    assert (gradient[unused] == 0).all()
    assert gradient.isfinite().all()


def test_temperature_and_inplace_backward_are_those_of_token_logprob():
    tree = pack_tree(*draw(SHAPES["unequal z"]))
    torch.manual_seed(0)
    weight = torch.randn(*tree.input_ids.shape, V, dtype=torch.float64, requires_grad=True)
    gradients = []
    for inplace in (False, True):
        logits = weight * 1.0
        logprob = tree_logprob(logits, tree, temperature=0.7, inplace_backward=inplace)
        gradients.append(torch.autograd.grad(logprob.square().sum(), weight)[0])
        assert torch.equal(logits.detach(), weight.detach()) != inplace
    assert torch.equal(*gradients)
    colder = tree_logprob(weight / 0.7, tree)
    torch.testing.assert_close(logprob, colder, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": [[1]]}, "of one number, positive, got 1, 2 and 2"),
        ({"prompts": [], "plans": [], "continuations": []}, "positive, got 0, 0 and 0"),
        ({"prompts": [[1], []]}, r"prompts\[1\] must hold one token at least, got none"),
        ({"continuations": [[[1]], []]}, r"continuations\[1\] must be one at least, got none"),
        ({"continuations": [[[1]], [[1], []]]}, r"continuations\[1\]\[1\] must hold one token"),
    ],
)
def test_pack_tree_names_the_error(change, message):
    arguments = {"prompts": [[1], [2]], "plans": [[3], []], "continuations": [[[1]], [[2], [3]]]}
    pack_tree(**arguments)
    with pytest.raises(ValueError, match=f"pack_tree: .*{message}"):
        pack_tree(**(arguments | change))


def test_tree_logprob_names_the_error():
    tree = pack_tree([[1]], [[2]], [[[3]]])
    with pytest.raises(ValueError, match=r"tree_logprob: logits must .* \(1, 3\), got \(1, 4, 8\)"):
        tree_logprob(torch.zeros(1, 4, 8), tree)
