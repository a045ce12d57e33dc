r"""Monomial features: a polynomial of a multilinear form as a sum of products with one factor per argument.

With :math:`x = s \sum_t \prod_a y^a_t` for m vectors with d channels, and multi-indices :math:`\alpha`,

.. math:: \sum_k c_k x^k = \sum_\alpha w_\alpha \prod_a (y^a)^\alpha, \qquad
          w_\alpha = c_{|\alpha|}\, s^{|\alpha|} \frac{|\alpha|!}{\prod_t \alpha_t!}.

So one map serves the queries and every set of keys for any order m, and there are :math:`\binom{d+g}{g}` features of
degree at most g. For m = 2 the form is :math:`s\, q \cdot k`.
"""

import dataclasses
import functools
import heapq
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from approx_attention.core import Features, accumulation_dtype, check_count, check_floating


@dataclasses.dataclass(frozen=True, eq=False)
class IndexSet:
    r"""A set of multi-indices :math:`\alpha` sorted by degree, with steps :math:`\alpha = \alpha' + e_t` inside it.

    It is static and compared by identity. `total_degree` and `anisotropic` return the same object for equal arguments,
    so that compiled programs are reused.

    Attributes:
        dim: the number d of channels.
        parent: the index of :math:`\alpha'` in the set, ``[r]``; -1 for :math:`\alpha = 0`, which comes first.
        variable: the channel t, the last one in which :math:`\alpha` is not 0, ``[r]``; -1 for :math:`\alpha = 0`.
        degrees: :math:`|\alpha|`, ``[r]``.
        multinomials: :math:`|\alpha|! / \prod_t \alpha_t!`, ``[r]``.
    """

    dim: int
    parent: np.ndarray
    variable: np.ndarray
    degrees: np.ndarray
    multinomials: np.ndarray

    @property
    def size(self) -> int:
        """The number r of multi-indices."""
        return len(self.parent)

    @property
    def degree(self) -> int:
        """The largest degree."""
        return int(self.degrees[-1])

    @property
    def exponents(self) -> np.ndarray:
        r"""The multi-indices ``[r, d]``."""
        exponents = np.zeros((self.size, self.dim), np.int64)
        for k in range(1, self.degree + 1):
            here = np.flatnonzero(self.degrees == k)
            exponents[here] = exponents[self.parent[here]]
            exponents[here, self.variable[here]] += 1
        return exponents


def total_degree(dim: int, degree: int) -> IndexSet:
    r"""Make all :math:`\binom{d+g}{g}` multi-indices up to a degree: :math:`\{\alpha \in N^d : |\alpha| \le g\}`.

    Args:
        dim: the number d of channels.
        degree: the largest degree g.

    Returns:
        The set.

    Raises:
        ValueError: no channel, a negative degree.
        TypeError: counts that are not integers.

    Example:
        >>> from approx_attention.tensor import total_degree
        >>> total_degree(2, 2).exponents.tolist()
        [[0, 0], [1, 0], [0, 1], [2, 0], [1, 1], [0, 2]]
    """
    return _total_degree(check_count("dim", dim), check_count("degree", degree, 0))


@functools.lru_cache
def _total_degree(dim: int, degree: int) -> IndexSet:
    parent, variable = [np.array([-1])], [np.array([-1])]
    start = 0
    for _ in range(degree):
        # Steps in channel t start from the multi-indices whose last channel is at most t, which come first: each
        # multi-index is reached once.
        counts = np.searchsorted(variable[-1], np.arange(dim), side="right")
        start, previous = start + len(parent[-1]), start
        parent.append(np.concatenate([previous + np.arange(count) for count in counts]))
        variable.append(np.repeat(np.arange(dim), counts))
    return _index_set(dim, np.concatenate(parent), np.concatenate(variable))


