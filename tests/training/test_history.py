"""A training's course: short whatever its length, nothing of it lost, the same however often it was stopped."""

import dataclasses
import json
import math
import random
import statistics

import pytest
from torch import nn

from assign.training.history import MOST_POINTS, Course, History, Point, TrainResult

LENGTHS = [1, MOST_POINTS - 1, MOST_POINTS, MOST_POINTS + 1, 2 * MOST_POINTS, 2 * MOST_POINTS + 1, 4321]


def steps_of(count: int) -> list[Point]:
    """Steps of a training whose promotion looks at every seventh, and whose scale changes and skips now and then."""
    draw = random.Random(count)
    return [
        Point(
            step=number,
            loss=draw.random(),
            seconds=draw.random(),
            overflow=draw.random() if number % 7 == 1 else None,
            loss_scale=2.0 ** draw.randint(1, 30),
            skipped=int(draw.random() < 0.1),
        )
        for number in range(1, count + 1)
    ]


def taken(steps: list[Point]) -> History:
    history = History()
    for step in steps:
        history.take(step)
    return history


@pytest.mark.parametrize("count", LENGTHS)
def test_a_course_is_short_and_has_every_step(count: int) -> None:
    """Beside the same made in one go: as many steps to a point as it takes, which doubles from 1."""
    steps = steps_of(count)
    course = taken(steps).course
    stride = 1
    while math.ceil(count / stride) > MOST_POINTS:
        stride *= 2
    assert course.stride == stride
    parts = [steps[start : start + stride] for start in range(0, count, stride)]
    assert len(course.points) == len(parts) <= MOST_POINTS
    for point, part in zip(course.points, parts, strict=True):
        assert (point.step, point.steps) == (part[-1].step, len(part))
        assert point.loss == pytest.approx(statistics.fmean(step.loss for step in part))
        assert point.seconds == pytest.approx(statistics.fmean(step.seconds for step in part))
        assert point.overflow == max((step.overflow for step in part if step.overflow is not None), default=None)
        assert point.loss_scale == part[-1].loss_scale
        assert point.skipped == sum(step.skipped for step in part)


def test_a_history_goes_on_from_what_was_saved() -> None:
    """Bit for bit, wherever it was stopped: before neighbours are joined, while a point fills, at a point's end."""
    steps = steps_of(1300)
    whole = taken(steps)
    history, start = History(), 0
    for stop in (1, 500, 501, 502, 999, 1001, 1003, 1300):
        for step in steps[start:stop]:
            history.take(step)
        history, start = History.of(dataclasses.asdict(history)), stop
    assert history == whole
    assert [point.seconds for point in history.course.points] == [point.seconds for point in whole.course.points]


def test_an_epoch_ends_and_the_next_begins() -> None:
    history = taken([Point(step=1, loss=1.0, seconds=0.1, skipped=1), Point(step=2, loss=2.0, seconds=0.1)])
    history.metrics = {"accuracy": 0.5}
    assert history.losses == (1.5,)
    history.end_epoch(8.0)
    (epoch,) = history.epochs
    assert (epoch.loss, epoch.metrics, epoch.loss_scale, epoch.skipped_steps) == (1.5, {"accuracy": 0.5}, 8.0, 1)
    history.take(Point(step=3, loss=4.0, seconds=0.1))
    assert history.losses == (1.5, 4.0)
    assert (history.epoch, history.step_in_epoch, history.steps, history.skipped) == (1, 1, 3, 1)
    assert (history.skipped_in_epoch, history.course.points[-1].step) == (0, 3)


def test_in_json_it_is_columns_of_few_digits_and_no_nan() -> None:
    course = Course()
    course.add(Point(step=1, loss=1.23456789, seconds=0.123456, overflow=0.0123456, loss_scale=2.0**20))
    course.add(Point(step=2, loss=math.nan, seconds=0.5, loss_scale=2.0**21, skipped=1))
    result = TrainResult(
        metrics={},
        fp32_metrics={},
        loss=math.nan,
        losses=(),
        epochs=(),
        course=tuple(course.points),
        promotions=(),
        promote_threshold=None,
        measured_peak_bytes=None,
        predicted_peak_bytes=None,
        fingerprint="f",
        step_seconds=None,
        diverged=True,
        steps=2,
        skipped_steps=1,
        loss_scale=None,
        message="",
        plan=None,
        model=nn.Identity(),
    )
    assert json.loads(json.dumps(result.to_json(), allow_nan=False))["course"] == {
        "step": [1, 2],
        "steps": [1, 1],
        "loss": [1.23457, None],
        "seconds": [0.1235, 0.5],
        "overflow": [0.01235, None],
        "loss_scale": [2.0**20, 2.0**21],
        "skipped": [0, 1],
    }
