"""Sparse attention against dense masks in float64: by blocks, gathered, and top-k."""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import (
    SparsePattern,
    attention,
    bigbird,
    exact,
    longformer,
    lsh_top_k,
    sparse_attention,
    top_k,
)
from approx_attention.methods import sparse
from approx_attention.methods.bigbird import _given_lists, _random_lists
from approx_attention.sparse import BlockMap, block_lists_state
from tests.methods.case import Case, within_block
from tests.programs import equations
from tests.references import (
    as_array,
    brute_force,
    causal_mask,
    compiled,
    random_head,
    relative_error,
    scaled,
    without_padding,
)

CASES = {
    "longformer": Case(changes={"num_global": 6}),
    "bigbird": Case(
        size=within_block,
        changes={"num_window_blocks": 1, "num_global_blocks": 0, "blocks": jax.device_put(np.zeros((10, 1), np.int32))},
        # With more random blocks there would be no choice.
        contexts={
            argument: {"num_random_blocks": 1}
            for argument in ("num_window_blocks", "num_global_blocks", "block_size", "blocks")
        },
    ),
    # A token need not be among those that it chooses.
    "top_k": Case(diagonal_size=14, unseen="kv"),
    "lsh_top_k": Case(
        diagonal_size=14,
        unseen="kv",
        # The number of buckets depends on the length.
        any_length=lambda length: {"num_hashes": 1},
        changes={"num_rounds": 1, "num_hashes": 1, "projection": as_array(np.ones((1, 2, 8)))},
    ),
}

exact, longformer, bigbird, top_k, lsh_top_k = compiled(exact, longformer, bigbird, top_k, lsh_top_k)
random_pattern = jax.jit(SparsePattern.random, static_argnums=(1, 2))

LENGTH = 21
RAGGED = np.random.default_rng(0).random((LENGTH, LENGTH)) ** 4 + np.eye(LENGTH)
PATTERNS = {
    "banded": lambda: SparsePattern.banded(LENGTH, range(-3, 4)),
    "strided": lambda: SparsePattern.strided(LENGTH, 5),
    "block": lambda: SparsePattern.block(LENGTH, 6),
    "global": lambda: SparsePattern.banded(LENGTH, range(-2, 3)).with_global([0, 20]),
    "random": lambda: random_pattern(jax.random.key(0), LENGTH, 5).union(SparsePattern.banded(LENGTH, [0])),
    "ragged": lambda: SparsePattern.from_dense(RAGGED, 0.3),
}
every_pattern = pytest.mark.parametrize("kind", PATTERNS)


def support(pattern):
    """The mask of a pattern, from its indices."""
    valid, seen = np.asarray(pattern.valid), np.zeros((pattern.num_queries, pattern.num_keys), bool)
    seen[np.nonzero(valid)[0], np.asarray(pattern.indices)[valid]] = True
    return seen


def padded(pattern, keys_per_row):
    """The same pattern with more padding, so that all patterns of one length share a program."""
    pad = [(0, 0), (0, keys_per_row - pattern.keys_per_row)]
    indices, valid = np.pad(pattern.indices, pad), np.pad(pattern.valid, pad)
    log_weights = np.pad(pattern.log_weights, pad, constant_values=-np.inf)
    return SparsePattern(indices, log_weights.astype(np.float32), valid, pattern.num_keys)


