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
from approx_attention.checks import InputError, check_flag
from approx_attention.decode import Decoder
from approx_attention.diagnostics import Arm, Comparison, compare
from approx_attention.registry import METHODS, Method, accepted, get_method
from approx_attention.summaries import summary_bytes
from approx_attention.tensor_files import Tensors

# Exact forms that hold all T x S logits are left out of the baseline above this many bytes of logits.
LARGEST_LOGITS = 2**31
# Always in the comparison: what does not beat these is not worth its trouble.
BASELINES = ("mean_value", "local", "uniform_sample")
# The budget at which every method has its usual size: of many this is the size, others count blocks or slots per block.
USUAL_BUDGET = 256
# Hyper-parameters by the name of the method.
Options = Mapping[str, Mapping[str, Any]]


def default_methods(is_causal: bool) -> list[str]:
    """The methods that are compared where none is named: all that cost less than exact attention and fit the task."""
    return [
        name
        for name, method in METHODS.items()
        if method.capabilities.subquadratic and (method.capabilities.causal or not is_causal)
    ]


def method_styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """A colour and a marker for each method, the same in every figure; names that are no methods take what is left.

    What is left is taken again with hollow markers once it is used up.
    """
    names = list(names)
    known = [name for name in METHODS if name in names]
    free = [i for i in range(len(_STYLES)) if i >= len(METHODS) or list(METHODS)[i] not in known]
    looks = {}
    for number, name in enumerate([name for name in names if name not in known]):
        pool = free or range(len(_STYLES))
        looks[name] = (pool[number % len(pool)], number >= len(pool))
    places = {name: list(METHODS).index(name) for name in known}
    looks |= {name: (place % len(_STYLES), place // len(_STYLES) % 2 == 1) for name, place in places.items()}
    # The third time round a colour comes with the next marker.
    turned = {name: place // (2 * len(_STYLES)) for name, place in places.items()}
    return {
        name: {
            "color": _STYLES[index][0],
            "marker": _STYLES[(index + turned.get(name, 0)) % len(_STYLES)][1],
            "markerfacecolor": "white" if hollow else _STYLES[index][0],
        }
        for name, (index, hollow) in ((name, looks[name]) for name in names)
    }


# Colours that the colour-blind tell apart, each with a marker of its own.
_STYLES = tuple(
    zip(
        ("#000000", "#999999", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#0072B2", "#8C564B", "#D55E00", "#7F3FBF"),
        "oPDv^Xs*dp",
        strict=True,
    )
)


def build_arms(
    tensors: Tensors,
    methods: Iterable[str],
    budgets: Sequence[int],
    *,
    is_causal: bool,
    scale: float | None,
    options: Options | None = None,
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

    Returns:
        The arms.

    Raises:
        InputError: an unknown method, one that cannot do what is asked, or options that it does not take.
    """
    names = list(dict.fromkeys((*BASELINES, *methods)))
    options = check_options(names, options)
    arms = exact_arms(tensors, is_causal=is_causal, scale=scale)
    num_keys = tensors.key.shape[1]
    for name in names:
        method = check_method(name, is_causal)
        if name == "exact":
            continue
        # What is exact at the size of the sequence has no larger size.
        greatest = num_keys if method.capabilities.exact_limit else max(budgets)
        proposed = {max(1, round(budget * method.usual_size / USUAL_BUDGET)) for budget in budgets}
        sizes = sorted({min(size, greatest) for size in proposed}) if method.size else [None]
        own = options.get(name, {})
        arms += [method_arm(tensors, name, size, is_causal=is_causal, scale=scale, options=own) for size in sizes]
    return arms


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
        InputError: options of a method that does not take part, or the size, which is chosen for it.
    """
    options, names = options or {}, [name for name in names if name != "exact"]
    for name, own in options.items():
        if name not in names:
            raise InputError(f"options are for a method that takes part: {', '.join(names)}; got some for {name!r}")
        if get_method(name).size in own:
            raise InputError(f"{get_method(name).size} of {name} is its size, which is not an option here")
    return options


def method_arm(
    tensors: Tensors,
    name: str,
    size: int | None,
    *,
    is_causal: bool,
    scale: float | None,
    options: Mapping[str, Any] | None = None,
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
        except (TypeError, ValueError, NotImplementedError) as error:
            given = ", ".join(f"{key}={value!r}" for key, value in options.items())
            raise InputError(f"{name} does not take {given}: {error}") from error
    return Arm(
        method=name,
        function=function,
        size=size,
        held_bytes=held_bytes(tensors, name, hyperparameters, is_causal=is_causal),
        is_random=method.capabilities.needs_key,
    )


def exact_arms(tensors: Tensors, *, is_causal: bool, scale: float | None) -> list[Arm]:
    """Every form of exact attention that this machine has memory for, the library's default first."""
    query, key, value = tensors
    num_bytes = token_bytes(tensors)
    logits = 4 * query.shape[0] * query.shape[1] * query.shape[2] * key.shape[1]

    def ours(implementation: str | None) -> Callable[..., tuple[Array, Array | None]]:
        return lambda query, key, value, rng: attention(
            query,
            key,
            value,
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
                    method="exact",
                    scale=scale,
                    is_causal=is_causal,
                ),
                None,
            )
        if value.shape[-1] == key.shape[-1]:
            forms["exact jax.nn"] = lambda query, key, value, rng: (
                jax.nn.dot_product_attention(query, key, value, scale=scale, is_causal=is_causal),
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
    on_progress: Callable[[str, int, int], None] = lambda label, done, total: None,
) -> list[Comparison]:
    """Compares methods at several sizes with exact attention: `build_arms`, then `diagnostics.compare`."""
    arms = build_arms(tensors, methods, budgets, is_causal=is_causal, scale=scale, options=options)
    window = method_arm(tensors, "local", min(window_size, tensors.key.shape[1]), is_causal=is_causal, scale=scale)
    return compare(
        arms, *tensors, exact=arms[0], window=window, num_seeds=num_seeds, seed=seed, on_progress=on_progress
    )


def best_rows(rows: Sequence[Comparison]) -> set[int]:
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


def comparison_table(rows: Sequence[Comparison], title: str, window_size: int) -> Table:
    """The comparison as a table for the terminal; rows on the frontier of error against time are marked."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left")
    table.caption = (
        "error: relative Frobenius norm, mean ± deviation over seeds · worst row: over the mean row norm · "
        "normaliser: rms error of its log · "
        f"far: relative error of the part of the sums beyond a window of {window_size} (1 = none of it recovered) · "
        "held: bytes per key head and sequence · * on the frontier of error against time"
    )
    table.add_column("method")
    for column in ("size", "held", "smaller", "time", "faster", "compile", "error", "worst row", "normaliser", "far"):
        table.add_column(column, justify="right")
    frontier = best_rows(rows)
    for i, row in enumerate(rows):
        table.add_row(
            Text(f"{row.method}{' *' if i in frontier else ''}"),
            "" if row.size is None else str(row.size),
            "" if row.held_bytes is None else in_units(row.held_bytes),
            "" if row.compression is None else f"{row.compression:.3g}x",
            f"{row.seconds * 1e3:.3g} ms",
            f"{row.speedup:.2f}x",
            f"{row.compile_seconds:.1f} s",
            _with_deviation(row.relative_error, row.relative_error_std, row.num_seeds),
            f"{row.worst_row_error:.3g}",
            "" if row.normalizer_error is None else f"{row.normalizer_error:.3g}",
            _with_deviation(row.far_error, row.far_error_std, row.num_seeds),
            style="bold" if i in frontier else "dim" if row.is_exact else "",
        )
    return table


def _with_deviation(mean: float | None, deviation: float | None, num_seeds: int) -> str:
    if mean is None:
        return ""
    return f"{mean:.3g}" if num_seeds == 1 else f"{mean:.3g} ± {deviation:.2g}"


def in_units(num_bytes: int) -> str:
    """Bytes as text, in KiB from 1024 on."""
    return f"{num_bytes} B" if num_bytes < 1024 else f"{num_bytes / 1024:.4g} KiB"


def draw_frontiers(rows: Sequence[Comparison], title: str) -> Any:
    """The figure: error against time and against bytes held, one line per method through the sizes in the legend."""
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
            points = [(x, row) for x, row in zip(xs, chosen, strict=True) if x is not None and row.relative_error > 0]
            if not points:
                continue
            x, errors = [x for x, _ in points], [row.relative_error for _, row in points]
            axes.errorbar(x, errors, [row.relative_error_std for _, row in points], capsize=2, markersize=6, **style)
    exact = min((row for row in rows if row.is_exact), key=lambda row: row.seconds)
    left.axvline(exact.seconds * 1e3, color="0.4", linestyle="--", label=f"fastest exact ({exact.method})")
    if exact.held_bytes is not None:
        right.axvline(exact.held_bytes / 1024, color="0.4", linestyle="--")
    left.set(xlabel="time of a call (ms)", ylabel="relative error of the output")
    right.set(xlabel="held in place of all keys, by head and sequence (KiB); dashed: all")
    for axes in (left, right):
        log_scales(axes)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5), frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure


def light_grid(axes: Any) -> None:
    """Light lines behind everything else."""
    axes.grid(True, color="0.9")
    axes.set_axisbelow(True)


def log_scales(axes: Any) -> None:
    """Logarithmic axes with a grid and labels that are plain numbers."""
    from matplotlib import ticker

    axes.set(xscale="log", yscale="log")
    light_grid(axes)
    axes.margins(0.08, 0.1)
    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        decades = math.log10(high / low)
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(ticker.NullLocator())


def environment() -> dict[str, Any]:
    """What the figures depend on: versions and the device."""
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
    return {
        "settings": dict(settings),
        "shapes": {name: list(x.shape) for name, x in tensors._asdict().items()},
        "environment": environment(),
        "rows": [
            {
                name: None if isinstance(x, float) and not math.isfinite(x) else x
                for name, x in dataclasses.asdict(row).items()
            }
            for row in rows
        ],
    }


def write_results(
    out: pathlib.Path, name: str, document: Mapping[str, Any], draw: Callable[[], Any]
) -> list[pathlib.Path]:
    """Writes NAME.json and, where matplotlib is installed, NAME.png; each is whole or absent.

    Args:
        out: an existing directory.
        name: of the files.
        document: what goes into the JSON.
        draw: makes the figure.

    Returns:
        The files written.
    """
    written = [out / f"{name}.json"]
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    write_atomically(written[0], lambda file: file.write(text.encode()))
    try:
        figure = draw()
    except ImportError:
        return written
    written.append(out / f"{name}.png")
    write_atomically(written[1], lambda file: figure.savefig(file, format="png"))
    return written


def write_atomically(path: pathlib.Path, write: Callable[[Any], Any]) -> None:
    """Writes a file beside its place and then moves it there, so that it is never half written."""
    descriptor, draft = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
        os.chmod(draft, 0o644)
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise
