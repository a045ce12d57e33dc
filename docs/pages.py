"""The pages of the site that are made from the registry and the measurements, at every build.

``methods/`` has a page per method, ``api/`` one per part of the public API, ``results/`` the committed reports, and
``measured/`` tables that the guide includes.
"""

import dataclasses
import importlib.util
import inspect
import json
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib
import matplotlib.pyplot as plt

import approx_attention
from approx_attention.evaluation import BASELINES
from approx_attention.registry import METHODS, Capabilities, Method, capability_table
from benchmarks.report import machine, markdown_table

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
LENGTHS = (1024, 4096, 16384, 65536)
HEAD_DIM = 64
# Where the names of baselines stand in a figure: at which of their points, how far from it, on which side.
LABELS = {"mean_value": (0, (8, -4), "left"), "uniform_sample": (-1, (-8, -6), "right")}

# Functions and classes beside those that the registry names, on the page of the method that they belong to.
COMPANIONS = {
    "cosformer": ("methods.running_cosformer", "methods.place_tokens"),
    "linformer": ("methods.linformer_step", "methods.LinformerPrefix", "methods.Convolution"),
    "coreset": ("coresets.query_radius",),
    "rfa": ("methods.gate_tokens",),
}

# Packages all of whose names are public, and what each is for.
PACKAGES = {
    "bounds": "Certificates and closed-form errors: what is promised before anything is measured.",
    "distributed": "Sequences sharded over devices.",
    "nnx": "Attention and learned parts for Flax nnx.",
    "linen": "Attention for Flax linen.",
}

# Public mappings, which have no docstring of their own.
DATA = {
    "approx_attention.METHODS": "The methods by name: what :py:func:`approx_attention.attention` takes as ``method=``.",
    "approx_attention.coresets.ALGORITHMS": "The algorithms by name: what ``policy=`` and ``algorithm=`` take.",
}

