"""Features of sampled directions are unbiased for any Gaussian, and the fitted one has the least mean log-error."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import (
    AttentionState,
    HeadsDecoder,
    Proposal,
    attention,
    balancing_maps,
    bounds,
    exact,
    favor,
    fit_proposal,
)
from approx_attention.core import PositiveFeatures, check_proposal, gaussian_projection, orthogonal_projection
from approx_attention.registry import bind
from tests.references import as_array, brute_force, compiled, random_head, random_heads, relative_error

favor, exact, fit_proposal, balancing_maps = compiled(favor, exact, fit_proposal, balancing_maps)
favor_mse = compiled(bounds.favor_mse)
log_scales = jax.jit(lambda proposal, z, x: [of(x).log_scale for of in (proposal.features(z), PositiveFeatures(z))])
draw_projection = compiled(gaussian_projection)
RANDOM = np.random.default_rng(0)
# All variances exceed 3/4: otherwise the fourth moment is infinite, and the second cannot be measured.
ROOT = 1.2 * np.eye(6) + 0.15 * RANDOM.normal(size=(6, 6))
PROPOSAL = Proposal(as_array(0.4 * RANDOM.normal(size=6)), as_array(ROOT))


def uneven_head(dtype=jnp.float32):
    """Queries and keys with means far from 0 and channels of unequal variances, and values."""
    q, k, v = (np.asarray(x) for x in random_head(1, 40, 32, 6))
    spread = np.array([2.0, 1.5, 1.0, 0.5, 0.1, 0.0])
    return tuple(as_array(x, dtype) for x in (q * spread + 1, k * spread[[1, 0, 2, 3, 4, 5]] - 2, v))


@pytest.mark.parametrize("draw", [gaussian_projection, orthogonal_projection])
@pytest.mark.parametrize("signs", [(1,), (1, -1)])
def test_estimates_are_unbiased_and_have_the_error_of_the_closed_form(draw, signs):
    x, y = (as_array(0.4 * RANDOM.normal(size=(1, 6))) for _ in range(2))

    @jax.jit
    @jax.vmap
    def estimate(key):
        z = draw(key, 6, 6)
        log_x, log_y = (PROPOSAL.features(jnp.concatenate([s * z for s in signs]))(u).log_scale for u in (x, y))
        return jnp.sum(jnp.exp(log_x + log_y))

    estimates = np.asarray(estimate(jax.random.split(jax.random.key(0), 40_000)), np.float64)
    kernel, standard_error = math.exp(np.sum(np.multiply(x, y))), estimates.std() / 200
    assert standard_error < 0.02 * kernel
    assert abs(estimates.mean() - kernel) < 4.5 * standard_error
    if draw is gaussian_projection and signs == (1,):
        expected = float(favor_mse(x, y, 6, proposal=PROPOSAL, scale=1.0)[0, 0])
        assert abs((estimates / kernel - 1).var() / expected - 1) < 0.1


def test_without_a_change_of_the_gaussian_nothing_changes():
    q, k, v = random_head(2, 9, 11, 6)
    z, standard = draw_projection(jax.random.key(0), 8, 6), Proposal(as_array(np.zeros(6)), as_array(np.eye(6)))
    chex.assert_trees_all_equal(Proposal.standard(6), standard)
    of_q, expected = log_scales(standard, z, q)
    np.testing.assert_array_equal(of_q, expected)
    states = [favor(q, k, v, projection=z, proposal=x, return_state=True) for x in (None, standard)]
    chex.assert_trees_all_close(*states, rtol=1e-6)
    np.testing.assert_allclose(favor_mse(q, k, 8, proposal=standard), favor_mse(q, k, 8), rtol=1e-4)


def test_the_closed_form_is_the_minimum(x64):
    q, k, _ = uneven_head(jnp.float64)

    @jax.jit
    def loss(proposal):
        return jnp.mean(jnp.log1p(bounds.favor_mse(q, k, 1, proposal=proposal, scale=1.0)))

    fitted = fit_proposal(q, k, scale=1.0)
    least, gradient = jax.jit(jax.value_and_grad(loss))(fitted)
    chex.assert_trees_all_close(gradient, jax.tree.map(np.zeros_like, fitted), atol=1e-10)
    for _ in range(20):
        other = jax.tree.map(lambda x: as_array(x + 0.05 * RANDOM.normal(size=x.shape), x.dtype), fitted)
        assert float(loss(other)) > float(least) + 1e-4
    assert float(least) < 0.3 * float(loss(Proposal.standard(6, jnp.float64)))


def test_a_variance_of_half_has_no_second_moment():
    narrow = Proposal(as_array(np.zeros(6)), as_array(np.diag([1, 1, 0.7, 1, 1, 1])))
    assert np.all(np.isinf(favor_mse(*random_head(0, 3, 4, 6)[:2], 8, proposal=narrow)))


def test_a_shift_of_all_keys_cancels():
    q, k, v = uneven_head()
    z, shift = draw_projection(jax.random.key(0), 16, 6), np.array([3.0, -2.0, 1.0, 0.0, 4.0, -1.0])
    here, there = (
        favor(q, keys, v, projection=z, proposal=fit_proposal(q, keys), return_state=True)
        for keys in (k, as_array(np.asarray(k) + shift))
    )
    np.testing.assert_allclose(here.out, there.out, rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(here.lse + np.asarray(q) @ shift / math.sqrt(6), there.lse, atol=5e-4)


def test_padding_has_no_part_in_the_fit():
    q, k, _ = (np.asarray(x) for x in uneven_head())
    q_mask, kv_mask = np.arange(40) < 30, np.arange(32) >= 5
    alone = fit_proposal(as_array(q[q_mask]), as_array(k[kv_mask]))

    def masked(q, k, q_mask, kv_mask):
        masks = {"q_mask": as_array(q_mask, bool), "kv_mask": as_array(kv_mask, bool)}
        return fit_proposal(as_array(q), as_array(k), **masks)

    soiled = (np.where(mask[:, None], x, np.nan) for x, mask in ((q, q_mask), (k, kv_mask)))
    chex.assert_trees_all_close(alone, masked(*soiled, q_mask, kv_mask), rtol=1e-5, atol=1e-6)
    nothing = masked(q, k, np.zeros(40, bool), np.zeros(32, bool))
    chex.assert_trees_all_close(nothing, Proposal.standard(6), atol=1e-6)


def importance_sampled(q, k, v, z, proposal, scale):
    """Weighted sums over directions, with the likelihood ratio of the two Gaussians applied to keys alone."""
    q, k = q * jnp.sqrt(scale), k * jnp.sqrt(scale)
    w = proposal.mean[None] + z @ proposal.root.T
    covariance = proposal.root @ proposal.root.T
    logpdf = jax.scipy.stats.multivariate_normal.logpdf
    from_standard = jax.vmap(lambda w: logpdf(w, jnp.zeros(6), jnp.eye(6)))(w)
    ratio = jnp.exp(from_standard - jax.vmap(lambda w: logpdf(w, proposal.mean, covariance))(w))
    of_q, of_k = (jnp.exp(x @ w.T - jnp.sum(x * x, axis=1, keepdims=True) / 2) for x in (q, k))
    weights = (of_q * ratio[None, :]) @ of_k.T / len(z)
    total = jnp.sum(weights, axis=1)
    return AttentionState(weights @ v / total[:, None], jnp.log(total))


def test_values_and_gradients_are_those_of_importance_sampling(x64):
    q, k, v = uneven_head(jnp.float64)
    z = draw_projection(jax.random.key(0), 12, 6, jnp.float64)
    proposal = jax.tree.map(lambda x: as_array(x, jnp.float64), PROPOSAL)

    def pulled(function):
        def loss(q, k, v, proposal):
            state = function(q, k, v, proposal)
            return jnp.sum(jnp.sin(state.out)) + jnp.sum(jnp.cos(state.lse))

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(q, k, v, proposal)

    ours = pulled(lambda q, k, v, p: favor.__wrapped__(q, k, v, projection=z, proposal=p, scale=0.3, return_state=True))
    theirs = pulled(lambda q, k, v, p: importance_sampled(q, k, v, z, p, 0.3))
    chex.assert_trees_all_close(ours, theirs, rtol=1e-8)


def test_each_key_head_has_its_own_and_decoding_agrees():
    query, key, value = random_heads(3, 2, 21, 21, 4, 2, 6)
    grouped = np.asarray(query).reshape(2, 21, 2, 2, 6).transpose(2, 0, 1, 3, 4).reshape(2, -1, 6)
    fit = jax.jit(jax.vmap(fit_proposal.__wrapped__))
    proposals = fit(grouped, np.asarray(key).transpose(2, 0, 1, 3).reshape(2, -1, 6))
    options = {"method": "favor", "num_features": 8, "block_size": 4, "is_causal": True}
    out = jax.jit(lambda *x: attention(*x, rng=jax.random.key(1), per_head={"proposal": proposals}, **options))(
        query, key, value
    )
    decoder = HeadsDecoder("favor", num_kv_heads=2, head_dim=6, num_features=8, block_size=4)
    init = jax.jit(lambda rng, proposals: decoder.init(2, rng, per_head={"proposal": proposals}))
    cache = init(jax.random.key(1), proposals)
    before, after = ([np.asarray(x)[:, part] for x in (query, key, value)] for part in (slice(20), slice(20, None)))
    first, cache = jax.jit(decoder.extend)(cache, *before)
    last, _ = jax.jit(decoder.extend)(cache, *after)
    np.testing.assert_allclose(np.concatenate([first, last], axis=1), out, atol=1e-5)
    with pytest.raises(NotImplementedError, match="'eva' does not support noise while decoding, got an array of shape"):
        HeadsDecoder("eva", num_kv_heads=2, head_dim=6).init(2, per_head={"noise": jnp.zeros((2, 3, 6))})
    # One head alone, with its projection and its proposal.
    own = jax.tree.map(lambda x: as_array(np.asarray(x)[1]), proposals)
    drawn = jax.jit(lambda rng: bind("favor", {"num_features": 8}).draw(rng, 2, 6)["projection"])(jax.random.key(1))
    projection = as_array(np.asarray(drawn)[1])
    options = {"projection": projection, "proposal": own, "block_size": 4, "is_causal": True}
    one = favor(*(as_array(np.asarray(x)[1, :, head]) for x, head in ((query, 3), (key, 1), (value, 1))), **options)
    np.testing.assert_allclose(np.asarray(out)[1, :, 3], one, atol=1e-5)


def test_balanced_queries_and_keys_have_the_least_eigenvalues(x64):
    q, k, _ = (np.asarray(x) for x in uneven_head(jnp.float64))
    q = q * np.linspace(0.5, 3, 6) + 0.3 * np.roll(q, 1, axis=1)
    k = k + 0.1 * np.asarray(random_head(6, 32, 1, 6, dtype=jnp.float64)[0])

    def balanced(q, k, dtype=jnp.float64, **masks):
        return [np.asarray(x) for x in balancing_maps(as_array(q, dtype), as_array(k, dtype), **masks)]

    maps = balanced(q, k)
    np.testing.assert_allclose((q @ maps[0]) @ (k @ maps[1]).T, q @ k.T, atol=1e-10)

    def covariances(a, b):
        return (np.cov(np.asarray(x).T, bias=True) for x in (q @ a, k @ b))

    of_q, of_k = covariances(*maps)
    np.testing.assert_allclose(of_q, of_k, atol=5e-3 * np.trace(of_q))
    least = np.linalg.eigvalsh(of_q + of_k)
    product = np.linalg.eigvals(np.matmul(*covariances(np.eye(6), np.eye(6)))).real
    np.testing.assert_allclose(least, 2 * np.sqrt(np.sort(np.maximum(product, 0))), atol=5e-3 * least[-1])
    for _ in range(10):
        other = np.eye(6) + 0.3 * RANDOM.normal(size=(6, 6))
        assert np.all(np.linalg.eigvalsh(sum(covariances(other, np.linalg.inv(other).T))) > least - 5e-3 * least[-1])
    # In float32 too, if both variances spread over many orders of magnitude along the same axes.
    spread = np.logspace(-3, 3, 6, dtype=np.float32)
    wide_q, wide_k = (np.asarray(x) * spread for x in random_head(7, 40, 32, 6)[:2])
    map_q, map_k = balanced(wide_q, wide_k, jnp.float32)
    logits = wide_q @ wide_k.T
    mapped, largest = (wide_q @ map_q) @ (wide_k @ map_k).T, np.max(np.abs(logits))
    np.testing.assert_allclose(mapped, logits, atol=1e-4 * largest)
    # Padding is ignored, and equal rows are left unchanged.
    real = np.arange(40) < 30
    broken = balanced(np.where(real[:, None], q, np.nan), k, q_mask=as_array(real, bool))
    chex.assert_trees_all_close(broken, balanced(q[real], k), atol=1e-12)
    alike = balanced(np.ones((3, 6)), np.ones((2, 6)), jnp.float32)
    chex.assert_trees_all_close(alike, [np.eye(6)] * 2, atol=1e-6)


def test_a_proposal_in_half_precision_is_computed_in_float32():
    q, k, v = random_head(5, 8, 9, 6)
    half = jax.tree.map(lambda x: as_array(x, jnp.bfloat16), PROPOSAL)
    wide = jax.tree.map(as_array, half)
    outs, errors = (
        [f(x) for x in (half, wide)]
        for f in (
            lambda x: favor(q, k, v, jax.random.key(0), num_features=8, proposal=x),
            lambda x: favor_mse(q, k, 8, proposal=x),
        )
    )
    chex.assert_trees_all_close(*outs)
    chex.assert_trees_all_close(*errors)


def test_errors_are_less_where_channels_are_unequal():
    unequal = np.array([2.5, 2.5, 0.3, 0.3, 0.3, 0.3])
    q, k, v = (as_array(np.asarray(x) * unequal) for x in random_head(5, 64, 64, 6))
    truth, proposal = brute_force(q, k, v)[0], fit_proposal(q, k)
    errors = np.array(
        [
            [relative_error(favor(q, k, v, jax.random.key(i), num_features=64, proposal=x), truth) for i in range(4)]
            for x in (proposal, None)
        ]
    )
    assert errors[0].mean() < 0.6 * errors[1].mean()


def test_what_is_no_proposal_is_refused():
    q, k, v = random_head(0, 3, 4, 6)
    with pytest.raises(TypeError, match="proposal must be a Proposal, as from fit_proposal, got 'fit'"):
        check_proposal("fit", 6)
    with pytest.raises(ValueError, match=r"proposal.root must be \[6, 6\] for D = 6, got shape \(5, 5\)"):
        favor(q, k, v, jax.random.key(0), proposal=Proposal(jnp.zeros(6), jnp.eye(5)))
    with pytest.raises(ValueError, match="proposal.mean must be finite, got nan"):
        bounds.favor_mse(q, k, 8, proposal=Proposal(jnp.full(6, jnp.nan), jnp.eye(6)))
    with pytest.raises(ValueError, match="does not support a proposal"):
        favor(q, k, v, jax.random.key(0), features="relu", proposal=PROPOSAL)
    with pytest.raises(ValueError, match="supported for positive features only, got features='hyperbolic'"):
        bounds.favor_mse(q, k, 8, features="hyperbolic", proposal=PROPOSAL)
