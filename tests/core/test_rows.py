"""Rows are split into blocks and joined again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from approx_attention.core import along_with, in_blocks, map_rows, out_of_blocks, sums_so_far


@pytest.mark.parametrize(("num_rows", "block_size"), [(5, 2), (6, 3), (3, 8)])
def test_rows_come_back_out_of_blocks(num_rows, block_size):
    tree = np.arange(num_rows), np.ones((num_rows, 2), np.float32)

    @jax.jit
    def answers(tree):
        blocks = tuple(in_blocks(x, block_size) for x in tree)
        assert [x.shape[:2] for x in blocks] == 2 * [(-(-num_rows // block_size), block_size)]
        doubled = map_rows(lambda rows: {"x": 2 * rows[0]}, tree, block_size)
        return out_of_blocks(blocks, num_rows), out_of_blocks(blocks), doubled

    same, longer, doubled = jax.tree.map(np.asarray, answers(tree))
    for x, back, padded in zip(tree, same, longer, strict=True):
        np.testing.assert_array_equal(back, x)
        np.testing.assert_array_equal(padded[num_rows:], 0)
    np.testing.assert_array_equal(doubled["x"], 2 * tree[0])


@pytest.mark.parametrize("weighted", [False, True])
def test_sums_so_far_are_those_of_a_loop(weighted):
    random = np.random.default_rng(0)
    x = random.normal(size=(7, 3, 2)).astype(np.float32)
    weights = np.tril(np.ones((7, 7)))[:, :, None] * (random.uniform(size=(7, 7, 3)) if weighted else 1)
    expected = [sum(weights[i, j][:, None] * x[j].astype(float) for j in range(i + 1)) for i in range(7)]
    given, sums = (weights.astype(np.float32),) if weighted else (), jax.jit(sums_so_far)
    np.testing.assert_allclose(sums(x, *given), expected, atol=1e-6)
    large = np.array([[3e38], [-3e38], [1e38]], np.float32)  # the sum of their absolute values overflows
    np.testing.assert_allclose(sums(large), [[3e38], [0], [1e38]], rtol=1e-6)
    for broken in (np.nan, np.inf):
        x[4, 1, 0] = broken
        after = np.asarray(sums(x, *given))
        np.testing.assert_allclose(after[:4], expected[:4], atol=1e-6)
        assert np.all(np.isnan(after[4:]))


def test_arrays_vary_with_all_others_without_a_step_for_each_pair():
    def num_equations(count):
        arrays = [np.ones(2, np.float32)] * count
        return len(jax.make_jaxpr(lambda *x: along_with(x, x))(*arrays).eqns)

    assert num_equations(12) - num_equations(8) == num_equations(8) - num_equations(4) > 0
    tree = {"x": np.float32([np.nan, -0.0, 3]), "n": np.arange(2, dtype=np.int32), "seen": np.array([True, False])}
    # Numbers that are not finite, and empty arrays, change nothing either.
    others = np.float32([np.inf, np.nan]), np.ones((0, 3), np.float32), np.array([True])
    for name, x in jax.jit(along_with)(tree, *others).items():
        assert x.dtype == tree[name].dtype
        np.testing.assert_array_equal(x, tree[name])
    assert along_with(tree) is tree
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def total(a, b):
        found, expected = (jax.typeof(x) for x in (along_with(jnp.zeros(1), a, b), a + b))
        assert found == expected != jax.typeof(jnp.zeros(1))
        return a + b

    each, both = (PartitionSpec("a"), PartitionSpec("b")), PartitionSpec(("a", "b"))
    two = jax.ShapeDtypeStruct((2,), jnp.float32)
    jax.eval_shape(jax.shard_map(total, mesh=mesh, in_specs=each, out_specs=both), two, two)


@pytest.mark.parametrize("length", [3, 4])
def test_the_mapped_axis_comes_first(length):
    # With as many rows as examples the shapes do not tell which axis is mapped.
    x, other = np.ones((4, length), np.float32), np.ones(length, np.float32)
    program = jax.make_jaxpr(jax.vmap(along_with, (1, 0)))(x, other)
    assert program.eqns[-1].primitive.name != "transpose"
