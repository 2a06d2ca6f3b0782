"""The table of formats against the lists of values in ``oracle`` and the numbers printed in the papers."""

import dataclasses
import doctest
import itertools
import math

import ml_dtypes
import numpy as np
import oracle
import pytest

from assign.errors import FormatError
from assign.formats import rows
from assign.formats.parsing import parse_format
from assign.formats.rows import FORMATS, Format, Rounding, Scaling, Storage

LISTED = ["bf16", "fp16", "e4m3", "e5m2", "fp(4,3,4)", "fp(5,2,0)", "fp(6,9,0)", "fp(2,1,0)", "fp(3,0,-2)", "fp(8,7,0)"]
LISTED += ["fp(5,10,0)", "fp(5,9,1)", "fp(2,0,-3)", "fp(7,3,-63)", "fp(7,8,64)"]


def test_docstrings() -> None:
    outcome = doctest.testmod(rows)
    assert outcome.attempted > 0
    assert outcome.failed == 0


@pytest.mark.parametrize("name", LISTED)
def test_limits_are_those_of_the_list_of_values(name: str) -> None:
    fmt, values = parse_format(name), oracle.magnitudes(name)
    assert fmt.max_value == values[-1]
    assert fmt.min_subnormal == values[1]
    assert fmt.min_normal == values[2**fmt.mantissa_bits]
    assert fmt.overflow_threshold == (values[-1] + oracle.beyond(name)) / 2
    assert fmt.underflow_threshold == values[1] / 2
    assert fmt.bits == 1 + fmt.exponent_bits + fmt.mantissa_bits


@pytest.mark.parametrize(
    ("name", "bits", "maximum", "min_normal", "min_subnormal", "overflow", "underflow"),
    [
        ("fp(4,3,4)", 8, 30, 2**-10, 2**-13, 31, 2**-14),
        ("fp(5,2,0)", 8, 114688, 2**-14, 2**-16, 122880, 2**-17),
        ("fp(6,9,0)", 16, 8581545984, 2**-30, 2**-39, 8585740288, 2**-40),
        ("e4m3", 8, 448, 2**-6, 2**-9, 464, 2**-10),
        ("e5m2", 8, 57344, 2**-14, 2**-16, 61440, 2**-17),
    ],
)
def test_published_numbers(
    name: str, bits: int, maximum: float, min_normal: float, min_subnormal: float, overflow: float, underflow: float
) -> None:
    """Sources: arXiv 2301.13464 and its code; arXiv 2209.05433, table 1."""
    fmt = parse_format(name)
    assert (fmt.bits, fmt.max_value) == (bits, maximum)
    assert (fmt.min_normal, fmt.min_subnormal) == (min_normal, min_subnormal)
    assert (fmt.overflow_threshold, fmt.underflow_threshold) == (overflow, underflow)


def test_eight_exponent_bits_end_where_float32_ends() -> None:
    assert parse_format("fp(8,22,0)").max_exponent == 127
    assert parse_format("fp(8,7,0)").max_value == FORMATS["bf16"].max_value


CARRIERS = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


@pytest.mark.parametrize("name", LISTED)
def test_the_carrier_is_the_first_that_holds_every_value(name: str) -> None:
    values = oracle.magnitudes(name)
    with np.errstate(over="ignore"):
        exact = [dtype for dtype, cast in CARRIERS.items() if (values.astype(cast).astype(np.float64) == values).all()]
    assert parse_format(name).carrier == exact[0]


@pytest.mark.parametrize(("outer", "inner"), list(itertools.product(LISTED, LISTED)))
def test_contains_is_inclusion_of_the_lists(outer: str, inner: str) -> None:
    included = bool(np.isin(oracle.magnitudes(inner), oracle.magnitudes(outer)).all())
    assert parse_format(outer).contains(parse_format(inner)) == included


def test_contains_with_scales() -> None:
    scaled = FORMATS["e4m3:pow2"]
    assert scaled.contains(scaled)
    assert not scaled.contains(FORMATS["e4m3"])
    assert not FORMATS["e4m3"].contains(scaled)
    assert not FORMATS["fp16"].contains(scaled)
    assert FORMATS["bf16"].contains(scaled)
    assert FORMATS["fp32"].contains(FORMATS["bf16"])


@pytest.mark.parametrize(
    ("name", "carrier", "code_dtype", "code_bytes", "storage"),
    [
        ("fp32", "float32", "float32", 4, Storage.NATIVE),
        ("bf16", "bfloat16", "bfloat16", 2, Storage.NATIVE),
        ("fp16", "float16", "float16", 2, Storage.NATIVE),
        ("e4m3", "bfloat16", "uint8", 1, Storage.PACKED),
        ("e5m2:pow2", "bfloat16", "uint8", 1, Storage.PACKED),
        ("fp(4,3,4)", "bfloat16", "uint8", 1, Storage.PACKED),
        ("fp(2,1,0)", "bfloat16", "uint8", 1, Storage.PACKED),
        ("fp(6,9,0)", "float32", "int16", 2, Storage.PACKED),
        ("fp(8,7,0)", "bfloat16", "int16", 2, Storage.EMULATED),
        ("fp(5,9,1)", "float16", "int16", 2, Storage.EMULATED),
        ("fp(8,15,0)", "float32", "float32", 4, Storage.EMULATED),
        ("posit(5,0)", "bfloat16", "uint8", 1, Storage.PACKED),
        ("posit(8,2)", "bfloat16", "uint8", 1, Storage.PACKED),
        ("posit(9,1)", "bfloat16", "int16", 2, Storage.EMULATED),
        ("posit(12,0)", "float16", "int16", 2, Storage.EMULATED),
        ("posit(16,1)", "float32", "int16", 2, Storage.PACKED),
    ],
)
def test_storage(name: str, carrier: str, code_dtype: str, code_bytes: int, storage: Storage) -> None:
    fmt = parse_format(name)
    assert (fmt.carrier, fmt.code_dtype, fmt.code_bytes, fmt.storage) == (carrier, code_dtype, code_bytes, storage)


