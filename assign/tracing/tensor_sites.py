"""Name every tensor of a captured graph. Tracer and executor share this walk, so they agree.

A *site* is a place where a new floating-point tensor appears that depends on a parameter or on the batch: there is one
per parameter, per floating-point input of the model and per operator output. Views make no new tensor. Neither do
copies that only move data (``contiguous``, ``clone``), nor values computed from constants (masks, position tables).

A view of a part of an activation (``x[:, :c]``, ``narrow``, ``split``, ``unbind``, ``select``) does make a tensor, a
*slice*: the paper counts both halves of a channel split. No operator runs for it. A part of a parameter still counts as
the parameter. A part that is written into later still counts as its source, otherwise the source would not get the
write.
"""

import operator
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from assign import _torch
from assign.errors import TraceError
from assign.numerics.torch_dtypes import dtype_name
from assign.plan.keys import activation_key
from assign.plan.ops import ARITHMETIC, CONVERSIONS, MATRIX_PRODUCTS, SAME_VALUES, SLICE
from assign.tracing.capture import Capture, strip_module_path
from assign.tracing.constants import LARGEST_FP16, numbers_in
from assign.tracing.functionalize import Aliases, written
from assign.tracing.layout import Layout
from assign.tracing.pieces import Crossing

CROSSING = "crossing"
"""Operator name of a site that is a result of an earlier piece. The tensor is already in the table and marked there."""

_CANONICAL = {
    "truediv": "div",
    "multiply": "mul",
    "subtract": "sub",
    "divide": "div",
    "neg_": "neg",
    "__matmul__": "matmul",
}


@dataclass(slots=True, kw_only=True)
class Site:
    """Where one tensor of the table appears in a captured graph.

    Attributes:
        counted: a tensor with as many elements as the paper counts (for a loss: one per sample).
        node: the node that holds the tensor.
        after: the node after which the tensor is complete.
        owner: the graph (main, or body of a checkpointed block) that holds ``node``.
        reads: dtypes in which its operator reads ``inputs``.
        opaque: whether its operator belongs to another library: see :func:`is_opaque`.
        readers: for an input, the nodes that read it as the model's input (None: all).
        wide: whether its operator computes in float32 under every plan.
    """

    key: str
    op: str
    node: fx.Node
    after: fx.Node
    owner: fx.GraphModule
    value: Tensor
    counted: Tensor
    module: str = ""
    source: str = ""
    inputs: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    opaque: bool = False
    readers: tuple[fx.Node, ...] | None = None
    wide: bool = False

    def groups(self, layout: Layout) -> list[list[fx.Node]]:
        """Return the readers of the tensor in groups that see the same values: a write into an input ends a group."""
        readers = self.readers if self.readers is not None else tuple(self.node.users)
        if self.node.op == "placeholder":
            return layout.split_at_writes(self.node, readers)
        done = layout.order[self.after]
        later = [node for node in readers if layout.order.get(node, -1) > done]
        return [later] if later else []

    @property
    def dtype(self) -> str:
        """Return the dtype of the tensor in the model as it was loaded."""
        return dtype_of(self.value)

    @property
    def elements(self) -> int:
        """Return the number of elements that the paper counts.

        Only the tracer uses it: in the executor it would tie the graph to one batch size.
        """
        return int(self.counted.numel())


