"""One method per key head."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from approx_attention.registry.bound import BoundMethod, bind, keys_of_heads


class Group(NamedTuple):
    """The key heads of a layer with the same configuration, and their query heads."""

    method: BoundMethod
    heads: np.ndarray
    asking: np.ndarray
    tokens: tuple[Array, Array, Array]


@dataclasses.dataclass(frozen=True)
class HeadMethods:
    """One bound method for each key head of a layer.

    `attention`, the layers of `approx_attention.nnx` and `decoding.MixedDecoder` accept it in place of one method.
    Heads with the same configuration are one group, which runs as one program. The random projection of a head depends
    only on its number, so its output does not depend on the methods of other heads.

    Attributes:
        methods: one for each key head, in order.

    Raises:
        ValueError: there is no head.
        TypeError: a method is not bound; `HeadMethods.of` binds names.

    Example:
        >>> import jax
        >>> from approx_attention import attention
        >>> from approx_attention.registry import HeadMethods
        >>> query, key, value = (jax.random.normal(jax.random.key(i), (1, 64, 2, 8)) for i in range(3))
        >>> mixed = HeadMethods.of(["exact", ("mean_pool", {"num_landmarks": 16})])
        >>> attention(query, key, value, method=mixed).shape
        (1, 64, 2, 8)
    """

    methods: tuple[BoundMethod, ...]

    def __post_init__(self) -> None:
        if not self.methods:
            raise ValueError("HeadMethods needs at least one key head, got none")
        for method in self.methods:
            if not isinstance(method, BoundMethod):
                raise TypeError(f"the method of a head must be bound (HeadMethods.of binds names), got {method!r}")

    @classmethod
    def of(
        cls, methods: Iterable[str | Callable[..., Any] | BoundMethod | tuple[str, Mapping[str, Any]]]
    ) -> "HeadMethods":
        """Bind a method for each key head.

        Args:
            methods: for each key head an argument of `bind`, such as a name, or a pair of it and hyper-parameters.
        """
        pairs = (method if isinstance(method, tuple) else (method, None) for method in methods)
        return cls(tuple(bind(method, hyperparameters) for method, hyperparameters in pairs))

    @property
    def name(self) -> str:
        """The distinct names of the methods, for error messages."""
        return " + ".join(dict.fromkeys(method.name for method in self.methods))

    @property
    def groups(self) -> tuple[tuple[BoundMethod, tuple[int, ...]], ...]:
        """Each configuration with the numbers of its key heads, ordered by their first head."""
        return tuple(
            (method, tuple(number for number, own in enumerate(self.methods) if own == method))
            for method in dict.fromkeys(self.methods)
        )

    @property
    def is_random(self) -> bool:
        """Whether some head needs a PRNG key."""
        return any(method.is_random for method in self.methods)

    @property
    def may_be_random(self) -> bool:
        """Whether some head accepts a PRNG key."""
        return any(method.may_be_random for method in self.methods)

    def takes(self, option: str) -> bool:
        """Whether the functions of all heads have an argument with this name.

        Args:
            option: the name of the argument.
        """
        return all(method.takes(option) for method in self.methods)

    def require(self, num_kv_heads: int) -> None:
        """Raise ``ValueError`` unless there is one method per key head.

        Args:
            num_kv_heads: the number K of key heads.
        """
        if num_kv_heads != len(self.methods):
            raise ValueError(f"there are methods for {len(self.methods)} key heads, but the layer has {num_kv_heads}")

    def split(self, query: Array, key: Array, value: Array) -> list["Group"]:
        """Split the heads of a layer into groups.

        Args:
            query: ``[..., T, N, D]``.
            key: ``[..., S, K, D]``.
            value: ``[..., S, K, Dv]``.

        Raises:
            ValueError: the number of key heads is not that of methods.
        """
        num_heads, num_kv_heads = query.shape[-2], key.shape[-2]
        self.require(num_kv_heads)
        queries = np.arange(num_heads).reshape(num_kv_heads, -1)
        made: list[Group] = []
        for method, numbers in self.groups:
            heads = np.array(numbers)
            asking = queries[heads].ravel()
            cut = [jnp.take(x, of, axis=-2) for x, of in zip((query, key, value), (asking, heads, heads), strict=True)]
            made.append(Group(method, heads, asking, (cut[0], cut[1], cut[2])))
        return made

    @staticmethod
    def join(groups: Sequence["Group"], outs: Sequence[Any], axis: int) -> Any:
        """Put the results of the groups back into the order of the query heads.

        Args:
            groups: the groups from `split`.
            outs: arrays or trees of arrays, one per group.
            axis: the axis of query heads.
        """
        order = np.argsort(np.concatenate([group.asking for group in groups]))
        return jax.tree.map(lambda *parts: jnp.take(jnp.concatenate(parts, axis), order, axis=axis), *outs)

    def keys(self, rng: Array | None) -> Array | None:
        """The PRNG key of each key head, ``[K]``, the same as with one method for all heads; None without a key.

        Args:
            rng: typed PRNG key, or one for each key head.
        """
        return None if rng is None else keys_of_heads(self.name, rng, len(self.methods))
