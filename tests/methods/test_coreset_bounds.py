"""Certificates of coresets, and streamed coresets against coresets of all tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import Decoder, bounds, coreset
from approx_attention.coresets import running_coreset
from approx_attention.evaluation import sup_error
from tests.methods.test_coreset import HEAD_DIM, KEY, MERGES, VALUE_DIM, clustered, error_of, streamed, summary
from tests.references import compiled, random_head

coreset = compiled(coreset)
merge_bound = jax.jit(bounds.merge_bound)
sensitivity = jax.jit(bounds.sensitivity, static_argnames="num_steps")


# certificates


@pytest.mark.parametrize("algorithm", MERGES)
@pytest.mark.parametrize("radius", [0.5, pytest.param(2.0, marks=pytest.mark.slow)])
def test_the_merge_bound_holds(algorithm, radius):
    # Keys with three nonzero channels.
    scattered = random_head(30, 1, 200, HEAD_DIM, VALUE_DIM, spread=0.5)[1:]
    for k, v in (clustered(30, 200), (np.where(np.arange(HEAD_DIM) < 3, scattered[0], 0), scattered[1])):
        small = summary(k, v, size=24, algorithm=algorithm)
        largest = float(np.linalg.norm(v, axis=1).max())
        merged, bound = merge_bound(k, v, small, np.float32(radius))
        assert np.asarray(merged.mass).sum() == pytest.approx(200)
        found = error_of(k, v, merged, radius) * largest
        assert found <= float(bound) + 1e-5
        assert found > 1e-6


def test_size_bounds():
    ask = functools.partial(bounds.coreset_size_bound, 0.1, radius=2.0, head_dim=64, num_keys=100000, failure=0.1)
    assert ask(result="uniform").size == pytest.approx(np.cosh(2.0) ** 2 * (64 + np.log(10)) / 0.01)
    assert ask(result="optimal").size == pytest.approx(8 * np.exp(2.0) / 0.1)
    assert ask(result="lower_bound").size == ask(result="optimal").size < ask(result="balance_kv").size
    assert ask(result="subgen").size == pytest.approx(6400)
    assert ask(result="balance_kv_lower_bound").size == pytest.approx(100)
    assert ask(result="thinformer").size == pytest.approx(np.log(100000) ** 1.5 / 0.1)
    assert ask(result="kernel_discrepancy").size == pytest.approx(80)
    assert not ask().vacuous
    assert ask(radius=20.0).vacuous
    assert ask(radius=5000.0).size == np.inf
    with pytest.raises(ValueError, match="must be positive"):
        bounds.coreset_size_bound(0.0, radius=1.0, head_dim=4, num_keys=10)


@pytest.mark.parametrize("radius", [0.0, 1.0, 6.0])
def test_sensitivities_are_enclosed(radius):
    k, _ = clustered(37, 40)
    mask = np.arange(40) < 36
    soiled = np.where(mask[:, None], k, np.float32(np.nan))
    least, most = map(np.asarray, sensitivity(soiled, np.float32(radius), kv_mask=mask))
    assert (least[36:] == 0).all()
    assert (most[36:] == 0).all()
    directions = np.random.default_rng(38).normal(size=(4096, HEAD_DIM))
    logits = radius * directions / np.linalg.norm(directions, axis=1, keepdims=True) @ k[:36].T.astype(np.float64)
    weights = np.exp(logits)
    found = (weights / weights.sum(axis=1, keepdims=True)).max(axis=0)
    assert (found <= most[:36] * (1 + 1e-5)).all()
    # The query that reaches the lower bound is in the ball, and random ones come near it.
    assert (least[:36] <= most[:36]).all()
    assert (found <= least[:36] * 1.01).all()
    np.testing.assert_allclose(least, most, rtol=0.02)


def test_bounds_of_sensitivities_hold_before_the_search_ends():
    k, _ = clustered(39, 40)
    real, radius = np.ones(40, bool), np.float32(5.0)
    early = jax.tree.map(np.asarray, sensitivity(k, radius, kv_mask=real, num_steps=2))
    late = jax.tree.map(np.asarray, sensitivity(k, radius, kv_mask=real))
    assert (early.most >= late.least).all()
    assert (early.most > 1.2 * early.least).any()
    assert early.most.sum() > late.most.sum()


def test_the_search_for_the_supremum_has_converged():
    k, v = clustered(32, 256)
    small = summary(k, v, size=16, algorithm="halving")
    few, many = (
        float(sup_error(k, v, small, 3.0, num_starts=starts, num_steps=steps).error)
        for starts, steps in ((24, 60), (128, 300))
    )
    assert few <= many * (1 + 1e-5)
    assert many <= 1.01 * few


# streams


@pytest.mark.parametrize(("streaming", "algorithm"), [("fold", "kmeans_merge"), ("counter", "halving")])
def test_streams_keep_the_mass_and_come_near_the_offline_coreset(streaming, algorithm):
    k, v = clustered(33, 512)
    running = running_coreset(HEAD_DIM, KEY, coreset_size=32, algorithm=algorithm, streaming=streaming, max_length=512)
    small = jax.jit(functools.partial(streamed, running, block_size=32))(k, v, np.ones(512, bool))
    assert np.asarray(small.mass).sum() == pytest.approx(512, rel=1e-5)
    offline = "kmeans_merge" if streaming == "fold" else "halving"
    allowed = 3 * error_of(k, v, summary(k, v, size=32, algorithm=offline), 2.0)
    assert error_of(k, v, small, 2.0) < allowed + 1e-3


@pytest.mark.parametrize("streaming", ["fold", "refit", "counter"])
def test_sinks_are_the_first_real_tokens_and_stay_exact(streaming):
    k, v = clustered(40, 96)
    algorithm = "guarded" if streaming == "refit" else "kmeans_merge"
    options = {"algorithm": algorithm, "streaming": streaming, "sinks": 5, "max_length": 96}
    running = running_coreset(HEAD_DIM, KEY, coreset_size=8, **options)
    mask = (np.arange(96) >= 6) & (np.arange(96) != 8)
    small = jax.tree.map(np.asarray, jax.jit(functools.partial(streamed, running, block_size=8))(k, v, mask))
    first = np.array([6, 7, 9, 10, 11])
    np.testing.assert_array_equal(small.k[:5], k[first])
    np.testing.assert_array_equal(small.value_sum[:5], v[first])
    np.testing.assert_array_equal(small.mass[:5], 1)
    assert float(small.mass.sum()) == pytest.approx(89, rel=0.01 if streaming == "refit" else None)


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [4, 24])
def test_the_counter_decodes_as_it_answers_causally(block_size):
    q, k, v = random_head(34, 100, 100, HEAD_DIM, 3)
    options = {"coreset_size": 8, "algorithm": "halving", "streaming": "counter"}
    whole = coreset(q, k, v, KEY, is_causal=True, block_size=block_size, **options)
    running = running_coreset(HEAD_DIM, KEY, **options, max_length=100)
    decoder = Decoder(running=running, head_dim=HEAD_DIM, value_dim=3, block_size=block_size)
    out, cache = jax.jit(decoder.prefill)(decoder.init(), q[:90], k[:90], v[:90])
    append, answer = jax.jit(decoder.append), jax.jit(decoder.attend)
    last = []
    for t in range(90, 100):
        cache = append(cache, k[t : t + 1], v[t : t + 1])
        last.append(answer(cache, q[t : t + 1]))
    np.testing.assert_allclose(jnp.concatenate([out, *last]), whole, atol=1e-5)


def test_a_counter_longer_than_its_levels_goes_on():
    k, v = clustered(35, 256)
    running = running_coreset(HEAD_DIM, KEY, coreset_size=8, algorithm="halving", streaming="counter", max_length=32)
    small = jax.jit(functools.partial(streamed, running, block_size=8))(k, v, np.ones(256, bool))
    assert np.asarray(small.mass).sum() == pytest.approx(256)
