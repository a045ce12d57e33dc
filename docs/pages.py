"""The pages of the site that are made from the registry and the measurements, at every build.

``methods/`` has a page per method, ``api/`` one per part of the public API, ``results/`` the committed reports, and
``measured/`` tables that the guide includes.
"""

import importlib.util
import inspect
import pathlib
import re
from collections.abc import Callable, Mapping

from approx_attention.evaluation import capability_table, markdown_table
from approx_attention.registry import METHODS, Method
from benchmarks.report import machine
from docs.comparisons import COMPARISONS, DOCS, comparison, draw_error, kib_held, measured_methods
from docs.names import (
    DATA,
    PACKAGES,
    TOPICS,
    first_line,
    method_names,
    package_names,
    places,
    public_name,
    public_object,
    sources,
)
from docs.tables import capability_rows, cost_table, needs_table, sample_table, verdict_table


def write(docs: pathlib.Path = DOCS) -> None:
    """Make every generated page anew, touching only what has changed."""
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


def _sources(method: Method) -> str:
    keys = ",".join(sources(method))
    return f"Source: {method.reference} {{cite:p}}`{keys}`." if keys else f"Source: {method.reference}."


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
            f"{kib_held(row, document):.4g}",
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
        markdown_table(["name", ""], rows, others="left"),
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
    if importlib.util.find_spec(f"approx_attention.{topic}"):  # so that the package itself can be referred to
        lines += ["```{eval-rst}", f".. automodule:: approx_attention.{topic}", "   :no-members:", "```", ""]
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
    experiments = pathlib.Path(__file__).parent.parent / "experiments"
    studies = sorted(page.parent.name for page in experiments.glob("*/RESULTS.md"))
    toctree = ["```{toctree}", ":maxdepth: 1", "", "experiments", *studies, "benchmarks", *scaling, "```", ""]
    about = "What papers claim and what was measured, and what everything costs. The claims by family of studies:"
    front = (experiments / "RESULTS.md").read_text(encoding="utf-8").replace("/RESULTS.md)", ".md)")
    of_families = {
        family: (experiments / family / "RESULTS.md")
        .read_text(encoding="utf-8")
        .replace("](../", "](../../experiments/")
        for family in studies
    }
    return {
        "index": "\n".join(["# Results", "", *toctree, about, "", verdict_table()]),
        "experiments": front,
        **of_families,
        "benchmarks": "```{include} ../../benchmarks/RESULTS.md\n:relative-images:\n```\n",
    }


MEASURED: Mapping[str, Callable[[], str]] = {"sample": sample_table, "needs": needs_table, "verdicts": verdict_table}


if __name__ == "__main__":
    write()
