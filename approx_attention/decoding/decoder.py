"""Decoding and streaming with a cache of bounded size: recent tokens exactly, older tokens as a summary."""

import dataclasses
import functools
from collections.abc import Mapping, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from approx_attention.core import (
    Block,
    Past,
    RunningSummary,
    attend,
    cache_dtype,
    check_bits,
    check_count,
    check_flag,
    check_floating,
    check_length,
    check_lengths,
    check_not_negative,
    check_number,
    each,
    fold_scale,
    in_blocks,
    keep_count,
    logit_scale,
    mask_bias,
    merge,
    move_on,
    out_of_blocks,
    pad_rows,
    require_scaled_space,
    scan_blocks,
    shown,
)
from approx_attention.decoding.certified import CertifiedCache, CertifiedDecoder, certified_step
from approx_attention.registry import BoundMethod, bind


class Cache(NamedTuple):
    """The cache of one head: recent tokens, and a summary of older tokens.

    Attributes:
        past: the block before the current one, and the summary of older tokens.
        current: the block that is being filled.
        length: the number of tokens so far.
    """

    past: Past
    current: Block
    length: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder:
    r"""A decoder of one head for any method: pure functions over a cache of fixed size.

    After n tokens the cache contains the last :math:`b < m \le 2b` tokens exactly (or all, if there are fewer) and a
    summary of older tokens. It computes the causal form of the method step by step. Every function can be jitted, with
    the cache donated. Use `jax.vmap` for several sequences and heads. With equal lengths, map with axes
    ``Cache(0, 0, None)``: older tokens are then summarised once per block, instead of at every step.

    Attributes:
        running: the summary of older tokens, for example ``METHODS["favor"].running(head_dim, key)``.
        head_dim: channels D of queries and keys.
        value_dim: channels Dv of values.
        block_size: the number b of tokens per block.
        scale: factor of the logits, ``1/sqrt(D)`` by default.
        dtype: dtype of the cache, float32 or float64.
        cache_bits: 8 or 4 bits per channel of older tokens, if ``running`` keeps tokens unchanged, like
            `running_exact`. Each token is rounded once, when its block is no longer recent. ``dtype`` by default.

    Raises:
        NotImplementedError: ``cache_bits`` for a summary that changes at every block.
        TypeError: a dtype other than float32 and float64, tokens that are not floating point.
        ValueError: a count below 1, other bits, or tensors that do not match the cache.

    Example:
        >>> import functools, jax, jax.numpy as jnp
        >>> from approx_attention import METHODS, Decoder, favor
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (100, 16)) for i in range(3))
        >>> key = jax.random.key(3)
        >>> decoder = Decoder(running=METHODS["favor"].running(16, key), head_dim=16, value_dim=16, block_size=32)
        >>> out, cache = jax.jit(decoder.prefill)(decoder.init(), q[:99], k[:99], v[:99])
        >>> cache = jax.jit(decoder.append)(cache, k[99:], v[99:])
        >>> last = jax.jit(decoder.attend)(cache, q[99:])
        >>> whole = jax.jit(functools.partial(favor, is_causal=True, block_size=32))(q, k, v, key)
        >>> bool(jnp.allclose(jnp.concatenate([out, last]), whole, atol=1e-5))
        True
    """

    running: RunningSummary
    head_dim: int
    value_dim: int
    block_size: int = 128
    scale: float | None = None
    dtype: Any = jnp.float32
    cache_bits: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.running, RunningSummary):
            raise TypeError(f"running must be a RunningSummary, as from METHODS[name].running; got {self.running!r}")
        for name in ("head_dim", "value_dim", "block_size"):
            keep_count(self, name)
        logit_scale(self.scale, self.head_dim)
        cache_dtype(self.dtype)
        if self.cache_bits is not None:
            check_bits("cache_bits", self.cache_bits)
            if self.running.quantized is None:
                raise NotImplementedError(
                    "cache_bits needs a summary that keeps tokens unchanged, like running_exact; this one changes at "
                    "every block, and would be rounded each time; compress_cache(..., bits=...) rounds once"
                )

    @property
    def _held(self) -> RunningSummary:
        """The summary of older tokens, as stored."""
        if self.cache_bits is None or self.running.quantized is None:
            return self.running
        return self.running.quantized(self.cache_bits, self.block_size)

    def init(self) -> Cache:
        """Make an empty cache."""
        past = Past.empty(self._held, self.block_size, self.head_dim, self.value_dim, self.dtype)
        current = Block.empty(self.block_size, self.head_dim, self.value_dim, self.dtype)
        return Cache(past, current, jnp.zeros((), jnp.int32))

    def append(self, cache: Cache, k: Array, v: Array, num_real: Array | int | None = None) -> Cache:
        """Append T tokens.

        Args:
            cache: the cache of the tokens before.
            k: keys ``[T, D]``.
            v: values ``[T, Dv]``.
            num_real: number of real tokens, which come first, from 0 to T (clipped if traced); by default T.

        Returns:
            The new cache.
        """
        num_tokens = self._check_tokens(k, v)
        if num_tokens > 1 or num_real is not None:
            return self.prefill(cache, jnp.zeros_like(k), k, v, num_real)[1]
        tokens = self._tokens(k, v, 1)
        number, place = cache.length // self.block_size, cache.length % self.block_size

        def next_block(cache: Cache) -> Cache:
            past = move_on(self._held, cache.past, number - 1, cache.current)
            return cache._replace(past=past, current=jax.tree.map(jnp.zeros_like, cache.current))

        cache = lax.cond((place == 0) & (number > 0), next_block, lambda cache: cache, cache)
        current = jax.tree.map(
            lambda block, token: lax.dynamic_update_slice_in_dim(block, token, place, 0), cache.current, tokens
        )
        return Cache(cache.past, current, cache.length + 1)

    def attend(self, cache: Cache, q: Array) -> Array:
        """Attend to all tokens so far with queries at the position of the last token.

        Args:
            cache: the cache of these tokens.
            q: queries ``[G, D]``.

        Returns:
            Outputs ``[G, Dv]`` in the dtype of the cache.

        Raises:
            ValueError: queries that do not match the cache.
        """
        check_floating("q", q)
        if q.ndim != 2 or q.shape[1] != self.head_dim or q.shape[0] == 0:
            raise ValueError(f"q must be [G, D] with G >= 1 and D = {self.head_dim}, got shape {q.shape}")
        scaled, _ = fold_scale(self._held.space(q.astype(self.dtype)), q, self.scale)
        near = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cache.past.before, cache.current)
        bias = mask_bias(near.kv_mask, self.dtype)[None, :]
        summary = require_scaled_space("a running summary", self._held.read(cache.past.prefix))
        nearby = self._held.near(scaled, near.k, near.v, bias)
        return merge(nearby, attend(scaled, summary, logits_soft_cap=self._held.logits_soft_cap)).out

    def prefill(
        self, cache: Cache, q: Array, k: Array, v: Array, num_real: Array | int | None = None
    ) -> tuple[Array, Cache]:
        """Append T tokens and attend causally at each of them.

        Args:
            cache: the cache of the tokens before.
            q: queries ``[T, D]``.
            k: keys ``[T, D]``.
            v: values ``[T, Dv]``.
            num_real: number of real tokens, which come first; by default T.

        Returns:
            Outputs ``[T, Dv]`` in the dtype of the cache, 0 in padding, and the new cache.
        """
        num_tokens, block_size = self._check_tokens(k, v), self.block_size
        if num_real is not None:
            check_length("num_real", num_real, num_tokens)
        num_real = jnp.clip(jnp.asarray(num_tokens if num_real is None else num_real, jnp.int32), 0, num_tokens)
        tokens = self._tokens(k, v, num_real)
        check_floating("q", q)
        if q.shape != k.shape:
            raise ValueError(f"q must be [T, D] = {list(k.shape)} like k, got shape {q.shape}")
        real = tokens.kv_mask[:, None]
        q = self._held.space(jnp.where(real, q, jnp.zeros_like(q)).astype(self.dtype))
        q, _ = fold_scale(q, tokens.k, self.scale)

        # The new tokens continue the current block at any fill level.
        number = jnp.maximum(cache.length - 1, 0) // block_size
        filled = cache.length - number * block_size

        def continued(start: Array, x: Array) -> Array:
            room = pad_rows(start, num_tokens)
            return in_blocks(lax.dynamic_update_slice_in_dim(room, x, filled, 0), block_size)

        blocks = jax.tree.map(continued, cache.current, tokens)
        q_blocks = continued(jnp.zeros((block_size, self.head_dim), self.dtype), q)
        length = filled + num_real
        past, state = scan_blocks(self._held, cache.past, number, q_blocks, blocks, length)

        last = jnp.maximum(length - 1, 0) // block_size
        current = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, last, keepdims=False), blocks)
        out = lax.dynamic_slice_in_dim(out_of_blocks(state.out), filled, num_tokens)
        return jnp.where(real, out, jnp.zeros_like(out)), Cache(past, current, cache.length + num_real)

    def _check_tokens(self, k: Any, v: Any) -> int:
        """Check tokens and return their number."""
        for name, x, size in (("k", k, self.head_dim), ("v", v, self.value_dim)):
            check_floating(name, x)
            if x.ndim != 2 or x.shape != (k.shape[0], size) or k.shape[0] == 0:
                raise ValueError(f"{name} must be [T, {size}] with T >= 1 tokens, got shape {x.shape}")
        return k.shape[0]

    def _tokens(self, k: Array, v: Array, num_real: Array | int) -> Block:
        real = jnp.arange(k.shape[0], dtype=jnp.int32) < num_real
        k, v = (jnp.where(real[:, None], x, jnp.zeros_like(x)).astype(self.dtype) for x in (k, v))
        k = self._held.space(k)
        return Block(fold_scale(k, k, self.scale)[1], v, real)


