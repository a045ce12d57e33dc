"""The public names: where each is documented, and what its docstring says."""

import importlib
import inspect
import re
from typing import Any

import approx_attention
from approx_attention.registry import METHODS, Method

# Functions and classes that the registry does not name, on the page of the method that they belong to.
COMPANIONS = {
    "cosformer": ("methods.running_cosformer", "methods.place_tokens"),
    "linformer": ("methods.linformer_step", "methods.LinformerPrefix", "methods.Convolution"),
    "coreset": ("coresets.query_radius",),
    "rfa": ("methods.gate_tokens",),
}
# Packages all of whose names are public, and what each is for.
PACKAGES = {
    "bounds": "Certificates and closed-form errors: what is promised before anything is measured.",
    "distributed": "Sequences sharded over devices.",
    "nnx": "Attention and learned parts for Flax nnx.",
    "linen": "Attention for Flax linen.",
}
# Public mappings, which have no docstring of their own.
DATA = {
    "approx_attention.METHODS": "The methods by name: what :py:func:`approx_attention.attention` takes as ``method=``.",
    "approx_attention.coresets.ALGORITHMS": "The algorithms by name: what ``policy=`` and ``algorithm=`` take.",
}
# The other public names, by topic.
TOPICS = {
    "attention": (
        "Attention over batch and heads",
        "One call for any method, and the registry that knows what each can do.",
        (
            "attention", "Method", "Capabilities", "registry.bind", "registry.BoundMethod", "registry.HeadMethods",
            "InputError",
        ),
    ),
    "summaries": (
        "Summaries, answers and features",
        "The calculus that everything else is made of: summaries answer queries, summaries of disjoint keys merge.",
        (
            "fold_scale", "attend", "merge", "AttentionState", "WeightedKV", "QuantizedKV", "quantize",
            "FeatureMoments", "RunningSummary", "core.subtract", "core.hadamard", "core.summary_bytes",
            "core.causal_state", "core.running_moments",
            "core.control_variate_state", "core.PositiveFeatures", "Proposal", "fit_proposal", "balancing_maps",
            "core.TrigonometricFeatures", "core.ReLUFeatures",
            "core.CosineFeatures", "core.WeightedFeatures", "core.gaussian_projection", "core.orthogonal_projection",
            "core.draw_sketch", "core.nonnegative_least_squares", "kernels.state", "kernels.default_tiles",
            "kernels.export_checks",
        ),
    ),
    "decoding": (
        "Decoding and compression of caches",
        "Caches of bounded size, and policies that make few weighted tokens of many.",
        (
            "HeadsDecoder", "HeadsCache", "decoding.MixedDecoder", "decoding.MixedCache", "Decoder", "Cache",
            "compress_tokens", "compress_cache",
            "decoding.running_compressed", "decoding.attention_received", "decoding.token_budget",
            "decoding.pyramid_budgets", "decoding.shared_sizes", "decoding.Certificate", "decoding.CertifiedCache",
            "decoding.AttentionMatching", "decoding.Queries", "decoding.compress_heads", "decoding.CompressedDecoder",
        ),
    ),
    "coresets": (
        "Coresets",
        "The algorithms behind `coreset` and `compress_tokens`, as objects with their settings.",
        (
            "coresets.compress", "coresets.ALGORITHMS", "coresets.Uniform", "coresets.ValueNorm", "coresets.Halving",
            "coresets.Stratified", "coresets.sensitivities", "coresets.Compress", "coresets.BalanceKV",
            "coresets.Herding", "coresets.KMeansMerge", "coresets.FarthestMerge", "coresets.KMeansNystrom",
            "coresets.PivotedNystrom", "coresets.SubGen", "coresets.Guarded", "coresets.best_of", "coresets.Farthest",
            "coresets.FittedMasses", "coresets.refitted", "coresets.Clusters", "coresets.clusters_around",
            "coresets.running_clusters", "coresets.CertifiedSummary",
        ),
    ),
    "tensor": (
        "Attention over pairs of keys, and polynomials",
        "Tensor attention of any order, exactly and by polynomials of bounded logits.",
        (
            "tensor_attention", "tensor_polynomial", "tensor.tensor_support_basis", "determinant_attention",
            "strassen_attention", "tree_attention", "tensor.running_tensor_polynomial", "tensor.TensorDecoder",
            "tensor.exp_coefficients", "tensor.choose_degree", "tensor.ratio_range", "tensor.weight_bound",
            "tensor.IndexSet", "tensor.total_degree", "tensor.anisotropic", "tensor.MonomialFeatures",
            "tensor.TensorSketch", "tensor.ProductSketch",
        ),
    ),
    "patterns": (
        "Sparse patterns",
        "Patterns as what is computed.",
        ("SparsePattern", "sparse.BlockMap", "sparse_attention", "sparse_plus_summary"),
    ),
    "realization": (
        "What attention can express",
        "Patterns and weights that self-attention with few channels realises, and one unit of third order that decides "
        "Match3.",
        (
            "realize_sparse_pattern", "certify", "dimension_bound", "realization.fixed_projections",
            "realization.Realization", "realization.Certificate", "realization.DimensionBound",
            "realization.minimal_dimension", "realization.MinimalDimension", "realization.one_dimensional_order",
            "realization.realizable_in_one_dimension", "realization.row_centred", "realization.needed_head_dim",
            "realization.nearest_factors", "realization.realize_attention", "realization.Match3",
            "realization.match3_weights", "realization.match3_outputs", "realization.match3",
        ),
    ),
    "evaluation": (
        "Errors and times on your own tensors",
        "Errors against exact attention, adversarial queries, timings; and which method, of what size, for a tolerance "
        "and a budget: what `approx-attention plan` runs.",
        (
            "evaluation.compare", "evaluation.Arm", "evaluation.Comparison", "evaluation.output_error",
            "evaluation.OutputError", "evaluation.skill", "evaluation.sup_error", "evaluation.SupError",
            "evaluation.spectrum", "evaluation.Spectrum", "evaluation.time_interleaved", "evaluation.Timing",
            "evaluation.break_even", "evaluation.compile_arm", "evaluation.shared_programs", "evaluation.plan",
            "evaluation.Plan", "evaluation.Candidate", "evaluation.Curve", "evaluation.plan_document",
            "evaluation.plan_table", "evaluation.draw_plan", "evaluation.Tensors", "evaluation.Layer",
            "evaluation.load_tensors", "evaluation.load_layers", "evaluation.load_sample", "evaluation.save_layers",
            "evaluation.plan_model", "evaluation.ModelPlan", "evaluation.Policy", "evaluation.LayerPolicy",
            "evaluation.HeadChoice", "evaluation.check_policy", "evaluation.PolicyCheck", "evaluation.Measurement",
            "evaluation.diagnose", "evaluation.HeadDiagnosis",
        ),
    ),
}  # fmt: skip


