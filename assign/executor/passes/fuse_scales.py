"""Graph pass on the forward and the backward graph: scale and round in one operator."""

import operator

import torch
from torch import fx

from assign import _torch
from assign.executor.context import Context
from assign.tracing.joint import describe

_QUANTIZE = torch.ops.assign.quantize.default
_SCALE = torch.ops.assign.scale.default
_SCALE_QUANTIZE = torch.ops.assign.scale_quantize.default


def fuse_scales(module: fx.GraphModule, context: Context) -> fx.GraphModule:
    """Fuse scaling and quantizing if the scale is computed from the same tensor and format, or from its history."""
    graph = module.graph
    for node in graph.find_nodes(op="call_function", target=_QUANTIZE):
        x, scale, name, saturate, dtype = node.args[:5]
        own = isinstance(scale, fx.Node) and scale.target is _SCALE and scale.args[0] is x
        if not own or len(node.args) > 5:  # with a seed it rounds stochastically, in a kernel of its own
            continue
        if name != scale.args[1]:
            continue
        with graph.inserting_before(scale):
            both = graph.call_function(_SCALE_QUANTIZE, (x, name, saturate, dtype), dict(scale.kwargs))
            parts = [graph.call_function(operator.getitem, (both, index)) for index in (0, 1)]
        values = (_torch.joint_value(node), _torch.joint_value(scale))
        for new, value in zip((both, *parts), (values, *values), strict=True):
            describe(new, value, node, backward=_torch.is_backward(node))
        node.replace_all_uses_with(parts[0])
        scale.replace_all_uses_with(parts[1])
        graph.erase_node(node)
        graph.erase_node(scale)
    module.recompile()
    return module
