"""Trace a model and a batch to a :class:`TensorTable`; the step is not computed.

Only kernels that allocate scratch memory on a CPU are run, each once and separately (:mod:`assign.tracing.workspace`).
The model is captured with its loss as one graph and a probe is inserted at every tensor. Torch's own autograd and
partitioner then determine the backward pass and the saved activations. The traced graph is the one that runs.
"""

import contextlib
import dataclasses
import itertools
import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from assign import _torch
from assign.errors import TraceError
from assign.plan.grouping import assign_groups
from assign.plan.keys import Key, buffer_key, grad_key, saved_key
from assign.plan.split import split
from assign.plan.step_options import StepOptions
from assign.plan.table import Buffer, Event, Need, Role, Schedule, TensorInfo
from assign.tracing.capture import Capture, Loss, check_parameters, compile_step
from assign.tracing.functionalize import functionalize
from assign.tracing.joint import COPIES, VIEWS, is_view, origin, read_marked_outputs, tensors_in
from assign.tracing.kept_state import kept_state
from assign.tracing.loaded import loaded_dtypes
from assign.tracing.needs import find_exact, find_needs
from assign.tracing.optimizer_states import OptimizerFactory, read_optimizer
from assign.tracing.probes import insert_probes
from assign.tracing.step import NOT_GIVEN, Step, check_given, refuse_more
from assign.tracing.tensor_sites import Walk, dtype_of, walk
from assign.tracing.workspace import kernel_scratch


def trace(
    model: nn.Module,
    batch: Any,
    loss: Loss,
    optimizer: OptimizerFactory | None = None,
    *,
    micro_batches: int = 1,
) -> Step:
    """List every tensor of one training step.

    The model, its buffers and gradients, and the random generators are left as they were. If Dynamo cannot capture the
    step as one graph, the code is executed (see :mod:`assign.tracing.recording`), and ``breaks`` of the table names the
    lines where a graph ends.

    Args:
        model: in any floating-point dtypes, on any device, in training or evaluation mode.
        batch: argument of ``loss``: a tensor, tuple, dict, or any nesting of them.
        loss: ``loss(model, batch)`` → scalar tensor.
        optimizer: ``optimizer(parameters)`` → torch optimizer, whose states are counted. Default: no states are
            counted. For an optimizer whose states cannot be found, such as LBFGS, none are counted and a warning is
            issued. A parameter that this loss does not use has neither states nor a gradient.
        micro_batches: number of parts of the batch that run one after another and whose gradients are summed. The
            tensors are those of the largest part.
    Returns:
        The table of all tensors, in order of execution, with the data from which :func:`assign.estimate` predicts
        memory. It also refers to the model, the batch, the loss and the optimizer: functions that take these accept it
        instead.
    Raises:
        TraceError: the step cannot be captured, the loss is not a scalar, the optimizer cannot be made, or, on a CPU,
            another profiler is running.
        PlanError: the batch cannot be split.
    Examples:
        ```python
        step = assign.trace(model, batch, loss, adamw)
        print(step.by_key["0.weight"].shape, len(step.groups), "groups")
        plan = assign.search(step, budget="90%")
        ```
    """
    check_parameters(model)
    whole, batch = batch, largest_part(batch, micro_batches)
    recorder = _Recorder()
    step = compile_step(model, loss, recorder.receive, whole=True)
    with torch.enable_grad(), kept_state(model):
        result = step(batch)
    recorder.check(result)
    breaks, outside = step.recorder.report()
    as_loaded = _as_loaded(model)
    used = as_loaded.keys() if outside else recorder.used  # an operator outside may read any parameter
    rows = list(_rows(recorder, model))
    kept = read_optimizer(model, optimizer, used)
    schedule = dataclasses.replace(
        recorder.schedule,
        parameter_bytes=_bytes(as_loaded.values()),
        buffer_bytes=_bytes(model.buffers()),
        batch_bytes=_bytes(leaf for leaf in _torch.pytree.tree_leaves(whole) if isinstance(leaf, Tensor)),
        gradient_bytes=_bytes(twin for name, twin in as_loaded.items() if twin.requires_grad and name in used),
        optimizer=kept.name,
        optimizer_bytes=kept.bytes,
        optimizer_scratch_bytes=kept.scratch,
        micro_batches=micro_batches,
    )
    tensors = assign_groups([*rows, *kept.rows])
    return Step(
        tensors=tensors,
        schedule=schedule,
        breaks=breaks,
        outside=outside,
        model=model,
        batch=batch,
        whole=whole,
        loss=loss,
        optimizer=optimizer,
    )


