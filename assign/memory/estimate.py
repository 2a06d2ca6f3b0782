"""Predict the memory of a training step under a plan from its table. Nothing is run.

*aggregate* is the paper's measure: elements × bits over its four roles. *peak* is the largest number of bytes alive at
one time, found by :mod:`assign.memory.replay`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from assign.formats.parsing import parse_format
from assign.formats.rows import Format
from assign.memory.replay import Replay
from assign.notebook import Drawn, frame, human_bytes, table_html
from assign.plan.persistent_state import (
    UpdateRounding,
    check_rounding,
    with_loaded,
)
from assign.plan.plan import Assignment, Entry
from assign.plan.recipes import Recipe, get_recipe, initial, promotable
from assign.plan.table import TensorTable


@dataclass(frozen=True, kw_only=True)
class Estimate(Drawn):
    """Predicted memory of one step under a plan.

    Attributes:
        aggregate_bytes: Σ elements × bits / 8 over the paper's four roles.
        low_ratio: share of those elements that are low.
        low_ratio_bits: the same by bits, 2·(1 − bits / bits with all high); negative for a plan wider than that.
        groups_low: number of groups in which every tensor is low.
        peak_bytes: bytes alive at the peak of one whole step.
        baseline_peak_bytes: the same for the model as loaded, without a plan.
        saved_bytes: activations saved for the backward pass, at the end of the forward pass.
        peak_at: operator at the peak, ``optimizer`` if the peak is in its step.
        by_role: bytes alive at the peak, by role.
        timeline: (operator, pass, bytes alive) in order of execution.
        alive: (key, role, bytes) at the peak, largest first.
    """

    aggregate_bytes: int
    low_ratio: float
    low_ratio_bits: float
    groups_low: int
    peak_bytes: int
    baseline_peak_bytes: int
    saved_bytes: int
    peak_at: str
    by_role: Mapping[str, int]
    timeline: tuple[tuple[str, str, int], ...]
    alive: tuple[tuple[str, str, int], ...]

    def to_pandas(self) -> Any:
        """Return a data frame of the timeline: operator, pass, bytes alive. Needs pandas."""
        names = ["operator", "pass", "bytes"]
        return frame((dict(zip(names, row, strict=True)) for row in self.timeline), names)

    def _repr_html_(self) -> str:
        """Return the bytes alive at the peak by role as an HTML table, for a notebook."""
        most = max(self.by_role.values(), default=1)
        found = sorted(self.by_role.items(), key=lambda item: -item[1])
        rows = [((role.replace("_", " "), human_bytes(size)), size / most) for role, size in found]
        share = self.peak_bytes / max(self.baseline_peak_bytes, 1)
        title = f"peak {human_bytes(self.peak_bytes)}, {share:.1%} of the peak without a plan, in {self.peak_at}"
        return table_html(title, ["alive at the peak", "bytes"], rows)

    def to_json(self) -> dict[str, Any]:
        """Return plain data, the timeline included."""
        return {
            "low_ratio": self.low_ratio,
            "low_ratio_bits": self.low_ratio_bits,
            "groups_low": self.groups_low,
            "aggregate_bytes": self.aggregate_bytes,
            "peak_bytes": self.peak_bytes,
            "baseline_peak_bytes": self.baseline_peak_bytes,
            "saved_bytes": self.saved_bytes,
            "peak_at": self.peak_at,
            "by_role": dict(self.by_role),
            "timeline": [{"op": op, "pass": phase, "bytes": size} for op, phase, size in self.timeline],
        }


def estimate(table: TensorTable, plan: Assignment, *, promotion: bool = False) -> Estimate:
    """Predict the memory and the low ratio of one step under ``plan``. Nothing is computed.

    Args:
        table: result of :func:`assign.trace` for the plan's model, at any batch size. If it was traced with
            ``micro_batches``, the gradients of earlier parts are alive: summed by the plan, if it has the same number,
            or by a training loop, if the plan has none.
        plan: with an entry for every tensor of the table.
        promotion: whether training uses :class:`assign.Promotion`. A tensor that may be promoted then has a dtype that
            can also represent its high format.
    Returns:
        The peak in bytes and where it is reached, bytes by role and over the step, and the low ratio.
    Raises:
        PlanError: the plan does not fit the table, or its ``update_rounding`` does not suit its masters.
        FormatError: the plan's recipe does not exist.
    Examples:
        ```python
        costs = assign.estimate(table, plan)
        print(costs.peak_bytes / costs.baseline_peak_bytes, costs.peak_at)
        ```
    """
    plan.check_fits(table, where="estimate")
    check_rounding(plan.update_rounding, with_loaded(plan.entries, table.loaded), where="estimate")
    later = promotable(table, plan) if promotion else {}
    replay = Replay.of_plan(table, plan, later)
    return Estimate(
        aggregate_bytes=aggregate_bytes(table, plan.entries),
        low_ratio=low_ratio(table, plan.entries),
        low_ratio_bits=low_ratio_bits(table, plan.entries, get_recipe(plan.recipe)),
        groups_low=sum(all(plan.entries[key].low for key in group.keys) for group in table.groups),
        peak_bytes=replay.peak_bytes,
        baseline_peak_bytes=Replay(table, {}).peak_bytes,
        saved_bytes=replay.saved_bytes,
        peak_at=replay.peak_at,
        by_role=replay.by_role,
        timeline=replay.timeline,
        alive=replay.alive,
    )


def peak_bytes(
    table: TensorTable,
    entries: Mapping[str, Entry],
    update_rounding: str = UpdateRounding.NEAREST,
    promotable: Mapping[str, Format] = MappingProxyType({}),
    *,
    sums_inside: bool = False,
) -> int:
    """Return the peak bytes of one step; tensors without an entry stay as they were loaded.

    Options are as for :class:`assign.memory.replay.Replay`.
    """
    return Replay(table, entries, update_rounding, promotable, sums_inside=sums_inside).peak_bytes


def peak_of(table: TensorTable, plan: Assignment | None) -> int:
    """Return the peak bytes of one step under a plan; None means without one."""
    return peak_bytes(table, {}) if plan is None else Replay.of_plan(table, plan).peak_bytes


def aggregate_bytes(table: TensorTable, entries: Mapping[str, Entry]) -> int:
    """Return the paper's measure of memory: Σ elements × bits / 8 (A2; no liveness, no optimizer, no masters)."""
    return -(-_bits(table, entries) // 8)


def low_ratio(table: TensorTable, entries: Mapping[str, Entry]) -> float:
    """Return the share of the paper's elements that are low (A2)."""
    low = sum(info.elements for info in table.paper_tensors if entries[info.key].low)
    return low / table.elements if table.elements else 0.0


def low_ratio_bits(table: TensorTable, entries: Mapping[str, Entry], recipe: Recipe) -> float:
    """Return the low ratio as the paper's code reports it: 2·(1 − bits / bits with all high).

    If low formats have half the bits of high ones, it is the share of elements in a low format. With everything low it
    is below 1 under both recipes, because the gradient of a weight is as wide low as high.
    """
    high = _bits(table, initial(table, recipe))
    return 2 * (1 - _bits(table, entries) / high) if high else 0.0


def _bits(table: TensorTable, entries: Mapping[str, Entry]) -> int:
    return sum(info.elements * parse_format(entries[info.key].format).bits for info in table.paper_tensors)
