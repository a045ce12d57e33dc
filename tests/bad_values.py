"""``python -m tests.bad_values``: lists bad arguments of public functions that are accepted or not named.

It runs without the signature checks that the tests install. `tests.bad_input` does the same for methods.
"""

import functools
import math
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import approx_attention as aa
from approx_attention.core import PositiveFeatures, causal_state, hadamard, shown, subtract, summary_bytes
from approx_attention.coresets import compress, query_radius
from approx_attention.decoding import attention_received, running_compressed, token_budget
from approx_attention.methods import place_tokens, running_exact
from approx_attention.realization import dimension, minimal_dimension, realizable_in_one_dimension
from approx_attention.tensor import polynomials, total_degree
from tests.bad_input import outcome

rows, mask, key = jnp.ones((6, 4)), jnp.ones(6, bool), jax.random.key(0)
tokens = aa.WeightedKV.of_tokens(rows, rows)
moments = jax.jit(lambda x: aa.FeatureMoments.of_tokens(PositiveFeatures(x), x, x))(rows)
attend = jax.jit(aa.attend)
state = attend(rows, tokens)
pattern = aa.SparsePattern.banded(6, [0])
running = running_exact(4, max_length=8)

NO_TENSORS = ([1.0], None, 3.0, "x", rows.astype(jnp.complex64), jnp.ones((6, 4), int), jnp.array(1.0))
NO_ROWS = (*NO_TENSORS, rows[0], rows[None])
NO_MASKS = ([True] * 6, jnp.ones(1, bool), jnp.ones((6, 1), bool), jnp.full(6, 0.5), "x", 3)
NO_NUMBERS = (None, "x", [1.0], 1j, True, jnp.ones(2), np.ones((2, 2)))
NO_COUNTS = (2.5, "x", None, [3], 0, -1, 10**20)
NO_PATTERNS = (3, None, "x", np.eye(3), [[0]])
HUGE = (10**20, 10**400)

# The function, the call, the argument that the message must name, and the values to reject.
CASES: list[tuple[str, Callable[[Any], Any], str, tuple[Any, ...]]] = []


def case(owner: str, says: str, bad: tuple[Any, ...], call: Callable[[Any], Any]) -> None:
    CASES.append((owner, call, says, bad))


SUMMARIES: dict[str, Callable[..., Any]] = {
    "WeightedKV.of_tokens": lambda k, v, kv_mask=None: aa.WeightedKV.of_tokens(k, v, kv_mask),
    "FeatureMoments.of_tokens": lambda k, v, kv_mask=None: aa.FeatureMoments.of_tokens(
        PositiveFeatures(rows), k, v, kv_mask
    ),
    **{
        f"summarize_{name}": functools.partial(
            lambda method, k, v, kv_mask=None: method.summarize(k, v, key, kv_mask=kv_mask), method
        )
        for name, method in aa.METHODS.items()
        if method.summarize is not None
    },
}
for owner, made in SUMMARIES.items():
    case(owner, "k", NO_ROWS, functools.partial(lambda made, x: made(x, rows), made))
    case(owner, "v", NO_ROWS, functools.partial(lambda made, x: made(rows, x), made))
    case(owner, "k and v", (rows[:5], rows[:1], rows[:0]), functools.partial(lambda made, x: made(rows, x), made))
    case(owner, "kv_mask", NO_MASKS, functools.partial(lambda made, x: made(rows, rows, x), made))

for name, method in aa.METHODS.items():
    if method.running is not None:
        sizes: dict[str, Any] = {"max_length": 8} if method.grows else {}
        run = functools.partial(method.running, key=key, **sizes)
        case(f"running_{name}", "head_dim", NO_COUNTS, functools.partial(lambda run, n: run(n), run))
case("running_compressed", "head_dim", NO_COUNTS, lambda n: running_compressed(n, key, budget=4))

for owner, summary in (("tokens", tokens), ("moments", moments)):
    case(f"attend {owner}", "q", (*NO_ROWS, rows[:, :3]), functools.partial(lambda s, q: aa.attend(q, s), summary))
    case("merge", "merge", (*NO_TENSORS, rows, state), functools.partial(aa.merge, summary))
    case("merge", "merge", (*NO_TENSORS, rows), functools.partial(lambda s, x: aa.merge(x, s), summary))
case("merge", "merge", (aa.WeightedKV.of_tokens(rows[:, :3], rows), aa.WeightedKV.of_tokens(rows, rows[:, :3])),
     functools.partial(aa.merge, tokens))  # fmt: skip
