"""What is kept between steps: masters, stored gradients, optimizer states, buffers. Formats and bytes.

Entries for them are optional. A master without one has the dtype in which the parameter was loaded, fp32 unless
:func:`with_loaded` has said otherwise; a stored gradient and an optimizer state without one have the dtype of their
master, as torch makes them. So a plan without such entries keeps parameters, gradients and states in the dtypes of the
model as it was loaded, whatever it rounds on the way. A master in ``bf16+8`` is a parameter in bf16, with gradients in
bf16 by default, and 8 extra bits in the optimizer's state; the optimizer steps on both joined, in float32, and so are
its other states. Buffers in float32 that the step updates, as the running statistics of a batch normalisation, have
rows of their own; a buffer without an entry stays as it was loaded. A step computes them in float32 and rounds them to
nearest at its end, so that a moving average stands still before it has arrived: with a momentum of 0.1, an update of a
tenth of the distance is lost where that is less than half a step, which is within 2 % of the value in bf16 and within
0.25 % in fp16; with a smaller momentum, proportionally earlier. Above 65504 fp16 has no variance.
Who can keep it, :mod:`assign.plan.optimizer_backends` says. No torch in here.
"""

from collections.abc import Mapping
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
"""Formats for which torch has arithmetic: of masters and buffers; stored gradients and states may have them too.

So has fp64, for what was loaded so."""

GRADIENTS = (*NATIVE, "e5m2:pow2", "e4m3:pow2")
"""Formats of stored gradients. In 8 bits they need their scale: without it e5m2 ends at 2^-16, and most are smaller."""


COMPENSATION = "compensation"
"""The state in which Kahan's sum keeps what the weight itself could not take; negative, as in the paper."""

EXTRA_BITS = "extra_bits"
"""The state that has, for a master in more bits than its parameter, the others: one byte for each weight."""


class UpdateRounding(StrEnum):
    """How the sum of a weight and its update gets into the weight's own dtype."""

    NEAREST = "nearest"
    STOCHASTIC = "stochastic"
    KAHAN = "kahan"


class Named(Protocol):
    """An entry, as far as this module knows it."""

    @property
    def format(self) -> str:
        """Name of its format."""


def parse_stored(name: str, part: Part) -> StateFormat:
    """The format called ``name``, for something stored.

    Raises:
        FormatError: there is none, or it is not for this part.
    """
    wanted = "".join(name.split()).lower()
    if part is Part.STATE and wanted in STATE_FORMATS:
        return STATE_FORMATS[wanted]
    if part is Part.MASTER and wanted in MASTER_FORMATS:
        return MASTER_FORMATS[wanted]
    if wanted in (*NATIVE, "fp64") or (part is Part.STORED_GRADIENT and wanted in GRADIENTS):
        return parse_format(wanted)
    what, why, allowed = _WORDS[part]
    if wanted not in STATE_FORMATS:
        parse_format(name)  # one that does not exist says so, with what is near
    raise FormatError(f"{name!r} is not for {what}: {why}.\n  Allowed: {', '.join(allowed)}.\n  Choose one of these.")


_WORDS: Mapping[Part, tuple[str, str, tuple[str, ...]]] = {
    Part.MASTER: (
        "a master",
        "training adds its updates to it, and in 8 bits or less almost every update is below half a step and lost",
        (*NATIVE, *MASTER_FORMATS),
    ),
    Part.STORED_GRADIENT: (
        "a stored gradient",
        "it has a dtype of torch's, and in 8 bits a scale too, or small gradients would be zero",
        GRADIENTS,
    ),
    Part.BUFFER: ("a buffer", "a step adds to it, in a dtype that torch has arithmetic for", NATIVE),
    Part.STATE: ("an optimizer state", "no library keeps states in it", (*NATIVE, *STATE_FORMATS)),
}


def with_loaded(entries: Mapping[str, Entry], loaded: Mapping[str, str]) -> Mapping[str, Entry]:
    """The entries, and one for each master that has none and is loaded in another dtype than float32.

    Args:
        entries: by key; they are not changed.
        loaded: weight → name of the format in which it is loaded; weights in fp32 may be left out.
    """
    absent = {master_key(key): name for key, name in loaded.items() if name != "fp32"}
    absent = {key: name for key, name in absent.items() if key not in entries}
    return {**entries, **{key: Entry(name, False) for key, name in absent.items()}} if absent else entries


def master_format(entries: Mapping[str, Named], key: str) -> Format:
    """Of the stored parameter behind weight ``key``, with all that is stored of it."""
    entry = entries.get(master_key(key))
    if entry is None:
        return FORMATS["fp32"]
    return MASTER_FORMATS.get(entry.format) or parse_format(entry.format)


def parameter_format(master: Format) -> Format:
    """Of the parameter itself: the master, without extra bits."""
    return FORMATS["bf16"] if master.extra_bits else master


def stepped_format(master: Format) -> Format:
    """What the optimizer steps on: the master, with its extra bits joined in float32."""
    return FORMATS["fp32"] if master.extra_bits else master


