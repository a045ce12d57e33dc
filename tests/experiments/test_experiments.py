"""The experiments harness: configurations, data, resuming, and verdicts that follow from result files alone."""

import io
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import tarfile
import time

import chex
import jax
import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from flax import nnx
from rich.console import Console

from approx_attention import METHODS
from experiments import __main__ as cli
from experiments import claims, report, training
from experiments.config import ConfigError, parse_overrides, read_config_file, resolve
from experiments.data import DATASETS, DataConfig, load, text
from experiments.models import AttentionConfig, ModelConfig, ParallelConfig
from experiments.runs import CONFIGS, EXPERIMENTS, Run
from experiments.training import OptimizerConfig, TrainingConfig, build_model, make_optimizer, train_step

pytestmark = pytest.mark.usefixtures("models")


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: "-".join(path.parts[-3:]))
def test_every_arm_of_every_configuration_resolves(path):
    file = read_config_file(path)
    for arm in file.arms:
        resolve(EXPERIMENTS[file.experiment].config, file.settings, dict(arm.overrides), str(path))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stesp=3", "unknown key 'stesp'; did you mean 'steps'"),
        ("attention.method=favr", "unknown method 'favr'; did you mean 'favor'"),
        ("train.steps=many", "'train.steps' is 'many'"),
        ("train", "an override is KEY=VALUE"),
    ],
)
def test_bad_overrides(override, message):
    file = read_config_file(CONFIGS / "harness" / "language_model" / "smoke.yaml")
    with pytest.raises(ConfigError, match=message):
        resolve(TrainingConfig, file.settings, parse_overrides([override]), "file")


GENERATED = ["digits", "digit_scenes", "listops", "pathfinder", "recall", "copying", "match", "match_xor"]


@pytest.mark.parametrize("name", GENERATED)
def test_data_is_a_function_of_the_generator_and_the_split(name):
    dataset = load(DataConfig(name))
    first, again, other = (dataset.draw(np.random.default_rng(0), 4, split) for split in ("train", "train", "test"))
    for field in first:
        np.testing.assert_array_equal(first[field], again[field])
    assert any(not np.array_equal(first[field], other[field]) for field in first)
    targets = first.get("targets", first.get("label"))
    assert -1 <= targets.min() <= targets.max() < dataset.num_classes


def test_recall_asks_for_the_value_that_followed_the_key():
    batch = load(DataConfig("recall", {"length": 64, "pairs": 4, "vocabulary": 32})).draw(
        np.random.default_rng(0), 8, "train"
    )
    for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True):
        values = dict(zip(tokens[0:8:2], tokens[1:8:2], strict=True))
        asked = np.flatnonzero(targets >= 0)
        assert len(asked) == 4
        assert all(values[tokens[place]] == targets[place] for place in asked)


def test_listops_labels_are_the_values():
    batch = load(DataConfig("listops")).draw(np.random.default_rng(1), 16, "train")
    functions = {10: min, 11: max, 12: lambda x: int(np.median(x)), 13: lambda x: sum(x) % 10}
    for tokens, length, label in zip(batch["tokens"], batch["lengths"], batch["label"], strict=True):
        stack = []
        for token in tokens[:length]:
            if token != 14:
                stack.append(int(token))
                continue
            arguments = []
            while stack[-1] < 10:
                arguments.append(stack.pop())
            operator = stack.pop()
            value = functions[operator](arguments)
            stack.append(value)
        assert stack == [label]


def test_bits_match_in_triples_and_in_pairs():
    triples, pairs = (
        load(DataConfig("match_xor", {"order": order, "length": 7, "bits": 3})).draw(
            np.random.default_rng(0), 40, "train"
        )
        for order in (3, 2)
    )
    places = range(7)
    for tokens, targets in zip(triples["tokens"], triples["targets"], strict=True):
        for i in places:
            others = [tokens[j] ^ tokens[k] for j in places for k in places if len({i, j, k}) == 3]
            assert targets[i] == (tokens[i] in others)
    for tokens, targets in zip(pairs["tokens"], pairs["targets"], strict=True):
        assert [7 - x in tokens for x in tokens] == targets.astype(bool).tolist()
    for batch in (triples, pairs):
        assert 0 < batch["targets"].mean() < 1


