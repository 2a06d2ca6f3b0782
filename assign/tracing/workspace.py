"""What torch's CPU kernels allocate for themselves while they run, beside their results.

Read off torch 2.13 with oneDNN by measuring one operator at a time; what is not listed allocates next to nothing.
A convolution reorders contiguous tensors into blocked layouts; channels-last needs none of it, but for large depthwise
filters in the backward pass. That of batch normalisation copies the gradient; a 16-bit ``mean`` sums a float32 copy.
CUDA workspaces are not modelled.
"""

import torch
from torch import Tensor, fx

from assign import _torch

aten = torch.ops.aten
_FILTER_BLOCK = 16 * 16  # elements for each one of a depthwise filter; in 16 bit a float32 sum beside it
_OWN_KERNEL = 9  # elements of the largest filter that needs none
_GEMM_BLOCKS = 2**19  # packed blocks of a 16-bit product; at most twice its operands


def kernel_scratch(node: fx.Node) -> tuple[int, int]:
    """Bytes that the kernel of a traced float32 node needs for a moment: when run in float32, and in 16 bit."""
    inputs = [_torch.joint_value(n) for n in node.all_input_nodes]
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    if not tensors or tensors[0].device.type != "cpu":
        return 0, 0
    if node.target in (aten.convolution.default, aten.convolution_backward.default):
        return _convolution(node)
    if node.target is aten.native_batch_norm_backward.default:
        elements = tensors[0].numel()
        return 4 * elements, 2 * elements
    if node.target in (aten.mm.default, aten.addmm.default, aten.bmm.default):
        return 0, min(_GEMM_BLOCKS, 4 * sum(tensor.numel() for tensor in tensors))
    if node.target is aten.mean.dim:
        return 0, 4 * tensors[0].numel()
    return 0, 0


def _convolution(node: fx.Node) -> tuple[int, int]:
    backward = node.target is aten.convolution_backward.default
    operands = [_torch.source_of(node, position) for position in range(3 if backward else 2)]
    gradient, source, weight = map(_torch.joint_value, operands if backward else [node, *operands])
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
