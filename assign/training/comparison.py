"""Results of a comparison: runs of several variants and seeds, as one file."""

import dataclasses
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter

from assign.errors import ComparisonError
from assign.json_file import Count, Kind, NotNegative, Share, twice

VERSION = 1
"""Version of the file that this package writes, under the key ``assign_comparison``."""

_FILE = Kind(name="comparison", error=ComparisonError, advice="Give another file, or move this one to start again.")


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantRow:
    """A variant in a comparison's file.

    Attributes:
        plan: hash of the plan's recipe and entries; None without a plan.
        recipe, strategy: those of the plan, '' if unknown.
        promote_every: steps between two checks for overflow; 0: nothing is promoted.
        promote_threshold: share of overflowing elements at which a tensor is promoted.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, Field(min_length=1)]
    plan: str | None
    recipe: str
    strategy: str
    promote_every: Count
    promote_threshold: Share = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One training of one variant.

    Attributes:
        low_ratio: share of low elements at the start; None without a plan.
        low_ratio_bits: the same by bits.
        final_low_ratio, final_low_ratio_bits: the same at the end of the run, after promotions.
        result: ``TrainResult.to_json()``.
        hardware: the hardware of the run, to interpret its seconds.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    variant: str
    seed: int
    low_ratio: Share | None
    low_ratio_bits: Share | None
    final_low_ratio: Share | None
    final_low_ratio_bits: Share | None
    result: dict[str, JsonValue]
    hardware: str

    @property
    def facts(self) -> "RunFacts":
        """The fields of ``result`` that summaries and pictures read."""
        return RunFacts.model_validate(self.result)


class EpochFacts(BaseModel):
    """The fields of one epoch that are used. None is a number that was not finite."""

    model_config = ConfigDict(strict=True, frozen=True)

    loss: float | None
    metrics: dict[str, float | None]


class RunFacts(BaseModel):
    """The fields of a run's result that are used; others are stored, but not read."""

    model_config = ConfigDict(strict=True, frozen=True)

    metrics: dict[str, float | None]
    fp32_metrics: dict[str, float | None]
    loss: float | None
    measured_peak_bytes: Count | None
    step_seconds: NotNegative | None
    diverged: bool
    message: str
    epochs: list[EpochFacts]
    promotions: list[JsonValue]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """One number over several seeds; without values, every statistic is None."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float | None:
        """Arithmetic mean."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation (n − 1); None below two values."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def lowest(self) -> float | None:
        """Smallest value."""
        return min(self.values, default=None)

    @property
    def highest(self) -> float | None:
        """Largest value."""
        return max(self.values, default=None)

    def to_json(self) -> dict[str, Any]:
        """Return values and statistics as plain data."""
        names = ("mean", "deviation", "lowest", "highest")
        return {"values": list(self.values)} | {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Statistics of a variant over its seeds.

    Attributes:
        diverged: number of ``runs`` that diverged. They are not part of the metrics and the loss.
        low_ratio, low_ratio_bits: at the start; None without a plan.
        final_low_ratio, final_low_ratio_bits: at the end, after promotions.
        metrics: by name, computed under the plan.
        fp32_metrics: the same with the same weights in plain fp32; without a plan they equal ``metrics``.
        loss: mean training loss of the last epoch.
        peak_bytes: measured peak memory.
        promotions: number of tensors promoted in a run.
    """

    variant: str
    runs: int
    diverged: int
    low_ratio: float | None
    low_ratio_bits: float | None
    final_low_ratio: Spread
    final_low_ratio_bits: Spread
    metrics: Mapping[str, Spread]
    fp32_metrics: Mapping[str, Spread]
    loss: Spread
    peak_bytes: Spread
    step_seconds: Spread
    promotions: Spread

    def to_json(self) -> dict[str, Any]:
        """Return the summary as plain data."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Result of :func:`assign.training.compare.compare`, with everything that must be equal to resume it.

    Attributes:
        fingerprint: of the model.
        elements: of the tensors of one step, to recognize another batch size.
        epochs: of every run.
        device: as requested; the ``hardware`` of a run is more precise.
        created: when the comparison started, ISO 8601.
        runs: finished runs, by variant and then by seed.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    task: str
    fingerprint: str
    elements: Count
    epochs: Annotated[int, Field(ge=1)]
    backend: str
    device: str
    versions: dict[str, str]
    created: str
    seeds: tuple[int, ...]
    variants: tuple[VariantRow, ...]
    runs: tuple[Run, ...]

    @property
    def metric(self) -> str | None:
        """The metric to compare by: ``accuracy`` if the task has it, else its first; None if it has none."""
        names = [name for run in self.runs for name in run.facts.metrics]
        return "accuracy" if "accuracy" in names else next(iter(names), None)

    def of(self, variant: str) -> tuple[Run, ...]:
        """Return the finished runs of a variant."""
        return tuple(run for run in self.runs if run.variant == variant)

    def summaries(self) -> tuple[Summary, ...]:
        """Return one summary per variant, in their order; one without a finished run has no numbers."""
        return tuple(_summary(row, self.of(row.name)) for row in self.variants)

    def to_json(self) -> dict[str, Any]:
        """Return plain data, with summaries for other readers of the file; ``from_json`` ignores them."""
        plain = json.loads(json.dumps(dataclasses.asdict(self)))  # tuples become lists
        return {"assign_comparison": VERSION, **plain, "summaries": [summary.to_json() for summary in self.summaries()]}

    @classmethod
    def from_json(cls, text: str, *, where: str = "the comparison") -> Self:
        """Return the comparison that the text of a file describes.

        Args:
            text: JSON of what :meth:`to_json` returns.
            where: what to call it in an error, e.g. the path of the file.
        Raises:
            ComparisonError: the text is not a comparison, or another version wrote it.
        """
        data = _FILE.parse(text, where)
        found = data.get("assign_comparison") if isinstance(data, dict) else None
        if found != VERSION or isinstance(found, bool):
            what = "not a comparison" if found is None else f"a comparison of version {found!r}; this reads {VERSION}"
            raise ComparisonError(f"{where} is {what}. {_FILE.advice}")
        fields = {name: value for name, value in data.items() if name not in ("assign_comparison", "summaries")}
        comparison: Self = _FILE.validate(_COMPARISON, json.dumps(fields), where)
        comparison._check(where)
        return comparison

    def _check(self, where: str) -> None:
        """Check that every run belongs to one of the variants and seeds, and that nothing occurs twice.

        Raises:
            ComparisonError: a check fails.
        """

        def refuse(what: str) -> ComparisonError:
            return ComparisonError(f"{where} is not a valid comparison: {what}. {_FILE.advice}")

        names = [row.name for row in self.variants]
        for what, again in (("variant", twice(names)), ("seed", twice(self.seeds))):
            if again is not None:
                raise refuse(f"the {what} {again!r} is in it twice")
        if run_again := twice((run.variant, run.seed) for run in self.runs):
            raise refuse(f"the run of {run_again[0]!r} with seed {run_again[1]} is in it twice")
        for number, run in enumerate(self.runs):
            if run.variant not in names or run.seed not in self.seeds:
                raise refuse(f"run {number} is of {run.variant!r} with seed {run.seed}, which its lists do not have")
            _FILE.validate(_FACTS, json.dumps(run.result), f"{where}, run {number}")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Return the comparison in the file ``path``.

        Raises:
            ComparisonError: it cannot be read, or :meth:`from_json` refuses it.
        """
        return cls.from_json(_FILE.read(path), where=str(path))

    def save(self, path: Path) -> None:
        """Write the comparison to ``path`` atomically: a reader sees the old or the new file, never a part of one.

        Raises:
            ComparisonError: the file cannot be written.
        """
        _FILE.write(path, json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")


_COMPARISON: TypeAdapter[Any] = TypeAdapter(Comparison)
_FACTS = TypeAdapter(RunFacts)


def _summary(row: VariantRow, runs: Sequence[Run]) -> Summary:
    facts = [run.facts for run in runs]
    good = [fact for fact in facts if not fact.diverged]
    first = runs[0] if runs else None
    return Summary(
        variant=row.name,
        runs=len(runs),
        diverged=len(facts) - len(good),
        low_ratio=first.low_ratio if first else None,
        low_ratio_bits=first.low_ratio_bits if first else None,
        final_low_ratio=_spread(run.final_low_ratio for run in runs),
        final_low_ratio_bits=_spread(run.final_low_ratio_bits for run in runs),
        metrics=_by_name([fact.metrics for fact in good]),
        fp32_metrics=_by_name([fact.fp32_metrics if row.plan else fact.metrics for fact in good]),
        loss=_spread(fact.loss for fact in good),
        peak_bytes=_spread(fact.measured_peak_bytes for fact in facts),
        step_seconds=_spread(fact.step_seconds for fact in facts),
        promotions=_spread(len(fact.promotions) for fact in facts),
    )


def _by_name(rows: Sequence[Mapping[str, float | None]]) -> dict[str, Spread]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: _spread(row.get(name) for row in rows) for name in names}


def _spread(values: Iterable[float | None]) -> Spread:
    return Spread(values=tuple(value for value in values if value is not None))


def _plain(value: Any) -> Any:
    if isinstance(value, Spread):
        return value.to_json()
    return {name: spread.to_json() for name, spread in value.items()} if isinstance(value, dict) else value
