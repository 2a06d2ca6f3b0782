"""The shell: arguments in, tables and JSON out; no logic of its own."""

import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import optuna
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from assign import _torch
from assign.errors import AssignError, BudgetError
from assign.executor.compile import Backend
from assign.executor.rehearsal import Rehearsal, rehearse
from assign.noise.measuring import BATCHES, UNTIL, measure_noise
from assign.numerics.promotion import THRESHOLD
from assign.plan.assignment import Assignment
from assign.plan.formats import FORMATS, SAVED_FORMATS, BlockFormat, parse_saved
from assign.plan.lowered import Lowered
from assign.plan.memory import estimate as estimate_plan
from assign.plan.noise import Method, NoiseTable
from assign.plan.stored import UpdateRounding
from assign.plan.tensors import TensorTable
from assign.planning import parse_pins, search_table, split_names, summary, with_provenance
from assign.report import audits, pictures, tables
from assign.strategies import MILP, OPTUNA
from assign.strategies.milp import Granularity
from assign.tasks import Task, TaskOptions, check_device, load_task
from assign.tasks.batch import move
from assign.tracing.finiteness import non_finite
from assign.tracing.tracer import trace as trace_step
from assign.training.audit import audit_task
from assign.training.certificate import certify_task
from assign.training.comparing import compare, load_variants, seed_range
from assign.training.comparison import Run
from assign.training.loop import Progress, TrainResult
from assign.training.loop import train as train_task
from assign.training.trials import Settings
from assign.training.tuning import is_maximized, tune
from assign.training.weights import load_weights

