"""The integer program: against exhaustive search on small tables, on traced models, and its pins, gap and errors."""

import contextlib
import itertools
import random

import numpy as np
import pytest
import torch
from contracts import FORMATS, HFP8, LOSSY, TABLES, AllAtOnce, GroupByGroup, all_plans, chain, made_up_noise
from helpers import adamw
from hypothesis import given, settings
from hypothesis import strategies as st
from models import GPT, MLP, ResNet, class_loss, images, tokens, vectors

from assign import search
from assign.errors import AssignError, BudgetError, PlanError
from assign.memory.deltas import RunningPeak, Timeline
from assign.memory.estimate import peak_bytes
from assign.noise.measure import measure_noise
from assign.noise.options import NoiseOptions
from assign.plan.keys import is_saved_key
from assign.plan.measured import Measured
from assign.plan.plan import Entry
from assign.plan.recipes import candidates_of, get_recipe, initial, save
from assign.plan.space import Granularity, SearchSpace, parse_pins, split_names
from assign.plan.table import PAPER_ROLES
from assign.planner import completion, search_table
from assign.strategies.greedy import greedy
from assign.strategies.milp import Milp
from assign.tracing.tracer import trace


def solve(table, timeline, **options):
    goal = {name: options.pop(name) for name in ("budget_bytes", "low_ratio") if name in options}
    recipe, solutions = options.pop("recipe", HFP8), []
    strategy = Milp(noise=made_up_noise, timeline=timeline, on_solution=solutions.append, **options)
    plan = strategy(table, recipe=recipe, peak_bytes=timeline, **goal)
    return plan, solutions[0]


class Waves(AllAtOnce):
    """Moments at which different tensors are alive, by a table of zeros and ones."""

    def __init__(self, table, alive):
        super().__init__(table)
        self.alive = np.array(alive, dtype=np.int64)

    def at(self, entries):
        sizes = np.array([self.bytes_of(key, entry) for key, entry in entries.items()])
        return self.alive[:, : len(sizes)] @ sizes


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=2),
    share=st.floats(0, 1),
    alive=st.lists(st.lists(st.integers(0, 1), min_size=8, max_size=8), min_size=1, max_size=5),
)
def test_no_plan_of_less_noise_fits(sizes, share, alive):
    table = chain(*sizes)
    keys = len(table.paper_tensors)
    timeline = Waves(table, [row[:keys] for row in alive])
    found = [(made_up_noise(plan), timeline(plan)) for plan in all_plans(table, FORMATS)]
    lowest, highest = min(peak for _, peak in found), max(peak for _, peak in found)
    budget = max(1, round(lowest + share * (highest - lowest)))
    best = min((noise for noise, peak in found if peak <= budget), default=None)
    if best is None:
        return
    plan, said = solve(table, timeline, formats=FORMATS, granularity="tensor", budget_bytes=budget)
    assert timeline(plan) <= budget
    assert made_up_noise(plan) == pytest.approx(best, rel=1e-5)
    assert said.noise == made_up_noise(plan)
    assert said.gap <= 1e-5


@pytest.mark.parametrize("model", [AllAtOnce, GroupByGroup])
@pytest.mark.parametrize("table", [make() for make in TABLES.values()], ids=TABLES.keys())
def test_more_bytes_never_more_noise(table, model):
    peak = model(table)
    most, least = (peak({row.key: Entry(name, False) for row in table.paper_tensors}) for name in FORMATS[::2])
    budgets = [round(least + share * (most - least)) for share in (0, 0.15, 0.3, 0.45, 0.6, 0.8, 1)]
    noises = [solve(table, peak, formats=FORMATS, budget_bytes=budget)[1].noise for budget in budgets]
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(noises))


MODELS = {"mlp": (MLP, vectors), "resnet": (ResNet, images), "gpt": (GPT, tokens)}


@pytest.fixture(scope="module", params=MODELS)
def measured(request):
    make, batch = MODELS[request.param][0](), MODELS[request.param][1]()
    table = trace(make, batch, class_loss)
    noise = measure_noise(table, space=SearchSpace(recipe="hfp8", saved=["int4:block64"]))
    return table, noise


