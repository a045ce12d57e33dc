"""What every registered method must do; a method is tested by being registered."""

import functools
import inspect
import itertools
import math

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from approx_attention import METHODS, Decoder, RunningSummary, api, attend, attention, fold_scale, merge
from approx_attention.registry import accepted, svd_flops
from approx_attention.tensor import total_degree
from tests.references import (
    brute_force,
    call,
    call_heads,
    causal_mask,
    compiled,
    having,
    kernelised_attention,
    random_head,
    random_heads,
    relative_error,
    settings,
    sized,
)

ALL = list(METHODS)
CAUSAL = having(causal=True)
both_directions = pytest.mark.parametrize(
    ("name", "is_causal"), [(name, c) for name in ALL for c in ([False, True] if name in CAUSAL else [False])]
)
every_method = pytest.mark.parametrize("name", ALL)
# What tests how `attention` lifts a method more than the method: one for each kind of summary, the others when slow.
LIFTED = ("exact", "mean_pool", "favor", "nystrom")


def unless_slow(name, *others):
    return pytest.param(name, *others, marks=() if name in LIFTED else pytest.mark.slow)


lifted = pytest.mark.parametrize("name", [unless_slow(name) for name in ALL])
# What the causal form of a method shows of it is not shown again without; the other direction when slow.
one_direction = pytest.mark.parametrize(
    ("name", "is_causal"),
    [(name, name in CAUSAL) for name in ALL] + [pytest.param(name, False, marks=pytest.mark.slow) for name in CAUSAL],
)
lifted_one_direction = pytest.mark.parametrize(
    ("name", "is_causal"),
    [unless_slow(name, name in CAUSAL) for name in ALL]
    + [pytest.param(name, False, marks=pytest.mark.slow) for name in CAUSAL],
)
lifted_both_directions = pytest.mark.parametrize(
    ("name", "is_causal"),
    [unless_slow(name, c) for name in ALL for c in ([False, True] if name in CAUSAL else [False])],
)


# 1. shapes and dtypes


@one_direction
@pytest.mark.parametrize(
    "dtype",
    [
        jnp.bfloat16,
        pytest.param(jnp.float32, marks=pytest.mark.slow),
        pytest.param(jnp.float16, marks=pytest.mark.slow),
    ],
)
def test_shape_and_dtype(name, is_causal, dtype):
    q, k, v = random_head(0, 13, 11, 8, 6, dtype)
    options = {"is_causal": True} if is_causal else {}
    out = call(name, q, k, v, **options)
    assert out.shape == (13, 6)
    assert out.dtype == dtype
    wide = call(name, *(x.astype(jnp.float32) for x in (q, k, v)), **options)
    np.testing.assert_allclose(np.asarray(out, np.float32), wide, atol=2e-2, rtol=2e-2)


@lifted
@pytest.mark.parametrize("batch", [(), (2,), (2, 1)])
def test_leading_batch_axes(name, batch):
    query, key, value = (x.reshape(*batch, *x.shape[1:]) for x in random_heads(0, math.prod(batch), 9, 7, 4, 2))
    out = call_heads(name, query, key, value)
    assert out.shape == query.shape
    flat = call_heads(name, *(x.reshape(-1, *x.shape[-3:]) for x in (query, key, value)))
    np.testing.assert_allclose(out.reshape(flat.shape), flat, atol=1e-6)


@every_method
def test_float64_in_float64_throughout(name, x64):
    q, k, v = random_head(1, 9, 9, dtype=jnp.float64, spread=0.5)
    out = call(name, q, k, v, size=9)
    assert out.dtype == jnp.float64
    # A method that rounds somewhere to float32 is wrong by 1e-8 after a change of the values by a factor of 3.
    np.testing.assert_allclose(call(name, q, k, 3 * v, size=9), 3 * out, rtol=1e-13, atol=1e-14)
    if METHODS[name].capabilities.exact_limit:
        np.testing.assert_allclose(out, brute_force(q, k, v)[0], atol=1e-13)


# 2. transformations and batches change nothing


@lifted_one_direction
def test_jit_equals_eager_and_vmap_equals_loop(name, is_causal):
    options = {"is_causal": True} if is_causal else {}
    stacked = [jnp.stack(x) for x in zip(*(random_head(i, 9, 9) for i in range(3)), strict=True)]
    function = functools.partial(METHODS[name].function, key=jax.random.key(7), **settings(name), **options)
    loop = jnp.stack([jax.jit(function)(*(x[i] for x in stacked)) for i in range(3)])
    np.testing.assert_allclose(function(*(x[0] for x in stacked)), loop[0], atol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.vmap(function))(*stacked), loop, atol=1e-6)


@lifted
def test_batch_size_does_not_matter(name):
    tensors = random_heads(2, 3, 9, 9, 4, 2)
    whole = call_heads(name, *tensors)
    for i in range(3):
        np.testing.assert_allclose(call_heads(name, *(x[i : i + 1] for x in tensors))[0], whole[i], atol=1e-6)


