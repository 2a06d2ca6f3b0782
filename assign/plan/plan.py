"""A plan: the format of every tensor of a training step, and its file ``plan.json``.

A search writes a plan and the executor applies it. A plan is frozen and has one entry per tensor. Its file is
human-readable JSON.
"""

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, TypeAdapter

from assign.errors import FormatError, PlanError, suggest
from assign.formats.parsing import parse_format, parse_saved
from assign.formats.rows import LOADED, BlockFormat, Format
from assign.json_file import MOST_ELEMENTS, Kind
from assign.notebook import Drawn, frame, human_bytes, table_html
from assign.plan.entry import STRICT as _STRICT
from assign.plan.entry import Entry as Entry
from assign.plan.keys import Key, Part, base_key, grad_key, is_saved_key, saved_key
from assign.plan.persistent_state import (
    UpdateRounding,
    check_stored,
    check_unsplit,
    has_scaled_gradients,
    parse_rounding,
    parse_stored,
    with_loaded,
)
from assign.plan.split import MicroBatch, split
from assign.plan.step_options import StepOptions
from assign.plan.table import TensorTable

VERSION = 1
"""Version of the file that this package writes, under the key ``assign_plan``."""

_FILE = Kind(name="plan", error=PlanError, advice="Give the file that a search wrote, or search again.")

_NAMED = 3  # keys named in an error message before "and n more"


def format_pair(entries: Mapping[str, Entry], key: str) -> tuple[Format, Format] | None:
    """Return the formats of tensor ``key`` and of its gradient; None if it has no entry.

    A frozen weight has no gradient, so its own format is returned twice.
    """
    if key not in entries:
        return None
    gradient = entries.get(grad_key(key), entries[key])
    return parse_format(entries[key].format), parse_format(gradient.format)


