"""Files of experiments that were damaged or cut short are named in one line with their remedy."""

import json
import pathlib
import shutil
import signal

import pytest

from experiments import __main__ as cli
from experiments import checkpoints, claims, report, runs
from experiments.config import ConfigError, read_config_file, resolve
from experiments.run_files import read_json
from experiments.runs import CONFIGS, Run, check_all, results_of
from experiments.tables import tables
from experiments.training import _Log
from experiments.whole_picture.comparison import FIGURES, kept
from tests.experiments.test_experiment_faults import _config

pytestmark = pytest.mark.usefixtures("models")


DOCUMENT = {"arm": "exact", "seed": 0, "config": {}, "result": {}, "seconds": 1.0, "environment": {}}
DAMAGE = {
    "empty": b"", "cut short": b'{"arm": "exa', "a list": b"[]", "no text": b"\xff\xfe\x00", "deep": b"[" * 100_000,
    "long": b'{"seed": ' + b"9" * 5000 + b"}", "null": b"null",
}  # fmt: skip


def _damaged(path, content):
    if content is None:
        path.unlink(missing_ok=True)
        path.mkdir()
    else:
        path.write_bytes(content)


@pytest.mark.parametrize("content", [*DAMAGE.values(), None], ids=[*DAMAGE, "a directory"])
def test_damaged_json_is_named_with_its_remedy(tmp_path, content):
    path = tmp_path / "result.json"
    _damaged(path, content)
    with pytest.raises(ConfigError, match=r"result\.json .*; remove it, and the run is done again") as error:
        read_json(path, runs.Result, "the run is done again")
    assert "\n" not in str(error.value)
    (tmp_path / "methods.json").write_text('{"favor": {"bits": null}}')
    with pytest.raises(ConfigError, match=r"methods.json is damaged; remove it, .* \(favor.bits is no number\)"):
        kept(tmp_path, FIGURES)


def test_a_damaged_result_stops_run_sweep_list_and_report(tmp_path, never_run, command, monkeypatch):
    (tmp_path / "configs").mkdir()
    path, out = _config(tmp_path / "configs"), tmp_path / "out"
    assert command("run", path, "--out", out)[0] == 0
    done = out / "study" / "exact-seed0" / "result.json"
    whole = json.loads(done.read_text())
    texts = [json.dumps({name: x for name, x in whole.items() if name != left_out}) for left_out in whole]
    texts += [json.dumps({**whole, name: [None]}) for name in whole]
    texts += [json.dumps({**whole, **change}) for change in ({"arm": "local"}, {"seed": 1}, {"seconds": -1})]
    texts += [json.dumps({**whole, "config": {**whole["config"], "seed": 3}})]
    for text in texts:
        done.write_text(text)
        for name in ("run", "sweep"):
            code, out_text, err = command(name, path, "--out", out)
            assert (code, out_text) == (2, "")
            assert str(done) in err
            assert "remove it" in err
    assert never_run == ["exact-seed0"]
    monkeypatch.setattr(cli, "CONFIGS", path.parent)
    monkeypatch.setattr(cli, "RESULTS", out)
    done.write_text("{")
    code, _, err = command("list")
    assert code == 2
    assert str(done) in err


@pytest.mark.parametrize("study", ["harness/language_model", "harness/swap_in", "low_rank/sketch", "coresets/latency"])
def test_a_report_names_the_one_damaged_file_among_many(tmp_path, study):
    root = CONFIGS.parent / "experiments"
    shutil.copytree(root / "results" / study, tmp_path / study, ignore=shutil.ignore_patterns("*.jsonl"))
    file = read_config_file(CONFIGS / study / "cpu.yaml")
    all_runs = results_of(file, tmp_path)
    chosen = all_runs[-1]
    path = runs.run_directory(file, chosen["arm"], chosen["seed"], tmp_path) / "result.json"
    whole = json.loads(path.read_text())
    for changed in ({**whole, "result": {}}, {**whole, "result": dict.fromkeys(whole["result"], "x")}):
        path.write_text(json.dumps(changed))
        damaged = results_of(file, tmp_path)
        with pytest.raises(ConfigError, match="result.json is damaged; remove it") as error:  # noqa: SIM117
            with report._naming_the_damaged(file, damaged, tmp_path):
                list(tables(file.experiment, damaged))
        assert str(path) in str(error.value)
    path.write_text(json.dumps({**whole, "environment": {}}))
    damaged = results_of(file, tmp_path)
    with pytest.raises(ConfigError, match="result.json is damaged; remove it") as error:  # noqa: SIM117
        with report._naming_the_damaged(file, damaged, tmp_path):
            list(report._study(file, damaged))
    assert str(path) in str(error.value)


