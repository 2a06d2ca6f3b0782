"""Strategies: the contract for all of them, then the greedy one against the paper and against exhaustive search."""

import itertools
from collections.abc import Callable, Mapping

import pytest
from contracts import AllAtOnce, GroupByGroup, StrategyContract, chain, low_ratio, resnet18, squeezenet
from hypothesis import given
from hypothesis import strategies as st

from assign.errors import AssignError, BudgetError, FormatError
from assign.plan.keys import grad_key
from assign.plan.plan import Entry
from assign.plan.recipes import get_recipe, initial
from assign.plan.table import Group, Role, TensorTable
from assign.strategies import METHODS, STRATEGIES, get_method
from assign.strategies.baselines import operator_based, uniform, uniform_in
from assign.strategies.greedy import Order, demotion_order, greedy

HFP8 = get_recipe("hfp8")
SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=6)


class TestContract(StrategyContract):
    """Every registered strategy."""


def refuse(entries: Mapping[str, Entry]) -> int:
    raise AssertionError("a search without a budget has no need of the memory model")


def low_groups(table: TensorTable, entries: Mapping[str, Entry]) -> set[int]:
    return {info.group for info in table.paper_tensors if entries[info.key].low}


@pytest.mark.parametrize(
    ("model", "ratio", "groups", "by_elements", "by_bits"),
    [
        (resnet18, 0.0, 0, 0, 0),
        (resnet18, 0.1, 1, 0.1238, 0.1237),
        (resnet18, 0.3, 3, 0.3402, 0.3399),
        (resnet18, 0.5, 5, 0.5257, 0.5253),
        (resnet18, 0.7, 9, 0.7447, 0.7429),
        (resnet18, 0.9, 15, 0.9191, 0.9073),
        (resnet18, 1.0, 22, 1, 0.9794),
        (squeezenet, 0.1, 1, 0.2295, None),
        (squeezenet, 0.5, 4, 0.5298, None),
        (squeezenet, 0.9, 15, 0.9128, None),
        (squeezenet, 1.0, 27, 1, 0.998),
    ],
)
def test_greedy_is_the_papers(
    model: Callable[[], TensorTable], ratio: float, groups: int, by_elements: float, by_bits: float | None
) -> None:
    # From a run of the authors' own accounting, to the digits given there: half a unit of the last is the tolerance.
    table = model()
    found = greedy(table, recipe=HFP8, peak_bytes=refuse, low_ratio=ratio)
    assert len(low_groups(table, found)) == groups
    assert low_ratio(table, found) == pytest.approx(by_elements, abs=5e-5)
    bits = AllAtOnce(table)
    if by_bits is not None:
        assert 2 * (1 - bits(found) / bits(initial(table, HFP8))) == pytest.approx(by_bits, abs=1e-4)


def test_everything_low_is_exactly_1() -> None:
    table = resnet18()
    assert low_ratio(table, uniform(table, recipe=HFP8, peak_bytes=refuse, low_ratio=1)) == 1.0
    assert low_ratio(table, uniform(table, recipe=HFP8, peak_bytes=refuse, low_ratio=0)) == 0.0


def test_orders() -> None:
    groups = [Group(id=i, elements=n, keys=()) for i, n in enumerate((5, 9, 5, 1, 9))]
    order = {name: [group.id for group in demotion_order(groups[::-1], name, 3)] for name in Order}
    assert order[Order.LARGEST] == [1, 4, 0, 2, 3]
    assert order[Order.SMALLEST] == [3, 0, 2, 1, 4]
    assert sorted(order[Order.RANDOM]) == [0, 1, 2, 3, 4]
    others = [[group.id for group in demotion_order(groups, Order.RANDOM, seed)] for seed in range(10)]
    assert len({tuple(each) for each in others}) > 1
    assert [group.id for group in demotion_order(groups, Order.RANDOM, 3)] == order[Order.RANDOM]


def test_ratio_is_tested_before_a_group_is_added() -> None:
    table = chain(10, 10, 10, 10)
    shares = [group.elements / table.elements for group in demotion_order(table.groups, Order.LARGEST, 0)]
    assert shares == [2 / 7, 2 / 7, 2 / 7, 1 / 7]
    counts = [
        len(low_groups(table, greedy(table, recipe=HFP8, peak_bytes=refuse, low_ratio=ratio)))
        for ratio in (0, 1e-9, 2 / 7, 2 / 7 + 1e-9, 6 / 7, 1)
    ]
    assert counts == [0, 1, 1, 2, 3, 4]


def subsets(table: TensorTable) -> list[frozenset[int]]:
    ids = [group.id for group in table.groups]
    return [frozenset(some) for n in range(len(ids) + 1) for some in itertools.combinations(ids, n)]


@given(sizes=SIZES, ratio=st.floats(0, 1))
def test_no_set_of_fewer_groups_reaches_the_ratio(sizes: list[int], ratio: float) -> None:
    table = chain(*sizes)
    found = low_groups(table, greedy(table, recipe=HFP8, peak_bytes=refuse, low_ratio=ratio))
    fewest = min(len(low) for low in subsets(table) if low_ratio(table, initial(table, HFP8, low)) >= ratio)
    assert len(found) == fewest


