"""The page about a plan: its numbers are the memory model's, nothing is left out, and a real browser shows it."""

import dataclasses
import json
import re
import sys

import numpy as np
import pytest
import torch
from comparisons import by_hand, compared
from helpers import adamw, all_low, traced
from markupsafe import escape
from shell import fails, run
from torch import nn

from assign.errors import PlanError, ReportError
from assign.memory.estimate import estimate
from assign.memory.profile import moments
from assign.notebook import human_bytes
from assign.pareto import Front
from assign.plan.noise_table import Cell, Method, NoiseTable, Sample
from assign.plan.persistent_state import UpdateRounding
from assign.plan.plan import Assignment, Provenance
from assign.plan.space import SearchSpace
from assign.plan.table import Role, TensorTable
from assign.planner import search_table
from assign.report.page import Report, write_report
from assign.report.page.colours import of_formats
from assign.report.page.curves import course_figure, curves_figure, epoch_scale_figure, overflow_figure, scale_figure
from assign.report.page.figures import front_figure, memory_figure, model_figure, plain, words
from assign.report.page.page import context, render
from assign.report.page.points import Point, best_of, measure_of, points_of
from assign.report.page.runs import load_runs
from assign.report.rows import formats_of, tensor_rows

EVIL = "<img src=x onerror=evil()>"
PLANS = {
    "fp32": {"strategy": "uniform", "space": SearchSpace(formats="fp32")},
    "low": {"low_ratio": 1.0},
    "emulated": {"low_ratio": 0.5, "space": "hfp8"},
    "blocks": {"low_ratio": 0.0, "space": SearchSpace(saved="int4:block64")},
    "stored": {"low_ratio": 0.0, "space": SearchSpace(master="bf16+8", optimizer_states="bf16")},
    "16 bit": {"strategy": "standalone", "space": "bf16"},
}


class Net(nn.Module):
    def __init__(self, depth=2, width=16):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(depth)))
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        return self.head(self.norm(self.layers(x)))


def trace_net(depth):
    return traced(Net(depth), (torch.randn(64, 16), torch.randint(0, 4, (64,))), optimizer=adamw)


@pytest.fixture(scope="module")
def table():
    return trace_net(2)


@pytest.fixture(params=PLANS)
def plan(request, table):
    return search_table(table, **PLANS[request.param])


@pytest.fixture
def low(table):
    return search_table(table, **PLANS["low"])


def rows_of(table, plan, **options):
    return tensor_rows(table, plan, moments(table, plan.entries), **options)


