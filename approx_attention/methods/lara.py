"""Linear randomised attention: multiple importance sampling with a few proposals shared by all queries."""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float

from approx_attention.core import (
    FEATURE_BLOCK,
    HIDDEN,
    AttentionState,
    FeatureMoments,
    PositiveFeatures,
    as_pair,
    attend,
    check_choice,
    check_count,
    check_finite,
    check_flag,
    check_floats,
    check_key,
    check_number,
    head_inputs,
    landmark_means,
    map_rows,
    noise_deviation,
    output_or_state,
    paired_means,
    proposal_noise,
    query_mask,
    squared_norm,
)

# The smallest weight of the query-specific rule, as in the authors' code; its logarithm must be finite.
LEAST_WEIGHT = 1e-8


@output_or_state
def lara(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    num_landmarks: int = 64,
    weights: Literal["balance", "query_specific", "biased"] = "balance",
    correction: float | Array = 1.0,
    proposal_mean: Float[Array, "C D"] | None = None,
    query_landmarks: Float[Array, "C D"] | None = None,
    spatial_shape: tuple[int, int] | None = None,
    num_samples: int = 1,
    antithetic: bool = False,
    noise: Float[Array, "R C D"] | None = None,
    noise_scale: Literal["exact", "official"] = "exact",
    kv_mask: Bool[Array, " S"] | None = None,
    q_mask: Bool[Array, " T"] | None = None,
    scale: float | Array | None = None,
) -> AttentionState:
    r"""LARA: softmax attention by importance sampling from C Gaussians centred on pooled queries and keys.

    With :math:`q, k` scaled by :math:`\sqrt s`, :math:`\xi(x, w) = e^{w \cdot x - \|x\|^2/2}`, segment means
    :math:`\bar q_c, \bar k_c`, proposals :math:`w_c \sim N(\mu_c, I)` and :math:`\mu_c = \bar q_c + \bar k_c`,

    .. math:: \mathrm{out}_t = \frac{\sum_c u_{tc}\, f_c}{\sum_c u_{tc}}, \qquad
              f_c = \frac{\sum_j \xi(k_j, w_c)\, v_j}{\sum_j \xi(k_j, w_c)}, \qquad
              u_{tc} = \alpha_{tc}\, \frac{\xi(q_t, w_c) \sum_j \xi(k_j, w_c)}{\xi(\mu_c, w_c)}.

    The weights :math:`\alpha` combine the proposals:

    - ``"balance"``: :math:`\xi(\mu_c, w_c) / \sum_{c'} \xi(\mu_{c'}, w_c)`. The normaliser is then unbiased, and the
      summary is a `FeatureMoments` with directions w.
    - ``"query_specific"``: the balance weight plus ``correction`` times
      :math:`r_{tc} - \frac1C \sum_{c'} r_{tc'}`, where
      :math:`r_{tc} = e^{q_t \cdot \bar q_c} / \sum_{t'} e^{q_{t'} \cdot \bar q_c}`. This is the paper's rule and the
      default of its code. It depends on all queries. Negative weights are clamped to 1e-8 and have no gradient.
    - ``"biased"``: :math:`e^{\mu_c \cdot q_t}` over the density of the mixture, without a correction for the bias.

    Without a PRNG key the noise is off, :math:`w_c = \mu_c`: deterministic, like the authors' code in evaluation.
    Segments are cut over real tokens, those of an image over all pixels.

    Shared arguments: see `approx_attention.methods`.

    Args:
        num_landmarks: the number C of proposals, at most the number of real queries and of real keys.
        weights: the rule for :math:`\alpha`.
        correction: the factor of the query-specific term; only for that rule.
        proposal_mean: :math:`\mu` ``[C, D]`` in scaled space, for example learned, in place of the pooled means;
            ``num_landmarks`` is then ignored.
        query_landmarks: :math:`\bar q` ``[C, D]`` in scaled space in place of the pooled means, also in
            :math:`\mu` unless ``proposal_mean`` is given.
        spatial_shape: height and width of an image whose pixels are the tokens, row by row. The segments are then
            rectangles; their number is the largest square up to C.
        num_samples: samples per proposal, unless ``noise`` is given.
        antithetic: also use the negated noise, which doubles the number of samples.
        noise: standard normal noise ``[R, C, D]``; by default sampled.
        noise_scale: ``"exact"``, or ``"official"`` for the noise of the authors' code, :math:`D^{1/4}` times too small.

    Raises:
        ValueError: shapes that do not match, counts below 1, unknown rules.
        TypeError: dtypes that are not floating point.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import exact, lara
        >>> q, k, v = (0.5 * jax.random.normal(jax.random.key(i), (64, 8)) for i in range(3))
        >>> error = jnp.linalg.norm(lara(q, k, v, jax.random.key(3), num_samples=64) - exact(q, k, v))
        >>> bool(error < 0.3 * jnp.linalg.norm(exact(q, k, v)))
        True

    Reference:
        :cite:p:`zheng2022linear`, section 4.
    """
    check_choice("weights", weights, ("balance", "query_specific", "biased"))
    deviation = noise_deviation(noise_scale, q.shape[-1])
    num_samples, antithetic = check_count("num_samples", num_samples), check_flag("antithetic", antithetic)
    check_number("correction", correction)
    check_finite("correction", correction)
    if spatial_shape is not None:
        spatial_shape = as_pair("spatial_shape", spatial_shape)
    check_floats(proposal_mean=proposal_mean, query_landmarks=query_landmarks, noise=noise)
    q, k, v = head_inputs(q, k, v, scale=scale, kv_mask=kv_mask)
    q_mask = query_mask(q_mask, kv_mask, q.shape[0])
    count = min(check_count("num_landmarks", num_landmarks), q.shape[0], k.shape[0])
    if proposal_mean is None:
        q_bar, k_bar, present = paired_means(q, k, count, q_mask, kv_mask, spatial_shape)
        q_bar = _like_proposals(q_bar if query_landmarks is None else query_landmarks, k_bar)
        mu = k_bar + q_bar
    else:
        mu, present = proposal_mean.astype(q.dtype), None
        if mu.ndim != 2 or mu.shape[1] != q.shape[1]:
            raise ValueError(f"proposal_mean must be [C, D] with D = {q.shape[1]}, got shape {mu.shape}")
        if query_landmarks is None and weights == "query_specific":
            query_landmarks = landmark_means(q, mu.shape[0], q_mask, spatial_shape)
        q_bar = _like_proposals(mu if query_landmarks is None else query_landmarks, mu)

    key = None if key is None or noise is not None else check_key("lara", key)
    num_present = None if present is None else jnp.sum(present, dtype=jnp.int32)
    epsilon = deviation * proposal_noise(noise, key, num_samples, mu.shape, mu.dtype, num_present)
    if antithetic:
        epsilon = jnp.concatenate([epsilon, -epsilon])
    samples = _Samples.of(mu, epsilon, present)
    moments = FeatureMoments.of_tokens(PositiveFeatures(samples.w), k, v, kv_mask)
    if weights == "balance":
        return _balanced(q, moments, samples)

    w, own = samples.w, samples.own
    f, log_sum = _of_keys(moments, samples)
    balance = jnp.exp(samples.log_own - samples.log_mixture)
    log_affinity = _log_affinity(q, q_bar, q_mask)
    # Proposals without real tokens are left out of means over the proposals, unless all are without.
    counted = None if present is None else (present | ~jnp.any(present))[None, :]

    def attend_rows(q: Array) -> AttentionState:
        log_weight = q @ w.T - squared_norm(q) / 2 + log_sum[None, :]
        if weights == "biased":
            log_weight = log_weight + q @ mu.T[:, own] - samples.log_mixture[None, :]
        else:
            # A share of the sum over all real queries is at most 1, except for padded queries.
            r = jnp.exp(jnp.minimum(q @ q_bar.T - log_affinity[None, :], 0))
            alpha = balance[None, :] + correction * (r - jnp.mean(r, axis=1, keepdims=True, where=counted))[:, own]
            log_weight = log_weight - samples.log_own[None, :] + jnp.log(jnp.maximum(alpha, LEAST_WEIGHT))
        lse = jax.nn.logsumexp(log_weight, axis=1) - math.log(epsilon.shape[0])
        out = jax.nn.softmax(log_weight, axis=1) @ f
        # Without real keys all log-weights are HIDDEN; NaN is passed on.
        seen = ~(lse < HIDDEN / 2)
        return AttentionState(jnp.where(seen[:, None], out, 0), jnp.where(seen, lse, -jnp.inf))

    # By blocks of rows, so that no array with a row per query and a column per sample exists.
    return map_rows(jax.checkpoint(attend_rows), q, FEATURE_BLOCK)


