r"""Attention of one head as one operation: fused kernels on accelerators, tiles of JAX's own operations elsewhere.

It has three parts, each with a form for every platform: the state, its derivative along tangents, and the transpose of
that, the gradient. In reverse mode the derivative along tangents is never computed.
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

# The name by which a policy of `jax.checkpoint` keeps what the operation returns: its gradient needs it.
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
    r"""Softmax attention of one head over the keys within reach of each query.

    .. math:: \mathrm{out}_t = \sum_j e^{x_{tj} - \mathrm{lse}_t} v_j, \qquad x_{tj} = s\, q_t \cdot k_j + b_j, \qquad
              t + o - l \le j \le t + o + r.

    No array of ``T x S`` numbers is made, in either direction. Under `jax.vmap` heads become blocks of one kernel, and
    heads that share keys read them once. All derivatives exist, in forward and reverse mode; only first derivatives
    in reverse mode are fused.

    Args:
        q: queries ``[T, D]``.
        k: keys ``[S, D]``.
        v: values ``[S, Dv]``.
        key_bias: added to the logits of a key, ``[S]``; ``HIDDEN`` or less hides it, NaN included.
        offset: the position o of the first query.
        left: how far back a query sees; None for all earlier keys.
        right: how far ahead a query sees; None for all later keys, 0 for a causal order.
        scale: a positive factor s of the logits. In half precision it is applied to their sums, and rounds no tensor.
        logits_soft_cap: c of :math:`c \tanh(s\, q_t \cdot k_j / c)` in place of the products, before the bias; known
            when tracing. No fused kernel has it: tiles are used everywhere.
        implementation: by default the platform that a program is lowered for decides: a fused kernel for TPUs and
            NVIDIA GPUs, and tiles elsewhere, in float64, and where XLA partitions the program over devices by itself.
            ``"xla"`` is tiles everywhere, ``"pallas"`` the fused kernel or an error. For tests, ``"interpret"``
            and ``"interpret_gpu"`` run the code of the kernels for TPUs and for GPUs on any machine, slowly; on a CPU
            in float32, because XLA may have no product of bfloat16 there.
        tiles: sizes of the blocks of a fused kernel, by default `default_tiles`. A kernel for another platform passes
            over them.

    Returns:
        The `AttentionState` in float32, or float64 where a tensor is. Rows that see no key have ``out = 0``,
        ``lse = -inf``.

    Raises:
        ValueError: an unknown implementation, shapes that do not fit, a scale or a cap that is not positive.
        TypeError: tensors that are not floating point, bounds that are not integers, a cap that is not a float.
        NotImplementedError: when lowering, ``"pallas"`` where there is no fused kernel, and with ``logits_soft_cap``.

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
        # A bias alone would let a key through whose logit is as large, and a weight of 0 times NaN is NaN.
        hidden = key_bias <= HIDDEN / 2
        tensors[1:] = (jnp.where(hidden[:, None], 0, x) for x in tensors[1:])
        bias = (jnp.maximum(key_bias, HIDDEN).astype(dtype),)
    # In shard_map the gradient of a tensor that all devices share is a sum over devices, which the rules below do not
    # take: all are made to vary alike.
    operands = *tensors, scale, *bias
    if len({getattr(jax.typeof(x), "mat", None) for x in operands}) > 1:
        operands = along_with(operands, *operands)
    # A bound may be any number that stands for none: one that no int32 holds, or that hides a faster form.
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
        raise ValueError(f"state takes q [T, D], k [S, D], v [S, Dv] and key_bias [S], got {given}")
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
        raise TypeError(f"{name} must be an integer that is known when tracing, got {bound!r}") from None


def default_tiles(platform: Literal["tpu", "cuda"], head_dim: int, value_dim: int, dtype: Any) -> Any:
    """The sizes of the blocks of a platform's kernels: named tuples, of which others are made by ``_replace``.

    They were chosen from compiled programs, not from times; comments in the kernels' modules say how.

    Args:
        platform: ``"tpu"`` or ``"cuda"``.
        head_dim: the number D of channels of queries and keys.
        value_dim: the number Dv of channels of values.
        dtype: that of the tensors.

    Raises:
        ValueError: another platform.

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
    """What to pass as ``disabled_checks`` to `jax.export.export` of a program for ``"cuda"``.

    JAX promises that artefacts with a kernel for TPUs run in later versions, and not those with one of Triton: export
    and run them with one version, or with ``implementation="xla"``.

    Example:
        >>> import jax, jax.export, jax.numpy as jnp
        >>> from approx_attention import attention, kernels
        >>> function = jax.jit(lambda x: attention(x, x, x, method="exact"))
        >>> checks = kernels.export_checks()
        >>> export = jax.export.export(function, platforms=["cpu", "cuda", "tpu"], disabled_checks=checks)
        >>> export(jax.ShapeDtypeStruct((1, 16, 2, 8), jnp.float32)).platforms
        ('cpu', 'cuda', 'tpu')
    """
    # Few programs are exported, and the module takes time to import.
    import jax.export

    return [jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]


# Compiled also where the caller compiles nothing: else every call would compile its loops anew.
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
    # JAX declares this option when it is imported.
    precision = getattr(jax.config, "jax_default_matmul_precision")  # noqa: B009
    options = {"reach": reach, "implementation": implementation, "tiles": tiles, "precision": precision}
    options["logits_soft_cap"] = logits_soft_cap
    # Added to a large peak, the logarithm of the sum is rounded; the parts stay apart for the gradient.
    return Rows(*_forward(q, k, v, scale, *bias, **options)).state()


def _module(platform: str) -> Any:
    return importlib.import_module(f"approx_attention.kernels.{_KERNELS[platform]}")


def _kernel(platform: str, name: str, *, interpret: bool = False) -> Callable[..., Any]:
    """A fused kernel's function, or that of the tiles for heads that are too wide for it and for capped logits.

    Its module is imported when a program is lowered that holds it.
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
    # Outputs are mapped wherever an operand is, and a tangent where its operand is.
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
        # What several heads share gets the sum of their gradients, before it is rounded.
        shared = [axis for axis, level in enumerate(linear) if not level[i]]
        total = jnp.sum(gradient, axis=shared) if shared else gradient
        results.append(total.astype(along[i].aval.dtype) if ad.is_undefined_primal(along[i]) else None)
    return [None] * len(known) + results


def _jvp_of(function: ByPlatform, form: Callable[..., Any]) -> None:
    """Second derivatives: those of the tiles."""

    def rule(primals: Any, tangents: Any, mapped: Any, options: Any) -> Any:
        outputs, derivatives = jax.jvp(mapped_form(form, options, mapped), tuple(primals), tuple(tangents))
        return list(outputs), list(derivatives)

    function.define_jvp(rule)


_forward.define_jvp(_forward_jvp)
_along_tangents.define_transpose(_transposed)
_jvp_of(_along_tangents, _tangents)
_jvp_of(_backward, xla.backward)
