"""The shell as a user meets it: exit status, tables, JSON fields, and what bad input says."""

import dataclasses
import io
import json
import math
import re
import sys

import pytest
from shell import fails, run
from typer.testing import CliRunner

from assign.cli import app
from assign.cli.shell import Meter
from assign.numerics.promotion import Promoted
from assign.plan.plan import Assignment
from assign.report.tables import Bar, new_table
from assign.report.terminal import Terminal
from assign.training.history import EpochResult
from assign.training.loop import Progress

TASK = """
import torch
from torch import nn
import assign

def task():
    data = [(torch.randn(32, 8), torch.randn(32, 1)) for _ in range(4)]
    return assign.Task(
        model=lambda: nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 1)),
        loss=lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1]),
        train=data,
        evaluate=None,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
        epochs=2,
    )

def bright():
    import dataclasses
    return dataclasses.replace(task(), train=[(x * 50, y) for x, y in task().train])

def nan():
    import dataclasses
    loss = lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1]) * float("nan")
    return dataclasses.replace(task(), loss=loss)

def wrong():
    return 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_formats_and_schema(here):
    assert "FP(4,3,4)".lower() in run("formats", "fp(4,3,4)", "--json", "formats.json")
    assert json.loads((here / "formats.json").read_text())["fp(4,3,4)"]["max_value"] == 30.0
    assert "stochastic" in run("formats", "e4m3:sr")
    assert ":sr" in run("formats", "--json", "all.json")
    blocks = json.loads((here / "all.json").read_text())["int4:block64"]
    assert (blocks["bits_per_element"], blocks["block"]) == (4.5, 64)
    assert "8.25" in run("formats", "mxfp8:sr")
    schema = json.loads(run("schema"))
    assert "tensors" in schema["properties"]


def test_a_bar_says_where_training_stands():
    """Loss, the last epoch's metrics, the median step's time, evaluation left out, and promotions so far."""
    times = iter([0.0, 0.1, 0.3, 5.0, 5.2])
    meter = Meter(peak=3 * 2**20, clock=lambda: next(times))
    past = Promoted(step=2, key="a", overflow_ratio=0.5, from_format="e4m3", to_format="bf16")
    step = Progress(epoch=1, epochs=2, step=1, steps_per_epoch=2, loss=0.25)
    assert meter.after(step) == "loss 0.2500, 100 ms per step, peak 3.0 MiB"
    assert meter.after(dataclasses.replace(step, promoted=(past,))).endswith(
        "150 ms per step, peak 3.0 MiB, 1 promoted"
    )
    meter.after_epoch(
        1, EpochResult(loss=0.2, metrics={"accuracy": 0.5}, fp32_metrics={}, loss_scale=None, skipped_steps=0)
    )
    assert meter.after(step) == "loss 0.2500, accuracy 0.5, 200 ms per step, peak 3.0 MiB, 1 promoted"


def test_search_by_training(here, capsys, monkeypatch):
    by_training = ("tune", "mine.py")
    run(*by_training, "--trials", "2", "--epochs", "1", "-o", "plans", "--json", "f.json")
    found = json.loads((here / "f.json").read_text())
    assert found["trained"] == 2
    for row in found["front"]:
        run("estimate", "mine.py", "--plan", row["plan"], "--json", "e.json")
        assert row["peak_bytes"] == json.loads((here / "e.json").read_text())["peak_bytes"]
        assert Assignment.load(here / row["plan"]).provenance.strategy == "optuna"
    assert (here / "plans.study.db").exists()
    assert "a front of plans" in fails(capsys, monkeypatch, *by_training, "-o", "one.json")
    assert "Give at least 1 for each" in fails(capsys, monkeypatch, *by_training, "--trials", "0", "-o", "plans")
    before = ("search", "mine.py", "--strategy", "optuna")
    for option in ("--low-ratio=0.5", "--granularity=tensor", "--pin=*=bf16"):
        assert "'optuna' does not take" in fails(capsys, monkeypatch, *before, option)
    assert "does not take --pareto" in fails(capsys, monkeypatch, *before, "--pareto", "3", "-o", "plans")
    run(*before, "--trials", "2", "--epochs", "1", "-o", "plans", "--json", "g.json")
    assert (here / "g.json").read_text() == (here / "f.json").read_text()  # the same study, which is done
    options = ("--trials", "4", "--backend", "inductor", "--seed", "1", "--device", "cpu")
    needless = fails(capsys, monkeypatch, "search", "mine.py", "--low-ratio", "1", *options)
    assert "does not take --trials, --backend." in needless
    assert "assign tune TASK" in fails(capsys, monkeypatch, "run", *before[1:])


def test_the_former_spelling_of_tune_names_the_new_one(here, capsys):
    """Standard output stays the plan's alone."""
    before = ("search", "mine.py", "--strategy", "optuna", "--budget", "100%", "--trials", "1", "--epochs", "1")
    result = CliRunner().invoke(app, [*before, "-o", "-", "--storage", "s.db"], catch_exceptions=False)
    assert "is now 'assign tune'" in result.stderr
    assert json.loads(result.stdout)["provenance"]["strategy"] == "optuna"


