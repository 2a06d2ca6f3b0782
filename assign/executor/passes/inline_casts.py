"""Graph pass on a graph that Inductor lowers: replace casts between dtypes by torch's own operators."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from assign import _torch
from assign.executor.context import Context
from assign.formats.parsing import parse_format
from assign.formats.rows import Storage
from assign.numerics import rounding
from assign.numerics.torch_dtypes import torch_dtype

_QUANTIZE = torch.ops.assign.quantize.default


def inline_casts(module: fx.GraphModule, context: Context) -> fx.GraphModule:
    """Replace casts between dtypes in which torch computes by torch's own operators, which Inductor fuses.

    Rounding to 8 bits, to emulated formats and stochastically is long arithmetic: inlined, a graph with all tensors in
    8 bits compiled for minutes. As operators they share compiled kernels, and a slot can round and encode in another
    format at the next step.
    """
    graph = module.graph
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._to_copy.default:  # added by the packing, after Inductor's decompositions
            node.target = torch.ops.prims.convert_element_type.default
            node.args, node.kwargs = (node.args[0], node.kwargs["dtype"]), {}
        elif node.op == "call_function" and node.target in _CASTS and _is_cast(node):
            x = _torch.source_of(node)
            rest = [argument for argument in node.args[1:] if argument is not None]
            body = _torch.trace_inline(_CASTS[node.target](*rest), [_torch.joint_value(x)])
            _splice(graph, node, body, [x])
    graph.lint()
    return module


def _is_cast(node: fx.Node) -> bool:
    name = next(str(argument) for argument in node.args if isinstance(argument, str))
    if node.kwargs:  # a promotion may change the format
        return False
    fmt = parse_format(name)
    return fmt.storage is Storage.NATIVE and not fmt.stochastic


def _quantize(name: str, saturate: bool, dtype: torch.dtype) -> Callable[..., Tensor]:
    return lambda x: rounding.inline_cast(x, parse_format(name), saturate, dtype)


def _encode(name: str) -> Callable[..., Tensor]:
    dtype = torch_dtype(parse_format(name).code_dtype)
    return lambda x: x.to(dtype)


def _decode(_name: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    return lambda codes: codes.to(dtype)


_CASTS: dict[Any, Callable[..., Callable[..., Tensor]]] = {
    _QUANTIZE: _quantize,
    torch.ops.assign.encode.default: _encode,
    torch.ops.assign.decode.default: _decode,
}


def _splice(graph: fx.Graph, node: fx.Node, body: fx.GraphModule, inputs: list[fx.Node]) -> None:
    """Replace ``node`` by the nodes of ``body``."""
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
