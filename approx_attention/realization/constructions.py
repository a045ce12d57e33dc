r"""Realises sparse patterns by self-attention with fixed projections: only the inputs X change with the pattern.

.. math:: M = \mathrm{softmax}(X W_Q W_K^T X^T / \sqrt d), \qquad X = [X_1 \,|\, X_2], \qquad
          W_Q = d^{1/4} \binom{I}{0}, \qquad W_K = d^{1/4} \binom{0}{I}, \qquad \mathrm{logits} = X_1 X_2^T.

Softmax forgets a constant in each row, so M can match a pattern A in the ratios within rows only. Every construction
here gives logits :math:`\tau L^{(1)} + L^{(2)}`, of which the first part separates the keys of a row from the others,
and the second shapes the weights among them; :math:`\tau` is taken as small as the precision allows.
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

from approx_attention.core import check_choice, check_count, check_key, floating_dtype, in_blocks, known_number
from approx_attention.realization.bottleneck import nearest_factors, row_centred
from approx_attention.realization.certification import (
    ROW_BLOCK,
    Certificate,
    RatioError,
    certify,
    check_no_future,
    check_square,
    full_matmul,
    off_rows,
)
from approx_attention.sparse import SparsePattern, check_pattern

RealizationMethod = Literal[
    "projection", "orthogonal", "balanced", "ls", "wls", "max_margin", "learned", "trigonometric", "dense"
]
PROJECTIONS = ("projection", "orthogonal", "balanced")
INTERPOLATIONS = ("ls", "wls", "max_margin", "learned")
DETERMINISTIC = ("trigonometric", "dense")


class Realization(NamedTuple):
    """Inputs ``[T, 2 d]`` and projections ``[2 d, d]`` of a head whose attention has a pattern, and the proof.

    Attributes:
        inputs: the tokens X.
        w_q: the projection of queries, the same for every pattern of one d.
        w_k: the projection of keys, the same for every pattern of one d.
        certificate: what was measured on these very arrays.
    """

    inputs: Array
    w_q: Array
    w_k: Array
    certificate: Certificate


class _Factors(NamedTuple):
    """Logits ``(tau separating + weighting) @ keys.T``, each ``[T, d]``."""

    separating: Array
    weighting: Array
    keys: Array


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
    r"""Inputs with which fixed self-attention has a given sparse pattern, to two precisions.

    .. math:: \frac{M_{ij}}{M_{is}} \le \varepsilon_1 \ (j \notin S_i,\ s \in S_i), \qquad
              \frac{M_{is} / M_{is'}}{A_{is} / A_{is'}} \le 1 + \varepsilon_2 \ (s, s' \in S_i).

    The methods, by the number of channels that they need, largest first:

    - ``"projection"``: :math:`X_1 = B G^T / \sqrt d`, :math:`X_2 = G^T / \sqrt d` for Gaussian G ``[d, T]`` and a
      sparse B, zero off the supports. :math:`X_1 X_2^T` is unbiased for B. ``"orthogonal"`` has orthogonal rows in G
      (exact at d = T), ``"balanced"`` shares the spectrum of B out between :math:`X_1` and :math:`X_2`.
    - ``"ls"``: Gaussian keys, and the shortest query whose logits on its support are as wanted, exactly; ``"wls"`` the
      one whose logits have the least energy off the support.
    - ``"max_margin"``: keys as for ``"wls"``, and the query whose largest logit off the support is least.
    - ``"learned"``: keys and queries found by gradient descent.
    - ``"trigonometric"``: 2 K channels for K keys a row, whatever T, at the price of huge logits: keys on a moment
      curve; for float64 and small T and K.
    - ``"dense"``: for a pattern without zeros, by the singular values of its centred logarithms.

    Each draw is measured by `certify` and made anew until it is accepted. To find the smallest d for given precisions
    is NP-hard, so a rejection proves nothing. The precisions say little of the output: see ``max_row_tv``.

    Args:
        pattern: the pattern A, as many queries as keys.
        eps1: largest ratio of a zero to a nonzero of its row, in (0, 1).
        eps2: largest error of the ratio of two nonzeros, at least 0 (which rounding meets for one key a row).
        d: channels of queries and keys; X has twice as many.
        key: typed PRNG key; not needed by the last two methods.
        method: one of the above.
        tau: logit by which the nonzeros are lifted; by default the least that gives ``eps1`` for the draw.
        is_causal: key j is visible to query i only if j <= i.
        max_draws: draws at most.
        max_logit: largest absolute logit that is accepted, of all pairs, also of those that a causal head hides.
        num_steps: gradient steps of ``"max_margin"`` and ``"learned"``.
        ratio: whether ``eps2`` limits relative errors of ratios of nonzeros, as above, or absolute ones.
        dtype: of the inputs and projections; the certificate speaks of them as they are rounded.

    Returns:
        The `Realization`. Where no draw is accepted it holds the last one, and ``certificate.ok`` is false.

    Raises:
        ValueError: a pattern that is not square, reaches the future of a causal head, or has no zeros (for a
            projection) or zeros (for ``"dense"``); precisions or counts out of range; fewer channels than a method can
            do with.
        TypeError: what is no pattern, numbers that are not known when tracing, a dtype that is not floating point.
        NotImplementedError: ``"dense"`` with ``is_causal``.

    Example:
        >>> import jax
        >>> from approx_attention import SparsePattern, realize_sparse_pattern
        >>> pattern = SparsePattern.random(jax.random.key(0), 64, 2)
        >>> realized = realize_sparse_pattern(pattern, 0.1, 0.1, d=48, key=jax.random.key(1))
        >>> realized.inputs.shape, bool(realized.certificate.ok)
        ((64, 96), True)

    Reference:
        The scheme of ``"projection"`` and of fixed projections is that of
        :cite:p:`likhosherstov2021expressive`; the formulas and the other methods are this library's.
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
    return draw_until_accepted(
        pattern,
        (eps1, eps2, max_logit),
        tau,
        d,
        key,
        width=d,
        method=method,
        is_causal=is_causal,
        max_draws=1 if method in DETERMINISTIC else max_draws,
        num_steps=num_steps,
        ratio=ratio,
        dtype=dtype,
    )


def positive_limit(name: str, limit: Any) -> float:
    """Returns a number that is known when tracing, positive, and may be infinite."""
    number = known_number(name, limit)
    if not number > 0:
        raise ValueError(f"{name} must be positive, got {number}")
    return number


def require_request(pattern: SparsePattern, eps1: float, eps2: float, d: int, method: str, is_causal: bool) -> None:
    """Raises unless a method can be asked for a pattern, to these precisions, with d channels."""
    check_choice("method", method, get_args(RealizationMethod))
    if not 0 < eps1 < 1:
        raise ValueError(f"eps1 must lie in (0, 1), got {eps1}")
    if not 0 <= eps2 < math.inf:
        raise ValueError(f"eps2 must be at least 0 and finite, got {eps2}")
    check_square(pattern)
    needed = {"trigonometric": 2}.get(method, 1 if method in INTERPOLATIONS else 0) * pattern.keys_per_row
    if d < needed:
        raise ValueError(f"{method} needs d >= {needed} for {pattern.keys_per_row} keys a row, got d = {d}")
    if method == "dense" and is_causal:
        raise NotImplementedError("realize_sparse_pattern by 'dense' does not support is_causal")
    if isinstance(pattern.valid, Tracer):
        return
    if is_causal:
        check_no_future(pattern)
    visible = np.arange(1, pattern.num_queries + 1) if is_causal else pattern.num_keys
    rows_with_zeros = np.sum(np.asarray(pattern.valid), axis=1) < visible
    if method in PROJECTIONS and not rows_with_zeros.any():
        raise ValueError(f"{method} realises sparse patterns, got one without zeros: use method='dense'")
    if method == "dense" and rows_with_zeros.any():
        raise ValueError(f"dense realises patterns without zeros, got zeros in {rows_with_zeros.sum()} rows")


def fixed_projections(d: int, dtype: Any = jnp.float32) -> tuple[Float[Array, "2*d d"], Float[Array, "2*d d"]]:
    """The projections of every pattern, of queries and of keys: each reads one half of X.

    Args:
        d: the number of channels of a head.
        dtype: of both.

    Returns:
        ``W_Q`` and ``W_K``, ``[2 d, d]``.

    Example:
        >>> from approx_attention.realization import fixed_projections
        >>> w_q, w_k = fixed_projections(1)
        >>> w_q.tolist(), w_k.tolist()
        ([[1.0], [0.0]], [[0.0], [1.0]])

    Reference:
        As `realize_sparse_pattern`.
    """
    halves = jnp.asarray(d**0.25 * np.eye(2 * d), dtype)
    return halves[:, :d], halves[:, d:]


@functools.partial(
    jax.jit,
    static_argnames=("width", "method", "is_causal", "max_draws", "num_steps", "ratio", "dtype"),
    inline=True,
)
def draw_until_accepted(
    pattern: SparsePattern,
    limits: tuple[Any, Any, Any],
    tau: Any,
    num_channels: Any,
    key: Array,
    *,
    width: int,
    method: str,
    is_causal: bool,
    max_draws: int,
    num_steps: int,
    dtype: Any,
    ratio: RatioError = "relative",
) -> Realization:
    """`realize_sparse_pattern` without checks, in arrays of ``width`` channels of which ``num_channels`` are used.

    Fewer channels are a prefix of more, draw by draw, and the number that is used may be traced.
    """
    compute = jnp.float64 if dtype == jnp.float64 else jnp.float32
    eps1, eps2, max_logit = (jnp.asarray(limit, compute) for limit in limits)
    # What rounding may take from a gap, in units of the largest logit: that of long sums, and of the result.
    rounding = 16 * float(jnp.finfo(compute).eps) + (float(jnp.finfo(dtype).eps) if dtype != compute else 0)
    used = jnp.arange(width, dtype=jnp.int32) < num_channels
    w_q, w_k = fixed_projections(width, dtype)
    log_weights = pattern.normalized_log_weights(compute)
    nominal = jnp.log1p(eps2) - jnp.log(eps1) if tau is None else jnp.asarray(tau, compute)

    def attempt(state: tuple[Array, Array, Certificate]) -> tuple[Array, Array, Certificate]:
        draw, _, _ = state
        drawing = _Drawing(jax.random.fold_in(key, draw), used, is_causal, num_steps, nominal, compute)
        factors = _CONSTRUCTIONS[method](pattern, log_weights, drawing)
        lift = nominal
        if tau is None:
            lift = _least_lift(factors, pattern, -jnp.log(eps1), is_causal, rounding)
            lift = jnp.where(jnp.isfinite(lift), lift, nominal)
            if method == "balanced":
                # The spectrum of B is shared out for one lift only; others would scale the weights as well.
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


class _Drawing(NamedTuple):
    """What a construction may draw on."""

    key: Array
    used: Array
    is_causal: bool
    num_steps: int
    lift: Array
    dtype: Any


def _keys(drawing: _Drawing, num_tokens: int, *, orthogonal: bool) -> Array:
    """Random keys ``[T, d]`` of mean square norm 1, with columns that are Gaussian or orthogonal in blocks of T."""
    width = drawing.used.shape[0]

    # A key for each column: those of fewer channels are a prefix.
    @jax.vmap
    def column(number: Array) -> Array:
        return jax.random.normal(jax.random.fold_in(drawing.key, number), (num_tokens,), drawing.dtype)

    keys = column(jnp.arange(width, dtype=jnp.int32)).T
    if orthogonal:
        blocks = [keys[:, start : start + num_tokens] for start in range(0, width, num_tokens)]
        keys = jnp.concatenate([_signed_orthonormal(block) for block in blocks], axis=1) * math.sqrt(num_tokens)
    return jnp.where(drawing.used[None, :], keys, 0) / jnp.sqrt(jnp.sum(drawing.used).astype(drawing.dtype))


def _signed_orthonormal(columns: Array) -> Array:
    rotation, triangle = jnp.linalg.qr(columns)
    return rotation * jnp.sign(jnp.diagonal(triangle))[None, :]


def _project(pattern: SparsePattern, log_weights: Array, drawing: _Drawing, *, orthogonal: bool) -> _Factors:
    r"""The keys of a row, summed with :math:`B_{is} = \tau + \log A_{is} - \min_S \log A_i`."""
    keys = _keys(drawing, pattern.num_queries, orthogonal=orthogonal)

    def row(args: tuple[Array, Array, Array]) -> Array:
        indices, valid, log_weights = args
        return full_matmul(_on_support(valid, log_weights), keys[indices])

    both = lax.map(row, (pattern.indices, pattern.valid, log_weights), batch_size=ROW_BLOCK)
    return _Factors(both[:, 0], both[:, 1], keys)


def _on_support(valid: Array, log_weights: Array) -> Array:
    """The two rows of B on a support ``[2, K]``: ones, and logarithms from the least."""
    least = jnp.min(jnp.where(valid, log_weights, jnp.inf))
    return jnp.stack([valid.astype(log_weights.dtype), jnp.where(valid, log_weights - least, 0)])


def _project_balanced(pattern: SparsePattern, log_weights: Array, drawing: _Drawing) -> _Factors:
    r"""The spectrum of B in equal parts.

    .. math:: B = U \Sigma V^T, \qquad X_1 = U \Sigma^{1/2} G^T / \sqrt d, \qquad X_2 = V \Sigma^{1/2} G^T / \sqrt d.
    """
    parts = jax.vmap(_on_support)(pattern.valid, log_weights)
    entries = drawing.lift * parts[:, 0] + parts[:, 1]
    rows = jnp.arange(pattern.num_queries, dtype=jnp.int32)[:, None]
    lifted = jnp.zeros((pattern.num_queries,) * 2, entries.dtype).at[rows, pattern.indices].add(entries)
    left, right = nearest_factors(lifted, pattern.num_queries)
    keys = _keys(drawing, pattern.num_queries, orthogonal=False)
    queries = full_matmul(left, keys) / drawing.lift
    return _Factors(queries, jnp.zeros_like(queries), full_matmul(right, keys))


def _interpolate(pattern: SparsePattern, log_weights: Array, drawing: _Drawing, *, orthogonal: bool) -> _Factors:
    r"""The shortest queries with given logits on the support, :math:`x_i = K_S^T (K_S K_S^T)^{-1} b_i`.

    Keys with orthogonal columns have :math:`\|x\|^2` in proportion to the energy of all logits, so that the shortest
    query has the least energy off the support: for Gaussian keys these are the queries that are shortest in the metric
    :math:`K^T K`.
    """
    keys = _keys(drawing, pattern.num_queries, orthogonal=orthogonal)
    return _Factors(*_interpolating_queries(keys, pattern, log_weights), keys)


def _interpolating_queries(keys: Array, pattern: SparsePattern, log_weights: Array) -> tuple[Array, Array]:
    """Shortest queries with logits 1, and with centred log-weights, on the support."""

    def row(args: tuple[Array, Array, Array]) -> Array:
        indices, valid, log_weights = args
        count = jnp.sum(valid, dtype=log_weights.dtype)
        mean = jnp.sum(jnp.where(valid, log_weights, 0)) / count
        wanted = jnp.stack([valid.astype(log_weights.dtype), jnp.where(valid, log_weights - mean, 0)])
        return full_matmul(wanted, _support_inverse(keys, indices, valid).T)

    both = lax.map(row, (pattern.indices, pattern.valid, log_weights), batch_size=ROW_BLOCK)
    return both[:, 0], both[:, 1]


def _support_inverse(keys: Array, indices: Array, valid: Array, ridge: float = 0.0) -> Array:
    """The pseudoinverse ``[d, K]`` of the keys of a row ``[K, d]``, whose padding is zero."""
    held = jnp.where(valid[:, None], keys[indices], 0)
    gram = full_matmul(held, held.T) + jnp.diag(jnp.where(valid, jnp.asarray(ridge, keys.dtype), 1))
    return jnp.linalg.solve(gram, held).T


def _separate(pattern: SparsePattern, log_weights: Array, drawing: _Drawing) -> _Factors:
    r"""The query with logits 1 on its support whose largest logit off it is least, by a smoothed maximum.

    .. math:: \min_N \sum_i \alpha^{-1} \log \sum_{j \notin S_i} e^{\alpha x_i \cdot k_j}, \qquad
              x_i = N_i + K_S^+ (1 - K_S N_i).
    """
    start = _interpolate(pattern, log_weights, drawing, orthogonal=True)
    inverses = jax.vmap(_support_inverse, (None, 0, 0))(start.keys, pattern.indices, pattern.valid)
    off = _off_support(pattern, drawing.is_causal)

    def queries(free: Array) -> Array:
        return free + _repair(free, start.keys, inverses, pattern)

    def loss(free: Array, sharpness: Array) -> Array:
        logits = jnp.where(off, sharpness * full_matmul(queries(free), start.keys.T), -jnp.inf)
        peaks = jax.nn.logsumexp(logits, axis=1)
        return jnp.sum(jnp.where(jnp.any(off, axis=1), peaks, 0)) / sharpness

    free = _descend(loss, start.separating, drawing.num_steps)
    return start._replace(separating=queries(free))


def _repair(free: Array, keys: Array, inverses: Array, pattern: SparsePattern) -> Array:
    """What brings the logits of queries on their supports to 1."""

    def row(free: Array, inverse: Array, indices: Array, valid: Array) -> Array:
        missing = jnp.where(valid, 1 - full_matmul(keys[indices], free), 0)
        return full_matmul(inverse, missing)

    return jax.vmap(row)(free, inverses, pattern.indices, pattern.valid)


def _learn(pattern: SparsePattern, log_weights: Array, drawing: _Drawing) -> _Factors:
    r"""Keys and queries by gradient descent on the largest logit off the supports, which are kept at 1.

    .. math:: \min_{K, N} \frac1\alpha \log \sum_{j \notin S_i} e^{\alpha (x_i \cdot k_j - 1)}
              + \frac{20}{T} \sum_{i, j} \max(-x_i \cdot k_j - 1, 0)^2.
    """
    ridge = 1e-6
    off = _off_support(pattern, drawing.is_causal)
    used = drawing.used[None, :]

    def queries(free: Array, keys: Array, ridge: float) -> Array:
        inverse = functools.partial(_support_inverse, ridge=ridge)
        inverses = jax.vmap(inverse, (None, 0, 0))(keys, pattern.indices, pattern.valid)
        return free + _repair(free, keys, inverses, pattern)

    def loss(parameters: tuple[Array, Array], sharpness: Array) -> Array:
        free, keys = (jnp.where(used, x, 0) for x in parameters)
        logits = full_matmul(queries(free, keys, ridge), keys.T)
        largest = jax.nn.logsumexp(jnp.where(off, sharpness * (logits - 1), -jnp.inf)) / sharpness
        return largest + 20 / pattern.num_queries * jnp.sum(jnp.where(off, jax.nn.relu(-logits - 1) ** 2, 0))

    keys = _keys(drawing, pattern.num_queries, orthogonal=False)
    free, keys = (jnp.where(used, x, 0) for x in _descend(loss, (jnp.zeros_like(keys), keys), drawing.num_steps))
    _, weighting = _interpolating_queries(keys, pattern, log_weights)
    return _Factors(queries(free, keys, 0.0), weighting, keys)


def _descend(loss: Callable[[Any, Array], Array], start: Any, num_steps: int, rate: float = 0.05) -> Any:
    """Adam with a rate that falls as a cosine, while the maximum that a loss smooths grows sharper, from 5 to 100."""

    def step(state: tuple[Any, Any, Any], number: Array) -> tuple[tuple[Any, Any, Any], None]:
        parameters, first, second = state
        progress = number / num_steps
        slopes = jax.grad(loss)(parameters, 5 * 20**progress)
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, slopes)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, second, slopes)
        share = rate * (1 + jnp.cos(jnp.pi * progress)) / 2 / (1 - 0.9 ** (number + 1))
        root = jnp.sqrt(1 - 0.999 ** (number + 1))
        parameters = jax.tree.map(
            lambda x, m, v: x - share * m / (jnp.sqrt(v) / root + 1e-8), parameters, first, second
        )
        return (parameters, first, second), None

    zeros = jax.tree.map(jnp.zeros_like, start)
    numbers = jnp.arange(num_steps, dtype=jax.tree.leaves(start)[0].dtype)
    return lax.scan(step, (start, zeros, zeros), numbers)[0][0]