def test_a_front_and_a_plan_picked_from_it(here, capsys, monkeypatch):
    """Three plans; a budget that one of them fits; one below all of them, which is searched, and has no plan either."""
    asked = ("search", "mine.py", "--strategy", "milp")
    run(*asked, "--pareto", "3", "-o", "plans", "--json", "front.json")
    rows = json.loads((here / "front.json").read_text())["front"]
    assert [(here / row["plan"]).exists() for row in rows] == [True] * len(rows)
    assert rows[0]["peak_bytes"] < rows[-1]["peak_bytes"]
    assert rows[0]["noise"] > rows[-1]["noise"]
    text = run("search", "mine.py", "--budget", str(rows[0]["peak_bytes"]), "--front", "plans", "-o", "p.json")
    assert "that fits" in text
    assert Assignment.load(here / "p.json") == Assignment.load(here / rows[0]["plan"])
    assert "needs" in fails(capsys, monkeypatch, "search", "mine.py", "--budget", "1KB", "--front", "plans")
    assert "Give one" in fails(capsys, monkeypatch, "search", "mine.py", "--front", "plans")
    assert "names one file" in fails(capsys, monkeypatch, "search", "mine.py", "--pareto", "3")
    assert "already contains files" in fails(capsys, monkeypatch, "search", "mine.py", "--pareto", "3", "-o", "plans")


def test_trace_search_estimate_train_show_diff(here):
    run("trace", "mine.py:task", "--json", "table.json")
    table = json.loads((here / "table.json").read_text())
    assert {"fingerprint", "elements", "groups", "tensors"} <= table.keys()
    run("search", "mine.py", "--low-ratio", "1", "-o", "low.json", "--json", "search.json")
    fields = {"low_ratio", "low_ratio_bits", "groups_low", "aggregate_bytes", "peak_bytes", "baseline_peak_bytes"}
    fields |= {"seconds"}
    found = json.loads((here / "search.json").read_text())
    assert fields <= found.keys()
    assert found["low_ratio"] == 1.0
    printed = run("estimate", "mine.py", "--plan", "low.json", "--backend", "inductor", "--json", "estimate.json")
    assert "compiled by Inductor" in printed
    assert "low ratio, by bits" in printed
    timeline = printed[printed.index("Memory over the step") : printed.index("Largest at the peak")]
    assert timeline.count("peak: ") == 1
    assert timeline.index("forward") < timeline.index("backward") < timeline.index("optimizer")
    predicted = json.loads((here / "estimate.json").read_text())
    assert fields <= predicted.keys()
    assert predicted["peak_bytes"] == found["peak_bytes"]
    run("train", "mine.py", "--plan", "low.json", "--json", "train.json")
    trained = json.loads((here / "train.json").read_text())
    wanted = {"metrics", "loss", "measured_peak_bytes", "predicted_peak_bytes", "step_seconds", "diverged"}
    assert wanted <= trained.keys()
    assert trained["diverged"] is False
    assert trained["fingerprint"] == table["fingerprint"]
    assert trained["course"]["step"] == list(range(1, 9))
    assert "e4m3:pow2" in run("show", "low.json", "--all")
    run("search", "mine.py", "--strategy", "uniform", "--format", "bf16", "-o", "bf16.json")
    printed = run("diff", "low.json", "bf16.json", "--json", "diff.json")
    assert re.search(r"e4m3:pow2 \(low\) │ bf16 +│ +8 │", printed)  # 3 activations, 4 parameters, input
    assert "0.weight" in printed
    assert json.loads((here / "diff.json").read_text())["changed"]["0.weight"] == ["e4m3:pow2", "bf16"]
    assert "same" in run("diff", "low.json", "low.json")


