"""Gradients that wait for the optimizer in 8 bits: their values, the step that they make, their bytes, refusals."""

import copy
import re

import pytest
import torch
from helpers import adamw, everything, measured_peak, sgd, traced, trained
from models import MLP, InPlace, class_loss, vectors
from torch import nn

import assign
from assign import distributed
from assign.errors import PlanError
from assign.executor.apply import planned_step
from assign.formats.parsing import parse_format
from assign.memory.estimate import estimate
from assign.numerics.rounding import amax_scale, quantize
from assign.optim.gradients import widened
from assign.optim.optimizers import follow
from assign.plan.persistent_state import resident
from assign.plan.plan import Assignment, Entry
from assign.plan.recipes import store
from assign.plan.space import SearchSpace
from assign.planner import search_table
from assign.tasks import Task
from assign.training.loop import train

EIGHT = ["e5m2:pow2", "e4m3:pow2"]
BATCH = vectors(batch=8)


def made(gradients="e5m2:pow2", optimizer=sgd, width=32, **formats):
    """A model, its step, and the plan, everything else in fp32."""
    torch.manual_seed(0)
    model = MLP(width=width)
    table = traced(model, BATCH, optimizer=optimizer)
    plan = everything(table, "fp32").replace(store(table, gradients=gradients, **formats))
    return model, planned_step(model, class_loss, plan, backend="eager"), table, plan


def read(model, name):
    """Gradients as the optimizer reads them."""
    found = []
    for parameter in model.parameters():
        with widened(parameter, parse_format(name)):
            found.append(parameter.grad.clone())
    return found


@pytest.mark.parametrize(("name", "backend"), [(EIGHT[0], "eager"), (EIGHT[1], "eager"), (EIGHT[0], "inductor")])
def test_they_are_the_gradients_rounded_with_a_scale(name, backend):
    model, _, _, plan = made(name)
    twin = copy.deepcopy(model)
    planned_step(model, class_loss, plan, backend=backend)(BATCH).backward()
    class_loss(twin, BATCH).backward()
    for mine, theirs, parameter in zip(read(model, name), twin.parameters(), model.parameters(), strict=True):
        assert str(parameter.grad.dtype).startswith(f"torch.float8_{name[:4]}")
        if backend == "eager":
            wanted = quantize(theirs.grad, name, scale=amax_scale(theirs.grad, name), saturate=False)
            assert torch.equal(mine, wanted)
        assert (mine - theirs.grad).norm() < 0.1 * theirs.grad.norm()


def test_small_gradients_do_not_vanish():
    model, _, _, plan = made()
    (class_loss(assign.apply(model, plan, backend="eager"), BATCH) * 1e-6).backward()
    assert all(gradient.count_nonzero() > 0.9 * gradient.numel() for gradient in read(model, EIGHT[0]))


def test_those_of_a_checkpointed_block_have_scales_too():
    model, batch = InPlace().eval(), (BATCH[0][:, :8], BATCH[1])  # without dropout
    table = traced(model, batch)
    plan = everything(table, "fp32").replace(store(table, gradients=EIGHT[0]))
    twin = copy.deepcopy(model)
    planned_step(model, class_loss, plan, backend="eager")(batch).backward()
    class_loss(twin, batch).backward()
    for mine, theirs in zip(read(model, EIGHT[0]), twin.parameters(), strict=True):
        assert (mine - theirs.grad).norm() < 0.1 * theirs.grad.norm()


