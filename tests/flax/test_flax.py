"""The adapters for Flax: arguments, errors, state, replacement in a model, and decoding."""

import functools
import inspect
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from approx_attention import METHODS, attention, exact
from approx_attention import linen as ours_linen
from approx_attention import nnx as ours
from tests.cases import lifted, settings, unless_slow
from tests.programs import equations
from tests.references import having, random_heads

pytestmark = pytest.mark.usefixtures("models")

HEADS, DIM = 4, 32


def layer_of(method, rngs=None, num_kv_heads=None, **options):
    rngs = nnx.Rngs(0) if rngs is None else rngs
    fn = method if isinstance(method, nnx.Module) else ours.ApproxAttention(method, rngs=rngs, **options)
    return nnx.MultiHeadAttention(
        HEADS, DIM, num_kv_heads=num_kv_heads, attention_fn=fn, decode=False, deterministic=True, rngs=rngs
    )


@functools.partial(nnx.jit, static_argnames="is_causal")
def run(layer, x, mask=None, *, is_causal=False):
    """Call a layer as one compiled program for all layers of one form."""
    return layer(x, mask=mask, is_causal=is_causal)


@functools.cache
def tokens(length=12, batch=2, seed=0):
    return jax.device_put(np.random.default_rng(seed).normal(size=(batch, length, DIM)).astype(np.float32))


def padding(lengths, length, dtype=jnp.float32):
    return jax.device_put((np.arange(length) < np.array(lengths)[:, None])[:, None, None, :].astype(dtype))


@functools.cache
def favor():
    return layer_of("favor", num_features=8, num_kv_heads=2)


# 1. arguments that reach a method


@lifted
def test_both_adapters_are_attention(name):
    is_causal, x, mask = METHODS[name].capabilities.causal, tokens(), padding([12, 7], 12)
    layer = layer_of(name, **settings(name))
    stream = layer.attention_fn.stream
    heads = [project(x) for project in (layer.query, layer.key, layer.value)]
    rng = None if stream is None else stream.key[...]
    options = {"method": name, "rng": rng, "is_causal": is_causal, **settings(name)}
    expected = layer.out(attention(*heads, mask=mask > 0, **options))
    np.testing.assert_allclose(layer(x, mask=mask, is_causal=is_causal), expected, atol=1e-5)

    fn = ours_linen.ApproxAttention(name, settings(name), is_causal=is_causal)
    variables = {"params": {}}
    for part in ("query", "key", "value", "out"):
        module = getattr(layer, part)
        variables["params"][part] = {"kernel": module.kernel[...], "bias": module.bias[...]}
    if rng is not None:
        variables["draws"] = {"attention_fn": {"key": jax.random.key_data(rng)}}
    twin = nn.MultiHeadDotProductAttention(HEADS, attention_fn=fn)
    np.testing.assert_allclose(twin.apply(variables, x, mask=mask), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [bool, jnp.float32, jnp.bfloat16, jnp.int32])
def test_padding_masks_of_any_type(dtype):
    x = tokens()
    soiled = np.array(x)
    soiled[1, 7:] = 3
    mask, soiled = padding([12, 7], 12, dtype), jax.device_put(soiled)
    out, other = (np.asarray(favor()(y, mask=mask, is_causal=True)) for y in (x, soiled))
    np.testing.assert_allclose(other[1, :7], out[1, :7], atol=1e-6)
    unmasked, masked = (np.asarray(favor()(soiled, **options)) for options in ({"is_causal": False}, {"mask": mask}))
    assert np.abs(unmasked - masked)[1].max() > 1e-3


@pytest.mark.all_forms
@pytest.mark.parametrize("name", ["exact", "favor", "mean_value"])
def test_computation_type_and_precision_are_honoured(name):
    fn = ours.ApproxAttention(name, rngs=nnx.Rngs(0), **settings(name))
    query, key, value = random_heads(0, 1, 4, 4, 2, 2)
    assert fn(query, key, value, dtype=jnp.bfloat16).dtype == jnp.bfloat16
    for precision in (jax.lax.Precision.HIGHEST, "highest"):
        jaxpr = jax.make_jaxpr(lambda q, p=precision: fn(q, key, value, precision=p))(query).jaxpr
        found = [x.params["precision"] for x, _ in equations(jaxpr) if x.primitive.name == "dot_general"]
        assert set(found) <= {(jax.lax.Precision.HIGHEST,) * 2}
        assert found or name == "mean_value"


