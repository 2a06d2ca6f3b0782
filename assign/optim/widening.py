"""Step on a 16-bit master in float32, and round its new value back, stochastically or with Kahan summation.

This gives the optimizers of all libraries these roundings, whatever formats their states have. Only one parameter and
its gradient are wide at a time.
"""

import contextlib
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from assign.distributed import synchronized_rng
from assign.numerics.rounding import draw_seed, stream_of
from assign.numerics.torch_dtypes import SIXTEEN_BITS
from assign.optim.gradients import set_gradient
from assign.optim.updates import kahan_add
from assign.plan.persistent_state import COMPENSATION, UpdateRounding


@dataclass(frozen=True, slots=True, kw_only=True)
class Randomness:
    """Random bits of one optimizer step. They depend only on the step's seed and the parameter's key.

    A parameter is therefore rounded the same way regardless of the order and time of updates, and in all processes that
    train the model together.
    """

    seed: Tensor

    @classmethod
    def draw(cls, device: torch.device) -> "Randomness":
        """Draw the seed of a step from torch's generator, the same in all processes."""
        with synchronized_rng(device):
            return cls(seed=draw_seed(device))

    def round(self, value: Tensor, dtype: torch.dtype, key: str) -> Tensor:
        """Round a float32 value to a 16-bit dtype, so that the mean of the results is the value."""
        name = f"{SIXTEEN_BITS[dtype]}:sr"
        rounded: Tensor = torch.ops.assign.quantize(value, None, name, False, dtype, self.seed, stream_of(key))
        return rounded


@contextlib.contextmanager
def widened_master(
    parameter: Tensor,
    states: MutableMapping[str, Any],
    rounding: UpdateRounding,
    randomness: Randomness | None,
    key: str,
) -> Iterator[None]:
    """Make the parameter and its gradient float32 in the context; afterwards they are as narrow as before.

    The new value is rounded by ``rounding``. If an error is raised in the context, the parameter keeps its old value.

    Args:
        parameter: in bfloat16 or float16.
        states: of the parameter in the optimizer; in the context without Kahan's compensation.
        rounding: how the new value is rounded.
        randomness: of this step; needed for ``stochastic``.
        key: of the parameter.
    """
    compensation, narrow, gradient = states.pop(COMPENSATION, None), parameter.data, parameter.grad
    parameter.grad = None
    parameter.data = narrow.float()
    try:
        if gradient is not None:
            set_gradient(parameter, gradient if gradient.dtype.itemsize == 1 else gradient.float())
        yield
        parameter.grad = None
        _round_back(parameter.data, narrow, compensation, rounding, randomness, key)
    finally:
        parameter.grad = None
        parameter.data = narrow
        if gradient is not None:
            set_gradient(parameter, gradient)
        if compensation is not None:
            states[COMPENSATION] = compensation


def _round_back(
    wide: Tensor,
    narrow: Tensor,
    compensation: Tensor | None,
    rounding: UpdateRounding,
    randomness: Randomness | None,
    key: str,
) -> None:
    """Write the new value of a master into its narrow storage."""
    if rounding == UpdateRounding.NEAREST:
        narrow.copy_(wide)
        return
    if rounding == UpdateRounding.STOCHASTIC:
        assert randomness is not None
        narrow.copy_(randomness.round(wide, narrow.dtype, key))
        return
    assert compensation is not None
    before = narrow.float()
    after, rest = kahan_add(before, wide.sub_(before), compensation.float(), narrow.dtype)
    narrow.copy_(after)
    compensation.copy_(rest)
