"""The pages of the site that every build generates from the registry and the measurements.

``methods/`` has a page for each method, ``api/`` one for each package, ``results/`` the committed reports, and
``measured/`` tables that the guide includes.
"""

import inspect
import pathlib
import tomllib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from approx_attention.evaluation import markdown_table
from approx_attention.registry import METHODS
from benchmarks.report import machine
from docs import reports
from docs.comparisons import COMPARISONS, DOCS, comparison, draw_error, kib_held, measured_methods
from docs.names import (
    DATA,
    PACKAGES,
    first_line,
    method_names,
    package_names,
    public_name,
    public_object,
    sources,
)
from docs.tables import (
    capability_rows,
    cost_table,
    limits_table,
    losses,
    methods_table,
    sample_table,
    verdict_table,
)

TEXTS: dict[str, Any] = tomllib.loads((DOCS / "methods.toml").read_text(encoding="utf-8"))
FAMILIES: list[dict[str, Any]] = TEXTS["families"]
MEASURED: Mapping[str, Callable[[], str]] = {
    "sample": sample_table,
    "limits": limits_table,
    "verdicts": verdict_table,
}


def write(docs: pathlib.Path = DOCS) -> None:
    """Make every generated page again, and write only the files that change."""
    pages: dict[str, str] = {"methods/index.md": methods_index(), "api/index.md": api_index()}
    pages |= {f"methods/{name}.md": method_page(name) for name in METHODS}
    pages |= {f"api/{package}.md": package_page(package) for package in PACKAGES}
    pages |= {f"measured/{name}.md": make() for name, make in MEASURED.items()}
    pages |= {f"results/{name}.md": text for name, text in reports.pages(docs).items()}
    for folder in ("methods", "api", "measured", "results"):
        (docs / folder).mkdir(exist_ok=True)
        for stale in {file.relative_to(docs).as_posix() for file in (docs / folder).glob("*.md")} - set(pages):
            (docs / stale).unlink()
    for place, text in pages.items():
        _write_if_new(docs / place, text)
    newest = max(path.stat().st_mtime for path in (*COMPARISONS, DOCS / "comparisons.py"))
    for name, path in measured_methods().items():
        figure = docs / "methods" / f"{name}.svg"
        if not figure.exists() or figure.stat().st_mtime < newest:
            draw_error(name, comparison(path), figure)


def _write_if_new(path: pathlib.Path, text: str) -> None:
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def methods_index() -> str:
    """The methods by family, and the arguments that they share."""
    lines = ["# Methods", "", TEXTS["columns"], ""]
    for family in FAMILIES:
        lines += [f"## {family['title']}", "", family["about"], "", methods_table(family["methods"]), ""]
    shared = _rst(".. automodule:: approx_attention.methods", "   :no-members:")
    lines += ["## The data of measured losses", "", TEXTS["data"], "", "## Shared arguments", "", *shared, ""]
    placed = [name for family in FAMILIES for name in family["methods"]]
    lines += [*_directives("approx_attention.METHODS"), "", *_toctree(dict.fromkeys([*placed, *METHODS]))]
    return "\n".join(lines)


def method_page(name: str) -> str:
    """The page of a method, from the registry, the measurements and the docstrings."""
    method = METHODS[name]
    advice = next((family["methods"][name] for family in FAMILIES if name in family["methods"]), {})
    lines = [f"# `{name}`", "", *_rst(first_line(method.function)), ""]
    if advice:
        lines += [f"**When to use it**: {advice['use']}", "", f"**When not**: {advice['avoid']}", ""]
    if lost := losses().get(name):
        data = dict(zip(("the mean of the values", "a local window"), lost, strict=True))
        told = [f"no better than {trivial} on {where}" for trivial, where in data.items() if where != "none"]
        links = "[the data](index.md#the-data-of-measured-losses), [the errors](../results/whole_picture.md)"
        lines += [f"**Measured losses**: {'; '.join(told) or 'none'} ({links}).", ""]
    if keys := sources(method):
        lines += [f"**Sources**: {{cite:t}}`{','.join(keys)}`.", ""]
    lines += [*_directives(f"approx_attention.{public_name(method.function)}"), ""]
    lines += ["## Measured error", "", *_measured(name), ""]
    lines += ["## Cost", "", cost_table(method), ""]
    lines += ["## Capabilities", "", capability_rows(method), ""]
    if companions := [part for part in method_names(name) if part != public_name(method.function)]:
        lines += ["## Related functions", ""]
        for part in companions:
            lines += [*_directives(f"approx_attention.{part}"), ""]
    return "\n".join(lines)


def _measured(name: str) -> list[str]:
    path = measured_methods().get(name, COMPARISONS[0])
    document = comparison(path)
    rows = [row for row in document["rows"] if row["method"] == name]
    if not rows:
        return ["Not measured on the sample yet: `make sample-errors` does it."]
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
    header = ["size", "cache (KiB)", "relative error", "far error", "ms", "speed over exact"]
    figure = (
        []
        if METHODS[name] is METHODS["exact"]
        else [
            f"```{{figure}} {name}.svg",
            f":alt: Relative error of {name} against cache bytes, among all methods of the comparison",
            "",
            f"Relative error against cache bytes on the shipped sample ({kind}, {document['shapes']['key'][1]} "
            "tokens); below and to the left is better. A method without a cache has the bytes of all keys and values.",
            "```",
            "",
        ]
    )
    place = path.relative_to(DOCS.parent).as_posix()
    about = f"Means over {seeds} seeds where the method is random. {machine(document)}, from `{place}`."
    return [*figure, markdown_table(header, held), "", about]


def api_index() -> str:
    """The index of the packages, with a link to the page of each."""
    rows = [[f"[`{_dotted(package)}`]({package}.md)", about] for package, (about, _) in PACKAGES.items()]
    lines = ["# API", "", markdown_table(["package", ""], rows, others="left"), ""]
    lines += ["The methods have [one page each](../methods/index.md). A name that `approx_attention` exports too is"]
    lines += ["shown without its package. The tests compare all names and signatures to a committed list.", ""]
    return "\n".join([*lines, *_toctree(f"{package} <{package}>" for package in PACKAGES)])


def package_page(package: str) -> str:
    """The page of a package: a table of all public names, and their documentation."""
    names = package_names(package)
    lines = [f"# `{_dotted(package)}`", ""]
    lines += [*_rst(f".. automodule:: {_dotted(package)}", "   :no-members:"), ""]
    table = [f"   {name}" for name in names if f"approx_attention.{name}" not in DATA]
    lines += [*_rst(".. currentmodule:: approx_attention", "", ".. autosummary::", "   :nosignatures:", "", *table), ""]
    for name in names:
        lines += [*_directives(f"approx_attention.{name}"), ""]
    return "\n".join(lines)


def _dotted(package: str) -> str:
    return package if package == "approx_attention" else f"approx_attention.{package}"


def _rst(*lines: str) -> list[str]:
    return ["```{eval-rst}", *lines, "```"]


def _toctree(pages: Iterable[str]) -> list[str]:
    return ["```{toctree}", ":hidden:", "", *pages, "```", ""]


def _directives(name: str) -> list[str]:
    if name in DATA:
        return _rst(f".. py:data:: {name}", "", f"   {DATA[name]}")
    kind = "class" if inspect.isclass(public_object(name)) else "function"
    return _rst(
        f".. auto{kind}:: {name}", *(["   :members:", "   :special-members: __call__"] if kind == "class" else [])
    )


if __name__ == "__main__":
    write()
