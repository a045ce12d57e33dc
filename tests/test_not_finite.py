"""A NaN reaches the outputs that see it and no others: what is hidden is selected away, never multiplied by 0."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import (
    WeightedKV,
    eva,
    sparse_plus_summary,
    summarize_favor,
    tensor_attention,
    tensor_polynomial,
)
from approx_attention.core import HIDDEN, PositiveFeatures, kernel_state
from approx_attention.coresets import Clusters, compress, merged
from approx_attention.evaluation import spectrum
from approx_attention.nnx import Hedgehog
from approx_attention.sparse import BlockMap
from tests.references import as_array, compiled, random_head, random_heads

KEY = jax.random.key(3)


def soiled_at(x, at, number=np.nan):
    """The rows with one that is not finite."""
    soiled = np.array(x)
    soiled[at] = number
    return soiled


def lost_rows(out):
    return np.flatnonzero(~np.isfinite(np.asarray(out)).all(-1)).tolist()


@pytest.mark.parametrize("num_samples", [1, 2])
def test_a_chunk_of_eva_with_little_mass_shows_its_nan(num_samples):
    q, k, v = map(np.array, random_head(0, 32, 32, 4))
    # The last chunk has a weight that underflows for every query.
    q = np.abs(q)
    k[28:] = -300 * q.sum(0)
    call = functools.partial(eva, window_size=8, chunk_size=4, exclude_local=False, num_samples=num_samples)
    assert lost_rows(jax.jit(call)(q, k, soiled_at(v, 30), KEY)) == list(range(32))


@pytest.mark.parametrize("num_samples", [1, 2])
def test_a_chunk_of_eva_that_is_hidden(num_samples):
    q, k, v = random_head(0, 32, 32, 4)
    options = {"window_size": 8, "chunk_size": 4, "is_causal": True, "exclude_local": False, "num_samples": num_samples}
    call = jax.jit(functools.partial(eva, key=KEY, **options))
    clean = np.asarray(call(q, k, v))
    for at in (13, 31):
        out = np.asarray(call(q, soiled_at(k, at), v))
        np.testing.assert_array_equal(out[:at], clean[:at])
        assert lost_rows(out) == list(range(at, 32))


@pytest.mark.parametrize("is_causal", ["both", "ordered"])
@pytest.mark.parametrize("function", [tensor_polynomial, tensor_attention])
def test_a_later_token_of_tensor_attention(function, is_causal):
    q, k, v = random_head(1, 11, 11, 4)
    _, other, w = random_head(2, 11, 11, 4)
    call = jax.jit(functools.partial(function, is_causal=is_causal))
    clean = np.asarray(call(q, (k, other), (v, w)))
    for keys in ((soiled_at(k, 7), other), (k, soiled_at(other, 7))):
        out = np.asarray(call(q, keys, (v, w)))
        np.testing.assert_allclose(out[:7], clean[:7], rtol=1e-5, atol=1e-6)
        assert lost_rows(out) == [7, 8, 9, 10]


def test_a_token_that_has_left_the_window_of_tensor_attention():
    q, k, v = random_head(3, 20, 20, 4)
    call = jax.jit(functools.partial(tensor_polynomial, is_causal="both", window=4))
    assert lost_rows(call(q, (soiled_at(k, 3), k), (v, v))) == [3, 4, 5, 6]


def test_a_later_block_of_moments_beside_any_pattern():
    q, k, v = random_head(4, 24, 24, 4)
    # Each block sees itself and the first one, so that the others are no runs.
    visited = np.eye(6, dtype=bool)
    visited[:, 0] = True
    blocks = BlockMap.from_blocks(visited, block_size=4, num_queries=24, num_keys=24)
    summarize = functools.partial(summarize_favor, num_features=8)
    call = jax.jit(functools.partial(sparse_plus_summary, key=KEY, pattern=blocks, summarize=summarize, is_causal=True))
    assert min(lost_rows(call(q, soiled_at(k, 23), v))) >= 20


def test_a_later_key_of_hedgehog():
    query, key, value = random_heads(5, 1, 8, 8, 1, 1, 4)
    call = jax.jit(Hedgehog(4, 1, is_causal=True, block_size=8))
    soiled = soiled_at(key[0], 5)[None]
    clean, out = (np.asarray(call(query, keys, value))[0] for keys in (key, soiled))
    assert lost_rows(out[:, 0]) == [5, 6, 7]
    np.testing.assert_allclose(out[:5], clean[:5], atol=1e-6)


@pytest.mark.parametrize("hidden", [100.0, np.nan])
def test_a_hidden_key_of_a_kernel(hidden):
    out, gradient = of_one_query(as_array([[0.0]]), as_array([[0.0], [hidden]]))
    np.testing.assert_allclose(out, 1.0)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


@jax.jit
def of_one_query(q, keys):
    features, values, bias = PositiveFeatures(jnp.array([[100.0]])), jnp.array([[1.0], [2.0]]), [[0.0, HIDDEN]]
    return jax.value_and_grad(lambda q: kernel_state(features, q, keys, values, jnp.array(bias)).out.sum())(q)


def test_the_key_of_an_absent_token():
    tokens = WeightedKV(
        k=as_array([[0.0], [1.0], [np.nan]]),
        value_sum=as_array([[0.0], [1.0], [0.0]]),
        mass=as_array([1.0, 1.0, 0.0]),
    )
    label = as_array(np.zeros(3), jnp.int32)
    np.testing.assert_allclose(compress(tokens, KEY, coreset_size=1).k, [[0.5]])
    np.testing.assert_allclose(compiled(merged)(tokens, label, 1).k, [[0.5]])
    np.testing.assert_allclose(compiled(Clusters.of_members)(tokens, label, 1).tokens.k, [[0.5]])


def test_a_padded_query_of_a_spectrum():
    q, k, _ = random_head(6, 12, 12, 4)
    real = np.arange(12) < 9
    expected = compiled(spectrum)(*(as_array(np.asarray(x)[:9]) for x in (q, k)))
    with_padding = jax.jit(spectrum)
    for garbage in (np.nan, 50.0):
        found = with_padding(soiled_at(q, 10, garbage), k, kv_mask=real)
        for x, y in zip(found, expected, strict=True):
            np.testing.assert_allclose(np.asarray(x)[:9], y, atol=1e-5)
