"""Plans of whole models and checks of policies as documents, tables and heat maps."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from approx_attention.evaluation.figures import figure_style, method_styles
from approx_attention.evaluation.model_plans import ModelPlan
from approx_attention.evaluation.policies import HeadChoice, Policy
from approx_attention.evaluation.policy_checks import PolicyCheck
from approx_attention.evaluation.results import environment
from approx_attention.evaluation.tables import markdown_table, plain_table
from approx_attention.evaluation.units import in_units

# Maps with more heads than this show no numbers.
_MOST_NUMBERS = 16
_FRAME = "#CC0066"
Errors = Mapping[str, np.ndarray]


def plan_verdict(made: ModelPlan) -> str:
    """A summary of the plan in words."""
    policy, (total, worst) = made.policy, _total_and_worst(made.errors)
    text = "All heads are" if made.is_met else "Within the budget not all heads are"
    text += f" predicted to meet {policy.tolerance:g}. Cache of a sequence: {in_units(policy.cache_bytes)}. "
    text += f"On held-out {made.split_by}: error {total:.3g} (root mean square over heads), at most {worst:.3g}"
    above = _above(made.errors, policy.tolerance)
    text += f", {len(above)} heads above the tolerance."
    if made.uniform is not None:
        total, worst = _total_and_worst(made.uniform_errors)
        text += f" The best single method at this cost is {made.uniform}: {total:.3g}, at most {worst:.3g}."
    if made.seconds is not None:
        limit = "" if policy.max_seconds is None else f"; {1e3 * policy.max_seconds:.3g} ms are allowed"
        text += f" A call of all layers takes {1e3 * made.seconds:.3g} ms on this machine, as measured now{limit}."
    return text


def check_verdict(check: PolicyCheck) -> str:
    """A summary of the check in words."""
    (total, worst), (promised, _) = _total_and_worst(check.errors), _total_and_worst(check.promised)
    failures, num_heads = check.failures, sum(map(len, check.errors.values()))
    text = f"Error {total:.3g} (root mean square over heads), at most {worst:.3g}; {promised:.3g} on the planned text. "
    if not failures:
        return text + f"All {num_heads} heads meet {check.policy.tolerance:g}."
    where = ", ".join(f"{layer} head {head}" if layer else f"head {head}" for layer, head in failures[:8])
    more = f" and {len(failures) - 8} more" if len(failures) > 8 else ""
    return text + f"{len(failures)} of {num_heads} heads are above {check.policy.tolerance:g}: {where}{more}."


def policy_table(policy: Policy, errors: Errors, title: str) -> Table:
    """A table with a row for each layer: its methods, its cache, and the errors of its heads."""
    table = plain_table(
        title,
        "errors: relative error of the outputs of a key head; above: heads whose error is above the tolerance",
        *("layer", "heads", "methods", "cache", "rms", "worst", "above"),
    )
    for path, own in policy.layers.items():
        count = {name: sum(head.method == name for head in own.heads) for name in (head.method for head in own.heads)}
        total, worst = _total_and_worst({path: errors[path]})
        table.add_row(
            Text(path),
            str(len(own.heads)),
            ", ".join(f"{name} {number}" if number > 1 else name for name, number in count.items()),
            in_units(sum(head.cache_bytes for head in own.heads)),
            f"{total:.3g}",
            f"{worst:.3g}",
            str(len(_above({path: errors[path]}, policy.tolerance)) or ""),
        )
    return table


def policy_markdown(policy: Policy, columns: Mapping[str, Errors]) -> str:
    """A Markdown table with a row for each key head of each layer, and a column for each kind of error.

    If time is limited, a column shows the share of each head in the time of its layer, with the method for all heads.
    """
    timed = any(head.seconds is not None for own in policy.layers.values() for head in own.heads)
    rows = []
    for path, own in policy.layers.items():
        for number, head in enumerate(own.heads):
            errors = [float(of[path][number]) for of in columns.values()]
            mark = "" if errors[-1] <= policy.tolerance else "above"
            time = [] if not timed else ["" if head.seconds is None else f"{1e3 * head.seconds:.3g} ms"]
            costs = [in_units(head.cache_bytes), *time]
            rows.append([f"`{path}`", str(number), head.label, *costs, *(f"{x:.3g}" for x in errors), mark])
    header = ["layer", "head", "method", "cache", *(["time"] if timed else []), *columns, f"{policy.tolerance:g}"]
    return markdown_table(header, rows, others=["right", "left", *["right"] * (len(header) - 3)])


def plan_document_of_model(made: ModelPlan, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The plan as a JSON document; the policy is a separate file."""
    return {
        "settings": dict(settings),
        "environment": environment(),
        "verdict": plan_verdict(made),
        "is_met": made.is_met,
        "cache_bytes": made.policy.cache_bytes,
        "seconds": made.seconds,
        "split_by": made.split_by,
        "held_out_errors": {path: own.tolist() for path, own in made.errors.items()},
        "uniform": made.uniform,
        "uniform_errors": {path: own.tolist() for path, own in made.uniform_errors.items()},
    }


