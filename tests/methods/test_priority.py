"""Priority attention against a transcription in float64, means over many samples, and its law of errors."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import (
    Decoder,
    HeadsDecoder,
    attention,
    lsh_priority,
    lsh_top_k,
    merge,
    priority,
    summarize_priority,
    top_k,
)
from approx_attention.core import causal_state
from approx_attention.evaluation import load_sample
from approx_attention.methods import running_priority
from tests.methods.case import Case
from tests.references import as_array, brute_force, causal_mask, compiled, random_head, random_heads, relative_error

CASES = {
    "priority": Case(
        diagonal_size=14,
        changes={"noise": as_array(np.linspace(0.01, 1, 40))},
        # The threshold and the choice have no gradient; if all keys are chosen, there is neither.
        smooth={"keys_per_query": 15},
        # More than all keys, so that the output equals that of one device.
        devices={"keys_per_query": 64, "block_size": 4},
    ),
    "lsh_priority": Case(
        diagonal_size=14,
        # The number of buckets depends on the length.
        any_length=lambda length: {"num_hashes": 1},
        changes={
            "num_rounds": 1,
            "num_hashes": 1,
            "projection": as_array(np.ones((1, 2, 8))),
            "noise": as_array(np.linspace(0.01, 1, 40)),
        },
        # A causal query considers a whole block of 64 keys, and every query several times K keys of large lift.
        changes_are_causal=False,
        contexts={argument: {"keys_per_query": 2} for argument in ("num_rounds", "num_hashes", "projection")},
        smooth={"keys_per_query": 15},
    ),
}

KEY = jax.random.key(3)
priority, lsh_priority, top_k = compiled(priority, lsh_priority, top_k)


def transcribed(q, k, v, u, count, mask, near=False, scale=None):
    """Numerator, normaliser, and the factors of all weights (0 for keys not chosen), query by query.

    Near keys are exact, and only the others are sampled.
    """
    q, k, v, u = (np.asarray(x, np.float64) for x in (q, k, v, u))
    weights = np.exp(q @ k.T * (1 / np.sqrt(q.shape[1]) if scale is None else scale))
    factors = np.zeros_like(weights)
    for t, row in enumerate(weights):
        seen = np.flatnonzero((mask & np.logical_not(near))[t])
        order = seen[np.argsort(-row[seen] / u[seen])]
        threshold = row[order[count]] / u[order[count]] if len(order) > count else 0
        chosen = order[:count]
        factors[t, chosen] = np.maximum(row[chosen], threshold) / row[chosen]
    factors = np.where(mask & near, 1, factors)
    estimates = factors * weights
    return estimates @ np.where(mask.any(0)[:, None], v, 0), estimates.sum(1), factors


@pytest.mark.parametrize("is_causal", [False, True])
def test_one_draw_equals_its_transcription_in_value_and_gradient(is_causal, x64):
    # Longer than a block of keys, with NaN in the padding. In the causal form, queries in padding see nothing.
    num_queries, num_keys, count, block_size = 60, 1100, 7, 4
    q, k, v = (np.asarray(x) for x in random_head(0, num_queries, num_keys, 8, 5, jnp.float64))
    u = np.random.default_rng(1).random(num_keys)
    kv_mask = np.arange(num_keys) % 3 != 0
    mask, near = np.broadcast_to(kv_mask, (num_queries, num_keys)), np.zeros(1, bool)
    if is_causal:
        mask = mask & causal_mask(num_queries, num_keys) & kv_mask[:num_queries, None]
        # Near keys: the real tokens of the query's block and of the one before it.
        block = (np.cumsum(kv_mask) - 1) // block_size
        near = block[None, :] >= block[:num_queries, None] - 1
    soiled = (np.where(kv_mask[:, None], x, np.nan) for x in (k, v))
    cotangent = np.random.default_rng(2).normal(size=(num_queries, 6))

    def numerator_and_normaliser(q, k, v):
        options = {"noise": jnp.asarray(u), "keys_per_query": count, "is_causal": is_causal, "return_state": True}
        options["block_size"] = block_size
        state = priority(q, k, v, kv_mask=jnp.asarray(kv_mask), **options)
        mass = jnp.exp(state.lse)[:, None]
        return jnp.concatenate([mass * state.out, mass], axis=1)

    def program(q, k, v):
        sums, pull = jax.vjp(numerator_and_normaliser, q, k, v)
        return sums, pull(jnp.asarray(cotangent))

    sums, gradients = jax.jit(program)(*map(jax.device_put, (q, *soiled)))
    numerator, normaliser, factors = transcribed(q, k, v, u, count, mask, near)
    np.testing.assert_allclose(sums, np.column_stack([numerator, normaliser]), rtol=1e-12, atol=1e-12)
    assert (normaliser == 0).any() == is_causal  # the query that sees only padding

    # Gradients are those of the sums with constant factors.
    estimates = factors * np.exp(q @ k.T / np.sqrt(8))
    of_logits = estimates * (cotangent[:, :5] @ v.T + cotangent[:, 5:])
    expected = of_logits @ k / np.sqrt(8), of_logits.T @ q / np.sqrt(8), estimates.T @ cotangent[:, :5]
    chex.assert_trees_all_close(gradients, expected, rtol=1e-10, atol=1e-10)


def test_queries_share_the_numbers_and_have_fresh_ones_under_vmap():
    q, k, v = random_head(9, 2, 200, 4, 2, spread=1.5)
    q = jax.device_put(np.repeat(np.asarray(q)[:1], 400, axis=0))
    shared = np.asarray(priority(q, k, v, jax.random.key(1), keys_per_query=8))
    np.testing.assert_allclose(shared, np.broadcast_to(shared[:1], shared.shape), atol=1e-6)
    keys = jax.random.split(jax.random.key(2), len(q))
    fresh = jax.jit(jax.vmap(lambda q, key: priority(q[None], k, v, key, keys_per_query=8)[0]))(q, keys)
    centred = np.asarray(fresh) - np.asarray(fresh).mean(0)
    variance = np.mean(centred**2, axis=0)
    assert np.all(variance > 1e-4)
    # Outputs of neighbouring queries are uncorrelated: five standard errors of 400 products.
    assert np.all(np.abs(np.mean(centred[1:] * centred[:-1], axis=0)) < 0.25 * variance)


NUM_DRAWS = 3000


@pytest.mark.parametrize(("method", "count"), [(priority, 6), (lsh_priority, 9)], ids=["exactly", "by hashing"])
def test_sums_and_their_gradients_are_unbiased_and_vary_as_promised(x64, method, count):
    # The method draws its uniform numbers, so they are tested too. With K = 9, hashing considers all keys.
    num_keys = 40
    q, k, v = random_head(4, 3, num_keys, 4, 2, jnp.float64, spread=1.5)

    def sums(q, key):
        state = method(q, k, v, key, keys_per_query=count, return_state=True)
        mass = jnp.exp(state.lse)
        return mass, mass[:, None] * state.out

    def draw(key):
        (mass, numerator), pull = jax.vjp(functools.partial(sums, key=key), q)
        return mass, numerator, *pull((jnp.ones_like(mass), jnp.zeros_like(numerator)))

    draws = [np.asarray(x) for x in jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(5), NUM_DRAWS))]
    out, lse = brute_force(q, k, v)
    mass = np.exp(lse)
    weights = np.exp(np.asarray(q) @ np.asarray(k).T / 2)
    truths = mass, mass[:, None] * out, weights @ np.asarray(k) / 2
    for estimates, truth in zip(draws, truths, strict=True):
        deviation = np.std(estimates, axis=0) / np.sqrt(NUM_DRAWS)
        assert np.all(np.abs(np.mean(estimates, axis=0) - truth) < 4.5 * deviation)
        # The test is sensitive: a bias of 10% would be seen.
        assert np.all(deviation < 0.02 * np.abs(truth).max())
    assert np.all(np.var(draws[0], axis=0) < mass**2 / (count - 1))
    greatest = np.square(v).sum(1).max()
    assert np.all(np.var(draws[1], axis=0).sum(1) < greatest * mass**2 / (count - 1))


def test_errors_fall_with_the_root_of_the_keys_read_and_not_with_the_length():
    # Values equal keys, so that the values of the keys with the largest logits differ from the others.
    q, k, _ = random_head(6, 32, 4096, 16)

    def error(method, count, length):
        own = (jax.device_put(np.asarray(k)[:length]),) * 2
        program = jax.jit(jax.vmap(lambda key: method(q, *own, key, keys_per_query=count)))
        outs = np.asarray(program(jax.random.split(KEY, 16)))
        return np.sqrt(np.mean(np.square(outs - brute_force(q, *own)[0])))

    few, many, short = (error(priority, *sizes) for sizes in ((32, 4096), (128, 4096), (32, 512)))
    few_best, short_best = (error(top_k, 32, length) for length in (4096, 512))
    assert 1.7 < few / many < 2.4
    assert 0.8 < few / short < 1.25
    # The share of the weight that the largest logits hold falls with the length.
    assert few_best > 1.4 * short_best
    assert few_best > 2 * few


def test_a_head_of_the_shipped_sample_whose_weights_are_spread():
    query, key, value = (np.asarray(x)[1, :1536] for x in load_sample())
    seen = causal_mask(1536, 1536)[-256::4]

    @functools.partial(jax.jit, static_argnames="method")
    def last(method, *tensors, **options):
        """Some of the last queries one by one, each over the keys up to its position, none exact by its block."""
        one = functools.partial(method.__wrapped__, keys_per_query=64, **options)
        return jax.vmap(lambda q, k, v, seen: one(q[None], k, v, kv_mask=seen)[0], (0, None, None, 0))(*tensors, seen)

    for head, most in ((0, 0.08), (1, 0.11)):
        q, k, v = (jax.device_put(x) for x in (query[-256::4, head], key[:, 0], value[:, 0]))
        exact = brute_force(q, k, v, mask=seen)[0]
        outs = [last(priority, q, k, v, key=jax.random.key(i)) for i in range(3)]
        error = np.mean([relative_error(out, exact) for out in outs])
        best = relative_error(last(top_k, q, k, v), exact)
        assert error < most
        assert best > 2 * error


def test_the_number_of_a_key_follows_from_its_place_alone():
    q, k, v = random_head(7, 5, 30)
    call = functools.partial(priority, keys_per_query=4)
    whole = call(q, k, v, KEY)
    # Padding after, between or before the keys changes nothing.
    for kv_mask in (np.arange(41) < 30, np.arange(41) % 4 != 3, np.arange(41) > 10):
        places = np.flatnonzero(kv_mask)[:30]
        longer = [np.full((41, 8), np.nan, np.float32) for _ in range(2)]
        for padded, x in zip(longer, (k, v), strict=True):
            padded[places] = x
        real = np.isin(np.arange(41), places)
        np.testing.assert_allclose(
            call(q, *map(jax.device_put, longer), KEY, kv_mask=jax.device_put(real)), whole, atol=1e-6
        )
    # A prefix of the keys uses the numbers of the whole sequence, so that causal outputs agree.
    x = random_head(8, 30, 30)
    cut = ([jax.device_put(np.asarray(y)[:length]) for y in x] for length in (30, 17))
    causal = [np.asarray(call(*y, KEY, is_causal=True, block_size=3)) for y in cut]
    np.testing.assert_allclose(causal[0][:17], causal[1], atol=1e-6)


@pytest.mark.parametrize("shared", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_cache_keeps_the_numbers_of_its_keys(shared):
    # A number for each key: given and shared by all heads, or sampled for each head.
    query, key, value = random_heads(10, 1, 16, 16, 4, 2)
    u = jax.device_put(np.random.default_rng(11).uniform(size=16).astype(np.float32))
    options = {"keys_per_query": 3, "block_size": 4, **({"noise": u} if shared else {})}
    rng = None if shared else KEY
    whole = functools.partial(attention, method="priority", rng=rng, is_causal=True, **options)
    decoder = HeadsDecoder("priority", num_kv_heads=2, head_dim=8, max_length=16, **options)
    extend, cache, outs = jax.jit(decoder.extend), jax.jit(functools.partial(decoder.init, 1))(rng), []
    query, key, value = (np.asarray(x) for x in (query, key, value))
    for t in range(16):
        out, cache = extend(cache, *(x[:, t : t + 1] for x in (query, key, value)))
        outs.append(out)
    np.testing.assert_allclose(np.concatenate(outs, axis=1), jax.jit(whole)(query, key, value), atol=2e-6)
    assert len(np.unique(np.asarray(cache.heads.past.prefix.u)[0, :, :8])) == (8 if shared else 16)


def test_prefixes_taken_from_the_sequence_are_those_of_blocks_in_turn(x64):
    tensors = random_head(4, 22, 22, dtype=jnp.float64)
    found = running_priority(8, KEY, keys_per_query=3, max_length=22)
    carried = found._replace(of_sequence=None)

    def with_gradients(running, *tensors):
        out, pull = jax.vjp(lambda *x: causal_state(*x, running=running, block_size=4, scale=0.5).out, *tensors)
        return out, *pull(jnp.cos(out))

    results = [jax.jit(functools.partial(with_gradients, running))(*tensors) for running in (found, carried)]
    assert np.any(np.asarray(results[0][0]) != 0)
    chex.assert_trees_all_close(*results, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("limit", [{"max_length": 8}, {"max_length": 16, "noise": as_array(np.linspace(0.1, 1, 9))}])
def test_a_prefix_that_is_too_long_gives_nan(limit):
    running = running_priority(8, KEY, keys_per_query=2, **limit)
    decoder = Decoder(running=running, head_dim=8, value_dim=8, block_size=4)
    out, _ = jax.jit(lambda *tensors: decoder.prefill(decoder.init(), *tensors))(*random_head(12, 24, 24))
    # The third block enters the sample at the start of the fifth.
    np.testing.assert_array_equal(np.isnan(out).all(axis=1), np.arange(24) >= 16)


# By hashing


@pytest.mark.parametrize("is_causal", [False, True])
def test_hashing_samples_among_the_keys_that_a_query_looks_at(is_causal, x64):
    # Without hash bits there is one bucket, in which a query sees the keys around its position, or the last ones.
    length, count = 200, 5
    q, k, v = (np.asarray(x) for x in random_head(13, length, length, 8, 5, jnp.float64))
    u, kv_mask = np.random.default_rng(14).random(length), np.arange(length) % 7 != 2
    rank = np.cumsum(kv_mask) - 1
    num_real, looked_at = rank[-1] + 1, np.zeros((length, length), bool)
    real = np.flatnonzero(kv_mask)
    for t in real:
        place = rank[t]
        if is_causal:
            block = place // 64 * 64
            near, others = np.arange(max(0, min(block, place - count)), place + 1), real[:block]
        else:
            start = min(max(0, place + 1 - 3), num_real - 6)
            near, others = np.arange(start, start + 6), real
        looked_at[t, real[near]] = True
        looked_at[t, others[np.argsort(u[others])[: 4 * (count + 1)]]] = True
    numerator, normaliser, _ = transcribed(q, k, v, u, count, looked_at)
    options = {"keys_per_query": count, "num_hashes": 0, "is_causal": is_causal, "return_state": True}
    soiled = (jax.device_put(np.where(kv_mask[:, None], x, np.nan)) for x in (k, v))
    noise = {"noise": jax.device_put(u), "projection": jax.device_put(np.zeros((2, 0, 8)))}
    state = lsh_priority(jax.device_put(q), *soiled, kv_mask=jax.device_put(kv_mask), **noise, **options)
    sums = np.exp(state.lse)[:, None] * np.column_stack([state.out, np.ones(length)])
    np.testing.assert_allclose(sums[real], np.column_stack([numerator, normaliser])[real], rtol=1e-10)


def test_hashing_finds_most_keys_where_logits_are_small_and_errs_less_than_its_largest_logits():
    q, k, _ = random_head(15, 32, 2048, 16)
    keys = jax.random.split(KEY, 4)

    @functools.cache
    def program(method):
        return jax.jit(jax.vmap(functools.partial(method, keys_per_query=32), (None, None, None, 0)))

    def error(method, factor):
        own = np.float32(factor) * np.asarray(q)
        outs = program(method)(own, k, k, keys)
        return relative_error(outs, np.broadcast_to(brute_force(own, k, k)[0], outs.shape))

    by_hashing, exactly = error(lsh_priority, 1), error(priority, 1)
    assert by_hashing < 1.2 * exactly
    assert error(lsh_priority, 2.5) > 1.2 * error(priority, 2.5)  # it misses keys, as documented
    assert error(lsh_top_k, 1) > 1.5 * by_hashing


def test_what_is_refused():
    q, k, v = random_head(9, 8, 8)
    with pytest.raises(ValueError, match="priority is random"):
        priority(q, k, v)
    with pytest.raises(TypeError, match="noise"):
        priority(q, k, v, noise=as_array(np.ones(9)))
    with pytest.raises(ValueError, match="keys_per_query must be at least 1, got 0"):
        priority(q, k, v, KEY, keys_per_query=0)
    with pytest.raises(TypeError, match="method 'priority' keeps every token: pass max_length"):
        HeadsDecoder("priority", num_kv_heads=1, head_dim=8)
    parts = [functools.partial(summarize_priority, k, v, KEY, keys_per_query=count) for count in (2, 3)]
    with pytest.raises(ValueError, match="lifted tokens of one"):
        jax.eval_shape(lambda: merge(*(part() for part in parts)))
    with pytest.raises(ValueError, match="lsh_priority is random"):
        lsh_priority(q, k, v, noise=as_array(np.ones(8)))
