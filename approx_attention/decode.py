"""Decoding and streaming with a cache of bounded size: recent tokens exactly, a summary of everything older."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from approx_attention.causal import Block, Past, RunningSummary, in_blocks, move_on, scan_blocks
from approx_attention.checks import check_count, check_floating, fold_scale
from approx_attention.softmax import HIDDEN, pad_rows
from approx_attention.states import merge
from approx_attention.summaries import attend


class Cache(NamedTuple):
    """All that a decoder remembers of a sequence.

    Attributes:
        past: the block before the current one, and the summary of everything older.
        current: the block that is being filled.
        length: the number of tokens seen.
    """

    past: Past
    current: Block
    length: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder:
    r"""A method as a decoder of one head: pure functions over a cache whose size does not depend on what it has seen.

    After n tokens the cache holds the last :math:`b < m \le 2b` of them exactly (all, if there are fewer) and a summary
    of the rest; step by step it computes the causal form of the method. Every function can be jitted, with the cache
    donated. `jax.vmap` adds sequences and heads; what has one length is mapped with axes ``Cache(0, 0, None)``, so that
    older tokens are summarised once per block and not masked out at every step.

    Attributes:
        running: how older tokens are summarised, for instance ``METHODS["favor"].running(head_dim, key)``.
        head_dim: channels D of queries and keys.
        value_dim: channels Dv of values.
        block_size: the number b of tokens per block.
        scale: factor of the logits, ``1/sqrt(D)`` by default.
        dtype: of the cache, float32 or float64.

    Raises:
        TypeError: a dtype other than float32 and float64, tokens that are not floating point.
        ValueError: a count below 1, or tensors that do not fit the cache.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import METHODS, Decoder, favor
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (100, 16)) for i in range(3))
        >>> key = jax.random.key(3)
        >>> decoder = Decoder(running=METHODS["favor"].running(16, key), head_dim=16, value_dim=16, block_size=32)
        >>> out, cache = decoder.prefill(decoder.init(), q[:99], k[:99], v[:99])
        >>> cache = decoder.append(cache, k[99:], v[99:])
        >>> last = decoder.attend(cache, q[99:])
        >>> whole = favor(q, k, v, key, is_causal=True, block_size=32)
        >>> bool(jnp.allclose(jnp.concatenate([out, last]), whole, atol=1e-5))
        True
    """

    running: RunningSummary
    head_dim: int
    value_dim: int
    block_size: int = 128
    scale: float | None = None
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if not isinstance(self.running, RunningSummary):
            raise TypeError(f"running must be what METHODS[name].running makes, got {self.running!r}")
        for name in ("head_dim", "value_dim", "block_size"):
            check_count(name, getattr(self, name))
        if jnp.dtype(self.dtype) not in (jnp.float32, jnp.float64):
            raise TypeError(f"dtype of a cache must be float32 or float64, got {jnp.dtype(self.dtype)}")

    def init(self) -> Cache:
        """The cache that has seen no token."""
        past = Past.empty(self.running, self.block_size, self.head_dim, self.value_dim, self.dtype)
        current = Block.empty(self.block_size, self.head_dim, self.value_dim, self.dtype)
        return Cache(past, current, jnp.zeros((), jnp.int32))

    def append(self, cache: Cache, k: Array, v: Array, num_real: Array | int | None = None) -> Cache:
        """The cache after T more tokens.

        Args:
            cache: what was seen before.
            k: keys ``[T, D]``.
            v: values ``[T, Dv]``.
            num_real: how many of them are real, from the first on; all by default.

        Returns:
            The new cache.
        """
        if k.shape[0] > 1 or num_real is not None:
            return self.prefill(cache, jnp.zeros_like(k), k, v, num_real)[1]
        tokens = self._tokens(k, v, 1)
        number, place = cache.length // self.block_size, cache.length % self.block_size

        def next_block(cache: Cache) -> Cache:
            past = move_on(self.running, cache.past, number - 1, cache.current)
            return cache._replace(past=past, current=jax.tree.map(jnp.zeros_like, cache.current))

        cache = lax.cond((place == 0) & (number > 0), next_block, lambda cache: cache, cache)
        current = jax.tree.map(
            lambda block, token: lax.dynamic_update_slice_in_dim(block, token, place, 0), cache.current, tokens
        )
        return Cache(cache.past, current, cache.length + 1)

    def attend(self, cache: Cache, q: Array) -> Array:
        """Answers of queries ``[G, D]`` at the position of the last token, over all tokens seen: ``[G, Dv]``."""
        if q.ndim != 2 or q.shape[1] != self.head_dim:
            raise ValueError(f"q must be [G, D] with D = {self.head_dim}, got shape {q.shape}")
        scaled, _ = fold_scale(self.running.space(q.astype(self.dtype)), q, self.scale)
        near = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cache.past.before, cache.current)
        bias = jnp.where(near.kv_mask, jnp.zeros((), self.dtype), HIDDEN)[None, :]
        summary = self.running.read(cache.past.prefix)
        return merge(self.running.near(scaled, near.k, near.v, bias), attend(scaled, summary)).out.astype(q.dtype)

    def prefill(
        self, cache: Cache, q: Array, k: Array, v: Array, num_real: Array | int | None = None
    ) -> tuple[Array, Cache]:
        """Takes T more tokens and answers causally at each of them.

        Args:
            cache: what was seen before.
            q: queries ``[T, D]``.
            k: keys ``[T, D]``.
            v: values ``[T, Dv]``.
            num_real: how many of the tokens are real, from the first on; all by default.

        Returns:
            Answers ``[T, Dv]``, 0 where a token is not real, and the new cache.
        """
        num_tokens, block_size = k.shape[0], self.block_size
        if num_real is not None and not jnp.issubdtype(jnp.asarray(num_real).dtype, jnp.integer):
            raise TypeError(f"num_real must be an integer, got {num_real!r}")
        if isinstance(num_real, int) and not 0 <= num_real <= num_tokens:
            raise ValueError(f"num_real must be from 0 to T = {num_tokens}, got {num_real}")
        num_real = jnp.clip(jnp.asarray(num_tokens if num_real is None else num_real, jnp.int32), 0, num_tokens)
        tokens = self._tokens(k, v, num_real)
        if q.shape != k.shape:
            raise ValueError(f"q must be [T, D] = {list(k.shape)} like k, got shape {q.shape}")
        real = tokens.kv_mask[:, None]
        q = self.running.space(jnp.where(real, q, jnp.zeros_like(q)).astype(self.dtype))
        q, _ = fold_scale(q, tokens.k, self.scale)

        # The new tokens continue the current block wherever it stands.
        number = jnp.maximum(cache.length - 1, 0) // block_size
        filled = cache.length - number * block_size

        def continued(start: Array, x: Array) -> Array:
            room = pad_rows(start, num_tokens)
            return in_blocks(lax.dynamic_update_slice_in_dim(room, x, filled, 0), block_size)

        blocks = jax.tree.map(continued, cache.current, tokens)
        q_blocks = continued(jnp.zeros((block_size, self.head_dim), self.dtype), q)
        length = filled + num_real
        past, state = scan_blocks(self.running, cache.past, number, q_blocks, blocks, length)

        last = jnp.maximum(length - 1, 0) // block_size
        current = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, last, keepdims=False), blocks)
        out = lax.dynamic_slice_in_dim(state.out.reshape(-1, self.value_dim), filled, num_tokens)
        out = jnp.where(real, out, jnp.zeros_like(out)).astype(v.dtype)
        return out, Cache(past, current, cache.length + num_real)

    def _tokens(self, k: Array, v: Array, num_real: Array | int) -> Block:
        for name, x, size in (("k", k, self.head_dim), ("v", v, self.value_dim)):
            if x.ndim != 2 or x.shape != (k.shape[0], size) or k.shape[0] == 0:
                raise ValueError(f"{name} must be [T, {size}] with T >= 1 tokens, got shape {x.shape}")
            check_floating(name, x)
        real = jnp.arange(k.shape[0], dtype=jnp.int32) < num_real
        k, v = (jnp.where(real[:, None], x, jnp.zeros_like(x)).astype(self.dtype) for x in (k, v))
        k = self.running.space(k)
        return Block(fold_scale(k, k, self.scale)[1], v, real)
