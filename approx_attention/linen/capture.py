"""Capture of queries, keys and values of all attention layers of a Linen model, for comparisons and plans."""

import inspect
import os
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from approx_attention.evaluation import save_layers
from approx_attention.flax_arguments import as_layer, seen_arrays

COLLECTION = "intermediates"


def capture_attention(
    model: nn.Module,
    variables: Mapping[str, Any],
    *args: Any,
    to: str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> dict[str, dict[str, np.ndarray]]:
    """Record query, key and value of every attention layer of a Linen model during ``model.apply``.

    An attention layer is any module with a field ``attention_fn``, such as ``nn.MultiHeadDotProductAttention``. The
    arrays are sown into the collection ``"intermediates"``: layers stacked by ``nn.scan`` or ``nn.vmap`` need
    ``variable_axes={"params": 0, "intermediates": 0}``, and are recorded separately, as ``"layers[0]"`` and so on.

    Args:
        model: any Linen model.
        variables: variables for ``model.apply``.
        *args: arguments of the model.
        to: an .npz file to write, as in `approx_attention.nnx.capture_attention`.
        **kwargs: further arguments of ``model.apply``, such as ``rngs``.

    Returns:
        The arrays of each layer by its path, as from `approx_attention.nnx.capture_attention`.

    Raises:
        ValueError: no attention layer was called, or one is inside a transform that does not carry the collection;
            there is a bias, a cap of logits, or a mask that is neither causal nor padding.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from approx_attention.linen import capture_attention
        >>> model, x = nn.MultiHeadDotProductAttention(num_heads=4), jnp.ones((2, 100, 32))
        >>> captured = capture_attention(model, model.init(jax.random.key(0), x), x)
        >>> captured[""]["q"].shape
        (2, 100, 4, 8)
    """
    ranks: dict[str, int] = {}

    def record(next_fun: Any, call_args: Any, call_kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module: Any = context.module
        if context.method_name != "__call__" or not callable(getattr(module, "attention_fn", None)):
            return next_fun(*call_args, **call_kwargs)
        inner, path = module.attention_fn, ".".join(module.path)

        def seen(query: Any, key: Any, value: Any, *own: Any, **named: Any) -> Any:
            found = seen_arrays(inner, (query, key, value), own, named, getattr(inner, "options", {}))
            if not module.sow(COLLECTION, "attention", found, reduce_fn=lambda before, last: last, init_fn=dict):
                raise ValueError(
                    f"layer {path!r} is inside a transform that does not carry the collection {COLLECTION!r}: set its "
                    f"variable_axes={{'params': 0, {COLLECTION!r}: 0}}"
                )
            ranks[path] = query.ndim
            return inner(query, key, value, *own, **named)

        # Linen filters arguments by signature, and must not drop any that it passes to the original function.
        seen.__signature__ = inspect.signature(inner)  # pyright: ignore[reportFunctionMemberAccess]
        object.__setattr__(module, "attention_fn", seen)
        try:
            return next_fun(*call_args, **call_kwargs)
        finally:
            object.__setattr__(module, "attention_fn", inner)

    with nn.intercept_methods(record):
        _, state = model.apply(variables, *args, **kwargs, mutable=[COLLECTION])
    captured: dict[str, dict[str, np.ndarray]] = {}
    for path, rank in ranks.items():
        found = state[COLLECTION]
        for name in filter(None, path.split(".")):
            found = found[name]
        arrays = {name: np.asarray(x) for name, x in found["attention"].items()}
        stack = arrays["q"].shape[: arrays["q"].ndim - rank]
        for index in np.ndindex(stack):
            name = f"{path}[{','.join(map(str, index))}]" if stack else path
            captured[name] = as_layer(name, {array: x[index] for array, x in arrays.items()})
    if not captured:
        raise ValueError(
            f"{type(model).__name__} called no module with an attention_fn, so there is nothing to capture"
        )
    if to is not None:
        save_layers(to, captured)
    return captured
