"""What every command needs: the application, its console, a task opened and traced, JSON written, a bar of progress."""

import contextlib
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from assign.plan.assignment import Assignment
from assign.plan.tensors import TensorTable
from assign.report import tables
from assign.tasks import Task, TaskOptions, check_device, load_task
from assign.tasks.batch import move
from assign.tracing.tracer import trace as trace_step
from assign.training.loop import Progress, TrainResult
from assign.training.loop import train as train_task

app = typer.Typer(
    help="Find the cheapest number format for every tensor of a PyTorch training step, and train with it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(width=None if sys.stdout.isatty() else 140)  # piped: plain, and wide enough for long keys


def open_task(name: str, seed: int, batch_size: int | None, device: str, data: Path | None, epochs: int | None) -> Task:
    """The task of a command's arguments."""
    with console.status(f"loading {name}"):
        return load_task(name, TaskOptions(data=data, batch_size=batch_size, seed=seed, device=device, epochs=epochs))


def traced(task: Task, device: str) -> TensorTable:
    """Every tensor of one step of the task."""
    where = check_device(device)
    with console.status("tracing one training step"):
        return trace_step(task.make_model().to(where), move(task.first_batch(), where), task.loss, task.optimizer)


def trained(
    name: str,
    task: Task,
    plan: Assignment | None,
    table: TensorTable | None,
    *,
    promoted: Path | None = None,
    **options: Any,
) -> TrainResult:
    """Train with a bar, and tell of each promotion; the plan as promoted so far stands in ``promoted``."""
    with bar(f"training {name}") as advance:

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


def promoted_path(plan: Path) -> Path:
    """Where the plan goes that training made of the one in ``plan``."""
    return plan.with_name(f"{plan.stem}.promoted{plan.suffix}")


@contextlib.contextmanager
def bar(title: str) -> Iterator[Callable[[str, Progress], None]]:
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


def command_line() -> str:
    """What the user ran, so that a shell takes it again."""
    return shlex.join(["assign", *sys.argv[1:]])


def write_json(path: Path | None, data: Any) -> None:
    """What ``--json FILE`` asks for; nothing without a path."""
    if path is not None:
        path.write_text(json.dumps(data, indent=2) + "\n")
