"""What torch's CPU kernels allocate for themselves while they run, beside their results.

Read off torch 2.13 with oneDNN by measuring one operator at a time; what is not listed allocates next to nothing.
A convolution reorders contiguous tensors into blocked layouts; channels-last needs none of it, but for large depthwise
filters in the backward pass. That of batch normalisation copies the gradient; a 16-bit ``mean`` sums a float32 copy.
CUDA workspaces are not modelled.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from assign import _torch

aten = torch.ops.aten
_FILTER_BLOCK = 16 * 16  # elements for each one of a depthwise filter; in 16 bit a float32 sum beside it
_OWN_KERNEL = 9  # elements of the largest filter that needs none
_GEMM_BLOCKS = 2**19  # packed blocks of a 16-bit product; at most twice its operands


def kernel_scratch(node: fx.Node) -> tuple[int, int]:
    """Bytes that the kernel of a traced float32 node needs for a moment: when run in float32, and in 16 bit."""
    if not hasattr(node.target, "overloadpacket"):
        return 0, 0
    return scratch_of(node.target, [_torch.joint_value(n) for n in node.all_input_nodes], _torch.joint_value(node))


def scratch_of(operator: Any, inputs: Sequence[Any], result: Any) -> tuple[int, int]:
    """The same of an operator's call, by the tensors that it reads, in order, and what it makes."""
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    if not tensors or tensors[0].device.type != "cpu":
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
        return 0, min(_GEMM_BLOCKS, 4 * sum(tensor.numel() for tensor in tensors))
    if operator is aten.mean.dim:
        return 0, 4 * tensors[0].numel()
    return 0, 0


def _convolution(gradient: Tensor, source: Tensor, weight: Tensor, *, backward: bool) -> tuple[int, int]:
    if source.dim() == 4 and source.is_contiguous(memory_format=torch.channels_last) and not source.is_contiguous():
        return _depthwise(weight) if backward else (0, 0)
    sizes = gradient.numel(), source.numel()
    elements = (sum(sizes) if backward else max(sizes)) + weight.numel()
    return 4 * elements, 2 * elements


def _depthwise(weight: Tensor) -> tuple[int, int]:
    """Backward, channels-last: each filter of a depthwise convolution is padded to a block; 3 × 3 ones are not."""
    if weight.shape[1] > 1 or weight[0, 0].numel() <= _OWN_KERNEL:
        return 0, 0
    return 4 * _FILTER_BLOCK * weight.numel(), 6 * _FILTER_BLOCK * weight.numel()