@pytest.mark.parametrize("result", [{}, {"test": 3}, {"test": {"bits": "x"}}, {"test": {"bits": True}}, {"test": []}])
def test_a_claim_whose_figure_is_not_there_names_the_file(tmp_path, result):
    study = "harness/language_model"
    shutil.copytree(CONFIGS.parent / "experiments/results" / study, tmp_path / study)
    path = tmp_path / study / "cpu" / "favor-seed1" / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "result": result}))
    record = {
        "id": "a", "paper": "p", "where": "w", "statement": "s", "claimed": "c", "study": study,
        "metric": {"arm": "favor", "value": "test.bits"}, "reproduced": {"at_least": 0.0},
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"favor-seed1/result\.json: the results have no.*remove the file"):
        claims.judge(resolve(claims.Claim, record, {}, "claim"), tmp_path)


@pytest.mark.parametrize("text", ["", "a: 1\n", "- 3\n", "- {id: &a a, id: b}\n", "- {id: a, papre: b}\n", "[" * 99])
def test_claims_that_are_none(tmp_path, text):
    path = tmp_path / "claims.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="claims.yaml"):
        claims.read_claims(path)


RECORDS = '{"step": 2, "loss": 1.0}\n{"step": 4, "loss": NaN}\n'


@pytest.mark.parametrize(
    "content",
    [b"x\n", b"[1]\n", b"null\n", b"{}\n", b'{"step": "2"}\n', b'{"step": NaN}\n', b'{"step": true}\n', b"\xff\n",
     b'{"step": -2}\n', b"[" * 50_000 + b"\n", b"\n", b'{"step"\n' + RECORDS.encode(), None],
)  # fmt: skip
def test_a_damaged_log_is_named_with_its_remedy(tmp_path, content):
    path = tmp_path / "metrics.jsonl"
    _damaged(path, content)
    with pytest.raises(ConfigError, match="metrics.jsonl is damaged; remove it, and training goes on") as error:
        _Log(path).keep_until(4)
    assert "\n" not in str(error.value)
    assert content is None or path.read_bytes() == content


def test_a_log_that_was_cut_short_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for end in ('{"st', '{"step": '):
        path.write_text(RECORDS + end)
        with pytest.warns(UserWarning, match="metrics.jsonl: the last line is cut short and is left out"):
            _Log(path).keep_until(4)
        assert path.read_text() == RECORDS
    _Log(path).keep_until(3)
    assert path.read_text() == RECORDS.splitlines(keepends=True)[0]


def _checkpoint(directory, config, step):
    folder = directory / str(step)
    (folder / "state").mkdir(parents=True)
    (folder / "state" / "data").write_bytes(b"weights" * 9)
    checkpoints.write_json(
        folder / "saved.json",
        {
            "settings": checkpoints.as_plain(config),
            "step": step,
            "sha256": {"state/data": checkpoints._sum(folder / "state" / "data")},
        },
    )
    return folder


