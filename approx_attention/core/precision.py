"""Full-precision products for references, diagnostics, certificates and inverses."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def in_float32() -> Iterator[None]:
    """Context manager or decorator in which products of float32 matrices have full float32 precision.

    By default accelerators round the operands: a TPU to bfloat16, with errors of 1e-2, and an H200 to TF32, with errors
    of 1e-3. An approximation tolerates this, and uses the precision that its user has set. References for errors do
    not, nor do differences of nearly equal numbers and matrix inverses, which amplify the rounding.

    The setting applies while a product is traced. A rule of a custom derivative is traced later, and needs the
    decorator too. Products of 16-bit operands are already exact, and cost no more.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention.core import in_float32
        >>> gram = in_float32()(lambda x: x @ x.T)
        >>> "HIGHEST" in str(jax.make_jaxpr(gram)(jnp.eye(2)))
        True
    """
    with jax.default_matmul_precision("float32"):
        yield
