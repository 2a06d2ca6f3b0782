"""Measure the seconds of every node of a step in each candidate format of its tensors.

All tensors take the first of their formats, then all take the second, and so on; the packed graphs run node by node, as
in the eager backend. The seconds of a node are added to the tensor in its label: forward nodes to the tensor, backward
nodes to its gradient, and nodes that pack and unpack a saved activation to the tensor itself. An operator that computes
in another dtype because of its neighbours' formats is therefore counted as if the neighbours had changed along with it.
"""

import copy
import fnmatch
import operator
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from assign import _torch
from assign.errors import PlanError
from assign.executor.apply import compile_planned, store
from assign.executor.backends import Backend, make_backend
from assign.formats.parsing import parse_format
from assign.formats.rows import Format
from assign.options import accept_former
from assign.plan.keys import base_key, grad_key
from assign.plan.latency_table import TimeTable
from assign.plan.noise_table import Cell
from assign.plan.plan import Assignment, Entry
from assign.plan.recipes import candidates_of, save
from assign.plan.space import SearchSpace
from assign.plan.table import MARK
from assign.tracing.capture import Loss
from assign.tracing.step import NOT_GIVEN, Step
from assign.tracing.tracer import as_step

REPEATS = 5
"""Timed steps for each format; the median over them is used for every node."""

_ROUNDING = (torch.ops.assign.quantize.default, torch.ops.assign.scale_quantize.default)
_UNPACKING = (torch.ops.assign.decode.default, torch.ops.assign.decode_blocks.default)


@accept_former("table", space=SearchSpace)
def measure_times(
    model: nn.Module | Step,
    batch: Any = NOT_GIVEN,
    loss: Loss = NOT_GIVEN,
    *,
    space: SearchSpace | str = "native",
    non_finite: Collection[str] = frozenset(),
    repeats: int = REPEATS,
    clock: Callable[[], float] = time.perf_counter,
) -> TimeTable:
    """Measure the seconds of a forward and backward pass, by tensor and format.

    Args:
        model: a copy of it runs, it is not changed; or the result of :func:`assign.trace`, instead of model, batch and
            loss.
        batch: argument of ``loss``.
        loss: ``loss(model, batch)`` → scalar tensor.
        space: its formats are timed for each tensor; formats of saved activations are timed with all tensors in their
            first format. Or the name of a recipe.
        non_finite: keys of activations for which no format of saved activations is timed.
        repeats: timed steps for each format, after one that is not timed.
        clock: function that returns seconds.
    Returns:
        Seconds of each candidate, and of the rest of the step.
    Raises:
        PlanError: ``repeats`` is less than 1.
        FormatError: a format does not exist.
        TraceError: as for :func:`assign.trace`; or a batch or loss is given with a traced step.
    """
    if repeats < 1:
        raise PlanError(f"times: repeats is {repeats}; give 1 or more timed steps.")
    space, table = SearchSpace.of(space), as_step("times", model, batch, loss)
    candidates = candidates_of(table, space.rules, space.formats)
    seconds: dict[Cell, float] = {}
    rest: list[float] = []

    def run(entries: Mapping[str, Entry]) -> dict[str, float]:
        plan = Assignment(entries=entries, recipe=space.recipe, fingerprint=table.fingerprint)
        by_key = _time_step(table, plan, frozenset(candidates), repeats, clock)
        rest.append(by_key.pop("", 0.0))
        return by_key

    for chosen in _passes(candidates, space.pins):
        entries = {key: Entry(fmt.name, low=False) for key, fmt in chosen.items()}
        by_key = run(entries)
        for key, fmt in chosen.items():
            seconds.setdefault(Cell(key, fmt.name), by_key.get(key, 0.0))
    high = {key: Entry(each[0].name, low=False) for key, each in candidates.items()}
    for name in space.saved:
        copies = save(table, high, name, keep=non_finite)
        by_key = run({**high, **copies})
        for key, entry in copies.items():
            own = seconds[Cell(base_key(key), high[base_key(key)].format)]
            seconds[Cell(key, entry.format)] = max(0.0, by_key.get(base_key(key), 0.0) - own)
    return TimeTable(fingerprint=table.fingerprint, seconds=seconds, rest=min(rest))


def _passes(candidates: Mapping[str, Sequence[Format]], pins: Mapping[str, str]) -> list[dict[str, Format]]:
    """Return a format for every tensor in each pass: the first formats, the second formats, …; at the end the pins."""
    places = max(map(len, candidates.values()), default=0)
    passes = [{key: each[min(place, len(each) - 1)] for key, each in candidates.items()} for place in range(places)]
    pinned = {key: parse_format(name) for pattern, name in pins.items() for key in fnmatch.filter(candidates, pattern)}
    return [*passes, {**passes[0], **pinned}] if pinned else passes


def _time_step(
    traced: Step,
    plan: Assignment,
    keys: frozenset[str],
    repeats: int,
    clock: Callable[[], float],
) -> dict[str, float]:
    """Return seconds by key; those of nodes without a key are under ``''``."""
    model = copy.deepcopy(traced.model)
    store(model, plan)
    timers: list[_Timer] = []

    def compiler(graph: fx.GraphModule, _inputs: Sequence[Any]) -> Callable[..., Any]:
        _torch.reshape_views(graph.graph)
        timer = _Timer(graph, clock)
        timers.append(timer)
        return _torch.boxed(lambda inputs: timer.run(*inputs))

    step = compile_planned(model, traced.loss, plan, make_backend(plan, Backend.EAGER, compiler), whole=True)
    with torch.random.fork_rng():
        for number in range(repeats + 1):
            step(model, traced.batch).backward()
            if number == 0:
                for timer in timers:
                    timer.seconds.clear()
    found: dict[str, float] = defaultdict(float)
    for timer in timers:
        for node, each in timer.seconds.items():
            found[_key_of(node, keys)] += statistics.median(each)
    return found


class _Timer(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule, clock: Callable[[], float]) -> None:
        super().__init__(graph)
        self.clock = clock
        self.seconds: dict[fx.Node, list[float]] = defaultdict(list)

    def run_node(self, n: fx.Node) -> Any:
        if n.op in ("placeholder", "output"):
            return super().run_node(n)
        start = self.clock()
        result = super().run_node(n)
        if isinstance(result, torch.Tensor) and result.is_cuda:
            torch.cuda.synchronize(result.device)
        self.seconds[n].append(self.clock() - start)
        return result


def _key_of(node: fx.Node, keys: frozenset[str]) -> str:
    key = base_key(_torch.label_of(node).removeprefix(MARK))
    if _torch.is_backward(node) and grad_key(key) in keys and not _restores(node):
        return grad_key(key)
    return key if key in keys else ""


def _restores(node: fx.Node) -> bool:
    """Whether a backward node restores a forward value: by unpacking it, or by computing an input's mark again."""
    maker = _torch.source_of(node) if node.target is operator.getitem else node
    if maker.target not in _ROUNDING:
        return maker.target in _UNPACKING
    source = _torch.source_of(maker)
    return source.op == "placeholder" and not _torch.is_tangent(source)
