"""Buffers that a plan stores in 16 bits: which, with what values, in how many bytes, and back from a checkpoint."""

import copy

import pytest
import torch
from helpers import class_loss, everything, measured_peak, sgd, traced
from models import ResNet, images
from torch import nn

import assign
from assign.analysis.audit import audit_constants
from assign.errors import PlanError, TaskError
from assign.executor.apply import apply, planned_step
from assign.memory.estimate import estimate
from assign.optim.optimizers import follow
from assign.plan.persistent_state import buffers
from assign.plan.plan import Assignment, Entry
from assign.plan.recipes import store
from assign.planner import search_table
from assign.tasks import Task
from assign.training.loop import train
from assign.training.options import TrainOptions


class Running(nn.Module):
    """Statistics of torch's own and of the model's, changed in place and put anew, beside a constant."""

    def __init__(self, width=4):
        super().__init__()
        self.bn = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 4)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("total", torch.zeros(width))
        self.register_buffer("table", torch.linspace(0, 1, width))

    def forward(self, x):
        x = self.bn(x) + self.table
        if self.training:
            self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
            self.total = self.total + x.detach().sum(0)
        return self.head(x)


BATCH = torch.linspace(-1, 3, 8 * 4).view(8, 4).sin(), torch.arange(8) % 4
UPDATED = ["bn.running_mean", "bn.running_var", "mean"]


def made(dtype="bf16", more=()):
    torch.manual_seed(0)
    model, table = Running(), traced(Running(), BATCH)
    return model, table, everything(table, "fp32").replace(store(table, buffers=dtype) | dict(more))


def test_rows_are_the_buffers_that_a_step_changes():
    model = Running()
    total = model.total
    table = traced(model, BATCH)
    assert [*table.buffers] == UPDATED  # no counter, no constant, nothing that is put anew
    assert model.total is total  # nothing is computed
    assert {row.elements for row in table.tensors if row.role == "buffer"} == {4}
    assert traced(Running().eval(), BATCH).buffers == ()
    layers = [name.removesuffix(".running_var") for name in traced(ResNet(), images()).buffers if "var" in name]
    assert layers == ["bn", *(f"layers.{i}.bn{j}" for i in range(2) for j in (1, 2))]


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_standalone_plans_store_them(name):
    table = made()[1]
    plan = search_table(table, strategy="standalone", space=name)
    assert {key: plan.entries[f"{key}.buffer"].format for key in UPDATED} == dict.fromkeys(UPDATED, name)
    assert Assignment.from_json(plan.to_json()) == plan
    assert buffers(table, plan.entries) == (5 * 4 * 4 + 8 - 3 * 4 * 2, 3 * 4 * 4)
    assert buffers(table, {}) == (5 * 4 * 4 + 8, 0)


def test_a_step_computes_them_in_float32_and_rounds_them_once():
    model, table, plan = made()
    twin, step = copy.deepcopy(model), planned_step(model, class_loss, plan, backend="eager")
    wide = planned_step(twin, class_loss, everything(table, "fp32"), backend="eager")
    for _ in range(3):
        assert torch.equal(step(BATCH), wide(BATCH))
        for name, buffer in twin.named_buffers():
            narrow = model.get_buffer(name)
            assert narrow.dtype == (torch.bfloat16 if name in UPDATED else buffer.dtype)
            assert torch.equal(narrow, buffer.to(narrow.dtype)), name
            buffer.copy_(narrow)  # so that the next step starts where this model's does
    assert model.bn.num_batches_tracked == 3


def test_a_tensor_put_in_a_buffers_place_is_rounded_into_it():
    model, _, plan = made(more={"total.buffer": Entry("bf16", False)})
    twin = copy.deepcopy(model)
    planned_step(model, class_loss, plan, backend="eager")(BATCH)
    class_loss(twin, BATCH)
    assert model.total.any()
    assert torch.equal(model.total, twin.total.bfloat16())


def test_one_put_in_the_place_of_a_wide_one_stays_too():
    table = made()[1]
    for stored in ({"master": "bf16"}, {"buffers": "bf16"}, {}):
        model, plan = Running(), everything(table, "fp32").replace(store(table, **stored))
        planned_step(model, class_loss, plan, backend="eager")(BATCH)
        assert model.total.any(), stored


def test_evaluation_reads_them_and_changes_none():
    model, _, plan = made()
    planned = apply(model, plan, backend="eager")
    planned(BATCH[0])
    before = copy.deepcopy(model.state_dict())
    wide = Running().eval()
    wide.load_state_dict(before)
    with torch.no_grad():
        assert torch.equal(planned.eval()(BATCH[0]), wide(BATCH[0]))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_bytes_are_those_measured():
    """Two bytes an element less behind the forward pass; within it the float32 copies come on top."""
    width = 2**14
    batch = torch.randn(8, width), torch.arange(8) % 4
    predicted, measured = {}, {}
    for name in ("fp32", "bf16"):
        model = nn.Sequential(nn.BatchNorm1d(width), nn.Linear(width, 4))
        table = traced(model, batch)
        plan = everything(table, "bf16").replace(store(table, buffers=name))
        predicted[name] = estimate(table, plan).peak_bytes
        step = planned_step(model, class_loss, plan, backend="eager")
        measured[name] = measured_peak(model, batch, step, sgd(model.parameters()))
    assert predicted["fp32"] - predicted["bf16"] == measured["fp32"] - measured["bf16"] == 2 * 2 * width
    assert predicted["bf16"] == pytest.approx(measured["bf16"], rel=0.05)


