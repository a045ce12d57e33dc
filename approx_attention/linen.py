"""Attention by any method in a Flax Linen model, as the ``attention_fn`` of its layers."""

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
from approx_attention.checks import check_flag
from approx_attention.registry import accepted, get_method


class ApproxAttention(nn.Module):
    r"""Attention by any method, for ``nn.MultiHeadDotProductAttention(attention_fn=...)`` or on its own.

    Every argument that Linen may pass is named, so that its filter by signature drops none. Linen has no argument for
    causality: it is a field here. What a random method draws from is the variable ``draws/key``, made at
    initialisation from the stream ``attention`` (or ``params``); learned arrays are parameters.

    Attributes:
        method: a name in `METHODS`, or a function ``(q, k, v, key) -> out`` of one head.
        options: hyper-parameters of the method, such as ``{"num_features": 128}``.
        is_causal: query t sees keys j <= t.
        redraw: keep what a random method has drawn for good, draw in every call from the stream ``attention``, or after
            ``every`` calls (counted in ``draws``, where that is mutable; elsewhere the last draw is kept).
        every: the number of calls with ``"every_n"``.
        noise: let a method that is random only with a key (`lara`, `eva`) draw too.
        learned: which of the arrays that the method draws are parameters, such as ``("projection",)``.

    Raises:
        ValueError: an unknown method, options that do not fit together.
        TypeError: an argument that the method does not have.

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

    method: str | Callable[..., Array]
    options: Mapping[str, Any] = FrozenDict()
    is_causal: bool = False
    redraw: Literal["never", "every_call", "every_n"] = "never"
    every: int | None = None
    noise: bool = False
    learned: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_flag("is_causal", self.is_causal)
        flax_arguments.check_redraw(self.redraw, self.every)
        flax_arguments.name_and_randomness(self.method, self.noise, self.options)
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
        """What ``nn.MultiHeadDotProductAttention`` calls.

        Args:
            query: ``[..., T, N, D]``.
            key: ``[..., S, K, D]``.
            value: ``[..., S, K, Dv]``.
            mask: padding ``[..., 1, 1, S]``, boolean or 0 and 1; any other for methods with ``dense_mask`` only.
            dropout_rng: ignored, because dropout of weights is refused.
            dropout_rate: must be 0, unless ``deterministic``.
            broadcast_dropout: ignored likewise.
            deterministic: whether dropout is off.
            dtype: computation type, that of the arrays by default.
            precision: of matrix products.
            module: must be None (``sow_weights=False``).
            force_fp32_for_softmax: ignored: normalisers are always float32 or wider.
            qk_attn_weights_einsum: must be None.
            attn_weights_value_einsum: must be None.

        Returns:
            ``[..., T, N, Dv]``.

        Raises:
            NotImplementedError: dropout, sown weights, or a mask that the method does not support.
        """
        name, draws = flax_arguments.name_and_randomness(self.method, self.noise, self.options)
        flax_arguments.check_unused(
            name,
            dropout_rate=dropout_rate,
            deterministic=deterministic,
            module=module,
            qk_attn_weights_einsum=qk_attn_weights_einsum,
            attn_weights_value_einsum=attn_weights_value_einsum,
        )
        query, key, value = flax_arguments.promoted((query, key, value), dtype)
        mask = flax_arguments.as_boolean(mask)
        dense = flax_arguments.takes_dense_mask(self.method)
        is_causal = flax_arguments.check_mask(name, mask, self.is_causal, query.shape[-3], key.shape[-3], dense=dense)
        rng = self._rng() if draws else None
        learned: dict[str, Any] = {
            argument: self.param(argument, self._first_draw(argument, query.shape[-1])) for argument in self.learned
        }
        with flax_arguments.matmul_precision(precision):
            return attention(
                query,
                key,
                value,
                mask=mask,
                method=self.method,
                rng=rng,
                is_causal=is_causal,
                **self.options,
                **learned,
            )

    def _rng(self) -> Array:
        """The key of this call."""
        moves_on = self.is_mutable_collection("draws")
        if self.redraw == "every_call":
            return _key_of(self._key_data())
        if not moves_on and not self.has_variable("draws", "key"):
            raise ValueError(f"method {self.method!r} keeps what it draws: apply needs the variables 'draws' of init")
        # Raw data of the key, which checkpoints of any kind take.
        rng = _key_of(self.variable("draws", "key", self._key_data).value)
        if self.redraw == "never":
            return rng
        count = self.variable("draws", "count", lambda: jnp.zeros((), jnp.int32))
        if moves_on and not self.is_initializing():
            count.value += 1
        every = flax_arguments.check_redraw(self.redraw, self.every)
        return jax.random.fold_in(rng, (jnp.maximum(count.value, 1) - 1) // every)

    def _key_data(self) -> Array:
        """A new key as raw data, from a stream with keys of any kind, new or old."""
        return jax.random.bits(self.make_rng("attention"), (2,), jnp.uint32)

    def _first_draw(self, argument: str, head_dim: int) -> Callable[[Array], Array]:
        draw = get_method(self.method).draw if isinstance(self.method, str) else None

        def init(key: Array) -> Array:
            drawn = draw(key, head_dim, **accepted(draw, self.options)) if draw else {}
            return flax_arguments.drawn_array(str(self.method), drawn, argument)

        return init


def _key_of(data: Array) -> Array:
    return jax.random.wrap_key_data(data, impl="threefry2x32")
