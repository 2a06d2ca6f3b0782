"""Search spaces: what a search may choose for every tensor."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from assign.errors import PlanError
from assign.formats.parsing import parse_format, parse_saved
from assign.options import option
from assign.plan.keys import Part
from assign.plan.persistent_state import UpdateRounding, parse_rounding, parse_stored
from assign.plan.recipes import Recipe, get_recipe
from assign.plan.step_options import StepOptions


class Granularity(StrEnum):
    """Which tensors share a decision: those of a group, as in the paper, or none."""

    GROUP = "group"
    TENSOR = "tensor"


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpace:
    """What a search may choose for every tensor. Names are checked when the object is created.

    A function that takes a space also takes the name of a recipe, which means ``SearchSpace(recipe=name)``.

    Attributes:
        recipe: Formats that a tensor may have, by its role: ``native``, ``native-delayed``, ``hfp8``, ``posit``,
            ``bf16`` or ``fp16``.
        formats: Formats of every tensor instead of the recipe's two, the widest first: names with commas, or a
            sequence. ``e4m3:pow2/e5m2:pow2`` means the first for values and the second for gradients. Requires the
            strategy ``milp``, or, for one format everywhere, ``uniform``.
        pins: Pattern of keys and the format of the tensors that it matches, e.g. ``head.*=bf16``; the last match
            counts. Requires the strategy ``milp``.
        granularity: Whether a ``group`` of tensors shares one decision, or each ``tensor`` has its own. ``tensor``
            requires the strategy ``milp``.
        saved: Format of saved activations, e.g. ``int4:block64`` or ``mxfp8``, if it takes fewer bytes and the
            activation is finite on this batch. Default: the activation's own format. The strategy ``milp`` with a
            budget chooses among several, separated by commas.
        master: Format of the parameters: ``bf16``, ``fp16``, or ``bf16+8``, which stores 24 bits, 8 of them in the
            optimizer. Default: as they were loaded, or as the strategy requires.
        gradients: Format of stored gradients: ``bf16``, ``fp16``, ``e5m2:pow2`` or ``e4m3:pow2``. Default: that of
            their masters.
        optimizer_states: Format of optimizer states: ``bf16``, ``fp16``, ``dynamic8``, ``dynamic4`` or
            ``e4m3:block256``. Default: that of their masters.
        update_rounding: How updates of 16-bit masters are rounded: ``nearest``, ``stochastic`` or ``kahan``.
        step: How a step is carried out: number of micro-batches.
    Raises:
        FormatError: a recipe or a format does not exist or cannot be stored.
        PlanError: a pin cannot be read, or a granularity or rounding does not exist.
    """

    recipe: str = "native"
    formats: Sequence[str] = field(
        default=(), metadata=option("--formats", "--format", type=str, former=("formats", "format_name"))
    )
    pins: Mapping[str, str] = field(default_factory=dict, metadata=option("--pin", type=list[str]))
    granularity: Granularity | str = field(default=Granularity.GROUP, metadata=option(type=Granularity))
    saved: Sequence[str] = field(default=(), metadata=option(type=str))
    master: str | None = None
    gradients: str | None = None
    optimizer_states: str | None = None
    update_rounding: UpdateRounding | str = field(default=UpdateRounding.NEAREST, metadata=option(type=UpdateRounding))
    step: StepOptions = field(default_factory=StepOptions)

    def __post_init__(self) -> None:
        get_recipe(self.recipe)
        for name in ("formats", "saved"):
            object.__setattr__(self, name, _names(getattr(self, name)))
        pins = self.pins if isinstance(self.pins, Mapping) else parse_pins(self.pins or ())
        object.__setattr__(self, "pins", dict(pins))
        for name in (*(each for pair in self.formats for each in pair.split("/", 1)), *self.pins.values()):
            parse_format(name)
        for name in self.saved:
            parse_saved(name)
        for part, chosen in (
            (Part.MASTER, self.master),
            (Part.STORED_GRADIENT, self.gradients),
            (Part.STATE, self.optimizer_states),
        ):
            if chosen is not None:
                parse_stored(chosen, part)
        if self.granularity not in [*Granularity]:
            raise PlanError(
                f"search: there is no granularity {self.granularity!r}; choose from {', '.join(Granularity)}."
            )
        object.__setattr__(self, "granularity", Granularity(self.granularity))
        object.__setattr__(self, "update_rounding", parse_rounding(self.update_rounding, where="search"))

    @classmethod
    def of(cls, space: "SearchSpace | str") -> "SearchSpace":
        """Return the space, or the one of the recipe with this name."""
        return cls(recipe=space) if isinstance(space, str) else space

    @property
    def rules(self) -> Recipe:
        """The recipe itself."""
        return get_recipe(self.recipe)

    @property
    def stored(self) -> dict[str, str | None]:
        """Formats of what is stored between steps, as :func:`assign.plan.recipes.store` takes them."""
        return {"master": self.master, "gradients": self.gradients, "states": self.optimizer_states}


def split_names(text: str) -> list[str]:
    """Return the names of formats in a text with commas; those inside ``fp(e,m,b)`` belong to the name."""
    return [name.strip() for name in re.split(r",(?![^(]*\))", text) if name.strip()]


def parse_pins(texts: Iterable[str]) -> dict[str, str]:
    """Return {pattern: format} for pins like ``head.*=bf16``.

    Raises:
        PlanError: one is not such a pin.
    """
    pins = {}
    for text in texts:
        pattern, equals, name = text.rpartition("=")
        if not (pattern and equals and name):
            raise PlanError(f"search: {text!r} is not a pin. Write PATTERN=FORMAT, e.g. 'head.*=bf16'.")
        pins[pattern] = name
    return pins


def _names(given: Sequence[str] | None) -> tuple[str, ...]:
    return tuple(split_names(given) if isinstance(given, str) else given or ())
