"""Goals of a search, and the errors for goals that cannot be met."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from scipy.sparse import csr_array

from assign.errors import BudgetError, PlanError
from assign.plan.assignment import Entry

PeakBytes = Callable[[Mapping[str, Entry]], int]
"""Peak bytes of one training step under these entries."""

Integers = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]

MIB = 2**20

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Timeline(Protocol):
    """Bytes of one training step, moment by moment; the largest of them is its peak."""

    def at(self, entries: Mapping[str, Entry]) -> Integers:
        """Bytes alive at every moment under these entries: ``[moments]``."""

    def steps(self, entries: Mapping[str, Entry], changes: Sequence[Mapping[str, Entry]]) -> csr_array:
        """Of each change to these entries, how it moves :meth:`at`: ``[changes, moments]``, sums of whose rows do.

        The cumulative sum along a row is the change's effect; a row of its differences is mostly zeros.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """At least this share of the elements low, at most this many bytes at the peak; either may be left out.

    Raises:
        BudgetError: a share outside 0 to 1, a budget that is no positive number of bytes, or neither of the two.
    """

    low_ratio: float | None = None
    budget_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.low_ratio is None and self.budget_bytes is None:
            raise BudgetError("a search needs a goal: give a low ratio (0 to 1), a budget in bytes, or both.")
        if self.low_ratio is not None and not 0 <= self.low_ratio <= 1:
            raise BudgetError(f"the low ratio is {self.low_ratio}; it is a share of the elements, from 0 to 1.")
        if self.budget_bytes is not None and not 0 < self.budget_bytes < math.inf:
            raise BudgetError(f"the budget is {self.budget_bytes} bytes; give a positive number of bytes.")

    def enough_low(self, low_elements: int, elements: int) -> bool:
        """Whether ``low_elements`` of ``elements`` reach the low ratio (true where none is asked for)."""
        if self.low_ratio is None or elements == 0:
            return True
        return low_elements / elements >= self.low_ratio

    def within_budget(self, peak: int) -> bool:
        """Whether a step with this peak fits (true where no budget is given)."""
        return self.budget_bytes is None or peak <= self.budget_bytes


def over_budget(goal: Goal, floor: int, tried: str) -> BudgetError:
    """The error for a budget that nothing tried could meet; ``floor`` is the lowest peak among what was ``tried``."""
    asked = goal.budget_bytes or 0
    return BudgetError(
        f"the budget is {asked} bytes ({asked / MIB:.1f} MiB), but {tried} a training step still needs "
        f"{floor} bytes ({floor / MIB:.1f} MiB) at its peak.\n"
        f"  Ask for at least {floor} bytes, make the batch smaller, choose a recipe with narrower low "
        "formats, or store less between steps: narrower optimizer states, gradients or masters.",
        floor=floor,
    )


def split_names(text: str) -> list[str]:
    """Names of formats in a text with commas; those inside ``fp(e,m,b)`` belong to the name."""
    return [name.strip() for name in re.split(r",(?![^(]*\))", text) if name.strip()]


def parse_pins(texts: Iterable[str]) -> dict[str, str]:
    """Pattern → format, of pins like ``head.*=bf16``.

    Raises:
        PlanError: one is no such pin.
    """
    pins = {}
    for text in texts:
        pattern, equals, name = text.rpartition("=")
        if not (pattern and equals and name):
            raise PlanError(f"search: {text!r} is no pin. Write PATTERN=FORMAT, e.g. 'head.*=bf16'.")
        pins[pattern] = name
    return pins


def parse_budget(text: str | int, baseline: int) -> int:
    """Bytes from ``512MiB``, ``6GB``, ``1000000`` or ``50%`` (of ``baseline`` bytes).

    Raises:
        BudgetError: none of these.
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
