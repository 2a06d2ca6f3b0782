"""Seconds of a step by choice, with a clock that counts nodes; and the plan of least noise that is fast enough."""

import copy
import itertools
import re
import zlib

import pytest
import torch
from contracts import FORMATS, HFP8, AllAtOnce, all_plans, chain, made_up_noise
from models import MLP, class_loss, vectors

import assign
from assign.errors import BudgetError, PlanError
from assign.plan.keys import grad_key
from assign.plan.latency_table import TimeTable, parse_step_time
from assign.plan.measured import Measured
from assign.plan.noise_table import Cell
from assign.plan.plan import Entry
from assign.plan.recipes import get_recipe
from assign.plan.space import SearchSpace
from assign.planner import search_table
from assign.strategies.greedy import greedy
from assign.strategies.milp import Milp


class Ticks:
    """A clock that goes on by one whenever it is asked: every node takes one second; the first ones take longer."""

    def __init__(self):
        self.now, self.asked = 0.0, 0

    def __call__(self):
        self.asked += 1
        self.now += 1.0 if self.asked > 50 else 1000.0
        return self.now


@pytest.fixture(scope="module")
def step():
    torch.manual_seed(0)
    model, batch = MLP(), vectors()
    return model, batch, assign.trace(model, batch, class_loss)


@pytest.fixture(scope="module")
def ticks(step):
    table = step[2]
    return assign.measure_times(table, repeats=1, clock=Ticks())


def test_rounding_takes_nodes_of_its_own_forward_and_backward(step, ticks):
    """bf16 between bf16 takes no node but the operator's; 8 bits take three to scale and round, two to keep a copy."""
    _, _, table = step
    native = get_recipe("native")
    more = {}
    for row in table.paper_tensors:
        pair = native.candidates(row)
        high, low = (ticks.seconds[Cell(row.key, fmt.name)] for fmt in (pair.hi, pair.lo))
        assert high >= 0
        more[row.key] = low - high
    # logits in bf16 are converted for a log_softmax in float32, its gradient for what is before it: bf16 saves one each
    saved = {key: more.pop(key) for key in ("loss/log_softmax", "loss/log_softmax.grad")}
    assert set(saved.values()) == {-1}
    assert min(more.values()) >= 0
    assert [ticks.seconds[Cell("/tanh", name)] for name in ("bf16", "e4m3:pow2")] == [1, 1 + 3 + 2]


def test_every_node_counts_once(step, graphs):
    """The seconds of all tensors and the rest are the nodes of the graphs that run."""
    model, batch, table = step
    plan = search_table(table, low_ratio=1.0)
    times = assign.measure_times(table, repeats=2, clock=Ticks())
    assign.planned_step(copy.deepcopy(model), class_loss, plan, backend="eager")(batch).backward()
    nodes = [node for graph in graphs for node in graph.graph.nodes if node.op not in ("placeholder", "output")]
    by_key = times.of({row.key: plan.entries[row.key] for row in table.paper_tensors})
    assert len(nodes) - 3 <= by_key + times.rest <= len(nodes)  # but for casts that a neighbour's format brings
    assert times.rest == 4  # views and casts of the loss's own, under no tensor's name


def test_a_step_with_a_branch_is_timed_more_than_once(step):
    """Each run follows the one before, which holds the operators after the branch already."""
    model, batch, _ = step

    def branching_loss(model, batch):
        result = model(batch[0])
        return torch.nn.functional.cross_entropy(result * 2 if result.sum() > 1e9 else result, batch[1])

    times = assign.measure_times(model, batch, branching_loss, repeats=2, clock=Ticks())
    assert any(cell.key == "loss/log_softmax" for cell in times.seconds)


def test_the_model_stays_as_it_is(step):
    model, batch, _ = step
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()

    def noisy_loss(model, batch):
        return class_loss(model, (torch.nn.functional.dropout(batch[0]), *batch[1:]))

    assign.measure_times(model, batch, noisy_loss, repeats=1, clock=Ticks())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_pins_and_copies_in_blocks_are_timed(step, ticks):
    table = step[2]
    more = assign.measure_times(
        table,
        repeats=1,
        clock=Ticks(),
        space=SearchSpace(pins={"*": "e5m2"}, saved=["int4:block64"]),
    )
    assert all(Cell(row.key, "e5m2") in more.seconds for row in table.paper_tensors)
    assert more.seconds[Cell("/tanh.saved", "int4:block64")] == 2 + 1  # to pack, to unpack, and a visible mark
    assert more.seconds[Cell("/tanh", "bf16")] == ticks.seconds[Cell("/tanh", "bf16")]


def seconds_of(entries):
    """Made up: fewer bits take longer, by a factor of the tensor's own."""
    cost = {"fp32": 1.0, "bf16": 0.4, "fp(3,2,3)": 3.0}
    return sum((1 + zlib.crc32(key.encode()) % 7) * cost[entry.format] for key, entry in entries.items())


def fastest(table, *, most, pins=(), **goals):
    strategy = Milp(
        noise=made_up_noise,
        timeline=AllAtOnce(table),
        formats=FORMATS,
        granularity="tensor",
        seconds=seconds_of,
        other_seconds=2.0,
        max_seconds=most,
        pins=dict(pins),
    )
    return strategy(table, recipe=HFP8, peak_bytes=AllAtOnce(table), **goals)


