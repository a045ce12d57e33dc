"""Scatterbrain against the float64 matrix: exponentials on the support, products of features off it, one normaliser."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import Proposal, favor, local, scatterbrain
from approx_attention.core import orthogonal_projection
from tests.methods.case import Case
from tests.references import as_array, brute_force, causal_mask, compiled, random_head, relative_error, without_padding

CASES = {
    "scatterbrain": Case(
        changes={
            "projection": as_array(np.ones((3, 8))),
            "proposal": Proposal(as_array(np.full(8, 0.1)), as_array(1.2 * np.eye(8))),
        },
        devices={"num_features": 16, "window_size": 4},
    ),
}

scatterbrain, favor = compiled(scatterbrain, favor)
PROJECTION = jax.jit(orthogonal_projection, static_argnums=(1, 2))(jax.random.key(0), 12, 8)


def support(num_queries, num_keys, window_size):
    blocks_q, blocks_k = np.arange(num_queries) // window_size, np.arange(num_keys) // window_size
    return np.abs(blocks_q[:, None] - blocks_k[None, :]) <= 1


def mixed_matrix(q, k, v, projection, window_size, *, seen=None):
    """Outputs and log-normalisers of phi phi^T off the support and exp on it, in float64."""
    # The scale is split equally between queries and keys.
    q, k = (np.asarray(x, np.float64) / x.shape[1] ** 0.25 for x in (q, k))
    projection, v = np.asarray(projection, np.float64), np.asarray(v, np.float64)
    log_q, log_k = (x @ projection.T - np.sum(x * x, 1, keepdims=True) / 2 for x in (q, k))
    log_estimates = np.logaddexp.reduce(log_q[:, None, :] + log_k[None, :, :], axis=2) - math.log(len(projection))
    logits = np.where(support(len(q), len(k), window_size), q @ k.T, log_estimates)
    return brute_force(logits, np.eye(len(k)), v, scale=1, mask=seen)


@pytest.mark.parametrize(
    ("num_queries", "num_keys", "window_size"),
    [(23, 23, 4), (5, 21, 3), (21, 5, 3), (1, 9, 2), (9, 1, 2), (11, 13, 64)],
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_matrix_as_it_is_defined(num_queries, num_keys, window_size, is_causal):
    q, k, v = random_head(0, num_queries, num_keys, 8, 5)
    kv_mask = np.arange(num_keys) % 5 != 2
    options = {"projection": PROJECTION, "window_size": window_size, "is_causal": is_causal, "return_state": True}
    for mask in (np.ones(num_keys, bool), kv_mask):
        state = scatterbrain(q, k, v, **options, kv_mask=jax.device_put(mask))
        *tokens, rows = without_padding(*map(np.asarray, (q, k, v)), mask, is_causal)
        seen = causal_mask(len(tokens[0]), len(tokens[1])) if is_causal else None
        out, lse = mixed_matrix(*tokens, PROJECTION, window_size, seen=seen)
        np.testing.assert_allclose(np.asarray(state.out)[rows], out, atol=5e-6)
        np.testing.assert_allclose(np.asarray(state.lse)[rows], lse, atol=5e-6)


def test_in_float64_and_beyond_one_batch_of_blocks(x64):
    # 1100 blocks of one token are more than one step processes.
    q, k, v = random_head(1, 1100, 1100, 8, 2, jnp.float64)
    projection = as_array(PROJECTION, jnp.float64)
    out = jax.jit(functools.partial(scatterbrain, projection=projection, window_size=1))(q, k, v)
    np.testing.assert_allclose(out, mixed_matrix(q, k, v, projection, 1)[0], atol=1e-12)


def test_no_weight_is_lost_to_features_that_are_far_too_large():
    # The estimates on the support exceed the exact weights by e^190: a subtraction would leave no digit of them.
    q, _, v = random_head(2, 24, 24)
    first = np.eye(1, 8, dtype=np.float32)
    q = np.where(first > 0, np.float32(-0.01), np.float32(0.1) * np.asarray(q))
    direction = as_array(20 * first)
    k = np.where(support(24, 24, 4)[0][:, None], 30 * first, -30 * first)
    out = jax.jit(functools.partial(scatterbrain, projection=direction, window_size=4))(q, k, v)
    np.testing.assert_allclose(out, mixed_matrix(q, k, v, direction, 4)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window_size", [7, 100])
def test_a_window_that_covers_everything_is_exact(is_causal, window_size):
    q, k, v = random_head(3, 13, 13)
    options = {"projection": PROJECTION, "window_size": window_size, "is_causal": is_causal, "return_state": True}
    state = jax.jit(functools.partial(scatterbrain, **options))(q, k, v)
    out, lse = brute_force(q, k, v, mask=causal_mask(13, 13) if is_causal else None)
    np.testing.assert_allclose(state.out, out, atol=2e-6)
    np.testing.assert_allclose(state.lse, lse, atol=2e-6)


def test_causal_it_is_favor():
    q, k, v = random_head(4, 30, 30)
    key = jax.random.key(3)
    options = {"num_features": 16, "is_causal": True}
    out = scatterbrain(q, k, v, key, window_size=4, **options)
    np.testing.assert_array_equal(out, favor(q, k, v, key, block_size=4, **options))
    assert relative_error(scatterbrain(q, k, v, key, window_size=8, **options), out) > 1e-2


def test_numerator_and_normalizer_are_unbiased():
    q, k, v = random_head(5, 12, 24, spread=0.5)
    num_draws = 4000

    @jax.jit
    @jax.vmap
    def draw(key):
        state = scatterbrain(q, k, v, key, num_features=16, window_size=3, return_state=True)
        mass = jnp.exp(state.lse)
        return mass, mass[:, None] * state.out

    exact_out, exact_lse = brute_force(q, k, v)
    expected = np.exp(exact_lse), np.exp(exact_lse)[:, None] * exact_out
    drawn = map(np.asarray, draw(jax.random.split(jax.random.key(1), num_draws)))
    for estimates, truth in zip(drawn, expected, strict=True):
        standard_error = np.std(estimates, axis=0) / math.sqrt(num_draws)
        assert np.all(standard_error > 0)
        assert np.all(np.abs(np.mean(estimates, axis=0) - truth) < 4.5 * standard_error)
        # The test is sensitive: a bias of 10% would be seen.
        assert np.all(standard_error < 0.02 * np.abs(truth).max())


def test_padding_is_harmless_and_at_the_end_as_if_removed():
    q, k, v = random_head(6, 19, 19)
    function = jax.jit(functools.partial(scatterbrain, projection=PROJECTION, window_size=4))
    real = np.arange(19) % 3 != 1
    soiled = (np.where(real[:, None], x, np.float32(np.nan)) for x in (k, v))
    np.testing.assert_array_equal(function(q, *soiled, kv_mask=real), function(q, k, v, kv_mask=real))
    for length in (1, 10):
        masked = function(q, k, v, kv_mask=np.arange(19) < length)
        removed = mixed_matrix(q, np.asarray(k)[:length], np.asarray(v)[:length], PROJECTION, 4)[0]
        np.testing.assert_allclose(masked, removed, atol=2e-6)


@pytest.mark.parametrize("is_causal", [False, True])
def test_nothing_to_see(is_causal):
    q, k, v = random_head(7, 19, 19)
    options = {"projection": PROJECTION, "window_size": 4, "is_causal": is_causal}

    @jax.jit
    def out_and_gradients(kv_mask):
        out, vjp = jax.vjp(functools.partial(scatterbrain, **options, kv_mask=kv_mask), q, k, v)
        return out, vjp(jnp.ones_like(out))

    out, gradients = out_and_gradients(np.zeros(19, bool))
    for x in (out, *gradients):
        np.testing.assert_array_equal(x, 0)
    # One key only: rows far from it have no neighbour, rows near it no moments.
    out, gradients = out_and_gradients(np.arange(19) == 9)
    chex.assert_tree_all_finite((out, gradients))
    sees = np.arange(19) >= 9 if is_causal else np.ones(19, bool)
    np.testing.assert_allclose(out, np.where(sees[:, None], np.asarray(v)[9], 0), atol=1e-6)


def test_a_later_token_changes_nothing_before_it():
    q, k, v = random_head(8, 19, 19)
    function = jax.jit(functools.partial(scatterbrain, projection=PROJECTION, window_size=4, is_causal=True))
    before = np.asarray(function(q, k, v))
    for j in (3, 4, 12):
        later_k, later_v = np.array(k), np.array(v)
        later_k[j] += 3
        later_v[j] = 1e4
        after = np.asarray(function(q, later_k, later_v))
        np.testing.assert_array_equal(after[:j], before[:j])
        assert np.any(after[j:] != before[j:])


def test_sparse_serves_low_temperature_and_low_rank_high():
    # Queries equal keys: the sharper the softmax, the more weight is on the diagonal.
    x, v = (as_array(np.random.default_rng(i).normal(size=(128, 16))) for i in range(2))
    keys = jax.random.split(jax.random.key(5), 8)
    truths = [(s, brute_force(x, x, v, scale=s)[0]) for s in (0.5, 0.25, 0.003)]

    def errors(method, **options):
        @jax.jit
        @functools.partial(jax.vmap, in_axes=(None, 0))
        def answer(scale, key):
            return method(x, x, v, key, scale=scale, **options)

        return [np.mean([relative_error(x, truth) for x in np.asarray(answer(s, keys))]) for s, truth in truths]

    both = errors(scatterbrain, window_size=8, num_features=64)
    low_rank = errors(favor, num_features=64)
    # A query of the baseline sees four blocks of eight, one of the support three.
    sparse = errors(local, window_size=16)
    assert both[0] < 0.6 * low_rank[0]
    assert both[1] < 0.8 * min(low_rank[1], sparse[1])
    assert both[2] < 0.1 * sparse[2]


def test_what_is_refused():
    q, k, v = random_head(9, 5, 9)
    with pytest.raises(ValueError, match="window_size must be at least 1, got 0"):
        scatterbrain(q, k, v, jax.random.key(0), window_size=0)
    with pytest.raises(ValueError, match="num_features must be at least 1, got 0"):
        scatterbrain(q, k, v, jax.random.key(0), num_features=0)
    with pytest.raises(ValueError, match="scatterbrain is random"):
        scatterbrain(q, k, v)
