"""Commands that search a plan, and the preparation that they share."""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import optuna
import torch
import typer

from assign.cli.options import (
    BatchSize,
    Budget,
    Data,
    Device,
    Epochs,
    Format,
    Formats,
    Gradients,
    Json,
    LowRatio,
    Master,
    Metric,
    NoiseFile,
    OptimizerStates,
    Output,
    Pins,
    Recipe,
    Rounding,
    Sampler,
    Saved,
    Seed,
    Shares,
    StepTime,
    Storage,
    Strategy,
    TaskName,
    TrialBackend,
    Trials,
    WarmUp,
    Weights,
    Workers,
)
from assign.cli.outputs import check_directory, check_outputs, write_json
from assign.cli.shell import app, command_line, console, named, open_task, traced
from assign.errors import BudgetError
from assign.executor.backends import Backend
from assign.executor.timing import measure_times
from assign.fronts import Front, check_empty, search_front
from assign.noise.measuring import BATCHES, UNTIL, WARM_UP, measure_noise
from assign.plan.assignment import Assignment
from assign.plan.memory import estimate as estimate_plan
from assign.plan.noise import Method, NoiseTable
from assign.plan.stored import UpdateRounding
from assign.plan.tensors import TensorTable
from assign.plan.times import TimeTable
from assign.planning import search_table, with_provenance
from assign.report import tables
from assign.strategies import MILP, OPTUNA
from assign.strategies.goal import parse_pins, split_names
from assign.strategies.milp import Granularity
from assign.tasks import Task, TaskOptions, check_device, load_task
from assign.tasks.batch import move
from assign.tracing.finiteness import non_finite
from assign.training.trials import Settings
from assign.training.tuning import is_maximized, tune
from assign.training.weights import load_weights


@app.command()
def search(
    task: TaskName,
    output: Output = Path("plan.json"),
    budget: Budget = None,
    low_ratio: LowRatio = None,
    strategy: Strategy = "greedy",
    recipe: Recipe = "native",
    format_name: Format = None,
    optimizer_states: OptimizerStates = None,
    gradients: Gradients = None,
    master: Master = None,
    saved: Saved = None,
    update_rounding: Rounding = UpdateRounding.NEAREST,
    noise_file: NoiseFile = None,
    formats: Formats = "",
    granularity: Shares = Granularity.GROUP,
    pin: Pins = None,
    max_step_time: StepTime = None,
    pareto: Annotated[
        int | None, typer.Option(metavar="N", help="Write a front of up to N plans into the directory of --output.")
    ] = None,
    front: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Pick from this front where one of its plans fits the budget.")
    ] = None,
    trials: Trials = None,
    workers: Workers = None,
    storage: Storage = None,
    metric: Metric = None,
    sampler: Sampler = None,
    epochs: Epochs = None,
    trial_backend: TrialBackend = None,
    seed: Seed = 0,
    batch_size: BatchSize = None,
    device: Device = "cpu",
    data: Data = None,
    json_file: Json = None,
) -> None:
    """Choose a format for every tensor and write the plan; or, with --pareto, a front of plans."""
    several = pareto is not None or (strategy == OPTUNA and budget is None)
    check_outputs(None if several else output, json_file, inputs=[task, noise_file, front])
    if several:
        check_directory(output)
    loaded = open_task(task, seed, batch_size, device, data, None)
    table = traced(loaded, device)
    stored = {"master": master, "gradients": gradients, "optimizer_states": optimizer_states, "saved": saved}
    if strategy == OPTUNA:
        others = (low_ratio is not None, format_name, formats, pin, max_step_time, granularity is not Granularity.GROUP)
        if any(others):
            raise BudgetError(
                "search: the strategy 'optuna' chooses between the recipe's two formats for whole groups, under a "
                "budget or for a front.\n  Leave out the low ratio, formats, granularity, pins and time."
            )
        _refuse_options(
            "search: the strategy 'optuna' finds a front of its own where no budget is given, and does not take",
            pareto=pareto,
            front=front,
        )
        metric = metric or ("accuracy" if loaded.evaluate else "loss")
        settings = Settings(
            recipe=recipe,
            budget=budget,
            metric=metric,
            maximize=is_maximized(metric),
            epochs=epochs,
            seed=seed,
            backend=trial_backend or Backend.EAGER,
            device=device,
            stored=tuple((name, value) for name, value in stored.items() if value is not None),
            update_rounding=update_rounding,
        )
        _tuned(
            functools.partial(_task_of_seed, task, batch_size, device, data, epochs),
            settings,
            output,
            json_file,
            storage=storage or str(output.with_name(f"{output.stem}.study.db")),
            trials=32 if trials is None else trials,
            sampler=sampler,
            workers=1 if workers is None else workers,
            starts=_noise_starts(table, NoiseTable.load(noise_file), settings) if noise_file else [],
        )
        return
    _refuse_options(
        f"search: only the strategy 'optuna' trains, and {strategy!r} does not take",
        trials=trials,
        workers=workers,
        storage=storage,
        metric=metric,
        sampler=sampler,
        epochs=epochs,
        backend=trial_backend,
    )
    picked = _picked(front, table, budget, output) if front else None
    if picked is not None:
        write_json(json_file, picked.provenance.estimate)
        return
    asked = prepare_search(
        loaded,
        table,
        device,
        output,
        budget=budget,
        low_ratio=low_ratio,
        strategy=strategy,
        recipe=recipe,
        format_name=format_name,
        update_rounding=update_rounding,
        noise_file=noise_file,
        formats=formats,
        granularity=granularity,
        pin=pin,
        max_step_time=max_step_time,
        seed=seed,
        **stored,
    )
    if pareto is not None:
        _search_front(table, output, pareto, json_file, asked)
        return
    plan = searched(table, output, asked)
    write_json(json_file, plan.provenance.estimate)


