"""Rounding, scale and codes against ``oracle``, torch's and ml_dtypes' own casts, and one another."""

import doctest
import functools
import logging
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
import torch
from helpers import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, library
from torch._subclasses.fake_tensor import FakeTensorMode

from assign import _torch
from assign.errors import FormatError
from assign.formats.parsing import parse_format
from assign.formats.rows import FORMATS
from assign.numerics import dispatch, rounding
from assign.numerics.dispatch import use_compiled
from assign.numerics.rounding import amax_scale, decode, encode, inline_cast, quantize
from assign.numerics.torch_dtypes import ROUNDED, torch_dtype

# Inductor's own imports warn, once in a process
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")

PAPER = ["fp(4,3,4)", "fp(5,2,0)", "fp(6,9,0)"]
FORMAT_NAMES = ["bf16", "fp16", "e4m3", "e5m2", *PAPER]
ODD = ["fp(2,1,0)", "fp(3,0,-2)", "fp(2,0,120)", "fp(8,7,0)", "fp(8,2,0)", "fp(7,8,64)", "fp(7,3,-63)", "fp(2,1,-125)"]
WIDE = ["fp(8,22,0)", "fp(7,16,3)", "fp(7,22,63)", "fp(7,22,-63)", "fp(5,12,0)"]
EIGHT_BITS = ["e4m3", "e5m2", "fp(4,3,4)", "fp(5,2,0)", "fp(2,1,0)", "fp(3,0,-2)", "fp(2,0,120)", "fp(2,5,-125)"]
SCALED = [name for name in FORMATS if name.endswith(":pow2")]
modes = pytest.mark.parametrize("saturate", [True, False], ids=["saturate", "overflow"])


