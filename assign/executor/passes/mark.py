"""Insert marks: one node after every operator that makes a tensor, which rounds the tensor and its gradient.

A mark is an autograd function, so the joint graph has a rounding node exactly at v, at dv (after the sum over the
readers of v), at θ and at dθ. Between operators a tensor is stored in its carrier dtype (see
:mod:`assign.plan.compute_dtype`); operands are converted to float32 where an operator must run in float32. An operator
stays as the user wrote it if the plan changes none of the dtypes that it reads or makes.

If a plan rounds stochastically, the graph begins with one node that draws a seed. Every mark reads the seed and has its
own stream number, which is made from the tensor's key; checkpointed bodies get the seed as one more operand. A tensor
that is rounded again in the backward pass, by recompute or by the packing, is therefore rounded to the same values.

Autograd gives a parameter's gradient the parameter's dtype. Where the plan stores the gradient in another dtype, the
mark passes it to a *tap*: one more input of the graph, a tensor of that dtype without data. The gradient of the tap
becomes the parameter's gradient (see :func:`taps_of`). The gradient is thus narrow from the mark on, and not only after
the whole backward pass.

Under a plan with micro-batches, the mark passes the gradient to :mod:`assign.optim.summing` instead, and autograd gets
none. The graph has two more inputs for this: the object with the parameters, and the *receipt*, a leaf whose gradient
depends on all sums, so that no compiler removes them.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from assign import _torch
from assign.executor.context import Added, Context, Step
from assign.formats.dtypes import FLOAT32, NARROW
from assign.formats.parsing import parse_format
from assign.formats.rows import FORMATS, LOADED, Format
from assign.numerics.delayed import History
from assign.numerics.promotion import Promotion, Slot
from assign.numerics.rounding import draw_seed, stream_of
from assign.numerics.runtime_formats import Runtime
from assign.numerics.torch_dtypes import dtype_name, torch_dtype
from assign.optim.gradients import keep_scale
from assign.optim.summing import Sums, is_rounded
from assign.plan.compute_dtype import ComputeDtypes, changes_nothing
from assign.plan.keys import grad_key, saved_key, stored_grad_key
from assign.plan.ops import ARITHMETIC, CONVERSIONS, FLOAT32_PARAMETERS
from assign.plan.persistent_state import gradient_format, stored_dtype
from assign.plan.plan import Assignment, format_pair
from assign.plan.table import MARK, Role
from assign.tracing.constants import hold_numbers
from assign.tracing.functionalize import written
from assign.tracing.layout import Layout
from assign.tracing.tensor_sites import (
    CROSSING,
    Site,
    Walk,
    converts,
    dtype_of,
    floating_arguments,
    is_complex,
    is_opaque,
    operator_name,
)

_CONVERSIONS = CONVERSIONS | {"to"}


class Marking(NamedTuple):
    """How a mark rounds a tensor and its gradient.

    Attributes:
        forward: name of the tensor's format.
        backward: name of the gradient's format.
        dtype: dtype in which the rounded tensor is stored.
        visible: whether the joint graph has a node for the tensor even if rounding changes nothing.
        streams: stream numbers of the random bits of the tensor and of its gradient.
        stored: name of the scaled format in which the gradient is stored; empty if it has none.
        slot: key of the tensor if its format may be promoted, else empty.
        histories: keys of the tensor and of its gradient; each is empty unless its scale comes from earlier steps.
        number: number of the parameter whose gradient is summed over micro-batches; -1 if it is not.
        sum_format: name of the format in which that sum is stored.
        sum_stream: stream number of the random bits of the sum.
    """

    forward: str
    backward: str
    dtype: str
    visible: bool = False
    streams: tuple[int, int] = (0, 0)
    stored: str = ""
    slot: str = ""
    histories: tuple[str, str] = ("", "")
    number: int = -1
    sum_format: str = ""
    sum_stream: int = 0


class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        how: Marking,
        seed: Tensor | None,
        runtime: Runtime | None,
        tap: Tensor | None,
        scale_tap: Tensor | None,
        sums: Sums | None,
        receipt: Tensor | None,
    ) -> Tensor:
        ctx.set_materialize_grads(False)  # without an incoming gradient, the mark returns None
        ctx.how, ctx.runtime, ctx.sums, ctx.has_tap = how, runtime, sums, tap is not None
        ctx.gradient_dtype = x.dtype if tap is None else tap.dtype
        ctx.save_for_backward(seed)
        return _round(x, how, seed, runtime, torch_dtype(how.dtype), backward=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (grad,), (seed,) = grads, ctx.saved_tensors
        if grad is None:
            return (None,) * 8
        rounded = _round(grad, ctx.how, seed, ctx.runtime, grad.dtype, backward=True)
        if ctx.sums is not None:
            return (*(None,) * 7, _summed(rounded, ctx.how, seed, ctx.sums))
        scale = None
        if ctx.how.stored:
            gradient, scale = _encoded(rounded, ctx.how.stored, ctx.gradient_dtype)
        else:
            gradient = rounded.to(ctx.gradient_dtype)
        to_x, to_tap = (None, gradient) if ctx.has_tap else (gradient, None)
        return to_x, None, None, None, to_tap, scale, None, None


def _summed(gradient: Tensor, how: Marking, seed: Tensor | None, sums: Sums) -> Tensor:
    """Add the gradient to those of earlier micro-batches; return the receipt."""
    randomness = (seed, how.sum_stream) if is_rounded(how.sum_format) else ()
    receipt: Tensor = torch.ops.assign.sum_gradient(gradient, how.number, how.sum_format, *randomness, sums=sums)
    return receipt


def _encoded(gradient: Tensor, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the gradient divided by its scale and stored in ``dtype``, and the scale."""
    scale = torch.ops.assign.scale(gradient, name)
    rounded = torch.ops.assign.quantize(gradient, scale, name, False, gradient.dtype)
    return torch.ops.assign.encode(rounded, scale, name).view(dtype), scale


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        ctx.parameter = parameter
        ctx.set_materialize_grads(False)  # a scale that no mark makes is None, not zero
        scale = parameter.new_ones((), dtype=torch.float32)
        return parameter.new_zeros((), dtype=dtype).expand(parameter.shape), scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        gradient, scale = grads
        if scale is not None:
            keep_scale(ctx.parameter, scale)
        return gradient, None


