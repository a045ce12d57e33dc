"""`attention` under nested transformations, and the argument checks that a compiled lifting could not make."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from approx_attention import METHODS, attention, exact, favor
from tests.cases import DIRECTIONS, case_of, one_direction, settings
from tests.forms import FORM
from tests.references import as_array, random_heads

# Nestings are traced in the forms of all platforms; the rest concerns arguments.
all_forms = pytest.mark.all_forms

B, T, N, D = 2, 9, 4, 8


def bound(name, is_causal=False, **options):
    """`attention` by a method with small settings, of query, key and value alone."""
    capabilities = METHODS[name].capabilities
    rng = {"rng": jax.random.key(9)} if capabilities.needs_key else {}
    return functools.partial(attention, method=name, is_causal=is_causal, **rng, **settings(name), **options)


def shapes(*batch, num_kv_heads=2):
    """Query, key and value without numbers."""
    of = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    return of((*batch, T, N, D)), *[of((*batch, T, num_kv_heads, D))] * 2


def loss(function):
    return lambda *args: jnp.sum(function(*args) ** 2)


def in_scan(function):
    """Two layers of one function, each computed again in the backward pass."""

    def layers(query, *others):
        step = jax.checkpoint(lambda x, scale: (function(x * scale, *others), None))
        return jax.lax.scan(step, query, jnp.array([1.0, 2.0]))[0]

    return layers


def over_devices(function):
    mesh = jax.make_mesh((B,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("batch")
    return jax.shard_map(function, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)


# Nestings by name: each maps `attention` to a function of query, key and value, with the shapes that it takes.
q_only, kv_only = (0, None, None), (None, 0, 0)
NESTINGS = {
    "grad(vmap)": (lambda f: jax.grad(loss(jax.vmap(f)), (0, 1, 2)), shapes(B)),
    "vmap(grad)": (lambda f: jax.vmap(jax.grad(loss(f), (0, 1, 2))), shapes(B)),
    "grad(vmap over axis 1)": (lambda f: jax.grad(loss(jax.vmap(f, 1, 1)), (0, 1, 2)), shapes(3, B)),
    "grad(vmap of queries)": (
        lambda f: jax.grad(loss(jax.vmap(f, q_only)), (0, 1, 2)),
        (*shapes(B)[:1], *shapes()[1:]),
    ),
    "grad(vmap of queries) by queries": (
        lambda f: jax.grad(loss(jax.vmap(f, q_only))),
        (*shapes(B)[:1], *shapes()[1:]),
    ),
    "vmap(grad) of queries": (
        lambda f: jax.vmap(jax.grad(loss(f), (0, 1, 2)), q_only),
        (*shapes(B)[:1], *shapes()[1:]),
    ),
    "vmap(grad) of keys and values": (
        lambda f: jax.vmap(jax.grad(loss(f), (0, 1, 2)), kv_only),
        (*shapes()[:1], *shapes(B)[1:]),
    ),
    "vmap(value_and_grad(vmap))": (lambda f: jax.vmap(jax.value_and_grad(loss(jax.vmap(f)))), shapes(B, 3)),
    "grad(checkpoint(vmap))": (lambda f: jax.grad(loss(jax.checkpoint(jax.vmap(f)))), shapes(B)),
    "grad(vmap(checkpoint))": (lambda f: jax.grad(loss(jax.vmap(jax.checkpoint(f)))), shapes(B)),
    "grad(vmap(jit))": (lambda f: jax.grad(loss(jax.vmap(jax.jit(f)))), shapes(B)),
    "grad(scan(checkpoint))": (lambda f: jax.grad(loss(in_scan(f)), (0, 1, 2)), shapes(B)),
    "grad(vmap(scan(checkpoint)))": (lambda f: jax.grad(loss(jax.vmap(in_scan(f))), (0, 1, 2)), shapes(B)),
    "vmap(grad(scan(checkpoint(vmap))))": (
        lambda f: jax.vmap(jax.grad(loss(in_scan(jax.vmap(f))), (0, 1, 2)), q_only),
        (*shapes(B, 3)[:1], *shapes(3)[1:]),
    ),
    "grad(shard_map)": (lambda f: jax.grad(loss(over_devices(f)), (0, 1, 2)), shapes(B)),
    "shard_map(vmap(grad))": (lambda f: over_devices(jax.vmap(jax.grad(loss(f)))), shapes(B)),
    "grad(grad)": (lambda f: jax.grad(loss(jax.grad(loss(f)))), shapes()),
    "hessian": (lambda f: jax.hessian(loss(f)), shapes()),
}
FORWARD = {
    "jvp(vmap)": (lambda f: lambda *x: jax.jvp(jax.vmap(f), x, x), shapes(B)),
    "vmap(jvp)": (lambda f: jax.vmap(lambda *x: jax.jvp(f, x, x)), shapes(B)),
    "linearize(vmap)": (lambda f: lambda *x: jax.linearize(jax.vmap(f), *x)[1](*x), shapes(B)),
}


@all_forms
@one_direction
@pytest.mark.parametrize("nesting", [pytest.param(x, marks=pytest.mark.slow) for x in NESTINGS])
def test_nested_transformations_trace(name, is_causal, nesting):
    transform, tensors = NESTINGS[nesting]
    jax.eval_shape(transform(bound(name, is_causal)), *tensors)


@all_forms
@one_direction
def test_all_nestings_at_once_trace(name, is_causal):
    # This contains the pairs of the nestings above, which are slow tests because they take longer.
    def padded(query, key, value, lengths):
        return bound(name, is_causal)(query, key, value, key_value_seq_lengths=lengths)

    gradients = jax.grad(loss(in_scan(jax.vmap(padded))), (0, 1, 2))
    tensors = *shapes(B, 3, 2)[:1], *shapes(3, 2)[1:], jax.ShapeDtypeStruct((3, 2), jnp.int32)
    jax.eval_shape(jax.vmap(gradients, (0, None, None, None)), *tensors)


@all_forms
@pytest.mark.parametrize(
    ("name", "is_causal"),
    [pytest.param(*x, marks=() if x[0] in ("exact", "favor", "mean_value") else pytest.mark.slow) for x in DIRECTIONS],
)
def test_each_tensor_may_vary_along_an_axis_of_the_mesh_alone(name, is_causal):
    # In shard_map queries, keys, values and the scale each differ between devices of an axis that the rest share.
    axes = ("query", "key", "value", "scale")
    mesh = jax.sharding.AbstractMesh((B,) * 4, axes, axis_types=(jax.sharding.AxisType.Auto,) * 4)
    specs = tuple(PartitionSpec(axis) for axis in axes)
    function = bound(name, is_causal)

    def gradients(query, key, value, scale):
        return jax.grad(loss(lambda *x: function(*x, scale=scale[0])), (0, 1, 2))(query, key, value)

    tensors = (*shapes(B), jax.ShapeDtypeStruct((B,), jnp.float32))
    jax.eval_shape(jax.shard_map(gradients, mesh=mesh, in_specs=specs, out_specs=specs[:3]), *tensors)


@all_forms
@pytest.mark.parametrize("nesting", [x for x in NESTINGS if x not in ("grad(grad)", "vmap(value_and_grad(vmap))")])
def test_nested_transformations_of_exact_attention_trace(nesting):
    transform, tensors = NESTINGS[nesting]
    for options in ({}, {"is_causal": True}, {"return_residual": True}, {"mask": jnp.ones((T, T), bool)}):
        function = bound("exact", **options)
        if "return_residual" in options:
            function = functools.partial(lambda f, *x: f(*x)[0] + f(*x)[1][..., None], function)
        jax.eval_shape(transform(function), *tensors)


@all_forms
@pytest.mark.parametrize(("name", "is_causal"), DIRECTIONS)
@pytest.mark.parametrize("nesting", [pytest.param(x, marks=pytest.mark.slow) for x in FORWARD])
def test_every_method_has_forward_mode(name, is_causal, nesting):
    transform, tensors = FORWARD[nesting]
    jax.eval_shape(transform(bound(name, is_causal)), *tensors)


@all_forms
@pytest.mark.parametrize("implementation", [None, "dense"])
def test_forward_mode_of_exact_attention(implementation):
    tensors = random_heads(0, 2, T, T, N, 2, D)
    function = bound("exact", implementation=implementation)
    _, tangent = jax.jit(lambda *x: jax.jvp(jax.vmap(function), x, x))(*tensors)
    step = 1e-2
    moved = (jax.jit(function)(*((1 + sign * step) * x for x in tensors)) for sign in (1, -1))
    np.testing.assert_allclose(tangent, np.subtract(*moved) / (2 * step), atol=2e-3)


@all_forms
@pytest.mark.parametrize("name", ["exact", "favor", pytest.param("mean_pool", marks=pytest.mark.slow)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_gradient_of_vmap_is_that_of_the_batch(name, is_causal):
    function = bound(name, is_causal)
    # Each pair of the eight sequences shares its keys.
    query, *keys_and_values = random_heads(1, 8, T, T, N, 2, D)
    keys_and_values = [np.asarray(x)[::2] for x in keys_and_values]
    alike = (np.repeat(x, 2, axis=0) for x in keys_and_values)
    with FORM("cpu"):
        of_query, *of_batch = jax.jit(jax.grad(loss(function), (0, 1, 2)))(query, *alike)
    nested = jax.vmap(jax.grad(loss(jax.vmap(jax.vmap(function, q_only))), (0, 1, 2)))
    tensors = np.reshape(query, (2, 2, 2, T, N, D)), *(x.reshape(2, 2, *x.shape[1:]) for x in keys_and_values)
    of_queries, *shared = jax.jit(nested)(*tensors)
    np.testing.assert_allclose(of_queries, np.reshape(of_query, of_queries.shape), rtol=2e-6, atol=2e-5)
    for ours, whole in zip(shared, of_batch, strict=True):
        expected = np.reshape(whole, (2, 2, 2, *whole.shape[1:])).sum(2)
        np.testing.assert_allclose(ours, expected, rtol=2e-6, atol=5e-5)


def test_a_function_of_the_library_is_the_method_of_its_name():
    query, key, value = random_heads(3, 2, T, T, N, 2, D)
    options = {"rng": jax.random.key(1), "num_features": 8}
    np.testing.assert_array_equal(
        attention(query, key, value, method=favor, **options), attention(query, key, value, method="favor", **options)
    )
    with pytest.raises(NotImplementedError, match="'favor' does not support bias"):
        attention(query, key, value, method=favor, bias=jnp.zeros((T, T)), **options)


# cuDNN: without a GPU its programs can be traced, which is where grouped heads and nested vmaps fail.


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    import jax._src.cudnn.fused_attention_stablehlo as fused

    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused, "check_compute_capability", lambda capability: True)


cudnn = functools.partial(attention, method="exact", implementation="cudnn")


def fused_calls(jaxpr):
    """The shapes of the operands of every call of cuDNN's attention."""
    for equation in jaxpr.eqns:
        if equation.primitive.name.startswith("dot_product_attention_fwd"):
            yield [x.aval.shape for x in equation.invars]
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
            if hasattr(inner, "jaxpr"):
                yield from fused_calls(inner.jaxpr)


