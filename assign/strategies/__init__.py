"""Searches: (table, recipe, goals) → the format of every tensor.

A strategy is a function. To add one, add a file here and a row to ``METHODS``; ``tests/contracts.py`` tests it. A
strategy gets the memory model as an argument, and does not use the executor or torch. A strategy that needs more of a
model than its table, as :class:`assign.strategies.milp.Milp` needs noise, is made with that first.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from functools import partial
from types import MappingProxyType
from typing import Protocol

from assign.errors import AssignError, BudgetError, suggest
from assign.plan.plan import Entry
from assign.plan.recipes import Recipe
from assign.plan.space import SearchSpace
from assign.plan.table import TensorTable
from assign.strategies.baselines import as_loaded, operator_based, standalone, uniform, uniform_in
from assign.strategies.goal import Goal, PeakBytes
from assign.strategies.greedy import Order, greedy
from assign.strategies.milp import milp_of
from assign.strategies.request import Question

MILP, OPTUNA = "milp", "optuna"
"""Names of the strategy that minimizes noise, and of the one that trains."""


class Strategy(Protocol):
    """A search.

    It returns one entry for every tensor in the paper's four roles, chosen from the recipe's candidates, such that at
    least ``low_ratio`` of the elements are low and ``peak_bytes`` of the entries is at most ``budget_bytes``. It
    returns the same entries for the same seed. If there is no such plan, it raises a BudgetError that names the lowest
    peak it found.
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
        """Return the entries of a plan that meets the goals.

        Args:
            table: of the model.
            recipe: gives each tensor its high and its low format.
            peak_bytes: the memory model: peak memory of a step under some entries, in bytes.
            low_ratio: share of the elements that must be low, 0 to 1.
            budget_bytes: the highest peak memory that is allowed.
            seed: of a search that draws random numbers; others ignore it.
        Returns:
            Entries of the paper's tensors by key.
        Raises:
            BudgetError: no plan meets the goals.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """Facts about a strategy, and how it is run.

    Attributes:
        search: search that needs only a table, a recipe and the memory model.
        make: question → search for this model, if it needs more; used instead of ``search``.
        baseline: function of the table and the recipe that returns a plan without a search.
        goals: limits that it takes, by their names in :func:`assign.search`.
        options: fields of :class:`assign.SearchSpace` that it takes, besides those that every strategy takes.
        needs_noise: whether it requires a noise table.
        trains: whether it trains the model of a task; :func:`assign.tune` then runs it.
    """

    search: Strategy | None = None
    make: Callable[[Question], Strategy] | None = None
    baseline: Callable[[TensorTable, Recipe], dict[str, Entry]] | None = None
    goals: Collection[str] = ()
    options: Collection[str] = ()
    needs_noise: bool = False
    trains: bool = False

    def run(self, question: Question) -> dict[str, Entry]:
        """Return an entry for every tensor of the step."""
        rules = question.space.rules
        if self.baseline is not None:
            return self.baseline(question.table, rules)
        search = self.make(question) if self.make is not None else self.search
        assert search is not None
        return search(
            question.table,
            recipe=rules,
            peak_bytes=question.peak_bytes,
            low_ratio=question.goal.low_ratio,
            budget_bytes=question.goal.budget_bytes,
            seed=question.seed,
        )


def _uniform(question: Question) -> Strategy:
    """Return the strategy ``uniform``, with the given format instead of the recipe's if there is one.

    Raises:
        BudgetError: several formats, or one format and a goal.
    """
    names = question.space.formats
    if not names:
        return uniform
    if len(names) > 1 or question.goal != Goal():
        raise BudgetError(
            f"search: the strategy 'uniform' with the format {', '.join(names)!r} puts every tensor in one format, so "
            "there is nothing left to search.\n  Allowed: one format and no goal, or a goal and no format.\n"
            "  Leave out the budget and the low ratio."
        )
    return lambda table, **_: uniform_in(table, names[0])


_MEMORY = ("budget", "low_ratio")

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "greedy": Method(search=greedy, goals=_MEMORY),
        "greedy-smallest": Method(search=partial(greedy, order=Order.SMALLEST), goals=_MEMORY),
        "greedy-random": Method(search=partial(greedy, order=Order.RANDOM), goals=_MEMORY),
        "uniform": Method(search=uniform, make=_uniform, goals=_MEMORY, options=("formats",)),
        "as-loaded": Method(baseline=as_loaded),
        "operator": Method(baseline=operator_based),
        "operator-prime": Method(baseline=partial(operator_based, gradients_follow=True)),
        "standalone": Method(baseline=standalone),
        MILP: Method(
            make=milp_of,
            goals=(*_MEMORY, "max_step_time"),
            options=("formats", "pins", "granularity", "saved"),
            needs_noise=True,
        ),
        OPTUNA: Method(goals=("budget",), trains=True),
    }
)
"""Every strategy by the name that ``--strategy`` takes."""

STRATEGIES: Mapping[str, Strategy] = MappingProxyType(
    {name: method.search for name, method in METHODS.items() if method.search is not None}
)
"""Every search that needs only a table, a recipe and a goal, by its name in ``METHODS``."""

BASELINES = tuple(name for name, method in METHODS.items() if method.baseline is not None)
"""Names of the strategies that follow from the model alone and take no goal."""

_OPTIONAL = frozenset(name for method in METHODS.values() for name in method.options)
"""Fields of a space that only some strategies take."""


def get_method(name: str) -> Method:
    """Return the strategy called ``name``.

    Raises:
        AssignError: there is no such strategy.
    """
    if name not in METHODS:
        close = suggest(name, METHODS)
        raise AssignError(
            f"there is no strategy {name!r}; choose from {', '.join(sorted(METHODS))}"
            + (f". Did you mean {close}?" if close else ".")
        )
    return METHODS[name]


def check_request(strategy: str, goal: Goal, space: SearchSpace) -> None:
    """Check that a strategy takes every limit and option of a request, by its row of ``METHODS``.

    Raises:
        AssignError: there is no such strategy.
        BudgetError: names what it does not take, and the strategies that do.
    """
    method = get_method(strategy)
    refused = [name for name in _given(goal) if name not in method.goals]
    refused += [name for name in _given(space) if name in _OPTIONAL and name not in method.options]
    if "saved" in refused and len(space.saved) < 2:  # every strategy takes one format for saved activations
        refused.remove("saved")
    if not refused:
        return
    takers = "".join(
        f"  {_named(name, space)} requires one of the strategies "
        f"{', '.join(other for other, row in METHODS.items() if name in (*row.goals, *row.options))}.\n"
        for name in refused
    )
    why = "follows from the model alone and " if method.baseline is not None else ""
    raise BudgetError(
        f"search: the strategy {strategy!r} {why}does not take {', '.join(_named(name, space) for name in refused)}.\n"
        f"{takers}  Leave out what it does not take, or use another strategy."
    )


def _given(options: Goal | SearchSpace) -> list[str]:
    """Return the names of the fields that do not have their default."""
    default = type(options)()
    return [each.name for each in fields(options) if getattr(options, each.name) != getattr(default, each.name)]


def _named(field: str, space: SearchSpace) -> str:
    return "more than one format for saved activations" if field == "saved" else field
