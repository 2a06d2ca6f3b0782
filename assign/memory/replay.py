"""Replay the schedule of a training step under a plan: when each buffer is alive, and how many bytes it takes.

Every buffer is a segment of time with a number of bytes. Peak memory is the largest sum of bytes alive at one time.
:mod:`assign.plan.compute_dtype` says in which dtype each operator computes, so the segments are those of the real
graph.

Each operator has four slots of time: decode the saved activations that it reads, convert what it reads to a wider
dtype, run, and finally narrow its results and encode the activations whose last forward reader it was.
"""

import copy
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np

from assign.formats.dtypes import FLOAT32, ITEM_BYTES
from assign.formats.parsing import parse_saved
from assign.formats.rows import LOADED, Format
from assign.plan.compute_dtype import ComputeDtypes, changes_nothing, is_narrowed
from assign.plan.keys import base_key, is_grad_key, saved_key
from assign.plan.ops import CONVERSIONS, FLOAT32_INSIDE, SLICE
from assign.plan.optimizer_backends import optimizer_scratch, stored_in
from assign.plan.persistent_state import (
    SUM_PIECE,
    UpdateRounding,
    buffers,
    gradient_format,
    master_format,
    packed_bytes,
    resident,
    stored_dtype,
    with_loaded,
)
from assign.plan.plan import Assignment, Entry
from assign.plan.table import MARK, Buffer, Event, Role, TensorTable

SLOTS = 4
"""Number of time slots of one event."""


def _decoding(number: int) -> int:
    return SLOTS * number


def _widening(number: int) -> int:
    return SLOTS * number + 1


def _running(number: int) -> int:
    return SLOTS * number + 2


def _behind(number: int) -> int:
    return SLOTS * number + 3


_COMPILED_SUM_BYTES, _EAGER_SUM_BYTES = 8, 46
"""Temporary bytes per element of a sum that is rounded stochastically, by a compiled kernel or operator by operator.
Measured with the profiler: ``tests/executor/test_micro_batches.py`` compares whole steps."""

_COMPILED_FROM = 2**14
"""Elements from which :mod:`assign.numerics.dispatch` compiles a rounding kernel, which then serves all sizes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Bytes alive from slot ``start`` to slot ``end``, both included."""

    start: int
    end: int
    bytes: int
    key: str
    role: str


Bytes = np.ndarray[Any, np.dtype[np.int64]]


def changes_of(segments: Iterable[Segment], events: int) -> Bytes:
    """Return the change in bytes from each slot of a step to the next: ``[slots + 1]``."""
    change = np.zeros(SLOTS * events + 1, dtype=np.int64)
    for slot, size in jumps_of(segments).items():
        change[slot] += size
    return change


def jumps_of(segments: Iterable[Segment]) -> dict[int, int]:
    """Return {slot: change in bytes from the slot before}; slots without a change are left out."""
    jumps: dict[int, int] = defaultdict(int)
    for segment in segments:
        if segment.end >= segment.start:
            jumps[max(segment.start, 0)] += segment.bytes
            jumps[segment.end + 1] -= segment.bytes
    return jumps


def converts(event: Event, table: TensorTable) -> bool:
    """Whether an event only converts a tensor, or its gradient, to another dtype because the user's code does so."""
    if len(event.reads) != 1 or len(event.writes) != 1 or event.op.startswith(MARK):
        return False
    before, after = (table.schedule.buffers[buffer] for buffer in (*event.reads, *event.writes))
    row = table.by_key.get(event.op)
    if before.dtype == after.dtype or before.elements != after.elements:
        return False
    return {before.dtype, after.dtype} <= LOADED.keys() and (row is None or row.op in CONVERSIONS)


def copies_in(event: Event, table: TensorTable) -> list[tuple[int, int]]:
    """Return (buffer of a tensor, buffer of its copy) for each copy that a forward event makes of a tensor."""
    if event.backward or event.op.startswith(MARK):
        return []
    buffers = table.schedule.buffers
    held = ((copied, buffers[copied].holds) for copied in event.writes)
    return [(s, copied) for copied, key in held for s in event.reads if key and buffers[s].holds == key]


def _by_source(alias: Mapping[int, int | None]) -> dict[int | None, list[int]]:
    """Return {buffer: its aliases, which share its memory}."""
    twins: dict[int | None, list[int]] = defaultdict(list)
    for buffer, source in alias.items():
        twins[source].append(buffer)
    return dict(twins)


