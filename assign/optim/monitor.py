"""Count updates that rounding loses during training.

Source: arXiv 2010.06192.
"""

import math
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from assign.distributed import local_part, unwrapped
from assign.errors import TaskError
from assign.plan.persistent_state import COMPENSATION, EXTRA_BITS

_DIRECTIONS = ("exp_avg", "momentum_buffer")
"""Names of first moments in torch's optimizers and ours."""

_RESTS = (COMPENSATION, EXTRA_BITS)
"""States that keep the part of an update that the weight loses."""


class LostUpdates:
    """Count the weights that a nonzero update left unchanged, for each parameter.

    It watches every step of an optimizer of any class, in the user's own loop.

    An update is counted if the first moment (or the gradient, if there is none) is not zero, or if weight decay changes
    the weight. Updates that Kahan's compensation or a master's extra bits keep are not lost. Stochastic rounding also
    leaves most weights unchanged, but loses nothing in the mean: there the share says how coarse the steps are. Of
    sharded parameters each process counts its own parts.

    Args:
        model: gives the names of the parameters.
        optimizer: the optimizer to watch.
        every: steps between two counts. A count costs a copy of the sample and a few passes over it.
        sample: elements per parameter to count, evenly spread; None for all.
    Examples:
        ```python
        half = nn.Sequential(nn.Linear(64, 10)).bfloat16()
        optimizer = assign.optim.SGD(half.parameters(), lr=1e-3, rounding="kahan")
        with assign.optim.LostUpdates(half, optimizer) as lost:
            loss(half, (batch[0].bfloat16(), batch[1])).backward()
            optimizer.step()
        print(lost.share, lost.shares)
        ```
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, *, every: int = 1, sample: int | None = 2**16) -> None:
        if every < 1 or (sample is not None and sample < 1):
            raise TaskError(
                f"LostUpdates: every={every}, sample={sample}.\n"
                "  Allowed: whole numbers of at least 1; None as sample.\n  Give such values."
            )
        self._optimizer, self._every, self._sample = optimizer, every, sample
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in unwrapped(model).named_parameters()}
        self._steps = 0
        self._before: dict[Tensor, tuple[Tensor, Tensor | None]] = {}
        self._counts: dict[str, Tensor] = {}
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: self._before_step()),
            optimizer.register_step_post_hook(lambda *_: self._compare()),
        ]

    def __enter__(self) -> "LostUpdates":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def detach(self) -> None:
        """Stop watching the optimizer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def reset(self) -> None:
        """Set all counts to zero."""
        self._counts = {}

    @property
    def shares(self) -> dict[str, float]:
        """Parameter → share of its updates that were lost, if it had any. Synchronizes with the device."""
        counts = {name: count.tolist() for name, count in self._counts.items()}
        return {name: lost / tried for name, (lost, tried) in counts.items() if tried}

    @property
    def share(self) -> float | None:
        """Share of all counted updates that were lost; None if there were none.

        A parameter counts with the elements of its sample.
        """
        if not self._counts:
            return None
        lost, tried = torch.stack([count.cpu() for count in self._counts.values()]).sum(0).tolist()
        return lost / tried if tried else None

    def to_json(self) -> dict[str, Any]:
        """Return the counts as plain data."""
        return {"steps": self._steps, "every": self._every, "share": self.share, "parameters": self.shares}

    @torch.no_grad()
    def _before_step(self) -> None:
        self._steps += 1
        self._before = {}
        if (self._steps - 1) % self._every:
            return
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and group["lr"] != 0:
                    rest = self._rest(parameter)
                    self._before[parameter] = (
                        self._part(parameter).clone(),
                        rest if rest is None else self._part(rest).clone(),
                    )

    @torch.no_grad()
    def _compare(self) -> None:
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in self._before:
                    self._count(parameter, group)
        self._before = {}

    def _count(self, parameter: Tensor, group: Mapping[str, Any]) -> None:
        state = self._optimizer.state.get(parameter, {})
        before, rest = self._before[parameter]
        assert parameter.grad is not None
        moment: Tensor = next((state[name] for name in _DIRECTIONS if state.get(name) is not None), parameter.grad)
        tried = self._part(moment) != 0
        if group.get("weight_decay", 0) != 0:
            tried |= before != 0
        kept = self._part(parameter) == before
        found = self._rest(parameter)
        if found is not None:
            kept &= self._part(found) == (0 if rest is None else rest)
        name = self._names.get(parameter, f"parameter of shape {list(parameter.shape)}")
        count = torch.stack(((tried & kept).sum(), tried.sum()))
        self._counts[name] = self._counts[name] + count if name in self._counts else count

    def _rest(self, parameter: Tensor) -> Tensor | None:
        state = self._optimizer.state.get(parameter, {})
        return next((state[name] for name in _RESTS if name in state), None)

    def _part(self, tensor: Tensor) -> Tensor:
        flat = local_part(tensor.detach()).reshape(-1)
        return flat if self._sample is None else flat[:: max(1, math.ceil(len(flat) / self._sample))]
