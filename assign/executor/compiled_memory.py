"""Predict the memory of a compiled step: Inductor writes its programs, and they run without data.

Only Inductor knows which values it fuses away, which buffers it reuses and in which order it computes. It therefore
writes the program of each pass as for training, and stops before kernels are compiled. The program then runs on tensors
that have no data, and its kernels do nothing. The bytes that it allocates and frees are counted.
"""

import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from assign import _torch
from assign.errors import TraceError
from assign.executor.apply import compile_planned, first_lasting, store
from assign.executor.backends import Backend, make_backend
from assign.executor.context import PassChange
from assign.memory.replay import Replay
from assign.plan.plan import Assignment
from assign.plan.table import TensorTable
from assign.tracing.allocations import Allocations
from assign.tracing.capture import Loss
from assign.tracing.step import NOT_GIVEN, Step, check_given, refuse_more
from assign.tracing.workspace import scratch_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """Predicted memory of one compiled step.

    Attributes:
        peak_bytes: peak memory of the step, including masters, optimizer states, buffers and the batch.
        peak_in: pass of the peak: ``forward``, ``backward`` or ``optimizer``.
        forward_bytes: peak of what the forward pass allocates.
        saved_bytes: saved activations, the loss included.
        backward_bytes: peak of the backward pass: saved activations, temporary tensors and gradients.
    """

    peak_bytes: int
    peak_in: str
    forward_bytes: int
    saved_bytes: int
    backward_bytes: int


def rehearse(
    model: nn.Module | Step,
    batch: Any = NOT_GIVEN,
    loss: Loss = NOT_GIVEN,
    plan: Assignment = NOT_GIVEN,
    table: TensorTable = NOT_GIVEN,
) -> Rehearsal:
    """Predict the memory of one step under ``plan`` that Inductor compiles. Nothing is computed.

    It takes some seconds: Inductor runs without its compilers. Memory that kernels of libraries allocate is counted as
    in :mod:`assign.tracing.workspace`.

    Args:
        model: as for :func:`assign.trace`. If the plan stores some of it narrowly, a copy is used. Or the result of
            :func:`assign.trace`, instead of model, batch, loss and table: ``rehearse(step, plan=plan)``.
        batch: argument of ``loss``.
        loss: ``loss(model, batch)`` → scalar tensor.
        plan: for this model.
        table: of the same model, batch and loss, traced with the optimizer, whose step is included in the peak.
    Returns:
        Bytes of the compiled step and the pass of its peak.
    Raises:
        PlanError: the plan is for another model.
        TraceError: as for :func:`assign.trace`; or an argument is missing, or is given with a traced step.
    """
    if isinstance(model, Step):
        refuse_more("rehearse", batch=batch, loss=loss, table=table)
        check_given("rehearse", plan=plan)
        return _rehearse(model.model, model.batch, model.loss, plan, model)
    check_given("rehearse", batch=batch, loss=loss, plan=plan, table=table)
    return _rehearse(model, batch, loss, plan, table)


def _rehearse(model: nn.Module, batch: Any, loss: Loss, plan: Assignment, table: TensorTable) -> Rehearsal:
    plan.check_fits(table, where="rehearse")
    if first_lasting(plan) is not None:
        model = copy.deepcopy(model)
        store(model, plan)
    programs = _Programs()
    step = compile_planned(model, loss, plan, make_backend(plan, Backend.INDUCTOR, programs.receive), whole=True)
    with contextlib.suppress(_Received):
        step(model, batch)
    forward, saved, backward = programs.run()
    replay = Replay.of_plan(table, plan)
    peaks = {
        "forward": replay.lasting_bytes + forward,
        "backward": replay.lasting_bytes + backward,
        "optimizer": replay.optimizer_peak_bytes,
    }
    peak_in = max(peaks, key=peaks.__getitem__)
    return Rehearsal(
        peak_bytes=peaks[peak_in],
        peak_in=peak_in,
        forward_bytes=forward,
        saved_bytes=saved,
        backward_bytes=backward,
    )


def log_passes(
    model: nn.Module, batch: Any, loss: Loss, plan: Assignment, *, backend: Backend = Backend.EAGER
) -> tuple[PassChange, ...]:
    """Return what each graph pass changes in one step under ``plan``, in order. Nothing is computed.

    Args:
        model: as for :func:`assign.trace`. If the plan stores some of it narrowly, a copy is used.
        batch: argument of ``loss``.
        loss: ``loss(model, batch)`` → scalar tensor.
        plan: for this model.
        backend: the backend for which the graphs are made.
    Returns:
        One entry for each pass and graph.
    Raises:
        PlanError: the plan is for another model.
        TraceError: as for :func:`assign.trace`.
    """
    if first_lasting(plan) is not None:
        model = copy.deepcopy(model)
        store(model, plan)
    changes: list[PassChange] = []
    compiler = _Programs().receive if backend is Backend.INDUCTOR else lambda *_: _torch.boxed(_stop)
    graph_backend = make_backend(plan, backend, compiler, changes.append)
    step = compile_planned(model, loss, plan, graph_backend, whole=True, log=changes.append)
    with contextlib.suppress(_Received):
        step(model, batch)
    return tuple(changes)


class _Received(Exception):
    """Both graphs are compiled; the step itself must not run."""


def _stop(*_args: Any) -> Any:
    raise _Received


@dataclass(frozen=True, slots=True)
class _Program:
    """A program that runs instead of one graph; both graphs use the same names for values."""

    arguments: tuple[str, ...]
    examples: Sequence[Any]
    results: tuple[str, ...]
    run: Callable[[list[Any]], Sequence[Any]]


class _Programs:
    """The programs of one step's two graphs."""

    def __init__(self) -> None:
        self._forward: _Program | None = None
        self._backward: _Program | None = None

    def receive(self, graph: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        """Write and load the program of one graph, instead of Inductor's compiler."""
        arguments = tuple(node.name for node in graph.graph.find_nodes(op="placeholder"))
        outputs: Any = _torch.output_of(graph).args[0]
        results = tuple(node.name if isinstance(node, fx.Node) else "" for node in outputs)
        run = _torch.load_program(_torch.program_of(graph, inputs, **options))
        program = _Program(arguments, inputs, results, run)
        if options.get("is_backward", False):
            self._backward = program
        else:
            self._forward = program
            with _torch.without_data(inputs):
                _torch.report_strides(run(list(map(_like, inputs))))

        return _torch.boxed(_stop)

    def run(self) -> tuple[int, int, int]:
        """Return the peak bytes of the forward pass, the bytes that it saves, and the peak bytes of the backward."""
        if self._forward is None or self._backward is None:
            raise TraceError("rehearse: the loss does not use the model, or no parameter of it requires a gradient.")
        with _torch.without_data(self._forward.examples):
            known = dict(zip(self._forward.arguments, map(_like, self._forward.examples), strict=True))
            with Allocations(scratch_of) as allocations:
                results = self._forward.run(list(known.values()))
                forward, saved = allocations.peak, allocations.now
                known.update(zip(self._forward.results, results, strict=True))
                pairs = zip(self._backward.arguments, self._backward.examples, strict=True)
                arguments = [known[name] if name in known else _like(example) for name, example in pairs]
                del known, results
                allocations.peak = 0
                self._backward.run(arguments)
        return forward, saved, allocations.peak


def _like(example: Any) -> Any:
    if not isinstance(example, Tensor):
        return example
    return torch.empty_strided(example.shape, example.stride(), dtype=example.dtype, device=example.device)
