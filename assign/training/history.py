"""History of a training: its training curve and its epochs, for checkpoints and results."""

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Self

from pydantic import ConfigDict, Field, TypeAdapter
from torch import nn

from assign.json_file import Count, NotNegative, Share
from assign.numerics.promotion import Promoted
from assign.plan.plan import Assignment
from assign.tasks.task import Metrics

MOST_POINTS = 500
"""Largest number of points in a training curve; even. A chart on a phone has fewer pixels."""

_DIGITS = {"loss": 6, "seconds": 4, "overflow": 4}
"""Significant digits of a point's numbers in JSON; all other numbers are not rounded."""


_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One step of a training, or several consecutive ones.

    Attributes:
        step: number of the last step, from 1.
        steps: number of steps in the point.
        loss, seconds: means over the steps. A step takes longer if its peak was measured, or if it is the first of a
            process.
        overflow: largest overflowing share of any tensor's elements; None if overflow was not measured.
        loss_scale: after the last step; None without loss scaling.
        skipped: number of steps whose gradients were not finite.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    step: Count
    steps: Count = 1
    loss: float
    seconds: NotNegative = field(compare=False)  # differs between equal runs
    overflow: Share | None = None
    loss_scale: float | None = None
    skipped: Count = 0

    def joined(self, after: "Point") -> "Point":
        """Return this point and the next one as one."""
        steps = self.steps + after.steps
        seen = [share for share in (self.overflow, after.overflow) if share is not None]
        return Point(
            step=after.step,
            steps=steps,
            loss=(self.loss * self.steps + after.loss * after.steps) / steps,
            seconds=(self.seconds * self.steps + after.seconds * after.steps) / steps,
            overflow=max(seen, default=None),
            loss_scale=after.loss_scale,
            skipped=self.skipped + after.skipped,
        )


@dataclass(slots=True, kw_only=True)
class Course:
    """Training curve: a training step by step, in at most ``MOST_POINTS`` points.

    Attributes:
        stride: number of steps in every point except the last, which may have fewer. When there is no room for another
            point, neighbours are joined, and the stride doubles.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    stride: Annotated[int, Field(ge=1)] = 1
    points: list[Point] = field(default_factory=list)

    def add(self, step: Point) -> None:
        """Add one more step."""
        if self.points and self.points[-1].steps < self.stride:
            self.points[-1] = self.points[-1].joined(step)
            return
        if len(self.points) == MOST_POINTS:
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points = [first.joined(second) for first, second in pairs]
            self.stride *= 2
        self.points.append(step)


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochResult:
    """One finished epoch.

    Attributes:
        loss: mean over the steps.
        metrics: result of the task's ``evaluate`` under the plan.
        fp32_metrics: the same with the same weights in plain fp32; empty without a plan.
        loss_scale: at the end of the epoch; None without loss scaling.
        skipped_steps: number of steps whose gradients were not finite.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    loss: float
    metrics: Metrics
    fp32_metrics: Metrics
    loss_scale: float | None
    skipped_steps: Count


