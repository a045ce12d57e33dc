r"""One synthetic token per chunk P of keys: key :math:`\tilde k_P`, value :math:`\beta_P`, mass :math:`|P|`."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from approx_attention.core import (
    HIDDEN,
    AttentionState,
    FeatureMoments,
    PositiveFeatures,
    Segments,
    check_choice,
    check_key,
    control_variate_state,
    dense_state,
    mask_bias,
    merge,
    noise_deviation,
    pad_rows,
    proposal_noise,
    real_keys,
    segment_means,
    segments_of,
    squared_norm,
)
from approx_attention.methods.eva.layouts import Parts

ProposalMean = Literal["q+k", "half", "k"]
PoolingVectors = tuple[Array, Array]


class Tokens(NamedTuple):
    """Queries, keys and values in scaled space, with masks of real tokens (None if all are real)."""

    q: Array
    k: Array
    v: Array
    q_mask: Array | None
    kv_mask: Array | None

    def in_order(self, order: np.ndarray) -> "Tokens":
        """The tokens in another order."""
        return jax.tree.map(lambda x: x[order], self)


class Recipe(NamedTuple):
    """The arguments of `eva` that decide how a chunk becomes one token."""

    key: Array | None
    pooling_vectors: PoolingVectors | None
    chunk_keys: Array | None
    proposal_mean: ProposalMean | Array | None
    num_samples: int
    noise: Array | None
    noise_scale: Literal["exact", "official"]
    count_correction: bool
    is_causal: bool

    @property
    def given(self) -> dict[str, Array | None]:
        """The arrays with one row per chunk."""
        mean = None if isinstance(self.proposal_mean, str) else self.proposal_mean
        return {"chunk_keys": self.chunk_keys, "noise": self.noise, "proposal_mean": mean}

    def key_of(self, level: int) -> Array | None:
        """The PRNG key of the noise of a level of chunks; None where no noise is sampled."""
        if self.key is None or self.noise is not None:
            return None
        return jax.random.fold_in(check_key("eva", self.key), level)


class Chunks(NamedTuple):
    r"""The synthetic tokens of C chunks.

    Attributes:
        k: :math:`\tilde k` ``[C, D]``.
        beta: coefficients at the first direction of each, ``[C, Dv]``.
        log_mass: logarithms of :math:`|P|` ``[C]``.
        moments: the feature moments of chunks with several directions, whose coefficients depend on the query.
    """

    k: Array
    beta: Array
    log_mass: Array
    moments: FeatureMoments | None


def summarize_chunks(tokens: Tokens, parts: Parts, recipe: Recipe, level: int = 0) -> Chunks:
    """The synthetic tokens of the chunks; each level has independent noise."""
    segments, head_dim, dtype = parts.segments, tokens.k.shape[1], tokens.k.dtype
    shape = len(segments.member), head_dim
    members = tokens.k, tokens.v, real_keys(tokens.kv_mask, tokens.k.shape[0])
    k, v, inside = (segments.gather(x) for x in members)
    log_count = mask_bias(inside, dtype)
    mu = _proposal_means(tokens, segments, recipe)
    noise = proposal_noise(recipe.noise, recipe.key_of(level), recipe.num_samples, shape, dtype, parts.used)
    w = mu[None] + noise_deviation(recipe.noise_scale, head_dim) * noise
    if recipe.chunk_keys is None:
        keys = pooled_keys(k, log_count, recipe.pooling_vectors)
    elif recipe.chunk_keys.shape == shape:
        keys = recipe.chunk_keys
    else:
        raise ValueError(f"chunk_keys must be [C, D] = {list(shape)}, got shape {recipe.chunk_keys.shape}")
    moments = None
    if w.shape[0] > 1:
        moments = jax.vmap(_weighted_moments, in_axes=(1, 0, 0, 0, 0))(w, mu, k, v, inside)
    count = jnp.sum(inside, axis=1).astype(dtype)
    log_mass = jnp.log(jnp.maximum(count, 1)) if recipe.count_correction else jnp.zeros_like(count)
    log_mass = jnp.where(count > 0, log_mass, HIDDEN)
    return Chunks(keys.astype(dtype), coefficients(k, v, log_count, w[0]), log_mass, moments)


def attend_chunks(q: Array, near: AttentionState, chunks: Chunks, log_mass: Array) -> AttentionState:
    """The states ``near`` merged with attention to chunks, of log-masses ``[T, C]`` or ``[1, C]``."""
    if chunks.moments is None:
        # With one direction the coefficient is the same for every query: the density of the proposal cancels.
        # As 0 times NaN, the coefficient of a hidden chunk would reach every query, so NaN is restored separately.
        finite = jnp.all(jnp.isfinite(chunks.beta), axis=1)
        far = dense_state(q, chunks.k, jnp.where(finite[:, None], chunks.beta, 0), log_mass)
        lost = jnp.any((log_mass > HIDDEN / 2) & ~finite[None, :], axis=1)
        return merge(near, AttentionState(jnp.where(lost[:, None], jnp.nan, far.out), far.lse))
    logits = jnp.where(log_mass <= HIDDEN / 2, -jnp.inf, q @ chunks.k.T + log_mass)
    return control_variate_state(q, near, chunks.moments, logits)


def _proposal_means(tokens: Tokens, segments: Segments, recipe: Recipe) -> Array:
    r"""The means :math:`\mu_P` ``[C, D]`` of the proposals."""
    k, given = tokens.k, recipe.proposal_mean
    shape = len(segments.member), k.shape[1]
    if recipe.pooling_vectors is not None:
        return jnp.broadcast_to(recipe.pooling_vectors[1].astype(k.dtype)[None], shape)
    if given is not None and not isinstance(given, str):
        if given.shape != shape:
            raise ValueError(f"proposal_mean must be [C, D] = {list(shape)}, got shape {given.shape}")
        return given.astype(k.dtype)
    kind = given or "q+k"
    check_choice("proposal_mean", kind, ("q+k", "half", "k"))
    k_mean = segment_means(k, segments, tokens.kv_mask)
    if kind == "k":
        return k_mean
    return (query_means(tokens, segments, recipe.is_causal) + k_mean) * (0.5 if kind == "half" else 1.0)


def query_means(tokens: Tokens, segments: Segments, is_causal: bool) -> Array:
    r"""The means :math:`\bar q_P` ``[C, D]`` of the queries that belong to each chunk of keys."""
    q, _, _, q_mask, kv_mask = tokens
    num_queries, num_keys = q.shape[0], tokens.k.shape[0]
    if num_queries == num_keys:
        return segment_means(q, segments, q_mask)
    if is_causal:  # later queries would leak the future
        more = max(0, num_keys - num_queries)
        asked = pad_rows(real_keys(q_mask, num_queries)[:num_keys], more) & real_keys(kv_mask, num_keys)
        return segment_means(pad_rows(q[:num_keys], more), segments, asked)
    # Queries of another sequence belong to no chunk.
    return jnp.broadcast_to(segment_means(q, segments_of(num_queries, 1), q_mask), (len(segments.member), q.shape[1]))


def pooled_keys(k: Array, log_count: Array, pooling_vectors: PoolingVectors | None) -> Array:
    """The key of each chunk ``k [C, j, D]``: the mean, or the softmax mean by a learned vector."""
    logits = log_count if pooling_vectors is None else k @ pooling_vectors[0].astype(k.dtype) + log_count
    return _softmax_means(logits, log_count, k)


def coefficients(k: Array, v: Array, log_count: Array, w: Array) -> Array:
    r"""Control-variate coefficients :math:`\beta` ``[C, Dv]`` of chunks ``k [C, j, D]`` at directions ``w [C, D]``."""
    logits = jnp.einsum("cjd,cd->cj", k, w) - jnp.sum(k * k, axis=-1) / 2 + log_count
    return _softmax_means(logits, log_count, v)


def _softmax_means(logits: Array, log_count: Array, x: Array) -> Array:
    # A chunk without a real key has equal logits, so that gradients stay finite.
    return jnp.einsum("cj,cjd->cd", jax.nn.softmax(jnp.where(log_count <= HIDDEN / 2, HIDDEN, logits), axis=1), x)


def _weighted_moments(w: Array, mu: Array, k: Array, v: Array, inside: Array) -> FeatureMoments:
    """The features of one chunk at directions ``w [R, D]`` around ``mu``, with their importance weights."""
    # log N(w; 0, I) / N(w; mu, I).
    log_weight = squared_norm(mu[None])[:, 0] / 2 - w @ mu
    return FeatureMoments.of_tokens(PositiveFeatures(w), k, v, inside).weighted(log_weight)
