"""Errors against exact attention, measured on the caller's own tensors, beside the time they buy."""

import contextlib
import contextvars
import dataclasses
import functools
import hashlib
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, PRNGKeyArray

from approx_attention.core import (
    HIDDEN,
    InputError,
    Summary,
    WeightedKV,
    accumulation_dtype,
    attend,
    head_inputs,
    require_scaled_space,
    zero_padding,
)
from approx_attention.evaluation.real_tokens import key_mask, query_mask


class OutputError(NamedTuple):
    """How far outputs are from exact ones.

    Attributes:
        relative: Frobenius norm of the difference over that of the exact outputs.
        worst_row: the largest norm of a row of the difference, over the root mean square norm of the exact rows.
    """

    relative: Array
    worst_row: Array


def output_error(out: Float[Array, "*rows Dv"], exact_out: Float[Array, "*rows Dv"]) -> OutputError:
    r"""The error of outputs against exact ones.

    .. math:: \mathrm{relative} = \frac{\|O - \hat O\|_F}{\|O\|_F}, \qquad
              \mathrm{worst\_row} = \max_t \frac{\|O_t - \hat O_t\|_2}{\sqrt{\mathrm{mean}_t \|O_t\|_2^2}}

    Args:
        out: outputs ``[..., Dv]``; all leading axes count as rows.
        exact_out: exact outputs of the same shape.

    Returns:
        The `OutputError`; ``nan`` where the exact outputs are all zero.

    Raises:
        ValueError: different shapes.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention.evaluation import output_error
        >>> error = output_error(jnp.array([[1.0], [1.0]]), jnp.array([[1.0], [0.0]]))
        >>> float(error.relative), round(float(error.worst_row), 4)
        (1.0, 1.4142)
    """
    if out.shape != exact_out.shape:
        raise ValueError(f"outputs to compare must have one shape, got {out.shape} and {exact_out.shape}")
    exact_rows = exact_out.astype(jnp.float32)
    difference = jnp.sum((out.astype(jnp.float32) - exact_rows) ** 2, axis=-1)
    exact_norm = jnp.sum(exact_rows**2, axis=-1)
    relative = jnp.sqrt(jnp.sum(difference) / jnp.sum(exact_norm))
    return OutputError(relative, jnp.sqrt(jnp.max(difference) / jnp.mean(exact_norm)))


def skill(
    out: Float[Array, "*rows Dv"], exact_out: Float[Array, "*rows Dv"], trivial: Float[Array, "*rows Dv"]
) -> Array:
    r"""The error of outputs as a share of that of an answer that looks at nothing, such as the mean of the values.

    .. math:: \|\hat O - O\|_F \,/\, \|O - \bar O\|_F

    Where attention is nearly uniform every method has a small error; this is 1 for the one that knows nothing.

    Args:
        out: outputs ``[..., Dv]``.
        exact_out: exact outputs of the same shape.
        trivial: the answer to beat, which broadcasts to that shape: the mean of the values, or for tensor attention the
            product of the means.

    Returns:
        One number, 0 for exact outputs; ``nan`` or infinite where the trivial answer is exact.

    Raises:
        ValueError: outputs of different shapes, a trivial answer that does not broadcast to theirs.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention.evaluation import skill
        >>> float(skill(jnp.array([[1.0], [2.0]]), jnp.array([[1.0], [3.0]]), jnp.array([[2.0]])).round(3))
        0.707
    """
    if out.shape != exact_out.shape:
        raise ValueError(f"outputs to compare must have one shape, got {out.shape} and {exact_out.shape}")
    dtype = accumulation_dtype(out, exact_out, trivial)
    out, exact_out, trivial = (x.astype(dtype) for x in (out, exact_out, jnp.broadcast_to(trivial, out.shape)))
    return jnp.linalg.norm(out - exact_out) / jnp.linalg.norm(exact_out - trivial)


# Radii from which the search for the worst query starts, in equal ratios down to a sixteenth at least.
NUM_SPHERES = 5


