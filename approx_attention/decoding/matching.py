"""Attention matching: kept keys, with masses and values that preserve the outputs of reference queries."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from approx_attention.core import (
    WeightedKV,
    attend,
    check_not_negative,
    check_number,
    in_float32,
    keep_count,
    merge,
    nonnegative_least_squares,
)
from approx_attention.decoding.heuristics import Queries, received


@dataclasses.dataclass(frozen=True)
class AttentionMatching:
    r"""Keep the keys with the most attention from reference queries, and solve for their masses and values.

    Let :math:`Z(q)` be the normaliser of all tokens, :math:`P_{tc} = m_c e^{q_t \cdot k_c} / Z(q_t)` the shares of the
    kept keys c, :math:`s_t` the share of all tokens that they represent, and :math:`E_t` that of exact tokens. The
    masses :math:`m_c f_c` solve

    .. math:: \min_{f \ge 0}\ \sum_t \Big(\sum_c P_{tc} f_c - s_t\Big)^2 + \lambda\, \tau \sum_c (f_c - 1)^2,

    so that normalisers agree in relative terms. The values :math:`u_c` solve a ridge regression of the outputs,

    .. math:: \min_u\ \sum_t \Big\| \mathrm{out}(q_t) - \frac{\sum_{j \in E} P_{tj} v_j + \sum_c P_{tc} f_c u_c}
              {E_t + \sum_c P_{tc} f_c} \Big\|^2 + \lambda\, \tau \sum_c \|u_c - v_c\|^2,

    where :math:`\tau` is the mean of the diagonal of each Gram matrix of kept keys. Reference queries see all tokens,
    like later queries, and not only those before them. The choice of keys and their masses have no gradient; values
    have.

    Attributes:
        references: the number of last positions whose queries are matched. The cost is that of their exact outputs,
            plus a term cubic in the budget.
        ridge: :math:`\lambda`, the pull towards the original masses and values. A smaller ridge fits the reference
            queries better and later queries worse. On held-out queries of a diffuse head of a trained model the error
            with 0.1 is 7 % smaller than with 0.0001; on a sharp head all ridges give the same error.

    Raises:
        ValueError: ``references`` below 1, a ridge that is negative or not finite.

    Reference:
        :cite:p:`zweiger2026matching`, with the keys that receive the most attention. The ridge for masses is this
        library's: with fewer queries than keys the published masses are not unique.
    """

    references: int = 512
    ridge: float = 0.1
    needs_queries: ClassVar[bool] = True
    later: ClassVar[bool] = False

    def __post_init__(self) -> None:
        keep_count(self, "references")
        check_number("ridge", self.ridge)
        check_not_negative("ridge", self.ridge)
        object.__setattr__(self, "ridge", float(self.ridge))

    def score(self, tokens: WeightedKV, queries: Queries) -> Array:
        """Rank keys by the attention that they receive from the reference queries.

        Args:
            tokens: S tokens; hidden ones have mass 0.
            queries: queries, of which the last ones are the references.

        Returns:
            Sums of attention weights ``[S]``.
        """
        return received(tokens, queries.recent(self.references))

    @functools.partial(jax.jit, static_argnums=0)
    @in_float32()  # solves multiply rounding by the condition number
    def fitted(self, tokens: WeightedKV, fixed: WeightedKV, kept: WeightedKV, queries: Queries) -> WeightedKV:
        """Solve for the masses and values of the kept tokens.

        Args:
            tokens: the tokens that the kept ones represent, including the kept ones.
            fixed: tokens that stay exact.
            kept: a subset of ``tokens``.
            queries: queries, of which the last ones are matched.

        Returns:
            The kept keys with new masses and values.
        """
        rows, seen = queries.recent(self.references).flat
        own = attend(rows, tokens)
        whole = merge(own, attend(rows, fixed)) if fixed.mass.shape[0] else own
        # A query that sees none of the tokens does not constrain them.
        asked = ((seen > 0) & jnp.isfinite(own.lse))[:, None]

        log_own, log_whole = (jnp.where(asked[:, 0], x.lse, 0) for x in (own, whole))

        def shares(of: WeightedKV) -> Array:
            seen = asked & (of.mass > 0)[None, :]
            logits = rows @ of.k.T + of.log_mass[None, :] - log_whole[:, None]
            # A share is at most 1 up to rounding.
            return jnp.where(seen, jnp.exp(jnp.minimum(jnp.where(seen, logits, 0), 0)), 0)

        # Queries that are not matched are rows of 0.
        share = shares(kept)
        target = jnp.where(asked[:, 0], jnp.exp(log_own - log_whole), 0)
        gram = share.T @ share
        # Kept tokens without mass, beyond the size of a head, have no effect.
        count = jnp.maximum(jnp.sum(kept.mass > 0), 1).astype(gram.dtype)
        pull = self.ridge * jnp.trace(gram) / count
        factor = nonnegative_least_squares(*lax.stop_gradient(_pulled(gram, share.T @ target, pull, 1)))
        share = share * factor[None, :]

        of_fixed = shares(fixed)
        total = jnp.sum(of_fixed, axis=1, keepdims=True) + jnp.sum(share, axis=1, keepdims=True)
        total = jnp.where(total > 0, total, 1)
        weights = share / total
        missing = jnp.where(asked, whole.out, 0) - (of_fixed @ fixed.values + share @ kept.values) / total
        values = kept.values + _ridge_solution(weights, missing, self.ridge, count)
        mass = kept.mass * factor
        return WeightedKV(kept.k, values * mass[:, None], mass)


MATCHING: Mapping[str, AttentionMatching] = {"attention_matching": AttentionMatching()}


def _pulled(gram: Array, target: Array, pull: Array, to: float) -> tuple[Array, Array]:
    """The least squares problem with a ridge towards a number."""
    return gram + pull * jnp.eye(gram.shape[0], dtype=gram.dtype), target + pull * to


def _ridge_solution(a: Array, b: Array, ridge: float, count: Array) -> Array:
    r"""The minimiser of :math:`\|a x - b\|^2 + \lambda \tau \|x\|^2` for ``count`` columns that are not 0.

    By the smaller of the two systems.
    """
    rows, columns = a.shape
    gram = a @ a.T if rows < columns else a.T @ a
    tau = jnp.sum(a * a) / count
    # 0 if nothing is matched. With ridge 0 the rounding error of the matrix, so that a Cholesky factor exists.
    least = max(rows, columns) * jnp.finfo(a.dtype).eps * jnp.trace(gram)
    pull = jnp.where(tau > 0, jnp.maximum(ridge * tau, least), 1)
    factor = lax.linalg.cholesky(gram + pull * jnp.eye(gram.shape[0], dtype=a.dtype)), True
    if rows < columns:
        return a.T @ jax.scipy.linalg.cho_solve(factor, b)
    return jax.scipy.linalg.cho_solve(factor, a.T @ b)