case("merge", "merge", (attend(rows[:5], tokens), attend(rows[:1], tokens)), functools.partial(aa.merge, state))
case("attend", "attend", (*NO_TENSORS, rows, state), lambda x: aa.attend(rows, x))
case("quantize", "quantize", (*NO_TENSORS, moments), lambda x: aa.quantize(x, bits=8))
case("quantize", "bits", (*NO_COUNTS, 3, 16), lambda x: aa.quantize(tokens, bits=x))
case("quantize", "seed", NO_COUNTS[:4], lambda x: aa.quantize(tokens, bits=8, seed=x))
case("fold_scale", "q", NO_TENSORS, lambda x: aa.fold_scale(x, rows))
case("fold_scale", "k", NO_TENSORS, lambda x: aa.fold_scale(rows, x))
case("fold_scale", "scale", (*NO_NUMBERS[1:], 10**400, -(10**400), -1, 0), lambda x: aa.fold_scale(rows, rows, x))
case("subtract", "subtract", (*NO_TENSORS, rows, tokens, attend(rows[:1], tokens)), lambda x: subtract(state, x))
case("subtract", "subtract", (*NO_TENSORS, rows, tokens), lambda x: subtract(x, state))
case("summary_bytes", "summary_bytes", ([1.0], 3, "x", (tokens, 1.0)), summary_bytes)
case("hadamard", "hadamard", (3, None, tokens, state, rows), hadamard)
case("hadamard", "hadamard", (3, None, tokens), lambda x: hadamard(moments, x))
case("attention_received", "attention_received", (*NO_TENSORS, moments), lambda x: attention_received(x, rows))
# Queries of grouped heads have one more axis.
NO_QUERIES = (*(x for x in NO_ROWS if getattr(x, "ndim", 2) != 3), rows[None, None], rows[:, :3])
case("attention_received", "queries", NO_QUERIES, lambda x: attention_received(tokens, x))
case("compress", "compress", (*NO_TENSORS, moments), lambda x: compress(x, key))
case("summarize_coreset", "coreset_size", (None, "x", [1.0], 2.5, 0),
     lambda x: aa.summarize_coreset(rows, rows, key, coreset_size=x, kv_mask=mask))  # fmt: skip
case("compress_tokens", "policy", (rows, 3, ["knorm"]), lambda x: aa.compress_tokens(rows, rows, budget=4, policy=x))
case("compress", "query_radius", (10**400, -1, *NO_NUMBERS[1:]),
     lambda x: compress(tokens, key, coreset_size=4, query_radius=x))  # fmt: skip
case("causal_state", "q", NO_ROWS, lambda x: causal_state(x, rows, rows, running, block_size=2))
case("causal_state", "q", ([1.0],), lambda x: causal_state(running, x, rows, rows, block_size=2))  # pyright: ignore[reportArgumentType]
case("causal_state", "k", NO_ROWS, lambda x: causal_state(rows, x, rows, running, block_size=2))
case("causal_state", "kv_mask", NO_MASKS, lambda x: causal_state(rows, rows, rows, running, block_size=2, kv_mask=x))
case("causal_state", "running", (3, None, tokens), lambda x: causal_state(rows, rows, rows, x, block_size=2))
case("query_radius", "q", NO_ROWS, query_radius)
case("query_radius", "margin", (*NO_NUMBERS, 10**400, 0, -1.0, math.nan), lambda x: query_radius(rows, margin=x))
case("token_budget", "dtype", (None, "x", rows, 3, int, "int32", np.ones(2)),
     lambda x: token_budget(2**20, 4, 4, dtype=x))  # fmt: skip
case("place_tokens", "x", NO_ROWS, lambda x: place_tokens(x, max_length=8))
case("place_tokens", "start", (2.5, -1, math.nan, 10**20, 10**400, "x", None, [1], jnp.ones(2, int), np.int8(-1)),
     lambda x: place_tokens(rows, max_length=8, start=x))  # fmt: skip
case("place_tokens", "max_length", (5, 0, "x", 10**20), lambda x: place_tokens(rows, max_length=x))

case("one_dimensional_order", "pattern", NO_PATTERNS, dimension.one_dimensional_order)
case("realizable_in_one_dimension", "pattern", NO_PATTERNS, realizable_in_one_dimension)
case("certify", "pattern", NO_PATTERNS, lambda x: aa.certify(rows, rows.T @ rows, rows.T @ rows, x))


