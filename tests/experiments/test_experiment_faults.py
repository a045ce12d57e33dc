"""What the experiments say of configurations, files and directories that cannot be used: one line, exit code 2."""

import fcntl
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest
import yaml

from experiments import __main__ as cli
from experiments import checkpoints, claims, report, runs
from experiments.config import ConfigError, load_yaml, read_config_file, resolve
from experiments.run_files import locked, read_json
from experiments.runs import CONFIGS, EXPERIMENTS, Run, check_all, results_of
from experiments.tables import tables
from experiments.training import TrainingConfig, _Log
from experiments.whole_picture.comparison import FIGURES, kept

pytestmark = pytest.mark.usefixtures("models")

TEXT = """\
experiment: quality
data: {name: copying, settings: {length: 8}}
model: {num_layers: 1, model_dim: 16, num_heads: 2, num_kv_heads: 1, head_dim: 8, hidden_dim: 16}
train: {steps: 8, batch: 2, checkpoint_every: 4, log_every: 2, evaluation_batches: 1}
arms: {exact: {}, local: {attention: {method: local, settings: {window_size: 4}}}}
seeds: [0, 1]
"""


@pytest.fixture
def never_run(monkeypatch):
    """Nothing is trained: what is run instead says so."""
    started = []
    quick = runs.Experiment(
        TrainingConfig, lambda config, directory, console: started.append(directory.name) or {"test": {}},
        EXPERIMENTS["quality"].trains,
    )  # fmt: skip
    monkeypatch.setattr(runs, "EXPERIMENTS", {**EXPERIMENTS, "quality": quick})
    return started


