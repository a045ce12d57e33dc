"""Keys and values on which coresets are measured, from the easy to those that some must fail on."""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import Array

Instance = Literal[
    "clustered",
    "sphere",
    "half_space",
    "low_rank",
    "outliers",
    "gaussian",
    "heavy_tailed",
    "two_points",
    "lower_bound",
]
# Tokens near each key of the lower bound, and how far they are from it.
COPIES, SPREAD = 4, 0.05


def draw(name: str, num_keys: int, head_dim: int, value_dim: int, radius: float, seed: int) -> tuple[Array, Array]:
    """Keys of norm at most 1 and values of norm at most 1, for queries of norm up to ``radius``.

    Args:
        name: ``clustered``: 64 tight clusters on the sphere, values alike within them. ``sphere``: uniform keys and
            Gaussian values. ``half_space``: uniform keys, and the side of a plane on which they lie as values, of which
            the mean is far from right. ``low_rank``: Gaussian keys in 6 dimensions of all. ``outliers``: most keys in
            one cap, 1 % opposite to it with other values. ``gaussian`` and ``heavy_tailed`` (Student's t, 3 degrees of
            freedom): independent entries. ``two_points``: one key, and many copies of its opposite. ``lower_bound``:
            keys of which no half can stand for all, and four tokens near each, no two of them equal.
        num_keys: how many; the last two instances have a fixed number.
        head_dim: channels of keys; of the lower bound, its parameter d.
        value_dim: channels of values.
        radius: of the queries, which the last two instances are made for.
        seed: of the draw.
    """
    random = np.random.default_rng(seed)
    if name == "clustered":
        label = random.integers(64, size=num_keys)
        k = random.normal(size=(64, head_dim))[label] + 0.3 * random.normal(size=(num_keys, head_dim))
        v = random.normal(size=(64, value_dim))[label] + 0.5 * random.normal(size=(num_keys, value_dim))
    elif name == "sphere":
        k = random.normal(size=(num_keys, head_dim))
        v = random.normal(size=(num_keys, value_dim))
    elif name == "half_space":
        k = random.normal(size=(num_keys, head_dim))
        v = np.sign(k @ random.normal(size=(head_dim, value_dim)))
    elif name in ("gaussian", "heavy_tailed"):
        size = (num_keys, head_dim)
        k = random.normal(size=size) if name == "gaussian" else random.standard_t(3, size=size)
        v = random.normal(size=(num_keys, value_dim))
    elif name == "low_rank":
        k = random.normal(size=(num_keys, 6)) @ random.normal(size=(6, head_dim))
        v = k @ random.normal(size=(head_dim, value_dim)) + 0.5 * random.normal(size=(num_keys, value_dim))
    elif name == "outliers":
        axis = random.normal(size=head_dim)
        axis = axis / np.linalg.norm(axis)
        side = np.where(np.arange(num_keys) < num_keys // 100, -1.0, 1.0)[:, None]
        k = side * axis + 0.3 * random.normal(size=(num_keys, head_dim)) / np.sqrt(head_dim)
        v = random.normal(size=(num_keys, value_dim)) + np.where(side < 0, 2.0, 0.0)
    elif name == "two_points":
        copies = round(np.exp(2 * radius))
        k = np.zeros((copies + 1, head_dim))
        k[:, 0] = [1.0] + [-1.0] * copies
        v = np.zeros((copies + 1, value_dim))
        v[:, 0] = k[:, 0]
    else:
        # The key i of block j is a e_i + sqrt(1 - a^2) u_j with random unit u_j, about e^(radius - 1) blocks.
        blocks, near = max(1, round(np.exp(radius - 1))), radius**-0.5
        centre = random.normal(size=(blocks, 1, head_dim))
        centre = centre / np.linalg.norm(centre, axis=2, keepdims=True)
        k = (near * np.eye(head_dim) + np.sqrt(1 - near**2) * centre).reshape(-1, head_dim)
        v = random.choice([-1.0, 1.0], size=(len(k), 1))
        k, v = np.tile(k, (COPIES, 1)), np.tile(v, (COPIES, 1))
        k = k + SPREAD * random.normal(size=k.shape) / np.sqrt(head_dim)
    if name in ("clustered", "sphere", "half_space"):
        k = k / np.linalg.norm(k, axis=1, keepdims=True)
    else:
        k = k / max(np.linalg.norm(k, axis=1).max(), 1e-30)
    v = v / np.linalg.norm(v, axis=1).max()
    return jnp.asarray(k, jnp.float32), jnp.asarray(v, jnp.float32)
