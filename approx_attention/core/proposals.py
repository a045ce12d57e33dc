"""Gaussians other than N(0, I) for the directions of positive features, and the best one in closed form."""

from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from approx_attention.core.checks import (
    accumulation_dtype,
    check_finite,
    check_floating,
    check_key_value_fit,
    check_mask,
    check_rows,
    fold_scale,
    real_keys,
    shown,
)
from approx_attention.core.features import PositiveFeatures, squared_norm
from approx_attention.core.precision import in_float32


class Proposal(NamedTuple):
    r"""A Gaussian :math:`N(\mu, A A^T)` of directions in scaled space. `fit_proposal` fits one to queries and keys.

    Attributes:
        mean: :math:`\mu` ``[D]``.
        root: A ``[D, D]``, invertible.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention import Proposal
        >>> z = jnp.array([[1.0, 0.0], [0.0, 2.0]])
        >>> features = Proposal(jnp.ones(2), 2 * jnp.eye(2)).features(z)
        >>> features.projection.tolist()  # mu + A z
        [[3.0, 1.0], [1.0, 5.0]]
    """

    mean: Array
    root: Array

    @classmethod
    def standard(cls, head_dim: int, dtype: jax.typing.DTypeLike = jnp.float32) -> Self:
        """N(0, I), which gives the same features as no proposal.

        Args:
            head_dim: the number D of channels.
            dtype: dtype of mean and root.
        """
        return cls(jnp.zeros(head_dim, dtype), jnp.eye(head_dim, dtype=dtype))

    @in_float32()
    def features(self, projection: Float[Array, "R D"]) -> PositiveFeatures:
        r"""Unbiased positive features of the softmax kernel with directions from this Gaussian.

        .. math:: w_r = \mu + A z_r, \qquad
                  b_r = \tfrac12 \log \frac{p(w_r)}{p_{\mu, A}(w_r)}
                      = \tfrac14 (\|z_r\|^2 - \|w_r\|^2) + \tfrac12 \log |\det A|

        Args:
            projection: z ``[R, D]``, whose rows are marginally N(0, I).

        Returns:
            The features, with :math:`E\,[\phi(q) \cdot \phi(k)] = e^{q \cdot k}`.
        """
        dtype = accumulation_dtype(self.mean, self.root, projection)
        mean, root, projection = (x.astype(dtype) for x in (self.mean, self.root, projection))
        w = mean[None, :] + projection @ root.T
        half_log_volume = jnp.linalg.slogdet(root)[1] / 2
        return PositiveFeatures(w, (squared_norm(projection) - squared_norm(w))[:, 0] / 4 + half_log_volume)


@in_float32()
def fit_proposal(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    *,
    q_mask: Bool[Array, " T"] | None = None,
    kv_mask: Bool[Array, " S"] | None = None,
    scale: float | Array | None = None,
) -> Proposal:
    r"""Fit the Gaussian whose positive features have the least mean log-error over all pairs of a query and a key.

    With q and k scaled by :math:`\sqrt s` and the mean and covariance of :math:`q + k` over all pairs,

    .. math:: \mu = \bar q + \bar k, \qquad C_q + C_k = U \lambda U^T, \qquad
              A = U \sqrt\sigma\, U^T, \qquad
              \sigma_i = \tfrac14 \Big(3 + 2 \lambda_i + \sqrt{(1 + 2 \lambda_i)^2 + 8 \lambda_i}\Big)

    minimises the mean of :math:`\log E_w [\phi_w(q)^2 \phi_w(k)^2]` (guide: features fitted to your heads).

    Fit it once on captured tensors, and pass it to all later calls of `favor` or `scatterbrain`. Estimates are unbiased
    for any Gaussian, and a causal call does not use statistics of its tokens. For many heads use `jax.vmap`, and
    ``per_head={"proposal": ...}`` in `attention`. Derivatives treat a proposal as constant.

    Args:
        q: queries ``[T, D]``; concatenate all query heads of one key head.
        k: keys ``[S, D]``.
        q_mask: true where a query is real.
        kv_mask: true where a key is real.
        scale: factor s of the logits in later calls, ``1/sqrt(D)`` by default.

    Returns:
        The `Proposal`, in float32 or wider.

    Raises:
        ValueError: shapes that do not match.
        TypeError: dtypes that are not floating point, masks that are not boolean.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import bounds, favor, fit_proposal
        >>> spread = jnp.array([[2.0, 2.0, 0.1, 0.1]])
        >>> q, k, v = (spread * jax.random.normal(jax.random.key(i), (64, 4)) for i in range(3))
        >>> proposal = fit_proposal(q, k)
        >>> out = favor(q, k, v, jax.random.key(3), proposal=proposal)
        >>> errors = (bounds.favor_mse(q, k, 1, proposal=x) for x in (proposal, None))
        >>> [round(float(jnp.mean(jnp.log1p(error))), 1) for error in errors]
        [1.9, 7.7]

    Reference:
        The symmetric features of :cite:p:`likhosherstov2023dense`, with a mean. :cite:p:`farzam2026data` learns a
        covariance, which changes the kernel.
    """
    q, k = fold_scale(*_checked(q, k, q_mask, kv_mask), scale)
    (mean_q, covariance_q), (mean_k, covariance_k) = _moments(q, q_mask), _moments(k, kv_mask)
    spread, axes = jnp.linalg.eigh(covariance_q + covariance_k)
    spread = jnp.maximum(spread, 0)  # rounding may make it negative
    variance = (3 + 2 * spread + jnp.sqrt((1 + 2 * spread) ** 2 + 8 * spread)) / 4
    # The symmetric root does not depend on the signs and the order of eigenvectors. Derivatives of eigenvectors are
    # infinite where two variances are equal; the expectation of the estimates does not depend on the proposal, so it
    # needs no derivative.
    return lax.stop_gradient(Proposal(mean_q + mean_k, (axes * jnp.sqrt(variance)[None, :]) @ axes.T))


