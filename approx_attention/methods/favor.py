"""FAVOR+: positive random features of the softmax kernel."""

import functools
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, PRNGKeyArray

from approx_attention.core import (
    AttentionState,
    FeatureMap,
    FeatureMoments,
    PositiveFeatures,
    Proposal,
    ReLUFeatures,
    RunningSummary,
    check_choice,
    check_count,
    check_key,
    check_projection,
    check_proposal,
    check_tokens,
    orthogonal_projection,
    output_or_state,
    running_kernel_moments,
    running_moments,
    state_by_summary,
)

FavorFeatures = Literal["positive", "hyperbolic", "relu"]


@output_or_state
def favor(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    num_features: int = 256,
    features: FavorFeatures = "positive",
    row_norm: Literal["chi", "sqrt_dim"] = "chi",
    projection: Float[Array, "W D"] | None = None,
    proposal: Proposal | None = None,
    is_causal: bool = False,
    block_size: int = 128,
    kv_mask: Bool[Array, " S"] | None = None,
    scale: float | Array | None = None,
) -> AttentionState:
    r"""FAVOR+ (Performer): softmax attention estimated by R positive random features, in O((T + S) R) time.

    With :math:`q, k` scaled by :math:`\sqrt{s}` and directions :math:`w_r \sim N(0, I)`, orthogonal in blocks,

    .. math:: \phi_r(x) = R^{-1/2} e^{w_r \cdot x - \|x\|^2/2}, \qquad
              \mathrm{out}_t = \sum_r \phi_r(q_t) \sum_j \phi_r(k_j)\, v_j
              \Big/ \sum_r \phi_r(q_t) \sum_j \phi_r(k_j).

    The normaliser and the numerator are unbiased; their ratio is not. The relative error of one entry grows like
    :math:`e^{\|q + k\|^2 / 2} R^{-1/2}` (`approx_attention.bounds.favor_mse`), so large queries and keys need very many
    features: measure the error with `approx_attention.evaluation` first.

    The authors' code adds an epsilon to the features and subtracts their maximum over all positions, which makes causal
    outputs depend on later keys. Here magnitudes stay in the log domain, without an epsilon, a clamp, or a stabiliser
    that depends on other positions. The projection depends on the PRNG key only; theirs can be seeded by the inputs.

    Shared arguments: see `approx_attention.methods`.

    Args:
        num_features: the number R of features, unless a projection is given; even for hyperbolic features.
        features: ``"positive"``; ``"hyperbolic"``, for R/2 directions and their negatives, which halves the
            variance where logits are small; ``"relu"``, the generalised attention of the paper, a different kernel that
            does not estimate softmax, also for nearby tokens.
        row_norm: norms of the directions, see `orthogonal_projection`.
        projection: the directions ``[R, D]`` (``[R/2, D]`` if hyperbolic); by default a random projection.
        proposal: a Gaussian :math:`N(\mu, A A^T)` from which directions :math:`\mu + A w_r` are sampled, with weights
            that keep estimates unbiased. A `fit_proposal` of similar tensors greatly reduces the error where queries
            and keys are large. None for N(0, I); not supported for ``"relu"``.

    Raises:
        ValueError: shapes that do not match, counts below 1, unknown features, neither key nor projection.
        TypeError: dtypes that are not floating point.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import exact, favor
        >>> q, k, v = (0.3 * jax.random.normal(jax.random.key(i), (64, 16)) for i in range(3))
        >>> out = favor(q, k, v, jax.random.key(3), num_features=512)
        >>> bool(jnp.linalg.norm(out - exact(q, k, v)) < 0.1 * jnp.linalg.norm(exact(q, k, v)))
        True

    Reference:
        :cite:p:`choromanski2021rethinking`, lemma 1, theorem 1 and section 2.4.
    """
    # The default of 256 features is that of the authors' code.
    options: Any = {"num_features": num_features, "features": features, "row_norm": row_norm, "projection": projection}
    options["proposal"] = proposal
    return state_by_summary(
        q,
        k,
        v,
        functools.partial(summarize_favor, key=key, **options),
        functools.partial(running_favor, key=key, **options),
        is_causal=is_causal,
        block_size=block_size,
        kv_mask=kv_mask,
        scale=scale,
    )


