"""``python -m docs.check SITE``: checks the internal links of a built site, and lists the external ones."""

import html.parser
import pathlib
import re
import sys
from collections.abc import Iterable
from urllib.parse import unquote, urlsplit

ROOT = pathlib.Path(__file__).parent.parent
# Paths that a fresh checkout does not have: a reader's commands make them.
MADE_BY_RUNNING = ("out/", "docs/_build/")


class Page(html.parser.HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Record the links of a tag and the anchors that it defines."""
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append(value)
            elif name in ("id", "name") and value:
                self.anchors.add(value)


def broken_links(site: pathlib.Path) -> tuple[list[str], list[str]]:
    """The broken internal links of a site, and all its external links."""
    pages = {file: Page(file.read_text(encoding="utf-8")) for file in site.rglob("*.html")}
    broken, external = [], set()
    for file, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                external |= {link} if parts.scheme in ("http", "https") else set()
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                broken.append(f"{file.relative_to(site)}: {link} does not exist")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                broken.append(f"{file.relative_to(site)}: {link} has no such anchor")
    return broken, sorted(external)


def missing_files(text: str, folders: Iterable[pathlib.Path]) -> list[str]:
    """The files that a Markdown text links to or quotes and that none of the folders has."""
    content = re.sub(r"^(`{3,}|:{3,}).*?^\1", "", text, flags=re.DOTALL | re.MULTILINE)
    linked = re.findall(r"\]\((?!https?:)([^)#\s]+)(?: \"[^\"]*\")?\)", content)
    quoted = re.findall(r"`((?:[a-z_]+/)+[a-zA-Z_.]*)`", content)
    return [
        name
        for name in linked + quoted
        if not name.startswith(MADE_BY_RUNNING) and not any((folder / name).exists() for folder in folders)
    ]


def main(site: pathlib.Path) -> int:
    """Print the broken links and the number of external links."""
    broken, external = broken_links(site)
    texts = [file for file in (ROOT / "docs").rglob("*.md") if "_build" not in file.parts]
    broken += [
        f"{file.relative_to(ROOT)}: no file {name}"
        for file in texts
        for name in missing_files(file.read_text(encoding="utf-8"), (file.parent, ROOT))
    ]
    print("\n".join([*broken, f"{len(broken)} broken links; external links, not followed:", *external]))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1]).resolve()))
