"""One compiled piece for batches of different sizes.

A piece is recorded with the sizes of its batch as plain numbers. If it is recorded again with other numbers, those that
differ are replaced by expressions of the sizes of its inputs, and it is compiled once more, for any sizes. Expressions
are found from two batches only. Every later batch is therefore checked against them, and compiled separately if they do
not hold.
"""

import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from torch import Tensor, fx

from assign import _torch


class What(StrEnum):
    """What an integer in a graph is: a size, a stride or an argument."""

    SIZE = "size"
    STRIDE = "stride"
    ARGUMENT = "argument"


class Number(NamedTuple):
    """An integer in a graph: the size or stride of an axis of a placeholder, or an argument of an operator.

    ``rank`` is the index of the axis, or of the integer among the arguments.
    """

    node: fx.Node
    what: What
    rank: int
    value: int


_SMALLEST = 2
"""A compiler treats sizes of 0 and 1 as special cases."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """A number of the graph as ``factor × the sizes at these positions + offset``."""

    factor: int
    sizes: tuple[int, ...]
    offset: int

    def of(self, numbers: Sequence[int]) -> int:
        """Return its value for these numbers."""
        result = self.factor
        for position in self.sizes:
            result *= numbers[position]
        return result + self.offset


@dataclass(slots=True, kw_only=True)
class Sizes:
    """Which numbers of a graph vary, and how they depend on the sizes of its inputs.

    Attributes:
        numbers: the numbers of the batch for which it was compiled.
        varying: positions of the input sizes that vary.
        implied: positions of the strides that vary; they depend on the sizes.
        products: position → the expression for the number there.
        guard: the compiler's assumptions on the sizes; filled in after compilation.
    """

    numbers: tuple[int, ...]
    varying: tuple[int, ...] = ()
    implied: tuple[int, ...] = ()
    products: dict[int, Product] = field(default_factory=dict)
    guard: _torch.SizeGuard | None = None

    def allow(self, numbers: tuple[int, ...], inputs: Sequence[Tensor]) -> bool:
        """Whether the compiled code also computes a graph with these numbers."""
        if numbers == self.numbers:
            return True
        if not self.varying or any(numbers[position] < _SMALLEST for position in self.varying):
            return False
        free = {*self.varying, *self.implied}
        same = all(
            position in free or (self.products[position].of(numbers) if position in self.products else mine) == number
            for position, (mine, number) in enumerate(zip(self.numbers, numbers, strict=True))
        )
        return same and (self.guard is None or self.guard(inputs))


def compare(found: Sequence[Number], before: Sequence[int]) -> Sizes | None:
    """Return how the numbers of a graph vary, compared with those of another batch; None if that is not possible."""
    numbers = tuple(number.value for number in found)
    different = [place for place, (a, b) in enumerate(zip(before, numbers, strict=True)) if a != b]
    varying, implied, arguments = ([place for place in different if found[place].what is what] for what in What)
    if any(min(before[place], numbers[place]) < _SMALLEST for place in varying):
        return None
    sources = list({(before[place], numbers[place]): place for place in reversed(varying)}.values())
    products = {}
    for place in arguments:
        product = _product((before[place], numbers[place]), sources, before, numbers)
        if product is None:
            return None
        products[place] = product
    return Sizes(numbers=numbers, varying=tuple(varying), implied=tuple(implied), products=products)


def _product(
    wanted: tuple[int, int], sources: Sequence[int], before: Sequence[int], now: Sequence[int]
) -> Product | None:
    """Return the simplest product of sizes that has the values ``wanted``, i.e. the one with the smallest offset."""
    found = []
    for count in (1, 2):
        for chosen in itertools.combinations_with_replacement(sources, count):
            plain = Product(factor=1, sizes=chosen, offset=0)
            first, second = plain.of(before), plain.of(now)
            if first == second or (wanted[1] - wanted[0]) % (second - first):
                continue
            factor = (wanted[1] - wanted[0]) // (second - first)
            found.append(Product(factor=factor, sizes=chosen, offset=wanted[0] - factor * first))
    return min(found, key=lambda each: (abs(each.offset), abs(each.factor), len(each.sizes)), default=None)


def generalized(
    graph: fx.Graph, numbers: Sequence[Number], sizes: Sizes, inputs: Sequence[Tensor]
) -> tuple[fx.Graph, dict[fx.Node, fx.Node], list[Any], _torch.FakeTensorMode]:
    """Return the graph for any sizes.

    Args:
        graph: graph of a piece, with the sizes of one step.
        numbers: the integers in it, in order.
        sizes: which of them vary, and of which sizes they are products.
        inputs: inputs of the graph, in the order of its placeholders.
    Returns:
        A graph, a map from the nodes of the old graph to its nodes, its inputs (without data if their sizes vary), and
            the mode to which these belong.
    """
    mode = _torch.symbolic_mode()
    varying = [numbers[position] for position in sizes.varying]
    placeholders = graph.find_nodes(op="placeholder")
    values: dict[fx.Node, Any] = {}
    examples: list[Any] = []
    result, twins = fx.Graph(), dict[fx.Node, fx.Node]()
    for place, (node, tensor) in enumerate(zip(placeholders, inputs, strict=True)):
        dynamic = [number.rank for number in varying if number.node is node]
        without_data = _torch.symbolic(mode, tensor, dynamic, f"input_{place}")
        examples.append(without_data if dynamic else tensor)
        twins[node] = result.node_copy(node)
        values[twins[node]] = _torch.as_example(mode, without_data, node.meta["example_value"])
    read: dict[int, fx.Node] = {}
    for position in sorted({place for product in sizes.products.values() for place in product.sizes}):
        read[position] = result.call_method("size", (twins[numbers[position].node], numbers[position].rank))
    made: dict[Product, fx.Node] = {}
    replaced: dict[fx.Node, dict[int, fx.Node]] = {}
    for position, product in sizes.products.items():
        if product not in made:
            made[product] = _expression(result, product, read)
        replaced.setdefault(numbers[position].node, {})[numbers[position].rank] = made[product]
    for node in graph.nodes:
        if node.op == "placeholder":
            continue
        twin = twins[node] = result.node_copy(node, twins.__getitem__)
        if node in replaced:
            twin.args, twin.kwargs = _with_numbers((twin.args, twin.kwargs), replaced[node].get, itertools.count())
    _torch.attach_examples(result, values, mode)
    return result, twins, examples, mode


def _expression(graph: fx.Graph, product: Product, sizes: dict[int, fx.Node]) -> fx.Node:
    first, *others = product.sizes
    node = sizes[first]
    for position in others:
        node = graph.call_function(operator.mul, (node, sizes[position]))
    if product.factor != 1:
        node = graph.call_function(operator.mul, (node, product.factor))
    return graph.call_function(operator.add, (node, product.offset)) if product.offset else node


def arguments_of(node: fx.Node) -> list[Number]:
    """Return the integers among the arguments of a node."""
    found: list[Number] = []

    def note(rank: int, value: int) -> int:
        found.append(Number(node, What.ARGUMENT, rank, value))
        return value

    _with_numbers((node.args, node.kwargs), note, itertools.count())
    return found


def axes_of(node: fx.Node, x: Tensor) -> list[Number]:
    """Return the sizes of ``x``, the value of a placeholder, and its strides unless they follow from the sizes."""
    sizes = [Number(node, What.SIZE, axis, size) for axis, size in enumerate(x.shape)]
    strides = () if x.is_contiguous() else x.stride()
    return [*sizes, *(Number(node, What.STRIDE, axis, stride) for axis, stride in enumerate(strides))]


def _with_numbers(values: Any, change: Callable[[int, int], Any], rank: Iterator[int]) -> Any:
    """Return the same arguments with ``change(rank, integer)`` in place of each integer."""
    if isinstance(values, (tuple, list)):
        parts = [_with_numbers(each, change, rank) for each in values]
        return type(values)(parts) if type(values) in (tuple, list) else tuple(parts)
    if isinstance(values, dict):
        return {key: _with_numbers(each, change, rank) for key, each in values.items()}
    if isinstance(values, slice):
        return slice(*(_with_numbers(each, change, rank) for each in (values.start, values.stop, values.step)))
    return change(next(rank), values) if type(values) is int else values


__all__ = ["Number", "Sizes", "arguments_of", "axes_of", "compare", "generalized"]
