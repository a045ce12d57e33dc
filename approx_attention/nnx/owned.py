"""Arrays of a method that its caller made, as state of a layer."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class OwnedArrays(nnx.Module):
    """Arrays that a layer passes to its method in every call: saved and mapped with the model.

    Args:
        shared: those of all heads, by argument: arrays, or trees of them.
        per_head: those of each key head ``[K, ...]``, likewise.
        learned: the arguments whose arrays are parameters; those of the others are trained by no optimiser of
            ``nnx.Param``.
    """

    def __init__(self, shared: Mapping[str, Any], per_head: Mapping[str, Any], learned: Collection[str] = ()):
        found, tree = jax.tree_util.tree_flatten_with_path((dict(shared), dict(per_head)))
        variables = {}
        for (_, argument, *rest), x in found:
            name = jax.tree_util.keystr((argument, *rest), simple=True, separator="_")
            kind = nnx.Param if argument.key in learned else nnx.Variable
            variables[name] = kind(jnp.asarray(x))
        self.arrays, self.names, self.tree = nnx.Dict(variables), nnx.static(tuple(variables)), nnx.static(tree)

    def read(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The arrays of all heads, and those of each, by argument."""
        return jax.tree.unflatten(self.tree, [self.arrays[name][...] for name in self.names])
