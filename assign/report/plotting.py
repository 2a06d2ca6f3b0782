"""Draw the charts of the page in a notebook."""

import importlib
from typing import Any

from assign.errors import ReportError
from assign.memory.estimate import Estimate
from assign.memory.profile import moments
from assign.notebook import plot
from assign.pareto import Front
from assign.plan.noise_table import NoiseTable
from assign.plan.plan import Assignment
from assign.plan.table import TensorTable
from assign.planner import search_table
from assign.report.page import figures
from assign.report.page.colours import BLUE, ROLES
from assign.report.page.figures import Figure
from assign.report.page.points import TRAINED, Point, points_of
from assign.report.rows import tensor_rows
from assign.training.tuning import Tuned

__all__ = ["plot"]

_GREYS = {
    "$ink": "#7f8790",
    "$grid": "rgba(128,128,128,0.3)",
    "$branch": "rgba(128,128,128,0.08)",
    "$paper": "rgba(0,0,0,0)",
}
"""Colours that replace the page's; they are readable on light and dark backgrounds."""

_MOST_BARS = 25


@plot.register
def _(thing: TensorTable, table: TensorTable | None = None) -> Any:
    plain = search_table(thing, strategy="as-loaded")
    rows = tensor_rows(thing, plain, moments(thing, plain.entries))
    return _figure(figures.model_figure(rows, lambda row: ROLES[row.alive_as][1]))


@plot.register
def _(thing: Assignment, table: TensorTable | None = None) -> Any:
    if table is None:
        raise ReportError("plot: a plan is drawn with the table of its model. Write assign.plot(plan, table).")
    thing.check_fits(table, where="plot")
    figure = _figure(figures.memory_figure(moments(table, {}), moments(table, thing.entries)), height=620)
    return figure.update_layout(showlegend=True, legend={"orientation": "h", "y": 1.08, "yanchor": "bottom"})


@plot.register
def _(thing: Estimate, table: TensorTable | None = None) -> Any:
    divisor, unit = figures.unit_of(thing.peak_bytes)
    line = {
        "y": [size / divisor for _, _, size in thing.timeline],
        "text": [figures.plain(figures.short(f"{name} ({phase})")) for name, phase, _ in thing.timeline],
        "hovertemplate": f"%{{text}}<br>%{{y:.2f}} {unit}<extra></extra>",
        "mode": "lines",
        "line": {"shape": "hv", "color": BLUE},
        "fill": "tozeroy",
    }
    axes = {"xaxis": figures.axis("operators of one step, in order"), "yaxis": figures.axis(f"bytes alive ({unit})")}
    return _figure({"data": [line], "layout": figures.layout(**axes)})


@plot.register
def _(thing: Front, table: TensorTable | None = None) -> Any:
    return _figure(figures.front_figure(points_of(thing.plans), None))


@plot.register
def _(thing: Tuned, table: TensorTable | None = None) -> Any:
    points = [
        Point(name=f"trial {each.trial}", peak_bytes=each.peak_bytes, costs={TRAINED + thing.metric: each.metric})
        for each in thing.front
    ]
    if not points:
        raise ReportError("plot: the search has trained no plan yet. Give it more trials.")
    return _figure(figures.front_figure(points, None))


@plot.register
def _(thing: NoiseTable, table: TensorTable | None = None) -> Any:
    found = sorted(((thing.noise(*cell), cell) for cell in thing.cells), key=lambda row: row[0])[-_MOST_BARS:]
    names = [figures.plain(figures.short(f"{cell.key}, {cell.format}")) for _, cell in found]
    bars = {
        "type": "bar",
        "orientation": "h",
        "y": names,
        "x": [noise for noise, _ in found],
        "marker": {"color": BLUE},
    }
    axes = {"xaxis": figures.axis("noise (relative squared error of the gradient)"), "yaxis": figures.axis("")}
    return _figure({"data": [bars], "layout": figures.layout(**axes)}, height=120 + 20 * len(found))


def _figure(figure: Figure, height: int = 400) -> Any:
    try:
        objects = importlib.import_module("plotly.graph_objects")
    except ImportError as error:
        raise ReportError(
            "plot needs plotly, which is not installed. Run: pip install 'precision-assign[report]'"
        ) from error
    return objects.Figure(_painted(figure)).update_layout(height=height)


def _painted(value: Any) -> Any:
    if isinstance(value, str):
        return _GREYS.get(value, value)
    if isinstance(value, dict):
        return {name: _painted(each) for name, each in value.items()}
    return [_painted(each) for each in value] if isinstance(value, list) else value