# 3. the declared exact limit, in value and gradient


@pytest.mark.parametrize(
    ("name", "is_causal"),
    [(name, c) for name in ["exact", *having(exact_limit=True)] for c in (False, True) if not c or name in CAUSAL],
)
def test_exact_limit(name, is_causal):
    q, k, v = random_head(3, 11, 11)
    visible = causal_mask(11, 11) if is_causal else None
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(11, 8)), jnp.float32)

    def loss(function):
        return lambda q, k, v: jnp.sum(weight * function(q, k, v))

    # A causal chunk is no smaller than it is asked to be, whatever their number.
    single = {"chunk_size": 1} if is_causal and name == "eva" else {}
    options = {"is_causal": True, **single} if is_causal else {}
    approximate = functools.partial(call, name, size=11, **options)
    exact = functools.partial(call, "exact", is_causal=is_causal, implementation="dense")
    np.testing.assert_allclose(approximate(q, k, v), brute_force(q, k, v, mask=visible)[0], atol=2e-6)
    gradients, expected = (jax.grad(loss(f), argnums=(0, 1, 2))(q, k, v) for f in (approximate, exact))
    chex.assert_trees_all_close(gradients, expected, atol=2e-6)


@pytest.mark.parametrize("name", [unless_slow(name) for name in having(normalizer=True)])
def test_state_agrees_with_output_and_normalizer_with_summary(name):
    q, k, v = random_head(3, 9, 12)
    state = call(name, q, k, v, return_state=True)
    np.testing.assert_allclose(state.out, call(name, q, k, v), atol=1e-6)
    method = METHODS[name]
    if method.summarize is not None:
        known = inspect.signature(method.summarize).parameters
        hyperparameters = {argument: x for argument, x in settings(name).items() if argument in known}
        scaled_q, scaled_k = fold_scale(q, k)
        summary = compiled(method.summarize)(scaled_k, v, jax.random.key(7), **hyperparameters)
        answer = compiled(attend)(scaled_q, summary)
        chex.assert_trees_all_close(answer, state, atol=1e-5)


# 4. more budget, less error; unbiased where claimed


@pytest.mark.parametrize("name", [unless_slow(name) for name in ALL if METHODS[name].size])
def test_error_falls_with_size(name):
    q, k, v = random_head(4, 64, 256, spread=0.7)
    # Neighbouring keys alike and queries near them, so that every kind of summary has something to find.
    k, v = (jnp.asarray(np.cumsum(np.asarray(x), axis=0) / 8) for x in (k, v))
    q = k[::4] + 0.1 * q
    exact = brute_force(q, k, v)[0]
    if name == "skyformer":
        exact = kernelised_attention(q, k, v)
    if name == "rfa":  # attention between unit vectors
        x, y = (z / jnp.linalg.norm(z, axis=1, keepdims=True) for z in (q, k))
        exact = brute_force(x, y, v, scale=1.0)[0]
    keys = jax.random.split(jax.random.key(0), 8)

    def mean_error(size):
        outs = jax.vmap(lambda key: call(name, q, k, v, size=size, key=key))(keys)
        return np.mean([relative_error(out, exact) for out in outs])

    small, large = mean_error(8), mean_error(192)
    assert large < 0.7 * small


@pytest.mark.parametrize("name", having(unbiased=True, needs_key=True))
def test_numerator_and_normalizer_are_unbiased(name):
    q, k, v = random_head(5, 4, 24, spread=0.5)
    scaled_q, scaled_k = fold_scale(q, k)
    method, num_draws = METHODS[name], 4000

    @jax.jit
    @jax.vmap
    def draw(key):
        if method.summarize is None:
            state = method.function(q, k, v, key, **{method.size: 20}, return_state=True)
        else:
            state = attend(scaled_q, method.summarize(scaled_k, v, key, **{method.size: 20}))
        mass = jnp.exp(state.lse)
        return mass, mass[:, None] * state.out

    exact_out, exact_lse = brute_force(q, k, v)
    expected = np.exp(exact_lse), np.exp(exact_lse)[:, None] * exact_out
    for estimates, truth in zip(draw(jax.random.split(jax.random.key(1), num_draws)), expected, strict=True):
        standard_error = np.std(estimates, axis=0) / math.sqrt(num_draws)
        assert np.all(np.abs(np.mean(estimates, axis=0) - truth) < 4.5 * standard_error + 1e-5)
        # The test can fail: a bias of a tenth would be seen.
        assert np.all(standard_error < 0.02 * np.abs(truth).max())


# 5. causality


