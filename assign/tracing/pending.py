"""The piece of a step that is being recorded, and those that have been compiled."""

import operator
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from assign import _torch
from assign.errors import TraceError
from assign.tracing.deferred import Deferred
from assign.tracing.pieces import Crossing, Piece
from assign.tracing.sizes import Number, Sizes, arguments_of, axes_of, compare, generalized

Run = Callable[..., Sequence[Any]]
CompilePiece = Callable[[fx.GraphModule, Sequence[Any], Piece], Run]


@dataclass(slots=True, kw_only=True)
class CompiledPiece:
    """How to run a piece that has been compiled, and what it says of its results and names.

    Attributes:
        results: what later pieces know of each result.
        entered: position of an input → the key that it got here.
        counts: how many operators of each name the step has had behind it.
    """

    run: Run
    results: list[Crossing]
    entered: dict[int, str]
    counts: Counter[str]


@dataclass(slots=True)
class Pending:
    """The piece that is being recorded.

    Attributes:
        inputs: by identity of the tensor: its placeholder and the tensor.
        signature: what each node is, as data, but for its integers, which are ``numbers``: together they tell whether
            a piece was compiled before.
        waiting: the deferred tensors that have a node here.
        memory: of its inputs; ``dirty``: of those that an operator has changed in place.
        values: of nodes that were computed beside the graph.
        unrepeatable: an operator has changed something in place or drawn random numbers.
        grad: whether gradients are on behind the last node.
    """

    graph: fx.Graph = field(default_factory=fx.Graph)
    inputs: dict[int, tuple[fx.Node, Tensor]] = field(default_factory=dict)
    signature: list[Any] = field(default_factory=list)
    numbers: list[Number] = field(default_factory=list)
    index: dict[fx.Node, int] = field(default_factory=dict)
    waiting: list[weakref.ref[Deferred]] = field(default_factory=list)
    crossing: dict[fx.Node, Crossing] = field(default_factory=dict)
    constants: set[fx.Node] = field(default_factory=set)
    modules: set[str] = field(default_factory=set)
    memory: set[int] = field(default_factory=set)
    dirty: set[int] = field(default_factory=set)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    unrepeatable: bool = False
    draws: bool = False
    grad: bool = True
    autocast: tuple[Any, ...] | None = None
    entered: fx.Node | None = None

    def alive(self) -> Iterator[Deferred]:
        """The deferred tensors of this piece that the user's code still holds."""
        for each in self.waiting:
            x = each()
            if x is not None and x.computed is None:
                yield x

    def add(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        *,
        path: str | None,
        region: int,
        frames: tuple[tuple[str, int, str], ...],
    ) -> fx.Node:
        """A node for a torch function.

        Args:
            path: of the module that calls it; None outside the model.
            region: number of the checkpointed block that it stands in; 0 for none.
            frames: of the user's code.
        """
        if _torch.is_method(func):
            node = self.graph.call_method(func.__name__, args, kwargs)
        else:
            node = self.graph.call_function(func, args, kwargs)
        if path is not None:
            node.meta["nn_module_stack"] = {path: (f"L['self'].model{'.' * bool(path)}{path}", nn.Module)}
        self.modules.add("loss" if path is None else path)
        if region:
            _torch.ask_recompute(node, region)
        node.meta["frames"] = frames
        self.index[node] = len(self.index)
        key = node.target if node.op == "call_method" else id(node.target)
        self.signature.append((key, path, region, _frozen((args, kwargs), self.index)))
        self.numbers += arguments_of(node)
        return node

    def add_input(
        self, tensor: Tensor, example: Tensor, *, owner: Any, crossing: Crossing | None, grad: bool
    ) -> fx.Node:
        """A placeholder.

        Args:
            example: the tensor without data, in the dtype that the user's code sees.
            owner: what tells it from others: the identity of a parameter or buffer, ``"batch"``, or None.
            crossing: what is known of the result of an earlier piece.
            grad: whether gradients are on where the piece begins.
        """
        node = self.graph.placeholder(f"input_{len(self.inputs)}")
        node.meta["example_value"] = example
        self.inputs[id(tensor)] = (node, tensor)
        self.values[node] = tensor
        self.memory.add(_torch.memory_of(tensor))
        self.index[node] = len(self.index)
        if crossing is not None:
            self.crossing[node] = crossing
        elif owner is None:
            self.constants.add(node)
        fixed = isinstance(owner, int)
        if not fixed:
            self.numbers += axes_of(node, tensor)
        layout = (tuple(tensor.shape), tensor.stride()) if fixed else (tensor.dim(), tensor.is_contiguous())
        facts = (*layout, tensor.dtype, tensor.device, tensor.requires_grad)
        self.signature.append(("input", owner, crossing, facts, grad))
        return node

    def follow_modes(self) -> None:
        """Nodes for the modes in which the user's code runs: without gradients, under autocast."""
        if self.grad != torch.is_grad_enabled():
            self.grad = torch.is_grad_enabled()
            self.graph.call_function(_torch.SET_GRAD_MODE, (self.grad,))
            self.signature.append(("grad", self.grad))
        modes = _torch.autocast_modes()
        if modes != (self.autocast or _torch.NO_AUTOCAST):
            if self.entered is not None:
                self.graph.call_function(_torch.EXIT_AUTOCAST, (self.entered,))
            self.entered = None
            if modes != _torch.NO_AUTOCAST:
                self.entered = self.graph.call_function(_torch.ENTER_AUTOCAST, modes)
            self.autocast = modes
            self.signature.append(("autocast", modes))

    def end(self, results: Sequence[fx.Node], *, grad: bool) -> None:
        """Close the graph, whose results these are, with gradients on or off as at its beginning."""
        if self.entered is not None:
            self.graph.call_function(_torch.EXIT_AUTOCAST, (self.entered,))
        if self.grad != grad:
            self.graph.call_function(_torch.SET_GRAD_MODE, (grad,))
        first = next(node for node in self.graph.nodes if node.op != "placeholder")
        for node in self.graph.find_nodes(op="placeholder"):
            first.prepend(node)
        self.graph.output(tuple(results))
        for node in self.graph.find_nodes(op="call_function", target=operator.getitem):
            if not node.users:  # a part of a result that nothing reads
                self.graph.erase_node(node)
        self.signature.append(("results", tuple(self.index[node] for node in results)))


