"""The command that searches a plan by training: ``assign tune``."""

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import optuna

from assign.cli.groups import expand_groups, without
from assign.cli.options import Json, NoiseFile, Output, TaskName
from assign.cli.outputs import check_directory, check_outputs, write_json
from assign.cli.shell import app, command_line, console, open_task, traced
from assign.errors import BudgetError
from assign.options import nested, shell_of
from assign.plan.measured import Measured
from assign.plan.noise_table import NoiseTable
from assign.plan.plan import Assignment
from assign.plan.quality import is_maximized
from assign.plan.space import SearchSpace
from assign.plan.table import TensorTable
from assign.planner import Request, find_plan, with_provenance
from assign.report import tables
from assign.strategies import MILP, OPTUNA, check_request
from assign.strategies.goal import Goal
from assign.tasks import Task, TaskOptions, load_task
from assign.training.trials import Settings
from assign.training.tuning import StudyOptions, tune


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyGroup:
    """Options that only a search by training takes.

    Attributes:
        storage: Database of the study, postgresql://… for several machines. Default: a file next to the plan. Run the
            same command again to resume the study, or elsewhere to join it.
        metric: A metric of the task, or loss for the training loss. Default: accuracy, or loss if the task does not
            evaluate.
        study: trials, workers and sampler.
        settings: settings that all processes of the study share.
    """

    storage: str | None = None
    metric: str | None = None
    study: StudyOptions = field(default_factory=StudyOptions)
    settings: Settings = field(default_factory=Settings)


@app.command("tune")
@expand_groups
def tune_task(
    task: TaskName,
    goal: Annotated[Goal, without("low_ratio", "max_step_time")],
    space: Annotated[SearchSpace, without("formats", "pins", "granularity")],
    study: StudyGroup,
    options: TaskOptions,
    output: Output = Path("plan.json"),
    noise_file: NoiseFile = None,
    json_file: Json = None,
) -> None:
    """Search by short trainings with Optuna: the best plan under --budget, or a front of plans into a directory."""
    run_study(task, goal, space, study, options, output, noise_file, json_file)


def run_study(
    task: str,
    goal: Goal,
    space: SearchSpace,
    group: StudyGroup,
    options: TaskOptions,
    output: Path,
    noise_file: Path | None,
    json_file: Path | None,
) -> None:
    """Search by training. Under a budget ``output`` is the file of the plan, otherwise the directory of the front."""
    check_outputs(None if goal.budget is None else output, json_file, inputs=[task, noise_file])
    check_request(OPTUNA, goal, space)
    if goal.budget is None:
        if output.suffix:
            raise BudgetError(
                f"tune: without a budget a study finds a front of plans, but {output} names one file.\n"
                "  Give a budget, or a directory for the plans: -o plans"
            )
        check_directory(output)
    loaded = open_task(task, replace(options, epochs=None))
    options = replace(options, epochs=group.settings.epochs)
    step = traced(loaded, options, space.step)
    metric = group.metric or ("accuracy" if loaded.evaluate else "loss")
    settings = replace(group.settings, space=space, budget=goal.budget, metric=metric, maximize=is_maximized(metric))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    found = tune(
        functools.partial(_task_of_seed, task, options),
        storage=group.storage or str(output.with_name(f"{output.stem}.study.db")),
        settings=settings,
        options=group.study,
        starts=_noise_starts(step, NoiseTable.load(noise_file), settings) if noise_file else [],
        on_trial=lambda trial: console.print(tables.trial_line(trial.number, trial.state.name, trial.user_attrs)),
    )
    names = {}
    for each in found.front:
        path = output if goal.budget is not None else output / f"trial-{each.trial:04}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        costs = {**each.costs, f"trained_{found.metric}": each.metric}
        origin: dict[str, Any] = {"strategy": OPTUNA, "seed": settings.seed, "command": command_line()}
        with_provenance(each.plan, **origin, costs=costs).save(path)
        names[each.trial] = str(path)
    console.print(tables.front_table(found, names))
    rows = [{"trial": e.trial, "plan": names[e.trial], found.metric: e.metric, **e.costs} for e in found.front]
    write_json(json_file, {"trained": found.trained, "pruned": found.pruned, "front": rows})


def check_untouched(strategy: str, group: StudyGroup, options: TaskOptions) -> None:
    """Check that no option of a study was given to a search that does not train.

    Raises:
        BudgetError: one was given; names these options.
    """
    shared = {"seed": options.seed, "device": options.device}
    given = [f"--{name}" for name, value, default in _values(group) if value != shared.get(name, default)]
    if given:
        raise BudgetError(
            f"search: the strategy {strategy!r} does not train, and does not take {', '.join(given)}.\n"
            "  Leave them out, or use 'assign tune'."
        )


def _values(options: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, value and default of every option in a group, nested groups included."""
    for each in dataclasses.fields(options):
        if shell_of(each).hidden:
            continue
        if nested(each):
            yield from _values(getattr(options, each.name))
        else:
            yield each.name, getattr(options, each.name), each.default


def _noise_starts(table: TensorTable, noise: NoiseTable, settings: Settings) -> list[Assignment]:
    """Return plans of least noise to start a study with: at its budget, or at three low ratios."""
    goals = [Goal(low_ratio=ratio) for ratio in (0.75, 0.5, 0.25)]
    space = SearchSpace(recipe=settings.space.recipe)
    if settings.budget is not None:
        goals, space = [Goal(budget=settings.budget)], replace(settings.space, update_rounding="nearest")
    requests = [Request(goal=goal, strategy=MILP, space=space) for goal in goals]
    return [find_plan(table, request, Measured(noise=noise)) for request in requests]


def _task_of_seed(name: str, options: TaskOptions, seed: int) -> Task:
    """Return the task for a seed; worker processes call this."""
    return load_task(name, replace(options, seed=seed))
