"""What padding holds reaches no output, no gradient and no summary; a query without keys gives 0."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import METHODS, attend
from tests.cases import ALL, call, lifted_one_direction, one_direction
from tests.references import random_head


@one_direction
@pytest.mark.parametrize(
    "garbage", [np.nan, *(pytest.param(x, marks=pytest.mark.slow) for x in (np.inf, -np.inf, 1e30))]
)
def test_padding_never_reaches_outputs_or_gradients(name, is_causal, garbage):
    q, k, v = random_head(10, 9, 9)
    kv_mask = jnp.arange(9) % 3 != 1
    options = {"is_causal": True} if is_causal else {}

    @jax.jit
    def out_and_gradients(k, v):
        function = functools.partial(call, name, kv_mask=kv_mask, **options)
        out, vjp = jax.vjp(function, q, k, v)
        return out, vjp(jnp.ones_like(out))

    clean = out_and_gradients(k, v)
    hidden = ~np.asarray(kv_mask)
    soiled = out_and_gradients(k.at[hidden].set(garbage), v.at[hidden].set(garbage))
    chex.assert_tree_all_finite(clean)
    chex.assert_trees_all_equal(clean, soiled)
    for gradient in clean[1][1:]:
        np.testing.assert_array_equal(gradient[hidden], 0)


@lifted_one_direction
def test_a_row_without_keys_is_zero_with_zero_gradient(name, is_causal):
    q, k, v = random_head(15, 9, 9)
    options = {"is_causal": True} if is_causal else {}
    nothing = jnp.zeros(9, bool)
    out, vjp = jax.vjp(functools.partial(call, name, kv_mask=nothing, **options), q, k, v)
    np.testing.assert_array_equal(out, 0)
    for gradient in vjp(jnp.ones_like(out)):
        np.testing.assert_array_equal(gradient, 0)
    if is_causal:
        first_hidden = call(name, q, k, v, kv_mask=jnp.arange(9) >= 3, is_causal=True)
        np.testing.assert_array_equal(first_hidden[:3], 0)
        assert np.all(np.abs(first_hidden[3:]).max(-1) > 0)


@pytest.mark.parametrize("name", [name for name in ALL if METHODS[name].summarize])
def test_padding_never_enters_a_summary(name):
    method = METHODS[name]
    q, k, v = random_head(25, 6, 20)
    kv_mask = jnp.arange(20) % 4 != 1
    hyperparameters = {method.size: 6} if method.size else {}

    @jax.jit
    def answer(k, v):
        return attend(q, method.summarize(k, v, jax.random.key(7), **hyperparameters, kv_mask=kv_mask))

    soiled = (x.at[~np.asarray(kv_mask)].set(jnp.nan) for x in (k, v))
    chex.assert_trees_all_equal(answer(*soiled), answer(k, v))
