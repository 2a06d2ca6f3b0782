"""The piece of a step that is being recorded, and the pieces that have been compiled."""

import operator
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from assign import _torch
from assign.errors import TraceError
from assign.plan.keys import LOSS, Key
from assign.tracing.deferred import Deferred
from assign.tracing.pieces import Crossing, Piece
from assign.tracing.sizes import Number, Sizes, arguments_of, axes_of, compare, generalized
from assign.tracing.user_code import Frames

Run = Callable[..., Sequence[Any]]
CompilePiece = Callable[[fx.GraphModule, Sequence[Any], Piece], Run]


@dataclass(slots=True, kw_only=True)
class CompiledPiece:
    """A compiled piece: how to run it, and facts about its results and names.

    Attributes:
        results: the facts about each result that later pieces need.
        entered: position of an input → the key that it got in this piece.
        counts: number of operators of each name in the step up to the end of this piece.
    """

    run: Run
    results: list[Crossing]
    entered: dict[int, str]
    counts: Counter[str]


@dataclass(slots=True, kw_only=True)
class Call:
    """A torch function that has been recorded.

    Attributes:
        key: identifies the function, its arguments and its place. A call with the same key, at the same place of a
            script, has the same result.
        node: node of its result.
        inputs: placeholders of the real tensors that this call was the first to read.
        made: its result without data.
        changed: positions, among its tensor arguments, of those that it changes or returns.
        parametric: whether its result depends on a parameter.
        draws: whether it draws random numbers.
        modes: modes after the call: whether gradients are on; the autocast region, and the node that enters it.
        end: number of nodes, entries of the signature and numbers in the script after the call.
    """

    key: Any
    node: fx.Node
    inputs: tuple[fx.Node, ...]
    made: Any
    changed: tuple[int, ...]
    parametric: bool
    draws: bool
    modes: tuple[bool, Any, fx.Node | None]
    end: tuple[int, int, int]


@dataclass(slots=True)
class Script:
    """The recording of a piece: the same in every step that calls the same functions.

    Attributes:
        signature: the nodes as data, without their integers, which are in ``numbers``. Both together show whether a
            piece was compiled before.
        calls: the functions, in order.
        results: the nodes that the piece computes, once it has ended.
        compiled: the compiled piece, with the earlier operator counts of its ``modules`` and the context for which it
            is valid.
    """

    graph: fx.Graph = field(default_factory=fx.Graph)
    nodes: list[fx.Node] = field(default_factory=list)
    index: dict[fx.Node, int] = field(default_factory=dict)
    signature: list[Any] = field(default_factory=list)
    numbers: list[Number] = field(default_factory=list)
    crossing: dict[fx.Node, Crossing] = field(default_factory=dict)
    constants: set[fx.Node] = field(default_factory=set)
    calls: list[Call] = field(default_factory=list)
    results: list[fx.Node] | None = None
    compiled: tuple[Any, Any, CompiledPiece] | None = None
    modules: set[str] | None = None

    def count(self, node: fx.Node) -> None:
        """Give a new node its index."""
        self.index[node] = len(self.nodes)
        self.nodes.append(node)

    def relevant(self, counts: Counter[str]) -> tuple[tuple[str, int], ...]:
        """Return the counts of operators in modules that this piece calls."""
        if self.modules is None:
            stacks = (node.meta.get("nn_module_stack", (LOSS,)) for node in self.nodes if node.op != "placeholder")
            self.modules = {next(iter(stack)) for stack in stacks}
        return tuple(sorted((stem, n) for stem, n in counts.items() if Key(stem).module in self.modules))

    def beginning(self, calls: int) -> tuple["Script", dict[fx.Node, fx.Node]]:
        """Make a new script that holds the first ``calls`` calls of this one.

        Returns:
            The new script, and a map from each copied node to its copy.
        """
        nodes, signature, numbers = self.calls[calls - 1].end if calls else (0, 0, 0)
        result, twins = Script(), dict[fx.Node, fx.Node]()
        for node in self.nodes[:nodes]:
            twins[node] = result.graph.node_copy(node, twins.__getitem__)
            result.count(twins[node])
        result.signature = self.signature[:signature]
        result.numbers = [number._replace(node=twins[number.node]) for number in self.numbers[:numbers]]
        result.crossing = {twins[node]: each for node, each in self.crossing.items() if node in twins}
        result.constants = {twins[node] for node in self.constants if node in twins}
        for call in self.calls[:calls]:
            grad, autocast, entered = call.modes
            modes = grad, autocast, twins.get(entered) if entered else None
            inputs = tuple(twins[node] for node in call.inputs)
            result.calls.append(replace(call, node=twins[call.node], inputs=inputs, modes=modes))
        return result, twins