def largest_part(batch: Any, micro_batches: int) -> Any:
    """Return the micro-batch with the most rows; the batch itself if it is not split.

    Raises:
        PlanError: the batch cannot be split, or the number of parts is below 1.
    """
    options = StepOptions(micro_batches=micro_batches)
    return batch if micro_batches == 1 else split(batch, options)[-1].batch


def as_step(
    where: str,
    model: nn.Module | Step,
    batch: Any,
    loss: Any,
    optimizer: OptimizerFactory | None = None,
    *,
    micro_batches: int | None = None,
) -> Step:
    """Return the Step that was given, or trace the model.

    A Step that was traced with another number of micro-batches is traced again.

    Args:
        where: name of the function that was called, for errors.
        model: a Step, or a model to trace.
        batch: as for :func:`trace`; not with a Step.
        loss: as for :func:`trace`; not with a Step.
        optimizer: as for :func:`trace`; not with a Step.
        micro_batches: as for :func:`trace`. Default: those of the Step, or 1.
    Raises:
        TraceError: a Step and one of the others are given, an argument is missing, or as for :func:`trace`.
    """
    if isinstance(model, Step):
        refuse_more(where, batch=batch, loss=loss, optimizer=NOT_GIVEN if optimizer is None else optimizer)
        if micro_batches in (None, model.schedule.micro_batches) or model.whole is NOT_GIVEN:
            return model
        return trace(model.model, model.whole, model.loss, model.optimizer, micro_batches=micro_batches or 1)
    check_given(where, batch=batch, loss=loss)
    return trace(model, batch, loss, optimizer, micro_batches=micro_batches or 1)


class _Recorder:
    """A backend that records the captured graph and runs nothing."""

    def __init__(self) -> None:
        self.walked: Walk | None = None
        self.has_gradient = False  # whether any result of the graphs requires a gradient
        self.schedule = Schedule()
        self.saved: dict[str, str] = {}
        self.needs: Mapping[str, Need] = {}
        self.exact: Collection[str] = ()
        self.buffers: dict[str, Tensor] = {}
        self.used: Collection[str] = ()
        """Names of the parameters that the step reads; others have no gradient and no optimizer states."""

    def receive(self, capture: Capture) -> Callable[..., Any]:
        outputs: Any = _torch.output_of(capture.graph).args[0]
        examples = [_torch.make_dense_output(_torch.fake_value(n) if isinstance(n, fx.Node) else n) for n in outputs]
        found = (_torch.fake_value(node) for node in outputs if isinstance(node, fx.Node))
        self.has_gradient |= any(_requires_grad(value) for value in found)
        functionalize(capture.graph)
        self.used = {name for node, name in capture.parameters.items() if node.users}
        self.walked = walk(capture)
        self.needs = find_needs(capture, self.walked)
        insert_probes(capture.graph, self.walked)
        if not any(_requires_grad(value) for value in capture.inputs):
            raise TraceError("trace: no parameter of the model requires a gradient. Unfreeze one, or train nothing.")
        on_meta = any(isinstance(value, Tensor) and value.device.type == "meta" for value in capture.inputs)
        with _torch.gradients_on_meta() if on_meta else contextlib.nullcontext():
            _torch.eager_backend(self._partition, lambda graph, _: graph)(capture.graph, capture.inputs)
        self.buffers = dict(_updated_buffers(capture))
        return lambda *_: examples

    def check(self, result: Any) -> None:
        """Check that the loss, ``result``, can be trained with.

        Raises:
            TraceError: it is no scalar with a gradient, or no graph was captured.
        """
        if self.walked is None:
            raise TraceError("trace: the loss does not use the model. loss(model, batch) must call model.")
        if not isinstance(result, Tensor) or result.numel() != 1:
            what = f"a tensor of shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
            raise TraceError(
                f"trace: loss(model, batch) returned {what}, a scalar tensor is needed. Reduce it with .mean()."
            )
        if not self.has_gradient:
            raise TraceError(
                f"trace: loss(model, batch) returned a {result.dtype} tensor without a gradient, with which nothing "
                "can be trained.\n  Allowed: a floating-point scalar that depends on the parameters.\n"
                "  Do not detach it or convert it to integers, and compute it outside of torch.no_grad()."
            )

    def _partition(self, joint: fx.GraphModule, split: Callable[[fx.GraphModule], _torch.Graphs]) -> _torch.Graphs:
        read_marked_outputs(joint.graph, torch.ops.assign.probe.default)
        joint.recompile()
        forward, backward = split(joint)
        lister = _Lister()
        lister.list_graph(forward, backward=False)
        lister.list_graph(backward, backward=True)
        self.schedule = lister.schedule()
        self.saved = _note_saved(backward, forward)
        self.exact = find_exact(backward, _saved_by(backward, forward))
        return forward, backward


