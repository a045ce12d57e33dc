"""Generated tasks: recall, copying, composition of functions, and matching pairs and triples of bits."""

import numpy as np

from experiments.config import ConfigError, Count
from experiments.data.dataset import Batch, Dataset, generated


def segments(pairs: Count = 16, width: Count = 4, values: Count = 16, spellings: Count = 4) -> Dataset:
    """Recall of pairs of a key and a value, each told by a segment of ``width`` neighbours that say the same.

    Every token of a segment is one of the ``spellings`` of its pair, at random; after all segments the keys are asked
    for in random order, with their values as targets. The lengths of segments are random, from half of the width to
    twice the width with this mean, and fillers before and after them move where they begin, so that no chunk is a
    segment by luck.
    """
    shortest, longest = max(1, width // 2), 2 * width
    fillers = 2 * width
    first_query = 1 + pairs * values * spellings

    def draw(random: np.random.Generator, batch: int) -> Batch:
        tokens = np.zeros((batch, fillers + pairs * width + pairs), np.int32)
        targets = np.full(tokens.shape, -1, np.int32)
        for i in range(batch):
            lengths = np.full(pairs, shortest)
            for _ in range(pairs * (width - shortest)):
                lengths[random.choice(np.flatnonzero(lengths < longest))] += 1
            keys, told = random.permutation(pairs), random.integers(0, values, pairs)
            pair = np.repeat(keys * values + told, lengths)
            start = random.integers(0, fillers + 1)
            tokens[i, start : start + len(pair)] = 1 + pair * spellings + random.integers(0, spellings, len(pair))
            order = random.permutation(pairs)
            tokens[i, -pairs:], targets[i, -pairs:] = first_query + keys[order], told[order]
        return {"tokens": tokens, "targets": targets}

    vocabulary = first_query + pairs
    return Dataset("sequence", generated(draw), num_classes=values, vocabulary=vocabulary, is_causal=False)


def copying(length: Count = 64, vocabulary: Count = 16) -> Dataset:
    """Random tokens, a separator, and the same tokens again, which must be told one after the other."""
    if length < 2 or vocabulary < 2:
        raise ConfigError(f"data 'copying' needs length >= 2 and vocabulary >= 2, got {length} and {vocabulary}")

    def draw(random: np.random.Generator, batch: int) -> Batch:
        word = random.integers(1, vocabulary, (batch, length)).astype(np.int32)
        line = np.concatenate([word, np.zeros((batch, 1), np.int32), word], 1)
        targets = line[:, 1:].copy()
        targets[:, :length] = -1
        return {"tokens": line[:, :-1], "targets": targets}

    return Dataset("sequence", generated(draw), num_classes=vocabulary, vocabulary=vocabulary, is_causal=True)


def match_xor(order: Count = 3, length: Count = 8, bits: Count = 5) -> Dataset:
    """Matching by bits, which a multilinear form of signs sees: order 3 asks for triples, order 2 for pairs.

    Do some two other tokens have this one as their exclusive or; does some other token have the opposite of all of this
    one's bits? About half of the triples' answers are yes for 2^bits of 0.72 length^2.
    """
    if order not in (2, 3) or length < order or not 1 <= bits <= 30:
        raise ConfigError(
            f"data 'match_xor' needs order 2 or 3, length >= order and 1 to 30 bits, got {order}, {length} and {bits}"
        )

    def draw(random: np.random.Generator, batch: int) -> Batch:
        tokens = random.integers(0, 2**bits, (batch, length)).astype(np.int32)
        sums = tokens[:, :, None] ^ tokens[:, None, :]
        if order == 2:
            return {"tokens": tokens, "targets": (sums == 2**bits - 1).any(-1).astype(np.int32)}
        apart = ~np.eye(length, dtype=bool)
        distinct = apart[:, :, None] & apart[:, None, :] & apart[None, :, :]
        found = (sums[:, :, :, None] == tokens[:, None, None, :]) & distinct
        return {"tokens": tokens, "targets": found.any((2, 3)).astype(np.int32)}

    return Dataset("sequence", generated(draw), num_classes=2, vocabulary=2**bits)


def composition(bits: Count = 4) -> Dataset:
    """Composition of functions (Peng et al. 2024): the pairs (x, f(x)) and (y, g(y)) of two permutations, then each x.

    Asked for is g(f(x)), one of 2^bits values. A token has the bits of its first and of its second argument, which a
    query lacks, and two that say what it is. As g is a permutation, every value is as likely given f alone.
    """
    if not 1 <= bits <= 14:
        raise ConfigError(f"data 'composition' needs 1 to 14 bits, got {bits}")
    size = 2**bits
    kinds = np.repeat([1, 2, 3], size) << 2 * bits

    def draw(random: np.random.Generator, batch: int) -> Batch:
        f, g = random.permuted(np.tile(np.arange(size), (2, batch, 1)), axis=-1)
        x = np.tile(np.arange(size), (batch, 1))
        tokens = kinds + np.concatenate([x, x, x], 1) + (np.concatenate([f, g, 0 * x], 1) << bits)
        targets = np.full((batch, 3 * size), -1, np.int32)
        targets[:, 2 * size :] = np.take_along_axis(g, f, 1)
        return {"tokens": tokens.astype(np.int32), "targets": targets}

    oracles = {"a value at random": 1 / size}
    return Dataset("sequence", generated(draw), num_classes=size, vocabulary=4 * size**2, oracles=oracles)
