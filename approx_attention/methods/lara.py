"""Linear randomised attention: a handful of proposals, shared by all queries, by multiple importance sampling."""

import math
from typing import Literal

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
    draw_of_size,
    head_inputs,
    landmark_means,
    map_rows,
    output_or_state,
    paired_means,
    query_mask,
    squared_norm,
)

# What the authors' code clamps the weights of its query-specific rule to.
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

    The weights :math:`\alpha` decide between the proposals:

    - ``"balance"``: :math:`\xi(\mu_c, w_c) / \sum_{c'} \xi(\mu_{c'}, w_c)`. The normaliser is then unbiased, and the
      method a `FeatureMoments` with directions w.
    - ``"query_specific"``: the same plus ``correction`` times
      :math:`r_{tc} - \frac1C \sum_{c'} r_{tc'}`, where
      :math:`r_{tc} = e^{q_t \cdot \bar q_c} / \sum_{t'} e^{q_{t'} \cdot \bar q_c}`. It is the paper's rule and the
      default of its code. It looks at all queries, and where it would be negative it is clamped to 1e-8 and has no
      gradient.
    - ``"biased"``: :math:`e^{\mu_c \cdot q_t}` over the mixture's density, without correction for it.

    Without a key the noise is off, :math:`w_c = \mu_c`: deterministic, and what the authors' code evaluates with.

    Shared arguments: see `approx_attention.methods`.

    Args:
        key: typed PRNG key of the noise, or none for no noise.
        num_landmarks: the number C of proposals; no more than there are real queries and real keys.
        weights: the rule for :math:`\alpha`.
        correction: how much of the query-specific term, for that rule.
        proposal_mean: :math:`\mu` ``[C, D]`` in scaled space in place of the pooled ones, for instance learned; beside
            it ``num_landmarks`` is not read.
        query_landmarks: :math:`\bar q` ``[C, D]`` in scaled space for the query-specific rule in place of pooled ones.
        spatial_shape: height and width of an image that the tokens are, row by row; the segments are then rectangles of
            it, as many as the greatest square number up to C.
        num_samples: draws per proposal, unless ``noise`` is given.
        antithetic: also use the negative of every noise, which doubles the samples.
        noise: standard normal noise ``[R, C, D]`` in place of a draw.
        noise_scale: ``"exact"``, or ``"official"`` for the noise of the authors' code, :math:`D^{1/4}` times too small.
        kv_mask: true where a key is real, ``[S]``; segments are of real tokens, in an image of all pixels. A query that
            sees no key gives 0.
        q_mask: true where a query is real, ``[T]``, by default `kv_mask` where T = S.

    Raises:
        ValueError: shapes that do not fit, counts below 1, unknown rules.
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
    head_dim = q.shape[-1]
    check_choice("weights", weights, ("balance", "query_specific", "biased"))
    check_choice("noise_scale", noise_scale, ("exact", "official"))
    num_samples, antithetic = check_count("num_samples", num_samples), check_flag("antithetic", antithetic)
    check_number("correction", correction)
    check_finite("correction", correction)
    if spatial_shape is not None:
        spatial_shape = as_pair("spatial_shape", spatial_shape)
    check_floats(proposal_mean=proposal_mean, query_landmarks=query_landmarks, noise=noise)
    q, k, v = head_inputs(q, k, v, scale=scale, kv_mask=kv_mask)
    num_landmarks = min(check_count("num_landmarks", num_landmarks), q.shape[0], k.shape[0])
    q_mask = query_mask(q_mask, kv_mask, q.shape[0])
    q_mean = present = None
    if proposal_mean is None:
        q_mean, mu, present = paired_means(q, k, num_landmarks, q_mask, kv_mask, spatial_shape)
    else:
        mu = proposal_mean.astype(q.dtype)
    if mu.ndim != 2 or mu.shape[1] != head_dim:
        raise ValueError(f"proposal_mean must be [C, D] with D = {head_dim}, got shape {mu.shape}")
    q_bar = jnp.zeros_like(mu)
    if query_landmarks is not None:
        q_bar = query_landmarks.astype(q.dtype)
    elif q_mean is not None:
        q_bar = q_mean
    elif weights == "query_specific":
        q_bar = landmark_means(q, mu.shape[0], q_mask, spatial_shape)
    if q_bar.shape != mu.shape:
        raise ValueError(
            f"query_landmarks, by default pooled, must be [C, D] = {list(mu.shape)} like the proposals, "
            f"got shape {q_bar.shape}"
        )
    mu = mu + q_bar if proposal_mean is None else mu
    if noise is None:
        shape = (num_samples, *mu.shape)
        noise = jnp.zeros(shape, q.dtype) if key is None else jax.random.normal(check_key("lara", key), shape, q.dtype)
        noise = noise if present is None else draw_of_size(noise, jnp.sum(present, dtype=jnp.int32))
    elif noise.ndim != 3 or noise.shape[1:] != mu.shape:
        raise ValueError(f"noise must be [R, C, D] with C, D = {list(mu.shape)}, got shape {noise.shape}")
    epsilon = noise.astype(q.dtype) * (head_dim**-0.25 if noise_scale == "official" else 1.0)
    if antithetic:
        epsilon = jnp.concatenate([epsilon, -epsilon])
    num_samples, num_proposals = epsilon.shape[0], mu.shape[0]
    own = np.arange(num_samples * num_proposals) % num_proposals
    w = (mu[None] + epsilon).reshape(-1, head_dim)

    # log q_c(w) / N(w; 0, I) for each draw w and each proposal c.
    log_density = w @ mu.T - squared_norm(mu).T / 2
    if present is not None:
        log_density = jnp.where(present[None, :], log_density, HIDDEN)
    log_mixture = jax.nn.logsumexp(log_density, axis=1)
    moments = FeatureMoments.of_tokens(PositiveFeatures(w), k, v, kv_mask)
    if weights == "balance":
        # Two factors of 1/sqrt(draws) in the features; the mixture has `num_samples` draws of each proposal.
        log_weight = math.log(num_proposals) - log_mixture
        if present is not None:
            log_weight = jnp.where(present[own], log_weight, HIDDEN)
        state = attend(q, moments.weighted(log_weight))
    else:
        own_density = log_density[np.arange(len(own)), own]
        own_density = own_density if present is None else jnp.where(present[own], own_density, 0)
        log_sum = jnp.log(jnp.where(moments.mass == 0, 1, moments.mass))
        hidden = moments.mass == 0 if present is None else (moments.mass == 0) | ~present[own]
        log_sum = jnp.where(hidden, HIDDEN, log_sum + moments.log_scale + 0.5 * math.log(len(own)))
        f = moments.value_sum / jnp.where(moments.mass == 0, 1, moments.mass)[:, None]
        balance = jnp.exp(own_density - log_mixture)
        counted = None if present is None else (present | ~jnp.any(present))[None, :]
        affinity = q @ q_bar.T
        if q_mask is not None:
            affinity = jnp.where(q_mask[:, None], affinity, HIDDEN)
        log_affinity = jax.nn.logsumexp(affinity, axis=0)
        log_affinity = jnp.where(log_affinity < HIDDEN / 2, jnp.zeros_like(log_affinity), log_affinity)

        def answer(q: Array) -> AttentionState:
            log_weight = q @ w.T - squared_norm(q) / 2 + log_sum[None, :]
            if weights == "biased":
                log_weight = log_weight + q @ mu.T[:, own] - log_mixture[None, :]
            else:
                # A share of what all queries have is at most 1, but for those that are padding.
                r = jnp.exp(jnp.minimum(q @ q_bar.T - log_affinity[None, :], 0))
                alpha = balance[None, :] + correction * (r - jnp.mean(r, axis=1, keepdims=True, where=counted))[:, own]
                log_weight = log_weight - own_density[None, :] + jnp.log(jnp.maximum(alpha, LEAST_WEIGHT))
            lse = jax.nn.logsumexp(log_weight, axis=1) - math.log(num_samples)
            out = jax.nn.softmax(log_weight, axis=1) @ f
            seen = ~(lse < HIDDEN / 2)
            return AttentionState(jnp.where(seen[:, None], out, 0), jnp.where(seen, lse, -jnp.inf))

        state = map_rows(jax.checkpoint(answer), q, FEATURE_BLOCK)
    return state