# The other public names, by topic.
TOPICS = {
    "attention": (
        "Attention over batch and heads",
        "One call for any method, and the registry that knows what each can do.",
        ("attention", "Method", "Capabilities", "registry.bind", "registry.BoundMethod", "InputError"),
    ),
    "summaries": (
        "Summaries, answers and features",
        "The calculus that everything else is made of: summaries answer queries, summaries of disjoint keys merge.",
        (
            "fold_scale", "attend", "merge", "AttentionState", "WeightedKV", "FeatureMoments", "RunningSummary",
            "core.subtract", "core.hadamard", "core.summary_bytes", "core.causal_state", "core.running_moments",
            "core.control_variate_state", "core.PositiveFeatures", "core.TrigonometricFeatures", "core.ReLUFeatures",
            "core.CosineFeatures", "core.WeightedFeatures", "core.gaussian_projection", "core.orthogonal_projection",
            "core.draw_sketch",
        ),
    ),
    "decoding": (
        "Decoding and compression of caches",
        "Caches of bounded size, and policies that make few weighted tokens of many.",
        (
            "HeadsDecoder", "HeadsCache", "Decoder", "Cache", "compress_tokens", "compress_cache",
            "decoding.running_compressed", "decoding.attention_received", "decoding.token_budget",
            "decoding.pyramid_budgets", "decoding.shared_sizes",
        ),
    ),
    "coresets": (
        "Coresets",
        "The algorithms behind `coreset` and `compress_tokens`, as objects with their settings.",
        (
            "coresets.compress", "coresets.ALGORITHMS", "coresets.Uniform", "coresets.ValueNorm", "coresets.Halving",
            "coresets.Stratified", "coresets.sensitivities", "coresets.Compress", "coresets.BalanceKV",
            "coresets.Herding", "coresets.KMeansMerge", "coresets.FarthestMerge", "coresets.KMeansNystrom",
            "coresets.PivotedNystrom", "coresets.SubGen",
        ),
    ),
    "tensor": (
        "Attention over pairs of keys, and polynomials",
        "Tensor attention of any order, exactly and by polynomials of bounded logits.",
        (
            "tensor_attention", "tensor_polynomial", "tensor.tensor_support_basis", "determinant_attention",
            "strassen_attention", "tensor.running_tensor_polynomial", "tensor.TensorDecoder",
            "tensor.exp_coefficients", "tensor.choose_degree", "tensor.ratio_range", "tensor.weight_bound",
            "tensor.IndexSet", "tensor.total_degree", "tensor.anisotropic", "tensor.MonomialFeatures",
            "tensor.TensorSketch", "tensor.ProductSketch",
        ),
    ),
    "patterns": (
        "Sparse patterns",
        "Patterns as what is computed.",
        ("SparsePattern", "sparse.BlockMap", "sparse_attention", "sparse_plus_summary"),
    ),
    "realization": (
        "What attention can express",
        "Patterns and weights that self-attention with few channels realises, and one unit of third order that decides "
        "Match3.",
        (
            "realize_sparse_pattern", "certify", "dimension_bound", "realization.fixed_projections",
            "realization.Realization", "realization.Certificate", "realization.DimensionBound",
            "realization.minimal_dimension", "realization.MinimalDimension", "realization.one_dimensional_order",
            "realization.realizable_in_one_dimension", "realization.row_centred", "realization.needed_head_dim",
            "realization.nearest_factors", "realization.realize_attention", "realization.Match3",
            "realization.match3_weights", "realization.match3_outputs", "realization.match3",
        ),
    ),
    "evaluation": (
        "Errors and times on your own tensors",
        "Errors against exact attention, adversarial queries, timings; and which method, of what size, for a tolerance "
        "and a budget: what `approx-attention plan` runs.",
        (
            "evaluation.compare", "evaluation.Arm", "evaluation.Comparison", "evaluation.output_error",
            "evaluation.OutputError", "evaluation.skill", "evaluation.sup_error", "evaluation.SupError",
            "evaluation.spectrum", "evaluation.Spectrum", "evaluation.time_interleaved", "evaluation.Timing",
            "evaluation.break_even", "evaluation.compile_arm", "evaluation.shared_programs", "evaluation.plan",
            "evaluation.Plan", "evaluation.Candidate", "evaluation.Curve", "evaluation.plan_document",
            "evaluation.plan_table", "evaluation.draw_plan", "evaluation.Tensors", "evaluation.Layer",
            "evaluation.load_tensors", "evaluation.load_layers", "evaluation.load_sample",
        ),
    ),
}  # fmt: skip


def write(docs: pathlib.Path = DOCS) -> None:
    """Makes every generated page anew, touching only what has changed."""
    pages: dict[str, str] = {"methods/index.md": methods_index(), "api/index.md": api_index()}
    pages |= {f"methods/{name}.md": method_page(name) for name in METHODS}
    pages |= {f"api/{topic}.md": topic_page(topic) for topic in TOPICS}
    pages |= {f"api/{package}.md": package_page(package) for package in PACKAGES}
    pages |= {f"measured/{name}.md": make() for name, make in MEASURED.items()}
    pages |= {f"results/{name}.md": text for name, text in results_pages(docs).items()}
    for folder in ("methods", "api", "measured", "results"):
        (docs / folder).mkdir(exist_ok=True)
        for stale in {file.relative_to(docs).as_posix() for file in (docs / folder).glob("*.md")} - set(pages):
            (docs / stale).unlink()
    for place, text in pages.items():
        _write_if_new(docs / place, text)
    newest = max(path.stat().st_mtime for path in COMPARISONS)
    for name, path in measured_methods().items():
        figure = docs / "methods" / f"{name}.svg"
        if not figure.exists() or figure.stat().st_mtime < newest:
            draw_error(name, comparison(path), figure)


def _write_if_new(path: pathlib.Path, text: str) -> None:
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


# Where a public name is documented.


def public_name(thing: Any) -> str:
    """The name of a function or class below `approx_attention`: its own at the root, else with its package."""
    name, package = thing.__name__, thing.__module__.split(".")[1]
    return name if name in approx_attention.__all__ else f"{package}.{name}"


