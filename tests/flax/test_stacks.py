"""Layers stacked by Flax's transforms: a random projection for each, caches for each, run by scan, vmap and remat."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from approx_attention import nnx as ours
from tests.cases import settings
from tests.references import having

pytestmark = pytest.mark.usefixtures("models")

HEADS, DIM = 2, 8


@functools.cache
def _stack_of(sizes):
    def make(rngs):
        return nnx.MultiHeadAttention(HEADS, DIM, decode=False, rngs=rngs)

    for size in reversed(sizes):
        make = nnx.split_rngs(splits=size)(nnx.vmap(make, in_axes=0, out_axes=0))
    return nnx.split(nnx.jit(lambda: make(nnx.Rngs(0)))())


def stack_of(*sizes):
    """Attention layers stacked along leading axes of these sizes, without a method; made once and copied."""
    return nnx.merge(*_stack_of(sizes), copy=True)


def with_method(method="favor", *sizes, rngs=None, **options):
    layers = stack_of(*(sizes or (3,)))
    options = {**settings(method), **options}
    ours.replace_attention(layers, method, rngs=nnx.Rngs(3) if rngs is None else rngs, **options)
    return layers


@functools.cache
def tokens(length=8, batch=2):
    """Inputs in NumPy, because JAX compiles a program for each slice."""
    x = np.random.default_rng(1).normal(size=(batch, length, DIM)).astype(np.float32)
    x.setflags(write=False)  # all tests share it
    return x


@nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
def scanned(layer, x):
    return x + layer(x)


@nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
def scanned_twice(layers, x):
    return scanned(layers, x)


@nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
def scanned_with_remat(layer, x):
    return x + nnx.remat(lambda layer, x: layer(x))(layer, x)


# Compiled once for all tests of the same layers.
run, run_twice = nnx.jit(scanned), nnx.jit(scanned_twice)


@nnx.jit
def one(layer, x):
    return x + layer(x)


@jax.jit
def _leaves_at(state, index):
    return jax.tree.map(lambda leaf: leaf[index], state)


def alone(layers, *index):
    graph, state = nnx.split(layers)
    return nnx.merge(graph, _leaves_at(state, index))


def in_turn(layers, x, count=3):
    """Apply the layers one after the other, without a lifting transform of Flax."""
    for i in range(count):
        x = one(alone(layers, i), x)
    return x


def key_data(layers):
    return np.asarray(jax.random.key_data(layers.attention_fn.stream.key[...]))


def trained(form):
    """The gradient of the sum of squares of the outputs, and the outputs."""

    def loss(layers, x):
        out = form(layers, x)
        return jnp.sum(out**2), out

    return nnx.grad(loss, has_aux=True)


# 1. methods that are random


@pytest.mark.parametrize("method", having(needs_key=True))
def test_every_random_method_runs_on_a_stack(method):
    layers, x = with_method(method), jax.ShapeDtypeStruct((2, 8, DIM), jnp.float32)
    assert layers.attention_fn.stream.key.shape == (3,)

    gradient, out = nnx.eval_shape(lambda layers, x: trained(scanned)(layers, x), layers, x)
    assert out.shape == x.shape
    assert gradient["query"]["kernel"].shape == (3, DIM, HEADS, DIM // HEADS)


@pytest.mark.parametrize(
    ("method", "arrays"),
    [("favor", {"projection": (16, DIM // HEADS)}), ("linformer", {"projection_k": (4, 8)})],
)
def test_given_arrays_have_an_axis_of_the_stack_without_a_stream(method, arrays):
    given = {name: np.random.default_rng(2).normal(size=x).astype(np.float32) for name, x in arrays.items()}
    layers = stack_of(3)
    ours.replace_attention(layers, method, **given)
    kept = jax.tree.leaves(nnx.state(layers.attention_fn))
    assert {x.shape[0] for x in kept} == {3}
    np.testing.assert_allclose(run(layers, tokens()), in_turn(layers, tokens()), atol=1e-5)


def in_vmap(layers, rngs):
    """`replace_attention` on one layer at a time."""

    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(0, 0))
    def put(layer, rngs):
        ours.replace_attention(layer, "favor", **settings("favor"), rngs=rngs)

    put(layers, rngs)


WAYS = {
    "one key": lambda layers: ours.replace_attention(layers, "favor", **settings("favor"), rngs=nnx.Rngs(3)),
    "named": lambda layers: ours.replace_attention(layers, "favor", **settings("favor"), rngs=nnx.Rngs(attention=3)),
    "split": lambda layers: ours.replace_attention(layers, "favor", **settings("favor"), rngs=nnx.Rngs(3).split(3)),
    "vmap": lambda layers: in_vmap(layers, nnx.Rngs(3)),
}


@pytest.mark.parametrize("way", WAYS)
def test_each_layer_of_a_stack_draws_for_itself(way):
    layers, x = stack_of(3), tokens()
    WAYS[way](layers)
    assert len(np.unique(key_data(layers), axis=0)) == 3
    np.testing.assert_allclose(run(layers, x), in_turn(layers, x), atol=1e-5)


def test_scan_remat_jit_and_gradients_of_a_stack():
    layers, x = with_method(), tokens()
    forms = (scanned, scanned_with_remat, in_turn)
    out, remat, expected = (nnx.jit(trained(form))(layers, x) for form in forms)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3, rtol=1e-3), out, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3, rtol=1e-3), remat, expected)


def test_an_ensemble():
    layers, x = with_method(), tokens()
    # The layers have the same parameters, so only their random projections differ.
    graph, params, rest = nnx.split(layers, nnx.Param, ...)
    alike = jax.jit(lambda params: jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), params))
    same = nnx.merge(graph, alike(params), rest)
    outs = np.asarray(nnx.jit(nnx.vmap(lambda layer, x: x + layer(x), in_axes=(0, None)))(same, x))
    for i in range(3):
        np.testing.assert_allclose(outs[i], one(alone(same, i), x), atol=1e-5)
        assert np.abs(outs[i] - outs[i - 1]).max() > 1e-3


def test_a_stack_of_stacks():
    layers, x = with_method("favor", 2, 3), tokens()
    assert len(np.unique(key_data(layers).reshape(6, -1), axis=0)) == 6
    expected = x
    for i in range(2):
        for j in range(3):
            expected = one(alone(layers, i, j), expected)
    np.testing.assert_allclose(run_twice(layers, x), expected, atol=1e-5)
    split = nnx.Rngs(3).split((2, 3))
    assert with_method("favor", 2, 3, rngs=split).attention_fn.stream.key.shape == (2, 3)


def test_stacks_and_single_layers_of_one_model():
    model = nnx.Dict(stack=stack_of(3), single=stack_of(), mlp=nnx.Linear(DIM, DIM, rngs=nnx.Rngs(0)))
    rngs = nnx.Rngs(attention=3)
    assert sorted(ours.replace_attention(model, "favor", num_features=8, rngs=rngs)) == ["single", "stack"]
    data = key_data(model["stack"]), key_data(model["single"])[None]
    assert len(np.unique(np.concatenate(data), axis=0)) == 4
    # A method without randomness takes no key.
    before = int(rngs.attention.count[...])
    ours.replace_attention(model, "mean_pool", num_landmarks=4, rngs=rngs)
    assert int(rngs.attention.count[...]) == before
    assert nnx.eval_shape(lambda layers, x: scanned(layers, x), model["stack"], tokens()).shape == (2, 8, DIM)
    ours.replace_attention(model, "mean_pool", num_landmarks=4, rngs=nnx.Rngs(params=0))


def test_one_layer_in_a_stack_is_a_stack():
    layers, x = with_method("favor", 1), tokens()
    np.testing.assert_allclose(run(layers, x), in_turn(layers, x, count=1), atol=1e-5)


@pytest.mark.parametrize("options", [{"redraw": "every_call"}, {"redraw": "every_n", "every": 2}], ids=str)
def test_new_draws_in_every_layer(options):
    layers, x = with_method(**options), tokens()
    outs = [np.asarray(run(layers, x)) for _ in range(3)]
    np.testing.assert_array_equal(layers.attention_fn.stream.count[...], [3, 3, 3])
    same = [bool((outs[i] == outs[i + 1]).all()) for i in range(2)]
    assert same == [options["redraw"] == "every_n", False]
    # Views for evaluation keep the last projection, and do not advance the count.
    view = nnx.view(layers, deterministic=True)
    np.testing.assert_allclose(run(view, x), outs[-1], atol=1e-6)
    layers.eval()
    np.testing.assert_allclose(run(layers, x), outs[-1], atol=1e-6)
    np.testing.assert_array_equal(layers.attention_fn.stream.count[...], [3, 3, 3])
    layers.train()
    assert (run(layers, x) != outs[-1]).any() or options["redraw"] == "every_n"


def test_learned_draws_of_a_stack():
    layers, x = with_method(learned=("projection",), head_dim=DIM // HEADS), tokens()
    projection = np.asarray(layers.attention_fn.learned["projection"][...])
    assert projection.shape == (3, 8, DIM // HEADS)
    assert np.abs(projection[0] - projection[1]).max() > 0.1
    gradient, out = nnx.jit(trained(scanned))(layers, x)
    np.testing.assert_allclose(out, in_turn(layers, x), atol=1e-5)
    gradient = np.asarray(gradient["attention_fn"]["learned"]["projection"][...])
    assert (np.abs(gradient).max((1, 2)) > 0).all()


def test_the_state_of_a_stack_is_that_of_its_layers():
    layers, x = with_method(), tokens()
    graph, state = nnx.split(layers)
    np.testing.assert_array_equal(run(nnx.merge(graph, state), x), run(layers, x))
    other = with_method(rngs=nnx.Rngs(7))
    assert np.abs(np.asarray(run(other, x)) - np.asarray(run(layers, x))).max() > 1e-3
    nnx.update(other, state)
    np.testing.assert_array_equal(run(other, x), run(layers, x))


def test_a_function_with_noise_on_a_stack():
    def method(q, k, v, key):
        return v + jax.random.normal(key, v.shape)

    layers = stack_of(3)
    ours.replace_attention(layers, method, noise=True, rngs=nnx.Rngs(3))
    np.testing.assert_allclose(run(layers, tokens()), in_turn(layers, tokens()), atol=1e-5)


# 2. decoding


@nnx.jit
def start(layers):
    return ours.init_cache(layers, 2, max_length=16)


@nnx.jit
@nnx.vmap(in_axes=0)
def start_each(layer):
    ours.init_cache(layer, 2, max_length=16)


@pytest.mark.parametrize("method", ["favor", "mean_pool", "exact"])
@pytest.mark.parametrize("inside", [False, True], ids=["on the stack", "in vmap"])
def test_decoding_a_stack_equals_whole_sequences(method, inside):
    layers, x = with_method(method, is_causal=True), tokens()
    whole = run(layers, x)
    if inside:
        start_each(layers)
    else:
        assert start(layers) == layers.attention_fn.cache_bytes
    single = alone(layers, 0)
    assert layers.attention_fn.cache_bytes == 3 * single.attention_fn.cache_bytes > 0
    outs = [run(layers, x[:, :5])] + [run(layers, x[:, t : t + 1]) for t in range(5, 8)]
    np.testing.assert_allclose(np.concatenate(outs, axis=1), whole, atol=1e-5)
    np.testing.assert_array_equal(layers.attention_fn.num_seen, [8, 8, 8])
    layers.attention_fn.drop_cache()
    assert layers.attention_fn.cache_bytes == 0
    np.testing.assert_allclose(run(layers, x), whole, atol=1e-6)


def test_decoding_a_stack_of_stacks_and_sequences_of_their_own_lengths():
    layers, x = with_method("favor", 2, 3, is_causal=True), tokens()
    whole = run_twice(layers, x)
    start(layers)
    outs = [run_twice(layers, x[:, :4]), run_twice(layers, x[:, 4:])]
    np.testing.assert_allclose(np.concatenate(outs, axis=1), whole, atol=1e-5)
    assert layers.attention_fn.num_seen.shape == (2, 3)

    layers = with_method("mean_pool", is_causal=True)
    nnx.jit(lambda layers: ours.init_cache(layers, 2, ragged=True))(layers)
    real = np.arange(8) < np.array([[8], [5]])

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def masked(layer, x):
        return x + layer(x, mask=real[:, None, None])

    nnx.jit(masked)(layers, x)
    np.testing.assert_array_equal(layers.attention_fn.num_seen, [[8, 5]] * 3)


class Own(nnx.Module):
    """A layer whose projections are not `nnx.Linear` layers."""

    def __init__(self, kind, rngs):
        self.num_kv_heads, self.head_dim = HEADS, DIM // HEADS
        shape = (DIM, HEADS, DIM // HEADS)
        if kind == "einsum":
            self.map = nnx.Einsum("btc,chd->bthd", shape, rngs=rngs)
        else:
            self.map = nnx.Param(0.3 * jax.random.normal(rngs.params(), shape))
        self.dropout = nnx.Dropout(0.1, deterministic=True, rngs=rngs) if kind == "dropout" else None
        self.attention_fn = nnx.dot_product_attention

    def __call__(self, x):
        q = self.map(x) if isinstance(self.map, nnx.Einsum) else jnp.einsum("btc,chd->bthd", x, self.map[...])
        return self.attention_fn(q, q, q).reshape(x.shape)


@functools.cache
def _own_stack(kind):
    make = nnx.vmap(lambda rngs: Own(kind, rngs), in_axes=0, out_axes=0)
    return nnx.split(nnx.jit(lambda: nnx.split_rngs(splits=3)(make)(nnx.Rngs(0)))())


def own_stack(kind):
    return nnx.merge(*_own_stack(kind), copy=True)


@pytest.mark.parametrize("kind", ["einsum", "param", "dropout"])
@pytest.mark.parametrize("split", [False, True], ids=["one key", "split"])
def test_stacks_without_linear_layers(kind, split):
    layers, x = own_stack(kind), tokens()
    if kind == "param" and not split:  # nothing shows that it is a stack
        in_vmap(layers, nnx.Rngs(3))
    else:
        rngs = nnx.Rngs(3).split(3) if split else nnx.Rngs(3)
        ours.replace_attention(layers, "favor", num_features=8, is_causal=True, rngs=rngs)
    assert len(np.unique(key_data(layers), axis=0)) == 3
    whole = run(layers, x)
    np.testing.assert_allclose(whole, in_turn(layers, x), atol=1e-5)
    if split:  # from now on the random projections show it
        start(layers)
        outs = [run(layers, x[:, :4]), run(layers, x[:, 4:])]
        np.testing.assert_allclose(np.concatenate(outs, axis=1), whole, atol=1e-5)
        ours.replace_attention(layers, "favor", num_features=8, rngs=nnx.Rngs(4))
        assert layers.attention_fn.stream.key.shape == (3,)
    ours.replace_attention(layers, "mean_pool", num_landmarks=4, rngs=nnx.Rngs(3).split(3))
    assert nnx.eval_shape(lambda layers, x: scanned(layers, x), layers, x).shape == x.shape


def test_one_layer_without_linear_layers_is_alone():
    for kind in ("einsum", "param", "dropout"):
        layer = Own(kind, nnx.Rngs(0))
        ours.replace_attention(layer, "favor", num_features=8, rngs=nnx.Rngs(3))
        assert layer.attention_fn.stream.key.shape == ()
        assert nnx.eval_shape(lambda layer, x: layer(x), layer, tokens()).shape == (2, 8, DIM)


def test_a_failed_start_keeps_the_caches_that_were_there():
    model, x = nnx.Dict(first=with_method("favor", is_causal=True), second=stack_of()), tokens()
    ours.replace_attention(model["second"], "nystrom", num_landmarks=4)
    expected = run(model["first"], x)
    start(model["first"])
    outs = [run(model["first"], x[:, :5])]
    for dtype in (jnp.float32, "foo"):
        with pytest.raises((NotImplementedError, TypeError)):
            ours.init_cache(model, 3, dtype=dtype)
    with pytest.raises(TypeError, match="dtype"):
        model["first"].attention_fn.init_cache(3, 1, 1, dtype="foo")
    outs += [run(model["first"], x[:, t : t + 1]) for t in range(5, 8)]
    np.testing.assert_allclose(np.concatenate(outs, axis=1), expected, atol=1e-5)
    assert model["second"].attention_fn.cache is None

    single = stack_of()
    ours.replace_attention(single, "mean_pool", num_landmarks=4, is_causal=True)
    ours.init_cache(single, 2)
    one(single, x[:, :4])
    for options in ({"dtype": "foo"}, {"ragged": "x"}, {"max_length": -1}):
        with pytest.raises((TypeError, ValueError)):
            ours.init_cache(single, 3, **options)
    one(single, x[:, 4:])
    assert int(single.attention_fn.num_seen) == 8


def test_a_failed_start_leaves_no_cache_on_a_stack():
    layers = with_method("nystrom")
    with pytest.raises(NotImplementedError, match="'nystrom' has no running summary"):
        ours.init_cache(layers, 2)
    assert layers.attention_fn.cache is None


# 3. errors


def test_stacks_that_cannot_be_served():
    with pytest.raises(ValueError, match=r"one for each of \(3,\) stacked layers; got keys of shape \(4,\)"):
        with_method(rngs=nnx.Rngs(0).split(4))
    with pytest.raises(ValueError, match=r"rngs must have one key, got keys of shape \(3,\): .* replace_attention"):
        ours.ApproxAttention("favor", rngs=nnx.Rngs(0).split(3))
    with pytest.raises(ValueError, match=r"one key for layers that are not stacked; got keys of shape \(3,\)"):
        ours.replace_attention(stack_of(), "favor", rngs=nnx.Rngs(0).split(3))
    with pytest.raises(TypeError, match="rngs must be nnx.Rngs"):
        with_method(rngs=jax.random.key(0))
    with pytest.raises(ValueError, match="is random: pass rngs"):
        ours.replace_attention(stack_of(3), "favor")
    axes = nnx.StateAxes({nnx.Param: 1, ...: 0})
    make = nnx.vmap(lambda rngs: nnx.MultiHeadAttention(HEADS, DIM, decode=False, rngs=rngs), out_axes=axes)
    layers = nnx.eval_shape(lambda: nnx.split_rngs(splits=3)(make)(nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"stacked along leading axes, but a kernel of '' has shape \(\d, 3, "):
        ours.replace_attention(layers, "favor", rngs=nnx.Rngs(0))

    @nnx.scan(in_axes=(nnx.StateAxes({nnx.Param: 0, ...: None}), nnx.Carry), out_axes=nnx.Carry)
    def of_parameters(layer, x):
        return layer(x)

    with pytest.raises(ValueError, match=r"for \(3,\) stacked layers, but one layer is called: map nnx.RngState"):
        of_parameters(with_method(), tokens())


def test_nothing_is_replaced_if_not_all_can_be():
    model = nnx.Dict(first=stack_of(3), second=stack_of())
    before = model["first"].attention_fn
    with pytest.raises(ValueError, match=r"got keys of shape \(3,\)"):
        ours.replace_attention(model, "favor", rngs=nnx.Rngs(0).split(3))
    assert model["first"].attention_fn is before
