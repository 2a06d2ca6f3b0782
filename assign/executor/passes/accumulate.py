"""Graph pass on the packed joint graph: sum products as the format of the result says.

A matrix product, a convolution, a gradient of one, or a sum (such as the gradient of a bias) is traced forward, through
views and copies, to the node that rounds its result. If that format has ``:quire`` or ``:noquire``, the operator is
replaced by one of :mod:`assign.numerics.accumulate`. A gradient with several readers is the float32 sum of several
products, each of them summed as the format says; in the backward pass additions are therefore followed, too.
"""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from assign import _torch
from assign.executor.context import Context
from assign.formats.parsing import parse_format
from assign.formats.rows import Accumulation
from assign.tracing.joint import COPIES, describe, is_view

_aten = torch.ops.aten
_ops = torch.ops.assign
_QUANTIZE = _ops.quantize.default
_PRODUCTS = (_aten.mm.default, _aten.bmm.default, _aten.addmm.default)


class _Rounding(NamedTuple):
    """How a result is rounded: the format's name, and what looks it up if it may be promoted."""

    format: str
    live: dict[str, Any]


def accumulate(joint: fx.GraphModule, context: Context) -> fx.GraphModule:
    """Replace the operators whose results have a format with an accumulator."""
    graph, done = joint.graph, False
    for node in list(graph.nodes):
        if node.target in _PRODUCTS or node.target in (_aten.convolution.default, _aten.sum.dim_IntList):
            done |= _replace(graph, node)
        elif node.target is _aten.convolution_backward.default:
            done |= _replace_gradients(graph, node)
    if done:
        graph.eliminate_dead_code()
        graph.lint()
        joint.recompile()
    return joint


def _rounding_of(node: fx.Node) -> _Rounding | None:
    """Return how the result of a node is rounded if its format has an accumulator; None otherwise."""
    follow, seen = [node], {node}
    while follow:
        for user in follow.pop().users:
            if user.target is _QUANTIZE:
                name = str(user.args[2])
                if parse_format(name).accumulation is not Accumulation.FLOAT32:
                    return _Rounding(name, dict(user.kwargs))
            added = user.target is _aten.add.Tensor and _torch.is_backward(user)
            if user not in seen and (is_view(user) or user.target in COPIES or added):
                seen.add(user)
                follow.append(user)
    return None


def _replace(graph: fx.Graph, node: fx.Node) -> bool:
    value = _torch.joint_value(node)
    found = _rounding_of(node) if value.dtype == torch.float32 else None
    if found is None or node.kwargs:  # beta or alpha of addmm, which a model's product does not have
        return False
    args = list(node.args)
    target: Any = _ops.accumulated_product.default
    if node.target is _aten.convolution.default:
        target, args = _ops.accumulated_convolution.default, [*args[:3], *_geometry(node, args[3:])]
    elif node.target is _aten.sum.dim_IntList:
        target, args = _ops.accumulated_sum.default, [args[0], args[1], args[2] if len(args) > 2 else False]
    else:
        args = [args[1], args[2], args[0]] if node.target is _aten.addmm.default else [*args, None]
    with graph.inserting_before(node):
        new = graph.call_function(target, (*args, found.format), found.live)
    describe(new, value.new_empty(value.shape), node, backward=_torch.is_backward(node))
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return True


def _geometry(node: fx.Node, options: Sequence[Any]) -> tuple[list[int], bool, int]:
    """Return the options of a convolution as the operators of this package take them."""
    stride, padding, dilation, transposed, output_padding, groups = options
    axes = _torch.joint_value(_torch.source_of(node)).dim() - 2
    lists = ([*each] * (axes // len(each)) for each in (stride, padding, dilation, output_padding))
    return [number for each in lists for number in each], transposed, groups


def _replace_gradients(graph: fx.Graph, node: fx.Node) -> bool:
    """Replace the gradients of a convolution, each by itself; the others stay."""
    gradient, x, weight, _bias_sizes, *options, mask = node.args
    assert isinstance(mask, (list, tuple))
    left = list(mask)
    for user in [each for each in node.users if each.target is operator.getitem]:
        place, value = int(str(user.args[1])), _torch.joint_value(user)
        found = _rounding_of(user) if value is not None and value.dtype == torch.float32 else None
        if found is None:
            continue
        with graph.inserting_before(node):
            if place == 2:
                axes = [axis for axis in range(_torch.joint_value(_torch.source_of(node)).dim()) if axis != 1]
                new = graph.call_function(
                    _ops.accumulated_sum.default, (gradient, axes, False, found.format), found.live
                )
            else:
                args = (gradient, x, weight, *_geometry(node, options), place == 1, found.format)
                new = graph.call_function(_ops.accumulated_gradient.default, args, found.live)
        describe(new, value.new_empty(value.shape), node, backward=_torch.is_backward(node))
        user.replace_all_uses_with(new)
        graph.erase_node(user)
        left[place] = False
    if left == list(mask):
        return False
    node.args = (*node.args[:-1], left)
    if not any(left):
        graph.erase_node(node)
    return True
