"""The capture hook records the inputs of attention, also in stacks and under jit, and leaves the model unchanged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from approx_attention import InputError, linen
from approx_attention.evaluation import load_layers
from approx_attention.nnx import ApproxAttention, Hedgehog, capture_attention
from tests.flax.test_stacks import DIM, alone, scanned, stack_of, tokens

pytestmark = pytest.mark.usefixtures("models")


class TwoLayers(nnx.Module):
    """A model with two of Flax's attention layers."""

    def __init__(self, rngs: nnx.Rngs):
        self.first, self.second = (
            nnx.MultiHeadAttention(num_heads=2, in_features=8, decode=False, rngs=rngs) for _ in range(2)
        )

    def __call__(self, x, **options):
        return self.second(self.first(x, **options), **options)


def two_layers():
    model = TwoLayers(nnx.Rngs(0))
    return model, lambda model: model(jnp.ones((1, 5, 8)))


def test_the_hook_records_what_a_flax_layer_projects_and_leaves_the_model_as_it_was():
    model, run = two_layers()
    before = model.first.attention_fn
    captured = capture_attention(model, run)
    assert set(captured) == {"first", "second"}
    assert model.first.attention_fn is before
    x = jnp.ones((1, 5, 8))
    np.testing.assert_allclose(captured["first"]["k"], model.first.key(x), rtol=1e-6)
    np.testing.assert_allclose(captured["second"]["v"], model.second.value(model.first(x)), rtol=1e-6)


def test_the_hook_puts_attention_back_when_the_model_fails():
    model, _ = two_layers()
    before = model.first.attention_fn

    def fail(model):
        model.first(jnp.ones((1, 5, 8)))
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        capture_attention(model, fail)
    assert model.first.attention_fn is before


def test_a_model_without_attention_is_refused():
    with pytest.raises(ValueError, match="Linear has no module with an attention_fn"):
        capture_attention(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), lambda model: model(jnp.ones((1, 2))))
    model, _ = two_layers()
    with pytest.raises(ValueError, match="none of the attention layers first, second was called"):
        capture_attention(model, lambda model: None)


def test_layers_of_a_scanned_stack_are_recorded_one_by_one(tmp_path):
    layers, x = stack_of(3), tokens()
    path = tmp_path / "layers.npz"
    captured = capture_attention(layers, lambda layers: nnx.jit(scanned)(layers, x), to=path)
    assert list(captured) == ["[0]", "[1]", "[2]"]
    assert not isinstance(layers.attention_fn, nnx.Module)
    for index, layer in enumerate(load_layers(path, layers="*").values()):
        own = alone(layers, index)
        np.testing.assert_allclose(layer.tensors.query, own.query(x), atol=1e-6)
        np.testing.assert_allclose(layer.tensors.value, own.value(x), atol=1e-6)
        assert layer.is_causal is False
        x = x + own(x)


def test_layers_of_a_linen_model_are_recorded(tmp_path):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            causal = linen.ApproxAttention("exact", {"scale": 0.5}, is_causal=True)
            return x + nn.MultiHeadDotProductAttention(2, attention_fn=causal, name="attention")(x), None

    def stack(**axes):
        return nn.scan(Block, variable_axes={"params": 0, **axes}, split_rngs={"params": True}, length=2)()

    x, path = tokens(), tmp_path / "layers.npz"
    model = stack(intermediates=0)
    variables = jax.jit(model.init)(jax.random.key(0), x, None)
    linen.capture_attention(model, variables, x, None, to=path)
    layers = load_layers(path, layers="*")
    assert list(layers) == ["attention[0]", "attention[1]"]
    kernel = np.asarray(variables["params"]["attention"]["key"]["kernel"])
    np.testing.assert_allclose(layers["attention[0]"].tensors.key, np.einsum("btc,chd->bthd", x, kernel[0]), atol=1e-5)
    assert all((own.is_causal, own.scale) == (True, 0.5) for own in layers.values())
    with pytest.raises(ValueError, match="does not carry the collection 'intermediates'"):
        linen.capture_attention(stack(), variables, x, None)
    with pytest.raises(ValueError, match="Dense called no module with an attention_fn"):
        linen.capture_attention(nn.Dense(3), nn.Dense(3).init(jax.random.key(0), x), x)


def test_causality_padding_and_scale_are_recorded(tmp_path):
    model, x, path = TwoLayers(nnx.Rngs(0)), tokens(), tmp_path / "layers.npz"
    model.second.attention_fn = nnx.data(ApproxAttention("exact", is_causal=True, scale=0.5))
    real = np.arange(8) < np.array([[8], [5]])
    padding = nnx.make_attention_mask(jnp.ones((2, 1)), real)
    capture_attention(model, lambda model: model(x, mask=padding), to=path)
    first, second = load_layers(path, layers="*").values()
    np.testing.assert_array_equal(first.kv_mask, real)
    np.testing.assert_array_equal(second.kv_mask, real)
    assert (first.is_causal, first.scale, second.is_causal, second.scale) == (False, None, True, 0.5)
    causal = nnx.combine_masks(nnx.make_causal_mask(x[..., 0]), nnx.make_attention_mask(real, real))
    captured = capture_attention(model.first, lambda layer: layer(x, mask=causal))[""]
    assert captured["is_causal"]
    np.testing.assert_array_equal(captured["mask"], real)


def test_a_module_with_learned_parts_says_whether_it_is_causal():
    layer, x = two_layers()[0].second, tokens()
    for is_causal in (False, True):
        module = Hedgehog(4, 2, is_causal=is_causal, block_size=4)
        layer.attention_fn = nnx.data(ApproxAttention(module))
        captured = capture_attention(layer, lambda layer: layer(x))[""]
        assert bool(captured["is_causal"]) == is_causal


def test_what_cannot_be_recorded():
    model, x = TwoLayers(nnx.Rngs(0)), tokens()
    odd = np.random.default_rng(0).random((2, 1, 8, 8)) < 0.5
    odd[..., 0] = True
    with pytest.raises(ValueError, match="layer 'first' has a mask of shape .2, 1, 8, 8. that is neither causal nor"):
        capture_attention(model, lambda model: model(x, mask=jax.device_put(odd)))
    layer = two_layers()[0].second
    layer.attention_fn = nnx.data(ApproxAttention("exact", logits_soft_cap=50.0))
    capped = nn.MultiHeadDotProductAttention(2, attention_fn=linen.ApproxAttention("exact", {"logits_soft_cap": 50.0}))
    for capture in (
        lambda: capture_attention(layer, lambda layer: layer(x)),
        lambda: linen.capture_attention(capped, jax.jit(capped.init)(jax.random.key(0), x), x),
    ):
        with pytest.raises(
            ValueError, match="the layer has logits_soft_cap, which files of q, k and v cannot represent"
        ):
            capture()
    with pytest.raises(ValueError, match="under a transform of JAX"):
        capture_attention(model, lambda model: jax.jit(lambda x: model(x))(x))
    with pytest.raises(InputError, match="must end in .npz"):
        capture_attention(model, lambda model: model(x), to="layers.safetensors")
    assert model(x).shape == (2, 8, DIM)