def gradient_format(entries: Mapping[str, Named], key: str) -> Format:
    """Return the format of the stored gradient of weight ``key``."""
    entry = entries.get(stored_grad_key(key))
    return parse_format(entry.format) if entry else parameter_format(master_format(entries, key))


def stored_dtype(fmt: Format) -> str:
    """Torch dtype of a stored parameter, gradient or buffer."""
    fmt = parameter_format(fmt)
    return fmt.native if fmt.scaled and fmt.native else fmt.carrier


def has_scaled_gradients(entries: Mapping[str, Named]) -> bool:
    """Return whether any gradient is stored in 8 bits, with a scale."""
    short = (key for key, entry in entries.items() if entry.format not in NATIVE)
    return any(Key.parse(key, entries).part is Part.STORED_GRADIENT for key in short)


def state_format(entries: Mapping[str, Named], key: str, state: str) -> StateFormat:
    """Of one optimizer state of weight ``key``."""
    entry = entries.get(state_key(key, state))
    return parse_stored(entry.format, Part.STATE) if entry else stepped_format(master_format(entries, key))


def buffer_format(entries: Mapping[str, Named], name: str) -> Format:
    """Of the buffer ``name`` between two steps."""
    entry = entries.get(buffer_key(name))
    return parse_format(entry.format) if entry else FORMATS["fp32"]


def narrow_buffers(entries: Mapping[str, Named]) -> tuple[str, ...]:
    """Buffers that are stored in 16 bits."""
    keys = (Key.parse(key, entries) for key, entry in entries.items() if entry.format != "fp32")
    return tuple(key.name for key in keys if key.part is Part.BUFFER)


def check_stored(entries: Mapping[str, Named]) -> None:
    """Make sure that what is stored can be trained with.

    Raises:
        PlanError: a gradient is stored in fp16 beside a wider master.
    """
    for text, entry in entries.items():
        key = Key.parse(text, entries)
        if key.part is not Part.STORED_GRADIENT or entry.format != "fp16":
            continue
        if master_format(entries, key.name).name != "fp16":
            raise PlanError(
                f"{text!r} is assigned fp16, its master {master_format(entries, key.name).name}: gradients this short "
                "need a loss scale, and dividing it out again in fp16 loses what it saved.\n"
                f"  Choose bf16 for {text!r}, or fp16 for {master_key(key.name)!r} too."
            )


def is_narrowed(entries: Mapping[str, Named]) -> bool:
    """Whether anything of a parameter is stored in another format than float32."""
    return any(entry.format != "fp32" for key, entry in entries.items() if Key.parse(key, entries).is_of_weight)


def has_narrow_masters(entries: Mapping[str, Named]) -> bool:
    """Whether updates of any master are rounded to 16 bits."""
    return any(is_narrow(fmt) for fmt in _masters(entries).values())


def first_split(entries: Mapping[str, Named]) -> str | None:
    """The first weight whose master has extra bits beside the parameter."""
    return next((key for key, fmt in _masters(entries).items() if fmt.extra_bits), None)


def _masters(entries: Mapping[str, Named]) -> dict[str, Format]:
    """Formats of masters that have entries, by weight."""
    keys = (Key.parse(key, entries) for key, entry in entries.items() if entry.format != "fp32")
    return {key.name: master_format(entries, key.name) for key in keys if key.part is Part.MASTER}


def is_narrow(fmt: Format) -> bool:
    """Whether updates to a master in this format are rounded to 16 bits."""
    return fmt.name in ("bf16", "fp16")


def parse_rounding(update_rounding: str, *, where: str) -> UpdateRounding:
    """Return the rounding of updates called ``update_rounding``.

    Raises:
        PlanError: there is none; names ``where`` it was asked for.
    """
    if update_rounding not in list(UpdateRounding):
        close = suggest(update_rounding, UpdateRounding)
        raise PlanError(
            f"{where}: update_rounding {update_rounding!r} is not known{f', did you mean {close}?' if close else '.'} "
            f"Choose one of: {', '.join(UpdateRounding)}."
        )
    return UpdateRounding(update_rounding)


def check_rounding(update_rounding: str, entries: Mapping[str, Named], *, where: str) -> UpdateRounding:
    """Return the rounding of updates, which needs a 16-bit master unless it is ``nearest``.

    Raises:
        PlanError: there is no such rounding, or no such master; names ``where`` it was asked for.
    """
    chosen = parse_rounding(update_rounding, where=where)
    check_unsplit(chosen, entries, where=where)
    if chosen != UpdateRounding.NEAREST and not has_narrow_masters(entries):
        raise PlanError(
            f"{where}: update_rounding={str(chosen)!r} is for masters in 16 bit, and this training has none.\n"
            "  Give a plan that stores them so (--master bf16, or --strategy standalone), or leave it out."
        )
    return chosen


