"""Arithmetic of rounding and encoding in plain torch, one function for each kernel.

All arithmetic is float32 and all bits are those of float32. The numbers are either Python numbers, which become
constants of a graph, or 0-dim tensors, so that one compilation serves every ``fp(e,m,b)``.
"""

import functools
import math
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from assign.formats.rows import Format, Rounding, Scaling

SIGN, MAGNITUDE, INF = -(1 << 31), (1 << 31) - 1, 0x7F800000  # in the bits of a float32
WIDTH, BIAS = 23, 127  # mantissa bits and exponent bias of a float32


def bits_of(value: float) -> int:
    """Return the bits of ``value`` as a float32."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


def largest(x: Tensor) -> Tensor:
    """Return the bits of the largest finite magnitude, int32 without axes; 0 if there is none.

    Infinities and NaN are ignored: one of them, possibly discarded later by a ``where``, must not set the scale of all
    other elements.
    """
    bits = x.to(torch.float32).view(torch.int32) & MAGNITUDE
    return torch.where(bits < INF, bits, 0).amax()


def power_of_two(magnitude: Tensor, limits: Sequence[Any]) -> Tensor:
    """Return the smallest power-of-two scale that brings ``magnitude`` (float32 bits) within a format's maximum."""
    carry, highest_value, lowest, highest = limits
    exponent = (((magnitude + carry) >> WIDTH) - highest_value).clamp(lowest, highest)
    return torch.where(magnitude == 0, bits_of(1.0), (exponent + BIAS) << WIDTH).view(torch.float32)


def inverse_power(scale: Tensor) -> Tensor:
    """Return the exact inverse of a power of two: its exponent with the sign reversed."""
    return ((2 * BIAS << WIDTH) - scale.view(torch.int32)).view(torch.float32)


def share_of(magnitude: Tensor, limits: Sequence[Any]) -> Tensor:
    """Return the scale that maps ``magnitude``, bits of a float32, to a format's largest value."""
    inverse, lowest, highest = limits
    value = magnitude.view(torch.float32)
    return torch.where(magnitude == 0, 1.0, (value * inverse).clamp(lowest, highest))


class Scaler(NamedTuple):
    """A function from the bits of a largest magnitude to a scale, and its numbers."""

    kernel: Callable[[Tensor, Sequence[Any]], Tensor]
    ints: tuple[int, ...]
    floats: tuple[float, ...]


@functools.lru_cache(maxsize=1024)
def scaling(fmt: Format) -> Scaler:
    """Return how the scale of a tensor follows from its largest magnitude; the scale is 1 if that is zero."""
    if fmt.scaling is Scaling.AMAX:
        return Scaler(share_of, (), (1 / fmt.max_value, *(math.ldexp(1.0, each) for each in fmt.scale_exponents)))
    limit = bits_of(fmt.max_value)
    mantissa = (1 << WIDTH) - 1
    # exponent of the magnitude minus that of max_value, plus one if its mantissa is larger
    return Scaler(power_of_two, (mantissa - (limit & mantissa), limit >> WIDTH, *fmt.scale_exponents), ())


class Scale(NamedTuple):
    """A scale without axes and its inverse. Kernels do not divide, because compilers for GPUs divide approximately."""

    value: Tensor
    inverse: Tensor


def _quantize_by_sum(x: Tensor, scale: Scale | None, numbers: Sequence[Any]) -> Tensor:
    """Round by adding and subtracting ``step · 2^23``, where this is a float32: the result is a multiple of ``step``.

    Ties go to even. ``step`` belongs to the element's exponent, clamped to the exponents of the format, so that
    subnormals and overflow need no separate path. ``away`` corrects a tie that was rounded down to even.
    """
    lowest, highest, lift, away, maximum, overflow = numbers
    x = x.to(torch.float32)
    value = x.abs() if scale is None else x.abs() * scale.inverse
    exponent = (value.view(torch.int32) & INF).clamp(lowest, highest)
    magic = (exponent + lift).view(torch.float32)
    near = (value + magic) - magic
    near = torch.where(value - near == magic * 2.0**-24, near + magic * away, near)
    near = torch.where(near > maximum, overflow, near)
    return torch.copysign(near if scale is None else near * scale.value, x)


def _quantize_by_bits(x: Tensor, scale: Scale | None, numbers: Sequence[Any]) -> Tensor:
    """Round by cutting float32 bits, for a format with float32's lowest exponent, including its subnormals."""
    half, even, shift, mask, maximum, overflow = numbers
    x = x.to(torch.float32)
    bits = (x if scale is None else x * scale.inverse).view(torch.int32)
    magnitude = bits & MAGNITUDE
    near = (magnitude + (half + ((magnitude >> shift) & even))) & mask
    near = torch.where(near > maximum, overflow, near)
    near = torch.where(magnitude > INF, magnitude, near)
    result = (near | (bits & SIGN)).view(torch.float32)
    return result if scale is None else result * scale.value


