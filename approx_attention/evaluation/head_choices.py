"""A configuration for each key head of each layer, within a budget of bytes or of time."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from approx_attention.core import InputError
from approx_attention.evaluation.knapsack import choose

# How often a choice is made anew for less time, where it turns out to take more than the budget.
_MOST_CHOICES = 5
# A layer, and the number of one of its key heads.
Head = tuple[str, int]


class Option(NamedTuple):
    """A configuration that heads may have: its cost and loss for all of them, and whether it meets the tolerance."""

    cost: int
    loss: float
    label: str
    meets: bool


class Item(NamedTuple):
    """Heads that share a configuration, and the options for it."""

    heads: Sequence[Head]
    options: Sequence[Option]


class Choice(NamedTuple):
    """The configuration of each head, whether one of them misses the tolerance, and the loss and cost of all."""

    misses: bool
    loss: float
    cost: int
    labels: dict[Head, str]

    @classmethod
    def of(cls, items: Sequence[Item], options: Sequence[Option]) -> "Choice":
        """The choice of an option for each item."""
        return cls(
            misses=not all(one.meets for one in options),
            loss=sum(one.loss for one in options),
            cost=sum(one.cost for one in options),
            labels={head: one.label for item, one in zip(items, options, strict=True) for head in item.heads},
        )


def best_choice(items: Sequence[Item], budget: int | None) -> Choice | None:
    """The choice of the least loss within a budget, all of it below the tolerance if that fits; None if nothing fits.

    Args:
        items: each with an option that meets the tolerance, as exact attention does.
        budget: the most that all costs together may be; None for the cheapest options that meet the tolerance.
    """
    meeting = [[option for option in item.options if option.meets] for item in items]
    if budget is None:
        return Choice.of(items, [min(options) for options in meeting])
    for options in (meeting, [item.options for item in items]):
        picks = choose([[o.cost for o in own] for own in options], [[o.loss for o in own] for own in options], budget)
        if picks is not None:
            return Choice.of(items, [own[pick] for own, pick in zip(options, picks, strict=True)])
    # Costs that are rounded up may not fit where they do.
    cheapest = Choice.of(items, [min(item.options) for item in items])
    return cheapest if cheapest.cost <= budget else None


def fast_choice(
    items: Sequence[Item], everyone: Item, budget: int, time_of: Callable[[Choice], int]
) -> tuple[Choice, int]:
    """The best choice whose time, all heads together, is within a budget, and that time.

    It may be more than its costs add up to: heads of several methods run as several programs. So less and less is
    allowed for the costs, until the choice is fast enough. It competes with one configuration for all heads, whose time
    is what its cost says.

    Args:
        items: their costs are shares of times, in nanoseconds.
        everyone: all heads, with the options that all can have.
        budget: the most nanoseconds.
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
            f"the fastest choices of all heads take {least / 1e9:.3g} s together, and max_seconds is {budget / 1e9:.3g}"
        )
    return found
