"""The second front end: a step that Dynamo cannot capture as one graph is recorded in several pieces.

The Python code of model and loss really runs. A ``TorchFunctionMode`` sees every torch function. What depends neither
on a parameter nor on a floating-point input (indices, masks, random numbers) is computed at once. The rest is recorded
as nodes of a graph, as Dynamo would write them, and the code goes on with *deferred* tensors, which have a shape and a
dtype but no data. Where the code needs a value (a branch, ``item()``, a shape that depends on data), the graph recorded
so far is closed as one *piece*: captured, compiled once, run. Later operators make the next piece.

A value that depends on inputs only, and not on a parameter, is computed beside the graph and does not end a piece.
"""

import contextlib
import functools
import operator
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from assign import _torch
from assign.errors import TraceError
from assign.tracing.kept_state import kept_state
from assign.tracing.pieces import Crossing, Piece
from assign.tracing.sizes import Number, Sizes, arguments_of, axes_of, compare, generalized

Run = Callable[..., Sequence[Any]]

_METADATA = frozenset(
    {
        "size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous", "is_floating_point", "is_complex",
        "element_size", "storage_offset", "get_device", "is_signed", "is_same_size", "__len__", "__hash__",
        "is_inference", "is_conj", "is_neg", "shape", "dtype", "device", "layout", "ndim", "itemsize", "nbytes",
        "is_cuda", "is_cpu", "is_mps", "is_xpu", "is_meta", "is_sparse", "is_sparse_csr", "is_quantized", "is_nested",
        "is_mkldnn", "names",
    }
)  # fmt: skip
"""Methods and attributes that a tensor without data answers."""

_OF_AUTOGRAD = frozenset({"requires_grad", "is_leaf", "grad_fn", "output_nr", "_version", "retains_grad"})
_TENSOR_ATTRIBUTES = frozenset({"T", "mT", "H", "mH", "real", "imag"})
_ON_VALUES = frozenset(
    {
        "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__complex__", "__contains__",
        "__repr__", "__format__", "__array__", "__deepcopy__", "__reduce_ex__", "data_ptr", "storage",
        "untyped_storage", "is_nonzero", "equal", "allclose", "backward", "grad", "__set__",
    }
)  # fmt: skip
"""Functions that need the values of their tensors."""

_ON_LEAVES = frozenset({"register_hook", "retain_grad", "register_post_accumulate_grad_hook", "requires_grad_"})
"""Functions that change what autograd does with a tensor: it must be a real one."""

_DRAWING = frozenset(
    {
        "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "bernoulli",
        "multinomial", "poisson", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout",
        "feature_alpha_dropout", "feature_dropout", "rrelu", "gumbel_softmax", "scaled_dot_product_attention",
        "multi_head_attention_forward", "lstm", "gru", "rnn_tanh", "rnn_relu", "fractional_max_pool2d",
        "fractional_max_pool3d", "normal_", "uniform_", "bernoulli_", "random_", "exponential_", "cauchy_",
        "log_normal_", "geometric_",
    }
)  # fmt: skip
"""Functions that draw random numbers, which must be drawn in the order of the user's code."""

