"""Functions with a form for each platform, chosen when a program is lowered, as one JAX primitive.

`jax.lax.platform_dependent` makes a similar choice, but does not support fused kernels in its branches: in a program
for several platforms it lowers every branch for all of them. The lowering of a primitive knows the platform. It also
knows whether the program is partitioned automatically over devices, which fused kernels do not support.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AbstractDevice, AbstractMesh, PartitionSpec, use_abstract_mesh

from approx_attention.kernels.rows import along_with

Outputs = TypeVar("Outputs")
# The operands that one `jax.vmap` maps, along their leading axis.
Mapped = tuple[bool, ...]
Options = tuple[tuple[str, Any], ...]


def by_platform(*operands: Any, cpu: Callable[..., Outputs], default: Callable[..., Outputs]) -> Outputs:
    """Call one of two forms made of JAX operations, for CPUs and for all other platforms.

    In shard_map the outputs of both forms, which must not be PRNG keys, vary over all mesh axes over which an operand
    varies.

    Args:
        *operands: pytrees of arrays, the arguments of both forms.
        cpu: the form for CPUs.
        default: the form for other platforms.

    Returns:
        The outputs of the form for the platform that the program is lowered for. Both must give equal shapes and
        dtypes.
    """
    leaves = jax.tree.leaves(operands)
    if any(getattr(jax.typeof(x), "mat", None) != getattr(jax.typeof(0), "mat", None) for x in leaves):
        cpu, default = (lambda *x, form=form: along_with(form(*x), x) for form in (cpu, default))
    return lax.platform_dependent(*operands, cpu=cpu, default=default)


class ByPlatform:
    """A function ``(*operands, **options)`` of arrays with several forms, which returns a tuple of arrays.

    Args:
        name: the name of the primitive.
        outputs: ``(*operands, **options) -> [(shape, dtype), ...]`` from the shapes and dtypes of operands.
        cpu: the form for CPUs, of JAX operations.
        default: the form for other platforms without a fused kernel, and for partitioned programs.
        fused: forms by platform name, or by other names for the option ``implementation``.
    """

    def __init__(
        self,
        name: str,
        outputs: Callable[..., Sequence[tuple[tuple[int, ...], Any]]],
        *,
        cpu: Callable[..., Any],
        default: Callable[..., Any],
        fused: Mapping[str, Callable[..., Any]],
    ):
        self.outputs, self.cpu, self.default, self.fused = outputs, cpu, default, fused
        self.primitive = Primitive(name)
        self.primitive.multiple_results = True
        self.primitive.def_abstract_eval(self._types)
        self._compiled = jax.jit(self.bind, static_argnames=("mapped", "options"))
        self.primitive.def_impl(self._applied)
        batching.primitive_batchers[self.primitive] = self._batched
        mlir.register_lowering(self.primitive, functools.partial(self._lowered, form="default"))
        for platform in ("cpu", "tpu", "cuda"):
            rule = functools.partial(self._lowered, form=platform)
            mlir.register_lowering(self.primitive, rule, platform=platform)

    def __call__(self, *operands: Array, **options: Any) -> list[Array]:
        """Call the function. In shard_map all operands must vary over the same axes."""
        return self.bind(*operands, mapped=(), options=tuple(sorted(options.items())))

    def define_jvp(self, rule: Callable[..., tuple[Any, Any]]) -> None:
        """Set the derivative: ``(primals, tangents, mapped, options) -> (outputs, tangents of outputs)``."""

        def jvp(primals: Any, tangents: Any, *, options: Options, mapped: tuple[Mapped, ...]) -> Any:
            return rule(primals, [ad.instantiate_zeros(x) for x in tangents], mapped, options)

        ad.primitive_jvps[self.primitive] = jvp

    def define_transpose(self, rule: Callable[..., Any]) -> None:
        """Set the transpose: ``(cotangents, operands, mapped, options) -> cotangents of operands``."""

        def transpose(cotangents: Any, *operands: Any, options: Options, mapped: tuple[Mapped, ...]) -> Any:
            return rule([ad.instantiate_zeros(x) for x in cotangents], operands, mapped, options)

        ad.primitive_transposes[self.primitive] = transpose

    def bind(self, *operands: Array, mapped: tuple[Mapped, ...], options: Options) -> list[Array]:
        """Call the function with operands that are already mapped, as in a derivative rule."""
        return self.primitive.bind(*operands, options=options, mapped=mapped)

    def _types(self, *operands: Any, options: Options, mapped: tuple[Mapped, ...]) -> list[Any]:
        def typed(shape: tuple[int, ...], parts: Sequence[Any], dtype: Any) -> Any:
            sharding = operands[0].sharding.update(spec=PartitionSpec(*parts))
            return operands[0].update(shape=shape, dtype=jnp.dtype(dtype), weak_type=False, sharding=sharding)

        own = list(operands)
        # On a mesh with explicit axes a mapped axis keeps its sharding; no other axis of an output is sharded.
        sizes, parts = [], []
        for level in mapped:
            first = next(x for x, is_mapped in zip(own, level, strict=True) if is_mapped)
            sizes.append(first.shape[0])
            parts.append(first.sharding.spec[0])
            own = [
                typed(x.shape[1:], x.sharding.spec[1:], x.dtype) if is_mapped else x
                for x, is_mapped in zip(own, level, strict=True)
            ]

        def type_of(shape: tuple[int, ...], dtype: Any) -> Any:
            return typed((*sizes, *shape), (*parts, *(None for _ in shape)), dtype)

        return [type_of(*output) for output in self.outputs(*own, **dict(options))]

    def _batched(
        self, operands: Sequence[Array], axes: Sequence[Any], *, options: Options, mapped: tuple[Mapped, ...]
    ) -> tuple[list[Array], list[int]]:
        level = tuple(axis is not None for axis in axes)
        moved = [x if axis is None else jnp.moveaxis(x, axis, 0) for x, axis in zip(operands, axes, strict=True)]
        outputs = self.bind(*moved, mapped=(level, *mapped), options=options)
        return outputs, [0] * len(outputs)

    def _applied(self, *operands: Array, options: Options, mapped: tuple[Mapped, ...]) -> Any:
        # Also under `jax.disable_jit`, because the platform is known only when a program is lowered.
        with jax.disable_jit(False):
            return self._compiled(*operands, mapped=mapped, options=options)

    def _lowered(self, ctx: Any, *operands: Any, options: Options, mapped: tuple[Mapped, ...], form: str) -> Any:
        asked = dict(options).get("implementation") or "default"
        chosen = self.cpu if form == "cpu" else self.default
        if asked in self.fused:
            chosen = self.fused[asked]
        elif asked == "pallas" and form not in self.fused:
            raise NotImplementedError(
                f"implementation='pallas' was lowered for a platform without a fused kernel ({form}); supported are "
                f"{', '.join(x for x in self.fused if x in ('tpu', 'cuda'))}. Use None, 'xla' or 'interpret'"
            )
        elif asked != "xla" and form in self.fused:
            module = ctx.module_context
            if _is_partitioned(module.axis_context):
                if asked == "pallas":
                    raise NotImplementedError(
                        "implementation='pallas' is not supported in a program that is partitioned automatically over "
                        "several devices; use jax.shard_map over them, None or 'xla'"
                    )
            else:
                chosen = self.fused[form]
                # In a program for several platforms this part is for one platform.
                ctx = ctx.replace(module_context=module.replace(platforms=(form,)))
        with _for_some_gpu(form):
            return mlir.lower_fun(mapped_form(chosen, options, mapped), multiple_results=True)(ctx, *operands)


def _for_some_gpu(form: str) -> contextlib.AbstractContextManager[Any]:
    """A context in which Pallas lowers kernels for a GPU on a machine without one: from JAX 0.12 it asks which.

    An older GPU than the H200, so that what is lowered uses nothing that only the newest have.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if form not in ("cuda", "rocm") or mesh.abstract_device is not None or jax.local_devices()[0].platform == "gpu":
        return contextlib.nullcontext()
    device = AbstractDevice("NVIDIA A100", None, "gpu")
    return use_abstract_mesh(AbstractMesh(mesh.axis_sizes, mesh.axis_names, mesh.axis_types, abstract_device=device))


def mapped_form(function: Callable[..., Any], options: Options, mapped: tuple[Mapped, ...]) -> Callable[..., Any]:
    """Turn a function of unmapped operands into one of mapped operands, with bound options.

    The option ``precision`` is that of matrix products, which are made when a program is lowered, outside the context
    in which it was traced.
    """
    given = dict(options)
    precision = given.pop("precision", None)

    def form(*operands: Any) -> Any:
        with jax.default_matmul_precision(precision):
            return function(*operands, **given)

    for level in reversed(mapped):
        form = jax.vmap(form, in_axes=[0 if is_mapped else None for is_mapped in level])
    return form


def _is_partitioned(axes: Any) -> bool:
    """Whether XLA partitions the operations of a program over devices automatically."""
    if hasattr(axes, "num_devices"):
        return axes.num_devices not in (None, 1)
    # In shard_map the mesh's other axes are automatic.
    return hasattr(axes, "manual_axes") and set(axes.manual_axes) != set(axes.mesh.axis_names)
