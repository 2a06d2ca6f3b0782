"""Flips of relu: its derivative is 0 or 1 by the sign of its input, and rounding changes some signs.

A derivative does not see that: the gradient jumps. But how much the flips come to on average is known. Where a value of
root mean square m is perturbed by σ·m, a share of about 0.8 · σ · p of the gates flips, p being the density of values
around zero in units of m; each takes all of its gradient. A gate with the slope K = 1/m within y < w·m in place of none
has, for perturbations σ·m, a square of p · w · σ²; that times 0.8 / (w · σ) is the share above. So one more derivative,
with these slopes, gives the part of all perturbations that flips gates: see :func:`flip_factor`.
"""

import math
from typing import Any

import torch
from torch import Tensor

from assign import _torch

WIDTH = 0.25
"""w: wide enough to hold many values, narrow enough for their density to be that at zero."""

OPERATOR = torch.ops.aten.threshold_backward.default


class Slopes:
    """Whether gates have a slope; asked when gradients are differentiated."""

    def __init__(self) -> None:
        self.on = False


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, y: Tensor, threshold: float, slopes: Slopes) -> Tensor:
        ctx.save_for_backward(grad, y)
        ctx.threshold, ctx.slopes = threshold, slopes
        passed: Tensor = OPERATOR(grad, y, threshold)
        return passed

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        grad, y = ctx.saved_tensors
        to_grad: Tensor = OPERATOR(outer[0], y, ctx.threshold)
        if not ctx.slopes.on:
            return to_grad, None, None, None
        size = root_mean_square(y)
        near = (y > ctx.threshold) & (y < ctx.threshold + WIDTH * size)
        return to_grad, torch.where(near, outer[0] * grad / size, 0.0), None, None


def gate(grad: Tensor, y: Tensor, threshold: float, slopes: Slopes) -> Tensor:
    """What relu's backward pass does; differentiable, with slopes where these are on."""
    return _torch.apply_function(_Gate, grad, y, threshold, slopes)


def root_mean_square(y: Tensor) -> Tensor:
    """Of the values that relu let through, which are half of a whole distribution."""
    return (y.square().sum() / (y > 0).sum().clamp(min=1)).sqrt().clamp(min=1e-30)


def flip_factor(value: Tensor, error: Tensor) -> float:
    """What turns squares of effects by slopes into squares of effects by flips, where ``value`` has this ``error``."""
    size, wrong = float(value.norm()), float(error.norm())
    return 0.8 / WIDTH * size / wrong if wrong > 0 and math.isfinite(size) else 0.0
