"""Fused kernels of exact attention for accelerators."""
