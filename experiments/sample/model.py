"""A small causal byte-level language model: rotary positions, grouped key heads, exact attention."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from approx_attention import attention


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model."""

    num_layers: int = 4
    model_dim: int = 256
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    hidden_dim: int = 768
    rotary_base: float = 10_000.0


def rotate(x: Array, base: float) -> Array:
    """Rotary position embedding of ``x [..., T, N, D]``: channel pairs turn with the position."""
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half) / half)
    angle = (jnp.arange(x.shape[-3])[:, None] * frequency[None, :])[:, None, :]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), a * jnp.sin(angle) + b * jnp.cos(angle)], axis=-1)


class CausalSelfAttention(nnx.Module):
    """Self-attention whose ``attention_fn`` sees q, k and v after rotary embedding."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        def linear(heads: int) -> nnx.LinearGeneral:
            return nnx.LinearGeneral(config.model_dim, (heads, config.head_dim), use_bias=False, rngs=rngs)

        self.config = config
        self.query, self.key, self.value = (
            linear(config.num_heads),
            linear(config.num_kv_heads),
            linear(config.num_kv_heads),
        )
        shape = (config.num_heads, config.head_dim)
        self.out = nnx.LinearGeneral(shape, config.model_dim, axis=(-2, -1), use_bias=False, rngs=rngs)
        self.attention_fn = functools.partial(attention, method="exact", is_causal=True)

    def __call__(self, x: Array) -> Array:
        query, key = (rotate(linear(x), self.config.rotary_base) for linear in (self.query, self.key))
        return self.out(self.attention_fn(query, key, self.value(x)))


class Layer(nnx.Module):
    """Attention and a gated feed-forward network, each on a normalised residual stream."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.attention_norm = nnx.RMSNorm(config.model_dim, rngs=rngs)
        self.attention = CausalSelfAttention(config, rngs=rngs)
        self.hidden_norm = nnx.RMSNorm(config.model_dim, rngs=rngs)
        self.up = nnx.Linear(config.model_dim, 2 * config.hidden_dim, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(config.hidden_dim, config.model_dim, use_bias=False, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = x + self.attention(self.attention_norm(x))
        gate, value = jnp.split(self.up(self.hidden_norm(x)), 2, axis=-1)
        return x + self.down(jax.nn.silu(gate) * value)


class ByteLanguageModel(nnx.Module):
    """Predicts the next byte: tokens ``[B, T]`` to logits ``[B, T, 256]``."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(256, config.model_dim, rngs=rngs)
        self.layers = nnx.List([Layer(config, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = nnx.RMSNorm(config.model_dim, rngs=rngs)
        self.head = nnx.Linear(config.model_dim, 256, use_bias=False, rngs=rngs)

    def __call__(self, tokens: Array) -> Array:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))
