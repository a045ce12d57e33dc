"""The main job: on the user's tensors, what does each approximation cost and lose?"""

import dataclasses
import functools
import importlib.metadata
import importlib.resources
import inspect
import json
import math
import os
import pathlib
import platform
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from rich import box
from rich.table import Table
from rich.text import Text

from approx_attention.api import attention
from approx_attention.core import InputError, check_flag, summary_bytes
from approx_attention.decoding import Decoder
from approx_attention.evaluation.diagnostics import Arm, Comparison, compare
from approx_attention.evaluation.figures import log_scales, method_styles
from approx_attention.evaluation.files import Tensors
from approx_attention.evaluation.real_tokens import key_mask, query_mask
from approx_attention.registry import METHODS, Method, accepted, get_method

# Exact forms that hold all T x S logits are left out of the baseline above this many bytes of logits.
LARGEST_LOGITS = 2**31
# Always in the comparison: what does not beat these is not worth its trouble.
BASELINES = ("mean_value", "local", "uniform_sample")
# A budget above this is a mistake: its features alone would fill the memory.
LARGEST_BUDGET = 2**20
# More seeds than this take longer than anyone waits.
MOST_SEEDS = 1000
# The budget at which every method has its usual size: of many this is the size, others count blocks or slots per block.
USUAL_BUDGET = 256
# Hyper-parameters by the name of the method.
Options = Mapping[str, Mapping[str, Any]]
# What all methods are given alike, by what gives it on the command line and in Python.
COMMON = {
    **{name: "FILE, or tensors in Python" for name in ("query", "key", "value")},
    "mask": "--mask or --lengths, or mask in Python",
    "key_value_seq_lengths": "--lengths, or lengths in Python",
    "query_seq_lengths": "--lengths, or lengths in Python",
    "is_causal": "--causal, or is_causal in Python",
    "scale": "--scale, or scale in Python",
    "rng": "--seed, or seed in Python",
    "method": "--methods, or methods in Python",
    "return_residual": "nothing: it is always asked for",
}


def default_methods(is_causal: bool) -> list[str]:
    """The methods that are compared where none is named: all that cost less than exact attention and fit the task."""
    return [
        name
        for name, method in METHODS.items()
        if method.capabilities.subquadratic and (method.capabilities.causal or not is_causal)
    ]


def build_arms(
    tensors: Tensors,
    methods: Iterable[str],
    budgets: Sequence[int],
    *,
    is_causal: bool,
    scale: float | None,
    options: Options | None = None,
    kv_mask: np.ndarray | None = None,
) -> list[Arm]:
    """The arms to compare: every exact form, the baselines, and each method at each size.

    At a budget of 256 every method has its usual size, at others a size in proportion. A size above the number of keys
    is cut to it for methods that are exact there.

    Args:
        tensors: what will be compared.
        methods: names in `METHODS`; the baselines are added.
        budgets: sizes of summaries, of methods whose usual size is 256.
        is_causal: whether query t sees keys j <= t only.
        scale: factor of the logits.
        options: hyper-parameters other than the size, by the name of the method.
        kv_mask: which keys ``[B, S]`` are real.

    Returns:
        The arms.

    Raises:
        InputError: an unknown method, one that cannot do what is asked, options that it does not take, or a budget
            out of range.
    """
    for budget in budgets:
        check_range("a budget", budget, 1, LARGEST_BUDGET)
    names = list(dict.fromkeys((*BASELINES, *methods)))
    options = check_options(names, options)
    arms = exact_arms(tensors, is_causal=is_causal, scale=scale, kv_mask=kv_mask)
    num_keys = tensors.key.shape[1]
    for name in names:
        method = check_method(name, is_causal)
        if name == "exact":
            continue
        # A method that is exact at the size of the sequence has no larger size.
        greatest = num_keys if method.capabilities.exact_limit else max(budgets)
        proposed = {max(1, round(budget * method.usual_size / USUAL_BUDGET)) for budget in budgets}
        sizes = sorted({min(size, greatest) for size in proposed}) if method.size else [None]
        own = options.get(name, {})
        arms += [
            method_arm(tensors, name, size, is_causal=is_causal, scale=scale, options=own, kv_mask=kv_mask)
            for size in sizes
        ]
    return arms


