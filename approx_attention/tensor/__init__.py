"""Attention over pairs and tuples of keys, exactly and by polynomials for bounded logits."""

from approx_attention.tensor.exact import determinant_attention, strassen_attention, tensor_attention
from approx_attention.tensor.inputs import tensor_inputs
from approx_attention.tensor.kernels import Kernel
from approx_attention.tensor.monomials import IndexSet, MonomialFeatures, anisotropic, total_degree
from approx_attention.tensor.polynomial import tensor_polynomial, tensor_support_basis
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
from approx_attention.tensor.running import TensorDecoder, running_tensor_polynomial
from approx_attention.tensor.sketches import ProductSketch, TensorSketch

__all__ = [
    "MAX_DEGREE",
    "Coefficients",
    "IndexSet",
    "Kernel",
    "MonomialFeatures",
    "ProductSketch",
    "TensorDecoder",
    "TensorSketch",
    "anisotropic",
    "check_taken",
    "choose_degree",
    "determinant_attention",
    "exp_coefficients",
    "minimax_error",
    "num_coefficients",
    "ratio_range",
    "running_tensor_polynomial",
    "strassen_attention",
    "taken_by",
    "tensor_attention",
    "tensor_inputs",
    "tensor_polynomial",
    "tensor_support_basis",
    "total_degree",
    "weight_bound",
]
