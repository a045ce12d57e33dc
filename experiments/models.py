"""The reference models: a language model and a small vision transformer.

Each takes any registered attention method by name with its hyper-parameters.
"""

import dataclasses
import inspect
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import AxisType, Mesh

from approx_attention.core import did_you_mean
from approx_attention.nnx import ApproxAttention, LinformerAttention, mean_pool_init, scale_keeping_init
from approx_attention.registry import get_method
from experiments.config import STRICT, Count, Positive, Whole


@dataclasses.dataclass(frozen=True)
class ProjectionsConfig:
    """Learned projections of ``linformer`` for inputs of up to ``max_length`` tokens.

    Attributes:
        sharing: whose are the same, as in `approx_attention.nnx.LinformerAttention`; ``layerwise`` shares one between
            all layers, heads, keys and values.
        init: random entries that keep the scale of logits, or means of segments.
        frozen: do not train them.
    """

    max_length: Count
    sharing: Literal["headwise", "layerwise"] = "headwise"
    init: Literal["random", "mean_pool"] = "random"
    frozen: bool = False

    __pydantic_config__ = STRICT


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """Over how many devices the sequences of a batch, and the tokens of a sequence, are spread."""

    data: Count = 1
    sequence: Count = 1

    __pydantic_config__ = STRICT

    def mesh(self) -> Mesh:
        """The devices, with the axes ``data`` and ``sequence``.

        Raises:
            ValueError: there are fewer.
        """
        devices = jax.devices()
        if len(devices) < self.data * self.sequence:
            raise ValueError(
                f"a mesh of {self.data} x {self.sequence} needs {self.data * self.sequence} devices, there are "
                f"{len(devices)}; JAX_NUM_CPU_DEVICES=8 makes eight of a CPU"
            )
        shape, axes = (self.data, self.sequence), ("data", "sequence")
        return jax.make_mesh(shape, axes, (AxisType.Auto,) * 2, devices=devices[: self.data * self.sequence])


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """A registered method and its hyper-parameters.

    Attributes:
        method: its name.
        settings: its arguments; lists become tuples.
        gated: whether a learned map of the layer's input gives it ``gate_logits``.
        projections: of ``linformer``, where they are learned or drawn and not pooled.
        parallel: over which devices it is computed, by `approx_attention.distributed`; none for one.
    """

    method: str = "exact"
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    gated: bool = False
    projections: ProjectionsConfig | None = None
    parallel: ParallelConfig | None = None

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        if self.projections and self.method != "linformer":
            raise ValueError(f"method {self.method!r} has no projections; 'linformer' has")
        if self.projections and self.settings.keys() & {"projection_k", "projection_v"}:
            raise ValueError("projection_k and projection_v are either settings or learned projections")
        known = inspect.signature(get_method(self.method).function).parameters
        for name in self.settings:
            if name not in known:
                raise ValueError(f"method {self.method!r} has no argument {name!r}{did_you_mean(name, known)}")
        if self.gated and "gate_logits" not in known:
            raise ValueError(f"method {self.method!r} has no gates")
        if self.parallel and (self.projections or self.gated):
            raise ValueError(f"method {self.method!r} has neither projections nor gates in parallel")

    def arguments(self) -> dict[str, Any]:
        """The hyper-parameters as a function takes them: hashable."""
        return {name: tuple(x) if isinstance(x, list) else x for name, x in self.settings.items()}

    def attention_fn(self, num_kv_heads: int, is_causal: bool, key: Array) -> ApproxAttention:
        """The method for one layer, drawn from ``key``: training and evaluation see the same features."""
        options = self.arguments()
        if self.projections is None:
            over = self.parallel and {"mesh": self.parallel.mesh(), "batch_axis": "data", "sequence_axis": "sequence"}
            return ApproxAttention(
                self.method,
                is_causal=is_causal,
                rngs=nnx.RngStream(key, tag="attention"),
                **(over or {}),
                **options,
            )
        module = LinformerAttention(
            num_kv_heads,
            self.projections.max_length,
            num_slots=options.pop("num_slots", 256),
            sharing="key_value" if self.projections.sharing == "layerwise" else self.projections.sharing,
            init=mean_pool_init() if self.projections.init == "mean_pool" else scale_keeping_init,
            frozen=self.projections.frozen,
            is_causal=is_causal,
            options=options,
            rngs=nnx.Rngs(key),
        )
        return ApproxAttention(module, is_causal=is_causal)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of a transformer, and the type it computes in (its parameters are float32).

    Attributes:
        convolution: tokens of a depth-wise convolution before queries, keys and values, 0 for none: with 3 or 4, one
            layer can bring a value its key, and a window has no lead by pairs of neighbours (Arora et al. 2023).
        positions: length of a sequence whose places have learned vectors, in place of rotary positions; 0 for rotary.
    """

    num_layers: Count = 3
    model_dim: Count = 128
    num_heads: Count = 4
    num_kv_heads: Count = 2
    head_dim: Count = 32
    hidden_dim: Count = 384
    rotary_base: Positive = 10_000.0
    patch_size: Count = 4
    convolution: Whole = 0
    positions: Whole = 0
    dtype: Literal["float32", "bfloat16"] = "float32"

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, for channels are rotated in pairs; got {self.head_dim}")


def rotate(x: Array, base: float, first: Array | int = 0) -> Array:
    """Rotary position embedding of ``x [B, T, N, D]``: pairs of channels turn with the position.

    The first token stands at ``first``.
    """
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half) / half)
    positions = jnp.asarray(first)[..., None] + jnp.arange(x.shape[-3])
    angle = (positions[..., None] * frequency)[..., None, :]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [a * jnp.cos(angle) - b * jnp.sin(angle), a * jnp.sin(angle) + b * jnp.cos(angle)]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


class ShortConvolution(nnx.Module):
    """Tokens plus a depth-wise convolution over ``width`` tokens: those up to each, or around it."""

    tail: Any

    def __init__(self, model_dim: int, width: int, is_causal: bool, rngs: nnx.Rngs):
        self.width, self.is_causal = width, is_causal
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (width, model_dim)) / width)
        # The last tokens of a sequence that comes in parts.
        self.tail = nnx.data(None)

    def __call__(self, x: Array, num_seen: Array | int | None) -> Array:
        """``[B, T, model_dim]`` to the same.

        Args:
            x: the tokens.
            num_seen: tokens of the sequences that came before, the same for all; None for whole sequences.
        """
        before = self.width - 1 if self.is_causal else (self.width - 1) // 2
        joined = jnp.pad(x, ((0, 0), (before, self.width - 1 - before), (0, 0)))
        if num_seen is not None:
            tail = jnp.zeros((x.shape[0], before, x.shape[2]), x.dtype)
            if self.tail is not None and self.tail.shape == tail.shape:
                tail = jnp.where(jnp.reshape(num_seen, (-1, 1, 1)) > 0, self.tail[...], 0)
            joined = joined.at[:, :before].set(tail)
            self.tail = nnx.Cache(joined[:, x.shape[1] : x.shape[1] + before])
        kernel = self.kernel[...].astype(x.dtype)
        return x + sum(kernel[i] * joined[:, i : i + x.shape[1]] for i in range(self.width))


class SelfAttention(nnx.Module):
    """Grouped-query self-attention with rotary positions; ``attention_fn`` sees q, k and v after them.

    A random method draws once, from ``draw``, the run's seed and the layer's number, so that training and evaluation
    see the same features, and each seed others.
    """

    attention_fn: Any

    def __init__(
        self,
        config: ModelConfig,
        attention_config: AttentionConfig,
        *,
        is_causal: bool,
        draw: tuple[int, int],
        rngs: nnx.Rngs,
    ):
        def linear(heads: int) -> nnx.LinearGeneral:
            return nnx.LinearGeneral(
                config.model_dim, (heads, config.head_dim), use_bias=False, dtype=config.dtype, rngs=rngs
            )

        self.rotary_base = None if config.positions else config.rotary_base
        self.is_causal, self.draw = is_causal, draw
        self.head_dim, self.num_heads, self.num_kv_heads = config.head_dim, config.num_heads, config.num_kv_heads
        self.query = linear(config.num_heads)
        self.key, self.value = (linear(config.num_kv_heads) for _ in "kv")
        shape = (config.num_heads, config.head_dim)
        self.out = nnx.LinearGeneral(
            shape, config.model_dim, axis=(-2, -1), use_bias=False, dtype=config.dtype, rngs=rngs
        )
        self.gate = nnx.Linear(config.model_dim, config.num_kv_heads, rngs=rngs) if attention_config.gated else None
        self.mix = (
            ShortConvolution(config.model_dim, config.convolution, is_causal, rngs) if config.convolution else None
        )
        self.use(attention_config)

    def use(self, config: AttentionConfig) -> None:
        """Answers with another method from now on; the layer's other parameters stay."""
        if config.gated and self.gate is None:
            raise ValueError("this layer was made without gates")
        self.gated = config.gated
        seed, number = self.draw
        key = jax.random.fold_in(jax.random.key(seed), number)
        self.attention_fn = nnx.data(config.attention_fn(self.num_kv_heads, self.is_causal, key))

    def __call__(self, x: Array) -> Array:
        first = getattr(self.attention_fn, "num_seen", 0)
        if self.mix is not None:
            x = self.mix(x, first if getattr(self.attention_fn, "cache", None) is not None else None)
        query, key = self.query(x), self.key(x)
        if self.rotary_base is not None:
            query, key = (rotate(y, self.rotary_base, first) for y in (query, key))
        # Gates of .95 at first, which forget over about twenty tokens.
        gates = self.gate(x) + 3.0 if self.gate is not None and self.gated else None
        options: dict[str, Any] = {} if gates is None else {"gate_logits": gates}
        return self.out(self.attention_fn(query, key, self.value(x), **options))


