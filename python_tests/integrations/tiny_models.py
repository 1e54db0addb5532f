"""Random models of each class that the cache serves, small enough for tests."""

import inspect
import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers")

VOCABULARY = 61
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GROUPED = {**COMMON, "intermediate_size": 32, "num_key_value_heads": 2}
SMALL = {"initializer_range": 0.4}


def _llama():
    return transformers.LlamaConfig(**GROUPED, **SMALL)


def _mistral():
    return transformers.MistralConfig(**GROUPED, **SMALL, sliding_window=None)


def _qwen2():
    return transformers.Qwen2Config(**GROUPED, **SMALL)


def _qwen3():
    return transformers.Qwen3Config(**GROUPED, **SMALL, head_dim=8)


def _opt():
    return transformers.OPTConfig(
        **COMMON, ffn_dim=32, word_embed_proj_dim=32, init_std=0.4, dropout=0.0
    )


def _gpt_neox():
    return transformers.GPTNeoXConfig(**COMMON, **SMALL, intermediate_size=32)


def _gpt2():
    common = {**COMMON, "n_positions": COMMON["max_position_embeddings"]}
    del common["max_position_embeddings"]
    return transformers.GPT2Config(**common, **SMALL, scale_attn_by_inverse_layer_idx=True)


def _mixed():
    """A full layer between two with a sliding window."""
    return transformers.Qwen2Config(
        **{**GROUPED, "num_hidden_layers": 3},
        **SMALL,
        use_sliding_window=True,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )


CONFIGS = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "opt": _opt,
    "gpt_neox": _gpt_neox,
    "gpt2": _gpt2,
    "mixed": _mixed,
}


def make(name, dtype=torch.float64, **changes):
    """float64: two ways to add up the same attention must not pick different tokens."""
    torch.manual_seed(0)
    config = CONFIGS[name]() if isinstance(name, str) else name
    for key, value in changes.items():
        setattr(config, key, value)
    return transformers.AutoModelForCausalLM.from_config(config).eval().to(dtype)


def prompt(length, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)


def cache_argument(model):
    """The name under which this release takes a cache."""
    names = inspect.signature(model.forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def generate(model, ids, cache=None, mask=None, new=24, **kwargs):
    if cache is not None:
        kwargs[cache_argument(model)] = cache
    mask = torch.ones_like(ids) if mask is None else mask
    kwargs = {"do_sample": False, "max_new_tokens": new, "pad_token_id": 0, **kwargs}
    with warnings.catch_warnings():
        # transformers warns about generation settings of models that have none
        warnings.simplefilter("ignore")
        return model.generate(ids, attention_mask=mask, **kwargs)
