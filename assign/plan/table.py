"""The tensor table: every tensor of one training step, and the schedule of its memory.

The table is the interface between tracing, which uses torch, and memory model, searches and reports, which are pure
Python. It is frozen, and its file is human-readable JSON.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Annotated, Any, ClassVar

import networkx
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter

from assign.errors import AssignError, PlanError, suggest
from assign.formats.dtypes import ITEM_BYTES
from assign.formats.rows import loaded_format
from assign.json_file import MOST_ELEMENTS, Count, Kind, shown, twice
from assign.notebook import SHOWN, Drawn, frame, table_html
from assign.plan.keys import Key, Part
from assign.plan.step_options import MOST_MICRO_BATCHES

_FILE = Kind(
    name="tensor table", error=PlanError, advice="Make one with 'assign trace TASK --json FILE', or TensorTable.save."
)
_STRICT = ConfigDict(extra="forbid", strict=True)


class Role(StrEnum):
    """What a tensor is used for. The paper's own tensors are the first four."""

    WEIGHT = "weight"
    WEIGHT_GRAD = "weight_grad"
    ACTIVATION = "activation"
    ACTIVATION_GRAD = "activation_grad"
    SAVED = "saved"
    MASTER = "master"
    OPTIM_STATE = "optim_state"
    BUFFER = "buffer"


class Need(StrEnum):
    """The least precision that the values of a tensor need; a search cannot go below it.

    ``high``: never the low format of a recipe. ``float32``: no format but fp32. ``exact``, for a saved copy: no format
    but the activation's own.
    """

    NOTHING = ""
    HIGH = "high"
    FLOAT32 = "float32"
    EXACT = "exact"


_PARTS: Mapping[Role, Part] = {
    Role.WEIGHT_GRAD: Part.GRADIENT,
    Role.ACTIVATION_GRAD: Part.GRADIENT,
    Role.SAVED: Part.SAVED,
    Role.MASTER: Part.MASTER,
    Role.OPTIM_STATE: Part.STATE,
    Role.BUFFER: Part.BUFFER,
}
"""Role of a row → part that its key names. In other roles the key names the tensor itself."""

PAPER_ROLES = frozenset({Role.WEIGHT, Role.WEIGHT_GRAD, Role.ACTIVATION, Role.ACTIVATION_GRAD})


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One row of the table.

    Attributes:
        key: stable name, e.g. ``layer1.0/relu``, ``fc.weight.grad``.
        shape: as traced; the first axis is usually the batch.
        elements: number of elements as the paper counts them; for a loss, one per sample.
        dtype: torch dtype that it has in a step of the model as loaded, e.g. ``float32``.
        op: operator that makes it (``parameter`` for weights, ``input`` for the batch).
        module: path of the module whose forward makes it, ``''`` for the root.
        source: ``file.py:line`` of the user's code, ``''`` if unknown.
        group: number of the group that shares its decision.
        inputs: for an activation, keys of the tensors that its operator reads, in the order of the arguments.
        reads: dtypes in which the operator reads its inputs; empty if each is the dtype of the input itself.
        opaque: whether its operator belongs to another library and runs only in the dtypes that it was written for.
        consumers: for an activation or weight, keys of the activations made from it.
        wide: whether its operator computes in float32 under every plan, because the user's code asks for it.
        need: the least precision that its values need (see :mod:`assign.plan.precision`).
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    key: str
    role: Role
    shape: tuple[Count, ...]
    elements: Count
    dtype: str
    op: str
    module: str = ""
    source: str = ""
    group: Count = 0
    inputs: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    opaque: bool = False
    consumers: tuple[str, ...] = ()
    wide: bool = False
    need: Need = Need.NOTHING

    @property
    def parts(self) -> Key:
        """The parsed key.

        The role decides which suffix counts, so a module may be called ``optim`` or ``grad``.
        """
        return Key.of(self.key, _PARTS.get(self.role, Part.TENSOR))


MARK = "mark:"
"""Prefix of an event's operator, and of a joint graph node's label, where a complete tensor gets its format."""

