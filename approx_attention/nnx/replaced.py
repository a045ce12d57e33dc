"""The result of `replace_attention`: replaced layers, and attention that could not be replaced."""

from collections.abc import Iterable
from typing import Any

import flax.linen
import jax
from flax import nnx

# Common names of the projections of attention in models without an ``attention_fn``.
_PROJECTIONS = (
    ("query", "key", "value"),
    ("q", "k", "v"),
    *((f"{q}_proj", f"{k}_proj", f"{v}_proj") for q, k, v in (("q", "k", "v"), ("query", "key", "value"))),
    ("wq", "wk", "wv"),
    ("to_q", "to_k", "to_v"),
)
_LINEN = "a Linen module: set attention_fn=approx_attention.linen.ApproxAttention(...) of its layers"
_CALLS = (
    "it has no attention_fn: call self.attention_fn(query, key, value) in it, or approx_attention.attention(..., "
    "method=...), in place of jax.nn.dot_product_attention"
)


class Replaced(list[str]):
    """A list of the paths of replaced layers, such as ``"layers.0.attention"``.

    Attention that was not replaced is not a warning, because it is often intended.

    Attributes:
        not_replaced: modules that look like attention and were not replaced, by path, with advice: modules that
            compute attention without an ``attention_fn``, and Linen modules inside. They are recognised by their name
            or by their projections.
    """

    def __init__(self, paths: Iterable[str] = (), not_replaced: dict[str, str] | None = None):
        super().__init__(paths)
        self.not_replaced = not_replaced or {}


def not_replaceable(model: nnx.Module) -> dict[str, str]:
    """The modules of a model that look like attention without a settable ``attention_fn``, with advice."""
    nodes: dict[tuple[Any, ...], Any] = {
        path: node for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Module)
    }
    own = {path: node for path, node in nodes.items() if not isinstance(node, nnx.bridge.ToNNX)}
    layers = [path for path, node in own.items() if callable(getattr(node, "attention_fn", None))]
    found: dict[tuple[Any, ...], str] = {}
    for path, node in sorted(nodes.items(), key=lambda item: len(item[0])):
        if path not in own:
            if _has_attention(node.to_nnx__module):
                found[path] = _LINEN
        # Skip blocks around a layer with an attention_fn, parts of such a layer, and parts of modules already found.
        elif _looks_like_attention(node):
            related = (_within(path, other) or _within(other, path) for other in layers)
            if not any(related) and not any(_within(path, outer) for outer in found):
                found[path] = _CALLS
    return {".".join(map(str, path)): reason for path, reason in found.items()}


def _within(path: tuple[Any, ...], outer: tuple[Any, ...]) -> bool:
    return path[: len(outer)] == outer


def _looks_like_attention(node: Any) -> bool:
    kind = type(node)
    if kind.__module__.startswith("approx_attention."):
        return False
    if any(all(hasattr(node, name) for name in names) for names in _PROJECTIONS):
        return True
    return "attention" in kind.__name__.lower() and not isinstance(node, nnx.List | nnx.Dict | nnx.Sequential)


def _has_attention(module: Any) -> bool:
    """Whether a Linen module is attention, or has it in its fields; submodules created in a call are not found."""
    if not isinstance(module, flax.linen.Module):
        return False
    if "attention" in type(module).__name__.lower() or hasattr(module, "attention_fn"):
        return True
    fields = (getattr(module, name, None) for name in type(module).__dataclass_fields__ if name != "parent")
    return any(map(_has_attention, jax.tree.leaves(list(fields))))
