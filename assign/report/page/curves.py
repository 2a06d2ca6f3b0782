"""Data of training charts: loss, overflow and loss scale by step, metrics by epoch.

Files of older versions have no training curve; only their values by epoch are drawn.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from assign.report.page.colours import DASHES, INK, LINES, SYMBOLS
from assign.report.page.figures import Figure, axis, layout, plain, short, titled
from assign.report.page.runs import Course, Epoch, TrainedRun

_MOST_METRICS = 4
_MOST_MARKERS = 12
_HEADROOM = 1.15
_SCALE = "loss scale (log2)"

_Looks = Mapping[str, Mapping[str, Any]]


def looks_of(runs: Sequence[TrainedRun]) -> dict[str, dict[str, Any]]:
    """Return {variant: colour, stroke and marker}; all its seeds share them."""
    variants = dict.fromkeys(run.variant for run in runs)
    return {
        name: {
            "color": LINES[number % len(LINES)],
            "dash": DASHES[number % len(DASHES)],
            "symbol": SYMBOLS[number % len(SYMBOLS)],
        }
        for number, name in enumerate(variants)
    }


# ---- by step


def course_figure(runs: Sequence[TrainedRun]) -> Figure | None:
    """Return a figure of training loss by step; None if no run has a training curve."""
    return _by_step(_with_course(runs), looks_of(runs), {"training loss": lambda course: course.loss})


def scale_figure(runs: Sequence[TrainedRun]) -> Figure | None:
    """Return a figure of the loss scale after each step, as a power of two, and of the skipped steps so far, if any.

    None if no run has a loss scale by step.
    """
    scaled = [(run, course) for run, course in _with_course(runs) if any(course.loss_scale)]
    rows: dict[str, Callable[[Course], Sequence[float | None]]] = {
        _SCALE: lambda course: [_log2(scale) for scale in course.loss_scale],
    }
    if any(any(course.skipped) for _, course in scaled):
        rows["steps skipped so far"] = lambda course: [*itertools.accumulate(course.skipped)]
    return _by_step(scaled, looks_of(runs), rows, whole=True)


def overflow_figure(runs: Sequence[TrainedRun]) -> Figure | None:
    """Return a figure of the largest overflowed share by step, promotions, and the share at which they happen.

    None if no overflow was measured.
    """
    looks = looks_of(runs)
    looked = [(run, course) for run, course in _with_course(runs) if any(x is not None for x in course.overflow)]
    lines = [
        _stepped(run, course, [_percent(share) for share in course.overflow], looks[run.variant], "%{y:.3g} %")
        for run, course in looked
    ]
    marks = [_promotions(run, looks[run.variant]) for run in runs if run.facts.promotions]
    traces = [*lines, *marks]
    if not traces:
        return None
    given = {run.facts.promote_threshold for run, _ in looked}
    thresholds = sorted(100 * share for share in given if share is not None)
    highest = max([*thresholds, *(share for trace in traces for share in trace["y"])])
    return {
        "data": traces,
        "layout": layout(
            xaxis=_steps_axis(traces),
            yaxis=axis("share of a tensor that overflowed (%)", range=[0, _HEADROOM * highest or 1]),
            shapes=[_threshold(share) for share in thresholds],
        ),
    }


def _with_course(runs: Sequence[TrainedRun]) -> list[tuple[TrainedRun, Course]]:
    return [(run, run.facts.course) for run in runs if run.facts.course and run.facts.course.step]


def _promotions(run: TrainedRun, look: Mapping[str, Any]) -> dict[str, Any]:
    past = run.facts.promotions
    return {
        "x": [each.step for each in past],
        "y": [100 * each.overflow_ratio for each in past],
        "mode": "markers",
        "name": plain(run.name),
        "marker": {"size": 10, "color": look["color"], "symbol": look["symbol"], "line": {"width": 0.5, "color": INK}},
        "text": [f"{plain(short(each.key))}<br>{plain(f'{each.from_format} → {each.to_format}')}" for each in past],
        "cliponaxis": False,
        "hovertemplate": f"{plain(short(run.name))}, step %{{x:d}}<br>%{{text}}<br>%{{y:.3g}} %<extra></extra>",
    }


def _threshold(share: float) -> dict[str, Any]:
    line = {"color": INK, "width": 1.5, "dash": "dash"}
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": share, "y1": share, "line": line}


def _by_step(
    runs: Sequence[tuple[TrainedRun, Course]],
    looks: _Looks,
    rows: Mapping[str, Callable[[Course], Sequence[float | None]]],
    *,
    whole: bool = False,
) -> Figure | None:
    """Return charts over the same steps, one per row; None without runs.

    ``whole`` means that the numbers are whole, and hold until the next step.
    """
    traces = {
        title: [
            _stepped(run, course, values(course), looks[run.variant], f"{title} %{{y:.4g}}", lasts=whole)
            for run, course in runs
        ]
        for title, values in rows.items()
    }
    across = _steps_axis([trace for found in traces.values() for trace in found])
    return _above_each_other(traces, across, whole=whole) if runs else None


def _stepped(
    run: TrainedRun,
    course: Course,
    values: Sequence[float | None],
    look: Mapping[str, Any],
    label: str,
    *,
    lasts: bool = False,
) -> dict[str, Any]:
    """Return a thin curve through the points that have a value; with ``lasts`` each value holds until the next one.

    The line is solid, because dashes would hide single high points; sparse markers distinguish the curves.
    """
    seen = [place for place, value in enumerate(values) if value is not None]
    merged = max(course.steps) > 1
    where = "%{customdata} steps to %{x:d}" if merged else "step %{x:d}"
    return {
        "x": [course.step[place] for place in seen],
        "y": [values[place] for place in seen],
        **({"customdata": [course.steps[place] for place in seen]} if merged else {}),
        "name": plain(run.name),
        "mode": "lines+markers",
        "line": {"color": look["color"], "width": 1.2, "shape": "hv" if lasts else "linear"},
        "marker": {"size": 6, "symbol": look["symbol"], "maxdisplayed": _MOST_MARKERS},
        "cliponaxis": False,
        "hovertemplate": f"{plain(short(run.name))}<br>{where}: {label}<extra></extra>",
    }


def _steps_axis(traces: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    last = max((step for trace in traces for step in trace["x"]), default=1)
    ticks = {"dtick": 1} if last < 10 else {"nticks": 8}
    return axis("training step", range=[0, 1.01 * last], showgrid=False, **ticks)


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _log2(scale: float | None) -> float | None:
    return math.log2(scale) if scale else None


# ---- by epoch


def curves_figure(runs: Sequence[TrainedRun]) -> Figure | None:
    """Return a figure of training loss and metrics after every epoch; None if no epoch was finished.

    At most four metrics are drawn.
    """
    metrics = dict.fromkeys(name for run in runs for epoch in run.facts.epochs for name in epoch.metrics)
    rows: dict[str, Callable[[Epoch], float | None]] = {"mean training loss": lambda epoch: epoch.loss}
    for name in [*metrics][:_MOST_METRICS]:
        rows[name] = functools.partial(_metric, name)
    return _by_epoch(runs, looks_of(runs), rows)


def epoch_scale_figure(runs: Sequence[TrainedRun]) -> Figure | None:
    """Return a figure of the loss scale at the end of each epoch and of steps skipped in it, for runs without a curve.

    None if no such run has a loss scale.
    """
    rows: dict[str, Callable[[Epoch], float | None]] = {
        _SCALE: lambda epoch: _log2(epoch.loss_scale),
        "steps skipped in the epoch": lambda epoch: epoch.skipped_steps,
    }
    bare = [run for run in runs if not run.facts.course and any(epoch.loss_scale for epoch in run.facts.epochs)]
    return _by_epoch(bare, looks_of(runs), rows, whole=True)


def _metric(name: str, epoch: Epoch) -> float | None:
    return epoch.metrics.get(name)


def _by_epoch(
    runs: Sequence[TrainedRun],
    looks: _Looks,
    rows: Mapping[str, Callable[[Epoch], float | None]],
    *,
    whole: bool = False,
) -> Figure | None:
    """Return charts over the same epochs, one per row; None without epochs. ``whole``: the numbers are whole."""
    drawn = [run for run in runs if run.facts.epochs]
    if not drawn:
        return None
    traces = {title: [_curve(run, value, looks[run.variant], title) for run in drawn] for title, value in rows.items()}
    last = max(len(run.facts.epochs) for run in drawn)
    step = max(1, math.ceil(last / 10))
    across = axis("epoch", range=[0.8, last + 0.2], dtick=step, tick0=step, showgrid=False)
    return _above_each_other(traces, across, whole=whole)


def _curve(
    run: TrainedRun, value: Callable[[Epoch], float | None], look: Mapping[str, Any], title: str
) -> dict[str, Any]:
    return {
        "x": list(range(1, len(run.facts.epochs) + 1)),
        "y": [value(epoch) for epoch in run.facts.epochs],
        "name": plain(run.name),
        "mode": "lines+markers",
        "line": {"color": look["color"], "dash": look["dash"], "width": 2},
        "marker": {"size": 7, "symbol": look["symbol"], "line": {"width": 0.5, "color": INK}},
        "cliponaxis": False,
        "hovertemplate": f"{plain(short(run.name))}<br>epoch %{{x}}: {plain(title)} %{{y:.4g}}<extra></extra>",
    }


# ---- what both share


def _above_each_other(
    rows: Mapping[str, Sequence[Mapping[str, Any]]], across: Mapping[str, Any], *, whole: bool
) -> Figure:
    """Return a figure with one chart per row, under its title. ``whole``: the numbers are whole."""
    data, axes, headings = [], {}, []
    for number, (title, traces) in enumerate(rows.items()):
        suffix = "" if number == 0 else str(number + 1)
        top = 1 - number / len(rows)
        bottom = top - 0.78 / len(rows) if len(rows) > 1 else 0
        height = {"domain": [bottom, top - 0.04 / len(rows)], "anchor": "x", "nticks": 6}
        height |= _whole([y for trace in traces for y in trace["y"]]) if whole else {}
        axes[f"yaxis{suffix}"] = axis("", **height)
        headings.append(titled(f"<b>{plain(title)}</b>", top - 0.04 / len(rows)))
        data += [{**trace, "yaxis": f"y{suffix}"} for trace in traces]
    below = f"y{len(rows)}" if len(rows) > 1 else "y"
    return {"data": data, "layout": layout(xaxis={**across, "anchor": below}, annotations=headings, **axes)}


def _whole(values: Sequence[float | None]) -> dict[str, Any]:
    """Return axis options for up to about five ticks at a distance of 1, 2, 5, 10, 20 and so on.

    No tick is below zero if no number is.
    """
    known = [value for value in values if value is not None] or [0.0]
    spacings = (digit * 10**power for power in itertools.count() for digit in (1, 2, 5))
    ticks = next(step for step in spacings if 5 * step >= max(known) - min(known))
    return {"tickformat": "d", "dtick": ticks, "rangemode": "nonnegative" if min(known) >= 0 else "normal"}
