"""RFA, RA and LARA against the identities between them, in float64 where rounding would hide an error."""

import functools
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import (
    AttentionState,
    Decoder,
    FeatureMoments,
    attend,
    attention,
    bounds,
    eva,
    favor,
    fold_scale,
    lara,
    mean_pool,
    ra,
    rfa,
)
from approx_attention.core import PositiveFeatures, control_variate_state
from approx_attention.methods import gate_tokens, running_rfa
from tests.methods.case import Case
from tests.references import (
    as_array,
    brute_force,
    causal_mask,
    compiled,
    random_head,
    random_heads,
    relative_error,
    scaled,
)


def attention_of_directions(q, k, v):
    """Attention between unit vectors."""
    return brute_force(*(unit(np.asarray(x)) for x in (q, k)), v, scale=1.0)[0]


CASES = {
    "rfa": Case(
        size=lambda size: size + size % 2,  # sines and cosines come in pairs
        target=attention_of_directions,
        changes={
            "num_features": 6,
            "features": "positive",
            "bandwidth": 0.5,
            "projection": as_array(np.ones((3, 8))),
            "gate_logits": as_array(np.zeros(40)),
        },
        devices={"num_features": 32, "block_size": 4},
    ),
    "ra": Case(
        changes={
            "noise": as_array(np.ones((40, 8, 8))),
            "indices": jax.device_put(np.zeros((40, 8), np.int32)),
            "noise_scale": "official",
        },
    ),
    "lara": Case(
        changes={
            "weights": "query_specific",
            "correction": 0.0,
            "proposal_mean": as_array(np.zeros((8, 8))),
            "query_landmarks": as_array(np.zeros((8, 8))),
            "spatial_shape": (8, 5),
            "num_samples": 5,
            "antithetic": True,
            "noise": as_array(np.ones((2, 8, 8))),
            "noise_scale": "official",
        },
        contexts={
            "correction": {"weights": "query_specific"},
            "query_landmarks": {"weights": "query_specific"},
            "spatial_shape": {"num_landmarks": 4},
        },
    ),
}


eva, favor, lara, mean_pool, ra, rfa = compiled(eva, favor, lara, mean_pool, ra, rfa)

pytestmark = pytest.mark.usefixtures("x64")


def head(seed, num_queries=24, num_keys=24, head_dim=8, spread=1.0):
    return random_head(seed, num_queries, num_keys, head_dim, dtype=jnp.float64, spread=spread)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


# RFA


@pytest.mark.parametrize("features", ["trigonometric", "positive"])
def test_rfa_is_the_ratio_of_its_sums(features):
    q, k, v = head(0)
    w = np.random.default_rng(1).normal(size=(6, 8))
    x, y = (unit(np.asarray(z)) for z in (q, k))

    def phi(x):
        if features == "positive":
            return np.exp(x @ w.T - 0.5)
        return np.concatenate([np.sin(x @ w.T), np.cos(x @ w.T)], axis=1)

    weights = phi(x) @ phi(y).T
    total = weights.sum(1, keepdims=True)
    assert total.min() > 0
    expected = weights @ np.asarray(v) / total
    out = rfa(q, k, v, projection=jax.device_put(w), features=features)
    np.testing.assert_allclose(out, expected, rtol=1e-9)


def test_rfa_tends_to_attention_between_unit_vectors():
    q, k, v = head(1)
    expected, _ = brute_force(unit(np.asarray(q)), unit(np.asarray(k)), v, scale=1.0)
    errors = [
        relative_error(rfa(q, k, v, jax.random.key(0), num_features=number), expected) for number in (2**6, 2**14)
    ]
    assert errors[1] < 0.2 * errors[0]
    assert errors[1] < 0.02
    for bandwidth in (1.5, jax.device_put(np.linspace(0.5, 1.5, 8))):
        x, y = (np.asarray(bandwidth) * unit(np.asarray(z)) for z in (q, k))
        wide = rfa(q, k, v, jax.random.key(0), num_features=2**14, bandwidth=bandwidth)
        assert relative_error(wide, brute_force(x, y, v, scale=1.0)[0]) < 0.1


def gated(q, k, v, gate, scale=1.0):
    """Weights of the recurrence S_t = g_t S_{t-1} + (1 - g_t) phi(k_t) v_t^T with the kernel exp(s q.k)."""
    length = len(k)
    weights = np.zeros((length, length))
    for t, j in itertools.product(range(length), range(length)):
        if j <= t:
            weights[t, j] = (1 - gate[j]) * np.prod(gate[j + 1 : t + 1]) * np.exp(scale * q[t] @ k[j])
    return weights @ v / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("block_size", [4, 32])
