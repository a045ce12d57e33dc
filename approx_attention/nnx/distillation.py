"""Distillation of exact attention into modules with learned parameters, and fine-tuning of whole models."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from approx_attention.core import accumulation_dtype, check_count
from approx_attention.nnx.models import attention_layers, stack_axes


def _forward(model: Any, batch: Any) -> Any:
    return model(batch)


class GradientTransformation(Protocol):
    """Protocol of an Optax optimiser."""

    @property
    def init(self) -> Callable[..., Any]:
        """``params -> state``."""
        ...

    @property
    def update(self) -> Callable[..., Any]:
        """``(gradient, state, params) -> (updates, state)``."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TuningState:
    """The state of training; save it to resume.

    Attributes:
        learned: the trained arrays.
        others: the other variables, such as counters of random streams.
        optimizer: the state of the optimiser.
        step: the number of finished steps.
    """

    learned: Any
    others: Any
    optimizer: Any
    step: Array


class Distillation(NamedTuple):
    """The result of `distill_attention`.

    Attributes:
        before: the relative error of each head ``[N]`` before the first step, by path of its layer.
        after: the same after the last step.
        num_tokens: the number of tokens of all steps, with repetitions.
        state: the state to resume from.
    """

    before: dict[str, Array]
    after: dict[str, Array]
    num_tokens: int
    state: TuningState


def tune(
    model: nnx.Module,
    loss: Callable[[Any, Any], Array],
    batches: Sequence[Any],
    steps: int,
    *,
    optimizer: GradientTransformation,
    state: TuningState | None = None,
    on_step: Callable[[TuningState, Array], None] | None = None,
) -> TuningState:
    """Minimise a loss over the parameters of a model, in place.

    Args:
        model: the model. All `nnx.Param` are trained; other variables are updated as in calls.
        loss: ``(model, batch) -> number``.
        batches: step t uses ``batches[t % len(batches)]``.
        steps: the total number of steps, including those of earlier calls.
        optimizer: an Optax optimiser, or an object with its ``init`` and ``update``.
        state: the state of an earlier call, to resume from; the result is bitwise that of a single call.
        on_step: called with the state and the loss after each step, to show progress or to save.

    Returns:
        The last `TuningState`.

    Raises:
        ValueError: there are no batches or no parameters, or the state belongs to another model or optimiser.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from flax import nnx
        >>> from approx_attention.nnx import tune
        >>> model, batch = nnx.Linear(2, 1, rngs=nnx.Rngs(0)), jnp.eye(2)
        >>> state = tune(model, lambda model, x: jnp.sum(model(x) ** 2), [batch], 50, optimizer=optax.sgd(0.1))
        >>> bool(jnp.abs(model(batch)).max() < 0.1)
        True
    """
    batches = _some(batches)
    graphdef, learned, others = nnx.split(model, nnx.Param, ...)
    if not jax.tree.leaves(learned):
        raise ValueError(f"{type(model).__name__} has no nnx.Param, so there is nothing to learn")
    start = TuningState(learned, others, optimizer.init(learned), jnp.zeros((), jnp.int32))
    reached: Any = start if state is None else state
    sizes, given = ([jnp.shape(x) for x in jax.tree.leaves(x)] for x in (start, reached))
    if sizes != given:
        raise ValueError(f"state must belong to this model and optimizer, with arrays of shapes {sizes}; got {given}")

    @jax.jit
    def advance(state: TuningState, batch: Any) -> tuple[TuningState, Array]:
        def of_learned(learned: Any) -> tuple[Array, Any]:
            module = nnx.merge(graphdef, learned, state.others, copy=True)
            value = loss(module, batch)
            return value, nnx.split(module, nnx.Param, ...)[2]

        (value, others), gradient = jax.value_and_grad(of_learned, has_aux=True)(state.learned)
        updates, moments = optimizer.update(gradient, state.optimizer, state.learned)
        moved = jax.tree.map(lambda x, change: (x + change).astype(x.dtype), state.learned, updates)
        return TuningState(moved, others, moments, state.step + 1), value

    for step in range(int(reached.step), check_count("steps", steps)):
        reached, value = advance(reached, batches[step % len(batches)])
        if on_step is not None:
            on_step(reached, value)
    nnx.update(model, reached.learned, reached.others)
    return reached