class HeadsCache(NamedTuple):
    """The cache of all heads of a batch of sequences.

    Attributes:
        heads: a `Cache`, or with ``certify`` a `CertifiedCache`, with leading axes ``[B, K]``; its ``length`` is one
            number, or ``[B]`` if sequences differ.
        drawn: random arrays, or arrays from ``per_head``, of each key head ``[K, ...]``, by argument name.
    """

    heads: Cache | CertifiedCache
    drawn: dict[str, Any]

    @property
    def length(self) -> Array:
        """The number of tokens so far, or ``[B]`` numbers if sequences differ."""
        return self.heads.length


class HeadsDecoder:
    r"""A decoder of a batch of sequences with grouped heads for a registered method, in the layout of `attention`.

    Token by token, or many at a time, it gives the outputs of ``attention(..., method=method, is_causal=True)`` on the
    whole sequence with the same ``rng``. Its functions can be jitted with the cache donated.

    With ``certify`` each step of one token attends to the clusters and the recent tokens, as without, and computes the
    error bound `bounds.merge_bound_at` for the queries of each key head. If the bound of a head exceeds the tolerance,
    that head attends exactly to all tokens. Such heads run one after the other. A call with several tokens is always
    exact, and does not count as a step. ``cache.heads.certificate`` contains the number of steps, the number of exact
    ones, and the largest bound of the others (`decoding.Certificate`). This saves memory traffic, not memory. The bound
    is useful if logits vary little within a cluster; see "What the theorems say at your norms" in the guide. Tokens in
    host memory are not supported: JAX cannot read a part of a host array under a condition.

    Args:
        method: a name in `METHODS` with ``decode``, or a bound method. For heads with different methods use
            `decoding.MixedDecoder`.
        num_kv_heads: the number K of key heads.
        head_dim: channels D of queries and keys.
        value_dim: channels Dv of values, D by default.
        max_length: the largest number of tokens of a sequence, rounded up to whole blocks, for methods whose cache
            grows (``"exact"``).
        block_size: tokens per block, for ``"exact"``; other methods have an argument ``block_size`` or
            ``window_size``.
        scale: factor of the logits, ``1/sqrt(D)`` by default.
        dtype: dtype of the cache, float32 or float64.
        certify: the largest error of a step, before its output is rounded to the dtype of ``value``, in units of the
            largest norm of a value so far; None for no bound. For methods whose running summary has an error bound
            (``"coreset"``). It needs ``max_length``, because all tokens are kept in device memory, in addition to the
            clusters.
        cache_bits: 8 or 4 bits per channel of older tokens, for ``"exact"``, as in `Decoder`.
        **hyperparameters: hyper-parameters of the method.

    Raises:
        NotImplementedError: the method has no running summary, none with an error bound for ``certify``, or does not
            support an argument when decoding; from `init`, ``cache_bits`` with a summary that changes at every block.
        TypeError: the method has no such argument, or ``max_length`` is missing.
        ValueError: tensors that do not match the cache, a tolerance below 0.

    Example:
        >>> import functools, jax, jax.numpy as jnp
        >>> from approx_attention import HeadsDecoder, attention
        >>> query = jax.random.normal(jax.random.key(0), (2, 40, 4, 8))
        >>> key, value = (jax.random.normal(jax.random.key(i), (2, 40, 2, 8)) for i in (1, 2))
        >>> decoder = HeadsDecoder("favor", num_kv_heads=2, head_dim=8, num_features=16, block_size=8)
        >>> cache = decoder.init(2, jax.random.key(3))
        >>> extend = jax.jit(decoder.extend)
        >>> out, cache = extend(cache, query[:, :39], key[:, :39], value[:, :39])
        >>> last, cache = extend(cache, query[:, 39:], key[:, 39:], value[:, 39:])
        >>> options = dict(method="favor", num_features=16, block_size=8, is_causal=True)
        >>> whole = jax.jit(functools.partial(attention, **options))(query, key, value, rng=jax.random.key(3))
        >>> bool(jnp.allclose(jnp.concatenate([out, last], axis=1), whole, atol=1e-5))
        True
    """

    def __init__(
        self,
        method: str | BoundMethod,
        *,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        max_length: int | None = None,
        block_size: int | None = None,
        scale: float | None = None,
        dtype: Any = jnp.float32,
        certify: float | Array | None = None,
        cache_bits: int | None = None,
        **hyperparameters: Any,
    ):
        self.bound = bind(method, hyperparameters).for_decoding(max_length, block_size)
        head_dim = check_count("head_dim", head_dim)
        logit_scale(scale, head_dim)
        self.sizes: dict[str, Any] = {
            "head_dim": head_dim,
            "value_dim": head_dim if value_dim is None else check_count("value_dim", value_dim),
            "block_size": self.bound.block_size,
            "scale": scale,
            "dtype": dtype,
        }
        cache_dtype(dtype)
        self.cache_bits = None if cache_bits is None else check_bits("cache_bits", cache_bits)
        self.num_kv_heads = check_count("num_kv_heads", num_kv_heads)
        self.certify, self.room = None, 0
        if certify is not None:
            check_number("certify", certify)
            check_not_negative("certify", certify)
            self.certify = certify
            self.bound.require_certified()
            if cache_bits is not None:
                raise ValueError(f"certify does not support cache_bits, got cache_bits={shown(cache_bits)}")
            if max_length is None:
                raise TypeError("certify keeps every token: pass max_length, the largest number of tokens")
            block_size = self.bound.block_size
            self.room = block_size * max(2, -(-max_length // block_size))

    def init(
        self,
        batch_size: int,
        rng: Array | None = None,
        *,
        ragged: bool = False,
        per_head: Mapping[str, Any] | None = None,
    ) -> HeadsCache:
        """Make an empty cache.

        Args:
            batch_size: the number B of sequences.
            rng: typed PRNG key, as in `attention`.
            ragged: whether sequences may differ in length. With equal lengths older tokens are summarised once per
                block; with a ragged cache the summary is computed at every step, and selected if it is due.
            per_head: arguments of the method that differ between key heads, as in `attention`.

        Returns:
            The `HeadsCache`.

        Raises:
            NotImplementedError: the running summary does not support an argument in ``per_head``.
        """
        batch_size, ragged = check_count("batch_size", batch_size), check_flag("ragged", ragged)
        own = self.bound.of_heads({} if per_head is None else per_head, self.num_kv_heads)
        drawn = {**self._draw(rng, own.keys()), **own}
        one = self._of_head(jax.tree.map(lambda x: x[0], drawn)).init()
        heads = jax.tree.map(lambda x: jnp.broadcast_to(x, (batch_size, self.num_kv_heads, *x.shape)), one)
        return HeadsCache(heads._replace(length=jnp.zeros((batch_size,) * ragged, jnp.int32)), drawn)

    def _draw(self, rng: Array | None, given: Set[str] = frozenset()) -> dict[str, Array]:
        """Sample the random arrays of each key head, except the given arguments."""
        return self.bound.draw(rng, self.num_kv_heads, self.sizes["head_dim"], given)

    def extend(
        self, cache: HeadsCache, query: Array, key: Array, value: Array, lengths: Array | None = None
    ) -> tuple[Array, HeadsCache]:
        """Append T tokens of every sequence and attend causally at each of them.

        Args:
            cache: the cache of the tokens before.
            query: ``[B, T, N, D]``; N/K consecutive query heads share a key head.
            key: ``[B, T, K, D]``.
            value: ``[B, T, K, Dv]``.
            lengths: numbers of real tokens, which come first, ``[B]``, each from 0 to T (clipped if traced); only with
                a ragged cache.

        Returns:
            Outputs ``[B, T, N, Dv]`` in the dtype of ``value``, 0 in padding, and the new cache.
        """
        ragged = cache.heads.length.ndim == 1
        batch, tokens = self._check(cache, query, key, value, lengths, ragged)
        group = query.shape[2] // self.num_kv_heads
        by_head = [jnp.moveaxis(x, 1, 2) for x in (key, value)]
        q = jnp.moveaxis(query.reshape(batch, tokens, self.num_kv_heads, group, -1), 1, 2)
        # One head at a time is faster only for products with more than one row.
        over = functools.partial(each, together=tokens == 1)

        def of_sequence(args: Any) -> Any:
            *heads, length, real = args
            seen = length if ragged else cache.heads.length

            def of_head(args: Any) -> Any:
                held, drawn, q, k, v = args
                out, new = self._extend_head(held._replace(length=seen), drawn, q, k, v, real)
                return out, new._replace(length=None)

            return over(of_head, (heads[0], cache.drawn, *heads[1:]))

        if isinstance(cache.heads, CertifiedCache) and tokens == 1:
            assert self.certify is not None
            one = (q[:, :, 0], by_head[0], by_head[1])
            out, heads = certified_step(self._of_head, self.certify, cache.heads, cache.drawn, one, lengths)
            out = out[:, :, None].astype(value.dtype)
        else:
            lengths_seen = cache.heads.length if ragged else None
            held: Any = cache.heads
            held = held._replace(length=None)
            out, heads = over(of_sequence, (held, q, *by_head, lengths_seen, lengths))
            new = tokens if lengths is None else jnp.clip(lengths, 0, tokens).astype(jnp.int32)
            heads = heads._replace(length=cache.heads.length + new)
        out = jnp.moveaxis(out, 2, 1).reshape(batch, tokens, query.shape[2], -1)
        return out, HeadsCache(heads, cache.drawn)

    def _extend_head(
        self, cache: Any, drawn: dict[str, Array], q: Array, k: Array, v: Array, real: Array | None
    ) -> tuple[Array, Any]:
        """`extend` for one key head and its queries ``[T, G, D]``."""
        decoder = self._of_head(drawn)
        if isinstance(decoder, CertifiedDecoder):
            out, cache = decoder.prefill(cache, q, k, v, None if real is None else jnp.clip(real, 0, k.shape[0]))
        elif k.shape[0] == 1 and real is None:
            cache = decoder.append(cache, k, v)
            out = decoder.attend(cache, q[0])[None]
        else:
            out, cache = jax.vmap(decoder.prefill, (None, 1, None, None, None), (1, None))(cache, q, k, v, real)
        return out.astype(v.dtype), cache

    def _of_head(self, drawn: dict[str, Array]) -> Any:
        if self.certify is not None:
            clusters = self.bound.certified(self.sizes["head_dim"], **drawn, max_length=self.room)
            return CertifiedDecoder(clusters=clusters, max_length=self.room, **self.sizes)
        running = self.bound.running(self.sizes["head_dim"], **drawn)
        return Decoder(running=running, cache_bits=self.cache_bits, **self.sizes)

    def _check(
        self, cache: HeadsCache, query: Array, key: Array, value: Array, lengths: Array | None, ragged: bool
    ) -> tuple[int, int]:
        for name, x in (("query", query), ("key", key), ("value", value)):
            check_floating(name, x)
        batch = jax.tree.leaves(cache.heads)[0].shape[0]
        for name, x, heads, size in (
            ("query", query, query.shape[-2] if query.ndim == 4 else None, self.sizes["head_dim"]),
            ("key", key, self.num_kv_heads, self.sizes["head_dim"]),
            ("value", value, self.num_kv_heads, self.sizes["value_dim"]),
        ):
            if x.shape != (batch, *key.shape[1:2], heads, size) or 0 in x.shape:
                raise ValueError(
                    f"{name} must be [B, T, heads, channels] with B = {batch}, {self.num_kv_heads} key heads and "
                    f"{size} channels, none of them 0, got shape {x.shape}"
                )
        if query.shape[2] % self.num_kv_heads:
            raise ValueError(f"key heads must divide query heads, got {self.num_kv_heads} and {query.shape[2]}")
        if lengths is not None and not ragged:
            raise ValueError(
                "lengths, or a mask of padding in a layer, need a ragged cache: init(..., ragged=True) or "
                "init_cache(..., ragged=True)"
            )
        if lengths is not None:
            check_lengths("lengths", lengths, key.shape[1])
            if lengths.shape != (batch,):
                raise ValueError(f"lengths must be [B] = {[batch]}, got shape {lengths.shape}")
        return batch, key.shape[1]
