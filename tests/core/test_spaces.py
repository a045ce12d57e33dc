"""Summaries are read in the space of the keys that they were made from."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import (
    Decoder,
    FeatureMoments,
    RunningSummary,
    WeightedKV,
    attend,
    bounds,
    compress_cache,
    compress_tokens,
    exact,
    fold_scale,
    merge,
    sparse_plus_summary,
    summarize_coreset,
)
from approx_attention.core import PositiveFeatures, causal_state, hadamard, summary_bytes
from approx_attention.coresets import ALGORITHMS, compress
from approx_attention.decoding import attention_received
from approx_attention.evaluation import sup_error
from approx_attention.methods import running_exact
from approx_attention.sparse import BlockMap
from tests.references import as_array, brute_force, compiled, random_head

attend, exact, fold_scale = compiled(attend, exact, fold_scale)
compress, compress_tokens = compiled(compress, compress_tokens)
attention_received, moments_of = compiled(attention_received, FeatureMoments.of_tokens)

KEY = jax.random.key(0)
Q, K, V = random_head(0, 12, 20, 8, 3)
FEW = as_array(np.asarray(Q)[:2])
FEATURES = PositiveFeatures(as_array(np.asarray(K)[:6]))
SCALES = {"default": None, "number": 0.3, "array": as_array(0.3), "one": 1.0}
# The keys in two parts: a slice of an array would be a program.
WHOLE, FIRST, LAST = ([as_array(np.asarray(x)[part]) for x in (K, V)] for part in (slice(20), slice(9), slice(9, 20)))


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("jit", [False, True])
def test_a_cache_with_room_for_all_answers_queries_as_they_are(scale, jit):
    def answers(q, k, v):
        return attend(q, compress_tokens(k, v, KEY, budget=20, scale=scale)).out

    expected = brute_force(Q, K, V, scale=scale)[0]
    out, few = ((jax.jit(answers) if jit else answers)(q, K, V) for q in (Q, FEW))
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_allclose(few, expected[:2], atol=1e-5)


@pytest.mark.parametrize("policy", ["kmeans_nystrom", "stratified", "knorm", "h2o"])
def test_a_compressed_cache_is_asked_in_either_space(policy):
    compressed = functools.partial(compress_tokens, budget=12, policy=policy, sinks=2, recent=3)
    small = compressed(K, V, KEY, queries=Q, scale=as_array(0.3))
    as_they_are = attend(Q, small)
    folded = attend(fold_scale(Q, K, 0.3)[0], small.in_scaled_space())
    np.testing.assert_allclose(as_they_are.out, folded.out, atol=1e-6)
    np.testing.assert_allclose(as_they_are.lse, folded.lse, atol=1e-5)
    # The scale changes which tokens are kept, just as with keys in scaled space.
    queries, keys = fold_scale(Q, K, 0.3)
    there = compressed(keys, V, KEY, queries=queries, scale=as_array(1.0))
    np.testing.assert_allclose(there.k, small.k, atol=1e-5)


def test_heads_of_scales_of_their_own():
    scales = np.float32([0.1, 0.5, 2.0])
    heads = [np.stack([x, 0.5 * x, -x]) for x in map(np.asarray, (Q, K, V))]

    @jax.jit
    def answers(q, k, v, scales):
        small = jax.vmap(lambda k, v, s: compress_tokens(k, v, budget=20, scale=s))(k, v, scales)
        shared = jax.vmap(lambda k, v: compress_tokens(k, v, budget=20))(k, v)
        assert small.scale.shape == (3,)
        return jax.vmap(attend)(q, small).out, jax.vmap(attend)(q, shared).out

    own, shared = answers(*heads, scales)
    for i, scale in enumerate(scales):
        head = [x[i] for x in heads]
        np.testing.assert_allclose(own[i], brute_force(*head, scale=scale)[0], atol=1e-5)
        np.testing.assert_allclose(shared[i], brute_force(*head)[0], atol=1e-5)


def test_derivatives_of_a_scale():
    def ours(q, k, v, scale):
        return jnp.sum(attend(q, compress_tokens(k, v, budget=20, scale=scale)).out ** 2)

    def theirs(q, k, v, scale):
        return jnp.sum(exact(q, k, v, scale=scale) ** 2)

    for one, other in zip(
        *(jax.jit(jax.grad(f, argnums=(0, 1, 2, 3)))(Q, K, V, jnp.float32(0.3)) for f in (ours, theirs)), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-4)


def carrying(scale, part=WHOLE):
    return compress_tokens(*part, budget=20, scale=scale)


def answer_of(join, *summaries):
    """The output of summaries that are constants of one program, so that their scales are known."""
    return jax.jit(lambda: attend(Q, join(*summaries)).out)()


def test_summaries_of_one_scale_merge_and_keep_it():
    for scale in (None, 0.3, as_array(0.3)):
        out = answer_of(merge, carrying(scale, FIRST), carrying(scale, LAST))
        np.testing.assert_allclose(out, brute_force(Q, K, V, scale=scale)[0], atol=1e-5)
    traced = jax.jit(lambda scale: attend(Q, merge(carrying(scale, FIRST), carrying(scale, LAST))).out)(0.3)
    np.testing.assert_allclose(traced, brute_force(Q, K, V, scale=0.3)[0], atol=1e-5)


@pytest.mark.parametrize("swapped", [False, True])
def test_tokens_of_two_traced_scales_merge_in_either_space(swapped):
    """In a compiled function a scale is traced even if it is a number."""
    scales = (1.2, 0.3) if swapped else (0.3, 1.2)

    def answers(q, scales):
        parts = [carrying(scale, part) for scale, part in zip(scales, (FIRST, LAST), strict=True)]
        return attend(q, merge(*parts)), merge(*(attend(q, part) for part in parts))

    several = np.float32([scales])
    for given in (lambda q: answers(q, scales), lambda q: jax.vmap(answers, (None, 0))(q, several)):
        merged, expected = jax.jit(given)(Q)
        np.testing.assert_allclose(merged.out, expected.out, atol=1e-5)
        np.testing.assert_allclose(merged.lse, expected.lse, atol=1e-5)

    def losses(scales):
        return [jnp.sum(state.out**2) for state in answers(Q, scales)]

    ours, theirs = jax.jit(jax.jacrev(losses))(several[0])
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_moments_of_two_traced_scales_are_nan():
    for join in (merge, hadamard):
        joined = jax.jit(lambda a, b, join=join: attend(Q, join(moments(a), moments(b))).out)
        np.testing.assert_allclose(joined(0.3, 0.3), answer_of(join, moments(0.3), moments(0.3)), atol=1e-5)
        assert np.all(np.isnan(joined(0.3, 0.4)))


@pytest.mark.parametrize("jit", [False, True])
def test_one_scale_of_two_precisions(jit):
    """The default scale of 3 channels is not a float32 number."""
    with jax.enable_x64(True):
        q, *wide = (np.asarray(x, np.float64)[:, :3] for x in (Q, K, V))
        parts = [[as_array(x[:9]) for x in wide], [as_array(x[9:], jnp.float64) for x in wide]]
        for narrow_first in (False, True):

            def answers(parts, narrow_first=narrow_first):
                small = [compress_tokens(*part, budget=20) for part in (parts if narrow_first else parts[::-1])]
                return merge(*small)

            merged = (jax.jit(answers) if jit else answers)(parts)
            assert merged.k.dtype == jnp.float64
            out = attend(as_array(q, jnp.float64), merged).out
            np.testing.assert_allclose(out, brute_force(q, *wide)[0], atol=1e-6)


def moments(scale):
    made = moments_of(FEATURES, *fold_scale(K, K, scale)[1:], V)
    return dataclasses.replace(made, scale=jnp.asarray(scale, jnp.float32))


def test_moments_carry_a_scale_too():
    small, plain = moments(0.3), moments(0.3).in_scaled_space()
    expected = attend(fold_scale(Q, K, 0.3)[0], plain).out
    np.testing.assert_allclose(attend(Q, small).out, expected, atol=1e-6)
    zeros, ones = np.zeros(6, np.float32), np.ones(6, np.float32)
    for keep in (lambda x: x.weighted(zeros), lambda x: x.reweighted(ones, x.features), lambda x: merge(x, x)):
        np.testing.assert_allclose(answer_of(keep, small), expected, atol=1e-5)
    assert float(jax.jit(lambda: hadamard(small, small).scale)()) == float(small.scale)
    with pytest.raises(ValueError, match="merge needs summaries of one scale"):
        hadamard(small, moments(0.4))


@pytest.mark.parametrize("make", [carrying, moments])
def test_summaries_of_two_spaces_do_not_merge(make):
    with pytest.raises(ValueError, match=r"^merge needs summaries of one scale, got 0\.3.* and 0\.4[^\n]*$"):
        merge(make(0.3), make(0.4))
    for one, other in ((make(0.3), make(0.3).in_scaled_space()), (make(0.3).in_scaled_space(), make(0.3))):
        with pytest.raises(ValueError, match=r"^merge needs summaries of one space[^\n]*in_scaled_space\(\)[^\n]*$"):
            merge(one, other)


def test_what_is_made_in_scaled_space_carries_none():
    made = jax.eval_shape(
        lambda: (
            summarize_coreset(K, V, KEY, coreset_size=4, algorithm="uniform"),
            WeightedKV.of_tokens(K, V),
            FeatureMoments.of_tokens(PositiveFeatures(K), K, V),
            carrying(0.3).in_scaled_space(),
        )
    )
    assert [summary.scale for summary in made] == 4 * [None]


def test_what_reads_keys_honours_the_scale():
    small = carrying(0.3)
    received = attention_received(small, Q)
    queries, keys = fold_scale(Q, K, 0.3)
    np.testing.assert_allclose(received, attention_received(WeightedKV.of_tokens(keys, V), queries), rtol=1e-5)
    smaller = compress(small, KEY, coreset_size=20)
    np.testing.assert_allclose(attend(Q, smaller).out, brute_force(Q, K, V, scale=0.3)[0], atol=1e-5)
    smaller = compress(small, KEY, coreset_size=8, algorithm="stratified")
    plain = compress(small.in_scaled_space(), KEY, coreset_size=8, algorithm="stratified")
    np.testing.assert_allclose(attend(Q, smaller).out, attend(queries, plain).out, atol=1e-6)
    # The scale is shared, like the projection of a feature map, and does not count.
    assert summary_bytes(small) == summary_bytes(small.in_scaled_space()) == 4 * (20 * 8 + 20 * 3 + 20)


def running_of(scale):
    """A running summary of the tokens of the last block, in the space of its scale."""

    def append(state, start, k, v, kv_mask):
        return compress_tokens(k, v, budget=k.shape[0], scale=scale)

    return RunningSummary(lambda dv, dtype: carrying(scale, (K[:4], V[:4])), append, read=lambda state: state)


@pytest.mark.parametrize(
    "ask",
    [
        lambda small: sup_error(K, V, small, 1.0),
        lambda small: bounds.merge_bound(K, V, small, 1.0),
        lambda small: causal_state(K, K, V, running_of(0.3), block_size=4),
        lambda small: Decoder(running=running_of(0.3), head_dim=8, value_dim=3, block_size=4).attend(
            Decoder(running=running_of(0.3), head_dim=8, value_dim=3, block_size=4).init(), Q
        ),
        lambda small: sparse_plus_summary(
            K, K, V, summarize=lambda k, v, key, kv_mask: compress_tokens(k, v, budget=4, kv_mask=kv_mask),
            pattern=BlockMap.banded(0, 0, block_size=4, num_queries=20, num_keys=20),
        ),
    ],
    ids=["sup_error", "merge_bound", "causal_state", "decoder", "sparse_plus_summary"],
)  # fmt: skip
def test_what_asks_in_scaled_space_takes_no_other(ask):
    with pytest.raises(
        ValueError, match=r"^[^\n]* uses queries in scaled space \(fold_scale\)[^\n]*in_scaled_space\(\)"
    ):
        jax.eval_shape(lambda: ask(carrying(0.3)))


def test_a_cache_that_carries_a_scale_is_not_compressed():
    decoder = Decoder(running=running_exact(8, max_length=20), head_dim=8, value_dim=3, block_size=4)

    def compressed():
        cache = decoder.append(decoder.init(), K, V)
        past = cache.past._replace(prefix=dataclasses.replace(cache.past.prefix, scale=jnp.float32(0.3)))
        return compress_cache(cache._replace(past=past), budget=8)

    with pytest.raises(ValueError, match="compress_cache uses queries in scaled space"):
        jax.eval_shape(compressed)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_algorithms_take_tokens_without_a_scale(name):
    # Only traced, so that nothing is compiled for algorithms that raise later.
    with pytest.raises(ValueError, match="an algorithm uses queries in scaled space"):
        jax.eval_shape(lambda tokens: ALGORITHMS[name](tokens, 8, jnp.float32(1), KEY), carrying(0.3))
