"""Memory over the step as a function of the decisions, for the integer program.

The effect of a decision is local: the bytes of an event depend only on the formats of a few tensors (those that its
operator reads and makes, and those that their readers make). So only the events near the changed tensors are replayed.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.sparse import csr_array

from assign.memory.replay import Bytes, Replay, Segment, changes_of, converts, copies_in, jumps_of
from assign.plan.keys import base_key, saved_key
from assign.plan.persistent_state import UpdateRounding
from assign.plan.plan import Entry
from assign.plan.table import MARK, TensorTable

Complete = Callable[[Mapping[str, Entry]], dict[str, Entry]]
"""Entries of some tensors → the same and those that follow from them, of saved copies and of stored tensors."""


class Timeline:
    """Bytes at every moment of a step. The moments are the slots of a replay in order, then the optimizer's step.

    Args:
        table: of the model.
        complete: adds the other entries of a plan to those that the search decides about, tensor by tensor.
        update_rounding: of 16-bit masters, as in ``assign.optimizer``.
        sums_inside: as for :class:`assign.memory.replay.Replay`.
    """

    def __init__(
        self,
        table: TensorTable,
        complete: Complete = dict,
        update_rounding: str = UpdateRounding.NEAREST,
        *,
        sums_inside: bool = False,
    ) -> None:
        self._table, self._complete = table, complete
        self._replay_of = functools.partial(Replay, table, update_rounding=update_rounding, sums_inside=sums_inside)
        self._near = _Neighbours(table)

    def at(self, entries: Mapping[str, Entry]) -> Bytes:
        """Return the bytes alive at each moment of a step, as an array ``[moments]``."""
        return _moments(self._replay_of(self._complete(entries)))

    def steps(self, entries: Mapping[str, Entry], changes: Sequence[Mapping[str, Entry]]) -> csr_array:
        """Return how each change affects :meth:`at`, as differences between moments: ``[changes, moments]``.

        The cumulative sum of a row is the effect of that change alone. Effects of two changes add up, unless they meet
        in one operator whose dtype depends on both.
        """
        base = self._complete(entries)
        replay = self._replay_of(base)
        moments = len(_moments(replay))
        rows: list[int] = []
        columns: list[int] = []
        values: list[int] = []
        for row, change in enumerate(changes):
            if all(base.get(key) == entry for key, entry in change.items()):
                continue
            events, marks = self._near.of(change)
            after = replay.replay_events(_changed(base, change, self._complete), events, marks)
            found = jumps_of(after)
            for slot, size in jumps_of(replay.of_events(events)).items():
                found[slot] = found.get(slot, 0) - size
            if total := sum(found.values()):  # it is not alive in the optimizer's step
                found[moments - 1] = found.get(moments - 1, 0) - total
            found = {slot: size for slot, size in found.items() if size}
            rows += [row] * len(found)
            columns += found.keys()
            values += found.values()
        return csr_array((np.array(values, dtype=np.int64), (rows, columns)), shape=(len(changes), moments))


class RunningPeak:
    """Peak bytes of successive candidates of a search, each a small change of the previous one.

    It returns the same as :func:`assign.memory.estimate.peak_bytes`, but replays only the events near the tensors that
    changed since the last call. The first call replays everything, and so does one that changes what is stored between
    steps.

    Args:
        table: of the model.
        complete, update_rounding, sums_inside: as for :class:`Timeline`.
    """

    def __init__(
        self,
        table: TensorTable,
        complete: Complete = dict,
        update_rounding: str = UpdateRounding.NEAREST,
        *,
        sums_inside: bool = False,
    ) -> None:
        self._table, self._complete = table, complete
        self._replay_of = functools.partial(Replay, table, update_rounding=update_rounding, sums_inside=sums_inside)
        self._near = _Neighbours(table)
        self._chosen: Mapping[str, Entry] = {}
        self._entries: dict[str, Entry] = {}
        self._replay: Replay | None = None
        self._found: list[list[Segment]] = []  # of each event
        self._jumps: Bytes = np.zeros(0, dtype=np.int64)

    def __call__(self, entries: Mapping[str, Entry]) -> int:
        """Return the peak bytes of one step under these entries."""
        change = {key: entry for key, entry in entries.items() if self._chosen.get(key) != entry}
        is_small = len(entries) == len(self._chosen) and 2 * len(change) < len(entries)
        if self._replay is None or not is_small or not self._update(self._replay, change):
            self._start(entries)
        self._chosen = dict(entries)
        assert self._replay is not None
        alive = int(np.cumsum(self._jumps).max(initial=0)) + self._replay.lasting_bytes
        return max(alive, self._replay.optimizer_peak_bytes)

    def _start(self, entries: Mapping[str, Entry]) -> None:
        self._entries = self._complete(entries)
        self._replay = self._replay_of(self._entries)
        count = len(self._table.schedule.events)
        self._found = [self._replay.of_events([number]) for number in range(count)]
        self._jumps = changes_of(self._replay.segments, count)

    def _update(self, replay: Replay, change: Mapping[str, Entry]) -> bool:
        """Replay only the events that depend on ``change``.

        Returns:
            False, with nothing changed, if the whole step depends on it.
        """
        entries = _changed(self._entries, change, self._complete)
        followed = set(change) | {saved_key(key) for key in change}
        others = ((key, entry) for key, entry in self._complete(change).items() if key not in followed)
        if not all(self._entries.get(key) == entry for key, entry in others):
            return False
        if not replay.is_narrowed_alike(entries, change):
            return False
        events, marks = self._near.of(change)
        after = replay.replay_each(entries, events, marks)
        for sign, segments in ((-1, (self._found[number] for number in events)), (1, after)):
            for slot, size in jumps_of(each for found in segments for each in found).items():
                self._jumps[slot] += sign * size
        for number, found in zip(events, after, strict=True):
            self._found[number] = found
        self._entries = entries
        return True


def _changed(base: Mapping[str, Entry], change: Mapping[str, Entry], complete: Complete) -> dict[str, Entry]:
    """Return a copy of the complete entries ``base`` with those of ``change`` and all that follow from them."""
    changed = dict(base)
    for key in change:
        changed.pop(saved_key(key), None)
    changed.update(complete(change))
    return changed


def _moments(replay: Replay) -> Bytes:
    return np.append(replay.slots, replay.optimizer_peak_bytes)


class _Neighbours:
    """The events that depend on the format of a tensor, and the marks that may alias the buffers of an event."""

    def __init__(self, table: TensorTable) -> None:
        self._rows, self._events = table.by_key, table.schedule.events
        self._buffers = table.schedule.buffers
        self._family = self._find_families(table)
        self._readers: dict[int, list[int]] = defaultdict(list)
        self._marks: dict[int, list[int]] = defaultdict(list)
        self._members: dict[int, list[int]] = defaultdict(list)
        for buffer, family in enumerate(self._family):
            self._members[family].append(buffer)
        for number, event in enumerate(self._events):
            for buffer in event.reads:
                self._readers[self._family[buffer]].append(number)
            if (event.op.startswith(MARK) or converts(event, table)) and event.writes:
                self._marks[self._family[event.writes[0]]].append(number)
        self._by_key: dict[str, list[int]] = defaultdict(list)
        for number in range(len(self._events)):
            for key in self._keys(number):
                self._by_key[key].append(number)

    def of(self, change: Mapping[str, Entry]) -> tuple[list[int], list[int]]:
        """Return the events that depend on these keys, and the marks that may alias their buffers, both in order."""
        events = sorted({number for key in change for number in self._by_key.get(base_key(key), ())})
        families = {self._family[b] for n in events for b in (*self._events[n].reads, *self._events[n].writes)}
        return events, sorted({number for family in families for number in self._marks.get(family, ())})

    def _find_families(self, table: TensorTable) -> list[int]:
        """Return, per buffer, the first of the buffers that marks and copies connect to it. They may share memory."""
        family = list(range(len(self._buffers)))
        for event in self._events:
            if event.op.startswith(MARK) or converts(event, table):
                pairs = [*zip(event.reads[:1], event.writes[:1], strict=False)]
            else:
                pairs = copies_in(event, table)
            for source, copied in pairs:
                family[copied] = family[source]
        return family

    def _keys(self, number: int) -> set[str]:
        """Return the forward tensors whose formats affect an event."""
        event = self._events[number]
        families = {self._family[buffer] for buffer in (*event.reads, *event.writes)}
        written = {self._family[buffer] for buffer in event.writes}
        names = {event.op} | {self._events[n].op for family in written for n in self._readers.get(family, ())}
        names |= {self._buffers[b].holds for family in families for b in self._members[family]}
        keys = {base_key(name.removeprefix(MARK)) for name in names} & self._rows.keys()
        return keys | {base_key(source) for key in keys for source in self._rows[key].inputs}