STEPS = {
    "SGD": (sgd, {}, {}),
    "AdamW": (adamw, {}, {}),
    "AdamW on bf16": (adamw, {"master": "bf16"}, {}),
    "AdamW, Kahan": (adamw, {"master": "bf16"}, {"update_rounding": "kahan"}),
    "torchao": (adamw, {"states": "dynamic8"}, {}),
    "bitsandbytes": (sgd, {"states": "dynamic8"}, {}),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_that_of_the_same_optimizer_on_wide_gradients(name):
    factory, formats, how = STEPS[name]
    width = 512 if "states" in formats else 32  # large enough for blocks
    model, step, _, plan = made(optimizer=factory, width=width, **formats)
    other, _, _, wide = made(None, optimizer=factory, width=width, **formats)
    optimizer, plain = (follow(factory(m.parameters()), m, p, **how) for m, p in ((model, plan), (other, wide)))
    planned_step(other, class_loss, wide, backend="eager")(BATCH)  # gives the parameters their dtypes
    for _ in range(3):
        optimizer.zero_grad()
        step(BATCH).backward()
        for parameter, gradient in zip(other.parameters(), read(model, EIGHT[0]), strict=True):
            parameter.grad = gradient
        with torch.compiler.set_stance("force_eager"):  # torchao would compile its step for seconds
            optimizer.step()
            plain.step()
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert all(p.grad.dtype is torch.float8_e5m2 for p in model.parameters())
    assert type(optimizer).__module__ == type(plain).__module__


def test_hooks_and_closures_see_whole_steps():
    model, step, _, plan = made()
    optimizer, calls = follow(sgd(model.parameters()), model, plan), []
    optimizer.register_step_post_hook(lambda *_: calls.append(len(optimizer.param_groups[0]["params"])))

    def closure():
        optimizer.zero_grad()
        loss = step(BATCH)
        loss.backward()
        return loss

    assert optimizer.step(closure) > optimizer.step(closure)
    assert calls == [4, 4]
    watched = assign.optim.LostUpdates(model, optimizer)
    trained(step, BATCH, optimizer, 2)
    assert watched.to_json()["steps"] == 2
    assert len(watched.shares) == 4


@pytest.mark.parametrize("factory", [sgd, adamw])
def test_bytes_are_those_measured(factory):
    _, _, table, plan = made(optimizer=factory, width=2**14)
    plan = search_table(table, strategy="uniform", space=SearchSpace(formats="bf16", gradients=EIGHT[0]))
    model = MLP(width=2**14)
    elements = sum(p.numel() for p in model.parameters())
    assert resident(table, plan.entries).gradients == elements + 4 * 4
    step = planned_step(model, class_loss, plan, backend="eager")
    measured = measured_peak(model, BATCH, step, follow(factory(model.parameters()), model, plan))
    assert estimate(table, plan).peak_bytes == pytest.approx(measured, rel=1e-4)


def test_checkpoints_go_from_plan_to_plan_and_resume_bit_for_bit():
    model, step, _, plan = made(optimizer=adamw)
    optimizer = follow(adamw(model.parameters()), model, plan)
    trained(step, BATCH, optimizer, 3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    straight = trained(step, BATCH, optimizer, 3)
    for gradients, same in ((EIGHT[0], True), (None, False)):
        other, again, _, chosen = made(gradients, optimizer=adamw)
        fresh = follow(adamw(other.parameters()), other, chosen)
        other.load_state_dict(saved[0])
        fresh.load_state_dict(saved[1])
        assert all(map(torch.equal, trained(again, BATCH, fresh, 3), straight)) is same


# ---- refusals


def test_a_second_backward_pass_is_refused():
    _, step, _, _ = made()
    step(BATCH).backward()
    with pytest.raises(
        PlanError, match=r"already has a gradient, stored as float8_e5m2 with a scale.*\n  Allowed: one backward"
    ):
        step(BATCH).backward()


def test_a_gradient_that_no_plan_made_is_refused():
    model, step, _, plan = made()
    optimizer = follow(sgd(model.parameters()), model, plan)
    trained(step, BATCH, optimizer, 1)  # its scales are not those of what follows
    optimizer.zero_grad()
    class_loss(model, BATCH).backward()
    with pytest.raises(PlanError, match="has no scale: no planned model made it"):
        optimizer.step()
    assert len(optimizer.param_groups[0]["params"]) == 4


def test_a_loss_scale_is_refused():
    task = Task(model=MLP, loss=class_loss, train=[BATCH], optimizer=sgd, epochs=1, name="mlp")
    plan = search_table(made()[2], space=SearchSpace(recipe="hfp8", gradients=EIGHT[0]), low_ratio=0.5)
    with pytest.raises(PlanError, match="a loss scale, by which such gradients cannot be divided"):
        train(task, plan)


def test_several_processes_are_refused(monkeypatch):
    _, step, _, _ = made()
    monkeypatch.setattr(distributed, "is_several", lambda: True)
    with pytest.raises(PlanError, match="gradients of several processes cannot be added in it"):
        step(BATCH)


@pytest.mark.parametrize("name", ["e5m2", "e4m3:amax", "fp(5,2,0)", "dynamic8", "e5m2:pow2:sr"])
def test_other_formats_are_refused(name):
    entries = {"w": Entry("fp32", False), "w.grad": Entry("fp32", False), "w.grad.stored": Entry(name, False)}
    with pytest.raises(PlanError, match=re.escape("Allowed: fp32, bf16, fp16, e5m2:pow2, e4m3:pow2")):
        Assignment(entries=entries, recipe="native", fingerprint="")


def test_a_frozen_weight_needs_none():
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    model[0].requires_grad_(False)
    table = traced(model, BATCH)
    plan = everything(table, "fp32").replace(store(table, gradients=EIGHT[0]))
    planned_step(model, class_loss, plan, backend="eager")(BATCH).backward()
    assert [p.grad is None for p in model.parameters()] == [True, True, False, False]
