"""What stays between two steps: masters, stored gradients, optimizer states. Keys, formats, bytes, who can keep them.

Entries for them are optional. A master without one is fp32; a stored gradient and an optimizer state without one have
the dtype of their master, as torch makes them. So a plan without such entries keeps parameters, gradients and states in
float32, whatever it rounds on the way. No torch in here.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from assign.errors import FormatError, PlanError
from assign.plan.formats import FORMATS, ITEM_BYTES, STATE_FORMATS, BlockFormat, Format, parse_format
from assign.plan.tensors import (
    Role,
    Schedule,
    TensorInfo,
    TensorTable,
    grad_key,
    master_key,
    state_key,
    stored_grad_key,
)

StateFormat = Format | BlockFormat

NATIVE = ("fp32", "bf16", "fp16")
"""Formats of masters and of stored gradients, for which torch has arithmetic; states may have them too."""


class Named(Protocol):
    """An entry, as far as this module knows it."""

    @property
    def format(self) -> str:
        """Name of its format."""


def owner_of(key: str, keys: Collection[str]) -> tuple[str, Role] | None:
    """The weight that ``key`` is stored for, and what it is to it; None for a tensor of the step itself.

    A module may well be called ``master`` or ``optim``: only what follows the key of a weight in ``keys`` counts.
    """
    found = [(key.removesuffix(".master"), Role.MASTER), (key.removesuffix(".grad.stored"), Role.WEIGHT_GRAD)]
    found.append((key.rpartition(".optim.")[0], Role.OPTIM_STATE))
    weights = ((owner, role) for owner, role in found if owner not in ("", key) and "/" not in owner)
    return next(((owner, role) for owner, role in weights if owner in keys), None)


def parse_stored(name: str, role: Role) -> StateFormat:
    """The format called ``name``, for something stored.

    Raises:
        FormatError: there is none, or it is not for this role.
    """
    wanted = "".join(name.split()).lower()
    if role is Role.OPTIM_STATE and wanted in STATE_FORMATS:
        return STATE_FORMATS[wanted]
    if wanted in NATIVE:
        return FORMATS[wanted]
    what, why, allowed = _WORDS[role]
    if wanted not in STATE_FORMATS:
        parse_format(name)  # one that does not exist says so, with what is near
    raise FormatError(f"{name!r} is not for {what}: {why}.\n  Allowed: {', '.join(allowed)}.\n  Choose one of these.")


_WORDS: Mapping[Role, tuple[str, str, tuple[str, ...]]] = {
    Role.MASTER: (
        "a master",
        "training adds its updates to it, and in 8 bits or less almost every update is below half a step and lost",
        NATIVE,
    ),
    Role.WEIGHT_GRAD: ("a stored gradient", "the optimizer reads it as torch made it, in a dtype it can add", NATIVE),
    Role.OPTIM_STATE: ("an optimizer state", "no library keeps states in it", (*NATIVE, *STATE_FORMATS)),
}


def master_format(entries: Mapping[str, Named], key: str) -> Format:
    """Of the stored parameter behind weight ``key``."""
    entry = entries.get(master_key(key))
    return parse_format(entry.format) if entry else FORMATS["fp32"]


def gradient_format(entries: Mapping[str, Named], key: str) -> Format:
    """Of the gradient of weight ``key`` as it waits for the optimizer."""
    entry = entries.get(stored_grad_key(key))
    return parse_format(entry.format) if entry else master_format(entries, key)


def state_format(entries: Mapping[str, Named], key: str, state: str) -> StateFormat:
    """Of one optimizer state of weight ``key``."""
    entry = entries.get(state_key(key, state))
    return parse_stored(entry.format, Role.OPTIM_STATE) if entry else master_format(entries, key)


def check_stored(entries: Mapping[str, Named]) -> None:
    """Make sure that what is stored can be trained with.

    Raises:
        PlanError: a gradient is stored in fp16 beside a wider master.
    """
    for key, entry in entries.items():
        owner = owner_of(key, entries)
        if owner is None or owner[1] is not Role.WEIGHT_GRAD or entry.format != "fp16":
            continue
        if master_format(entries, owner[0]).name != "fp16":
            raise PlanError(
                f"{key!r} is assigned fp16, its master {master_format(entries, owner[0]).name}: gradients this short "
                "need a loss scale, and dividing it out again in fp16 loses what it saved.\n"
                f"  Choose bf16 for {key!r}, or fp16 for {master_key(owner[0])!r} too."
            )


def is_narrowed(entries: Mapping[str, Named]) -> bool:
    """Whether anything is stored in another format than float32."""
    return any(entry.format != "fp32" for key, entry in entries.items() if owner_of(key, entries))


def has_narrow_masters(entries: Mapping[str, Named]) -> bool:
    """Whether any parameter itself is stored in another format than float32."""
    owners = ((owner_of(key, entries), entry.format) for key, entry in entries.items())
    return any(owner is not None and owner[1] is Role.MASTER and name != "fp32" for owner, name in owners)


def is_stored(row: TensorInfo) -> bool:
    """Whether a row is a parameter, its gradient or a state of the optimizer.

    An activation that enters a checkpointed block has a weight's role there too; its key has a ``/``.
    """
    return row.role in (Role.WEIGHT, Role.WEIGHT_GRAD, Role.OPTIM_STATE) and "/" not in row.key


# ---- bytes


def bytes_of(fmt: StateFormat, elements: int) -> int:
    """Bytes of a stored tensor, scales included."""
    return fmt.bytes_of(elements) if isinstance(fmt, BlockFormat) else elements * item_bytes(fmt)


def waiting_bytes(fmt: StateFormat, elements: int) -> int:
    """Bytes of a copy that waits for the backward pass, scales included."""
    if isinstance(fmt, BlockFormat):
        return fmt.bytes_of(elements)
    return elements * fmt.code_bytes + (ITEM_BYTES["float32"] if fmt.scaled else 0)


def item_bytes(fmt: Format) -> int:
    """Bytes of one stored element of a native format."""
    return ITEM_BYTES[fmt.carrier]


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """Bytes of what is stored, by key. ``others``: of parameters that the step does not use, which are fp32."""

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


def resident(table: TensorTable, entries: Mapping[str, Named]) -> Resident:
    """Bytes of masters, stored gradients and optimizer states of a table under some entries."""
    sizes: dict[Role, dict[str, int]] = {Role.WEIGHT: {}, Role.WEIGHT_GRAD: {}, Role.OPTIM_STATE: {}}
    wide = dict.fromkeys(sizes, 0)
    for row in filter(is_stored, table.tensors):
        fmt: StateFormat
        if row.role is Role.OPTIM_STATE:
            key, _, state = row.key.rpartition(".optim.")
            name, fmt = row.key, state_format(entries, key, state)
        elif row.role is Role.WEIGHT:
            name, fmt = master_key(row.key), master_format(entries, row.key)
        else:
            name, fmt = row.key, gradient_format(entries, row.key.removesuffix(".grad"))
        sizes[row.role][name] = bytes_of(fmt, row.elements)
        wide[row.role] += ITEM_BYTES["float32"] * row.elements
    s = table.schedule
    others = zip((s.parameter_bytes, s.gradient_bytes, s.optimizer_bytes), wide.values(), strict=True)
    parameters, gradients, states = (max(total - known, 0) for total, known in others)
    return Resident(
        masters=sizes[Role.WEIGHT],
        stored_gradients=sizes[Role.WEIGHT_GRAD],
        optimizer_states=sizes[Role.OPTIM_STATE],
        others=(parameters, gradients, states),
    )


# ---- who can keep it


class Library(StrEnum):
    """Whose optimizer takes the step."""

    TORCH = "torch"
    TORCHAO = "torchao"
    BITSANDBYTES = "bitsandbytes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One parameter as it is between two steps."""

    key: str
    elements: int
    master: Format
    gradient: Format
    states: Mapping[str, StateFormat]

    @property
    def is_uniform(self) -> bool:
        """Whether master, gradient and states share one dtype."""
        return {self.gradient.name, *(fmt.name for fmt in self.states.values())} <= {self.master.name}

    def __str__(self) -> str:
        states = "".join(f", {name} {fmt.name}" for name, fmt in self.states.items())
        return f"{self.key!r} (master {self.master.name}, gradient {self.gradient.name}{states})"