def every_bfloat16() -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def random_float32(elements: int, seed: int = 0) -> Tensor:
    """Every bit pattern is as likely as any other: all exponents, NaN and inf included."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31, (elements,), generator=generator, dtype=torch.int64)
    return bits.to(torch.int32).view(torch.float32)


def ties(name: str) -> Tensor:
    """Every value of the format, every midpoint, and the float32 on both sides of each; both signs."""
    grid = np.append(oracle.magnitudes(name), oracle.beyond(name))
    with np.errstate(over="ignore"):
        points = np.concatenate([grid, (grid[1:] + grid[:-1]) / 2]).astype(np.float32)
        points = np.concatenate([points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(0))])
    return torch.from_numpy(np.concatenate([points, -points]))


def expected_of(x: Tensor, name: str, saturate: bool) -> Tensor:
    return torch.from_numpy(oracle.round_many(x.double().numpy(), name, saturate)).float()


def test_docstrings() -> None:
    outcome = doctest.testmod(rounding)
    assert outcome.attempted > 0
    assert outcome.failed == 0


# ---- the oracle


@modes
@pytest.mark.parametrize("name", [*FORMAT_NAMES, "fp(3,0,-2)", "fp(2,1,0)"])
def test_both_oracles_agree(name: str, saturate: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([ties(name), random_float32(1000)])
    x = x[torch.randperm(len(x), generator=generator)[:300]]
    many = oracle.round_many(x.double().numpy(), name, saturate).tolist()
    for value, result in zip(x.tolist(), many, strict=True):
        references = [oracle.round_one(value, name, saturate)]
        if name.startswith("fp("):
            references.append(oracle.round_exactly(value, name, saturate))
        for reference in references:
            assert math.isnan(value) or math.copysign(1, reference) == math.copysign(1, result)
            assert reference == result or math.isnan(value)


# ---- quantize


@pytest.mark.slow
@modes
@pytest.mark.parametrize("name", [*FORMAT_NAMES, *ODD])
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "op-by-op"])
def test_every_bfloat16(name: str, saturate: bool, compiled: bool) -> None:
    x = every_bfloat16()
    with use_compiled(compiled):
        results = [quantize(x, name, saturate=saturate, dtype=torch.float32)]
        results.append(quantize(x.float(), name, saturate=saturate))
        if parse_format(name).carrier == "bfloat16":
            results.append(quantize(x, name, saturate=saturate).float())
    for result in results:
        assert_same(result, expected_of(x, name, saturate))


@modes
@pytest.mark.parametrize("name", [*FORMAT_NAMES, "fp(7,3,-63)", "fp(8,7,0)"])
def test_random_float32(name: str, saturate: bool) -> None:
    x = random_float32(2**20)
    assert_same(quantize(x, name, saturate=saturate), expected_of(x, name, saturate))


@modes
@pytest.mark.parametrize("name", [*FORMAT_NAMES, *ODD])
def test_ties_and_their_neighbours(name: str, saturate: bool) -> None:
    x = ties(name)
    assert_same(quantize(x, name, saturate=saturate), expected_of(x, name, saturate))


@modes
@pytest.mark.parametrize("name", WIDE)
def test_formats_too_wide_to_list(name: str, saturate: bool) -> None:
    fmt = parse_format(name)
    x = random_float32(2000)
    x = torch.cat([x, torch.tensor([fmt.max_value, fmt.min_normal, fmt.min_subnormal, math.inf, -0.0])])
    halfway = quantize(x, name) * (1 + 2.0 ** -(fmt.mantissa_bits + 1))
    x = torch.cat([x, halfway, halfway.nextafter(torch.tensor(0.0)), x * 2.0**-20])
    expected = [oracle.round_exactly(value, name, saturate) for value in x.tolist()]
    assert_same(quantize(x, name, saturate=saturate), torch.tensor(expected, dtype=torch.float32))


def test_fp32_changes_nothing() -> None:
    x = torch.cat([random_float32(2**15), torch.tensor([math.inf, -math.inf, math.nan, -0.0])])
    for saturate in (True, False):
        result = quantize(x, "fp32", saturate=saturate)
        assert torch.equal(result.view(torch.int32), x.view(torch.int32))
        assert result.data_ptr() != x.data_ptr()


@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        (
            "fp(4,3,4)",
            {1.0625: 1.125, 3.3: 3.25, 0.1: 0.1015625, 29: 30, 100: 30, 2**-14: 2**-13, 0.999 * 2**-14: 0.0},
        ),
        ("fp(5,2,0)", {1.125: 1.25, 122879: 114688}),
        ("fp(6,9,0)", {1.0009765625: 1.001953125}),
    ],
)
def test_published_examples(name: str, pairs: dict[float, float]) -> None:
    """Source: the code of arXiv 2301.13464, run."""
    assert quantize(torch.tensor(list(pairs)), name).tolist() == list(pairs.values())


@pytest.mark.parametrize("name", [*FORMAT_NAMES, "e4m3:pow2"])
def test_overflow_underflow_and_nan(name: str) -> None:
    fmt = parse_format(name)
    scale = torch.ones(()) if name in SCALED else None
    x = torch.tensor([math.inf, -math.inf, 3.4e38, -3.4e38, math.nan, -0.0, 0.0, -1e-45, 1e-45])
    kept = [math.nan, -0.0, 0.0, -0.0, 0.0]
    top, inf = fmt.max_value, math.inf
    saturated = quantize(x, fmt, scale=scale, dtype=torch.float32)
    overflowed = quantize(x, fmt, scale=scale, saturate=False, dtype=torch.float32)
    assert_same(saturated, torch.tensor([top, -top, top, -top, *kept]))
    assert_same(overflowed, torch.tensor([inf, -inf, inf, -inf, *kept]))


@pytest.mark.parametrize(("name", "published"), list(zip(PAPER, [0.02658, 0.05280, 0.000415], strict=True)))
def test_relative_error_on_normal_numbers(name: str, published: float) -> None:
    """Published to 3 or 4 digits: half of the last one, 0.12 % at worst, and 4 standard errors of a mean square.

    The squared error of one element is that of a uniform one within its step, times a step squared that varies by
    binade: its standard deviation is below 2.5 means, so a root mean square of 2^20 is known to 2.5 / 2 / 1024.
    """
    x = torch.randn(2**20, generator=torch.Generator().manual_seed(0))
    error = (quantize(x, name) - x).double().norm() / x.double().norm()
    assert float(error) == pytest.approx(published, rel=0.0012 + 4 * 2.5 / 2 / 1024)


@pytest.mark.parametrize(
    ("name", "native", "other"),
    [
        ("bf16", torch.bfloat16, ml_dtypes.bfloat16),
        ("fp16", torch.float16, np.float16),
        ("e4m3", torch.float8_e4m3fn, ml_dtypes.float8_e4m3fn),
        ("e5m2", torch.float8_e5m2, ml_dtypes.float8_e5m2),
    ],
)
def test_within_range_as_torch_and_ml_dtypes(name: str, native: torch.dtype, other: type) -> None:
    x = torch.cat([random_float32(2**18), ties(name)])
    x = x[x.abs() < parse_format(name).overflow_threshold]
    assert len(x) > 1000
    results = [quantize(x, name)]
    if FORMATS[name].native is not None:
        results += [inline_cast(x, FORMATS[name], True, dtype).float() for dtype in (native, x.dtype)]
    for result in results:
        assert_same(result, x.to(native).float())
        assert_same(result, torch.from_numpy(x.numpy().astype(other).astype(np.float32)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bf16", "fp16", "fp(4,3,4)", "fp(5,9,1)", "e4m3:pow2"])
def test_dtypes_of_argument_and_result(name: str, dtype: torch.dtype) -> None:
    fmt = parse_format(name)
    x = (torch.randn(2**15, generator=torch.Generator().manual_seed(0)) * 8).to(dtype)
    reference = quantize(x.float(), fmt, dtype=torch.float32)
    chosen = quantize(x, fmt)
    assert chosen.dtype == (dtype if ROUNDED[dtype].contains(fmt) else torch_dtype(fmt.carrier))
    for result in (chosen, quantize(x, fmt, dtype=torch.float32)):
        assert_same(result.float(), reference)


# ---- scale


def least_power_of_two(amax: float, name: str) -> Fraction:
    """By trial, from the definition."""
    fmt = FORMATS[name]
    lowest, highest = fmt.scale_exponents
    for exponent in range(lowest, highest):
        if Fraction(amax) <= Fraction(fmt.max_value) * Fraction(2) ** exponent:
            return Fraction(2) ** exponent
    return Fraction(2) ** highest


@pytest.mark.parametrize("name", SCALED)
def test_scale_is_the_least_power_of_two(name: str) -> None:
    top = FORMATS[name].max_value
    edges = [top * 2.0**k * (1 + d) for k in (-130, -20, 0, 1, 50, 110) for d in (-(2.0**-23), 0, 2.0**-23)]
    x = torch.cat([random_float32(300).abs(), torch.tensor(edges)])
    for value in x[x.isfinite() & (x > 0)].tolist():
        scale = amax_scale(torch.tensor([0.5 * value, -value, 0.0]), name)
        assert (scale.dtype, scale.shape) == (torch.float32, ())
        assert Fraction(float(scale)) == least_power_of_two(value, name)


@pytest.mark.parametrize("name", SCALED)
def test_scale_of_special_tensors(name: str) -> None:
    own = amax_scale(torch.tensor([3.0, 1.0]), name).item()
    not_finite = [-math.inf, math.nan, math.inf]
    for x, scale in [([0.0, -0.0], 1.0), ([], 1.0), (not_finite, 1.0), ([1.0, *not_finite, 3.0], own)]:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for compiled in (False, True):
                with use_compiled(compiled):
                    assert_same(amax_scale(torch.tensor(x, dtype=dtype), name), torch.tensor(scale))


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("compiled", [False, True])
def test_one_value_that_is_not_finite_leaves_the_others_as_they_would_be(name: str, compiled: bool) -> None:
    x = torch.randn(2**14, generator=torch.Generator().manual_seed(0))
    spoiled = x.clone()
    spoiled[[5, 700, 9000]] = torch.tensor([math.nan, math.inf, -math.inf])
    with use_compiled(compiled):
        values, expected = quantize(spoiled, name, saturate=False), quantize(x, name, saturate=False)
    others = spoiled.isfinite()
    assert_same(values[others], expected[others])
    assert_same(values[[5, 700, 9000]], spoiled[[5, 700, 9000]])


@pytest.mark.parametrize("name", SCALED)
def test_scaled_values_are_the_grid_times_the_scale(name: str) -> None:
    plain = name.removesuffix(":pow2")
    for exponent in (-149, -130, -60, -9, 0, 40, 127):
        x = torch.randn(2**14, generator=torch.Generator().manual_seed(0)).clamp(-1.99, 1.99) * 2.0**exponent
        scale = amax_scale(x, name)
        expected = expected_of(x.double() / scale.double(), plain, True) * scale
        for dtype in (torch.float32, torch.bfloat16):
            assert_same(quantize(x, name, dtype=dtype), expected.to(dtype))
        assert expected.isfinite().all()
        assert_same(expected.bfloat16().float(), expected)
        if exponent < 127:
            assert float(x.abs().max() / scale) <= FORMATS[name].max_value


# ---- codes


@pytest.mark.parametrize("name", [*EIGHT_BITS, "fp(6,9,0)", "fp(8,7,0)", "fp(7,8,64)", "fp(5,9,1)", "fp(7,3,-63)"])
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "op-by-op"])
def test_every_code(name: str, compiled: bool) -> None:
    fmt, grid = parse_format(name), oracle.magnitudes(name)
    dtype = torch_dtype(fmt.code_dtype)
    sign = 1 << (fmt.bits - 1)
    codes = torch.arange(len(grid), dtype=torch.int32)
    codes = torch.cat([codes, codes | sign]).to(dtype)
    values = torch.from_numpy(np.concatenate([grid, -grid])).float()
    with use_compiled(compiled):
        for float_dtype in {torch.float32, torch_dtype(fmt.carrier)}:
            assert_same(decode(codes, fmt, dtype=float_dtype), values.to(float_dtype))
            assert_same(encode(values.to(float_dtype), fmt), codes)
    if fmt.exponent_bits < 8 and fmt.native is None:
        assert len(grid) == sign  # no code is left over


@pytest.mark.parametrize(("name", "native"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_codes_are_those_of_ocp(name: str, native: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    values = codes.view(native).float()
    assert_same(decode(codes, name, dtype=torch.float32), values)
    numbers = ~values.isnan()
    assert_same(encode(values, name)[numbers], codes[numbers])
    assert encode(values, name)[~numbers].view(native).float().isnan().all()


@pytest.mark.parametrize("name", PAPER)
def test_codes_without_inf_and_nan_saturate(name: str) -> None:
    top = parse_format(name).max_value
    x = torch.tensor([math.inf, -math.inf, math.nan])
    assert decode(encode(x, name), name, dtype=torch.float32).abs().tolist() == [top, top, top]
    assert decode(encode(x, name), name, dtype=torch.float32)[:2].tolist() == [top, -top]


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("exponent", [-140, -9, 0, 126])
def test_scaled_codes_come_back(name: str, exponent: int) -> None:
    x = torch.randn(2**15, generator=torch.Generator().manual_seed(0)).clamp(-1.9, 1.9) * 2.0**exponent
    scale = amax_scale(x, name)
    values = quantize(x, name, scale=scale, dtype=torch.bfloat16)
    codes = encode(values, name, scale=scale)
    assert codes.dtype == torch.uint8
    assert_same(decode(codes, name, scale=scale), values)


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16", "fp(8,15,0)"])
def test_codes_of_unpacked_formats_are_their_values(name: str) -> None:
    x = quantize(random_float32(2**15), name)
    codes = encode(x, name)
    assert codes.dtype == torch_dtype(parse_format(name).code_dtype)
    assert_same(decode(codes, name, dtype=torch.float32), x)


# ---- two ways to run, one result


@modes
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("fp(4,3,4)", torch.bfloat16),
        ("fp(6,9,0)", torch.float32),
        ("e5m2:pow2", torch.bfloat16),
        ("e4m3:amax", torch.bfloat16),
        ("e5m2:amax", torch.float32),
        ("e4m3", torch.float32),
        ("bf16", torch.bfloat16),
        ("fp16", torch.float32),
        ("fp(7,3,-63)", torch.float32),
    ],
)
def test_compiled_and_op_by_op_agree(name: str, dtype: torch.dtype, saturate: bool) -> None:
    x = torch.cat([random_float32(2**15), torch.randn(2**15, generator=torch.Generator().manual_seed(0))])
    fmt = parse_format(name)
    x = x[x.abs() < 1e30] if fmt.scaled else x
    x = x if fmt.has_nan else x[~x.isnan()]  # the code of a NaN has its sign, which a cast need not keep
    scale = amax_scale(x, fmt) if fmt.scaled else None
    for argument in (x, x.bfloat16()):
        results = []
        for compiled in (True, False):
            with use_compiled(compiled):
                values = quantize(argument, fmt, scale=scale, saturate=saturate, dtype=dtype)
                codes = encode(values, fmt, scale=scale)
                results.append((values, codes, decode(codes, fmt, scale=scale, dtype=dtype)))
        for result in results[1:]:
            for one, other in zip(result, results[0], strict=True):
                assert_same(one, other)


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
def test_inline_survives_the_compiler(source: torch.dtype) -> None:
    """Inductor drops a cast to bf16 and back: in float32 no value may move for it."""
    cases = [("bf16", torch.float32), ("fp16", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]

    def together(x: Tensor) -> list[Tensor]:
        return [
            inline_cast(x * 2, FORMATS[name], saturate, dtype) for name, dtype in cases for saturate in (True, False)
        ]

    x = random_float32(2**15).to(source)
    graph = torch.fx.symbolic_trace(together)
    expected = [
        quantize(x * 2, name, saturate=saturate, dtype=dtype) for name, dtype in cases for saturate in (True, False)
    ]
    for compiled, plain, ours in zip(torch.compile(graph, fullgraph=True)(x), together(x), expected, strict=True):
        assert_same(plain, ours)
        assert_same(compiled, ours)


# ---- words, scales and memory


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1001, 4096])
@pytest.mark.parametrize(
    ("name", "source", "target"),
    [
        ("e4m3:pow2", torch.bfloat16, torch.bfloat16),
        ("e5m2:pow2", torch.float32, torch.bfloat16),
        ("fp(4,3,4)", torch.bfloat16, torch.float32),
        ("fp(6,9,0)", torch.float32, torch.float32),
    ],
)
def test_elements_that_share_a_word(name: str, source: torch.dtype, target: torch.dtype, size: int) -> None:
    """Lengths that are no whole number of words, and tensors that begin within one."""
    whole = (random_float32(8192) % 64.0).nan_to_num(0.0).to(source)
    for start in (0, 1):
        x = whole[start : start + size]
        results = []
        for compiled in (True, False):
            with use_compiled(compiled):
                scale = amax_scale(x, name) if name in SCALED else None
                values = quantize(x, name, scale=scale, dtype=target)
                codes = encode(values, name, scale=scale)
                decoded = decode(codes, name, scale=scale, dtype=target)
                results.append((values, codes, decoded, scale if scale is not None else values))
        assert_same(results[0][2], results[0][0])
        for one, other in zip(*results, strict=True):
            assert_same(one, other)


@pytest.mark.parametrize("name", ["fp(4,3,4)", "fp(8,2,0)"])
def test_a_nan_stays_one_in_half_a_word(name: str) -> None:
    """Those with nothing but low bits too, which half a word has no room for."""
    bits = torch.tensor([0x7F800001, -0x7FFFFF, 0x7FC00000, 0x7F80FFFF], dtype=torch.int32)
    with use_compiled(True):
        values = quantize(bits.view(torch.float32), name, dtype=torch.bfloat16)
    assert values.isnan().all()


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("shape", [(7,), (4, 6), (0,), (3, 5, 2)])
def test_scale_and_quantize_in_one(shape: tuple[int, ...], compiled: bool) -> None:
    """One pass, fresh or in place, gives what two give; layouts stay."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16() * 100
    for tensor in (x, x.movedim(0, -1), torch.cat([x, x])[::2] if shape[0] else x):
        with use_compiled(compiled):
            scale = amax_scale(tensor, "e4m3:pow2")
            expected = quantize(tensor, "e4m3:pow2", scale=scale)
            values, found = torch.ops.assign.scale_quantize(tensor, "e4m3:pow2", True, torch.bfloat16)
            copy = tensor.clone()
            again = torch.ops.assign.scale_quantize_(copy, "e4m3:pow2", True)
            plain = tensor.clone()
            torch.ops.assign.quantize_(plain, scale, "e4m3:pow2", True)
        for one in (values, copy, plain):
            assert_same(one, expected)
            assert one.stride() == expected.stride()
        assert_same(found, scale)
        assert_same(again, scale)


