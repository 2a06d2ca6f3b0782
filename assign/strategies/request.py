"""Inputs and results of a strategy."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from assign.plan.measured import Measured
from assign.plan.plan import Entry
from assign.plan.space import SearchSpace
from assign.plan.table import TensorTable
from assign.strategies.goal import Goal, PeakBytes, Timeline

Complete = Callable[[Mapping[str, Entry]], dict[str, Entry]]
"""Entries of the step's tensors → the same, with the entries of stored and saved tensors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """Solution of an integer program.

    Attributes:
        noise: predicted noise of the returned plan.
        gap: share of the noise by which the best plan could be better, in the linear model of bytes.
        rounds: number of solutions until the exact bytes were within the budget.
        by_greedy: whether the paper's greedy plan was no worse, and was returned.
        decisions: number of decisions in the program.
        moments: number of moments that needed a constraint.
    """

    noise: float
    gap: float
    rounds: int
    by_greedy: bool
    decisions: int
    moments: int


@dataclass(frozen=True, kw_only=True)
class Question:
    """A request for one model: the input of a strategy.

    Attributes:
        table: tensors of one step.
        goal: with its budget in bytes.
        space: what may be chosen.
        measured: measurements of the model.
        seed: of strategies that draw random numbers.
        complete: function that completes entries, for the memory model.
        peak_bytes: memory model: entries → peak of a step, in bytes.
        timeline: function that makes the memory model of every moment, which is slow to make.
        solutions: list to which a strategy appends its solution, if it has figures of its own.
    """

    table: TensorTable
    goal: Goal
    space: SearchSpace
    measured: Measured
    seed: int
    complete: Complete
    peak_bytes: PeakBytes
    timeline: Callable[[], Timeline]
    solutions: list[Solution] = field(default_factory=list)