def check_range(name: str, value: int, least: int, most: int) -> None:
    """Raises ``InputError`` unless the value is an integer between these."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise InputError(f"{name} must be an integer, got {value!r}")
    if not least <= value <= most:
        limit = f"least {least}" if value < least else f"most {most}"
        raise InputError(f"{name} must be at {limit}, got {value}")


def without_padding(tensors: Tensors, kv_mask: np.ndarray | None) -> Tensors:
    """The tensors with zeros in place of the padding, which may hold anything in a file."""
    real = (None if kv_mask is None else query_mask(kv_mask, tensors.query.shape[1]), kv_mask, kv_mask)
    return Tensors(
        *(
            x if rows is None else jnp.where(rows[:, :, None, None], x, jnp.zeros_like(x))
            for x, rows in zip(tensors, real, strict=True)
        )
    )


def check_method(name: str, is_causal: bool) -> Method:
    """The method of that name.

    Raises:
        InputError: it is unknown, or has no causal form where one is asked for.
    """
    try:
        method = get_method(name)
    except ValueError as error:
        raise InputError(str(error)) from None
    if check_flag("is_causal", is_causal) and not method.capabilities.causal:
        raise InputError(f"method {name!r} has no causal form; leave it out or do without --causal")
    return method


def check_options(names: Iterable[str], options: Options | None) -> Options:
    """The options, none if there are none.

    Raises:
        InputError: options of a method that does not take part, the size, which is chosen for it, or what all methods
            are given alike.
    """
    options, names = options or {}, [name for name in names if name != "exact"]
    for name, own in options.items():
        if name not in names:
            raise InputError(f"options are for a method that takes part: {', '.join(names)}; got some for {name!r}")
        if get_method(name).size in own:
            raise InputError(f"{get_method(name).size} of {name} is its size, which is not an option here")
        for option in COMMON.keys() & own:
            raise InputError(f"{option} is no option of {name}, for all methods have the same: give {COMMON[option]}")
    return options


def method_arm(
    tensors: Tensors,
    name: str,
    size: int | None,
    *,
    is_causal: bool,
    scale: float | None,
    options: Mapping[str, Any] | None = None,
    kv_mask: np.ndarray | None = None,
) -> Arm:
    """One method at one size; ``InputError`` for options that it does not take."""
    method = get_method(name)
    hyperparameters: dict[str, Any] = dict(options or {}) | (
        {} if method.size is None or size is None else {method.size: size}
    )
    with_state = method.capabilities.normalizer

    def function(query: Array, key: Array, value: Array, rng: Array) -> tuple[Array, Array | None]:
        result = attention(
            query,
            key,
            value,
            mask=_padding_mask(kv_mask),
            method=name,
            rng=rng if method.capabilities.needs_key else None,
            scale=scale,
            is_causal=is_causal,
            return_residual=with_state,
            **hyperparameters,
        )
        return result if with_state else (result, None)

    if options:
        try:
            jax.eval_shape(function, *tensors, jax.random.key(0))
        except (TypeError, ValueError, NotImplementedError, OverflowError) as error:
            given = ", ".join(f"{key}={value!r}" for key, value in options.items())
            raise InputError(f"{name} does not take {given}: {error}") from error
    return Arm(
        method=name,
        function=function,
        size=size,
        held_bytes=held_bytes(tensors, name, hyperparameters, is_causal=is_causal),
        is_random=method.capabilities.needs_key,
    )


def _padding_mask(kv_mask: np.ndarray | None) -> Array | None:
    return None if kv_mask is None else jnp.asarray(kv_mask[:, None, None, :])


def exact_arms(
    tensors: Tensors, *, is_causal: bool, scale: float | None, kv_mask: np.ndarray | None = None
) -> list[Arm]:
    """Every form of exact attention that this machine has memory for, the library's default first."""
    query, key, value = tensors
    mask = _padding_mask(kv_mask)
    num_bytes = token_bytes(tensors)
    logits = 4 * query.shape[0] * query.shape[1] * query.shape[2] * key.shape[1]

    def ours(implementation: str | None) -> Callable[..., tuple[Array, Array | None]]:
        return lambda query, key, value, rng: attention(
            query,
            key,
            value,
            mask=mask,
            method="exact",
            scale=scale,
            is_causal=is_causal,
            return_residual=True,
            implementation=implementation,
        )

    forms = {"exact": ours(None)}
    if logits <= LARGEST_LOGITS:
        forms["exact dense"] = ours("dense")
        if jax.default_backend() == "gpu":
            forms["exact bfloat16"] = lambda query, key, value, rng: (
                attention(
                    *(x.astype(jnp.bfloat16) for x in (query, key, value)),
                    mask=mask,
                    method="exact",
                    scale=scale,
                    is_causal=is_causal,
                ),
                None,
            )
        if value.shape[-1] == key.shape[-1]:
            forms["exact jax.nn"] = lambda query, key, value, rng: (
                jax.nn.dot_product_attention(query, key, value, mask=mask, scale=scale, is_causal=is_causal),
                None,
            )
    return [Arm(name, function, None, num_bytes, is_exact=True) for name, function in forms.items()]