@pytest.mark.parametrize("name", CAUSAL)
def test_a_later_token_changes_nothing_before_it(name):
    q, k, v = random_head(6, 19, 19)
    function = jax.jit(functools.partial(call, name, is_causal=True))
    before = function(q, k, v)
    for j in (0, 3, 4, 11, 18):
        after = function(q, k.at[j].add(3.0), v.at[j].set(1e4))
        np.testing.assert_array_equal(after[:j], before[:j])
        assert np.any(np.asarray(after[j:]) != np.asarray(before[j:]))
        np.testing.assert_array_equal(function(q.at[j].add(1.0), k, v)[:j], before[:j])


@pytest.mark.parametrize("name", [unless_slow(name) for name in CAUSAL])
def test_jacobian_is_zero_above_the_diagonal(name):
    q, k, v = random_head(7, 14, 14, 3)
    if name == "cosformer":  # rectified, a token may have no channel left to see itself by
        q, k = jnp.abs(q), jnp.abs(k)
    size = 14 if name in ("top_k", "lsh_top_k") else 8  # a token need not be among those that it chooses
    function = functools.partial(call, name, size=size, is_causal=True)
    jacobian = jax.jit(jax.jacrev(function, argnums=(1, 2)))(q, k, v)
    for block in jacobian:
        influence = np.abs(block).max(axis=(1, 3))
        np.testing.assert_array_equal(influence[~causal_mask(14, 14)], 0)
    assert np.all(np.abs(jacobian[1]).max(axis=(1, 3))[np.arange(14), np.arange(14)] > 0)


# 6. a prefix, a prefill and single steps


@pytest.mark.parametrize("name", [unless_slow(name) for name in CAUSAL])
def test_a_prefix_answers_like_the_whole(name):
    q, k, v = random_head(8, 21, 21)
    # Segments that are pooled into slots are laid out for the length, and distances are shares of it, unless it is set.
    lengthy = {"linformer": {"projection_k": random_head(28, 6, 21, 21)[0]}, "cosformer": {"max_length": 21}}
    # So is the number of buckets.
    lengthy["lsh_top_k"] = {"num_hashes": 1}
    options = lengthy.get(name, {})
    whole = call(name, q, k, v, is_causal=True, **options)
    for length in (1, 4, 5, 12):
        prefix = call(name, q[:length], k[:length], v[:length], is_causal=True, **options)
        np.testing.assert_allclose(prefix, whole[:length], atol=2e-6)


@pytest.mark.parametrize("name", [unless_slow(name) for name in having(decode=True)])
def test_decoding_equals_the_causal_form(name):
    q, k, v = random_head(9, 21, 21)
    method = METHODS[name]
    hyperparameters = sized(name, 8) if method.size else accepted(method.running, {"max_length": 24})
    running = method.running(8, jax.random.key(7), **hyperparameters)
    assert isinstance(running, RunningSummary)
    decoder = Decoder(running=running, head_dim=8, value_dim=8, block_size=4)
    whole = call(name, q, k, v, is_causal=True)
    step, answer, prefill = jax.jit(decoder.append), jax.jit(decoder.attend), jax.jit(decoder.prefill)

    cache, outs = decoder.init(), []
    for t in range(21):
        cache = step(cache, k[t : t + 1], v[t : t + 1])
        outs.append(answer(cache, q[t : t + 1]))
    np.testing.assert_allclose(jnp.concatenate(outs), whole, atol=2e-6)
    for cuts in ((0, 21), (0, 1, 4, 5, 21), (0, 8, 20, 21)):
        cache, outs = decoder.init(), []
        for start, stop in itertools.pairwise(cuts):
            out, cache = prefill(cache, q[start:stop], k[start:stop], v[start:stop])
            outs.append(out)
        np.testing.assert_allclose(jnp.concatenate(outs), whole, atol=2e-6)


# 7. padding


@one_direction
@pytest.mark.parametrize(
    "garbage", [np.nan, *(pytest.param(x, marks=pytest.mark.slow) for x in (np.inf, -np.inf, 1e30))]
)
def test_padding_never_reaches_outputs_or_gradients(name, is_causal, garbage):
    q, k, v = random_head(10, 9, 9)
    kv_mask = jnp.arange(9) % 3 != 1
    options = {"is_causal": True} if is_causal else {}

    @jax.jit
    def out_and_gradients(k, v):
        function = functools.partial(call, name, kv_mask=kv_mask, **options)
        out, vjp = jax.vjp(function, q, k, v)
        return out, vjp(jnp.ones_like(out))

    clean = out_and_gradients(k, v)
    hidden = ~np.asarray(kv_mask)
    soiled = out_and_gradients(k.at[hidden].set(garbage), v.at[hidden].set(garbage))
    chex.assert_tree_all_finite(clean)
    chex.assert_trees_all_equal(clean, soiled)
    for gradient in clean[1][1:]:
        np.testing.assert_array_equal(gradient[hidden], 0)


