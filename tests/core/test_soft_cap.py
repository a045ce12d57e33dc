"""Capped logits against softmax(c tanh(x / c)) of the whole matrix in float64, and errors where unsupported."""

import contextlib
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from approx_attention import METHODS, HeadsDecoder, SparsePattern, attend, attention, exact, kernels, sparse_attention
from approx_attention.core import causal_state
from approx_attention.methods import running_exact, summarize_exact, summarize_favor
from approx_attention.nnx import ApproxAttention
from approx_attention.registry import bind
from approx_attention.sparse import BlockMap
from tests.cases import case_of, settings
from tests.contract.test_executions import compiled_as
from tests.references import as_array, causal_mask, having, random_head, random_heads

pytestmark = pytest.mark.all_forms

CAPPED = having(soft_cap=True)
CAP = 1.5


@jax.jit
def whole_matrix(q, k, v, seen, *, bias=0.0, scale=None):
    """Outputs and log-normalisers; 0 and -inf for queries that see no key."""
    scale = 1 / np.sqrt(q.shape[1]) if scale is None else scale
    logits = jnp.where(seen, CAP * jnp.tanh(scale * (q @ k.T) / CAP) + bias, -1e30)
    weights = jnp.where(seen, jax.nn.softmax(logits), 0)
    return weights @ v, jnp.where(seen.any(1), jax.nn.logsumexp(logits, axis=1), -jnp.inf)


def with_gradients(function, *operands):
    """The outputs of a function, and its gradients of a sum that depends on all of them."""

    def loss(*operands):
        outputs = jax.tree.leaves(function(*operands))
        return sum(jnp.sum(jnp.cos(jnp.where(jnp.isfinite(x), x, 0))) for x in outputs), outputs

    (_, outputs), gradients = jax.value_and_grad(loss, argnums=tuple(range(len(operands))), has_aux=True)(*operands)
    return outputs, gradients


@pytest.mark.parametrize(
    ("implementation", "reach"),
    [(None, {}), (None, {"right": 0}), (None, {"offset": 3, "left": 40, "right": 7}), ("interpret", {"right": 0})],
)
def test_the_operation_has_the_values_and_gradients_of_the_whole_matrix(x64, implementation, reach):
    # Several tiles; in float32 if a kernel is requested, which falls back to tiles.
    dtype, tolerance = (jnp.float32, 1e-4) if implementation else (jnp.float64, 1e-11)
    q, k, v = random_head(0, 600, 530, 4, 3, dtype=dtype, spread=1.5)
    bias, scale = as_array(np.random.default_rng(1).normal(size=530), dtype), as_array(0.7, dtype)
    distance = np.arange(530)[None, :] - np.arange(600)[:, None] - reach.get("offset", 0)
    seen = (distance >= -reach.get("left", 1e9)) & (distance <= reach.get("right", 1e9))

    def ours(q, k, v, bias, scale):
        options = {"logits_soft_cap": CAP, "implementation": implementation}
        return kernels.state(q, k, v, bias, scale=scale, **reach, **options)

    operands = q, k, v, bias, scale
    found = jax.jit(functools.partial(with_gradients, ours))(*operands)
    expected = whole_matrix_with_gradients(seen, *(np.asarray(x, np.float64) for x in operands))
    found, expected = (jax.tree.map(np.float64, x) for x in (found, expected))
    chex.assert_trees_all_close(found, expected, rtol=tolerance, atol=tolerance)


@jax.jit
def whole_matrix_with_gradients(seen, *operands):
    """One program for all reaches."""

    def theirs(q, k, v, bias, scale):
        return whole_matrix(q, k, v, seen, bias=bias[None, :], scale=scale)

    return with_gradients(theirs, *operands)


def test_other_derivatives_are_those_of_the_whole_matrix(x64):
    q, k, v = random_head(2, 6, 7, 4, 3, dtype=jnp.float64)

    def ours(q, k):
        return jnp.sum(kernels.state(q, k, v, right=0, logits_soft_cap=CAP).out ** 2)

    def theirs(q, k):
        return jnp.sum(whole_matrix(q, k, v, causal_mask(6, 7), scale=1.0)[0] ** 2)

    for derivative in (jax.jacfwd, jax.hessian):
        chex.assert_trees_all_close(*(jax.jit(derivative(f, argnums=(0, 1)))(q, k) for f in (ours, theirs)), atol=1e-12)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", CAPPED)
