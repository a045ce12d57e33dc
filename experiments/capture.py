"""The hook that records what a Flax nnx model's attention sees."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx


def capture(model: nnx.Module, run: Callable[[nnx.Module], Any]) -> dict[str, dict[str, np.ndarray]]:
    """Records query, key and value of every attention layer of a model during one forward pass.

    An attention layer is any module with an ``attention_fn``, `flax.nnx.MultiHeadAttention` among them; the function
    is wrapped for the pass and put back after it. The pass must not be jitted, so that the arrays are real.

    Args:
        model: any nnx model.
        run: calls the model once, for instance ``lambda model: model(tokens)``.

    Returns:
        By the path of every layer that was called, its ``q [..., T, N, D]``, ``k [..., S, K, D]`` and
        ``v [..., S, K, Dv]``, and the arrays it was given by keyword, those of the last call if there were several;
        bfloat16, which numpy's files do not know, as float32.

    Raises:
        ValueError: the model has no attention layer, or none was called.
    """
    layers: dict[str, Any] = {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_graph(model)
        if isinstance(module, nnx.Module) and callable(getattr(module, "attention_fn", None))
    }
    if not layers:
        raise ValueError(f"{type(model).__name__} has no module with an attention_fn, so there is nothing to capture")
    functions = {name: layer.attention_fn for name, layer in layers.items()}
    # A layer whose class defines the function has none of its own to put back.
    own = {name for name, layer in layers.items() if "attention_fn" in vars(layer)}
    captured: dict[str, dict[str, np.ndarray]] = {}

    def recorder(name: str) -> Callable[..., Any]:
        def record(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            more = {name: as_saved(x) for name, x in kwargs.items() if isinstance(x, jax.Array)}
            captured[name] = {"q": as_saved(query), "k": as_saved(key), "v": as_saved(value), **more}
            return functions[name](query, key, value, *args, **kwargs)

        return record

    try:
        for name, layer in layers.items():
            layer.attention_fn = nnx.static(recorder(name))
        run(model)
    finally:
        for name, layer in layers.items():
            if name in own:
                function = functions[name]
                layer.attention_fn = nnx.data(function) if isinstance(function, nnx.Module) else nnx.static(function)
            else:
                del layer.attention_fn
    if not captured:
        raise ValueError(f"none of the attention layers {', '.join(layers)} was called")
    return captured


def as_saved(x: Any) -> np.ndarray:
    """The array in a type that numpy can write to a file."""
    x = np.asarray(x)
    return x if x.dtype.kind == "f" else x.astype(np.float32)
