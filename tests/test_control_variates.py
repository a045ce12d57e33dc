"""RFA, RA, LARA and EVA against the identities that bind them, in float64 where rounding would hide an error."""

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
    PositiveFeatures,
    attend,
    attention,
    bounds,
    control_variate_state,
    eva,
    favor,
    fold_scale,
    gate_tokens,
    lara,
    mean_pool,
    ra,
    rfa,
    running_rfa,
)
from tests.references import brute_force, causal_mask, random_head, random_heads, relative_error

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
    out = rfa(q, k, v, projection=jnp.asarray(w), features=features)
    np.testing.assert_allclose(out, expected, rtol=1e-9)


def test_rfa_tends_to_attention_between_unit_vectors():
    q, k, v = head(1)
    expected, _ = brute_force(unit(np.asarray(q)), unit(np.asarray(k)), v, scale=1.0)
    errors = [
        relative_error(rfa(q, k, v, jax.random.key(0), num_features=number), expected) for number in (2**6, 2**14)
    ]
    assert errors[1] < 0.2 * errors[0]
    assert errors[1] < 0.02
    for bandwidth in (1.5, jnp.linspace(0.5, 1.5, 8)):
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
    logits = jnp.asarray(np.random.default_rng(0).normal(size=17) + 1)
    gate = 1 / (1 + np.exp(-np.asarray(logits)))
    expected = gated(unit(np.asarray(q)), unit(np.asarray(k)), np.asarray(v), gate)
    options = {"is_causal": True, "block_size": block_size, "gate_logits": logits, "num_features": 2**15}
    out = rfa(q, k, v, jax.random.key(0), **options)
    np.testing.assert_allclose(out, expected, rtol=0 if block_size == 4 else 1e-9, atol=0.03 if block_size == 4 else 0)
    # Gates that forget nothing weigh all keys alike.
    open_gates = rfa(q, k, v, jax.random.key(0), **{**options, "gate_logits": jnp.full(17, 25.0)})
    plain = rfa(q, k, v, jax.random.key(0), **{**options, "gate_logits": None})
    np.testing.assert_allclose(open_gates, plain, atol=1e-8)
    with pytest.raises(NotImplementedError, match="gate_logits only with is_causal"):
        rfa(q, k, v, jax.random.key(0), gate_logits=logits)


