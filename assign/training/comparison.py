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

_FILE = Kind(name="comparison", error=ComparisonError, advice="Give another file, or move this one away to start anew.")


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantRow:
    """A variant in a comparison's file.

    Attributes:
        plan: hash of the plan's recipe and entries; None without a plan.
        recipe, strategy: the plan's, '' where unknown.
        promote_every: steps between two looks at what overflows; 0: nothing is promoted.
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
        low_ratio: share of the elements held low, at the start; ``low_ratio_bits``: the same by bits. None without a
            plan, as are ``final_low_ratio`` and ``final_low_ratio_bits``: of the plan as promoted when the run ended.
        result: ``TrainResult.to_json()``.
        hardware: what it ran on, for its seconds.
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
    """What is read of one epoch of a run; None is a number that was not finite."""

    model_config = ConfigDict(strict=True, frozen=True)

    loss: float | None
    metrics: dict[str, float | None]


class RunFacts(BaseModel):
    """What is read of a run's result; its other fields are kept, not read."""

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
    """One number over several seeds; without any, everything is None."""

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
        """The least of them."""
        return min(self.values, default=None)

    @property
    def highest(self) -> float | None:
        """The greatest of them."""
        return max(self.values, default=None)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        names = ("mean", "deviation", "lowest", "highest")
        return {"values": list(self.values)} | {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A variant over its seeds.

    Attributes:
        diverged: how many of ``runs`` did. Those have no part in the metrics: what they knew before is no result.
        low_ratio, low_ratio_bits: at the start, None without a plan; ``final_…``: of the plans as promoted.
        metrics: by name, computed under the plan; ``fp32_metrics``: by the same weights in plain fp32, which without a
            plan are the same numbers.
        loss: mean training loss of the last epoch.
        peak_bytes: measured.
        promotions: tensors promoted in a run.
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
        """Plain data."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What ``comparing.compare`` found, and everything that another run of it must share to be put beside it.

    Attributes:
        fingerprint: of the model; ``elements``: of one step's tensors, so that another batch size is told.
        epochs: of every run.
        device: as asked; a run's ``hardware`` says more.
        created: when the comparison began, ISO 8601.
        runs: those finished, by variant and then by seed.
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
        """The metric to judge by: ``accuracy`` if the task has it, else its first; None if it has none."""
        names = [name for run in self.runs for name in run.facts.metrics]
        return "accuracy" if "accuracy" in names else next(iter(names), None)

    def of(self, variant: str) -> tuple[Run, ...]:
        """The finished runs of a variant."""
        return tuple(run for run in self.runs if run.variant == variant)

    def summaries(self) -> tuple[Summary, ...]:
        """One for each variant, in their order; one without a finished run has no numbers."""
        return tuple(_summary(row, self.of(row.name)) for row in self.variants)

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the summaries for whoever reads the file; ``from_json`` makes them anew."""
        plain = json.loads(json.dumps(dataclasses.asdict(self)))  # tuples become lists
        return {"assign_comparison": VERSION, **plain, "summaries": [summary.to_json() for summary in self.summaries()]}

    @classmethod
    def from_json(cls, text: str, *, where: str = "the comparison") -> Self:
        """Read the text of a comparison's file.

        Args:
            text: JSON of what :meth:`to_json` returns.
            where: what to call it in an error, e.g. the path of the file.
        Raises:
            ComparisonError: it is not one, or one that another version wrote.
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
        """Make sure that every run is one of these variants and seeds, and that nothing is there twice.

        Raises:
            ComparisonError: it is not so.
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
                raise refuse(f"run {number} is of {run.variant!r} with seed {run.seed}, which is none of its own")
            _FILE.validate(_FACTS, json.dumps(run.result), f"{where}, run {number}")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the comparison at ``path``.

        Raises:
            ComparisonError: it cannot be read, or :meth:`from_json` refuses it.
        """
        return cls.from_json(_FILE.read(path), where=str(path))

    def save(self, path: Path) -> None:
        """Write it to ``path``; whoever reads meanwhile sees the old file or the new one, never a half.

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
