"""A configuration for each key head of each layer, within a budget of bytes or of time."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from approx_attention.core import InputError
from approx_attention.evaluation.knapsack import choose

# Largest number of attempts with a smaller budget, if a choice takes more time than allowed.
_MOST_CHOICES = 5
# A layer, and the number of one of its key heads.
Head = tuple[str, int]


class Option(NamedTuple):
    """A configuration for heads.

    Attributes:
        cost: the total cost of the heads, such as cache bytes.
        loss: their total loss.
        label: the name of the configuration.
        meets: whether every head meets the tolerance.
    """

    cost: int
    loss: float
    label: str
    meets: bool


class Item(NamedTuple):
    """Heads that must have the same configuration.

    Attributes:
        heads: the heads, as pairs of the layer and the number of the key head.
        options: the configurations to choose from.
    """

    heads: Sequence[Head]
    options: Sequence[Option]


class Choice(NamedTuple):
    """The configuration of each head.

    Attributes:
        misses: whether any head misses the tolerance.
        loss: the total loss.
        cost: the total cost.
        labels: the label of the configuration by head.
    """

    misses: bool
    loss: float
    cost: int
    labels: dict[Head, str]

    @classmethod
    def of(cls, items: Sequence[Item], options: Sequence[Option]) -> "Choice":
        """Make a choice from one option for each item."""
        return cls(
            misses=not all(one.meets for one in options),
            loss=sum(one.loss for one in options),
            cost=sum(one.cost for one in options),
            labels={head: one.label for item, one in zip(items, options, strict=True) for head in item.heads},
        )


def best_choice(items: Sequence[Item], budget: int | None) -> Choice | None:
    """The choice with the smallest loss within a budget, within the tolerance if possible; None if nothing fits.

    Args:
        items: each needs an option that meets the tolerance, such as exact attention.
        budget: upper bound of the total cost; None for the cheapest options that meet the tolerance.
    """
    meeting = [[option for option in item.options if option.meets] for item in items]
    if budget is None:
        return Choice.of(items, [min(options) for options in meeting])
    for options in (meeting, [item.options for item in items]):
        picks = choose([[o.cost for o in own] for own in options], [[o.loss for o in own] for own in options], budget)
        if picks is not None:
            return Choice.of(items, [own[pick] for own, pick in zip(options, picks, strict=True)])
    # `choose` rounds costs up, and may find no choice although the cheapest options fit.
    cheapest = Choice.of(items, [min(item.options) for item in items])
    return cheapest if cheapest.cost <= budget else None


def fast_choice(
    items: Sequence[Item], everyone: Item, budget: int, time_of: Callable[[Choice], int]
) -> tuple[Choice, int]:
    """The best choice whose measured time for all heads is within a budget, and that time.

    The time may exceed the sum of the costs, because heads of several methods run as several programs. The budget of
    the costs is therefore reduced until the choice is fast enough. The result is compared with the best single
    configuration for all heads, whose time equals its cost.

    Args:
        items: heads with their options; costs are shares of times, in nanoseconds.
        everyone: all heads, with the options that are available to all.
        budget: the largest time in nanoseconds.
        time_of: measures a choice, in nanoseconds.

    Raises:
        InputError: no choice is fast enough.
    """
    found, least, allowance = None, sum(min(item.options).cost for item in items), budget
    for _ in range(_MOST_CHOICES):
        choice = best_choice(items, allowance)
        if choice is None:
            break
        least = time_of(choice)
        if least <= budget:
            found = choice, least
            break
        allowance = min(choice.cost - 1, choice.cost * budget // least)
    for uniform in (best_choice([everyone], budget), Choice.of([everyone], [min(everyone.options)])):
        if uniform is not None and (found is None or uniform[:2] < found[0][:2]):
            time = time_of(uniform)
            least = min(least, time)
            if time <= budget:
                found = uniform, time
    if found is None:
        raise InputError(
            f"the fastest choices of all heads take {least / 1e9:.3g} s in total, but max_seconds is {budget / 1e9:.3g}"
        )
    return found