def data_of(page):
    """The JSON that a page carries."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1])


# ---- numbers


def test_moments_are_those_of_the_memory_model(table, plan):
    found, costs = moments(table, plan.entries), estimate(table, plan)
    assert found.total[found.peak] == found.total.max() == costs.peak_bytes
    assert {role: int(size[found.peak]) for role, size in found.by_role.items() if size[found.peak]} == costs.by_role
    assert words(found, found.peak).replace("rounding, ", "") == costs.peak_at
    alive = np.zeros_like(found.total)
    for each in found.alive:
        alive[each.start : each.end + 1] += each.bytes
    assert (alive == found.total).all()
    run = [n for n, rounds in enumerate(found.rounds) if not rounds]
    timeline = [bytes for _, _, bytes in costs.timeline]
    assert [found.operators[n] for n in run] == [name for name, _, _ in costs.timeline]
    assert all(found.total[n] >= bytes for n, bytes in zip(run, timeline, strict=True))
    assert found.total[-1] == timeline[-1]


def test_update_rounding_counts(table):
    plan = search_table(table, **PLANS["16 bit"]).with_update_rounding("kahan")
    kahan = moments(table, plan.entries, UpdateRounding.KAHAN)
    assert kahan.total.max() == estimate(table, plan).peak_bytes
    assert kahan.total.max() > moments(table, plan.entries).total.max()
    rows = tensor_rows(table, plan, kahan)
    assert sum(row.key.endswith(".optim.compensation") for row in rows) == sum(
        row.role is Role.WEIGHT for row in table.tensors
    )


def test_the_memory_chart_stacks_to_the_totals_and_marks_the_peaks(table, plan):
    before, after = moments(table, {}), moments(table, plan.entries)
    figure, costs = memory_figure(before, after), estimate(table, plan)
    divisor = {"KiB": 1024, "MiB": 2**20}[re.search(r"\((.*)\)", figure["layout"]["yaxis"]["title"]["text"])[1]]
    for axis, found, peak in (("y2", before, costs.baseline_peak_bytes), ("y", after, costs.peak_bytes)):
        traces = [trace for trace in figure["data"] if trace["yaxis"] == axis]
        stacked = np.sum([trace["y"] for trace in traces if "stackgroup" in trace], axis=0)
        (total,) = [trace for trace in traces if "hovertemplate" in trace]
        (mark,) = [trace for trace in traces if trace["name"] == "peak"]
        assert len(stacked) == len(found.total) + 1 == len(total["x"])
        assert stacked[:-1] * divisor == pytest.approx(found.total, abs=len(traces) * divisor * 1e-4)
        assert total["y"][:-1] == pytest.approx(found.total / divisor, abs=1e-4)
        assert (mark["x"], mark["text"]) == ([total["x"][found.peak]], [f"peak {human_bytes(peak)}"])
    layout = figure["layout"]
    assert layout["yaxis"]["range"] == layout["yaxis2"]["range"]
    assert layout["yaxis"]["range"][1] * divisor > costs.baseline_peak_bytes
    assert layout["xaxis"]["ticktext"] == ["forward", "backward", "optimizer"]


def test_every_tensor_has_a_row_and_its_bytes_at_the_peak(table, plan):
    rows, found = rows_of(table, plan), moments(table, plan.entries)
    keys = [row.key for row in rows]
    assert len(set(keys)) == len(keys)
    weights = [info for info in table.tensors if info.role is Role.WEIGHT]
    masters = {f"{info.key}.master" for info in weights}
    assert {info.key for info in table.tensors} | masters <= set(keys)
    extra = {f"{info.key}.optim.extra_bits" for info in weights if "bf16+8" in str(plan.entries.values())}
    extra |= {key for key in plan.entries if key.endswith(".stored")}
    assert set(keys) == {info.key for info in table.tensors} | masters | extra
    of_nobody = sum(int(size[found.peak]) for role, size in found.by_role.items() if role in ("scratch", "batch"))
    of_nobody += int(found.by_role["buffers"][0]) - sum(row.bytes for row in rows if row.role is Role.BUFFER)
    assert sum(row.peak_bytes for row in rows) + of_nobody == estimate(table, plan).peak_bytes
    for row in rows:
        assert row.fp32_bytes == 4 * row.elements
        if row.key in plan.entries:
            assert row.format == plan.entries[row.key].format
    assert context(Report(name="p", plan=plan, table=table))["unowned"] == of_nobody


def test_noise_stands_where_it_was_measured(table, low):
    key = "head/linear"
    cells = {Cell(key, low.entries[key].format): (Sample(0.25, 1.0, 0.0),)}
    noise = NoiseTable(fingerprint=table.fingerprint, method=Method.MEASURED, cells=cells)
    by_key = {row.key: row.noise for row in rows_of(table, low, noise=noise)}
    assert by_key.pop(key) == 0.25
    exact = {name for name, entry in low.entries.items() if entry.format == "fp32"}
    assert {by_key[name] for name in exact} == {0.0}
    assert {by_key[name] for name in by_key.keys() - exact} == {None}
    assert "over 1 batch, measured" in render(Report(name="p", plan=low, table=table, noise=noise))


def test_the_tree_has_every_byte_in_its_formats_colour(table, plan):
    rows = rows_of(table, plan)
    looks = of_formats(formats_of(rows))
    (tree,) = model_figure(rows, lambda row: looks[row.format])["data"]
    assert len(set(tree["ids"])) == len(tree["ids"])
    assert set(tree["parents"]) - {""} <= set(tree["ids"])
    assert sum(tree["values"]) == sum(row.bytes for row in rows)
    colours = dict(zip(tree["ids"], tree["marker"]["colors"], strict=True))
    assert all(colours[row.key] == looks[row.format].colour for row in rows)
    assert "layers.0.0/" in tree["ids"]


def test_formats_are_told_apart_beyond_the_number_of_colours():
    names = ["fp32", "bf16", "fp16", *map(str, range(18))]
    looks = of_formats(names)
    assert len({(look.colour, look.pattern) for look in looks.values()}) == len(names)


# ---- other plans


def test_front_says_which_plans_are_beaten_and_where_this_one_is(table):
    def at(peak, **costs):
        return Assignment(
            entries={}, recipe="native", fingerprint="f", provenance=Provenance(estimate={"peak_bytes": peak, **costs})
        )

    plans = [at(2**20, noise=9.0), at(2 * 2**20, noise=4.0), at(3 * 2**20, noise=5.0), at(4 * 2**20, noise=1.0)]
    points = points_of(plans)
    assert measure_of(points) == "noise"
    assert [point.costs["noise"] for point in best_of(points, "noise")] == [9.0, 4.0, 1.0]
    beaten, best, star = front_figure(points, points[2])["data"]
    assert (beaten["x"], beaten["y"]) == ([3.0], [5.0])
    assert (best["x"], best["y"]) == ([1.0, 2.0, 4.0], [9.0, 4.0, 1.0])
    assert (star["x"], star["y"], star["marker"]["symbol"]) == ([3.0], [5.0], "star")
    figure = front_figure(points, points_of([at(2**19)])[0])
    assert len(figure["data"]) == 2
    assert [shape["x0"] for shape in figure["layout"]["shapes"]] == [0.5]
    assert "(MiB)" in figure["layout"]["xaxis"]["title"]["text"]
    assert measure_of(points_of([*plans, at(1)])) == "low_ratio"
    trained = points_of([at(1, noise=1.0, trained_accuracy=0.5), at(2, noise=2.0, trained_accuracy=0.75)])
    assert measure_of(trained) == "trained_accuracy"
    assert len(best_of(trained, "trained_accuracy")) == 2
    assert measure_of([]) == "low_ratio"


def test_a_front_of_the_page_is_of_its_model(table, low):
    page = render(Report(name="low.json", plan=low, table=table, front=Front((low,))))
    assert "so the chart shows their low ratio" in page
    assert "The star is low.json" in page
    other = dataclasses.replace(low, fingerprint="other")
    with pytest.raises(PlanError, match="the front has plans for another model"):
        render(Report(name="low.json", plan=low, table=table, front=Front((other,))))


# ---- trainings


def trained(**changes):
    epochs = [
        {"loss": 2.0, "metrics": {"accuracy": 0.5}, "fp32_metrics": {}, "loss_scale": 65536.0, "skipped_steps": 0},
        {"loss": None, "metrics": {"accuracy": None}, "fp32_metrics": {}, "loss_scale": 32768.0, "skipped_steps": 2},
    ]
    past = {"step": 7, "key": EVIL, "overflow_ratio": 0.02, "from_format": "fp(4,3,4)", "to_format": "fp(6,9,0)"}
    return {"metrics": {"accuracy": 0.5}, "loss": 2.0, "epochs": epochs, "promotions": [past], **changes}


def course(**changes):
    """Six steps in three points: promotion looked at the first and the third; one was skipped in the second."""
    found = {"step": [2, 4, 6], "steps": [2, 2, 2], "loss": [2.0, 1.0, None], "seconds": [0.1, 0.1, 0.1]}
    found |= {"overflow": [0.25, None, 0.0], "loss_scale": [65536.0, 32768.0, 32768.0], "skipped": [0, 1, 0]}
    return {**found, **changes}


def with_course(**changes):
    """As this version's ``train`` writes it."""
    return trained(fingerprint="f", promote_threshold=0.02, course=course(), **changes)


