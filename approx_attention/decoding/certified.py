"""Decoding with an error bound for every step: from clusters if the bound is small enough, else from all tokens."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from approx_attention.bounds import merge_bound_at
from approx_attention.core import WeightedKV, attend, each, fold_scale, in_float32, merge, streamed_state
from approx_attention.coresets import CertifiedSummary, Clusters


class Certificate(NamedTuple):
    """The certificate of the steps so far, for each sequence and key head ``[B, K]``.

    Attributes:
        steps: number of steps of one token.
        exact_steps: number of steps that used all tokens.
        promised: the largest error bound of the other steps, in units of the largest norm of a value so far. It does
            not include the rounding of outputs to a narrower dtype.
    """

    steps: Array
    exact_steps: Array
    promised: Array


class CertifiedCache(NamedTuple):
    """The cache of one head: all tokens, and clusters of all tokens except the last one or two blocks.

    Attributes:
        tokens: all tokens by position ``[max_length]``, with mass 0 where there is none yet.
        prefix: the state of the clusters (`coresets.CertifiedSummary`).
        certificate: the `Certificate`.
        length: the number of tokens seen.
    """

    tokens: WeightedKV
    prefix: Any
    certificate: Certificate
    length: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class CertifiedDecoder:
    """Operations on one head of a certified cache: the parts of a step, and a prefill.

    A step consists of several functions, because all parts except exact attention are mapped over heads; a mapped
    condition would compute both of its branches.
    """

    clusters: CertifiedSummary
    max_length: int
    head_dim: int
    value_dim: int
    block_size: int
    scale: float | None
    dtype: Any

    def init(self) -> CertifiedCache:
        """An empty cache."""
        tokens = WeightedKV.empty(self.max_length, self.head_dim, self.value_dim, self.dtype)
        none = jnp.zeros((), jnp.int32)
        certificate = Certificate(none, none, jnp.zeros((), self.dtype))
        return CertifiedCache(tokens, self.clusters.init(self.value_dim, self.dtype), certificate, none)

    def prefill(
        self, cache: CertifiedCache, q: Array, k: Array, v: Array, num_real: Array | None
    ) -> tuple[Array, CertifiedCache]:
        """Append T tokens, and attend exactly and causally at each of them.

        Args:
            cache: the tokens so far.
            q: queries ``[T, G, D]`` of the query heads that share the key head, unscaled.
            k: keys ``[T, D]``.
            v: values ``[T, Dv]``.
            num_real: the number of real tokens, which come first; None if all are.

        Returns:
            Outputs ``[T, G, Dv]``, 0 in padding, and the cache. It contains NaN if there are more than ``max_length``
            tokens, since a compiled program cannot raise an error.
        """
        num_tokens, start = k.shape[0], cache.length
        num_real = jnp.asarray(num_tokens if num_real is None else num_real, jnp.int32)
        real = jnp.arange(num_tokens, dtype=jnp.int32) < num_real
        q, new = self._scaled(jnp.where(real[:, None, None], q, 0), k, v, real)
        with in_float32():
            before = attend(q.reshape(-1, self.head_dim), cache.tokens)
            before = jax.tree.map(lambda x: x.reshape(num_tokens, -1, *x.shape[1:]), before)
            own = jax.vmap(
                lambda q: streamed_state(q, new.k, new.value_sum, real, is_causal=True), in_axes=1, out_axes=1
            )(q)
        out = jnp.where(real[:, None, None], merge(before, own).out, 0)

        place = jnp.where(real, start + jnp.arange(num_tokens, dtype=jnp.int32), self.max_length)
        tokens = jax.tree.map(lambda room, x: room.at[place].set(x, mode="drop"), cache.tokens, new)
        # A compiled program cannot raise an error: tokens beyond the capacity become NaN.
        over = start + num_real > self.max_length
        value_sum = tokens.value_sum.at[-1].set(jnp.where(over, jnp.nan, tokens.value_sum[-1]))
        tokens = dataclasses.replace(tokens, value_sum=value_sum)

        first, last = self._num_folded(start), self._num_folded(start + num_real)

        def fold(index: Array, prefix: Any) -> Any:
            def folded() -> Any:
                return self.clusters.append(prefix, tokens, (first + index) * self.block_size, self.block_size)

            return lax.cond(first + index < last, folded, lambda: prefix)

        prefix = lax.fori_loop(0, num_tokens // self.block_size + 1, fold, cache.prefix)
        prefix = lax.cond(first < last, lambda: self.clusters.measured(prefix, tokens), lambda: prefix)
        return out, CertifiedCache(tokens, prefix, cache.certificate, start + num_real)

    def due(self, length: Array) -> Array:
        """Whether the next token begins a block, so that the block before the last is added to the clusters."""
        return (length % self.block_size == 0) & (length >= 2 * self.block_size)

    def fold(self, prefix: Any, tokens: WeightedKV, length: Array) -> Any:
        """Add the block that is due to the clusters.

        Args:
            prefix: the state of the clusters.
            tokens: all tokens so far ``[max_length]``.
            length: the number of tokens seen; the block begins ``2 * block_size`` tokens before it.

        Returns:
            The state of the clusters with the block.
        """
        start = jnp.maximum(length - 2 * self.block_size, 0)
        return self.clusters.measured(self.clusters.append(prefix, tokens, start, self.block_size), tokens)

    def put(self, tokens: WeightedKV, length: Array, q: Array, k: Array, v: Array, real: Array) -> tuple[Any, Array]:
        """Add one token, and scale its queries.

        Args:
            tokens: all tokens so far ``[max_length]``.
            length: the number of tokens seen, which is the position of the token.
            q: queries ``[G, D]``.
            k: its key ``[1, D]``.
            v: its value ``[1, Dv]``.
            real: whether the token is real, a boolean without axes.

        Returns:
            All tokens, and the queries ``[G, D]`` in scaled space.
        """
        q, new = self._scaled(q[None], k, jnp.where(length < self.max_length, v, jnp.nan), real[None])
        return jax.tree.map(lambda room, x: lax.dynamic_update_slice_in_dim(room, x, length, 0), tokens, new), q[0]

    def promise(self, prefix: Any, tokens: WeightedKV, length: Array, q: Array) -> tuple[Array, Array, Array]:
        """Attend to clusters and recent tokens, and bound the error.

        Args:
            prefix: the state of the clusters.
            tokens: all tokens so far ``[max_length]``.
            length: the number of tokens seen, with the current one.
            q: queries ``[G, D]`` in scaled space.

        Returns:
            Outputs ``[G, Dv]``, the largest error bound of the queries, and the largest norm of a value.
        """
        start = self._num_folded(length) * self.block_size
        near = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, 2 * self.block_size), tokens)
        clusters = merge(self.clusters.read(prefix), Clusters.of_tokens(near))
        with in_float32():
            out = attend(q, clusters.tokens).out
        return out, jnp.max(merge_bound_at(q, clusters)), clusters.largest_value

    def _num_folded(self, length: Array) -> Array:
        """The number of blocks in the clusters, all but the last two."""
        return jnp.maximum(-(-length // self.block_size) - 2, 0)

    def _scaled(self, q: Array, k: Array, v: Array, real: Array) -> tuple[Array, WeightedKV]:
        """Queries and tokens in scaled space and in the dtype of the cache, zero in padding."""
        k, v = (jnp.where(real[:, None], x, 0).astype(self.dtype) for x in (k, v))
        q, k = fold_scale(q.astype(self.dtype), k, self.scale)
        return q, WeightedKV(k, v, real.astype(self.dtype))


def certified_step(
    decoder_of: Callable[[dict[str, Array]], CertifiedDecoder],
    tolerance: float | Array,
    cache: CertifiedCache,
    drawn: dict[str, Array],
    tokens: tuple[Array, Array, Array],
    real: Array | None,
) -> tuple[Array, CertifiedCache]:
    """Decode one token of every sequence and head.

    Args:
        decoder_of: makes the decoder of a head from its random arrays.
        tolerance: the largest accepted error bound, in units of the largest value norm.
        cache: with axes ``[B, K]``; its ``length`` is one number or ``[B]``.
        drawn: the random arrays of each key head ``[K, ...]``.
        tokens: queries ``[B, K, G, D]``, keys ``[B, K, 1, D]`` and values ``[B, K, 1, Dv]``.
        real: mask of the sequences with a token, ``[B]``; all by default.

    Returns:
        Outputs ``[B, K, G, Dv]``, 0 where there is no token, and the new cache.
    """
    q, k, v = tokens
    num_batches, ragged = k.shape[0], cache.length.ndim == 1
    before = jnp.broadcast_to(cache.length, (num_batches,))
    more = jnp.ones((num_batches,), bool) if real is None else real > 0
    after = before + more.astype(jnp.int32)

    def over(function: Callable[..., Any], of_head: Any, of_sequence: Any, *, together: bool) -> Any:
        """``function(decoder, *of_head, *of_sequence)`` of every head."""

        def sequence(args: Any) -> Any:
            heads, same = args
            # A common length is not a mapped axis, so that access to the cache is a slice instead of a gather.
            same = same if ragged else of_sequence_of_all
            head = lambda args: function(decoder_of(args[1]), *args[0], *same)  # noqa: E731
            return each(head, (heads, drawn), together=together)

        of_sequence_of_all = jax.tree.map(lambda x: x[0], of_sequence)
        return each(sequence, (of_head, of_sequence), together=together)

    # Before anything else: an update after a condition has read the tokens would copy all of them.
    seen, q = over(
        lambda decoder, seen, q, k, v, length, more: decoder.put(seen, length, q, k, v, more),
        (cache.tokens, q, k, v),
        (before, more),
        together=True,
    )

    def fold() -> Any:
        def of_head(decoder: Any, prefix: Any, tokens: WeightedKV, length: Array, more: Array) -> Any:
            new = decoder.fold(prefix, tokens, length)
            return jax.tree.map(lambda x, y: jnp.where(decoder.due(length) & more, x, y), new, prefix)

        return over(of_head, (cache.prefix, seen), (before, more), together=False)

    decoder = decoder_of(jax.tree.map(lambda x: x[0], drawn))
    # One condition for all sequences: if lengths differ, all are folded when one is due, and results are selected.
    prefix = lax.cond(jnp.any(decoder.due(before) & more), fold, lambda: cache.prefix)
    out, bound, largest = over(
        lambda decoder, prefix, seen, q, length: decoder.promise(prefix, seen, length, q),
        (prefix, seen, q),
        (after,),
        together=True,
    )
    more = more[:, None]
    # Not `bound > ...`: NaN, which marks an overflow of the cache, must stay visible.
    falls = more & ~(bound <= jnp.asarray(tolerance, bound.dtype) * largest)
    out = lax.cond(jnp.any(falls), lambda: _exact_where(falls, seen, q, out), lambda: out)
    share = jnp.where(falls | ~more, 0, bound / jnp.where(largest > 0, largest, 1))
    certificate = Certificate(
        cache.certificate.steps + jnp.broadcast_to(more, falls.shape).astype(jnp.int32),
        cache.certificate.exact_steps + falls.astype(jnp.int32),
        jnp.maximum(cache.certificate.promised, share),
    )
    length = after if ragged else cache.length + 1
    return jnp.where(more[..., None, None], out, 0), CertifiedCache(seen, prefix, certificate, length)


def _exact_where(falls: Array, tokens: WeightedKV, q: Array, out: Array) -> Array:
    """Exact attention for the heads ``[B, K]`` that fall back, one after the other; other outputs are unchanged."""
    places = jnp.stack(jnp.meshgrid(*(jnp.arange(n) for n in falls.shape), indexing="ij"), axis=-1).reshape(-1, 2)

    def of_head(place: Array) -> Array:
        b, h = place[0], place[1]

        def exact() -> Array:
            # Sliced inside the branch; the loop would copy the tokens of every head.
            with in_float32():
                return attend(q[b, h], jax.tree.map(lambda x: x[b, h], tokens)).out

        return lax.cond(falls[b, h], exact, lambda: out[b, h])

    return lax.map(of_head, places).reshape(out.shape)
