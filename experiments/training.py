"""One training loop for every task: resumes after a kill, logs each step's figures, evaluates at the end."""

import dataclasses
import json
import pathlib
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from approx_attention.evaluation import write_atomically
from experiments import data
from experiments.checkpoints import brief, open_checkpoints, restore, save
from experiments.config import (
    STRICT,
    ConfigError,
    Count,
    NonNegative,
    Positive,
    Seeded,
    Share,
    checked,
)
from experiments.data import DataConfig, Dataset
from experiments.models import AttentionConfig, LanguageModel, ModelConfig, VisionTransformer
from experiments.run_files import as_line


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with clipped gradients on a cosine schedule, and how often to look and to save."""

    steps: Count
    batch: Count = 8
    peak_learning_rate: Positive = 2e-3
    warmup: Share = 0.05
    weight_decay: NonNegative = 0.1
    clip_norm: Positive = 1.0
    log_every: Count = 20
    checkpoint_every: Count = 200
    evaluation_batches: Count = 8

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        # Else a resumed run would log other means than one that was never stopped.
        if self.checkpoint_every % self.log_every:
            raise ValueError(
                f"checkpoint_every must be a multiple of log_every, got {self.checkpoint_every} and {self.log_every}"
            )


@dataclasses.dataclass(frozen=True)
class TrainingConfig(Seeded):
    """A model with one attention method, trained on one data set."""

    data: DataConfig
    train: OptimizerConfig
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    attention: AttentionConfig = dataclasses.field(default_factory=AttentionConfig)

    def __post_init__(self) -> None:
        parallel = self.attention.parallel
        if parallel and self.train.batch % parallel.data:
            raise ValueError(f"batch must be a multiple of parallel.data = {parallel.data}, got {self.train.batch}")

    def trains(self) -> list["TrainingConfig"]:
        """What is checked before anything runs."""
        return [self]


@dataclasses.dataclass(frozen=True)
class TrainsExact(Seeded):
    """Base class of the settings of a study that trains with exact attention, and then replaces or compresses it."""

    training: TrainingConfig

    def __post_init__(self) -> None:
        if self.training.seed != 0:
            raise ValueError(f"the seed is a key next to 'training', not in it, where it is {self.training.seed}")
        if self.training.attention.method != "exact":
            method = self.training.attention.method
            raise ValueError(
                f"training.attention.method must be 'exact', got {method!r}: the study changes it afterwards"
            )

    def trains(self) -> list[TrainingConfig]:
        """What is checked before anything runs."""
        return [self.training]

    @property
    def seeded_training(self) -> TrainingConfig:
        """The training with the seed of the run."""
        return dataclasses.replace(self.training, seed=self.seed)


def build_model(config: TrainingConfig, dataset: Dataset) -> nnx.Module:
    """The reference model that reads this kind of data, freshly initialised."""
    common: dict[str, Any] = {"seed": config.seed, "rngs": nnx.Rngs(config.seed)}
    if dataset.kind == "sequence":
        return LanguageModel(
            config.model, config.attention, vocabulary=dataset.vocabulary, is_causal=dataset.is_causal, **common
        )
    return VisionTransformer(
        config.model, config.attention, image_shape=dataset.image_shape, num_classes=dataset.num_classes, **common
    )


def predict(model: nnx.Module, batch: Mapping[str, Any]) -> tuple[Array, Array]:
    """Logits and the targets they are to tell, -1 where nothing is asked."""
    if isinstance(model, LanguageModel):
        return model(batch["tokens"]), batch["targets"]
    if isinstance(model, VisionTransformer):
        return model(batch["image"]), batch["label"]
    raise TypeError(f"{type(model).__name__} is none of the reference models")


def bits(model: nnx.Module, batch: Mapping[str, Any]) -> tuple[Array, Array, Array]:
    """Cross-entropy in bits of every target, whether it was told right, and which targets count."""
    logits, targets = predict(model, batch)
    asked = targets >= 0
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0)) / np.log(2)
    return entropy, logits.argmax(-1) == targets, asked


_compiled_bits = nnx.jit(bits)


def mean_bits(model: nnx.Module, batch: Mapping[str, Any]) -> Array:
    """The loss: mean cross-entropy in bits over the targets that count."""
    entropy, _, asked = bits(model, batch)
    return jnp.where(asked, entropy, 0).sum() / jnp.maximum(asked.sum(), 1)


@nnx.jit
def train_step(model: nnx.Module, optimizer: nnx.Optimizer, batch: Mapping[str, Any]) -> Array:
    """One step of gradient descent; returns the loss before it."""
    loss, gradient = nnx.value_and_grad(mean_bits)(model, batch)
    optimizer.update(model, gradient)
    return loss


def make_optimizer(config: OptimizerConfig, model: nnx.Module) -> nnx.Optimizer:
    """AdamW on a warm-up and cosine schedule, behind a clip of the gradient's norm."""
    warmup = max(1, round(config.warmup * config.steps))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.peak_learning_rate, warmup, max(config.steps, warmup + 1), 0.05 * config.peak_learning_rate
    )
    adam = optax.adamw(schedule, b2=0.95, weight_decay=config.weight_decay)
    return nnx.Optimizer(model, optax.chain(optax.clip_by_global_norm(config.clip_norm), adam), wrt=nnx.Param)


