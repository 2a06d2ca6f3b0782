"""Fronts of plans: searched between floor and top, kept in a directory, picked from by budget."""

import dataclasses
import itertools

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import assign
from assign import Front, search_front
from assign.errors import BudgetError, PlanError
from assign.memory.estimate import peak_bytes
from assign.pareto import find_front
from assign.plan.measured import Measured
from assign.plan.plan import Assignment
from assign.planner import Request, find_plan, search_table
from assign.strategies.goal import Goal


def make_table(rows=512):
    widths = (16, 32, 48, 64, 4)
    layers = [layer for sizes in itertools.pairwise(widths) for layer in (nn.Linear(*sizes), nn.GELU())]
    model = nn.Sequential(*layers[:-1])
    batch = torch.randn(rows, 16), torch.randn(rows, 4)
    return assign.trace(model, batch, lambda model, batch: mse_loss(model(batch[0]), batch[1]))


@pytest.fixture(scope="module")
def table():
    return make_table()


@pytest.fixture(scope="module")
def front(table):
    return search_front(table, 12)


def peaks(front):
    return [plan.provenance.estimate["peak_bytes"] for plan in front.plans]


def test_from_the_floor_to_the_top_and_each_plan_better_than_the_one_before(table, front):
    with pytest.raises(BudgetError) as refused:
        search_table(table, budget=1)
    assert peaks(front)[0] == refused.value.floor
    assert peaks(front)[-1] == search_table(table, low_ratio=0.0).provenance.estimate["peak_bytes"]
    ratios = [plan.provenance.estimate["low_ratio"] for plan in front.plans]
    assert peaks(front) == sorted(set(peaks(front)))
    assert ratios == sorted(set(ratios), reverse=True)
    assert 3 <= len(front.plans) <= 12


def test_budgets_lie_at_equal_distances_from_the_floor_on(table, front, monkeypatch):
    asked = []

    def spy(table, request, measured):
        asked.append(request.goal.budget)
        return find_plan(table, request, measured)

    monkeypatch.setattr("assign.pareto.find_plan", spy)
    search_front(table, 5)
    floor, top = peaks(front)[0], peaks(front)[-1]
    assert asked[:2] == [None, 1]  # the top, and what asks for the floor
    assert asked[2:] == [floor + (top - floor) * quarter // 4 for quarter in range(4)]


def test_a_plan_that_costs_no_fewer_bytes_and_is_no_better_is_left_out(table, front):
    class Flat:  # noise that is always the same: only the lowest peak is worth its bytes
        def check(self, _table):
            pass

        def of(self, _entries):
            return 1.0

    assert peaks(search_front(table, 12, measured=Measured(noise=Flat()))) == peaks(front)[:1]


def test_saved_loaded_and_picked(table, front, tmp_path):
    paths = front.save(tmp_path / "plans")
    assert [path.name for path in paths] == [f"plan-{number:02}.json" for number in range(1, len(paths) + 1)]
    again = Front.load(tmp_path / "plans")
    assert again == front
    for number, peak in enumerate(peaks(front)):
        assert again.pick(table, peak) == front.plans[number]
    assert again.pick(table, peaks(front)[0] - 1) is None
    assert again.pick(table, "100%") == front.plans[-1]


def test_a_front_that_cannot_be_written_whole_leaves_nothing(front, tmp_path, monkeypatch):
    saved, save = [], Assignment.save

    def fail_late(plan, path):
        if len(saved) == len(front.plans) - 1:
            raise PlanError("the disk is full")
        saved.append(path)
        save(plan, path)

    monkeypatch.setattr(Assignment, "save", fail_late)
    with pytest.raises(PlanError, match="full"):
        front.save(tmp_path / "front")
    assert len(saved) >= 1
    assert [*(tmp_path / "front").iterdir()] == []


def test_another_batch_size_is_counted_anew(front):
    larger = make_table(rows=5120)
    picked = front.pick(larger, peak_bytes(larger, front.plans[0].entries))
    assert picked == front.plans[0]
    assert front.pick(larger, peaks(front)[-1]) is None


def test_what_is_refused(table, front, tmp_path):
    with pytest.raises(BudgetError, match="2 or more"):
        search_front(table, 1)
    with pytest.raises(BudgetError, match="all budgets"):
        find_front(table, 3, Request(goal=Goal(budget="50%")), Measured())
    with pytest.raises(BudgetError, match="makes one plan"):
        search_front(table, 3, strategy="operator")
    with pytest.raises(PlanError, match="no plans in"):
        Front.load(tmp_path / "none")
    front.save(tmp_path / "plans")
    with pytest.raises(PlanError, match="already contains files"):
        front.save(tmp_path / "plans")
    with pytest.raises(PlanError, match="is a file"):
        front.save(tmp_path / "plans" / "plan-01.json")
    dataclasses.replace(front.plans[0], fingerprint="other").save(tmp_path / "plans" / "plan-99.json")
    with pytest.raises(PlanError, match="different models"):
        Front.load(tmp_path / "plans")
    other = assign.trace(nn.Linear(16, 4), torch.randn(8, 16), lambda model, x: model(x).sum())
    with pytest.raises(PlanError, match="does not fit this model"):
        front.pick(other, "100%")
