"""Sums of products in the accumulator of a format: a quire, or none, as operators that graphs keep as one node.

The format of a result says how its products are summed (:class:`assign.formats.rows.Accumulation`):

* ``:quire``: exactly (:mod:`assign.numerics.exact`); the result is rounded to the format by the node after it;
* ``:noquire``: each product is rounded to the format, and each sum of two: ``s ← rnd(s + rnd(x · y))``, from zero on,
  in the order of the summed index; a bias is added last. A convolution sums over the channels, then the rows and
  columns of its kernel. The gradient of its kernel sums over the positions of each image, then over images. A sum over
  several axes, such as the gradient of a bias, sums over the last of them first;
* otherwise, e.g. after a promotion to a format with neither, in float32.
"""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from assign.errors import FormatError
from assign.formats.rows import Accumulation, Format
from assign.numerics.exact import sum_of_products, to_odd
from assign.numerics.registry import register
from assign.numerics.rounding import quantize
from assign.numerics.runtime_formats import Runtime, current_format

_aten = torch.ops.aten


def _added(total: Tensor, more: Tensor, fmt: Format) -> Tensor:
    """Return ``rnd(total + more)`` of float32 tensors."""
    return quantize(to_odd(total.double(), more.double()), fmt, dtype=torch.float32, saturate=False)


def _with_product(total: Tensor, x: Tensor, y: Tensor, fmt: Format) -> Tensor:
    """Return ``rnd(total + rnd(x · y))`` of float32 tensors."""
    product = x.double() * y.double()  # exact
    rounded = quantize(to_odd(product, torch.zeros_like(product)), fmt, dtype=torch.float32, saturate=False)
    return _added(total, rounded, fmt)


# ---- matrix products and sums


def _accumulated_product(
    a: Tensor, b: Tensor, bias: Tensor | None, format: str, *, runtime: Runtime | None = None, key: str = ""
) -> Tensor:
    """Return ``a @ b + bias`` for float32 matrices, or batches of matrices."""
    fmt = current_format(format, runtime, key)
    if fmt.accumulation is Accumulation.QUIRE:
        return sum_of_products(torch.matmul, a, b, terms=a.shape[-1], addend=bias)
    if fmt.accumulation is Accumulation.FLOAT32:
        return torch.matmul(a, b) if bias is None else torch.matmul(a, b) + bias
    total = a.new_zeros((*a.shape[:-1], b.shape[-1]))
    for k in range(a.shape[-1]):
        total = _with_product(total, a[..., k : k + 1], b[..., k : k + 1, :], fmt)
    return total if bias is None else _added(total, bias, fmt)


def _accumulated_sum(
    x: Tensor, dims: list[int], keepdim: bool, format: str, *, runtime: Runtime | None = None, key: str = ""
) -> Tensor:
    """Return the sum of a float32 tensor over some axes."""
    fmt = current_format(format, runtime, key)
    axes = sorted(dim % x.dim() for dim in dims)
    if fmt.accumulation is Accumulation.FLOAT32:
        return x.sum(axes, keepdim=keepdim)
    if fmt.accumulation is Accumulation.QUIRE:
        terms = math.prod(x.shape[axis] for axis in axes)
        result = sum_of_products(lambda a, b: a.sum(axes) * b, x, x.new_ones(()), terms=terms)
    else:
        result = x
        for axis in reversed(axes):
            parts, result = result.unbind(axis), torch.zeros_like(result.select(axis, 0))
            for part in parts:
                result = _added(result, part, fmt)
    return result.reshape([1 if axis in axes else size for axis, size in enumerate(x.shape)]) if keepdim else result


# ---- convolutions