@given(
    sizes=SIZES, share=st.floats(0, 1), order=st.sampled_from(Order), model=st.sampled_from([AllAtOnce, GroupByGroup])
)
def test_trimmed_search_demotes_nothing_in_vain(sizes: list[int], share: float, order: Order, model: Callable) -> None:
    table = chain(*sizes)
    peak = model(table)
    peaks = {low: peak(initial(table, HFP8, low)) for low in subsets(table)}
    budget = round(min(peaks.values()) + share * (max(peaks.values()) - min(peaks.values())))
    found = low_groups(table, greedy(table, recipe=HFP8, peak_bytes=peak, budget_bytes=budget, order=order))
    assert peaks[frozenset(found)] <= budget
    assert not [low for low in peaks if low < found and peaks[low] <= budget]


def test_trim_restores_what_did_not_move_the_peak() -> None:
    table = chain(100, 50, 40, 30)  # smallest first goes through all groups before the widest one
    peak = GroupByGroup(table)
    budget = peak(initial(table, HFP8)) - 1
    options = {"recipe": HFP8, "peak_bytes": peak, "budget_bytes": budget, "order": Order.SMALLEST}
    widest = max(table.groups, key=lambda group: group.elements).id
    assert low_groups(table, greedy(table, **options)) == {widest}
    assert low_groups(table, greedy(table, **options, trim=False)) == {group.id for group in table.groups}


def test_trim_leaves_what_the_ratio_asked_for() -> None:
    table = chain(100, 50, 40, 30)
    peak = GroupByGroup(table)
    options = {"recipe": HFP8, "peak_bytes": peak, "order": Order.SMALLEST}
    for_ratio = low_groups(table, greedy(table, **options, low_ratio=0.2))
    for_both = low_groups(table, greedy(table, **options, low_ratio=0.2, budget_bytes=peak(initial(table, HFP8)) - 1))
    assert for_ratio
    assert for_both == for_ratio | {max(table.groups, key=lambda group: group.elements).id}


def test_memory_model_is_asked_at_most_twice_per_group() -> None:
    table = chain(*range(1, 30))
    asked = []

    def peak(entries: Mapping[str, Entry]) -> int:
        asked.append(entries)
        return GroupByGroup(table)(entries)

    floor = peak(initial(table, HFP8, {group.id for group in table.groups}))
    asked.clear()
    greedy(table, recipe=HFP8, peak_bytes=peak, budget_bytes=floor)
    assert len(asked) <= 2 * len(table.groups)


def test_infeasible_budget_says_what_was_asked_the_floor_and_what_to_do() -> None:
    table = chain(2**20, 2**20)
    with pytest.raises(BudgetError) as caught:
        greedy(table, recipe=HFP8, peak_bytes=lambda entries: 3 * 2**20, budget_bytes=2**20)
    assert str(caught.value) == (
        "the budget is 1048576 bytes (1.0 MiB), but even with all 2 groups of tensors low a training step still needs "
        "3145728 bytes (3.0 MiB) at its peak.\n"
        "  Ask for at least 3145728 bytes, make the batch smaller, choose a recipe with narrower low formats, or "
        "store less between steps: narrower optimizer states, gradients or masters."
    )


def test_senseless_goals_say_what_is_allowed() -> None:
    def message(**goal: object) -> str:
        with pytest.raises(BudgetError) as caught:
            greedy(chain(4, 4), recipe=HFP8, peak_bytes=refuse, **goal)
        return str(caught.value)

    assert "needs a goal" in message()
    assert "the low ratio is -0.1; it is a share of the elements, from 0 to 1" in message(low_ratio=-0.1)
    assert "the budget is -5 bytes; give a positive number" in message(budget_bytes=-5)


def test_table_without_tensors() -> None:
    empty = TensorTable(tensors=())
    assert greedy(empty, recipe=HFP8, peak_bytes=refuse, low_ratio=1) == {}
    assert uniform(empty, recipe=HFP8, peak_bytes=refuse, low_ratio=1) == {}


def test_uniform_in_one_format() -> None:
    table = chain(4, 4)
    entries = uniform_in(table, "FP(4, 3, 4)", low=True)
    assert entries == {info.key: Entry("fp(4,3,4)", True) for info in table.paper_tensors}
    with pytest.raises(FormatError, match="e4m9"):
        uniform_in(table, "e4m9")


@pytest.mark.parametrize(
    ("model", "classes", "ratio"),
    [(resnet18, 10, 0.27913), (resnet18, 100, 0.27905), (squeezenet, 10, 0.17337), (squeezenet, 100, 0.17313)],
)
def test_operator_based_is_the_papers(model: Callable[[int], TensorTable], classes: int, ratio: float) -> None:
    # From a run of the authors' own accounting.
    table = model(classes)
    found = operator_based(table, HFP8)
    assert low_ratio(table, found) == pytest.approx(ratio, abs=5e-6)
    assert found.keys() == {info.key for info in table.paper_tensors}


@pytest.mark.parametrize(("model", "ratio"), [(resnet18, 0.2791), (squeezenet, 0.1528)])
def test_operator_based_with_gradients_that_follow(model: Callable[[], TensorTable], ratio: float) -> None:
    table = model()
    found = operator_based(table, HFP8, gradients_follow=True)
    assert low_ratio(table, found) == pytest.approx(ratio, abs=5e-5)
    for info in table.tensors:
        if info.role is Role.ACTIVATION:
            assert found[info.key].low == found[grad_key(info.key)].low


def test_unknown_strategy_names_the_nearest() -> None:
    assert get_method("greedy") is METHODS["greedy"]
    assert METHODS["greedy"].search is STRATEGIES["greedy"]
    with pytest.raises(AssignError, match=r"no strategy 'gredy'; choose from .*greedy.*Did you mean 'greedy'"):
        get_method("gredy")
