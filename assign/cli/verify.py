"""Commands that check what lower precision would change."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from assign.analysis.audit import audit_task
from assign.analysis.certificate import certify_task
from assign.cli.groups import expand_groups, without
from assign.cli.options import BackendName, Json, TaskName, Weights
from assign.cli.outputs import check_outputs, write_json
from assign.cli.shell import app, console, open_task, trained
from assign.executor.backends import Backend
from assign.plan.plan import Assignment
from assign.report import audits
from assign.tasks import TaskOptions, check_device
from assign.training.options import TrainOptions
from assign.training.weights import load_weights


@app.command()
@expand_groups
def audit(
    task: TaskName,
    options: Annotated[TaskOptions, without("epochs")],
    format_name: Annotated[
        str, typer.Option("--format", help="Format to continue training in: fp16, bf16, …")
    ] = "fp16",
    checkpoint: Weights = None,
    json_file: Json = None,
) -> None:
    """Detect values of a task that a 16-bit format would lose, in constants, weights, gradients and updates."""
    check_outputs(json_file, inputs=[task, checkpoint])
    loaded = open_task(task, options)
    with console.status("one forward and backward pass in fp32"):
        constants, report = audit_task(loaded, format=format_name, checkpoint=checkpoint, device=options.device)
    console.print(audits.constants_table(constants), audits.range_table(report))
    write_json(json_file, {"constants": [dataclasses.asdict(each) for each in constants], "range": report.to_json()})
    if not report.fits:
        raise typer.Exit(1)


@app.command()
@expand_groups
def certify(
    task: TaskName,
    plan: Annotated[Path, typer.Option("--plan", metavar="PLAN", help="A plan's file.")],
    options: TaskOptions,
    checkpoint: Weights = None,
    backend: BackendName = Backend.EAGER,
    json_file: Json = None,
) -> None:
    """Certify which predictions of an fp32 model cannot change under a plan; trains it first without a checkpoint."""
    check_outputs(json_file, inputs=[task, plan, checkpoint])
    chosen = Assignment.load(plan)
    loaded = open_task(task, options)
    if checkpoint is None:
        training = TrainOptions(seed=options.seed, epochs=options.epochs, device=options.device)
        result = trained("fp32", loaded, None, None, training)
        model = result.model
    else:
        model = loaded.make_model().to(check_device(options.device))
        load_weights(checkpoint, model, loaded.make_optimizer(model))
    with console.status("evaluating in fp32 and under the plan"):
        found = certify_task(loaded, model, chosen, backend=backend, device=options.device)
    console.print(audits.certificate_table(found))
    write_json(json_file, found.to_json())
