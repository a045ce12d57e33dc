"""An output depends on the real tokens alone: not on padding, wherever it is, nor on the rest of the batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import METHODS, attend, attention, summarize_mean_pool
from approx_attention.core import RealFirst, averaging_matrix, draw_of_size, ranks, segments_of
from approx_attention.core.padding import floor_of_share
from approx_attention.methods import Convolution, chunk_means
from tests import cases
from tests.cases import LENGTH, PADDED_LENGTH, call, pulled_back, settings, with_gradients
from tests.references import as_array, brute_force, having, random_head, random_heads, relative_error

PADDED = having(padding=True)
CAUSAL = having(padding=True, causal=True)
both_directions = pytest.mark.parametrize(
    ("name", "is_causal"), [(name, c) for name in PADDED for c in ([False, True] if name in CAUSAL else [False])]
)
# Methods with windows have more layouts of tokens, and always run.
unless_slow = functools.partial(cases.unless_slow, also=("local", "eva"))
KINDS = ("right", "left", "scattered")


def mask_of(kind, num_real, length):
    """The mask of the real tokens for a kind of padding."""
    mask = np.arange(length) < num_real
    if kind == "left":
        return mask[::-1].copy()
    return np.random.default_rng(num_real).permutation(mask) if kind == "scattered" else mask


def padded(x, mask, garbage=0.0):
    out = np.full((len(mask), *x.shape[1:]), garbage, x.dtype)
    out[mask] = x
    return out


def compare_with_unpadded(answer, tensors, kinds=KINDS, lengths=(40,), atol=1e-5, cross=False):
    """Compare ``answer(q, k, v, d_out, kv_mask)``, values and gradients, with and without padding of every kind."""
    tensors = [np.asarray(x) for x in tensors]
    weight = np.random.default_rng(0).normal(size=(tensors[0].shape[0], tensors[2].shape[1])).astype(np.float32)
    out, gradients = answer(*tensors, weight, None)
    real = [slice(None) if cross else None, None, None]
    for length in lengths:
        for kind in kinds:
            mask = mask_of(kind, tensors[1].shape[0], length)
            q = tensors[0] if cross else padded(tensors[0], mask, 3.0)
            soiled = q, *(padded(x, mask, np.nan) for x in tensors[1:])
            padded_weight = weight if cross else padded(weight, mask)
            found, found_gradients = jax.tree.map(np.asarray, answer(*soiled, padded_weight, mask))
            at = np.flatnonzero(mask)
            message = f"{kind} padding to {length}"
            np.testing.assert_allclose(found if cross else found[at], out, atol=atol, err_msg=message)
            assert np.all(np.isfinite(found)), message
            for whole, expected, rows in zip(found_gradients, gradients, real, strict=True):
                own = whole[at] if rows is None else whole
                np.testing.assert_allclose(own, expected, atol=10 * atol, rtol=1e-4, err_msg=f"gradient, {message}")
                assert np.all(np.isfinite(whole)), message
    return out


@both_directions
@pytest.mark.parametrize("num_real", [LENGTH, pytest.param(5, marks=pytest.mark.slow)])
def test_an_output_is_that_of_the_real_tokens(name, is_causal, num_real):
    def answer(*tensors_and_weight_and_mask):
        *tensors, mask = tensors_and_weight_and_mask
        return with_gradients(name, *tensors, kv_mask=mask, is_causal=is_causal)

    lengths = (PADDED_LENGTH,) if num_real == LENGTH else (27, 40)
    compare_with_unpadded(answer, random_head(0, num_real, num_real, 8, 6), lengths=lengths)


@pytest.mark.parametrize("name", [unless_slow(name) for name in having(padding=True, cross=True)])
def test_cross_attention_is_that_of_the_real_keys(name):
    def function(q, k, v, mask):
        return METHODS[name].function(q, k, v, jax.random.key(7), **settings(name), kv_mask=mask)

    tensors = random_head(1, 11, 19)
    compare_with_unpadded(pulled_back(function), tensors, kinds=("left", "scattered"), cross=True)


@pytest.mark.parametrize(
    ("name", "is_causal"),
    [unless_slow(name, c) for name in PADDED for c in ([False, True] if name in CAUSAL else [False])],
)
def test_batch_mates_and_lengths_change_nothing(name, is_causal):
    options = {"method": name, "rng": jax.random.key(3), "is_causal": is_causal, **settings(name)}
    if name not in CAUSAL:
        options.pop("is_causal")
    tensors = [np.asarray(x) for x in random_heads(2, 2, 23, 23, 2, 1)]
    # Sequences of 23 tokens, of 9 before padding, given by a length, and of the same 9 after it, given by a mask.
    batch, lengths = [np.concatenate([x, np.roll(x[1:], 14, axis=1)]) for x in tensors], np.array([23, 9, 23])
    mask = (np.arange(23)[None] >= np.array([[0], [0], [14]]))[:, None, None, :]

    @jax.jit
    def outputs(batch, lengths, mask, short):
        whole = attention(*batch, **options, key_value_seq_lengths=lengths, mask=mask)
        return whole, attention(*short, **options)

    whole, alone = map(np.asarray, outputs(batch, lengths, mask, [x[1:, :9] for x in tensors]))
    np.testing.assert_allclose(whole[1, :9], alone[0], atol=1e-5)
    np.testing.assert_allclose(whole[2, 14:], alone[0], atol=1e-5)


# Blocks of queries divide the keys among them, so that more queries get smaller parts.
COUNTS_QUERIES = ("hyper_attention",)


@pytest.mark.parametrize("name", [unless_slow(x) for x in having(padding=True, cross=True) if x not in COUNTS_QUERIES])
def test_padded_queries_change_nothing(name):
    query, key, value = (np.asarray(x) for x in random_heads(4, 1, 21, 13, 2, 1))
    options = {"method": name, "rng": jax.random.key(3), **settings(name)}

    @jax.jit
    def outputs(query, short, key, value, lengths):
        whole = attention(query, key, value, **options, query_seq_lengths=lengths)
        return whole, attention(short, key, value, **options)

    whole, alone = map(np.asarray, outputs(query, query[:, :6], key, value, np.array([6], np.int32)))
    np.testing.assert_allclose(whole[:, :6], alone, atol=1e-5)
    np.testing.assert_array_equal(whole[:, 6:], 0)


@pytest.mark.parametrize("name", [name for name in PADDED if METHODS[name].summarize])
def test_a_summary_is_that_of_the_real_keys(name):
    summarize = METHODS[name].summarize
    q, k, v = random_head(5, 6, 19)
    size = {METHODS[name].size: 6} if METHODS[name].size else {}
    answer = jax.jit(lambda k, v, mask: attend(q, summarize(k, v, jax.random.key(7), **size, kv_mask=mask)))
    expected = answer(k, v, None)
    for kind in KINDS:
        mask = mask_of(kind, 19, 33)
        state = answer(padded(k, mask, np.nan), padded(v, mask, np.nan), mask)
        np.testing.assert_allclose(state.out, expected.out, atol=1e-5)
        np.testing.assert_allclose(state.lse, expected.lse, atol=1e-5)


# Settings whose layout of tokens differs from that of the defaults.
OTHERS = {
    "eva, chunks and windows of other sizes": ("eva", {"num_chunks": 3, "window_size": 6, "num_samples": 3}),
    "eva, chunks longer than a window": ("eva", {"num_chunks": 3, "window_size": 1}),
    "eva, fixed chunks": ("eva", {"chunk_size": 2, "window_size": 4, "overlap": 2, "num_samples": 2}),
    "eva, as published": ("eva", {"num_chunks": 4, "window_size": 4, "overlap": 1, "exclude_local": False}),
    "eva, as published and causal": (
        "eva",
        {"num_chunks": 4, "window_size": 4, "overlap": 1, "exclude_local": False, "is_causal": True},
    ),
    "lara, query-specific": ("lara", {"num_landmarks": 24, "weights": "query_specific", "num_samples": 2}),
    "lara, biased": ("lara", {"num_landmarks": 6, "weights": "biased", "antithetic": True, "num_samples": 2}),
    "linformer, maxima": ("linformer", {"projection_k": "max", "num_slots": 4}),
    "linformer, convolution": ("linformer", {"projection_k": Convolution(random_head(6, 3, 1)[0])}),
    "nystrom, more landmarks than tokens": ("nystrom", {"num_landmarks": 24, "inverse": "ridge"}),
    "skyformer, more landmarks than tokens": ("skyformer", {"num_landmarks": 50}),
    "lsh_top_k, sizes of buckets": ("lsh_top_k", {"keys_per_query": 3, "num_rounds": 2, "is_causal": True}),
    "hyper_attention, uneven blocks": ("hyper_attention", {"sample_size": 4, "block_size": 7}),
    "bigbird, few random blocks": ("bigbird", {"num_random_blocks": 1, "block_size": 2}),
    "coreset, more room than half the tokens": ("coreset", {"coreset_size": 12}),
    "coreset, as many as tokens": ("coreset", {"coreset_size": 19}),
    "coreset, pivots": ("coreset", {"coreset_size": 6, "algorithm": "nystrom_rpc"}),
    "block_linformer, less than a block": ("block_linformer", {"slots_per_block": 3, "block_size": 24}),
    "rfa, gates": ("rfa", {"num_features": 8, "is_causal": True, "block_size": 4}),
    "unreduced_jlt, entries by flat place": ("unreduced_jlt", {"sketch": "gaussian", "sketch_size": 8}),
}


@pytest.mark.parametrize(
    "case", [pytest.param(x, marks=() if "published" in x or "more" in x else pytest.mark.slow) for x in OTHERS]
)
def test_other_settings_too(case):
    name, options = OTHERS[case]

    def function(q, k, v, mask):
        return METHODS[name].function(q, k, v, jax.random.key(7), **options, kv_mask=mask)

    compare_with_unpadded(pulled_back(function), random_head(8, 19, 19), kinds=("left", "scattered"))


@pytest.mark.parametrize("name", sorted({"mean_pool", "coreset", "linformer", "block_linformer", "uniform_sample"}))
def test_as_many_landmarks_as_real_tokens_are_exact(name):
    q, k, v = (np.asarray(x) for x in random_head(9, 7, 7))
    mask = mask_of("scattered", 7, 64)
    out = call(name, *(padded(x, mask) for x in (q, k, v)), size=16, block_size=32, kv_mask=as_array(mask, bool))
    np.testing.assert_allclose(np.asarray(out)[mask], brute_force(q, k, v)[0], atol=1e-5)


# Methods that sample by the padded length have the same expectation, not the same numbers.


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["halving", "stratified", "thinformer", "subgen"])
def test_algorithms_that_draw_by_length_are_as_good(algorithm):
    q, k, v = random_head(10, 32, 48, spread=0.5)
    exact = brute_force(q, k, v)[0]
    keys = jax.random.split(jax.random.key(0), 64)

    @functools.partial(jax.jit, static_argnames="length")
    def outs(length):
        mask = jnp.arange(length) < 48
        tensors = (jnp.pad(x, ((0, length - 48), (0, 0))) for x in (k, v))
        function = functools.partial(METHODS["coreset"].function, algorithm=algorithm, coreset_size=12)
        k_padded, v_padded = tensors
        return jax.vmap(lambda key: function(q, k_padded, v_padded, key, kv_mask=mask))(keys)

    errors = [np.mean([relative_error(out, exact) for out in outs(length)]) for length in (48, 160)]
    assert 0.8 < errors[1] / errors[0] < 1.25


def test_columns_of_a_matrix_belong_to_places():
    q, k, v = (np.asarray(x) for x in random_head(11, 9, 9))
    e = random_head(12, 4, 1, 16)[0]
    scattered = mask_of("scattered", 9, 16)
    for mask, own in ((mask_of("right", 9, 16), e), (scattered, as_array(np.asarray(e)[:, scattered]))):
        out = call("linformer", *(padded(x, mask) for x in (q, k, v)), projection_k=e, kv_mask=as_array(mask, bool))
        np.testing.assert_allclose(np.asarray(out)[mask], call("linformer", q, k, v, projection_k=own), atol=1e-5)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_later_token_changes_nothing_before_it_in_padding_too(name):
    q, k, v = (np.asarray(x) for x in random_head(13, PADDED_LENGTH, PADDED_LENGTH, 8, 6))
    mask = mask_of("scattered", 36, PADDED_LENGTH)
    function = functools.partial(with_gradients, name, is_causal=True, kv_mask=mask)
    before, _ = function(q, k, v)
    # Only keys and values change; sample sizes and distances depend on the length, which stays the same.
    for j in np.flatnonzero(mask)[[3, 8, 12, 30]]:
        at = (np.arange(PADDED_LENGTH) == j)[:, None]
        after, _ = function(q, np.where(at, k + 3, k), np.where(at, np.float32(1e4), v))
        np.testing.assert_array_equal(after[:j], before[:j])
        assert np.any(np.asarray(after[j:]) != np.asarray(before[j:]))


@pytest.mark.parametrize("lengths", [(7, 19), (19, 7)])
def test_causal_queries_stand_at_places_of_keys(lengths):
    q, k, v = random_head(14, *lengths)
    mask = np.arange(lengths[1]) % 3 != 0
    visible = (np.arange(lengths[1])[None] <= np.arange(lengths[0])[:, None]) & mask
    expected = brute_force(q, k, v, mask=visible)[0]
    own = np.concatenate([mask, np.ones(max(0, lengths[0] - lengths[1]), bool)])[: lengths[0]]
    for name in ("mean_pool", "favor", "local"):
        out = call(name, q, k, v, size=32, block_size=32, is_causal=True, kv_mask=as_array(mask, bool))
        np.testing.assert_allclose(np.asarray(out)[own], expected[own], atol=2e-6)


# Segments, ranks and noise by brute force


@functools.partial(jax.jit, static_argnames="number")
def segments_and_all_that_they_sum(mask, x, number):
    found = segments_of(len(mask), number, mask)
    return found.number, found.sums(x), found.maxima(x), averaging_matrix(len(mask), number, jnp.float32, mask)


def test_segments_are_those_of_the_real_tokens():
    random = np.random.default_rng(0)
    for length in (1, 5, 13, 64):
        for num_real in {0, 1, 4, length // 2, length}:
            mask = random.permutation(np.arange(length) < min(num_real, length))
            num_real = mask.sum()
            for number in {1, 2, 3, 7, length}:
                if number > length:
                    continue
                used = min(number, num_real)
                expected = np.full(length, number)
                expected[mask] = [j * used // num_real for j in range(num_real)]
                x = random.normal(size=(length, 2)).astype(np.float32)
                found, sums, maxima, matrix = map(np.asarray, segments_and_all_that_they_sum(mask, x, number))
                np.testing.assert_array_equal(found, expected)
                np.testing.assert_allclose(matrix[:used].sum(1), 1, rtol=1e-6)
                np.testing.assert_array_equal(matrix[:, ~mask], 0)
                parts = [x[expected == c] for c in range(number)]
                np.testing.assert_allclose(sums, [part.sum(0) for part in parts], atol=1e-5)
                greatest = [part.max(0, initial=-np.inf) for part in parts]
                np.testing.assert_array_equal(maxima, greatest)


def test_shares_beyond_the_largest_integer():
    share = jax.jit(floor_of_share)
    random = np.random.default_rng(1)
    for _ in range(100):
        over = int(random.integers(1, 2**24))
        times, number = int(random.integers(1, over + 1)), random.integers(0, over, 100)
        found = share(*(np.asarray(x, np.int32) for x in (number, times, over)))
        np.testing.assert_array_equal(found, [number * times // over, number * times % over])


def test_real_tokens_first_and_back():
    mask = mask_of("scattered", 6, 11)

    @jax.jit
    def outputs(mask, x):
        order = RealFirst.of(mask)
        return order.front(x), order.back(order.front(x)), ranks(mask, 11)

    front, back, rank = map(np.asarray, outputs(mask, np.arange(11)))
    np.testing.assert_array_equal(front, np.concatenate([np.flatnonzero(mask), np.flatnonzero(~mask)]))
    np.testing.assert_array_equal(back, np.arange(11))
    np.testing.assert_array_equal(rank[mask], np.arange(6))


@pytest.mark.parametrize("draw", [jax.random.normal, jax.random.uniform, jax.random.gumbel])
def test_noise_of_a_shorter_sequence_is_found_in_that_of_a_longer(draw):
    sizes, shorter = (1, 5, 12, 13), jax.jit(draw_of_size)
    drawn = jax.jit(lambda key: [draw(key, (3, size, 2)) for size in sizes])(jax.random.key(5))
    for size, expected in zip(sizes, drawn, strict=True):
        np.testing.assert_array_equal(np.asarray(shorter(drawn[-1], np.int32(size)))[:, :size], expected)


def test_chunk_means_are_those_of_real_tokens():
    q, k, _ = (np.asarray(x) for x in random_head(15, 19, 19))
    mask = mask_of("left", 19, 40)
    means = jax.jit(functools.partial(chunk_means, num_chunks=4, window_size=4))
    found = means(padded(q, mask), padded(k, mask), kv_mask=mask)
    expected = means(q, k)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(x)[: len(y)], y, atol=1e-6)


def test_a_mask_that_hides_nothing_changes_nothing():
    _, k, v = random_head(16, 1, 23)
    summarize = jax.jit(functools.partial(summarize_mean_pool, num_landmarks=5))
    plain, masked = (summarize(k, v, kv_mask=mask) for mask in (None, np.ones(23, bool)))
    for x, y in zip(jax.tree.leaves(plain), jax.tree.leaves(masked), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


@pytest.mark.parametrize("name", ["exact", "local", "mean_pool", "favor", "longformer", "eva"])
def test_queries_behind_the_last_key_keep_their_place(name):
    # The causal form may have more queries than keys; queries after the last real key see all keys.
    q, k, v = random_head(31, 24, 20)
    function = functools.partial(METHODS[name].function, **settings(name), is_causal=True)

    @jax.jit
    def outputs(q, k, v, kv_mask):
        key = jax.random.key(7)
        return function(q, k, v, key, kv_mask=kv_mask), function(q, k[:7], v[:7], key)

    padded, unpadded = outputs(q, k, v, np.arange(20) < 7)
    np.testing.assert_allclose(padded, unpadded, atol=1e-5)