@pytest.mark.parametrize("name", ["byte_file", "wikitext", "cifar10", "image_folder"])
def test_missing_paths_are_one_clear_line(name):
    with pytest.raises(ConfigError, match=f"'{name}'.*/nowhere") as error:
        load(DataConfig(name, {"path": "/nowhere"}))
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="needs the setting 'path'"):
        load(DataConfig(name))
    assert name in DATASETS


def test_python_text_is_split_by_file_without_repeats(tmp_path, monkeypatch):
    for number in range(40):
        (tmp_path / f"module{number}.py").write_text(f"value = {number:04d}  # {'x' * 40}\n")
    (tmp_path / "again.py").write_text((tmp_path / "module0.py").read_text())
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "left_out.py").write_text("y" * 1000)
    monkeypatch.setattr(text.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    dataset = load(DataConfig("python_text", {"length": 16}))
    held = dataset.provenance["bytes"]
    # Each file once, with a line end between those of a split.
    assert sum(held.values()) == 40 * len((tmp_path / "module0.py").read_bytes()) + 40 - 3
    assert all(held.values())
    seen = {}
    for split in ("train", "valid", "test"):
        windows = dataset.draw(np.random.default_rng(0), 400, split)
        np.testing.assert_array_equal(windows["tokens"][:, 1:], windows["targets"][:, :-1])
        lines = b"|".join(bytes(row) for row in windows["tokens"].astype(np.uint8))
        seen[split] = set(re.findall(rb"value = (\d{4})", lines))
        assert seen[split]
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["valid"]


def test_users_files_are_read(tmp_path):
    (tmp_path / "enwik8").write_bytes(bytes(range(200)) * 10)
    batch = load(DataConfig("byte_file", {"path": str(tmp_path / "enwik8"), "length": 8})).draw(
        np.random.default_rng(0), 2, "test"
    )
    np.testing.assert_array_equal((batch["tokens"] + 1) % 200, batch["targets"])
    for split in ("train", "valid", "test"):
        (tmp_path / f"wiki.{split}.raw").write_text(split * 20)
    batch = load(DataConfig("wikitext", {"path": str(tmp_path), "length": 5})).draw(
        np.random.default_rng(0), 1, "valid"
    )
    assert bytes(batch["tokens"][0].astype(np.uint8)) in b"valid" * 3
    with pytest.raises(ConfigError, match="too few for a length of 4096"):
        load(DataConfig("wikitext", {"path": str(tmp_path), "length": 4096}))


def test_users_images_are_read(tmp_path):
    with tarfile.open(tmp_path / "cifar.tar.gz", "w:gz") as archive:
        for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
            pixels = np.full((2, 3072), 10 * number, np.uint8)
            content = pickle.dumps({b"data": pixels, b"labels": [number, number]}, protocol=2)
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    cifar = load(DataConfig("cifar10", {"path": str(tmp_path / "cifar.tar.gz")}))
    batch = cifar.draw(np.random.default_rng(0), 3, "test")
    assert batch["image"].shape == (3, 32, 32, 3)
    np.testing.assert_allclose(batch["image"], 50 / 255, rtol=1e-6)
    np.testing.assert_array_equal(batch["label"], 5)
    from PIL import Image

    for part, name, shade in (("train", "cat", 0), ("train", "dog", 255), ("val", "dog", 255)):
        folder = tmp_path / part / name
        folder.mkdir(parents=True)
        Image.new("RGB", (9, 7), (shade,) * 3).save(folder / "one.png")
    images = load(DataConfig("image_folder", {"path": str(tmp_path), "size": 8}))
    batch = images.draw(np.random.default_rng(0), 2, "test")
    np.testing.assert_array_equal(batch["image"], 1)
    np.testing.assert_array_equal(batch["label"], 1)
    (tmp_path / "train" / "dog" / "one.png").unlink()
    with pytest.raises(ConfigError, match="holds one image"):
        load(DataConfig("image_folder", {"path": str(tmp_path), "size": 8}))


KILLED = {
    "experiment": "quality",
    "data": {"name": "copying", "settings": {"length": 8}},
    "model": {"num_layers": 1, "model_dim": 16, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "hidden_dim": 16},
    "train": {"steps": 60, "batch": 2, "checkpoint_every": 4, "log_every": 2, "evaluation_batches": 1},
}


ON_A_MESH = {
    "method": "favor",
    "settings": {"num_features": 4, "block_size": 2},
    "parallel": {"data": 2, "sequence": 4},
}


@pytest.mark.parametrize(
    "attention", [{"method": "exact"}, pytest.param(ON_A_MESH, marks=pytest.mark.slow)], ids=["alone", "on_a_mesh"]
)
def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(tmp_path, monkeypatch, attention):
    config = tmp_path / "killed.yaml"
    config.write_text(yaml.safe_dump({**KILLED, "attention": attention}))
    console = Console(quiet=True)
    file = read_config_file(config)
    whole = Run.of(file, "run", 0, {}, tmp_path / "whole").result(console)
    run = Run.of(file, "run", 0, {}, tmp_path / "killed")
    log = run.directory / "metrics.jsonl"

    def logged():
        return len(log.read_text().splitlines()) if log.exists() else 0

    killed_at, checkpoints = [], run.directory / "checkpoints"
    for stop in (5, 11):
        command = [sys.executable, "-m", "experiments", "run", str(config), "--out", str(tmp_path / "killed")]
        # Compiled as here, so that the steps are the same to the bit.
        process = subprocess.Popen(
            command,
            cwd=CONFIGS.parent,
            env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "true", "JAX_NUM_CPU_DEVICES": "8"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        while process.poll() is None and logged() < stop:
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL, process.stdout.read().decode()
        process.stdout.close()
        killed_at.append(logged())
    assert killed_at[0] < killed_at[1] < 30
    kept = max(int(path.name) for path in checkpoints.iterdir() if path.name.isdigit())
    assert kept >= 4 * (killed_at[1] * 2 // 4) - 4 > 0
    steps_taken = []
    train_step = training.train_step
    monkeypatch.setattr(training, "train_step", lambda *args: (steps_taken.append(1), train_step(*args))[1])
    resumed = run.result(console)
    assert len(steps_taken) == 60 - kept
    for split in ("valid", "test"):
        assert resumed["result"][split] == whole["result"][split]
    lines, uninterrupted = (
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (log, Run.of(file, "run", 0, {}, tmp_path / "whole").directory / "metrics.jsonl")
    )
    assert [line["step"] for line in lines] == list(range(2, 61, 2))
    assert [line["loss"] for line in lines] == [line["loss"] for line in uninterrupted]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["exact", "favor"])
def test_a_step_on_a_mesh_is_that_of_one_device(method):
    dataset = load(DataConfig("copying", {"length": 8}))
    sizes = ModelConfig(num_layers=1, model_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, hidden_dim=16)
    settings = {} if method == "exact" else {"num_features": 4, "block_size": 2}
    batch = dataset.draw(np.random.default_rng(0), 4, "train")
    after = []
    for parallel in (None, ParallelConfig(data=2, sequence=4)):
        attention = AttentionConfig(method, settings, parallel=parallel)
        config = TrainingConfig(DataConfig("copying"), OptimizerConfig(steps=4, batch=4), sizes, attention)
        model = build_model(config, dataset)
        optimizer = training.make_optimizer(config.train, model)
        placed = batch
        if parallel is not None:
            mesh = parallel.mesh()
            training.replicate(mesh, model, optimizer)
            placed = training.spread(mesh, batch)
        losses = [float(train_step(model, optimizer, placed)) for _ in range(3)]
        after.append((losses, nnx.to_pure_dict(nnx.state(model, nnx.Param))))
    (one, ours), (several, theirs) = after
    assert len(jax.tree.leaves(theirs)[0].sharding.device_set) == 8
    np.testing.assert_allclose(several, one, rtol=1e-5)
    assert one[2] < one[0]
    chex.assert_trees_all_close(jax.tree.map(np.asarray, ours), jax.tree.map(np.asarray, theirs), atol=1e-5)


def test_what_cannot_be_trained_on_a_mesh_is_refused():
    with pytest.raises(ValueError, match="a mesh of 3 x 4 needs 12 devices, there are 8; JAX_NUM_CPU_DEVICES"):
        ParallelConfig(data=3, sequence=4).mesh()
    attention = AttentionConfig(parallel=ParallelConfig(data=2))
    with pytest.raises(ValueError, match=r"batch must be a multiple of parallel.data = 2, got 3"):
        TrainingConfig(DataConfig("copying"), OptimizerConfig(steps=1, batch=3), attention=attention)
    with pytest.raises(ValueError, match="'rfa' has neither projections nor gates in parallel"):
        AttentionConfig("rfa", gated=True, parallel=ParallelConfig())


@pytest.mark.slow
def test_learned_draws_are_trained():
    dataset = load(DataConfig("copying", {"length": 8}))
    sizes = ModelConfig(num_layers=1, model_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, hidden_dim=16)
    favor = AttentionConfig("favor", {"num_features": 4, "block_size": 4}, ("projection",))
    config = TrainingConfig(DataConfig("copying"), OptimizerConfig(steps=4), sizes, favor)
    model = build_model(config, dataset)
    batch = dataset.draw(np.random.default_rng(0), 2, "train")
    before = np.asarray(model.body.layers[0].attention.attention_fn.learned["projection"][...])
    assert before.shape == (4, 8)
    optimizer = make_optimizer(config.train, model)
    for _ in range(3):
        train_step(model, optimizer, batch)
    after = np.asarray(model.body.layers[0].attention.attention_fn.learned["projection"][...])
    assert np.abs(after - before).max() > 1e-5
    with pytest.raises(ValueError, match="'favor' has no noise to be switched on"):
        AttentionConfig("favor", noise=True)
    with pytest.raises(ValueError, match="'favor' draws no 'omega' to learn; it draws projection"):
        AttentionConfig("favor", learned=("omega",))


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.yaml"], "nowhere.yaml cannot be read"),
        (["run", "{config}", "--arm", "exakt"], "unknown arm 'exakt'; did you mean 'exact'"),
        (["run", "{config}", "--set", "train.steps=[1"], "the value of train.steps is not YAML"),
        (["run", "{config}", "--set", "train.steps=0"], "greater than or equal to 1"),
        (["run", "{config}", "--set", "train.log_every=3"], "checkpoint_every must be a multiple of log_every"),
        (["run", "{config}", "--set", "seed=5"], "the seed of a run is one of 'seeds'"),
        (["run", "{config}", "--set", "model.num_kv_heads=3"], "key heads must divide query heads"),
        (["run", "{config}", "--set", "data.settings.length=abc"], "'length' is 'abc'"),
        (["run", "{config}", "--arm", "local", "--set", "attention.settings.window_size=-2"], "window_size must be"),
        (["run", "{swap}", "--set", "methods.favor.setings=1"], "unknown key"),
        (["run", "{swap}", "--set", "training.attention.method=favor"], "what is trained is 'exact'"),
        (["sample", "--set", "train.steps=1"], "--to"),
        (["capture", "{swap}", "--to", "x.npz"], "only the experiment 'quality' trains"),
    ],
)
def test_the_command_line_says_in_one_line_what_is_wrong(tmp_path, monkeypatch, capsys, arguments, message):
    places = {"config": STUDY, "swap": "harness/swap_in"}
    places = {name: str(CONFIGS / study / "smoke.yaml") for name, study in places.items()}
    arguments = [argument.format(**places) for argument in arguments]
    if arguments[0] == "run":
        arguments += ["--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["experiments", *arguments])
    assert cli.main() == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_damaged_result_and_a_damaged_checkpoint(tmp_path):
    config = tmp_path / "damaged.yaml"
    config.write_text(yaml.safe_dump({**KILLED, "train": {**KILLED["train"], "steps": 8}}))
    run = Run.of(read_config_file(config), "run", 0, {}, tmp_path)
    whole = run.result(Console(quiet=True))
    (run.directory / "result.json").write_text('{"arm": "r')
    with pytest.raises(ConfigError, match=r"result.json is damaged; remove it"):
        run.result(Console(quiet=True))
    (run.directory / "result.json").unlink()
    (run.directory / "checkpoints" / "8" / "clock" / "metadata").write_text("{")
    with pytest.warns(UserWarning, match="checkpoint 8 cannot be read"):
        again = run.result(Console(quiet=True))
    assert again["result"]["test"] == whole["result"]["test"]


def test_swap_in_leaves_no_method_out():
    # On cpu the later methods join when the study is run again.
    later = {"coreset", "scatterbrain", "cosformer", "linformer", "block_linformer", "polynomial"}
    later |= {"sparse_coreset", "longformer", "bigbird", "top_k", "lsh_top_k"}
    for scale, missing in (("cpu", later), ("gpu", set())):
        config = Run.of(read_config_file(CONFIGS / f"harness/swap_in/{scale}.yaml"), "run", 0, {}, CONFIGS).config
        named = {attention.method for attention in config.methods.values()} | {"exact"} | missing
        assert named == {name for name, method in METHODS.items() if method.capabilities.causal}


def test_a_directory_of_other_settings_is_refused(tmp_path):
    file = read_config_file(CONFIGS / "harness" / "language_model" / "smoke.yaml")
    run = Run.of(file, "exact", 0, {}, tmp_path)
    settings = run.claim_directory()
    document = {"arm": "exact", "seed": 0, "config": dict(settings), "result": {}, "seconds": 1.0, "environment": {}}
    (run.directory / "result.json").write_text(json.dumps(document))
    assert run.result(Console(quiet=True)) == document
    with pytest.raises(ConfigError, match=r"train.steps: 4 there, 5 now"):
        Run.of(file, "exact", 0, {"train.steps": 5}, tmp_path).claim_directory()
    # A setting that has come since the run was made stands at its default.
    settings["attention"] = {name: x for name, x in settings["attention"].items() if name != "learned"}
    (run.directory / "config.yaml").write_text(yaml.safe_dump(settings))
    assert run.result(Console(quiet=True)) == document


def test_the_seed_of_a_swap_in_stands_in_one_place():
    file = read_config_file(CONFIGS / "harness" / "swap_in" / "smoke.yaml")
    with pytest.raises(ConfigError, match="the seed is a key next to 'training'"):
        Run.of(file, "run", 0, {"training.seed": 3}, CONFIGS)


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


def test_a_sweep_leaves_out_what_is_done(tmp_path, capsys):
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump({**KILLED, "train": {**KILLED["train"], "steps": 4}, "seeds": [0, 1]}))
    command = ["sweep", str(config), "--out", str(tmp_path / "out")]
    for _ in range(2):
        outcome = CliRunner().invoke(cli.experiments, command)
        assert outcome.exit_code == 0, outcome.output
    logs = sorted((tmp_path / "out").rglob("metrics.jsonl"))
    assert [path.parent.name for path in logs] == ["run-seed0", "run-seed1"]
    assert all(len(path.read_text().splitlines()) == 2 for path in logs)
    outcome = CliRunner().invoke(cli.experiments, ["list"])
    assert outcome.exit_code == 0
    assert "harness/language_model/cpu.yaml" in outcome.output


