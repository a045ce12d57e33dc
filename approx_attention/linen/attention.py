"""`ApproxAttention`: approximate attention as the ``attention_fn`` of layers of Flax Linen models."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from flax.typing import Dtype, PrecisionLike
from jax import Array

from approx_attention import flax_arguments
from approx_attention.api import attention
from approx_attention.core import check_flag
from approx_attention.registry import BoundMethod, HeadMethods


class ApproxAttention(nn.Module):
    r"""Attention by any method, as ``nn.MultiHeadDotProductAttention(attention_fn=...)`` or standalone.

    Linen has no argument for causality, so ``is_causal`` is a field here. The PRNG key of a random method is the
    variable ``draws/key``, made at initialisation from the stream ``attention`` (or ``params``). Learned arrays are
    parameters.

    Attributes:
        method: a name in `METHODS`, a function ``(q, k, v, key) -> out`` of one head, or a method for each key head
            (`approx_attention.registry.HeadMethods`).
        options: hyper-parameters of the method, such as ``{"num_features": 128}``.
        is_causal: query t sees keys j <= t.
        redraw: keep random projections, or sample new ones from the stream ``attention`` in every call, or after
            ``every`` calls (counted in ``draws`` if it is mutable; else the last ones are kept).
        every: the number of calls with ``"every_n"``.
        noise: whether to sample noise for methods that are random only with a PRNG key (`lara`, `eva`).
        learned: random projections or given arrays of the method that are parameters, such as ``("projection",)``.
        causal_mask: ``"error"`` or ``"as_is_causal"``, as in `approx_attention.nnx.ApproxAttention`.
        dropout: ``"error"`` or ``"output"``, as in `approx_attention.nnx.ApproxAttention`.
        arrays: functions without arguments that make the state arrays of the method, by argument name, such as
            ``{"proposal": lambda: fitted}``. They are called at initialisation only; the arrays then are variables of
            the collection ``fitted``, saved with the others and not trained.
        per_head: like ``arrays``, for arrays that differ between key heads, ``[K, ...]``.

    Raises:
        ValueError: the method is unknown, or options are incompatible.
        TypeError: the method has no such argument.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from approx_attention.linen import ApproxAttention
        >>> favor = ApproxAttention("favor", {"num_features": 64}, is_causal=True)
        >>> layer = nn.MultiHeadDotProductAttention(num_heads=4, attention_fn=favor)
        >>> x = jnp.ones((2, 100, 32))
        >>> variables = layer.init(jax.random.key(0), x)
        >>> layer.apply(variables, x).shape
        (2, 100, 32)
    """

    method: str | Callable[..., Array] | HeadMethods
    options: Mapping[str, Any] = FrozenDict()
    is_causal: bool = False
    redraw: Literal["never", "every_call", "every_n"] = "never"
    every: int | None = None
    noise: bool = False
    learned: tuple[str, ...] = ()
    causal_mask: Literal["error", "as_is_causal"] = "error"
    dropout: Literal["error", "output"] = "error"
    arrays: Mapping[str, Callable[[], Any]] = FrozenDict()
    per_head: Mapping[str, Callable[[], Any]] = FrozenDict()

    def __post_init__(self) -> None:
        check_flag("is_causal", self.is_causal)
        flax_arguments.check_redraw(self.redraw, self.every)
        flax_arguments.check_opt_ins(self.causal_mask, self.dropout)
        bound = flax_arguments.bind_layer(self.method, self.noise, self.options)[0]
        flax_arguments.check_makers(bound, ("arrays", self.arrays), ("per_head", self.per_head))
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        mask: Array | None = None,
        dropout_rng: Array | None = None,
        dropout_rate: float = 0.0,
        broadcast_dropout: bool = True,
        deterministic: bool = True,
        dtype: Dtype | None = None,
        precision: PrecisionLike = None,
        module: nn.Module | None = None,
        force_fp32_for_softmax: bool = False,
        qk_attn_weights_einsum: Callable[..., Array] | None = None,
        attn_weights_value_einsum: Callable[..., Array] | None = None,
    ) -> Array:
        """Compute attention, with the signature that ``nn.MultiHeadDotProductAttention`` expects.

        Other arguments are as in `approx_attention.nnx.ApproxAttention`.

        Args:
            force_fp32_for_softmax: ignored: normalisers are always float32 or wider.
            qk_attn_weights_einsum: must be None.
            attn_weights_value_einsum: must be None.

        Returns:
            ``[..., T, N, Dv]``.

        Raises:
            NotImplementedError: dropout, sown weights, or a mask that the method does not support.
        """
        bound, scale, draws = flax_arguments.bind_layer(self.method, self.noise, self.options)
        name = bound.name
        flax_arguments.check_unused(
            name,
            dropout=self.dropout,
            dropout_rate=dropout_rate,
            deterministic=deterministic,
            dropout_rng=dropout_rng,
            module=module,
            qk_attn_weights_einsum=qk_attn_weights_einsum,
            attn_weights_value_einsum=attn_weights_value_einsum,
        )
        query, key, value = flax_arguments.promoted((query, key, value), dtype)
        dense, mask = bound.takes("mask"), flax_arguments.as_boolean(mask)
        mask, causal = flax_arguments.without_causality(name, mask, self.causal_mask, dense=dense)
        sizes = query.shape[-3], key.shape[-3]
        is_causal = flax_arguments.check_mask(name, mask, self.is_causal or causal, *sizes, dense=dense)
        given = {*self.arrays, *self.per_head}
        draws = draws and not (isinstance(bound, BoundMethod) and bound.has_noise(given))
        rng = self._rng() if draws else None
        learned: dict[str, Any] = {
            argument: self.param(argument, _first_draw(bound, argument, query.shape[-1]))
            for argument in self.learned
            if argument not in given
        }
        shared, of_heads = (
            {argument: self._owned(argument, make) for argument, make in makers.items()}
            for makers in (self.arrays, self.per_head)
        )
        with flax_arguments.matmul_precision(precision):
            out = attention(
                query,
                key,
                value,
                mask=mask,
                method=bound,
                rng=rng,
                is_causal=is_causal,
                scale=scale,
                per_head=of_heads or None,
                **shared,
                **learned,
            )
        return flax_arguments.with_dropout(out, dropout_rate, deterministic, dropout_rng, broadcast_dropout)

    def _owned(self, argument: str, make: Callable[[], Any]) -> Any:
        """The arrays of an argument: a parameter if they are learned, else a variable."""
        if argument in self.learned:
            return self.param(argument, lambda key: make())
        if not self.is_mutable_collection("fitted") and not self.has_variable("fitted", argument):
            raise ValueError(
                f"argument {argument!r} of method {self.method!r} is a variable: apply needs the variables 'fitted' of "
                f"init; in nn.scan and nn.vmap give variable_axes={{'params': 0, 'draws': 0, 'fitted': 0}}"
            )
        return self.variable("fitted", argument, make).value

    def _rng(self) -> Array:
        """The PRNG key of this call."""
        moves_on = self.is_mutable_collection("draws")
        if self.redraw == "every_call":
            return _key_of(self._key_data())
        if not moves_on and not self.has_variable("draws", "key"):
            raise ValueError(
                f"method {self.method!r} is random: apply needs the variables 'draws' from init; in nn.scan "
                f"and nn.vmap give variable_axes={{'params': 0, 'draws': 0}}"
            )
        # The raw data of the key, which every kind of checkpoint supports.
        rng = _key_of(self.variable("draws", "key", self._key_data).value)
        if self.redraw == "never":
            return rng
        count = self.variable("draws", "count", lambda: jnp.zeros((), jnp.int32))
        if moves_on and not self.is_initializing():
            count.value += 1
        every = flax_arguments.check_redraw(self.redraw, self.every)
        return jax.random.fold_in(rng, (jnp.maximum(count.value, 1) - 1) // every)

    def _key_data(self) -> Array:
        """A new key as raw data, from a stream of typed or raw keys."""
        if not self.has_rng("attention") and not self.has_rng("params"):
            raise ValueError(
                f"method {self.method!r} needs the stream 'attention': pass rngs={{'attention': key}}; in nn.scan "
                f"and nn.vmap give split_rngs={{'params': True, 'attention': True}}"
            )
        return jax.random.bits(self.make_rng("attention"), (2,), jnp.uint32)


def _first_draw(bound: BoundMethod | HeadMethods, argument: str, head_dim: int) -> Callable[[Array], Array]:
    """An initialiser of a learned array: the random projection that the method would sample."""
    if isinstance(bound, HeadMethods):
        raise ValueError(f"learned={argument!r} needs one method for all heads, got HeadMethods")
    return lambda key: flax_arguments.drawn_array(bound.name, bound.projections(key, head_dim), argument)


def _key_of(data: Array) -> Array:
    return jax.random.wrap_key_data(data, impl="threefry2x32")
