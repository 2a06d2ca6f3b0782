"""Pareto fronts of plans: searched once, saved in a directory, and usable for any budget."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assign.errors import BudgetError, PlanError
from assign.plan.assignment import Assignment
from assign.plan.display import Drawn, frame, human_bytes, table_html
from assign.plan.memory import peak_bytes
from assign.plan.tensors import TensorTable
from assign.planning import search_table
from assign.strategies import BASELINES
from assign.strategies.goal import parse_budget


@dataclass(frozen=True, slots=True)
class Front(Drawn):
    """Pareto front of plans for one model, the lowest peak first."""

    plans: tuple[Assignment, ...]

    def save(self, directory: str | os.PathLike[str]) -> list[Path]:
        """Write every plan into ``directory``, which is made: ``plan-01.json`` has the lowest peak.

        All plans are written before the first gets its name: a process that is killed leaves no part of a front.

        Raises:
            PlanError: something is in it already, or a file cannot be written.
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
        """Read every plan in ``directory``: what :meth:`save` wrote, or a search by training.

        Raises:
            PlanError: there is none, one cannot be read, or they are not all of one model.
        """
        found = {path: Assignment.load(path) for path in sorted(Path(directory).glob("*.json"))}
        if not found:
            raise PlanError(
                f"there are no plans in {directory}. Give what 'assign search TASK --pareto N -o DIR' wrote."
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
        """A frame with a row for each plan: what its file says it costs. Needs pandas."""
        return frame(dict(plan.provenance.estimate) for plan in self.plans)

    def _repr_html_(self) -> str:
        """Each plan's peak and what it costs, for a notebook."""
        most = max(map(_peak, self.plans), default=1) or 1
        rows = [
            ((f"{number}", human_bytes(_peak(plan)), _cost_in_words(plan)), _peak(plan) / most)
            for number, plan in enumerate(self.plans, 1)
        ]
        return table_html(f"front of {len(rows)} plans", ["plan", "peak", "noise or low ratio"], rows)

    def pick(self, table: TensorTable, budget: str | int) -> Assignment | None:
        """The best plan whose step fits, of a table that may have another batch size; None where none does.

        Args:
            table: of the plans' model.
            budget: as in :func:`assign.search`.
        Raises:
            PlanError: the plans are for another model.
            BudgetError: no budget.
        """
        limit = parse_budget(budget, peak_bytes(table, {}))
        for plan in reversed(self.plans):
            plan.check_fits(table, where="the front")
            if peak_bytes(table, plan.entries, plan.update_rounding) <= limit:
                return plan
        return None


def search_front(table: TensorTable, plans: int, **asked: Any) -> Front:
    """Search plans between the lowest peak that a strategy reaches and the peak without narrowing.

    The budgets have equal distances. A plan that takes no fewer bytes than another and is no better is dropped: better
    means less predicted noise or, where noise was not measured, a smaller low ratio.

    Args:
        table: result of :func:`assign.trace`.
        plans: number of searches, 2 or more; the front may have fewer plans.
        asked: options of :func:`assign.planning.search_table`, without ``budget`` and ``low_ratio``.
    Returns:
        The plans, the lowest peak first.
    Raises:
        BudgetError: fewer than two plans, a goal, or a strategy without a goal.
        AssignError: as :func:`assign.planning.search_table`.
    Examples:
        ```python
        front = assign.search_front(table, 4)
        front.save("plans")
        plan = front.pick(table, "95%")
        ```
    """
    if plans < 2:
        raise BudgetError(f"search: a front of {plans} plans is asked for; give 2 or more.")
    if any(asked.pop(goal, None) is not None for goal in ("budget", "low_ratio", "format_name")):
        raise BudgetError("search: a front has every budget. Leave out the budget, the low ratio and the format.")
    if asked.get("strategy") in BASELINES:
        raise BudgetError(f"search: the strategy {asked['strategy']!r} makes one plan. Use 'milp' or 'greedy'.")
    widest = search_table(table, low_ratio=0.0, **asked)
    top, floor = _peak(widest), _floor(table, asked)
    steps = [floor + (top - floor) * number // (plans - 1) for number in range(plans - 1)]
    found = [search_table(table, budget=budget, **asked) for budget in steps]
    return Front(_best([*found, widest]))


def check_empty(directory: str | os.PathLike[str]) -> None:
    """Make sure that a front may go into ``directory``, before it is searched.

    Raises:
        PlanError: it is a file, or holds something.
    """
    target = Path(directory)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        what = "holds files already" if target.is_dir() else "is a file"
        raise PlanError(f"{target} {what}; a front goes into a directory of its own. Give another, e.g. -o plans.")


def _floor(table: TensorTable, asked: dict[str, Any]) -> int:
    """The lowest peak that the strategy reaches: what it says of a budget that nothing meets."""
    try:
        search_table(table, budget=1, **asked)
    except BudgetError as error:
        if error.floor is None:
            raise
        return error.floor
    raise AssertionError("a step in one byte")


def _best(plans: list[Assignment]) -> tuple[Assignment, ...]:
    kept: list[Assignment] = []
    for plan in sorted(plans, key=lambda plan: (_peak(plan), _cost(plan))):
        if not kept or _cost(plan) < _cost(kept[-1]):
            kept.append(plan)
    return tuple(kept)


def _cost(plan: Assignment) -> float:
    estimate = plan.provenance.estimate
    return float(str(estimate["noise" if "noise" in estimate else "low_ratio"]))


def _cost_in_words(plan: Assignment) -> str:
    """'' for a plan whose file says nothing of it."""
    return f"{_cost(plan):.3g}" if {"noise", "low_ratio"} & plan.provenance.estimate.keys() else ""


def _peak(plan: Assignment) -> int:
    return int(str(plan.provenance.estimate.get("peak_bytes", 0)))
