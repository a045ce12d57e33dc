"""Discrete choices that a backward pass must not make again: they hang on rounding, and might be made otherwise."""

import functools

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name

_CHOICE = "choice"

# `jax.checkpoint` that computes everything again but what is `kept`.
keeping_choices = functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(_CHOICE))


def kept(choice: Array) -> Array:
    """Marks a choice as one that `keeping_choices` keeps."""
    return checkpoint_name(choice, _CHOICE)
