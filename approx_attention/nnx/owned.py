"""Arrays of a method, given by the caller, as state of a layer."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class OwnedArrays(nnx.Module):
    """Arrays that a layer passes to its method in every call; they are saved and mapped with the model.

    Args:
        shared: arrays of all heads, or trees of them, by argument name.
        per_head: arrays of each key head ``[K, ...]``, by argument name.
        learned: the arguments whose arrays are parameters, ``nnx.Param``; the others are not trained.
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
