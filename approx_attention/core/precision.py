"""Products that must not be rounded: references, diagnostics, certificates and inverses."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def in_float32() -> Iterator[None]:
    """Within this, or in a function that it decorates, products of float32 matrices are those of float32.

    By default an accelerator rounds their operands: a TPU to bfloat16, which is off by 1e-2, and an H200 to TF32, by
    1e-3. An approximation survives that, and keeps the precision that its user has set. What an error is measured
    against does not, nor what subtracts nearly equal numbers or inverts a matrix, which multiplies the rounding by a
    condition number.

    A product has the precision that holds while it is traced, so a rule of a custom derivative, which is traced later,
    needs a decoration too. Products of 16-bit operands are exact already, and cost no more.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention.core import in_float32
        >>> gram = in_float32()(lambda x: x @ x.T)
        >>> "HIGHEST" in str(jax.make_jaxpr(gram)(jnp.eye(2)))
        True
    """
    with jax.default_matmul_precision("float32"):
        yield
