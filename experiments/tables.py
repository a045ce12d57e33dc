"""The tables of RESULTS.md: for each experiment, what its studies show."""

import functools
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tabulate import tabulate

from experiments.whole_picture import where_we_lose
from experiments.whole_picture.figures import above_exact, by_score
from experiments.whole_picture.zoo import CHOOSE


def tables(experiment: str, runs: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """The tables of a study, as Markdown."""
    return _TABLES[experiment](runs)


def _quality_tables(runs: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    rows = []
    for arm in dict.fromkeys(run["arm"] for run in runs):
        results = [run["result"] for run in runs if run["arm"] == arm]
        by_position = [list(result["test"].get("by_position", {}).values()) for result in results]
        rows.append(
            [
                f"`{arm}`",
                _spread([result["test"]["bits"] for result in results]),
                _spread([result["test"]["accuracy"] for result in results]),
                _spread([bits[-1] for bits in by_position]) if by_position[0] else "",
                _spread([result["attention_error"]["method"]["mean"] for result in results]),
                _spread([result["attention_error"]["mean_value"]["mean"] for result in results]),
                _bytes(results[0]["held_bytes"]),
                f"{statistics.fmean(result['training_seconds'] for result in results):.0f} s",
            ]
        )
    # Beside every score what is reached on these data without understanding them.
    oracles = dict.fromkeys(pair for run in runs for pair in run["result"].get("oracles", {}).items())
    rows += [[f"oracle: {name.replace('_', ' ')}", "", f"{accuracy:.3f}", *[""] * 5] for name, accuracy in oracles]
    header = (
        "trained with|test bits|accuracy|bits, last octave of positions|attention error|that of mean(V)|held|training"
    )
    yield table(header.split("|"), rows)


def _swap_in_tables(runs: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    rows = []
    for name in runs[0]["result"]["methods"]:
        results = [run["result"]["methods"][name] for run in runs]
        exact = [run["result"]["methods"]["exact"]["bits"] for run in runs]
        rows.append(
            [
                f"`{name}`",
                _spread([result["bits"] for result in results]),
                _spread([result["bits"] - bits for result, bits in zip(results, exact, strict=True)]),
                _spread([result["attention_error"]["mean"] for result in results]),
                _bytes(results[0]["held_bytes"]),
            ]
        )
    yield table(["evaluated with", "test bits", "lost against exact", "attention error", "held"], rows)


def _zoo_tables(runs: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    for arm in dict.fromkeys(run["arm"] for run in runs):
        of_arm = [run for run in runs if run["arm"] == arm]
        results, configs = [run["result"] for run in of_arm], of_arm[0]["config"]["methods"]
        rows = []
        for name in by_score(results):
            entries = [result["methods"][name] for result in results]
            figures = ("accuracy", "bits", "attention_error", "error_on_exact")
            rows.append(
                [
                    f"`{name}`",
                    *(_spread([entry[figure] for entry in entries]) for figure in figures),
                    _bytes(entries[0]["answer_bytes"]),
                    "every token" if configs[name]["method"] in CHOOSE else "",
                    f"{1e3 * min(entry['seconds'] for entry in entries):.3g}",
                ]
            )
        correlations = [
            f"{_spread([result['rank_correlation'][error] for result in results])} {on}"
            for error, on in (
                ("attention_error", "on the tensors of the model trained with the method"),
                ("error_on_exact", "on those of the model trained with exact attention"),
            )
        ]
        yield (
            f"`{arm}`, {count(len(results), 'seed')}: the best first. Rank correlation of attention error and bits, "
            f"without `exact`: {', '.join(correlations)}."
        )
        header = (
            "trained with|test accuracy|bits|attention error|error on exact's tensors|answers from|holds|ms a layer"
        )
        yield table(header.split("|"), rows)
        if plans := [result["plan"] for result in results if "plan" in result]:
            picks = Counter(plan["method"] for plan in plans).most_common()
            chosen = ", ".join(f"`{name}` ({times} of {len(plans)})" for name, times in picks)
            bits, best, median, bound, error = (
                _spread([plan[figure] for plan in plans])
                for figure in ("bits", "best", "median", "error_bound", "held_out_error")
            )
            yield (
                "`approx_attention.evaluation.plan`, asked for the least error in 1.15 times the median bytes on the "
                f"tensors of the model trained with exact attention, chose {chosen}: error at most {bound}, {error} on "
                f"what was held out. Trained with its choice {bits} bits; with the best of the arms above that it can "
                f"choose from, those that hold no more bytes, {best}, with the median of these {median}."
            )
        for name, accuracy in results[0]["oracles"].items():
            yield f"Oracle, {name.replace('_', ' ')}: accuracy {accuracy:.3f}."


def _equal_time_tables(runs: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    results = [run["result"] for run in runs]
    rows = []
    for name in by_score(results):
        entries = [result["methods"][name] for result in results]
        figures = ("bits", "untuned", "error")
        rows.append(
            [
                f"`{name}`",
                "" if entries[0]["size"] is None else str(entries[0]["size"]),
                f"{entries[0]['share']:.2f}",
                *(_spread([entry[figure] for entry in entries]) for figure in figures),
                _spread(above_exact(results, name)),
            ]
        )
    yield (
        f"{count(len(results), 'seed')}: the best first. *Share*: of the time of a layer with exact attention, "
        "measured once for all seeds. *Above exact*: in bits, trained on, with the same seed."
    )
    header = "in the place of exact attention|size|share|bits, trained on|bits, as put in|attention error|above exact"
    yield table(header.split("|"), rows)
    slow = ", ".join(f"`{name}` ({share:.2f})" for name, share in results[0]["too_slow"].items())
    yield f"Slower than that at their smallest size, and so left out: {slow or 'none'}."


def _long_context_tables(runs: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    for run in runs:
        methods = run["result"]["methods"]
        lengths = list(methods["best exact"]["seconds"])
        rows = []
        for name, entry in methods.items():
            slope = entry["slope"]
            rows.append(
                [
                    f"`{name}`",
                    *(f"{1e3 * entry['seconds'][n]:.3g}" for n in lengths),
                    f"{slope['value']:.2f} ± {slope['half_width']:.2f}" if slope else "",
                    "" if name == "best exact" else str(entry["break_even"] or "never"),
                    f"{entry['speedup_at_longest']:.1f}x",
                ]
            )
        yield f"`{run['arm']}`: milliseconds of a layer at n tokens, slope of log time with its 95 % interval"
        yield table(["", *lengths, "slope", "break-even n", f"faster at {lengths[-1]}"], rows)


def _gap_tables(runs: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    # Arms with the same methods share a table.
    kinds: dict[tuple[str, ...], list[str]] = {}
    for arm in arms:
        kinds.setdefault(tuple(next(run for run in runs if run["arm"] == arm)["result"]["methods"]), []).append(arm)
    for names, together in kinds.items():
        by_arm = {arm: [run["result"]["methods"] for run in runs if run["arm"] == arm] for arm in together}
        rows = []
        for name in names:
            first = by_arm[together[0]][0][name]
            errors = [_spread([methods[name]["error"] for methods in by_arm[arm]]) for arm in together]
            rows.append([f"`{name}`", f"{first['flops'] / 1e6:.3g}", _bytes(first["held_bytes"]), *errors])
        yield table(["relative error", "MFLOP a head", "held", *together], rows)


def _bias_tables(runs: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    rows = []
    for name in runs[0]["result"]["methods"]:
        results = [run["result"]["methods"][name] for run in runs]
        for what in ("bias", "noise", "deviation"):
            slopes = [r[f"{what}_slope"]["value"] for r in results if r.get(f"{what}_slope")]
            figures = [f"{statistics.fmean(r[what][n] for r in results):.2g}" for n in results[0][what]]
            rows.append([f"`{name}`", what, *figures, _spread(slopes) if slopes else ""])
    yield table(["", "relative", *runs[0]["result"]["methods"][name]["bias"], "slope"], rows)


def _continuum_tables(runs: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    results = [run["result"] for run in runs]
    numbers = sorted({n for by_groups in results[0]["errors"].values() for n in by_groups}, key=int)
    rows = []
    for size, by_groups in results[0]["errors"].items():
        figures = [_spread([r["errors"][size][n] for r in results]) if n in by_groups else "" for n in numbers]
        rows.append([f"{size} keys exactly", *figures])
    features, mean = (_spread([r[name] for r in results]) for name in ("random_features", "mean_value"))
    yield f"Relative error; of random features alone {features}, of the mean of the values {mean}."
    yield table(["", *(count(int(n), "group") for n in numbers)], rows)


def _errors_by_size_tables(runs: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    for arm in dict.fromkeys(run["arm"] for run in runs):
        results = [run["result"] for run in runs if run["arm"] == arm]
        sizes = list(next(iter(results[0]["errors"].values())))
        rows = [
            [name, *(_significant([r["errors"][name][size] for r in results]) for size in sizes)]
            for name in results[0]["errors"]
        ]
        if "mean_value" in results[0]:
            rows.append(["mean of the values", *[_significant([r["mean_value"] for r in results])] * len(sizes)])
        yield f"`{arm}`: error relative to exact attention, by rows or slots"
        yield table(["", *sizes], rows)
        if "theorem_2" in results[0]:
            outputs = list(results[0]["theorem_2"])
            yield f"`{arm}`: largest error of a row, in units of what theorem 2 of Linformer allows for epsilon 1"
            yield table(outputs, [[_significant([r["theorem_2"][name] for r in results]) for name in outputs]])


def _spectra_tables(runs: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    results = [run["result"] for run in runs]
    rows = []
    for name in ("trained", "initial"):
        for kind, of in (("weights", "P"), ("centred", "P - 1/n")):
            shares = [r[name]["share"][kind] for r in results]
            rows.append([name, of, *(_spread([share[layer] for share in shares]) for layer in shares[0])])
    share = runs[0]["config"]["share"]
    yield f"Share of the sum of singular values that the largest {100 * share:g} % of them make, mean over heads"
    yield table(["model", "of", *results[0]["trained"]["share"]["weights"]], rows)


def _coreset_error_tables(runs: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    named = {"sizes": "size", "radii": "radius", "head_dims": "dimension"}
    for arm in dict.fromkeys(run["arm"] for run in runs):
        results = [run["result"] for run in runs if run["arm"] == arm]
        first = results[0]
        steps = list(first["mean_value"])
        rows = []
        for name in first["methods"]:
            figures = [_significant([r["methods"][name]["error"][step] for r in results]) for step in steps]
            # Where the error falls to that of rounding there is no exponent.
            entries = [r["methods"][name] for r in results]
            slopes = [e["slope"]["value"] for e in entries if e.get("slope") and min(e["error"].values()) > 1e-5]
            typical = statistics.fmean(r["methods"][name]["typical"][steps[0]] for r in results)
            rows.append([f"`{name}`", *figures, f"{typical:.2g}", _spread(slopes) if slopes else ""])
        mean = [_significant([r["mean_value"][step] for r in results]) for step in steps]
        rows.append(["mean of the values", *mean, "", ""])
        yield f"`{arm}`: greatest error over queries of that norm, by {named[first['grows']]}"
        yield table(["", *steps, f"typical at {steps[0]}", "exponent"], rows)


def _cache_tables(runs: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    for arm in dict.fromkeys(run["arm"] for run in runs):
        results = [run["result"] for run in runs if run["arm"] == arm]
        shares = list(next(iter(results[0]["policies"].values())))
        exact = [r["exact"] for r in results]
        bits, accuracy = (_spread([entry[name] for entry in exact]) for name in ("bits", "accuracy"))
        yield f"`{arm}`: exact cache {bits} bits, accuracy {accuracy}. Bits lost, then accuracy, then attention error."
        rows = []
        for policy in results[0]["policies"]:
            cells = [[r["policies"][policy][share] for r in results] for share in shares]
            lost = [
                _spread([entry["bits"] - whole["bits"] for entry, whole in zip(cell, exact, strict=True)])
                for cell in cells
            ]
            others = [
                f"{statistics.fmean([entry[what] for entry in cell]):.3f}"
                for what in ("accuracy", "attention_error")
                for cell in cells
            ]
            rows.append([f"`{policy}`", *lost, *others])
        header = [f"{what} {100 * float(share):g} %" for what in ("bits", "acc.", "error") for share in shares]
        yield table(["cache", *header], rows)


def _latency_tables(runs: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    for run in runs:
        for name, title in (("prefill", "compression of the cache"), ("decode", "one decoding step")):
            arms = run["result"][name]
            lengths = list(arms["exact"])
            rows = [[f"`{arm}`", *(f"{1e3 * seconds[n]:.3g}" for n in lengths)] for arm, seconds in arms.items()]
            what = "causal attention over the prompt" if name == "prefill" else "a step over the whole cache"
            yield f"`{run['arm']}`: milliseconds of {title}, beside exact {what}"
            yield table(["", *lengths], rows)


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
                            *(_significant([entry[what] for entry in entries]) for what in ("skill", "error", "worst")),
                            "" if None in certificates else _significant(certificates),
                        ]
                    )
            uniform = _significant([result["uniform"][bound] for result in results])
            known = _significant([result["logit_bound"][bound] for result in results])
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
                *(_spread([result[name] for result in results]) for name in figures),
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
                _significant([result["methods"][name][what][rank] for result in results])
                for what in ("skill", "error")
                for name in ("window", "polynomial")
            ]
            rows.append([rank, str(window), *figures])
        uniform = _significant([result["uniform"] for result in results])
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
    return str(figures[0]) if len(figures) == 1 and isinstance(figures[0], int) else _significant(figures)


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


def _where_we_lose_tables(runs: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    errors, labels = where_we_lose.mean_errors(runs), where_we_lose.TO_BEAT
    over, held = where_we_lose.over_budget(runs), where_we_lose.held(runs)
    rows = []
    for name in dict.fromkeys(name for by_name in errors.values() for name in by_name):
        row = [f"`{name}`{' *' if name in over else ''}"]
        for by_name in errors.values():
            lost = [label for to_beat, label in labels.items() if by_name.get(name, 0) >= by_name[to_beat]]
            unbeaten = f" ({', '.join(lost)})" if lost and name not in labels else ""
            row.append(f"{by_name[name]:.2g}{unbeaten}" if name in by_name else "")
        for by_arm in held.values():
            size, num_bytes = by_arm.get(name, (None, None))
            row.append(", ".join(part for part in ("" if size is None else str(size), _bytes(num_bytes)) if part))
        rows.append(row)
    yield (
        "Relative error at equal memory, or where nothing is named as held at equal matrix products; in brackets the "
        "baselines that it does not beat there; * takes more somewhere at its smallest size"
    )
    yield table(["", *errors, *(f"size and bytes held, `{arm}`" for arm in held)], rows)
    header = ["", *(f"no better than {label} on" for label in labels.values())]
    yield table(header, where_we_lose.loss_rows(runs))


_TABLES = {
    "where_we_lose": _where_we_lose_tables,
    "equal_time": _equal_time_tables,
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
    "sketch": _errors_by_size_tables,
    "projection_fit": _errors_by_size_tables,
    "spectra": _spectra_tables,
    "coreset_error": _coreset_error_tables,
    "cache": _cache_tables,
    "latency": _latency_tables,
    "continuum": _continuum_tables,
    "gap": _gap_tables,
    "bias": _bias_tables,
    "quality": _quality_tables,
    "swap_in": _swap_in_tables,
    "zoo": _zoo_tables,
    "long_context": _long_context_tables,
}


def _spread(figures: Sequence[float]) -> str:
    mean = statistics.fmean(figures)
    return f"{mean:.3f}" if len(figures) == 1 else f"{mean:.3f} ± {_deviation(figures):.3f}"


def _deviation(figures: Sequence[float]) -> float:
    """Of a run that diverged there is none, and `statistics` raises."""
    return statistics.stdev(figures) if all(map(math.isfinite, figures)) else math.nan


def _significant(figures: Sequence[float]) -> str:
    mean = statistics.fmean(figures)
    return f"{mean:.2g}" if len(figures) == 1 else f"{mean:.2g} ± {_deviation(figures):.1g}"


def _bytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1024:.4g} KiB"


def count(number: int, what: str) -> str:
    """A number of things: 1 seed, 2 seeds."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return tabulate(rows, header, tablefmt="pipe", disable_numparse=True)
