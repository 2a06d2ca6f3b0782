"""Facts about posits in the table of formats, and their names."""

import dataclasses
import itertools
import math

import ml_dtypes
import numpy as np
import oracle as floats
import posit_oracle as oracle
import pytest

from assign.errors import FormatError
from assign.formats.parsing import parse_format
from assign.formats.rows import Accumulation, Rounding


@pytest.mark.parametrize("name", oracle.NAMES)
def test_limits_are_those_of_the_list_of_values(name: str) -> None:
    n, es, _ = oracle.parameters(name)
    fmt, values, longer = parse_format(name), oracle.magnitudes(name), oracle.magnitudes(f"posit({n + 1},{es})")
    assert (fmt.bits, fmt.exponent_bits) == (n, es)
    assert (fmt.max_value, fmt.min_subnormal, fmt.min_normal) == (values[-1], values[1], values[1])
    assert fmt.max_value == 2.0 ** (2**es * (n - 2)) == 1 / fmt.min_subnormal
    assert fmt.layout.magnitudes() == values.tolist()
    assert (fmt.overflow_threshold, fmt.underflow_threshold) == (longer[-1], 0)
    assert fmt.mantissa_bits == max(math.frexp(value)[0].as_integer_ratio()[1].bit_length() - 2 for value in values[1:])
    assert (fmt.rounding, fmt.stochastic, fmt.has_inf, fmt.has_nan) == (Rounding.EVEN, False, False, True)
    assert (values % fmt.layout.granule == 0).all()


def test_the_threshold_of_underflow() -> None:
    fmt, plain = parse_format("posit(8,2):underflow"), parse_format("posit(8,2)")
    assert fmt.underflow_threshold == np.nextafter(np.float32(2.0**-28), np.float32(0))
    assert (fmt.max_value, fmt.min_subnormal, fmt.bits) == (plain.max_value, plain.min_subnormal, plain.bits)
    assert fmt.contains(plain)
    assert plain.contains(fmt)


CARRIERS = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


@pytest.mark.parametrize("name", oracle.NAMES)
def test_the_carrier_is_the_first_that_holds_every_value(name: str) -> None:
    values = oracle.magnitudes(name)
    with np.errstate(over="ignore"):
        exact = [dtype for dtype, cast in CARRIERS.items() if (values.astype(cast).astype(np.float64) == values).all()]
    assert parse_format(name).carrier == exact[0]


MIXED = ["posit(8,0)", "posit(8,2)", "posit(10,2)", "posit(12,1)", "posit(16,1)", "posit(16,2)"]
FLOATS = ["e4m3", "e5m2", "fp(4,3,4)", "fp(2,1,0)", "bf16", "fp16", "fp(8,7,0)"]


@pytest.mark.parametrize(
    ("outer", "inner"), [*itertools.product([*MIXED, *FLOATS], MIXED), *itertools.product(MIXED, FLOATS)]
)
def test_contains_is_inclusion_of_the_lists(outer: str, inner: str) -> None:
    lists = [(oracle if "posit" in name else floats).magnitudes(name) for name in (inner, outer)]
    assert parse_format(outer).contains(parse_format(inner)) == bool(np.isin(*lists).all())


def test_contains_beyond_16_bits_and_with_scales() -> None:
    posit = parse_format("posit(16,1)")
    assert parse_format("fp32").contains(posit)
    assert not posit.contains(parse_format("fp32"))
    assert not posit.contains(parse_format("e4m3:pow2"))


@pytest.mark.parametrize("name", ["posit(8,2)", "POSIT(8,2)", " posit( 8 , +2 )\n", "posit(08,2)"])
def test_spelling_does_not_matter(name: str) -> None:
    assert parse_format(name) == parse_format("posit(8,2)")
    assert parse_format(name).name == "posit(8,2)"


def test_the_variant_has_a_name_of_its_own() -> None:
    fmt = parse_format(" Posit(8,2) : Underflow")
    assert fmt.name == "posit(8,2):underflow"
    assert parse_format(fmt.name) == fmt


def test_accumulation_changes_neither_values_nor_storage() -> None:
    for name in ("posit(8,2)", "posit(16,1):underflow"):
        plain = parse_format(name)
        assert plain.accumulation is Accumulation.FLOAT32
        for way in (Accumulation.QUIRE, Accumulation.NOQUIRE):
            fmt = parse_format(f"{name}:{way}")
            assert (fmt.name, fmt.accumulation) == (f"{name}:{way}", way)
            assert dataclasses.replace(fmt, name=name, accumulation=plain.accumulation) == plain
            assert fmt.contains(plain)
            assert plain.contains(fmt)


@pytest.mark.parametrize("n", [4, 17, 32])
def test_the_limits_of_n_are_inclusive(n: int) -> None:
    with pytest.raises(FormatError, match=rf"'posit\({n},1\)' has {n} bits and 1 exponent bits.\n  Allowed: .*5 <= n"):
        parse_format(f"posit({n},1)")


@pytest.mark.parametrize(
    "name",
    ["posit(8,4)", "posit(8,-1)", "posit(8)", "posit(8,2):overflow", "posit", "posit(8,2):quire:quire", "e4m3:quire"],
)
def test_rejected(name: str) -> None:
    with pytest.raises(FormatError, match=r"Allowed: .*'posit\(n,es\)' with 5 <= n <= 16 and 0 <= es <= 3"):
        parse_format(name)


def test_no_stochastic_rounding() -> None:
    with pytest.raises(
        FormatError, match=r"'posit\(8,2\):sr': posits and registered formats are .*\n.*\n  Choose posit"
    ):
        parse_format("posit(8,2):sr")