def test_what_a_method_cannot_follow_is_refused():
    x, layer = tokens(), favor()
    with pytest.raises(NotImplementedError, match=r"'favor' .* is_causal=True"):
        layer(x, mask=nnx.make_causal_mask(x[..., 0]))
    with pytest.raises(NotImplementedError, match="sow_weights"):
        layer(x, sow_weights=True)
    with pytest.raises(ValueError, match="additive mask as bias"):
        layer(x, mask=np.where(np.asarray(padding([12, 7], 12)) > 0, np.float32(0), np.float32(-1e9)))
    dropping = layer_of("mean_pool", num_landmarks=4)
    dropping.dropout_rate = 0.1
    with pytest.raises(NotImplementedError, match="Dropout on the output"):
        dropping(x, deterministic=False, rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(dropping(x, deterministic=True), layer_of("mean_pool", num_landmarks=4)(x))
    with pytest.raises(NotImplementedError, match="precision"):
        ours.ApproxAttention("exact")(*random_heads(0, 1, 4, 4, 2, 2), precision=("high", "high"))
    twin = ours_linen.ApproxAttention("favor")
    with pytest.raises(NotImplementedError, match="qk_attn_weights_einsum"):
        twin.init_with_output(jax.random.key(0), *random_heads(0, 1, 4, 4, 2, 2), qk_attn_weights_einsum=jnp.einsum)
    with pytest.raises(NotImplementedError, match=r"'favor' .* is_causal=True"):
        nn.MultiHeadDotProductAttention(HEADS, attention_fn=twin).init(
            jax.random.key(0), x, mask=nn.make_causal_mask(x[..., 0])
        )


@pytest.mark.parametrize(
    "method",
    [
        "exact",
        functools.partial(exact, implementation="dense"),
        lambda q, k, v, key, **options: exact(q, k, v, key, **options),
    ],
    ids=["name", "function", "function of anything"],
)
def test_a_dense_mask_for_methods_that_take_one(method):
    x = tokens()
    layer = layer_of(method)
    mask = jnp.asarray(np.tril(np.ones((2, 1, 12, 12), np.float32)))
    np.testing.assert_allclose(run(layer, x, mask), run(layer, x, is_causal=True), atol=1e-6)


def test_what_attention_asks_for_is_no_option_of_a_linen_layer():
    with pytest.raises(TypeError, match="no argument 'is_causal'"):
        ours_linen.ApproxAttention("mean_pool", {"is_causal": True})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "favour"}, "did you mean 'favor'"),
        ({"method": "favor"}, "is random: pass rngs"),
        ({"method": "favor", "num_feature": 8, "rngs": nnx.Rngs(0)}, "did you mean 'num_features'"),
        ({"method": 3}, "registered name or a function"),
        ({"method": "exact", "redraw": "sometimes"}, "redraw"),
        ({"method": "exact", "redraw": "every_n"}, "give every with"),
        ({"method": "exact", "every": 3}, "give every with"),
        ({"method": "mean_pool", "noise": True}, "no noise"),
        ({"method": "favor", "learned": ("projection",), "rngs": nnx.Rngs(0)}, "needs head_dim"),
        ({"method": "favor", "learned": ("w",), "head_dim": 8, "rngs": nnx.Rngs(0)}, "samples no 'w'"),
        ({"method": "favor", "rngs": jax.random.key(0)}, "rngs must be nnx.Rngs"),
        ({"method": nnx.Linear(2, 2, rngs=nnx.Rngs(0))}, "called as LearnedAttention is, .* got Linear"),
        ({"method": "mean_pool", "return_state": True}, "no argument 'return_state'"),
        ({"method": exact, "num_features": 8}, "method 'exact' has no argument 'num_features'"),
        ({"method": "exact", "batch_axis": "data"}, "need a mesh; got None, 'data' and None"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ours.ApproxAttention(**options)


def test_methods_that_draw_nothing_need_no_stream():
    assert ours.ApproxAttention("exact", rngs=nnx.Rngs(params=0)).stream is None


def test_modules_refuse_a_mesh():
    mesh = jax.make_mesh((1,), ("sequence",))
    with pytest.raises(NotImplementedError, match="'Lara' does not support a mesh"):
        ours.ApproxAttention(ours.Lara(8, rngs=nnx.Rngs(0)), mesh=mesh)


def test_every_argument_of_linens_call_is_named():
    """Linen filters arguments by signature: one that is not named is dropped silently."""
    reference = inspect.signature(nn.dot_product_attention).parameters
    named = inspect.signature(ours_linen.ApproxAttention.__call__).parameters
    # The layer passes neither of these two.
    assert set(reference) - set(named) <= {"bias", "einsum_dot_general"}
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in named.values())


