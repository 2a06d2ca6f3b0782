"""Facts about one piece of a step that is captured as several graphs."""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import fx


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """A tensor that an earlier piece of the step made or read, where a later piece reads it.

    Attributes:
        key: of the tensor of the table whose values it holds; ``''`` for what is no tensor of a plan.
        parametric: whether it depends on a parameter.
        depends: whether it depends on a parameter or on a floating-point input.
    """

    key: str
    parametric: bool
    depends: bool


@dataclass(slots=True, kw_only=True)
class Piece:
    """What is known of one piece of a step that is captured in several (see :mod:`assign.tracing.recording`).

    Attributes:
        whole: it is the whole step after all, recorded only to look at it.
        counts: how many operators of each name the step has had before; after the walk, with those of this piece.
        crossing: by placeholder.
        constants: placeholders that depend on no parameter and on no floating-point input.
        results: of the piece, as later pieces see them; filled in by the walk.
        entered: inputs of the step that got a key here, by placeholder; filled in by the walk.
    """

    whole: bool
    counts: Counter[str]
    crossing: Mapping[fx.Node, Crossing]
    constants: Collection[fx.Node]
    results: list[Crossing] = field(default_factory=list)
    entered: dict[fx.Node, str] = field(default_factory=dict)
