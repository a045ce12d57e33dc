"""Landmarks that represent nearby tokens: k-means, farthest points, pivoted Cholesky, and Nystrom weights."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import Array, lax

from approx_attention import kernels
from approx_attention.core import (
    HIDDEN,
    LEAST_TILE,
    WeightedKV,
    in_float32,
    kept,
    map_rows,
    require_scaled_space,
    squared_norm,
)

# exp of this is finite in float32, also after multiplication by a weight (the largest number is 3.4e38).
LARGEST_EXPONENT = math.log(1e30)

# Number of rounds in which the initial centres of k-means are sampled. k-means++ has one sequential round per centre.
# Candidates of one round do not depend on each other; twice as many candidates compensate for this.
SEEDING_ROUNDS = 8


def nearest(x: Array, centres: Array, present: Array) -> Array:
    r"""The nearest of the present centres for each row, :math:`\arg\max_c\, x \cdot c - \|c\|^2 / 2`.

    Args:
        x: rows ``[n, D]``.
        centres: ``[M, D]``.
        present: the mask of centres that count, ``[M]``.

    Returns:
        The index of a centre for each row, int32 ``[n]``, without gradient.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention.coresets import nearest
        >>> present = jnp.array([True, True, False])
        >>> nearest(jnp.array([[0.0], [4.0]]), jnp.array([[1.0], [3.0], [4.0]]), present).tolist()
        [0, 1]
    """
    bias = jnp.where(present, -squared_norm(centres)[:, 0] / 2, HIDDEN)[None, :]
    numbers = jnp.arange(centres.shape[0], dtype=jnp.int32)[None, :]

    def of_block(x: Array) -> Array:
        # At the user's precision: if rounding decides between two centres of a key, both give small errors.
        likeness = x @ centres.T + bias
        # Twice as fast on a CPU as an argmax. A row with NaN equals no maximum: it joins the first centre, whose output
        # becomes NaN.
        best = jnp.max(likeness, axis=1, keepdims=True)
        return jnp.maximum(jnp.max(jnp.where(likeness == best, numbers, -1), axis=1), 0)

    label = map_rows(of_block, lax.stop_gradient(x), max(1, LEAST_TILE // centres.shape[0]))
    # Rounding decides ties: a backward pass that recomputed labels might find others.
    return kept(label)


def merged(tokens: WeightedKV, label: Array, num_clusters: int) -> WeightedKV:
    """Merge each cluster into one token: the mean key of its members, with their masses and values summed.

    Args:
        tokens: S tokens in scaled space.
        label: the cluster of each token, integers ``[S]``.
        num_clusters: the number M of clusters.

    Returns:
        A `WeightedKV` of M tokens; an empty cluster has mass 0.

    Raises:
        ValueError: tokens that carry a scale.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention import WeightedKV
        >>> from approx_attention.coresets import merged
        >>> k = jnp.array([[0.0], [2.0], [5.0]])
        >>> pair = merged(WeightedKV.of_tokens(k, k), jnp.array([0, 0, 1]), 2)
        >>> pair.k[:, 0].tolist(), pair.mass.tolist()
        ([1.0, 5.0], [2.0, 1.0])
    """
    require_scaled_space("an algorithm", tokens)
    # The key of an absent token may hold anything.
    weighted = jnp.where(tokens.mass[:, None] != 0, tokens.k, 0) * tokens.mass[:, None]
    key_sum, value_sum, mass = (
        jax.ops.segment_sum(x, label, num_clusters) for x in (weighted, tokens.value_sum, tokens.mass)
    )
    return WeightedKV(key_sum / jnp.where(mass == 0, 1, mass)[:, None], value_sum, mass)


def k_means(tokens: WeightedKV, start: Array, steps: int) -> WeightedKV:
    """Run Lloyd's iteration, and merge its clusters.

    A cluster that loses all its members stays empty. If every distinct key is a start, each distinct key is a cluster,
    and the merge is exact. Gradients flow through the last merge only.

    Args:
        tokens: S tokens with non-negative masses.
        start: places of the tokens that are the first centres, int ``[M]``.
        steps: the number of assignments of tokens to centres, at least 1.

    Returns:
        The M merged tokens.
    """
    num_clusters = start.shape[0]
    centres, present = lax.stop_gradient(tokens.k)[start], tokens.mass[start] > 0
    frozen = lax.stop_gradient(tokens)

    # Centres are a choice without a derivative; gradients flow only through the last merge.
    def step(state: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        clusters = merged(frozen, nearest(frozen.k, *state), num_clusters)
        return (clusters.k, clusters.mass > 0), None

    (centres, present), _ = lax.scan(step, (centres, present), length=steps - 1)
    return merged(tokens, nearest(tokens.k, centres, present), num_clusters)


def random_places(mass: Array, count: int, key: Array) -> Array:
    """A uniform sample of places with mass, without replacement; then places without mass.

    Args:
        mass: ``[S]``; a place with mass 0 is absent.
        count: the number of places, at most S.
        key: typed PRNG key.

    Returns:
        Places, int32 ``[count]``.
    """
    priority = jax.random.uniform(key, mass.shape, mass.dtype)
    return lax.top_k(jnp.where(mass > 0, priority, -1), count)[1]


@in_float32()  # a distance is a difference of squares, and 0 for equal keys
def spread_places(tokens: WeightedKV, count: int, key: Array, power: float = 2.0) -> Array:
    """Sample places far from each other: of twice as many candidates, those with the largest merge costs.

    Candidates are sampled as in the seeding of k-means++, but in a few rounds, with odds proportional to mass and to a
    power of the distance from the candidates of earlier rounds. Power 2 is that of k-means++. Large powers approach
    the greedy choice of the farthest token (``farthest_places``), which takes one step per place.

    Args:
        tokens: S tokens with non-negative masses; absent ones at the end do not change the sample.
        count: the number of places, at most S.
        key: typed PRNG key.
        power: the power of the distance.

    Returns:
        Places, int32 ``[count]``, without gradient.
    """
    num_tokens = tokens.mass.shape[0]
    candidates = min(2 * count, num_tokens)
    rounds = min(SEEDING_ROUNDS, candidates)
    share = -(-candidates // rounds)
    k, mass = lax.stop_gradient(tokens.k), tokens.mass
    # Tokens without mass at the end are padding; rounds, shares and noise must not depend on it.
    length = jnp.max(jnp.where(mass > 0, jnp.arange(1, num_tokens + 1, dtype=jnp.int32), 1))
    least_candidates = jnp.minimum(2 * count, length)
    least_rounds = jnp.minimum(rounds, least_candidates)
    least_share = -(-least_candidates // least_rounds)
    size = squared_norm(k)[:, 0]
    # A squared distance is a difference of squares: below their rounding error it is set to 0, as for an equal key.
    least = 16 * jnp.finfo(k.dtype).eps * jnp.max(size)
    noise = jax.random.gumbel(key, (rounds * num_tokens,), k.dtype)

    def step(distance: Array, number: Array) -> tuple[Array, tuple[Array, Array]]:
        own = lax.dynamic_slice_in_dim(noise, number * length, num_tokens)
        # The largest log-odds + Gumbel are a sample without replacement, of static size.
        odds = power / 2 * jnp.log(jnp.maximum(distance, jnp.finfo(k.dtype).tiny)) + tokens.log_mass + own
        place = lax.top_k(jnp.where((mass > 0) & (distance > 0), odds, HIDDEN), share)[1]
        wanted = (number < least_rounds) & (jnp.arange(share, dtype=jnp.int32) < least_share)
        centres = k[place]
        bias = jnp.where(wanted, -squared_norm(centres)[:, 0] / 2, HIDDEN)[None, :]

        def likeness(x: Array) -> Array:
            return jnp.max(x @ centres.T + bias, axis=1)

        left = size - 2 * map_rows(likeness, k, max(1, LEAST_TILE // share))
        distance = jnp.minimum(distance, jnp.where(left > least, left, 0))
        return distance.at[jnp.where(wanted, place, num_tokens)].set(0, mode="drop"), (place, wanted)

    _, (place, wanted) = lax.scan(step, jnp.ones_like(size), jnp.arange(rounds, dtype=jnp.int32))
    place, wanted = place.reshape(-1), wanted.reshape(-1)
    found = WeightedKV(k[place], tokens.value_sum[place], jnp.where(wanted, mass[place], 0))
    # In the order of tokens, not of candidates, whose number depends on padding.
    order = jax.random.uniform(jax.random.fold_in(key, 1), mass.shape, k.dtype)
    return place[lasting_in_order(found, count, order[place])]


@in_float32()  # a distance is a difference of squares
def farthest_places(k: Array, present: Array, count: int) -> Array:
    """Greedy k-center: places of keys that are each the farthest from all earlier ones, the first from 0.

    Args:
        k: keys ``[S, D]``.
        present: the mask of keys that count ``[S]``; the others come last.
        count: the number of places, at most S.

    Returns:
        Places, int32 ``[count]``, without gradient.

    Example:
        >>> import jax.numpy as jnp
        >>> farthest_places(jnp.array([[1.0], [4.0], [-3.0], [3.0]]), jnp.ones(4, bool), 3).tolist()
        [1, 2, 0]
    """
    k = lax.stop_gradient(k)
    size = squared_norm(k)[:, 0]

    def step(state: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], Array]:
        distance, place = state
        left = jnp.maximum(size - 2 * (k @ k[place]) + size[place], 0)
        # -1 for chosen and absent places is below every distance, so that they come last.
        distance = jnp.minimum(distance, left).at[place].set(-1)
        return (distance, jnp.argmax(distance)), place

    start = jnp.where(present, jnp.inf, -1).astype(k.dtype)
    first = jnp.argmax(jnp.where(present, size, -1))
    return lax.scan(step, (start, first), length=count)[1].astype(jnp.int32)


@in_float32()  # a distance is a difference of squares, and 0 for equal keys
def lasting_in_order(tokens: WeightedKV, count: int, order: Array) -> Array:
    r"""Choose places by leaving out the tokens with the smallest merge costs, in one step.

    Token i would be merged into the nearest token j of larger mass, at Ward's cost

    .. math:: \frac{m_i m_j}{m_i + m_j}\, \|k_i - k_j\|^2 .

    The order makes the merges a forest, so that one of two close tokens is kept. All pairs are compared by one matrix
    product, without sequential steps.

    Args:
        tokens: n tokens with non-negative masses.
        count: the number of places, at most n.
        order: distinct numbers ``[n]`` that break ties of mass. They should be random: with the order of a smooth
            sequence, runs of neighbours would be kept.

    Returns:
        Places, int32 ``[count]``, the largest cost first; absent tokens come last.
    """
    k, mass = lax.stop_gradient(tokens.k), tokens.mass
    size = squared_norm(k)[:, 0]
    # A difference of squares: below their rounding error it is set to 0, as for an equal key.
    least = 16 * jnp.finfo(k.dtype).eps * jnp.max(size)

    def least_cost(rows: tuple[Array, Array, Array, Array]) -> Array:
        k_i, mass_i, size_i, order_i = (x[:, None] if x.ndim == 1 else x for x in rows)
        distance = size_i + size[None, :] - 2 * k_i @ k.T
        distance = jnp.where(distance > least, distance, 0)
        larger = (mass[None, :] > mass_i) | ((mass[None, :] == mass_i) & (order[None, :] > order_i))
        weight = mass_i * mass[None, :] / jnp.maximum(mass_i + mass[None, :], 1)
        return jnp.min(jnp.where(larger, weight * distance, jnp.inf), axis=1)

    cost = map_rows(least_cost, (k, mass, size, order), max(1, LEAST_TILE // mass.shape[0]))
    # Places without mass come last; the token of largest mass, which merges into none, comes first.
    return lax.top_k(jnp.where(mass > 0, cost, -1), count)[1]


def lasting_places(tokens: WeightedKV, count: int, key: Array) -> Array:
    """`lasting_in_order` in a random order."""
    return lasting_in_order(tokens, count, jax.random.uniform(key, tokens.mass.shape, tokens.k.dtype))


@in_float32()  # residuals are differences of nearly equal numbers
def cholesky_places(tokens: WeightedKV, exponent: Array, count: int, key: Array) -> Array:
    r"""Randomly pivoted Cholesky: pivots sampled by the residual of each key after earlier pivots.

    The kernel is :math:`g(x, y) = e^{s (x \cdot y - \|x\|^2/2 - \|y\|^2/2)}`. The probability of key j as the next
    pivot is proportional to its residual, to :math:`e^{s \|k_j\|^2}` and to its mass.

    Args:
        tokens: S tokens with non-negative masses.
        exponent: s, one number.
        count: the number of pivots, at most S.
        key: typed PRNG key.

    Returns:
        Places, int32 ``[count]``, without gradient.

    Reference:
        :cite:p:`wildcat2026`.
    """
    x = lax.stop_gradient(tokens.k * jnp.sqrt(exponent))
    half = squared_norm(x)[:, 0] / 2
    # The kernel is normalised to a unit diagonal, which does not overflow; the true diagonal e^{s |k|^2} enters the
    # odds as a logarithm.
    prior = 2 * half + tokens.log_mass
    noise = jax.random.split(key, count)

    def step(state: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], Array]:
        factor, residual = state
        odds = jnp.where((tokens.mass > 0) & (residual > 0), jnp.log(jnp.maximum(residual, 1e-37)) + prior, -jnp.inf)
        place = jnp.argmax(odds + jax.random.gumbel(noise[i], odds.shape, odds.dtype))
        # One column of the kernel minus its projection on earlier pivots; the full kernel matrix is never stored.
        column = jnp.exp(x @ x[place] - half - half[place]) - factor[:, place] @ factor
        pivot = residual[place]
        row = jnp.where(pivot > 0, column / jnp.sqrt(jnp.where(pivot > 0, pivot, 1)), 0)
        # Rounding may make a residual negative, and that of a pivot positive.
        residual = jnp.maximum(residual - row**2, 0).at[place].set(0)
        return (factor.at[i].set(row), residual), place

    start = jnp.zeros((count, x.shape[0]), x.dtype), jnp.ones_like(half)
    return lax.scan(step, start, jnp.arange(count))[1].astype(jnp.int32)


@jax.custom_jvp
def _finite_cholesky(kernel: Array) -> Array:
    """The Cholesky factor, or the identity if it does not exist, which keeps gradients finite."""
    factor = lax.linalg.cholesky(kernel, symmetrize_input=False)
    return jnp.where(jnp.all(jnp.isfinite(factor)), factor, jnp.eye(kernel.shape[0], dtype=kernel.dtype))


@_finite_cholesky.defjvp
@in_float32()
def _finite_cholesky_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    r""":math:`dL = L\, \Phi(L^{-1}\, dK\, L^{-T})`, with :math:`\Phi` the lower triangle with half of the diagonal.

    JAX's own rule would multiply by the factor before its replacement, which may be NaN.
    """
    factor, change = _finite_cholesky(*primals), tangents[0]
    half = jax.scipy.linalg.solve_triangular(factor, change, lower=True)
    both = jax.scipy.linalg.solve_triangular(factor, half.T, lower=True)
    return factor, factor @ (jnp.tril(both) - jnp.diag(jnp.diagonal(both)) / 2)


def with_nystrom_weights(tokens: WeightedKV, landmarks: WeightedKV, exponent: Array, ridge: float) -> WeightedKV:
    r"""Give landmarks the signed masses and values that solve a kernel ridge regression.

    With :math:`g(x, y) = e^{s (x \cdot y - \|x\|^2/2 - \|y\|^2/2)}`, landmarks c and tokens x of masses m,

    .. math:: \beta = D_c^{-1} (g_{cc} + \lambda I)^{-1} g_{cx} D_x\, [m v, m], \qquad D = e^{s \|\cdot\|^2 / 2}.

    :math:`g_{cx} D_x [m v, m]` is the numerator and the normaliser of softmax attention of the landmarks over the
    tokens. It is linear in the masses of the tokens, which may be signed too.

    Args:
        tokens: S tokens x.
        landmarks: M tokens c, of which only keys and presence count.
        exponent: s, one number.
        ridge: :math:`\lambda`, positive; the diagonal of g is 1.

    Returns:
        Tokens with the keys of the landmarks, signed masses, and the range of the values.

    Reference:
        :cite:p:`wildcat2026`, for Nystrom weights.
    """
    c, present = landmarks.k, landmarks.mass != 0
    half = exponent * squared_norm(c)[:, 0] / 2
    # Values minus their mean: the ridge shrinks weights, and so pulls outputs to the mean instead of 0.
    middle = jnp.sum(tokens.value_sum, axis=0) / jnp.where(jnp.sum(tokens.mass) > 0, jnp.sum(tokens.mass), 1)
    values, ones = tokens.values - middle[None, :], jnp.ones_like(tokens.mass)[:, None]
    if tokens.value_range is not None:
        # The sign of a mass multiplies the values of numerator and normaliser.
        values, ones = (x * jnp.sign(tokens.mass)[:, None] for x in (values, ones))
    size = dataclasses.replace(tokens, mass=jnp.abs(tokens.mass))
    state = kernels.state(exponent * c, tokens.k, jnp.concatenate([values, ones], axis=1), size.log_mass)
    log_size = jnp.where(present, state.lse - half, -jnp.inf)
    # The largest sum is scaled to 1 before the solve, which is linear, so that no exponential overflows; the shift is
    # undone in the weights.
    shift = lax.stop_gradient(jnp.max(log_size))
    shift = jnp.where(jnp.isfinite(shift), shift, 0)
    sums = jnp.exp(log_size - shift)[:, None] * state.out

    both = present[:, None] & present[None, :]
    # A double where: the exponential of an absent landmark may overflow, and 0 times its gradient would be NaN.
    with in_float32():  # the solve amplifies the rounding of the kernel by its condition number
        logits = exponent * (c @ c.T) - half[:, None] - half[None, :]
    kernel = jnp.where(both, jnp.exp(jnp.where(both, logits, 0)), 0)
    # 1 for an absent landmark, so that the matrix stays positive definite; the ridge bounds its condition number.
    diagonal = jnp.where(present, 0, 1) + ridge
    kernel = kernel + jnp.diag(diagonal.astype(kernel.dtype))
    weights = jax.scipy.linalg.cho_solve((_finite_cholesky(kernel), True), sums)
    # Weights beyond the cap lose to the merge; without the cap their gradients would not be finite.
    weights = weights * jnp.exp(jnp.minimum(shift - half, LARGEST_EXPONENT))[:, None]
    weights = jnp.where(present[:, None], weights, 0)
    mass = weights[:, -1]
    return WeightedKV(c, weights[:, :-1] + mass[:, None] * middle[None, :], mass, tokens.values_from_to)


def merged_around(tokens: WeightedKV, place: Array) -> WeightedKV:
    """Merge every token into the nearest token at the given places."""
    return merged(tokens, nearest(tokens.k, lax.stop_gradient(tokens.k)[place], tokens.mass[place] > 0), place.shape[0])
