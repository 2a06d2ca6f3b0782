"""Store several narrow elements in one integer word.

A CPU compiler vectorizes arithmetic on 32-bit elements. For 16-bit floating-point elements it makes loops over buffers
in memory, and 16-bit integers it does not vectorize at all. A kernel can therefore read several elements from one word,
one lane at a time, each as a float32 or int32: the arithmetic is the same, at about five times the speed. Lanes are in
memory order, lowest bits first.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_NARROW = (torch.bfloat16, torch.int16)
_WORDS = {4: torch.int32, 8: torch.int64}


def lanes(*dtypes: torch.dtype) -> int:
    """Return how many elements share a word if a kernel reads and writes tensors of ``dtypes``; 1: each has its own.

    float16 has no lanes, because its bits are not the upper bits of a float32.
    """
    if torch.float16 in dtypes or not any(dtype in _NARROW for dtype in dtypes):
        return 1
    return 4 if torch.uint8 in dtypes else 2


def word_dtype(dtype: torch.dtype, count: int) -> torch.dtype:
    """Return the integer dtype that holds ``count`` elements of ``dtype``."""
    return _WORDS[dtype.itemsize * count] if count > 1 else dtype


def split(words: Tensor, dtype: torch.dtype, count: int) -> list[Tensor]:
    """Return the lanes of ``words``: values as float32, codes as int32."""
    if count == 1:
        return [words]
    halves = [words] if words.dtype == torch.int32 else [words.to(torch.int32), (words >> 32).to(torch.int32)]
    if dtype == torch.float32:
        return [half.view(torch.float32) for half in halves]
    if dtype == torch.uint8:
        return [(half >> shift) & 0xFF for half in halves for shift in (0, 8, 16, 24)]
    bits = [each for half in halves for each in (half << 16, half & -(1 << 16))]
    return [each.view(torch.float32) if dtype == torch.bfloat16 else each >> 16 for each in bits]


def join(values: Sequence[Tensor], dtype: torch.dtype, *, exact: bool = True) -> Tensor:
    """Return the words whose lanes are ``values``.

    Args:
        values: one tensor for each lane, as :func:`split` returns them: values as float32, codes as int32.
        dtype: dtype of a lane.
        exact: whether ``dtype`` holds every value exactly. Otherwise values become the nearest bfloat16, ties to even.
    """
    if len(values) == 1:
        return values[0]
    if dtype == torch.float32:
        halves = [value.view(torch.int32) for value in values]
    elif dtype == torch.uint8:
        halves = [_four(values)]
    else:
        round_bits = _bits if exact else _bits_of_nearest
        bits = [round_bits(value) if dtype == torch.bfloat16 else value << 16 for value in values]
        halves = [((low >> 16) & 0xFFFF) | (high & -(1 << 16)) for low, high in zip(bits[::2], bits[1::2], strict=True)]
    if len(halves) == 1:
        return halves[0]
    low, high = (half.to(torch.int64) for half in halves)
    return (low & 0xFFFFFFFF) | (high << 32)


def _bits(value: Tensor) -> Tensor:
    return value.view(torch.int32)


def _bits_of_nearest(value: Tensor) -> Tensor:
    """Return float32 bits whose upper 16 are those of the nearest bfloat16; a NaN keeps its own bits."""
    bits = value.view(torch.int32)
    rounded = bits + (0x7FFF + ((bits >> 16) & 1))
    return torch.where((bits & 0x7FFFFFFF) > 0x7F800000, bits, rounded)


def _four(codes: Sequence[Tensor]) -> Tensor:
    first, second, third, fourth = (code & 0xFF for code in codes)
    return first | (second << 8) | (third << 16) | (fourth << 24)
