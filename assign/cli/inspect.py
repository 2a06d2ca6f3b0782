"""Commands that inspect formats, training steps and plans."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from assign import _torch
from assign.atomic_write import is_stdout
from assign.cli.groups import expand_groups, without
from assign.cli.options import BackendName, Json, PlanFile, PlanRounding, TaskName
from assign.cli.origin import Origin, OriginOptions, origin_of
from assign.cli.outputs import check_outputs, write_json
from assign.cli.shell import app, console, open_task, traced
from assign.errors import AssignError
from assign.executor.backends import Backend
from assign.executor.compiled_memory import Rehearsal, log_passes, rehearse
from assign.formats.parsing import parse_saved
from assign.formats.rows import FORMATS, SAVED_FORMATS, BlockFormat
from assign.memory.estimate import estimate as estimate_plan
from assign.plan.compute_dtype import operators
from assign.plan.plan import Assignment
from assign.planner import search_table, summary
from assign.report import tables
from assign.report.plans import diff_table, plan_table, planned_step
from assign.tasks import TaskOptions, check_device
from assign.tasks.batch import move
from assign.tracing.step import Step
from assign.tracing.tracer import largest_part


@app.command()
def formats(
    names: Annotated[
        list[str] | None, typer.Argument(help="Formats to show, e.g. 'fp(4,3,4)' or 'bf16:sr'. Default: all.")
    ] = None,
    json_file: Json = None,
) -> None:
    """List the number formats: range, precision, and how each is stored."""
    check_outputs(json_file)
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
    write_json(json_file, found)


@app.command()
def schema(json_file: Json = None) -> None:
    """Print the JSON schema of a plan's file."""
    check_outputs(json_file)
    if json_file is None or not is_stdout(json_file):
        typer.echo(json.dumps(Assignment.schema(), indent=2))
    write_json(json_file, Assignment.schema())


@app.command()
@expand_groups
def trace(
    task: TaskName,
    options: Annotated[TaskOptions, without("epochs")],
    json_file: Json = None,
) -> None:
    """List every tensor of one training step, without running it."""
    check_outputs(json_file, inputs=[task])
    table = traced(open_task(task, options), options)
    console.print(tables.trace_table(table))
    write_json(json_file, table.to_json())


@app.command()
@expand_groups
def estimate(
    task: TaskName,
    options: Annotated[TaskOptions, without("epochs")],
    plan: PlanFile = None,
    backend: BackendName = Backend.EAGER,
    update_rounding: PlanRounding = None,
    json_file: Json = None,
) -> None:
    """Predict the memory of one training step under a plan (or as the model is loaded), before anything runs."""
    check_outputs(json_file, inputs=[task, plan])
    loaded = Assignment.load(plan) if plan else None
    table = traced(open_task(task, options), options, loaded.step if loaded else None)
    chosen = loaded or search_table(table, strategy="as-loaded")
    chosen = chosen.with_update_rounding(update_rounding, where="estimate")
    costs = estimate_plan(table, chosen)
    compiled = _rehearsed(table, chosen) if backend is Backend.INDUCTOR else None
    console.print(tables.estimate_table(costs, compiled))
    more = {"compiled": dataclasses.asdict(compiled)} if compiled else {}
    write_json(json_file, {**summary(costs, 0.0), **costs.to_json(), **more})


@app.command()
@expand_groups
def show(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan's file.")],
    given: OriginOptions,
    everything: Annotated[bool, typer.Option("--all", help="Also list every entry.")] = False,
    lowered: Annotated[
        bool,
        typer.Option("--lowered", help="List which operators of a step run in 16 bits and which in 32, with reasons."),
    ] = False,
    log_file: Annotated[
        Path | None,
        typer.Option(
            "--log-passes",
            metavar="FILE",
            help="Write what each graph pass adds and removes, for both backends, as JSON; - is standard output.",
        ),
    ] = None,
    json_file: Json = None,
) -> None:
    """Print a plan: its origin, its memory by role, its formats and its largest tensors."""
    check_outputs(json_file, log_file, inputs=[plan, given.task])
    chosen = Assignment.load(plan)
    origin = origin_of(plan, chosen, given)
    if log_file is not None:
        write_json(log_file, _passes(chosen, origin))
    if lowered:
        _show_lowered(chosen, origin, json_file)
        return
    step, why = None, ""
    try:
        step = planned_step(origin.table(chosen.step), chosen)
    except AssignError as error:
        if given.task is not None:  # the user asked for it
            raise
        why = f"Memory by role is not known: {error}"
    console.print(plan_table(chosen, step, everything=everything))
    console.print(why, highlight=False, end="\n" if why else "")
    facts = {"plan": json.loads(chosen.to_json()), "step": step and step.to_json()}
    write_json(json_file, facts)


def _passes(plan: Assignment, origin: Origin) -> dict[str, list[dict[str, Any]]]:
    """Return what each graph pass changes in the plan's step, by backend."""
    task, where = origin.open(), check_device(origin.device)
    model = task.make_model().to(where)
    batch = largest_part(move(task.first_batch(), where), plan.step.micro_batches)
    with console.status("running the graph passes"):
        found = {each: log_passes(model, batch, task.loss, plan, backend=each) for each in Backend}
    return {str(backend): [dataclasses.asdict(each) for each in changes] for backend, changes in found.items()}


def _show_lowered(plan: Assignment, origin: Origin, json_file: Path | None) -> None:
    table = origin.table(plan.step)
    plan.check_fits(table, where=str(origin.plan))
    rows = operators(table, plan.entries, fp8=_torch.multiplies_fp8(check_device(origin.device)))
    console.print(tables.lowered_table(rows))
    write_json(json_file, [dataclasses.asdict(each) for each in rows])


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan's file.")],
    second: Annotated[Path, typer.Argument(metavar="PLAN", help="The plan's file to compare it with.")],
    json_file: Json = None,
) -> None:
    """Print the differences between two plans."""
    check_outputs(json_file, inputs=[first, second])
    found = Assignment.load(first).diff(Assignment.load(second))
    console.print(diff_table(found))
    changed = {key: [a.format, b.format] for key, (a, b) in found.changed.items()}
    write_json(
        json_file,
        {
            "changed": changed,
            "only_first": list(found.only_here),
            "only_second": list(found.only_there),
            "update_rounding": found.update_rounding,
            "step": [each.to_json() for each in found.step] if found.step else None,
        },
    )


def _rehearsed(step: Step, plan: Assignment) -> Rehearsal:
    with console.status("compiling the step with Inductor"):
        return rehearse(step, plan=plan)