class CompiledPieces:
    """The pieces of a step that have been compiled.

    Args:
        compile_piece: makes a function of a captured graph, its inputs and what is known of the piece.
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
        """The function of a recorded piece; compiled where there is none for these operators and numbers.

        Args:
            counts: how many operators of each name the step has had before.
            mode: of the tensors without data in the graph.
            context: what else the function hangs on.
            whole: the piece is the whole step.
            place: ``file:line`` where it ends.
        Raises:
            TraceError: it was compiled as often as Dynamo would compile it, each time for other numbers.
        """
        before = tuple(sorted((stem, n) for stem, n in counts.items() if stem.rpartition("/")[0] in pending.modules))
        inputs = [tensor for _, tensor in pending.inputs.values()]
        values = tuple(number.value for number in pending.numbers)
        variants = self._known.setdefault((tuple(pending.signature), before, context), [])
        for sizes, compiled in variants:
            if sizes.allow(values, inputs):
                return compiled
        if len(variants) >= _torch.recompile_limit():
            raise TraceError(
                f"a step that is captured in several pieces has been compiled {len(variants)} times for the same "
                f"operators with other sizes or other integers.\n  at: {place}\n"
                f"  Allowed: {_torch.recompile_limit()} times (torch._dynamo.config.recompile_limit).\n"
                "  Pad the batches to a few sizes, keep numbers that change in tensors, or raise the limit."
            )
        seen = (compare(pending.numbers, sizes.numbers) for sizes, _ in reversed(variants))
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
        """Compile a piece, for all the batches that ``sizes`` allow."""
        for node in pending.graph.nodes:
            frames = node.meta.pop("frames", None)
            if frames is not None:
                node.meta["stack_trace"] = "".join(f'  File "{f}", line {n}, in {c}\n' for f, n, c in frames)

        def compiled(
            graph: fx.Graph, examples: Sequence[Any], twins: Mapping[fx.Node, fx.Node], mode: _torch.FakeTensorMode
        ) -> CompiledPiece:
            piece = Piece(
                whole=whole,
                counts=Counter(counts),
                crossing={twins.get(node, node): crossing for node, crossing in pending.crossing.items()},
                constants=frozenset(twins.get(node, node) for node in pending.constants),
            )
            with _torch.tracing_context(mode):
                run = self._compile_piece(fx.GraphModule(nn.Module(), graph), examples, piece)
            places = graph.find_nodes(op="placeholder")
            entered = {place: piece.entered[node] for place, node in enumerate(places) if node in piece.entered}
            return CompiledPiece(run=run, results=piece.results, entered=entered, counts=piece.counts)

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The .grad attribute")  # torch looks at that of every input
            if sizes.varying:
                try:
                    graph, twins, examples, symbolic = generalized(pending.graph, pending.numbers, sizes, inputs)
                    found = compiled(graph, examples, twins, symbolic)
                except (RuntimeError, TypeError, AssertionError):  # torch says in many ways that a size must be known
                    sizes.varying = ()
                else:
                    sizes.guard = _torch.size_guard(symbolic, examples)
                    return found
            return compiled(pending.graph, inputs, {}, mode)


def _frozen(value: Any, index: dict[fx.Node, int]) -> Any:
    """Arguments of a node as hashable data, without their integers."""
    if isinstance(value, fx.Node):
        return ("node", index[value])
    if isinstance(value, (tuple, list)):
        return (type(value).__name__, *(_frozen(each, index) for each in value))
    if isinstance(value, dict):
        return tuple((key, _frozen(each, index)) for key, each in value.items())
    if isinstance(value, slice):
        return ("slice", *(_frozen(each, index) for each in (value.start, value.stop, value.step)))
    if type(value) is int:
        return int
    return (type(value), repr(value) if isinstance(value, float) else value)
