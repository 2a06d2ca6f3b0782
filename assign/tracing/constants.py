"""Find the constants of captured operators, and those that 16 bits cannot represent."""

import math
from collections.abc import Mapping
from typing import Any

from torch import fx
from torch.fx.node import map_aggregate

LARGEST_FP16 = 65504.0

ARITHMETIC = frozenset({"add", "sub", "rsub", "mul", "div", "pow"})
"""Operators that take a number in float32, whatever dtype they run in."""

WRITTEN: Mapping[str, tuple[int, ...]] = {
    "masked_fill": (2,), "full": (1,), "new_full": (2,), "full_like": (1,), "fill": (1,), "where": (1, 2), "pad": (3,),
    "tensor": (0,), "new_tensor": (1,), "scalar_tensor": (0,), "index_fill": (3,), "scatter": (3,), "setitem": (2,),
}  # fmt: skip
"""Operators that write a number that they are given: positions of it."""

WRITTEN_BY_NAME = ("value", "fill_value", "other")

_BOUNDS: Mapping[str, tuple[int, ...]] = {
    "clamp": (1, 2), "clip": (1, 2), "clamp_min": (1,), "clamp_max": (1,), "hardtanh": (1, 2), "nan_to_num": (1, 2, 3),
}  # fmt: skip


def numbers_in(arguments: Any) -> list[float]:
    """The numbers among arguments of a node."""
    found: list[float] = []

    def note(value: Any) -> None:
        if _is_number(value):
            found.append(value)

    map_aggregate(arguments, note)
    return found


def hold_numbers(node: fx.Node, op: str, limit: float) -> None:
    """Let an operator write no number beyond ±``limit``, which it would refuse; infinities stay."""
    places = WRITTEN.get(op, ()) + _BOUNDS.get(op, ())
    names = (*WRITTEN_BY_NAME, "min", "max") if places else ()

    def held(value: Any) -> Any:
        return math.copysign(limit, value) if _is_number(value) and limit < abs(value) < math.inf else value

    node.args = tuple(held(value) if place in places else value for place, value in enumerate(node.args))
    node.kwargs = {name: held(value) if name in names else value for name, value in node.kwargs.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
