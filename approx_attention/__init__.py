"""Approximations of attention for JAX: one interface, one summary calculus, and errors that are measured."""

from approx_attention.api import attention
from approx_attention.block_sparse import BlockMap
from approx_attention.causal import RunningSummary, causal_state, running_moments
from approx_attention.certification import Certificate, certify
from approx_attention.checks import InputError, fold_scale
from approx_attention.compression import (
    attention_received,
    compress_cache,
    compress_tokens,
    pyramid_budgets,
    running_compressed,
    shared_sizes,
    token_budget,
)
from approx_attention.control_variates import control_variate_state
from approx_attention.decode import Cache, Decoder, HeadsCache, HeadsDecoder
from approx_attention.dimension import (
    DimensionBound,
    MinimalDimension,
    dimension_bound,
    minimal_dimension,
    one_dimensional_order,
    realizable_in_one_dimension,
)
from approx_attention.features import (
    CosineFeatures,
    PositiveFeatures,
    ReLUFeatures,
    TrigonometricFeatures,
    WeightedFeatures,
    gaussian_projection,
    orthogonal_projection,
)
from approx_attention.methods.baselines import (
    mean_value,
    running_uniform_sample,
    summarize_mean_value,
    summarize_uniform_sample,
    uniform_sample,
)
from approx_attention.methods.coreset import (
    compress,
    coreset,
    query_radius,
    running_coreset,
    sparse_coreset,
    summarize_coreset,
)
from approx_attention.methods.cosformer import cosformer, place_tokens, running_cosformer
from approx_attention.methods.eva import eva, running_eva
from approx_attention.methods.exact import exact, running_exact, summarize_exact
from approx_attention.methods.hyper import hyper_attention
from approx_attention.methods.lara import lara
from approx_attention.methods.linformer import (
    Convolution,
    LinformerPrefix,
    block_linformer,
    linformer,
    linformer_step,
    running_block_linformer,
    summarize_block_linformer,
)
from approx_attention.methods.local import local
from approx_attention.methods.nystrom import nystrom, skyformer, svd
from approx_attention.methods.polynomial import (
    TensorDecoder,
    polynomial_attention,
    running_polynomial,
    running_tensor_polynomial,
    summarize_polynomial,
    tensor_polynomial,
    tensor_support_basis,
)
from approx_attention.methods.pooling import mean_pool, running_mean_pool, summarize_mean_pool
from approx_attention.methods.ra import ra
from approx_attention.methods.random_features import (
    draw_favor,
    draw_rfa,
    favor,
    gate_tokens,
    rfa,
    running_favor,
    running_rfa,
    summarize_favor,
)
from approx_attention.methods.scatterbrain import scatterbrain
from approx_attention.methods.sketches import importance_sample, summarize_importance_sample, unreduced_jlt
from approx_attention.methods.sparse import bigbird, longformer, sparse_attention, sparse_plus_summary
from approx_attention.methods.tensor import determinant_attention, strassen_attention, tensor_attention
from approx_attention.methods.top_k import lsh_top_k, top_k
from approx_attention.monomials import IndexSet, MonomialFeatures, anisotropic, total_degree
from approx_attention.patterns import SparsePattern
from approx_attention.polynomials import choose_degree, exp_coefficients, ratio_range, weight_bound
from approx_attention.realization import Realization, fixed_projections, realize_sparse_pattern
from approx_attention.registry import METHODS, Capabilities, Method
from approx_attention.sketches import draw_sketch
from approx_attention.states import AttentionState, merge, subtract
from approx_attention.summaries import FeatureMoments, WeightedKV, attend, hadamard, summary_bytes
from approx_attention.tensor_sketches import ProductSketch, TensorSketch

__all__ = [
    "METHODS",
    "AttentionState",
    "BlockMap",
    "Cache",
    "Capabilities",
    "Certificate",
    "Convolution",
    "CosineFeatures",
    "Decoder",
    "DimensionBound",
    "FeatureMoments",
    "HeadsCache",
    "HeadsDecoder",
    "IndexSet",
    "InputError",
    "LinformerPrefix",
    "Method",
    "MinimalDimension",
    "MonomialFeatures",
    "PositiveFeatures",
    "ProductSketch",
    "ReLUFeatures",
    "Realization",
    "RunningSummary",
    "SparsePattern",
    "TensorDecoder",
    "TensorSketch",
    "TrigonometricFeatures",
    "WeightedFeatures",
    "WeightedKV",
    "anisotropic",
    "attend",
    "attention",
    "attention_received",
    "bigbird",
    "block_linformer",
    "causal_state",
    "certify",
    "choose_degree",
    "compress",
    "compress_cache",
    "compress_tokens",
    "control_variate_state",
    "coreset",
    "cosformer",
    "determinant_attention",
    "dimension_bound",
    "draw_favor",
    "draw_rfa",
    "draw_sketch",
    "eva",
    "exact",
    "exp_coefficients",
    "favor",
    "fixed_projections",
    "fold_scale",
    "gate_tokens",
    "gaussian_projection",
    "hadamard",
    "hyper_attention",
    "importance_sample",
    "lara",
    "linformer",
    "linformer_step",
    "local",
    "longformer",
    "lsh_top_k",
    "mean_pool",
    "mean_value",
    "merge",
    "minimal_dimension",
    "nystrom",
    "one_dimensional_order",
    "orthogonal_projection",
    "place_tokens",
    "polynomial_attention",
    "pyramid_budgets",
    "query_radius",
    "ra",
    "ratio_range",
    "realizable_in_one_dimension",
    "realize_sparse_pattern",
    "rfa",
    "running_block_linformer",
    "running_compressed",
    "running_coreset",
    "running_cosformer",
    "running_eva",
    "running_exact",
    "running_favor",
    "running_mean_pool",
    "running_moments",
    "running_polynomial",
    "running_rfa",
    "running_tensor_polynomial",
    "running_uniform_sample",
    "scatterbrain",
    "shared_sizes",
    "skyformer",
    "sparse_attention",
    "sparse_coreset",
    "sparse_plus_summary",
    "strassen_attention",
    "subtract",
    "summarize_block_linformer",
    "summarize_coreset",
    "summarize_exact",
    "summarize_favor",
    "summarize_importance_sample",
    "summarize_mean_pool",
    "summarize_mean_value",
    "summarize_polynomial",
    "summarize_uniform_sample",
    "summary_bytes",
    "svd",
    "tensor_attention",
    "tensor_polynomial",
    "tensor_support_basis",
    "token_budget",
    "top_k",
    "total_degree",
    "uniform_sample",
    "unreduced_jlt",
    "weight_bound",
]