@pytest.fixture
def results(tmp_path):
    """One file of each kind: of ``train``, of ``run``, of ``compare``."""
    made = compared(by_hand("fp32", 0, 0.9), by_hand("low", 0, 0.5), by_hand("low", 1, 0.75, diverged=True))
    bare = [dataclasses.replace(each, result={**each.result, "promotions": []}) for each in made.runs]
    plain = trained(promotions=[], epochs=[{"loss": 1.0, "metrics": {"accuracy": 1.0}}])
    files = {
        "train": trained(),
        "run": {"baseline": plain, "plan": trained(), "search": {}},
        "compare": dataclasses.replace(made, runs=tuple(bare)).to_json(),
    }
    for name, data in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    return tmp_path


def test_runs_are_read_from_all_three_kinds_of_file(results):
    paths = [results / f"{name}.json" for name in ("train", "run", "compare")]
    names = ["train: train", "run: fp32", "run: plan"]
    names += ["compare: fp32, seed 0", "compare: low, seed 0", "compare: low, seed 1"]
    assert [each.name for each in load_runs(paths, "f")] == names
    assert [each.name for each in load_runs(paths[:1], "any")] == ["train"]


def test_files_that_hold_no_run_are_refused(results):
    (results / "list.json").write_text("[]")
    (results / "cut.json").write_text('{"metrics": ')
    (results / "plan.json").write_text('{"assign_plan": 1}')
    (results / "other.json").write_text(json.dumps(with_course()))
    (results / "torn.json").write_text(json.dumps(trained(course=course(loss=[1.0]))))
    both = {"baseline": trained(), "plan": with_course(), "search": {}}
    (results / "both.json").write_text(json.dumps(both))
    messages = {
        "other": "holds trainings of another model: its fingerprint is f, this model's is g",
        "both": "holds trainings of another model",
        "torn": "is not a valid training:\n  course: its lists differ in length",
        "compare": "compares plans of another model: its fingerprint is f, this model's is g",
        "list": "is not the result of a training, but a list",
        "cut": "is not JSON",
        "plan": "is not a valid training:\n  metrics: Field required",
        "none": "there is no training",
    }
    for name, message in messages.items():
        with pytest.raises(ReportError, match=message):
            load_runs([results / f"{name}.json"], "g")


