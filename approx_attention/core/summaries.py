"""Summaries: compact representations of keys and values that any query can attend to.

Every approximation replaces (K, V) by one of two kinds of summary: tokens, real or synthetic (`WeightedKV`), or moments
of a feature map (`FeatureMoments`). `attend` computes attention over a summary, `merge` joins summaries of disjoint
sets of keys. Logits are plain dot products here, with the scale folded into queries and keys (`fold_scale`). A summary
of unscaled keys carries the scale, and applies to unscaled queries.
"""

import dataclasses
import math
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer

from approx_attention import kernels
from approx_attention.core.checks import accumulation_dtype, real_keys, token_sums_inputs
from approx_attention.core.features import FeatureMap, PositiveFeatures, SignedFeatures, squared_norm
from approx_attention.kernels import (
    HIDDEN,
    finite_peak,
    in_blocks,
    merge,
    require_same_kind,
)

# Features are computed in blocks of at most 1024 rows and 2^18 numbers (1 MB in float32, within the cache), so that
# memory does not grow with S R; and of at least 128 rows, for efficient matrix products.
FEATURE_BLOCK = 1024
LEAST_FEATURE_BLOCK, FEATURE_TILE = 128, 2**18


class InSpace:
    """Base class of summaries: the space of their keys."""

    scale: Array | None

    def in_scaled_space(self) -> Self:
        """The same summary for queries in scaled space (`fold_scale`), which is that of its stored keys."""
        return dataclasses.replace(self, scale=None)  # pyright: ignore[reportArgumentType]

    def _unshared(self) -> Self:
        """The summary without the parts that summaries share, which do not count as bytes of each."""
        return self.in_scaled_space()


