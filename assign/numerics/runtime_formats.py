"""Formats and scales that change between steps, as one object that graphs take as an input.

A graph holds the formats that a plan says. Where a tensor's format may be promoted, or its scale comes from earlier
steps, the rounding operators are given this object and the tensor's key as well, and look both up when they run. So a
promotion takes effect at the next step and compiles nothing.
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
    """What the rounding operators of one planned model look up, by the keys of tensors.

    Attributes:
        slots: of tensors that may be promoted.
        histories: of tensors whose scales come from earlier steps.
    """

    def __init__(self, slots: "Mapping[str, Slot]", histories: "Mapping[str, History]") -> None:
        self.slots, self.histories = dict(slots), dict(histories)


_torch.register_opaque(Runtime)


def current_format(name: str, runtime: Runtime | None, key: str) -> Format:
    """Return the format in force: the named one, unless the tensor ``key`` may be promoted."""
    slot = runtime.slots.get(key) if runtime is not None else None
    return slot.format if slot else parse_format(name)
