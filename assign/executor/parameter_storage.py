"""Store parameters, gradients and buffers as a plan requires."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from assign.errors import PlanError, suggest
from assign.numerics.rounding import round_in_place
from assign.numerics.torch_dtypes import torch_dtype
from assign.optim.masters import extra_bits_of, forget_extra_bits, is_split, note_loaded, store_split
from assign.optim.states import count_changed
from assign.plan.keys import Key, Part, master_key
from assign.plan.persistent_state import buffer_format, gradient_format, master_format, stored_dtype
from assign.plan.plan import Assignment
from assign.tracing.loaded import complete, note_loaded_dtypes


def master_dtype(plan: Assignment, key: str) -> torch.dtype:
    """Return the dtype of the parameter ``key`` itself."""
    return torch_dtype(stored_dtype(master_format(plan.entries, key)))


def store_parameters(model: nn.Module, plan: Assignment) -> None:
    """Convert the model's parameters to the dtypes of their masters, rounded to nearest, and its gradients and buffers.

    Parameters with emulated masters, such as posits, stay float32 and are rounded.

    The extra bits of a master are kept for the optimizer (:mod:`assign.optim.masters`).

    Afterwards the model rejects a ``state_dict`` with values that it cannot hold. A second call changes nothing.

    Raises:
        PlanError: the plan stores a buffer that the model does not have, or that is not in float32; or extra bits of a
            frozen parameter.
    """
    note_loaded_dtypes(model, plan)
    plan = complete(plan, model)
    named = {name: p for name, p in model.named_parameters() if name in plan.entries}
    split = {name for name in named if master_format(plan.entries, name).extra_bits}
    _check_trained(split, named)
    masters = {name: master_dtype(plan, name) for name in named}
    buffers = _stored_buffers(model, plan)
    narrower = [named[name].dtype != dtype for name, dtype in masters.items()]
    narrower += [not is_split(named[name]) for name in split]
    if any(narrower) or any(buffer.dtype != dtype for buffer, dtype in buffers):
        model.register_load_state_dict_pre_hook(_refuse_loss)  # type: ignore[no-untyped-call]  # torch gives no types
    for name, parameter in named.items():
        gradient_dtype = torch_dtype(stored_dtype(gradient_format(plan.entries, name)))
        _store(parameter, masters[name], gradient_dtype, to_split=name in split)
        master = master_format(plan.entries, name)
        if master.layout:
            round_in_place(parameter, master)
        if name in split:
            extra_bits_of(parameter)
        else:
            forget_extra_bits(parameter)
    for buffer, dtype in buffers:
        buffer.data = buffer.data.to(dtype)


def _check_trained(split: Collection[str], named: Mapping[str, nn.Parameter]) -> None:
    frozen = next((name for name in split if not named[name].requires_grad), None)
    if frozen is not None:
        raise PlanError(
            f"apply: the plan stores the master of {frozen!r} with extra bits, which its optimizer's state stores, "
            "but the parameter is frozen and has no optimizer.\n  Allowed: fp32, bf16 or fp16 for a frozen parameter.\n"
            f"  Leave {master_key(frozen)!r} out of the plan, or set requires_grad."
        )


def _stored_buffers(model: nn.Module, plan: Assignment) -> list[tuple[torch.Tensor, torch.dtype]]:
    """Return the buffers that have entries in the plan, with their dtypes in the plan."""
    named = dict(model.named_buffers())
    found = []
    keys = (Key.parse(key, plan.entries) for key in plan.entries)
    for name in (key.name for key in keys if key.part is Part.BUFFER):
        dtype = torch_dtype(buffer_format(plan.entries, name).carrier)
        _check_buffer(name, named, dtype)
        found.append((named[name], dtype))
    return found


def _check_buffer(name: str, named: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    if name not in named:
        close = suggest(name, named)
        raise PlanError(
            f"apply: the plan stores the buffer {name!r}, which the model does not have"
            f"{f'; nearest: {close}' if close else ''}.\n  Use the plan's own model, or leave the entry out."
        )
    buffer = named[name]
    if buffer.dtype not in (torch.float32, dtype):
        raise PlanError(
            f"apply: the plan stores the buffer {name!r} as {dtype}, but it is {buffer.dtype}.\n"
            "  Allowed: buffers in float32, or in that dtype already.\n  Leave the entry out."
        )


def _store(parameter: nn.Parameter, dtype: torch.dtype, gradient_dtype: torch.dtype, *, to_split: bool) -> None:
    if parameter.dtype == dtype and (parameter.grad_dtype == gradient_dtype or not parameter.requires_grad):
        return
    gradient, parameter.grad = parameter.grad, None
    if to_split and parameter.dtype != dtype:
        store_split(parameter)
    else:
        parameter.data = parameter.data.to(dtype)
    if parameter.requires_grad:
        parameter.grad_dtype = gradient_dtype
        parameter.grad = None if gradient is None else gradient.to(gradient_dtype)


def _refuse_loss(model: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Reject values that ``load_state_dict`` would round silently; a hook that refers to the model only."""
    named: dict[str, torch.Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    given = {name: state_dict.get(prefix + name) for name in named}
    found = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
    for name, value in found.items():
        parameter = named[name]
        if value.dtype == parameter.dtype:
            continue
        lost = count_changed(value.to(parameter.dtype), value)
        if lost:
            raise PlanError(
                f"load_state_dict: {name!r} is stored in {str(parameter.dtype).removeprefix('torch.')} here, in which "
                f"{lost} of the {value.numel()} values loaded would be rounded.\n"
                "  Load them into the float32 model first: assign.apply(model, plan) then rounds them as the plan says."
            )
    for name, value in found.items():
        note_loaded(named[name], value)
