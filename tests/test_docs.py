"""What a newcomer reads is true: generated parts are fresh, examples run, links lead somewhere, import stays light."""

import pathlib
import re
import subprocess
import sys

import pytest

from benchmarks import report, wire
from tests import readme

ROOT = pathlib.Path(__file__).parent.parent
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "RESULTS.md", wire.PAGE]
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", readme.README.read_text(encoding="utf-8"), re.DOTALL)


def test_the_generated_parts_of_the_readme_are_fresh():
    text = readme.README.read_text(encoding="utf-8")
    assert text == readme.regenerate(text), "README.md is stale: run `make readme`"


def test_the_benchmark_results_follow_from_the_measurements():
    text = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    assert text == report.render(ROOT / "benchmarks" / "results"), "stale: run `python -m benchmarks report`"


def test_the_page_on_devices_follows_from_the_model():
    text = wire.PAGE.read_text(encoding="utf-8")
    assert text == wire.page(ROOT / "benchmarks" / "results"), "stale: run `python -m benchmarks report`"


@pytest.mark.parametrize("block", range(len(PYTHON_BLOCKS)))
def test_the_examples_of_the_readme_run(block):
    exec(compile(PYTHON_BLOCKS[block], f"README.md block {block}", "exec"), {})


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.name)
def test_files_that_the_texts_name_exist(text):
    content = re.sub(r"```.*?```", "", text.read_text(encoding="utf-8"), flags=re.DOTALL)
    linked = re.findall(r"\]\((?!https?:)([^)#]+)\)", content)
    quoted = re.findall(r"`((?:[a-z_]+/)+[a-zA-Z_.]*)`", content)
    made_by_running = ("out/",)
    missing = [name for name in linked + quoted if not (ROOT / name).exists() and not name.startswith(made_by_running)]
    assert not missing


def test_importing_the_package_loads_neither_flax_nor_matplotlib():
    code = "import sys, approx_attention; print([m for m in ('flax', 'matplotlib', 'optax') if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
