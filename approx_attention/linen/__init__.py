"""Attention for Flax linen."""

from approx_attention.linen.attention import ApproxAttention

__all__ = [
    "ApproxAttention",
]
