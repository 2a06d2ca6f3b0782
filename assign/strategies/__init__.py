"""Searches: (table, recipe, goals) → the format of every tensor.

A strategy is a function; a new one is a file here and a line in ``STRATEGIES``, and ``tests/contracts.py`` tests it.
Strategies get the memory model as an argument; they know neither it, nor the executor, nor torch. One that needs more
of a model than its table, as :class:`assign.strategies.milp.Milp` needs its noise, is made with that first.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Protocol

from assign.errors import AssignError, nearest
from assign.plan.assignment import Entry
from assign.plan.recipes import Recipe
from assign.plan.tensors import TensorTable
from assign.strategies.baselines import as_loaded, operator_based, standalone, uniform
from assign.strategies.goal import PeakBytes
from assign.strategies.greedy import Order, greedy


class Strategy(Protocol):
    """A search.

    It returns one entry for every tensor in the paper's four roles, chosen from the recipe's candidates, such that at
    least ``low_ratio`` of the elements are low and ``peak_bytes`` of the entries is at most ``budget_bytes``. It gives
    the same answer for the same seed, and raises BudgetError, naming the lowest peak it found, where it has none.
    """

    def __call__(
        self,
        table: TensorTable,
        *,
        recipe: Recipe,
        peak_bytes: PeakBytes,
        low_ratio: float | None = None,
        budget_bytes: int | None = None,
        seed: int = 0,
    ) -> dict[str, Entry]:
        """Search.

        Args:
            table: of the model.
            recipe: gives each tensor its high and its low format.
            peak_bytes: the memory model: peak memory of a step under some entries, in bytes.
            low_ratio: share of the elements that must be low, 0 to 1.
            budget_bytes: the highest peak memory that is allowed.
            seed: of a search that draws; the others take no notice of it.
        Returns:
            Entries of the paper's tensors by key.
        Raises:
            BudgetError: no plan reaches the goals.
        """
        ...


STRATEGIES: Mapping[str, Strategy] = MappingProxyType(
    {
        "greedy": greedy,
        "greedy-smallest": partial(greedy, order=Order.SMALLEST),
        "greedy-random": partial(greedy, order=Order.RANDOM),
        "uniform": uniform,
    }
)
"""Every search by the name that ``--strategy`` takes; ``milp`` and ``optuna`` need more than a table."""

BASELINES: Mapping[str, Callable[[TensorTable, Recipe], dict[str, Entry]]] = MappingProxyType(
    {
        "as-loaded": as_loaded,
        "operator": operator_based,
        "operator-prime": partial(operator_based, gradients_follow=True),
        "standalone": standalone,
    }
)
"""Assignments that follow from the model alone, with no goal to search for, by the same option."""


MILP = "milp"
"""What ``--strategy`` calls the one that is made for a model's noise."""


OPTUNA = "optuna"
"""What ``--strategy`` calls the search by training."""


def get_strategy(name: str) -> Strategy:
    """The strategy called ``name``.

    Raises:
        AssignError: there is none.
    """
    if name == OPTUNA:
        raise AssignError(
            "the strategy 'optuna' trains, so it needs a task, and searches on its own.\n"
            "  Allowed: 'assign search TASK --strategy optuna', or assign.tune(make_task, storage=…)."
        )
    if name not in STRATEGIES:
        known = [*STRATEGIES, *BASELINES, MILP, OPTUNA]
        close = nearest(name, known)
        raise AssignError(
            f"there is no strategy {name!r}; choose from {', '.join(sorted(known))}"
            + (f". Did you mean {close}?" if close else ".")
        )
    return STRATEGIES[name]
