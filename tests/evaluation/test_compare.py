"""The compare command from file to table, figure and JSON, and its errors for bad input."""

import json
import os
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import InputError, attention, cli
from approx_attention.evaluation import (
    Comparison,
    Problem,
    comparison_table,
    draw_frontiers,
    environment,
    load_sample,
    load_tensors,
    method_styles,
    run_comparison,
    write_atomically,
)
from approx_attention.evaluation.arms import build_arms, exact_arms
from approx_attention.evaluation.comparison import best_rows
from approx_attention.registry import METHODS, bind
from tests.references import brute_force, random_heads


@pytest.fixture
def tensors(tmp_path):
    """A small .npz of q [1, 48, 4, 8] and k, v [1, 48, 2, 8]."""
    path = tmp_path / "tensors.npz"
    np.savez(path, **dict(zip("qkv", map(np.asarray, random_heads(0, 1, 48, 48, 4, 2)), strict=True)))
    return path


def run(*arguments):
    """Run the command line and return its exit code."""
    return cli.main([str(argument) for argument in arguments])


def refusal(capsys, *arguments):
    """Return the one-line error of the command line."""
    capsys.readouterr()
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    return lines[0]


# input


@pytest.mark.parametrize("axes", [2, 3, 4])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_npz_of_every_layout(tmp_path, axes, dtype):
    arrays = [np.asarray(x, dtype) for x in random_heads(0, 2, 6, 5, 4, 2)]
    arrays = [x if axes == 4 else x[0] if axes == 3 else x[0, :, 0] for x in arrays]
    np.savez(tmp_path / "x.npz", a=arrays[0], b=arrays[1], c=arrays[2])
    loaded = load_tensors(tmp_path / "x.npz", ("a", "b", "c"))
    for x, expected in zip(loaded, arrays, strict=True):
        assert x.ndim == 4
        assert x.dtype == jnp.float32
        np.testing.assert_array_equal(np.asarray(x).reshape(expected.shape), np.asarray(expected, np.float32))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_safetensors(tmp_path, dtype):
    from safetensors.flax import save_file

    arrays = {name: x.astype(dtype) for name, x in zip("qkv", random_heads(0, 1, 6, 5, 4, 2), strict=True)}
    save_file(arrays, tmp_path / "x.safetensors")
    loaded = load_tensors(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(loaded.query, arrays["q"].astype(jnp.float32))


def test_the_sample_is_what_its_text_says():
    query, key, value = map(np.asarray, load_sample())
    assert query.shape[1] == key.shape[1] == 2048
    assert query.shape[-1] == key.shape[-1] == value.shape[-1] == 64
    assert query.shape[0] >= 2
    package = os.path.join(os.path.dirname(cli.__file__), "data")
    assert os.path.getsize(os.path.join(package, "sample.npz")) <= 2 * 10**6
    with open(os.path.join(package, "sample.txt")) as file:
        provenance = json.load(file)
    for layer, entry in enumerate(provenance["layers"]):
        entropies = []
        for head in range(query.shape[2]):
            logits = np.asarray(query[layer, :, head] @ key[layer, :, 0].T, np.float64) / 8
            logits = np.where(np.tri(2048, dtype=bool), logits, -np.inf)
            weights = np.exp(logits - logits.max(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            entropies.append(-np.sum(weights * np.log(np.maximum(weights, 1e-30)), axis=1).mean())
        assert abs(np.mean(entropies) - entry["mean_entropy_nats"]) < 0.02
    assert len({entry["layer"] for entry in provenance["layers"]}) == len(provenance["layers"])


# output


def test_json_figure_and_table(tensors, tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    assert (
        run(
            "compare",
            tensors,
            "--causal",
            "--methods",
            "mean_value,favor",
            "--budget",
            "4,8",
            "--seeds",
            2,
            "--window",
            8,
            "--out",
            out,
        )
        == 0
    )
    printed = capsys.readouterr().out
    document = json.loads((out / "compare.json").read_text())
    assert document["settings"]["is_causal"] is True
    assert document["settings"]["seed"] == 0
    assert document["environment"]["jax"] == jax.__version__
    assert document["shapes"] == {"query": [1, 48, 4, 8], "key": [1, 48, 2, 8], "value": [1, 48, 2, 8]}
    seen = {(row["method"], row["size"]) for row in document["rows"]}
    assert {("mean_value", None), ("local", 4), ("uniform_sample", 8), ("favor", 4), ("favor", 8)} <= seen
    for row in document["rows"]:
        assert row["method"] in printed
        assert row["compile_seconds"] > 0 < row["seconds"] <= row["median_seconds"]
        assert row["num_seeds"] == (2 if row["method"] in ("favor", "uniform_sample") else 1)
        if row["is_exact"]:
            assert row["relative_error"] < 1e-5
            assert row["far_error"] is None or row["far_error"] < 1e-5
            assert row["speedup"] <= 1
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == ["compare.json", "compare.png"]


def test_errors_are_those_of_the_outputs(tensors):
    loaded = load_tensors(tensors)
    rows = run_comparison(Problem(loaded, is_causal=True), ["mean_value", "local"], [16], window_size=8, num_seeds=1)
    row = next(row for row in rows if row.method == "mean_value")
    exact, mean, window, wider = [], [], [], []
    for n in range(4):
        q, k, v = (np.asarray(x[0, :, m], np.float64) for x, m in zip(loaded, (n, n // 2, n // 2), strict=True))
        distance = np.arange(48)[:, None] - np.arange(48)[None, :]
        out, lse = brute_force(q, k, v, mask=distance >= 0)
        exact.append(out)
        for found, size in ((window, 8), (wider, 16)):  # the numerators, as shares of the exact normaliser
            part, part_lse = brute_force(q, k, v, mask=(distance >= 0) & (distance < size))
            found.append(part * np.exp(part_lse - lse)[:, None])
        mean.append(np.cumsum(v, axis=0) / np.arange(1, 49)[:, None])
    exact, mean, window, wider = map(np.stack, (exact, mean, window, wider))
    assert row.relative_error == pytest.approx(np.linalg.norm(mean - exact) / np.linalg.norm(exact), rel=1e-4)
    assert row.far_error is None  # it has no normaliser to compare
    local = next(row for row in rows if row.method == "local")
    assert local.far_error == pytest.approx(np.linalg.norm(wider - exact) / np.linalg.norm(window - exact), rel=1e-4)
    row_errors = np.linalg.norm(mean - exact, axis=-1)
    worst = row_errors.max() / np.sqrt(np.mean(np.linalg.norm(exact, axis=-1) ** 2))
    assert row.worst_row_error == pytest.approx(worst, rel=1e-4)
    # Keys and values of 48 tokens against 8 sums and a count.
    assert row.compression == pytest.approx(48 * 16 * 4 / row.held_bytes)


def test_sizes_that_count_other_things_are_in_proportion(tensors):
    names = ["mean_pool", "block_linformer", "bigbird"]
    arms = build_arms(Problem(load_tensors(tensors)), names, [8, 32, 512])
    sizes = {name: [arm.size for arm in arms if arm.method == name] for name in names}
    # The sequence has 48 keys; the defaults are 256 landmarks, 16 slots per block and 3 random blocks.
    assert sizes == {"mean_pool": [8, 32, 48], "block_linformer": [1, 2, 32], "bigbird": [1, 6]}


def test_options_are_those_of_the_method(tensors, tmp_path, capsys):
    arms = build_arms(Problem(load_tensors(tensors), is_causal=True), ["favor"], [8], {"favor": {"block_size": 4}})
    query, key, value = load_tensors(tensors)
    arm = next(arm for arm in arms if arm.method == "favor")

    @jax.jit
    def both(query, key, value, rng):
        options = {"rng": rng, "is_causal": True, "num_features": 8, "block_size": 4}
        own = attention(query, key, value, method="favor", **options)
        return arm.function(query, key, value, rng)[0], own

    np.testing.assert_allclose(*both(query, key, value, jax.random.key(0)), rtol=1e-5, atol=1e-6)
    options = ["--methods", "favor", "--budget", 8, "--seeds", 1, "--set", "favor.block_size=4"]
    assert run("compare", tensors, "--causal", *options, "--out", tmp_path / "out") == 0
    document = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert document["settings"]["options"] == {"favor": {"block_size": 4}}
    assert next(row for row in document["rows"] if row["method"] == "favor")["held_bytes"] == arm.held_bytes

    def refused(*settings):
        given = [part for setting in settings for part in ("--set", setting)]
        return refusal(capsys, "compare", tensors, "--methods", "favor", "--out", tmp_path / "no", *given)

    assert "favor does not support blocksize=4: method 'favor' has no argument 'blocksize'; did you mean" in refused(
        "favor.blocksize=4"
    )
    assert "num_features of favor is its size" in refused("favor.num_features=4")
    assert "options must be for one of the methods" in refused("nystrom.num_landmarks=4")
    assert "unknown method 'favour'; did you mean 'favor'" in refused("favour.block_size=4")
    assert "METHOD.OPTION=VALUE" in refused("favor")
    assert "--set gives favor.block_size twice" in refused("favor.block_size=1", "favor.block_size=2")
    for option, instead in (
        ("is_causal=true", "--causal"),
        ("scale=2", "--scale"),
        ("rng=2", "--seed"),
        ("method=eva", "--methods"),
        ("mask=1", "--mask"),
        ("query=1", "FILE"),
        ("return_residual=true", "nothing"),
    ):
        told = refused(f"favor.{option}")
        assert f"{option.partition('=')[0]} is common to all methods, not an option of favor: give {instead}" in told
    assert "favor does not support block_size=0: block_size must be" in refused("favor.block_size=0")


def test_bytes_held(tensors):
    loaded = load_tensors(tensors)
    held = {arm.label: arm.held_bytes for arm in build_arms(Problem(loaded), ["mean_pool", "favor"], [8])}
    assert held["exact"] == 48 * 16 * 4
    assert held["mean_value"] == held["mean_pool 8"] / 8 == (8 + 8 + 1) * 4
    assert held["favor 8"] == 8 * (8 + 1 + 1) * 4
    assert held["local 8"] == 15 * 16 * 4
    causal = {arm.label: arm.held_bytes for arm in build_arms(Problem(loaded, is_causal=True), ["mean_pool"], [8])}
    assert causal["mean_pool 8"] == held["mean_pool 8"] + 2 * 128 * 16 * 4
    assert causal["local 8"] == 8 * 16 * 4


@pytest.mark.parametrize(("name", "is_causal"), [("mean_pool", False), ("mean_pool", True), ("local", False)])
def test_float64_takes_twice_the_bytes(name, is_causal, x64):
    held = [bind(name).held_bytes(256, 8, 8, dtype, is_causal=is_causal) for dtype in (jnp.float64, jnp.bfloat16)]
    assert held[0] == 2 * held[1] > 0


def comparison(method, seconds, error, is_exact=False):
    return Comparison(
        method=method,
        size=8,
        held_bytes=1024,
        compression=2.0,
        compile_seconds=0.1,
        seconds=seconds,
        median_seconds=seconds,
        speedup=1.0,
        relative_error=error,
        relative_error_std=0.0,
        worst_row_error=error,
        normalizer_error=None,
        far_error=error,
        far_error_std=0.0,
        num_seeds=1,
        is_exact=is_exact,
    )


def test_the_frontier_holds_what_nothing_beats():
    rows = [
        comparison("exact", 1.0, 0.0, is_exact=True),
        comparison("fast", 0.1, 0.9),
        comparison("good", 0.5, 0.1),
        comparison("worse", 0.6, 0.2),
        comparison("slow and good", 2.0, 0.01),
    ]
    assert best_rows(rows) == {1, 2, 4}
    table = comparison_table(rows, "title", 8)
    assert [cell.plain for cell in table.columns[0].cells] == ["exact", "fast *", "good *", "worse", "slow and good *"]
    figure = draw_frontiers(rows, "title")
    assert {text.get_text() for text in figure.legends[0].get_texts()} >= {
        "fast (8)",
        "good (8)",
        "worse (8)",
        "slow and good (8)",
    }


def test_help_and_methods(capsys):
    assert run("--help") == 0
    assert run("compare", "--help") == 0
    assert "Measure the error, time and memory of each approximation" in capsys.readouterr().out
    assert run("methods") == 0
    assert "| `favor`" in capsys.readouterr().out
    assert run("--version") == 0


# errors


def spoil(tmp_path, **changes):
    arrays = dict(zip("qkv", map(np.array, random_heads(0, 1, 6, 6, 4, 2)), strict=True)) | changes
    path = tmp_path / "bad.npz"
    np.savez(path, **{name: x for name, x in arrays.items() if x is not None})
    return path


def test_bad_files(tmp_path, tensors, capsys):
    def message(path, *options):
        return refusal(capsys, "compare", path, *options, "--out", tmp_path / "out")

    assert "nowhere.npz does not exist" in message(tmp_path / "nowhere.npz")
    assert "is a directory" in message(tmp_path)
    (tmp_path / "empty.npz").touch()
    assert "empty.npz is empty" in message(tmp_path / "empty.npz")
    (tmp_path / "x.npy").write_bytes(b"x")
    assert "must end in .npz or .safetensors" in message(tmp_path / "x.npy")
    (tmp_path / "text.npz").write_text("not an archive")
    assert "text.npz" in message(tmp_path / "text.npz")
    for suffix in (".npz", ".safetensors"):
        short = tmp_path / f"short{suffix}"
        short.write_bytes(tensors.read_bytes()[:-300])
        assert f"short{suffix} is not a whole {suffix}" in message(short)
    with zipfile.ZipFile(tensors) as archive:
        first = archive.read("q.npy")
    damaged = tmp_path / "damaged.npz"
    damaged.write_bytes(tensors.read_bytes().replace(first[200:260], bytes(60)))
    assert "damaged.npz is not a whole .npz" in message(damaged)
    assert "pickled object, which is not supported" in message(spoil(tmp_path, q=np.array([{}], object)))


def test_bad_arrays(tmp_path, capsys):
    def message(*options, **changes):
        return refusal(capsys, "compare", spoil(tmp_path, **changes), *options, "--out", tmp_path / "out")

    assert "has no array 'v' (it contains 'q', 'k'; name yours with --q, --k, --v)" in message(v=None)
    assert "has no array 'query_'" in message("--q", "query_")
    assert "'k' in" in message(k=np.ones(5, np.float32))
    assert "got shape [5]" in message(k=np.ones(5, np.float32))
    assert "must be floating point, got dtype int64" in message(q=np.ones((1, 6, 4, 8), int))
    assert "must have the same number of axes" in message(q=np.ones((6, 8), np.float32))
    assert "must have the same head dimension" in message(q=np.ones((1, 6, 4, 7), np.float32))
    assert "must have the same batch size" in message(q=np.ones((2, 6, 4, 8), np.float32))
    assert "the heads of 'k' must divide those of 'q'" in message(q=np.ones((1, 6, 3, 8), np.float32))
    assert "must have the same tokens and heads" in message(v=np.ones((1, 5, 2, 8), np.float32))
    assert "is empty, of shape [1, 0, 4, 8]" in message(q=np.ones((1, 0, 4, 8), np.float32))
    infinite = np.ones((1, 6, 2, 8), np.float32)
    infinite[0, 4, 1, 3] = np.inf
    assert "'v' in" in message(v=infinite)
    assert "has 1 numbers that are not finite in float32, the first inf at [0, 4, 1, 3]" in message(v=infinite)


def test_bad_options(tensors, tmp_path, capsys):
    def message(*options):
        return refusal(capsys, "compare", tensors, "--out", tmp_path / "out", *options)

    assert "unknown method 'favour'; did you mean 'favor'? Known: exact, " in message("--methods", "mean_pool,favour")
    assert "No such option '--budgets'. Did you mean '--budget'?" in message("--budgets", "4")
    assert "'x' is not a valid integer range" in message("--budget", "4,x")
    assert "0 is not in the range x>=1" in message("--budget", "0")
    assert "give at least one" in message("--methods", ",")
    assert "--scale" in message("--scale", "-1")
    assert "'quantum' is not one of 'cpu', 'gpu', 'tpu'" in message("--device", "quantum")
    assert "No such command 'compair'" in refusal(capsys, "compair")
    (tmp_path / "file").touch()
    assert "cannot write to the directory" in refusal(capsys, "compare", tensors, "--out", tmp_path / "file")
    assert "cannot write to the directory" in refusal(capsys, "compare", tensors, "--out", tmp_path / "file" / "below")
    assert not (tmp_path / "out" / "compare.json").exists()


def test_absent_devices_are_refused(tensors, tmp_path):
    # In a new process, in which JAX has not chosen a device.
    command = "from approx_attention.cli import main; import sys; more = [], ['--device', 'tpu']; "
    command += "print([main([*sys.argv[1:], *given]) for given in more])"
    result = subprocess.run(
        [sys.executable, "-c", command, "compare", str(tensors), "--out", str(tmp_path / "out")],
        env=os.environ | {"JAX_PLATFORMS": "foo"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == "[2, 2]\n"
    told = "approx-attention: JAX finds no device of kind"
    lines = [line for line in result.stderr.splitlines() if line.startswith("approx-attention")]
    assert lines == [f"{told} 'foo', which JAX_PLATFORMS names, on this machine", f"{told} 'tpu' on this machine"]
    assert "Traceback" not in result.stderr


def test_a_method_without_a_causal_form_is_refused_for_causal_attention(tensors, monkeypatch):
    import dataclasses

    from approx_attention import registry
    from approx_attention.evaluation import arms

    method = registry.METHODS["mean_pool"]
    blind = dataclasses.replace(method, capabilities=dataclasses.replace(method.capabilities, causal=False))
    monkeypatch.setattr(arms, "get_method", lambda name: blind if name == "mean_pool" else registry.METHODS[name])
    with pytest.raises(InputError, match="'mean_pool' has no causal form"):
        build_arms(Problem(load_tensors(tensors), is_causal=True), ["mean_pool"], [4])


def test_no_two_methods_look_alike_in_figures():
    for names in ([*METHODS], [*METHODS, "new"], [f"new {i}" for i in range(len(METHODS))]):
        looks = method_styles(names)
        assert list(looks) == names
        assert len({tuple(look.values()) for look in looks.values()}) >= len(METHODS)


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("before")

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_measurements_are_for_the_device_of_the_tensors(monkeypatch):
    """Simulate a machine with a GPU whose tensors are on the CPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    problem = Problem(load_sample())
    assert "exact bfloat16" not in {arm.method for arm in exact_arms(problem)}
    assert environment()["backend"] == "cpu"
