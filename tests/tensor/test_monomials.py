"""Monomials and their sketches: counts, the factorisation of a polynomial kernel of any order, unbiased estimates."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.polynomial import polynomial

from approx_attention import FeatureMoments, attend
from approx_attention.tensor import (
    MonomialFeatures,
    ProductSketch,
    TensorSketch,
    anisotropic,
    exp_coefficients,
    taken_by,
    total_degree,
)
from approx_attention.tensor.monomials import monomials
from tests.references import random_head

COUNTS = {
    2: (3, 6, 10, 15, 21, 28, 36, 45),
    4: (5, 15, 35, 70, 126, 210, 330, 495),
    8: (9, 45, 165, 495, 1287, 3003, 6435, 12_870),
    16: (17, 153, 969, 4845, 20_349, 74_613, 245_157),
    32: (33, 561, 6545, 58_905),
    64: (65, 2145, 47_905),
}
SKETCHES = {"tensor": TensorSketch, "product": ProductSketch}


@jax.jit
def mapped(phi, x):
    return phi(x).values


def factors(seed, order, dim, sizes=(5, 6, 7, 4), spread=1.0):
    """One array ``[n_a, d]`` for each factor of the form, in float64."""
    random = np.random.default_rng(seed)
    return [spread * random.normal(size=(sizes[a], dim)) for a in range(order)]


def form(y, scale=1.0):
    """The multilinear form of every tuple of rows ``[n_1, ..., n_m]``."""
    product = np.ones((1,) * len(y) + (y[0].shape[1],))
    for a, rows in enumerate(y):
        axes = [1] * len(y)
        axes[a] = rows.shape[0]
        product = product * np.asarray(rows).reshape(*axes, -1)
    return scale * product.sum(-1)


def kernel(maps, y, coefficients, scale=1.0):
    """The kernel of every tuple of rows, from the features of each factor: [n_1, ..., n_m]."""
    return _kernel(maps, y, coefficients, scale)


@jax.jit
def _kernel(maps, y, coefficients, scale):
    weights = maps[0].weights(coefficients, scale=scale, dtype=jnp.float64)
    letters = "abcdefg"[: len(y)]
    features = [mapped(phi, rows) for phi, rows in zip(maps, y, strict=True)]
    return jnp.einsum(",".join(["r"] + [f"{letter}r" for letter in letters]) + "->" + letters, weights, *features)


def test_as_many_monomials_as_the_binomial_says():
    for dim, counts in COUNTS.items():
        for degree, count in enumerate(counts, 1):
            assert total_degree(dim, degree).size == count == math.comb(dim + degree, degree)


@pytest.mark.parametrize(("dim", "degree"), [(1, 5), (3, 4), (5, 0), (4, 3)])
def test_index_sets_hold_every_index_once(dim, degree):
    indices = total_degree(dim, degree)
    expected = {alpha for alpha in itertools.product(range(degree + 1), repeat=dim) if sum(alpha) <= degree}
    found = [tuple(alpha) for alpha in indices.exponents.tolist()]
    assert set(found) == expected
    assert len(found) == len(expected)
    for alpha, size, multinomial in zip(found, indices.degrees, indices.multinomials, strict=True):
        assert sum(alpha) == size
        assert multinomial == math.factorial(size) / math.prod(map(math.factorial, alpha))


def test_monomials_are_products_of_powers(x64):
    for indices in (total_degree(3, 5), anisotropic((2.0, 0.5, 0.1), 37)[0]):
        x = factors(0, 1, 3)[0]
        expected = np.prod(np.asarray(x)[:, None] ** indices.exponents[None], axis=-1)
        np.testing.assert_allclose(jax.jit(lambda x, i=indices: monomials(x, i))(x), expected, rtol=1e-13)


def test_derivatives_are_those_of_powers_even_at_zero(x64):
    indices = total_degree(3, 4)
    exponents = indices.exponents
    jacobian = jax.jit(jax.jacobian(lambda x: monomials(x[None], indices)[0]))
    for x in (np.zeros(3), np.array([0.0, -1.5, 2.0])):
        found = np.asarray(jacobian(x))
        for t in range(3):
            lowered = exponents - np.eye(3, dtype=int)[t]
            expected = exponents[:, t] * np.prod(np.asarray(x) ** np.maximum(lowered, 0), axis=-1)
            np.testing.assert_allclose(found[:, t], expected, atol=1e-13)


def test_half_precision_is_multiplied_in_full():
    x = random_head(1, 4, 1, 3, dtype=jnp.bfloat16)[0]
    indices = total_degree(3, 4)
    found = jax.jit(lambda x: monomials(x, indices))(x)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, jax.jit(lambda x: monomials(x, indices))(np.asarray(x, np.float32)))


def test_the_same_set_is_the_same_object_and_compiles_once():
    traces = []

    @jax.jit
    def traced(features, x):
        traces.append(1)
        return features(x).values

    x = jnp.ones((2, 3))
    for _ in range(2):
        traced(MonomialFeatures(total_degree(3, 2)), x)
        traced(MonomialFeatures(anisotropic([1.0, 0.5, 0.1], 5)[0]), x)
    assert len(traces) == 2


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("scale", [0.7, -1.3])
def test_the_features_are_a_factorisation_of_the_polynomial_kernel(order, scale, x64):
    y = factors(order, order, 3)
    x = form(y, scale)
    bound = np.abs(x).max()
    for degree in (0, 1, 2, 5):
        maps = [MonomialFeatures(total_degree(3, degree))] * order
        random = np.random.default_rng(degree).normal(size=degree + 1)
        kinds = [
            exp_coefficients(kind, degree, **taken_by(kind, bound=bound, rms=0.5))
            for kind in ("taylor", "minimax", "hermite")
        ]
        for coefficients in (random, *kinds):
            size = polynomial.polyval(bound, np.abs(coefficients))
            expected = polynomial.polyval(x, coefficients)
            np.testing.assert_allclose(kernel(maps, y, coefficients, scale), expected, atol=1e-12 * max(size, 1))


def tensor_answer(maps, y, values, coefficients, scale=1.0):
    """Attention of order m with a polynomial kernel, from a Hadamard product of moments: ``[n_1, Dv]``, normalisers."""
    return _answer(maps, y, values, coefficients, scale)


@jax.jit
def _answer(maps, y, values, coefficients, scale):
    state = maps[0].weights(coefficients, scale=scale, dtype=jnp.float64)[:, None]
    for phi, keys, v in zip(maps[1:], y[1:], values, strict=True):
        state = state * (mapped(phi, keys).T @ jnp.concatenate([v, jnp.ones((v.shape[0], 1))], axis=1))
    sums = mapped(maps[0], y[0]) @ state
    return sums[:, :-1] / sums[:, -1:], sums[:, -1]


def brute_answer(y, values, exponential):
    """The same output from every tuple of keys."""
    weights = exponential(form(y)).reshape(y[0].shape[0], -1)
    products = np.asarray(values[0])
    for v in values[1:]:
        products = (products[:, None] * np.asarray(v)[None]).reshape(-1, v.shape[1])
    return weights @ products / weights.sum(1, keepdims=True), weights.sum(1)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_a_hadamard_product_of_moments_is_attention_with_the_polynomial(order, x64):
    y = factors(10 + order, order, 2)
    values = factors(20 + order, order, 3)[1:]
    values = [v[:, :3][: keys.shape[0]] for v, keys in zip(values, y[1:], strict=True)]
    coefficients = exp_coefficients("taylor", 4)
    out, normaliser = tensor_answer([MonomialFeatures(total_degree(2, 4))] * order, y, values, coefficients)
    expected = brute_answer(y, values, lambda x: polynomial.polyval(x, coefficients))
    np.testing.assert_allclose(out, expected[0], rtol=1e-10)
    np.testing.assert_allclose(normaliser, expected[1], rtol=1e-11)


def test_degree_zero_is_uniform_attention(x64):
    y, (v1, v2) = factors(0, 3, 2), factors(1, 3, 2)[1:]
    out, _ = tensor_answer([MonomialFeatures(total_degree(2, 0))] * 3, y, (v1, v2), exp_coefficients("taylor", 0))
    mean = np.mean(v1, axis=0) * np.mean(v2, axis=0)
    np.testing.assert_allclose(out, np.broadcast_to(mean, out.shape), rtol=1e-13)


def test_normalisers_of_even_taylor_degree_are_positive_for_any_input(x64):
    for seed, spread, degree in itertools.product(range(5), (0.3, 1.0, 3.0), (2, 4, 6)):
        y, values = factors(seed, 3, 3, spread=spread), factors(seed, 3, 3)[1:]
        maps = [MonomialFeatures(total_degree(3, degree))] * 3
        assert np.all(np.asarray(tensor_answer(maps, y, values, exp_coefficients("taylor", degree))[1]) > 0)


def test_errors_fall_with_the_even_degree(x64):
    y, values = factors(3, 3, 3, spread=0.5), factors(4, 3, 3)[1:]
    assert 1 < np.abs(form(y)).max() < 2
    expected, _ = brute_answer(y, values, np.exp)
    errors = []
    for degree in range(0, 11, 2):
        maps = [MonomialFeatures(total_degree(3, degree))] * 3
        out, _ = tensor_answer(maps, y, values, exp_coefficients("taylor", degree))
        errors.append(np.linalg.norm(out - expected))
    assert all(after < before / 2 for before, after in itertools.pairwise(errors))


def test_moments_of_monomials_answer_queries_of_order_two(x64):
    y, v = factors(5, 2, 3), factors(6, 2, 2)[1]
    coefficients = exp_coefficients("minimax", 4, bound=float(np.abs(form(y)).max()))
    features = MonomialFeatures(total_degree(3, 4))

    @jax.jit
    def answer(q, k, v):
        moments, w = FeatureMoments.of_tokens(features, k, v), features.weights(coefficients, dtype=jnp.float64)
        weighted = dataclasses.replace(moments, value_sum=w[:, None] * moments.value_sum, mass=w * moments.mass)
        return attend(q, weighted)

    state = answer(*y, v)
    expected = brute_answer(y, [v], lambda x: polynomial.polyval(x, coefficients))
    np.testing.assert_allclose(state.out, expected[0], rtol=1e-10)
    np.testing.assert_allclose(np.exp(state.lse), expected[1], rtol=1e-11)


def test_weights_may_be_traced_and_have_derivatives(x64):
    features = MonomialFeatures(total_degree(2, 3))
    y = factors(7, 3, 2)
    coefficients = exp_coefficients("taylor", 3)

    @jax.jit
    def first(coefficients, scale):
        return kernel([features] * 3, y, coefficients, scale)[0, 0, 0]

    by_coefficient, by_scale = jax.jit(jax.grad(first, argnums=(0, 1)))(coefficients, -0.8)
    x = float(form(y)[0, 0, 0])
    np.testing.assert_allclose(by_coefficient, (-0.8 * x) ** np.arange(4), rtol=1e-12)
    slope = sum(k * c * x**k * (-0.8) ** (k - 1) for k, c in enumerate(coefficients.tolist()))
    np.testing.assert_allclose(by_scale, slope, rtol=1e-12)


@pytest.mark.parametrize("bounds", [(0.9, 0.5, 0.2), (3.0, 2.5, 0.7), (1.0, 1.0, 0.0), (0.4, 0.4, 0.4)])
def test_anisotropic_sets_are_closed_downward_and_certified(bounds):
    random = np.random.default_rng(0)
    for rank in (1, 2, 9, 30):
        indices, error = anisotropic(bounds, rank)
        chosen = {tuple(alpha) for alpha in indices.exponents.tolist()}
        assert len(chosen) == indices.size == rank
        for alpha in chosen:
            for t in range(3):
                assert alpha[t] == 0 or (*alpha[:t], alpha[t] - 1, *alpha[t + 1 :]) in chosen
        corners = np.array(list(itertools.product((-1, 1), repeat=3)))
        a = np.array(bounds) * np.concatenate([corners, random.uniform(-1, 1, (200, 3))])
        factorials = np.array([math.prod(map(math.factorial, alpha)) for alpha in indices.exponents.tolist()])
        terms = np.prod(a[:, None] ** indices.exponents[None], axis=-1) / factorials
        errors = np.abs(np.exp(a.sum(1)) - terms.sum(1))
        assert errors.max() <= error
        # The bound is reached if every channel is at its limit.
        assert error <= errors.max() + 1e-12 * math.exp(sum(bounds))


def test_anisotropic_sets_hold_the_largest_terms():
    bounds = np.array([0.9, 0.5, 0.2])
    every = total_degree(3, 12)
    sizes = np.prod(bounds**every.exponents, axis=1) * every.multinomials
    sizes /= np.array([math.factorial(k) for k in every.degrees])
    expected = {tuple(every.exponents[i]) for i in np.argsort(-sizes)[:40]}
    assert {tuple(alpha) for alpha in anisotropic(bounds, 40)[0].exponents} == expected


def test_equal_small_channels_get_all_monomials_of_a_degree():
    # A cube of one channel, b^3 / 6, still exceeds any b^4 of four.
    indices, error = anisotropic([1 / 8] * 8, 165)
    assert {tuple(a) for a in indices.exponents} == {tuple(a) for a in total_degree(8, 3).exponents}
    assert error == pytest.approx(math.e - 8 / 3, rel=1e-9)


def test_channels_of_unequal_size_are_worth_a_set_of_their_own():
    decay = 0.6 ** np.arange(8)
    bounds = 2 * decay / decay.sum()
    _, error = anisotropic(bounds, 165)
    same_rank = math.exp(2) - sum(2**k / math.factorial(k) for k in range(4))
    assert error < same_rank / 2


@pytest.mark.parametrize("sketch", SKETCHES)
@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("exact_degree", [0, 1, 2])
def test_sketches_are_unbiased(sketch, order, exact_degree):
    y = [np.asarray(rows)[:2].astype(np.float32) for rows in factors(30 + order, order, 4, spread=0.8)]
    coefficients = np.array([1, 1, 0.5, 0.25], np.float32)

    @jax.jit
    @jax.vmap
    def estimate(key):
        maps = SKETCHES[sketch].draw(key, 8, 4, 3, order=order, exact_degree=exact_degree)
        product = maps[0].weights(coefficients, scale=0.9)[None] * maps[0](y[0]).values
        for phi, keys in zip(maps[1:], y[1:], strict=True):
            # The mean over keys: a Hadamard product of moments.
            product = product * jnp.mean(phi(keys).values, axis=0)[None]
        return jnp.sum(product, axis=1)

    estimates = np.asarray(estimate(jax.random.split(jax.random.key(0), 6000)), np.float64)
    truth = polynomial.polyval(form(y, 0.9), coefficients).mean(tuple(range(1, order)))
    standard_error = estimates.std(0) / math.sqrt(len(estimates))
    assert np.all(np.abs(estimates.mean(0) - truth) < 4.5 * standard_error)
    assert np.all(standard_error < 0.2 * np.abs(truth))
    assert np.all(standard_error > 0)


@pytest.mark.parametrize("sketch", SKETCHES)
def test_degrees_up_to_the_exact_one_have_no_error(sketch, x64):
    y = factors(40, 3, 4)

    @functools.partial(jax.jit, static_argnums=0)
    def first_map_and_kernel(exact_degree, key, coefficients):
        maps = SKETCHES[sketch].draw(key, 6, 4, 3, order=3, exact_degree=exact_degree)
        return maps[0], kernel(maps, y, coefficients)

    for exact_degree in (0, 1, 2):
        coefficients = np.where(np.arange(4) <= exact_degree, [2.0, -1.0, 0.5, 1.0], 0)
        first, found = first_map_and_kernel(exact_degree, jax.random.key(1), coefficients)
        np.testing.assert_allclose(found, polynomial.polyval(form(y), coefficients), atol=1e-12)
        assert first.num_features == jax.eval_shape(mapped, first, y[0]).shape[1]


def test_tensor_sketches_are_counts_of_the_tensor_power(x64):
    dim, size = 3, 5
    for phi in jax.jit(lambda key: TensorSketch.draw(key, size, dim, 3, order=3))(jax.random.key(2)):
        x = factors(41, 1, dim)[0]
        found = np.asarray(mapped(phi, x))[:, 1 + dim :].reshape(-1, 2, size)
        place, sign = np.asarray(phi.place), np.asarray(phi.sign)
        for k in (2, 3):
            expected = np.zeros((x.shape[0], size))
            for channels in itertools.product(range(dim), repeat=k):
                bucket = sum(place[p, t] for p, t in enumerate(channels)) % size
                signed = math.prod(sign[p, t] for p, t in enumerate(channels))
                expected[:, bucket] += signed * np.prod(np.asarray(x)[:, channels], axis=1)
            np.testing.assert_allclose(found[:, k - 2], expected, atol=1e-12)


def sketch_variance(sketch, y, size, degree, num_draws):
    @jax.jit
    @jax.vmap
    def estimate(key):
        maps = SKETCHES[sketch].draw(key, size, y[0].shape[1], degree, order=len(y), exact_degree=0)
        features = [phi(rows).values[0, -size:] for phi, rows in zip(maps, y, strict=True)]
        return maps[0].share * jnp.sum(math.prod(features[1:], start=features[0]))

    return float(np.asarray(estimate(jax.random.split(jax.random.key(3), num_draws)), np.float64).var())


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("degree", [1, 2])
def test_the_variance_of_product_sketches_has_its_closed_form(order, degree):
    y = [np.asarray(rows)[:1].astype(np.float32) for rows in factors(50 + order, order, 4)]
    terms = math.prod([np.asarray(rows[0], np.float64) for rows in y[1:]], start=np.asarray(y[0][0], np.float64))
    norms = math.prod(float(np.sum(rows**2)) for rows in y)
    second_moment = norms + 2 ** (order - 1) * (terms.sum() ** 2 - (terms**2).sum())
    expected = (second_moment**degree - terms.sum() ** (2 * degree)) / 8
    assert sketch_variance("product", y, 8, degree, 60_000) == pytest.approx(expected, rel=0.15)


def test_tensor_sketches_have_less_variance_than_products():
    y = [np.asarray(rows)[:1].astype(np.float32) for rows in factors(60, 3, 6)]
    tensor, product = (sketch_variance(sketch, y, 64, 3, 4000) for sketch in ("tensor", "product"))
    assert tensor < product / 4


@pytest.mark.parametrize("sketch", SKETCHES)
def test_sketches_are_pytrees_with_finite_derivatives(sketch, x64):
    phi = jax.jit(lambda key: SKETCHES[sketch].draw(key, 4, 3, 2)[0])(jax.random.key(4))
    again = jax.tree.unflatten(jax.tree.structure(phi), jax.tree.leaves(phi))
    x = factors(70, 1, 3)[0]
    np.testing.assert_array_equal(mapped(again, x), mapped(phi, x))
    assert mapped(phi, np.asarray(x, np.float32)).dtype == jnp.float32
    row_by_row = jax.jit(jax.vmap(lambda row: mapped(phi, row[None])[0]))(x)
    np.testing.assert_allclose(row_by_row, mapped(phi, x), atol=1e-12)
    slope = jax.jit(jax.grad(lambda x: jnp.sum(mapped(phi, x) ** 2)))(np.zeros_like(x))
    assert np.all(np.isfinite(slope))


def test_one_process_may_use_an_index_set_with_and_without_64_bits():
    features, x = MonomialFeatures(total_degree(3, 2)), np.arange(6.0).reshape(2, 3)
    found = []
    for wide in (True, False, True):
        with jax.enable_x64(wide):
            # Traced anew each time: a constant kept from another width would show.
            made = jax.jit(lambda x: (features.weights(np.ones(3), dtype=x.dtype), monomials(x, features.indices)))
            found.append(made(x.astype(np.float64 if wide else np.float32)))
            assert {y.dtype for y in found[-1]} == {np.dtype(np.float64 if wide else np.float32)}
    for weights, rows in found[1:]:
        np.testing.assert_array_equal(weights, found[0][0])
        np.testing.assert_array_equal(rows, found[0][1])


def test_bad_features_are_refused():
    with pytest.raises(ValueError, match=r"x must be \[N, D\] with D = 3, got shape \(2, 4\)"):
        monomials(jnp.ones((2, 4)), total_degree(3, 2))
    with pytest.raises(TypeError, match="x must be a floating-point array"):
        monomials(jnp.ones((2, 3), jnp.int32), total_degree(3, 2))
    with pytest.raises(ValueError, match=r"coefficients must be \[3\], one for each degree from 0, got shape \(2,\)"):
        MonomialFeatures(total_degree(3, 2)).weights(np.ones(2))
    with pytest.raises(ValueError, match="dim must be at least 1, got 0"):
        total_degree(0, 2)
    with pytest.raises(ValueError, match="channel_bounds must be finite and not negative"):
        anisotropic([1.0, -1.0], 3)
    with pytest.raises(ValueError, match="channel_bounds must sum to at most 700, got 800"):
        anisotropic([400.0, 400.0], 3)
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        anisotropic([1.0], 0)
    with pytest.raises(ValueError, match="exact_degree must be less than degree = 2, got 2: use MonomialFeatures"):
        TensorSketch.draw(jax.random.key(0), 4, 3, 2, exact_degree=2)
    with pytest.raises(ValueError, match="order must be at least 2, got 1"):
        ProductSketch.draw(jax.random.key(0), 4, 3, 2, order=1)
