"""Search a plan for a model: trace, run a strategy, and record where the plan came from."""

import datetime
import platform
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from assign.errors import BudgetError, PlanError
from assign.executor.timing import measure_times
from assign.noise.measuring import measure_noise
from assign.plan.assignment import Assignment, Entry, Provenance
from assign.plan.keys import is_saved_key, master_key
from assign.plan.memory import Estimate, estimate, peak_bytes
from assign.plan.noise import NoiseTable
from assign.plan.recipes import Recipe, candidates_of, get_recipe, save, store
from assign.plan.stored import UpdateRounding, check_rounding, with_loaded
from assign.plan.tensors import TensorTable
from assign.plan.timeline import RunningPeak, Timeline
from assign.plan.times import TimeTable, parse_step_time
from assign.strategies import BASELINES, MILP, Strategy, get_strategy
from assign.strategies.baselines import uniform_in
from assign.strategies.goal import parse_budget, split_names
from assign.strategies.milp import Granularity, Milp, Solution
from assign.tracing.capture import Loss
from assign.tracing.finiteness import non_finite as find_non_finite
from assign.tracing.optimizer_states import OptimizerFactory
from assign.tracing.tracer import trace


def search(
    model: nn.Module,
    batch: Any,
    loss: Loss,
    *,
    budget: str | int | None = None,
    low_ratio: float | None = None,
    strategy: str = "greedy",
    recipe: str = "native",
    optimizer: OptimizerFactory | None = None,
    master: str | None = None,
    gradients: str | None = None,
    optimizer_states: str | None = None,
    saved: str | None = None,
    update_rounding: str = UpdateRounding.NEAREST,
    noise: NoiseTable | None = None,
    formats: Sequence[str] = (),
    granularity: Granularity | str = Granularity.GROUP,
    pins: Mapping[str, str] = MappingProxyType({}),
    max_step_time: str | float | None = None,
    seed: int = 0,
) -> Assignment:
    """Search a plan for one training step of ``loss(model, batch)``.

    Tensors that are stored between steps get the requested formats first. The search then narrows only as much as the
    budget still requires.

    Args:
        model: in any floating-point dtypes. It is not changed, and nothing is computed except one forward pass if
            ``saved`` is given. No recipe widens weights that were loaded in 16 bits.
        batch: argument of ``loss``.
        loss: ``loss(model, batch)`` → scalar tensor.
        budget: peak memory of a step: ``"6GiB"``, a number of bytes, or ``"50%"`` of the peak without a plan.
        low_ratio: share of elements in low formats, 0 to 1. Give either ``budget`` or ``low_ratio``.
        strategy: ``greedy`` or another name in ``assign.STRATEGIES``; ``milp``, which minimizes noise; or, without a
            goal, ``as-loaded``, ``operator``, ``operator-prime`` or ``standalone``.
        recipe: name in ``assign.RECIPES``: the formats that a tensor may have, by its role.
        optimizer: ``optimizer(parameters)`` → torch optimizer, whose states are counted. Default: none are counted.
        master: format of the parameters, ``bf16``, ``fp16``, or ``bf16+8``, which keeps 24 bits, 8 of them in the
            optimizer. Default: as they were loaded, or as the strategy requires.
        gradients: format of stored gradients, e.g. ``e5m2:pow2``. Default: the format of their masters.
        optimizer_states: e.g. ``bf16`` or ``dynamic8``. Default: the format of their masters.
        saved: format of saved activations, e.g. ``int4:block64``, where it takes fewer bytes than the activation's own
            and the activation is finite on this batch. Default: the activation's own format. With ``milp`` and a
            budget, one or more formats, separated by commas, from which it chooses.
        update_rounding: how updates of 16-bit masters are rounded, as in :func:`assign.optimizer`; the plan stores it.
        noise: with ``milp``: the result of :func:`assign.measure_noise`. Default: it is measured on this batch.
        formats: with ``milp``: candidates of every tensor in place of the recipe's two, the widest first.
            ``e4m3:pow2/e5m2:pow2`` means the first for values and the second for gradients.
        granularity: with ``milp``: whether a ``group`` of tensors shares one decision, or each ``tensor`` has its own.
        pins: with ``milp``: pattern of keys → their format, e.g. ``{"head.*": "bf16"}``. The last match counts.
        max_step_time: with ``milp``: limit on a forward and backward pass, as :func:`assign.measure_times` predicts it:
            seconds, ``"200ms"``, or ``"1.3x"`` of the time with all tensors in their high formats.
        seed: of strategies that draw random numbers.
    Returns:
        A plan for this model; it may be used at any batch size.
    Raises:
        BudgetError: there is no goal, the goal makes no sense, or the budget cannot be met (names the smallest one
            that can).
        FormatError: a format does not exist or cannot be stored.
        PlanError: no library's optimizer can keep these formats.
        TraceError: the step cannot be captured, or the loss is not a scalar.
    Examples:
        ```python
        plan = assign.search(model, batch, loss, budget="90%", optimizer=adamw)
        plan.save("plan.json")
        ```
    """
    table = trace(model, batch, loss, optimizer)
    if strategy == MILP and noise is None:
        waiting = split_names(saved or "")
        noise = measure_noise(model, [batch], loss, recipe=recipe, formats=formats, pins=pins, saved=waiting, seed=seed)
    finite = find_non_finite(model, batch, loss) if saved is not None else frozenset[str]()
    times = None
    if max_step_time is not None:
        copies: dict[str, Any] = {"saved": split_names(saved or ""), "non_finite": finite}
        times = measure_times(model, batch, loss, recipe=recipe, formats=formats, pins=pins, table=table, **copies)
    return search_table(
        table,
        budget=budget,
        low_ratio=low_ratio,
        strategy=strategy,
        recipe=recipe,
        master=master,
        gradients=gradients,
        optimizer_states=optimizer_states,
        saved=saved,
        non_finite=finite,
        update_rounding=update_rounding,
        noise=noise,
        formats=formats,
        granularity=granularity,
        pins=pins,
        times=times,
        max_step_time=max_step_time,
        seed=seed,
        command="assign.search",
    )


