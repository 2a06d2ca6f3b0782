"""Slow references for ``assign.numerics.rounding``, from the definitions of the formats: no bits, no tricks.

A format of up to 16 bits is the list of its values, in the order of their codes; rounding is a search in that list.
Wider ones, whose list is too long, are exact arithmetic on fractions.
"""

import functools
import math
import re
from bisect import bisect_right
from fractions import Fraction

import numpy as np

# exponent bits, mantissa bits, and the number of largest codes that are no finite value
_IEEE_LIKE = {"bf16": (8, 7, 2**7), "fp16": (5, 10, 2**10), "e4m3": (4, 3, 1), "e5m2": (5, 2, 2**2)}


def parameters(name: str) -> tuple[int, int, int, bool]:
    """Exponent bits, mantissa bits, extra bias b, and whether ties go to even."""
    if name in _IEEE_LIKE:
        return (*_IEEE_LIKE[name][:2], 0, True)
    e, m, b = map(int, re.findall(r"-?\d+", name))
    return e, m, b, False


@functools.cache
def magnitudes(name: str) -> np.ndarray:
    """float64 [codes]: the finite values with sign +, each at the place of its code."""
    e, m, b, _ = parameters(name)
    unused = _IEEE_LIKE[name][2] if name in _IEEE_LIKE else (2**m if e == 8 else 0)
    bias = 2 ** (e - 1) - 1 + b
    values = []
    for code in range(2 ** (e + m) - unused):
        exponent, mantissa = divmod(code, 2**m)
        if exponent == 0:
            values.append(math.ldexp(mantissa, 1 - bias - m))
        else:
            values.append(math.ldexp(2**m + mantissa, exponent - bias - m))
    return np.array(values)


def beyond(name: str) -> float:
    """The value after the largest, if the format went on."""
    grid = magnitudes(name)
    return float(2 * grid[-1] if parameters(name)[1] == 0 else 2 * grid[-1] - grid[-2])


def round_one(x: float, name: str, saturate: bool) -> float:
    """The neighbour of ``x`` that is nearer; of two equally near ones, the even code or the larger magnitude."""
    if math.isnan(x):
        return x
    grid = magnitudes(name).tolist()
    overflow = grid[-1] if saturate else math.inf
    if math.isinf(x) or abs(x) >= beyond(name):
        return math.copysign(overflow, x)
    below = bisect_right(grid, abs(x)) - 1
    low, high = Fraction(grid[below]), Fraction([*grid, beyond(name)][below + 1])
    down, up = Fraction(abs(x)) - low, high - Fraction(abs(x))
    tie_goes_up = below % 2 == 1 if parameters(name)[3] else True
    goes_up = up < down or (up == down and tie_goes_up)
    result = grid[below] if not goes_up else (grid[below + 1] if below + 1 < len(grid) else overflow)
    return math.copysign(result, x)


def round_many(x: np.ndarray, name: str, saturate: bool) -> np.ndarray:
    """``round_one`` on float64 [...]: how many midpoints lie below."""
    grid = magnitudes(name)
    middles = (grid + np.append(grid[1:], beyond(name))) / 2
    magnitude = np.abs(x)
    code = np.searchsorted(middles, magnitude, side="right")
    if parameters(name)[3]:
        lower = np.searchsorted(middles, magnitude, side="left")
        code = np.where(code == lower, code, lower + lower % 2)
    result = np.append(grid, grid[-1] if saturate else np.inf)[code]
    return np.where(np.isnan(x), x, np.copysign(result, x))


def round_exactly(x: float, name: str, saturate: bool) -> float:
    """Any ``fp(e,m,b)``, however wide, on fractions; ties away from zero."""
    e, m, b, _ = parameters(name)
    if math.isnan(x):
        return x
    lowest, highest = 2 - 2 ** (e - 1) - b, min(2 ** (e - 1), 127) - b
    maximum = (2 - Fraction(1, 2**m)) * Fraction(2) ** highest
    overflow = float(maximum) if saturate else math.inf
    if math.isinf(x):
        return math.copysign(overflow, x)
    step = Fraction(2) ** (max(math.frexp(x)[1] - 1 if x else lowest, lowest) - m)
    result = math.floor(Fraction(abs(x)) / step + Fraction(1, 2)) * step
    return math.copysign(float(result) if result <= maximum else overflow, x)