@dataclass(slots=True)
class Pending:
    """The piece that is being recorded; it follows the script of an earlier step as long as the calls are the same.

    Attributes:
        script: the recording.
        done: number of its calls that have happened in this step.
        inputs: id of a tensor → its placeholder and the tensor.
        deferred: the deferred tensors that have a node in this piece.
        memory: memory of its inputs.
        dirty: memory that an operator has changed in place → whether the written value depends on a parameter.
        values: values of nodes that were computed in addition to the graph.
        held: in a whole step, nodes whose tensors the user's code held where a piece would have ended.
        unrepeatable: whether an operator has changed something in place or drawn random numbers.
        grad: whether gradients are on after the last node.
        autocast: the autocast region after the last node.
        entered: the node that enters it.
    """

    script: Script = field(default_factory=Script)
    done: int = 0
    inputs: dict[int, tuple[fx.Node, Tensor]] = field(default_factory=dict)
    deferred: list[weakref.ref[Deferred]] = field(default_factory=list)
    memory: set[int] = field(default_factory=set)
    dirty: dict[int, bool] = field(default_factory=dict)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    held: set[fx.Node] = field(default_factory=set)
    unrepeatable: bool = False
    draws: bool = False
    grad: bool = True
    autocast: tuple[Any, ...] | None = None
    entered: fx.Node | None = None

    @property
    def size(self) -> int:
        """Return the number of nodes of this step so far."""
        return self.script.calls[self.done - 1].end[0] if self.done else 0

    def alive(self) -> Iterator[Deferred]:
        """Yield the deferred tensors of this piece that the user's code still holds."""
        for each in self.deferred:
            x = each()
            if x is not None and x.computed is None:
                yield x

    # ---- following a script

    def next(self, key: Any) -> Call | None:
        """Return the script's next call if it has this key, and mark it as done; else None."""
        calls = self.script.calls
        if self.done == len(calls) or calls[self.done].key != key:
            return None
        call = calls[self.done]
        self.done += 1
        self.grad, self.autocast, self.entered = call.modes
        return call

    def leave_script(self) -> None:
        """Continue with an own script: a copy of the calls that have happened in this step."""
        if self.script.results is None:
            return
        self.script, twins = self.script.beginning(self.done)
        self.inputs = {key: (twins[node], tensor) for key, (node, tensor) in self.inputs.items()}
        self.values = {twins[node]: value for node, value in self.values.items() if node in twins}
        self.entered = twins.get(self.entered) if self.entered else None
        for x in self.alive():
            x.node = twins[x.node]

    def ends_as_before(self, results: Sequence[fx.Node], counts: Counter[str], context: Any) -> CompiledPiece | None:
        """Return the script's compiled piece if this step has followed it to its end and wants the same results."""
        script = self.script
        if script.compiled is None or self.done < len(script.calls) or script.results != list(results):
            return None
        before, around, compiled = script.compiled
        return compiled if (before, around) == (script.relevant(counts), context) else None

    # ---- recording

    def add(self, func: Any, args: Any, kwargs: Any, *, path: str | None, region: int, frames: Frames) -> fx.Node:
        """Add a node for a torch function and return it.

        Args:
            func: the function, or the method of a tensor.
            args: with nodes in place of tensors.
            kwargs: with nodes in place of tensors.
            path: path of the module that calls it; None outside the model.
            region: number of its checkpointed block; 0 for none.
            frames: frames of the user's code.
        """
        script = self.script
        if _torch.is_method(func):
            node = script.graph.call_method(func.__name__, args, kwargs)
        else:
            node = script.graph.call_function(func, args, kwargs)
        if path is not None:
            node.meta["nn_module_stack"] = {path: (f"L['self'].model{'.' * bool(path)}{path}", nn.Module)}
        if region:
            _torch.ask_recompute(node, region)
        node.meta["frames"] = frames
        script.count(node)
        key = node.target if node.op == "call_method" else id(node.target)
        script.signature.append((key, path, region, frozen((args, kwargs), script.index.__getitem__, [])))
        script.numbers += arguments_of(node)
        return node

    def add_input(self, tensor: Tensor, example: Tensor, *, owner: Any, crossing: Crossing | None) -> fx.Node:
        """Add a placeholder and return it.

        Args:
            tensor: the real tensor.
            example: the tensor without data, in the dtype that the user's code sees.
            owner: identifies the tensor: the id of a parameter or buffer, ``"batch"``, or None.
            crossing: facts about the result of an earlier piece.
        """
        script = self.script
        node = script.graph.placeholder(f"input_{len(self.inputs)}")
        node.meta["example_value"] = example
        script.count(node)
        if crossing is not None:
            script.crossing[node] = crossing
        elif owner is None:
            script.constants.add(node)
        fixed = isinstance(owner, int)
        if not fixed:
            script.numbers += axes_of(node, tensor)
        layout = (tuple(tensor.shape), tensor.stride()) if fixed else (tensor.dim(), tensor.is_contiguous())
        script.signature.append(("input", owner, crossing, *layout, *_facts(tensor)))
        self.hold_input(node, tensor)
        return node

    def hold_input(self, node: fx.Node, tensor: Tensor) -> None:
        """Use ``tensor`` as the value of a placeholder in this step."""
        self.inputs[id(tensor)] = (node, tensor)
        self.values[node] = tensor
        self.memory.add(_torch.memory_of(tensor))

    def follow_modes(self) -> None:
        """Add nodes for the modes in which the user's code runs: without gradients, under autocast."""
        script = self.script
        if self.grad != torch.is_grad_enabled():
            self.grad = torch.is_grad_enabled()
            self._add_mode(script.graph.call_function(_torch.SET_GRAD_MODE, (self.grad,)), ("grad", self.grad))
        modes = _torch.autocast_modes()
        if modes != (self.autocast or _torch.NO_AUTOCAST):
            if self.entered is not None:
                self._add_mode(script.graph.call_function(_torch.EXIT_AUTOCAST, (self.entered,)), "exit")
            self.entered = None
            if modes != _torch.NO_AUTOCAST:
                self.entered = script.graph.call_function(_torch.ENTER_AUTOCAST, modes)
                self._add_mode(self.entered, ("autocast", modes))
            self.autocast = modes

    def _add_mode(self, node: fx.Node, entry: Any) -> None:
        self.script.count(node)
        self.script.signature.append(entry)

    def note(self, key: Any, node: fx.Node, made: Any, inputs: Sequence[fx.Node], **facts: Any) -> None:
        """Add a call to the script."""
        script = self.script
        end = len(script.nodes), len(script.signature), len(script.numbers)
        modes = self.grad, self.autocast, self.entered
        call = Call(key=key, node=node, made=made, inputs=tuple(inputs), modes=modes, end=end, **facts)
        script.calls.append(call)
        self.done += 1

    def end(self, results: Sequence[fx.Node]) -> None:
        """Close the script, which computes these nodes."""
        script = self.script
        script.results = list(results)
        script.signature.append(("results", tuple(script.index[node] for node in results), self.grad, self.autocast))

    def ended(self, *, grad: bool) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
        """Return an editable copy of the script's graph with its results, and a map from each node to its copy."""
        script = self.script
        assert script.results is not None
        graph, twins = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in sorted(script.nodes, key=lambda node: node.op != "placeholder"):
            twins[node] = graph.node_copy(node, twins.__getitem__)
            frames = twins[node].meta.pop("frames", None)
            if frames is not None:
                lines = (f'  File "{file}", line {line}, in {code}\n' for file, line, code in frames)
                twins[node].meta["stack_trace"] = "".join(lines)
        if self.entered is not None:
            graph.call_function(_torch.EXIT_AUTOCAST, (twins[self.entered],))
        if self.grad != grad:
            graph.call_function(_torch.SET_GRAD_MODE, (grad,))
        graph.output(tuple(twins[node] for node in script.results))
        held = {twins[node] for node in self.held}
        for node in graph.find_nodes(op="call_function", target=operator.getitem):
            if not node.users and node not in held:  # an unread part of a result
                graph.erase_node(node)
        return graph, twins