def _check_estimate(estimate: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """Check the numbers of a plan's estimate that comparing plans uses; the others are only displayed."""
    peak = estimate.get("peak_bytes", 0)
    if not isinstance(peak, int) or isinstance(peak, bool) or not 0 <= peak <= MOST_ELEMENTS:
        raise ValueError("peak_bytes must be a whole number of bytes, 0 or more")
    for name in ("noise", "low_ratio"):
        value = estimate.get(name, 0)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{name} must be a number, 0 or more")
    return estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where a plan comes from. It is for information only: no decision depends on it.

    Attributes:
        command: the command that the user ran.
        versions: package → version, for the packages that affect the numbers.
        seed: seed of the search, None if it used none.
        estimate: what the memory model predicts for the plan, by name with unit, e.g. ``peak_bytes``.
        created: time in ISO 8601, '' if unknown.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    command: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    seed: int | None = None
    strategy: str = ""
    estimate: Annotated[dict[str, JsonValue], AfterValidator(_check_estimate)] = field(default_factory=dict)
    created: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diff:
    """How two assignments differ.

    Attributes:
        only_here, only_there: keys that only one of them has.
        changed: key → (entry here, entry there).
        update_rounding: that of this assignment and of the other; None if they are equal.
        step: how a step is carried out, here and there; None if they are equal.
    """

    only_here: tuple[str, ...]
    only_there: tuple[str, ...]
    changed: dict[str, tuple[Entry, Entry]]
    update_rounding: tuple[UpdateRounding, UpdateRounding] | None = None
    step: tuple[StepOptions, StepOptions] | None = None

    def __bool__(self) -> bool:
        return bool(self.only_here or self.only_there or self.changed or self.update_rounding or self.step)


class _PlanFile(BaseModel):
    """A plan: the number format of every tensor of a training step."""

    model_config = ConfigDict(extra="forbid", strict=True, title="assign plan")

    assign_plan: Literal[1] = Field(description="version of this file's layout")
    recipe: str = Field(description="name of the recipe that the formats were chosen from")
    fingerprint: str = Field(description="of the model that the plan was made for")
    provenance: Provenance = Field(default_factory=Provenance)
    loaded: dict[str, str] = Field(default_factory=dict, description="weight → the format in which it was loaded")
    update_rounding: UpdateRounding = Field(
        default=UpdateRounding.NEAREST, strict=False, description="how updates of 16-bit masters are rounded"
    )
    step: StepOptions = Field(default_factory=StepOptions, description="how a step is carried out")
    tensors: dict[str, Entry] = Field(description="tensor's key → its format")


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment(Drawn):
    """A plan: the format of every tensor of one model's training step.

    Attributes:
        entries: key → entry, for every tensor in the paper's four roles. Saved copies, masters, stored gradients,
            optimizer states and buffers may have entries too. A saved copy without one has the format of its
            activation; what is stored between steps stays as it was loaded (see :mod:`assign.plan.persistent_state`).
        recipe: name of the recipe that the formats come from.
        fingerprint: of the model that the assignment is for.
        provenance: where it comes from.
        loaded: weights that were loaded in another format than fp32 and whose masters have entries → that format. It is
            needed when a plan is applied again, e.g. to a model that was saved under it: the plan has already changed
            the dtypes of the weights.
        update_rounding: how updates of 16-bit masters are rounded, as in ``assign.optimizer``.
        step: how a step is carried out: number of micro-batches.

    Raises:
        PlanError: an entry names a format that does not exist or is not allowed there, or there is no such rounding; or
            gradients in 8 bits would have to be summed over micro-batches.
    Examples:
        ```python
        plan.save("plan.json")
        plan = assign.Assignment.load("plan.json")
        print(plan.entries["0.weight"].format, plan.provenance.command)
        ```
    """

    entries: Mapping[str, Entry]
    recipe: str
    fingerprint: str
    provenance: Provenance = field(default_factory=Provenance)
    loaded: Mapping[str, str] = field(default_factory=dict)
    update_rounding: UpdateRounding = UpdateRounding.NEAREST
    step: StepOptions = field(default_factory=StepOptions)

    def __post_init__(self) -> None:
        entries = {key: Entry(self._canonical(key, entry.format), entry.low) for key, entry in self.entries.items()}
        object.__setattr__(self, "entries", entries)
        self._refuse_delayed_copies()
        check_stored(entries)
        self._check_loaded()
        object.__setattr__(self, "update_rounding", parse_rounding(self.update_rounding, where="the plan"))
        check_unsplit(self.update_rounding, entries, where="the plan")
        if self.step.micro_batches > 1 and has_scaled_gradients(entries):
            raise PlanError(
                f"the plan sums gradients over {self.step.micro_batches} micro-batches and stores them in 8 bits, in "
                "which a sum loses most of its parts.\n  Allowed: fp32, bf16 and fp16, whose sums are rounded "
                "stochastically.\n  Store gradients in one of these, or set micro_batches to 1."
            )

    def _check_loaded(self) -> None:
        allowed = [fmt.name for fmt in LOADED.values()]
        for key, name in self.loaded.items():
            if name not in allowed:
                raise PlanError(
                    f"the weight {key!r} is listed as loaded in {name!r}. Allowed: {', '.join(allowed)}. Search again."
                )

    def _refuse_delayed_copies(self) -> None:
        """Check that saved copies with a format of their own do not use delayed scaling.

        Such a copy takes its scale from the values of this step.
        """
        for key, entry in self.entries.items():
            own = self.entries.get(base_key(key))
            if own is None or not is_saved_key(key) or entry.format == own.format:
                continue
            fmt = parse_saved(entry.format)
            if isinstance(fmt, Format) and fmt.delayed:
                raise PlanError(
                    f"{key!r} is assigned {entry.format!r}, but its activation {own.format!r}: a saved copy in "
                    "another format takes its scale from its own values.\n"
                    f"  Choose {entry.format.replace(':delayed', '')!r}."
                )

    def _canonical(self, key: str, name: str) -> str:
        parts = Key.parse(key, self.entries)
        try:
            if parts.is_of_weight or parts.part is Part.BUFFER:
                return parse_stored(name, parts.part).name
            return (parse_saved(name) if parts.part is Part.SAVED else parse_format(name)).name
        except FormatError as error:
            raise PlanError(f"{key!r} is assigned the format {name!r}: {error}") from error

    def format_of(self, key: str) -> Format:
        """Return the format of a tensor of the step itself. For stored tensors see :mod:`assign.plan.persistent_state`.

        Raises:
            PlanError: the assignment has no such key.
        """
        entry = self.entries.get(key)
        if entry is None:
            close = suggest(key, self.entries)
            hint = f" Nearest: {close}." if close else ""
            raise PlanError(f"the plan has no entry for {key!r} among its {len(self.entries)}.{hint}")
        return parse_format(entry.format)

    def saved_format(self, key: str) -> Format | BlockFormat:
        """Return the format in which activation ``key`` is saved for the backward pass.

        It is the activation's own format, unless the assignment has an entry ``<key>.saved``.
        """
        explicit = self.entries.get(saved_key(key))
        return parse_saved(explicit.format) if explicit else self.format_of(key)

    def replace(self, entries: Mapping[str, Entry]) -> "Assignment":
        """Return the same assignment with these entries changed or added."""
        return dataclasses.replace(self, entries={**self.entries, **entries})

    def with_loaded(self, loaded: Mapping[str, str]) -> "Assignment":
        """Return the assignment with an entry for each master that has none and was loaded in another dtype than fp32.

        Args:
            loaded: weight → name of the format in which it was loaded.
        """
        entries = with_loaded(self.entries, loaded)
        return self if entries is self.entries else dataclasses.replace(self, entries=entries)

    def with_update_rounding(self, update_rounding: str | None, *, where: str = "the plan") -> "Assignment":
        """Return the same assignment with another rounding of updates; None changes nothing.

        Args:
            update_rounding: ``nearest``, ``stochastic`` or ``kahan``.
            where: what to call the source of this option in an error.
        Raises:
            PlanError: there is no such rounding, or a master has extra bits, which need ``nearest``.
        """
        if update_rounding is None:
            return self
        chosen = parse_rounding(update_rounding, where=where)
        check_unsplit(chosen, self.entries, where=where)
        return dataclasses.replace(self, update_rounding=chosen)

    def split(self, batch: Any) -> list[MicroBatch]:
        """Return the micro-batches of a batch, for a training loop of your own.

        Args:
            batch: a tensor, or any nesting of tuples, lists, mappings and dataclasses that contains tensors. A tensor
                whose first dimension is that of the batch is split; everything else is given to every part.
        Returns:
            Parts with ``batch`` and ``weight``: the loss of the batch is the sum of weight × loss over all parts.
        Raises:
            PlanError: the batch contains no rows, or no labels by which the plan weights its parts.
        Examples:
            ```python
            model = assign.apply(model, plan, backend="eager")
            for part in plan.split(batch):
                (part.weight * loss(model, part.batch)).backward()
            ```
        """
        return split(batch, self.step)

    @property
    def sums_inside(self) -> bool:
        """Whether the backward pass adds each gradient to those of earlier micro-batches where it arises."""
        return self.step.micro_batches > 1

    def with_step(self, step: StepOptions) -> "Assignment":
        """Return the same assignment with other options for carrying out a step."""
        return dataclasses.replace(self, step=step)

    def with_provenance(self, provenance: Provenance) -> "Assignment":
        """Return the same assignment with another provenance."""
        return dataclasses.replace(self, provenance=provenance)

    def diff(self, other: "Assignment") -> Diff:
        """Return what changes from this assignment to ``other``."""
        here, there = self.entries, other.entries
        return Diff(
            only_here=tuple(key for key in here if key not in there),
            only_there=tuple(key for key in there if key not in here),
            changed={key: (here[key], there[key]) for key in here if key in there and here[key] != there[key]},
            update_rounding=None
            if self.update_rounding == other.update_rounding
            else (self.update_rounding, other.update_rounding),
            step=None if self.step == other.step else (self.step, other.step),
        )

    def check_covers(self, keys: Collection[str], *, where: str, buffers: Collection[str] = ()) -> None:
        """Check that this is a plan for ``keys``, the paper's tensors of a model.

        An entry for a saved copy or for a stored tensor is allowed if ``keys`` has the tensor it belongs to.

        Args:
            keys: of the tensors that must have an entry.
            where: what to call this assignment in an error, e.g. the path of its file.
            buffers: names of the buffers that may have entries.
        Raises:
            PlanError: a tensor has no entry, or an entry has no tensor.
        """
        wanted = set(keys)
        missing = [key for key in keys if key not in self.entries]
        extra = [key for key in self.entries if not _belongs(key, wanted, buffers)]
        if not missing and not extra:
            return
        lines = [f"{where} does not fit this model."]
        if missing:
            lines.append(f"It has no entry for {len(missing)} of the model's {len(wanted)} tensors:")
            lines += _named(missing, extra or self.entries, "nearest in the plan")
        if extra:
            lines.append(f"It has entries for {len(extra)} tensors that the model does not have:")
            lines += _named(extra, missing or wanted, "nearest in the model")
        lines.append("Use the plan with the model it was made for, or search a plan for this model.")
        raise PlanError("\n  ".join(lines))

    def check_fits(self, table: TensorTable, *, where: str) -> None:
        """Check that this is a plan for the model of a table.

        Args:
            table: of the model.
            where: what to call this plan in an error, e.g. the path of its file.
        Raises:
            PlanError: a tensor has no entry, or an entry has no tensor; or the plan has micro-batches, and the table is
                of a step without them or with another number of them.
        """
        parts, traced = self.step.micro_batches, table.schedule.micro_batches
        if parts not in (1, traced):
            raise PlanError(
                f"{where}: the plan runs a batch in {parts} micro-batches, and the step was traced with {traced}.\n"
                f"  Allowed: a step traced with the same number.\n"
                f"  Trace it with assign.trace(model, batch, loss, optimizer, micro_batches={parts})."
            )
        self.check_covers([info.key for info in table.paper_tensors], where=where, buffers=table.buffers)

    def to_pandas(self) -> Any:
        """Return a data frame with one row per entry: key, format, low. Needs pandas."""
        rows = ({"key": key, "format": entry.format, "low": entry.low} for key, entry in self.entries.items())
        return frame(rows, ["key", "format", "low"])

    def _repr_html_(self) -> str:
        """Return a table of the formats and their tensor counts, for a notebook."""
        counts = Counter(entry.format for entry in self.entries.values())
        rows = [((name, f"{count:,}"), count / len(self.entries)) for name, count in counts.most_common()]
        facts = self.provenance.estimate
        peak = facts.get("peak_bytes")
        words = "" if not isinstance(peak, (int, float)) else f", predicted peak {human_bytes(peak)}"
        return table_html(
            f"plan for {len(self.entries)} tensors, recipe {self.recipe}{words}", ["format", "tensors"], rows
        )

    def to_json(self) -> str:
        """Return the text of the plan's file: one line per tensor, in the order of the entries."""
        head = {
            "assign_plan": VERSION,
            "recipe": self.recipe,
            "fingerprint": self.fingerprint,
            "provenance": dataclasses.asdict(self.provenance),
            **({"loaded": dict(self.loaded)} if self.loaded else {}),
            **({"update_rounding": self.update_rounding} if self.update_rounding != UpdateRounding.NEAREST else {}),
            **({"step": self.step.to_json()} if self.step != StepOptions() else {}),
        }
        rows = [
            f"    {json.dumps(key)}: {json.dumps({'format': entry.format, 'low': entry.low})}"
            for key, entry in self.entries.items()
        ]
        tensors = "{\n" + ",\n".join(rows) + "\n  }" if rows else "{}"
        return json.dumps(head, indent=2, allow_nan=False).removesuffix("\n}") + f',\n  "tensors": {tensors}\n}}\n'

    @classmethod
    def from_json(cls, text: str, *, where: str = "the plan") -> Self:
        """Return the plan that the text of a file describes.

        Args:
            text: JSON, as :meth:`to_json` writes it.
            where: what to call the text in an error, e.g. the path of the file.
        Raises:
            PlanError: the text is not JSON, not a plan, from a newer version, or names an unknown format.
        """
        _check_version(_FILE.parse(text, where), where)
        file = _FILE.validate(_SCHEMA, text, where)
        try:
            return cls(
                entries=file.tensors,
                recipe=file.recipe,
                fingerprint=file.fingerprint,
                provenance=file.provenance,
                loaded=file.loaded,
                update_rounding=file.update_rounding,
                step=file.step,
            )
        except PlanError as error:
            raise PlanError(f"{where}: {error}") from error

    @staticmethod
    def schema() -> dict[str, Any]:
        """Return the JSON schema of a plan's file."""
        return _PlanFile.model_json_schema()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to ``path``. The write is atomic: a reader sees the old or the new file, never a part of one.

        Raises:
            PlanError: the file cannot be written.
        """
        _FILE.write(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Return the plan in the file ``path``.

        Raises:
            PlanError: there is no such file, or :meth:`from_json` refuses it.
        """
        return cls.from_json(_FILE.read(path), where=str(path))


Plan = Assignment
"""Public alias of ``Assignment``."""

_SCHEMA = TypeAdapter(_PlanFile)


def _belongs(key: str, wanted: Collection[str], buffers: Collection[str]) -> bool:
    parts = Key.parse(key, wanted)
    named = {Part.SAVED: wanted, Part.BUFFER: buffers}.get(parts.part, ())
    return key in wanted or parts.is_of_weight or parts.name in named


def _named(keys: Sequence[str], others: Iterable[str], title: str) -> list[str]:
    lines = []
    for key in keys[:_NAMED]:
        close = suggest(key, others)
        lines.append(f"  {key!r}" + (f" ({title}: {close})" if close else ""))
    if len(keys) > _NAMED:
        lines.append(f"  and {len(keys) - _NAMED} more")
    return lines


def _check_version(data: Any, where: str) -> None:
    if not isinstance(data, dict) or "assign_plan" not in data:
        found = "no key 'assign_plan'" if isinstance(data, dict) else f"a {type(data).__name__} at the top"
        raise PlanError(f"{where} is JSON but not a plan: it has {found}. Give the file that a search wrote.")
    version = data["assign_plan"]
    if version == VERSION and isinstance(version, int) and not isinstance(version, bool):
        return
    newer = isinstance(version, (int, float)) and version > VERSION
    advice = "Upgrade this package to read it." if newer else "Search again to make a new one."
    raise PlanError(f"{where} is a plan of version {version!r}; this package reads version {VERSION}. {advice}")