def method_names(name: str) -> list[str]:
    """The public names on the page of a method: its own, and what makes its summaries, that no page before it has."""
    before = set()
    for other, method in METHODS.items():
        own = [public_name(part) for part in (method.function, method.summarize, method.running, method.draw) if part]
        own = [part for part in [*own, *COMPANIONS.get(other, ())] if part not in before]
        if other == name:
            return own
        before |= set(own)
    raise ValueError(f"{name!r} is not in METHODS")


def package_names(package: str) -> list[str]:
    """The public names of a package that is public as a whole."""
    return list(importlib.import_module(f"approx_attention.{package}").__all__)


def places() -> dict[str, str]:
    """Every documented name, dotted, and the page that documents it."""
    found = {"approx_attention.METHODS": "methods/index"}
    found |= {f"approx_attention.{part}": f"methods/{name}" for name in METHODS for part in method_names(name)}
    found |= {f"approx_attention.{part}": f"api/{topic}" for topic, (_, _, parts) in TOPICS.items() for part in parts}
    for package in PACKAGES:
        found |= {f"approx_attention.{package}.{part}": f"api/{package}" for part in package_names(package)}
    return found


def public_object(name: str) -> Any:
    """What a dotted name of `places` stands for."""
    module, _, last = name.rpartition(".")
    return getattr(importlib.import_module(module), last)


# Methods.


def methods_index() -> str:
    """The capability table with a link in every row, and the families."""
    table = re.sub(r"^\| `(\w+)`\s*\|", r"| [`\1`](\1.md) |", capability_table(), flags=re.MULTILINE)
    return "\n".join(
        [
            "# Methods",
            "",
            "Every entry of this table is checked by the contract tests. *below T x S*: time and memory grow slower "
            "than the square of the length. *merges*: has a log-normaliser comparable to exact attention's. "
            "*unbiased*: numerator and normaliser are, over keys. *may be random*: draws noise if it is given a key. "
            "*FLOPs*: matrix products of the bidirectional form at head dimension 64 and the usual size, as a share of "
            "exact attention's.",
            "",
            table,
            "",
            "## Shared arguments",
            "",
            "```{eval-rst}",
            ".. automodule:: approx_attention.methods",
            "   :no-members:",
            "```",
            "",
            *_directives("approx_attention.METHODS"),
            "",
            "```{toctree}",
            ":hidden:",
            "",
            *METHODS,
            "```",
            "",
        ]
    )


def method_page(name: str) -> str:
    """What the registry, the measurements and the docstrings say about a method."""
    method = METHODS[name]
    lines = [f"# `{name}`", "", _sources(method), ""]
    lines += [*_directives(f"approx_attention.{public_name(method.function)}"), ""]
    lines += ["## Measured error", "", *_measured(name), ""]
    lines += ["## What it can do", "", capability_rows(method), ""]
    lines += ["## Cost", "", cost_table(method), ""]
    if companions := [part for part in method_names(name) if part != public_name(method.function)]:
        lines += ["## Its parts", ""]
        for part in companions:
            lines += [*_directives(f"approx_attention.{part}"), ""]
    return "\n".join(lines)


def first_line(thing: Any) -> str:
    """The first line of a docstring."""
    return (inspect.getdoc(thing) or "").split("\n", 1)[0]


def _sources(method: Method) -> str:
    keys = ",".join(sources(method))
    return f"Source: {method.reference} {{cite:p}}`{keys}`." if keys else f"Source: {method.reference}."


def capability_rows(method: Method) -> str:
    """The capability row of a method, upright, each entry with its meaning."""
    meanings = dict(re.findall(r"^    (\w+): (.*(?:\n        .*)*)", inspect.getdoc(Capabilities) or "", re.MULTILINE))
    rows = []
    for field in dataclasses.fields(Capabilities):
        meaning = " ".join(meanings[field.name].replace("``", "`").split())
        rows.append([f"`{field.name}`", "yes" if getattr(method.capabilities, field.name) else "no", meaning])
    if method.size is not None:
        rows.append(["size", f"`{method.size}`", "the hyper-parameter that says how large its summary is"])
    return _left_table(["", "", "meaning"], rows)