def search_table(
    table: TensorTable,
    *,
    budget: str | int | None = None,
    low_ratio: float | None = None,
    strategy: str = "greedy",
    recipe: str = "native",
    format_name: str | None = None,
    master: str | None = None,
    gradients: str | None = None,
    optimizer_states: str | None = None,
    saved: str | None = None,
    non_finite: Collection[str] = frozenset(),
    update_rounding: str = UpdateRounding.NEAREST,
    noise: NoiseTable | None = None,
    formats: Sequence[str] = (),
    granularity: Granularity | str = Granularity.GROUP,
    pins: Mapping[str, str] = MappingProxyType({}),
    times: TimeTable | None = None,
    max_step_time: str | float | None = None,
    seed: int = 0,
    command: str = "",
) -> Assignment:
    """As :func:`search`, from a table.

    ``format_name`` puts every tensor in one format; it takes no goal, nor do the strategies that follow from the model
    alone (``as-loaded``, ``operator``, ``operator-prime``, ``standalone``). ``non_finite`` are the activations whose
    copies ``saved`` does not narrow. ``milp`` needs ``noise``, and ``times`` for a ``max_step_time``; with any
    strategy, the plan's predicted noise is written down where it is given.
    """
    start = time.perf_counter()
    rules = get_recipe(recipe)
    chosen_copies = split_names(saved or "") if strategy == MILP and budget is not None else []
    if len(split_names(saved or "")) > 1 and not chosen_copies:
        raise BudgetError(
            f"search: {saved!r} are several formats for saved activations, and nothing chooses among "
            "them.\n  Give one, or the strategy 'milp' and a budget."
        )
    whole = completion(
        table,
        master=master,
        gradients=gradients,
        optimizer_states=optimizer_states,
        saved=None if chosen_copies else saved,
        non_finite=non_finite,
    )

    def waiting(entries: Mapping[str, Entry]) -> list[dict[str, Entry]]:
        return [save(table, entries, name, keep=non_finite) for name in chosen_copies]

    if noise is not None:
        noise.check(table)
    if times is not None:
        times.check(table)
    if strategy != MILP and (formats or pins or granularity != Granularity.GROUP or max_step_time is not None):
        raise BudgetError(
            f"search: the strategy {strategy!r} takes no formats, pins or granularity of its own, nor a limit on time: "
            "it chooses between the recipe's two for whole groups.\n  Leave them out, or use the strategy 'milp'."
        )
    solutions: list[Solution] = []

    if format_name is not None:
        if strategy != "uniform" or budget is not None or low_ratio is not None:
            raise BudgetError(
                f"search: format {format_name!r} asks for one format everywhere, so there is nothing left to search. "
                "Leave out the budget and the low ratio, and use the strategy 'uniform'."
            )
        entries = uniform_in(table, format_name)
    elif strategy in BASELINES:
        if budget is not None or low_ratio is not None:
            raise BudgetError(
                f"search: the strategy {strategy!r} follows from the model alone and meets no budget or low ratio. "
                "Leave them out, or use the strategy 'greedy'."
            )
        entries = BASELINES[strategy](table, rules)
    else:
        chosen = (
            _milp(
                table,
                whole,
                update_rounding,
                noise,
                formats=formats,
                granularity=granularity,
                waiting=waiting,
                pins=pins,
                tell=solutions.append,
                **_time_limit(table, rules, formats, times, max_step_time),
            )
            if strategy == MILP
            else get_strategy(strategy)
        )
        entries = chosen(
            table,
            recipe=rules,
            peak_bytes=RunningPeak(table, whole, update_rounding),
            low_ratio=low_ratio,
            budget_bytes=None if budget is None else parse_budget(budget, peak_bytes(table, {})),
            seed=seed,
        )
    chosen_entries = whole(entries)
    loaded = {key: name for key, name in table.loaded.items() if name != "fp32" and master_key(key) in chosen_entries}
    whole_entries = with_loaded(chosen_entries, table.loaded)
    plan = Assignment(
        entries=chosen_entries,
        recipe=rules.name,
        fingerprint=table.fingerprint,
        loaded=loaded,
        update_rounding=check_rounding(update_rounding, whole_entries, where="search"),
    )
    if saved is not None and not chosen_copies and not any(map(is_saved_key, plan.entries)):
        raise PlanError(
            f"search: saved activations are asked for in {saved!r}, but none takes fewer bytes in it than in its own "
            "format.\n"
            "  Allowed: a format narrower than those that tensors are computed in.\n"
            "  Choose int4:block64, or leave it out."
        )
    costs = summary(estimate(table, plan), time.perf_counter() - start)
    if noise is not None:
        costs["noise"] = noise.of(plan.entries)
    for solution in solutions:
        costs |= {
            "noise": solution.noise,
            "optimality_gap": solution.gap,
            "rounds": solution.rounds,
            "by_greedy": solution.by_greedy,
        }
        if times is not None:
            of_step = {key: plan.entries[key] for key in plan.entries if key in entries}
            costs["step_seconds"] = times.of(of_step) + times.rest
    return with_provenance(plan, strategy=strategy, seed=seed, command=command, costs=costs)


