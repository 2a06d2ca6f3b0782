"""Graph pass on the joint graph: keep values that the packing restores in the backward pass there.

Otherwise the partitioner would save them from the forward pass where it finds that cheaper.
"""

import torch
from torch import fx

from assign import _torch
from assign.executor.context import Context

_RESTORING = (
    torch.ops.assign.quantize.default,
    torch.ops.assign.encode.default,
    torch.ops.assign.decode.default,
    torch.ops.assign.scale.default,
    torch.ops.assign.decode_blocks.default,
)


def keep_in_backward(joint: fx.GraphModule, context: Context) -> fx.GraphModule:
    """Pin the rounding and decoding operators of the backward pass to the backward pass."""
    for node in joint.graph.nodes:
        if node.target in _RESTORING and _torch.is_backward(node):
            _torch.pin_backward(node)
    return joint