def _off_support(pattern: SparsePattern, is_causal: bool) -> Array:
    """Which keys a query sees and should not ``[T, S]``."""
    rows = jnp.arange(pattern.num_queries, dtype=jnp.int32)
    return off_rows(rows, pattern.indices, pattern.valid, pattern.num_keys, is_causal)


def _on_moment_curve(pattern: SparsePattern, log_weights: Array, drawing: _Drawing) -> _Factors:
    r"""Keys :math:`(\cos m t_j, \sin m t_j)_{m \le K}` at :math:`t_j = 2 \pi j / T`, queries polynomials of degree K.

    The logits :math:`-\prod_{s \in S} (1 - \cos(t - t_s))`, less their mean over t, are largest on S alone.
    """
    num_tokens, degree = pattern.num_queries, pattern.keys_per_row
    harmonics = np.arange(1, degree + 1)

    def curve(angles: np.ndarray) -> np.ndarray:
        turns = angles[:, None] * harmonics[None, :]
        return np.concatenate([np.cos(turns), np.sin(turns)], axis=1)

    angles = 2 * np.pi * np.arange(num_tokens) / num_tokens
    nodes = 2 * np.pi * np.arange(2 * degree + 1) / (2 * degree + 1)
    at_nodes, unused = curve(nodes), ((0, 0), (0, drawing.used.shape[0] - 2 * degree))
    keys = jnp.asarray(np.pad(curve(angles), unused), drawing.dtype)
    # 1 - cos would lose the smallest gaps.
    falls = jnp.asarray(2 * np.sin((nodes[None, :] - angles[:, None]) / 2) ** 2, drawing.dtype)

    def row(indices: Array, valid: Array) -> Array:
        return jnp.prod(jnp.where(valid[:, None], falls[indices], 1), axis=0)

    products = jax.vmap(row)(pattern.indices, pattern.valid)
    coefficients = full_matmul(products, jnp.asarray(-2 / len(nodes) * at_nodes, drawing.dtype))
    _, weighting = _interpolating_queries(keys, pattern, log_weights)
    return _Factors(jnp.pad(coefficients, unused), weighting, keys)