SCRATCH_DTYPES = ("float32", "bfloat16", "float16", "float64")
"""Order of the dtypes in ``Event.scratch``."""


def _in_all_dtypes(scratch: tuple[int, ...]) -> tuple[int, ...]:
    """Return scratch bytes for each dtype. Old files have two values: for float32 and for 16-bit dtypes."""
    if len(scratch) == 2:
        in_float32, in_16_bit = scratch
        return (in_float32, *[in_16_bit] * (len(SCRATCH_DTYPES) - 1)) if any(scratch) else ()
    return scratch


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffer:
    """Memory that one operator of the step allocates.

    Attributes:
        elements: number of elements.
        dtype: torch dtype in a step of the model as loaded.
        holds: key of the tensor (or gradient) whose values it holds, ``''`` for temporary memory of an operator.
        part: position in the operator's result. Parts after the first are statistics, and their dtype does not change.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    elements: Count
    dtype: str
    holds: str = ""
    part: Count = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One operator of the step's forward or backward graph. Events are in the order of execution.

    Attributes:
        op: key of the operator that it belongs to; ``mark:KEY`` where tensor KEY is complete and gets its format.
        backward: whether it runs in the backward pass.
        reads, writes: indices of buffers. Parameters and the batch are always resident and do not appear.
        scratch: bytes of temporary memory that its kernel needs, for each dtype of ``SCRATCH_DTYPES``; missing values
            are 0.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    op: str
    backward: bool
    reads: tuple[Count, ...] = ()
    writes: tuple[Count, ...] = ()
    scratch: Annotated[tuple[Count, ...], AfterValidator(_in_all_dtypes)] = ()

    def scratch_in(self, dtype: str) -> int:
        """Return the bytes of temporary memory that its kernel needs when it runs in a dtype."""
        return dict(zip(SCRATCH_DTYPES, self.scratch, strict=False)).get(dtype, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """When the memory of a step is allocated and freed.

    Attributes:
        buffers, events: see :class:`Buffer` and :class:`Event`.
        kept: buffers that outlive the backward pass (gradients of the parameters).
        parameter_bytes, buffer_bytes, batch_bytes: resident during the whole step; of the whole batch.
        gradient_bytes: gradients of all parameters, resident after the backward pass.
        optimizer: name of its class, ``''`` if there is none.
        optimizer_bytes: optimizer states.
        optimizer_scratch_bytes: temporary memory of the optimizer's step.
        micro_batches: number of parts of the batch that run one after another. The events are those of one part, while
            the gradients of earlier parts are alive.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    buffers: tuple[Buffer, ...] = ()
    events: tuple[Event, ...] = ()
    kept: tuple[Count, ...] = ()
    parameter_bytes: Count = 0
    buffer_bytes: Count = 0
    batch_bytes: Count = 0
    gradient_bytes: Count = 0
    optimizer: str = ""
    optimizer_bytes: Count = 0
    optimizer_scratch_bytes: Count = 0
    micro_batches: Annotated[int, Field(ge=1, le=MOST_MICRO_BATCHES)] = 1