@dataclass(slots=True)
class Walk:
    """Result of :func:`walk`.

    Attributes:
        sites: in execution order; parameters in the order in which they are first read.
        key_of: node → key of the table whose values the node holds, through views and moves.
        labels: node → operator key, for every node that computes.
        float32: nodes that the user's code converts to float32, and nodes computed from them up to the next matrix
            product or to the conversion that ends it.
        back: the conversions that end such a computation.
        dtypes: dtypes of values that have keys. Includes float64 only if a parameter is float64; otherwise float64 in
            the middle of a step is the user's own choice and stays.
    """

    sites: list[Site] = field(default_factory=list)
    key_of: dict[fx.Node, str] = field(default_factory=dict)
    labels: dict[fx.Node, str] = field(default_factory=dict)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    depends: set[fx.Node] = field(default_factory=set)
    parametric: set[fx.Node] = field(default_factory=set)
    seen: set[str] = field(default_factory=set)
    crossing: set[fx.Node] = field(default_factory=set)
    float32: set[fx.Node] = field(default_factory=set)
    back: set[fx.Node] = field(default_factory=set)
    dtypes: frozenset[torch.dtype] = frozenset({torch.float32, torch.bfloat16, torch.float16})

    def plans(self, value: Any) -> bool:
        """Whether a value is a floating-point tensor that may have a key, i.e. not a tensor quantized by a library."""
        return isinstance(value, Tensor) and value.dtype in self.dtypes and not _torch.is_wrapper(value)

    def fresh_key(self, module: str, op: str) -> str:
        """Return ``module/op``, or ``module/op#2`` for the second such operator in the module."""
        first = activation_key(module, op)
        self.counts[first] += 1
        return activation_key(module, op, self.counts[first])


def walk(capture: Capture) -> Walk:
    """Name every tensor of a functional captured graph."""
    piece = capture.piece
    result = Walk(counts=piece.counts) if piece else Walk()
    for node, crossing in piece.crossing.items() if piece else ():
        if crossing.depends:
            result.depends.add(node)
            result.crossing.add(node)
            if crossing.parametric:
                result.parametric.add(node)
            if crossing.key:
                result.key_of[node] = crossing.key
    is_cast = any(node.target is _torch.ENTER_AUTOCAST for node in capture.graph.graph.nodes)
    if any(_torch.fake_value(node).dtype == torch.float64 for node in capture.parameters):
        result.dtypes |= {torch.float64}
    for node, name in capture.parameters.items():
        if result.plans(_torch.fake_value(node)):
            result.key_of[node] = name
            result.depends.add(node)
            result.parametric.add(node)
    others = {*capture.parameters, *capture.buffers, *_kept_with_parameters(capture)}
    others |= {*piece.constants, *piece.crossing} if piece else set()
    for node in capture.graph.graph.nodes:
        if node.op == "placeholder" and node not in others and _is_floating(_torch.fake_value(node)):
            result.depends.add(node)
    _walk_graph(capture.graph, result)
    for node in () if is_cast else result.values:
        _check_operands(node, result)
    if piece:
        outputs: Any = _torch.output_of(capture.graph).args[0]
        piece.results[:] = [
            Crossing(
                key=result.key_of.get(node, ""), parametric=node in result.parametric, depends=node in result.depends
            )
            for node in outputs
        ]
        piece.entered |= {site.node: site.key for site in result.sites if site.op == "input"}
    return result


def _kept_with_parameters(capture: Capture) -> set[fx.Node]:
    """Return the inputs that belong to a parameter, not to the batch, such as the scales of a quantized weight."""
    if capture.piece:  # the names of its inputs do not say where they come from
        return set()
    owners = tuple(str(node.target) for node in capture.parameters)
    return {node for node in capture.graph.graph.find_nodes(op="placeholder") if str(node.target).startswith(owners)}


def _check_operands(node: fx.Node, walked: Walk) -> None:
    """Reject a product of matrices of different dtypes, which torch would reject when it runs.

    Raises:
        TraceError: names the operator, its line and the dtypes.
    """
    if operator_name(node.target) not in MATRIX_PRODUCTS - {"scaled_dot_product_attention"}:
        return
    values = [walked.values.get(argument) for argument in node.all_input_nodes]
    dtypes = dict.fromkeys(dtype_of(value) for value in values if isinstance(value, Tensor))
    if len(dtypes) > 1:
        raise TraceError(
            f"trace: {operator_name(node.target)} multiplies tensors in {' and '.join(dtypes)}, which torch "
            f"does not support.\n  at: {source_line(node) or 'unknown line'}\n  Allowed: one dtype for all of them.\n"
            "  Convert the batch to the dtype of the model's parameters, x.to(weight.dtype), or the model to its dtype."
        )


