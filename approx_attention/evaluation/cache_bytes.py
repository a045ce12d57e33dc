"""Cache bytes of a method on given tensors."""

from collections.abc import Mapping
from typing import Any

from approx_attention.evaluation.files import Tensors
from approx_attention.registry import OPTIONS, BoundMethod, bind


def token_bytes(tensors: Tensors) -> int:
    """Bytes per key head and sequence of all keys and values in float32."""
    _, key, value = tensors
    return key.shape[1] * (key.shape[-1] + value.shape[-1]) * 4


def bytes_of(bound: BoundMethod, tensors: Tensors, *, is_causal: bool) -> int | None:
    """Cache bytes per key head and sequence of a method on tensors of these shapes (`BoundMethod.held_bytes`)."""
    _, key, value = tensors
    return bound.held_bytes(key.shape[1], key.shape[-1], value.shape[-1], key.dtype, is_causal=is_causal)


def held_bytes(tensors: Tensors, name: str, hyperparameters: Mapping[str, Any], *, is_causal: bool) -> int | None:
    """Count the cache bytes of a method per key head and sequence, on tensors of given shapes.

    Args:
        tensors: query, key and value ``[B, T, N, D]``, ``[B, S, K, D]`` and ``[B, S, K, Dv]``, or their shapes.
        name: a name in `METHODS`.
        hyperparameters: arguments of the method; they may include options of `attention`.
        is_causal: whether to count the decoding cache, as in `BoundMethod.held_bytes`.

    Returns:
        The bytes, or None if the method has no summary, as in `BoundMethod.held_bytes`.

    Raises:
        ValueError: the method is unknown.
        TypeError: the method has no such argument.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention.evaluation import Tensors, held_bytes
        >>> x = jnp.ones((1, 64, 2, 8))
        >>> held_bytes(Tensors(x, x, x), "mean_pool", {"num_landmarks": 4}, is_causal=False)  # 4 (8 + 8 + 1) numbers
        272
    """
    return bytes_of(bind(name, hyperparameters, options=OPTIONS), tensors, is_causal=is_causal)
