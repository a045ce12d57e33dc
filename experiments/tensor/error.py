"""The error of the polynomial method on clustered tensors, by degree, by rank, or by the largest logit."""

import dataclasses
import functools
import math
import pathlib
import statistics
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from rich.console import Console

from approx_attention import bounds, tensor_attention, tensor_polynomial
from approx_attention.tensor import (
    ProductSketch,
    TensorSketch,
    anisotropic,
    exp_coefficients,
    ratio_range,
    taken_by,
    total_degree,
    weight_bound,
)
from experiments.config import STRICT, Count, NonNegative, Positive, Seeded, Several, SeveralBy, Whole
from experiments.harness.long_context import slope
from experiments.tensor.inputs import Tensors, clustered, error_and_skill


@dataclasses.dataclass(frozen=True)
class FamilyConfig:
    """Polynomials of one kind: of some degrees, or of one degree at some sizes of a sketch, or of some ranks.

    Attributes:
        coefficients: as `exp_coefficients` names them; ``hermite`` takes the root mean square of the logits.
        degrees: of monomials of total degree, or the one of a sketch.
        ranks: of index sets for channels of unequal size, with Taylor coefficients, in place of degrees.
        sketch: the kind of random features beyond ``exact_degree``.
        sizes: how many of them there are for each degree.
    """

    coefficients: Literal["taylor", "chebyshev", "minimax", "hermite"] = "taylor"
    degrees: list[Count] = dataclasses.field(default_factory=list)
    ranks: list[Count] = dataclasses.field(default_factory=list)
    sketch: Literal["tensor", "product"] | None = None
    sizes: list[Count] = dataclasses.field(default_factory=list)
    exact_degree: Whole = 1

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        if bool(self.degrees) == bool(self.ranks):
            raise ValueError("a family has either 'degrees' or 'ranks'")
        if bool(self.sketch) != bool(self.sizes) or (self.sketch and len(self.degrees) != 1):
            raise ValueError("a sketch has one degree, and 'sizes'")
        if self.ranks and self.coefficients != "taylor":
            raise ValueError(f"ranks go with Taylor coefficients, not {self.coefficients}")


@dataclasses.dataclass(frozen=True)
class PolynomialErrorConfig(Seeded):
    """Clustered tensors with logits up to each of the bounds, and the polynomials by name.

    Attributes:
        by: what the results are listed by and plotted against.
        decay: factor from each channel to the next.
        bound_by: as in `clustered`.
        draws: over how many keys the squared error of a sketch is averaged.
    """

    families: SeveralBy[FamilyConfig]
    bounds: Several[Positive]
    by: Literal["degree", "rank", "bound"]
    length: Count = 256
    head_dim: Count = 8
    clusters: Count = 8
    noise: NonNegative = 0.3
    decay: Positive = 1.0
    bound_by: Literal["largest", "channels"] = "largest"
    draws: Count = 3


def run(config: PolynomialErrorConfig, directory: pathlib.Path, console: Console) -> dict[str, Any]:
    """Error, skill and certificate of every polynomial at every bound, in float64.

    ``certificate`` is the largest total variation of the weights for logits up to the bound, and ``worst`` the largest
    error of an output in units of the range of the values of its channel, which it bounds. Where there is neither a
    bound on the polynomial nor positive weights, it is None. ``logit_bound`` is what `bounds.logit_bound` knows of the
    largest logit without looking at pairs.
    """
    with jax.enable_x64(True):
        families: dict[str, Any] = {
            name: {what: {} for what in ("rank", "skill", "error", "certificate", "worst")} for name in config.families
        }
        trivial, known = {}, {}
        for bound in config.bounds:
            tensors = clustered(
                jax.random.key(config.seed), config.length, config.head_dim, bound, clusters=config.clusters,
                noise=config.noise, decay=config.decay, bound_by=config.bound_by, dtype=jnp.float64,
            )  # fmt: skip
            expected, uniform = tensor_attention(*tensors, scale=1.0), tensor_polynomial(*tensors, degree=0)
            known[f"{bound:g}"] = float(bounds.logit_bound(tensors.q, tensors.k, scale=1.0))
            trivial[f"{bound:g}"] = error_and_skill(uniform, expected, uniform)[0]
            for name, family in config.families.items():
                for degree, rank, certificate, outs in _answers(family, tensors, bound, config):
                    found = [error_and_skill(out, expected, uniform) for out in outs]
                    worst = max(float(jnp.max(jnp.abs(out - expected) / tensors.value_range[None, :])) for out in outs)
                    error, skill = (math.sqrt(statistics.fmean(x * x for x in xs)) for xs in zip(*found, strict=True))
                    figures = {"rank": rank, "skill": skill, "error": error, "worst": worst}
                    figures["certificate"] = certificate if math.isfinite(certificate) else None
                    label = str(degree if config.by == "degree" else rank)
                    for what, figure in figures.items():
                        families[name][what].setdefault(f"{bound:g}", {})[label] = figure
    return {
        "by": config.by,
        "families": families,
        "uniform": trivial,
        "logit_bound": known,
        "largest_share_of_certificate": _largest_share(families),
        "remainder": _remainder(config, families),
    }


