"""The accumulators of formats in a step, forward and backward."""

import copy

import pytest
import torch
from helpers import assert_same, everything, squares, traced
from torch import Tensor, nn

import assign
from assign.executor.apply import planned_step
from assign.numerics.accumulate import multiply
from assign.numerics.rounding import quantize
from assign.plan.compute_dtype import operators
from assign.plan.plan import Entry

ops = torch.ops.assign


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.fc = nn.Linear(4 * 16, 3)

    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).flatten(1))


def by_hand(model: Net, batch: Tensor, name: str) -> list[Tensor]:
    """The gradients of all parameters, with products and sums as the format says."""

    def r(x):
        return quantize(x, name, saturate=False)

    x, w, b = r(batch), r(model.conv.weight), r(model.conv.bias)
    geometry = ([1, 1, 1, 1, 1, 1, 0, 0], False, 1)
    conv = r(ops.accumulated_convolution(x, w, b, *geometry, name))
    hidden = torch.relu(conv)
    out = multiply(hidden.flatten(1), r(model.fc.weight).T, name, bias=r(model.fc.bias))
    grad = r(r(r(torch.ones(())) / out.numel()).expand_as(out))  # of the mean
    d_out = r(grad * (2 * out))
    d_fc = multiply(d_out.T, hidden.flatten(1), name)
    d_hidden = multiply(d_out, r(model.fc.weight), name).view_as(conv)
    d_conv = r(torch.where(conv > 0, d_hidden, 0.0))
    d_w = r(ops.accumulated_gradient(d_conv, x, w, *geometry, True, name))
    d_b = r(ops.accumulated_sum(d_conv, [0, 2, 3], False, name))
    return [d_w, d_b, d_fc, r(ops.accumulated_sum(d_out, [0], False, name))]


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["posit(8,1):quire", "posit(16,1):quire", "posit(8,1):noquire"])
def test_every_product_and_sum_of_a_step(name, backend):
    torch.manual_seed(0)
    model, batch = Net(), torch.randn(2, 2, 4, 4)
    plan = everything(traced(model, batch, squares), name)
    planned = copy.deepcopy(model)
    planned_step(planned, squares, plan, backend=backend)(batch).backward()
    for ours, wanted in zip(planned.parameters(), by_hand(model, batch, name), strict=True):
        assert_same(ours.grad, wanted)


@pytest.mark.parametrize("way", ["quire", "noquire"])
def test_which_operators_are_replaced(way, graphs):
    model, batch = Net(), torch.randn(2, 2, 4, 4)
    plan = everything(traced(model, batch, squares), f"posit(8,1):{way}")
    planned_step(model, squares, plan, backend="eager")(batch).backward()
    found = [str(node.target) for graph in graphs for node in graph.graph.nodes if "accumulated" in str(node.target)]
    short = sorted(name.removeprefix("assign.accumulated_").removesuffix(".default") for name in found)
    assert short == ["convolution", "gradient", "product", "product", "product", "sum", "sum"]


def test_only_what_has_an_accumulator_is_replaced(graphs):
    model, batch = Net(), torch.randn(2, 2, 4, 4)
    plan = everything(traced(model, batch, squares), "posit(8,1)")
    planned_step(model, squares, plan, backend="eager")(batch).backward()
    assert not [node for graph in graphs for node in graph.graph.nodes if "accumulated" in str(node.target)]
    graphs.clear()
    plan = plan.replace({"conv.weight.grad": Entry("posit(16,1):quire", False)})
    planned_step(model, squares, plan, backend="eager")(batch).backward()
    found = [node for graph in graphs for node in graph.graph.nodes if "accumulated" in str(node.target)]
    assert [(node.target, node.args[-2]) for node in found] == [(ops.accumulated_gradient.default, True)]


def test_a_plan_says_what_its_products_are_computed_in():
    model, batch = Net(), torch.randn(2, 2, 4, 4)
    table = traced(model, batch, squares)
    for name, dtype in (("posit(8,1):quire", "float64"), ("posit(8,1)", "bfloat16")):
        plan = everything(table, name)
        assert {each.op: each.multiplies for each in operators(table, plan.entries)}["linear"] == dtype


def test_saved_activations_are_the_codes_of_the_plain_format(graphs):
    model, batch = Net(), torch.randn(2, 2, 4, 4)
    plan = everything(traced(model, batch, squares), "posit(8,1):quire")
    planned_step(model, squares, plan, backend="eager")(batch).backward()
    codes = [node for node in graphs[0].graph.nodes if node.target is ops.encode.default]
    assert codes
    assert {node.meta["val"].dtype for node in codes} == {torch.uint8}
    assert assign.Assignment.from_json(plan.to_json()).entries == plan.entries


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.left, self.right = nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        return self.left(hidden) * self.right(hidden)


def test_each_product_in_a_gradient_with_two_readers_has_the_accumulator(graphs):
    model, batch = Twice(), torch.randn(4, 6)
    plan = everything(traced(model, batch, squares), "posit(8,1):quire")
    planned_step(model, squares, plan, backend="eager")(batch).backward()
    plain = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, ops.product.default)
    left = [node for graph in graphs for node in graph.graph.nodes if node.target in plain]
    assert left == []
