"""What torch's CPU kernels allocate for themselves while they run, beside their results.

Read off torch 2.13 with oneDNN by measuring one operator at a time; what is not listed allocates next to nothing.
A convolution works channels-last where its source or its weight lies so, else contiguously, and copies what lies
otherwise. Weights are then reordered into blocks, contiguous images too. In 16 bit, a weight's gradient is summed in
float32, from one image at a time that is transposed (each thread its own; one is counted). Large depthwise filters are
padded in the backward pass, if channels-last. That of batch normalisation copies the gradient; a 16-bit ``mean`` sums a
float32 copy. Products in bf16 work on packed blocks (each thread its own; one is counted); in fp16 there are none, and
float64 convolutions, which are not modelled, need more. CUDA workspaces are not modelled.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from assign import _torch

aten = torch.ops.aten
_FILTER_BLOCK = 16 * 16  # elements for each one of a large depthwise filter; in 16 bit a float32 sum beside it
_OWN_KERNEL = 9  # elements of the largest filter for which oneDNN has a kernel of its own
_GEMM_ROWS, _GEMM_COLUMNS, _GEMM_STEP, _GEMM_INNER = 256, 64, 16, 288  # of blocks of a 16-bit product
_GEMM_DEPTH = 512  # of a block of its right operand, twice that in long sums


def kernel_scratch(node: fx.Node) -> tuple[int, int]:
    """Bytes that the kernel of a traced float32 node needs for a moment: when run in float32, and in 16 bit."""
    read = [_torch.joint_value(each) for each in node.args if isinstance(each, fx.Node)]  # one may be read twice
    return scratch_of(node.target, read, _torch.joint_value(node))


def scratch_of(operator: Any, inputs: Sequence[Any], result: Any) -> tuple[int, int]:
    """The same of an operator's call, by the tensors that it reads, in order, and what it makes."""
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    if not hasattr(operator, "overloadpacket") or not tensors or tensors[0].device.type != "cpu":
        return 0, 0
    kind = operator.overloadpacket
    if kind is aten.convolution:
        return _convolution(result, *tensors[:2], backward=False)
    if kind is aten.convolution_backward:
        return _convolution(*tensors[:3], backward=True)
    if kind is aten.native_batch_norm_backward:
        elements = tensors[0].numel()
        return 4 * elements, 2 * elements
    if kind in (aten.mm, aten.addmm, aten.bmm):
        return 0, _product(*tensors[-2:])
    if operator is aten.mean.dim:
        return 0, 4 * tensors[0].numel()
    return 0, 0


def _product(left: Tensor, right: Tensor) -> int:
    """Of a 16-bit product: a block of the right operand, one of float32 sums, and one of a transposed left operand.

    A product with a vector has none.
    """
    rows, inner = min(left.shape[-2], _GEMM_ROWS), left.shape[-1]
    columns = min(-(-right.shape[-1] // _GEMM_STEP) * _GEMM_STEP, _GEMM_COLUMNS)
    if 1 in (left.shape[-2], right.shape[-1]):
        return 0
    packed, long = 0, inner > 2 * _GEMM_DEPTH
    if left.stride(-1) != 1:  # whole, or a part of it beside float32 sums of whole rows
        packed = min(2 * rows * inner, 2 * rows * _GEMM_INNER + 4 * rows * right.shape[-1])
        long = inner > _GEMM_DEPTH
    deep = 2 * _GEMM_DEPTH if long else min(inner, _GEMM_DEPTH)
    return 2 * columns * deep + 4 * columns * rows + packed


def _convolution(gradient: Tensor, source: Tensor, weight: Tensor, *, backward: bool) -> tuple[int, int]:
    """``gradient``: of the result; in the forward pass, the result."""
    channels_last = _is_channels_last(source) or _is_channels_last(weight)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    read = (gradient, source, weight) if backward else (source, weight)
    copied = sum(tensor.numel() for tensor in read if not tensor.is_contiguous(memory_format=layout))
    in_float32, in_16_bit = (_backward if backward else _forward)(gradient, source, weight, channels_last)
    return in_float32 + 4 * copied, in_16_bit + 2 * copied


def _forward(result: Tensor, source: Tensor, weight: Tensor, channels_last: bool) -> tuple[int, int]:
    elements = weight.numel() if channels_last else max(source.numel() + weight.numel(), result.numel())
    return 4 * elements, 2 * elements


def _backward(gradient: Tensor, source: Tensor, weight: Tensor, channels_last: bool) -> tuple[int, int]:
    images, weights = source.numel() + gradient.numel(), weight.numel()
    grouped = weight.shape[1] < source.shape[1]
    depthwise = grouped and weight.shape[1] == 1
    if depthwise and weight[0, 0].numel() > _OWN_KERNEL:
        if channels_last:
            padded = _FILTER_BLOCK * weights
            return 4 * padded, 6 * padded + 2 * images
        largest = max(source.numel(), gradient.numel())
        return 4 * largest, 2 * largest
    summing = 4 * weights + 2 * images // max(1, source.shape[0])
    if channels_last:
        return 8 * weights, summing
    strided = 2 * gradient.shape[-1] <= source.shape[-1] + 1 and (depthwise or not grouped)
    of_source = 2 * source.numel() - weights if strided else 0  # the weight's gradient is not there yet
    in_float32 = images if grouped else max(images, weights, of_source)
    return 4 * in_float32, max(2 * images + summing, 2 * of_source)


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
