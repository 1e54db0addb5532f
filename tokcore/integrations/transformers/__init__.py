"""Sparse window attention under transformers' generate: a cache, and the attention that it needs.

    enable(model)
    cache = SparseWindowCache(model.config, ratio=0.2)
    model.generate(**inputs, past_key_values=cache)

Works with transformers 5.4 to 5.24.
"""

from tokcore.integrations.transformers.attention import enable
from tokcore.integrations.transformers.cache import SparseWindowCache, SparseWindowLayer

__all__ = ["SparseWindowCache", "SparseWindowLayer", "enable"]
