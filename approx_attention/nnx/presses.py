"""Compression of a model's caches after the prompt, to decode from fewer tokens."""

import functools
import math
import re
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from approx_attention.core import check_count, check_key, shown
from approx_attention.coresets import Algorithm
from approx_attention.decoding import AttentionMatching
from approx_attention.nnx.attention import ApproxAttention
from approx_attention.nnx.models import approximate_layers, over_stack, restored_on_error, stack_axes

Budget = int | Sequence[int | Sequence[int]]


def compress_caches(
    model: nnx.Module,
    key: Array,
    *,
    budget: Budget | None = None,
    num_bytes: int | None = None,
    policy: str | Algorithm | AttentionMatching = "guarded",
    queries_of: Sequence[nnx.Module] = (),
    coreset_size: int = 256,
    sinks: int = 4,
    mass_correction: bool | Literal["fitted"] = True,
    bits: int | None = None,
) -> int:
    """Compress the caches of all attention layers of a model in place; calls continue from the compressed caches.

    Call `init_cache` and then the model on the prompt first, with layers of exact attention. The last one or two blocks
    of a cache stay exact (``init_cache(block_size=)``). Later tokens are folded into a coreset when they leave these
    blocks. A `functools.partial` of this function is a press: ``press(model, key)``.

    Args:
        model: a model whose layers, or stacks of layers, have caches.
        key: typed PRNG key.
        budget: number of tokens of every head for everything older than the exact blocks: one number, one per layer, or
            one per key head of each layer, in the order of paths (``layer_2`` before ``layer_10``), with stacked layers
            counted separately. If heads or stacked layers differ, the policy must support ``size``, and the memory of
            all is that of the largest.
        num_bytes: total bytes of the compressed tokens of one sequence in all layers, shared equally by all heads,
            instead of ``budget``.
        policy: as in `compress_tokens`.
        queries_of: models whose recent queries the policy uses, by default this one. For example copies of the model
            that have read parts of the context again, the second pass of ``"kvzip"``. They need caches with
            ``init_cache(keep_queries=)``.
        coreset_size: number of tokens of the coreset of later tokens.
        sinks: the number of initial tokens that are kept exactly.
        mass_correction: as in `compress_tokens`.
        bits: 8 or 4 bits per channel of the compressed tokens.

    Returns:
        The total number of bytes of all caches.

    Raises:
        TypeError: the caches do not contain unchanged tokens, or the budget has another type.
        ValueError: there are no caches, the number of budgets is not that of layers or heads, or as in
            `compress_cache`. The caches are then unchanged.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from approx_attention.nnx import compress_caches, init_cache, replace_attention
        >>> model = nnx.MultiHeadAttention(num_heads=4, in_features=32, decode=False, rngs=nnx.Rngs(0))
        >>> _ = replace_attention(model, "exact", is_causal=True)
        >>> before = init_cache(model, 2, max_length=128, block_size=16, keep_queries=16)
        >>> x = jax.random.normal(jax.random.key(0), (2, 100, 32))
        >>> prompt = model(x)
        >>> after = compress_caches(model, jax.random.key(1), budget=32, policy="snapkv", coreset_size=16)
        >>> model(x[:, :1]).shape, 2 * after < before
        ((2, 1, 32), True)

    Reference:
        As in `compress_tokens`.
    """
    key = check_key("compress_caches", key)
    layers = dict(sorted(approximate_layers(model).items(), key=_by_number))
    reading = [approximate_layers(other) for other in queries_of]
    stacks = {path: stack_axes(layer, path) or () for path, layer in layers.items()}
    for other in reading:
        if other.keys() != layers.keys():
            raise ValueError(f"queries_of must have the layers of the model, {list(layers)}, got {list(other)}")
    heads = [layer.num_kv_heads for path, layer in layers.items() for _ in range(math.prod(stacks[path]))]
    options: dict[str, Any] = {"policy": policy, "coreset_size": coreset_size, "sinks": sinks, "bits": bits}
    options |= {"mass_correction": mass_correction}
    if num_bytes is not None:
        num_bytes = check_count("num_bytes", num_bytes, most=None) // sum(heads)
    tokens = None if budget is None else _of_every_head(budget, heads)
    with restored_on_error(layers.values()):
        for index, (path, layer) in enumerate(layers.items()):
            stack, count = stacks[path], math.prod(stacks[path])
            given, sizes = {"budget": None, "num_bytes": num_bytes}, None
            if tokens is not None:
                own, tokens = np.stack(tokens[:count]).reshape(*stack, -1), tokens[count:]
                given["budget"] = int(own.max())
                sizes = None if (own == own.max()).all() else own
            kept = [over_stack(ApproxAttention.last_queries, stack)(other[path].attention_fn) for other in reading]
            if any(x is None for x in kept):
                raise ValueError("the models of queries_of have no queries: use init_cache(keep_queries=)")
            queries = jnp.concatenate(kept, axis=len(stack) + 1) if kept else None
            keys = jax.random.split(jax.random.fold_in(key, index), stack)
            over_stack(functools.partial(_compress, options | given), stack)(layer.attention_fn, keys, sizes, queries)
    return sum(layer.attention_fn.cache_bytes for layer in layers.values())


def _by_number(layer: tuple[str, Any]) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", layer[0])]


def _compress(options: dict[str, Any], attention_fn: ApproxAttention, key: Array, sizes: Any, queries: Any) -> None:
    attention_fn.compress_cache(key, sizes=sizes, queries=queries, **options)


def _of_every_head(budget: Budget, heads: list[int]) -> list[np.ndarray]:
    """The budgets of each layer's key heads; ``heads`` are their numbers per layer."""
    of_layers = list(budget) if isinstance(budget, Sequence | np.ndarray) else [budget] * len(heads)
    if len(of_layers) != len(heads):
        raise ValueError(f"budget must be a number or one for each of {len(heads)} layers, got {shown(budget)}")
    made = []
    for of_layer, count in zip(of_layers, heads, strict=True):
        of_heads = list(of_layer) if isinstance(of_layer, Sequence | np.ndarray) else [of_layer] * count
        if len(of_heads) != count:
            raise ValueError(
                f"the budget of a layer must be a number or one for each of {count} heads, got {shown(of_layer)}"
            )
        made.append(np.asarray([check_count("budget", one) for one in of_heads], np.int32))
    return made