def _like_proposals(q_bar: Array, mu: Array) -> Array:
    if q_bar.shape != mu.shape:
        raise ValueError(
            f"query_landmarks (by default pooled) must be [C, D] = {list(mu.shape)} like the proposals, "
            f"got shape {q_bar.shape}"
        )
    return q_bar.astype(mu.dtype)


class _Samples(NamedTuple):
    r"""The RC samples of C proposals.

    Attributes:
        w: the samples ``[RC, D]``.
        own: the index of each sample's proposal ``[RC]``.
        log_own: :math:`\log \xi(\mu_c, w)` for its own proposal ``[RC]``: the density relative to N(0, I).
        log_mixture: the logarithm of the sum of these densities over all proposals ``[RC]``.
        present: mask of the proposals with real tokens ``[C]``, None for all.
    """

    w: Array
    own: np.ndarray
    log_own: Array
    log_mixture: Array
    present: Array | None

    @classmethod
    def of(cls, mu: Array, epsilon: Array, present: Array | None) -> "_Samples":
        """The samples of proposals ``mu [C, D]`` with noise ``[R, C, D]``."""
        num_samples, num_proposals, head_dim = epsilon.shape
        own = np.arange(num_samples * num_proposals) % num_proposals
        w = (mu[None] + epsilon).reshape(-1, head_dim)
        log_density = w @ mu.T - squared_norm(mu).T / 2
        if present is not None:
            log_density = jnp.where(present[None, :], log_density, HIDDEN)
        log_own = log_density[np.arange(len(own)), own]
        log_own = log_own if present is None else jnp.where(present[own], log_own, 0)
        log_mixture = jax.nn.logsumexp(log_density, axis=1)
        # Without any proposal the mixture is 0: shares of it would be infinite, and hidden weights NaN.
        log_mixture = log_mixture if present is None else jnp.where(jnp.any(present), log_mixture, 0)
        return cls(w, own, log_own, log_mixture, present)


