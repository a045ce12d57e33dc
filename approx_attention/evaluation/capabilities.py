"""The table of methods and their capabilities."""

from approx_attention.evaluation.tables import markdown_table
from approx_attention.registry import METHODS, Method


def capability_table() -> str:
    """Methods and their capabilities as a Markdown table, one row for each entry of `METHODS`.

    FLOPs are those of the matrix products at the usual size of the method, with 64 channels and as many queries as
    keys, relative to exact attention.
    """
    columns = {
        "causal": "causal",
        "cross": "T != S",
        "padding": "padding",
        "dense_mask": "mask, bias",
        "soft_cap": "capped logits",
        "decode": "decode",
        "normalizer": "merges",
        "unbiased": "unbiased",
        "subquadratic": "below T x S",
        "needs_key": "random",
        "takes_key": "may be random",
        "trainable": "learned",
    }
    header = ["method", *columns.values(), "exact at", "FLOPs, n = 4k", "n = 64k", "reference"]
    rows = []
    for name, method in METHODS.items():
        facts = ["x" if getattr(method.capabilities, field) else "" for field in columns]
        limit = f"{method.size} = S" if method.capabilities.exact_limit else ""
        limit = "always" if method.is_exact else limit
        rows.append([f"`{name}`", *facts, limit, *(_relative_cost(method, n) for n in (4096, 65536)), method.reference])
    return markdown_table(header, rows, others=[*["center"] * len(columns), "left", "right", "right", "left"])


def _relative_cost(method: Method, length: int) -> str:
    """Matrix-product FLOPs at head dimension 64 and the usual size, relative to exact attention."""
    exact = next(other for other in METHODS.values() if other.is_exact)
    of_exact = exact.cost(length, length, 64, 64, 0)
    share = method.cost(length, length, 64, 64, method.usual_size) / of_exact
    return f"{100 * share:.3g}%"
