"""Sequences sharded over eight CPU devices against one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from approx_attention import METHODS, attend, attention, context_parallel, fold_scale, merge
from tests.references import random_heads

# Small enough to shard over eight devices, and not a multiple of them.
LENGTH, LENGTHS = 61, jnp.array([61, 40])
SETTINGS = {
    "exact": {},
    "local": {"window_size": 5},
    "mean_value": {},
    "favor": {"num_features": 16, "block_size": 4},
    "rfa": {"num_features": 32, "block_size": 4},
    "polynomial": {"block_size": 4},
    "block_linformer": {"slots_per_block": 2, "block_size": 4},
    # As many tokens as there are keys, and so what one device has.
    "coreset": {"coreset_size": 64, "block_size": 4},
    "mean_pool": {"num_landmarks": 64, "block_size": 4},
    "uniform_sample": {"sample_size": 64, "block_size": 4},
}


def mesh_of(devices):
    return jax.make_mesh((devices,), ("sequence",))


def sharded(query, key, value, devices, **options):
    options.setdefault("rng", jax.random.key(5))
    return context_parallel.attention(query, key, value, mesh=mesh_of(devices), axis="sequence", **options)


@functools.cache
def tensors():
    return random_heads(0, 2, LENGTH, LENGTH, 4, 2)


def on_one_device(name, is_causal, **options):
    chosen = SETTINGS[name]
    if not is_causal and name != "block_linformer":
        chosen = {option: x for option, x in chosen.items() if option != "block_size"}
    return attention(*tensors(), method=name, rng=jax.random.key(5), is_causal=is_causal, **chosen, **options)


@pytest.mark.parametrize(
    "devices", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow), 8]
)
@pytest.mark.parametrize(
    ("name", "is_causal"), [(name, c) for name in SETTINGS for c in (False, True) if name != "mean_value" or not c]
)
def test_devices_do_not_matter(name, is_causal, devices):
    lengths = {"key_value_seq_lengths": LENGTHS}
    out = sharded(*tensors(), devices, method=name, is_causal=is_causal, **SETTINGS[name], **lengths)
    np.testing.assert_allclose(out, on_one_device(name, is_causal, **lengths), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "is_causal"), [("exact", True), ("local", True), ("favor", False), ("favor", True)])
def test_gradients_do_not_depend_on_devices(name, is_causal):
    weight = jnp.cos(jnp.arange(LENGTH * 8.0)).reshape(1, LENGTH, 1, 8)

    def loss(call):
        return lambda tensors: jnp.sum(weight * call(*tensors))

    over = functools.partial(sharded, devices=4, method=name, is_causal=is_causal, **SETTINGS[name])
    one = functools.partial(
        attention, method=name, rng=jax.random.key(5), is_causal=is_causal,
        **{option: x for option, x in SETTINGS[name].items() if option != "block_size" or is_causal},
    )  # fmt: skip
    expected = jax.grad(loss(one))(tensors())
    for ours, theirs in zip(jax.jit(jax.grad(loss(over)))(tensors()), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-3, rtol=1e-3)


def test_tokens_are_those_that_each_device_keeps_of_its_part():
    query, key, value = random_heads(1, 1, 64, 64, 1, 1)
    out = sharded(query, key, value, 4, method="mean_pool", num_landmarks=16)
    q, k = fold_scale(query[0, :, 0], key[0, :, 0])
    summarize = METHODS["mean_pool"].summarize
    assert summarize is not None
    parts = [summarize(k[i : i + 16], value[0, i : i + 16, 0], num_landmarks=4) for i in range(0, 64, 16)]
    whole = functools.reduce(merge, parts)
    np.testing.assert_allclose(out[0, :, 0], attend(q, whole).out, atol=1e-5)


def test_no_later_token_matters_across_devices():
    query, key, value = random_heads(2, 1, 64, 64, 2, 1)
    for name in ("exact", "favor", "coreset"):
        call = functools.partial(
            sharded, devices=4, method=name, is_causal=True,
            **{**SETTINGS[name], **({"coreset_size": 8} if name == "coreset" else {})},
        )  # fmt: skip
        out = call(query, key, value)
        later = call(query, key.at[:, 37:].add(3.0), value.at[:, 37:].set(7.0))
        np.testing.assert_allclose(later[:, :37], out[:, :37], atol=1e-5)
        assert np.abs(later[:, 37:] - out[:, 37:]).max() > 1e-2


def test_batch_and_heads_over_further_axes():
    mesh = jax.make_mesh((2, 2, 2), ("data", "sequence", "heads"))
    options = {"method": "favor", "rng": jax.random.key(5), "is_causal": True, **SETTINGS["favor"]}
    placed = [
        jax.device_put(jnp.pad(x, ((0, 0), (0, 3), (0, 0), (0, 0))), NamedSharding(mesh, spec))
        for x, spec in zip(tensors(), [PartitionSpec("data", "sequence", "heads", None)] * 3, strict=True)
    ]
    axes = {"axis": "sequence", "batch_axis": "data", "head_axis": "heads"}
    out = context_parallel.attention(*placed, mesh=mesh, **axes, **options)
    expected = attention(*tensors(), **options)
    np.testing.assert_allclose(np.asarray(out)[:, :LENGTH], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (NotImplementedError, "method 'nystrom' has no summary to send", {"method": "nystrom"}),
        (NotImplementedError, "has no running summary to send", {"method": "importance_sample", "is_causal": True}),
        (ValueError, "must be at least the number of devices, 4, got 3", {"method": "mean_pool", "num_landmarks": 3}),
        (ValueError, "must fit a device's part of 16 tokens", {"method": "local", "window_size": 40}),
        (TypeError, "no argument 'num_feetures'; did you mean 'num_fe", {"method": "favor", "num_feetures": 4}),
        (ValueError, "favor is random: pass a key", {"method": "favor", "rng": None}),
        (ValueError, "unknown method 'favour'", {"method": "favour"}),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused(error, message, options):
    with pytest.raises(error, match=message):
        sharded(*random_heads(3, 1, 64, 64, 1, 1), 4, **options)
    with pytest.raises(ValueError, match="mesh has the axes sequence, got 'time'"):
        context_parallel.attention(*tensors(), mesh=mesh_of(2), axis="time", method="exact")