class SupError(NamedTuple):
    """The largest error found over a ball of queries.

    Attributes:
        error: norm of the difference, over the largest norm of a value.
        query: the query ``[D]``, in scaled space, at which it was found.
    """

    error: Array
    query: Array


@functools.partial(jax.jit, static_argnames=("num_random", "num_keys", "num_starts", "num_steps"))
def sup_error(
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    summary: Summary,
    radius: float | Array,
    *,
    kv_mask: Bool[Array, " S"] | None = None,
    key: PRNGKeyArray | None = None,
    num_random: int = 1024,
    num_keys: int = 512,
    num_starts: int = 24,
    num_steps: int = 60,
) -> SupError:
    r"""Searches a ball of queries for the one on which a summary is furthest from exact attention.

    .. math:: \max_{\|q\| \le \rho}
              \frac{\|\mathrm{attend}(q, (K, V)) - \mathrm{attend}(q, \mathrm{summary})\|_2}{\max_j \|v_j\|_2}

    Random directions and those of keys and their opposites are tried on spheres, from that of radius :math:`\rho` down
    to where logits differ by no more than 1, because sharp weights hide what soft ones show; from the worst of each,
    projected gradient ascent climbs further. What is found is a lower bound of the supremum, and random queries alone
    understate it; more starts and steps show whether the search has converged.

    Args:
        k: keys ``[S, D]`` in scaled space (`fold_scale`).
        v: values ``[S, Dv]``.
        summary: what stands for them, in scaled space; of one that carries a scale pass ``summary.in_scaled_space()``.
        radius: the ball's radius :math:`\rho`, a norm of scaled queries.
        kv_mask: true where a key is real, ``[S]``.
        key: typed PRNG key of the search; ``jax.random.key(0)`` by default.
        num_random: random directions tried.
        num_keys: keys whose directions are tried.
        num_starts: worst directions of each sphere from which ascent starts.
        num_steps: steps of ascent.

    Returns:
        The `SupError`.

    Example:
        >>> import jax
        >>> from approx_attention import summarize_mean_pool
        >>> from approx_attention.evaluation import sup_error
        >>> k, v = (jax.random.normal(jax.random.key(i), (64, 4)) for i in range(2))
        >>> coarse, fine = (sup_error(k, v, summarize_mean_pool(k, v, num_landmarks=m), 1.0).error for m in (8, 64))
        >>> bool(fine < 1e-5 < coarse)
        True
    """
    summary = require_scaled_space("sup_error", summary)
    key_random, key_chosen = jax.random.split(jax.random.key(0) if key is None else key)
    k, v = zero_padding(k, v, kv_mask)
    tokens = WeightedKV.of_tokens(k, v, kv_mask)
    largest_value = jnp.sqrt(jnp.max(jnp.sum(v * v, axis=-1)))

    def errors(q: Array) -> Array:
        difference = attend(q, tokens).out - attend(q, summary).out
        # The tiny constant keeps the gradient finite where the error is exactly 0.
        return jnp.sqrt(jnp.sum(difference * difference, axis=-1) + 1e-30)

    def onto_ball(q: Array) -> Array:
        norm = jnp.linalg.norm(q, axis=-1, keepdims=True)
        return q * jnp.minimum(1, radius / jnp.maximum(norm, jnp.finfo(q.dtype).tiny))

    directions = jax.random.normal(key_random, (num_random, k.shape[-1]), k.dtype)
    some = jax.random.permutation(key_chosen, k.shape[0])[:num_keys]
    directions = jnp.concatenate([directions, k[some], -k[some]])
    directions = directions / jnp.maximum(jnp.linalg.norm(directions, axis=-1, keepdims=True), 1e-12)
    gradient = jax.grad(lambda q: jnp.sum(errors(q)))

    def from_sphere(sphere: Array) -> SupError:
        queries = onto_ball(directions * sphere)
        start_errors, worst = lax.top_k(errors(queries), min(num_starts, queries.shape[0]))

        def climb(carry: tuple[Array, Array, Array], step: Array) -> tuple[tuple[Array, Array, Array], None]:
            q, best_error, best_query = carry
            slope = gradient(q)
            length = sphere * (0.15 * (1 + jnp.cos(jnp.pi * step / num_steps)) + 0.01)
            q = onto_ball(q + length * slope / jnp.maximum(jnp.linalg.norm(slope, axis=-1, keepdims=True), 1e-20))
            error = errors(q)
            better = error > best_error
            return (q, jnp.where(better, error, best_error), jnp.where(better[:, None], q, best_query)), None

        starts = queries[worst]
        (_, best_error, best_query), _ = lax.scan(
            climb, (starts, start_errors, starts), jnp.arange(num_steps, dtype=k.dtype)
        )
        found = jnp.argmax(best_error)
        return SupError(best_error[found], best_query[found])

    middle = jnp.sum(k, axis=0) / jnp.maximum(jnp.sum(tokens.mass), 1)
    away = jnp.sqrt(jnp.max(jnp.where(tokens.mass > 0, jnp.sum((k - middle[None, :]) ** 2, axis=-1), 0)))
    # Half the largest difference of logits is radius * away at most.
    smallest = jnp.minimum(1 / 16, 0.5 / jnp.maximum(radius * away, 1e-20))
    spheres = radius * smallest ** jnp.linspace(0, 1, NUM_SPHERES, dtype=k.dtype)
    found = lax.map(from_sphere, spheres)
    best = jnp.argmax(found.error)
    return SupError(found.error[best] / jnp.where(largest_value > 0, largest_value, 1), found.query[best])


