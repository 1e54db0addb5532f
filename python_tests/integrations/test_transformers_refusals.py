"""SparseWindowCache with what it does not support: a reason, never wrong text."""

import types

import pytest
import torch
from tiny_models import GROUPED, VOCABULARY, cache_argument, generate, make, prompt, transformers

from tokcore.algorithms.alisa import dense, h2o
from tokcore.integrations.transformers import SparseWindowCache, enable


@pytest.fixture(scope="module")
def llama():
    model = make("llama")
    with enable(model):
        yield model


def new(model, **options):
    return SparseWindowCache(model.config, **(options or {"ratio": 0.4}))


# ---- the constructor ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({}, ValueError, "give one of ratio, budget and policy, got None, None"),
        ({"ratio": 0.2, "budget": 8}, ValueError, "give one of"),
        ({"ratio": 0.0}, ValueError, r"ratio must lie in \(0, 1\], got 0.0"),
        ({"ratio": -0.2}, ValueError, "ratio must lie in"),
        ({"ratio": 1.01}, ValueError, "ratio must lie in"),
        ({"ratio": [0.2]}, ValueError, "ratio must have one entry for each of 2 layers, got 1"),
        ({"policy": [dense()] * 3}, ValueError, "policy must have one entry for each of 2 layers"),
        ({"policy": "h2o"}, TypeError, "policy must be a Policy, got 'h2o'"),
        ({"ratio": 0.2, "window": 0}, ValueError, "window must be at least 1"),
        ({"ratio": 0.2, "dense_layers": 3}, ValueError, r"dense_layers must lie in \[0, 2\]"),
        ({"policy": h2o(4, 4), "evict": False}, ValueError, "evict must be True"),
        ({"ratio": 0.2, "offloading": True}, TypeError, "offloading"),
    ],
)
def test_bad_options(llama, options, error, text):
    with pytest.raises(error, match=text):
        new(llama, **options) if options else SparseWindowCache(llama.config)


def test_models_without_a_full_attention_layer():
    config = transformers.MistralConfig(**GROUPED, sliding_window=8)
    with pytest.raises(NotImplementedError, match="all layers of the model have sliding windows"):
        SparseWindowCache(config, ratio=0.2)


def test_models_with_other_kinds_of_layers():
    config = transformers.Qwen3NextConfig(**{**GROUPED, "num_hidden_layers": 4})
    with pytest.raises(NotImplementedError, match="got layers of linear_attention"):
        SparseWindowCache(config, ratio=0.2)


def test_encoder_decoder_models():
    config = transformers.BartConfig(d_model=16, encoder_layers=1, decoder_layers=1)
    with pytest.raises(NotImplementedError, match="encoder-decoder models are not supported"):
        SparseWindowCache(config, ratio=0.2)


# ---- enable -------------------------------------------------------------------------------------


def test_enable_wants_a_model_that_it_can_serve():
    with pytest.raises(TypeError, match="model must be a transformers PreTrainedModel, got Linear"):
        enable(torch.nn.Linear(2, 2))
    config = transformers.BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=11)
    bloom = transformers.BloomForCausalLM(config)
    with pytest.raises(NotImplementedError, match="BloomForCausalLM does not take its attention"):
        enable(bloom)


def test_a_cache_without_enable_is_noticed():
    model, ids = make("llama"), prompt(8)
    with pytest.raises(RuntimeError, match=r"call .*enable\(model\) first"):
        generate(model, ids, new(model))


def test_disable_puts_the_former_attention_back():
    model = make("llama")
    model.set_attn_implementation("eager")
    handle = enable(model)
    assert model.config._attn_implementation == "tokcore_sparse_window"
    handle.disable()
    assert model.config._attn_implementation == "eager"


# ---- models that need more than attention -------------------------------------------------------


def test_softcap_and_sinks_are_refused():
    gemma = transformers.Gemma2Config(
        **{**GROUPED, "num_hidden_layers": 2},
        head_dim=8,
        query_pre_attn_scalar=8,
        layer_types=["full_attention", "full_attention"],
    )
    gpt_oss = transformers.GptOssConfig(
        **GROUPED,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=["full_attention", "full_attention"],
    )
    for config, reason in ((gemma, "softcap"), (gpt_oss, "s_aux")):
        model = make(config, torch.float32)
        with enable(model), pytest.raises(NotImplementedError, match=f"needs {reason}, which"):
            generate(model, prompt(8), new(model))


def test_dropout_in_training_is_refused(llama):
    model = make("llama", attention_dropout=0.1).train()
    with enable(model), torch.no_grad():
        with pytest.raises(NotImplementedError, match=r"dropout .*0.1; call model.eval\(\)"):
            model(prompt(8), **{cache_argument(model): new(model)})
        model.eval()
        model(prompt(8), **{cache_argument(model): new(model)})


def test_gradients_are_refused(llama):
    with pytest.raises(NotImplementedError, match="no gradients pass through"):
        llama(prompt(8), **{cache_argument(llama): new(llama)})


def test_attention_weights_are_refused(llama):
    with pytest.raises((NotImplementedError, ValueError), match="output_attentions"):
        generate(llama, prompt(8), new(llama), output_attentions=True, return_dict_in_generate=True)


def test_a_mask_of_another_form_is_refused(llama):
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
    with torch.no_grad(), pytest.raises(NotImplementedError, match="must be a 2D causal padding"):
        llama(prompt(8), attention_mask=mask, **{cache_argument(llama): new(llama)})


# ---- generate's modes ---------------------------------------------------------------------------