@dataclass(frozen=True, kw_only=True)
class Group:
    """Tensors that share a decision: the output of one matrix product, and everything computed from it up to the next.

    Attributes:
        id: number of the group.
        elements: total number of elements of its tensors.
        keys: keys of its tensors.
    Source: arXiv 2301.13464, algorithm 1.
    """

    id: int
    elements: int
    keys: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TensorTable(Drawn):
    """Every tensor of one training step. :func:`assign.trace` makes it.

    Attributes:
        tensors: rows, in the order of execution.
        schedule: the schedule that :func:`assign.estimate` replays.
        breaks: graph breaks: where and why the code of the step needs the values of tensors, so that it is captured as
            several graphs. Empty if Dynamo captured one graph.
        outside: operators that depend on a parameter and are in none of these graphs. They run as in plain PyTorch.
    """

    tensors: tuple[TensorInfo, ...]
    schedule: Schedule = Schedule()
    breaks: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()

    @cached_property
    def by_key(self) -> Mapping[str, TensorInfo]:
        """Rows by key."""
        return {info.key: info for info in self.tensors}

    @cached_property
    def first_by_key(self) -> Mapping[str, TensorInfo]:
        """Rows by key. Activation checkpointing makes two rows with one key; this has the first of them."""
        return {info.key: info for info in reversed(self.tensors)}

    @cached_property
    def loaded(self) -> Mapping[str, str]:
        """Weight → name of the format in which it was loaded."""
        weights = (info for info in self.tensors if info.role is Role.WEIGHT and not info.parts.is_activation)
        return {info.key: loaded_format(info.dtype).name for info in weights}

    @cached_property
    def paper_tensors(self) -> tuple[TensorInfo, ...]:
        """Rows of the paper's four roles. Recipes and the low ratio refer to these."""
        return tuple(info for info in self.tensors if info.role in PAPER_ROLES)

    @cached_property
    def buffers(self) -> tuple[str, ...]:
        """Names of the buffers that the step updates."""
        return tuple(info.parts.name for info in self.tensors if info.role is Role.BUFFER)

    @property
    def elements(self) -> int:
        """Number of elements of the tensors in the paper's four roles."""
        return sum(info.elements for info in self.paper_tensors)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Groups of the tensors in the paper's four roles, ordered by number."""
        members: dict[int, list[TensorInfo]] = {}
        for info in self.paper_tensors:
            members.setdefault(info.group, []).append(info)
        return tuple(
            Group(id=number, elements=sum(i.elements for i in rows), keys=tuple(i.key for i in rows))
            for number, rows in sorted(members.items())
        )

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all tensors' names and operators and of the weights' shapes; it does not depend on the batch size."""
        lines = [
            f"{info.key} {info.op} {info.shape if info.role is Role.WEIGHT else ''}" for info in self.paper_tensors
        ]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    def to_networkx(self) -> networkx.DiGraph:
        """Return a graph of the forward tensors, with an edge from each tensor to those made from it.

        The attributes of a node are the fields of its row.
        """
        graph = networkx.DiGraph()
        forward = [info for info in self.tensors if info.role in (Role.WEIGHT, Role.ACTIVATION)]
        for info in forward:
            graph.add_node(info.key, **dataclasses.asdict(info))
        for info in forward:
            graph.add_edges_from((source, info.key) for source in info.inputs)
        return graph

    def to_json(self) -> dict[str, Any]:
        """Return the table as plain data, from which ``from_json`` makes the same table."""
        return {
            "fingerprint": self.fingerprint,
            "elements": self.elements,
            "groups": [dataclasses.asdict(group) for group in self.groups],
            "tensors": [dataclasses.asdict(info) for info in self.tensors],
            "schedule": dataclasses.asdict(self.schedule),
            "breaks": list(self.breaks),
            "outside": list(self.outside),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "TensorTable":
        """Return the table that :meth:`to_json` turned into ``data``.

        Raises:
            PlanError: the data is not a table.
        """
        try:
            text = json.dumps(data)
        except (TypeError, ValueError, RecursionError) as error:
            raise PlanError(f"the table is not a tensor table: {error}. {_FILE.advice}") from None
        return cls._of_text(text, "the table")

    @classmethod
    def _of_text(cls, text: str, where: str) -> "TensorTable":
        file = _FILE.load(_SCHEMA, text, where)
        table = TensorTable(tensors=file.tensors, schedule=file.schedule, breaks=file.breaks, outside=file.outside)
        problem = _problem(table)
        if not problem and file.fingerprint not in (None, table.fingerprint):
            problem = (
                f"its fingerprint is {shown(file.fingerprint)!r}, and that of its tensors {table.fingerprint!r}: one "
                "of them was changed"
            )
        if problem:
            raise PlanError(f"{where} is not a valid tensor table: {problem}. {_FILE.advice}")
        return table

    def to_pandas(self) -> Any:
        """Return a data frame with one row per tensor and one column per field. Needs pandas."""
        names = [field.name for field in dataclasses.fields(TensorInfo)]
        rows = ({name: getattr(info, name) for name in names} | {"role": str(info.role)} for info in self.tensors)
        return frame(rows, names)

    def _repr_html_(self) -> str:
        """Return the largest tensors as an HTML table, for a notebook."""
        largest = sorted(self.paper_tensors, key=lambda info: -info.elements)
        most = max((info.elements for info in largest), default=1) or 1
        rows = [
            (
                (i.key, i.role.replace("_", " "), "×".join(map(str, i.shape)) or "scalar", f"{i.elements:,}"),
                i.elements / most,
            )
            for i in largest[:SHOWN]
        ]
        title = f"{len(self.tensors)} tensors of one step, {self.elements:,} elements, {len(self.groups)} groups"
        return table_html(title, ["tensor", "role", "shape", "elements"], rows, len(largest))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table to ``path`` as JSON, atomically.

        Raises:
            PlanError: the file cannot be written.
        """
        _FILE.write(path, json.dumps(self.to_json()))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "TensorTable":
        """Return the table in a file that :meth:`save` or ``assign trace TASK --json FILE`` wrote.

        Raises:
            PlanError: the file cannot be read, or is not a table.
        """
        return cls._of_text(_FILE.read(path), str(path))


