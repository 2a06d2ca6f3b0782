"""What a notebook sees: tables in HTML, pandas frames, plotly figures."""

import dataclasses
import html.parser
import sys

import pandas
import plotly.graph_objects
import pytest
import torch
from helpers import adamw, traced
from torch import nn

import assign
from assign.errors import PlanError, ReportError
from assign.memory.estimate import estimate
from assign.notebook import human_bytes, table_html
from assign.pareto import search_front
from assign.plan.noise_table import Cell, Method, NoiseTable, Sample
from assign.plan.plan import Provenance
from assign.planner import search_table
from assign.training.tuning import Candidate, Tuned


@pytest.fixture(scope="module")
def table():
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))
    return traced(model, (torch.randn(64, 16), torch.randint(0, 4, (64,))), optimizer=adamw)


@pytest.fixture(scope="module")
def plan(table):
    return search_table(table, low_ratio=0.5)


@pytest.fixture(scope="module")
def things(table, plan):
    """One of each kind that a notebook shows."""
    cells = {
        Cell("0/linear", "bf16"): (Sample(0.25, 0.9, 1e-3), Sample(0.75, 0.7, 3e-3)),
        Cell("0.weight", "bf16"): (Sample(2.0, 0.5, 0.0),),
    }
    costs = plan.provenance.estimate
    candidate = Candidate(plan=plan, metric=0.75, peak_bytes=costs["peak_bytes"], trial=3, costs=costs)
    return {
        "table": table,
        "plan": plan,
        "estimate": estimate(table, plan),
        "noise": NoiseTable(fingerprint=table.fingerprint, method=Method.MEASURED, cells=cells),
        "front": search_front(table, 4),
        "tuned": Tuned(metric="accuracy", front=(candidate,), trained=5, pruned=2),
    }


class Reader(html.parser.HTMLParser):
    """Every tag closes the one that was opened last; texts cell by cell, widths of bars."""

    def __init__(self, text):
        super().__init__()
        self.open, self.rows, self.widths = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        style = dict(attrs).get("style", "")
        if "width:" in style and tag == "div":
            self.widths.append(float(style.rpartition("width:")[2].removesuffix("%")))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)


def read(thing):
    return Reader(thing._repr_html_())


def test_the_largest_come_first_and_bars_are_their_shares(things):
    found = read(things["table"])
    assert found.rows[0] == ["tensor", "role", "shape", "elements"]
    assert found.rows[1] == ["2/linear", "activation", "64×64", "4,096"]
    assert found.widths[0] == 100
    assert found.widths == sorted(found.widths, reverse=True)
    assert "more" in things["table"]._repr_html_()


def test_a_plan_shows_its_formats_and_its_peak(things):
    plan, found = things["plan"], read(things["plan"])
    assert sum(int(row[1]) for row in found.rows[1:]) == len(plan.entries)
    assert human_bytes(plan.provenance.estimate["peak_bytes"]) in plan._repr_html_()
    bare = dataclasses.replace(plan, provenance=Provenance())
    assert "predicted peak" not in bare._repr_html_()


def test_an_estimate_shows_what_is_alive_at_its_peak(things):
    costs, found = things["estimate"], read(things["estimate"])
    assert dict(found.rows[1:]) == {role.replace("_", " "): human_bytes(size) for role, size in costs.by_role.items()}
    assert costs.peak_at in costs._repr_html_()


def test_noise_and_fronts_show_their_rows(things):
    assert read(things["noise"]).rows[1:] == [["0.weight", "bf16", "2"], ["0/linear", "bf16", "0.5"]]
    assert len(read(things["front"]).rows) == 1 + len(things["front"].plans)
    bare = assign.Front((dataclasses.replace(things["plan"], provenance=Provenance()),))
    assert read(bare).rows[1:] == [["1", "0 B"]]
    (row,) = read(things["tuned"]).rows[1:]
    assert row == ["3", "0.75", human_bytes(things["plan"].provenance.estimate["peak_bytes"])]