@pytest.mark.parametrize("compiled", [True, False])
def test_in_place_within_a_word(compiled: bool) -> None:
    """A tensor that begins in the middle of a word is rounded where it is, and what lies before it stays."""
    whole = torch.linspace(-50, 50, 65).bfloat16()
    for round_in_place in (
        lambda x: torch.ops.assign.scale_quantize_(x, "e4m3:pow2", True),
        lambda x: torch.ops.assign.quantize_(x, None, "fp(4,3,4)", True),
    ):
        expected, copy = whole[1:].clone(), whole.clone()
        with use_compiled(compiled):
            round_in_place(expected)
            round_in_place(copy[1:])
        assert_same(copy[1:], expected)
        assert not torch.equal(expected, whole[1:])
        assert_same(copy[:1], whole[:1])


def test_one_compilation_serves_every_format_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    with use_compiled(True):
        for name in ("fp(4,3,4)", "e4m3:pow2"):
            values = quantize(torch.randn(40, 500), name, scale=torch.ones(()), dtype=torch.float32)
            decode(encode(values, name, scale=torch.ones(())), name, scale=torch.ones(()), dtype=torch.float32)
        monkeypatch.setattr(_torch, "compile_kernel", None)
        for name in ("fp(3,4,0)", "fp(5,2,0)", "e5m2", "fp(2,0,3)", "fp(7,0,-63)"):
            for shape in ((3,), (17, 31), (2, 3, 5, 7)):
                x = torch.randn(shape)
                values = quantize(x, name)
                assert_same(values, expected_of(x, name, True))
                assert_same(decode(encode(values, name), name, dtype=torch.float32), values)


