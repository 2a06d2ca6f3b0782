"""Posits in a step: rounded tensors and gradients, saved activations, promotion, searches."""

import copy

import pytest
import torch
from helpers import assert_same, everything, rounded, squares, steps, traced
from models import MLP, ResNet, class_loss, images, vectors
from torch import nn

import assign
from assign import Promotion, SearchSpace
from assign.executor.apply import planned_step
from assign.numerics.dispatch import use_compiled
from assign.numerics.rounding import quantize
from assign.plan.plan import Entry


@pytest.mark.parametrize("name", ["posit(8,1)", "posit(16,1)", "posit(8,2):underflow"])
def test_each_tensor_and_each_gradient_is_rounded_once(name):
    """A step by hand, tensor by tensor; sums of products are float32, as in plain torch."""
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(8, 16)

    planned = copy.deepcopy(model)
    plan = everything(traced(model, batch, squares), name)
    planned_step(planned, squares, plan, backend="eager")(batch).backward()

    r = rounded(name)
    first, _, second = model
    hidden = r(torch.relu(r(nn.functional.linear(r(batch), r(first.weight), r(first.bias)))))
    out = r(nn.functional.linear(hidden, r(second.weight), r(second.bias)))
    r(r(out.square()).mean()).backward()
    for ours, theirs in zip(planned.parameters(), model.parameters(), strict=True):
        assert_same(ours.grad, theirs.grad)
        assert_same(quantize(ours.grad, name), ours.grad)


def test_saved_activations_take_the_bytes_of_their_codes(graphs):
    model, batch = MLP(), vectors()
    for name, dtype in (("posit(8,2)", torch.uint8), ("posit(16,2)", torch.int16)):
        graphs.clear()
        planned_step(model, class_loss, everything(traced(model, batch), name), backend="eager")(batch).backward()
        codes = [n for n in graphs[0].graph.nodes if n.target is torch.ops.assign.encode.default]
        assert codes
        assert {n.meta["val"].dtype for n in codes} == {dtype}


def test_a_saved_copy_may_be_a_posit_of_its_own(graphs):
    model, batch = MLP(), vectors()
    plan = assign.search(
        model, batch, class_loss, strategy="uniform", space=SearchSpace(formats="fp32", saved="posit(6,1)")
    )
    assert {entry.format for key, entry in plan.entries.items() if key.endswith(".saved")} == {"posit(6,1)"}
    planned_step(model, class_loss, plan, backend="eager")(batch).backward()
    codes = [n for n in graphs[0].graph.nodes if n.target is torch.ops.assign.encode.default]
    assert {(n.args[2], n.meta["val"].dtype) for n in codes} == {("posit(6,1)", torch.uint8)}


@pytest.mark.slow
def test_both_executors_agree():
    """Rounding is the same bit for bit in both; Inductor may sum in another order, by some float32 roundings."""
    model, batch = ResNet(), images()
    table = traced(model, batch)
    for name in ("posit(8,1)", "posit(16,2)"):
        plan = everything(table, name)
        found = []
        for backend in ("eager", "inductor"):
            own = copy.deepcopy(model)
            with use_compiled(backend == "inductor"):
                found.append(steps(own, planned_step(own, class_loss, plan, backend=backend), batch, count=1))
        (eager, _), (compiled, grads) = found
        assert eager == pytest.approx(compiled, rel=0.05)
        assert all(torch.equal(quantize(grad, name), grad) for grad in grads[0])


def test_promotion_counts_what_is_beyond_the_largest_value():
    """posit(8,0) ends at 64, and the numbers above 128 are nearer to what would follow."""

    class Line(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1000))

        def forward(self, x):
            return torch.asinh(x * self.weight)

    def total(model, batch):
        return model(batch).sum()

    model, batch = Line(), torch.ones(1000)
    for largest, promoted in ((128.0, True), (127.9, False)):
        batch[:10] = largest
        plan = assign.search(model, batch, total, low_ratio=1.0, space="hfp8")
        plan = plan.replace({"/input": Entry("posit(8,0)", True)})
        promotion = Promotion(plan)
        planned_step(model, total, plan, backend="eager", promotion=promotion)(batch).backward()
        assert ("/input" in {past.key for past in promotion.step()}) == promoted


@pytest.mark.parametrize("strategy", ["milp", "uniform"])
def test_searches_can_choose_posits(strategy):
    model, batch = MLP(), vectors()
    low, high = "posit(8,1)", "posit(16,1)"
    goal = {"low_ratio": 0.5} if strategy == "milp" else {}
    space = SearchSpace(formats=[high, low] if strategy == "milp" else low)
    plan = assign.search(model, batch, class_loss, strategy=strategy, space=space, **goal)
    formats = {entry.format for entry in plan.entries.values()}
    assert low in formats <= {high, low}
    assert assign.Assignment.from_json(plan.to_json()).entries == plan.entries
    planned_step(model, class_loss, plan, backend="eager")(batch).backward()


@pytest.mark.parametrize("strategy", ["greedy", "greedy-smallest", "greedy-random", "uniform", "operator", "milp"])
def test_every_strategy_searches_the_recipe_of_posits(strategy):
    """``standalone`` is for 16-bit dtypes of torch, and ``optuna`` trains what these find."""
    model, batch = MLP(), vectors()
    goal = {} if strategy == "operator" else {"low_ratio": 0.5}
    plan = assign.search(model, batch, class_loss, strategy=strategy, space="posit", **goal)
    formats = {entry.format for entry in plan.entries.values()}
    assert formats <= {"posit(16,2):quire", "posit(8,2):quire"}
    assert strategy == "operator" or len(formats) == 2  # it keeps the first and the last layer high: both of them
    planned_step(model, class_loss, plan, backend="eager")(batch).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
