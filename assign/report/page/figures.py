"""Data of plan charts for plotly: memory over the step, the model, the front.

Colours that start with ``$`` are those of the page; ``script.js`` replaces them for light or dark mode.
"""

import html
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

from assign.memory.profile import OPTIMIZER, Moments
from assign.notebook import human_bytes
from assign.report.page.colours import BLUE, BRANCH, GREY, GRID, INK, ROLES, VERMILLION, Look
from assign.report.page.points import LOW_RATIO, TRAINED, Point, best_of, measure_of
from assign.report.rows import Row
from assign.report.terminal import visible

Figure = dict[str, Any]
"""A plotly figure as plain data: ``data`` has the traces, ``layout`` the layout."""

_LONGEST = 40
_HEADROOM = 1.22
_OPTIMIZER_SHARE = 0.04
_UNITS = ("B", "KiB", "MiB", "GiB")


def short(text: str, longest: int = _LONGEST) -> str:
    """Return the text, without its middle if it is long."""
    keep = (longest - 1) // 2
    return text if len(text) <= longest else f"{text[:keep]}…{text[-keep:]}"


def plain(text: str) -> str:
    """Return text that plotly shows literally: plotly interprets tags in labels, and ``%{…}`` in templates."""
    return html.escape(visible(text), quote=False).replace("%{", "%&#123;")


def unit_of(largest: float) -> tuple[float, str]:
    """Return the divisor for bytes and the unit of the result."""
    power = min(int(math.log(largest, 1024)), len(_UNITS) - 1) if largest >= 1 else 0
    return 1024.0**power, _UNITS[power]


def axis(title: str, **more: Any) -> dict[str, Any]:
    """Return an axis in the common style."""
    look = {"gridcolor": GRID, "zerolinecolor": GRID, "automargin": True, "fixedrange": True}
    return {"title": {"text": title}, **look, **more}


