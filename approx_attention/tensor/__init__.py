"""Attention over pairs and tuples of keys: its inputs, exact forms, polynomials, monomials and their sketches."""

from approx_attention.tensor.exact import (
    determinant_attention,
    determinant_channels,
    strassen_attention,
    strassen_channels,
    tensor_attention,
)
from approx_attention.tensor.inputs import TensorInputs, check_causal, scaled, tensor_inputs, tensor_state
from approx_attention.tensor.monomials import IndexSet, MonomialFeatures, anisotropic, monomials, total_degree
from approx_attention.tensor.polynomials import (
    MAX_DEGREE,
    Coefficients,
    check_taken,
    choose_degree,
    exp_coefficients,
    minimax_error,
    num_coefficients,
    ratio_range,
    taken_by,
    weight_bound,
)
from approx_attention.tensor.sketches import ProductSketch, TensorSketch

__all__ = [
    "MAX_DEGREE",
    "Coefficients",
    "IndexSet",
    "MonomialFeatures",
    "ProductSketch",
    "TensorInputs",
    "TensorSketch",
    "anisotropic",
    "check_causal",
    "check_taken",
    "choose_degree",
    "determinant_attention",
    "determinant_channels",
    "exp_coefficients",
    "minimax_error",
    "monomials",
    "num_coefficients",
    "ratio_range",
    "scaled",
    "strassen_attention",
    "strassen_channels",
    "taken_by",
    "tensor_attention",
    "tensor_inputs",
    "tensor_state",
    "total_degree",
    "weight_bound",
]
