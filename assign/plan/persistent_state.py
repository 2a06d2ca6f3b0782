"""Formats and sizes of what is stored between steps: masters, stored gradients, optimizer states and buffers.

Entries for them are optional. A master without an entry has the dtype in which the parameter was loaded: fp32, unless
:func:`with_loaded` has added an entry. A stored gradient or an optimizer state without an entry has the dtype of its
master, as in plain torch. A plan without such entries therefore keeps parameters, gradients and states in the dtypes of
the loaded model, whatever formats it has for the step.

A master in ``bf16+8`` is a parameter in bf16 (its gradients are bf16 by default) and 8 extra bits in the optimizer's
state. The optimizer joins both to float32 for its step, and its other states are float32.

A master or an optimizer state may also be a posit or another format with a layout. It is then a float32 tensor that
holds only values of the format: it is rounded when the plan is applied, and after each step of the optimizer.

Buffers in float32 that the step updates, such as the running statistics of batch normalisation, have rows of their own.
A buffer without an entry stays as it was loaded. A step computes buffers in float32 and rounds them to nearest at its
end, so a moving average stops before it reaches its target: an update that is smaller than half the spacing of values
is lost. With a momentum of 0.1 this happens within 2 % of the value in bf16 and within 0.25 % in fp16; with a smaller
momentum, proportionally earlier. A variance above 65504 overflows in fp16.

:mod:`assign.plan.optimizer_backends` says which library can store what. This module does not import torch.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from assign.errors import FormatError, PlanError, suggest
from assign.formats.dtypes import ITEM_BYTES
from assign.formats.parsing import parse_format
from assign.formats.rows import FORMATS, MASTER_FORMATS, STATE_FORMATS, BlockFormat, Format
from assign.plan.entry import Entry
from assign.plan.keys import Key, Part, buffer_key, master_key, state_key, stored_grad_key
from assign.plan.table import Role, TensorInfo, TensorTable

StateFormat = Format | BlockFormat

NATIVE = ("fp32", "bf16", "fp16")
"""Formats for which torch has arithmetic: allowed for masters, buffers, stored gradients and states.

fp64 is allowed too, for parameters that were loaded in it."""

GRADIENTS = (*NATIVE, "e5m2:pow2", "e4m3:pow2")
"""Formats of stored gradients. 8-bit ones need a scale: e5m2 ends at 2^-16, and most gradients are smaller."""


COMPENSATION = "compensation"
"""The state of Kahan summation: the part of past updates that the weight lost, negated as in the paper."""

SUM_PIECE = 2**15
"""Elements of a gradient that are added to a sum at a time on a CPU, where the sum or the gradient is not float32."""

EXTRA_BITS = "extra_bits"
"""The state with the extra bits of a master that has more bits than its parameter: one byte per element."""


class UpdateRounding(StrEnum):
    """How the sum of a weight and its update is rounded to the weight's dtype."""

    NEAREST = "nearest"
    STOCHASTIC = "stochastic"
    KAHAN = "kahan"


class Named(Protocol):
    """The part of an entry that this module uses."""

    @property
    def format(self) -> str:
        """Name of the format."""


def parse_stored(name: str, part: Part) -> StateFormat:
    """Return the format called ``name``, for a stored tensor.

    Raises:
        FormatError: the format does not exist, or is not allowed for this part.
    """
    wanted = "".join(name.split()).lower()
    if part is Part.STATE and wanted in STATE_FORMATS:
        return STATE_FORMATS[wanted]
    if part is Part.MASTER and wanted in MASTER_FORMATS:
        return MASTER_FORMATS[wanted]
    if part in (Part.MASTER, Part.STATE) and _is_emulated(wanted):
        return parse_format(wanted)
    if wanted in (*NATIVE, "fp64") or (part is Part.STORED_GRADIENT and wanted in GRADIENTS):
        return parse_format(wanted)
    what, why, allowed = _WORDS[part]
    if wanted not in STATE_FORMATS:
        parse_format(name)  # raises for a name that does not exist, and suggests a similar one
    raise FormatError(
        f"{name!r} is not allowed for {what}: {why}.\n  Allowed: {', '.join(allowed)}.\n  Choose one of these."
    )


def _is_emulated(name: str) -> bool:
    """Whether ``name`` is that of a format with a layout."""
    try:
        return parse_format(name).layout is not None
    except FormatError:
        return False