app = typer.Typer(
    help="Find the cheapest number format for every tensor of a PyTorch training step, and train with it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(width=None if sys.stdout.isatty() else 140)  # piped: plain, and wide enough for long keys

TaskName = Annotated[
    str,
    typer.Argument(
        metavar="TASK",
        help="digits, cifar10, cifar100, fashion-mnist, shakespeare, FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION",
    ),
]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON too.")]
Seed = Annotated[int, typer.Option(help="Seed of the model, the data's order and the search.")]
BatchSize = Annotated[int | None, typer.Option(help="Samples per step; the task's own if left out.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")]
Data = Annotated[Path | None, typer.Option(help="Directory with the task's data.")]
Epochs = Annotated[int | None, typer.Option(help="Epochs to train; the task's own if left out.")]
Recipe = Annotated[str, typer.Option(help="Candidates per tensor: native, hfp8, bf16 or fp16.")]
Strategy = Annotated[
    str,
    typer.Option(
        help="greedy, greedy-smallest, greedy-random, uniform, operator, operator-prime; milp: least noise; optuna: "
        "short trainings; or standalone, with the recipe bf16 or fp16: everything in 16 bit, masters too."
    ),
]
OptimizerStates = Annotated[
    str | None,
    typer.Option(help="Store optimizer states as bf16, fp16, dynamic8, dynamic4 or e4m3:block256; fp32 if left out."),
]
Gradients = Annotated[
    str | None,
    typer.Option(help="Store gradients as bf16, fp16, e5m2:pow2 or e4m3:pow2; as their masters if left out."),
]
Master = Annotated[
    str | None, typer.Option(help="Store parameters as bf16, fp16, or bf16+8 for masters of 24 bits; fp32 if left out.")
]
Saved = Annotated[
    str | None,
    typer.Option(
        help="Keep what waits for the backward pass as int4:block64, mxfp8, … (see 'assign formats') where that takes "
        "fewer bytes; as it is computed with if left out."
    ),
]
Format = Annotated[str | None, typer.Option("--format", help="With --strategy uniform: every tensor in this format.")]
Formats = Annotated[
    str,
    typer.Option(
        help="Candidates of every tensor, beside the recipe's, or (--strategy milp) in their place: names with commas, "
        "the widest first; e4m3:pow2/e5m2:pow2 means the first for values, the second for gradients."
    ),
]
NoiseFile = Annotated[
    Path | None, typer.Option("--noise", metavar="FILE", help="What 'assign noise' found; measured if left out.")
]
Trials = Annotated[
    int | None, typer.Option(help="With --strategy optuna: trainings of the whole study; 32 if left out.")
]
Workers = Annotated[int | None, typer.Option(help="With --strategy optuna: processes here; 1 if left out.")]
Storage = Annotated[
    str | None,
    typer.Option(
        help="With --strategy optuna: the study's database, postgresql://… for several machines; a file beside the "
        "plan if left out. The same command goes on, or joins."
    ),
]
Metric = Annotated[
    str | None,
    typer.Option(
        help="With --strategy optuna: one of the task's metrics, or loss, of training; accuracy if left out, loss "
        "where the task does not evaluate."
    ),
]
TrialBackend = Annotated[
    Backend | None, typer.Option("--backend", help="With --strategy optuna: what trains; eager if left out.")
]
Sampler = Annotated[str | None, typer.Option(help="With --strategy optuna: tpe or nsga2.")]
Pins = Annotated[
    list[str] | None, typer.Option("--pin", help="With --strategy milp: PATTERN=FORMAT, e.g. 'head.*=bf16'; several.")
]
Shares = Annotated[Granularity, typer.Option(help="With --strategy milp: what shares a decision.")]
LowRatio = Annotated[float | None, typer.Option(help="Share of the elements to hold low, 0 to 1.")]
Budget = Annotated[str | None, typer.Option(help="Peak bytes of a step: 512MiB, 6GB, or 50% of the all-fp32 peak.")]
PlanFile = Annotated[
    Path | None, typer.Option("--plan", metavar="PLAN", help="A plan's file; without one: plain fp32.")
]
BackendName = Annotated[Backend, typer.Option(help="eager: no compiler, exact memory. inductor: compiled, fast.")]
PromoteEvery = Annotated[
    int | None,
    typer.Option(help="Steps between two looks at what overflows; the recipe's own if left out, 0: promote nothing."),
]
PromoteThreshold = Annotated[float, typer.Option(help="Share of overflowing elements at which a tensor is promoted.")]
Rounding = Annotated[
    UpdateRounding, typer.Option("--update-rounding", help="How updates of 16-bit masters are rounded.")
]
Weights = Annotated[
    Path | None,
    typer.Option("--checkpoint", help="fp32 weights: what 'train --checkpoint' wrote, or a saved state_dict."),
]
From = Annotated[
    Path | None,
    typer.Option("--from", help="Go on from these fp32 weights: what 'train --checkpoint' wrote, or a state_dict."),
]
Output = Annotated[Path, typer.Option("-o", "--output", help="Where the plan goes.")]


def main() -> None:
    """Entry point: an AssignError is one message and exit status 2, not a traceback."""
    try:
        app()
    except AssignError as error:
        Console(stderr=True, soft_wrap=True).print(
            "\n  ".join([f"error: {error}", *getattr(error, "__notes__", ())]),
            style="red",
            markup=False,
            highlight=False,
        )
        sys.exit(2)


@app.command()
def formats(
    names: Annotated[
        list[str] | None, typer.Argument(help="Formats to show, e.g. 'fp(4,3,4)' or 'bf16:sr'; the table if none.")
    ] = None,
    json_file: Json = None,
) -> None:
    """List the number formats: range, precision, and how each is stored."""
    rows = map(parse_saved, names or (*FORMATS, *SAVED_FORMATS))
    elements, blocks = [], []
    for row in rows:
        if isinstance(row, BlockFormat):
            blocks.append(row)
        else:
            elements.append(row)
    if elements:
        console.print(tables.format_table(elements))
    if blocks:
        console.print(tables.block_table(blocks))
    facts = (
        "bits",
        "exponent_bits",
        "mantissa_bits",
        "max_value",
        "min_normal",
        "min_subnormal",
        "code_bytes",
        "carrier",
    )
    found = {row.name: {fact: getattr(row, fact) for fact in facts} | {"storage": str(row.storage)} for row in elements}
    shared = ("bits", "block", "bits_per_element", "code")
    found |= {row.name: {fact: getattr(row, fact) for fact in shared} | {"shared": str(row.shared)} for row in blocks}
    _write(json_file, found)


@app.command()
def schema(json_file: Json = None) -> None:
    """Print the JSON schema of a plan's file."""
    typer.echo(json.dumps(Assignment.schema(), indent=2))
    _write(json_file, Assignment.schema())


@app.command()
def trace(
    task: TaskName,
    seed: Seed = 0,
    batch_size: BatchSize = None,
    device: Device = "cpu",
    data: Data = None,
    json_file: Json = None,
) -> None:
    """List every tensor of one training step; nothing is computed."""
    table = _traced(_task(task, seed, batch_size, device, data, None), device)
    console.print(tables.trace_table(table))
    _write(json_file, table.to_json())


@app.command()
def estimate(
    task: TaskName,
    plan: PlanFile = None,
    backend: BackendName = Backend.EAGER,
    update_rounding: Rounding = UpdateRounding.NEAREST,
    seed: Seed = 0,
    batch_size: BatchSize = None,
    device: Device = "cpu",
    data: Data = None,
    json_file: Json = None,
) -> None:
    """Predict the memory of one training step under a plan (or all in fp32), before anything runs."""
    loaded = _task(task, seed, batch_size, device, data, None)
    table = _traced(loaded, device)
    chosen = Assignment.load(plan) if plan else search_table(table, strategy="uniform", format_name="fp32")
    costs = estimate_plan(table, chosen, update_rounding=update_rounding)
    compiled = _rehearsed(loaded, device, chosen, table, update_rounding) if backend is Backend.INDUCTOR else None
    console.print(tables.estimate_table(costs, compiled))
    more = {"compiled": dataclasses.asdict(compiled)} if compiled else {}
    _write(json_file, {**summary(costs, 0.0), **costs.to_json(), **more})


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
    """Choose a format for every tensor and write the plan; with optuna and without a budget, a front of plans."""
    loaded = _task(task, seed, batch_size, device, data, None)
    table = _traced(loaded, device)
    if strategy == OPTUNA:
        if low_ratio is not None or format_name or formats or pin or granularity is not Granularity.GROUP:
            raise BudgetError(
                "search: the strategy 'optuna' chooses between the recipe's two formats for whole groups, under a "
                "budget or for a front.\n  Leave out the low ratio, formats, granularity and pins."
            )
        stored = {"master": master, "gradients": gradients, "optimizer_states": optimizer_states, "saved": saved}
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
    plan = _searched(
        loaded,
        table,
        device,
        output,
        budget=budget,
        low_ratio=low_ratio,
        strategy=strategy,
        recipe=recipe,
        format_name=format_name,
        optimizer_states=optimizer_states,
        gradients=gradients,
        master=master,
        saved=saved,
        update_rounding=update_rounding,
        noise_file=noise_file,
        formats=formats,
        granularity=granularity,
        pin=pin,
        seed=seed,
    )
    _write(json_file, plan.provenance.estimate)


@app.command("noise")
def measure(
    task: TaskName,
    output: Annotated[Path, typer.Option("-o", "--output", help="The table; the same command goes on from it.")] = Path(
        "noise.json"
    ),
    recipe: Recipe = "native",
    formats: Formats = "",
    saved: Annotated[str, typer.Option(help="Formats of what waits for the backward pass, with commas.")] = "",
    method: Annotated[
        Method, typer.Option(help="first-order: all at once, from derivatives. measured: a step for each choice.")
    ] = Method.FIRST_ORDER,
    until: Annotated[float, typer.Option(help="Stop at this relative standard error, in the median.")] = UNTIL,
    batches: Annotated[int, typer.Option(help="Batches at most.")] = BATCHES,
    checkpoint: Weights = None,
    seed: Seed = 0,
    batch_size: BatchSize = None,
    device: Device = "cpu",
    data: Data = None,
    json_file: Json = None,
) -> None:
    """Measure how much rounding each tensor perturbs the gradient: what --strategy milp minimises."""
    loaded = _task(task, seed, batch_size, device, data, None)
    table = _traced(loaded, device)
    found = _measured(
        loaded,
        table,
        device,
        checkpoint,
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
    _write(json_file, tables.noise_rows(found))


@app.command()
def train(
    task: TaskName,
    plan: PlanFile = None,
    epochs: Epochs = None,
    backend: BackendName = Backend.EAGER,
    checkpoint: Annotated[Path | None, typer.Option(help="Written after every epoch.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoint.")] = False,
    weights: From = None,
    promote_every: PromoteEvery = None,
    promote_threshold: PromoteThreshold = THRESHOLD,
    update_rounding: Rounding = UpdateRounding.NEAREST,
    seed: Seed = 0,
    batch_size: BatchSize = None,
    device: Device = "cpu",
    data: Data = None,
    json_file: Json = None,
) -> None:
    """Train a task under a plan, or in plain fp32 without one."""
    chosen = Assignment.load(plan) if plan else None
    loaded = _task(task, seed, batch_size, device, data, epochs)
    name = "plan" if chosen else "fp32"
    result = _trained(
        name,
        loaded,
        chosen,
        _traced(loaded, device),
        backend=backend,
        seed=seed,
        epochs=epochs,
        device=device,
        checkpoint=checkpoint,
        resume=resume,
        promote_every=promote_every,
        promote_threshold=promote_threshold,
        promoted=_promoted(plan) if plan else None,
        update_rounding=update_rounding,
        weights=weights,
    )
    console.print(tables.result_table({name: result}))
    _write(json_file, result.to_json())
    if result.diverged:
        raise typer.Exit(1)


@app.command()
def run(
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
    noise_file: NoiseFile = None,
    formats: Formats = "",
    granularity: Shares = Granularity.GROUP,
    pin: Pins = None,
    epochs: Epochs = None,
    backend: BackendName = Backend.EAGER,
    promote_every: PromoteEvery = None,
    promote_threshold: PromoteThreshold = THRESHOLD,
    update_rounding: Rounding = UpdateRounding.NEAREST,
    seed: Seed = 0,
    batch_size: BatchSize = None,
    device: Device = "cpu",
    data: Data = None,
    json_file: Json = None,
) -> None:
    """The main job: trace, search, train in fp32 and under the plan, print both side by side."""
    loaded = _task(task, seed, batch_size, device, data, epochs)
    table = _traced(loaded, device)
    plan = _searched(
        loaded,
        table,
        device,
        output,
        budget=budget,
        low_ratio=low_ratio,
        strategy=strategy,
        recipe=recipe,
        format_name=format_name,
        optimizer_states=optimizer_states,
        gradients=gradients,
        master=master,
        saved=saved,
        update_rounding=update_rounding,
        noise_file=noise_file,
        formats=formats,
        granularity=granularity,
        pin=pin,
        seed=seed,
    )
    options: dict[str, Any] = {"seed": seed, "epochs": epochs, "device": device}
    baseline = _trained("fp32", loaded, None, table, **options)
    options |= {"promote_every": promote_every, "promote_threshold": promote_threshold, "promoted": _promoted(output)}
    planned = _trained("plan", loaded, plan, table, backend=backend, update_rounding=update_rounding, **options)
    console.print(tables.result_table({"fp32": baseline, "plan": planned}))
    _write(
        json_file, {"baseline": baseline.to_json(), "plan": planned.to_json(), "search": dict(plan.provenance.estimate)}
    )
    if planned.diverged:
        raise typer.Exit(1)


@app.command()
def show(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan's file.")],
    everything: Annotated[bool, typer.Option("--all", help="Every entry.")] = False,
    lowered: Annotated[
        str | None,
        typer.Option(metavar="TASK", help="Which operators of this task's step run in 16 bit, which in 32, and why."),
    ] = None,
    batch_size: BatchSize = None,
    device: Device = "cpu",
    data: Data = None,
    json_file: Json = None,
) -> None:
    """Print a plan: where it came from, its formats, its entries; or what it makes of a task's operators."""
    chosen = Assignment.load(plan)
    if lowered is None:
        console.print(tables.plan_table(chosen, limit=len(chosen.entries) if everything else 20))
        _write(json_file, json.loads(chosen.to_json()))
        return
    table = _traced(_task(lowered, 0, batch_size, device, data, None), device)
    chosen.check_covers([info.key for info in table.paper_tensors], where=str(plan), buffers=table.buffers)
    operators = Lowered(table, chosen.entries).operators(fp8=_torch.multiplies_fp8(check_device(device)))
    console.print(tables.lowered_table(operators))
    _write(json_file, [dataclasses.asdict(each) for each in operators])


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan's file.")],
    second: Annotated[Path, typer.Argument(metavar="PLAN", help="Another.")],
    json_file: Json = None,
) -> None:
    """Print what differs between two plans."""
    found = Assignment.load(first).diff(Assignment.load(second))
    console.print(tables.diff_table(found))
    changed = {key: [a.format, b.format] for key, (a, b) in found.changed.items()}
    _write(json_file, {"changed": changed, "only_first": list(found.only_here), "only_second": list(found.only_there)})


@app.command("compare")
def compare_plans(
    task: TaskName,
    plan: Annotated[list[Path] | None, typer.Option(metavar="PLAN", help="A plan's file; give several.")] = None,
    seeds: Annotated[int, typer.Option(help="Train with the seeds 0 to SEEDS − 1.")] = 3,
    epochs: Epochs = None,
    backend: BackendName = Backend.EAGER,
    promote_every: PromoteEvery = None,
    promote_threshold: PromoteThreshold = THRESHOLD,
    fp32: Annotated[bool, typer.Option("--fp32/--no-fp32", help="Train in plain fp32 too.")] = True,
    batch_size: BatchSize = None,
    device: Device = "cpu",
    data: Data = None,
    json_file: Annotated[
        Path, typer.Option("--json", metavar="FILE", help="The results so far; the same command goes on from it.")
    ] = Path("compare.json"),
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="SVG or PNG, and FILE-curves beside it; by default beside the JSON."),
    ] = None,
) -> None:
    """Train a task under several plans and several seeds; print, write and draw how they compare."""
    chosen = seed_range(seeds)
    variants = load_variants(plan or [], promote_every=promote_every, promote_threshold=promote_threshold, fp32=fp32)
    drawn = pictures.picture_paths(json_file, picture)
    trained: list[Run] = []

    def make_task(seed: int) -> Task:
        options = TaskOptions(data=data, batch_size=batch_size, seed=seed, device=device, epochs=epochs)
        return load_task(task, options)

    with _bar("comparing") as advance:

        def tell(run: Run) -> None:
            trained.append(run)
            console.print(f"trained {run.variant}, seed {run.seed}", markup=False, highlight=False)

        try:
            found = compare(
                make_task,
                variants,
                seeds=chosen,
                file=json_file,
                backend=backend,
                device=device,
                epochs=epochs,
                on_step=lambda variant, seed, step: advance(f"{variant.name}, seed {seed}", step),
                on_run=tell,
            )
        except KeyboardInterrupt:
            console.print(f"stopped: the same command goes on from {json_file}", markup=False, highlight=False)
            raise
    if len(found.runs) > len(trained):
        console.print(f"{len(found.runs) - len(trained)} of {len(found.runs)} runs were in {json_file}", markup=False)
    console.print(tables.comparison_table(found))
    for text in pictures.draw(found, drawn, must=picture is not None):
        console.print(text, markup=False)


