"""What a traced program computes."""

import functools
import re

import jax


def equations(jaxpr, times=1):
    """All equations of a jaxpr and its inner ones, with how often each runs."""
    for equation in jaxpr.eqns:
        yield equation, times
        inner = times * equation.params["length"] if equation.primitive.name == "scan" else times
        for value in equation.params.values():
            for leaf in jax.tree.leaves(value, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                if hasattr(leaf, "jaxpr"):
                    leaf = leaf.jaxpr
                if hasattr(leaf, "eqns"):
                    yield from equations(leaf, inner)


def lowered_text(function, *arguments, platform="tpu"):
    """The program of a function for a platform, which need not be there."""
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def products(function, *arguments):
    """Shapes of both operands of every product of the program for a TPU, and whether it is rounded there."""
    for line in lowered_text(function, *arguments).splitlines():
        if "stablehlo.dot_general" in line:
            left, right = re.search(r": \(tensor<(\S+)>, tensor<(\S+)>\)", line).groups()
            shapes = tuple(tuple(int(n) for n in x.split("x")[:-1]) for x in (left, right))
            yield shapes, "HIGHEST, HIGHEST" not in line


def num_decompositions(function, *arguments, platform="tpu"):
    """How many QR decompositions the text of a program has; a loop counts once, what is called twice counts twice."""
    bodies = {}
    for part in lowered_text(function, *arguments, platform=platform).split("func.func ")[1:]:
        bodies[re.search(r"@([\w.]+)\(", part).group(1)] = part

    @functools.cache
    def within(name):
        own = len(re.findall(r"custom_call @(?:Qr\b|\w*geqrf)", bodies[name]))
        return own + sum(within(called) for called in re.findall(r"[^_]call @([\w.]+)\(", bodies[name]))

    return within("main")
