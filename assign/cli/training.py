"""Commands that train a task: in float32, under a plan, or under several plans."""

from pathlib import Path
from typing import Annotated, Any

import typer

from assign.cli.options import (
    BackendName,
    BatchSize,
    Budget,
    Data,
    Device,
    Epochs,
    Format,
    Formats,
    From,
    Gradients,
    Json,
    LowRatio,
    Master,
    NoiseFile,
    OptimizerStates,
    Output,
    Pins,
    PlanFile,
    PlanRounding,
    PromoteEvery,
    PromoteThreshold,
    Recipe,
    Rounding,
    Saved,
    Seed,
    Shares,
    StepTime,
    Strategy,
    TaskName,
)
from assign.cli.outputs import check_outputs, write_json
from assign.cli.searching import prepare_search, searched
from assign.cli.shell import app, bar, console, open_task, promoted_path, traced, trained
from assign.executor.backends import Backend
from assign.numerics.promotion import THRESHOLD
from assign.plan.assignment import Assignment
from assign.plan.stored import UpdateRounding
from assign.report import pictures, tables
from assign.strategies.milp import Granularity
from assign.tasks import Task, TaskOptions, load_task
from assign.training.comparing import compare, load_variants, seed_range
from assign.training.comparison import Run


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
    update_rounding: PlanRounding = None,
    seed: Seed = 0,
    batch_size: BatchSize = None,
    device: Device = "cpu",
    data: Data = None,
    json_file: Json = None,
) -> None:
    """Train a task under a plan, or in plain fp32 without one."""
    promoted = promoted_path(plan) if plan else None
    check_outputs(json_file, inputs=[task, plan, weights], continued=[checkpoint, promoted])
    chosen = Assignment.load(plan) if plan else None
    loaded = open_task(task, seed, batch_size, device, data, epochs)
    name = "plan" if chosen else "fp32"
    result = trained(
        name,
        loaded,
        chosen,
        traced(loaded, device),
        backend=backend,
        seed=seed,
        epochs=epochs,
        device=device,
        checkpoint=checkpoint,
        resume=resume,
        promote_every=promote_every,
        promote_threshold=promote_threshold,
        promoted=promoted,
        update_rounding=update_rounding,
        weights=weights,
    )
    console.print(tables.result_table({name: result}))
    write_json(json_file, result.to_json())
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
    max_step_time: StepTime = None,
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
    check_outputs(output, json_file, inputs=[task, noise_file])
    loaded = open_task(task, seed, batch_size, device, data, epochs)
    table = traced(loaded, device)
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
        optimizer_states=optimizer_states,
        gradients=gradients,
        master=master,
        saved=saved,
        update_rounding=update_rounding,
        noise_file=noise_file,
        formats=formats,
        granularity=granularity,
        pin=pin,
        max_step_time=max_step_time,
        seed=seed,
    )
    plan = searched(table, output, asked)
    options: dict[str, Any] = {"seed": seed, "epochs": epochs, "device": device}
    baseline = trained("fp32", loaded, None, table, **options)
    options |= {
        "promote_every": promote_every,
        "promote_threshold": promote_threshold,
        "promoted": promoted_path(output),
    }
    planned = trained("plan", loaded, plan, table, backend=backend, **options)
    console.print(tables.result_table({"fp32": baseline, "plan": planned}))
    write_json(
        json_file, {"baseline": baseline.to_json(), "plan": planned.to_json(), "search": dict(plan.provenance.estimate)}
    )
    if planned.diverged:
        raise typer.Exit(1)


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
    check_outputs(*(drawn if picture else ()), inputs=[task, *(plan or [])], continued=[json_file])
    trained: list[Run] = []

    def make_task(seed: int) -> Task:
        options = TaskOptions(data=data, batch_size=batch_size, seed=seed, device=device, epochs=epochs)
        return load_task(task, options)

    with bar("comparing") as advance:

        def tell(run: Run) -> None:
            trained.append(run)
            console.print(f"trained {run.variant}, seed {run.seed}", highlight=False)

        found = compare(
            make_task,
            variants,
            seeds=chosen,
            file=json_file,
            backend=backend,
            device=device,
            epochs=epochs,
            on_step=lambda variant, seed, step: advance(f"{variant.name}, seed {seed}, loss {step.loss:.4f}", step),
            on_run=tell,
        )
    if len(found.runs) > len(trained):
        console.print(f"{len(found.runs) - len(trained)} of {len(found.runs)} runs were in {json_file}")
    console.print(tables.comparison_table(found))
    for text in pictures.draw(found, drawn, must=picture is not None):
        console.print(text)
