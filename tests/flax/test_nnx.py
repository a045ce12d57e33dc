"""The modules with learned parts: the arrays that they pass to the functions, and that all of them are trained."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx

from approx_attention import eva, lara, rfa, tensor_attention, tensor_polynomial
from approx_attention import nnx as ours
from approx_attention.nnx.tensor import _unit_rms
from tests.references import compiled, random_heads

pytestmark = pytest.mark.usefixtures("models")

RNGS = flax_nnx.Rngs

eva, lara, rfa = compiled(eva, lara, rfa)


@flax_nnx.jit
def called(module, *tensors, **options):
    """The output of a module, compiled."""
    return module(*tensors, **options)


MODULES = {
    "eva_official": lambda: ours.eva_official(8, 2, window_size=4, num_chunks=4, local_bias=True, rngs=RNGS(0)),
    "eva_official overlap": lambda: ours.eva_official(8, 2, window_size=4, num_chunks=4, overlap=True, rngs=RNGS(0)),
    "eva_official image": lambda: ours.eva_official(
        8, 2, window_size=2, num_chunks=4, spatial_shape=(4, 4), local_bias=True, rngs=RNGS(0)
    ),
    "eva_official_causal": lambda: ours.eva_official_causal(8, 2, window_size=4, chunk_size=2, rngs=RNGS(0)),
    "evabyte": lambda: ours.evabyte(8, 2, window_size=4, chunk_size=2, rngs=RNGS(0)),
    "lara": lambda: ours.Lara(8, num_landmarks=4, rngs=RNGS(0)),
    "linformer none": lambda: ours.LinformerAttention(2, 16, num_slots=4, sharing="none", rngs=RNGS(0)),
    "linformer headwise": lambda: ours.LinformerAttention(2, 20, num_slots=4, is_causal=True, rngs=RNGS(0)),
    "linformer key_value": lambda: ours.LinformerAttention(
        2, 16, num_slots=4, sharing="key_value", init=ours.mean_pool_init(), rngs=RNGS(0)
    ),
    "rfa": lambda: ours.Rfa(8, 2, options={"num_features": 8}, rngs=RNGS(0)),
}


@flax_nnx.jit
def trained(module, tensors, lengths):
    """The output of a module and the gradients of its learned arrays: one program for both tests."""

    def loss(module):
        out = module(*tensors, rng=jax.random.key(0), key_value_seq_lengths=lengths)
        return jnp.sum(out**2), out

    return flax_nnx.value_and_grad(loss, has_aux=True)(module)


@pytest.mark.parametrize("name", MODULES)
def test_every_learned_array_is_trained(name):
    tensors = random_heads(0, 2, 16, 16, 4, 2)
    (value, _), gradient = trained(MODULES[name](), tensors, np.array([16, 16], np.int32))
    assert np.isfinite(value)
    leaves = jax.tree.leaves_with_path(flax_nnx.to_pure_dict(gradient))
    assert leaves
    for path, leaf in leaves:
        assert np.all(np.isfinite(leaf)), path
        assert np.abs(np.asarray(leaf)).max() > 0, path


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_jitted_and_mask_padding(name):
    module, lengths = MODULES[name](), np.array([16, 8], np.int32)
    query, key, value = random_heads(1, 2, 16, 16, 4, 2)
    out = trained(module, (query, key, value), lengths)[0][1]
    assert out.shape == query.shape
    soiled = [np.array(x) for x in (key, value)]
    for x in soiled:
        x[1, 8:] = np.nan
    np.testing.assert_array_equal(trained(module, (query, *soiled), lengths)[0][1], out)


def test_the_drop_in_is_the_function():
    query, key, value = random_heads(2, 2, 12, 12, 4, 2)
    module = ours.eva_dropin(8, 2, window_size=4, chunk_size=2)
    out = np.asarray(called(module, query, key, value))
    one = (jax.device_put(np.asarray(x)[1, :, head]) for x, head in ((query, 3), (key, 1), (value, 1)))
    expected = eva(*one, window_size=4, chunk_size=2)
    np.testing.assert_allclose(out[1, :, 3], expected, atol=1e-6)


def test_evabyte_pools_raw_keys_by_its_vectors():
    query, key, value = random_heads(3, 1, 16, 16, 2, 2)
    module = MODULES["evabyte"]()
    out = np.asarray(called(module, query, key, value))
    q, k, v = (np.asarray(x, np.float64)[0, :, 1] for x in (query, key, value))
    a, phi = np.asarray(module.pooling_vectors[...], np.float64)[1]
    s = 8**-0.5
    for t in range(16):
        near = [j for j in range(16) if t // 4 - 1 <= j // 4 and j <= t]
        logits, values = [s * q[t] @ k[j] for j in near], [v[j] for j in near]
        for c in range(8):
            if 2 * c // 4 < t // 4 - 1:
                part = slice(2 * c, 2 * c + 2)
                pool = np.exp(k[part] @ a)
                share = np.exp(s * (k[part] @ phi - (k[part] ** 2).sum(1) / 2))
                logits.append(s * q[t] @ (pool @ k[part] / pool.sum()))
                values.append(share @ v[part] / share.sum())
        weights = np.exp(logits)
        np.testing.assert_allclose(out[0, t, 1], weights @ np.asarray(values) / weights.sum(), atol=2e-5)


def test_adaptors_that_change_nothing_give_pooled_means():
    query, key, value = random_heads(4, 1, 16, 16, 2, 1)
    module = ours.eva_official(8, 1, window_size=4, num_chunks=4, rngs=RNGS(0))
    for adaptor in (module.adapt_queries, module.adapt_keys):
        adaptor.linear.kernel[...] = jnp.eye(8)
        adaptor.norm = flax_nnx.identity
    out = np.asarray(jax.jit(module)(query, key, value))
    options = {"window_size": 4, "num_chunks": 4, "exclude_local": False, "count_correction": False}
    one = (jax.device_put(np.asarray(x)[0, :, head]) for x, head in ((query, 1), (key, 0), (value, 0)))
    expected = eva(*one, proposal_mean="half", **options)
    np.testing.assert_allclose(out[0, :, 1], expected, atol=1e-6)


def test_only_what_is_learned_is_drawn():
    plain = ours.Eva(8, 2, options={"window_size": 4})
    assert not jax.tree.leaves(flax_nnx.state(plain))
    for learned in ("adaptors", "pooling_vectors"):
        with pytest.raises(ValueError, match="pass rngs"):
            ours.Eva(8, 2, options={"window_size": 4}, **{learned: True})
    rngs = RNGS(0)
    ours.Eva(8, 2, options={"window_size": 4}, local_bias=True, rngs=rngs)
    np.testing.assert_array_equal(jax.random.key_data(rngs.params()), jax.random.key_data(RNGS(0).params()))


@pytest.mark.slow
def test_lara_of_an_image_pools_as_many_squares_as_the_function():
    query, key, value = random_heads(4, 1, 64, 64, 1, 1)
    module = ours.Lara(8, num_landmarks=50, spatial_shape=(8, 8), rngs=RNGS(0))
    for adaptor in (module.adapt_queries, module.adapt_keys):
        adaptor.linear.kernel[...] = jnp.eye(8)
        adaptor.norm = flax_nnx.identity
    expected = lara(query[0, :, 0], key[0, :, 0], value[0, :, 0], num_landmarks=50, spatial_shape=(8, 8))
    np.testing.assert_allclose(module(query, key, value)[0, :, 0], expected, atol=1e-5)


def test_an_image_bias_depends_on_the_offset_alone():
    module = MODULES["eva_official image"]()
    module.bias[...] = jax.device_put(np.arange(9.0, dtype=np.float32).reshape(3, 3))
    bias = np.asarray(module.local_bias())
    assert bias.shape == (4, 4)
    np.testing.assert_array_equal(np.diag(bias), 4)
    assert bias[0, 1] == bias[2, 3] == 3
    assert bias[0, 3] == 0
    assert bias[3, 0] == 8


def test_a_learned_bandwidth_of_each_head_and_its_gates():
    query, key, value = random_heads(5, 1, 8, 8, 2, 2)
    module = ours.Rfa(8, 2, options={"num_features": 8, "is_causal": True, "block_size": 2}, gate_dim=3, rngs=RNGS(0))
    module.bandwidth[...] = jax.device_put(np.repeat(np.float32([[0.5], [1.5]]), 8, axis=1))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, 3)), jnp.float32)
    out = np.asarray(called(module, query, key, value, rng=jax.random.key(0), gate_input=x))
    q, k, v, gates = (jax.device_put(np.asarray(x)[0, :, 1]) for x in (query, key, value, module.gate(x)))
    expected = rfa(
        q, k, v, jax.random.fold_in(jax.random.key(0), 1), is_causal=True,
        num_features=8, block_size=2, bandwidth=1.5, gate_logits=gates,
    )  # fmt: skip
    np.testing.assert_allclose(out[0, :, 1], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="gates, gate_dim = 3, gate_input is None"):
        module(query, key, value, rng=jax.random.key(0))


def test_linformers_share_what_they_say():
    query, key, value = random_heads(6, 1, 12, 12, 4, 2)
    sharing: dict = {}
    for name, count in (("none", 2), ("headwise", 2), ("key_value", 1)):
        sharing[name] = ours.LinformerAttention(2, 12, num_slots=3, sharing=name, rngs=RNGS(0))
        assert len(sharing[name].projections) == count
    e, f = (x[...] for x in sharing["headwise"].projections.values())
    for name, x in (("projection_k", e), ("projection_v", f)):
        sharing["none"].projections[name][...] = jnp.stack([x, x])
    tensors = query, key, value
    headwise = called(sharing["headwise"], *tensors)
    np.testing.assert_allclose(called(sharing["none"], *tensors), headwise, atol=1e-6)
    sharing["headwise"].projections["projection_v"][...] = e
    sharing["key_value"].projections["projection_k"][...] = e
    headwise = called(sharing["headwise"], *tensors)
    np.testing.assert_allclose(called(sharing["key_value"], *tensors), headwise, atol=1e-6)


def test_layers_share_projections_and_frozen_ones_are_not_parameters():
    first = ours.LinformerAttention(2, 12, num_slots=3, rngs=RNGS(0))
    second = ours.LinformerAttention(2, 12, projections=first.projections)
    both = flax_nnx.List([first, second])
    assert len(jax.tree.leaves(flax_nnx.state(both, flax_nnx.Param))) == 2
    frozen = ours.LinformerAttention(2, 12, num_slots=3, frozen=True, rngs=RNGS(0))
    assert not jax.tree.leaves(flax_nnx.state(frozen, flax_nnx.Param))
    assert len(jax.tree.leaves(flax_nnx.state(frozen))) == 2
    own = ours.LinformerAttention(2, 12, num_slots=3, sharing="none", init=ours.mean_pool_init(), rngs=RNGS(0))
    tensors = random_heads(7, 1, 12, 12, 4, 2)
    given = ours.LinformerAttention(2, 12, projections=own.projections)
    np.testing.assert_array_equal(called(given, *tensors), called(own, *tensors))
    with pytest.raises(
        ValueError, match="determined by projections: leave them out; got num_slots = None, sharing = 'headwise'"
    ):
        ours.LinformerAttention(2, 12, projections=own.projections, sharing="headwise")
    with pytest.raises(ValueError, match="number of slots, 20, must be at most the number of positions, 12"):
        ours.mean_pool_init()(jax.random.key(0), (20, 12))
    with pytest.raises(ValueError, match="pass rngs, or projections of another layer"):
        ours.LinformerAttention(2, 12)


def test_initialisers_keep_the_scale_or_take_means():
    e = np.asarray(ours.scale_keeping_init(jax.random.key(0), (16, 400)))
    k = np.random.default_rng(1).normal(size=(400, 64))
    assert float(np.std(e @ k)) == pytest.approx(1, rel=0.1)
    means = ours.mean_pool_init(noise=0.0)(jax.random.key(0), (2, 4, 12))
    np.testing.assert_allclose(means[1], np.kron(np.eye(4), np.full((1, 3), 1 / 3)), atol=1e-6)


TENSOR_LAYERS = {
    "exact": {},
    "causal, bounded": {"is_causal": "both", "logit_bound": 2.0},
    "polynomial": {"method": functools.partial(tensor_polynomial, degree=2), "is_causal": "ordered"},
    "order 4, no null token": {"order": 4, "null_token": False},
    "order 2": {"order": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TENSOR_LAYERS)
def test_tensor_layers_train_every_array_and_mask_padding(name):
    layer = ours.TensorAttention(8, num_heads=2, head_dim=4, rngs=RNGS(0), **TENSOR_LAYERS[name])
    x = jax.random.normal(jax.random.key(0), (2, 6, 8))
    real = jnp.arange(6)[None] < jnp.array([6, 4])[:, None]

    def loss(layer):
        return jnp.sum(layer(x, kv_mask=real)[:, :4] ** 2)

    gradient = flax_nnx.jit(flax_nnx.grad(loss))(layer)
    for path, leaf in jax.tree.leaves_with_path(flax_nnx.to_pure_dict(gradient)):
        assert np.all(np.isfinite(leaf)), path
        # A bias of the keys of a set changes the logits, but at order 2 it shifts all of them equally.
        if not (name == "order 2" and "keys" in str(path) and "bias" in str(path)):
            assert np.abs(leaf).max() > 0, path
    other = x.at[1, 4:].set(7.0)
    np.testing.assert_allclose(layer(other, kv_mask=real)[:, :4], layer(x, kv_mask=real)[:, :4], atol=1e-5)
    if TENSOR_LAYERS[name].get("is_causal"):
        np.testing.assert_allclose(layer(x.at[:, 3:].set(5.0))[:, :3], layer(x)[:, :3], atol=1e-5)


TREE_LAYERS = {
    "exact, causal": {"is_causal": True},
    "binary, by favor": {"parents": (-1, 0, 0), "method": "favor", "num_features": 16},
    "one node": {"parents": (-1,)},
}


@pytest.mark.parametrize("name", TREE_LAYERS)
def test_tree_layers_train_every_array_and_mask_padding(name):
    options = TREE_LAYERS[name]
    layer = ours.TreeAttention(8, num_heads=2, head_dim=4, rngs=RNGS(0), **options)
    x = np.random.default_rng(0).normal(size=(2, 6, 8)).astype(np.float32)
    real = np.arange(6)[None] < np.array([[6], [4]])

    def loss(layer, x):
        out = layer(x, kv_mask=real)
        return jnp.sum(out[:, :3] ** 2), out

    step = flax_nnx.jit(flax_nnx.grad(loss, has_aux=True))
    gradient, out = step(layer, x)
    for path, leaf in jax.tree.leaves_with_path(flax_nnx.to_pure_dict(gradient)):
        assert np.all(np.isfinite(leaf)), path
        # A bias of the keys of a node shifts all logits of a query equally, without effect.
        if "keys" not in str(path) or "bias" not in str(path):
            assert np.abs(np.asarray(leaf)).max() > 0, path
    # Later tokens, if causal, and the padding of the second sequence change nothing.
    other = x.copy()
    other[1, 4:] = 7
    if options.get("is_causal"):
        other[:, 3:] = 5
    np.testing.assert_allclose(np.asarray(step(layer, other)[1])[1, :3], np.asarray(out)[1, :3], atol=1e-5)


def test_a_tree_layer_says_what_it_cannot_take():
    make = functools.partial(ours.TreeAttention, 8, num_heads=2, head_dim=4, rngs=RNGS(0))
    with pytest.raises(
        TypeError, match="parents must contain, for at least one node, .* as a tuple of integers; got 3"
    ):
        make(parents=3)
    with pytest.raises(ValueError, match=r"parents must contain, for at least one node, .*; got \(\)"):
        make(parents=())
    with pytest.raises(NotImplementedError, match="method 'rfa' does not support a bias of each key"):
        make(method="rfa")


def test_a_bounded_tensor_layer_computes_in_the_precision_of_its_input(x64):
    rows = np.random.default_rng(0).normal(size=(3, 4))
    expected = rows / np.sqrt(np.mean(rows**2, axis=1, keepdims=True))
    found = _unit_rms(jax.device_put(rows))
    assert found.dtype == jnp.float64
    np.testing.assert_allclose(found, expected, rtol=1e-14)
    assert _unit_rms(jnp.zeros((1, 4), jnp.bfloat16)).dtype == jnp.bfloat16


def test_a_tensor_layer_keeps_its_logits_bounded():
    largest = []

    def recorded(q, keys, values, key, *, scale, kv_mask, is_causal):
        logits = scale * jnp.einsum("id,jd,ld->ijl", q, *keys)
        jax.debug.callback(lambda x: largest.append(float(x)), jnp.max(jnp.abs(logits)))
        return tensor_attention(q, keys, values, key, scale=scale, kv_mask=kv_mask, is_causal=is_causal)

    layer = ours.TensorAttention(8, num_heads=2, head_dim=4, logit_bound=3.0, method=recorded, rngs=RNGS(0))
    x = jax.random.normal(jax.random.key(0), (1, 6, 8))
    layer.query.kernel[...] = 100 * layer.query.kernel[...]
    called(layer, x).block_until_ready()
    # Equal rows in a single channel reach the bound.
    one = jnp.asarray(np.ones((8, 2, 1)) * np.eye(1, 4), jnp.float32)
    for project in (layer.query, *layer.keys):
        project.kernel[...] = one
    called(layer, jnp.ones((1, 6, 8))).block_until_ready()
    jax.effects_barrier()
    assert len(largest) == 4
    assert 0 < max(largest[:2]) <= 3.0 + 1e-5
    assert max(largest[2:]) == pytest.approx(3.0, rel=1e-5)
    with pytest.raises(ValueError, match="logit_bound must be positive, got -1"):
        ours.TensorAttention(8, num_heads=2, head_dim=4, logit_bound=-1.0, rngs=RNGS(0))
