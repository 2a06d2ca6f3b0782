"""A traced training step: its tensors, together with the model, the batch, the loss and the optimizer."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from assign.errors import TraceError
from assign.plan.table import TensorTable
from assign.tracing.capture import Loss
from assign.tracing.optimizer_states import OptimizerFactory

NOT_GIVEN: Any = object()
"""Default of arguments that a Step replaces; None could be a batch."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Step(TensorTable):
    """Table of a traced step that also refers to the model from which it was traced. Made by :func:`assign.trace`.

    Functions that take a model, a batch and a loss also take a Step instead of the three. A Step is a
    :class:`assign.TensorTable`. It keeps the model alive; ``step.table`` does not. Only the table is pickled, saved, or
    compared with another table.

    Attributes:
        model: the module that was traced.
        batch: the argument of ``loss`` that was traced: with micro-batches, the largest of them.
        whole: the batch before it was split into micro-batches; ``NOT_GIVEN`` if a training loop splits it itself.
        loss: ``loss(model, batch)`` → scalar tensor.
        optimizer: ``optimizer(parameters)`` → torch optimizer, or None.
    """

    model: nn.Module
    batch: Any
    whole: Any
    loss: Loss
    optimizer: OptimizerFactory | None = None

    @property
    def table(self) -> TensorTable:
        """Return the table alone, which does not keep the model alive."""
        return TensorTable(tensors=self.tensors, schedule=self.schedule, breaks=self.breaks, outside=self.outside)

    def as_part_of(self, micro_batches: int) -> "Step":
        """Return the same step, marked as one of ``micro_batches`` parts that a training loop runs.

        The loop splits the batch and weights the losses; ``whole`` of the result is ``NOT_GIVEN``.

        Args:
            micro_batches: number of parts whose gradients are summed.
        Returns:
            A step whose memory includes the gradients of earlier parts.
        """
        if micro_batches == 1:
            return self
        return replace(self, schedule=replace(self.schedule, micro_batches=micro_batches), whole=NOT_GIVEN)

    def __repr__(self) -> str:
        return repr(self.table)

    def __eq__(self, other: object) -> bool:
        return self.table == (other.table if isinstance(other, Step) else other)

    def __hash__(self) -> int:
        return hash(self.table)

    def __reduce__(self) -> tuple[Callable[[TensorTable], TensorTable], tuple[TensorTable]]:
        return _same, (self.table,)


def _same(table: TensorTable) -> TensorTable:
    return table


def refuse_more(where: str, **given: Any) -> None:
    """Check that no further argument was given with a Step.

    Raises:
        TraceError: an argument was given that the Step replaces.
    """
    names = [name for name, value in given.items() if value is not NOT_GIVEN]
    if names:
        raise TraceError(
            f"{where}: a Step and {', '.join(names)} are both given.\n"
            "  Allowed: a Step alone, or a model, a batch and a loss.\n"
            f"  Leave out {', '.join(names)}: the Step holds them."
        )


def check_given(where: str, **given: Any) -> None:
    """Check that the arguments that a model needs were given.

    Raises:
        TraceError: an argument is missing.
    """
    missing = [name for name, value in given.items() if value is NOT_GIVEN]
    if missing:
        raise TraceError(
            f"{where}: a model is given without {', '.join(missing)}.\n"
            "  Allowed: a model, a batch and a loss, or the Step that assign.trace returns.\n"
            f"  Give {', '.join(missing)}."
        )
