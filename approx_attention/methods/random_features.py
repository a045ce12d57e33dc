"""FAVOR+: attention through positive orthogonal random features of the softmax kernel."""

from typing import Any

from jax import Array
from jaxtyping import Bool, Float, PRNGKeyArray

from approx_attention.causal import RunningSummary, causal_state, running_moments
from approx_attention.checks import check_count, check_key, head_inputs
from approx_attention.features import PositiveFeatures, orthogonal_projection
from approx_attention.summaries import FeatureMoments, attend


def favor(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    num_features: int = 256,
    projection: Float[Array, "R D"] | None = None,
    is_causal: bool = False,
    block_size: int = 128,
    kv_mask: Bool[Array, " S"] | None = None,
    scale: float | Array | None = None,
    return_state: bool = False,
) -> Any:
    r"""FAVOR+ (Performer): softmax attention estimated by R positive random features, in O((T + S) R) time.

    With :math:`q, k` scaled by :math:`\sqrt{s}` and directions :math:`w_r \sim N(0, I)`, orthogonal in blocks,

    .. math:: \phi_r(x) = R^{-1/2} e^{w_r \cdot x - \|x\|^2/2}, \qquad
              \mathrm{out}_t = \sum_r \phi_r(q_t) \sum_j \phi_r(k_j)\, v_j
              \Big/ \sum_r \phi_r(q_t) \sum_j \phi_r(k_j).

    The normaliser and the numerator are unbiased; their ratio is not. Magnitudes stay in the log domain: there is
    no epsilon, no clamp, and no stabiliser that looks at other positions. The relative error of one entry grows like
    :math:`e^{\|q + k\|^2 / 2} R^{-1/2}`, so large queries and keys need very many features: measure with
    `approx_attention.diagnostics` before trusting it.

    Args:
        q: queries ``[T, D]``.
        k: keys ``[S, D]``.
        v: values ``[S, Dv]``.
        key: typed PRNG key; not needed if ``projection`` is given.
        num_features: the number R of features, unless a projection is given.
        projection: the directions ``[R, D]``, for instance from `orthogonal_projection`, in place of a draw.
        is_causal: query t sees keys j <= t: those of its block and the block before exactly, earlier ones by features.
        block_size: tokens per block of the causal form.
        kv_mask: true where a key is real, ``[S]``. A query that sees no key gives 0.
        scale: factor s of the logits, ``1/sqrt(D)`` by default.
        return_state: return the `AttentionState`, with log-normalisers, in the accumulation dtype.

    Returns:
        Outputs ``[T, Dv]`` in the dtype of ``v``, or the state.

    Raises:
        ValueError: shapes that do not fit, counts below 1, neither key nor projection.
        TypeError: dtypes that are not floating point.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import exact, favor
        >>> q, k, v = (0.3 * jax.random.normal(jax.random.key(i), (64, 16)) for i in range(3))
        >>> out = favor(q, k, v, jax.random.key(3), num_features=512)
        >>> bool(jnp.linalg.norm(out - exact(q, k, v)) < 0.1 * jnp.linalg.norm(exact(q, k, v)))
        True

    Reference:
        Choromanski et al. (2021), "Rethinking attention with Performers", lemma 1 and section 2.4.
    """
    dtype, head_dim = v.dtype, q.shape[-1]
    check_count("block_size", block_size)
    q, k, v = head_inputs(q, k, v, scale=scale, kv_mask=kv_mask)
    if is_causal:
        running = running_favor(head_dim, key, num_features=num_features, projection=projection)
        state = causal_state(q, k, v, running, block_size=block_size, kv_mask=kv_mask)
    else:
        state = attend(q, summarize_favor(k, v, key, num_features=num_features, projection=projection, kv_mask=kv_mask))
    return state if return_state else state.out.astype(dtype)


def summarize_favor(
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    num_features: int = 256,
    projection: Float[Array, "R D"] | None = None,
    kv_mask: Bool[Array, " S"] | None = None,
) -> FeatureMoments:
    """The moments of the positive random features of keys.

    Args:
        k: keys ``[S, D]`` in scaled space (`fold_scale`).
        v: values ``[S, Dv]``.
        key: typed PRNG key; not needed if ``projection`` is given.
        num_features: the number R of features, unless a projection is given.
        projection: the directions ``[R, D]`` in place of a draw.
        kv_mask: true where a key is real, ``[S]``.

    Returns:
        `FeatureMoments` of size R.
    """
    features = _features(k.shape[-1], key, num_features, projection)
    return FeatureMoments.of_tokens(features, k, v, kv_mask)


def running_favor(
    head_dim: int, key: Array | None = None, *, num_features: int = 256, projection: Float[Array, "R D"] | None = None
) -> RunningSummary:
    """The moments of a growing prefix.

    Args:
        head_dim: the number D of channels of queries and keys.
        key: typed PRNG key; not needed if ``projection`` is given.
        num_features: the number R of features, unless a projection is given.
        projection: the directions ``[R, D]`` in place of a draw.

    Returns:
        The `RunningSummary`.
    """
    return running_moments(_features(head_dim, key, num_features, projection))


def draw_favor(key: PRNGKeyArray, head_dim: int, *, num_features: int = 256) -> dict[str, Array]:
    """Draws the directions that `favor` takes as ``projection``, to be shared by many calls.

    Args:
        key: typed PRNG key.
        head_dim: the number D of channels of queries and keys.
        num_features: the number R of features.

    Returns:
        ``{"projection": [R, D]}``.
    """
    return {"projection": orthogonal_projection(key, num_features, head_dim)}


def _features(head_dim: int, key: Array | None, num_features: int, projection: Array | None) -> PositiveFeatures:
    check_count("num_features", num_features)
    if projection is None:
        projection = draw_favor(check_key("favor", key), head_dim, num_features=num_features)["projection"]
    if projection.ndim != 2 or projection.shape[1] != head_dim:
        raise ValueError(f"projection must be [R, D] with D = {head_dim}, got shape {projection.shape}")
    return PositiveFeatures(projection)