_WORDS: Mapping[Part, tuple[str, str, tuple[str, ...]]] = {
    Part.MASTER: (
        "a master",
        "training adds its updates to it, and in 8 bits or less almost every update is below half a step and lost",
        (*NATIVE, *MASTER_FORMATS, "posit(n,es)"),
    ),
    Part.STORED_GRADIENT: (
        "a stored gradient",
        "it needs a dtype of torch, and in 8 bits also a scale, because small gradients would become zero",
        GRADIENTS,
    ),
    Part.BUFFER: ("a buffer", "a step adds to it, so it needs a dtype for which torch has arithmetic", NATIVE),
    Part.STATE: ("an optimizer state", "no library stores states in it", (*NATIVE, *STATE_FORMATS, "posit(n,es)")),
}


def with_loaded(entries: Mapping[str, Entry], loaded: Mapping[str, str]) -> Mapping[str, Entry]:
    """Return the entries, with one more for each master that has none and was loaded in another dtype than float32.

    Args:
        entries: by key; not changed.
        loaded: weight → name of the format in which it was loaded; weights in fp32 may be left out.
    """
    absent = {master_key(key): name for key, name in loaded.items() if name != "fp32"}
    absent = {key: name for key, name in absent.items() if key not in entries}
    return {**entries, **{key: Entry(name, False) for key, name in absent.items()}} if absent else entries


def master_format(entries: Mapping[str, Named], key: str) -> Format:
    """Return the format of the master of weight ``key``, extra bits included."""
    entry = entries.get(master_key(key))
    if entry is None:
        return FORMATS["fp32"]
    return MASTER_FORMATS.get(entry.format) or parse_format(entry.format)


def parameter_format(master: Format) -> Format:
    """Return the format of the parameter itself: that of its master, without the extra bits; fp32 if it is emulated."""
    return FORMATS["bf16"] if master.extra_bits else _stored_as(master)


def stepped_format(master: Format) -> Format:
    """Return the format that the optimizer's step computes with: the master's, or fp32 if it is split or emulated."""
    return FORMATS["fp32"] if master.extra_bits else _stored_as(master)


def _stored_as(fmt: Format) -> Format:
    """Return the format of the tensor that holds a master or state: fp32 for a format with a layout."""
    return FORMATS["fp32"] if fmt.layout else fmt


def gradient_format(entries: Mapping[str, Named], key: str) -> Format:
    """Return the format of the stored gradient of weight ``key``."""
    entry = entries.get(stored_grad_key(key))
    return parse_format(entry.format) if entry else parameter_format(master_format(entries, key))


def stored_dtype(fmt: Format) -> str:
    """Return the torch dtype of a stored parameter, gradient or buffer."""
    fmt = parameter_format(fmt)
    return fmt.native if fmt.scaled and fmt.native else fmt.carrier


def has_scaled_gradients(entries: Mapping[str, Named]) -> bool:
    """Whether any gradient is stored in 8 bits, with a scale."""
    short = (key for key, entry in entries.items() if entry.format not in NATIVE)
    return any(Key.parse(key, entries).part is Part.STORED_GRADIENT for key in short)


def state_format(entries: Mapping[str, Named], key: str, state: str) -> StateFormat:
    """Return the format of the tensor of one optimizer state of weight ``key``; fp32 if the state is emulated."""
    entry = entries.get(state_key(key, state))
    if entry is None:
        return stepped_format(master_format(entries, key))
    fmt = parse_stored(entry.format, Part.STATE)
    return _stored_as(fmt) if isinstance(fmt, Format) else fmt


def rounded_states(entries: Mapping[str, Named], key: str, states: Iterable[str]) -> dict[str, Format]:
    """Return {state: format to which it is rounded after each step} of the emulated states of weight ``key``.

    A state without an entry is rounded to the format of an emulated master.
    """
    master = master_format(entries, key)
    named = {state: entries.get(state_key(key, state)) for state in states}
    found = {state: parse_stored(entry.format, Part.STATE) if entry else master for state, entry in named.items()}
    return {state: fmt for state, fmt in found.items() if isinstance(fmt, Format) and fmt.layout}


def buffer_format(entries: Mapping[str, Named], name: str) -> Format:
    """Return the format in which buffer ``name`` is stored between two steps."""
    entry = entries.get(buffer_key(name))
    return parse_format(entry.format) if entry else FORMATS["fp32"]


def narrow_buffers(entries: Mapping[str, Named]) -> tuple[str, ...]:
    """Return the names of the buffers that are stored in 16 bits."""
    keys = (Key.parse(key, entries) for key, entry in entries.items() if entry.format != "fp32")
    return tuple(key.name for key in keys if key.part is Part.BUFFER)


