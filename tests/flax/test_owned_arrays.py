"""Arrays given by the caller, as state of a layer: used in every call, saved, mapped and not trained."""

import functools

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization

from approx_attention import HeadsDecoder, Proposal, attention, fit_proposal
from approx_attention import linen as ours_linen
from approx_attention import nnx as ours
from approx_attention.kernels import export_checks
from tests.references import as_array, random_heads

HEADS, DIM, LENGTH = 2, 8, 12
OPTIONS = {"num_features": 16, "block_size": 4}
KEY = jax.random.key(3)


@functools.cache
def heads():
    return random_heads(0, 2, LENGTH, LENGTH, HEADS, HEADS)


@functools.cache
def proposals():
    """Proposals of each key head, fitted to the first sequence."""
    query, key, _ = (np.moveaxis(np.asarray(x)[0], 1, 0) for x in heads())
    return jax.jit(jax.vmap(fit_proposal))(2 * query, key)


@functools.cache
def projection():
    return as_array(np.random.default_rng(4).normal(size=(16, DIM)))


# Arrays for all heads, for each head, and both; given arrays are not sampled.
GIVEN = {
    "shared": ({"proposal": Proposal(as_array(np.full(DIM, 0.1)), as_array(1.2 * np.eye(DIM)))}, {}),
    "per head": ({}, {"proposal": 0}),
    "both": ({"projection": 0}, {"proposal": 0}),
}


def given(kind):
    made = {"proposal": proposals, "projection": projection}
    return [{name: x if isinstance(x, Proposal) else made[name]() for name, x in one.items()} for one in GIVEN[kind]]


def nnx_layer(kind, **more):
    shared, per_head = given(kind)
    return ours.ApproxAttention("favor", per_head=per_head, **shared, rngs=nnx.Rngs(attention=1), **OPTIONS, **more)


@nnx.jit
def run(layer, *tensors):
    return layer(*tensors, is_causal=True)


@functools.partial(jax.jit, static_argnames="kind")
def expected(kind, rng):
    shared, per_head = given(kind)
    options = {"method": "favor", "is_causal": True, **OPTIONS, **shared}
    return attention(*heads(), rng=rng, per_head=per_head, **options)


@pytest.mark.parametrize("kind", GIVEN)
def test_a_layer_of_nnx_passes_its_arrays(kind):
    layer = nnx_layer(kind)
    drawn = None if layer.stream is None else layer.stream.key[...]
    assert (drawn is None) == (kind == "both")
    np.testing.assert_allclose(run(layer, *heads()), expected(kind, drawn), atol=1e-6)
    # They are variables, so that a program follows their changes, and no parameters, so that optimisers skip them.
    assert not jax.tree.leaves(nnx.state(layer, nnx.Param))
    before = run(layer, *heads())
    root = layer.owned.arrays["proposal_root"]
    root[...] = 2 * root[...]
    assert np.abs(np.asarray(run(layer, *heads())) - np.asarray(before)).max() > 1e-3


def test_a_cache_of_nnx_has_the_arrays_of_its_heads():
    layer = nnx_layer("both")
    decoded = nnx_layer("both")
    nnx.jit(lambda layer: layer.init_cache(2, HEADS, DIM))(decoded)
    # One program for all pieces; blocks have four tokens.
    outs = [run_step(decoded, *(np.asarray(x)[:, t : t + 3] for x in heads())) for t in range(0, LENGTH, 3)]
    np.testing.assert_allclose(np.concatenate(outs, axis=1), run(layer, *heads()), atol=1e-5)
    shared, per_head = given("both")
    decoder = HeadsDecoder("favor", num_kv_heads=HEADS, head_dim=DIM, **shared, **OPTIONS)
    cache = jax.eval_shape(lambda: decoder.init(2, per_head=per_head))
    assert jax.tree.structure(cache) == jax.tree.structure(decoded._cached()[0])


@nnx.jit
def run_step(layer, *tensors):
    return layer(*tensors)


def test_they_are_saved_restored_and_exported(tmp_path):
    layer, other = nnx_layer("both"), nnx_layer("both")
    for variable in jax.tree.leaves(other.owned.arrays, is_leaf=lambda x: isinstance(x, nnx.Variable)):
        variable[...] = 0.5 * variable[...]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.to_pure_dict(nnx.state(layer)))
        checkpointer.wait_until_finished()
        state = nnx.state(other)
        template = jax.tree.map(ocp.utils.to_shape_dtype_struct, nnx.to_pure_dict(state))
        nnx.replace_by_pure_dict(state, checkpointer.restore(tmp_path / "state", template))
    nnx.update(other, state)
    np.testing.assert_array_equal(run(other, *heads()), run(layer, *heads()))

    graphdef, state = nnx.split(layer)
    program = jax.jit(lambda state, *tensors: nnx.merge(graphdef, state)(*tensors, is_causal=True))
    exported = jax.export.export(program, disabled_checks=export_checks())(state, *heads())
    np.testing.assert_allclose(exported.call(state, *heads()), run(layer, *heads()), atol=1e-6)


