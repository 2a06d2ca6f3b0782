"""Assemble the page from its template and write it."""

import base64
import gzip
import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assign.errors import ReportError
from assign.json_file import Kind
from assign.memory.estimate import Estimate, estimate
from assign.memory.profile import Moments, moments, moments_of
from assign.notebook import human_bytes
from assign.pareto import Front
from assign.plan.noise_table import NoiseTable
from assign.plan.plan import Assignment
from assign.plan.table import TensorTable, check_same_model
from assign.report.page import colours, curves, figures
from assign.report.page.figures import Figure
from assign.report.page.points import LOW_RATIO, measure_of, point_of, points_of
from assign.report.page.runs import TrainedRun
from assign.report.rows import Row, formats_of, tensor_rows

_FILE = Kind(name="report", error=ReportError, advice="")
_CHART_PIXELS, _TALL_PIXELS, _ROW_PIXELS = 340, 520, 190


@dataclass(frozen=True, kw_only=True)
class Report:
    """Contents of a page.

    Attributes:
        name: of the plan, for readers: its file.
        table: of the plan's model, at the batch size of the page.
        runs: trainings to draw, from :func:`assign.report.page.runs.load_runs`.
        front: plans to compare this one with.
        noise: of the tensors.
        command: the command that made the page, ``''`` if there was none.
    """

    name: str
    plan: Assignment
    table: TensorTable
    runs: tuple[TrainedRun, ...] = ()
    front: Front | None = None
    noise: NoiseTable | None = None
    command: str = ""

    def check(self) -> None:
        """Check that everything belongs to one model.

        Raises:
            PlanError: plan, front or noise belong to another model than the table.
        """
        advice = "Give the task that the plan was made for, with the same options: --task."
        what = f"{self.name} is a plan for another model"
        check_same_model(self.plan.fingerprint, self.table.fingerprint, what=what, advice=advice)
        for plan in self.front.plans if self.front else ():
            advice = "Give the directory of a front for the plan's model."
            what = "the front has plans for another model"
            check_same_model(plan.fingerprint, self.table.fingerprint, what=what, advice=advice)
        if self.noise is not None:
            self.noise.check(self.table)


def check_libraries() -> None:
    """Check, before anything is loaded, that a page can be made.

    Raises:
        ReportError: a library is missing.
    """
    for name in _LIBRARIES:
        _library(name)


def write_report(path: Path, report: Report) -> None:
    """Write the page to ``path``, atomically.

    Raises:
        ReportError: the file cannot be written, or a library is missing (the extra ``report`` installs them).
        PlanError: plan, table and noise are of different models.
    """
    _FILE.write(path, render(report))


def render(report: Report) -> str:
    """Return the text of the page. Raises the same as :func:`write_report`."""
    jinja2, markup = _library("jinja2"), _library("markupsafe").Markup

    def breakable(key: str) -> Any:
        """Return a key that a browser may break after its dots and slashes."""
        return markup("<wbr>").join(re.split(r"(?<=[./])", key))

    plotly = gzip.compress(_library("plotly.offline").get_plotlyjs().encode(), mtime=0)  # reduces it to a third
    report.check()
    loader = jinja2.PackageLoader("assign.report.page", "")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"bytes": human_bytes, "breakable": breakable}
    own = {name: environment.loader.get_source(environment, name)[0] for name in ("style.css", "script.js")}
    page: str = environment.get_template("template.html").render(
        **context(report), own=own, plotly=base64.b64encode(plotly).decode()
    )
    return page


