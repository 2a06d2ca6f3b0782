"""Graph pass on the packed joint graph: multiply matrices in a narrow dtype that represents them exactly.

Each operand is traced back through views to the rounding or decoding that made it, whose format determines the dtypes
that hold it. Both passes are treated the same way: the forward product, and the two products of the backward pass.

* Two operands in torch's own 8-bit dtypes, not both e5m2, with one scale each, if the device multiplies them: their
  codes are multiplied by ``assign::scaled_product``. Values that were decoded only for a product are no longer decoded.
* Float32 operands that bf16 holds, such as those of emulated formats: ``assign::product``.

All other products stay as they are, in the dtype of their operands.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from assign import _torch
from assign.executor.context import Context
from assign.formats.parsing import parse_format
from assign.formats.rows import FORMATS
from assign.numerics.matmul import MULTIPLE
from assign.plan.compute_dtype import is_float8
from assign.tracing.joint import COPIES, describe, is_view

_aten = torch.ops.aten
_QUANTIZE = torch.ops.assign.quantize.default
_ENCODE = torch.ops.assign.encode.default
_DECODE = torch.ops.assign.decode.default
_PRODUCT = torch.ops.assign.product.default
_SCALED_PRODUCT = torch.ops.assign.scaled_product.default


class _Operand(NamedTuple):
    """A matrix: the node that made its values, the views and copies after that node, and the format of its values."""

    source: fx.Node
    views: Sequence[fx.Node]
    format: str

    @property
    def scale(self) -> Any:
        return self.source.args[1]

    @property
    def key(self) -> str:
        """Return the tensor's key if its format may be promoted, else an empty string."""
        return str(self.source.kwargs.get("key", "")) if self.source.target in (_QUANTIZE, _DECODE) else ""

    @property
    def has_codes(self) -> bool:
        """Whether its elements can be codes: only views lie between the matrix and the node that made its values."""
        return self.source.target in (_QUANTIZE, _DECODE) and all(map(is_view, self.views))


def narrow_products(joint: fx.GraphModule, context: Context) -> fx.GraphModule:
    """Multiply matrices in the narrowest dtype that holds their elements."""
    graph, done = joint.graph, 0
    for node in [n for n in graph.nodes if n.target in (_aten.mm.default, _aten.addmm.default, _aten.bmm.default)]:
        matrices = [argument for argument in node.args if isinstance(argument, fx.Node)][-2:]
        operands = [_operand(matrix) for matrix in matrices]
        if node.kwargs or None in operands:  # beta or alpha of addmm, which a model's product does not have
            continue
        found: list[_Operand] = [each for each in operands if each is not None]
        done += _multiply_codes(graph, node, found) or _multiply_in_bf16(graph, node, matrices, found)
    if done:
        graph.eliminate_dead_code()
    return joint


def _operand(matrix: fx.Node) -> _Operand | None:
    """Return what is known about a matrix; None if no format of 16 bits or less is known to hold its elements."""
    path = [matrix]
    while path[0].target not in (_QUANTIZE, _DECODE) and (is_view(path[0]) or _widens(path[0])):
        path.insert(0, _torch.source_of(path[0]))
    source, *views = path
    if source.target in (_QUANTIZE, _DECODE):
        return _Operand(source, views, str(source.args[2]))
    values = [value for node in path if isinstance(value := _torch.joint_value(node), Tensor)]
    return _Operand(source, views, "bf16") if any(value.dtype == torch.bfloat16 for value in values) else None


def _widens(node: fx.Node) -> bool:
    """Whether a node copies its operand into a dtype that is at least as wide."""
    if node.target not in COPIES:
        return False
    before, after = (_torch.joint_value(each).dtype for each in (_torch.source_of(node), node))
    return before.is_floating_point and bool(before.itemsize <= after.itemsize)