def test_methods_at_full_size_are_the_whole_matrix(x64, name, is_causal):
    q, k, v = random_head(3, 23, 23, dtype=jnp.float64, spread=2.0)
    method = METHODS[name]
    options = {**settings(name, 23), **(case_of(name).exact_causal if is_causal else {})}
    real = np.arange(23) % 4 != 1
    seen = (causal_mask(23, 23) if is_causal else np.ones((23, 23), bool)) & real[None, :]

    def ours(q, k, v):
        answer = functools.partial(method.function, is_causal=is_causal, logits_soft_cap=CAP, **options)
        return jnp.where(real[:, None], answer(q, k, v, jax.random.key(7), kv_mask=as_array(real, bool)), 0)

    broken = [np.where(real[:, None], x, np.nan) for x in (k, v)]
    found = jax.jit(functools.partial(with_gradients, ours))(q, *broken)
    chex.assert_trees_all_close(found, gradients_of_real_queries(q, k, v, seen, real), atol=1e-12)


@jax.jit
def gradients_of_real_queries(q, k, v, seen, real):
    """Outputs and gradients from the whole matrix, with 0 for the other queries: one program for all methods."""
    return with_gradients(lambda *x: jnp.where(real[:, None], whole_matrix(*x, seen)[0], 0), q, k, v)


def test_sparse_patterns_by_blocks_and_gathered(x64):
    q, k, v = random_head(4, 24, 24, dtype=jnp.float64, spread=2.0)
    pattern = SparsePattern.banded(24, [-5, -1, 0, 2])
    distance = np.arange(24)[None, :] - np.arange(24)[:, None]
    visible = np.isin(distance, [-5, -1, 0, 2]) & causal_mask(24, 24)
    expected = jax.jit(functools.partial(with_gradients, lambda *x: whole_matrix(*x, visible)[0]))(q, k, v)
    gathered = jax.jit(_sparse_gradients)(q, k, v, pattern)
    by_blocks = jax.jit(lambda *x: _sparse_gradients(*x, BlockMap.from_pattern(pattern, 4)))(q, k, v)
    for found in (gathered, by_blocks):
        chex.assert_trees_all_close(found, expected, atol=1e-12)


def _sparse_gradients(q, k, v, pattern):
    answer = functools.partial(sparse_attention, pattern=pattern, is_causal=True, logits_soft_cap=CAP)
    return with_gradients(answer, q, k, v)


@pytest.mark.parametrize("form", ["cpu", "default"])
def test_the_running_summary_caps_nearby_and_earlier_tokens(x64, form):
    q, k, v = random_head(5, 21, 21, dtype=jnp.float64, spread=2.0)
    running = running_exact(8, max_length=24, logits_soft_cap=CAP)
    state = compiled_as(form, lambda *x: causal_state(*x, running, block_size=4, scale=0.4))(q, k, v)
    chex.assert_trees_all_close(
        (state.out, state.lse), whole_matrix(q, k, v, causal_mask(21, 21), scale=0.4), atol=1e-12
    )


@pytest.mark.parametrize("cache_bits", [None, pytest.param(8, marks=pytest.mark.slow)])
def test_decoding_is_causal_attention_with_grouped_heads(cache_bits):
    query, key, value = random_heads(6, 2, 21, 21, 4, 2)
    query, key, value = 2 * np.asarray(query), np.asarray(key), np.asarray(value)
    exact_form = functools.partial(attention, method="exact", is_causal=True, logits_soft_cap=CAP)
    whole = np.asarray(jax.jit(exact_form)(query, key, value))
    sizes = {"num_kv_heads": 2, "head_dim": 8, "max_length": 24, "block_size": 4}
    decoder = HeadsDecoder("exact", logits_soft_cap=CAP, cache_bits=cache_bits, **sizes)
    extend, cache = jax.jit(decoder.extend), jax.jit(lambda: decoder.init(2))()
    outs = []
    for part in (slice(0, 19), slice(19, 20), slice(20, 21)):
        out, cache = extend(cache, query[:, part], key[:, part], value[:, part])
        outs.append(out)
    chex.assert_trees_all_close(np.concatenate(outs, axis=1), whole, atol=1e-5 if cache_bits is None else 0.03)
    # Each head of a group equals the result from its whole matrix.
    one = whole_matrix(query[1, :, 3], key[1, :, 1], value[1, :, 1], causal_mask(21, 21))[0]
    chex.assert_trees_all_close(whole[1, :, 3], one, atol=1e-5)


