"""Backends: the packed graphs run node by node, or compiled by Inductor."""

import functools
import hashlib
import operator
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from assign import _torch, rounding
from assign.assignment import Assignment
from assign.executor.pack import pack
from assign.executor.reuse import reuse_grids
from assign.formats import Storage, parse_format
from assign.joint import describe, is_view
from assign.promotion import find_slot

_QUANTIZE = torch.ops.assign.quantize.default
_SCALE = torch.ops.assign.scale.default
_DECODE_BLOCKS = torch.ops.assign.decode_blocks.default
_SCALE_QUANTIZE = torch.ops.assign.scale_quantize.default


class Backend(StrEnum):
    """How a plan runs."""

    EAGER = "eager"
    INDUCTOR = "inductor"


def make_backend(plan: Assignment, backend: Backend) -> _torch.GraphBackend:
    """A Dynamo backend for graphs that are marked with ``plan``."""

    def partition(joint: fx.GraphModule, split: Callable[[fx.GraphModule], _torch.Graphs]) -> _torch.Graphs:
        pack(joint, plan)
        return _fused(split(joint))

    if backend is Backend.EAGER:
        return _torch.eager_backend(partition)

    def partition_minimally(joint: fx.GraphModule, split: Callable[[fx.GraphModule], _torch.Graphs]) -> _torch.Graphs:
        pack(joint, plan)
        reuse_grids(joint.graph)
        for node in joint.graph.nodes:
            if node.target in (*_CASTS, _SCALE, _DECODE_BLOCKS) and _torch.is_backward(node):
                _torch.pin_backward(node)
        return _fused(split(joint))

    entries = "\n".join(f"{key} {entry.format}" for key, entry in sorted(plan.entries.items()))
    identity = hashlib.sha256(entries.encode() + _passes()).hexdigest()
    return _torch.inductor_backend(partition_minimally, inline, identity=identity)


@functools.cache
def _passes() -> bytes:
    """The code of the passes: what Inductor cached under other passes is not what these would make."""
    here = Path(__file__).parent
    files = (here / "compile.py", here / "pack.py", here / "reuse.py", here.parent / "joint.py")
    return b"".join(file.read_bytes() for file in files)


def _fused(graphs: _torch.Graphs) -> _torch.Graphs:
    for module in graphs:
        fuse_scales(module.graph)
        module.recompile()
    return graphs


def fuse_scales(graph: fx.Graph) -> None:
    """Scale and quantize as one operator wherever the scale is that of the very tensor and format."""
    for node in graph.find_nodes(op="call_function", target=_QUANTIZE):
        x, scale, name, saturate, dtype = node.args[:5]
        if not isinstance(scale, fx.Node) or scale.target is not _SCALE or scale.args != (x, name):
            continue
        if len(node.args) > 5 or scale not in graph.nodes:  # a seed: by chance, in a kernel of its own
            continue
        with graph.inserting_before(scale):
            both = graph.call_function(_SCALE_QUANTIZE, (x, name, saturate, dtype))
            parts = [graph.call_function(operator.getitem, (both, index)) for index in (0, 1)]
        values = (_torch.joint_value(node), _torch.joint_value(scale))
        for new, value in zip((both, *parts), (values, *values), strict=True):
            describe(new, value, node, backward=_torch.is_backward(node))
        node.replace_all_uses_with(parts[0])
        scale.replace_all_uses_with(parts[1])
        graph.erase_node(node)
        graph.erase_node(scale)


def inline(graph: fx.Graph) -> None:
    """Replace casts between dtypes that torch computes in by torch's own operators: Inductor fuses them.

    Rounding to 8 bits, to emulated formats and by chance is long arithmetic: inlined, a graph with all tensors in 8
    bits compiled for minutes. As operators these share compiled kernels, which also leaves a slot free to round and
    to code in another format at the next step.
    """
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._to_copy.default:  # added by the packing, behind Inductor's decompositions
            node.target = torch.ops.prims.convert_element_type.default
            node.args, node.kwargs = (node.args[0], node.kwargs["dtype"]), {}
        elif node.op == "call_function" and node.target in _CASTS and _is_cast(node):
            x = _torch.source_of(node)
            rest = [argument for argument in node.args[1:] if argument is not None]
            body = _torch.trace_inline(_CASTS[node.target](*rest), [_torch.joint_value(x)])
            _splice(graph, node, body, [x])
    overwrite(graph)
    graph.lint()


_IN_PLACE = {
    _QUANTIZE: (torch.ops.assign.quantize_.default, ("x", "scale", "format", "saturate", "dtype", "seed", "stream")),
    _SCALE_QUANTIZE: (torch.ops.assign.scale_quantize_.default, ("x", "format", "saturate", "dtype")),
}


def overwrite(graph: fx.Graph) -> None:
    """Let a value be rounded in its own memory where nobody else reads it.

    Otherwise a rounded copy is made beside it: more bytes at the peak, and fresh memory is slow to touch. Inductor has
    the last word: it copies where it finds another reader.
    """
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
            both = graph.call_function(torch.ops.higher_order.auto_functionalized, (target,), arguments)
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


def _is_last_reader(node: fx.Node) -> bool:
    """Whether nothing but ``node`` reads its first argument, nor the memory that this is a view of."""
    source = _torch.source_of(node)
    while len(source.users) == 1 and is_view(source):
        source = _torch.source_of(source)
    return len(source.users) == 1 and source.op == "call_function" and not is_view(source)


def _is_cast(node: fx.Node) -> bool:
    name = next(str(argument) for argument in node.args if isinstance(argument, str))
    if find_slot(name) is not None:
        return False
    fmt = parse_format(name)
    return fmt.storage is Storage.NATIVE and not fmt.stochastic


def _quantize(name: str, saturate: bool, dtype: torch.dtype) -> Callable[..., Tensor]:
    return lambda x: rounding.inline_cast(x, parse_format(name), saturate, dtype)


def _encode(name: str) -> Callable[..., Tensor]:
    dtype = rounding.torch_dtype(parse_format(name).code_dtype)
    return lambda x: x.to(dtype)


def _decode(_name: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    return lambda codes: codes.to(dtype)


_CASTS: dict[Any, Callable[..., Callable[..., Tensor]]] = {
    _QUANTIZE: _quantize,
    torch.ops.assign.encode.default: _encode,
    torch.ops.assign.decode.default: _decode,
}


def _splice(graph: fx.Graph, node: fx.Node, body: fx.GraphModule, inputs: list[fx.Node]) -> None:
    """Put the nodes of ``body`` in the place of ``node``."""
    twins = dict(zip((n for n in body.graph.nodes if n.op == "placeholder"), inputs, strict=True))
    with graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "output":
                result = inner.args[0]
                twin = twins[result[0] if isinstance(result, (tuple, list)) else result]
                node.replace_all_uses_with(twin)
            elif inner.op == "get_attr":  # a constant
                name = f"_assign_{node.name}_{inner.target}"
                setattr(graph.owning_module, name, getattr(body, str(inner.target)))
                twins[inner] = graph.get_attr(name)
                twins[inner].meta = dict(inner.meta)
            elif inner.op != "placeholder":
                twins[inner] = graph.node_copy(inner, twins.__getitem__)
    graph.erase_node(node)