@pytest.mark.parametrize("granularity", Granularity)
def test_never_noisier_than_greedy_in_as_many_bytes(measured, granularity):
    table, noise = measured
    peak = Timeline(table)
    high, low = (
        peak_bytes(table, greedy(table, recipe=HFP8, peak_bytes=lambda _: 0, low_ratio=ratio)) for ratio in (0, 1)
    )
    before, gained = float("inf"), False
    for share in (0.0, 0.3, 0.6, 1.0):
        budget = round(low + share * (high - low))
        plans = [
            search_table(table, budget=budget, strategy=name, measured=Measured(noise=noise), space=space)
            for name, space in (("greedy", "hfp8"), ("milp", SearchSpace(recipe="hfp8", granularity=granularity)))
        ]
        by_greedy, by_milp = (plan.provenance.estimate["noise"] for plan in plans)
        assert peak.at(plans[1].entries).max() == peak_bytes(table, plans[1].entries) <= budget
        assert by_milp <= by_greedy
        assert by_milp <= before * (1 + 1e-6)  # more bytes never more noise
        assert 0 <= plans[1].provenance.estimate["optimality_gap"] < 1
        before, gained = by_milp, gained or by_milp < by_greedy
    assert gained or len(table.paper_tensors) < 30  # the MLP leaves little to choose


@pytest.mark.parametrize("saved", [None, "int4:block64"])
def test_bytes_of_one_change_are_those_of_a_whole_replay(measured, saved):
    table, _ = measured

    def complete(entries):
        return {**entries, **(save(table, entries, saved) if saved else {})}

    timeline, names = Timeline(table, complete), ("fp32", "bf16", "fp16", "e4m3:pow2", "fp(4,3,4)")
    rows = table.paper_tensors
    changes = [{row.key: Entry(names[(i * 7 + 3) % 5], True)} for i, row in enumerate(rows)]
    changes += [{key: Entry("e4m3:pow2", True) for key in group.keys} for group in table.groups]
    for base in (
        {row.key: Entry("bf16", False) for row in rows},
        {row.key: Entry(names[i % 3], False) for i, row in enumerate(rows)},
    ):
        steps = timeline.steps(base, changes).toarray().cumsum(axis=1)
        before = timeline.at(base)
        for change, effect in zip(changes, steps, strict=True):
            assert (timeline.at({**base, **change}) - before == effect).all()
        assert steps.any()


@pytest.mark.parametrize("granularity", Granularity)
def test_copies_are_chosen_one_by_one_or_group_by_group(measured, granularity):
    """No noisier than with all copies narrow or none, in as many bytes; at plenty of bytes none is narrow."""
    table, noise = measured
    asked = {"measured": Measured(noise=noise), "strategy": "milp"}
    space = SearchSpace(recipe="hfp8", granularity=granularity)
    copying = SearchSpace(recipe="hfp8", granularity=granularity, saved="int4:block64")
    every = search_table(table, **asked, low_ratio=1.0, space=copying)
    none = search_table(table, **asked, low_ratio=0.0, space=space)
    low, high = (peak_bytes(table, plan.entries) for plan in (every, none))
    some = 0
    for share in (0.0, 0.4, 0.8, 1.0):
        budget = round(low + share * (high - low))
        plan = search_table(table, **asked, budget=budget, space=copying)
        assert peak_bytes(table, plan.entries) <= budget
        assert plan.provenance.estimate["noise"] == pytest.approx(noise.of(plan.entries))
        for saved in (None, "int4:block64"):
            with contextlib.suppress(BudgetError):
                by_greedy = search_table(
                    table,
                    space=SearchSpace(recipe="hfp8", saved=saved or ()),
                    measured=Measured(noise=noise),
                    budget=budget,
                )
                assert plan.provenance.estimate["noise"] <= by_greedy.provenance.estimate["noise"]
        copies = {key for key in plan.entries if key.endswith(".saved")}
        assert all(key in every.entries for key in copies)
        some += bool(copies) and not plan.provenance.estimate["by_greedy"]
    assert not copies
    narrow = {**none.entries, **save(table, none.entries, "int4:block64")}
    assert some or peak_bytes(table, narrow) == high  # an MLP's peak is its weights


