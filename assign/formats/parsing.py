"""Parse the names of formats."""

import math
import re
from collections.abc import Collection, Iterable
from dataclasses import replace
from functools import lru_cache

from assign.errors import FormatError, suggest
from assign.formats.posits import BITS, EXPONENT_BITS, Posit
from assign.formats.rows import (
    FORMATS,
    FP64,
    MASTER_FORMATS,
    SAVED_FORMATS,
    STATE_FORMATS,
    Accumulation,
    BlockFormat,
    Format,
    Rounding,
)
from assign.formats.tables import Table

_PAPER_NAME = re.compile(r"fp\(([+-]?\d{1,6}),([+-]?\d{1,6}),([+-]?\d{1,6})\)", re.ASCII)
_POSIT_NAME = re.compile(r"posit\(([+-]?\d{1,6}),([+-]?\d{1,6})\)(:underflow)?(?::(quire|noquire))?", re.ASCII)
_ALLOWED = (
    f"{', '.join(name for name in FORMATS if ':' not in name)} (e4m3 and e5m2 also with a scale: ':pow2' or ':amax', "
    "optionally with ':delayed' after it), or 'fp(e,m,b)' with 2 <= e <= 8 and 0 <= m <= 22; "
    "all but fp32 also with ':sr' at the end for stochastic rounding; or 'posit(n,es)' with 5 <= n <= 16 and "
    "0 <= es <= 3, optionally with ':underflow', and ':quire' or ':noquire' after it"
)
_EXAMPLES = ("fp(4,3,4)", "fp(5,2,0)", "fp(6,9,0)", "posit(8,2)", "posit(16,1)", "posit(16,2)")
_STOCHASTIC = ":sr"
_REGISTERED: dict[str, Format] = {}


def add_format(fmt: Format) -> Format:
    """Let ``parse_format`` find a format by its name; return it, or the format of that name that was added before."""
    return _REGISTERED.setdefault(fmt.name, fmt)


def registered(names: Iterable[str]) -> dict[str, str]:
    """Return the fingerprint of each format from outside the package among these, by name."""
    found = {name: _REGISTERED[name].layout for name in names if name in _REGISTERED}
    return {name: layout.fingerprint for name, layout in found.items() if isinstance(layout, Table)}


@lru_cache(maxsize=1024)
def parse_format(name: str) -> Format:
    """Return the format called ``name``: a row of ``FORMATS``, ``fp(e,m,b)`` or ``posit(n,es)``.

    ``fp(e,m,b)`` has e exponent and m mantissa bits and is scaled by ``2^-b``. It has no codes for inf or NaN, and ties
    are rounded away from zero. At ``e = 8`` the largest exponent is 127, as in the authors' code, so that float32 can
    represent it. A name that ends with ``:sr`` is the same format with stochastic rounding. Case and spaces do not
    matter.

    ``posit(n,es)`` has n bits and es exponent bits. A value is rounded to nearest in the infinitely long posit, ties to
    the even code, never to zero and never beyond the largest value; in ``posit(n,es):underflow`` small ones become zero
    (see :class:`assign.formats.posits.Posit`). With ``:quire`` behind it, the sums of products that make a tensor are
    exact, and with ``:noquire`` each partial sum is rounded (see :class:`assign.formats.rows.Accumulation`).

    Raises:
        FormatError: there is no such format, or float32 cannot represent its values.
    Examples:
        >>> parse_format("FP(4, 3, 4)").max_value
        30.0
        >>> parse_format("e4m3:pow2:sr").rounding
        <Rounding.STOCHASTIC: 'stochastic'>

    Source: arXiv 2301.13464, section 2, and the authors' code; Posit Standard 2022 and arXiv 2105.00053.
    """
    wanted = "".join(name.split()).lower()
    plain = wanted.removesuffix(_STOCHASTIC)
    fmt = _find_plain(name, plain)
    if plain == wanted:
        return fmt
    if fmt.native in ("float32", "float64"):
        raise FormatError(
            f"{name!r}: everything is computed in fp32, so stochastic rounding to it has no effect.\n"
            f"  Allowed: {_ALLOWED}.\n  Choose fp32."
        )
    if fmt.layout:
        raise FormatError(
            f"{name!r}: posits and registered formats are not rounded stochastically.\n  Allowed: {_ALLOWED}.\n"
            f"  Choose {fmt.name}."
        )
    return replace(fmt, name=fmt.name + _STOCHASTIC, rounding=Rounding.STOCHASTIC)