def taps_of(parameter: Tensor, dtype: torch.dtype, *, scaled: bool) -> list[Tensor]:
    """Return one tensor for the gradient of a parameter, and a second one for its scale if the gradient has a scale.

    The first has the parameter's shape, the dtype of the stored gradient and no data; its gradient becomes the
    parameter's gradient. The gradient of the second is the scale.
    """
    gradient, scale = _torch.apply_function(_Tap, parameter, dtype)
    return [gradient, scale] if scaled else [gradient]


def _round(
    x: Tensor, how: Marking, seed: Tensor | None, runtime: Runtime | None, dtype: torch.dtype, *, backward: bool
) -> Tensor:
    """Round a tensor (``backward=False``; saturates) or its gradient (does not saturate), and store it in ``dtype``."""
    fmt, history = parse_format(how.backward if backward else how.forward), how.histories[backward]
    slot, visible = ("", False) if backward else (how.slot, how.visible)
    exact = x.dtype == dtype and changes_nothing(fmt, dtype_name(dtype)) and not slot
    if exact and not visible:
        return x.view_as(x)
    if torch.float64 in (x.dtype, dtype) and not exact and not history and fmt.native != "float64":
        narrow = _round(x.float(), how, seed, runtime, torch.float32, backward=backward)  # kernels compute in float32
        return narrow.to(dtype)
    saturate = not backward and not exact  # a format that changes nothing also keeps infinities
    scale = None
    if fmt.scaled:
        scale = torch.ops.assign.scale(x, fmt.name, **_live(runtime, history))
    randomness = (seed, how.streams[backward]) if seed is not None and (fmt.stochastic or slot) else ()
    rounded: Tensor = torch.ops.assign.quantize(
        x, scale, fmt.name, saturate, dtype, *randomness, **_live(runtime, slot)
    )
    return rounded


def _live(runtime: Runtime | None, key: str) -> dict[str, Any]:
    """Return the arguments that let an operator look up the current format or scale of ``key``; empty without a key."""
    return {"runtime": runtime, "key": key} if key else {}