def _flip(folder):
    content = bytearray((folder / "state" / "data").read_bytes())
    content[5] ^= 1
    (folder / "state" / "data").write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_flip, "the checksum of state/data is wrong"),
        (lambda folder: (folder / "state" / "data").write_bytes(b""), "the checksum of state/data is wrong"),
        (lambda folder: shutil.rmtree(folder / "state"), "it is empty"),
        (lambda folder: (folder / "state" / "data").rename(folder / "state" / "d"), "state/data is missing"),
        (lambda folder: (folder / "saved.json").write_text('{"st'), "saved.json is damaged"),
        (lambda folder: (folder / "saved.json").write_text("{}"), "saved.json is damaged"),
        ("seed", "it is of other settings: seed: 1 there, 0 now"),
        ("step", "it is of step 4"),
    ],
)
def test_a_damaged_checkpoint_is_put_aside_where_another_is_whole(tmp_path, damage, said):
    file = read_config_file(_config(tmp_path))
    config, other = (Run.of(file, "exact", seed, {}, tmp_path).config for seed in (0, 1))
    directory = tmp_path / "run" / "checkpoints"
    for number in (1, 2):
        whole = _checkpoint(directory, config, 4)
        last = _checkpoint(directory, other if damage == "seed" else config, 8)
        if damage == "step":
            shutil.rmtree(last)
            shutil.copytree(whole, last)
        elif damage != "seed":
            damage(last)
        if number == 1:
            with pytest.warns(UserWarning, match=f"checkpoint 8 cannot be read and is put aside .*{said}"):
                checkpoints.open_checkpoints(directory, config).close()
            assert sorted(path.name for path in directory.iterdir()) == ["4"]
            (aside,) = directory.parent.glob("damaged-8-*")
            assert aside.is_dir()
            shutil.rmtree(directory)
            continue
        shutil.rmtree(whole)
        with pytest.raises(ConfigError, match=f"checkpoints is damaged; remove it, and training begins anew .*{said}"):
            checkpoints.open_checkpoints(directory, config)
        assert last.exists()


def test_an_interrupt_waits_until_a_checkpoint_is_written(tmp_path):
    done = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012, SIM117
        with checkpoints._interrupts_after():
            signal.raise_signal(signal.SIGINT)
            done.append("written")
    assert done == ["written"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    # What a kill left of another is taken away.
    config = Run.of(read_config_file(_config(tmp_path)), "exact", 0, {}, tmp_path).config
    (tmp_path / "checkpoints" / "8.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    checkpoints.open_checkpoints(tmp_path / "checkpoints", config).close()
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_run_that_diverged_is_shown(tmp_path):
    study = "low_rank/sketch"
    file = read_config_file(CONFIGS / study / "cpu.yaml")
    found = results_of(file, CONFIGS.parent / "experiments" / "results")
    errors = found[0]["result"]["errors"]
    errors[next(iter(errors))] = dict.fromkeys(next(iter(errors.values())), float("nan"))
    assert any("nan ± nan" in table for table in tables(file.experiment, found))


def test_a_file_in_the_place_of_checkpoints(tmp_path):
    config = Run.of(read_config_file(_config(tmp_path)), "exact", 0, {}, tmp_path).config
    (tmp_path / "checkpoints").write_text("x")
    with pytest.raises(ConfigError, match="checkpoints is damaged; remove it"):
        checkpoints.open_checkpoints(tmp_path / "checkpoints", config)


def test_settings_that_were_damaged_name_their_file(tmp_path, never_run, command):
    path, out = _config(tmp_path), tmp_path / "out"
    assert command("run", path, "--out", out)[0] == 0
    held = out / "study" / "exact-seed0" / "config.yaml"
    whole = held.read_text()
    for text in (None, "", "[", "a: 1", whole.replace("steps: 8", "steps: 9"), whole.replace("0.002", ".nan")):
        held.unlink() if text is None else held.write_text(text)
        code, _, err = command("run", path, "--out", out)
        assert code == 2
        assert str(held.parent) in err
        assert "or choose --out" in err
    assert never_run == ["exact-seed0"]


def test_checks_of_a_sweep_leave_what_is_done_alone(tmp_path, never_run, command):
    file = read_config_file(_config(tmp_path))
    every = [Run.of(file, arm.name, seed, {}, tmp_path / "out") for arm in file.arms for seed in file.seeds]
    check_all(every)
    assert not (tmp_path / "out").exists()
    assert isinstance(every[0].directory, pathlib.Path)
