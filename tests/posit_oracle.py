"""A slow reference for posits, from their definition: strings of bits and fractions, nothing of the package."""

import functools
import math
import re
from fractions import Fraction

import numpy as np

ALL = [(n, es) for n in range(5, 17) for es in range(4)]
NAMES = [f"posit({n},{es})" for n, es in ALL]


def parameters(name: str) -> tuple[int, int, bool]:
    """``n``, ``es`` and whether small values underflow."""
    n, es = map(int, re.findall(r"\d+", name))
    return n, es, ":underflow" in name


def decode(code: int, n: int, es: int) -> Fraction | None:
    """The value of a code; None for NaR."""
    text = f"{code % 2**n:0{n}b}"
    if "1" not in text:
        return Fraction(0)
    if "1" not in text[1:]:
        return None
    if text[0] == "1":
        return -_value(f"{-code % 2**n:0{n}b}"[1:], es)
    return _value(text[1:], es)


def _value(text: str, es: int) -> Fraction:
    """The value of the bits behind the sign."""
    run = re.match("0+|1+", text).group()
    k = len(run) - 1 if run[0] == "1" else -len(run)
    rest = text[len(run) + 1 :].ljust(es, "0")
    exponent, fraction = rest[:es], rest[es:]
    significand = 1 + Fraction(int(fraction or "0", 2), 2 ** len(fraction))
    return significand * Fraction(2) ** (k * 2**es + int(exponent or "0", 2))


def encode(x: Fraction, n: int, es: int, underflows: bool = False) -> int:
    """The code of the nearest posit: the infinitely long bit string of ``|x|``, cut, ties to the even code."""
    if x == 0:
        return 0
    size = abs(x)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    k, e = divmod(exponent, 2**es)
    fraction = size / Fraction(2) ** exponent - 1
    digits = fraction.denominator.bit_length() - 1  # a float's fraction ends
    assert fraction.denominator == 2**digits
    text = "1" * (k + 1) + "0" if k >= 0 else "0" * -k + "1"
    text += f"{e:b}".zfill(es) * bool(es) + f"{fraction.numerator:b}".zfill(digits) * bool(digits)
    kept, rest = text[: n - 1].ljust(n - 1, "0"), text[n - 1 :]
    code = int(kept, 2)
    half = rest[:1] == "1"
    code += half and ("1" in rest[1:] or code % 2 == 1)
    code = min(max(code, 1), 2 ** (n - 1) - 1)
    if underflows and size < Fraction(2) ** (-(2**es) * (n - 2) - 2**es):
        code = 0
    return code if x > 0 else -code % 2**n


def round_one(x: float, name: str, saturate: bool) -> float:
    """What ``quantize`` documents: NaN stays, infinities saturate or become NaN."""
    n, es, underflows = parameters(name)
    if math.isinf(x) and saturate:
        return math.copysign(2.0 ** (2**es * (n - 2)), x)
    if not math.isfinite(x):
        return math.nan
    value = decode(encode(Fraction(x), n, es, underflows), n, es)
    assert value is not None
    return float(value)


@functools.cache
def magnitudes(name: str) -> np.ndarray:
    """float64 [codes]: zero and the positive values, each at the place of its code."""
    n, es, _ = parameters(name)
    return np.array([float(decode(code, n, es)) for code in range(2 ** (n - 1))])


@functools.cache
def middles(name: str) -> np.ndarray:
    """float64 [codes - 1]: the values of the odd codes that are one bit longer lie between those of the codes."""
    n, es, _ = parameters(name)
    return np.array([float(decode(2 * code + 1, n + 1, es)) for code in range(2 ** (n - 1) - 1)])


def round_many(x: np.ndarray, name: str, saturate: bool) -> np.ndarray:
    """``round_one`` on float64 [...]: how many middles lie below."""
    between, grid = middles(name), magnitudes(name)
    size = np.abs(x)
    lower, upper = (np.searchsorted(between, size, side=side) for side in ("left", "right"))
    code = np.where(lower == upper, lower, lower + lower % 2)
    code = np.where((code == 0) & (size > 0), 1, code)
    if ":underflow" in name:
        code = np.where(size < between[0], 0, code)
    result = np.copysign(grid[code], x) + 0.0
    return np.where(np.isnan(x) | (np.isinf(x) & (not saturate)), np.nan, result)
