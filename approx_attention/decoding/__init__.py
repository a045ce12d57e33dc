"""Decoding with caches of bounded size, and compression of caches."""

from approx_attention.decoding.budgets import pyramid_budgets, shared_sizes, token_budget
from approx_attention.decoding.certified import Certificate, CertifiedCache
from approx_attention.decoding.compression import compress_cache, compress_tokens, running_compressed
from approx_attention.decoding.decoder import Cache, Decoder, HeadsCache, HeadsDecoder
from approx_attention.decoding.heuristics import HEURISTICS, Queries, attention_received
from approx_attention.decoding.matching import MATCHING, AttentionMatching
from approx_attention.decoding.mixed import MixedCache, MixedDecoder
from approx_attention.decoding.presses import CompressedDecoder, compress_heads

__all__ = [
    "HEURISTICS",
    "MATCHING",
    "AttentionMatching",
    "Cache",
    "Certificate",
    "CertifiedCache",
    "CompressedDecoder",
    "Decoder",
    "HeadsCache",
    "HeadsDecoder",
    "MixedCache",
    "MixedDecoder",
    "Queries",
    "attention_received",
    "compress_cache",
    "compress_heads",
    "compress_tokens",
    "pyramid_budgets",
    "running_compressed",
    "shared_sizes",
    "token_budget",
]
