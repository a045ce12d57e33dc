"""Linformer against float64 loops, in the limits where it is attention, and in the causal form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import Decoder, block_linformer, linformer, mean_pool, svd
from approx_attention.methods import Convolution, LinformerPrefix, linformer_step, running_block_linformer
from tests.methods.case import Case, within_block
from tests.references import as_array, brute_force, causal_mask, compiled, random_head, relative_error, scaled

CASES = {
    "linformer": Case(
        # The segments that are pooled into slots depend on the length.
        any_length=lambda length: {"projection_k": random_head(28, 6, length, length)[0]},
        changes={
            "projection_k": as_array(np.ones((3, 40))),
            "projection_v": as_array(np.ones((8, 40))),
            "renormalize": True,
        },
        contexts={"renormalize": {"projection_k": as_array(np.ones((3, 40)))}},
        without_effect=("block_size",),
        learned=("projection_k", (3, 12)),
    ),
    "block_linformer": Case(
        size=within_block,
        changes={
            "slots_per_block": 1,
            "projection_k": as_array(np.ones((3, 4))),
            "projection_v": as_array(2 * np.ones((3, 4))),
        },
        contexts={"projection_v": {"projection_k": as_array(np.ones((3, 4)))}},
        learned=("projection_k", (3, 4)),
        devices={"slots_per_block": 2, "block_size": 4},
    ),
}

block_linformer, linformer, mean_pool, svd = compiled(block_linformer, linformer, mean_pool, svd)


def loop(q, k, v, e, f=None, *, is_causal=False, real=None, whole=None):
    """The layer in float64, query by query; ``whole`` are the row sums that visible ones are scaled to."""
    q, k, v, e = (np.asarray(x, np.float64) for x in (q, k, v, e))
    f = e if f is None else np.asarray(f, np.float64)
    real = np.ones(len(k), bool) if real is None else np.asarray(real)
    out = np.zeros((len(q), v.shape[1]))
    for t in range(len(q)):
        seen = real & ((np.arange(len(k)) <= t) | (not is_causal))
        slots = [r for r in range(len(e)) if np.any(e[r, seen] != 0)]
        if not slots:
            continue
        keys, values = (np.stack([m[r, seen] @ x[seen] for r in slots]) for m, x in ((e, k), (f, v)))
        if whole is not None:
            share = np.stack([whole[r] / e[r, seen].sum() for r in slots])[:, None]
            keys, values = keys * share, values * share
        logits = keys @ q[t] / np.sqrt(q.shape[1])
        weights = np.exp(logits - logits.max())
        out[t] = weights @ values / weights.sum()
    return out


def projections(seed, num_slots=4, num_keys=12):
    random = np.random.default_rng(seed)
    e, f = (random.normal(size=(num_slots, num_keys)) / np.sqrt(num_keys) for _ in "ef")
    e[1, :3], e[2:3] = 0, 0
    return jax.device_put(e.astype(np.float32)), jax.device_put(f.astype(np.float32))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", [(12, 12), (5, 12), (12, 7), (1, 1)])
def test_is_the_layer_as_a_loop_writes_it(is_causal, lengths):
    q, k, v = random_head(0, *lengths, 6, 3)
    e, f = projections(1)
    real = jax.device_put(np.arange(lengths[1]) != 2)
    options = {"projection_k": e, "projection_v": f, "is_causal": is_causal, "block_size": 5, "kv_mask": real}
    e, f = (np.asarray(x)[:, : lengths[1]] for x in (e, f))
    expected = loop(q, k, v, e, f, is_causal=is_causal, real=real)
    np.testing.assert_allclose(linformer(q, k, v, **options), expected, atol=2e-6)


@pytest.mark.parametrize("is_causal", [False, True])
def test_renormalised_rows_keep_their_scale(is_causal):
    q, k, v = random_head(2, 9, 9, 6, 3)
    e = jax.device_put(np.abs(projections(3)[0]))
    real = jax.device_put(np.arange(9) != 4)
    whole = np.asarray(e, np.float64).sum(1)
    out = linformer(q, k, v, projection_k=e, renormalize=True, is_causal=is_causal, kv_mask=real, block_size=4)
    np.testing.assert_allclose(
        out, loop(q, k, v, np.asarray(e)[:, :9], is_causal=is_causal, real=real, whole=whole), atol=2e-6
    )


@pytest.mark.parametrize("is_causal", [False, True])
def test_identities_and_common_permutations_are_exact(is_causal):
    q, k, v = random_head(4, 12, 12, 6, 3)
    expected = brute_force(q, k, v, mask=causal_mask(12, 12) if is_causal else None)[0]
    identity = np.eye(12, dtype=np.float32)
    for matrix in (identity, identity[np.random.default_rng(0).permutation(12)]):
        out = linformer(q, k, v, projection_k=jax.device_put(matrix), is_causal=is_causal, block_size=5)
        np.testing.assert_allclose(out, expected, atol=2e-6)


def test_a_general_orthogonal_projection_is_not_attention():
    q, k, v = random_head(5, 64, 64, 16)
    orthogonal = jax.device_put(np.linalg.qr(random_head(6, 64, 64, 64)[0])[0])
    expected = brute_force(q, k, v)[0]
    assert relative_error(linformer(q, k, v, projection_k=orthogonal), expected) > 0.5


def test_one_slot_answers_every_query_alike():
    q, k, v = random_head(7, 5, 12, 6, 3)
    f = np.asarray(projections(8)[1])[:1]
    out = linformer(q, k, v, projection_k=jax.device_put(f))
    np.testing.assert_allclose(out, np.tile(f @ np.asarray(v), (5, 1)), atol=1e-6)
    mean = np.tile(np.asarray(v).mean(0), (5, 1))
    np.testing.assert_allclose(linformer(q, k, v, num_slots=1), mean, atol=1e-6)


def test_pooling_lacks_the_counts_of_mean_pool():
    q, k, v = random_head(9, 6, 10, 6, 3)
    k = jax.device_put(np.repeat(np.asarray(k)[:4], [3, 2, 3, 2], axis=0))
    with_counts = np.asarray(mean_pool(q, k, v, num_landmarks=4))
    np.testing.assert_allclose(with_counts, brute_force(q, k, v)[0], atol=2e-6)
    assert np.abs(np.asarray(linformer(q, k, v, num_slots=4)) - with_counts).max() > 1e-2
    # If all segments have the same length, the counts cancel.
    np.testing.assert_allclose(linformer(q, k, v, num_slots=5), mean_pool(q, k, v, num_landmarks=5), atol=2e-6)


def test_moving_all_keys_matters_unless_rows_have_one_sum():
    q, k, v = random_head(10, 6, 12, 6, 3)
    e, f = projections(11)
    moved, raised = jax.device_put(np.asarray(k) + np.arange(6, dtype=np.float32)), jax.device_put(np.asarray(v) + 1)
    even = np.abs(f) / np.sum(np.abs(f), axis=1, keepdims=True)

    def answer(k, v, e, f=None):
        given = {"projection_k": e} | ({} if f is None else {"projection_v": f})
        return np.asarray(linformer(q, k, v, **jax.tree.map(jax.device_put, given)))

    assert np.abs(answer(moved, v, e) - answer(k, v, e)).max() > 1e-2
    np.testing.assert_allclose(answer(moved, v, even), answer(k, v, even), atol=1e-5)
    np.testing.assert_allclose(answer(k, raised, e, even) - answer(k, v, e, even), 1, atol=1e-5)


@pytest.mark.parametrize("projection", ["mean", "max", "matrix", "convolution"])
def test_padding_is_as_good_as_removed(projection):
    q, k, v = random_head(12, 5, 12, 6, 6)
    e, _ = projections(13)
    chosen = {"matrix": e, "convolution": Convolution(random_head(14, 3, 1, 6)[0])}.get(projection, projection)
    real = np.arange(12) < 9
    options = {"projection_k": chosen, "num_slots": 4, "kv_mask": jax.device_put(real)}
    out = linformer(q, k, v, **options)
    soiled = [jax.device_put(np.where(real[:, None], x, np.float32(np.nan))) for x in (k, v)]
    np.testing.assert_array_equal(linformer(q, *soiled, **options), out)
    removed = [jax.device_put(np.asarray(x)[:9]) for x in (k, v)]
    np.testing.assert_allclose(linformer(q, *removed, projection_k=chosen, num_slots=4), out, atol=2e-6)


def test_maxima_and_convolutions_by_hand():
    q, k, v = random_head(15, 5, 8, 6, 6)
    pooled = [np.asarray(x).reshape(4, 2, 6).max(1) for x in (k, v)]
    expected = brute_force(q, *pooled)[0]
    np.testing.assert_allclose(linformer(q, k, v, projection_k="max", num_slots=4), expected, atol=2e-6)
    weight = random_head(16, 3, 1, 6)[0]
    rows = [np.concatenate([x, np.zeros((1, 6))]).reshape(3, 3, 6) for x in (k, v)]
    expected = brute_force(q, *((x * np.asarray(weight)[None]).sum(1) for x in rows))[0]
    np.testing.assert_allclose(linformer(q, k, v, projection_k=Convolution(weight)), expected, atol=2e-6)


def test_no_other_matrix_of_its_rank_is_nearer_than_the_decomposition():
    q, k, _ = random_head(17, 12, 12, 6)
    identity = jax.device_put(np.eye(12, dtype=np.float32))
    weights = brute_force(q, k, identity)[0]
    implied = np.asarray(linformer(q, k, identity, projection_k=projections(18)[0]))
    best = np.asarray(svd(q, k, identity, rank=4))
    assert np.linalg.norm(implied - weights) > np.linalg.norm(best - weights)
    assert np.linalg.matrix_rank(implied, tol=1e-5) <= 4


def test_the_future_changes_nothing_to_the_bit():
    q, k, v = random_head(19, 12, 12, 6, 3)
    e, f = projections(20)
    options = {"projection_k": e, "projection_v": f, "is_causal": True, "block_size": 4}
    later = np.arange(12)[:, None] >= 7
    changed_k, changed_v = (jax.device_put(np.where(later, np.float32(y), x)) for x, y in ((k, 9), (v, -9)))
    changed, out = (np.asarray(linformer(q, *x, **options)) for x in ((changed_k, changed_v), (k, v)))
    np.testing.assert_array_equal(changed[:7], out[:7])


def test_steps_equal_the_causal_form():
    q, k, v = random_head(21, 12, 12, 6, 3)
    e, f = projections(22)
    whole = linformer(q, k, v, projection_k=e, projection_v=f, is_causal=True)
    rows = *scaled(q, k), np.asarray(v)
    columns = [np.asarray(x) for x in (e, f)]
    prefix, outs = jax.jit(LinformerPrefix.empty, static_argnums=(0, 1, 2))(4, 6, 3), []
    step = jax.jit(linformer_step)
    for t in range(12):
        now = slice(t, t + 1)
        out, prefix = step(prefix, *(x[now] for x in rows), *(x[:, now] for x in columns))
        outs.append(out)
    np.testing.assert_allclose(np.concatenate(outs), whole, atol=2e-6)


@pytest.mark.parametrize("projection", [None, "learned"])
def test_blocks_against_a_loop(projection):
    q, k, v = random_head(23, 14, 14, 6, 3)
    e, f = projections(24, 2, 4)
    learned = {} if projection is None else {"projection_k": e, "projection_v": f}
    out = block_linformer(q, k, v, is_causal=True, slots_per_block=2, block_size=4, **learned)
    out, q = np.asarray(out), np.asarray(q, np.float64)
    means = np.kron(np.eye(2), [[0.5, 0.5]])
    e, f = (means, means) if projection is None else (np.asarray(e), np.asarray(f))
    k64, v64 = (np.concatenate([x, np.zeros((2, x.shape[1]))]) for x in (k, v))
    slots = [(e @ k64[b : b + 4], f @ v64[b : b + 4]) for b in range(0, 12, 4)]
    for t in range(14):
        near = slice(max(0, 4 * (t // 4) - 4), t + 1)
        far = range(max(0, t // 4 - 1))
        keys = np.concatenate([k64[near], *(slots[b][0] for b in far)])
        values = np.concatenate([v64[near], *(slots[b][1] for b in far)])
        count = np.concatenate([np.ones(near.stop - near.start), *(np.full(2, 2.0) for _ in far)])
        weights = count * np.exp(keys @ q[t] / np.sqrt(6))
        np.testing.assert_allclose(out[t], weights @ values / weights.sum(), atol=2e-6)


def test_blocks_that_are_not_full_are_exact_by_the_identity():
    q, k, v = random_head(27, 10, 10, 6, 3)
    real = np.arange(10) != 1
    expected = brute_force(q, k, v, mask=real[None, :])[0]
    options = {"projection_k": jax.device_put(np.eye(4, dtype=np.float32)), "block_size": 4}
    masked = {"kv_mask": jax.device_put(real), **options}
    np.testing.assert_allclose(block_linformer(q, k, v, **masked), expected, atol=2e-6)
    out = np.asarray(block_linformer(q, k, v, is_causal=True, **masked))
    expected = brute_force(q, k, v, mask=real[None, :] & causal_mask(10, 10))[0]
    np.testing.assert_allclose(out[real], expected[real], atol=2e-6)
    first = [jax.device_put(np.asarray(x)[:3]) for x in (q, k, v)]
    few = block_linformer(*first, is_causal=True, **options)
    np.testing.assert_allclose(few, brute_force(*first, mask=causal_mask(3, 3))[0], atol=2e-6)


def test_a_prefix_longer_than_its_room_goes_on():
    _, k, v = random_head(25, 1, 64, 6, 3)
    running = running_block_linformer(6, slots_per_block=2, block_size=4, max_length=16)
    decoder = Decoder(running=running, head_dim=6, value_dim=3, block_size=4)

    @jax.jit
    def after_all(k, v):
        _, cache = decoder.prefill(decoder.init(), jnp.zeros_like(k), k, v)
        return running.read(cache.past.prefix)

    held = after_all(k, v)
    assert held.mass.shape == (8,)
    assert np.asarray(held.mass).sum() == 64 - 8
    value_sum = np.asarray(v)[:56].sum(0)
    np.testing.assert_allclose(np.asarray(held.value_sum).sum(0), value_sum, rtol=1e-5, atol=1e-5)


def test_what_is_wrong_is_said():
    q, k, v = random_head(26, 5, 12, 6, 3)

    def ones(*shape):
        return as_array(np.ones(shape))

    with pytest.raises(ValueError, match=r"projection_k has columns for 8 keys, got 12"):
        linformer(q, k, v, projection_k=ones(3, 8))
    with pytest.raises(ValueError, match=r"the same number of slots, got 3 and 4"):
        linformer(q, k, v, projection_k=ones(3, 12), projection_v=ones(4, 12))
    with pytest.raises(ValueError, match=r"use per_head for one per head"):
        linformer(q, k, v, projection_k=ones(2, 3, 12))
    with pytest.raises(NotImplementedError, match=r"'linformer' does not support is_causal with projection_k 'max'"):
        linformer(q, k, v, projection_k="max", is_causal=True)
    with pytest.raises(ValueError, match=r"convolves 5 channels, got 6"):
        linformer(q, k, v, projection_k=Convolution(ones(2, 5)))
    with pytest.raises(ValueError, match=r"projection_v needs a projection_k"):
        block_linformer(q, k, v, projection_v=ones(2, 4), block_size=4)
    with pytest.raises(ValueError, match=r"weight of a convolution must be \[w, D\]"):
        linformer(q, k, v, projection_k=Convolution(ones(2)))
    with pytest.raises(NotImplementedError, match=r"renormalize with a convolution"):
        linformer(q, k, v, projection_k=Convolution(ones(2, 6)), renormalize=True)
    with pytest.raises(NotImplementedError, match=r"renormalize with a maximum"):
        linformer(q, k, v, projection_k="max", renormalize=True)
    with pytest.raises(ValueError, match=r"must be \[R, b\] with b = 4"):
        block_linformer(q, k, v, projection_k=ones(2, 5), block_size=4)


def test_blocks_have_slots_even_where_none_is_asked():
    q, k, v = random_head(0, 6, 6)
    with pytest.raises(ValueError, match="slots_per_block must be at least 1, got 0"):
        block_linformer(q, k, v, slots_per_block=0, is_causal=True)