def test_run_puts_both_side_by_side(here):
    output = run("run", "mine.py", "--budget", "90%", "-o", "plan.json", "--json", "run.json")
    assert "measured peak" in output
    assert "seconds per step" in output
    data = json.loads((here / "run.json").read_text())
    assert data.keys() == {"baseline", "plan", "search"}
    assert data["plan"]["predicted_peak_bytes"] == data["search"]["peak_bytes"]
    assert [len(data[name]["course"]["loss"]) for name in ("baseline", "plan")] == [8, 8]


def test_compare_trains_each_and_goes_on(here):
    run("search", "mine.py", "--low-ratio", "1", "--recipe", "hfp8", "-o", "low.json")
    run("search", "mine.py", "--low-ratio", "0", "-o", "high.json")
    command = ["compare", "mine.py", "--plan", "low.json", "--plan", "high.json", "--seeds", "2", "--epochs", "1"]
    command += ["--promote-every", "7"]
    output = run(*command)
    assert output.count("trained ") == 6
    assert all(name in output for name in ("fp32", "low", "high", "0 of 2", "wrote compare.svg"))
    assert "\x1b" not in output
    data = json.loads((here / "compare.json").read_text())
    assert [(r["variant"], r["seed"], r["result"]["diverged"]) for r in data["runs"]] == [
        (name, seed, False) for name in ("fp32", "low", "high") for seed in (0, 1)
    ]
    assert [row["promote_every"] for row in data["variants"]] == [0, 7, 7]
    assert all(len(r["result"]["course"]["loss"]) == 4 for r in data["runs"])
    assert "</svg>" in (here / "compare-curves.svg").read_text()
    again = run(*command, "--picture", "other.png")
    assert "6 of 6 runs were read from compare.json" in again
    assert "trained " not in again
    assert json.loads((here / "compare.json").read_text()) == data
    assert (here / "other-curves.png").is_file()


def test_compare_ends_well_where_runs_diverge_or_are_stopped(here, monkeypatch):
    run("search", "mine.py:nan", "--low-ratio", "1", "-o", "low.json")
    output = run("compare", "mine.py:nan", "--plan", "low.json", "--seeds", "1", "--no-fp32", "--promote-every", "0")
    assert "1 of 1" in output
    assert "diverged at step 1" in output

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("assign.training.compare.train", interrupt)
    arguments = ("compare", "mine.py:nan", "--plan", "low.json", "--seeds", "2", "--json", "b.json")
    run(*arguments, code=130)
    assert json.loads((here / "b.json").read_text())["runs"] == []