def as_half(tensors, length=128, head_dim=64):
    shape = {T: length, D: head_dim}
    return [jax.ShapeDtypeStruct([shape.get(n, n) for n in x.shape], jnp.bfloat16) for x in tensors]


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_grouped_heads_reach_cudnn_as_they_are(as_on_a_gpu, num_kv_heads):
    query, key, value = as_half(shapes(B, num_kv_heads=num_kv_heads))
    for options in ({}, {"is_causal": True, "scale": 0.3}, {"rng": jax.random.key(0)}):
        program = jax.make_jaxpr(functools.partial(cudnn, **options))(query, key, value)
        (operands,) = fused_calls(program.jaxpr)
        assert operands[:3] == [(B, 128, N, 64), *[(B, 128, num_kv_heads, 64)] * 2]
    padded = functools.partial(cudnn, key_value_seq_lengths=jnp.array([100, 128]))
    with pytest.raises(ValueError, match="no bias, mask, logits_soft_cap, kv_mask"):
        jax.eval_shape(padded, query, key, value)


def test_nested_transformations_reach_cudnn(as_on_a_gpu):
    def wide_loss(function):
        return loss(lambda *x: function(*x).astype(jnp.float32))

    attend = functools.partial(cudnn, is_causal=True)
    of_one_head = functools.partial(exact, implementation="cudnn", is_causal=True)
    query, key, value = as_half(shapes(B))
    one_key, one_value = as_half(shapes()[1:])
    head = as_half([jax.ShapeDtypeStruct((T, D), jnp.bfloat16)] * 3)
    heads = jax.ShapeDtypeStruct((128, 4, 64), jnp.bfloat16)
    for function, tensors in (
        (jax.grad(wide_loss(jax.vmap(attend)), (0, 1, 2)), (query, key, value)),
        (jax.vmap(jax.grad(wide_loss(attend), (0, 1, 2))), (query, key, value)),
        (jax.vmap(attend, q_only), (query, one_key, one_value)),
        (jax.vmap(jax.grad(wide_loss(attend), (0, 1, 2)), q_only), (query, one_key, one_value)),
        (jax.vmap(attend, 1, 1), [jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in (query, key, value)]),
        (jax.vmap(jax.grad(wide_loss(of_one_head)), (1, None, None), 1), (heads, *head[1:])),
        (jax.vmap(lambda scale, *x: attend(*x, scale=scale), (0, None, None, None)), (jnp.ones(3), query, key, value)),
    ):
        assert "dot_product_attention" in str(jax.make_jaxpr(function)(*tensors))