@pytest.fixture
def broken_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    attempts: list[int] = []

    def fail(*_: object, **__: object) -> None:
        attempts.append(1)
        raise RuntimeError("no C++ compiler\nand more text")

    dispatch._compiled.cache_clear()
    dispatch._compiler_failed.cache_clear()
    monkeypatch.setattr(_torch, "compile_kernel", fail)
    yield attempts
    dispatch._compiled.cache_clear()
    dispatch._compiler_failed.cache_clear()


def test_without_a_compiler(broken_compiler: list[int], caplog: pytest.LogCaptureFixture) -> None:
    x = random_float32(200_003)
    with caplog.at_level(logging.WARNING, logger="assign"):
        for name in ("fp(4,3,4)", "fp(6,9,0)"):
            assert_same(quantize(x, name), expected_of(x, name, True))
    assert [record.getMessage() for record in caplog.records] == [
        "torch.compile does not work here for cpu (RuntimeError: no C++ compiler); rounding runs op by op, more slowly."
    ]
    assert len(broken_compiler) == 1
    with use_compiled(True), pytest.raises(RuntimeError, match="no C"):
        quantize(x, "fp(4,3,4)")


def test_small_tensors_do_not_wait_for_a_compiler(broken_compiler: list[int]) -> None:
    quantize(torch.randn(2**14 - 1), "fp(4,3,4)")
    assert broken_compiler == []


