"""Flips of relu: its derivative is 0 or 1 by the sign of its input, and rounding changes some signs.

No derivative shows this, because the gradient jumps. But the average effect of flips is known. If values of root mean
square m are perturbed by σ·m, a share of about 0.8 · σ · p of the gates flips, where p is the density of values around
zero in units of m. Each flip changes its gradient by the whole amount. Give each gate the slope K = 1/m for y < w·m
instead of no slope: then a perturbation of σ·m has a squared effect of p · w · σ², which is the share above after
multiplication with 0.8 / (w · σ). So one more derivative, with these slopes, gives the noise of flips for all
perturbations: see :func:`flip_factor`.
"""

import math
from typing import Any

import torch
from torch import Tensor

from assign import _torch

WIDTH = 0.25
"""w: wide enough to contain many values, narrow enough for their density to equal that at zero."""

OPERATOR = torch.ops.aten.threshold_backward.default


class Slopes:
    """Switch: whether gates have a slope when gradients are differentiated."""

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
    """Return the result of relu's backward pass; it can be differentiated, with slopes if these are on."""
    return _torch.apply_function(_Gate, grad, y, threshold, slopes)


def root_mean_square(y: Tensor) -> Tensor:
    """Return the root mean square of the values that relu let through, which are half of a whole distribution."""
    return (y.square().sum() / (y > 0).sum().clamp(min=1)).sqrt().clamp(min=1e-30)


def flip_factor(value: Tensor, error: Tensor) -> float:
    """Return the factor from squared effects of slopes to those of flips, for ``value`` with this ``error``."""
    size, wrong = float(value.norm()), float(error.norm())
    return 0.8 / WIDTH * size / wrong if wrong > 0 and math.isfinite(size) else 0.0
