"""What attention can express: patterns that few channels realise, certification, dimension, the low-rank bottleneck."""

from approx_attention.realization.bottleneck import needed_head_dim, realize_attention
from approx_attention.realization.certification import Certificate, certify
from approx_attention.realization.constructions import (
    Realization,
    draw_until_accepted,
    fixed_projections,
    realize_sparse_pattern,
)
from approx_attention.realization.dimension import (
    DimensionBound,
    MinimalDimension,
    dimension_bound,
    failure_bound,
    log_t_tail,
    minimal_dimension,
    one_dimensional_order,
    realizable_in_one_dimension,
)
from approx_attention.realization.match3 import match3, match3_outputs, match3_weights

__all__ = [
    "Certificate",
    "DimensionBound",
    "MinimalDimension",
    "Realization",
    "certify",
    "dimension_bound",
    "draw_until_accepted",
    "failure_bound",
    "fixed_projections",
    "log_t_tail",
    "match3",
    "match3_outputs",
    "match3_weights",
    "minimal_dimension",
    "needed_head_dim",
    "one_dimensional_order",
    "realizable_in_one_dimension",
    "realize_attention",
    "realize_sparse_pattern",
]