class ChosenTokens(InSpace):
    """Base class of summaries that keep every token, of which a query reads a few; subclasses define the choice.

    Attributes:
        k: keys ``[M, D]`` in scaled space.
        mass: the number of keys that each token represents, ``[M]``.
    """

    k: Array
    mass: Any

    def numbers_at_once(self, num_queries: int) -> int:
        """The number of array entries that `state` and its gradient hold at once for a number of queries.

        Raises:
            NotImplementedError: in this class; every subclass defines the choice.
        """
        raise NotImplementedError

    def state(self, q: Array) -> kernels.AttentionState:
        """The attention of queries ``[T, D]`` in scaled space, each over the tokens that it chooses.

        Raises:
            NotImplementedError: in this class; every subclass defines the choice.
        """
        raise NotImplementedError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WeightedKV(InSpace):
    r"""A summary of keys and values by M tokens with masses.

    .. math:: \mathrm{attend}(q) = \sum_j e^{q \cdot k_j}\, \mathrm{value\_sum}_j
              \Big/ \sum_j e^{q \cdot k_j}\, \mathrm{mass}_j

    With non-negative masses this is softmax attention with logits :math:`q \cdot k_j + \log \mathrm{mass}_j` over the
    values ``value_sum / mass``. A token of mass 0 is absent, for any key and any finite value. Signed masses (Nystrom
    weights) and values without mass need the range of the true values, to which outputs are clipped; without a range a
    negative mass gives NaN.

    Attributes:
        k: keys ``[M, D]`` in scaled space.
        value_sum: the weighted sum of the values that each token represents, ``[M, Dv]``.
        mass: the number of keys that each token represents, ``[M]``.
        value_range: smallest and largest value per channel ``[2, Dv]`` if masses are signed, else ``None``.
        scale: factor s of the logits if the summary applies to unscaled queries; ``None`` for queries in scaled space.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention import WeightedKV, attend
        >>> tokens = WeightedKV(k=jnp.zeros((2, 4)), value_sum=jnp.array([[1.0], [6.0]]), mass=jnp.array([1.0, 3.0]))
        >>> tokens.values[:, 0].tolist(), float(attend(jnp.ones((1, 4)), tokens).out[0, 0])  # (1 + 6) / (1 + 3)
        ([1.0, 2.0], 1.75)
    """

    k: Array
    value_sum: Array
    mass: Array
    value_range: Array | None = None
    scale: Array | None = None

    @classmethod
    def of_tokens(cls, k: Array, v: Array, kv_mask: Array | None = None) -> Self:
        """Keep every token with mass 1, and masked ones with mass 0.

        Args:
            k: keys ``[S, D]``, in scaled space unless the summary gets a ``scale``.
            v: values ``[S, Dv]``.
            kv_mask: true where a key is real ``[S]``; by default all are.

        Raises:
            TypeError: keys or values that are not floating point, a mask that is not boolean.
            ValueError: different numbers of keys, values and mask entries.
        """
        k, v = token_sums_inputs(k, v, kv_mask)
        mass = jnp.ones(k.shape[0], v.dtype) if kv_mask is None else kv_mask.astype(v.dtype)
        return cls(k, v, mass)

    @property
    def values(self) -> Array:
        """The mean value that each token represents, ``[M, Dv]``."""
        # Divided by 1 for mass 0: an absent token, or one with values but no mass (`BalanceKV`, `SubGen`).
        return self.value_sum / jnp.where(self.mass == 0, 1, self.mass)[:, None]

    @property
    def log_mass(self) -> Array:
        """Logarithms of non-negative masses ``[M]``; ``HIDDEN`` for absent tokens."""
        # HIDDEN and a double where instead of log(0), so that neither a row without keys nor its derivative is NaN.
        absent = self.mass == 0
        return jnp.where(absent, HIDDEN, jnp.log(jnp.where(absent, 1, self.mass)))

    @property
    def present(self) -> Array:
        """Mask of the tokens with a mass or a value ``[M]`` (`BalanceKV` and `SubGen` make values without mass)."""
        return (self.mass != 0) | jnp.any(self.value_sum != 0, axis=1)

    @property
    def values_from_to(self) -> Array:
        """Smallest and largest value per channel ``[2, Dv]``, without gradient; inf and -inf if empty."""
        if self.value_range is not None:
            return self.value_range
        # Without gradient: it is a bound for outputs, not a term of them.
        present, values = (self.mass > 0)[:, None], lax.stop_gradient(self.values)
        low = jnp.min(values, axis=0, initial=jnp.inf, where=present)
        return jnp.stack([low, jnp.max(values, axis=0, initial=-jnp.inf, where=present)])

    @classmethod
    def empty(cls, num_tokens: int, head_dim: int, value_dim: int, dtype: Any = jnp.float32) -> Self:
        """A summary of absent tokens: keys and values 0, with masses 0.

        Args:
            num_tokens: the number M of tokens.
            head_dim: the number D of channels of keys.
            value_dim: the number Dv of channels of values.
            dtype: float32 or wider.
        """
        zeros = jnp.zeros((num_tokens,), dtype)
        return cls(jnp.zeros((num_tokens, head_dim), dtype), jnp.zeros((num_tokens, value_dim), dtype), zeros)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FeatureMoments(InSpace):
    r"""A summary of keys and values by feature moments: sums of features over tokens, with values and without.

    .. math:: \mathrm{attend}(q)
              = \frac{\phi(q)^T\, (e^c \odot \mathrm{value\_sum})}{\phi(q)^T\, (e^c \odot \mathrm{mass})}, \quad
              \mathrm{value\_sum}_r = \sum_j \phi_r(k_j)\, e^{-c_r} v_j, \quad
              \mathrm{mass}_r = \sum_j \phi_r(k_j)\, e^{-c_r}.

    The log-scale c of each feature is its largest log-magnitude over the keys so far, or that of their sum, so that no
    key can make the features of another underflow.

    Attributes:
        value_sum: ``[R, Dv]``.
        mass: ``[R]``.
        log_scale: c ``[R]``, ``-inf`` without keys.
        features: the feature map of keys and queries.
        scale: as in `WeightedKV`.

    Example:
        >>> import jax
        >>> from approx_attention import FeatureMoments, attend
        >>> from approx_attention.core import PositiveFeatures
        >>> q, k, v, w = (0.3 * jax.random.normal(jax.random.key(i), (16, 4)) for i in range(4))
        >>> moments = FeatureMoments.of_tokens(PositiveFeatures(w), k, v)
        >>> moments.value_sum.shape, attend(q, moments).out.shape
        ((16, 4), (16, 4))
    """

    value_sum: Array
    mass: Array
    log_scale: Array
    features: FeatureMap
    scale: Array | None = None

    @classmethod
    def empty(cls, features: FeatureMap, value_dim: int, dtype: Any = jnp.float32) -> Self:
        """The moments of an empty set of keys: zeros, with log-scales of ``-inf``.

        Args:
            features: the feature map of keys and queries.
            value_dim: the number Dv of channels of values.
            dtype: float32 or wider.
        """
        # log_scale is -inf, so that any key sets the scale of its features.
        zeros = jnp.zeros((features.num_features,), dtype)
        return cls(jnp.zeros((features.num_features, value_dim), dtype), zeros, zeros - jnp.inf, features)

    @classmethod
    def of_tokens(cls, features: FeatureMap, k: Array, v: Array, kv_mask: Array | None = None) -> Self:
        """Sum the features of all keys, block by block.

        Args:
            features: the feature map of keys and queries.
            k: keys ``[S, D]`` in scaled space.
            v: values ``[S, Dv]``.
            kv_mask: true where a key is real ``[S]``; by default all are.

        Raises:
            TypeError: keys or values that are not floating point, a mask that is not boolean.
            ValueError: different numbers of keys, values and mask entries.
        """
        k, v = token_sums_inputs(k, v, kv_mask)
        num_keys = k.shape[0]
        if isinstance(features, PositiveFeatures):
            return cls._of_positive_features(features, k, v, kv_mask)
        if num_keys == 0:
            return cls.empty(features, v.shape[-1], v.dtype)
        block = feature_block(features)
        if num_keys <= block:
            return cls._of_block(features, k, v, kv_mask)
        tokens = tuple(in_blocks(x, block) for x in (k, v, real_keys(kv_mask, num_keys)))
        # Features are recomputed in the backward pass; storing them would take S R numbers.
        step = jax.checkpoint(lambda moments, block: merge(moments, cls._of_block(features, *block)))
        empty = cls.empty(features, v.shape[-1], v.dtype)
        return lax.scan(lambda moments, block: (step(moments, block), None), empty, tokens)[0]

    def _unshared(self) -> Self:
        return dataclasses.replace(self, features=None, scale=None)  # pyright: ignore[reportArgumentType]

    def weighted(self, log_weight: Array) -> Self:
        """The moments with feature r times :math:`e^{b_r}`.

        The weights enter the log-scales, so that they neither over- nor underflow. Gradients reach them.

        Args:
            log_weight: b ``[R]``, finite.

        Example:
            >>> import jax.numpy as jnp
            >>> from approx_attention import FeatureMoments
            >>> from approx_attention.core import ReLUFeatures
            >>> moments = FeatureMoments.of_tokens(ReLUFeatures(jnp.eye(2), offset=0.0), jnp.eye(2), jnp.eye(2))
            >>> (moments.weighted(jnp.array([0.0, 1.0])).log_scale - moments.log_scale).tolist()
            [0.0, 1.0]
        """
        # The log-scale has no gradient; the gradient of the weights flows through a factor equal to 1.
        factor = jnp.exp(log_weight - lax.stop_gradient(log_weight))
        log_scale = self.log_scale + lax.stop_gradient(log_weight)
        return type(self)(self.value_sum * factor[:, None], self.mass * factor, log_scale, self.features, self.scale)

    def reweighted(self, weights: Array, features: FeatureMap) -> Self:
        """The moments with feature r times a weight of any sign, for queries with another feature map.

        The result of `attend` is empty where the weighted mass of a query is not positive.

        Args:
            weights: ``[R]``.
            features: the feature map of the queries, of size R.

        Example:
            >>> import jax.numpy as jnp
            >>> from approx_attention import FeatureMoments
            >>> from approx_attention.core import ReLUFeatures
            >>> features = ReLUFeatures(jnp.eye(2), offset=0.0)
            >>> moments = FeatureMoments.of_tokens(features, jnp.eye(2), jnp.eye(2))
            >>> moments.reweighted(jnp.array([1.0, -2.0]), features).mass.tolist()
            [1.0, -2.0]
        """
        if isinstance(features, PositiveFeatures):
            features = SignedFeatures(features)
        value_sum = self.value_sum * weights[:, None]
        return type(self)(value_sum, self.mass * weights, self.log_scale, features, self.scale)

    @classmethod
    def _of_positive_features(cls, features: PositiveFeatures, k: Array, v: Array, kv_mask: Array | None) -> Self:
        r"""Moments of positive features, computed as softmax attention of the directions w over the keys.

        .. math:: \phi_r(k_j) = e^{w_r \cdot k_j - \|k_j\|^2 / 2 + b_r} R^{-1/2}
        """
        key_bias = -squared_norm(k)[:, 0] / 2
        if kv_mask is not None:
            key_bias = jnp.where(kv_mask, key_bias, HIDDEN)
        state = kernels.state(features.projection.astype(k.dtype), k, v, key_bias)
        # Masses have the value 1, with the log-scale of their own sum; the gradient of the sum flows through them.
        log_scale = lax.stop_gradient(state.lse)
        mass = jnp.exp(state.lse - finite_peak(log_scale))
        moments = cls(state.out * mass[:, None], mass, log_scale - 0.5 * math.log(features.num_features), features)
        return moments if features.log_weight is None else moments.weighted(features.log_weight.astype(k.dtype))

    @classmethod
    def _of_block(cls, features: FeatureMap, k: Array, v: Array, kv_mask: Array | None) -> Self:
        values, log_scale = features(k)
        if kv_mask is not None:
            log_scale = jnp.where(kv_mask[:, None], log_scale, -jnp.inf)
        # A maximum per feature, not one for all: a feature far from all keys so far stays accurate for later keys.
        peak = lax.stop_gradient(jnp.max(log_scale, axis=0))
        weights = values * jnp.exp(log_scale - finite_peak(peak)[None])
        weights = jnp.broadcast_to(weights, (k.shape[0], features.num_features))
        # Twice as fast on a CPU as weights.T @ v; the barrier keeps XLA from rewriting it to that.
        value_sum = lax.optimization_barrier(v.T @ weights).T
        return cls(value_sum, jnp.sum(weights, axis=0), jnp.broadcast_to(peak, value_sum.shape[:1]), features)