def test_copies_of_pinned_tensors_are_chosen_too(measured):
    table, noise = measured
    high = {row.key: HFP8.candidates(row).hi.name for row in table.paper_tensors}
    pinned = search_table(table, space="hfp8", measured=Measured(noise=noise), strategy="milp", low_ratio=0.0)
    copies = save(table, pinned.entries, "int4:block64")
    least, most = peak_bytes(table, {**pinned.entries, **copies}), peak_bytes(table, pinned.entries)
    budget = (least + most) // 2
    space = SearchSpace(recipe="hfp8", pins=high, granularity="tensor", saved="int4:block64")
    plan = search_table(table, strategy="milp", budget=budget, space=space, measured=Measured(noise=noise))
    assert peak_bytes(table, plan.entries) <= budget
    assert (
        sum(map(is_saved_key, plan.entries)) in range(1, len(copies)) or least == most
    )  # an MLP's peak is its weights
    assert {key: entry.format for key, entry in plan.entries.items() if not key.endswith(".saved")} == high
    with pytest.raises(BudgetError, match="'greedy' does not take more than one format for saved activations"):
        search_table(table, space=SearchSpace(recipe="hfp8", saved="int4:block64,int8:block64"), budget=budget)


def test_saved_copies_count_in_bytes_and_noise(measured):
    table, noise = measured
    spaces = (SearchSpace(recipe="hfp8"), SearchSpace(recipe="hfp8", saved="int4:block64"))
    options = {"low_ratio": 0.5, "strategy": "milp", "measured": Measured(noise=noise)}
    plain, saved = (search_table(table, space=space, **options) for space in spaces)
    assert any(key.endswith(".saved") for key in saved.entries)
    assert saved.provenance.estimate["noise"] == pytest.approx(noise.of(saved.entries))
    assert saved.provenance.estimate["noise"] != plain.provenance.estimate["noise"]


