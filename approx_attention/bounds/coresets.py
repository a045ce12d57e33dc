"""Bounds for coresets: the sensitivity of a key, and sizes with a guarantee."""

import math
from typing import Literal, NamedTuple, get_args

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from approx_attention import kernels
from approx_attention.core import (
    accumulation_dtype,
    check_choice,
    check_count,
    check_key_value_fit,
    check_kv_mask,
    check_not_negative,
    check_number,
    check_rows,
    in_float32,
    mask_bias,
    real_keys,
    squared_norm,
)


class Sensitivity(NamedTuple):
    """Lower and upper bounds on the sensitivities of keys, each ``[S]``.

    Attributes:
        least: lower bound: the attention weight for a query found by the search.
        most: upper bound for all queries of the ball.
    """

    least: Array
    most: Array


@in_float32()
def sensitivity(
    k: Float[Array, "S D"],
    radius: float | Array,
    *,
    kv_mask: Bool[Array, " S"] | None = None,
    num_steps: int = 64,
) -> Sensitivity:
    r"""Bound the largest attention weight of each key over all queries of bounded norm, from below and from above.

    .. math:: s_j = \sup_{\|q\| \le \rho} \frac{e^{q \cdot k_j}}{\sum_i e^{q \cdot k_i}}.

    The total over all keys is the number of tokens that importance sampling needs, up to logarithms and
    :math:`1/\epsilon^2`. It is near 1 if the keys are alike for such queries, and S if a query can single out each key.
    The search for the query is convex, :math:`\min_q f(q) = \log \sum_i e^{q \cdot (k_i - k_j)}`. The duality gap
    :math:`g = \nabla f \cdot q + \rho \|\nabla f\|` of its last step gives the bound :math:`s_j \le e^{g - f(q)}`,
    which holds even if the search has not converged.

    Args:
        k: keys ``[S, D]`` in scaled space (`fold_scale`).
        radius: :math:`\rho`, the largest norm of a query in scaled space.
        kv_mask: true where a key is real ``[S]``; others have sensitivity 0.
        num_steps: number of accelerated projected gradient steps; more steps tighten the bounds.

    Returns:
        The `Sensitivity`, at the cost of ``num_steps * S`` queries over all keys.

    Raises:
        TypeError: keys that are not floating point, a radius that is not one number, a mask that is not boolean.
        ValueError: shapes that do not match, a radius that is negative or not finite, a count below 1.

    Example:
        >>> import jax
        >>> from approx_attention import bounds
        >>> k = jax.random.normal(jax.random.key(0), (64, 4))
        >>> least, most = bounds.sensitivity(k, 1.0)
        >>> bool((least <= most).all()), bool(most.sum() < 1.1 * least.sum())
        (True, True)

    Reference:
        Sensitivity as in :cite:p:`feldman2011unified`; duality gap as in :cite:p:`frank1956algorithm`.
    """
    num_steps = check_count("num_steps", num_steps)
    check_rows("k", k, "[S, D]")
    check_number("radius", radius)
    check_not_negative("radius", radius)
    if kv_mask is not None:
        check_kv_mask(kv_mask, k.shape[0])
    check_key_value_fit(k, k, k)
    k = k.astype(accumulation_dtype(k))
    radius = jnp.asarray(radius, k.dtype)
    present = real_keys(kv_mask, k.shape[0])
    # Padding may contain NaN, which a bias would not hide.
    k = jnp.where(present[:, None], k, 0)
    bias = mask_bias(present, k.dtype)

    def value_and_slope(q: Array) -> tuple[Array, Array]:
        """f and its gradient at queries ``[S, D]``, one for each key."""
        state = kernels.state(q, k, k, bias)
        return state.lse - jnp.sum(q * k, axis=1), state.out - k

    def onto_ball(q: Array) -> Array:
        norm = jnp.sqrt(squared_norm(q))
        return q * jnp.minimum(1, radius / jnp.where(norm > 0, norm, 1))

    # The second derivative of f is a variance of keys in one direction, at most the largest squared distance from their
    # mean: its inverse is a safe step size.
    middle = jnp.mean(k, axis=0, where=present[:, None])
    curvature = jnp.max(squared_norm(k - middle[None, :]), where=present[:, None], initial=0)
    stride = 1 / jnp.where(curvature > 0, curvature, 1)

    def step(number: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        q, ahead = state
        new = onto_ball(ahead - stride * value_and_slope(ahead)[1])
        # Nesterov's momentum.
        return new, new + number / (number + 3) * (new - q)

    start = jnp.zeros_like(k)
    q, _ = lax.fori_loop(0, num_steps, lambda i, state: step(i.astype(k.dtype), state), (start, start))
    value, slope = value_and_slope(q)
    gap = jnp.sum(slope * q, axis=1) + radius * jnp.sqrt(squared_norm(slope))[:, 0]
    least = jnp.where(present, jnp.exp(-value), 0)
    most = jnp.where(present, jnp.minimum(jnp.exp(jnp.maximum(gap, 0) - value), 1), 0)
    return Sensitivity(least, most)


SizeResult = Literal[
    "uniform",
    "subgen",
    "balance_kv",
    "balance_kv_lower_bound",
    "thinformer",
    "kernel_discrepancy",
    "optimal",
    "lower_bound",
]


class CoresetSize(NamedTuple):
    """A theoretical coreset size.

    Attributes:
        size: the number of tokens, up to a constant that the theorem does not specify (here 1).
        vacuous: whether it is at least the number of keys.
        statement: a description of the bound.
    """

    size: float
    vacuous: bool
    statement: str


def coreset_size_bound(
    error: float,
    *,
    radius: float,
    head_dim: int,
    num_keys: int,
    failure: float = 0.1,
    result: SizeResult = "optimal",
) -> CoresetSize:
    r"""Compute the number of tokens for which theory guarantees an error of attention, for values of norm at most 1.

    With queries of norm :math:`\rho` and keys of norm 1, in d dimensions, up to constants and lower-order terms:

    .. math:: \text{uniform: } \cosh^2(\rho) \frac{d + \log(1/\delta)}{\epsilon^2}, \quad
              \text{balance\_kv: } \frac{\sqrt d\, e^{2\rho} \log n}{\epsilon}, \quad
              \text{thinformer: } \frac{\log^{3/2} n}{\epsilon}, \quad
              \text{optimal: } \frac{\sqrt d\, e^{\rho}}{\epsilon}.

    The optimal coreset exists by Banaszczyk's theorem, and the Gram-Schmidt walk finds it in polynomial time. That walk
    is not implemented here, because it was no better than other sign rules in measurements. The rules of
    `coresets.Halving` control the norm of the kernel's sums, without a guarantee of 1/m for all queries at once. The
    optimal coreset needs weights, although the abstract says subset: consider one key among :math:`e^{2\rho}` opposite
    keys. For the query in its direction it has as much weight as all others, so without weights about
    :math:`e^{2\rho}` rows are needed.

    WildCat is not included: its error falls with n for sizes :math:`n^{o(1)}`, which gives no size for a fixed error.

    Args:
        error: :math:`\epsilon`, for values of norm at most 1.
        radius: :math:`\rho`, the largest norm of a query in scaled space times that of the keys.
        head_dim: d.
        num_keys: n.
        failure: :math:`\delta`, the probability with which a random choice may fail.
        result: ``"uniform"`` for a uniform sample; ``"subgen"`` for the value samples of SubGen, for a single query
            and in addition to its clusters; ``"balance_kv"`` as published, and ``"balance_kv_lower_bound"`` for the
            memory of a stream with radii of at most :math:`\sqrt d`; ``"thinformer"`` for inputs of low effective
            rank, with a constant that depends on the rank; ``"kernel_discrepancy"`` for numerator and normaliser
            separately, with keys and queries of norm 1; ``"optimal"`` for the size of a weighted coreset that exists;
            ``"lower_bound"`` for the size below which some data have no coreset of rows.

    Returns:
        The `CoresetSize`; ``vacuous`` if it is at least ``num_keys``.

    Raises:
        ValueError: an unknown result, an error or radius that is not positive, a failure not between 0 and 1.

    Example:
        >>> from approx_attention import bounds
        >>> bounds.coreset_size_bound(0.1, radius=2.0, head_dim=64, num_keys=16384).vacuous
        False
        >>> bounds.coreset_size_bound(0.1, radius=20.0, head_dim=64, num_keys=16384).vacuous
        True

    Reference:
        :cite:p:`liberty2026nearly`, abstract; :cite:p:`han2025balancekv`, theorems 3.1 and 3.2;
        :cite:p:`zandieh2024subgen`; :cite:p:`carrell2025thinning` and :cite:p:`express2026` for Thinformer;
        :cite:p:`karnin2019discrepancy` and :cite:p:`phillips2020near` for kernels; uniform sampling by its second
        moment; :cite:p:`banaszczyk1998balancing`, and :cite:p:`bansal2018gram`, for the optimal coreset.
    """
    check_choice("result", result, get_args(SizeResult))
    head_dim = check_count("head_dim", head_dim, most=None)
    num_keys = check_count("num_keys", num_keys, most=None)
    if not error > 0 or not radius > 0 or not 0 < failure < 1:
        raise ValueError(
            f"error and radius must be positive and failure between 0 and 1, got {error}, {radius} and {failure}"
        )
    log_failure = math.log(1 / failure)
    log_size, statement = {
        "uniform": (
            2 * (radius + math.log1p(math.exp(-2 * radius)) - math.log(2))
            + math.log(head_dim + log_failure)
            - 2 * math.log(error),
            "a uniform sample, all queries at once",
        ),
        "subgen": (
            math.log(head_dim) - 2 * math.log(error),
            "samples of values for a single query, in addition to clusters of keys",
        ),
        "balance_kv": (
            0.5 * math.log(head_dim) + 2 * radius - math.log(error) + math.log(max(1.0, math.log(num_keys))),
            "discrepancy of batches, each query of a stream with high probability",
        ),
        "balance_kv_lower_bound": (
            min(-2 * math.log(error), math.log(head_dim) + 2 * radius),
            "no stream algorithm needs less memory",
        ),
        "thinformer": (
            1.5 * math.log(max(1.0, math.log(num_keys))) - math.log(error),
            "kernel halving of inputs of low effective rank, also causal",
        ),
        "kernel_discrepancy": (
            0.5 * math.log(head_dim) - math.log(error),
            "the sums of a kernel at radius 1, for all queries at once",
        ),
        "optimal": (
            0.5 * math.log(head_dim) + radius - math.log(error),
            "a weighted coreset for all queries at once exists; found by the Gram-Schmidt walk, not implemented",
        ),
        "lower_bound": (
            0.5 * math.log(head_dim) + radius - math.log(error),
            "some data have no smaller coreset of their own rows",
        ),
    }[result]
    # In the log domain: products with e^{2 rho} of real heads (rho of 20 and more) overflow float64.
    size = math.exp(log_size) if log_size < 700 else math.inf
    return CoresetSize(size, size >= num_keys, statement)
