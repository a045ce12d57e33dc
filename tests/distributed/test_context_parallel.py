"""Sequences sharded over eight CPU devices against one device, for every method that has a summary."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from approx_attention import METHODS, attend, attention, distributed, fold_scale, merge
from tests.cases import CASES
from tests.programs import equations
from tests.references import as_array, compiled, random_heads

pytestmark = pytest.mark.all_forms

# Small enough to shard over eight devices, and not a multiple of them.
LENGTH, LENGTHS = 61, jnp.array([61, 40])
SETTINGS = {name: dict(case.devices) for name, case in CASES.items() if case.devices is not None}
# It samples with replacement, each device from its part, so the outputs differ from those of one device.
DRAWS = "importance_sample"
FORMS = [
    (name, is_causal)
    for name in SETTINGS
    for is_causal in (False, True)
    if (METHODS[name].running if is_causal else METHODS[name].summarize or name == "rfa") or name == "local"
]
FAST = [("exact", True), ("local", True), ("favor", False), ("favor", True), ("mean_pool", True)]
DEVICES = (1, 2, 4, 8)


def mesh_of(devices):
    return jax.make_mesh((devices,), ("sequence",))


@compiled
def sharded(query, key, value, devices, **options):
    options.setdefault("rng", jax.random.key(5))
    return distributed.attention(query, key, value, mesh=mesh_of(devices), axis="sequence", **options)


def over_devices(name, is_causal, devices=8, **more):
    """A call without jit, which is one program too: all tests of the same call share it."""
    options = {**options_of(name, is_causal), **more}
    return functools.partial(distributed.attention, mesh=mesh_of(devices), axis="sequence", **options)


@functools.cache
def tensors():
    return random_heads(0, 2, LENGTH, LENGTH, 4, 2)


def with_padding(x):
    """The tensor with NaN where the second sequence has no token."""
    real = np.arange(LENGTH) < np.asarray(LENGTHS)[:, None]
    return as_array(np.where(real[..., None, None], x, np.nan))


def options_of(name, is_causal):
    options = {"method": name, "is_causal": is_causal, "key_value_seq_lengths": LENGTHS}
    return {**options, "rng": jax.random.key(5), **SETTINGS[name]}


def on_one_device(name, is_causal):
    chosen = options_of(name, is_causal)
    if not is_causal and name != "block_linformer":
        chosen.pop("block_size", None)
    return functools.partial(attention, **chosen)


def test_keys_in_float64_are_not_rounded_for_values_in_float32(x64):
    query, key, value = (np.asarray(x, np.float64) for x in tensors())
    # Logits that float32 would round by more than the tolerance.
    wide = as_array(query * 200.0, np.float64), as_array(key + 3.0, np.float64), as_array(value)
    out = distributed.attention(*wide, mesh=mesh_of(2), axis="sequence", method="exact")
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, attention(*wide, method="exact"), atol=1e-6)


def test_every_method_that_has_a_summary_is_here():
    assert {*SETTINGS, DRAWS} == {name for name, m in METHODS.items() if m.summarize or m.running} | {"local"}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_without_a_summary_names_those_that_have_one(name, is_causal):
    if (name, is_causal) in [*FORMS, (DRAWS, False)]:
        return
    kind = "running summary" if is_causal else "summary"
    able = ", ".join(other for other, causal in [*FORMS, (DRAWS, False)] if causal == is_causal and other != "local")
    with pytest.raises(NotImplementedError, match=f"'{name}' has no {kind} to send; supported are (.*), and") as e:
        sharded(*tensors(), 2, method=name, is_causal=is_causal)
    named = str(e.value).split("supported are ")[1].split(", and ")[0]
    assert sorted(named.split(", ")) == sorted(able.split(", "))


@pytest.mark.parametrize(
    ("name", "is_causal", "devices"),
    [
        pytest.param(*form, devices, marks=() if form in FAST and devices == 8 else pytest.mark.slow)
        for form in FORMS
        for devices in DEVICES
    ],
)
def test_devices_do_not_matter(name, is_causal, devices):
    query, key, value = tensors()
    out = over_devices(name, is_causal, devices)(query, with_padding(key), with_padding(value))
    np.testing.assert_allclose(out, on_one_device(name, is_causal)(query, key, value), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "is_causal", "devices"),
    [(*form, 4) for form in FAST]
    + [
        pytest.param(*form, devices, marks=pytest.mark.slow)
        for form in FORMS
        for devices in (1, 2, 4, 8)
        if form not in FAST or devices != 4
    ],
)
def test_gradients_do_not_depend_on_devices(name, is_causal, devices):
    weight = jnp.cos(jnp.arange(LENGTH * 8.0)).reshape(1, LENGTH, 1, 8)

    def gradient(call, tensors):
        return jax.jit(jax.grad(lambda tensors: jnp.sum(weight * call(*tensors))))(tensors)

    query, key, value = tensors()
    expected = gradient(on_one_device(name, is_causal), (query, key, value))
    over = functools.partial(sharded, devices=devices, **options_of(name, is_causal))
    found = gradient(over, (query, with_padding(key), with_padding(value)))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_draws_are_those_that_each_device_makes_of_its_part():
    query, key, value = random_heads(1, 1, 64, 64, 1, 1)
    out = sharded(query, key, value, 4, method=DRAWS, sample_size=32)
    q, k = fold_scale(query[0, :, 0], key[0, :, 0])
    summarize = METHODS[DRAWS].summarize
    of_head = jax.random.fold_in(jax.random.key(5), 0)
    parts = [
        summarize(k[part], value[0, part, 0], jax.random.fold_in(of_head, index), sample_size=8)
        for index, part in enumerate(slice(i, i + 16) for i in range(0, 64, 16))
    ]
    np.testing.assert_allclose(out[0, :, 0], attend(q, functools.reduce(merge, parts)).out, atol=1e-5)
    alone = sharded(query, key, value, 1, method=DRAWS, sample_size=32)
    one = attention(query, key, value, method=DRAWS, rng=jax.random.key(5), sample_size=32)
    np.testing.assert_allclose(alone, one, atol=1e-5)


def test_tokens_are_those_that_each_device_keeps_of_its_part():
    query, key, value = random_heads(1, 1, 64, 64, 1, 1)
    out = sharded.__wrapped__(query, key, value, 4, method="mean_pool", num_landmarks=16)
    summarize = METHODS["mean_pool"].summarize
    assert summarize is not None

    @jax.jit
    def by_parts(q, k, v):
        q, k = fold_scale(q, k)
        parts = [summarize(k[i : i + 16], v[i : i + 16], num_landmarks=4) for i in range(0, 64, 16)]
        return attend(q, functools.reduce(merge, parts)).out

    expected = by_parts(*(np.asarray(x)[0, :, 0] for x in (query, key, value)))
    np.testing.assert_allclose(np.asarray(out)[0, :, 0], expected, atol=1e-5)


def test_no_later_token_matters_across_devices():
    query, key, value = random_heads(2, 1, 64, 64, 2, 1)
    later_key, later_value = np.array(key), np.array(value)
    later_key[:, 37:] += 3
    later_value[:, 37:] = 7
    others = as_array(later_key), as_array(later_value)
    for name in ("exact", "favor", "coreset"):
        call = functools.partial(
            sharded, devices=4, method=name, is_causal=True,
            **{**SETTINGS[name], **({"coreset_size": 8} if name == "coreset" else {})},
        )  # fmt: skip
        out, later = np.asarray(call(query, key, value)), np.asarray(call(query, *others))
        np.testing.assert_allclose(later[:, :37], out[:, :37], atol=1e-5)
        assert np.abs(later[:, 37:] - out[:, 37:]).max() > 1e-2


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_ring_computes_with_the_keys_that_it_sends_on(is_causal):
    ring = functools.partial(distributed.attention, mesh=mesh_of(8), axis="sequence", method="exact")
    program = jax.make_jaxpr(functools.partial(ring, is_causal=is_causal))(*tensors())
    sending = [
        body
        for equation, _ in equations(program.jaxpr)
        if equation.primitive.name == "scan"
        for body in [equation.params["jaxpr"].jaxpr]
        if any(e.primitive.name == "ppermute" for e in body.eqns)
    ]
    assert len(sending) == 1
    (body,) = sending
    sends = [e for e in body.eqns if e.primitive.name == "ppermute"]
    sent = {id(x) for e in sends for x in e.outvars}
    # A transfer sends inputs of the step and its result is not used in the step: transfer and computation overlap.
    assert all(any(x is y for y in body.invars) for e in sends for x in e.invars)
    assert not any(id(x) in sent for e in body.eqns for x in e.invars)


def test_the_program_of_the_ring_does_not_grow_with_the_sequence():
    def size(length):
        x = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
        ring = functools.partial(distributed.attention, mesh=mesh_of(2), axis="sequence", method="exact")
        return jax.jit(functools.partial(ring, is_causal=True)).lower(x, x, x).as_text().count(" = ")

    assert size(2**14) == size(2**17)


@pytest.mark.slow
def test_batch_and_heads_over_further_axes():
    mesh = jax.make_mesh((2, 2, 2), ("data", "sequence", "heads"))
    options = {"method": "favor", "rng": jax.random.key(5), "is_causal": True, **SETTINGS["favor"]}
    placed = [
        jax.device_put(jnp.pad(x, ((0, 0), (0, 3), (0, 0), (0, 0))), NamedSharding(mesh, spec))
        for x, spec in zip(tensors(), [PartitionSpec("data", "sequence", "heads", None)] * 3, strict=True)
    ]
    axes = {"axis": "sequence", "batch_axis": "data", "head_axis": "heads"}
    out = distributed.attention(*placed, mesh=mesh, **axes, **options)
    expected = attention(*tensors(), **options)
    np.testing.assert_allclose(np.asarray(out)[:, :LENGTH], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", ["exact", "rfa"])
def test_sharded_arguments_within_a_compiled_gradient(name, axis_type):
    mesh = jax.make_mesh((2, 4), ("data", "sequence"), axis_types=(axis_type,) * 2)
    layout = NamedSharding(mesh, PartitionSpec("data", "sequence"))
    query, key, value = (x[:, :60] for x in tensors())
    options = {"method": name, "rng": jax.random.key(5), "is_causal": True, **SETTINGS[name]}
    over = functools.partial(distributed.attention, mesh=mesh, axis="sequence", batch_axis="data", **options)
    gradients = [
        jax.jit(jax.grad(lambda tensors, call=call: jnp.sum(jnp.square(call(*tensors)))))(placed)
        for call, placed in (
            (over, jax.device_put((query, key, value), layout)),
            (functools.partial(attention, **options), (query, key, value)),
        )
    ]
    for ours, theirs in zip(*gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-3, rtol=1e-3)
        assert ours.sharding.is_equivalent_to(layout, 4)


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_given_projection_takes_the_place_of_a_key(is_causal):
    options = {"method": "favor", "is_causal": is_causal, "projection": jax.random.normal(jax.random.key(1), (6, 8))}
    if is_causal:
        options["block_size"] = 8
    heads = random_heads(4, 1, 32, 32, 2, 1, 8)
    np.testing.assert_allclose(sharded(*heads, 2, rng=None, **options), attention(*heads, **options), atol=2e-5)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (NotImplementedError, "'rfa' does not support gate_logits across", {"method": "rfa", "gate_logits": 0}),
        (NotImplementedError, "'exact' does not support bias", {"method": "exact", "bias": 0}),
        (NotImplementedError, "'favor' does not support return_state", {"method": "favor", "return_state": True}),
        (NotImplementedError, "'eva' needs num_chunks across", {"method": "eva", "is_causal": True}),
        (ValueError, "must be at least the number of devices, 4, got 3", {"method": "mean_pool", "num_landmarks": 3}),
        (ValueError, "must fit a device's part of 16 tokens", {"method": "local", "window_size": 40}),
        (TypeError, "no argument 'num_feetures'; did you mean 'num_fe", {"method": "favor", "num_feetures": 4}),
        (ValueError, "'favor' is random: pass rng", {"method": "favor", "rng": None}),
        (ValueError, "unknown method 'favour'", {"method": "favour"}),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused(error, message, options):
    with pytest.raises(error, match=message):
        sharded(*random_heads(3, 1, 64, 64, 1, 1), 4, **options)
    query, key, value = tensors()
    options = {"mesh": mesh_of(2), "axis": "sequence", "method": "exact"}
    with pytest.raises(ValueError, match="query and key must share the head dimension"):
        distributed.attention(query, key[..., :-1], value, **options)
    with pytest.raises(ValueError, match="key_value_seq_lengths must have the batch's shape"):
        distributed.attention(query, key, value, key_value_seq_lengths=jnp.ones(7, int), **options)
    with pytest.raises(TypeError, match="query must be"):
        distributed.attention(query.astype(int), key, value, **options)
    with pytest.raises(TypeError, match="query"):
        distributed.attention(query.tolist(), key, value, **options)
    with pytest.raises(ValueError, match=r"must be \[B, T, N, D\]"):
        distributed.attention(query, key[:, :-1], value[:, :-1], **options)
    mesh = jax.make_mesh((2, 4), ("sequence", "rest"))
    for name, message in (
        ("head_axis", "head_axis must divide the 2 key heads, got 'rest' with 4 devices"),
        ("batch_axis", "batch_axis must divide the 2 sequences, got 'rest' with 4 devices"),
    ):
        with pytest.raises(ValueError, match=message):
            distributed.attention(*tensors(), mesh=mesh, axis="sequence", method="exact", **{name: "rest"})
    with pytest.raises(ValueError, match="mesh has the axes sequence, got 'time'"):
        distributed.attention(*tensors(), mesh=mesh_of(2), axis="time", method="exact")