def _walk_graph(graph: fx.GraphModule, result: Walk) -> None:
    aliases = Aliases(graph)
    result.values.update(aliases.values)
    for node in list(graph.graph.nodes):
        if node.op not in ("call_function", "call_method"):
            continue
        arguments = [n for n in node.all_input_nodes if n.op != "get_attr" or n in result.key_of]
        _enter(graph, node, arguments, result)
        if node.meta.get("assign_in_place") or _carries(result.values.get(node)):
            for table in (result.depends, result.parametric):
                if any(n in table for n in arguments):
                    table.add(node)
        if node.target is _torch.CHECKPOINT_OP:
            _walk_body(graph, node, result)
        elif node.meta.get("assign_in_place"):
            _name_written(graph, node, aliases, result)
        elif node.meta.get("assign_after", node) is node and not isinstance(node.target, _torch.OutsideFunction):
            _name_output(graph, node, aliases, result)
        _follow_float32(node, result)


def _follow_float32(node: fx.Node, result: Walk) -> None:
    """Record conversions to float32 in the user's code, and the nodes computed from them.

    In a float32 model, a second such conversion is how code returns to the dtype of its input.
    """
    if is_conversion(node):
        source = _torch.source_of(node)
        if source in result.float32:
            result.back.add(node)
        elif source in result.key_of and node in result.key_of:
            result.float32.add(node)
    elif _converts(node) or operator_name(node.target) in MATRIX_PRODUCTS:
        return
    elif not result.float32.isdisjoint(node.all_input_nodes):
        result.float32.add(node)


def is_conversion(node: fx.Node) -> bool:
    """Whether a node is ``x.float()``, ``x.to(torch.float32)`` or ``x.type(torch.float32)``."""
    named = torch.float32 in (*node.args[1:], *node.kwargs.values())
    return node.op == "call_method" and (node.target == "float" or (node.target in ("to", "type") and named))