# ---- as torch operators


def layouts() -> list[Tensor]:
    x = torch.randn(4, 6, 8, 90, generator=torch.Generator().manual_seed(0))
    last = x.contiguous(memory_format=torch.channels_last)
    views = [x, last, x.permute(3, 0, 2, 1), x[..., ::2], last[:, 1:4], x[:, :1].expand(4, 6, 8, 90), x[0, 0, 0, 0]]
    return [*views, x[:0], x[:, :0], torch.zeros(3, 1, 5).transpose(1, 2), torch.zeros(1, 4, 1, 1).expand(1, 4, 1, 3)]


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "op-by-op"])
@pytest.mark.parametrize("name", ["fp(4,3,4)", "bf16", "fp32"])
def test_layout_is_kept_and_arguments_are_untouched(name: str, compiled: bool) -> None:
    for x in layouts():
        before, like = x.clone(), torch.empty_like(x)
        with use_compiled(compiled):
            values = quantize(x, name)
            codes = encode(values, name)
            back = decode(codes, name, dtype=torch.float32)
        for result in (values, codes, back):
            assert (result.shape, result.stride()) == (x.shape, like.stride())
        assert torch.equal(x, before)
        expected = x if name == "fp32" else expected_of(x, name, True)
        assert torch.equal(values, expected)
        assert torch.equal(back, expected)
    assert quantize(layouts()[1], name).is_contiguous(memory_format=torch.channels_last)


