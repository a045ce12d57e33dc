"""Diagnoses of heads: closed forms, brute force in float64, padding, and the output of the command."""

import json
import math
from typing import Any

import numpy as np
import pytest

from approx_attention import InputError, bounds, cli
from approx_attention.evaluation import HeadDiagnosis, Tensors, diagnose
from approx_attention.evaluation.head_report import draw_heads_of_layers, heads_over_layers
from approx_attention.evaluation.heads import SAMPLED, WORDS
from approx_attention.registry import METHODS
from tests.evaluation.test_compare import refusal
from tests.references import as_array, brute_force, causal_mask, random_head, random_heads

N = 48


def one_head(q, k, v):
    return Tensors(*(as_array(np.asarray(x)[None, :, None]) for x in (q, k, v)))


def values(seed=0, num=N, dim=4):
    return np.random.default_rng(seed).normal(size=(num, dim))


# 1. heads of known kinds


def test_uniform_weights():
    v = values() + 20
    (head,) = diagnose(one_head(values(1), np.ones((N, 4)), v), size=8)
    assert head.entropy == pytest.approx(math.log(N), rel=1e-5)
    assert head.effective_keys == pytest.approx(N, rel=1e-4)
    # A window of 8 has 15 keys, but 7 + 6 + ... + 1 fewer at each end.
    assert head.window_share == pytest.approx((15 * N - 7 * 8) / N**2, rel=1e-5)
    assert (head.sink_share, head.top_share) == pytest.approx((4 / N, 8 / N), rel=1e-5)
    assert head.heaviest_share == pytest.approx(1 / N, rel=1e-5)
    assert (head.weight_rank, head.verdict) == (1, "uniform")
    assert max(head.mean_error, head.rank_error, head.radius, head.largest_logit) < 1e-5
    # The variance of the mean of M values sampled uniformly.
    spread = np.sum((v - v.mean(0)) ** 2) / N
    assert head.samples == pytest.approx(spread / (0.01 * np.sum(v.mean(0) ** 2)), rel=1e-3)


def test_a_causal_uniform_head_sees_ever_more_keys():
    (head,) = diagnose(one_head(values(1), np.ones((N, 4)), values()), size=8, is_causal=True)
    seen = np.arange(1, N + 1)
    assert head.entropy == pytest.approx(np.log(seen).mean(), rel=1e-5)
    assert head.window_share == pytest.approx((np.minimum(seen, 8) / seen).mean(), rel=1e-5)
    assert head.heaviest_share == pytest.approx((1 / seen).mean(), rel=1e-5)
    assert head.mean_error < 1e-5


def peaked(at, sharpness=60.0):
    """A head whose query t attends to key ``at[t]``."""
    return one_head(sharpness * np.eye(N)[at], np.eye(N), values())


def test_heads_of_one_key_a_query():
    own, first, far = np.arange(N), np.zeros(N, int), (5 * np.arange(N) + 24) % N
    for is_causal in (False, True):
        (head,) = diagnose(peaked(own), size=8, is_causal=is_causal)
        assert (head.verdict, head.window_share) == ("nearby", pytest.approx(1, abs=1e-2))
        (head,) = diagnose(peaked(first), size=8, is_causal=is_causal)
        assert (head.verdict, head.sink_share) == ("sink + nearby", pytest.approx(1, abs=1e-2))
        assert head.heaviest_share == pytest.approx(1, abs=1e-2)
    (head,) = diagnose(peaked(own), size=8)
    assert head.effective_keys == pytest.approx(1, abs=0.1)
    # Of N equal singular values those beyond r hold (N - r) / N of the squares, at most a hundredth of them.
    assert head.weight_rank == math.ceil(0.99 * N)
    (head,) = diagnose(peaked(far), size=8)
    assert (head.verdict, head.methods) == ("few keys", ("top_k", "priority"))
    assert head.window_error > 0.5 > 0.1 > head.top_error
    (head,) = diagnose(peaked(far), size=N)
    assert head.verdict == "short"


