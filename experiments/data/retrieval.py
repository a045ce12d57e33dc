"""Generated questions about a context, in the style of RULER (Hsieh et al. 2024): needles, pairs, chains of variables.

A context is a row of slots of two tokens: a statement (a name and its source), or noise. The source of a name is a
value, or a name that was stated before it. After the context come questions of three tokens: a mark, a name, and the
value to which its chain of statements leads, which is asked for at the name. Of the last names of chains a new one is
asked for each time, as long as there are any: a cache that was compressed after a question meets others.
"""

import dataclasses

import numpy as np

from experiments.config import ConfigError, Count
from experiments.data.dataset import Batch, Dataset, generated

# Tokens of a question, and its mark.
QUESTION, MARK = 3, 0


@dataclasses.dataclass(frozen=True)
class Task:
    """How many chains of statements a context has, and how many statements each."""

    chains: int
    hops: int


def tasks(length: int, needles: int, chains: int, hops: int) -> dict[str, Task]:
    """The tasks by name: one needle and several in noise, pairs without noise, and chains of variables in noise."""
    return {
        "needle": Task(1, 1),
        "needles": Task(needles, 1),
        "key_value": Task(length // 2, 1),
        "variables": Task(chains, hops),
    }


def retrieval(
    task: str = "suite",
    length: Count = 128,
    questions: Count = 2,
    names: Count = 64,
    values: Count = 32,
    noise: Count = 16,
    needles: Count = 8,
    chains: Count = 4,
    hops: Count = 2,
) -> Dataset:
    """Contexts of ``length`` tokens with questions, of one of the `tasks`, or of each in turn (``"suite"``)."""
    known = tasks(length, needles, chains, hops)
    if task != "suite" and task not in known:
        raise ConfigError(f"data 'retrieval': 'task' must be suite, {', '.join(known)}, got {task!r}")
    chosen = list(known.values()) if task == "suite" else [known[task]]
    most = max(one.chains * one.hops for one in chosen)
    if length % 2 or most > min(length // 2, names):
        raise ConfigError(
            f"data 'retrieval' states {most} names: it needs an even length of at least {2 * most} and as many names, "
            f"got {length} and {names}"
        )

    def draw(random: np.random.Generator, batch: int) -> Batch:
        drawn = [_sequence(random, chosen[i % len(chosen)]) for i in range(batch)]
        tokens = np.stack(drawn).astype(np.int32)
        targets = np.full_like(tokens, -1)
        targets[:, length + 1 :: QUESTION] = tokens[:, length + 2 :: QUESTION]
        return {"tokens": tokens, "targets": targets}

    def _sequence(random: np.random.Generator, task: Task) -> np.ndarray:
        stated = task.chains * task.hops
        context = 1 + random.integers(0, noise, (length // 2, 2))
        name = (1 + noise + random.permutation(names)[:stated]).reshape(task.chains, task.hops)
        answer = 1 + noise + names + random.integers(0, values, task.chains)
        # A chain's statements stand in its order, among those of other chains.
        slot = np.sort(random.permutation(length // 2)[:stated].reshape(task.chains, task.hops), axis=1)
        context[slot] = np.stack([name, np.concatenate([answer[:, None], name[:, :-1]], axis=1)], axis=-1)
        # Rounds of all chains, each in another order: else an answer would stand where the last round had it.
        rounds = [random.permutation(task.chains) for _ in range(-(-questions // task.chains))]
        asked = np.concatenate(rounds)[:questions]
        question = np.stack([np.full(questions, MARK), name[asked, -1], answer[asked]], axis=1)
        return np.concatenate([context.ravel(), question.ravel()])

    size = 1 + noise + names + values
    return Dataset(
        "sequence",
        generated(draw),
        num_classes=size,
        vocabulary=size,
        is_causal=True,
        oracles={"a value at random": 1 / values},
        context=length,
    )