CALLS = [
    (torch.ops.assign.quantize, (None, "fp(4,3,4)", True, torch.bfloat16)),
    (torch.ops.assign.quantize, (None, "fp32", True, torch.float32)),
    (torch.ops.assign.quantize, (None, "bf16", False, torch.float32)),
    (torch.ops.assign.quantize, (torch.tensor(0.5), "e4m3:pow2", False, torch.float32)),
    (torch.ops.assign.scale, ("e4m3:pow2",)),
    (torch.ops.assign.encode, (None, "fp(6,9,0)")),
    (torch.ops.assign.encode, (torch.tensor(0.5), "e4m3:pow2")),
    (torch.ops.assign.encode, (None, "fp32")),
]


@pytest.mark.parametrize(("op", "arguments"), CALLS)
def test_operators_keep_torch_s_rules(op: Any, arguments: tuple[object, ...]) -> None:
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    library.opcheck(op, (x, *arguments))
    fakes = FakeTensorMode()
    with fakes:
        fake = op(*(fakes.from_tensor(each) if isinstance(each, Tensor) else each for each in (x, *arguments)))
    real = op(x, *arguments)
    assert (fake.dtype, fake.shape, fake.stride()) == (real.dtype, real.shape, real.stride())


def test_decode_keeps_torch_s_rules() -> None:
    codes = encode(torch.randn(3, 4), "fp(4,3,4)")
    library.opcheck(torch.ops.assign.decode, (codes, None, "fp(4,3,4)", torch.bfloat16))
    library.opcheck(torch.ops.assign.decode, (torch.randn(3), None, "fp32", torch.float32))


