"""What the graph passes need to know of the plan and of the step."""

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
    """What one pass changed in one graph.

    Attributes:
        graph: ``captured``, ``joint``, ``forward``, ``backward``, or ``lowered`` by Inductor.
        name: of the pass.
        nodes: how many the graph has now.
        added: operators that it has more often than before, and how often.
        removed: operators that it has less often.
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
"""What is called with the change of each graph pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tap:
    """One more input of a marked graph, behind its others: for the gradient of a parameter.

    Attributes:
        nodes: the input; two where the gradient has a scale, which is the second.
        position: of the parameter among the inputs.
        dtype: of the gradient.
    """

    nodes: tuple[fx.Node, ...]
    position: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A captured step with names for its tensors, and what changes its formats while it trains.

    Attributes:
        taps: inputs that the marked graph has behind its others.
        runtime: behind these, the last one: what promotion and delayed scales change. Empty if nothing of the graph
            is changed so.
    """

    capture: Capture
    walked: Walk
    promotion: Promotion | None
    scales: DelayedScales
    taps: list[Tap] = field(default_factory=list)
    runtime: list[tuple[fx.Node, Runtime]] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What the graph passes need to know.

    Attributes:
        plan: with an entry for every tensor that is trained.
        channels_last: images will be laid out so when the graph runs.
        step: for passes on the captured step, which add taps to it.
        log: called with the change of each pass.
    """

    plan: Assignment
    channels_last: bool = False
    step: Step | None = None
    log: PassLog | None = None