def test_curves_are_the_runs_own_numbers(results):
    runs = load_runs([results / "run.json"], "f")
    figure = curves_figure(runs)
    found = {(trace["name"], trace["yaxis"]): trace["y"] for trace in figure["data"]}
    assert found == {
        ("fp32", "y"): [1.0],
        ("plan", "y"): [2.0, None],
        ("fp32", "y2"): [1.0],
        ("plan", "y2"): [0.5, None],
    }
    headings = [note["text"] for note in figure["layout"]["annotations"]]
    assert headings == ["<b>mean training loss</b>", "<b>accuracy</b>"]
    scale = epoch_scale_figure(runs)
    assert [trace["y"] for trace in scale["data"]] == [[16.0, 15.0], [0, 2]]
    assert {trace["line"]["color"] for trace in scale["data"]} == {figure["data"][1]["line"]["color"]}
    (past,) = overflow_figure(runs)["data"]
    assert (past["x"], past["y"]) == ([7], [2.0])
    assert "%" in overflow_figure(runs)["layout"]["yaxis"]["title"]["text"]
    quiet = runs[:1]
    assert (epoch_scale_figure(quiet), overflow_figure(quiet), curves_figure([])) == (None, None, None)
    assert (course_figure(runs), scale_figure(runs)) == (None, None)


def test_curves_by_step_are_the_courses_own_numbers(results):
    """Beside a run without a course, which has its loss scale by epoch, in its own colour."""
    (results / "new.json").write_text(json.dumps({"baseline": trained(), "plan": with_course(), "search": {}}))
    runs = load_runs([results / "new.json"], "f")
    figure = course_figure(runs)
    (loss,) = figure["data"]
    assert (loss["x"], loss["y"], loss["customdata"]) == ([2, 4], [2.0, 1.0], [2, 2])
    assert figure["layout"]["xaxis"]["title"]["text"] == "training step"
    assert [note["text"] for note in figure["layout"]["annotations"]] == ["<b>training loss</b>"]
    scale, skipped = scale_figure(runs)["data"]
    assert (scale["x"], scale["y"], skipped["y"]) == ([2, 4, 6], [16.0, 15.0, 15.0], [0, 1, 1])
    assert (scale["yaxis"], skipped["yaxis"], scale["line"]["shape"]) == ("y", "y2", "hv")
    smooth = with_course()
    smooth["course"] = course(skipped=[0, 0, 0])
    (results / "smooth.json").write_text(json.dumps(smooth))
    assert len(scale_figure(load_runs([results / "smooth.json"], "f"))["data"]) == 1
    (bare, _) = epoch_scale_figure(runs)["data"]
    assert bare["name"] == "fp32"
    colours = [trace["line"]["color"] for trace in (loss, scale, skipped, bare)]
    assert len(set(colours[:3])) == 1 != len(set(colours))


