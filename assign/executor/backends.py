"""Backends: run the partitioned graphs node by node, or compile them with Inductor."""

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any

from torch import fx

from assign import _torch
from assign.executor import pipeline
from assign.executor.context import Context, PassLog
from assign.executor.pipeline import run_passes
from assign.formats.parsing import registered
from assign.plan.plan import Assignment


class Backend(StrEnum):
    """How a plan is run."""

    EAGER = "eager"
    INDUCTOR = "inductor"


def make_backend(
    plan: Assignment,
    backend: Backend,
    compiler: Callable[..., Callable[..., Any]] | None = None,
    log: PassLog | None = None,
) -> _torch.GraphBackend:
    """Return a Dynamo backend for graphs that are marked with ``plan``.

    Args:
        plan: the plan whose entries the packing follows.
        backend: how the graphs run.
        compiler: compiles each graph, instead of the backend's own compiler.
        log: called with the change of each graph pass.
    """
    compiled = backend is Backend.INDUCTOR

    def partition(joint: fx.GraphModule, split: Callable[[fx.GraphModule], _torch.Graphs]) -> _torch.Graphs:
        context = Context(plan=plan, channels_last=compiled and _torch.lays_channels_last(joint), log=log)
        run_passes(joint, pipeline.JOINT_COMPILED if compiled else pipeline.JOINT, context, "joint")
        forward, backward = split(joint)
        for module, name in ((forward, "forward"), (backward, "backward")):
            run_passes(module, pipeline.PARTITIONED, context, name)
        return forward, backward

    def lower(graph: fx.Graph) -> None:
        assert graph.owning_module is not None
        run_passes(graph.owning_module, pipeline.LOWERED, Context(plan=plan, log=log), "lowered")

    if not compiled:
        return _torch.eager_backend(partition, compiler) if compiler else _torch.eager_backend(partition)
    files = pipeline.source_files(Path(__file__).parents[1])
    return _torch.inductor_backend(partition, lower, identity=identity(plan), passes=files, compiler=compiler)


def identity(plan: Assignment) -> str:
    """Return the text of everything in a plan that the compiled graphs depend on, for Inductor's cache key.

    The definition of a format from outside the package may change while its name stays.
    """
    entries = [f"{key} {entry.format}" for key, entry in sorted(plan.entries.items())]
    own = registered(entry.format for entry in plan.entries.values())
    return "\n".join([*entries, *(f"{name} is {fingerprint}" for name, fingerprint in sorted(own.items()))])
