"""Promotion: a low tensor that overflows too often gets its high format for the rest of the training.

The format of a tensor that may be promoted is in its *slot*. The rounding operators look it up there when they run
(:mod:`assign.numerics.runtime_formats`), and count overflow where they round. A promotion therefore takes effect at the
next step and compiles nothing.

If several processes train one model, overflow is counted over all of them, so all make the same promotions.

Source: arXiv 2301.13464, section 4 (precision promotion).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from assign import distributed
from assign.errors import PlanError
from assign.formats.parsing import parse_format
from assign.formats.rows import Format
from assign.options import option
from assign.plan.plan import Assignment, Entry
from assign.plan.recipes import get_recipe
from assign.plan.table import Role

THRESHOLD = 0.01
"""Share of overflowing elements at which a tensor is promoted. Source: arXiv 2301.13464."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromotionOptions:
    """When tensors are promoted.

    Attributes:
        every: Steps between two measurements of overflow. Default: the recipe's own. 0: promote nothing.
        threshold: Share of overflowing elements at which a tensor is promoted.
    Raises:
        PlanError: ``every`` is negative, or ``threshold`` is not above 0 and at most 1.
    """

    every: int | None = field(default=None, metadata=option("--promote-every", former=("promote_every",)))
    threshold: float = field(default=THRESHOLD, metadata=option("--promote-threshold", former=("promote_threshold",)))

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 0:
            raise PlanError(f"Promotion: every is {self.every}; give a number of steps, or 0 to promote nothing.")
        if not 0 < self.threshold <= 1:
            raise PlanError(
                f"Promotion: threshold is {self.threshold}; give a share of the elements, above 0 and up to 1."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Promoted:
    """One promotion.

    Attributes:
        step: the training step, from 1, at which the overflow was seen; the new format applies from the next step.
        overflow_ratio: share of the elements at or beyond ``Format.overflow_threshold``.
    """

    step: int
    key: str
    overflow_ratio: float
    from_format: str
    to_format: str


@dataclass(slots=True, kw_only=True)
class Slot:
    """The format of one tensor, which may change between steps."""

    key: str
    low: Format
    high: Format
    promoted: bool = False
    measuring: bool = False
    overflowed: Tensor | None = None
    elements: int = 0

    @property
    def format(self) -> Format:
        """Return the current format."""
        return self.high if self.promoted else self.low

    def record(self, overflowed: Tensor, elements: int) -> None:
        """Record the overflow that the last rounding counted."""
        self.overflowed, self.elements = overflowed, elements


class Promotion:
    """Changes low tensors that overflow to their high format. Call :meth:`step` after each optimizer step.

    Pass it to everything that runs one plan in one training: ``apply(model, plan, promotion=promotion)``. If
    ``torch.distributed`` is initialised, all processes of the group must call :meth:`step`.

    Attributes:
        plan: the plan with all promotions so far.
        promoted: every promotion, in order.
        overflow: for each tensor in the last measurement, the share that overflowed, over all processes.
        every, threshold: as given, or the recipe's own.

    Args:
        every: steps between two measurements, of which the first step is one; None: the recipe's own; 0: never.
        threshold: share of overflowing elements at which a tensor is promoted.
        group: the processes that train the model together; None: all of them.
    Raises:
        PlanError: ``every`` is negative, or ``threshold`` is not above 0 and at most 1.
    Examples:
        ```python
        plan = assign.search(model, batch, loss, space="hfp8", low_ratio=1.0)
        promotion = assign.Promotion(plan)
        planned = assign.apply(model, plan, backend="eager", promotion=promotion)
        loss(planned, batch).backward()
        for past in promotion.step():
            print(past.key, past.overflow_ratio, past.to_format)
        ```
    """

    def __init__(
        self,
        plan: Assignment,
        *,
        every: int | None = None,
        threshold: float = THRESHOLD,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        recipe = get_recipe(plan.recipe)
        options = PromotionOptions(every=every, threshold=threshold)
        self.plan = plan
        self.promoted: tuple[Promoted, ...] = ()
        self.overflow: dict[str, float] = {}
        self.every = recipe.promote_every if options.every is None else options.every
        self.threshold = options.threshold
        self._recipe, self._looked = recipe, False
        self._start, self._group = plan, group
        self._slots: dict[str, Slot] = {}
        self._steps = 0

    def watches(self, plan: Assignment) -> bool:
        """Whether ``plan`` is the plan of this promotion, before or after its promotions."""
        return plan.entries in (self._start.entries, self.plan.entries)

    def slot(self, key: str, role: Role, op: str) -> Slot | None:
        """Return the slot of a forward tensor; None if it cannot be promoted."""
        if key not in self._slots:
            entry = self._start.entries[key]
            high = self._recipe.promotion(role, op, entry) if self.every else None
            if high is None:
                return None
            promoted = any(past.key == key for past in self.promoted)
            slot = Slot(key=key, low=parse_format(entry.format), high=high, promoted=promoted)
            slot.measuring = self._measures() and not promoted
            self._slots[key] = slot
        return self._slots[key]

    def step(self) -> tuple[Promoted, ...]:
        """Promote the tensors that overflowed too often in the last forward pass, and return these promotions."""
        self._looked = self._measures()
        self._steps += 1
        found = self._found() if self._looked else ()
        for promoted in found:
            self._slots[promoted.key].promoted = True
        self._take(found)
        for slot in self._slots.values():
            slot.measuring = self._measures() and not slot.promoted
        return found

    @property
    def overflow_max(self) -> float | None:
        """Return the largest share that overflowed in the last forward pass; None if nothing was measured in it."""
        return max(self.overflow.values(), default=None) if self._looked else None

    def scalars(self) -> dict[str, float]:
        """Return values to log: the number of promoted tensors, and the largest and mean share at the last measurement.

        A promoted tensor is not counted from the next measurement on.
        """
        shares = list(self.overflow.values()) or [0.0]
        return {
            "assign/promoted": float(len(self.promoted)),
            "assign/overflow_max": max(shares),
            "assign/overflow_mean": sum(shares) / len(shares),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the state that resuming needs, as plain data."""
        return {"steps": self._steps, "promoted": [asdict(past) for past in self.promoted]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state from :meth:`state_dict` of a promotion of the same plan.

        Raises:
            PlanError: the state promotes a tensor that is not in this plan.
        """
        past = tuple(Promoted(**saved) for saved in state["promoted"])
        for each in past:
            if each.key not in self._start.entries or type(each.step) is not int:
                raise PlanError(f"Promotion: the state to load promotes {each.key!r}, which is not in this plan.")
        self._steps = state["steps"]
        self.plan, self.promoted = self._start, ()
        self.overflow, self._looked = {}, False
        self._take(past)
        names = {each.key for each in past}
        for slot in self._slots.values():
            slot.promoted = slot.key in names
            slot.measuring = self._measures() and not slot.promoted

    def _measures(self) -> bool:
        return self.every > 0 and self._steps % self.every == 0

    def _found(self) -> tuple[Promoted, ...]:
        self.overflow = self._ratios()
        return tuple(
            Promoted(
                step=self._steps,
                key=key,
                overflow_ratio=ratio,
                from_format=self._slots[key].low.name,
                to_format=self._slots[key].high.name,
            )
            for key, ratio in self.overflow.items()
            if ratio >= self.threshold and not self._slots[key].promoted
        )

    def _ratios(self) -> dict[str, float]:
        """Return, for each tensor rounded since the last measurement in any process, the share that overflowed.

        All processes send the same number of values, regardless of which tensors they have rounded.
        """
        places = {key: place for place, key in enumerate(sorted(self._start.entries))}
        counts = torch.zeros(2, len(places), dtype=torch.int64)
        seen = [(slot, slot.overflowed) for slot in self._slots.values() if slot.overflowed is not None]
        if seen:
            at = [places[slot.key] for slot, _ in seen]
            counts[0, at] = torch.stack([count for _, count in seen]).to("cpu", torch.int64)
            counts[1, at] = torch.tensor([slot.elements for slot, _ in seen])
        for slot, _ in seen:
            slot.overflowed = None
        overflowed, elements = distributed.sum_over_ranks(counts, self._group).tolist()
        unknown = next((key for key, place in places.items() if elements[place] and key not in self._slots), None)
        if unknown is not None:
            raise PlanError(
                f"Promotion: other processes have run {unknown!r}, but this one has not, so it cannot promote the "
                "same tensors.\n  Allowed: step() after the same forward passes in every process of the group.\n"
                "  Run the planned model in each of them, or give the processes that run it their own group: group=."
            )
        return {key: overflowed[places[key]] / elements[places[key]] for key in self._slots if elements[places[key]]}

    def _take(self, found: tuple[Promoted, ...]) -> None:
        self.promoted += found
        if found:
            self.plan = self.plan.replace({each.key: Entry(each.to_format, False) for each in found})