def frozen(value: Any, leaf: Callable[[Any], Any], numbers: list[int]) -> Any:
    """Return arguments of a call as data, without their integers, which are appended to ``numbers``.

    Args:
        value: arguments, nested in any way.
        leaf: returns the replacement of a node or a tensor.
        numbers: the integers of all calls so far; extended in place.
    """
    if isinstance(value, (fx.Node, Tensor)):
        return "node", leaf(value)
    if isinstance(value, (tuple, list)):
        return (type(value).__name__, *(frozen(each, leaf, numbers) for each in value))
    if isinstance(value, dict):
        return tuple((key, frozen(each, leaf, numbers)) for key, each in value.items())
    if isinstance(value, slice):
        return ("slice", *(frozen(each, leaf, numbers) for each in (value.start, value.stop, value.step)))
    if isinstance(value, np.generic):
        value = value.item()
    if type(value) is int:
        numbers.append(value)
        return int
    if is_dataclass(value) and not isinstance(value, type):
        own: list[int] = []
        parts = frozen({each.name: getattr(value, each.name) for each in fields(value)}, leaf, own)
        return type(value), parts, tuple(own)
    if not isinstance(value, Hashable):
        return _Itself(value)
    return (type(value), repr(value) if isinstance(value, float) else value)


@dataclass(frozen=True, eq=False)
class _Itself:
    """A wrapper for an unhashable value: compared by identity."""

    value: Any


