"""The command that writes a page about a plan, and how it finds the plan's task."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.main import get_group

from assign.cli.options import BatchSize, Data, Json
from assign.cli.shell import app, command_line, console, open_task, traced, write_json
from assign.errors import ReportError
from assign.fronts import Front
from assign.plan.assignment import Assignment
from assign.plan.memory import estimate
from assign.plan.noise import NoiseTable
from assign.plan.stored import UpdateRounding
from assign.report.page import Report, check_libraries, write_report
from assign.report.page.runs import load_runs


@app.command()
def report(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan's file.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the page goes.")] = Path("report.html"),
    run: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="What train, run or compare wrote with --json; give several."),
    ] = None,
    front: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A directory of plans to put this one among.")
    ] = None,
    noise: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What 'assign noise' found; PLAN.noise.json if it is there.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(metavar="TASK", help="The plan's task; the one it was searched for if left out.")
    ] = None,
    update_rounding: Annotated[
        UpdateRounding | None, typer.Option(help="How updates of 16-bit masters are rounded; as searched if left out.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the model; as searched if left out.")] = None,
    batch_size: BatchSize = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …; as searched if left out.")] = None,
    data: Data = None,
    json_file: Json = None,
) -> None:
    """Write one page about a plan, for a browser: its memory, its tensors, its trainings. It needs no network."""
    check_libraries()
    chosen = Assignment.load(plan)
    runs = load_runs(run or [], chosen.fingerprint)
    beside = Front.load(front) if front else None
    found = noise or _noise_beside(plan)
    given = {"task": task, "seed": seed, "batch_size": batch_size, "device": device, "data": data}
    asked = _asked(chosen) if task is None else {}
    options: dict[str, Any] = {name: asked.get(name) if value is None else value for name, value in given.items()}
    if options["task"] is None:
        raise ReportError(
            f"{plan} does not say which task it was searched for"
            + (f": it was made by {chosen.provenance.command!r}" if chosen.provenance.command else "")
            + ".\n  A report traces one step of that task. Give it: --task digits, or --task train.py:task"
        )
    where = options["device"] or "cpu"
    folder = None if options["data"] is None else Path(options["data"])
    opened = open_task(options["task"], options["seed"] or 0, options["batch_size"], where, folder, None)
    page = Report(
        name=str(plan),
        plan=chosen,
        table=traced(opened, where),
        runs=runs,
        front=beside,
        noise=NoiseTable.load(found) if found else None,
        update_rounding=update_rounding or asked.get("update_rounding") or UpdateRounding.NEAREST,
        command=command_line(),
    )
    with console.status("writing the page"):
        write_report(output, page)
    console.print(f"wrote {output}: open it in a browser", markup=False)
    costs = estimate(page.table, chosen, update_rounding=page.update_rounding)
    write_json(json_file, {"report": str(output), **costs.to_json()})


def _noise_beside(plan: Path) -> Path | None:
    """Where a search puts the noise that it measures itself, if it is there."""
    path = plan.with_name(f"{plan.stem}.noise.json")
    return path if path.is_file() else None


def _asked(plan: Assignment) -> dict[str, Any]:
    """What the command that made a plan was given, by the names of its options; nothing if it was none of these."""
    try:
        name, *arguments = shlex.split(plan.provenance.command.removeprefix("assign "))
    except ValueError:  # no command, or one with a quote that does not end
        return {}
    command = get_group(app).commands.get(name)
    if command is None:
        return {}
    return dict(command.make_context(name, arguments, resilient_parsing=True).params)