@app.command()
def audit(
    task: TaskName,
    format_name: Annotated[str, typer.Option("--format", help="In which training is to go on: fp16, bf16, …")] = "fp16",
    checkpoint: Weights = None,
    seed: Seed = 0,
    batch_size: BatchSize = None,
    device: Device = "cpu",
    data: Data = None,
    json_file: Json = None,
) -> None:
    """Say what a 16-bit format would lose of a task's constants, weights, gradients and updates, before it does."""
    loaded = _task(task, seed, batch_size, device, data, None)
    with console.status("one forward and backward pass in fp32"):
        constants, report = audit_task(loaded, format=format_name, checkpoint=checkpoint, device=device)
    console.print(audits.constants_table(constants), audits.range_table(report))
    _write(json_file, {"constants": [dataclasses.asdict(each) for each in constants], "range": report.to_json()})
    if not report.fits:
        raise typer.Exit(1)


@app.command()
def certify(
    task: TaskName,
    plan: Annotated[Path, typer.Option("--plan", metavar="PLAN", help="A plan's file.")],
    checkpoint: Weights = None,
    epochs: Epochs = None,
    backend: BackendName = Backend.EAGER,
    seed: Seed = 0,
    batch_size: BatchSize = None,
    device: Device = "cpu",
    data: Data = None,
    json_file: Json = None,
) -> None:
    """Certify which predictions of an fp32 model cannot change under a plan; trains it first without a checkpoint."""
    chosen = Assignment.load(plan)
    loaded = _task(task, seed, batch_size, device, data, epochs)
    if checkpoint is None:
        result = _trained("fp32", loaded, None, None, seed=seed, epochs=epochs, device=device)
        model = result.model
    else:
        model = loaded.make_model().to(check_device(device))
        load_weights(checkpoint, model, loaded.make_optimizer(model))
    with console.status("evaluating in fp32 and under the plan"):
        found = certify_task(loaded, model, chosen, backend=backend, device=device)
    console.print(audits.certificate_table(found))
    _write(json_file, found.to_json())


