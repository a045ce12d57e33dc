r"""Algorithms that make few weighted tokens of many: ``(tokens, size, ratio, key) ->`` `WeightedKV`.

``tokens`` are a `WeightedKV` without negative masses and with centred keys, ``size`` is smaller than their number, and
``ratio`` is the radius of the queries over that of the keys, which sets the kernel :math:`e^{s\, k \cdot k'}` with
s = ratio / 2. A token of mass 0 is none, and what is made of none has mass 0.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from approx_attention.core import (
    WeightedKV,
    attend,
    blocked_state,
    check_choice,
    keep_count,
    out_of_blocks,
    pad_rows,
    require_scaled_space,
    squared_norm,
)
from approx_attention.coresets.clustering import (
    cholesky_places,
    farthest_places,
    k_means,
    merged,
    nearest,
    random_places,
    spread_places,
    with_nystrom_weights,
)
from approx_attention.coresets.halving import (
    SIGN_RULES,
    Points,
    SignRule,
    balancing_walk,
    group_length,
    halve,
    kernel_points,
    spread_over,
    tree_order,
)

Algorithm = Callable[[WeightedKV, int, Array, Array], WeightedKV]
# Directions of keys in which the Nystrom weights must be better than a merge to be used.
PROBES = 64


@dataclasses.dataclass(frozen=True)
class Uniform:
    """A uniform sample without replacement; all tokens of the sample get the same mass, times their own."""

    def __call__(self, tokens: WeightedKV, size: int, ratio: Array, key: Array) -> WeightedKV:
        """A coreset of ``size`` tokens."""
        place = random_places(tokens.mass, size, key)
        return _rescaled(_kept(tokens, place, tokens.mass[place]), tokens)


@dataclasses.dataclass(frozen=True)
class ValueNorm:
    r"""A sample with odds :math:`p_j \propto m_j (\|v_j\| + \text{mean} \|v\|)`, and masses that undo them.

    With :math:`\tau` the greatest score :math:`\log p_j + \text{Gumbel}` that is not kept, a token was kept with
    probability :math:`1 - e^{-p_j e^{-\tau}}`, by which its mass is divided.
    """

    def __call__(self, tokens: WeightedKV, size: int, ratio: Array, key: Array) -> WeightedKV:
        """A coreset of ``size`` tokens."""
        norm = jnp.sqrt(squared_norm(lax.stop_gradient(tokens.values))[:, 0])
        total = jnp.sum(tokens.mass)
        mean = tokens.mass @ norm / jnp.where(total > 0, total, 1)
        log_odds = tokens.log_mass + jnp.log(norm + jnp.where(mean > 0, mean, 1))
        score = log_odds + jax.random.gumbel(key, log_odds.shape, log_odds.dtype)
        best, place = lax.top_k(jnp.where(tokens.mass > 0, score, -jnp.inf), size + 1)
        place = place[:size]
        chance = -jnp.expm1(-jnp.exp(log_odds[place] - best[size]))
        mass = jnp.where(tokens.mass[place] > 0, tokens.mass[place] / chance, 0)
        return _rescaled(_kept(tokens, place, mass), tokens)


@dataclasses.dataclass(frozen=True)
class Halving:
    """Discrepancy halving of neighbours, again and again.

    The rules control the norm of the kernel's sums; none carries a guarantee of 1/m for all queries at once.

    Attributes:
        rule: how signs are chosen: ``"greedy"`` one after the other, ``"search"`` for all pairs of a block at once
            (fewer steps in sequence, and at best as good), ``"walk"`` the self-balancing walk with the constants of its
            theorem, ``"thinning"`` kernel thinning.
        order: ``"tree"`` pairs neighbours in keys and values, ``"random"`` anything.
        block: tokens whose signs are chosen together; at least twice the size of the coreset, or else the errors of
            blocks add up.
    """

    rule: SignRule = "greedy"
    order: Literal["tree", "random"] = "tree"
    block: int = 1024

    def __post_init__(self) -> None:
        check_choice("rule", self.rule, SIGN_RULES)
        check_choice("order", self.order, ("tree", "random"))
        keep_count(self, "block", least=2)

    def __call__(self, tokens: WeightedKV, size: int, ratio: Array, key: Array) -> WeightedKV:
        """A coreset of ``size`` tokens."""
        points = kernel_points(tokens, ratio / 2)
        key_order, key_signs = jax.random.split(key)
        if self.order == "tree":
            order = tree_order(points, group_length(points.mass.shape[0], size))
        else:
            order = random_places(points.mass, points.mass.shape[0], key_order)
        points = spread_over(points, order, size)
        for coin in _coins(key_signs, points, size):
            points = halve(points, coin, rule=self.rule, block=self.block)
        return _kept(tokens, points.place, points.mass)


@dataclasses.dataclass(frozen=True)
class Stratified:
    r"""Keeps the most sensitive tokens as they are and halves the rest.

    The sensitivity of token j is its share of the normaliser for the query that points at it, estimated from a uniform
    sample (`sensitivities`).

    Attributes:
        share: the part of the coreset that the most sensitive tokens take.
        sample: tokens from which normalisers are estimated.
        halving: what is done to the rest.
    """

    share: float = 0.25
    sample: int = 1024
    halving: Halving = Halving()

    def __post_init__(self) -> None:
        keep_count(self, "sample")

    def __call__(self, tokens: WeightedKV, size: int, ratio: Array, key: Array) -> WeightedKV:
        """A coreset of ``size`` tokens."""
        key_sample, key_rest = jax.random.split(key)
        strongest = min(size, math.ceil(self.share * size))
        sensitivity = sensitivities(tokens, ratio, key_sample, self.sample)
        place = lax.top_k(jnp.where(tokens.mass > 0, sensitivity, -1), strongest)[1]
        kept = _kept(tokens, place, tokens.mass[place])
        if strongest == size:
            return _rescaled(kept, tokens)
        rest = dataclasses.replace(
            tokens, mass=tokens.mass.at[place].set(0), value_sum=tokens.value_sum.at[place].set(0)
        )
        halved = self.halving(rest, size - strongest, ratio, key_rest)
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), kept, halved)


def sensitivities(tokens: WeightedKV, ratio: Array, key: Array, sample: int = 1024) -> Array:
    r"""Shares :math:`m_j e^{q_j \cdot k_j} / Z(q_j)` of the normaliser at :math:`q_j = (\rho_q/\rho_k) k_j`."""
    k = lax.stop_gradient(tokens.k)
    log_mass = lax.stop_gradient(tokens.log_mass)
    own = ratio * squared_norm(k)[:, 0] + log_mass
    place = random_places(tokens.mass, min(sample, k.shape[0]), key)
    chosen = tokens.mass[place]
    scale = jnp.sum(tokens.mass) / jnp.where(jnp.sum(chosen) > 0, jnp.sum(chosen), 1)
    log_scale = jnp.log(jnp.where(scale > 0, scale, 1))
    others = blocked_state(ratio * k, k[place], k[place, :1], log_mass[place]).lse + log_scale
    # The sample may miss the token itself, which is never less than its own part.
    missing = jnp.ones_like(own).at[place].set(0) > 0
    return jnp.where(tokens.mass > 0, jnp.exp(own - jnp.where(missing, jnp.logaddexp(own, others), others)), 0)


@dataclasses.dataclass(frozen=True)
class Compress:
    """KH-Compress (Thinformer): halving of the given order, in buckets that double, by randomised signs.

    Attributes:
        failure: the probability with which the guarantee may fail.
    """

    failure: float = 0.5

    def __call__(self, tokens: WeightedKV, size: int, ratio: Array, key: Array) -> WeightedKV:
        """A coreset of ``size`` tokens."""
        # The published kernel: the exponent of the logits themselves, and the largest value for the normaliser.
        points = kernel_points(tokens, ratio)
        largest = jnp.max(jnp.abs(points.values[:, :-1]))
        points = points._replace(values=points.values.at[:, -1].set(largest))
        present_first = jnp.argsort(points.mass == 0, stable=True).astype(jnp.int32)
        points = spread_over(points, present_first, size)
        coins = _coins(key, points, size)
        rounds = len(coins)
        sides = jax.random.bernoulli(jax.random.fold_in(key, 1), shape=(max(rounds, 1),))
        for level, coin in enumerate(coins):
            bucket = max(2, 2 * size >> (rounds - 1 - level))
            failure = min(1.0, self.failure * bucket**2 / (4 * size**2 * rounds))
            options: Any = {"failure": failure, "interleaved": False, "side": sides[level]}
            points = halve(points, coin, rule="compress", block=bucket, **options)
        return _kept(tokens, points.place, points.mass)


@dataclasses.dataclass(frozen=True)
class BalanceKV:
    r"""BalanceKV as published: signs by a self-balancing walk, merge and reduce, and two coresets.

    One stands for the numerator, each octave of value norms :math:`2^i \le \|v\| < 2^{i+1}` by itself, and has no mass;
    one for the normaliser. The minority of each walk is kept and doubled, so that some of the mass is lost in every
    round: as published, and unlike all other algorithms here. A batch that already fits is left as it is.

    Attributes:
        failure: the probability with which the guarantee may fail.
        octaves: how many octaves below the largest norm are told apart.
    """

    failure: float = 0.5
    octaves: int = 16

    def __post_init__(self) -> None:
        keep_count(self, "octaves")

    def __call__(self, tokens: WeightedKV, size: int, ratio: Array, key: Array) -> WeightedKV:
        """A coreset of ``size`` tokens."""
        if size < 2:
            raise ValueError(f"balance_kv keeps one token for the numerator and one for the normaliser, got {size}")
        require_scaled_space("an algorithm", tokens)
        x = lax.stop_gradient(tokens.k) * jnp.sqrt(ratio)
        norm = jnp.sqrt(squared_norm(lax.stop_gradient(tokens.values))[:, 0])
        largest = jnp.max(jnp.where(tokens.mass > 0, norm, 0))
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
        """Merge and reduce: batches of twice the size, each of which leaves its minority, until one is left."""
        num_points = points.mass.shape[0]
        rounds = group_length(num_points, size).bit_length() - 1
        total = size << rounds
        octave = pad_rows(octave, total - num_points)
        noise = jax.random.uniform(key, (2 * total,), points.x.dtype)
        points = jax.tree.map(lambda x: pad_rows(x, total - num_points), points)
        for level in range(rounds):
            batches = jax.tree.map(lambda x: x.reshape(-1, 2 * size, *x.shape[1:]), (points, octave))
            first = 2 * (total - (total >> level))
            coins = noise[first : first + (total >> level)].reshape(-1, 2 * size)
            points, octave = lax.map(lambda x: self._minority(x[0], x[1], x[2], num_points), (*batches, coins))
            points, octave = out_of_blocks((points, octave))
        return points

    def _minority(self, points: Points, octave: Array, coin: Array, length: int) -> tuple[Points, Array]:
        present = points.mass > 0
        shift = jnp.max(squared_norm(points.x))
        alike = (octave[:, None] == octave[None, :]) & present[:, None] & present[None, :]
        gram = jnp.where(alike, jnp.exp(points.x @ points.x.T - shift) * (points.values @ points.values.T), 0)
        plus = balancing_walk(gram, 30 * math.log(length / self.failure), coin)
        votes = jax.ops.segment_sum(jnp.where(present, jnp.where(plus, 1, -1), 0), octave, self.octaves)
        fits = jnp.sum(present) <= octave.shape[0] // 2
        kept = present & (fits | (plus == (votes <= 0)[octave]))
        place = jnp.argsort(~kept, stable=True)[: octave.shape[0] // 2]
        chosen = jax.tree.map(lambda x: x[place], points)
        mass = jnp.where(fits, chosen.mass, 2 * chosen.mass)
        return chosen._replace(mass=jnp.where(kept[place], mass, 0)), octave[place]


@dataclasses.dataclass(frozen=True)
class Herding:
    r"""Kernel herding: each further token is the one that brings the mean of the chosen nearest to that of all."""

    def __call__(self, tokens: WeightedKV, size: int, ratio: Array, key: Array) -> WeightedKV:
        """A coreset of ``size`` tokens."""
        points = kernel_points(tokens, ratio / 2)
        x, values, mass = points.x, points.values, points.mass
        shift = jnp.max(squared_norm(x))
        state = blocked_state(x, x, values, tokens.log_mass)
        log_scale = state.lse - jnp.log(jnp.where(jnp.sum(mass) > 0, jnp.sum(mass), 1)) - shift
        mean = jnp.exp(log_scale) * jnp.sum(values * state.out, axis=1)
        own = jnp.exp(squared_norm(x)[:, 0] - shift) * squared_norm(values)[:, 0]

        def step(state: tuple[Array, Array], number: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
            chosen, free = state
            gain = mean - (chosen + own / 2) / (number + 1)
            place = jnp.argmax(jnp.where(free, gain, -jnp.inf))
            chosen = chosen + jnp.exp(x @ x[place] - shift) * (values @ values[place])
            return (chosen, free.at[place].set(False)), (place, free[place])

        start = jnp.zeros_like(mean), mass > 0
        _, (place, is_new) = lax.scan(step, start, jnp.arange(size, dtype=mean.dtype))
        return _rescaled(_kept(tokens, place, is_new.astype(mass.dtype)), tokens)


@dataclasses.dataclass(frozen=True)
class KMeansMerge:
    """Clusters of keys, each merged into its mean key with the sum of its values.

    Attributes:
        steps: of Lloyd's iteration; after the spread seeding one is as good as five.
        seeding: the first centres: tokens drawn far from each other (``"spread"``), uniformly (``"random"``), or as
            pivots of the kernel (``"pivots"``).
    """

    steps: int = 1
    seeding: Literal["spread", "random", "pivots"] = "spread"

    def __post_init__(self) -> None:
        keep_count(self, "steps")
        check_choice("seeding", self.seeding, ("spread", "random", "pivots"))

    def __call__(self, tokens: WeightedKV, size: int, ratio: Array, key: Array) -> WeightedKV:
        """A coreset of ``size`` tokens."""
        if self.seeding == "spread":
            start = spread_places(tokens, size, key)
        elif self.seeding == "random":
            start = random_places(tokens.mass, size, key)
        else:
            start = cholesky_places(tokens, ratio, size, key)
        return k_means(tokens, start, self.steps)


@dataclasses.dataclass(frozen=True)
class FarthestMerge:
    """Greedy k-center: centres far from each other, and every token merged into the nearest."""

    def __call__(self, tokens: WeightedKV, size: int, ratio: Array, key: Array) -> WeightedKV:
        """A coreset of ``size`` tokens."""
        return _merged_around(tokens, farthest_places(tokens.k, tokens.mass > 0, size))


@dataclasses.dataclass(frozen=True)
class KMeansNystrom:
    """Merged clusters whose masses and values are then solved for, so that they also get right what lies between them.

    Where the solution is worse than the merge on queries that point along keys or against them, the merge is kept.

    Attributes:
        clusters: how the landmarks are found.
        ridge: added to the diagonal of their kernel, which is 1.
    """

    clusters: KMeansMerge = KMeansMerge()
    ridge: float = 1e-3

    def __call__(self, tokens: WeightedKV, size: int, ratio: Array, key: Array) -> WeightedKV:
        """A coreset of ``size`` tokens."""
        merge = self.clusters(tokens, size, ratio, key)
        return _better(tokens, merge, with_nystrom_weights(tokens, merge, ratio / 2, self.ridge), ratio, key)


@dataclasses.dataclass(frozen=True)
class PivotedNystrom:
    r"""WildCat: Nystrom weights on tokens drawn by randomly pivoted Cholesky.

    The published kernel has the exponent :math:`s = (\rho_q / \rho_k) / 3.94582`. The merge of every token into the
    nearest pivot is kept where the weights are worse, which the published method does not check.

    Attributes:
        ridge: added to the diagonal of the pivots' kernel, which is 1.
        bins: the sequence is cut into so many parts, and each has its share of the pivots.
    """

    ridge: float = 1e-5
    bins: int = 1

    def __post_init__(self) -> None:
        keep_count(self, "bins")

    def __call__(self, tokens: WeightedKV, size: int, ratio: Array, key: Array) -> WeightedKV:
        """A coreset of ``size`` tokens."""
        require_scaled_space("an algorithm", tokens)
        exponent = ratio / 3.94582
        length, per_bin = -(-tokens.mass.shape[0] // self.bins), size // self.bins
        if per_bin == 0:
            raise ValueError(f"bins must be at most the coreset size {size}, got {self.bins}")

        def of_bin(args: tuple[Array, Array, Array, Array]) -> WeightedKV:
            *held, key = args
            part = WeightedKV(*held)
            if per_bin >= length:
                return part
            merge = _merged_around(part, cholesky_places(part, exponent, per_bin, key))
            return _better(part, merge, with_nystrom_weights(part, merge, exponent, self.ridge), ratio, key)

        def in_bins(x: Array) -> Array:
            return pad_rows(x, self.bins * length - x.shape[0]).reshape(self.bins, length, *x.shape[1:])

        parts = lax.map(
            of_bin, (*map(in_bins, (tokens.k, tokens.value_sum, tokens.mass)), jax.random.split(key, self.bins))
        )
        k, value_sum, mass = out_of_blocks((parts.k, parts.value_sum, parts.mass))
        return WeightedKV(k, value_sum, mass, tokens.values_from_to)


@dataclasses.dataclass(frozen=True)
class SubGen:
    r"""SubGen: clusters that are opened as keys come, a reservoir of keys in each, and values drawn by their norm.

    The normaliser is :math:`\sum_i (n_i / t) \sum_{k \in \text{reservoir } i} e^{q \cdot k}`, the numerator an estimate
    from s samples with odds :math:`\|v\|^2`. Both are tokens here: those of the numerator have no mass.

    Attributes:
        reach: keys at most this far from a centre, in units of the largest norm of a key, join it.
        reservoir: keys t held of each cluster.
        value_share: the part s of the coreset that the samples of values take.
    """

    reach: float = 0.5
    reservoir: int = 4
    value_share: float = 0.25

    def __post_init__(self) -> None:
        keep_count(self, "reservoir")

    def __call__(self, tokens: WeightedKV, size: int, ratio: Array, key: Array) -> WeightedKV:
        """A coreset of ``size`` tokens."""
        samples = max(1, int(self.value_share * size))
        slots = min(self.reservoir, size - samples)
        if slots < 1:
            raise ValueError(f"subgen keeps at least one key and one value, got a coreset size of {size}")
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
            opens = (opened < clusters) & ((opened == 0) | (distance[closest] > reach))
            own = jnp.where(opens, opened, closest)
            centres = centres.at[own].set(jnp.where(opens, x, centres[own]))
            # The reservoir: each slot is an independent uniform draw of the cluster, by its mass.
            total = count[own] + mass
            held = held.at[own].set(jnp.where(opens | (coin * total < mass), place, held[own]))
            new = (centres, count.at[own].set(total), held)
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
        odds = jnp.where((tokens.mass > 0) & (square > 0), tokens.log_mass + jnp.log(jnp.maximum(square, 1e-37)), -1e30)
        drawn = jax.random.categorical(key_values, odds, shape=(samples,)).astype(jnp.int32)
        weight = jnp.sum(tokens.mass * square) / (samples * jnp.where(square[drawn] > 0, square[drawn], 1))
        drawn_sum = tokens.values[drawn] * weight[:, None]
        place = jnp.concatenate([held, drawn])
        value_sum = jnp.concatenate([jnp.zeros((held.shape[0], drawn_sum.shape[1]), drawn_sum.dtype), drawn_sum])
        return WeightedKV(tokens.k[place], value_sum, pad_rows(mass, samples), tokens.values_from_to)


ALGORITHMS: Mapping[str, Algorithm] = {
    "kmeans_nystrom": KMeansNystrom(),
    "kmeans_merge": KMeansMerge(),
    "farthest_merge": FarthestMerge(),
    "nystrom_rpc": PivotedNystrom(),
    "halving": Halving(),
    "stratified": Stratified(),
    "herding": Herding(),
    "thinformer": Compress(),
    "balance_kv": BalanceKV(),
    "subgen": SubGen(),
    "uniform": Uniform(),
    "value_norm": ValueNorm(),
}


def _coins(key: Array, points: Points, size: int) -> list[Array]:
    """Uniform noise for the pairs of every halving down to ``size``."""
    total = points.mass.shape[0]
    noise = jax.random.uniform(key, (total,), points.x.dtype)
    return [noise[left : 2 * left] for left in (total >> level for level in range(1, (total // size).bit_length()))]


def _kept(tokens: WeightedKV, place: Array, mass: Array) -> WeightedKV:
    """The tokens at these places with other masses."""
    require_scaled_space("an algorithm", tokens)
    values = jnp.where(mass[:, None] > 0, tokens.values[place], 0)
    return WeightedKV(tokens.k[place], values * mass[:, None], mass)


def _rescaled(chosen: WeightedKV, tokens: WeightedKV) -> WeightedKV:
    """The chosen tokens with masses that add up to those of all."""
    total = jnp.sum(chosen.mass)
    factor = jnp.sum(tokens.mass) / jnp.where(total > 0, total, 1)
    return dataclasses.replace(chosen, value_sum=chosen.value_sum * factor, mass=chosen.mass * factor)


def _merged_around(tokens: WeightedKV, place: Array) -> WeightedKV:
    """Every token merged into the nearest of those at these places."""
    return merged(tokens, nearest(tokens.k, lax.stop_gradient(tokens.k)[place], tokens.mass[place] > 0), place.shape[0])


def _better(tokens: WeightedKV, merge: WeightedKV, solved: WeightedKV, ratio: Array, key: Array) -> WeightedKV:
    """The solved weights, or the merge they are to improve on, whichever errs less on queries along some keys."""
    held, first, second = lax.stop_gradient((tokens, merge, solved))
    place = random_places(held.mass, min(PROBES, held.mass.shape[0]), jax.random.fold_in(key, 1))
    direction = held.k[place]
    norm = jnp.sqrt(squared_norm(direction))
    radius = ratio * jnp.sqrt(jnp.max(squared_norm(held.k)))
    side = jnp.where(jnp.arange(place.shape[0]) % 2 == 0, 1, -1)[:, None]
    q = side * direction * radius / jnp.where(norm > 0, norm, 1)
    truth, asked = attend(q, held).out, (held.mass[place] > 0)[:, None]
    errors = [jnp.sum((attend(q, summary).out - truth) ** 2, where=asked) for summary in (first, second)]
    return jax.tree.map(
        lambda a, b: jnp.where(errors[1] < errors[0], a, b),
        solved,
        dataclasses.replace(merge, value_range=solved.value_range),
    )