_REFLECTED = {
    "__rsub__": operator.sub, "__rdiv__": operator.truediv, "__rtruediv__": operator.truediv, "__rpow__": operator.pow,
    "__rmul__": operator.mul, "__radd__": operator.add, "__rmatmul__": operator.matmul, "__rmod__": operator.mod,
    "__rfloordiv__": operator.floordiv,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Outside:
    """An operator that ran outside every piece.

    Attributes:
        op: its name; place: ``file:line`` of the user's code.
        elements: that it made, of tensors that carry a gradient to a parameter.
    """

    op: str
    place: str
    elements: int


@dataclass(slots=True, kw_only=True)
class _Compiled:
    """A piece that has been compiled: how to run it, and what it says of its results and names."""

    run: Run
    results: list[Crossing]
    entered: dict[int, str]
    counts: Counter[str]


@dataclass(slots=True)
class _Pending:
    """The piece that is being recorded.

    Attributes:
        inputs: by identity of the tensor: its placeholder and the tensor.
        signature: what each node is, as data, but for its integers, which are ``numbers``: together they tell whether
            a piece was compiled before.
        waiting: the deferred tensors that have a node here.
        written: nodes and memory that an operator has changed in place.
        grad: whether gradients are on behind the last node.
    """

    graph: fx.Graph = field(default_factory=fx.Graph)
    inputs: dict[int, tuple[fx.Node, Tensor]] = field(default_factory=dict)
    signature: list[Any] = field(default_factory=list)
    numbers: list[Number] = field(default_factory=list)
    index: dict[fx.Node, int] = field(default_factory=dict)
    waiting: list[weakref.ref[Any]] = field(default_factory=list)
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


class Recorder:
    """Runs a step in pieces.

    Attributes:
        reasons: why pieces ended: what was needed, and at which line of the user's code.
        outside: operators that depend on a parameter and ran outside every piece.
        pieces: how many the last step had.
    Args:
        step: the model and its loss as one module; its attribute ``model`` is the model.
        compile_piece: makes a function of a captured graph, its inputs and what is known of the piece.
        whole: record one graph, in which the code took the branches that it takes with these inputs. Values that the
            code needs are computed beside the graph.
    """

    def __init__(
        self,
        step: nn.Module,
        compile_piece: Callable[[fx.GraphModule, Sequence[Any], Piece], Run],
        *,
        whole: bool,
    ) -> None:
        self.step, self.whole = step, whole
        self.reasons: dict[str, str] = {}
        self.outside: dict[str, Outside] = {}
        self.pieces = 0
        self._compile = compile_piece
        self._compiled: dict[Any, list[tuple[Sizes, _Compiled]]] = {}
        self._seen: dict[tuple[str, int], Any] = {}
        self._varying: set[str] = set()
        self.applied: dict[Any, _torch.AppliedFunction] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.whole:
            return _Recording(self, args, kwargs).result()
        model = self.step.model
        assert isinstance(model, nn.Module)
        with kept_state(model):
            return _WholeRecording(self, args, kwargs).result()

    def varies(self, place: str, number: int, value: Any) -> bool:
        """Whether a value that the code read at this place has ever differed from step to step."""
        if self._seen.setdefault((place, number), value) != value:
            self._varying.add(place)
        return place in self._varying

    def compiled(
        self,
        signature: Any,
        numbers: Sequence[Number],
        inputs: Sequence[Tensor],
        make: Callable[[Sizes], _Compiled],
        place: str,
    ) -> _Compiled:
        """The compiled piece with this signature that allows these numbers; made where there is none.

        Raises:
            TraceError: it was made as often as Dynamo would compile it, each time for other numbers.
        """
        values = tuple(number.value for number in numbers)
        variants = self._compiled.setdefault(signature, [])
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
        seen = (compare(numbers, sizes.numbers) for sizes, _ in reversed(variants))
        sizes = next((each for each in seen if each is not None), Sizes(numbers=values))
        variants.append((sizes, make(sizes)))
        return variants[-1][1]

    def compile(self, graph: fx.GraphModule, inputs: Sequence[Any], piece: Piece) -> _Compiled:
        """Compile a piece."""
        run = self._compile(graph, inputs, piece)
        places = graph.graph.find_nodes(op="placeholder")
        entered = {place: piece.entered[node] for place, node in enumerate(places) if node in piece.entered}
        return _Compiled(run=run, results=piece.results, entered=entered, counts=piece.counts)

    def report(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Where and why pieces ended, and which operators ran outside every piece, a line each."""
        breaks = tuple(f"{place}: {reason}" for place, reason in self.reasons.items())
        outside = tuple(f"{each.place}: {each.op}, {each.elements:,} elements" for each in self.outside.values())
        return breaks, outside


class _Recording(TorchFunctionMode):
    """One run of a step."""

    def __init__(self, recorder: Recorder, args: Any, kwargs: Any) -> None:
        super().__init__()
        self.recorder, self.args, self.kwargs = recorder, args, kwargs
        model = recorder.step.model
        assert isinstance(model, nn.Module)
        self.parameters = {id(p) for p in model.parameters()}
        self.buffers = {id(b) for b in model.buffers()}
        self.paths = {id(m): name for name, m in model.named_modules()}
        self.batch = {id(t) for t in _tensors((args, kwargs)) if t.is_floating_point() or t.is_complex()}
        self.fake_mode = _torch.FakeTensorMode(allow_non_fake_inputs=True)
        self.counts: Counter[str] = Counter()
        self.stack: list[str | None] = []
        self.grad = torch.is_grad_enabled()
        self.reads: Counter[str] = Counter()
        self.pieces = 0
        self.region = 0
        self.entered: dict[int, str] = {}
        self.fakes: dict[int, tuple[Tensor, Tensor]] = {}
        self.pending = _Pending(grad=self.grad)

    def result(self) -> Any:
        """Run the step; deferred tensors in its result are replaced by real ones."""
        functions = _torch.recorded_functions(self._apply_function, self._checkpointed)
        with self._module_paths(), _torch.as_if_compiling(), functions, self:
            returned = self.recorder.step.forward(*self.args, **self.kwargs)
        self._close("", [x for x in pytree.tree_leaves(returned) if isinstance(x, Deferred)])
        self.recorder.pieces = self.pieces
        return pytree.tree_map(lambda x: x.computed_value if isinstance(x, Deferred) else x, returned)

    # ---- what happens at each torch function

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._attribute(func, args)
        tensors = list(_tensors((args, kwargs)))
        if name in _METADATA or not tensors:
            self._keep_order(name)
            return _plain(func, args, kwargs)
        if name in _ON_VALUES:
            return self._on_values(func, args, kwargs)
        if name in _ON_LEAVES:
            return self._on_leaf(func, args, kwargs)
        if not any(map(self._is_recorded, tensors)) and not self._touches(name, tensors, kwargs):
            self._keep_order(name)
            return _plain(func, args, kwargs)
        return self._record(func, args, kwargs)

    def _keep_order(self, name: str) -> None:
        """Random numbers are drawn in the order of the user's code: first those of the pending piece."""
        if name in _DRAWING and self.pending.draws:
            self._close(f"{name} draws random numbers, and the operators before it do so too")

    def _is_recorded(self, x: Tensor) -> bool:
        return isinstance(x, Deferred) or id(x) in self.parameters or id(x) in self.batch or x.requires_grad

    def _touches(self, name: str, tensors: Sequence[Tensor], kwargs: Any) -> bool:
        """Whether a function on real tensors reads what the pending piece will write, or writes what it will read."""
        pending = self.pending
        if pending.dirty and any(_torch.memory_of(x) in pending.dirty for x in tensors):
            return True
        writes = (name.endswith("_") and not name.endswith("__")) or name == "__setitem__" or "out" in kwargs
        return bool(writes and any(_torch.memory_of(x) in pending.memory for x in tensors))

    def _attribute(self, func: Any, args: Any) -> Any:
        name, x = func.__self__.__name__, args[0]
        if name in _METADATA or not self._is_recorded(x):
            return _plain(func, args, {})
        if name in _OF_AUTOGRAD:
            return _plain(func, (self._fake(x) if isinstance(x, Deferred) else x,), {})
        if name == "data":
            return self._record(Tensor.detach, (x,), {})
        if name in _TENSOR_ATTRIBUTES:
            return self._record(getattr, (x, name), {})
        if name == "grad" and isinstance(x, Deferred) and x.computed is None:
            return None
        return self._on_values(func, args, {})

    def _on_leaf(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call a function on a tensor that has to be real from now on."""
        x = args[0]
        if isinstance(x, Deferred) and x.computed is None:
            self._close(f"{func.__name__} needs a real tensor")
        value = _plain(func, *_map(_unwrapped, (args, kwargs)))
        if isinstance(x, Deferred):
            x.parametric |= x.computed_value.requires_grad
            x.fake = self._without_data(x.computed_value)
        return x if isinstance(value, Tensor) else value

    def _on_values(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call a function on the values of its tensors."""
        name = getattr(func, "__name__", str(func))
        place = _place(self._where())
        if name in ("grad", "backward"):
            raise TraceError(
                f"trace: {name} is called within the step; a planned step has one backward pass, behind its forward "
                f"pass, and cannot be differentiated twice.\n  at: {place}\n"
                "  Hint: compute this part (a gradient penalty, say) with the model itself, without a plan."
            )
        real = self._real((args, kwargs), f"{name} needs a value")
        value = _plain(func, *real)
        if name in ("__bool__", "item", "__int__", "__index__", "tolist"):
            number = self.reads[place]
            self.reads[place] += 1
            if self.recorder.varies(place, number, repr(value)):
                self._close("a value that differs from step to step is read")
        return value

    def _real(self, values: Any, reason: str) -> Any:
        """``values`` with real tensors in place of deferred ones."""
        tensors = list(_tensors(values))
        known = {id(x): self._beside(x) for x in tensors if isinstance(x, Deferred)}
        dirty = self.pending.dirty
        if any(value is None for value in known.values()) or (
            dirty and any(_torch.memory_of(x) in dirty for x in tensors if id(x) not in known)
        ):
            self._close(reason)
            known = {}
        return _map(lambda x: known[id(x)] if id(x) in known else _unwrapped(x), values)

    def _beside(self, x: "Deferred") -> Tensor | None:
        """The value of a tensor, if it is known or depends on no parameter and can be computed beside the graph."""
        if x.computed is not None:
            return x.computed_value
        if x.parametric or self.pending.unrepeatable:
            return None
        values, nodes = self.pending.values, [x.node]
        while nodes:
            node = nodes[-1]
            missing = [n for n in node.all_input_nodes if n not in values]
            if node in values or not missing:
                nodes.pop()
                if node not in values:
                    values[node] = _run_node(node, values)
            else:
                nodes += missing
        found: Tensor = values[x.node]
        return found

    # ---- recording

    def _record(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = getattr(func, "__name__", "")
        if name in _REFLECTED:
            func, args = _REFLECTED[name], (args[1], args[0])
        elif name == "__getitem__":
            func, args = operator.getitem, (args[0], self._indices(args[1]))
        elif name == "__setitem__":
            func, args = operator.setitem, (args[0], self._indices(args[1]), args[2])
        elif _torch.is_inlined(func):
            with self:
                return _torch.unchecked(func)(*args, **kwargs)
        fake_args, fake_kwargs = _map(self._fake, (args, kwargs))
        try:
            with self.fake_mode:
                made = _plain(func, fake_args, fake_kwargs)
        except _torch.NEEDS_DATA:
            return self._run_outside(func, args, kwargs)
        if func is not operator.setitem and not any(True for _ in _tensors(made)):
            return made  # a fact about tensors, not a tensor
        return self._write(func, args, kwargs, made)

    def _write(self, func: Any, args: Any, kwargs: Any, made: Any) -> Any:
        """A node for a function, and deferred tensors for its results."""
        pending, name = self.pending, getattr(func, "__name__", "")
        self._follow_modes()
        owners = {id(self._fake(x)): x for x in _tensors((args, kwargs))}
        node_args, node_kwargs = _map(self._node, (args, kwargs))
        node = self._add(func, node_args, node_kwargs)
        node.meta["example_value"] = made
        parametric = any(map(self._is_parametric, owners.values()))
        changed = [owners[id(x)] for x in _tensors(made) if id(x) in owners]
        if func is operator.setitem:
            changed = [args[0]]
        pending.draws |= name in _DRAWING
        pending.unrepeatable |= bool(changed) or name in _DRAWING
        for x in changed:
            if isinstance(x, Deferred):
                x.parametric |= parametric
                self._check_shape(x)
            else:
                pending.dirty.add(_torch.memory_of(x))
        return self._wrap(node, made, owners, parametric)

    def _add(self, func: Any, args: Any, kwargs: Any) -> fx.Node:
        pending = self.pending
        if _torch.is_method(func):
            node = pending.graph.call_method(func.__name__, args, kwargs)
        else:
            node = pending.graph.call_function(func, args, kwargs)
        path = self.stack[-1] if self.stack else None
        if path is not None:
            node.meta["nn_module_stack"] = {path: (f"L['self'].model{'.' * bool(path)}{path}", nn.Module)}
            pending.modules.add(path)
        else:
            pending.modules.add("loss")
        if self.region:
            _torch.ask_recompute(node, self.region)
        node.meta["frames"] = self._where()
        pending.index[node] = len(pending.index)
        key = node.target if node.op == "call_method" else id(node.target)
        pending.signature.append((key, path, self.region, _frozen((args, kwargs), pending.index)))
        pending.numbers += arguments_of(node)
        return node

    def _wrap(self, node: fx.Node, made: Any, owners: dict[int, Tensor], parametric: bool) -> Any:
        """Results of a node: tensors as deferred ones, each part of a tuple with a node of its own."""
        if isinstance(made, Tensor):
            return owners[id(made)] if id(made) in owners else self._deferred(node, made, parametric)
        if isinstance(made, (tuple, list)):
            parts = []
            for position, each in enumerate(made):
                if isinstance(each, (Tensor, tuple, list)):
                    part = self._add(operator.getitem, (node, position), {})
                    part.meta["example_value"] = each
                    parts.append(self._wrap(part, each, owners, parametric))
                else:
                    parts.append(each)
            return _like(made, parts)
        return made

    def _deferred(self, node: fx.Node, made: Tensor, parametric: bool) -> "Deferred":
        x: Deferred = _torch.wrapper_like(Deferred, made)
        x.setup(self, node, made, parametric)
        self.pending.waiting.append(weakref.ref(x))
        return x

    def _fake(self, x: Tensor) -> Tensor:
        if isinstance(x, Deferred):
            return x.fake
        if id(x) not in self.fakes:
            self.fakes[id(x)] = (x, self._without_data(x))
        return self.fakes[id(x)][1]

    def _without_data(self, x: Tensor) -> Tensor:
        """A fake tensor like ``x``; no leaf of autograd's where ``x`` is none."""
        if x.is_leaf:
            leaf: Tensor = self.fake_mode.from_tensor(x, static_shapes=True)
            return leaf
        with self.fake_mode, torch.enable_grad():
            fake: Tensor = self.fake_mode.from_tensor(x.detach().requires_grad_(), static_shapes=True).clone()
            return fake

    def _node(self, x: Tensor) -> fx.Node:
        """The node of a tensor in the pending piece: its operator's, or an input of the piece."""
        pending = self.pending
        if isinstance(x, Deferred):
            if x.computed is None:
                return x.node
            crossing, tensor = x.crossing, x.computed
        else:
            crossing, tensor = self._crossing(x), x
        if id(tensor) not in pending.inputs:
            node = pending.graph.placeholder(f"input_{len(pending.inputs)}")
            node.meta["example_value"] = x.fake if isinstance(x, Deferred) else self._fake(x)
            pending.inputs[id(tensor)] = (node, tensor)
            pending.values[node] = tensor
            pending.memory.add(_torch.memory_of(tensor))
            pending.index[node] = len(pending.index)
            known = id(tensor) in self.parameters or id(tensor) in self.buffers or id(tensor) in self.batch
            if crossing is not None:
                pending.crossing[node] = crossing
            elif not known:
                pending.constants.add(node)
            fixed = known and id(tensor) not in self.batch
            if not fixed:
                pending.numbers += axes_of(node, tensor)
            which = id(tensor) if fixed else id(tensor) in self.batch
            layout = (tuple(tensor.shape), tensor.stride()) if fixed else (tensor.dim(), tensor.is_contiguous())
            facts = (*layout, tensor.dtype, tensor.device, tensor.requires_grad)
            pending.signature.append(("input", which, crossing, facts, self.grad))
        return pending.inputs[id(tensor)][0]

    def _crossing(self, x: Tensor) -> Crossing | None:
        """What is known of a real tensor that an earlier piece read, or an operator outside every piece made."""
        if id(x) in self.entered:
            return Crossing(key=self.entered[id(x)], parametric=False, depends=True)
        made_outside = x.requires_grad and id(x) not in self.parameters and id(x) not in self.batch
        return Crossing(key="", parametric=True, depends=True) if made_outside else None

    def _is_parametric(self, x: Tensor) -> bool:
        if isinstance(x, Deferred):
            return x.parametric
        return id(x) in self.parameters or x.requires_grad

    def _indices(self, index: Any) -> Any:
        """An index with the positions that its masks select in place of the masks: they say the shape of the result."""
        parts: list[Any] = []
        for part in index if isinstance(index, tuple) else (index,):
            if isinstance(part, Tensor) and part.dtype == torch.bool and part.dim():
                known = self._real(part, "the shape of what a mask selects depends on its values")
                parts += _plain(known.nonzero, (), {"as_tuple": True})
            else:
                parts.append(part)
        return tuple(parts) if len(parts) != 1 or isinstance(index, tuple) else parts[0]

    def _follow_modes(self) -> None:
        """Nodes for the modes in which the user's code runs: without gradients, under autocast."""
        pending = self.pending
        if pending.grad != torch.is_grad_enabled():
            pending.grad = torch.is_grad_enabled()
            pending.graph.call_function(_torch.SET_GRAD_MODE, (pending.grad,))
            pending.signature.append(("grad", pending.grad))
        modes = _torch.autocast_modes()
        if modes != (pending.autocast or _torch.NO_AUTOCAST):
            if pending.entered is not None:
                pending.graph.call_function(_torch.EXIT_AUTOCAST, (pending.entered,))
            pending.entered = None
            if modes != _torch.NO_AUTOCAST:
                pending.entered = pending.graph.call_function(_torch.ENTER_AUTOCAST, modes)
            pending.autocast = modes
            pending.signature.append(("autocast", modes))

    def _apply_function(self, function: type[torch.autograd.Function], args: Any, kwargs: Any) -> Any:
        """A user's own ``autograd.Function``: one operator, whose parts AOTAutograd traces."""
        if not any(map(self._is_recorded, _tensors((args, kwargs)))):
            return None
        applied = self.recorder.applied.setdefault(function, _torch.AppliedFunction(function))
        hidden = any(isinstance(each, nn.Module) for each in pytree.tree_leaves((args, kwargs)))
        with _torch.without_functions():  # of a module, AOTAutograd would not see the parameters
            return self._run_outside(applied, args, kwargs) if hidden else self._record(applied, args, kwargs)

    @contextlib.contextmanager
    def _checkpointed(self) -> Iterator[None]:
        before, self.region = self.region, self.region or self.pieces * 1000 + len(self.pending.index) + 1
        try:
            yield
        finally:
            self.region = before

    def _run_outside(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator whose result has a shape that depends on data, on real tensors."""
        name, place = getattr(func, "__name__", str(func)), _place(self._where())
        real_args, real_kwargs = self._real((args, kwargs), f"{name} makes a shape that depends on data")
        made = _plain(func, real_args, real_kwargs)
        carrying = [x for x in _tensors(made) if x.is_floating_point() or x.is_complex()]
        if carrying and self._leads_to_parameters((args, kwargs)):
            elements = sum(x.numel() for x in carrying)
            known = f"{name} {place}" in self.recorder.outside
            outside = Outside(op=name, place=place, elements=elements)
            self.recorder.outside[f"{name} {place}"] = outside
            if not known or self.recorder.whole:
                self._note_outside(outside, carrying)
        return made

    def _note_outside(self, outside: Outside, made: Sequence[Tensor]) -> None:
        """Say once of an operator that it runs outside every piece; ``made``: its results that carry a gradient."""
        warnings.warn(
            f"assign: {outside.op} at {outside.place} cannot be captured and runs outside the plan.",
            stacklevel=2,
        )

    def _leads_to_parameters(self, values: Any) -> bool:
        """Whether arguments depend on a parameter that is trained, or are modules with one."""
        leaves = pytree.tree_leaves(values)
        modules = [each for each in leaves if isinstance(each, nn.Module)]
        trained = any(p.requires_grad for module in modules for p in module.parameters())
        return trained or any(self._is_parametric(x) for x in leaves if isinstance(x, Tensor))

    def _check_shape(self, x: "Deferred") -> None:
        if x.fake.shape != x.shape:
            raise TraceError(
                f"trace: an operator changes the shape of a tensor in place, from {tuple(x.shape)} to "
                f"{tuple(x.fake.shape)}, in a step that is captured in several pieces.\n"
                f"  at: {_place(self._where())}\n  Hint: use the operator that returns a new tensor."
            )

    # ---- closing a piece

    def _results(self, returned: Sequence["Deferred"]) -> list["Deferred"]:
        """The deferred tensors that a piece which ends here must compute: all that the user's code still holds."""
        return [x for x in (each() for each in self.pending.waiting) if x is not None and x.computed is None]

    def _close(self, reason: str, returned: Sequence["Deferred"] = ()) -> None:
        """Compile and run what is recorded.

        Args:
            reason: why the piece ends here; ``''`` at the end of the step.
            returned: what the step returns.
        """
        pending, alive = self.pending, self._results(returned)
        if not alive and not pending.dirty:
            self.pending = _Pending(grad=self.grad)
            return
        if reason:
            self.recorder.reasons.setdefault(_place(self._where()), reason)
        self.pieces += 1
        nodes = list(dict.fromkeys(x.node for x in alive))
        if pending.entered is not None:
            pending.graph.call_function(_torch.EXIT_AUTOCAST, (pending.entered,))
        if pending.grad != self.grad:
            pending.graph.call_function(_torch.SET_GRAD_MODE, (self.grad,))
        _order_inputs(pending.graph)
        pending.graph.output(tuple(nodes))
        for node in pending.graph.find_nodes(op="call_function", target=operator.getitem):
            if not node.users:  # a part of a result that nothing reads
                pending.graph.erase_node(node)
        inputs = [tensor for _, tensor in pending.inputs.values()]
        before = {stem: n for stem, n in self.counts.items() if stem.rpartition("/")[0] in pending.modules}
        outputs = tuple(pending.index[node] for node in nodes)
        signature = (tuple(pending.signature), outputs, tuple(sorted(before.items())), self.recorder.step.training)
        plain = torch.set_grad_enabled(self.grad), _torch.without_autocast(), _torch.as_if_compiling(False)
        with plain[0], plain[1], plain[2], _torch.plain_functions():
            place = _place(self._where())
            make = functools.partial(self._compile, inputs)
            found = self.recorder.compiled(signature, pending.numbers, inputs, make, place)
            results = dict(zip(nodes, found.run(*inputs), strict=True))
        self.counts.update(found.counts - self.counts)
        self.entered |= {id(inputs[place]): key for place, key in found.entered.items()}
        places = {node: place for place, node in enumerate(nodes)}
        for x in alive:
            x.computed, x.crossing = results[x.node], found.results[places[x.node]]
        self.pending = _Pending(grad=self.grad)

    def _compile(self, inputs: Sequence[Any], sizes: Sizes) -> _Compiled:
        """Compile the pending piece, for all the batches that ``sizes`` allow."""
        pending = self.pending
        for node in pending.graph.nodes:
            frames = node.meta.pop("frames", None)
            if frames is not None:
                node.meta["stack_trace"] = "".join(f'  File "{f}", line {n}, in {c}\n' for f, n, c in frames)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The .grad attribute")  # torch looks at that of every input
            if sizes.varying:
                try:
                    graph, twins, examples, mode = generalized(pending.graph, pending.numbers, sizes, inputs)
                    compiled = self._compile_graph(graph, examples, twins, mode)
                except (RuntimeError, TypeError, AssertionError):  # torch says in many ways that a size must be known
                    sizes.varying = ()
                else:
                    sizes.guard = _torch.size_guard(mode, examples)
                    return compiled
            return self._compile_graph(pending.graph, inputs, {}, self.fake_mode)

    def _compile_graph(
        self, graph: fx.Graph, inputs: Sequence[Any], twins: Mapping[fx.Node, fx.Node], mode: _torch.FakeTensorMode
    ) -> _Compiled:
        pending = self.pending
        piece = Piece(
            whole=self.recorder.whole,
            counts=Counter(self.counts),
            crossing={twins.get(node, node): crossing for node, crossing in pending.crossing.items()},
            constants=frozenset(twins.get(node, node) for node in pending.constants),
        )
        module = fx.GraphModule(nn.Module(), graph)
        with _torch.tracing_context(mode):
            return self.recorder.compile(module, inputs, piece)

    # ---- where the user's code is

    @contextlib.contextmanager
    def _module_paths(self) -> Iterator[None]:
        """Within the context, ``stack`` has the paths of the modules that run.

        A module that is not the model's counts as part of the one that calls it; None outside the model.
        """

        def enter(module: nn.Module, _args: Any) -> None:
            around = self.stack[-1] if self.stack else None
            self.stack.append(self.paths.get(id(module), around))

        def leave(module: nn.Module, _args: Any, _result: Any) -> None:
            if self.stack:
                self.stack.pop()

        hooks = nn.modules.module
        handles = [
            hooks.register_module_forward_pre_hook(enter),
            hooks.register_module_forward_hook(leave, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _where(self) -> tuple[tuple[str, int, str], ...]:
        """File, line and function of the innermost frames that are not torch's or this package's."""
        found: list[tuple[str, int, str]] = []
        frame: Any = sys._getframe(1)
        while frame is not None and len(found) < 2:
            if not frame.f_code.co_filename.startswith(_torch.OWN_FILES):
                found.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
            frame = frame.f_back
        return tuple(reversed(found))


class _WholeRecording(_Recording):
    """One run of a step that is recorded as one graph; values that the code needs are computed beside it."""

    def _keep_order(self, name: str) -> None:
        """Nothing of the graph runs here: there is no order to keep."""

    def _results(self, returned: Sequence["Deferred"]) -> list["Deferred"]:
        return list({id(x): x for x in returned}.values())

    def _on_leaf(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What autograd would do with a tensor changes neither names nor sizes."""
        x = args[0]
        if func.__name__ == "requires_grad_" and not isinstance(x, Deferred):
            return _plain(func, args, kwargs)
        return (
            x
            if func.__name__ == "requires_grad_"
            else _plain(torch.zeros(1, requires_grad=True).register_hook, (id,), {})
        )

    def _real(self, values: Any, reason: str) -> Any:
        tensors = [x for x in _tensors(values) if isinstance(x, Deferred) or _torch.memory_of(x) in self.pending.dirty]
        if any(isinstance(x, Tensor) and self._is_parametric(x) for x in tensors):
            self.recorder.reasons.setdefault(_place(self._where()), reason)
        return _map(self._computed, values)

    def _note_outside(self, outside: Outside, made: Sequence[Tensor]) -> None:
        for x in made:  # computed without gradients here
            x.requires_grad_()

    def _beside(self, x: "Deferred") -> Tensor:
        found = super()._beside(x)
        return self._computed(x) if found is None else found

    def _computed(self, x: Tensor) -> Tensor:
        """The value of a tensor, behind all that is recorded so far."""
        pending = self.pending
        if not isinstance(x, Deferred) and id(x) not in pending.inputs:
            return x
        for node in pending.graph.nodes:
            if node not in pending.values:
                pending.values[node] = _run_node(node, pending.values)
        found: Tensor = pending.values[self._node(x)]
        return found.detach()

    def _close(self, reason: str, returned: Sequence["Deferred"] = ()) -> None:
        if not reason:
            super()._close(reason, returned)


class Deferred(Tensor):
    """A tensor without data of its own: a node of the piece that is being recorded, or the real tensor it became."""

    recording: _Recording
    node: fx.Node
    fake: Tensor
    computed: Tensor | None
    parametric: bool
    crossing: Crossing | None

    def setup(self, recording: _Recording, node: fx.Node, fake: Tensor, parametric: bool) -> None:
        """Tie the tensor to its node."""
        self.recording, self.node, self.fake, self.parametric = recording, node, fake, parametric
        self.computed, self.crossing = None, None

    @property
    def computed_value(self) -> Tensor:
        """The real tensor, in the dtype that it has in the user's code; a plan may hold it in fewer bits."""
        assert self.computed is not None
        return self.computed if self.computed.dtype == self.fake.dtype else self.computed.to(self.fake.dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if (func.__self__.__name__ if name == "__get__" else name) in _METADATA:
            return _plain(func, args, kwargs or {})
        args, kwargs = _map(_unwrapped, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod  # torch declares it without ``func``
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """An operator that torch itself calls on a deferred tensor: recorded like any other."""
        recording = next(x.recording for x in _tensors((args, kwargs or {})) if isinstance(x, Deferred))
        with _torch.without_functions():
            return recording._record(func, args, kwargs or {})


def _unwrapped(x: Tensor) -> Tensor:
    if not isinstance(x, Deferred):
        return x
    if x.computed is None:
        x.recording._close("a tensor was used outside the step")
    return x.computed_value


def _plain(func: Any, args: Any, kwargs: Any) -> Any:
    """Call a torch function on deferred tensors as on plain ones."""
    with _torch.without_subclasses():
        return func(*args, **kwargs)


def _tensors(values: Any) -> Iterator[Tensor]:
    """Tensors in a nest of tuples, lists, dicts and slices."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for each in values:
            yield from _tensors(each)
    elif isinstance(values, Mapping):
        for each in values.values():
            yield from _tensors(each)
    elif isinstance(values, slice):
        yield from _tensors((values.start, values.stop, values.step))


def _map(change: Callable[[Any], Any], values: Any) -> Any:
    """The same nest with other values in place of its tensors."""
    if isinstance(values, Tensor):
        return change(values)
    if isinstance(values, (tuple, list)):
        return _like(values, [_map(change, each) for each in values])
    if isinstance(values, dict):
        return {key: _map(change, each) for key, each in values.items()}
    if isinstance(values, slice):
        return slice(*(_map(change, each) for each in (values.start, values.stop, values.step)))
    return values.item() if isinstance(values, np.generic) else values


def _like(values: Any, parts: list[Any]) -> Any:
    """``parts`` in a container of the kind of ``values``."""
    kind = type(values)
    if kind in (tuple, list):
        return kind(parts)
    if hasattr(values, "_fields"):
        return kind(*parts)
    if isinstance(values, tuple) and hasattr(values, "n_fields"):  # what torch.max and others return
        return kind(parts)
    return list(parts) if isinstance(values, list) else tuple(parts)


def _run_node(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """The result of one node on real values."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    if node.target is _torch.SET_GRAD_MODE:
        return None
    with torch.no_grad():
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)


def _order_inputs(graph: fx.Graph) -> None:
    """Move the inputs of a graph to its beginning, in the order in which they were met."""
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for node in graph.find_nodes(op="placeholder"):
        first.prepend(node)


def _frozen(value: Any, index: dict[fx.Node, int]) -> Any:
    """Arguments of a node as hashable data."""
    if isinstance(value, fx.Node):
        return ("node", index[value])
    if isinstance(value, (tuple, list)):
        return (type(value).__name__, *(_frozen(each, index) for each in value))
    if isinstance(value, dict):
        return tuple((key, _frozen(each, index)) for key, each in value.items())
    if isinstance(value, slice):
        return ("slice", *(_frozen(each, index) for each in (value.start, value.stop, value.step)))
    if type(value) is int:  # see _Pending.numbers
        return int
    return (type(value), repr(value) if isinstance(value, float) else value)


def _place(frames: Sequence[tuple[str, int, str]]) -> str:
    """``file:line`` of the innermost frame."""
    return f"{frames[-1][0]}:{frames[-1][1]}" if frames else "unknown line"


__all__ = ["Deferred", "Outside", "Recorder"]
