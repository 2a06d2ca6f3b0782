"""Parameters and their gradients as a plan stores them: the masters' dtype, and ``grad_dtype``."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from assign.errors import PlanError
from assign.numerics.rounding import torch_dtype
from assign.optim.states import count_changed
from assign.plan.assignment import Assignment
from assign.plan.stored import gradient_format, master_format
from assign.tracing.capture import check_parameters


def check_storable(model: nn.Module, plan: Assignment) -> None:
    """Make sure that the model is one in float32, or already has the dtypes of the plan's masters.

    Raises:
        TraceError: names the first parameter that is neither.
    """
    check_parameters(model, {key: master_dtype(plan, key) for key in plan.entries})


def master_dtype(plan: Assignment, key: str) -> torch.dtype:
    """Dtype of the parameter ``key`` itself."""
    return torch_dtype(master_format(plan.entries, key).carrier)


def store_parameters(model: nn.Module, plan: Assignment) -> None:
    """Give the model's parameters the dtypes of their masters, rounded to nearest, and their gradients theirs.

    From then on the model refuses a ``state_dict`` whose values its parameters cannot hold. Doing it twice changes
    nothing.
    """
    named = {name: p for name, p in model.named_parameters() if name in plan.entries}
    masters = {name: master_dtype(plan, name) for name in named}
    if any(named[name].dtype != dtype for name, dtype in masters.items()):
        model.register_load_state_dict_pre_hook(_refuse_loss)  # type: ignore[no-untyped-call]  # torch gives no types
    for name, parameter in named.items():
        _store(parameter, masters[name], torch_dtype(gradient_format(plan.entries, name).carrier))


def _store(parameter: nn.Parameter, dtype: torch.dtype, gradient_dtype: torch.dtype) -> None:
    if parameter.dtype == dtype and (parameter.grad_dtype == gradient_dtype or not parameter.requires_grad):
        return
    gradient, parameter.grad = parameter.grad, None
    parameter.data = parameter.data.to(dtype)
    if parameter.requires_grad:
        parameter.grad_dtype = gradient_dtype
        parameter.grad = None if gradient is None else gradient.to(gradient_dtype)


def _refuse_loss(model: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Refuse what ``load_state_dict`` would round without a word; a hook that knows nothing but the model."""
    for name, parameter in model.named_parameters():
        value = state_dict.get(prefix + name)
        if not isinstance(value, torch.Tensor) or value.dtype == parameter.dtype:
            continue
        lost = count_changed(value.to(parameter.dtype), value)
        if lost:
            raise PlanError(
                f"load_state_dict: {name!r} is stored in {str(parameter.dtype).removeprefix('torch.')} here, in which "
                f"{lost} of the {value.numel()} values loaded would be rounded.\n"
                "  Load them into the float32 model first: assign.apply(model, plan) then rounds them as the plan says."
            )
