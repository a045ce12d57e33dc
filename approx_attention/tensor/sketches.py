r"""Random features of a polynomial of a multilinear form, for cases with too many monomials.

For m vectors :math:`y^a` with d channels and :math:`x = s \sum_t \prod_a y^a_t`, a sketch consists of m feature maps,
the first for queries and one for each set of keys, with

.. math:: E \sum_r w_r \prod_a \phi^a_r(y^a) = \sum_k c_k x^k.

Degrees up to ``exact_degree`` use monomials, without error; each higher degree uses ``size`` random features. There are
:math:`m - 1` independent sign vectors, one for each set of keys, and the queries use their product, so that signs
cancel if all m factors use the same coordinate, and on average only then.

The mean of a degree-k estimate is :math:`x^k`, and its error is of order :math:`(s \prod_a \|y^a\|)^k`. For three
factors :math:`|x|` is smaller than the product of norms by a factor of about d. So at equal rank sketches are less
accurate than monomials of a lower degree for d = 16, and at d = 64 slightly better between two degrees with affordable
monomials. Estimates of the kernel are unbiased, but not positive: a normaliser may be negative.
"""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Iterator
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, PRNGKeyArray

from approx_attention.core import Features, SparseSketch, check_count, check_key, random_signs
from approx_attention.tensor.monomials import MonomialFeatures, monomials, scaled_coefficients, total_degree