def summarize_favor(
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    num_features: int = 256,
    features: FavorFeatures = "positive",
    row_norm: Literal["chi", "sqrt_dim"] = "chi",
    projection: Float[Array, "W D"] | None = None,
    proposal: Proposal | None = None,
    kv_mask: Bool[Array, " S"] | None = None,
) -> FeatureMoments:
    """Summarise keys by the moments of their positive random features.

    Arguments are those of `favor`, with keys in scaled space (`approx_attention.methods`).

    Returns:
        `FeatureMoments` of size R.

    Raises:
        ValueError: shapes that do not match, a count below 1, unknown features, an odd number of hyperbolic ones, a
            proposal for ``"relu"``, neither key nor projection.
        TypeError: dtypes that are not floating point.

    Example:
        >>> import jax
        >>> from approx_attention import attend, fold_scale, summarize_favor
        >>> q, k, v = (0.3 * jax.random.normal(jax.random.key(i), (64, 8)) for i in range(3))
        >>> q, k = fold_scale(q, k)
        >>> summary = summarize_favor(k, v, jax.random.key(3), num_features=32)
        >>> attend(q, summary).out.shape
        (64, 8)

    Reference:
        :cite:p:`choromanski2021rethinking`, lemma 1.
    """
    check_tokens(k, v, kv_mask)
    feature_map = _favor_features(k.shape[-1], key, num_features, features, row_norm, projection, proposal)
    return FeatureMoments.of_tokens(feature_map, k, v, kv_mask)


def running_favor(
    head_dim: int,
    key: Array | None = None,
    *,
    num_features: int = 256,
    features: FavorFeatures = "positive",
    row_norm: Literal["chi", "sqrt_dim"] = "chi",
    projection: Float[Array, "W D"] | None = None,
    proposal: Proposal | None = None,
) -> RunningSummary:
    """The feature moments of a growing prefix: R sums over its keys, of constant size.

    Arguments are those of `favor`, for keys in scaled space (`approx_attention.methods`), and ``head_dim``, the number
    D of channels.

    Returns:
        The `RunningSummary`, for a `Decoder`.

    Raises:
        ValueError: counts below 1, unknown features, neither key nor projection.
        TypeError: a projection that is not floating point.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention.methods import running_favor
        >>> running = running_favor(2, jax.random.key(0), num_features=8)
        >>> running.read(running.init(3, jnp.float32)).value_sum.shape
        (8, 3)

    Reference:
        :cite:p:`choromanski2021rethinking`, section 2.4.
    """
    head_dim = check_count("head_dim", head_dim)
    feature_map = _favor_features(head_dim, key, num_features, features, row_norm, projection, proposal)
    return running_kernel_moments(feature_map) if features == "relu" else running_moments(feature_map)


def draw_favor(
    key: PRNGKeyArray,
    head_dim: int,
    *,
    num_features: int = 256,
    features: FavorFeatures = "positive",
    row_norm: Literal["chi", "sqrt_dim"] = "chi",
) -> dict[str, Array]:
    """Sample random directions for the argument ``projection`` of `favor`, to share them between calls.

    Arguments are those of `favor`, and ``head_dim``, the number D of channels.

    Returns:
        ``{"projection": [R, D]}``, or ``[R/2, D]`` for hyperbolic features.

    Raises:
        ValueError: a count below 1, unknown features or ``row_norm``, an odd number of hyperbolic features.

    Example:
        >>> import jax
        >>> from approx_attention.methods import draw_favor
        >>> draw_favor(jax.random.key(0), 8, num_features=32)["projection"].shape
        (32, 8)

    Reference:
        :cite:p:`choromanski2021rethinking`, section 2.4.
    """
    check_choice("features", features, ("positive", "hyperbolic", "relu"))
    num_features = check_count("num_features", num_features)
    # A direction and its negative give two features.
    if features == "hyperbolic":
        if num_features % 2:
            raise ValueError(f"hyperbolic features come in pairs: num_features must be even, got {num_features}")
        num_features //= 2
    return {"projection": orthogonal_projection(key, num_features, head_dim, row_norm=row_norm)}


def _favor_features(
    head_dim: int,
    key: Array | None,
    num_features: int,
    features: FavorFeatures,
    row_norm: Literal["chi", "sqrt_dim"],
    projection: Array | None,
    proposal: Proposal | None,
) -> FeatureMap:
    num_features = check_count("num_features", num_features)
    check_choice("features", features, ("positive", "hyperbolic", "relu"))
    check_choice("row_norm", row_norm, ("chi", "sqrt_dim"))
    if projection is None:
        options: Any = {"num_features": num_features, "features": features, "row_norm": row_norm}
        projection = draw_favor(check_key("favor", key), head_dim, **options)["projection"]
    check_projection(projection, head_dim)
    if proposal is not None:
        check_proposal(proposal, head_dim)
    if features == "relu":
        if proposal is not None:
            raise ValueError("features='relu' does not support a proposal: its kernel depends on the law of directions")
        return ReLUFeatures(projection)
    # Hyperbolic features are positive features of the directions and their negatives.
    if features == "hyperbolic":
        projection = jnp.concatenate([projection, -projection])
    return PositiveFeatures(projection) if proposal is None else proposal.features(projection)
