"""Flax's attention layers with this library's exact attention, over the cases of Flax's tests."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from approx_attention import linen as ours_linen
from approx_attention import nnx as ours

pytestmark = pytest.mark.usefixtures("models")

HEADS, DIM, LENGTH = 4, 16, 6


def normal(*shape, seed=0, dtype=jnp.float32):
    return jax.device_put(np.random.default_rng(seed).normal(size=shape).astype(dtype))


def both_nnx(**options):
    """A layer of Flax, and a copy with this library's exact attention."""
    options = {"num_heads": HEADS, "in_features": DIM, "decode": False, **options}
    theirs, mine = (nnx.MultiHeadAttention(**options, rngs=nnx.Rngs(0)) for _ in range(2))
    ours.replace_attention(mine, "exact")
    return theirs, mine


def both_linen(kind=nn.MultiHeadDotProductAttention, is_causal=False, **options):
    fn = ours_linen.ApproxAttention("exact", is_causal=is_causal)
    return kind(HEADS, **options), kind(HEADS, attention_fn=fn, **options)


@nnx.jit(static_argnames=("is_causal",))
def call(layers, *inputs, mask=None, is_causal=False):
    """The outputs of all layers, as one program."""
    return [layer(*inputs, mask=mask, is_causal=is_causal) for layer in layers]


def assert_same(layers, *inputs, atol=1e-5, **options):
    expected, out = call(layers, *inputs, **options)
    assert (out.dtype, out.shape) == (expected.dtype, expected.shape)
    np.testing.assert_allclose(np.asarray(out, np.float32), np.asarray(expected, np.float32), atol=atol)
    return out


def initial(module, *inputs, **options):
    """The variables of a module, which depend on the shapes of its inputs alone; made once for equal modules."""
    return _initial(module, tuple((x.shape, x.dtype) for x in inputs), tuple(options.items()))


@functools.cache
def _initial(module, kinds, options):
    inputs = [np.zeros(shape, dtype) for shape, dtype in kinds]
    return jax.jit(lambda key: module.init(key, *inputs, **dict(options)))(jax.random.key(0))


def assert_same_linen(modules, *inputs, variables=None, atol=1e-5, **options):
    variables = initial(modules[0], *inputs) if variables is None else variables
    expected, out = jax.jit(lambda v: [m.apply(v, *inputs, **options) for m in modules])(variables)
    assert (out.dtype, out.shape) == (expected.dtype, expected.shape)
    np.testing.assert_allclose(np.asarray(out, np.float32), np.asarray(expected, np.float32), atol=atol)
    return out


# 1. nnx: inputs, sizes, types


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_self_attention_with_any_batch_axes(batch, causal):
    assert_same(both_nnx(), normal(*batch, LENGTH, DIM), is_causal=causal)


def test_cross_attention_and_values_that_are_no_keys():
    layers, (q, k, v) = both_nnx(), (normal(2, n, DIM, seed=n) for n in (4, 7, 8))
    assert_same(layers, q, k)
    assert_same(layers, q, k, v[:, :7])