def mark_tensor(
    x: Tensor,
    how: Marking,
    seed: Tensor | None = None,
    runtime: Runtime | None = None,
    tap: Tensor | None = None,
    scale_tap: Tensor | None = None,
    sums: Sums | None = None,
    receipt: Tensor | None = None,
) -> Tensor:
    """Round ``x`` and, in the backward pass, its gradient.

    Args:
        x: any shape, floating point.
        how: formats and dtype.
        seed: seed of stochastic rounding.
        runtime: formats and scales that change between steps.
        tap: receives the gradient, in the tap's dtype, instead of ``x``.
        scale_tap: receives the scale by which a stored gradient is divided.
        sums: receives the gradient, instead of ``x`` and the tap, and adds it to those of earlier micro-batches.
        receipt: a leaf without axes; its gradient shows that the sum was computed.
    Returns:
        The rounded tensor, in the shape of ``x``.
    """
    return _torch.apply_function(_Mark, x, how, seed, runtime, tap, scale_tap, sums, receipt)


def mark(graph: fx.GraphModule, context: Context) -> fx.GraphModule:
    """Insert the marks of the plan into the captured step; the graph of an all-fp32 plan stays as it is.

    Tensors that the plan does not name keep their loaded dtype (this happens only in evaluation: training checks the
    plan first). A tensor that may be promoted has a carrier dtype that also holds its high format. The new inputs are
    added to ``step.added``.
    """
    step = context.step
    assert step is not None
    marker = _Marker(step, context.plan)
    marker.mark_graph(graph)
    if not step.capture.is_part:
        marker.restore_outputs(graph)
    graph.graph.lint()
    graph.recompile()
    step.added.extend(marker.added)
    return graph


