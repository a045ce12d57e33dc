"""Exact softmax attention: the reference for every approximation."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, ParamSpec, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from approx_attention.core import (
    HIDDEN,
    AttentionState,
    OutputOrState,
    QuantizedKV,
    RunningSummary,
    SoftmaxNear,
    WeightedKV,
    along_with,
    check_bias_and_mask,
    check_choice,
    check_count,
    check_head,
    checked_soft_cap,
    dense_state,
    first_blocks,
    head_inputs,
    logit_scale,
    out_of_blocks,
    output_or_state,
    quantize,
    streamed_state,
    zero_padding,
)

Implementation = Literal["dense", "blocked", "pallas", "cudnn"]
P = ParamSpec("P")
CUDNN_APPLIES = (
    "exact with implementation='cudnn' needs a GPU, half-precision tensors with one head dimension that is a multiple "
    "of 8 up to 128, and no bias, mask, logits_soft_cap, kv_mask or return_state; use 'blocked' or None"
)


def _output_or_state(function: Callable[P, AttentionState]) -> OutputOrState[P]:
    """`output_or_state`, with the outputs of cuDNN's fused kernel where it is requested.

    The kernel returns no log-normalisers, and so no state.
    """
    method = output_or_state(function)

    @functools.wraps(method)
    def fused_first(q: Array, k: Any, v: Any, key: Any = None, *, return_state: bool = False, **options: Any) -> Any:
        if options.get("implementation") == "cudnn" and not return_state:
            return _fused(q, k, v, **options)
        return method(q, k, v, key, return_state=return_state, **options)

    return fused_first  # pyright: ignore[reportReturnType]


def _fused(
    q: Array,
    k: Array,
    v: Array,
    *,
    implementation: Implementation,
    is_causal: bool = False,
    scale: float | Array | None = None,
    **others: Any,
) -> Array:
    """The output of the fused kernel for one head."""
    check_head(q, k, v, is_causal=is_causal)
    if any(x is not None for x in others.values()):
        raise ValueError(CUDNN_APPLIES)
    return _cudnn(q[:, None, :], k[:, None, :], v[:, None, :], logit_scale(scale, q.shape[-1]), is_causal)[:, 0]


@_output_or_state
def exact(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    is_causal: bool = False,
    bias: Float[Array, "T S"] | None = None,
    mask: Bool[Array, "T S"] | None = None,
    logits_soft_cap: float | None = None,
    kv_mask: Bool[Array, " S"] | None = None,
    scale: float | Array | None = None,
    implementation: Implementation | None = None,
) -> AttentionState:
    r"""Softmax attention of one head, in memory linear in the sequence.

    .. math:: \mathrm{out}_t = \frac{\sum_j e^{s\, q_t \cdot k_j + b_{tj}}\, v_j}{\sum_j e^{s\, q_t \cdot k_j + b_{tj}}}

    Shared arguments: see `approx_attention.methods`.

    Args:
        bias: added to the logits, ``[T, S]``.
        mask: true where query t may see key j, ``[T, S]``.
        implementation: by default a fused kernel in programs for TPUs and NVIDIA GPUs, ``"blocked"`` on other platforms
            (see `kernels.state`), and ``"dense"`` with a bias or mask. ``"blocked"`` streams tiles of logits in memory
            linear in T and S. ``"dense"`` computes all logits at once, and is the only form with a bias or mask.
            ``"pallas"`` is the fused kernel, or an error where there is none; it does not support capped logits.
            ``"cudnn"`` is NVIDIA's kernel, for programs traced on a machine with cuDNN. It is never the default,
            because the platform of a program is known only when it is lowered.

    Raises:
        ValueError: shapes that do not match, an unknown implementation, cuDNN where it does not apply.
        TypeError: dtypes that are not floating point (or boolean, for masks).
        NotImplementedError: an implementation that lacks a requested option.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import exact
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (6, 4)) for i in range(3))
        >>> bool(jnp.allclose(exact(q, k, v)[0], jax.nn.softmax(q[0] @ k.T / 2) @ v, atol=1e-6))
        True

    Reference:
        :cite:p:`vaswani2017attention`, equation 1; blocked form: :cite:p:`dao2022flashattention`, algorithm 1;
        capped logits: :cite:p:`gemma2024gemma2`, section 2.
    """
    plain = bias is None and mask is None
    if implementation is None and not plain:
        implementation = "dense"
    if implementation is not None:
        check_choice("implementation", implementation, get_args(Implementation))
    logits_soft_cap = checked_soft_cap(logits_soft_cap)
    if implementation == "pallas" and logits_soft_cap is not None:
        raise NotImplementedError("exact with implementation='pallas' does not support logits_soft_cap; use 'blocked'")
    if implementation in ("blocked", "pallas") and not plain:
        raise NotImplementedError(
            f"exact with implementation={implementation!r} supports neither bias nor mask; use 'dense'"
        )
    if implementation == "cudnn":
        check_head(q, k, v, kv_mask=kv_mask, is_causal=is_causal)
        raise ValueError(CUDNN_APPLIES)
    if implementation == "dense":
        q, k, v = head_inputs(q, k, v, scale=scale, kv_mask=kv_mask, is_causal=is_causal)
        return dense_state(q, k, v, _total_bias(q, k, bias, mask, kv_mask, is_causal), logits_soft_cap)
    check_head(q, k, v, kv_mask=kv_mask, is_causal=is_causal)
    scale = logit_scale(scale, q.shape[-1])
    form: Any = "xla" if implementation == "blocked" else implementation
    k, v = zero_padding(k, v, kv_mask)
    options: Any = {"is_causal": is_causal, "logits_soft_cap": logits_soft_cap, "implementation": form}
    return streamed_state(q, k, v, kv_mask, scale=scale, **options)


def summarize_exact(
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    kv_mask: Bool[Array, " S"] | None = None,
) -> WeightedKV:
    """Keep every token with mass 1: an exact summary of the same size.

    Shared arguments: see `approx_attention.methods`.

    Returns:
        A `WeightedKV` of S tokens; padding has mass 0.

    Raises:
        ValueError: different numbers of keys, values and mask entries.
        TypeError: keys or values that are not floating point, a mask that is not boolean.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention import summarize_exact
        >>> summarize_exact(jnp.zeros((3, 2)), jnp.ones((3, 1))).mass.tolist()
        [1.0, 1.0, 1.0]
    """
    return WeightedKV.of_tokens(k, v, kv_mask)


def running_exact(
    head_dim: int, key: Array | None = None, *, max_length: int, logits_soft_cap: float | None = None
) -> RunningSummary:
    """Keep every token of a prefix of at most ``max_length`` tokens.

    The outputs of a longer prefix are NaN, since a compiled program cannot raise an error.

    Shared arguments: see `approx_attention.methods`.

    Args:
        max_length: capacity in tokens.
        logits_soft_cap: as in `exact`.

    Returns:
        The `RunningSummary`, for a `Decoder`; it takes ``max_length`` tokens of memory.

    Raises:
        ValueError: counts below 1, a cap that is not positive and finite.
        TypeError: a capacity that is not an integer, a cap that is not a number known when tracing.

    Example:
        >>> import jax
        >>> from approx_attention import Decoder
        >>> from approx_attention.methods import running_exact
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (8, 4)) for i in range(3))
        >>> decoder = Decoder(running=running_exact(4, max_length=8), head_dim=4, value_dim=4, block_size=4)
        >>> out, cache = jax.jit(decoder.prefill)(decoder.init(), q, k, v)
        >>> out.shape, int(cache.length)
        ((8, 4), 8)
    """
    near = SoftmaxNear(logits_soft_cap=checked_soft_cap(logits_soft_cap))
    head_dim, max_length = check_count("head_dim", head_dim), check_count("max_length", max_length)

    def append(tokens: WeightedKV, start: Array, k: Array, v: Array, kv_mask: Array) -> WeightedKV:
        if k.shape[0] > max_length:  # more than the room for all blocks
            lost = jnp.any(kv_mask)
            value_sum, mass = (jnp.where(lost, x, y) for x, y in ((jnp.nan, tokens.value_sum), (1, tokens.mass)))
            return dataclasses.replace(tokens, value_sum=value_sum, mass=mass)
        # `dynamic_update_slice` would move a block past the end back over earlier tokens; the NaN makes that visible.
        v = jnp.where(start + k.shape[0] <= max_length, v, jnp.nan)
        block = WeightedKV.of_tokens(k, v, kv_mask)
        return jax.tree.map(lambda room, x: lax.dynamic_update_slice_in_dim(room, x, start, 0), tokens, block)

    def init(value_dim: int, dtype: Any) -> WeightedKV:
        return WeightedKV.empty(max_length, head_dim, value_dim, dtype)

    def of_sequence(k: Array, v: Array, kv_mask: Array) -> Callable[[Array], WeightedKV] | None:
        if kv_mask.size > max_length:
            return None
        return jax.tree_util.Partial(first_blocks, jax.vmap(WeightedKV.of_tokens)(k, v, kv_mask))

    def quantized(bits: int, block_size: int) -> RunningSummary:
        return _running_in_few_bits(head_dim, max_length, bits=bits, block_size=block_size)._replace(near=near)

    return RunningSummary(
        init, append, read=lambda tokens: tokens, near=near, of_sequence=of_sequence, quantized=quantized
    )


def _running_in_few_bits(head_dim: int, max_length: int, *, bits: int, block_size: int) -> RunningSummary:
    """Every token, quantised once, together with its block and around the centre of that block."""
    blocks = -(-max_length // block_size)

    def of_block(k: Array, v: Array, kv_mask: Array) -> QuantizedKV:
        return quantize(WeightedKV.of_tokens(k, v, kv_mask), bits=bits)

    def init(value_dim: int, dtype: Any) -> QuantizedKV:
        one = jax.eval_shape(lambda: quantize(WeightedKV.empty(block_size, head_dim, value_dim, dtype), bits=bits))
        return jax.tree.map(lambda x: jnp.zeros((blocks * x.shape[0], *x.shape[1:]), x.dtype), one)

    def append(tokens: QuantizedKV, start: Array, k: Array, v: Array, kv_mask: Array) -> QuantizedKV:
        number = start // block_size
        # As above: a step of NaN marks a block past the end.
        block = of_block(k, jnp.where(number < blocks, v, jnp.nan), kv_mask)
        return jax.tree.map(
            lambda room, x: lax.dynamic_update_slice_in_dim(room, x, number * x.shape[0], 0), tokens, block
        )

    def of_sequence(k: Array, v: Array, kv_mask: Array) -> Callable[[Array], QuantizedKV] | None:
        if k.shape[0] > blocks:
            return None
        return jax.tree_util.Partial(_first_quantized, jax.vmap(of_block)(k, v, kv_mask))

    return RunningSummary(init, append, read=lambda tokens: tokens, of_sequence=of_sequence)


def _first_quantized(blocks: QuantizedKV, count: Array) -> QuantizedKV:
    """The tokens of the first ``count`` of many blocks ``[n, G, ...]``; the others are absent."""
    seen = jnp.arange(blocks.mass.shape[0], dtype=jnp.int32) < count
    first = jax.tree.map(lambda x: jnp.where(seen.reshape(-1, *(1,) * (x.ndim - 1)), x, jnp.zeros_like(x)), blocks)
    return out_of_blocks(first)


def exact_together(
    query: Float[Array, "B T N D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K Dv"],
    *,
    is_causal: bool = False,
    scale: float | Array | None = None,
    logits_soft_cap: float | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N Dv"] | None:
    """All heads in one call of cuDNN's fused kernel, in which grouped heads share keys; None if it is not requested.

    The options are those of `exact`.

    Args:
        query: ``[B, T, N, D]``.
        key: ``[B, S, K, D]``, where K divides N.
        value: ``[B, S, K, Dv]``.

    Returns:
        Outputs ``[B, T, N, Dv]``, or None.

    Raises:
        ValueError: the kernel does not support the tensors, or there is no GPU.
    """
    if implementation != "cudnn":
        return None
    if logits_soft_cap is not None:
        raise ValueError(CUDNN_APPLIES)
    return _cudnn(query, key, value, logit_scale(scale, query.shape[-1]), is_causal)


def _cudnn(query: Array, key: Array, value: Array, scale: float | Array, is_causal: bool) -> Array:
    """cuDNN's attention over ``[..., T, N, D]``, with batching rules for any mapped operands and axes.

    JAX's batching rules for it require that all operands and the cotangent are mapped along axis 0, or none.
    """
    half = query.dtype == key.dtype == value.dtype and query.dtype in (jnp.bfloat16, jnp.float16)
    head_dim = query.shape[-1]
    if not half or head_dim != value.shape[-1] or head_dim % 8 or head_dim > 128:
        raise ValueError(CUDNN_APPLIES)
    if not isinstance(scale, float | int):
        # The kernel takes the scale as a compile-time constant.
        scaled = query.astype(jnp.float32) * jnp.asarray(scale, jnp.float32)
        query, scale = scaled.astype(query.dtype), 1.0
    # Map all operands or none, as the batching rules require.
    query, key, value = along_with((query, key, value), query, key, value)
    attend: Any = jax.nn.dot_product_attention
    try:
        out = attend(query, key, value, scale=scale, is_causal=is_causal, implementation="cudnn")
    except RuntimeError as error:  # no cuDNN, or one that is too old
        raise ValueError(CUDNN_APPLIES) from error
    return _cotangent_along_with(out, query)


@jax.custom_vjp
def _cotangent_along_with(x: Array, other: Array) -> Array:
    return x


_cotangent_along_with.defvjp(
    lambda x, other: (x, other),
    lambda other, cotangent: (along_with(cotangent, other), jnp.zeros_like(other)),
)


def _total_bias(
    q: Array, k: Array, bias: Array | None, mask: Array | None, kv_mask: Array | None, is_causal: bool
) -> Array | None:
    """The sum of all biases, ``[T, S]``, with hidden keys at `HIDDEN`."""
    shape = q.shape[0], k.shape[0]
    check_bias_and_mask(bias, mask, *shape)
    # A bias of -inf, which many masks use, would give NaN in a row of nothing else; `HIDDEN` is finite.
    total = None if bias is None else jnp.maximum(bias.astype(q.dtype), HIDDEN)
    visible = [] if mask is None else [mask]
    if is_causal:
        visible.append(jnp.tri(*shape, dtype=bool))
    if kv_mask is not None:
        visible.append(jnp.broadcast_to(kv_mask, shape))
    for seen in visible:
        total = jnp.where(seen, jnp.zeros(shape, q.dtype) if total is None else total, HIDDEN)
    return total
