r"""The polynomial method: attention of any order in linear time, where logits are bounded.

A polynomial P of degree g in place of the exponential makes the weight of a query and m - 1 keys a sum of products,

.. math:: P\Big(s \sum_t q_t k^1_t \cdots k^{m-1}_t\Big)
          = \sum_{|\alpha| \le g} w_\alpha\, q^\alpha\, (k^1)^\alpha \cdots (k^{m-1})^\alpha,

so sums over tuples of keys are products of sums over each set:
:math:`(A \oslash B)^T (C \oslash E) = A^T C \odot B^T E`, whose left side has a row for every pair.
No pair of keys is ever looked at.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float

from approx_attention.core import (
    GREATEST_TILE,
    AttentionState,
    FeatureMap,
    FeatureMoments,
    RunningSummary,
    accumulation_dtype,
    attend,
    causal_state,
    check_choice,
    check_count,
    check_finite,
    check_tokens,
    hadamard,
    head_inputs,
    in_blocks,
    merge,
    normalise,
    out_of_blocks,
    pad_rows,
    running_moments,
    token_sums_inputs,
)
from approx_attention.tensor import (
    Coefficients,
    IndexSet,
    MonomialFeatures,
    TensorInputs,
    check_causal,
    check_taken,
    exp_coefficients,
    num_coefficients,
    tensor_inputs,
    tensor_state,
    total_degree,
)

# Terms [chunk, R, Dv + 1] of a causal chunk stay in cache below this size.
CHUNK_TERMS = 2**17


class Kernel(NamedTuple):
    """A polynomial of a multilinear form as features: maps of queries and of each set of keys, and weights ``[R]``."""

    query_map: FeatureMap
    key_maps: tuple[FeatureMap, ...]
    weights: Array

    @classmethod
    def of(
        cls,
        head_dim: int,
        num_sets: int,
        degree: int | None,
        coefficients: Coefficients | Sequence[float] | Array | np.ndarray,
        bound: float | None,
        rms: float | None,
        features: Any,
        dtype: Any,
    ) -> "Kernel":
        """The kernel that the hyper-parameters of the methods of this file describe."""
        head_dim = check_count("head_dim", head_dim)
        if isinstance(features, tuple):
            if len(features) != num_sets + 1:
                raise ValueError(f"features must be {num_sets + 1} maps, queries' first, got {len(features)}")
            maps = features
        else:
            if features is None:
                features = total_degree(head_dim, _degree(degree, coefficients))
            if not isinstance(features, IndexSet):
                raise TypeError(f"features must be an IndexSet, a tuple of maps or None, got {type(features).__name__}")
            if features.dim != head_dim:
                raise ValueError(f"features must be an IndexSet of D = {head_dim} channels, got {features.dim}")
            maps = (MonomialFeatures(features),) * (num_sets + 1)
        if degree not in (None, maps[0].degree):
            raise ValueError(f"degree must be that of the features, {maps[0].degree}, got {degree}")
        if isinstance(coefficients, str):
            coefficients = exp_coefficients(coefficients, maps[0].degree, bound=bound, rms=rms)
        else:
            check_taken(coefficients, bound=bound, rms=rms)
            for number in (coefficients,) if hasattr(coefficients, "dtype") else coefficients:
                check_finite("coefficients", number)
        return cls(maps[0], tuple(maps[1:]), maps[0].weights(jnp.asarray(coefficients, dtype), dtype=dtype))

    def summarize(self, inputs: TensorInputs) -> FeatureMoments:
        """The moments of all tuples of one key of each set."""
        tokens = zip(self.key_maps, inputs.keys, inputs.values, inputs.masks, strict=True)
        product = hadamard(*(FeatureMoments.of_tokens(*each) for each in tokens))
        return product.reweighted(self.weights, self.query_map)


def tensor_polynomial(
    q: Float[Array, "T D"],
    k: Any,
    v: Any,
    key: Array | None = None,
    *,
    degree: int | None = None,
    coefficients: Coefficients | Sequence[float] | Array | np.ndarray = "taylor",
    bound: float | None = None,
    rms: float | None = None,
    features: Any = None,
    is_causal: Literal["both", "ordered"] | None = None,
    window: int | tuple[int, ...] | None = None,
    kv_mask: Any = None,
    scale: float | Array | None = None,
    return_state: bool = False,
) -> Any:
    r"""Tensor attention of any order by the polynomial method, linear in the number of tokens.

    With the monomials :math:`U^a_{j\alpha} = (k^a_j)^\alpha` and :math:`\hat V^a = [V^a, 1]`,

    .. math:: G = w \odot \prod_a (U^a)^T \hat V^a, \qquad [\mathrm{num}_i, \mathrm{den}_i] = q_i^\alpha\, G, \qquad
              \mathrm{out}_i = \mathrm{num}_i / \mathrm{den}_i,

    in :math:`2 (T + \sum_a S_a) R (D_v + 1)` operations with :math:`R = \binom{D + g}{g}`. How far this can be from
    `tensor_attention` is `approx_attention.bounds.tensor_certificate`: it is a matter of how large logits are, and of
    nothing else. A polynomial of odd degree may turn negative; a row whose normaliser is not positive gives 0.

    Args:
        q: queries ``[T, D]``.
        k: keys ``[m-1, S, D]``, or a tuple of m - 1 arrays ``[S_a, D]``; one array ``[S, D]`` is ordinary attention.
        v: values ``[m-1, S, Dv]``, likewise.
        key: ignored: sketches are drawn beforehand.
        degree: g, 2 by default; that of ``coefficients`` or ``features`` where they say so.
        coefficients: ``"taylor"``; ``"minimax"`` and ``"chebyshev"`` for logits up to ``bound``; ``"hermite"`` for
            logits of root mean square ``rms``; or the coefficients themselves, ``[g + 1]`` from the constant on.
        bound: the largest magnitude of a logit, known when tracing; only with coefficients that are made for it.
        rms: the root mean square of the logits, likewise.
        features: an `IndexSet` of monomials, as `anisotropic` makes for channels of unequal size; or the maps of a
            sketch, the queries' first (`TensorSketch.draw`), which lose to monomials for all but large D.
        is_causal: ``"both"`` or ``"ordered"``, as in `tensor_attention`; by running sums over tokens.
        window: how many places back a query sees, for ``"both"``.
        kv_mask: true where a key is real: ``[S]``, ``[m-1, S]`` or a tuple. A query that sees no tuple gives 0.
        scale: factor of the logits, of any sign; ``1/sqrt(D)`` by default.
        return_state: return the `AttentionState`, in the accumulation dtype.

    Returns:
        Outputs ``[T, Dv]`` in the dtype of the values, or the state.

    Raises:
        ValueError: shapes that do not fit, coefficients and a bound that do not go together.
        TypeError: dtypes that are not floating point, a bound that is not known when tracing.
        NotImplementedError: a window with ``"ordered"``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import tensor_attention, tensor_polynomial
        >>> q, k, l, v, w = (0.5 * jax.random.normal(jax.random.key(i), (40, 4)) for i in range(5))
        >>> out = tensor_polynomial(q, (k, l), (v, w), degree=4)
        >>> bool(jnp.allclose(out, tensor_attention(q, (k, l), (v, w)), atol=1e-3))
        True

    Reference:
        Alman and Song (2024), "How to capture higher-order correlations? Generalizing matrix softmax attention to
        Kronecker computation", upper bound; Alman and Song (2023), "Fast attention requires bounded entries", for
        order 2. Causal forms, windows and index sets are derivations of this library.
    """
    inputs = tensor_inputs(q, k, v, scale=scale, kv_mask=kv_mask)
    widths = check_causal(is_causal, window, len(inputs.keys))
    if widths is not None and is_causal == "ordered":
        raise NotImplementedError("tensor_polynomial with is_causal='ordered' supports no window; use tensor_attention")
    kernel = Kernel.of(q.shape[-1], len(inputs.keys), degree, coefficients, bound, rms, features, inputs.q.dtype)
    if is_causal is None:
        state = attend(inputs.q, kernel.summarize(inputs))
    elif widths is None:
        state = _causal(kernel, inputs, is_causal == "ordered")
    else:
        state = _windowed(kernel, inputs, widths)
    return state if return_state else state.out.astype(inputs.value_dtype)


def tensor_support_basis(
    q: Float[Array, "T D"],
    k: Any,
    v: Any,
    key: Array | None = None,
    *,
    num_large_queries: int = 16,
    num_large_keys: int = 16,
    degree: int | None = None,
    coefficients: Coefficients | Sequence[float] | Array | np.ndarray = "taylor",
    bound: float | None = None,
    rms: float | None = None,
    features: Any = None,
    kv_mask: Any = None,
    scale: float | Array | None = None,
    return_state: bool = False,
) -> Any:
    r"""Tensor attention with the queries and keys of large entries exactly, and the rest by the polynomial method.

    With C the large keys of each set, all pairs but those of two small keys are taken exactly, under one normaliser:

    .. math:: \sum_{j, l} = \underbrace{\sum_{j \in C_1,\, l}\; + \sum_{j \notin C_1,\, l \in C_2}}_{e^x}
              \; + \underbrace{\sum_{j \notin C_1,\, l \notin C_2}}_{P(x)},

    and large queries exactly throughout. Large rows do not count for the bound on logits that the polynomial serves.
    The exact part takes :math:`2 T S (|C_1| + |C_2|) (D + D_v)` operations at order 3, which is linear at order 2 only.

    Args:
        q: queries ``[T, D]``.
        k: keys, as in `tensor_polynomial`.
        v: values, likewise.
        key: ignored.
        num_large_queries: how many queries are exact, those with the largest entries.
        num_large_keys: how many keys of each set are.
        degree: as in `tensor_polynomial`, like all that follow.
        coefficients: as there.
        bound: as there, for small queries and keys.
        rms: as there, for small queries and keys.
        features: as there.
        kv_mask: as there.
        scale: as there.
        return_state: as there.

    Returns:
        As `tensor_polynomial`.

    Raises:
        ValueError: shapes that do not fit, a negative count, more than there are.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import tensor_attention, tensor_polynomial, tensor_support_basis
        >>> q, k, l, v, w = (0.3 * jax.random.normal(jax.random.key(i), (40, 4)) for i in range(5))
        >>> k = k.at[7].mul(100)
        >>> expected = tensor_attention(q, (k, l), (v, w))
        >>> split = tensor_support_basis(q, (k, l), (v, w), num_large_queries=0, num_large_keys=1, degree=4)
        >>> whole = tensor_polynomial(q, (k, l), (v, w), degree=4)
        >>> [bool(jnp.max(jnp.abs(out - expected)) < 1e-3) for out in (split, whole)]
        [True, False]

    Reference:
        "Support basis: fast attention beyond bounded entries" (2025), for order 2; higher orders are a derivation of
        this library.
    """
    inputs = tensor_inputs(q, k, v, scale=scale, kv_mask=kv_mask)
    kernel = Kernel.of(q.shape[-1], len(inputs.keys), degree, coefficients, bound, rms, features, inputs.q.dtype)
    large = [_largest_entries("num_large_keys", x, num_large_keys) for x in inputs.keys]
    small = tuple(
        jnp.ones(x.shape[0], bool).at[chosen].set(False) & (True if mask is None else mask)
        for x, chosen, mask in zip(inputs.keys, large, inputs.masks, strict=True)
    )
    state = attend(inputs.q, kernel.summarize(inputs._replace(masks=small)))
    for a, chosen in enumerate(large if num_large_keys else ()):
        keys, values, masks = list(inputs.keys), list(inputs.values), [*small[:a], *inputs.masks[a:]]
        keys[a], values[a] = keys[a][chosen], values[a][chosen]
        masks[a] = jax.tree.map(lambda mask, chosen=chosen: mask[chosen], masks[a])
        state = merge(state, tensor_state(inputs._replace(keys=tuple(keys), values=tuple(values), masks=tuple(masks))))
    rows = _largest_entries("num_large_queries", inputs.q, num_large_queries)
    if num_large_queries:
        exact = tensor_state(inputs._replace(q=inputs.q[rows]))
        state = jax.tree.map(lambda x, row: x.at[rows].set(row), state, exact)
    return state if return_state else state.out.astype(inputs.value_dtype)


class TensorDecoder(NamedTuple):
    """Causal tensor attention token by token, in a state whose size does not depend on how many there were.

    Attributes:
        init: ``(value_dim, dtype) -> state`` of no token, in the decoder's own dtype by default.
        step: ``(state, q [b, D], keys, values, masks) -> (state, AttentionState)`` of b more tokens, scaled queries,
            per set keys ``[b, D]``, values ``[b, Dv]`` and a mask ``[b]`` or None.
    """

    init: Callable[..., Any]
    step: Callable[..., tuple[Any, AttentionState]]


def running_tensor_polynomial(
    head_dim: int,
    *,
    order: int = 3,
    degree: int | None = None,
    coefficients: Coefficients | Sequence[float] | Array | np.ndarray = "taylor",
    bound: float | None = None,
    rms: float | None = None,
    features: Any = None,
    is_causal: Literal["both", "ordered"] = "both",
    dtype: Any = jnp.float32,
) -> TensorDecoder:
    r"""Decoding by the polynomial method: :math:`O(R D_v)` time and memory per token, at any position.

    With running sums :math:`G^a_i = \sum_{j \le i} U^a_j \hat V^a_j`, the moments of pairs are
    :math:`G^1_i \odot G^2_i` for ``"both"`` and :math:`\sum_{j \le i} (U^1_j \hat V^1_j) \odot G^2_j` for
    ``"ordered"``.

    Args:
        head_dim: the number D of channels.
        order: m, one more than there are sets of keys.
        degree: as in `tensor_polynomial`, like all that follow.
        coefficients: as there.
        bound: as there.
        rms: as there.
        features: as there.
        is_causal: ``"both"`` or ``"ordered"``.
        dtype: of the state, float32 or float64.

    Returns:
        The `TensorDecoder`; fold the scale into the queries.

    Raises:
        ValueError: an order below 2, an unknown ``is_causal``, coefficients and a bound that do not go together.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import running_tensor_polynomial, tensor_polynomial
        >>> q, k, l, v, w = (jax.random.normal(jax.random.key(i), (9, 4)) for i in range(5))
        >>> decoder = running_tensor_polynomial(4)
        >>> state = decoder.init(4)
        >>> for i in range(9):
        ...     tokens = [x[i : i + 1] for x in (0.5 * q, k, l, v, w)]
        ...     state, answer = decoder.step(state, tokens[0], tuple(tokens[1:3]), tuple(tokens[3:]))
        >>> whole = tensor_polynomial(q, (k, l), (v, w), is_causal="both")
        >>> bool(jnp.allclose(answer.out[0], whole[-1], atol=1e-5))
        True
    """
    check_choice("is_causal", is_causal, ("both", "ordered"))
    num_sets = check_count("order", order, 2) - 1
    kernel = Kernel.of(head_dim, num_sets, degree, coefficients, bound, rms, features, dtype)
    return _decoder(kernel, is_causal == "ordered")


def polynomial_attention(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    degree: int | None = None,
    coefficients: Coefficients | Sequence[float] | Array | np.ndarray = "taylor",
    bound: float | None = None,
    rms: float | None = None,
    features: IndexSet | tuple[Any, ...] | None = None,
    is_causal: bool = False,
    block_size: int = 128,
    kv_mask: Bool[Array, " S"] | None = None,
    scale: float | Array | None = None,
    return_state: bool = False,
) -> Any:
    r"""Ordinary attention by the polynomial method: monomials of queries and keys as features.

    .. math:: P(s\, q \cdot k) = \sum_{|\alpha| \le g} w_\alpha\, q^\alpha k^\alpha, \qquad
              \mathrm{out}_t = \frac{\sum_\alpha w_\alpha q_t^\alpha \sum_j k_j^\alpha v_j}
                                    {\sum_\alpha w_\alpha q_t^\alpha \sum_j k_j^\alpha}.

    It is certified where logits are bounded (`approx_attention.bounds.tensor_certificate`); the number of features
    :math:`\binom{D + g}{g}` leaves degrees up to 2 for D = 64 and 4 for D = 16. Taylor polynomials of even degree, the
    default, are positive.

    Args:
        q: queries ``[T, D]``.
        k: keys ``[S, D]``.
        v: values ``[S, Dv]``.
        key: ignored; the method is deterministic.
        degree: g, 2 by default, or that of ``coefficients`` or ``features``.
        coefficients: as in `tensor_polynomial`.
        bound: as there.
        rms: as there.
        features: an `IndexSet` of monomials in place of all up to a degree, or two maps, as in `tensor_polynomial`.
        is_causal: query t sees keys j <= t: those of its block and the block before exactly, earlier ones by moments.
        block_size: tokens per block of the causal form.
        kv_mask: true where a key is real, ``[S]``. A query that sees no key gives 0.
        scale: factor s of the logits, ``1/sqrt(D)`` by default.
        return_state: return the `AttentionState`, in the accumulation dtype.

    Returns:
        Outputs ``[T, Dv]`` in the dtype of ``v``, or the state.

    Raises:
        ValueError: shapes that do not fit, coefficients and a bound that do not go together.
        TypeError: dtypes that are not floating point.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import exact, polynomial_attention
        >>> q, k, v = (0.5 * jax.random.normal(jax.random.key(i), (64, 8)) for i in range(3))
        >>> bool(jnp.allclose(polynomial_attention(q, k, v, degree=4), exact(q, k, v), atol=1e-3))
        True

    Reference:
        Alman and Song (2023), "Fast attention requires bounded entries", theorem 3.8.
    """
    dtype, head_dim = v.dtype, q.shape[-1]
    block_size = check_count("block_size", block_size)
    kernel: Any = {"degree": degree, "coefficients": coefficients, "bound": bound, "rms": rms, "features": features}
    q, k, v = head_inputs(q, k, v, scale=scale, kv_mask=kv_mask, is_causal=is_causal)
    if is_causal:
        running = running_polynomial(head_dim, **kernel)
        state = causal_state(q, k, v, running, block_size=block_size, kv_mask=kv_mask)
    else:
        state = attend(q, summarize_polynomial(k, v, **kernel, kv_mask=kv_mask))
    return state if return_state else state.out.astype(dtype)


def summarize_polynomial(
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    degree: int | None = None,
    coefficients: Coefficients | Sequence[float] | Array | np.ndarray = "taylor",
    bound: float | None = None,
    rms: float | None = None,
    features: IndexSet | tuple[Any, ...] | None = None,
    kv_mask: Bool[Array, " S"] | None = None,
) -> FeatureMoments:
    """The moments of the monomials of keys, times their weights in the polynomial.

    Args:
        k: keys ``[S, D]`` in scaled space (`fold_scale`).
        v: values ``[S, Dv]``.
        key: ignored.
        degree: as in `polynomial_attention`, like all that follow.
        coefficients: as there.
        bound: as there.
        rms: as there.
        features: as there.
        kv_mask: true where a key is real, ``[S]``.

    Returns:
        A `FeatureMoments`.
    """
    check_tokens(k, v, kv_mask)
    kernel = Kernel.of(k.shape[-1], 1, degree, coefficients, bound, rms, features, accumulation_dtype(k, v))
    moments = FeatureMoments.of_tokens(kernel.key_maps[0], k, v, kv_mask)
    return moments.reweighted(kernel.weights, kernel.query_map)


def running_polynomial(
    head_dim: int,
    key: Array | None = None,
    *,
    degree: int | None = None,
    coefficients: Coefficients | Sequence[float] | Array | np.ndarray = "taylor",
    bound: float | None = None,
    rms: float | None = None,
    features: IndexSet | tuple[Any, ...] | None = None,
) -> RunningSummary:
    """The moments of the monomials of a growing prefix.

    Args:
        head_dim: the number D of channels.
        key: ignored.
        degree: as in `polynomial_attention`, like all that follow.
        coefficients: as there.
        bound: as there.
        rms: as there.
        features: as there.

    Returns:
        The `RunningSummary`.
    """
    of_dtype = functools.partial(Kernel.of, head_dim, 1, degree, coefficients, bound, rms, features)
    maps = of_dtype(jnp.float32)
    running = running_moments(maps.key_maps[0])

    def read(state: Any) -> FeatureMoments:
        moments: Any = running.read(state)
        return moments.reweighted(of_dtype(moments.mass.dtype).weights, maps.query_map)

    return running._replace(read=read)


def _degree(degree: int | None, coefficients: Any) -> int:
    """The degree that is asked for, where coefficients may already say it."""
    if isinstance(coefficients, str):
        return 2 if degree is None else check_count("degree", degree, 0)
    told = num_coefficients(coefficients) - 1
    if degree not in (None, told):
        raise ValueError(f"degree must be that of the {told + 1} coefficients, {told}, got {degree}")
    return told


def _largest_entries(name: str, x: Array, count: int) -> Array:
    """The rows whose largest entries are largest, ``[count]``."""
    count = check_count(name, count, 0)
    if count > x.shape[0]:
        raise ValueError(f"{name} must be at most the number of tokens, {x.shape[0]}, got {count}")
    return lax.top_k(lax.stop_gradient(jnp.max(jnp.abs(x), axis=1)), count)[1]


def _decoder(kernel: Kernel, ordered: bool) -> TensorDecoder:
    def init(value_dim: int, dtype: Any = kernel.weights.dtype) -> tuple[Array, ...]:
        return tuple(jnp.zeros((kernel.weights.shape[0], value_dim + 1), dtype) for _ in kernel.key_maps)

    def step(
        sums: tuple[Array, ...],
        q: Array,
        keys: tuple[Array, ...],
        values: tuple[Array, ...],
        masks: tuple[Array | None, ...] | None = None,
    ) -> tuple[tuple[Array, ...], AttentionState]:
        seen = jnp.tri(q.shape[0], dtype=sums[0].dtype)
        after, pairs = [], jnp.ones((), sums[0].dtype)
        for a in reversed(range(len(keys))):
            mask = None if masks is None else masks[a]
            terms = _terms(kernel.key_maps[a], *token_sums_inputs(keys[a], values[a], mask), mask)
            running = sums[a][None] + jnp.einsum("ij,jrc->irc", seen, terms * pairs if ordered else terms)
            after.append(running[-1])
            pairs = running if ordered else pairs * running
        return tuple(reversed(after)), _answer(kernel, q, pairs)

    return TensorDecoder(init, step)


def _causal(kernel: Kernel, inputs: TensorInputs, ordered: bool) -> AttentionState:
    """Chunks of tokens in order, each of them by running sums over its tokens."""
    chunk, tokens = _chunks(kernel, inputs, CHUNK_TERMS)
    decoder = _decoder(kernel, ordered)
    sums = decoder.init(inputs.values[0].shape[1], inputs.q.dtype)
    blocks = jax.tree.map(lambda x: in_blocks(x, chunk), tokens)
    _, state = lax.scan(jax.checkpoint(lambda sums, block: decoder.step(sums, *block)), sums, blocks)
    return out_of_blocks(state, inputs.q.shape[0])


def _windowed(kernel: Kernel, inputs: TensorInputs, widths: tuple[int, ...]) -> AttentionState:
    r"""Running sums over a window as sums of chunks that it covers, and of single tokens at both ends.

    Nothing is subtracted, so nothing cancels: a window of w tokens up to token i of chunk c is the part of chunks
    c - p - 1 and c - p in it, with :math:`p = \lfloor (w - 1) / b \rfloor`, the whole chunks between, and the tokens of
    chunk c up to i.
    """
    num_queries, dtype = inputs.q.shape[0], inputs.q.dtype
    chunk, tokens = _chunks(kernel, inputs, CHUNK_TERMS // 2)
    whole = [(min(width, num_queries) - 1) // chunk for width in widths]
    shape = kernel.weights.shape[0], inputs.values[0].shape[1] + 1
    rings = tuple(jnp.zeros((max(p - 1, 0), *shape), dtype) for p in whole)
    # A derivative holds the rings of every chunk of a group, and of the first chunk of every group.
    count = -(-num_queries // chunk)
    groups = math.isqrt(count) if count * sum(ring.size for ring in rings) > GREATEST_TILE else 1
    per_group = -(-count // groups)
    count = groups * per_group

    def padded(x: Array, p: int) -> Array:
        before = (p + 1) * chunk
        return jnp.pad(x, ((before, count * chunk - x.shape[0]),) + ((0, 0),) * (x.ndim - 1))

    _, keys, values, masks = tokens
    sets = tuple(
        tuple(padded(x, p) for x in each) for each, p in zip(zip(keys, values, masks, strict=True), whole, strict=True)
    )

    def step(rings: tuple[Array, ...], args: tuple[Array, Array]) -> tuple[tuple[Array, ...], AttentionState]:
        c, q = args
        place = jnp.arange(chunk, dtype=jnp.int32)
        pairs, kept = jnp.ones((), dtype), []
        for key_map, (k, v, mask), p, width, ring in zip(kernel.key_maps, sets, whole, widths, rings, strict=True):
            # Places relative to the first token of this chunk; the array starts p + 1 chunks before the sequence.
            near = [-(p + 1), -p, 0] if p else [-1, 0]
            terms, at = [], []
            for offset in near:
                k_near, v_near, real = (
                    lax.dynamic_slice_in_dim(x, (c + p + 1 + offset) * chunk, chunk) for x in (k, v, mask)
                )
                terms.append(_terms(key_map, k_near, v_near, real))
                at.append(place + offset * chunk)
            at = jnp.concatenate(at)
            seen = (at[None, :] <= place[:, None]) & (at[None, :] > place[:, None] - width)
            sums = jnp.einsum("ij,jrc->irc", seen.astype(dtype), jnp.concatenate(terms)) + jnp.sum(ring, axis=0)[None]
            kept.append(jnp.concatenate([ring, jnp.sum(terms[-1], axis=0)[None]])[1:])
            pairs = pairs * sums
        return tuple(kept), _answer(kernel, q, pairs)

    through = lambda rings, group: lax.scan(jax.checkpoint(step), rings, group)  # noqa: E731
    q_padded = pad_rows(inputs.q, count * chunk - num_queries)
    chunks = (
        jnp.arange(count, dtype=jnp.int32).reshape(groups, per_group),
        q_padded.reshape(groups, per_group, chunk, -1),
    )
    _, state = lax.scan(through if groups == 1 else jax.checkpoint(through), rings, chunks)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:])[:num_queries], state)


def _chunks(kernel: Kernel, inputs: TensorInputs, most_terms: int) -> tuple[int, tuple[Any, ...]]:
    """Tokens per chunk, and all tokens with as many keys as there are queries."""
    num_queries = inputs.q.shape[0]
    per_token = kernel.weights.shape[0] * (inputs.values[0].shape[1] + 1)
    chunk = min(num_queries, max(4, min(64, most_terms // per_token)))

    def aligned(x: Array) -> Array:
        return pad_rows(x[:num_queries], num_queries - min(num_queries, x.shape[0]))

    masks = tuple(
        jnp.ones(k.shape[0], bool) if mask is None else mask for k, mask in zip(inputs.keys, inputs.masks, strict=True)
    )
    return chunk, (inputs.q, *jax.tree.map(aligned, (inputs.keys, inputs.values, masks)))


def _terms(key_map: FeatureMap, k: Array, v: Array, mask: Array | None) -> Array:
    r"""What each token adds to the moments of its set, :math:`U_j \hat V_j`: ``[b, R, Dv + 1]``."""
    features = _rows(key_map, k)
    if mask is not None:
        features = jnp.where(mask[:, None], features, jnp.zeros_like(features))
    with_one = jnp.concatenate([v, jnp.ones((v.shape[0], 1), v.dtype)], axis=1)
    return features[:, :, None] * with_one[:, None, :]


def _answer(kernel: Kernel, q: Array, pairs: Array) -> AttentionState:
    """The answers of queries ``[b, D]`` from the moments of pairs that each of them sees, ``[b, R, Dv + 1]``."""
    total = jnp.einsum("br,brc->bc", _rows(kernel.query_map, q) * kernel.weights[None, :], pairs)
    return normalise(total[:, :-1], total[:, -1], jnp.zeros(q.shape[0], total.dtype))


def _rows(feature_map: FeatureMap, x: Array) -> Array:
    values, log_scale = feature_map(x)
    return values * jnp.exp(log_scale)
