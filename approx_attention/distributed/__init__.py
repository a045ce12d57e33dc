"""Attention over a sequence sharded across devices."""

from approx_attention.distributed.context_parallel import attention

__all__ = [
    "attention",
]