@pytest.mark.parametrize("name", [row.name for row in FORMATS.values() if row.scaling is Scaling.POW2])
def test_scale_exponents_keep_scaled_values_in_the_carrier(name: str) -> None:
    fmt, carrier = FORMATS[name], FORMATS["bf16"]
    lowest, highest = fmt.scale_exponents
    assert math.ldexp(fmt.min_subnormal, lowest) == carrier.min_subnormal
    assert math.ldexp(fmt.max_value, highest) <= carrier.max_value < math.ldexp(fmt.max_value, highest + 1)


@pytest.mark.parametrize("name", ["fp(4,3,4)", "FP(4,3,4)", " fp( 4 , 3,4 )\n", "fp(4,3,+4)", "fp(04,3,4)"])
def test_spelling_does_not_matter(name: str) -> None:
    assert parse_format(name) == parse_format("fp(4,3,4)")
    assert parse_format(name).name == "fp(4,3,4)"


@pytest.mark.parametrize("name", [*(name for name in FORMATS if name != "fp32"), "fp(4,3,4)", "fp(6,9,0)"])
def test_stochastic_rounding_changes_neither_values_nor_storage(name: str) -> None:
    plain, fmt = parse_format(name), parse_format(f" {name.upper()} :SR")
    assert fmt.name == f"{name}:sr"
    assert (fmt.rounding, fmt.stochastic, plain.stochastic) == (Rounding.STOCHASTIC, True, False)
    assert dataclasses.replace(fmt, name=plain.name, rounding=plain.rounding) == plain
    assert fmt.contains(plain)
    assert plain.contains(fmt)
    facts = ("bits", "carrier", "code_dtype", "storage", "scale_exponents", "max_exponent", "native")
    assert [getattr(fmt, fact) for fact in facts] == [getattr(plain, fact) for fact in facts]


def test_every_row_is_found_by_its_name() -> None:
    for name, row in FORMATS.items():
        assert parse_format(f" {name.upper()}") is row
        assert row.name == name


def test_rows_cannot_be_edited() -> None:
    with pytest.raises(AttributeError):
        FORMATS["e4m3"].max_value = 240.0
    with pytest.raises(TypeError):
        FORMATS["new"] = FORMATS["e4m3"]
    assert isinstance(FORMATS["e4m3"], Format)


ALLOWED = (
    "fp32, bf16, fp16, e4m3, e5m2 (e4m3 and e5m2 also with a scale: ':pow2' or ':amax', "
    "optionally with ':delayed' after it), or 'fp(e,m,b)' with 2 <= e <= 8 and 0 <= m <= 22; "
    "all but fp32 also with ':sr' at the end for stochastic rounding; or 'posit(n,es)' with 5 <= n <= 16 and "
    "0 <= es <= 3, optionally with ':underflow', and ':quire' or ':noquire' after it"
)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "e4m2",
            "'e4m2' is not a number format. Did you mean 'e5m2', 'e4m3', 'e4m3:pow2'?\n"
            f"  Allowed: {ALLOWED}.\n  Choose one of these.",
        ),
        ("", f"'' is not a number format.\n  Allowed: {ALLOWED}.\n  Choose one of these."),
        (
            "fp(9,3,0)",
            f"'fp(9,3,0)' has 9 exponent and 3 mantissa bits.\n  Allowed: {ALLOWED}.\n"
            "  Choose fewer or more bits, or fp32.",
        ),
        (
            "fp32:sr",
            "'fp32:sr': everything is computed in fp32, so stochastic rounding to it has no effect.\n"
            f"  Allowed: {ALLOWED}.\n  Choose fp32.",
        ),
        (
            "e4m3:rs",
            "'e4m3:rs' is not a number format. Did you mean 'e4m3', 'e4m3:pow2', 'e4m3:amax'?\n"
            f"  Allowed: {ALLOWED}.\n  Choose one of these.",
        ),
        (
            "fp(4,3,200)",
            "'fp(4,3,200)' ranges from 2^-206 to 2^-192; float32, in which it is computed, from 2^-126 to 2^127.\n"
            "  Allowed for e = 4: -119 <= b <= 120.\n  Choose b in that range.",
        ),
    ],
)
def test_errors_say_what_to_do(name: str, message: str) -> None:
    with pytest.raises(FormatError) as caught:
        parse_format(name)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "name",
    [
        "fp(1,3,0)",
        "fp(4,23,0)",
        "fp(4,-1,0)",
        "fp(8,7,1)",
        "fp(8,7,-1)",
        "fp(4,3)",
        "fp(٤,3,4)",
        ":sr",
        "e4m3:sr:sr",
        "e4m3:sr:pow2",
    ],
)
def test_rejected(name: str) -> None:
    with pytest.raises(FormatError, match="Allowed"):
        parse_format(name)


@pytest.mark.parametrize("e", range(2, 9))
def test_the_limits_of_b_are_inclusive(e: int) -> None:
    lowest, highest = min(2 ** (e - 1), 127) - 127, 128 - 2 ** (e - 1)
    assert parse_format(f"fp({e},3,{lowest})").max_exponent == 127
    assert parse_format(f"fp({e},3,{highest})").min_exponent == -126
    for b in (lowest - 1, highest + 1):
        with pytest.raises(FormatError):
            parse_format(f"fp({e},3,{b})")
