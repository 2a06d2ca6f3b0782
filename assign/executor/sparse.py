"""Keep sparse gradients of embeddings sparse, as in plain PyTorch.

A joint graph has dense gradients only, so the gradient is dense for a moment in the backward pass; then only the rows
that are not all zero are kept. Plain PyTorch also keeps a row that was looked up and whose gradient is zero, and does
not yet add up the rows of one index. A gradient that a plan stores in another dtype than its parameter is dense.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from assign import _torch
from assign.tracing.capture import Capture
from assign.tracing.functionalize import is_sparse


def sparse_inputs(capture: Capture) -> list[int]:
    """Return the positions of the inputs of an unmarked graph whose gradients the user's code makes sparse."""
    inputs = capture.graph.graph.find_nodes(op="placeholder")
    return [place for place, node in enumerate(inputs) if node in capture.parameters and is_sparse(node)]


def with_sparse_gradients(run: Callable[..., Any], places: Sequence[int]) -> Callable[..., Any]:
    """Return ``run`` with a backward pass that gives sparse gradients to the inputs at ``places``."""
    if not places:
        return run

    def call(*inputs: Any) -> Any:
        return run(*(_torch.apply_function(_Sparse, x) if place in places else x for place, x in enumerate(inputs)))

    return call


class _Sparse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Tensor | None:
        (gradient,) = grads
        return None if gradient is None else gradient.to_sparse(1)
