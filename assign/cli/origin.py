"""Find the task that a plan was searched for, from the command in its file or from the user."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from typer.main import get_group

from assign.cli.shell import app, open_task, traced
from assign.errors import TaskError
from assign.options import option
from assign.plan.plan import Assignment
from assign.plan.step_options import StepOptions
from assign.plan.table import TensorTable
from assign.tasks import Task, TaskOptions
from assign.tasks.builtin import BUILTIN


@dataclass(frozen=True, slots=True, kw_only=True)
class OriginOptions:
    """The task that a plan was searched for, as far as the user names it; the rest is as in the search.

    Attributes:
        task: The plan's task. Default: the one it was searched for.
        batch_size: Samples per step. Default: as in the search.
        device: cpu, cuda, and so on. Default: as in the search.
        data: Directory with the task's data. Default: as in the search.
    """

    task: str | None = field(default=None, metadata=option("--task", metavar="TASK"))
    batch_size: int | None = None
    device: str | None = None
    data: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The task that a plan was searched for, or that the user names instead.

    Attributes:
        plan: path of the plan.
        task: None if the user names none and the plan was not searched for a built-in one. The other options are as
            given, or as in the search.
        own_task: the task that the plan was searched for, if it is not built in. Its code is not run, because the user
            has not named it.
        command: the command that made the plan.
    """

    plan: Path
    task: str | None
    own_task: str | None
    batch_size: int | None
    device: str
    data: Path | None
    command: str

    def table(self, step: StepOptions) -> TensorTable:
        """Return every tensor of one step of the task, carried out as ``step`` says.

        Raises:
            TaskError: no task is known.
            AssignError: it cannot be loaded or traced.
        """
        return traced(self.open(), self._options, step).table

    def open(self) -> Task:
        """Load the task.

        Raises:
            TaskError: no task is known.
            AssignError: it cannot be loaded.
        """
        if self.task is None and self.own_task:
            raise TaskError(
                f"{self.plan} was searched for the task {self.own_task!r}, which is not built in. Code that is "
                "named only in a plan's file is not run.\n"
                f"  If you trust it, name it yourself: --task {shlex.quote(self.own_task)}"
            )
        if self.task is None:
            made = f": it was made by {self.command!r}" if self.command else ""
            raise TaskError(
                f"{self.plan} does not say which task it was searched for{made}.\n"
                "  One step of that task must be traced. Name it: --task digits, or --task train.py:task"
            )
        return open_task(self.task, self._options)

    @property
    def _options(self) -> TaskOptions:
        return TaskOptions(batch_size=self.batch_size, device=self.device, data=self.data)


def origin_of(path: Path, plan: Assignment, given: OriginOptions) -> Origin:
    """Return the origin of a plan: what the user gives, and otherwise what the command that made the plan was given."""
    searched = _search_options(plan)
    folder = given.data or searched.get("data")
    named = searched.get("task")
    return Origin(
        plan=path,
        task=given.task or (named if named in BUILTIN else None),
        own_task=None if named in BUILTIN else named,
        batch_size=given.batch_size or searched.get("batch_size"),
        device=given.device or searched.get("device") or "cpu",
        data=None if folder is None else Path(folder),
        command=plan.provenance.command,
    )


def _search_options(plan: Assignment) -> dict[str, Any]:
    """Return the options of the command that made a plan, by name; empty if it was not one of these commands."""
    try:
        name, *arguments = shlex.split(plan.provenance.command.removeprefix("assign "))
    except ValueError:  # no command, or one with an unclosed quote
        return {}
    command = get_group(app).commands.get(name)
    if command is None:
        return {}
    return dict(command.make_context(name, arguments, resilient_parsing=True).params)