@dataclass(slots=True, kw_only=True)
class History:
    """Record of a run so far; ``dataclasses.asdict`` of it is stored in the checkpoint."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    epoch: Count = 0
    step_in_epoch: Count = 0
    steps: Count = 0
    skipped: Count = 0
    skipped_in_epoch: Count = 0
    course: Course = field(default_factory=Course)
    epochs: list[EpochResult] = field(default_factory=list)
    epoch_loss: float = 0.0
    metrics: Metrics = field(default_factory=dict)
    fp32_metrics: Metrics = field(default_factory=dict)
    seconds: list[NotNegative] = field(default_factory=list)
    peak_bytes: Count | None = None
    first_batch_bytes: Count = 0

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> Self:
        """Return the history in a checkpoint.

        Raises:
            TypeError, ValueError: it is not a history.
        """
        found: Self = _HISTORY.validate_json(json.dumps(saved), strict=True)
        finished, seen = len(found.epochs), sum(point.steps for point in found.course.points)
        if finished != found.epoch or seen != found.steps or found.step_in_epoch > found.steps:
            raise ValueError(f"it counts {found.epoch} epochs and {found.steps} steps, and lists {finished} and {seen}")
        return found

    def take(self, step: Point) -> None:
        """Count one more step."""
        self.steps += 1
        self.step_in_epoch += 1
        self.skipped += step.skipped
        self.skipped_in_epoch += step.skipped
        self.epoch_loss += step.loss
        self.course.add(step)

    def end_epoch(self, loss_scale: float | None) -> None:
        """Append the result of the epoch, whose metrics are known, and start the next one."""
        self.epochs.append(
            EpochResult(
                loss=self.epoch_loss / self.step_in_epoch,
                metrics=self.metrics,
                fp32_metrics=self.fp32_metrics,
                loss_scale=loss_scale,
                skipped_steps=self.skipped_in_epoch,
            )
        )
        self.epoch, self.step_in_epoch, self.epoch_loss, self.skipped_in_epoch = self.epoch + 1, 0, 0.0, 0

    @property
    def losses(self) -> tuple[float, ...]:
        """Mean loss of each epoch, the unfinished one included."""
        unfinished = [self.epoch_loss / self.step_in_epoch] if self.step_in_epoch else []
        return (*(epoch.loss for epoch in self.epochs), *unfinished)

    @property
    def step_seconds(self) -> float | None:
        """Median seconds of the steps after the warm-up; None if there was none."""
        return statistics.median(self.seconds) if self.seconds else None


_HISTORY: TypeAdapter[Any] = TypeAdapter(History)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """Result of a training.

    Attributes:
        metrics: result of the task's ``evaluate`` at the end; after a divergence, at the end of the last good epoch.
        fp32_metrics: the same with the same weights in plain fp32; empty without a plan.
        loss: mean of the last epoch.
        losses: mean of each epoch, the unfinished one included.
        epochs: the finished epochs.
        course: the training curve, all steps in at most ``MOST_POINTS`` points.
        promotions: tensors that overflowed too often and got their high format back.
        promote_threshold: share of overflowing elements at which a tensor is promoted; None if overflow was not
            measured.
        measured_peak_bytes: peak memory of one step after the warm-up; None if there was none.
        predicted_peak_bytes: peak memory that the memory model predicts; None without a table.
        fingerprint: of the model; None without a table.
        step_seconds: median of the steps after the warm-up; None if there was none.
        steps: number of optimizer steps, skipped ones included.
        skipped_steps: number of steps that loss scaling skipped, because gradients were not finite.
        message: after a divergence, where it happened and what to try.
        plan: the plan with all promotions.
        model: the trained model; useless if training diverged.
    """

    metrics: Metrics
    fp32_metrics: Metrics
    loss: float
    losses: tuple[float, ...]
    epochs: tuple[EpochResult, ...]
    course: tuple[Point, ...] = field(repr=False)
    promotions: tuple[Promoted, ...]
    promote_threshold: float | None
    measured_peak_bytes: int | None
    predicted_peak_bytes: int | None
    fingerprint: str | None
    step_seconds: float | None
    diverged: bool
    steps: int
    skipped_steps: int
    loss_scale: float | None
    message: str
    plan: Assignment | None = field(repr=False)
    model: nn.Module = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return plain data, without plan and model; numbers that are not finite become None.

        ``course`` has a list for each attribute of its points, rounded to a few digits.
        """
        names = [f.name for f in dataclasses.fields(self) if f.name not in ("plan", "model")]
        return {name: _plain(getattr(self, name)) for name in names} | {"course": _columns(self.course)}


def _columns(course: Sequence[Point]) -> dict[str, list[Any]]:
    names = [each.name for each in dataclasses.fields(Point)]
    return {name: [_rounded(getattr(point, name), _DIGITS.get(name)) for point in course] for name in names}


def _rounded(value: Any, digits: int | None) -> Any:
    return _plain(value if value is None or digits is None else float(f"{value:.{digits}g}"))


def _plain(value: Any) -> Any:
    """Return ``value`` as plain data for JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
