"""Graph pass on the joint graph: do not round values that are already representable in the format.

A relu, a maximum pool or a slice selects values of its operand and may add zeros. In the backward pass, the gradient of
a relu or of one side of an addition is the incoming gradient, possibly with zeros. If it was rounded before in the same
format, such a tensor lies on the same grid, and its own scale could only be smaller. Rounding would change nothing and
cost one or two passes over memory. The codes of the tensor are then made with the scale of the tensor from which it was
selected.

Tensors that may be promoted are still rounded, and their overflow is counted.
"""

import operator
from typing import Any

import torch
from torch import fx

from assign import _torch
from assign.executor.context import Context
from assign.formats.parsing import parse_format
from assign.formats.rows import Scaling
from assign.tracing.joint import COPIES, is_view

_QUANTIZE = torch.ops.assign.quantize.default
_SCALE = torch.ops.assign.scale.default
_aten = torch.ops.aten

_PICKS = frozenset(
    {
        _aten.relu.default, _aten.threshold_backward.default, _aten.embedding.default, _aten.index_select.default,
        _aten.gather.default, _aten.neg.default, _aten.abs.default,
    }
)  # fmt: skip
"""Operators whose result holds only values of their first operand, possibly with another sign, and zeros."""

_POOLS = frozenset({_aten.max_pool2d_with_indices.default, _aten.max_pool3d_with_indices.default})
"""Operators for which this holds for the first of their results."""

_VALUE_AT = {_aten.full.default: 1, _aten.full_like.default: 1, _aten.scalar_tensor.default: 0}
"""Operator that makes a constant → position of the argument that is its value."""


def reuse_grids(joint: fx.GraphModule, context: Context) -> fx.GraphModule:
    """Remove every rounding that changes nothing."""
    graph = joint.graph
    for mark in list(graph.find_nodes(op="call_function", target=_QUANTIZE)):
        source = _rounded_before(mark)
        if source is None:
            continue
        scale, other = mark.args[1], source.args[1]
        mark.replace_all_uses_with(_torch.source_of(mark))
        graph.erase_node(mark)
        if isinstance(scale, fx.Node) and isinstance(other, fx.Node):
            scale.replace_all_uses_with(other)
            graph.erase_node(scale)
    return joint


def _rounded_before(mark: fx.Node) -> fx.Node | None:
    """Return the earlier rounding whose values ``mark`` would round again; None if there is none."""
    x, (scale, name, saturate, dtype) = _torch.source_of(mark), mark.args[1:5]
    here = _torch.joint_value(x)
    if here.dtype != dtype or mark.kwargs:  # a tensor that may be promoted looks its format up
        return None
    if isinstance(scale, fx.Node) and not (scale.target is _SCALE and _is_nested(str(name))):
        return None
    source: fx.Node | None = x
    while source is not None and source.target is not _QUANTIZE:
        source = _picked_from(source)
    if (
        source is None
        or source.kwargs
        or source.args[2:4] != (name, saturate)
        or isinstance(scale, fx.Node) != isinstance(source.args[1], fx.Node)
    ):
        return None
    return source


def _is_nested(name: str) -> bool:
    """Whether a grid of a scaled format is contained in the grids of all smaller scales that it could have."""
    fmt = parse_format(name)
    return fmt.scaling is Scaling.POW2 and not fmt.delayed


def _picked_from(node: fx.Node) -> fx.Node | None:
    """Return the node whose values ``node`` holds, possibly with zeros or other signs; None if there is none."""
    if node.op != "call_function" or not node.args:
        return None
    if node.target is _aten.where.self:
        kept = [branch for branch in node.args[1:] if not _is_zero(branch)]
        return kept[0] if len(kept) == 1 and isinstance(kept[0], fx.Node) else None
    first: Any = node.args[0]
    if not isinstance(first, fx.Node):
        return None
    if node.target is operator.getitem and first.target in _POOLS:
        return _torch.source_of(first) if node.args[1] == 0 else None
    if node.target in _PICKS or is_view(node):
        return first
    if node.target in COPIES:
        before, after = _torch.joint_value(first).dtype, _torch.joint_value(node).dtype
        return first if before.is_floating_point and before.itemsize <= after.itemsize else None
    return None


def _is_zero(branch: Any) -> bool:
    return branch.target in _VALUE_AT and branch.args[_VALUE_AT[branch.target]] == 0