# ---- checkpoints


def trained(model, plan, steps):
    step = planned_step(model, class_loss, plan, backend="eager")
    optimizer = follow(sgd(model.parameters()), model, plan)
    for _ in range(steps):
        optimizer.zero_grad()
        step(BATCH).backward()
        optimizer.step()
    return model.state_dict(), optimizer


def test_checkpoints_go_from_plan_to_plan_and_lose_nothing_silently():
    model, _, plan = made()
    state = copy.deepcopy(trained(model, plan, 3)[0])
    wide, other = Running(), made()[0]
    wide.load_state_dict(state)
    assert all(torch.equal(value, state[name].to(value.dtype)) for name, value in wide.state_dict().items())
    apply(other, plan, backend="eager")
    other.load_state_dict(wide.state_dict())  # of values that bf16 holds
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    wide.bn.running_var += 1e-6
    with pytest.raises(PlanError, match=r"'bn\.running_var' is stored in bfloat16 here, in which 4 of the 4 values"):
        other.load_state_dict(wide.state_dict())


def test_goes_on_from_its_own_checkpoint_bit_for_bit(tmp_path):
    batches = [(BATCH[0] * scale, BATCH[1]) for scale in (1.0, 1.5, 2.0)]
    task = Task(model=Running, train=batches, loss=class_loss, optimizer=sgd, epochs=2, name="running")
    plan = search_table(made()[1], strategy="standalone", space="bf16")
    straight = train(task, plan).model.state_dict()
    train(task, plan, options=TrainOptions(max_steps=4, checkpoint=tmp_path / "run.pt", checkpoint_every=1))
    resumed = train(task, plan, options=TrainOptions(checkpoint=tmp_path / "run.pt", resume=True)).model.state_dict()
    assert resumed["bn.running_var"].dtype is torch.bfloat16
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())


# ---- refusals


@pytest.mark.parametrize(
    ("key", "name", "says"),
    [
        ("bn.running_mean.buffer", "e4m3", "is not allowed for a buffer: a step adds to it"),
        ("bn.running_mean.buffer", "dynamic8", "Allowed: fp32, bf16, fp16"),
        ("bn.running_men.buffer", "bf16", "which the model does not have; nearest: 'bn.running_mean'"),
        ("bn.num_batches_tracked.buffer", "bf16", "as torch.bfloat16, but it is torch.int64"),
    ],
)
def test_what_cannot_be_kept_says_why(key, name, says):
    model = made()[0]
    with pytest.raises(PlanError) as caught:
        apply(model, made(more={key: Entry(name, False)})[2], backend="eager")
    assert says in str(caught.value)


def test_an_estimate_refuses_a_buffer_that_no_step_changes():
    _, table, plan = made(more={"table.buffer": Entry("bf16", False)})
    with pytest.raises(PlanError, match=r"'table\.buffer'"):
        estimate(table, plan)


def test_autocast_refuses_what_would_outlast_it():
    model, _, plan = made()
    with pytest.raises(PlanError, match=r"stores 'bn\.running_mean\.buffer' as bf16"), assign.autocast(model, plan):
        pass


def test_statistics_that_fp16_cannot_hold_are_refused(tmp_path):
    task = Task(model=Running, train=[BATCH], loss=class_loss, optimizer=sgd, epochs=1, name="running")
    model, table, _ = made()
    model.bn.running_var.fill_(1e6)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    plan = search_table(table, strategy="standalone", space="fp16")
    with pytest.raises(TaskError, match=r"'bn\.running_var' holds 1e\+06, but its stored form is fp16, whose"):
        train(task, plan, options=TrainOptions(weights=tmp_path / "weights.pt"))


@pytest.mark.parametrize(("name", "least"), [("bf16", 2**-8), ("fp16", 2**-11)])
def test_a_momentum_too_small_for_its_statistics_is_found(name, least):
    for momentum, wrong in ((0.9 * least, True), (1.1 * least, False)):
        norm = nn.BatchNorm1d(4, momentum=momentum)
        found = [each for each in audit_constants(norm, format=name, action="return") if each.name == "momentum"]
        assert bool(found) is wrong
    assert audit_constants(nn.BatchNorm1d(4, momentum=1e-4), action="return") == ()
    assert "running statistic in this format never decrease" in str(
        audit_constants(nn.BatchNorm1d(4, momentum=least / 4), format=name, action="return")[-1]
    )


def test_an_average_stands_still_before_it_has_arrived():
    """The trap of the docstring: with a momentum of 0.1, within 2 % of the value in bf16."""
    model, _, plan = made()
    step = planned_step(model, class_loss, plan, backend="eager")
    for _ in range(200):
        step(BATCH)
    mean, target = model.bn.running_mean.float(), BATCH[0].mean(0)
    assert not torch.allclose(mean, target, rtol=2**-9)
    assert torch.allclose(mean, target, rtol=10 * 2**-8)
