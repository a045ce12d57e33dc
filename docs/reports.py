"""The committed reports as pages of the site: verdicts first, and tables that fit a screen."""

import pathlib

from docs.tables import ROOT, verdict_table

WIDE = "---\nhide-toc: true\n---\n\n"


def pages(docs: pathlib.Path) -> dict[str, str]:
    """The pages of the results, by name."""
    experiments = ROOT / "experiments"
    families = sorted(page.parent.name for page in experiments.glob("*/RESULTS.md"))
    scaling = ["../scaling"] if (docs / "scaling.md").exists() else []
    front = (experiments / "RESULTS.md").read_text(encoding="utf-8").replace("/RESULTS.md)", ".md)")
    head, _, rest = front.partition("\n## ")
    never = "## Never run" + rest.partition("## Never run")[2]
    title, *parts = head.strip().split("\n\n")
    first = sorted(parts, key=lambda part: ("|" not in part[:1], not part.startswith("Generated")))
    listed = ["```{toctree}", ":hidden:", "", *families, "benchmarks", *scaling, "```", ""]
    more = "[Benchmarks](benchmarks.md): times and memory of everything. " + (
        "[Scaling](../scaling.md): the bytes that devices send each other." if scaling else ""
    )
    made = {
        family: family_page((experiments / family / "RESULTS.md").read_text(encoding="utf-8")) for family in families
    }
    return {
        "index": "\n".join(
            [title, "", "\n\n".join(first), "", more, "", verdict_table(counts=False), never, "", *listed]
        ),
        **made,
        "benchmarks": WIDE + "```{include} ../../benchmarks/RESULTS.md\n:relative-images:\n```\n",
    }


def family_page(text: str) -> str:
    """A report of a family, with the places of its figures as the site has them."""
    return WIDE + text.replace("](../", "](../../experiments/")
