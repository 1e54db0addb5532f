"""The cache: a layer state for each attention layer, under transformers' names."""

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

from tokcore.algorithms.alisa import LayerState, Policy, alisa, dense
from tokcore.integrations.transformers.padding import Padding, along

SLIDING = "sliding_attention"
outside_of_graphs = partial(
    torch.compiler.disable, reason="SparseWindowCache runs outside of compiled graphs"
)

# transformers never hands the cache to the attention function: `update` puts this mark on the keys
# that it returns, by which the function finds the layer.
MARK = "_tokcore_layer"
_last_update = threading.local()


def marked_layer(key: Tensor, layer_idx: int | None) -> "SparseWindowLayer | None":
    """The layer that waits for the attention to these keys."""
    layer = getattr(key, MARK, None)
    last = getattr(_last_update, "layer", lambda: None)()
    if layer is None and last is not None and last.layer_idx == layer_idx:
        raise NotImplementedError(
            f"SparseWindowCache: layer {layer_idx} of the model changes its keys after it has "
            "stored them, which is not supported"
        )
    _last_update.layer = lambda: None
    return layer


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
        kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", SLIDING}
        if kinds:
            raise NotImplementedError(
                "SparseWindowCache: only full and sliding-window attention are supported, got "
                f"layers of {', '.join(sorted(kinds))}"
            )
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
        setattr(marked, MARK, self)
        _last_update.layer = weakref.ref(self)
        return marked, value_states

    def attend(self, query: Tensor, scale: float | None, padding: Padding | None) -> Tensor:
        (key, value), self.pending = self.pending, None
        if torch.is_autocast_enabled(key.device.type):  # as SDPA does by itself
            dtype = torch.get_autocast_dtype(key.device.type)
            query, key, value = (x.to(dtype) for x in (query, key, value))
        valid = order = None
        if padding is not None and padding.mask is not None:
            valid, order = padding.of_last(query.shape[2], self.state.length)
        if order is None:
            return self.state.attend(query, key, value, valid=valid, scale=scale)
        query, key, value = (along(order, x) for x in (query, key, value))
        output = self.state.attend(query, key, value, valid=valid, scale=scale)
        return along(order.argsort(1), output)

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
        """Takes minus the tokens to remove; of older releases, the length that stays."""
        if tokens_to_remove > 0:
            tokens_to_remove = min(0, tokens_to_remove - self.get_seq_length())
        self.state.crop(-tokens_to_remove)

    def activate_past_recording(self) -> None:
        raise NotImplementedError(
            "SparseWindowCache: assisted decoding is not supported, the weights of rejected tokens "
            "cannot be taken out of the scores"
        )

    def offload(self) -> None:
        raise NotImplementedError("SparseWindowCache: offloading is not supported")

    prefetch = offload
