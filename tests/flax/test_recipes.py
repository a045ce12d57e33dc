"""The recipes of the guide for whole models: the cells of the page are run, and their results are checked."""

import ast
import itertools
import os
import pathlib
import re
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from approx_attention import nnx as ours
from tests import forms
from tests.references import brute_force

pytestmark = pytest.mark.usefixtures("models")
PAGE = pathlib.Path(__file__).parents[2] / "docs" / "guide" / "models.md"


@pytest.fixture(scope="module")
def page():
    """Run the cells of the page: the names that they define, and the values that they show, in order."""
    names, shown = {}, []
    with (
        pytest.MonkeyPatch.context() as patch,
        forms.FORM("cpu"),  # as in the tests, which share the programs of the page; fixtures of a test come later
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        patch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))  # a cell changes it
        for cell in re.findall(r"```\{code-cell\} python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
            body = ast.parse(cell)
            last = body.body.pop() if isinstance(body.body[-1], ast.Expr) else None
            exec(compile(body, str(PAGE), "exec"), names)
            if isinstance(last, ast.Expr):
                shown.append(eval(compile(ast.Expression(last.value), str(PAGE), "eval"), names))
    return types.SimpleNamespace(**names, shown=shown)


def test_the_cells_show_what_the_text_says(page):
    same, (own, replaced, rest), decodes, approximates, linen, favored, (dtype, near), sharded = page.shown
    assert all((same, own, decodes, *approximates, linen, near, sharded))
    assert (replaced, list(rest)) == (["0"], ["1"])
    assert (favored, dtype) == ((2, 50, 3), jnp.bfloat16)


def inputs(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


# 1. the decoder against brute force


@pytest.mark.parametrize("window", [None, 8])
def test_layers_are_attention_in_float64(page, window):
    sizes = (32, 4, 2, 8)
    rngs = nnx.Rngs(3)
    layer = page.Global(*sizes, rngs=rngs) if window is None else page.Sliding(*sizes, window=window, rngs=rngs)
    call = nnx.jit(lambda layer, x, positions: (layer(x, positions), layer.heads(x, positions)))
    out, heads = call(layer, inputs(2, 20, 32), np.arange(20))
    query, key, value = map(np.asarray, heads)
    apart = np.arange(20)[:, None] - np.arange(20)[None, :]
    mask = (apart >= 0) & (apart < (window or 20))
    heads = np.stack([
        [brute_force(query[b, :, n], key[b, :, n // 2], value[b, :, n // 2], mask=mask)[0] for n in range(4)]
        for b in range(2)
    ])  # fmt: skip
    expected = np.einsum("bntd,ndc->btc", heads, np.asarray(layer.out.kernel[...], np.float64))
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_rotary_positions_are_relative(page):
    q, k = inputs(2, 1, 6, 1, 8)

    @jax.jit
    def scores_at(positions):
        return jnp.einsum("btnd,bsnd->ts", *(page.rotary(x, positions, 1e4) for x in (q, k)))

    scores = [scores_at(np.arange(6) + shift) for shift in (0, 100)]
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-4)
    assert np.abs(scores[0] - np.einsum("btnd,bsnd->ts", q, k)).max() > 0.1


def test_no_later_token_matters(page):
    decoder = page.Decoder(rngs=nnx.Rngs(0))
    ours.replace_attention(decoder, "mean_pool", num_landmarks=8, block_size=8, is_causal=True)
    later = np.where(np.arange(40) < 25, page.tokens, 1)
    one, other = (np.asarray(page.run(decoder, tokens)) for tokens in (page.tokens, later))
    np.testing.assert_allclose(one[:, :25], other[:, :25], atol=1e-6)
    assert np.abs(one[:, 25:] - other[:, 25:]).max() > 1e-3


def test_pieces_of_any_size_are_the_whole(page):
    decoder = page.Decoder(rngs=nnx.Rngs(0))
    decoder.start(2, max_length=64)
    tokens = np.asarray(page.tokens)
    # Of 30 tokens and of one, as on the page, which has compiled programs for both.
    bounds = (*range(6), *range(35, 41))
    pieces = [page.run(decoder, tokens[:, a:b]) for a, b in itertools.pairwise(bounds)]
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), page.whole, atol=1e-5)


# 2. transforms


def test_scan_and_remat_of_the_block(page):
    @nnx.jit
    @nnx.split_rngs(splits=2)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stacked(rngs):
        return page.Block(32, page.Global(32, 4, 2, 8, rngs=rngs), rngs=rngs)

    @nnx.scan(in_axes=(0, nnx.Carry, None), out_axes=nnx.Carry)
    def scanned(block, x, positions):
        return nnx.remat(lambda block, x: block(x, positions))(block, x)

    blocks, positions = stacked(nnx.Rngs(0)), np.arange(12)
    replaced = ours.replace_attention(blocks, "favor", num_features=16, block_size=4, is_causal=True, rngs=nnx.Rngs(1))
    assert (replaced, replaced.not_replaced) == (["attention"], {})
    x = inputs(2, 12, 32)
    graph, state = nnx.split(blocks)

    @jax.jit
    def alone(state, i, x):
        return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[i], state))(x, positions)

    expected = alone(state, 1, alone(state, 0, x))
    run = nnx.jit(scanned)
    np.testing.assert_allclose(run(blocks, x, positions), expected, atol=1e-5)
    nnx.jit(lambda blocks: ours.init_cache(blocks, 2))(blocks)
    pieces = [run(blocks, x[:, a:b], positions[a:b]) for a, b in ((0, 6), (6, 12))]
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), expected, atol=1e-5)


