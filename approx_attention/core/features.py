r"""Feature maps whose inner products estimate the softmax kernel, and their random projections.

A feature map takes rows ``x [N, D]`` and returns :math:`\phi(x) = \text{values} \cdot e^{\text{log\_scale}}`, with
:math:`E\,[\phi(q) \cdot \phi(k)] = e^{q \cdot k}` for the maps that estimate the softmax kernel. Magnitudes stay in the
log domain, so nothing over- or underflows before the division by the normaliser.
"""

import dataclasses
import math
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PRNGKeyArray

from approx_attention.core.checks import check_choice, check_count
from approx_attention.core.heads import each
from approx_attention.core.trigonometry import sine_and_cosine


class Features(NamedTuple):
    """Features ``values * exp(log_scale)`` of N rows.

    Attributes:
        values: ``[N, R]``, or a scalar if all are equal.
        log_scale: ``[N, R]``, or ``[N, 1]`` if it is the same for all features of a row.
    """

    values: Array
    log_scale: Array


@runtime_checkable
class FeatureMap(Protocol):
    """Protocol of a feature map: a pytree that knows its size and maps rows to `Features`."""

    @property
    def num_features(self) -> int:
        """The number R of features."""
        ...

    def __call__(self, x: Array, /) -> Features:
        """Map rows ``[N, D]`` to R features each."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PositiveFeatures:
    r"""Positive random features of the softmax kernel (FAVOR+), in the log domain.

    .. math:: \phi_i(x) = R^{-1/2} \exp(w_i \cdot x - \|x\|^2 / 2 + b_i), \qquad w_i \sim N(0, I),\ b_i = 0.

    Attributes:
        projection: directions ``w [R, D]``. Orthogonal rows lower the variance (`orthogonal_projection`); rows
            ``[w; -w]`` give the hyperbolic features.
        log_weight: b ``[R]``, half the log-weights of directions sampled from another Gaussian (`Proposal`);
            None for 0.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention.core import PositiveFeatures, gaussian_projection
        >>> features = PositiveFeatures(gaussian_projection(jax.random.key(0), 4096, 2))
        >>> log_features = features(jnp.array([[0.3, 0.4]])).log_scale
        >>> float(jnp.sum(jnp.exp(2 * log_features)))  # estimates exp(x . x) = exp(1/4)
        1.3

    Reference:
        :cite:p:`choromanski2021rethinking`, lemma 1.
    """

    projection: Array
    log_weight: Array | None = None

    @property
    def num_features(self) -> int:
        """The number R of features."""
        return self.projection.shape[0]

    def __call__(self, x: Array, /) -> Features:
        """Log-features ``[N, R]`` of rows ``[N, D]``; all values are 1."""
        # In logarithms: exp(w . x) of a trained model overflows float32, and exp(-|x|^2 / 2) underflows. The authors'
        # code subtracts maxima and adds an epsilon to every feature instead, which biases small weights.
        log_scale = x @ self.projection.astype(x.dtype).T - squared_norm(x) / 2 - 0.5 * math.log(self.num_features)
        if self.log_weight is not None:
            log_scale = log_scale + self.log_weight.astype(x.dtype)[None, :]
        return Features(jnp.ones((), x.dtype), log_scale)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrigonometricFeatures:
    r"""Random Fourier features of the softmax kernel (RFA). Estimates may be negative.

    .. math:: \phi(x) = R'^{-1/2}\, e^{\|x\|^2 / 2} [\sin(w_1 \cdot x), \ldots, \cos(w_1 \cdot x), \ldots],
              \qquad R = 2 R',\ w_i \sim N(0, I).

    Attributes:
        projection: directions ``w [R/2, D]``.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention.core import TrigonometricFeatures
        >>> values, log_scale = TrigonometricFeatures(jnp.ones((4, 1)))(jnp.array([[0.5]]))
        >>> float(jnp.sum(values**2) * jnp.exp(2 * log_scale[0, 0]))  # exp(x . x) = exp(1/4)
        1.284

    Reference:
        :cite:p:`peng2021random`, section 2.2; :cite:p:`rahimi2007random`, algorithm 1.
    """

    projection: Array

    @property
    def num_features(self) -> int:
        """The number R of features, twice the number of directions."""
        return 2 * self.projection.shape[0]

    def __call__(self, x: Array, /) -> Features:
        """Sines and cosines ``[N, R]`` with one log-scale per row."""
        angle = x @ self.projection.astype(x.dtype).T
        values = jnp.concatenate(sine_and_cosine(angle), axis=-1)
        # The magnitude is the same for all features of a row: one log-scale per row, and values within [-1, 1]. The
        # factor follows the theorem; the authors' code uses the constant 0.1, and clamps the normaliser from below.
        return Features(values, squared_norm(x) / 2 - 0.5 * math.log(self.num_features / 2))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReLUFeatures:
    r"""ReLU features, the generalised attention of the Performer: a different kernel that does not estimate softmax.

    .. math:: \phi_i(x) = R^{-1/2} (\max(w_i \cdot x, 0) + \epsilon).

    Attributes:
        projection: directions ``w [R, D]``.
        offset: the constant :math:`\epsilon > 0` of this kernel, which keeps its normaliser positive; 1e-3 as in the
            authors' code.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention.core import ReLUFeatures
        >>> ReLUFeatures(jnp.eye(2), offset=0.0)(jnp.array([[3.0, -1.0]])).values.tolist()
        [[3.0, 0.0]]

    Reference:
        :cite:p:`choromanski2021rethinking`, section 4.2.
    """

    projection: Array
    offset: float = dataclasses.field(default=1e-3, metadata={"static": True})

    @property
    def num_features(self) -> int:
        """The number R of features."""
        return self.projection.shape[0]

    def __call__(self, x: Array, /) -> Features:
        """Rectified projections ``[N, R]``."""
        values = jax.nn.relu(x @ self.projection.astype(x.dtype).T) + self.offset
        return Features(values, jnp.full((x.shape[0], 1), -0.5 * math.log(self.num_features), x.dtype))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WeightedFeatures:
    r"""Features of rows with two extra coordinates, the last a log-weight: :math:`\phi([x, u, b]) = e^b \phi(x)`.

    With queries ``[q, 1, 0]`` and keys ``[k, b, b]`` a log-weight b of the key enters both exact attention, with logits
    :math:`q \cdot k + b`, and the features.

    Attributes:
        features: the map of the coordinates x.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention.core import ReLUFeatures, WeightedFeatures
        >>> features = WeightedFeatures(ReLUFeatures(jnp.eye(1), offset=0.0))
        >>> features(jnp.array([[1.0, 0.5, 0.5]])).log_scale.tolist()
        [[0.5]]
    """

    features: FeatureMap

    @property
    def num_features(self) -> int:
        """The number R of features."""
        return self.features.num_features

    def __call__(self, x: Array, /) -> Features:
        """Features ``[N, R]`` of rows ``[N, D + 2]``."""
        values, log_scale = self.features(x[:, :-2])
        return Features(values, log_scale + x[:, -1:])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SignedFeatures:
    """Features of moments with weights of any sign, for which positive features do not imply positive sums.

    Attributes:
        features: the map that reads the moments.
    """

    features: FeatureMap

    @property
    def num_features(self) -> int:
        """The number R of features."""
        return self.features.num_features

    def __call__(self, x: Array, /) -> Features:
        """Features of rows ``[N, D]``."""
        return self.features(x)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CosineFeatures:
    r"""Rectified rows rotated by the angle of their position: :math:`\phi([x, c, s]) = [c \max(x, 0), s \max(x, 0)]`.

    With :math:`c = \cos a` and :math:`s = \sin a` these are the features of the kernel
    :math:`\max(x, 0) \cdot \max(y, 0) \cos(a - b)`, which does not estimate softmax.

    Attributes:
        head_dim: the number D of channels of x.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention.core import CosineFeatures
        >>> CosineFeatures(2)(jnp.array([[10.0, -1.0, 0.6, 0.8]])).values.tolist()
        [[6.0, 0.0, 8.0, 0.0]]

    Reference:
        :cite:p:`qin2022cosformer`.
    """

    head_dim: int = dataclasses.field(metadata={"static": True})

    @property
    def num_features(self) -> int:
        """The number 2 D of features."""
        return 2 * self.head_dim

    def __call__(self, x: Array, /) -> Features:
        """Features ``[N, 2 D]`` of rows ``[N, D + 2]``."""
        rectified = jax.nn.relu(x[:, :-2])
        values = jnp.concatenate([rectified * x[:, -2:-1], rectified * x[:, -1:]], axis=-1)
        return Features(values, jnp.zeros((x.shape[0], 1), x.dtype))


def gaussian_projection(
    key: PRNGKeyArray, num_features: int, head_dim: int, dtype: jax.typing.DTypeLike = jnp.float32
) -> Float[Array, "R D"]:
    """Sample independent directions ``[R, D]`` from N(0, I).

    Args:
        key: typed PRNG key.
        num_features: the number R of directions.
        head_dim: their length D.
        dtype: float32 or wider.

    Returns:
        The matrix of directions.

    Example:
        >>> import jax
        >>> gaussian_projection(jax.random.key(0), 8, 4).shape
        (8, 4)
    """
    # In scaled space directions are N(0, I): the scale of the logits is in queries and keys.
    shape = check_count("num_features", num_features), check_count("head_dim", head_dim)
    return jax.random.normal(key, shape, dtype)


def orthogonal_projection(
    key: PRNGKeyArray,
    num_features: int,
    head_dim: int,
    dtype: jax.typing.DTypeLike = jnp.float32,
    *,
    row_norm: Literal["chi", "sqrt_dim"] = "chi",
) -> Float[Array, "R D"]:
    r"""Sample directions ``[R, D]`` that are orthogonal within each block of D rows.

    Every row is marginally N(0, I) with ``row_norm="chi"`` (norms of independent Gaussian vectors), so estimates stay
    unbiased; ``"sqrt_dim"`` sets every norm to :math:`\sqrt{D}` (less variance, a slight bias).

    Args:
        key: typed PRNG key.
        num_features: the number R of directions; the last block is cut where D does not divide R.
        head_dim: their length D.
        dtype: float32 or wider.
        row_norm: ``"chi"`` or ``"sqrt_dim"``.

    Returns:
        The matrix of directions.

    Raises:
        ValueError: an unknown ``row_norm`` or a count below 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> w = orthogonal_projection(jax.random.key(0), 4, 4, row_norm="sqrt_dim")
        >>> bool(jnp.allclose(w @ w.T, 4 * jnp.eye(4), atol=1e-5))
        True

    Reference:
        :cite:p:`choromanski2021rethinking`, section 2.4; :cite:p:`yu2016orthogonal`.
    """
    check_choice("row_norm", row_norm, ("chi", "sqrt_dim"))
    key_directions, key_norms = jax.random.split(key)
    num_features = check_count("num_features", num_features)
    head_dim = check_count("head_dim", head_dim)
    blocks = -(-num_features // head_dim)
    gaussian = jax.random.normal(key_directions, (blocks, head_dim, head_dim), dtype)
    rotation, triangle = _decomposed(gaussian)
    # The signs of R's diagonal make the rotation uniformly distributed.
    rotation = rotation * jnp.sign(jnp.diagonal(triangle, axis1=-2, axis2=-1))[:, None, :]
    directions = jnp.swapaxes(rotation, -1, -2).reshape(blocks * head_dim, head_dim)[:num_features]
    if row_norm == "sqrt_dim":
        return math.sqrt(head_dim) * directions
    # Norms of independent Gaussian vectors (chi with D degrees of freedom) make rows marginally Gaussian.
    norms = jnp.linalg.norm(jax.random.normal(key_norms, (num_features, head_dim), dtype), axis=-1, keepdims=True)
    return norms * directions


@jax.jit  # otherwise the loop would be compiled in every call
def _decomposed(blocks: Array) -> tuple[Array, Array]:
    """The QR decompositions of square blocks."""
    # Sequentially on a CPU: a batched QR can deadlock there if several devices share its threads.
    return each(jnp.linalg.qr, blocks)


def squared_norm(x: Array) -> Array:
    """Squared Euclidean norms ``[N, 1]`` of the rows of ``x``."""
    return jnp.sum(x * x, axis=-1, keepdims=True)


def root(x: Array) -> Array:
    """Square roots of non-negative numbers, with the derivative set to 0 at 0, where it is infinite."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)