class _Marker:
    def __init__(self, step: Step, plan: Assignment) -> None:
        capture, walked = step.capture, step.walked
        self.capture = capture
        self.walked = walked
        self.plan = plan
        self.scales = step.scales
        self.slots = _slots(walked, plan, step.promotion)
        self.sites: dict[fx.Node, list[Site]] = {}
        for site in walked.sites:
            self.sites.setdefault(site.after, []).append(site)
        self.computes = ComputeDtypes(
            {site.key: site for site in reversed(walked.sites)},
            plan.entries,
            {key: slot.high for key, slot in self.slots.items()},
        )
        self.dtypes = {node: dtype_name(dtype) for node, dtype in capture.dtypes.items()}  # where not the loaded one
        self.summed = step.summed
        self.added: list[Added] = []
        self.sums: tuple[dict[str, fx.Node], list[int]] | None = None
        self.seeds: dict[fx.Graph, fx.Node] = {}
        self.runtimes: dict[fx.Graph, fx.Node] = {}
        self.histories: dict[str, History] = {}
        self.layouts: dict[fx.Graph, Layout] = {}

    def mark_graph(self, graph: fx.GraphModule) -> None:
        self.layouts[graph.graph] = Layout(graph.graph)
        for node in list(graph.graph.nodes):
            if node.op == "placeholder":
                self._mark_sites(graph, node)
            elif node.target is _torch.CHECKPOINT_OP:
                self._mark_body(graph, node)
            elif node.op in ("call_function", "call_method"):
                self._mark_operator(graph, node)
        graph.recompile()

    def _loaded(self, node: fx.Node) -> str:
        """Return the dtype of a node's value in the model as it was loaded."""
        value = self.walked.values.get(node)
        return dtype_of(value) if isinstance(value, Tensor) else FLOAT32

    def _now(self, node: fx.Node) -> str:
        """Return the dtype of a node's value under the plan."""
        return self.dtypes.get(node) or self._loaded(node)

    def _mark_operator(self, graph: fx.GraphModule, node: fx.Node) -> None:
        key = self.walked.labels.get(node)
        if key is not None:
            _torch.label(node, key)
        target = written(node)
        if target is not None:
            self._lower(graph, node, self._now(target))
        elif node.target is operator.getitem and _is_tuple(self.walked.values.get(_torch.source_of(node))):
            maker = _torch.source_of(node)
            if maker in self.dtypes and node not in self.dtypes:
                self.dtypes[node] = self.dtypes[maker]
        elif key is not None:
            dtype = self.computes.changed(key)
            if dtype is not None:  # otherwise it stays as the user wrote it
                self.dtypes[node] = dtype
                self._compute_in(graph, node, dtype)
        elif is_complex(self.walked.values.get(node)):  # no plan stores complex numbers in 16 bits
            self._lower(graph, node, None)
        elif node in self.walked.key_of or _is_tuple(self.walked.values.get(node)):
            self._follow(node)
        self._mark_sites(graph, node)

    def _compute_in(self, graph: fx.GraphModule, node: fx.Node, dtype: str) -> None:
        """Make an operator run in ``dtype``."""
        if is_opaque(node, self.walked):
            self._lower(graph, node, None)
        elif operator_name(node.target) in CONVERSIONS:
            _convert_to(node, torch_dtype(dtype))
        else:
            self._lower(graph, node, dtype)
            _ask_for(node, torch_dtype(self._loaded(node)), torch_dtype(dtype))

    def _follow(self, node: fx.Node) -> None:
        """Give a view or a move the dtype of its source, and drop a conversion that no longer changes anything.

        An operator that reads a conversion to float32 computes in float32 (:func:`is_wide`). A conversion to another
        dtype was chosen by the user and stays. A conversion back to the tensor's earlier dtype, possibly the last of
        several in a row, becomes a conversion to the carrier dtype that the plan gives the tensor.
        """
        source = next(floating_arguments(node, self.walked), None)
        if converts(node, self.walked):
            self.dtypes[node] = self.computes.read_as(self.walked.key_of.get(node, ""), self._loaded(node))
            if self._now(node) != self._loaded(node) or len(node.all_input_nodes) > 1:  # may name another tensor's
                _convert_to(node, torch_dtype(self._now(node)))
        elif source is not None and source in self.dtypes:
            self.dtypes[node] = self.dtypes[source]
            is_moved = _device_of(self.walked.values.get(node)) != _device_of(self.walked.values[source])
            if node.op == "call_method" and node.target in _CONVERSIONS and not is_moved:
                node.replace_all_uses_with(source)

    def _formats(self, key: str) -> tuple[Format, Format] | None:
        return format_pair(self.plan.entries, key)

    def _lower(self, graph: fx.GraphModule, node: fx.Node, dtype: str | None) -> None:
        """Convert every floating-point operand of ``node`` to ``dtype``; None: to the operand's own loaded dtype."""
        arguments = list(floating_arguments(node, self.walked))
        op = operator_name(node.target)
        mixed = op in FLOAT32_PARAMETERS
        for position, argument in enumerate(arguments):
            wanted = FLOAT32 if mixed and position else dtype or self._loaded(argument)
            have = self._now(argument)
            number = argument not in self.walked.key_of and not self.walked.values[argument].dim()
            if have == wanted or (number and (wanted not in NARROW or op in ARITHMETIC)):
                continue
            with graph.graph.inserting_before(node):
                if mixed and argument in self.capture.buffers:
                    converted = graph.graph.call_method("to", (argument, torch_dtype(wanted)))
                    with graph.graph.inserting_after(node):  # the operator updates its running statistics
                        graph.graph.call_method("copy_", (argument, converted))
                elif number:
                    converted = graph.graph.call_function(_held_in, (argument, torch_dtype(wanted)))
                elif argument not in self.walked.key_of:  # a mask: its −inf must not become NaN in the cast
                    converted = graph.graph.call_function(
                        mark_tensor, (argument, Marking(LOADED[wanted].name, "fp64", wanted))
                    )
                else:
                    converted = graph.graph.call_method("to", (argument, torch_dtype(wanted)))
            _torch.label(converted, _torch.label_of(node))
            _torch.stand_in_block_of(converted, node)
            node.replace_input_with(argument, converted)
        if dtype in NARROW:
            hold_numbers(node, op, torch.finfo(torch_dtype(dtype)).max)

    def _mark_sites(self, graph: fx.GraphModule, node: fx.Node) -> None:
        """Mark a tensor after its operator; mark an input before its first reader, and again after each write to it."""
        for site in self.sites.get(node, ()):
            for group in site.groups(self.layouts[graph.graph]):
                self._mark_site(graph, site, group, before=group[0] if node.op == "placeholder" else site.after.next)

    def _mark_site(self, graph: fx.GraphModule, site: Site, readers: Sequence[fx.Node], *, before: fx.Node) -> None:
        formats = self._formats(site.key)
        if formats is None:
            return
        dtype = self.computes.carrier(site.key)
        have = self._now(site.node)
        names = {fmt.native for fmt in formats}
        explicit = saved_key(site.key) in self.plan.entries
        slot = site.key if site.key in self.slots else ""
        histories = self._history(site.key), self._history(grad_key(site.key))
        if site.op == CROSSING:
            if slot or histories[0]:  # the piece that made this tensor has already counted or measured it
                self.dtypes[site.node] = have
                return
            # its gradient is rounded in the piece that made the tensor, where all its parts are summed
            formats, histories = (formats[0], FORMATS["fp32"]), ("", "")
        tap = self._gradient_inputs(graph, site, have) if site.op == "parameter" else {}
        if have == dtype and names == {dtype} and not explicit and not tap:
            self.dtypes[site.node] = dtype
            return
        stored = gradient_format(self.plan.entries, site.key)
        how = Marking(
            forward=formats[0].name,
            backward=formats[1].name,
            dtype=dtype,
            visible=explicit,
            streams=(stream_of(site.key), stream_of(grad_key(site.key))),
            stored=stored.name if "scale_tap" in tap else "",
            slot=slot,
            histories=histories,
        )
        if "sums" in tap:
            how = self._summing(how, site, stored.name)
        rounded = (*formats, self.slots[site.key].high) if slot else formats
        with graph.graph.inserting_before(before):
            inputs = dict(tap)
            if any(fmt.stochastic for fmt in rounded) or (how.sum_format and is_rounded(how.sum_format)):
                inputs["seed"] = self._seed(graph)
            if slot or any(histories):
                inputs["runtime"] = self._runtime(graph)
            marked = graph.graph.call_function(mark_tensor, (site.node, how), inputs)
        neighbour = before if site.node.op == "placeholder" else site.after
        if site.value.requires_grad and neighbour in self.layouts[graph.graph].without_grad:
            _torch.enable_grad_around(graph.graph, marked)
        _torch.label(marked, MARK + site.key)
        _torch.stand_in_block_of(marked, neighbour)
        for user in readers:
            user.replace_input_with(site.node, marked)
        self.dtypes[marked] = dtype
        self.walked.values[marked] = site.value
        self.walked.key_of[marked] = site.key

    def _history(self, key: str) -> str:
        """Return the key if its scale comes from earlier steps, else an empty string."""
        history = self.scales.history(key)
        if history is None:
            return ""
        self.histories[key] = history
        return key

    def _gradient_inputs(self, graph: fx.GraphModule, site: Site, have: str) -> dict[str, Any]:
        """Add the inputs that receive the gradient of a parameter, if autograd shall not have it as it is.

        These are the sums over micro-batches, or a tap if the gradient is stored in another dtype than the parameter.
        No input is added for a mark inside a checkpointed body, which autograd enters as a whole: there the gradient is
        converted and summed after the backward pass.

        Returns:
            Keyword arguments of the mark: ``sums`` and ``receipt``, or ``tap`` and, for a gradient with a scale,
            ``scale_tap``; empty if nothing is needed.
        """
        if graph is not self.capture.graph or not torch.is_grad_enabled():
            return {}
        if not _torch.fake_value(site.node).requires_grad:
            return {}
        position = graph.graph.find_nodes(op="placeholder").index(site.node)
        if position in self.summed:
            return self._sum_inputs(graph, position)
        stored = gradient_format(self.plan.entries, site.key)
        dtype = stored_dtype(stored)
        if dtype == have:
            return {}
        name = f"assign_tap_{len(self.added)}"
        nodes = [_torch.add_input(graph, each) for each in ((name, f"{name}_scale") if stored.scaled else (name,))]
        make = functools.partial(taps_of, dtype=torch_dtype(dtype), scaled=stored.scaled)
        self.added.append(Added(nodes=tuple(nodes), make=lambda inputs: make(inputs[position])))
        return {"tap": nodes[0], **({"scale_tap": nodes[1]} if stored.scaled else {})}

    def _sum_inputs(self, graph: fx.GraphModule, position: int) -> dict[str, fx.Node]:
        """Return the inputs that all sums share, and give the parameter at ``position`` the next number in them."""
        if self.sums is None:
            nodes = {name: _torch.add_input(graph, f"assign_{name}") for name in ("sums", "receipt")}
            positions: list[int] = []
            self.sums = nodes, positions
            receipt = functools.partial(torch.zeros, (), device=self._device(), requires_grad=True)
            self.added.append(
                Added(
                    nodes=tuple(nodes.values()),
                    make=lambda inputs: [Sums([inputs[each] for each in positions]), receipt()],
                )
            )
        nodes, positions = self.sums
        positions.append(position)
        return nodes

    def _summing(self, how: Marking, site: Site, stored: str) -> Marking:
        """Return the same rounding, with the gradient summed for the parameter that was numbered last."""
        assert self.sums is not None
        number, stream = len(self.sums[1]) - 1, stream_of(stored_grad_key(site.key))
        return how._replace(number=number, sum_format=stored, sum_stream=stream)

    def _seed(self, graph: fx.GraphModule) -> fx.Node:
        """Return the node that holds the seed: made once at the beginning of the graph; in a body, a placeholder."""
        if graph.graph not in self.seeds:
            first = next(node for node in graph.graph.nodes if node.op != "placeholder")
            with graph.graph.inserting_before(first):
                outermost = graph is self.capture.graph
                self.seeds[graph.graph] = (
                    graph.graph.call_function(draw_seed, (self._device(),))
                    if outermost
                    else graph.graph.placeholder("assign_seed")
                )
        return self.seeds[graph.graph]

    def _runtime(self, graph: fx.GraphModule) -> fx.Node:
        """Return the input for what changes between steps; in a body, a placeholder."""
        if graph.graph not in self.runtimes:
            if graph is self.capture.graph:
                node = self.runtimes[graph.graph] = _torch.add_input(graph, "assign_runtime")
                live: list[Runtime] = []

                def make(_inputs: Sequence[Any]) -> list[Runtime]:
                    if not live:  # all slots and histories are known once the whole graph is marked
                        live.append(Runtime(self.slots, self.histories))
                    return live

                self.added.append(Added(nodes=(node,), make=make))
            else:
                first = next(node for node in graph.graph.nodes if node.op != "placeholder")
                with graph.graph.inserting_before(first):
                    self.runtimes[graph.graph] = graph.graph.placeholder("assign_runtime")
        return self.runtimes[graph.graph]

    def _device(self) -> torch.device:
        return next(value.device for value in self.capture.inputs if isinstance(value, Tensor))

    def _mark_body(self, graph: fx.GraphModule, node: fx.Node) -> None:
        body = _torch.body_of(graph, node)
        inner = [n for n in body.graph.nodes if n.op == "placeholder"]
        for placeholder, outer in zip(inner, node.args[1:], strict=False):
            if isinstance(outer, fx.Node) and outer in self.dtypes:
                self.dtypes[placeholder] = self.dtypes[outer]
        self.mark_graph(body)
        for added in [n for n in body.graph.nodes if n.op == "placeholder"][len(inner) :]:
            node.args = (*node.args, self._seed(graph) if added is self.seeds.get(body.graph) else self._runtime(graph))
        results: Any = _torch.output_of(body).args[0]
        for user in node.users:
            if user.target is operator.getitem and results[user.args[1]] in self.dtypes:
                self.dtypes[user] = self.dtypes[results[user.args[1]]]

    def restore_outputs(self, graph: fx.GraphModule) -> None:
        """Convert the outputs of the graph to the dtypes that the user's own code gave them."""
        output = _torch.output_of(graph)
        for argument in output.all_input_nodes:
            if self._now(argument) != self._loaded(argument):
                with graph.graph.inserting_before(output):
                    restored = graph.graph.call_method("to", (argument, torch_dtype(self._loaded(argument))))
                output.replace_input_with(argument, restored)


