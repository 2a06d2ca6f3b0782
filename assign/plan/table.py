"""The tensor table: every tensor of one training step, and the schedule of its memory.

This is the first waist of the hourglass: torch on one side (``tracer``), pure Python on the other
(``groups``, ``memory``, ``strategies``). Frozen, human-readable, JSON in and out.
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
from pydantic import AfterValidator, BaseModel, ConfigDict, TypeAdapter

from assign.errors import AssignError, PlanError, suggest
from assign.formats.dtypes import ITEM_BYTES
from assign.formats.rows import loaded_format
from assign.json_file import MOST_ELEMENTS, Count, Kind, shown, twice
from assign.notebook import SHOWN, Drawn, frame, table_html
from assign.plan.keys import Key, Part

_FILE = Kind(
    name="tensor table", error=PlanError, advice="Make one with 'assign trace TASK --json FILE', or TensorTable.save."
)
_STRICT = ConfigDict(extra="forbid", strict=True)


class Role(StrEnum):
    """What a tensor is for. The paper's own tensors are the first four."""

    WEIGHT = "weight"
    WEIGHT_GRAD = "weight_grad"
    ACTIVATION = "activation"
    ACTIVATION_GRAD = "activation_grad"
    SAVED = "saved"
    MASTER = "master"
    OPTIM_STATE = "optim_state"
    BUFFER = "buffer"