@pytest.mark.parametrize("name", ["exact", *having(exact_limit=True)])
def test_padding_equals_removal_in_the_exact_limit(name):
    q, k, v = random_head(11, 9, 9)
    kv_mask = jnp.arange(9) < 6
    out = call(name, q, k, v, size=9, kv_mask=kv_mask)
    np.testing.assert_allclose(out, brute_force(q, k[:6], v[:6])[0], atol=2e-6)


# 8. grouped heads and every shape


@lifted
def test_query_heads_share_the_key_head_and_draw_of_their_group(name):
    query, key, value = random_heads(12, 2, 9, 7, 6, 2)
    rng = jax.random.key(3)
    out = call_heads(name, query, key, value, rng=rng)
    function = compiled(METHODS[name].function)
    for n in range(6):
        own = jax.random.fold_in(rng, n // 3)
        expected = function(query[1, :, n], key[1, :, n // 3], value[1, :, n // 3], own, **settings(name))
        np.testing.assert_allclose(out[1, :, n], expected, rtol=1e-5, atol=2e-6)


@lifted_one_direction
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 3), st.integers(1, 3)),
    size=st.integers(1, 9),
)
@hypothesis_settings(max_examples=3, deadline=None, derandomize=True)
def test_any_lengths(name, is_causal, shape, size):
    num_queries, num_keys, head_dim, value_dim = shape
    q, k, v = random_head(13, num_queries, num_keys, head_dim, value_dim)
    options = {"is_causal": True} if is_causal else {}
    out = call(name, q, k, v, size=size, block_size=3, **options)
    assert out.shape == (num_queries, value_dim)
    if not METHODS[name].capabilities.convex:
        return
    # Averages of values with weights that sum to 1 stay within the values' range; a row that sees nothing is 0.
    low, high = np.minimum(0, np.min(v, axis=0)), np.maximum(0, np.max(v, axis=0))
    assert np.all((np.asarray(out) >= low - 1e-5) & (np.asarray(out) <= high + 1e-5))


@every_method
def test_cross_attention_is_declared(name):
    q, k, v = random_head(13, 3, 9)
    if METHODS[name].capabilities.cross:
        assert call(name, q, k, v).shape == (3, 8)
    else:
        with pytest.raises(ValueError, match=name):
            METHODS[name].function(q, k, v, jax.random.key(0))


@pytest.mark.parametrize("name", having(affine=True))
def test_constant_values_come_back(name):
    q, k, v = random_head(14, 9, 12)
    out = call(name, q, k, jnp.full_like(v, 2.5))
    np.testing.assert_allclose(out, 2.5, rtol=2e-6)


# 9. nothing to see, and extreme logits


@lifted_one_direction
def test_a_row_without_keys_is_zero_with_zero_gradient(name, is_causal):
    q, k, v = random_head(15, 9, 9)
    options = {"is_causal": True} if is_causal else {}
    nothing = jnp.zeros(9, bool)
    out, vjp = jax.vjp(functools.partial(call, name, kv_mask=nothing, **options), q, k, v)
    np.testing.assert_array_equal(out, 0)
    for gradient in vjp(jnp.ones_like(out)):
        np.testing.assert_array_equal(gradient, 0)
    if is_causal:
        first_hidden = call(name, q, k, v, kv_mask=jnp.arange(9) >= 3, is_causal=True)
        np.testing.assert_array_equal(first_hidden[:3], 0)
        assert np.all(np.abs(first_hidden[3:]).max(-1) > 0)


@one_direction
@pytest.mark.parametrize("sign", [1, pytest.param(-1, marks=pytest.mark.slow)])
def test_logits_of_ten_thousand(name, is_causal, sign):
    q, k, v = random_head(16, 9, 9)
    q, k = 200 * q, sign * 200 * k
    assert np.abs(np.asarray(q) @ np.asarray(k).T / np.sqrt(8)).max() > 1e4
    options = {"is_causal": True} if is_causal else {}
    out, vjp = jax.vjp(functools.partial(call, name, **options), q, k, 1e4 * v)
    chex.assert_tree_all_finite((out, vjp(jnp.ones_like(out))))


@one_direction
@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_number_that_is_not_one_comes_out(name, is_causal, masked):
    # NaN in what is visible must not pass for a row that sees nothing.
    q, k, v = random_head(16, 19, 19)
    options = {"is_causal": True} if is_causal else {}
    options |= {"kv_mask": jnp.arange(19) != 3} if masked else {}
    assert np.any(np.isnan(call(name, q, k, v.at[0].set(jnp.nan), size=19, **options)))
    if name != "mean_value":
        assert np.any(np.isnan(call(name, q, k.at[0].set(jnp.nan), v, size=19, **options)))
        assert np.any(np.isnan(call(name, q.at[0].set(jnp.nan), k, v, size=19, **options)))


# 10. and 11. nothing is dropped silently


