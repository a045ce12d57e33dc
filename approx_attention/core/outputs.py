"""The return value of a method: its outputs, or on request its attention state."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, ParamSpec, Protocol, overload, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array

from approx_attention.kernels import AttentionState

P = ParamSpec("P")


@runtime_checkable
class OutputOrState(Protocol[P]):
    """A method of one head: outputs in the dtype of the values, or the `AttentionState`."""

    __name__: str

    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Array: ...

    @overload
    def __call__(
        self, q: Array, k: Any, v: Any, key: Any = None, *, return_state: Literal[True], **options: Any
    ) -> AttentionState: ...

    @overload
    def __call__(
        self, q: Array, k: Any, v: Any, key: Any = None, *, return_state: bool, **options: Any
    ) -> Array | AttentionState: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method."""


def output_or_state(function: Callable[P, AttentionState]) -> OutputOrState[P]:
    """Turn a function ``(q, k, v, key, *, ...) -> AttentionState`` into a method with the argument ``return_state``.

    Outputs have the dtype of the values, states the accumulation dtype, float32 or wider.
    """

    make: Callable[..., AttentionState] = function

    @functools.wraps(function)
    def method(q: Array, k: Any, v: Any, *key: Any, return_state: bool = False, **options: Any) -> Any:
        state = make(q, k, v, *key, **options)
        return state if return_state else state.out.astype(jnp.result_type(*jax.tree.leaves(v)))

    signature = inspect.signature(function)
    state = inspect.Parameter("return_state", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=bool)
    # Python allows no parameter after **hyperparameters; the sort is stable.
    parameters = sorted([*signature.parameters.values(), state], key=lambda parameter: parameter.kind)
    method.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=parameters, return_annotation=Array | AttentionState
    )
    return method  # type: ignore[return-value]