def public_name(thing: Any) -> str:
    """The name of a function or class below `approx_attention`: its own at the root, else with its package."""
    name, package = thing.__name__, thing.__module__.split(".")[1]
    return name if name in approx_attention.__all__ else f"{package}.{name}"


def method_names(name: str) -> list[str]:
    """The public names on the page of a method: its own, and what makes its summaries, that no page before it has."""
    before = set()
    for other, method in METHODS.items():
        own = [public_name(part) for part in (method.function, method.summarize, method.running, method.draw) if part]
        own = [part for part in [*own, *COMPANIONS.get(other, ())] if part not in before]
        if other == name:
            return own
        before |= set(own)
    raise ValueError(f"{name!r} is not in METHODS")


def package_names(package: str) -> list[str]:
    """The public names of a package that is public as a whole."""
    return list(importlib.import_module(f"approx_attention.{package}").__all__)


def places() -> dict[str, str]:
    """Every documented name, dotted, and the page that documents it."""
    found = {"approx_attention.METHODS": "methods/index"}
    found |= {f"approx_attention.{part}": f"methods/{name}" for name in METHODS for part in method_names(name)}
    found |= {f"approx_attention.{part}": f"api/{topic}" for topic, (_, _, parts) in TOPICS.items() for part in parts}
    for package in PACKAGES:
        found |= {f"approx_attention.{package}.{part}": f"api/{package}" for part in package_names(package)}
    return found


def public_object(name: str) -> Any:
    """What a dotted name of `places` stands for."""
    module, _, last = name.rpartition(".")
    return getattr(importlib.import_module(module), last)


def first_line(thing: Any) -> str:
    """The first line of a docstring."""
    return (inspect.getdoc(thing) or "").split("\n", 1)[0]


def reference_section(thing: Any) -> str:
    """The text of the section Reference of a docstring."""
    match = re.search(r"^Reference:\n((?:    .*\n?|\n)+)", inspect.getdoc(thing) or "", re.MULTILINE)
    return " ".join(match.group(1).split()) if match else ""


def sources(method: Method) -> list[str]:
    """The citation keys of a method's docstring."""
    return list(dict.fromkeys(re.findall(r":cite:p:`(\w+)`", reference_section(method.function))))
