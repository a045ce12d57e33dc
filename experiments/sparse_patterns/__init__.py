"""Sparse patterns realised by self-attention with fixed projections: how many channels that takes."""
