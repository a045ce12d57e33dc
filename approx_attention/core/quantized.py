r"""Quantised tokens: keys and values relative to the centres of their groups, rotated and rounded.

A fixed rotation spreads every channel over all channels, so that an outlier channel does not set the step of the
others. It consists of random signs and the discrete Hartley transform, which is orthogonal and has entries of similar
size for every number of channels. (Hadamard matrices, which need a power of two, and random orthogonal matrices give
the same errors.) Queries and outputs are rotated instead of tokens.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from approx_attention.core.checks import check_count, shown
from approx_attention.core.precision import in_float32
from approx_attention.core.sketches import random_signs
from approx_attention.core.summaries import (
    ChosenTokens,
    FeatureMoments,
    InSpace,
    WeightedKV,
    range_of_both,
    scale_ratio,
)
from approx_attention.kernels import even_split, in_blocks, merge, out_of_blocks, require_same_kind

# Number of consecutive tokens that share a centre. On the sample a centre per 128 tokens lowers the error at 4 bits by
# 25 to 45 %, for at most 8 (D + Dv) / 128 bytes per token; softmax does not depend on the common part of all keys.
QUANTIZED_GROUP = 128

# The 16 levels with the least mean squared error for N(0, 1), 0.009501, each the mean of its cell (Max 1960, table I).
# Only the positive levels; the others are their negatives.
GAUSSIAN_LEVELS = np.array(
    [0.12839503, 0.38804830, 0.65675912, 0.94234046, 1.25623120, 1.61804639, 2.06901723, 2.73258957]
)
_LEVELS = np.concatenate([-GAUSSIAN_LEVELS[::-1], GAUSSIAN_LEVELS]).astype(np.float32)
_EDGES = (_LEVELS[1:] + _LEVELS[:-1]) / 2


class _Grid(NamedTuple):
    """The quantisation levels of rows, in units of each row's step.

    Attributes:
        encode: ``rows [..., D] in [-1, 1] -> codes``.
        decode: ``(codes, D) -> levels [..., D]``.
    """

    encode: Callable[[Array], Array]
    decode: Callable[[Array, int], Array]


def _to_uniform(unit: Array) -> Array:
    return jnp.round(127 * unit).astype(jnp.int8)


def _of_uniform(codes: Array, num_channels: int) -> Array:
    return codes.astype(jnp.float32)


def _to_gaussian(unit: Array) -> Array:
    square = jnp.mean(unit * unit, axis=-1, keepdims=True)
    normal = unit * lax.rsqrt(jnp.where(square > 0, square, 1))
    codes = jnp.searchsorted(jnp.asarray(_EDGES, unit.dtype), normal, method="compare_all").astype(jnp.uint8)
    # Two codes per byte: the first half of the channels in the low bits, the second half in the high bits.
    half = (unit.shape[-1] + 1) // 2
    high = jnp.pad(codes[..., half:], ((0, 0),) * (codes.ndim - 1) + ((0, 2 * half - unit.shape[-1]),))
    return codes[..., :half] | (high << 4)


def _of_gaussian(codes: Array, num_channels: int) -> Array:
    both = jnp.concatenate([codes & 15, codes >> 4], axis=-1)[..., :num_channels]
    return jnp.asarray(_LEVELS)[both]


# With 256 levels, Lloyd-Max levels are no better than equal steps up to the largest entry, which never overflow.
_GRIDS: Mapping[int, _Grid] = {8: _Grid(_to_uniform, _of_uniform), 4: _Grid(_to_gaussian, _of_gaussian)}


def check_bits(name: str, bits: Any) -> int:
    """Return ``bits`` as an int if it is 8 or 4.

    Raises:
        TypeError: not an integer known when tracing.
        ValueError: another number; ``name`` is the name of the argument in the message.
    """
    if check_count(name, bits) not in _GRIDS:
        raise ValueError(f"{name} must be 8 or 4, got {shown(bits)}")
    return int(bits)


@functools.lru_cache(maxsize=32)
def _rotation(num_channels: int, seed: int) -> np.ndarray:
    """The orthogonal matrix that multiplies rows from the right: random signs, then the Hartley transform."""
    with jax.ensure_compile_time_eval():
        sign = np.asarray(random_signs(jax.random.key(seed), (num_channels,)), np.float64)
    index = np.arange(num_channels)
    angle = 2 * np.pi * (np.outer(index, index) % num_channels) / num_channels
    return sign[:, None] * (np.cos(angle) + np.sin(angle)) / np.sqrt(num_channels)


@in_float32()
def rotated(x: Array, seed: int) -> Array:
    """Rotate rows into the space in which tokens are rounded.

    Args:
        x: rows ``[..., D]``.
        seed: seed of the signs of the rotation.

    Returns:
        Rows ``[..., D]`` with the same inner products, in the dtype of x.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.array([[8.0, 0.0, 0.0, 0.0]])
        >>> abs(rotated(x, 0)).tolist(), bool(jnp.allclose(rotated_back(rotated(x, 0), 0), x))
        ([[4.0, 4.0, 4.0, 4.0]], True)
    """
    return x @ jnp.asarray(_rotation(x.shape[-1], seed), x.dtype)


@in_float32()
def rotated_back(x: Array, seed: int) -> Array:
    """The inverse of ``rotated``.

    Args:
        x: rotated rows ``[..., D]``.
        seed: as in ``rotated``.

    Returns:
        Rows ``[..., D]`` in the dtype of x.
    """
    return x @ jnp.asarray(_rotation(x.shape[-1], seed).T, x.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedRows:
    r"""Quantised rows: :math:`x_{gj} R \approx a_{gj} c_g + s_{gj}\, \ell(\mathrm{codes}_{gj})`, for given a.

    The step s makes the projection of the rounded row onto the row as long as the row itself,
    :math:`\langle x, \hat x \rangle = \|x\|^2` relative to the centres. Levels that are means of their cells would
    shrink rows, and this bias of logits and outputs would not average out over tokens.

    Attributes:
        codes: codes of the levels: ``[G, m, D]``, int8, or two codes per byte ``[G, m, D/2]``, uint8.
        step: s ``[G, m]``.
        centre: c ``[G, D]``, rotated.
        bits: 8 or 4.
        seed: seed of the rotation.
    """

    codes: Array
    step: Array
    centre: Array
    bits: int = dataclasses.field(metadata={"static": True})
    seed: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, x: Array, along: Array, *, bits: int, seed: int) -> Self:
        """Quantise rows relative to given multiples of their group's centre, which is fitted by least squares.

        Args:
            x: rows ``[G, m, D]``, not rotated.
            along: a ``[G, m]``: the multiple of the centre that is subtracted from each row.
            bits: 8 or 4.
            seed: seed of the rotation.
        """
        x = rotated(x, seed)
        weight = jnp.sum(along * along, axis=1)
        centre = jnp.sum(along[..., None] * x, axis=1) / jnp.where(weight > 0, weight, 1)[:, None]
        x = x - along[..., None] * centre[:, None]
        # In [-1, 1], so that no square overflows. A row with NaN has a step of NaN.
        peak = jnp.max(jnp.abs(x), axis=-1)
        unit = x / jnp.where(peak > 0, peak, 1)[..., None]
        codes = _GRIDS[bits].encode(unit)
        level = _GRIDS[bits].decode(codes, x.shape[-1]).astype(x.dtype)
        square, product = jnp.sum(unit * unit, axis=-1), jnp.sum(unit * level, axis=-1)
        return cls(codes, peak * square / jnp.where(product > 0, product, 1), centre, bits, seed)

    def rows(self, along: Array) -> Array:
        """The rounded rows ``[G, m, D]``, in rotated space."""
        level = _GRIDS[self.bits].decode(self.codes, self.centre.shape[-1]).astype(self.step.dtype)
        return along[..., None] * self.centre[:, None] + self.step[..., None] * level

    def times(self, factor: Array) -> Self:
        """All rows times one number."""
        return dataclasses.replace(self, step=self.step * factor, centre=self.centre * factor)

    def joined(self, other: Self) -> Self:
        """The groups of both operands."""
        return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), self, other)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedKV(InSpace):
    r"""The tokens of a `WeightedKV` in 8 or 4 bits per channel, in G groups of m consecutive tokens.

    Made by `quantize`. `attend` and `merge` treat it like a `WeightedKV`; a token without mass stays absent. With
    D = Dv = 64 a token takes 140 bytes at 8 bits and 76 at 4 bits, plus 4 bytes for its share of a centre, instead of
    516 bytes in float32.

    Attributes:
        k: keys in scaled space.
        value_sum: the sum of values of each token, relative to its mass times the centre.
        mass: ``[G, m]``, of any sign, not quantised: masses reach the number of tokens, and Nystrom weights cancel.
        value_range: as in `WeightedKV`, in the space of the values.
        scale: as in `WeightedKV`.
    """

    k: QuantizedRows
    value_sum: QuantizedRows
    mass: Array
    value_range: Array | None = None
    scale: Array | None = None

    def in_rotated_space(self) -> WeightedKV:
        """The tokens ``[G m]`` in rotated space, for rotated queries; `attend` rotates queries and outputs."""
        present = jnp.ones_like(self.mass)
        rows = self.k.rows(present), self.value_sum.rows(self.mass), self.mass
        return WeightedKV(*(out_of_blocks(x) for x in rows))

    @property
    def values_from_to(self) -> Array:
        """Smallest and largest value per channel ``[2, Dv]``, as for a `WeightedKV`."""
        return self.dequantized().values_from_to

    def dequantized(self) -> WeightedKV:
        """Convert to a `WeightedKV` with the rounded keys and values of the G m tokens in full precision."""
        tokens = self.in_rotated_space()
        k, value_sum = rotated_back(tokens.k, self.k.seed), rotated_back(tokens.value_sum, self.k.seed)
        return WeightedKV(k, value_sum, tokens.mass, self.value_range, self.scale)


Summary = WeightedKV | QuantizedKV | FeatureMoments | ChosenTokens


def quantize(summary: WeightedKV, *, bits: int, seed: int = 0) -> QuantizedKV:
    r"""Quantise the keys and values of tokens to 8 or 4 bits; masses are unchanged.

    A group of at most 128 consecutive tokens stores its mean key and value. Each token stores its difference from them,
    rotated and in units of its step, at 256 equal levels or at the 16 levels that are best for a Gaussian, which
    rotated channels resemble. At 4 bits the squared error is 0.0096 of the squared difference.

    Quantised keys, values and masses have no gradient; queries do.

    Args:
        summary: tokens with masses of any sign. Absent tokens are appended if M is not a multiple of the group size.
        bits: 8 or 4, per channel of keys and values.
        seed: seed of the signs of the rotation. It must only be independent of the data, so one seed serves all
            tensors; only tokens of one seed can be merged.

    Returns:
        The `QuantizedKV`.

    Raises:
        TypeError: not a `WeightedKV`, bits or a seed that are not integers.
        ValueError: bits other than 8 and 4, a negative seed.

    Example:
        >>> import jax
        >>> from approx_attention import WeightedKV, attend
        >>> from approx_attention.core import quantize, summary_bytes
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (256, 64)) for i in range(3))
        >>> tokens = WeightedKV.of_tokens(k, v)
        >>> small = quantize(tokens, bits=4)
        >>> summary_bytes(tokens) / summary_bytes(small)
        6.45
        >>> out, rounded = attend(q / 8, tokens).out, attend(q / 8, small).out
        >>> bool(abs(rounded - out).max() < 0.1)
        True

    Reference:
        :cite:p:`max1960quantizing` for the levels; :cite:p:`ashkboos2024quarot` for the rotation of caches, and
        :cite:p:`liu2024kivi` for the outlier channels that call for it.
    """
    if not isinstance(summary, WeightedKV):
        raise TypeError(f"quantize takes a WeightedKV, got {type(summary).__name__}")
    if summary.mass.shape[0] == 0:
        raise ValueError("quantize needs at least one token, got an empty summary")
    how: Any = {"bits": check_bits("bits", bits), "seed": check_count("seed", seed, least=0)}
    summary = lax.stop_gradient(summary)
    present = summary.present
    k = jnp.where(present[:, None], summary.k, 0)
    size = even_split(summary.mass.shape[0], QUANTIZED_GROUP)[1]
    k, value_sum, mass, present = (in_blocks(x, size) for x in (k, summary.value_sum, summary.mass, present))
    keys = QuantizedRows.of(k, present.astype(k.dtype), **how)
    values = QuantizedRows.of(value_sum, mass, **how)
    return QuantizedKV(keys, values, mass, summary.value_range, summary.scale)


def quantized_bytes(num_tokens: int, head_dim: int, value_dim: int, *, bits: int, dtype: Any = jnp.float32) -> int:
    """The `summary_bytes` of quantised tokens with non-negative masses.

    Args:
        num_tokens: the number M of tokens.
        head_dim: the number D of channels of keys.
        value_dim: the number Dv of channels of values.
        bits: 8 or 4.
        dtype: dtype of steps, centres and masses.

    Returns:
        The bytes, including those of tokens that fill the last group.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention import WeightedKV
        >>> from approx_attention.core import quantize, summary_bytes
        >>> small = quantize(WeightedKV.of_tokens(jnp.ones((200, 8)), jnp.ones((200, 8))), bits=4)
        >>> quantized_bytes(200, 8, 8, bits=4) == summary_bytes(small)
        True
    """
    size = even_split(num_tokens, QUANTIZED_GROUP)[1]
    groups = -(-num_tokens // size)
    codes = sum(-(-channels * bits // 8) for channels in (head_dim, value_dim))
    return groups * (size * codes + (3 * size + head_dim + value_dim) * jnp.dtype(dtype).itemsize)


@merge.register
def _merge_quantized(a: QuantizedKV, b: Any) -> QuantizedKV:
    require_same_kind(a, b)
    kinds = [(x.k.bits, x.k.seed, x.k.centre.shape[1], x.value_sum.centre.shape[1], x.mass.shape[1]) for x in (a, b)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            "merge needs quantized tokens of equal (bits, seed, D, Dv, tokens per group); call dequantized() on other "
            f"tokens; got {kinds[0]} and {kinds[1]}"
        )
    (ratio, _), keys = scale_ratio(a, b), b.k
    if ratio is not None:
        keys = keys.times(jnp.sqrt(ratio).astype(keys.step.dtype))
    mass = jnp.concatenate([a.mass, b.mass])
    return QuantizedKV(a.k.joined(keys), a.value_sum.joined(b.value_sum), mass, range_of_both(a, b), a.scale)