@in_float32()
def balancing_maps(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    *,
    q_mask: Bool[Array, " T"] | None = None,
    kv_mask: Bool[Array, " S"] | None = None,
) -> tuple[Float[Array, "D D"], Float[Array, "D D"]]:
    r"""Fit linear maps of queries and keys that preserve all logits and equalise both covariances.

    .. math:: q \cdot k = (q A) \cdot (k A^{-1}), \qquad
              A^2 = C_q^{-1/2} (C_q^{1/2} C_k C_q^{1/2})^{1/2} C_q^{-1/2}

    No other linear map makes an eigenvalue of the covariance of :math:`q A + k A^{-1}` smaller, and with it the error
    of positive features with any `Proposal`. Fit the maps once on captured tensors. Without rotary embeddings they can
    be folded into the projections of q and k.

    Args:
        q: queries ``[T, D]``.
        k: keys ``[S, D]``.
        q_mask: true where a query is real.
        kv_mask: true where a key is real.

    Returns:
        A and its inverse, both symmetric; derivatives treat them as constants. Variances below a thousandth of their
        mean are raised to it, so that no axis is stretched without bound.

    Raises:
        ValueError: shapes that do not match.
        TypeError: dtypes that are not floating point, masks that are not boolean.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import balancing_maps
        >>> q, k = (jax.random.normal(jax.random.key(i), (64, 4)) for i in range(2))
        >>> map_q, map_k = balancing_maps(9 * q, k)
        >>> bool(jnp.allclose(9 * q @ map_q @ (k @ map_k).T, 9 * q @ k.T, atol=1e-3))
        True
        >>> [round(float(jnp.std(x)), 1) for x in (9 * q @ map_q, k @ map_k)]
        [3.0, 3.0]

    Reference:
        A squared is the optimal transport map between Gaussians. The bound on eigenvalues is the inequality of
        arithmetic and geometric means in :cite:p:`bhatia1990singular`.
    """
    q, k = _checked(q, k, q_mask, kv_mask)
    covariance_q, covariance_k = (_least_variance(_moments(*x)[1]) for x in ((q, q_mask), (k, kv_mask)))
    # By singular values of roots: the squared condition number of products would make some eigenvalues negative.
    _, values, axes = jnp.linalg.svd(_power(covariance_k, 0.5) @ _power(covariance_q, 0.5))
    root = _power(covariance_q, -0.5) @ (axes.T * jnp.sqrt(values)[None, :])
    squared = root @ root.T
    return lax.stop_gradient((_power(squared, 0.5), _power(squared, -0.5)))


def _least_variance(covariance: Array) -> Array:
    """A covariance with at least a thousandth of its mean variance in every direction; 1 if it is 0."""
    mean = jnp.trace(covariance) / covariance.shape[0]
    return covariance + jnp.where(mean > 0, 1e-3 * mean, 1) * jnp.eye(covariance.shape[0], dtype=covariance.dtype)


def _power(matrix: Array, exponent: float) -> Array:
    """The power of a symmetric positive definite matrix."""
    values, axes = jnp.linalg.eigh((matrix + matrix.T) / 2)
    return (axes * values[None, :] ** exponent) @ axes.T


def _checked(q: Array, k: Array, q_mask: Array | None, kv_mask: Array | None) -> tuple[Array, Array]:
    """Checked queries and keys in the accumulation dtype."""
    check_rows("q", q, "[T, D]")
    check_rows("k", k, "[S, D]")
    check_key_value_fit(q, k, k)
    for name, mask, rows in (("q_mask", q_mask, q), ("kv_mask", kv_mask, k)):
        if mask is not None:
            check_mask(name, mask, rows.shape[0])
    dtype = accumulation_dtype(q, k)
    return q.astype(dtype), k.astype(dtype)


def _moments(x: Array, mask: Array | None) -> tuple[Array, Array]:
    """Mean ``[D]`` and covariance ``[D, D]`` of the real rows; 0 where there is none."""
    real = real_keys(mask, x.shape[0])[:, None]
    count = jnp.maximum(jnp.sum(real, dtype=x.dtype), 1)
    mean = jnp.sum(jnp.where(real, x, 0), axis=0) / count
    centred = jnp.where(real, x - mean[None, :], 0)
    return mean, centred.T @ centred / count


def check_proposal(proposal: Any, head_dim: int) -> None:
    """Raise unless a proposal fits heads with ``head_dim`` channels.

    Args:
        proposal: the value to check.
        head_dim: the number D of channels.

    Raises:
        TypeError: not a `Proposal`, or arrays that are not floating point.
        ValueError: a mean that is not ``[D]``, a root that is not ``[D, D]``, or concrete numbers that are not finite.
    """
    if not isinstance(proposal, Proposal):
        raise TypeError(f"proposal must be a Proposal, as from fit_proposal, got {shown(proposal)}")
    for name, x, shape in (("mean", proposal.mean, (head_dim,)), ("root", proposal.root, (head_dim, head_dim))):
        check_floating(f"proposal.{name}", x)
        if x.shape != shape:
            raise ValueError(f"proposal.{name} must be {list(shape)} for D = {head_dim}, got shape {x.shape}")
        check_finite(f"proposal.{name}", x)
