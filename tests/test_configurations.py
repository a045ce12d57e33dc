"""Every method under users' configurations of JAX: strict promotion, float64 enabled, NaN checks, and no jit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import METHODS
from tests.cases import DIRECTIONS, settings

pytestmark = pytest.mark.all_forms

LENGTH = 12
forms = pytest.mark.parametrize(("name", "is_causal"), DIRECTIONS)


def options_of(name, is_causal, **more):
    method = METHODS[name]
    capabilities = method.capabilities
    key = jax.random.key(3) if capabilities.needs_key or capabilities.takes_key else None
    causal = {"is_causal": True} if is_causal else {}
    if not capabilities.padding:
        more.pop("kv_mask", None)
    return key, {**settings(name), **causal, **more}


def cases(name, is_causal):
    """Calls with each of the shared arguments, and with given noise if the method takes any."""
    yield options_of(name, is_causal)
    yield options_of(name, is_causal, kv_mask=jnp.arange(LENGTH) < 7, scale=jnp.float32(0.3))
    if name == "lara":
        for weights in ("query_specific", "biased"):
            yield options_of(name, is_causal, weights=weights)
    if name in ("uniform_sample", "skyformer"):
        size = LENGTH if name == "uniform_sample" else 2 * LENGTH
        yield None, options_of(name, is_causal, noise=jnp.linspace(0, 1, size, dtype=jnp.float32))[1]


def with_a_number(name, is_causal):
    """A call with a scale that is a Python number, like the default one, for tests of outputs alone."""
    return options_of(name, is_causal, kv_mask=jnp.arange(LENGTH) < 7, scale=0.3)


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@forms
def test_float32_stays_float32_where_float64_is_enabled(name, is_causal, x64):
    x = jax.ShapeDtypeStruct((LENGTH, 4), jnp.float32)
    for key, options in (*cases(name, is_causal), with_a_number(name, is_causal)):
        # One case of each method, and those with arguments of their own.
        with_gradient = isinstance(options.get("scale"), jax.Array) or {"weights", "noise"} & options.keys()

        def total(q, k, v, key=key, options=options):
            return jnp.sum(METHODS[name].function(q, k, v, key, **options))

        function = jax.value_and_grad(total, argnums=(0, 1, 2)) if with_gradient else total
        program = jax.make_jaxpr(function)(x, x, x)
        assert {aval.dtype for aval in program.out_avals} == {np.dtype(np.float32)}
        # Python numbers are float64 in name only: they take the type of the other operand.
        wide = [
            equation
            for equation in equations(program.jaxpr)
            for out in equation.outvars
            if getattr(out.aval, "dtype", None) == jnp.float64 and not out.aval.weak_type
        ]
        assert not wide, wide[:3]


@forms
def test_float64_is_computed_in_float64(name, is_causal, x64):
    x = jax.ShapeDtypeStruct((LENGTH, 4), jnp.float64)
    for key, options in cases(name, is_causal):  # the default scale is a Python number too
        out = jax.eval_shape(
            lambda q, k, v, key=key, options=options: METHODS[name].function(q, k, v, key, **options), x, x, x
        )
        assert out.dtype == jnp.float64


def tensors():
    random = np.random.default_rng(0)
    return [jnp.asarray(random.normal(size=(LENGTH, 4)), jnp.float32) for _ in range(3)]


@pytest.mark.slow
@forms
def test_no_nan_arises_inside(name, is_causal):
    key, options = options_of(name, is_causal, kv_mask=jnp.arange(LENGTH) < 7)

    def total(q, k, v):
        return jnp.sum(METHODS[name].function(q, k, v, key, **options))

    with jax.debug_nans(True):
        value, gradient = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(*tensors())
    assert np.isfinite(value)
    assert all(np.isfinite(x).all() for x in gradient)


@pytest.mark.slow
@forms
def test_without_jit_outputs_are_the_same(name, is_causal):
    key, options = options_of(name, is_causal, kv_mask=jnp.arange(LENGTH) < 7)

    def call(q, k, v):
        return METHODS[name].function(q, k, v, key, **options)

    expected = jax.jit(call)(*tensors())
    with jax.disable_jit():
        found = call(*tensors())
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)
