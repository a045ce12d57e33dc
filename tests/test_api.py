"""Options of `attention` that `jax.nn.dot_product_attention` lacks; tests/test_like_jax_nn.py has the others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import METHODS, attention, exact
from tests.forms import one_form
from tests.references import as_array, brute_force, random_heads

SHAPE = dict(batch=2, num_queries=9, num_keys=11, num_heads=4, num_kv_heads=2)


def test_the_heads_of_keys_may_differ_in_their_values_dimension():
    query, key, value = random_heads(3, **SHAPE)
    out = attention(query, key, as_array(np.asarray(value)[..., :3]), method="exact")
    assert out.shape == (2, 9, 4, 3)
    whole = attention(query, key, value, method="exact")
    np.testing.assert_allclose(out, np.asarray(whole)[..., :3], atol=2e-6)


def test_rows_past_the_query_length_are_zero_whatever_they_hold():
    query, key, value = random_heads(4, **SHAPE)
    soiled = np.array(query)
    soiled[0, 4:] = np.nan
    lengths = jnp.array([4, 9])

    def loss(query, key, value):
        out, lse = attention(query, key, value, method="exact", query_seq_lengths=lengths, return_residual=True)
        return jnp.sum(out) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0.0)), (out, lse)

    gradients, (out, lse) = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(soiled, key, value)
    np.testing.assert_array_equal(np.asarray(out)[0, 4:], 0)
    np.testing.assert_array_equal(np.asarray(lse)[0, 4:], -np.inf)
    assert all(np.all(np.isfinite(x)) for x in gradients)
    np.testing.assert_array_equal(np.asarray(gradients[0])[0, 4:], 0)


def test_no_key_at_all_gives_zero_where_jax_nn_gives_the_mean():
    tensors = random_heads(5, **SHAPE)
    out = attention(*tensors, method="exact", key_value_seq_lengths=jnp.array([0, 11]))
    np.testing.assert_array_equal(np.asarray(out)[0], 0)


def test_padding_masks_and_lengths_combine():
    tensors = random_heads(6, **SHAPE)
    mask = as_array((np.arange(11) != 2).reshape(1, 1, 1, 11), bool)
    both = np.asarray(attention(*tensors, mask=mask, method="exact", key_value_seq_lengths=jnp.array([5, 7])))
    for b, length in enumerate((5, 7)):
        kept = [j for j in range(length) if j != 2]
        query, key, value = (np.asarray(x)[b, :, n] for x, n in zip(tensors, (3, 1, 1), strict=True))
        np.testing.assert_allclose(both[b, :, 3], brute_force(query, key[kept], value[kept])[0], atol=2e-6)


def test_a_method_may_be_any_function():
    tensors = random_heads(7, **SHAPE)

    def first_value(q, k, v, key):
        return jnp.broadcast_to(v[:1], (q.shape[0], v.shape[1]))

    out = attention(*tensors, method=first_value)
    np.testing.assert_array_equal(np.asarray(out)[1, 5, 3], np.asarray(tensors[2])[1, 0, 1])
    with pytest.raises(NotImplementedError, match="'first_value' does not support is_causal"):
        attention(*tensors, method=first_value, is_causal=True)
    with pytest.raises(NotImplementedError, match="'first_value' does not support padding"):
        attention(*tensors, method=first_value, key_value_seq_lengths=jnp.array([3, 3]))
    bound = functools.partial(exact, is_causal=True)
    np.testing.assert_allclose(
        attention(*tensors, method=bound), attention(*tensors, method="exact", is_causal=True), atol=1e-6
    )
    with pytest.raises(TypeError, match="partial.*has no argument 'num_features'"):
        attention(*tensors, method=bound, num_features=3)


def test_the_heads_of_one_draw_are_independent_of_the_batch_and_of_each_other():
    alike = (as_array(np.repeat(x, 2, axis=2)) for x in random_heads(8, 1, 9, 9, 1, 1))
    out = np.asarray(attention(*alike, method="favor", rng=jax.random.key(0), num_features=8))
    assert np.abs(out[:, :, 0] - out[:, :, 1]).max() > 1e-3


@pytest.mark.slow
def test_at_once_equals_in_turn():
    tensors = random_heads(10, **SHAPE)
    for name in METHODS:
        function = functools.partial(attention, method=name, rng=jax.random.key(0))
        in_turn = function(*tensors)
        with one_form("default"):
            at_once = function(*tensors)
        np.testing.assert_allclose(at_once, in_turn, atol=2e-6)


def test_a_function_may_close_over_what_is_differentiated():
    q, k, v = random_heads(3, **SHAPE)

    def loss(scale):
        return (attention(q, k, v, method=lambda q, k, v, key: exact(q * scale, k, v)) ** 2).sum()

    compiled_loss = jax.jit(loss)
    expected = (compiled_loss(1.301) - compiled_loss(1.299)) / 0.002
    for gradient in (jax.grad(loss), jax.jit(jax.grad(loss)), jax.grad(compiled_loss)):
        np.testing.assert_allclose(gradient(1.3), expected, rtol=2e-2)


def test_an_empty_batch_has_empty_answers():
    tensors = random_heads(3, **{**SHAPE, "batch": 0})
    assert attention(*tensors, method="exact").shape == (0, 9, 4, 8)
