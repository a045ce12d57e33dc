"""A window of exact third-order attention against the polynomial method over all tokens, at equal operations."""

import dataclasses
import math
import pathlib
from typing import Any, Literal

import jax
from rich.console import Console

from approx_attention import tensor_attention, tensor_polynomial
from approx_attention.core import in_float32
from experiments.config import Count, NonNegative, Positive, Seeded, Several
from experiments.tensor.inputs import clustered, error_and_skill


@dataclasses.dataclass(frozen=True)
class WindowConfig(Seeded):
    """Causal clustered tensors, and the degrees whose operations a window gets."""

    degrees: Several[Count]
    order: Literal["mixed", "segments"]
    bound: Positive
    length: Count = 512
    head_dim: Count = 8
    clusters: Count = 8
    noise: NonNegative = 0.3


def run(config: WindowConfig, directory: pathlib.Path, console: Console) -> dict[str, Any]:
    """Error and skill of both by the rank of the polynomial, against causal attention over all pairs.

    A polynomial of rank r takes 6 r (Dv + 1) operations for each token and a window of w tokens 2 w^2 (D + Dv).
    """
    dim = config.head_dim
    tensors = clustered(
        jax.random.key(config.seed),
        config.length,
        dim,
        config.bound,
        clusters=config.clusters,
        noise=config.noise,
        order=config.order,
    )
    with in_float32():
        expected = tensor_attention(*tensors, scale=1.0, is_causal="both")
    uniform = tensor_polynomial(*tensors, degree=0, is_causal="both")
    methods: dict[str, Any] = {name: {"error": {}, "skill": {}} for name in ("window", "polynomial")}
    windows = {}
    for degree in config.degrees:
        rank = math.comb(dim + degree, degree)
        windows[str(rank)] = window = min(config.length, max(1, round(math.sqrt(3 * rank * (dim + 1) / (2 * dim)))))
        outs = {
            "window": tensor_attention(*tensors, scale=1.0, is_causal="both", window=window),
            "polynomial": tensor_polynomial(*tensors, scale=1.0, degree=degree, is_causal="both"),
        }
        for name, out in outs.items():
            error, skill = error_and_skill(out, expected, uniform)
            methods[name]["error"][str(rank)] = error
            methods[name]["skill"][str(rank)] = skill
    return {"methods": methods, "windows": windows, "uniform": error_and_skill(uniform, expected, uniform)[0]}
