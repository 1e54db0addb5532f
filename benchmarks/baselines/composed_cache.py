"""A cache that drops tokens with torch alone, in the manner of kvpress' decoding presses.

Every `interval` steps a layer keeps the `target` tokens per KV head to which its last queries gave
most weight, and gathers them; between, it grows. Attention is SDPA.
"""

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

NAME = "composed_cache"


class ComposedLayer(DynamicLayer):
    def __init__(self, target, interval, queries):
        super().__init__()
        self.target, self.interval, self.queries = target, interval, queries
        self.last, self.seen, self.steps = None, 0, 0

    def update(self, key, value, *args, **kwargs):
        self.seen += key.shape[2]
        key, value = super().update(key, value, *args, **kwargs)
        key = key.view_as(key)
        key.composed = self
        return key, value

    def get_seq_length(self):
        return self.seen  # logical: positions go on from it

    def observe(self, query, scaling):
        """After attention: remembers the query, and drops tokens when it is time."""
        query = query[:, :, -self.queries :]
        self.last = query if self.last is None else torch.cat([self.last, query], 2)
        self.last = self.last[:, :, -self.queries :]
        self.steps += 1
        if self.steps % self.interval or self.keys.shape[2] <= self.target:
            return
        batch, heads, tokens, dim = self.keys.shape
        packed = self.last.reshape(batch, heads, -1, dim)
        weights = (packed @ self.keys.transpose(2, 3) * scaling).softmax(-1).mean(2)
        kept = weights.topk(self.target, dim=2).indices.sort(2).values
        kept = kept.unsqueeze(3).expand(-1, -1, -1, dim)
        self.keys, self.values = self.keys.gather(2, kept), self.values.gather(2, kept)


def _attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    output = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )
    key.composed.observe(query, scaling)
    return output


def composed_cache(model, target, interval=512, queries=64):
    """For `model`, which attends by SDPA and tells the cache its queries from now on."""
    AttentionInterface.register(NAME, _attention)
    model.set_attn_implementation(NAME)
    layers = model.config.num_hidden_layers
    return Cache(layers=[ComposedLayer(target, interval, queries) for _ in range(layers)])
