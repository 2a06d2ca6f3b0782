"""Round to, encode and decode formats that are a table of values."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from assign.formats.tables import Table
from assign.numerics.kernels import Scale, Work


class _Tensors(NamedTuple):
    """The numbers of a table on one device: float32, and int32 for codes."""

    values: Tensor
    limits: Tensor
    codes: Tensor
    of_codes: Tensor


@functools.lru_cache(maxsize=64)
def _tensors(table: Table, device: torch.device) -> _Tensors:
    with torch.inference_mode(False):
        values, limits, of_codes = (
            torch.tensor(each, dtype=torch.float32, device=device)
            for each in (table.values, table.limits, table.of_codes)
        )
        codes = torch.tensor(table.codes, dtype=torch.int32, device=device)
    return _Tensors(values, limits, codes, of_codes)


@functools.lru_cache(maxsize=256)
def quantizing(table: Table, saturate: bool) -> Work:
    """Return the kernel that rounds to a table, and without numbers: its tables are of its own.

    Without ``saturate``, values beyond the format become infinite, or, if the format saturates, only infinite ones NaN.
    """

    def kernel(x: Tensor, scale: Scale | None, _numbers: Sequence[Any]) -> Tensor:
        x = x.to(torch.float32) if scale is None else x.to(torch.float32) * scale.inverse
        there = _tensors(table, x.device)
        near = there.values[torch.bucketize(x, there.limits, right=True)]
        if not saturate and table.saturates:
            near = torch.where(x.isinf(), math.nan, near)
        elif not saturate:
            near = torch.where(x.abs() >= table.overflow_threshold, x * math.inf, near)
        near = torch.where(x.isnan(), x, near)
        return near if scale is None else near * scale.value

    return Work(kernel, (), (), 1.0)


@functools.lru_cache(maxsize=256)
def coding(table: Table) -> tuple[Work, Work]:
    """Return encoder and decoder."""
    odd = [code for code, value in enumerate(table.of_codes) if math.isnan(value)]
    nan = _stored(odd[0] if odd else table.codes[-1], table.bits)

    def encode(x: Tensor, scale: Scale | None, _numbers: Sequence[Any]) -> Tensor:
        x = x.to(torch.float32) if scale is None else x.to(torch.float32) * scale.inverse
        there = _tensors(table, x.device)
        codes = there.codes[torch.bucketize(x, there.limits, right=True)]
        return torch.where(x.isnan(), nan, codes if table.bits < 16 else codes.to(torch.int16).to(torch.int32))

    def decode(codes: Tensor, scale: Scale | None, _numbers: Sequence[Any]) -> Tensor:
        value = _tensors(table, codes.device).of_codes[codes.long() & ((1 << table.bits) - 1)]
        return value if scale is None else value * scale.value

    kernels: tuple[Callable[..., Tensor], Callable[..., Tensor]] = encode, decode
    return Work(kernels[0], (), (), 1.0), Work(kernels[1], (), (), 1.0)


def _stored(code: int, bits: int) -> int:
    """Return a code as int16 holds it: the sign bit of 16 bits is that of the int16."""
    return code - (1 << 16) if bits == 16 and code >> 15 else code
