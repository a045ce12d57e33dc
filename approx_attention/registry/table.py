"""The methods by name, with the facts about each that the contract tests check and the site's tables print."""

import math
import types
from collections.abc import Mapping
from typing import Any

from approx_attention import methods
from approx_attention.core import FeatureMoments, check_finite, check_not_negative, check_positive, unknown
from approx_attention.coresets import running_clusters, running_coreset
from approx_attention.registry.method import Capabilities, Method
from approx_attention.sparse import LiftedKV


def svd_flops(rows: int, columns: int) -> float:
    r"""The number of floating-point operations of a thin singular value decomposition of a matrix.

    Args:
        rows: the number of rows.
        columns: the number of columns.

    Returns:
        :math:`14\,l\,s^2 + 8\,s^3` for the longer side l and the shorter side s.

    Reference:
        :cite:p:`golub2013matrix`, section 8.6.
    """
    long, short = max(rows, columns), min(rows, columns)
    return 14 * long * short**2 + 8 * short**3


def window_of(given: Mapping[str, Any], is_causal: bool) -> tuple[int, int]:
    """The number of keys that a query sees to the left and to the right."""
    return methods.window_sides(given["window_size"], is_causal)


METHODS: Mapping[str, Method] = types.MappingProxyType(
    {
        "exact": Method(
            function=methods.exact,
            is_exact=True,
            grows=True,
            indifferent=("implementation",),
            windowed="local",
            sharding="ring",
            summarize=methods.summarize_exact,
            running=methods.running_exact,
            together=methods.exact_together,
            suits=("short",),
            capabilities=Capabilities(dense_mask=True, decode=True, unbiased=True, subquadratic=False, soft_cap=True),
            cost=lambda T, S, D, Dv, size: 2 * T * S * (D + Dv),
            reference="Vaswani et al. 2017",
        ),
        "mean_value": Method(
            function=methods.mean_value,
            summarize=methods.summarize_mean_value,
            suits=("uniform",),
            capabilities=Capabilities(normalizer=False),
            cost=lambda T, S, D, Dv, size: 0,
            reference="baseline",
        ),
        "local": Method(
            function=methods.local,
            window=window_of,
            tokens_seen=lambda given, is_causal: sum(window_of(given, is_causal)) + 1,
            sharding="halos",
            size="window_size",
            suits=("nearby",),
            capabilities=Capabilities(exact_limit=True, soft_cap=True),
            cost=lambda T, S, D, Dv, size: 2 * T * min(2 * size - 1, S) * (D + Dv),
            reference="Beltagy et al. 2020",
        ),
        "longformer": Method(
            function=methods.longformer,
            tokens_seen=lambda given, is_causal: sum(window_of(given, is_causal)) + 1 + given["num_global"],
            size="window_size",
            suits=("nearby", "sink + nearby"),
            capabilities=Capabilities(exact_limit=True, soft_cap=True),
            cost=lambda T, S, D, Dv, size: 2 * (T * min(2 * size - 1 + 4, S) + 4 * S) * (D + Dv),
            reference="Beltagy et al. 2020",
        ),
        "bigbird": Method(
            function=methods.bigbird,
            noise=("blocks",),
            size="num_random_blocks",
            usual_size=3,
            capabilities=Capabilities(needs_key=True, exact_limit=True, soft_cap=True),
            # Blocks of 64: three of the window, one that all see, and those at random.
            cost=lambda T, S, D, Dv, size: 2 * (T * min(64 * (4 + size), S) + 64 * S) * (D + Dv),
            reference="Zaheer et al. 2020",
        ),
        "top_k": Method(
            function=methods.top_k,
            size="keys_per_query",
            usual_size=32,
            suits=("few keys",),
            capabilities=Capabilities(exact_limit=True, subquadratic=False, soft_cap=True),
            cost=lambda T, S, D, Dv, size: 2 * T * (S * D + min(size, S) * (D + Dv)),
            reference="Gupta et al. 2021",
        ),
        "lsh_top_k": Method(
            function=methods.lsh_top_k,
            noise=("projection",),
            size="keys_per_query",
            usual_size=32,
            capabilities=Capabilities(needs_key=True, exact_limit=True, soft_cap=True),
            # Four rounds of two buckets are searched.
            cost=lambda T, S, D, Dv, size: 2 * T * min(size, S) * (8 * D + D + Dv),
            reference="Kitaev et al. 2020",
        ),
        "priority": Method(
            function=methods.priority,
            summary=LiftedKV,
            grows=True,
            noise=("noise",),
            size="keys_per_query",
            usual_size=64,
            summarize=methods.summarize_priority,
            running=methods.running_priority,
            suits=("few keys", "diffuse"),
            capabilities=Capabilities(decode=True, needs_key=True, unbiased=True, exact_limit=True, subquadratic=False),
            cost=lambda T, S, D, Dv, size: 2 * T * (S * D + min(size, S) * (D + Dv)),
            reference="Zharkov et al. 2026",
        ),
        "lsh_priority": Method(
            function=methods.lsh_priority,
            noise=("projection", "noise"),
            size="keys_per_query",
            usual_size=64,
            capabilities=Capabilities(needs_key=True, exact_limit=True),
            # As of lsh_top_k, and the keys of the largest lifts.
            cost=lambda T, S, D, Dv, size: 2 * T * min(size, S) * (12 * D + D + Dv),
            reference="Zharkov et al. 2026, by hashing",
        ),
        "uniform_sample": Method(
            function=methods.uniform_sample,
            noise=("noise",),
            size="sample_size",
            summarize=methods.summarize_uniform_sample,
            running=methods.running_uniform_sample,
            suits=("uniform", "sampled"),
            capabilities=Capabilities(decode=True, needs_key=True, unbiased=True, exact_limit=True),
            cost=lambda T, S, D, Dv, size: 2 * T * min(size, S) * (D + Dv),
            reference="baseline",
        ),
        "mean_pool": Method(
            function=methods.mean_pool,
            size="num_landmarks",
            summarize=methods.summarize_mean_pool,
            running=methods.running_mean_pool,
            suits=("uniform",),
            capabilities=Capabilities(decode=True, exact_limit=True),
            cost=lambda T, S, D, Dv, size: 2 * T * min(size, S) * (D + Dv),
            reference="Zheng et al. 2023, special case",
        ),
        "coreset": Method(
            function=methods.coreset,
            size="coreset_size",
            summarize=methods.summarize_coreset,
            running=running_coreset,
            certified=running_clusters,
            values={"query_radius": check_not_negative},
            suits=("diffuse", "low rank"),
            capabilities=Capabilities(decode=True, needs_key=True, exact_limit=True),
            # Seeding reads keys against twice the coreset, k-means and the Nystrom sums once against it.
            cost=lambda T, S, D, Dv, size: 2 * min(size, S) * (T * (D + Dv) + S * (4 * D + Dv)),
            reference="Liberty et al. 2026, a merge or Nystrom weights by probes",
        ),
        "sparse_coreset": Method(
            function=methods.sparse_coreset,
            size="coreset_size",
            usual_size=8,
            block="window_size",
            capabilities=Capabilities(needs_key=True, exact_limit=True, subquadratic=False),
            # Blocks of 64: three nearby, and the tokens of all.
            cost=lambda T, S, D, Dv, size: 2 * T * (min(192, S) + -(-S // 64) * min(size, 64)) * (D + Dv),
            reference="Chen et al. 2021, with coresets",
        ),
        "hyper_attention": Method(
            function=methods.hyper_attention,
            size="sample_size",
            capabilities=Capabilities(causal=False, needs_key=True, unbiased=True, exact_limit=True),
            cost=lambda T, S, D, Dv, size: 2 * T * (min(size, S) + min(256, S)) * (D + Dv),
            reference="Han et al. 2023",
        ),
        "linformer": Method(
            function=methods.linformer,
            size="num_slots",
            capabilities=Capabilities(trainable=True, normalizer=False, exact_limit=True),
            # Of pooling; learned projections cost 2 S R (D + Dv) on top.
            cost=lambda T, S, D, Dv, size: 2 * T * min(size, S) * (D + Dv),
            reference="Wang et al. 2020",
        ),
        "block_linformer": Method(
            function=methods.block_linformer,
            grows=True,
            size="slots_per_block",
            usual_size=16,
            summarize=methods.summarize_block_linformer,
            running=methods.running_block_linformer,
            capabilities=Capabilities(decode=True, trainable=True, exact_limit=True, subquadratic=False),
            cost=lambda T, S, D, Dv, size: 2 * T * -(-S // 128) * min(size, 128) * (D + Dv),
            reference="Wang et al. 2020, by blocks",
        ),
        "unreduced_jlt": Method(
            function=methods.unreduced_jlt,
            noise=("sketch",),
            size="sketch_size",
            capabilities=Capabilities(causal=False, needs_key=True, convex=False, unbiased=True, subquadratic=False),
            cost=lambda T, S, D, Dv, size: 2 * T * S * (D + Dv),
            reference="Wang et al. 2020, theorem 1",
        ),
        "importance_sample": Method(
            function=methods.importance_sample,
            size="sample_size",
            summarize=methods.summarize_importance_sample,
            capabilities=Capabilities(causal=False, needs_key=True, unbiased=True),
            cost=lambda T, S, D, Dv, size: 2 * T * size * (D + Dv),
            reference="Drineas et al. 2006",
        ),
        "favor": Method(
            function=methods.favor,
            summary=FeatureMoments,
            noise=("projection",),
            size="num_features",
            summarize=methods.summarize_favor,
            running=methods.running_favor,
            draw=methods.draw_favor,
            capabilities=Capabilities(decode=True, needs_key=True, unbiased=True),
            cost=lambda T, S, D, Dv, size: 2 * (T + S) * size * (D + Dv),
            reference="Choromanski et al. 2021",
        ),
        "scatterbrain": Method(
            function=methods.scatterbrain,
            summary=FeatureMoments,
            noise=("projection",),
            sharding="prefix",
            size="num_features",
            # Without the future it is causal favor, whose blocks are the windows.
            running=methods.running_favor,
            block="window_size",
            draw=methods.draw_favor,
            capabilities=Capabilities(decode=True, needs_key=True, unbiased=True),
            cost=lambda T, S, D, Dv, size: 2 * ((T + S) * size + T * min(192, S)) * (D + Dv),
            reference="Chen et al. 2021",
        ),
        "cosformer": Method(
            function=methods.cosformer,
            # Tokens carry no place by themselves: see running_cosformer.
            capabilities=Capabilities(normalizer=False),
            cost=lambda T, S, D, Dv, size: 4 * (T + S) * D * Dv,
            reference="Qin et al. 2022, a different kernel",
        ),
        "rfa": Method(
            function=methods.rfa,
            summary=FeatureMoments,
            noise=("projection",),
            per_token=("gate_logits",),
            size="num_features",
            running=methods.running_rfa,
            draw=methods.draw_rfa,
            values={"bandwidth": check_finite},
            capabilities=Capabilities(decode=True, needs_key=True, normalizer=False, convex=False),
            cost=lambda T, S, D, Dv, size: 2 * (T + S) * size * (D / 2 + Dv),
            reference="Peng et al. 2021",
        ),
        "ra": Method(
            function=methods.ra,
            noise=("noise",),
            size="num_samples",
            usual_size=1,
            capabilities=Capabilities(dense_mask=True, needs_key=True, unbiased=True, subquadratic=False),
            cost=lambda T, S, D, Dv, size: 2 * T * S * (size + 1) * (D + Dv),
            reference="Zheng et al. 2022",
        ),
        "lara": Method(
            function=methods.lara,
            noise=("noise",),
            size="num_landmarks",
            values={"correction": check_finite},
            capabilities=Capabilities(causal=False, takes_key=True),
            cost=lambda T, S, D, Dv, size: 2 * (T + S) * min(size, T, S) * (D + Dv),
            reference="Zheng et al. 2022",
        ),
        "eva": Method(
            function=methods.eva,
            noise=("noise",),
            sharding="prefix",
            size="num_chunks",
            running=methods.running_eva,
            block="window_size",
            capabilities=Capabilities(decode=True, takes_key=True, exact_limit=True),
            cost=lambda T, S, D, Dv, size: 2 * T * (min(size, S) + 64) * (D + Dv),
            reference="Zheng et al. 2023",
        ),
        "nystrom": Method(
            function=methods.nystrom,
            size="num_landmarks",
            values={"ridge": check_positive, "rcond": check_positive},
            suits=("low rank",),
            capabilities=Capabilities(causal=False, affine=False, convex=False, normalizer=False),
            # Six steps of four products invert the middle matrix.
            cost=lambda T, S, D, Dv, size: 2 * min(size, T, S) * ((T + S) * (D + Dv) + 24 * min(size, T, S) ** 2),
            reference="Xiong et al. 2021",
        ),
        "skyformer": Method(
            function=methods.skyformer,
            noise=("noise",),
            size="num_landmarks",
            values={"ridge": check_positive},
            capabilities=Capabilities(causal=False, needs_key=True, affine=False, convex=False, normalizer=False),
            cost=lambda T, S, D, Dv, size: 2 * (T + S) * min(size, T + S) * (D + Dv),
            reference="Chen et al. 2021",
        ),
        "polynomial": Method(
            function=methods.polynomial_attention,
            summary=FeatureMoments,
            summarize=methods.summarize_polynomial,
            running=methods.running_polynomial,
            values={"coefficients": check_finite},
            capabilities=Capabilities(decode=True),
            cost=lambda T, S, D, Dv, size: 2 * (T * (Dv + 1) + S * Dv) * math.comb(D + 2, 2),
            reference="Alman and Song 2023",
        ),
        "svd": Method(
            function=methods.svd,
            size="rank",
            capabilities=Capabilities(
                causal=False, affine=False, convex=False, normalizer=False, exact_limit=True, subquadratic=False
            ),
            cost=lambda T, S, D, Dv, size: (
                2 * T * S * (D + min(size, T, S) + Dv) + svd_flops(T, S) * (size < min(T, S))
            ),
            reference="Eckart and Young 1936, cubic reference",
        ),
    }
)


def get_method(name: str) -> Method:
    """The registered method of that name.

    Args:
        name: a name in `METHODS`.

    Returns:
        The `Method`.

    Raises:
        ValueError: there is none; the message lists all and names the nearest.

    Example:
        >>> from approx_attention.registry import get_method
        >>> get_method("mean_pool").size
        'num_landmarks'
    """
    if name not in METHODS:
        raise ValueError(unknown("method", name, METHODS))
    return METHODS[name]
