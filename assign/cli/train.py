"""Commands that train a task: in float32, under a plan, or under several plans."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from assign.cli.groups import expand_groups, without
from assign.cli.options import Json, NoiseFile, Output, PlanFile, Strategy, TaskName
from assign.cli.outputs import check_outputs, write_json
from assign.cli.search import measured_for, searched
from assign.cli.shell import app, bar, command_line, console, open_task, promoted_path, traced, trained
from assign.numerics.promotion import PromotionOptions
from assign.plan.plan import Assignment
from assign.plan.space import SearchSpace
from assign.planner import Request
from assign.report import pictures, tables
from assign.strategies.goal import Goal
from assign.tasks import Task, TaskOptions, load_task
from assign.training.compare import compare, load_variants, seed_range
from assign.training.comparison import Run
from assign.training.options import TrainOptions


@app.command()
@expand_groups
def train(
    task: TaskName,
    options: TaskOptions,
    training: TrainOptions,
    plan: PlanFile = None,
    json_file: Json = None,
) -> None:
    """Train a task under a plan, or in plain fp32 without one."""
    promoted = promoted_path(plan) if plan else None
    check_outputs(json_file, inputs=[task, plan, training.weights], continued=[training.checkpoint, promoted])
    chosen = Assignment.load(plan) if plan else None
    loaded = open_task(task, options)
    name = "plan" if chosen else "fp32"
    result = trained(
        name,
        loaded,
        chosen,
        traced(loaded, options, chosen.step if chosen else None).table,
        training,
        promoted=promoted,
    )
    console.print(tables.result_table({name: result}))
    write_json(json_file, result.to_json())
    if result.diverged:
        raise typer.Exit(1)


@app.command()
@expand_groups
def run(
    task: TaskName,
    goal: Goal,
    space: SearchSpace,
    training: Annotated[TrainOptions, without("checkpoint", "resume", "weights", "update_rounding")],
    options: TaskOptions,
    output: Output = Path("plan.json"),
    strategy: Strategy = "greedy",
    noise_file: NoiseFile = None,
    json_file: Json = None,
) -> None:
    """The main job: trace and search, train in fp32 and under the plan, and print both results side by side."""
    check_outputs(output, json_file, inputs=[task, noise_file])
    request = Request(goal=goal, strategy=strategy, space=space, seed=options.seed, command=command_line())
    loaded = open_task(task, options)
    step = traced(loaded, options, space.step)
    measured, table = measured_for(loaded, step, request, noise_file, output), step.table
    del step  # frees the model too
    plan = searched(table, output, request, measured)
    whole = table if space.step.micro_batches == 1 else traced(loaded, options).table
    baseline = trained("fp32", loaded, None, whole, replace(training, promotion=PromotionOptions()))
    planned = trained("plan", loaded, plan, table, training, promoted=promoted_path(output))
    console.print(tables.result_table({"fp32": baseline, "plan": planned}))
    write_json(
        json_file, {"baseline": baseline.to_json(), "plan": planned.to_json(), "search": dict(plan.provenance.estimate)}
    )
    if planned.diverged:
        raise typer.Exit(1)


@app.command("compare")
@expand_groups
def compare_plans(
    task: TaskName,
    training: Annotated[TrainOptions, without("seed", "checkpoint", "resume", "weights", "update_rounding")],
    options: Annotated[TaskOptions, without("seed")],
    plan: Annotated[list[Path] | None, typer.Option(metavar="PLAN", help="A plan's file. May be repeated.")] = None,
    seeds: Annotated[int, typer.Option(help="Train with the seeds 0 to SEEDS − 1.")] = 3,
    fp32: Annotated[bool, typer.Option("--fp32/--no-fp32", help="Also train in plain fp32.")] = True,
    json_file: Annotated[
        Path, typer.Option("--json", metavar="FILE", help="File for the results. Run the same command to resume.")
    ] = Path("compare.json"),
    picture: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="SVG or PNG file; curves go to FILE-curves next to it. Default: next to the JSON."
        ),
    ] = None,
) -> None:
    """Train a task under several plans and several seeds; print, write and draw how they compare."""
    chosen = seed_range(seeds)
    variants = load_variants(plan or [], fp32=fp32)
    drawn = pictures.picture_paths(json_file, picture)
    check_outputs(*(drawn if picture else ()), inputs=[task, *(plan or [])], continued=[json_file])
    trained: list[Run] = []

    def make_task(seed: int) -> Task:
        return load_task(task, replace(options, seed=seed))

    with bar("comparing") as advance:

        def on_run(run: Run) -> None:
            trained.append(run)
            console.print(f"trained {run.variant}, seed {run.seed}", highlight=False)

        found = compare(
            make_task,
            variants,
            seeds=chosen,
            file=json_file,
            options=training,
            on_step=lambda variant, seed, step: advance(f"{variant.name}, seed {seed}, loss {step.loss:.4f}", step),
            on_run=on_run,
        )
    if len(found.runs) > len(trained):
        console.print(f"{len(found.runs) - len(trained)} of {len(found.runs)} runs were read from {json_file}")
    console.print(tables.comparison_table(found))
    for text in pictures.draw(found, drawn, required=picture is not None):
        console.print(text)
