"""Attention matching: exactness on its reference queries, budgets of bytes, and fitted masses of caches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import Decoder, attend, compress_cache, compress_tokens
from approx_attention.core import summary_bytes
from approx_attention.decoding import AttentionMatching, token_budget
from approx_attention.methods import running_exact
from tests.references import as_array, brute_force, compiled, random_head, relative_error

attend, compress_cache, compress_tokens = compiled(attend, compress_cache, compress_tokens)
TOKENS, REFERENCES = 60, 12
OPTIONS: dict = {"budget": 30, "sinks": 3, "recent": 6, "scale": 1.0}
Q, K, V = random_head(60, TOKENS, TOKENS, 6, 3)
EXACT = AttentionMatching(references=REFERENCES, ridge=0.0)


def test_reference_queries_get_the_outputs_they_had():
    asked = Q[-REFERENCES:]
    k, v = np.asarray(K), np.asarray(V)
    small = compress_tokens(K, V, queries=asked, policy=EXACT, **OPTIONS)
    assert small.k.shape == (30, 6)
    np.testing.assert_array_equal(small.k[:9], np.concatenate([k[:3], k[-6:]]))
    np.testing.assert_array_equal(small.value_sum[:9], np.concatenate([v[:3], v[-6:]]))
    assert (np.asarray(small.mass) >= 0).all()
    out, lse = brute_force(asked, K, V, scale=1.0)
    state = attend(asked, small)
    np.testing.assert_allclose(state.out, out, atol=2e-3)
    # With as many masses as queries the normalisers match too, although masses are not negative.
    np.testing.assert_allclose(state.lse, lse, atol=0.05)
    # The kept keys are tokens of the cache.
    assert np.abs(np.asarray(small.k)[:, None] - k[None]).sum(-1).min(1).max() < 1e-6


def test_queries_like_the_references_err_less_than_by_what_attention_keeps_alone():
    later = Q[: TOKENS - REFERENCES]
    out = brute_force(later, K, V, scale=1.0)[0]
    whole = {"queries": Q, **OPTIONS}
    error = {
        name: relative_error(attend(later, compress_tokens(K, V, policy=name, **whole)).out, out)
        for name in ("h2o", "attention_matching")
    }
    assert error["attention_matching"] < 0.7 * error["h2o"]


def test_padding_changes_nothing_and_a_traced_size_keeps_the_best():
    kv_mask = jax.device_put(np.arange(TOKENS) < 44)
    k, v, q = (as_array(np.where(np.asarray(kv_mask)[:, None], x, np.nan)) for x in (K, V, Q))
    padded = compress_tokens(k, v, queries=q, kv_mask=kv_mask, policy="attention_matching", **OPTIONS)
    alone = compress_tokens(K[:44], V[:44], queries=Q[:44], policy="attention_matching", **OPTIONS)
    assert np.isfinite(padded.mass).all()
    assert np.isfinite(padded.value_sum).all()
    np.testing.assert_allclose(attend(Q, padded).out, attend(Q, alone).out, atol=1e-4)

    sized = jax.jit(lambda size: compress_tokens(K, V, queries=Q, policy="attention_matching", size=size, **OPTIONS))
    small = sized(jnp.int32(14))
    own = compress_tokens(K, V, queries=Q, policy="attention_matching", **OPTIONS | {"budget": 14})
    assert int((small.mass > 0).sum()) <= 14
    np.testing.assert_allclose(attend(Q, small).out, attend(Q, own).out, atol=1e-3)


def test_heads_are_mapped_and_values_have_gradients():
    heads = [random_head(seed, TOKENS, TOKENS, 6, 3) for seed in (61, 62)]
    made = functools.partial(compress_tokens, policy="attention_matching", **OPTIONS)

    def squares(k, v, q):
        small = made(k, v, queries=q)
        return jnp.sum(small.value_sum**2), small

    q, k, v = (np.stack(x) for x in zip(*heads, strict=True))
    gradients, mapped = jax.jit(jax.vmap(jax.grad(squares, (0, 1), has_aux=True)))(k, v, q)
    q, k, v = heads[1]
    alone = made(k, v, queries=q)
    np.testing.assert_allclose(np.asarray(mapped.value_sum)[1], alone.value_sum, atol=2e-3)
    np.testing.assert_allclose(np.asarray(mapped.mass)[1], alone.mass, rtol=1e-3, atol=1e-3)
    for x in map(np.asarray, gradients):
        assert np.isfinite(x).all()
        assert (np.abs(x).max((1, 2)) > 0).all()


def test_heuristics_keep_their_rows_with_fitted_masses():
    made = functools.partial(compress_tokens, K, V, policy="keydiff", **OPTIONS)
    equal, fitted = made(), made(mass_correction="fitted")
    np.testing.assert_allclose(fitted.k, equal.k, atol=1e-6)
    np.testing.assert_array_equal(fitted.mass[:9], 1)
    assert float(fitted.mass.sum()) == pytest.approx(TOKENS, rel=1e-4)
    assert (np.asarray(fitted.mass) >= 0).all()
    there = np.asarray(fitted.mass) > 0
    values = (np.asarray(x.value_sum)[there] / np.asarray(x.mass)[there, None] for x in (fitted, equal))
    np.testing.assert_allclose(*values, atol=1e-4)


def test_bytes_in_place_of_tokens():
    num_bytes = 30 * 4 * (6 + 3 + 1) + 39
    options = {name: x for name, x in OPTIONS.items() if name != "budget"}
    small = compress_tokens(K, V, num_bytes=num_bytes, policy="knorm", **options)
    assert small.k.shape == (30, 6) == (token_budget(num_bytes, 6, 3), 6)
    assert summary_bytes(small.in_scaled_space()) <= num_bytes
    decoder = Decoder(running=running_exact(6, max_length=TOKENS), head_dim=6, value_dim=3, block_size=8)
    cache = compiled(decoder.append)(decoder.init(), K, V)
    fixed = compress_cache(cache, num_bytes=num_bytes, policy="attention_matching", queries=Q[-REFERENCES:])
    assert fixed.past.prefix.fixed.mass.shape == (30,)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "pass either budget or num_bytes, got neither"),
        ({"budget": 40, "num_bytes": 900}, ValueError, "got budget=40 and num_bytes=900"),
        ({"num_bytes": 3}, ValueError, "takes 40 bytes, more than the budget of 1"),
        ({"num_bytes": 2.5}, TypeError, "num_bytes must be an integer"),
        (
            {"budget": 40, "policy": "attention_matching"},
            ValueError,
            "'attention_matching' scores keys by the attention",
        ),
        ({"budget": 40, "policy": EXACT}, ValueError, "pass queries"),
        ({"budget": 40, "policy": "attention_macthing"}, ValueError, "did you mean 'attention_matching'"),
        ({"budget": 40, "mass_correction": "fited"}, TypeError, "must be True, False or 'fitted'.* got 'fited'"),
    ],
)
def test_what_is_wrong_is_said(options, error, message):
    with pytest.raises(error, match=message):
        compress_tokens(K, V, **{"policy": "knorm"} | options)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="references must be at least 1, got 0"):
        AttentionMatching(references=0)
    with pytest.raises(ValueError, match="ridge must be finite and not negative, got -1"):
        AttentionMatching(ridge=-1.0)
