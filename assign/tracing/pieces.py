"""Facts about one piece of a step that is captured as several graphs."""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import fx


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """A tensor that an earlier piece of the step made or read, and that a later piece reads.

    Attributes:
        key: key of the tensor of the table whose values it holds; ``''`` if it is not in the table.
        parametric: whether it depends on a parameter.
        depends: whether it depends on a parameter or on a floating-point input.
    """

    key: str
    parametric: bool
    depends: bool


@dataclass(slots=True, kw_only=True)
class Piece:
    """Facts about one piece of a step that is captured in several (see :mod:`assign.tracing.recording`).

    Attributes:
        whole: whether it is the whole step, recorded only for inspection.
        counts: number of operators of each name in the step before this piece; after the walk, including this piece.
        crossing: placeholder → facts about the tensor of an earlier piece.
        constants: placeholders that depend on no parameter and on no floating-point input.
        results: results of the piece, as later pieces see them; filled in by the walk.
        entered: placeholder → key, for inputs of the step that got a key in this piece; filled in by the walk.
    """

    whole: bool
    counts: Counter[str]
    crossing: Mapping[fx.Node, Crossing]
    constants: Collection[fx.Node]
    results: list[Crossing] = field(default_factory=list)
    entered: dict[fx.Node, str] = field(default_factory=dict)
