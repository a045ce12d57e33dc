"""The cache of compiled programs that the tests share."""

import pathlib

import jax
import jax.numpy as jnp


def _compile():
    def half_written(x):
        return jnp.sin(x) + 1

    return jax.jit(half_written).lower(jnp.zeros(3)).compile()


def test_half_written_entries_are_compiled_again():
    # JAX writes entries in place, so another worker, or a later run, may find half of one.
    _compile()
    cache = pathlib.Path(jax.config.jax_compilation_cache_dir)
    whole = {entry: entry.read_bytes() for entry in cache.glob("jit_half_written-*-cache")}
    assert whole
    try:
        for entry, program in whole.items():
            entry.write_bytes(program[: len(program) // 2])
        out = _compile()(jnp.zeros(3))
    finally:
        for entry, program in whole.items():
            entry.write_bytes(program)
    assert out.tolist() == [1, 1, 1]
