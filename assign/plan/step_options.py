"""How a step is carried out: what a plan says besides the format of each tensor."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar

from pydantic import ConfigDict

from assign.errors import PlanError, suggest
from assign.options import option
from assign.plan.entry import STRICT

MOST_MICRO_BATCHES = 2**20
"""Largest number of micro-batches in a plan's file."""


class Reduction(StrEnum):
    """How the loss of a batch follows from the losses of its micro-batches.

    ``mean``: the mean over rows, so each part counts by its rows. ``sum``: the sum. ``labels``: the mean over labels
    that are not -100, so each part counts by its labels. ``shifted-labels``: the same without the first label of each
    row, as in a causal language model.
    """

    MEAN = "mean"
    LABELS = "labels"
    SHIFTED_LABELS = "shifted-labels"
    SUM = "sum"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOptions:
    """How a step is carried out.

    Attributes:
        micro_batches: Number of parts of the batch that run one after another; their gradients are summed inside the
            backward pass.
        reduction: How the loss of the batch follows from those of its parts: ``mean`` over rows, ``sum``, ``labels`` or
            ``shifted-labels``. A search finds it by comparing the loss of a batch with those of its parts.
        part_statistics: Allow BatchNorm, whose statistics are then those of a part.
    Raises:
        PlanError: the number of parts is below 1, or there is no such reduction.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    micro_batches: int = field(default=1, metadata=option(minimum=1))
    reduction: Reduction = field(default=Reduction.MEAN, metadata=option(hidden=True))
    part_statistics: bool = False

    def __post_init__(self) -> None:
        whole = isinstance(self.micro_batches, int) and not isinstance(self.micro_batches, bool)
        if not whole or not 1 <= self.micro_batches <= MOST_MICRO_BATCHES:
            raise PlanError(
                f"micro_batches={self.micro_batches!r} is not possible.\n"
                f"  Allowed: a whole number from 1 to {MOST_MICRO_BATCHES}.\n  1 runs the batch as a whole."
            )
        if self.reduction not in list(Reduction):
            near = suggest(str(self.reduction), Reduction)
            raise PlanError(
                f"reduction={self.reduction!r} does not exist{f', did you mean {near}' if near else ''}.\n"
                f"  Allowed: {', '.join(Reduction)}."
            )
        object.__setattr__(self, "reduction", Reduction(self.reduction))

    def check_accumulation(self, given: int, *, where: str, setting: str) -> None:
        """Check that a trainer accumulates over as many batches as the plan has micro-batches.

        A plan without micro-batches allows any number: autograd then adds the gradients.

        Args:
            given: number of batches whose gradients the trainer accumulates.
            where: name of the caller, for the error.
            setting: name of the trainer's setting.
        Raises:
            PlanError: the numbers differ.
        """
        if self.micro_batches not in (1, given):
            raise PlanError(
                f"{where}: the plan has {self.micro_batches} micro-batches, and the trainer has {setting}={given}.\n"
                f"  Allowed: the same number, or a plan without micro-batches.\n"
                f"  Set {setting}={self.micro_batches}, or search a plan for this trainer."
            )

    def __str__(self) -> str:
        """Return the options in words, as ``assign show`` prints them."""
        if self.micro_batches == 1:
            return "the whole batch at once"
        weights = {Reduction.SUM: "their losses add up", Reduction.MEAN: "weighted by rows"}
        how = weights.get(self.reduction, "weighted by labels")
        return f"{self.micro_batches} micro-batches, {how}{', with their own statistics' * self.part_statistics}"

    def to_json(self) -> dict[str, int | str | bool]:
        """Return the options that differ from the defaults, as plain data for the plan's file."""
        default = StepOptions()
        named = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: value for name, value in named.items() if value != getattr(default, name)}
