"""Shared facts about joint graphs: views, exact conversions, readers of an operator's output."""

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from assign import _torch
from assign.plan.table import MARK

aten = torch.ops.aten

VIEWS = frozenset(
    {
        aten.view.default, aten._unsafe_view.default, aten.t.default, aten.transpose.int, aten.permute.default,
        aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default, aten.squeeze.dims,
        aten.slice.Tensor, aten.select.int, aten.detach.default, aten.alias.default, aten.as_strided.default,
    }
)  # fmt: skip
"""View operators, which allocate nothing."""

SPLITS = frozenset({aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int, aten.chunk.default})
"""Operators whose result is a tuple of views."""

COPIES = frozenset({aten._to_copy.default, aten.clone.default, torch.ops.prims.convert_element_type.default})
"""Operators that copy their first argument, possibly into another dtype or layout."""


COMPARISONS = frozenset(getattr(aten, name).Tensor for name in ("eq", "ne", "lt", "le", "gt", "ge"))
"""Comparisons of two tensors."""


def is_view(node: fx.Node) -> bool:
    """Whether a node of a joint graph allocates nothing: a view, a tuple of views, or an element of such a tuple."""
    if node.target is operator.getitem:
        return _torch.source_of(node).target in SPLITS
    return node.target in VIEWS or node.target in SPLITS


def origin(node: fx.Node) -> fx.Node:
    """Return the node whose values ``node`` holds, possibly in another shape or layout or in a wider dtype.

    A copy of a part is not followed: saving the whole tensor for a part of it would cost memory.
    """
    while isinstance(node.args[0] if node.args else None, fx.Node):
        source = _torch.source_of(node)
        if node.target in COPIES:
            before, after = _torch.joint_value(source), _torch.joint_value(node)
            whole = before.untyped_storage().nbytes() // before.dtype.itemsize
            if before.dtype.itemsize > after.dtype.itemsize or whole > after.numel():
                break
            if not before.dtype.is_floating_point:
                break
        elif not is_view(node):
            break
        node = source
    return node


def describe(node: fx.Node, value: Any, like: fx.Node, *, backward: bool) -> None:
    """Give a node added to a joint graph the metadata that the partitioner and Inductor expect of every node."""
    kept = ("stack_trace", "seq_nr", "custom", "nn_module_stack", "fwd_nn_module_stack")
    node.meta = {name: like.meta[name] for name in kept if name in like.meta}
    node.meta["val"] = value
    _torch.set_backward(node, backward)


def _tag_backward(graph: fx.Graph) -> None:
    """Tag and label the nodes of the ``backward`` of a user's own ``autograd.Function`` as backward nodes.

    Torch gives these nodes no tag and no label. They come after the marked gradient of the result of the function, and
    get the label of that gradient.
    """
    key = ""
    for node in graph.nodes:
        if _torch.is_backward(node):
            key = _torch.label_of(node).removeprefix(MARK) or key
        elif key and node.op == "call_function" and _torch.is_in_neither(node):
            _torch.set_backward(node, backward=True)
            _torch.label(node, key)


def read_marked_outputs(graph: fx.Graph, mark_op: Any) -> None:
    """Make backward operators that read their own output (relu, softmax, attention) read the marked output.

    Otherwise the unrounded output would be saved for the backward pass in addition to the rounded one. Operators that
    compare it with an operand, such as that of a maximum, keep reading the unrounded one, because a rounded value would
    equal no operand. Call this function before a joint graph is read, because it also tags the nodes of the backward
    pass.
    """
    _tag_backward(graph)
    for mark in list(graph.find_nodes(op="call_function", target=mark_op)):
        raw = mark.args[0]
        if _torch.is_backward(mark) or not isinstance(raw, fx.Node) or raw.op == "placeholder":
            continue
        value, source = _torch.joint_value(mark), _torch.joint_value(raw)
        for reader in _backward_readers(raw):
            if _compares(reader):
                continue
            replacement = mark
            if source.dtype != value.dtype:
                with graph.inserting_before(reader):
                    replacement = graph.call_function(aten._to_copy.default, (mark,), {"dtype": source.dtype})
                describe(replacement, source, reader, backward=True)
            reader.replace_input_with(raw, replacement)


def _compares(node: fx.Node) -> bool:
    return node.target in COMPARISONS or (is_view(node) and any(map(_compares, node.users)))


def _backward_readers(node: fx.Node) -> list[fx.Node]:
    """Return the backward nodes that read ``node``, also through ``detach``, through which autograd saves outputs."""
    found = [user for user in node.users if _torch.is_backward(user)]
    detached = [user for user in node.users if user.target in (aten.detach.default, aten.alias.default)]
    while detached:
        alias = detached.pop()
        for reader in list(alias.users):
            if reader.target in (aten.detach.default, aten.alias.default):
                detached.append(reader)
            elif _torch.is_backward(reader):
                reader.replace_input_with(alias, node)
                found.append(reader)
    return [n for n in dict.fromkeys(found) if n.target not in (aten.detach.default, aten.alias.default)]


def tensors_in(value: Any) -> Iterable[Tensor]:
    """Yield the tensors in an operator's result, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_in(part)
