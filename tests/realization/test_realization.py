"""Realised patterns against float64: certificates by brute force, exact limits, failure rates."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import SparsePattern, certify, dimension_bound, exact, realize_sparse_pattern
from approx_attention.realization import fixed_projections, minimal_dimension
from approx_attention.realization.constructions import Search, draw_until_accepted
from tests.references import as_array, causal_mask, compiled

N = 24
KEY = jax.random.key(0)
RANDOM_METHODS = ("projection", "orthogonal", "balanced", "ls", "wls", "max_margin", "learned")


def padded(pattern, keys_per_row=5):
    """The same pattern with more padding, so that patterns of one shape share a program."""
    pad = [(0, 0), (0, keys_per_row - pattern.indices.shape[1])]
    log_weights = np.pad(pattern.log_weights, pad, constant_values=-np.inf)
    return SparsePattern(np.pad(pattern.indices, pad), log_weights, np.pad(pattern.valid, pad), pattern.num_keys)


def dense_of(pattern):
    """The matrix of a pattern in float64, from its entries."""
    valid, matrix = np.asarray(pattern.valid), np.zeros((pattern.num_queries, pattern.num_keys))
    log_weights = np.asarray(pattern.log_weights, np.float64)[valid]
    matrix[np.nonzero(valid)[0], np.asarray(pattern.indices)[valid]] = np.exp(log_weights)
    return matrix / matrix.sum(1, keepdims=True)


_random = jax.jit(SparsePattern.random, static_argnums=(1, 2))


def random_pattern(num_tokens, keys_per_row):
    pattern = _random(KEY, num_tokens, keys_per_row)
    return padded(pattern) if num_tokens == N else pattern


def ragged(seed, num_tokens, most, gamma=10.0, is_causal=False):
    """A pattern of 1 to ``most`` keys a row with weights within a ratio ``gamma``."""
    random = np.random.default_rng(seed)
    dense = np.zeros((num_tokens, num_tokens))
    for row in range(num_tokens):
        visible = row + 1 if is_causal else num_tokens
        keys = random.choice(visible, min(visible, random.integers(1, most + 1)), replace=False)
        dense[row, keys] = gamma ** random.random(len(keys))
    return padded(SparsePattern.from_dense(dense.astype(np.float32)))


def logits_of(realized):
    x, w_q, w_k = (np.asarray(x, np.float64) for x in realized[:3])
    return x @ w_q @ w_k.T @ x.T / np.sqrt(w_q.shape[1])


def by_definition(logits, matrix, is_causal):
    """The certificate from the attention matrix, row by row and pair by pair, in float64."""
    matrix = matrix / matrix.sum(1, keepdims=True)
    visible = causal_mask(*matrix.shape) if is_causal else np.ones(matrix.shape, bool)
    weights = np.where(visible, np.exp(logits - np.where(visible, logits, -np.inf).max(1, keepdims=True)), 0)
    attention = weights / weights.sum(1, keepdims=True)
    eps1, ratio, distance = 0.0, 1.0, 0.0
    for row, wanted in zip(attention, matrix, strict=True):
        on = np.flatnonzero(wanted)
        off = np.flatnonzero((wanted == 0) & (row > 0))
        eps1 = max([eps1, *(row[j] / row[s] for j in off for s in on)])
        ratio = max([ratio, *(row[s] / row[r] / (wanted[s] / wanted[r]) for s in on for r in on)])
        distance = max(distance, np.abs(row - wanted).sum() / 2)
    size = np.abs(logits[visible]).max()
    return np.log(eps1), np.log(ratio), np.abs(logits).max(), -np.log(eps1) / size, distance


def realize(pattern, eps1=0.1, eps2=0.1, *, d, **options):
    options = {"key": KEY, "num_steps": 150, **options}
    return realize_sparse_pattern(pattern, eps1, eps2, d=d, **options)


# the certificate


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_the_certificate_is_what_brute_force_finds(seed, is_causal):
    pattern = ragged(seed, 19, 5, is_causal=is_causal)
    random = np.random.default_rng(seed)
    arrays = [jax.device_put(random.normal(size=shape).astype(np.float32)) for shape in ((19, 6), (6, 4), (6, 4))]
    found = certify(*arrays, pattern, is_causal=is_causal)
    expected = by_definition(logits_of(arrays), dense_of(pattern), is_causal)
    np.testing.assert_allclose(np.stack(found[:5]), expected, rtol=1e-5, atol=1e-6)
    eps1, eps2 = math.exp(expected[0]), math.expm1(expected[1])
    for factors, ok in (((1.01, 1.01), True), ((0.99, 1.01), False), ((1.01, 0.99), False)):
        limits = {"eps1": factors[0] * eps1, "eps2": factors[1] * eps2}
        assert bool(certify(*arrays, pattern, is_causal=is_causal, **limits).ok) is ok


@pytest.mark.parametrize("is_causal", [False, True])
def test_absolute_errors_of_ratios_are_what_brute_force_finds(is_causal):
    pattern = ragged(8, 19, 5, is_causal=is_causal)
    random = np.random.default_rng(8)
    arrays = [jax.device_put(random.normal(size=shape).astype(np.float32) / 2) for shape in ((19, 6), (6, 4), (6, 4))]
    logits, matrix = logits_of(arrays), dense_of(pattern)
    worst = max(
        abs(math.exp(logits[i, s] - logits[i, r]) - matrix[i, s] / matrix[i, r])
        for i in range(19)
        for s in np.flatnonzero(matrix[i])
        for r in np.flatnonzero(matrix[i])
    )
    measure = functools.partial(certify, *arrays, pattern, is_causal=is_causal, eps1=1e9)
    found = measure(ratio="absolute", eps2=1.01 * worst)
    np.testing.assert_allclose(np.expm1(found.log1p_eps2), worst, rtol=1e-5)
    assert bool(found.ok)
    assert not bool(measure(ratio="absolute", eps2=0.99 * worst).ok)
    relative = measure()
    assert abs(float(relative.log1p_eps2 - found.log1p_eps2)) > 0.01
    np.testing.assert_array_equal(np.stack(relative)[[0, 2, 3, 4]], np.stack(found)[[0, 2, 3, 4]])


def test_a_projection_is_accepted_by_either_error():
    pattern, options = ragged(1, N, 3), {"method": "orthogonal", "d": 22, "max_draws": 1, "tau": 6.0}
    for ratio in ("relative", "absolute"):
        limit = float(np.expm1(realize(pattern, 0.5, 1.0, ratio=ratio, **options).certificate.log1p_eps2))
        assert bool(realize(pattern, 0.5, 1.01 * limit, ratio=ratio, **options).certificate.ok)
        assert not bool(realize(pattern, 0.5, 0.99 * limit, ratio=ratio, **options).certificate.ok)


def test_the_certificate_of_more_rows_than_a_block(x64):
    pattern = random_pattern(300, 3)
    random = np.random.default_rng(0)
    arrays = [jax.device_put(random.normal(size=shape)) for shape in ((300, 6), (6, 4), (6, 4))]
    found = certify(*arrays, pattern)
    assert found.log_eps1.dtype == jnp.float64
    expected = by_definition(logits_of(arrays), dense_of(pattern), False)
    np.testing.assert_allclose(np.stack(found[:5]), expected, rtol=1e-12)


def test_logits_whose_exponentials_underflow_are_certified():
    identity, eye = SparsePattern.banded(4, [0]), as_array(np.eye(4))
    found = certify(eye, as_array(2000 * np.eye(4)), eye, identity, eps1=1e-300)
    assert float(found.log_eps1) == -1000
    assert float(found.logit_absmax) == 1000
    assert bool(certify(eye, as_array(-2000 * np.eye(4)), eye, identity).ok) is False


def test_the_order_of_tokens_and_constants_of_rows_do_not_matter():
    pattern = ragged(3, N, 4)
    realized = realize(pattern, d=22)
    order = np.random.default_rng(0).permutation(N)
    dense = dense_of(pattern)
    arrays = inputs, w_q, w_k = [np.asarray(x) for x in realized[:3]]
    permuted = certify(
        *map(jax.device_put, (inputs[order], w_q, w_k)), padded(SparsePattern.from_dense(dense[order][:, order]))
    )
    shifts = np.arange(N, dtype=np.float32)[:, None]
    scaled = SparsePattern(pattern.indices, pattern.log_weights + shifts, pattern.valid, N)
    shifted = certify(*map(jax.device_put, arrays), scaled)
    for other in (permuted, shifted):
        np.testing.assert_allclose(np.stack(other[:5]), np.stack(realized.certificate[:5]), rtol=1e-4, atol=2e-5)
    # A channel that adds a constant to each row of logits leaves attention unchanged.
    inputs = np.concatenate([inputs, 10 * shifts, np.ones_like(shifts)], axis=1)
    w_q, w_k = (math.sqrt(math.sqrt(23 / 22)) * np.pad(w, [(0, 2), (0, 1)]) for w in (w_q, w_k))
    w_q[44, 22] = w_k[45, 22] = (23 / 22) ** 0.25
    with_constants = certify(*(jax.device_put(x.astype(np.float32)) for x in (inputs, w_q, w_k)), pattern)
    for field in ("log_eps1", "log1p_eps2", "max_row_tv"):
        np.testing.assert_allclose(
            getattr(with_constants, field), getattr(realized.certificate, field), rtol=1e-4, atol=1e-4
        )
    assert float(with_constants.logit_absmax) > 1.5 * float(realized.certificate.logit_absmax)


# the constructions


def test_orthogonal_projections_of_as_many_channels_as_tokens_are_exact():
    for pattern in (ragged(1, N, 4), random_pattern(N, 3)):
        realized = realize(pattern, 0.01, 1e-4, d=N, method="orthogonal", tau=5.0, max_draws=1)
        assert bool(realized.certificate.ok)
        np.testing.assert_allclose(realized.certificate.log_eps1, -5, atol=1e-4)
        np.testing.assert_allclose(realized.certificate.log1p_eps2, 0, atol=2e-5)


@pytest.mark.parametrize("method", ["projection", "orthogonal", "balanced"])
def test_projections_are_unbiased(method):
    pattern, num_draws = ragged(2, 16, 3), 200

    def logits(key):
        inputs = realize(pattern, d=6, method=method, tau=2.0, max_draws=1, key=key).inputs
        return inputs[:, :6] @ inputs[:, 6:].T

    drawn = np.asarray(jax.jit(jax.vmap(logits))(jax.random.split(KEY, num_draws)), np.float64)
    matrix = dense_of(pattern)
    least = np.where(matrix > 0, matrix, np.inf).min(1, keepdims=True)
    expected = np.where(matrix > 0, 2 + np.log(np.where(matrix > 0, matrix, 1) / least), 0)
    error = drawn.std(0) / math.sqrt(num_draws)
    assert np.all(np.abs(drawn.mean(0) - expected) < 4.5 * error)
    assert np.all(error < 0.3)


@pytest.mark.parametrize("method", ["ls", "wls", "max_margin", "learned"])
def test_interpolated_weights_are_exact_and_the_lift_is_the_least(method):
    pattern = ragged(4, N, 3)
    realized = realize(pattern, 0.05, 1e-3, d={"wls": 22, "ls": 21}.get(method, 18), method=method)
    assert bool(realized.certificate.ok)
    np.testing.assert_allclose(realized.certificate.log_eps1, math.log(0.05), rtol=2e-3)
    np.testing.assert_allclose(realized.certificate.log1p_eps2, 0, atol=5e-4)
    expected = by_definition(logits_of(realized), dense_of(pattern), False)
    np.testing.assert_allclose(np.stack(realized.certificate[:5]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_better_constructions_lift_less():
    pattern = random_pattern(48, 2)
    lifts = [
        logits_of(realize(pattern, d=28, method=method, num_steps=300))[0, pattern.indices[0, 0]]
        for method in ("wls", "max_margin", "learned")
    ]
    assert lifts[0] > 1.1 * max(lifts[1:])
    assert bool(realize(pattern, d=7, method="learned", num_steps=300).certificate.ok)
    assert not bool(realize(pattern, d=7, method="wls", max_draws=20).certificate.ok)


def test_two_channels_hold_any_permutation_by_a_moment_curve():
    identity = SparsePattern.banded(64, [0])
    realized = realize_sparse_pattern(identity, 0.0031, 0.0, d=2, method="trigonometric", tau=1200.0)
    assert bool(realized.certificate.ok)
    assert float(realized.certificate.log1p_eps2) == 0
    np.testing.assert_allclose(realized.certificate.log_eps1, -1200 * (1 - math.cos(2 * math.pi / 64)), rtol=1e-4)


def test_the_moment_curve_holds_weights_in_float64(x64):
    for is_causal in (False, True):
        pattern = SparsePattern.from_dense(dense_of(ragged(5, 20, 3, is_causal=is_causal)))
        degree = pattern.keys_per_row
        realized = realize_sparse_pattern(
            pattern, 0.1, 1e-3, d=2 * degree + 1, method="trigonometric", dtype=jnp.float64
        )
        assert realized.inputs.dtype == jnp.float64
        assert bool(realized.certificate.ok)
        assert float(realized.certificate.log1p_eps2) < 1e-6
        assert float(realized.certificate.rho) < 1e-2


def test_patterns_without_zeros_by_the_rank_of_their_logarithms():
    gaussian = np.exp(-((np.arange(20)[:, None] - np.arange(20)[None, :]) ** 2) / 50)
    slope = np.exp(-np.abs(np.arange(20)[:, None] - np.arange(20)[None, :]) / 5)
    for matrix, d, ok in ((gaussian, 1, False), (gaussian, 2, True), (slope, 2, False), (slope, 19, True)):
        certificate = realize_sparse_pattern(
            SparsePattern.from_dense(matrix), 0.5, 1e-3, d=d, method="dense"
        ).certificate
        assert bool(certificate.ok) is ok
        assert float(certificate.log_eps1) == -math.inf
        assert float(certificate.rho) == math.inf


@pytest.mark.parametrize("method", RANDOM_METHODS)
def test_no_method_finds_a_permutation_in_one_channel(method):
    realized = realize(SparsePattern.banded(8, [0]), 0.5, 1.0, d=1, method=method, max_draws=3, num_steps=20)
    assert not bool(realized.certificate.ok)
    assert int(realized.certificate.draws) == 3
    assert np.isfinite(np.stack(realized.certificate[:5])).all()


KINDS = {
    "banded": lambda: padded(SparsePattern.banded(N, range(-2, 3))),
    "causal banded": lambda: padded(SparsePattern.banded(N, range(-2, 1), is_causal=True)),
    "global column": lambda: padded(SparsePattern.banded(N, [0]).with_global([3], only_columns=True)),
    "ragged": lambda: ragged(6, N, 4),
    "strided": lambda: padded(SparsePattern.strided(N, 9)),
    "permutation": lambda: random_pattern(N, 1),
    "causal ragged": lambda: ragged(7, N, 4, is_causal=True),
}


@functools.cache
def of_kind(name):
    return KINDS[name]()


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_pattern_is_realised(name):
    pattern, is_causal = of_kind(name), name.startswith("causal")
    realized = realize(pattern, 1e-3, 1e-3, d=22, is_causal=is_causal)
    assert bool(realized.certificate.ok)
    expected = by_definition(logits_of(realized), dense_of(pattern), is_causal)
    np.testing.assert_allclose(np.stack(realized.certificate[:5]), expected, rtol=1e-3, atol=1e-4)
    # Attention with these inputs realises the pattern, and its outputs are close.
    inputs, w_q, w_k = map(np.asarray, realized[:3])
    values = np.random.default_rng(5).normal(size=(N, 3)).astype(np.float32)
    answer = compiled(exact)(*map(jax.device_put, (inputs @ w_q, inputs @ w_k, values)), is_causal=is_causal)
    error = np.max(np.abs(answer - dense_of(pattern) @ values))
    bound = 2 * float(realized.certificate.max_row_tv) * np.max(np.abs(values))
    assert bound / 50 < error < bound + 1e-6
    # The lower bound for any method is below the achieved dimension.
    certificate = realized.certificate
    seen = dense_of(pattern) > 0
    columns = int(seen.sum(0).max())
    lower = dimension_bound(
        N,
        int(seen.sum(1).max()),
        math.exp(float(certificate.log_eps1)),
        0.0,
        kind="packing",
        max_logit=float(certificate.logit_absmax),
        rows_per_key=columns,
    )
    assert lower.is_lower
    assert lower.dim <= 22


def test_the_lower_bound_comes_near_for_learned_permutations():
    pattern = random_pattern(48, 1)
    certificate = realize(pattern, d=5, method="learned", num_steps=300).certificate
    assert bool(certificate.ok)
    lower = dimension_bound(48, 1, 0.1, 0.1, kind="packing", max_logit=float(certificate.logit_absmax), rows_per_key=1)
    assert 2 <= lower.dim <= 5


def test_a_row_that_sees_all_keys_has_no_zeros_to_keep_apart():
    dense = np.eye(6)
    dense[2] = 1
    realized = realize(SparsePattern.from_dense(dense), d=6)
    assert bool(realized.certificate.ok)
    assert float(realized.certificate.log_eps1) > -math.inf


# the projection that all patterns share, and retries


def test_projections_are_the_same_for_every_pattern():
    realized = [
        realize(pattern, 0.5, 1.0, d=22, method=method, max_draws=1)
        for pattern in (of_kind("permutation"), of_kind("ragged"))
        for method in ("projection", "wls")
    ]
    for w, fixed in zip(realized[0][1:3], fixed_projections(22), strict=True):
        assert w.shape == (44, 22)
        np.testing.assert_array_equal(w, fixed)
    for other in realized[1:]:
        for w, same in zip(realized[0][1:3], other[1:3], strict=True):
            np.testing.assert_array_equal(w, same)
        assert np.any(np.asarray(other.inputs) != np.asarray(realized[0].inputs))


def test_one_set_of_keys_serves_many_patterns():
    def serve(key):
        pattern = SparsePattern.random(key, N, 2)
        realized = realize(pattern, d=22, method="wls", max_draws=1)
        return realized.certificate.ok, realized.inputs[:, 22:]

    ok, keys = jax.jit(functools.partial(jax.lax.map, serve))(jax.random.split(jax.random.key(9), 20))
    assert np.mean(ok) > 0.9
    assert np.all(np.asarray(keys) == np.asarray(keys[0]))


def test_one_key_gives_one_draw_and_rejected_draws_are_made_anew():
    pattern = random_pattern(N, 2)
    found = [realize(pattern, d=21, method="ls", key=jax.random.key(seed)) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(found[0].inputs, found[1].inputs)
    assert np.any(np.asarray(found[0].inputs) != np.asarray(found[2].inputs))
    draws = [int(realize(pattern, d=21, method="ls", key=jax.random.key(s)).certificate.draws) for s in range(1, 7)]
    assert max(draws) > 1
    accepted = [realize(pattern, d=21, method="ls", key=jax.random.key(s)).certificate.ok for s in range(1, 7)]
    assert np.mean(accepted) > 0.5


def test_the_largest_logit_allowed():
    pattern = random_pattern(N, 2)
    free = realize(pattern, d=22, max_draws=1).certificate
    assert bool(free.ok)
    for factor, ok in ((1.01, True), (0.99, False)):
        limited = realize(pattern, d=22, max_draws=1, max_logit=factor * float(free.logit_absmax)).certificate
        assert bool(limited.ok) is ok
    np.testing.assert_allclose(free.logits_needed(0.1), free.logit_absmax, rtol=1e-3)
    np.testing.assert_allclose(free.logits_needed(0.01), 2 * free.logit_absmax, rtol=1e-3)
    eye, negative = as_array(np.eye(4)), as_array(-8 * np.eye(4))
    inverted = certify(eye, negative, eye, SparsePattern.banded(4, [0]))
    assert float(inverted.logits_needed(0.1)) == math.inf
    for eps1 in (0, 1, 2.0, -1, math.nan):
        with pytest.raises(ValueError, match="eps1 must"):
            free.logits_needed(eps1)


def test_a_certificate_speaks_of_inputs_as_they_are_rounded():
    pattern = random_pattern(N, 3)
    certificates = {
        dtype: realize(pattern, 0.01, 0.5, d=22, dtype=dtype) for dtype in (jnp.float32, jnp.float16, jnp.bfloat16)
    }
    errors = []
    for dtype, realized in certificates.items():
        assert all(x.dtype == dtype for x in realized[:3])
        assert bool(realized.certificate.ok)
        expected = by_definition(logits_of(realized), dense_of(pattern), False)
        np.testing.assert_allclose(np.stack(realized.certificate[:5]), expected, rtol=1e-3, atol=1e-4)
        errors.append(float(realized.certificate.log1p_eps2))
    assert errors[0] < 1e-4 < 10 * errors[1] < errors[2] * 10
    assert errors[1] < errors[2] / 3
    tight = realize(pattern, 0.01, 1e-4, d=22, dtype=jnp.bfloat16)
    assert not bool(tight.certificate.ok)


def test_fewer_channels_are_a_prefix_of_more():
    pattern = random_pattern(N, 2)
    for method in ("projection", "wls"):
        draw = functools.partial(draw_until_accepted, pattern, (0.5, 1.0, math.inf), None, 10, KEY)
        narrow, wide = (draw(search=Search(method, width, jnp.dtype(jnp.float32), num_steps=20)) for width in (10, 16))
        ours, fewer = np.asarray(wide.inputs), np.asarray(narrow.inputs)
        np.testing.assert_allclose(ours[:, 10:16], 0, atol=1e-7)
        np.testing.assert_allclose(ours[:, 16:26], fewer[:, 10:], atol=1e-4)
        np.testing.assert_allclose(
            np.stack(wide.certificate[:5]), np.stack(narrow.certificate[:5]), rtol=2e-2, atol=2e-6
        )


# errors


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "wis"}, "method must be one of"),
        ({"eps1": 1.0}, r"eps1 must lie in \(0, 1\)"),
        ({"eps2": -0.1}, "eps2 must be at least 0"),
        ({"d": 0}, "d must be at least 1"),
        ({"d": 4}, "wls needs d >= 5"),
        ({"d": 9, "method": "trigonometric"}, "trigonometric needs d >= 10"),
        ({"max_draws": 0}, "max_draws must be at least 1"),
        ({"ratio": "squared"}, "ratio must be one of relative, absolute"),
        ({"key": None}, "pass a key"),
        ({"tau": -1.0}, "tau must be positive, got -1"),
        ({"tau": math.nan}, "tau must be positive, got nan"),
        ({"max_logit": 0.0}, "max_logit must be positive, got 0"),
        ({"is_causal": True}, r"sees no key after its query, but 23 rows have one; use pattern.causal\(\)"),
        ({"method": "dense"}, "zeros in 24 rows"),
    ],
)
def test_what_cannot_be_asked_is_refused(options, says):
    with pytest.raises(ValueError, match=says):
        realize(of_kind("banded"), **{"d": 12, **options})


@pytest.mark.parametrize("method", ["projection", "orthogonal", "balanced"])
def test_projections_refuse_patterns_without_zeros(method):
    with pytest.raises(ValueError, match="use method='dense'"):
        realize(SparsePattern.from_dense(np.ones((4, 4))), d=4, method=method)


def test_other_refusals():
    identity = SparsePattern.banded(4, [0])
    with pytest.raises(NotImplementedError, match="'dense' does not support is_causal"):
        realize(SparsePattern.from_dense(np.ones((4, 4))), d=4, method="dense", is_causal=True)
    with pytest.raises(ValueError, match="needs a square pattern"):
        realize(SparsePattern.block(4, 2, num_keys=5), d=4)
    with pytest.raises(ValueError, match="inputs must be"):
        certify(*(as_array(np.ones(shape)) for shape in ((3, 4), (4, 2), (4, 2))), identity)
    with pytest.raises(ValueError, match="w_q and w_k must be"):
        certify(*(as_array(np.ones(shape)) for shape in ((4, 4), (4, 2), (4, 3))), identity)
    with pytest.raises(TypeError, match="dtype must be floating point, got int32"):
        realize(identity, d=4, dtype=jnp.int32)
    with pytest.raises(ValueError, match="needs a random method"):
        minimal_dimension(identity, 0.1, 0.1, key=KEY, method="dense")
    for options, says in (
        ({"kind": "packing"}, "positive max_logit"),
        ({"kind": "projection_heuristic", "keys_per_row": 1}, "keys_per_row = 1"),
        ({"kind": "johnson_lindenstrauss", "eps2": 0.0}, "eps2 = 0"),
        ({"kind": "least_squares", "tau": 1.0}, "tau must exceed"),
        ({"keys_per_row": 65}, "at most num_tokens"),
        ({"gamma": 0.5}, "gamma must be at least 1"),
        ({"eps2": math.nan}, "eps2 at least 0"),
        ({"kind": "least_squares", "tau": math.nan}, "tau must exceed"),
        ({"kind": "packing", "max_logit": math.nan}, "positive max_logit"),
        ({"p": 1.0}, "p must lie in"),
    ):
        arguments = {"num_tokens": 64, "keys_per_row": 2, "eps1": 0.1, "eps2": 0.1, **options}
        with pytest.raises(ValueError, match=says):
            dimension_bound(**arguments)


@pytest.mark.slow
def test_orthogonal_projections_never_need_more_channels_than_keys():
    pattern = SparsePattern.random(jax.random.key(0), 24, 2)
    found = minimal_dimension(pattern, 0.1, 0.1, key=jax.random.key(1), method="orthogonal", trials=2)
    assert max(found.per_trial) <= 24
