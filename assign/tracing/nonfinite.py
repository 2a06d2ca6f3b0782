"""Find the tensors of a step with values that are not finite, such as attention masks with −inf.

The saved activations of these are never narrowed: a single infinity makes its whole block NaN in a block format, and a
cast that saturates makes it a finite number.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from assign.tracing.capture import Capture, Loss, check_parameters, compile_step
from assign.tracing.functionalize import functionalize
from assign.tracing.tensor_sites import walk


def non_finite(model: nn.Module, batch: Any, loss: Loss) -> frozenset[str]:
    """Return keys of the activations that are not all finite in one forward pass on this batch.

    The model's buffers and torch's generators are restored afterwards.

    Args:
        model: as for :func:`assign.trace`.
        batch: as for :func:`assign.trace`.
        loss: as for :func:`assign.trace`.
    Raises:
        TraceError: as for :func:`assign.trace`.
    """
    check_parameters(model)
    found: set[str] = set()

    def watch(x: Tensor, key: str) -> None:
        if not bool(x.isfinite().all()):
            found.add(key)

    def receive(capture: Capture) -> Callable[..., Any]:
        functionalize(capture.graph)
        for site in walk(capture).sites:
            if site.op == "parameter":
                continue
            last = [node for node in site.owner.graph.nodes if node.op == "placeholder"][-1:]
            after = last[0] if site.after.op == "placeholder" else site.after
            with site.owner.graph.inserting_after(after):
                site.owner.graph.call_function(watch, (site.node, site.key))
            site.owner.recompile()
        capture.graph.recompile()
        return torch.no_grad()(capture.graph.forward)

    with _unchanged(model), torch.enable_grad():
        compile_step(model, loss, receive, whole=True)(batch)
    return frozenset(found)


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    with torch.random.fork_rng():
        try:
            yield
        finally:
            for buffer, before in buffers.items():
                buffer.copy_(before)
