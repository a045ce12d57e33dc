"""Verdicts and pages are computed from result files alone."""

import functools
import json
import math
import statistics

import numpy as np
import pytest
from scipy import stats

from experiments import claims, report, show
from experiments.config import ConfigError, resolve
from experiments.results import Result
from experiments.studies import COMMITTED, ROOT, Places, every_study, has_scale, read_study

pytestmark = pytest.mark.usefixtures("models")

STUDY = "harness/language_model"
EXPERIMENTS = ROOT / "experiments"
LOSS = {"configuration": "favor", "figure": "bits"}
RECORD = {
    "id": "a", "paper": "p", "where": "w", "statement": "s", "claimed": "c", "study": STUDY, "metric": LOSS,
    "against": {"configuration": "exact", "figure": "bits", "by": "difference"},
    "reproduced": {"at_least": 0.01}, "ordering": {"at_least": 0.0},
}  # fmt: skip
SETTINGS = {"settings": "", "version": "x", "seconds": 1.0}


def _write_results(root, configuration, figures, scale="cpu"):
    study = read_study(STUDY, scale)
    machine = {"backend": "cpu", "processor": scale, "device": "cpu"}
    for run, figure in zip(
        [run for run in study.runs(Places(root, root)) if run.configuration == configuration], figures, strict=True
    ):
        facts = {"scale": scale, "configuration": configuration, "seed": run.seed, "machine": machine}
        run.file.add(Result(**{**SETTINGS, **facts, "settings": run.fingerprint, "records": [{"bits": figure}]}))


def _judged(root, changes):
    return claims.judge(resolve(claims.Claim, {**RECORD, **changes}, {}, "claim"), Places(root, root))


GROUND = {"metric": LOSS, "within": {"at_most": 2.1}, "says": "too large"}


@pytest.mark.parametrize(
    ("changes", "favor", "verdict", "ordering"),
    [
        ({}, [2.2, 2.2, 2.2], "reproduced", "reproduced"),
        ({}, [2.005, 2.005, 2.005], "not reproduced", "reproduced"),
        ({}, [1.9, 1.9, 1.9], "not reproduced", "not reproduced"),
        ({}, None, "not run", None),
        ({}, [2.1, 2.2, 1.8], "suggested", "suggested"),
        ({}, [2.1, float("nan"), 2.2], "no ground", "no ground"),
        ({"against": {**RECORD["against"], "by": "ratio"}, "reproduced": {"at_most": 1.2}, "ordering": None},
         [2.2] * 3, "reproduced", None),
        ({"against": None, "reproduced": {"at_most": 2.1}, "ordering": None}, [2.2] * 3, "not reproduced", None),
        ({"against": None, "ordering": None}, [math.inf] * 3, "reproduced", None),
        ({"against": None, "reproduced": {"at_least": 2.1}, "ordering": None}, [2.0, math.inf, 2.2], "suggested", None),
        ({"against": None, "ordering": None}, [2.0, math.inf, -math.inf], "no ground", None),
        ({"ground": [GROUND]}, [2.2] * 3, "no ground", "no ground"),
        ({"ground": [GROUND]}, [2.05] * 3, "reproduced", "reproduced"),
    ],
)  # fmt: skip
def test_verdicts_follow_from_the_results(tmp_path, changes, favor, verdict, ordering):
    _write_results(tmp_path, "exact", [2.0, 2.0, 2.0])
    if favor is not None:
        _write_results(tmp_path, "favor", favor)
    finding = _judged(tmp_path, changes)
    assert (finding.verdict, finding.ordering) == (verdict, ordering)
    assert bool(finding.grounds) == (verdict == "no ground")


def test_the_interval_is_that_of_students_t(tmp_path):
    values = [2.1, 2.3, 2.6]
    _write_results(tmp_path, "favor", values)
    mean, half = _judged(tmp_path, {"against": None, "ordering": None}).measured
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    np.testing.assert_allclose((mean - half, mean + half), (low, high))


def test_one_run_without_an_interval_suggests_and_no_more():
    metric = {"configuration": "bidirectional-forward", "where": {"method": "favor"}}
    record = {**RECORD, "study": "harness/long_context", "against": None, "ordering": None}
    found = {}
    for figure, certain in (("break_even", False), ("break_even", True), ("slope", False)):
        changes = {"metric": {**metric, "figure": figure}, "reproduced": {"at_least": 0.5}, "certain": certain}
        found[figure, certain] = claims.judge(resolve(claims.Claim, {**record, **changes}, {}, "claim")).verdict
    assert found == {
        ("break_even", False): "suggested", ("break_even", True): "reproduced", ("slope", False): "reproduced"
    }  # fmt: skip


def test_one_run_without_an_interval_refutes_nothing():
    metric = {"configuration": "bidirectional-forward", "figure": "break_even", "where": {"method": "favor"}}
    record = {**RECORD, "study": "harness/long_context", "against": None, "ordering": None, "metric": metric}
    for certain, verdict in ((False, "no ground"), (True, "not reproduced")):
        changes = {"reproduced": {"at_most": 0.5}, "certain": certain}
        finding = claims.judge(resolve(claims.Claim, {**record, **changes}, {}, "claim"))
        assert (finding.verdict, "one run outside the range" in finding.grounds) == (verdict, not certain)


