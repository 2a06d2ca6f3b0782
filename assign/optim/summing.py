"""Sum the gradients of micro-batches inside the backward pass, each where it arises.

A compiled backward pass returns all its gradients at its end, and autograd then adds them to ``.grad``: two sets of
gradients are alive. Under a plan with micro-batches, the graph instead calls the operator ``assign::sum_gradient`` as
soon as the gradient of a parameter is complete. The operator adds it to the parameter's ``.grad``, and the graph frees
it. So one set of gradients and one more gradient are alive.

A sum stored in float32 is a plain sum. A sum stored in 16 bits is computed in float32 and rounded stochastically,
because rounding to nearest loses small gradients beside a large sum. The first gradient is rounded to nearest: it is
what a step without micro-batches would store.

Hooks on the parameter run as autograd would run them: hooks on its gradient before the sum, hooks after accumulation
behind it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from assign import _torch
from assign.formats.parsing import parse_format
from assign.numerics.dispatch import run
from assign.numerics.kernels import quantizing
from assign.numerics.registry import register
from assign.numerics.rounding import STOCHASTIC, key_of
from assign.numerics.torch_dtypes import SIXTEEN_BITS, torch_dtype
from assign.optim.gradients import set_gradient
from assign.plan.persistent_state import SUM_PIECE, stored_dtype

_DEVICE_PIECE = 2**22
"""Elements that are summed at a time on a GPU, where every launch has a cost."""


class Sums(_torch.OpaqueBase):
    """The parameters of one call of a graph, whose gradients the graph sums.

    Attributes:
        parameters: in the order of their numbers in the graph.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = tuple(parameters)


_torch.register_opaque(Sums)


def is_rounded(format_name: str) -> bool:
    """Whether a sum of gradients that is stored in this format is rounded stochastically, for which it needs a seed."""
    return torch_dtype(stored_dtype(parse_format(format_name))) in SIXTEEN_BITS


def add_gradient(parameter: Tensor, gradient: Tensor, dtype: torch.dtype, key: Tensor | None = None) -> None:
    """Add a gradient to ``parameter.grad``, which is stored in ``dtype``.

    Args:
        parameter: a leaf, with or without a gradient.
        gradient: of the same shape, in any floating-point dtype. It is not changed.
        dtype: of the sum.
        key: int64 [2], from which the random bits of a 16-bit sum are made. None: that sum is rounded to nearest.
    """
    total = parameter.grad
    if total is None:
        set_gradient(parameter, torch.empty_like(parameter, dtype=dtype, requires_grad=False).copy_(gradient))
        return
    if total.dtype == gradient.dtype == torch.float32:
        total.add_(gradient)
        return
    for number, (sums, part) in enumerate(zip(_pieces(total), _pieces(gradient), strict=True)):
        if key is None or dtype not in STOCHASTIC:
            sums.add_(part)
        else:
            _add_by_chance(sums, part, key + number)


def _add_by_chance(total: Tensor, gradient: Tensor, key: Tensor) -> None:
    """Add to a 16-bit sum in float32, and round the result stochastically."""
    wide = total.float().add_(gradient)
    total.copy_(run(quantizing(STOCHASTIC[total.dtype], saturate=False), wide, None, total.dtype, key))


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    """Return views of parts of a tensor, so small that temporary float32 copies of one part do not count."""
    most = SUM_PIECE if x.device.type == "cpu" else _DEVICE_PIECE
    if x.numel() <= most:
        return (x,)
    axis = max(range(x.dim()), key=x.size)
    return torch.split(x, max(1, x.size(axis) * most // x.numel()), axis)


@torch.no_grad()
def _sum_gradient(
    gradient: Tensor, number: int, format: str, seed: Tensor | None = None, stream: int = 0, *, sums: Sums | None = None
) -> Tensor:
    assert sums is not None
    parameter = sums.parameters[number]
    for hook in _torch.gradient_hooks(parameter):
        changed = hook(gradient)
        gradient = gradient if changed is None else changed
    key = None if seed is None else key_of(seed, stream)
    add_gradient(parameter, gradient, torch_dtype(stored_dtype(parse_format(format))), key)
    for hook in _torch.accumulation_hooks(parameter):
        hook(parameter)
    return gradient.new_zeros((), dtype=torch.float32)


register("sum_gradient", _sum_gradient, lambda gradient, **_: gradient.new_empty((), dtype=torch.float32))