def test_inputs_for_cudnn_are_checked_as_others_are(as_on_a_gpu):
    head = as_half([jax.ShapeDtypeStruct((T, D), jnp.bfloat16)] * 3)
    for options in ({"scale": -1.0}, {"scale": np.nan}, {"scale": True}, {"is_causal": "x"}):
        with pytest.raises((TypeError, ValueError)):
            jax.eval_shape(functools.partial(exact, implementation="cudnn", **options), *head)
    batch = [jax.ShapeDtypeStruct((2, *x.shape), x.dtype) for x in head]
    with pytest.raises((TypeError, ValueError)):
        jax.eval_shape(functools.partial(exact, implementation="cudnn"), *batch)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8, jnp.int16, jnp.int32, jnp.uint32])
def test_lengths_may_be_integers_of_any_type(dtype):
    query, key, value = random_heads(7, 2, T, T, 2, 2, D)
    of = functools.partial(bound("mean_pool"), query, key, value)
    lengths = as_array([4, 9], dtype)
    for option in ("key_value_seq_lengths", "query_seq_lengths"):
        expected = of(**{option: as_array([4, 9], jnp.int32)})
        np.testing.assert_array_equal(of(**{option: lengths}), expected)
        with jax.enable_x64(True):
            np.testing.assert_array_equal(of(**{option: lengths}), expected)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        (name, p.name)
        for name, m in METHODS.items()
        for p in inspect.signature(m.function).parameters.values()
        if isinstance(p.default, bool)
    ],
)
def test_switches_are_true_or_false(name, argument):
    query, key, value = random_heads(8, 1, T, T, 2, 2, D)
    option = {"return_state": "return_residual"}.get(argument, argument)
    for wrong in ("no", 1, None, jnp.array(True)):
        with pytest.raises(TypeError, match=argument if option == argument else option):
            jax.eval_shape(lambda *x, wrong=wrong: bound(name)(*x, **{option: wrong}), query, key, value)


