"""The command that writes a page about a plan."""

from pathlib import Path
from typing import Annotated

import typer

from assign.cli.groups import expand_groups
from assign.cli.options import Json
from assign.cli.origin import OriginOptions, origin_of
from assign.cli.outputs import check_outputs, write_json
from assign.cli.shell import app, command_line, console
from assign.memory.estimate import estimate
from assign.pareto import Front
from assign.plan.noise_table import NoiseTable
from assign.plan.plan import Assignment
from assign.report.page import Report, check_libraries, write_report
from assign.report.page.runs import load_runs


@app.command()
@expand_groups
def report(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan's file.")],
    given: OriginOptions,
    output: Annotated[Path, typer.Option("-o", "--output", help="File for the page; - is standard output.")] = Path(
        "report.html"
    ),
    run: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Result of train, run or compare --json. May be repeated."),
    ] = None,
    front: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Directory of plans to compare this one with.")
    ] = None,
    noise: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Noise table of 'assign noise'. Default: PLAN.noise.json if it exists."),
    ] = None,
    json_file: Json = None,
) -> None:
    """Write a page about a plan for a browser: memory, tensors and trainings. The page needs no network."""
    check_libraries()
    check_outputs(output, json_file, inputs=[plan, given.task, noise or _noise_next_to(plan), front, *(run or [])])
    chosen = Assignment.load(plan)
    runs = load_runs(run or [], chosen.fingerprint)
    others = Front.load(front) if front else None
    found = noise or _noise_next_to(plan)
    origin = origin_of(plan, chosen, given)
    page = Report(
        name=str(plan),
        plan=chosen,
        table=origin.table(chosen.step),
        runs=runs,
        front=others,
        noise=NoiseTable.load(found) if found else None,
        command=command_line(),
    )
    with console.status("writing the page"):
        write_report(output, page)
    console.print(f"wrote {output}: open it in a browser")
    costs = estimate(page.table, chosen)
    write_json(json_file, {"report": str(output), **costs.to_json()})


def _noise_next_to(plan: Path) -> Path | None:
    """Return the path of the noise that a search measured for this plan, or None if there is no such file."""
    path = plan.with_name(f"{plan.stem}.noise.json")
    return path if path.is_file() else None
