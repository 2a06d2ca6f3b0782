"""The benchmark of steps: who runs beside whom, what is compared with what, and processes that fail."""

import itertools
import json
import time

import pytest

from benchmarks import bench_step, draw_steps
from benchmarks.bench_step import beside, schedule, summary
from benchmarks.steps.processes import FEWEST_STEPS, run_group

NAMES = ["a", "b", "c", "d", "e"]
JOB = {"model": "gpt2", "device": "cpu", "threads": 1, "seed": 0, "small": True, "batch": None, "data": None}


def test_every_group_has_the_baseline():
    assert list(schedule(NAMES, 1, 2)) == [(0, ["a", "b", "c"]), (0, ["a", "d", "e"])]
    assert list(schedule(NAMES, 2, 9)) == [(0, NAMES), (1, NAMES[::-1])]
    assert list(schedule(NAMES[:1], 1, 4)) == [(0, ["a"])]


def test_alone_the_baseline_runs_first_and_last():
    assert list(schedule(NAMES, 1, 0)) == [*((0, [name]) for name in NAMES), (1, ["a"])]
    assert list(schedule(["a", "b"], 2, 0)) == [(0, ["a"]), (0, ["b"]), (1, ["b"]), (1, ["a"])]


def run(group, *seconds):
    return {"group": group, "seconds": seconds, "median_seconds": sorted(seconds)[len(seconds) // 2]} | {
        "compile_seconds": 9.0 - group,
        "peak_bytes": 10,
    }


def test_the_ratio_is_that_over_the_baseline_of_the_same_group():
    base = [run(0, 1.0, 1.0, 1.0), run(1, 5.0, 5.0, 9.0)]
    assert beside(base, [run(1, 10.0)])["time"] == 5.0
    assert beside(base, [run(0, 2.0), run(1, 10.0)])["time"] == 3.0
    both = summary(base)
    assert (both["drift"], both["compile_seconds"], both["again"]) == (5.0, 9.0, 8.0)
    assert summary([{"status": "failed", "reason": "…"}]) is None


@pytest.mark.slow
def test_processes_that_fail_leave_the_others_alone(tmp_path):
    jobs = [{**JOB, "configuration": name} for name in ("fp32", "nonsense", "autocast", "float8-torchao")]
    said = []
    found = run_group(tmp_path, jobs, steps=FEWEST_STEPS + 2, tell=said.append)
    assert [each["status"] for each in found] == ["ok", "failed", "ok", "skipped"]
    assert "KeyError: 'nonsense'" in found[1]["reason"]
    assert "GPU" in found[3]["reason"]
    assert len(said) == 4
    for each in (found[0], found[2]):
        assert len(each["seconds"]) == FEWEST_STEPS + 2
        assert each["peak_bytes"] > each["state_bytes"] > 0
        assert all(after < before for before, after in itertools.pairwise(each["losses"]))
    (short,) = run_group(tmp_path, jobs[:1], steps=50, step_seconds=0.0)
    assert FEWEST_STEPS <= len(short["seconds"]) < 50
    late = run_group(tmp_path, jobs[:1], steps=1, deadline=time.monotonic() + 0.2)
    assert late == [{"status": "failed", "reason": "the total time was over"}]
    assert run_group(tmp_path, jobs[:1], steps=1, limit=0.2)[0]["reason"].startswith("no answer")


@pytest.mark.slow
def test_a_run_writes_and_draws_what_it_found(tmp_path, monkeypatch, capsys):
    output = tmp_path / "step.json"
    arguments = ["bench_step.py", "--small", "--models", "gpt2", "--configs", "fp32", "bf16-eager", "--rounds", "1"]
    monkeypatch.setattr(bench_step, "FIRST", "fp32")  # nothing is compiled
    monkeypatch.setattr(bench_step, "BASELINE", "eager fp32")
    monkeypatch.setattr("sys.argv", [*arguments, "--threads", "1", "--steps", "5", "--output", str(output)])
    bench_step.main()
    found = json.loads(output.read_text())
    assert [(r["configuration"], r["status"], r["group"]) for r in found["runs"]] == [
        ("fp32", "ok", 0),
        ("bf16-eager", "ok", 0),
    ]
    assert "| plan: all bf16, eager |" in capsys.readouterr().out
    monkeypatch.setattr(draw_steps, "FIRST", "fp32")
    rows = draw_steps.bars([found, found], "gpt2")
    assert {row["name"]: row["ours"] for row in rows} == {"eager fp32": False, "plan: all bf16, eager": True}
    base, ours = (next(row for row in rows if row["ours"] is which) for which in (False, True))
    assert base["ratio"] == 1.0
    assert ours["ratio"] == pytest.approx(ours["seconds"] / base["seconds"])