def distill_attention(
    model: nnx.Module,
    teacher: nnx.Module,
    batches: Sequence[Any],
    steps: int,
    *,
    optimizer: GradientTransformation,
    held_out: Sequence[Any],
    call: Callable[[Any, Any], Any] = _forward,
    state: TuningState | None = None,
    on_step: Callable[[TuningState, Array], None] | None = None,
) -> Distillation:
    r"""Fit the learned parameters of a model's attention to a teacher, all layers at once.

    .. math:: \min_\theta \; \frac1L \sum_{l=1}^{L} \frac{\|\hat O_l(q_l, k_l, v_l; \theta_l) - O_l\|_F^2}{\|O_l\|_F^2}

    with the queries, keys and values of the teacher's layers, so that layers are independent. The `nnx.Param` of every
    ``attention_fn`` are trained, such as those of `LinformerAttention`, `Eva`, `Lara`, `Rfa`, `Hedgehog`, or
    ``ApproxAttention(learned=...)``. All other parameters are unchanged; `tune` trains them too.

    Args:
        model: the teacher with another attention in some layers; changed in place.
        teacher: the model with the target attention, usually a clone made before `replace_attention`.
        batches: inputs; step t uses ``batches[t % len(batches)]``.
        steps: the total number of steps, including those of earlier calls.
        optimizer: an Optax optimiser, or an object with its ``init`` and ``update``.
        held_out: batches on which errors are measured before and after.
        call: calls a model with a batch. Layers inside ``nnx.scan``, ``nnx.remat`` or ``nnx.jit`` are not supported.
        state: the state of an earlier call, to resume from, with the model as it was before that call; the result is
            bitwise that of a single call.
        on_step: called with the state and the loss after each step, to show progress or to save.

    Returns:
        The `Distillation`.

    Raises:
        ValueError: the models have different layers, the attention has no parameters, or the state belongs to another
            model.
        NotImplementedError: layers stacked by ``nnx.vmap``.

    Example:
        >>> import jax, optax
        >>> from flax import nnx
        >>> from approx_attention.nnx import ApproxAttention, LinformerAttention, distill_attention
        >>> teacher = nnx.MultiHeadAttention(num_heads=2, in_features=8, decode=False, rngs=nnx.Rngs(0))
        >>> model = nnx.clone(teacher)
        >>> module = LinformerAttention(2, 16, num_slots=4, rngs=nnx.Rngs(1))
        >>> model.attention_fn = nnx.data(ApproxAttention(module))
        >>> x = jax.random.normal(jax.random.key(2), (4, 16, 8))
        >>> result = distill_attention(model, teacher, [x], 20, optimizer=optax.sgd(0.1), held_out=[x])
        >>> bool(result.after[""].mean() < result.before[""].mean()), result.num_tokens
        (True, 1280)

    Reference:
        :cite:p:`zhang2024hedgehog`, which matches attention weights instead of outputs.
    """
    fitted = _Fitted(model)
    if not jax.tree.leaves(nnx.state(fitted, nnx.Param)):
        raise ValueError(
            f"no attention of the {type(model).__name__} has parameters to learn: set the attention_fn of its layers "
            "to modules with parameters, such as LinformerAttention or ApproxAttention(learned=...)"
        )
    graphdef, arrays = nnx.split(teacher)
    errors = _measuring(model, teacher, call)
    before = errors(held_out)

    def loss(fitted: Any, batch: tuple[Any, Any]) -> Array:
        seen = _calls(nnx.merge(graphdef, batch[0], copy=True), batch[1], call)
        fitted.num_tokens[...] += next(iter(seen.values())).num_queries()
        sums = [seen[path].squares(student) for path, student in zip(fitted.paths, fitted.students, strict=True)]
        return jnp.mean(jnp.stack([jnp.sum(difference) / jnp.sum(exact) for difference, exact in sums]))

    given = _With(arrays, batches)
    state = tune(fitted, loss, given, steps, optimizer=optimizer, state=state, on_step=on_step)
    return Distillation(before, errors(held_out), int(fitted.num_tokens[...]), state)


def layer_errors(
    model: nnx.Module,
    teacher: nnx.Module,
    batches: Sequence[Any],
    *,
    call: Callable[[Any, Any], Any] = _forward,
) -> dict[str, Array]:
    r"""Compute the relative error of every head's attention, on the queries, keys and values of the teacher's layers.

    .. math:: \|\hat O_{lh} - O_{lh}\|_F / \|O_{lh}\|_F

    Args:
        model: the teacher with another attention in some layers.
        teacher: the model with exact attention.
        batches: inputs; squared norms are summed over them.
        call: calls a model with a batch.

    Returns:
        The errors ``[N]`` of the N heads of each layer by path, without padding queries; NaN if an exact output is 0.

    Raises:
        ValueError: the models have different layers, there are no batches, or layers are not called.
        NotImplementedError: layers stacked by ``nnx.vmap``.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from approx_attention.nnx import layer_errors, replace_attention
        >>> teacher = nnx.MultiHeadAttention(num_heads=2, in_features=8, decode=False, rngs=nnx.Rngs(0))
        >>> model = nnx.clone(teacher)
        >>> paths = replace_attention(model, "mean_value")
        >>> layer_errors(model, teacher, [jax.random.normal(jax.random.key(2), (4, 16, 8))])[""].shape
        (2,)
    """
    return _measuring(model, teacher, call)(batches)