@pytest.mark.parametrize(
    "options",
    [
        {"qkv_features": 32},
        {"out_features": 5},
        {"in_kv_features": 8, "qkv_features": 8, "out_features": 12},
        {"num_kv_heads": 2},
        {"num_kv_heads": 1},
        {"use_bias": False},
        {"normalize_qk": True},
        {"num_kv_heads": 2, "normalize_qk": True, "use_bias": False},
        {"precision": jax.lax.Precision.HIGHEST},
        {"precision": "high"},
    ],
    ids=str,
)
def test_sizes_and_options(options):
    if "num_kv_heads" in options:  # Flax calls the same function of JAX for grouped heads
        assert both_nnx(**options)[1].key.kernel.shape == (DIM, options["num_kv_heads"], DIM // HEADS)
    x = normal(2, LENGTH, DIM)
    kv = normal(2, LENGTH, options.get("in_kv_features", DIM), seed=1)
    assert_same(both_nnx(**options), x, kv)


@pytest.mark.parametrize(
    ("dtype", "param_dtype", "inputs", "expected"),
    [
        (None, jnp.float32, jnp.float32, jnp.float32),
        (None, jnp.float32, jnp.bfloat16, jnp.float32),
        (None, jnp.bfloat16, jnp.bfloat16, jnp.bfloat16),
        (jnp.bfloat16, jnp.float32, jnp.float32, jnp.bfloat16),
        (jnp.float32, jnp.bfloat16, jnp.bfloat16, jnp.float32),
        (jnp.float16, jnp.float16, jnp.float32, jnp.float16),
    ],
)
def test_types_of_computation_parameters_and_inputs(dtype, param_dtype, inputs, expected):
    layers = both_nnx(dtype=dtype, param_dtype=param_dtype)
    x = normal(2, LENGTH, DIM, dtype=inputs)
    if expected == jnp.float16:  # the function of JAX that Flax calls then does not run on CPUs
        (out,) = call(layers[1:], x)
    else:
        out = assert_same(layers, x, atol=1e-5 if expected == jnp.float32 else 0.05)
    assert out.dtype == expected


def test_queries_keys_and_values_of_different_types_are_promoted():
    layers = both_nnx()
    x, y = normal(2, LENGTH, DIM), normal(2, LENGTH, DIM, seed=1, dtype=jnp.bfloat16)
    assert_same(layers, x, y, y)
    fn = ours.ApproxAttention("exact")
    heads = [
        normal(2, LENGTH, HEADS, 8, seed=i, dtype=t) for i, t in enumerate((jnp.float32, jnp.bfloat16, jnp.bfloat16))
    ]
    np.testing.assert_allclose(fn(*heads), nnx.dot_product_attention(*heads), atol=1e-5)


# 2. nnx: masks


REAL = np.arange(LENGTH) < np.array([[LENGTH], [4]])


MASKS = {
    "padding": lambda real: nnx.make_attention_mask(jnp.ones((2, 1)), real),
    "padding of both": lambda real: nnx.make_attention_mask(real, real),
    "causal": lambda real: nnx.make_causal_mask(real),
    "causal and padding": lambda real: nnx.combine_masks(
        nnx.make_causal_mask(real), nnx.make_attention_mask(real, real)
    ),
    "boolean": lambda real: nnx.make_causal_mask(real, dtype=bool),
    "of heads": lambda real: jnp.tril(jnp.ones((1, HEADS, LENGTH, LENGTH))),
}  # fmt: skip


@functools.cache
def masks():
    """All masks, made by one program."""
    return jax.jit(lambda real: {name: make(real) for name, make in MASKS.items()})(REAL)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("causal", [False, True], ids=["", "and is_causal"])
def test_masks_of_flax(name, causal):
    outs = call(both_nnx(), normal(2, LENGTH, DIM), mask=masks()[name], is_causal=causal)
    expected, out = map(np.asarray, outs)
    # A query that sees nothing gets the mean of all values from JAX, and 0 here.
    np.testing.assert_allclose(out[REAL], expected[REAL], atol=1e-5)


def test_masks_with_several_batch_axes():
    x = normal(2, 3, LENGTH, DIM)
    layers, mask = both_nnx(), np.tril(np.ones((2, 3, 1, LENGTH, LENGTH), np.float32))
    (out,) = call(layers[1:], x, mask=mask)
    for expected in call(layers, x, is_causal=True):
        np.testing.assert_allclose(out, expected, atol=1e-5)


def test_masks_without_batch_axes():
    layers, x = both_nnx(), normal(LENGTH, DIM)
    assert_same(layers, x, mask=nnx.make_causal_mask(np.ones(LENGTH, np.float32)))


# 3. nnx: decoding, dropout, weights


@pytest.mark.parametrize("num_kv_heads", [HEADS, 2])
@pytest.mark.parametrize("batch", [(2,), (2, 3)], ids=str)
def test_decoding_with_flaxs_cache(num_kv_heads, batch):
    theirs, mine = both_nnx(num_kv_heads=num_kv_heads)
    x = np.asarray(normal(*batch, LENGTH, DIM))
    (whole,) = call((mine,), x, is_causal=True)
    for layer in (theirs, mine):
        layer.decode = True
        layer.init_cache(x.shape)
    outs = [call((theirs, mine), x[..., t : t + 1, :]) for t in range(LENGTH)]
    theirs_out, mine_out = (np.concatenate(steps, axis=-2) for steps in zip(*outs, strict=True))
    np.testing.assert_allclose(mine_out, theirs_out, atol=1e-5)
    np.testing.assert_allclose(mine_out, whole, atol=1e-5)
    assert int(mine.cache_index[...]) == LENGTH


def test_decoding_with_flaxs_cache_and_is_causal():
    """In Flax 0.12.8 such a step sees the first key only."""
    _, mine = both_nnx()
    x = np.asarray(normal(2, LENGTH, DIM))
    (whole,) = call((mine,), x, is_causal=True)
    mine.decode = True
    mine.init_cache(x.shape)
    outs = [call((mine,), x[:, t : t + 1], is_causal=True)[0] for t in range(LENGTH)]
    np.testing.assert_allclose(np.concatenate(outs, axis=1), whole, atol=1e-5)


def test_flaxs_cache_says_what_it_lacks():
    _, mine = both_nnx()
    mine.decode = True
    with pytest.raises(ValueError, match="not initialized"):
        mine(normal(2, 1, DIM))
    mine.init_cache((2, LENGTH, DIM))
    with pytest.raises(ValueError, match="cache shape error"):
        mine(normal(2, 2, DIM))


@pytest.mark.parametrize("in_call", [None, False, True])
@pytest.mark.parametrize("made", [False, True])
def test_flags_of_dropout(made, in_call):
    """Flags of the call override those of the layer; dropout is an error only if it is on."""
    theirs, mine = both_nnx(dropout_rate=0.5, deterministic=made)
    x = normal(2, LENGTH, DIM)
    off = made if in_call is None else in_call
    options = {} if in_call is None else {"deterministic": in_call}
    if off:
        np.testing.assert_allclose(mine(x, **options), theirs(x, **options), atol=1e-5)
    else:
        with pytest.raises(NotImplementedError, match=r"'exact' does not support dropout .*dropout_rate=0.5"):
            mine(x, **options)
    mine.eval()
    theirs.eval()
    np.testing.assert_allclose(mine(x), theirs(x), atol=1e-5)


def test_layers_without_dropout_need_no_flag():
    theirs, mine = both_nnx(keep_rngs=False)
    np.testing.assert_allclose(mine(normal(2, LENGTH, DIM)), theirs(normal(2, LENGTH, DIM)), atol=1e-5)


@pytest.mark.parametrize("options", [{"dropout_rate": 0.5}, {"dropout_rate": 0.5, "keep_rngs": False}], ids=str)
def test_dropout_on_the_output_draws_from_the_streams_of_flax(options):
    def drop(layer, x, **more):
        return layer(x, deterministic=False, **more)

    _, mine = both_nnx(**options)
    ours.replace_attention(mine, "exact", dropout="output")
    x = normal(2, LENGTH, DIM)
    one, same = (drop(mine, x, rngs=nnx.Rngs(dropout=1)) for _ in range(2))
    np.testing.assert_array_equal(one, same)
    assert np.abs(drop(mine, x, rngs=nnx.Rngs(dropout=2)) - one).max() > 1e-3
    if "keep_rngs" in options:
        with pytest.raises(ValueError, match="rngs"):
            drop(mine, x)
    else:
        assert np.abs(drop(mine, x) - drop(mine, x)).max() > 1e-3


def test_there_are_no_weights_to_sow():
    _, mine = both_nnx()
    with pytest.raises(NotImplementedError, match=r"'exact' does not support module \(sow_weights"):
        mine(normal(2, LENGTH, DIM), sow_weights=True)


def test_gradients_of_parameters_and_inputs():
    layers, x = both_nnx(num_kv_heads=2), normal(2, LENGTH, DIM)
    gradient = nnx.grad(lambda layer, x: jnp.sum(layer(x, is_causal=True) ** 2), argnums=(0, 1))
    found = nnx.jit(lambda layers, x: [gradient(layer, x) for layer in layers])(layers, x)
    (theirs, x_theirs), (mine, x_mine) = found
    np.testing.assert_allclose(x_mine, x_theirs, atol=1e-4)
    mine, theirs = (nnx.to_pure_dict(state) for state in (mine, theirs))
    for part in theirs:
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), mine[part], theirs[part])