# 2. random projections


def test_how_long_a_draw_is_kept():
    x = tokens()
    kept = {
        "never": [True, True, True, True, True],
        "every_call": [False, False, False, False, False],
        "every_n": [True, False, True, False, True],
    }
    for redraw, expected in kept.items():
        more = {"every": 2} if redraw == "every_n" else {}
        layer = layer_of("favor", num_features=8, redraw=redraw, **more)
        outs = [np.asarray(layer(x)) for _ in range(6)]
        assert [bool((a == b).all()) for a, b in itertools.pairwise(outs)] == expected
        viewed = nnx.view(layer, deterministic=True)
        layer.eval()
        # The projection of the last call.
        np.testing.assert_array_equal(layer(x), outs[-1])
        np.testing.assert_array_equal(viewed(x), outs[-1])


def test_the_count_of_calls_moves_under_jit():
    layer = layer_of("favor", num_features=8, redraw="every_call")
    assert np.abs(np.asarray(run(layer, tokens())) - np.asarray(run(layer, tokens()))).max() > 1e-4
    assert int(layer.attention_fn.stream.count[...]) == 2


def test_linen_draws():
    x = tokens()
    for redraw, same in (("never", True), ("every_call", False), ("every_n", True)):
        fn = ours_linen.ApproxAttention(
            "favor", {"num_features": 8}, redraw=redraw, every=2 if redraw == "every_n" else None
        )
        layer = nn.MultiHeadDotProductAttention(HEADS, attention_fn=fn)
        variables = layer.init({"params": jax.random.key(0), "attention": jax.random.key(1)}, x)
        outs = []
        for i in range(3):
            rngs = {"attention": jax.random.key(i)}
            out, changed = layer.apply(variables, x, rngs=rngs, mutable=["draws"])
            variables = {**variables, **changed}
            outs.append(np.asarray(out))
        assert bool((outs[0] == outs[1]).all()) == same
        assert bool((outs[1] == outs[2]).all()) == (redraw == "never")
        if redraw != "every_call":
            np.testing.assert_array_equal(layer.apply(variables, x), outs[-1])
            with pytest.raises(ValueError, match="needs the variables 'draws'"):
                layer.apply({"params": variables["params"]}, x)


@pytest.mark.parametrize("key", [jax.random.PRNGKey(0), jax.random.key(0, impl="rbg")], ids=["old", "rbg"])
@pytest.mark.parametrize("redraw", ["never", "every_call"])
def test_linen_streams_of_any_kind_of_key(key, redraw):
    fn = ours_linen.ApproxAttention("favor", {"num_features": 8}, redraw=redraw, learned=("projection",))
    layer = nn.MultiHeadDotProductAttention(HEADS, attention_fn=fn)
    variables = layer.init(key, tokens())
    assert np.isfinite(layer.apply(variables, tokens(), rngs={"attention": key})).all()


def test_noise_is_off_unless_asked_for():
    x = tokens()
    silent, noisy = (layer_of("lara", num_landmarks=4, noise=noise) for noise in (False, True))
    assert silent.attention_fn.stream is None
    assert np.abs(np.asarray(run(silent, x)) - np.asarray(run(noisy, x))).max() > 1e-4


# 3. learned and saved state, and transformations


