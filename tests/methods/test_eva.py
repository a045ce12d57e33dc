"""EVA against loops in float64: its formula, the authors' departures from it, images, and exact cases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import eva
from approx_attention.methods import OFFICIAL_EVA
from tests.methods.case import Case
from tests.references import as_array, brute_force, causal_mask, compiled, random_head, relative_error, scaled

CASES = {
    "eva": Case(
        # In the causal form chunks have at least the requested size, for any number of chunks.
        exact_causal={"chunk_size": 1},
        changes={
            "chunk_size": 1,
            "num_chunks": 20,
            "exclude_local": False,
            "count_correction": False,
            "overlap": 4,
            "pooling_vectors": (as_array(np.ones(8)), as_array(np.zeros(8))),
            "chunk_keys": as_array(np.zeros((10, 8))),
            "proposal_mean": "k",
            "num_samples": 5,
            "noise": as_array(np.ones((2, 10, 8))),
            "noise_scale": "official",
            "local_bias": as_array(np.eye(4)),
            "spatial_shape": (10, 4),
        },
        # The causal form does not support all of them.
        changes_are_causal=False,
        contexts={
            "chunk_size": {"num_chunks": None},
            "overlap": {"num_chunks": 10},
            "chunk_keys": {"num_chunks": 10},
            "noise": {"num_chunks": 10},
            "spatial_shape": {"window_size": 2, "num_chunks": None},
        },
        # No noise: it is sampled per chunk, and the chunks of each device are numbered separately.
        devices={"num_chunks": 64, "window_size": 4, "rng": None},
    ),
}

eva = compiled(eva)

pytestmark = pytest.mark.usefixtures("x64")


def head(seed, num_queries=24, num_keys=24, head_dim=8, spread=1.0):
    return random_head(seed, num_queries, num_keys, head_dim, dtype=jnp.float64, spread=spread)


def eva_by_hand(q, k, v, window, chunk, *, visible=None, count=True, local=None, proposal="q+k"):
    """The formula, with Python loops; ``visible(t, c)`` and ``local(t, j)`` say what a query sees."""
    x, y, z = *scaled(q, k), np.asarray(v)
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


# With 21 tokens the last chunk is short. With 5 a query sees all keys itself, and proposals have no effect.
@pytest.mark.parametrize(("length", "proposal"), [(24, "q+k"), (21, "q+k"), (21, "half"), (21, "k"), (5, "q+k")])
def test_eva_is_its_formula(length, proposal):
    q, k, v = head(14, length, length)
    out = eva(q, k, v, window_size=8, chunk_size=4, proposal_mean=proposal)
    np.testing.assert_allclose(out, eva_by_hand(q, k, v, 8, 4, proposal=proposal), rtol=1e-9)


def test_eva_without_the_departures_is_the_official_one():
    q, k, v = head(15)
    options = {"window_size": 8, "chunk_size": 6, **OFFICIAL_EVA}
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
    out = eva(q, k, v, window_size=8, chunk_size=4, overlap=2, **OFFICIAL_EVA)
    x, y, z = *scaled(q, k), np.asarray(v)
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
    x, y, z = *scaled(q, k), np.asarray(v)

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
    # With one key per chunk the output is exact, for any noise.
    singletons = eva(q, k, v, jax.random.key(0), window_size=4, chunk_size=1, return_state=True)
    np.testing.assert_allclose(singletons.out, expected, rtol=1e-12)
    np.testing.assert_allclose(singletons.lse, lse, rtol=1e-12)
    # If the keys within each chunk are equal, the output is exact for any directions, and for any values.
    alike = jax.device_put(np.repeat(np.asarray(k)[::4], 4, axis=0))
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
    out = np.asarray(eva(q, k, v, window_size=4, chunk_size=2, num_chunks=num_chunks, is_causal=True))
    x, y, z = *scaled(q, k), np.asarray(v)

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
    bias = jax.device_put(np.random.default_rng(0).normal(size=(16, 16)))
    for chunk_size in (1, 2, 4):
        out = eva(q, k, v, window_size=4, chunk_size=chunk_size, spatial_shape=(4, 4), local_bias=bias)
        expected, _ = brute_force(q, k, v, bias=np.asarray(bias))
        np.testing.assert_allclose(out, expected, rtol=1e-9)


@pytest.mark.parametrize(("num_queries", "num_keys"), [(24, 16), (16, 24), (24, 24)])
def test_the_official_causal_form_does_not_see_the_future(num_queries, num_keys):
    tensors = head(30, num_queries, num_keys)
    function = jax.jit(functools.partial(eva, window_size=4, chunk_size=2, is_causal=True, exclude_local=False))
    changed = [np.array(x) for x in tensors]
    for x, change in zip(changed, (3, 1, 1), strict=True):
        x[10:] += change
    before, after = (np.asarray(function(*x)) for x in (tensors, changed))
    np.testing.assert_array_equal(after[:10], before[:10])


def test_images_in_squares():
    tensors = head(20, 64, 64)
    order = np.arange(64).reshape(2, 2, 2, 2, 2, 2).transpose(0, 3, 1, 4, 2, 5).reshape(-1)
    ordered = [jax.device_put(np.asarray(x)[order]) for x in tensors]
    for options in ({}, {**OFFICIAL_EVA, "proposal_mean": "half"}):
        rows = eva(*ordered, window_size=16, chunk_size=4, **options)
        image = eva(*tensors, window_size=4, chunk_size=2, spatial_shape=(8, 8), **options)
        np.testing.assert_allclose(np.asarray(image)[order], rows, rtol=1e-9)


@pytest.mark.slow
def test_more_samples_bring_a_chunks_coefficient_to_its_optimum():
    q, k, v = head(21, spread=0.7)
    x, y, z = *scaled(q, k), np.asarray(v)
    # The optimal coefficient of a chunk is the exact output over its keys.
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
    a, phi = (jax.device_put(x) for x in np.random.default_rng(0).normal(size=(2, 8)))
    out = eva(q, k, v, window_size=8, chunk_size=4, pooling_vectors=(a, phi), count_correction=False)
    x, y, z = *scaled(q, k), np.asarray(v)
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
    vectors, bias = (jax.device_put(np.ones(8)),) * 2, jax.device_put(np.zeros((2, 2)))
    for options, error, message in (
        ({"window_size": 8, "chunk_size": 3}, ValueError, "must divide window_size = 8 or be a multiple of it, got 3"),
        ({"chunk_size": 4, "num_chunks": 3}, ValueError, "chunk_size or num_chunks, not both"),
        ({"pooling_vectors": vectors, "proposal_mean": "k"}, ValueError, "vectors determine chunk keys"),
        ({"chunk_size": 0, "is_causal": True}, ValueError, "chunk_size must be at least 1, got 0"),
        ({"chunk_size": 16, "window_size": 8, "is_causal": True}, ValueError, "chunk_size must divide window_size = 8"),
        ({"spatial_shape": (4, 6), "window_size": 2, "num_chunks": 5}, ValueError, "num_chunks must be at least 6"),
        ({"window_size": 8, "chunk_size": 4, "overlap": 2}, ValueError, "overlap must be a multiple"),
        ({"is_causal": True, "overlap": 4}, NotImplementedError, "'eva' does not support overlap with is_causal"),
        ({"spatial_shape": (5, 5), "window_size": 5}, ValueError, "spatial_shape must be that of the 24 tokens"),
        (
            {"spatial_shape": (4, 6), "window_size": 2, "is_causal": True, "exclude_local": False},
            NotImplementedError,
            "'eva' does not support is_causal with spatial_shape",
        ),
        ({"local_bias": bias, "window_size": 8}, ValueError, r"local_bias must be .* \[8, 8\]"),
    ):
        with pytest.raises(error, match=message):
            eva(q, k, v, **options)


@pytest.mark.parametrize("sizes", [{"chunk_size": 8}, {"num_chunks": 1}])
def test_a_chunk_longer_than_a_window_has_no_overlap(sizes):
    q, k, v = random_head(5, 24, 24)
    with pytest.raises(ValueError, match="overlap must be a multiple of the chunk size"):
        eva(q, k, v, window_size=4, overlap=4, **sizes)