def test_half_precision_decodes(page):
    steps, whole = page.decoded(page.half, page.tokens), np.asarray(page.out, np.float64)
    assert steps.dtype == jnp.bfloat16
    assert np.linalg.norm(np.asarray(steps, np.float64) - whole) < 0.03 * np.linalg.norm(whole)


def test_heads_stay_where_they_are(page):
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((1, 2), ("sequence", "heads"), auto, devices=jax.devices()[:2])
    options = {"is_causal": True, "mesh": mesh, "head_axis": "heads"}
    layer, single = (page.Global(32, 4, 2, 8, rngs=nnx.Rngs(0)) for _ in range(2))
    ours.replace_attention(layer, "exact", **options)
    x, positions = inputs(2, 12, 32), np.arange(12)
    graph, state = nnx.split(layer)

    def placed(path, kernel):
        axis = {"query": 1, "key": 1, "value": 1, "out": 0}.get(path[0].key)
        spec = [] if axis is None else [None] * axis + ["heads"]
        return jax.device_put(kernel, jax.sharding.NamedSharding(mesh, jax.P(*spec)))

    state = jax.tree_util.tree_map_with_path(placed, state)
    program = jax.jit(lambda state: nnx.merge(graph, state)(x, positions)).lower(state).compile()
    expected = nnx.jit(lambda layer: layer(x, positions))(single)
    np.testing.assert_allclose(program(state), expected, atol=1e-5)
    # Outputs are summed over heads, and no tensor of heads is gathered.
    text = program.as_text() or ""
    assert "all-reduce" in text
    assert "all-gather" not in text


# 3. layers that were not replaced


class Fused(nnx.Module):
    """Attention under another name, recognised by its projections."""

    def __init__(self):
        self.q_proj, self.k_proj, self.v_proj = (nnx.Linear(4, 4, rngs=nnx.Rngs(0)) for _ in range(3))


class AttentionBlock(nnx.Module):
    """A module that contains attention but is not attention itself."""

    def __init__(self):
        self.layer = nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0))
        self.dense = nnx.Linear(4, 4, rngs=nnx.Rngs(0))


class InLinen(nn.Module):
    inner: nn.Module

    @nn.compact
    def __call__(self, x):
        return self.inner(x)


def test_what_was_not_replaced_is_told():
    linen = [nn.MultiHeadDotProductAttention(2), InLinen(nn.SelfAttention(2)), nn.Dense(4)]
    linen += [nn.Sequential([nn.Dense(4), nn.SelfAttention(2)])]
    model = nnx.Dict(
        block=AttentionBlock(),
        fused=nnx.List([Fused()]),
        linen=nnx.List([nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0)) for module in linen]),
        lora=nnx.Dict(query=nnx.Linear(4, 4, rngs=nnx.Rngs(0))),
        tensor=ours.TensorAttention(4, num_heads=2, head_dim=2, rngs=nnx.Rngs(0)),
    )
    replaced = ours.replace_attention(model, "mean_pool", num_landmarks=4)
    assert replaced == ["block.layer"]
    assert isinstance(replaced, ours.Replaced)
    assert sorted(replaced.not_replaced) == ["fused.0", "linen.0", "linen.1", "linen.3"]
    assert "approx_attention.attention(" in replaced.not_replaced["fused.0"]
    assert "approx_attention.linen.ApproxAttention" in replaced.not_replaced["linen.1"]
    with pytest.raises(ValueError, match=r"none of the List has an attention_fn, and '0' looks like attention\. If"):
        ours.replace_attention(nnx.List([Fused()]), "mean_pool", num_landmarks=4)
    # A layer with an attention_fn is never listed, whether it was selected or not.
    two = nnx.List([AttentionBlock(), AttentionBlock()])
    replaced = ours.replace_attention(two, "mean_pool", num_landmarks=4, only=lambda path, _: path.startswith("0"))
    assert (replaced, replaced.not_replaced) == (["0.layer"], {})
