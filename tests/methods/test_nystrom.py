"""Nystrom, Skyformer and the truncated SVD against linear algebra in float64 NumPy."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads, check_vjp

import approx_attention
from approx_attention import attention
from approx_attention.methods.nystrom import _iterated_inverse
from approx_attention.methods.svd import _truncated
from tests.methods.case import Case
from tests.references import as_array, brute_force, kernelised_attention, random_head, relative_error, scaled

CASES = {
    "nystrom": Case(
        fast=True,
        changes={"inverse": "ridge", "num_iterations": 3, "ridge": 0.5, "rcond": 0.5},
        contexts={"ridge": {"inverse": "ridge"}, "rcond": {"inverse": "svd"}},
    ),
    "skyformer": Case(target=kernelised_attention, changes={"ridge": 0.5, "noise": as_array(np.arange(80.0))}),
    "svd": Case(),
}

pytestmark = pytest.mark.usefixtures("x64")

nystrom = jax.jit(
    approx_attention.nystrom, static_argnames=("num_landmarks", "inverse", "num_iterations", "ridge", "rcond")
)
skyformer = jax.jit(approx_attention.skyformer, static_argnames=("num_landmarks", "ridge"))
svd = jax.jit(approx_attention.svd, static_argnames="rank")

INVERSES = {
    "iterations": {},
    "ridge": {"inverse": "ridge"},
    "svd": {"inverse": "svd"},
}
true_inverse = functools.partial(nystrom, inverse="svd", rcond=1e-12)
by_inverse = pytest.mark.parametrize("options", INVERSES.values(), ids=INVERSES)


def head(seed, num_queries=16, num_keys=16, head_dim=4, value_dim=3, spread=1.0):
    return random_head(seed, num_queries, num_keys, head_dim, value_dim, jnp.float64, spread)


def implied(method, q, k, *args, **options):
    """The matrix by which a method multiplies the values."""
    return np.asarray(method(q, k, np.eye(k.shape[0]), *args, **options))


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def iterated(a, num_iterations):
    z, eye = a.T / (np.linalg.norm(a, 1) * np.linalg.norm(a, np.inf)), np.eye(len(a))
    for _ in range(num_iterations):
        z = z @ (13 * eye - a @ z @ (15 * eye - a @ z @ (7 * eye - a @ z))) / 4
    return z


INVERT = {
    "iterations": lambda a: iterated(a, 6),
    "ridge": lambda a: np.linalg.solve(a.T @ a + 1e-4 * np.eye(len(a)), a.T),
    "svd": lambda a: np.linalg.pinv(a, 1e-2),
}


def nystrom_by_loop(q, k, v, num_landmarks, invert, q_real=None, k_real=None):
    """The formula in a loop, with means over real tokens."""
    q, k = scaled(q, k)
    q_own, k_own = (x if real is None else x[np.asarray(real)] for x, real in ((q, q_real), (k, k_real)))
    v = v if k_real is None else v[np.asarray(k_real)]
    num_landmarks = min(num_landmarks, len(q_own), len(k_own))

    def means(x):
        segment = np.arange(len(x)) * num_landmarks // len(x)
        return np.array([np.mean(np.asarray(x)[segment == c], axis=0) for c in range(num_landmarks)])

    q_bar, k_bar = means(q_own), means(k_own)
    inner = softmax(q_bar @ k_own.T) @ np.asarray(v)
    return softmax(q @ k_bar.T) @ (invert(softmax(q_bar @ k_bar.T)) @ inner)


# Nystrom


@pytest.mark.parametrize("inverse", INVERSES)
@pytest.mark.parametrize("lengths", [(16, 16), (13, 21), (21, 13)])
def test_nystrom_is_its_formula(inverse, lengths):
    q, k, v = head(0, *lengths)
    expected = nystrom_by_loop(q, k, v, 5, INVERT[inverse])
    np.testing.assert_allclose(nystrom(q, k, v, num_landmarks=5, **INVERSES[inverse]), expected, atol=1e-10)
    assert relative_error(expected, brute_force(q, k, v)[0]) > 0.01


@pytest.mark.parametrize("num_landmarks", [16, 99])
def test_nystrom_with_every_token_as_landmark_is_exact(num_landmarks):
    q, k, v = head(1)
    expected = brute_force(q, k, v)[0]
    np.testing.assert_allclose(true_inverse(q, k, v, num_landmarks=num_landmarks), expected, atol=1e-9)
    assert relative_error(nystrom(q, k, v, num_landmarks=16), expected) > 1e-3


def test_nystrom_is_exact_where_its_landmarks_are_all_queries_and_keys():
    q, k, v = map(np.asarray, head(2, 4, 4))
    v = np.concatenate([v, 2 - v**2])
    q, k = np.repeat(q, 2, axis=0), np.repeat(k, 2, axis=0)
    out = true_inverse(q, k, v, num_landmarks=4)
    np.testing.assert_allclose(out, brute_force(q, k, v)[0], atol=1e-9)
    assert relative_error(nystrom(q, k, v, num_landmarks=2), out) > 0.01


@pytest.mark.parametrize("lengths", [(16, 16), (12, 20)])
def test_rows_sum_to_1_under_the_true_inverse_only(lengths):
    q, k, _ = head(3, *lengths)
    rows = implied(true_inverse, q, k, num_landmarks=5).sum(1)
    np.testing.assert_allclose(rows, 1, atol=1e-9)
    assert np.abs(implied(nystrom, q, k, num_landmarks=5).sum(1) - 1).max() > 1e-3


def test_weights_can_be_negative():
    q, k, _ = head(4)
    assert implied(true_inverse, q, k, num_landmarks=5).min() < -0.01


def test_the_iteration_approaches_the_inverse_and_a_few_steps_cut_small_singular_values():
    left, right = (np.linalg.qr(np.random.default_rng(i).normal(size=(4, 4)))[0] for i in range(2))
    sigma = np.array([1.0, 0.3, 0.1, 1e-3])
    a = left * sigma @ right
    inverse = jax.jit(_iterated_inverse, static_argnums=1)
    gain = np.diag(right @ np.asarray(inverse(a, 6)) @ left) * sigma
    np.testing.assert_allclose(gain[:2], 1, atol=1e-3)
    assert gain[2] > 0.8
    assert gain[3] < 0.01
    np.testing.assert_allclose(inverse(a, 30), np.linalg.inv(a), rtol=1e-6)


@by_inverse
def test_an_item_does_not_depend_on_its_batch_mates(options):
    function = functools.partial(nystrom, num_landmarks=5, **options)
    # Column sums of the middle matrix, which scale the iteration, differ widely between these.
    heads = [head(5), head(6, spread=4.0), head(7, spread=0.1)]
    together = jax.jit(jax.vmap(function))(*(np.stack(x) for x in zip(*heads, strict=True)))
    for out, (q, k, v) in zip(np.asarray(together), heads, strict=True):
        np.testing.assert_allclose(out, function(q, k, v), atol=1e-10)


def test_the_iterated_inverse_is_that_of_each_matrix():
    logits = np.random.default_rng(0).normal(size=(3, 6, 6)) * np.array([0.1, 1, 5])[:, None, None]
    a = softmax(logits)
    found = jax.jit(jax.vmap(lambda a: _iterated_inverse(a, 6)))(a)
    np.testing.assert_allclose(found, np.stack([iterated(x, 6) for x in a]), rtol=1e-9, atol=1e-9)


def test_a_small_ridge_is_the_true_inverse():
    q, k, v = head(8, spread=3.0)
    truth = true_inverse(q, k, v, num_landmarks=4)
    errors = [
        relative_error(nystrom(q, k, v, num_landmarks=4, inverse="ridge", ridge=ridge), truth)
        for ridge in (1e-2, 1e-4, 1e-10)
    ]
    assert errors[0] > 10 * errors[1] > 100 * errors[2], errors
    assert errors[2] < 1e-7


def test_a_cut_drops_the_singular_values_below_it():
    q, k, _ = head(9)
    q_bar, k_bar = (x.reshape(4, 4, -1).mean(1) for x in scaled(q, k))
    sigma = np.linalg.svd(softmax(q_bar @ k_bar.T), compute_uv=False)
    cut = float(np.sqrt(sigma[1] * sigma[2]) / sigma[0])
    function = functools.partial(implied, nystrom, q, k, num_landmarks=4, inverse="svd")
    assert np.linalg.matrix_rank(function(rcond=cut), tol=1e-10) == 2
    assert np.linalg.matrix_rank(function(rcond=1e-12), tol=1e-10) == 4


# padding


@pytest.mark.parametrize("inverse", INVERSES)
@pytest.mark.parametrize("lengths", [(16, 16), (12, 16)])
def test_padding_is_left_out_of_means_landmarks_and_sums(inverse, lengths):
    q, k, v = map(np.asarray, head(10, *lengths))
    hidden = np.isin(np.arange(16), [1, 8, 9, 10, 11])
    kv_mask = ~hidden
    q_real = kv_mask if lengths[0] == 16 else None
    function = functools.partial(nystrom, num_landmarks=4, **INVERSES[inverse])

    expected = nystrom_by_loop(q, k, v, 4, INVERT[inverse], q_real, kv_mask)
    out = function(q, k, v, kv_mask=kv_mask)
    np.testing.assert_allclose(out, expected, atol=1e-10)
    assert relative_error(function(q, k, v, kv_mask=np.ones(16, bool)), expected) > 0.01

    soiled_q = np.where(hidden[:, None], np.nan, q) if lengths[0] == 16 else q
    soiled_k, soiled_v = np.where(hidden[:, None], np.nan, k), np.where(hidden[:, None], np.inf, v)
    soiled = function(soiled_q, soiled_k, soiled_v, kv_mask=kv_mask)
    rows = ~hidden if lengths[0] == 16 else slice(None)
    np.testing.assert_array_equal(np.asarray(soiled)[rows], np.asarray(out)[rows])


@pytest.mark.parametrize("inverse", INVERSES)
def test_masked_equals_removed(inverse):
    q, k, v = map(np.asarray, head(11))
    kv_mask = kept = np.arange(16) % 4 != 2
    # There are fewer real tokens than 16.
    for num_landmarks in (16, 4):
        masked = np.asarray(nystrom(q, k, v, num_landmarks=num_landmarks, kv_mask=kv_mask, **INVERSES[inverse]))
        removed = nystrom_by_loop(q[kept], k[kept], v[kept], num_landmarks, INVERT[inverse])
        np.testing.assert_allclose(masked[kept], removed, atol=1e-10)


# Skyformer


@pytest.mark.parametrize("lengths", [(9, 9), (7, 11)])
def test_skyformer_with_every_row_as_landmark_is_kernelised_attention(lengths):
    q, k, v = head(13, *lengths)
    for scale in (0.5, 0.3):
        expected = kernelised_attention(q, k, v, scale=scale)
        out = skyformer(q, k, v, jax.random.key(0), num_landmarks=99, ridge=1e-12, scale=scale)
        np.testing.assert_allclose(out, expected, atol=1e-9)
        assert relative_error(brute_force(q, k, v, scale=scale)[0], expected) > 0.1


def test_skyformer_is_its_formula():
    q, k, v = head(14, 9, 12)
    noise = np.random.default_rng(0).permutation(21).astype(np.float64)
    tokens = np.concatenate(scaled(q, k))
    kernel = np.exp(-np.sum((tokens[:, None] - tokens[None]) ** 2, axis=-1) / 2)
    chosen = np.asarray(noise) >= 14
    middle = kernel[np.ix_(chosen, chosen)] + 0.1 * np.eye(7)
    expected = kernel[:9, chosen] @ np.linalg.solve(middle, kernel[chosen][:, 9:] @ np.asarray(v))
    out = skyformer(q, k, v, num_landmarks=7, ridge=0.1, noise=noise)
    np.testing.assert_allclose(out, expected, atol=1e-10)


def test_skyformer_draws_every_row_alike():
    q, k, _ = head(15, 4, 6)
    # With one landmark x the implied weight of key j is proportional to kappa(x, k_j), which identifies x.
    weights = jax.jit(jax.vmap(lambda key: implied_row(q, k, key)))(jax.random.split(jax.random.key(0), 2000))
    tokens = np.concatenate(scaled(q, k))
    kernel = np.exp(-np.sum((tokens[:, None] - tokens[None, 4:]) ** 2, axis=-1) / 2)
    kernel /= kernel.sum(1, keepdims=True)
    drawn = np.argmin(np.sum((np.asarray(weights)[:, None] - kernel[None]) ** 2, axis=-1), axis=1)
    counts = np.bincount(drawn, minlength=10)
    assert np.abs(counts - 200).max() < 4.5 * np.sqrt(2000 * 0.1 * 0.9)


def implied_row(q, k, key):
    row = skyformer(q, k, jnp.eye(k.shape[0]), key, num_landmarks=1)[0]
    return row / jnp.sum(row)


@pytest.mark.parametrize("num_queries", [8, 12])
def test_skyformer_draws_no_padding(num_queries):
    q, k, v = map(np.asarray, head(16, num_queries, 12))
    kv_mask = np.arange(12) < 8
    function = functools.partial(skyformer, num_landmarks=5, ridge=1e-6)
    noise = np.arange(8.0)
    if num_queries == 12:
        # The largest priorities are those of padding, among both queries and keys.
        noise = np.concatenate([noise, np.full(4, 100.0), np.arange(8.0) + 0.5, np.full(4, 100.0)])
        removed = np.concatenate([noise[:8], noise[12:20]])
        soiled = np.where(kv_mask[:, None], q, np.nan)
    else:
        noise = np.concatenate([noise, noise + 0.5, np.full(4, 100.0)])
        removed, soiled = noise[:16], q
    soiled_k, soiled_v = (np.where(kv_mask[:, None], x, np.nan) for x in (k, v))
    out = function(soiled, soiled_k, soiled_v, noise=noise, kv_mask=kv_mask)
    np.testing.assert_allclose(out[:8], function(q[:8], k[:8], v[:8], noise=removed), atol=1e-10)


def test_skyformer_with_more_landmarks_than_real_rows():
    q, k, v = head(17, 6, 12)
    out = skyformer(q, k, v, jax.random.key(0), num_landmarks=17, ridge=1e-12, kv_mask=np.arange(12) < 3)
    np.testing.assert_allclose(out, kernelised_attention(q, np.asarray(k)[:3], np.asarray(v)[:3]), atol=1e-9)


def test_skyformer_does_not_feel_a_common_shift():
    q, k, v = (np.asarray(x, np.float32) for x in head(18))
    function = functools.partial(skyformer, v=v, key=jax.random.key(0), num_landmarks=8)
    # Multiples of 1/4 are shifted without rounding.
    q, k = (np.round(4 * x) / 4 for x in (q, k))
    np.testing.assert_allclose(function(q + 1024, k + 1024), function(q, k), atol=1e-4)


# the truncated SVD


def test_svd_is_the_truncation_of_the_attention_matrix():
    q, k, v = head(19, 12, 16)
    weights = brute_force(q, k, np.eye(16))[0]
    s = np.linalg.svd(weights, compute_uv=False)
    for rank in (1, 5, 11):
        # With the identity among the values the output contains the matrix.
        both = np.asarray(svd(q, k, np.concatenate([np.eye(16), v], axis=1), rank=rank))
        truncated, out = both[:, :16], both[:, 16:]
        np.testing.assert_allclose(truncated, nearest_of_rank(weights, rank), atol=1e-12)
        np.testing.assert_allclose(np.linalg.norm(truncated - weights), np.linalg.norm(s[rank:]), rtol=1e-9)
        np.testing.assert_allclose(np.linalg.norm(truncated - weights, 2), s[rank], rtol=1e-9)
        np.testing.assert_allclose(out, truncated @ np.asarray(v), atol=1e-12)
    np.testing.assert_allclose(svd(q, k, v, rank=12), brute_force(q, k, v)[0], atol=1e-12)


def nearest_of_rank(matrix, rank):
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vt[:rank]


@by_inverse
@pytest.mark.parametrize("num_landmarks", [1, 8])
def test_no_nystrom_matrix_is_nearer_than_the_svd_of_its_rank(options, num_landmarks):
    for seed in (20, 21):
        q, k, _ = head(seed, 16, 24)
        weights = brute_force(q, k, np.eye(24))[0]
        best = implied(svd, q, k, rank=num_landmarks)
        found = implied(nystrom, q, k, num_landmarks=num_landmarks, **options)
        assert np.linalg.matrix_rank(found, tol=1e-9) <= num_landmarks
        for norm in ("fro", 2):
            least = np.linalg.norm(best - weights, norm)
            assert np.linalg.norm(found - weights, norm) >= least * (1 - 1e-9) > 0


def test_svd_of_masked_keys_is_that_of_the_others():
    q, k, v = map(np.asarray, head(22))
    kv_mask = kept = np.arange(16) % 3 != 0
    weights = brute_force(q, k[kept], np.eye(kept.sum()))[0]
    masked = np.asarray(svd(q, k, v, rank=4, kv_mask=kv_mask))
    np.testing.assert_allclose(masked[kept], nearest_of_rank(weights[kept], 4) @ v[kept], atol=1e-12)
    whole = svd(q, k, v, rank=4, kv_mask=kv_mask, q_mask=np.ones(16, bool))
    np.testing.assert_allclose(whole, nearest_of_rank(weights, 4) @ v[kept], atol=1e-12)


def test_the_derivative_of_the_truncation():
    for rows, columns, rank in ((5, 8, 3), (8, 5, 1)):
        p = jnp.asarray(np.random.default_rng(0).normal(size=(rows, columns)))
        function = jax.jit(functools.partial(_truncated, rank=rank))
        check_grads(function, (p,), order=1, eps=1e-6, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("rank", [2, 5])
def test_the_derivative_of_the_truncation_at_coincident_singular_values_is_finite(rank):
    slope = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(_truncated(p, rank)))))
    repeated = np.repeat([2.0, 1.0], 4)[:, None] * np.ones(8)
    for p in (np.eye(8), repeated, np.zeros((8, 8))):
        chex.assert_tree_all_finite(slope(p))


# transformations, sizes, arguments


METHODS = {
    **{
        name: functools.partial(approx_attention.nystrom, num_landmarks=5, **options)
        for name, options in INVERSES.items()
        if name != "svd"
    },
    # The derivative of a truncated inverse is exact only if the truncated part is 0.
    "pseudo-inverse": functools.partial(approx_attention.nystrom, num_landmarks=5, inverse="svd", rcond=1e-10),
    "skyformer": functools.partial(approx_attention.skyformer, key=jax.random.key(0), num_landmarks=9),
    "svd": functools.partial(approx_attention.svd, rank=5),
}


@functools.cache
def with_pullback(name):
    """``(q, k, v, kv_mask, d_out) -> out, gradients`` of a method, as one program for each shape."""

    @jax.jit
    def both(q, k, v, kv_mask, d_out):
        out, pull = jax.vjp(functools.partial(METHODS[name], kv_mask=kv_mask), q, k, v)
        return out, pull(d_out)

    return both


@pytest.mark.parametrize("num_queries", [9, 12])
@pytest.mark.parametrize("name", METHODS)
def test_nothing_to_see_is_0_with_finite_gradients(name, num_queries):
    tensors, d_out = head(12, num_queries, 12), np.ones((num_queries, 3))
    out, gradients = with_pullback(name)(*tensors, np.zeros(12, bool), d_out)
    for x in (out, *gradients):
        np.testing.assert_array_equal(x, 0)
    out, gradients = with_pullback(name)(*tensors, np.arange(12) == 5, d_out)
    assert np.abs(out).max() > 0
    chex.assert_tree_all_finite(gradients)


@pytest.mark.parametrize("name", METHODS)
def test_jit_vmap_and_gradients_agree(name):
    tensors, kv_mask = tuple(np.asarray(x) for x in head(23, 9, 12, spread=2.0)), np.arange(12) != 5
    both = with_pullback(name)

    def alone(*tensors):
        return both(*tensors, kv_mask, np.ones((9, 3)))[0]

    def alone_with_pullback(*tensors):
        return alone(*tensors), lambda d_out: both(*tensors, kv_mask, d_out)[1]

    mapped = jax.jit(jax.vmap(functools.partial(METHODS[name], kv_mask=jnp.asarray(kv_mask))))
    batch = [np.stack([x, 2 * x]) for x in tensors]
    np.testing.assert_allclose(np.asarray(mapped(*batch))[0], alone(*tensors), atol=1e-10)
    # Outputs are compared above, with those of a program without a pullback.
    check_vjp(alone, alone_with_pullback, tensors, eps=1e-6, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("lengths", [(1, 5), (5, 1)])
@pytest.mark.parametrize("name", METHODS)
def test_few_tokens(name, lengths):
    q, k, v = head(24, *lengths)
    out = jax.jit(METHODS[name])(q, k, v)
    assert out.shape == (lengths[0], 3)
    chex.assert_tree_all_finite(out)
    if lengths[1] == 1 and name != "skyformer":
        np.testing.assert_allclose(out, np.broadcast_to(v, out.shape), atol=1e-3)


@pytest.mark.parametrize("name", ["nystrom", "skyformer", "svd"])
def test_attention_takes_them_and_refuses_a_causal_form(name):
    tensors = [as_array(np.asarray(x)[None, :, None]) for x in head(25)]
    size = {"rank": 5} if name == "svd" else {"num_landmarks": 5}
    rng = jax.random.key(0) if name == "skyformer" else None
    call = functools.partial(attention, method=name, rng=rng, **size)
    assert jax.jit(call)(*tensors).shape == (1, 16, 1, 3)
    with pytest.raises(NotImplementedError, match=f"{name}.*causal"):
        attention(*tensors, method=name, rng=rng, is_causal=True, **size)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (approx_attention.nystrom, {"num_landmarks": 0}, r"num_landmarks must be at least 1, got 0"),
        (approx_attention.nystrom, {"num_iterations": 0}, r"num_iterations must be at least 1, got 0"),
        (approx_attention.nystrom, {"ridge": 0.0}, r"ridge must be positive, got 0.0"),
        (approx_attention.nystrom, {"rcond": -1.0}, r"rcond must be positive, got -1.0"),
        (
            approx_attention.skyformer,
            {"num_landmarks": 0},
            r"num_landmarks must be at least 1, got 0",
        ),
        (approx_attention.skyformer, {"ridge": float("nan")}, r"ridge must be positive, got nan"),
        (
            approx_attention.skyformer,
            {"noise": as_array(np.zeros(16))},
            r"noise must be \[T \+ S\] = \[32\], got shape \(16,\)",
        ),
        (approx_attention.skyformer, {}, r"skyformer is random: pass a key"),
        (approx_attention.svd, {"rank": 0}, r"rank must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*head(26), **arguments)


def test_an_unknown_inverse_is_refused():
    # Users have no checks of annotations, so the function must check the value.
    with pytest.raises(ValueError, match=r"inverse must be one of iterations, ridge, svd; got 'rigde'; did you mean"):
        inspect.unwrap(approx_attention.nystrom)(*head(26), inverse="rigde")


def test_half_precision_is_summed_in_float32():
    q, k, v = head(27)
    low = [np.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    wide = [x.astype(np.float32) for x in low]
    for function in map(jax.jit, METHODS.values()):
        out = function(*low)
        assert out.dtype == jnp.bfloat16
        np.testing.assert_array_equal(out, np.asarray(function(*wide)).astype(jnp.bfloat16))
