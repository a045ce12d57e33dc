"""The case of FAVOR+; tests/core tests its features and its causal form."""

import functools

import jax
import numpy as np

from approx_attention import Proposal, attention
from tests.methods.case import Case
from tests.references import as_array, random_heads

CASES = {
    "favor": Case(
        fast=True,
        changes={
            "features": "hyperbolic",
            "row_norm": "sqrt_dim",
            "projection": as_array(np.ones((3, 8))),
            "proposal": Proposal(as_array(np.full(8, 0.1)), as_array(1.2 * np.eye(8))),
        },
        devices={"num_features": 16, "block_size": 4},
    ),
}


def test_a_given_projection_takes_the_place_of_rng():
    tensors = random_heads(9, 2, 9, 11, 4, 2)
    projection = as_array(np.random.default_rng(0).normal(size=(6, 8)))
    call = jax.jit(functools.partial(attention, method="favor", projection=projection))
    np.testing.assert_array_equal(call(*tensors), call(*tensors, rng=jax.random.key(5)))
