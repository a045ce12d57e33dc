"""The platform that a program is lowered for determines its form."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from approx_attention import kernels
from approx_attention.kernels import mosaic
from approx_attention.kernels.reach import Reach
from tests.kernels.cases import random_operands
from tests.programs import equations, lowered_for, lowered_text

pytestmark = pytest.mark.all_forms

HEADS = PartitionSpec("x")


def of_heads(implementation=None):
    one = functools.partial(kernels.state, right=0, implementation=implementation)
    return jax.vmap(lambda q, k, v: one(q, k, v).out)


def gradient(implementation=None):
    return jax.grad(lambda *x: jnp.sum(of_heads(implementation)(*x) ** 2), (0, 1, 2))


@functools.cache
def heads():
    random = [random_operands(seed, 20, 20, 4)[:3] for seed in range(4)]
    return tuple(jnp.stack(x) for x in zip(*random, strict=True))


def num_kernels(text):
    return text.count("@tpu_custom_call")


def mesh_of(*sizes):
    devices = jax.devices()[: int(np.prod(sizes))]
    return jax.make_mesh(sizes, ("x", "y")[: len(sizes)], axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


def partitioned(implementation):
    """A program over two devices that XLA partitions automatically."""
    sharding = NamedSharding(mesh_of(2), HEADS)
    return jax.jit(of_heads(implementation), in_shardings=(sharding,) * 3).trace(*heads())


def over_devices(function, mesh, **options):
    return jax.shard_map(function, mesh=mesh, in_specs=(HEADS,) * 3, out_specs=HEADS, **options)


@pytest.mark.parametrize("implementation", [None, "pallas"])
def test_a_program_for_tpus_has_one_kernel_forward_and_two_more_backward(implementation):
    assert num_kernels(lowered_text(of_heads(implementation), *heads())) == 1
    assert num_kernels(lowered_text(gradient(implementation), *heads())) == 3
    one = lambda *x: kernels.state(*x, left=3, right=2, offset=1, implementation=implementation)  # noqa: E731
    assert num_kernels(lowered_text(one, *(x[0] for x in heads()))) == 1


@pytest.mark.parametrize("platform", ["tpu", "cuda", "rocm"])
def test_tiles_everywhere_where_asked(platform):
    assert "custom_call @tpu" not in lowered_text(gradient("xla"), *heads(), platform=platform)


def test_float64_has_tiles(x64):
    assert not num_kernels(lowered_text(of_heads(), *(x.astype(jnp.float64) for x in heads())))


@pytest.mark.parametrize("implementation", [None, "xla", "interpret"])
def test_a_program_does_not_depend_on_where_it_is_lowered(traced_anew, monkeypatch, implementation):
    texts = set()
    for backend in ("cpu", "tpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        traced_anew()
        texts.add(lowered_text(gradient(implementation), *heads()))
    assert len(texts) == 1


def test_an_unknown_implementation_is_named():
    with pytest.raises(ValueError, match="one of 'xla', 'pallas', 'interpret', 'interpret_gpu', got 'mosaic'"):
        of_heads("mosaic")(*heads())


@pytest.mark.parametrize("compiles", [True, False])
def test_no_fused_kernel_on_a_cpu(compiles):
    with (
        jax.disable_jit(not compiles),
        pytest.raises(NotImplementedError, match=r"without a fused kernel \(cpu\).*tpu"),
    ):
        of_heads("pallas")(*heads())


def test_programs_that_are_partitioned_automatically_have_tiles():
    assert not num_kernels(partitioned(None).lower(lowering_platforms=("tpu",)).as_text())
    with pytest.raises(NotImplementedError, match="partitioned automatically over several devices; use jax.shard_map"):
        partitioned("pallas").lower(lowering_platforms=("tpu",))


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_has_kernels(check_vma):
    mesh = mesh_of(4)
    forward = over_devices(of_heads("pallas"), mesh, check_vma=check_vma)
    assert num_kernels(lowered_text(forward, *heads())) == 1
    outside = jax.grad(lambda *x: jnp.sum(forward(*x)), (0, 1, 2))
    assert num_kernels(lowered_text(outside, *heads())) == 3


def test_shard_map_over_some_axes_has_tiles():
    """XLA partitions the program over the other axes."""
    mesh = mesh_of(2, 2)
    assert not num_kernels(lowered_text(over_devices(of_heads(), mesh, axis_names={"x"}), *heads()))
    with pytest.raises(NotImplementedError, match="partitioned automatically"):
        lowered_text(over_devices(of_heads("pallas"), mesh, axis_names={"x"}), *heads())


@pytest.mark.parametrize("make", [of_heads, gradient])
@pytest.mark.parametrize("platforms", [("tpu",), ("cpu", "tpu")])
def test_exported_programs(platforms, make):
    exported = jax.export.export(jax.jit(make()), platforms=platforms)(*heads())
    exported = jax.export.deserialize(exported.serialize())
    assert num_kernels(str(exported.mlir_module())) == (1 if make is of_heads else 3)
    if "cpu" in platforms:
        for found, expected in zip(*(jax.tree.leaves(f(*heads())) for f in (exported.call, make())), strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-5)


def test_exported_programs_of_several_devices():
    mesh = mesh_of(4)
    function = jax.jit(over_devices(of_heads(), mesh))
    exported = jax.export.export(function, platforms=("cpu", "tpu"))(*heads())
    assert num_kernels(str(exported.mlir_module())) == 1
    placed = [jax.device_put(x, NamedSharding(mesh, HEADS)) for x in heads()]
    np.testing.assert_allclose(exported.call(*placed), of_heads()(*heads()), atol=1e-5)


def test_lowered_for_other_platforms_there_are_tiles():
    assert "custom_call" not in lowered_for("rocm", of_heads(), *heads()).as_text()


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_heads_too_wide_for_a_kernel_have_tiles(platform):
    wide = jax.ShapeDtypeStruct((1, 16, 8192), jnp.float32)
    assert "custom_call" not in lowered_for(platform, of_heads(), wide, wide, wide).as_text()
    with pytest.raises(NotImplementedError, match="does not support heads as wide as D = 8192"):
        lowered_for(platform, of_heads(implementation="pallas"), wide, wide, wide)


def kernels_for_tpus(dtype):
    """The equations of all three kernels, for one head."""
    q, k, v, bias, scale, d_out, row = random_operands(0, 20, 20, 4, dtype=dtype)

    def all_three(q, k, v, d_out):
        forward = mosaic.forward(q, k, v, bias, scale, reach=Reach())
        return forward, mosaic.backward(q, k, v, bias, scale, row, row, row, d_out.astype(dtype), reach=Reach())

    jaxpr = jax.make_jaxpr(all_three)(q, k, v, d_out).jaxpr
    found = [equation for equation, _ in equations(jaxpr) if equation.primitive.name == "pallas_call"]
    assert len(found) == 3
    return found


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("precision", ["high", "tensorfloat32", "highest", "BF16_BF16_F32_X3"])
def test_products_of_kernels_for_tpus_have_a_precision_that_mosaic_compiles(precision, dtype):
    """One pass, or full precision for float32 alone."""
    expected = lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT
    with jax.default_matmul_precision(precision):
        assert num_kernels(lowered_text(gradient(), *(x.astype(dtype) for x in heads()))) == 3
        for kernel in kernels_for_tpus(dtype):
            products = [x for x, _ in equations(kernel.params["jaxpr"]) if x.primitive.name == "dot_general"]
            assert {x for product in products for x in product.params["precision"]} == {expected}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_kernels_for_tpus_have_no_float16(dtype):
    """Mosaic does not compile float16."""
    for kernel in kernels_for_tpus(dtype):
        assert jnp.dtype(jnp.float16) not in {x.aval.dtype for x in kernel.invars}


def test_tiles_for_tpus_fit_memory_with_wide_heads():
    whole, half = mosaic.TILES, mosaic.Tiles(mosaic.Tile(512, 512, 256), mosaic.Tile(512, 256, 256))
    with jax.default_matmul_precision("default"):
        assert mosaic.default_tiles(128, 128, jnp.float32) == whole == mosaic.default_tiles(256, 256, jnp.bfloat16)
        assert mosaic.default_tiles(256, 256, jnp.float32) == half == mosaic.default_tiles(500, 12, jnp.float32)
        least = mosaic.Tile(*3 * [mosaic.LANES])
        assert mosaic.default_tiles(4096, 64, jnp.float32) == mosaic.Tiles(least, least)
    with jax.default_matmul_precision("float32"):
        assert mosaic.default_tiles(128, 128, jnp.float32) == half
        assert mosaic.default_tiles(128, 128, jnp.bfloat16) == whole
    operands = random_operands(0, 300, 300, 600)
    np.testing.assert_allclose(
        kernels.state(*operands[:4], scale=operands[4], right=0, implementation="interpret").out,
        kernels.state(*operands[:4], scale=operands[4], right=0).out,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": jnp.ones((5, 3))}, ValueError, r"state needs q \[T, D\].*got q \(6, 4\), k \(5, 3\)"),
        ({"v": jnp.ones((6, 2))}, ValueError, r"v \(6, 2\)"),
        ({"key_bias": jnp.ones((1, 5))}, ValueError, r"key_bias \(1, 5\)"),
        ({"q": jnp.ones((6, 4), int)}, TypeError, "q must be a floating-point array, got int"),
        ({"left": 1.5}, TypeError, "left must be an integer known when tracing, got 1.5"),
        ({"offset": None}, TypeError, "offset must be an integer"),
        ({"scale": 0}, ValueError, "scale must be positive, got 0"),
    ],
)
def test_bad_input_is_named(change, error, message):
    good = {"q": jnp.ones((6, 4)), "k": jnp.ones((5, 4)), "v": jnp.ones((5, 2))}
    with pytest.raises(error, match=message):
        kernels.state(**(good | change))
    with pytest.raises(ValueError, match="platform must be one of 'tpu', 'cuda', got 'rocm'"):
        kernels.default_tiles("rocm", 4, 4, jnp.float32)
