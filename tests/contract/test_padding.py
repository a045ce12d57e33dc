"""The contents of padding reach no output, gradient or summary; a query without keys gives 0."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import METHODS, attend
from tests.cases import ALL, PADDED_LENGTH, lifted_one_direction, one_direction, with_gradients
from tests.references import random_head


@one_direction
@pytest.mark.parametrize(
    "garbage", [np.nan, *(pytest.param(x, marks=pytest.mark.slow) for x in (np.inf, -np.inf, 1e30))]
)
def test_padding_never_reaches_outputs_or_gradients(name, is_causal, garbage):
    q, k, v = random_head(10, PADDED_LENGTH, PADDED_LENGTH, 8, 6)
    kv_mask = np.arange(PADDED_LENGTH) % 3 != 1
    clean = with_gradients(name, q, k, v, kv_mask=kv_mask, is_causal=is_causal)
    soiled = (np.where(kv_mask[:, None], x, np.float32(garbage)) for x in (k, v))
    chex.assert_tree_all_finite(clean)
    chex.assert_trees_all_equal(clean, with_gradients(name, q, *soiled, kv_mask=kv_mask, is_causal=is_causal))
    for gradient in clean[1][1:]:
        np.testing.assert_array_equal(np.asarray(gradient)[~kv_mask], 0)


@lifted_one_direction
def test_a_row_without_keys_is_zero_with_zero_gradient(name, is_causal):
    tensors, places = random_head(15, PADDED_LENGTH, PADDED_LENGTH, 8, 6), np.arange(PADDED_LENGTH)
    out, gradients = with_gradients(name, *tensors, kv_mask=places < 0, is_causal=is_causal)
    np.testing.assert_array_equal(out, 0)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0)
    if is_causal:
        out, _ = with_gradients(name, *tensors, kv_mask=places >= 3, is_causal=True)
        np.testing.assert_array_equal(out[:3], 0)
        assert np.all(np.abs(out[3:]).max(-1) > 0)


@pytest.mark.parametrize("name", [name for name in ALL if METHODS[name].summarize])
def test_padding_never_enters_a_summary(name):
    method = METHODS[name]
    q, k, v = random_head(25, 6, 20)
    kv_mask = np.arange(20) % 4 != 1
    hyperparameters = {method.size: 6} if method.size else {}

    @jax.jit
    def answer(k, v):
        return attend(q, method.summarize(k, v, jax.random.key(7), **hyperparameters, kv_mask=jnp.asarray(kv_mask)))

    soiled = (np.where(kv_mask[:, None], x, np.float32(np.nan)) for x in (k, v))
    chex.assert_trees_all_equal(answer(*soiled), answer(k, v))