def token_bytes(tensors: Tensors) -> int:
    """Bytes per key head and sequence of all keys and values in float32."""
    _, key, value = tensors
    return key.shape[1] * (key.shape[-1] + value.shape[-1]) * 4


def held_bytes(tensors: Tensors, name: str, hyperparameters: Mapping[str, Any], *, is_causal: bool) -> int | None:
    """Bytes per key head and sequence of what a method holds in place of all keys and values, where it holds less.

    Args:
        tensors: arrays or their shapes.
        name: the method.
        hyperparameters: its arguments.
        is_causal: count the whole decoding cache where the method has one, and not just one summary of all keys.

    Returns:
        The bytes, or None where nothing can be held in the place of all keys: a method that asks every key, or makes
        what it answers from together with the queries.
    """
    method = get_method(name)
    key, value = (jax.ShapeDtypeStruct((x.shape[1], x.shape[-1]), x.dtype) for x in tensors[1:])
    rng = jax.eval_shape(lambda: jax.random.key(0))
    arguments = inspect.signature(method.function).parameters
    if is_causal and method.running is not None and method.block in arguments:
        make_running = method.running
        block_size = hyperparameters.get(method.block, arguments[method.block].default)
        own = accepted(make_running, {"max_length": key.shape[0], **hyperparameters})

        def cache(rng: Array) -> Any:
            running = make_running(key.shape[-1], rng, **own)
            decoder = Decoder(running=running, head_dim=key.shape[-1], value_dim=value.shape[-1], block_size=block_size)
            past, current, _ = decoder.init()
            return past.before[:2], current[:2], running.read(past.prefix)

        return summary_bytes(jax.eval_shape(cache, rng))
    if method.summarize is not None:
        summarize = functools.partial(method.summarize, **accepted(method.summarize, hyperparameters))
        return summary_bytes(jax.eval_shape(summarize, key, value, rng))
    if method.size != "window_size" or method.size not in hyperparameters:
        return None
    size = hyperparameters[method.size]
    window = size if is_causal else 2 * size - 1
    num_global = arguments["num_global"].default if "num_global" in arguments else 0
    tokens = min(window + hyperparameters.get("num_global", num_global), key.shape[0])
    return tokens * (key.shape[-1] + value.shape[-1]) * 4


def run_comparison(
    tensors: Tensors,
    methods: Iterable[str],
    budgets: Sequence[int],
    *,
    is_causal: bool = False,
    scale: float | None = None,
    options: Options | None = None,
    window_size: int = 128,
    num_seeds: int = 3,
    seed: int = 0,
    lengths: Any = None,
    mask: Any = None,
    on_progress: Callable[[str, int, int], None] = lambda label, done, total: None,
    on_row: Callable[[Comparison], None] = lambda row: None,
) -> list[Comparison]:
    """Compares methods at several sizes with exact attention: `build_arms`, then `diagnostics.compare`.

    Where ``lengths [B]`` or a ``mask [B, S]`` say that some tokens are padding, no method sees these, and errors are
    those of real queries alone.
    """
    check_range("num_seeds", num_seeds, 1, MOST_SEEDS)
    kv_mask = key_mask(tensors.key.shape, lengths=lengths, mask=mask)
    tensors = without_padding(tensors, kv_mask)
    arms = build_arms(tensors, methods, budgets, is_causal=is_causal, scale=scale, options=options, kv_mask=kv_mask)
    size = min(window_size, tensors.key.shape[1])
    window = method_arm(tensors, "local", size, is_causal=is_causal, scale=scale, kv_mask=kv_mask)
    return compare(
        arms,
        *tensors,
        exact=arms[0],
        window=window,
        num_seeds=num_seeds,
        seed=seed,
        mask=kv_mask,
        on_progress=on_progress,
        on_row=on_row,
    )


