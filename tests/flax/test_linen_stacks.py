"""Linen layers stacked by Flax's lifts: a random projection for each."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import linen as ours_linen
from tests.flax.test_stacks import HEADS, tokens

pytestmark = pytest.mark.usefixtures("models")


class Block(nn.Module):
    redraw: str = "never"
    learned: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, x, _=None):
        every = 2 if self.redraw == "every_n" else None
        fn = ours_linen.ApproxAttention("favor", {"num_features": 8}, False, self.redraw, every, learned=self.learned)
        return x + nn.MultiHeadDotProductAttention(HEADS, attention_fn=fn)(x), None


AXES = {"params": 0, "draws": 0}
SPLIT = {"params": True, "attention": True}
LIFTS = {
    "scan": lambda block: nn.scan(block, variable_axes=AXES, split_rngs=SPLIT, length=3),
    "scan of remat": lambda block: nn.scan(nn.remat(block), variable_axes=AXES, split_rngs=SPLIT, length=3),
    "vmap": lambda block: nn.vmap(
        block, in_axes=None, variable_axes=AXES, split_rngs=SPLIT, axis_size=3
    ),
}  # fmt: skip


@functools.partial(jax.jit, static_argnums=2)
def block_alone(variables, x, learned):
    return Block(learned=learned).apply(variables, x)[0]


@pytest.mark.parametrize("learned", [(), ("projection",)], ids=["drawn", "learned"])
@pytest.mark.parametrize("lift", LIFTS)
def test_linen_lifts_draw_for_each_layer(lift, learned):
    model, x = LIFTS[lift](Block)(learned=learned), tokens()

    @jax.jit
    def initial_and_trained(rngs):
        variables = model.init(rngs, x, None)

        def squares(params):
            out, _ = model.apply({**variables, "params": params}, x, None)
            return jnp.sum(out**2), out

        return variables, *jax.grad(squares, has_aux=True)(variables["params"])

    rngs = {"params": jax.random.key(0), "attention": jax.random.key(1)}
    variables, gradient, out = initial_and_trained(rngs)
    (key,) = jax.tree.leaves(variables["draws"])
    assert key.shape == (3, 2)
    assert len(np.unique(np.asarray(key), axis=0)) == 3
    expected = [x]
    for i in range(3):
        layer = jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], variables)
        expected.append(block_alone(layer, x if lift == "vmap" else expected[-1], learned))
    np.testing.assert_allclose(out, np.stack(expected[1:]) if lift == "vmap" else expected[-1], atol=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_linen_remat_alone():
    x = tokens()
    variables = jax.jit(Block().init)(jax.random.key(0), x)
    out, _ = jax.jit(nn.remat(Block)().apply)(variables, x)
    np.testing.assert_allclose(out, block_alone(variables, x, ()), atol=1e-6)


@pytest.mark.parametrize("redraw", ["every_call", "every_n"])
def test_linen_scan_draws_anew(redraw):
    model, x = LIFTS["scan"](Block)(redraw=redraw), tokens()
    variables = jax.jit(model.init)({"params": jax.random.key(0), "attention": jax.random.key(1)}, x, None)

    @jax.jit
    def apply(variables, key):
        (out, _), changed = model.apply(variables, x, None, rngs={"attention": key}, mutable=["draws"])
        return out, {**variables, **changed}

    outs = []
    for i in range(3):
        out, variables = apply(variables, jax.random.key(i))
        outs.append(np.asarray(out))
    same = [bool((outs[i] == outs[i + 1]).all()) for i in range(2)]
    assert same == [redraw == "every_n", False]
    if redraw == "every_n":
        np.testing.assert_array_equal(variables["draws"]["ApproxAttention_0"]["count"], [3, 3, 3])


def test_linen_lifts_that_split_or_keep_too_little():
    x, rngs = tokens(), {"params": jax.random.key(0), "attention": jax.random.key(1)}
    model = nn.scan(Block, variable_axes={"params": 0}, split_rngs=SPLIT, length=3)()
    with pytest.raises(ValueError, match=r"'draws' from init; in nn.scan and nn.vmap give variable_axes=.*'draws': 0"):
        jax.eval_shape(model.init, rngs, x, None)
    model = nn.scan(Block, variable_axes=AXES, split_rngs={"params": True}, length=3)("every_call")
    variables = jax.eval_shape(model.init, rngs, x, None)
    with pytest.raises(ValueError, match=r"needs the stream 'attention'.*give split_rngs=.*'attention': True"):
        jax.eval_shape(model.apply, variables, x, None, rngs={"attention": jax.random.key(2)})
    # One random projection for all layers, if requested.
    split_rngs = {"params": True, "attention": False}
    shared = nn.scan(
        Block, variable_axes={"params": 0}, variable_broadcast="draws", split_rngs=split_rngs, length=3
    )  # fmt: skip
    (key,) = jax.tree.leaves(jax.eval_shape(shared().init, rngs, x, None)["draws"])
    assert key.shape == (2,)
