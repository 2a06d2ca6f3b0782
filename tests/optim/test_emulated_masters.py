"""Masters and states in posits: float32 tensors that hold only values of the format."""

import copy

import pytest
import torch
from helpers import adamw, assert_same, sgd, traced
from models import MLP, class_loss, vectors

from assign import SearchSpace
from assign.errors import FormatError
from assign.executor.apply import planned_step
from assign.memory.estimate import estimate
from assign.numerics.rounding import quantize
from assign.optim.optimizers import follow
from assign.plan.keys import Part, master_key, state_key
from assign.plan.persistent_state import parse_stored
from assign.plan.plan import Entry
from assign.planner import search_table


def plan_of(model, batch, optimizer=sgd, **space):
    table = traced(model, batch, optimizer=optimizer)
    return table, search_table(table, low_ratio=1.0, space=SearchSpace(recipe="posit", **space))


@pytest.mark.parametrize(("kind", "states"), [(sgd, ["momentum_buffer"]), (adamw, ["exp_avg", "exp_avg_sq"])])
def test_a_step_is_that_of_torch_and_then_rounded(kind, states):
    """The states without entries follow the master."""
    torch.manual_seed(0)
    model, batch = MLP(), vectors()
    _, plan = plan_of(model, batch, kind, master="posit(12,1)")
    plain = copy.deepcopy(model)
    step = planned_step(model, class_loss, plan, backend="eager")
    ours, theirs = follow(kind(model.parameters()), model, plan), kind(plain.parameters())
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.copy_(quantize(parameter, "posit(12,1)"))
    for _ in range(3):
        for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
            assert_same(mine.detach(), other.detach())
        ours.zero_grad()
        step(batch).backward()
        for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
            other.grad = mine.grad.clone()
        ours.step()
        theirs.step()
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter.copy_(quantize(parameter, "posit(12,1)"))
                for name in states:
                    state = theirs.state[parameter][name]
                    state.copy_(quantize(state, "posit(12,1)"))
        for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
            assert all(torch.equal(ours.state[mine][name], theirs.state[other][name]) for name in states)


def test_states_may_be_in_another_format_than_the_master():
    model, batch = MLP(), vectors()
    table, plan = plan_of(model, batch, master="posit(16,2)", optimizer_states="posit(8,2)")
    assert plan.entries[master_key("first.weight")] == Entry("posit(16,2)", False)
    assert plan.entries[state_key("first.weight", "momentum_buffer")].format == "posit(8,2)"
    step = planned_step(model, class_loss, plan, backend="eager")
    optimizer = follow(sgd(model.parameters()), model, plan)
    step(batch).backward()
    optimizer.step()
    for parameter in model.parameters():
        buffer = optimizer.state[parameter]["momentum_buffer"]
        assert parameter.dtype == buffer.dtype == torch.float32
        assert_same(quantize(buffer, "posit(8,2)"), buffer)
        assert_same(quantize(parameter.detach(), "posit(16,2)"), parameter.detach())
        assert not torch.equal(quantize(parameter.detach(), "posit(8,2)"), parameter.detach())
    plain = search_table(table, low_ratio=1.0, space=SearchSpace(recipe="posit"))
    assert estimate(table, plan).peak_bytes == estimate(table, plain).peak_bytes  # float32 tensors, whatever they hold


def test_what_is_saved_is_loaded_again():
    model, batch = MLP(), vectors()
    _, plan = plan_of(model, batch, master="posit(16,1)")
    step = planned_step(model, class_loss, plan, backend="eager")
    optimizer = follow(sgd(model.parameters()), model, plan)
    step(batch).backward()
    optimizer.step()
    other = MLP()
    planned_step(other, class_loss, plan, backend="eager")
    fresh = follow(sgd(other.parameters()), other, plan)
    other.load_state_dict(model.state_dict())
    fresh.load_state_dict(optimizer.state_dict())
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert torch.equal(optimizer.state[mine]["momentum_buffer"], fresh.state[theirs]["momentum_buffer"])


def test_where_emulated_formats_are_allowed():
    assert parse_stored("posit(16,2)", Part.MASTER).name == "posit(16,2)"
    assert parse_stored("posit(8,1):underflow", Part.STATE).name == "posit(8,1):underflow"
    for part in (Part.STORED_GRADIENT, Part.BUFFER):
        with pytest.raises(FormatError, match="Allowed"):
            parse_stored("posit(16,2)", part)
    with pytest.raises(FormatError, match=r"Allowed: .*posit\(n,es\)"):
        parse_stored("fp(4,3,4)", Part.MASTER)