class Timing(NamedTuple):
    """Seconds per call over several calls."""

    least: float
    median: float


def time_interleaved(
    calls: Mapping[str, Callable[[], Any]], *, rounds: int = 5, patience: float = 30.0
) -> dict[str, Timing]:
    """Times compiled calls in turn, so that a busy moment of the machine falls on all of them.

    Args:
        calls: functions without arguments, each already compiled; called once before the clock starts.
        rounds: how often each is timed.
        patience: seconds after which no further round is begun.

    Returns:
        The `Timing` of each call.
    """
    for call in calls.values():
        jax.block_until_ready(call())
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    begun = time.perf_counter()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
        if time.perf_counter() - begun > patience:
            break
    return {name: Timing(min(times), statistics.median(times)) for name, times in seconds.items()}


def break_even(seconds: Mapping[int, float], baseline: Mapping[int, float], *, margin: float = 0.0) -> int | None:
    """The shortest measured length from which on a method is faster than a baseline at every measured length.

    Args:
        seconds: time of the method by sequence length.
        baseline: time of the baseline, at those lengths at least.
        margin: the share by which it must be faster, for times that are known to so much.

    Returns:
        The length, or None where the method is no faster at the longest.

    Example:
        >>> from approx_attention.evaluation import break_even
        >>> break_even({512: 2.0, 1024: 2.0, 2048: 4.0}, {512: 1.0, 1024: 3.0, 2048: 9.0})
        1024
    """
    from_here = None
    for length in sorted(seconds, reverse=True):
        if seconds[length] * (1 + margin) >= baseline[length]:
            break
        from_here = length
    return from_here


@dataclasses.dataclass(frozen=True)
class Arm:
    """One setting of one method, to be compared with exact attention.

    Attributes:
        method: its name.
        function: ``(query, key, value, rng) -> (out, lse)`` over ``[B, T, N, D]``, with ``lse [B, T, N]`` or ``None``.
        size: the size of its summary, if it has one.
        held_bytes: bytes held per key head and sequence, if known.
        is_random: whether it depends on ``rng``.
        is_exact: whether it is a form of exact attention; the fastest of these is the baseline of speed.
    """

    method: str
    function: Callable[..., tuple[Array, Array | None]]
    size: int | None = None
    held_bytes: int | None = None
    is_random: bool = False
    is_exact: bool = False

    @property
    def label(self) -> str:
        """The method with its size."""
        return self.method if self.size is None else f"{self.method} {self.size}"