class Replay:
    """The replayed schedule of a table under some entries. A tensor without an entry is as it was loaded.

    If the table was traced with micro-batches, it is the schedule of a part that runs after others: the gradients
    summed so far are alive from its beginning.

    Args:
        table: of the model.
        entries: formats.
        update_rounding: of 16-bit masters, as in ``assign.optimizer``.
        promotable: high formats of the tensors that may be promoted.
        sums_inside: whether the backward pass adds each gradient to the sum where it arises. Otherwise all gradients
            of a part are alive at its end, as in plain PyTorch.
    """

    def __init__(
        self,
        table: TensorTable,
        entries: Mapping[str, Entry],
        update_rounding: str = UpdateRounding.NEAREST,
        promotable: Mapping[str, Format] = MappingProxyType({}),
        *,
        sums_inside: bool = False,
    ) -> None:
        self.table = table
        self.schedule = table.schedule
        self.entries = with_loaded(entries, table.loaded)
        self.segments: list[Segment] = []
        self.saved_bytes = 0
        self._kept_buffers = frozenset(self.schedule.kept)
        self._promotable = promotable
        self._dtypes = ComputeDtypes.of_table(table, entries, promotable)
        self._narrowed = is_narrowed(table, entries)
        self._update_rounding = update_rounding
        self._sums_inside = sums_inside
        self._resident = resident(table, entries, update_rounding)
        self._buffer_bytes, widened = buffers(table, entries)
        self._apart = self._find_apart()
        self._reads = self._index_reads()
        self._alias = self._find_aliases(self.schedule.events)
        self._twins = _by_source(self._alias)
        self._copies = self._index_copies()
        self._spans = [self._replay_event(number, event) for number, event in enumerate(self.schedule.events)]
        forward = sum(not event.backward for event in self.schedule.events)
        self._add(0, _behind(forward - 1), widened, "buffers in float32", "scratch")

    @classmethod
    def of_plan(
        cls, table: TensorTable, plan: Assignment, promotable: Mapping[str, Format] = MappingProxyType({})
    ) -> "Replay":
        """Return the replayed schedule of a table under a plan."""
        return cls(table, plan.entries, plan.update_rounding, promotable, sums_inside=plan.sums_inside)

    def _find_apart(self) -> frozenset[str]:
        """Return the operators of several steps whose intermediates are float32 regardless of the requested dtype."""
        rows = self.table.by_key
        inside = [e.op for e in self.schedule.events if e.op in rows and rows[e.op].op in FLOAT32_INSIDE]
        forward = Counter(e.op for e in self.schedule.events if not e.backward)
        return frozenset(op for op in inside if forward[op] > 1)

    def _index_reads(self) -> dict[int, list[int]]:
        reads: dict[int, list[int]] = defaultdict(list)
        for number, event in enumerate(self.schedule.events):
            for buffer in event.reads:
                reads[buffer].append(number)
        return reads

    def _index_copies(self) -> dict[int, list[int]]:
        """Return {buffer of a tensor: its copies in another dtype or layout}, which the backward pass makes again."""
        copies: dict[int, list[int]] = defaultdict(list)
        for event in self.schedule.events if self._narrowed else ():
            for source, copied in copies_in(event, self.table):
                if not self._is_rounded_copy(self.schedule.buffers[copied]):
                    copies[source].append(copied)
        return copies

    # ---- which buffers are one ------------------------------------------------------------------------------------

    def _find_aliases(self, events: Iterable[Event]) -> dict[int, int | None]:
        """Return {result: source} of marks and conversions that change nothing.

        The source is None for a parameter or the batch.
        """
        alias: dict[int, int | None] = {}
        for event in events:
            if not event.writes or not self._changes_nothing(event):
                continue
            source = event.reads[0] if event.reads else None
            alias[event.writes[0]] = alias.get(source, source) if source is not None else None
        return alias

    def _changes_nothing(self, event: Event) -> bool:
        if event.op.startswith(MARK):
            return self._is_identity(event.op.removeprefix(MARK), backward=event.backward)
        if not converts(event, self.table):
            return False
        before, after = (self.schedule.buffers[buffer] for buffer in (*event.reads, *event.writes))
        compute = self._dtypes.compute(event.op)
        return self._dtype(before, Event(op="", backward=event.backward), compute, False) == self._dtype(
            after, event, compute, False
        )

    def _is_identity(self, key: str, *, backward: bool) -> bool:
        """Whether a mark changes nothing. The mark of a parameter reads the master and makes the stored gradient."""
        if not self._is_weight(key):
            return self._dtypes.is_identity(key, backward=backward)
        carrier, fmt = self._dtypes.carrier(key), self._dtypes.formats(key)[backward]
        outside = self._kept(key) if backward else stored_dtype(master_format(self.entries, key))
        return carrier == outside and changes_nothing(fmt, carrier)

    def _is_weight(self, key: str) -> bool:
        info = self.table.by_key.get(key)
        return info is not None and info.role is Role.WEIGHT

    def _kept(self, key: str) -> str:
        """Return the dtype of the gradient of ``key`` after its mark."""
        if not self._is_weight(key):
            return self._dtypes.compute(key)
        return self._dtypes.carrier(key) if self._sums_inside else stored_dtype(gradient_format(self.entries, key))

    def _readers(self, buffer: int) -> list[int]:
        family = [buffer, *self._twins.get(buffer, ())]
        copies = [copied for b in family for copied in self._copies.get(b, ())]
        again = [n for copied in copies for n in self._readers(copied) if self.schedule.events[n].backward]
        return sorted({*again, *(n for b in family for n in self._reads.get(b, ()))})

    # ---- segments ---------------------------------------------------------------------------------------------------

    def _replay_event(self, number: int, event: Event) -> slice:
        """Add the segments of an event; return where they are in ``segments``."""
        first = len(self.segments)
        op = event.op.removeprefix(MARK)
        is_mark = event.op.startswith(MARK)
        compute = self._dtypes.compute(op)
        for buffer in event.writes:
            if buffer not in self._alias:
                self._live(buffer, number, event, compute, is_mark)
        self._add(_running(number), _running(number), event.scratch_in(compute), op, "scratch")
        if is_mark and event.backward:
            self._add(_running(number), _running(number), self._sum_scratch(op), op, "scratch")
        if not is_mark:
            for buffer in event.reads:
                info = self.schedule.buffers[buffer]
                if self._is_converted(info, event):
                    size = info.elements * ITEM_BYTES[compute]
                    self._add(_widening(number), _running(number), size, info.holds, "scratch")
        return slice(first, len(self.segments))

    def _sum_scratch(self, key: str) -> int:
        """Return the temporary bytes of adding a gradient to a sum; see :mod:`assign.optim.summing`."""
        if not self._sums_inside or not self._is_weight(key):
            return 0
        gradient, total = self._dtypes.carrier(key), stored_dtype(gradient_format(self.entries, key))
        if gradient == total == FLOAT32:
            return 0
        rounding = _COMPILED_SUM_BYTES if self._rounds_compiled else _EAGER_SUM_BYTES
        elements = min(self.table.by_key[key].elements, SUM_PIECE)
        return elements * (ITEM_BYTES[FLOAT32] if total == FLOAT32 else rounding)

    @cached_property
    def _rounds_compiled(self) -> bool:
        """Whether at least one gradient is large enough for the rounding kernel to be compiled."""
        return any(row.elements >= _COMPILED_FROM for row in self.table.tensors if row.role is Role.WEIGHT_GRAD)

    def _is_kept(self, buffer: int) -> bool:
        """Whether a buffer is alive after the backward pass: it holds a gradient, and the pass does not sum it."""
        family = (buffer, *self._twins.get(buffer, ()))
        return not self._sums_inside and any(each in self._kept_buffers for each in family)

    def _is_converted(self, info: Buffer, event: Event) -> bool:
        """Whether the event reads a copy of the buffer in a wider dtype."""
        if not info.holds or is_grad_key(info.holds) or event.op not in self.table.by_key:
            return False
        if self._dtypes.as_written(event.op) or self.table.by_key[event.op].op in CONVERSIONS:
            return False
        return self._lives_in(info) != self._dtypes.compute(event.op)

    def _lives_in(self, info: Buffer) -> str:
        """Return the dtype of a buffer that holds a forward tensor, or the user's copy of it in another dtype."""
        return self._dtypes.read_as(info.holds, info.dtype)

    def _last_slot(self, info: Buffer, number: int) -> int:
        """Return the last slot of a buffer that event ``number`` reads last.

        It is before the event runs if the event reads a converted copy.
        """
        converted = self._is_converted(info, self.schedule.events[number])
        return _widening(number) if converted else _running(number)

    def _live(self, buffer: int, number: int, event: Event, compute: str, is_mark: bool) -> None:
        info = self.schedule.buffers[buffer]
        key, role = self._owner(info, event)
        size = self._size(info, event, compute, is_mark)
        readers = self._readers(buffer)
        end = max(readers, default=number)
        if self._is_kept(buffer):
            end = len(self.schedule.events) - 1
            role = role if buffer in self._kept_buffers else Role.WEIGHT_GRAD
        start = self._convert(info, number, event, compute, is_mark)
        later = [n for n in readers if self.schedule.events[n].backward]
        if event.backward or not later:
            known = info if info.holds else replace(info, holds=self._held_by(buffer))
            self._add(start, max(self._last_slot(known, end), start), size, key, role)
            return
        last = max((n for n in readers if not self.schedule.events[n].backward), default=number)
        held = "" if self._is_rounded_copy(info) else self._held_by(buffer)
        if event.op in self._apart and (held == event.op or self._is_part(held)):
            held = ""
        is_copy = converts(event, self.table) or not self._marks(buffer, event)
        moved = self._narrowed and held != "" and is_copy
        if moved or (is_mark and self._is_source_resident(held)):
            self._add(start, self._last_slot(info, last), size, key, role)
            self._add(_decoding(later[0]), self._last_slot(info, later[-1]), size, key, role)
            return
        waiting = self._packed(held, info) if held else None
        if waiting is None or waiting >= size:
            self.saved_bytes += size
            self._add(start, _running(last), size, key, role)
            self._add(_behind(last), self._last_slot(info, later[-1]), size, key, Role.SAVED)
            return
        self.saved_bytes += waiting
        self._add(start, _behind(last), size, key, role)
        self._add(_behind(last), _decoding(later[0]), waiting, key, Role.SAVED)
        self._add(_decoding(later[0]), self._last_slot(info, later[-1]), size, key, role)

    def _is_rounded_copy(self, info: Buffer) -> bool:
        """Whether the buffer holds a tensor that the user converted to fewer bits: it is saved besides the tensor."""
        own = ITEM_BYTES.get(self._dtypes.loaded(info.holds), 0)
        return info.holds in self.table.by_key and ITEM_BYTES.get(info.dtype, own) < own

    def _held_by(self, buffer: int) -> str:
        for b in (buffer, *self._twins.get(buffer, ())):
            held: str = self.schedule.buffers[b].holds
            if held:
                return held
        return ""

    def _is_part(self, key: str) -> bool:
        """Whether the tensor is a view of a part of another tensor. Such a view is not saved for itself."""
        row = self.table.by_key.get(key)
        return row is not None and row.op == SLICE and self._is_identity(key, backward=False)

    def _marks(self, buffer: int, event: Event) -> bool:
        """Whether the buffer is the tensor itself, not a copy in another layout."""
        return event.op.startswith(MARK) or buffer in self._twins

    def _is_source_resident(self, key: str) -> bool:
        info = self.table.by_key.get(key)
        return info is not None and info.op in ("parameter", "input")

    def _packed(self, key: str, info: Buffer) -> int | None:
        """Return the bytes of the saved copy, its scale included; None if the value is saved as it is."""
        if self._is_identity(key, backward=False):
            return None
        explicit = self.entries.get(saved_key(key))
        fmt = parse_saved(explicit.format) if explicit else self._dtypes.formats(key)[0]
        return packed_bytes(fmt, info.elements)

    def _owner(self, info: Buffer, event: Event) -> tuple[str, str]:
        if info.holds:
            forward = base_key(info.holds)
            row = self.table.by_key.get(info.holds) or self.table.by_key.get(forward)
            return info.holds, row.role if row else "scratch"
        return event.op.removeprefix(MARK), "scratch"

    def _size(self, info: Buffer, event: Event, compute: str, is_mark: bool) -> int:
        return info.elements * ITEM_BYTES.get(self._dtype(info, event, compute, is_mark), 1)

    def _dtype(self, info: Buffer, event: Event, compute: str, is_mark: bool) -> str:
        if info.dtype not in LOADED or (event.op == "" and not info.holds):
            return info.dtype
        if is_grad_key(info.holds):
            forward = base_key(info.holds)
            return self._kept(forward) if is_mark else self._dtypes.carrier(forward)
        if not is_mark and not info.holds and self._dtypes.as_written(event.op):
            return info.dtype
        if not event.backward and event.op in self.table.by_key and converts(event, self.table):
            return compute
        if event.op in self._apart:
            return info.dtype if self._dtypes.as_written(event.op) else FLOAT32
        if info.holds:
            return self._lives_in(info)
        return FLOAT32 if info.part else compute

    def _convert(self, info: Buffer, number: int, event: Event, compute: str, is_mark: bool) -> int:
        """Return the slot in which the stored gradient appears: after the operator if it is converted, else with it.

        A gradient that is made in one dtype and stored in another exists twice for a moment; a segment is added for
        this.
        """
        if not is_grad_key(info.holds) or not event.backward:
            return _running(number)
        carrier = self._dtypes.carrier(base_key(info.holds))
        made = carrier if is_mark or event.op == "" else compute
        kept = self._kept(base_key(info.holds)) if is_mark else carrier
        gradient = self._dtypes.formats(base_key(info.holds))[1]
        rounded = not is_mark or not changes_nothing(gradient, carrier)
        if made == kept or not rounded:
            return _running(number)
        done = _behind(self._last_of_operator(number))  # autograd converts after the whole operator
        self._add(_running(number), done, info.elements * ITEM_BYTES[made], info.holds, "scratch")
        return done

    def _last_of_operator(self, number: int) -> int:
        events = self.schedule.events
        while number + 1 < len(events) and (events[number + 1].op, events[number + 1].backward) == (
            events[number].op,
            events[number].backward,
        ):
            number += 1
        return number

    def _add(self, start: int, end: int, size: int, key: str, role: str) -> None:
        self.segments.append(Segment(start=start, end=end, bytes=size, key=key, role=role))

    # ---- a part of the step -----------------------------------------------------------------------------------------

    def of_events(self, numbers: Iterable[int]) -> list[Segment]:
        """Return the segments of these events."""
        return [segment for number in numbers for segment in self.segments[self._spans[number]]]

    def replay_events(
        self, entries: Mapping[str, Entry], numbers: Iterable[int], marks: Iterable[int]
    ) -> list[Segment]:
        """Return what :meth:`of_events` would return under other entries.

        Args:
            entries: all entries.
            numbers: of the events.
            marks: all events that may alias their buffers.
        """
        return [segment for found in self.replay_each(entries, numbers, marks) for segment in found]

    def replay_each(
        self, entries: Mapping[str, Entry], numbers: Iterable[int], marks: Iterable[int]
    ) -> list[list[Segment]]:
        """Return the same as :meth:`replay_events`, with one list per event."""
        twin = copy.copy(self)
        twin.entries, twin.segments = with_loaded(entries, self.table.loaded), []
        twin._dtypes = ComputeDtypes.of_table(self.table, entries, self._promotable)
        twin._alias = twin._find_aliases(self.schedule.events[number] for number in marks)
        twin._twins = _by_source(twin._alias)
        spans = [twin._replay_event(number, self.schedule.events[number]) for number in numbers]
        return [twin.segments[span] for span in spans]

    def is_narrowed_alike(self, entries: Mapping[str, Entry], change: Mapping[str, Entry]) -> bool:
        """Return whether saved activations are packed under ``entries`` if and only if they are packed now.

        Args:
            entries: all entries, those of ``change`` included.
            change: the entries that differ.
        """
        if self._narrowed and any(entry.format != "fp32" for entry in change.values()):
            return True
        return is_narrowed(self.table, entries) == self._narrowed

    # ---- the answer -------------------------------------------------------------------------------------------------

    @property
    def resident_bytes(self) -> int:
        """Bytes of parameters, buffers, batch and optimizer states, which are always alive."""
        s, stored = self.schedule, self._resident
        return stored.parameters + self._buffer_bytes + s.batch_bytes + stored.states

    @property
    def summed_bytes(self) -> int:
        """Bytes of the gradients summed in earlier micro-batches, alive during the whole step."""
        return self._resident.gradients if self.schedule.micro_batches > 1 else 0

    @property
    def lasting_bytes(self) -> int:
        """Bytes that are alive during the whole forward and backward pass."""
        return self.resident_bytes + self.summed_bytes

    @cached_property
    def optimizer_scratch_bytes(self) -> int:
        """Bytes of temporary memory of the optimizer's step.

        Raises:
            PlanError: no library can store what the plan asks for.
        """
        return optimizer_scratch(self.schedule, stored_in(self.table, self.entries), self._update_rounding)

    @property
    def optimizer_peak_bytes(self) -> int:
        """Bytes alive while the optimizer steps."""
        return self.resident_bytes + self._resident.gradients + self.optimizer_scratch_bytes

    @cached_property
    def slots(self) -> Bytes:
        """Bytes alive in each slot, without the optimizer's step: ``SLOTS`` per event, and one more at the end."""
        alive: Bytes = np.cumsum(changes_of(self.segments, len(self.schedule.events))) + self.lasting_bytes
        return alive

    @property
    def peak_bytes(self) -> int:
        """The largest number of bytes alive at any moment of the step."""
        return max(int(self.slots.max(initial=0)), self.optimizer_peak_bytes)

    @property
    def _peak_slot(self) -> int | None:
        return int(self.slots.argmax()) if int(self.slots.max(initial=0)) >= self.optimizer_peak_bytes else None

    @property
    def peak_at(self) -> str:
        """Operator that runs at the peak."""
        if self._peak_slot is None:
            return "optimizer"
        event = self.schedule.events[min(self._peak_slot // SLOTS, len(self.schedule.events) - 1)]
        return event.op.removeprefix(MARK) + (" (backward)" if event.backward else " (forward)")

    @property
    def lasting(self) -> tuple[tuple[str, str, int], ...]:
        """What is always alive: (key, role, bytes)."""
        s, stored = self.schedule, self._resident
        found = [(name, "parameters", size) for name, size in stored.masters.items()]
        found += [(name, "optimizer states", size) for name, size in stored.optimizer_states.items()]
        found += [("buffers", "buffers", self._buffer_bytes), ("batch", "batch", s.batch_bytes)]
        found += [("unused", "parameters", stored.others[0]), ("unused", "optimizer states", stored.others[2])]
        found += self._gradients if s.micro_batches > 1 else ()
        return tuple(row for row in found if row[2])

    @property
    def _gradients(self) -> list[tuple[str, str, int]]:
        stored = self._resident
        found = [(name, str(Role.WEIGHT_GRAD), size) for name, size in stored.stored_gradients.items()]
        return [*found, ("unused", str(Role.WEIGHT_GRAD), stored.others[1])]

    @property
    def stepping(self) -> tuple[tuple[str, str, int], ...]:
        """What is alive only while the optimizer steps: (key, role, bytes)."""
        found = [] if self.schedule.micro_batches > 1 else self._gradients
        found.append(("optimizer scratch", "scratch", self.optimizer_scratch_bytes))
        return tuple(row for row in found if row[2])

    @property
    def alive(self) -> tuple[tuple[str, str, int], ...]:
        """What is alive at the peak: (key, role, bytes), largest first."""
        slot = self._peak_slot
        passing: Iterable[tuple[str, str, int]] = self.stepping
        if slot is not None:
            passing = ((x.key, str(x.role), x.bytes) for x in self.segments if x.start <= slot <= x.end and x.bytes)
        return tuple(sorted((*self.lasting, *passing), key=lambda row: -row[2]))

    @property
    def by_role(self) -> dict[str, int]:
        """Bytes alive at the peak by role."""
        sums: dict[str, int] = defaultdict(int)
        for _, role, size in self.alive:
            sums[role] += size
        return dict(sums)

    @property
    def timeline(self) -> tuple[tuple[str, str, int], ...]:
        """(operator, pass, bytes alive) for every operator, the optimizer's step last."""
        rows = [
            (e.op.removeprefix(MARK), "backward" if e.backward else "forward", int(self.slots[_running(n)]))
            for n, e in enumerate(self.schedule.events)
            if not e.op.startswith(MARK)
        ]
        return (*rows, ("optimizer", "step", self.optimizer_peak_bytes))
