"""A call of each operator on a sparse key-value cache: small, valid, and the same each time."""

import torch
from kv_states import State, filled, int32, new_state

from tokcore.ops import kv_append, kv_compact, window_scores_update, window_select

B, HEADS, C, D, R, Q, M = 2, 2, 9, 4, 3, 2, 5
IN_PLACE = ["window_scores_update", "kv_append", "kv_compact"]
FUNCTIONS = {f.__name__: f for f in (window_scores_update, window_select, kv_append, kv_compact)}


def state_of(device="cpu", *, lists=1, quantized=False, batch=B, slots=C) -> State:
    groups = 2 if quantized else 0
    state = filled(new_state(batch, lists, HEADS, slots, D, R, groups=groups))
    state.count.clamp_(max=max(0, slots - Q))
    return state.to(device)


def arguments(name, state, *, listed=True):
    """Of the native operator, by name and in its order."""
    batch, lists, slots = state.position.shape
    device = state.key.device
    generator = torch.Generator().manual_seed(1)

    def rows(*values):
        return int32(values[:batch], device)

    def tokens():
        dtype = torch.float32 if state.key_quantization is not None else state.key.dtype
        return torch.randn(batch, HEADS, Q, D, generator=generator).to(device, dtype)

    if name == "window_select":
        return {
            "score": state.score,
            "count": state.count,
            "local": rows(2, 0),
            "top": rows(1, 3),
            "size": M,
            "sinks": 1,
        }
    stored = {"key": state.key, "value": state.value, "position": state.position}
    if name == "kv_append":
        return {
            **stored,
            "last_selected": state.last_selected,
            "count": state.count,
            "new_key": tokens(),
            "new_value": tokens(),
            "length": rows(1000, 1500),
            "valid": rows(2, 1),
            **state.quantization,
        }
    if name == "kv_compact":
        return {
            **stored,
            "score": state.score,
            "ring": state.ring,
            "last_selected": state.last_selected,
            "count": state.count,
            "since": rows(4, 6),
            "local": rows(1, 2),
            "sinks": 1,
            **state.quantization,
        }
    size = M if listed and slots >= M else slots
    weights = torch.rand(batch, lists, Q, size, generator=generator).to(device)
    index = torch.arange(size, dtype=torch.int32, device=device).expand(batch, lists, -1)
    return {
        "score": state.score,
        "ring": state.ring,
        "last_selected": state.last_selected,
        "oldest": state.oldest,
        "rows": weights,
        "index": index.contiguous() if listed else None,
        "count": state.count.clamp(max=size),
        "step": rows(4, 7),
        "window": rows(3, 2),
    }


def public(name, given):
    """A call of the function, whose options have names."""
    options = ("size", "sinks", "key_quantization", "value_quantization")
    named = {key: value for key, value in given.items() if key in options}
    return FUNCTIONS[name](*(v for k, v in given.items() if k not in options), **named)
