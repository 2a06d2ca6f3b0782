"""Read the JSON that ``assign train``, ``run`` and ``compare`` wrote."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from assign.errors import ReportError
from assign.json_file import Count, Kind, NotNegative, Share
from assign.plan.table import check_same_model
from assign.training.comparison import Comparison, EpochFacts

_FILE = Kind(
    name="training",
    error=ReportError,
    advice="Give a file that 'assign train', 'assign run' or 'assign compare' wrote with --json.",
)
_Scale = Annotated[float, Field(gt=0)]


class Epoch(EpochFacts):
    """One finished epoch of a run. A step is skipped if its gradients are not finite."""

    fp32_metrics: dict[str, float | None] = Field(default_factory=dict)
    loss_scale: _Scale | None = None
    skipped_steps: Count = 0


class Promotion(BaseModel):
    """A promoted tensor: the step at which it overflowed too often and got its high format back."""

    model_config = ConfigDict(strict=True, frozen=True)

    step: Count
    key: str
    overflow_ratio: Share
    from_format: str
    to_format: str


class Course(BaseModel):
    """A training step by step: one list per attribute of its points, see ``assign.training.history``."""

    model_config = ConfigDict(strict=True, frozen=True)

    step: list[Count]
    steps: list[Count]
    loss: list[float | None]
    overflow: list[Share | None]
    loss_scale: list[_Scale | None]
    skipped: list[Count]

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if len({len(values) for _, values in self}) > 1:
            raise ValueError("its lists differ in length")
        return self


class Facts(BaseModel):
    """The part of a training's result that the page uses. None is a number that was not finite, or is not known."""

    model_config = ConfigDict(strict=True, frozen=True)

    metrics: dict[str, float | None]
    fp32_metrics: dict[str, float | None] = Field(default_factory=dict)
    loss: float | None
    measured_peak_bytes: Count | None = None
    predicted_peak_bytes: Count | None = None
    step_seconds: NotNegative | None = None
    diverged: bool = False
    message: str = ""
    steps: Count | None = None
    skipped_steps: Count | None = None
    epochs: list[Epoch]
    course: Course | None = None
    promotions: list[Promotion] = Field(default_factory=list)
    promote_threshold: Share | None = None
    fingerprint: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedRun:
    """One training.

    Attributes:
        variant: name that runs share if they differ only in the seed.
        seed: None if the file does not give it.
    """

    variant: str
    seed: int | None
    facts: Facts

    @property
    def name(self) -> str:
        """Variant and seed."""
        return self.variant if self.seed is None else f"{self.variant}, seed {self.seed}"


def load_runs(paths: Sequence[Path], fingerprint: str) -> tuple[TrainedRun, ...]:
    """Return all trainings in these files; if there are several files, a run's name starts with its file's.

    Args:
        paths: files that ``train``, ``run`` or ``compare`` wrote.
        fingerprint: of the model that they must belong to; older files of ``train`` and ``run`` have none.
    Raises:
        ReportError: a file cannot be read, has no training, or has one of another model.
    """
    found = []
    for path in paths:
        text = _FILE.read(path)
        prefix = f"{path.stem}: " if len(paths) > 1 else ""
        for variant, seed, result in _results(text, path, fingerprint):
            facts = _FILE.validate(_FACTS, json.dumps(result), str(path))
            _check(facts.fingerprint, fingerprint, f"{path} holds trainings of another model")
            found.append(TrainedRun(variant=prefix + (variant or path.stem), seed=seed, facts=facts))
    return tuple(found)


def _results(text: str, path: Path, fingerprint: str) -> Iterator[tuple[str, int | None, Any]]:
    """Yield variant, seed and result of each training in a file."""
    data = _FILE.parse(text, str(path))
    if not isinstance(data, dict):
        raise ReportError(f"{path} is not the result of a training, but a {type(data).__name__}. {_FILE.advice}")
    if "assign_comparison" in data:
        comparison = Comparison.from_json(text, where=str(path))
        _check(comparison.fingerprint, fingerprint, f"{path} compares plans of another model")
        yield from ((run.variant, run.seed, run.result) for run in comparison.runs)
    elif {"baseline", "plan"} <= data.keys():
        yield from (("fp32", None, data["baseline"]), ("plan", None, data["plan"]))
    else:
        yield "", None, data


def _check(found: str | None, wanted: str, what: str) -> None:
    advice = "Give trainings of the plan's model, or leave the file out."
    check_same_model(wanted if found is None else found, wanted, what=what, advice=advice, error=ReportError)


_FACTS = TypeAdapter(Facts)
