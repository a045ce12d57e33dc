"""Control variates: random features, EVA and softmax attention as one estimator."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from approx_attention.core.checks import check_choice
from approx_attention.core.padding import draw_of_size
from approx_attention.core.reading import attend
from approx_attention.core.summaries import FeatureMoments
from approx_attention.kernels import AttentionState, finite_peak, merge


def control_variate_state(
    q: Float[Array, "T D"],
    exact: AttentionState,
    moments: FeatureMoments,
    log_mass: Float[Array, "T G"] | None = None,
) -> AttentionState:
    r"""Attention over a set E of exact keys and G groups of keys, each with one control-variate coefficient.

    .. math:: \mathrm{out}_t = \frac{\sum_{j \in E} e^{q_t \cdot k_j} v_j + \sum_g m_{tg}\, \beta_{tg}}
              {\sum_{j \in E} e^{q_t \cdot k_j} + \sum_g m_{tg}}, \qquad
              \beta_{tg} = \frac{\phi_g(q_t)^T\, \mathrm{value\_sum}_g}{\phi_g(q_t)^T\, \mathrm{mass}_g}.

    The coefficient :math:`\beta_g` is the random-feature output of group g, for which the residual of the control
    variate is 0. The mass :math:`m_{tg}` is the sum of weights :math:`\sum_{j \in g} e^{q_t \cdot k_j}` of the group or
    an estimate. With one group, no exact keys and masses estimated by the features this is random feature attention.
    With one group per key, or every key in E, it is softmax attention. EVA lies in between.

    Args:
        q: queries ``[T, D]`` in scaled space (`fold_scale`).
        exact: the state of the exact keys; `AttentionState.empty` if there are none.
        moments: the feature moments of each group, every array with a leading axis G.
        log_mass: logarithms of the groups' masses ``[T, G]``, ``-inf`` for a group without keys; by default estimated
            by the features.

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
    # Masses relative to their maximum, as in softmax; a query without a group has maximum 0 and total 0. A double where
    # keeps its division and derivative finite.
    peak = finite_peak(jnp.max(log_mass, axis=1))
    mass = jnp.exp(log_mass - peak[:, None])
    total = jnp.sum(mass, axis=1)
    safe_total = jnp.where(total == 0, jnp.ones_like(total), total)
    # As 0 times NaN, the answer of a group without mass would reach the query, so NaN is restored separately.
    finite = jnp.all(jnp.isfinite(answers.out), axis=2)
    known = jnp.where(finite[:, :, None], answers.out, 0)
    out = jnp.einsum("tg,gtd->td", mass / safe_total[:, None], known)
    out = jnp.where(jnp.any((log_mass > -jnp.inf) & ~finite.T, axis=1)[:, None], jnp.nan, out)
    return merge(exact, AttentionState(out, jnp.where(total == 0, -jnp.inf, peak + jnp.log(safe_total))))


def noise_deviation(noise_scale: Literal["exact", "official"], head_dim: int) -> float:
    """Standard deviation of the noise of random directions in scaled space, for `ra`, `lara` and `eva`.

    The theory samples from N(0, I) in scaled space. The authors' code adds such noise to unscaled queries and keys, and
    then scales by :math:`D^{-1/2}`: in scaled space its deviation is :math:`D^{-1/4}`.

    Args:
        noise_scale: ``"exact"`` for the theory, ``"official"`` for the authors' code.
        head_dim: the number D of channels.

    Returns:
        1 or :math:`D^{-1/4}`.

    Raises:
        ValueError: an unknown ``noise_scale``.
    """
    check_choice("noise_scale", noise_scale, ("exact", "official"))
    return head_dim**-0.25 if noise_scale == "official" else 1.0


def proposal_noise(
    given: Float[Array, "R C D"] | None,
    key: Array | None,
    num_samples: int,
    shape: tuple[int, ...],
    dtype: Any,
    num_used: Array | None,
) -> Float[Array, "R C D"]:
    """Standard normal noise of R samples from each of C proposals, for `lara` and `eva`.

    Args:
        given: noise that replaces the sampled one.
        key: typed PRNG key; None for zeros.
        num_samples: the number R of samples, unless noise is given.
        shape: C and D.
        dtype: dtype of the noise.
        num_used: the number of proposals with real tokens, None for all. Sampled noise of these equals that of a
            sequence without padding.

    Raises:
        ValueError: given noise of another shape than ``[R, C, D]``.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention.core import proposal_noise
        >>> proposal_noise(None, None, 2, (3, 4), jnp.float32, None).shape
        (2, 3, 4)
    """
    if given is not None:
        if given.ndim != 3 or given.shape[1:] != shape:
            raise ValueError(f"noise must be [R, C, D] with C, D = {list(shape)}, got shape {given.shape}")
        return given.astype(dtype)
    if key is None:
        return jnp.zeros((num_samples, *shape), dtype)
    noise = jax.random.normal(key, (num_samples, *shape), dtype)
    return noise if num_used is None else draw_of_size(noise, num_used)