@app.command("noise")
def measure(
    task: TaskName,
    output: Annotated[Path, typer.Option("-o", "--output", help="The table; the same command goes on from it.")] = Path(
        "noise.json"
    ),
    recipe: Recipe = "native",
    formats: Formats = "",
    saved: Annotated[str, typer.Option(help="Formats of saved activations, with commas.")] = "",
    method: Annotated[
        Method, typer.Option(help="first-order: all at once, from derivatives. measured: a step for each choice.")
    ] = Method.FIRST_ORDER,
    until: Annotated[float, typer.Option(help="Stop at this relative standard error, in the median.")] = UNTIL,
    batches: Annotated[int, typer.Option(help="Batches at most.")] = BATCHES,
    checkpoint: Weights = None,
    warm_up: WarmUp = None,
    seed: Seed = 0,
    batch_size: BatchSize = None,
    device: Device = "cpu",
    data: Data = None,
    json_file: Json = None,
) -> None:
    """Measure how much rounding each tensor perturbs the gradient: what --strategy milp minimises."""
    check_outputs(json_file, inputs=[task, checkpoint], continued=[output])
    loaded = open_task(task, seed, batch_size, device, data, None)
    table = traced(loaded, device)
    found = _measured(
        loaded,
        table,
        device,
        checkpoint,
        warm_up=warm_up,
        file=output,
        recipe=recipe,
        formats=split_names(formats),
        saved=split_names(saved),
        method=method,
        until=until,
        most=batches,
        seed=seed,
    )
    console.print(tables.noise_table(found))
    write_json(json_file, tables.noise_rows(found))


def prepare_search(
    task: Task,
    table: TensorTable,
    device: str,
    output: Path,
    *,
    strategy: str,
    recipe: str,
    saved: str | None,
    noise_file: Path | None,
    formats: str,
    pin: list[str] | None,
    max_step_time: str | None,
    seed: int,
    **options: Any,
) -> dict[str, Any]:
    """What ``search_table`` is asked; noise from its file, or measured beside the plan where the strategy needs it."""
    names, pins = split_names(formats), parse_pins(pin or [])
    asked: dict[str, Any] = {"recipe": recipe, "formats": names, "saved": split_names(saved or ""), "pins": pins}
    noise = _noise_for(task, table, device, strategy, noise_file, output, seed=seed, **asked)
    finite = _non_finite(task, device) if saved else frozenset[str]()
    times = None
    if max_step_time is not None and strategy == MILP:
        times = _timed(task, table, device, non_finite=finite, **asked)
    return {
        **options,
        "strategy": strategy,
        "recipe": recipe,
        "saved": saved,
        "non_finite": finite,
        "times": times,
        "max_step_time": max_step_time,
        "noise": noise,
        "formats": names,
        "pins": pins,
        "seed": seed,
        "command": command_line(),
    }


def searched(table: TensorTable, output: Path, asked: dict[str, Any]) -> Assignment:
    """Search, write the plan and print what it costs."""
    with console.status("searching"):
        plan = search_table(table, **asked)
    plan.save(output)
    console.print(f"wrote {output}: {len(plan.entries)} tensors")
    _tell(table, plan)
    return plan


def _tell(table: TensorTable, plan: Assignment) -> None:
    console.print(tables.estimate_table(estimate_plan(table, plan)))
    if "noise" in plan.provenance.estimate:
        console.print(tables.noise_line(plan.provenance.estimate))


def _search_front(
    table: TensorTable, directory: Path, plans: int, json_file: Path | None, asked: dict[str, Any]
) -> None:
    if directory.suffix:
        raise BudgetError(f"search: --pareto writes several plans, and {directory} is one file. Give -o plans.")
    check_empty(directory)
    with console.status("searching"):
        front = search_front(table, plans, **asked)
    paths = front.save(directory)
    rows = [{"plan": str(path), **plan.provenance.estimate} for path, plan in zip(paths, front.plans, strict=True)]
    console.print(tables.searched_front_table(rows))
    write_json(json_file, {"front": rows})