# ---- properties

finite = st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40)
names = st.one_of(
    st.sampled_from([*FORMAT_NAMES, *ODD, *WIDE]),
    st.builds("fp({},{},{})".format, st.integers(2, 6), st.integers(0, 22), st.integers(-8, 8)),
)


@settings(deadline=None, max_examples=300)
@given(finite, names, st.booleans())
def test_rounding_is_idempotent_monotone_and_odd(values: list[float], name: str, saturate: bool) -> None:
    x = torch.tensor(sorted(values))
    result = quantize(x, name, saturate=saturate, dtype=torch.float32)
    assert_same(quantize(result, name, saturate=saturate, dtype=torch.float32), result)
    assert (result[1:] >= result[:-1]).all()
    assert_same(quantize(-x, name, saturate=saturate, dtype=torch.float32), -result)


@settings(deadline=None, max_examples=100)
@given(finite, names)
def test_what_was_rounded_survives_its_codes(values: list[float], name: str) -> None:
    result = quantize(torch.tensor(values), name, dtype=torch.float32)
    assert_same(decode(encode(result, name), name, dtype=torch.float32), result)


@settings(deadline=None, max_examples=100)
@given(finite, st.sampled_from(SCALED))
def test_scaled_rounding_with_its_own_scale_is_idempotent(values: list[float], name: str) -> None:
    x = torch.tensor(values)
    scale = amax_scale(x, name)
    result = quantize(x, name, scale=scale)
    assert_same(quantize(result, name, scale=scale), result)