def cost_table(method: Method) -> str:
    """FLOPs of the matrix products at several lengths, beside those of exact attention."""
    size = f", `{method.size}` = {method.usual_size}" if method.size else ""
    rows = []
    for n in LENGTHS:
        flops, exact = (m.cost(n, n, HEAD_DIM, HEAD_DIM, method.usual_size) for m in (method, METHODS["exact"]))
        rows.append([str(n), f"{flops:.3g}", f"{exact:.3g}", f"{100 * flops / exact:.3g} %"])
    text = (
        f"Matrix products of the bidirectional form for one head of {HEAD_DIM} channels{size}. This counts operations "
        "and no time: [](../results/benchmarks.md) has what was timed."
    )
    return f"{text}\n\n" + markdown_table(["T = S", "FLOPs", "exact attention", "share"], rows)


def _measured(name: str) -> list[str]:
    path = measured_methods().get(name, COMPARISONS[0])
    document = comparison(path)
    rows = [row for row in document["rows"] if row["method"] == name]
    is_causal = document["settings"]["is_causal"]
    kind = "causal" if is_causal else "bidirectional, though the model that made it is causal"
    seeds = document["settings"]["num_seeds"]
    held = [
        [
            "" if row["size"] is None else str(row["size"]),
            f"{_kib_held(row, document):.4g}",
            f"{row['relative_error']:.2g}",
            "" if row["far_error"] is None else f"{row['far_error']:.2g}",
            f"{1e3 * row['seconds']:.3g}",
            f"{row['speedup']:.2f}x",
        ]
        for row in rows
    ]
    header = ["size", "cache (KiB)", "relative error", "far error", "ms", "speed over best exact"]
    figure = (
        []
        if METHODS[name] is METHODS["exact"]
        else [
            f"```{{figure}} {name}.svg",
            f":alt: Relative error of {name} against cache bytes, among all methods of the comparison",
            "",
            f"Relative error against cache bytes on the shipped sample ({kind}, "
            f"{document['shapes']['key'][1]} tokens); below and to the left is better. Grey: the other methods of the "
            "same run. A method that holds all keys stands at their bytes.",
            "```",
            "",
        ]
    )
    place = path.relative_to(DOCS.parent).as_posix()
    about = f"Means over {seeds} seeds where the method is random. {machine(document)}, from `{place}`."
    return [*figure, markdown_table(header, held), "", about]


# The default comparison, that of methods that cost as much as exact attention, and that of those without a causal form.
COMPARISONS = tuple(DOCS / folder / "compare.json" for folder in ("", "costly", "bidirectional"))


def comparison(path: pathlib.Path = COMPARISONS[0]) -> dict[str, Any]:
    """What ``approx-attention compare`` measured on the shipped sample."""
    return json.loads(path.read_text(encoding="utf-8"))


def measured_methods() -> dict[str, pathlib.Path]:
    """The approximations that were compared, and where."""
    found: dict[str, pathlib.Path] = {}
    for path in COMPARISONS:
        for row in comparison(path)["rows"]:
            if not row["is_exact"]:
                found.setdefault(row["method"], path)
    return found


def _kib_held(row: Mapping[str, Any], document: Mapping[str, Any]) -> float:
    every = next(row["held_bytes"] for row in document["rows"] if row["is_exact"])
    return (row["held_bytes"] or every) / 1024


