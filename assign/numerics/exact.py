"""Exact sums of products of float32 numbers, rounded once.

A quire, the exact accumulator of posits, holds any sum of products of posits. Here a sum is a bilinear function of two
tensors, such as a matrix product, in float64, where every partial sum is exact:

* in one product, if the bits between the lowest and the highest bit of both operands, and those that the number of
  terms adds, are at most the 53 of a float64;
* otherwise in several: both operands are split into integers of few bits, :func:`_split`, so that each product of two
  parts fits. Products of the same weight are added, and the rest of the sum is in integers, :func:`_join`.

The result is a float32 *rounded to odd*: if the sum is no float32, it is the neighbour of the sum whose last bit is 1.
Rounding it again, to any format of at most 22 significant bits, gives what rounding the exact sum gives: no result lies
on a tie unless the sum does. Source: S. Boldo, G. Melquiond, "Emulation of a FMA and correctly rounded sums: proved
algorithms using rounding to odd", IEEE Transactions on Computers 57 (2008).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Bilinear = Callable[[Tensor, Tensor], Tensor]
"""A function that sums products of elements of its two arguments, e.g. ``torch.matmul``."""

_FLOAT64_BITS = 53
_SPARE = 2
"""Bits for sums of products of the same weight: at most 2^2 per pair of elements, as 24 bits are in at most 4 parts
of at least 8 bits."""


@torch.no_grad()
def sum_of_products(product: Bilinear, a: Tensor, b: Tensor, *, terms: int, addend: Tensor | None = None) -> Tensor:
    """Return ``product(a, b) + addend``, summed exactly, in float32 rounded to odd.

    Every result that depends on an element that is not finite is NaN. A sum beyond float32 becomes its largest value,
    and one below its smallest value becomes this.

    Args:
        product: sums products of elements of its arguments, in any order; called with float64 tensors.
        a: any shape, float32.
        b: any shape, float32.
        terms: the largest number of products in a sum.
        addend: float32; it must broadcast to the result.
    Returns:
        float32, of the shape of ``product(a, b)``.
    """
    finite = [torch.where(x.isfinite(), x, 0.0).double() for x in (a, b)]
    rest = None if addend is None else torch.where(addend.isfinite(), addend, 0.0).double()
    result = _sum(product, finite[0], finite[1], terms, rest)
    if not all(bool(x.isfinite().all()) for x in (a, b)):
        marks = [(~x.isfinite()).double() for x in (a, b)]
        touched = product(marks[0], torch.ones_like(marks[1])) + product(torch.ones_like(marks[0]), marks[1])
        result = torch.where(touched > 0, math.nan, result)
    if addend is not None:
        result = torch.where(addend.isfinite(), result, math.nan)
    return result


def _sum(product: Bilinear, a: Tensor, b: Tensor, terms: int, addend: Tensor | None) -> Tensor:
    carry = max(terms, 1).bit_length()
    (a_low, a_high), (b_low, b_high) = _span(a), _span(b)
    if a_high - a_low + b_high - b_low + carry <= _FLOAT64_BITS:
        return to_odd(product(a, b), torch.zeros((), dtype=a.dtype, device=a.device) if addend is None else addend)
    width = (_FLOAT64_BITS - _SPARE - carry) // 2
    parts: dict[int, Tensor] = {}
    b_parts = _split(b, width)
    for i, x in _split(a, width).items():
        for j, y in b_parts.items():
            found = product(x, y)
            parts[i + j] = parts[i + j] + found if i + j in parts else found
    if not parts:
        parts[0] = product(a, b)
    shape = next(iter(parts.values())).shape
    for i, x in (_split(addend, width) if addend is not None else {}).items():
        parts[i] = parts[i] + x if i in parts else x.expand(shape)
    return _join({i: x.to(torch.int64) for i, x in parts.items()}, width)


def _span(x: Tensor) -> tuple[int, int]:
    """Return the exponents of the lowest bit and of the bit above the highest of all elements; (0, 0) if all are 0."""
    if not bool(x.any()):
        return 0, 0
    mantissa, exponent = torch.frexp(x[x != 0])
    whole = (mantissa.abs() * 2.0**24).to(torch.int64)  # exact: x was a float32
    lowest = torch.frexp((whole & -whole).double()).exponent + exponent - 25
    return int(lowest.min()), int(exponent.max())


def _split(x: Tensor, width: int) -> dict[int, Tensor]:
    """Return float64 integers ``p_i`` below ``2^width``, with ``x = Σ p_i · 2^(width · i)``; none is all 0."""
    parts = {}
    index = (_span(x)[1] - 1) // width
    while bool(x.any()):
        part = (x * math.ldexp(1.0, -width * index)).trunc()
        if bool(part.any()):
            parts[index] = part
        x = x - part * math.ldexp(1.0, width * index)
        index -= 1
    return parts


def _join(parts: dict[int, Tensor], width: int) -> Tensor:
    """Return ``Σ p_i · 2^(width · i)`` of int64 tensors below ``2^54``, as float32 rounded to odd."""
    lowest, highest = min(parts), max(parts)
    zero = torch.zeros_like(parts[lowest])
    digits, carry = [], zero
    for index in range(lowest, highest):  # all but the highest: digits from 0 to 2^width - 1
        digit = parts.get(index, zero) + carry
        carry = digit >> width
        digits.append(digit & ((1 << width) - 1))
    total, exponent, inexact = parts[highest] + carry, torch.full_like(zero, width * highest), zero.bool()
    for digit in reversed(digits):
        fits = total.abs() < (1 << (62 - width))  # if not, it stays so, and no later digit is added
        inexact = inexact | (~fits & (digit != 0))
        total = torch.where(fits, total * (1 << width) + digit, total)
        exponent = torch.where(fits, exponent - width, exponent)
    total = total | inexact.to(torch.int64)
    long = total.abs() >= (1 << _FLOAT64_BITS)
    shorter = (total >> 10) | ((total & 1023) != 0).to(torch.int64)
    total, exponent = torch.where(long, shorter, total), torch.where(long, exponent + 10, exponent)
    power = ((exponent + 1023) << 52).view(torch.float64)  # torch.ldexp computes powers in float32
    return to_odd(total.double() * power, torch.zeros((), dtype=torch.float64, device=total.device))


def to_odd(x: Tensor, y: Tensor) -> Tensor:
    """Return ``x + y`` of float64 tensors as float32 rounded to odd."""
    total = x + y
    other = total - x
    error = (x - (total - other)) + (y - other)  # exact: Knuth's two-sum
    near = total.to(torch.float32)
    near = near.clamp(-torch.finfo(torch.float32).max, torch.finfo(torch.float32).max)
    rest = (total - near.double()) + error  # of the sign of what is missing
    bits = near.view(torch.int32)
    negative = torch.where(near == 0, rest < 0, bits < 0)
    magnitude = bits & ((1 << 31) - 1)
    below = torch.where(negative, rest > 0, rest < 0)  # the sum lies between zero and ``near``
    magnitude = torch.where(below & (magnitude > 0), magnitude - 1, magnitude) | (rest != 0).to(torch.int32)
    return torch.where(negative, magnitude | -(1 << 31), magnitude).view(torch.float32)
