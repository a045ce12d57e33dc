"""What a traced program computes."""

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
