"""States of an optimizer for one parameter, in the form of each library: create, widen, fill, restore.

*Canonical* states are those of torch: with torch's names, in float32, ``step`` as a tensor. States of every library can
be converted to them without loss, and filled from them, rounded as the library rounds.
"""

import importlib
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from assign.distributed import like_sharded, local_part
from assign.formats.rows import BlockFormat, Format
from assign.numerics.torch_dtypes import torch_dtype
from assign.plan.optimizer_backends import Library, Stored

States = dict[str, Any]

_BLOCK = 256  # block size of bitsandbytes' states
_WRAPPED = "__bnb_optimizer_quant_state__"  # bitsandbytes' name for a dict in its state_dict


def make_states(library: Library, parameter: Tensor, stored: Stored) -> States:
    """Return the states before the first step; empty if torch's own optimizer makes the same at its first step."""
    if library is Library.TORCH and stored.is_uniform:
        return {}
    if library is Library.BITSANDBYTES:
        return _make_bitsandbytes(parameter, stored)
    states: States = {"step": torch.tensor(0.0)} if library is Library.TORCHAO else {}
    for name, fmt in stored.states.items():
        if isinstance(fmt, BlockFormat):
            part = _BLOCKED[fmt.name](local_part(parameter), fmt.block, not name.endswith("_sq"))
            states[name] = like_sharded(part, parameter)
        else:
            states[name] = torch.zeros_like(parameter, dtype=torch_dtype(fmt.carrier), requires_grad=False)
    return states


def widened(states: Mapping[str, Any]) -> States:
    """Return the canonical states for those of any library; exact."""
    if "state1" in states:
        return _widen_bitsandbytes(states)
    return {name: _widen(value) if name != "step" else value for name, value in states.items()}


def unwrapped(states: Mapping[str, Any]) -> States:
    """Return states as an optimizer stores them, from those of one parameter in a ``state_dict``."""
    inner = states.get(_WRAPPED, {})
    return {name: value for name, value in states.items() if name != _WRAPPED} | dict(inner)


def restore(own: States, saved: Mapping[str, Any], parameter: Tensor) -> States:
    """Return ``own``, fresh from :func:`make_states`, with the values of ``saved``, which may come from any library.

    States that were saved in the form of ``own`` are restored bit for bit; others are rounded to it.
    """
    if not own:
        return {name: _like(name, value, parameter) for name, value in widened(saved).items()}
    if own.keys() == saved.keys() and all(_same_form(own[name], saved[name]) for name in own):
        return {name: _copied(value, saved[name]) for name, value in own.items()}
    wide = widened(saved)
    if "state1" in own:
        return _fill_bitsandbytes(own, wide)
    filled = {name: value.copy_(wide[name]) for name, value in own.items() if name != "step"}
    return filled | ({"step": torch.tensor(float(wide["step"]))} if "step" in own else {})


def count_changed(after: Tensor, before: Tensor) -> int:
    """Return the number of changed elements, of sharded tensors in this process; a NaN does not count as changed."""
    after, before = local_part(after), local_part(before)
    wide = before.to(device=after.device, dtype=torch.float32)
    return int(((after.float() != wide) & ~wide.isnan()).sum())