def check_document(check: PolicyCheck, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The check as a JSON document."""
    return {
        "settings": dict(settings),
        "environment": environment(),
        "verdict": check_verdict(check),
        "tolerance": check.policy.tolerance,
        "errors": {path: own.tolist() for path, own in check.errors.items()},
        "promised": {path: own.tolist() for path, own in check.promised.items()},
        "failures": [{"layer": layer, "head": head} for layer, head in check.failures],
    }


def draw_policy(policy: Policy, maps: Mapping[str, Errors], title: str) -> Any:
    """Draw the method of each head of each layer, and maps of their errors, with errors above the tolerance framed."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    paths = list(policy.layers)
    num_heads = max(len(own.heads) for own in policy.layers.values())
    largest = max(
        (x for of in maps.values() for own in of.values() for x in own.tolist() if math.isfinite(x)), default=0.0
    )
    with figure_style():
        width = 1.6 + 0.42 * min(num_heads, 24)
        figure = Figure(figsize=(1.5 + width * (1 + len(maps)), 1.9 + 0.34 * max(len(paths), 4)))
        first, *others = figure.subplots(1, 1 + len(maps), sharey=True)
        names = dict.fromkeys(head.method for own in policy.layers.values() for head in own.heads)
        looks = {"exact": {"color": "0.25"}} | method_styles(name for name in names if name != "exact")
        for row, own in enumerate(policy.layers.values()):
            for column, head in enumerate(own.heads):
                place = (column - 0.5, row - 0.5)
                first.add_patch(Rectangle(place, 1, 1, facecolor=looks[head.method]["color"], edgecolor="white"))
                if num_heads <= _MOST_NUMBERS:
                    first.text(column, row, _size(head), ha="center", va="center", fontsize=7, color="white")
        first.set(xlim=(-0.5, num_heads - 0.5), ylim=(len(paths) - 0.5, -0.5), title="method and size")
        patches = [Patch(color=looks[name]["color"], label=name) for name in names]
        for axes, (name, of) in zip(others, maps.items(), strict=True):
            grid = np.full((len(paths), num_heads), np.nan)
            for row, path in enumerate(paths):
                grid[row, : len(of[path])] = of[path]
            shown = axes.imshow(grid, vmin=0, vmax=max(largest, policy.tolerance), cmap="Blues", aspect="auto")
            for row, column in np.argwhere(~np.isnan(grid)):
                error = grid[row, column]
                if num_heads <= _MOST_NUMBERS:
                    color = "white" if error > 0.6 * max(largest, policy.tolerance) else "0.2"
                    label = "0" if error == 0 else f"{error:.2g}".replace("0.", ".", 1)
                    axes.text(column, row, label, ha="center", va="center", fontsize=7, color=color)
                if error > policy.tolerance:
                    frame = (column - 0.46, row - 0.46)
                    axes.add_patch(Rectangle(frame, 0.92, 0.92, fill=False, edgecolor=_FRAME, linewidth=1.6))
            axes.set_title(name)
            if axes is others[-1]:
                figure.colorbar(shown, ax=axes, label="relative error")
        for axes in (first, *others):
            axes.set(xlabel="key head")
            axes.set_xticks(range(0, num_heads, 1 if num_heads <= _MOST_NUMBERS else 4))
            axes.grid(False)
        first.set_yticks(range(len(paths)), paths, fontsize=8, parse_math=False)
        patches.append(Patch(fill=False, edgecolor=_FRAME, label=f"above {policy.tolerance:g}"))
        figure.legend(handles=patches, loc="outside lower center", ncols=min(len(patches), 8), fontsize=8)
        figure.suptitle(title, fontsize=11, parse_math=False)
        return figure


def _size(head: HeadChoice) -> str:
    sizes = [x for x in head.hyperparameters.values() if isinstance(x, int) and not isinstance(x, bool)]
    return str(sizes[-1]) if sizes else ""


def _total_and_worst(errors: Errors) -> tuple[float, float]:
    """Root mean square over heads, and the largest."""
    every = np.concatenate(list(errors.values()))
    return float(np.sqrt(np.mean(every**2))), float(every.max())


def _above(errors: Errors, tolerance: float) -> Sequence[float]:
    return [x for own in errors.values() for x in own.tolist() if not x <= tolerance]
