"""Optimizer libraries: which one can store the states of a plan, and the temporary memory of its step."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from assign.errors import PlanError
from assign.formats.dtypes import ITEM_BYTES
from assign.formats.parsing import parse_format
from assign.formats.rows import FORMATS, BlockFormat, Format
from assign.plan.entry import Entry
from assign.plan.keys import grad_key, state_key
from assign.plan.persistent_state import (
    NATIVE,
    StateFormat,
    UpdateRounding,
    gradient_format,
    is_narrow,
    is_stored,
    item_bytes,
    master_format,
    state_format,
    stepped_format,
    with_loaded,
)
from assign.plan.table import Role, Schedule, TensorTable


class Library(StrEnum):
    """The library whose optimizer does the step."""

    TORCH = "torch"
    TORCHAO = "torchao"
    BITSANDBYTES = "bitsandbytes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """Formats of one parameter, its gradient and its states between two steps.

    Attributes:
        loaded: the format in which it was loaded.
        widened: whether its 16-bit master is float32 while the optimizer steps on it, and is rounded afterwards.
        rounded: {state: format} of the float32 states that are rounded after each step.
    """

    key: str
    elements: int
    master: Format
    gradient: Format
    states: Mapping[str, StateFormat]
    loaded: Format = FORMATS["fp32"]
    widened: bool = False
    rounded: Mapping[str, Format] = field(default_factory=dict)

    @property
    def read_master(self) -> Format:
        """Format in which the optimizer reads the master: fp32 if it is widened or joined with its extra bits."""
        return FORMATS["fp32"] if self.widened else stepped_format(self.master)

    @property
    def is_alone(self) -> bool:
        """Whether the optimizer steps on this parameter alone, because its master or gradient is wide meanwhile."""
        return self.gradient.scaled or bool(self.master.extra_bits) or self.widened

    @property
    def read_gradient(self) -> Format:
        """Format in which the optimizer reads the gradient: that of the master if the parameter is stepped on alone."""
        return self.read_master if self.is_alone else self.gradient

    @property
    def is_uniform(self) -> bool:
        """Whether master, gradient and states share one dtype when the optimizer steps."""
        return {self.read_gradient.name, *(fmt.name for fmt in self.states.values())} <= {self.read_master.name}

    def __str__(self) -> str:
        states = "".join(f", {name} {fmt.name}" for name, fmt in self.states.items())
        return f"{self.key!r} (master {self.master.name}, gradient {self.gradient.name}{states})"


def choose_library(optimizer: str, stored: Iterable[Stored], allowed: Collection[Library] = tuple(Library)) -> Library:
    """Return the first library in ``allowed`` that can store everything.

    Args:
        optimizer: name of a class of ``torch.optim``.
        stored: what is stored for every parameter.
        allowed: libraries to choose from, in order of preference.
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
        refusals[library] = f"{library} {refused[1]}; requested: {refused[0]}"
    raise PlanError(
        "\n  ".join(
            [
                f"no library has an optimizer {optimizer} for the formats that the plan stores:",
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
    """Return why a library cannot store a parameter like this; '' if it can."""
    formats = {fmt.name for fmt in stored.states.values()}
    if stored.is_uniform and library is Library.TORCH:
        return ""
    match library:
        case Library.TORCH:
            if optimizer != "SGD":
                return "supports masters, gradients and states of one dtype only (SGD: any native dtypes)"
            return "" if formats <= {*NATIVE, "fp64"} else f"keeps SGD's states as {', '.join(NATIVE)}"
        case Library.TORCHAO:
            return "" if optimizer in ("Adam", "AdamW") else "has Adam and AdamW only"
        case Library.BITSANDBYTES:
            if optimizer not in ("Adam", "AdamW", "SGD"):
                return "is used for Adam, AdamW and SGD only"
            same = formats in ({"fp32"}, {"dynamic8"}, set())
            return "" if same else "keeps all states of a parameter as fp32, or all as dynamic8"


_TORCHAO_SCRATCH = {"dynamic8": 4.02, "dynamic4": 13.04, "e4m3:block256": 0.02}
"""Bytes per element and state that the compiled step of a parameter allocates; measured with torchao 0.18 on CPU."""

_BITSANDBYTES_SCRATCH = {"SGD": 9.02, "Adam": 20.0, "AdamW": 20.0}
"""The same for bitsandbytes 0.50 on CPU with fp32 parameters; 16-bit ones are widened and need 4 bytes more."""


_SGD_SCRATCH = {(False, False): (8, 12), (False, True): (4, 8), (True, False): (8, 12), (True, True): (4, 12)}
"""Bytes per element of the largest parameter that torch's SGD allocates on mixed dtypes, which it widens. Key: whether
states, and whether gradients, have 16 bits. Values: without and with weight decay or Nesterov momentum. Measured with
torch 2.13 on CPU."""


_OWN_SCRATCH: Mapping[str, tuple[Mapping[str, int], int]] = {
    "SGD": ({UpdateRounding.STOCHASTIC: 20, UpdateRounding.KAHAN: 30}, 12),
    "AdamW": ({UpdateRounding.STOCHASTIC: 34, UpdateRounding.KAHAN: 38}, 24),
}
"""Bytes per element that the steps of :mod:`assign.optim.updates` allocate, for parameters in 16 bits by rounding, and
in 32 bits. Parameters are stepped one by one; SGD has momentum, AdamW weight decay. Measured with torch 2.13 on CPU."""


def rounds_updates_itself(optimizer: str, stored: Iterable[Stored]) -> bool:
    """Whether an optimizer of :mod:`assign.optim.updates` replaces that of torch to round updates.

    It keeps states in the dtype of their masters. States in other formats need a library that steps on float32 masters.
    """
    return optimizer in _OWN_SCRATCH and all(each.is_uniform for each in stored)


def widen_masters(optimizer: str, stored: Iterable[Stored]) -> list[Stored]:
    """Return what is stored, with 16-bit masters widened to float32 while a library's optimizer steps on them.

    Raises:
        PlanError: the formats of the optimizer's states would not be those of the plan.
    """
    if optimizer not in _KNOWN_STATES:
        raise PlanError(
            f"optimizer: {optimizer or 'no optimizer'} was given to round updates of 16-bit masters stochastically or "
            f"with Kahan's sum.\n  Allowed: {', '.join(_KNOWN_STATES)}.\n"
            "  Use one of these, or round updates to nearest."
        )
    return [replace(each, widened=is_narrow(each.master)) for each in stored]


_KNOWN_STATES = ("SGD", "Adam", "AdamW")
"""Optimizers whose states can be made in the formats of a plan before the first step."""


def optimizer_scratch(
    schedule: Schedule, stored: Iterable[Stored], update_rounding: str = UpdateRounding.NEAREST
) -> int:
    """Return the bytes of temporary memory that the optimizer's step allocates under a plan.

    Raises:
        PlanError: no library can store this, or none can round updates in this way.
    """
    parameters = list(stored)
    if update_rounding != UpdateRounding.NEAREST and not rounds_updates_itself(schedule.optimizer, parameters):
        parameters = widen_masters(schedule.optimizer, parameters)
    widened = max((each.elements * _widened_bytes(each) for each in parameters), default=0)
    split = max((each.elements * _SPLITTING for each in parameters if each.master.extra_bits), default=0)
    rounded = max((each.elements * _ROUNDING[update_rounding] for each in parameters if each.widened), default=0)
    return max(widened + _step_scratch(schedule, parameters, update_rounding), split, rounded)


_SPLITTING = 2 * ITEM_BYTES["float32"]
"""Bytes per element while a master is joined or split: the float32 master, and integers of the same size."""

_ROUNDING: Mapping[str, int] = {UpdateRounding.STOCHASTIC: 10, UpdateRounding.KAHAN: 30}
"""Bytes per element, master included, while a float32 master is rounded to 16 bits. Measured with torch 2.13, CPU."""


def _widened_bytes(stored: Stored) -> int:
    """Return the bytes per element of a gradient and master that are widened for the step of their parameter."""
    gradient = item_bytes(stored.read_gradient) if stored.read_gradient.name != stored.gradient.name else 0
    is_wide = stored.master.extra_bits or stored.widened
    return gradient + (item_bytes(stored.read_master) if is_wide else 0)


def _step_scratch(schedule: Schedule, parameters: Sequence[Stored], update_rounding: str) -> int:
    """Return the temporary memory of the step itself, without what is widened for it."""
    if update_rounding != UpdateRounding.NEAREST and not any(each.widened for each in parameters):
        narrow, wide = _OWN_SCRATCH[schedule.optimizer]
        sizes = ((each.elements, narrow[update_rounding] if is_narrow(each.master) else wide) for each in parameters)
        return max((elements * size for elements, size in sizes), default=0)
    loaded = max((item_bytes(each.loaded) for each in parameters), default=4)
    if all(each.is_uniform for each in parameters):
        widest = max((item_bytes(each.read_master) for each in parameters), default=4)
        return schedule.optimizer_scratch_bytes * widest // loaded
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
            wide = all({each.read_master.name, each.read_gradient.name} == {"fp32"} for each in parameters)
            return int(largest * (_BITSANDBYTES_SCRATCH[schedule.optimizer] + (0 if wide else 4)))
        case Library.TORCH:
            states = any(fmt.name != "fp32" for each in parameters for fmt in each.states.values())
            gradients = any(each.read_gradient.name != "fp32" for each in parameters)
            temporaries = min(schedule.optimizer_scratch_bytes // (loaded * largest), 1)
            return largest * _SGD_SCRATCH[states, gradients][temporaries]


def stored_in(table: TensorTable, entries: Mapping[str, Entry]) -> list[Stored]:
    """Return what is stored for every trained parameter of a table."""
    entries = with_loaded(entries, table.loaded)
    states: dict[str, dict[str, StateFormat]] = {}
    for row in table.tensors:
        if row.role is Role.OPTIM_STATE:
            key, state = row.parts.name, row.parts.state
            states.setdefault(key, {})[state] = state_format(entries, key, state)
    return [
        Stored(
            key=row.key,
            elements=row.elements,
            master=master_format(entries, row.key),
            gradient=gradient_format(entries, row.key),
            states=states.get(row.key, {}),
            loaded=parse_format(table.loaded[row.key]),
        )
        for row in table.tensors
        if row.role is Role.WEIGHT and is_stored(row) and grad_key(row.key) in table.by_key
    ]
