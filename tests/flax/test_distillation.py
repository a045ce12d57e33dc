import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from approx_attention.nnx import (
    ApproxAttention,
    Hedgehog,
    LinformerAttention,
    Rfa,
    distill_attention,
    layer_errors,
    replace_attention,
    tune,
)
from tests.flax.test_stacks import stack_of
from tests.references import as_array

LENGTH, WIDTH, HEADS = 12, 8, 2


class Model(nnx.Module):
    """Two layers of attention with residuals; the first ``lengths`` tokens are real."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([
            nnx.MultiHeadAttention(HEADS, WIDTH, kernel_init=nnx.initializers.normal(0.8), decode=False, rngs=rngs)
            for _ in range(2)
        ])  # fmt: skip

    def __call__(self, inputs):
        x, lengths = inputs
        mask = (jnp.arange(x.shape[1])[None] < lengths[:, None])[:, None, None]
        for layer in self.layers:
            x = x + layer(x, mask=mask)
        return x


def normal(seed, *shape):
    return as_array(np.random.default_rng(seed).normal(size=shape))


def batch(seed=0, lengths=(LENGTH, LENGTH)):
    return normal(seed, 2, LENGTH, WIDTH), jnp.array(lengths)


def pair(make, layers=(0, 1)):
    teacher = Model()
    replace_attention(teacher, "exact")
    model = nnx.clone(teacher)
    for i in layers:
        model.layers[i].attention_fn = nnx.data(make(i))
    return model, teacher


def linformer(i, **options):
    return ApproxAttention(LinformerAttention(HEADS, LENGTH, num_slots=3, rngs=nnx.Rngs(i), **options))


def arrays(module):
    return jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(module, nnx.Param)))


pytestmark = pytest.mark.usefixtures("models")


def test_errors_fall_and_nothing_else_moves():
    model, teacher = pair(lambda i: linformer(i) if i else ApproxAttention(Hedgehog(WIDTH // HEADS, HEADS)))
    before = [arrays(layer) for layer in model.layers]
    batches = [batch(i) for i in range(8)]
    result = distill_attention(model, teacher, batches, 150, optimizer=optax.adam(0.05), held_out=[batch(9)])
    assert result.num_tokens == 150 * 2 * LENGTH
    for (path, error), share in zip(layer_errors(model, teacher, [batch(9)]).items(), (0.9, 0.8), strict=True):
        assert error.mean() < share * result.before[path].mean()
        np.testing.assert_array_equal(error, result.after[path])
    after = [arrays(layer) for layer in model.layers]
    for x, y, exact in zip(before, after, teacher.layers, strict=True):
        learned = x.pop("attention_fn"), y.pop("attention_fn")
        assert all((x != y).any() for x, y in zip(*map(jax.tree.leaves, learned), strict=True))
        jax.tree.map(np.testing.assert_array_equal, x, y)
        jax.tree.map(np.testing.assert_array_equal, x, arrays(exact))


def test_errors_are_those_of_the_inputs_of_the_teacher():
    model, teacher = pair(linformer, layers=())
    replace_attention(model, "mean_value")
    inputs, seen = batch(1), {}
    probe = nnx.clone(teacher)
    for i, layer in enumerate(probe.layers):

        def record(q, k, v, i=i, exact=layer.attention_fn, **options):
            seen[i] = np.asarray(v), np.asarray(exact(q, k, v, **options))
            return seen[i][1]

        layer.attention_fn = nnx.static(record)
    probe(inputs)
    for i, error in enumerate(layer_errors(model, teacher, [inputs]).values()):
        v, out = seen[i]
        rest = out - v.mean(1, keepdims=True)
        expected = [np.linalg.norm(rest[:, :, h]) / np.linalg.norm(out[:, :, h]) for h in range(HEADS)]
        np.testing.assert_allclose(error, expected, rtol=1e-5)


def test_an_exact_student_has_no_loss():
    losses = []
    model, teacher = pair(
        lambda i: ApproxAttention(
            LinformerAttention(
                HEADS, LENGTH, num_slots=LENGTH, init=lambda key, shape, dtype: jnp.eye(*shape), rngs=nnx.Rngs(0)
            )
        )
    )
    result = distill_attention(
        model,
        teacher,
        [batch()],
        2,
        optimizer=optax.sgd(1e-3),
        held_out=[batch(1)],
        on_step=lambda state, loss: losses.append(float(loss)),
    )
    assert max(losses) < 1e-12
    assert max(float(x.max()) for x in result.after.values()) < 1e-5


def test_resumes_to_the_bit():
    def rfa_or_linformer(i):
        module = Rfa(WIDTH // HEADS, HEADS, options={"num_features": 8}, rngs=nnx.Rngs(0))
        return linformer(i) if i else ApproxAttention(module, redraw="every_call", rngs=nnx.Rngs(attention=i))

    saved, options = {}, {"optimizer": optax.adam(0.1), "held_out": [batch(9)]}
    batches = [batch(i, (LENGTH, 5)) for i in range(3)]

    def save(state, loss):
        saved[int(state.step)] = state

    model, teacher = pair(rfa_or_linformer)
    whole = distill_attention(model, teacher, batches, 4, on_step=save, **options)
    again, teacher = pair(rfa_or_linformer)
    resumed = distill_attention(again, teacher, batches, 4, state=saved[2], **options)
    assert resumed.num_tokens == whole.num_tokens == 4 * (LENGTH + 5)
    jax.tree.map(np.testing.assert_array_equal, arrays(model), arrays(again))
    jax.tree.map(np.testing.assert_array_equal, (whole.before, whole.after), (resumed.before, resumed.after))
    # Every step samples new features.
    counts = [int(x[...]) for x in jax.tree.leaves(nnx.state(model.layers[0], nnx.RngCount))]
    assert counts == [4]


def test_padding_is_not_seen():
    def errors(fill):
        model, teacher = pair(linformer)
        x, lengths = batch(3, (7, LENGTH))
        soiled = np.array(x)
        soiled[0, 7:] = fill
        batches = [(as_array(soiled), lengths)]
        return distill_attention(model, teacher, batches, 3, optimizer=optax.adam(0.1), held_out=batches)

    zeros, nans = errors(0), errors(np.nan)
    assert zeros.num_tokens == nans.num_tokens == 3 * (7 + LENGTH)
    jax.tree.map(np.testing.assert_array_equal, zeros.after, nans.after)
    assert np.isfinite(zeros.after["layers.1"]).all()


def test_tuning_moves_the_whole_model_and_resumes():
    saved, target = {}, jnp.ones((2, LENGTH, WIDTH))

    def loss(model, inputs):
        return jnp.mean((model(inputs) - target) ** 2)

    def tuned(**options):
        model, _ = pair(linformer)
        losses = []
        state = tune(
            model,
            loss,
            [batch(0), batch(1)],
            6,
            optimizer=optax.adam(0.05),
            on_step=lambda state, loss: (losses.append(float(loss)), saved.setdefault(int(state.step), state)),
            **options,
        )
        assert int(state.step) == 6
        return model, losses

    model, losses = tuned()
    again, _ = tuned(state=saved[3])
    assert losses[4] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, arrays(model), arrays(again))
    start = arrays(pair(linformer)[0])
    assert all((x != y).any() for x, y in zip(jax.tree.leaves(start), jax.tree.leaves(arrays(model)), strict=True))


def hedgehog_in_float64(q, k, v, maps, is_causal):
    def features(x):
        exps = [np.exp(sign * x - (sign * x).max(-1, keepdims=True)) for sign in (1, -1)]
        return np.concatenate([x / x.sum(-1, keepdims=True) for x in exps], -1)

    q, k = ((x / x.shape[-1] ** 0.25) @ a.T for x, a in zip((q, k), maps, strict=True))
    weights = features(q) @ features(k).T * (np.tri(len(q)) if is_causal else 1)
    return weights @ v / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("is_causal", [False, True])
def test_hedgehog_is_its_kernel(is_causal):
    q, k, v = (2 * np.asarray(normal(i, 1, LENGTH, HEADS, 4)) for i in range(3))
    module = Hedgehog(4, HEADS, is_causal=is_causal, block_size=3)
    maps = np.asarray(module.maps[...]) + 0.5 * np.asarray(normal(4, HEADS, 2, 4, 4))
    module.maps[...] = as_array(maps)
    real = 9
    for x in (k, v):
        x[:, real:] = np.nan
    out = np.asarray(jax.jit(lambda q, k, v: module(q, k, v, key_value_seq_lengths=jnp.array([real])))(q, k, v))
    for head in range(HEADS):
        tensors = (np.asarray(x[0, :real, head], np.float64) for x in (q, k, v))
        expected = hedgehog_in_float64(*tensors, np.asarray(maps[head], np.float64), is_causal)
        np.testing.assert_allclose(out[0, :real, head], expected, atol=1e-5)


def test_hedgehog_in_half_precision():
    q, k, v = (jax.random.normal(jax.random.key(i), (1, LENGTH, HEADS, 4), jnp.bfloat16) for i in range(3))
    module = Hedgehog(4, HEADS)
    out = module(q, k, v)
    assert out.dtype == jnp.bfloat16
    wide = module(*(x.astype(jnp.float32) for x in (q, k, v)))
    np.testing.assert_allclose(out.astype(jnp.float32), wide, atol=1e-2)
    # A step of training that bfloat16 would round away.
    module.maps[...] *= 1 + 2.0**-9
    stepped = module(*(x.astype(jnp.float32) for x in (q, k, v)))
    assert jnp.any(stepped != wide)
    np.testing.assert_array_equal(module(q, k, v), stepped.astype(jnp.bfloat16))


def test_what_can_not_be_fitted():
    options = {"optimizer": optax.sgd(0.1), "held_out": [batch()]}
    model, teacher = pair(linformer)
    with pytest.raises(ValueError, match="has parameters to learn"):
        distill_attention(nnx.clone(teacher), teacher, [batch()], 1, **options)
    with pytest.raises(ValueError, match="at least one batch, got none"):
        distill_attention(model, teacher, [], 1, **options)
    other = tune(
        nnx.Linear(1, 1, rngs=nnx.Rngs(0)), lambda model, x: model(x).sum(), [jnp.ones(1)], 1, optimizer=optax.sgd(0.1)
    )
    with pytest.raises(ValueError, match="state must belong to this model and optimizer"):
        distill_attention(model, teacher, [batch()], 2, state=other, **options)
    del teacher.layers[1]
    with pytest.raises(ValueError, match=r"same attention layers, got layers.0, layers.1 and layers.0$"):
        distill_attention(model, teacher, [batch()], 1, **options)
    with pytest.raises(ValueError, match="does not reach the attention of layers.1"):
        layer_errors(model, nnx.clone(model), [batch()], call=lambda model, x: model.layers[0](x[0]))
    stack = stack_of(3)
    with pytest.raises(NotImplementedError, match="stacked by nnx.vmap"):
        layer_errors(stack, stack, [batch()])