def test_overflow_is_drawn_with_the_share_at_which_tensors_are_promoted(results):
    (results / "new.json").write_text(json.dumps(with_course()))
    runs = load_runs([results / "new.json"], "f")
    figure = overflow_figure(runs)
    line, past = figure["data"]
    assert (line["x"], line["y"]) == ([2, 6], [25.0, 0.0])
    assert (past["x"], past["y"], past["mode"]) == ([7], [2.0], "markers")
    (threshold,) = figure["layout"]["shapes"]
    assert (threshold["y0"], threshold["y1"]) == (2.0, 2.0)
    assert figure["layout"]["yaxis"]["range"][1] > 25.0
    none_looked = with_course(promotions=[])
    none_looked["course"] = course(overflow=[None] * 3)
    still = with_course(promotions=[])
    still["course"] = course(overflow=[0.0] * 3)
    for name, result in (("blind", none_looked), ("still", still)):
        (results / f"{name}.json").write_text(json.dumps(result))
    assert overflow_figure(load_runs([results / "blind.json"], "f")) is None
    calm = overflow_figure(load_runs([results / "still.json"], "f"))
    assert calm["data"][0]["y"] == [0.0] * 3
    assert calm["layout"]["yaxis"]["range"][1] > 2.0  # the line of the threshold is seen


@pytest.mark.parametrize(("reach", "apart"), [(1, 1), (5, 1), (6, 2), (11, 5), (26, 10), (900, 200)])
def test_whole_numbers_have_round_ticks(results, reach, apart):
    result = with_course()
    result["course"] = course(skipped=[0, reach, 0])
    (results / "many.json").write_text(json.dumps(result))
    figure = scale_figure(load_runs([results / "many.json"], "f"))
    assert figure["layout"]["yaxis2"]["dtick"] == apart


# ---- the page


@pytest.fixture(scope="module")
def many():
    """A table of more than 500 tensors, and a plan for it."""
    table = trace_net(45)
    assert len(table.tensors) > 500
    return table, all_low(table)


def test_a_page_of_500_tensors_is_small_and_loads_nothing(many, tmp_path):
    table, plan = many
    write_report(tmp_path / "report.html", Report(name="plan.json", plan=plan, table=table))
    text = (tmp_path / "report.html").read_text()
    assert len(text) < 6e6
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:)?//|@import|url\(""", text)
    assert text.count('id="plotly"') == 1
    assert len(re.findall(r"<tr data-bytes", text)) == len(rows_of(table, plan))
    assert all(escape(info.key) in text.replace("<wbr>", "") for info in table.tensors)


def test_a_page_says_what_it_has_not(table, low):
    page = render(Report(name="low.json", plan=dataclasses.replace(low, provenance=Provenance()), table=table))
    for note in ("No noise was given", "No other plans were given", "No run was given", "does not contain the command"):
        assert note in page


def test_a_page_says_how_to_reproduce_it(table, low):
    source = Provenance(command="assign search x --budget '1 & 2'", versions={"torch": "2.0"}, seed=3, created="today")
    page = render(Report(name="p", plan=low.with_provenance(source), table=table, command="assign report p"))
    for text in (escape(source.command), "assign report p", "2.0", "today", low.fingerprint):
        assert text in page


def evil_report(table, runs=()):
    """A report of a model that has mark-up for a name."""
    text = json.dumps(table.to_json()).replace('"head', f'"{EVIL}</script>')
    renamed = TensorTable.from_json({**json.loads(text), "fingerprint": None})  # it is no longer that of its names
    return Report(name=EVIL, plan=all_low(renamed), table=renamed, runs=runs)


