"""Memory over the step for charts: bytes by role and tensor at each operator.

Each operator has one moment: its time slot with the most bytes. So the largest moment is the peak.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from assign.memory.replay import SLOTS, Bytes, Replay, Segment
from assign.plan.persistent_state import UpdateRounding
from assign.plan.plan import Assignment, Entry
from assign.plan.table import MARK, TensorTable

OPTIMIZER = "step"
"""Name of the pass of the last moment, the optimizer's step."""


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Every moment of one step; the last one is the optimizer's step.

    Attributes:
        operators: key of the operator that runs, ``''`` for a sum of gradients.
        passes: ``forward``, ``backward``, ``step``.
        rounds: whether the operator is the rounding of that tensor.
        by_role: role → bytes alive at each moment; roles without bytes are left out.
        alive: segments of all tensors; start and end are moments.
    """

    operators: tuple[str, ...]
    passes: tuple[str, ...]
    rounds: tuple[bool, ...]
    by_role: Mapping[str, Bytes]
    alive: tuple[Segment, ...]

    @property
    def total(self) -> Bytes:
        """Total bytes alive at each moment."""
        total: Bytes = np.zeros(len(self.operators), dtype=np.int64)
        for part in self.by_role.values():
            total = total + part
        return total

    @property
    def peak(self) -> int:
        """The moment with the most bytes; the first one of equals."""
        return int(self.total.argmax())


def moments(
    table: TensorTable,
    entries: Mapping[str, Entry],
    update_rounding: str = UpdateRounding.NEAREST,
    *,
    sums_inside: bool = False,
) -> Moments:
    """Return the moments of a step under some entries; tensors without an entry are as loaded.

    Options are as for :class:`assign.memory.replay.Replay`.

    Raises:
        PlanError: no library can store what the entries ask for.
    """
    replay = Replay(table, entries, update_rounding, sums_inside=sums_inside)
    events = table.schedule.events
    slots = replay.slots[: SLOTS * len(events)].reshape(-1, SLOTS)
    chosen = slots.argmax(axis=1) + SLOTS * np.arange(len(events))
    alive = [*_at_moments(replay, chosen), *_lasting(replay, len(events))]
    by_role: dict[str, Bytes] = {}
    for segment in alive:
        row = by_role.setdefault(segment.role, np.zeros(len(events) + 1, dtype=np.int64))
        row[segment.start : segment.end + 1] += segment.bytes
    return Moments(
        operators=(*(event.op.removeprefix(MARK) for event in events), "optimizer"),
        passes=(*("backward" if event.backward else "forward" for event in events), OPTIMIZER),
        rounds=(*(event.op.startswith(MARK) for event in events), False),
        by_role=by_role,
        alive=tuple(alive),
    )


def moments_of(table: TensorTable, plan: Assignment) -> Moments:
    """Return the moments of a step under a plan."""
    return moments(table, plan.entries, plan.update_rounding, sums_inside=plan.sums_inside)


def _at_moments(replay: Replay, chosen: Bytes) -> list[Segment]:
    """Return the segments that are alive at the chosen slot of an operator."""
    found = []
    for each in replay.segments:
        first = int(np.searchsorted(chosen, each.start))
        last = int(np.searchsorted(chosen, each.end, side="right")) - 1
        if each.bytes and first <= last:
            found.append(Segment(start=first, end=last, bytes=each.bytes, key=each.key, role=str(each.role)))
    return found


def _lasting(replay: Replay, last: int) -> list[Segment]:
    """Return the segments that are always alive, and those that only the optimizer's step adds."""
    rows = [(0, row) for row in replay.lasting] + [(last, row) for row in replay.stepping]
    return [Segment(start=start, end=last, bytes=size, key=key, role=role) for start, (key, role, size) in rows]