def test_gated_rfa_goes_on_from_segment_to_segment():
    q, k, v = head(3, 21, 21)
    logits = jnp.asarray(np.random.default_rng(0).normal(size=21))
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
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 2)), jnp.float32)
    bandwidth = jnp.asarray([[0.5] * 8, [1.5] * 8], jnp.float32)
    rng = jax.random.key(0)
    out = attention(
        query, key, value, method="rfa", rng=rng, is_causal=True, num_features=8, block_size=2,
        gate_logits=logits, per_head={"bandwidth": bandwidth},
    )  # fmt: skip
    for b, n in itertools.product(range(2), range(4)):
        own = jax.random.fold_in(rng, n // 2)
        one = rfa(
            query[b, :, n], key[b, :, n // 2], value[b, :, n // 2], own, is_causal=True, num_features=8, block_size=2,
            gate_logits=logits[b, :, n // 2], bandwidth=bandwidth[n // 2],
        )  # fmt: skip
        np.testing.assert_allclose(out[b, :, n], one, atol=2e-5)
    with pytest.raises(ValueError, match=r"gate_logits must be \[..., S, K\] = \[2, 9, 2\], got shape \(2, 9\)"):
        attention(query, key, value, method="rfa", rng=rng, is_causal=True, gate_logits=logits[..., 0])
    with pytest.raises(ValueError, match=r"per_head\['bandwidth'\] must be arrays \[K, ...\] with K = 2"):
        attention(query, key, value, method="rfa", rng=rng, per_head={"bandwidth": bandwidth[:1]})


@pytest.mark.slow
def test_gates_keep_their_precision_over_thousands_of_tokens():
    q, k, v = head(33, 2048, 2048)
    for mean in (2.0, 0.0, -4.0):
        logits = jnp.asarray(np.random.default_rng(0).normal(size=2048) + mean)
        options = {"is_causal": True, "num_features": 16, "block_size": 64}
        wide = rfa(q, k, v, jax.random.key(0), gate_logits=logits, **options)
        single = (x.astype(jnp.float32) for x in (q, k, v))
        narrow = rfa(*single, jax.random.key(0), gate_logits=logits.astype(jnp.float32), **options)
        assert relative_error(narrow, wide) < 1e-3
    half = (x.astype(jnp.bfloat16) for x in (q[:64], k[:64]))
    for x in gate_tokens(*half, logits[:64].astype(jnp.bfloat16)):
        assert x.dtype == jnp.float32


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
    w = jnp.asarray(np.random.default_rng(0).normal(size=(5, 8)))
    both = favor(q, k, v, projection=jnp.concatenate([w, -w]))
    np.testing.assert_allclose(favor(q, k, v, projection=w, features="hyperbolic"), both, rtol=1e-12)


@pytest.mark.parametrize("is_causal", [False, True])
def test_relu_features_are_their_own_kernel_near_and_far(is_causal):
    q, k, v = head(5)
    w = np.random.default_rng(0).normal(size=(12, 8))
    x, y = (np.maximum(np.asarray(z) * 8**-0.25 @ w.T, 0) + 1e-3 for z in (q, k))
    weights = x @ y.T * (causal_mask(24, 24) if is_causal else 1)
    out = favor(q, k, v, projection=jnp.asarray(w), features="relu", is_causal=is_causal, block_size=4)
    np.testing.assert_allclose(out, weights @ np.asarray(v) / weights.sum(1, keepdims=True), rtol=1e-9)


@pytest.mark.parametrize("features", ["positive", "hyperbolic", "trigonometric"])
def test_the_error_of_an_entry_is_what_the_formula_says(features):
    q, k, _ = head(6, 3, 4, 3, spread=0.4)
    predicted = bounds.favor_mse(q, k, 8, features=features)
    x, y = (np.asarray(z) for z in fold_scale(q, k))
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

    def mean(noise_scale):
        total = np.zeros((3, 2))
        function = jax.jit(functools.partial(ra, noise_scale=noise_scale))
        for (epsilon, share), m in itertools.product(zip(grid, probability, strict=True), range(5)):
            noise, indices = jnp.broadcast_to(jnp.asarray(epsilon), (3, 1, 2)), jnp.full((3, 1), m)
            total += share * pi[:, m : m + 1] * np.asarray(function(q, k, v, noise=noise, indices=indices))
        return total

    np.testing.assert_allclose(mean("exact"), expected, atol=1e-7)
    assert np.abs(mean("official") - expected).max() > 1e-3


def test_ra_draws_its_index_from_attention():
    q, k, _ = head(8, 2, 6, 4)
    # Without noise and with far keys, the answer of draw m is nearly the value of key m.
    k = 40 * k
    out = ra(0 * q, k, jnp.eye(6), jax.random.key(0), num_samples=20_000, noise=None)
    np.testing.assert_allclose(out, np.full((2, 6), 1 / 6), atol=0.02)


# LARA


def test_lara_with_proposals_at_zero_is_positive_random_features():
    q, k, v = head(9)
    noise = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 8)))
    out = lara(q, k, v, proposal_mean=jnp.zeros((6, 8)), noise=noise)
    np.testing.assert_allclose(out, favor(q, k, v, projection=noise[0]), rtol=1e-12)


@pytest.mark.parametrize("weights", ["balance", "query_specific", "biased"])
def test_lara_is_its_formula(weights):
    q, k, v = head(10)
    noise = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 8)))
    out = lara(q, k, v, num_landmarks=4, noise=noise, weights=weights, correction=2.0)
    x, y, z = (np.asarray(a) for a in (*fold_scale(q, k), v))
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
    nothing = lara(q, k, v, num_landmarks=4, weights=weights, kv_mask=jnp.zeros(24, bool))
    np.testing.assert_array_equal(nothing, 0)
    kv_mask = jnp.arange(24) < 12
    padded = jnp.where(kv_mask[:, None], q, 1e3 * q)
    function = lambda q, k, v: lara(q, k, v, num_landmarks=4, weights=weights, kv_mask=kv_mask)[:12]  # noqa: E731
    out, vjp = jax.vjp(function, padded, k, v)
    np.testing.assert_allclose(out, function(q, k, v), rtol=1e-9)
    chex.assert_tree_all_finite(vjp(jnp.ones_like(out)))


