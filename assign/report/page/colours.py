"""Colours that colour-blind readers can tell apart (Okabe and Ito, 2008), and patterns if they are not enough.

A name that starts with ``$`` is a colour of the page, which depends on light or dark mode: ``$ink``, ``$grid``.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

BLUE, SKY, GREEN, YELLOW = "#0072B2", "#56B4E9", "#009E73", "#F0E442"
ORANGE, VERMILLION, PURPLE, GREY = "#E69F00", "#D55E00", "#CC79A7", "#999999"
INK, GRID, BRANCH = "$ink", "$grid", "$branch"

LINES = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
"""Colours of curves: without yellow and grey, which are hard to see as thin lines."""

DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "x", "cross")

_PATTERNS = ("", "/", ".", "x")
_OTHERS = (ORANGE, VERMILLION, GREEN, PURPLE, YELLOW)


@dataclass(frozen=True, slots=True)
class Look:
    """A colour, and a pattern over it ('' for none)."""

    colour: str
    pattern: str = ""

    @property
    def text(self) -> str:
        """Black or white, whichever is easier to read on the colour; by WCAG contrast only blue needs white."""
        return "#ffffff" if self.colour == BLUE else "#000000"


ROLES: dict[str, tuple[str, Look]] = {
    "parameters": ("parameters", Look(BLUE)),
    "optimizer states": ("optimizer states", Look(SKY)),
    "buffers": ("buffers", Look(GREY)),
    "batch": ("batch", Look(GREY, "/")),
    "weight": ("weights, rounded", Look(BLUE, "/")),
    "weight_grad": ("gradients of weights", Look(VERMILLION)),
    "saved": ("saved for the backward pass", Look(GREEN)),
    "activation": ("activations", Look(YELLOW)),
    "activation_grad": ("gradients of activations", Look(ORANGE)),
    "scratch": ("temporary memory of operators", Look(PURPLE)),
}
"""Role of bytes → title and look, from the bottom of the chart to its top."""


def of_formats(names: Iterable[str]) -> dict[str, Look]:
    """Return {format: look}, in this order: fp32 grey, 16 bits blue, the others in turn."""
    fixed = {"fp32": Look(GREY), "bf16": Look(BLUE), "fp16": Look(SKY)}
    others = (Look(colour, pattern) for pattern in itertools.cycle(_PATTERNS) for colour in _OTHERS)
    return {name: fixed.get(name) or next(others) for name in names}
