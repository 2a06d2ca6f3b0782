"""Show data in notebooks: HTML tables, pandas data frames, charts.

Charts need plotly; :mod:`assign.report.plotting` draws them.
"""

import functools
import html
import importlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from assign.errors import ReportError

SHOWN = 12
"""Number of rows in a table before "and n more"."""

_CHARTS = "assign.report.plotting"
"""The module that registers the charts; imported with the first one."""

_LINE = "border-top:1px solid rgba(128,128,128,.3);padding:2px 10px;text-align:"
_BAR = "background:rgba(86,180,233,.6);height:.7em;border-radius:2px;width:"


@functools.singledispatch
def plot(thing: object, table: Any = None) -> Any:
    """Draw a table, a plan, an estimate, a front, a study or noise as a plotly figure.

    Args:
        thing: the object to draw.
        table: the ``TensorTable`` of the model. A plan needs it, to show the memory of a step without and with the
            plan.
    Returns:
        A ``plotly.graph_objects.Figure``.
    Raises:
        ReportError: there is no chart for this type, a plan has no table, or plotly is not installed.
    Examples:
        ```python
        figure = assign.plot(plan, table)
        figure.write_html("memory.html")
        ```
    """
    if _CHARTS not in sys.modules:
        importlib.import_module(_CHARTS)
        return plot(thing, table)
    kinds = "TensorTable, Assignment (with table=), Estimate, Front, Tuned, NoiseTable"
    raise ReportError(f"plot: there is no chart of a {type(thing).__name__}. Give one of: {kinds}.")


class Drawn:
    """Base class of objects that have a chart."""

    __slots__ = ()

    def plot(self, table: Any = None) -> Any:
        """Return a plotly figure of the object, see :func:`assign.plot`."""
        return plot(self, table)


def human_bytes(size: float) -> str:
    """Return a number of bytes as text, e.g. ``12.3 MiB``."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def table_html(title: str, columns: Sequence[str], rows: Iterable[tuple[Sequence[str], float]], total: int = 0) -> str:
    """Return an HTML table with a bar at the end of each row. Texts are escaped; all but the first are right-aligned.

    Args:
        title: the line above the table.
        columns: headings of the texts; the bars have none.
        rows: texts, and the length of the bar, 0 to 1.
        total: number of rows that exist, for "and n more".
    """
    body = [
        "<tr>" + "".join(map(_cell, texts, range(len(texts)))) + f"<td style='{_LINE}left;min-width:8em'>"
        f"<div style='{_BAR}{100 * min(max(share, 0.0), 1.0):.1f}%'></div></td></tr>"
        for texts, share in rows
    ]
    head = "".join(
        f"<th style='text-align:{_side(n)};padding:2px 10px'>{html.escape(c)}</th>" for n, c in enumerate(columns)
    )
    more = f"<div>and {total - len(body)} more</div>" if total > len(body) else ""
    return (
        f"<div><b>{html.escape(title)}</b><table style='border-collapse:collapse'>"
        f"<thead><tr>{head}<th></th></tr></thead><tbody>{''.join(body)}</tbody></table>{more}</div>"
    )


def frame(rows: Iterable[Mapping[str, Any]], columns: Sequence[str] | None = None) -> Any:
    """Return a ``pandas.DataFrame`` of these rows.

    Raises:
        ReportError: pandas is not installed.
    """
    try:
        pandas = importlib.import_module("pandas")
    except ImportError as error:
        raise ReportError(
            "to_pandas needs pandas, which is not installed. Run: pip install 'precision-assign[report]'"
        ) from error
    return pandas.DataFrame(list(rows), columns=columns)


def _cell(text: str, number: int) -> str:
    return f"<td style='{_LINE}{_side(number)}'>{html.escape(text)}</td>"


def _side(number: int) -> str:
    return "right" if number else "left"