# 4. Linen


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
def test_linen_self_and_cross_attention(batch):
    modules = both_linen()
    x, y = normal(*batch, LENGTH, DIM), normal(*batch, 9, DIM, seed=1)
    assert_same_linen(modules, x)
    assert_same_linen(modules, x, y, normal(*batch, 9, DIM, seed=2))


@pytest.mark.filterwarnings("ignore:SelfAttention will be deprecated")
@pytest.mark.parametrize("kind", [nn.MultiHeadAttention, nn.SelfAttention], ids=lambda kind: kind.__name__)
def test_linen_layers_of_other_names(kind):
    assert_same_linen(both_linen(kind), normal(2, LENGTH, DIM))


@pytest.mark.parametrize(
    "options",
    [
        {"qkv_features": 32, "out_features": 5},
        {"use_bias": False},
        {"normalize_qk": True},
        {"precision": jax.lax.Precision.HIGHEST},
        {"force_fp32_for_softmax": True},
        {"dtype": jnp.bfloat16},
        {"param_dtype": jnp.bfloat16},
    ],
    ids=str,
)
def test_linen_sizes_types_and_options(options):
    atol = 0.05 if "dtype" in options else 1e-5
    assert_same_linen(both_linen(**options), normal(2, LENGTH, DIM), atol=atol)


