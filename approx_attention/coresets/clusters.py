"""Clusters: merged tokens with the distances of their members, of all tokens or of a growing prefix."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from approx_attention.core import (
    WeightedKV,
    check_count,
    check_counts,
    check_key,
    in_float32,
    merge,
    require_scaled_space,
    root,
    squared_norm,
)
from approx_attention.coresets.clustering import lasting_places, merged, nearest
from approx_attention.coresets.coreset import centred_tokens
from approx_attention.kernels import require_same_kind


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Clusters:
    r"""Merged clusters of tokens, with the statistics of their members for `bounds.merge_bound_at`.

    .. math:: \delta_c = \max_{i \in c} \|k_i - k_c\|, \qquad \nu_c = \max_{i \in c} \|v_i - v_c\|, \qquad
              \sigma_c^2 = \frac{1}{m_c} \sum_{i \in c} m_i \|v_i - v_c\|^2.

    ``merge`` joins the clusters of disjoint sets of tokens.

    Attributes:
        tokens: mean keys ``[M, D]`` in scaled space, sums of values ``[M, Dv]`` and masses ``[M]``, of which 0 is an
            absent cluster.
        key_radius: :math:`\delta_c`, ``[M]``.
        value_radius: :math:`\nu_c`, ``[M]``.
        value_spread: :math:`\sigma_c`, ``[M]``.
        largest_value: the largest norm of a value, ``[]``.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention import WeightedKV
        >>> from approx_attention.coresets import Clusters
        >>> tokens = WeightedKV.of_tokens(jnp.array([[0.0], [2.0], [5.0]]), jnp.array([[1.0], [3.0], [4.0]]))
        >>> clusters = Clusters.of_members(tokens, jnp.array([0, 0, 1]), 2)
        >>> clusters.tokens.k[:, 0].tolist(), clusters.key_radius.tolist(), clusters.value_spread.tolist()
        ([1.0, 5.0], [1.0, 0.0], [1.0, 0.0])
    """

    tokens: WeightedKV
    key_radius: Array
    value_radius: Array
    value_spread: Array
    largest_value: Array

    @classmethod
    def of_tokens(cls, tokens: WeightedKV) -> Self:
        """Make one cluster of every token, with radii 0.

        Args:
            tokens: M tokens with non-negative masses in scaled space.

        Returns:
            The clusters, with keys 0 where tokens are absent.

        Raises:
            ValueError: tokens with signed masses, or with a scale.
        """
        if tokens.value_range is not None:
            raise ValueError("tokens with signed masses are not supported; make clusters of the original tokens")
        # The key of an absent token may have any value, and norms of all keys are used.
        k = jnp.where(tokens.mass[:, None] > 0, tokens.k, 0)
        tokens = dataclasses.replace(require_scaled_space("Clusters", tokens), k=k)
        zeros = jnp.zeros_like(tokens.mass)
        return cls(tokens, zeros, zeros, zeros, _largest_value(tokens))

    @classmethod
    @in_float32()  # a radius is a difference
    def of_members(cls, tokens: WeightedKV, label: Array, num_clusters: int) -> Self:
        """Merge tokens into clusters.

        A token of mass m counts as m equal tokens.

        Args:
            tokens: n tokens with non-negative masses in scaled space.
            label: the cluster of each token, int ``[n]``; a token with a label of ``num_clusters`` or more is left out.
            num_clusters: the number M of clusters; one without members is absent.

        Returns:
            The clusters, with their statistics over the members.

        Raises:
            ValueError: tokens with a scale.
        """
        require_scaled_space("Clusters", tokens)
        at = jnp.minimum(label, num_clusters - 1)
        inside = label < num_clusters
        mass, values = jnp.where(inside, tokens.mass, 0), tokens.values

        def mean(x: Array, total: Array) -> Array:
            # The key of an absent token may hold anything.
            sums = jax.ops.segment_sum(jnp.where(mass[:, None] > 0, x, 0) * mass[:, None], at, num_clusters)
            return sums / jnp.where(total > 0, total, 1)[:, None]

        def about_mean(x: Array, total: Array) -> tuple[Array, Array]:
            first = mean(x, total)
            # The rounding error of a sum grows with its length, and bounds depend on the mean: a second pass reduces
            # the error from that of the key to that of the radius.
            middle = first + mean(x - first[at], total)
            return middle, jnp.where(mass > 0, root(squared_norm(x - middle[at]))[:, 0], 0)

        total = jax.ops.segment_sum(mass, at, num_clusters)
        k, key_distance = about_mean(tokens.k, total)
        value, value_distance = about_mean(values, total)
        key_radius, value_radius = (
            # The maximum of an empty segment is the smallest number.
            jnp.maximum(jax.ops.segment_max(x, at, num_clusters), 0)
            for x in (key_distance, value_distance)
        )
        return cls(
            WeightedKV(k, value * total[:, None], total),
            key_radius,
            value_radius,
            root(mean(value_distance[:, None] ** 2, total)[:, 0]),
            _largest_value(dataclasses.replace(tokens, mass=mass)),
        )


def _largest_value(tokens: WeightedKV) -> Array:
    return jnp.max(jnp.where(tokens.mass > 0, root(squared_norm(tokens.values))[:, 0], 0), initial=0)


@merge.register
def _merge_clusters(a: Clusters, b: Any) -> Clusters:
    require_same_kind(a, b)
    key_radius, value_radius, value_spread = (
        jnp.concatenate([getattr(x, name) for x in (a, b)]) for name in ("key_radius", "value_radius", "value_spread")
    )
    largest_value = jnp.maximum(a.largest_value, b.largest_value)
    return Clusters(merge(a.tokens, b.tokens), key_radius, value_radius, value_spread, largest_value)


def clusters_around(
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    summary: WeightedKV,
    *,
    kv_mask: Bool[Array, " S"] | None = None,
) -> Clusters:
    """Merge every key into the nearest of some tokens, and measure the clusters.

    Args:
        k: keys ``[S, D]`` in scaled space (`fold_scale`).
        v: values ``[S, Dv]``.
        summary: tokens to merge into, such as a coreset, in scaled space; tokens without mass are ignored.
        kv_mask: true where a key is real ``[S]``.

    Returns:
        The `Clusters`, one for each token of the summary.

    Raises:
        ValueError: different numbers of keys and values, a summary that carries a scale.
        TypeError: keys or values that are not floating point.

    Example:
        >>> import jax
        >>> from approx_attention import summarize_coreset
        >>> from approx_attention.coresets import clusters_around
        >>> k, v = (jax.random.normal(jax.random.key(i), (64, 2)) for i in range(2))
        >>> coreset = summarize_coreset(k, v, jax.random.key(2), coreset_size=8, algorithm="farthest_merge")
        >>> clusters_around(k, v, coreset).tokens.mass.sum().tolist()
        64.0
    """
    summary = require_scaled_space("clusters_around", summary)
    tokens = WeightedKV.of_tokens(k, v, kv_mask)
    return Clusters.of_members(tokens, nearest(tokens.k, summary.k, summary.mass != 0), summary.mass.shape[0])


class CertifiedSummary(NamedTuple):
    """Clusters of a growing prefix, with all of its tokens kept, as pure functions.

    The logits are those of softmax over keys in scaled space.

    Attributes:
        init: ``(value_dim, dtype) -> state`` of the empty prefix.
        append: ``(state, tokens, start, block_size) -> state`` after merging the block of tokens that begins at
            ``start``. Every block is appended once, in order and without gaps. ``tokens`` are all tokens, by position.
        measured: ``(state, tokens) -> state`` with the statistics of the clusters, which ``read`` needs.
        read: ``state -> Clusters`` of the prefix.
    """

    init: Callable[[int, Any], Any]
    append: Callable[[Any, WeightedKV, Array, int], Any]
    measured: Callable[[Any, WeightedKV], Any]
    read: Callable[[Any], Clusters]


class _Labelled(NamedTuple):
    """The clusters, and the cluster of each position ``[max_length]``; the number of clusters if it has none yet."""

    clusters: Clusters
    label: Array


def running_clusters(
    head_dim: int, key: Array | None = None, *, coreset_size: int = 256, sinks: int = 4, max_length: int
) -> CertifiedSummary:
    """The folded coreset of `running_coreset` with the radii of its clusters.

    All tokens are kept, with a label each. Means and radii are recomputed from the members after each block, so that
    repeated merges do not loosen them.

    Args:
        head_dim: channels D of the keys.
        key: typed PRNG key.
        coreset_size: the number M of clusters.
        sinks: the number of initial tokens that are additional clusters of one token.
        max_length: capacity in tokens.

    Returns:
        The `CertifiedSummary`, for a `HeadsDecoder` with ``certify``.

    Raises:
        ValueError: counts below 1, no key.
    """
    head_dim, coreset_size, max_length = check_counts(
        head_dim=head_dim, coreset_size=coreset_size, max_length=max_length
    )
    sinks, drawn = check_count("sinks", sinks, least=0), check_key("coreset", key)
    num_clusters = sinks + coreset_size

    def init(value_dim: int, dtype: Any) -> _Labelled:
        tokens = WeightedKV.empty(num_clusters, head_dim, value_dim, dtype)
        return _Labelled(Clusters.of_tokens(tokens), jnp.full((max_length,), num_clusters, jnp.int32))

    def append(state: _Labelled, tokens: WeightedKV, start: Array, block_size: int) -> _Labelled:
        block = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, block_size), tokens)
        places = start + jnp.arange(block_size, dtype=jnp.int32)
        folded = dataclasses.replace(block, mass=jnp.where(places < sinks, 0, block.mass))
        joint = merge(jax.tree.map(lambda x: x[sinks:], state.clusters.tokens), folded)
        middle, centred = centred_tokens(joint)
        chosen = lasting_places(centred, coreset_size, jax.random.fold_in(drawn, start))
        place = nearest(centred.k, centred.k[chosen], centred.mass[chosen] > 0)
        clusters = merged(centred, place, coreset_size)
        clusters = dataclasses.replace(clusters, k=clusters.k + middle[None, :])

        first = jax.tree.map(lambda x: x[:sinks], state.clusters.tokens)
        if sinks:
            at = jnp.where(places < sinks, places, sinks)
            first = jax.tree.map(lambda room, x: room.at[at].set(x, mode="drop"), first, block)
        # Tokens follow their clusters; sinks, and positions without a cluster, stay.
        old = state.label - sinks
        moves = (old >= 0) & (old < coreset_size)
        label = jnp.where(moves, sinks + place[jnp.clip(old, 0, coreset_size - 1)], state.label)
        new = jnp.where(places < sinks, places, sinks + place[coreset_size:])
        new = jnp.where(block.mass > 0, new, num_clusters).astype(jnp.int32)
        label = lax.dynamic_update_slice_in_dim(label, new, start, 0)
        return _Labelled(dataclasses.replace(state.clusters, tokens=merge(first, clusters)), label)

    def measured(state: _Labelled, tokens: WeightedKV) -> _Labelled:
        return state._replace(clusters=Clusters.of_members(tokens, state.label, num_clusters))

    return CertifiedSummary(init, append, measured, read=lambda state: state.clusters)
