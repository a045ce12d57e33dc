"""The error of the polynomial method on clustered tensors, by degree, by rank, or by the largest logit."""

import dataclasses
import functools
import math
import pathlib
import statistics
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console

from approx_attention import bounds, tensor_attention, tensor_polynomial
from approx_attention.evaluation import method_styles
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
from experiments.fits import slope
from experiments.results import Frame, Record
from experiments.show import curves, having, label, markdown, significant
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
class Config(Seeded):
    """Clustered tensors with logits up to each of the bounds, and the polynomials by name.

    Attributes:
        decay: factor from each channel to the next.
        bound_by: as in `clustered`.
        draws: over how many keys the squared error of a sketch is averaged.
    """

    families: SeveralBy[FamilyConfig]
    bounds: Several[Positive]
    length: Count = 256
    head_dim: Count = 8
    clusters: Count = 8
    noise: NonNegative = 0.3
    decay: Positive = 1.0
    bound_by: Literal["largest", "channels"] = "largest"
    draws: Count = 3


def run(config: Config, directory: pathlib.Path, console: Console) -> list[Record]:
    """Error, skill and certificate of every polynomial at every bound, in float64.

    ``certificate`` is the largest total variation of the weights for logits up to the bound, and ``worst`` the largest
    error of an output in units of the range of the values of its channel, which it bounds; NaN without a bound on the
    polynomial and without positive weights. ``logit_bound`` is what `bounds.logit_bound` knows of the largest logit
    without looking at pairs.
    """
    records: list[Record] = []
    shares = []
    skills: dict[tuple[str, float], dict[float, float]] = {}
    with jax.enable_x64(True):
        for bound in config.bounds:
            tensors = clustered(
                jax.random.key(config.seed), config.length, config.head_dim, bound, clusters=config.clusters,
                noise=config.noise, decay=config.decay, bound_by=config.bound_by, dtype=jnp.float64,
            )  # fmt: skip
            expected, uniform = tensor_attention(*tensors, scale=1.0), tensor_polynomial(*tensors, degree=0)
            known = float(bounds.logit_bound(tensors.q, tensors.k, scale=1.0))
            trivial = error_and_skill(uniform, expected, uniform)[0]
            records.append({"bound": bound, "uniform_error": trivial, "logit_bound": known})
            for name, family in config.families.items():
                for degree, rank, certificate, outs in _answers(family, tensors, bound, config):
                    found = [error_and_skill(out, expected, uniform) for out in outs]
                    worst = max(float(jnp.max(jnp.abs(out - expected) / tensors.value_range[None, :])) for out in outs)
                    error, skill = (math.sqrt(statistics.fmean(x * x for x in xs)) for xs in zip(*found, strict=True))
                    certificate = certificate if 0 < certificate < math.inf else math.nan
                    # How close an error comes to its certificate: above 1 the certificate would be wrong.
                    shares += [] if math.isnan(certificate) else [worst / certificate]
                    figures = {"skill": skill, "error": error, "worst": worst, "certificate": certificate}
                    records.append({"family": name, "bound": bound, "degree": degree, "rank": rank, **figures})
                    if family.coefficients == "taylor" and not family.sketch and family.degrees:
                        # The power of Taylor's remainder beta^(g + 1) / (g + 1)! that errors fall with.
                        remainder = bound ** (degree + 1) / math.factorial(degree + 1)
                        skills.setdefault((name, bound), {})[remainder] = skill
    for (name, bound), by in skills.items():
        records.append({"family": name, "bound": bound, **slope(by, "remainder_power")})
    return [*records, {"largest_share_of_certificate": max(shares, default=math.nan)}]


def _answers(
    family: FamilyConfig, tensors: Tensors, bound: float, config: Config
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


def table(records: Frame) -> Iterable[str]:
    """Errors of every polynomial, a table for each configuration and bound."""
    found = having(records, "family", "rank")
    trivial = having(records, "uniform_error")
    for (name, bound), own in found.groupby(["configuration", "bound"], sort=False):
        here = trivial[(trivial["configuration"] == name) & (trivial["bound"] == bound)]
        uniform, known = (significant(list(here[figure])) for figure in ("uniform_error", "logit_bound"))
        yield (
            f"`{name}`: logits up to {bound:g} (known without looking at pairs: {known}); uniform weights have error "
            f"{uniform}, and skill error 1"
        )
        rows = []
        for (family, rank), of in own.groupby(["family", "rank"], sort=False):
            degree = f"{of['degree'].iloc[0]:g}" if "degree" in of and of["degree"].notna().all() else ""
            figures = [significant(list(of[figure])) for figure in ("skill", "error", "worst")]
            certificate = of["certificate"] if "certificate" in of else pd.Series([math.nan])
            shown = "" if certificate.isna().any() else significant(list(certificate))
            rows.append([family, degree, f"{rank:g}", *figures, shown])
        yield markdown("polynomial|degree|rank|skill error|error|worst output|certificate", rows)


def figure(records: Frame) -> Figure:
    """Worst outputs with their certificates by degree, or skill by rank, or by bound: by what the study varies."""
    found = having(records, "family", "rank")
    groups = found.groupby(["configuration", "seed", "family", "bound"])
    by = "bound" if groups.size().max() == 1 else "rank"
    # Sketches of several sizes have one degree, and index sets of given ranks have none.
    if by == "rank" and "degree" in found and (groups["degree"].nunique() == groups.size()).all():
        by = "degree"
    if by == "bound":
        panel = found["configuration"]
    else:
        panel = [
            f"{name}, logits up to {bound:g}"
            for name, bound in zip(found["configuration"], found["bound"], strict=True)
        ]
    shown = found.assign(panel=panel)
    styles = method_styles(dict.fromkeys(found["family"]))

    def more(axes: Any, _: Any, own: Frame) -> None:
        if by != "degree":
            axes.axhline(1, color="0.5", linewidth=0.8)
            return
        for name, of in own.dropna(subset="certificate").groupby("family", sort=False):
            line = of.groupby("degree")["certificate"].mean()
            axes.plot(line.index, line, color=styles[name]["color"], linestyle=":", linewidth=1)

    worst = "worst output over range of values (dotted: certificate)"
    return curves(
        shown,
        x=by,
        y="worst" if by == "degree" else "skill",
        by="family",
        panel="panel",
        labels=(
            {"degree": "degree", "rank": "rank", "bound": "largest logit"}[by],
            worst if by == "degree" else "skill error",
        ),
        scales=("linear" if by == "degree" else "log", "log"),
        ticks=label if by == "degree" else None,
        each=more,
    )