def context(report: Report) -> dict[str, Any]:
    """Return what the template gets: figures, rows and texts."""
    plan, table = report.plan, report.table
    costs = estimate(table, plan)
    before, after = moments(table, {}), moments_of(table, plan)
    rows = tensor_rows(table, plan, after, report.noise)
    looks = colours.of_formats(formats_of(rows))
    points, this = points_of(report.front.plans) if report.front else [], point_of(plan, report.name)
    measure = measure_of(points)
    drawn = {
        "memory": figures.memory_figure(before, after),
        "model": figures.model_figure(rows, lambda row: looks[row.format]),
        "front": figures.front_figure(points, this) if points else None,
        "course": curves.course_figure(report.runs),
        "curves": curves.curves_figure(report.runs),
        "overflow": curves.overflow_figure(report.runs),
        "scale": curves.scale_figure(report.runs),
        "scale_by_epoch": curves.epoch_scale_figure(report.runs),
    }
    return {
        "report": report,
        "costs": costs,
        "ratio": costs.peak_bytes / max(costs.baseline_peak_bytes, 1),
        "rows": rows,
        "most": {name: max((getattr(row, name) or 0 for row in rows), default=0) or 1 for name in _MEASURES},
        "looks": looks,
        "measure": None if measure == LOW_RATIO else measure,
        "starred": this is not None and measure in this.costs,
        "shares": _shares(rows),
        "roles": _roles(before, after),
        "run_looks": curves.looks_of(report.runs),
        "stride": max(
            (steps for run in report.runs if run.facts.course for steps in run.facts.course.steps), default=1
        ),
        "promotions": [(run, past) for run in report.runs for past in run.facts.promotions],
        "metrics": list(dict.fromkeys(name for run in report.runs for name in run.facts.metrics)),
        "figures": {name: figure for name, figure in drawn.items() if figure},
        "heights": {name: _height(name, figure) for name, figure in drawn.items() if figure},
        "alive": {"before": _alive(before), "after": _alive(after), "words": _words(after), "peak": after.peak},
        "unowned": _unowned(costs, rows),
    }


_LIBRARIES = ("jinja2", "markupsafe", "plotly.offline")
_MEASURES = ("bytes", "fp32_bytes", "peak_bytes", "noise")


def _library(name: str) -> Any:
    """Import a library and return it. Only making a page needs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ReportError(
            f"a report needs {name.partition('.')[0]}, which is not installed. "
            "Run: pip install 'precision-assign[report]'"
        ) from error


def _shares(rows: Sequence[Row]) -> dict[str, float]:
    """Return {format: share of all elements}, the widest format first."""
    total = sum(row.elements for row in rows) or 1
    return {name: sum(row.elements for row in rows if row.format == name) / total for name in formats_of(rows)}


def _roles(*found: Moments) -> dict[str, tuple[str, colours.Look]]:
    """Return the roles that any of the moments has, from the bottom of the chart to its top."""
    return {role: look for role, look in colours.ROLES.items() if any(role in each.by_role for each in found)}


def _height(name: str, figure: Figure) -> int:
    """Return the height in pixels; it is larger for several charts above each other."""
    if name in ("memory", "model"):
        return _TALL_PIXELS
    rows = sum(key.startswith("yaxis") for key in figure["layout"])
    return _CHART_PIXELS if rows == 1 else 70 + _ROW_PIXELS * rows


def _alive(found: Moments) -> dict[str, Any]:
    """Return the segments of tensors, for the list of tensors alive at a moment: start, end, bytes, key, role."""
    keys = {key: number for number, key in enumerate(dict.fromkeys(each.key for each in found.alive))}
    roles = [*colours.ROLES]
    rows = [[s.start, s.end, s.bytes, keys[s.key], roles.index(s.role)] for s in found.alive]
    return {"keys": [*keys], "roles": [title for title, _ in colours.ROLES.values()], "segments": rows}


def _words(found: Moments) -> list[str]:
    return [figures.words(found, number) for number in range(len(found.operators))]


def _unowned(costs: Estimate, rows: Sequence[Row]) -> int:
    """Return the bytes at the peak that belong to no row: the batch, integers, temporary memory of operators."""
    return costs.peak_bytes - sum(row.peak_bytes for row in rows)
