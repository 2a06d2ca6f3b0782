"""Graph pass on a graph that Inductor lowers: round in place if no other node reads the value."""

import operator

import torch
from torch import fx

from assign import _torch
from assign.executor.context import Context
from assign.tracing.joint import describe, is_view

_QUANTIZE = torch.ops.assign.quantize.default
_SCALE_QUANTIZE = torch.ops.assign.scale_quantize.default

_IN_PLACE = {
    _QUANTIZE: (torch.ops.assign.quantize_.default, ("x", "scale", "format", "saturate", "dtype", "seed", "stream")),
    _SCALE_QUANTIZE: (torch.ops.assign.scale_quantize_.default, ("x", "format", "saturate", "dtype")),
}


def overwrite(module: fx.GraphModule, context: Context) -> fx.GraphModule:
    """Round a value in its own memory if no other node reads it.

    Otherwise a rounded copy would be made: it adds bytes to the peak, and new memory is slow to access. Inductor makes
    the final decision: it copies if it finds another reader.
    """
    graph = module.graph
    for node in [node for node in graph.nodes if node.target in _IN_PLACE]:
        target, names = _IN_PLACE[node.target]
        arguments = dict(zip(names, node.args, strict=False))
        dtype, x = arguments.pop("dtype"), _torch.source_of(node)
        value = _torch.joint_value(x)
        scaled = node.target is _SCALE_QUANTIZE
        result = _torch.joint_value(node)[0] if scaled else _torch.joint_value(node)
        if value.dtype != dtype or value.stride() != result.stride() or not _is_last_reader(node):
            continue
        with graph.inserting_before(node):
            both = graph.call_function(
                torch.ops.higher_order.auto_functionalized, (target,), {**arguments, **node.kwargs}
            )
            scale, rounded = (graph.call_function(operator.getitem, (both, index)) for index in (0, 1))
        describe(both, (_torch.joint_value(node)[1] if scaled else None, result), node, backward=False)
        describe(rounded, result, node, backward=False)
        if scaled:
            describe(scale, _torch.joint_value(node)[1], node, backward=False)
            for user in list(node.users):
                user.replace_all_uses_with((rounded, scale)[user.args[1]])
                graph.erase_node(user)
        else:
            graph.erase_node(scale)
            node.replace_all_uses_with(rounded)
        graph.erase_node(node)
    graph.lint()
    return module


def _is_last_reader(node: fx.Node) -> bool:
    """Whether only ``node`` reads its first argument, and the memory of which that argument is a view."""
    source = _torch.source_of(node)
    while len(source.users) == 1 and is_view(source):
        source = _torch.source_of(source)
    return len(source.users) == 1 and source.op == "call_function" and not is_view(source)
