r"""Attention methods, one method or one family per file. `approx_attention.METHODS` lists their capabilities.

A method is a pure function ``(q, k, v, key=None, *, ...) -> out`` of one head; `attention` applies it to batches of
heads. The arguments below have the same meaning in every method. The docstring of a method describes its other ones.

Args:
    q: queries ``[T, D]``. For methods that depend on positions (windows, blocks), query t is at the position of key t,
        and positions are counted over real tokens.
    k: keys ``[S, D]``.
    v: values ``[S, Dv]``.
    key: typed PRNG key, as in ``jax.random.key(0)``. Deterministic methods ignore it. A random method does not need it
        if its noise is given (``projection``, ``noise``, ``blocks``). The same key gives the same output.
    is_causal: query t sees keys j <= t only. Both are counted from the left, also if T != S.
    block_size: tokens per block of the causal form. A query attends exactly to its own block and the block before it,
        and to all earlier blocks through the summary of the method. Without ``is_causal`` it has no effect, except in
        methods whose docstring describes it.
    logits_soft_cap: replaces the logits by :math:`c \tanh(s\, q_t \cdot k_j / c)` before a bias is added; c must be
        known when tracing.
    kv_mask: true where a key is real, ``[S]``. A query that sees no key gives 0. Padding may contain any values.
    q_mask: true where a query is real, ``[T]``; by default ``kv_mask`` where T = S.
    scale: factor s of the logits, ``1/sqrt(D)`` by default.
    return_state: return the `AttentionState` in the accumulation dtype: outputs and log-normalisers.

Outputs are ``[T, Dv]`` in the dtype of ``v``. Sums and normalisers are in float32, or in float64 if an input is.

Many methods read the keys only through a summary. ``summarize_<method>(k, v, key, *, ..., kv_mask)`` summarises all
keys, given in scaled space (`fold_scale`). ``running_<method>(head_dim, key, *, ...)`` returns the
`RunningSummary` of a growing prefix of keys with ``head_dim`` channels, for causal attention and for decoding.

Most summaries have 256 entries by default (features, landmarks, sampled keys, tokens of a coreset), so that defaults
compare methods at equal budgets. A block of the causal form has 128 tokens: the two exact blocks contain 256 keys.
"""

from approx_attention.methods.baselines import (
    mean_value,
    running_uniform_sample,
    summarize_mean_value,
    summarize_uniform_sample,
    uniform_sample,
)
from approx_attention.methods.bigbird import bigbird
from approx_attention.methods.block_linformer import (
    block_linformer,
    running_block_linformer,
    summarize_block_linformer,
)
from approx_attention.methods.coreset import coreset, sparse_coreset, summarize_coreset
from approx_attention.methods.cosformer import cosformer, place_tokens, running_cosformer
from approx_attention.methods.eva import OFFICIAL_EVA, chunk_means, eva, running_eva
from approx_attention.methods.exact import exact, exact_together, running_exact, summarize_exact
from approx_attention.methods.favor import draw_favor, favor, running_favor, summarize_favor
from approx_attention.methods.hyper import hyper_attention
from approx_attention.methods.lara import lara
from approx_attention.methods.linformer import Convolution, linformer
from approx_attention.methods.linformer_prefix import LinformerPrefix, linformer_step
from approx_attention.methods.local import local, window_sides
from approx_attention.methods.longformer import longformer
from approx_attention.methods.lsh_priority import lsh_priority
from approx_attention.methods.lsh_top_k import lsh_top_k
from approx_attention.methods.nystrom import nystrom
from approx_attention.methods.polynomial import polynomial_attention, running_polynomial, summarize_polynomial
from approx_attention.methods.pooling import mean_pool, running_mean_pool, summarize_mean_pool
from approx_attention.methods.priority import priority, running_priority, summarize_priority
from approx_attention.methods.ra import ra
from approx_attention.methods.rfa import draw_rfa, gate_tokens, rfa, running_rfa
from approx_attention.methods.scatterbrain import scatterbrain
from approx_attention.methods.sketches import importance_sample, summarize_importance_sample, unreduced_jlt
from approx_attention.methods.skyformer import skyformer
from approx_attention.methods.sparse import sparse_attention, sparse_plus_summary
from approx_attention.methods.svd import svd
from approx_attention.methods.top_k import top_k

__all__ = [
    "OFFICIAL_EVA",
    "Convolution",
    "LinformerPrefix",
    "bigbird",
    "block_linformer",
    "chunk_means",
    "coreset",
    "cosformer",
    "draw_favor",
    "draw_rfa",
    "eva",
    "exact",
    "exact_together",
    "favor",
    "gate_tokens",
    "hyper_attention",
    "importance_sample",
    "lara",
    "linformer",
    "linformer_step",
    "local",
    "longformer",
    "lsh_priority",
    "lsh_top_k",
    "mean_pool",
    "mean_value",
    "nystrom",
    "place_tokens",
    "polynomial_attention",
    "priority",
    "ra",
    "rfa",
    "running_block_linformer",
    "running_cosformer",
    "running_eva",
    "running_exact",
    "running_favor",
    "running_mean_pool",
    "running_polynomial",
    "running_priority",
    "running_rfa",
    "running_uniform_sample",
    "scatterbrain",
    "skyformer",
    "sparse_attention",
    "sparse_coreset",
    "sparse_plus_summary",
    "summarize_block_linformer",
    "summarize_coreset",
    "summarize_exact",
    "summarize_favor",
    "summarize_importance_sample",
    "summarize_mean_pool",
    "summarize_mean_value",
    "summarize_polynomial",
    "summarize_priority",
    "summarize_uniform_sample",
    "svd",
    "top_k",
    "uniform_sample",
    "unreduced_jlt",
    "window_sides",
]
