"""Sparse window attention under transformers' generate: a cache, and the attention that it needs.

    enable(model)
    cache = SparseWindowCache(model.config, ratio=0.2)
    model.generate(**inputs, past_key_values=cache)

Works with transformers 5.6 to 5.24. transformers never hands the cache to the attention function,
so `update` marks the keys that it returns, and the attention function finds its layer by that mark.
"""

import threading
import weakref
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from tokcore.algorithms.alisa import LayerState, Policy, alisa, dense

NAME = "tokcore_sparse_window"
_MARK = "_tokcore_layer"
_PADDING = "_tokcore_padding"
_last_update = threading.local()

outside_of_graphs = partial(
    torch.compiler.disable, reason="SparseWindowCache runs outside of compiled graphs"
)


class SparseWindowCache(Cache):
    """A KV cache of which each decode step reads a part, chosen anew from the last steps' weights.

    Pass it as `past_key_values` (newer transformers: `cache`) to `generate` or to the model, after
    `enable(model)`. What no later step can choose is dropped. The sliding-window layers of a mixed
    model stay as they are.

    Args:
        config: the model's.
        ratio: share of the tokens that a step reads, in (0, 1], or one for each layer; or
        budget: a number of tokens; or
        policy: what `tokcore.algorithms.alisa` makes (`h2o`, `streaming_llm`, ...), or one for each
            layer. The next five arguments are then the policy's.
        window, sinks, local_fraction, reselect_every: as of `alisa`. window=None is the paper's,
            which grows with the sequence and keeps the whole prompt for a long time.
        dense_layers: the first so many layers read everything.
        evict: False keeps every token: decode steps read the same, a further turn reads all.
        int8: keep keys and values as INT8.
        shared: one list of tokens for all heads (the paper's), else one for each KV head.

    Raises:
        TypeError, ValueError: an argument of a wrong type or value.
        NotImplementedError: a model that cannot be served; the text says why.
    """

    def __init__(
        self,
        config,
        *,
        ratio: float | Sequence[float] | None = None,
        budget: int | None = None,
        policy: Policy | Sequence[Policy] | None = None,
        window: int | None = 64,
        sinks: int = 0,
        local_fraction: float = 0.5,
        reselect_every: int = 1,
        dense_layers: int = 0,
        evict: bool = True,
        int8: bool = False,
        shared: bool = True,
    ):
        config = config.get_text_config(decoder=True)
        if config.is_encoder_decoder:
            raise NotImplementedError("SparseWindowCache: encoder-decoder models are not supported")
        layers = DynamicCache(config=config).layers
        if (policy is not None) + (ratio is not None) + (budget is not None) != 1:
            raise ValueError(
                f"SparseWindowCache: give one of ratio, budget and policy, got {ratio}, {budget} "
                f"and {policy}"
            )
        if not 0 <= dense_layers <= len(layers):
            raise ValueError(
                f"SparseWindowCache: dense_layers must lie in [0, {len(layers)}], got "
                f"{dense_layers}"
            )
        if policy is None:
            make = partial(
                alisa,
                budget=budget,
                window=window,
                sinks=sinks,
                local_fraction=local_fraction,
                reselect_every=reselect_every,
            )
            ratios = _for_each("ratio", ratio, config.num_hidden_layers)
            policies = [make(one) for one in ratios]
        else:
            policies = _for_each("policy", policy, config.num_hidden_layers)
            for one in policies:
                if not isinstance(one, Policy):
                    raise TypeError(f"SparseWindowCache: policy must be a Policy, got {one!r}")
        policies[:dense_layers] = [dense()] * dense_layers
        if len(layers) != len(policies):
            raise NotImplementedError(
                f"SparseWindowCache: layers that share keys and values are not supported, got "
                f"{len(layers)} caches for {len(policies)} layers"
            )
        for i, layer in enumerate(layers):
            if type(layer) is DynamicLayer:
                layers[i] = SparseWindowLayer(
                    i, LayerState(policies[i], shared=shared, evict=evict, int8=int8)
                )
            elif type(layer) is not DynamicSlidingWindowLayer:
                raise NotImplementedError(
                    f"SparseWindowCache: layer {i} needs a {type(layer).__name__}, only full and "
                    "sliding-window attention are supported"
                )
        if not any(isinstance(layer, SparseWindowLayer) for layer in layers):
            raise NotImplementedError(
                "SparseWindowCache: all layers of the model have sliding windows, none is full"
            )
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes of the layers that select, scores included."""
        layers = (x for x in self.layers if isinstance(x, SparseWindowLayer))
        return sum(layer.state.nbytes for layer in layers)


def _for_each(name: str, value, layers: int) -> list:
    if isinstance(value, (list, tuple)):
        if len(value) != layers:
            raise ValueError(
                f"SparseWindowCache: {name} must have one entry for each of {layers} layers, got "
                f"{len(value)}"
            )
        return list(value)
    return [value] * layers


class SparseWindowLayer(CacheLayerMixin):
    """The cache of one layer. Lengths are logical: all tokens ever seen, padding counted."""

    is_sliding = False
    is_compileable = False
    is_croppable = False  # scores and evictions cannot be taken back: no assisted decoding

    def __init__(self, layer_idx: int, state: LayerState):
        super().__init__()
        self.layer_idx = layer_idx
        self.state = state
        self.pending: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    @outside_of_graphs
    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Takes new keys and values; the attention function knows the padding and stores them."""
        if self.pending is not None:
            raise RuntimeError(
                f"SparseWindowCache: layer {self.layer_idx} got new keys before the attention to "
                "the last ones; call tokcore.integrations.transformers.enable(model) first, and "
                "use a new cache after an error"
            )
        self.lazy_initialization(key_states, value_states)
        self.pending = key_states, value_states
        marked = key_states.view_as(key_states)  # the mark must not stay on the caller's tensor
        setattr(marked, _MARK, self)
        _last_update.layer = weakref.ref(self)
        return marked, value_states

    def attend(self, query: Tensor, scale: float | None, padding: "_Padding | None") -> Tensor:
        (key, value), self.pending = self.pending, None
        valid = order = None
        if padding is not None and padding.mask is not None:
            valid, order = padding.of_last(query.shape[2], self.state.length)
        if order is None:
            return self.state.attend(query, key, value, valid=valid, scale=scale)
        query, key, value = (_along(order, x) for x in (query, key, value))
        output = self.state.attend(query, key, value, valid=valid, scale=scale)
        return _along(order.argsort(1), output)

    def get_seq_length(self) -> int:
        return self.state.seen + (0 if self.pending is None else self.pending[0].shape[2])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:  # its name before transformers 5.13
        return -1

    def reset(self) -> None:
        self.state.reset()
        self.pending = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.state.select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.state.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.state.repeat_rows(repeats)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(
                f"SparseWindowCache: crop takes minus the tokens to remove, got {tokens_to_remove}"
            )
        self.state.crop(-tokens_to_remove)

    def activate_past_recording(self) -> None:
        raise NotImplementedError(
            "SparseWindowCache: assisted decoding is not supported, the weights of rejected tokens "
            "cannot be taken out of the scores"
        )

    def offload(self) -> None:
        raise NotImplementedError("SparseWindowCache: offloading is not supported")

    prefetch = offload