@pytest.mark.parametrize("name", MASKS)
def test_linen_masks(name):
    x, modules, mask = normal(2, LENGTH, DIM), both_linen(), masks()[name]
    variables = initial(modules[0], x)
    expected, out = (np.asarray(m.apply(variables, x, mask=mask)) for m in modules)
    np.testing.assert_allclose(out[REAL], expected[REAL], atol=1e-5)


def test_linen_causality_is_a_field():
    x = normal(2, LENGTH, DIM)
    plain, causal = nn.MultiHeadDotProductAttention(HEADS), both_linen(is_causal=True)[1]
    variables = initial(plain, x)
    expected = plain.apply(variables, x, mask=nn.make_causal_mask(x[..., 0]))
    np.testing.assert_allclose(causal.apply(variables, x), expected, atol=1e-5)


@pytest.mark.parametrize("batch", [(2,), (2, 3)], ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal field"])
def test_linen_decoding_with_its_cache(batch, is_causal):
    x = normal(*batch, LENGTH, DIM)
    modules = both_linen(decode=True, is_causal=is_causal)
    whole = both_linen()[0]
    variables = [initial(module, x) for module in modules]
    params, caches = variables[1]["params"], [each["cache"] for each in variables]

    @jax.jit
    def step(params, caches, x):
        both = zip(modules, caches, strict=True)
        return [m.apply({"params": params, "cache": cache}, x, mutable=["cache"]) for m, cache in both]

    outs = []
    for t in range(LENGTH):
        out, changed = zip(*step(params, caches, np.asarray(x)[..., t : t + 1, :]), strict=True)
        caches = [each["cache"] for each in changed]
        outs.append(out)
    theirs, mine = (np.concatenate(steps, axis=-2) for steps in zip(*outs, strict=True))
    np.testing.assert_allclose(mine, theirs, atol=1e-5)
    expected = jax.jit(lambda p, x: whole.apply({"params": p}, x, mask=nn.make_causal_mask(x[..., 0])))(params, x)
    np.testing.assert_allclose(mine, expected, atol=1e-5)


@pytest.mark.parametrize("in_call", [False, True])
def test_linen_flags_of_dropout(in_call):
    theirs, mine = both_linen(dropout_rate=0.5)
    x = normal(2, LENGTH, DIM)
    variables = initial(theirs, x, deterministic=True)
    if in_call:
        assert_same_linen((theirs, mine), x, variables=variables, deterministic=True)
    else:
        with pytest.raises(NotImplementedError, match=r"'exact' does not support dropout .*dropout_rate=0.5"):
            mine.apply(variables, x, deterministic=False, rngs={"dropout": jax.random.key(1)})


def test_linen_dropout_takes_a_key_in_the_call():
    fn = ours_linen.ApproxAttention("exact", dropout="output")
    module = nn.MultiHeadDotProductAttention(HEADS, dropout_rate=0.5, deterministic=False, attention_fn=fn)
    x = normal(2, LENGTH, DIM)
    variables = jax.jit(module.init)({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x)
    one, same, other = (module.apply(variables, x, dropout_rng=jax.random.PRNGKey(i)) for i in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-3


def test_linen_has_no_weights_to_sow():
    _, mine = both_linen()
    variables = initial(mine, normal(2, LENGTH, DIM))
    with pytest.raises(NotImplementedError, match=r"'exact' does not support module \(sow_weights"):
        mine.apply(variables, normal(2, LENGTH, DIM), sow_weights=True, mutable=["intermediates"])


def test_linen_einsums_of_weights_have_no_meaning():
    module = both_linen(qk_attn_weights_einsum_cls=lambda: jnp.einsum)[1]
    with pytest.raises(NotImplementedError, match="'exact' does not support qk_attn_weights_einsum"):
        initial(module, normal(2, LENGTH, DIM))


def test_linen_gradients():
    modules, x = both_linen(), normal(2, LENGTH, DIM)
    variables = initial(modules[0], x)
    gradients = [jax.grad(lambda v, m=m: jnp.sum(m.apply(v, x) ** 2)) for m in modules]
    theirs, mine = jax.jit(lambda v: [gradient(v) for gradient in gradients])(variables)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), mine, theirs)


# 5. both frameworks


def test_nnx_and_linen_agree():
    layer, x = both_nnx()[1], normal(2, LENGTH, DIM)
    params = {
        part: {"kernel": getattr(layer, part).kernel[...], "bias": getattr(layer, part).bias[...]}
        for part in ("query", "key", "value", "out")
    }
    mask = masks()["padding"]
    twin = both_linen()[1].apply({"params": params}, x, mask=mask)
    np.testing.assert_allclose(twin, layer(x, mask=mask), atol=1e-6)