# Numbers in arrays are checked if they are known when tracing.


def float_arguments():
    """The hyper-parameters of every method that default to a float, or that may be an array."""
    for name, method in METHODS.items():
        for argument, parameter in inspect.signature(method.function).parameters.items():
            if argument == "scale" or argument in method.values or isinstance(parameter.default, float):
                yield name, argument


@pytest.mark.parametrize(("name", "argument"), [*float_arguments()])
def test_numbers_in_arrays_are_checked_as_numbers_are(name, argument):
    query, key, value = random_heads(4, 1, T, T, 2, 2, D)
    context = case_of(name).contexts.get(argument, {})
    scalar = (lambda x: x) if argument != "coefficients" else lambda x: np.array([1, 1, x])

    def outcome(given):
        try:
            jax.eval_shape(bound(name, **context, **{argument: given}), query, key, value)
        except (TypeError, ValueError) as error:
            return type(error), str(error)
        return None, ""

    for number in (np.nan, np.inf, -1.0, 0.0, 0.5):
        given = scalar(number)
        kind, text = outcome(given)
        assert kind is None or argument in text
        assert kind is ValueError or not np.isnan(number)
        assert outcome(as_array(given))[0] is kind, number
    for wrong in (jnp.array(True), jnp.array(1j), True, "x"):
        assert argument == "coefficients" or issubclass(outcome(wrong)[0], TypeError | ValueError), wrong
    # A traced number cannot be checked, and must be accepted.
    traced = jax.eval_shape(
        lambda x: bound(name, **context, **{argument: x})(query, key, value), scalar(jnp.float32(0.5))
    )
    assert traced.shape == query.shape


def test_numbers_of_single_heads_are_checked():
    query, key, value = random_heads(6, 1, T, T, 2, 2, D)
    bandwidth = np.ones((2, D))
    bandwidth[1, 2] = np.nan
    with pytest.raises(ValueError, match=r"bandwidth must be finite, got nan in an array of shape \(2, 8\)"):
        bound("rfa", per_head={"bandwidth": as_array(bandwidth)})(query, key, value)