class _PolynomialSketch:
    """Base class of both sketches: monomials first, then the random features of each higher degree."""

    exact_degree: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The degree of the polynomial, the number of random features of each degree, and the number of channels."""
        raise NotImplementedError

    @property
    def share(self) -> float:
        """The weight of each product of random features in the estimate of a power of x."""
        raise NotImplementedError

    def sketched(self, x: Array) -> Iterator[Array]:
        """Yield the random features ``[N, size]`` of degree 1, 2, and so on."""
        raise NotImplementedError

    @property
    def num_features(self) -> int:
        """The number R of features."""
        degree, size, dim = self.sizes
        return total_degree(dim, self.exact_degree).size + (degree - self.exact_degree) * size

    @property
    def degree(self) -> int:
        """The degree of the polynomial."""
        return self.sizes[0]

    def __call__(self, x: Array, /) -> Features:
        """Features ``[N, R]`` of rows ``[N, D]``."""
        # Low degrees have most of the weight and few monomials, so they are exact.
        exact = monomials(x, total_degree(self.sizes[2], self.exact_degree))
        random = itertools.islice(self.sketched(x.astype(exact.dtype)), self.exact_degree, None)
        return Features(jnp.concatenate([exact, *random], axis=1), jnp.zeros((x.shape[0], 1), exact.dtype))

    def weights(
        self,
        coefficients: Array | np.ndarray,
        *,
        scale: float | Array = 1.0,
        dtype: jax.typing.DTypeLike = jnp.float32,
    ) -> Float[Array, " R"]:
        """The weights of products of features, as in `MonomialFeatures.weights`."""
        degree, size, dim = self.sizes
        c = scaled_coefficients(coefficients, degree, scale, dtype)
        exact = MonomialFeatures(total_degree(dim, self.exact_degree))
        first = exact.weights(c[: self.exact_degree + 1], dtype=dtype)
        return jnp.concatenate([first, self.share * jnp.repeat(c[self.exact_degree + 1 :], size)])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TensorSketch(_PolynomialSketch):
    r"""TensorSketch: a CountSketch of the k-fold tensor power of a row, by convolution of CountSketches of the row.

    .. math:: \phi(y) = F^{-1} \Bigl(\prod_{p \le k} F C_p\, y\Bigr), \qquad
              (C_p\, y)_b = \sum_{t : h_p(t) = b} \sigma_{pt}\, y_t.

    The features are the buckets instead of their spectrum, because a product of three spectra is not the spectrum of a
    product. All factors share the buckets h, so that equal coordinates meet, and differ in the signs. One convolution
    leads from each degree to the next.

    Attributes:
        place: the bucket :math:`h_p(t)` of each channel, ``[degree, D]``.
        sign: :math:`\sigma_{pt}` of this factor, ``[degree, D]``.
        size: the number of buckets, and of features per degree.
        exact_degree: the highest degree whose monomials are kept.

    Reference:
        :cite:p:`pham2013fast`; more than two factors are a derivation of this library.
    """

    place: Array
    sign: Array
    size: int = dataclasses.field(metadata={"static": True})
    exact_degree: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def draw(
        cls, key: PRNGKeyArray, size: int, head_dim: int, degree: int, *, order: int = 2, exact_degree: int = 1
    ) -> tuple[Self, ...]:
        """Sample the maps of the ``order`` factors, the queries' first.

        Args:
            key: typed PRNG key.
            size: the number of buckets.
            head_dim: the number D of channels.
            degree: the degree of the polynomial.
            order: the number m of factors.
            exact_degree: the largest degree with monomials, less than ``degree``.

        Returns:
            The m maps, which share ``weights``.

        Raises:
            ValueError: counts below 1, an order below 2, an exact degree that is not less than the degree.

        Example:
            >>> import jax, jax.numpy as jnp
            >>> from approx_attention.tensor import TensorSketch
            >>> query_map, key_map = TensorSketch.draw(jax.random.key(0), 64, 4, 3)
            >>> query_map.num_features
            133
        """
        size, head_dim, degree, order, exact_degree = _sizes(key, size, head_dim, degree, order, exact_degree)
        key_place, key_sign = jax.random.split(key)
        place = jax.random.randint(key_place, (degree, head_dim), 0, size)
        signs = _factor_signs(key_sign, order, (degree, head_dim))
        return tuple(cls(place, sign, size, exact_degree) for sign in signs)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Degree, buckets, channels."""
        degree, dim = self.place.shape
        return degree, self.size, dim

    @property
    def share(self) -> float:
        """Buckets are summed."""
        return 1.0

    def sketched(self, x: Array) -> Iterator[Array]:
        """The buckets of each degree, ``[N, size]``."""
        spectrum = None
        for place, sign in zip(self.place, self.sign, strict=True):
            # A convolution of counts is a product of spectra, at a cost of size log(size) per degree.
            counts = jnp.fft.rfft(SparseSketch(place[None], sign[None], self.size) @ x.T, axis=0)
            spectrum = counts if spectrum is None else spectrum * counts
            yield jnp.fft.irfft(spectrum, self.size, axis=0).T


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ProductSketch(_PolynomialSketch):
    r"""A sketch by products of signed sums, :math:`\phi_r(y) = \prod_{p \le k} \sigma_{pr} \cdot y`, of weight 1/size.

    An estimate of :math:`x^k` has variance :math:`((N^2 + 2^{m-1} (x^2 - e))^k - x^{2k}) / \text{size}`, with N the
    product of the norms of the m factors and e the sum of the squares of the d terms of x. Its standard deviation is
    several times that of `TensorSketch`; this sketch is for comparison.

    Attributes:
        sign: the signs of this factor, ``[degree, size, D]``.
        exact_degree: the highest degree whose monomials are kept.

    Reference:
        :cite:p:`kar2012random`; more than two factors are a derivation of this library.
    """

    sign: Array
    exact_degree: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def draw(
        cls, key: PRNGKeyArray, size: int, head_dim: int, degree: int, *, order: int = 2, exact_degree: int = 1
    ) -> tuple[Self, ...]:
        """Sample the maps of the ``order`` factors; arguments and errors as in `TensorSketch.draw`.

        Example:
            >>> import jax, jax.numpy as jnp
            >>> from approx_attention.tensor import ProductSketch
            >>> maps = ProductSketch.draw(jax.random.key(0), 64, 4, 3, order=3)
            >>> len(maps), maps[0].num_features
            (3, 133)
        """
        size, head_dim, degree, order, exact_degree = _sizes(key, size, head_dim, degree, order, exact_degree)
        signs = _factor_signs(key, order, (degree, size, head_dim))
        return tuple(cls(sign, exact_degree) for sign in signs)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Degree, products, channels."""
        degree, size, dim = self.sign.shape
        return degree, size, dim

    @property
    def share(self) -> float:
        """Products are averaged."""
        return 1 / self.sign.shape[1]

    def sketched(self, x: Array) -> Iterator[Array]:
        """The products of each degree, ``[N, size]``."""
        sums = (x @ sign.astype(x.dtype).T for sign in self.sign)
        yield from itertools.accumulate(sums, operator.mul)


def _sizes(
    key: Array, size: int, head_dim: int, degree: int, order: int, exact_degree: int
) -> tuple[int, int, int, int, int]:
    check_key("a sketch", key)
    size = check_count("size", size)
    head_dim = check_count("head_dim", head_dim)
    degree = check_count("degree", degree)
    order = check_count("order", order, 2)
    exact_degree = check_count("exact_degree", exact_degree, 0)
    if exact_degree >= degree:
        raise ValueError(f"exact_degree must be less than degree = {degree}, got {exact_degree}: use MonomialFeatures")
    return size, head_dim, degree, order, exact_degree


def _factor_signs(key: Array, order: int, shape: tuple[int, ...]) -> list[Array]:
    """Signs of the queries, the product of all others so that all m multiply to 1, and of each set of keys."""
    signs = [random_signs(each, shape) for each in jax.random.split(key, order - 1)]
    return [functools.reduce(operator.mul, signs), *signs]
