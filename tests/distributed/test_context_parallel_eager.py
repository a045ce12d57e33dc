"""Context parallelism without jit in the caller: still one program, which takes arrays as arguments.

Run operation by operation on eight devices, some methods never finished.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from approx_attention import attention, distributed
from tests.distributed.test_context_parallel import FORMS, LENGTHS, mesh_of, options_of, over_devices, tensors
from tests.references import as_array, random_heads

pytestmark = pytest.mark.all_forms


SECOND = [(name, is_causal) for name, is_causal in FORMS if not is_causal and (name, True) in FORMS]


@pytest.mark.parametrize(
    ("name", "is_causal"),
    [pytest.param(*form, marks=pytest.mark.slow if form in SECOND else ()) for form in FORMS],
)
def test_a_call_is_the_same_program_without_jit(name, is_causal):
    call = over_devices(name, is_causal)
    out = call(*tensors())
    # A caller's program has it as its one operation that makes outputs.
    inside = jax.make_jaxpr(call)(*tensors()).jaxpr
    (whole,) = (x for x in inside.eqns if x.params.get("name") == "_over_devices")
    assert inside.outvars == whole.outvars
    with jax.no_tracing():  # the program is cached
        again = call(*tensors())
    np.testing.assert_array_equal(again, out)
    with jax.disable_jit():
        np.testing.assert_array_equal(call(*tensors()), out)


@pytest.mark.parametrize(
    ("name", "is_causal"),
    [("coreset", False), *(pytest.param(*x, marks=pytest.mark.slow) for x in FORMS if x != ("coreset", False))],
)
def test_a_gradient_is_the_same_without_jit(name, is_causal):
    def gradient(tensors):
        return jax.grad(lambda tensors: jnp.sum(jnp.square(over_devices(name, is_causal, 2)(*tensors))))(tensors)

    for found, expected in zip(gradient(tensors()), jax.jit(gradient)(tensors()), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("is_causal", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["favor", pytest.param("block_linformer", marks=pytest.mark.slow)])
def test_arrays_among_the_arguments_have_gradients(name, is_causal):
    shapes = {"favor": {"projection": (16, 8)}, "block_linformer": {"projection_k": (2, 4), "projection_v": (2, 4)}}
    arrays = {x: jax.random.normal(jax.random.key(i), shape) for i, (x, shape) in enumerate(shapes[name].items())}
    arrays["scale"] = jnp.float32(0.4)
    options = options_of(name, is_causal)
    if name == "favor" and not is_causal:
        options.pop("block_size")
    alone = functools.partial(attention, **options)

    def gradient(call):
        return jax.grad(lambda arrays: jnp.sum(jnp.square(call(*tensors(), **arrays))))(arrays)

    found, expected = gradient(over_devices(name, is_causal, 4)), jax.jit(gradient, static_argnums=0)(alone)
    for x in arrays:
        np.testing.assert_allclose(found[x], expected[x], atol=1e-3, rtol=1e-3)
        assert np.abs(expected[x]).max() > 1e-3


def primitives(jaxpr):
    """Every equation of a program on a CPU and of those within it."""
    for equation in jaxpr.eqns:
        yield equation
        inside = list(equation.params.values())
        if platforms := equation.params.get("branches_platforms"):
            inside = [
                branch
                for branch, names in zip(equation.params["branches"], platforms, strict=True)
                if names and "cpu" in names
            ]
        for parameter in jax.tree.leaves(inside, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from primitives(inner)


@pytest.mark.parametrize(("name", "is_causal"), FORMS)
def test_no_factorisation_of_a_batch_runs_on_a_device(name, is_causal):
    # A CPU runs it on a shared pool of threads, which has none left if every device waits for its own.
    sizes = {"favor": {"num_features": 32}, "coreset": {"coreset_size": 32}}
    program = jax.make_jaxpr(over_devices(name, is_causal, **sizes.get(name, {})))
    found = [x for x in primitives(program(*tensors()).jaxpr) if x.primitive.name in BATCHED]
    assert all(len(x.invars[0].aval.shape) <= 2 for x in found), found
    assert found or (name, is_causal) not in [("favor", False), ("favor", True), ("coreset", False)]


BATCHED = {"qr", "geqrf", "geqp3", "householder_product", "cholesky", "lu", "eigh", "svd", "triangular_solve"}


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_placed_tensors_and_meshes_in_use_without_jit(axis_type):
    mesh = jax.make_mesh((8,), ("sequence",), axis_types=(axis_type,))
    plain = random_heads(4, 2, 64, 64, 2, 1)
    placed = jax.device_put(plain, NamedSharding(mesh, PartitionSpec(None, "sequence")))
    call = functools.partial(distributed.attention, mesh=mesh, axis="sequence", method="exact")
    expected = attention(*plain, method="exact")
    np.testing.assert_allclose(call(*placed), expected, atol=1e-5)
    with jax.set_mesh(mesh):
        for given in (plain, placed):
            out = call(*given)
            assert axis_type == AxisType.Auto or jax.typeof(out).sharding.spec == jax.typeof(given[0]).sharding.spec
            np.testing.assert_allclose(out, expected, atol=1e-5)


def test_a_batch_of_calls_without_jit():
    call = over_devices("mean_pool", False, 2)
    query = np.asarray(tensors()[0])
    queries = np.stack([query, -query])
    found = np.asarray(jax.vmap(call, in_axes=(0, None, None))(as_array(queries), *tensors()[1:]))
    for out, query in zip(found, queries, strict=True):
        np.testing.assert_allclose(out, call(as_array(query), *tensors()[1:]), atol=1e-6)


def test_arguments_that_no_program_can_be_kept_for_are_named():
    call = functools.partial(distributed.attention, *tensors(), mesh=mesh_of(2), axis="sequence")
    with pytest.raises(
        TypeError, match=r"'coefficients' of method 'polynomial' must be hashable or contain arrays, got \["
    ):
        call(method="polynomial", coefficients=[1.0, 1.0, 0.5])
    with pytest.raises(ValueError, match=r"scale must be positive and finite, got -0\.5"):
        call(method="exact", scale=jnp.float32(-0.5))
    with pytest.raises(TypeError, match=r"scale must be one number, got shape \(4,\)"):
        call(method="exact", scale=jnp.ones(4))
    with pytest.raises(TypeError, match="num_landmarks must be an integer known when tracing, got 16.0"):
        call(method="mean_pool", num_landmarks=16.0)
    exact = call(method="exact", key_value_seq_lengths=LENGTHS)
    for lengths in (np.asarray(LENGTHS), LENGTHS.tolist()):
        np.testing.assert_array_equal(call(method="exact", key_value_seq_lengths=lengths), exact)
