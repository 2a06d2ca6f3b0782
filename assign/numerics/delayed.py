"""Delayed scaling: scales from the largest magnitudes of earlier steps.

A current scale takes a pass over the tensor before the pass that rounds it. A delayed one is known when the step
begins, and the same pass that rounds finds out what the next steps need. What is known of a tensor is in its *history*;
the rounding operators look it up when they run (:mod:`assign.numerics.runtime_formats`), as they do for promotion.

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
"""Steps that a history remembers. Source: Transformer Engine's default."""


@dataclass(slots=True, kw_only=True)
class History:
    """What is known of the magnitudes of one tensor.

    Attributes:
        largest: bits of the largest magnitude that this step has seen, int32 without axes.
    """

    key: str
    format: Format
    owner: "DelayedScales"
    largest: Tensor | None = None

    @property
    def scale(self) -> Tensor | None:
        """Float32 without axes, for this step; None before the first one is over: it takes its own."""
        return self.owner.scales.get(self.key)

    def record(self, largest: Tensor) -> None:
        """What the rounding of this step saw; a second look, as checkpointing takes it, sees the same."""
        if self.owner.recording:
            self.largest = largest


class DelayedScales:
    """Largest magnitudes of earlier steps, from which delayed scales are computed, in one training.

    ``assign.apply`` and ``assign.planned_step`` make their own where none is given. Give one to keep it: to go on from
    a checkpoint with the scales that were, or to run a model in two ways with one history.

    Args:
        length: steps that count.
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
        self._past: Tensor | None = None  # bits of the largest magnitudes, [steps, keys], the last step first

    def history(self, key: str) -> History | None:
        """That of the tensor ``key``; None if its scale is not delayed."""
        if key not in self._formats:
            return None
        if key not in self._histories:
            self._histories[key] = History(key=key, format=self._formats[key], owner=self)
        return self._histories[key]

    def begin(self, training: bool) -> None:
        """A step begins: its scales follow from the steps before. Without ``training`` nothing is recorded in it."""
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
        """The keys of the tensors seen; the bits of their largest magnitudes, int32 [steps, keys], last step first."""
        self._remember()
        return {"keys": list(self._keys), "past": self._past}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`, of a training under the same plan.

        Raises:
            PlanError: the state has a tensor whose scale is not delayed under this plan.
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
            raise PlanError(f"DelayedScales: the state to load has not a column for each of its {len(keys)} tensors.")
        self._keys, self._past = keys, past

    def _remember(self) -> None:
        """Put what the last step saw before what is known; a tensor that it did not see says nothing."""
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