@every_method
def test_signature_and_capabilities_agree(name):
    method = METHODS[name]
    arguments = inspect.signature(method.function).parameters
    capabilities = method.capabilities
    assert list(arguments)[:4] == ["q", "k", "v", "key"]
    assert all(p.kind is p.KEYWORD_ONLY for p in list(arguments.values())[4:])
    for argument, able in {
        "is_causal": capabilities.causal,
        "kv_mask": capabilities.padding,
        "mask": capabilities.dense_mask,
        "bias": capabilities.dense_mask,
    }.items():
        assert (argument in arguments) == able, argument
    assert (method.running is not None) == capabilities.decode
    # A method works out of the box; what is learned stands in for something.
    assert all(p.default is not p.empty for p in list(arguments.values())[4:])
    assert method.size is None or method.size in arguments
    for function in (method.summarize, method.running, method.draw):
        assert function is None or method.size is None or method.size in inspect.signature(function).parameters


@pytest.mark.parametrize("name", having(trainable=True))
def test_learned_arrays_have_gradients(name):
    q, k, v = random_head(29, 12, 12)
    projection = random_head(30, 3, 1, 4 if name == "block_linformer" else 12)[0]
    gradient = jax.grad(lambda x: jnp.sum(call(name, q, k, v, projection_k=x) ** 2))(projection)
    assert (jnp.abs(gradient) > 1e-6).all()


OPTIONS = {
    "is_causal": ("causal", {"is_causal": True}),
    "key_value_seq_lengths": ("padding", {"key_value_seq_lengths": jnp.array([5, 9])}),
    "padding mask": ("padding", {"mask": jnp.arange(9).reshape(1, 1, 1, 9) < 6}),
    "mask": ("dense_mask", {"mask": jnp.asarray(causal_mask(9, 9))[None, None]}),
    "bias": ("dense_mask", {"bias": jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 9, 9)), jnp.float32)}),
    "return_residual": ("normalizer", {"return_residual": True}),
    "scale": (None, {"scale": 0.9}),
    "query_seq_lengths": (None, {"query_seq_lengths": jnp.array([4, 9])}),
}


@lifted
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_has_an_effect_or_raises(name, option):
    capability, arguments = OPTIONS[option]
    tensors = random_heads(17, 2, 9, 9, 4, 2)
    if capability is not None and not getattr(METHODS[name].capabilities, capability):
        with pytest.raises(NotImplementedError, match=name):
            call_heads(name, *tensors, **arguments)
        return
    if (name, option) == ("mean_value", "scale"):
        pytest.skip("all its logits are 0, at any scale")
    if (name, option) == ("cosformer", "scale"):
        pytest.skip("its kernel is homogeneous: a scale is a factor of all weights")
    plain, changed = call_heads(name, *tensors), call_heads(name, *tensors, **arguments)
    if option == "return_residual":
        assert changed[1].shape == tensors[0].shape[:-1]
        return
    assert np.any(np.abs(np.asarray(plain) - np.asarray(changed)) > 1e-4)