def _updated_buffers(capture: Capture) -> Iterable[tuple[str, Tensor]]:
    """Yield the float32 buffers that the graph just compiled changes, with their names."""
    changed = _torch.changed_inputs()
    placeholders = capture.graph.graph.find_nodes(op="placeholder")
    positions = itertools.accumulate(map(_parts, capture.inputs), initial=0)
    for position, node, value in zip(positions, placeholders, capture.inputs, strict=False):
        if position in changed and node in capture.buffers and value.dtype is torch.float32:
            yield capture.buffers[node], value


def _parts(value: Any) -> int:
    """Return how many inputs of the joint graph a value is: a wrapper subclass counts as its inner tensors."""
    return len(_torch.inner_tensors(value)) if isinstance(value, Tensor) else 1


def _requires_grad(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


class _Lister:
    """Reads buffers and events from the partitioned graphs."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.events: list[Event] = []
        self.kept: tuple[int, ...] = ()
        self._owner: dict[int, int] = {}  # storage → buffer
        self._alive: list[Any] = []

    def schedule(self) -> Schedule:
        return Schedule(buffers=tuple(self.buffers), events=tuple(self.events), kept=self.kept)

    def list_graph(self, graph: fx.GraphModule, *, backward: bool) -> None:
        follows = _gradients_of(graph) if backward else {}
        for node in graph.graph.nodes:
            if node.op == "output":
                if backward:
                    self.kept = tuple(dict.fromkeys(b for n in node.all_input_nodes for b in self._read(n)))
                continue
            if node.op != "call_function" or is_view(node) or _is_getitem(node):
                continue
            reads = tuple(dict.fromkeys(b for source in node.all_input_nodes for b in self._read(source)))
            writes = self._write(node, reads, follows)
            label, scratch = _torch.label_of(node), kernel_scratch(node)
            self.events.append(Event(op=label, backward=backward, reads=reads, writes=writes, scratch=scratch))

    def _read(self, node: fx.Node) -> Iterable[int]:
        for tensor in tensors_in(_torch.joint_value(node)):
            address = _torch.storage_id(tensor.untyped_storage())
            if address in self._owner:
                yield self._owner[address]

    def _write(self, node: fx.Node, reads: tuple[int, ...], follows: dict[tuple[fx.Node, int], str]) -> tuple[int, ...]:
        """Return the buffers that a node makes; recompute in the backward pass makes new buffers."""
        written: list[int] = []
        value = _torch.joint_value(node)
        for part, tensor in enumerate(value if isinstance(value, (tuple, list)) else (value,)):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if self._owner.get(_torch.storage_id(storage)) in (*reads, *written):
                continue
            self._alive.append(storage)
            holds = follows.get((node, part), "")
            if node.target is torch.ops.assign.probe.default:
                holds = str(node.args[1])
            elif node.target in COPIES and isinstance(node.args[0], fx.Node):
                holds = holds or next((self.buffers[b].holds for b in self._read(node.args[0])), "")
            dtype = dtype_of(tensor)
            elements = storage.nbytes() // tensor.dtype.itemsize
            self._owner[_torch.storage_id(storage)] = len(self.buffers)
            written.append(len(self.buffers))
            self.buffers.append(Buffer(elements=elements, dtype=dtype, holds=holds, part=part))
        return tuple(written)


def _note_saved(backward: fx.GraphModule, forward: fx.GraphModule) -> dict[str, str]:
    """Return the saved activations: key → dtype in which the activation is saved."""
    sources = _saved_by(backward, forward).values()
    return {str(each.args[1]): dtype_of(_torch.joint_value(each)) for each in sources}


def _saved_by(backward: fx.GraphModule, forward: fx.GraphModule) -> dict[str, fx.Node]:
    """Return the inputs of the backward graph that hold activations: name → probe of the activation."""
    inputs = {node.name for node in backward.graph.nodes if node.op == "placeholder"}
    found = {node.name: origin(node) for node in _torch.output_of(forward).all_input_nodes if node.name in inputs}
    return {name: source for name, source in found.items() if source.target is torch.ops.assign.probe.default}


def _is_getitem(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"


def _gradients_of(backward: fx.GraphModule) -> dict[tuple[fx.Node, int], str]:
    """Return the results (node, part) that become the gradient at a probe, with the key of that gradient.

    Autograd's own additions may lie between a result and the probe, and the backward passes of views and moves, which
    belong to no operator.
    """
    found: dict[tuple[fx.Node, int], str] = {}
    for node in reversed(backward.graph.nodes):
        if node.target is torch.ops.assign.probe.default:
            found[_made_by(node.args[0])] = str(node.args[1])
        elif (node, 0) in found and (node.target is torch.ops.aten.add.Tensor or not _torch.label_of(node)):
            for source in node.all_input_nodes:
                found.setdefault(_made_by(source), found[node, 0])
    return found


def _made_by(node: Any) -> tuple[fx.Node, int]:
    part = 0
    while node.target in VIEWS or _is_getitem(node):
        part = node.args[1] if _is_getitem(node) else part
        node = node.args[0]
    return node, part


def _rows(recorder: _Recorder, model: nn.Module) -> Iterable[TensorInfo]:
    assert recorder.walked is not None
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    readers: dict[str, list[str]] = {}
    for site in recorder.walked.sites:
        for source in site.inputs:
            readers.setdefault(source, []).append(site.key)
    own = {site.key: dtype_of(site.value) for site in recorder.walked.sites}
    for site in recorder.walked.sites:
        weight = site.op == "parameter"
        info = TensorInfo(
            key=site.key,
            role=Role.WEIGHT if weight else Role.ACTIVATION,
            shape=tuple(int(size) for size in site.value.shape),
            elements=site.elements,
            dtype=own[site.key],
            op=site.op,
            module=Key(site.key).module if weight else site.module,
            source=site.source,
            inputs=site.inputs,
            opaque=site.opaque,
            reads=() if all(map(operator.eq, site.reads, map(own.get, site.inputs))) else site.reads,
            consumers=tuple(readers.get(site.key, ())),
            wide=site.wide,
            need=recorder.needs.get(site.key, Need.NOTHING),
        )
        yield info
        if not weight or site.key in trainable:
            role = Role.WEIGHT_GRAD if weight else Role.ACTIVATION_GRAD
            yield dataclasses.replace(info, key=grad_key(site.key), role=role, inputs=(), reads=(), consumers=())
        if site.key in recorder.saved and not weight and site.op != "input":
            saved: dict[str, Any] = {"key": saved_key(site.key), "role": Role.SAVED, "dtype": recorder.saved[site.key]}
            saved["need"] = _need_of_copy(recorder, site.key)
            yield dataclasses.replace(info, **saved, inputs=(), reads=(), consumers=())
    for name, buffer in recorder.buffers.items():
        yield TensorInfo(
            key=buffer_key(name),
            role=Role.BUFFER,
            shape=tuple(buffer.shape),
            elements=buffer.numel(),
            dtype="float32",
            op="buffer",
            module=Key(name).module,
        )


def _need_of_copy(recorder: _Recorder, key: str) -> Need:
    """Return what a saved activation needs: the need of the activation, or all the bits of the computed value."""
    return Need.EXACT if key in recorder.exact else recorder.needs.get(key, Need.NOTHING)


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the distinct storages of tensors."""
    inner = (part.untyped_storage() for tensor in tensors for part in _torch.inner_tensors(tensor))
    storages = {_torch.storage_id(storage): storage.nbytes() for storage in inner}
    return sum(storages.values())


def _as_loaded(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters by name, in their loaded dtypes; without data if a plan has changed the dtype."""
    loaded = loaded_dtypes(model)
    return {
        name: p
        if loaded.get(name, p.dtype) == p.dtype
        else nn.Parameter(torch.empty_like(p, device="meta", dtype=loaded[name]), p.requires_grad)
        for name, p in model.named_parameters()
    }
