"""Errors that a user can cause and correct, one class per kind.

Every message says where, what was asked, what is allowed and what to do.
"""

import difflib
from collections.abc import Iterable


class AssignError(Exception):
    """Base class of all errors that a user is meant to read and act on."""


class FormatError(AssignError):
    """A number format does not exist or is not allowed for its use."""


class TraceError(AssignError):
    """The model or the loss cannot be captured."""


class PlanError(AssignError):
    """A plan's file cannot be read, or the plan does not belong to this model."""


class OutputError(AssignError):
    """A command cannot write a file: it is not a regular file, or it is also an input."""


class BudgetError(AssignError):
    """No plan meets a limit on memory, time or the low ratio, or a limit that is needed is missing.

    Attributes:
        floor: the lowest peak that was found, in bytes, if a budget was below it; else None.
    """

    def __init__(self, message: str, *, floor: int | None = None) -> None:
        super().__init__(message)
        self.floor = floor


class TaskError(AssignError):
    """A task cannot be loaded or does not implement its interface."""


class ComparisonError(AssignError):
    """There is nothing to compare, or a comparison's file cannot be read or belongs to another comparison."""


class ReportError(AssignError):
    """A report cannot be made: a file cannot be read or belongs to another model, or a library is missing."""


class StudyError(AssignError):
    """A search by training cannot start or resume because of its storage, settings, model or metric."""


class DivergedError(AssignError):
    """The loss of a training is no longer finite."""


def suggest(word: str, allowed: Iterable[str], limit: int = 3) -> str:
    """Return the names in ``allowed`` that are similar to ``word``, as text for an error message ('' if none is)."""
    close = difflib.get_close_matches(word, list(allowed), n=limit, cutoff=0.4)
    return ", ".join(repr(str(name)) for name in close)
