"""Fits of error against size, and bounds of the errors of unseen heads."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

from approx_attention.core import InputError

# With fewer key heads than this, over all sequences, their spread is unknown, and queries are held out instead.
LEAST_HEADS = 8
# Number of runs of queries of each key head that then replace heads.
RUNS_OF_QUERIES = 16
# Larger errors are clipped to this before their logarithms are fitted.
LARGEST_ERROR = 1e30


@dataclasses.dataclass(frozen=True)
class ErrorLaw:
    r"""A non-increasing law of error against size: linear in log-log between measured sizes, a power law beyond.

    Errors are an isotonic regression of log error on log size. Beyond the measured sizes the law continues with the
    median slope over all pairs (Theil-Sen), which is robust to an outlier.

    Attributes:
        sizes: measured sizes, increasing.
        errors: fitted errors at these sizes.
        slope: slope of log error against log size, at most 0.

    Example:
        >>> law = ErrorLaw.fit({16: 0.4, 64: 0.2, 256: 0.1})  # falls as the square root
        >>> round(law.slope, 3), round(law.error(1024), 3), round(law.size(0.15))
        (-0.5, 0.05, 114)
    """

    sizes: tuple[int, ...]
    errors: tuple[float, ...]
    slope: float

    @classmethod
    def fit(cls, measured: Mapping[int, float]) -> "ErrorLaw":
        """Fit the law to measured errors by size; an error of 0 is replaced by the smallest positive number."""
        from scipy.optimize import isotonic_regression  # imported here for a faster start of the command line
        from scipy.stats import theilslopes

        sizes = sorted(measured)
        x = np.log(sizes)
        # An error of 0 has no logarithm, and means with an infinite error are infinite.
        least = float(np.finfo(np.float32).tiny)
        y = np.log([min(max(measured[size], least), LARGEST_ERROR) for size in sizes])
        # One size has no slope. An error that grows with the size is noise: beyond the sizes it is constant.
        slope = 0.0
        if len(sizes) > 1:
            slope = min(0.0, float(theilslopes(y, x).slope))  # pyright: ignore[reportAttributeAccessIssue]
        fitted = [math.exp(log) for log in isotonic_regression(y, increasing=False).x]
        return cls(tuple(sizes), tuple(fitted), slope)

    def error(self, size: float) -> float:
        """The error at a size."""
        x, logs = np.log(self.sizes), np.log(self.errors)
        at = math.log(size)
        beyond = at - float(np.clip(at, x[0], x[-1]))
        return math.exp(float(np.interp(at, x, logs)) + self.slope * beyond)

    def size(self, error: float) -> float:
        """The smallest size with at most this error; infinite if there is none."""
        x, logs, wanted = np.log(self.sizes), np.log(self.errors), math.log(error)
        if wanted >= logs[0]:
            return math.exp(x[0] + (wanted - logs[0]) / self.slope) if self.slope else 0.0
        if wanted < logs[-1]:
            beyond = (wanted - logs[-1]) / self.slope if self.slope else math.inf
            # The exponential of a large number overflows.
            return math.exp(x[-1] + beyond) if x[-1] + beyond < 700 else math.inf
        right = int(np.argmax(logs <= wanted))
        if logs[right] == logs[right - 1]:
            return float(self.sizes[right])
        share = (wanted - logs[right - 1]) / (logs[right] - logs[right - 1])
        return math.exp(float(x[right - 1] + share * (x[right] - x[right - 1])))


class Split(NamedTuple):
    """The split of units into calibration units, which are measured, and held-out units, which check the pick.

    A unit is a key head with all of its queries, so that the two parts share no keys.

    Attributes:
        by: ``heads``, ``heads of sequences`` or ``runs of queries``.
        shape: numbers of sequences (1 if a unit is a head in all sequences), of key heads, and of runs of queries.
        groups: the stratum of each unit, ``[U]``: its sequence, or its key head.
        calibration: indices of the calibration units.
        held_out: indices of the held-out units.
        query_mask: mask of real queries ``[B, T]``, if some are padding.
    """

    by: str
    shape: tuple[int, int, int]
    groups: np.ndarray
    calibration: np.ndarray
    held_out: np.ndarray
    query_mask: np.ndarray | None = None

    def of_group(self, group: int) -> "Split":
        """The units of one group."""
        mine = (units[self.groups[units] == group] for units in (self.calibration, self.held_out))
        return self._replace(**dict(zip(("calibration", "held_out"), mine, strict=True)))

    def sums(self, rows: np.ndarray) -> np.ndarray:
        """Sums by unit, ``[U]``, of numbers for each query, ``[B, T, N]``, without padding."""
        sequences, num_key_heads, runs = self.shape
        by_key_head = rows.reshape(*rows.shape[:2], num_key_heads, -1).sum(-1)
        real = np.ones(rows.shape[:2], bool) if self.query_mask is None else self.query_mask
        # Lengths of runs differ by at most one query; with padding, runs are over real queries.
        run = np.empty(rows.shape[:2], int)
        for sequence, is_real in enumerate(real):
            starts = np.arange(runs) * is_real.sum() // runs
            run[sequence] = np.searchsorted(starts, np.cumsum(is_real) - 1, side="right") - 1
        in_run = (run[:, :, None] == np.arange(runs)) & real[:, :, None]
        sums = np.einsum("btk,btr->bkr", np.where(real[:, :, None], by_key_head, 0), in_run)
        return (sums.sum(0) if sequences == 1 else sums).ravel()


def split_units(
    shape: Sequence[int], num_key_heads: int, held_out: float, seed: int, query_mask: np.ndarray | None = None
) -> Split:
    """Split queries ``[B, T, N, D]`` into calibration and held-out units.

    With at least 8 key heads, a unit is a key head in all sequences; with fewer, but at least 8 over all sequences, a
    key head in one sequence; else a run of queries of one key head.

    Args:
        shape: shape of the queries.
        num_key_heads: the number of key heads.
        held_out: the share of held-out units.
        seed: seed of the random split.
        query_mask: mask of real queries ``[B, T]``; all by default.

    Returns:
        The `Split`.

    Raises:
        InputError: the share is not between 0 and 1, or there are too few queries for four units.
    """
    num_batches = shape[0]
    num_queries = shape[1] if query_mask is None else int(query_mask.sum(1).min())
    if num_key_heads >= LEAST_HEADS:
        by, sizes = "heads", (1, num_key_heads, 1)
    elif num_batches * num_key_heads >= LEAST_HEADS:
        by, sizes = "heads of sequences", (num_batches, num_key_heads, 1)
    else:
        by, sizes = "runs of queries", (num_batches, num_key_heads, min(RUNS_OF_QUERIES, num_queries))
    sequence, head = (index.ravel() for index in np.indices(sizes)[:2])
    groups = sequence if sizes[2] == 1 else sequence * num_key_heads + head
    if len(groups) < 4:
        padded = "" if query_mask is None else f" with {num_queries} real queries in the shortest sequence"
        raise InputError(f"a plan needs at least 4 queries to hold some out, got {list(shape)} as [B, T, N, D]{padded}")
    return _divided(by, sizes, groups, held_out, seed, query_mask)


def split_within_heads(
    shape: Sequence[int], num_key_heads: int, held_out: float, seed: int, query_mask: np.ndarray | None = None
) -> Split:
    """Split the queries of every key head into calibration and held-out units, for a choice per head.

    Units are sequences, if there are at least 8, or else runs of queries of each sequence.

    Args:
        shape: shape of the queries, ``[B, T, N, D]``.
        num_key_heads: the number of key heads.
        held_out: the share of held-out units.
        seed: seed of the random split.
        query_mask: mask of real queries ``[B, T]``; all by default.

    Returns:
        The `Split`, whose groups are the key heads.

    Raises:
        InputError: a head would have fewer than two calibration units or no held-out unit.
    """
    num_queries = shape[1] if query_mask is None else int(query_mask.sum(1).min())
    runs = 1 if shape[0] >= LEAST_HEADS else min(-(-RUNS_OF_QUERIES // shape[0]), num_queries)
    sizes = (shape[0], num_key_heads, runs)
    head = np.indices(sizes)[1].ravel()
    split = _divided("sequences" if runs == 1 else "runs of queries", sizes, head, held_out, seed, query_mask)
    for units, least in ((split.calibration, 2), (split.held_out, 1)):
        if np.bincount(head[units], minlength=num_key_heads).min() < least:
            raise InputError(
                f"a head has {shape[0] * runs} {split.by}, of which held_out = {held_out} leaves fewer than two to "
                f"measure or none to check; the shortest sequence has {num_queries} real queries"
            )
    return split


def _divided(
    by: str,
    sizes: tuple[int, int, int],
    groups: np.ndarray,
    held_out: float,
    seed: int,
    query_mask: np.ndarray | None,
) -> Split:
    """A random split in which each group contributes its share."""
    if not 0 < held_out < 1:
        raise InputError(f"held_out must be a share between 0 and 1, got {held_out}")
    random = np.random.default_rng(seed)
    order = random.permutation(len(groups))
    # Each stratum contributes its share up to one unit: its units are spread evenly over the order, from a random
    # start.
    rank = np.zeros(len(groups))
    for group in np.unique(groups):
        members = order[groups[order] == group]
        rank[members] = (np.arange(len(members)) + random.uniform()) / len(members)
    order = order[np.argsort(rank[order], kind="stable")]
    # At least two units are measured, because one has no spread.
    num_held = int(np.clip(round(held_out * len(groups)), 1, len(groups) - 2))
    kept, given = order[:-num_held], order[-num_held:]
    return Split(by, sizes, groups, np.sort(kept), np.sort(given), query_mask)


class UnitErrors(NamedTuple):
    """The errors of a configuration by unit.

    Attributes:
        error: squared norms of the error ``[seeds, U]``.
        exact: squared norms of the exact output ``[U]``.
    """

    error: np.ndarray
    exact: np.ndarray

    def relative(self, units: np.ndarray) -> float:
        """The relative error of these units together, mean over seeds, as `compare` reports it for all.

        NaN outputs make it infinite.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            error = float(np.mean(np.sqrt(self.error[:, units].sum(1) / self.exact[units].sum())))
        return math.inf if math.isnan(error) else error

    def worst(self, units: np.ndarray) -> float:
        """The largest relative error of one of these units, mean over seeds."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(np.mean(np.max(np.sqrt(self.error[:, units] / self.exact[units]), axis=1)))

    def bound(self, split: Split, confidence: float) -> float:
        """An upper confidence bound of the relative error of the held-out units.

        It is a Student interval for the log of the error. The variance over units is estimated by the jackknife, within
        strata if each has three units, and counted for the measured and for the unseen units. The variance over seeds
        is that of one more seed. Degrees of freedom of the sum are Satterthwaite's.

        Args:
            split: the measured and the held-out units.
            confidence: the one-sided confidence, in (0, 1).

        Returns:
            The bound; the error itself if it is 0 or infinite.
        """
        units, groups = split.calibration, split.groups[split.calibration]
        if self.relative(units) in (0, math.inf):
            return self.relative(units)
        whole = math.log(self.relative(units))
        without = np.log(np.clip([self.relative(units[units != unit]) for unit in units], 1e-30, LARGEST_ERROR))
        strata = [groups == group for group in np.unique(groups)]
        # Two units estimate a variance with one degree of freedom.
        if min(stratum.sum() for stratum in strata) < 3:
            strata = [np.ones(len(units), bool)]
        # The variance of the error of unseen units is that of the measured mean plus that of the unseen mean.
        to_come = 1 + len(units) / len(split.held_out)
        parts = [
            (to_come * (s.sum() - 1) / s.sum() * float(np.sum((without[s] - without[s].mean()) ** 2)), s.sum() - 1)
            for s in strata
        ]
        if len(self.error) > 1:
            # The logarithm of squared norms is twice that of norms.
            logs = np.log(np.maximum(self.error[:, units].sum(1), 1e-30)) / 2
            parts.append((float(np.var(logs, ddof=1)) * (1 + 1 / len(logs)), len(logs) - 1))
        variance = sum(part for part, _ in parts)
        # If one stratum, or the seeds, contribute most of the variance, there are few degrees of freedom.
        freedom = variance**2 / sum(part**2 / own for part, own in parts) if variance > 0 else 1.0
        # The exponential of a large number overflows.
        return math.exp(min(whole + float(stdtrit(freedom, confidence)) * math.sqrt(variance), math.log(LARGEST_ERROR)))