def test_learned_draws_are_parameters_with_gradients():
    layer = layer_of("favor", num_features=8, learned=("projection",), head_dim=8)
    gradient = nnx.jit(nnx.grad(lambda layer: jnp.sum(layer(tokens()) ** 2)))(layer)
    assert np.abs(np.asarray(gradient["attention_fn"]["learned"]["projection"][...])).max() > 0
    fn = ours_linen.ApproxAttention("favor", {"num_features": 8}, learned=("projection",))
    twin = nn.MultiHeadDotProductAttention(HEADS, attention_fn=fn)
    variables = jax.eval_shape(twin.init, jax.random.key(0), tokens())
    assert variables["params"]["attention_fn"]["projection"].shape == (8, 8)


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    [
        lambda: ours.eva_official(8, HEADS, window_size=4, num_chunks=4, rngs=nnx.Rngs(1)),
        lambda: ours.Lara(8, num_landmarks=4, rngs=nnx.Rngs(1)),
        lambda: ours.LinformerAttention(HEADS, 12, num_slots=4, rngs=nnx.Rngs(1)),
        lambda: ours.Rfa(8, HEADS, options={"num_features": 8}, rngs=nnx.Rngs(1)),
    ],
    ids=["eva", "lara", "linformer", "rfa"],
)
def test_modules_with_learned_parts(module):
    fn = ours.ApproxAttention(module(), rngs=nnx.Rngs(2))
    layer, x, mask = layer_of(fn), tokens(), padding([12, 7], 12)
    out = layer(x, mask=mask)
    np.testing.assert_allclose(layer(x.at[1, 7:].set(9.0), mask=mask)[1, :7], out[1, :7], atol=1e-5)
    gradient = nnx.grad(lambda layer: jnp.sum(layer(x) ** 2))(layer)
    learned = jax.tree.leaves(nnx.to_pure_dict(gradient)["attention_fn"]["method"])
    assert learned
    assert all(np.abs(leaf).max() > 0 for leaf in learned)
    with pytest.raises(ValueError, match="the call requests causal"):
        layer(x, is_causal=True)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [(), (1, 2)])
def test_modules_take_any_number_of_batch_axes(batch):
    heads, mask = random_heads(0, 2, 12, 12, HEADS, HEADS), padding([12, 7], 12) > 0
    eva = ours.eva_official(8, HEADS, window_size=4, num_chunks=4, rngs=nnx.Rngs(1))
    for module in (eva, ours.Lara(8, num_landmarks=4, rngs=nnx.Rngs(1))):
        fn = ours.ApproxAttention(module)
        *one, its_mask = (x.reshape(*batch, *x.shape[1:]) if batch else x[1] for x in (*heads, mask))
        expected = fn(*heads, mask=mask)
        np.testing.assert_allclose(fn(*one, mask=its_mask), expected[None] if batch else expected[1], atol=1e-6)


def test_a_causal_module_in_flaxs_own_cache():
    layer = layer_of(ours.ApproxAttention(ours.evabyte(8, HEADS, window_size=4, chunk_size=2, rngs=nnx.Rngs(1))))
    layer.decode = True
    layer.init_cache((2, 6, DIM))
    with pytest.raises(NotImplementedError, match="would see the first key only"):
        layer(tokens(1))


def test_orbax_round_trip(tmp_path):
    options = {"num_features": 8, "redraw": "every_call", "learned": ("projection",), "head_dim": 8}
    layer, x = layer_of("favor", **options), tokens()
    run(layer, x)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.to_pure_dict(nnx.state(layer)))
        checkpointer.wait_until_finished()
        other = layer_of("favor", rngs=nnx.Rngs(5), **options)
        state = nnx.state(other)
        template = jax.tree.map(ocp.utils.to_shape_dtype_struct, nnx.to_pure_dict(state))
        nnx.replace_by_pure_dict(state, checkpointer.restore(tmp_path / "state", template))
    nnx.update(other, state)
    np.testing.assert_array_equal(run(other, x), run(layer, x))


