"""What theory promises: closed forms for the error of estimates, with their assumptions."""

import functools
import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float

from approx_attention.checks import (
    accumulation_dtype,
    check_choice,
    check_count,
    check_key_value_fit,
    fold_scale,
)
from approx_attention.clustering import merged, nearest
from approx_attention.features import squared_norm
from approx_attention.polynomials import Coefficients, exp_coefficients, ratio_range, weight_bound
from approx_attention.sketches import SKETCHES
from approx_attention.softmax import HIDDEN, blocked_state
from approx_attention.summaries import WeightedKV
from approx_attention.tensors import tensor_inputs


def favor_mse(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    num_features: int,
    *,
    features: Literal["positive", "hyperbolic", "trigonometric"] = "positive",
    scale: float | Array | None = None,
) -> Float[Array, "T S"]:
    r"""Mean squared error of random-feature estimates of :math:`e^{q \cdot k}`, relative to its square.

    For R features of independent directions, with q and k scaled by :math:`\sqrt s` and :math:`z = \|q + k\|^2`,

    .. math:: \text{positive: } \frac{e^z - 1}{R}, \qquad
              \text{hyperbolic: } \frac{(e^z - 1)(1 - e^{-z})}{R}, \qquad
              \text{trigonometric: } \frac{e^z (1 - e^{-\|q - k\|^2})^2}{R\, e^{4 q \cdot k}}.

    The hyperbolic and trigonometric ones use R/2 directions. Orthogonal directions do better, by an amount that this
    bound does not claim. It speaks of the entries, whose estimates are unbiased; their ratio, the answer, is not. Above
    1 an entry's estimate is worth nothing.

    Args:
        q: queries ``[T, D]``.
        k: keys ``[S, D]``.
        num_features: the number R of features.
        features: their kind.
        scale: factor s of the logits, ``1/sqrt(D)`` by default.

    Returns:
        The relative mean squared errors ``[T, S]``; infinite where they exceed the largest number.

    Raises:
        ValueError: shapes that do not fit, no features, unknown kind.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention import bounds
        >>> float(bounds.favor_mse(jnp.zeros((1, 4)), jnp.zeros((1, 4)), 64)[0, 0])
        0.0

    Reference:
        Choromanski et al. (2021), "Rethinking attention with Performers", lemma 2 and theorem 1.
    """
    check_count("num_features", num_features)
    check_choice("features", features, ("positive", "hyperbolic", "trigonometric"))
    check_key_value_fit(q, k, k)
    dtype = accumulation_dtype(q, k)
    q, k = fold_scale(q.astype(dtype), k.astype(dtype), scale)
    logits, norms = q @ k.T, squared_norm(q) + squared_norm(k).T
    together, apart = (jnp.maximum(norms + sign * 2 * logits, 0) for sign in (1, -1))
    if features == "trigonometric":
        return jnp.exp(together - 4 * logits) * jnp.expm1(-apart) ** 2 / num_features
    positive = jnp.expm1(together) / num_features
    return positive if features == "positive" else positive * -jnp.expm1(-together)


class MergeBound(NamedTuple):
    """Merged tokens, and a bound on their error.

    Attributes:
        summary: every key merged into the nearest of the tokens that were given.
        bound: on its error for all queries of the ball, in the units of the values.
    """

    summary: WeightedKV
    bound: Array


