"""Plans beside this one: what each needs, what each costs, and which of them no other beats in both."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from assign.errors import ReportError
from assign.plan.assignment import Assignment

MEASURED = "measured_"
"""Prefix of a metric that training measured, in a plan's estimate."""

_LESS_IS_BETTER = ("noise", "loss", "error", "perplexity")


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A plan on a front; ``costs``: what its file says of it, by name."""

    name: str
    peak_bytes: int
    costs: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Front:
    """Plans of one model, the smallest peak first.

    Attributes:
        measure: what the plans are judged by; None where their files say nothing that all have.
    """

    points: tuple[Point, ...]
    measure: str | None

    @property
    def best(self) -> tuple[Point, ...]:
        """Points that no other beats in both peak and measure."""
        if self.measure is None:
            return ()
        sign = 1 if any(word in self.measure for word in _LESS_IS_BETTER) else -1
        found: list[Point] = []
        for point in sorted(self.points, key=lambda each: (each.peak_bytes, sign * each.costs[self.measure or ""])):
            if not found or sign * point.costs[self.measure] < sign * found[-1].costs[self.measure]:
                found.append(point)
        return tuple(found)


def load_front(folder: Path, fingerprint: str) -> Front:
    """The plans in a folder, files ``*.json`` that are no plans left aside.

    Raises:
        ReportError: there is no such folder, no plan in it, or one of another model.
    """
    if not folder.is_dir():
        raise ReportError(f"there is no directory {folder}.\n  Give the one that a search wrote its front into.")
    points = []
    for path in sorted(folder.glob("*.json")):
        if '"assign_plan"' not in path.read_text(encoding="utf-8", errors="replace"):
            continue
        plan = Assignment.load(path)
        if plan.fingerprint != fingerprint:
            raise ReportError(
                f"{path} is a plan of another model: its fingerprint is {plan.fingerprint}, this plan's {fingerprint}."
                "\n  Give a directory with plans of one model."
            )
        points.append(point_of(plan, path.stem))
    known = [point for point in points if point is not None]
    if not known:
        raise ReportError(
            f"{folder} has no plan whose file says its peak.\n"
            "  Give the directory that 'assign search --strategy optuna -o DIRECTORY' wrote, or one with several plans."
        )
    return front_of(known)


def point_of(plan: Assignment, name: str) -> Point | None:
    """What a plan's file says of it; None where it does not say its peak."""
    facts = plan.provenance.estimate
    costs = {key: float(value) for key, value in facts.items() if isinstance(value, (int, float))}
    peak = costs.get("peak_bytes")
    return None if peak is None else Point(name=name, peak_bytes=int(peak), costs=costs)


def front_of(points: Sequence[Point]) -> Front:
    """These points, by what all of them are judged by: a metric that was measured, else noise."""
    shared = set.intersection(*(set(point.costs) for point in points))
    names = [*sorted(name for name in shared if name.startswith(MEASURED)), *({"noise"} & shared)]
    return Front(points=tuple(sorted(points, key=lambda point: point.peak_bytes)), measure=names[0] if names else None)
