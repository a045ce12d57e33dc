"""Replacement of the attention of all layers of a Flax nnx model, and their caches; supports stacked layers."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from approx_attention.core import shown
from approx_attention.evaluation import Policy, stack_of
from approx_attention.nnx.attention import ApproxAttention
from approx_attention.nnx.replaced import Replaced, not_replaceable
from approx_attention.nnx.streams import attention_stream
from approx_attention.registry import BoundMethod, HeadMethods


def replace_attention(
    model: nnx.Module,
    method: str | Callable[..., Array] | BoundMethod | HeadMethods | None = None,
    *,
    policy: Policy | None = None,
    only: Callable[[str, nnx.Module], bool] | None = None,
    rngs: nnx.Rngs | None = None,
    **options: Any,
) -> Replaced:
    """Replace the attention of a model's layers by a method, in place; all parameters are unchanged.

    Layers stacked by ``nnx.vmap`` along leading axes are recognised by the kernels of their ``nnx.Linear``,
    ``nnx.LinearGeneral``, ``nnx.Einsum`` and ``nnx.Conv``, or by their random streams. Every layer of a stack gets a
    different random projection, and ``nnx.scan`` and ``nnx.vmap`` run the stack as before. Stacks of layers with only
    other parameters, such as an ``nnx.Param``, are not recognised: give a key for each layer (``rngs.split(L)``), or
    call this function inside ``nnx.vmap``.

    Args:
        model: any nnx model whose layers have an ``attention_fn``, as ``nnx.MultiHeadAttention`` does.
        method: as in `ApproxAttention`, except modules, because each layer needs a separate one.
        policy: a method for each key head of each layer, for example from `evaluation.plan_model`, instead of
            ``method``; layers that it does not name are unchanged. Layers of a stack must have one policy.
        only: ``(path, layer) -> bool``, chooses layers; all by default.
        rngs: streams for random methods, forked for each layer: one key, or one for each layer of a stack.
        **options: arguments of `ApproxAttention` and of the method.

    Returns:
        The list of paths of the layers, such as ``"layers.0.attention"``. Its attribute `Replaced.not_replaced` lists
        modules that look like attention and could not be replaced.

    Raises:
        ValueError: no layer of the model has an ``attention_fn``, or ``only`` chooses none; layers are stacked along
            axes that are not leading; ``rngs`` has neither one key nor one for each layer of a stack; or the policy
            names layers that the model does not have, has another number of key heads, or differs within a stack.
        TypeError: the method is a module, ``only`` is not callable, or not exactly one of method and policy is given.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from approx_attention.nnx import replace_attention
        >>> model = nnx.MultiHeadAttention(num_heads=4, in_features=32, decode=False, rngs=nnx.Rngs(0))
        >>> exact = model(jnp.ones((2, 100, 32)))
        >>> replace_attention(model, "mean_pool", num_landmarks=100)
        ['']
        >>> bool(jnp.allclose(model(jnp.ones((2, 100, 32))), exact, atol=1e-5))
        True
    """
    if isinstance(method, nnx.Module):
        raise TypeError("each layer needs a separate module: set the attention_fn of the layers one by one")
    if (method is None) == (policy is None):
        raise TypeError("replace_attention needs either a method or a policy, got both or neither")
    if not isinstance(policy, Policy | None):
        raise TypeError(f"policy must be a Policy (Policy.load reads it from a file), got {shown(policy)}")
    if only is not None and not callable(only):
        raise TypeError(f"only must be a function (path, layer) -> bool, got {shown(only)}")
    layers = attention_layers(model)
    chosen = {path: layer for path, layer in layers.items() if only is None or only(path, layer)}
    if not layers:
        alike = ", ".join(map(repr, not_replaceable(model)))
        raise ValueError(
            f"no layer to replace; none of the {type(model).__name__} has an attention_fn"
            f"{alike and f', and {alike} looks like attention'}. If the model calls jax.nn.dot_product_attention, "
            "call approx_attention.attention(..., method=...) instead; in a Linen model, set "
            "attention_fn=approx_attention.linen.ApproxAttention(...) of its layers"
        )
    if not chosen:
        raise ValueError(f"no layer to replace; those with an attention_fn are {', '.join(layers)}")
    given = dict.fromkeys(chosen, (method, options)) if policy is None else _of_policy(policy, layers, chosen, options)
    made = {
        path: _for_each_layer(functools.partial(ApproxAttention, own, **more), stack_axes(layers[path], path), rngs)
        for path, (own, more) in given.items()
    }
    for path, attention_fn in made.items():
        layers[path].attention_fn = nnx.data(attention_fn)
    return Replaced(made, not_replaceable(model))


def _of_policy(
    policy: Policy, layers: Mapping[str, Any], chosen: Iterable[str], options: Mapping[str, Any]
) -> dict[str, tuple[Any, Mapping[str, Any]]]:
    """The method and the options of each chosen layer that the policy names."""
    unknown = [layer for layer in policy.layers if layer not in layers and stack_of(layer) not in layers]
    if unknown:
        raise ValueError(f"the policy is for {', '.join(unknown)}, but the model's layers are {', '.join(layers)}")
    found = {path: own for path in chosen if (own := policy.of_layer(path)) is not None}
    if not found:
        raise ValueError(f"no layer to replace; the policy is for {', '.join(policy.layers)}")
    for path, own in found.items():
        own.methods.require(getattr(layers[path], "num_kv_heads", len(own.heads)))
        named, stack = sum(stack_of(layer) == path for layer in policy.layers), stack_axes(layers[path], path)
        if path not in policy.layers and stack is not None and named != math.prod(stack):
            raise ValueError(f"the policy is for {named} of the {math.prod(stack)} layers stacked at {path!r}")
    scales = {path: {} if own.scale is None else {"scale": own.scale} for path, own in found.items()}
    return {path: (own.methods, {**scales[path], **options}) for path, own in found.items()}


def init_cache(
    model: nnx.Module,
    batch_size: int,
    *,
    max_length: int | None = None,
    ragged: bool = False,
    dtype: Any = jnp.float32,
    certify: float | None = None,
    cache_bits: int | None = None,
    block_size: int | None = None,
    keep_queries: int = 0,
) -> int:
    """Start decoding: give every `ApproxAttention` of a model a cache. Calls then append any number of tokens.

    The argument ``decode`` of the layers stays False: it is for Flax's cache of all keys, with one token per call.
    Layers stacked by ``nnx.vmap`` get stacked caches. They are recognised as in `replace_attention`; for others call
    this function inside ``nnx.vmap``. Existing caches are replaced, unless this function raises.

    Args:
        model: a model whose layers have ``attention_fn``, ``num_kv_heads`` and ``head_dim``, like
            ``nnx.MultiHeadAttention``.
        batch_size: the number of sequences.
        max_length: the largest number of tokens of a sequence, for methods whose cache grows.
        ragged: whether sequences may differ in length.
        dtype: dtype of the cache.
        certify: the largest error of a step of a layer, as in `HeadsDecoder`; needs ``max_length``.
        cache_bits: 8 or 4 bits per channel of older tokens, for ``"exact"``.
        block_size: tokens per block, for ``"exact"``.
        keep_queries: number of recent queries that each layer keeps, for policies of `compress_caches` that need them;
            the layers must have ``num_heads``.

    Returns:
        The total number of bytes of all caches.

    Raises:
        ValueError: a layer has another ``attention_fn`` or ``decode=True``, or no layer has one.
        NotImplementedError: a method has no running summary, or does not support ``cache_bits``.
        TypeError: the dtype is neither float32 nor float64.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from approx_attention.nnx import init_cache, replace_attention
        >>> model = nnx.MultiHeadAttention(num_heads=2, in_features=8, decode=False, rngs=nnx.Rngs(0))
        >>> paths = replace_attention(model, "mean_pool", num_landmarks=4, block_size=4, is_causal=True)
        >>> num_bytes = init_cache(model, 1)
        >>> prompt, token = jnp.ones((1, 10, 8)), jnp.ones((1, 1, 8))
        >>> model(prompt).shape, model(token).shape
        ((1, 10, 8), (1, 1, 8))
    """
    layers = approximate_layers(model)
    options = {"max_length": max_length, "ragged": ragged, "dtype": dtype}
    options |= {"certify": certify, "cache_bits": cache_bits, "block_size": block_size, "keep_queries": keep_queries}
    with restored_on_error(layers.values()):
        for path, layer in layers.items():
            if getattr(layer, "decode", None):
                raise ValueError(
                    f"layer {path!r} has decode=True, which is for Flax's own cache of all keys; set decode=False"
                )
            _start_caches(layer, stack_axes(layer, path) or (), batch_size, options)
    return sum(layer.attention_fn.cache_bytes for layer in layers.values())


def approximate_layers(model: nnx.Module) -> dict[str, Any]:
    """The attention layers of a model by path, if all of them have an `ApproxAttention`.

    Args:
        model: the model.

    Returns:
        The layers by path, such as ``"layers.0.attention"``.

    Raises:
        ValueError: no layer has an ``attention_fn``, or some have another one.
    """
    layers = attention_layers(model)
    if not layers:
        raise ValueError(
            f"no layer of the {type(model).__name__} has an attention_fn; a model that calls attention itself decodes "
            "with approx_attention.HeadsDecoder"
        )
    other = [path for path, layer in layers.items() if not isinstance(layer.attention_fn, ApproxAttention)]
    if other:
        raise ValueError(
            f"every attention layer must have an ApproxAttention; those without are {other}: call replace_attention "
            "first"
        )
    return layers


@contextlib.contextmanager
def restored_on_error(layers: Iterable[Any]) -> Iterator[None]:
    """Context that restores the caches of layers if an error is raised."""
    before = [(layer.attention_fn, layer.attention_fn._held()) for layer in layers]
    try:
        yield
    except Exception:
        for attention_fn, held in before:
            attention_fn._hold(*held)
        raise


def attention_layers(model: nnx.Module) -> dict[str, Any]:
    """The modules with an ``attention_fn``, by path in the model."""
    return {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_graph(model)
        # The attributes of a Linen module inside cannot be set.
        if isinstance(module, nnx.Module) and not isinstance(module, nnx.bridge.ToNNX)
        if callable(getattr(module, "attention_fn", None))
    }


def stack_axes(layer: nnx.Module, path: str) -> tuple[int, ...] | None:
    """The axes that ``nnx.vmap`` has added in front of the parameters of a layer.

    A layer does not store that it is a stack. But its linear maps store the sizes of a single layer: further leading
    axes of a kernel are those of the stack. The random stream of a single layer has a key without axes. Inside
    ``nnx.vmap`` a layer is single.

    Args:
        layer: the layer.
        path: its path in the model, for the error message.

    Returns:
        ``(L,)`` for a stack of L layers, ``()`` for a single layer; None if this cannot be determined.

    Raises:
        ValueError: the layers are stacked along other than leading axes.
    """
    nodes = [node for _, node in sorted(nnx.iter_graph(layer), key=lambda found: len(found[0]))]  # outer ones first
    for module in nodes:
        own = _kernel_shape(module)
        if own is None:
            continue
        shape = tuple(module.kernel.shape)
        stack = shape[: len(shape) - len(own)]
        if stack and shape != (*stack, *own):
            raise ValueError(f"layers must be stacked along leading axes, but a kernel of {path!r} has shape {shape}")
        return stack
    return next((node.key.shape for node in nodes if isinstance(node, nnx.RngStream) and node.key.shape), None)


def _kernel_shape(module: Any) -> tuple[int, ...] | None:
    """The kernel shape of a single linear map; None for other modules."""
    if isinstance(module, nnx.Einsum | nnx.Conv | nnx.ConvTranspose):
        return tuple(module.kernel_shape)
    if not isinstance(module, nnx.Linear | nnx.LinearGeneral):
        return None
    batch = module.batch_axis.values() if isinstance(module, nnx.LinearGeneral) else ()
    return *batch, *_as_tuple(module.in_features), *_as_tuple(module.out_features)


def _as_tuple(features: Any) -> tuple[int, ...]:
    return tuple(features) if isinstance(features, tuple | list) else (features,)


def over_stack(function: Callable[..., Any], stack: tuple[int, ...]) -> Callable[..., Any]:
    """Map a function of one layer's state over a stack of layers.

    Args:
        function: a function of Flax modules and arrays.
        stack: the axes of the stack, as from ``stack_axes``.

    Returns:
        The function of the same arguments with these leading axes; ``function`` for a single layer.
    """
    for size in reversed(stack):
        function = nnx.vmap(function, in_axes=0, out_axes=0, axis_size=size)
    return function


def _start_caches(layer: Any, stack: tuple[int, ...], batch_size: int, options: dict[str, Any]) -> None:
    """Start the caches of all layers of a stack."""

    def start(attention_fn: ApproxAttention) -> None:
        # A layer without num_heads can decode, but keeps no queries.
        num_heads = getattr(layer, "num_heads", None)
        attention_fn.init_cache(batch_size, layer.num_kv_heads, layer.head_dim, num_heads=num_heads, **options)

    over_stack(start, stack)(layer.attention_fn)


def _for_each_layer(
    make: Callable[..., ApproxAttention], stack: tuple[int, ...] | None, rngs: nnx.Rngs | None
) -> ApproxAttention:
    """Make the attention of all layers of a stack, with a different random projection for each.

    If a stack is not recognised, the number of keys decides.
    """
    if not isinstance(rngs, nnx.Rngs | nnx.RngStream):
        made = make(rngs=rngs)
        if not stack or not jax.tree.leaves(nnx.state(made)):
            return made
        # Given arrays need an axis of the stack too.
        return over_stack(lambda _: make(rngs=rngs), stack)(jnp.zeros(stack))
    if not jax.tree.leaves(nnx.state(make(rngs=nnx.Rngs(0)))):  # it has no random arrays
        return make()
    stream = attention_stream(rngs)
    split = stream.key.shape
    stack = split if stack is None else stack
    if split not in ((), stack):
        layers = f", or one for each of {stack} stacked layers" if stack else " for layers that are not stacked"
        raise ValueError(f"rngs must have one key{layers}; got keys of shape {split}")
    if not stack:
        return make(rngs=rngs)
    keys = over_stack(type(stream).__call__, stack)(stream) if split else jax.random.split(stream(), stack)
    return over_stack(lambda key: make(rngs=nnx.RngStream(key, tag=stream.tag)), stack)(keys)