def _along(order: Tensor, x: Tensor) -> Tensor:
    """x (B, H, Q, D) with the tokens of each sequence in the order (B, Q)."""
    return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


class _Padding:
    """The 2D attention mask of one forward pass, and how to make transformers' own mask of it."""

    def __init__(self, mask: Tensor | None, columns: int, build):
        self.mask, self.columns, self.build = mask, columns, build
        self._of_last: tuple[Tensor | None, Tensor | None] | None = None
        self._stock: tuple[Tensor | None] | None = None

    def of_last(self, tokens: int, length: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """How many of the last tokens are real, (B,), and their order (B, Q) with padding first.

        None where all are, and where the order is that already. Found once for all layers.
        """
        if self._of_last is None:
            self._of_last = self._find(tokens, length)
        return self._of_last

    def _find(self, tokens: int, length: Tensor | None):
        if self.mask.shape[1] != self.columns:
            raise ValueError(
                f"SparseWindowCache: attention_mask must have {self.columns} columns, those of the "
                f"cache and the new ones, got {self.mask.shape[1]}"
            )
        before, chunk = self.mask.split([self.columns - tokens, tokens], 1)
        if tokens > 1 and length is not None:  # not of each decode step: it waits for the device
            real = before.sum(1, dtype=torch.int32)
            if not torch.equal(real, length):
                raise ValueError(
                    "SparseWindowCache: attention_mask must keep its values for the tokens in the "
                    f"cache, got {real.tolist()} of them where {length.tolist()} are kept"
                )
        if bool(chunk.all()):
            return None, None
        valid = chunk.sum(1, dtype=torch.int32)
        if bool((chunk[:, 1:] >= chunk[:, :-1]).all()):
            return valid, None
        return valid, chunk.long().argsort(dim=1, stable=True)

    def stock(self) -> Tensor | None:
        if self._stock is None:
            self._stock = (self.build(),)
        return self._stock[0]


@outside_of_graphs
def _mask(
    *, kv_length, kv_offset=0, mask_function=causal_mask_function, attention_mask=None, **rest
):
    """The mask function: plain causal masks stay 2D, the others are transformers' own."""
    build = partial(
        sdpa_mask,
        kv_length=kv_length,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **rest,
    )
    if mask_function is not causal_mask_function:
        return build()
    if attention_mask is None:
        shape = (rest["batch_size"], kv_length)
        columns = torch.ones(shape, dtype=torch.bool, device=rest["device"])
    else:
        columns = attention_mask.view_as(attention_mask)
    setattr(columns, _PADDING, _Padding(attention_mask, kv_length + kv_offset, build))
    return columns


@outside_of_graphs
def _attention(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs
) -> tuple[Tensor, None]:
    """The attention function: the cache's where `update` marked the key, else SDPA."""
    padding = getattr(attention_mask, _PADDING, None)
    layer = getattr(key, _MARK, None)
    if layer is None:
        _check_unmarked(module)
        mask = attention_mask if padding is None else padding.stock()
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if padding is None and attention_mask is not None:
        raise NotImplementedError(
            "SparseWindowCache: attention_mask must be a 2D causal padding mask, got "
            f"{tuple(attention_mask.shape)}"
        )
    for name in ("softcap", "s_aux", "position_bias", "sliding_window", "indices"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"SparseWindowCache: {type(module).__name__} needs {name}, which is not supported"
            )
    if kwargs.get("output_attentions"):
        raise NotImplementedError("SparseWindowCache: output_attentions=True is not supported")
    if dropout:
        raise NotImplementedError(
            f"SparseWindowCache: dropout is not supported, got {dropout}; call model.eval()"
        )
    if not (getattr(module, "is_causal", True) and kwargs.get("is_causal") in (None, True)):
        raise NotImplementedError(
            f"SparseWindowCache: {type(module).__name__} is not causal, which is not supported"
        )
    output = layer.attend(query, scaling, padding)
    return output.transpose(1, 2).contiguous(), None


def _check_unmarked(module) -> None:
    layer = getattr(_last_update, "layer", lambda: None)()
    waits = layer is not None and layer.pending is not None
    if waits and layer.layer_idx == getattr(module, "layer_idx", None):
        raise NotImplementedError(
            f"SparseWindowCache: {type(module).__name__} changes its keys after it has stored "
            "them, which is not supported"
        )


class enable:
    """Makes a model attend through its SparseWindowCache; without one it attends by SDPA as before.

    Takes effect at once. `enable(model).disable()` puts the former attention back, and so does the
    end of ``with enable(model):``.

    Raises:
        TypeError: not a transformers model.
        NotImplementedError: a model whose attention cannot be replaced.
    """

    def __init__(self, model):
        if not hasattr(model, "set_attn_implementation"):
            raise TypeError(
                f"enable: model must be a transformers PreTrainedModel, got {type(model).__name__}"
            )
        AttentionInterface.register(NAME, _attention)
        AttentionMaskInterface.register(NAME, _mask)
        self.model, self.former = model, model.config._attn_implementation
        if not model._can_set_attn_implementation():
            raise NotImplementedError(
                f"enable: {type(model).__name__} does not take its attention from transformers' "
                "AttentionInterface"
            )
        model.set_attn_implementation(NAME)

    def disable(self) -> None:
        self.model.set_attn_implementation(self.former)

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self.disable()
