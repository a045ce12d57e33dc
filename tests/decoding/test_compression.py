"""Compression of caches to a budget, at once and while decoding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import Decoder, WeightedKV, attend, compress_cache, compress_tokens, exact, summarize_coreset
from approx_attention.coresets import running_coreset
from approx_attention.decoding import (
    HEURISTICS,
    Queries,
    attention_received,
    pyramid_budgets,
    running_compressed,
    shared_sizes,
    token_budget,
)
from approx_attention.methods import running_block_linformer, running_exact
from tests.methods.test_coreset import KEY, clustered
from tests.references import brute_force, compiled, random_head, relative_error

attend, compress_cache, compress_tokens, exact = compiled(attend, compress_cache, compress_tokens, exact)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "mass_correction"),
    [("kmeans_nystrom", True), ("halving", True), *((policy, mass) for policy in HEURISTICS for mass in (False, True))],
)
def test_first_and_last_tokens_are_kept_exactly(policy, mass_correction):
    q, k, v = random_head(38, 40, 40, 6, 3)
    small = compress_tokens(
        k, v, KEY, budget=16, policy=policy, queries=q, sinks=2, recent=5, mass_correction=mass_correction, scale=1.0
    )
    assert small.k.shape == (16, 6)
    np.testing.assert_array_equal(small.k[:7], jnp.concatenate([k[:2], k[-5:]]))
    np.testing.assert_array_equal(small.mass[:7], 1)
    kept = float(small.mass.sum())
    if policy in HEURISTICS:
        assert kept == pytest.approx(40 if mass_correction else 16)
    elif policy == "halving":
        assert kept == pytest.approx(40)


def test_scores_of_the_heuristics():
    q, k, v = random_head(39, 40, 40, 6, 3)
    tokens = WeightedKV.of_tokens(k, v)
    logits = np.where(np.tri(40, dtype=bool), np.asarray(q, np.float64) @ np.asarray(k, np.float64).T, -np.inf)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    weights = weights / weights.sum(1, keepdims=True)
    names = ("h2o", "tova", "snapkv", "knorm", "keydiff", "streaming_llm")

    @jax.jit
    def scores(tokens, q):
        asked = Queries.last(q, 40)
        return attention_received(tokens, q), {name: HEURISTICS[name].score(tokens, asked) for name in names}

    received, score = scores(tokens, q)
    np.testing.assert_allclose(received, weights.sum(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(score["h2o"], weights.sum(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(score["tova"], weights[-1], rtol=1e-4, atol=1e-6)
    pooled = np.convolve(weights[-32:].sum(0), np.ones(5) / 5, mode="same")
    np.testing.assert_allclose(score["snapkv"], pooled, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(score["knorm"], -((np.asarray(k) ** 2).sum(1)), rtol=1e-5)
    unit = np.asarray(k) / np.linalg.norm(k, axis=1, keepdims=True)
    assert np.argmin(score["keydiff"]) == np.argmax(unit @ unit.sum(0))
    assert (np.diff(score["streaming_llm"]) > 0).all()


@pytest.mark.parametrize("num_keys", [1, 3, 4])
def test_the_score_of_few_keys_is_attention_around_each(num_keys):
    """A pool of five keys, of which fewer exist: each score is the sum over the keys within two places."""
    q, k, v = random_head(41, 6, num_keys, 6, 3)
    tokens = WeightedKV.of_tokens(k, v)
    attention = brute_force(q, k, np.eye(num_keys), scale=1.0)[0].sum(0)
    near = np.abs(np.subtract.outer(np.arange(num_keys), np.arange(num_keys))) <= 2
    score = jax.jit(HEURISTICS["snapkv"].score)(tokens, Queries.last(q, num_keys, after=6))
    np.testing.assert_allclose(score, near @ attention / 5, rtol=1e-5)


def test_a_cache_with_room_for_all_loses_nothing_and_decodes_on():
    q, k, v = random_head(40, 120, 120, 6, 3)
    exact_decoder = Decoder(running=running_exact(6, max_length=128), head_dim=6, value_dim=3, block_size=8)
    whole = np.asarray(exact(q, k, v, is_causal=True))
    q, k, v = map(np.asarray, (q, k, v))
    _, cache = jax.jit(exact_decoder.prefill)(exact_decoder.init(), q[:100], k[:100], v[:100])
    small = compress_cache(cache, KEY, budget=128, coreset_size=64)
    after = Decoder(
        running=running_compressed(6, KEY, budget=128, coreset_size=64), head_dim=6, value_dim=3, block_size=8
    )
    out, _ = jax.jit(after.prefill)(small, q[100:], k[100:], v[100:])
    np.testing.assert_allclose(out, whole[100:], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["kmeans_nystrom", "snapkv"])
def test_a_compressed_cache_decodes_on(policy):
    k, v = map(jnp.asarray, clustered(41, 400, head_dim=6))
    q = jnp.asarray(3 * clustered(42, 400, head_dim=6)[0])
    exact_decoder = Decoder(running=running_exact(6, max_length=400), head_dim=6, value_dim=3, block_size=16, scale=1.0)
    _, cache = jax.jit(exact_decoder.prefill)(exact_decoder.init(), q[:300], k[:300], v[:300])
    small = compress_cache(cache, KEY, budget=48, coreset_size=32, policy=policy, queries=q[:300])
    after = Decoder(
        running=running_compressed(6, KEY, budget=48, coreset_size=32),
        head_dim=6,
        value_dim=3,
        block_size=16,
        scale=1.0,
    )
    assert jax.tree.structure(small) == jax.tree.structure(after.init())
    out, _ = jax.jit(after.prefill)(small, q[300:], k[300:], v[300:])
    error = relative_error(out, exact(q, k, v, is_causal=True, scale=1.0)[300:])
    assert error < {"kmeans_nystrom": 0.05, "halving": 0.3}.get(policy, 1.0)


def test_a_cache_of_another_method_is_refused():
    decoder = Decoder(
        running=running_coreset(6, KEY, streaming="counter", algorithm="halving"), head_dim=6, value_dim=3
    )
    with pytest.raises(TypeError, match="cache of a decoder with running_exact"):
        compress_cache(decoder.init(), KEY, budget=32)


RUNNING = {
    "clusters": lambda: running_coreset(6, KEY, coreset_size=16, sinks=0),
    "slots": lambda: running_block_linformer(6, slots_per_block=3, block_size=10, max_length=100),
}


@functools.cache
def hundred_tokens(kind):
    """A cache of 100 tokens whose summary has fewer, with masses above 1."""
    _, k, v = random_head(44, 1, 100, 6, 3)
    decoder = Decoder(running=RUNNING[kind](), head_dim=6, value_dim=3, block_size=10)
    return jax.jit(lambda k, v: decoder.append(decoder.init(), k, v))(k, v)


@pytest.mark.parametrize("kind", RUNNING)
@pytest.mark.parametrize("policy", ["stratified", "knorm"])
def test_tokens_that_stand_for_several_keep_their_masses(kind, policy):
    cache = hundred_tokens(kind)
    small = compress_cache(cache, KEY, budget=12, sinks=0, policy=policy)
    assert small.past.prefix.fixed.mass.shape == (12,)
    assert float(np.sum(small.past.prefix.fixed.mass)) == pytest.approx(float(np.sum(cache.past.prefix.mass)))
    room = compress_cache(cache, KEY, budget=40, policy=policy).past.prefix.fixed
    assert float(np.sum(room.mass)) == pytest.approx(80)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["kmeans_nystrom", "h2o", "snapkv", "streaming_llm"])
@pytest.mark.parametrize("garbage", [np.nan])
def test_padding_at_the_end_of_a_cache_changes_nothing(policy, garbage):
    q, k, v = random_head(47, 60, 60, 6, 3)
    options = {"budget": 30, "policy": policy, "sinks": 3, "recent": 6, "scale": 1.0}
    kv_mask = jnp.arange(60) < 44
    padded = (x.at[44:].set(garbage) for x in (k, v, q))
    small = compress_tokens(
        *(x for x in list(padded)[:2]), KEY, queries=q.at[44:].set(garbage), kv_mask=kv_mask, **options
    )
    held = np.asarray(small.k)[np.asarray(small.mass) != 0]
    for kept in (*k[:3], *k[38:44]):
        assert np.abs(held - np.asarray(kept)).sum(1).min() < 1e-5
    assert np.isfinite(attend(q[:44], small).out).all()
    if policy in HEURISTICS:
        alone = compress_tokens(k[:44], v[:44], KEY, queries=q[:44], **options)
        np.testing.assert_allclose(attend(q, small).out, attend(q, alone).out, atol=1e-4)


@pytest.mark.slow
def test_few_real_tokens_in_a_large_cache_are_all_kept():
    q, k, v = random_head(48, 5, 60, 6, 3)
    for num_real in (1, 4, 8):
        kv_mask = jnp.arange(60) < num_real
        small = compress_tokens(k, v, KEY, budget=30, sinks=3, recent=6, kv_mask=kv_mask, scale=1.0)
        assert float(small.mass.sum()) == pytest.approx(num_real, rel=1e-3)
        expected = brute_force(q, k, v, scale=1.0, mask=kv_mask[None])[0]
        np.testing.assert_allclose(attend(q, small).out, expected, atol=2e-3)


def test_budgets():
    assert token_budget(1000, 8, 8) == 1000 // 68
    with pytest.raises(ValueError, match="takes 68 bytes"):
        token_budget(60, 8, 8)
    layers = pyramid_budgets(8, 100)
    assert sum(layers) == pytest.approx(800, abs=8)
    assert layers == sorted(layers, reverse=True)
    assert pyramid_budgets(1, 100) == [100]
    scores = jnp.asarray([[9.0, 8.0, 7.0, 6.0], [5.0, 1.0, 1.0, 1.0]])
    np.testing.assert_array_equal(shared_sizes(scores, 2), [4, 0])
    np.testing.assert_array_equal(shared_sizes(scores, 2, most=3), [3, 1])
    np.testing.assert_array_equal(shared_sizes(scores, 2, least=1), [3, 1])
    np.testing.assert_array_equal(shared_sizes(scores, 2, least=2), [2, 2])
    np.testing.assert_array_equal(shared_sizes(scores, 9), [4, 4])
    with pytest.raises(ValueError, match="budget must be from least = 3 to most = 4 tokens per head, got 2"):
        shared_sizes(scores, 2, least=3)
    with pytest.raises(ValueError, match="from least = 1 to most = 20 tokens per head, got 60"):
        shared_sizes(jnp.ones((2, 64)), 60, least=1, most=20)
    with pytest.raises(ValueError, match="head_dim must be at least 1, got 0"):
        token_budget(1000, 0, 8)
    with pytest.raises(ValueError, match="least must be at least 0, got -1"):
        pyramid_budgets(8, 100, least=-1)


def test_a_head_uses_its_share_of_a_shared_budget():
    _, k, v = random_head(41, 1, 64, 6, 3)
    options: dict = {"policy": "knorm", "sinks": 2, "recent": 3}
    own = compress_tokens(k, v, budget=12, **options).in_scaled_space()
    shared = jax.jit(lambda size: compress_tokens(k, v, budget=64, size=size, **options).in_scaled_space())(
        jnp.int32(12)
    )
    there = np.asarray(shared.mass > 0)
    assert shared.mass.shape == (64,)
    assert there.sum() == 12
    for one, other in zip(jax.tree.leaves(own), jax.tree.leaves(shared), strict=True):
        np.testing.assert_allclose(one, other[there], rtol=1e-6)
    with pytest.raises(ValueError, match="size is only supported by policies"):
        compress_tokens(k, v, KEY, budget=40, size=jnp.int32(12))


def test_what_is_wrong_is_said():
    _, k, v = random_head(43, 1, 40, 6, 3)
    with pytest.raises(ValueError, match="did you mean 'halving'"):
        summarize_coreset(k, v, KEY, coreset_size=8, algorithm="halvin")
    with pytest.raises(ValueError, match="pass a key"):
        summarize_coreset(k, v, coreset_size=8)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        summarize_coreset(k, v, KEY, coreset_size=0)
    with pytest.raises(ValueError, match=r"more than sinks \+ recent = 36, got 36"):
        compress_tokens(k, v, KEY, budget=36)
    with pytest.raises(ValueError, match="pass queries"):
        compress_tokens(k, v, KEY, budget=38, policy="h2o")
    with pytest.raises(ValueError, match="did you mean 'snapkv'"):
        compress_tokens(k, v, KEY, budget=38, policy="snapkw")
    for policy, options, message in (
        ("nonsense", {}, "unknown policy 'nonsense'"),
        (3, {}, "or an algorithm, got 3"),
        ("halving", {"size": jnp.int32(5)}, "size is only supported by policies"),
    ):
        with pytest.raises(ValueError, match=message):  # also with room for all tokens
            compress_tokens(k, v, KEY, budget=40, policy=policy, **options)
    decoder = Decoder(running=running_exact(6, max_length=40), head_dim=6, value_dim=3, block_size=8)
    for name in ("budget", "coreset_size"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            compress_cache(decoder.init(), KEY, **{"budget": 8, name: 0})
