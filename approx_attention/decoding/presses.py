"""Compression of the caches of all heads, and the decoder that continues from compressed caches."""

import functools
from collections.abc import Set
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from approx_attention.core import (
    RunningSummary,
    WeightedKV,
    check_bits,
    check_count,
    check_floating,
    check_key,
    each,
    fold_scale,
    shown,
)
from approx_attention.coresets import Algorithm
from approx_attention.decoding.compression import compress_cache, running_compressed, tokens_in
from approx_attention.decoding.decoder import Cache, Decoder, HeadsCache, HeadsDecoder
from approx_attention.decoding.matching import AttentionMatching
from approx_attention.registry import CAPABILITY_OF, BoundMethod


class CompressedDecoder(HeadsDecoder):
    """A decoder for caches of `compress_heads`: compressed tokens, a folded coreset of later ones, and recent tokens.

    `compress_heads` makes it, together with its cache.

    Args:
        method: as in `HeadsDecoder`; it is used for the last one or two blocks.
        prefix_budget: number of tokens of the compressed prefix.
        coreset_size: as in `running_compressed`.
        prefix_bits: 8 or 4 bits per channel of the compressed prefix.
        **options: arguments of `HeadsDecoder`.

    Raises:
        ValueError: counts below 1, other bits.
        NotImplementedError: ``certify``, ``cache_bits``, ``logits_soft_cap``; in ``init``, ``per_head``.
    """

    def __init__(
        self,
        method: str | BoundMethod,
        *,
        prefix_budget: int,
        coreset_size: int = 256,
        prefix_bits: int | None = None,
        **options: Any,
    ):
        super().__init__(method, **options)
        shared = {name: x for name, x in self.bound.hyperparameters.items() if name in CAPABILITY_OF}
        for name, given in {"certify": self.certify, "cache_bits": self.cache_bits, **shared}.items():
            if given is not None:
                raise NotImplementedError(f"CompressedDecoder does not support {name}, got {name}={shown(given)}")
        self.prefix: dict[str, Any] = {
            "prefix_budget": check_count("prefix_budget", prefix_budget),
            "coreset_size": check_count("coreset_size", coreset_size),
            "prefix_bits": None if prefix_bits is None else check_bits("prefix_bits", prefix_bits),
        }

    def _draw(self, rng: Array | None, given: Set[str] = frozenset()) -> dict[str, Array]:
        """Sample a PRNG key for the folded coreset of each head."""
        if given:
            raise NotImplementedError(f"CompressedDecoder does not support per_head, got {', '.join(sorted(given))}")
        return {"folding": jax.random.split(check_key("CompressedDecoder", rng), self.num_kv_heads)}

    def _of_head(self, drawn: dict[str, Array]) -> Decoder:
        running = running_compressed(
            self.sizes["head_dim"],
            drawn["folding"],
            budget=self.prefix["prefix_budget"],
            coreset_size=self.prefix["coreset_size"],
            bits=self.prefix["prefix_bits"],
        )
        return Decoder(running=running, **self.sizes)


