"""Run the graph passes in order, and log what each of them changed.

A new pass is one file in :mod:`assign.executor.passes` and one line here.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import fx

from assign.executor.context import Context, PassChange
from assign.executor.passes.accumulate import accumulate
from assign.executor.passes.fuse_scales import fuse_scales
from assign.executor.passes.inline_casts import inline_casts
from assign.executor.passes.keep_in_backward import keep_in_backward
from assign.executor.passes.mark import mark
from assign.executor.passes.narrow_products import narrow_products
from assign.executor.passes.overwrite import overwrite
from assign.executor.passes.pack import pack
from assign.executor.passes.reuse_grids import reuse_grids

Pass = Callable[[fx.GraphModule, Context], fx.GraphModule]

CAPTURED: Sequence[Pass] = (mark,)
"""Passes on the captured step, once its tensors have names."""

JOINT: Sequence[Pass] = (pack, accumulate, narrow_products)
"""Passes on the joint graph of forward and backward pass."""

JOINT_COMPILED: Sequence[Pass] = (*JOINT, reuse_grids, keep_in_backward)
"""Passes on the joint graph if Inductor compiles the result."""

PARTITIONED: Sequence[Pass] = (fuse_scales,)
"""Passes on the forward and on the backward graph."""

LOWERED: Sequence[Pass] = (inline_casts, overwrite)
"""Passes on each graph right before Inductor lowers it."""


def run_passes(graph: fx.GraphModule, passes: Sequence[Pass], context: Context, name: str) -> fx.GraphModule:
    """Run passes one after the other.

    Args:
        graph: edited in place.
        passes: one of the sequences of this module.
        context: information for the passes; its log is called for each pass.
        name: name of the graph, for the log.
    Returns:
        The graph.
    """
    for each in passes:
        before = _count(graph) if context.log else Counter()
        graph = each(graph, context)
        if context.log:
            after = _count(graph)
            context.log(
                PassChange(
                    graph=name,
                    name=getattr(each, "__name__", str(each)),
                    nodes=len(graph.graph.nodes),
                    added=dict(sorted((after - before).items())),
                    removed=dict(sorted((before - after).items())),
                )
            )
    return graph


def _count(graph: fx.GraphModule) -> Counter[str]:
    """Return how often each operator of a graph occurs, bodies of checkpointed blocks included."""
    modules = (module for module in graph.modules() if isinstance(module, fx.GraphModule))
    return Counter(_operator(node) for module in modules for node in module.graph.nodes)


def _operator(node: fx.Node) -> str:
    target: Any = node.target
    if node.op != "call_function":
        return node.op if node.op != "call_method" else str(target)
    return str(target) if hasattr(target, "overloadpacket") else str(getattr(target, "__name__", target))


def source_files(package: Path) -> list[Path]:
    """Return the files of the package whose code can change a graph: they are part of Inductor's cache key."""
    folders = ("executor", "formats", "memory", "numerics", "optim", "plan", "tracing")
    found = (path for folder in folders for path in (package / folder).rglob("*.py"))
    return sorted([*found, *package.glob("*.py")])