def choose_library(optimizer: str, stored: Iterable[Stored], allowed: Collection[Library] = tuple(Library)) -> Library:
    """The first of ``allowed`` whose ``optimizer`` (the name of a class of ``torch.optim``) can keep everything stored.

    Raises:
        PlanError: none can; says what each could, or that a state has too few elements for its format.
    """
    parameters = list(stored)
    for each in parameters:
        _check_sizes(each)
    refusals: dict[Library, str] = {}
    for library in allowed:
        found = ((each, _refusal(library, optimizer, each)) for each in parameters)
        refused = next(((each, why) for each, why in found if why), None)
        if refused is None:
            return library
        refusals[library] = f"{library} {refused[1]}; asked for: {refused[0]}"
    raise PlanError(
        "\n  ".join(
            [
                f"no library has an optimizer {optimizer} that keeps what the plan stores:",
                *refusals.values(),
                "Store fp32 (leave such entries out of the plan), or use torch.optim.AdamW or torch.optim.SGD.",
            ]
        )
    )


def _check_sizes(stored: Stored) -> None:
    for name, fmt in stored.states.items():
        if isinstance(fmt, BlockFormat) and not fmt.fits(stored.elements):
            raise PlanError(
                f"{state_key(stored.key, name)!r} is assigned {fmt.name}, but has {stored.elements} elements: "
                f"{fmt.rule}.\n  Choose fp32 or bf16 for it, or leave its entry out."
            )