def test_given_arrays_can_be_learned():
    layer = nnx_layer("both", learned=("proposal",))
    learned = nnx.to_pure_dict(nnx.state(layer, nnx.Param))["owned"]["arrays"]
    assert list(learned) == ["proposal_mean", "proposal_root"]
    gradient = nnx.jit(nnx.grad(lambda layer: jnp.sum(layer(*heads()) ** 2)))(layer)
    assert all(np.abs(np.asarray(x)).max() > 1e-6 for x in jax.tree.leaves(gradient))


def test_layers_of_a_model_have_their_own():
    class Model(nnx.Module):
        def __init__(self, rngs):
            make = functools.partial(nnx.MultiHeadAttention, HEADS, HEADS * DIM, decode=False, rngs=rngs)
            self.layers = nnx.List([make(), make()])

    model = Model(nnx.Rngs(0))
    for number, path in enumerate(("layers.0", "layers.1")):
        own = {"proposal": jax.tree.map(lambda x, factor=1 + number: factor * x, proposals())}
        options = {"only": lambda at, layer, path=path: at == path, "per_head": own, "projection": projection()}
        assert ours.replace_attention(model, "favor", **options, **OPTIONS) == [path]
    roots = [layer.attention_fn.owned.arrays["proposal_root"][...] for layer in model.layers]
    np.testing.assert_allclose(roots[1], 2 * roots[0])


def linen_layer(kind, **more):
    shared, per_head = ({name: lambda x=x: x for name, x in one.items()} for one in given(kind))
    return ours_linen.ApproxAttention("favor", OPTIONS, is_causal=True, arrays=shared, per_head=per_head, **more)


@pytest.mark.parametrize("kind", GIVEN)
def test_a_layer_of_linen_passes_its_arrays(kind):
    layer = linen_layer(kind)
    variables = jax.jit(layer.init)(KEY, *heads())
    drawn = jax.random.wrap_key_data(variables["draws"]["key"]) if "draws" in variables else None
    assert (drawn is None) == (kind == "both")
    assert "params" not in variables
    apply = jax.jit(layer.apply)
    out = apply(variables, *heads())
    np.testing.assert_allclose(out, expected(kind, drawn), atol=1e-6)
    # Saved and restored.
    empty = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), variables)
    restored = serialization.from_bytes(empty, serialization.to_bytes(variables))
    np.testing.assert_array_equal(apply(restored, *heads()), out)
    with pytest.raises(ValueError, match="apply needs the variables 'fitted' of init"):
        layer.apply({name: x for name, x in variables.items() if name != "fitted"}, *heads())


def test_given_arrays_of_linen_can_be_learned_within_a_layer():
    fn = linen_layer("both", learned=("projection",))
    layer, x = nn.MultiHeadDotProductAttention(HEADS, attention_fn=fn), np.ones((1, LENGTH, HEADS * DIM), np.float32)
    variables = jax.eval_shape(layer.init, KEY, x)
    assert variables["params"]["attention_fn"]["projection"].shape == (16, DIM)
    assert list(variables["fitted"]["attention_fn"]) == ["proposal"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ours.ApproxAttention("rfa", gate_logits=np.ones((4, 2)), rngs=nnx.Rngs(0)), "must be static, got an"),
        (lambda: ours.ApproxAttention("exact", scale=np.float32(2) * jnp.ones(())), "'scale' .* must be static"),
        (lambda: nnx_layer("per head", proposal=proposals()), "given both per_head and for all heads"),
        (lambda: ours.ApproxAttention("favor", per_head={"proposal": 3}), "must be arrays"),
        (lambda: ours.ApproxAttention("favor", per_head={"proposals": np.ones((2, 3))}), "did you mean 'proposal'"),
        (
            lambda: ours.ApproxAttention(ours.Hedgehog(8, 2), per_head={"noise": np.ones((2, 3))}),
            "one method for all heads",
        ),
        (lambda: ours_linen.ApproxAttention("favor", arrays={"proposal": 3}), "arrays must be functions"),
        (lambda: ours_linen.ApproxAttention("favor", arrays={"proposals": projection}), "did you mean 'proposal'"),
        (lambda: ours_linen.ApproxAttention("favor", OPTIONS, arrays={"block_size": projection}), "is given twice"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()
