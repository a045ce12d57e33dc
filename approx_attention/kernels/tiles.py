"""Shared code for tiles of logits: hidden keys, sums relative to a maximum, and normalisers."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from approx_attention.kernels.states import AttentionState

# The bias of a hidden key. Finite, so that a row of hidden keys does not become NaN without a guard inside the tile,
# which would split XLA's fusion of product, maximum and exponential.
HIDDEN = -1e30
# With tiles of at most 2048 keys, and of 2^21 to 2^23 logits (8 to 32 MB in float32), matrix products on a CPU run at
# full speed from cache: smaller tiles merge more often, larger ones are read from memory.
KEY_BLOCK = 2048
LEAST_TILE, GREATEST_TILE = 2**21, 2**23


def accumulation_dtype(*tensors: Any) -> Any:
    """float64 if any tensor is float64, else float32."""
    return jnp.float64 if jnp.float64 in [x.dtype for x in tensors] else jnp.float32


def mask_bias(seen: Array, dtype: Any) -> Array:
    """The bias of a mask: 0 where it is true, `HIDDEN` elsewhere."""
    return jnp.where(seen, jnp.zeros((), dtype), HIDDEN)


def soft_capped(logits: Array, logits_soft_cap: float | None) -> Array:
    r"""Capped logits, :math:`c \tanh(x / c)`; unchanged without a cap."""
    return logits if logits_soft_cap is None else logits_soft_cap * jnp.tanh(logits / logits_soft_cap)


def dense_state(
    q: Array, k: Array, v: Array, bias: Array | None = None, logits_soft_cap: float | None = None
) -> AttentionState:
    r"""Softmax attention over all keys at once, with all T S logits in memory.

    .. math:: \mathrm{out} = \mathrm{softmax}(f(q k^T) + b)\, v, \qquad f(x) = c \tanh(x / c)\ \text{or}\ x

    Args:
        q: queries ``[T, D]`` in scaled space.
        k: keys ``[S, D]`` in scaled space.
        v: values ``[S, Dv]``.
        bias: b ``[1 or T, S]``, ``HIDDEN`` for hidden keys; None for 0.
        logits_soft_cap: c; None for no cap.

    Returns:
        The `AttentionState`; a row that sees no key has output 0 and log-normaliser ``-inf``.
    """
    # Adding HIDDEN alone would not hide a key with an equally large logit. A key hidden from all queries is set to 0
    # instead, which keeps XLA's fused product; if it is hidden from some queries, the sum is replaced.
    if bias is None:
        logits = soft_capped(q @ k.T, logits_soft_cap)
    elif bias.shape[0] == 1:
        logits = soft_capped(q @ jnp.where(bias[0, :, None] <= HIDDEN / 2, 0, k).T, logits_soft_cap) + bias
    else:
        logits = jnp.where(bias <= HIDDEN / 2, HIDDEN, soft_capped(q @ k.T, logits_soft_cap) + bias)
    # The peak cancels between numerator and normaliser, so it needs no derivative.
    peak = lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp(logits - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out, lse = weights @ v / total, peak + jnp.log(total)
    if bias is not None:
        # A row with NaN must show it and not count as one that sees no key: a maximum may drop NaN, a sum never does.
        unseen = (peak < HIDDEN / 2) & ~jnp.isnan(total)
        out, lse = jnp.where(unseen, jnp.zeros_like(out), out), jnp.where(unseen, -jnp.inf, lse)
    return AttentionState(out, lse[:, 0])


class Rows(NamedTuple):
    """Outputs ``[T, Dv]``, and normalisers ``[T]`` as maxima and logarithms of sums.

    Added to a large maximum, the logarithm would be lost to rounding. A row that sees no key has the maximum `HIDDEN`.
    """

    out: Array
    peak: Array
    log_total: Array

    def state(self) -> AttentionState:
        """The attention state, with the two parts of normalisers added."""
        return AttentionState(self.out, jnp.where(sees_a_key(self.peak), self.peak + self.log_total, -jnp.inf))


def sees_a_key(peak: Array) -> Array:
    """Whether a row sees a key, by its maximum. A row with NaN does."""
    return ~(peak <= HIDDEN / 2)


class Sums(NamedTuple):
    r"""Unnormalised sums over the keys of some tiles.

    Attributes:
        peak: the largest logit of each query ``[T]``.
        total: sums of weights :math:`e^{x - \mathrm{peak}}`, ``[T]``.
        product: sums of weights times values ``[T, Dv]``.
    """

    peak: Array
    total: Array
    product: Array

    def plus(self, other: "Sums") -> "Sums":
        """Merge the sums of two disjoint sets of keys."""
        peak = lax.stop_gradient(jnp.maximum(self.peak, other.peak))
        own, others = jnp.exp(self.peak - peak), jnp.exp(other.peak - peak)
        product = self.product * own[:, None] + other.product * others[:, None]
        return Sums(peak, self.total * own + other.total * others, product)


def tile_logits(
    q: Array, k: Array, bias: Array | None, scale: Array | None, logits_soft_cap: float | None = None
) -> Array:
    """The logits of a tile, with a bias ``[S]`` of its keys."""
    logits = product(q, k.T)
    logits = soft_capped(logits if scale is None else logits * scale, logits_soft_cap)
    return logits if bias is None else logits + bias[None, :]


def product(a: Array, b: Array) -> Array:
    """The matrix product of tensors in their dtype, summed in float32 or wider."""
    return jnp.matmul(a, b, preferred_element_type=accumulation_dtype(a, b))


def tile_sums(
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None,
    scale: Array | None = None,
    seen: Any = None,
    logits_soft_cap: float | None = None,
) -> Sums:
    """The sums over one tile; ``seen`` is false where a query does not reach a key."""
    logits = tile_logits(q, k, bias, scale, logits_soft_cap)
    logits = logits if seen is None else jnp.where(seen, logits, HIDDEN)
    # The peak cancels between numerator and normaliser, so it needs no derivative.
    peak = lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp(logits - peak)
    return Sums(peak[:, 0], jnp.sum(weights, axis=-1), product(weights.astype(v.dtype), v))


def padded(tree: Any, length: int, fill: float = 0) -> Any:
    """Arrays with rows of ``fill`` up to a length."""

    def of(x: Array) -> Array:
        around = ((0, length - x.shape[0]),) + ((0, 0),) * (x.ndim - 1)
        return jnp.pad(x, around, constant_values=fill) if length > x.shape[0] else x

    return jax.tree.map(of, tree)


def no_sums(queries: Array, v: Array, dtype: Any) -> Sums:
    """The sums over an empty set of keys."""
    none = jnp.zeros_like(queries[:, 0], dtype)
    return Sums(none + HIDDEN, none, none[:, None] + jnp.zeros((1, v.shape[1]), dtype))


def normalised(sums: Sums, num_queries: int) -> Rows:
    """The first ``num_queries`` rows of sums, normalised."""
    peak, total, product = jax.tree.map(lambda x: x[:num_queries], sums)
    # A row with NaN must show it and not count as one that sees no key: a maximum may drop NaN, a sum never does.
    peak = jnp.where(jnp.isnan(total), total, peak)
    unseen = ~sees_a_key(peak)
    out = jnp.where(unseen[:, None], 0, product / total[:, None])
    return Rows(out, jnp.where(unseen, HIDDEN, peak), jnp.where(unseen, 0, jnp.log(total)))


def seen_cotangents(
    out: Array, peak: Array, log_total: Array, d_out: Array, d_lse: Array
) -> tuple[Array, Array, Array, Array]:
    r"""Maxima, logarithms of sums, cotangents of outputs, and :math:`\delta_t = dO_t \cdot O_t - d\mathrm{lse}_t`.

    All are 0 in rows that see no key, whose output is always 0.
    """
    seen = sees_a_key(peak)
    d_out = jnp.where(seen[:, None], d_out, 0)
    delta = jnp.sum(d_out * out, axis=-1) - jnp.where(seen, d_lse, 0)
    return jnp.where(seen, peak, 0), jnp.where(seen, log_total, 0), d_out, delta


def weights_of(logits: Array, peak: Array, log_total: Array) -> Array:
    """Weights from logits and the two parts of normalisers, which broadcast against them."""
    logits = (logits - peak) - log_total
    # Rounding must not lift a weight above 1; the correction is constant, so that second derivatives use the logits.
    return jnp.exp(logits - lax.stop_gradient(jnp.maximum(logits, 0)))
