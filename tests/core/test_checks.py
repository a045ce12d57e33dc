"""Bad input gets an error that says what was given and what is allowed."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import (
    METHODS,
    Decoder,
    attention,
    exact,
    favor,
    fold_scale,
    hyper_attention,
    local,
    lsh_top_k,
    ra,
    rfa,
)
from approx_attention.core import check_count, check_projection
from approx_attention.registry import get_method
from tests.references import as_array, compiled, random_head, random_heads

# Tests check the shapes in signatures before a function runs; users call the plain function.
plain_exact, plain_ra, plain_attention = (inspect.unwrap(function) for function in (exact, ra, attention))


def test_one_head():
    q, k, v = random_head(0, 4, 5)
    with pytest.raises(ValueError, match=r"q must be \[T, D\], one head without batch axes; got shape \(1, 4, 8\)"):
        plain_exact(q[None], k, v)
    with pytest.raises(ValueError, match="q and k must share the head dimension, got 7 and 8"):
        plain_exact(q[:, :7], k, v)
    with pytest.raises(ValueError, match="k and v must have the same number of tokens, got 5 and 4"):
        plain_exact(q, k, v[:4])
    with pytest.raises(ValueError, match="at least one query, key and channel"):
        plain_exact(q[:0], k, v)
    with pytest.raises(TypeError, match="k must be a floating-point array, got dtype int32"):
        plain_exact(q, k.astype(jnp.int32), v)
    with pytest.raises(TypeError, match="kv_mask must be a boolean array .* got dtype float32"):
        plain_exact(q, k, v, kv_mask=jnp.ones(5))
    with pytest.raises(ValueError, match=r"kv_mask must be \[S\] = \[5\], got shape \(4,\)"):
        plain_exact(q, k, v, kv_mask=jnp.ones(4, bool))
    with pytest.raises(ValueError, match="scale must be positive and finite, got -1"):
        exact(q, k, v, scale=-1.0)
    with pytest.raises(ValueError, match=r"bias must be \[T, S\] = \[4, 5\], got shape \(5, 4\)"):
        plain_exact(q, k, v, bias=jnp.ones((5, 4)))
    for method in (plain_exact, functools.partial(plain_ra, key=jax.random.key(0))):
        with pytest.raises(TypeError, match="mask must be boolean .* got dtype float32; pass an additive mask as bias"):
            method(q, k, v, mask=jnp.zeros((4, 5)))
        with pytest.raises(TypeError, match="bias must be a floating-point array, got dtype int32"):
            method(q, k, v, bias=jnp.zeros((4, 5), jnp.int32))
        with pytest.raises(ValueError, match=r"mask must be \[T, S\] = \[4, 5\], got shape \(5, 4\)"):
            method(q, k, v, mask=jnp.ones((5, 4), bool))
    with pytest.raises(ValueError, match="implementation must be one of .* got 'dence'; did you mean 'dense'"):
        plain_exact(q, k, v, implementation="dence")
    with pytest.raises(NotImplementedError, match="'blocked' supports neither bias nor mask"):
        exact(q, k, v, bias=jnp.ones((4, 5)), implementation="blocked")
    with pytest.raises(ValueError, match="'cudnn' needs a GPU"):
        exact(q, k, v, implementation="cudnn")


def test_hyperparameters():
    q, k, v = random_head(0, 4, 5)
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="num_features must be at least 1, got 0"):
        favor(q, k, v, key, num_features=0)
    with pytest.raises(TypeError, match="num_landmarks must be an integer known when tracing, got 2.5"):
        check_count("num_landmarks", 2.5)
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        favor(q, k, v, key, block_size=0, is_causal=True)
    with pytest.raises(ValueError, match="window_size must be at least 0, got -1"):
        local(q, k, v, window_size=(-1, 3))
    with pytest.raises(ValueError, match=r"projection must be \[R, D\] with D = 8, got shape \(3, 7\)"):
        check_projection(jnp.ones((3, 7)), 8)
    for method, features in ((favor, "hyperbolic"), (rfa, "trigonometric")):
        with pytest.raises(ValueError, match=f"{features} features come in pairs: num_features must be even, got 5"):
            method(q, k, v, key, num_features=5, features=features)
    with pytest.raises(ValueError, match="num_hashes must be at most 31, got 32"):
        hyper_attention(q, k, v, key, num_hashes=32)
    assert np.all(np.isfinite(compiled(hyper_attention)(q, k, v, key, num_hashes=31)))
    with pytest.raises(ValueError, match="num_hashes must be at most 24, got 25"):
        lsh_top_k(q, k, v, projection=jnp.ones((1, 25, 8)))
    with pytest.raises(ValueError, match="one PRNG key, got an array of keys of shape"):
        favor(q, k, v, jax.random.split(key))


def test_attention_layout():
    query, key, value = random_heads(0, 2, 4, 5, 4, 2)
    with pytest.raises(ValueError, match=r"query must be \[..., T, N, D\] with .* got shape \(4, 8\)"):
        plain_attention(query[0, :, 0], key, value, method="exact")
    with pytest.raises(ValueError, match="must have the same batch axes"):
        plain_attention(query, key[:1], value[:1], method="exact")
    with pytest.raises(ValueError, match="key heads must divide query heads, got 2 and 3"):
        plain_attention(query[:, :, :3], key, value, method="exact")
    with pytest.raises(ValueError, match=r"key and value must have the same numbers of tokens and heads"):
        plain_attention(query, key, value[:, :3], method="exact")
    with pytest.raises(ValueError, match="must share the head dimension"):
        plain_attention(query[..., :7], key, value, method="exact")
    with pytest.raises(TypeError, match="mask must be a boolean array .* got dtype float32"):
        plain_attention(query, key, value, mask=jnp.ones((2, 1, 1, 5)), method="exact")
    with pytest.raises(ValueError, match=r"mask must broadcast to \[..., N, T, S\] = \[2, 4, 4, 5\], got shape"):
        attention(query, key, value, mask=jnp.ones((2, 4, 4, 4), bool), method="exact")
    with pytest.raises(ValueError, match=r"key_value_seq_lengths must have the batch's shape \(2,\), got \(3,\)"):
        plain_attention(query, key, value, key_value_seq_lengths=jnp.array([1, 2, 3]), method="exact")
    with pytest.raises(TypeError, match="query_seq_lengths must be integers"):
        plain_attention(query, key, value, query_seq_lengths=jnp.array([1.0, 2.0]), method="exact")
    with pytest.raises(NotImplementedError, match="'favor' does not support local_window_size"):
        attention(query, key, value, local_window_size=3, method="favor", rng=jax.random.key(0))


def test_unknown_method_names_the_nearest():
    with pytest.raises(ValueError, match=r"unknown method 'favour'; did you mean 'favor'\? Known: exact, "):
        get_method("favour")


def test_decoder():
    running = METHODS["mean_pool"].running(8)
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        Decoder(running=running, head_dim=8, value_dim=8, block_size=0)
    decoder = Decoder(running=running, head_dim=8, value_dim=8, block_size=4)
    q, k, v = random_head(0, 4, 4)
    cache = jax.jit(decoder.init)()
    with pytest.raises(ValueError, match=r"k must be \[T, 8\] with T >= 1 tokens, got shape \(4, 7\)"):
        decoder.append(cache, k[:, :7], v)
    with pytest.raises(ValueError, match=r"v must be \[T, 8\] with T >= 1 tokens, got shape \(3, 8\)"):
        decoder.append(cache, k, v[:3])
    with pytest.raises(ValueError, match=r"q must be \[G, D\] with G >= 1 and D = 8, got shape \(4, 7\)"):
        decoder.attend(cache, q[:, :7])
    with pytest.raises(ValueError, match=r"q must be \[T, D\] = \[4, 8\] like k"):
        decoder.prefill(cache, q[:3], k, v)


def test_fold_scale_makes_logits_plain_products():
    q, k, _ = random_head(1, 4, 5)
    logits = np.asarray(q) @ np.asarray(k).T
    for scale, factor in ((None, 1 / np.sqrt(8)), (0.3, 0.3), (as_array(2.0), 2.0)):
        scaled_q, scaled_k = map(np.asarray, compiled(fold_scale)(q, k, scale))
        np.testing.assert_allclose(scaled_q @ scaled_k.T, factor * logits, rtol=1e-5, atol=1e-6)
    gradient = jax.jit(jax.grad(lambda scale: jnp.sum(exact(q, k, k, scale=scale))))(0.5)
    assert np.isfinite(gradient)
    assert gradient != 0


def test_a_truth_is_no_scale():
    # Users have no checks of annotations: the function itself must reject a bool.
    with pytest.raises(TypeError, match="scale must be one number, got bool"):
        inspect.unwrap(fold_scale)(jnp.ones((2, 4)), jnp.ones((3, 4)), True)