def blocks_of(num_queries, num_keys, block_size, share, seed=0):
    """A map of random blocks that includes the diagonal."""
    shape = -(-num_queries // block_size), -(-num_keys // block_size)
    visited = (np.random.default_rng(seed).random(shape) < share) | np.eye(*shape, dtype=bool)
    return BlockMap.from_blocks(visited, block_size=block_size, num_queries=num_queries, num_keys=num_keys)


# executing a pattern


@every_pattern
@pytest.mark.parametrize("is_causal", [pytest.param(False, marks=pytest.mark.slow), True])
def test_both_forms_equal_the_dense_mask_in_values_and_gradients(kind, is_causal):
    pattern = PATTERNS[kind]()
    q, k, v = random_head(0, LENGTH, LENGTH, 8, 5)
    kv_mask = np.arange(LENGTH) % 4 != 1
    mask = support(pattern) & kv_mask & (causal_mask(LENGTH, LENGTH) if is_causal else True)
    weight = np.random.default_rng(1).normal(size=(LENGTH, 5)).astype(np.float32)
    soiled = tuple(np.where(kv_mask[:, None], x, np.float32(np.nan)) for x in (k, v))
    out, lse = brute_force(q, k, v, mask=mask)
    dense = gradients_of_exact(q, k, v, mask, weight)
    # A concrete pattern runs in one of the two forms, with the same mask.
    chosen = sparse._cheaper(pattern, is_causal)
    seen = chosen.to_mask() if isinstance(chosen, BlockMap) else support(chosen)
    np.testing.assert_array_equal(seen & kv_mask & (causal_mask(LENGTH, LENGTH) | (not is_causal)), mask)
    forms = [BlockMap.from_pattern(pattern, 4)]
    # Of all kinds every block of 16 is visited, so that their programs differ only in the mask.
    forms += [BlockMap.from_pattern(pattern, 16), pattern] if kind in ("strided", "ragged") else []
    by_forms = [
        jax.jit(functools.partial(state_and_gradients, pattern=form, is_causal=is_causal))(q, *soiled, kv_mask, weight)
        for form in forms
    ]
    gathered = as_an_argument(q, *soiled, kv_mask, weight, pattern=padded(pattern, LENGTH), is_causal=is_causal)
    for state, gradients in (*by_forms, gathered):
        np.testing.assert_allclose(state.out, out, atol=3e-6)
        np.testing.assert_allclose(state.lse, lse, atol=3e-6)
        chex.assert_trees_all_close(gradients, dense, atol=5e-6)
        empty = ~mask.any(axis=1)
        np.testing.assert_array_equal(np.asarray(state.out)[empty], 0)
        np.testing.assert_array_equal(np.asarray(gradients[0])[empty], 0)


def state_and_gradients(q, k, v, kv_mask, weight, *, pattern, is_causal):
    def function(q, k, v):
        options = {"is_causal": is_causal, "kv_mask": kv_mask, "return_state": True}
        return sparse_attention(q, k, v, pattern=pattern, **options)

    state, pull = jax.vjp(function, q, k, v)
    return state, pull(type(state)(weight, jnp.zeros(LENGTH)))


# A pattern that is traced is gathered.
as_an_argument = jax.jit(state_and_gradients, static_argnames="is_causal")


@jax.jit
def gradients_of_exact(q, k, v, mask, weight):
    return jax.vjp(functools.partial(exact, mask=mask), q, k, v)[1](weight)


def test_in_float64_other_lengths_and_rows_that_see_nothing(x64):
    for num_queries, num_keys, block_size in ((23, 50, 8), (50, 23, 8), (9, 9, 16), (5, 7, 1)):
        q, k, v = random_head(2, num_queries, num_keys, 8, 5, jnp.float64)
        blocks = blocks_of(num_queries, num_keys, block_size, 0.4)
        blocks.kinds[0] = 0
        for is_causal in (False, True):
            mask = blocks.to_mask() & (causal_mask(num_queries, num_keys) if is_causal else True)
            if is_causal:
                np.testing.assert_array_equal(blocks.causal().to_mask(), mask)
            state = jax.jit(
                functools.partial(sparse_attention, pattern=blocks, is_causal=is_causal, return_state=True)
            )(q, k, v)
            out, lse = brute_force(q, k, v, mask=mask)
            np.testing.assert_allclose(state.out, out, atol=1e-13)
            np.testing.assert_allclose(state.lse, lse, atol=1e-13)
            assert np.all(np.asarray(state.out)[:block_size] == 0)


def test_rows_of_many_blocks_are_merged_by_steps():
    # One row of blocks is longer than a step of 2048 keys and no multiple of it; the others have two lengths.
    q, k, v = random_head(3, 96, 5000, 4, 3)
    visited = np.zeros((3, 157), bool)
    visited[0], visited[1, [3, 156]], visited[2, :40] = True, True, True
    blocks = BlockMap.from_blocks(visited, block_size=32, num_queries=96, num_keys=5000)
    weight = np.random.default_rng(1).normal(size=(96, 3)).astype(np.float32)
    mask = blocks.to_mask()

    @jax.jit
    def ours(q, k, v, weight):
        out, pull = jax.vjp(functools.partial(sparse_attention, pattern=blocks), q, k, v)
        return out, pull(weight)

    out, gradients = ours(q, k, v, weight)
    chex.assert_trees_all_close(gradients, gradients_of_exact(q, k, v, mask, weight), atol=5e-6)
    np.testing.assert_allclose(out, brute_force(q, k, v, mask=mask)[0], atol=2e-6)


def test_lists_that_are_known_only_at_run_time():
    q, k, v = random_head(4, 21, 30)
    lists = np.array([[0, 2, 5], [7, 1, 0], [3, 3, 3], [0, 0, 0], [4, 6, 2], [1, 5, 7]], np.int32)
    present = np.array([[1, 1, 0], [1, 1, 1], [0, 1, 0], [0, 0, 0], [1, 1, 1], [1, 0, 1]], bool)
    mask = np.zeros((6, 8), bool)
    for row in range(6):
        mask[row, lists[row][present[row]]] = True
    mask = np.repeat(np.repeat(mask, 4, 0), 4, 1)[:21, :30]
    state = jax.jit(functools.partial(block_lists_state, block_size=4))(*scaled(q, k), v, lists, present)
    out, lse = brute_force(q, k, v, mask=mask)
    np.testing.assert_allclose(state.out, out, atol=2e-6)
    np.testing.assert_allclose(state.lse, lse, atol=2e-6)


def test_nothing_outside_the_support_is_read():
    # NaN where no query attends: in blocks that are not visited, and in keys that are not gathered.
    q, k, v = random_head(5, 24, 24)
    pattern = SparsePattern.from_dense(np.tile(np.arange(24) % 3 == 0, (24, 1)) & (np.arange(24) < 12)[None])
    k, v = (np.array(x) for x in (k, v))
    for x in (k, v):
        x[12:], x[1] = np.nan, np.nan
    gathered = jax.jit(lambda *args: sparse_attention(*args[:3], pattern=args[3]))(q, k, v, pattern)
    assert np.all(np.isfinite(gathered))
    k[1], v[1] = 0, 0

    @jax.jit
    def out_and_gradients(q, k, v):
        out, pull = jax.vjp(functools.partial(sparse_attention, pattern=BlockMap.from_pattern(pattern, 4)), q, k, v)
        return out, pull(out)

    out, gradients = out_and_gradients(q, k, v)
    np.testing.assert_allclose(out, gathered, atol=2e-6)
    chex.assert_tree_all_finite(gradients)


def test_a_later_token_changes_nothing_before_it():
    q, k, v = random_head(6, LENGTH, LENGTH)
    pattern = PATTERNS["global"]()
    for form in (lambda: pattern, lambda: BlockMap.from_pattern(pattern, 8)):
        function = jax.jit(functools.partial(sparse_attention, pattern=form(), is_causal=True))
        before = np.asarray(function(q, k, v))
        for j in (3, 8, 20):
            later_k, later_v = np.array(k), np.array(v)
            later_k[j] += 3
            later_v[j] = 1e4
            after = np.asarray(function(q, later_k, later_v))
            np.testing.assert_array_equal(after[:j], before[:j])
            assert np.any(after[j:] != before[j:])


def test_batches_heads_and_bfloat16():
    pattern = PATTERNS["strided"]()
    heads = [np.stack(x) for x in zip(*(random_head(i, LENGTH, LENGTH) for i in range(2)), strict=True)]
    half = [as_array(x[0], jnp.bfloat16) for x in heads]
    for form in (pattern, BlockMap.from_pattern(pattern, 16)):
        function = functools.partial(sparse_attention, pattern=form)
        one = jax.jit(function)
        loop = np.stack([one(*(x[i] for x in heads)) for i in range(2)])
        np.testing.assert_allclose(jax.jit(jax.vmap(function))(*heads), loop, atol=1e-6)
        layout = (x.swapaxes(0, 1)[None] for x in heads)
        out = jax.jit(functools.partial(attention, method=function))(*layout)
        np.testing.assert_allclose(np.asarray(out)[0].swapaxes(0, 1), loop, atol=1e-6)
        out = one(*half)
        assert out.dtype == jnp.bfloat16
        wide = one(*(np.asarray(x, np.float32) for x in half))
        np.testing.assert_array_equal(out, np.asarray(wide, jnp.bfloat16))


def test_the_cheaper_form_is_chosen(monkeypatch):
    chosen = []
    for name in ("block_sparse_state", "_over_gathered"):
        form = getattr(sparse, name)

        def noted(*args, name=name, form=form, **options):
            chosen.append(name)
            return form(*args, **options)

        monkeypatch.setattr(sparse, name, noted)
    q, k, v = random_head(7, 512, 512, 4)
    few, band = random_pattern(jax.random.key(0), 512, 4), SparsePattern.banded(512, range(-20, 21))
    jax.eval_shape(lambda: sparse_attention(q, k, v, pattern=few))
    jax.eval_shape(lambda: sparse_attention(q, k, v, pattern=band))
    jax.eval_shape(lambda pattern: sparse_attention(q, k, v, pattern=pattern), band)
    jax.eval_shape(lambda: sparse_attention(q, k, v, pattern=BlockMap.from_pattern(few, 64)))
    assert chosen == ["_over_gathered", "block_sparse_state", "_over_gathered", "block_sparse_state"]


def test_what_a_causal_head_does_not_see_is_not_gathered():
    # A global token at the start sees every key, but only itself in the causal form.
    pattern = SparsePattern.banded(512, [-1, 0]).with_global([0])
    assert pattern.keys_per_row == 512
    chosen = sparse._cheaper(pattern, True)
    assert isinstance(chosen, SparsePattern)
    assert chosen.keys_per_row == 3
    np.testing.assert_array_equal(support(chosen), support(pattern) & causal_mask(512, 512))
    assert isinstance(sparse._cheaper(pattern, False), BlockMap)


def test_only_visited_blocks_are_computed(optimized):
    length, size, head_dim = 4096, 64, 32
    x = jax.ShapeDtypeStruct((length, head_dim), jnp.float32)
    blocks = BlockMap.banded(3, 0, block_size=size, num_queries=length, num_keys=length)
    assert blocks.density == blocks.visited.sum() * size**2 / length**2
    compiled = jax.jit(functools.partial(sparse_attention, pattern=blocks)).lower(x, x, x).compile(optimized)
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * length**2 / 4
    jaxpr = jax.make_jaxpr(functools.partial(sparse_attention, pattern=blocks))(x, x, x).jaxpr
    products = sum(
        2 * times * math.prod(equation.outvars[0].aval.shape) * depth(equation)
        for equation, times in equations(jaxpr, platform="cpu")
        if equation.primitive.name == "dot_general"
    )
    assert products < 1.1 * 4 * blocks.visited.sum() * size**2 * head_dim


def depth(equation):
    (contracted, _), _ = equation.params["dimension_numbers"]
    return math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)