def anisotropic(channel_bounds: Sequence[float], rank: int) -> tuple[IndexSet, float]:
    r"""Make the multi-indices of the largest terms of the exponential, for channels of unequal size.

    These are the terms of :math:`e^x = \sum_\alpha \prod_t a_t^{\alpha_t} / \alpha_t!`, with :math:`x = \sum_t a_t` and
    :math:`|a_t| \le \beta_t`, with the largest :math:`\prod_t \beta_t^{\alpha_t} / \alpha_t!`, each after all of its
    divisors. If all bounds are equal and small, this is `total_degree`.

    Args:
        channel_bounds: :math:`\beta_t \ge 0`, ``[d]``, static numbers: for attention of order m, the scale times the
            largest magnitudes of the m factors in channel t.
        rank: the number r of multi-indices.

    Returns:
        The set, and the largest error of its Taylor polynomial (coefficients 1/k!) within the bounds,
        :math:`e^{\sum_t \beta_t} - \sum_\alpha \prod_t \beta_t^{\alpha_t} / \alpha_t!`, rounded up.

    Raises:
        ValueError: no channel, a negative or infinite bound, a sum of bounds above 700, no rank.

    Example:
        >>> from approx_attention.tensor import anisotropic
        >>> indices, error = anisotropic((1.0, 0.1), 4)
        >>> indices.exponents.tolist(), round(error, 3)
        ([[0, 0], [1, 0], [2, 0], [3, 0]], 0.337)
    """
    bounds = tuple(float(b) for b in channel_bounds)
    if not bounds or not all(0 <= b < math.inf for b in bounds):
        raise ValueError(f"channel_bounds must be finite and not negative, got {channel_bounds!r}")
    if sum(bounds) > 700:
        raise ValueError(
            f"channel_bounds must sum to at most 700, got {sum(bounds)}: no polynomial approximates exp there"
        )
    return _anisotropic(bounds, check_count("rank", rank))


@functools.lru_cache
def _anisotropic(bounds: tuple[float, ...], rank: int) -> tuple[IndexSet, float]:
    dim, zero = len(bounds), (0,) * len(bounds)
    logs = [math.log(b) if b > 0 else -math.inf for b in bounds]
    chosen: dict[tuple[int, ...], float] = {}
    divisors_chosen: dict[tuple[int, ...], int] = {}
    waiting = [(0.0, 0, zero)]
    while len(chosen) < rank:
        cost, degree, alpha = heapq.heappop(waiting)
        chosen[alpha] = -cost
        for t in range(dim):
            child = (*alpha[:t], alpha[t] + 1, *alpha[t + 1 :])
            divisors_chosen[child] = divisors_chosen.get(child, 0) + 1
            # A multi-index is added only after all of its divisors, so that its parent is in the set.
            if divisors_chosen[child] == dim - child.count(0):
                heapq.heappush(waiting, (cost - logs[t] + math.log(child[t]), degree + 1, child))
    last = {alpha: max((t for t in range(dim) if alpha[t]), default=-1) for alpha in chosen}
    ordered = sorted(chosen, key=lambda alpha: (sum(alpha), last[alpha], alpha[::-1]))
    place = {alpha: i for i, alpha in enumerate(ordered)}
    parent = [
        -1 if alpha == zero else place[tuple(a - (t == last[alpha]) for t, a in enumerate(alpha))] for alpha in ordered
    ]
    indices = _index_set(dim, np.array(parent), np.array([last[alpha] for alpha in ordered]))
    total = math.exp(sum(bounds))
    # The tail is a difference of nearly equal numbers: rounding errors are added so that it stays a bound.
    rounding = 8 * (indices.degree + sum(bounds) + 2) * 2.0**-52 * total
    tail = total - math.fsum(math.exp(log_term) for log_term in chosen.values())
    return indices, max(tail, 0) + rounding


def _index_set(dim: int, parent: np.ndarray, variable: np.ndarray) -> IndexSet:
    """Make the set with its degrees and multinomials, from steps ordered by degree."""
    degrees, exponent = np.zeros(len(parent), np.int64), np.zeros(len(parent), np.int64)
    multinomials = np.ones(len(parent))
    here = np.flatnonzero(parent == 0)
    while here.size:
        before = parent[here]
        degrees[here] = degrees[before] + 1
        exponent[here] = np.where(variable[here] == variable[before], exponent[before], 0) + 1
        multinomials[here] = multinomials[before] * degrees[here] / exponent[here]
        here = np.flatnonzero((parent >= here[0]) & (parent <= here[-1]))
    return IndexSet(dim, parent, variable, degrees, multinomials)