def check_unsplit(update_rounding: str, entries: Mapping[str, Named], *, where: str) -> None:
    """Refuse a rounding of updates for masters with extra bits, which take what rounding would lose.

    Raises:
        PlanError: ``where`` it was asked for, and what to do.
    """
    split = first_split(entries)
    if update_rounding != UpdateRounding.NEAREST and split is not None:
        raise PlanError(
            f"{where}: update_rounding={str(update_rounding)!r} was asked for, but {master_key(split)!r} is "
            f"{entries[master_key(split)].format}, whose extra bits take what rounding to 16 bits would lose.\n"
            "  Allowed: nearest; the others for masters in bf16 and fp16.\n"
            "  Leave update_rounding out, or store masters as bf16."
        )


def is_stored(row: TensorInfo) -> bool:
    """Whether a row is a parameter, its gradient or a state of the optimizer.

    An activation that enters a checkpointed block has a weight's role there too; its key has a ``/``.
    """
    return row.role in (Role.WEIGHT, Role.WEIGHT_GRAD, Role.OPTIM_STATE) and not row.parts.is_activation


# ---- bytes


def bytes_of(fmt: StateFormat, elements: int) -> int:
    """Bytes of a stored tensor, scales included."""
    return fmt.bytes_of(elements) if isinstance(fmt, BlockFormat) else elements * item_bytes(fmt)


def waiting_bytes(fmt: StateFormat, elements: int) -> int:
    """Return the size of a saved activation in bytes, including its scales."""
    if isinstance(fmt, BlockFormat):
        return fmt.bytes_of(elements)
    return elements * fmt.code_bytes + (ITEM_BYTES["float32"] if fmt.scaled else 0)


def item_bytes(fmt: Format) -> int:
    """Bytes of one stored element of a native format."""
    return ITEM_BYTES[fmt.carrier]


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """Bytes of what is stored, by key. ``others``: of parameters that the step does not use, which are as loaded."""

    masters: Mapping[str, int]
    stored_gradients: Mapping[str, int]
    optimizer_states: Mapping[str, int]
    others: tuple[int, int, int]

    @property
    def parameters(self) -> int:
        """Of all masters."""
        return sum(self.masters.values()) + self.others[0]

    @property
    def gradients(self) -> int:
        """Of all stored gradients, once the backward pass has made them."""
        return sum(self.stored_gradients.values()) + self.others[1]

    @property
    def states(self) -> int:
        """Of all optimizer states."""
        return sum(self.optimizer_states.values()) + self.others[2]


def resident(
    table: TensorTable, entries: Mapping[str, Entry], update_rounding: str = UpdateRounding.NEAREST
) -> Resident:
    """Bytes of masters, stored gradients and optimizer states of a table under some entries.

    A master with extra bits has them among the states.

    Args:
        table: of the model.
        entries: by key; a tensor without an entry stays as it is loaded or made.
        update_rounding: with ``kahan``, each 16-bit master that is trained has one state more.
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
                size = ITEM_BYTES[row.dtype] * row.elements  # as the optimizer itself makes it
        elif row.role is Role.WEIGHT:
            name, fmt = master_key(row.key), parameter_format(master_format(entries, row.key))
        else:
            name, fmt = row.key, gradient_format(entries, row.parts.name)
        sizes[row.role][name] = waiting_bytes(fmt, row.elements) if size is None else size
        known[row.role] += ITEM_BYTES[row.dtype] * row.elements
        if row.role is Role.WEIGHT_GRAD:
            sizes[Role.OPTIM_STATE] |= _beside(row, master_format(entries, row.parts.name), update_rounding)
    s = table.schedule
    others = zip((s.parameter_bytes, s.gradient_bytes, s.optimizer_bytes), known.values(), strict=True)
    parameters, gradients, states = (max(total - named, 0) for total, named in others)
    return Resident(
        masters=sizes[Role.WEIGHT],
        stored_gradients=sizes[Role.WEIGHT_GRAD],
        optimizer_states=sizes[Role.OPTIM_STATE],
        others=(parameters, gradients, states),
    )


def _beside(row: TensorInfo, master: Format, update_rounding: str) -> dict[str, int]:
    """Bytes of what a trained weight keeps beside a master too short for its updates; ``row``: its gradient's."""
    key = row.parts.name
    if master.extra_bits:
        return {state_key(key, EXTRA_BITS): row.elements * master.extra_bits // 8}
    if is_narrow(master) and update_rounding == UpdateRounding.KAHAN:
        return {state_key(key, COMPENSATION): bytes_of(master, row.elements)}
    return {}


def buffers(table: TensorTable, entries: Mapping[str, Named]) -> tuple[int, int]:
    """Bytes of all buffers between two steps, and of the float32 copies of narrow ones that a step computes with."""
    wide = narrow = 0
    for row in table.tensors:
        fmt = buffer_format(entries, row.parts.name)
        if row.role is Role.BUFFER and fmt.carrier != "float32":
            wide += bytes_of(FORMATS["fp32"], row.elements)
            narrow += bytes_of(fmt, row.elements)
    return table.schedule.buffer_bytes - wide + narrow, wide