@pytest.mark.slow
def test_scan_over_layers_and_remat():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stacked(rngs):
        return layer_of("favor", rngs=rngs, num_features=8, redraw="every_call")

    layers, x = stacked(nnx.Rngs(0, attention=1)), tokens()

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def forward(layer, x):
        return x + nnx.remat(lambda layer, x: layer(x, is_causal=True))(layer, x)

    def alone(x):
        graph, state = nnx.split(layers)
        for i in range(3):
            layer = nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], state))
            x = x + layer(x, is_causal=True)
        return x

    expected = alone(x)
    np.testing.assert_allclose(forward(layers, x), expected, atol=1e-5)
    gradient = nnx.grad(lambda layers: jnp.sum(forward(layers, x) ** 2))(layers)
    assert np.isfinite(jax.tree.leaves(nnx.to_pure_dict(gradient))[0]).all()
    np.testing.assert_array_equal(layers.attention_fn.stream.count[...], [2, 2, 2])


# 4. replacing the attention of a model


class Model(nnx.Module):
    def __init__(self, num_layers=2):
        rngs = nnx.Rngs(0)
        sizes = {"num_heads": HEADS, "in_features": DIM, "num_kv_heads": 2, "decode": False}
        self.layers = nnx.List([nnx.MultiHeadAttention(**sizes, rngs=rngs) for _ in range(num_layers)])
        self.head = nnx.Linear(DIM, DIM, rngs=rngs)

    def __call__(self, x, **options):
        for layer in self.layers:
            x = x + layer(x, **options)
        return self.head(x)


@nnx.jit
def _head(head, x):
    return head(x)


def by_layers(model, x, **options):
    """The output of a model, with one program for all of its layers, which are alike."""
    for layer in model.layers:
        x = np.asarray(x) + np.asarray(run(layer, x, **options))
    return np.asarray(_head(model.head, x))


def test_replacing_keeps_parameters_and_answers():
    model, x = Model(), tokens()
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    out = by_layers(model, x, is_causal=True)
    paths = ours.replace_attention(model, "mean_pool", num_landmarks=12, block_size=4)
    assert paths == ["layers.0", "layers.1"]
    np.testing.assert_allclose(by_layers(model, x, is_causal=True), out, atol=1e-5)
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert ours.replace_attention(model, "local", window_size=2, only=lambda path, _: path == "layers.1") == [
        "layers.1"
    ]
    assert [layer.attention_fn.method for layer in model.layers] == ["mean_pool", "local"]
    with pytest.raises(ValueError, match=r"no layer to replace; .* layers\.0"):
        ours.replace_attention(model, "local", only=lambda path, _: False)
    with pytest.raises(ValueError, match="none"):
        ours.replace_attention(model.head, "local")


# 5. decoding in a model


@pytest.mark.parametrize("name", [unless_slow(name) for name in having(decode=True)])
def test_decoding_in_a_model_equals_whole_sequences(name):
    model, x = Model(), tokens(11)
    ours.replace_attention(model, name, is_causal=True, rngs=nnx.Rngs(3), **settings(name))
    x = np.asarray(x)
    expected = by_layers(model, x)
    assert ours.init_cache(model, 2, max_length=16) > 0
    outs = [by_layers(model, x[:, :8])] + [by_layers(model, x[:, t : t + 1]) for t in range(8, 11)]
    np.testing.assert_allclose(np.concatenate(outs, axis=1), expected, atol=1e-5)
    assert int(model.layers[0].attention_fn.num_seen) == 11
    for layer in model.layers:
        layer.attention_fn.drop_cache()
    np.testing.assert_allclose(by_layers(model, x), expected, atol=1e-6)


def test_a_cache_in_few_bits():
    model, x = Model(1), tokens(9)
    ours.replace_attention(model, "exact", is_causal=True)
    expected = by_layers(model, np.asarray(x))
    whole, taken = (ours.init_cache(model, 2, max_length=1024, cache_bits=bits) for bits in (None, 8))
    assert taken < 0.6 * whole
    np.testing.assert_allclose(by_layers(model, np.asarray(x)), expected, atol=1e-5)  # all tokens are recent
    ours.replace_attention(model, "mean_pool", num_landmarks=4, block_size=4, is_causal=True)
    with pytest.raises(NotImplementedError, match="cache_bits needs a summary that keeps tokens unchanged"):
        ours.init_cache(model, 2, cache_bits=8)