def test_arguments_of_lara_that_do_not_fit_are_refused():
    q, k, v = head(32)
    mu = jnp.zeros((3, 8))
    three = lara(q, k, v, num_landmarks=3, proposal_mean=mu, weights="query_specific")
    np.testing.assert_array_equal(lara(q, k, v, proposal_mean=mu, weights="query_specific"), three)
    with pytest.raises(ValueError, match="spatial_shape must be that of the tokens"):
        lara(q, k, v, spatial_shape=(5, 5))


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
    rows = lara(q[order], k[order], v[order], num_landmarks=4)
    image = lara(q, k, v, num_landmarks=4, spatial_shape=(4, 4))
    np.testing.assert_allclose(image[order], rows, rtol=1e-9)
    one = lara(q, k, v, num_landmarks=3, spatial_shape=(4, 4))
    np.testing.assert_allclose(one, lara(q, k, v, num_landmarks=1), rtol=1e-9)


# EVA


def eva_by_hand(q, k, v, window, chunk, *, visible=None, count=True, local=None, proposal="q+k"):
    """The formula, with Python loops; ``visible(t, c)`` and ``local(t, j)`` say what a query sees."""
    x, y, z = (np.asarray(a) for a in (*fold_scale(q, k), v))
    length, chunks = len(y), -(-len(y) // chunk)
    local = local or (lambda t, j: t // window == j // window)
    visible = visible or (lambda t, c: t // window != c * chunk // window)
    out = []
    for t in range(len(x)):
        weights, values = [], []
        for j in range(length):
            if local(t, j):
                weights.append(np.exp(x[t] @ y[j]))
                values.append(z[j])
        for c in range(chunks):
            part = slice(c * chunk, min((c + 1) * chunk, length))
            if visible(t, c):
                k_bar = y[part].mean(0)
                mu = {"q+k": x[part].mean(0) + k_bar, "half": (x[part].mean(0) + k_bar) / 2, "k": k_bar}[proposal]
                share = np.exp(y[part] @ mu - (y[part] ** 2).sum(1) / 2)
                weights.append(np.exp(x[t] @ k_bar) * (len(y[part]) if count else 1))
                values.append(share @ z[part] / share.sum())
        out.append(np.asarray(weights) @ np.asarray(values) / np.sum(weights))
    return np.asarray(out)


@pytest.mark.parametrize("length", [24, 21, 5])
@pytest.mark.parametrize("proposal", ["q+k", "half", "k"])
def test_eva_is_its_formula(length, proposal):
    q, k, v = head(14, length, length)
    out = eva(q, k, v, window_size=8, chunk_size=4, proposal_mean=proposal)
    np.testing.assert_allclose(out, eva_by_hand(q, k, v, 8, 4, proposal=proposal), rtol=1e-9)


def test_eva_without_the_departures_is_the_official_one():
    q, k, v = head(15)
    options = {"window_size": 8, "chunk_size": 6, "exclude_local": False, "count_correction": False}
    out = eva(q, k, v, proposal_mean="half", **options)
    expected = eva_by_hand(q, k, v, 8, 6, visible=lambda t, c: True, count=False, proposal="half")
    np.testing.assert_allclose(out, expected, rtol=1e-9)
    causal = eva(q, k, v, proposal_mean="q+k", is_causal=True, **options)
    expected = eva_by_hand(
        q, k, v, 8, 6, count=False,
        visible=lambda t, c: c < t // 6, local=lambda t, j: t // 8 == j // 8 and j <= t,
    )  # fmt: skip
    np.testing.assert_allclose(causal, expected, rtol=1e-9)


def test_official_windows_and_chunks_overlap_alike():
    q, k, v = head(27)
    out = eva(q, k, v, window_size=8, chunk_size=4, overlap=2, exclude_local=False, count_correction=False)
    x, y, z = (np.asarray(a) for a in (*fold_scale(q, k), v))
    expected = []
    for t in range(24):
        tokens = [(y[j], z[j]) for j in range(24) if 8 * (t // 8) - 2 <= j < 8 * (t // 8) + 10]
        for c in range(6):
            part = slice(max(0, 4 * c - 2), 4 * c + 6)
            share = np.exp(y[part] @ (x[part].mean(0) + y[part].mean(0)) - (y[part] ** 2).sum(1) / 2)
            tokens.append((y[part].mean(0), share @ z[part] / share.sum()))
        weights = np.asarray([np.exp(x[t] @ key) for key, _ in tokens])
        expected.append(weights @ np.asarray([value for _, value in tokens]) / weights.sum())
    np.testing.assert_allclose(out, expected, rtol=1e-9)


def test_windows_overlap():
    q, k, v = head(16)
    out = eva(q, k, v, window_size=8, chunk_size=4, overlap=4)
    near = lambda t, j: 8 * (t // 8) - 4 <= j < 8 * (t // 8) + 12  # noqa: E731
    expected = eva_by_hand(q, k, v, 8, 4, local=near, visible=lambda t, c: not near(t, 4 * c))
    np.testing.assert_allclose(out, expected, rtol=1e-9)


def test_chunks_longer_than_a_window():
    q, k, v = head(17, 22, 22)
    out = eva(q, k, v, window_size=2, chunk_size=6)
    x, y, z = (np.asarray(a) for a in (*fold_scale(q, k), v))

    def token(part):
        mu = x[part].mean(0) + y[part].mean(0)
        share = np.exp(y[part] @ mu - (y[part] ** 2).sum(1) / 2)
        return len(y[part]), y[part].mean(0), share @ z[part] / share.sum()

    expected = []
    for t in range(22):
        window, chunk = t // 2, t // 6
        tokens = [(1, y[j], z[j]) for j in range(22) if j // 2 == window]
        tokens += [token(slice(2 * i, 2 * i + 2)) for i in range(11) if i // 3 == chunk and i != window]
        tokens += [token(slice(6 * c, min(6 * c + 6, 22))) for c in range(4) if c != chunk]
        weights = np.asarray([n * np.exp(x[t] @ key) for n, key, _ in tokens])
        expected.append(weights @ np.asarray([value for *_, value in tokens]) / weights.sum())
    np.testing.assert_allclose(out, expected, rtol=1e-9)


def test_limits_in_which_eva_is_exact():
    q, k, v = head(18)
    expected, lse = brute_force(q, k, v)
    state = eva(q, k, v, window_size=24, return_state=True)
    np.testing.assert_allclose(state.out, expected, rtol=1e-12)
    np.testing.assert_allclose(state.lse, lse, rtol=1e-12)
    # One key a chunk: whatever the noise.
    singletons = eva(q, k, v, jax.random.key(0), window_size=4, chunk_size=1, return_state=True)
    np.testing.assert_allclose(singletons.out, expected, rtol=1e-12)
    np.testing.assert_allclose(singletons.lse, lse, rtol=1e-12)
    # Keys that are alike within each chunk, with values that are not: any directions will do.
    alike = jnp.repeat(k[::4], 4, axis=0)
    equal = eva(q, alike, v, jax.random.key(0), window_size=8, chunk_size=4)
    np.testing.assert_allclose(equal, brute_force(q, alike, v)[0], rtol=1e-12)
    uncounted = eva(q, alike, v, window_size=8, chunk_size=4, count_correction=False)
    assert relative_error(uncounted, brute_force(q, alike, v)[0]) > 0.05


def test_causal_eva_sees_two_blocks_and_the_chunks_before():
    q, k, v = head(19)
    out = eva(q, k, v, window_size=4, chunk_size=2, is_causal=True)
    near = lambda t, j: t // 4 - 1 <= j // 4 and j <= t  # noqa: E731
    expected = eva_by_hand(
        q, k, v, 4, 2, proposal="k", local=near, visible=lambda t, c: 2 * c // 4 < t // 4 - 1
    )  # fmt: skip
    np.testing.assert_allclose(out, expected, rtol=1e-9)
    # As many chunks as keys: exact.
    whole = eva(q, k, v, window_size=4, chunk_size=1, is_causal=True)
    np.testing.assert_allclose(whole, brute_force(q, k, v, mask=causal_mask(24, 24))[0], rtol=1e-9)


@pytest.mark.parametrize("num_chunks", [1, 2, 5, 30])
def test_a_bounded_number_of_chunks_averages_neighbours(num_chunks):
    q, k, v = head(28, 44, 44)
    out = eva(q, k, v, window_size=4, chunk_size=2, num_chunks=num_chunks, is_causal=True)
    x, y, z = (np.asarray(a) for a in (*fold_scale(q, k), v))

    def beta(c):
        part = slice(2 * c, 2 * c + 2)
        share = np.exp(y[part] @ y[part].mean(0) - (y[part] ** 2).sum(1) / 2)
        return share @ z[part] / share.sum()

    for t in range(44):
        near, past = [j for j in range(44) if t // 4 - 1 <= j // 4 and j <= t], max(0, 4 * (t // 4 - 1))
        length = 2 * -(-2 // num_chunks)
        while past > length * num_chunks:
            length *= 2
        tokens = [(1, y[j], z[j]) for j in near]
        for first in range(0, past, length):
            part = slice(first, min(first + length, past))
            betas = [beta(c) for c in range(part.start // 2, part.stop // 2)]
            tokens.append((part.stop - part.start, y[part].mean(0), np.mean(betas, axis=0)))
        weights = np.asarray([n * np.exp(x[t] @ key) for n, key, _ in tokens])
        np.testing.assert_allclose(out[t], weights @ np.asarray([b for *_, b in tokens]) / weights.sum(), rtol=1e-8)


@pytest.mark.slow
def test_a_bias_of_an_image_is_in_the_order_of_its_pixels():
    q, k, v = head(29, 16, 16)
    bias = jnp.asarray(np.random.default_rng(0).normal(size=(16, 16)))
    for chunk_size in (1, 2, 4):
        out = eva(q, k, v, window_size=4, chunk_size=chunk_size, spatial_shape=(4, 4), local_bias=bias)
        expected, _ = brute_force(q, k, v, bias=np.asarray(bias))
        np.testing.assert_allclose(out, expected, rtol=1e-9)


@pytest.mark.parametrize(("num_queries", "num_keys"), [(24, 16), (16, 24), (24, 24)])
def test_the_official_causal_form_does_not_see_the_future(num_queries, num_keys):
    q, k, v = head(30, num_queries, num_keys)
    function = jax.jit(functools.partial(eva, window_size=4, chunk_size=2, is_causal=True, exclude_local=False))
    before, after = function(q, k, v), function(q.at[10:].add(3), k.at[10:].add(1), v.at[10:].add(1))
    np.testing.assert_array_equal(after[:10], before[:10])


def test_images_in_squares():
    q, k, v = head(20, 64, 64)
    order = np.arange(64).reshape(2, 2, 2, 2, 2, 2).transpose(0, 3, 1, 4, 2, 5).reshape(-1)
    rows = eva(q[order], k[order], v[order], window_size=16, chunk_size=4)
    image = eva(q, k, v, window_size=4, chunk_size=2, spatial_shape=(8, 8))
    np.testing.assert_allclose(image[order], rows, rtol=1e-9)
    official = {"exclude_local": False, "count_correction": False, "proposal_mean": "half"}
    image = eva(q, k, v, window_size=4, chunk_size=2, spatial_shape=(8, 8), **official)
    rows = eva(q[order], k[order], v[order], window_size=16, chunk_size=4, **official)
    np.testing.assert_allclose(image[order], rows, rtol=1e-9)


@pytest.mark.slow
def test_more_samples_bring_a_chunks_coefficient_to_its_optimum():
    q, k, v = head(21, spread=0.7)
    x, y, z = (np.asarray(a) for a in (*fold_scale(q, k), v))
    # The best coefficient of a chunk: the exact answer of its keys.
    expected = []
    for t in range(24):
        weights, values = [], []
        for c in range(6):
            part = slice(4 * c, 4 * c + 4)
            share = np.exp(y[part] @ x[t])
            if c // 2 == t // 8:
                weights += list(share)
                values += list(z[part])
            else:
                weights.append(4 * np.exp(x[t] @ y[part].mean(0)))
                values.append(share @ z[part] / share.sum())
        expected.append(np.asarray(weights) @ np.asarray(values) / np.sum(weights))
    errors = [
        relative_error(eva(q, k, v, jax.random.key(0), window_size=8, chunk_size=4, num_samples=n), expected)
        for n in (1, 64, 4096)
    ]
    assert errors[2] < 0.3 * errors[1] < 0.3 * errors[0]


def test_learned_vectors_pool_keys_as_evabyte_does():
    q, k, v = head(22)
    a, phi = (jnp.asarray(x) for x in np.random.default_rng(0).normal(size=(2, 8)))
    out = eva(q, k, v, window_size=8, chunk_size=4, summary=(a, phi), count_correction=False)
    x, y, z = (np.asarray(b) for b in (*fold_scale(q, k), v))
    expected = []
    for t in range(24):
        weights = [np.exp(x[t] @ y[j]) for j in range(24) if j // 8 == t // 8]
        values = [z[j] for j in range(24) if j // 8 == t // 8]
        for c in range(6):
            part = y[4 * c : 4 * c + 4]
            if c // 2 != t // 8:
                pool = np.exp(part @ np.asarray(a))
                share = np.exp(part @ np.asarray(phi) - (part**2).sum(1) / 2)
                weights.append(np.exp(x[t] @ (pool @ part / pool.sum())))
                values.append(share @ z[4 * c : 4 * c + 4] / share.sum())
        expected.append(np.asarray(weights) @ np.asarray(values) / np.sum(weights))
    np.testing.assert_allclose(out, expected, rtol=1e-9)


@pytest.mark.slow
def test_empty_chunks_carry_no_mass():
    q, k, v = head(23)
    for options in ({}, {"exclude_local": False}, {"is_causal": True}, {"chunk_size": 8, "window_size": 4}):
        options = {"window_size": 8, "chunk_size": 4, **options}
        kv_mask = jnp.arange(24) < 16
        padded = eva(q, k, v, kv_mask=kv_mask, **options)
        np.testing.assert_allclose(padded[:16], eva(q[:16], k[:16], v[:16], **options), rtol=1e-9)
        ones = eva(q, k, jnp.ones_like(v), kv_mask=kv_mask, **options)
        np.testing.assert_allclose(ones, 1, rtol=1e-12)


def test_options_that_do_not_fit_are_refused():
    q, k, v = head(24)
    for options, error, message in (
        ({"window_size": 8, "chunk_size": 3}, ValueError, "must divide window_size = 8 or be a multiple of it, got 3"),
        ({"chunk_size": 4, "num_chunks": 3}, ValueError, "chunk_size or num_chunks, not both"),
        ({"summary": (jnp.ones(8), jnp.ones(8)), "proposal_mean": "k"}, ValueError, "summary gives the chunk keys"),
        ({"chunk_size": 0, "is_causal": True}, ValueError, "chunk_size must be at least 1, got 0"),
        ({"chunk_size": 16, "window_size": 8, "is_causal": True}, ValueError, "chunk_size must divide window_size = 8"),
        ({"spatial_shape": (4, 6), "window_size": 2, "num_chunks": 5}, ValueError, "num_chunks must be at least 6"),
        ({"window_size": 8, "chunk_size": 4, "overlap": 2}, ValueError, "overlap must be a multiple"),
        ({"is_causal": True, "overlap": 4}, NotImplementedError, "'eva' does not support overlap with is_causal"),
        ({"spatial_shape": (5, 5), "window_size": 5}, ValueError, "spatial_shape must be that of the 24 tokens"),
        ({"local_bias": jnp.zeros((2, 2)), "window_size": 8}, ValueError, r"local_bias must be .* \[8, 8\]"),
    ):
        with pytest.raises(error, match=message):
            eva(q, k, v, **options)


# one estimator


@pytest.mark.slow
def test_control_variates_from_random_features_to_softmax():
    q, k, v = head(25)
    x, y = fold_scale(q, k)
    w = jnp.asarray(np.random.default_rng(0).normal(size=(6, 8)))
    logits = x @ y.T

    def moments(groups):
        parts = (z.reshape(groups, -1, 8) for z in (y, v))
        return jax.vmap(lambda k, v: FeatureMoments.of_tokens(PositiveFeatures(w), k, v))(*parts)

    nothing = AttentionState.empty(24, 8, jnp.float64)
    random_features = favor(q, k, v, projection=w)
    for groups in (1, 4, 24):
        # With the masses that the features estimate, the groups do not matter.
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
    # A part of the keys exactly, the rest by one group.
    part = attend(x, FeatureMoments.of_tokens(PositiveFeatures(w), y[12:], v[12:]))
    rest = jax.tree.map(lambda z: z[None], FeatureMoments.of_tokens(PositiveFeatures(w), y[12:], v[12:]))
    near = AttentionState(*(jnp.asarray(z) for z in brute_force(q, k[:12], v[:12])))
    chex.assert_trees_all_close(control_variate_state(x, near, rest).lse, jnp.logaddexp(near.lse, part.lse), rtol=1e-9)


def test_eva_falls_back_to_means_where_keys_are_alike():
    q, k, v = head(26)
    alike = jnp.repeat(k[::4], 4, axis=0)
    np.testing.assert_allclose(
        eva(q, alike, v, window_size=8, chunk_size=4), mean_pool(q, alike, v, num_landmarks=6), rtol=1e-9
    )
