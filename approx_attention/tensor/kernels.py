"""Polynomial kernels of a multilinear form, as features of queries and of each set of keys."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from approx_attention.core import (
    FeatureMap,
    FeatureMoments,
    check_count,
    check_finite,
    hadamard,
)
from approx_attention.tensor.inputs import TensorInputs
from approx_attention.tensor.monomials import IndexSet, MonomialFeatures, total_degree
from approx_attention.tensor.polynomials import Coefficients, check_taken, exp_coefficients, num_coefficients


class Kernel(NamedTuple):
    """A polynomial of a multilinear form as features: maps of queries and of each set of keys, and weights.

    Attributes:
        query_map: the feature map of queries, to R features.
        key_maps: the feature map of each of the m - 1 sets of keys.
        weights: the weights of products of features, ``[R]``, of any sign.
    """

    query_map: FeatureMap
    key_maps: tuple[FeatureMap, ...]
    weights: Array

    @classmethod
    def of(
        cls,
        head_dim: int,
        num_sets: int,
        degree: int | None,
        coefficients: Coefficients | Sequence[float] | Array | np.ndarray,
        bound: float | None,
        rms: float | None,
        features: Any,
        dtype: Any,
    ) -> "Kernel":
        """Make the kernel from hyper-parameters of `tensor_polynomial`.

        Args:
            head_dim: the number D of channels.
            num_sets: the number m - 1 of sets of keys.
            degree: as in `tensor_polynomial`.
            coefficients: as in `tensor_polynomial`.
            bound: as in `tensor_polynomial`.
            rms: as in `tensor_polynomial`.
            features: as in `tensor_polynomial`.
            dtype: dtype of the weights.

        Raises:
            ValueError: a degree that is not that of the coefficients or of the features, a wrong number of maps or of
                channels.
            TypeError: features of another type.
        """
        head_dim = check_count("head_dim", head_dim)
        if isinstance(features, tuple):
            if len(features) != num_sets + 1:
                raise ValueError(f"features must be {num_sets + 1} maps, that of queries first, got {len(features)}")
            maps = features
        else:
            if features is None:
                features = total_degree(head_dim, _degree(degree, coefficients))
            if not isinstance(features, IndexSet):
                raise TypeError(f"features must be an IndexSet, a tuple of maps or None, got {type(features).__name__}")
            if features.dim != head_dim:
                raise ValueError(f"features must be an IndexSet with D = {head_dim} channels, got {features.dim}")
            # One map of monomials serves queries and all keys.
            maps = (MonomialFeatures(features),) * (num_sets + 1)
        if degree not in (None, maps[0].degree):
            raise ValueError(f"degree must be that of the features, {maps[0].degree}, got {degree}")
        if isinstance(coefficients, str):
            coefficients = exp_coefficients(coefficients, maps[0].degree, bound=bound, rms=rms)
        else:
            check_taken(coefficients, bound=bound, rms=rms)
            for number in (coefficients,) if hasattr(coefficients, "dtype") else coefficients:
                check_finite("coefficients", number)
        return cls(maps[0], tuple(maps[1:]), maps[0].weights(jnp.asarray(coefficients, dtype), dtype=dtype))

    def summarize(self, inputs: TensorInputs) -> FeatureMoments:
        """The moments of all tuples with one key from each set."""
        tokens = zip(self.key_maps, inputs.keys, inputs.values, inputs.masks, strict=True)
        # The sum over tuples is the product of the sums over sets. Weights of any sign are applied once, at the end.
        product = hadamard(*(FeatureMoments.of_tokens(*each) for each in tokens))
        return product.reweighted(self.weights, self.query_map)


def _degree(degree: int | None, coefficients: Any) -> int:
    """The requested degree, which coefficients given as numbers determine."""
    if isinstance(coefficients, str):
        return 2 if degree is None else check_count("degree", degree, 0)
    told = num_coefficients(coefficients) - 1
    if degree not in (None, told):
        raise ValueError(f"degree must be {told}, that of the {told + 1} coefficients, got {degree}")
    return told