class Layer(nnx.Module):
    """Attention and a gated feed-forward network, each on a normalised residual stream."""

    def __init__(self, config: ModelConfig, attention_config: AttentionConfig, **options: Any):
        rngs: nnx.Rngs = options["rngs"]
        self.attention_norm = nnx.RMSNorm(config.model_dim, dtype=config.dtype, rngs=rngs)
        self.attention = SelfAttention(config, attention_config, **options)
        self.hidden_norm = nnx.RMSNorm(config.model_dim, dtype=config.dtype, rngs=rngs)
        self.up = nnx.Linear(config.model_dim, 2 * config.hidden_dim, use_bias=False, dtype=config.dtype, rngs=rngs)
        self.down = nnx.Linear(config.hidden_dim, config.model_dim, use_bias=False, dtype=config.dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = x + self.attention(self.attention_norm(x))
        gate, value = jnp.split(self.up(self.hidden_norm(x)), 2, axis=-1)
        return x + self.down(jax.nn.silu(gate) * value)


class Transformer(nnx.Module):
    """Layers and a final norm, ``[B, T, model_dim]`` to the same in float32."""

    def __init__(
        self, config: ModelConfig, attention_config: AttentionConfig, *, is_causal: bool, seed: int, rngs: nnx.Rngs
    ):
        self.layers = nnx.List(
            [
                Layer(config, attention_config, is_causal=is_causal, draw=(seed, index), rngs=rngs)
                for index in range(config.num_layers)
            ]
        )
        self.norm = nnx.RMSNorm(config.model_dim, rngs=rngs)
        _share_projections([layer.attention for layer in self.layers], attention_config)

    def __call__(self, x: Array) -> Array:
        for layer in self.layers:
            x = layer(x)
        return self.norm(x.astype(jnp.float32))


class LanguageModel(nnx.Module):
    """Predicts the next token from those before: tokens ``[B, T]`` to logits ``[B, T, vocabulary]``.

    After `init_cache` a call brings more tokens.
    """

    def __init__(
        self,
        config: ModelConfig,
        attention_config: AttentionConfig,
        *,
        vocabulary: int,
        is_causal: bool = True,
        seed: int = 0,
        rngs: nnx.Rngs,
    ):
        if config.positions and is_causal:
            raise ValueError("a model that continues sequences has rotary positions, got learned ones")
        self.embedding = nnx.Embed(vocabulary, config.model_dim, dtype=config.dtype, rngs=rngs)
        self.body = Transformer(config, attention_config, is_causal=is_causal, seed=seed, rngs=rngs)
        self.head = nnx.Linear(config.model_dim, vocabulary, use_bias=False, rngs=rngs)
        self.positions = nnx.data(None)
        if config.positions:  # as large as the vectors of tokens
            positions = jax.random.normal(rngs.params(), (config.positions, config.model_dim))
            self.positions = nnx.Param(positions / config.model_dim**0.5)

    def __call__(self, tokens: Array) -> Array:
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions[...].astype(x.dtype)
        return self.head(self.body(x))


class VisionTransformer(nnx.Module):
    """Classifies images ``[B, H, W, C]`` from patches in raster order, with learned positions."""

    def __init__(
        self,
        config: ModelConfig,
        attention_config: AttentionConfig,
        *,
        image_shape: tuple[int, int, int],
        num_classes: int,
        seed: int = 0,
        rngs: nnx.Rngs,
    ):
        height, width, channels = image_shape
        if height % config.patch_size or width % config.patch_size:
            raise ValueError(f"patch_size must divide the image's {height} x {width}, got {config.patch_size}")
        self.patch_size = config.patch_size
        num_patches = height * width // config.patch_size**2
        self.embedding = nnx.Linear(channels * config.patch_size**2, config.model_dim, dtype=config.dtype, rngs=rngs)
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (num_patches, config.model_dim)))
        self.body = Transformer(config, attention_config, is_causal=False, seed=seed, rngs=rngs)
        self.head = nnx.Linear(config.model_dim, num_classes, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        batch, height, width, channels = images.shape
        side = self.patch_size
        patches = images.reshape(batch, height // side, side, width // side, side, channels).swapaxes(2, 3)
        x = self.embedding(patches.reshape(batch, -1, side * side * channels)) + self.positions[...]
        return self.head(self.body(x.astype(self.embedding.dtype or x.dtype)).mean(1))


def attention_layers(model: nnx.Module) -> dict[str, SelfAttention]:
    """The attention layers of a model by their path in it."""
    return {
        ".".join(map(str, path)): module for path, module in nnx.iter_graph(model) if isinstance(module, SelfAttention)
    }


def use_attention(model: nnx.Module, config: AttentionConfig) -> None:
    """Puts another method into every attention layer of a trained model; its parameters stay."""
    layers = list(attention_layers(model).values())
    for layer in layers:
        layer.use(config)
    _share_projections(layers, config)


def _share_projections(layers: list[SelfAttention], config: AttentionConfig) -> None:
    """Ties the projections of all layers where they are shared between them."""
    if config.projections and config.projections.sharing == "layerwise":
        modules: list[Any] = [layer.attention_fn.method for layer in layers]
        first, *others = modules
        for module in others:
            module.projections = first.projections