@pytest.fixture
def command(monkeypatch, capsys):
    """Calls the command line: its exit code, what it prints and what it says on stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["experiments", *map(str, arguments)])
        code = cli.main()
        out, err = capsys.readouterr()
        assert err.count("\n") == (1 if code else err.count("\n")), err
        return code, out, err

    return call


def _config(folder, text=TEXT, name="study.yaml"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


PROJECTIONS = "{attention: {method: linformer, projections: {max_length: 9, frozn: 1}}}"
BOMB = "a0: &a0 [1, 1, 1, 1]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must be a mapping with the key 'experiment', got nothing"),
        ("- 1\n", "must be a mapping with the key 'experiment', got a list"),
        ("steps: 3\n", "got the keys 'steps'"),
        ("experiment: 3\n", "'experiment' must be a name, got 3"),
        (b"experiment: \xff\n", "is not UTF-8 text"),
        (TEXT.encode("utf-16"), "is not UTF-8 text"),
        (b"a\x00b", "unacceptable character"),
        ("experiment: [\n", "line 2: while parsing"),
        (TEXT + "---\n", "found another document"),
        (BOMB + TEXT, "with its aliases written out it has more than"),
        ("x: &x [*x]\n" + TEXT, "line 1: an alias stands inside of what it names"),
        ("x: " + "[" * 20_000, "nested deeper than 32 levels"),
        ("x: " + "{a: " * 50 + "1" + "}" * 50, "nested deeper than 32 levels"),
        (TEXT + "seeds: [3]\n", "the key 'seeds' is there already, in line 6"),
        (TEXT.replace("exact: {}", "exact: {}, exact: {}"), "the key 'exact' is there already"),
        (TEXT + "sedes: [3]\n", "unknown key 'sedes'; did you mean 'seeds'?"),
        (TEXT.replace("batch", "btach"), "in 'train.btach': unknown key 'btach'; did you mean 'batch'?"),
        (TEXT.replace("exact: {}", f"exact: {PROJECTIONS}"), "unknown key 'frozn'; did you mean 'frozen'?"),
        (TEXT + "3: 4\n", "the key 3 must be text; put it in quotes"),
        (TEXT.replace("exact:", "yes:"), "the key True in 'arms' must be text"),
        (TEXT.replace("steps: 8", "steps: 2020-13-45"), "month must be in 1..12"),
        (TEXT.replace("steps: 8", "steps: 2020-12-05"), "'train.steps' must be text, a number"),
        (TEXT.replace("steps: 8", "steps: !!python/object:os.system {}"), "could not determine a constructor"),
        (TEXT.replace("exact: {}", "exact: {seeds: [1]}"), "'seeds' is a key of the whole file, and no setting"),
        (TEXT.replace("head_dim: 8", "head_dim: 7"), "head_dim must be even"),
        (b"#" * 1_000_001, "too long for a configuration"),
    ],
)  # fmt: skip
def test_configurations_that_are_none(tmp_path, never_run, command, text, said):
    path = _config(tmp_path, text)
    code, _, err = command("run", path, "--out", tmp_path / "out")
    assert (code, never_run) == (2, [])
    assert str(path) in err
    assert said in err
    assert not (tmp_path / "out").exists()


def test_aliases_within_bounds_are_written_out(tmp_path):
    path = _config(tmp_path, "a: &a {x: [1, 2]}\nb: *a\nc: {<<: *a, x: 3}\n")
    assert load_yaml(path) == {"a": {"x": [1, 2]}, "b": {"x": [1, 2]}, "c": {"x": 3}}


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
    code, _, err = command("run", path, "--arm", "local", "--set", f"{key}={value}", "--out", tmp_path / "out")
    assert (code, never_run) == (2, [])
    assert key.rpartition(".")[2] in err
    # The same in the file.
    settings = yaml.safe_load(TEXT)
    settings["arms"]["local"][key] = yaml.safe_load(value)
    assert command("run", _config(tmp_path, yaml.safe_dump(settings)), "--arm", "local", "--out", tmp_path)[0] == 2


def test_every_number_of_every_configuration_is_bounded():
    for path in sorted(CONFIGS.rglob("smoke.yaml")):
        file = read_config_file(path)
        run = Run.of(file, file.arms[0].name, file.seeds[0], {}, CONFIGS)
        plain = runs.as_plain(run.config)
        for name, value in plain.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                for bad in (True, float("nan"), -1, 10**20 if isinstance(value, int) else float("inf")):
                    with pytest.raises(ConfigError, match=name):
                        resolve(type(run.config), plain, {name: bad}, "file")


@pytest.mark.parametrize("seeds", ["[-1]", "[true]", "[1.5]", "[]", "5", "[4294967296]", "[1, 1]", "{0: 1}", "[a]"])
def test_seeds_that_are_none(tmp_path, never_run, command, seeds):
    code, _, err = command("sweep", _config(tmp_path, TEXT.replace("[0, 1]", seeds)), "--out", tmp_path / "out")
    assert (code, never_run) == (2, [])
    assert "seeds" in err or "put it in quotes" in err
    assert command("run", _config(tmp_path), "--seed", "-1")[0] == 2


NAMES = ["../x", "/x", "", ".", "..", "a/b", "a\\b", "a\0b", "x" * 101, "a b", ".a", "a:", "a\n", "\u00e4", "-a"]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_leave_their_folder(tmp_path, never_run, command, name):
    settings = yaml.safe_load(TEXT)
    code, _, err = command(
        "run", _config(tmp_path, yaml.safe_dump({**settings, "arms": {name: {}}})), "--out", tmp_path / "out"
    )
    assert (code, never_run) == (2, [])
    assert "cannot name files: a name has 1 to 100 of A-Z" in err
    assert [path.name for path in tmp_path.iterdir()] == ["study.yaml"]
    zoo = read_config_file(CONFIGS / "whole_picture" / "zoo" / "smoke.yaml")
    methods = {**zoo.settings["methods"], name: {}}
    with pytest.raises(ConfigError, match="cannot name files"):
        resolve(EXPERIMENTS["zoo"].config, {**zoo.settings, "methods": methods}, {}, "file")


def test_names_that_differ_in_case_only(tmp_path, never_run, command):
    path = _config(tmp_path, TEXT.replace("local:", "EXACT:"))
    code, _, err = command("sweep", path, "--out", tmp_path / "out")
    assert (code, never_run) == (2, [])
    assert "'exact' and 'EXACT' name the same file where file names ignore case" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "{folder}/none.yaml"], "cannot be read: No such file"),
        (["run", "{folder}"], "cannot be read: Is a directory"),
        (["run", ""], "'' is no path"),
        (["run", "{config}", "--out", ""], "'' is no path"),
        (["run", "{config}", "--out", "a\0b"], "is no path"),
        (["run", "{config}", "--out", "{config}"], "cannot be made: Not a directory; choose --out"),
        (["run", "{config}", "--arm", ""], "unknown arm ''"),
        (["run", "{config}", "--set", "train.steps=3", "--set", "train.steps=4"], "gives 'train.steps' twice"),
        (["run", "{config}", "--set", "train.steps=[[[["], "is not YAML"),
        (["run", "{config}", "--set", "x=" + "[" * 5000], "nested deeper"),
        (["capture", "{config}", "--to", ""], "'' is no path"),
        (["capture", "{config}", "--to", "{folder}/none/x.npz"], "is not there"),
        (["sample", "{config}", "--to", "{folder}/x.txt"], "must end in .npz"),
        (["capture-model", "nowhere:make", "--to", "{folder}/x.npz"], "cannot be imported"),
        (["capture-model", "os:getcwd", "--to", "{folder}/x.npz"], "must return (model, run)"),
    ],
)
def test_arguments_that_are_none(tmp_path, never_run, command, arguments, said):
    names = {"folder": tmp_path, "config": _config(tmp_path)}
    code, _, err = command(*(argument.format(**names) if "{f" in argument or "{c" in argument else argument
                             for argument in arguments))  # fmt: skip
    assert (code, never_run) == (2, [])
    assert said in err


def test_a_sweep_finds_what_is_unfit_before_it_runs_anything(tmp_path, never_run, command):
    good, out = _config(tmp_path), tmp_path / "out"
    for changed, said in (
        (TEXT.replace("window_size: 4", "window_size: -4"), "window_size must be at least 1, got -4"),
        (TEXT.replace("num_kv_heads: 1", "num_kv_heads: 3"), "key heads must divide query heads"),
        (TEXT.replace("length: 8", "length: 1"), "data 'copying' needs length >= 2"),
        (TEXT.replace("method: local", "method: lcal"), "unknown method 'lcal'"),
    ):
        bad = _config(tmp_path, changed, "bad.yaml")
        code, _, err = command("sweep", good, bad, "--out", out)
        assert (code, never_run) == (2, [])
        assert str(bad) in err
        assert said in err
    other = tmp_path / "other"
    other.mkdir()
    same = _config(other, TEXT.replace("steps: 8", "steps: 12"))
    code, _, err = command("sweep", good, same, "--out", out)
    assert (code, never_run) == (2, [])
    assert "would hold two runs with different settings" in err
    assert command("sweep", good, good, "--out", out)[0] == 0
    assert never_run == ["exact-seed0", "local-seed0", "exact-seed1", "local-seed1"]


def test_two_processes_do_not_share_a_directory(tmp_path, never_run, command):
    path, out = _config(tmp_path), tmp_path / "out"
    directory = out / "study" / "exact-seed0"
    holder = "import pathlib, sys, time; from experiments.run_files import locked; d = pathlib.Path(sys.argv[1])\n"
    holder += "with locked(d / 'run.lock', d): print('held', flush=True); time.sleep(600)"
    process = subprocess.Popen(
        [sys.executable, "-c", holder, str(directory)], cwd=CONFIGS.parent, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        for arguments in (["run"], ["sweep"]):
            code, _, err = command(*arguments, path, "--out", out)
            assert (code, never_run) == (2, [])
            assert f"{directory} is in use by another run (process {process.pid})" in err
        code, _, err = command("capture", path, "--to", tmp_path / "x.npz", "--out", out)
        assert code == 2
        assert "in use" in err
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    # The lock of a process that was killed is none.
    assert command("run", path, "--out", out)[0] == 0
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

    quick = runs.Experiment(TrainingConfig, interrupted)
    with monkeypatch.context() as patch:
        patch.setattr(runs, "EXPERIMENTS", {"quality": quick})
        code, _, err = command("run", _config(tmp_path), "--out", tmp_path / "out")
    assert (code, err) == (130, "experiments: interrupted; the same command goes on from what is done\n")
    assert command("run", _config(tmp_path), "--out", tmp_path / "out")[0] == 0


@pytest.mark.parametrize(
    "error", [KeyError("x"), MemoryError("128 GiB"), OSError(28, "No space left"), AssertionError()]
)
def test_what_fails_within_a_run_is_one_line_and_keeps_its_traceback(tmp_path, never_run, command, monkeypatch, error):
    def failing(config, directory, console):
        raise error

    path, out = _config(tmp_path), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(runs, "EXPERIMENTS", {"quality": runs.Experiment(TrainingConfig, failing)})
        code, _, err = command("run", path, "--out", out)
    trace = out / "study" / "exact-seed0" / "traceback.txt"
    assert code == 2
    assert f"{path}, arm 'exact': {type(error).__name__}" in err
    assert str(trace) in err
    assert "Traceback" in trace.read_text()
    assert command("run", path, "--out", out)[0] == 0
    assert not trace.exists()


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