def check_same_model(
    fingerprint: str, own: str, *, what: str, advice: str, error: type[AssignError] = PlanError
) -> None:
    """Check that a file, a plan or a study belongs to a model.

    Args:
        fingerprint: of the model that it was made for.
        own: of the model that it is to be used with.
        what: start of the error message if the two differ, without a full stop.
        advice: end of the error message: what to do.
        error: class of the error.
    """
    if fingerprint != own:
        raise error(f"{what}: its fingerprint is {fingerprint}, this model's is {own}.\n  {advice}")


class _TableFile(BaseModel):
    """Schema of a tensor table's file. ``elements`` and ``groups`` are for other programs and ignored when read."""

    model_config = ConfigDict(extra="forbid", strict=True)

    tensors: tuple[TensorInfo, ...]
    schedule: Schedule
    breaks: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    fingerprint: str | None = None
    elements: Any = None
    groups: Any = None


_SCHEMA = TypeAdapter(_TableFile)


def _problem(table: TensorTable) -> str:
    """Return why a table is invalid; an empty string if it is valid."""
    again = twice(info.key for info in table.tensors)
    if again is not None:
        return f"the tensor {shown(again)!r} is in it twice"
    for info in table.tensors:
        for dtype in (info.dtype, *info.reads):
            if dtype not in ITEM_BYTES:
                return f"{shown(info.key)!r} has the dtype {shown(dtype)!r}{_close(dtype)}"
    return _schedule_problem(table.schedule)


def _schedule_problem(schedule: Schedule) -> str:
    count = len(schedule.buffers)
    for number, buffer in enumerate(schedule.buffers):
        if buffer.dtype not in ITEM_BYTES:
            return f"buffer {number} has the dtype {shown(buffer.dtype)!r}{_close(buffer.dtype)}"
    used = (*schedule.kept, *(number for event in schedule.events for number in (*event.reads, *event.writes)))
    if max(used, default=0) >= max(count, 1):
        return f"its schedule uses the buffer {max(used)} of {count}, which are numbered from 0"
    made: set[int] = set()
    for number, event in enumerate(schedule.events):
        early, again = set(event.reads) - made, made.intersection(event.writes)
        if early or again or len(set(event.writes)) < len(event.writes):
            what = f"reads the buffer {min(early)} before it is made" if early else "makes a buffer a second time"
            return f"event {number} {what}"
        made.update(event.writes)
    long = max((len(event.scratch) for event in schedule.events), default=0)
    if long > len(SCRATCH_DTYPES):
        return f"an event has scratch in {long} dtypes, more than {len(SCRATCH_DTYPES)}"
    total = sum(buffer.elements for buffer in schedule.buffers) + sum(sum(event.scratch) for event in schedule.events)
    return f"its buffers have more than {MOST_ELEMENTS} elements" if total > MOST_ELEMENTS else ""


def _close(dtype: str) -> str:
    return f"; nearest: {suggest(shown(dtype), ITEM_BYTES) or 'none'}"
