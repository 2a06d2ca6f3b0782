"""Shared parts of all commands: the application, the console, tasks, tables, progress bars."""

import contextlib
import shlex
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from assign.atomic_write import is_stdout
from assign.memory.estimate import peak_of
from assign.notebook import human_bytes
from assign.passwords import mask_argument
from assign.plan.plan import Assignment
from assign.plan.step_options import StepOptions
from assign.plan.table import TensorTable
from assign.report import tables
from assign.report.terminal import Terminal
from assign.tasks import Task, TaskOptions, check_device, load_task
from assign.tasks.batch import move
from assign.tracing.step import Step
from assign.tracing.tracer import trace as trace_step
from assign.training.history import EpochResult, TrainResult
from assign.training.loop import Progress
from assign.training.loop import train as train_task
from assign.training.options import TrainOptions

_RECENT = 20  # number of steps whose median time is shown

app = typer.Typer(
    help="Find the cheapest number format for every tensor of a PyTorch training step, and train with it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Terminal(width=None if sys.stdout.isatty() else 140)  # piped: plain, and wide enough for long keys


def open_task(name: str, options: TaskOptions) -> Task:
    """Return the task of a command's arguments."""
    with console.status(f"loading {name}"):
        return load_task(name, options)


def traced(task: Task, options: TaskOptions, step: StepOptions | None = None) -> Step:
    """Return one step of the task, with weights initialized by its seed, carried out as ``step`` says."""
    where = check_device(options.device)
    with console.status("tracing one training step"):
        torch.manual_seed(options.seed)
        model, batch = task.make_model().to(where), move(task.first_batch(), where)
        parts = step.micro_batches if step else 1
        return trace_step(model, batch, task.loss, task.optimizer, micro_batches=parts)


def trained(
    name: str,
    task: Task,
    plan: Assignment | None,
    table: TensorTable | None,
    options: TrainOptions,
    *,
    promoted: Path | None = None,
) -> TrainResult:
    """Train with a progress bar and print each promotion; write the plan with its promotions to ``promoted``."""
    if plan is not None:
        plan = plan.with_update_rounding(options.update_rounding, where="train")
        options = replace(options, update_rounding=None)
    meter = Meter(None if table is None else peak_of(table, plan))
    with bar(f"training {name}") as advance:

        def on_step(step: Progress) -> None:
            advance(f"{name}, {meter.after(step)}", step)
            for past in step.promoted:
                console.print(tables.promotion_line(past), highlight=False)
            if step.promoted and step.plan and promoted:
                step.plan.save(promoted)

        result = train_task(task, plan, table=table, options=options, on_step=on_step, on_epoch=meter.after_epoch)
    if result.promotions and promoted:
        console.print(f"wrote {promoted}: {len(result.promotions)} tensors promoted")
    return result


class Meter:
    """Text of a progress bar: loss, metrics, seconds per step, peak, promotions.

    Args:
        peak: predicted bytes of a step; None if they are not known.
        clock: returns the time in seconds.
    """

    def __init__(self, peak: int | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self._peak, self._clock = peak, clock
        self._last = clock()
        self._seconds: deque[float] = deque(maxlen=_RECENT)
        self._metrics: Mapping[str, float] = {}
        self._promoted = 0

    def after(self, step: Progress) -> str:
        """Return the text for the state of training after a step."""
        now = self._clock()
        self._seconds.append(now - self._last)
        self._last = now
        self._promoted += len(step.promoted)
        parts = [f"loss {step.loss:.4f}", *(f"{name} {value:.4g}" for name, value in self._metrics.items())]
        parts.append(f"{statistics.median(self._seconds) * 1e3:.0f} ms per step")
        if self._peak is not None:
            parts.append(f"peak {human_bytes(self._peak)}")
        if self._promoted:
            parts.append(f"{self._promoted} promoted")
        return ", ".join(parts)

    def after_epoch(self, _number: int, epoch: EpochResult) -> None:
        """Take the metrics of an epoch, and start the time of the next step."""
        self._metrics = epoch.metrics
        self._last = self._clock()


def promoted_path(plan: Path) -> Path:
    """Return the path for the plan with the promotions of a training under ``plan``."""
    plan = named(plan)
    return plan.with_name(f"{plan.stem}.promoted{plan.suffix}")


def named(plan: Path) -> Path:
    """Return the path that names the files next to a plan: ``plan.json`` if the plan goes to standard output."""
    return Path("plan.json") if is_stdout(plan) else plan


@contextlib.contextmanager
def bar(title: str) -> Iterator[Callable[[str, Progress], None]]:
    """Show a progress bar on a terminal; yield the function that advances it: ``advance(words, step)``."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        line = bar.add_task(title, total=None)

        def advance(words: str, step: Progress) -> None:
            total = step.steps_per_epoch and step.steps_per_epoch * step.epochs
            bar.update(line, completed=step.step, total=total, description=f"training {words}")

        yield advance


def command_line() -> str:
    """Return the command that the user ran, quoted for a shell, with passwords masked."""
    return shlex.join(["assign", *map(mask_argument, sys.argv[1:])])