def _refusal(library: Library, optimizer: str, stored: Stored) -> str:
    """Why a library cannot keep a parameter so, in words; '' if it can."""
    formats = {fmt.name for fmt in stored.states.values()}
    if stored.is_uniform and library is Library.TORCH:
        return ""
    match library:
        case Library.TORCH:
            if optimizer != "SGD":
                return "steps on masters, gradients and states of one dtype only (SGD on any native ones)"
            return "" if formats <= {*NATIVE} else f"keeps SGD's states as {', '.join(NATIVE)}"
        case Library.TORCHAO:
            return "" if optimizer in ("Adam", "AdamW") else "has Adam and AdamW only"
        case Library.BITSANDBYTES:
            if optimizer not in ("Adam", "AdamW", "SGD"):
                return "is used for Adam, AdamW and SGD only"
            same = formats in ({"fp32"}, {"dynamic8"}, set())
            return "" if same else "keeps all states of a parameter as fp32, or all as dynamic8"


_TORCHAO_SCRATCH = {"dynamic8": 4.02, "dynamic4": 13.04, "e4m3:block256": 0.02}
"""Bytes per element of a state's parameter that its compiled step allocates; measured with torchao 0.18 on CPU."""

_BITSANDBYTES_SCRATCH = {"SGD": 9.02, "Adam": 20.0, "AdamW": 20.0}
"""The same of bitsandbytes 0.50 on CPU, for fp32 parameters; 16-bit ones are widened, 4 bytes more."""


_SGD_SCRATCH = {(False, False): (8, 12), (False, True): (4, 8), (True, False): (8, 12), (True, True): (4, 12)}
"""Bytes per element of the largest parameter that torch's SGD allocates on mixed dtypes, by whether states, whether
gradients are in 16 bit: without weight decay and Nesterov's momentum, and with. It widens what it reads. Measured with
torch 2.13 on CPU."""


def optimizer_scratch(schedule: Schedule, stored: Iterable[Stored]) -> int:
    """Bytes that the optimizer's step allocates for a moment, under a plan.

    Raises:
        PlanError: no library can keep what is stored.
    """
    parameters = list(stored)
    if all(each.is_uniform for each in parameters):
        widest = max((item_bytes(each.master) for each in parameters), default=4)
        return schedule.optimizer_scratch_bytes * widest // ITEM_BYTES["float32"]
    library = choose_library(schedule.optimizer, parameters)
    largest = max(each.elements for each in parameters)
    match library:
        case Library.TORCHAO:
            sums = [
                each.elements * sum(_TORCHAO_SCRATCH.get(fmt.name, 0.0) for fmt in each.states.values())
                for each in parameters
            ]
            return int(max(sums))
        case Library.BITSANDBYTES:
            wide = all({each.master.name, each.gradient.name} == {"fp32"} for each in parameters)
            return int(largest * (_BITSANDBYTES_SCRATCH[schedule.optimizer] + (0 if wide else 4)))
        case Library.TORCH:
            states = any(fmt.name != "fp32" for each in parameters for fmt in each.states.values())
            gradients = any(each.gradient.name != "fp32" for each in parameters)
            temporaries = min(schedule.optimizer_scratch_bytes // (4 * largest), 1)
            return largest * _SGD_SCRATCH[states, gradients][temporaries]


def stored_in(table: TensorTable, entries: Mapping[str, Named]) -> list[Stored]:
    """Every parameter of a table that is trained."""
    states: dict[str, dict[str, StateFormat]] = {}
    for row in table.tensors:
        if row.role is Role.OPTIM_STATE:
            key, _, state = row.key.rpartition(".optim.")
            states.setdefault(key, {})[state] = state_format(entries, key, state)
    return [
        Stored(
            key=row.key,
            elements=row.elements,
            master=master_format(entries, row.key),
            gradient=gradient_format(entries, row.key),
            states=states.get(row.key, {}),
        )
        for row in table.tensors
        if row.role is Role.WEIGHT and is_stored(row) and grad_key(row.key) in table.by_key
    ]
