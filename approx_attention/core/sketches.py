r"""Random matrices S with :math:`E[S^T S] = I`, which map many rows to few and preserve inner products on average.

``sketch @ x`` applies a sketch, using its structure. `back` applies its transpose, and ``sketch @ jnp.eye(n)`` is the
matrix.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Self

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from approx_attention.core.checks import (
    accumulation_dtype,
    check_choice,
    check_count,
    check_floating,
    check_key,
    check_number,
    check_positive,
)
from approx_attention.core.precision import in_float32
from approx_attention.kernels import along_with, pad_rows


def random_signs(key: Array, shape: tuple[int, ...]) -> Array:
    """Random signs in float32, equal with and without 64-bit mode, unlike those of `jax.random.rademacher`."""
    return jnp.where(jax.random.bernoulli(key, jnp.float32(0.5), shape), jnp.float32(1), jnp.float32(-1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseSketch:
    """A dense matrix, with independent random entries or learned.

    Attributes:
        entries: the matrix S ``[M, n]``.
    """

    entries: Array

    @classmethod
    def gaussian(cls, key: Array, size: int, num_rows: int) -> Self:
        """Sample independent entries from N(0, 1/M).

        Args:
            key: typed PRNG key.
            size: the number M of rows of the matrix.
            num_rows: the number n of rows that it sums.
        """
        return cls(jax.random.normal(key, (size, num_rows), jnp.float32) / math.sqrt(size))

    @classmethod
    def signs(cls, key: Array, size: int, num_rows: int, *, sparsity: int = 1) -> Self:
        r"""Sample independent entries :math:`\pm\sqrt{s/M}`, each with probability 1/(2 s), else 0.

        Args:
            key: typed PRNG key.
            size: the number M of rows of the matrix.
            num_rows: the number n of rows that it sums.
            sparsity: s; 1 gives Rademacher entries, 3 those of Achlioptas.

        Reference:
            :cite:p:`achlioptas2003database`.
        """
        key_sign, key_there = jax.random.split(key)
        # A float32 probability makes samples equal with and without 64-bit mode.
        there = jax.random.bernoulli(key_there, jnp.float32(1 / sparsity), (size, num_rows))
        sign = random_signs(key_sign, (size, num_rows))
        return cls(jnp.where(there, sign * math.sqrt(sparsity / size), 0))

    def __matmul__(self, x: Array) -> Array:
        """S x of rows ``x [n, ...]``: ``[M, ...]``."""
        rows = _rows(x, self.num_rows)
        return (self.entries.astype(rows.dtype) @ rows).astype(x.dtype)

    @property
    def num_rows(self) -> int:
        """The number n of rows that it sums."""
        return self.entries.shape[1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparseSketch:
    r"""A sparse sketch: s blocks of M/s sums; each row is added to one sum per block with sign :math:`\pm 1/\sqrt s`.

    CountSketch for s = 1; for s > 1 the block form of the sparse Johnson-Lindenstrauss transform of Kane and Nelson.

    Attributes:
        place: index of the sum, within its block, to which a row is added ``[s, n]``.
        sign: sign with which it is added ``[s, n]``.
        size: the number M of sums.
    """

    place: Array
    sign: Array
    size: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def draw(cls, key: Array, size: int, num_rows: int, *, entries: int = 1) -> Self:
        """Sample the place and the sign of each row in each block.

        Args:
            key: typed PRNG key.
            size: the number M of sums, a multiple of ``entries``.
            num_rows: the number n of rows that are summed.
            entries: the number s of blocks: each row is added to one sum of each.

        Raises:
            ValueError: a size that is not a multiple of ``entries``.

        Reference:
            :cite:p:`charikar2002finding` for one block; :cite:p:`kane2014sparser`.
        """
        if size % entries:
            raise ValueError(f"sketch_size must be a multiple of the {entries} entries per row, got {size}")
        key_place, key_sign = jax.random.split(key)
        place = jax.random.randint(key_place, (entries, num_rows), 0, size // entries)
        return cls(place, random_signs(key_sign, (entries, num_rows)), size)

    def __matmul__(self, x: Array) -> Array:
        """S x of rows ``x [n, ...]``: ``[M, ...]``."""
        entries, rows = self.place.shape[0], _rows(x, self.num_rows)

        def block(place: Array, sign: Array) -> Array:
            return jax.ops.segment_sum(_times_rows(sign, rows), place, self.size // entries)

        sums = jax.vmap(block)(self.place, self.sign).reshape(self.size, *x.shape[1:])
        return (sums / math.sqrt(entries)).astype(x.dtype)

    @property
    def num_rows(self) -> int:
        """The number n of rows that it sums."""
        return self.place.shape[1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HadamardSketch:
    r"""The subsampled randomised Hadamard transform :math:`\sqrt{N/M}\, R\, (H_N/\sqrt N)\, D`, in :math:`N \log N`.

    N is the smallest power of two of at least n; rows are padded with zeros to N. With M = N the sketch is orthogonal.

    Attributes:
        sign: the diagonal D ``[n]``.
        chosen: indices of the rows of the transform that R keeps ``[M]``, without replacement.
    """

    sign: Array
    chosen: Array

    @classmethod
    def draw(cls, key: Array, size: int, num_rows: int) -> Self:
        """Sample random signs, and rows of the transform without replacement.

        Args:
            key: typed PRNG key.
            size: the number M of rows to keep, at most N.
            num_rows: the number n of rows that are transformed.

        Raises:
            ValueError: a size above N, the smallest power of two of at least n.

        Reference:
            :cite:p:`ailon2009fast`; :cite:p:`tropp2011improved`.
        """
        # Rows of the padded transform are sampled, so M may exceed n up to the power of two.
        length = _power_of_two(num_rows)
        if size > length:
            raise ValueError(f"sketch_size must be at most {length}, the next power of two from S, got {size}")
        key_sign, key_row = jax.random.split(key)
        sign = random_signs(key_sign, (num_rows,))
        return cls(sign, jax.random.permutation(key_row, length)[:size])

    def __matmul__(self, x: Array) -> Array:
        """S x of rows ``x [n, ...]``: ``[M, ...]``."""
        length = _power_of_two(self.num_rows)
        signed = pad_rows(_times_rows(self.sign, _rows(x, self.num_rows)), length - self.num_rows)
        return (hadamard_transform(signed)[self.chosen] / math.sqrt(self.chosen.shape[0])).astype(x.dtype)

    @property
    def num_rows(self) -> int:
        """The number n of rows that it sums."""
        return self.sign.shape[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowSample:
    """Sampled rows, each with a weight.

    Attributes:
        chosen: indices of the rows ``[M]``.
        weight: their weights ``[M]``.
        num_rows: the number n of rows.
    """

    chosen: Array
    weight: Array
    num_rows: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def uniform(cls, key: Array, size: int, num_rows: int) -> Self:
        r"""Sample M of n rows without replacement, with weights :math:`\sqrt{n/M}`.

        Args:
            key: typed PRNG key.
            size: the number M of rows to keep, at most n.
            num_rows: the number n of rows.

        Raises:
            ValueError: a size above n.
        """
        if size > num_rows:
            raise ValueError(f"sketch_size must be at most S = {num_rows} rows, got {size}")
        chosen = jax.random.permutation(key, num_rows)[:size]
        return cls(chosen, jnp.full((size,), math.sqrt(num_rows / size)), num_rows)

    @classmethod
    def with_odds(cls, key: Array, size: int, log_odds: Array) -> Self:
        r"""Sample M rows with replacement, row j with probability :math:`p_j` and weight :math:`1/\sqrt{M p_j}`.

        Args:
            key: typed PRNG key.
            size: the number M of sampled rows.
            log_odds: :math:`\log p` ``[n]`` up to a constant. A row with odds of 0 is not sampled.

        Example:
            >>> import jax, jax.numpy as jnp
            >>> sample = RowSample.with_odds(jax.random.key(0), 4, jnp.log(jnp.array([0.0, 1.0])))
            >>> sample.chosen.tolist(), sample.weight.tolist()
            ([1, 1, 1, 1], [0.5, 0.5, 0.5, 0.5])
        """
        log_p = jax.nn.log_softmax(log_odds)
        cumulative = jnp.cumsum(jnp.exp(log_p))
        # 1 - u is in (0, 1]: the first row whose cumulative odds are at least that large never has odds 0. Multiplying
        # by the total, which rounding may leave below 1, keeps the search within the rows.
        reached = cumulative[-1] * (1 - jax.random.uniform(key, (size,), cumulative.dtype))
        chosen = jnp.searchsorted(cumulative, reached)
        return cls(chosen, jnp.exp(-0.5 * (math.log(size) + log_p[chosen])), log_odds.shape[0])

    def __matmul__(self, x: Array) -> Array:
        """S x of rows ``x [n, ...]``: ``[M, ...]``."""
        return _times_rows(self.weight, _rows(x, self.num_rows)[self.chosen]).astype(x.dtype)


Sketch = DenseSketch | SparseSketch | HadamardSketch | RowSample

SKETCHES: Mapping[str, Callable[[Array, int, int], Sketch]] = {
    "gaussian": DenseSketch.gaussian,
    "rademacher": DenseSketch.signs,
    "achlioptas": lambda key, size, num_rows: DenseSketch.signs(key, size, num_rows, sparsity=3),
    "count": SparseSketch.draw,
    "sparse_jl": lambda key, size, num_rows: SparseSketch.draw(key, size, num_rows, entries=4),
    "hadamard": HadamardSketch.draw,
    "uniform_rows": RowSample.uniform,
}


def draw_sketch(key: Array, kind: str, size: int, num_rows: int) -> Sketch:
    r"""Sample a random matrix S ``[M, n]`` with :math:`E[S^T S] = I`.

    Args:
        key: typed PRNG key.
        kind: ``"gaussian"``; ``"rademacher"`` and ``"achlioptas"``, signs with density 1 and 1/3; ``"count"`` and
            ``"sparse_jl"``, 1 and 4 signs per column; ``"hadamard"``; ``"uniform_rows"``.
        size: the number M of rows of S.
        num_rows: the number n of rows that S sums.

    Returns:
        The sketch, for ``sketch @ x``.

    Raises:
        ValueError: an unknown kind, a size that the kind does not support.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention.core import back, draw_sketch
        >>> sketch = draw_sketch(jax.random.key(0), "hadamard", 64, 64)
        >>> x = jax.random.normal(jax.random.key(1), (64, 3))
        >>> bool(jnp.allclose(back(sketch, sketch @ x), x, atol=1e-5))
        True

    Reference:
        :cite:p:`achlioptas2003database`; :cite:p:`charikar2002finding` for CountSketch;
        :cite:p:`kane2014sparser`; :cite:p:`ailon2009fast` and :cite:p:`tropp2011improved` for the Hadamard
        transform.
    """
    check_choice("sketch", kind, SKETCHES)
    size, num_rows = check_count("sketch_size", size), check_count("num_rows", num_rows)
    return SKETCHES[kind](check_key("draw_sketch", key), size, num_rows)


def back(sketch: Sketch, y: Array) -> Array:
    """Apply the transpose of a sketch, :math:`S^T y`.

    Args:
        sketch: S ``[M, n]``.
        y: rows ``[M, ...]``.

    Returns:
        Rows ``[n, ...]`` in the dtype of y. Their cost is that of ``sketch @ x``; `draw_sketch` has an example.
    """
    # JAX transposes the fast product, so no sketch needs a second implementation.
    like = along_with(jnp.zeros((sketch.num_rows, *y.shape[1:]), y.dtype), y)
    return jax.linear_transpose(lambda x: sketch @ x, like)(y)[0]


def hadamard_transform(x: Float[Array, "N ..."]) -> Float[Array, "N ..."]:
    r"""The unnormalised Walsh-Hadamard transform over the first axis, in :math:`N \log N`.

    .. math:: y = H_N x, \qquad H_1 = (1), \qquad H_{2N} = \begin{pmatrix} H_N & H_N \\ H_N & -H_N \end{pmatrix}.

    Args:
        x: rows ``[N, ...]``, N a power of two.

    Returns:
        The transformed rows ``[N, ...]``; applied twice it gives N x.

    Raises:
        ValueError: N is not a power of two.

    Example:
        >>> import jax.numpy as jnp
        >>> hadamard_transform(jnp.array([1.0, 2.0, 3.0, 4.0])).tolist()
        [10.0, -2.0, -4.0, 0.0]
    """
    length = x.shape[0]
    if length != _power_of_two(length):
        raise ValueError(f"the length must be a power of two, got {length}")
    # Butterflies: N log N additions instead of N^2 for a matrix product.
    flat = x.reshape(length, -1)
    half = 1
    while half < length:
        pairs = flat.reshape(-1, 2, half, flat.shape[-1])
        flat = jnp.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1)
        half *= 2
    return flat.reshape(x.shape)


@in_float32()
def leverages(k: Float[Array, "S D"], *, ridge: float = 1e-2) -> Float[Array, " S"]:
    r"""Ridge leverage scores :math:`\ell_j = k_j^T (K^T K + \lambda I)^{-1} k_j`, whose sum is at most D.

    Args:
        k: rows ``[S, D]``.
        ridge: :math:`\lambda` in units of the mean eigenvalue of :math:`K^T K`, positive.

    Returns:
        The scores ``[S]`` in float32 or wider; 0 for rows of zeros.

    Raises:
        TypeError: a ridge that is not a number.
        ValueError: a concrete ridge that is not positive and finite.

    Example:
        >>> import jax.numpy as jnp
        >>> leverages(jnp.eye(2), ridge=1.0).tolist()
        [0.5, 0.5]
    """
    check_number("ridge", ridge)
    check_positive("ridge", ridge)
    k = k.astype(accumulation_dtype(k))
    gram = k.T @ k
    # Relative to the mean eigenvalue, so that scores do not depend on the scale of the keys; 1 if all keys are 0.
    level = ridge * jnp.trace(gram) / k.shape[1]
    level = jnp.where(level > 0, level, 1)
    return jnp.sum(k.T * jnp.linalg.solve(gram + level * jnp.eye(k.shape[1], dtype=k.dtype), k.T), axis=0)


def _rows(x: Array, num_rows: int) -> Array:
    """The checked rows to which a sketch is applied, in the accumulation dtype."""
    check_floating("x", x)
    if x.shape[:1] != (num_rows,):
        raise ValueError(f"the sketch applies to {num_rows} rows, got shape {x.shape}")
    return x.astype(accumulation_dtype(x))


def _times_rows(weight: Array, x: Array) -> Array:
    """Rows ``[n, ...]`` times a weight each."""
    return weight.astype(x.dtype).reshape(-1, *(1,) * (x.ndim - 1)) * x


def _power_of_two(length: int) -> int:
    """The smallest power of two that is at least ``length``."""
    return 1 << max(0, length - 1).bit_length()
