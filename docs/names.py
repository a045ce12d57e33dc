"""The public names: the page that documents each, and parts of its docstring."""

import importlib
import inspect
import re
from typing import Any

import approx_attention
from approx_attention.registry import METHODS, Method

# Functions and classes that the registry does not name, listed on the page of their method.
COMPANIONS = {
    "cosformer": ("methods.running_cosformer", "methods.place_tokens"),
    "linformer": ("methods.linformer_step", "methods.LinformerPrefix", "methods.Convolution"),
    "coreset": ("coresets.query_radius",),
    "rfa": ("methods.gate_tokens",),
}
# Public mappings, which cannot have a docstring.
DATA = {
    "approx_attention.METHODS": "The methods by name, for ``method=`` of :py:func:`approx_attention.attention`.",
    "approx_attention.coresets.ALGORITHMS": "The algorithms by name, for ``policy=`` and ``algorithm=``.",
}
# The pages of the API, one for each package: its purpose, and its public names that `approx_attention` does not also
# export; None for all. A name of `approx_attention` is on the page of the package that it comes from.
PACKAGES: dict[str, tuple[str, tuple[str, ...] | None]] = {
    "approx_attention": ("Attention over batch and heads, by any method.", ()),
    "registry": (
        "The capabilities of each method, and methods bound to their hyper-parameters.",
        ("bind", "BoundMethod", "HeadMethods"),
    ),
    "core": (
        "Summaries, attention states and features: summaries answer queries, and summaries of disjoint keys merge.",
        (
            "subtract", "hadamard", "summary_bytes", "causal_state", "running_moments", "control_variate_state",
            "PositiveFeatures", "TrigonometricFeatures", "ReLUFeatures", "CosineFeatures", "WeightedFeatures",
            "gaussian_projection", "orthogonal_projection", "draw_sketch", "nonnegative_least_squares",
        ),
    ),
    "decoding": (
        "Caches of bounded size, and policies that compress a cache to few weighted tokens.",
        (
            "MixedDecoder", "MixedCache", "running_compressed", "attention_received", "token_budget",
            "pyramid_budgets", "shared_sizes", "Certificate", "CertifiedCache", "AttentionMatching", "Queries",
            "compress_heads", "CompressedDecoder",
        ),
    ),
    "coresets": (
        "The algorithms behind `coreset` and `compress_tokens`, as objects with their settings.",
        (
            "compress", "ALGORITHMS", "Uniform", "ValueNorm", "Halving", "Stratified", "sensitivities", "Compress",
            "BalanceKV", "Herding", "KMeansMerge", "FarthestMerge", "KMeansNystrom", "PivotedNystrom", "SubGen",
            "Guarded", "best_of", "Farthest", "FittedMasses", "refitted", "Clusters", "clusters_around",
            "running_clusters", "CertifiedSummary",
        ),
    ),
    "tensor": (
        "Attention over tuples of keys: exactly, and by polynomials of bounded logits.",
        (
            "tensor_support_basis", "running_tensor_polynomial", "TensorDecoder", "exp_coefficients", "choose_degree",
            "ratio_range", "weight_bound", "IndexSet", "total_degree", "anisotropic", "MonomialFeatures",
            "TensorSketch", "ProductSketch",
        ),
    ),
    "sparse": ("Sparse patterns, and attention over their blocks.", ("BlockMap", "LiftedKV")),
    "realization": (
        "The expressive power of attention: patterns and weights with few channels, and a unit of third order that "
        "decides Match3.",
        (
            "fixed_projections", "Realization", "Certificate", "DimensionBound", "minimal_dimension",
            "MinimalDimension", "one_dimensional_order", "realizable_in_one_dimension", "row_centred",
            "needed_head_dim", "nearest_factors", "realize_attention", "Match3", "match3_weights", "match3_outputs",
            "match3",
        ),
    ),
    "bounds": ("Certificates and closed-form errors.", None),
    "evaluation": (
        "Errors against exact attention, adversarial queries and times on your tensors; and the choice of a method "
        "and a size for a tolerance and a budget.",
        (
            "compare", "Arm", "Comparison", "output_error", "OutputError", "skill", "sup_error", "SupError", "spectrum",
            "Spectrum", "time_interleaved", "Timing", "break_even", "compile_arm", "shared_programs", "plan", "Plan",
            "Candidate", "Curve", "plan_document", "plan_table", "draw_plan", "Tensors", "Layer", "load_tensors",
            "load_layers", "load_sample", "save_layers", "plan_model", "ModelPlan", "Policy", "LayerPolicy",
            "HeadChoice", "check_policy", "PolicyCheck", "Measurement", "diagnose", "HeadDiagnosis",
        ),
    ),
    "distributed": ("Sequences sharded over devices.", None),
    "nnx": ("Attention and learned parts for Flax nnx.", None),
    "linen": ("Attention for Flax linen.", None),
    "kernels": (
        "Softmax attention over tokens as one operation, with fused kernels for accelerators.",
        ("state", "default_tiles", "export_checks"),
    ),
}  # fmt: skip


