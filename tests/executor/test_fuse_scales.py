"""The passes over graphs behind the partitioner: scale and rounding as one operator, rounding in place."""

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from assign.executor.context import Context
from assign.executor.passes.fuse_scales import fuse_scales
from assign.executor.passes.overwrite import overwrite
from assign.plan.plan import Assignment

ops = torch.ops.assign
NAME = "e4m3:pow2"
CONTEXT = Context(plan=Assignment(entries={}, recipe="native", fingerprint=""))


def traced(function, *args):
    return make_fx(function, tracing_mode="fake")(*args)


def targets(graph):
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


def rounded(x: Tensor, dtype=torch.float32) -> Tensor:
    return ops.quantize(x, None, "fp(4,3,4)", True, dtype)


X = torch.linspace(-40, 40, 24).reshape(4, 6)


@pytest.mark.parametrize(
    ("function", "in_place"),
    [
        (lambda x: rounded(x.sin()), True),
        (lambda x: rounded((x @ x.t()).view(16)), True),
        (lambda x: rounded(x), False),  # the caller's own
        (lambda x: rounded(x.t()), False),  # a view of it
        (lambda x: (lambda y: rounded(y) + y)(x.sin()), False),  # read again
        (lambda x: (lambda y: rounded(y.view(24)).sum() + y)(x.sin()), False),  # read again under another shape
        (lambda x: (lambda view: rounded(view) + view)(x.sin().view(24)), False),  # its only view is read again
        (lambda x: rounded(x.sin(), torch.bfloat16), False),  # another dtype
    ],
)
def test_rounding_in_place_where_nobody_else_reads(function, in_place):
    graph = traced(function, X)
    expected = graph(X)
    overwrite(graph, CONTEXT)
    graph.recompile()
    assert (torch.ops.higher_order.auto_functionalized in targets(graph)) == in_place
    assert (ops.quantize.default in targets(graph)) != in_place
    assert torch.equal(graph(X), expected)


def test_scale_and_rounding_in_place():
    def function(x):
        y = x.sin()
        scale = ops.scale(y, NAME)
        return ops.quantize(y, scale, NAME, True, torch.float32), scale

    graph = traced(function, X)
    expected = graph(X)
    fuse_scales(graph, CONTEXT)
    assert targets(graph).count(ops.scale_quantize.default) == 1
    overwrite(graph, CONTEXT)
    graph.recompile()
    assert torch.ops.higher_order.auto_functionalized in targets(graph)
    for one, other in zip(graph(X), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: ops.quantize(x, ops.scale(x + x, NAME), NAME, True, torch.float32),  # of another tensor
        lambda x: ops.quantize(x, ops.scale(x, "e5m2:pow2"), NAME, True, torch.float32),  # of another format
        lambda x: ops.quantize(x, None, "fp(4,3,4)", True, torch.float32),  # none
        lambda x: ops.quantize(
            x, ops.scale(x, NAME + ":sr"), NAME + ":sr", True, torch.float32, torch.ones((), dtype=torch.int64), 1
        ),  # by chance
    ],
)
def test_what_is_not_fused(function):
    graph = traced(function, X)
    before = targets(graph)
    fuse_scales(graph, CONTEXT)
    assert targets(graph) == before
