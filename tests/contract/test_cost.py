"""The declared cost counts the matrix products, and no array is [T, S] unless the method declares it."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest

from approx_attention import METHODS
from approx_attention.core import causal
from approx_attention.registry.table import svd_flops
from tests.cases import CAUSAL, lifted
from tests.programs import equations
from tests.references import having

pytestmark = pytest.mark.all_forms


def traced(name, length, size, **options):
    x = jax.ShapeDtypeStruct((length, 16), jnp.float32)
    hyperparameters = {METHODS[name].size: size} if METHODS[name].size else {}
    function = functools.partial(METHODS[name].function, **hyperparameters, **options)
    return jax.make_jaxpr(function)(x, x, x, jax.random.key(0)).jaxpr


# Methods whose time is quadratic and whose memory is not.
LINEAR_IN_MEMORY = ["exact", "top_k", "priority"]


@pytest.mark.parametrize(
    ("name", "is_causal"),
    [(name, name in CAUSAL) for name in having(subquadratic=True)]
    + [(name, is_causal) for name in LINEAR_IN_MEMORY for is_causal in (False, True)]
    + [pytest.param(name, False, marks=pytest.mark.slow) for name in having(subquadratic=True) if name in CAUSAL],
)
def test_no_array_is_quadratic(name, is_causal):
    # The limit of a group of blocks on accelerators, at a length at which a number for each query and 64 keys is more.
    length = 2**16
    assert largest_array(name, is_causal, length) <= causal.GROUP_NUMBERS < length**2 / 128


def largest_array(name, is_causal, num_queries):
    num_keys = num_queries * 3 // 4
    options = {"is_causal": True} if is_causal and name in CAUSAL else {}
    method = METHODS[name]
    hyperparameters = {method.size: 64} if method.size else {}

    def gradient(q, k, v):
        call = functools.partial(method.function, key=jax.random.key(0), **hyperparameters, **options)
        return jax.vjp(call, q, k, v)[1](jnp.ones((num_queries, 16)))

    q, k = (jax.ShapeDtypeStruct((length, 16), jnp.float32) for length in (num_queries, num_keys))
    return max(
        math.prod(x.aval.shape)
        for equation, _ in equations(jax.make_jaxpr(gradient)(q, k, k).jaxpr)
        for x in (*equation.invars, *equation.outvars)
        if hasattr(x.aval, "shape")
    )


@lifted
def test_declared_cost_is_that_of_the_products(name):
    length, size = 4096, 256
    flops = 0
    for equation, times in equations(traced(name, length, size)):
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            flops += 2 * times * depth * math.prod(equation.outvars[0].aval.shape)
        elif equation.primitive.name == "svd":
            flops += times * svd_flops(*equation.invars[0].aval.shape)
    declared = METHODS[name].cost(length, length, 16, 16, size)
    assert declared <= flops + 4 * length * 16
    assert flops <= 2.2 * declared + 4 * length * 16


@lifted
def test_the_declared_cost_is_quadratic_where_the_method_is(name):
    method = METHODS[name]
    short, long = (method.cost(n, n, 64, 64, 256) for n in (2**14, 2**15))
    assert (long > 3 * short) == (not method.capabilities.subquadratic)
