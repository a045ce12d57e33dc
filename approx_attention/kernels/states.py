"""Attention states: outputs with their log-normalisers, and their merge."""

import dataclasses
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionState:
    r"""The result of attention over a set of keys: outputs, and the log-normalisers by which states merge.

    For logits :math:`x_{tj}` over keys :math:`j`,

    .. math:: \mathrm{lse}_t = \log \sum_j e^{x_{tj}}, \qquad \mathrm{out}_t = \sum_j e^{x_{tj} - \mathrm{lse}_t} v_j.

    A row that sees no key has ``lse = -inf`` and ``out = 0``.

    Attributes:
        out: normalised outputs ``[..., T, Dv]``.
        lse: log-normalisers ``[..., T]``, natural logarithm.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention import exact
        >>> x = jnp.zeros((3, 2))
        >>> state = exact(x, x, jnp.array([[1.0], [2.0], [6.0]]), return_state=True)
        >>> round(float(state.out[0, 0]), 4), round(float(jnp.exp(state.lse[0])), 4)  # the mean value, and 3 keys
        (3.0, 3.0)
    """

    out: Array
    lse: Array

    @classmethod
    def empty(cls, num_queries: int, value_dim: int, dtype: Any = jnp.float32) -> Self:
        """The identity of `merge`: rows that see no key, with outputs 0 and log-normalisers ``-inf``.

        Args:
            num_queries: the number T of rows.
            value_dim: the number Dv of channels of values.
            dtype: float32 or wider.
        """
        return cls(jnp.zeros((num_queries, value_dim), dtype), jnp.full((num_queries,), -jnp.inf, dtype))


@functools.singledispatch
def merge(a: Any, b: Any) -> Any:
    r"""Merge two attention states, or two summaries of one kind, over disjoint sets of keys.

    For states, with :math:`w = e^{\mathrm{lse} - \mathrm{lse}_{ab}}`,

    .. math:: \mathrm{lse}_{ab} = \log(e^{\mathrm{lse}_a} + e^{\mathrm{lse}_b}), \qquad
              \mathrm{out}_{ab} = w_a\, \mathrm{out}_a + w_b\, \mathrm{out}_b.

    Tokens (`WeightedKV`, `QuantizedKV`, `sparse.LiftedKV`, `coresets.Clusters`) are concatenated and moments
    (`FeatureMoments`) added, so that ``attend(q, merge(a, b))`` equals ``merge(attend(q, a), attend(q, b))``. Merging
    is associative and commutative up to rounding (for tokens, up to order). The identity is the empty state or the
    empty summary.

    Args:
        a: an `AttentionState`, or one of these summaries.
        b: another of the same kind.

    Returns:
        One object of that kind for the union of the keys.

    Raises:
        TypeError: ``a`` and ``b`` are not of one mergeable kind.
        ValueError: states or tokens have different sizes, or summaries have different scales or only one has a scale.
            If scales are traced, the keys of ``b`` are converted to the scale of ``a``; features cannot be converted,
            and moments with different scales merge to NaN.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import WeightedKV, attend, merge
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (6, 4)) for i in range(3))
        >>> whole = attend(q, WeightedKV.of_tokens(k, v))
        >>> left, right = WeightedKV.of_tokens(k[:2], v[:2]), WeightedKV.of_tokens(k[2:], v[2:])
        >>> parts = merge(attend(q, left), attend(q, right))
        >>> bool(jnp.allclose(whole.out, parts.out, atol=1e-6))
        True

    Reference:
        :cite:p:`milakov2018online`, section 3; :cite:p:`liu2023ring`, section 3.
    """
    raise TypeError(
        f"merge needs two attention states or two summaries of one kind, got {type(a).__name__} and {type(b).__name__}"
    )


@merge.register
def _merge_states(a: AttentionState, b: Any) -> AttentionState:
    require_same_kind(a, b)
    _require_same_rows("merge", a, b)
    # The larger weight is 1, so that the sum neither overflows nor vanishes. It is 0 only if both states are empty,
    # where a double where keeps the derivative finite.
    peak = finite_peak(jnp.maximum(a.lse, b.lse))
    weight_a, weight_b = jnp.exp(a.lse - peak), jnp.exp(b.lse - peak)
    total = weight_a + weight_b
    empty = total == 0
    safe_total = jnp.where(empty, jnp.ones_like(total), total)
    out = a.out * (weight_a / safe_total)[..., None] + b.out * (weight_b / safe_total)[..., None]
    return AttentionState(out, jnp.where(empty, -jnp.inf, peak + jnp.log(safe_total)))


