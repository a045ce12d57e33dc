r"""Realisation of sparse patterns by self-attention with fixed projections: only the inputs X depend on the pattern.

.. math:: M = \mathrm{softmax}(X W_Q W_K^T X^T / \sqrt d), \qquad X = [X_1 \,|\, X_2], \qquad
          W_Q = d^{1/4} \binom{I}{0}, \qquad W_K = d^{1/4} \binom{0}{I}, \qquad \mathrm{logits} = X_1 X_2^T.

Softmax is invariant to a constant added to a row, so M matches a pattern A in the ratios within rows. Every
construction gives logits :math:`\tau L^{(1)} + L^{(2)}`: the first part separates the keys of a row from the others,
and the second sets their weights. :math:`\tau` is as small as the precision allows.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jaxtyping import Float, PRNGKeyArray

from approx_attention.core import (
    check_choice,
    check_count,
    check_key,
    floating_dtype,
    in_blocks,
    in_float32,
    known_number,
)
from approx_attention.realization.certification import (
    ROW_BLOCK,
    Certificate,
    RatioError,
    certify,
    check_no_future,
    check_square,
    off_rows,
)
from approx_attention.realization.factors import (
    Factors,
    Sampling,
    factor_dense,
    interpolate,
    on_moment_curve,
    project,
    project_balanced,
)
from approx_attention.realization.optimisation import learn, separate
from approx_attention.sparse import SparsePattern, check_pattern

RealizationMethod = Literal[
    "projection", "orthogonal", "balanced", "ls", "wls", "max_margin", "learned", "trigonometric", "dense"
]
PROJECTIONS = ("projection", "orthogonal", "balanced")
INTERPOLATIONS = ("ls", "wls", "max_margin", "learned")
DETERMINISTIC = ("trigonometric", "dense")


class Realization(NamedTuple):
    """Inputs ``[T, 2 d]`` and projections ``[2 d, d]`` of a head whose attention has a pattern, with a certificate.

    Attributes:
        inputs: the tokens X.
        w_q: the projection of queries, the same for every pattern of one d.
        w_k: the projection of keys, the same for every pattern of one d.
        certificate: the `Certificate` of these arrays.
    """

    inputs: Array
    w_q: Array
    w_k: Array
    certificate: Certificate


def realize_sparse_pattern(
    pattern: SparsePattern,
    eps1: float,
    eps2: float,
    *,
    d: int,
    key: PRNGKeyArray | None = None,
    method: RealizationMethod = "wls",
    tau: float | None = None,
    is_causal: bool = False,
    max_draws: int = 32,
    max_logit: float | None = None,
    num_steps: int = 600,
    ratio: RatioError = "relative",
    dtype: Any = jnp.float32,
) -> Realization:
    r"""Make inputs for which self-attention with fixed projections has a given sparse pattern.

    .. math:: \frac{M_{ij}}{M_{is}} \le \varepsilon_1 \ (j \notin S_i,\ s \in S_i), \qquad
              \frac{M_{is} / M_{is'}}{A_{is} / A_{is'}} \le 1 + \varepsilon_2 \ (s, s' \in S_i).

    The attention M satisfies two precisions. The methods, in falling order of the number of channels that they need:

    - ``"projection"``: :math:`X_1 = B G^T / \sqrt d`, :math:`X_2 = G^T / \sqrt d` for Gaussian G ``[d, T]`` and a
      sparse B, zero off the supports. :math:`X_1 X_2^T` is unbiased for B. ``"orthogonal"`` has orthogonal rows in G
      (exact at d = T), ``"balanced"`` shares the spectrum of B between :math:`X_1` and :math:`X_2`.
    - ``"ls"``: Gaussian keys, and the shortest query with the exact target logits on its support; ``"wls"``: the query
      with the least energy of logits off the support.
    - ``"max_margin"``: keys as for ``"wls"``, and the query with the smallest maximal logit off the support.
    - ``"learned"``: keys and queries by gradient descent.
    - ``"trigonometric"``: keys on a moment curve, 2 K channels for K keys per row and any T, but huge logits; for
      float64 and small T and K.
    - ``"dense"``: for a pattern without zeros, by the singular value decomposition of its centred logarithms.

    Random samples are measured by `certify` until one is accepted. Finding the smallest d for given precisions is
    NP-hard, so a rejection proves nothing. For the error of outputs see ``max_row_tv``.

    Args:
        pattern: the square pattern A.
        eps1: largest ratio of a zero to a nonzero of its row, in (0, 1).
        eps2: largest error of the ratio of two nonzeros, at least 0 (with rounding, 0 is possible for one key per row).
        d: the number of channels of queries and keys; X has twice as many.
        key: typed PRNG key; not needed by ``"trigonometric"`` and ``"dense"``.
        method: one of the methods above.
        tau: the factor :math:`\tau`; by default the smallest that gives ``eps1`` for the sample.
        is_causal: key j is visible to query i only if j <= i.
        max_draws: the largest number of samples.
        max_logit: largest accepted absolute logit of all pairs, including those hidden from a causal head.
        num_steps: gradient steps of ``"max_margin"`` and ``"learned"``.
        ratio: whether ``eps2`` limits relative errors of ratios of nonzeros, as above, or absolute ones.
        dtype: dtype of the inputs and projections; the certificate is for the rounded arrays.

    Returns:
        The `Realization`. If no sample is accepted, it is the last one, and ``certificate.ok`` is false.

    Raises:
        ValueError: the pattern is not square, has keys in the future of a causal head, has no zeros (for a
            projection) or has zeros (for ``"dense"``); a precision or count is out of range; or there are fewer
            channels than the method needs.
        TypeError: not a pattern, traced numbers, a dtype that is not floating point.
        NotImplementedError: ``"dense"`` with ``is_causal``.

    Example:
        >>> import jax
        >>> from approx_attention import SparsePattern, realize_sparse_pattern
        >>> pattern = SparsePattern.random(jax.random.key(0), 64, 2)
        >>> realized = realize_sparse_pattern(pattern, 0.1, 0.1, d=48, key=jax.random.key(1))
        >>> realized.inputs.shape, bool(realized.certificate.ok)
        ((64, 96), True)

    Reference:
        ``"projection"`` and fixed projections follow :cite:p:`likhosherstov2021expressive`; the formulas and the other
        methods are this library's.
    """
    check_pattern(pattern)
    d, eps1, eps2 = check_count("d", d), known_number("eps1", eps1), known_number("eps2", eps2)
    require_request(pattern, eps1, eps2, d, method, is_causal)
    max_draws = check_count("max_draws", max_draws)
    num_steps = check_count("num_steps", num_steps)
    check_choice("ratio", ratio, get_args(RatioError))
    tau = None if tau is None else positive_limit("tau", tau)
    max_logit = math.inf if max_logit is None else positive_limit("max_logit", max_logit)
    dtype = floating_dtype("dtype", dtype)
    key = jax.random.key(0) if method in DETERMINISTIC else check_key(f"realize_sparse_pattern by {method!r}", key)
    max_draws = 1 if method in DETERMINISTIC else max_draws
    search = Search(method, d, dtype, is_causal, max_draws, num_steps, ratio)
    return draw_until_accepted(pattern, (eps1, eps2, max_logit), tau, d, key, search=search)


def positive_limit(name: str, limit: Any) -> float:
    """Return a concrete positive number, which may be infinite."""
    number = known_number(name, limit)
    if not number > 0:
        raise ValueError(f"{name} must be positive, got {number}")
    return number


def require_request(pattern: SparsePattern, eps1: float, eps2: float, d: int, method: str, is_causal: bool) -> None:
    """Raise unless a method supports a pattern, these precisions and the number of channels.

    Args:
        pattern: a pattern; its rows are checked if they are known when tracing.
        eps1: largest ratio of a zero to a nonzero of its row.
        eps2: largest error of a ratio of nonzeros.
        d: the number of channels.
        method: the construction, as in `realize_sparse_pattern`.
        is_causal: whether the head is causal.

    Raises:
        ValueError: an unknown method, precisions out of range, a pattern that is not square, too few channels, keys in
            the future of a causal head, or a pattern with or without zeros that the method does not support.
        NotImplementedError: ``"dense"`` in a causal head.
        TypeError: not a `SparsePattern`.
    """
    check_choice("method", method, get_args(RealizationMethod))
    if not 0 < eps1 < 1:
        raise ValueError(f"eps1 must lie in (0, 1), got {eps1}")
    if not 0 <= eps2 < math.inf:
        raise ValueError(f"eps2 must be at least 0 and finite, got {eps2}")
    check_square(pattern)
    needed = {"trigonometric": 2}.get(method, 1 if method in INTERPOLATIONS else 0) * pattern.keys_per_row
    if d < needed:
        raise ValueError(f"{method} needs d >= {needed} for {pattern.keys_per_row} keys per row, got d = {d}")
    if method == "dense" and is_causal:
        raise NotImplementedError("realize_sparse_pattern by 'dense' does not support is_causal")
    if isinstance(pattern.valid, Tracer):
        return
    if is_causal:
        check_no_future(pattern)
    visible = np.arange(1, pattern.num_queries + 1) if is_causal else pattern.num_keys
    rows_with_zeros = np.sum(np.asarray(pattern.valid), axis=1) < visible
    if method in PROJECTIONS and not rows_with_zeros.any():
        raise ValueError(f"{method} needs a pattern with zeros; use method='dense'")
    if method == "dense" and rows_with_zeros.any():
        raise ValueError(f"dense needs a pattern without zeros, got zeros in {rows_with_zeros.sum()} rows")


def fixed_projections(d: int, dtype: Any = jnp.float32) -> tuple[Float[Array, "2*d d"], Float[Array, "2*d d"]]:
    """Make the projections of queries and of keys, the same for every pattern: each reads one half of X.

    Args:
        d: the number of channels of a head.
        dtype: dtype of both.

    Returns:
        ``W_Q`` and ``W_K``, ``[2 d, d]``.

    Example:
        >>> from approx_attention.realization import fixed_projections
        >>> w_q, w_k = fixed_projections(1)
        >>> w_q.tolist(), w_k.tolist()
        ([[1.0], [0.0]], [[0.0], [1.0]])

    Reference:
        As for `realize_sparse_pattern`.
    """
    # d^(1/4) in each cancels the 1 / sqrt(d) of attention: logits are X_1 X_2^T.
    halves = jnp.asarray(d**0.25 * np.eye(2 * d), dtype)
    return halves[:, :d], halves[:, d:]


class Search(NamedTuple):
    """Static options of `draw_until_accepted`, as in `realize_sparse_pattern`.

    Attributes:
        method: the construction.
        width: channels of the arrays, of which a prefix is used.
        dtype: dtype of inputs and projections.
        is_causal: key j is visible to query i only if j <= i.
        max_draws: the largest number of samples.
        num_steps: gradient steps.
        ratio: whether errors of ratios are relative or absolute.
    """

    method: str
    width: int
    dtype: Any
    is_causal: bool = False
    max_draws: int = 1
    num_steps: int = 1
    ratio: RatioError = "relative"


@functools.partial(jax.jit, static_argnames="search", inline=True)
@in_float32()
def draw_until_accepted(
    pattern: SparsePattern,
    limits: tuple[Any, Any, Any],
    tau: Any,
    num_channels: Any,
    key: Array,
    *,
    search: Search,
) -> Realization:
    """`realize_sparse_pattern` without checks, with ``num_channels`` used channels in arrays of ``search.width``.

    In every sample fewer channels are a prefix of more; their number may be traced.
    """
    method, width, dtype, is_causal, max_draws, num_steps, ratio = search
    compute = jnp.float64 if dtype == jnp.float64 else jnp.float32
    eps1, eps2, max_logit = (jnp.asarray(limit, compute) for limit in limits)
    # The part of a gap that rounding may take, relative to the largest logit: 16 rounding errors for the sums of a
    # logit, and one for the cast to a narrower dtype.
    rounding = 16 * float(jnp.finfo(compute).eps) + (float(jnp.finfo(dtype).eps) if dtype != compute else 0)
    used = jnp.arange(width, dtype=jnp.int32) < num_channels
    w_q, w_k = fixed_projections(width, dtype)
    log_weights = pattern.normalized_log_weights(compute)
    nominal = jnp.log1p(eps2) - jnp.log(eps1) if tau is None else jnp.asarray(tau, compute)

    def attempt(state: tuple[Array, Array, Certificate]) -> tuple[Array, Array, Certificate]:
        draw, _, _ = state
        sampling = Sampling(jax.random.fold_in(key, draw), used, is_causal, num_steps, nominal, compute)
        factors = _CONSTRUCTIONS[method](pattern, log_weights, sampling)
        lift = nominal
        if tau is None:
            lift = _least_lift(factors, pattern, -jnp.log(eps1), is_causal, rounding)
            lift = jnp.where(jnp.isfinite(lift), lift, nominal)
            if method == "balanced":
                # The spectrum of B is split for one tau only; another one would scale the log-weights as well.
                equal = jnp.all(jnp.where(pattern.valid, pattern.log_weights == pattern.log_weights[:, :1], True))
                lift = jnp.where(equal, lift, nominal)
        queries = lift * factors.separating + factors.weighting
        inputs = jnp.concatenate([queries, factors.keys], axis=1).astype(dtype)
        certificate = certify(inputs, w_q, w_k, pattern, is_causal=is_causal, eps1=eps1, eps2=eps2, ratio=ratio)
        ok = certificate.ok & (certificate.logit_absmax <= max_logit)
        return draw + 1, inputs, certificate._replace(ok=ok, draws=draw + 1)

    none = jnp.full((), jnp.nan, compute)
    nothing = Certificate(none, none, none, none, none, jnp.zeros((), bool), jnp.zeros((), jnp.int32), none)
    empty = jnp.zeros((pattern.num_queries, 2 * width), dtype)
    start = jnp.zeros((), jnp.int32), empty, nothing
    _, inputs, certificate = lax.while_loop(lambda state: (state[0] < max_draws) & ~state[2].ok, attempt, start)
    return Realization(inputs, w_q, w_k, certificate)


_CONSTRUCTIONS: dict[str, Callable[[SparsePattern, Array, Sampling], Factors]] = {
    "projection": functools.partial(project, orthogonal=False),
    "orthogonal": functools.partial(project, orthogonal=True),
    "balanced": project_balanced,
    "ls": functools.partial(interpolate, orthogonal=False),
    "wls": functools.partial(interpolate, orthogonal=True),
    "max_margin": separate,
    "learned": learn,
    "trigonometric": on_moment_curve,
    "dense": factor_dense,
}


def _least_lift(factors: Factors, pattern: SparsePattern, gap: Array, is_causal: bool, rounding: float) -> Array:
    r"""The smallest :math:`\tau` for which every nonzero exceeds every zero of its row by a gap; else infinite.

    .. math:: \tau = \max_{i,\, s \in S_i,\, j \notin S_i}
              \frac{\mathrm{gap} - (L^{(2)}_{is} - L^{(2)}_{ij})}{L^{(1)}_{is} - L^{(1)}_{ij}}
    """

    def block(args: tuple[Array, ...]) -> tuple[Array, ...]:
        rows, separating, weighting, indices, valid = args
        logits, shifts = (x @ factors.keys.T for x in (separating, weighting))
        off = off_rows(rows, indices, valid, pattern.num_keys, is_causal)

        # One key of every support at a time: all pairs with keys off the support would be T x K x T numbers.
        def one_key(entry: tuple[Array, Array]) -> tuple[Array, Array]:
            index, valid = entry
            rise, shift = (jnp.take_along_axis(x, index[:, None], axis=1) - x for x in (logits, shifts))
            relevant = off & valid[:, None]
            needed = jnp.where(rise > 0, (gap - shift) / rise, jnp.inf)
            return jnp.max(jnp.where(relevant, needed, 0)), jnp.min(jnp.where(relevant, rise, jnp.inf))

        needed, rise = lax.map(one_key, (indices.T, valid.T))
        return jnp.max(needed), jnp.min(rise), jnp.max(jnp.abs(logits)), jnp.max(jnp.abs(shifts))

    # The smallest rise and the largest logits bound the part of a gap lost to rounding, for which tau compensates.
    rows = jnp.arange(pattern.num_queries, dtype=jnp.int32)
    arrays = rows, factors.separating, factors.weighting, pattern.indices, pattern.valid
    needed, rise, size, shift = lax.map(block, tuple(in_blocks(x, min(ROW_BLOCK, pattern.num_queries)) for x in arrays))
    needed, least = jnp.max(needed), jnp.maximum(jnp.min(rise), rounding)
    return needed + rounding * (needed * jnp.max(size) + jnp.max(shift)) / least
