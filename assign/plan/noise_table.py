"""The noise table: measured effect of rounding each tensor to each format, as a JSON file.

The noise of a choice is the relative squared error of the gradient of all parameters together, ‖g_q − g‖² / ‖g‖², if
only this tensor is rounded. Rounding errors of different tensors are almost independent, so their squares add up: the
noise of a whole plan is the sum over its tensors. One table serves every budget, and can be extended by further
measurements.
"""

import json
import math
import os
import statistics
from collections.abc import Collection, Iterable, Mapping
from dataclasses import astuple, dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from assign.errors import FormatError, PlanError, suggest
from assign.formats.parsing import parse_saved
from assign.json_file import Count, Kind, NotNegative, shown
from assign.notebook import SHOWN, Drawn, frame, table_html
from assign.plan.keys import Key, Part
from assign.plan.plan import Entry
from assign.plan.table import TensorTable, check_same_model

EXACT = "fp32"
"""The format without noise: that of a step without rounding."""


class Cell(NamedTuple):
    """One choice: a tensor's key and the name of a format."""

    key: str
    format: str


class Method(StrEnum):
    """How noise is measured: one step per choice, or all choices at once from the derivatives of one step."""

    MEASURED = "measured"
    FIRST_ORDER = "first-order"


@dataclass(frozen=True, slots=True)
class Sample:
    """Effect of one choice on one batch.

    Attributes:
        gradient: relative squared error of the parameters' gradient.
        cosine: of the angle between that gradient and the unrounded one.
        loss: change of the loss.
    """

    gradient: float
    cosine: float
    loss: float


_FILE = Kind(
    name="table of noise", error=PlanError, advice="Give the file that 'assign noise' wrote, or write a new one."
)
_Samples = Annotated[list[tuple[NotNegative, Annotated[float, Field(ge=-1, le=1)], float]], Field(min_length=1)]


class _NoiseFile(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, title="assign noise")

    assign_noise: Literal[1] = Field(description="version of this file's layout")
    fingerprint: str = Field(description="of the model that was measured")
    method: Method = Field(strict=False)
    seed: int
    loss_scaling: bool = Field(description="gradients were rounded under a loss scale")
    warm_up: Count = Field(default=0, description="steps that the model was trained first")
    cells: dict[str, dict[str, _Samples]] = Field(
        description="tensor's key → format → per batch: gradient, cosine, loss"
    )


