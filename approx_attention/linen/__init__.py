"""Flax Linen: approximate attention in models, and capture of queries, keys and values."""

from approx_attention.linen.attention import ApproxAttention
from approx_attention.linen.capture import capture_attention

__all__ = [
    "ApproxAttention",
    "capture_attention",
]
