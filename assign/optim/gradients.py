"""Gradients stored in 8 bits until the optimizer reads them: codes in ``.grad``, and a power of two as scale.

A gradient is widened only while its parameter is stepped, so at most one wide gradient exists at any time. Other code
that reads or adds to ``.grad`` does not know the scale: gradients of several backward passes cannot be summed, clipped
or divided by a loss scale. This module refuses the first; training refuses the last when it starts.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from assign.errors import PlanError
from assign.formats.rows import Format
from assign.numerics.torch_dtypes import dtype_name
from assign.optim.extras import extras


def keep_scale(parameter: Tensor, scale: Tensor) -> None:
    """Store the scale of the gradient that ``parameter`` is about to get.

    Raises:
        PlanError: it has a gradient already, which would be added to.
    """
    if parameter.grad is not None:
        raise PlanError(
            f"backward: a parameter of shape {list(parameter.shape)} already has a gradient, stored as "
            f"{dtype_name(parameter.grad.dtype)} with a scale, and another one cannot be added to it.\n"
            "  Allowed: one backward pass for each step.\n"
            "  Call optimizer.zero_grad() before, or store gradients in bf16 to accumulate over micro-batches."
        )
    extras(parameter).gradient_scale = scale


@contextlib.contextmanager
def widened(parameter: Tensor, fmt: Format) -> Iterator[None]:
    """Convert the parameter's gradient to the parameter's dtype in the context; afterwards restore it.

    Raises:
        PlanError: the gradient was not made by a planned model.
    """
    codes, scale = parameter.grad, extras(parameter).gradient_scale
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
    """Forget the scale of a used gradient, so that a later gradient of a plain model is not read with it."""
    extras(parameter).gradient_scale = None


def set_gradient(parameter: Tensor, gradient: Tensor) -> None:
    """Give a parameter a gradient of any dtype."""
    parameter.grad = None
    parameter.grad_dtype = gradient.dtype
    parameter.grad = gradient
