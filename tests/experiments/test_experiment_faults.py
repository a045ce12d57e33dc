"""Bad configurations, files and directories of experiments give a one-line error and exit code 2."""

import fcntl
import os
import signal
import subprocess
import sys

import pytest
import yaml

from experiments import studies, trained
from experiments.config import ConfigError, as_plain, load_yaml, overridden, resolve
from experiments.run_files import locked
from experiments.studies import ROOT, every_study, read_study

pytestmark = pytest.mark.usefixtures("models")

TEXT = """\
module: experiments.trained
data: {name: copying, settings: {length: 8}}
model: {num_layers: 1, model_dim: 16, num_heads: 2, num_kv_heads: 1, head_dim: 8, hidden_dim: 16}
train: {steps: 8, batch: 2, checkpoint_every: 4, log_every: 2, evaluation_batches: 1}
configurations: {exact: {}, local: {attention: {method: local, settings: {window_size: 4}}}}
seeds: [0, 1]
smoke: {}
"""
SMOKE = ("--scale", "smoke")


def _config(folder, text=TEXT, name="study.yaml"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


PROJECTIONS = "{attention: {method: linformer, projections: {max_length: 9, frozn: 1}}}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must be a mapping, got None"),
        ("- 1\n", "must be a mapping, got [1]"),
        ("steps: 3\n", "has no scale 'smoke'; it has none"),
        ("steps: 3\ncpu: {}\n", "has no scale 'smoke'; it has cpu"),
        ("smoke: 3\n", "'smoke' must be a mapping, got 3"),
        ("module: 3\nsmoke: {}\n", "'module' must be a module of experiments, got 3"),
        ("module: experiments.nothing\nsmoke: {}\n", "'module' must be a module of experiments"),
        ("module: os.path\nsmoke: {}\n", "'module' must be a module of experiments"),
        ("module: experiments.config\nsmoke: {}\n", "is no study, it lacks run, table, figure"),
        ("module: experiments.trained\nx: 3\nsmoke: {x.y: 3}\n", "'x.y' goes through 'x', which is not a mapping"),
        ("smoke: {about: x}\n" + TEXT.replace("smoke: {}\n", ""), "'about' is a key of the whole file"),
        (b"module: \xff\n", "is not UTF-8 text"),
        (TEXT.encode("utf-16"), "is not UTF-8 text"),
        (b"a\x00b", "unacceptable character"),
        ("module: [\n", "line 2: while parsing"),
        (TEXT + "---\n", "found another document"),
        (TEXT + "seeds: [3]\n", "the key 'seeds' is there already, in line 6"),
        (TEXT.replace("exact: {}", "exact: {}, exact: {}"), "the key 'exact' is there already"),
        (TEXT + "sedes: [3]\n", "unknown key 'sedes'; did you mean 'seeds'?"),
        (TEXT.replace("batch", "btach"), "in 'train.btach': unknown key 'btach'; did you mean 'batch'?"),
        (TEXT.replace("exact: {}", f"exact: {PROJECTIONS}"), "unknown key 'frozn'; did you mean 'frozen'?"),
        (TEXT + "3: 4\n", "a key must be text, got '3'; put it in quotes"),
        (TEXT.replace("exact:", "yes:"), "a key must be text, got 'yes'; put it in quotes"),
        (TEXT.replace("steps: 8", "steps: 2020-13-45"), "'train.steps' is '2020-13-45': input should be"),
        (TEXT.replace("steps: 8", "steps: !!set {a}"), "could not determine a constructor"),
        (TEXT.replace("steps: 8", "steps: !!int x"), "a value cannot be read"),
        (TEXT.replace("batch: 2", "batch: .inf"), "line 4: a number must be finite, got .inf"),
        (TEXT.replace("batch: 2", "batch: 4294967296"), "a whole number must be within 32 bits, got 4294967296"),
        (TEXT.replace("steps: 8", "steps: !!python/object:os.system {}"), "could not determine a constructor"),
        (TEXT.replace("exact: {}", "exact: {seeds: [1]}"), "'seeds' is a key of the whole file, and no setting"),
        (TEXT.replace("head_dim: 8", "head_dim: 7"), "head_dim must be even"),
    ],
)  # fmt: skip
def test_configurations_that_are_none(tmp_path, never_run, command, text, said):
    path = _config(tmp_path, text)
    code, _, err = command("run", path, *SMOKE, "--out", tmp_path / "out")
    assert (code, never_run) == (2, [])
    assert str(path) in err
    assert said in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["list", "report"])
def test_a_file_among_the_studies_that_is_none_stops_the_commands_that_read_all(tmp_path, command, monkeypatch, name):
    monkeypatch.setattr(studies, "CONFIGS", tmp_path)
    path = _config(tmp_path, "")
    code, _, err = command(name)
    assert code == 2
    assert f"{path} must be a mapping, got None" in err