def _converts(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target in ("to", "type", "type_as", "half", "bfloat16", "double")


def is_wide(node: fx.Node, walked: Walk) -> bool:
    """Whether an operator computes in float32 under every plan.

    It does if it has complex operands or a number that float16 cannot hold, or if it has no 16-bit kernel on a CPU.
    """
    op = operator_name(node.meta.get("assign_op", node.target))
    if op in MATRIX_PRODUCTS:
        return False
    if any(is_complex(walked.values.get(argument)) for argument in node.all_input_nodes):
        return True
    if op == "interpolate" and (node.kwargs.get("antialias") or node.args[6:7] == (True,)):
        return True
    return op in ARITHMETIC and any(abs(number) > LARGEST_FP16 for number in numbers_in((node.args, dict(node.kwargs))))


def _enter(graph: fx.GraphModule, node: fx.Node, arguments: list[fx.Node], result: Walk) -> None:
    """Add a site for each parameter at its first reader, and for each input where it enters the model."""
    inside = _is_inside(node)
    for argument in arguments:
        value: Any = result.values.get(argument)
        if argument.op == "placeholder" and argument in result.key_of:
            key = result.key_of[argument]
            if key not in result.seen and argument in result.parametric | result.crossing:
                result.seen.add(key)
                op = "parameter" if argument not in result.crossing else CROSSING
                result.sites.append(_site(key, op, argument, graph, value, result))
        elif inside and result.plans(value) and argument in result.depends and argument not in result.parametric:
            if all(converts(user, result) for user in argument.users if _is_inside(user)):
                continue  # the site is the converted batch, in the dtype that the model uses
            source = argument
            while converts(source, result):
                source = _torch.source_of(source)
            outside = source.op == "placeholder" or not _is_inside(source)
            if outside and argument not in result.labels.keys() | result.key_of.keys():
                key = result.fresh_key("", "input")
                site = _site(key, "input", argument, graph, value, result)
                site.readers = tuple(filter(_is_inside, argument.users))
                result.key_of[argument] = key
                result.sites.append(site)


def _is_inside(node: fx.Node) -> bool:
    return strip_module_path(_torch.module_path(node)) is not None


def _walk_body(graph: fx.GraphModule, node: fx.Node, result: Walk) -> None:
    """Walk the body of a checkpointed block, with its inputs bound to the outer values."""
    body = _torch.body_of(graph, node)
    inner = [n for n in body.graph.nodes if n.op == "placeholder"]
    for placeholder, outer in zip(inner, node.args[1:], strict=False):
        if isinstance(outer, fx.Node):
            for table in (result.depends, result.parametric, result.float32):
                if outer in table:
                    table.add(placeholder)
            if outer in result.key_of:
                result.key_of[placeholder] = result.key_of[outer]
    _walk_graph(body, result)
    outputs: Any = _torch.output_of(body).args[0]
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    for user in node.users:
        if user.target is operator.getitem:
            source = outputs[int(str(user.args[1]))]
            if source in result.float32:
                result.float32.add(user)
            if source in result.key_of:
                result.key_of[user] = result.key_of[source]
            result.labels[user] = result.labels.get(source, "")


def _name_written(graph: fx.GraphModule, node: fx.Node, aliases: Aliases, result: Walk) -> None:
    """Name a copy once the write into it is done, because only then is it known to depend on a parameter."""
    copy = next((aliases.root[n] for n in node.all_input_nodes if "assign_after" in aliases.root[n].meta), None)
    if copy is not None and copy.meta["assign_after"] is node:
        for table in (result.depends, result.parametric):
            if node in table:
                table.add(copy)
        _name_output(graph, copy, aliases, result)
        site = next((site for site in reversed(result.sites) if site.node is copy), None)
        if site is not None:
            for argument in node.all_input_nodes:
                if argument is not copy and result.key_of.get(argument) != site.key:
                    _note_read(site, argument, result)


def _name_output(graph: fx.GraphModule, node: fx.Node, aliases: Aliases, result: Walk) -> None:
    value = aliases.values[node]
    maker, part = node, 0
    if node.target is operator.getitem and not isinstance(aliases.values.get(_torch.source_of(node)), Tensor):
        maker, part = _torch.source_of(node), int(str(node.args[1]))
        if maker.op not in ("call_function", "call_method") or maker.target is _torch.CHECKPOINT_OP:
            return
    op = operator_name(maker.meta.get("assign_op", maker.target))
    if not result.plans(value):
        return
    if aliases.root[node] is not node:
        _name_view(graph, node, maker, aliases, result)
        return
    first = next((n for n in maker.all_input_nodes if n in result.key_of), None)
    moves = op in SAME_VALUES or (op in CONVERSIONS and node not in result.parametric)
    if moves and "assign_op" not in maker.meta:
        if first is not None:
            result.key_of[node] = result.key_of[first]
        return
    if node not in result.depends:
        return
    module = strip_module_path(_torch.module_path(maker))
    key = result.fresh_key("loss" if module is None else module, op if not part else f"{op}[{part}]")
    site = _site(key, op, node, graph, value, result)
    site.module = module or ""
    site.wide = is_wide(maker, result)
    site.after = node.meta.get("assign_after", node)
    site.source = source_line(maker)
    site.opaque = is_opaque(maker, result)
    for argument in maker.all_input_nodes:
        _note_read(site, argument, result)
    if op == "nll_loss" and len(maker.args) > 1:
        site.counted = aliases.values[_torch.source_of(maker, 1)]
    result.key_of[node] = key
    result.labels[node] = key
    result.labels[maker] = key
    result.sites.append(site)


def _name_view(graph: fx.GraphModule, node: fx.Node, maker: fx.Node, aliases: Aliases, result: Walk) -> None:
    """Give a view the key of its source, and a slice its own key."""
    root, value = aliases.root[node], aliases.values[node]
    source = next((n for n in maker.all_input_nodes if aliases.root[n] is root and n in result.key_of), None)
    if source is None:
        return
    key = result.key_of[node] = result.key_of[source]
    if key in result.seen or value.numel() >= aliases.values[source].numel() or _is_written_later(node, aliases):
        return
    module = strip_module_path(_torch.module_path(maker))
    site = _site(result.fresh_key("loss" if module is None else module, SLICE), SLICE, node, graph, value, result)
    site.module = module or ""
    site.source = source_line(maker)
    _note_read(site, source, result)
    result.key_of[node] = site.key
    result.sites.append(site)


def _note_read(site: Site, argument: fx.Node, result: Walk) -> None:
    """Record that the operator of a site reads the tensor whose values ``argument`` holds."""
    key = result.key_of.get(argument)
    if key is not None and key not in site.inputs:
        site.inputs, site.reads = (*site.inputs, key), (*site.reads, dtype_of(result.values[argument]))


def _is_written_later(node: fx.Node, aliases: Aliases) -> bool:
    """Whether a later node changes the storage of ``node`` in place."""
    root, later = aliases.root[node], node.next
    while later.op != "output":
        target = written(later)
        if target is not None and aliases.root[target] is root:
            return True
        later = later.next
    return False


def _site(key: str, op: str, node: fx.Node, graph: fx.GraphModule, value: Tensor, result: Walk) -> Site:
    return Site(key=key, op=op, node=node, after=node, owner=graph, value=value, counted=value)


def operator_name(target: Any) -> str:
    """Return the plain name: ``conv2d`` for ``torch.conv2d``, ``add`` for ``operator.iadd`` and ``Tensor.add_``."""
    name = target if isinstance(target, str) else getattr(target, "__name__", type(target).__name__)
    name = re.sub(r"^i(add|sub|mul|truediv|pow|matmul)$", r"\1", str(name)).strip("_")
    return _CANONICAL.get(name, name)


def source_line(node: fx.Node) -> str:
    """Return ``file.py:line`` of the innermost frame of the user's code, with the last two parts of its path."""
    found = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [place for place in found if "/torch/" not in place[0]] or found
    if not own:
        return ""
    path, line = own[-1]
    return "/".join(path.split("/")[-2:]) + f":{line}"


def dtype_of(value: Tensor) -> str:
    """Return the name of a tensor's dtype, as used in the table."""
    return dtype_name(value.dtype)


def converts(node: fx.Node, walked: Walk) -> bool:
    """Whether a node is the user's conversion of a tensor to another dtype."""
    source = node.args[0] if node.args else None
    if operator_name(node.target) not in CONVERSIONS | {"to"} or not isinstance(source, fx.Node):
        return False
    before, after = walked.values.get(source), walked.values.get(node)
    return isinstance(before, Tensor) and isinstance(after, Tensor) and before.dtype != after.dtype


def is_opaque(node: fx.Node, walked: Walk) -> bool:
    """Whether an operator is known to run only in the dtypes for which it was written.

    This holds if it reads a tensor that hides its data, such as a weight quantized by a library; if it belongs to a
    library; or if it has its own body, as an ``autograd.Function`` has.
    """
    wrapped = any(_torch.is_wrapper(walked.values.get(argument)) for argument in node.all_input_nodes)
    return wrapped or _torch.is_foreign(node.target)


def floating_arguments(node: fx.Node, walked: Walk) -> Iterator[fx.Node]:
    """Yield the floating-point tensors among the arguments of a node, each once."""
    for argument in node.all_input_nodes:
        if walked.plans(walked.values.get(argument)):
            yield argument


def _carries(value: Any) -> bool:
    """Whether a value can carry a gradient: sizes, indices and masks made from a tensor cannot."""
    if isinstance(value, (tuple, list)):
        return any(map(_carries, value))
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def is_complex(value: Any) -> bool:
    """Whether a value is a complex tensor, or a tuple with one."""
    if isinstance(value, (tuple, list)):
        return any(map(is_complex, value))
    return isinstance(value, Tensor) and value.is_complex()


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