def best_rows(rows: Sequence[Any]) -> set[int]:
    """Indices of the approximations on the frontier: no other is both faster and closer to exact attention."""
    approximations = [i for i, row in enumerate(rows) if not row.is_exact and math.isfinite(row.relative_error)]

    def beaten(i: int) -> bool:
        return any(
            rows[j].seconds <= rows[i].seconds
            and rows[j].relative_error <= rows[i].relative_error
            and (rows[j].seconds, rows[j].relative_error) != (rows[i].seconds, rows[i].relative_error)
            for j in approximations
        )

    return {i for i in approximations if not beaten(i)}


def no_better_than_mean(rows: Sequence[Any]) -> set[int]:
    """Indices of the approximations whose relative error is not below that of ``mean_value``, the trivial answer."""
    least = min((row.relative_error for row in rows if row.method == "mean_value"), default=math.inf)
    return {
        i
        for i, row in enumerate(rows)
        if not (row.is_exact or row.method == "mean_value" or row.relative_error < least or math.isnan(least))
    }


# What marks rows in the tables.
FRONTIER, TRIVIAL = " *", " !"
PADDED_FOOTNOTE = "padding takes part in times, and not in errors"
TRIVIAL_FOOTNOTE = "! error no smaller than that of `mean_value`"


def comparison_table(rows: Sequence[Comparison], title: str, window_size: int, *, is_padded: bool = False) -> Table:
    """The comparison as a table for the terminal; rows on the frontier of error against time are marked."""
    table = plain_table(
        title,
        "error: relative Frobenius norm, mean ± deviation over seeds · worst row: over the mean row norm · "
        "normaliser: rms error of its log · "
        f"far: relative error of the part of the sums beyond a window of {window_size} (1 = none of it recovered) · "
        "cache: bytes per key head and sequence · than exact: the fastest form of it · "
        f"* on the frontier of error against time · {TRIVIAL_FOOTNOTE}{is_padded * f' · {PADDED_FOOTNOTE}'}",
        *("method", "size", "cache", "than all keys", "time", "than exact", "compile", "error", "worst row"),
        *("normaliser", "far"),
    )
    frontier, trivial = best_rows(rows), no_better_than_mean(rows)
    for i, row in enumerate(rows):
        table.add_row(
            Text(f"{row.method}{FRONTIER if i in frontier else ''}{TRIVIAL if i in trivial else ''}"),
            "" if row.size is None else str(row.size),
            "" if row.held_bytes is None else in_units(row.held_bytes),
            "" if row.compression is None else times(row.compression, "smaller", "larger"),
            f"{row.seconds * 1e3:.3g} ms",
            times(row.speedup, "faster", "slower"),
            f"{row.compile_seconds:.1f} s",
            _with_deviation(row.relative_error, row.relative_error_std, row.num_seeds),
            f"{row.worst_row_error:.3g}",
            "" if row.normalizer_error is None else f"{row.normalizer_error:.3g}",
            _with_deviation(row.far_error, row.far_error_std, row.num_seeds),
            style="bold" if i in frontier else "dim" if row.is_exact else "",
        )
    return table


def plain_table(title: str, caption: str, *columns: str) -> Table:
    """An empty table, whose title is text and no markup: names of files are in it."""
    table = Table(
        title=Text(title, style="table.title"),
        caption=caption,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
    )
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def times(ratio: float, more: str, less: str) -> str:
    """A ratio as text that says its direction, such as ``2.5x faster`` or ``340x slower``."""
    if not (ratio > 0 and math.isfinite(ratio)):
        return ""
    factor = max(ratio, 1 / ratio)
    number = f"{factor:.0f}" if factor >= 100 else f"{factor:.3g}"
    return "1x" if number == "1" else f"{number}x {more if ratio > 1 else less}"


def _with_deviation(mean: float | None, deviation: float | None, num_seeds: int) -> str:
    if mean is None:
        return ""
    return f"{mean:.3g}" if num_seeds == 1 else f"{mean:.3g} ± {deviation:.2g}"


def in_units(num_bytes: int) -> str:
    """Bytes as text, in KiB from 1024 on."""
    return f"{num_bytes} B" if num_bytes < 1024 else f"{num_bytes / 1024:.4g} KiB"


