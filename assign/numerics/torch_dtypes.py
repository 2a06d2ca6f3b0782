"""Convert between torch dtypes and their names and formats in :mod:`assign.formats.dtypes`."""

from collections.abc import Mapping

import torch

from assign.formats.dtypes import FORMAT_NAMES, NARROW
from assign.formats.rows import LOADED, Format


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of a name, e.g. ``torch.bfloat16`` for ``bfloat16``."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a torch dtype, e.g. ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


COMPUTED = tuple(map(torch_dtype, FORMAT_NAMES))
"""Dtypes in which operators compute: float64, float32, bfloat16 and float16."""

# Plain dicts, because Dynamo does not compile look-ups in a mapping proxy, and compiled optimizers look up these.

ROUNDED: Mapping[torch.dtype, Format] = {torch_dtype(name): LOADED[name] for name in ("float32", *NARROW)}
"""Dtype of a tensor that rounding kernels accept → format with the same values."""

SIXTEEN_BITS: Mapping[torch.dtype, str] = {torch_dtype(name): FORMAT_NAMES[name] for name in NARROW}
"""16-bit dtype → name of the format with the same values."""