def _picked(directory: Path, table: TensorTable, budget: str | None, output: Path) -> Assignment | None:
    """The plan of a stored front that the budget allows, written to ``output``; None where all take more."""
    if budget is None:
        raise BudgetError("search: --front picks for a budget. Give one, e.g. --budget 6GiB.")
    front = Front.load(directory)
    plan = front.pick(table, budget)
    if plan is None:
        console.print(f"none of the {len(front.plans)} plans in {directory} fits: searching")
        return None
    plan.save(output)
    console.print(f"wrote {output}: the best of {len(front.plans)} plans in {directory} that fits")
    _tell(table, plan)
    return plan


def _non_finite(task: Task, device: str) -> frozenset[str]:
    where = check_device(device)
    with console.status("looking for values that are not finite"):
        return non_finite(task.make_model().to(where), move(task.first_batch(), where), task.loss)


def _timed(task: Task, table: TensorTable, device: str, **asked: Any) -> TimeTable:
    where = check_device(device)
    with console.status("timing a step in every format"):
        model, batch = task.make_model().to(where), move(task.first_batch(), where)
        return measure_times(model, batch, task.loss, table=table, **asked)


def _noise_for(
    task: Task, table: TensorTable, device: str, strategy: str, file: Path | None, plan: Path, **options: Any
) -> NoiseTable | None:
    """Noise from its file; or measured, beside the plan, where the strategy needs it."""
    if file is not None:
        return NoiseTable.load(file)
    if strategy != MILP:
        return None
    file = named(plan).with_name(f"{named(plan).stem}.noise.json")
    return _measured(task, table, device, None, warm_up=None, file=file, **options)


def _measured(
    task: Task,
    table: TensorTable,
    device: str,
    checkpoint: Path | None,
    *,
    warm_up: int | None,
    file: Path,
    seed: int,
    **options: Any,
) -> NoiseTable:
    """Noise of the task's model, after some steps or as the checkpoint has it; ``file`` goes on."""
    steps = (0 if checkpoint else WARM_UP) if warm_up is None else warm_up
    where = check_device(device)
    torch.manual_seed(seed)
    model = task.make_model().to(where)
    if checkpoint is not None:
        load_weights(checkpoint, model)
    again = itertools.chain.from_iterable(itertools.repeat(task.train))
    batches = (move(batch, where) for batch in itertools.chain(itertools.islice(again, steps), task.train))
    with console.status(f"training {steps} steps, then measuring noise") as status:
        found = measure_noise(
            model,
            batches,
            task.loss,
            table=table,
            file=file,
            seed=seed,
            optimizer=task.optimizer,
            warm_up=steps,
            on_batch=lambda so_far: status.update(f"measuring noise: {so_far.batches} batches"),
            **options,
        )
    console.print(
        f"wrote {file}: {len(found.cells)} choices, {found.batches} batches, relative standard error "
        f"{found.relative_error:.3f}",
    )
    return found


def _noise_starts(table: TensorTable, noise: NoiseTable, settings: Settings) -> list[Assignment]:
    """Plans of least noise to begin a study with: at its budget, or at three low ratios."""
    goals: list[dict[str, Any]] = [{"low_ratio": ratio} for ratio in (0.75, 0.5, 0.25)]
    if settings.budget is not None:
        goals = [{"budget": settings.budget, **dict(settings.stored)}]
    return [search_table(table, strategy=MILP, noise=noise, recipe=settings.recipe, **goal) for goal in goals]


def _tuned(
    make_task: Callable[[int], Task], settings: Settings, output: Path, json_file: Path | None, **options: Any
) -> None:
    """Search by training; under a budget the plan goes to ``output``, else the front into that directory."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if settings.budget is None and output.suffix:
        raise BudgetError(
            f"search: without a budget the strategy 'optuna' finds a front of plans, and {output} is one file.\n"
            "  Give a budget, or a directory for the plans: -o plans"
        )
    found = tune(
        make_task,
        settings=settings,
        on_trial=lambda trial: console.print(tables.trial_line(trial.number, trial.state.name, trial.user_attrs)),
        **options,
    )
    command = command_line()
    names = {}
    for each in found.front:
        path = output if settings.budget is not None else output / f"trial-{each.trial:04}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        costs = {**each.costs, f"trained_{found.metric}": each.metric}
        with_provenance(each.plan, strategy=OPTUNA, seed=settings.seed, command=command, costs=costs).save(path)
        names[each.trial] = str(path)
    console.print(tables.front_table(found, names))
    rows = [{"trial": e.trial, "plan": names[e.trial], found.metric: e.metric, **e.costs} for e in found.front]
    write_json(json_file, {"trained": found.trained, "pruned": found.pruned, "front": rows})


def _task_of_seed(
    name: str, batch_size: int | None, device: str, data: Path | None, epochs: int | None, seed: int
) -> Task:
    """What another process makes its task of."""
    return load_task(name, TaskOptions(data=data, batch_size=batch_size, seed=seed, device=device, epochs=epochs))


def _refuse_options(why: str, **given: Any) -> None:
    """Options that would do nothing here."""
    named = [f"--{name}" for name, value in given.items() if value is not None]
    if named:
        raise BudgetError(f"{why} {', '.join(named)}.\n  Leave them out, or use another strategy.")
