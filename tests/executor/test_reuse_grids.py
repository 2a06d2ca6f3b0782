"""Roundings that change nothing are left out, and only those: values, gradients and codes stay bit for bit."""

import copy

import pytest
import torch
from helpers import all_low, everything, steps, traced
from models import MODELS, class_loss
from torch import nn

from assign.executor import pipeline
from assign.executor.apply import planned_step
from assign.executor.passes.pack import pack
from assign.executor.passes.reuse_grids import reuse_grids
from assign.numerics.promotion import Promotion
from assign.plan.plan import Assignment, Entry


@pytest.fixture
def dropped(monkeypatch):
    """The eager backend with the pass in it; how many roundings went, graph by graph."""
    counts = []

    def reuse(joint, context):
        roundings = {"op": "call_function", "target": torch.ops.assign.quantize.default}
        before = len(joint.graph.find_nodes(**roundings))
        reuse_grids(joint, context)
        counts.append(before - len(joint.graph.find_nodes(**roundings)))
        joint.graph.lint()
        return joint

    monkeypatch.setattr(pipeline, "JOINT", (pack, reuse, *pipeline.JOINT[1:]))
    return counts


@pytest.mark.parametrize("recipe", ["native", "hfp8"])
@pytest.mark.parametrize("name", MODELS)
def test_training_is_the_same_bit_for_bit(name, recipe, request):
    torch.manual_seed(0)
    make, make_batch = MODELS[name]
    model, batch = make(), make_batch()
    plan = all_low(traced(model, batch), recipe)
    twin = copy.deepcopy(model)
    expected = steps(model, planned_step(model, class_loss, plan, backend="eager"), batch, count=2)
    counts = request.getfixturevalue("dropped")
    losses, grads = steps(twin, planned_step(twin, class_loss, plan, backend="eager"), batch, count=2)
    assert losses == expected[0]
    for ours, theirs in zip(grads, expected[1], strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one, other)
    assert sum(counts) >= {"resnet": 12, "tied attention": 5, "dropout": 5}.get(name, 0)


class Picks(nn.Module):
    """One operator between a rounded product and the loss."""

    def __init__(self, operator):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-3, 3, 64).reshape(1, 1, 8, 8))
        self.operator = operator

    def forward(self, x):
        return self.operator(x * self.weight)


def total(model, batch):
    return (model(batch) ** 2).sum()


@pytest.mark.parametrize(
    ("operator", "count"),
    [
        (torch.relu, 2),  # forward, and the gradient of its operand
        (lambda x: nn.functional.max_pool2d(x, 2), 1),
        (lambda x: x.flatten()[:7], 1),
        (lambda x: -x, 2),
        (torch.nn.functional.gelu, 0),
        (lambda x: x * 2, 0),  # exact, but its own scale would be another
        (lambda x: x.clamp(max=0.3), 1),  # its gradient
        (lambda x: torch.where(x > 0, x, 0.3), 1),
    ],
)
def test_what_is_left_out(operator, count, dropped):
    torch.manual_seed(0)
    model, batch = Picks(operator), torch.randn(1, 1, 8, 8)
    plan = all_low(traced(model, batch, total))
    planned_step(model, total, plan, backend="eager")(batch).backward()
    assert dropped == [count]


def test_a_coarser_format_is_rounded_again(dropped):
    """The relu's own format is another: its mark stays."""
    model, batch = Picks(torch.relu), torch.randn(1, 1, 8, 8)
    table = traced(model, batch, total)
    plan = all_low(table, "hfp8")
    entries = {**plan.entries, "/relu": Entry("fp(3,1,0)", True)}
    plan = Assignment(entries=entries, recipe=plan.recipe, fingerprint=plan.fingerprint)
    planned_step(model, total, plan, backend="eager")(batch).backward()
    assert dropped == [1]  # the gradient of the relu's operand


def test_what_may_be_promoted_keeps_its_rounding(dropped):
    """Its overflow is counted there."""
    model, batch = Picks(torch.relu), torch.randn(1, 1, 8, 8)
    plan = all_low(traced(model, batch, total), "hfp8")
    promotion = Promotion(plan)
    planned_step(model, total, plan, backend="eager", promotion=promotion)(batch).backward()
    promotion.step()
    assert dropped == [1]  # a gradient
    assert "/relu" in promotion.overflow


@pytest.mark.parametrize("name", ["e4m3:amax", "e4m3:amax:delayed", "e4m3:pow2:delayed"])
def test_a_scale_that_could_be_any_other_is_the_tensors_own(name, dropped):
    """The grid of a smaller scale holds that of a larger one under powers of two alone."""
    model, batch = Picks(torch.relu), torch.randn(1, 1, 8, 8)
    plan = everything(traced(model, batch, total), name)
    planned_step(model, total, plan, backend="eager")(batch).backward()
    assert dropped == [0]
