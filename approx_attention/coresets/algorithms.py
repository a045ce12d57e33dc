r"""Algorithms that make few weighted tokens of many: ``(tokens, size, ratio, key) ->`` `WeightedKV`.

``tokens`` are a `WeightedKV` without negative masses and with centred keys, ``size`` is smaller than their number, and
``ratio`` is the radius of the queries over that of the keys, of which the exponent s of the kernel
:math:`e^{s\, k \cdot k'}` is a part: half of it, unless an algorithm says otherwise. A token of mass 0 is absent, and a
coreset of absent tokens has mass 0.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from approx_attention import kernels
from approx_attention.core import WeightedKV, check_choice, check_number, check_positive, keep_count, squared_norm
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

# Tokens whose signs halving chooses together at least: smaller blocks err more at any size, and are hardly faster.
LEAST_BLOCK = 1024

Algorithm = Callable[[WeightedKV, int, Array, Array], WeightedKV]

Seeding = Literal["spread", "distant", "farthest", "random", "pivots"]
# The power of the distance in the odds of "distant": from 4 to 16 largest errors agree within their scatter.
DISTANT = 8.0
# (tokens, size, ratio, key) -> places of the first centres.
SEEDINGS: Mapping[Seeding, Callable[[WeightedKV, int, Array, Array], Array]] = {
    "spread": lambda tokens, size, ratio, key: spread_places(tokens, size, key),
    "distant": lambda tokens, size, ratio, key: spread_places(tokens, size, key, DISTANT),
    "farthest": lambda tokens, size, ratio, key: farthest_places(tokens.k, tokens.mass > 0, size),
    "random": lambda tokens, size, ratio, key: random_places(tokens.mass, size, key),
    "pivots": lambda tokens, size, ratio, key: cholesky_places(tokens, ratio, size, key),
}


@dataclasses.dataclass(frozen=True)
class Halving:
    """Discrepancy halving of neighbours, repeated until the size is reached.

    The sign rules control the norm of the kernel's sums; none carries a guarantee of 1/m for all queries at once.

    Attributes:
        rule: how signs are chosen: ``"greedy"`` one after the other, ``"search"`` for all pairs of a block at once
            (fewer steps in sequence, and at best as good), ``"walk"`` the self-balancing walk with the constants of its
            theorem, ``"thinning"`` kernel thinning.
        order: ``"tree"`` pairs neighbours in keys and values, ``"random"`` pairs tokens at random.
        block: tokens whose signs are chosen together, at a cost that grows with it. Below twice the size of the coreset
            the independent errors of blocks add up: by default it is twice the size, and 1024 at least.
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
        """A coreset of ``size`` tokens."""
        # Half of the exponent of the logits. In theory the whole one is best for queries of the given radius; measured,
        # a quarter, a half and the whole err alike (within 15 %), and twice is worse: a half has room on both sides.
        points = kernel_points(tokens, ratio / 2)
        key_order, key_signs = jax.random.split(key)
        if self.order == "tree":
            # One order serves all levels: the survivors of neighbouring pairs are neighbours.
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
    r"""Keeps the most sensitive tokens unchanged and halves the rest.

    The sensitivity of token j is its share of the normaliser for the query that points at it, estimated from a uniform
    sample (`sensitivities`). Halving alone fails on outliers: it may drop, in any round, the one key that some query
    weighs as much as all others.

    Attributes:
        share: the part of the coreset that the most sensitive tokens take.
        sample: the number of tokens from which normalisers are estimated.
        halving: the halving of the rest.
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
    r"""Kernel herding: each further token brings the kernel mean of the chosen nearest to that of all.

    After t tokens s the next has the greatest
    :math:`E_j \kappa_{ij} - \frac1{t+1} (\sum_s \kappa_{is} + \frac12 \kappa_{ii})`.
    """

    def __call__(self, tokens: WeightedKV, size: int, ratio: Array, key: Array) -> WeightedKV:
        """A coreset of ``size`` tokens."""
        points = kernel_points(tokens, ratio / 2)
        x, values, mass = points.x, points.values, points.mass
        # The largest exponential becomes 1, so that none overflows; a common factor changes no choice.
        shift = jnp.max(squared_norm(x))
        # The kernel's mean over all tokens is softmax attention of the points over themselves, without an S x S matrix.
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

        # When no token is free, all gains are -inf and a chosen one repeats; ``is_new`` gives it no mass.
        start = jnp.zeros_like(mean), mass > 0
        _, (place, is_new) = lax.scan(step, start, jnp.arange(size, dtype=mean.dtype))
        return rescaled(tokens_at(tokens, place, is_new.astype(mass.dtype)), tokens)


@dataclasses.dataclass(frozen=True)
class KMeansMerge:
    """Clusters of keys (k-means), each merged into its mean key with the sum of its values.

    Attributes:
        steps: steps of Lloyd's iteration; after the spread seeding one is as good as five.
        seeding: the first centres: a sample of tokens far from each other (``"spread"``), one that comes near to the
            farthest (``"distant"``), each the farthest from all before it (``"farthest"``, a step for each), a uniform
            sample (``"random"``), or pivots of the kernel (``"pivots"``, a step for each).
    """

    steps: int = 1
    seeding: Seeding = "spread"

    def __post_init__(self) -> None:
        keep_count(self, "steps")
        check_choice("seeding", self.seeding, tuple(SEEDINGS))

    def __call__(self, tokens: WeightedKV, size: int, ratio: Array, key: Array) -> WeightedKV:
        """A coreset of ``size`` tokens."""
        return k_means(tokens, SEEDINGS[self.seeding](tokens, size, ratio, key), self.steps)


@dataclasses.dataclass(frozen=True)
class Farthest:
    """Greedy k-center: tokens far from each other, each with the mass of all tokens to which it is the nearest."""

    def __call__(self, tokens: WeightedKV, size: int, ratio: Array, key: Array) -> WeightedKV:
        """A coreset of ``size`` tokens."""
        place = farthest_places(tokens.k, tokens.mass > 0, size)
        return tokens_at(tokens, place, merged_around(lax.stop_gradient(tokens), place).mass)


@dataclasses.dataclass(frozen=True)
class FarthestMerge:
    """Greedy k-center: centres far from each other, and every token merged into the nearest one."""

    def __call__(self, tokens: WeightedKV, size: int, ratio: Array, key: Array) -> WeightedKV:
        """A coreset of ``size`` tokens."""
        return merged_around(tokens, farthest_places(tokens.k, tokens.mass > 0, size))


@dataclasses.dataclass(frozen=True)
class KMeansNystrom:
    """Merged clusters whose masses and values are then solved for (Nystrom), which also fits keys between centres.

    Where the solution is worse than the merge on the queries that probe both (`best_of`), the merge is kept.

    Attributes:
        clusters: the algorithm of the landmarks.
        ridge: added to the diagonal of the landmarks' kernel, which is 1. From 1e-6 to 1e-3 errors in float32 agree to
            two digits with those in float64; the default is the largest of these.
    """

    clusters: KMeansMerge = KMeansMerge()
    ridge: float = 1e-3

    def __call__(self, tokens: WeightedKV, size: int, ratio: Array, key: Array) -> WeightedKV:
        """A coreset of ``size`` tokens."""
        # Exponent ratio / 2, as for halving: a quarter can blow up at large radii.
        merge = self.clusters(tokens, size, ratio, key)
        solved = with_nystrom_weights(tokens, merge, ratio / 2, self.ridge)
        return best_of([merge, solved], tokens, ratio, jax.random.fold_in(key, 1))


@dataclasses.dataclass(frozen=True)
class Guarded:
    """The best of a merge and its Nystrom weights, by their largest errors on queries that probe both.

    Neither is best everywhere: Nystrom weights win on smooth data, and a merge where queries are long for the number of
    landmarks. Queries that are known (`compress`) take the place of the probes. Then a uniform sample and a merge
    around the keys that they attend to most are tried too, which can be better on sharp heads and which probes, longer
    than most queries, would misjudge.

    Attributes:
        clusters: the algorithm of the landmarks.
        exponents: of the kernels of the Nystrom weights, one candidate each, in units of that of the logits. One of
            3/4 errs as the better of 1/2 and 1 does, for half of the time.
        ridge: as in `KMeansNystrom`.
    """

    clusters: KMeansMerge = KMeansMerge(seeding="distant")
    exponents: tuple[float, ...] = (0.75,)
    ridge: float = 1e-3

    reads_queries: ClassVar[bool] = True

    def __post_init__(self) -> None:
        exponents = self.exponents if isinstance(self.exponents, Sequence) else (self.exponents,)
        for name, x in (("ridge", self.ridge), *(("exponents", x) for x in exponents)):
            check_number(name, x)
            check_positive(name, x)
        # Hashable, as options of compiled programs must be.
        object.__setattr__(self, "exponents", tuple(float(x) for x in exponents))
        object.__setattr__(self, "ridge", float(self.ridge))

    def __call__(
        self, tokens: WeightedKV, size: int, ratio: Array, key: Array, queries: Array | None = None
    ) -> WeightedKV:
        """A coreset of ``size`` tokens."""
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