def _task(name: str, seed: int, batch_size: int | None, device: str, data: Path | None, epochs: int | None) -> Task:
    with console.status(f"loading {name}"):
        return load_task(name, TaskOptions(data=data, batch_size=batch_size, seed=seed, device=device, epochs=epochs))


def _traced(task: Task, device: str) -> TensorTable:
    where = check_device(device)
    with console.status("tracing one training step"):
        return trace_step(task.make_model().to(where), move(task.first_batch(), where), task.loss, task.optimizer)


def _rehearsed(task: Task, device: str, plan: Assignment, table: TensorTable, update_rounding: str) -> Rehearsal:
    where = check_device(device)
    model, batch = task.make_model().to(where), move(task.first_batch(), where)
    with console.status("asking Inductor for its program"):
        return rehearse(model, batch, task.loss, plan, table, update_rounding=update_rounding)


def _non_finite(task: Task, device: str) -> frozenset[str]:
    where = check_device(device)
    with console.status("looking for values that are not finite"):
        return non_finite(task.make_model().to(where), move(task.first_batch(), where), task.loss)


def _noise_for(
    task: Task, table: TensorTable, device: str, strategy: str, file: Path | None, plan: Path, **options: Any
) -> NoiseTable | None:
    """Noise from its file; or measured, beside the plan, where the strategy needs it."""
    if file is not None:
        return NoiseTable.load(file)
    if strategy != MILP:
        return None
    return _measured(task, table, device, None, file=plan.with_name(f"{plan.stem}.noise.json"), **options)