def _encode(x: Tensor, scale: Scale | None, numbers: Sequence[Any]) -> Tensor:
    """Return the codes, as int32, of values on the grid.

    The code of a subnormal is its number of steps: the last bits of a sum. Half a step is added before bits are cut,
    because a scale that is no power of two leaves values slightly off the grid.
    """
    half, shift, offset, min_normal, magic_bits, top_code, nan_code, sign, magic = numbers
    value = x.to(torch.float32) if scale is None else x.to(torch.float32) * scale.inverse
    bits = value.view(torch.int32)
    magnitude = bits & MAGNITUDE
    subnormal = (value.abs() + magic).view(torch.int32) - magic_bits
    code = torch.where(magnitude < min_normal, subnormal, ((magnitude + half) >> shift) - offset).clamp(max=top_code)
    code = torch.where(magnitude > INF, nan_code, code)
    return code.add((bits >> 31) & sign)


def _decode(codes: Tensor, scale: Scale | None, numbers: Sequence[Any]) -> Tensor:
    """Return the values, as float32, of codes."""
    shift, offset, first_normal, inf_code, first_nan, sign, step = numbers
    codes = codes.to(torch.int32)
    code = codes & (sign - 1)
    value = ((code << shift) + offset).view(torch.float32)
    value = torch.where(code < first_normal, code.to(torch.float32) * step, value)
    value = torch.where(code == inf_code, math.inf, value)
    value = torch.where(code >= first_nan, math.nan, value)
    value = value if scale is None else value * scale.value
    negative = (value.view(torch.int32) ^ SIGN).view(torch.float32)  # some compilers use 0 - value for -value: +0 for 0
    return torch.where((codes & sign) != 0, negative, value)


_WORD = (1 << 32) - 1


def _mix(word: Tensor) -> Tensor:
    """Map 32-bit words one to one so that every bit affects all others. int64 throughout: no product overflows.

    Source: github.com/skeeto/hash-prospector, the two-round function of lowest bias; its second factor minus ``2^32``.
    """
    word = ((word ^ (word >> 16)) * 0x21F0AAAD) & _WORD
    word = ((word ^ (word >> 15)) * (0xD35A2D97 - (1 << 32))) & _WORD
    return word ^ (word >> 15)


def random_bits(count: int, key: Tensor, first: int) -> Tensor:
    """Return 31 random bits for each of the elements ``first``, ``first + 1``, … under ``key``.

    The bits depend only on key and index, not on device or splitting. Each word of the key enters before its own mixing
    step, so that two streams with the same seed are not shifts of one another.

    Args:
        count: number of elements.
        key: int64 [2].
        first: index of the first element.
    Returns:
        int32 [count].
    """
    return random_bits_at(torch.arange(count, dtype=torch.int64, device=key.device) + first, key)


def random_bits_at(index: Tensor, key: Tensor) -> Tensor:
    """Return the bits of :func:`random_bits` for the elements with these indices, int64 of any shape."""
    word = _mix((index ^ key[0]) & _WORD)
    return (_mix((word + (index >> 32) + key[1]) & _WORD) >> 1).to(torch.int32)


def _quantize_stochastically(
    x: Tensor, scale: Scale | None, numbers: Sequence[Any], key: Tensor, first: int = 0
) -> Tensor:
    """Round stochastically a dense tensor of one axis whose first element has index ``first``.

    Above ``min_normal``, a step is one bit of a float32: random bits are added below it and cut, which is exact. Below,
    where the step is a constant, the fraction of a step is compared with a random fraction of 31 bits.
    """
    mask, min_normal, maximum, overflow, raised, finer, coarser, lowered = numbers
    random = random_bits(x.shape[0], key, first)
    x = x.to(torch.float32)
    bits = (x if scale is None else x * scale.inverse).view(torch.int32)
    magnitude = bits & MAGNITUDE
    steps = magnitude.clamp(max=min_normal).view(torch.float32) * raised * finer
    whole = steps.floor()
    up = random < ((steps - whole) * 2.0**31).to(torch.int32)
    subnormal = ((whole + up.to(torch.float32)) * coarser * lowered).view(torch.int32)
    near = torch.where(magnitude < min_normal, subnormal, (magnitude + (random & ~mask)) & mask)
    near = torch.where(near > maximum, overflow, near)
    near = torch.where(magnitude > INF, magnitude, near)
    result = (near | (bits & SIGN)).view(torch.float32)
    return result if scale is None else result * scale.value


