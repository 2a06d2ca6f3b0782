"""Hand-written tables, the two CIFAR models of the paper's accounting, and what every strategy keeps to."""

import itertools
import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
from scipy.sparse import csr_array

from assign.errors import BudgetError
from assign.formats.parsing import parse_format
from assign.plan.grouping import assign_groups
from assign.plan.keys import grad_key
from assign.plan.plan import Entry
from assign.plan.recipes import RECIPES, Recipe, get_recipe, initial
from assign.plan.table import Role, TensorInfo, TensorTable
from assign.strategies import MILP, STRATEGIES, Strategy
from assign.strategies.milp import Milp

BATCH = 128


class Rows:
    """Writes the rows of a model, operator by operator, as the tracer would; every tensor with its gradient."""

    def __init__(self) -> None:
        self.rows: list[TensorInfo] = []
        self.shapes: dict[str, tuple[int, ...]] = {}

    def add(self, key: str, role: Role, shape: tuple[int, ...], op: str, **more: object) -> str:
        elements = 1
        for size in shape:
            elements *= size
        gradient = Role.WEIGHT_GRAD if role is Role.WEIGHT else Role.ACTIVATION_GRAD
        self.shapes[key] = shape
        for name, each in ((key, role), (grad_key(key), gradient)):
            links = more if each is role else {}
            self.rows.append(
                TensorInfo(key=name, role=each, shape=shape, elements=elements, dtype="float32", op=op, **links)
            )
        return key

    def op(
        self, op: str, shape: tuple[int, ...], *inputs: str, name: str = "", weights: tuple[tuple[int, ...], ...] = ()
    ) -> str:
        """An operator with its own weights (keys ``name.0``, ``name.1``, …); returns the key of its output."""
        key = f"{name or len(self.rows)}/{op}"
        names = [
            self.add(f"{key}.{i}", Role.WEIGHT, size, "parameter", consumers=(key,)) for i, size in enumerate(weights)
        ]
        return self.add(key, Role.ACTIVATION, shape, op, inputs=(*inputs, *names))

    def input(self, *shape: int) -> str:
        return self.op("input", shape)

    def conv(
        self, x: str, channels: int, kernel: int, *, stride: int = 1, bias: bool = False, norm: bool = True
    ) -> str:
        _, before, height, width = self.shapes[x]
        shape = (BATCH, channels, height // stride, width // stride)
        weights = ((channels, before, kernel, kernel), *([(channels,)] if bias else []))
        y = self.op("conv2d", shape, x, weights=weights)
        return self.op("batch_norm", shape, y, weights=((channels,), (channels,))) if norm else y

    def same(self, op: str, *inputs: str) -> str:
        return self.op(op, self.shapes[inputs[0]], *inputs)

    def pool(self, op: str, x: str, size: int) -> str:
        *outer, height, width = self.shapes[x]
        return self.op(op, (*outer, height // size, width // size), x)

    def loss(self, x: str) -> str:
        """The loss, of which the paper counts one element per sample."""
        return self.op("nll_loss", (BATCH,), x)

    def table(self) -> TensorTable:
        return TensorTable(tensors=assign_groups(self.rows))


def resnet18(classes: int = 10) -> TensorTable:
    """ResNet-18 in its CIFAR form, batch 128, as the paper's accounting sees it."""
    rows = Rows()
    x = rows.same("relu", rows.conv(rows.input(BATCH, 3, 32, 32), 64, 3))
    for channels, first_stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        for stride in (first_stride, 1):
            y = rows.same("relu", rows.conv(x, channels, 3, stride=stride))
            y = rows.conv(y, channels, 3)
            if rows.shapes[x] != rows.shapes[y]:
                x = rows.conv(x, channels, 1, stride=stride)
            x = rows.same("relu", rows.same("add", y, x))
    x = rows.pool("avg_pool2d", x, 4)
    x = rows.op("linear", (BATCH, classes), x, weights=((classes, 512), (classes,)))
    rows.loss(rows.same("log_softmax", x))
    return rows.table()


def squeezenet(classes: int = 10) -> TensorTable:
    """SqueezeNet in its CIFAR form, batch 128, as the paper's accounting sees it."""
    rows = Rows()
    x = rows.same("relu", rows.conv(rows.input(BATCH, 3, 32, 32), 96, 3, bias=True))
    x = rows.pool("max_pool2d", x, 2)
    fires = ((16, 64), (16, 64), (32, 128), None, (32, 128), (48, 192), (48, 192), (64, 256), None, (64, 256))
    for fire in fires:
        if fire is None:
            x = rows.pool("max_pool2d", x, 2)
            continue
        squeeze, expand = fire
        x = rows.same("relu", rows.conv(x, squeeze, 1, bias=True))
        left, right = rows.conv(x, expand, 1, bias=True), rows.conv(x, expand, 3, bias=True)
        batch, channels, *size = rows.shapes[left]
        x = rows.same("relu", rows.op("cat", (batch, 2 * channels, *size), left, right))
    x = rows.conv(x, classes, 1, bias=True, norm=False)
    x = rows.same("log_softmax", rows.pool("avg_pool2d", x, 4))
    rows.loss(x)
    return rows.table()


def chain(*sizes: int) -> TensorTable:
    """An input and one linear operator after another; sizes of the outputs, no biases."""
    rows = Rows()
    x = rows.input(sizes[0])
    for size in sizes[1:]:
        x = rows.op("linear", (size,), x, weights=((size,),))
    return rows.table()


TABLES: Mapping[str, Callable[[], TensorTable]] = {
    "one": lambda: chain(8),
    "chain": lambda: chain(8, 64, 64, 1, 32),
    "falling": lambda: chain(100, 50, 20, 10, 5),
    "resnet18": resnet18,
}


LOSSY = "fp(2,1,1)"


def made_up_noise(entries: Mapping[str, Entry]) -> float:
    """Grows by 4 with every bit less, and differs between tensors."""
    found = 0.0
    for key, entry in entries.items():
        fmt = parse_format(entry.format)
        found += (1 + zlib.crc32(key.encode()) % 97) * 4.0**-fmt.mantissa_bits if fmt.name != "fp32" else 0.0
    return found


class AllAtOnce:
    """A memory model for tests: all tensors at once. Called, it gives the peak."""

    def __init__(self, table: TensorTable) -> None:
        self.rows = {row.key: row for row in table.paper_tensors}

    def __call__(self, entries: Mapping[str, Entry]) -> int:
        return int(self.at(entries).max())

    def bytes_of(self, key: str, entry: Entry) -> int:
        return self.rows[key].elements * parse_format(entry.format).bits // 8

    def at(self, entries: Mapping[str, Entry]) -> np.ndarray:
        return np.array([sum(self.bytes_of(key, entry) for key, entry in entries.items())])

    def steps(self, entries: Mapping[str, Entry], changes: Sequence[Mapping[str, Entry]]) -> csr_array:
        rows = [np.diff(self.at({**entries, **change}) - self.at(entries), prepend=0) for change in changes]
        return csr_array(np.array(rows, dtype=np.int64))


class GroupByGroup(AllAtOnce):
    """Another: one group at a time, so that most demotions do not move the peak."""

    def at(self, entries: Mapping[str, Entry]) -> np.ndarray:
        sizes: dict[int, int] = {}
        for key, row in self.rows.items():
            sizes[row.group] = sizes.get(row.group, 0) + self.bytes_of(key, entries[key])
        return np.array([sizes[group] for group in sorted(sizes)])


def milp(table: TensorTable, *, peak_bytes: AllAtOnce, **goals: object) -> dict[str, Entry]:
    """As the others are called: with noise that is made up."""
    return Milp(noise=made_up_noise, timeline=peak_bytes)(table, peak_bytes=peak_bytes, **goals)


CONTRACTED = {**STRATEGIES, MILP: milp}


def low_ratio(table: TensorTable, entries: Mapping[str, Entry]) -> float:
    """Share of the elements that are low."""
    rows = table.paper_tensors
    return sum(row.elements for row in rows if entries[row.key].low) / sum(row.elements for row in rows)


@pytest.mark.parametrize("strategy", CONTRACTED.values(), ids=CONTRACTED.keys())
@pytest.mark.parametrize("table", [make() for make in TABLES.values()], ids=TABLES.keys())
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
class StrategyContract:
    """What every registered strategy promises; see ``assign.strategies.Strategy``."""

    def everything_low(self, table: TensorTable, recipe: Recipe) -> dict[str, Entry]:
        return initial(table, recipe, {row.group for row in table.paper_tensors})

    def test_every_key_once_and_only_candidates(self, strategy: Strategy, table: TensorTable, recipe: Recipe) -> None:
        found = strategy(table, recipe=recipe, peak_bytes=AllAtOnce(table), low_ratio=0.5)
        assert sorted(found) == sorted(row.key for row in table.paper_tensors)
        for row in table.paper_tensors:
            pair, entry = recipe.candidates(row), found[row.key]
            assert entry.format == (pair.lo if entry.low else pair.hi).name

    def test_a_group_is_of_one_kind(self, strategy: Strategy, table: TensorTable, recipe: Recipe) -> None:
        found = strategy(table, recipe=recipe, peak_bytes=AllAtOnce(table), low_ratio=0.5)
        kinds = {(row.group, found[row.key].low) for row in table.paper_tensors}
        assert len(kinds) == len({row.group for row in table.paper_tensors})

    @pytest.mark.parametrize("ratio", [0, 0.1, 0.5, 0.9, 1])
    def test_reaches_the_low_ratio(self, strategy: Strategy, table: TensorTable, recipe: Recipe, ratio: float) -> None:
        found = strategy(table, recipe=recipe, peak_bytes=AllAtOnce(table), low_ratio=ratio)
        reached = low_ratio(table, found)
        assert reached >= ratio
        assert reached in (0, 1) if ratio in (0, 1) else True

    @pytest.mark.parametrize("model", [AllAtOnce, GroupByGroup])
    @pytest.mark.parametrize("share", [0, 0.3, 1])
    def test_keeps_to_the_budget(
        self, strategy: Strategy, table: TensorTable, recipe: Recipe, share: float, model: Callable
    ) -> None:
        peak = model(table)
        least, most = peak(self.everything_low(table, recipe)), peak(initial(table, recipe))
        budget = round(least + share * (most - least))
        found = strategy(table, recipe=recipe, peak_bytes=peak, budget_bytes=budget)
        assert peak(found) <= budget
        if share == 1:
            assert low_ratio(table, found) == 0

    def test_keeps_to_both_goals(self, strategy: Strategy, table: TensorTable, recipe: Recipe) -> None:
        peak = AllAtOnce(table)
        budget = (peak(self.everything_low(table, recipe)) + peak(initial(table, recipe))) // 2
        for ratio in (0.1, 0.9):
            found = strategy(table, recipe=recipe, peak_bytes=peak, low_ratio=ratio, budget_bytes=budget)
            assert peak(found) <= budget
            assert low_ratio(table, found) >= ratio

    def test_says_the_floor(self, strategy: Strategy, table: TensorTable, recipe: Recipe) -> None:
        peak = AllAtOnce(table)
        floor = peak(self.everything_low(table, recipe))
        with pytest.raises(BudgetError, match=rf"\b{floor} bytes") as caught:
            strategy(table, recipe=recipe, peak_bytes=peak, budget_bytes=floor - 1)
        assert str(floor - 1) in str(caught.value)

    def test_is_deterministic(self, strategy: Strategy, table: TensorTable, recipe: Recipe) -> None:
        peak = AllAtOnce(table)
        budget = (peak(self.everything_low(table, recipe)) + peak(initial(table, recipe))) // 2
        once, again = (
            strategy(table, recipe=recipe, peak_bytes=peak, budget_bytes=budget, seed=seed) for seed in (7, 7)
        )
        assert once == again
        assert list(once) == list(again)

    def test_rejects_senseless_goals(self, strategy: Strategy, table: TensorTable, recipe: Recipe) -> None:
        for goal in ({}, {"low_ratio": 1.5}, {"low_ratio": float("nan")}, {"budget_bytes": 0}):
            with pytest.raises(BudgetError):
                strategy(table, recipe=recipe, peak_bytes=AllAtOnce(table), **goal)


HFP8 = get_recipe("hfp8")
FORMATS = ("fp32", "bf16", "fp(3,2,3)")


def all_plans(table, formats):
    keys = [row.key for row in table.paper_tensors]
    for names in itertools.product(formats, repeat=len(keys)):
        yield {key: Entry(name, name != formats[0]) for key, name in zip(keys, names, strict=True)}
