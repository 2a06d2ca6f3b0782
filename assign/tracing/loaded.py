"""Remember the dtypes in which a model was loaded, regardless of the dtypes that a plan stores.

A plan that stores a parameter in another dtype changes the parameter itself. Its earlier dtype is kept in an attribute
of the model, so that copies, pickles and sharded models have it too.
"""

import torch
from torch import nn

from assign.formats.parsing import parse_format
from assign.formats.rows import LOADED, Format
from assign.numerics.torch_dtypes import dtype_name, torch_dtype
from assign.plan.keys import master_key
from assign.plan.persistent_state import master_format, stored_dtype
from assign.plan.plan import Assignment

_ATTRIBUTE = "_assign_loaded"


def loaded_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """Return the dtype in which each floating-point parameter was loaded: its own, unless a plan has changed it."""
    noted = getattr(model, _ATTRIBUTE, {})
    return {name: noted.get(name, p.dtype) for name, p in model.named_parameters() if p.is_floating_point()}


def note_loaded_dtypes(model: nn.Module, plan: Assignment) -> None:
    """Store the dtypes in which the parameters were loaded, before a plan changes them.

    A parameter that already has the dtype of its master in the plan, as in a model saved under the plan, was loaded in
    the dtype that the plan names as loaded.
    """
    dtypes = loaded_dtypes(model)
    for name in dtypes.keys() - getattr(model, _ATTRIBUTE, {}).keys():
        if master_key(name) in plan.entries and dtypes[name] == _dtype_of(master_format(plan.entries, name)):
            dtypes[name] = _dtype_of(parse_format(plan.loaded.get(name, "fp32")))
    setattr(model, _ATTRIBUTE, dtypes)


def _dtype_of(fmt: Format) -> torch.dtype:
    return torch_dtype(stored_dtype(fmt))


def stored_otherwise(model: nn.Module) -> dict[str, torch.dtype]:
    """Return the parameters to which a plan has given another dtype, with their loaded dtypes."""
    now = dict(model.named_parameters())
    return {name: dtype for name, dtype in loaded_dtypes(model).items() if now[name].dtype != dtype}


def complete(plan: Assignment, model: nn.Module) -> Assignment:
    """Return the plan with an entry for each master that it leaves unchanged in another dtype than float32."""
    names = {name: dtype_name(p.dtype) for name, p in model.named_parameters()}
    return plan.with_loaded({name: LOADED[dtype].name for name, dtype in names.items() if dtype in LOADED})
