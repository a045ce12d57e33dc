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
    """`bytes_of` a method by name; its hyper-parameters may include options of `attention`."""
    return bytes_of(bind(name, hyperparameters, options=OPTIONS), tensors, is_causal=is_causal)