_Programs = dict[bytes, tuple[Callable[..., Any], float]]
_shared_programs: contextvars.ContextVar[_Programs | None] = contextvars.ContextVar("shared_programs", default=None)
# Each maps memory, and Linux grants a process only so many maps.
_MOST_SHARED = 256


@contextlib.contextmanager
def shared_programs(programs: _Programs) -> Iterator[None]:
    """Within this, arms that are the same computation are compiled once, as in layers of one shape.

    Args:
        programs: those that are there. Arms that close over different arrays must not share them.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention.evaluation import Arm, compile_arm, shared_programs
        >>> x = jnp.ones((1, 4, 1, 2))
        >>> with shared_programs({}):
        ...     made = [compile_arm(Arm("mine", lambda q, k, v, rng: (v, None)), x, x, x)[0] for _ in range(2)]
        >>> made[0] is made[1]
        True
    """
    token = _shared_programs.set(programs)
    try:
        yield
    finally:
        _shared_programs.reset(token)


def compile_arm(arm: Arm, query: Array, key: Array, value: Array) -> tuple[Callable[..., Any], float]:
    """The program of an arm for these tensors, and the seconds that it took to compile.

    Raises:
        InputError: the arm does not take them.
    """
    start = time.perf_counter()
    shared = _shared_programs.get()
    try:
        lowered = jax.jit(arm.function).lower(query, key, value, jax.random.key(0))
        same = b"" if shared is None else hashlib.sha256(lowered.as_text().encode()).digest()
        if shared is not None and same in shared:
            return shared[same]
        program = lowered.compile()
    except (ValueError, NotImplementedError) as error:
        raise InputError(f"{arm.label} does not take these tensors: {error}") from error
    made = program, time.perf_counter() - start
    if shared is not None:
        if len(shared) == _MOST_SHARED:
            del shared[next(iter(shared))]
        shared[same] = made
    return made


@dataclasses.dataclass(frozen=True)
class Comparison:
    r"""What an arm costs and loses. Errors are means over seeds, with their standard deviation beside them.

    Attributes:
        method: name of the method.
        size: the size of its summary, if it has one.
        held_bytes: bytes held per key head and sequence, if known.
        compression: bytes of the keys and values over ``held_bytes``.
        compile_seconds: time to compile, apart from everything else.
        seconds: least time of a call.
        median_seconds: median time of a call.
        speedup: time of the fastest exact arm over ``seconds``.
        relative_error: `OutputError.relative`.
        relative_error_std: its standard deviation over seeds.
        worst_row_error: `OutputError.worst_row`.
        normalizer_error: root mean square error of the log-normaliser in nats, where there is one.
        far_error: relative error of the part of the sums that lies beyond a local window, where there is a
            normaliser. With numerators N, taken as shares of the exact normaliser, it is the norm of the difference of
            :math:`N - N_\mathrm{window}` from its exact value, over that value's norm: 1 for the window itself, 0 is
            exact; ``None`` if nothing lies beyond.
        far_error_std: its standard deviation over seeds.
        num_seeds: the number of seeds, 1 for a deterministic method.
        is_exact: whether this is a form of exact attention.
    """

    method: str
    size: int | None
    held_bytes: int | None
    compression: float | None
    compile_seconds: float
    seconds: float
    median_seconds: float
    speedup: float
    relative_error: float
    relative_error_std: float
    worst_row_error: float
    normalizer_error: float | None
    far_error: float | None
    far_error_std: float | None
    num_seeds: int
    is_exact: bool


