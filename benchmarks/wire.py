"""What crosses the wire when a sequence is sharded: closed formulas, and docs/scaling.md, which explains them.

Per layer, forward pass, in bytes that the busiest device sends; `benchmarks.collectives` counts the same in compiled
programs. Tokens and moments travel in float32, and with each token one byte that says whether it is real.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any


PAGE = pathlib.Path(__file__).parent.parent / "docs" / "scaling.md"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A layer of attention over one sequence of ``length`` tokens, on so many devices."""

    length: int
    devices: int
    num_kv_heads: int = 8
    head_dim: int = 64
    value_dim: int = 64

    def part(self, multiple: int = 1) -> int:
        """Tokens of a device, whose number is rounded up to a multiple."""
        return -(-self.length // (self.devices * multiple)) * multiple


# Method and whether it is causal, with the hyper-parameters at which it is shown.
SETTINGS: Mapping[tuple[str, bool], dict[str, Any]] = {
    ("exact", False): {},
    ("exact", True): {},
    ("local", False): {"window_size": 128},
    ("local", True): {"window_size": 128},
    ("mean_value", False): {},
    ("favor", False): {"num_features": 256},
    ("favor", True): {"num_features": 256, "block_size": 128},
    ("polynomial", False): {},
    ("polynomial", True): {"block_size": 128},
    ("mean_pool", False): {"num_landmarks": 256},
    ("mean_pool", True): {"num_landmarks": 256, "block_size": 128},
    ("coreset", False): {"coreset_size": 256},
    ("coreset", True): {"coreset_size": 256, "block_size": 128},
    ("eva", True): {"num_chunks": 256, "window_size": 64},
    ("block_linformer", False): {"slots_per_block": 16, "block_size": 128},
    ("block_linformer", True): {"slots_per_block": 16, "block_size": 128},
}


def token_bytes(sizes: Sizes, tokens: int) -> int:
    """Keys, values and the mask of so many tokens of all key heads: 4 (D + Dv) + 1 each."""
    return sizes.num_kv_heads * tokens * (4 * (sizes.head_dim + sizes.value_dim) + 1)


def ring_bytes(sizes: Sizes) -> int:
    """Exact attention: every device's tokens visit every other; causal or not, they go all the way round."""
    return (sizes.devices - 1) * token_bytes(sizes, sizes.part())


def halo_bytes(sizes: Sizes, left: int, right: int) -> int:
    """A window: ``left`` tokens to the device after, ``right`` to the one before; of two devices each has one of them."""
    sides = [token_bytes(sizes, left), token_bytes(sizes, right)]
    return (sum if sizes.devices > 2 else max)(sides) if sizes.devices > 1 else 0


def moment_bytes(sizes: Sizes, num_features: int) -> int:
    """R features' sums of values, masses and scales, of all key heads: 4 R (Dv + 2)."""
    return 4 * sizes.num_kv_heads * num_features * (sizes.value_dim + 2)


def all_moments_bytes(sizes: Sizes, num_features: int) -> float:
    """Bidirectional moments: one sum over all devices, 2 (p - 1) / p of them."""
    return 2 * (sizes.devices - 1) / sizes.devices * moment_bytes(sizes, num_features)


def rounds(devices: int) -> int:
    """How often moments are handed on, so that each device has those of all before it."""
    return 0 if devices == 1 else 1 + (math.ceil(math.log2(devices - 1)) if devices > 2 else 0)


def earlier_moments_bytes(sizes: Sizes, num_features: int, block_size: int) -> int:
    """Causal moments: a block to the device after, and the moments in about log2(p) + 1 rounds."""
    handed_on = rounds(sizes.devices) * moment_bytes(sizes, num_features)
    return halo_bytes(sizes, block_size, 0) + handed_on


def all_tokens_bytes(sizes: Sizes, kept: int, *, ranged: bool = False) -> float:
    """Tokens: those that each device has kept go to all others, 4 (D + Dv + 1) each.

    ``ranged``: with the least and the greatest value per channel, which Nystrom weights need.
    """
    others = sizes.devices - 1
    of_token = 4 * (sizes.head_dim + sizes.value_dim + 1)
    ranges = 2 * others / sizes.devices * 4 * 2 * sizes.value_dim if ranged else 0
    return sizes.num_kv_heads * (others * kept * of_token + ranges)


def earlier_tokens_bytes(sizes: Sizes, kept: int, block_size: int) -> float:
    """Causal tokens: a block to the device after, and what each keeps of the others to all."""
    return halo_bytes(sizes, block_size, 0) + all_tokens_bytes(sizes, kept)


def sent_by(method: str, is_causal: bool, sizes: Sizes, **settings: int) -> float:
    """What a registered method sends by the formula of its kind, at the hyper-parameters of `SETTINGS`.

    Raises:
        ValueError: the method is in no kind.
    """
    if method == "exact":
        return ring_bytes(sizes)
    if method == "local":
        reach = settings["window_size"] - 1
        return halo_bytes(sizes, reach, 0 if is_causal else reach)
    block = settings.get("block_size", settings.get("window_size", 128))
    features = {
        "favor": lambda: settings["num_features"],
        "polynomial": lambda: math.comb(sizes.head_dim + 2, 2),
    }
    if method in features:
        moments = features[method]()
        return earlier_moments_bytes(sizes, moments, block) if is_causal else all_moments_bytes(sizes, moments)
    of_part = {
        "mean_value": lambda: 1,
        "mean_pool": lambda: settings["num_landmarks"] // sizes.devices,
        "coreset": lambda: settings["coreset_size"] // sizes.devices + is_causal * settings.get("sinks", 4),
        "eva": lambda: settings["num_chunks"] // sizes.devices,
        "block_linformer": lambda: settings["slots_per_block"] * sizes.part(block) // block,
    }
    if method not in of_part:
        raise ValueError(f"no formula for {method!r}; there are those of exact, local, {', '.join([*features, *of_part])}")
    kept = of_part[method]()
    if is_causal:
        return earlier_tokens_bytes(sizes, kept, block)
    return all_tokens_bytes(sizes, kept, ranged=method == "coreset")


def page(results: pathlib.Path) -> str:
    """The text of docs/scaling.md."""
    raise NotImplementedError