def subtract(whole: AttentionState, part: AttentionState) -> AttentionState:
    r"""Invert `merge`: compute the state of the keys of ``whole`` that are not in ``part``.

    .. math:: \mathrm{lse} = \log(e^{\mathrm{lse}_w} - e^{\mathrm{lse}_p}), \qquad
              \mathrm{out} = \frac{\mathrm{out}_w - r\, \mathrm{out}_p}{1 - r}, \qquad
              r = e^{\mathrm{lse}_p - \mathrm{lse}_w}.

    Rounding errors grow like :math:`1 / (1 - r)`: if the part is nearly the whole, they dominate the rest, and outputs
    may leave the range of the values. If r is at least 1 the rest is empty: ``out = 0``, ``lse = -inf``.

    Args:
        whole: the state of all keys.
        part: the state of some of them.

    Returns:
        The state of the others.

    Raises:
        TypeError: not an `AttentionState`.
        ValueError: the states have different numbers of queries or channels.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import WeightedKV, attend
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (6, 4)) for i in range(3))
        >>> of = lambda part: attend(q, WeightedKV.of_tokens(k[part], v[part]))
        >>> rest = subtract(of(slice(0, 6)), of(slice(0, 2)))
        >>> bool(jnp.allclose(rest.out, of(slice(2, 6)).out, atol=1e-5))
        True
    """
    for name, state in (("whole", whole), ("part", part)):
        if not isinstance(state, AttentionState):
            raise TypeError(f"subtract needs two attention states, got {type(state).__name__} for {name}")
    _require_same_rows("subtract", whole, part)
    absent = part.lse == -jnp.inf
    # Never above 0: an overflow in the unselected branch of `where` would give a derivative of NaN.
    shift = jnp.minimum(jnp.where(absent, 0, part.lse) - jnp.where(absent, 0, whole.lse), 0)
    ratio = jnp.where(absent, 0, jnp.exp(shift))
    gone = ratio >= 1
    left = jnp.where(gone, 1, 1 - ratio)
    out = jnp.where(gone[..., None], 0, (whole.out - ratio[..., None] * part.out) / left[..., None])
    return AttentionState(out, jnp.where(gone, -jnp.inf, whole.lse + jnp.log(left)))


def require_same_kind(a: Any, b: Any) -> None:
    """Raise ``TypeError`` unless ``a`` and ``b`` have the same type."""
    if type(a) is not type(b):
        raise TypeError(f"merge needs two objects of one kind, got {type(a).__name__} and {type(b).__name__}")


def _require_same_rows(owner: str, a: AttentionState, b: AttentionState) -> None:
    if a.out.shape != b.out.shape or a.lse.shape != b.lse.shape:
        raise ValueError(f"{owner} needs states of equal shape, got {a.out.shape} and {b.out.shape}")


def finite_peak(peak: Array) -> Array:
    """Make a maximum safe to subtract: without gradient, and 0 for a row that sees no key (``-inf``)."""
    # Results do not depend on the subtracted maximum: its derivative would be 0 up to rounding. And -inf minus -inf is
    # NaN.
    peak = jax.lax.stop_gradient(peak)
    return jnp.where(peak == -jnp.inf, jnp.zeros_like(peak), peak)


def normalise(numerator: Array, mass: Array, peak: Array) -> AttentionState:
    """The attention state of sums of weights.

    Args:
        numerator: sums of weights times values ``[T, Dv]``, divided by ``exp(peak)``.
        mass: sums of weights ``[T]``, divided by ``exp(peak)``.
        peak: natural logarithms ``[T]``.

    Returns:
        The `AttentionState`; a row whose mass is not positive has output 0 and log-normaliser ``-inf``, and one with a
        mass of NaN stays NaN.
    """
    # A mass that is not positive has no logarithm. NaN is not <= 0, and stays visible in the output.
    unanswered = mass <= 0
    safe_mass = jnp.where(unanswered, jnp.ones_like(mass), mass)
    out = jnp.where(unanswered[:, None], jnp.zeros_like(numerator), numerator / safe_mass[:, None])
    return AttentionState(out, jnp.where(unanswered, -jnp.inf, peak + jnp.log(safe_mass)))