def feature_block(features: FeatureMap) -> int:
    """The number of rows whose features fit in the CPU cache."""
    return max(LEAST_FEATURE_BLOCK, min(FEATURE_BLOCK, FEATURE_TILE // features.num_features))


def scaled_queries(q: Array, summary: InSpace) -> Array:
    r"""Scale queries into the space of the stored keys of a summary.

    Args:
        q: queries ``[T, D]``, unscaled if the summary carries a scale, else in scaled space.
        summary: a summary of any kind.

    Returns:
        :math:`\sqrt{s}\, q` ``[T, D]`` in the dtype of q; q itself if the summary carries no scale.
    """
    return q if summary.scale is None else q * jnp.sqrt(summary.scale).astype(q.dtype)


def require_scaled_space(owner: str, summary: Any) -> Any:
    """Return a summary, if it applies to queries in scaled space.

    Args:
        owner: the start of the error message: the function or class that needs such a summary.
        summary: a summary, or an object without a ``scale``.

    Raises:
        ValueError: the summary carries a scale.
    """
    if getattr(summary, "scale", None) is not None:
        raise ValueError(
            f"{owner} uses queries in scaled space (fold_scale), but the summary carries a scale for unscaled queries; "
            "pass summary.in_scaled_space()"
        )
    return summary


def scale_ratio(a: InSpace, b: InSpace) -> tuple[Any, Any]:
    """The scale of ``b`` over that of ``a`` (None without scales), and whether it is 1 up to rounding.

    Raises:
        ValueError: concrete scales differ, or only one summary has a scale.
    """
    if (a.scale is None) != (b.scale is None):
        raise ValueError(
            "merge needs summaries of one space, but only one of these carries a scale; make both from unscaled keys, "
            "or use both in scaled space (summary.in_scaled_space())"
        )
    if a.scale is b.scale:
        return None, True
    known = not isinstance(a.scale, Tracer) and not isinstance(b.scale, Tracer)
    scales = [(np if known else jnp).asarray(x) for x in (a.scale, b.scale)]
    dtype = accumulation_dtype(*scales)
    ratio = scales[1].astype(dtype) / scales[0].astype(dtype)
    # Within two rounding errors of the narrower dtype.
    same = abs(ratio - 1) <= 2 * max(float(jnp.finfo(x.dtype).eps) for x in scales)
    if known and not np.all(same):
        raise ValueError(f"merge needs summaries of one scale, got {a.scale} and {b.scale}")
    return ratio, same


def _nan_unless(same: Any, x: Array) -> Array:
    """NaN if traced scales differ, which cannot raise an error."""
    return x if same is True else jnp.where(jnp.asarray(same), x, jnp.nan)


def first_blocks(blocks: WeightedKV, count: Array) -> WeightedKV:
    """The tokens of the first blocks of a sequence, as one summary.

    The tokens of the other blocks are absent, with their keys kept.

    Args:
        blocks: the tokens of n blocks of m, every array stacked ``[n, m, ...]``; without a range and a scale.
        count: the number of blocks to keep, int32.

    Returns:
        The `WeightedKV` of n m tokens.
    """
    seen = (jnp.arange(blocks.mass.shape[0], dtype=jnp.int32) < count)[:, None]
    value_sum, mass = jnp.where(seen[..., None], blocks.value_sum, 0), jnp.where(seen, blocks.mass, 0)
    return WeightedKV(*(x.reshape(-1, *x.shape[2:]) for x in (blocks.k, value_sum, mass)))


@merge.register
def _merge_tokens(a: WeightedKV, b: Any) -> WeightedKV:
    require_same_kind(a, b)
    for name, x, y in (("D", a.k, b.k), ("Dv", a.value_sum, b.value_sum)):
        if x.shape[1:] != y.shape[1:]:
            raise ValueError(f"merge needs tokens with equal {name}, got {x.shape[1:]} and {y.shape[1:]}")
    k, value_sum, mass = (
        joined(x, y) for x, y in ((a.k, keys_as_of(a, b)), (a.value_sum, b.value_sum), (a.mass, b.mass))
    )
    return WeightedKV(k, value_sum, mass, range_of_both(a, b), a.scale)


def keys_as_of(a: Any, b: Any) -> Array:
    """The stored keys of one summary for the queries of another.

    Args:
        a: the summary whose scale the queries carry.
        b: a summary with keys ``[M, D]``.

    Returns:
        The keys of ``b`` times the root of its scale over that of ``a``; unchanged without scales.

    Raises:
        ValueError: concrete scales differ, or only one summary has a scale.
    """
    ratio, _ = scale_ratio(a, b)
    # b's stored keys carry the root of b's scale; with a's scale on queries they need b's over the root of a's.
    return b.k if ratio is None else b.k * jnp.sqrt(ratio).astype(b.k.dtype)


def range_of_both(a: Any, b: Any) -> Array | None:
    """Smallest and largest value per channel over two sets of tokens, if one of them has a range."""
    if a.value_range is None and b.value_range is None:
        return None
    (low_a, high_a), (low_b, high_b) = a.values_from_to, b.values_from_to
    return jnp.stack([jnp.minimum(low_a, low_b), jnp.maximum(high_a, high_b)])


def joined(x: Array, y: Array) -> Array:
    """Rows of both, in the wider dtype."""
    dtype = x.dtype if x.dtype == y.dtype else accumulation_dtype(x, y)
    return jnp.concatenate([x.astype(dtype), y.astype(dtype)])


@merge.register
def _merge_moments(a: FeatureMoments, b: Any) -> FeatureMoments:
    require_same_kind(a, b)
    _require_same_features(a.features, b.features)
    # Both at the larger log-scale: the other is scaled down, which may underflow to 0 but never overflows.
    peak = jnp.maximum(a.log_scale, b.log_scale)
    factor_a, factor_b = (jnp.exp(x.log_scale - finite_peak(peak)) for x in (a, b))
    value_sum = a.value_sum * factor_a[:, None] + b.value_sum * factor_b[:, None]
    # Unlike keys, features of keys with another scale cannot be converted.
    mass = _nan_unless(scale_ratio(a, b)[1], a.mass * factor_a + b.mass * factor_b)
    return FeatureMoments(value_sum, mass, peak, a.features, a.scale)


def hadamard(first: FeatureMoments, *others: FeatureMoments) -> FeatureMoments:
    r"""Multiply feature moments: the moments of all tuples with one token from each set.

    .. math:: \sum_{j, l} \phi_r(k^1_j)\, \phi_r(k^2_l)\, v^1_j \odot v^2_l
              = \Big(\sum_j \phi_r(k^1_j)\, v^1_j\Big) \odot \Big(\sum_l \phi_r(k^2_l)\, v^2_l\Big)

    Args:
        first: moments of one set, whose feature map is used for queries.
        others: moments of further sets, of the same size.

    Returns:
        The moments of the tuples, whose values and features multiply entry by entry. The time does not depend on the
        number of tokens.

    Raises:
        TypeError: not `FeatureMoments`.
        ValueError: moments of different sizes or scales. If traced scales differ, the product is NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention.tensor import MonomialFeatures, total_degree
        >>> from approx_attention.core import FeatureMoments, hadamard
        >>> features = MonomialFeatures(total_degree(1, 1))
        >>> pairs = hadamard(*(FeatureMoments.of_tokens(features, x, x) for x in (jnp.eye(1), 2 * jnp.eye(1))))
        >>> pairs.mass.tolist(), pairs.value_sum[:, 0].tolist()
        ([1.0, 2.0], [2.0, 4.0])
    """
    for moments in (first, *others):
        if not isinstance(moments, FeatureMoments):
            raise TypeError(f"hadamard needs FeatureMoments, got {type(moments).__name__}")
    for moments in others:
        if moments.value_sum.shape != first.value_sum.shape:
            shapes = first.value_sum.shape, moments.value_sum.shape
            raise ValueError(f"hadamard needs moments of equal size [R, Dv], got {shapes[0]} and {shapes[1]}")
        value_sum = first.value_sum * moments.value_sum
        mass = _nan_unless(scale_ratio(first, moments)[1], first.mass * moments.mass)
        # Magnitudes are added as logarithms, so that no product overflows.
        log_scale = first.log_scale + moments.log_scale
        first = FeatureMoments(value_sum, mass, log_scale, first.features, first.scale)
    return first


def _require_same_features(a: FeatureMap, b: FeatureMap) -> None:
    """Raise ``TypeError`` if two feature maps differ, as far as this is known when tracing."""
    leaves_a, kind_a = jax.tree.flatten(a)
    leaves_b, kind_b = jax.tree.flatten(b)
    same = kind_a == kind_b and all(x.shape == y.shape for x, y in zip(leaves_a, leaves_b, strict=True))
    if same:
        for x, y in zip(leaves_a, leaves_b, strict=True):
            known = not any(isinstance(z, Tracer) or not getattr(z, "is_fully_addressable", True) for z in (x, y))
            # Of numpy, because an operation of JAX would be traced within `jit`.
            same = same and (x is y or not known or np.array_equal(np.asarray(x), np.asarray(y)))
    if not same:
        raise TypeError(
            "merge needs moments of one feature map, but these differ in kind, size or random projection; summarise "
            "both with the same key or projection"
        )


def summary_bytes(summary: Any) -> int:
    """Count the bytes of summaries, or of caches made of them, per head and sequence.

    A feature map and a scale are shared, and do not count. Works on arrays and on shapes (`jax.eval_shape`).

    Args:
        summary: a summary, a state of a `RunningSummary`, a cache, or a pytree of these.

    Returns:
        The bytes of all arrays together.

    Raises:
        TypeError: leaves that are not arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention import WeightedKV
        >>> from approx_attention.core import summary_bytes
        >>> summary_bytes(WeightedKV.of_tokens(jnp.zeros((8, 4)), jnp.zeros((8, 4))))  # 8 (4 + 4 + 1) numbers
        288
    """

    def is_summary(x: Any) -> bool:
        return isinstance(x, InSpace)

    held = jax.tree.map(lambda x: x._unshared() if is_summary(x) else x, summary, is_leaf=is_summary)
    for x in jax.tree.leaves(held):
        if not hasattr(x, "shape") or not hasattr(x, "dtype"):
            raise TypeError(f"summary_bytes needs summaries or caches of arrays, got {type(x).__name__}")
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(held))