def test_compare_refuses_bad_input_before_it_trains(here, capsys, monkeypatch):
    def error(*arguments):
        return fails(capsys, monkeypatch, "compare", *arguments)

    run("search", "mine.py", "--low-ratio", "1", "-o", "low.json")
    monkeypatch.setattr("assign.training.compare.train", None)
    assert "no plan to compare" in error("mine.py")
    assert "there is no plan nowhere.json" in error("mine.py", "--plan", "nowhere.json")
    assert "0 seeds were requested" in error("mine.py", "--plan", "low.json", "--seeds", "0")
    assert "suffix must be one of .svg, .png" in error("mine.py", "--plan", "low.json", "--picture", "a.gif")
    assert "does not fit this model" in error("mine.py:nan", "--plan", "low.json")
    assert not (here / "compare.json").exists()


def test_bad_input_is_one_message_and_status_two(here, capsys, monkeypatch):
    def error(*arguments):
        return fails(capsys, monkeypatch, *arguments)

    assert "still needs" in error("search", "mine.py", "--budget", "1KiB")  # and says the floor
    assert "'1 potato' is not a budget" in error("search", "mine.py", "--budget", "1 potato")
    assert "needs a goal" in error("search", "mine.py")
    assert "bf17" in error("search", "mine.py", "--strategy", "uniform", "--format", "bf17")
    assert "missing.py" in error("trace", "missing.py:task")
    assert "wrong" in error("trace", "mine.py:wrong")
    assert "nowhere.json" in error("show", "nowhere.json")
    (here / "broken.json").write_text('{"assign_plan": 1, "tens')
    assert "broken.json" in error("show", "broken.json")
    (here / "newer.json").write_text('{"assign_plan": 99}')
    assert "99" in error("show", "newer.json")


def test_a_plan_for_another_model(here, capsys, monkeypatch):
    run("search", "digits", "--low-ratio", "0", "-o", "digits.json")
    text = fails(capsys, monkeypatch, "train", "mine.py", "--plan", "digits.json")
    assert "another model" in text


def test_a_loss_that_is_nan_ends_with_status_one(here):
    assert "diverged" in run("train", "mine.py:nan", code=1)


def test_promotions_are_printed_and_saved_beside_the_plan(here):
    printed = run("run", "mine.py:bright", "--recipe", "hfp8", "--low-ratio", "1", "-o", "p.json", "--json", "run.json")
    assert "step 1: /input promoted from fp(4,3,4) to fp(6,9,0), " in printed
    found = json.loads((here / "run.json").read_text())["plan"]["promotions"]
    before, after = (json.loads((here / name).read_text())["tensors"] for name in ("p.json", "p.promoted.json"))
    assert {key for key in after if after[key] != before[key]} == {past["key"] for past in found}
    assert f"wrote p.promoted.json: {len(found)} tensors promoted" in printed
    (here / "p.promoted.json").unlink()
    printed = run("train", "mine.py:bright", "--plan", "p.json", "--promote-every", "0")
    assert "promoted" not in printed
    assert not (here / "p.promoted.json").exists()
    assert "tensors promoted" in run("train", "mine.py:bright", "--plan", "p.json")
    assert (here / "p.promoted.json").exists()


def test_show_draws_where_the_memory_goes(here, monkeypatch, capsys):
    search = ("search", "mine.py:task", "--low-ratio", "0.5", "--seed", "3", "-o", "p.json")
    monkeypatch.setattr(sys, "argv", ["assign", *search])
    run(*search)
    printed = run("show", "p.json", "--task", "mine.py:task", "--json", "show.json")
    found = json.loads((here / "show.json").read_text())
    assert found["plan"] == json.loads((here / "p.json").read_text())
    step, predicted = found["step"], found["plan"]["provenance"]["estimate"]
    for name, peak in (("plan", "peak_bytes"), ("fp32", "baseline_peak_bytes")):
        assert sum(sizes[name] for sizes in step["by_role"].values()) == step[peak] == predicted[peak]
    sizes = [row["bytes"] for row in step["largest"]]
    assert sizes == sorted(sizes, reverse=True)
    assert (len(sizes), sizes[0]) == (10, 32 * 64 + 4)  # codes of the first activation, and their scale
    row = next(line for line in printed.splitlines() if "saved for the backward pass" in line)
    kept = step["by_role"]["saved"]["plan"] / step["by_role"]["saved"]["fp32"]
    assert 0.05 < kept < 0.95
    assert row.count("█") / (row.count("█") + row.count("░")) == pytest.approx(kept, abs=0.1)
    assert "The 10 largest of" in printed
    assert "Entries" not in printed


