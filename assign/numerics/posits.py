"""Arithmetic of posits in plain torch: the kernels that round, encode and decode.

The bits of a float32 magnitude, less the bias of the exponent, are the number ``exponent · 2^23 + mantissa``. Divided
after the lowest ``23 + es`` bits, they are the ``k`` of a posit's regime and, below it, its exponent and fraction as in
its code. Rounding in the code is therefore rounding these bits at a place that depends on ``k``, and a carry into ``k``
gives the next longer regime, whose value is the same.

All numbers of a format are run-time numbers, so that one compilation serves every ``posit(n,es)``.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from assign.formats.posits import Posit
from assign.numerics.kernels import BIAS, INF, MAGNITUDE, SIGN, WIDTH, Scale, Work, bits_of

_ONE = BIAS << WIDTH
_NAN = bits_of(math.nan)


def _rounded(magnitude: Tensor, numbers: Sequence[Any]) -> Tensor:
    """Return the nearest posit to a float32 magnitude: its bits less those of 1, from ``minpos`` to ``maxpos``."""
    longest, low, least, most = numbers
    bits = magnitude.clamp(least, most) - _ONE
    k = bits >> low
    room = (longest - (k ^ (k >> 31))).clamp(min=0)  # bits of the code behind the regime
    cut = low - room
    odd = torch.where(room == 0, k < 0, (bits >> cut) & 1)  # a regime of zeros ends with a 1
    half = (1 << cut) >> 1
    rounded: Tensor = (bits + (half - 1 + odd)) & -(1 << cut)
    return rounded


def _quantize(x: Tensor, scale: Scale | None, numbers: Sequence[Any]) -> Tensor:
    """Round in the code, ties to even. Zero has no sign."""
    *shape, zero_below, infinite = numbers
    x = x.to(torch.float32)
    bits = (x if scale is None else x * scale.inverse).view(torch.int32)
    magnitude = bits & MAGNITUDE
    near = _rounded(magnitude, shape) + _ONE
    near = torch.where(magnitude == INF, infinite, near)
    near = torch.where(magnitude > INF, magnitude, near)
    result = torch.where(magnitude < zero_below, 0, near | (bits & SIGN)).view(torch.float32)
    return result if scale is None else result * scale.value


def _encode(x: Tensor, scale: Scale | None, numbers: Sequence[Any]) -> Tensor:
    """Return the codes, as int32, of values on the grid; infinities become the largest value."""
    *shape, mask, nar = numbers
    longest, low, *_ = shape
    x = x.to(torch.float32)
    bits = (x if scale is None else x * scale.inverse).view(torch.int32)
    magnitude = bits & MAGNITUDE
    near = _rounded(magnitude, shape)
    k = near >> low
    run = k ^ (k >> 31)
    room = (longest - run).clamp(min=0)
    rest = (near & ((1 << low) - 1)) >> (low - room)
    ones = ((1 << (run + 1)) - 1) << (longest - run + 1)
    code = torch.where(k < 0, 1 << room, ones) + rest
    code = torch.where(magnitude == 0, 0, torch.where(bits < 0, -code, code))
    return torch.where(magnitude > INF, nar, code & mask)


def _decode(codes: Tensor, scale: Scale | None, numbers: Sequence[Any]) -> Tensor:
    """Return the values, as float32, of codes."""
    longest, low = numbers
    codes = codes.to(torch.int32)
    last = longest + 1  # number of the bit behind the sign
    mask = (2 << last) - 1
    negative = (codes >> (last + 1)) & 1
    code = torch.where(negative == 1, -codes, codes) & mask
    ones = (code >> last) & 1
    after = torch.where(ones == 1, ~code, code) & mask  # from the end of the regime's run on
    length = ((after.to(torch.float32).view(torch.int32) >> WIDTH) - (BIAS - 1)).clamp(min=0)
    run = last + 1 - length
    room = (length - 1).clamp(min=0)
    k = torch.where(ones == 1, run - 1, -run)
    bits = k * (1 << low) + ((code & ((1 << room) - 1)) << (low - room)) + _ONE
    bits = torch.where(negative == 1, torch.where(code == 0, _NAN, bits | SIGN), torch.where(code == 0, 0, bits))
    value = bits.view(torch.float32)
    return value if scale is None else value * scale.value


def _shape(posit: Posit) -> tuple[int, int, int, int]:
    """Return the longest rest of a code behind its regime, the place of ``k`` in a float32, and the limits as bits."""
    limit = posit.max_exponent << WIDTH
    return posit.bits - 3, WIDTH + posit.exponent_bits, _ONE - limit, _ONE + limit


@functools.lru_cache(maxsize=1024)
def quantizing(posit: Posit, saturate: bool) -> Work:
    """Return the kernel that rounds to a posit and its numbers.

    Finite values saturate in any case, because posits have no infinity. Infinities saturate too with ``saturate``;
    otherwise they become NaN, so that the loss scaler sees them.
    """
    shape = _shape(posit)
    zero_below = bits_of(math.ldexp(1.0, -posit.max_exponent - posit.regime)) if posit.underflows else 1
    return Work(_quantize, (*shape, zero_below, shape[-1] if saturate else _NAN), (), 1.0)


@functools.lru_cache(maxsize=1024)
def coding(posit: Posit) -> tuple[Work, Work]:
    """Return encoder and decoder."""
    shape = _shape(posit)
    # the sign bit of a 16-bit code is the sign bit of int16: the code is negative, not out of range
    whole = posit.bits == 16
    mask, nar = (-1, -(1 << 15)) if whole else ((1 << posit.bits) - 1, 1 << (posit.bits - 1))
    return Work(_encode, (*shape, mask, nar), (), 1.0), Work(_decode, shape[:2], (), 1.0)