def test_block_maps_are_static_arguments():
    pattern = PATTERNS["ragged"]()
    first, second = (BlockMap.from_pattern(pattern, 8) for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)
    assert first != first.causal() or np.array_equal(first.to_mask(), first.causal().to_mask())
    assert first != BlockMap.from_pattern(pattern, 4)
    np.testing.assert_array_equal(first.to_mask(), support(pattern))
    np.testing.assert_array_equal(first.visited, jax.jit(lambda: pattern.block_mask(8))())
    function = jax.jit(sparse_attention, static_argnames="pattern")
    q, k, v = random_head(8, LENGTH, LENGTH)
    for blocks in (first, second):
        function(q, k, v, pattern=blocks)
    assert function._cache_size() == 1


@pytest.mark.parametrize("is_causal", [False, True])
def test_weights_of_a_pattern_may_be_traced(is_causal):
    q, k, v = random_head(8, LENGTH, LENGTH)
    pattern = PATTERNS["ragged"]()

    def answer(log_weights):
        weighted = dataclasses.replace(pattern, log_weights=log_weights)
        return sparse_attention(q, k, v, pattern=weighted, is_causal=is_causal)

    np.testing.assert_array_equal(jax.jit(answer)(pattern.log_weights), jax.jit(lambda: answer(pattern.log_weights))())


