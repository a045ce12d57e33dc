"""Capture of queries, keys and values of all attention layers of a Flax nnx model, for comparisons and plans."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
from flax import errors, nnx

from approx_attention.evaluation import save_layers
from approx_attention.flax_arguments import as_layer, seen_arrays
from approx_attention.nnx.models import attention_layers


class _Recorder(nnx.Module):
    """An ``attention_fn`` that records its arguments as variables, which nnx transforms return."""

    def __init__(self, attention_fn: Callable[..., Any]):
        held = nnx.data if isinstance(attention_fn, nnx.Module) else nnx.static
        self.attention_fn = held(attention_fn)
        self.seen, self.rank = nnx.data(None), 0

    def __call__(self, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        bound, scale = (getattr(self.attention_fn, name, None) for name in ("bound", "scale"))
        options = {**getattr(bound, "hyperparameters", {}), "scale": scale}
        self.seen = nnx.Intermediate(seen_arrays(self.attention_fn, (query, key, value), args, kwargs, options))
        self.rank = query.ndim
        return self.attention_fn(query, key, value, *args, **kwargs)

    def layers(self, path: str) -> dict[str, dict[str, np.ndarray]]:
        """The recorded arrays by name of each layer of a stack, or of the single layer."""
        assert self.seen is not None, path
        arrays = {name: np.asarray(x) for name, x in self.seen.get_value().items()}
        stack = arrays["q"].shape[: arrays["q"].ndim - self.rank]
        names = {index: f"{path}[{','.join(map(str, index))}]" if stack else path for index in np.ndindex(stack)}
        return {
            name: as_layer(name, {array: x[index] if x.ndim >= len(stack) else x for array, x in arrays.items()})
            for index, name in names.items()
        }


def capture_attention(
    model: nnx.Module, run: Callable[[nnx.Module], Any], *, to: str | os.PathLike[str] | None = None
) -> dict[str, dict[str, np.ndarray]]:
    """Record query, key and value of every attention layer of a model during a run.

    An attention layer is any module with an ``attention_fn``, such as ``nnx.MultiHeadAttention``. The function is
    wrapped for the run and restored afterwards. The run may be jitted by ``nnx.jit``. Layers stacked by ``nnx.vmap``
    and run by ``nnx.scan`` or ``nnx.vmap`` are recorded separately: ``"layers[0]"``, ``"layers[1]"`` and so on.

    Args:
        model: any nnx model.
        run: calls the model once, such as ``lambda model: model(tokens)``; only the last call of a layer is recorded.
        to: an .npz file to write, for `evaluation.load_layers`, ``approx-attention compare`` and ``plan``.

    Returns:
        For the path of every called layer, the arrays ``q [..., T, N, D]``, ``k [..., S, K, D]`` and
        ``v [..., S, K, Dv]`` in a dtype of numpy; ``is_causal``; ``mask [B, S]``, true where a key is real, and
        ``scale``, if given; and other arrays that the layer passed by name.

    Raises:
        ValueError: the model has no attention layer or none was called; it was called under a transform of JAX instead
            of nnx; there is a bias, a cap of logits, or a mask that is neither causal nor padding.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from approx_attention.nnx import capture_attention
        >>> model = nnx.MultiHeadAttention(num_heads=4, in_features=32, decode=False, rngs=nnx.Rngs(0))
        >>> captured = capture_attention(model, lambda model: model(jnp.ones((2, 100, 32)), is_causal=True))
        >>> captured[""]["q"].shape, bool(captured[""]["is_causal"])
        ((2, 100, 4, 8), True)
    """
    layers = attention_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no module with an attention_fn, so there is nothing to capture")
    functions = {path: layer.attention_fn for path, layer in layers.items()}
    # If the function is defined by the class of a layer, there is nothing to restore.
    own = {path for path, layer in layers.items() if "attention_fn" in vars(layer)}
    recorders = {path: _Recorder(function) for path, function in functions.items()}
    try:
        for path, layer in layers.items():
            layer.attention_fn = nnx.data(recorders[path])
        run(model)
        recorders = {path: layer.attention_fn for path, layer in layers.items()}
    except errors.TraceContextError as error:
        raise ValueError(
            "the run calls the model under a transform of JAX, in which nothing can be recorded; call it without, "
            "or under a transform of nnx, such as nnx.jit"
        ) from error
    finally:
        for path, layer in layers.items():
            if path in own:
                function = functions[path]
                layer.attention_fn = nnx.data(function) if isinstance(function, nnx.Module) else nnx.static(function)
            else:
                del layer.attention_fn
    called = {path: recorder for path, recorder in recorders.items() if recorder.seen is not None}
    if not called:
        raise ValueError(f"none of the attention layers {', '.join(layers)} was called")
    captured = {name: x for path, recorder in called.items() for name, x in recorder.layers(path).items()}
    if to is not None:
        save_layers(to, captured)
    return captured
