r"""The number of channels that realise a sparse pattern: upper and lower bounds, and search.

A pattern of n tokens has at most k keys per row, with weights within a ratio gamma; m = log(1/eps1).
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from approx_attention.core import check_choice, check_count, check_counts, check_key, known_number
from approx_attention.realization.certification import RatioError
from approx_attention.realization.constructions import (
    DETERMINISTIC,
    INTERPOLATIONS,
    Search,
    draw_until_accepted,
    positive_limit,
    require_request,
)
from approx_attention.sparse import SparsePattern, check_pattern

BoundKind = Literal[
    "johnson_lindenstrauss",
    "projection_heuristic",
    "orthogonal_heuristic",
    "least_squares",
    "least_squares_exact",
    "donoho_tanner_weak",
    "donoho_tanner_strong",
    "trigonometric",
    "packing",
]
# A search grows d by this factor until it succeeds, and then bisects to this share of d. A finer search is useless: the
# smallest d of two samples differs by about 15 %.
GROWTH = 1.3
RESOLUTION = 0.01


class DimensionBound(NamedTuple):
    """A bound of the number of channels.

    Attributes:
        dim: the number of channels: sufficient (upper bounds) or necessary (lower bounds).
        is_lower: whether it is a lower bound, for all methods.
        standing: ``"proved"`` with the stated probability, ``"heuristic"`` or ``"asymptotic"``.
        vacuous: true for an upper bound of n or more, where d = n is exact, and for a lower bound of 1.
    """

    dim: int
    is_lower: bool
    standing: str
    vacuous: bool


def dimension_bound(
    num_tokens: int,
    keys_per_row: int,
    eps1: float,
    eps2: float,
    *,
    gamma: float = 1.0,
    p: float = 0.5,
    kind: BoundKind = "least_squares_exact",
    tau: float = math.inf,
    max_logit: float | None = None,
    rows_per_key: int | None = None,
) -> DimensionBound:
    r"""Bound the number of channels that realise a pattern of n tokens and k keys per row.

    With :math:`\kappa = m / \log(1 + \varepsilon_2)` (0 for k = 1, which has no ratios to preserve) upper bounds are

    .. math:: \text{johnson\_lindenstrauss: } \frac{2 \log(4 n^2 / p)}{e^2/2 - e^3/3}, \qquad
              e = \frac{\log(1 + \varepsilon_2)/2}{\sqrt k\, (\log \gamma + \log(1 + \varepsilon_2) + m)},

    .. math:: \text{projection\_heuristic: } d_G = 4 k \kappa^2 \log(n k (k - 1)), \qquad
              \text{orthogonal\_heuristic: } \frac{d_G\, n}{n + d_G},

    .. math:: \text{least\_squares\_exact: least } d \text{ with } n (n - k)\,
              P\big[t_\nu > \sqrt\nu\, s\big] \le p, \quad \nu = d - k + 1, \quad
              s = \min_i \frac{\min b_i - m}{\|b_i\|},

    .. math:: \text{least\_squares: } k - 1 + \frac{2 \log(n (n - k) / 2 p)}{\log(1 + s^2)}, \qquad
              \text{donoho\_tanner: } d = c\, k \log(n / d),\ c = 2 \text{ (weak, most rows), } 2 e \text{ (strong)},

    and 2 k for ``trigonometric``, whose logits are huge. A lower bound for all methods with logits of all pairs up to
    R is

    .. math:: \text{packing: } \frac{\log(n / k k_c)}{\log(1 + 2 R / m)}.

    In the norm :math:`\max_i |x_i \cdot y|` over all queries, keys of different rows have distance m in a ball of
    radius R. So R covers every pair of a query and a key, including those hidden from a causal head
    (``Certificate.logit_absmax``). A limit of visible logits only gives no bound: in one channel the causal identity
    has logits :math:`2 m\, 2^{j - i}`, of which the visible ones are at most 2 m. The later of two rows sees both keys,
    so with this R the bound also holds for causal heads.

    The bounds of Johnson-Lindenstrauss and of least squares hold for one sample with probability at least 1 - p.
    Donoho-Tanner is asymptotic. The heuristics agree with measurements within about 25 % for kappa of 5 or more, and
    are too small below.

    Args:
        num_tokens: the number n.
        keys_per_row: the largest number k of keys in a row.
        eps1: largest ratio of a zero to a nonzero of its row, in (0, 1).
        eps2: largest relative error of the ratio of two nonzeros; least squares preserve the ratios exactly.
        gamma: largest ratio of two weights in a row.
        p: probability of failure of one sample.
        kind: one of the names above.
        tau: logit of the nonzeros, for least squares; unlimited by default.
        max_logit: largest absolute logit R of all pairs, including hidden ones, for ``packing``.
        rows_per_key: the largest number :math:`k_c` of rows that share one key, for ``packing``; by default
            ``keys_per_row``, which is too small for patterns with global keys.

    Returns:
        The `DimensionBound`.

    Raises:
        ValueError: numbers out of range, precisions for which this kind of bound is infinite.

    Example:
        >>> from approx_attention import dimension_bound
        >>> dimension_bound(1024, 2, 0.5, 1.0, kind="johnson_lindenstrauss")
        DimensionBound(dim=2314, is_lower=False, standing='proved', vacuous=True)
        >>> dimension_bound(1024, 2, 0.5, 1.0, kind="least_squares").dim
        70

    Reference:
        :cite:p:`dasgupta2003elementary`; :cite:p:`donoho2005neighborliness`; the others are this library's.
    """
    check_choice("kind", kind, get_args(BoundKind))
    # Counts may exceed any array (``most=None``): the bounds are formulas.
    n, k = check_counts(most=None, num_tokens=num_tokens, keys_per_row=keys_per_row)
    if k > n:
        raise ValueError(f"keys_per_row must be at most num_tokens = {n}, got {k}")
    for name, value, low, high in (("eps1", eps1, 0, 1), ("p", p, 0, 1)):
        if not low < value < high:
            raise ValueError(f"{name} must lie in ({low}, {high}), got {value}")
    if not (1 <= gamma < math.inf and 0 <= eps2 < math.inf):
        raise ValueError(f"gamma must be at least 1 and eps2 at least 0, both finite, got {gamma} and {eps2}")
    gap = math.log(1 / eps1)
    if kind == "packing":
        if max_logit is None or not max_logit > 0:
            raise ValueError(f"packing needs a positive max_logit, got {max_logit}")
        matched = n / (k * (k if rows_per_key is None else check_count("rows_per_key", rows_per_key, most=None)))
        dim = max(1, _ceil(math.log(max(matched, 1)) / math.log1p(2 * max_logit / gap)))
        return DimensionBound(dim, True, "proved", dim <= 1)
    if kind in ("johnson_lindenstrauss", "projection_heuristic", "orthogonal_heuristic"):
        if k > 1 and eps2 == 0:
            raise ValueError(f"no number of channels gives eps2 = 0 by {kind}")
        dim, standing = _projection_dim(kind, n, k, gap, eps2, gamma, p)
    elif kind in ("least_squares", "least_squares_exact"):
        sharpness = _least_squares_sharpness(k, gap, gamma, tau)
        closed = k - 1 + 2 * math.log(n * (n - k) / (2 * p)) / math.log1p(sharpness**2) if n > k else k
        standing = "proved"
        dim = closed if kind == "least_squares" else _exact_least_squares_dim(n, k, sharpness, p, _ceil(closed))
    elif kind == "trigonometric":
        dim, standing = 2 * k, "proved"
    else:
        factor = 2 * k * (1 if kind == "donoho_tanner_weak" else math.e)
        dim = next(d for d in range(1, n + 1) if d >= factor * math.log(n / d))
        standing = "asymptotic"
    dim = max(1, _ceil(dim))
    return DimensionBound(dim, False, standing, dim >= n)


def _ceil(x: float) -> int:
    """The next integer, after removing rounding errors."""
    return math.ceil(x - 1e-9)


def _projection_dim(kind: str, n: int, k: int, gap: float, eps2: float, gamma: float, p: float) -> tuple[float, str]:
    """The number of channels of a random projection, and its standing."""
    slack = math.log1p(eps2)
    if kind == "johnson_lindenstrauss":
        # With one key per row there is no ratio to preserve: the error may be half of tau.
        share = 0.5 if k == 1 else slack / 2 / (math.log(gamma) + slack + gap)
        error = share / math.sqrt(k)
        return 2 * math.log(4 * n * n / p) / (error**2 / 2 - error**3 / 3), "proved"
    if k == 1:
        raise ValueError(f"{kind} is about ratios between the keys of a row, got keys_per_row = 1")
    # Union bound over the n k (k - 1) ratios, whose logits differ with variance 2 k / d. For orthogonal rows the
    # variance vanishes at d = n.
    gaussian = 4 * k * (gap / slack) ** 2 * math.log(n * k * (k - 1))
    return gaussian if kind == "projection_heuristic" else gaussian * n / (n + gaussian), "heuristic"


def _least_squares_sharpness(k: int, gap: float, gamma: float, tau: float) -> float:
    """The minimum of (min b - m) / norm(b) over rows of logits b: tau plus centred log-weights within a ratio gamma."""
    if tau == math.inf:
        return 1 / math.sqrt(k)
    spread = math.log(gamma)
    least = tau - (1 - 1 / k) * spread
    if not least > gap:
        raise ValueError(f"tau must exceed log(1/eps1) plus the spread of the weights, {gap:.3g}, got {tau}")
    return (least - gap) / math.sqrt(k * (tau**2 + spread**2 / 4))


def _exact_least_squares_dim(n: int, k: int, sharpness: float, p: float, enough: int) -> int:
    """The smallest d whose union bound of Student tails is at most p, by bisection below the closed form."""
    pairs = n * (n - k)
    if pairs == 0:
        return k
    low, high = k - 1, max(k, enough)
    while high - low > 1:
        middle = (low + high) // 2
        fails = math.log(pairs) + log_t_tail(middle - k + 1, sharpness) > math.log(p)
        low, high = (middle, high) if fails else (low, middle)
    return high


def log_t_tail(freedom: int, sharpness: float) -> float:
    r"""Compute the logarithm of a tail of Student's t, :math:`\log P[t_\nu > \sqrt\nu\, s]`, accurate for any tail.

    .. math:: P = \tfrac12 I_x(\tfrac\nu2, \tfrac12), \qquad x = \frac{1}{1 + s^2}, \qquad
              I_x(a, b) = \frac{x^a (1 - x)^b}{a\, B(a, b)}\ \cfrac{1}{1 +} \cfrac{d_1}{1 +} \cfrac{d_2}{1 +} \cdots,

    with a continued fraction of about :math:`\sqrt\nu` terms, where a series would need :math:`1 / s^2` terms.

    Args:
        freedom: the degrees of freedom, at least 1.
        sharpness: s > 0.

    Returns:
        The natural logarithm of the probability.

    Example:
        >>> round(math.exp(log_t_tail(1, 1.0)), 6)
        0.25

    Reference:
        NIST Digital Library of Mathematical Functions, equation 8.17.22.
    """
    a, x, rest = freedom / 2, 1 / (1 + sharpness**2), sharpness**2 / (1 + sharpness**2)
    if x * (a + 2.5) > a + 1:
        # Near the middle the fraction of the complement is short, and 1 minus the result does not cancel.
        return math.log((1 - math.exp(_log_incomplete_beta(0.5, a, rest, x))) / 2)
    return _log_incomplete_beta(a, 0.5, x, rest) - math.log(2)


def _log_incomplete_beta(a: float, b: float, x: float, rest: float) -> float:
    """Logarithm of the incomplete beta function I_x(a, b) at x = 1 - rest, by the modified method of Lentz.

    ``rest`` is an argument because 1 - x would be inaccurate for x near 1.
    """
    upper, lower = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    total = lower
    number, change = 1, math.inf
    while abs(change - 1) > 1e-15:
        even = number * (b - number) * x / ((a + 2 * number - 1) * (a + 2 * number))
        odd = -(a + number) * (a + b + number) * x / ((a + 2 * number) * (a + 2 * number + 1))
        change = 1.0
        for numerator in (even, odd):
            lower, upper = 1 / (1 + numerator * lower), 1 + numerator / upper
            change *= lower * upper
        total *= change
        number += 1
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    return a * math.log(x) + b * math.log(rest) - math.log(a) - log_beta + math.log(total)


def failure_bound(num_tokens: int, keys_per_row: int, d: int) -> float:
    r"""Bound the probability that one sample of ``"ls"`` fails, for equal weights and unlimited logits.

    .. math:: n (n - k)\, P\big[t_\nu > \sqrt{\nu / k}\big], \qquad \nu = d - k + 1.

    Args:
        num_tokens: the number n.
        keys_per_row: the number k.
        d: the number of channels.

    Returns:
        The bound; 1 if it is vacuous.

    Raises:
        ValueError: fewer channels than keys per row.

    Example:
        >>> round(failure_bound(64, 2, 40), 3)
        0.154
    """
    num_tokens, keys_per_row, d = check_counts(most=None, num_tokens=num_tokens, keys_per_row=keys_per_row, d=d)
    if d < keys_per_row:
        raise ValueError(f"least squares need d >= keys_per_row = {keys_per_row}, got {d}")
    tail = log_t_tail(d - keys_per_row + 1, 1 / math.sqrt(keys_per_row))
    return min(1.0, num_tokens * (num_tokens - keys_per_row) * math.exp(tail))


class MinimalDimension(NamedTuple):
    """The result of `minimal_dimension`.

    Attributes:
        dim: the quantile over trials of the number of channels.
        per_trial: the number of channels of each trial; infinite if none suffices.
    """

    dim: float
    per_trial: tuple[float, ...]


def minimal_dimension(
    pattern: SparsePattern | Callable[[PRNGKeyArray], SparsePattern],
    eps1: float,
    eps2: float,
    *,
    key: PRNGKeyArray,
    method: str = "wls",
    trials: int = 5,
    quantile: float = 0.5,
    max_dim: int | None = None,
    max_logit: float | None = None,
    is_causal: bool = False,
    num_steps: int = 600,
    ratio: RatioError = "relative",
) -> MinimalDimension:
    r"""Search the smallest number of channels for which one sample of a method realises a pattern.

    A trial makes one random sample of unlimited width, of which d channels are a prefix. It tries d on a grid that
    grows by a factor of 1.3, and bisects between the last failure and the first success, to 1 %. Success need not be
    monotone in d, so a trial is noisy. Finding the smallest d over all realisations is NP-hard; this is an upper bound.

    Args:
        pattern: a square pattern, or a function that makes the pattern of each trial from a PRNG key.
        eps1: as in `realize_sparse_pattern`.
        eps2: as in `realize_sparse_pattern`.
        key: typed PRNG key.
        method: a random method of `realize_sparse_pattern`.
        trials: the number of samples.
        quantile: the returned quantile of the results of trials.
        max_dim: the largest number of channels to try; by default 16 per token.
        max_logit: largest accepted absolute logit, as in `realize_sparse_pattern`.
        is_causal: key j is visible to query i only if j <= i.
        num_steps: gradient steps of ``"max_margin"`` and ``"learned"``.
        ratio: as in `realize_sparse_pattern`.

    Returns:
        The `MinimalDimension`.

    Raises:
        ValueError: a deterministic method, numbers out of range.
        TypeError: neither a pattern nor a function, traced numbers.

    Example:
        >>> import functools, jax
        >>> from approx_attention import SparsePattern
        >>> from approx_attention.realization import minimal_dimension
        >>> permutation = functools.partial(SparsePattern.random, num_tokens=32, keys_per_row=1)
        >>> found = minimal_dimension(permutation, 0.1, 0.1, key=jax.random.key(0), trials=3)
        >>> 6 < found.dim < 20
        True
    """
    check_key("minimal_dimension", key)
    if not callable(pattern):
        check_pattern(pattern)
    eps1, eps2 = known_number("eps1", eps1), known_number("eps2", eps2)
    max_logit = math.inf if max_logit is None else positive_limit("max_logit", max_logit)
    quantile = known_number("quantile", quantile)
    trials = check_count("trials", trials)
    check_choice("ratio", ratio, get_args(RatioError))
    if method in DETERMINISTIC:
        raise ValueError(f"minimal_dimension needs a random method, got {method!r}")
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile must lie in [0, 1], got {quantile}")
    found = []
    for trial in range(trials):
        key_pattern, key_draw = jax.random.split(jax.random.fold_in(key, trial))
        drawn = pattern if isinstance(pattern, SparsePattern) else pattern(key_pattern)
        check_pattern(drawn)
        least = drawn.keys_per_row if method in INTERPOLATIONS else 1
        most = 16 * drawn.num_queries if max_dim is None else check_count("max_dim", max_dim)
        if method == "orthogonal":  # exact if there are as many channels as keys, and worse with a few more
            most = min(most, drawn.num_keys)
        require_request(drawn, eps1, eps2, least, method, is_causal)

        def accepted(d: int, drawn: SparsePattern = drawn, key_draw: Any = key_draw) -> bool:
            # One compilation serves every d up to a power of 2.
            width = 1 << (d - 1).bit_length()
            search = Search(method, width, jnp.dtype(jnp.float32), is_causal, num_steps=num_steps, ratio=ratio)
            realized = draw_until_accepted(drawn, (eps1, eps2, max_logit), None, d, key_draw, search=search)
            return bool(realized.certificate.ok)

        found.append(_first_accepted(accepted, least, most))
    return MinimalDimension(float(np.quantile(found, quantile, method="higher")), tuple(found))


def _first_accepted(accepted: Callable[[int], bool], least: int, most: int) -> float:
    """An accepted d with a rejected one at most `RESOLUTION` below it; infinite if none up to ``most`` is accepted."""
    if least > most:
        return math.inf
    low, high = least - 1, least
    while not accepted(high):
        if high >= most:
            return math.inf
        low, high = high, min(most, max(high + 1, math.ceil(GROWTH * high)))
    while high - low > max(1, RESOLUTION * high):
        middle = (low + high) // 2
        low, high = (low, middle) if accepted(middle) else (middle, high)
    return float(high)


def one_dimensional_order(pattern: SparsePattern) -> tuple[np.ndarray, np.ndarray] | None:
    r"""Find queries and keys with one channel that separate the nonzeros of every row from its zeros, if they exist.

    Logits :math:`x_i y_j` order the keys on a line, with the support of each row at one of its ends. So for each row
    either the support or its complement is chosen such that all chosen sets form a chain. Two rows can make the same
    choice if one support contains the other, and different choices if the supports are disjoint or cover all keys.
    This is a satisfiability problem whose clauses are equations modulo 2, solved by colouring in O(T^2 S) time. Ratios
    within supports are ignored. For more than one channel the decision is NP-hard. Every row sees every key: a causal
    head has fewer pairs to separate, and one channel may suffice even without an order.

    Args:
        pattern: the pattern.

    Returns:
        Queries ``[T]``, 1 or -1, and integer keys ``[S]``, or ``None`` if no order exists.

    Raises:
        TypeError: not a pattern.

    Example:
        >>> from approx_attention import SparsePattern
        >>> queries, keys = one_dimensional_order(SparsePattern.from_indices([[0], [0, 1], [2]], num_keys=3))
        >>> (queries[:, None] * keys[None, :]).tolist()
        [[3, 2, 0], [3, 2, 0], [-3, -2, 0]]

    Reference:
        :cite:p:`likhosherstov2021expressive`, algorithm 1, decides this case; the derivation is this library's.
    """
    check_pattern(pattern)
    valid = np.asarray(pattern.valid)
    supports = np.zeros((pattern.num_queries, pattern.num_keys), bool)
    supports[np.nonzero(valid)[0], np.asarray(pattern.indices)[valid]] = True
    sizes = supports.sum(axis=1)
    shared = supports.astype(np.float64) @ supports.T.astype(np.float64)
    alike = shared == np.minimum(sizes[:, None], sizes[None, :])
    unlike = (shared == 0) | (sizes[:, None] + sizes[None, :] - shared == pattern.num_keys)
    if not (alike | unlike).all():
        return None
    # Two rows that can make the same and different choices do not constrain each other: no edge in the graph.
    tied = alike != unlike
    queries = np.zeros(pattern.num_queries, int)
    for start in range(pattern.num_queries):
        if queries[start]:
            continue
        queries[start], reached = 1, [start]
        while reached:
            row = reached.pop()
            wanted = np.where(alike[row], queries[row], -queries[row])
            fresh = tied[row] & (queries == 0)
            queries[fresh] = wanted[fresh]
            reached.extend(np.flatnonzero(fresh))
    wanted = np.where(alike, 1, -1) * queries[:, None]
    if (tied & (wanted != queries[None, :])).any():
        return None
    chosen = supports == (queries == 1)[:, None]
    return queries, chosen.sum(axis=0)


def realizable_in_one_dimension(pattern: SparsePattern) -> bool:
    """Decide whether one channel separates the nonzeros of every row from its zeros (`one_dimensional_order`).

    This assumes that every row sees every key; a causal head has fewer pairs to separate.

    Args:
        pattern: the pattern.

    Returns:
        The decision.

    Raises:
        TypeError: not a pattern.

    Example:
        >>> from approx_attention import SparsePattern
        >>> [realizable_in_one_dimension(SparsePattern.banded(n, [0])) for n in (2, 3)]
        [True, False]
    """
    return one_dimensional_order(pattern) is not None