def with_provenance(
    plan: Assignment, *, strategy: str, seed: int, command: str, costs: Mapping[str, Any]
) -> Assignment:
    """The plan, and where it comes from: of this moment and these versions."""
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


def completion(
    table: TensorTable,
    *,
    master: str | None = None,
    gradients: str | None = None,
    optimizer_states: str | None = None,
    saved: str | None = None,
    non_finite: Collection[str] = frozenset(),
) -> Callable[[Mapping[str, Entry]], dict[str, Entry]]:
    """Return a function that completes the entries of the step's tensors: stored and saved tensors.

    Raises:
        FormatError, PlanError: formats that cannot be stored, or states that the optimizer has not.
    """
    stored = store(table, master=master, gradients=gradients, states=optimizer_states)

    def whole(chosen: Mapping[str, Entry]) -> dict[str, Entry]:
        waiting = {} if saved is None else save(table, chosen, saved, keep=non_finite)
        return {**chosen, **stored, **waiting}

    return whole


def _milp(
    table: TensorTable,
    whole: Callable[[Mapping[str, Entry]], dict[str, Entry]],
    update_rounding: str,
    noise: NoiseTable | None,
    *,
    granularity: Granularity | str,
    **asked: Any,
) -> Strategy:
    if noise is None:
        raise PlanError(
            "search: the strategy 'milp' minimises noise, and no noise was given.\n"
            "  Allowed: what assign.measure_noise or 'assign noise' found for this model. Give it: noise=, or --noise."
        )
    known = [*Granularity]
    if granularity not in known:
        raise PlanError(f"search: there is no granularity {granularity!r}; choose from {', '.join(known)}.")
    return Milp(
        noise=lambda entries: noise.of(whole(entries)),
        timeline=Timeline(table, whole, update_rounding),
        granularity=Granularity(granularity),
        **asked,
    )


def _time_limit(
    table: TensorTable, rules: Recipe, formats: Sequence[str], times: TimeTable | None, most: str | float | None
) -> dict[str, Any]:
    """What the integer program is told of seconds: those that choices take, and what they may take together."""
    if most is None:
        return {}
    if times is None:
        raise PlanError(
            "search: a limit on the time of a step is given, and no times.\n"
            "  Allowed: what assign.measure_times found for this model. Give it: times=."
        )
    high = {key: Entry(each[0].name, low=False) for key, each in candidates_of(table, rules, formats).items()}
    limit = parse_step_time(most, times.of(high) + times.rest)
    return {"seconds": times.of, "other_seconds": times.rest, "most_seconds": limit}


def summary(costs: Estimate, seconds: float) -> dict[str, Any]:
    """The figures of an estimate that the shell's JSON promises."""
    return {
        "low_ratio": costs.low_ratio,
        "low_ratio_bits": costs.low_ratio_bits,
        "groups_low": costs.groups_low,
        "aggregate_bytes": costs.aggregate_bytes,
        "peak_bytes": costs.peak_bytes,
        "baseline_peak_bytes": costs.baseline_peak_bytes,
        "seconds": seconds,
    }
