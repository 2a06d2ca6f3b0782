"""Find the plan with the least noise within a budget by an integer program.

There is one binary variable per decision and format. Noise adds up over tensors. So do bytes at every moment, as long
as decisions do not meet in one operator. Both are therefore linear, and HiGHS finds the best plan of the linear model
and a bound on how far it may be from the optimum. Then the exact bytes of that plan are computed. At each moment where
they are more than the model predicted and more than the budget, the difference is added to the model, and it is solved
again. The returned plan always meets the goals exactly.
"""

import fnmatch
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import csr_array, hstack

from assign.errors import BudgetError, PlanError, suggest
from assign.formats.parsing import parse_format
from assign.formats.rows import Format
from assign.plan.latency_table import parse_step_time
from assign.plan.plan import Entry
from assign.plan.recipes import Recipe, candidates_of, save
from assign.plan.space import Granularity
from assign.plan.table import TensorTable
from assign.strategies.goal import Floats, Goal, Integers, PeakBytes, Timeline, over_budget
from assign.strategies.greedy import greedy
from assign.strategies.request import Question, Solution

RELATIVE_GAP, LARGE_GAP = 1e-6, 1e-2
"""Relative gap of noise between a plan and the best of the linear model; the second is for large programs."""

_SECONDS = 60.0  # limit for one solution; the gap says how good it is
_ROUNDS = 10  # solutions, each with the bytes corrected
_LARGE = 100_000  # nonzero coefficients; in larger programs HiGHS needs minutes for the last percent
_UNITS, _PARTS = 6, 1e3  # tries to find a unit of noise; units of noise in the best plan
_MAX_COST = 1e8  # units of noise: more than in any good plan
_INFEASIBLE = 2  # HiGHS's status of an infeasible program
_TOLERANCE = 1e-6  # share of the bytes by which HiGHS may exceed a constraint
_NEAR = 64  # moments: of those closer than this, only one gets a constraint at a time

SavedCopies = Callable[[Mapping[str, Entry]], Sequence[Mapping[str, Entry]]]
"""Entries of some tensors → entries of their saved copies, one mapping per format that copies may have."""


@dataclass(frozen=True, kw_only=True)
class Milp:
    """The strategy ``milp``, made for one table.

    Args:
        noise: returns the predicted noise of some entries: the sum over them.
        timeline: bytes of a step at every moment; see :class:`assign.strategies.goal.Timeline`.
        formats: candidates of every tensor instead of the recipe's two, the high one first.
        granularity: which tensors share a decision.
        saved_copies: returns, for entries of some tensors, the entries that their saved copies may have instead of the
            tensors' own formats: one mapping per format, with all copies that take fewer bytes in it.
        pins: pattern of keys → format that these tensors have, regardless of noise. If several patterns match, the last
            one counts.
        seconds: returns the predicted seconds of some entries: the sum over them. Used only with ``max_seconds``.
        other_seconds: seconds of a step that no choice changes.
        max_seconds: limit on the seconds of a step. It is a goal of its own: with it the low ratio and the budget may
            be left out.
        on_solution: called with the solution.
    """

    noise: Callable[[Mapping[str, Entry]], float]
    timeline: Timeline
    formats: Sequence[str] = ()
    granularity: Granularity = Granularity.GROUP
    saved_copies: SavedCopies = lambda _: ()
    pins: Mapping[str, str] = field(default_factory=dict)
    seconds: Callable[[Mapping[str, Entry]], float] = lambda _: 0.0
    other_seconds: float = 0.0
    max_seconds: float | None = None
    on_solution: Callable[[Solution], None] = lambda _: None

    def __call__(
        self,
        table: TensorTable,
        *,
        recipe: Recipe,
        peak_bytes: PeakBytes,
        low_ratio: float | None = None,
        budget_bytes: int | None = None,
        seed: int = 0,
    ) -> dict[str, Entry]:
        """Return the entries with the least noise; see :class:`assign.strategies.Strategy`.

        Raises:
            BudgetError: a goal is invalid, or no plan that was found meets it.
            PlanError: a pin matches no tensor.
            FormatError: a format is unknown.
        """
        if self.max_seconds is not None and budget_bytes is None and low_ratio is None:
            low_ratio = 0.0
        goal = Goal(low_ratio=low_ratio, budget=budget_bytes).required()
        candidates = candidates_of(table, recipe, self.formats)
        pinned = _pinned(table, candidates, self.pins)
        decisions = _decide(table, candidates, pinned, self.granularity, self.saved_copies)
        program = _Program(table, goal, decisions, pinned, self)
        baseline, floor = None, None
        if not self.formats:
            try:
                baseline = self._greedy(table, recipe, peak_bytes, goal, pinned)
            except BudgetError as error:
                floor = error.floor
        baseline = baseline if baseline is not None and program.is_within(baseline) else None
        found, bound, rounds = program.run(self.noise(baseline) if baseline else math.inf)
        plans = [(self.noise(plan), number, plan) for number, plan in enumerate((found, baseline)) if plan is not None]
        if not plans:
            raise program.error(floor)
        noise, which, plan = min(plans, key=lambda each: each[:2])
        gap = max(0.0, (noise - bound) / noise) if noise > 0 else 0.0
        moments, size = program.moments, len(decisions)
        self.on_solution(
            Solution(noise=noise, gap=gap, rounds=rounds, by_greedy=which == 1, decisions=size, moments=moments)
        )
        ordered = {row.key: plan[row.key] for row in table.paper_tensors}
        return ordered | {key: entry for key, entry in plan.items() if key not in ordered}

    def _greedy(
        self, table: TensorTable, recipe: Recipe, peak_bytes: PeakBytes, goal: Goal, pinned: dict[str, Entry]
    ) -> dict[str, Entry]:
        """Return the greedy plan with the pins.

        Raises:
            BudgetError: it misses a goal.
        """
        plan = greedy(
            table,
            recipe=recipe,
            peak_bytes=lambda entries: peak_bytes({**entries, **pinned}),
            low_ratio=goal.low_ratio,
            budget_bytes=goal.budget_bytes,
        )
        return plan | pinned


