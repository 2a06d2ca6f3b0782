"""A traced step in place of a model, a batch and a loss."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from models import MLP, class_loss, vectors

import assign
from assign.errors import TraceError
from assign.plan.table import TensorTable


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


@pytest.fixture(scope="module")
def step():
    torch.manual_seed(0)
    return assign.trace(MLP(), vectors(), class_loss, adamw)


def given(step):
    return step.model, step.batch, step.loss


def test_a_step_is_a_table(step, tmp_path):
    assert isinstance(step, TensorTable)
    table = step.table
    assert type(table) is TensorTable
    assert step == table == step
    assert hash(step) == hash(table)
    assert step != assign.trace(MLP(width=8), vectors(), class_loss)
    step.save(tmp_path / "table.json")
    assert TensorTable.load(tmp_path / "table.json") == step
    assert repr(step) == repr(table)
    for copied in (pickle.loads(pickle.dumps(step)), copy.deepcopy(step)):
        assert type(copied) is TensorTable
        assert copied == step


def test_every_function_takes_a_step_for_its_parts(step):
    plan = assign.search(step, budget="120%")
    assert plan.entries == assign.search(*given(step), budget="120%", optimizer=adamw).entries
    assert plan.provenance.estimate["peak_bytes"] == assign.estimate(step, plan).peak_bytes
    options = assign.NoiseOptions(warm_up=2)
    noise = assign.measure_noise(step, options=options)
    assert noise == assign.measure_noise(step.model, [step.batch], step.loss, optimizer=adamw, options=options)
    assert noise.warm_up == 2
    assert assign.measure_noise(step, [vectors(), vectors()], options=options).batches == 2
    ticks = [iter(range(10**6)) for _ in range(2)]
    times = assign.measure_times(step, repeats=1, clock=ticks[0].__next__)
    assert times == assign.measure_times(*given(step), repeats=1, clock=ticks[1].__next__)
    table = step.table
    assert assign.rehearse(step, plan=plan) == assign.rehearse(*given(step), plan, table)


def test_a_front_measures_what_its_strategy_needs_on_a_step_only(step):
    assert len(assign.search_front(step, 3, strategy="milp").plans) > 0
    with pytest.raises(assign.AssignError, match="no noise was given"):
        assign.search_front(step.table, 3, strategy="milp")


def test_a_search_measures_noise_after_a_warm_up_if_an_optimizer_is_known(step, monkeypatch):
    seen = []
    measure = assign.planner.measure_noise
    monkeypatch.setattr(assign.planner, "measure_noise", lambda *a, **k: seen.append(measure(*a, **k)) or seen[-1])
    assign.search(step, low_ratio=0.5, strategy="milp")
    assign.search(*given(step), low_ratio=0.5, strategy="milp")
    assign.search(step, low_ratio=0.5, strategy="milp", noise=assign.NoiseOptions(warm_up=1, seed=3))
    assert [table.warm_up for table in seen] == [40, 0, 1]
    assert seen[2].seed == 3


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda step: assign.search(step, vectors(), low_ratio=0.5), "batch"),
        (lambda step: assign.search(step, None, class_loss, low_ratio=0.5), "batch, loss"),
        (lambda step: assign.search(step, low_ratio=0.5, optimizer=adamw), "optimizer"),
        (lambda step: assign.measure_noise(step, loss=class_loss), "loss"),
        (lambda step: assign.measure_noise(step, optimizer=adamw), "optimizer"),
        (lambda step: assign.measure_times(step, vectors()), "batch"),
        (lambda step: assign.rehearse(step, vectors(), class_loss, None), "batch, loss"),
    ],
)
def test_a_step_and_its_parts_are_refused(step, call, names):
    with pytest.raises(TraceError, match=f"a Step and {names} are both given"):
        call(step)


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda model: assign.search(model, low_ratio=0.5), "batch, loss"),
        (lambda model: assign.measure_noise(model, [vectors()]), "loss"),
        (lambda model: assign.measure_times(model, vectors()), "loss"),
        (lambda model: assign.rehearse(model, vectors(), class_loss), "plan, table"),
    ],
)
def test_a_model_without_its_batch_or_loss_is_refused(call, names):
    with pytest.raises(TraceError, match=f"given without {names}"):
        call(MLP())


def test_a_step_keeps_its_model_only_as_long_as_it_lives():
    model = MLP()
    step, kept = assign.trace(model, vectors(), class_loss, adamw), weakref.ref(model)
    plan, table = assign.search(step, low_ratio=0.5, strategy="milp"), step.table
    assign.estimate(step, plan)
    del model
    gc.collect()
    assert kept() is step.model
    del step
    gc.collect()
    assert kept() is None
    assert assign.estimate(table, plan).peak_bytes > 0