def _measured(
    task: Task, table: TensorTable, device: str, checkpoint: Path | None, *, file: Path, seed: int, **options: Any
) -> NoiseTable:
    """Noise of the task's model, as it begins or as the checkpoint has it; ``file`` goes on."""
    where = check_device(device)
    torch.manual_seed(seed)
    model = task.make_model().to(where)
    if checkpoint is not None:
        load_weights(checkpoint, model)
    batches = (move(batch, where) for batch in task.train)
    with console.status("measuring noise") as status:
        found = measure_noise(
            model,
            batches,
            task.loss,
            table=table,
            file=file,
            seed=seed,
            on_batch=lambda so_far: status.update(f"measuring noise: {so_far.batches} batches"),
            **options,
        )
    console.print(
        f"wrote {file}: {len(found.cells)} choices, {found.batches} batches, relative standard error "
        f"{found.relative_error:.3f}",
        markup=False,
    )
    return found


def _task_of_seed(
    name: str, batch_size: int | None, device: str, data: Path | None, epochs: int | None, seed: int
) -> Task:
    """What another process makes its task of."""
    return load_task(name, TaskOptions(data=data, batch_size=batch_size, seed=seed, device=device, epochs=epochs))


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
    command = " ".join(["assign", *sys.argv[1:]])
    names = {}
    for each in found.front:
        path = output if settings.budget is not None else output / f"trial-{each.trial:04}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with_provenance(each.plan, strategy=OPTUNA, seed=settings.seed, command=command, costs=each.costs).save(path)
        names[each.trial] = str(path)
    console.print(tables.front_table(found, names))
    rows = [{"trial": e.trial, "plan": names[e.trial], found.metric: e.metric, **e.costs} for e in found.front]
    _write(json_file, {"trained": found.trained, "pruned": found.pruned, "front": rows})


