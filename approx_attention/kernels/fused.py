r"""Attention of one head as one primitive: fused kernels on accelerators, tiles of JAX operations elsewhere.

It has three parts, each with a form for every platform: the state, its derivative along tangents, and the transpose of
this derivative, the gradient. Reverse mode never computes the derivative along tangents.
"""

import functools
import importlib
import math
import operator
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.interpreters import ad

from approx_attention.kernels import cpu, xla
from approx_attention.kernels.platforms import ByPlatform, mapped_form
from approx_attention.kernels.reach import Reach
from approx_attention.kernels.rows import along_with
from approx_attention.kernels.states import AttentionState
from approx_attention.kernels.tiles import HIDDEN, Rows, accumulation_dtype, seen_cotangents, sees_a_key

Implementation = Literal["xla", "pallas", "interpret", "interpret_gpu"]
_KERNELS = {"tpu": "mosaic", "cuda": "triton"}

# The name by which a policy of `jax.checkpoint` keeps the results of the primitive, which its gradient needs.
OUTPUT = "attention state"


def state(
    q: Array,
    k: Array,
    v: Array,
    key_bias: Array | None = None,
    *,
    offset: int = 0,
    left: int | None = None,
    right: int | None = None,
    scale: float | Array = 1.0,
    logits_soft_cap: float | None = None,
    implementation: Implementation | None = None,
    tiles: Any = None,
) -> AttentionState:
    r"""Compute softmax attention of one head over the keys within reach of each query.

    .. math:: \mathrm{out}_t = \sum_j e^{x_{tj} - \mathrm{lse}_t} v_j, \qquad x_{tj} = s\, q_t \cdot k_j + b_j, \qquad
              t + o - l \le j \le t + o + r.

    No ``T x S`` array is stored, also not for gradients. Under `jax.vmap` heads become blocks of one kernel, and heads
    that share keys read them once. All derivatives exist, in forward and reverse mode; only first derivatives in
    reverse mode are fused.

    Args:
        q: queries ``[T, D]``.
        k: keys ``[S, D]``.
        v: values ``[S, Dv]``.
        key_bias: added to the logits of a key, ``[S]``; a bias of ``HIDDEN`` or less hides a key, even if it is NaN.
        offset: the position o of the first query.
        left: number l of earlier keys that a query sees; None for all earlier keys.
        right: number r of later keys that a query sees; None for all later keys, 0 for causal attention.
        scale: a positive factor s of the logits. In half precision it multiplies the accumulated logits, not the
            tensors.
        logits_soft_cap: replaces the logits by :math:`c \tanh(s\, q_t \cdot k_j / c)`, before the bias; c is known when
            tracing. Fused kernels do not support it: tiles are used on all platforms.
        implementation: by default the platform that a program is lowered for decides: a fused kernel for TPUs and
            NVIDIA GPUs; tiles on other platforms, in float64, and if XLA partitions the program automatically over
            devices. ``"xla"`` uses tiles on all platforms, ``"pallas"`` the fused kernel or raises. For tests,
            ``"interpret"`` and ``"interpret_gpu"`` interpret the kernels for TPUs and for GPUs on any machine; on a CPU
            in float32, because XLA may not support bfloat16 products there.
        tiles: block sizes of a fused kernel, by default `default_tiles`; ignored on other platforms.

    Returns:
        The `AttentionState` in float32, or float64 if a tensor is. Rows that see no key have ``out = 0``,
        ``lse = -inf``.

    Raises:
        ValueError: an unknown implementation, shapes that do not match, a scale or cap that is not positive.
        TypeError: tensors that are not floating point, bounds that are not integers, a cap that is not a float.
        NotImplementedError: when lowering: ``"pallas"`` without a fused kernel, or with ``logits_soft_cap``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import kernels
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (6, 4)) for i in range(3))
        >>> near = kernels.state(q, k, v, left=1, right=0)
        >>> bool(jnp.allclose(near.out[2], jax.nn.softmax(q[2] @ k[1:3].T) @ v[1:3], atol=1e-6))
        True

    Reference:
        :cite:p:`dao2022flashattention`, algorithm 1 and appendix B; :cite:p:`milakov2018online`.
    """
    if implementation is not None and implementation not in get_args(Implementation):
        allowed = ", ".join(map(repr, get_args(Implementation)))
        raise ValueError(f"implementation must be None or one of {allowed}, got {implementation!r}")
    _check(q, k, v, key_bias, scale, logits_soft_cap)
    bounds = (None if x is None else _integer(name, x) for name, x in (("left", left), ("right", right)))
    reach = Reach(_integer("offset", offset), *bounds)
    tensors, dtype = [q, k, v], accumulation_dtype(q, k, v)
    if len({x.dtype for x in tensors}) > 1:
        tensors = [x.astype(dtype) for x in tensors]
    if 0 in (q.shape[0], k.shape[0]):
        return AttentionState.empty(q.shape[0], v.shape[1], dtype)
    scale = jnp.asarray(scale, dtype)
    if dtype == jnp.float64:
        implementation = "xla"
    bias = ()
    if key_bias is not None:
        # A bias alone would not hide a key with an equally large logit, and a weight of 0 times NaN is NaN.
        hidden = key_bias <= HIDDEN / 2
        tensors[1:] = (jnp.where(hidden[:, None], 0, x) for x in tensors[1:])
        bias = (jnp.maximum(key_bias, HIDDEN).astype(dtype),)
    # In shard_map the gradient of a tensor shared by all devices is a sum over devices, which the rules below do not
    # support: all operands are made to vary over the same axes.
    operands = *tensors, scale, *bias
    if len({getattr(jax.typeof(x), "mat", None) for x in operands}) > 1:
        operands = along_with(operands, *operands)
    # A bound may be larger than the sequence: it could overflow int32, or prevent a faster form.
    reach = reach.within(q.shape[0], k.shape[0])
    options: Any = {"logits_soft_cap": logits_soft_cap, "implementation": implementation, "tiles": tiles}
    return _state(*operands, reach=reach, **options)


