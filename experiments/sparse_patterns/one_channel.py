"""All patterns of few tokens, decided for one channel by the library and by trying every order of the keys."""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterable

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from approx_attention import SparsePattern
from approx_attention.realization import realizable_in_one_dimension
from experiments.config import Count, Seeded, Several
from experiments.results import Frame, Record
from experiments.show import curves, markdown, parts


@dataclasses.dataclass(frozen=True)
class Config(Seeded):
    """Numbers of tokens, at most 6: with 7 the sets of supports do not fit into 64 bits."""

    lengths: Several[Count]


def supports_of_patterns(num_tokens: int) -> Iterable[np.ndarray]:
    """Sets of supports of at most n rows, one of each class that permutations of the keys make, as ``[N, rows]``.

    A support is a number with a bit for each key. The order of the rows, and rows that are equal, decide nothing.
    """
    every = np.arange(1, 2**num_tokens)
    orders = np.array(list(itertools.permutations(range(num_tokens))))
    bits = every[:, None] >> np.arange(num_tokens) & 1
    # The support that each order makes of each, as the bit of a set of supports.
    moved = np.uint64(1) << (bits @ (1 << orders.T)).T.astype(np.uint64)
    found = np.array([[2**size - 1] for size in range(1, num_tokens + 1)])
    yield found
    for _ in range(1, num_tokens):
        more = np.concatenate([np.repeat(found, len(every), axis=0), np.tile(every, len(found))[:, None]], axis=1)
        more = np.sort(more[(more[:, :-1] != more[:, -1:]).all(axis=1)], axis=1)
        more = np.unique(more, axis=0)
        least = np.full(len(more), np.iinfo(np.uint64).max, np.uint64)
        for order in moved:
            least = np.minimum(least, np.bitwise_or.reduce(order[more - 1], axis=1))
        found = more[np.unique(least, return_index=True)[1]]
        yield found


def realizable_by_an_order(supports: np.ndarray, num_tokens: int) -> np.ndarray:
    """Whether some order of the keys has every support of a set at one of its ends ``[N]``."""
    found = np.zeros(len(supports), bool)
    for order in itertools.permutations(range(num_tokens)):
        ends = [sum(1 << key for key in order[:size]) for size in range(1, num_tokens + 1)]
        ends += [2**num_tokens - 1 - end for end in ends[:-1]]
        found |= np.isin(supports, ends).all(axis=1)
    return found


def run(config: Config, directory: pathlib.Path, console: Console) -> list[Record]:
    """How many sets of supports one channel realises, and on how many the two decisions differ."""
    records: list[Record] = []
    for n in config.lengths:
        number = realizable = disagreements = 0
        for supports in supports_of_patterns(n):
            # The pattern has n rows: the last support is repeated.
            rows = np.concatenate([supports, np.repeat(supports[:, -1:], n - supports.shape[1], axis=1)], axis=1)
            present = (rows[:, :, None] >> np.arange(n) & 1).astype(bool)
            keys = np.tile(np.arange(n, dtype=np.int32), (n, 1))
            decided = [
                realizable_in_one_dimension(SparsePattern(keys, np.where(held, 0.0, -np.inf), held, n))  # type: ignore[arg-type]
                for held in present
            ]
            wanted = realizable_by_an_order(supports, n)
            number, realizable = number + len(supports), realizable + int(wanted.sum())
            disagreements += int((wanted != decided).sum())
        console.print(f"{n} tokens: {number} sets of supports, {realizable} in one channel, {disagreements} disagree")
        records.append({"tokens": n, "sets": number, "share": realizable / number, "disagreements": disagreements})
    return records


def table(records: Frame) -> Iterable[str]:
    """Sets of supports by the number of tokens."""
    for name, own in parts(records):
        yield f"`{name}`: sets of supports up to the order of the keys, and the share that one channel realises"
        columns = ["tokens", "sets", "share", "disagreements"]
        rows = [[f"{x:.6g}" for x in row] for row in own[columns].to_numpy().tolist()]
        yield markdown("tokens|sets of supports|in one channel|decided differently by trying all orders", rows)


def figure(records: Frame) -> Figure:
    """The share that one channel realises."""
    shown = records.assign(curve="one channel")
    labels = ("tokens", "share of sets of supports")
    return curves(shown, x="tokens", y="share", by="curve", labels=labels, scales=("linear", "log"), size=(5.0, 3.6))
