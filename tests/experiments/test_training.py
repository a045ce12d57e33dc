"""Training that is killed, continued, and run on a mesh."""

import json
import signal
import subprocess
import sys
import time

import chex
import jax
import numpy as np
import pytest
import yaml
from flax import nnx
from rich.console import Console

from experiments import training
from experiments.data import DataConfig, load
from experiments.models import AttentionConfig, ModelConfig, ParallelConfig
from experiments.studies import ROOT, Places, Run, read_study
from experiments.training import OptimizerConfig, TrainingConfig, build_model, train_step
from tests.references import quick_process

pytestmark = pytest.mark.usefixtures("models")


KILLED = {
    "module": "experiments.trained",
    "data": {"name": "copying", "settings": {"length": 8}},
    "model": {"num_layers": 1, "model_dim": 16, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "hidden_dim": 16},
    "train": {"steps": 60, "batch": 2, "checkpoint_every": 4, "log_every": 2, "evaluation_batches": 1},
    "smoke": {},
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
    study = read_study(config, "smoke")
    places = [Places(out, out) for out in (tmp_path / "whole", tmp_path / "killed")]
    unbroken, run = (Run.of(study, "run", 0, {}, place) for place in places)
    whole = unbroken.result(console)
    log = run.directory / "metrics.jsonl"

    def logged():
        return len(log.read_text().splitlines()) if log.exists() else 0

    killed_at, checkpoints = [], run.directory / "checkpoints"
    for stop in (5, 11):
        command = [
            sys.executable,
            "-m",
            "experiments",
            "run",
            str(config),
            "--scale",
            "smoke",
            "--out",
            str(tmp_path / "killed"),
        ]
        # Compiled with the same options as here, so that the steps agree bit for bit.
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=quick_process() | {"JAX_NUM_CPU_DEVICES": "8"},
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
    scores = [{**result.records[0], "training_seconds": 0.0} for result in (resumed, whole)]
    assert scores[0] == scores[1]
    assert resumed.records[1:] == whole.records[1:]
    lines, uninterrupted = (
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (log, unbroken.directory / "metrics.jsonl")
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