def test_a_large_cap_is_none_and_a_layer_passes_it_on():
    layer = ApproxAttention("exact", logits_soft_cap=CAP, rngs=nnx.Rngs(0))

    @jax.jit
    def answers(*heads):
        return layer(*heads), [attention(*heads, method="exact", logits_soft_cap=c) for c in (None, 1e4, CAP)]

    of_layer, (plain, wide, narrow) = answers(*random_heads(7, 1, 9, 9, 2, 2))
    chex.assert_trees_all_close(wide, plain, atol=1e-5)
    chex.assert_trees_all_close(of_layer, narrow, atol=1e-6)


def test_a_window_of_exact_attention_keeps_the_cap(x64):
    query, key, value = (np.asarray(x, np.float64) for x in random_heads(8, 1, 9, 9, 2, 1))
    capped = functools.partial(attention, method="exact", local_window_size=(2, 1), logits_soft_cap=CAP)
    window = np.asarray(jax.jit(capped)(query, key, value))
    apart = np.arange(9)[None, :] - np.arange(9)[:, None]
    seen = (apart >= -2) & (apart <= 1)
    for n in range(2):
        expected, _ = whole_matrix(query[0, :, n], key[0, :, 0], value[0, :, 0], seen)
        chex.assert_trees_all_close(window[0, :, n], expected, atol=1e-12)


def test_what_cannot_cap_its_logits_says_so():
    q, k, v = random_head(0, 3, 4)
    for name in set(METHODS) - set(CAPPED):
        with pytest.raises(
            NotImplementedError, match=f"method '{name}' does not support logits_soft_cap; .* exact, local"
        ):
            bind(name, {"logits_soft_cap": 50.0})
    with pytest.raises(NotImplementedError, match="'pallas' does not support logits_soft_cap; use 'blocked'"):
        exact(q, k, v, implementation="pallas", logits_soft_cap=50.0)
    for implementation, outcome in (
        (None, contextlib.nullcontext()),
        ("pallas", pytest.raises(NotImplementedError, match="'pallas' does not support logits_soft_cap; use None")),
    ):
        operation = functools.partial(kernels.state, implementation=implementation, logits_soft_cap=50.0)
        traced = jax.jit(operation).trace(q, k, v)
        with outcome:
            traced.lower(lowering_platforms=("tpu",))
    heads = [as_array(np.asarray(x)[None, :, None]) for x in (q, k, v)]
    with pytest.raises(ValueError, match="no bias, mask, logits_soft_cap"):
        attention(*heads, method="exact", implementation="cudnn", logits_soft_cap=50.0)
    with pytest.raises(ValueError, match="logits_soft_cap must be positive, got 0.0"):
        exact(q, k, v, logits_soft_cap=0.0)

    def asked(summarize, logits_soft_cap):
        return jax.eval_shape(lambda: attend(q, summarize(k, v), logits_soft_cap=logits_soft_cap))

    for function in (functools.partial(kernels.state, q, k, v), functools.partial(asked, summarize_exact)):
        with pytest.raises(ValueError, match="logits_soft_cap must be positive.*, got -1.0"):
            function(logits_soft_cap=-1.0)
    array: Any = as_array(1.0)
    with pytest.raises(TypeError, match="logits_soft_cap must be a known float, got ArrayImpl"):
        kernels.state(q, k, v, logits_soft_cap=array)
    with pytest.raises(ValueError, match="tokens without signed masses"):
        asked(functools.partial(summarize_favor, key=jax.random.key(0)), 50.0)
    assert asked(summarize_exact, 50.0).out.shape == (3, 8)
