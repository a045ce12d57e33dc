"""The check of programs at the scale for accelerators; nothing is compiled here."""

import json
import sys

import jax
import pytest
from flax import nnx

from benchmarks import compiled
from experiments import __main__ as cli
from experiments import check
from experiments.programs import MEMORY, has_programs, programs
from experiments.studies import Run, read_study

pytestmark = pytest.mark.usefixtures("models")


def _programs(name):
    study = read_study(name, "smoke")
    run = Run.of(study, next(iter(study.configurations)), 0, {})
    return run.config, programs(study.module, run.config)


def test_a_training_step_gives_back_the_state_that_it_takes():
    config, found = _programs("harness/language_model")
    assert list(found) == ["train step"]
    step, (state, batch) = found["train step"]()
    assert {x.shape[0] for x in batch.values()} == {config.train.batch}
    after, loss = jax.eval_shape(step, state, batch)
    assert loss.shape == ()
    before, after = (jax.tree.leaves(nnx.to_pure_dict(x)) for x in (state, after))
    assert [(x.shape, x.dtype) for x in before] == [(x.shape, x.dtype) for x in after]
    # The parameters, and two moments of each.
    assert len(before) > 3 * 8


def test_what_is_swapped_in_is_scored_and_not_trained():
    config, found = _programs("harness/swap_in")
    assert list(found) == ["train step", *(f"score, {name}" for name in config.methods)]
    score, arguments = found["score, favor"]()
    entropy, right, asked = jax.eval_shape(score, *arguments)
    assert entropy.shape == right.shape == asked.shape == arguments[1]["targets"].shape


def test_layers_are_compiled_at_their_longest():
    config, found = _programs("harness/long_context")
    assert list(found) == ["exact blocked", *config.attentions()]
    _, (x,) = found["exact blocked"]()
    assert x.shape == (1, max(config.lengths), config.model.model_dim)


@pytest.mark.parametrize("name", ["tensor/scaling", "tensor/decode"])
def test_forms_of_tensor_attention_are_compiled_at_their_longest(name):
    config, found = _programs(name)
    assert list(found) == ["exact", *(f"degree {degree}" for degree in config.degrees)]
    for program in found.values():
        function, arguments = program()
        out = jax.tree.leaves(jax.eval_shape(function, *arguments))
        assert out[0].shape[-1] == config.head_dim


def test_trainings_are_checked_and_other_studies_are_named():
    unchecked = check.unchecked()
    assert {"harness/language_model", "real_models/presses"}.isdisjoint(unchecked)
    for name in unchecked:
        assert not has_programs(read_study(name, "gpu").module)
        assert not list(check.cases("gpu", [name]))


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A fake compiler: the list of requested programs, and the result that it reports for each."""
    asked, said = [], {"bytes": 2**30, "compiler_seconds": 1.0}
    monkeypatch.setattr(cli, "RESULTS", tmp_path)
    monkeypatch.setattr(compiled, "_versions", lambda *_: {"jax": "0", "libtpu": "1"})
    monkeypatch.setattr(compiled, "_compiled_apart", lambda case, *_: asked.append(case) or dict(said))
    return asked, said


def test_what_fits_is_not_compiled_again(tmp_path, compiler, command):
    asked, said = compiler
    arguments = "check", "--platform", "tpu", "low_rank/spectra", "tensor/phase"
    code, out, _ = command(*arguments)
    assert code == 0
    assert "1 programs are compiled for a TPU v5e" in out
    assert "name no programs: tensor/phase" in out
    assert [(case.study, case.program) for case in asked] == [("low_rank/spectra", "train step")]
    command(*arguments)
    assert len(asked) == 1
    # A check of another study keeps the first one in the document.
    said["bytes"] = int(MEMORY["tpu"]) + 2**30
    code, _, err = command("check", "--platform", "tpu", "real_models/presses")
    assert code == 2
    assert "1 of 1 programs do not compile or do not fit: real_models/presses, run, train step: 16.8 GiB" in err
    document = json.loads((tmp_path / "compiled_tpu.json").read_text())
    assert [row["case"]["study"] for row in document["rows"]] == ["low_rank/spectra", "real_models/presses"]
    text = check.section(document)
    assert "1 of 2 programs of 2 studies compile and fit into 15.8 GiB; the largest takes 16.8 GiB" in text
    assert "- real_models/presses" in text
    assert "earlier code" not in text
    document["rows"][0]["code"] = "older"
    assert "from earlier code than the rest: 1." in check.section(document)


def test_without_the_compiler_one_line_says_so(tmp_path, monkeypatch, command):
    monkeypatch.setattr(cli, "RESULTS", tmp_path)
    code, _, err = command("check", "--platform", "gpu", "--python", sys.executable)
    assert code == 2
    assert "has no jax-cuda12-plugin and optax: `make aot` makes environments that have it" in err
    assert command("check", "nothing", "--platform", "gpu")[0] == 2
    assert not list(tmp_path.iterdir())
