"""Greedy demotion: groups go from high to low, one after another, until the goals are met.

Source: arXiv 2301.13464, Algorithm 1.
"""

import random
from collections.abc import Sequence
from enum import StrEnum

from assign.plan.plan import Entry
from assign.plan.recipes import Recipe, initial
from assign.plan.table import Group, TensorTable
from assign.strategies.goal import Goal, PeakBytes, over_budget


class Order(StrEnum):
    """Which group is demoted first. Of two groups with the same size it is the one with the lower id.

    The paper demotes the largest first.
    """

    LARGEST = "largest"
    SMALLEST = "smallest"
    RANDOM = "random"


def greedy(
    table: TensorTable,
    *,
    recipe: Recipe,
    peak_bytes: PeakBytes,
    low_ratio: float | None = None,
    budget_bytes: int | None = None,
    seed: int = 0,
    order: Order = Order.LARGEST,
    trim: bool = True,
) -> dict[str, Entry]:
    """Demote groups in ``order`` until both goals are met, and return the entries.

    Goals are tested before each demotion, as in the paper: the last group overshoots the low ratio, and a ratio of 0
    demotes nothing. A group is demoted in its turn even if this does not lower the peak, because the peak may depend on
    tensors of several groups.

    Under a budget some groups may therefore be demoted in vain. With ``trim``, the groups that were demoted after the
    low ratio was reached are tried high again, the last one first, and stay high if the budget allows it: fewer low
    groups train better. Groups that the low ratio requires stay low, so without a budget the result is the paper's.

    Args:
        table: of the model.
        recipe: gives each tensor its high and its low format.
        peak_bytes: called only under a budget, at most twice per group.
        low_ratio: share of the elements that must be low, 0 to 1.
        budget_bytes: the highest peak memory that is allowed.
        seed: of the random order; the others need none.
        order: which group comes first: the largest, the smallest, or a random one.
        trim: whether groups that were demoted for the budget are tried high again.
    Raises:
        BudgetError: a goal is invalid, or the budget is below the peak with all groups low.
    """
    goal = Goal(low_ratio=low_ratio, budget=budget_bytes).required()
    ordered = demotion_order(table.groups, order, seed)
    keys = {group.id: group.keys for group in table.groups}
    high, all_low = initial(table, recipe), initial(table, recipe, keys.keys())

    def build(low: Sequence[int]) -> dict[str, Entry]:
        return high | {key: all_low[key] for group in low for key in keys[group]}

    low = _prefix_for_ratio(ordered, goal)
    if goal.budget_bytes is None:
        return build(low)
    fixed, peaks = len(low), [peak_bytes(build(low))]
    while not goal.within_budget(peaks[-1]) and len(low) < len(ordered):
        low.append(ordered[len(low)].id)
        peaks.append(peak_bytes(build(low)))
    if not goal.within_budget(peaks[-1]):
        raise over_budget(goal, min(peaks), f"even with all {len(ordered)} groups of tensors low")
    for group in (
        reversed(low[fixed:-1]) if trim else ()
    ):  # the last one is needed: without it the peak was above the budget
        without = [other for other in low if other != group]
        if goal.within_budget(peak_bytes(build(without))):
            low = without
    return build(low)


def demotion_order(groups: Sequence[Group], order: Order, seed: int) -> list[Group]:
    """Return the groups in the order of their demotion; the same for the same seed, on every machine."""
    ordered = sorted(groups, key=lambda group: group.id)
    match Order(order):
        case Order.LARGEST:
            ordered.sort(key=lambda group: -group.elements)
        case Order.SMALLEST:
            ordered.sort(key=lambda group: group.elements)
        case Order.RANDOM:
            random.Random(seed).shuffle(ordered)
    return ordered


def _prefix_for_ratio(ordered: Sequence[Group], goal: Goal) -> list[int]:
    elements, low_elements = sum(group.elements for group in ordered), 0
    low: list[int] = []
    for group in ordered:
        if goal.enough_low(low_elements, elements):
            break
        low.append(group.id)
        low_elements += group.elements
    return low