def test_the_interval_of_one_seed_is_that_of_its_trials(tmp_path):
    study = read_study("sparse_patterns/log_law", "cpu")
    (run,) = [run for run in study.runs(Places(tmp_path, tmp_path)) if run.configuration == "k4"]
    trials = [643.0, 685.0, 739.0, 727.0, 600.0]
    # What has the figure is not the first record, and the trials are of the number of channels alone.
    other = {"curve": "projection", "tokens": 1024, "trials": [1.0, 2.0]}
    record = {"curve": "projection", "tokens": 1024, "channels": 685.0, "share": 0.7, "trials": trials}
    facts = {"scale": "cpu", "configuration": "k4", "seed": run.seed, "machine": {"backend": "cpu", "processor": ""}}
    run.file.add(Result(**{**SETTINGS, **facts, "settings": run.fingerprint, "records": [other, record]}))
    metric = {"configuration": "k4", "figure": "channels", "where": {"curve": "projection", "tokens": 1024}}
    half = stats.t.ppf(0.975, 4) * stats.sem(trials)
    for most, verdict in ((685 + half + 1, "reproduced"), (685 - half + 1, "suggested"), (512, "not reproduced")):
        changes = {"study": study.name, "metric": metric, "against": None, "ordering": None}
        finding = _judged(tmp_path, {**changes, "reproduced": {"at_most": most}})
        assert finding.verdict == verdict
        np.testing.assert_allclose(finding.measured, (685, half))
    share = {**changes, "metric": {**metric, "figure": "share"}, "reproduced": {"at_most": 1.0}}
    assert _judged(tmp_path, share).measured == (0.7, 0.0)


def test_sizes_that_were_not_reached_are_counted():
    texts = [show.reached(x) for x in ([12.0, 14.0], [3.25], [math.inf] * 2, [12.0, math.inf])]
    assert texts == ["13 ± 1", "3.2", "not reached", "not reached in 1 of 2"]


@pytest.mark.parametrize(
    ("measured", "shown"),
    [
        ((0.00352, 0.0277), "0.004 ± 0.028"), ((8.22, 4.604), "8.2 ± 4.6"), ((24242.9, 19781.1), "24243 ± 19781"),
        ((2.86e-7, 1.8e-8), "2.86e-07 ± 1.8e-08"), ((0.655, 0.0), "0.655"), ((54272.0, 0.0), "54272"),
        ((math.inf, 0.0), "not reached"), (None, ""),
    ],
)  # fmt: skip
def test_a_figure_has_the_digits_of_its_interval(measured, shown):
    finding = claims.Finding(resolve(claims.Claim, RECORD, {}, "claim"), "reproduced", measured=measured)
    assert report._figure(finding) == shown


def test_a_gate_is_asked_in_deviations_over_seeds(tmp_path):
    exact, favor = [2.0, 2.01, 2.02], [2.3, 2.32, 2.34]
    _write_results(tmp_path, "exact", exact)
    _write_results(tmp_path, "favor", favor)
    distance = (statistics.fmean(favor) - statistics.fmean(exact)) / statistics.stdev(favor)
    against = {**RECORD["against"], "by": "deviations"}
    for least, verdict in ((distance - 0.1, "reproduced"), (distance + 0.1, "no ground")):
        ground = {"metric": LOSS, "against": against, "within": {"at_least": least}, "says": "too near"}
        assert _judged(tmp_path, {"ground": [ground]}).verdict == verdict


@pytest.mark.parametrize("diverged", [math.nan, math.inf])
def test_a_run_that_diverged_shuts_a_gate(tmp_path, diverged):
    _write_results(tmp_path, "exact", [2.0, 2.01, 2.02])
    _write_results(tmp_path, "favor", [2.2, diverged, 2.2])
    against = {**RECORD["against"], "by": "deviations"}
    ground = {"metric": LOSS, "against": against, "within": {"at_least": 1}, "says": "too near"}
    finding = _judged(tmp_path, {"ground": [ground]})
    assert finding.verdict == "no ground"
    assert "too near (nan" in finding.grounds


def test_deviations_of_one_seed_are_refused(tmp_path):
    metric = {"configuration": "causal-forward", "figure": "slope"}
    record = {**RECORD, "study": "harness/long_context", "metric": metric, "against": {**metric, "by": "deviations"}}
    path = tmp_path / "claims.yaml"
    path.write_text(json.dumps([record]))
    with pytest.raises(ConfigError, match="claim 'a': deviations over seeds need two seeds or more, and .* has 1"):
        claims.read_claims(path)


