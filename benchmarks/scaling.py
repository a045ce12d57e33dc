"""Time and memory of every method as the sequence grows, and the length from which it beats exact attention."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from rich.console import Console

from approx_attention import METHODS, Cache, Decoder, attention
from approx_attention.core import HIDDEN
from approx_attention.evaluation import environment, time_interleaved
from approx_attention.registry import Method
from benchmarks.exact import HEAD_DIM, NUM_HEADS, inputs, jax_arms, peak_flops, with_gradient

SIZE = 256
SETTINGS = {"local": 128}
LENGTHS = (512, 1024, 2048, 4096, 8192, 32768)
# Programs with gradients take several times as long to compile.
BACKWARD_LENGTHS = (512, 2048, 8192)
# Number of tokens decoded in one call: a block, so that the time includes the step to the next block.
DECODED = 128
SHARED_LENGTH = Cache(0, 0, None)  # pyright: ignore[reportArgumentType]


def measure(longest: int, rounds: int) -> dict[str, Any]:
    """Every method below T x S at one size, interleaved with the exact forms at each length; then decoding."""
    console, rows = Console(), []
    for backward in (False, True):
        for is_causal in (False, True):
            rows += _passes(longest, rounds, is_causal, backward, console)
    return {
        "num_heads": NUM_HEADS,
        "head_dim": HEAD_DIM,
        "size": SIZE,
        "sizes": {name: size_of(name, method) for name, method in METHODS.items() if method.capabilities.subquadratic},
        "rounds": rounds,
        "peak_flops_per_second": peak_flops(),
        "environment": environment(),
        "rows": rows,
        "decode": {"tokens": DECODED, "rows": _decode(longest, rounds, console)},
    }


def size_of(name: str, method: Method) -> int | None:
    """The size at which a method is timed: 256, or its usual size if that is not a number of tokens."""
    if method.size is None:
        return None
    return SETTINGS.get(name, min(SIZE, method.usual_size))


def form_of(name: str, is_causal: bool) -> Callable[..., Array]:
    """Attention by a method at its size, as a function of query, key and value."""
    method = METHODS[name]
    rng = jax.random.key(0) if method.capabilities.needs_key else None
    chosen = {method.size: size_of(name, method)} if method.size else {}
    return functools.partial(attention, method=name, rng=rng, is_causal=is_causal, **chosen)


def _passes(longest: int, rounds: int, is_causal: bool, backward: bool, console: Console) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    lengths = [n for n in (BACKWARD_LENGTHS if backward else LENGTHS) if n <= longest]
    names = [
        name
        for name, method in METHODS.items()
        if method.capabilities.subquadratic and (method.capabilities.causal or not is_causal)
    ]
    for length in lengths:
        arguments = inputs(length) if backward else inputs(length)[:3]
        compiled = {f"exact {name}": arm for name, arm in jax_arms(length, is_causal, backward).items()}
        for name in names:
            form = form_of(name, is_causal)
            compiled[name] = jax.jit(with_gradient(form) if backward else form).lower(*arguments).compile()
        calls = {name: functools.partial(form, *arguments) for name, form in compiled.items()}
        timings = time_interleaved(calls, rounds=rounds, patience=15)
        for name, timing in timings.items():
            rows.append(
                {
                    "length": length,
                    "arm": name,
                    "size": None if name.startswith("exact") else size_of(name, METHODS[name]),
                    "is_causal": is_causal,
                    "backward": backward,
                    "seconds": timing.least,
                    "median_seconds": timing.median,
                    "temp_bytes": compiled[name].memory_analysis().temp_size_in_bytes,
                }
            )
        shown = "  ".join(f"{name} {timing.least * 1e3:.1f}" for name, timing in timings.items())
        console.print(f"n={length} {'causal' if is_causal else 'full'} {'fwd+bwd' if backward else 'fwd'} ms: {shown}")
        best = min(timing.least for name, timing in timings.items() if name.startswith("exact"))
        # Exact attention is quadratic: a method that is slower by more than the remaining growth never catches up.
        names = [name for name in names if timings[name].least <= best * lengths[-1] / length]
        jax.clear_caches()
    return rows


def _decode(longest: int, rounds: int, console: Console) -> list[dict[str, Any]]:
    """Seconds per token of every decoder after given numbers of tokens, and of exact caches."""
    rows: list[dict[str, Any]] = []
    lengths = [n for n in LENGTHS if n <= longest]
    decoders = {name: decoder_of(name, method) for name, method in METHODS.items() if decodes(name, method)}
    chunk = lengths[0]
    query, key, value = (x[0] for x in inputs(max(chunk, DECODED))[:3])
    prefill = {name: jax.jit(over_heads(decoder.prefill)) for name, decoder in decoders.items()}
    steps = {name: jax.jit(functools.partial(decoder_steps, decoder)) for name, decoder in decoders.items()}
    caches = {name: empty_cache(decoder) for name, decoder in decoders.items()}
    tokens = tuple(x[:DECODED] for x in (query, key, value))
    seen = 0
    for length in lengths:
        while seen < length:
            for name in decoders:
                _, caches[name] = prefill[name](caches[name], *(x[:chunk] for x in (query, key, value)))
            seen += chunk
        exact = exact_decoder(length)
        buffers = exact_buffers(length)
        full = cache_at(empty_cache(exact), length)
        calls: dict[str, Callable[[], Any]] = {
            "exact buffer": functools.partial(jax.jit(exact_steps), buffers, length, *tokens),
            "exact decoder": functools.partial(jax.jit(functools.partial(decoder_steps, exact)), full, *tokens),
        }
        calls |= {name: functools.partial(steps[name], caches[name], *tokens) for name in decoders}
        timings = time_interleaved(calls, rounds=rounds, patience=15)
        for name, timing in timings.items():
            rows.append({"length": length, "arm": name, "seconds": timing.least / DECODED})
        shown = "  ".join(f"{name} {timing.least / DECODED * 1e6:.0f}" for name, timing in timings.items())
        console.print(f"n={length} decode, microseconds a token: {shown}")
    return rows


def decodes(name: str, method: Method) -> bool:
    """Whether a method decodes with a cache of bounded size."""
    return method.running is not None and method.capabilities.decode and method.capabilities.subquadratic


def running_of(name: str, method: Method, **chosen: Any) -> Any:
    """The running summary of a method."""
    assert method.running is not None, name
    arguments = {"key": jax.random.key(0)} if "key" in inspect.signature(method.running).parameters else {}
    return method.running(HEAD_DIM, **arguments, **chosen)


def decoder_of(name: str, method: Method) -> Decoder:
    """The decoder of a method at its size."""
    chosen = {method.size: size_of(name, method)} if method.size else {}
    running = running_of(name, method, **chosen)
    return Decoder(running=running, head_dim=HEAD_DIM, value_dim=HEAD_DIM, block_size=DECODED)


def exact_decoder(length: int) -> Decoder:
    """The decoder that keeps all tokens, with room for those that are decoded."""
    running = running_of("exact", METHODS["exact"], max_length=length + DECODED)
    return Decoder(running=running, head_dim=HEAD_DIM, value_dim=HEAD_DIM)


def exact_buffers(length: int, dtype: Any = jnp.float32) -> tuple[Array, Array]:
    """Keys and values of the tokens, with room for those that are decoded."""
    buffer = jnp.zeros((length + DECODED, NUM_HEADS, HEAD_DIM), dtype).at[:length].set(1.0)
    return buffer, buffer


def cache_at(cache: Cache, length: int | Array) -> Cache:
    """The cache with its next token at a position: the time of a step does not depend on the earlier tokens."""
    return cache._replace(length=jnp.asarray(length, jnp.int32))


def empty_cache(decoder: Decoder) -> Cache:
    """The empty cache of all heads."""
    return jax.vmap(decoder.init, out_axes=SHARED_LENGTH, axis_size=NUM_HEADS)()


def over_heads(prefill: Callable[..., Any]) -> Callable[..., Any]:
    """The prefill of all heads, for tokens ``[T, N, D]``."""
    return jax.vmap(prefill, in_axes=(SHARED_LENGTH, 1, 1, 1), out_axes=(1, SHARED_LENGTH))


def decoder_steps(decoder: Decoder, cache: Cache, query: Array, key: Array, value: Array) -> Array:
    """Outputs for tokens ``[T, N, D]``, one by one."""
    append = jax.vmap(decoder.append, in_axes=(SHARED_LENGTH, 0, 0), out_axes=SHARED_LENGTH)
    attend = jax.vmap(decoder.attend, in_axes=(SHARED_LENGTH, 0))

    def step(cache: Cache, token: tuple[Array, ...]) -> tuple[Cache, Array]:
        q, k, v = (x[:, None] for x in token)
        cache = append(cache, k, v)
        return cache, attend(cache, q)[:, 0]

    return lax.scan(step, cache, (query, key, value))[1]


def exact_steps(
    buffers: Iterable[Array],
    length: int | Array,
    query: Array,
    key: Array,
    value: Array,
    read: Callable[..., Array] | None = None,
) -> Array:
    """The same with all keys and values in buffers ``[S, N, D]`` of which ``length`` rows are filled.

    ``read`` computes the output of a query ``[N, D]`` at a position from the buffers; by default from all logits.
    """

    def step(carry: tuple[Array, Array, Array], token: tuple[Array, ...]) -> tuple[Any, Array]:
        k, v, at = carry
        q, *new = token
        k, v = (lax.dynamic_update_slice_in_dim(x, y[None], at, 0) for x, y in zip((k, v), new, strict=True))
        return (k, v, at + 1), (read or _read_logits)(q, k, v, at)

    return lax.scan(step, (*buffers, jnp.asarray(length, jnp.int32)), (query, key, value))[1]


def _read_logits(q: Array, k: Array, v: Array, at: Array) -> Array:
    logits = jnp.einsum("nd,snd->ns", q, k) / HEAD_DIM**0.5
    weights = jax.nn.softmax(jnp.where(jnp.arange(k.shape[0])[None, :] <= at, logits, HIDDEN))
    return jnp.einsum("ns,snd->nd", weights, v)
