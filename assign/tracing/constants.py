"""Find the constants of captured operators, and limit those that 16 bits cannot represent."""

import math
from typing import Any

from torch import fx
from torch.fx.node import map_aggregate

from assign.plan.ops import BOUNDS, WRITTEN, WRITTEN_BY_NAME

LARGEST_FP16 = 65504.0


def numbers_in(arguments: Any) -> list[float]:
    """Return the numbers among the arguments of a node."""
    found: list[float] = []

    def note(value: Any) -> None:
        if _is_number(value):
            found.append(value)

    map_aggregate(arguments, note)
    return found


def hold_numbers(node: fx.Node, op: str, limit: float) -> None:
    """Clamp the numbers that an operator writes to ±``limit``, beyond which it would fail; infinities stay."""
    places = WRITTEN.get(op, ()) + BOUNDS.get(op, ())
    names = (*WRITTEN_BY_NAME, "min", "max") if places else ()

    def held(value: Any) -> Any:
        return math.copysign(limit, value) if _is_number(value) and limit < abs(value) < math.inf else value

    node.args = tuple(held(value) if place in places else value for place, value in enumerate(node.args))
    node.kwargs = {name: held(value) if name in names else value for name, value in node.kwargs.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