def milp_of(question: Question) -> Milp:
    """Return the strategy ``milp`` for one model.

    Raises:
        PlanError: no noise was measured, or the step time is limited and no times were measured.
    """
    noise, space, complete = question.measured.noise, question.space, question.complete
    if noise is None:
        raise PlanError(
            "search: the strategy 'milp' minimizes noise, and no noise was given.\n"
            "  Allowed: the noise table of assign.measure_noise or 'assign noise' for this model.\n"
            "  Give it: measured=Measured(noise=…), or --noise."
        )

    def saved_copies(entries: Mapping[str, Entry]) -> list[dict[str, Entry]]:
        keep = question.measured.non_finite
        return [save(question.table, entries, name, keep=keep) for name in copies]

    copies = space.saved if question.goal.budget is not None else ()
    milp = Milp(
        noise=lambda entries: noise.of(complete(entries)),
        timeline=question.timeline(),
        formats=space.formats,
        granularity=Granularity(space.granularity),
        saved_copies=saved_copies,
        pins=space.pins,
        on_solution=question.solutions.append,
    )
    return milp if question.goal.max_step_time is None else _with_time_limit(milp, question)


def _with_time_limit(milp: Milp, question: Question) -> Milp:
    """Return the strategy with the predicted seconds of entries and the limit on their sum."""
    times, space = question.measured.times, question.space
    if times is None or question.goal.max_step_time is None:
        raise PlanError(
            "search: the step time is limited, but no times were given.\n"
            "  Allowed: the times of assign.measure_times for this model.\n  Give it: measured=Measured(times=…)."
        )
    found = candidates_of(question.table, space.rules, space.formats)
    high = {key: Entry(each[0].name, low=False) for key, each in found.items()}
    limit = parse_step_time(question.goal.max_step_time, times.of(high) + times.rest)
    return replace(milp, seconds=times.of, other_seconds=times.rest, max_seconds=limit)


Decision = tuple[dict[str, Entry], ...]
"""Options for tensors that share a decision: entries per option, the high ones first."""


def _decide(
    table: TensorTable,
    candidates: Mapping[str, Sequence[Format]],
    pinned: Mapping[str, Entry],
    granularity: Granularity,
    saved_copies: SavedCopies,
) -> list[Decision]:
    """Return the decisions. An option gives formats to tensors, and their own or another format to saved copies."""
    shared = [group.keys for group in table.groups] if granularity is Granularity.GROUP else [(k,) for k in candidates]
    decisions = []
    for keys in shared:
        free = [key for key in keys if key not in pinned]
        formats = [
            {key: Entry(candidates[key][place].name, place > 0) for key in free}
            for place in range(len(candidates[free[0]]) if free else 0)
        ]
        decisions.append([{**each, **copies} for each in formats for copies in ({}, *saved_copies(each))])
        held = {key: pinned[key] for key in keys if key in pinned}
        decisions.append([{}, *map(dict, saved_copies(held))] if held else [])
    return [tuple(_distinct(options)) for options in decisions if len(options) > 1 or (options and options[0])]


