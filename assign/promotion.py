"""Promotion: a low forward tensor that overflows too often gets its high format back, for the rest of training.

A graph holds, in place of the format of a tensor that may be promoted, the name of its *slot*; the rounding operators
look the format up when they run, and count overflow where they round. So a promotion takes effect at the next step and
compiles nothing.

Source: arXiv 2301.13464, section 4 (precision promotion).
"""

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from assign.assignment import Assignment, Entry
from assign.errors import PlanError
from assign.formats import Format, parse_format
from assign.recipes import get_recipe
from assign.tensors import Role

THRESHOLD = 0.01
"""Share of a tensor's elements that overflow at which it is promoted. Source: arXiv 2301.13464."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Promoted:
    """One promotion.

    Attributes:
        step: the training step, from 1, at which the overflow was seen; the new format holds from the next on.
        overflow_ratio: share of the elements at or beyond ``Format.overflow_threshold``.
    """

    step: int
    key: str
    overflow_ratio: float
    from_format: str
    to_format: str


@dataclass(slots=True, weakref_slot=True, kw_only=True)
class Slot:
    """The format of one tensor, which may change between steps; ``name`` stands for it in graphs."""

    name: str
    key: str
    low: Format
    high: Format
    promoted: bool = False
    measuring: bool = False
    overflowed: Tensor | None = None
    elements: int = 0

    @property
    def format(self) -> Format:
        """The one in force."""
        return self.high if self.promoted else self.low

    def record(self, overflowed: Tensor, elements: int) -> None:
        """What the last rounding saw."""
        self.overflowed, self.elements = overflowed, elements


_SLOTS: WeakValueDictionary[str, Slot] = WeakValueDictionary()
_NUMBERS = itertools.count()


def find_slot(name: str) -> Slot | None:
    """The slot called ``name``; None for the name of a format.

    Raises:
        PlanError: the promotion that it belonged to is gone.
    """
    if not name.startswith("@"):
        return None
    slot = _SLOTS.get(name)
    if slot is None:
        raise PlanError(f"the promotion of {name!r} is gone. Keep the Promotion as long as what runs under it.")
    return slot


def format_named(name: str) -> Format:
    """The format that the name of a format or of a slot stands for now."""
    slot = find_slot(name)
    return slot.format if slot else parse_format(name)


class Promotion:
    """Watches the low forward tensors of a plan while it trains; call :meth:`step` after each optimizer step.

    Give it to everything that runs one plan in one training: ``apply(model, plan, promotion=promotion)``.

    Attributes:
        plan: as promoted so far.
        promoted: every promotion, in order.
        overflow: of each watched tensor, the share that overflowed when last measured.

    Args:
        every: steps between two measurements, the first step being one; None: the recipe's own; 0: never.
        threshold: share of overflowing elements at which a tensor is promoted.
    Raises:
        PlanError: ``every`` is negative, or ``threshold`` no share above 0 and up to 1.
    """

    def __init__(self, plan: Assignment, *, every: int | None = None, threshold: float = THRESHOLD) -> None:
        recipe = get_recipe(plan.recipe)
        every = recipe.promote_every if every is None else every
        if every < 0:
            raise PlanError(f"Promotion: every is {every}; give a number of steps, or 0 to promote nothing.")
        if not 0 < threshold <= 1:
            raise PlanError(f"Promotion: threshold is {threshold}; give a share of the elements, above 0 and up to 1.")
        self.plan = plan
        self.promoted: tuple[Promoted, ...] = ()
        self.overflow: dict[str, float] = {}
        self._recipe, self._every, self._threshold = recipe, every, threshold
        self._start = plan
        self._number = next(_NUMBERS)
        self._slots: dict[str, Slot] = {}
        self._steps = 0

    def watches(self, plan: Assignment) -> bool:
        """Whether ``plan`` is the one this promotion was made for, or what has become of it."""
        return plan.entries in (self._start.entries, self.plan.entries)

    def slot(self, key: str, role: Role, op: str) -> Slot | None:
        """The slot of a forward tensor; None where it will not be promoted."""
        if key not in self._slots:
            entry = self._start.entries[key]
            high = self._recipe.promotion(role, op, entry) if self._every else None
            if high is None:
                return None
            name = f"@{self._number}:{key}"
            promoted = any(past.key == key for past in self.promoted)
            slot = Slot(name=name, key=key, low=parse_format(entry.format), high=high, promoted=promoted)
            slot.measuring = self._measures() and not promoted
            self._slots[key] = _SLOTS[name] = slot
        return self._slots[key]

    def step(self) -> tuple[Promoted, ...]:
        """Promote what overflowed too often in the last forward pass; returns that."""
        self._steps += 1
        found = self._found()
        for promoted in found:
            self._slots[promoted.key].promoted = True
        self._take(found)
        for slot in self._slots.values():
            slot.measuring = self._measures() and not slot.promoted
        return found

    def state_dict(self) -> dict[str, Any]:
        """What going on needs, as plain data."""
        return {"steps": self._steps, "promoted": [asdict(past) for past in self.promoted]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict` of a promotion of the same plan."""
        past = tuple(Promoted(**saved) for saved in state["promoted"])
        self._steps = state["steps"]
        self.plan, self.promoted = self._start, ()
        self._take(past)
        names = {each.key for each in past}
        for slot in self._slots.values():
            slot.promoted = slot.key in names
            slot.measuring = self._measures() and not slot.promoted

    def _measures(self) -> bool:
        return self._every > 0 and self._steps % self._every == 0

    def _found(self) -> tuple[Promoted, ...]:
        seen = [slot for slot in self._slots.values() if slot.overflowed is not None]
        counts = [slot.overflowed for slot in seen if slot.overflowed is not None]
        if not counts:
            return ()
        ratios = [count / slot.elements for count, slot in zip(torch.stack(counts).tolist(), seen, strict=True)]
        self.overflow.update({slot.key: ratio for slot, ratio in zip(seen, ratios, strict=True)})
        for slot in seen:
            slot.overflowed = None
        return tuple(
            Promoted(
                step=self._steps,
                key=slot.key,
                overflow_ratio=ratio,
                from_format=slot.low.name,
                to_format=slot.high.name,
            )
            for slot, ratio in zip(seen, ratios, strict=True)
            if ratio >= self._threshold and not slot.promoted
        )

    def _take(self, found: tuple[Promoted, ...]) -> None:
        self.promoted += found
        if found:
            self.plan = self.plan.replace({each.key: Entry(each.to_format, False) for each in found})
