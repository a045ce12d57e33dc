"""Damaged or truncated files of experiments are named in one line, with the remedy."""

import json
import shutil
import signal

import pytest

from experiments import checkpoints, claims, report
from experiments.config import ConfigError, resolve
from experiments.harness.long_context import TimeAndMemory
from experiments.results import frame
from experiments.run_files import read_json
from experiments.studies import COMMITTED, Places, Run, check_all, read_study
from experiments.training import _Log
from tests.experiments.test_experiment_faults import SMOKE, _config

pytestmark = pytest.mark.usefixtures("models")


DAMAGE = {
    "empty": b"",
    "cut short": b'{"settings": "exa', "a list": b"[]", "no text": b"\xff\xfe\x00", "deep": b"[" * 100_000,
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
    path = tmp_path / "lengths.json"
    _damaged(path, content)
    with pytest.raises(ConfigError, match=r"lengths\.json .*; remove it, and the lengths are timed again") as error:
        read_json(path, dict[str, dict[str, TimeAndMemory]], "the lengths are timed again")
    assert "\n" not in str(error.value)


def test_a_damaged_result_stops_run_sweep_list_and_report(tmp_path, never_run, command, monkeypatch):
    (tmp_path / "configs").mkdir()
    path, out = _config(tmp_path / "configs"), tmp_path / "out"
    assert command("run", path, *SMOKE, "--out", out)[0] == 0
    done = out / "study.jsonl"
    whole = json.loads(done.read_text())
    texts = [json.dumps({name: x for name, x in whole.items() if name != left_out}) for left_out in whole]
    texts += [json.dumps({**whole, name: {"x": None}}) for name in whole if name != "machine"]
    texts += [json.dumps({**whole, **change}) for change in ({"seed": -1}, {"seconds": -1}, {"records": [{"x": {}}]})]
    for text in texts:
        done.write_text(text)
        for name in ("run", "sweep"):
            code, out_text, err = command(name, path, *SMOKE, "--out", out)
            assert (code, out_text) == (2, ""), text
            assert f"{done}, line 1 is damaged; remove it" in err
    done.write_text(json.dumps({**whole, "settings": "others"}))
    code, _, err = command("run", path, *SMOKE, "--out", out)
    assert code == 2
    assert "at other settings; remove that line" in err
    assert never_run == ["exact-seed0"]


@pytest.mark.parametrize("content", [*DAMAGE.values(), None], ids=[*DAMAGE, "a directory"])
def test_a_file_of_results_that_is_none(tmp_path, never_run, command, content):
    path, out = _config(tmp_path), tmp_path / "out"
    out.mkdir()
    _damaged(out / "study.jsonl", content)
    code, _, err = command("run", path, *SMOKE, "--out", out)
    assert (code == 0) == (content == b"")
    assert content == b"" or "study.jsonl" in err


@pytest.mark.parametrize("study", ["harness/language_model", "harness/swap_in", "low_rank/sketch", "coresets/latency"])
def test_a_report_names_the_one_damaged_run_among_many(tmp_path, study):
    source, path = COMMITTED.results / f"{study}.jsonl", tmp_path / "results" / f"{study}.jsonl"
    path.parent.mkdir(parents=True)
    (tmp_path / "claims.yaml").write_text("[]")
    (tmp_path / "stories.yaml").write_text("front: What came out.")
    lines = [json.loads(line) for line in source.read_text().splitlines()]
    whole = lines[-1]
    name = whole["configuration"]
    for records in ([{"x": 1.0}], [{key: "x" for key in record} for record in whole["records"]]):
        lines[-1] = {**whole, "records": records}
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        with pytest.raises(ConfigError, match=f"{study}.jsonl.*its records cannot be shown") as error:
            report.write(tmp_path)
        assert len(lines) == 1 or f"{name!r} with seed {whole['seed']}" in str(error.value)


def test_a_story_that_names_no_claim_says_so(tmp_path):
    (tmp_path / "claims.yaml").write_text("[]")
    (tmp_path / "stories.yaml").write_text("front: 'The error is {no-such-claim}.'")
    with pytest.raises(ConfigError, match=r"stories.yaml has \{no-such-claim\}, and no claim has this id"):
        report.pages(tmp_path)


@pytest.mark.parametrize(
    "records", [[{"x": 1.0}], [{"bits": "x"}], [{"bits": True}], [{"bits": 1.0}, {"bits": 2.0}], []]
)
def test_a_claim_whose_figure_is_not_there_names_file_and_run(tmp_path, records):
    study = "harness/language_model"
    path = tmp_path / f"{study}.jsonl"
    path.parent.mkdir(parents=True)
    lines = [json.loads(line) for line in (COMMITTED.results / f"{study}.jsonl").read_text().splitlines()]
    for line in lines:
        if (line["configuration"], line["seed"]) == ("favor", 1):
            line["records"] = records
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = {
        "id": "a", "paper": "p", "where": "w", "statement": "s", "claimed": "c", "study": study,
        "metric": {"configuration": "favor", "figure": "bits"}, "reproduced": {"at_least": 0.0},
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"language_model\.jsonl: favor, seed 1: .*'bits'"):
        claims.judge(resolve(claims.Claim, record, {}, "claim"), Places(tmp_path, tmp_path))


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
    study = read_study(_config(tmp_path), "smoke")
    config, other = (Run.of(study, "exact", seed, {}).config for seed in (0, 1))
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
    # The remains of a save that was killed are removed.
    config = Run.of(read_study(_config(tmp_path), "smoke"), "exact", 0, {}).config
    (tmp_path / "checkpoints" / "8.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    checkpoints.open_checkpoints(tmp_path / "checkpoints", config).close()
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_run_that_diverged_is_shown():
    study = read_study("low_rank/sketch", "cpu")
    records = frame(study.results())
    first = (records["seed"] == 0) & (records["kind"] == "svd")
    records.loc[first, "error"] = float("nan")
    assert any("nan ± nan" in table for table in study.module.table(records))


def test_a_file_in_the_place_of_checkpoints(tmp_path):
    config = Run.of(read_study(_config(tmp_path), "smoke"), "exact", 0, {}).config
    (tmp_path / "checkpoints").write_text("x")
    with pytest.raises(ConfigError, match="checkpoints is damaged; remove it"):
        checkpoints.open_checkpoints(tmp_path / "checkpoints", config)


def test_settings_that_were_damaged_name_their_file(tmp_path, never_run, command):
    path, out = _config(tmp_path), tmp_path / "out"
    run = Run.of(read_study(path, "smoke"), "exact", 0, {}, Places(out, out))
    run.claim_directory()
    (run.directory / "metrics.jsonl").write_text("")
    held = run.directory / "settings.yaml"
    whole = held.read_text()
    for text in (None, "", "[", "a: 1", whole.replace("steps: 8", "steps: 9"), whole.replace("0.002", ".nan")):
        held.unlink() if text is None else held.write_text(text)
        code, _, err = command("run", path, *SMOKE, "--out", out)
        assert code == 2
        assert str(held.parent) in err
        assert "or choose --out" in err
    assert never_run == []


def test_checks_of_a_sweep_leave_what_is_done_alone(tmp_path, never_run, command):
    every = read_study(_config(tmp_path), "smoke").runs(Places(tmp_path / "out", tmp_path / "out"))
    check_all(every)
    assert not (tmp_path / "out").exists()
