"""State that is stored with a parameter for its optimizer. It is an attribute of the parameter, and freed with it."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

_ATTRIBUTE = "assign_extras"


@dataclass(slots=True, kw_only=True)
class Extras:
    """State that is stored with one parameter.

    Attributes:
        extra: extra bits of its master, set when a plan is applied; None if its master has none.
        lost: whether the parameter was loaded without its extra bits.
        gradient_scale: scale of its 8-bit gradient, which ``.grad`` cannot store; None if there is none.
    """

    extra: Tensor | None = None
    lost: bool = False
    gradient_scale: Tensor | None = None

    def __reduce__(self) -> Any:
        """Leave this state out when the parameter is pickled: a loaded parameter has only its values."""
        return dict, ()


def extras(parameter: Tensor) -> Extras:
    """Return the state that is stored with a parameter; it is empty at first."""
    found = getattr(parameter, _ATTRIBUTE, None)
    if not isinstance(found, Extras):
        found = Extras()
        setattr(parameter, _ATTRIBUTE, found)
    return found
