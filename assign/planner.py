"""Search a plan for a model: trace, measure what the strategy needs, run it, and record the provenance of the plan."""

import datetime
import os
import platform
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from assign.errors import AssignError, PlanError
from assign.executor.latency import measure_times
from assign.executor.micro_batches import find_reduction
from assign.memory.deltas import RunningPeak, Timeline
from assign.memory.estimate import Estimate, estimate, peak_bytes
from assign.noise.measure import measure_noise
from assign.noise.options import NoiseOptions
from assign.options import accept_former
from assign.plan.keys import is_saved_key, master_key
from assign.plan.measured import Measured
from assign.plan.noise_table import NoiseTable
from assign.plan.persistent_state import check_rounding, with_loaded
from assign.plan.plan import Assignment, Entry, Provenance
from assign.plan.recipes import save, store
from assign.plan.space import SearchSpace
from assign.plan.table import TensorTable
from assign.strategies import check_request, get_method
from assign.strategies.goal import Goal
from assign.strategies.request import Complete, Question, Solution
from assign.tracing.capture import Loss
from assign.tracing.nonfinite import non_finite as find_non_finite
from assign.tracing.optimizer_states import OptimizerFactory
from assign.tracing.step import NOT_GIVEN, Step
from assign.tracing.tracer import as_step


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request for a search; it is checked when it is created.

    Attributes:
        goal: limits that the plan must meet.
        strategy: name in ``assign.strategies.METHODS``.
        space: what may be chosen.
        seed: of strategies that draw random numbers.
        command: the user's command, for the plan's provenance.
    Raises:
        AssignError: there is no such strategy, or it trains.
        BudgetError: the strategy does not take one of the limits or options.
    """

    goal: Goal = field(default_factory=Goal)
    strategy: str = "greedy"
    space: SearchSpace = field(default_factory=SearchSpace)
    seed: int = 0
    command: str = ""

    def __post_init__(self) -> None:
        check_request(self.strategy, self.goal, self.space)
        if get_method(self.strategy).trains:
            raise AssignError(
                f"the strategy {self.strategy!r} trains, so it needs a task and has its own function.\n"
                "  Allowed: 'assign tune TASK', or assign.tune(make_task, storage=…)."
            )


@accept_former(space=SearchSpace, noise=NoiseOptions)
def search(
    model: nn.Module | Step,
    batch: Any = NOT_GIVEN,
    loss: Loss = NOT_GIVEN,
    *,
    budget: str | int | None = None,
    low_ratio: float | None = None,
    max_step_time: str | float | None = None,
    strategy: str = "greedy",
    optimizer: OptimizerFactory | None = None,
    space: SearchSpace | str = "native",
    noise: NoiseTable | NoiseOptions | None = None,
) -> Assignment:
    """Search a plan for one training step of ``loss(model, batch)``.

    Tensors that are stored between steps get the requested formats first. The search then narrows only as much as the
    budget still requires.

    The strategy ``milp`` needs the noise of every choice. If ``noise`` is not a table, it is measured on this batch. If
    an optimizer is known, a copy of the model is first trained on the batch for 40 steps; otherwise the weights are
    measured as they are.

    Args:
        model: in any floating-point dtypes. It is not changed. No recipe widens weights that were loaded in 16 bits. Or
            the result of :func:`assign.trace`, instead of model, batch, loss and optimizer.
        batch: argument of ``loss``.
        loss: ``loss(model, batch)`` → scalar tensor.
        budget: peak memory of a step: ``"6GiB"``, a number of bytes, or ``"50%"`` of the peak without a plan.
        low_ratio: share of elements in low formats, 0 to 1. Give ``budget``, ``low_ratio``, or both.
        max_step_time: with ``milp``: limit on a forward and backward pass, as :func:`assign.measure_times` predicts it:
            seconds, ``"200ms"``, or ``"1.3x"`` of the time with all tensors in their high formats.
        strategy: ``greedy`` or another name in ``assign.strategies.STRATEGIES``; ``milp``, which minimizes noise; or,
            without a goal, ``as-loaded``, ``operator``, ``operator-prime`` or ``standalone``.
        optimizer: ``optimizer(parameters)`` → torch optimizer, whose states are counted. Default: none are counted.
        space: what may be chosen for every tensor, or the name of a recipe. ``step`` in it has the number of
            micro-batches. Default: those of the traced step.
        noise: with ``milp``: the result of :func:`assign.measure_noise`, or how to measure it. Its seed is also that of
            ``greedy-random``.
    Returns:
        A plan for this model; it may be used at any batch size.
    Raises:
        BudgetError: there is no goal, the goal is invalid, the strategy does not take it, or the budget cannot be met
            (names the smallest one that can).
        FormatError: a format does not exist or cannot be stored.
        PlanError: no library's optimizer can store these formats.
        TraceError: the step cannot be captured, the loss is not a scalar, or a traced step is given together with a
            batch, a loss or an optimizer.
    Examples:
        ```python
        plan = assign.search(model, batch, loss, budget="90%", optimizer=adamw)
        plan.save("plan.json")
        ```
    """
    request = Request(
        goal=Goal(budget=budget, low_ratio=low_ratio, max_step_time=max_step_time),
        strategy=strategy,
        space=SearchSpace.of(space),
        seed=noise.seed if isinstance(noise, NoiseOptions | NoiseTable) else 0,
        command="assign.search",
    )
    parts = request.space.step.micro_batches
    step = as_step("search", model, batch, loss, optimizer, micro_batches=parts if parts > 1 else None)
    request = _in_parts(request, step)
    return find_plan(step, request, measure(step, request, noise=noise))


@accept_former(space=SearchSpace, measured=Measured)
def search_table(
    table: TensorTable,
    *,
    budget: str | int | None = None,
    low_ratio: float | None = None,
    max_step_time: str | float | None = None,
    strategy: str = "greedy",
    space: SearchSpace | str = "native",
    measured: Measured | None = None,
    seed: int = 0,
    command: str = "",
) -> Assignment:
    """Search a plan for a traced step, like :func:`search`, without measuring anything.

    Args:
        table: result of :func:`assign.trace`.
        budget: as in :func:`search`.
        low_ratio: as in :func:`search`.
        max_step_time: as in :func:`search`.
        strategy: as in :func:`search`.
        space: as in :func:`search`.
        measured: measurements of the model. ``milp`` requires noise, and times for a ``max_step_time``.
        seed: of strategies that draw random numbers.
        command: the command that the plan records in its provenance.
    Returns:
        The plan.
    Raises:
        AssignError: as for :func:`search`.
    """
    request = Request(
        goal=Goal(budget=budget, low_ratio=low_ratio, max_step_time=max_step_time),
        strategy=strategy,
        space=SearchSpace.of(space),
        seed=seed,
        command=command,
    )
    return find_plan(table, request, measured or Measured())


def measure(
    step: Step,
    request: Request,
    *,
    noise: NoiseTable | NoiseOptions | None = None,
    batches: Iterable[Any] = NOT_GIVEN,
    file: str | os.PathLike[str] | None = None,
    on_stage: Callable[[str], None] = lambda _: None,
) -> Measured:
    """Measure what the request's strategy needs of a model: noise, non-finite values and times.

    Args:
        step: result of :func:`assign.trace`.
        request: decides what is measured.
        noise: a table, or how to measure it.
        batches: of the noise measurement and its warm-up. Default: the batch of the step.
        file: file of the noise table; the measurement resumes from it.
        on_stage: called with a description of what is measured next.
    Returns:
        The measurements.
    Raises:
        AssignError: as for :func:`assign.measure_noise` and :func:`assign.measure_times`.
    """
    table = noise if isinstance(noise, NoiseTable) else None
    if table is None and get_method(request.strategy).needs_noise:
        options = noise if isinstance(noise, NoiseOptions) else NoiseOptions(seed=request.seed)
        on_stage(f"training {options.steps(trained=step.optimizer is None)} steps, then measuring noise")
        table = measure_noise(
            step,
            batches,
            space=request.space,
            options=options,
            file=file,
            on_batch=lambda so_far: on_stage(f"measuring noise: {so_far.batches} batches"),
        )
    finite: Collection[str] = frozenset()
    if request.space.saved:
        on_stage("looking for values that are not finite")
        finite = find_non_finite(step.model, step.batch, step.loss)
    times = None
    if request.goal.max_step_time is not None:
        on_stage("timing a step in every format")
        times = measure_times(step, space=request.space, non_finite=finite)
    reduction = None
    if request.space.step.micro_batches > 1 and step.whole is not NOT_GIVEN:
        on_stage("comparing the loss of a batch with those of its micro-batches")
        reduction = find_reduction(step.model, step.loss, step.whole, request.space.step)
    return Measured(noise=table, times=times, non_finite=finite, reduction=reduction)


def find_plan(table: TensorTable, request: Request, measured: Measured) -> Assignment:
    """Run the strategy of a request and return its plan, with its provenance.

    Raises:
        AssignError: as for :func:`search`.
    """
    start = time.perf_counter()
    measured.check(table)
    request = _in_parts(request, table)
    space, method = request.space, get_method(request.strategy)
    if measured.reduction is not None:
        space = replace(space, step=replace(space.step, reduction=measured.reduction))
    chooses_saved = "saved" in method.options and request.goal.budget is not None
    complete = completion(table, replace(space, saved=()) if chooses_saved else space, non_finite=measured.non_finite)
    inside = space.step.micro_batches > 1
    question = Question(
        table=table,
        goal=request.goal.resolve(peak_bytes(table, {})) if request.goal.budget is not None else request.goal,
        space=space,
        measured=measured,
        seed=request.seed,
        complete=complete,
        peak_bytes=RunningPeak(table, complete, space.update_rounding, sums_inside=inside),
        timeline=lambda: Timeline(table, complete, space.update_rounding, sums_inside=inside),
    )
    entries = method.run(question)
    plan = _plan(table, space, complete(entries))
    if space.saved and not chooses_saved and not any(map(is_saved_key, plan.entries)):
        raise PlanError(
            f"search: saved is {', '.join(space.saved)!r}, but no saved activation takes fewer bytes in this format "
            "than in its own format.\n"
            "  Allowed: a format narrower than those that tensors are computed in.\n"
            "  Choose int4:block64, or leave it out."
        )
    costs = summary(estimate(table, plan), time.perf_counter() - start)
    costs |= _measured_costs(plan, entries, measured, question.solutions)
    return with_provenance(plan, strategy=request.strategy, seed=request.seed, command=request.command, costs=costs)


def _plan(table: TensorTable, space: SearchSpace, entries: dict[str, Entry]) -> Assignment:
    """Return the plan with these entries.

    Raises:
        PlanError: the rounding of updates in the space does not suit the masters.
    """
    rounding = check_rounding(space.update_rounding, with_loaded(entries, table.loaded), where="search")
    return Assignment(
        entries=entries,
        recipe=space.recipe,
        fingerprint=table.fingerprint,
        loaded={key: name for key, name in table.loaded.items() if name != "fp32" and master_key(key) in entries},
        update_rounding=rounding,
        step=space.step,
    )


def _in_parts(request: Request, table: TensorTable) -> Request:
    """Return the request with the number of micro-batches with which the step was traced.

    Raises:
        PlanError: the request has another number.
    """
    step = request.space.step
    asked, traced = step.micro_batches, table.schedule.micro_batches
    if asked not in (1, traced):
        raise PlanError(
            f"search: the search space has {asked} micro-batches, and the step was traced with {traced}.\n"
            "  Allowed: a step traced with the same number.\n"
            f"  Trace it with assign.trace(model, batch, loss, optimizer, micro_batches={asked})."
        )
    return replace(request, space=replace(request.space, step=replace(step, micro_batches=traced)))


def _measured_costs(
    plan: Assignment, chosen: Mapping[str, Entry], measured: Measured, solutions: list[Solution]
) -> dict[str, Any]:
    """Return the costs of a plan that follow from measurements, and figures on the solution of an integer program."""
    costs: dict[str, Any] = {}
    if measured.noise is not None:
        costs["noise"] = measured.noise.of(plan.entries)
    for solution in solutions:
        costs |= {
            "noise": solution.noise,
            "optimality_gap": solution.gap,
            "rounds": solution.rounds,
            "by_greedy": solution.by_greedy,
        }
        if measured.times is not None:
            of_step = {key: plan.entries[key] for key in plan.entries if key in chosen}
            costs["step_seconds"] = measured.times.of(of_step) + measured.times.rest
    return costs


def with_provenance(
    plan: Assignment, *, strategy: str, seed: int, command: str, costs: Mapping[str, Any]
) -> Assignment:
    """Return the plan with its provenance, including the time and the versions of packages."""
    return plan.with_provenance(
        Provenance(
            command=command,
            versions={"torch": torch.__version__, "python": platform.python_version()},
            seed=seed,
            strategy=strategy,
            estimate=dict(costs),
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
    )


def completion(table: TensorTable, space: SearchSpace, *, non_finite: Collection[str] = frozenset()) -> Complete:
    """Return a function that adds the entries of stored and saved tensors to those of the step's tensors.

    Args:
        table: tensors of one step.
        space: has the formats of stored tensors and at most one format of saved activations.
        non_finite: keys of activations that are saved in their own format.
    Raises:
        FormatError, PlanError: formats that cannot be stored, or states that the optimizer does not have.
    """
    stored = store(table, **space.stored)

    def complete(chosen: Mapping[str, Entry]) -> dict[str, Entry]:
        saved = [save(table, chosen, name, keep=non_finite) for name in space.saved]
        return {**chosen, **stored, **(saved[0] if saved else {})}

    return complete


def summary(costs: Estimate, seconds: float) -> dict[str, Any]:
    """Return the figures of an estimate that the shell writes as JSON."""
    return {
        "low_ratio": costs.low_ratio,
        "low_ratio_bits": costs.low_ratio_bits,
        "groups_low": costs.groups_low,
        "aggregate_bytes": costs.aggregate_bytes,
        "peak_bytes": costs.peak_bytes,
        "baseline_peak_bytes": costs.baseline_peak_bytes,
        "seconds": seconds,
    }
