"""The settings of coreset algorithms are checked when an algorithm is made."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention.coresets import BalanceKV, Compress, Guarded, KMeansNystrom, PivotedNystrom, Stratified, SubGen

FRACTIONS = [
    (kind, field.name)
    for kind in (Compress, BalanceKV, PivotedNystrom, SubGen, Stratified, KMeansNystrom, Guarded)
    for field in dataclasses.fields(kind)
    if isinstance(field.default, float)
]


@pytest.mark.parametrize(("kind", "name"), FRACTIONS)
def test_every_number_of_an_algorithm_is_checked_and_kept_as_a_float(kind, name):
    for bad in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match=f"{name} must be .*, got {bad}"):
            kind(**{name: bad})
    for bad in ("x", True, None):
        if bad is not None or name != "gamma":
            with pytest.raises(TypeError, match=f"{name} must be"):
                kind(**{name: bad})
    # Options of compiled programs are hashed.
    made = kind(**{name: jnp.float32(0.25)})
    assert type(getattr(made, name)) is float
    assert made == kind(**{name: 0.25})
