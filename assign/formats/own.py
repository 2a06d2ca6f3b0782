"""Register number formats from outside the package."""

import math
import re
from collections.abc import Callable

from assign.errors import FormatError
from assign.formats.parsing import add_format, parse_format
from assign.formats.rows import Format
from assign.formats.tables import BITS, Table, make_table

_NAME = re.compile(r"[a-z][a-z0-9_.-]{0,39}", re.ASCII)


def register_format(
    name: str,
    *,
    bits: int,
    decode: Callable[[int], float],
    round: Callable[[float], float] | None = None,
    saturates: bool = False,
) -> Format:
    """Make ``name`` a number format that can be given wherever a format is expected, until the process ends.

    The functions are called here for all codes and for numbers between their values, and never again: the format is
    the table of its values, and of the float32 numbers at which rounding goes from one to the next. Tensors are
    rounded, encoded and decoded by this table, with the same result on every device and in both backends.

    Values beyond the largest one saturate in the forward pass. In the backward pass they become infinite, so that a
    loss scaler sees them, unless the format ``saturates``. NaN stays NaN; it has the first code without a finite value,
    or the code of the largest value if there is none. Zero has no sign.

    Call it in each process that uses the format, before plans with it are loaded.

    Args:
        name: in lower case: letters, digits, ``_``, ``.`` and ``-``. No other format may have it.
        bits: length of a code, from 2 to 16. Saved activations take one byte for up to 8 bits, else two.
        decode: value of a code, from 0 to ``2^bits - 1``; rounded to float32. NaN or infinity for codes without value.
        round: nearest value of the format to a number that lies between the smallest and the largest; it must be
            monotone, and give a value of the format back as it is. Default: the nearest value, ties to the even code.
        saturates: whether gradients beyond the largest value become that value, and infinite ones NaN. Training uses no
            loss scale if the formats of all gradients saturate.
    Returns:
        The format. Registering the same format again changes nothing.
    Raises:
        FormatError: the name cannot be used, or belongs to another format; or the functions are not those of a format
            with zero, positive and negative values.
    Examples:
        >>> four = register_format("quarters4", bits=4, decode=lambda code: (code - 8 * (code > 7) * 2) / 4)
        >>> four.max_value, four.min_subnormal, four.bits
        (2.0, 0.25, 4)
    """
    _check_name(name)
    if bits not in BITS:
        raise FormatError(
            f"register_format: {name!r} has {bits} bits.\n  Allowed: {BITS[0]} to {BITS[-1]}.\n"
            "  Give the length of a code."
        )
    table = make_table(name, bits, decode, round, saturates)
    fmt = Format(
        name=name,
        exponent_bits=0,
        mantissa_bits=table.mantissa_bits,
        min_exponent=math.frexp(table.smallest)[1] - 1,
        max_value=table.largest,
        has_nan=any(map(math.isnan, table.of_codes)),
        layout=table,
    )
    _check_free(name, table)
    return add_format(fmt)


def _check_name(name: str) -> None:
    if _NAME.fullmatch(name) is None:
        raise FormatError(
            f"register_format: {name!r} cannot be the name of a format.\n"
            "  Allowed: up to 40 letters in lower case, digits, '_', '.' and '-', a letter first.\n"
            "  Choose such a name."
        )


def _check_free(name: str, table: Table) -> None:
    """Check that no other format has the name."""
    try:
        old = parse_format(name)
    except FormatError:
        return
    if isinstance(old.layout, Table) and old.layout.same(table):
        return
    raise FormatError(
        f"register_format: there is a format {name!r} already, and it is another one.\n"
        "  Allowed: names that no format has.\n  Choose another name, or restart the process."
    )
