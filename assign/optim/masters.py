"""Master weights of 24 bits: a bf16 parameter, and 8 more bits of each mantissa in the optimizer's state.

Together they are the float32 master, rounded to sign, 8 bits of exponent and 15 of mantissa. The parameter is that
value rounded to nearest, and the model computes with it without a copy. The extra byte is the difference between the
two, in units of 2^-8 of a bf16 step, from -128 to 127; it is stored as two's complement in uint8. Parameters are
processed one by one: each is joined to float32, updated by the library's own optimizer, and split again.

Edge cases: A float32 value halfway between two 24-bit values is rounded to the even one. A 24-bit value halfway between
two bf16 values is rounded away from zero, because 127 is the largest correction. The same happens to a float32 value
within 2^-9 bf16 steps of that point; only there the parameter is not the nearest bf16 value. Zeros keep their signs;
subnormal values are split like others. Values from 2^128 - 2^111 on, half a unit above the largest 24-bit value, become
infinite, as in any format that rounds to nearest; this includes the largest float32 value. From 2^128 - 2^119 on the
parameter is infinite, but its master is not. A NaN stays a NaN, but loses its sign and payload.

Code that writes to a parameter between two steps does not change its extra bits: the master is then off by up to half a
bf16 step. After weights are loaded, their extra bits are unknown until the optimizer's state is loaded too; a step
before that raises an error. A copy of the model alone has only the parameters; an optimizer for it starts with extra
bits of zero.

Source: FlashOptim (arXiv 2602.23349) splits masters in this way; the rounding and the edge cases are our own.
"""

import contextlib
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from assign.distributed import unwrapped
from assign.errors import PlanError
from assign.optim.extras import extras
from assign.optim.gradients import set_gradient
from assign.plan.persistent_state import EXTRA_BITS


def split(wide: Tensor, narrow: Tensor, extra: Tensor) -> None:
    """Round float32 values to 24 bits and write them into two tensors; see the module.

    Args:
        wide: float32; used as working memory, so its values are lost.
        narrow: bfloat16, of the same shape.
        extra: uint8, of the same shape.
    """
    wide.masked_fill_(wide.isnan(), torch.nan)  # the bits of another NaN might round to infinity
    bits = wide.view(torch.int32)
    part = bits.bitwise_right_shift(8)
    bits += part.bitwise_and_(1).add_(0x7F)  # ties to even; the lowest 8 bits are not used any more
    torch.bitwise_right_shift(bits, 8, out=part)
    extra.copy_(part.bitwise_and_(0xFF))
    bits += 0x8000
    narrow.view(torch.int16).copy_(bits.bitwise_right_shift_(16))


def join(narrow: Tensor, extra: Tensor) -> Tensor:
    """Return the float32 values that bfloat16 ``narrow`` and uint8 ``extra`` represent together; exact."""
    bits = narrow.view(torch.int16).to(torch.int32).bitwise_left_shift_(8)
    bits += extra.view(torch.int8)
    return bits.bitwise_left_shift_(8).view(torch.float32)


def store_split(parameter: nn.Parameter) -> None:
    """Convert a float32 parameter without a gradient to bf16, and keep its extra bits for the optimizer."""
    narrow = torch.empty_like(parameter.data, dtype=torch.bfloat16)
    extra = torch.empty_like(parameter.data, dtype=torch.uint8)
    split(parameter.data.clone(), narrow, extra)
    parameter.data = narrow
    forget_extra_bits(parameter)
    extras(parameter).extra = extra


def extra_bits_of(parameter: Tensor) -> Tensor:
    """Return the extra bits of a parameter, always the same tensor; zeros if the parameter was bf16 before the plan."""
    extra = extras(parameter).extra
    if extra is None or extra.device != parameter.device:
        kept = torch.zeros_like(parameter, dtype=torch.uint8, requires_grad=False)
        extra = extras(parameter).extra = kept if extra is None else kept.copy_(extra)
    return extra


def load_extra_bits(parameter: Tensor, saved: Tensor) -> Tensor:
    """Set the extra bits of a parameter to those saved with its values, and return them."""
    extras(parameter).lost = False
    return extra_bits_of(parameter).copy_(saved)


def is_split(parameter: Tensor) -> bool:
    """Whether the parameter has extra bits."""
    return extras(parameter).extra is not None