def test_what_is_refused():
    q, k, v = random_head(9, 8, 8)
    with pytest.raises(ValueError, match=r"pattern must be of \[T, S\] = \[8, 8\], got \[9, 9\]"):
        sparse_attention(q, k, v, pattern=SparsePattern.banded(9, [0]))
    with pytest.raises(ValueError, match=r"in blocks of 4 = \[2, 2\]"):
        BlockMap.from_blocks(np.ones((3, 2), bool), block_size=4, num_queries=8, num_keys=8)
    with pytest.raises(TypeError, match="visited must be boolean"):
        BlockMap.from_blocks(np.ones((2, 2)), block_size=4, num_queries=8, num_keys=8)
    with pytest.raises(TypeError, match="must be concrete"):
        jax.jit(lambda pattern: BlockMap.from_pattern(pattern).kinds)(SparsePattern.banded(9, [0]))
    with pytest.raises(ValueError, match="num_window_blocks must be odd"):
        bigbird(q, k, v, jax.random.key(0), num_window_blocks=2)
    with pytest.raises(ValueError, match="blocks must be"):
        bigbird(q, k, v, block_size=4, blocks=as_array(np.zeros((3, 1)), jnp.int32))
    with pytest.raises(TypeError, match="blocks"):
        bigbird(q, k, v, block_size=4, blocks=as_array(np.zeros((2, 1))))
    with pytest.raises(ValueError, match="lsh_top_k is random"):
        lsh_top_k(q, k, v)
    with pytest.raises(ValueError, match="num_hashes must be at most 24, got 40"):
        lsh_top_k(q, k, v, jax.random.key(0), num_hashes=40)


