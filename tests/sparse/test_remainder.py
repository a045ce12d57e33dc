"""A sparse support, exactly, and a summary of the rest, against dense masks in float64."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import (
    AttentionState,
    FeatureMoments,
    SparsePattern,
    WeightedKV,
    attend,
    eva,
    fold_scale,
    scatterbrain,
    sparse_attention,
    sparse_coreset,
    sparse_plus_summary,
    summarize_coreset,
    summarize_exact,
    summarize_favor,
    summarize_mean_pool,
    summarize_polynomial,
    summarize_priority,
)
from approx_attention.core import TrigonometricFeatures, averaging_matrix, gaussian_projection
from approx_attention.core import subtract as take_away
from approx_attention.sparse import BlockMap
from tests.methods.test_sparse import LENGTH, PATTERNS, blocks_of, every_pattern, padded, support
from tests.references import brute_force, causal_mask, compiled, random_head, relative_error


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(37, 37), (10, 37), (37, 10)])
def test_a_summary_that_loses_nothing_makes_it_exact(num_queries, num_keys, is_causal):
    q, k, v = random_head(19, num_queries, num_keys)
    kv_mask = np.arange(num_keys) % 5 != 3
    mask = causal_mask(num_queries, num_keys) if is_causal else True
    soiled = tuple(np.where(kv_mask[:, None], x, np.float32(np.nan)) for x in (k, v))
    for blocks in (blocks_of(num_queries, num_keys, 4, 0.3), blocks_of(num_queries, num_keys, 8, 0.0)):
        function = functools.partial(sparse_plus_summary, pattern=blocks, summarize=summarize_exact)
        state = jax.jit(functools.partial(function, is_causal=is_causal, return_state=True))(
            q, *soiled, kv_mask=kv_mask
        )
        out, lse = brute_force(q, k, v, mask=kv_mask[None] & mask)
        np.testing.assert_allclose(state.out, out, atol=2e-6)
        np.testing.assert_allclose(state.lse, lse, atol=2e-6)


gaussian_projection = jax.jit(gaussian_projection, static_argnums=(1, 2))
PROJECTION = gaussian_projection(jax.random.key(9), 12, 8)
FEATURES = functools.partial(summarize_favor, projection=PROJECTION)


def mixed_matrix(q, k, v, mask, seen=None):
    """Outputs and log-normalisers of products of features off the support and exponentials on it, in float64."""
    # The scale is split equally between queries and keys.
    q, k = (np.asarray(x, np.float64) / x.shape[1] ** 0.25 for x in (q, k))
    directions = np.asarray(PROJECTION, np.float64)
    log_q, log_k = (x @ directions.T - np.sum(x * x, 1, keepdims=True) / 2 for x in (q, k))
    estimates = np.logaddexp.reduce(log_q[:, None, :] + log_k[None, :, :], axis=2) - np.log(len(directions))
    return brute_force(np.where(mask, q @ k.T, estimates), np.eye(len(k)), v, scale=1, mask=seen)


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_moments_of_the_blocks_that_are_not_seen(share):
    # The diagonal alone leaves contiguous runs, which two scans sum; scattered blocks do not.
    q, k, v = random_head(20, LENGTH, LENGTH)
    blocks = blocks_of(LENGTH, LENGTH, 4, share)
    for is_causal in (False, True):
        seen = np.ones((LENGTH, LENGTH), bool)
        if is_causal:
            seen = causal_mask(LENGTH, LENGTH)
        function = functools.partial(sparse_plus_summary, pattern=blocks, summarize=FEATURES, is_causal=is_causal)
        state = jax.jit(functools.partial(function, return_state=True))(q, k, v)
        out, lse = mixed_matrix(q, k, v, blocks.to_mask(), seen)
        np.testing.assert_allclose(state.out, out, atol=5e-6)
        np.testing.assert_allclose(state.lse, lse, atol=5e-6)


# One program for all patterns.
less_the_support = jax.jit(functools.partial(sparse_plus_summary, summarize=FEATURES, return_state=True))


@every_pattern
def test_moments_less_what_they_make_of_the_support(kind):
    pattern = PATTERNS[kind]()
    q, k, v = random_head(21, LENGTH, LENGTH, spread=0.5)
    kv_mask = np.arange(LENGTH) % 6 != 2
    state = less_the_support(q, k, v, kv_mask=kv_mask, pattern=padded(pattern, LENGTH))
    out, lse = mixed_matrix(q, k, v, support(pattern), np.broadcast_to(kv_mask, (LENGTH, LENGTH)))
    np.testing.assert_allclose(state.out, out, atol=5e-5)
    np.testing.assert_allclose(state.lse, lse, atol=5e-5)


WAVES = TrigonometricFeatures(gaussian_projection(jax.random.key(9), 16, 8))
MOMENTS = {
    "positive": FEATURES,
    "signed": lambda k, v, key, *, kv_mask: FeatureMoments.of_tokens(WAVES, k, v, kv_mask),
    "read by another map": functools.partial(summarize_polynomial, degree=2),
}


@pytest.mark.parametrize("is_causal", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("name", [pytest.param("positive", marks=pytest.mark.slow), "signed", "read by another map"])
def test_subtraction_of_any_moments_against_their_matrix(name, is_causal, x64):
    block_size, pattern = 8, PATTERNS["random"]()
    q, k, v = random_head(21, LENGTH, LENGTH, spread=0.7, dtype=jnp.float64)
    places, (q_own, k_own) = np.arange(LENGTH), compiled(fold_scale)(q, k)

    @jax.jit
    @functools.partial(jax.vmap, out_axes=1)
    def column(k):
        moments = MOMENTS[name](k[None], jnp.zeros((1, 1)), None, kv_mask=jnp.ones(1, bool))
        values, log_scale = moments.features(q_own)
        return (values * jnp.exp(log_scale + moments.log_scale[None])) @ moments.mass

    estimates = np.asarray(column(k_own))
    assert (estimates.min() < 0) == (name == "signed")
    kv_mask = places % 6 != 2
    exactly = support(pattern)
    if is_causal:
        exactly = exactly | (places[None] // block_size >= places[:, None] // block_size - 1)
    seen = kv_mask & (causal_mask(LENGTH, LENGTH) if is_causal else True)
    near = is_causal & (places[None] // block_size >= places[:, None] // block_size - 1)
    # Moments without a positive sum, before or after the subtraction, give no output.
    sums = [np.where(seen & ~hidden, estimates, 0).sum(1) for hidden in (near, exactly)]
    answered = (sums[0] > 0) & (sums[1] > 0)
    assert answered.all() == (not is_causal)
    weights = np.where(exactly, np.exp(np.asarray(q_own) @ np.asarray(k_own).T), estimates * answered[:, None]) * seen
    soiled = tuple(np.where(kv_mask[:, None], x, np.nan) for x in (k, v))
    options = {"is_causal": is_causal, "block_size": block_size, "kv_mask": jnp.asarray(kv_mask)}
    function = functools.partial(sparse_plus_summary, pattern=pattern, summarize=MOMENTS[name], **options)

    @jax.jit
    def answer(*args):
        out, pull = jax.vjp(function, *args)
        return out, pull(out)

    out, gradients = answer(q, *soiled)
    np.testing.assert_allclose(out, weights @ np.asarray(v) / weights.sum(1, keepdims=True), atol=1e-12)
    chex.assert_tree_all_finite(gradients)
    assert np.all(np.asarray(gradients[1])[~kv_mask] == 0)


def test_the_twins_are_the_methods_that_bear_their_names():
    q, k, v = random_head(22, 48, 48)
    window = BlockMap.banded(1, 1, block_size=8, num_queries=48, num_keys=48)

    def combined(**options):
        return jax.jit(functools.partial(sparse_plus_summary, pattern=window, **options))(q, k, v)

    for is_causal in (False, True):
        out = combined(summarize=FEATURES, is_causal=is_causal)
        twin = functools.partial(scatterbrain, projection=PROJECTION, window_size=8, is_causal=is_causal)
        expected = jax.jit(twin)(q, k, v)
        np.testing.assert_allclose(out, expected, atol=2e-6)

    def chunks(k, v, key, *, kv_mask):
        """Control variates of chunks of four, with their mean keys as directions."""
        k_chunks, v_chunks = (x.reshape(-1, 4, x.shape[1]) for x in (k, v))
        means = jnp.mean(k_chunks, axis=1)
        logits = jnp.einsum("cd,cjd->cj", means, k_chunks) - jnp.sum(k_chunks**2, axis=-1) / 2
        values = jnp.einsum("cj,cjd->cd", jax.nn.softmax(logits, axis=1), v_chunks)
        return WeightedKV(means, 4 * values, jnp.full(len(means), 4.0))

    twin = functools.partial(eva, window_size=8, overlap=8, chunk_size=4, proposal_mean="k")
    expected = jax.jit(twin)(q, k, v)
    np.testing.assert_allclose(combined(summarize=chunks), expected, atol=2e-6)
    expected = jax.jit(functools.partial(eva, window_size=8, chunk_size=4, is_causal=True))(q, k, v)
    np.testing.assert_allclose(combined(summarize=chunks, is_causal=True), expected, atol=2e-6)


@pytest.mark.parametrize("is_causal", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_coreset_twin(is_causal):
    q, k, v = random_head(22, 24, 24)
    window = BlockMap.banded(1, 1, block_size=6, num_queries=24, num_keys=24)
    options = {"coreset_size": 2, "algorithm": "uniform"}
    coresets = functools.partial(summarize_coreset, **options)
    key = jax.random.key(3)
    ours = functools.partial(sparse_plus_summary, pattern=window, summarize=coresets, is_causal=is_causal)
    twin = functools.partial(sparse_coreset, window_size=6, is_causal=is_causal, **options)
    out, expected = (jax.jit(function)(q, k, v, key) for function in (ours, twin))
    np.testing.assert_allclose(out, expected, atol=2e-6)


def test_signed_masses_and_means_of_blocks():
    q, k, v = random_head(23, 64, 64, spread=0.5)
    window = BlockMap.banded(1, 1, block_size=8, num_queries=64, num_keys=64)
    truth = brute_force(q, k, v)[0]

    def combined(summarize):
        function = functools.partial(sparse_plus_summary, pattern=window, summarize=summarize)
        return jax.jit(function)(q, k, v, jax.random.key(0))

    signed = functools.partial(summarize_coreset, coreset_size=4, algorithm="kmeans_nystrom")
    means = functools.partial(summarize_mean_pool, num_landmarks=2)
    near_only = relative_error(jax.jit(functools.partial(sparse_attention, pattern=window))(q, k, v), truth)
    answers = [combined(summarize) for summarize in (signed, means)]
    assert all(relative_error(answer, truth) < 0.5 * near_only for answer in answers)
    # Two means per block, against the matrix: each mean stands for four keys and counts four times.
    pool = np.asarray(compiled(averaging_matrix)(64, 16, jnp.float32), np.float64)
    keys, values = np.concatenate([k, pool @ np.asarray(k)]), np.concatenate([v, pool @ np.asarray(v)])
    near = window.to_mask()
    mask = np.concatenate([near, ~near[:, ::4]], axis=1)
    bias = np.log(np.where(np.arange(80) < 64, 1.0, 4.0))[None]
    np.testing.assert_allclose(answers[1], brute_force(q, keys, values, mask=mask, bias=bias)[0], atol=2e-6)


def test_a_summary_whose_part_cannot_be_left_out_is_an_error():
    q, k, v = random_head(25, 16, 16)
    pattern = BlockMap.banded(1, 1, block_size=4, num_queries=16, num_keys=16)
    function = functools.partial(sparse_plus_summary, pattern=pattern, summarize=summarize_priority)
    with pytest.raises(NotImplementedError, match="supports FeatureMoments and WeightedKV only, got LiftedKV"):
        jax.eval_shape(function, q, k, v, jax.random.key(0))


def test_a_later_token_changes_no_earlier_answer_of_support_and_summary():
    q, k, v = random_head(24, LENGTH, LENGTH)
    blocks, coresets = blocks_of(LENGTH, LENGTH, 4, 0.3), functools.partial(summarize_coreset, coreset_size=2)
    own = {"pattern": PATTERNS["global"](), "block_size": 4}
    for summarize, options in ((FEATURES, {"pattern": blocks}), (coresets, {"pattern": blocks}), (FEATURES, own)):
        function = jax.jit(functools.partial(sparse_plus_summary, summarize=summarize, is_causal=True, **options))
        before = np.asarray(function(q, k, v, jax.random.key(0)))
        for j in (4, 13, 18):
            later_k, later_v = np.array(k), np.array(v)
            later_k[j] += 3
            later_v[j] = 1e4
            after = np.asarray(function(q, later_k, later_v, jax.random.key(0)))
            np.testing.assert_array_equal(after[:j], before[:j])
            assert np.any(after[j:] != before[j:])


def test_subtract_undoes_merge(x64):
    q, k, v = random_head(25, 9, 20, dtype=jnp.float64)

    def of(part):
        present = np.zeros(20, bool)
        present[part] = True
        return compiled(attend)(q, compiled(WeightedKV.of_tokens)(k, v, jax.device_put(present)))

    subtract = compiled(take_away)
    rest = subtract(of(slice(0, 20)), of(slice(0, 12)))
    chex.assert_trees_all_close(rest, of(slice(12, 20)), atol=1e-10)
    nothing = AttentionState.empty(9, 8, jnp.float64)
    chex.assert_trees_all_equal(subtract(of(slice(0, 20)), nothing), of(slice(0, 20)))
    gone = subtract(of(slice(0, 20)), of(slice(0, 20)))
    np.testing.assert_array_equal(gone.out, 0)
    assert np.all(gone.lse == -np.inf)


@jax.jit
@functools.partial(jax.value_and_grad, argnums=(0, 1))
def _total(whole, part):
    rest = take_away(AttentionState(jnp.ones((1, 2)), whole), AttentionState(jnp.full((1, 2), 2.0), part))
    return jnp.sum(rest.out) + jnp.sum(jnp.exp(rest.lse))


@pytest.mark.parametrize("whole", [0.0, -math.inf])
@pytest.mark.parametrize("part", [0.0, 1.0, 200.0])
def test_what_is_not_there_has_no_derivative(whole, part):
    # A part that exceeds the whole, by rounding or by negative estimates.
    value, slopes = _total(np.float32([whole]), np.float32([part]))
    assert float(value) == 0
    chex.assert_trees_all_equal(slopes, (np.zeros(1, np.float32), np.zeros(1, np.float32)))


def test_what_support_and_summary_refuses():
    q, k, v = random_head(26, 8, 8)
    pattern = SparsePattern.banded(8, [0])
    blocks = BlockMap.from_blocks(~np.eye(2, dtype=bool), block_size=4, num_queries=8, num_keys=8)

    def answer(**options):
        return jax.eval_shape(functools.partial(sparse_plus_summary, **options), q, k, v)

    with pytest.raises(NotImplementedError, match="supports FeatureMoments only, got WeightedKV"):
        answer(pattern=pattern, summarize=summarize_exact)
    with pytest.raises(ValueError, match="block_size must be at least 1"):
        answer(pattern=pattern, summarize=FEATURES, block_size=0, is_causal=True)
    with pytest.raises(ValueError, match="every block must visit itself"):
        answer(pattern=blocks, summarize=FEATURES, is_causal=True)