def _distinct(options: Iterable[dict[str, Entry]]) -> list[dict[str, Entry]]:
    kept: list[dict[str, Entry]] = []
    for option in options:
        if option not in kept:
            kept.append(option)
    return kept


def _pinned(
    table: TensorTable, candidates: Mapping[str, Sequence[Format]], pins: Mapping[str, str]
) -> dict[str, Entry]:
    pinned: dict[str, Entry] = {}
    for pattern, name in pins.items():
        fmt = parse_format(name)
        matched = [key for key in candidates if fnmatch.fnmatchcase(key, pattern)]
        if not matched:
            close = suggest(pattern, candidates)
            raise PlanError(
                f"the pin {pattern}={name} matches none of the {len(candidates)} tensors; nearest: {close or 'none'}.\n"
                "  Allowed: keys as 'assign trace' lists them, with * and ?. Correct the pattern, or leave it out."
            )
        pinned |= {key: Entry(fmt.name, fmt.bits < candidates[key][0].bits) for key in matched}
    return {row.key: pinned[row.key] for row in table.paper_tensors if row.key in pinned}


class _Program:
    """The integer program. Its variables are the options of all decisions, one after the other."""

    def __init__(
        self, table: TensorTable, goal: Goal, decisions: list[Decision], pinned: dict[str, Entry], strategy: Milp
    ) -> None:
        self.goal, self.decisions, self.pinned, self.strategy = goal, decisions, pinned, strategy
        self.options = [option for decision in decisions for option in decision]
        self.owner = np.repeat(np.arange(len(decisions)), [len(decision) for decision in decisions])
        self.noise = np.array([strategy.noise(option) for option in self.options])
        self.fixed_noise = strategy.noise(pinned) if pinned else 0.0
        self.moments = 0
        self.places: set[int] = set()  # moments that have a constraint
        elements = self.elements_of = {row.key: row.elements for row in table.paper_tensors}
        self.elements = table.elements
        self.pinned_low = sum(elements[key] for key, entry in pinned.items() if entry.low)
        self.max_seconds, self.seconds = math.inf, np.zeros(len(self.options))
        if strategy.max_seconds is not None:
            self.max_seconds = strategy.max_seconds - strategy.other_seconds - strategy.seconds(pinned)
            self.seconds = np.array([strategy.seconds(option) for option in self.options])
        self.low = np.array([sum(elements[key] for key, entry in each.items() if entry.low) for each in self.options])
        if goal.budget_bytes is not None:
            base = self.entries(np.flatnonzero(np.diff(self.owner, prepend=-1)))
            self.base = strategy.timeline.at(base).astype(np.float64)
            self.steps = csr_array(strategy.timeline.steps(base, self.options)).astype(np.float64)

    def entries(self, chosen: Iterable[int]) -> dict[str, Entry]:
        """Return the plan with these options, one per decision."""
        plan = dict(self.pinned)
        for option in chosen:
            plan |= self.options[option]
        return plan

    def run(self, noise_known: float) -> tuple[dict[str, Entry] | None, float, int]:
        """Return the best plan that meets the goals, a lower bound of noise, and the number of rounds.

        The plan is None if none was found. Its bytes are exact, not those of the linear model.

        Args:
            noise_known: noise of some plan that meets the goals; infinite if none is known.
        """
        if not self.options:
            return (dict(self.pinned) if self.is_within(self.pinned) else None), self.fixed_noise, 0
        bound, known = 0.0, noise_known - self.fixed_noise
        extra = np.zeros(len(self.base)) if self.goal.budget_bytes is not None else None
        for number in range(1, _ROUNDS + 1):
            solved, unit = self._solve(extra, known)
            if extra is None or not extra.any():
                bound = (solved.mip_dual_bound or 0.0) * unit + self.fixed_noise
            if solved.x is None:
                break
            chosen = np.flatnonzero(solved.x > 0.5)
            plan = self.entries(chosen)
            if extra is None:
                return plan, bound, number
            true = self.strategy.timeline.at(plan)
            if self.goal.within_budget(int(true.max())):
                return plan, bound, number
            assert self.goal.budget_bytes is not None
            modelled = self.base + np.cumsum(self.steps[chosen].sum(axis=0)) + extra
            extra += np.where(true > self.goal.budget_bytes, np.maximum(true - modelled, 1), 0)
        lowest = self._fewest_bytes() if extra is not None else None
        return (lowest if lowest is not None and self.is_within(lowest) else None), bound, number

    def error(self, greedy_floor: int | None = None) -> BudgetError:
        """Return the error for goals that no plan met; it names the least time, lowest peak or highest low ratio.

        Args:
            greedy_floor: the lowest peak that the greedy search found.
        """
        lowest = self._fewest_bytes() if self.goal.budget_bytes is not None else None
        fastest = sum(self.seconds[self.owner == number].min() for number in range(len(self.decisions)))
        if fastest > self.max_seconds:
            asked = self.strategy.max_seconds or 0.0
            return BudgetError(
                f"the limit on the step time is {asked:.4g} s, but even in the fastest formats a step takes "
                f"{asked + fastest - self.max_seconds:.4g} s.\n"
                "  Allow more time, pin fewer tensors, or make the batch smaller."
            )
        if lowest is not None:
            floor = int(self.strategy.timeline.at(lowest).max())
            slower = self._fewest_bytes(any_time=True) if self.strategy.max_seconds is not None else None
            if slower is not None and self.goal.within_budget(int(self.strategy.timeline.at(slower).max())):
                return self._out_of_time(floor, self.strategy.seconds(slower) + self.strategy.other_seconds)
            if greedy_floor is not None and self.strategy.max_seconds is None:
                floor = min(floor, greedy_floor)
            return over_budget(self.goal, floor, f"even with all {len(self.decisions)} decisions for the fewest bytes")
        highest = self.pinned_low + sum(self.low[self.owner == number].max() for number in range(len(self.decisions)))
        return BudgetError(
            f"the low ratio is {self.goal.low_ratio}, but with these pins, candidates and limits no more than "
            f"{highest / self.elements:.6f} of the elements can be low.\n"
            "  Ask for less, pin fewer tensors high, or allow more time."
        )

    def _out_of_time(self, floor: int, enough: float) -> BudgetError:
        """Return the error for a budget that only slower steps could meet."""
        return BudgetError(
            f"the budget is {self.goal.budget_bytes} bytes and the step time {self.strategy.max_seconds:.4g} s: each "
            f"can be met alone, but not both. Within that time a step needs {floor} bytes or more at its peak.\n"
            f"  Allow more time ({enough:.4g} s are enough for the fewest bytes), or ask for at least {floor} bytes.",
            floor=floor,
        )

    def is_within(self, plan: Mapping[str, Entry]) -> bool:
        """Whether the exact bytes, seconds and low ratio of a plan meet the goals."""
        low = sum(self.elements_of[key] for key, entry in plan.items() if entry.low)
        peak = 0 if self.goal.budget_bytes is None else int(self.strategy.timeline.at(plan).max())
        return self._is_fast(plan) and self.goal.enough_low(low, self.elements) and self.goal.within_budget(peak)

    def _is_fast(self, plan: Mapping[str, Entry]) -> bool:
        if self.strategy.max_seconds is None:
            return True
        seconds = self.strategy.seconds(plan) + self.strategy.other_seconds
        return seconds <= self.strategy.max_seconds * (1 + RELATIVE_GAP)

    # ---- the program ------------------------------------------------------------------------------------------------

    def _solve(self, extra: Floats | None, known: float) -> tuple[OptimizeResult, float]:
        """Return HiGHS's result, and the unit of noise that its costs are in."""
        too_noisy = self.noise > known * (1 + RELATIVE_GAP)  # the option alone has more noise than a known plan
        bounds, unit = Bounds(0, np.where(too_noisy, 0.0, 1.0)), float(self.noise.max()) or 1.0
        for _ in range(_UNITS):  # HiGHS treats 1e-6 as 0: use a unit below the noise of any plan
            relaxed = self._within_budget(self._cost(unit), extra, bounds, whole=0)
            if relaxed.x is None or relaxed.fun > 1 or relaxed.fun <= 0:
                break
            unit *= max(float(relaxed.fun), 1e-6) / _PARTS
        if relaxed.status == _INFEASIBLE:
            return relaxed, unit
        return self._within_budget(self._cost(unit), extra, bounds), unit

    def _within_budget(self, cost: Floats, extra: Floats | None, bounds: Bounds, whole: int = 1) -> OptimizeResult:
        """Return the solution of least cost within the budget.

        A moment gets a constraint only when a solution exceeds the budget there; then the program is solved again. Most
        moments never bind, and thousands of constraints would cost HiGHS minutes and gigabytes. If a program without
        some of the constraints is infeasible, so is the program with all of them.
        """
        if extra is None:
            return self._call(cost, self._always(), bounds, whole)
        assert self.goal.budget_bytes is not None
        budget, deadline = self.goal.budget_bytes, time.monotonic() + _SECONDS
        while True:
            places = np.array(sorted(self.places), dtype=np.int64)
            limit = (budget - self.base - extra)[places] / budget
            constraints = [
                *self._always(),
                *([LinearConstraint(self._bytes_at(places) / budget, ub=limit)] if len(places) else []),
            ]
            solved = self._call(cost, constraints, bounds, whole, deadline - time.monotonic())
            if solved.x is None or not self._add_moments(solved.x, extra, budget):
                return solved

    def _add_moments(self, x: Floats, extra: Floats | float, limit: float) -> bool:
        """Add constraints for moments at which the options ``x`` take more than ``limit`` bytes; return whether it did.

        Of neighbouring moments only the one with the most bytes gets a constraint; others follow if that is not enough.
        """
        alive = self.base + extra + np.cumsum(np.asarray(x @ self.steps))
        over = np.flatnonzero(alive > limit * (1 + _TOLERANCE))
        over = over[~np.isin(over, list(self.places))]
        runs = np.split(over, np.flatnonzero(np.diff(over) > _NEAR) + 1)
        self.places |= {int(run[alive[run].argmax()]) for run in runs if len(run)}
        self.moments = len(self.places)
        return len(over) > 0

    def _bytes_at(self, places: Integers) -> csr_array:
        """Return the bytes that each option adds at some sorted moments: ``[places, options]``."""
        steps = self.steps.tocoo()
        begins = np.searchsorted(places, steps.col, side="left")  # the first of these moments that the change affects
        shape = (self.steps.shape[0], len(places) + 1)
        sums = csr_array((steps.data, (steps.row, begins)), shape=shape).toarray()
        return csr_array(np.cumsum(sums[:, :-1], axis=1).T)

    def _cost(self, unit: float) -> Floats:
        """Return the noise of every option in this unit, at most ``_MAX_COST``, which no good plan reaches."""
        return np.minimum(self.noise / unit, _MAX_COST)

    def _fewest_bytes(self, *, any_time: bool = False) -> dict[str, Entry] | None:
        """Return the plan with the lowest peak in the linear model; the peak itself is one more variable."""
        if not self.options:
            return dict(self.pinned)
        unit = max(float(self.base.max(initial=1)), 1.0)
        cost = np.append(np.zeros(len(self.options)), 1.0)
        bounds = Bounds(0, np.append(np.ones(len(self.options)), np.inf))
        always = [
            LinearConstraint(hstack([each.A, csr_array((each.A.shape[0], 1))]), each.lb, each.ub)
            for each in (self._choose_one() + self._enough_low() if any_time else self._always())
        ]
        self.places.add(int(self.base.argmax()))
        deadline = time.monotonic() + _SECONDS
        for whole in (np.zeros(len(cost)), np.append(np.ones(len(self.options)), 0)):
            while True:  # as in _within_budget
                places = np.array(sorted(self.places), dtype=np.int64)
                rows = hstack([self._bytes_at(places) / unit, csr_array(-np.ones((len(places), 1)))])
                constraints = [*always, LinearConstraint(rows, ub=-self.base[places] / unit)]
                solved = self._call(cost, constraints, bounds, whole, deadline - time.monotonic())
                if solved.x is None or not self._add_moments(solved.x[:-1], 0.0, solved.x[-1] * unit):
                    break
        return None if solved.x is None else self.entries(np.flatnonzero(solved.x[:-1] > 0.5))

    def _call(
        self,
        cost: Floats,
        constraints: list[LinearConstraint],
        bounds: Bounds,
        whole: Floats | int = 1,
        seconds: float = _SECONDS,
    ) -> OptimizeResult:
        size = sum(each.A.nnz for each in constraints)
        options = {"mip_rel_gap": RELATIVE_GAP if size < _LARGE else LARGE_GAP, "time_limit": max(seconds, 1.0)}
        return milp(cost, integrality=whole, bounds=bounds, constraints=constraints, options=options)

    def _always(self) -> list[LinearConstraint]:
        return self._choose_one() + self._enough_low() + self._fast_enough()

    def _fast_enough(self) -> list[LinearConstraint]:
        if self.strategy.max_seconds is None:
            return []
        unit = float(self.seconds.max()) or 1.0
        return [LinearConstraint(csr_array(self.seconds[None, :] / unit), ub=self.max_seconds / unit)]

    def _choose_one(self) -> list[LinearConstraint]:
        count = len(self.options)
        rows = csr_array((np.ones(count), (self.owner, np.arange(count))), shape=(len(self.decisions), count))
        return [LinearConstraint(rows, lb=1, ub=1)]

    def _enough_low(self) -> list[LinearConstraint]:
        if self.goal.low_ratio is None or not self.elements:
            return []
        share = csr_array(self.low[None, :] / self.elements)
        return [LinearConstraint(share, lb=self.goal.low_ratio - self.pinned_low / self.elements)]