def realize(pattern: Any = pattern, eps1: Any = 0.1, eps2: Any = 0.1, **options: Any) -> Any:
    return aa.realize_sparse_pattern(pattern, eps1, eps2, d=4, key=key, **options)


def search(pattern: Any = pattern, eps1: Any = 0.1, eps2: Any = 0.1, **options: Any) -> Any:
    return minimal_dimension(pattern, eps1, eps2, key=key, trials=1, **options)


for owner, call in (("realize_sparse_pattern", realize), ("minimal_dimension", search)):
    case(owner, "pattern", NO_PATTERNS, call)
    for name, bad in (("eps1", (*NO_NUMBERS, 0, 1.0, *HUGE)), ("eps2", (*NO_NUMBERS, -1.0, math.inf, 10**400))):
        case(owner, name, bad, functools.partial(lambda call, name, x: call(**{name: x}), call, name))
    case(owner, "max_logit", (*NO_NUMBERS[1:], 0, -1.0, math.nan), functools.partial(
        lambda call, x: call(max_logit=x), call))  # fmt: skip
case("realize_sparse_pattern", "tau", (*NO_NUMBERS[1:], 0, -1.0), lambda x: realize(tau=x))
case("realize_sparse_pattern", "dtype", ("x", None, int, rows), lambda x: realize(dtype=x))
case("minimal_dimension", "pattern", (lambda key: 3,), search)
case("minimal_dimension", "quantile", (*NO_NUMBERS, -0.1, 1.5, math.nan), lambda x: search(quantile=x))

case("favor", "row_norm", ("typo", 3), lambda x: aa.favor(rows, rows, rows, row_norm=x, projection=rows))
case("total_degree", "dim", NO_COUNTS, lambda x: total_degree(x, 2))
case("total_degree", "degree", (*NO_COUNTS[:4], -1, 10**20), lambda x: total_degree(2, x))
case("weight_bound", "lo", NO_NUMBERS, lambda x: polynomials.weight_bound(x, 1.0))
case("weight_bound", "hi", (2.0, math.nan), lambda x: polynomials.weight_bound(x, 1.0))
case("weight_bound", "hi", (*NO_NUMBERS, 0.5, math.nan), lambda x: polynomials.weight_bound(0.9, x))
case("ratio_range", "bound", (*NO_NUMBERS[1:], *HUGE[1:], -1.0, math.nan),
     lambda x: polynomials.ratio_range([1.0, 1.0], x))  # fmt: skip
case("ratio_range", "coefficients", (np.ones((2, 2)), [], "x", None, [[1.0], [1.0, 2.0]], [math.nan], [10**400]),
     lambda x: polynomials.ratio_range(x, 1.0))  # fmt: skip
case("minimax_error", "bound", (*NO_NUMBERS[1:], 10**400, 0, -1.0), lambda x: polynomials.minimax_error(2, x))


# Large values that are allowed.
ALLOWED: dict[str, Callable[[], Any]] = {
    "fold_scale(scale=10**20)": lambda: aa.fold_scale(rows, rows, 10**20),
    "query_radius(margin=10**20)": lambda: query_radius(rows, margin=10**20),
    "realize_sparse_pattern(eps2=10**20)": lambda: realize(eps2=10**20),
    "minimal_dimension(eps2=10**20)": lambda: search(eps2=10**20),
    "compress(query_radius=10**20)": lambda: jax.eval_shape(
        functools.partial(compress, coreset_size=4, query_radius=10**20), tokens, key
    ),
    "place_tokens(start=uint8)": lambda: place_tokens(rows, max_length=300, start=np.uint8(200)),  # pyright: ignore[reportArgumentType]
}


def complaints() -> Iterator[str]:
    for owner, call, says, bad in CASES:
        for value in bad:
            said = outcome(lambda call=call, value=value: call(value))
            named = re.match(rf"(TypeError|ValueError): {re.escape(says)}\b", said)
            if named is None or "\n" in said:
                yield f"{owner}({says}={shown(value)}): {said[:200]}"
    for owner, call in ALLOWED.items():
        said = outcome(call)
        if "Error" in said:
            yield f"{owner}: {said}"


def main() -> None:
    warnings.simplefilter("error")
    for complaint in complaints():
        print(complaint, flush=True)


if __name__ == "__main__":
    main()
