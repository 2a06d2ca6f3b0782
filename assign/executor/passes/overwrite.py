"""Graph pass on a graph that Inductor lowers: round in place where nobody else reads the value."""

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
    """Let a value be rounded in its own memory where nobody else reads it.

    Otherwise a rounded copy is made beside it: more bytes at the peak, and fresh memory is slow to touch. Inductor has
    the last word: it copies where it finds another reader.
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
    """Whether nothing but ``node`` reads its first argument, nor the memory that this is a view of."""
    source = _torch.source_of(node)
    while len(source.users) == 1 and is_view(source):
        source = _torch.source_of(source)
    return len(source.users) == 1 and source.op == "call_function" and not is_view(source)