def _slots(walked: Walk, plan: Assignment, promotion: Promotion | None) -> dict[str, Slot]:
    if promotion is None:
        return {}
    roles = {site.key: Role.WEIGHT if site.op == "parameter" else Role.ACTIVATION for site in walked.sites}
    found = {
        site.key: promotion.slot(site.key, roles[site.key], site.op)
        for site in walked.sites
        if site.key in plan.entries
    }
    return {key: slot for key, slot in found.items() if slot is not None}


def _held_in(number: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a 0-dim tensor in ``dtype``: a number beyond its range becomes the largest number, infinities stay."""
    limit = torch.finfo(dtype).max
    return torch.where(number.isinf(), number, number.clamp(-limit, limit)).to(dtype)


def _ask_for(node: fx.Node, named: torch.dtype, dtype: torch.dtype) -> None:
    """Make an operator that names the dtype of its result produce ``dtype``."""
    node.args = map_aggregate(node.args, lambda value: dtype if value is named else value)
    node.kwargs = map_aggregate(node.kwargs, lambda value: dtype if value is named else value)


def _convert_to(node: fx.Node, dtype: torch.dtype) -> None:
    """Make a conversion produce ``dtype``."""
    node.op, node.target = "call_method", "to"
    node.args, node.kwargs = (node.args[0], dtype), {}


def _device_of(value: Any) -> torch.device | None:
    return value.device if isinstance(value, Tensor) else None


def _is_tuple(value: Any) -> bool:
    return isinstance(value, (tuple, list))