@functools.cache
def _propagating_nonfinite(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the kernel extended to give NaN for every non-finite input."""

    def quantize(x: Tensor, *rest: Any) -> Tensor:
        x = x.to(torch.float32)
        return torch.where((x.view(torch.int32) & MAGNITUDE) < INF, kernel(x, *rest), math.nan)

    return quantize


class Work(NamedTuple):
    """A kernel and its numbers; the kernel must be given the scale times ``unit``."""

    kernel: Callable[..., Tensor]
    ints: tuple[int, ...]
    floats: tuple[float, ...]
    unit: float


def _unit_exponent(fmt: Format) -> int:
    """Return the exponent of a unit small enough for ``step · 2^23`` to stay finite; 0 for all usual formats."""
    return 0 if fmt.max_exponent + WIDTH - fmt.mantissa_bits <= BIAS else 24


@functools.lru_cache(maxsize=1024)
def quantizing(fmt: Format, saturate: bool) -> Work:
    """Return the kernel that rounds to ``fmt`` and its numbers; overflow becomes the largest value or infinity.

    A delayed scale may be too small for one step. Its format therefore saturates instead of losing the step; if
    overflow would have been infinite, non-finite inputs become NaN, so that they are not lost either.
    """
    if fmt.delayed and not saturate:
        work = quantizing(fmt, True)
        return work._replace(kernel=_propagating_nonfinite(work.kernel))
    if fmt.stochastic:
        return _quantizing_stochastically(fmt, saturate)
    shift = WIDTH - fmt.mantissa_bits
    away = fmt.rounding is Rounding.AWAY
    if fmt.min_exponent == 1 - BIAS:
        half = (1 << shift) >> 1
        limit = bits_of(fmt.max_value)
        ints = (half if away or not shift else half - 1, int(not away and shift > 0), shift, -(1 << shift))
        return Work(_quantize_by_bits, (*ints, limit, limit if saturate else INF), (), 1.0)
    unit = _unit_exponent(fmt)
    lowest, highest = ((exponent - unit + BIAS) << WIDTH for exponent in (fmt.min_exponent, fmt.max_exponent))
    maximum = math.ldexp(fmt.max_value, -unit)
    floats = (2.0**-WIDTH if away else 0.0, maximum, maximum if saturate else math.inf)
    return Work(_quantize_by_sum, (lowest, highest, shift << WIDTH), floats, 2.0**unit)


def _quantizing_stochastically(fmt: Format, saturate: bool) -> Work:
    limit = bits_of(fmt.max_value)
    plain = fmt.min_exponent == 1 - BIAS  # subnormals are those of float32: their bits are cut like all others
    lowest = 0 if plain else fmt.min_exponent
    ints = (-(1 << (WIDTH - fmt.mantissa_bits)), 0 if plain else bits_of(fmt.min_normal), limit)
    # a step may be too small for its inverse to be a float32: each direction takes two products
    floats = (2.0**-lowest, 2.0**fmt.mantissa_bits, 2.0**-fmt.mantissa_bits, 2.0**lowest)
    return Work(_quantize_stochastically, (*ints, limit if saturate else INF), floats, 1.0)


@functools.lru_cache(maxsize=1024)
def coding(fmt: Format) -> tuple[Work, Work]:
    """Return encoder and decoder."""
    unit = _unit_exponent(fmt) if fmt.min_exponent > 1 - BIAS else 0
    shift = WIDTH - fmt.mantissa_bits
    lowest = fmt.min_exponent - unit
    offset = (lowest + BIAS - 1) << fmt.mantissa_bits
    plain = not offset  # subnormals are those of float32: their bits are cut like all others
    magic = math.ldexp(1.0, lowest + shift)
    min_normal = 0 if plain else bits_of(math.ldexp(1.0, lowest))
    max_code = (bits_of(math.ldexp(fmt.max_value, -unit)) >> shift) - offset
    top_code = max_code + fmt.has_inf
    sign = 1 << (fmt.bits - 1)
    nan_code = sign - 1 if fmt.has_nan else max_code
    # the sign bit of a 16-bit code is the sign bit of int16: the code is negative, not out of range
    ints = (
        (1 << shift) >> 1,
        shift,
        offset,
        min_normal,
        bits_of(magic),
        top_code,
        nan_code,
        -sign if fmt.bits == 16 else sign,
    )
    encoder = Work(_encode, ints, (magic,), 2.0**unit)
    first_normal, never = 0 if plain else 1 << fmt.mantissa_bits, 1 << 30
    specials = (top_code if fmt.has_inf else -1, top_code + 1 if fmt.has_nan else never)
    step = math.ldexp(1.0, lowest - fmt.mantissa_bits)
    return encoder, Work(_decode, (shift, offset << shift, first_normal, *specials, sign), (step,), 2.0**unit)