def test_a_plan_runs_no_code_that_the_user_does_not_name(here, monkeypatch, capsys):
    """The command that a file remembers may name any importable function; only built-in tasks are opened for it."""
    run("search", "mine.py:task", "--low-ratio", "0.5", "-o", "p.json")
    plan = Assignment.load("p.json")
    (here / "harm.py").write_text("open('harmed', 'w').close()\ndef task(): open('harmed', 'w').close()\n")
    for task in ("harm.py", "harm.py:task", "harm:task", "./harm.py:task", "os:abort", "http.server:test"):
        command = f"assign search {task} --low-ratio 0.5"
        plan.with_provenance(dataclasses.replace(plan.provenance, command=command)).save("q.json")
        assert f"--task {task}" in run("show", "q.json")
        for more in (["show", "q.json", "--lowered"], ["report", "q.json", "-o", "q.html"]):
            said = fails(capsys, monkeypatch, *more)
            assert "which is not built in" in said
            assert f"--task {task}" in said
    assert not (here / "harmed").exists()


def test_show_says_why_it_draws_no_memory(here, monkeypatch, capsys):
    run("search", "mine.py:task", "--low-ratio", "0.5", "-o", "p.json")
    plan = Assignment.load("p.json")
    for command, why in (("", "does not say which task"), ("assign search gone.py --low-ratio 1", "--task gone.py")):
        plan.with_provenance(dataclasses.replace(plan.provenance, command=command)).save("q.json")
        printed = run("show", "q.json", "--all", "--json", "show.json")
        assert json.loads((here / "show.json").read_text())["step"] is None
        assert "Memory by role is not known: " in printed
        assert why in printed
        assert "0.weight.grad" in printed
        assert "The 10 largest" in run("show", "q.json", "--task", "mine.py")
    assert "gone.py" in fails(capsys, monkeypatch, "show", "p.json", "--task", "gone.py")
    assert "gone.py" in fails(capsys, monkeypatch, "show", "q.json", "--lowered")


def test_show_lowered_says_where_operators_run_and_why(here):
    run("search", "mine.py:task", "--low-ratio", "0.5", "-o", "p.json")
    printed = run("show", "p.json", "--lowered", "--task", "mine.py:task", "--json", "lowered.json")
    rows = {row["key"]: row for row in json.loads((here / "lowered.json").read_text())}
    assert list(rows) == ["0/linear", "1/gelu", "2/linear", "loss/mse_loss"]
    assert [row["dtype"] for row in rows.values()] == ["bfloat16", "bfloat16", "bfloat16", "float32"]
    assert rows["0/linear"]["why"] == "its inputs and outputs are bfloat16"
    assert "matrix products: 2 in bfloat16" in printed
    plan = json.loads((here / "p.json").read_text())
    plan["tensors"]["0.weight"]["format"] = plan["tensors"]["0.weight.grad"]["format"] = "fp32"
    plan["tensors"]["1/gelu"]["format"] = "fp(4,3,4)"
    (here / "q.json").write_text(json.dumps(plan))
    run("show", "q.json", "--lowered", "--task", "mine.py:task", "--json", "lowered.json")
    rows = {row["key"]: row for row in json.loads((here / "lowered.json").read_text())}
    assert rows["0/linear"]["why"] == "it reads 0.weight, which is float32"
    assert rows["1/gelu"]["why"].startswith("its result, fp(4,3,4) and its gradient ")
    assert rows["2/linear"]["why"] == "it reads 1/gelu, which is float32"
    assert rows["loss/mse_loss"]["why"] == "not known to sum in float32 when its operands are 16-bit"


