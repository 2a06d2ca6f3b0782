"""Backends: the packed graphs run node by node, or compiled by Inductor with the rounding inlined."""

import hashlib
from collections.abc import Callable
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, fx

from assign import _torch, rounding
from assign.assignment import Assignment
from assign.executor.pack import pack
from assign.formats import Storage, parse_format
from assign.promotion import find_slot


class Backend(StrEnum):
    """How a plan runs."""

    EAGER = "eager"
    INDUCTOR = "inductor"


def make_backend(plan: Assignment, backend: Backend) -> _torch.GraphBackend:
    """A Dynamo backend for graphs that are marked with ``plan``."""

    def partition(joint: fx.GraphModule, split: Callable[[fx.GraphModule], _torch.Graphs]) -> _torch.Graphs:
        pack(joint, plan)
        return split(joint)

    if backend is Backend.EAGER:
        return _torch.eager_backend(partition)
    entries = "\n".join(f"{key} {entry.format}" for key, entry in sorted(plan.entries.items()))
    return _torch.inductor_backend(partition, inline, identity=hashlib.sha256(entries.encode()).hexdigest())


def inline(graph: fx.Graph) -> None:
    """Replace our operators by the arithmetic they stand for, where a graph gains by it: Inductor fuses that."""
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._to_copy.default:  # added by the packing, behind Inductor's decompositions
            node.target = torch.ops.prims.convert_element_type.default
            node.args, node.kwargs = (node.args[0], node.kwargs["dtype"]), {}
        elif node.op == "call_function" and node.target in _EXPANSIONS and _is_inlined(node):
            tensors = [argument for argument in node.args if isinstance(argument, fx.Node)]
            rest = [argument for argument in node.args if argument is not None and argument not in tensors]
            function = _EXPANSIONS[node.target](*rest)
            body = _torch.trace_inline(function, [_torch.joint_value(tensor) for tensor in tensors])
            _splice(graph, node, body, tensors)
    graph.lint()


def _is_inlined(node: fx.Node) -> bool:
    """Only casts between dtypes that torch computes in.

    Rounding to 8 bits, to emulated formats and by chance is long arithmetic: inlined, a graph with all tensors in 8
    bits compiled for minutes. As operators these share one compiled kernel, which also leaves a slot free to round and
    to code in another format at the next step.
    """
    name = next(str(argument) for argument in node.args if isinstance(argument, str))
    if find_slot(name) is not None:
        return False
    fmt = parse_format(name)
    return fmt.storage is Storage.NATIVE and not fmt.stochastic


def _quantize(name: str, saturate: bool, dtype: torch.dtype) -> Callable[..., Tensor]:
    return lambda x, *s: rounding.inline_quantize(x, s[0] if s else None, parse_format(name), saturate, dtype)


def _encode(name: str) -> Callable[..., Tensor]:
    return lambda x, *s: rounding.inline_encode(x, s[0] if s else None, parse_format(name))


def _decode(name: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    return lambda codes, *s: rounding.inline_decode(codes, s[0] if s else None, parse_format(name), dtype)


_EXPANSIONS: dict[Any, Callable[..., Callable[..., Tensor]]] = {
    torch.ops.assign.quantize.default: _quantize,
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
