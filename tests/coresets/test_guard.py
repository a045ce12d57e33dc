"""Choosing among coresets by probes, seeding with distant keys, and refitting weights in a stream."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import WeightedKV, attend, summarize_coreset
from approx_attention.coresets import compress, running_coreset
from approx_attention.coresets.algorithms import SEEDINGS
from approx_attention.coresets.clustering import with_nystrom_weights
from approx_attention.coresets.guard import best_of
from approx_attention.evaluation import sup_error
from tests.methods.test_coreset import KEY, clustered, streamed
from tests.programs import equations
from tests.references import as_array, compiled, random_head

attend, summarize_coreset, of_tokens = compiled(attend, summarize_coreset, WeightedKV.of_tokens)
NUM_KEYS, SIZE = 512, 48


def low_rank(seed, num_keys=NUM_KEYS):
    random = np.random.default_rng(seed)
    k = random.normal(size=(num_keys, 3)) @ random.normal(size=(3, 8))
    v = k @ random.normal(size=(8, 3)) + 0.3 * random.normal(size=(num_keys, 3))
    return as_array(k / np.linalg.norm(k, axis=1).max() * 2), as_array(v)


def outliers(seed):
    random = np.random.default_rng(seed)
    side = np.where(np.arange(NUM_KEYS) < 6, -2.0, 2.0)[:, None]
    k = side * np.eye(8)[0] + 0.2 * random.normal(size=(NUM_KEYS, 8))
    v = random.normal(size=(NUM_KEYS, 3)) + np.where(side < 0, 2.0, 0.0)
    return as_array(k), as_array(v)


@jax.jit
def error_of(k, v, small):
    return sup_error(k, v, small, 2.0, num_random=256, num_keys=128, num_starts=8, num_steps=20).error


def error(k, v, small):
    """The error of a summary, padded so that all summaries share one program."""
    lacking = NUM_KEYS - small.mass.shape[0]
    parts = [
        as_array(np.pad(x, [(0, lacking)] + [(0, 0)] * (x.ndim - 1))) for x in (small.k, small.value_sum, small.mass)
    ]
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
    tokens, first = of_tokens(k, v), np.arange(40) < 20
    half = dataclasses.replace(tokens, mass=as_array(first), value_sum=as_array(np.where(first[:, None], v, 0)))
    failed = dataclasses.replace(tokens, value_sum=as_array(np.full((40, 2), np.nan)))
    best = jax.jit(lambda *candidates: best_of(candidates, tokens, jnp.float32(1), KEY))
    for candidates in ((half, tokens, failed), (failed, tokens, half), (tokens, half, half)):
        np.testing.assert_array_equal(best(*candidates).mass, tokens.mass)


def test_known_queries_decide():
    random = np.random.default_rng(2)
    k, v = (random.normal(size=(64, size)) + at for size, at in ((4, 0), (2, 1)))
    k[-1], v[-1] = 3 * k[-1], [4, -2]
    tokens = of_tokens(as_array(k), as_array(v))
    # The last key is left out: short probes hardly see it, and a long query attends to it alone.
    others = np.arange(64) < 63
    blind = dataclasses.replace(tokens, mass=as_array(others), value_sum=as_array(np.where(others[:, None], v, 0)))
    flat = dataclasses.replace(tokens, value_sum=as_array(v / 2))
    query = as_array(20 * k[-1:] / np.linalg.norm(k[-1]))
    ratio = as_array(1e-3)
    chosen = jax.jit(lambda queries: best_of([flat, blind], tokens, ratio, KEY, queries=queries))
    assert np.asarray(jax.jit(lambda: best_of([flat, blind], tokens, ratio, KEY))().mass)[-1] == 0
    assert np.asarray(chosen(query).mass)[-1] == 1
    small = jax.jit(lambda q: compress(tokens, KEY, coreset_size=16, queries=q))(as_array(k[:4]))
    assert np.asarray(small.mass).sum() == pytest.approx(64, rel=0.2)


@pytest.mark.parametrize("seeding", ["distant", "farthest"])
def test_distant_keys_are_seeded(seeding):
    k, v = clustered(24, 400, num_clusters=3, noise=0.01)
    k[[17, 90, 301]] = -3 * k[:3] + np.eye(3, k.shape[1])
    tokens = of_tokens(as_array(k), as_array(v), as_array(np.arange(400) != 5, bool))
    places = np.asarray(compiled(SEEDINGS[seeding])(tokens, 12, jnp.float32(1), KEY))
    assert {17, 90, 301} <= set(places)
    assert 5 not in places
    assert len(set(places)) == 12


def test_nystrom_weights_are_linear_in_the_tokens():
    _, k, v = random_head(25, 1, 50, 4, 2, spread=0.7)
    mass = np.random.default_rng(0).uniform(1, 4, 50)
    taken = np.arange(50) % 3 == 0

    @jax.jit
    def solve(mass):
        tokens, landmarks = WeightedKV.of_tokens(k, v), WeightedKV.of_tokens(k[:9], v[:9])
        tokens = WeightedKV(k, mass[:, None] * v, mass, tokens.values_from_to)
        return with_nystrom_weights(tokens, landmarks, jnp.float32(0.5), 1e-3)

    def solved(mass):
        solution = solve(as_array(mass))
        return np.asarray(solution.mass), np.asarray(solution.value_sum)

    signed = solved(np.where(taken, -mass, 2 * mass))
    kept, less = solved(np.where(taken, 0, 2 * mass)), solved(np.where(taken, mass, 0))
    for ours, positive, negative in zip(signed, kept, less, strict=True):
        expected = positive - negative
        np.testing.assert_allclose(ours, expected, atol=2e-3 * np.abs(expected).max())


@functools.partial(jax.jit, static_argnames="streaming")
def streamed_by(streaming, k, v):
    running = running_coreset(8, KEY, coreset_size=SIZE, streaming=streaming, sinks=0)
    return streamed(running, k, v, jnp.ones(NUM_KEYS, bool), 32)


def test_refits_beat_folds_on_smooth_keys_and_keep_the_mass():
    k, v = low_rank(3)
    refit, fold = (streamed_by(streaming, k, v) for streaming in ("refit", "fold"))
    assert error(k, v, refit) < 0.5 * error(k, v, fold)
    assert np.asarray(refit.mass).sum() == pytest.approx(NUM_KEYS, rel=0.01)
    # The kept keys are keys of the stream, and all outputs lie in the range of its values.
    assert np.abs(np.asarray(k)[None] - np.asarray(refit.k)[:, None]).max(-1).min(1).max() < 1e-5
    out = np.asarray(attend(as_array(np.random.default_rng(0).normal(size=(50, 8))), refit).out)
    v = np.asarray(v)
    assert (out >= v.min(0) - 1e-5).all()
    assert (out <= v.max(0) + 1e-5).all()


def test_refits_are_no_worse_than_folds_where_no_weights_fit():
    k, v = outliers(4)
    assert error(k, v, streamed_by("refit", k, v)) < 1.2 * error(k, v, streamed_by("fold", k, v))


@pytest.mark.all_forms
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
        return jax.lax.map(lambda key: attend(q, make(k, v, key, kv_mask=kv_mask)).out, jax.random.split(KEY, 4))

    padded = (as_array(np.pad(x, ((0, 45), (0, 0)), constant_values=np.nan)) for x in (k, v))
    expected = answers(k, v, np.ones(41, bool))
    np.testing.assert_allclose(answers(*padded, np.arange(86) < 41), expected, atol=1e-5)


def test_the_guard_sees_the_normaliser():
    # All values are equal: outputs carry no information, and only the normaliser is approximated.
    k, q = (np.asarray(jax.random.normal(key, (n, 2))) for key, n in ((KEY, 512), (jax.random.key(6), 64)))
    k = 1.4 * k
    tokens = of_tokens(as_array(k), as_array(np.ones((512, 4))))
    q = as_array(q * np.linalg.norm(k, axis=1).max() / np.linalg.norm(q, axis=1, keepdims=True))

    @functools.partial(jax.jit, static_argnames="algorithm")
    def errors(key, algorithm):
        small = compress(tokens, key, coreset_size=108, algorithm=algorithm)
        return jnp.abs(jnp.expm1(attend(q, small).lse - attend(q, tokens).lse)).max()

    for key in jax.random.split(jax.random.key(7), 4):
        assert errors(key, "guarded") < max(0.05, 1.5 * float(errors(key, "kmeans_merge")))
