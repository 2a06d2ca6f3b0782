"""The layout of formats that are a table of values. This module does not import torch."""

import hashlib
import itertools
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from assign.errors import FormatError

BITS = range(2, 17)
"""Lengths of codes in a table: at most two bytes."""


def to_float32(value: float) -> float:
    """Return the nearest float32; infinity beyond its range."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)


def place_of(value: float) -> int:
    """Return the place of a float32 among all of them, in ascending order; 0 and -0 have place 0."""
    bits = int(struct.unpack("<i", struct.pack("<f", value))[0])
    return bits if bits >= 0 else -(bits & 0x7FFFFFFF)


def at_place(place: int) -> float:
    """Return the float32 at a place."""
    return math.copysign(float(struct.unpack("<f", struct.pack("<i", abs(place)))[0]), place)


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """The layout of a format of up to 16 bits that is defined by the values of its codes.

    Attributes:
        bits: length of a code.
        saturates: whether finite gradients beyond the format saturate, and do not become infinite.
        of_codes: the float32 value of each code; NaN for codes without a finite value.
        values: the finite values in ascending order.
        codes: a code of each of these values.
        limits: for each value but the first, the smallest float32 that is rounded to it or to a larger value.
    """

    bits: int
    saturates: bool
    of_codes: tuple[float, ...]
    values: tuple[float, ...]
    codes: tuple[int, ...]
    limits: tuple[float, ...]

    @property
    def smallest(self) -> float:
        """The smallest positive value."""
        return min(value for value in self.values if value > 0)

    @property
    def largest(self) -> float:
        """The largest magnitude."""
        return max(-self.values[0], self.values[-1])

    @cached_property
    def granule(self) -> float:
        """The largest power of two of which every value is a multiple."""
        return math.ldexp(1.0, min(_last_bit(value) for value in self.values if value))

    @cached_property
    def mantissa_bits(self) -> int:
        """The largest number of bits of a value after its first."""
        return max(math.frexp(value)[1] - 1 - _last_bit(value) for value in self.values if value)

    @property
    def overflow_threshold(self) -> float:
        """An element overflows iff ``|x|`` is at least this: half of the last step above the largest magnitude."""
        ends = sorted(map(abs, self.values))[-3:]
        below = next(value for value in (*reversed(ends), 0.0) if value < self.largest)
        return self.largest + (self.largest - below) / 2

    @property
    def underflow_threshold(self) -> float:
        """An element becomes zero iff ``0 < |x| <=`` this, for positive ones."""
        return at_place(place_of(self.limits[self.values.index(0.0)]) - 1)

    def magnitudes(self) -> list[float]:
        """Return the magnitudes of all values, in ascending order."""
        return sorted({abs(value) for value in self.values})

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that rounding, encoding and decoding depend on."""
        facts = (self.bits, self.saturates, self.values, self.codes, self.limits)
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    def same(self, other: "Table") -> bool:
        """Whether both tables round, encode and decode in the same way."""
        return self.fingerprint == other.fingerprint


def _last_bit(value: float) -> int:
    """Return the exponent of the last bit of a value that is not zero."""
    numerator, denominator = value.as_integer_ratio()
    return (numerator & -numerator).bit_length() - 1 if denominator == 1 else 1 - denominator.bit_length()


def make_table(
    name: str, bits: int, decode: Callable[[int], float], rounding: Callable[[float], float] | None, saturates: bool
) -> Table:
    """Return the table of a format; see :func:`assign.register_format`.

    Raises:
        FormatError: the values or the rounding are not those of a number format.
    """
    of_codes = tuple(to_float32(float(decode(code))) for code in range(1 << bits))
    first: dict[float, int] = {}
    for code, value in enumerate(of_codes):
        if math.isfinite(value):
            first.setdefault(value, code)
    values = tuple(sorted(first))
    if 0.0 not in first or len(values) < 3 or values[0] >= 0 or values[-1] <= 0:
        raise FormatError(
            f"register_format: {name!r} has {len(values)} finite values, from {values[0] if values else None} to "
            f"{values[-1] if values else None}.\n  Allowed: zero, positive and negative values.\n"
            "  Change decode(), which is called with every code."
        )
    codes = tuple(first[value] for value in values)
    limits = _nearest(values, codes) if rounding is None else _found(name, values, rounding)
    unit = tuple(value + 0.0 if math.isfinite(value) else math.nan for value in of_codes)
    return Table(bits=bits, saturates=saturates, of_codes=unit, values=values, codes=codes, limits=limits)


def _nearest(values: Sequence[float], codes: Sequence[int]) -> tuple[float, ...]:
    """Return the limits of rounding to nearest, ties to the even code, or up if both are even or both odd."""
    limits = []
    for below, above, code, other in zip(values, values[1:], codes, codes[1:], strict=False):
        middle = (Fraction(below) + Fraction(above)) / 2
        place = place_of(to_float32(float(middle))) - 2
        goes_up = other % 2 <= code % 2
        while Fraction(at_place(place)) < middle or (not goes_up and Fraction(at_place(place)) == middle):
            place += 1
        limits.append(at_place(place))
    return tuple(limits)


def _found(name: str, values: Sequence[float], rounding: Callable[[float], float]) -> tuple[float, ...]:
    """Return the limits of a rounding function, by bisection between neighbours."""
    limits = []
    for below, above in itertools.pairwise(values):
        low, high = place_of(below), place_of(above)
        _check(name, rounding, below, (below,))
        _check(name, rounding, above, (above,))
        while high - low > 1:
            middle = (low + high) // 2
            if _check(name, rounding, at_place(middle), (below, above)) == above:
                high = middle
            else:
                low = middle
        limits.append(at_place(high))
    return tuple(limits)


def _check(name: str, rounding: Callable[[float], float], x: float, allowed: Sequence[float]) -> float:
    found = to_float32(float(rounding(x)))
    if found not in allowed:
        raise FormatError(
            f"register_format: round({x!r}) of {name!r} is {found!r}.\n"
            f"  Allowed: {' or '.join(map(repr, allowed))}, as these are the values of codes.\n"
            "  Return a value of decode() that is a neighbour of the argument, and the argument itself if it is one."
        )
    return found