def draw_error(name: str, document: Mapping[str, Any], path: pathlib.Path) -> None:
    """Draws error against cache bytes: the method in colour, the baselines named, all others grey."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in document["rows"]:
        if not row["is_exact"]:
            curves.setdefault(row["method"], []).append((_kib_held(row, document), row["relative_error"]))
    with matplotlib.rc_context({"font.size": 11, "svg.hashsalt": name}):
        figure, axes = plt.subplots(figsize=(5, 3.6), layout="constrained")
        for other, points in curves.items():
            kib, error = zip(*sorted(points), strict=True)
            mine = other == name
            style: dict[str, Any] = {"color": "tab:blue", "zorder": 3} if mine else {"color": "0.6", "linewidth": 1}
            axes.plot(kib, error, marker="o", markersize=6 if mine else 4, **style)
            if mine or other in BASELINES:
                at, shift, side = LABELS.get(other, (0, (0, 7), "center"))
                name_style: dict[str, Any] = {
                    "color": style["color"] if mine else "0.35",
                    "weight": "bold" if mine else "normal",
                }
                name_style |= {"bbox": {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}}
                axes.annotate(other, (kib[at], error[at]), shift, textcoords="offset points", ha=side, **name_style)
        top = 1.3 * max(1.2, *(value for _, value in curves.get(name, [(0, 0.0)])))
        axes.set(yscale="log", xlabel="cache (KiB)", ylabel="relative error", xlim=(-5, None), ylim=(None, top))
        axes.grid(alpha=0.3)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


# The public API by topic and by module.


def api_index() -> str:
    """Every public name with its page and its first line."""
    rows = [
        [
            f"{{py:obj}}`{name.removeprefix('approx_attention.')} <{name}>`",
            _plain(DATA.get(name) or first_line(public_object(name))),
        ]
        for name in sorted(places(), key=lambda name: (name.count("."), name.lower()))
    ]
    lines = ["# API", "", "Everything public, by topic:", "", "```{toctree}", ":maxdepth: 1", "", *TOPICS, "```", ""]
    lines += ["Packages all of whose names are public:", "", "```{toctree}", ":maxdepth: 1", "", *PACKAGES, "```", ""]
    lines += [
        "The methods have [pages of their own](../methods/index.md). A committed list of these names and their "
        "signatures is compared to the code by the tests, so that none changes unnoticed.",
        "",
        "## All names",
        "",
        _left_table(["name", ""], rows),
        "",
    ]
    return "\n".join(lines)


def _plain(line: str) -> str:
    """A line of reStructuredText as Markdown in a cell."""
    line = re.sub(r":py:\w+:`([^`]*)`", r"`\1`", re.sub(r":math:`([^`]*)`", r"$\1$", line))
    return line.replace("``", "`").replace("|", r"\|")


def topic_page(topic: str) -> str:
    """The names of a topic."""
    title, about, names = TOPICS[topic]
    lines = [f"# {title}", "", about, ""]
    for name in names:
        lines += [*_directives(f"approx_attention.{name}"), ""]
    return "\n".join(lines)


def package_page(package: str) -> str:
    """All names of a public package."""
    lines = [f"# `approx_attention.{package}`", "", PACKAGES[package], ""]
    lines += ["```{eval-rst}", f".. automodule:: approx_attention.{package}", "   :no-members:", "```", ""]
    for name in package_names(package):
        lines += [*_directives(f"approx_attention.{package}.{name}"), ""]
    return "\n".join(lines)


def _directives(name: str) -> list[str]:
    if name in DATA:
        return ["```{eval-rst}", f".. py:data:: {name}", "", f"   {DATA[name]}", "```"]
    kind = "class" if inspect.isclass(public_object(name)) else "function"
    members = ["   :members:", "   :special-members: __call__"] if kind == "class" else []
    return ["```{eval-rst}", f".. auto{kind}:: {name}", *members, "```"]


def results_pages(docs: pathlib.Path) -> dict[str, str]:
    """The committed reports as pages, and the list of them."""
    scaling = ["../scaling"] if (docs / "scaling.md").exists() else []
    toctree = ["```{toctree}", ":maxdepth: 1", "", "experiments", "benchmarks", *scaling, "```", ""]
    about = "What papers claim and what was measured, and what everything costs. The claims by family of studies:"
    include = "```{{include}} ../../{folder}/RESULTS.md\n:relative-images:\n```\n"
    return {
        "index": "\n".join(["# Results", "", *toctree, about, "", verdict_table()]),
        "experiments": include.format(folder="experiments"),
        "benchmarks": include.format(folder="benchmarks"),
    }


# Sources.


def reference_section(thing: Any) -> str:
    """The text of the section Reference of a docstring."""
    match = re.search(r"^Reference:\n((?:    .*\n?|\n)+)", inspect.getdoc(thing) or "", re.MULTILINE)
    return " ".join(match.group(1).split()) if match else ""


def sources(method: Method) -> list[str]:
    """The citation keys of a method's docstring."""
    return list(dict.fromkeys(re.findall(r":cite:p:`(\w+)`", reference_section(method.function))))