def test_names_are_shown_not_run():
    text = table_html("<b>&", ["<script>"], [(["<img src=x>"], 0.5)])
    assert "&lt;b&gt;&amp;" in text
    assert "<script" not in text
    assert "<img" not in text
    assert Reader(text).rows == [["<script>"], ["<img src=x>"]]


def test_frames_have_every_row(things):
    frames = {name: thing.to_pandas() for name, thing in things.items()}
    assert all(isinstance(found, pandas.DataFrame) for found in frames.values())
    assert list(frames["table"]["key"]) == [info.key for info in things["table"].tensors]
    assert set(frames["table"]["role"]) >= {"weight", "activation"}
    assert dict(zip(frames["plan"]["key"], frames["plan"]["format"], strict=True)) == {
        key: entry.format for key, entry in things["plan"].entries.items()
    }
    assert list(frames["estimate"].itertuples(index=False, name=None)) == list(things["estimate"].timeline)
    noise = frames["noise"].set_index("key")
    assert noise.loc["0/linear", "noise"] == 0.5
    assert noise.loc["0/linear", "cosine"] == pytest.approx(0.8)
    assert list(frames["front"]["peak_bytes"]) == [p.provenance.estimate["peak_bytes"] for p in things["front"].plans]
    assert frames["tuned"].loc[0, ["trial", "accuracy"]].tolist() == [3, 0.75]


def test_an_empty_frame_has_its_columns(table):
    empty = NoiseTable(fingerprint=table.fingerprint, method=Method.MEASURED)
    assert list(empty.to_pandas().columns) == ["key", "format", "noise", "standard_error", "cosine", "loss"]
    assert read(empty).rows == [["tensor", "format", "noise"]]


def test_every_kind_is_drawn_in_greys_of_both_schemes(things, table):
    for name, thing in things.items():
        figure = assign.plot(thing, table) if name == "plan" else assign.plot(thing)
        assert figure == (thing.plot(table) if name == "plan" else thing.plot())
        assert isinstance(figure, plotly.graph_objects.Figure)
        assert len(figure.data) >= 1
        assert '"$' not in figure.to_json()
    legend = [trace.legendgroup for trace in assign.plot(things["plan"], table).data if trace.showlegend is not False]
    assert set(things["estimate"].by_role) <= set(legend)
    assert len(set(legend)) == len(legend)
    tree = assign.plot(table).data[0]
    assert len({colour for colour in tree.marker.colors if colour.startswith("#")}) > 4  # one for each role
    timeline = assign.plot(things["estimate"])
    unit = {"KiB": 1024, "MiB": 2**20}[timeline.layout.yaxis.title.text.partition("(")[2].rstrip(")")]
    assert max(timeline.data[0].y) * unit == max(size for _, _, size in things["estimate"].timeline)
    assert assign.plot(things["tuned"]).data[0].y == (0.75,)
    assert assign.plot(things["noise"]).data[0].x == (0.5, 2.0)


def test_what_cannot_be_drawn_is_refused(things, table):
    with pytest.raises(ReportError, match="no chart of a str"):
        assign.plot("plan.json")
    with pytest.raises(ReportError, match=r"assign\.plot\(plan, table\)"):
        assign.plot(things["plan"])
    other = search_table(
        traced(nn.Sequential(nn.Linear(16, 4)), (torch.randn(8, 16), torch.randint(0, 4, (8,)))), low_ratio=0.5
    )
    with pytest.raises(PlanError, match="plot does not fit this model"):
        assign.plot(other, table)
    with pytest.raises(ReportError, match="has trained no plan yet"):
        assign.plot(dataclasses.replace(things["tuned"], front=()))


def test_without_the_libraries_it_says_what_to_install(things, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(ReportError, match=r"needs pandas.*precision-assign\[report\]"):
        things["plan"].to_pandas()
    with pytest.raises(ReportError, match=r"needs plotly.*precision-assign\[report\]"):
        assign.plot(things["table"])
