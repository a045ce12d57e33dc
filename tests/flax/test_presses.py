"""Caches of models compressed after the prompt: equal to compression by hand, in stacks, and for several lengths."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from approx_attention import Decoder, compress_cache, fold_scale
from approx_attention import nnx as ours
from approx_attention.core import summary_bytes
from approx_attention.decoding import running_compressed
from approx_attention.nnx import ApproxAttention, compress_caches
from tests.flax.test_stacks import DIM, alone, run, stack_of, tokens, with_method
from tests.references import random_heads

pytestmark = pytest.mark.usefixtures("models")

BATCH, PROMPT, LATER, HEADS, KV_HEADS, HEAD_DIM, BLOCK = 2, 40, 12, 4, 2, 4, 8
# In NumPy, because JAX compiles a program for each slice.
QUERY, KEY, VALUE = map(np.asarray, random_heads(80, BATCH, PROMPT + LATER, PROMPT + LATER, HEADS, KV_HEADS, HEAD_DIM))
RNG = jax.random.key(5)


def one_layer(batch=BATCH, ragged=False, keep_queries=16, **options):
    layer = ApproxAttention("exact", is_causal=True)
    sizes = {"max_length": 64, "block_size": BLOCK, "num_heads": HEADS, "ragged": ragged, "keep_queries": keep_queries}
    nnx.jit(lambda layer: layer.init_cache(batch, KV_HEADS, HEAD_DIM, **sizes | options))(layer)
    return layer


@nnx.jit
def call(layer, query, key, value, lengths=None):
    return layer(query, key, value, key_value_seq_lengths=lengths)


@functools.partial(nnx.jit, static_argnames=("options",))
def compressed(layer, options):
    layer.compress_cache(RNG, **dict(options))


def press(layer, **options):
    compressed(layer, tuple({"coreset_size": 8, **options}.items()))


def read(layer, first, last, rows=slice(None), lengths=None):
    return call(layer, *(x[rows, first:last] for x in (QUERY, KEY, VALUE)), lengths)


def test_a_press_is_compress_cache_of_every_head_and_decoding_goes_on():
    options = {"policy": "snapkv", "bits": 8}
    layer = one_layer()
    read(layer, 0, PROMPT)
    heads = jax.tree.map(np.asarray, layer._cached()[0].heads)
    np.testing.assert_array_equal(layer.last_queries(), QUERY[:, PROMPT - 16 : PROMPT])
    press(layer, budget=12, **options)
    assert layer.last_queries() is None
    cache = layer._cached()[0]
    past = jax.tree.map(np.asarray, cache.heads.past)
    outs = np.concatenate([read(layer, t, t + 1) for t in range(PROMPT, PROMPT + LATER)], axis=1)
    scaled = np.asarray(jax.jit(fold_scale)(QUERY, KEY)[0])
    sizes = {"budget": 12, "coreset_size": 8}
    by_hand = jax.jit(functools.partial(compress_cache, **sizes, **options))

    @jax.jit
    def decoding_on(folding, small, *later):
        running = running_compressed(HEAD_DIM, folding, bits=8, **sizes)
        decoder = Decoder(running=running, head_dim=HEAD_DIM, value_dim=HEAD_DIM, block_size=BLOCK)
        return decoder.prefill(small, *later)[0]

    for place in ((0, 0), (1, 1)):
        batch, head = place
        group = slice(2 * head, 2 * head + 2)
        own = _of_head(heads._replace(length=None), place)._replace(length=np.int32(PROMPT))
        small = by_hand(own, queries=scaled[batch, PROMPT - 16 : PROMPT, group])
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), _of_head(past, place), small.past)
        later = (x[batch, PROMPT:, i] for x, i in ((QUERY, 2 * head), (KEY, head), (VALUE, head)))
        expected = decoding_on(cache.drawn["folding"][head], small, *later)
        np.testing.assert_allclose(outs[batch, :, 2 * head], expected, atol=1e-5)


def _of_head(cache, place):
    return jax.tree.map(lambda x: x[place], cache)


@pytest.mark.parametrize("policy", ["snapkv", "expected_attention"])
def test_a_sequence_is_compressed_as_it_is_alone(policy):
    """Sequences of several lengths, one of them shorter than the number of kept queries."""
    lengths = jnp.array([PROMPT, 22])
    layer = one_layer(ragged=True, keep_queries=24)
    real = np.arange(PROMPT) < np.asarray(lengths)[:, None]
    soiled = (np.where(real[:, :, None, None], x[:, :PROMPT], np.float32(np.nan)) for x in (QUERY, KEY, VALUE))
    call(layer, *soiled, lengths)
    press(layer, budget=10, policy=policy)
    out = np.asarray(read(layer, PROMPT, PROMPT + LATER, lengths=jnp.array([LATER, LATER])))
    for row, length in enumerate(lengths.tolist()):
        single = one_layer(batch=1, keep_queries=min(24, length))
        read(single, 0, length, rows=slice(row, row + 1))
        press(single, budget=10, policy=policy)
        expected = np.asarray(read(single, PROMPT, PROMPT + LATER, rows=slice(row, row + 1)))
        np.testing.assert_allclose(out[row], expected[0], atol=1e-4)


@functools.partial(nnx.jit, static_argnames=("keep_queries",))
def start(layers, keep_queries):
    ours.init_cache(layers, 2, max_length=32, block_size=4, keep_queries=keep_queries)


def stack(keep_queries=8):
    layers = with_method("exact", is_causal=True)
    start(layers, keep_queries=keep_queries)
    return layers


def test_layers_and_heads_have_budgets():
    layers, x = stack(), tokens(24)
    run(layers, x)
    single = alone(layers, 1)
    options = {"policy": "snapkv", "coreset_size": 4, "sinks": 1}
    nnx.jit(functools.partial(compress_caches, budget=[6, [8, 5], 7], **options))(layers, RNG)
    pressed = alone(layers, 1).attention_fn
    mass = np.asarray(layers.attention_fn._cached()[0].heads.past.prefix.fixed.mass)
    np.testing.assert_array_equal((mass > 0).sum(-1), np.broadcast_to([[[6, 6]], [[8, 5]], [[7, 7]]], (3, 2, 2)))
    for head, budget in enumerate((8, 5)):
        own = nnx.clone(single).attention_fn
        press(own, budget=budget, **options)
        keys = (np.asarray(x._cached()[0].heads.past.prefix.fixed.k) for x in (own, pressed))
        k, kept = (x[:, head, :budget] for x in keys)
        np.testing.assert_allclose(np.sort(kept, axis=1), np.sort(k, axis=1), atol=1e-6)
    out = run(layers, tokens(1))
    assert np.isfinite(out).all()
    np.testing.assert_array_equal(layers.attention_fn.num_seen, [25] * 3)


def test_layers_are_counted_by_their_numbers():
    model = nnx.Dict(layer_10=stack_of(), layer_2=stack_of())
    ours.replace_attention(model, "exact", is_causal=True)

    @nnx.jit
    def start_and_compress(model):
        ours.init_cache(model, 1, max_length=8, block_size=4)
        compress_caches(model, RNG, budget=[6, 8], policy="streaming_llm", coreset_size=4)

    start_and_compress(model)
    rows = {name: model[name].attention_fn._cached()[0].heads.past.prefix.fixed.mass.shape[-1] for name in model}
    assert rows == {"layer_2": 6, "layer_10": 8}


def test_a_second_pass_of_a_copy_ranks_the_keys():
    model, x = stack(keep_queries=20), tokens(20)
    options = {"budget": 6, "policy": "kvzip", "coreset_size": 4, "sinks": 1}

    @nnx.jit
    def with_queries(layer, queries):
        layer.attention_fn.compress_cache(RNG, queries=queries, **options)

    run(model, x)
    again = nnx.clone(model)
    run(again, x[:, ::-1])
    by_hand, queries = nnx.clone(model), nnx.jit(nnx.vmap(ApproxAttention.last_queries))(again.attention_fn)
    nnx.jit(lambda model, again: compress_caches(model, RNG, queries_of=[again], **options))(model, again)
    np.testing.assert_array_equal(model.attention_fn.num_seen, [20] * 3)
    for i in range(3):
        single = alone(by_hand, i)
        with_queries(single, np.asarray(queries)[i])
        kept, expected = (
            layer.attention_fn._cached()[0].heads.past.prefix.fixed.k for layer in (alone(model, i), single)
        )
        np.testing.assert_allclose(kept, expected, atol=1e-6)


@pytest.mark.parametrize("bits", [None, 8])
def test_bytes_are_kept_to(bits):
    layers = stack()
    run(layers, tokens(24))
    options = {"num_bytes": 1800, "policy": "knorm", "sinks": 1, "coreset_size": 4, "bits": bits}
    nnx.jit(functools.partial(compress_caches, **options))(layers, RNG)
    fixed = layers.attention_fn._cached()[0].heads.past.prefix.fixed
    assert 0.6 * 1800 < summary_bytes(fixed) / 2 <= 1800


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budget": 8, "num_bytes": 99}, ValueError, "pass either budget or num_bytes"),
        ({}, ValueError, "got neither"),
        ({"budget": [8, 8]}, ValueError, r"one for each of 3 layers, got \[8, 8\]"),
        ({"budget": [8, 8, [8, 8, 8]]}, ValueError, r"one for each of 2 heads, got \[8, 8, 8\]"),
        ({"budget": [8, 8, 0]}, ValueError, "budget must be at least 1, got 0"),
        ({"budget": [9, 8, 8], "policy": "halving"}, ValueError, "size is only supported by policies"),
        ({"budget": 8, "policy": "snapkw"}, ValueError, "did you mean 'snapkv'"),
        ({"budget": 8, "queries_of": with_method}, ValueError, "models of queries_of have no queries"),
        ({"budget": 8, "queries_of": [nnx.Dict()]}, ValueError, "no layer of the Dict has an attention_fn"),
    ],
)
def test_what_is_wrong_is_said(options, error, message):
    layers = stack()
    if options.get("queries_of") is with_method:  # made here, so that no process makes it to collect the tests
        options = {**options, "queries_of": [with_method("exact")]}
    before = layers.attention_fn._held()
    with pytest.raises(error, match=message):
        compress_caches(layers, RNG, **{"sinks": 1} | options)
    assert layers.attention_fn._held() == before


def test_caches_that_cannot_be_compressed_are_named():
    layers = with_method("exact", is_causal=True)
    with pytest.raises(ValueError, match="there is no cache to compress"):
        compress_caches(layers, RNG, budget=8)
    ours.init_cache(layers, 2, max_length=32, keep_queries=0)
    with pytest.raises(ValueError, match="'h2o' scores keys by the attention of queries; pass queries"):
        compress_caches(layers, RNG, budget=8, policy="h2o")
    compress_caches(layers, RNG, budget=8, policy="knorm")
    with pytest.raises(TypeError, match="needs a cache of unchanged tokens.*with Compressed"):
        compress_caches(layers, RNG, budget=8, policy="knorm")
    ours.init_cache(layers, 2, max_length=32, cache_bits=8)
    with pytest.raises(TypeError, match="of 'exact' with QuantizedKV"):
        compress_caches(layers, RNG, budget=8, policy="knorm")
    layers = with_method("exact", is_causal=True, logits_soft_cap=50.0)
    ours.init_cache(layers, 2, max_length=32)
    with pytest.raises(NotImplementedError, match="does not support logits_soft_cap"):
        compress_caches(layers, RNG, budget=8, policy="knorm")
    layers = with_method("mean_pool", is_causal=True)
    ours.init_cache(layers, 2)
    with pytest.raises(TypeError, match="got one of 'mean_pool'"):
        compress_caches(layers, RNG, budget=8, policy="knorm")
    with pytest.raises(TypeError, match="needs num_heads"):
        ApproxAttention("exact").init_cache(2, 2, DIM, max_length=8, keep_queries=4)