def draw_frontiers(rows: Sequence[Comparison], title: str) -> Any:
    """The figure: error against time and against cache bytes, one line per method through the sizes in the legend."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained", dpi=150)
    left, right = figure.subplots(1, 2, sharey=True)
    approximations = [row for row in rows if not row.is_exact]
    looks = method_styles(dict.fromkeys(row.method for row in approximations))
    for name, look in looks.items():
        chosen = [row for row in approximations if row.method == name]
        sizes = ", ".join(str(row.size) for row in chosen if row.size is not None)
        style = {**look, "label": f"{name} ({sizes})" if sizes else name}
        for axes, xs in (
            (left, [row.seconds * 1e3 for row in chosen]),
            (right, [None if row.held_bytes is None else row.held_bytes / 1024 for row in chosen]),
        ):
            points = [
                (x, row)
                for x, row in zip(xs, chosen, strict=True)
                if x is not None and 0 < row.relative_error < math.inf
            ]
            if not points:
                continue
            x, errors = [x for x, _ in points], [row.relative_error for _, row in points]
            axes.errorbar(x, errors, [row.relative_error_std for _, row in points], capsize=2, markersize=6, **style)
    exact = min((row for row in rows if row.is_exact), key=lambda row: row.seconds)
    left.axvline(exact.seconds * 1e3, color="0.4", linestyle="--", label=f"fastest exact ({exact.method})")
    if exact.held_bytes is not None:
        right.axvline(exact.held_bytes / 1024, color="0.4", linestyle="--")
    left.set(xlabel="time of a call (ms)", ylabel="relative error of the output")
    right.set(xlabel="cache per key head and sequence (KiB); dashed: all keys and values")
    for axes in (left, right):
        log_scales(axes)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5), frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11, parse_math=False)
    return figure


def environment() -> dict[str, Any]:
    """Versions and the device, on which the figures depend."""
    device = jax.devices()[0]
    return {
        "approx_attention": importlib.metadata.version("approx_attention"),
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "backend": jax.default_backend(),
        "device": device.device_kind,
        "processor": processor_name(),
        "processor_cores": os.cpu_count(),
    }


def processor_name() -> str:
    """The processor's model name where the system tells, else its architecture."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def report(rows: Sequence[Any], tensors: Tensors, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that was measured and what it depends on, ready for JSON.

    Args:
        rows: `Comparison` or other dataclasses.
        tensors: what was measured on.
        settings: how.

    Returns:
        The document; what is not finite is None in it.
    """
    return finite(
        {
            "settings": dict(settings),
            "shapes": {name: list(x.shape) for name, x in tensors._asdict().items()},
            "environment": environment(),
            "rows": [dataclasses.asdict(row) for row in rows],
        }
    )


def finite(document: Any) -> Any:
    """A document with None in place of numbers that are not finite, which JSON does not have."""
    if isinstance(document, Mapping):
        return {name: finite(x) for name, x in document.items()}
    if isinstance(document, list | tuple):
        return [finite(x) for x in document]
    return None if isinstance(document, float) and not math.isfinite(document) else document


def write_results(
    out: pathlib.Path, name: str, document: Mapping[str, Any], draw: Callable[[], Any]
) -> tuple[list[pathlib.Path], str]:
    """Writes NAME.json and, where it can be drawn, NAME.png; each is whole or absent, and both are of one run.

    Args:
        out: an existing directory.
        name: of the files.
        document: what goes into the JSON.
        draw: makes the figure.

    Returns:
        The files written, and why there is no figure, if there is none.
    """
    written = [out / f"{name}.json"]
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    write_atomically(written[0], lambda file: file.write(text.encode()))
    picture = out / f"{name}.png"
    # That of an earlier run.
    picture.unlink(missing_ok=True)
    try:
        figure = draw()
        write_atomically(picture, lambda file: figure.savefig(file, format="png"))
    except ImportError:
        return written, "it needs matplotlib, as in pip install 'approx_attention[plot]'"
    except Exception as error:  # the measurements are worth more than their picture
        return written, " ".join(f"{type(error).__name__}: {error}".split())
    return [*written, picture], ""


def write_atomically(path: pathlib.Path, write: Callable[[Any], Any]) -> None:
    """Writes a file beside its place and then moves it there, so that it is never half written."""
    descriptor, draft = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
        os.chmod(draft, 0o644)
        os.replace(draft, path)
    except BaseException:
        # An interrupt can come when it is moved already.
        pathlib.Path(draft).unlink(missing_ok=True)
        raise