def check_stored(entries: Mapping[str, Named]) -> None:
    """Check that a model can be trained with these formats of stored tensors.

    Raises:
        PlanError: a gradient is stored in fp16, but its master is wider.
    """
    for text, entry in entries.items():
        key = Key.parse(text, entries)
        if key.part is not Part.STORED_GRADIENT or entry.format != "fp16":
            continue
        if master_format(entries, key.name).name != "fp16":
            raise PlanError(
                f"{text!r} is assigned fp16, but its master {master_format(entries, key.name).name}: fp16 gradients "
                "need a loss scale, and dividing by it in fp16 loses the small values that it preserved.\n"
                f"  Choose bf16 for {text!r}, or fp16 for {master_key(key.name)!r} too."
            )


def is_narrowed(entries: Mapping[str, Named]) -> bool:
    """Whether any master, stored gradient or optimizer state has another format than fp32."""
    return any(entry.format != "fp32" for key, entry in entries.items() if Key.parse(key, entries).is_of_weight)


def has_narrow_masters(entries: Mapping[str, Named]) -> bool:
    """Whether the updates of any master are rounded to 16 bits."""
    return any(is_narrow(fmt) for fmt in _masters(entries).values())


def first_split(entries: Mapping[str, Named]) -> str | None:
    """Return the first weight whose master has extra bits; None if there is none."""
    return next((key for key, fmt in _masters(entries).items() if fmt.extra_bits), None)


def _masters(entries: Mapping[str, Named]) -> dict[str, Format]:
    """Return {weight: format of its master} for the masters that have an entry other than fp32."""
    keys = (Key.parse(key, entries) for key, entry in entries.items() if entry.format != "fp32")
    return {key.name: master_format(entries, key.name) for key in keys if key.part is Part.MASTER}


def is_narrow(fmt: Format) -> bool:
    """Whether updates of a master in this format are rounded to 16 bits."""
    return fmt.name in ("bf16", "fp16")


def parse_rounding(update_rounding: str, *, where: str) -> UpdateRounding:
    """Return the rounding of updates called ``update_rounding``.

    Raises:
        PlanError: there is no such rounding; the message begins with ``where``.
    """
    if update_rounding not in list(UpdateRounding):
        close = suggest(update_rounding, UpdateRounding)
        raise PlanError(
            f"{where}: update_rounding {update_rounding!r} is not known{f', did you mean {close}?' if close else '.'} "
            f"Choose one of: {', '.join(UpdateRounding)}."
        )
    return UpdateRounding(update_rounding)


def check_rounding(update_rounding: str, entries: Mapping[str, Named], *, where: str) -> UpdateRounding:
    """Return the rounding of updates, after checking that it suits the masters.

    Every rounding but ``nearest`` needs a 16-bit master.

    Raises:
        PlanError: there is no such rounding, or no such master; the message begins with ``where``.
    """
    chosen = parse_rounding(update_rounding, where=where)
    check_unsplit(chosen, entries, where=where)
    if chosen != UpdateRounding.NEAREST and not has_narrow_masters(entries):
        raise PlanError(
            f"{where}: update_rounding={str(chosen)!r} is for 16-bit masters, but this training has none.\n"
            "  Give a plan that stores such masters (--master bf16, or --strategy standalone), or leave it out."
        )
    return chosen


def check_unsplit(update_rounding: str, entries: Mapping[str, Named], *, where: str) -> None:
    """Check that updates are rounded to nearest if any master has extra bits, which keep what rounding loses.

    Raises:
        PlanError: they are not; the message begins with ``where``.
    """
    split = first_split(entries)
    if update_rounding != UpdateRounding.NEAREST and split is not None:
        raise PlanError(
            f"{where}: update_rounding={str(update_rounding)!r} was requested, but {master_key(split)!r} is "
            f"{entries[master_key(split)].format}, whose extra bits keep what rounding to 16 bits would lose.\n"
            "  Allowed: nearest; the others for masters in bf16 and fp16.\n"
            "  Leave update_rounding out, or store masters as bf16."
        )


def is_stored(row: TensorInfo) -> bool:
    """Whether a row is a parameter, its gradient or an optimizer state.

    An activation that enters a checkpointed block also has the role of a weight; its key contains a ``/``.
    """
    return row.role in (Role.WEIGHT, Role.WEIGHT_GRAD, Role.OPTIM_STATE) and not row.parts.is_activation


# ---- bytes


def bytes_of(fmt: StateFormat, elements: int) -> int:
    """Return the bytes of a stored tensor, scales included."""
    return fmt.bytes_of(elements) if isinstance(fmt, BlockFormat) else elements * item_bytes(fmt)