def merge_bound(
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    summary: WeightedKV,
    radius: float | Array,
    *,
    kv_mask: Bool[Array, " S"] | None = None,
) -> MergeBound:
    r"""Merges every key into the nearest of some tokens, with a bound on the error for every query of bounded norm.

    If every key is within :math:`\delta` of the mean key that it was merged into,

    .. math:: \sup_{\|q\| \le \rho} \|\mathrm{attend}(q) - \mathrm{attention}(q)\|_2
              \le (e^{2 \rho \delta} - 1)\, \max_j \|v_j\|_2.

    The bound is that of the merge that is returned, not of the summary that was given: of the clusters of that one only
    the means are known, and not who is in them. No bound of this kind is known for Nystrom weights or for chosen
    tokens: measure those with `approx_attention.diagnostics.sup_error`, whose search gives a lower bound of the
    supremum. Above :math:`2 \max \|v\|` it says nothing.

    Args:
        k: keys ``[S, D]`` in scaled space (`fold_scale`).
        v: values ``[S, Dv]``.
        summary: tokens to merge into, such as a coreset; those without mass are left out.
        radius: :math:`\rho`, the largest norm of a query in scaled space.
        kv_mask: true where a key is real ``[S]``.

    Returns:
        The `MergeBound`; infinite where it exceeds the largest number.

    Example:
        >>> import jax
        >>> from approx_attention import bounds, summarize_coreset
        >>> k, v = (jax.random.normal(jax.random.key(i), (64, 2)) for i in range(2))
        >>> coreset = summarize_coreset(k, v, jax.random.key(2), coreset_size=32, algorithm="farthest_merge")
        >>> merged, bound = bounds.merge_bound(k, v, coreset, 0.5)
        >>> float(merged.mass.sum()), bool(0 < bound < 2)
        (64.0, True)

    Reference:
        Each weight is off by a factor between :math:`e^{\pm\rho\delta}`; a derivation of this library.
    """
    tokens = WeightedKV.of_tokens(k, v, kv_mask)
    label = nearest(tokens.k, summary.k, summary.mass != 0)
    merge = merged(tokens, label, summary.mass.shape[0])
    away = jnp.where(tokens.mass > 0, jnp.sqrt(squared_norm(tokens.k - merge.k[label]))[:, 0], 0)
    bound = jnp.expm1(2 * radius * jnp.max(away)) * jnp.sqrt(jnp.max(squared_norm(tokens.values)))
    return MergeBound(merge, bound)


class Sensitivity(NamedTuple):
    """Enclosures of the sensitivities of keys, each ``[S]``.

    Attributes:
        least: reached by a query that was found.
        most: exceeded by no query of the ball.
    """

    least: Array
    most: Array


