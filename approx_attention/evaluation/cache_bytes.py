"""Bytes of what a method keeps in place of all keys and values."""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import jax
from jax import Array

from approx_attention.core import summary_bytes
from approx_attention.decoding import Decoder
from approx_attention.evaluation.files import Tensors
from approx_attention.registry import accepted, get_method


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
    method = get_method(name)
    key, value = (jax.ShapeDtypeStruct((x.shape[1], x.shape[-1]), x.dtype) for x in tensors[1:])
    rng = jax.eval_shape(lambda: jax.random.key(0))
    arguments = inspect.signature(method.function).parameters
    if is_causal and method.running is not None and method.block in arguments:
        make_running = method.running
        block_size = hyperparameters.get(method.block, arguments[method.block].default)
        own = accepted(make_running, {"max_length": key.shape[0], **hyperparameters})

        def cache(rng: Array) -> Any:
            running = make_running(key.shape[-1], rng, **own)
            decoder = Decoder(running=running, head_dim=key.shape[-1], value_dim=value.shape[-1], block_size=block_size)
            past, current, _ = decoder.init()
            return past.before[:2], current[:2], running.read(past.prefix)

        return summary_bytes(jax.eval_shape(cache, rng))
    if method.summarize is not None:
        summarize = functools.partial(method.summarize, **accepted(method.summarize, hyperparameters))
        return summary_bytes(jax.eval_shape(summarize, key, value, rng))
    # A window is no summary of all keys, but its tokens are all that it needs.
    if method.size != "window_size" or method.size not in hyperparameters:
        return None
    size = hyperparameters[method.size]
    window = size if is_causal else 2 * size - 1
    num_global = arguments["num_global"].default if "num_global" in arguments else 0
    tokens = min(window + hyperparameters.get("num_global", num_global), key.shape[0])
    return tokens * (key.shape[-1] + value.shape[-1]) * 4