def packed_bytes(fmt: StateFormat, elements: int) -> int:
    """Return the size of a saved activation in bytes, including its scales."""
    if isinstance(fmt, BlockFormat):
        return fmt.bytes_of(elements)
    return elements * fmt.code_bytes + (ITEM_BYTES["float32"] if fmt.scaled else 0)


def item_bytes(fmt: Format) -> int:
    """Return the bytes of one stored element of a native format."""
    return ITEM_BYTES[fmt.carrier]


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """Bytes of masters, stored gradients and optimizer states, by key.

    Attributes:
        others: bytes of parameters, gradients and states of the parameters that the step does not use. They stay as
            loaded.
    """

    masters: Mapping[str, int]
    stored_gradients: Mapping[str, int]
    optimizer_states: Mapping[str, int]
    others: tuple[int, int, int]

    @property
    def parameters(self) -> int:
        """Bytes of all parameters."""
        return sum(self.masters.values()) + self.others[0]

    @property
    def gradients(self) -> int:
        """Bytes of all stored gradients, after the backward pass."""
        return sum(self.stored_gradients.values()) + self.others[1]

    @property
    def states(self) -> int:
        """Bytes of all optimizer states."""
        return sum(self.optimizer_states.values()) + self.others[2]


def resident(
    table: TensorTable, entries: Mapping[str, Entry], update_rounding: str = UpdateRounding.NEAREST
) -> Resident:
    """Return the bytes of masters, stored gradients and optimizer states of a table under these entries.

    The extra bits of a master count as an optimizer state.

    Args:
        table: of the model.
        entries: by key; a tensor without an entry stays as it is loaded or made.
        update_rounding: with ``kahan``, each trained 16-bit master has one more state.
    """
    entries = with_loaded(entries, table.loaded)
    sizes: dict[Role, dict[str, int]] = {Role.WEIGHT: {}, Role.WEIGHT_GRAD: {}, Role.OPTIM_STATE: {}}
    known = dict.fromkeys(sizes, 0)
    for row in filter(is_stored, table.tensors):
        fmt: StateFormat
        size = None
        if row.role is Role.OPTIM_STATE:
            key = row.parts.name
            name, fmt = row.key, state_format(entries, key, row.parts.state)
            if row.key not in entries and table.loaded.get(key) in (None, master_format(entries, key).name):
                size = ITEM_BYTES[row.dtype] * row.elements  # the dtype that the optimizer itself gives it
        elif row.role is Role.WEIGHT:
            name, fmt = master_key(row.key), parameter_format(master_format(entries, row.key))
        else:
            name, fmt = row.key, gradient_format(entries, row.parts.name)
        sizes[row.role][name] = packed_bytes(fmt, row.elements) if size is None else size
        known[row.role] += ITEM_BYTES[row.dtype] * row.elements
        if row.role is Role.WEIGHT_GRAD:
            sizes[Role.OPTIM_STATE] |= _added_states(row, master_format(entries, row.parts.name), update_rounding)
    s = table.schedule
    others = zip((s.parameter_bytes, s.gradient_bytes, s.optimizer_bytes), known.values(), strict=True)
    parameters, gradients, states = (max(total - named, 0) for total, named in others)
    return Resident(
        masters=sizes[Role.WEIGHT],
        stored_gradients=sizes[Role.WEIGHT_GRAD],
        optimizer_states=sizes[Role.OPTIM_STATE],
        others=(parameters, gradients, states),
    )


def _added_states(row: TensorInfo, master: Format, update_rounding: str) -> dict[str, int]:
    """Return the bytes of extra bits or Kahan compensation of a trained weight; ``row`` is that of its gradient."""
    key = row.parts.name
    if master.extra_bits:
        return {state_key(key, EXTRA_BITS): row.elements * master.extra_bits // 8}
    if is_narrow(master) and update_rounding == UpdateRounding.KAHAN:
        return {state_key(key, COMPENSATION): bytes_of(master, row.elements)}
    return {}


def buffers(table: TensorTable, entries: Mapping[str, Named]) -> tuple[int, int]:
    """Return the bytes of all buffers between two steps, and of the float32 copies that a step makes of narrow ones."""
    wide = narrow = 0
    for row in table.tensors:
        fmt = buffer_format(entries, row.parts.name)
        if row.role is Role.BUFFER and fmt.carrier != "float32":
            wide += bytes_of(FORMATS["fp32"], row.elements)
            narrow += bytes_of(fmt, row.elements)
    return table.schedule.buffer_bytes - wide + narrow, wide