def forget_extra_bits(parameter: Tensor) -> None:
    """Remove the extra bits of a parameter: from now on it is the whole master."""
    extras(parameter).extra, extras(parameter).lost = None, False


def note_loaded(parameter: Tensor, value: Tensor) -> None:
    """Record that ``value`` is about to be loaded into a parameter, which may have extra bits.

    If ``value`` is wider than bf16, the extra bits become zero: the caller has checked that loading rounds nothing. If
    it is bf16, they are unknown from now on.
    """
    extra = extras(parameter).extra
    if extra is None:
        return
    extras(parameter).lost = value.dtype == parameter.dtype
    if not extras(parameter).lost:
        extra.zero_()


def check_known(parameter: Tensor, what: str) -> None:
    """Check that the extra bits of a parameter belong to its values.

    Raises:
        PlanError: values were loaded without extra bits; the message begins with ``what``.
    """
    if extras(parameter).lost:
        raise PlanError(
            f"{what}: a parameter of shape {list(parameter.shape)} was loaded in bfloat16, without the 8 extra bits "
            "that its master has in the optimizer's state.\n"
            "  Allowed: the state_dict of the model first, then that of its optimizer; or weights without extra bits.\n"
            "  Load the optimizer's state_dict now; or load these weights into the float32 model, and apply the plan "
            "after that: its extra bits are zero then."
        )


@contextlib.contextmanager
def joined(parameter: Tensor, states: MutableMapping[str, Any]) -> Iterator[None]:
    """Make the parameter its float32 master in the context, and its gradient float32 unless that has a scale.

    Afterwards the parameter and its extra bits have the master's new value, and the gradient is as before.

    Args:
        parameter: bfloat16, with extra bits.
        states: of the parameter in the optimizer. In the context the extra bits are removed from them, as the library
            does not know them.
    """
    extra, narrow, gradient = states[EXTRA_BITS], parameter.data, parameter.grad
    wide = join(narrow, extra)
    del states[EXTRA_BITS]
    parameter.grad = None
    parameter.data = wide
    try:
        if gradient is not None:
            set_gradient(parameter, gradient if gradient.dtype.itemsize == 1 else gradient.float())
        yield
    finally:
        parameter.grad = None
        split(parameter.data, narrow, extra)
        parameter.data = narrow
        if gradient is not None:
            set_gradient(parameter, gradient)
        states[EXTRA_BITS] = extra


def widened_weights(model: nn.Module, planned: Optimizer) -> dict[str, Tensor]:
    """Return the model's ``state_dict`` in float32, extra bits of masters included, for use without a plan.

    Nothing is lost: float32 holds every value of the narrower formats. Load it with
    ``plain.load_state_dict(assign.optim.widened_weights(model, optimizer))``.

    Args:
        model: after :func:`assign.apply`.
        planned: its optimizer, from :func:`assign.optimizer`.
    Returns:
        Names and tensors, as ``load_state_dict`` of the plain model takes them.
    Raises:
        PlanError: weights were loaded without their extra bits.
    """
    module = unwrapped(model)
    wide = {name: value.float() if value.is_floating_point() else value for name, value in module.state_dict().items()}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        extra = planned.state.get(parameter, {}).get(EXTRA_BITS, extras(parameter).extra)
        if extra is not None and parameter.dtype is torch.bfloat16:
            check_known(parameter, f"widened_weights: {name!r}")
            wide[name] = join(parameter.data, extra)
    return wide


def joined_checkpoint(
    weights: Mapping[str, Tensor], packed: Mapping[str, Any], names: list[list[str]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return saved weights joined with the extra bits in a saved optimizer state, and that state without these bits.

    Args:
        weights: by name.
        packed: the optimizer's ``state_dict``.
        names: of the optimizer's parameters, in its order; a tied parameter has several.
    """
    numbers = [number for group in packed["param_groups"] for number in group["params"]]
    joined_weights, states = dict(weights), {}
    for number, own in zip(numbers, names, strict=True):
        state = dict(packed["state"].get(number, {}))
        extra = state.pop(EXTRA_BITS, None)
        if extra is not None:
            joined_weights |= {name: join(weights[name], extra) for name in own}
        if state:
            states[number] = state
    return joined_weights, {**packed, "state": states}


def has_extra_bits(packed: Mapping[str, Any]) -> bool:
    """Whether a saved optimizer state contains extra bits of masters."""
    return any(EXTRA_BITS in state for state in packed["state"].values())
