"""The tables of RESULTS.md: for each experiment, what its studies show."""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments import pattern_tables
from experiments.cells import count, in_kib, significant, spread, table
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
                spread([result["test"]["bits"] for result in results]),
                spread([result["test"]["accuracy"] for result in results]),
                spread([bits[-1] for bits in by_position]) if by_position[0] else "",
                spread([result["attention_error"]["method"]["mean"] for result in results]),
                spread([result["attention_error"]["mean_value"]["mean"] for result in results]),
                in_kib(results[0]["held_bytes"]),
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
                spread([result["bits"] for result in results]),
                spread([result["bits"] - bits for result, bits in zip(results, exact, strict=True)]),
                spread([result["attention_error"]["mean"] for result in results]),
                in_kib(results[0]["held_bytes"]),
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
                    *(spread([entry[figure] for entry in entries]) for figure in figures),
                    in_kib(entries[0]["answer_bytes"]),
                    "every token" if configs[name]["method"] in CHOOSE else "",
                    f"{1e3 * min(entry['seconds'] for entry in entries):.3g}",
                ]
            )
        correlations = [
            f"{spread([result['rank_correlation'][error] for result in results])} {on}"
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
                spread([plan[figure] for plan in plans])
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
                *(spread([entry[figure] for entry in entries]) for figure in figures),
                spread(above_exact(results, name)),
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
            errors = [spread([methods[name]["error"] for methods in by_arm[arm]]) for arm in together]
            rows.append([f"`{name}`", f"{first['flops'] / 1e6:.3g}", in_kib(first["held_bytes"]), *errors])
        yield table(["relative error", "MFLOP a head", "held", *together], rows)


def _bias_tables(runs: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    rows = []
    for name in runs[0]["result"]["methods"]:
        results = [run["result"]["methods"][name] for run in runs]
        for what in ("bias", "noise", "deviation"):
            slopes = [r[f"{what}_slope"]["value"] for r in results if r.get(f"{what}_slope")]
            figures = [f"{statistics.fmean(r[what][n] for r in results):.2g}" for n in results[0][what]]
            rows.append([f"`{name}`", what, *figures, spread(slopes) if slopes else ""])
    yield table(["", "relative", *runs[0]["result"]["methods"][name]["bias"], "slope"], rows)


def _continuum_tables(runs: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    results = [run["result"] for run in runs]
    numbers = sorted({n for by_groups in results[0]["errors"].values() for n in by_groups}, key=int)
    rows = []
    for size, by_groups in results[0]["errors"].items():
        figures = [spread([r["errors"][size][n] for r in results]) if n in by_groups else "" for n in numbers]
        rows.append([f"{size} keys exactly", *figures])
    features, mean = (spread([r[name] for r in results]) for name in ("random_features", "mean_value"))
    yield f"Relative error; of random features alone {features}, of the mean of the values {mean}."
    yield table(["", *(count(int(n), "group") for n in numbers)], rows)


def _errors_by_size_tables(runs: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    for arm in dict.fromkeys(run["arm"] for run in runs):
        results = [run["result"] for run in runs if run["arm"] == arm]
        sizes = list(next(iter(results[0]["errors"].values())))
        rows = [
            [name, *(significant([r["errors"][name][size] for r in results]) for size in sizes)]
            for name in results[0]["errors"]
        ]
        if "mean_value" in results[0]:
            rows.append(["mean of the values", *[significant([r["mean_value"] for r in results])] * len(sizes)])
        yield f"`{arm}`: error relative to exact attention, by rows or slots"
        yield table(["", *sizes], rows)
        if "theorem_2" in results[0]:
            outputs = list(results[0]["theorem_2"])
            yield f"`{arm}`: largest error of a row, in units of what theorem 2 of Linformer allows for epsilon 1"
            yield table(outputs, [[significant([r["theorem_2"][name] for r in results]) for name in outputs]])


def _spectra_tables(runs: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    results = [run["result"] for run in runs]
    rows = []
    for name in ("trained", "initial"):
        for kind, of in (("weights", "P"), ("centred", "P - 1/n")):
            shares = [r[name]["share"][kind] for r in results]
            rows.append([name, of, *(spread([share[layer] for share in shares]) for layer in shares[0])])
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
            figures = [significant([r["methods"][name]["error"][step] for r in results]) for step in steps]
            # Where the error falls to that of rounding there is no exponent.
            entries = [r["methods"][name] for r in results]
            slopes = [e["slope"]["value"] for e in entries if e.get("slope") and min(e["error"].values()) > 1e-5]
            typical = statistics.fmean(r["methods"][name]["typical"][steps[0]] for r in results)
            rows.append([f"`{name}`", *figures, f"{typical:.2g}", spread(slopes) if slopes else ""])
        mean = [significant([r["mean_value"][step] for r in results]) for step in steps]
        rows.append(["mean of the values", *mean, "", ""])
        yield f"`{arm}`: greatest error over queries of that norm, by {named[first['grows']]}"
        yield table(["", *steps, f"typical at {steps[0]}", "exponent"], rows)


def _coreset_bytes_tables(runs: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    for arm in dict.fromkeys(run["arm"] for run in runs):
        results = [run["result"] for run in runs if run["arm"] == arm]
        first = results[0]
        shares = list(next(iter(first["tokens"].values())))
        rows = []
        for form, counts in first["tokens"].items():
            alone = significant([r["all_tokens"][form] for r in results])
            for name in first["errors"]:
                figures = [significant([r["errors"][name][form][share] for r in results]) for share in shares]
                rows.append([f"`{name}`", form, *figures, alone, f"{first['all_share'][form]:.3f}"])
            rows.append(["number of tokens", form, *map(str, counts.values()), "", ""])
        yield f"`{arm}`: error by the share of {in_kib(first['bytes'])}, those of all tokens in float32"
        yield table(["", "in", *shares, "all tokens", "in a share of"], rows)


def _cache_tables(runs: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    for arm in dict.fromkeys(run["arm"] for run in runs):
        results = [run["result"] for run in runs if run["arm"] == arm]
        shares = list(next(iter(results[0]["policies"].values())))
        exact = [r["exact"] for r in results]
        bits, accuracy = (spread([entry[name] for entry in exact]) for name in ("bits", "accuracy"))
        yield f"`{arm}`: exact cache {bits} bits, accuracy {accuracy}. Bits lost, then accuracy, then attention error."
        rows = []
        for policy in results[0]["policies"]:
            cells = [[r["policies"][policy][share] for r in results] for share in shares]
            lost = [
                spread([entry["bits"] - whole["bits"] for entry, whole in zip(cell, exact, strict=True)])
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


def _certified_tables(runs: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    for run in runs:
        layers, rows = run["result"]["layers"], []
        for layer, by_norm in layers.items():
            for norm, by_size in by_norm.items():
                for size, entries in by_size.items():
                    *certified, never = entries.values()
                    cells = [f"{100 * entry['exact_steps']:.3g} %, {entry['bytes']:.2g} x" for entry in certified]
                    rows.append([layer, norm, size, *cells, f"{never['promised']:.2g}, {never['measured']:.2g}"])
        yield (
            "Steps that read all tokens, and bytes read against exact decoding, by tolerance; at the last tolerance, "
            "which no bound exceeds, the largest bound and the largest error"
        )
        yield table(["layer", "norm", "clusters", *list(entries)[:-1], "promised, measured"], rows)


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
            row.append(", ".join(part for part in ("" if size is None else str(size), in_kib(num_bytes)) if part))
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
    "sketch": _errors_by_size_tables,
    "projection_fit": _errors_by_size_tables,
    "spectra": _spectra_tables,
    "coreset_error": _coreset_error_tables,
    "coreset_bytes": _coreset_bytes_tables,
    "cache": _cache_tables,
    "latency": _latency_tables,
    "certified": _certified_tables,
    "continuum": _continuum_tables,
    "gap": _gap_tables,
    "bias": _bias_tables,
    "quality": _quality_tables,
    "swap_in": _swap_in_tables,
    "zoo": _zoo_tables,
    "long_context": _long_context_tables,
    **pattern_tables.TABLES,
}
