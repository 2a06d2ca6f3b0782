"""Information about the plan and the step that the graph passes need."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from assign.numerics.delayed import DelayedScales
from assign.numerics.promotion import Promotion
from assign.plan.plan import Assignment
from assign.tracing.capture import Capture
from assign.tracing.tensor_sites import Walk


@dataclass(frozen=True, slots=True, kw_only=True)
class PassChange:
    """The changes that one pass made in one graph.

    Attributes:
        graph: ``captured``, ``joint``, ``forward``, ``backward``, or ``lowered`` by Inductor.
        name: name of the pass.
        nodes: number of nodes after the pass.
        added: operators that occur more often than before, and by how much.
        removed: operators that occur less often than before, and by how much.
    """

    graph: str
    name: str
    nodes: int
    added: Mapping[str, int] = field(default_factory=dict)
    removed: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        changes = [*(f"+{n} {op}" for op, n in self.added.items()), *(f"-{n} {op}" for op, n in self.removed.items())]
        return f"{self.graph}: {self.name}: {self.nodes} nodes; {', '.join(changes) or 'nothing changed'}"


PassLog = Callable[[PassChange], None]
"""Function that is called with the change of each graph pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Added:
    """Inputs that a pass adds to a captured graph, after its others.

    Attributes:
        nodes: the inputs.
        make: takes the captured inputs of a call and returns the values of the added ones.
    """

    nodes: tuple[fx.Node, ...]
    make: Callable[[Sequence[Any]], Sequence[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A captured step with names for its tensors, and the objects that change its formats during training.

    Attributes:
        summed: positions of the parameters whose gradients the graph sums over micro-batches.
        added: inputs that the passes have added to the graph, in the order of its inputs.
    """

    capture: Capture
    walked: Walk
    promotion: Promotion | None
    scales: DelayedScales
    summed: Collection[int] = ()
    added: list[Added] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """Information that the graph passes need.

    Attributes:
        plan: with an entry for every tensor that is trained.
        channels_last: whether images are laid out channels-last when the graph runs.
        step: for passes on the captured step, which add taps to it.
        log: called with the change of each pass.
    """

    plan: Assignment
    channels_last: bool = False
    step: Step | None = None
    log: PassLog | None = None
