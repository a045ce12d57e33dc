"""Decoding: tokens per second and bytes of cache of a small language model, by the length of its prompt."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from rich.console import Console

from approx_attention import METHODS, attention
from approx_attention.evaluation import environment, time_interleaved
from approx_attention.nnx import init_cache
from benchmarks.exact import peak_flops
from experiments.models import AttentionConfig, LanguageModel, ModelConfig, attention_layers

MODEL = ModelConfig(num_layers=2, model_dim=256, num_heads=8, num_kv_heads=2, head_dim=64, hidden_dim=512)
STEPS, VOCABULARY, SIZE = 64, 256, 256
PLAIN = ("blocked", "dense", "jax.nn")


@nnx.jit
def read_prompt(model: LanguageModel, prompt: Array) -> Array:
    """Logits ``[B, P, vocabulary]`` of a prompt, which is in the model's caches from then on."""
    return model(prompt)


@functools.partial(nnx.jit, static_argnames="steps")
def continue_tokens(model: LanguageModel, logits: Array, steps: int) -> Array:
    """The likeliest tokens ``[B, steps]`` after those in the caches, whose last logits these are; the caches stay."""
    graph, state = nnx.split(model)

    def step(carry: tuple[Any, Array], _: None) -> tuple[tuple[Any, Array], Array]:
        state, logits = carry
        token = logits.argmax(-1)
        model = nnx.merge(graph, state)
        logits = model(token[:, None])[:, 0]
        return (nnx.state(model), logits), token

    _, tokens = jax.lax.scan(step, (state, logits), length=steps)
    return tokens.T


class PlainCache(nnx.Module):
    """Exact attention over a preallocated array of all keys: the usual cache, one token at a time."""

    def __init__(self, implementation: str, key: Array, value: Array):
        self.implementation = implementation
        self.key, self.value = nnx.Cache(key), nnx.Cache(value)
        self.seen = nnx.Cache(jnp.array(key.shape[1] - STEPS, jnp.int32))

    @property
    def num_seen(self) -> Array:
        """The number of tokens in the cache."""
        return self.seen[...]

    def __call__(self, query: Array, key: Array, value: Array, **_: None) -> Array:
        """The output for one more token."""
        seen = self.seen[...]
        self.key[...] = jax.lax.dynamic_update_slice_in_dim(self.key[...], key, seen, 1)
        self.value[...] = jax.lax.dynamic_update_slice_in_dim(self.value[...], value, seen, 1)
        self.seen[...] = seen + 1
        lengths = jnp.broadcast_to(seen + 1, (query.shape[0],))
        tensors = query, self.key[...], self.value[...]
        if self.implementation == "jax.nn":
            return jax.nn.dot_product_attention(*tensors, key_value_seq_lengths=lengths)
        options: dict[str, Any] = {"implementation": self.implementation}
        return attention(*tensors, method="exact", key_value_seq_lengths=lengths, **options)


def _plain(implementation: str, length: int) -> tuple[LanguageModel, int]:
    """A model with a plain cache of random tokens, and the bytes of its caches."""
    model = LanguageModel(MODEL, AttentionConfig(), vocabulary=VOCABULARY, rngs=nnx.Rngs(0))
    shape = 1, length + STEPS, MODEL.num_kv_heads, MODEL.head_dim
    for number, layer in enumerate(attention_layers(model).values()):
        key, value = jax.random.normal(jax.random.key(number), (2, *shape))
        layer.attention_fn = nnx.data(PlainCache(implementation, key, value))
    return model, 2 * 4 * MODEL.num_layers * key.size


def _cached(method: str, length: int, prompt: Array) -> tuple[LanguageModel, int]:
    """A model that has read the prompt into the caches of a method, and the bytes of the caches."""
    size = METHODS[method].size
    # Slots per block and whole caches grow with the sequence; the other caches have a fixed size.
    settings = {size: SIZE} if size and method != "block_linformer" else {}
    model = LanguageModel(MODEL, AttentionConfig(method, settings), vocabulary=VOCABULARY, rngs=nnx.Rngs(0))
    num_bytes = init_cache(model, 1, max_length=length + STEPS)
    read_prompt(model, prompt)
    return model, num_bytes


def calls(length: int, methods: Sequence[str]) -> tuple[dict[str, Callable[[], Any]], dict[str, int]]:
    """Calls that continue a prompt, with plain caches and with methods, and their cache bytes."""
    prompt = jax.random.randint(jax.random.key(1), (1, length), 0, VOCABULARY)
    makers: dict[str, Callable[[], tuple[LanguageModel, int]]] = {
        **{f"exact, {name}": functools.partial(_plain, name, length) for name in PLAIN},
        **{name: functools.partial(_cached, name, length, prompt) for name in methods},
    }
    made: dict[str, Callable[[], Any]] = {}
    held = {}
    for arm, make in makers.items():
        model, held[arm] = make()
        logits = jnp.zeros((1, VOCABULARY))
        made[arm] = functools.partial(continue_tokens, model, logits, STEPS)
    return made, held


def measure(longest: int, rounds: int) -> dict[str, Any]:
    """Seconds per token and cache bytes of every method that decodes, and of exact attention with plain caches."""
    rows: list[dict[str, Any]] = []
    decoding = [name for name, method in METHODS.items() if method.capabilities.decode]
    for length in (n for n in (1024, 8192, 32768) if n <= longest):
        made, held = calls(length, decoding)
        for arm, timing in time_interleaved(made, rounds=rounds, patience=60).items():
            row = {"arm": arm, "length": length, "seconds": timing.least / STEPS, "cache_bytes": held[arm]}
            rows.append(row)
            Console().print(f"{length:6} {arm:18} {1 / row['seconds']:8.0f} tokens/s  {held[arm] / 2**20:7.2f} MiB")
    return {
        "rounds": rounds,
        "steps": STEPS,
        "size": SIZE,
        "model": {name: getattr(MODEL, name) for name in ("num_layers", "model_dim", "num_heads", "num_kv_heads")},
        "num_heads": MODEL.num_heads,
        "head_dim": MODEL.head_dim,
        "peak_flops_per_second": peak_flops(),
        "environment": environment(),
        "rows": rows,
    }