def test_names_are_shown_not_run(table, results):
    page = render(evil_report(table, load_runs([results / "train.json"], "")))
    assert "<img" not in page.replace("<wbr>", "")
    assert escape(f"{EVIL}</script>/linear") in page.replace("<wbr>", "")
    keys = data_of(page)["alive"]["after"]["keys"]
    assert f"{EVIL}</script>/linear" in keys
    figures = data_of(page)["figures"]
    (tree,), (past,) = figures["model"]["data"], figures["overflow"]["data"]
    totals = [trace["text"] for trace in figures["memory"]["data"] if "hovertemplate" in trace]
    read_by_plotly = json.dumps([tree["labels"], tree["hovertext"], past["text"], totals])
    assert "&lt;img" in read_by_plotly
    assert "<img" not in read_by_plotly


def test_labels_from_files_are_no_mark_up_and_no_template(table, results):
    """Plotly reads tags in labels, and ``%{…}`` in what it shows under the pointer."""
    assert plain("%{x} <b>\x1b") == "%&#123;x} &lt;b&gt;\\x1b"
    evil = Point(name=EVIL, peak_bytes=1, costs={f"trained_{EVIL}": 0.5})
    past = {"step": 1, "key": "a", "overflow_ratio": 0.5, "from_format": EVIL, "to_format": EVIL}
    (results / "evil.json").write_text(json.dumps(with_course() | {"promotions": [past]}))
    runs = load_runs([results / "evil.json"], "f")
    for figure in (front_figure([evil], None), overflow_figure(runs)):
        assert "<img" not in json.dumps(figure)
        assert "&lt;img" in json.dumps(figure)


def test_another_models_plan_is_refused(table, low, tmp_path):
    other = dataclasses.replace(low, fingerprint="other")
    with pytest.raises(PlanError, match=r"low\.json is a plan for another model: its fingerprint is other"):
        render(Report(name="low.json", plan=other, table=table))
    with pytest.raises(ReportError, match="cannot write the report"):
        write_report(tmp_path / "nowhere" / "r.html", Report(name="low.json", plan=low, table=table))


def test_without_plotly_it_says_what_to_install(table, low, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ReportError, match=r"needs plotly, which is not installed.*precision-assign\[report\]"):
        render(Report(name="low.json", plan=low, table=table))


# ---- the shell


