"""Delayed scaling: scales from the largest magnitudes of earlier steps.

A current scale needs a pass over the tensor before the pass that rounds it. A delayed scale is known when the step
begins, and the pass that rounds also measures what later steps need. The measurements of a tensor are in its *history*.
The rounding operators look it up when they run (:mod:`assign.numerics.runtime_formats`), as they do for promotion.

Source: NVIDIA Transformer Engine, delayed scaling: the largest magnitude of the last steps, 1024 by default.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from assign.errors import PlanError
from assign.formats.parsing import parse_format
from assign.formats.rows import Format
from assign.numerics.kernels import scaling
from assign.plan.keys import Key, Part
from assign.plan.plan import Assignment

LENGTH = 1024
"""Number of steps in a history. Source: Transformer Engine's default."""


@dataclass(slots=True, kw_only=True)
class History:
    """Measured magnitudes of one tensor.

    Attributes:
        largest: bits of the largest magnitude measured in this step, int32 without axes.
    """

    key: str
    format: Format
    owner: "DelayedScales"
    largest: Tensor | None = None

    @property
    def scale(self) -> Tensor | None:
        """Return the scale for this step, float32 without axes; None in the first step, which computes its own."""
        return self.owner.scales.get(self.key)

    def record(self, largest: Tensor) -> None:
        """Record the largest magnitude that this step rounded; recompute measures the same value again."""
        if self.owner.recording:
            self.largest = largest


class DelayedScales:
    """Largest magnitudes of earlier steps, from which delayed scales are computed, for one training.

    ``assign.apply`` and ``assign.planned_step`` create their own unless one is passed. Pass one to keep it: to resume
    from a checkpoint with the earlier scales, or to run a model in two ways with one history.

    Args:
        length: number of steps that count.
    Raises:
        PlanError: ``length`` is below 1.
    """

    def __init__(self, plan: Assignment, *, length: int = LENGTH) -> None:
        if length < 1:
            raise PlanError(f"DelayedScales: length is {length}; give a number of steps, 1 or more.")
        self.recording = True
        self.scales: dict[str, Tensor] = {}
        self._length = length
        parts = {key: Key.parse(key, plan.entries).part for key in plan.entries}
        computed = [key for key, part in parts.items() if part in (Part.TENSOR, Part.GRADIENT)]
        formats = {key: parse_format(plan.entries[key].format) for key in computed}
        self._formats = {key: fmt for key, fmt in formats.items() if fmt.delayed}
        self._histories: dict[str, History] = {}
        self._keys: list[str] = []
        self._past: Tensor | None = None  # bits of the largest magnitudes, [steps, keys], last step first

    def history(self, key: str) -> History | None:
        """Return the history of the tensor ``key``; None if its scale is not delayed."""
        if key not in self._formats:
            return None
        if key not in self._histories:
            self._histories[key] = History(key=key, format=self._formats[key], owner=self)
        return self._histories[key]

    def begin(self, training: bool) -> None:
        """Begin a step: compute its scales from earlier steps. With ``training=False`` the step records nothing."""
        self.recording = training
        self._remember()
        if self._past is None:
            return
        largest = self._past.amax(0)
        for fmt in {self._formats[key] for key in self._keys}:
            scaler = scaling(fmt)
            scales = scaler.kernel(largest, (*scaler.ints, *scaler.floats)).unbind()
            self.scales |= {
                key: scale for key, scale in zip(self._keys, scales, strict=True) if self._formats[key] == fmt
            }

    def state_dict(self) -> dict[str, Any]:
        """Return the keys of the measured tensors and the bits of their amax, int32 [steps, keys], last step first."""
        self._remember()
        return {"keys": list(self._keys), "past": self._past}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state from :meth:`state_dict`, of a training under the same plan.

        Raises:
            PlanError: the state has a tensor whose scale is not delayed under this plan, or not one column for each
                tensor.
        """
        for key in state["keys"]:
            if key not in self._formats:
                raise PlanError(
                    f"DelayedScales: the state to load has {key!r}, whose scale is not delayed under this plan. "
                    "Load the state of a training under the same plan."
                )
        keys, past = list(state["keys"]), state["past"]
        whole = past is None or (past.dtype is torch.int32 and past.ndim == 2 and past.shape[1] == len(keys))
        if not whole or (past is None) != (not keys):
            raise PlanError(f"DelayedScales: the state to load lacks a column for some of its {len(keys)} tensors.")
        self._keys, self._past = keys, past

    def _remember(self) -> None:
        """Add the measurements of the last step to the past ones; a tensor that it did not measure gets 0."""
        seen = {key: each.largest for key, each in self._histories.items() if each.largest is not None}
        if not seen:
            return
        for key in seen:
            self._histories[key].largest = None
        new = [key for key in seen if key not in self._keys]
        self._keys += new
        nothing = torch.zeros_like(next(iter(seen.values())))
        latest = torch.stack([seen.get(key, nothing) for key in self._keys])[None]
        if self._past is not None:
            past = torch.nn.functional.pad(self._past, (0, len(new)))
            latest = torch.cat([latest, past[: self._length - 1]])
        self._past = latest