def test_where_bytes_do_not_add_up_the_true_ones_decide():
    table = chain(40, 30, 20)

    class TooGood(AllAtOnce):
        """Every change looks as if it saved twice as much as it does."""

        def steps(self, entries, changes):
            return super().steps(entries, changes) * 2

    timeline = TooGood(table)
    high = timeline({row.key: Entry(FORMATS[0], False) for row in table.paper_tensors})
    plan, said = solve(table, timeline, formats=FORMATS, granularity="tensor", budget_bytes=high // 2)
    assert timeline(plan) <= high // 2
    assert 1 < said.rounds < 10


def test_pins_hold_and_a_pin_that_matches_nothing_is_an_error():
    table = chain(40, 30, 20)
    timeline = AllAtOnce(table)
    key = table.paper_tensors[3].key
    pins = {"*": "fp32", key: "bf16"}
    plan, said = solve(table, timeline, pins=pins, low_ratio=0)
    assert {name for k, name in plan.items() if k != key} == {Entry("fp32", False)}
    assert plan[key].format == "bf16"
    assert said.decisions == 0
    with pytest.raises(PlanError, match=r"the pin head.\*=bf16 matches none of the 10 tensors"):
        solve(table, timeline, pins={"head.*": "bf16"}, low_ratio=0)
    with pytest.raises(BudgetError, match=r"no more than 0\.000000 of the elements can be low"):
        solve(table, timeline, pins={"*": "fp32"}, low_ratio=0.5)
    with pytest.raises(BudgetError, match="even with all 0 decisions for the fewest bytes"):
        solve(table, timeline, pins={"*": "fp32"}, budget_bytes=8)
    assert parse_pins(["head.*=bf16", "a=b=fp32"]) == {"head.*": "bf16", "a=b": "fp32"}
    with pytest.raises(PlanError, match="'bf16' is not a pin"):
        parse_pins(["bf16"])


def test_more_than_two_formats_and_pairs_of_them():
    table = chain(8, 4)
    candidates = candidates_of(table, HFP8, split_names("bf16, e4m3:pow2/e5m2:pow2,fp(4,3,4)"))
    by_role = {row.role: [fmt.name for fmt in candidates[row.key]] for row in table.paper_tensors}
    assert by_role["weight"] == by_role["activation"] == ["bf16", "e4m3:pow2", "fp(4,3,4)"]
    assert by_role["weight_grad"] == by_role["activation_grad"] == ["bf16", "e5m2:pow2", "fp(4,3,4)"]
    timeline = AllAtOnce(table)
    high = timeline({row.key: Entry("fp32", False) for row in table.paper_tensors})
    chosen = set()
    for budget in (high // 4, high // 3, high * 2 // 3):
        plan, _ = solve(table, timeline, formats=FORMATS, granularity="tensor", budget_bytes=budget)
        chosen |= {entry.format for entry in plan.values()}
    assert chosen == set(FORMATS)


def test_in_python_noise_is_measured_where_none_is_given():
    model, batch = MLP(), vectors()
    plan = search(model, batch, class_loss, low_ratio=0.5, strategy="milp", space=SearchSpace(granularity="tensor"))
    assert plan.provenance.estimate["low_ratio"] >= 0.5
    assert plan.provenance.estimate["noise"] > 0
    table = trace(model, batch, class_loss)
    with pytest.raises(AssignError, match="no noise was given"):
        search_table(table, low_ratio=0.5, strategy="milp")
    with pytest.raises(BudgetError, match=r"'greedy' does not take pins.\n  pins requires one of the strategies milp"):
        search_table(table, low_ratio=0.5, space=SearchSpace(pins={"*": "bf16"}))
    with pytest.raises(PlanError, match="no granularity 'row'"):
        SearchSpace(granularity="row")


@pytest.mark.parametrize("goal", [{"low_ratio": 0.5}, {"budget": 1_000_000}], ids=str)
@pytest.mark.parametrize(
    "stored",
    [
        {"master": "bf16"},
        {"master": "bf16+8", "gradients": "bf16"},
        {"master": "bf16", "gradients": "bf16", "optimizer_states": "dynamic8"},
    ],
    ids=str,
)
def test_what_is_stored_between_steps_has_no_noise(stored, goal):
    torch.manual_seed(0)
    model, batch = MLP(256), vectors()
    table = trace(model, batch, class_loss, adamw)
    noise = measure_noise(model, [batch], class_loss, options=NoiseOptions(max_batches=1, warm_up=0))
    measured = Measured(noise=noise)
    plan = search_table(table, **goal, strategy="milp", space=SearchSpace(**stored), measured=measured)
    of_step = {key: entry for key, entry in plan.entries.items() if key in table.by_key and entry.format != "fp32"}
    of_step = {key: entry for key, entry in of_step.items() if table.by_key[key].role in PAPER_ROLES}
    assert plan.provenance.estimate["noise"] == pytest.approx(noise.of(of_step))
    assert any(key.endswith(".master") for key in plan.entries)


def test_low_formats_are_noisier():
    assert made_up_noise({"a": Entry("bf16", False)}) < made_up_noise({"a": Entry(LOSSY, False)})


@pytest.mark.parametrize("saved", [None, "int4:block64"])
@pytest.mark.parametrize("recipe", ["hfp8", "native"])
def test_a_running_peak_is_that_of_a_whole_replay(measured, recipe, saved):
    table, _ = measured
    complete, rules, draw = completion(table, SearchSpace(saved=saved or ())), get_recipe(recipe), random.Random(0)
    running, low = RunningPeak(table, complete), set()
    for step in range(40):
        low ^= set(draw.sample([group.id for group in table.groups], 1 + step % 2))
        entries = initial(table, rules, low)
        assert running(entries) == peak_bytes(table, complete(entries))
    fp32 = {key: Entry("fp32", False) for key in entries}
    key = next(iter(fp32))
    for plan in (fp32, {**fp32, key: Entry("bf16", True)}, fp32):  # one that packs no saved copy at all, and back
        assert running(plan) == peak_bytes(table, complete(plan))


@pytest.mark.parametrize("strategy", ["greedy", "milp"])
def test_the_floor_of_a_budget_that_cannot_be_met_can_be_met(measured, strategy):
    table, noise = measured
    with pytest.raises(BudgetError) as refused:
        search_table(table, budget=1, strategy=strategy, space="hfp8", measured=Measured(noise=noise))
    floor = refused.value.floor
    assert floor is not None
    plan = search_table(table, budget=floor, strategy=strategy, space="hfp8", measured=Measured(noise=noise))
    assert peak_bytes(table, plan.entries) <= floor
