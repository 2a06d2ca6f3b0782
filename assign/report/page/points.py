"""Compare a plan with others: memory, quality, and their Pareto front."""

from collections.abc import Sequence
from dataclasses import dataclass

from assign.plan.plan import Assignment
from assign.plan.quality import is_maximized, pareto_front

TRAINED = "trained_"
"""Prefix of a metric that a search by training measured, in a plan's estimate."""

LOW_RATIO = "low_ratio"


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A plan, with the costs in its file by name."""

    name: str
    peak_bytes: int
    costs: dict[str, float]


def point_of(plan: Assignment, name: str) -> Point | None:
    """Return the point of a plan; None if its file does not give its peak."""
    facts = plan.provenance.estimate
    costs = {key: float(value) for key, value in facts.items() if isinstance(value, (int, float))}
    peak = costs.get("peak_bytes")
    return None if peak is None else Point(name=name, peak_bytes=int(peak), costs=costs)


def points_of(plans: Sequence[Assignment]) -> list[Point]:
    """Return a point for each plan whose file gives its peak, named by number."""
    found = [point_of(plan, f"plan {number} of {len(plans)}") for number, plan in enumerate(plans, 1)]
    return [point for point in found if point is not None]


def measure_of(points: Sequence[Point]) -> str:
    """Return a measure that all these plans have: a metric of training, else noise, else the low ratio."""
    shared = set.intersection(*(set(point.costs) for point in points)) if points else set()
    trained = sorted(name for name in shared if name.startswith(TRAINED))
    return next(iter([*trained, *({"noise"} & shared)]), LOW_RATIO)


def best_of(points: Sequence[Point], measure: str) -> list[Point]:
    """Return the Pareto front of the points, the lowest peak first."""
    sign = -1 if is_maximized(measure) else 1
    return pareto_front(points, lambda each: each.peak_bytes, lambda each: sign * each.costs.get(measure, 0.0))
