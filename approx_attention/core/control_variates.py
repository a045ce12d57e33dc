"""The control-variate view: random features, EVA and softmax attention as one estimator."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from approx_attention.core.checks import check_choice
from approx_attention.core.reading import attend
from approx_attention.core.summaries import FeatureMoments
from approx_attention.kernels import AttentionState, finite_peak, merge


def control_variate_state(
    q: Float[Array, "T D"],
    exact: AttentionState,
    moments: FeatureMoments,
    log_mass: Float[Array, "T G"] | None = None,
) -> AttentionState:
    r"""Attention over an exact set E of keys and G groups, each group with one control-variate coefficient.

    .. math:: \mathrm{out}_t = \frac{\sum_{j \in E} e^{q_t \cdot k_j} v_j + \sum_g m_{tg}\, \beta_{tg}}
              {\sum_{j \in E} e^{q_t \cdot k_j} + \sum_g m_{tg}}, \qquad
              \beta_{tg} = \frac{\phi_g(q_t)^T\, \mathrm{value\_sum}_g}{\phi_g(q_t)^T\, \mathrm{mass}_g}.

    The coefficient :math:`\beta_g` is the random-feature output of group g, for which its residual vanishes; the mass
    :math:`m_{tg}` is the attention of the group, :math:`\sum_{j \in g} e^{q_t \cdot k_j}` or an estimate. With one
    group, no exact set and the masses that the features estimate this is random feature attention; with one group per
    key, or every key in E, it is softmax attention; EVA lies between.

    Args:
        q: queries ``[T, D]`` in scaled space (`fold_scale`).
        exact: the state of the exact set, `AttentionState.empty` if there is none.
        moments: the moments of each group's keys, every array with a leading axis G.
        log_mass: log of the groups' masses ``[T, G]``, ``-inf`` for a group without keys; by default those that the
            features estimate.

    Returns:
        The `AttentionState` of the queries.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import AttentionState, FeatureMoments, attend
        >>> from approx_attention.core import PositiveFeatures
        >>> q, k, v, w = (jax.random.normal(jax.random.key(i), (6, 4)) for i in range(4))
        >>> groups = lambda x: x.reshape(1, 6, 4)
        >>> moments = jax.vmap(lambda k, v: FeatureMoments.of_tokens(PositiveFeatures(w), k, v))(groups(k), groups(v))
        >>> one_group = control_variate_state(q, AttentionState.empty(6, 4), moments)
        >>> random_features = attend(q, FeatureMoments.of_tokens(PositiveFeatures(w), k, v))
        >>> bool(jnp.allclose(one_group.out, random_features.out, atol=1e-5))
        True

    Reference:
        :cite:p:`zheng2023efficient`, section 4.
    """
    answers = jax.vmap(lambda moments: attend(q, moments))(moments)
    log_mass = answers.lse.T if log_mass is None else log_mass
    # Masses less their peak, as in softmax; a query without any group has the peak 0 and the total 0. The double where
    # keeps its division, and the derivative of that, finite.
    peak = finite_peak(jnp.max(log_mass, axis=1))
    mass = jnp.exp(log_mass - peak[:, None])
    total = jnp.sum(mass, axis=1)
    safe_total = jnp.where(total == 0, jnp.ones_like(total), total)
    out = jnp.einsum("tg,gtd->td", mass / safe_total[:, None], answers.out)
    return merge(exact, AttentionState(out, jnp.where(total == 0, -jnp.inf, peak + jnp.log(safe_total))))


def noise_deviation(noise_scale: Literal["exact", "official"], head_dim: int) -> float:
    r"""Standard deviation of the noise of random directions in scaled space, for `ra`, `lara` and `eva`.

    The theory draws from N(0, I) in scaled space. The authors' code adds such noise to queries and keys that are not
    scaled yet, and then scales by :math:`D^{-1/2}`: in scaled space its deviation is :math:`D^{-1/4}`.
    """
    check_choice("noise_scale", noise_scale, ("exact", "official"))
    return head_dim**-0.25 if noise_scale == "official" else 1.0
