"""Settings of the right type with a bad value are a one-line error that names the key, before anything runs."""

import math

import pytest
from rich.console import Console

from experiments.config import ConfigError, load_yaml, parse_overrides, resolve
from experiments.control_variates import bias
from experiments.studies import CONFIGS, Run, every_study, read_study

BIAS = CONFIGS / "control_variates" / "bias.yaml"


def resolved(study, **overrides):
    study = read_study(study, "smoke")
    return resolve(study.module.Config, study.settings, overrides, str(study.path))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"draws": 8}, "draws must be a multiple of 16, got 8"),
        ({"draws": 65}, "draws must be a multiple of 16, got 65"),
        ({"argument": {}}, "the key 'argument.ra' is missing"),
        ({"argument.more": "num_samples"}, "argument: unknown method 'more'"),
        ({"argument.ra": "num_sample"}, "argument.ra: unknown argument 'num_sample'; did you mean 'num_samples'"),
        ({"argument.ra": "q"}, "argument.ra: unknown argument 'q'"),
        ({"methods.ra.method": "mean_value"}, "methods.ra: method 'mean_value' is not random"),
        ({"methods.ra.method": "favor"}, "argument.ra: unknown argument 'num_samples'"),
    ],
)
def test_settings_of_bias_that_do_not_fit(overrides, said):
    with pytest.raises(ConfigError) as raised:
        resolved(BIAS, **overrides)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_arms_are_checked_before_they_run(tmp_path):
    path = tmp_path / "bias.yaml"
    text = "module: experiments.control_variates.bias\nconfigurations: {a: {methods.ra.method: mean_value}}\n"
    path.write_text(text + BIAS.read_text())
    with pytest.raises(ConfigError, match="method 'mean_value' is not random"):
        Run.of(read_study(path, "smoke"), "a", 0, {})


@pytest.mark.parametrize("draws", [16, 1040])
def test_draws_that_do_not_fill_the_last_call(tmp_path, draws):
    methods, argument = {"ra": {"method": "ra"}}, {"ra": "num_samples"}
    config = resolved(BIAS, draws=draws, sizes=[2], length=4, head_dim=2, methods=methods, argument=argument)
    first, *_ = bias.run(config, tmp_path, Console())
    assert math.isfinite(first["deviation"])


@pytest.mark.parametrize("study", every_study("smoke"))
def test_nothing_to_run_is_an_error(study):
    settings = read_study(study, "smoke").settings
    for name in {"methods", "families", "sizes", "lengths", "radii", "head_dims", "kept", "bounds"} & settings.keys():
        with pytest.raises(ConfigError, match=name):
            resolved(study, **{name: type(settings[name])()})


@pytest.mark.parametrize("text", ["1:30", "010", "-010", "1:30.5", "190:20:30"])
def test_numbers_of_old_yaml_are_text(tmp_path, text):
    path = tmp_path / "bias.yaml"
    path.write_text(
        "module: experiments.control_variates.bias\n" + BIAS.read_text().replace("length: 32", f"length: {text}")
    )
    with pytest.raises(ConfigError, match=f"'length' is '{text}'"):
        resolved(path)
    assert parse_overrides([f"length={text}"]) == {"length": text}


def test_numbers_are_numbers(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("[0, 10, -5, +7, 0.5, 00.5, 1.0e-3, 0x10, 1_000]")
    assert load_yaml(path) == [0, 10, -5, 7, 0.5, 0.5, 0.001, 16, 1000]


def test_what_is_read_may_be_changed(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("a: {b: [1]}")
    load_yaml(path)["a"]["b"].append(2)
    assert load_yaml(path) == {"a": {"b": [1]}}