def public_name(thing: Any) -> str:
    """The name of a function or class below `approx_attention`: without its package if exported at the root."""
    name, package = thing.__name__, thing.__module__.split(".")[1]
    return name if name in approx_attention.__all__ else f"{package}.{name}"


def method_names(name: str) -> list[str]:
    """The public names on the page of a method: itself and the makers of its summaries, unless on an earlier page."""
    before = set()
    for other, method in METHODS.items():
        own = [public_name(part) for part in (method.function, method.summarize, method.running, method.draw) if part]
        own = [part for part in [*own, *COMPANIONS.get(other, ())] if part not in before]
        if other == name:
            return own
        before |= set(own)
    raise ValueError(f"{name!r} is not in METHODS")


def package_names(package: str) -> list[str]:
    """The names on the page of a package, dotted from `approx_attention` on; exported names of the root come first."""
    own = PACKAGES[package][1]
    if own is None:
        own = tuple(importlib.import_module(f"approx_attention.{package}").__all__)
    with_pages = {part for name in METHODS for part in method_names(name)} | {"METHODS"}
    front = [name for name in approx_attention.__all__ if name not in with_pages and _page(name) == package]
    return front + [f"{package}.{name}" for name in own if f"{package}.{name}" not in with_pages]


def _page(name: str) -> str:
    """The package whose page documents a name of `approx_attention`."""
    package = getattr(approx_attention, name).__module__.split(".")[1]
    # Functions of `methods` that are not in the registry take a pattern; states are shared by all packages.
    package = {"methods": "sparse", "kernels": "core"}.get(package, package)
    return package if package in PACKAGES else "approx_attention"


def places() -> dict[str, str]:
    """Every documented name, dotted, with the page that documents it."""
    found = {"approx_attention.METHODS": "methods/index"}
    found |= {f"approx_attention.{part}": f"methods/{name}" for name in METHODS for part in method_names(name)}
    found |= {f"approx_attention.{part}": f"api/{page}" for page in PACKAGES for part in package_names(page)}
    return found


def public_object(name: str) -> Any:
    """The object with a dotted name of `places`."""
    module, _, last = name.rpartition(".")
    return getattr(importlib.import_module(module), last)


def first_line(thing: Any) -> str:
    """The first line of a docstring."""
    return (inspect.getdoc(thing) or "").split("\n", 1)[0]


def reference_section(thing: Any) -> str:
    """The text of the Reference section of a docstring."""
    match = re.search(r"^Reference:\n((?:    .*\n?|\n)+)", inspect.getdoc(thing) or "", re.MULTILINE)
    return " ".join(match.group(1).split()) if match else ""


def sources(method: Method) -> list[str]:
    """The citation keys of a method's docstring."""
    return list(dict.fromkeys(re.findall(r":cite:p:`(\w+)`", reference_section(method.function))))
