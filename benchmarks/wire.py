"""Bytes between devices for a sharded sequence: closed formulas, and docs/scaling.md, which explains them.

The formulas give the bytes that the busiest device sends for one layer in the forward pass; `benchmarks.collectives`
counts them in compiled programs. Tokens and moments are sent in float32, with one byte of mask per token.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence

from approx_attention.evaluation import markdown_table

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "scaling.md"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A layer of attention over one sequence of ``length`` tokens, sharded over ``devices``."""

    length: int
    devices: int
    num_kv_heads: int = 8
    head_dim: int = 64
    value_dim: int = 64

    def part(self, multiple: int = 1) -> int:
        """The number of tokens of a device, rounded up to a multiple."""
        return -(-self.length // (self.devices * multiple)) * multiple


# The methods, causal or not, with the hyper-parameters at which they are shown.
SETTINGS: Mapping[tuple[str, bool], dict[str, int]] = {
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
    """Bytes of keys, values and mask of tokens of all key heads: 4 (D + Dv) + 1 each."""
    return sizes.num_kv_heads * tokens * (4 * (sizes.head_dim + sizes.value_dim) + 1)


def ring_bytes(sizes: Sizes) -> int:
    """Exact attention: the tokens of every device visit every other device, in the causal form too."""
    return (sizes.devices - 1) * token_bytes(sizes, sizes.part())


def halo_bytes(sizes: Sizes, left: int, right: int) -> int:
    """A window: ``left`` tokens to the next device and ``right`` to the previous one; with two devices, to one side."""
    sides = [token_bytes(sizes, left), token_bytes(sizes, right)]
    return (sum if sizes.devices > 2 else max)(sides) if sizes.devices > 1 else 0


def moment_bytes(sizes: Sizes, num_features: int) -> int:
    """Sums of values, masses and scales of R features, for all key heads: 4 R (Dv + 2) bytes each."""
    return 4 * sizes.num_kv_heads * num_features * (sizes.value_dim + 2)


def all_moments_bytes(sizes: Sizes, num_features: int) -> float:
    """Bidirectional moments: one sum over all devices, 2 (p - 1) / p of them."""
    return 2 * (sizes.devices - 1) / sizes.devices * moment_bytes(sizes, num_features)


def rounds(devices: int) -> int:
    """The number of rounds after which each device has the moments of all devices before it."""
    return 0 if devices == 1 else 1 + (math.ceil(math.log2(devices - 1)) if devices > 2 else 0)


def earlier_moments_bytes(sizes: Sizes, num_features: int, block_size: int) -> int:
    """Causal moments: a block to the next device, and the moments in about log2(p) + 1 rounds."""
    handed_on = rounds(sizes.devices) * moment_bytes(sizes, num_features)
    return halo_bytes(sizes, block_size, 0) + handed_on


def all_tokens_bytes(sizes: Sizes, kept: int, *, ranged: bool = False) -> float:
    """Tokens: each device sends its kept tokens to all others, 4 (D + Dv + 1) bytes each.

    ``ranged`` adds the least and the greatest value per channel, which Nystrom weights need.
    """
    others = sizes.devices - 1
    of_token = 4 * (sizes.head_dim + sizes.value_dim + 1)
    ranges = 2 * others / sizes.devices * 4 * 2 * sizes.value_dim if ranged else 0
    return sizes.num_kv_heads * (others * kept * of_token + ranges)


def earlier_tokens_bytes(sizes: Sizes, kept: int, block_size: int) -> float:
    """Causal tokens: a block to the next device, and the kept tokens of each device to all others."""
    return halo_bytes(sizes, block_size, 0) + all_tokens_bytes(sizes, kept)


def sent_by(method: str, is_causal: bool, sizes: Sizes, **settings: int) -> float:
    """Bytes that a registered method sends, by the formula of its kind, at the hyper-parameters of `SETTINGS`.

    Raises:
        ValueError: there is no formula for the method.
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
        raise ValueError(
            f"no formula for {method!r}; there are those of exact, local, {', '.join([*features, *of_part])}"
        )
    kept = of_part[method]()
    if is_causal:
        return earlier_tokens_bytes(sizes, kept, block)
    return all_tokens_bytes(sizes, kept, ranged=method == "coreset")


# Another example on the page: a long sequence on many devices.
LENGTH, MANY = 10_000_000, (8, 64, 1024)
# Bytes per second of one link in one direction, to turn bytes into seconds: an assumption, not a measurement.
BANDWIDTH = 50e9
# Sizes of summaries of tokens, which keep at least one token on each device.
LARGE: Mapping[str, int] = {"num_landmarks": 16_384, "coreset_size": 16_384, "num_chunks": 16_384}
KINDS = {
    ("exact", False): "ring",
    ("local", True): "halo",
    ("favor", False): "moments",
    ("favor", True): "moments, causal",
    ("polynomial", True): "moments, causal",
    ("mean_pool", False): "tokens",
    ("mean_pool", True): "tokens, causal",
    ("block_linformer", True): "tokens by blocks, causal",
}


def least_length(method: str, is_causal: bool, devices: int, **settings: int) -> float:
    """The length from which a method of bounded size sends less than the ring."""
    ring_per_token = token_bytes(Sizes(1, devices), 1) * (devices - 1) / devices
    return sent_by(method, is_causal, Sizes(0, devices), **settings) / ring_per_token


def page(results: pathlib.Path) -> str:
    """The text of docs/scaling.md."""
    rows = json.loads((results / "collectives.json").read_text())["rows"]
    different = [row for row in rows if sum(row["bytes"].values()) != row["model_bytes"]]
    lengths, devices = (sorted({row[name] for row in rows}) for name in ("length", "devices"))
    sizes = Sizes(LENGTH, MANY[-1])
    settings = {key: {name: LARGE.get(name) or x for name, x in SETTINGS[key].items()} for key in KINDS}
    far = [
        [
            f"`{method}`, {kind}" + "".join(f", {name} {x}" for name, x in settings[method, is_causal].items()),
            *(_size(sent_by(method, is_causal, Sizes(LENGTH, p), **settings[method, is_causal])) for p in MANY),
            _seconds(sent_by(method, is_causal, sizes, **settings[method, is_causal]) / BANDWIDTH),
        ]
        for (method, is_causal), kind in KINDS.items()
    ]
    bounded = [key for key in KINDS if key[0] not in ("exact", "block_linformer")]
    from_length = [
        [
            f"`{method}`, {KINDS[method, is_causal]}, {', '.join(f'{n} {x}' for n, x in chosen.items()) or 'degree 2'}",
            *(f"{least_length(method, is_causal, p, **chosen):.0f}" for p in MANY),
        ]
        for method, is_causal in bounded
        for chosen in [SETTINGS[method, is_causal]]
        if method != "mean_pool"
    ]
    token = 4 * (sizes.head_dim + sizes.value_dim + 1)
    full, feature = token_bytes(sizes, 1) / sizes.num_kv_heads, 4 * (sizes.value_dim + 2)
    as_many = [
        ["bidirectional", *(f"{2 * feature / token:.2f}" for _ in MANY)],
        ["causal", *(f"{rounds(p) * feature * p / (p - 1) / token:.2f}" for p in MANY)],
    ]
    share = {
        "tokens": full / token,
        "features, bidirectional": full / (2 * feature),
        "features, causal": full / (rounds(MANY[-1]) * feature),
    }
    verdict = (
        f"In all {len(rows)} of them the two numbers are equal."
        if not different
        else f"They differ in {len(different)} of {len(rows)}: "
        + ", ".join(f"`{r['method']}` on {r['devices']} at {r['length']}" for r in different)
        + "."
    )
    return f"""# Scaling over devices

Generated by `python -m benchmarks report` from the formulas in `benchmarks/wire.py`; do not edit.

`distributed.attention` shards a sequence of n tokens over p devices. The bytes that a device sends for one layer, in
the forward pass, follow from the method alone. K is the number of key heads, and D and Dv are the channels of keys and
values. All data is sent in float32, also where the tensors are bfloat16. A batch of B sequences sends B times as
many bytes.

- **Ring** (`exact`): keys, values and one byte of mask per token visit every other device,
  `(p - 1) K (n / p) (4 (D + Dv) + 1)` bytes: about all keys and values, for any number of devices. The causal
  form sends as many bytes, and computes half as much.
- **Halo** (`local`): the `w - 1` tokens before a device's first and after its last, for a window of w tokens,
  `(w - 1) K (4 (D + Dv) + 1)` bytes to a side, for any n and p; causally those before alone.
- **Moments** (`favor`, `rfa`, `polynomial`, `scatterbrain`): R features take `4 K R (Dv + 2)` bytes. Bidirectionally
  they are summed over devices, which sends `2 (p - 1) / p` times that. Causally a device needs those before it: one
  block to its neighbour, `b K (4 (D + Dv) + 1)` bytes, and then the moments in `1 + ceil(log2(p - 1))` rounds.
- **Tokens** (`mean_pool`, `coreset`, `uniform_sample`, `eva`): a summary of S tokens is kept in parts of `S / p`, which
  are gathered: `(p - 1) K (S / p) 4 (D + Dv + 1)` bytes, causally with a block to the neighbour. `coreset` also
  sends its sinks or the range of its values. `block_linformer` keeps some slots of every block, so S grows with n.

## The formulas and the compiled programs

`python -m benchmarks collectives` counts the bytes of every collective in the compiled programs (loops as often as they
run, the busiest device) on {_listed(devices)} devices at {_listed(lengths)} tokens, for {len(SETTINGS)} methods and
forms. {verdict} `benchmarks/RESULTS.md` has the table.

The formulas hold where p times the block divides n. Other lengths are padded. The parts then begin at other tokens,
which move to neighbouring devices first.

## {LENGTH:,} tokens

Bytes that a device sends per layer in the forward pass, with K = {sizes.num_kv_heads}, D = {sizes.head_dim} and
Dv = {sizes.value_dim}; from the formulas, which were checked on up to {devices[-1]} devices. Seconds are bytes over
{BANDWIDTH / 1e9:.0f} GB/s, a bandwidth that is assumed here and was not measured.

{markdown_table(["", *(f"p = {p:,}" for p in MANY), f"seconds at {MANY[-1]:,}"], far)}

## From which length a summary sends less than the ring

{markdown_table(["tokens", *(f"p = {p:,}" for p in MANY)], from_length)}

Conversely, at a given n a summary sends less than the ring if its size is below a share of n. For long sequences and
many devices these shares are {", ".join(f"{name} {value:.2f} n" for name, value in share.items())} (on {MANY[-1]:,}
devices). Most summaries are far smaller. Only that of `block_linformer`, a fixed share of all tokens, grows like the
ring.

## When gathered tokens overtake moments

Tokens kept in all, per feature, above which gathering tokens sends more than moments do:

{markdown_table(["", *(f"p = {p:,}" for p in MANY)], as_many)}

With a fixed number of tokens on each device, S grows with p. At 16 tokens a device and 256 features, gathering sends
more than summing moments from p = {math.ceil(2 * 256 * feature / (16 * token))} on. A size below p is an error, because
each device keeps at least one token.

## Limits of the formulas

- Time. A ring sends while it computes, so its bytes cost no time where attention over a part takes longer than
  sending it. Devices wait for a summary. Bytes are no time of a layer.
- Latency: the ring takes p - 1 steps, causal moments {rounds(MANY[-1])} rounds on {MANY[-1]:,} devices, the others
  one or two.
- The backward pass.
- Memory: each device has the gathered tokens of all devices.
- How a collective is realised: rings are assumed, which send the least.
- Everything outside attention, such as gradients of parameters over data-parallel devices.
"""


def _size(num_bytes: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.3g} {unit}"
    return f"{num_bytes:.0f} B"


def _seconds(seconds: float) -> str:
    for unit, scale in (("s", 1), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def _listed(numbers: Sequence[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}" if first else last