def compress_heads(
    decoder: HeadsDecoder,
    cache: HeadsCache,
    key: Array,
    *,
    budget: int | None = None,
    num_bytes: int | None = None,
    sizes: Int[Array, " K"] | None = None,
    coreset_size: int = 256,
    policy: str | Algorithm | AttentionMatching = "guarded",
    queries: Float[Array, "B T N D"] | None = None,
    sinks: int = 4,
    mass_correction: bool | Literal["fitted"] = True,
    bits: int | None = None,
) -> tuple[CompressedDecoder, HeadsCache]:
    """Compress the cache of every head of an exact `HeadsDecoder` by `compress_cache`.

    Args:
        decoder: the decoder of the cache; its method keeps tokens unchanged (``"exact"``).
        cache: the cache.
        key: typed PRNG key.
        budget: number of tokens per head for everything older than its exact blocks.
        num_bytes: bytes per head instead of ``budget``, as in `compress_cache`.
        sizes: number of tokens of each key head ``[K]``, for policies that support ``size``; the memory stays that of
            ``budget``.
        coreset_size: as in `compress_cache`.
        policy: as in `compress_cache`.
        queries: the last queries of every head ``[B, T, N, D]``, in the form used by attention.
        sinks: as in `compress_cache`.
        mass_correction: as in `compress_cache`.
        bits: as in `compress_cache`.

    Returns:
        The decoder that continues, and its cache.

    Raises:
        TypeError: the cache does not contain unchanged tokens, or queries are not floating point.
        NotImplementedError: the cache belongs to attention with capped logits.
        ValueError: queries or sizes have another shape; and as in `compress_cache`.

    Example:
        >>> import jax
        >>> from approx_attention import HeadsDecoder
        >>> from approx_attention.decoding import compress_heads
        >>> query, key, value = (jax.random.normal(jax.random.key(i), (2, 100, 3, 4)) for i in range(3))
        >>> decoder = HeadsDecoder("exact", num_kv_heads=3, head_dim=4, max_length=100, block_size=10)
        >>> _, cache = jax.jit(decoder.extend)(decoder.init(2), query, key, value)
        >>> options = dict(budget=16, coreset_size=8, policy="snapkv", queries=query[:, -32:])
        >>> decoder, cache = compress_heads(decoder, cache, jax.random.key(3), **options)
        >>> out, cache = jax.jit(decoder.extend)(cache, query[:, :1], key[:, :1], value[:, :1])
        >>> out.shape, cache.heads.past.prefix.fixed.mass.shape
        ((2, 1, 3, 4), (2, 3, 16))
    """
    key = check_key("compress_heads", key)
    heads: Any = cache.heads
    prefix = heads.past.prefix if isinstance(heads, Cache) else None
    if not isinstance(prefix, WeightedKV) or (running := _running(decoder, cache)).quantized is None:
        raise TypeError(
            "compress_heads needs a cache of unchanged tokens, such as one of 'exact' without cache_bits and certify "
            f"that is not compressed yet; got one of {decoder.bound.name!r} with {type(prefix).__name__}"
        )
    if running.logits_soft_cap is not None:
        raise NotImplementedError("compress_heads does not support logits_soft_cap: masses are fitted without a cap")
    budget = check_count("budget", tokens_in(budget, num_bytes, prefix.k[0, 0], prefix.value_sum[0, 0], bits))
    after = CompressedDecoder(
        decoder.bound,
        num_kv_heads=decoder.num_kv_heads,
        **decoder.sizes | {"block_size": None},
        prefix_budget=budget,
        coreset_size=coreset_size,
        prefix_bits=bits,
    )
    if sizes is not None and jnp.shape(sizes) != (decoder.num_kv_heads,):
        raise ValueError(f"sizes must be [K] = [{decoder.num_kv_heads}], got shape {jnp.shape(sizes)}")
    if queries is not None:
        queries = _by_key_head(queries, prefix, decoder)
    key_policy, key_folding = jax.random.split(key)
    keys = jax.random.split(key_policy, prefix.mass.shape[:2])
    options = {"budget": budget, "coreset_size": coreset_size, "policy": policy, "sinks": sinks}
    options |= {"mass_correction": mass_correction, "bits": bits}
    static = tuple(options.items())
    compressed = _compressed(heads._replace(length=None), keys, sizes, queries, static)
    return after, HeadsCache(compressed._replace(length=heads.length), after._draw(key_folding))


def _by_key_head(queries: Array, prefix: WeightedKV, decoder: HeadsDecoder) -> Array:
    """Scaled queries ``[B, K, T, N / K, D]`` from queries ``[B, T, N, D]``."""
    check_floating("queries", queries)
    batch, num_kv_heads, _, head_dim = prefix.k.shape
    shape = queries.shape
    fits = queries.ndim == 4 and (shape[0], shape[3]) == (batch, head_dim)
    if not fits or shape[1] == 0 or shape[2] == 0 or shape[2] % num_kv_heads:
        asked = f"[{batch}, 1 or more, a multiple of {num_kv_heads}, {head_dim}]"
        raise ValueError(f"queries must be [B, T, N, D] = {asked}, got shape {shape}")
    grouped = queries.reshape(*shape[:2], num_kv_heads, shape[2] // num_kv_heads, head_dim)
    return jnp.moveaxis(fold_scale(grouped, prefix.k, decoder.sizes["scale"])[0], 2, 1)


def _running(decoder: HeadsDecoder, cache: HeadsCache) -> RunningSummary:
    """The running summary of the first head; it has a quantised form if older tokens are stored unchanged."""
    drawn = jax.tree.map(lambda x: x[0], cache.drawn)
    return decoder.bound.running(decoder.sizes["head_dim"], **drawn)


@functools.partial(jax.jit, static_argnames="static")  # otherwise the loop would be compiled in every call
def _compressed(heads: Cache, keys: Array, sizes: Array | None, queries: Array | None, static: Any) -> Cache:
    """`compress_cache` for every head ``[B, K]``."""

    def of_head(args: Any) -> Cache:
        cache, key, size, queries = args
        return compress_cache(cache, key, size=size, queries=queries, **dict(static))

    def of_sequence(args: Any) -> Cache:
        cache, keys, queries = args
        return each(of_head, (cache, keys, sizes, queries))

    return each(of_sequence, (heads, keys, queries))