def test_gated_rfa_is_the_recurrence(block_size):
    q, k, v = head(2, 17, 17)
    logits = jax.device_put(np.random.default_rng(0).normal(size=17) + 1)
    gate = 1 / (1 + np.exp(-np.asarray(logits)))
    expected = gated(unit(np.asarray(q)), unit(np.asarray(k)), np.asarray(v), gate)
    options = {"is_causal": True, "block_size": block_size, "gate_logits": logits, "num_features": 2**15}
    out = rfa(q, k, v, jax.random.key(0), **options)
    np.testing.assert_allclose(out, expected, rtol=0 if block_size == 4 else 1e-9, atol=0.03 if block_size == 4 else 0)
    # Gates that forget nothing weigh all keys alike.
    open_gates = rfa(q, k, v, jax.random.key(0), **{**options, "gate_logits": jax.device_put(np.full(17, 25.0))})
    plain = rfa(q, k, v, jax.random.key(0), **{**options, "gate_logits": None})
    np.testing.assert_allclose(open_gates, plain, atol=1e-8)
    with pytest.raises(NotImplementedError, match="gate_logits only with is_causal"):
        rfa(q, k, v, jax.random.key(0), gate_logits=logits)


@pytest.mark.slow
def test_gated_rfa_goes_on_from_segment_to_segment():
    q, k, v = head(3, 21, 21)
    logits = jax.device_put(np.random.default_rng(0).normal(size=21))
    key = jax.random.key(0)
    whole = rfa(q, k, v, key, gate_logits=logits, is_causal=True, block_size=4, num_features=8)
    decoder = Decoder(
        running=running_rfa(8, key, num_features=8, gated=True), head_dim=10, value_dim=8, block_size=4,
        scale=8**-0.5, dtype=jnp.float64,
    )  # fmt: skip
    cache, start, outs = decoder.init(), 0.0, []
    for part in (slice(0, 7), slice(7, 8), slice(8, 21)):
        gated_q, gated_k, start = gate_tokens(q[part], k[part], logits[part], start=start)
        out, cache = decoder.prefill(cache, gated_q, gated_k, v[part])
        outs.append(out)
    np.testing.assert_allclose(jnp.concatenate(outs), whole, atol=1e-9)