def test_show_writes_what_each_graph_pass_changes(here):
    run("search", "mine.py:task", "--low-ratio", "1", "-o", "p.json")
    run("show", "p.json", "--log-passes", "passes.json", "--task", "mine.py:task")
    found = json.loads((here / "passes.json").read_text())
    assert [each["name"] for each in found["eager"]] == [
        "mark",
        "pack",
        "accumulate",
        "narrow_products",
        "fuse_scales",
        "fuse_scales",
    ]
    assert {each["name"] for each in found["inductor"]} > {
        "reuse_grids",
        "keep_in_backward",
        "inline_casts",
        "overwrite",
    }
    assert found["eager"][0]["added"]["mark_tensor"] > 3


def test_what_is_stored_can_be_chosen_and_is_shown(here, capsys, monkeypatch):
    store = ["--optimizer-states", "bf16", "--gradients", "bf16"]
    run("run", "mine.py", "--low-ratio", "0", *store, "-o", "p.json", "--json", "run.json")
    tensors = json.loads((here / "p.json").read_text())["tensors"]
    assert tensors["0.weight.optim.momentum_buffer"]["format"] == tensors["0.weight.grad.stored"]["format"] == "bf16"
    found = json.loads((here / "run.json").read_text())
    run("run", "mine.py", "--low-ratio", "0", "-o", "w.json", "--json", "wide.json")
    wide = json.loads((here / "wide.json").read_text())
    for figure in ("predicted_peak_bytes", "measured_peak_bytes"):
        assert found["plan"][figure] < wide["plan"][figure]
        assert found["baseline"][figure] == wide["baseline"][figure]
    run("search", "mine.py", "--strategy", "standalone", "--recipe", "fp16", "-o", "p.json", "--json", "search.json")
    assert "optimizer states" in run("estimate", "mine.py", "--plan", "p.json")
    run("train", "mine.py", "--plan", "p.json", "--update-rounding", "nearest")
    run("search", "mine.py", "--low-ratio", "0", "--master", "bf16", "--update-rounding", "kahan", "-o", "k.json")
    assert json.loads((here / "k.json").read_text())["update_rounding"] == "kahan"
    assert "kahan" in run("show", "k.json")
    assert "updates rounded kahan" in run("diff", "k.json", "p.json")
    run("train", "mine.py", "--plan", "k.json", "--json", "trained.json")
    run("estimate", "mine.py", "--plan", "k.json", "--json", "kept.json")
    run("estimate", "mine.py", "--plan", "k.json", "--update-rounding", "nearest", "--json", "given.json")
    kept, given = (json.loads((here / f"{name}.json").read_text()) for name in ("kept", "given"))
    assert kept != given
    assert "0.weight.master" in run("show", "p.json", "--all")
    run("search", "mine.py", "--low-ratio", "0", "--master", "bf16", "-o", "p.json")

    def error(*arguments):
        return fails(capsys, monkeypatch, "search", "mine.py", *arguments)

    assert "is not allowed for a master" in error("--low-ratio", "0", "--master", "e4m3")
    assert "no state can be stored in it" in error("--low-ratio", "0", "--optimizer-states", "dynamic8")
    assert "Choose the recipe bf16 or fp16" in error("--strategy", "standalone")
    assert "follows from the model alone" in error("--strategy", "standalone", "--recipe", "bf16", "--budget", "50%")