def _check(q: Any, k: Any, v: Any, key_bias: Any, scale: Any, logits_soft_cap: Any) -> None:
    tensors = {"q": q, "k": k, "v": v} | ({} if key_bias is None else {"key_bias": key_bias})
    for name, x in tensors.items():
        dtype = getattr(x, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"{name} must be a floating-point array, got {dtype or type(x).__name__}")
    fits = [x.ndim for x in tensors.values()] == [2, 2, 2, 1][: len(tensors)] and q.shape[1] == k.shape[1]
    if not fits or any(x.shape[0] != k.shape[0] for name, x in tensors.items() if name != "q"):
        given = ", ".join(f"{name} {x.shape}" for name, x in tensors.items())
        raise ValueError(f"state needs q [T, D], k [S, D], v [S, Dv] and key_bias [S], got {given}")
    if isinstance(scale, int | float) and not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    if logits_soft_cap is not None:
        if not isinstance(logits_soft_cap, int | float):
            raise TypeError(f"logits_soft_cap must be a known float, got {type(logits_soft_cap).__name__}")
        if not 0 < logits_soft_cap < math.inf:
            raise ValueError(f"logits_soft_cap must be positive and finite, got {logits_soft_cap}")


def _integer(name: str, bound: Any) -> int:
    try:
        return operator.index(bound)
    except TypeError:
        raise TypeError(f"{name} must be an integer known when tracing, got {bound!r}") from None


def default_tiles(platform: Literal["tpu", "cuda"], head_dim: int, value_dim: int, dtype: Any) -> Any:
    """Return the default block sizes of a platform's kernels as named tuples; change them by ``_replace``.

    They were chosen from compiled programs, not from times; see the comments in the modules of the kernels.

    Args:
        platform: ``"tpu"`` or ``"cuda"``.
        head_dim: the number D of channels of queries and keys.
        value_dim: the number Dv of channels of values.
        dtype: dtype of the tensors.

    Raises:
        ValueError: an unknown platform.

    Example:
        >>> from approx_attention import kernels
        >>> tiles = kernels.default_tiles("tpu", 64, 64, "bfloat16")
        >>> tiles._replace(forward=tiles.forward._replace(rows=512)).forward
        Tile(rows=512, columns=1024, strip=512)
    """
    if platform not in _KERNELS:
        raise ValueError(f"platform must be one of {', '.join(map(repr, _KERNELS))}, got {platform!r}")
    return _module(platform).default_tiles(head_dim, value_dim, dtype)


def export_checks() -> list[Any]:
    """Return the argument ``disabled_checks`` for `jax.export.export` of a program for ``"cuda"``.

    JAX guarantees that exported programs with TPU kernels run in later versions, but not those with Triton kernels:
    export and run these with one version, or use ``implementation="xla"``.

    Example:
        >>> import jax, jax.export, jax.numpy as jnp
        >>> from approx_attention import attention, kernels
        >>> function = jax.jit(lambda x: attention(x, x, x, method="exact"))
        >>> checks = kernels.export_checks()
        >>> export = jax.export.export(function, platforms=["cpu", "cuda", "tpu"], disabled_checks=checks)
        >>> export(jax.ShapeDtypeStruct((1, 16, 2, 8), jnp.float32)).platforms
        ('cpu', 'cuda', 'tpu')
    """
    # Imported here, because few programs are exported and the import takes time.
    import jax.export

    return [jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]


