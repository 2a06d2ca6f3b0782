"""Sums of products with a quire and without, against plain loops on fractions."""

import doctest
import itertools
from fractions import Fraction

import posit_oracle as oracle
import pytest
import torch
from helpers import assert_same
from torch import Tensor, nn

from assign.errors import FormatError
from assign.numerics import accumulate
from assign.numerics.accumulate import multiply
from assign.numerics.rounding import quantize

ops = torch.ops.assign
FORMATS = ["posit(8,0)", "posit(8,2)", "posit(12,1)", "posit(16,2)", "posit(8,2):underflow"]


def rounded(value: Fraction, name: str) -> Fraction:
    n, es, underflows = oracle.parameters(name)
    return oracle.decode(oracle.encode(value, n, es, underflows), n, es)


def operand(*shape: int, name: str, seed: int = 0, exponent: int = 4) -> Tensor:
    """Return random values of a format; some of them are close to its smallest value."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 2.0 ** torch.randint(
        -exponent, exponent + 1, shape, generator=generator
    )
    return quantize(x, name, dtype=torch.float32)


def sum_of(pairs: list, name: str, way: str, bias: Fraction | None = None) -> float:
    """The sum of the products of pairs of fractions as a processor would make it."""
    if way == "quire":
        return float(rounded(sum(x * y for x, y in pairs) + (bias or 0), name))
    total = Fraction(0)
    for x, y in pairs:
        total = rounded(total + rounded(x * y, name), name)
    return float(total if bias is None else rounded(total + bias, name))


def fractions(x: Tensor) -> list:
    return [Fraction(value) for value in x.flatten().tolist()]


def test_docstrings() -> None:
    outcome = doctest.testmod(accumulate)
    assert outcome.attempted > 0
    assert outcome.failed == 0


def test_the_papers_sum() -> None:
    """Source: arXiv 2105.00053. In float32, as an emulator sums, it is 64 as well; only without a quire it is 32."""
    a, b = torch.tensor([[2.0, 2.0, 2.0, 2.0]]), torch.tensor([[10.0], [10.0], [10.0], [2.0]])
    found = [multiply(a, b, f"posit(8,0){way}").item() for way in (":noquire", ":quire", "")]
    assert found == [32, 64, 64]


@pytest.mark.parametrize("way", ["quire", "noquire"])
@pytest.mark.parametrize("name", FORMATS)
def test_products_of_matrices(name: str, way: str) -> None:
    a, b, bias = (operand(*shape, name=name, seed=i) for i, shape in enumerate([(3, 17), (17, 4), (4,)]))
    for extra in (None, bias):
        wanted = [
            [
                sum_of(
                    [*zip(fractions(row), fractions(column), strict=True)],
                    name,
                    way,
                    None if extra is None else Fraction(extra[j].item()),
                )
                for j, column in enumerate(b.T)
            ]
            for row in a
        ]
        assert_same(multiply(a, b, f"{name}:{way}", bias=extra), torch.tensor(wanted))
    assert_same(
        multiply(a[None].repeat(2, 1, 1), b[None].repeat(2, 1, 1), f"{name}:{way}")[1], multiply(a, b, f"{name}:{way}")
    )


def test_a_quire_differs_from_float32_sums() -> None:
    """What cancels, and what lies just beside a tie."""
    a, b = torch.tensor([[2.0**24, 1.0, 2.0**24]]), torch.tensor([[2.0**24], [2.0**-4], [-(2.0**24)]])
    assert multiply(a, b, "posit(8,2):quire").item() == 2.0**-4
    assert multiply(a, b, "posit(8,2)").item() != 2.0**-4
    one, tiny = torch.tensor([[1.0, 2.0**-24]]), torch.tensor([[1 + 2.0**-4], [2.0**-24]])
    assert multiply(one, tiny, "posit(8,2)").item() == 1.0  # a tie in float32; the sum is above it
    assert multiply(one, tiny, "posit(8,2):quire").item() == 1.125


LAYERS = {
    "plain": ((2, 3, 5, 5), (4, 3, 3, 3), {}),
    "padded": ((2, 2, 4, 5), (3, 2, 3, 2), {"padding": (1, 2)}),
    "strided": ((1, 2, 7, 6), (2, 2, 3, 3), {"stride": (2, 1), "padding": 1}),
    "dilated": ((1, 2, 7, 7), (2, 2, 3, 2), {"dilation": (2, 3)}),
    "in groups": ((2, 4, 4, 4), (6, 2, 3, 3), {"groups": 2, "padding": 1}),
}


@pytest.mark.parametrize("way", ["quire", "noquire"])
@pytest.mark.parametrize("layer", LAYERS)
def test_convolutions_and_their_gradients(layer: str, way: str) -> None:
    """Each is a list of pairs that a plain convolution of ones would multiply, in the documented order."""
    name, (x_shape, w_shape, options) = "posit(8,1)", LAYERS[layer]
    x, w, bias = (
        operand(*shape, name=name, seed=i, exponent=2) for i, shape in enumerate([x_shape, w_shape, w_shape[:1]])
    )
    pairs = [
        tuple(value if isinstance(value, tuple) else (value, value))
        for value in (options.get("stride", 1), options.get("padding", 0), options.get("dilation", 1))
    ]
    how = ([*pairs[0]], [*pairs[1]], [*pairs[2]], False, [0, 0], options.get("groups", 1))
    ours = ([*pairs[0], *pairs[1], *pairs[2], 0, 0], False, how[-1])
    plain = nn.functional.conv2d(x, w, bias, **options)
    g = operand(*plain.shape, name=name, seed=9, exponent=2)
    outputs, inputs, weights = products_of(x, w, g, how)
    wanted = [sum_of(outputs[place], name, way, Fraction(bias[place[1]].item())) for place in indices(plain)]
    result = quantize(ops.accumulated_convolution(x, w, bias, *ours, f"{name}:{way}"), name, dtype=torch.float32)
    assert_same(result, torch.tensor(wanted).view(plain.shape))
    of_x = quantize(ops.accumulated_gradient(g, x, w, *ours, False, f"{name}:{way}"), name, dtype=torch.float32)
    assert_same(of_x, torch.tensor([sum_of(inputs[place], name, way) for place in indices(x)]).view(x.shape))
    of_w = quantize(ops.accumulated_gradient(g, x, w, *ours, True, f"{name}:{way}"), name, dtype=torch.float32)
    assert_same(of_w, torch.tensor([sum_of_images(weights[place], name, way) for place in indices(w)]).view(w.shape))
    wide = torch.ops.aten.convolution_backward(g, x, w, None, *how, [True, True, False])
    for which, theirs in zip((False, True), wide[:2], strict=True):
        torch.testing.assert_close(ops.accumulated_gradient(g, x, w, *ours, which, "fp32"), theirs)
    torch.testing.assert_close(ops.accumulated_convolution(x, w, bias, *ours, "fp32"), plain)


def indices(x: Tensor) -> list:
    return [*itertools.product(*map(range, x.shape))]


def sum_of_images(images: dict, name: str, way: str) -> float:
    if way == "quire":
        return sum_of([pair for pairs in images.values() for pair in pairs], name, way)
    parts = [Fraction(sum_of(images[image], name, way)) for image in sorted(images)]
    total = Fraction(0)
    for part in parts:
        total = rounded(total + part, name)
    return float(total)


def products_of(x: Tensor, w: Tensor, g: Tensor, how: tuple) -> tuple[dict, dict, dict]:
    """The pairs that are multiplied for each element of the output, of the input's and of the weight's gradient."""
    stride, padding, dilation, _, _, groups = how
    outputs = {place: [] for place in indices(g)}
    inputs: dict = {place: [] for place in indices(x)}
    weights: dict = {place: {} for place in indices(w)}
    per, own = w.shape[0] // groups, w.shape[1]
    for n, o, row, column in indices(g):
        for c, i, j in itertools.product(range(own), range(w.shape[2]), range(w.shape[3])):
            at = (row * stride[0] + i * dilation[0] - padding[0], column * stride[1] + j * dilation[1] - padding[1])
            inside = 0 <= at[0] < x.shape[2] and 0 <= at[1] < x.shape[3]
            place = (n, o // per * own + c, *at)
            value = Fraction(x[place].item()) if inside else Fraction(0)
            kernel, gradient = Fraction(w[o, c, i, j].item()), Fraction(g[n, o, row, column].item())
            outputs[n, o, row, column].append((value, kernel))
            weights[o, c, i, j].setdefault(n, []).append((gradient, value))
            if inside:
                inputs[place].append(((o, i, j), (gradient, kernel)))
    ordered = {place: [pair for _, pair in sorted(pairs, key=lambda each: each[0])] for place, pairs in inputs.items()}
    return outputs, ordered, weights


@pytest.mark.parametrize("way", ["quire", "noquire"])
def test_sums(way: str) -> None:
    name = "posit(8,1)"
    x = operand(3, 4, 5, name=name)
    for dims, keep in (([0], True), ([0], False), ([0, 2], False), ([-1], True)):
        result = quantize(ops.accumulated_sum(x, dims, keep, f"{name}:{way}"), name, dtype=torch.float32)
        parts = x
        for axis in sorted((d % 3 for d in dims), reverse=True) if way == "noquire" else ():
            parts = parts.movedim(axis, -1)
            sums = [
                sum_of([(value, Fraction(1)) for value in fractions(row)], name, way) for row in parts.flatten(0, -2)
            ]
            parts = torch.tensor(sums).view(parts.shape[:-1])
        if way == "quire":
            parts = quantize(x.double().sum(dims).float(), name, dtype=torch.float32)  # exact in float64 and float32
        wanted = parts
        assert_same(result, wanted.view(x.sum(dims, keepdim=keep).shape))
        torch.testing.assert_close(ops.accumulated_sum(x, dims, keep, "fp32"), x.sum(dims, keepdim=keep))


def test_nan_spreads_as_in_a_plain_product() -> None:
    a, b = torch.ones(2, 3), torch.ones(3, 2)
    a[0, 0] = torch.nan
    for way in ("quire", "noquire"):
        assert multiply(a, b, f"posit(8,1):{way}").isnan().tolist() == [[True, True], [False, False]]


def test_transposed_convolutions_have_a_quire_only() -> None:
    x, w = operand(1, 2, 4, 4, name="posit(8,1)"), operand(2, 3, 3, 3, name="posit(8,1)")
    how = ([2, 2, 1, 1, 1, 1, 0, 0], True, 1)
    result = ops.accumulated_convolution(x, w, None, *how, "posit(8,1):quire")
    torch.testing.assert_close(result, nn.functional.conv_transpose2d(x, w, stride=2, padding=1))
    with pytest.raises(
        FormatError, match=r"':noquire' is for convolutions of images.*transposed.*\n.*\n  Choose ':quire'"
    ):
        ops.accumulated_convolution(x, w, None, *how, "posit(8,1):noquire")
