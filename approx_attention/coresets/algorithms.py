r"""Algorithms that reduce many tokens to a few weighted ones: ``(tokens, size, ratio, key) ->`` `WeightedKV`.

``tokens`` is a `WeightedKV` with centred keys and without negative masses, and ``size`` is smaller than their number.
``ratio`` is the radius of the queries over that of the keys. The exponent s of the kernel :math:`e^{s\, k \cdot k'}` is
half of it, unless an algorithm says otherwise. A token of mass 0 is absent, and a coreset of absent tokens has mass 0.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from approx_attention import kernels
from approx_attention.core import (
    WeightedKV,
    check_choice,
    check_not_negative,
    check_positive,
    check_share,
    keep_count,
    keep_number,
    known_number,
    squared_norm,
)
from approx_attention.coresets.clustering import (
    cholesky_places,
    farthest_places,
    k_means,
    merged_around,
    random_places,
    spread_places,
    with_nystrom_weights,
)
from approx_attention.coresets.guard import best_of
from approx_attention.coresets.halving import (
    SIGN_RULES,
    SignRule,
    group_length,
    halve,
    kernel_points,
    pair_noise,
    spread_over,
    tree_order,
)
from approx_attention.coresets.masses import FittedMasses
from approx_attention.coresets.published import BalanceKV, Compress, PivotedNystrom, SubGen
from approx_attention.coresets.sampling import Uniform, ValueNorm, rescaled, sensitivities, tokens_at

# The smallest number of tokens whose signs halving chooses together: smaller blocks have larger errors at any size, and
# are hardly faster.
LEAST_BLOCK = 1024

Algorithm = Callable[[WeightedKV, int, Array, Array], WeightedKV]

Seeding = Literal["spread", "distant", "farthest", "random", "pivots"]
# The power of the distance in the odds of "distant": from 4 to 16 the largest errors agree within their scatter.
DISTANT = 8.0
# (tokens, size, ratio, key) -> places of the initial centres.
SEEDINGS: Mapping[Seeding, Callable[[WeightedKV, int, Array, Array], Array]] = {
    "spread": lambda tokens, size, ratio, key: spread_places(tokens, size, key),
    "distant": lambda tokens, size, ratio, key: spread_places(tokens, size, key, DISTANT),
    "farthest": lambda tokens, size, ratio, key: farthest_places(tokens.k, tokens.mass > 0, size),
    "random": lambda tokens, size, ratio, key: random_places(tokens.mass, size, key),
    "pivots": lambda tokens, size, ratio, key: cholesky_places(tokens, ratio, size, key),
}


@dataclasses.dataclass(frozen=True)
class Halving:
    """Halve neighbouring tokens with small discrepancy, repeatedly until the size is reached.

    The sign rules control the norm of the kernel's sums; none has a guarantee of 1/m for all queries at once.

    Attributes:
        rule: how signs are chosen: ``"greedy"`` one after the other, ``"search"`` for all pairs of a block at once
            (fewer sequential steps, at best as accurate), ``"walk"`` the self-balancing walk with the constants of its
            theorem, ``"thinning"`` kernel thinning.
        order: ``"tree"`` pairs neighbours in keys and values, ``"random"`` pairs tokens at random.
        block: number of tokens whose signs are chosen together; the cost grows with it. Below twice the size of the
            coreset the independent errors of blocks add up; the default is twice the size, and at least 1024.

    Raises:
        ValueError: an unknown rule or order, a block below 2.

    Reference:
        :cite:p:`karnin2019discrepancy`.
    """

    rule: SignRule = "greedy"
    order: Literal["tree", "random"] = "tree"
    block: int | None = None

    def __post_init__(self) -> None:
        check_choice("rule", self.rule, SIGN_RULES)
        check_choice("order", self.order, ("tree", "random"))
        if self.block is not None:
            keep_count(self, "block", least=2)

    def __call__(self, tokens: WeightedKV, size: int, ratio: Array, key: Array) -> WeightedKV:
        """A coreset of ``size`` tokens; `approx_attention.coresets` describes the arguments."""
        # Half of the exponent of the logits. In theory the full exponent is best for queries of the given radius.
        # Measured errors with a quarter, a half and the full exponent agree within 15 %, and twice is worse: a half has
        # a margin on both sides.
        points = kernel_points(tokens, ratio / 2)
        key_order, key_signs = jax.random.split(key)
        if self.order == "tree":
            # One order serves all levels, because the survivors of neighbouring pairs are neighbours.
            order = tree_order(points, group_length(points.mass.shape[0], size))
        else:
            order = random_places(points.mass, points.mass.shape[0], key_order)
        points = spread_over(points, order, size)
        block = max(LEAST_BLOCK, 2 * size) if self.block is None else self.block
        for coin in pair_noise(key_signs, points, size):
            points = halve(points, coin, rule=self.rule, block=block)
        return tokens_at(tokens, points.place, points.mass)


@dataclasses.dataclass(frozen=True)
class Stratified:
    r"""Keep the most sensitive tokens unchanged and halve the rest.

    The sensitivity of token j is its share of the normaliser for the query in its direction, estimated from a uniform
    sample (`sensitivities`). Halving alone fails on outliers: in any round it may drop a key that has as much weight
    for some query as all other keys.

    Attributes:
        share: share of the coreset for the most sensitive tokens.
        sample: number of tokens from which normalisers are estimated.
        halving: the halving of the remaining tokens.

    Raises:
        ValueError: a share that is not from 0 to 1, an empty sample.

    Reference:
        :cite:p:`feldman2011unified`, for sensitivities; the combination with halving is this library's.
    """

    share: float = 0.25
    sample: int = 1024
    halving: Halving = Halving()

    def __post_init__(self) -> None:
        keep_number(self, "share", check_share)
        keep_count(self, "sample")

    def __call__(self, tokens: WeightedKV, size: int, ratio: Array, key: Array) -> WeightedKV:
        """A coreset of ``size`` tokens; `approx_attention.coresets` describes the arguments."""
        key_sample, key_rest = jax.random.split(key)
        strongest = min(size, math.ceil(self.share * size))
        sensitivity = sensitivities(tokens, ratio, key_sample, self.sample)
        place = lax.top_k(jnp.where(tokens.mass > 0, sensitivity, -1), strongest)[1]
        kept = tokens_at(tokens, place, tokens.mass[place])
        if strongest == size:
            return rescaled(kept, tokens)
        rest = dataclasses.replace(
            tokens, mass=tokens.mass.at[place].set(0), value_sum=tokens.value_sum.at[place].set(0)
        )
        halved = self.halving(rest, size - strongest, ratio, key_rest)
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), kept, halved)


@dataclasses.dataclass(frozen=True)
class Herding:
    r"""Kernel herding: greedily add the token that brings the kernel mean of the sample nearest to that of all.

    After t tokens s the next token maximises
    :math:`E_j \kappa_{ij} - \frac1{t+1} (\sum_s \kappa_{is} + \frac12 \kappa_{ii})`.
    """

    def __call__(self, tokens: WeightedKV, size: int, ratio: Array, key: Array) -> WeightedKV:
        """A coreset of ``size`` tokens; `approx_attention.coresets` describes the arguments."""
        points = kernel_points(tokens, ratio / 2)
        x, values, mass = points.x, points.values, points.mass
        # The largest exponential becomes 1, so that none overflows; a common factor changes no choice.
        shift = jnp.max(squared_norm(x))
        # The kernel's mean over all tokens is softmax self-attention of the points, without an S x S matrix.
        state = kernels.state(x, x, values, tokens.log_mass)
        log_scale = state.lse - jnp.log(jnp.where(jnp.sum(mass) > 0, jnp.sum(mass), 1)) - shift
        mean = jnp.exp(log_scale) * jnp.sum(values * state.out, axis=1)
        own = jnp.exp(squared_norm(x)[:, 0] - shift) * squared_norm(values)[:, 0]

        def step(state: tuple[Array, Array], number: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
            chosen, free = state
            gain = mean - (chosen + own / 2) / (number + 1)
            place = jnp.argmax(jnp.where(free, gain, -jnp.inf))
            chosen = chosen + jnp.exp(x @ x[place] - shift) * (values @ values[place])
            return (chosen, free.at[place].set(False)), (place, free[place])

        # If no token is left, all gains are -inf and a chosen token repeats; ``is_new`` gives it no mass.
        start = jnp.zeros_like(mean), mass > 0
        _, (place, is_new) = lax.scan(step, start, jnp.arange(size, dtype=mean.dtype))
        return rescaled(tokens_at(tokens, place, is_new.astype(mass.dtype)), tokens)


@dataclasses.dataclass(frozen=True)
class KMeansMerge:
    """Merge k-means clusters of keys, each into its mean key with the sum of its values.

    Attributes:
        steps: steps of Lloyd's iteration; after the spread seeding one step is as good as five.
        seeding: the initial centres: a random sample of tokens far from each other (``"spread"``), with a stronger
            preference for distant tokens (``"distant"``), greedily the farthest token from all centres before
            (``"farthest"``, one step per centre), a uniform sample (``"random"``), or pivots of the kernel
            (``"pivots"``, one step per centre).
    """

    steps: int = 1
    seeding: Seeding = "spread"

    def __post_init__(self) -> None:
        keep_count(self, "steps")
        check_choice("seeding", self.seeding, tuple(SEEDINGS))

    def __call__(self, tokens: WeightedKV, size: int, ratio: Array, key: Array) -> WeightedKV:
        """A coreset of ``size`` tokens; `approx_attention.coresets` describes the arguments."""
        return k_means(tokens, SEEDINGS[self.seeding](tokens, size, ratio, key), self.steps)


@dataclasses.dataclass(frozen=True)
class Farthest:
    """Greedy k-center: choose tokens far from each other, each with the mass of its nearest tokens.

    Each chosen token is the farthest from all chosen before; keys and values are not merged (`FarthestMerge` merges).
    """

    def __call__(self, tokens: WeightedKV, size: int, ratio: Array, key: Array) -> WeightedKV:
        """A coreset of ``size`` tokens; `approx_attention.coresets` describes the arguments."""
        place = farthest_places(tokens.k, tokens.mass > 0, size)
        return tokens_at(tokens, place, merged_around(lax.stop_gradient(tokens), place).mass)


@dataclasses.dataclass(frozen=True)
class FarthestMerge:
    """Greedy k-center: choose centres far from each other, and merge every token into the nearest centre.

    A merged token has the mean key, the summed values and the mass of its cluster.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import WeightedKV
        >>> from approx_attention.coresets import FarthestMerge
        >>> k = jnp.array([[-5.0], [-3.0], [4.0], [4.0]])
        >>> small = FarthestMerge()(WeightedKV.of_tokens(k, k), 2, jnp.float32(1), jax.random.key(0))
        >>> sorted(zip(small.k[:, 0].tolist(), small.mass.tolist()))
        [(-4.0, 2.0), (4.0, 2.0)]
    """

    def __call__(self, tokens: WeightedKV, size: int, ratio: Array, key: Array) -> WeightedKV:
        """A coreset of ``size`` tokens; `approx_attention.coresets` describes the arguments."""
        return merged_around(tokens, farthest_places(tokens.k, tokens.mass > 0, size))


@dataclasses.dataclass(frozen=True)
class KMeansNystrom:
    """Merged clusters with masses and values refitted by Nystrom regression, which also fits keys between centres.

    If the solution is worse than the merge on probe queries (`best_of`), the merge is kept.

    Attributes:
        clusters: the algorithm of the landmarks.
        ridge: added to the unit diagonal of the landmarks' kernel. From 1e-6 to 1e-3 errors in float32 agree to two
            digits with those in float64; the default is the largest of these.

    Raises:
        ValueError: a negative ridge.

    Reference:
        :cite:p:`wildcat2026`, for Nystrom weights, with other landmarks.
    """

    clusters: KMeansMerge = KMeansMerge()
    ridge: float = 1e-3

    def __post_init__(self) -> None:
        keep_number(self, "ridge", check_not_negative)

    def __call__(self, tokens: WeightedKV, size: int, ratio: Array, key: Array) -> WeightedKV:
        """A coreset of ``size`` tokens; `approx_attention.coresets` describes the arguments."""
        # Exponent ratio / 2, as for halving: a quarter can blow up at large radii.
        merge = self.clusters(tokens, size, ratio, key)
        solved = with_nystrom_weights(tokens, merge, ratio / 2, self.ridge)
        return best_of([merge, solved], tokens, ratio, jax.random.fold_in(key, 1))


@dataclasses.dataclass(frozen=True)
class Guarded:
    """Choose the best of a merge and its Nystrom weights, by their largest errors on probe queries.

    Nystrom weights are better on smooth data, a merge is better where queries are long for the number of landmarks.
    Known queries (`compress`) replace the probes. Then a uniform sample and a merge around the keys with the most
    attention are candidates too. They can be better on sharp heads, but probes, which are longer than most queries,
    would misjudge them.

    Attributes:
        clusters: the algorithm of the landmarks.
        exponents: exponents of the kernels of the Nystrom weights, one candidate each, in units of that of the logits.
            The single exponent 3/4 is as accurate as the better of 1/2 and 1, in half of the time.
        ridge: as in `KMeansNystrom`.

    Raises:
        ValueError: a ridge or an exponent that is not positive and finite.
        TypeError: a ridge or an exponent that is not a number.

    Reference:
        :cite:p:`wildcat2026`, for Nystrom weights; the choice by errors on probes is this library's.
    """

    clusters: KMeansMerge = KMeansMerge(seeding="distant")
    exponents: tuple[float, ...] = (0.75,)
    ridge: float = 1e-3

    reads_queries: ClassVar[bool] = True

    def __post_init__(self) -> None:
        keep_number(self, "ridge", check_positive)
        exponents = self.exponents if isinstance(self.exponents, Sequence) else (self.exponents,)
        exponents = tuple(known_number("exponents", x) for x in exponents)
        for exponent in exponents:
            check_positive("exponents", exponent)
        object.__setattr__(self, "exponents", exponents)

    def __call__(
        self, tokens: WeightedKV, size: int, ratio: Array, key: Array, queries: Array | None = None
    ) -> WeightedKV:
        """A coreset of ``size`` tokens; `approx_attention.coresets` describes the arguments."""
        key_clusters, key_sample, key_probes = jax.random.split(key, 3)
        merge = self.clusters(tokens, size, ratio, key_clusters)
        solved = [with_nystrom_weights(tokens, merge, ratio * exponent, self.ridge) for exponent in self.exponents]
        candidates = [merge, *solved]
        if queries is not None:
            candidates.append(Uniform()(tokens, size, ratio, key_sample))
            shares = jax.nn.softmax(queries @ tokens.k.T + tokens.log_mass[None, :], axis=1)
            places = lax.top_k(jnp.where(tokens.mass > 0, jnp.sum(shares, axis=0), -1), size)[1]
            candidates.append(merged_around(tokens, places))
        return best_of(candidates, tokens, ratio, key_probes, queries=queries)


ALGORITHMS: Mapping[str, Algorithm] = {
    "guarded": Guarded(),
    "kmeans_nystrom": KMeansNystrom(),
    "kmeans_merge": KMeansMerge(),
    "farthest_merge": FarthestMerge(),
    "nystrom_rpc": PivotedNystrom(),
    "halving": Halving(),
    "stratified": Stratified(),
    "halving_fitted": FittedMasses(Halving()),
    "farthest_fitted": FittedMasses(Farthest()),
    "herding": Herding(),
    "thinformer": Compress(),
    "balance_kv": BalanceKV(),
    "subgen": SubGen(),
    "uniform": Uniform(),
    "value_norm": ValueNorm(),
}
