"""Pareto fronts of plans: searched once, saved in a directory, and usable for any budget."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from assign.errors import BudgetError, PlanError
from assign.memory.estimate import peak_bytes, peak_of
from assign.notebook import Drawn, frame, human_bytes, table_html
from assign.options import accept_former
from assign.plan.measured import Measured
from assign.plan.plan import Assignment
from assign.plan.quality import pareto_front
from assign.plan.space import SearchSpace
from assign.plan.table import TensorTable
from assign.planner import Request, find_plan, measure
from assign.strategies import get_method
from assign.strategies.goal import Goal, parse_budget
from assign.tracing.step import Step


@dataclass(frozen=True, slots=True)
class Front(Drawn):
    """Pareto front of plans for one model, the lowest peak first."""

    plans: tuple[Assignment, ...]

    def save(self, directory: str | os.PathLike[str]) -> list[Path]:
        """Write every plan into ``directory``, which is created; ``plan-01.json`` has the lowest peak.

        All plans are written before they get their names, so a process that is killed meanwhile leaves no partial
        front.

        Raises:
            PlanError: the directory is not empty, or a file cannot be written.
        """
        check_empty(directory)
        target = Path(os.path.realpath(directory))
        digits = max(2, len(str(len(self.plans))))
        names = [f"plan-{number:0{digits}}.json" for number in range(1, len(self.plans) + 1)]
        try:
            target.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".assign-", suffix=".tmp", dir=target) as temporary:
                for name, plan in zip(names, self.plans, strict=True):
                    plan.save(Path(temporary) / name)
                for name in names:
                    os.replace(Path(temporary) / name, target / name)
        except OSError as error:
            raise PlanError(
                f"cannot make the directory {directory}: {error.strerror or error}. Give one that you may write to."
            ) from error
        return [Path(directory) / name for name in names]

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> "Front":
        """Return the front of all plans in ``directory``, which :meth:`save` or a search by training wrote.

        Raises:
            PlanError: there is no plan, one cannot be read, or they are for different models.
        """
        found = {path: Assignment.load(path) for path in sorted(Path(directory).glob("*.json"))}
        if not found:
            raise PlanError(
                f"there are no plans in {directory}. Give a directory of 'assign search TASK --pareto N -o DIR'."
            )
        first, plan = next(iter(found.items()))
        for path, other in found.items():
            if other.fingerprint != plan.fingerprint:
                raise PlanError(
                    f"{first} and {path} are plans for different models: fingerprints {plan.fingerprint} and "
                    f"{other.fingerprint}.\n  Keep the fronts of different models in directories of their own."
                )
        return cls(tuple(sorted(found.values(), key=_peak)))

    def to_pandas(self) -> Any:
        """Return a data frame with one row per plan: the estimate in its file. Needs pandas."""
        return frame(dict(plan.provenance.estimate) for plan in self.plans)

    def _repr_html_(self) -> str:
        """Return the peak and cost of each plan as an HTML table, for a notebook."""
        most = max(map(_peak, self.plans), default=1) or 1
        rows = [
            ((f"{number}", human_bytes(_peak(plan)), _cost_in_words(plan)), _peak(plan) / most)
            for number, plan in enumerate(self.plans, 1)
        ]
        return table_html(f"front of {len(rows)} plans", ["plan", "peak", "noise or low ratio"], rows)

    def pick(self, table: TensorTable, budget: str | int) -> Assignment | None:
        """Return the best plan whose step fits the budget, for a table of any batch size; None if no plan fits.

        Args:
            table: of the plans' model.
            budget: as in :func:`assign.search`.
        Raises:
            PlanError: the plans are for another model.
            BudgetError: the budget is not valid.
        """
        limit = parse_budget(budget, peak_bytes(table, {}))
        for plan in reversed(self.plans):
            plan.check_fits(table, where="the front")
            if peak_of(table, plan) <= limit:
                return plan
        return None


@accept_former(space=SearchSpace, measured=Measured)
def search_front(
    table: TensorTable,
    plans: int,
    *,
    strategy: str = "greedy",
    max_step_time: str | float | None = None,
    space: SearchSpace | str = "native",
    measured: Measured | None = None,
    seed: int = 0,
    command: str = "",
) -> Front:
    """Search plans between the lowest peak that a strategy reaches and the peak without narrowing.

    The budgets are equally spaced. A plan is dropped if another has no higher peak and is at least as good: less
    predicted noise is better or, if noise was not measured, a smaller low ratio.

    Args:
        table: result of :func:`assign.trace`, or a table. If ``measured`` is not given, a traced step is measured for
            the strategy; a table has no model to measure.
        plans: number of searches, 2 or more; the front may have fewer plans.
        strategy: as in :func:`assign.search`.
        max_step_time: as in :func:`assign.search`.
        space: as in :func:`assign.search`.
        measured: measurements of the model.
        seed: of strategies that draw random numbers.
        command: the command that plans record in their provenance.
    Returns:
        The plans, the lowest peak first.
    Raises:
        BudgetError: fewer than two plans, or a strategy without a goal.
        AssignError: as for :func:`assign.search`.
    Examples:
        ```python
        front = assign.search_front(assign.trace(model, batch, loss), 4)
        front.save("plans")
        plan = front.pick(table, "95%")
        ```
    """
    request = Request(
        goal=Goal(max_step_time=max_step_time),
        strategy=strategy,
        space=SearchSpace.of(space),
        seed=seed,
        command=command,
    )
    if measured is None:
        measured = measure(table, request) if isinstance(table, Step) else Measured()
    return find_front(table, plans, request, measured)


def find_front(table: TensorTable, plans: int, request: Request, measured: Measured) -> Front:
    """Return the front for a request without a budget and without a low ratio; see :func:`search_front`."""
    if plans < 2:
        raise BudgetError(f"search: a front cannot have {plans} plans; give 2 or more.")
    if request.goal.budget is not None or request.goal.low_ratio is not None:
        raise BudgetError("search: a front covers all budgets. Leave out the budget and the low ratio.")
    if "budget" not in get_method(request.strategy).goals:
        raise BudgetError(f"search: the strategy {request.strategy!r} makes one plan. Use 'milp' or 'greedy'.")

    def find(**limits: Any) -> Assignment:
        return find_plan(table, replace(request, goal=replace(request.goal, **limits)), measured)

    widest = find(low_ratio=0.0)
    top, floor = _peak(widest), _floor(find)
    steps = [floor + (top - floor) * number // (plans - 1) for number in range(plans - 1)]
    return Front(tuple(pareto_front([*(find(budget=budget) for budget in steps), widest], _peak, _cost)))


def check_empty(directory: str | os.PathLike[str]) -> None:
    """Check, before the search, that a front can be written into ``directory``.

    Raises:
        PlanError: it is a file, or not empty.
    """
    target = Path(directory)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        what = "already contains files" if target.is_dir() else "is a file"
        raise PlanError(f"{target} {what}; a front is written into a new directory. Give another one, e.g. -o plans.")


def _floor(find: Callable[..., Assignment]) -> int:
    """Return the lowest peak that the strategy reaches, from the error for a budget that no plan meets."""
    try:
        find(budget=1)
    except BudgetError as error:
        if error.floor is None:
            raise
        return error.floor
    raise AssertionError("a step in one byte")


def _cost(plan: Assignment) -> float:
    estimate = plan.provenance.estimate
    return float(str(estimate["noise" if "noise" in estimate else "low_ratio"]))


def _cost_in_words(plan: Assignment) -> str:
    """Return the cost of a plan as text; '' if its file has none."""
    return f"{_cost(plan):.3g}" if {"noise", "low_ratio"} & plan.provenance.estimate.keys() else ""


def _peak(plan: Assignment) -> int:
    return int(str(plan.provenance.estimate.get("peak_bytes", 0)))
