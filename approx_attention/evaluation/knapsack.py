"""The multiple-choice knapsack problem: one option per item with the least total loss within a budget."""

import math
from collections.abc import Sequence

import numpy as np

# Larger budgets are divided into this number of equal cells, to which costs are rounded up.
CELLS = 2**14


def choose(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int] | None:
    r"""Choose an option for each item with the least total loss within a budget, by dynamic programming.

    .. math:: L_i(c) = \min_o \; L_{i-1}(c - \mathrm{cost}_{io}) + \mathrm{loss}_{io}

    The choice is optimal if the budget is at most `CELLS` times the greatest common divisor of the costs. Else costs
    are rounded up to whole cells of the budget: the budget is never exceeded, and the loss is at most the optimum for
    ``budget * (1 - len(costs) / CELLS)``. Among choices with equal loss it is one of the cheapest.

    Args:
        costs: the cost of each option of each item, at least 0.
        losses: the loss of each option of each item.
        budget: the largest total cost.

    Returns:
        The index of an option for each item; None if nothing fits.

    Example:
        >>> choose([[1, 4], [1, 4]], [[1.0, 0.5], [3.0, 0.0]], budget=5)
        [0, 1]
    """
    unit = math.gcd(*(cost for own in costs for cost in own)) or 1
    units = budget // unit
    cells, coarse = min(units, CELLS), max(units, CELLS)
    # Rounded up, if a cell is more than one unit.
    steps = [[-(-cost // unit * CELLS // coarse) for cost in own] for own in costs]
    least, picks = np.zeros(cells + 1), []
    for own, lost in zip(steps, losses, strict=True):
        total, pick = np.full(cells + 1, np.inf), np.full(cells + 1, -1, np.int32)
        # Among equal losses the cheaper one is kept.
        for option in sorted(range(len(own)), key=own.__getitem__):
            step = own[option]
            if step > cells:
                break
            with_it = least[: cells + 1 - step] + lost[option]
            better = with_it < total[step:]
            total[step:][better], pick[step:][better] = with_it[better], option
        least = total
        picks.append(pick)
    if not np.isfinite(least[-1]):
        return None
    cell, chosen = int(np.argmax(least == least[-1])), []
    for own, pick in zip(reversed(steps), reversed(picks), strict=True):
        chosen.append(int(pick[cell]))
        cell -= own[chosen[-1]]
    return chosen[::-1]
