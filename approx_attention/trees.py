"""Attention over tuples of keys whose logits are a sum over the edges of a tree, by messages from the leaves."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from approx_attention.core import (
    AttentionState,
    check_count,
    check_flag,
    check_floating,
    check_key,
    output_or_state,
    shown,
)
from approx_attention.registry import BoundMethod, bind
from approx_attention.tensor import tensor_inputs


@output_or_state
def tree_attention(
    q: Float[Array, "T D"],
    k: Any,
    v: Any,
    key: Array | None = None,
    *,
    parents: Sequence[int],
    node_queries: Any = None,
    method: str | Callable[..., Any] | BoundMethod = "exact",
    is_causal: bool = False,
    kv_mask: Any = None,
    scale: float | Array | None = None,
    **hyperparameters: Any,
) -> AttentionState:
    r"""Attention over tuples with one key per node of a tree; the values of a tuple are multiplied channel by channel.

    .. math:: \mathrm{out}_t = \frac{\sum_j e^{x_{tj}}\, v^1_{j_1} \odot \dots \odot v^m_{j_m}}{\sum_j e^{x_{tj}}},
              \qquad x_{tj} = s \sum_{i :\, p_i = -1} q_t \cdot k^i_{j_i}
              + s \sum_{i :\, p_i \ge 0} u^{p_i}_{j_{p_i}} \cdot k^i_{j_i}

    over the tuples :math:`j = (j_1, \dots, j_m)`, with :math:`p_i` the parent of node i. The sum over the keys of a
    node, given the key of its parent, is attention with the queries :math:`u`. The sums are computed from the leaves
    upward: the log-normalisers of the children of a node are a bias on its keys, and its values are multiplied by
    their outputs. This takes :math:`2 m n^2 (D + D_v)` operations, although there are :math:`n^{m+1}` tuples, and
    :math:`2 m n R (D + D_v)` with a method that reads R tokens or features in place of n keys.

    An approximate method applies the bias b through the values: it attends to :math:`e^b v` and to :math:`e^b`. In
    float32 a query gives NaN if the biases of all its visible keys are more than 87 below the largest bias;
    ``"exact"`` has no such limit.

    Args:
        q: queries ``[T, D]``.
        k: keys ``[m, S, D]``, or a tuple of m arrays ``[S_i, D]``.
        v: values ``[m, S, Dv]``, likewise.
        key: typed PRNG key for random methods; each node gets a different key.
        parents: the parent of each node, -1 for a child of the query: ``(-1, 0, 1)`` is a path, ``(-1, 0, 0)`` a star
            around node 0.
        node_queries: the queries u with which each node attends to its children, in the shape of ``k``; by default
            the keys. The queries of leaves are not used.
        method: a name in `METHODS` or a `approx_attention.registry.BoundMethod`. Its weights must be positive and its
            normaliser comparable to that of exact attention.
        is_causal: the query at t sees keys at positions up to t, and a key at t sees keys of child nodes up to t.
            Along a path this is ``"ordered"`` in `tensor_attention`. Aligned top left where lengths differ.
        kv_mask: true where a key is real: ``[S]``, ``[m, S]`` or a tuple. A query that sees no tuple gives 0.
        scale: positive factor of the logits, ``1/sqrt(D)`` by default.
        return_state: return the `AttentionState`, with the normaliser over tuples, in the accumulation dtype.
        **hyperparameters: arguments of the method.

    Returns:
        Outputs ``[T, Dv]`` in the dtype of the values, or the state.

    Raises:
        ValueError: shapes do not match, the parents are not a tree, the method is unknown, or a random method has no
            key.
        TypeError: a dtype is not floating point (or boolean, for masks), or the method has no such argument.
        NotImplementedError: the method does not support a bias, or it derives the positions of queries from the mask
            of the keys, as all causal forms but that of ``"exact"`` do, and the nodes have different masks.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import exact, tree_attention
        >>> q, k, l, v, w = (jax.random.normal(jax.random.key(i), (5, 4)) for i in range(5))
        >>> out = tree_attention(q, (k, l), (v, w), parents=(-1, 0))
        >>> logits = (q @ k.T)[:, :, None] / 2 + (k @ l.T)[None] / 2
        >>> weights = jax.nn.softmax(logits.reshape(5, 25)).reshape(5, 5, 5)
        >>> bool(jnp.allclose(out, jnp.einsum("ijl,jc,lc->ic", weights, v, w), atol=1e-5))
        True

    Reference:
        :cite:p:`chakrabarti2026poly`, for attention whose logits are a sum over a tree, its composition of functions
        and its exact quadratic time. The approximate messages are a construction of this library.
    """
    check_flag("is_causal", is_causal)
    inputs = tensor_inputs(q, k, v, scale=1.0, kv_mask=kv_mask)
    num_nodes = len(inputs.keys)
    children = children_of(parents, num_nodes)
    queries = _node_queries(node_queries, inputs.keys, inputs.masks)
    bound = bind(method, hyperparameters)
    bound.require_key_bias()
    options: dict[str, Any] = {"scale": scale, "is_causal": is_causal}
    if kv_mask is not None and getattr(kv_mask, "ndim", None) != 1:
        _require_any_mask(bound, is_causal)
    # A projection that is given takes the place of what the key would sample.
    if key is not None or (bound.is_random and not bound.has_noise()):
        key = check_key(bound.name, key)

    def message(node: int, asking: Array) -> AttentionState:
        """The state of queries over the keys of a node, each combined with all tuples of the nodes below it."""
        values, mask, bias = inputs.values[node], inputs.masks[node], None
        if children[node]:
            below = below_of(children[node], queries[node])
            values, bias = values * below.out, below.lse
        own = None if key is None else jax.random.fold_in(key, node)
        return bound.state_under_bias(asking, inputs.keys[node], values, bias, own, kv_mask=mask, **options)

    def below_of(nodes: list[int], asking: Array) -> AttentionState:
        """The state over several subtrees: given the query, their keys are independent, so the sums multiply."""
        first, *others = (message(node, asking) for node in nodes)
        for state in others:
            first = AttentionState(first.out * state.out, first.lse + state.lse)
        return first

    return below_of(children[-1], inputs.q)


def children_of(parents: Any, num_nodes: int | None = None) -> dict[int, list[int]]:
    """The children of each node, and of the query under -1.

    Args:
        parents: the parent of each node, -1 for the query.
        num_nodes: the number of nodes; None for that of the parents.

    Returns:
        The numbers of the children by node, in ascending order.

    Raises:
        TypeError: the parents are not integers known when tracing.
        ValueError: there is not one parent per node, a parent does not exist, or there is a cycle.

    Example:
        >>> children_of((-1, 0, 0))
        {-1: [0], 0: [1, 2], 1: [], 2: []}
    """
    nodes = "at least one node" if num_nodes is None else f"each of {num_nodes} nodes"
    allowed = f"parents must contain, for {nodes}, its parent or -1 for the query"
    if not isinstance(parents, tuple | list):
        raise TypeError(f"{allowed}, as a tuple of integers; got {shown(parents)}")
    known = [check_count("parents", parent, least=-1) for parent in parents]
    num_nodes = max(len(known), 1) if num_nodes is None else num_nodes
    if len(known) != num_nodes or any(parent >= num_nodes for parent in known):
        raise ValueError(f"{allowed}; got {shown(parents)}")
    children: dict[int, list[int]] = {node: [] for node in range(-1, num_nodes)}
    for node, parent in enumerate(known):
        children[parent].append(node)
    reached = list(children[-1])
    for node in reached:
        reached += children[node]
    if len(reached) < num_nodes:
        raise ValueError(f"{allowed}, without a cycle; got {shown(parents)}")
    return children


def _node_queries(node_queries: Any, keys: tuple[Array, ...], masks: tuple[Array | None, ...]) -> tuple[Array, ...]:
    """The queries of each node to its children, checked, with zeros in padding."""
    if node_queries is None:
        return keys
    if not isinstance(node_queries, tuple | list):
        check_floating("node_queries", node_queries)
    given = tuple(node_queries)
    for u in given:
        check_floating("node_queries", u)
    if [u.shape for u in given] != [k.shape for k in keys]:
        expected, shapes = ([tuple(x.shape) for x in xs] for xs in (keys, given))
        raise ValueError(f"node_queries must have the shapes of the keys {expected}, got {shapes}")
    return tuple(
        u.astype(k.dtype) if mask is None else jnp.where(mask[:, None], u.astype(k.dtype), 0)
        for u, k, mask in zip(given, keys, masks, strict=True)
    )


def _require_any_mask(bound: BoundMethod, is_causal: bool) -> None:
    """Raise unless the method supports a query at a position whose key is hidden, as when masks of nodes differ."""
    method = bound.registered
    if method is None or method.is_exact or (method.summarize and not is_causal):
        return
    form = "the causal form of " if is_causal else ""
    raise NotImplementedError(
        f"{form}method {bound.name!r} does not support a mask for each node, because it derives the positions of "
        "queries from the mask of the keys; pass one kv_mask [S], or use 'exact'"
    )