def test_decoding_sequences_of_their_own_lengths():
    model, x = Model(1), tokens(9)
    ours.replace_attention(model, "mean_pool", num_landmarks=4, block_size=4, is_causal=True)
    expected = by_layers(model, np.asarray(x)[1:, :5])
    ours.init_cache(model, 2, ragged=True)
    with pytest.raises(ValueError, match="padding must be on the right"):
        model(x, mask=1 - np.asarray(padding([9, 4], 9)))
    with pytest.raises(ValueError, match=r"\[B, 1, 1, T\] = \[2, 1, 1, 9\], got shape \(2, 1, 1, 12\)"):
        model(x, mask=padding([9, 4], 12))
    # A compiled call cannot raise and returns NaN: the second sequence has padding on its left, the first has none.
    fn, heads = model.layers[0].attention_fn, random_heads(0, 2, 9, 9, HEADS, 2)
    padded_left = padding([9, 4], 9)[..., ::-1]
    out = nnx.jit(lambda fn, mask: fn(*heads, mask=mask))(fn, padded_left)
    np.testing.assert_array_equal(np.isnan(out).all((1, 2, 3)), [False, True])
    np.testing.assert_array_equal(np.isnan(out).any((1, 2, 3)), [False, True])
    model = Model(1)
    ours.replace_attention(model, "mean_pool", num_landmarks=4, block_size=4, is_causal=True)
    nnx.jit(lambda model: ours.init_cache(model, 2, ragged=True))(model)
    prompt = model(x, mask=padding([9, 4], 9))  # not compiled, so that the values of the mask are checked
    step = nnx.jit(lambda model, x: model(x))(model, np.stack([np.asarray(x)[0, :1], np.asarray(x)[1, 4:5]]))
    np.testing.assert_allclose(np.concatenate([np.asarray(prompt)[1, :4], np.asarray(step)[1]]), expected[0], atol=1e-5)
    np.testing.assert_array_equal(model.layers[0].attention_fn.num_seen, [10, 5])


@pytest.mark.parametrize("name", ["exact", "favor"])
def test_flaxs_own_cache(name):
    """One token at a time, with all keys kept: Flax's mask of the generated tokens is a padding mask."""
    layer, x = layer_of(name, num_kv_heads=2, **settings(name)), tokens(6)
    layer.decode = True
    layer.init_cache((2, 6, DIM))
    last = [run(layer, np.asarray(x)[:, t : t + 1], is_causal=True) for t in range(6)][-1]
    layer.decode = False
    np.testing.assert_allclose(np.asarray(last)[:, 0], np.asarray(run(layer, x))[:, -1], atol=1e-5)


def test_what_cannot_decode_says_so():
    model = Model()
    with pytest.raises(ValueError, match="must have an ApproxAttention"):
        ours.init_cache(model, 2)
    with pytest.raises(ValueError, match="no layer of the Linear"):
        ours.init_cache(model.head, 2)
    ours.replace_attention(model, "mean_pool", num_landmarks=4)
    ours.replace_attention(model, "nystrom", num_landmarks=4, only=lambda path, _: path == "layers.1")
    with pytest.raises(NotImplementedError, match="'nystrom' has no running summary"):
        ours.init_cache(model, 2)
    assert model.layers[0].attention_fn.cache is None
    ours.replace_attention(model, "exact")
    ours.init_cache(model, 2, max_length=16, ragged=True)
    with pytest.raises(ValueError, match=r"the real tokens of this call: .* got shape \(2, 1, 12, 12\)"):
        model(tokens(), mask=nnx.make_causal_mask(tokens()[..., 0]))
    ours.replace_attention(model, "nystrom", num_landmarks=4)
    with pytest.raises(NotImplementedError, match="'nystrom' has no running summary"):
        ours.init_cache(model, 2)
    ours.replace_attention(model, lambda q, k, v, key: q)
    with pytest.raises(NotImplementedError, match="does not support decoding"):
        ours.init_cache(model, 2)
    mesh = jax.make_mesh((1,), ("sequence",))
    with pytest.raises(NotImplementedError, match="with a mesh does not support decoding"):
        ours.ApproxAttention("mean_pool", mesh=mesh).init_cache(2, 2, 8)
    with pytest.raises(ValueError, match="would hide all keys but the first"):
        ours.ApproxAttention("exact")(*random_heads(0, 1, 1, 4, 2, 2), is_causal=True)