class _Geometry(NamedTuple):
    """The last arguments of ``aten::convolution``."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int

    @classmethod
    def of(cls, numbers: list[int], transposed: bool, groups: int) -> "_Geometry":
        axes = len(numbers) // 4
        stride, padding, dilation, output_padding = (numbers[axes * i : axes * (i + 1)] for i in range(4))
        return cls(stride, padding, dilation, transposed, output_padding, groups)


def _accumulated_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: list[int],
    transposed: bool,
    groups: int,
    format: str,
    *,
    runtime: Runtime | None = None,
    key: str = "",
) -> Tensor:
    """Return the convolution of float32 tensors, as ``aten::convolution`` does.

    ``geometry`` holds the strides, paddings, dilations and output paddings of all axes, in this order.
    """
    fmt, how = current_format(format, runtime, key), _Geometry.of(geometry, transposed, groups)
    if fmt.accumulation is Accumulation.QUIRE:
        terms = weight[:, 0].numel() if transposed else weight[0].numel()
        addend = None if bias is None else bias.view(-1, *[1] * (x.dim() - 2))
        return sum_of_products(
            lambda x, w: _aten.convolution(x, w, None, *how), x, weight, terms=terms, addend=addend
        ).contiguous()
    if fmt.accumulation is Accumulation.FLOAT32:
        plain: Tensor = _aten.convolution(x, weight, bias, *how)
        return plain.contiguous()
    windows = _Windows(x, weight, how)
    total = windows.outputs()
    for channel, i, j in windows.taps(weight.shape[1]):
        kernel = windows.kernel(weight)[:, :, channel, i, j]
        total = _with_product(total, windows.under(x, i, j)[:, :, channel, None], kernel[:, :, None, None], fmt)
    result = total.flatten(1, 2)
    return result if bias is None else _added(result, bias.view(-1, 1, 1), fmt)


def _accumulated_gradient(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    geometry: list[int],
    transposed: bool,
    groups: int,
    of_weight: bool,
    format: str,
    *,
    runtime: Runtime | None = None,
    key: str = "",
) -> Tensor:
    """Return the gradient of a convolution's input, or of its weight, as ``aten::convolution_backward`` does."""
    fmt, how = current_format(format, runtime, key), _Geometry.of(geometry, transposed, groups)
    other, place = (x, 1) if of_weight else (weight, 0)

    def product(gradient: Tensor, other: Tensor) -> Tensor:
        operands = (other, weight.to(other.dtype)) if of_weight else (x.to(other.dtype), other)
        mask = [not of_weight, of_weight, False]
        found: Tensor = _aten.convolution_backward(gradient, *operands, None, *how, mask)[place]
        return found

    if fmt.accumulation is Accumulation.QUIRE:
        positions = gradient[:, 0].numel() if not transposed else x[:, 0].numel()
        terms = positions if of_weight else weight.numel()  # at most
        return sum_of_products(product, gradient, other, terms=terms).contiguous()
    if fmt.accumulation is Accumulation.FLOAT32:
        return product(gradient, other).contiguous()
    windows = _Windows(x, weight, how)
    return windows.weight_gradient(gradient, x, fmt) if of_weight else windows.input_gradient(gradient, weight, fmt)


