"""Trials of a study: turn proposed decisions into plans and train them.

A plan is one decision per group of the table: low or high, in the recipe's two formats.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import optuna
from optuna.trial import FrozenTrial, TrialState
from pydantic import ConfigDict, TypeAdapter

from assign.errors import PlanError, StudyError
from assign.executor.micro_batches import find_reduction
from assign.json_file import Count, Kind
from assign.memory.estimate import estimate, peak_bytes
from assign.options import option
from assign.plan.persistent_state import UpdateRounding
from assign.plan.plan import Assignment, Entry
from assign.plan.recipes import initial
from assign.plan.space import SearchSpace
from assign.plan.table import TensorTable
from assign.planner import completion, search_table, summary
from assign.strategies import OPTUNA, check_request
from assign.strategies.goal import Goal, over_budget, parse_budget
from assign.tasks import Task, check_device
from assign.tasks.batch import move
from assign.tracing.nonfinite import non_finite
from assign.tracing.tracer import trace
from assign.training.history import EpochResult
from assign.training.loop import train
from assign.training.options import RunOptions, TrainOptions

STARTS = (1.0, 0.75, 0.5, 0.25, 0.0)
"""Low ratios of the greedy plans that are tried first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(RunOptions):
    """Settings that all processes of one study must share; a study stores them.

    Attributes:
        space: What may be chosen for every tensor, without formats, pins and granularity; or the name of a recipe.
        budget: Peak bytes of a step, in any form that :func:`assign.search` takes. Default: the peak is an objective.
        metric: A metric of the task, or ``loss`` for the training loss of the last epoch.
        maximize: Whether a higher value of the metric is better.
    Raises:
        BudgetError: the space has something that a study does not take.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    space: SearchSpace = field(default_factory=SearchSpace, metadata=option(hidden=True))
    budget: str | int | None = field(default=None, metadata=option(hidden=True))
    metric: str = field(default="accuracy", metadata=option(hidden=True))
    maximize: bool = field(default=True, metadata=option(hidden=True))

    def __post_init__(self) -> None:
        object.__setattr__(self, "space", SearchSpace.of(self.space))
        check_request(OPTUNA, Goal(budget=self.budget), self.space)

    @classmethod
    def of(cls, study: str, attributes: Mapping[str, Any]) -> "Settings":
        """Return the settings in the attributes of a study.

        Raises:
            StudyError: they are damaged, or from a version with other settings.
        """
        kept = attributes.get("settings", {})
        if isinstance(kept, dict) and "stored" in kept:  # from the version without search spaces
            space = {name: kept[name] for name in ("recipe", "update_rounding") if name in kept}
            others = {name: value for name, value in kept.items() if name not in ("stored", *space)}
            kept = {**others, "space": {**space, **_pairs(kept["stored"])}}
        text = json.dumps(kept)
        return _KEPT.load(_SETTINGS, text, f"the stored settings of the study {study!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Result of a completed trial, as the study stores it.

    Attributes:
        low: ids of the groups that were low.
        peak_bytes: predicted peak of a step, in bytes.
        metric: of the trained model.
    """

    low: tuple[int, ...]
    peak_bytes: Count
    metric: float

    @classmethod
    def of(cls, trial: FrozenTrial) -> "Outcome":
        """Return the outcome of a completed trial.

        Raises:
            StudyError: the study's database is damaged.
        """
        kept = {name: trial.user_attrs.get(name) for name in cls.__dataclass_fields__}
        return _KEPT.load(_OUTCOME, json.dumps(kept), f"the stored result of trial {trial.number}")


def _pairs(stored: Any) -> dict[str, Any]:
    """Return what a study stored as pairs of a name and a value; damaged data under a name that no space has."""
    try:
        return {str(name): value for name, value in stored}
    except (TypeError, ValueError):
        return {"stored": stored}


