"""Verdicts and the report follow from result files alone."""

import json

import numpy as np
import pytest

from experiments import claims, report
from experiments.config import ConfigError, read_config_file, resolve
from experiments.runs import CONFIGS, Run

pytestmark = pytest.mark.usefixtures("models")


def _result(root, study, scale, arm, seed, result):
    directory = root / study / scale / f"{arm}-seed{seed}"
    directory.mkdir(parents=True)
    environment = {"backend": "cpu", "processor": "a processor", "device": "cpu"}
    document = {"arm": arm, "seed": seed, "result": result, "environment": environment, "seconds": 1.0}
    (directory / "result.json").write_text(json.dumps(document))


STUDY = "harness/language_model"
LOSS = {"arm": "favor", "value": "test.bits"}
RECORD = {
    "id": "a", "paper": "p", "where": "w", "statement": "s", "claimed": "c", "study": STUDY, "metric": LOSS,
    "against": {"arm": "exact", "value": "test.bits", "by": "difference"},
    "reproduced": {"at_least": 0.01}, "ordering": {"at_least": 0.0},
}  # fmt: skip


def _write_results(root, arm, figures, scale="cpu"):
    file = read_config_file(CONFIGS / STUDY / f"{scale}.yaml")
    for seed, figure in zip(file.seeds, figures, strict=True):
        run = Run.of(file, arm, seed, {}, root)
        plain = run.claim_directory()
        environment = {"backend": "cpu", "processor": scale, "device": "cpu"}
        document = {"arm": arm, "seed": seed, "config": plain, "environment": environment, "seconds": 1.0}
        (run.directory / "result.json").write_text(json.dumps({**document, "result": {"test": {"bits": figure}}}))


@pytest.mark.parametrize(
    ("changes", "favor", "verdict", "caveat"),
    [
        ({}, [2.2, 2.2, 2.2], "reproduced", ""),
        ({}, [2.005, 2.005, 2.005], "ordering only", ""),
        ({}, [1.9, 1.9, 1.9], "not reproduced", ""),
        ({}, None, "not run", ""),
        ({}, [2.1, 2.2, 1.8], "reproduced", "the interval of the figure reaches beyond"),
        ({}, [2.1, float("nan"), 2.2], "not reproduced", "a run diverged"),
        ({"against": {**RECORD["against"], "by": "ratio"}, "reproduced": {"at_most": 1.2}, "ordering": None},
         [2.2] * 3, "reproduced", ""),
        ({"against": None, "reproduced": {"at_most": 2.1}, "ordering": None}, [2.2] * 3, "not reproduced", ""),
        ({"caveat": {"metric": LOSS, "within": {"at_most": 2.1}, "says": "too large"}},
         [2.2] * 3, "inconclusive", "too large"),
        ({"caveat": {"metric": LOSS, "within": {"at_most": 1.8}, "says": "too large"}},
         [1.9] * 3, "not reproduced", "too large"),
    ],
)  # fmt: skip
def test_verdicts_follow_from_the_results(tmp_path, changes, favor, verdict, caveat):
    claim = resolve(claims.Claim, {**RECORD, **changes}, {}, "claim")
    _write_results(tmp_path, "exact", [2.0, 2.0, 2.0])
    if favor is not None:
        _write_results(tmp_path, "favor", favor)
    finding = claims.judge(claim, tmp_path)
    assert finding.verdict == verdict
    assert finding.caveat.startswith(caveat)
    assert bool(finding.caveat) == bool(caveat)


def test_an_ordering_is_a_direction():
    for by, ordering in (("difference", {"at_most": 0.05}), ("ratio", {"at_least": 0.9})):
        record = {**RECORD, "against": {**RECORD["against"], "by": by}, "ordering": ordering}
        with pytest.raises(ConfigError, match=f"the ordering of a {by} must lie on one side of"):
            resolve(claims.Claim, record, {}, "claim")


def test_the_larger_scale_decides_and_results_of_other_settings_do_not_count(tmp_path):
    claim = resolve(claims.Claim, RECORD, {}, "claim")
    for arm, figures in {"exact": [2.0] * 3, "favor": [2.2] * 3}.items():
        _write_results(tmp_path, arm, figures)
    _write_results(tmp_path, "exact", [2.0] * 3, "gpu")
    assert claims.judge(claim, tmp_path).scale == "cpu"
    _write_results(tmp_path, "favor", [1.0] * 3, "gpu")
    assert (claims.judge(claim, tmp_path).scale, claims.judge(claim, tmp_path).verdict) == ("gpu", "not reproduced")
    for path in tmp_path.rglob("gpu/favor-seed1/result.json"):
        document = json.loads(path.read_text())
        document["config"]["train"]["steps"] += 1
        path.write_text(json.dumps(document))
    assert claims.judge(claim, tmp_path).scale == "cpu"


def test_what_does_not_hold_says_what_was_tried():
    root = CONFIGS.parent / "experiments"
    found = [claims.judge(claim, root / "results") for claim in claims.read_claims(root / "claims.yaml")]
    assert not [f.claim.id for f in found if f.verdict in ("ordering only", "not reproduced") and not f.claim.tried]


def test_a_break_even_that_is_never_reached_is_infinite():
    assert claims._at({"methods": {"favor": {"break_even": None}}}, "methods.favor.break_even") == float("inf")
    assert np.isnan(claims._at({"slope": None}, "slope.value"))


@pytest.mark.slow
def test_the_report_is_written_with_its_plots(tmp_path):
    root = CONFIGS.parent / "experiments"
    for name in ("results", "claims.yaml"):
        (tmp_path / name).symlink_to(root / name)
    written = report.write(tmp_path)
    assert written[-1] == tmp_path / "RESULTS.md"
    assert written[-1].read_text() == report.render(root)
    for plot in written[:-1]:
        assert plot.read_bytes().startswith(b"\x89PNG")
        assert f"plots/{plot.name}" in written[-1].read_text()


def test_results_follow_from_the_committed_runs():
    root = CONFIGS.parent / "experiments"
    assert (root / "RESULTS.md").read_text() == report.render(root)
