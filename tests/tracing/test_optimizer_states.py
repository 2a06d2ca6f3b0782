"""States of optimizers in a table: read off a step without data, on zeros, or said to be unknown."""

import warnings

import pytest
import torch
from helpers import traced
from models import MLP, vectors
from torch import nn

from assign.errors import TraceError
from assign.optim.optimizers import optimizer
from assign.plan.plan import Assignment
from assign.plan.table import Role
from assign.tracing import optimizer_states
from assign.tracing.optimizer_states import optimizer_name, read_optimizer

WITH_CLOSURE = {"LBFGS"}
ALL = sorted(
    name
    for name in dir(torch.optim)
    if isinstance(kind := getattr(torch.optim, name), type) and issubclass(kind, torch.optim.Optimizer)
    if name != "Optimizer"
)


def model_for(name: str) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5, bias=name != "Muon"), nn.Linear(5, 3, bias=name != "Muon"))  # matrices only


def real_states(model: nn.Module, name: str) -> tuple[dict[str, tuple[int, ...]], int]:
    """Shapes of the states by key, and their bytes, behind a real step."""
    instance = getattr(torch.optim, name)(model.parameters())
    for parameter in model.parameters():
        gradient = torch.randn_like(parameter)
        parameter.grad = gradient.to_sparse() if name == "SparseAdam" else gradient
    instance.step()
    shapes, size = {}, 0
    for key, parameter in model.named_parameters():
        for state, value in instance.state[parameter].items():
            if isinstance(value, torch.Tensor) and value.numel() > 1:
                shapes[f"{key}.optim.{state}"] = tuple(value.shape)
                size += value.numel() * value.element_size()
    return shapes, size


@pytest.mark.parametrize("name", sorted(set(ALL) - WITH_CLOSURE))
def test_states_are_those_of_a_real_step(name: str) -> None:
    model = model_for(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_optimizer(model, getattr(torch.optim, name))
    shapes, size = real_states(model, name)
    assert {row.key: row.shape for row in found.rows} == shapes
    assert (found.name, found.bytes) == (name, size)
    assert all(row.role is Role.OPTIM_STATE for row in found.rows)


def test_unknown_states_are_said_to_be() -> None:
    with pytest.warns(UserWarning, match=r"states of LBFGS are unknown and not counted: .*closure"):
        table = traced(MLP(), vectors(), optimizer=torch.optim.LBFGS)
    assert table.schedule.optimizer == "LBFGS"
    assert table.schedule.optimizer_bytes == 0


def test_a_step_on_zeros_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer_states, "_MAX_ELEMENTS", 10)
    with pytest.warns(UserWarning, match="Adafactor are unknown"):
        read_optimizer(model_for("Adafactor"), torch.optim.Adafactor)


def test_an_optimizer_that_cannot_be_made() -> None:
    with pytest.raises(TraceError, match=r"(?s)optimizer\(parameters\) failed on the 4 trained parameters.*Give one"):
        read_optimizer(model_for(""), torch.optim.Muon)


@pytest.mark.parametrize("kind", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_states_in_a_librarys_own_tensors_are_counted(kind: str) -> None:
    library = pytest.importorskip("torchao.optim")
    model = nn.Linear(80, 64, bias=False)  # large enough to be quantized
    found = read_optimizer(model, getattr(library, kind))
    bits = {"AdamW8bit": 8, "AdamW4bit": 4, "AdamWFp8": 8}[kind]
    codes = 2 * 80 * 64 * bits // 8
    assert found.rows == ()  # no plan stores them otherwise
    assert codes < found.bytes < 1.3 * codes  # and scales, and a table of values


def test_the_planned_optimizer_of_one_that_looks_at_values() -> None:
    model, batch = MLP(), vectors()
    table = traced(model, batch, optimizer=torch.optim.Adafactor)
    plan = Assignment(entries={}, recipe="native", fingerprint=table.fingerprint)
    planned = optimizer(torch.optim.Adafactor, model, plan)
    assert optimizer_name(planned).endswith("Adafactor")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    planned.step()