class Need(StrEnum):
    """What a tensor's values need, whatever a search would like.

    ``high``: never the low format of a recipe. ``float32``: no format but fp32. ``exact``, of a saved copy: none but
    the activation's own.
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
"""Role of a row → part that its key names; of other roles, the tensor itself."""

PAPER_ROLES = frozenset({Role.WEIGHT, Role.WEIGHT_GRAD, Role.ACTIVATION, Role.ACTIVATION_GRAD})


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One row of the table.

    Attributes:
        key: stable name, e.g. ``layer1.0/relu``, ``fc.weight.grad``.
        shape: as traced; the first axis is usually the batch.
        elements: what the paper counts; for a loss, one per sample.
        dtype: torch dtype it has in the step of the model as it was loaded, e.g. ``float32``.
        op: operator that makes it (``parameter`` for weights, ``input`` for the batch).
        module: path of the module whose forward makes it, ``''`` for the root.
        source: ``file.py:line`` of the user's code, ``''`` where unknown.
        group: number of the group that shares its decision.
        inputs: for an activation, keys that its operator reads, in order of the arguments.
        reads: the dtypes in which it does; empty where each is its tensor's own.
        opaque: its operator is another library's, and runs in the dtypes that it was written for.
        consumers: for an activation or weight, keys of the activations made from it.
        wide: its operator computes in float32 under every plan: the user's code asks for that.
        need: the least that its values need (see :mod:`assign.plan.precision`).
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
        """The key in its parts.

        The role decides which suffix counts, so a module may be called ``optim`` or ``grad``.
        """
        return Key.of(self.key, _PARTS.get(self.role, Part.TENSOR))


MARK = "mark:"
"""Prefix of an event's operator, and of a joint graph node's label, where a tensor is complete and gets its format."""

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
        elements: how many; dtype: torch dtype in the step of the model as it was loaded.
        holds: key of the tensor (or gradient) whose values it holds, ``''`` for an operator's own scratch.
        part: position in the operator's result; what follows the first part are statistics that stay as they are.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    elements: Count
    dtype: str
    holds: str = ""
    part: Count = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One operator of the step's forward or backward graph, in the order in which they run.

    Attributes:
        op: key of the operator that it belongs to; ``mark:KEY`` where tensor KEY is complete and gets its format.
        backward: in which pass it runs.
        reads, writes: indices of buffers; parameters and the batch are resident and do not appear.
        scratch: bytes its kernel needs for a moment, by the dtype in which it runs, as ``SCRATCH_DTYPES``; what is left
            out is none.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    op: str
    backward: bool
    reads: tuple[Count, ...] = ()
    writes: tuple[Count, ...] = ()
    scratch: Annotated[tuple[Count, ...], AfterValidator(_in_all_dtypes)] = ()

    def scratch_in(self, dtype: str) -> int:
        """Bytes its kernel needs for a moment when it runs in a dtype."""
        return dict(zip(SCRATCH_DTYPES, self.scratch, strict=False)).get(dtype, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How the step's memory comes and goes.

    Attributes:
        buffers, events: see there.
        kept: buffers that outlive the backward pass (gradients of the parameters).
        parameter_bytes, buffer_bytes, batch_bytes: resident during the whole step.
        gradient_bytes: gradients of all parameters, resident once the backward pass has made them.
        optimizer: name of its class, ``''`` without one.
        optimizer_bytes: states; optimizer_scratch_bytes: what its step allocates for a moment.
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


@dataclass(frozen=True, kw_only=True)
class Group:
    """Tensors that share a decision: the output of one matrix product, and all that follows it up to the next.

    Attributes:
        id: its number.
        elements: of all its tensors.
        keys: theirs.
    Source: arXiv 2301.13464, algorithm 1.
    """

    id: int
    elements: int
    keys: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TensorTable(Drawn):
    """Every tensor of one training step. Made by :func:`assign.trace`.

    Attributes:
        tensors: rows, in the order of execution.
        schedule: what :func:`assign.estimate` replays.
        breaks: where the code of the step needs the values of tensors, and why: it is then captured in several graphs,
            which end there. Empty if Dynamo captured it as one.
        outside: operators that depend on a parameter and are in none of these graphs: they run as in plain PyTorch.
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
        """Rows by key; of two with one key, as in activation checkpointing, the first."""
        return {info.key: info for info in reversed(self.tensors)}

    @cached_property
    def loaded(self) -> Mapping[str, str]:
        """Weight → name of the format in which it is loaded."""
        weights = (info for info in self.tensors if info.role is Role.WEIGHT and not info.parts.is_activation)
        return {info.key: loaded_format(info.dtype).name for info in weights}

    @cached_property
    def paper_tensors(self) -> tuple[TensorInfo, ...]:
        """Rows of the paper's four roles: what recipes and the low ratio speak of."""
        return tuple(info for info in self.tensors if info.role in PAPER_ROLES)

    @cached_property
    def buffers(self) -> tuple[str, ...]:
        """Names of the buffers that the step updates."""
        return tuple(info.parts.name for info in self.tensors if info.role is Role.BUFFER)

    @property
    def elements(self) -> int:
        """Elements of the paper's four roles."""
        return sum(info.elements for info in self.paper_tensors)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Groups by number, over the paper's four roles."""
        members: dict[int, list[TensorInfo]] = {}
        for info in self.paper_tensors:
            members.setdefault(info.group, []).append(info)
        return tuple(
            Group(id=number, elements=sum(i.elements for i in rows), keys=tuple(i.key for i in rows))
            for number, rows in sorted(members.items())
        )

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the model: names of all tensors, operators, shapes of the weights; not the batch size."""
        lines = [
            f"{info.key} {info.op} {info.shape if info.role is Role.WEIGHT else ''}" for info in self.paper_tensors
        ]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    def to_networkx(self) -> networkx.DiGraph:
        """Forward tensors as nodes (attributes: the row's fields), an edge from each tensor to what is made of it."""
        graph = networkx.DiGraph()
        forward = [info for info in self.tensors if info.role in (Role.WEIGHT, Role.ACTIVATION)]
        for info in forward:
            graph.add_node(info.key, **dataclasses.asdict(info))
        for info in forward:
            graph.add_edges_from((source, info.key) for source in info.inputs)
        return graph

    def to_json(self) -> dict[str, Any]:
        """Plain data; ``from_json`` gives the same table back."""
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
        """Inverse of :meth:`to_json`.

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
        """A frame with a row for each tensor, its fields the columns. Needs pandas."""
        names = [field.name for field in dataclasses.fields(TensorInfo)]
        rows = ({name: getattr(info, name) for name in names} | {"role": str(info.role)} for info in self.tensors)
        return frame(rows, names)

    def _repr_html_(self) -> str:
        """The largest tensors, for a notebook."""
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
        """Write the table to ``path`` as JSON, whole.

        Raises:
            PlanError: the file cannot be written.
        """
        _FILE.write(path, json.dumps(self.to_json()))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "TensorTable":
        """Read what :meth:`save`, or ``assign trace TASK --json FILE``, wrote.

        Raises:
            PlanError: the file cannot be read, or is not a table.
        """
        return cls._of_text(_FILE.read(path), str(path))


def check_same_model(
    fingerprint: str, own: str, *, what: str, advice: str, error: type[AssignError] = PlanError
) -> None:
    """Make sure that a file, a plan or a study belongs to a model.

    Args:
        fingerprint: of the model that it was made for.
        own: of the model that it is to be used with.
        what: a sentence without its end that says what is wrong where the two differ.
        advice: what to do then.
        error: what is raised then.
    """
    if fingerprint != own:
        raise error(f"{what}: its fingerprint is {fingerprint}, this model's is {own}.\n  {advice}")


class _TableFile(BaseModel):
    """Schema of a tensor table. ``elements`` and ``groups`` are written for other programs and not read."""

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
    long = max((len(event.scratch) for event in schedule.events), default=0)
    if long > len(SCRATCH_DTYPES):
        return f"an event has scratch in {long} dtypes, of {len(SCRATCH_DTYPES)}"
    total = sum(buffer.elements for buffer in schedule.buffers) + sum(sum(event.scratch) for event in schedule.events)
    return f"its buffers have more than {MOST_ELEMENTS} elements" if total > MOST_ELEMENTS else ""


def _close(dtype: str) -> str:
    return f"; nearest: {suggest(shown(dtype), ITEM_BYTES) or 'none'}"
