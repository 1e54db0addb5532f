"""Fused token-level operators for language models, and the published algorithms built on them."""

from tokcore import ops
from tokcore._library import build_info

__version__ = "0.1.0"

__all__ = ["__version__", "build_info", "ops"]
