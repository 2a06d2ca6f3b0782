"""Round a tensor of a step to any format."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from assign.formats.rows import BlockFormat, Format
from assign.numerics.blocks import memory_order
from assign.numerics.rounding import quantize, stream_of
from assign.plan.keys import grad_key

LARGEST_SCALE = 2.0**16
"""The loss scale that training starts with, and the largest one here."""


def is_gradient(key: str) -> bool:
    """Whether ``key`` is that of a gradient."""
    return key.endswith(grad_key(""))


def largest_gradient(tensors: Mapping[str, Tensor]) -> float:
    """Return the largest finite magnitude among the gradients of a step."""
    found = [float(x.abs().nan_to_num(0, 0, 0).amax()) for key, x in tensors.items() if is_gradient(key) and x.numel()]
    return max(found, default=0.0)


def loss_scale(fmt: Format | BlockFormat, largest: float) -> float:
    """Return the power of two that a loss scaler arrives at: with it no gradient overflows ``fmt``.

    It is 1 for a format with a scale of its own, and for formats that saturate, such as posits: see
    ``training.loop.needs_loss_scaling``.

    Args:
        fmt: the format of the gradients.
        largest: largest magnitude among the gradients without a loss scale.
    """
    if isinstance(fmt, BlockFormat) or fmt.scaled or (fmt.layout and fmt.layout.saturates) or largest == 0:
        return 1.0
    return min(LARGEST_SCALE, 2.0 ** math.floor(math.log2(fmt.max_value / largest)))


def round_tensor(x: Tensor, key: str, fmt: Format | BlockFormat, *, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Return tensor ``key`` rounded to ``fmt``, saturated; elements that are not finite stay as they are.

    Args:
        x: floating-point, any shape.
        key: key of the tensor. Only gradients are multiplied by ``scale``, and each key has random bits of its own in a
            stochastic block format.
        fmt: the format to round to.
        scale: loss scale: a gradient is rounded after multiplication with it.
        seed: of stochastic rounding.
    Returns:
        Same shape and dtype as ``x``. If the dtype cannot represent the values of ``fmt``, they are rounded to it.
    """
    dtype, x = x.dtype, x.to(torch.float32)
    scaled = x * scale if is_gradient(key) and scale != 1 else x
    seeds = torch.tensor(seed, dtype=torch.int64, device=x.device)
    rounded = (
        _round_blocks(scaled, key, fmt, seeds)
        if isinstance(fmt, BlockFormat)
        else quantize(scaled, fmt, dtype=torch.float32, seed=seeds)
    )
    rounded = rounded / scale if scaled is not x else rounded
    return torch.where(x.isfinite() & rounded.isfinite(), rounded, x).to(dtype)


def _round_blocks(x: Tensor, key: str, fmt: BlockFormat, seed: Tensor) -> Tensor:
    order = memory_order(x)
    randomness = (seed, stream_of(key)) if fmt.stochastic else ()
    codes = torch.ops.assign.encode_blocks(x, fmt.name, order, *randomness)
    decoded: Tensor = torch.ops.assign.decode_blocks(codes, fmt.name, list(x.shape), order, x.dtype)
    return decoded