# methods with fixed and random patterns


@pytest.mark.parametrize(
    ("num_queries", "num_keys"),
    [(37, 37), (11, 37), *(pytest.param(*x, marks=pytest.mark.slow) for x in [(37, 11), (3, 2)])],
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_longformer_is_a_window_with_global_tokens(num_queries, num_keys, is_causal):
    q, k, v = random_head(10, num_queries, num_keys)
    kv_mask = np.arange(num_keys) % 5 != 1
    *tokens, rows = without_padding(*map(np.asarray, (q, k, v)), kv_mask, is_causal)
    row, column = np.arange(len(tokens[0]))[:, None], np.arange(len(tokens[1]))[None]
    for window, num_global in ((4, 3), (1, 0), (2, 30)):
        mask = (abs(row - column) < window) | (column < num_global) | (row < num_global)
        mask = mask & ((column <= row) | (not is_causal))
        state = longformer(
            q, k, v, window_size=window, num_global=num_global, is_causal=is_causal, kv_mask=jax.device_put(kv_mask),
            return_state=True,
        )  # fmt: skip
        out, lse = brute_force(*tokens, mask=mask)
        np.testing.assert_allclose(np.asarray(state.out)[rows], out, atol=2e-6)
        np.testing.assert_allclose(np.asarray(state.lse)[rows], lse, atol=2e-6)


@pytest.mark.parametrize("is_causal", [False, True])
def test_bigbird_is_a_window_with_global_and_random_blocks(is_causal):
    q, k, v = random_head(11, 38, 45)
    blocks = np.random.default_rng(0).integers(-1, 13, size=(10, 4))
    row, column = np.arange(38)[:, None] // 4, np.arange(45)[None] // 4
    mask = (abs(row - column) <= 1) | (column < 2) | (row < 2)
    mask |= (blocks[row[:, 0]][:, :, None] == column[0][None, None]).any(1)
    mask &= (np.arange(45)[None] <= np.arange(38)[:, None]) | (not is_causal)
    options = {"block_size": 4, "num_global_blocks": 2, "is_causal": is_causal}
    out = bigbird(q, k, v, blocks=jax.device_put(blocks.astype(np.int32)), **options)
    np.testing.assert_allclose(out, brute_force(q, k, v, mask=mask)[0], atol=2e-6)


def test_given_blocks_that_are_none_hide_no_other():
    free = np.array([[True, True, True, False]])
    chosen = jax.jit(functools.partial(_given_lists, free))
    for given, seen in (
        ([-1, 0, -1, -1], [0]),
        ([-2, -1, 0, 1], [0, 1]),
        ([0, 0, 4, 9], [0]),
        ([3, 2, -1, -1], [2]),
    ):
        lists, present = chosen(np.array([given], np.int32))
        assert np.asarray(lists)[np.asarray(present)].tolist() == seen
    q, k, v = random_head(11, 38, 45)
    options = {"block_size": 4, "num_random_blocks": 0}
    none = bigbird(q, k, v, blocks=as_array(np.full((10, 2), -1), jnp.int32), **options)
    np.testing.assert_allclose(bigbird(q, k, v, **options), none, atol=1e-6)


def test_random_blocks_are_uniform_and_left_over():
    free = np.ones((6, 9), bool)
    free[:, :2] = False
    free[5, 4:] = False
    draw = jax.jit(jax.vmap(lambda key: _random_lists(free, 3, key, None)))
    lists, present = draw(jax.random.split(jax.random.key(0), 2000))
    drawn = np.zeros((2000, 6, 9), int)
    draws, rows, _ = np.indices(lists.shape)
    np.add.at(drawn, (draws, rows, np.asarray(lists)), np.asarray(present))
    assert drawn.max() == 1
    np.testing.assert_array_equal(drawn.sum(2)[:, :5], 3)
    np.testing.assert_array_equal(drawn[:, 5], np.tile(free[5], (2000, 1)))
    assert np.all(drawn[:, :, :2] == 0)
    z = (drawn[:, :5, 2:].mean(0) - 3 / 7) / np.sqrt(3 / 7 * 4 / 7 / 2000)
    assert np.abs(z).max() < 4.5


# top-k


def best_mask(q, k, count, is_causal):
    logits = np.asarray(q, np.float64) @ np.asarray(k, np.float64).T
    seen = causal_mask(*logits.shape) if is_causal else np.ones(logits.shape, bool)
    logits = np.where(seen, logits, -np.inf)
    threshold = -np.sort(-logits, axis=1)[:, count - 1 : count]
    return seen & (logits >= threshold)


@pytest.mark.parametrize("is_causal", [False, True])
def test_top_k_equals_brute_force(is_causal):
    # Longer than a block of keys, so that the best keys of two blocks are merged.
    q, k, v = random_head(12, 70, 1500)
    for count in (1, 7):
        function = jax.jit(functools.partial(top_k, keys_per_query=count, is_causal=is_causal, return_state=True))
        state = function(q, k, v)
        out, lse = brute_force(q, k, v, mask=best_mask(q, k, count, is_causal))
        np.testing.assert_allclose(state.out, out, atol=2e-6)
        np.testing.assert_allclose(state.lse, lse, atol=2e-6)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("method", [top_k, lsh_top_k])
def test_as_many_keys_as_there_are_is_exact(method, is_causal):
    q, k, v = random_head(13, 29, 29)
    out = method(q, k, v, jax.random.key(0), keys_per_query=40, is_causal=is_causal)
    mask = causal_mask(29, 29) if is_causal else None
    np.testing.assert_allclose(out, brute_force(q, k, v, mask=mask)[0], atol=2e-6)


def test_top_k_leaves_out_the_least_weight():
    q, k, v = random_head(14, 16, 200)
    weights = np.exp(np.asarray(q) @ np.asarray(k).T / np.sqrt(8))
    left_out = 1 - -np.sort(-weights, axis=1)[:, :20].sum(1) / weights.sum(1)
    state = top_k(q, k, v, keys_per_query=20, return_state=True)
    np.testing.assert_allclose(1 - np.exp(np.asarray(state.lse) - brute_force(q, k, v)[1]), left_out, atol=1e-5)
    error = np.abs(np.asarray(state.out) - brute_force(q, k, v)[0]).max(1)
    assert np.all(error <= 2 * left_out * np.abs(v).max() + 1e-6)


@pytest.mark.parametrize("is_causal", [False, True])
def test_lsh_finds_what_shares_a_bucket_and_counts_it_once(is_causal):
    # With one round and wide buckets the candidates are the keys of two buckets, whose best are known.
    kv_mask, tokens = np.arange(47) % 7 != 2, random_head(15, 47, 47)
    q, k, v = (np.asarray(x)[kv_mask] for x in tokens)
    planes = np.random.default_rng(1).normal(size=(1, 3, 8)).astype(np.float32)
    side_q, side_k = (x @ planes[0].T for x in (q, k))
    bucket_q, bucket_k = ((side > 0) @ [1, 2, 4] for side in (side_q, side_k))
    neighbour = bucket_q ^ np.array([1, 2, 4])[np.argmin(np.abs(side_q), axis=1)]
    met = (bucket_q[:, None] == bucket_k[None]) | (neighbour[:, None] == bucket_k[None])
    met &= causal_mask(40, 40) if is_causal else True
    # A query without candidates sees the key at its position, such as the first queries in the causal form.
    alone = np.eye(40, dtype=bool)
    assert not is_causal or not met.any(1).all()
    met = np.where(met.any(1)[:, None], met, alone)
    options = {"is_causal": is_causal, "kv_mask": jax.device_put(kv_mask), "keys_per_query": 39}
    for rounds in (1, 3):  # repeating a round finds nothing new
        out = np.asarray(lsh_top_k(*tokens, projection=jax.device_put(np.tile(planes, (rounds, 1, 1))), **options))
        np.testing.assert_allclose(out[kv_mask], brute_force(q, k, v, mask=met)[0], atol=2e-6)
    # A narrow bucket gives the last keys before the query, or those around it.
    options["keys_per_query"] = 3
    expected = np.zeros((40, 40), bool)
    for t in range(40):
        for bucket in (bucket_q[t], neighbour[t]):
            members = np.flatnonzero(bucket_k == bucket)
            after = np.searchsorted(members, t, side="right")
            first = max(0, after - 3) if is_causal else min(max(0, after - 2), max(0, len(members) - 3))
            expected[t, members[first : after if is_causal else first + 3]] = True
    expected = np.where(expected.any(1)[:, None], expected, alone)
    logits = np.where(expected, np.asarray(q) @ np.asarray(k).T, -np.inf)
    expected &= logits >= -np.sort(-logits, axis=1)[:, 2:3]
    out = np.asarray(lsh_top_k(*tokens, projection=jax.device_put(planes), **options))
    np.testing.assert_allclose(out[kv_mask], brute_force(q, k, v, mask=expected)[0], atol=2e-6)


@pytest.mark.slow
def test_lsh_recalls_more_with_more_rounds():
    _, k, v = random_head(16, 1, 512, 16)
    q = k + 0.3 * random_head(17, 512, 512, 16)[0]
    best = top_k(q, k, v, scale=1.0, keys_per_query=16)

    def error(rounds):
        return relative_error(
            lsh_top_k(q, k, v, jax.random.key(0), scale=1.0, keys_per_query=16, num_rounds=rounds), best
        )

    errors = [error(rounds) for rounds in (1, 4, 12)]
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.15


def test_realised_patterns_are_found_again():
    realisation = pytest.importorskip("approx_attention.realization")
    pattern = random_pattern(jax.random.key(3), 96, 3)
    realised = realisation.realize_sparse_pattern(pattern, 0.01, 0.1, d=64, key=jax.random.key(4), method="wls")
    inputs, w_q, w_k = map(np.asarray, (realised.inputs, realised.w_q, realised.w_k))
    q, k, v = jax.device_put(inputs @ w_q), jax.device_put(inputs @ w_k), random_head(18, 96, 96)[2]
    ideal = support(pattern) / 3 @ np.asarray(v)
    by_pattern = jax.jit(functools.partial(sparse_attention, scale=1.0, pattern=pattern))
    for found in (top_k(q, k, v, scale=1.0, keys_per_query=3), by_pattern(q, k, v)):
        np.testing.assert_allclose(found, ideal, atol=1e-3)
