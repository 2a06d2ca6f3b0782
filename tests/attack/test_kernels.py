"""Compiled kernels give the bits of eager ones: every format, scale, dtype and size, odd values and strided views."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_same

from assign.formats.parsing import parse_format
from assign.formats.rows import FORMATS, SAVED_FORMATS
from assign.numerics.blocks import decode_blocks, encode_blocks
from assign.numerics.dispatch import use_compiled
from assign.numerics.rounding import amax_scale, decode, encode, quantize

pytestmark = [pytest.mark.attack, pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")]

OWN = ["fp(4,3,4)", "fp(5,2,0)", "fp(6,9,0)", "fp(8,7,0)", "fp(8,2,0)", "fp(7,3,-63)", "fp(3,2,1)", "fp(4,3,4):sr"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [*range(1, 6), 7, 8, 9, 63, 64, 65, 1001, 4096, 2**14 - 1, 2**14, 2**14 + 1, 2**16 - 1, 2**16, 2**16 + 3, 98306]
ODD = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 0.0, 1e-40, -1e-39, 3e38, 1e-45])
SEED = torch.tensor(7)


def inputs(dtype, size):
    """A dense tensor of ``size`` elements, about one in fifty of them odd, and a strided view of the same values."""
    draws = torch.Generator().manual_seed(size)
    x = torch.randn(size, generator=draws) * 4
    places = torch.randint(size, (max(1, size // 50),), generator=draws)
    x[places] = ODD[torch.randint(len(ODD), places.shape, generator=draws)]
    x = x.to(dtype)
    return x, torch.stack([x, x], 1)[:, 0]


def results(x, name, scale, saturate):
    fmt = parse_format(name)
    values = quantize(x, fmt, scale=scale, saturate=saturate, seed=SEED)
    if fmt.stochastic:
        return (values,)
    codes = encode(values, fmt, scale=scale)
    numbers = codes[~values.isnan()]  # the code of a NaN has its sign, which torch's casts do not keep
    return values, numbers, decode(codes, fmt, scale=scale, dtype=values.dtype)


def both(call):
    found = []
    for compiled in (True, False):
        with use_compiled(compiled):
            found.append(call())
    return found


@pytest.mark.parametrize("name", [*FORMATS, *OWN])
def test_formats(name):
    """Scales: the format's own, or for one without, none and one that is no power of two."""
    fmt = parse_format(name)
    for dtype, size in itertools.product(DTYPES, SIZES):
        for x in inputs(dtype, size):
            if fmt.scaled:
                one, other = both(lambda x=x: amax_scale(x, fmt))
                assert_same(one, other)
            scales = [amax_scale(x, fmt)] if fmt.scaled else [None, torch.tensor(0.3)]
            for scale, saturate in itertools.product(scales, (True, False)):
                for one, other in zip(*both(lambda x=x, s=scale, t=saturate: results(x, name, s, t)), strict=True):
                    assert_same(one, other)


@pytest.mark.parametrize("name", SAVED_FORMATS)
def test_block_formats(name):
    for dtype, size in itertools.product(DTYPES, SIZES):
        for x in inputs(dtype, size):
            one, other = both(lambda x=x: encode_blocks(x, name, seed=SEED))
            assert_same(one, other)
            assert_same(*both(lambda x=x, codes=one: decode_blocks(codes, name, x)))


@pytest.mark.parametrize("threads", [1, 2])
def test_threads(threads):
    """The number of threads is fixed when a process compiles its first kernel."""
    code = f"import torch, sys; torch.set_num_threads({threads}); sys.path[:0] = {sys.path!r}\n"
    code += "import attack.test_kernels as t\nfor name in ('e4m3:amax', 'e5m2:pow2', 'fp(6,9,0)'): t.test_formats(name)"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=Path(__file__).parents[1])