@dataclass(frozen=True, kw_only=True)
class NoiseTable(Drawn):
    """Noise of choices, batch by batch.

    Attributes:
        cells: choice → one sample per batch.
        fingerprint: of the model.
        method: how it was measured.
        seed: of random numbers in a step; batch number n has ``seed + n``.
        loss_scaling: whether gradients were rounded under a loss scale.
        warm_up: number of steps that the model was trained before.
    """

    fingerprint: str
    method: Method
    seed: int = 0
    loss_scaling: bool = False
    warm_up: int = 0
    cells: Mapping[Cell, tuple[Sample, ...]] = field(default_factory=dict)

    def noise(self, key: str, format_name: str) -> float:
        """Return the mean relative squared error of the gradient if only tensor ``key`` has this format; 0 in fp32.

        Raises:
            PlanError: it was not measured.
        """
        return 0.0 if format_name == EXACT else statistics.fmean(s.gradient for s in self._samples(key, format_name))

    def cosine(self, key: str, format_name: str) -> float:
        """Return the mean cosine of the angle by which the gradient turns. Raises the same as :meth:`noise`."""
        return 1.0 if format_name == EXACT else statistics.fmean(s.cosine for s in self._samples(key, format_name))

    def loss(self, key: str, format_name: str) -> float:
        """Return the mean change of the loss. Raises the same as :meth:`noise`."""
        return 0.0 if format_name == EXACT else statistics.fmean(s.loss for s in self._samples(key, format_name))

    def standard_error(self, key: str, format_name: str) -> float:
        """Return the standard error of :meth:`noise` over the batches; infinite if there is only one."""
        return 0.0 if format_name == EXACT else _standard_error(self._samples(key, format_name))

    @property
    def relative_error(self) -> float:
        """Median over all choices of the standard error of the noise, as a share of that noise."""
        found = []
        for samples in self.cells.values():
            mean = statistics.fmean(s.gradient for s in samples)
            if mean > 0:
                found.append(_standard_error(samples) / mean)
        return statistics.median(found) if found else 0.0

    @property
    def batches(self) -> int:
        """Number of batches on which every choice was measured."""
        return min(map(len, self.cells.values()), default=0)

    @cached_property
    def _keys(self) -> frozenset[str]:
        return frozenset(cell.key for cell in self.cells)

    def of(self, entries: Mapping[str, Entry]) -> float:
        """Return the predicted noise of a plan, or of a part of it. What is stored between steps has none.

        Args:
            entries: of some tensors, and of what is stored for any weight of the model.
        Raises:
            PlanError: one of its choices was not measured.
        """
        rounded = (key for key in entries if _is_rounded(key, entries, self._keys))
        return sum(self.noise(key, entries[key].format) for key in rounded)

    def add(self, samples: Mapping[Cell, Iterable[Sample]]) -> "NoiseTable":
        """Return the table with these samples added."""
        longer = {cell: (*self.cells.get(cell, ()), *more) for cell, more in samples.items()}
        return replace(self, cells={**self.cells, **longer})

    def check(self, table: TensorTable) -> None:
        """Check that this is the noise of the table's model.

        Raises:
            PlanError: it belongs to another model.
        """
        check_same_model(
            self.fingerprint,
            table.fingerprint,
            what="the noise was measured on another model",
            advice="Allowed: a file that was measured on this model, at any batch size.\n"
            "  Give that file, or measure again: assign noise TASK -o noise.json",
        )

    def to_pandas(self) -> Any:
        """Return a data frame with a row per choice: key, format, noise, standard_error, cosine, loss. Needs pandas."""
        names = ["noise", "standard_error", "cosine", "loss"]
        rows = (
            {"key": cell.key, "format": cell.format, **{n: getattr(self, n)(*cell) for n in names}}
            for cell in self.cells
        )
        return frame(rows, ["key", "format", *names])

    def _repr_html_(self) -> str:
        """Return the choices with the most noise as an HTML table, for a notebook."""
        found = sorted(((self.noise(*cell), cell) for cell in self.cells), key=lambda row: -row[0])
        most = max((noise for noise, _ in found), default=0.0) or 1.0
        rows = [((cell.key, cell.format, f"{noise:.3g}"), noise / most) for noise, cell in found[:SHOWN]]
        title = f"noise of {len(found)} choices, {self.method}, batches: {self.batches}"
        return table_html(title, ["tensor", "format", "noise"], rows, len(found))

    def to_json(self) -> str:
        """Return the text of the file: one line per tensor."""
        rows: dict[str, dict[str, list[list[float]]]] = {}
        for cell, samples in self.cells.items():
            rows.setdefault(cell.key, {})[cell.format] = [list(astuple(sample)) for sample in samples]
        head = {
            "assign_noise": 1,
            "fingerprint": self.fingerprint,
            "method": self.method,
            "seed": self.seed,
            "loss_scaling": self.loss_scaling,
            "warm_up": self.warm_up,
        }
        lines = [f"    {json.dumps(key)}: {json.dumps(row, allow_nan=False)}" for key, row in rows.items()]
        cells = "{\n" + ",\n".join(lines) + "\n  }" if lines else "{}"
        return json.dumps(head, indent=2).removesuffix("\n}") + f',\n  "cells": {cells}\n}}\n'

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table to ``path``, atomically.

        Raises:
            PlanError: the file cannot be written.
        """
        _FILE.write(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "NoiseTable":
        """Return the table in the file ``path``.

        Raises:
            PlanError: there is no such file, or it is not a table of noise.
        """
        where = str(path)
        file = _FILE.load(_SCHEMA, _FILE.read(path), where)
        cells: dict[Cell, tuple[Sample, ...]] = {}
        for key, row in file.cells.items():
            for name, samples in row.items():
                cell = Cell(key, _canonical(name, key, where))
                if cell in cells:
                    raise PlanError(
                        f"{where} has the noise of {shown(key)!r} in {cell.format} twice, under two spellings of that "
                        "format. Keep one of the two."
                    )
                cells[cell] = tuple(Sample(*each) for each in samples)
        return cls(
            fingerprint=file.fingerprint,
            method=file.method,
            seed=file.seed,
            loss_scaling=file.loss_scaling,
            warm_up=file.warm_up,
            cells=cells,
        )

    def _samples(self, key: str, format_name: str) -> tuple[Sample, ...]:
        samples = self.cells.get(Cell(key, parse_saved(format_name).name))
        if not samples:
            formats = sorted({cell.format for cell in self.cells if cell.key == key})
            close = suggest(key, {cell.key for cell in self.cells})
            known = f"measured for it: {', '.join(formats)}" if formats else f"nearest: {close or 'none'}"
            raise PlanError(
                f"the noise of {key!r} in {format_name} was not measured; {known}.\n"
                f"  Measure it into the same file: assign noise TASK --formats {format_name} -o FILE "
                "(--saved for saved activations)."
            )
        return samples


_SCHEMA = TypeAdapter(_NoiseFile)


def _canonical(name: str, key: str, where: str) -> str:
    """Return the name of a format as this package writes it."""
    try:
        return parse_saved(name).name
    except FormatError as error:
        raise PlanError(f"{where}: {shown(key)!r} was measured in {shown(name)!r}: {error}") from None


def _standard_error(samples: tuple[Sample, ...]) -> float:
    if len(samples) < 2:
        return math.inf
    return statistics.stdev(s.gradient for s in samples) / math.sqrt(len(samples))


def _is_rounded(key: str, entries: Mapping[str, Entry], measured: Collection[str]) -> bool:
    """Whether an entry causes a separate rounding in the step; ``measured``: keys of the noise."""
    parts = Key.parse(key, entries)
    if parts.part is Part.TENSOR:  # or it is of a weight that has no entry here
        parts = Key.parse(key, measured)
    if parts.part is Part.SAVED:
        return parts.name not in entries or entries[parts.name].format != entries[key].format
    return not parts.is_of_weight