# Compiled even if the caller does not compile; otherwise every call would compile its loops.
@functools.partial(jax.jit, static_argnames=("reach", "logits_soft_cap", "implementation", "tiles"))
def _state(
    q: Array,
    k: Array,
    v: Array,
    scale: Array,
    *bias: Array,
    reach: Reach,
    logits_soft_cap: float | None,
    implementation: Implementation | None,
    tiles: Any,
) -> AttentionState:
    # Declared dynamically when JAX is imported.
    precision = getattr(jax.config, "jax_default_matmul_precision")  # noqa: B009
    options = {"reach": reach, "implementation": implementation, "tiles": tiles, "precision": precision}
    options["logits_soft_cap"] = logits_soft_cap
    # Adding the logarithm of the sum to a large maximum rounds it; the parts stay separate for the gradient.
    return Rows(*_forward(q, k, v, scale, *bias, **options)).state()


def _module(platform: str) -> Any:
    return importlib.import_module(f"approx_attention.kernels.{_KERNELS[platform]}")


def _kernel(platform: str, name: str, *, interpret: bool = False) -> Callable[..., Any]:
    """The function of a fused kernel, or of tiles for heads that are too wide for it and for capped logits.

    The module of the kernel is imported when a program with it is lowered.
    """

    def fused(*operands: Array, tiles: Any, **options: Any) -> Any:
        module = _module(platform)
        q, v = operands[0], operands[2]
        is_capped = options["logits_soft_cap"] is not None
        if is_capped or not module.fits(q, v):
            if options["implementation"] == "pallas":
                wide = f"heads as wide as D = {q.shape[1]}, Dv = {v.shape[1]} in {q.dtype}"
                lacking = "logits_soft_cap" if is_capped else wide
                raise NotImplementedError(f"implementation='pallas' does not support {lacking}; use None or 'xla'")
            return getattr(xla, name)(*operands, **options)
        chosen = {"tiles": tiles} if isinstance(tiles, module.Tiles) else {}
        kernel = functools.partial(getattr(module, name), interpret=interpret, **chosen)
        return _FORMS[name](kernel, *operands, **options)

    return fused


def _fused_forward(
    kernel: Any, q: Array, k: Array, v: Array, scale: Array, *bias: Array, reach: Reach, **_: Any
) -> Any:
    return kernel(q, k, v, _bias(k, *bias), scale, reach=reach)


def _fused_backward(
    kernel: Any,
    q: Array,
    k: Array,
    v: Array,
    scale: Array,
    out: Array,
    peak: Array,
    log_total: Array,
    d_out: Array,
    d_lse: Array,
    *bias: Array,
    reach: Reach,
    **_: Any,
) -> Any:
    peak, log_total, d_out, delta = seen_cotangents(out, peak, log_total, d_out, d_lse)
    rows = peak, log_total, delta, d_out.astype(v.dtype)
    gradients = kernel(q, k, v, _bias(k, *bias), scale, *rows, reach=reach)
    return gradients if bias else gradients[:-1]


_FORMS = {"forward": _fused_forward, "backward": _fused_backward}


def _bias(k: Array, bias: Array | None = None) -> Array:
    return jnp.zeros_like(k[:, 0], jnp.float32) if bias is None else bias


def _fused(name: str) -> dict[str, Callable[..., Any]]:
    interpreted = {"interpret": "tpu", "interpret_gpu": "cuda"}
    forms = {platform: _kernel(platform, name) for platform in _KERNELS}
    return forms | {asked: _kernel(platform, name, interpret=True) for asked, platform in interpreted.items()}


def _tangents(
    q: Array,
    k: Array,
    v: Array,
    scale: Array,
    out: Array,
    peak: Array,
    log_total: Array,
    *others: Array,
    reach: Reach,
    logits_soft_cap: float | None,
    **_: Any,
) -> tuple[Array, Array]:
    """Tangents of outputs and of logarithms of sums, along those of q, k, v, the scale and the bias."""
    del out, peak, log_total
    bias, tangents = (others[:1], others[1:]) if len(others) == 6 else ((), others)
    dtype = scale.dtype
    primals = *(x.astype(dtype) for x in (q, k, v)), scale, *bias
    tangents = tuple(x.astype(dtype) for x in tangents)
    form = functools.partial(xla.forward, reach=reach, logits_soft_cap=logits_soft_cap)
    rows, d_rows = jax.jvp(form, primals, tangents)
    return d_rows.out, jnp.where(sees_a_key(rows.peak), d_rows.log_total, 0)