def test_a_gap_is_a_share_of_that_of_a_third_configuration_seed_by_seed(tmp_path):
    for configuration, values in {"exact": [2.0, 2.1, 2.2], "favor": [2.1, 2.3, 2.3], "local": [3.0, 2.5, 2.4]}.items():
        _write_results(tmp_path, configuration, values)
    against = {**RECORD["against"], "by": "gap", "to": "local"}
    changes = {"against": against, "reproduced": {"at_most": 0.1}, "ordering": {"at_most": 1.0}}
    mean, _ = _judged(tmp_path, changes).measured
    np.testing.assert_allclose(mean, np.mean([0.1 / 1.0, 0.2 / 0.4, 0.1 / 0.2]))
    for wrong in ({"by": "gap"}, {"by": "ratio", "to": "local"}):
        with pytest.raises(ConfigError, match="a gap, and nothing else, is to another configuration"):
            _judged(tmp_path, {"against": {**RECORD["against"], **wrong}})
    (tmp_path / f"{STUDY}.jsonl").unlink()
    for configuration in ("exact", "favor"):
        _write_results(tmp_path, configuration, [2.0, 2.0, 2.0])
    assert _judged(tmp_path, changes).verdict == "not run"


def test_a_gate_stays_shut_where_both_sides_are_the_same_in_every_seed(tmp_path):
    for configuration in ("exact", "favor"):
        _write_results(tmp_path, configuration, [1.0, 1.0, 1.0])
    against = {**RECORD["against"], "by": "deviations"}
    ground = {"metric": LOSS, "against": against, "within": {"at_least": 10}, "says": "no lead"}
    assert _judged(tmp_path, {"ground": [ground]}).grounds.startswith("no lead (0,")


def test_an_ordering_is_a_direction():
    for by, ordering in (("difference", {"at_most": 0.05}), ("ratio", {"at_least": 0.9})):
        record = {**RECORD, "against": {**RECORD["against"], "by": by}, "ordering": ordering}
        with pytest.raises(ConfigError, match=f"the ordering of a {by} must lie on one side of"):
            resolve(claims.Claim, record, {}, "claim")


def test_the_larger_scale_decides_and_results_of_other_settings_do_not_count(tmp_path):
    for configuration, figures in {"exact": [2.0] * 3, "favor": [2.2] * 3}.items():
        _write_results(tmp_path, configuration, figures)
    _write_results(tmp_path, "exact", [2.0] * 3, "gpu")
    assert _judged(tmp_path, {}).study.scale == "cpu"
    _write_results(tmp_path, "favor", [1.0] * 3, "gpu")
    finding = _judged(tmp_path, {})
    assert (finding.study.scale, finding.verdict) == ("gpu", "not reproduced")
    path = tmp_path / f"{STUDY}.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    next(x for x in lines if (x["scale"], x["configuration"], x["seed"]) == ("gpu", "favor", 1))["settings"] = "other"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert _judged(tmp_path, {}).study.scale == "cpu"


@functools.cache
def committed():
    """What the committed runs say of every claim."""
    return [claims.judge(claim) for claim in claims.read_claims(EXPERIMENTS / "claims.yaml")]


@functools.cache
def committed_pages():
    return report.pages(EXPERIMENTS)


def test_what_does_not_hold_says_what_was_tried():
    assert not [f.claim.id for f in committed() if f.verdict == "not reproduced" and not f.claim.tried]


@pytest.mark.slow
def test_the_pages_are_written_with_their_plots(tmp_path):
    for name in ("results", "claims.yaml", "stories.yaml"):
        (tmp_path / name).symlink_to(EXPERIMENTS / name)
    written = report.write(tmp_path)
    texts = "".join(path.read_text() for path in written if path.suffix == ".md")
    for plot in (path for path in written if path.suffix == ".png"):
        assert plot.read_bytes().startswith(b"\x89PNG")
        assert f"plots/{plot.name}" in texts


def test_the_pages_follow_from_the_committed_runs():
    for name, text in committed_pages().items():
        assert (EXPERIMENTS / name).read_text() == text, f"{name} is stale: run `python -m experiments report`"


def test_a_page_begins_with_its_verdicts():
    texts = committed_pages()
    families = {finding.claim.study.partition("/")[0] for finding in committed()}
    for family in families:
        heads = [line for line in texts[f"{family}/RESULTS.md"].splitlines() if line.startswith("## ")]
        assert heads[:2] == ["## Verdicts", "## Sources and notes"]
        assert len(heads) > 2


def test_seeds_that_were_added_are_told():
    texts = committed_pages()
    added = [name for name in every_study("cpu") if read_study(name, "cpu").added_seeds]
    assert added
    for name in added:
        assert name in texts["RESULTS.md"].partition("seeds were added after results")[2].partition("\n")[0]
        told = f"seeds added: {read_study(name, 'cpu').added_seeds}"
        own = [finding for finding in committed() if finding.claim.study == name and finding.study]
        assert texts[f"{name.partition('/')[0]}/RESULTS.md"].count(told) >= len(own)


def test_every_result_on_file_is_of_a_run_of_today():
    for path in sorted(COMMITTED.results.rglob("*.jsonl")):
        name = path.relative_to(COMMITTED.results).with_suffix("").as_posix()
        scales = [scale for scale in ("cpu", "gpu") if has_scale(name, scale)]
        known = sum(len(read_study(name, scale).results()) for scale in scales)
        assert known == len(path.read_text().splitlines()), name