@pytest.mark.parametrize("with_budget", [False, True])
def test_no_plan_of_less_noise_is_fast_enough(with_budget):
    table = chain(8, 24)
    peak = AllAtOnce(table)
    found = [(made_up_noise(plan), seconds_of(plan) + 2.0, peak(plan)) for plan in all_plans(table, FORMATS)]
    budget = sorted(bytes_ for _, _, bytes_ in found)[len(found) // 2] if with_budget else None
    limits = sorted({seconds for _, seconds, _ in found})[:: max(1, len(found) // 60)]
    noises = []
    for most in limits:
        best = min((n for n, s, b in found if s <= most and (budget is None or b <= budget)), default=None)
        if best is None:
            continue
        plan = fastest(table, most=most, budget_bytes=budget)
        assert seconds_of(plan) + 2.0 <= most * (1 + 1e-6)
        assert made_up_noise(plan) == pytest.approx(best, rel=1e-5)
        noises.append(best)
    assert len(set(noises)) > 1
    assert all(after <= before for before, after in itertools.pairwise(noises))


def test_the_greedy_plan_counts_only_where_it_is_fast_enough():
    table = chain(8, 64, 64, 1, 32)
    asked = {"recipe": HFP8, "peak_bytes": AllAtOnce(table), "low_ratio": 0.4}
    by_greedy = greedy(table, **asked)

    def one_second(entries):
        return float(sum(by_greedy.get(key) == entry for key, entry in entries.items()))

    strategy = Milp(
        noise=lambda entries: -one_second(entries) + 100,  # the greedy plan is the best there is
        timeline=AllAtOnce(table),
        seconds=one_second,
        max_seconds=len(by_greedy) - 1.0,
    )
    assert one_second(strategy(table, **asked)) <= len(by_greedy) - 1


def test_too_little_time_names_the_least():
    table = chain(8, 24)
    least = min(seconds_of(plan) for plan in all_plans(table, FORMATS)) + 2.0
    assert seconds_of(fastest(table, most=least)) + 2.0 == pytest.approx(least)
    with pytest.raises(BudgetError, match=f"takes {least:.4g} s"):
        fastest(table, most=least - 0.1)
    key = table.paper_tensors[0].key
    slower = least + seconds_of({key: Entry("fp(3,2,3)", True)}) - seconds_of({key: Entry("bf16", True)})
    with pytest.raises(BudgetError, match=f"takes {slower:.4g} s"):
        fastest(table, most=slower - 0.1, pins={key: "fp(3,2,3)"})


def test_a_budget_that_only_slower_steps_meet_says_what_each_allows():
    table = chain(8, 24)
    fewest = min(map(AllAtOnce(table), all_plans(table, FORMATS)))
    most = min(map(seconds_of, all_plans(table, FORMATS))) + 4.0  # fp(3,2,3), the narrowest, is the slowest
    with pytest.raises(BudgetError, match=r"each can be met alone, but not both") as error:
        fastest(table, most=most, budget_bytes=fewest)
    enough = float(re.search(r"\(([0-9.]+) s are enough", str(error.value))[1])
    assert AllAtOnce(table)(fastest(table, most=enough, budget_bytes=fewest)) == fewest
    assert AllAtOnce(table)(fastest(table, most=most, budget_bytes=error.value.floor)) == error.value.floor
    with pytest.raises(BudgetError, match="not both"):
        fastest(table, most=most, budget_bytes=error.value.floor - 1)
    with pytest.raises(BudgetError, match="the fewest bytes a training step still needs"):
        fastest(table, most=enough, budget_bytes=fewest - 1)


def test_a_limit_in_words():
    assert parse_step_time("200ms", 9.0) == 0.2
    assert parse_step_time("0.5 s", 9.0) == parse_step_time(0.5, 9.0) == 0.5
    assert parse_step_time("1.5x", 2.0) == 3.0
    for wrong in ("fast", "-1s", "0", "1.5 min"):
        with pytest.raises(BudgetError, match="not a limit"):
            parse_step_time(wrong, 1.0)


def test_a_search_within_a_time(step, ticks):
    model, batch, table = step
    noise = assign.measure_noise(table)
    measured = Measured(noise=noise, times=ticks)
    asked = {"strategy": "milp", "measured": measured, "low_ratio": 0.3, "space": SearchSpace(granularity="tensor")}
    free = search_table(table, **asked).provenance.estimate
    high = ticks.of(search_table(table, low_ratio=0.0).entries) + ticks.rest
    limit = (free["step_seconds"] + high) / 2
    tight = search_table(table, max_step_time=limit, **asked).provenance.estimate
    assert high < tight["step_seconds"] <= limit < free["step_seconds"]
    assert tight["noise"] > free["noise"]
    assert search_table(table, max_step_time="9x", **asked).provenance.estimate["noise"] == free["noise"]
    plan = assign.search(model, batch, class_loss, strategy="milp", noise=noise, max_step_time="9x")
    assert not any(entry.low for entry in plan.entries.values())


def test_what_is_refused(step, ticks):
    model, batch, table = step
    with pytest.raises(
        BudgetError, match=r"'greedy' does not take max_step_time.\n  max_step_time requires one of the strategies milp"
    ):
        search_table(table, low_ratio=0.5, max_step_time="2x", measured=Measured(times=ticks))
    noise = assign.measure_noise(table)
    with pytest.raises(PlanError, match="but no times"):
        search_table(table, low_ratio=0.5, strategy="milp", measured=Measured(noise=noise), max_step_time="2x")
    other = TimeTable(fingerprint="other", seconds={})
    with pytest.raises(PlanError, match="another model"):
        search_table(
            table, low_ratio=0.5, strategy="milp", measured=Measured(noise=noise, times=other), max_step_time="2x"
        )
    with pytest.raises(PlanError, match="1 or more"):
        assign.measure_times(model, batch, class_loss, repeats=0)
    key = grad_key(next(iter(table.paper_tensors)).key)
    with pytest.raises(PlanError, match="were not measured"):
        ticks.of({key: Entry("mxfp8", True)})
