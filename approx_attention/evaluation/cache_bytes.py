"""Bytes of what a method keeps in place of all keys and values."""

from collections.abc import Mapping
from typing import Any

from approx_attention.evaluation.files import Tensors
from approx_attention.registry import OPTIONS, bind


def token_bytes(tensors: Tensors) -> int:
    """Bytes per key head and sequence of all keys and values in float32."""
    _, key, value = tensors
    return key.shape[1] * (key.shape[-1] + value.shape[-1]) * 4


def held_bytes(tensors: Tensors, name: str, hyperparameters: Mapping[str, Any], *, is_causal: bool) -> int | None:
    """Bytes per key head and sequence of what a method holds in place of all keys and values, where it holds less.

    Args:
        tensors: arrays or their shapes.
        name: the method.
        hyperparameters: its arguments.
        is_causal: count the whole decoding cache where the method has one, and not just one summary of all keys.

    Returns:
        The bytes, or None where nothing can be held in the place of all keys: a method that asks every key, or makes
        what it answers from together with the queries.
    """
    _, key, value = tensors
    bound = bind(name, hyperparameters, options=OPTIONS)
    return bound.held_bytes(key.shape[1], key.shape[-1], value.shape[-1], key.dtype, is_causal=is_causal)
