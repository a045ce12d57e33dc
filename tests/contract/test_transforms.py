"""Outputs agree under JAX's transformations and over batches, heads and devices; derivatives are correct."""

import functools
import math

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from approx_attention import METHODS, api, attention
from approx_attention.core import over_heads
from tests.cases import call, call_heads, case_of, lifted, lifted_both_directions, lifted_one_direction, settings
from tests.references import compiled, random_head, random_heads

# batches and heads


@lifted
@pytest.mark.parametrize("batch", [(), (2,), (2, 1)])
def test_leading_batch_axes(name, batch):
    query, key, value = (x.reshape(*batch, *x.shape[1:]) for x in random_heads(0, math.prod(batch), 9, 7, 4, 2))
    out = call_heads(name, query, key, value)
    assert out.shape == query.shape
    flat = call_heads(name, *(x.reshape(-1, *x.shape[-3:]) for x in (query, key, value)))
    np.testing.assert_allclose(out.reshape(flat.shape), flat, atol=1e-6)


@lifted
def test_batch_size_does_not_matter(name):
    tensors = random_heads(2, 3, 9, 9, 4, 2)
    whole = call_heads(name, *tensors)
    for i in range(3):
        np.testing.assert_allclose(call_heads(name, *(x[i : i + 1] for x in tensors))[0], whole[i], atol=1e-6)


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


# transformations and compilation


@lifted_one_direction
def test_jit_equals_eager_and_vmap_equals_loop(name, is_causal):
    options = {"is_causal": True} if is_causal else {}
    stacked = [jnp.stack(x) for x in zip(*(random_head(i, 9, 9) for i in range(3)), strict=True)]
    function = functools.partial(METHODS[name].function, key=jax.random.key(7), **settings(name), **options)
    loop = jnp.stack([jax.jit(function)(*(x[i] for x in stacked)) for i in range(3)])
    np.testing.assert_allclose(function(*(x[0] for x in stacked)), loop[0], atol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.vmap(function))(*stacked), loop, atol=1e-6)


@lifted_one_direction
def test_gradient_against_finite_differences(name, is_causal, x64):
    # Long enough for the causal form to read its summary too.
    q, k, v = random_head(23, 15, 15, 3, dtype=jnp.float64)
    options = {**case_of(name).smooth, "is_causal": True} if is_causal else case_of(name).smooth
    function = functools.partial(call, name, size=5, kv_mask=jnp.arange(15) != 2, **options)
    unseen = case_of(name).unseen
    if unseen != "kv":
        out, pull = jax.vjp(function, q, k, v)
        _, of_k, of_v = pull(jnp.zeros_like(out).at[-1].set(1))
        assert jnp.abs(of_k[0]).max() > 0 or "k" in unseen
        assert jnp.abs(of_v[1]).max() > 0 or "v" in unseen
    check_grads(function, (q, k, v), order=1, modes=["rev"], eps=1e-6, atol=1e-6, rtol=1e-6)


@lifted_both_directions
def test_one_compilation_per_shape(name, is_causal):
    def call_eagerly(seed, length):
        tensors = random_heads(seed, 1, length, length, 2, 1)
        attention(*tensors, method=name, rng=jax.random.key(seed), is_causal=is_causal, **settings(name))

    for length in (9, 10):
        call_eagerly(0, length)
    known = over_heads._cache_size()
    for seed in (1, 2):
        for length in (9, 10):
            call_eagerly(seed, length)
    assert over_heads._cache_size() == known >= 2


def test_a_gradient_traces_a_head_once(monkeypatch):
    traces = []

    def counted(function, *arguments, **options):
        def of_one_head(*tokens, **options):
            traces.append(tokens)
            return function(*tokens, **options)

        return over_heads(of_one_head, *arguments, **options)

    monkeypatch.setattr(api, "over_heads", counted)

    def total(*tensors):
        return attention(*tensors, method="mean_value").sum()

    jax.eval_shape(jax.grad(total, (0, 1, 2)), *random_heads(0, 2, 8, 8, 2, 2))
    assert len(traces) == 1


# devices and export


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