def replicate(mesh: Mesh, *modules: nnx.Pytree) -> None:
    """Puts all that the modules hold on every device."""
    for module in modules:
        nnx.update(module, jax.device_put(nnx.state(module), NamedSharding(mesh, PartitionSpec())))


def spread(mesh: Mesh, batch: Mapping[str, Any]) -> dict[str, Array]:
    """Puts a batch on the devices: sequences over ``data``, and tokens over ``sequence`` where it divides them."""

    def spec(x: np.ndarray) -> PartitionSpec:
        over_tokens = x.ndim == 2 and x.shape[1] % mesh.shape["sequence"] == 0
        return PartitionSpec("data", "sequence") if over_tokens else PartitionSpec("data")

    return {name: jax.device_put(x, NamedSharding(mesh, spec(x))) for name, x in batch.items()}


def check(config: TrainingConfig) -> tuple[Dataset, dict[str, Any]]:
    """The data of a training and a batch of them, once it is known that the model can be made and reads them.

    Raises:
        ConfigError: the settings do not fit each other or the data.
    """
    try:
        dataset = data.load(config.data)
        example = data.held_out(dataset, "train", config.train.batch, 1)[0]
        # Nothing is computed, so that a sweep can look at all that it trains before it trains anything.
        nnx.eval_shape(mean_bits, nnx.eval_shape(lambda: build_model(config, dataset)), example)
    except (TypeError, ValueError, NotImplementedError, ArithmeticError, MemoryError) as error:
        raise ConfigError(str(error)) from error
    return dataset, example


def step_program(config: TrainingConfig) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """`train_step` as a function of arrays, and their shapes; nothing is computed."""
    dataset, example = check(config)

    def fresh() -> tuple[nnx.Module, nnx.Optimizer]:
        model = build_model(config, dataset)
        return model, make_optimizer(config.train, model)

    graph, state = nnx.split(nnx.eval_shape(fresh))

    def step(state: Any, batch: Any) -> Any:
        model, optimizer = nnx.merge(graph, state)
        loss = train_step(model, optimizer, batch)
        return nnx.state((model, optimizer)), loss

    return step, (state, example)


def score_program(config: TrainingConfig) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """`bits` of a batch as a function of arrays, and their shapes; nothing is computed."""
    dataset, example = check(config)
    graph, state = nnx.split(nnx.eval_shape(lambda: build_model(config, dataset)))
    return lambda state, batch: bits(nnx.merge(graph, state), batch), (state, example)