def monomials(x: Float[Array, "N D"], indices: IndexSet) -> Float[Array, "N R"]:
    r"""Compute the monomials :math:`x^\alpha = \prod_t x_t^{\alpha_t}` of each row, for all multi-indices of a set.

    Each is the product of an earlier one with a channel, without powers and divisions, so derivatives are finite
    everywhere.

    Args:
        x: rows ``[N, D]``.
        indices: a set with ``D`` channels.

    Returns:
        The monomials ``[N, R]``, float32 or wider.

    Raises:
        ValueError: the set has another number of channels.
        TypeError: rows that are not floating point.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention.tensor import total_degree
        >>> from approx_attention.tensor.monomials import monomials
        >>> monomials(jnp.array([[2.0, 3.0]]), total_degree(2, 2)).tolist()
        [[1.0, 2.0, 3.0, 4.0, 6.0, 9.0]]
    """
    check_floating("x", x)
    if x.ndim != 2 or x.shape[1] != indices.dim:
        raise ValueError(f"x must be [N, D] with D = {indices.dim}, got shape {x.shape}")
    # Gathering rows is several times faster than gathering columns.
    channels = x.T.astype(accumulation_dtype(x))
    blocks = [jnp.ones((1, x.shape[0]), channels.dtype)]
    starts = np.searchsorted(indices.degrees, np.arange(indices.degree + 2))
    for k in range(1, indices.degree + 1):
        block = slice(starts[k], starts[k + 1])
        blocks.append(blocks[-1][indices.parent[block] - starts[k - 1]] * channels[indices.variable[block]])
    return jnp.concatenate(blocks).T


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MonomialFeatures:
    r"""The feature map of monomials, :math:`\phi_\alpha(x) = x^\alpha`, with their weights in a polynomial.

    Attributes:
        indices: the multi-indices.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention.tensor import MonomialFeatures, exp_coefficients, total_degree
        >>> features = MonomialFeatures(total_degree(2, 2))
        >>> x, y = jnp.array([[0.1, 0.2]]), jnp.array([[0.3, 0.4]])
        >>> weights = features.weights(exp_coefficients("taylor", 2))
        >>> float(jnp.sum(weights[None] * features(x).values * features(y).values))  # 1 + x . y + (x . y)^2 / 2
        1.116
    """

    indices: IndexSet = dataclasses.field(metadata={"static": True})

    @property
    def num_features(self) -> int:
        """The number R of features."""
        return self.indices.size

    @property
    def degree(self) -> int:
        """The degree of the polynomial."""
        return self.indices.degree

    def __call__(self, x: Array, /) -> Features:
        """Monomials ``[N, R]`` of rows ``[N, D]``."""
        values = monomials(x, self.indices)
        return Features(values, jnp.zeros((x.shape[0], 1), values.dtype))

    def weights(
        self,
        coefficients: Array | np.ndarray,
        *,
        scale: float | Array = 1.0,
        dtype: jax.typing.DTypeLike = jnp.float32,
    ) -> Float[Array, " R"]:
        r"""Compute the weights of products of features in a polynomial, :math:`c_k s^k k! / \prod_t \alpha_t!`.

        Args:
            coefficients: c ``[degree + 1]``, one for each degree k of the set; may be traced.
            scale: s, of any sign.
            dtype: float32 or wider.

        Returns:
            The weights ``[R]``, of any sign.

        Raises:
            ValueError: a wrong number of coefficients.
        """
        by_degree = scaled_coefficients(coefficients, self.indices.degree, scale, dtype)
        # As int32: an int64 array indexes differently with and without 64-bit mode, and one process may use both.
        return by_degree[jnp.asarray(self.indices.degrees, jnp.int32)] * jnp.asarray(self.indices.multinomials, dtype)


def scaled_coefficients(
    coefficients: Array | np.ndarray, degree: int, scale: float | Array, dtype: jax.typing.DTypeLike
) -> Array:
    """Coefficients :math:`c_k s^k` of powers of x from those of powers of s x.

    Args:
        coefficients: c ``[degree + 1]``.
        degree: the degree of the polynomial.
        scale: s, one number, possibly traced.
        dtype: dtype of the result.

    Returns:
        The coefficients ``[degree + 1]``.

    Raises:
        ValueError: another number of coefficients.

    Example:
        >>> import jax.numpy as jnp
        >>> scaled_coefficients(jnp.ones(3), 2, 3.0, jnp.float32).tolist()
        [1.0, 3.0, 9.0]
    """
    c = jnp.asarray(coefficients, dtype)
    if c.shape != (degree + 1,):
        raise ValueError(f"coefficients must be [{degree + 1}], one for each degree from 0, got shape {c.shape}")
    # Unlike powers, products have a derivative at any scale, including 0.
    powers = jnp.cumprod(jnp.full((degree,), scale, dtype))
    return c * jnp.concatenate([jnp.ones(1, dtype), powers])
