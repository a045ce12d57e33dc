"""Choosing among coresets by probes, seeding with distant keys, and refitting weights in a stream."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import WeightedKV, attend, summarize_coreset
from approx_attention.core import pad_rows
from approx_attention.coresets import compress, running_coreset
from approx_attention.coresets.algorithms import SEEDINGS
from approx_attention.coresets.clustering import with_nystrom_weights
from approx_attention.coresets.guard import best_of
from approx_attention.evaluation import sup_error
from tests.methods.test_coreset import KEY, clustered
from tests.programs import equations
from tests.references import compiled, random_head

pytestmark = pytest.mark.all_forms

NUM_KEYS, SIZE = 512, 48


def low_rank(seed, num_keys=NUM_KEYS):
    random = np.random.default_rng(seed)
    k = random.normal(size=(num_keys, 3)) @ random.normal(size=(3, 8))
    v = k @ random.normal(size=(8, 3)) + 0.3 * random.normal(size=(num_keys, 3))
    return jnp.asarray(k / np.linalg.norm(k, axis=1).max() * 2, jnp.float32), jnp.asarray(v, jnp.float32)


def outliers(seed):
    random = np.random.default_rng(seed)
    side = np.where(np.arange(NUM_KEYS) < 6, -2.0, 2.0)[:, None]
    k = side * np.eye(8)[0] + 0.2 * random.normal(size=(NUM_KEYS, 8))
    v = random.normal(size=(NUM_KEYS, 3)) + np.where(side < 0, 2.0, 0.0)
    return jnp.asarray(k, jnp.float32), jnp.asarray(v, jnp.float32)


@jax.jit
def error_of(k, v, small):
    return sup_error(k, v, small, 2.0, num_random=256, num_keys=128, num_starts=8, num_steps=20).error


def error(k, v, small):
    """The error of a summary, padded so that all summaries share one program."""
    parts = (pad_rows(x, NUM_KEYS - x.shape[0]) for x in (small.k, small.value_sum, small.mass))
    return float(error_of(k, v, WeightedKV(*parts, small.values_from_to)))


@pytest.mark.parametrize("data", [low_rank, outliers])
def test_the_guard_is_never_far_from_the_best(data):
    k, v = data(7)
    errors = {
        name: error(k, v, summarize_coreset(k, v, KEY, coreset_size=SIZE, algorithm=name, query_radius=2.0))
        for name in ("guarded", "kmeans_nystrom", "kmeans_merge", "uniform")
    }
    guarded = errors.pop("guarded")
    assert guarded < 1.3 * min(errors.values())


def test_the_best_candidate_wins_and_a_failed_solution_loses():
    _, k, v = random_head(1, 1, 40, 4, 2)
    tokens = WeightedKV.of_tokens(k, v)
    half = dataclasses.replace(tokens, mass=tokens.mass.at[20:].set(0), value_sum=tokens.value_sum.at[20:].set(0))
    failed = dataclasses.replace(tokens, value_sum=tokens.value_sum * jnp.nan)
    best = jax.jit(lambda *candidates: best_of(candidates, tokens, jnp.ones(()), KEY))
    for candidates in ((half, tokens, failed), (failed, tokens, half), (tokens, half, half)):
        np.testing.assert_array_equal(best(*candidates).mass, tokens.mass)


def test_known_queries_decide():
    random = np.random.default_rng(2)
    k, v = (random.normal(size=(64, size)) + at for size, at in ((4, 0), (2, 1)))
    k[-1], v[-1] = 3 * k[-1], [4, -2]
    k, v = jnp.asarray(k, jnp.float32), jnp.asarray(v, jnp.float32)
    tokens = WeightedKV.of_tokens(k, v)
    # The last key is left out: short probes hardly see it, and a long query attends to it alone.
    blind = dataclasses.replace(tokens, mass=tokens.mass.at[-1].set(0), value_sum=tokens.value_sum.at[-1].set(0))
    flat = dataclasses.replace(tokens, value_sum=0.5 * tokens.value_sum)
    query = 20 * k[-1:] / jnp.linalg.norm(k[-1])
    ratio = jnp.float32(1e-3)
    chosen = jax.jit(lambda queries: best_of([flat, blind], tokens, ratio, KEY, queries=queries))
    assert float(jax.jit(lambda: best_of([flat, blind], tokens, ratio, KEY))().mass[-1]) == 0
    assert float(chosen(query).mass[-1]) == 1
    small = jax.jit(lambda q: compress(tokens, KEY, coreset_size=16, queries=q))(k[:4])
    assert float(small.mass.sum()) == pytest.approx(64, rel=0.2)


@pytest.mark.parametrize("seeding", ["distant", "farthest"])
def test_distant_keys_are_seeded(seeding):
    k, v = clustered(24, 400, num_clusters=3, noise=0.01)
    k[[17, 90, 301]] = -3 * k[:3] + np.eye(3, k.shape[1])
    tokens = WeightedKV.of_tokens(jnp.asarray(k), jnp.asarray(v), jnp.asarray(np.arange(400) != 5))
    places = np.asarray(compiled(SEEDINGS[seeding])(tokens, 12, jnp.ones(()), KEY))
    assert {17, 90, 301} <= set(places)
    assert 5 not in places
    assert len(set(places)) == 12


def test_nystrom_weights_are_linear_in_the_tokens():
    _, k, v = random_head(25, 1, 50, 4, 2, spread=0.7)
    mass = jnp.asarray(np.random.default_rng(0).uniform(1, 4, 50), jnp.float32)
    landmarks = WeightedKV.of_tokens(k[:9], v[:9])
    taken = jnp.arange(50) % 3 == 0
    solve = compiled(with_nystrom_weights)

    def solved(mass):
        tokens = WeightedKV(k, mass[:, None] * v, mass)
        tokens = dataclasses.replace(tokens, value_range=WeightedKV.of_tokens(k, v).values_from_to)
        return solve(tokens, landmarks, jnp.float32(0.5), 1e-3)

    signed = solved(jnp.where(taken, -mass, 2 * mass))
    kept, less = solved(jnp.where(taken, 0, 2 * mass)), solved(jnp.where(taken, mass, 0))
    for name in ("mass", "value_sum"):
        expected = getattr(kept, name) - getattr(less, name)
        np.testing.assert_allclose(getattr(signed, name), expected, atol=2e-3 * float(jnp.abs(expected).max()))


def streamed(k, v, streaming):
    running = running_coreset(8, KEY, coreset_size=SIZE, streaming=streaming, sinks=0)
    blocks = jax.tree.map(lambda x: x.reshape(-1, 32, x.shape[1]), (k, v))
    starts, mask = 32 * jnp.arange(NUM_KEYS // 32, dtype=jnp.int32), jnp.ones(32, bool)

    @jax.jit
    def stream(blocks):
        state = running.init(v.shape[1], jnp.float32)
        return running.read(jax.lax.scan(lambda s, x: (running.append(s, *x, mask), None), state, (starts, *blocks))[0])

    return stream(blocks)


def test_refits_beat_folds_on_smooth_keys_and_keep_the_mass():
    k, v = low_rank(3)
    refit, fold = (streamed(k, v, streaming) for streaming in ("refit", "fold"))
    assert error(k, v, refit) < 0.5 * error(k, v, fold)
    assert float(refit.mass.sum()) == pytest.approx(NUM_KEYS, rel=0.01)
    # The kept keys are keys of the stream, and all outputs lie in the range of its values.
    assert np.abs(np.asarray(k)[None] - np.asarray(refit.k)[:, None]).max(-1).min(1).max() < 1e-5
    out = np.asarray(attend(jnp.asarray(np.random.default_rng(0).normal(size=(50, 8)), jnp.float32), refit).out)
    v = np.asarray(v)
    assert (out >= v.min(0) - 1e-5).all()
    assert (out <= v.max(0) + 1e-5).all()


def test_refits_are_no_worse_than_folds_where_no_weights_fit():
    k, v = outliers(4)
    assert error(k, v, streamed(k, v, "refit")) < 1.2 * error(k, v, streamed(k, v, "fold"))


def test_a_coreset_takes_few_steps_in_sequence():
    shapes = [jax.ShapeDtypeStruct((16384, 64), jnp.float32)] * 2
    program = jax.make_jaxpr(lambda k, v: summarize_coreset(k, v, KEY, coreset_size=1024))(*shapes)
    products = [times for x, times in equations(program.jaxpr, platform="cuda") if x.primitive.name == "dot_general"]
    assert sum(products) < 100


@pytest.mark.parametrize("algorithm", ["kmeans_merge", "guarded"])
def test_padding_changes_no_coreset_of_more_than_half_of_the_tokens(algorithm):
    # An odd number of queries, fewer than the probes.
    q, k, v = random_head(9, 6, 41, 4, 2)

    @jax.jit
    def answers(k, v, kv_mask):
        make = functools.partial(summarize_coreset, coreset_size=30, algorithm=algorithm)
        return jnp.stack([attend(q, make(k, v, key, kv_mask=kv_mask)).out for key in jax.random.split(KEY, 4)])

    padded = [jnp.concatenate([x, jnp.full((45, x.shape[1]), jnp.nan)]) for x in (k, v)]
    expected = answers(k, v, jnp.ones(41, bool))
    np.testing.assert_allclose(answers(*padded, jnp.arange(86) < 41), expected, atol=1e-5)


def test_the_guard_sees_the_normaliser():
    # All values are equal: outputs carry no information, and only the normaliser is approximated.
    k = 1.4 * jax.random.normal(KEY, (512, 2))
    tokens = WeightedKV.of_tokens(k, jnp.ones((512, 4)))
    q = jax.random.normal(jax.random.key(6), (64, 2))
    q = q * jnp.linalg.norm(k, axis=1).max() / jnp.linalg.norm(q, axis=1, keepdims=True)

    @functools.partial(jax.jit, static_argnames="algorithm")
    def errors(key, algorithm):
        small = compress(tokens, key, coreset_size=108, algorithm=algorithm)
        return jnp.abs(jnp.expm1(attend(q, small).lse - attend(q, tokens).lse)).max()

    for key in jax.random.split(jax.random.key(7), 4):
        assert errors(key, "guarded") < max(0.05, 1.5 * float(errors(key, "kmeans_merge")))
