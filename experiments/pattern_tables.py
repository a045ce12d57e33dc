"""The tables of the families `tensor` and `sparse_patterns`."""

import functools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.cells import significant, spread, table


def _tensor_times_tables(runs: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    for run in runs:
        methods = run["result"]["methods"]
        lengths = sorted({n for entry in methods.values() for n in entry["seconds"]}, key=int)
        rows = []
        for name, entry in methods.items():
            slope = entry["slope"]
            row = [name, *(f"{1e3 * entry['seconds'][n]:.3g}" if n in entry["seconds"] else "" for n in lengths)]
            row.append(f"{slope['value']:.2f} ± {slope['half_width']:.2f}" if slope else "")
            if "crossover" in entry:
                found = "never" if entry["crossover"] is None else f"{entry['crossover']:.0f}"
                row.append(f"{found} ({entry['crossover_of_flops']:.0f})")
            rows.append(row)
        decoding = run["config"]["experiment"] == "tensor_decode"
        crossing = [] if decoding else ["faster from n (by operations)"]
        what = "decoding a token after n others" if decoding else "a call over n tokens"
        yield f"`{run['arm']}`: milliseconds of {what}, slope of log time with its 95 % interval"
        width = 2 + len(lengths) + len(crossing)
        yield table(["", *lengths, "slope", *crossing], [[*row, *[""] * (width - len(row))] for row in rows])


def _polynomial_error_tables(runs: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    for arm in dict.fromkeys(run["arm"] for run in runs):
        results = [run["result"] for run in runs if run["arm"] == arm]
        first = results[0]
        bounds = list(first["uniform"])
        for bound in bounds:
            rows = []
            for name, family in first["families"].items():
                for label, rank in family["rank"][bound].items():
                    entries = [
                        {what: by[bound][label] for what, by in result["families"][name].items()} for result in results
                    ]
                    certificates = [entry["certificate"] for entry in entries]
                    rows.append(
                        [
                            name,
                            label if first["by"] == "degree" else "",
                            str(rank),
                            *(significant([entry[what] for entry in entries]) for what in ("skill", "error", "worst")),
                            "" if None in certificates else significant(certificates),
                        ]
                    )
            uniform = significant([result["uniform"][bound] for result in results])
            known = significant([result["logit_bound"][bound] for result in results])
            yield (
                f"`{arm}`: logits up to {bound} (known without looking at pairs: {known}); uniform weights have error "
                f"{uniform}, and skill error 1"
            )
            header = ["polynomial", "degree", "rank", "skill error", "error", "worst output", "certificate"]
            yield table(header, rows)


def _least_degrees_tables(runs: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    result = runs[0]["result"]
    for tolerance, by_bound in next(iter(result["degrees"].values())).items():
        rows = [
            [kind, *(str(degree) for degree in by[tolerance].values()),
             f"{result['degrees_per_unit'][kind][tolerance]:.2f}"]
            for kind, by in result["degrees"].items()
        ]  # fmt: skip
        yield f"Least degree whose weights are right to {tolerance}, by the largest logit"
        yield table(["", *by_bound, "degrees per unit from 1 on"], rows)


def _phase_tables(runs: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    result = runs[0]["result"]
    lengths = list(result["curves"])
    rows = []
    for multiple in result["curves"][lengths[0]]:
        points = [result["curves"][n][multiple] for n in lengths]
        cells = [f"{p['bound']:.2f}, {p['degree']}, {p['rank']:.3g}, {p['exponent']:.2f}" for p in points]
        rows.append([multiple, *cells])
    yield "Bound, degree, rank, and exponent of the rank in n, by the bound over ln n"
    yield table(["bound / ln n", *(f"n = {n}" for n in lengths)], rows)
    rows = [
        [f"rank n^{exponent}", "bound / ln n", *(_optional(at) for at in by_length.values())]
        for exponent, by_length in result["crossing"].items()
    ]
    rows += [
        ["rank n^1.5", f"entries, order {order}", *(_optional(at) for at in by_length.values())]
        for order, by_length in result["entries_at_crossing"].items()
    ]
    yield "Where the rank passes a power of n, and the entries that are allowed there"
    yield table(["", "", *(f"n = {n}" for n in lengths)], rows)


def _optional(figure: float | None) -> str:
    return "beyond" if figure is None else f"{figure:.2f}"


def _tensor_match_tables(runs: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    rows = []
    for arm in dict.fromkeys(run["arm"] for run in runs):
        results = [run["result"] for run in runs if run["arm"] == arm]
        figures = ("accuracy", "balanced_accuracy", "majority", "largest_logit")
        rows.append(
            [
                f"`{arm}`",
                *(spread([result[name] for result in results]) for name in figures),
                str(results[0]["parameters"]),
                f"{statistics.fmean(result['training_seconds'] for result in results):.0f} s",
            ]
        )
    header = ["", "accuracy", "balanced", "commonest answer", "largest logit", "parameters", "training"]
    yield table(header, rows)


def _tensor_window_tables(runs: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    for arm in dict.fromkeys(run["arm"] for run in runs):
        results = [run["result"] for run in runs if run["arm"] == arm]
        rows = []
        for rank, window in results[0]["windows"].items():
            figures = [
                significant([result["methods"][name][what][rank] for result in results])
                for what in ("skill", "error")
                for name in ("window", "polynomial")
            ]
            rows.append([rank, str(window), *figures])
        uniform = significant([result["uniform"] for result in results])
        yield f"`{arm}` clusters: uniform weights have error {uniform}, and skill error 1"
        names = [f"{what}, {name}" for what in ("skill error", "error") for name in ("window", "polynomial")]
        yield table(["rank", "window", *names], rows)


def _curves_tables(runs: Sequence[Mapping[str, Any]], *, what: str) -> Iterable[str]:
    for arm in dict.fromkeys(run["arm"] for run in runs):
        results = [run["result"] for run in runs if run["arm"] == arm]
        steps, fits = list(next(iter(results[0]["curves"].values()))), results[0].get("fits", {})
        rows = []
        for kind, quote in (("curves", "`"), ("bounds", "")):
            for name in results[0][kind]:
                columns = [[result[kind][name][step] for result in results] for step in steps]
                figures = ["none" if None in column else _count_or_significant(column) for column in columns]
                row = [f"{quote}{name.replace('_', ' ') if kind == 'bounds' else name}{quote}", *figures]
                if fits:
                    fit = fits[name]
                    row += [f"{fit['value']:.3g} ± {fit['half_width']:.2g}", f"{fit['r2']:.3f}"] if fit else ["", ""]
                rows.append(row)
        theory = f"; {results[0]['theory']:.3g} for each doubling by theory of least squares" if fits else ""
        yield f"`{arm}`: {what}{theory}"
        yield table(["", *steps, *(["for each doubling", "R²"] if fits else [])], rows)


def _count_or_significant(figures: Sequence[float]) -> str:
    return str(figures[0]) if len(figures) == 1 and isinstance(figures[0], int) else significant(figures)


def _headline_tables(runs: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    for run in runs:
        rows = [
            [
                f"`{name}`",
                "none" if entry["dim"] is None else str(entry["dim"]),
                *(f"{entry[what]:.3g}" if what in entry else "" for what in ("logit_absmax", "max_row_tv")),
            ]
            for name, entry in run["result"]["methods"].items()
        ]
        yield f"`{run['arm']}`: least channels at {run['result']['tokens']} tokens, and what a realisation has there"
        yield table(["", "channels", "largest logit", "total variation of a row"], rows)


def _picture_tables(runs: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    rows = []
    for run in runs:
        certificate = run["result"]["certificate"]
        figures = [math.exp(certificate["log_eps1"]), math.expm1(certificate["log1p_eps2"])]
        figures += [certificate[name] for name in ("logit_absmax", "rho", "max_row_tv")]
        rows.append([f"`{run['arm']}`", str(run["result"]["head_dim"]), *(f"{figure:.2g}" for figure in figures)])
    header = "pattern|channels|eps1|eps2|largest logit|gap over it|total variation of a row"
    yield table(header.split("|"), rows)


# The tables of a study by the name of its experiment.
TABLES = {
    "tensor_scaling": _tensor_times_tables,
    "tensor_decode": _tensor_times_tables,
    "polynomial_error": _polynomial_error_tables,
    "least_degrees": _least_degrees_tables,
    "phase": _phase_tables,
    "tensor_match": _tensor_match_tables,
    "tensor_window": _tensor_window_tables,
    "log_law": functools.partial(_curves_tables, what="least channels, by tokens"),
    "headline": _headline_tables,
    "budget": functools.partial(_curves_tables, what="least channels, by the largest logit allowed"),
    "many_patterns": functools.partial(_curves_tables, what="share of patterns realised, by channels"),
    "precision": functools.partial(_curves_tables, what="error of ratios of nonzeros, by that of zeros to nonzeros"),
    "picture": _picture_tables,
}
