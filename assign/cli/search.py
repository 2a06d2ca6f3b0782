"""Commands that search a plan, and the preparation that they share."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from assign.cli.groups import Former, expand_groups, without
from assign.cli.options import Json, NoiseFile, Output, Strategy, TaskName, Weights
from assign.cli.outputs import check_directory, check_outputs, write_json
from assign.cli.shell import app, command_line, console, named, open_task, traced
from assign.cli.tune import StudyGroup, check_untouched, run_study
from assign.errors import BudgetError
from assign.memory.estimate import estimate as estimate_plan
from assign.noise.measure import measure_noise
from assign.noise.options import NoiseOptions
from assign.options import option
from assign.pareto import Front, check_empty, find_front
from assign.plan.measured import Measured
from assign.plan.noise_table import NoiseTable
from assign.plan.plan import Assignment
from assign.plan.space import SearchSpace
from assign.plan.table import TensorTable
from assign.planner import Request, find_plan, measure
from assign.report import tables
from assign.strategies import OPTUNA
from assign.strategies.goal import Goal
from assign.tasks import Task, TaskOptions
from assign.tasks.batch import move
from assign.tracing.step import Step
from assign.training.weights import load_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontOptions:
    """Fronts that ``assign search`` writes or reads.

    Attributes:
        pareto: Write a front of up to N plans into the directory of --output.
        front: Pick a plan of this front if one of its plans fits the budget.
    """

    pareto: int | None = field(default=None, metadata=option(metavar="N"))
    front: Path | None = field(default=None, metadata=option(metavar="DIR"))


@app.command()
@expand_groups
def search(
    task: TaskName,
    goal: Goal,
    space: SearchSpace,
    fronts: FrontOptions,
    options: Annotated[TaskOptions, without("epochs")],
    study: Annotated[StudyGroup, Former()],
    output: Output = Path("plan.json"),
    strategy: Strategy = "greedy",
    noise_file: NoiseFile = None,
    json_file: Json = None,
) -> None:
    """Choose a format for every tensor and write the plan; or, with --pareto, a front of plans."""
    if strategy == OPTUNA:
        typer.echo("'assign search --strategy optuna' is now 'assign tune', with the same options.", err=True)
        _refuse_fronts(fronts)
        run_study(task, goal, space, study, options, output, noise_file, json_file)
        return
    check_untouched(strategy, study, options)
    check_outputs(None if fronts.pareto else output, json_file, inputs=[task, noise_file, fronts.front])
    if fronts.pareto:
        check_directory(output)
    request = Request(goal=goal, strategy=strategy, space=space, seed=options.seed, command=command_line())
    loaded = open_task(task, options)
    step = traced(loaded, options, space.step)
    picked = _picked(fronts.front, step, goal.budget, output) if fronts.front else None
    if picked is not None:
        write_json(json_file, picked.provenance.estimate)
        return
    measured = measured_for(loaded, step, request, noise_file, output)
    if fronts.pareto is not None:
        _search_front(step, output, fronts.pareto, json_file, request, measured)
        return
    plan = searched(step, output, request, measured)
    write_json(json_file, plan.provenance.estimate)


@app.command("noise")
@expand_groups
def measure_task(
    task: TaskName,
    space: Annotated[
        SearchSpace,
        without("pins", "granularity", "master", "gradients", "optimizer_states", "update_rounding", "step"),
    ],
    noise: NoiseOptions,
    options: Annotated[TaskOptions, without("epochs")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="File for the table. Run the same command to resume.")
    ] = Path("noise.json"),
    checkpoint: Weights = None,
    json_file: Json = None,
) -> None:
    """Measure how much rounding each tensor perturbs the gradient. --strategy milp minimizes this noise."""
    check_outputs(json_file, inputs=[task, checkpoint], continued=[output])
    loaded = open_task(task, options)
    step = traced(loaded, options)
    if checkpoint is not None:
        load_weights(checkpoint, step.model)
        noise = replace(noise, warm_up=noise.steps(trained=True))
    with console.status("measuring noise") as status:
        found = measure_noise(
            step,
            _Moved(loaded, step),
            space=space,
            options=noise,
            file=output,
            on_batch=lambda so_far: status.update(f"measuring noise: {so_far.batches} batches"),
        )
    _print_noise(found, output)
    console.print(tables.noise_table(found))
    write_json(json_file, tables.noise_rows(found))


def measured_for(task: Task, step: Step, request: Request, noise_file: Path | None, output: Path) -> Measured:
    """Return the measurements that a search uses: noise from its file, or measured now if the strategy needs it."""
    noise_path = named(output).with_name(f"{named(output).stem}.noise.json")
    given = NoiseTable.load(noise_file) if noise_file is not None else None
    with console.status("measuring") as status:
        found = measure(
            step,
            request,
            noise=given,
            batches=_Moved(task, step),
            file=noise_path,
            on_stage=lambda text: status.update(text),
        )
    if found.noise is not None and given is None:
        _print_noise(found.noise, noise_path)
    return found


def searched(table: TensorTable, output: Path, request: Request, measured: Measured) -> Assignment:
    """Search a plan, write it and print what it costs; return it."""
    with console.status("searching"):
        plan = find_plan(table, request, measured)
    plan.save(output)
    console.print(f"wrote {output}: {len(plan.entries)} tensors")
    _print_costs(table, plan)
    return plan


class _Moved:
    """Batches of a task on the device of its model. Every iteration starts with the first batch."""

    def __init__(self, task: Task, step: Step) -> None:
        self._task = task
        self._device = next(iter(step.model.parameters())).device

    def __iter__(self) -> Iterator[Any]:
        return (move(batch, self._device) for batch in self._task.train)


def _print_noise(found: NoiseTable, file: Path) -> None:
    console.print(
        f"wrote {file}: {len(found.cells)} choices, {found.batches} batches, relative standard error "
        f"{found.relative_error:.3f}",
    )


def _print_costs(table: TensorTable, plan: Assignment) -> None:
    console.print(tables.estimate_table(estimate_plan(table, plan)))
    if "noise" in plan.provenance.estimate:
        console.print(tables.noise_line(plan.provenance.estimate))


def _search_front(
    table: TensorTable, directory: Path, plans: int, json_file: Path | None, request: Request, measured: Measured
) -> None:
    if directory.suffix:
        raise BudgetError(
            f"search: --pareto writes several plans, but {directory} names one file. Give a directory: -o plans."
        )
    check_empty(directory)
    with console.status("searching"):
        front = find_front(table, plans, request, measured)
    paths = front.save(directory)
    rows = [{"plan": str(path), **plan.provenance.estimate} for path, plan in zip(paths, front.plans, strict=True)]
    console.print(tables.searched_front_table(rows))
    write_json(json_file, {"front": rows})


def _picked(directory: Path, table: TensorTable, budget: str | int | None, output: Path) -> Assignment | None:
    """Write the plan of a stored front that fits the budget to ``output`` and return it; None if none fits."""
    if budget is None:
        raise BudgetError("search: --front requires a budget. Give one, e.g. --budget 6GiB.")
    front = Front.load(directory)
    plan = front.pick(table, budget)
    if plan is None:
        console.print(f"none of the {len(front.plans)} plans in {directory} fits the budget; searching")
        return None
    plan.save(output)
    console.print(f"wrote {output}: the best plan that fits, of {len(front.plans)} plans in {directory}")
    _print_costs(table, plan)
    return plan


def _refuse_fronts(fronts: FrontOptions) -> None:
    """Check that no option of fronts was given, because a study does not use them.

    Raises:
        BudgetError: one was given.
    """
    given = [f"--{each.name}" for each in dataclasses.fields(fronts) if getattr(fronts, each.name) is not None]
    if given:
        raise BudgetError(
            f"search: the strategy 'optuna' does not take {', '.join(given)}: it finds a front of its own if no budget "
            "is given.\n  Leave them out, or use another strategy."
        )