def sensitivity(
    k: Float[Array, "S D"],
    radius: float | Array,
    *,
    kv_mask: Bool[Array, " S"] | None = None,
    num_steps: int = 64,
) -> Sensitivity:
    r"""The largest attention weight that any query of bounded norm gives to each key, from below and from above.

    .. math:: s_j = \sup_{\|q\| \le \rho} \frac{e^{q \cdot k_j}}{\sum_i e^{q \cdot k_i}}.

    The total of all keys is how many tokens importance sampling needs, up to logarithms and :math:`1/\epsilon^2`:
    near 1 where keys are alike for such queries, S where each of them can be singled out. The search for the query is
    convex, :math:`\min_q f(q) = \log \sum_i e^{q \cdot (k_i - k_j)}`, so that the duality gap
    :math:`g = \nabla f \cdot q + \rho \|\nabla f\|` of its last step turns what was found into a bound,
    :math:`s_j \le e^{g - f(q)}`, whether it has converged or not.

    Args:
        k: keys ``[S, D]`` in scaled space (`fold_scale`).
        radius: :math:`\rho`, the largest norm of a query in scaled space.
        kv_mask: true where a key is real ``[S]``; others have sensitivity 0.
        num_steps: accelerated projected gradient steps.

    Returns:
        The `Sensitivity`, for the price of ``num_steps * S`` queries over all keys.

    Example:
        >>> import jax
        >>> from approx_attention import bounds
        >>> k = jax.random.normal(jax.random.key(0), (64, 4))
        >>> least, most = bounds.sensitivity(k, 1.0)
        >>> bool((least <= most).all()), bool(most.sum() < 1.1 * least.sum())
        (True, True)

    Reference:
        Sensitivity as in Feldman and Langberg (2011); the gap is that of Frank and Wolfe (1956).
    """
    check_count("num_steps", num_steps)
    check_key_value_fit(k, k, k)
    k = k.astype(accumulation_dtype(k))
    radius = jnp.asarray(radius, k.dtype)
    present = jnp.ones(k.shape[0], bool) if kv_mask is None else kv_mask
    k = jnp.where(present[:, None], k, 0)
    bias = jnp.where(present, 0.0, HIDDEN).astype(k.dtype)

    def value_and_slope(q: Array) -> tuple[Array, Array]:
        """f and its gradient at queries ``[S, D]``, one for each key."""
        state = blocked_state(q, k, k, bias)
        return state.lse - jnp.sum(q * k, axis=1), state.out - k

    def onto_ball(q: Array) -> Array:
        norm = jnp.sqrt(squared_norm(q))
        return q * jnp.minimum(1, radius / jnp.where(norm > 0, norm, 1))

    # The second derivative of f is the variance of keys in a direction.
    middle = jnp.mean(k, axis=0, where=present[:, None])
    curvature = jnp.max(squared_norm(k - middle[None, :]), where=present[:, None], initial=0)
    stride = 1 / jnp.where(curvature > 0, curvature, 1)

    def step(number: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        q, ahead = state
        new = onto_ball(ahead - stride * value_and_slope(ahead)[1])
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
    """A size that theory asks for.

    Attributes:
        size: tokens, up to a constant that the theorem does not give (taken to be 1).
        vacuous: whether it is no less than the number of tokens there are.
        statement: the bound, in words.
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
    r"""How many tokens theory asks for so that attention errs by at most ``error`` where values have norm at most 1.

    With queries of norm :math:`\rho` and keys of norm 1, in d dimensions, up to constants and lower-order terms:

    .. math:: \text{uniform: } \cosh^2(\rho) \frac{d + \log(1/\delta)}{\epsilon^2}, \quad
              \text{balance\_kv: } \frac{\sqrt d\, e^{2\rho} \log n}{\epsilon}, \quad
              \text{thinformer: } \frac{\log^{3/2} n}{\epsilon}, \quad
              \text{optimal: } \frac{\sqrt d\, e^{\rho}}{\epsilon}.

    WildCat has no row: its error falls with n for sizes :math:`n^{o(1)}`, which gives no size for an error.

    Args:
        error: :math:`\epsilon`, of values of norm at most 1.
        radius: :math:`\rho`, the largest norm of a query in scaled space, times that of the keys.
        head_dim: d.
        num_keys: n.
        failure: :math:`\delta`, the probability with which a random choice may fail.
        result: ``"uniform"`` for a uniform sample; ``"subgen"`` for the samples of values of SubGen, one query at a
            time and beside its clusters; ``"balance_kv"`` as published, and ``"balance_kv_lower_bound"`` for the space
            that a stream needs, where radii are at most :math:`\sqrt d`; ``"thinformer"`` for inputs of low effective
            rank, whose rank its constant hides; ``"kernel_discrepancy"`` for the sums themselves, before one is divided
            by the other, of keys and queries of norm 1; ``"optimal"`` for the size that is known to exist, without an
            algorithm; ``"lower_bound"`` for the size below which some data have no coreset of rows.

    Returns:
        The `CoresetSize`; ``vacuous`` if it is at least ``num_keys``.

    Raises:
        ValueError: an unknown result, an error or radius that is not positive.

    Example:
        >>> from approx_attention import bounds
        >>> bounds.coreset_size_bound(0.1, radius=2.0, head_dim=64, num_keys=16384).vacuous
        False
        >>> bounds.coreset_size_bound(0.1, radius=20.0, head_dim=64, num_keys=16384).vacuous
        True

    Reference:
        Liberty, Andoni and Kleiner (2026), "Nearly optimal attention coresets", abstract; Han et al. (2025),
        "BalanceKV", theorems 3.1 and 3.2; Zandieh et al. (2024), "SubGen"; "Thinformer" with "Express" (2026); Karnin
        and Liberty (2019) and Phillips and Tai (2020) for kernels; uniform sampling by its second moment.
    """
    check_choice("result", result, get_args(SizeResult))
    check_count("head_dim", head_dim)
    check_count("num_keys", num_keys)
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
            "samples of values, one query at a time; clusters of keys come on top",
        ),
        "balance_kv": (
            0.5 * math.log(head_dim) + 2 * radius - math.log(error) + math.log(max(1.0, math.log(num_keys))),
            "discrepancy of batches, each query of a stream with high probability",
        ),
        "balance_kv_lower_bound": (
            min(-2 * math.log(error), math.log(head_dim) + 2 * radius),
            "no stream algorithm needs less space",
        ),
        "thinformer": (
            1.5 * math.log(max(1.0, math.log(num_keys))) - math.log(error),
            "kernel halving of inputs of low effective rank, causally too",
        ),
        "kernel_discrepancy": (
            0.5 * math.log(head_dim) - math.log(error),
            "the sums of a kernel at radius 1, all queries at once",
        ),
        "optimal": (
            0.5 * math.log(head_dim) + radius - math.log(error),
            "a weighted coreset exists, all queries at once; no algorithm is known to find it",
        ),
        "lower_bound": (
            0.5 * math.log(head_dim) + radius - math.log(error),
            "some data have no smaller coreset of their own rows",
        ),
    }[result]
    size = math.exp(log_size) if log_size < 700 else math.inf
    return CoresetSize(size, size >= num_keys, statement)


def sketch_mse(
    weights: Float[Array, "T S"], v: Float[Array, "S Dv"], sketch_size: int, kind: str = "gaussian"
) -> Float[Array, ""]:
    r"""The mean squared error of attention over sketched values, exactly.

    With :math:`T = \|P\|_F^2 \|v\|_F^2`, :math:`O = \|P v\|_F^2`, :math:`C = \sum_j \|P_{:j}\|^2 \|v_j\|^2` and M rows,
    :math:`E \|P \Pi^T \Pi v - P v\|_F^2` is

    .. math:: \frac{T + O + (s - 3) C}{M}, \qquad \frac{T + O - 2 C}{M}, \qquad
              \frac{T + O - 2 C}{M} \frac{N - M}{N - 1}, \qquad \frac{S C - O}{M} \frac{S - M}{S - 1}

    for signs of density 1/s (``"rademacher"`` s = 1, ``"achlioptas"`` s = 3; ``"gaussian"`` as s = 3), for ``"count"``
    and ``"sparse_jl"``, for ``"hadamard"`` with N the power of two from S on, and for ``"uniform_rows"``. Of values
    that `unreduced_jlt` has centred, pass those without their mean.

    Args:
        weights: attention weights P ``[T, S]``.
        v: values ``[S, Dv]``.
        sketch_size: M.
        kind: as in `approx_attention.sketches.draw_sketch`.

    Returns:
        The expected squared error, summed over queries and channels. Beside :math:`\|P v\|_F^2` it says whether the
        sketch is worth anything: for uniform weights and centred values it is S/M times as large.

    Raises:
        ValueError: an unknown kind, shapes that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention import bounds
        >>> uniform = jnp.full((4, 8), 1 / 8)
        >>> v = jnp.array([1.0, -1.0] * 4)[:, None]
        >>> float(bounds.sketch_mse(uniform, v, 2)), float(bounds.sketch_mse(uniform, v, 8, "hadamard"))
        (2.0, 0.0)

    Reference:
        Second moments of each family; what Wang et al. (2020), "Linformer", theorem 1 leaves as a probability.
    """
    check_choice("kind", kind, SKETCHES)
    check_count("sketch_size", sketch_size)
    num_keys = v.shape[0]
    if weights.ndim != 2 or weights.shape[1] != num_keys:
        raise ValueError(f"weights must be [T, S] with S = {num_keys}, got shape {weights.shape}")
    dtype = accumulation_dtype(weights, v)
    weights, v = weights.astype(dtype), v.astype(dtype)
    of_column, of_value = jnp.sum(weights**2, axis=0), squared_norm(v)[:, 0]
    total, own, out = jnp.sum(of_column) * jnp.sum(of_value), jnp.sum(of_column * of_value), jnp.sum((weights @ v) ** 2)
    if kind == "uniform_rows":
        return (num_keys * own - out) / sketch_size * _without_replacement(num_keys, sketch_size)
    if kind == "hadamard":
        length = 1 << (num_keys - 1).bit_length()
        return (total + out - 2 * own) / sketch_size * _without_replacement(length, sketch_size)
    own_times = {"gaussian": 0, "achlioptas": 0, "rademacher": -2, "count": -2, "sparse_jl": -2}[kind]
    return (total + out + own_times * own) / sketch_size


def row_sample_mse(
    weights: Float[Array, "T S"], v: Float[Array, "S Dv"], sample_size: int, log_odds: Float[Array, " S"]
) -> Float[Array, ""]:
    r"""The mean squared error of attention over M rows drawn with replacement and counted against their odds.

    .. math:: E \|P \Pi^T \Pi v - P v\|_F^2
              = \frac1M \Big(\sum_j \frac{\|P_{:j}\|^2 \|v_j\|^2}{p_j} - \|P v\|_F^2\Big),

    which is least, :math:`((\sum_j \|P_{:j}\| \|v_j\|)^2 - \|P v\|_F^2) / M`, where
    :math:`p_j \propto \|P_{:j}\| \|v_j\|`.

    Args:
        weights: attention weights P ``[T, S]``.
        v: values ``[S, Dv]``.
        sample_size: M.
        log_odds: logarithms of p up to a constant ``[S]``; zeros for uniform draws.

    Returns:
        The expected squared error, summed over queries and channels.

    Raises:
        ValueError: a count below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention import bounds
        >>> float(bounds.row_sample_mse(jnp.full((4, 8), 1 / 8), jnp.ones((8, 1)), 2, jnp.zeros(8)))
        0.0

    Reference:
        Drineas, Kannan and Mahoney (2006), "Fast Monte Carlo algorithms for matrices I".
    """
    check_count("sample_size", sample_size)
    dtype = accumulation_dtype(weights, v)
    weights, v = weights.astype(dtype), v.astype(dtype)
    share = jnp.exp(-jax.nn.log_softmax(log_odds.astype(dtype)))
    own = jnp.sum(weights**2, axis=0) * squared_norm(v)[:, 0]
    return (jnp.sum(share * own) - jnp.sum((weights @ v) ** 2)) / sample_size


def _without_replacement(num_rows: int, size: int) -> float:
    return max(0, num_rows - size) / max(1, num_rows - 1)


def johnson_lindenstrauss_size(num_points: int, error: float) -> float:
    r"""Rows with which a random projection keeps all distances between N points.

    .. math:: M = 4 \ln N \,/\, (\epsilon^2/2 - \epsilon^3/3)

    Args:
        num_points: N.
        error: :math:`\epsilon`, relative, of squared distances, between 0 and 1.

    Returns:
        The number of rows; at usual errors it exceeds the length of the sequence.

    Raises:
        ValueError: an error that is not between 0 and 1.

    Example:
        >>> from approx_attention import bounds
        >>> round(bounds.johnson_lindenstrauss_size(512, 0.5)), round(bounds.johnson_lindenstrauss_size(512, 0.1))
        (299, 5347)

    Reference:
        Dasgupta and Gupta (2003), "An elementary proof of a theorem of Johnson and Lindenstrauss".
    """
    check_count("num_points", num_points)
    if not 0 < error < 1:
        raise ValueError(f"error must be between 0 and 1, got {error}")
    return 4 * math.log(num_points) / (error**2 / 2 - error**3 / 3)


def logit_bound(q: Float[Array, "T D"], k: Any, *, scale: float | Array | None = None, kv_mask: Any = None) -> Array:
    r"""A bound on the magnitude of every logit of tensor attention, in time linear in the number of tokens.

    .. math:: \max |x| \le \min\Big(
              |s| \sum_t \prod_a \max_j |y^a_{jt}|,\
              |s| \prod_a \max_j \|y^a_j\|_m,\
              |s| \min_{a \ne b} \max \|y^a\|_2 \max \|y^b\|_2 \prod_{c \ne a, b} \max \|y^c\|_\infty \Big)

    over the m factors y, the queries and m - 1 sets of keys. The second is taken with channels as they are and scaled
    so that the largest entries of all factors agree in each channel, which leaves logits alone.

    Args:
        q: queries ``[T, D]``.
        k: keys ``[m-1, S, D]``, or a tuple of arrays ``[S_a, D]``; one array ``[S, D]`` is ordinary attention.
        scale: factor of the logits, ``1/sqrt(D)`` by default.
        kv_mask: true where a key is real, as in `tensor_attention`.

    Returns:
        The bound, one number.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention import bounds
        >>> x = jnp.array([[1.0, 0.0], [0.0, 2.0]])
        >>> float(bounds.logit_bound(x, (x, x), scale=1.0))  # and 8 is reached
        8.0

    Reference:
        Derivations of this library, by the inequalities of Hoelder and Cauchy.
    """
    inputs = tensor_inputs(q, k, k, scale=scale, kv_mask=kv_mask)
    tokens = (inputs.q, *inputs.keys)
    # In units of the largest entry of each factor, whose powers neither overflow nor vanish.
    peaks = [jnp.max(jnp.abs(y)) for y in tokens]
    factors = tuple(y / jnp.where(peak > 0, peak, 1) for y, peak in zip(tokens, peaks, strict=True))
    order = len(factors)
    largest = jnp.stack([jnp.max(jnp.abs(y), axis=0) for y in factors])
    by_channel = jnp.prod(largest, axis=0)

    def hoelder(factors: Sequence[Array]) -> Array:
        norms = [jnp.max(jnp.sum(jnp.abs(y) ** order, axis=1)) ** (1 / order) for y in factors]
        return functools.reduce(operator.mul, norms)

    common = by_channel[None] ** (1 / order) / jnp.where(largest > 0, largest, 1)
    balanced = [y * gauge[None, :] for y, gauge in zip(factors, common, strict=True)]
    euclidean = [jnp.sqrt(jnp.max(squared_norm(y))) for y in factors]
    mixed = [x * y for x, y in itertools.combinations(euclidean, 2)]
    least = functools.reduce(jnp.minimum, [jnp.sum(by_channel), hoelder(factors), hoelder(balanced), *mixed])
    return functools.reduce(operator.mul, peaks, least)


def logit_rms(q: Float[Array, "T D"], k: Any, *, scale: float | Array | None = None, kv_mask: Any = None) -> Array:
    r"""The root mean square of all logits of tensor attention, exactly and in linear time.

    .. math:: \frac{1}{T \prod_a S_a} \sum_{i, j, l} x_{ijl}^2
              = \frac{s^2}{T \prod_a S_a} \sum_{t, u} (Q^T Q)_{tu} \prod_a (K_a^T K_a)_{tu}

    It is what ``coefficients="hermite"`` asks for.

    Args:
        q: queries ``[T, D]``.
        k: keys, as in `logit_bound`.
        scale: factor of the logits, ``1/sqrt(D)`` by default.
        kv_mask: true where a key is real, as in `tensor_attention`; others do not count. 0 without any in a set.

    Returns:
        One number.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention import bounds
        >>> float(bounds.logit_rms(jnp.full((3, 1), 2.0), jnp.ones((5, 1))))
        2.0
    """
    inputs = tensor_inputs(q, k, k, scale=scale, kv_mask=kv_mask)
    counts = [x.shape[0] if mask is None else jnp.maximum(jnp.sum(mask, dtype=x.dtype), 1)
              for x, mask in zip(inputs.keys, inputs.masks, strict=True)]  # fmt: skip
    factors = zip((inputs.q, *inputs.keys), (inputs.q.shape[0], *counts), strict=True)
    means = [y.T @ y / count for y, count in factors]
    return jnp.sqrt(jnp.sum(functools.reduce(operator.mul, means)))


class TensorCertificate(NamedTuple):
    """What is certain of the polynomial method on given tensors, in exact arithmetic.

    Attributes:
        logit_bound: no logit is larger in magnitude.
        total_variation: no query's weights are further off than this; infinite if the polynomial may turn negative.
        output: nor its output in each channel, ``[Dv]``, in the units of the values.
        met: whether the first is within the tolerance that was asked for; None if there was none.
        rank: the number of features.
        flops: of the polynomial method.
        exact_flops: of exact attention.
    """

    logit_bound: float
    total_variation: float
    output: np.ndarray
    met: bool | None
    rank: int
    flops: float
    exact_flops: float


def tensor_certificate(
    q: Float[Array, "T D"],
    k: Any,
    v: Any,
    *,
    degree: int | None = None,
    coefficients: Coefficients | Sequence[float] | np.ndarray = "taylor",
    bound: float | None = None,
    rms: float | None = None,
    tolerance: float | None = None,
    scale: float | Array | None = None,
    kv_mask: Any = None,
) -> TensorCertificate:
    r"""How far the polynomial method can be from tensor attention of any order on these tensors.

    With :math:`\beta` the `logit_bound` and lo and hi the least and the greatest :math:`P(x) e^{-x}` for
    :math:`|x| \le \beta` (`ratio_range`),

    .. math:: \tfrac12 \|\tilde w_i - w_i\|_1 \le C = \tanh\big(\tfrac14 \ln \tfrac{hi}{lo}\big), \qquad
              |\tilde o_{ic} - o_{ic}| \le C\, \Big(\max_{j, l} v^1_{jc} v^2_{lc} - \min_{j, l} v^1_{jc} v^2_{lc}\Big).

    It holds with and without a causal mask or a window. It assumes the worst logits within the bound and is often a
    hundred times larger than the error: measure that too (`approx_attention.diagnostics.output_error`), and its *skill*
    beside the mean of the values (`approx_attention.diagnostics.skill`), for where logits are tiny all methods look
    good. Rounding is not part of it.

    Args:
        q: queries ``[T, D]``; this and the next two are numbers, so that it cannot be called under `jax.jit`.
        k: keys, as in `tensor_polynomial`.
        v: values, likewise.
        degree: g, 2 by default, or that of ``coefficients``.
        coefficients: as in `tensor_polynomial`.
        bound: as there; the `logit_bound` of the tensors if it is needed and not given.
        rms: as there; the `logit_rms` of the tensors if it is needed and not given.
        tolerance: on the total variation.
        scale: factor of the logits, ``1/sqrt(D)`` by default.
        kv_mask: true where a key is real.

    Returns:
        The `TensorCertificate`.

    Raises:
        ValueError: shapes that do not fit, logits that are not finite, a degree that is not that of the coefficients.

    Example:
        >>> import jax
        >>> from approx_attention import bounds
        >>> q, k, l, v, w = (0.3 * jax.random.normal(jax.random.key(i), (64, 8)) for i in range(5))
        >>> certificate = bounds.tensor_certificate(q, (k, l), (v, w), degree=4, tolerance=1e-3)
        >>> certificate.met, certificate.rank, certificate.flops < certificate.exact_flops
        (True, 495, True)

    Reference:
        Alman and Song (2024), upper bound; the constants are derivations of this library (`weight_bound`).
    """
    inputs = tensor_inputs(q, k, v, scale=scale, kv_mask=kv_mask)
    beta = float(logit_bound(q, k, scale=scale, kv_mask=kv_mask))
    if isinstance(coefficients, str):
        if coefficients == "hermite" and rms is None:
            rms = float(logit_rms(q, k, scale=scale, kv_mask=kv_mask))
        degree = 2 if degree is None else degree
        coefficients = exp_coefficients(coefficients, degree, bound=beta if bound is None else bound, rms=rms)
    elif degree not in (None, len(coefficients) - 1):
        told = len(coefficients)
        raise ValueError(f"degree must be that of the {told} coefficients, {told - 1}, got {degree}")
    total_variation = weight_bound(*ratio_range(coefficients, beta))
    value_dim = inputs.values[0].shape[1]
    low, high = np.ones(value_dim), np.ones(value_dim)
    for values, mask in zip(inputs.values, inputs.masks, strict=True):
        real = np.asarray(values, np.float64)[slice(None) if mask is None else np.asarray(mask)]
        if not len(real):
            real = np.zeros((1, value_dim))
        ends = [a * b for a in (low, high) for b in (real.min(axis=0), real.max(axis=0))]
        low, high = np.min(ends, axis=0), np.max(ends, axis=0)
    num_queries, dim = inputs.q.shape
    lengths = [keys.shape[0] for keys in inputs.keys]
    rank = math.comb(dim + len(coefficients) - 1, dim)
    return TensorCertificate(
        logit_bound=beta,
        total_variation=total_variation,
        output=total_variation * (high - low) if math.isfinite(total_variation) else np.full(value_dim, np.inf),
        met=None if tolerance is None else total_variation <= tolerance,
        rank=rank,
        flops=2.0 * (num_queries + sum(lengths)) * rank * (value_dim + 1),
        exact_flops=2.0 * num_queries * math.prod(lengths) * (dim + value_dim),
    )
