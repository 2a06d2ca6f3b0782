"""The layout of posits. This module does not import torch."""

import math
from dataclasses import dataclass

BITS = range(5, 17)
"""Lengths of posits. Shorter ones have almost no fraction; longer ones do not fit into two bytes."""

EXPONENT_BITS = range(4)
"""Numbers of exponent bits of posits. With 3, posits of 16 bits reach from 2^-112 to 2^112; with 4, beyond float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Posit:
    """The layout of posit(n,es): sign, regime, exponent and fraction, in two's complement.

    The regime is a run of equal bits and the opposite bit after it. A run of ``r`` ones means ``k = r - 1``, of ``r``
    zeros ``k = -r``. Up to ``es`` bits of the exponent ``e`` follow, of which missing ones are 0, and the rest is the
    fraction ``f``. The value is ``(1 + f) · 2^(k · 2^es + e)``. The code of a negative value is the two's complement of
    the code of its magnitude. Code 0 is zero, which has no sign, and a 1 followed by zeros is NaR, here NaN.

    Attributes:
        bits: length of a code, ``n``.
        exponent_bits: ``es``.
        underflows: whether a magnitude below ``minpos / 2^(2^es)`` becomes zero, and not ``minpos``.
    Source: Posit Standard 2022, section 3; arXiv 2105.00053, section 2, for other ``es`` than 2 and for ``underflows``.
    """

    bits: int
    exponent_bits: int
    underflows: bool = False

    @property
    def saturates(self) -> bool:
        """Whether finite gradients beyond the format saturate, and do not become infinite: always."""
        return True

    @property
    def regime(self) -> int:
        """How much the exponent of a value grows with ``k``: ``2^es``."""
        return 1 << self.exponent_bits

    @property
    def max_exponent(self) -> int:
        """Exponent of ``maxpos``, the largest value; that of ``minpos``, the smallest positive one, is its negative."""
        return self.regime * (self.bits - 2)

    @property
    def granule(self) -> float:
        """The largest power of two of which every value is a multiple: ``minpos``."""
        return math.ldexp(1.0, -self.max_exponent)

    @property
    def smallest(self) -> float:
        """The smallest positive value, ``minpos``."""
        return self.granule

    @property
    def overflow_threshold(self) -> float:
        """An element overflows iff ``|x|`` is at least this: half a step above ``maxpos`` in the code.

        It becomes ``maxpos`` nevertheless: posits saturate.
        """
        return math.ldexp(1.0, self.max_exponent + self.regime)

    @property
    def underflow_threshold(self) -> float:
        """An element becomes zero iff ``0 < |x| <=`` this: 0 unless ``underflows``.

        Then it is the largest float32 below ``minpos / 2^(2^es)``, because that number itself becomes ``minpos``.
        """
        return math.ldexp(1 - 2.0**-24, -self.max_exponent - self.regime) if self.underflows else 0.0

    def magnitudes(self) -> list[float]:
        """Return zero and the positive values in the order of their codes."""
        return [0.0, *map(self._value, range(1, 1 << (self.bits - 1)))]

    def _value(self, code: int) -> float:
        """Return the value of a positive code."""
        text = f"{code:0{self.bits - 1}b}"
        run = len(text) - len(text.lstrip(text[0]))
        k = run - 1 if text[0] == "1" else -run
        rest = text[run + 1 :]
        exponent, fraction = rest[: self.exponent_bits], rest[self.exponent_bits :]
        e = int(exponent or "0", 2) << (self.exponent_bits - len(exponent))
        f = int(fraction or "0", 2) / (1 << len(fraction))
        return math.ldexp(1 + f, k * self.regime + e)