@lru_cache(maxsize=1024)
def parse_saved(name: str) -> Format | BlockFormat:
    """Return the format called ``name``, for a saved activation: a row of ``SAVED_FORMATS``, or any other format.

    Raises:
        FormatError: as for :func:`parse_format`.
    Examples:
        >>> parse_saved("int4:block64").bits_per_element, parse_saved("mxfp4:sr").stochastic
        (4.5, True)
    """
    wanted = "".join(name.split()).lower()
    plain = wanted.removesuffix(_STOCHASTIC)
    if plain in SAVED_FORMATS:
        fmt = SAVED_FORMATS[plain]
        return fmt if plain == wanted else replace(fmt, name=wanted, rounding=Rounding.STOCHASTIC)
    try:
        return parse_format(name)
    except FormatError as error:
        also = f"For saved activations also: {', '.join(SAVED_FORMATS)}; each also with ':sr' at the end."
        raise FormatError(f"{error}\n  {also}") from None


def _find_plain(name: str, wanted: str) -> Format:
    """Return the format ``wanted``; ``name`` is what the user wrote."""
    if wanted in FORMATS or wanted in _REGISTERED:
        return FORMATS.get(wanted) or _REGISTERED[wanted]
    if wanted == FP64.name:
        return FP64
    posit = _POSIT_NAME.fullmatch(wanted)
    if posit is not None:
        fmt = _posit_format(int(posit[1]), int(posit[2]), underflows=posit[3] is not None)
        return replace(fmt, name=f"{fmt.name}:{posit[4]}", accumulation=Accumulation(posit[4])) if posit[4] else fmt
    match = _PAPER_NAME.fullmatch(wanted)
    only: tuple[tuple[Collection[str], str], ...] = (
        (STATE_FORMATS, "optimizer states"),
        (SAVED_FORMATS, "saved activations"),
        (MASTER_FORMATS, "masters"),
    )
    for table, what in only:
        if wanted in table:
            raise FormatError(f"{name!r} is allowed only for {what}.\n  Allowed: {_ALLOWED}.\n  Choose one of these.")
    if match is None:
        close = suggest(wanted, [*FORMATS, *_REGISTERED, *_EXAMPLES])
        meant = f" Did you mean {close}?" if close else ""
        raise FormatError(f"{name!r} is not a number format.{meant}\n  Allowed: {_ALLOWED}.\n  Choose one of these.")
    return _paper_format(*(int(part) for part in match.groups()))


def _paper_format(exponent_bits: int, mantissa_bits: int, bias: int) -> Format:
    name = f"fp({exponent_bits},{mantissa_bits},{bias})"
    if not (2 <= exponent_bits <= 8 and 0 <= mantissa_bits <= 22):
        raise FormatError(
            f"{name!r} has {exponent_bits} exponent and {mantissa_bits} mantissa bits.\n  Allowed: {_ALLOWED}.\n"
            "  Choose fewer or more bits, or fp32."
        )
    min_exponent = 2 - 2 ** (exponent_bits - 1)
    max_exponent = min(2 ** (exponent_bits - 1), 127)
    single = FORMATS["fp32"]
    lowest, highest = max_exponent - single.max_exponent, min_exponent - single.min_exponent
    if not lowest <= bias <= highest:
        raise FormatError(
            f"{name!r} ranges from 2^{min_exponent - bias} to 2^{max_exponent - bias}; float32, in which it is "
            f"computed, from 2^{single.min_exponent} to 2^{single.max_exponent}.\n"
            f"  Allowed for e = {exponent_bits}: {lowest} <= b <= {highest}.\n  Choose b in that range."
        )
    return Format(
        name=name,
        exponent_bits=exponent_bits,
        mantissa_bits=mantissa_bits,
        min_exponent=min_exponent - bias,
        max_value=math.ldexp(2 - 2**-mantissa_bits, max_exponent - bias),
        rounding=Rounding.AWAY,
    )


def _posit_format(bits: int, exponent_bits: int, *, underflows: bool) -> Format:
    name = f"posit({bits},{exponent_bits})" + (":underflow" if underflows else "")
    if bits not in BITS or exponent_bits not in EXPONENT_BITS:
        raise FormatError(
            f"{name!r} has {bits} bits and {exponent_bits} exponent bits.\n  Allowed: {_ALLOWED}.\n"
            "  Choose n and es in these ranges."
        )
    layout = Posit(bits=bits, exponent_bits=exponent_bits, underflows=underflows)
    return Format(
        name=name,
        exponent_bits=exponent_bits,
        mantissa_bits=max(bits - 3 - exponent_bits, 0),  # behind the sign and the shortest regime, of two bits
        min_exponent=-layout.max_exponent,
        max_value=math.ldexp(1.0, layout.max_exponent),
        has_nan=True,
        layout=layout,
    )
