"""What is kept beside a parameter for its optimizer. It is an attribute of the parameter, and freed with it."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

_ATTRIBUTE = "assign_beside"


@dataclass(slots=True, kw_only=True)
class Beside:
    """What is kept beside one parameter.

    Attributes:
        extra: extra bits of its master, from the moment when a plan is applied; None if its master has none.
        lost: the parameter was loaded without its extra bits.
        gradient_scale: scale of its gradient, for which ``.grad`` has no place; None if that has none.
    """

    extra: Tensor | None = None
    lost: bool = False
    gradient_scale: Tensor | None = None

    def __reduce__(self) -> Any:
        """Leave it out of a pickle of the parameter: what is loaded begins with the parameter's values alone."""
        return dict, ()


def beside(parameter: Tensor) -> Beside:
    """Return what is kept beside a parameter; empty at first."""
    found = getattr(parameter, _ATTRIBUTE, None)
    if not isinstance(found, Beside):
        found = Beside()
        setattr(parameter, _ATTRIBUTE, found)
    return found