def test_a_module_that_cannot_be_imported_is_named_with_its_fault(tmp_path, command, monkeypatch):
    monkeypatch.setattr(studies.importlib, "import_module", lambda name: 1 // 0)
    code, _, err = command("run", _config(tmp_path), *SMOKE)
    assert code == 2
    assert "the module experiments.trained cannot be imported: ZeroDivisionError" in err


def test_aliases_are_written_out(tmp_path):
    path = _config(tmp_path, "a: &a {x: [1, 2]}\nb: *a\nc: {<<: *a, x: 3}\n")
    loaded = load_yaml(path)
    assert loaded == {"a": {"x": [1, 2]}, "b": {"x": [1, 2]}, "c": {"x": 3}}
    changed = overridden(loaded, {"a.x": 5}, "--set")
    assert (changed["a"], changed["b"]) == ({"x": 5}, {"x": [1, 2]})


NUMBERS = {
    "train.peak_learning_rate": [".nan", ".inf", "-1", "0", "true", "'nan'", "x", "null"],
    "train.weight_decay": [".nan", "-1", "true"],
    "train.warmup": ["1.5", "-1"],
    "train.clip_norm": ["0", "true"],
    "train.steps": ["0", "-1", "1" + 20 * "0", "true", "2.5", "'3'", "null", "2147483648"],
    "train.batch": ["0", "1" + 20 * "0"],
    "model.model_dim": ["0", "-4", "true", "1" + 20 * "0"],
    "model.rotary_base": [".nan", "0"],
    "data.settings.length": ["0", "-4", "true", "1" + 20 * "0", "x", "2.5"],
    "attention.settings.window_size": ["1" + 20 * "0", ".nan"],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in NUMBERS.items() for value in values])
def test_numbers_that_are_none(tmp_path, never_run, command, key, value):
    path = _config(tmp_path)
    code, _, err = command(
        "run", path, *SMOKE, "--configuration", "local", "--set", f"{key}={value}", "--out", tmp_path / "out"
    )
    assert (code, never_run) == (2, [])
    assert key.rpartition(".")[2] in err
    # The same value in the file.
    settings = yaml.safe_load(TEXT)
    settings["configurations"]["local"][key] = yaml.safe_load(value)
    assert (
        command(
            "run", _config(tmp_path, yaml.safe_dump(settings)), *SMOKE, "--configuration", "local", "--out", tmp_path
        )[0]
        == 2
    )


def test_every_number_of_every_configuration_is_bounded():
    for study in every_study("smoke"):
        run = read_study(study, "smoke").runs()[0]
        plain = as_plain(run.config)
        for name, value in plain.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                for bad in (True, float("nan"), -1, 10**20 if isinstance(value, int) else float("inf")):
                    with pytest.raises(ConfigError, match=name):
                        resolve(type(run.config), plain, {name: bad}, "file")


@pytest.mark.parametrize("seeds", ["[-1]", "[true]", "[1.5]", "[]", "5", "[4294967296]", "[1, 1]", "{0: 1}", "[a]"])
def test_seeds_that_are_none(tmp_path, never_run, command, seeds):
    code, _, err = command("sweep", _config(tmp_path, TEXT.replace("[0, 1]", seeds)), *SMOKE, "--out", tmp_path / "out")
    assert (code, never_run) == (2, [])
    assert "seeds" in err or "put it in quotes" in err
    assert command("run", _config(tmp_path), *SMOKE, "--seed", "-1")[0] == 2


NAMES = ["../x", "/x", "", ".", "..", "a/b", "a\\b", "a\0b", "x" * 101, "a b", ".a", "a:", "a\n", "\u00e4", "-a"]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_leave_their_folder(tmp_path, never_run, command, name):
    settings = yaml.safe_load(TEXT)
    path = _config(tmp_path, yaml.safe_dump({**settings, "configurations": {name: {}}}))
    code, _, err = command("run", path, *SMOKE, "--out", tmp_path / "out")
    assert (code, never_run) == (2, [])
    assert "cannot name files: a name has 1 to 100 of A-Z" in err
    assert [path.name for path in tmp_path.iterdir()] == ["study.yaml"]


def test_names_that_differ_in_case_only(tmp_path, never_run, command):
    path = _config(tmp_path, TEXT.replace("local:", "EXACT:"))
    code, _, err = command("sweep", path, *SMOKE, "--out", tmp_path / "out")
    assert (code, never_run) == (2, [])
    assert "'exact' and 'EXACT' name the same file where file names ignore case" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "{folder}/none.yaml"], "cannot be read: No such file"),
        (["run", "{folder}"], "cannot be read"),
        (["run", ""], "cannot be read"),
        (["run", "{config}", "--out", ""], "'' is no path"),
        (["run", "{config}", "--out", "a\0b"], "is no path"),
        (["run", "{config}", "--out", "{config}"], "cannot be read: Not a directory"),
        (["run", "{config}", "--configuration", ""], "unknown configuration ''"),
        (["run", "{config}", "--set", "train.steps=3", "--set", "train.steps=4"], "gives 'train.steps' twice"),
        (["run", "{config}", "--set", "train.steps=[[[["], "is not YAML"),
        (["capture", "{config}", "--to", ""], "'' is no path"),
        (["capture", "{config}", "--to", "{folder}/none/x.npz"], "is not there"),
        (["sample", "{config}", "--to", "{folder}/x.txt"], "must end in .npz"),
        (["capture-model", "nowhere:make", "--to", "{folder}/x.npz"], "cannot be imported"),
        (["capture-model", "os:getcwd", "--to", "{folder}/x.npz"], "must return (model, run)"),
    ],
)
def test_arguments_that_are_none(tmp_path, never_run, command, arguments, said):
    names = {"folder": tmp_path, "config": _config(tmp_path)}
    given = [argument.format(**names) if "{f" in argument or "{c" in argument else argument for argument in arguments]
    code, _, err = command(*given, *(() if given[0] == "capture-model" else SMOKE))
    assert (code, never_run) == (2, [])
    assert said in err


