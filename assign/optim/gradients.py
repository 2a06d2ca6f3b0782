"""Gradients stored in 8 bits until the optimizer reads them: codes in ``.grad``, and a power of two as scale.

One is widened when its parameter is stepped, and for no longer, so that at any time there is one wide gradient at most.
What adds to ``.grad`` or reads it knows no scale: gradients of several backward passes cannot be summed, clipped or
divided by a loss scale. The first is refused here, the last where training begins.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from assign.errors import PlanError
from assign.formats.rows import Format
from assign.numerics.torch_dtypes import dtype_name
from assign.optim.beside import beside


def keep_scale(parameter: Tensor, scale: Tensor) -> None:
    """Note the scale of the gradient that ``parameter`` is about to get.

    Raises:
        PlanError: it has one already, which would be added to.
    """
    if parameter.grad is not None:
        raise PlanError(
            f"backward: a parameter of shape {list(parameter.shape)} has a gradient already, stored as "
            f"{dtype_name(parameter.grad.dtype)} with a scale, and another one cannot be added to it.\n"
            "  Allowed: one backward pass for each step.\n"
            "  Call optimizer.zero_grad() before, or store gradients in bf16 to accumulate over micro-batches."
        )
    beside(parameter).gradient_scale = scale


@contextlib.contextmanager
def widened(parameter: Tensor, fmt: Format) -> Iterator[None]:
    """Within the context, the parameter's gradient is in the parameter's dtype; behind it, what it was.

    Raises:
        PlanError: no planned model made the gradient.
    """
    codes, scale = parameter.grad, beside(parameter).gradient_scale
    assert codes is not None
    if scale is None:
        raise PlanError(
            f"optimizer: the gradient of a parameter of shape {list(parameter.shape)} is {codes.dtype} and has no "
            "scale: no planned model made it since the last step.\n"
            "  Allowed: gradients from the model that assign.apply returned, one step with each.\n"
            "  Call that model, or assign.planned_step, for the loss."
        )
    wide = torch.ops.assign.decode(codes.view(torch.uint8), scale, fmt.name, parameter.dtype)
    set_gradient(parameter, wide)
    del wide
    try:
        yield
    finally:
        set_gradient(parameter, codes)


def forget_scale(parameter: Tensor) -> None:
    """The gradient has been used: what a model without a plan leaves in its place must not be read with its scale."""
    beside(parameter).gradient_scale = None


def set_gradient(parameter: Tensor, gradient: Tensor) -> None:
    """Give a parameter a gradient in whatever dtype."""
    parameter.grad = None
    parameter.grad_dtype = gradient.dtype
    parameter.grad = gradient
