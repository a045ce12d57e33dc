"""Random feature attention: trigonometric features of normalised queries and keys, with gates in the causal form."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, PRNGKeyArray

from approx_attention.core import (
    HIDDEN,
    AttentionState,
    FeatureMoments,
    PositiveFeatures,
    RunningSummary,
    TrigonometricFeatures,
    WeightedFeatures,
    accumulation_dtype,
    check_choice,
    check_count,
    check_finite,
    check_floating,
    check_key,
    check_projection,
    dense_state,
    finite_peak,
    gaussian_projection,
    head_inputs,
    output_or_state,
    running_moments,
    squared_norm,
    state_by_summary,
)

# A token whose entries are all smaller is treated as zero, which has no direction: the square of the limit, 1e-36, is
# near the smallest normal number of float32.
LEAST_SIZE = 1e-18

RfaFeatures = Literal["trigonometric", "positive"]


@output_or_state
def rfa(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    num_features: int = 256,
    features: RfaFeatures = "trigonometric",
    bandwidth: float | Array = 1.0,
    projection: Float[Array, "W D"] | None = None,
    gate_logits: Float[Array, " S"] | None = None,
    is_causal: bool = False,
    block_size: int = 128,
    kv_mask: Bool[Array, " S"] | None = None,
    scale: float | Array | None = None,
) -> AttentionState:
    r"""Random feature attention: softmax attention between unit vectors, estimated by R random features.

    Queries and keys are first normalised, :math:`\hat x = D^{1/4}\, \sigma \odot x / \|x\|`, so that with the default
    scale s and bandwidth :math:`\sigma = 1` the logits are cosines. With directions :math:`w_r \sim N(0, I)`,

    .. math:: \phi(x) = e^{\|x\|^2/2} (R/2)^{-1/2} [\sin(w_r \cdot x), \cos(w_r \cdot x)]_r, \qquad
              \mathrm{out}_t = \sum_j \phi(\sqrt s\, \hat q_t) \cdot \phi(\sqrt s\, \hat k_j)\, v_j
              \Big/ \sum_j \phi(\sqrt s\, \hat q_t) \cdot \phi(\sqrt s\, \hat k_j).

    With gates :math:`g_t = \mathrm{sigmoid}(z_t)` the causal sums forget, :math:`S_t = g_t S_{t-1} + (1 - g_t)
    \phi(k_t) v_t^T`: key j then weighs :math:`(1 - g_j) \prod_{i \le j} g_i^{-1}` times a factor that the normaliser
    cancels. This is a log-weight of the key only, so the blockwise causal form applies unchanged. It is one number per
    key, whose rounding error is about :math:`10^{-7} \sum_{i \le j} |\log g_i|`. The gates of padding have no effect.

    Trigonometric estimates may be negative, so an output can leave the range of the values. If the estimated
    normaliser of the summary is not positive, the summary is ignored. The authors' code instead clamps the normaliser
    from below, which shrinks outputs, and does not contain gates.

    Log-normalisers are those of the normalised queries and keys.

    Shared arguments: see `approx_attention.methods`.

    Args:
        num_features: the number R of features, unless a projection is given; even for trigonometric features.
        features: ``"trigonometric"``, R/2 sines and R/2 cosines, or ``"positive"``, those of `favor`.
        bandwidth: :math:`\sigma`, a number or a vector ``[D]``, which can be learned. A number gives the paper's
            Gaussian kernel; a vector keeps the factors :math:`e^{\|\hat k\|^2/2}` that the paper drops.
        projection: the directions ``[R/2, D]`` (``[R, D]`` if positive); by default a random projection.
        gate_logits: z ``[S]``, the logits of the gates; only with ``is_causal``.

    Raises:
        ValueError: shapes that do not match, counts below 1, unknown features, neither key nor projection.
        TypeError: dtypes that are not floating point.
        NotImplementedError: gates without ``is_causal``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import exact, rfa
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (64, 16)) for i in range(3))
        >>> out = rfa(q, k, v, jax.random.key(3), num_features=1024)
        >>> unit = lambda x: 2 * x / jnp.linalg.norm(x, axis=-1, keepdims=True)
        >>> cosine = exact(unit(q), unit(k), v)
        >>> bool(jnp.linalg.norm(out - cosine) < 0.3 * jnp.linalg.norm(cosine))
        True

    Reference:
        :cite:p:`peng2021random`, sections 3.1 and 3.2 (gates).
    """
    head_dim = q.shape[-1]
    if gate_logits is not None and not is_causal:
        raise NotImplementedError("method 'rfa' supports gate_logits only with is_causal: gates forget the past")
    gated = gate_logits is not None
    feature_map = _rfa_features(head_dim, key, num_features, features, projection)
    options: Any = {"features": features, "projection": feature_map.projection}
    running = running_rfa(head_dim, **options, bandwidth=bandwidth, gated=gated)
    # The scale is folded in after the normalisation, which would undo it.
    q, k, v = head_inputs(q, k, v, scale=1.0, kv_mask=kv_mask, is_causal=is_causal)
    if scale is None:
        scale = 1 / math.sqrt(head_dim)
    if gate_logits is not None:
        q, k, _ = gate_tokens(q, k, gate_logits, scale=scale, kv_mask=kv_mask)

    def summarize(k: Array, v: Array, kv_mask: Array | None) -> FeatureMoments:
        return FeatureMoments.of_tokens(feature_map, k, v, kv_mask)

    return state_by_summary(
        running.space(q),
        running.space(k),
        v,
        summarize,
        lambda _: running,
        is_causal=is_causal,
        block_size=block_size,
        kv_mask=kv_mask,
        scale=scale,
    )


def running_rfa(
    head_dim: int,
    key: Array | None = None,
    *,
    num_features: int = 256,
    features: RfaFeatures = "trigonometric",
    bandwidth: float | Array = 1.0,
    projection: Float[Array, "W D"] | None = None,
    gated: bool = False,
) -> RunningSummary:
    """The feature moments of a growing prefix of normalised keys: R sums over its keys, of constant size.

    Arguments are those of `rfa`, and ``head_dim``, the number D of channels. The ``space`` of the summary normalises
    queries and keys.

    Args:
        gated: whether queries and keys come from `gate_tokens`, with D + 2 channels.

    Returns:
        The `RunningSummary`, for a `Decoder`.

    Raises:
        ValueError: counts below 1, unknown features, an odd number of trigonometric ones, neither key nor projection.
        TypeError: a projection that is not floating point.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention.methods import running_rfa
        >>> running = running_rfa(2, jax.random.key(0), num_features=8)
        >>> running.read(running.init(3, jnp.float32)).value_sum.shape
        (8, 3)

    Reference:
        :cite:p:`peng2021random`, sections 3.1 and 3.2 (gates).
    """
    head_dim = check_count("head_dim", head_dim)
    feature_map = _rfa_features(head_dim, key, num_features, features, projection)
    _check_bandwidth(bandwidth, head_dim)

    def space(x: Array) -> Array:
        tokens = x[:, :head_dim]
        # Divided by its largest entry, a row has a squared norm that neither over- nor underflows. The normalisation
        # cancels this factor, so derivatives can treat it as constant.
        size = lax.stop_gradient(jnp.max(jnp.abs(tokens), axis=-1, keepdims=True))
        none = size < LEAST_SIZE
        # A double where: a quotient or root of 0 that is only selected away has a derivative of NaN. The authors' code
        # adds 1e-3 to the norm, which does not give unit vectors.
        tokens = jnp.where(none, 0, tokens / jnp.where(none, 1, size))
        norm = jnp.sqrt(jnp.where(none, 1, squared_norm(tokens)))
        unit = tokens * (head_dim**0.25 / norm) * jnp.asarray(bandwidth, x.dtype).reshape(1, -1)
        return jnp.concatenate([unit, x[:, head_dim:]], axis=-1)

    if not gated:
        return running_moments(feature_map)._replace(space=space)

    def near(q: Array, k: Array, v: Array, bias: Array) -> AttentionState:
        # Log-weights are sums over all earlier gates and may be large. They are added here, not as channels of the
        # product of queries and keys, so that they are not rounded to lower precision. The largest visible one is
        # subtracted, so that logits keep their digits.
        log_weight = k[:, -1][None, :]
        greatest = finite_peak(jnp.max(jnp.where(bias <= HIDDEN / 2, -jnp.inf, log_weight)))
        state = dense_state(
            q[:, :-2], k[:, :-2], v, jnp.where(bias <= HIDDEN / 2, HIDDEN, bias + log_weight - greatest)
        )
        return AttentionState(state.out, state.lse + greatest)

    return running_moments(WeightedFeatures(feature_map))._replace(space=space, near=near)


def _check_bandwidth(bandwidth: Any, head_dim: int) -> None:
    if getattr(bandwidth, "shape", ()) != ():
        check_floating("bandwidth", bandwidth)
        if bandwidth.shape != (head_dim,):
            raise ValueError(f"bandwidth must be one number or [D] = [{head_dim}], got shape {bandwidth.shape}")
    check_finite("bandwidth", bandwidth)


def gate_tokens(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    gate_logits: Float[Array, " S"],
    *,
    scale: float | Array | None = None,
    kv_mask: Bool[Array, " S"] | None = None,
    start: Float[Array, ""] | float = 0.0,
) -> tuple[Array, Array, Array]:
    r"""Append the gates of gated `rfa` to queries and keys as two channels.

    Key j gets the log-weight :math:`b_j = \log(1 - g_j) - \sum_{i \le j} \log g_i`. Use the results in a `Decoder` of
    ``running_rfa(D, ..., gated=True)`` with ``head_dim=D + 2`` and ``scale=1/sqrt(D)``, segment by segment.

    Shared arguments: see `approx_attention.methods`.

    Args:
        gate_logits: z ``[S]`` of gates :math:`g = \mathrm{sigmoid}(z)`.
        scale: the factor of the logits that the decoder will apply, ``1/sqrt(D)`` by default.
        start: the third result for the previous segment, 0 for the first segment.

    Returns:
        Queries ``[T, D + 2]`` and keys ``[S, D + 2]`` in float32 or wider, and :math:`-\sum \log g` up to the end,
        which is ``start`` of the next segment.

    Raises:
        ValueError: the gate logits are not ``[S]``.
        TypeError: gate logits that are not floating point.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention.methods import gate_tokens
        >>> q, k, end = gate_tokens(jnp.ones((1, 2)), jnp.ones((2, 2)), jnp.zeros(2), scale=1.0)
        >>> (k[:, 2] / jnp.log(2)).tolist(), float(end / jnp.log(2))  # gates of 1/2
        ([0.0, 1.0], 2.0)

    Reference:
        :cite:p:`peng2021random`, section 3.2.
    """
    check_floating("gate_logits", gate_logits)
    if gate_logits.shape != k.shape[:1]:
        raise ValueError(f"gate_logits must be one per key, [S] = {list(k.shape[:1])}, got shape {gate_logits.shape}")
    dtype = accumulation_dtype(q, k)
    # The scale will be folded in later: dividing by its root cancels that in the two channels.
    root = math.sqrt(1 / math.sqrt(q.shape[-1])) if scale is None else jnp.sqrt(jnp.asarray(scale, dtype))
    q, k, gate_logits = q.astype(dtype), k.astype(dtype), gate_logits.astype(dtype)
    if kv_mask is not None:
        gate_logits = jnp.where(kv_mask, gate_logits, 0)
    # -log g and, below, -log(1 - g), computed without overflow.
    forgotten = jax.nn.softplus(-gate_logits)
    # Padding has g = 1 and leaves the sums unchanged.
    if kv_mask is not None:
        forgotten = jnp.where(kv_mask, forgotten, 0)
    total = jnp.asarray(start, k.dtype) + jnp.cumsum(forgotten)
    log_weight = (total - jax.nn.softplus(gate_logits))[:, None] / root
    if kv_mask is not None:
        log_weight = jnp.where(kv_mask[:, None], log_weight, 0)
    ones = jnp.ones_like(q[:, :1]) / root
    # The channels of `WeightedFeatures`: [q, 1, 0] and [k, b, b], so that logits are q . k + b and features e^b phi(k).
    return (
        jnp.concatenate([q, ones, jnp.zeros_like(ones)], axis=-1),
        jnp.concatenate([k, log_weight, log_weight], axis=-1),
        total[-1],
    )


def draw_rfa(
    key: PRNGKeyArray, head_dim: int, *, num_features: int = 256, features: RfaFeatures = "trigonometric"
) -> dict[str, Array]:
    """Sample random directions for the argument ``projection`` of `rfa`, to share them between calls.

    Arguments are those of `rfa`, and ``head_dim``, the number D of channels.

    Returns:
        ``{"projection": [R/2, D]}``, or ``[R, D]`` for positive features.

    Raises:
        ValueError: a count below 1, unknown features, an odd number of trigonometric features.

    Example:
        >>> import jax
        >>> from approx_attention.methods import draw_rfa
        >>> draw_rfa(jax.random.key(0), 8, num_features=32)["projection"].shape
        (16, 8)

    Reference:
        :cite:p:`peng2021random`, section 2.2.
    """
    check_choice("features", features, ("trigonometric", "positive"))
    num_features = check_count("num_features", num_features)
    if features == "trigonometric":
        if num_features % 2:
            raise ValueError(f"trigonometric features come in pairs: num_features must be even, got {num_features}")
        num_features //= 2
    # Independent directions, as in the paper.
    return {"projection": gaussian_projection(key, num_features, head_dim)}


def _rfa_features(
    head_dim: int, key: Array | None, num_features: int, features: RfaFeatures, projection: Array | None
) -> TrigonometricFeatures | PositiveFeatures:
    num_features = check_count("num_features", num_features)
    check_choice("features", features, ("trigonometric", "positive"))
    if projection is None:
        sample_key = check_key("rfa", key)
        projection = draw_rfa(sample_key, head_dim, num_features=num_features, features=features)["projection"]
    check_projection(projection, head_dim)
    kind = TrigonometricFeatures if features == "trigonometric" else PositiveFeatures
    return kind(projection)
