"""Pictures of a comparison: a metric against the low ratio, and test curves (Figures 4 and 5 of arXiv 2301.13464).

Colours are those of Okabe and Ito, which colour-blind readers can tell apart. Markers and strokes differ too, for
printing in grey.
"""

import importlib
import itertools
import math
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from assign.atomic_write import replacing
from assign.errors import ComparisonError
from assign.report.terminal import visible
from assign.training.comparison import Comparison, RunFacts, Spread, Summary, VariantRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".svg", ".png")

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # without yellow and black
_MARKERS = ("o", "s", "^", "D", "v", "P", "*")  # seven markers and six colours give 42 different pairs
_STROKES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (3, 1, 1, 1, 1, 1)))
_LONGEST_NAME = 26
_TITLE_WIDTH = 70
_DOTS_PER_INCH = 100  # 900×600


def check_picture(path: Path) -> None:
    """Check, before hours of training, that a picture can be drawn to ``path``.

    Raises:
        ComparisonError: its suffix is not in ``SUFFIXES``, its folder does not exist, or matplotlib is not installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ComparisonError(f"cannot draw {path}: its suffix must be one of {', '.join(SUFFIXES)}.")
    if not path.parent.is_dir():
        raise ComparisonError(f"cannot draw {path}: there is no directory {path.parent}. Make it first.")
    _matplotlib()


def save_picture(figure: "Figure", path: Path) -> None:
    """Write a figure as SVG (its text stays text) or PNG, by the suffix of ``path``.

    Raises:
        ComparisonError: as for :func:`check_picture`, or the file cannot be written.
    """
    check_picture(path)
    kind = path.suffix.lower().removeprefix(".")
    with _matplotlib().rc_context({"svg.fonttype": "none", "svg.hashsalt": "assign"}):
        try:
            with replacing(path) as file:
                figure.savefig(file, format=kind, metadata={"Date": None} if kind == "svg" else None)
        except OSError as error:
            raise ComparisonError(f"cannot draw {path}: {error.strerror or error}. Give another file.") from error


def picture_paths(json_file: Path, picture: Path | None) -> tuple[Path, Path]:
    """Return the paths of a comparison's two pictures: ``picture``, and ``…-curves`` in the same folder.

    The default of ``picture`` is the path of the JSON file with the suffix ``.svg``.

    Raises:
        ComparisonError: as for :func:`check_picture` if ``picture`` is given; or a picture would overwrite the JSON
            file.
    """
    first = picture or json_file.with_suffix(".svg")
    if picture:
        check_picture(picture)
    second = first.with_name(f"{first.stem}-curves{first.suffix}")
    if json_file.resolve() in (first.resolve(), second.resolve()):
        raise ComparisonError(f"{json_file} cannot hold both the results and a picture. Give --json another file.")
    return first, second


def draw(comparison: Comparison, paths: tuple[Path, Path], *, required: bool) -> tuple[str, ...]:
    """Draw both pictures; return messages for the user.

    Raises:
        ComparisonError: a picture cannot be drawn, and ``required`` is set.
    """
    try:
        for path, picture in zip(paths, (accuracy_picture, curves_picture), strict=True):
            save_picture(picture(comparison), path)
    except ComparisonError as error:
        if required:
            raise
        return (f"no picture: {error}",)
    return tuple(f"wrote {path}" for path in paths)


def accuracy_picture(comparison: Comparison, metric: str | None = None) -> "Figure":
    """Return a figure of a metric at the end of training against the low ratio: one point per variant.

    fp32 is a dashed line. Points are means over seeds; bars reach from the lowest to the highest. If promotion lowered
    the low ratio, the point is at its final value. Lines join plans of one strategy and recipe, with promotion and
    without it separately. Runs that diverged are shown in a separate strip at the bottom.

    Args:
        comparison: the trainings to show.
        metric: one of the task's. Default: ``comparison.metric``, or the training loss if the task has no metric.
    Raises:
        ComparisonError: matplotlib is not installed, or no run has the metric.
    """
    name = _metric(comparison, metric)
    found = list(zip(comparison.variants, comparison.summaries(), strict=True))
    planned = [(row, summary) for row, summary in found if row.plan is not None]
    figure = _figure()
    if any(summary.diverged for _, summary in planned):
        axes, strip = figure.subplots(2, 1, sharex=True, height_ratios=(10, 1))
        _draw_strip(strip, planned)
    else:
        axes = strip = figure.subplots()
    for row, summary in found:
        if row.plan is None:
            _draw_level(axes, summary, _values(summary, name))
    _join(axes, planned, name)
    for number, (_, summary) in enumerate(planned):
        _draw_point(axes, number, summary, name)
    strip.set_xlim(-0.03, 1.03)
    strip.set_xlabel("low ratio: share of the elements in their low format" + _promoted(planned))
    _finish(axes, comparison, name, "at the end of training", bars="bars")
    return figure


def curves_picture(comparison: Comparison, metric: str | None = None) -> "Figure":
    """Return a figure of a metric after every epoch: a line for a variant's mean over seeds, a band for the range.

    Runs that diverged are not part of these: each is a separate thin line that ends with a cross after its last whole
    epoch.

    Args:
        comparison: the trainings to show.
        metric: as for :func:`accuracy_picture`.
    Raises:
        ComparisonError: as for :func:`accuracy_picture`.
    """
    name = _metric(comparison, metric)
    figure = _figure()
    axes = figure.subplots()
    planned = itertools.count()
    for row in comparison.variants:
        number = None if row.plan is None else next(planned)
        _draw_curve(axes, row.name, number, [run.facts for run in comparison.of(row.name)], name)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(_matplotlib().ticker.MaxNLocator(integer=True))
    _finish(axes, comparison, name, "after each epoch", bars="bands")
    return figure


def _matplotlib() -> Any:
    """Import matplotlib and return it. Only drawing a picture needs it."""
    try:
        for part in ("matplotlib.figure", "matplotlib.text", "matplotlib.ticker"):
            importlib.import_module(part)
        return importlib.import_module("matplotlib")
    except ImportError as error:
        raise ComparisonError(
            "pictures are drawn with matplotlib, which is not installed. Run: pip install 'precision-assign[report]'"
        ) from error


def _figure() -> "Figure":
    figure: Figure = _matplotlib().figure.Figure(figsize=(9, 6), dpi=_DOTS_PER_INCH, layout="constrained")
    return figure


def _metric(comparison: Comparison, metric: str | None) -> str | None:
    """Return the name of the metric to draw; None is the training loss."""
    if not comparison.runs:
        raise ComparisonError("there is nothing to draw: no run of the comparison has finished. Train at least one.")
    known = dict.fromkeys(name for run in comparison.runs for name in run.facts.metrics)
    if metric is not None and metric not in known:
        raise ComparisonError(
            f"there is no metric {metric!r} to draw. The task {comparison.task!r} has: {', '.join(known) or 'none'}."
        )
    return metric or comparison.metric


def _values(summary: Summary, metric: str | None) -> Spread:
    return summary.loss if metric is None else summary.metrics.get(metric, Spread(values=()))


def _style(number: int) -> dict[str, Any]:
    return {"color": _COLOURS[number % len(_COLOURS)], "marker": _MARKERS[number % len(_MARKERS)]}


def _short(name: str) -> str:
    keep = (_LONGEST_NAME - 1) // 2
    return name if len(name) <= _LONGEST_NAME else f"{name[:keep]}…{name[-keep:]}"


def _label(name: str, runs: int, diverged: int) -> str:
    return _short(name) + (f"\n({diverged} of {runs} diverged)" if diverged else "")


def _reach(spread: Spread) -> list[list[float]]:
    """Return how far a bar reaches below and above the mean."""
    mean, low, high = spread.mean or 0.0, spread.lowest or 0.0, spread.highest or 0.0
    return [[max(0.0, mean - low)], [max(0.0, high - mean)]]


# ---- the metric against the low ratio -----------------------------------------------------------------------------


def _draw_level(axes: "Axes", summary: Summary, spread: Spread) -> None:
    line: dict[str, Any] = {"color": "black", "linestyle": "--", "linewidth": 1.2}
    axes.plot([], [], **line, label=_label(summary.variant, summary.runs, summary.diverged))
    if spread.mean is None or spread.lowest is None or spread.highest is None:
        return
    axes.axhline(spread.mean, **line, zorder=1)
    axes.axhspan(spread.lowest, spread.highest, color="black", alpha=0.08, linewidth=0, zorder=0)


def _draw_point(axes: "Axes", number: int, summary: Summary, metric: str | None) -> None:
    ratio, spread = summary.final_low_ratio, _values(summary, metric)
    label = _label(summary.variant, summary.runs, summary.diverged)
    if spread.mean is None or ratio.mean is None:  # all runs diverged: only in the legend
        axes.errorbar([], [], **_style(number), linestyle="none", fillstyle="none", label=label)
        return
    axes.errorbar(
        ratio.mean,
        spread.mean,
        xerr=_reach(ratio),
        yerr=_reach(spread),
        **_style(number),
        linestyle="none",
        markersize=8,
        markeredgecolor="black",
        markeredgewidth=0.6,
        elinewidth=1.4,
        capsize=4,
        label=label,
        zorder=3,
    )


def _draw_strip(strip: "Axes", planned: Sequence[tuple[VariantRow, Summary]]) -> None:
    """Draw runs that diverged as hollow markers below the axes, regardless of the metric's scale."""
    heights = itertools.cycle((0.0, 0.4, -0.4))  # so that two at one low ratio are both visible
    for number, (_, summary) in enumerate(planned):
        if summary.diverged and summary.final_low_ratio.mean is not None:
            strip.plot(
                summary.final_low_ratio.mean,
                next(heights),
                **_style(number),
                linestyle="none",
                fillstyle="none",
                markersize=9,
                markeredgewidth=1.6,
            )
    strip.set_yticks([0], ["diverged"])
    strip.set_ylim(-1, 1)
    strip.tick_params(axis="y", length=0)
    strip.grid(axis="x", alpha=0.3)
    strip.set_facecolor("#f4f4f4")


