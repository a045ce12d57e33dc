"""Discrete choices that a backward pass must not recompute: they depend on rounding, and might differ."""

import functools

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from approx_attention.kernels import OUTPUT

_CHOICE = "choice"

# `jax.checkpoint` that recomputes everything except `kept` values.
keeping_choices = functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(_CHOICE))

# The same for the body of a loop over heads: it also stores outputs of attention, which are expensive to recompute.
keeping_outputs = functools.partial(
    jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(_CHOICE, OUTPUT), prevent_cse=False
)


def kept(choice: Array) -> Array:
    """Mark a choice for storage by `keeping_choices`."""
    return checkpoint_name(choice, _CHOICE)