def fit(config: TrainingConfig, directory: pathlib.Path, console: Console) -> tuple[nnx.Module, Dataset, float]:
    """Trains the model, or goes on from its last checkpoint in ``directory``, and returns it.

    Every batch follows from the seed and the step alone, so a resumed run takes the steps that an uninterrupted one
    takes. On one machine the result is the same to the bit; between machines and backends it is not.

    Returns:
        The model, its data, and the seconds it was trained, over all resumed parts.
    """
    dataset, example = check(config)
    model = build_model(config, dataset)
    optimizer = make_optimizer(config.train, model)
    mesh = config.attention.parallel and config.attention.parallel.mesh()
    if mesh is not None:
        replicate(mesh, model, optimizer)
    log = _Log(directory / "metrics.jsonl")
    tokens = config.train.batch if dataset.kind == "image" else example["tokens"].size
    unit = "tokens/s" if dataset.kind != "image" else "images/s"
    with open_checkpoints(directory / "checkpoints", config) as manager:
        done, spent = restore(manager, model, optimizer)
        log.keep_until(done)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, TextColumn("{task.fields[note]}"), console=console, transient=True) as progress:
            task = progress.add_task(directory.name, total=config.train.steps, completed=done, note="")
            start, losses, since = time.monotonic(), [], done
            for step in range(done, config.train.steps):
                batch = dataset.draw(np.random.default_rng([config.seed, step]), config.train.batch, "train")
                losses.append(train_step(model, optimizer, batch if mesh is None else spread(mesh, batch)))
                if (step + 1) % config.train.log_every == 0 or step + 1 == config.train.steps:
                    loss = float(jnp.stack(losses).mean())
                    seconds = time.monotonic() - start
                    speed = tokens * (step + 1 - since) / seconds
                    log.write({"step": step + 1, "loss": loss, "seconds": spent + seconds, unit: speed})
                    progress.update(task, completed=step + 1, note=f"{loss:.3f} bits  {speed:.0f} {unit}")
                    losses = []
                if (step + 1) % config.train.checkpoint_every == 0 or step + 1 == config.train.steps:
                    save(manager, step + 1, config, model, optimizer, spent + time.monotonic() - start)
            total = spent + time.monotonic() - start if done < config.train.steps else spent
    return model, dataset, total


def evaluate(config: TrainingConfig, model: nnx.Module, dataset: Dataset, split: str) -> dict[str, Any]:
    """Mean bits and accuracy over held-out batches; for sequences also the bits by position, in octaves."""
    batches = data.held_out(dataset, split, config.train.batch, config.train.evaluation_batches)
    scores = [_compiled_bits(model, batch) for batch in batches]
    entropy, right, asked = (np.concatenate([np.asarray(part[i]) for part in scores]) for i in range(3))
    result: dict[str, Any] = {"bits": float(entropy[asked].mean()), "accuracy": float(right[asked].mean())}
    if dataset.kind == "sequence":
        result["by_position"] = {
            f"{low}-{high - 1}": float(entropy[:, low:high][asked[:, low:high]].mean())
            for low, high in _octaves(entropy.shape[1])
            if asked[:, low:high].any()
        }
    return result


def _octaves(length: int) -> Iterable[tuple[int, int]]:
    low, high = 0, 32
    while low < length:
        yield low, min(high, length)
        low, high = high, 2 * high


class _Log:
    """Figures of each logged step, one JSON object a line."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def keep_until(self, step: int) -> None:
        """Drops what was logged after the checkpoint that the run goes on from.

        Raises:
            ConfigError: a line is no record, but for the last, which a kill may have cut short.
        """
        try:
            text = self.path.read_bytes().decode() if self.path.exists() else ""
        except (OSError, UnicodeDecodeError) as error:
            raise self._damaged(str(getattr(error, "strerror", None) or error)) from None
        kept, lines = [], text.splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                logged = checked(Count, record["step"], "'step'")
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                if number == len(lines) and not line.endswith("\n"):
                    warnings.warn(f"{self.path}: the last line is cut short and is left out", stacklevel=2)
                    continue
                raise self._damaged(f"line {number}: {brief(error)}") from None
            if logged <= step:
                kept.append(line.removesuffix("\n") + "\n")
        write_atomically(self.path, lambda file: file.write("".join(kept).encode()))

    def _damaged(self, said: str) -> ConfigError:
        return ConfigError(f"{self.path} is damaged; remove it, and training goes on from the last checkpoint ({said})")

    def write(self, record: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(as_line(record))
