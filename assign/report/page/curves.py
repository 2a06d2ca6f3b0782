"""Charts of trainings as plain data: loss and metrics by epoch, promotions by step, loss scale and skipped steps."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from assign.report.page.colours import DASHES, INK, LINES, SYMBOLS
from assign.report.page.figures import Figure, axis, layout, plain, short, titled
from assign.report.page.runs import Epoch, TrainedRun

_MOST_METRICS = 4


def looks_of(runs: Sequence[TrainedRun]) -> dict[str, dict[str, Any]]:
    """Variant → colour, stroke and marker; its seeds share them."""
    variants = dict.fromkeys(run.variant for run in runs)
    return {
        name: {
            "color": LINES[number % len(LINES)],
            "dash": DASHES[number % len(DASHES)],
            "symbol": SYMBOLS[number % len(SYMBOLS)],
        }
        for number, name in enumerate(variants)
    }


def curves_figure(runs: Sequence[TrainedRun]) -> Figure | None:
    """Training loss, and each metric, after every epoch; None where no epoch was finished.

    Of more than four metrics the first four are drawn.
    """
    metrics = dict.fromkeys(name for run in runs for epoch in run.facts.epochs for name in epoch.metrics)
    rows: dict[str, Callable[[Epoch], float | None]] = {"mean training loss": lambda epoch: epoch.loss}
    for name in [*metrics][:_MOST_METRICS]:
        rows[name] = functools.partial(_metric, name)
    return _by_epoch(runs, rows, looks_of(runs))


def scale_figure(runs: Sequence[TrainedRun]) -> Figure | None:
    """Loss scale at the end of each epoch, as a power of two, and steps skipped in it; None where no run has one."""
    scaled = [run for run in runs if any(epoch.loss_scale for epoch in run.facts.epochs)]
    skipped = max((epoch.skipped_steps for run in scaled for epoch in run.facts.epochs), default=0)
    powers = [math.log2(epoch.loss_scale) for run in scaled for epoch in run.facts.epochs if epoch.loss_scale]
    scale = {"tickformat": "d", "dtick": _whole_steps(max(powers, default=0) - min(powers, default=0))}
    count = {"rangemode": "nonnegative", "dtick": _whole_steps(skipped)}
    rows: dict[str, Callable[[Epoch], float | None]] = {
        "loss scale (log2)": lambda epoch: math.log2(epoch.loss_scale) if epoch.loss_scale else None,
        "steps skipped in the epoch": lambda epoch: epoch.skipped_steps,
    }
    return _by_epoch(scaled, rows, looks_of(runs), [scale, count])


def _whole_steps(reach: float) -> int:
    """Between two ticks of an axis of whole numbers: about five of them over its reach."""
    return max(1, math.ceil(reach / 5))


def _metric(name: str, epoch: Epoch) -> float | None:
    return epoch.metrics.get(name)


def promotions_figure(runs: Sequence[TrainedRun]) -> Figure | None:
    """When each tensor was promoted, and how much of it had overflowed; None where nothing was."""
    looks = looks_of(runs)
    data = [
        {
            "x": [each.step for each in run.facts.promotions],
            "y": [100 * each.overflow_ratio for each in run.facts.promotions],
            "mode": "markers",
            "name": plain(run.name),
            "marker": {"size": 10, "color": looks[run.variant]["color"], "symbol": looks[run.variant]["symbol"]},
            "text": [
                f"{plain(short(each.key))}<br>{each.from_format} → {each.to_format}" for each in run.facts.promotions
            ],
            "hovertemplate": f"{plain(short(run.name))}, step %{{x}}<br>%{{text}}<br>%{{y:.3g}} %<extra></extra>",
        }
        for run in runs
        if run.facts.promotions
    ]
    if not data:
        return None
    return {
        "data": data,
        "layout": layout(
            xaxis=axis("training step", rangemode="tozero"),
            yaxis=axis("share that overflowed (%)", rangemode="tozero"),
        ),
    }


def _by_epoch(
    runs: Sequence[TrainedRun],
    rows: Mapping[str, Callable[[Epoch], float | None]],
    looks: Mapping[str, Mapping[str, Any]],
    heights: Sequence[Mapping[str, Any]] = (),
) -> Figure | None:
    """One chart for each row, above each other, over the same epochs; ``heights``: options of their axes, if any."""
    if not any(run.facts.epochs for run in runs):
        return None
    data, axes, headings = [], {}, []
    for number, (title, value) in enumerate(rows.items()):
        suffix = "" if number == 0 else str(number + 1)
        top = 1 - number / len(rows)
        place = [top - 0.78 / len(rows), top - 0.04 / len(rows)]
        axes[f"yaxis{suffix}"] = axis("", domain=place, anchor="x", nticks=6, **(heights[number] if heights else {}))
        headings.append(titled(f"<b>{plain(title)}</b>", top - 0.04 / len(rows)))
        data += [_curve(run, value, f"y{suffix}", looks[run.variant], title) for run in runs if run.facts.epochs]
    last = max(len(run.facts.epochs) for run in runs)
    below = f"y{len(rows)}" if len(rows) > 1 else "y"
    step = max(1, math.ceil(last / 10))
    across = axis("epoch", anchor=below, range=[0.8, last + 0.2], dtick=step, tick0=step, showgrid=False)
    return {"data": data, "layout": layout(xaxis=across, annotations=headings, **axes)}


def _curve(
    run: TrainedRun, value: Callable[[Epoch], float | None], axis_name: str, look: Mapping[str, Any], title: str
) -> dict[str, Any]:
    return {
        "x": list(range(1, len(run.facts.epochs) + 1)),
        "y": [value(epoch) for epoch in run.facts.epochs],
        "yaxis": axis_name,
        "name": plain(run.name),
        "mode": "lines+markers",
        "line": {"color": look["color"], "dash": look["dash"], "width": 2},
        "marker": {"size": 7, "symbol": look["symbol"], "line": {"width": 0.5, "color": INK}},
        "cliponaxis": False,
        "hovertemplate": f"{plain(short(run.name))}<br>epoch %{{x}}: {plain(title)} %{{y:.4g}}<extra></extra>",
    }