def _shapes_of_state(q: Any, k: Any, v: Any, *others: Any, **_: Any) -> list[Any]:
    dtype, num_queries = accumulation_dtype(q, k, v), q.shape[0]
    return [((num_queries, v.shape[1]), dtype), ((num_queries,), dtype), ((num_queries,), dtype)]


def _shapes_of_tangents(*operands: Any, **options: Any) -> list[Any]:
    out, _, log_total = _shapes_of_state(*operands, **options)
    return [out, log_total]


def _shapes_of_gradients(q: Any, k: Any, v: Any, *others: Any, **_: Any) -> list[Any]:
    has_bias = len(others) == 7
    shapes = [q.shape, k.shape, v.shape] + [k.shape[:1]] * has_bias
    return [(shape, accumulation_dtype(q, k, v)) for shape in shapes]


_forward = ByPlatform(
    "attention_state",
    _shapes_of_state,
    cpu=cpu.forward,
    default=xla.forward,
    fused=_fused("forward"),
)
_along_tangents = ByPlatform("attention_tangents", _shapes_of_tangents, cpu=_tangents, default=_tangents, fused={})
_backward = ByPlatform(
    "attention_gradient", _shapes_of_gradients, cpu=cpu.backward, default=xla.backward, fused=_fused("backward")
)


def _forward_jvp(primals: Any, tangents: Any, mapped: Any, options: Any) -> Any:
    outputs = [checkpoint_name(x, OUTPUT) for x in _forward.bind(*primals, mapped=mapped, options=options)]
    q, k, v, scale, *bias = primals
    # Outputs are mapped if any operand is, and a tangent if its operand is.
    levels = tuple((*level[:4], True, True, True, *level[4:], *level) for level in mapped)
    operands = q, k, v, scale, *outputs, *bias, *tangents
    d_out, d_log_total = _along_tangents.bind(*operands, mapped=levels, options=options)
    return outputs, [d_out, jnp.zeros_like(outputs[1]), d_log_total]


def _transposed(cotangents: Any, operands: Any, mapped: Any, options: Any) -> Any:
    """The gradient: the transpose of the derivative along tangents."""
    d_out, d_log_total = cotangents
    # Six tensors of the state and its scale, perhaps a bias, and tangents of q, k, v, the scale and the bias.
    known, along = (operands[:7], operands[7:]) if len(operands) == 11 else (operands[:8], operands[8:])
    q, k, v, scale, out, peak, log_total, *bias = known
    levels = tuple((*level[:7], True, True, *level[7 : len(known)]) for level in mapped)
    gradients = _backward.bind(
        q, k, v, scale, out, peak, log_total, d_out, d_log_total, *bias, mapped=levels, options=options
    )
    d_q, d_k, d_v, *d_bias = gradients
    d_scale = mapped_form(
        lambda d_q, q, scale: jnp.sum(d_q * q.astype(d_q.dtype)) / scale,
        (),
        tuple((True, level[0], level[3]) for level in mapped),
    )(d_q, q, scale)
    linear = [level[len(known) :] for level in mapped]
    results = []
    for i, gradient in enumerate((d_q, d_k, d_v, d_scale, *d_bias)):
        # The gradients of heads that share an operand are summed before rounding.
        shared = [axis for axis, level in enumerate(linear) if not level[i]]
        total = jnp.sum(gradient, axis=shared) if shared else gradient
        results.append(total.astype(along[i].aval.dtype) if ad.is_undefined_primal(along[i]) else None)
    return [None] * len(known) + results


def _jvp_of(function: ByPlatform, form: Callable[..., Any]) -> None:
    """Define second derivatives by those of the tiles."""

    def rule(primals: Any, tangents: Any, mapped: Any, options: Any) -> Any:
        outputs, derivatives = jax.jvp(mapped_form(form, options, mapped), tuple(primals), tuple(tangents))
        return list(outputs), list(derivatives)

    function.define_jvp(rule)


_forward.define_jvp(_forward_jvp)
_along_tangents.define_transpose(_transposed)
_jvp_of(_along_tangents, _tangents)
_jvp_of(_backward, xla.backward)
