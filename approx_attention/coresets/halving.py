r"""Discrepancy halving: keep half of the tokens with doubled mass, so that sums of kernel features change little.

Tokens are paired, and one token of each pair gets the mass of both. A sign rule chooses which one, so that the
differences cancel. One kernel serves numerator and normaliser, with values extended by one constant entry:

.. math:: \kappa((k, v), (k', v')) = e^{s (k \cdot k' - R^2)} (v \cdot v' + c), \qquad R^2 = \max_j \|k_j\|^2.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from approx_attention.core import LEAST_TILE, WeightedKV, pad_rows, squared_norm

SignRule = Literal["search", "greedy", "walk", "thinning", "compress"]
# c over the mean squared value norm: the weight of the normaliser relative to the numerator. From 0 to 1 errors agree
# within 25 %, at 4 they are 20 to 50 % larger.
NORMALIZER_SHARE = 0.1
# Number of rounds of the sign search. Each costs one matrix-vector product; the share of pairs that may flip falls to
# 1 % in the last round.
SEARCH_ROUNDS = 40
# Cells of the ordering tree are split into 4 at each level: half as many sorts as for a binary tree.
BRANCHES = 4


class Points(NamedTuple):
    r"""Tokens in the kernel's space.

    Attributes:
        x: :math:`\sqrt s\, k`, ``[n, D]``.
        values: values in their unit, and the root of the share of the normaliser, ``[n, Dv + 1]``.
        mass: masses ``[n]``; a point without mass is absent.
        place: the place of each point among the tokens, int32 ``[n]``.
    """

    x: Array
    values: Array
    mass: Array
    place: Array


def value_unit(tokens: WeightedKV) -> Array:
    """The root mean square norm of the values, without gradient; 1 if all are 0."""
    mass, values = lax.stop_gradient((tokens.mass, tokens.values))
    total = jnp.sum(mass)
    square = jnp.where(mass > 0, squared_norm(values)[:, 0], 0)
    mean_square = mass @ square / jnp.where(total > 0, total, 1)
    return jnp.sqrt(jnp.where(mean_square > 0, mean_square, 1))


def kernel_points(tokens: WeightedKV, exponent: Array, unit: Array | None = None) -> Points:
    r"""Tokens as points of the kernel with exponent s.

    Values are divided by the unit, and :math:`\sqrt c` is appended. Points have no gradient: they are only used to
    choose tokens and masses.

    Args:
        tokens: n tokens with non-negative masses.
        exponent: s, one number.
        unit: the unit of the values, by default their ``value_unit``.

    Returns:
        The ``Points``, in the order of the tokens.
    """
    tokens = lax.stop_gradient(tokens)
    unit = value_unit(tokens) if unit is None else unit
    values = jnp.where(tokens.mass[:, None] > 0, tokens.values, 0) / unit
    values = jnp.concatenate([values, jnp.full_like(tokens.k[:, :1], NORMALIZER_SHARE**0.5)], axis=1)
    x = tokens.k * jnp.sqrt(lax.stop_gradient(exponent))
    return Points(x, values, tokens.mass, jnp.arange(x.shape[0], dtype=jnp.int32))


def halve(
    points: Points,
    coin: Array,
    *,
    rule: SignRule,
    block: int,
    failure: float = 0.5,
    interleaved: bool = True,
    side: Array | bool = False,
) -> Points:
    """Halve an even number of points: keep row 2i or 2i + 1 of each pair, with the mass of both.

    Args:
        points: the points, with neighbours next to each other.
        coin: uniform noise ``[n / 2]``.
        rule: the rule of the signs, see `SIGN_RULES`.
        block: number of points whose signs are chosen together; the cost grows with it, the error falls.
        failure: the probability with which the guarantee of a random rule may fail.
        interleaved: whether every block takes pairs from the whole order, instead of consecutive ones.
        side: whether to invert all choices; with a fair coin both points of a pair are equally likely.
    """
    num_pairs = points.mass.shape[0] // 2
    blocks = -(-num_pairs // max(1, block // 2))
    pairs = -(-num_pairs // blocks)
    most = max(1, LEAST_TILE // (2 * pairs) ** 2)
    # The largest exponential is scaled to 1; sign rules compare overlaps with norms, so a common factor has no effect.
    shift = jnp.max(squared_norm(points.x))

    def by_block(x: Array) -> Array:
        x = pad_rows(x, blocks * pairs - num_pairs)
        if interleaved:
            return x.reshape(pairs, blocks, *x.shape[1:]).swapaxes(0, 1)
        return x.reshape(blocks, pairs, *x.shape[1:])

    def choose(args: tuple[Points, Array]) -> Array:
        both, coin = args
        x, values = (jnp.concatenate([x[:, 0], x[:, 1]]) for x in (both.x, both.values))
        kernel = jnp.exp(x @ x.T - shift) * (values @ values.T)
        first, second = kernel[:pairs], kernel[pairs:]
        gram = first[:, :pairs] - first[:, pairs:] - second[:, :pairs] + second[:, pairs:]
        return SIGN_RULES[rule](gram, both.mass[:, 0], both.mass[:, 1], coin, failure)

    both = jax.tree.map(lambda x: by_block(x.reshape(num_pairs, 2, *x.shape[1:])), points)
    # Blocks are grouped to fill a tile, which bounds memory. The number of groups divides the number of blocks, so that
    # no block is padding.
    turns = next(turns for turns in range(1, blocks + 1) if blocks % turns == 0 and blocks // turns <= most)
    args = jax.tree.map(lambda x: x.reshape(turns, blocks // turns, *x.shape[1:]), (both, by_block(coin)))
    if turns == 1:
        keep_first = jax.vmap(choose)(jax.tree.map(lambda x: x[0], args))
    else:
        keep_first = lax.map(jax.vmap(choose), args).reshape(blocks, pairs)
    keep_first = keep_first ^ side
    # An absent point is never kept instead of a token.
    keep_first = jnp.where(both.mass[..., 1] == 0, True, jnp.where(both.mass[..., 0] == 0, False, keep_first))

    def chosen(x: Array) -> Array:
        keep = keep_first.reshape(keep_first.shape + (1,) * (x.ndim - 3))
        x = jnp.where(keep, x[:, :, 0], x[:, :, 1])
        return (x.swapaxes(0, 1) if interleaved else x).reshape(blocks * pairs, *x.shape[2:])[:num_pairs]

    mass = jnp.sum(points.mass.reshape(num_pairs, 2), axis=1)
    return jax.tree.map(chosen, both)._replace(mass=mass)


# Sign rules: (gram [p, p], mass of a [p], mass of b [p], uniform noise [p], failure) -> keep a. Keeping a adds mass_b
# times the difference of the pair's features to the discrepancy, keeping b subtracts mass_a times the difference.


def _signs_in_turn(
    decide: Callable[..., Any], state: Any, gram: Array, mass_a: Array, mass_b: Array, coin: Array
) -> Array:
    """Sequential signs of pairs: ``decide(h, norm, masses, coin, state) -> keep a, state``, with overlap h."""

    def step(carry: tuple[Array, Any], i: Array) -> tuple[tuple[Array, Any], Array]:
        overlap, state = carry
        keep, state = decide(overlap[i], gram[i, i], (mass_a[i], mass_b[i]), coin[i], state)
        # Without b there is no choice, and keeping a changes nothing.
        keep = jnp.where(mass_b[i] == 0, True, keep)
        return (overlap + jnp.where(keep, mass_b[i], -mass_a[i]) * gram[i], state), keep

    return lax.scan(step, (jnp.zeros_like(mass_a), state), jnp.arange(mass_a.shape[0], dtype=jnp.int32))[1]


def _share(masses: tuple[Array, Array]) -> Array:
    """The probability of keeping the first point that preserves both masses on average."""
    total = masses[0] + masses[1]
    return masses[0] / jnp.where(total > 0, total, 1)


def _typical_mass(mass_a: Array, mass_b: Array) -> Array:
    """The unit of mass for rules published for unit masses: the largest mass."""
    greatest = jnp.maximum(jnp.max(mass_a), jnp.max(mass_b))
    return jnp.where(greatest > 0, greatest, 1)


def _greedy_signs(gram: Array, mass_a: Array, mass_b: Array, coin: Array, failure: float) -> Array:
    r"""Greedy rule, the sign that leaves the smaller discrepancy: keep a where :math:`h < (m_a - m_b) \|d\|^2 / 2`."""

    def decide(h: Array, norm: Array, masses: Any, coin: Array, state: Any) -> tuple[Array, Any]:
        excess = h - (masses[0] - masses[1]) * norm / 2
        return jnp.where(excess == 0, coin < 0.5, excess < 0), state

    return _signs_in_turn(decide, (), gram, mass_a, mass_b, coin)


def _walk_signs(gram: Array, mass_a: Array, mass_b: Array, coin: Array, failure: float) -> Array:
    r"""Self-balancing walk: keep a with probability :math:`\frac12 - h/(2 c R^2)`, :math:`c = 30 \log(n/\delta)`."""
    bound = 30 * math.log(2 * gram.shape[0] / failure) * jnp.max(jnp.diagonal(gram)) * _typical_mass(mass_a, mass_b)

    def decide(h: Array, norm: Array, masses: Any, coin: Array, state: Any) -> tuple[Array, Any]:
        return coin < _share(masses) - h / jnp.where(bound > 0, 2 * bound, 1), state

    return _signs_in_turn(decide, (), gram, mass_a, mass_b, coin)


def _thinning_signs(gram: Array, mass_a: Array, mass_b: Array, coin: Array, failure: float) -> Array:
    r"""Kernel thinning: keep a with probability :math:`(1 - h/a)/2`.

    :math:`a = \max(b \sigma \sqrt{2 \log(2/\delta)}, b^2)`, :math:`b^2 = \|d\|^2`, and :math:`\sigma^2` is the variance
    proxy of the walk so far.
    """
    log_odds = 2 * math.log(2 * gram.shape[0] / failure)
    mass = _typical_mass(mass_a, mass_b)

    def decide(h: Array, norm: Array, masses: Any, coin: Array, variance: Array) -> tuple[Array, Any]:
        threshold = jnp.maximum(jnp.sqrt(norm * variance * log_odds), norm)
        safe = jnp.where(threshold > 0, threshold, 1)
        grown = norm * jnp.maximum(0, 1 + (norm - 2 * threshold) * variance / safe**2)
        return coin < _share(masses) - h / (2 * mass * safe), variance + grown

    return _signs_in_turn(decide, jnp.zeros((), gram.dtype), gram, mass_a, mass_b, coin)


def _compress_signs(gram: Array, mass_a: Array, mass_b: Array, coin: Array, failure: float) -> Array:
    r"""Thinformer: keep a where :math:`h < u (\frac12 + \log(4p/\delta)) \|d_i\| \max_{j \le i} \|d_j\|`, u in ±1."""
    pairs = gram.shape[0]
    factor = (0.5 + math.log(4 * pairs / failure)) * _typical_mass(mass_a, mass_b)

    def decide(h: Array, norm: Array, masses: Any, coin: Array, largest: Array) -> tuple[Array, Any]:
        largest = jnp.maximum(largest, norm)
        return h < 2 * (_share(masses) - coin) * factor * jnp.sqrt(norm * largest), largest

    return _signs_in_turn(decide, jnp.zeros((), gram.dtype), gram, mass_a, mass_b, coin)


def _search_signs(gram: Array, mass_a: Array, mass_b: Array, coin: Array, failure: float) -> Array:
    r"""Parallel sign search: start from random signs, and flip some whose flip lowers the discrepancy.

    With moves :math:`t` (:math:`m_b` where a is kept, else :math:`-m_a`) the discrepancy is :math:`t^T G t`, and a flip
    by :math:`\delta_i = \mp(m_a + m_b)` changes it by :math:`2 \delta_i (G t)_i + \delta_i^2 G_{ii}`.
    """
    norm = jnp.diagonal(gram)
    free = mass_b != 0

    def step(round_: Array, keep: Array) -> Array:
        overlap = gram @ jnp.where(keep, mass_b, -mass_a)
        flip = jnp.where(keep, -1, 1) * (mass_a + mass_b)
        lowers = 2 * flip * overlap + flip**2 * norm < 0
        share = 0.25 * (1 - round_.astype(gram.dtype) / SEARCH_ROUNDS) + 0.01
        # Only a share flips, smaller in later rounds: if all flipped at once they would overshoot and oscillate. One
        # uniform number times odd constants, modulo 1, replaces new noise in every round, and is cheaper.
        tried = coin * (1009 + 577 * round_.astype(gram.dtype)) % 1 < share
        return keep ^ (lowers & tried & free)

    return lax.fori_loop(jnp.int32(0), jnp.int32(SEARCH_ROUNDS), step, (coin < 0.5) | ~free)


def balancing_walk(gram: Array, gamma: float, coin: Array) -> Array:
    r"""Signs of single tokens: + with probability :math:`\frac12 - \gamma\, h / R^2`, with h the overlap so far.

    Args:
        gram: kernel of the tokens ``[n, n]``; :math:`R^2` is the largest number on its diagonal.
        gamma: :math:`\gamma`.
        coin: uniform noise ``[n]``.
    """
    ones = jnp.ones_like(gram[0])
    largest = jnp.max(jnp.diagonal(gram))

    def decide(h: Array, norm: Array, masses: Any, coin: Array, state: Any) -> tuple[Array, Any]:
        return coin < 0.5 - gamma * h / jnp.where(largest > 0, largest, 1), state

    return _signs_in_turn(decide, (), gram, ones, ones, coin)


SIGN_RULES: dict[str, Callable[[Array, Array, Array, Array, float], Array]] = {
    "search": _search_signs,
    "greedy": _greedy_signs,
    "walk": _walk_signs,
    "thinning": _thinning_signs,
    "compress": _compress_signs,
}


def tree_order(points: Points, group: int) -> Array:
    """An order with neighbours next to each other and absent points last: the leaves of a tree of splits.

    The tree splits along the principal axes of keys and values in turn, into `BRANCHES` equal cells at a time. Cells
    consist of whole groups of ``group`` points, a power of two, while they are larger than one.
    """
    num_points = points.mass.shape[0]
    present = points.mass > 0
    scale = jnp.sqrt(jnp.maximum(jnp.max(squared_norm(points.x)), jnp.finfo(points.x.dtype).tiny))
    features = jnp.concatenate([points.x / scale, points.values[:, :-1]], axis=1)
    # NaN cannot be ordered, and would spread to all points through the covariance below.
    features = jnp.where(jnp.isfinite(features), features, 0)
    total = jnp.sum(points.mass)
    weight = points.mass / jnp.where(total > 0, total, 1)
    centred = jnp.where(present[:, None], features - (weight @ features)[None, :], 0)
    axes = jnp.linalg.eigh((centred * weight[:, None]).T @ centred)[1][:, ::-1]
    # Slightly tilted axes separate points that agree along one axis, so that only equal points are ties.
    places = jnp.arange(axes.shape[0], dtype=axes.dtype)
    along = centred @ (axes + 1e-3 * jnp.cos(7 * places[:, None] * places[None, :] + places[:, None]))
    along = jnp.where(present[:, None], along, jnp.inf)
    order = jnp.arange(num_points, dtype=jnp.int32)
    cell, level = num_points, 0
    while level == 0 or cell > 1:
        # Rank r is in cell r // cell of the previous level.
        cells = jnp.arange(num_points, dtype=jnp.int32) // cell
        order = lax.sort((cells, along[order, level % along.shape[1]], order), num_keys=2)[2]
        cell = -(-cell // BRANCHES)
        cell, level = -(-cell // group) * group if cell > group else 1 << (cell - 1).bit_length(), level + 1
    return order


def spread_over(points: Points, order: Array, num_groups: int) -> Points:
    """Spread points evenly over groups of a common length, a power of two.

    Group sizes differ by at most one point. Repeated halving leaves one point of every group, for any number of points;
    with padding only at the end the last groups would be empty.

    Args:
        points: n points.
        order: a permutation of the points ``[n]``, with absent ones last.
        num_groups: the number M of groups.

    Returns:
        M times ``group_length(n, M)`` points, group by group; each group is filled with absent points at its end.
    """
    num_points = points.mass.shape[0]
    group_size = group_length(num_points, num_groups)
    count = jnp.sum(points.mass > 0, dtype=jnp.int32)
    rank = jnp.arange(num_points, dtype=jnp.int32)
    # The first groups have one point more than the others.
    least, larger = count // num_groups, count % num_groups
    in_larger = larger * (least + 1)
    beyond = rank - in_larger
    is_larger = rank < in_larger
    group = jnp.where(is_larger, rank // (least + 1), larger + beyond // jnp.maximum(least, 1))
    within = jnp.where(is_larger, rank % (least + 1), beyond % jnp.maximum(least, 1))
    slot = jnp.where(rank < count, group * group_size + within, num_groups * group_size)

    def placed(x: Array) -> Array:
        room = jnp.zeros((num_groups * group_size, *x.shape[1:]), x.dtype)
        return room.at[slot].set(x[order], mode="drop", unique_indices=False)

    return jax.tree.map(placed, points)


def group_length(num_points: int, num_groups: int) -> int:
    """The smallest power of two for which ``num_groups`` groups of this length contain all points."""
    return 1 << max(0, -(-num_points // num_groups) - 1).bit_length()


def pair_noise(key: Array, points: Points, size: int) -> list[Array]:
    """Independent uniform noise for the pairs of every halving.

    Args:
        key: typed PRNG key.
        points: n points, as from ``spread_over``: n is ``size`` times a power of two.
        size: the number of points that the last halving leaves.

    Returns:
        Numbers in [0, 1) ``[n/2], [n/4], ..., [size]``.
    """
    total = points.mass.shape[0]
    noise = jax.random.uniform(key, (total,), points.x.dtype)
    return [noise[left : 2 * left] for left in (total >> level for level in range(1, (total // size).bit_length()))]