def _searched(
    task: Task,
    table: TensorTable,
    device: str,
    output: Path,
    *,
    strategy: str,
    recipe: str,
    saved: str | None,
    update_rounding: str,
    noise_file: Path | None,
    formats: str,
    pin: list[str] | None,
    seed: int,
    **options: Any,
) -> Assignment:
    """Search, write the plan and print what it costs; noise from its file, or measured where the strategy needs it."""
    names, pins = split_names(formats), parse_pins(pin or [])
    asked: dict[str, Any] = {"recipe": recipe, "formats": names, "saved": split_names(saved or ""), "pins": pins}
    noise = _noise_for(task, table, device, strategy, noise_file, output, seed=seed, **asked)
    non_finite = _non_finite(task, device) if saved else frozenset()
    with console.status("searching"):
        plan = search_table(
            table,
            strategy=strategy,
            recipe=recipe,
            saved=saved,
            non_finite=non_finite,
            update_rounding=update_rounding,
            noise=noise,
            formats=names,
            pins=pins,
            seed=seed,
            command=" ".join(["assign", *sys.argv[1:]]),
            **options,
        )
    plan.save(output)
    console.print(f"wrote {output}: {len(plan.entries)} tensors", markup=False)
    console.print(tables.estimate_table(estimate_plan(table, plan, update_rounding=update_rounding)))
    if noise is not None:
        console.print(tables.noise_line(plan.provenance.estimate))
    return plan


