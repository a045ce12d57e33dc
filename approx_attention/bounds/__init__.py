"""Bounds and closed forms for the errors of estimates, with their assumptions."""

from approx_attention.bounds.coresets import (
    CoresetSize,
    Sensitivity,
    coreset_size_bound,
    sensitivity,
)
from approx_attention.bounds.estimates import favor_mse, johnson_lindenstrauss_size, row_sample_mse, sketch_mse
from approx_attention.bounds.merges import MergeBound, merge_bound, merge_bound_at
from approx_attention.bounds.tensors import TensorCertificate, logit_bound, logit_rms, tensor_certificate

__all__ = [
    "CoresetSize",
    "MergeBound",
    "Sensitivity",
    "TensorCertificate",
    "coreset_size_bound",
    "favor_mse",
    "johnson_lindenstrauss_size",
    "logit_bound",
    "logit_rms",
    "merge_bound",
    "merge_bound_at",
    "row_sample_mse",
    "sensitivity",
    "sketch_mse",
    "tensor_certificate",
]