# ---- errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: quantize(torch.zeros(3, dtype=torch.float64), "e4m3"),
            "A float64 tensor cannot be rounded to 'e4m3'.\n  Allowed: float32, bfloat16, float16.\n"
            "  Convert it first.",
        ),
        (
            lambda: quantize(torch.zeros(3), "fp(6,9,0)", dtype=torch.bfloat16),
            "bfloat16 does not hold every value of 'fp(6,9,0)'.\n  Allowed: float32.\n"
            "  Pass one of these as dtype, or None.",
        ),
        (
            lambda: quantize(torch.zeros(3), "e4m3:pow2", scale=torch.ones(3)),
            "The scale for 'e4m3:pow2' is float32 of shape [3] on cpu.\n"
            "  Allowed: float32, one element, on cpu, where the tensor is.\n  Take it from amax_scale().",
        ),
        (
            lambda: encode(torch.zeros(3), "e4m3:pow2"),
            "'e4m3:pow2' needs a scale, and none was given.\n  Pass the one given to quantize().",
        ),
        (
            lambda: decode(torch.zeros(3), "e4m3"),
            "Codes of 'e4m3' are uint8, these are float32.\n  Pass what encode() returned for the same format.",
        ),
        (
            lambda: amax_scale(torch.zeros(3), "e4m3"),
            "'e4m3' has no scale.\n  Formats with one: e4m3:pow2, e5m2:pow2, e4m3:amax, e5m2:amax, "
            "e4m3:pow2:delayed, e5m2:pow2:delayed, e4m3:amax:delayed, e5m2:amax:delayed.\n  Choose one of these.",
        ),
        (
            lambda: decode(torch.zeros(3, dtype=torch.uint8), "e5m2", dtype=torch.int32),
            "int32 does not hold every value of 'e5m2'.\n  Allowed: float32, bfloat16, float16.\n"
            "  Pass one of these as dtype, or None.",
        ),
    ],
)
def test_errors_say_what_to_do(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(FormatError) as caught:
        call()
    assert str(caught.value) == message


def test_small_tensors_take_a_kernel_that_is_compiled_already(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for a compiler to round four elements, but once there is a kernel they are faster with it."""
    compiled: list[object] = []
    kernels = dispatch._compiled.__wrapped__  # without what other tests compiled
    monkeypatch.setattr(dispatch, "_compiled", functools.cache(kernels))
    monkeypatch.setattr(_torch, "compile_kernel", lambda *_: compiled.append(1) or _fill_with_sevens)
    small, large = torch.ones(4), torch.ones(2**15)
    assert quantize(small, "fp(4,3,4)").unique() == 1.0
    assert not compiled
    assert quantize(large, "fp(4,3,4)").unique() == 7.0
    assert quantize(small, "fp(4,3,4)").unique() == 7.0
    assert len(compiled) == 1


def _fill_with_sevens(_x: torch.Tensor, out: torch.Tensor, *_rest: torch.Tensor) -> None:
    out.fill_(7.0)
