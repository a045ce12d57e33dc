"""Flax nnx: approximate attention in models, and modules with the learned parameters of methods."""

from approx_attention.nnx.attention import ApproxAttention
from approx_attention.nnx.capture import capture_attention
from approx_attention.nnx.distillation import Distillation, TuningState, distill_attention, layer_errors, tune
from approx_attention.nnx.eva import Eva, Lara, eva_dropin, eva_official, eva_official_causal, evabyte
from approx_attention.nnx.hedgehog import Hedgehog
from approx_attention.nnx.learned import Adaptor, LearnedAttention
from approx_attention.nnx.models import init_cache, replace_attention
from approx_attention.nnx.modules import LinformerAttention, Rfa, mean_pool_init, scale_keeping_init
from approx_attention.nnx.presses import compress_caches
from approx_attention.nnx.replaced import Replaced
from approx_attention.nnx.tensor import TensorAttention
from approx_attention.nnx.trees import TreeAttention

__all__ = [
    "Adaptor",
    "ApproxAttention",
    "Distillation",
    "Eva",
    "Hedgehog",
    "Lara",
    "LearnedAttention",
    "LinformerAttention",
    "Replaced",
    "Rfa",
    "TensorAttention",
    "TreeAttention",
    "TuningState",
    "capture_attention",
    "compress_caches",
    "distill_attention",
    "eva_dropin",
    "eva_official",
    "eva_official_causal",
    "evabyte",
    "init_cache",
    "layer_errors",
    "mean_pool_init",
    "replace_attention",
    "scale_keeping_init",
    "tune",
]
