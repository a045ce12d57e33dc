"""Published coreset algorithms with their constants: Thinformer, BalanceKV, WildCat and SubGen."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from approx_attention.core import (
    WeightedKV,
    check_not_negative,
    check_positive,
    check_share,
    keep_count,
    keep_number,
    out_of_blocks,
    pad_rows,
    require_scaled_space,
    squared_norm,
)
from approx_attention.coresets.clustering import (
    cholesky_places,
    merged_around,
    with_nystrom_weights,
)
from approx_attention.coresets.guard import best_of
from approx_attention.coresets.halving import (
    Points,
    balancing_walk,
    group_length,
    halve,
    kernel_points,
    pair_noise,
    spread_over,
)
from approx_attention.coresets.sampling import tokens_at


def _check_probability(name: str, x: float) -> None:
    check_positive(name, x)
    check_share(name, x)


@dataclasses.dataclass(frozen=True)
class Compress:
    """KH-Compress (Thinformer): halving in the order of the tokens, in doubling buckets, by randomised signs.

    Attributes:
        failure: the probability with which the guarantee may fail; 1/2 as in the authors' code.

    Raises:
        ValueError: a probability that is not above 0 and at most 1.

    Reference:
        :cite:p:`carrell2025thinning`.
    """

    failure: float = 0.5

    def __post_init__(self) -> None:
        keep_number(self, "failure", _check_probability)

    def __call__(self, tokens: WeightedKV, size: int, ratio: Array, key: Array) -> WeightedKV:
        """A coreset of ``size`` tokens; `approx_attention.coresets` describes the arguments."""
        # The published kernel: the exponent of the logits, and the largest value norm for the normaliser.
        points = kernel_points(tokens, ratio)
        largest = jnp.max(jnp.abs(points.values[:, :-1]))
        points = points._replace(values=points.values.at[:, -1].set(largest))
        # Padding goes to the end; the published code instead drops tokens down to a power of four.
        present_first = jnp.argsort(points.mass == 0, stable=True).astype(jnp.int32)
        points = spread_over(points, present_first, size)
        coins = pair_noise(key, points, size)
        rounds = len(coins)
        # "Symmetrised", as published: a fair coin per round inverts its choices, so that both tokens of a pair are
        # equally likely.
        sides = jax.random.bernoulli(jax.random.fold_in(key, 1), shape=(max(rounds, 1),))
        for level, coin in enumerate(coins):
            # As published, buckets double from round to round up to 2 M, and the probability of failure is divided
            # among rounds in proportion to the squared bucket size, delta / rounds for the last one.
            bucket = max(2, 2 * size >> (rounds - 1 - level))
            failure = min(1.0, self.failure * bucket**2 / (4 * size**2 * rounds))
            options: Any = {"failure": failure, "interleaved": False, "side": sides[level]}
            points = halve(points, coin, rule="compress", block=bucket, **options)
        return tokens_at(tokens, points.place, points.mass)


@dataclasses.dataclass(frozen=True)
class BalanceKV:
    r"""BalanceKV as published: signs by a self-balancing walk, merge and reduce, and two coresets.

    One coreset, without mass, represents the numerator, with a separate walk for each octave of value norms
    :math:`2^i \le \|v\| < 2^{i+1}`. Another one represents the normaliser. The minority of each walk is kept and
    doubled, so that some mass is lost in every round, as published and unlike all other algorithms here. A batch that
    already fits is unchanged.

    With the theorem's :math:`\gamma = 1 / (2 c)`, :math:`c = 30 \log(n / \delta)`, the walk hardly differs from coin
    flips. The default is the number in the authors' code, with which it is almost greedy. Their code does not divide
    overlaps by :math:`R^2`, the largest norm of a token in the kernel; here they are divided, as in the theorem, so
    that the choice does not depend on the scale of the values.

    Attributes:
        failure: the probability :math:`\delta` with which the guarantee may fail.
        gamma: the factor of overlaps :math:`h / R^2` in the probability :math:`\frac12 - \gamma h / R^2` of a sign;
            None for that of the theorem.
        octaves: the number of octaves below the largest norm. Smaller values join the last octave; the published
            algorithm sets them to 0.

    Raises:
        ValueError: fewer than one octave, a gamma that is not positive, a probability that is not above 0 and at
            most 1; when called, a size below 2.

    Reference:
        :cite:p:`han2025balancekv`.
    """

    failure: float = 0.5
    gamma: float | None = 4.0
    octaves: int = 16

    def __post_init__(self) -> None:
        keep_number(self, "failure", _check_probability)
        keep_count(self, "octaves")
        if self.gamma is not None:
            keep_number(self, "gamma", check_positive)

    def __call__(self, tokens: WeightedKV, size: int, ratio: Array, key: Array) -> WeightedKV:
        """A coreset of ``size`` tokens; `approx_attention.coresets` describes the arguments."""
        if size < 2:
            raise ValueError(f"balance_kv needs a size of at least 2, for numerator and normaliser, got {size}")
        require_scaled_space("an algorithm", tokens)
        x = lax.stop_gradient(tokens.k) * jnp.sqrt(ratio)
        norm = jnp.sqrt(squared_norm(lax.stop_gradient(tokens.values))[:, 0])
        largest = jnp.max(jnp.where(tokens.mass > 0, norm, 0))
        # 1e-30: values of norm 0 fall into the last octave, without a division by 0.
        octave = jnp.floor(jnp.log2(jnp.where(largest > 0, largest, 1) / jnp.maximum(norm, 1e-30)))
        octave = jnp.clip(octave, 0, self.octaves - 1).astype(jnp.int32)
        ones = jnp.ones_like(tokens.mass)[:, None]
        place = jnp.arange(x.shape[0], dtype=jnp.int32)
        key_numerator, key_normalizer = jax.random.split(key)
        numerator = self._reduced(
            Points(x, lax.stop_gradient(tokens.values), tokens.mass, place), octave, size // 2, key_numerator
        )
        normalizer = self._reduced(
            Points(x, ones, tokens.mass, place), jnp.zeros_like(octave), size - size // 2, key_normalizer
        )
        place = jnp.concatenate([numerator.place, normalizer.place])
        values = tokens.values[numerator.place] * numerator.mass[:, None]
        return WeightedKV(
            tokens.k[place],
            pad_rows(values, normalizer.mass.shape[0]),
            jnp.concatenate([jnp.zeros_like(numerator.mass), normalizer.mass]),
            tokens.values_from_to,
        )

    def _reduced(self, points: Points, octave: Array, size: int, key: Array) -> Points:
        """Merge and reduce batches of twice the size, keeping the minority of each, until one batch is left."""
        num_points = points.mass.shape[0]
        # Points are padded to M 2^rounds places: static shapes, and every batch is full.
        rounds = group_length(num_points, size).bit_length() - 1
        total = size << rounds
        octave = pad_rows(octave, total - num_points)
        noise = jax.random.uniform(key, (2 * total,), points.x.dtype)
        points = jax.tree.map(lambda x: pad_rows(x, total - num_points), points)
        for level in range(rounds):
            batches = jax.tree.map(lambda x: x.reshape(-1, 2 * size, *x.shape[1:]), (points, octave))
            # Levels use disjoint noise: level l uses the next total / 2^l numbers of the 2 total.
            first = 2 * (total - (total >> level))
            coins = noise[first : first + (total >> level)].reshape(-1, 2 * size)
            points, octave = lax.map(lambda x: self._minority(x[0], x[1], x[2], num_points), (*batches, coins))
            points, octave = out_of_blocks((points, octave))
        return points

    def _minority(self, points: Points, octave: Array, coin: Array, length: int) -> tuple[Points, Array]:
        present = points.mass > 0
        # The largest exponential is scaled to 1; the walk's probabilities are ratios, so a common factor has no effect.
        shift = jnp.max(squared_norm(points.x))
        # Octaves are independent: one walk over a block-diagonal kernel serves all of them.
        alike = (octave[:, None] == octave[None, :]) & present[:, None] & present[None, :]
        gram = jnp.where(alike, jnp.exp(points.x @ points.x.T - shift) * (points.values @ points.values.T), 0)
        gamma = 1 / (60 * math.log(length / self.failure)) if self.gamma is None else self.gamma
        plus = balancing_walk(gram, gamma, coin)
        votes = jax.ops.segment_sum(jnp.where(present, jnp.where(plus, 1, -1), 0), octave, self.octaves)
        fits = jnp.sum(present) <= octave.shape[0] // 2
        # The minority sign of each octave, plus in a tie: at most half of its tokens.
        kept = present & (fits | (plus == (votes <= 0)[octave]))
        place = jnp.argsort(~kept, stable=True)[: octave.shape[0] // 2]
        chosen = jax.tree.map(lambda x: x[place], points)
        mass = jnp.where(fits, chosen.mass, 2 * chosen.mass)
        return chosen._replace(mass=jnp.where(kept[place], mass, 0)), octave[place]


@dataclasses.dataclass(frozen=True)
class PivotedNystrom:
    r"""WildCat: Nystrom weights on landmarks chosen by randomly pivoted Cholesky.

    The published kernel has the exponent :math:`s = (\rho_q / \rho_k) / 3.94582`. Unlike the published method, this one
    keeps the merge of every token into the nearest pivot if the weights are worse.

    Attributes:
        ridge: added to the unit diagonal of the pivots' kernel. With ridge 0, as in the authors' code, the solution is
            NaN if the number of pivots exceeds the numerical rank of the kernel.
        bins: the number of parts of the sequence, each with an equal share of the pivots.

    Raises:
        ValueError: a negative ridge, fewer than one bin; when called, more bins than ``size``.

    Reference:
        :cite:p:`wildcat2026`.
    """

    ridge: float = 1e-5
    bins: int = 1

    def __post_init__(self) -> None:
        keep_number(self, "ridge", check_not_negative)
        keep_count(self, "bins")

    def __call__(self, tokens: WeightedKV, size: int, ratio: Array, key: Array) -> WeightedKV:
        """A coreset of ``size`` tokens; `approx_attention.coresets` describes the arguments."""
        require_scaled_space("an algorithm", tokens)
        exponent = ratio / 3.94582  # 1 / tau^2 in the authors' code
        length, per_bin = -(-tokens.mass.shape[0] // self.bins), size // self.bins
        if per_bin == 0:
            raise ValueError(f"bins must be at most the coreset size {size}, got {self.bins}")

        def of_bin(args: tuple[Array, Array, Array, Array]) -> WeightedKV:
            *held, key = args
            part = WeightedKV(*held)
            if per_bin >= length:
                return part
            merge = merged_around(part, cholesky_places(part, exponent, per_bin, key))
            solved = with_nystrom_weights(part, merge, exponent, self.ridge)
            return best_of([merge, solved], part, ratio, jax.random.fold_in(key, 1))

        def in_bins(x: Array) -> Array:
            return pad_rows(x, self.bins * length - x.shape[0]).reshape(self.bins, length, *x.shape[1:])

        parts = lax.map(
            of_bin, (*map(in_bins, (tokens.k, tokens.value_sum, tokens.mass)), jax.random.split(key, self.bins))
        )
        k, value_sum, mass = out_of_blocks((parts.k, parts.value_sum, parts.mass))
        return WeightedKV(k, value_sum, mass, tokens.values_from_to)


@dataclasses.dataclass(frozen=True)
class SubGen:
    r"""SubGen: online clusters of keys with a reservoir of keys each, and a sample of values by their norms.

    The normaliser is :math:`\sum_i (n_i / t) \sum_{k \in \text{reservoir } i} e^{q \cdot k}`, the numerator an estimate
    from s samples with odds :math:`\|v\|^2`. Both are tokens here: those of the numerator have no mass.

    Attributes:
        reach: largest distance at which a key joins a centre, in units of the largest norm of a key.
        reservoir: the number t of keys in the reservoir of each cluster.
        value_share: the share of the coreset for the s samples of values, of which there is at least one, and at least
            one token is left for the keys.

    Raises:
        ValueError: a negative reach, an empty reservoir, a share that is not from 0 to 1; when called, a size below 2.

    Reference:
        :cite:p:`zandieh2024subgen`.
    """

    reach: float = 0.5
    reservoir: int = 4
    value_share: float = 0.25

    def __post_init__(self) -> None:
        keep_number(self, "reach", check_not_negative)
        keep_count(self, "reservoir")
        keep_number(self, "value_share", check_share)

    def __call__(self, tokens: WeightedKV, size: int, ratio: Array, key: Array) -> WeightedKV:
        """A coreset of ``size`` tokens; `approx_attention.coresets` describes the arguments."""
        samples = min(max(1, int(self.value_share * size)), max(1, size - 1))
        slots = min(self.reservoir, size - samples)
        if slots < 1:
            raise ValueError(f"subgen needs a size of at least 2, for one key and one value, got {size}")
        require_scaled_space("an algorithm", tokens)
        clusters = (size - samples) // slots
        key_values, key_slots = jax.random.split(key)
        k = lax.stop_gradient(tokens.k)
        reach = (self.reach**2) * jnp.max(squared_norm(k))
        coins = jax.random.uniform(key_slots, (k.shape[0], slots), k.dtype)

        def step(state: tuple[Array, Array, Array], token: tuple[Array, Array, Array, Array]) -> tuple[tuple, None]:
            centres, count, held = state
            x, mass, coin, place = token
            opened = jnp.sum(count > 0)
            distance = jnp.where(count > 0, jnp.sum((centres - x[None, :]) ** 2, axis=1), jnp.inf)
            closest = jnp.argmin(distance)
            # The number of clusters is static: when all are used, a distant key joins the closest one.
            opens = (opened < clusters) & ((opened == 0) | (distance[closest] > reach))
            own = jnp.where(opens, opened, closest)
            centres = centres.at[own].set(jnp.where(opens, x, centres[own]))
            # Each slot of the reservoir is an independent sample of one key of the cluster, with odds by mass.
            total = count[own] + mass
            held = held.at[own].set(jnp.where(opens | (coin * total < mass), place, held[own]))
            new = (centres, count.at[own].set(total), held)
            # Padding does not change the state.
            return jax.tree.map(lambda a, b: jnp.where(mass > 0, a, b), new, state), None

        start = (
            jnp.zeros((clusters, k.shape[1]), k.dtype),
            jnp.zeros((clusters,), k.dtype),
            jnp.zeros((clusters, slots), jnp.int32),
        )
        places = jnp.arange(k.shape[0], dtype=jnp.int32)
        (_, count, held), _ = lax.scan(step, start, (k, tokens.mass, coins, places))
        mass = jnp.repeat(count / slots, slots, total_repeat_length=clusters * slots)
        held = held.reshape(-1)

        square = squared_norm(lax.stop_gradient(tokens.values))[:, 0]
        # 1e-37 keeps the logarithm, and its place in the sample, finite where a norm squared underflows.
        odds = jnp.where((tokens.mass > 0) & (square > 0), tokens.log_mass + jnp.log(jnp.maximum(square, 1e-37)), -1e30)
        sampled = jax.random.categorical(key_values, odds, shape=(samples,)).astype(jnp.int32)
        # Importance weight: the sum of all norms squared over s times its own.
        weight = jnp.sum(tokens.mass * square) / (samples * jnp.where(square[sampled] > 0, square[sampled], 1))
        sampled_sum = tokens.values[sampled] * weight[:, None]
        place = jnp.concatenate([held, sampled])
        value_sum = jnp.concatenate([jnp.zeros((held.shape[0], sampled_sum.shape[1]), sampled_sum.dtype), sampled_sum])
        return WeightedKV(tokens.k[place], value_sum, pad_rows(mass, samples), tokens.values_from_to)
