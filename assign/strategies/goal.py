"""Goals of a search, and the errors for goals that cannot be met."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from scipy.sparse import csr_array

from assign.errors import BudgetError
from assign.options import option
from assign.plan.latency_table import parse_step_time
from assign.plan.plan import Entry

PeakBytes = Callable[[Mapping[str, Entry]], int]
"""Peak bytes of one training step under these entries."""

Integers = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]

MIB = 2**20

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Timeline(Protocol):
    """Bytes of one training step, moment by moment; the largest of them is its peak."""

    def at(self, entries: Mapping[str, Entry]) -> Integers:
        """Return the bytes alive at each moment of a step under these entries, as an array ``[moments]``."""

    def steps(self, entries: Mapping[str, Entry], changes: Sequence[Mapping[str, Entry]]) -> csr_array:
        """Return how each change to these entries affects :meth:`at`: ``[changes, moments]``.

        Rows are differences between moments, so most values are zero. The cumulative sum along a row is the change's
        effect.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """Limits that a plan must meet; each may be left out.

    Attributes:
        budget: Peak memory of a step: ``512MiB``, ``6GB``, a number of bytes, or ``50%`` of the peak without a plan.
        low_ratio: Share of the elements in low formats, 0 to 1.
        max_step_time: Limit on a forward and backward pass, operator by operator: seconds, ``200ms``, or ``1.3x`` of
            the time with all tensors in their high formats. Requires the strategy ``milp``.
    Raises:
        BudgetError: a share outside 0 to 1, a budget that is not a positive number of bytes, or an invalid time.
    """

    budget: str | int | None = field(default=None, metadata=option(type=str))
    low_ratio: float | None = None
    max_step_time: str | float | None = field(default=None, metadata=option(type=str))

    def __post_init__(self) -> None:
        if self.low_ratio is not None and not 0 <= self.low_ratio <= 1:
            raise BudgetError(f"the low ratio is {self.low_ratio}; it is a share of the elements, from 0 to 1.")
        if isinstance(self.budget, str):
            parse_budget(self.budget, 1)
        elif self.budget is not None and not 0 < self.budget < math.inf:
            raise BudgetError(f"the budget is {self.budget} bytes; give a positive number of bytes.")
        if self.max_step_time is not None:
            parse_step_time(self.max_step_time, 1.0)

    def resolve(self, baseline: int) -> "Goal":
        """Return the same goal with its budget in bytes.

        Args:
            baseline: peak of a step without a plan, in bytes.
        Raises:
            BudgetError: the budget is not a positive number of bytes.
        """
        return self if self.budget is None else replace(self, budget=parse_budget(self.budget, baseline))

    @property
    def budget_bytes(self) -> int | None:
        """The budget of a resolved goal, in bytes."""
        assert not isinstance(self.budget, str)
        return self.budget

    def required(self) -> "Goal":
        """Return the goal after checking that it has a low ratio or a budget.

        Raises:
            BudgetError: it has neither.
        """
        if self.low_ratio is None and self.budget is None:
            raise BudgetError("a search needs a goal: give a low ratio (0 to 1), a budget in bytes, or both.")
        return self

    def enough_low(self, low_elements: int, elements: int) -> bool:
        """Whether ``low_elements`` of ``elements`` reach the low ratio (true if there is none)."""
        if self.low_ratio is None or elements == 0:
            return True
        return low_elements / elements >= self.low_ratio

    def within_budget(self, peak: int) -> bool:
        """Whether a step with this peak fits (true if there is no budget)."""
        return self.budget_bytes is None or peak <= self.budget_bytes


def over_budget(goal: Goal, floor: int, tried: str) -> BudgetError:
    """Return the error for a budget that no plan met; ``floor`` is the lowest peak, ``tried`` says what was tried."""
    asked = goal.budget_bytes or 0
    return BudgetError(
        f"the budget is {asked} bytes ({asked / MIB:.1f} MiB), but {tried} a training step still needs "
        f"{floor} bytes ({floor / MIB:.1f} MiB) at its peak.\n"
        f"  Ask for at least {floor} bytes, make the batch smaller, choose a recipe with narrower low "
        "formats, or store less between steps: narrower optimizer states, gradients or masters.",
        floor=floor,
    )


def parse_budget(text: str | int, baseline: int) -> int:
    """Return the bytes in ``512MiB``, ``6GB``, ``1000000`` or ``50%`` (of ``baseline`` bytes).

    Raises:
        BudgetError: the text is none of these.
    """
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*|%)\s*", text)
    if match and match[2] == "%":
        return int(float(match[1]) / 100 * baseline)
    if match and match[2].upper() in _UNITS:
        return int(float(match[1]) * _UNITS[match[2].upper()])
    raise BudgetError(
        f"search: {text!r} is not a budget. Write bytes ('512MiB', '6GB', '1000000') "
        "or a share of the peak without a plan ('50%')."
    )