def test_what_waits_may_be_saved_in_blocks(here, capsys, monkeypatch):
    run("search", "mine.py", "--low-ratio", "0", "--saved", "int4:block64", "-o", "saved.json")
    tensors = json.loads((here / "saved.json").read_text())["tensors"]
    saved = {key: entry["format"] for key, entry in tensors.items() if key.endswith(".saved")}
    assert saved == dict.fromkeys(("0/linear.saved", "1/gelu.saved", "2/linear.saved"), "int4:block64")
    run("run", "mine.py", "--low-ratio", "0", "--saved", "mxfp4:sr", "--epochs", "1", "--json", "run.json")
    result = json.loads((here / "run.json").read_text())
    assert not result["plan"]["diverged"]
    assert math.isfinite(result["plan"]["loss"])
    assert "no saved activation takes fewer bytes" in fails(
        capsys, monkeypatch, "search", "mine.py", "--low-ratio", "0", "--saved", "fp32"
    )
    assert "For saved activations also: e4m3:block64" in fails(
        capsys, monkeypatch, "search", "mine.py", "--low-ratio", "0", "--saved", "int3"
    )


def test_noise_is_measured_kept_and_searched_by(here, capsys, monkeypatch):
    measure = ("noise", "mine.py:task", "--batches", "2", "--formats", "e4m3/e5m2", "-o", "noise.json")
    assert "2 batches" in run(*measure, "--json", "rows.json")
    rows = json.loads((here / "rows.json").read_text())
    assert [row["noise"] for row in rows] == sorted((row["noise"] for row in rows), reverse=True)
    assert {"e4m3", "e5m2", "bf16"} <= {row["format"] for row in rows}
    before = (here / "noise.json").read_text()
    run(*measure)
    assert (here / "noise.json").read_text() == before
    assert json.loads(before)["warm_up"] == 40
    run("train", "mine.py:task", "--epochs", "1", "--checkpoint", "c.pt")
    for more in (("--warm-up", "0"), ("--checkpoint", "c.pt")):
        run(*measure[:-1], "start.json", *more)
        assert json.loads((here / "start.json").read_text())["warm_up"] == 0
        (here / "start.json").unlink()
    assert ", 4 batches," in run(*measure[:1], "mine.py:task", "--until", "0", "--batches", "9", "-o", "all.json")

    search = ("search", "mine.py:task", "--low-ratio", "0.5", "--strategy", "milp")
    said = run(*search, "--noise", "noise.json", "--pin", "0.*=bf16", "-o", "pinned.json", "--json", "found.json")
    assert "predicted noise of the gradient" in said
    assert json.loads((here / "found.json").read_text())["optimality_gap"] < 1e-3
    assert json.loads((here / "pinned.json").read_text())["tensors"]["0.weight"]["format"] == "bf16"
    run("run", *search[1:], "--granularity", "tensor", "--epochs", "1", "-o", "own.json")
    assert json.loads((here / "own.noise.json").read_text())["method"] == "first-order"

    def error(*arguments):
        return fails(capsys, monkeypatch, *arguments)

    assert "the pin head.*=bf16 matches none" in error(*search, "--noise", "noise.json", "--pin", "head.*=bf16")
    assert "was not measured" in error(*search, "--noise", "noise.json", "--formats", "fp32,fp(3,2,3)")
    assert "another model" in error("search", "digits", "--low-ratio", "0.5", "--noise", "noise.json")
    assert "'greedy' does not take pins" in error("search", "mine.py:task", "--low-ratio", "0.5", "--pin", "*=bf16")


@pytest.mark.parametrize("width", [30, 60, 80, 200])
def test_bars_share_a_scale_and_never_wrap(width):
    table = new_table("", ["tensor", ""])
    for name, dark, light in (("a" * 30, 0.25, 0.75), ("b", 0.25, 0.0), ("c", 1.0, 1.0)):
        table.add_row(name, Bar(dark, light))
    console = Terminal(width=width, file=io.StringIO())
    console.print(table)
    rows = [line for line in console.file.getvalue().splitlines() if "█" in line]
    full = rows[2].count("█")
    assert full == {30: 12, 60: 27, 80: 30, 200: 30}[width]
    assert [(row.count("█"), row.count("░")) for row in rows] == [
        (round(full * 0.25), round(full * 0.75) - round(full * 0.25)),
        (round(full * 0.25), 0),
        (full, 0),
    ]
