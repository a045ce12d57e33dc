"""A method for each key head: each head gives the outputs of its method, in whole passes, layers and caches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from approx_attention import HeadsDecoder, attention, linen
from approx_attention.decoding import MixedDecoder
from approx_attention.nnx import init_cache, replace_attention
from approx_attention.registry import HeadMethods
from tests.references import as_array, random_heads

FAVOR = ("favor", {"num_features": 16, "block_size": 8})
EXACT = ("exact", {})
# The first and the last head share a configuration, but not the projection.
OF_HEADS = (FAVOR, EXACT, EXACT, FAVOR)
MIXED = HeadMethods.of(OF_HEADS)
RNG = jax.random.key(5)


def heads(length=24, num_heads=8, num_kv_heads=4, dim=8):
    return list(random_heads(0, 2, length, length, num_heads, num_kv_heads, dim))


@pytest.mark.parametrize("is_causal", [False, True])
def test_every_head_is_computed_as_by_its_method_alone(is_causal):
    tokens = heads()
    padding = np.arange(24)[None, :] < np.array([[24], [17]])
    # Padding may hold anything.
    tokens[1:] = [np.where(padding[:, :, None, None], x, np.float32(np.nan)) for x in tokens[1:]]
    mask = as_array(padding[:, None, None, :], bool)
    options = {"rng": RNG, "is_causal": is_causal, "return_residual": True, "mask": mask}

    def answers(method, **sizes):
        answer = jax.jit(functools.partial(attention, method=method, **sizes, **options))
        return jax.tree.map(np.asarray, answer(*tokens))

    out, lse = answers(MIXED)
    by_name = {name: answers(name, **sizes) for name, sizes in (FAVOR, EXACT)}
    for head, (name, _) in enumerate(OF_HEADS):
        alone, own = by_name[name]
        mine = np.s_[:, :, 2 * head : 2 * head + 2]
        np.testing.assert_allclose(out[mine], alone[mine], atol=1e-6)
        np.testing.assert_allclose(lse[mine], own[mine], atol=1e-6)
    assert not np.allclose(out[:, :, :2], by_name["exact"][0][:, :, :2], atol=1e-3)


def test_the_output_of_a_head_does_not_depend_on_who_shares_its_configuration():
    tokens = heads()
    alone = HeadMethods.of([EXACT, EXACT, EXACT, FAVOR])
    whole = jax.jit(attention, static_argnames="method")
    both = [whole(*tokens, method=methods, rng=RNG) for methods in (MIXED, alone)]
    np.testing.assert_allclose(*(np.asarray(x)[:, :, 6:] for x in both), atol=1e-6)
    # The keys of heads may be given one by one.
    keys = jax.jit(jax.vmap(jax.random.fold_in, (None, 0)))(RNG, np.arange(4))
    np.testing.assert_array_equal(both[0], whole(*tokens, method=MIXED, rng=keys))


def test_heads_that_share_one_method_are_that_method():
    tokens = heads()
    same = attention(*tokens, method=HeadMethods.of([FAVOR] * 4), rng=RNG, is_causal=True)
    np.testing.assert_array_equal(same, attention(*tokens, method="favor", **FAVOR[1], rng=RNG, is_causal=True))


def test_masks_and_gradients_of_mixed_heads():
    tokens = heads(length=12)
    methods = HeadMethods.of(["exact", ("exact", {"implementation": "dense"}), "exact", "exact"])
    random = np.random.default_rng(7)
    mask = as_array(random.uniform(size=(8, 12, 12)) < 0.7, bool)
    given = {"mask": mask, "bias": as_array(random.normal(size=(2, 8, 12, 12)))}

    def loss(method, q, k, v):
        return jnp.sum(jnp.sin(attention(q, k, v, method=method, **given)))

    gradients = jax.jit(jax.grad(loss, (1, 2, 3)), static_argnums=0)
    for mine, one in zip(*(gradients(m, *tokens) for m in (methods, "exact")), strict=True):
        np.testing.assert_allclose(mine, one, atol=1e-5)
    with pytest.raises(ValueError, match="mask must broadcast"):
        attention(*tokens, method=methods, mask=mask[:6])


def test_a_mixed_decoder_answers_as_the_whole_causal_pass():
    q, k, v = heads()
    whole = np.asarray(jax.jit(functools.partial(attention, method=MIXED, rng=RNG, is_causal=True))(q, k, v))
    decoder = MixedDecoder(MIXED, num_kv_heads=4, head_dim=8, max_length=24)
    extend, cache = jax.jit(decoder.extend), jax.jit(lambda rng: decoder.init(2, rng, ragged=True))(RNG)
    # Every sequence continues from its length.
    seen = [0, 0]
    for lengths in ([10, 7], [3, 10], [10, 0]):
        parts = [np.stack([x[i, seen[i] : seen[i] + 10] for i in (0, 1)]) for x in map(_padded, (q, k, v))]
        out, cache = extend(cache, *parts, np.array(lengths, np.int32))
        for i, length in enumerate(lengths):
            np.testing.assert_allclose(np.asarray(out)[i, :length], whole[i, seen[i] : seen[i] + length], atol=1e-5)
            seen[i] += length
    assert cache.length.tolist() == seen == [23, 17]


def _padded(x):
    return np.pad(x, ((0, 0), (0, 16), (0, 0), (0, 0)))


@pytest.mark.usefixtures("models")
def test_layers_of_nnx_and_linen_take_methods_by_head():
    x = as_array(np.random.default_rng(1).normal(size=(2, 24, 32)))
    layer = nnx.jit(lambda rngs: nnx.MultiHeadAttention(4, 32, decode=False, rngs=rngs))(nnx.Rngs(0))
    replace_attention(layer, MIXED, is_causal=True, rngs=nnx.Rngs(1))
    call = nnx.jit(lambda layer, x: layer(x))
    whole = np.asarray(call(layer, x))

    @nnx.jit
    def by_hand(layer, x):
        q, k, v = layer.query(x), layer.key(x), layer.value(x)
        rng = layer.attention_fn.stream.key[...]
        return layer.out(attention(q, k, v, method=MIXED, is_causal=True, rng=rng))

    np.testing.assert_allclose(whole, by_hand(layer, x), atol=1e-5)
    nnx.jit(lambda layer: init_cache(layer, 2, max_length=24))(layer)
    parts = [call(layer, part) for part in np.split(np.asarray(x)[:, :22], (20, 21), axis=1)]
    np.testing.assert_allclose(np.concatenate(parts, 1), whole[:, :22], atol=1e-5)
    assert layer.attention_fn.num_seen == 22

    made = nn.MultiHeadDotProductAttention(num_heads=4, attention_fn=linen.ApproxAttention(MIXED, is_causal=True))
    variables = jax.jit(made.init)(jax.random.key(0), x)
    exact = nn.MultiHeadDotProductAttention(num_heads=4)
    same = made.clone(attention_fn=linen.ApproxAttention(HeadMethods.of([EXACT] * 4), is_causal=True))

    @jax.jit
    def outputs(variables, x):
        expected = exact.apply({"params": variables["params"]}, x, mask=nn.make_causal_mask(x[..., 0]))
        return same.apply(variables, x), made.apply(variables, x), expected

    out, mixed, expected = outputs(variables, x)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    assert not np.allclose(mixed, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: HeadMethods(()), ValueError, "at least one key head"),
        (lambda: HeadMethods(("exact",)), TypeError, "must be bound"),
        (lambda: attention(*heads(), method=MIXED), ValueError, "pass rng"),
        (lambda: attention(*heads(num_kv_heads=2), method=MIXED, rng=RNG), ValueError, "4 key heads, .* has 2"),
        (
            lambda: attention(*heads(), method=MIXED, rng=RNG, num_features=8),
            TypeError,
            "already contains .* got num_features",
        ),
        (lambda: HeadsDecoder(MIXED, num_kv_heads=4, head_dim=8), TypeError, "registered name or a function"),
        (lambda: MixedDecoder(MIXED, num_kv_heads=2, head_dim=8), ValueError, "4 key heads, .* has 2"),
        (
            lambda: MixedDecoder(HeadMethods.of(["local", "exact"]), num_kv_heads=2, head_dim=8, max_length=8),
            NotImplementedError,
            "no running summary",
        ),
    ],
)
def test_what_methods_by_head_do_not_take(call, error, message):
    with pytest.raises(error, match=message):
        call()