def compare(
    arms: Iterable[Arm],
    query: Float[Array, "B T N D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K Dv"],
    *,
    exact: Arm,
    window: Arm,
    num_seeds: int = 3,
    seed: int = 0,
    rounds: int = 5,
    lengths: Any = None,
    mask: Any = None,
    on_progress: Callable[[str, int, int], None] = lambda label, done, total: None,
    on_row: Callable[[Comparison], None] = lambda row: None,
) -> list[Comparison]:
    """Measures what each arm costs and loses on the given tensors.

    Args:
        arms: the arms; those that are exact set the baseline of speed, so give every exact form there is.
        query: ``[B, T, N, D]``.
        key: ``[B, S, K, D]``.
        value: ``[B, S, K, Dv]``.
        exact: the arm whose outputs and log-normalisers are the truth.
        window: the local window that ``far_error`` refers to.
        num_seeds: draws over which the errors of random arms are averaged.
        seed: the first seed.
        rounds: how often each arm is timed, in turn with the others.
        lengths: real tokens of each sequence, integers ``[B]``: errors are those of real queries alone. The arms must
            hide the padded keys themselves. Where T differs from S all queries are real.
        mask: true where a key is real, ``[B, S]``, in place of ``lengths`` or with them.
        on_progress: called with what is done next, the number of steps done and their total.
        on_row: called with each arm as soon as its errors are known, for those who may be interrupted. Its times are
            then those of the calls that measured the errors.

    Returns:
        A `Comparison` per arm, in their order.

    Raises:
        ValueError: no arm is exact.
        InputError: an arm does not take these tensors, lengths or a mask that do not fit them.

    Example:
        >>> import functools, jax
        >>> from approx_attention import attention, diagnostics
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (1, 64, 2, 8)) for i in range(3))
        >>> def arm(method, **kwargs):
        ...     call = lambda q, k, v, rng: attention(q, k, v, method=method, return_residual=True, **kwargs)
        ...     return diagnostics.Arm(method, call, is_exact=method == "exact")
        >>> exact, window, pool = arm("exact"), arm("local", window_size=8), arm("mean_pool", num_landmarks=64)
        >>> rows = diagnostics.compare([exact, window, pool], q, k, v, exact=exact, window=window)
        >>> [row.method for row in rows], rows[1].far_error, rows[2].relative_error < 1e-5
        (['exact', 'local', 'mean_pool'], 1.0, True)
    """
    arms = list(arms)
    if not any(arm.is_exact for arm in arms):
        raise ValueError("compare needs an exact arm: speed is measured against it")
    keys_rngs = [jax.random.key(seed + i) for i in range(num_seeds)]
    real = query_mask(key_mask(key.shape, lengths=lengths, mask=mask), query.shape[1])

    def real_rows(result: tuple[Array, Array | None]) -> Any:
        return result if real is None else tuple(None if x is None else x[real] for x in result)

    @functools.cache
    def compiled(arm: Arm) -> tuple[Callable[..., Any], float]:
        return compile_arm(arm, query, key, value)

    steps = len(arms) + 2
    on_progress("exact answer", 0, steps)
    exact_out, exact_lse = real_rows(compiled(exact)[0](query, key, value, keys_rngs[0]))
    if exact_lse is None:
        raise ValueError("the exact arm must also return log-normalisers")
    window_out, window_lse = real_rows(compiled(window)[0](query, key, value, keys_rngs[0]))
    # The sums over keys beyond the window, as a share of the exact normaliser: what is left of the exact output.
    far_part = _flat(exact_out) - _flat(window_out, window_lse - exact_lse)
    far_norm = jnp.linalg.norm(far_part)
    window_misses = bool(far_norm > 1e-5 * jnp.linalg.norm(_flat(exact_out)))

    kv_bytes = key.shape[1] * (key.shape[-1] * key.dtype.itemsize + value.shape[-1] * value.dtype.itemsize)
    errors: list[list[tuple[float | None, ...]]] = []
    first_timings: list[Timing] = []

    def comparison(i: int, timings: list[Timing]) -> Comparison:
        arm, timing = arms[i], timings[i]
        relative, worst_row, normalizer, far = zip(*errors[i], strict=True)
        baseline = min((t.least for arm, t in zip(arms, timings, strict=False) if arm.is_exact), default=math.nan)
        return Comparison(
            method=arm.method,
            size=arm.size,
            held_bytes=arm.held_bytes,
            compression=kv_bytes / arm.held_bytes if arm.held_bytes else None,
            compile_seconds=compiled(arm)[1],
            seconds=timing.least,
            median_seconds=timing.median,
            speedup=baseline / timing.least,
            relative_error=statistics.fmean(relative),
            relative_error_std=float(np.std(relative)),
            worst_row_error=statistics.fmean(worst_row),
            normalizer_error=None if normalizer[0] is None else statistics.fmean(normalizer),
            far_error=None if far[0] is None else statistics.fmean(far),
            far_error_std=None if far[0] is None else float(np.std(far)),
            num_seeds=len(errors[i]),
            is_exact=arm.is_exact,
        )

    for i, arm in enumerate(arms):
        on_progress(arm.label, i + 1, steps)
        function, seconds = compiled(arm)[0], []
        errors.append([])
        for rng in keys_rngs if arm.is_random else keys_rngs[:1]:
            start = time.perf_counter()
            result = jax.block_until_ready(function(query, key, value, rng))
            seconds.append(time.perf_counter() - start)
            out, lse = real_rows(result)
            relative, worst_row = output_error(out, exact_out)
            normalizer, far = None, None
            if lse is not None:
                normalizer = jnp.sqrt(jnp.mean((lse - exact_lse) ** 2))
                if window_misses:
                    far = jnp.linalg.norm(_flat(out, lse - exact_lse) - _flat(exact_out)) / far_norm
            errors[-1].append(tuple(None if x is None else float(x) for x in (relative, worst_row, normalizer, far)))
        first_timings.append(Timing(min(seconds), statistics.median(seconds)))
        on_row(comparison(i, first_timings))

    on_progress("timing", steps - 1, steps)
    calls = {str(i): functools.partial(compiled(arm)[0], query, key, value, keys_rngs[0]) for i, arm in enumerate(arms)}
    timings = list(time_interleaved(calls, rounds=rounds).values())
    on_progress("done", steps, steps)
    return [comparison(i, timings) for i in range(len(arms))]