class _Windows:
    """A convolution of images in groups of channels, tap by tap."""

    def __init__(self, x: Tensor, weight: Tensor, how: _Geometry) -> None:
        self.stride, self.padding, self.dilation, transposed, _, self.groups = how
        if transposed or x.dim() != 4:
            raise FormatError(
                f"':noquire' is for convolutions of images, and this one is {x.dim() - 2}-dimensional"
                f"{' and transposed' if transposed else ''}.\n  Allowed: conv2d, linear layers and matrix products.\n"
                "  Choose ':quire' for this tensor, or no suffix."
            )
        self.x, self.size = x, weight.shape[2:]
        padded = [size + 2 * pad for size, pad in zip(x.shape[2:], self.padding, strict=True)]
        self.padded = padded
        self.out = [
            (length - dilation * (size - 1) - 1) // stride + 1
            for length, size, stride, dilation in zip(padded, self.size, self.stride, self.dilation, strict=True)
        ]
        self.channels = weight.shape[0]

    def taps(self, channels: int) -> Iterator[tuple[int, int, int]]:
        """Yield a channel of a group and a place in the kernel, for each product in a sum."""
        yield from itertools.product(range(channels), range(self.size[0]), range(self.size[1]))

    def outputs(self) -> Tensor:
        """Return zeros [images, groups, channels of a group, rows, columns]."""
        return self.x.new_zeros((len(self.x), self.groups, self.channels // self.groups, *self.out))

    def kernel(self, weight: Tensor) -> Tensor:
        """Return the weight as [groups, outputs of a group, inputs of a group, rows, columns]."""
        return self._grouped(weight, 0)

    def _pad(self, x: Tensor) -> Tensor:
        rows, columns = self.padding
        return self._grouped(torch.nn.functional.pad(x, (columns, columns, rows, rows)), 1)

    def _grouped(self, x: Tensor, axis: int) -> Tensor:
        return x.reshape(*x.shape[:axis], self.groups, -1, *x.shape[axis + 1 :])

    def _slices(self, i: int, j: int) -> tuple[slice, slice]:
        """Return the rows and columns under one place of the kernel."""
        steps = zip((i, j), self.dilation, self.stride, self.out, strict=True)
        rows, columns = (slice(at * apart, at * apart + step * (out - 1) + 1, step) for at, apart, step, out in steps)
        return rows, columns

    def under(self, x: Tensor, i: int, j: int) -> Tensor:
        """Return what lies under one place of the kernel: [images, groups, inputs of a group, rows, columns]."""
        rows, columns = self._slices(i, j)
        return self._pad(x)[..., rows, columns]

    def input_gradient(self, gradient: Tensor, weight: Tensor, fmt: Format) -> Tensor:
        """Return the gradient of the input, one product after the other."""
        gradient, kernel = self._grouped(gradient, 1), self.kernel(weight)
        total = self._pad(torch.zeros_like(self.x))
        for channel, i, j in self.taps(self.channels // self.groups):
            rows, columns = self._slices(i, j)
            part = total[..., rows, columns]
            factor = kernel[:, channel, :, i, j][:, :, None, None]
            part.copy_(_with_product(part, gradient[:, :, channel, None], factor, fmt))
        rows, columns = (slice(pad, length - pad) for pad, length in zip(self.padding, self.padded, strict=True))
        return total[..., rows, columns].flatten(1, 2).contiguous()

    def weight_gradient(self, gradient: Tensor, x: Tensor, fmt: Format) -> Tensor:
        """Return the gradient of the weight: sums over the positions of each image, then over images."""
        gradient, x = self._grouped(gradient, 1), self._pad(x)
        images = x.new_zeros((len(x), self.groups, self.channels // self.groups, x.shape[2], *self.size))
        reach = [range(0, apart * (size - 1) + 1, apart) for apart, size in zip(self.dilation, self.size, strict=True)]
        for row, column in itertools.product(*map(range, self.out)):
            rows, columns = (
                [at * step + each for each in place]
                for at, step, place in zip((row, column), self.stride, reach, strict=True)
            )
            patch = x[..., rows, :][..., columns]
            images = _with_product(images, gradient[..., row, column][..., None, None, None], patch[:, :, None], fmt)
        total = torch.zeros_like(images[0])
        for image in images:
            total = _added(total, image, fmt)
        return total.flatten(0, 1)


# ---- registered operators


def _product_like(a: Tensor, b: Tensor, **_rest: object) -> Tensor:
    return a.new_empty((*a.shape[:-1], b.shape[-1]))


def _sum_like(x: Tensor, dims: list[int], keepdim: bool, **_rest: object) -> Tensor:
    return x.new_empty(x.sum(dims, keepdim=keepdim).shape)


def _convolution_like(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: list[int], transposed: bool, groups: int, **_rest: object
) -> Tensor:
    how = _Geometry.of(geometry, transposed, groups)
    return x.new_empty(_aten.convolution(x, weight, bias, *how).shape)


def _gradient_like(x: Tensor, weight: Tensor, of_weight: bool, **_rest: object) -> Tensor:
    return x.new_empty((weight if of_weight else x).shape)


register("accumulated_product", _accumulated_product, _product_like)
register("accumulated_sum", _accumulated_sum, _sum_like)
register("accumulated_convolution", _accumulated_convolution, _convolution_like)
register("accumulated_gradient", _accumulated_gradient, _gradient_like)


# ---- the public function


def multiply(a: Tensor, b: Tensor, fmt: Format | str, *, bias: Tensor | None = None) -> Tensor:
    """Return ``a @ b + bias`` rounded to ``fmt``, summed as ``fmt`` says.

    Args:
        a: [..., m, k], float32.
        b: [..., k, n], float32, with the same leading axes.
        fmt: a format or its name, e.g. ``posit(8,2):quire``.
        bias: float32, [n] or of the shape of the result.
    Returns:
        [..., m, n], float32; every value is one of ``fmt``.
    Raises:
        FormatError: there is no such format.
    Examples:
        >>> a, b = torch.tensor([[2.0, 2.0, 2.0, 2.0]]), torch.tensor([[10.0], [10.0], [10.0], [2.0]])
        >>> multiply(a, b, "posit(8,0):noquire").item(), multiply(a, b, "posit(8,0):quire").item()
        (32.0, 64.0)

    Source: arXiv 2105.00053.
    """
    name = fmt if isinstance(fmt, str) else fmt.name
    total: Tensor = torch.ops.assign.accumulated_product(a, b, bias, name)
    return quantize(total, name, dtype=torch.float32)