def _measuring(
    model: nnx.Module, teacher: nnx.Module, call: Callable[[Any, Any], Any]
) -> Callable[[Sequence[Any]], dict[str, Array]]:
    """A function that computes the errors of the current model by one program."""
    ours, theirs = _unstacked_layers(model), _unstacked_layers(teacher)
    if ours.keys() != theirs.keys():
        raise ValueError(
            "model and teacher must have the same attention layers, got "
            f"{', '.join(ours) or 'none'} and {', '.join(theirs) or 'none'}"
        )
    graphdef, exact_graphdef = nnx.graphdef(model), nnx.graphdef(teacher)

    @jax.jit
    def sums(arrays: Any, exact_arrays: Any, batch: Any) -> dict[str, tuple[Array, Array]]:
        seen = _calls(nnx.merge(exact_graphdef, exact_arrays), batch, call)
        layers = attention_layers(nnx.merge(graphdef, arrays))
        return {path: of.squares(layers[path].attention_fn) for path, of in seen.items()}

    def errors(batches: Sequence[Any]) -> dict[str, Array]:
        of_batches = [sums(nnx.state(model), nnx.state(teacher), batch) for batch in _some(batches)]
        total = jax.tree.map(lambda *x: sum(x), *of_batches)
        return {path: jnp.sqrt(difference / exact) for path, (difference, exact) in total.items()}

    return errors


class _Fitted(nnx.Module):
    """The attention of layers with parameters, and the number of tokens that it was fitted to."""

    def __init__(self, model: nnx.Module):
        found = {
            path: layer.attention_fn
            for path, layer in _unstacked_layers(model).items()
            if isinstance(layer.attention_fn, nnx.Module)
            if jax.tree.leaves(nnx.state(layer.attention_fn, nnx.Param))
        }
        self.paths, self.students = tuple(found), nnx.List(list(found.values()))
        self.num_tokens = nnx.Variable(jnp.zeros((), jnp.uint32))


def _some(batches: Sequence[Any]) -> Sequence[Any]:
    """Return the batches. Raises ``ValueError`` if there are none."""
    if not len(batches):
        raise ValueError("batches must contain at least one batch, got none")
    return batches


class _With(Sequence[Any]):
    """Batches, each with the same arrays in front, so that these are arguments of a compiled step."""

    def __init__(self, arrays: Any, batches: Sequence[Any]):
        self.arrays, self.batches = arrays, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: Any) -> Any:
        return self.arrays, self.batches[index]


class _Call(NamedTuple):
    """The arguments of a layer's attention, and its output ``[..., T, N, Dv]``."""

    query: Array
    others: tuple[Any, ...]
    options: dict[str, Any]
    out: Array

    def real(self) -> Array:
        """The mask of real queries, ``[..., T]``: in self-attention that of the keys."""
        shape = self.query.shape[:-2]
        lengths, mask = (self.options.get(name) for name in ("key_value_seq_lengths", "mask"))
        real = jnp.ones(shape, bool)
        if self.others[0].shape[-3] != shape[-1]:
            return real
        if lengths is not None:
            real &= jnp.broadcast_to(jnp.arange(shape[-1]), shape) < lengths[..., None]
        if mask is not None and mask.shape[-2] == 1:
            real &= jnp.broadcast_to(mask[..., 0, 0, :] > 0, shape)
        return real

    def num_queries(self) -> Array:
        return jnp.sum(self.real(), dtype=jnp.uint32)

    def squares(self, attention_fn: Callable[..., Array]) -> tuple[Array, Array]:
        """Sums of squares per head ``[N]``: of the difference of outputs, and of the exact outputs."""
        real = self.real()[..., None, None]
        # Padding may be NaN, which would make gradients NaN even if its output is ignored.
        query = jnp.where(real, self.query, 0)
        out = attention_fn(query, *self.others, **self.options)
        dtype = accumulation_dtype(out, self.out)
        exact = self.out.astype(dtype)
        axes = (*range(out.ndim - 2), out.ndim - 1)
        difference = jnp.where(real, out.astype(dtype) - exact, 0)
        return jnp.sum(difference**2, axes), jnp.sum(jnp.where(real, exact, 0) ** 2, axes)


def _calls(teacher: nnx.Module, batch: Any, call: Callable[[Any, Any], Any]) -> dict[str, _Call]:
    """Record the calls of every attention layer of a model. Changes its attention, so pass a copy."""
    calls: dict[str, _Call] = {}

    def recording(path: str, attention_fn: Callable[..., Array]) -> Callable[..., Array]:
        def record(query: Array, key: Array, value: Array, *others: Any, **options: Any) -> Array:
            out = attention_fn(query, key, value, *others, **options)
            given = jax.lax.stop_gradient(((query, key, value), out))
            calls[path] = _Call(given[0][0], (*given[0][1:], *others), options, given[1])
            return out

        return record

    layers = attention_layers(teacher)
    for path, layer in layers.items():
        layer.attention_fn = nnx.static(recording(path, layer.attention_fn))
    call(teacher, batch)
    if missing := [path for path in layers if path not in calls]:
        raise ValueError(f"call does not reach the attention of {', '.join(missing)}")
    return calls


def _unstacked_layers(model: nnx.Module) -> dict[str, Any]:
    """The layers with an ``attention_fn`` by path. Raises if a layer is a stack."""
    layers = attention_layers(model)
    for path, layer in layers.items():
        if stack_axes(layer, path):
            raise NotImplementedError(f"layers stacked by nnx.vmap are not supported, and {path!r} is such a stack")
    return layers
