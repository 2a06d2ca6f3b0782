"""Graph pass on the joint graph: what the packing restores in the backward pass stays there.

The partitioner would otherwise keep it from the forward pass where it finds that cheap.
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
    """Pin the rounding and decoding operators of the backward pass to it."""
    for node in joint.graph.nodes:
        if node.target in _RESTORING and _torch.is_backward(node):
            _torch.pin_backward(node)
    return joint