def layout(**more: Any) -> dict[str, Any]:
    """Return the layout that all charts share."""
    return {
        "margin": {"l": 8, "r": 24, "t": 28, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": INK, "size": 12},
        "showlegend": False,
        "dragmode": False,
        "hoverlabel": {"align": "left", "namelength": -1},
        **more,
    }


def titled(text: str, y: float) -> dict[str, Any]:
    """Return a heading for one of several charts in a figure, at a height from 0 to 1."""
    place = {"x": 0, "y": y, "xref": "paper", "yref": "paper", "xanchor": "left", "yanchor": "bottom"}
    return {"text": text, "showarrow": False, **place}


# ---- memory over the step ------------------------------------------------------------------------------------------


def memory_figure(before: Moments, after: Moments) -> Figure:
    """Return a figure of bytes over the step, stacked by role: in fp32 above, under the plan below, on one scale.

    Both have a point for every moment, and one more at the end of the last.
    """
    most = max(int(before.total.max()), int(after.total.max()))
    divisor, unit = unit_of(most)
    edges = _edges(len(after.operators))
    data = [
        *_stack(before, edges, divisor, "y2", f"{unit}, all in fp32"),
        *_stack(after, edges, divisor, "y", f"{unit}, under the plan", named=before.by_role),
    ]
    height = {"range": [0, _HEADROOM * most / divisor], "rangemode": "tozero"}
    return {
        "data": data,
        "layout": layout(
            xaxis=axis(
                "operators of one step, in the order in which they run",
                anchor="y",
                range=[0, edges[-1]],
                showspikes=True,
                spikemode="across",
                spikethickness=1,
                spikecolor=INK,
                spikedash="dot",
                showgrid=False,
                **_phases(after, edges),
            ),
            yaxis=axis(f"bytes alive ({unit})", domain=[0, 0.45], **height),
            yaxis2=axis(f"bytes alive ({unit})", domain=[0.55, 1], anchor="x", **height),
            annotations=[titled("<b>before: all in fp32</b>", 1), titled("<b>after: under the plan</b>", 0.45)],
            shapes=_borders(after, edges),
            hovermode="x",
            hoversubplots="axis",
        ),
    }


def _edges(count: int) -> list[float]:
    """Return where each moment starts, and where the last ends; the optimizer's step is wide enough to be visible."""
    return [*map(float, range(count)), count - 1 + max(1.0, round(_OPTIMIZER_SHARE * count, 1))]


def _stack(
    moments: Moments,
    edges: Sequence[float],
    divisor: float,
    axis_name: str,
    name: str,
    named: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Return the areas, their sum and its peak. The legend shows roles that are not in ``named``."""
    where = {"x": list(edges), "yaxis": axis_name, "mode": "lines", "line": {"shape": "hv", "width": 0}}
    traces: list[dict[str, Any]] = []
    for role in sorted(moments.by_role, key=[*ROLES].index):
        title, look = ROLES[role]
        fill: dict[str, Any] = {"fillcolor": look.colour}
        if look.pattern:
            fill |= {"fillpattern": {"shape": look.pattern, "fgcolor": look.colour, "bgcolor": BRANCH, "size": 5}}
        height = _heights(moments.by_role[role], divisor)
        traces.append(where | {"y": height, "name": title, "stackgroup": axis_name, "hoverinfo": "skip", **fill})
        traces[-1] |= {"legendgroup": role, "showlegend": role not in named}
    labels = [f"{plain(short(words(moments, number)))}<br>" for number in range(len(moments.operators))]
    traces.append(
        where
        | {
            "y": _heights(moments.total, divisor),
            "name": name,
            "showlegend": False,
            "line": {"shape": "hv", "width": 0.7, "color": INK},
            "text": [*labels, labels[-1]] if axis_name == "y" else [""] * (len(labels) + 1),
            "hovertemplate": f"%{{text}}%{{y:.2f}} {name}<extra></extra>",
        }
    )
    return [*traces, _peak(moments, edges, divisor, axis_name)]


def _peak(moments: Moments, edges: Sequence[float], divisor: float, axis_name: str) -> dict[str, Any]:
    x, size = edges[moments.peak], int(moments.total[moments.peak])
    side = "right" if x < edges[-1] / 4 else "left" if x > edges[-1] * 3 / 4 else "center"
    return {
        "x": [x],
        "y": [round(size / divisor, 4)],
        "yaxis": axis_name,
        "name": "peak",
        "showlegend": False,
        "mode": "markers+text",
        "marker": {"symbol": "diamond", "size": 9, "color": INK},
        "text": [f"peak {human_bytes(size)}"],
        "textposition": f"top {side}",
        "hoverinfo": "skip",
        "cliponaxis": False,
    }


def _heights(sizes: Any, divisor: float) -> list[float]:
    found = [round(float(size) / divisor, 4) for size in sizes]
    return [*found, found[-1]]


def words(moments: Moments, number: int) -> str:
    """Return the name of an operator with its pass, as text."""
    name = moments.operators[number] or "sum of gradients"
    if moments.passes[number] == OPTIMIZER:
        return "optimizer"
    return f"{name} ({'rounding, ' if moments.rounds[number] else ''}{moments.passes[number]})"


def _phases(moments: Moments, edges: Sequence[float]) -> dict[str, Any]:
    """Return axis options for ticks that name the passes, each in its middle."""
    middles = {}
    for name in dict.fromkeys(moments.passes):
        where = [number for number, other in enumerate(moments.passes) if other == name]
        middles["optimizer" if name == OPTIMIZER else name] = (edges[where[0]] + edges[where[-1] + 1]) / 2
    return {"tickvals": [*middles.values()], "ticktext": [*middles], "tickangle": 0, "ticks": ""}


def _borders(moments: Moments, edges: Sequence[float]) -> list[dict[str, Any]]:
    """Return lines between the passes."""
    starts = [n for n in range(1, len(moments.passes)) if moments.passes[n] != moments.passes[n - 1]]
    line = {"color": INK, "width": 1, "dash": "dot"}
    return [
        {"type": "line", "x0": edges[n], "x1": edges[n], "y0": 0, "y1": 1, "yref": "paper", "line": line}
        for n in starts
    ]


# ---- the model -----------------------------------------------------------------------------------------------------


def model_figure(rows: Sequence[Row], look_of: Callable[[Row], Look]) -> Figure:
    """Return a figure of every tensor as a rectangle in its module; its area shows its bytes."""
    modules = dict.fromkeys(part for row in rows for part in _with_parents(row.path))
    # ids are unique: a module's id ends with a slash, and no tensor's key does
    nodes: list[tuple[str, str, str, int, str, str, str, str]] = [("/", "", "model", 0, BRANCH, "", INK, "all tensors")]
    for path in modules:
        parent, _, name = path.rpartition(".")
        nodes.append((f"{path}/", f"{parent}/", name, 0, BRANCH, "", INK, plain(path)))
    for row in rows:
        look = look_of(row)
        whole = (row.key, f"{row.path}/", row.name, row.bytes, look.colour, look.pattern, look.text, _about(row))
        nodes.append(whole)
    ids, parents, labels, values, colours, patterns, inks, words = map(list, zip(*nodes, strict=True))
    pattern = (
        {"pattern": {"shape": patterns, "bgcolor": colours, "fgcolor": BRANCH, "size": 6}} if any(patterns) else {}
    )
    return {
        "data": [
            {
                "type": "treemap",
                "ids": ids,
                "parents": parents,
                "labels": [plain(str(label)) for label in labels],
                "values": values,
                "branchvalues": "remainder",
                "marker": {
                    "colors": colours,
                    "pad": {"t": 18, "l": 2, "r": 2, "b": 2},
                    "line": {"width": 1, "color": "$paper"},
                    **pattern,
                },
                "hovertext": words,
                "hovertemplate": "%{hovertext}<extra></extra>",
                "textinfo": "label",
                "textfont": {"color": inks},
                "tiling": {"pad": 1},
                "pathbar": {"visible": True, "thickness": 22},
            }
        ],
        "layout": layout(margin={"l": 0, "r": 0, "t": 26, "b": 0}, uniformtext={"minsize": 10, "mode": "hide"}),
    }


def _with_parents(path: str) -> list[str]:
    """Return ``a``, ``a.b``, ``a.b.c`` for ``a.b.c``."""
    parts = path.split(".") if path else []
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def _about(row: Row) -> str:
    return f"{plain(row.key)}<br>{row.role.replace('_', ' ')}, {row.format}, {human_bytes(row.bytes)}"


# ---- the front -----------------------------------------------------------------------------------------------------


def front_figure(points: Sequence[Point], this: Point | None) -> Figure:
    """Return a figure of peak against the measure of plans; a line joins the front, and this plan is a star.

    If the plan's file does not have the measure, a vertical line shows its peak.
    """
    measure = measure_of(points)
    divisor, unit = unit_of(max(point.peak_bytes for point in points))
    best = best_of(points, measure)
    beaten = [point for point in points if point not in best]
    hollow = {"size": 9, "color": GREY, "symbol": "circle-open"}
    line = {"color": BLUE, "width": 1.5}
    data = [
        _points(beaten, measure, divisor, mode="markers", marker=hollow),
        _points(best, measure, divisor, mode="lines+markers", marker={"size": 9, "color": BLUE}, line=line),
    ]
    shapes = []
    if this is not None and measure in this.costs:
        star = {"size": 17, "color": VERMILLION, "symbol": "star", "line": {"color": INK, "width": 1}}
        data.append(_points([this], measure, divisor, mode="markers", marker=star))
    elif this is not None:
        x = this.peak_bytes / divisor
        dashed = {"color": VERMILLION, "width": 2, "dash": "dash"}
        shapes.append({"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper", "line": dashed})
    return {
        "data": [trace for trace in data if trace["x"]],
        "layout": layout(
            xaxis=axis(f"predicted peak of one step ({unit})"),
            yaxis=axis(""),
            annotations=[titled(f"<b>{plain(words_of(measure))}</b>", 1)],
            shapes=shapes,
        ),
    }


def words_of(measure: str) -> str:
    """Return the name of a measure, with its unit."""
    known = {"noise": "noise (relative squared error of the gradient)", LOW_RATIO: "low ratio (share of the elements)"}
    return known.get(measure, f"{measure.removeprefix(TRAINED)} after a short training")


def _points(points: Sequence[Point], measure: str, divisor: float, **look: Any) -> dict[str, Any]:
    return {
        "x": [round(point.peak_bytes / divisor, 4) for point in points],
        "y": [point.costs.get(measure) for point in points],
        "text": [plain(short(point.name)) for point in points],
        "hovertemplate": "%{text}<br>%{x:.2f}, %{y:.4g}<extra></extra>",
        "cliponaxis": False,
        **look,
    }