# By argument another value, and what else must be said for it to matter; by method where it is not the same for all.
CHANGES = {
    "num_features": (6, {}),
    "num_landmarks": (5, {}),
    "num_chunks": (20, {}),
    "num_samples": (5, {}),
    "sample_size": (5, {}),
    "coreset_size": (5, {}),
    "num_hashes": (1, {}),
    "algorithm": ("halving", {}),
    "query_radius": (9.0, {}),
    "streaming": ("counter", {"is_causal": True, "algorithm": "kmeans_merge"}),
    "sinks": (0, {"is_causal": True}),
    "window_size": (5, {}),
    "block_size": (5, {}),
    ("coreset", "block_size"): (5, {"is_causal": True}),
    "max_length": (60, {}),
    "num_global": (6, {}),
    "num_random_blocks": (5, {}),
    "num_window_blocks": (1, {"num_random_blocks": 1}),
    "num_global_blocks": (0, {"num_random_blocks": 1}),
    ("bigbird", "block_size"): (5, {"num_random_blocks": 1}),
    "blocks": (jnp.zeros((10, 1), jnp.int32), {"num_random_blocks": 1}),
    "keys_per_query": (5, {}),
    ("sparse_coreset", "algorithm"): ("uniform", {}),
    "num_rounds": (1, {}),
    ("lsh_top_k", "projection"): (jnp.ones((1, 2, 8)), {}),
    "projection": (jnp.ones((3, 8)), {}),
    "features": ("hyperbolic", {}),
    ("rfa", "features"): ("positive", {}),
    ("polynomial", "features"): (total_degree(8, 1), {"degree": None}),
    "degree": (4, {}),
    "coefficients": ((1.0, 1.0, 0.9), {}),
    "bound": (4.0, {"coefficients": "minimax", "bound": 2.0}),
    "rms": (2.0, {"coefficients": "hermite", "rms": 1.0}),
    "row_norm": ("sqrt_dim", {}),
    "bandwidth": (0.5, {}),
    "gate_logits": (jnp.zeros(40), {}),
    "noise": (jnp.arange(40.0), {}),
    ("ra", "noise"): (jnp.ones((40, 8, 8)), {}),
    ("lara", "noise"): (jnp.ones((2, 8, 8)), {}),
    ("eva", "noise"): (jnp.ones((2, 10, 8)), {"num_chunks": 10}),
    "noise_scale": ("official", {}),
    "indices": (jnp.zeros((40, 8), jnp.int32), {}),
    "weights": ("query_specific", {}),
    "correction": (0.0, {"weights": "query_specific"}),
    "antithetic": (True, {}),
    "proposal_mean": (jnp.zeros((8, 8)), {}),
    ("eva", "proposal_mean"): ("k", {}),
    "query_landmarks": (jnp.zeros((8, 8)), {"weights": "query_specific"}),
    "spatial_shape": ((8, 5), {"num_landmarks": 4}),
    ("eva", "spatial_shape"): ((10, 4), {"window_size": 2, "num_chunks": None}),
    "chunk_size": (1, {"num_chunks": None}),
    "exclude_local": (False, {}),
    "count_correction": (False, {}),
    "overlap": (4, {"num_chunks": 10}),
    "pooling_vectors": ((jnp.ones(8), jnp.zeros(8)), {}),
    "chunk_keys": (jnp.zeros((10, 8)), {"num_chunks": 10}),
    "local_bias": (jnp.eye(4), {}),
    "num_slots": (5, {}),
    "projection_k": (jnp.ones((3, 40)), {}),
    "projection_v": (jnp.ones((8, 40)), {}),
    "renormalize": (True, {"projection_k": jnp.ones((3, 40))}),
    "slots_per_block": (1, {}),
    ("block_linformer", "projection_k"): (jnp.ones((3, 4)), {}),
    ("block_linformer", "projection_v"): (2 * jnp.ones((3, 4)), {"projection_k": jnp.ones((3, 4))}),
    "sketch_size": (5, {}),
    "sketch": ("gaussian", {}),
    "centred": (False, {}),
    "odds": ("uniform", {}),
    "inverse": ("ridge", {}),
    "num_iterations": (3, {}),
    "ridge": (0.5, {}),
    ("nystrom", "ridge"): (0.5, {"inverse": "ridge"}),
    "rcond": (0.5, {"inverse": "svd"}),
    "rank": (5, {}),
    ("skyformer", "noise"): (jnp.arange(80.0), {}),
}
# Only how the work is split.
WITHOUT_EFFECT = {("linformer", "block_size"), ("cosformer", "block_size")}


@lifted
def test_every_hyperparameter_has_an_effect(name):
    function = compiled(METHODS[name].function)
    q, k, v = random_head(18, 40, 40)
    for argument in list(inspect.signature(METHODS[name].function).parameters)[4:]:
        # Options of `attention`, tested above; the form of the answer, not its value.
        if argument in ("is_causal", "kv_mask", "q_mask", "mask", "bias", "scale", "implementation", "return_state"):
            continue
        if (name, argument) in WITHOUT_EFFECT:
            continue
        change, context = CHANGES.get((name, argument), CHANGES.get(argument))
        base = (
            {**settings(name), "is_causal": True}
            if name in CAUSAL and name not in ("eva", "coreset")
            else settings(name)
        )
        plain = function(q, k, v, jax.random.key(7), **{**base, **context})
        changed = function(q, k, v, jax.random.key(7), **{**base, **context, argument: change})
        assert np.any(np.abs(np.asarray(plain) - np.asarray(changed)) > 1e-4), argument


@every_method
def test_an_unknown_argument_is_refused(name):
    with pytest.raises(TypeError, match=rf"'{name}' has no argument 'num_feetures'"):
        call_heads(name, *random_heads(0, 1, 4, 4, 1, 1), num_feetures=3)


# 12. strict promotion is on in every test (conftest). 13. compilation


@lifted_both_directions
def test_one_compilation_per_shape(name, is_causal):
    def call_eagerly(seed, length):
        tensors = random_heads(seed, 1, length, length, 2, 1)
        attention(*tensors, method=name, rng=jax.random.key(seed), is_causal=is_causal, **settings(name))

    for length in (9, 10):
        call_eagerly(0, length)
    compiled = api._lifted._cache_size()
    for seed in (1, 2):
        for length in (9, 10):
            call_eagerly(seed, length)
    assert api._lifted._cache_size() == compiled >= 2


# 14. no array with both a T and an S axis, and the declared cost