# Tables of the guide.


def sample_table() -> str:
    """Every row of the comparison on the sample, the least error first."""
    document = comparison()
    rows = [
        [
            f"`{row['method']}`" if row["is_exact"] or row["method"] not in BASELINES else f"*{row['method']}*",
            "" if row["size"] is None else str(row["size"]),
            f"{_kib_held(row, document):.4g}",
            f"{row['relative_error']:.2g}",
            "" if row["far_error"] is None else f"{row['far_error']:.2g}",
            f"{row['speedup']:.2f}x",
        ]
        for row in sorted(document["rows"], key=lambda row: row["relative_error"])
        if not row["is_exact"]
    ]
    header = ["method", "size", "cache (KiB)", "relative error", "far error", "speed over best exact"]
    exact = next(row for row in document["rows"] if row["is_exact"])
    return (
        markdown_table(header, rows)
        + f"\n\n{document['shapes']['key'][1]} tokens, {machine(document)}. Far is beyond a window of "
        f"{document['settings']['window_size']}. Baselines are in italics. Exact attention "
        f"holds {exact['held_bytes'] / 1024:.4g} KiB.\n"
    )


def needs_table() -> str:
    """Which methods have what a task may need."""
    needs: dict[str, Callable[[Capabilities], bool]] = {
        "a causal form": lambda can: can.causal,
        "decoding in a cache of a size that is fixed before": lambda can: can.decode,
        "queries of another sequence": lambda can: can.cross,
        "a mask or bias of every pair": lambda can: can.dense_mask,
        "answers that merge with others": lambda can: can.normalizer,
        "answers that average values": lambda can: can.convex,
        "no randomness": lambda can: not can.needs_key,
        "time and memory below T x S": lambda can: can.subquadratic,
        "arrays to learn": lambda can: can.trainable,
        "exact attention at full size": lambda can: can.exact_limit,
    }
    links = {need: [f"[`{name}`](../methods/{name}.md)" for name, method in METHODS.items() if has(method.capabilities)]
             for need, has in needs.items()}  # fmt: skip
    return _left_table(["need", "methods that have it"], [[need, ", ".join(names)] for need, names in links.items()])


# Those of experiments.claims, whose packages the site does not need.
VERDICTS = ("reproduced", "ordering only", "inconclusive", "not reproduced", "not run")


def verdict_table() -> str:
    """How many claims of each family of studies hold, and those that do not."""
    rows = verdicts()
    counts = {family: Counter(verdict for f, verdict, _ in rows if f == family) for family, _, _ in rows}
    table = markdown_table(
        ["studies", *VERDICTS],
        [[f"`{family}`", *(str(count[kind]) for kind in VERDICTS)] for family, count in counts.items()],
    )
    failed = [f"- {claim} (`{family}`)" for family, verdict, claim in rows if verdict == "not reproduced"]
    return "\n".join([table, "", "Not reproduced:", "", *failed, ""])


def verdicts() -> list[tuple[str, str, str]]:
    """The family, verdict and statement of every claim, from the table of experiments/RESULTS.md."""
    text = (ROOT / "experiments" / "RESULTS.md").read_text(encoding="utf-8")
    header, _, *lines = [line for line in text.split("\n## ")[0].splitlines() if line.startswith("|")]
    columns = [cell.strip() for cell in header.strip("|").split("|")]
    claims = [
        dict(zip(columns, (cell.strip() for cell in line.strip("|").split(" | ")), strict=True)) for line in lines
    ]
    return [
        (
            re.findall(r"configs/(\w+)/", claim["setting"])[0],
            "".join(re.findall(r"(?:\*\*)?([a-z ]+?)(?:\*\*)?(?:;|$)", claim["verdict"])[:1]),
            claim["claim"],
        )
        for claim in claims
    ]


def _left_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


MEASURED: Mapping[str, Callable[[], str]] = {"sample": sample_table, "needs": needs_table, "verdicts": verdict_table}


if __name__ == "__main__":
    write()