def _factor_dense(pattern: SparsePattern, log_weights: Array, drawing: _Drawing) -> _Factors:
    """Without zeros there is nothing to separate: the logits of rank d nearest to the centred logarithms."""
    queries, keys = nearest_factors(row_centred(log_weights), drawing.used.shape[0])
    return _Factors(jnp.zeros_like(queries), queries, keys)


_CONSTRUCTIONS: dict[str, Callable[[SparsePattern, Array, _Drawing], _Factors]] = {
    "projection": functools.partial(_project, orthogonal=False),
    "orthogonal": functools.partial(_project, orthogonal=True),
    "balanced": _project_balanced,
    "ls": functools.partial(_interpolate, orthogonal=False),
    "wls": functools.partial(_interpolate, orthogonal=True),
    "max_margin": _separate,
    "learned": _learn,
    "trigonometric": _on_moment_curve,
    "dense": _factor_dense,
}


def _least_lift(factors: _Factors, pattern: SparsePattern, gap: Array, is_causal: bool, rounding: float) -> Array:
    r"""The least :math:`\tau` at which every nonzero exceeds every zero of its row by a gap; infinite if none does.

    .. math:: \tau = \max_{i,\, s \in S_i,\, j \notin S_i}
              \frac{\mathrm{gap} - (L^{(2)}_{is} - L^{(2)}_{ij})}{L^{(1)}_{is} - L^{(1)}_{ij}}
    """

    def block(args: tuple[Array, ...]) -> tuple[Array, ...]:
        rows, separating, weighting, indices, valid = args
        logits, shifts = (full_matmul(x, factors.keys.T) for x in (separating, weighting))
        off = off_rows(rows, indices, valid, pattern.num_keys, is_causal)

        def one_key(entry: tuple[Array, Array]) -> tuple[Array, Array]:
            index, valid = entry
            rise, shift = (jnp.take_along_axis(x, index[:, None], axis=1) - x for x in (logits, shifts))
            relevant = off & valid[:, None]
            needed = jnp.where(rise > 0, (gap - shift) / rise, jnp.inf)
            return jnp.max(jnp.where(relevant, needed, 0)), jnp.min(jnp.where(relevant, rise, jnp.inf))

        needed, rise = lax.map(one_key, (indices.T, valid.T))
        return jnp.max(needed), jnp.min(rise), jnp.max(jnp.abs(logits)), jnp.max(jnp.abs(shifts))

    rows = jnp.arange(pattern.num_queries, dtype=jnp.int32)
    arrays = rows, factors.separating, factors.weighting, pattern.indices, pattern.valid
    needed, rise, size, shift = lax.map(block, tuple(in_blocks(x, min(ROW_BLOCK, pattern.num_queries)) for x in arrays))
    needed, least = jnp.max(needed), jnp.maximum(jnp.min(rise), rounding)
    return needed + rounding * (needed * jnp.max(size) + jnp.max(shift)) / least
