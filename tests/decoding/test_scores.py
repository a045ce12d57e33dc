"""Scores of keys by queries: against float64, for grouped heads, after a window of exact tokens, and under padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import Decoder, WeightedKV, attend, compress_cache, compress_tokens
from approx_attention.decoding import HEURISTICS, Queries, attention_received
from approx_attention.methods import running_exact
from tests.references import compiled, random_head

attend, compress_cache, compress_tokens = compiled(attend, compress_cache, compress_tokens)
KEYS, GROUP = 40, 2
_, K, V = random_head(70, 1, KEYS, 6, 3)
# Made by NumPy: every process that collects the tests would compile a program for each operation of JAX.
Q = jax.device_put(np.random.default_rng(71).normal(1, size=(KEYS, GROUP, 6)).astype(np.float32))
MASS = jax.device_put(np.random.default_rng(72).integers(0, 4, KEYS).astype(np.float32))
TOKENS = WeightedKV(K, jax.device_put(np.asarray(V) * np.asarray(MASS)[:, None]), MASS)
READING = [name for name, heuristic in HEURISTICS.items() if heuristic.needs_queries]


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def in_float64(x):
    return np.asarray(x, np.float64)


def weights_of(rows, seen=None):
    """Attention weights ``[..., S]`` of queries over tokens with masses, each over its first ``seen`` keys."""
    with np.errstate(divide="ignore"):
        logits = in_float64(rows) @ in_float64(K).T + np.log(in_float64(MASS))
    if seen is not None:
        logits = np.where(np.arange(KEYS) < np.reshape(seen, (-1, 1, 1)), logits, -np.inf)
    return softmax(logits)


def test_expected_attention_is_that_of_gaussian_queries():
    score = compiled(HEURISTICS["expected_attention"].score)(TOKENS, Queries.last(Q, KEYS))
    rows, k = in_float64(Q), in_float64(K)
    mean = rows.mean(0)
    covariance = [np.cov(rows[:, g].T, bias=True) for g in range(GROUP)]
    log_expectation = [mean[g] @ k.T + np.einsum("sd,de,se->s", k, covariance[g], k) / 2 for g in range(GROUP)]
    share = softmax(np.stack(log_expectation) + np.log(np.maximum(in_float64(MASS), 1e-300))).mean(0)
    there = np.asarray(MASS) > 0
    expected = np.log(share * np.linalg.norm(in_float64(V), axis=1))
    np.testing.assert_allclose(np.asarray(score)[there], expected[there], atol=1e-4)
    # The exponent is the log-expectation of exp(q . k) over Gaussian queries.
    drawn = np.random.default_rng(0).multivariate_normal(mean[0], covariance[0], 200_000)
    short = 0.3 * k[:5]
    sampled = np.log(np.exp(drawn @ short.T).mean(0))
    closed = mean[0] @ short.T + np.einsum("sd,de,se->s", short, covariance[0], short) / 2
    np.testing.assert_allclose(sampled, closed, atol=0.03)


def test_kvzip_takes_the_most_of_any_number_of_later_queries():
    asked = jnp.concatenate([Q, 2 * Q])
    score = compiled(HEURISTICS["kvzip"].score)(TOKENS, Queries.later(asked, KEYS))
    np.testing.assert_allclose(score, weights_of(asked).max((0, 1)), rtol=1e-4, atol=1e-7)


def test_grouped_queries_add_up_and_see_no_later_key():
    seen = np.arange(KEYS - 10, KEYS) + 1
    expected = weights_of(Q[-10:], seen).sum((0, 1))
    np.testing.assert_allclose(compiled(attention_received)(TOKENS, Q[-10:]), expected, rtol=1e-4, atol=1e-6)
    alone = sum(compiled(attention_received)(TOKENS, Q[-10:, g]) for g in range(GROUP))
    np.testing.assert_allclose(alone, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("policy", READING)
def test_the_best_keys_are_kept(policy):
    small = compress_tokens(K, V, budget=12, policy=policy, queries=Q, sinks=1, recent=2, scale=1.0)
    asked = Queries.later(Q, KEYS) if HEURISTICS[policy].later else Queries.last(Q, KEYS)
    score = np.asarray(compiled(HEURISTICS[policy].score)(WeightedKV.of_tokens(K, V), asked))
    best = set(1 + np.argsort(-score[1 : KEYS - 2])[:9])
    kept = np.abs(in_float64(small.k)[:, None] - in_float64(K)[None]).sum(-1).argmin(1)
    assert set(kept) == best | {0, KEYS - 2, KEYS - 1}
    np.testing.assert_allclose(small.mass.sum(), KEYS, rtol=1e-5)


@pytest.mark.parametrize("policy", ["expected_attention", "kvzip"])
def test_padding_changes_nothing(policy):
    real = 30
    kv_mask = jnp.arange(KEYS) < real
    k, v = (jnp.where(kv_mask[:, None], x, jnp.nan) for x in (K, V))
    later = HEURISTICS[policy].later
    # Queries of all positions have padding; those of a second pass have none.
    q = Q if later else jnp.where(kv_mask[:, None, None], Q, jnp.nan)
    options = {"budget": 12, "policy": policy, "sinks": 1, "recent": 2}
    padded = compress_tokens(k, v, queries=q, kv_mask=kv_mask, **options)
    alone = compress_tokens(K[:real], V[:real], queries=Q if later else Q[:real], **options)
    np.testing.assert_allclose(attend(Q[:, 0], padded).out, attend(Q[:, 0], alone).out, atol=1e-5)


def test_a_token_without_a_value_goes_before_padding_does():
    v = V.at[5:30].set(0)
    kv_mask = jnp.arange(KEYS) < 35
    small = compress_tokens(K, v, budget=34, policy="expected_attention", queries=Q, kv_mask=kv_mask, sinks=0, recent=0)
    assert int((small.mass > 0).sum()) == 34


@pytest.mark.parametrize("policy", ["snapkv", "kvzip"])
def test_queries_of_a_cache_come_after_its_exact_blocks(policy):
    block, room = 8, 64
    decoder = Decoder(running=running_exact(6, max_length=room), head_dim=6, value_dim=3, block_size=block, scale=1.0)
    cache = compiled(decoder.append)(decoder.init(), K, V)
    old = int((cache.past.prefix.mass > 0).sum())
    assert block < KEYS - old <= 2 * block
    asked = Q[-4:]  # they see all older tokens, at any position
    fixed = compress_cache(cache, jax.random.key(0), budget=8, policy=policy, queries=asked, sinks=0).past.prefix.fixed
    logits = in_float64(asked) @ in_float64(K[:old]).T
    weights = softmax(logits)
    score = weights.max((0, 1)) if policy == "kvzip" else np.convolve(weights.sum((0, 1)), np.ones(5) / 5, mode="same")
    kept = np.abs(in_float64(fixed.k)[:, None] - in_float64(K)[None, :old]).sum(-1).argmin(1)
    assert set(kept) == set(np.argsort(-score)[:8])


def test_what_is_wrong_is_said():
    made = functools.partial(compress_tokens, K, V, budget=12, sinks=1, recent=2)
    with pytest.raises(ValueError, match=r"\[1 to 40, 6\], those of the last keys, or \[T, G, D\].* \(41, 6\)"):
        made(policy="h2o", queries=jnp.ones((41, 6)))
    made(policy="kvzip", queries=jnp.ones((41, 6)))
    with pytest.raises(ValueError, match=r"\[1 or more, 6\]"):
        made(policy="kvzip", queries=jnp.ones((0, 6)))
    with pytest.raises(ValueError, match="'kvzip' scores keys by the attention of queries; pass queries"):
        made(policy="kvzip")