def test_a_sweep_finds_what_is_unfit_before_it_runs_anything(tmp_path, never_run, command):
    good, out = _config(tmp_path, TEXT.replace("[0, 1]", "[0]")), tmp_path / "out"
    for changed, said in (
        (TEXT.replace("window_size: 4", "window_size: -4"), "window_size must be at least 1, got -4"),
        (TEXT.replace("num_kv_heads: 1", "num_kv_heads: 3"), "key heads must divide query heads"),
        (TEXT.replace("length: 8", "length: 1"), "data 'copying' needs length >= 2"),
        (TEXT.replace("method: local", "method: lcal"), "unknown method 'lcal'"),
    ):
        bad = _config(tmp_path, changed, "bad.yaml")
        code, _, err = command("sweep", good, bad, *SMOKE, "--out", out)
        assert (code, never_run) == (2, [])
        assert str(bad) in err
        assert said in err
    other = tmp_path / "other"
    other.mkdir()
    good, same = _config(tmp_path), _config(other, TEXT.replace("steps: 8", "steps: 12"))
    code, _, err = command("sweep", good, same, *SMOKE, "--out", out)
    assert (code, never_run) == (2, [])
    assert "would hold two runs with different settings" in err
    assert command("sweep", good, good, *SMOKE, "--out", out)[0] == 0
    assert never_run == ["exact-seed0", "local-seed0", "exact-seed1", "local-seed1"]


def test_two_processes_do_not_share_a_directory(tmp_path, never_run, command):
    path, out = _config(tmp_path), tmp_path / "out"
    directory = out / "study" / "smoke" / "exact-seed0"
    holder = "import pathlib, sys, time; from experiments.run_files import locked; d = pathlib.Path(sys.argv[1])\n"
    holder += "with locked(d / 'run.lock', d): print('held', flush=True); time.sleep(600)"
    process = subprocess.Popen(
        [sys.executable, "-c", holder, str(directory)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        for arguments in (["run"], ["sweep"]):
            code, _, err = command(*arguments, path, *SMOKE, "--out", out)
            assert (code, never_run) == (2, [])
            assert f"{directory} is in use by another run (process {process.pid})" in err
        code, _, err = command("capture", path, *SMOKE, "--to", tmp_path / "x.npz", "--out", out)
        assert code == 2
        assert "in use" in err
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    # The lock of a killed process does not count.
    assert command("run", path, *SMOKE, "--out", out)[0] == 0
    assert never_run == ["exact-seed0"]


def test_a_lock_file_may_hold_anything(tmp_path):
    lock = tmp_path / "run.lock"
    lock.write_bytes(b"\xff 99999999\n")
    with locked(lock, tmp_path):
        assert lock.read_text() == f"{os.getpid()}\n"
        with pytest.raises(ConfigError, match="is in use by another run"), locked(lock, tmp_path):
            pass
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_an_interrupt_is_one_line(tmp_path, never_run, command, monkeypatch):
    def interrupted(config, directory, console):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trained, "run", interrupted)
        code, _, err = command("run", _config(tmp_path), *SMOKE, "--out", tmp_path / "out")
    assert (code, err) == (130, "experiments: interrupted; the same command goes on from what is done\n")
    assert command("run", _config(tmp_path), *SMOKE, "--out", tmp_path / "out")[0] == 0


@pytest.mark.parametrize(
    "error", [KeyError("x"), MemoryError("128 GiB"), OSError(28, "No space left"), AssertionError()]
)
def test_what_fails_within_a_run_is_one_line_and_keeps_its_traceback(tmp_path, never_run, command, monkeypatch, error):
    def failing(config, directory, console):
        raise error

    path, out = _config(tmp_path), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(trained, "run", failing)
        code, _, err = command("run", path, *SMOKE, "--out", out)
    trace = out / "study" / "smoke" / "exact-seed0" / "traceback.txt"
    assert code == 2
    assert f"{path}, configuration 'exact': {type(error).__name__}" in err
    assert str(trace) in err
    assert "Traceback" in trace.read_text()
    assert command("run", path, *SMOKE, "--out", out)[0] == 0
    assert not trace.exists()
