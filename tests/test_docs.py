"""What a newcomer reads is true: generated parts are fresh, examples run, links lead somewhere, import stays light."""

import pathlib
import re
import subprocess
import sys

import pytest

from benchmarks import report
from tests import readme

ROOT = pathlib.Path(__file__).parent.parent
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "RESULTS.md"]
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", readme.README.read_text(encoding="utf-8"), re.DOTALL)


def test_the_generated_parts_of_the_readme_are_fresh():
    text = readme.README.read_text(encoding="utf-8")
    assert text == readme.regenerate(text), "README.md is stale: run `make readme`"


def test_the_benchmark_results_follow_from_the_measurements():
    text = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    assert text == report.render(ROOT / "benchmarks" / "results"), "stale: run `python -m benchmarks report`"


def test_break_even_of_a_run_with_decoding_and_arms_that_were_given_up():
    def row(arm, length, seconds, is_causal):
        form = {"is_causal": is_causal, "backward": False, "temp_bytes": 8 * length}
        return {"arm": arm, "length": length, "seconds": seconds, **form}

    rows = [
        row(*entry, is_causal)
        for is_causal in (False, True)
        for entry in [
            ("exact dense", 512, 1.0),
            ("exact dense", 2048, 20.0),
            ("exact blocked", 512, 2.0),
            ("exact blocked", 2048, 16.0),
            ("favor", 512, 4.0),
            ("favor", 2048, 15.0),
            ("lsh_top_k", 512, 9.0),
        ]
        if not (is_causal and entry[0] == "lsh_top_k")
    ]
    decode = [("exact buffer", 512, 1e-6), ("exact buffer", 2048, 4e-6), ("favor", 512, 5e-7), ("favor", 2048, 5e-7)]
    document = {
        "num_heads": 8,
        "head_dim": 64,
        "size": 256,
        "sizes": {"favor": 256, "lsh_top_k": 32, "mean_value": None},
        "peak_flops_per_second": {"jax": 1e11},
        "environment": {"processor": "P", "processor_cores": 2, "backend": "cpu", "python": "3", "jax": "0"},
        "rows": rows,
        "decode": {
            "tokens": 128,
            "rows": [{"arm": arm, "length": length, "seconds": seconds} for arm, length, seconds in decode],
        },
    }
    text = readme._break_even_table(document)
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in text.splitlines()[2:]
    }
    assert cells["`favor`"] == ["2048", "2048", "", "", "512"]
    assert cells["`lsh_top_k`"] == ["not measured to be", "", "", "", ""]
    assert "256 (`lsh_top_k`: 32)" in text


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
