r"""The attention methods, each a file. `approx_attention.METHODS` lists them with what each can do.

A method is a pure function ``(q, k, v, key=None, *, ...) -> out`` of one head. Its docstring describes what is its own;
the arguments here mean the same in every method that has them.

Args:
    q: queries ``[T, D]``.
    k: keys ``[S, D]``.
    v: values ``[S, Dv]``.
    key: typed PRNG key, as in ``jax.random.key(0)``. Methods that are not random ignore it.
    is_causal: query t sees keys j <= t, counted from the left where T != S.
    block_size: tokens per block of the causal form. A query sees its own block and the block before exactly, and
        earlier ones by the method's summary.
    kv_mask: true where a key is real, ``[S]``. A query that sees no key gives 0. What padding holds never matters.
    q_mask: true where a query is real, ``[T]``; by default ``kv_mask`` where T = S.
    scale: factor s of the logits, ``1/sqrt(D)`` by default.
    return_state: return the `AttentionState` in the accumulation dtype: outputs and log-normalisers.

Outputs are ``[T, Dv]`` in the dtype of ``v``. Sums and normalisers are in float32, or in float64 where an input is.

What a method knows of all keys is made by ``summarize_<method>(k, v, key, *, ..., kv_mask)``, from keys in scaled space
(`fold_scale`), and of a growing prefix by ``running_<method>(head_dim, key, *, ...)``, which returns a `RunningSummary`
of keys with ``head_dim`` channels.
"""

from approx_attention.methods.baselines import (
    mean_value,
    running_uniform_sample,
    summarize_mean_value,
    summarize_uniform_sample,
    uniform_sample,
)
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
from approx_attention.methods.nystrom import nystrom
from approx_attention.methods.polynomial import polynomial_attention, running_polynomial, summarize_polynomial
from approx_attention.methods.pooling import mean_pool, running_mean_pool, summarize_mean_pool
from approx_attention.methods.ra import ra
from approx_attention.methods.rfa import draw_rfa, gate_tokens, rfa, running_rfa
from approx_attention.methods.scatterbrain import scatterbrain
from approx_attention.methods.sketches import importance_sample, summarize_importance_sample, unreduced_jlt
from approx_attention.methods.skyformer import skyformer
from approx_attention.methods.sparse import bigbird, longformer, sparse_attention, sparse_plus_summary
from approx_attention.methods.svd import svd
from approx_attention.methods.top_k import lsh_top_k, top_k

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
    "lsh_top_k",
    "mean_pool",
    "mean_value",
    "nystrom",
    "place_tokens",
    "polynomial_attention",
    "ra",
    "rfa",
    "running_block_linformer",
    "running_cosformer",
    "running_eva",
    "running_exact",
    "running_favor",
    "running_mean_pool",
    "running_polynomial",
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
    "summarize_uniform_sample",
    "svd",
    "top_k",
    "uniform_sample",
    "unreduced_jlt",
    "window_sides",
]
