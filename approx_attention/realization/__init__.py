"""The expressiveness of attention: realised patterns, certificates, dimension, the low-rank bottleneck, Match3."""

from approx_attention.realization.bottleneck import nearest_factors, needed_head_dim, realize_attention, row_centred
from approx_attention.realization.certification import Certificate, certify
from approx_attention.realization.constructions import Realization, fixed_projections, realize_sparse_pattern
from approx_attention.realization.dimension import (
    DimensionBound,
    MinimalDimension,
    dimension_bound,
    failure_bound,
    minimal_dimension,
    one_dimensional_order,
    realizable_in_one_dimension,
)
from approx_attention.realization.match3 import Match3, match3, match3_outputs, match3_weights

__all__ = [
    "Certificate",
    "DimensionBound",
    "Match3",
    "MinimalDimension",
    "Realization",
    "certify",
    "dimension_bound",
    "failure_bound",
    "fixed_projections",
    "match3",
    "match3_outputs",
    "match3_weights",
    "minimal_dimension",
    "nearest_factors",
    "needed_head_dim",
    "one_dimensional_order",
    "realizable_in_one_dimension",
    "realize_attention",
    "realize_sparse_pattern",
    "row_centred",
]
