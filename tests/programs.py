"""Inspection of traced and lowered programs."""

import contextlib
import functools
import re

import jax
import pytest

from approx_attention.kernels import fused
from approx_attention.kernels.platforms import mapped_form
from tests.forms import FORM

OPERATIONS = {x.primitive: x for x in (fused._forward, fused._backward, fused._along_tangents)}


def on_cpu(equation):
    """The jaxpr of the form for CPUs of an operation that has one for each platform."""
    form = mapped_form(OPERATIONS[equation.primitive].cpu, **equation.params)
    return jax.make_jaxpr(form)(*(jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in equation.invars)).jaxpr


def equations(jaxpr, times=1, platform=None):
    """All equations of a jaxpr and its inner ones, with how often each runs; those for one platform alone if given."""
    for equation in jaxpr.eqns:
        yield equation, times
        inner = times * equation.params["length"] if equation.primitive.name == "scan" else times
        if equation.primitive in OPERATIONS:
            yield from equations(on_cpu(equation), times, platform)
            continue
        of_platforms = equation.params.get("branches_platforms")
        if platform and of_platforms:
            index = next(i for i, names in enumerate(of_platforms) if names is None or platform in names)
            yield from equations(equation.params["branches"][index].jaxpr, times, platform)
            continue
        for value in equation.params.values():
            for leaf in jax.tree.leaves(value, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                if hasattr(leaf, "jaxpr"):
                    leaf = leaf.jaxpr
                if hasattr(leaf, "eqns"):
                    yield from equations(leaf, inner, platform)


def lowered_text(function, *arguments, platform="tpu"):
    """The text of a function lowered for a platform, which need not be present."""
    return lowered_for(platform, function, *arguments).as_text()


@contextlib.contextmanager
def without_fused_kernels():
    """Lower programs with tiles instead of fused kernels, so that their operations are visible in the text."""
    with pytest.MonkeyPatch.context() as patch:
        for function in (fused._forward, fused._backward):
            patch.setattr(function, "fused", {})
        yield


def products(function, *arguments):
    """Operand shapes of every product of the program for a TPU, and whether the product is rounded there."""
    with without_fused_kernels():
        text = lowered_text(function, *arguments)
    for line in text.splitlines():
        if "stablehlo.dot_general" in line:
            left, right = re.search(r": \(tensor<(\S+)>, tensor<(\S+)>\)", line).groups()
            shapes = tuple(tuple(int(n) for n in x.split("x")[:-1]) for x in (left, right))
            yield shapes, "HIGHEST, HIGHEST" not in line


def num_decompositions_in(text):
    """The number of QR decompositions in a lowered program: loops count once, a function called twice counts twice."""
    bodies = {}
    for part in text.split("func.func ")[1:]:
        bodies[re.search(r"@([\w.]+)\(", part).group(1)] = part

    @functools.cache
    def within(name):
        own = len(re.findall(r"custom_call @(?:Qr\b|\w*geqrf)", bodies[name]))
        return own + sum(within(called) for called in re.findall(r"[^_]call @([\w.]+)\(", bodies[name]))

    return within("main")


def lowered_for(platform, function, *arguments):
    """Lower a function for one platform, present or not: ``"cpu"``, ``"cuda"`` or ``"tpu"``."""
    with FORM("all"):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,))


def loop_steps(lowered):
    """The number of sequential loop steps of a lowered program; nested loops multiply.

    Raises:
        ValueError: the program does not state the trip count of a loop.
    """
    functions = {f.attributes["sym_name"].value: f for f in lowered.compiler_ir("stablehlo").body.operations}

    def within(operations):
        return sum(map(of, operations))

    def of(operation):
        name = operation.operation.name
        if name == "func.call":
            return within(functions[operation.attributes["callee"].value].regions[0].blocks[0])
        if name == "stablehlo.while":
            return _trips(operation) * (1 + within(operation.regions[1].blocks[0]))
        inside = [within(block) for region in operation.regions for block in region.blocks]
        return max(inside, default=0)  # only one of the branches runs

    return of(functions["main"])


def _trips(loop):
    """The trip count of a loop that counts from one constant up to another."""
    condition = loop.regions[0].blocks[0]
    compared = condition.operations[len(condition.operations) - 1].operands[0].owner
    if compared.name == "stablehlo.compare" and "LT" in str(compared.attributes["comparison_direction"]):
        counter, end = compared.operands
        for place, argument in enumerate(condition.arguments):
            start = loop.operands[place]
            if argument == counter and _is_constant(start) and _is_constant(end):
                return _constant(end) - _constant(start)
    raise ValueError(f"the trips of this loop are not known: {condition}")


def _is_constant(value):
    return getattr(value.owner, "name", None) == "stablehlo.constant"


def _constant(value):
    return int(next(iter(value.owner.attributes["value"])))
