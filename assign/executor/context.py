"""Information about the plan and the step that the graph passes need."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from assign.numerics.delayed import DelayedScales
from assign.numerics.promotion import Promotion
from assign.numerics.runtime_formats import Runtime
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
class Tap:
    """One more input of a marked graph, after its others: for the gradient of a parameter.

    Attributes:
        nodes: the input; two if the gradient has a scale, which is the second.
        position: position of the parameter among the inputs.
        dtype: dtype of the gradient.
    """

    nodes: tuple[fx.Node, ...]
    position: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A captured step with names for its tensors, and the objects that change its formats during training.

    Attributes:
        taps: inputs that the marked graph has after its other inputs.
        runtime: the last input, after the taps, with the formats and scales that promotion and delayed scaling change.
            Empty if they change nothing in the graph.
    """

    capture: Capture
    walked: Walk
    promotion: Promotion | None
    scales: DelayedScales
    taps: list[Tap] = field(default_factory=list)
    runtime: list[tuple[fx.Node, Runtime]] = field(default_factory=list)


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