def test_results_follow_from_the_committed_runs():
    root = CONFIGS.parent / "experiments"
    assert (root / "RESULTS.md").read_text() == report.render(root)


@pytest.mark.parametrize(
    "study",
    [
        "harness/language_model",
        "harness/swap_in",
        pytest.param("harness/long_context", marks=pytest.mark.slow),
        pytest.param("harness/parallel", marks=pytest.mark.slow),
        pytest.param("whole_picture/zoo", marks=pytest.mark.slow),
        *(
            pytest.param(f"control_variates/{name}", marks=pytest.mark.slow)
            for name in ("gap", "continuum", "bias", "swap_in", "vision", "language_model")
        ),
        *(
            pytest.param(f"coresets/{name}", marks=pytest.mark.slow)
            for name in ("size", "growth", "instances", "table", "language_model", "recall", "latency")
        ),
        *(
            pytest.param(f"low_rank/{name}", marks=pytest.mark.slow)
            for name in (
                "sketch",
                "projection_fit",
                "spectra",
                "slots",
                "lengths",
                "digits",
                "heads",
                "listops",
                "pathfinder",
            )
        ),
        *(
            pytest.param(f"tensor/{name}", marks=pytest.mark.slow)
            for name in (
                "scaling",
                "decode",
                "degree",
                "least_degrees",
                "phase",
                "budget",
                "sketches",
                "index_sets",
                "window",
                "match",
            )
        ),
        *(
            pytest.param(f"sparse_patterns/{name}", marks=pytest.mark.slow)
            for name in ("log_law", "headline", "budget", "many_patterns", "precision", "picture")
        ),
        *(pytest.param(f"whole_picture/{name}", marks=pytest.mark.slow) for name in ("where_we_lose", "equal_time")),
    ],
)
def test_smoke_studies_run(tmp_path, study):
    file = read_config_file(CONFIGS / study / "smoke.yaml")
    for arm in file.arms:
        run = Run.of(file, arm.name, 0, {}, tmp_path)
        document = run.result(Console(quiet=True))
        assert document == run.result(Console(quiet=True))