def _join(axes: "Axes", planned: Sequence[tuple[VariantRow, Summary]], metric: str | None) -> None:
    lines: dict[tuple[str, str, bool], list[tuple[float, float]]] = {}
    for row, summary in planned:
        x, y = summary.final_low_ratio.mean, _values(summary, metric).mean
        if x is not None and y is not None:
            lines.setdefault((row.strategy, row.recipe, row.promote_every > 0), []).append((x, y))
    for (strategy, recipe, promotes), points in lines.items():
        if len(points) > 1:
            kind = " ".join(filter(None, [strategy, recipe])) or "plans"
            axes.plot(
                *zip(*sorted(points), strict=True),
                color="0.45",
                linewidth=1,
                linestyle="-" if promotes else ":",
                label=f"{kind},\n{'with' if promotes else 'without'} promotion",
                zorder=2,
            )


def _promoted(planned: Sequence[tuple[VariantRow, Summary]]) -> str:
    return ", at the end of training" if any(any(summary.promotions.values) for _, summary in planned) else ""


# ---- curves -------------------------------------------------------------------------------------------------------


def _draw_curve(axes: "Axes", name: str, number: int | None, runs: Sequence[RunFacts], metric: str | None) -> None:
    style = {"color": "black", "marker": "."} if number is None else _style(number)
    stroke = "--" if number is None else _STROKES[number % len(_STROKES)]
    good = [_curve(facts, metric) for facts in runs if not facts.diverged]
    bad = [_curve(facts, metric) for facts in runs if facts.diverged]
    spreads = [[value for value in values if not math.isnan(value)] for values in zip(*good, strict=False)]
    at = [epoch for epoch, spread in enumerate(spreads, start=1) if spread]
    known = [spread for spread in spreads if spread]
    axes.plot(
        at,
        [statistics.fmean(spread) for spread in known],
        **style,
        linestyle=stroke,
        linewidth=1.6,
        markersize=6,
        markevery=(0 if number is None else number % 3, max(1, len(at) // 10)) if len(at) > 10 else None,
        label=_label(name, len(runs), len(bad)),
    )
    axes.fill_between(at, [*map(min, known)], [*map(max, known)], color=style["color"], alpha=0.15, linewidth=0)
    for values in bad:
        _draw_end(axes, values, style["color"], stroke)


def _draw_end(axes: "Axes", values: Sequence[float], colour: str, stroke: Any) -> None:
    """Draw a run that diverged: its curve as far as it goes, and a cross at its end."""
    known = [(epoch, value) for epoch, value in enumerate(values, start=1) if not math.isnan(value)]
    if known:
        axes.plot(*zip(*known, strict=True), color=colour, linestyle=stroke, linewidth=0.9)
        axes.plot(*known[-1], color=colour, marker="x", markersize=9, markeredgewidth=2)
    else:
        bottom = axes.get_xaxis_transform()  # a position on the axes, regardless of the metric's scale
        axes.plot(1, 0.02, color=colour, marker="x", markersize=9, markeredgewidth=2, transform=bottom, clip_on=False)


def _curve(facts: RunFacts, metric: str | None) -> list[float]:
    found = [epoch.loss if metric is None else epoch.metrics.get(metric) for epoch in facts.epochs]
    return [math.nan if value is None else value for value in found]


# ---- both ---------------------------------------------------------------------------------------------------------


def _finish(axes: "Axes", comparison: Comparison, metric: str | None, when: str, *, bars: str) -> None:
    """Add labels with units, a title that says what is drawn, and the legend next to the axes."""
    share = metric is not None and "accuracy" in metric and _within_one(comparison, metric)
    if share:
        axes.yaxis.set_major_formatter(_matplotlib().ticker.PercentFormatter(xmax=1.0))
    what = "mean training loss" if metric is None else metric.replace("_", " ")
    axes.set_ylabel(f"{what}{' (%)' if share else ''} {when}")
    seeds = len(comparison.seeds)
    spread = f"mean of {seeds} seeds; {bars}: lowest to highest" if seeds > 1 else "one seed"
    lines = [*textwrap.wrap(comparison.task, _TITLE_WIDTH), f"{comparison.epochs} epochs, {spread}"]
    axes.set_title("\n".join(lines), loc="left", fontsize=11)  # no wider than the axes: the legend is next to them
    axes.grid(alpha=0.3)
    figure: Any = axes.figure
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=9, frameon=False, ncols=1 + len(labels) // 25)
    for text in figure.findobj(_matplotlib().text.Text):  # names come from files, and "$" would start a formula
        text.set_parse_math(False)
        text.set_text(visible(text.get_text()))


def _within_one(comparison: Comparison, metric: str) -> bool:
    values = [run.facts.metrics.get(metric) for run in comparison.runs]
    return all(0 <= value <= 1 for value in values if value is not None)
