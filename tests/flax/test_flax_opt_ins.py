"""Features of Flax that need an option here: causal masks, dropout of weights, and models without layers."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from approx_attention import attention
from approx_attention import linen as ours_linen
from approx_attention import nnx as ours
from tests.references import random_heads

pytestmark = pytest.mark.usefixtures("models")

HEADS, DIM, LENGTH = 2, 8, 6
HEAD = DIM // HEADS


def tokens():
    return jax.device_put(np.random.default_rng(0).normal(size=(3, LENGTH, DIM)).astype(np.float32))


REAL = {
    "none": np.ones((3, LENGTH), bool),
    "right": np.arange(LENGTH) < np.array([[6], [4], [1]]),
    "left": np.arange(LENGTH) >= np.array([[0], [2], [5]]),
    "scattered": np.array([[1, 0, 1, 1, 0, 1], [0, 1, 1, 0, 1, 1], [1, 1, 0, 0, 0, 1]], bool),
}
CAUSAL = np.tri(LENGTH, dtype=bool)


@jax.jit
def masks(real):
    """Causal masks with this padding, as models make them: over queries and keys, and over keys alone."""
    causal = nnx.make_causal_mask(real)
    both = nnx.combine_masks(causal, nnx.make_attention_mask(real, real))
    keys = nn.combine_masks(causal, nn.make_attention_mask(jnp.ones_like(real), real))
    return [both, keys, both.astype(bool), jnp.broadcast_to(both, (3, HEADS, LENGTH, LENGTH))]


def as_causal(method, adapter=ours, **options):
    if adapter is ours:
        return ours.ApproxAttention(method, causal_mask="as_is_causal", rngs=nnx.Rngs(0), **options)
    return ours_linen.ApproxAttention(method, options, causal_mask="as_is_causal")


@functools.cache
def exact(adapter):
    """Exact attention with the opt-in, and the same compiled: there a mask cannot be looked at."""
    fn = as_causal("exact", adapter)
    call = fn if adapter is ours else lambda *heads, mask: fn.apply({}, *heads, mask=mask)
    return call, jax.jit(lambda *heads, mask: call(*heads, mask=mask))


# 1. causal masks


@pytest.mark.parametrize("padding", REAL)
@pytest.mark.parametrize("traced", [False, True], ids=["looked at", "traced"])
def test_a_causal_mask_is_causality_and_padding(padding, traced):
    real, heads = REAL[padding], random_heads(0, 3, LENGTH, LENGTH, HEADS, HEADS)
    of_mask, call = ours.ApproxAttention("exact"), exact(ours)[traced]
    for mask in masks(real):
        expected = of_mask(*heads, mask=mask)
        sees = np.asarray(mask > 0)[:, 0].any(-1) & real
        np.testing.assert_allclose(np.asarray(call(*heads, mask=mask))[sees], np.asarray(expected)[sees], atol=1e-5)


@pytest.mark.parametrize("method", ["favor", "mean_pool", "local"])
def test_approximations_follow_the_parts_of_a_causal_mask(method):
    options = {"favor": {"num_features": 8}, "mean_pool": {"num_landmarks": 4}, "local": {"window_size": 2}}[method]
    real, heads = REAL["scattered"], random_heads(0, 3, LENGTH, LENGTH, HEADS, HEADS)
    fn = as_causal(method, **options)
    rng = None if fn.stream is None else fn.stream.key[...]
    padding = jnp.asarray(real)[:, None, None]
    expected = attention(*heads, mask=padding, method=method, is_causal=True, rng=rng, **options)
    for mask in masks(real):
        np.testing.assert_allclose(np.asarray(fn(*heads, mask=mask))[real], np.asarray(expected)[real], atol=1e-6)
    twin = as_causal(method, ours_linen, **options)
    out = twin.apply({"draws": {"key": jax.random.key_data(rng)}} if rng is not None else {}, *heads, mask=mask)
    np.testing.assert_allclose(np.asarray(out)[real], np.asarray(expected)[real], atol=1e-6)


def test_layers_of_both_kinds_take_causal_masks():
    x, real = tokens(), REAL["right"]
    mask = masks(real)[0]
    layer = nnx.MultiHeadAttention(HEADS, DIM, decode=False, rngs=nnx.Rngs(0))
    expected = layer(x, mask=mask)
    assert ours.replace_attention(layer, "exact", causal_mask="as_is_causal") == [""]
    for call in (lambda layer, x, mask: layer(x, mask=mask), nnx.jit(lambda layer, x, mask: layer(x, mask=mask))):
        np.testing.assert_allclose(np.asarray(call(layer, x, mask))[real], np.asarray(expected)[real], atol=1e-5)
    # A mask that is a constant of a program can be checked.
    constant = np.asarray(mask) > 0
    inside = nnx.jit(lambda layer, x: layer(x, mask=constant))(layer, x)
    np.testing.assert_allclose(np.asarray(inside)[real], np.asarray(expected)[real], atol=1e-5)
    kept = nnx.jit(lambda layer, x: layer(x, mask=~constant))(layer, x)
    sees = ~constant.all(-1)[:, 0]
    ours.replace_attention(layer, "exact")
    np.testing.assert_allclose(np.asarray(kept)[sees], np.asarray(layer(x, mask=~mask.astype(bool)))[sees], atol=1e-5)
    ours.replace_attention(layer, "mean_pool", num_landmarks=4, causal_mask="as_is_causal")
    with pytest.raises(NotImplementedError, match="padding masks, causal masks and their combination"):
        nnx.jit(lambda layer, x: layer(x, mask=~constant))(layer, x)

    plain = nn.MultiHeadDotProductAttention(HEADS)
    variables = plain.init(jax.random.key(0), x)
    expected = plain.apply(variables, x, mask=mask)
    out = nn.MultiHeadDotProductAttention(HEADS, attention_fn=as_causal("exact", ours_linen)).apply(
        variables, x, mask=mask
    )
    np.testing.assert_allclose(np.asarray(out)[real], np.asarray(expected)[real], atol=1e-5)


def test_causal_masks_without_batch_axes():
    query, key, value = (x[0] for x in random_heads(0, 1, LENGTH, LENGTH, HEADS, HEADS))
    expected = as_causal("exact")(query, key, value, is_causal=True)
    for mask in (CAUSAL, CAUSAL[None], np.broadcast_to(CAUSAL, (HEADS, LENGTH, LENGTH))):
        for call in exact(ours):
            np.testing.assert_allclose(call(query, key, value, mask=jnp.asarray(mask)), expected, atol=1e-6)


def test_padding_stays_padding_with_the_opt_in():
    heads, real = random_heads(0, 3, LENGTH, LENGTH, HEADS, HEADS), jnp.asarray(REAL["left"])
    padding = nn.make_attention_mask(jnp.ones((3, 1)), real)
    plain, fn = ours.ApproxAttention("exact"), as_causal("exact")
    np.testing.assert_array_equal(fn(*heads, mask=padding), plain(*heads, mask=padding))
    np.testing.assert_array_equal(fn(*heads), plain(*heads))


OTHER_MASKS = {
    "the other direction": CAUSAL.T,
    "before the query alone": np.tri(LENGTH, k=-1),
    "one ahead": np.tri(LENGTH, k=1),
    "a window": CAUSAL & ~np.tri(LENGTH, k=-2, dtype=bool),
    "packed sequences": np.kron(np.eye(2), np.ones((3, 3))) * CAUSAL,
    "a prefix": CAUSAL | (np.arange(LENGTH) < 3),
    "more keys": np.tri(LENGTH, LENGTH + 2),
    "heads differ": np.stack([CAUSAL, CAUSAL & (np.arange(LENGTH) > 0)])[None],
}


@pytest.mark.parametrize("name", OTHER_MASKS)
@pytest.mark.parametrize("adapter", [ours, ours_linen], ids=["nnx", "linen"])
def test_a_mask_that_is_not_causal_is_not_taken_as_one(name, adapter):
    mask = jnp.asarray(OTHER_MASKS[name], bool)
    query, key, value = random_heads(0, 3, LENGTH, mask.shape[-1], HEADS, HEADS)
    fn = as_causal("mean_pool", adapter, num_landmarks=4)
    call = fn if adapter is ours else lambda *heads, mask: fn.apply({}, *heads, mask=mask)
    with pytest.raises(NotImplementedError, match=r"'mean_pool' with causal_mask='as_is_causal' supports .* of shape"):
        call(query, key, value, mask=mask if mask.ndim == 4 else jnp.broadcast_to(mask, (3, 1, *mask.shape)))


@pytest.mark.parametrize("name", OTHER_MASKS)
@pytest.mark.parametrize("adapter", [ours, ours_linen], ids=["nnx", "linen"])
def test_a_method_that_follows_every_mask_keeps_one_that_is_not_causal(name, adapter):
    mask = jnp.asarray(OTHER_MASKS[name], bool)
    mask = mask if mask.ndim == 4 else mask[None, None]
    heads = random_heads(0, 3, LENGTH, mask.shape[-1], HEADS, HEADS)
    expected = np.asarray(ours.ApproxAttention("exact")(*heads, mask=mask))
    sees = np.broadcast_to(np.asarray(mask).any(-1)[:, 0], expected.shape[:2])
    for call in exact(adapter):
        np.testing.assert_allclose(np.asarray(call(*heads, mask=mask))[sees], expected[sees], atol=1e-5)


@pytest.mark.parametrize("padding", REAL)
@pytest.mark.parametrize("method", ["exact", "nystrom", "mean_pool"])
@pytest.mark.parametrize("adapter", [ours, ours_linen], ids=["nnx", "linen"])
def test_padding_for_each_query_is_padding(padding, method, adapter):
    real, heads = REAL[padding], random_heads(0, 3, LENGTH, LENGTH, HEADS, HEADS)
    options = {} if method == "exact" else {"num_landmarks": 3}
    fn = as_causal(method, adapter, **options)
    call = fn if adapter is ours else lambda *heads, mask: fn.apply({}, *heads, mask=mask)
    expected = np.asarray(call(*heads, mask=jnp.asarray(real)[:, None, None]))
    masks = [nnx.make_attention_mask(real, real), nnx.make_attention_mask(np.ones_like(real), real)]
    for mask in (*masks, jnp.broadcast_to(masks[1], (3, HEADS, LENGTH, LENGTH))):
        np.testing.assert_allclose(np.asarray(call(*heads, mask=jnp.asarray(mask)))[real], expected[real], atol=1e-6)


def test_padding_for_each_query_of_other_keys():
    query, key, value = random_heads(0, 3, LENGTH, LENGTH + 2, HEADS, HEADS)
    fn, real = as_causal("mean_pool", num_landmarks=4), jnp.arange(LENGTH + 2) < 5
    mask = jnp.broadcast_to(real, (3, 1, LENGTH, LENGTH + 2))
    expected = fn(query, key, value, mask=mask[:, :, :1])
    np.testing.assert_allclose(fn(query, key, value, mask=mask), expected, atol=1e-6)


def test_the_error_of_a_causal_mask_names_the_opt_in():
    heads = random_heads(0, 3, LENGTH, LENGTH, HEADS, HEADS)
    with pytest.raises(NotImplementedError, match=r"is_causal=True, or make ApproxAttention with causal_mask='as_is"):
        ours.ApproxAttention("mean_pool")(*heads, mask=jnp.asarray(CAUSAL))
    with pytest.raises(ValueError, match=r"causal_mask must be one of error, as_is_causal; got 'causal'"):
        ours.ApproxAttention("mean_pool", causal_mask="causal")
    with pytest.raises(ValueError, match=r"dropout must be one of error, output; got 'weights'"):
        ours_linen.ApproxAttention("mean_pool", dropout="weights")


def test_a_method_that_is_not_causal_says_so_with_the_opt_in():
    heads = random_heads(0, 3, LENGTH, LENGTH, HEADS, HEADS)
    with pytest.raises(NotImplementedError, match="'nystrom' does not support is_causal"):
        as_causal("nystrom", num_landmarks=4)(*heads, mask=jnp.asarray(CAUSAL))


def test_causal_masks_while_decoding():
    """A model masks the tokens of each call causally; the rest of the mask says which tokens are real."""
    layer, x, real = nnx.MultiHeadAttention(HEADS, DIM, decode=False, rngs=nnx.Rngs(0)), tokens(), REAL["right"]
    ours.replace_attention(layer, "mean_pool", num_landmarks=4, is_causal=True, causal_mask="as_is_causal")
    call = nnx.jit(lambda layer, x, mask: layer(x, mask=mask))
    expected = call(layer, x, masks(real)[0])
    nnx.jit(lambda layer: ours.init_cache(layer, 3, ragged=True))(layer)
    prompt = call(layer, x, masks(real)[0])
    np.testing.assert_allclose(np.asarray(prompt)[real], np.asarray(expected)[real], atol=1e-5)
    np.testing.assert_array_equal(layer.attention_fn.num_seen, real.sum(1))
    first = np.asarray(x)[:, :1]
    call(layer, first, nnx.make_causal_mask(first[..., 0]))
    np.testing.assert_array_equal(layer.attention_fn.num_seen, real.sum(1) + 1)


# 2. dropout


def dropping(adapter, method="mean_value", rate=0.5, **options):
    if adapter is ours:
        fn = ours.ApproxAttention(method, dropout="output", **options)
        return nnx.MultiHeadAttention(HEADS, DIM, attention_fn=fn, decode=False, dropout_rate=rate, rngs=nnx.Rngs(0))
    fn = ours_linen.ApproxAttention(method, options, dropout="output")
    return nn.MultiHeadDotProductAttention(HEADS, attention_fn=fn, dropout_rate=rate)


def test_dropout_of_the_output_is_unbiased_and_off_in_evaluation():
    fn = ours.ApproxAttention("mean_value", dropout="output")
    heads = random_heads(0, 3, LENGTH, LENGTH, HEADS, HEADS)
    expected = np.asarray(fn(*heads))
    options = {"dropout_rate": 0.25, "deterministic": False}

    def out(seed, **more):
        return fn(*heads, dropout_rng=jax.random.key(seed), **{**options, **more})

    one = np.asarray(out(0, broadcast_dropout=False))
    dropped = one == 0
    np.testing.assert_allclose(one[~dropped], expected[~dropped] / 0.75, rtol=1e-6)
    assert 0.1 < dropped.mean() < 0.4
    mean = jax.jit(lambda seeds: jnp.mean(jax.vmap(out)(seeds), 0))(jnp.arange(2000))
    np.testing.assert_allclose(mean, expected, atol=0.06)
    np.testing.assert_array_equal(out(0, deterministic=True), expected)
    np.testing.assert_array_equal(out(0, dropout_rate=1.0), np.zeros_like(expected))
    # Shared by all sequences and heads, as in Flax.
    shared = np.asarray(out(0, broadcast_dropout=True)) == 0
    np.testing.assert_array_equal(shared, np.broadcast_to(shared[:1, :, :1], shared.shape))
    assert fn(*(x.astype(jnp.bfloat16) for x in heads), dropout_rng=jax.random.key(0), **options).dtype == jnp.bfloat16


def test_layers_of_both_kinds_drop():
    x, layer = tokens(), dropping(ours)
    layer.train()
    rngs = nnx.Rngs(dropout=1)
    one, other = layer(x, rngs=rngs), layer(x, rngs=rngs)
    assert np.abs(one - other).max() > 1e-3
    gradient = nnx.jit(nnx.grad(lambda layer: jnp.sum(layer(x, rngs=nnx.Rngs(dropout=1)) ** 2)))(layer)
    assert np.isfinite(gradient["value"]["kernel"][...]).all()
    layer.eval()
    np.testing.assert_array_equal(layer(x), layer(x))

    twin = dropping(ours_linen)
    variables = twin.init(jax.random.key(0), x, deterministic=True)
    one, other = (
        twin.apply(variables, x, deterministic=False, rngs={"dropout": jax.random.key(i)}) for i in range(2)
    )  # fmt: skip
    assert np.abs(one - other).max() > 1e-3
    quiet = twin.apply(variables, x, deterministic=True)
    np.testing.assert_array_equal(quiet, dropping(ours_linen, rate=0.0).apply(variables, x))
    rate_one = dropping(ours_linen, rate=1.0).apply(
        variables, x, deterministic=False, rngs={"dropout": jax.random.key(0)}
    )
    np.testing.assert_array_equal(rate_one, jnp.zeros_like(x))


def test_dropout_in_a_cache_and_on_a_stack():
    fn = ours.ApproxAttention("mean_pool", num_landmarks=4, dropout="output", is_causal=True)
    heads = random_heads(0, 3, LENGTH, LENGTH, HEADS, HEADS)

    @nnx.jit
    def prompt(fn):
        fn.init_cache(3, HEADS, 8)
        return fn(*heads, dropout_rng=jax.random.key(0), dropout_rate=0.5, deterministic=False)

    assert 0.2 < (np.asarray(prompt(fn)) == 0).mean() < 0.8

    @nnx.jit
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs):
        return nnx.MultiHeadAttention(HEADS, DIM, decode=False, dropout_rate=0.5, deterministic=False, rngs=rngs)

    layers = stack(nnx.Rngs(0))
    ours.replace_attention(layers, "favor", num_features=8, dropout="output", rngs=nnx.Rngs(1))
    run = nnx.jit(nnx.scan(lambda layer, x: layer(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry))
    assert np.abs(np.asarray(run(layers, tokens())) - np.asarray(run(layers, tokens()))).max() > 1e-3


@pytest.mark.parametrize("adapter", [ours, ours_linen], ids=["nnx", "linen"])
def test_the_errors_of_dropout(adapter):
    heads = random_heads(0, 3, LENGTH, LENGTH, HEADS, HEADS)

    def call(**options):
        fn = adapter.ApproxAttention("mean_value", **options)
        asked = {"dropout_rate": 0.1, "deterministic": False}
        return fn(*heads, **asked) if adapter is ours else fn.apply({}, *heads, **asked)

    with pytest.raises(NotImplementedError, match=r"dropout_rate=0.1.* dropout='output'.* a Dropout on the output"):
        call()
    with pytest.raises(ValueError, match=r"dropout_rate=0.1 needs a dropout_rng, got None"):
        call(dropout="output")


def test_a_call_that_fails_draws_and_keeps_nothing():
    heads = random_heads(0, 3, LENGTH, LENGTH, HEADS, HEADS)
    fn = ours.ApproxAttention("favor", num_features=8, redraw="every_call", is_causal=True, rngs=nnx.Rngs(0))
    nnx.jit(lambda fn: fn.init_cache(3, HEADS, 8))(fn)
    with pytest.raises(NotImplementedError, match="dropout"):
        fn(*heads, dropout_rate=0.1, deterministic=False)
    assert int(fn.num_seen) == 0
    fn.drop_cache()
    with pytest.raises(NotImplementedError, match="dropout"):
        fn(*heads, dropout_rate=0.1, deterministic=False)
    assert int(fn.stream.count[...]) == 0


# 3. models without layers to replace


class CallsJax(nnx.Module):
    def __init__(self):
        self.query = nnx.LinearGeneral(DIM, (HEADS, HEAD), rngs=nnx.Rngs(0))

    def __call__(self, x):
        q = self.query(x)
        return jax.nn.dot_product_attention(q, q, q)


@pytest.mark.parametrize(
    "make",
    [
        CallsJax,
        lambda: nn.MultiHeadDotProductAttention(HEADS),
        lambda: nnx.bridge.ToNNX(nn.MultiHeadDotProductAttention(HEADS), rngs=nnx.Rngs(0)),
        lambda: nnx.Linear(DIM, DIM, rngs=nnx.Rngs(0)),
    ],
    ids=["CallsJax", "MultiHeadDotProductAttention", "ToNNX", "Linear"],
)
def test_a_model_without_layers_to_replace_is_told_what_to_do(make):
    model = make()
    with pytest.raises(ValueError, match=r"no layer to replace; none .* has an attention_fn") as error:
        ours.replace_attention(model, "mean_pool")
    for advice in ("approx_attention.attention(", "jax.nn.dot_product_attention", "approx_attention.linen"):
        assert advice in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"has an attention_fn; .* approx_attention.HeadsDecoder"):
        ours.init_cache(model, 2)


# 4. bad arguments


def called(adapter, **arguments):
    heads = random_heads(0, 3, LENGTH, LENGTH, HEADS, HEADS)
    fn = adapter.ApproxAttention("mean_value", dropout="output")
    return fn(*heads, **arguments) if adapter is ours else fn.apply({}, *heads, **arguments)


@pytest.mark.parametrize("adapter", [ours, ours_linen], ids=["nnx", "linen"])
def test_bad_masks_and_rates_are_named(adapter):
    for mask in ([1], True, "x", [[True] * LENGTH], jax.random.key(0)):
        with pytest.raises(TypeError, match=r"mask must be .*boolean or") as error:
            called(adapter, mask=mask)
        assert "\n" not in str(error.value)
    for rate in ("x", None, [0.5], np.full(2, 0.5), True):
        with pytest.raises(TypeError, match="dropout_rate must be one number|dropout_rate must be real"):
            called(adapter, dropout_rate=rate)
    for rate in (np.nan, -0.5, 1.5, np.inf):
        for deterministic in (True, False):
            with pytest.raises(ValueError, match=f"dropout_rate must be from 0 to 1, got {rate}"):
                called(adapter, dropout_rate=rate, deterministic=deterministic, dropout_rng=jax.random.key(0))
    with pytest.raises(TypeError, match="dropout_rate must be known when tracing"):
        jax.jit(lambda rate: called(adapter, dropout_rate=rate))(0.5)
    for rate in (0, 1, np.float32(0.5), jnp.float32(0.5)):
        assert called(adapter, dropout_rate=rate, deterministic=False, dropout_rng=jax.random.key(0)).ndim == 4


def test_streams_and_layers_that_are_missing_are_named():
    layer = nnx.MultiHeadAttention(HEADS, DIM, decode=False, rngs=nnx.Rngs(0))
    options = {"num_features": 8, "rngs": nnx.Rngs(params=0)}
    for make in (ours.ApproxAttention, lambda *args, **more: ours.replace_attention(layer, *args, **more)):
        with pytest.raises(
            ValueError, match=r"needs the stream 'attention', as in nnx.Rngs\(attention=0\).* got params"
        ):
            make("favor", **options)
        with pytest.raises(ValueError, match=r"needs the stream 'attention'.* got no stream"):
            make("favor", num_features=8, rngs=nnx.Rngs())
        make("favor", num_features=8, rngs=nnx.Rngs(params=0, attention=1))
        make("mean_pool", num_landmarks=4, rngs=nnx.Rngs(params=0))
    for only in ("x", [""], 1):
        with pytest.raises(TypeError, match=r"only must be a function \(path, layer\) -> bool, got"):
            ours.replace_attention(layer, "mean_pool", only=only)


def test_bad_caches_are_named():
    layer = nnx.MultiHeadAttention(HEADS, DIM, decode=False, rngs=nnx.Rngs(0))
    ours.replace_attention(layer, "mean_pool", num_landmarks=4)
    for start in (
        lambda **options: ours.init_cache(layer, 2, **options),
        lambda **options: layer.attention_fn.init_cache(2, HEADS, HEAD, **options),
    ):
        for dtype in ("foo", "bfloat16", jnp.float16, jnp.int32, None, 3):
            with pytest.raises(TypeError, match="dtype of a cache must be float32 or float64, got"):
                start(dtype=dtype)
        for ragged in ("x", 2, None):
            with pytest.raises(TypeError, match="ragged must be True or False"):
                start(ragged=ragged)
        start(dtype="float32", ragged=np.bool_(True))


# 5. parameters have one dtype, for all layers that create them


@pytest.mark.parametrize(
    "make",
    [
        lambda rngs: ours.evabyte(HEAD, HEADS, window_size=4, chunk_size=2, rngs=rngs),
        lambda rngs: ours.eva_official(HEAD, HEADS, window_size=4, num_chunks=2, local_bias=True, rngs=rngs),
        lambda rngs: ours.Lara(HEAD, num_landmarks=3, rngs=rngs),
        lambda rngs: ours.Hedgehog(HEAD, HEADS),
        lambda rngs: ours.Rfa(HEAD, HEADS, gate_dim=DIM, rngs=rngs),
        lambda rngs: ours.TensorAttention(DIM, num_heads=HEADS, head_dim=HEAD, rngs=rngs),
        lambda rngs: ours.TreeAttention(DIM, num_heads=HEADS, head_dim=HEAD, rngs=rngs),
        *(
            lambda rngs, init=init: ours.LinformerAttention(HEADS, 12, num_slots=3, init=init, rngs=rngs)
            for init in (ours.scale_keeping_init, ours.mean_pool_init(), nnx.initializers.normal())
        ),
        lambda rngs: ours.ApproxAttention("favor", num_features=8, learned=("projection",), head_dim=HEAD, rngs=rngs),
    ],
)
def test_parameters_are_float32_where_float64_is_enabled(make, x64):
    state = nnx.state(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("count", [0, -1, 2.5])
def test_a_number_of_chunks_is_checked_before_it_divides(count):
    with pytest.raises((TypeError, ValueError), match="num_chunks must be"):
        ours.eva_official(HEAD, HEADS, window_size=2, num_chunks=count, spatial_shape=(4, 4), rngs=nnx.Rngs(0))


def test_layers_with_the_cache_of_flax_are_refused_by_name():
    model = nnx.MultiHeadAttention(HEADS, DIM, decode=True, rngs=nnx.Rngs(0))
    ours.replace_attention(model, "mean_pool", num_landmarks=2, is_causal=True)
    with pytest.raises(ValueError, match="layer '' has decode=True.*set decode=False"):
        ours.init_cache(model, 3)
    model.decode = False
    assert nnx.jit(lambda model: ours.init_cache(model, 3))(model) > 0