def _widen(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    part: Any = local_part(value)
    plain = like_sharded(part.dequantize(), value) if type(part).__module__.startswith("torchao.") else value
    return plain.float() if plain.is_floating_point() else plain


def _like(name: str, value: Any, parameter: Tensor) -> Any:
    """Return a copy as in torch's optimizers: the step count keeps dtype and device, others get the parameter's."""
    if not isinstance(value, Tensor):
        return value
    is_step = name == "step" or not value.is_floating_point()
    return value.clone() if is_step else value.to(device=parameter.device, dtype=parameter.dtype, copy=True)


def _same_form(own: Any, saved: Any) -> bool:
    if not isinstance(own, Tensor) or not isinstance(saved, Tensor):
        return type(own) is type(saved)
    return type(own) is type(saved) and own.dtype == saved.dtype and own.shape == saved.shape


def _copied(own: Any, saved: Any) -> Any:
    return own.copy_(saved) if isinstance(own, Tensor) else saved


# ---- torchao


def _dynamic8(parameter: Tensor, block: int, signed: bool) -> Tensor:
    from torchao.optim.subclass_8bit import OptimState8bit

    state: Tensor = OptimState8bit.zeros(parameter.shape, signed, block, parameter.device, dtype=parameter.dtype)
    return _with_shared_table(state)


def _dynamic4(parameter: Tensor, block: int, signed: bool) -> Tensor:
    from torchao.optim.subclass_4bit import OptimState4bit

    state: Tensor = OptimState4bit.zeros(parameter.shape, signed, block, parameter.device, dtype=parameter.dtype)
    return _with_shared_table(state)


def _e4m3(parameter: Tensor, block: int, _signed: bool) -> Tensor:
    from torchao.optim.subclass_fp8 import OptimStateFp8

    state: Tensor = OptimStateFp8.zeros(parameter.shape, block, parameter.device, dtype=parameter.dtype)
    return state


_BLOCKED: Mapping[str, Callable[[Tensor, int, bool], Tensor]] = MappingProxyType(
    {"dynamic8": _dynamic8, "dynamic4": _dynamic4, "e4m3:block256": _e4m3}
)


def _with_shared_table(state: Any) -> Tensor:
    """Return the state with one code table that all similar states share; torchao makes one per state, 1 KiB each."""
    table = state.qmap
    state.qmap = _shared(tuple(table.tolist()), table.device)
    found: Tensor = state
    return found


@lru_cache(maxsize=16)
def _shared(table: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(table, dtype=torch.float32, device=device)


# ---- bitsandbytes


def _bitsandbytes() -> Any:
    return importlib.import_module("bitsandbytes.functional")  # it has no types


def _make_bitsandbytes(parameter: Tensor, stored: Stored) -> States:
    functional = _bitsandbytes()
    states: States = {"step": 0}
    for number, (name, fmt) in enumerate(stored.states.items(), 1):
        if isinstance(fmt, Format):
            states[f"state{number}"] = torch.zeros_like(parameter, dtype=torch_dtype(fmt.carrier), requires_grad=False)
            continue
        table = functional.create_dynamic_map(signed=not name.endswith("_sq"))
        blocks = -(-parameter.numel() // _BLOCK)
        states[f"state{number}"] = torch.zeros_like(parameter, dtype=torch.uint8, requires_grad=False)
        states[f"qmap{number}"] = _shared(tuple(table.tolist()), parameter.device)
        states[f"absmax{number}"] = torch.zeros(blocks, dtype=torch.float32, device=parameter.device)
    return states


def _numbered(states: Mapping[str, Any]) -> dict[int, str]:
    return {1: "exp_avg", 2: "exp_avg_sq"} if "state2" in states else {1: "momentum_buffer"}


def _widen_bitsandbytes(states: Mapping[str, Any]) -> States:
    functional = _bitsandbytes()
    wide: States = {"step": torch.tensor(float(states["step"]))} if "state2" in states else {}
    for number, name in _numbered(states).items():
        codes = states[f"state{number}"]
        wide[name] = codes.float()
        if codes.dtype is torch.uint8:
            table, scales = states[f"qmap{number}"], states[f"absmax{number}"]
            wide[name] = functional.dequantize_blockwise(codes, absmax=scales, code=table, blocksize=_BLOCK)
    return wide


def _fill_bitsandbytes(own: States, wide: Mapping[str, Any]) -> States:
    functional = _bitsandbytes()
    for number, name in _numbered(own).items():
        codes = own[f"state{number}"]
        if codes.dtype is torch.uint8:
            found, scales = functional.quantize_blockwise(wide[name], own[f"qmap{number}"], blocksize=_BLOCK)
            codes.copy_(found)
            own[f"absmax{number}"].copy_(scales.absmax)
        else:
            codes.copy_(wide[name])
    own["step"] = int(wide.get("step", 1))
    return own