TASK = """
import torch
from torch import nn
import assign

def task(batch_size: int = 32):
    data = [(torch.randn(batch_size, 8), torch.randn(batch_size, 1)) for _ in range(2)]
    return assign.Task(
        model=lambda: nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 1)),
        loss=lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1]),
        train=data,
        evaluate=None,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
        epochs=1,
    )

def other(batch_size: int = 32):
    import dataclasses
    return dataclasses.replace(task(batch_size), model=lambda: nn.Sequential(nn.Linear(8, 1)))
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def search(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["assign", "search", *arguments])
    run("search", *arguments)


def test_report_finds_the_plans_task_and_its_options(here, monkeypatch, capsys):
    search(monkeypatch, "mine.py", "--low-ratio", "1", "--batch-size", "48", "-o", "my plan.json")
    run("train", "mine.py", "--plan", "my plan.json", "--json", "run.json")
    asked = ("--task", "mine.py", "--run", "run.json")
    assert "wrote report.html" in run("report", "my plan.json", *asked)
    page = (here / "report.html").read_text()
    peak = Assignment.load("my plan.json").provenance.estimate["peak_bytes"]
    found = data_of(page)["alive"]
    assert sum(s[2] for s in found["after"]["segments"] if s[0] <= found["peak"] <= s[1]) == peak
    assert "assign search mine.py --low-ratio 1 --batch-size 48 -o &#39;my plan.json&#39;" in page
    assert "another model" in fails(capsys, monkeypatch, "report", "my plan.json", "--task", "mine.py:other")
    for command in ("train", "run"):
        goal = ("--low-ratio", "1", "-o", "other.json") if command == "run" else ()
        run(command, "mine.py:other", *goal, "--json", f"{command}.json")
        said = fails(capsys, monkeypatch, "report", "my plan.json", "--run", f"{command}.json")
        assert f"{command}.json holds trainings of another model" in said
    (here / "mine.py").rename(here / "moved.py")
    run("report", "my plan.json", "--task", "moved.py", "-o", "moved.html")
    assert data_of((here / "moved.html").read_text())["alive"] == found
    run("report", "my plan.json", "--task", "moved.py", "--batch-size", "96", "-o", "larger.html")
    found = data_of((here / "larger.html").read_text())["alive"]
    assert sum(s[2] for s in found["after"]["segments"] if s[0] <= found["peak"] <= s[1]) > peak


def test_report_asks_for_the_task_of_a_plan_that_does_not_say_it(here, monkeypatch, capsys):
    search(monkeypatch, "mine.py", "--low-ratio", "1")
    plan = Assignment.load("plan.json")
    for command in ("", "assign.search", "assign search 'mine.py", "assign dance mine.py"):
        plan.with_provenance(dataclasses.replace(plan.provenance, command=command)).save("bare.json")
        assert "does not say which task" in fails(capsys, monkeypatch, "report", "bare.json")
    assert "wrote r.html" in run("report", "bare.json", "--task", "mine.py", "-o", "r.html")


# ---- a browser


def opened(browser, path, **options):
    """A page that is drawn; what it said and what it asked for besides itself."""
    page = browser.new_context(**options).new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-drawn=yes]")
    return page, said, [url for url in asked if url != path.as_uri()]


def shown(page):
    """Keys of the rows that are seen, in their order."""
    return page.eval_on_selector_all("#tensors tbody tr:not([hidden]) th", "cells => cells.map(c => c.textContent)")


def test_a_browser_shows_it_searches_and_sorts(browser, table, results, tmp_path):
    (results / "new.json").write_text(json.dumps(with_course()))
    report = evil_report(table, load_runs([results / "run.json", results / "new.json"], "f"))
    write_report(tmp_path / "report.html", report)
    rows = {row.key: row for row in rows_of(report.table, report.plan)}
    page, said, asked = opened(browser, tmp_path / "report.html", viewport={"width": 1280, "height": 800})
    assert len(page.query_selector_all(".chart svg.main-svg")) >= 5
    curves = {"course": 1, "overflow": 1, "scale": 2, "scale_by_epoch": 2}
    assert {name: len(page.query_selector_all(f"#chart-{name} path.js-line")) for name in curves} == curves
    assert "the share at which a tensor is promoted, 2 %." in page.text_content("#overflow")
    assert "the mean of the steps since the previous point, up to 2 of them" in page.text_content("#training")
    page.fill("#search", "LAYERS grad")
    assert set(shown(page)) == {key for key in rows if "layers" in key and "grad" in key}
    assert f"{len(shown(page))} of {len(rows)} tensors" in page.text_content("#shown")
    page.fill("#search", "")
    page.select_option("#role", "weight")
    assert set(shown(page)) == {row.key for row in rows.values() if row.role is Role.WEIGHT}
    page.select_option("#role", "")
    for order in (-1, 1):
        if order == 1:
            page.click("#tensors th:has-text('bytes')")
        sizes = [rows[key].bytes for key in shown(page)]
        assert sizes == sorted(sizes, key=lambda size: order * size)
    page.click("#tensors th:has-text('tensor')")
    assert len(shown(page)) == len(rows)
    peak = page.text_content("#moment")
    assert human_bytes(estimate(report.table, report.plan).peak_bytes) in page.text_content("#alive")
    page.locator("#chart-memory .nsewdrag").first.hover(position={"x": 5, "y": 50})
    page.wait_for_function("peak => document.getElementById('moment').textContent !== peak", arg=peak)
    assert (said, asked) == ([], [])


def test_a_phone_shows_it_light_and_dark(browser, many, tmp_path):
    table, plan = many
    write_report(tmp_path / "report.html", Report(name="plan.json", plan=plan, table=table))
    size = {"width": 390, "height": 844}
    page, said, asked = opened(browser, tmp_path / "report.html", viewport=size, color_scheme="light")
    ink = "getComputedStyle(document.querySelector('#chart-memory .xtitle')).fill"
    paper = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    light = page.evaluate(ink), page.evaluate(paper)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"light => {ink} !== light", arg=light[0])  # the charts are drawn anew
    dark = page.evaluate(ink), page.evaluate(paper)
    brightness = [int(re.findall(r"\d+", colour)[0]) for colour in (*light, *dark)]
    assert [value > 150 for value in brightness] == [False, True, True, False]
    assert (said, asked) == ([], [])