def test_weights_of_low_rank():
    # Queries of each half attend to all keys of the other.
    half = np.arange(N) // (N // 2)
    q, k = 30 * np.eye(4)[1 - half], np.eye(4)[half]
    (head,) = diagnose(one_head(q, k, values() + k), size=8)
    assert head.effective_keys == pytest.approx(N / 2, rel=1e-2)
    assert (head.verdict, head.weight_rank, head.key_rank) == ("diffuse, low rank", 2, 1)
    assert head.rank_error < 1e-3
    assert head.methods == ("coreset", "nystrom")
    (head,) = diagnose(one_head(q, k, values() + k), size=8, is_causal=True)
    assert "nystrom" not in head.methods
    (head,) = diagnose(one_head(q, k, values() + k), size=8, num_queries=31)
    assert head.verdict == "diffuse"  # with so few queries the rank is small


# 2. brute force


def expected(q, k, v, mask, size, place, rank):
    """Some of the statistics, in float64."""
    weights = brute_force(q, k, np.eye(len(k)), mask=mask)[0]
    out = weights @ np.asarray(v, np.float64)
    apart = place[:, None] - rank[None, :]
    near, sinks = mask & (np.abs(apart) < size), mask & (rank < 4)[None, :]
    order = np.sort(weights, axis=1)[:, ::-1]
    of_top = weights * (weights >= order[:, size - 1 : size])
    left, singular, right = np.linalg.svd(weights, full_matrices=False)

    def error(x):
        return np.sum((x - out) ** 2)

    v = np.asarray(v, np.float64)
    distance = np.sum((v[None] - out[:, None]) ** 2, axis=-1)
    return (
        {
            "entropy": -np.sum(weights * np.log(np.where(weights > 0, weights, 1))),
            "sink_share": np.sum(weights * sinks),
            "window_share": np.sum(weights * near),
            "top_share": np.sum(order[:, :size]),
        },
        {
            "mean_error": error(mask @ v / mask.sum(1, keepdims=True)),
            "window_error": error(brute_force(q, k, v, mask=near)[0]),
            "sink_window_error": error(brute_force(q, k, v, mask=near | sinks)[0]),
            "top_error": error(of_top / of_top.sum(1, keepdims=True) @ v),
            "rank_error": error((left[:, :size] * singular[:size]) @ right[:size] @ v),
            "samples": np.sum(mask.sum(1, keepdims=True) * weights**2 * distance),
        },
        np.sum(out**2),
    )


