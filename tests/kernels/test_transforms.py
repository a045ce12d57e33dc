"""JAX's transformations of every form agree with those of attention written out."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from approx_attention import kernels
from approx_attention.kernels import AttentionState
from tests.kernels.cases import random_operands, running, seen_pairs
from tests.references import as_array

pytestmark = pytest.mark.all_forms

LENGTH, HEADS = 12, 3
# Forms with the reaches that have a separate code path.
CAUSAL, KERNEL = ("cpu", {"right": 0}), ("interpret", {"right": 0})
FORMS = [CAUSAL, ("cpu", {}), ("cpu", {"left": 3, "right": 2}), ("xla", {"offset": 2, "left": 4}), KERNEL]
FORMS += [("interpret_gpu", {"right": 0}), ("tile", {"right": 0})]


def case(form, *others, is_fast):
    name = "-".join([form[0], str(form[1]), *others])
    return pytest.param(form, *others, id=name, marks=() if is_fast else pytest.mark.slow)


def every_form(*fast):
    """Parametrize a test by forms; those in ``fast`` are always tested."""
    return pytest.mark.parametrize("pair", [case(form, is_fast=form in fast) for form in FORMS], indirect=True)


@pytest.fixture(scope="module")
def pair(request):
    """One form of the operation, and attention written out, as functions of q, k, v, the bias and the scale."""
    form, reach = request.param
    with running(form) as implementation:

        def state(q, k, v, bias, scale):
            return kernels.state(q, k, v, bias, scale=scale, **reach, implementation=implementation)

        yield state, written_out_for(tuple(reach.items()))


@functools.cache
def written_out_for(reach):
    seen = seen_pairs(LENGTH, LENGTH, **dict(reach))

    def written_out(q, k, v, bias, scale):
        logits = jnp.where(seen, q @ k.T * scale + bias[None, :], -jnp.inf)
        return AttentionState(jax.nn.softmax(logits) @ v, jax.nn.logsumexp(logits, axis=1))

    return written_out


@functools.cache
def heads():
    """Operands of several heads, with one scale each."""
    random = [random_operands(seed, LENGTH, LENGTH, 4, 3) for seed in range(HEADS)]
    return tuple(as_array(np.stack(x)) for x in zip(*(x[:5] for x in random), strict=True))


@functools.cache
def head():
    return tuple(as_array(np.asarray(x)[0]) for x in heads())


def four_heads():
    return tuple(as_array(np.concatenate([x, x[:1]])) for x in map(np.asarray, heads()))


def four_queries():
    """Queries of four heads, which share keys, values, the bias and the scale."""
    return four_heads()[0], *head()[1:]


def few_numbers():
    return (as_array(np.asarray(head()[0])[4:7, 1]),)


@functools.cache
def expected(transform, written_out, operands=head):
    """The result of attention written out: one program for all forms with the same reach."""
    return jax.jit(transform(written_out))(*operands())


def loss_of(function):
    """A weighted sum of outputs and normalisers, of several heads or of one."""

    def loss(*operands):
        state = function(*operands)
        out, lse = (jnp.cos(1 + jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) for x in (state.out, state.lse))
        return jnp.sum(out * state.out) + jnp.sum(lse * jnp.tanh(state.lse))

    return loss


ALL = (0, 1, 2, 3, 4)


def grouped(function):
    """`vmap` over queries alone, which share their keys."""
    return jax.vmap(function, (0, None, None, None, None))


def of_groups(transform):
    def function(q, *others):
        return transform(jnp.stack([q, 2 * q, -q], axis=1), *others)

    return function


def scanned(f):
    def step(carry, operands):
        state = f(*operands)
        return carry + jnp.sum(state.out), state

    return lambda *operands: lax.scan(step, jnp.float32(0), operands)


def transposed(f):
    """The transpose of the derivative, as a function of cotangents."""

    def function(*operands):
        along = lambda tangents: jax.jvp(f, operands, tangents)[1]  # noqa: E731
        return jax.linear_transpose(along, operands)(f(*operands))

    return function


def linearized(f):
    def function(*operands):
        outputs, along = jax.linearize(f, *operands)
        return outputs, along(*operands), along(*(2 * x for x in operands))

    return function


def written_by(f):
    """Evaluate the jaxpr of a function."""
    return lambda *operands: jax.core.eval_jaxpr(
        (jaxpr := jax.make_jaxpr(lambda *x: jax.tree.leaves(f(*x)))(*operands)).jaxpr, jaxpr.consts, *operands
    )


def of_q(f):
    """The loss of one head as a function of a few numbers, for second derivatives."""
    q, *others = head()
    return lambda x: loss_of(f)(q.at[4:7, 1].set(x), *others)


def hessian(f):
    return jax.hessian(of_q(f))


ONE_HEAD = {
    "grad": lambda f: jax.grad(loss_of(f), ALL),
    "value_and_grad of q alone": lambda f: jax.value_and_grad(loss_of(f)),
    "grad of the bias alone": lambda f: jax.grad(loss_of(f), 3),
    "grad of the scale alone": lambda f: jax.grad(loss_of(f), 4),
    "checkpoint": lambda f: jax.grad(jax.checkpoint(loss_of(f)), ALL),
    "jvp": lambda f: lambda *x: jax.jvp(f, x, x),
    "jvp along keys alone": lambda f: lambda q, k, *x: jax.jvp(lambda k: f(q, k, *x), (k,), (k,)),
    "linearize": linearized,
    "linear_transpose": transposed,
    "jacfwd of the scale": lambda f: jax.jacfwd(f, 4),
    "jacrev of the bias": lambda f: jax.jacrev(loss_of(f), 3),
    "jvp of grad": lambda f: lambda *x: jax.jvp(jax.grad(loss_of(f), ALL), x, x),
    "make_jaxpr": written_by,
}
MANY_HEADS = {
    "vmap": jax.vmap,
    "grad of vmap": lambda f: jax.grad(loss_of(jax.vmap(f)), ALL),
    "vmap of grad": lambda f: jax.vmap(jax.grad(loss_of(f), ALL)),
    "vmap of jvp": lambda f: jax.vmap(lambda *x: jax.jvp(f, x, x)),
    "scan": lambda f: jax.value_and_grad(lambda *x: scanned(f)(*x)[0], ALL),
    "vmap over queries, all shared": lambda f: jax.grad(lambda q, *x: loss_of(grouped(f))(q, *(y[0] for y in x)), ALL),
    "double vmap, queries in groups": lambda f: jax.grad(
        of_groups(loss_of(jax.vmap(jax.vmap(f, (0, None, None, None, None))))), ALL
    ),
    "vmap over other axes": lambda f: jax.grad(
        lambda q, k, v, *x: loss_of(jax.vmap(f, (2, 1, 0, 0, None), 1))(
            jnp.moveaxis(q, 0, 2), jnp.moveaxis(k, 0, 1), v, x[0], x[1][0]
        ),
        ALL,
    ),
    "vmap of keys alone": lambda f: jax.grad(
        lambda q, k, *x: loss_of(jax.vmap(f, (None, 0, None, None, None)))(q[0], k, *(y[0] for y in x)), ALL
    ),
}


def value_and_gradients(f):
    return lambda *x: (f(*x), jax.grad(loss_of(f), ALL)(*x))


def assert_same(found, reference, tolerance=1e-5):
    assert jax.tree.structure(found) == jax.tree.structure(reference)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(reference), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * float(np.abs(y).max(initial=1)))


# Transformations that involve a fused kernel; in the others, forms differ only in their tiles.
OF_KERNELS = {"grad", "checkpoint", "grad of vmap", "double vmap, queries in groups", "vmap over other axes"}


def every_transformation(names):
    cases = [
        case(form, name, is_fast=form == CAUSAL or (form == KERNEL and name in OF_KERNELS))
        for form in FORMS
        for name in names
    ]
    return pytest.mark.parametrize(("pair", "name"), cases, indirect=["pair"])


@every_transformation(ONE_HEAD)
def test_transformations_of_one_head(pair, name):
    state, written_out = pair
    assert_same(jax.jit(ONE_HEAD[name](state))(*head()), expected(ONE_HEAD[name], written_out))


@every_transformation(MANY_HEADS)
def test_transformations_of_heads(pair, name):
    state, written_out = pair
    assert_same(jax.jit(MANY_HEADS[name](state))(*heads()), expected(MANY_HEADS[name], written_out, heads))


@every_form(CAUSAL)
@pytest.mark.parametrize(
    "second",
    [jax.hessian, lambda f: jax.jacrev(jax.jacrev(f)), lambda f: jax.jacfwd(jax.jacfwd(f))],
    ids=["forward over reverse", "reverse over reverse", "forward over forward"],
)
def test_second_derivatives(pair, second):
    state, written_out = pair
    assert_same(jax.jit(second(of_q(state)))(*few_numbers()), expected(hessian, written_out, few_numbers))


@every_form(CAUSAL)
def test_the_result_is_a_pytree(pair):
    state, written_out = pair
    found = jax.tree.map(np.asarray, state(*head()))
    assert isinstance(found, AttentionState)
    assert_same(found, expected(value_and_gradients, written_out)[0])


@every_form(CAUSAL, KERNEL)
def test_operations_one_by_one(pair):
    state, written_out = pair
    with jax.disable_jit():
        found = value_and_gradients(state)(*head())
    assert_same(found, expected(value_and_gradients, written_out))


# Several devices


def mesh_of(devices, kind=AxisType.Auto):
    return jax.make_mesh((devices,), ("x",), axis_types=(kind,), devices=jax.devices()[:devices])


@every_form(CAUSAL, KERNEL)
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_with_tensors_that_all_devices_share(pair, check_vma):
    """Each device has different queries; keys, values, the bias and the scale are the same."""
    one, every = PartitionSpec("x"), PartitionSpec()
    specs = one, every, every, every, every
    shared = functools.partial(jax.shard_map, mesh=mesh_of(4), in_specs=specs)

    def on_devices(f):
        outside = jax.grad(loss_of(shared(grouped(f), out_specs=one, check_vma=check_vma)), ALL)
        if not check_vma:
            return outside
        # Inside, the gradient of shared arrays is the sum over devices as well.
        inside = shared(jax.grad(lambda *x: jnp.sum(grouped(f)(*x).out), ALL), out_specs=specs)
        return lambda *x: (outside(*x), inside(*x))

    state, written_out = pair
    on_one = expected(gradients_on_one_device, written_out, four_queries)
    assert_same(jax.jit(on_devices(state))(*four_queries()), on_one if check_vma else on_one[0])


def gradients_on_one_device(f):
    losses = loss_of(grouped(f)), lambda *x: jnp.sum(grouped(f)(*x).out)
    return lambda *x: tuple(jax.grad(loss, ALL)(*x) for loss in losses)


@every_form(CAUSAL)
@pytest.mark.parametrize("axis", [0, 1], ids=["heads", "tokens"])
def test_programs_that_are_partitioned_automatically(pair, axis):
    mesh = mesh_of(2)
    spec = PartitionSpec(*[None] * axis, "x")
    specs = [spec if x.ndim > axis else PartitionSpec() for x in four_heads()]
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(four_heads(), specs, strict=True)]
    state, written_out = pair
    transform = MANY_HEADS["grad of vmap"]
    assert_same(jax.jit(transform(state))(*placed), expected(transform, written_out, four_heads))


# Pallas cannot interpret a kernel on such a mesh, and JAX cannot map a condition whose branches have constants, as
# those of the gradient over all keys do.
EXPLICIT = [case(form, is_fast=form == CAUSAL) for form in FORMS if form[0] in ("cpu", "xla") and form[1]]


@pytest.mark.parametrize("pair", EXPLICIT, indirect=True)
def test_heads_on_a_mesh_with_explicit_axes(pair):
    mesh = mesh_of(2, AxisType.Explicit)
    state, written_out = pair

    def gradients(f):
        return jax.grad(lambda *x: jnp.sum(jax.vmap(f)(*x).out ** 2), ALL)

    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, NamedSharding(mesh, PartitionSpec("x"))) for x in four_heads()]
        out = jax.eval_shape(jax.vmap(state), *placed).out
        assert out.sharding.spec[0] == "x"
        found = jax.jit(gradients(state))(*placed)
    reference = jax.jit(gradients(written_out))(*four_heads())
    assert_same(*(jax.tree.map(np.asarray, x) for x in (found, reference)))