def _balanced(q: Array, moments: FeatureMoments, samples: _Samples) -> AttentionState:
    """The balance heuristic: random features with weights that do not depend on the query."""
    # Features contain a factor of 1/sqrt(RC), so products are means over all samples. The sum over proposals averages R
    # samples of each, which is C times that mean.
    num_proposals = int(samples.own[-1]) + 1
    log_weight = math.log(num_proposals) - samples.log_mixture
    if samples.present is not None:
        log_weight = jnp.where(samples.present[samples.own], log_weight, HIDDEN)
    return attend(q, moments.weighted(log_weight))


def _of_keys(moments: FeatureMoments, samples: _Samples) -> tuple[Array, Array]:
    r""":math:`f_c` ``[RC, Dv]`` and :math:`\log \sum_j \xi(k_j, w_c)` ``[RC]``, ``HIDDEN`` for an absent proposal."""
    hidden = moments.mass == 0
    mass = jnp.where(hidden, 1, moments.mass)
    f = moments.value_sum / mass[:, None]
    if samples.present is not None:
        hidden = hidden | ~samples.present[samples.own]
    # Without the factor of 1/sqrt(RC) that features contain.
    log_sum = jnp.log(mass) + moments.log_scale + 0.5 * math.log(len(samples.own))
    return f, jnp.where(hidden, HIDDEN, log_sum)


def _log_affinity(q: Array, q_bar: Array, q_mask: Array | None) -> Array:
    r""":math:`\log \sum_t e^{q_t \cdot \bar q_c}` ``[C]`` over real queries; 0 without any."""
    affinity = q @ q_bar.T
    if q_mask is not None:
        affinity = jnp.where(q_mask[:, None], affinity, HIDDEN)
    log_affinity = jax.nn.logsumexp(affinity, axis=0)
    return jnp.where(log_affinity < HIDDEN / 2, jnp.zeros_like(log_affinity), log_affinity)