@pytest.mark.parametrize("is_causal", [False, True])
def test_two_sequences_with_padding_are_what_brute_force_says(is_causal):
    lengths, size = (30, 21), 8
    clean = [1.5 * np.asarray(x) for x in random_heads(0, 2, 30, 30, 4, 2)]
    real = np.arange(30) < np.array(lengths)[:, None]
    noisy = Tensors(*(as_array(np.where(real[:, :, None, None], x, np.nan)) for x in clean))
    heads = diagnose(noisy, is_causal=is_causal, size=size, lengths=np.array(lengths))
    assert [head.head for head in heads] == [0, 1, 2, 3]
    for n, head in enumerate(heads):
        parts = []
        for b, length in enumerate(lengths):
            q, k, v = (x[b, :length, m] for x, m in zip(clean, (n, n // 2, n // 2), strict=True))
            mask = causal_mask(length, length) if is_causal else np.ones((length, length), bool)
            parts.append(expected(q, k, v, mask, size, np.arange(length), np.arange(length)))
        out = sum(part[2] for part in parts)
        for name in parts[0][0]:
            mean = sum(part[0][name] for part in parts) / sum(lengths)
            assert getattr(head, name) == pytest.approx(mean, rel=1e-4), name
        for name in parts[0][1]:
            square = sum(part[1][name] for part in parts) / out
            right = square / 0.01 if name == "samples" else math.sqrt(square)
            assert getattr(head, name) == pytest.approx(right, rel=1e-3), name


def numbers(head):
    """All numeric fields, in order."""
    return [x for name, x in vars(head).items() if isinstance(x, int | float)] + list(head.theorems.values())


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("at", ["right", "left", "within"])
def test_padding_changes_nothing(is_causal, at):
    q, k, v = random_head(1, 20, 20)
    places = {"right": np.arange(20), "left": np.arange(12, 32), "within": np.r_[:9, 21:32]}[at]
    padded = [np.full((32, 8), fill, np.float32) for fill in (np.nan, np.inf, 1e30)]
    for whole, x in zip(padded, (q, k, v), strict=True):
        whole[places] = x
    options = {"is_causal": is_causal, "size": 4}
    (alone,) = diagnose(one_head(q, k, v), **options)
    (masked,) = diagnose(one_head(*padded), mask=np.isin(np.arange(32), places), **options)
    assert numbers(masked) == pytest.approx(numbers(alone), rel=1e-4)
    assert masked.verdict == alone.verdict


def test_other_numbers_of_queries_than_keys():
    q, k, v = map(np.asarray, random_head(2, 12, 20))
    mask = np.arange(20) >= 3
    for is_causal, seen in ((False, 12), (True, 9)):
        (head,) = diagnose(one_head(q, k, v), is_causal=is_causal, size=4, mask=mask)
        rows = np.arange(12)[12 - seen :]
        visible = np.broadcast_to(mask, (seen, 20)) & (causal_mask(12, 20)[rows] if is_causal else True)
        place = rows - 3 if is_causal else rows
        shares, _, _ = expected(q[rows], k, v, visible, 4, place, np.arange(20) - 3)
        for name, total in shares.items():
            assert getattr(head, name) == pytest.approx(total / seen, rel=1e-4), name


def test_some_queries_of_a_long_sequence():
    t = 600
    for is_causal in (False, True):
        (head,) = diagnose(one_head(np.ones((t, 2)), np.ones((t, 2)), values(0, t)), num_queries=7, is_causal=is_causal)
        seen = np.linspace(0, t - 1, 7).round() + 1 if is_causal else np.full(7, t)
        assert head.entropy == pytest.approx(np.log(seen).mean(), rel=1e-5)
        assert head.weight_rank <= 7


# 3. theorems


def test_theorems_are_those_of_the_bounds():
    q, k, v = map(np.asarray, random_head(3, N, N, head_dim=2))
    (short,) = diagnose(one_head(0.05 * q, 0.05 * k, v))
    (long,) = diagnose(one_head(10 * q, 10 * k, v))
    assert {"coreset", "polynomial"} <= set(short.theorems) - set(short.vacuous)
    assert set(long.vacuous) == set(long.theorems)
    assert math.isinf(long.theorems["polynomial"])
    centred = np.asarray(k, np.float64) - np.asarray(k, np.float64).mean(0)
    radius = 100 / math.sqrt(2) * np.linalg.norm(q, axis=1).max() * np.linalg.norm(centred, axis=1).max()
    assert long.radius == pytest.approx(radius, rel=1e-5)
    assert long.largest_logit == pytest.approx(100 / math.sqrt(2) * np.abs(q @ centred.T).max(), rel=1e-4)
    size = bounds.coreset_size_bound(0.1, radius=radius, head_dim=2, num_keys=N).size
    assert long.theorems["coreset"] == pytest.approx(size, rel=1e-3)
    weights = brute_force(0.05 * q, 0.05 * k, np.eye(N))[0]
    out = weights @ np.asarray(v, np.float64)
    off = np.asarray(v, np.float64) - np.asarray(v, np.float64).mean(0)
    sketch = (np.sum(weights**2) * np.sum(off**2) + np.sum((weights @ off) ** 2)) / (0.01 * np.sum(out**2))
    assert short.theorems["unreduced_jlt"] == pytest.approx(sketch, rel=1e-3)


# 4. bad input


def test_bad_input_is_one_clear_error():
    tensors = one_head(*random_head(0, 20, 20))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"tolerance": 0.0}, "tolerance must be between 0 and 1, got 0.0"),
        ({"tolerance": math.nan}, "tolerance must be between 0 and 1, got nan"),
        ({"tolerance": "0.1"}, "tolerance must be between 0 and 1, got 0.1"),
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"num_queries": 1.5}, "num_queries must be an integer, got 1.5"),
        ({"scale": -1.0}, "scale must be positive"),
        ({"lengths": [21]}, "lengths must be from 1 to S = 20, got 21"),
        ({"mask": np.zeros(20, bool)}, "every sequence must have a real key, but sequence 0 has none"),
    ]
    for options, told in cases:
        with pytest.raises(InputError, match=told):
            diagnose(tensors, **options)
    query, key, value = map(np.asarray, tensors)
    infinite = np.where(np.arange(20)[:, None, None] == 3, np.nan, key)
    changed = [
        ((query, key[..., :7], value), {}, "must share the head dimension, got 8 and 7"),
        ((query[0], key[0], value[0]), {}, r"query must be \[B, T, N, D\], got shape \(20, 1, 8\)"),
        ((query, infinite, value), {}, "key contains numbers that are not finite"),
        ((query, key, 0 * value), {"size": 4}, "the outputs of head 0 are all zero"),
        ((query[:, :2], key, value), {"is_causal": True, "mask": np.arange(20) > 3},
         "every sequence must have a query that sees a real key"),
    ]  # fmt: skip
    for given, options, told in changed:
        with pytest.raises(InputError, match=told):
            diagnose(Tensors(*map(as_array, given)), **options)


