"""List every tensor of a step under a plan: format, bytes, bytes at the peak, noise."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from assign.formats.dtypes import ITEM_BYTES
from assign.memory.profile import Moments
from assign.plan.keys import Key, base_key, master_key, stored_grad_key
from assign.plan.noise_table import EXACT, Cell, NoiseTable
from assign.plan.persistent_state import (
    StateFormat,
    buffer_format,
    is_stored,
    master_format,
    packed_bytes,
    resident,
    state_format,
)
from assign.plan.plan import Assignment
from assign.plan.table import PAPER_ROLES, Role, TensorInfo, TensorTable

_ALIVE_AS = {Role.MASTER: "parameters", Role.OPTIM_STATE: "optimizer states", Role.BUFFER: "buffers"}
_ROUNDED = PAPER_ROLES | {Role.SAVED}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One tensor.

    Attributes:
        path: of its module, ``''`` for the model itself.
        bytes: in its format, scales included.
        fp32_bytes: as float32.
        peak_bytes: its bytes that are alive at the plan's peak.
        noise: noise that this format adds to the gradient; None if it was not measured, or the tensor is not rounded.
    """

    key: str
    role: Role
    path: str
    group: int
    shape: tuple[int, ...]
    elements: int
    format: str
    bytes: int
    fp32_bytes: int
    peak_bytes: int
    noise: float | None

    @property
    def alive_as(self) -> str:
        """Name of this role in the memory model."""
        return _ALIVE_AS.get(self.role, str(self.role))

    @property
    def name(self) -> str:
        """The key without its path."""
        rest = self.key.removeprefix(self.path) if self.path else self.key
        return rest.lstrip("./") or self.key


def tensor_rows(
    table: TensorTable,
    plan: Assignment,
    after: Moments,
    noise: NoiseTable | None = None,
) -> tuple[Row, ...]:
    """Return a row for each of the table's tensors, each master, and each optimizer state that the plan adds.

    Args:
        table: of the model.
        plan: for this model.
        after: the plan's moments.
        noise: gives each row its noise, if it is known.
    """
    at_peak: dict[tuple[str, str], int] = defaultdict(int)
    for segment in after.alive:
        if segment.start <= after.peak <= segment.end:
            at_peak[segment.key, segment.role] += segment.bytes
    found = []
    for info, key, role, fmt, size in _tensors(table, plan):
        alive = at_peak.get((base_key(key) if role is Role.SAVED else key, _ALIVE_AS.get(role, role)), 0)
        found.append(
            Row(
                key=key,
                role=role,
                path=info.parts.module if info.parts.is_activation else info.module,
                group=info.group,
                shape=info.shape,
                elements=info.elements,
                format=fmt,
                bytes=size,
                fp32_bytes=info.elements * ITEM_BYTES["float32"],
                peak_bytes=size if role is Role.BUFFER else alive,
                noise=_noise(noise, plan, key) if role in _ROUNDED else None,
            )
        )
    return tuple(found)


def formats_of(rows: Sequence[Row]) -> tuple[str, ...]:
    """Return the names of all formats, the widest first."""
    bits: dict[str, float] = {}
    for row in rows:
        bits[row.format] = min(8 * row.bytes / max(row.elements, 1), bits.get(row.format, float("inf")))
    return tuple(sorted(bits, key=lambda name: (-bits[name], name)))


def _tensors(table: TensorTable, plan: Assignment) -> Iterator[tuple[TensorInfo, str, Role, str, int]]:
    """Yield the table's row, key, role, format and bytes of each tensor."""
    stored = resident(table, plan.entries, plan.update_rounding)
    plan = plan.with_loaded(table.loaded)
    for info in table.tensors:
        fmt = _format(info, plan)
        yield info, info.key, info.role, fmt.name, packed_bytes(fmt, info.elements)
        if info.role is Role.WEIGHT and is_stored(info):
            key = master_key(info.key)
            yield info, key, Role.MASTER, master_format(plan.entries, info.key).name, stored.masters[key]
        if (key := stored_grad_key(base_key(info.key))) in plan.entries and info.role is Role.WEIGHT_GRAD:
            yield info, key, info.role, plan.entries[key].format, stored.stored_gradients[info.key]
    for key, size in stored.optimizer_states.items():
        weight = Key.parse(key, table.by_key)
        if weight.is_of_weight and key not in table.by_key:  # a state that the plan adds
            yield table.by_key[weight.name], key, Role.OPTIM_STATE, master_format(plan.entries, weight.name).name, size


def _format(info: TensorInfo, plan: Assignment) -> StateFormat:
    if info.role is Role.SAVED:
        return plan.saved_format(info.parts.name)
    if info.role is Role.OPTIM_STATE:
        return state_format(plan.entries, info.parts.name, info.parts.state)
    if info.role is Role.BUFFER:
        return buffer_format(plan.entries, info.parts.name)
    return plan.format_of(info.key)


def _noise(noise: NoiseTable | None, plan: Assignment, key: str) -> float | None:
    if noise is None or key not in plan.entries:
        return None
    name = plan.entries[key].format
    return noise.noise(key, name) if name == EXACT or Cell(key, name) in noise.cells else None