def _flat(out: Array, log_weight: Array | None = None) -> Array:
    """Outputs in one row, each times the exponential of its log-weight: numerators, where that is a log-normaliser."""
    out = out.astype(jnp.float32)
    return (out if log_weight is None else out * jnp.exp(log_weight)[..., None]).ravel()


class Spectrum(NamedTuple):
    """Shares of the singular values of attention weights, summed from the largest on, each ``[min(T, S)]``.

    Attributes:
        weights: of P.
        centred: of P less the uniform weights, without which diffuse attention looks like rank 1.
    """

    weights: Array
    centred: Array


def spectrum(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    *,
    kv_mask: Bool[Array, " S"] | None = None,
    scale: float | Array | None = None,
) -> Spectrum:
    r"""How fast the singular values of softmax attention fall, which is how well any matrix of low rank can do.

    .. math:: c_r = \sum_{i \le r} \sigma_i \Big/ \sum_i \sigma_i

    Args:
        q: queries ``[T, D]``.
        k: keys ``[S, D]``.
        kv_mask: true where a key is real, ``[S]``.
        scale: factor of the logits, ``1/sqrt(D)`` by default.

    Returns:
        The `Spectrum` of one head; `jax.vmap` adds heads and layers.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention.evaluation import spectrum
        >>> q = k = 9.0 * jnp.eye(4)
        >>> [round(float(x), 2) for x in spectrum(q, k).weights]
        [0.25, 0.5, 0.75, 1.0]

    Reference:
        :cite:p:`wang2020linformer`, figure 1, there without centring.
    """
    q, k, _ = head_inputs(q, k, k, scale=scale, kv_mask=kv_mask)
    real = jnp.ones(k.shape[0], bool) if kv_mask is None else kv_mask
    weights = jnp.where(real[None, :], jax.nn.softmax(jnp.where(real[None, :], q @ k.T, HIDDEN), axis=-1), 0)
    uniform = real.astype(weights.dtype) / jnp.maximum(jnp.sum(real), 1).astype(weights.dtype)

    def shares(x: Array) -> Array:
        cumulative = jnp.cumsum(jnp.linalg.svd(x, compute_uv=False))
        return cumulative / jnp.where(cumulative[-1] > 0, cumulative[-1], 1)

    return Spectrum(shares(weights), shares(weights - uniform[None, :]))
