"""The attention and mask functions that transformers calls, and what switches them on."""

from functools import partial

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from tokcore.integrations.transformers.cache import marked_layer, outside_of_graphs
from tokcore.integrations.transformers.padding import Padding

NAME = "tokcore_sparse_window"
PADDING = "_tokcore_padding"


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
    setattr(columns, PADDING, Padding(attention_mask, kv_length + kv_offset, build))
    return columns


@outside_of_graphs
def _attention(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs
) -> tuple[Tensor, None]:
    """The attention function: the cache's where `update` marked the key, else SDPA."""
    padding = getattr(attention_mask, PADDING, None)
    layer = marked_layer(key, getattr(module, "layer_idx", None))
    if layer is None:
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
