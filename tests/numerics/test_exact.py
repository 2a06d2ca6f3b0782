"""Exact sums of products against fractions."""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from assign.numerics.exact import sum_of_products, to_odd


def odd(value: Fraction) -> float:
    """The float32 that is ``value``, or of its two neighbours the one whose last bit is 1."""
    largest = torch.finfo(torch.float32).max
    if abs(value) > largest:
        return math.copysign(largest, value)
    near = torch.tensor(float(value))  # may be rounded twice: it is one of the two neighbours, or the sum itself
    if Fraction(near.item()) == value:
        return near.item()
    if near.view(torch.int32).item() % 2:
        return near.item()
    toward = math.inf if value > Fraction(near.item()) else -math.inf
    return near.nextafter(torch.tensor(toward)).item()


def of(x: Tensor) -> list:
    return [Fraction(value) for value in x.flatten().tolist()]


def product_of(a: Tensor, b: Tensor, addend: Tensor | None = None) -> Tensor:
    rows = [of(row) for row in a]
    columns = [of(column) for column in b.T]
    sums = [[sum(map(lambda x, y: x * y, row, column)) for column in columns] for row in rows]
    more = [0] * len(columns) if addend is None else of(addend)
    return torch.tensor([[odd(value + extra) for value, extra in zip(row, more, strict=True)] for row in sums])


def numbers(*shape: int, exponents: int, seed: int, bits: int = 24) -> Tensor:
    """float32 of both signs, of ``bits`` significant bits, with exponents up to ``exponents``; some are 0."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randint(-(2**bits) + 1, 2**bits, shape, generator=generator).double()
    exponent = torch.randint(-exponents, exponents + 1, shape, generator=generator).double()
    zero = torch.rand(shape, generator=generator) < 0.1
    return torch.where(zero, 0.0, whole * torch.tensor(2.0, dtype=torch.float64) ** (exponent - bits)).float()


@pytest.mark.parametrize("exponents", [0, 1, 5, 20, 40, 60])
@pytest.mark.parametrize("bits", [3, 12, 24])
def test_products_are_exact(exponents: int, bits: int) -> None:
    for seed, terms in enumerate((1, 2, 7, 40)):
        a = numbers(4, terms, exponents=exponents, seed=seed, bits=bits)
        b = numbers(terms, 5, exponents=exponents, seed=seed + 100, bits=bits)
        bias = numbers(5, exponents=exponents, seed=seed + 200, bits=bits)
        assert torch.equal(sum_of_products(torch.matmul, a, b, terms=terms), product_of(a, b))
        assert torch.equal(sum_of_products(torch.matmul, a, b, terms=terms, addend=bias), product_of(a, b, bias))


def test_what_cancels_leaves_the_smallest_bits() -> None:
    """A float32 or float64 sum of these is 0."""
    for tiny in (2.0**-100, -(2.0**-100), 2.0**-140):
        a = torch.tensor([[2.0**60, tiny, 2.0**60, 3.0, -3.0]])
        b = torch.tensor([[2.0**60], [1.0], [-(2.0**60)], [1.0], [1.0]])
        assert sum_of_products(torch.matmul, a, b, terms=5).item() == tiny
        bias = torch.tensor([-(2.0**120)])
        assert sum_of_products(torch.matmul, a[:, :2], b[:2], terms=2, addend=bias).item() == tiny


def test_ends_of_float32() -> None:
    big, small = torch.tensor([[2.0**127]]), torch.tensor([[2.0**-149]])
    assert sum_of_products(torch.matmul, big, -big, terms=1).item() == -torch.finfo(torch.float32).max
    assert sum_of_products(torch.matmul, small, -small, terms=1).item() == -(2.0**-149)
    assert sum_of_products(torch.matmul, 0 * small, small, terms=1).item() == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_results_of_what_is_not_finite_are_nan(value: float) -> None:
    a, b = torch.ones(3, 4), torch.ones(4, 2)
    a[1, 2] = value
    result = sum_of_products(torch.matmul, a, b, terms=4)
    assert result.isnan().tolist() == [[False] * 2, [True] * 2, [False] * 2]
    assert sum_of_products(torch.matmul, b.T, a.T, terms=4).isnan().T.tolist() == result.isnan().tolist()
    bias = torch.tensor([1.0, value])
    assert sum_of_products(torch.matmul, b.T, b, terms=4, addend=bias).isnan().tolist() == [[False, True]] * 2


def test_convolutions_and_their_gradients_are_exact() -> None:
    """In units of 2^-40, all that is summed is a whole number below 2^53 times the smallest unit, in two parts."""
    x = numbers(2, 3, 6, 6, exponents=12, seed=1, bits=6)
    w = numbers(4, 3, 3, 3, exponents=12, seed=2, bits=6)
    result = sum_of_products(lambda x, w: torch.conv2d(x, w, padding=1), x, w, terms=27)
    patches = torch.nn.functional.unfold(x.double(), 3, padding=1).float()  # [2, 27, 36]
    for image, columns in zip(result, patches, strict=True):
        assert torch.equal(image.flatten(1), product_of(w.flatten(1), columns))


def test_to_odd() -> None:
    step, far = 2.0**-23, 2.0**-80
    values = [
        1.0,
        1 + 2.0**-30,
        1 + step,
        1 + step + 2.0**-40,
        -1 - 2.0**-30,
        2 - step / 2,
        2.0**-160,
        -(2.0**-160),
        0.0,
    ]
    x = torch.tensor(values, dtype=torch.float64)
    for y in (0.0, far, -far, 1.0, -1.0):
        wanted = torch.tensor([odd(Fraction(value) + Fraction(y)) for value in values])
        assert torch.equal(to_odd(x, torch.tensor(y, dtype=torch.float64)), wanted)


@pytest.mark.parametrize("terms", [1, 33, 8191])
def test_many_products_of_one_sign_fill_all_the_bits(terms: int) -> None:
    """What the first 24 bits of a sum leave is found where these cancel: nothing was lost below them."""
    for exponents in (torch.zeros(1, terms), (torch.arange(terms) % 25)[None], (torch.arange(terms) % 61)[None]):
        full = (2 - 2.0**-23) * torch.tensor(2.0) ** exponents
        addend = -product_of(full, full.T)[0]
        assert torch.equal(sum_of_products(torch.matmul, full, full.T, terms=terms), -addend[None])
        rest = sum_of_products(torch.matmul, full, full.T, terms=terms, addend=addend)
        assert torch.equal(rest, product_of(full, full.T, addend))
        assert rest.item() != 0