# 5. the command


def heads_command(*arguments):
    return cli.main(["heads", *map(str, arguments)])


def test_the_sample(tmp_path, capsys):
    assert heads_command("--queries", 48, "--out", tmp_path) == 0
    document = json.loads((tmp_path / "heads.json").read_text())
    verdicts = [row["verdict"] for layer in document["layers"].values() for row in layer["rows"]]
    # As in `compare`: a window is enough for the sharp layer, but a few keys are not enough for the flat one.
    assert verdicts == ["nearby", "nearby", "diffuse", "diffuse"]
    assert document["is_complete"]
    assert [(row["verdict"], row["heads"]) for row in document["summary"]] == [
        ("nearby", {"sharp": [0, 1]}),
        ("diffuse", {"flat": [0, 1]}),
    ]
    assert (tmp_path / "heads.png").stat().st_size > 10_000
    text = (tmp_path / "heads.md").read_text()
    assert "## the shipped sample, flat: causal" in text
    assert "| nearby    | 2       | local, longformer" in text
    printed = capsys.readouterr().out
    assert "error: mean" in printed
    assert "heads.md" in printed


def test_a_file_of_one_layer(tmp_path, capsys):
    tensors: Any = dict(zip("qkv", map(np.asarray, random_heads(0, 2, 16, 16, 4, 2)), strict=True))
    np.savez(tmp_path / "a.npz", lengths=np.array([16, 9]), **tensors)
    out = tmp_path / "out"
    assert heads_command(tmp_path / "a.npz", "--lengths", "lengths", "--size", 4, "--out", out) == 0
    rows = json.loads((out / "heads.json").read_text())["rows"]
    loaded = Tensors(*(as_array(tensors[name]) for name in "qkv"))
    made = diagnose(loaded, size=4, lengths=[16, 9])
    assert [row["entropy"] for row in rows] == pytest.approx([head.entropy for head in made])
    assert sorted(path.name for path in out.iterdir()) == ["heads.json", "heads.md", "heads.png"]
    assert (out / "heads.md").read_text().count("\n## ") == 2
    capsys.readouterr()
    for arguments, told in (
        (("--tolerance", 2), "tolerance must be between 0 and 1, got 2.0"),
        (("--size", 0), "size"),
        (("--methods", "favor"), "No such option"),
    ):
        assert told in refusal(capsys, "heads", tmp_path / "a.npz", *arguments, "--out", out)


def test_layers_of_different_numbers_of_heads_are_one_figure():
    made = diagnose(Tensors(*random_heads(0, 1, 16, 16, 4, 2)), size=4)
    layers = {"layer0": made, "layer1": made[:1]}
    assert sum(row.num_heads for row in heads_over_layers(layers)) == 5
    figure = draw_heads_of_layers(layers, "$a [b]", 4)
    assert [len(axes.images) for axes in figure.axes[:6]] == [1] * 6
    assert np.isnan(figure.axes[1].images[0].get_array().filled(np.nan)[1, 1:]).all()
    assert isinstance(made[0], HeadDiagnosis)


def test_every_word_of_a_verdict_suits_a_method():
    named = {word for method in METHODS.values() for word in method.suits}
    assert named == {*WORDS, SAMPLED}