def test_assisted_decoding_is_refused(llama):
    ids = prompt(8)
    for options in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": make("llama")}):
        # newer releases ask the cache before, older ones crop it
        reason = r"[Aa]ssisted decoding|cannot be taken back"
        with pytest.raises((NotImplementedError, ValueError), match=reason):
            generate(llama, ids, new(llama), eos_token_id=VOCABULARY - 1, **options)


def test_other_cache_implementations_beside_it_are_refused(llama):
    for name in ("static", "offloaded"):
        with pytest.raises(ValueError, match="cache_implementation"):
            generate(llama, prompt(8), new(llama), cache_implementation=name)
    cache = new(llama)
    with pytest.raises(NotImplementedError, match="offloading is not supported"):
        cache.offload(0)


def test_a_compiled_model_writes_the_same_or_says_why_not():
    """Without fullgraph the graph breaks at the cache; with it torch names the cache."""
    config = transformers.LlamaConfig(**{**GROUPED, "num_hidden_layers": 1})
    model, ids = make(config), prompt(12)
    argument = cache_argument(model)
    with enable(model), torch.no_grad():
        want = generate(model, ids, new(model), new=3)
        torch.compiler.reset()
        whole = torch.compile(model, backend="eager", fullgraph=True)
        with pytest.raises(Exception, match="SparseWindowCache runs outside of compiled graphs"):
            whole(ids, **{argument: new(model)})
        torch.compiler.reset()
        model.forward = torch.compile(model.forward, backend="eager")
        assert torch.equal(generate(model, ids, new(model), new=3), want)
        torch.compiler.reset()


def test_crop_is_refused(llama):
    cache = new(llama)
    generate(llama, prompt(8), cache)
    for number in (-4, cache.get_seq_length() - 4):  # minus the tokens; once, what stays
        with pytest.raises(NotImplementedError, match="4 tokens cannot be taken back"):
            cache.crop(number)
    cache.crop(0)
    cache.crop(cache.get_seq_length())
    assert not cache.layers[0].is_croppable
    assert not cache.is_compileable


# ---- tensors ------------------------------------------------------------------------------------


def test_another_batch_without_reset_is_refused(llama):
    argument, cache = cache_argument(llama), new(llama)
    with torch.no_grad():
        llama(prompt(8, batch=2), **{argument: cache})
        with pytest.raises(ValueError, match=r"key must be \(2, 2, Q, 8\)"):
            llama(prompt(1, batch=3), **{argument: cache})


def test_masks_that_do_not_fit_the_cache_are_refused(llama):
    argument, ids = cache_argument(llama), prompt(8, batch=2)
    for mask, text in (
        (torch.ones(2, 4), "attention_mask must have 12 columns, .* got 4"),
        (torch.tensor([[0] * 3 + [1] * 9, [1] * 12]), r"got \[5, 8\] of them where \[8, 8\]"),
    ):
        cache = new(llama)
        with torch.no_grad():
            llama(ids, **{argument: cache})
            with pytest.raises(ValueError, match=text):
                llama(ids[:, :4], attention_mask=mask, **{argument: cache})


def test_padding_may_stand_anywhere(llama):
    """On the right, or in the middle: the last real token's logits are those of the bare prompt."""
    argument, ids = cache_argument(llama), prompt(10)
    real = torch.tensor([[1, 1, 0, 1, 1, 0, 0, 1, 0, 0]])
    positions = (real.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        cache, bare = new(llama), new(llama)
        options = {"attention_mask": real, "position_ids": positions, argument: cache}
        got = llama(ids, **options).logits[:, 7]
        want = llama(ids[real == 1].unsqueeze(0), **{argument: bare}).logits[:, -1]
        torch.testing.assert_close(got, want)
        step = prompt(1, seed=2)
        mask = torch.cat([real, torch.ones(1, 1)], 1)
        options = {"attention_mask": mask, "position_ids": torch.tensor([[5]]), argument: cache}
        got = llama(step, **options).logits
        torch.testing.assert_close(got, llama(step, **{argument: bare}).logits)


def test_windows_longer_than_the_sequence_and_prompts_of_one_token(llama):
    for options in ({"ratio": 0.3, "window": 500}, {"ratio": 1e-9}, {"budget": 1000}):
        for length in (1, 2, 9):
            ids = prompt(length)
            got = generate(llama, ids, new(llama, **options), new=8)
            kept = generate(llama, ids, new(llama, evict=False, **options), new=8)
            assert torch.equal(got, kept)
    wide = generate(llama, prompt(9), new(llama, budget=1000), new=8)
    assert torch.equal(wide, generate(llama, prompt(9), new=8))


def test_a_model_that_changes_its_keys_after_the_cache_is_refused(llama):
    """The mark on the keys is lost, and with it the way to the cache."""
    attention = llama.model.layers[1].self_attn
    interface = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["tokcore_sparse_window"]
    cache = new(llama)
    key = torch.zeros(1, 2, 3, 8)
    cache.update(key, key, 1)
    with pytest.raises(NotImplementedError, match="layer 1 of the model changes its keys"):
        interface(attention, torch.zeros(1, 4, 3, 8), key + 1, key, None, scaling=1.0)


def test_heads_of_two_sizes_are_refused():
    module = types.SimpleNamespace(layer_idx=0)
    interface = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["tokcore_sparse_window"]
    cache = SparseWindowCache(transformers.LlamaConfig(**GROUPED), ratio=0.5)
    key, value = cache.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 4), 0)
    with torch.no_grad(), pytest.raises(ValueError, match="value must have the shape of key"):
        interface(module, torch.zeros(1, 4, 3, 8), key, value, None, scaling=1.0)