def facts_of(tensor: Tensor) -> Any:
    """Return the properties of a tensor on which its placeholder depends."""
    return tuple(tensor.shape), tensor.stride(), *_facts(tensor)


def _facts(tensor: Tensor) -> Any:
    return tensor.dtype, tensor.device, tensor.requires_grad


class CompiledPieces:
    """The pieces of a step that have been compiled.

    Args:
        compile_piece: makes a function from a captured graph, its inputs and the facts known about the piece.
    """

    def __init__(self, compile_piece: CompilePiece) -> None:
        self._compile_piece = compile_piece
        self._known: dict[Any, list[tuple[Sizes, CompiledPiece]]] = {}

    def find(
        self,
        pending: Pending,
        counts: Counter[str],
        mode: _torch.FakeTensorMode,
        *,
        context: Any,
        whole: bool,
        place: str,
    ) -> CompiledPiece:
        """Return the function of a recorded piece; it is compiled if there is none for these operators and numbers.

        Args:
            pending: the piece that has been recorded.
            counts: number of operators of each name in the step before this piece.
            mode: mode of the tensors without data in the graph.
            context: other values on which the function depends.
            whole: whether the piece is the whole step.
            place: ``file:line`` where it ends.
        Raises:
            TraceError: it was compiled as often as Dynamo would compile it, each time for other numbers.
        """
        script = pending.script
        before = script.relevant(counts)
        inputs = [tensor for _, tensor in pending.inputs.values()]
        values = tuple(number.value for number in script.numbers)
        variants = self._known.setdefault((tuple(script.signature), before, context), [])
        for sizes, compiled in variants:
            if sizes.allow(values, inputs):
                return compiled
        if len(variants) >= _torch.recompile_limit():
            raise TraceError(
                f"a step that is captured in several pieces has been compiled {len(variants)} times for the same "
                f"operators with other sizes or other integers.\n  at: {place}\n"
                f"  Allowed: {_torch.recompile_limit()} times ({_torch.RECOMPILE_LIMIT}).\n"
                "  Pad the batches to a few sizes, keep numbers that change in tensors, or raise the limit."
            )
        seen = (compare(script.numbers, sizes.numbers) for sizes, _ in reversed(variants))
        sizes = next((each for each in seen if each is not None), Sizes(numbers=values))
        compiled = self._compile(pending, sizes, inputs, counts, mode, whole=whole)
        variants.append((sizes, compiled))
        return compiled

    def _compile(
        self,
        pending: Pending,
        sizes: Sizes,
        inputs: Sequence[Any],
        counts: Counter[str],
        mode: _torch.FakeTensorMode,
        *,
        whole: bool,
    ) -> CompiledPiece:
        """Compile a piece for all the batches that ``sizes`` allows."""
        script, (graph, of_graph) = pending.script, pending.ended(grad=torch.is_grad_enabled())

        def compiled(
            graph: fx.Graph, examples: Sequence[Any], twins: Mapping[fx.Node, fx.Node], mode: _torch.FakeTensorMode
        ) -> CompiledPiece:
            piece = Piece(
                whole=whole,
                counts=Counter(counts),
                crossing={twins[node]: crossing for node, crossing in script.crossing.items()},
                constants=frozenset(twins[node] for node in script.constants),
            )
            with _torch.tracing_context(mode):
                run = self._compile_piece(fx.GraphModule(nn.Module(), graph), examples, piece)
            places = graph.find_nodes(op="placeholder")
            entered = {place: piece.entered[node] for place, node in enumerate(places) if node in piece.entered}
            return CompiledPiece(run=run, results=piece.results, entered=entered, counts=piece.counts)

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The .grad attribute")  # torch reads that of every input
            if sizes.varying:
                try:
                    numbers = [number._replace(node=of_graph[number.node]) for number in script.numbers]
                    any_size, twins, examples, symbolic = generalized(graph, numbers, sizes, inputs)
                    found = compiled(
                        any_size, examples, {n: twins[t] for n, t in of_graph.items() if t in twins}, symbolic
                    )
                    sizes.guard = _torch.size_guard(symbolic, examples)
                except (RuntimeError, TypeError, AssertionError, IndexError):  # torch's many ways to say that a size
                    sizes.varying = ()  # must be known
                else:
                    return found
            return compiled(graph, inputs, of_graph, mode)