def test_gates_and_bandwidths_of_each_head_through_attention():
    query, key, value = random_heads(0, 2, 9, 9, 4, 2)
    logits = np.random.default_rng(0).normal(size=(2, 9, 2)).astype(np.float32)
    bandwidth = np.asarray([[0.5] * 8, [1.5] * 8], np.float32)
    rng = jax.random.key(0)

    def answer(logits, bandwidth):
        return attention(
            query, key, value, method="rfa", rng=rng, is_causal=True, num_features=8, block_size=2,
            gate_logits=logits, per_head={"bandwidth": bandwidth},
        )  # fmt: skip

    out = np.asarray(jax.jit(answer)(logits, bandwidth))
    for b, n in itertools.product(range(2), range(4)):
        q, k, v, gates = (np.asarray(x)[b, :, n * x.shape[2] // 4] for x in (query, key, value, logits))
        given = {"gate_logits": as_array(gates), "bandwidth": as_array(bandwidth[n // 2])}
        own = jax.random.fold_in(rng, n // 2)
        one = rfa(*map(as_array, (q, k, v)), own, is_causal=True, num_features=8, block_size=2, **given)
        np.testing.assert_allclose(out[b, :, n], one, atol=2e-5)
    with pytest.raises(ValueError, match=r"gate_logits must be \[..., S, K\] = \[2, 9, 2\], got shape \(2, 9\)"):
        jax.eval_shape(answer, logits[..., 0], bandwidth)
    with pytest.raises(ValueError, match=r"per_head\['bandwidth'\] must be arrays \[K, ...\] with K = 2"):
        jax.eval_shape(answer, logits, bandwidth[:1])


@pytest.mark.slow
def test_gates_keep_their_precision_over_thousands_of_tokens():
    q, k, v = head(33, 2048, 2048)
    for mean in (2.0, 0.0, -4.0):
        logits = jax.device_put(np.random.default_rng(0).normal(size=2048) + mean)
        options = {"is_causal": True, "num_features": 16, "block_size": 64}
        wide = rfa(q, k, v, jax.random.key(0), gate_logits=logits, **options)
        single = (x.astype(jnp.float32) for x in (q, k, v))
        narrow = rfa(*single, jax.random.key(0), gate_logits=logits.astype(jnp.float32), **options)
        assert relative_error(narrow, wide) < 1e-3
    half = (x.astype(jnp.bfloat16) for x in (q[:64], k[:64]))
    for x in gate_tokens(*half, logits[:64].astype(jnp.bfloat16)):
        assert x.dtype == jnp.float32


@pytest.mark.slow
def test_gradients_of_tiny_tokens_and_padded_gates_are_finite():
    q, k, v = (x.astype(jnp.float32) for x in head(34, 10, 10))
    kv_mask = jnp.arange(10) < 6
    logits = jnp.where(kv_mask, 1.0, jnp.nan).astype(jnp.float32)

    def function(q, k, z):
        options = {"num_features": 4, "gate_logits": z, "is_causal": True, "block_size": 2, "kv_mask": kv_mask}
        return rfa(q, k, v, jax.random.key(0), **options)[:6]

    for scale in (1e-30, 1e-19, 1e-10, 1.0, 1e15):
        _, vjp = jax.vjp(function, scale * q, scale * k, logits)
        chex.assert_tree_all_finite(vjp(jnp.ones((6, 8), jnp.float32)))


# FAVOR+


def test_hyperbolic_features_are_those_of_both_directions():
    q, k, v = head(4)
    w = np.random.default_rng(0).normal(size=(5, 8))
    both = favor(q, k, v, projection=jax.device_put(np.concatenate([w, -w])))
    hyperbolic = favor(q, k, v, projection=jax.device_put(w), features="hyperbolic")
    np.testing.assert_allclose(hyperbolic, both, rtol=1e-12)


@pytest.mark.parametrize("is_causal", [False, True])
def test_relu_features_are_their_own_kernel_near_and_far(is_causal):
    q, k, v = head(5)
    w = np.random.default_rng(0).normal(size=(12, 8))
    x, y = (np.maximum(np.asarray(z) * 8**-0.25 @ w.T, 0) + 1e-3 for z in (q, k))
    weights = x @ y.T * (causal_mask(24, 24) if is_causal else 1)
    out = favor(q, k, v, projection=jax.device_put(w), features="relu", is_causal=is_causal, block_size=4)
    np.testing.assert_allclose(out, weights @ np.asarray(v) / weights.sum(1, keepdims=True), rtol=1e-9)


@pytest.mark.parametrize("features", ["positive", "hyperbolic", "trigonometric"])
def test_the_error_of_an_entry_is_what_the_formula_says(features):
    q, k, _ = head(6, 3, 4, 3, spread=0.4)
    predicted = jax.jit(functools.partial(bounds.favor_mse, num_features=8, features=features))(q, k)
    x, y = scaled(q, k)
    w = np.random.default_rng(0).normal(size=(200_000, 8 if features == "positive" else 4, 3))

    def phi(x):
        angle = np.einsum("nd,wrd->wnr", x, w)
        if features == "trigonometric":
            grow = np.exp((x * x).sum(1) / 2)[None, :, None]
            return grow * np.concatenate([np.sin(angle), np.cos(angle)], axis=2) / 2
        angle = np.concatenate([angle, -angle], axis=2) if features == "hyperbolic" else angle
        return np.exp(angle - (x * x).sum(1)[None, :, None] / 2) / math.sqrt(8)

    truth = np.exp(x @ y.T)
    measured = np.mean((np.einsum("wnr,wmr->wnm", phi(x), phi(y)) / truth - 1) ** 2, axis=0)
    np.testing.assert_allclose(measured, predicted, rtol=0.1)


# RA


def test_ra_is_unbiased_by_quadrature():
    q, k, v = head(7, 3, 5, 2)
    nodes, weights = np.polynomial.hermite_e.hermegauss(24)
    grid = np.stack(np.meshgrid(nodes, nodes), -1).reshape(-1, 2)
    probability = np.outer(weights, weights).reshape(-1) / (2 * np.pi)
    expected, _ = brute_force(q, k, v)
    logits = np.asarray(q) @ np.asarray(k).T / np.sqrt(2)
    pi = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)

    noise = np.broadcast_to(grid[:, None, None], (len(grid), 3, 1, 2))
    indices = np.broadcast_to(np.arange(5, dtype=np.int32)[:, None, None], (5, 3, 1))

    def mean(noise_scale):
        @jax.jit
        @functools.partial(jax.vmap, in_axes=(0, None))
        @functools.partial(jax.vmap, in_axes=(None, 0))
        def each(noise, indices):
            return ra(q, k, v, noise=noise, indices=indices, noise_scale=noise_scale)

        return np.einsum("e,tm,emtd->td", probability, pi, np.asarray(each(noise, indices)))

    np.testing.assert_allclose(mean("exact"), expected, atol=1e-7)
    assert np.abs(mean("official") - expected).max() > 1e-3


def test_ra_draws_its_index_from_attention():
    k = head(8, 2, 6, 4)[1]
    # Without noise and with distant keys, sample m gives nearly the value of key m.
    nothing, distant, one_each = map(jax.device_put, (np.zeros((2, 4)), 40 * np.asarray(k), np.eye(6)))
    out = ra(nothing, distant, one_each, jax.random.key(0), num_samples=20_000, noise=None)
    np.testing.assert_allclose(out, np.full((2, 6), 1 / 6), atol=0.02)


# LARA


def test_lara_with_proposals_at_zero_is_positive_random_features():
    q, k, v = head(9)
    noise = np.random.default_rng(0).normal(size=(1, 6, 8))
    out = lara(q, k, v, proposal_mean=jax.device_put(np.zeros((6, 8))), noise=jax.device_put(noise))
    np.testing.assert_allclose(out, favor(q, k, v, projection=jax.device_put(noise[0])), rtol=1e-12)


@pytest.mark.parametrize("weights", ["balance", "query_specific", "biased"])
def test_lara_is_its_formula(weights):
    q, k, v = head(10)
    noise = jax.device_put(np.random.default_rng(0).normal(size=(2, 4, 8)))
    out = lara(q, k, v, num_landmarks=4, noise=noise, weights=weights, correction=2.0)
    x, y, z = *scaled(q, k), np.asarray(v)
    q_bar, k_bar = (a.reshape(4, 6, 8).mean(1) for a in (x, y))
    mu = q_bar + k_bar

    def lxi(a, b):
        return a @ b.T - (a * a).sum(1, keepdims=True) / 2

    r = np.exp(x @ q_bar.T) / np.exp(x @ q_bar.T).sum(0)
    numerator, total = 0, 0
    for sample, c in itertools.product(range(2), range(4)):
        w = mu[c] + np.asarray(noise)[sample, c]
        density = np.exp(lxi(mu, w[None])[:, 0])
        target = np.exp(lxi(x, w[None])[:, 0]) * np.exp(lxi(y, w[None])[:, 0]).sum()
        f = np.exp(lxi(y, w[None])[:, 0]) @ z / np.exp(lxi(y, w[None])[:, 0]).sum()
        if weights == "biased":
            u = np.exp(x @ mu[c]) * target / density.sum()
        else:
            alpha = density[c] / density.sum()
            if weights == "query_specific":
                alpha = np.maximum(alpha + 2 * (r[:, c] - r.mean(1)), 1e-8)
            u = alpha * target / density[c]
        numerator, total = numerator + u[:, None] * f, total + u[:, None]
    np.testing.assert_allclose(out, numerator / total, rtol=1e-9)


def test_the_normaliser_of_lara_is_unbiased():
    q, k, v = head(11, 6, 6, 3, spread=0.7)
    _, lse = brute_force(q, k, v)
    keys = jax.random.split(jax.random.key(0), 20_000)
    states = jax.jit(jax.vmap(lambda key: lara(q, k, v, key, num_landmarks=3, return_state=True)))(keys)
    ratio = np.exp(np.asarray(states.lse) - lse)
    assert np.all(np.abs(ratio.mean(0) - 1) < 5 * ratio.std(0) / np.sqrt(len(keys)))
    assert np.all(ratio.std(0) / np.sqrt(len(keys)) < 0.02)


@pytest.mark.parametrize("weights", ["balance", "query_specific", "biased"])
def test_lara_where_padding_is_large_or_everything_is_masked(weights):
    q, k, v = head(31)

    @jax.jit
    def out_and_gradients(q, kv_mask, d_out):
        function = functools.partial(lara, num_landmarks=4, weights=weights, kv_mask=kv_mask)
        out, vjp = jax.vjp(function, q, k, v)
        return out, vjp(d_out)

    kv_mask = np.arange(24) < 12
    d_out = np.repeat(kv_mask[:, None], 8, axis=1).astype(np.float64)
    nothing, _ = out_and_gradients(q, np.zeros(24, bool), d_out)
    np.testing.assert_array_equal(nothing, 0)
    padded = np.where(kv_mask[:, None], q, 1e3 * np.asarray(q))
    (out, gradients), (expected, _) = (out_and_gradients(x, kv_mask, d_out) for x in (padded, q))
    np.testing.assert_allclose(np.asarray(out)[:12], np.asarray(expected)[:12], rtol=1e-9)
    chex.assert_tree_all_finite(gradients)


def test_arguments_of_lara_that_do_not_fit_are_refused():
    q, k, v = head(32)
    mu = jax.device_put(np.zeros((3, 8)))
    three = lara(q, k, v, num_landmarks=3, proposal_mean=mu, weights="query_specific")
    np.testing.assert_array_equal(lara(q, k, v, proposal_mean=mu, weights="query_specific"), three)
    # Without pooling the image need not be a square.
    np.testing.assert_array_equal(
        lara(q, k, v, proposal_mean=mu, spatial_shape=(4, 6)), lara(q, k, v, proposal_mean=mu)
    )
    with pytest.raises(ValueError, match="spatial_shape must have 24 pixels, one per token"):
        lara(q, k, v, spatial_shape=(5, 5))
    with pytest.raises(ValueError, match=r"query_landmarks .by default pooled. .* = \[3, 8\] .* got shape \(1, 8\)"):
        lara(q, k, v, proposal_mean=mu, spatial_shape=(4, 6), weights="query_specific")


@pytest.mark.slow
def test_more_samples_bring_lara_closer():
    q, k, v = head(12)
    expected, _ = brute_force(q, k, v)
    for options in ({}, {"antithetic": True}):
        errors = [
            relative_error(lara(q, k, v, jax.random.key(1), num_landmarks=6, num_samples=n, **options), expected)
            for n in (1, 4096)
        ]
        assert errors[1] < 0.2 * errors[0]


def test_lara_pools_rectangles_of_an_image():
    q, k, v = head(13, 16, 16)
    order = np.arange(16).reshape(2, 2, 2, 2).transpose(0, 2, 1, 3).reshape(-1)
    rows = lara(*(jax.device_put(np.asarray(x)[order]) for x in (q, k, v)), num_landmarks=4)
    image = lara(q, k, v, num_landmarks=4, spatial_shape=(4, 4))
    np.testing.assert_allclose(np.asarray(image)[order], rows, rtol=1e-9)
    one = lara(q, k, v, num_landmarks=3, spatial_shape=(4, 4))
    np.testing.assert_allclose(one, lara(q, k, v, num_landmarks=1), rtol=1e-9)


# the common estimator


@pytest.mark.slow
def test_control_variates_from_random_features_to_softmax():
    q, k, v = head(25)
    x, y = fold_scale(q, k)
    w = jax.device_put(np.random.default_rng(0).normal(size=(6, 8)))
    logits = x @ y.T

    def moments(groups):
        parts = (z.reshape(groups, -1, 8) for z in (y, v))
        return jax.vmap(lambda k, v: FeatureMoments.of_tokens(PositiveFeatures(w), k, v))(*parts)

    nothing = AttentionState.empty(24, 8, jnp.float64)
    random_features = favor(q, k, v, projection=w)
    for groups in (1, 4, 24):
        # With the masses that the features estimate, the grouping does not matter.
        np.testing.assert_allclose(control_variate_state(x, nothing, moments(groups)).out, random_features, rtol=1e-9)
    exact, lse = brute_force(q, k, v)
    errors = []
    for groups in (1, 4, 24):
        mass = jax.nn.logsumexp(logits.reshape(24, groups, -1), axis=2)
        state = control_variate_state(x, nothing, moments(groups), mass)
        np.testing.assert_allclose(state.lse, lse, rtol=1e-12)
        errors.append(relative_error(state.out, exact))
    assert errors[0] > errors[1] > 0.05
    assert errors[2] < 1e-12
    # Some of the keys exactly, the rest as one group.
    part = attend(x, FeatureMoments.of_tokens(PositiveFeatures(w), y[12:], v[12:]))
    rest = jax.tree.map(lambda z: z[None], FeatureMoments.of_tokens(PositiveFeatures(w), y[12:], v[12:]))
    near = AttentionState(*(jax.device_put(z) for z in brute_force(q, k[:12], v[:12])))
    chex.assert_trees_all_close(control_variate_state(x, near, rest).lse, jnp.logaddexp(near.lse, part.lse), rtol=1e-9)


def test_eva_falls_back_to_means_where_keys_are_alike():
    q, k, v = head(26)
    alike = jax.device_put(np.repeat(np.asarray(k)[::4], 4, axis=0))
    np.testing.assert_allclose(
        eva(q, alike, v, window_size=8, chunk_size=4), mean_pool(q, alike, v, num_landmarks=6), rtol=1e-9
    )
