"""Formats and scales that change between steps, as one object that graphs take as an input.

A graph contains the formats of the plan. If a tensor's format may be promoted, or its scale comes from earlier steps,
the rounding operators also get this object and the tensor's key, and look both up when they run. A promotion therefore
takes effect at the next step and compiles nothing.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from assign import _torch
from assign.formats.parsing import parse_format
from assign.formats.rows import Format

if TYPE_CHECKING:
    from assign.numerics.delayed import History
    from assign.numerics.promotion import Slot


class Runtime(_torch.OpaqueBase):
    """Formats and scales that the rounding operators of one planned model look up by tensor key.

    Attributes:
        slots: formats of the tensors that may be promoted.
        histories: histories of the tensors whose scales come from earlier steps.
    """

    def __init__(self, slots: "Mapping[str, Slot]", histories: "Mapping[str, History]") -> None:
        self.slots, self.histories = dict(slots), dict(histories)


_torch.register_opaque(Runtime)


def current_format(name: str, runtime: Runtime | None, key: str) -> Format:
    """Return the current format: the named one, unless the tensor ``key`` may be promoted."""
    slot = runtime.slots.get(key) if runtime is not None else None
    return slot.format if slot else parse_format(name)