def equations(jaxpr, times=1):
    """All equations of a jaxpr and its inner ones, with how often each runs."""
    for equation in jaxpr.eqns:
        yield equation, times
        inner = times * equation.params["length"] if equation.primitive.name == "scan" else times
        for value in equation.params.values():
            for leaf in jax.tree.leaves(value, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                if hasattr(leaf, "jaxpr"):
                    leaf = leaf.jaxpr
                if hasattr(leaf, "eqns"):
                    yield from equations(leaf, inner)


def traced(name, length, size, **options):
    x = jax.ShapeDtypeStruct((length, 16), jnp.float32)
    hyperparameters = {METHODS[name].size: size} if METHODS[name].size else {}
    function = functools.partial(METHODS[name].function, **hyperparameters, **options)
    return jax.make_jaxpr(function)(x, x, x, jax.random.key(0)).jaxpr


@pytest.mark.parametrize(
    ("name", "is_causal"),
    [(name, name in CAUSAL) for name in having(subquadratic=True)]
    + [pytest.param(name, False, marks=pytest.mark.slow) for name in having(subquadratic=True) if name in CAUSAL],
)
def test_no_array_is_quadratic(name, is_causal):
    # An array whose size grows faster than the sequence holds both a query and a key axis, or shares of them.
    short, long = (largest_array(name, is_causal, length) for length in (2**14, 2**15))
    assert long <= 2.2 * short
    assert long <= 2**23


def largest_array(name, is_causal, num_queries):
    num_keys = num_queries * 3 // 4
    options = {"is_causal": True} if is_causal and name in CAUSAL else {}
    method = METHODS[name]
    hyperparameters = {method.size: 64} if method.size else {}

    def gradient(q, k, v):
        call = functools.partial(method.function, key=jax.random.key(0), **hyperparameters, **options)
        return jax.vjp(call, q, k, v)[1](jnp.ones((num_queries, 16)))

    q, k = (jax.ShapeDtypeStruct((length, 16), jnp.float32) for length in (num_queries, num_keys))
    return max(
        math.prod(x.aval.shape)
        for equation, _ in equations(jax.make_jaxpr(gradient)(q, k, k).jaxpr)
        for x in (*equation.invars, *equation.outvars)
        if hasattr(x.aval, "shape")
    )


@lifted
def test_declared_cost_is_that_of_the_products(name):
    length, size = 4096, 256
    flops = 0
    for equation, times in equations(traced(name, length, size)):
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            flops += 2 * times * depth * math.prod(equation.outvars[0].aval.shape)
        elif equation.primitive.name == "svd":
            flops += times * svd_flops(*equation.invars[0].aval.shape)
    declared = METHODS[name].cost(length, length, 16, 16, size)
    assert declared <= flops + 4 * length * 16
    assert flops <= 2.2 * declared + 4 * length * 16


# 15. randomness


def _is_random(name):
    return METHODS[name].capabilities.needs_key or METHODS[name].capabilities.takes_key


@pytest.mark.parametrize(
    ("name", "is_causal"),
    [(name, c) for name in ALL for c in (False, True) if _is_random(name) and (not c or name in CAUSAL)],
)
def test_the_key_decides_the_draw(name, is_causal):
    q, k, v = random_head(19, 24, 24)
    block = {"block_size": 8} if name == "sparse_coreset" else {}  # two of four tokens leave k-means no choice
    function = functools.partial(call, name, q, k, v, **block, **({"is_causal": True} if is_causal else {}))
    np.testing.assert_array_equal(function(key=jax.random.key(1)), function(key=jax.random.key(1)))
    assert np.any(np.asarray(function(key=jax.random.key(1))) != np.asarray(function(key=jax.random.key(2))))


@every_method
def test_needs_key_is_true(name):
    q, k, v = random_head(20, 9, 9)
    tensors = random_heads(20, 1, 9, 9, 1, 1)
    if METHODS[name].capabilities.needs_key:
        with pytest.raises(ValueError, match=rf"{name} is random"):
            METHODS[name].function(q, k, v, **settings(name))
        with pytest.raises(ValueError, match=rf"'{name}' is random: pass rng"):
            attention(*tensors, method=name, **settings(name))
        with pytest.raises(TypeError, match="typed PRNG key"):
            METHODS[name].function(q, k, v, jnp.zeros(2, jnp.uint32), **settings(name))
    else:
        function = compiled(METHODS[name].function)
        without, with_key = (function(q, k, v, key, **settings(name)) for key in (None, jax.random.key(7)))
        assert np.allclose(without, with_key, rtol=0, atol=1e-5) != METHODS[name].capabilities.takes_key
        attention(*tensors, method=name, **settings(name))


# 16. many devices. 17. export


@lifted
@pytest.mark.parametrize("spec", [("data", None), (None, "data")], ids=["batch", "sequence"])
def test_sharded_equals_unsharded(name, spec):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    tensors = random_heads(21, 4, 16, 16, 2, 1)
    function = jax.jit(functools.partial(call_heads, name))
    sharded = jax.device_put(tensors, NamedSharding(mesh, PartitionSpec(*spec)))
    np.testing.assert_allclose(function(*sharded), function(*tensors), rtol=1e-5, atol=2e-6)


@lifted_both_directions
def test_export_round_trip(name, is_causal):
    options = {"is_causal": True} if is_causal else {}
    tensors = random_heads(22, 1, 9, 9, 2, 1)
    function = jax.jit(functools.partial(call_heads, name, **options))
    exported = jax.export.export(function)(*tensors)
    again = jax.export.deserialize(exported.serialize())
    np.testing.assert_allclose(again.call(*tensors), function(*tensors), atol=2e-6)


# derivatives


@lifted_one_direction
def test_gradient_against_finite_differences(name, is_causal, x64):
    # Long enough for the causal form to answer from its summary too.
    q, k, v = random_head(23, 15, 15, 3, dtype=jnp.float64)
    options = {"is_causal": True} if is_causal else {}
    if name == "importance_sample":  # the odds are constants to derivatives
        options["odds"] = "uniform"
    function = functools.partial(call, name, size=5, kv_mask=jnp.arange(15) != 2, **options)
    if name != "local":
        unseen = {"mean_value": "k", "uniform_sample": "v", "hyper_attention": "kv", "importance_sample": "kv"}
        unseen = (unseen | {"top_k": "kv", "lsh_top_k": "kv"}).get(name, "")
        out, pull = jax.vjp(function, q, k, v)
        _, of_k, of_v = pull(jnp.zeros_like(out).at[-1].set(1))
        assert jnp.abs(of_k[0]).max() > 0 or "k" in unseen
        assert jnp.abs(of_v[1]).max() > 0 or "v" in unseen
    check_grads(function, (q, k, v), order=1, modes=["rev"], eps=1e-6, atol=1e-6, rtol=1e-6)


# summaries


@pytest.mark.parametrize("name", [name for name in ALL if METHODS[name].summarize])
def test_summaries_of_parts_merge(name):
    method = METHODS[name]
    q, k, v = random_head(24, 6, 20)
    hyperparameters = {method.size: 20} if method.size else {}
    summarize = functools.partial(method.summarize, key=jax.random.key(7), **hyperparameters)

    @jax.jit
    def answers(q, k, v):
        parts = [summarize(k[part], v[part]) for part in (slice(0, 8), slice(8, 20))]
        return parts, merge(*(attend(q, part) for part in parts)), attend(q, summarize(k, v))

    parts, merged, whole = answers(q, k, v)
    # Not compiled: only then are draws compared by their values.
    together = compiled(attend)(q, merge(*parts))
    chex.assert_trees_all_close(together, merged, atol=2e-5)
    if method.capabilities.exact_limit or method.draw or name == "exact":
        chex.assert_trees_all_close(together, whole, atol=2e-5)


@pytest.mark.parametrize("name", [name for name in ALL if METHODS[name].summarize])
def test_padding_never_enters_a_summary(name):
    method = METHODS[name]
    q, k, v = random_head(25, 6, 20)
    kv_mask = jnp.arange(20) % 4 != 1
    hyperparameters = {method.size: 6} if method.size else {}

    @jax.jit
    def answer(k, v):
        return attend(q, method.summarize(k, v, jax.random.key(7), **hyperparameters, kv_mask=kv_mask))

    soiled = (x.at[~np.asarray(kv_mask)].set(jnp.nan) for x in (k, v))
    chex.assert_trees_all_equal(answer(*soiled), answer(k, v))


# what a method does not claim, it does not do


@pytest.mark.parametrize("name", sorted(set(having(exact_limit=False)) - {"exact"}))
def test_no_exact_limit_is_kept_silent(name):
    q, k, v = random_head(26, 9, 9)
    assert np.abs(np.asarray(call(name, q, k, v, size=9)) - brute_force(q, k, v)[0]).max() > 1e-3


@pytest.mark.parametrize("name", having(affine=False))
def test_weights_that_do_not_sum_to_1_are_kept_silent(name):
    q, k, v = random_head(26, 9, 12)
    assert np.abs(np.asarray(call(name, q, k, jnp.ones_like(v), size=5)) - 1).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", having(unbiased=False, normalizer=True))
def test_no_unbiased_sums_are_kept_silent(name):
    q, k, v = random_head(27, 9, 30)
    method = METHODS[name]
    hyperparameters = settings(name, size=5)
    states = [
        method.function(q, k, v, jax.random.key(seed), return_state=True, **hyperparameters)
        for seed in range(20 if method.capabilities.needs_key else 1)
    ]
    normalizer = np.mean([np.exp(np.asarray(state.lse, np.float64)) for state in states], axis=0)
    assert np.abs(normalizer / np.exp(brute_force(q, k, v)[1]) - 1).max() > 0.05


@lifted
def test_the_declared_cost_is_quadratic_where_the_method_is(name):
    method = METHODS[name]
    short, long = (method.cost(n, n, 64, 64, 256) for n in (2**14, 2**15))
    assert (long > 3 * short) == (not method.capabilities.subquadratic)