_KEPT = Kind(name="part of a study", error=StudyError, advice="Give another storage, or start another study.")
_SETTINGS, _OUTCOME = TypeAdapter(Settings), TypeAdapter(Outcome)


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """Trains the plans that a study proposes."""

    make_task: Callable[[int], Task]
    settings: Settings
    table: TensorTable
    complete: Callable[[Mapping[str, Entry]], dict[str, Entry]]
    budget: int | None

    @classmethod
    def make(cls, make_task: Callable[[int], Task], settings: Settings) -> "Trainer":
        """Trace the task's model, and check that a plan can reach the budget.

        Args:
            make_task: returns the task with this seed.
            settings: of the study.
        Raises:
            TaskError: the device does not exist.
            TraceError: the step cannot be captured.
            BudgetError: a plan with everything low exceeds the budget.
        """
        where = check_device(settings.device)
        task = make_task(settings.seed)
        model, batch = task.make_model().to(where), move(task.first_batch(), where)
        step = settings.space.step
        if step.micro_batches > 1:
            step = replace(step, reduction=find_reduction(model, task.loss, batch, step))
            settings = replace(settings, space=replace(settings.space, step=step))
        traced = trace(model, batch, task.loss, task.optimizer, micro_batches=step.micro_batches)
        table, batch = traced.table, traced.batch
        keep = non_finite(model, batch, task.loss) if settings.space.saved else frozenset[str]()
        budget = None if settings.budget is None else parse_budget(settings.budget, peak_bytes(table, {}))
        complete = completion(table, settings.space, non_finite=keep)
        made = cls(make_task=make_task, settings=settings, table=table, complete=complete, budget=budget)
        if budget is not None:
            floor = made.peak(made.everything)
            if floor > budget:
                raise over_budget(Goal(budget=budget), floor, "with everything low")
        return made

    @property
    def everything(self) -> frozenset[int]:
        """Numbers of all groups."""
        return frozenset(group.id for group in self.table.groups)

    def entries(self, low: Iterable[int]) -> dict[str, Entry]:
        """Return the plan's entries with these groups low."""
        return self.complete(initial(self.table, self.settings.space.rules, frozenset(low)))

    def peak(self, low: Iterable[int]) -> int:
        """Return the peak bytes of a step with these groups low."""
        space = self.settings.space
        inside = space.step.micro_batches > 1
        return peak_bytes(self.table, self.entries(low), space.update_rounding, sums_inside=inside)

    def costs(self, low: Iterable[int]) -> dict[str, Any]:
        """Return the estimate of the plan with these groups low, as in its provenance."""
        found = estimate(self.table, self.plan(low))
        return summary(found, 0.0)

    def enqueue(self, study: optuna.Study, starts: Sequence[Assignment]) -> None:
        """Enqueue the given plans and greedy ones, to be tried before the sampler proposes any."""
        s = self.settings
        greedy = [search_table(self.table, low_ratio=ratio, space=s.space.recipe, seed=s.seed) for ratio in STARTS]
        for plan in (*starts, *greedy):
            low = self._low_of(plan)
            study.enqueue_trial({_name(group): group in low for group in self.everything}, skip_if_exists=True)

    def _low_of(self, plan: Assignment) -> frozenset[int]:
        plan.check_fits(self.table, where="tune: a plan to start from")
        low = frozenset(g.id for g in self.table.groups if all(plan.entries[key].low for key in g.keys))
        wanted = initial(self.table, self.settings.space.rules, low)
        other = next((key for key, entry in wanted.items() if plan.entries[key].format != entry.format), None)
        if other is not None:
            raise PlanError(
                f"tune: a plan to start from has {other!r} in {plan.entries[other].format}, but the study chooses "
                f"between the two formats of the recipe {self.settings.space.recipe!r}, for whole groups.\n"
                "  Give plans of that recipe: from the strategies greedy, or milp with groups and without formats."
            )
        return low

    def objective(self, trial: optuna.Trial) -> float | tuple[float, float]:
        """Train the plan of a trial and return its metric, without a budget also its peak.

        An interrupted trial is proposed again.
        """
        try:
            return self._objective(trial)
        except KeyboardInterrupt:
            trial.study.enqueue_trial(trial.params)
            raise

    def _objective(self, trial: optuna.Trial) -> float | tuple[float, float]:
        low = {group for group in sorted(self.everything) if trial.suggest_categorical(_name(group), [False, True])}
        low = self._fitting(low)
        peak = self.peak(low)
        trial.set_user_attr("low", sorted(low))
        trial.set_user_attr("peak_bytes", peak)
        metric = self._known(trial, low)
        if metric is None:
            metric = self._train(trial, low)
        trial.set_user_attr("metric", metric)
        return metric if self.budget is not None else (metric, float(peak))

    def _fitting(self, low: set[int]) -> set[int]:
        """Return ``low`` with as many of the largest other groups as it needs to fit the budget."""
        if self.budget is None:
            return low
        rest = sorted((g for g in self.table.groups if g.id not in low), key=lambda g: (g.elements, -g.id))
        while rest and self.peak(low) > self.budget:
            low = {*low, rest.pop().id}
        return low if self.peak(low) <= self.budget else set(self.everything)

    def _known(self, trial: optuna.Trial, low: set[int]) -> float | None:
        """Return the metric of the same plan in an earlier trial, or None."""
        for other in trial.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            outcome = Outcome.of(other)
            if set(outcome.low) == low:
                return outcome.metric
        return None

    def _train(self, trial: optuna.Trial, low: set[int]) -> float:
        s = self.settings
        plan = self.plan(low)

        def watch(epoch: int, result: EpochResult) -> None:
            if self.budget is not None:
                trial.report(self._metric(result.metrics, result.loss), epoch)
                if trial.should_prune():
                    raise optuna.TrialPruned

        result = train(
            self.make_task(s.seed),
            plan,
            options=TrainOptions(**{each.name: getattr(s, each.name) for each in fields(RunOptions)}),
            on_epoch=watch,
        )
        if result.diverged:
            trial.set_user_attr("diverged", result.message)
            raise optuna.TrialPruned
        return self._metric(result.metrics, result.loss)

    def _metric(self, metrics: Mapping[str, float], loss: float) -> float:
        name = self.settings.metric
        value = {**metrics, "loss": loss}.get(name, math.nan)
        if math.isnan(value):
            raise StudyError(f"tune: the task has no metric {name!r}. Choose one of: {', '.join([*metrics, 'loss'])}.")
        return value

    def plan(self, low: Iterable[int]) -> Assignment:
        """Return the plan with these groups low."""
        return Assignment(
            entries=self.entries(low),
            recipe=self.settings.space.recipe,
            fingerprint=self.table.fingerprint,
            update_rounding=UpdateRounding(self.settings.space.update_rounding),
            step=self.settings.space.step,
        )


def _name(group: int) -> str:
    return f"group {group}"
