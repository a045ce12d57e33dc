r"""The polynomial method: attention of any order in linear time, for bounded logits.

With a polynomial P of degree g in place of the exponential, the weight of a query and m - 1 keys is a sum of products,

.. math:: P\Big(s \sum_t q_t k^1_t \cdots k^{m-1}_t\Big)
          = \sum_{|\alpha| \le g} w_\alpha\, q^\alpha\, (k^1)^\alpha \cdots (k^{m-1})^\alpha,

so sums over tuples of keys are products of sums over each set:
:math:`(A \oslash B)^T (C \oslash E) = A^T C \odot B^T E`, whose left side has a row for every pair. No pair of keys is
ever formed.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

from approx_attention.core import (
    AttentionState,
    attend,
    check_count,
    merge,
    output_or_state,
)
from approx_attention.tensor.inputs import check_causal, tensor_inputs, tensor_state
from approx_attention.tensor.kernels import Kernel
from approx_attention.tensor.polynomials import Coefficients
from approx_attention.tensor.running import causal_state_of, windowed_state_of


@output_or_state
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
) -> AttentionState:
    r"""Approximate tensor attention of any order by the polynomial method, in time linear in the number of tokens.

    With the monomials :math:`U^a_{j\alpha} = (k^a_j)^\alpha` and :math:`\hat V^a = [V^a, 1]`,

    .. math:: G = w \odot \prod_a (U^a)^T \hat V^a, \qquad [\mathrm{num}_i, \mathrm{den}_i] = q_i^\alpha\, G, \qquad
              \mathrm{out}_i = \mathrm{num}_i / \mathrm{den}_i,

    in :math:`2 (T + \sum_a S_a) R (D_v + 1)` operations with :math:`R = \binom{D + g}{g}`. The error relative to
    `tensor_attention` is bounded by `approx_attention.bounds.tensor_certificate`, and depends only on the size of the
    logits. A polynomial of odd degree may be negative; a row whose normaliser is not positive gives 0.

    q, k, v, is_causal, kv_mask, scale and return_state are as in `tensor_attention`. ``key`` is ignored, because a
    sketch is sampled when it is made.

    Args:
        degree: g; by default 2, or the degree of ``coefficients`` or ``features`` if they determine it.
        coefficients: ``"taylor"``; ``"minimax"`` and ``"chebyshev"`` for logits up to ``bound``; ``"hermite"`` for
            logits with root mean square ``rms``; or numbers ``[g + 1]``, from the constant term on.
        bound: the largest magnitude of a logit, known when tracing; only with ``"minimax"`` and ``"chebyshev"``.
        rms: the root mean square of the logits, known when tracing; only with ``"hermite"``.
        features: an `IndexSet` of monomials, such as `anisotropic` for channels of unequal size; or the maps of a
            sketch, that of queries first (`TensorSketch.draw`), which are less accurate than monomials except for
            large D.
        window: as in `tensor_attention`, only for ``"both"``.

    Returns:
        Outputs ``[T, Dv]`` in the dtype of the values, or the state.

    Raises:
        ValueError: shapes that do not match, coefficients and a bound that do not go together.
        TypeError: dtypes that are not floating point, a bound that is not known when tracing.
        NotImplementedError: a window with ``"ordered"``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import tensor_attention, tensor_polynomial
        >>> q, k, l, v, w = (0.5 * jax.random.normal(jax.random.key(i), (40, 4)) for i in range(5))
        >>> out = jax.jit(tensor_polynomial, static_argnames="degree")(q, (k, l), (v, w), degree=4)
        >>> bool(jnp.allclose(out, jax.jit(tensor_attention)(q, (k, l), (v, w)), atol=1e-3))
        True

    Reference:
        :cite:p:`alman2024capture`, upper bound; :cite:p:`alman2023fast`, for order 2. Causal forms, windows and
        index sets are derivations of this library.
    """
    inputs = tensor_inputs(q, k, v, scale=scale, kv_mask=kv_mask)
    widths = check_causal(is_causal, window, len(inputs.keys))
    if widths is not None and is_causal == "ordered":
        raise NotImplementedError("tensor_polynomial with is_causal='ordered' supports no window; use tensor_attention")
    kernel = Kernel.of(q.shape[-1], len(inputs.keys), degree, coefficients, bound, rms, features, inputs.q.dtype)
    if is_causal is None:
        state = attend(inputs.q, kernel.summarize(inputs))
    elif widths is None:
        state = causal_state_of(kernel, inputs, is_causal == "ordered")
    else:
        state = windowed_state_of(kernel, inputs, widths)
    return state


@output_or_state
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
) -> AttentionState:
    r"""Tensor attention, exact for queries and keys with large entries, and by the polynomial method for the rest.

    With C the large keys of each set, all pairs except those of two small keys are exact, with one normaliser:

    .. math:: \sum_{j, l} = \underbrace{\sum_{j \in C_1,\, l}\; + \sum_{j \notin C_1,\, l \in C_2}}_{e^x}
              \; + \underbrace{\sum_{j \notin C_1,\, l \notin C_2}}_{P(x)},

    and all pairs of large queries are exact. So the bound of logits is that of small queries and keys only. The exact
    part takes :math:`2 T S (|C_1| + |C_2|) (D + D_v)` operations at order 3; it is linear at order 2 only.

    The other arguments are as in `tensor_polynomial`, with ``bound`` and ``rms`` for small queries and keys.

    Args:
        num_large_queries: the number of exact queries, which are those with the largest entries.
        num_large_keys: the number of exact keys in each set, which are those with the largest entries.

    Returns:
        As `tensor_polynomial`.

    Raises:
        ValueError: shapes that do not match, a count that is negative or above the number of tokens.

    Example:
        >>> import functools, jax, jax.numpy as jnp
        >>> from approx_attention import tensor_attention, tensor_polynomial
        >>> from approx_attention.tensor import tensor_support_basis
        >>> q, k, l, v, w = (0.3 * jax.random.normal(jax.random.key(i), (40, 4)) for i in range(5))
        >>> k = k.at[7].mul(100)
        >>> basis = functools.partial(tensor_support_basis, num_large_queries=0, num_large_keys=1, degree=4)
        >>> methods = tensor_attention, basis, functools.partial(tensor_polynomial, degree=4)
        >>> expected, split, whole = (jax.jit(method)(q, (k, l), (v, w)) for method in methods)
        >>> [bool(jnp.max(jnp.abs(out - expected)) < 1e-3) for out in (split, whole)]
        [True, False]

    Reference:
        :cite:p:`supportbasis2025`, for order 2; higher orders are a derivation of this library.
    """
    inputs = tensor_inputs(q, k, v, scale=scale, kv_mask=kv_mask)
    kernel = Kernel.of(q.shape[-1], len(inputs.keys), degree, coefficients, bound, rms, features, inputs.q.dtype)
    large = [_largest_entries("num_large_keys", x, num_large_keys) for x in inputs.keys]
    small = tuple(
        jnp.ones(x.shape[0], bool).at[chosen].set(False) & (True if mask is None else mask)
        for x, chosen, mask in zip(inputs.keys, large, inputs.masks, strict=True)
    )
    state = attend(inputs.q, kernel.summarize(inputs._replace(masks=small)))
    # Term a: a large key in set a, small keys in earlier sets, any keys in later sets. The terms are disjoint, so their
    # states merge.
    for a, chosen in enumerate(large if num_large_keys else ()):
        keys, values, masks = list(inputs.keys), list(inputs.values), [*small[:a], *inputs.masks[a:]]
        keys[a], values[a] = keys[a][chosen], values[a][chosen]
        masks[a] = jax.tree.map(lambda mask, chosen=chosen: mask[chosen], masks[a])
        state = merge(state, tensor_state(inputs._replace(keys=tuple(keys), values=tuple(values), masks=tuple(masks))))
    rows = _largest_entries("num_large_queries", inputs.q, num_large_queries)
    if num_large_queries:
        exact = tensor_state(inputs._replace(q=inputs.q[rows]))
        state = jax.tree.map(lambda x, row: x.at[rows].set(row), state, exact)
    return state


def _largest_entries(name: str, x: Array, count: int) -> Array:
    """The rows whose largest entries are largest, ``[count]``."""
    count = check_count(name, count, 0)
    if count > x.shape[0]:
        raise ValueError(f"{name} must be at most the number of tokens, {x.shape[0]}, got {count}")
    # The choice of exact rows has no derivative.
    return lax.top_k(lax.stop_gradient(jnp.max(jnp.abs(x), axis=1)), count)[1]
