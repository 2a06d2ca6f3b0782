"""Errors that a user can cause and correct, one class for each kind.

Every message says where, what was asked, what is allowed and what to do.
"""

import difflib
from collections.abc import Iterable


class AssignError(Exception):
    """Base of every error that a user is meant to read and act on."""


class FormatError(AssignError):
    """A number format that does not exist or does not fit its use."""


class TraceError(AssignError):
    """The model or the loss cannot be captured."""


class PlanError(AssignError):
    """A plan file that cannot be read, or that does not belong to this model."""


class OutputError(AssignError):
    """A file that a command cannot or must not write: no regular file, or one that it reads."""


class BudgetError(AssignError):
    """A limit on memory, time or the low ratio that no assignment can meet, or none where one is needed.

    Attributes:
        floor: the fewest bytes found for a step's peak, where a budget was below; else None.
    """

    def __init__(self, message: str, *, floor: int | None = None) -> None:
        super().__init__(message)
        self.floor = floor


class TaskError(AssignError):
    """A task that cannot be loaded or does not keep to its interface."""


class ComparisonError(AssignError):
    """Nothing that can be compared, or a comparison's file that cannot be read or is of another comparison."""


class ReportError(AssignError):
    """A report that cannot be made: a file of it that cannot be read or is of another model, or a missing library."""


class StudyError(AssignError):
    """A search by training that cannot begin or go on: its storage, its settings, its model, or its metric."""


class DivergedError(AssignError):
    """Training whose loss is no longer a finite number."""


def suggest(word: str, allowed: Iterable[str], limit: int = 3) -> str:
    """Names in ``allowed`` that look like ``word``, as text for an error message ('' if none does)."""
    close = difflib.get_close_matches(word, list(allowed), n=limit, cutoff=0.4)
    return ", ".join(repr(str(name)) for name in close)