def _multiply_in_bf16(graph: fx.Graph, node: fx.Node, matrices: list[fx.Node], operands: list[_Operand]) -> bool:
    """Replace the product by one of bf16 matrices with a float32 result; return whether that was possible."""
    value = _torch.joint_value(node)
    if value.dtype != torch.float32 or not all(
        FORMATS["bf16"].contains(parse_format(each.format)) for each in operands
    ):
        return False
    with graph.inserting_before(node):
        product = graph.call_function(_PRODUCT, (*matrices, *(each.format for each in operands)), _live(operands))
    describe(product, value, node, backward=_torch.is_backward(node))
    result = product
    if node.target is _aten.addmm.default:
        with graph.inserting_before(node):
            result = graph.call_function(_aten.add.Tensor, (product, node.args[0]))
        describe(result, value, node, backward=_torch.is_backward(node))
    _replace(graph, node, result)
    return True


def _live(operands: Sequence[_Operand]) -> dict[str, Any]:
    """Return the arguments with which a product looks up formats that promotion may change; empty if there are none."""
    promotable = [each for each in operands if each.key]
    if not promotable:
        return {}
    a, b = operands
    return {"runtime": promotable[0].source.kwargs["runtime"], "a_key": a.key, "b_key": b.key}


def _multiply_codes(graph: fx.Graph, node: fx.Node, operands: list[_Operand]) -> bool:
    """Replace the product by one of 8-bit codes; return whether that was possible."""
    value: Tensor = _torch.joint_value(node)
    formats = [None if each.key else parse_format(each.format) for each in operands]
    eight_bits = all(fmt is not None and is_float8(fmt) for fmt in formats) and all(each.has_codes for each in operands)
    kinds = {fmt.native for fmt in formats if fmt is not None}
    if not eight_bits or kinds == {"float8_e5m2"} or node.target is _aten.bmm.default:
        return False
    sizes = _torch.joint_value(_torch.source_of(node, -1)).shape
    misfit = any(isinstance(size, int) and size % MULTIPLE for size in sizes)
    if misfit or value.dtype == torch.float32 or not _torch.multiplies_fp8(value.device):
        return False
    parts: list[Any] = []
    for each in operands:
        codes = _views_of(graph, _codes(graph, each.source), each.views, node)
        parts += [codes, each.scale, each.format]
    bias = node.args[0] if node.target is _aten.addmm.default else None
    with graph.inserting_before(node):
        product = graph.call_function(_SCALED_PRODUCT, (*parts, bias, value.dtype))
    describe(product, value, node, backward=_torch.is_backward(node))
    _replace(graph, node, product)
    return True


def _codes(graph: fx.Graph, source: fx.Node) -> fx.Node:
    """Return the codes of a rounded value: those saved for the backward pass, or new ones."""
    if source.target is _DECODE:
        return _torch.source_of(source)
    key = (source, *source.args[1:3])
    found = [user for user in source.users if user.target is _ENCODE and user.args == key]
    if found and found[0] is source.next:
        return found[0]
    with graph.inserting_after(source):
        codes = graph.call_function(_ENCODE, key)
    value = _torch.joint_value(source)
    describe(codes, torch.empty_like(value, dtype=torch.uint8), source, backward=_torch.is_backward(source))
    for other in found:
        _replace(graph, other, codes)
    return codes


def _views_of(graph: fx.Graph, codes: fx.Node, views: Sequence[fx.Node], before: fx.Node) -> fx.Node:
    """Return the codes with the same views through which the product reads the values."""
    for view in views:
        assert callable(view.target)
        value = view.target(_torch.joint_value(codes), *view.args[1:], **view.kwargs)
        with graph.inserting_before(before):
            codes = graph.call_function(view.target, (codes, *view.args[1:]), view.kwargs)
        describe(codes, value, before, backward=_torch.is_backward(before))
    return codes


def _replace(graph: fx.Graph, old: fx.Node, new: fx.Node) -> None:
    old.replace_all_uses_with(new)
    graph.erase_node(old)