def _refuse_options(why: str, **given: Any) -> None:
    """Options that would do nothing here."""
    named = [f"--{name}" for name, value in given.items() if value is not None]
    if named:
        raise BudgetError(f"{why} {', '.join(named)}.\n  Leave them out, or use --strategy optuna.")


def _promoted(plan: Path) -> Path:
    """Where the plan goes that training made of the one in ``plan``."""
    return plan.with_name(f"{plan.stem}.promoted{plan.suffix}")


def _trained(
    name: str,
    task: Task,
    plan: Assignment | None,
    table: TensorTable | None,
    *,
    promoted: Path | None = None,
    **options: Any,
) -> TrainResult:
    """Train with a bar, and tell of each promotion; the plan as promoted so far stands in ``promoted``."""
    with _bar(f"training {name}") as advance:

        def tell(step: Progress) -> None:
            advance(name, step)
            for past in step.promoted:
                console.print(tables.promotion_line(past), markup=False, highlight=False)
            if step.promoted and step.plan and promoted:
                step.plan.save(promoted)

        result = train_task(task, plan, table=table, on_step=tell, **options)
    if result.promotions and promoted:
        console.print(f"wrote {promoted}: {len(result.promotions)} tensors promoted", markup=False)
    return result


@contextlib.contextmanager
def _bar(title: str) -> Iterator[Callable[[str, Progress], None]]:
    """A bar of progress on a terminal; yields what moves it: ``advance(name, step)``."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        line = bar.add_task(title, total=None)

        def advance(name: str, step: Progress) -> None:
            total = step.steps_per_epoch and step.steps_per_epoch * step.epochs
            words = f"training {name}, loss {step.loss:.4f}"
            bar.update(line, completed=step.step, total=total, description=words)

        yield advance


def _write(path: Path | None, data: Any) -> None:
    if path is not None:
        path.write_text(json.dumps(data, indent=2) + "\n")