def _answers(
    family: FamilyConfig, tensors: Tensors, bound: float, config: PolynomialErrorConfig
) -> Iterator[tuple[int, int, float, list[Any]]]:
    """Degree, rank, certificate, and the outputs of every draw, for each polynomial of a family."""
    rms, dtype = float(bounds.logit_rms(tensors.q, tensors.k, scale=1.0)), tensors.q.dtype
    for rank in family.ranks:
        indices, tail = anisotropic(tensors.channel_bounds.tolist(), rank)
        relative = tail * math.exp(bound)
        certificate = weight_bound(1 - relative, 1 + relative)
        taylor = jnp.asarray(exp_coefficients("taylor", indices.degree), dtype)
        yield indices.degree, rank, certificate, [_polynomial(tensors, taylor, indices)]
    for degree in family.degrees:
        numbers = taken_by(family.coefficients, bound=bound, rms=rms)
        coefficients = exp_coefficients(family.coefficients, degree, **numbers)
        if family.sketch is None:
            indices = total_degree(config.head_dim, degree)
            certificate = weight_bound(*ratio_range(coefficients, bound))
            yield degree, indices.size, certificate, [_polynomial(tensors, jnp.asarray(coefficients, dtype), indices)]
        for size in family.sizes:
            draw = {"tensor": TensorSketch.draw, "product": ProductSketch.draw}[family.sketch or ""]
            options: Any = {"order": 3, "exact_degree": family.exact_degree}
            maps = [
                draw(key, size, config.head_dim, degree, **options)
                for key in jax.random.split(jax.random.key(config.seed), config.draws)
            ]
            outs = [_sketched(tensors, jnp.asarray(coefficients, dtype), of) for of in maps]
            yield degree, maps[0][0].num_features, math.inf, outs


@functools.partial(jax.jit, static_argnums=2)
def _polynomial(tensors: Tensors, coefficients: Any, indices: Any) -> Any:
    return tensor_polynomial(*tensors, coefficients=coefficients, features=indices, scale=1.0)


@jax.jit
def _sketched(tensors: Tensors, coefficients: Any, maps: Any) -> Any:
    return tensor_polynomial(*tensors, coefficients=coefficients, features=maps, scale=1.0)


def _largest_share(families: dict[str, Any]) -> float | None:
    """How close an error comes to its certificate at most: above 1 the certificate would be wrong."""
    shares = [
        family["worst"][bound][label] / certificate
        for family in families.values()
        for bound, by_label in family["certificate"].items()
        for label, certificate in by_label.items()
        if certificate
    ]
    return max(shares, default=None)


def _remainder(config: PolynomialErrorConfig, families: dict[str, Any]) -> dict[str, Any]:
    r"""The power of Taylor's remainder :math:`\beta^{g+1} / (g+1)!` that errors fall with, for each bound."""
    powers = {}
    for name, family in config.families.items():
        if family.coefficients != "taylor" or family.sketch or not family.degrees:
            continue
        for bound in config.bounds:
            remainders = [bound ** (g + 1) / math.factorial(g + 1) for g in family.degrees]
            errors = families[name]["skill"][f"{bound:g}"].values()
            powers.setdefault(name, {})[f"{bound:g}"] = slope(dict(zip(remainders, errors, strict=True)))
    return powers
