"""The time table: measured seconds of each tensor and format, for searches with a time limit."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from assign.errors import BudgetError, PlanError
from assign.plan.noise_table import Cell
from assign.plan.plan import Entry
from assign.plan.table import TensorTable, check_same_model

_UNITS = {"s": 1.0, "ms": 1e-3}


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeTable:
    """Measured seconds of a forward and backward pass, by tensor and format, without the optimizer's step.

    Attributes:
        seconds: choice → seconds of the operator that makes the tensor, of its rounding, and of packing its saved copy.
        rest: seconds that no choice changes.
        fingerprint: of the model.
    """

    fingerprint: str
    seconds: Mapping[Cell, float]
    rest: float = 0.0

    def of(self, entries: Mapping[str, Entry]) -> float:
        """Return the predicted seconds of some entries, without the rest.

        Raises:
            PlanError: one of these choices was not measured.
        """
        total = 0.0
        for key, entry in entries.items():
            seconds = self.seconds.get(Cell(key, entry.format))
            if seconds is None:
                known = ", ".join(cell.format for cell in self.seconds if cell.key == key) or "nothing"
                raise PlanError(
                    f"the seconds of {key!r} in {entry.format} were not measured; measured for it: {known}.\n"
                    "  Measure with the space of the search: assign.measure_times(…, space=)."
                )
            total += seconds
        return total

    def check(self, table: TensorTable) -> None:
        """Check that these are the seconds of the table's model.

        Raises:
            PlanError: they belong to another model.
        """
        check_same_model(
            self.fingerprint,
            table.fingerprint,
            what="the seconds were measured on another model",
            advice="Measure this model: assign.measure_times(model, batch, loss).",
        )


def parse_step_time(text: str | float, high: float) -> float:
    """Return the seconds in ``0.2``, ``0.2s``, ``200ms``, or ``1.3x`` (of ``high`` seconds).

    Raises:
        BudgetError: the text is none of these, or not positive.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(x|×|s|ms|)\s*", str(text))
    if match and float(match[1]) > 0:
        return float(match[1]) * (high if match[2] in ("x", "×") else _UNITS[match[2] or "s"])
    raise BudgetError(
        f"search: {text!r} is not a limit on the step time. Write seconds ('0.2s', '200ms') or a multiple of the "
        "time with every tensor in its high format ('1.3x')."
    )
