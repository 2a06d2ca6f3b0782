"""Record a step as several pieces where Dynamo cannot capture it as one graph.

The Python code of model and loss really runs. A ``TorchFunctionMode`` sees every torch function. Values that depend
neither on a parameter nor on a floating-point input (indices, masks, random numbers) are computed at once. Other calls
are recorded as nodes of a graph, as Dynamo would write them, and return *deferred* tensors, which have a shape and a
dtype but no data. Where the code needs a value (a branch, ``item()``, a shape that depends on data), the graph recorded
so far is closed as one *piece*: it is captured, compiled once and run. Later operators form the next piece.

A value that depends only on inputs, and not on a parameter, is computed in addition to the graph and does not end a
piece.
"""

import contextlib
import operator
import types
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from assign import _torch
from assign.errors import TraceError
from assign.tracing.deferred import Deferred, like, plain, tensors_in, unwrapped, with_tensors
from assign.tracing.kept_state import kept_state
from assign.tracing.pending import Call, CompiledPiece, CompiledPieces, CompilePiece, Pending, Script, facts_of, frozen
from assign.tracing.pieces import Crossing
from assign.tracing.torch_functions import (
    DRAWING,
    METADATA,
    OF_AUTOGRAD,
    ON_LEAVES,
    ON_VALUES,
    REFLECTED,
    SIZED,
    TENSOR_ATTRIBUTES,
)
from assign.tracing.user_code import UserCode, frames, place


@dataclass(frozen=True, slots=True, kw_only=True)
class Outside:
    """An operator that ran outside every piece.

    Attributes:
        op: name of the operator.
        place: ``file:line`` of the user's code.
        elements: number of elements that it made, in tensors that carry a gradient to a parameter.
    """

    op: str
    place: str
    elements: int


class Recorder:
    """Runs a step in pieces.

    Attributes:
        reasons: why pieces ended: line of the user's code → reason.
        outside: operators that depend on a parameter and ran outside every piece.
        pieces: number of pieces in the last step.
    Args:
        step: the model and its loss as one module; its attribute ``model`` is the model.
        compile_piece: makes a function from a captured graph, its inputs and the facts known about the piece.
        whole: record one graph, with the branches that the code takes for these inputs. Values that the code needs are
            computed in addition to the graph.
    """

    def __init__(
        self,
        step: nn.Module,
        compile_piece: CompilePiece,
        *,
        whole: bool,
    ) -> None:
        self.step, self.whole = step, whole
        self.reasons: dict[str, str] = {}
        self.outside: dict[str, Outside] = {}
        self.pieces = 0
        self.compiled = CompiledPieces(compile_piece)
        self.scripts: dict[int, Script] = {}
        self.fake_mode = _torch.FakeTensorMode(allow_non_fake_inputs=True)
        self._seen: dict[tuple[str, int], Any] = {}
        self._varying: set[str] = set()
        self.applied: dict[Any, _torch.AppliedFunction] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the step once, piece by piece.

        Args:
            args: arguments of the loss after the model.
            kwargs: keyword arguments of the loss.
        Returns:
            The result of the loss.
        """
        if not self.whole:
            return _Recording(self, args, kwargs).result()
        model = self.step.model
        assert isinstance(model, nn.Module)
        with kept_state(model):
            return _WholeRecording(self, args, kwargs).result()

    def varies(self, place: str, number: int, value: Any) -> bool:
        """Whether a value that the code read at this place has ever differed between steps."""
        if self._seen.setdefault((place, number), value) != value:
            self._varying.add(place)
        return place in self._varying

    def report(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return where and why pieces ended, and which operators ran outside every piece, one line each."""
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
        self.code = UserCode(model)
        self.batch = {id(t) for t in tensors_in((args, kwargs)) if t.is_floating_point() or t.is_complex()}
        self.fake_mode = recorder.fake_mode
        self.counts: Counter[str] = Counter()
        self.grad = torch.is_grad_enabled()
        self.reads: Counter[str] = Counter()
        self.pieces = 0
        self.region = 0
        self.entered: dict[int, str] = {}
        self.fakes: dict[int, tuple[Tensor, Tensor]] = {}
        self.pending = self._next_piece()

    def result(self) -> Any:
        """Run the step and return its result, with real tensors in place of deferred ones."""
        functions = _torch.recorded_functions(self._apply_function, self._checkpointed, self._before_seeding)
        with self.code.followed(), _torch.as_if_compiling(), functions, self:
            returned = self.recorder.step.forward(*self.args, **self.kwargs)
        self.close("", [x for x in _torch.pytree.tree_leaves(returned) if isinstance(x, Deferred)])
        self.recorder.pieces = self.pieces
        return _torch.pytree.tree_map(lambda x: x.computed_value if isinstance(x, Deferred) else x, returned)

    # ---- handling of each torch function

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._attribute(func, args)
        tensors = list(tensors_in((args, kwargs)))
        initializes = getattr(func, "__module__", "") == "torch.nn.init" and not any(map(_is_deferred, tensors))
        if name in METADATA or not tensors or initializes:  # the code may create modules while it runs
            self._keep_order(name)
            return plain(func, args, kwargs)
        if name in ON_VALUES:
            return self._on_values(func, args, kwargs)
        if name in ON_LEAVES:
            return self._on_leaf(func, args, kwargs)
        if not any(map(self._is_recorded, tensors)) and not self._touches(name, tensors, kwargs):
            self._keep_order(name)
            return plain(func, args, kwargs)
        return self.record(func, args, kwargs)

    def _keep_order(self, name: str) -> None:
        """Keep the order of random numbers: end the pending piece if it draws some and ``name`` draws or seeds too."""
        if name in DRAWING and self.pending.draws:
            self._end_piece(f"{name} draws random numbers or sets their generator, after operators that draw them")

    def _end_piece(self, reason: str) -> None:
        """End the pending piece to keep the order of random numbers."""
        self.close(reason)

    def _before_seeding(self, name: str) -> None:
        """Keep the order of random numbers at a generator function, which modes for torch functions do not see."""
        with _torch.without_functions():
            self._keep_order(name)

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
        written = not isinstance(x, Deferred) and self.pending.dirty.get(_torch.memory_of(x), False)
        if name in ("requires_grad", "is_leaf") and written:
            return name == "requires_grad"  # the value that the pending piece will write has a gradient
        if name in METADATA or not self._is_recorded(x):
            return plain(func, args, {})
        if name in OF_AUTOGRAD:
            return plain(func, (self._fake(x) if isinstance(x, Deferred) else x,), {})
        if name == "data":
            return self.record(Tensor.detach, (x,), {})
        if name in TENSOR_ATTRIBUTES:
            return self.record(getattr, (x, name), {})
        if name == "grad" and isinstance(x, Deferred) and x.computed is None:
            return None
        return self._on_values(func, args, {})

    def _on_leaf(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call a function on a tensor that has to be real from now on."""
        x = args[0]
        if isinstance(x, Deferred) and x.computed is None:
            self.close(f"{func.__name__} needs a real tensor")
        value = plain(func, *with_tensors(unwrapped, (args, kwargs)))
        if isinstance(x, Deferred):
            x.parametric |= x.computed_value.requires_grad
            x.fake = self._without_data(x.computed_value)
        return x if isinstance(value, Tensor) else value

    def _on_values(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call a function on the values of its tensors."""
        name = getattr(func, "__name__", str(func))
        line = place()
        if name in ("grad", "backward"):
            raise TraceError(
                f"trace: {name} is called within the step; a planned step has one backward pass, after its forward "
                f"pass, and cannot be differentiated twice.\n  at: {line}\n"
                "  Hint: compute this part (a gradient penalty, say) with the model itself, without a plan."
            )
        real = self._real((args, kwargs), f"{name} needs a value")
        value = plain(func, *real)
        if name in ("__bool__", "item", "__int__", "__index__", "tolist"):
            number = self.reads[line]
            self.reads[line] += 1
            if self.recorder.varies(line, number, repr(value)):
                self.close("a value that differs from step to step is read")
        return value

    def _real(self, values: Any, reason: str) -> Any:
        """Return ``values`` with real tensors in place of deferred ones."""
        tensors = list(tensors_in(values))
        known = {id(x): self._known_value(x) for x in tensors if isinstance(x, Deferred)}
        dirty = self.pending.dirty
        if any(value is None for value in known.values()) or (
            dirty and any(_torch.memory_of(x) in dirty for x in tensors if id(x) not in known)
        ):
            self.close(reason)
            known = {}
        return with_tensors(lambda x: known[id(x)] if id(x) in known else unwrapped(x), values)

    def _known_value(self, x: Deferred) -> Tensor | None:
        """Return the value of a tensor if it is known, or if it can be computed without a parameter; else None."""
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

    def record(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = getattr(func, "__name__", "")
        func, args = self._as_operator(func, args)
        if _torch.is_inlined(func):
            return self._inlined(func, args, kwargs)
        if not all(_is_deferred(x) or _torch.is_strided(x) for x in tensors_in((args, kwargs))):
            return self._run_outside(func, args, kwargs, "reads a sparse tensor")
        key, fresh = self._key(func, args, kwargs)
        call = self.pending.next(key)
        if call is not None:
            return self._repeat(call, func, args, kwargs, fresh)
        fake_args, fake_kwargs = with_tensors(self._fake, (args, kwargs))
        try:
            with self.fake_mode:
                made = plain(func, fake_args, fake_kwargs)
        except RuntimeError:  # it needs data; a mistake of the user is raised again by the code that runs instead
            if isinstance(func, types.FunctionType):
                return self._inlined(func, args, kwargs)
            sizes = tuple(map(self._as_size, args[1:]))
            sized = args[0], *(self._as_size(sizes) if name in SIZED else sizes)
            named = {key: self._as_size(value) for key, value in kwargs.items()}
            if any(x is not y for x, y in zip([*args, *kwargs.values()], [*sized, *named.values()], strict=True)):
                return self.record(func, sized, named)
            return self._run_outside(func, args, kwargs, "makes a shape that depends on data")
        if not all(map(_torch.is_strided, tensors_in(made))):
            return self._run_outside(func, args, kwargs, "makes a sparse tensor")
        if func is not operator.setitem and not any(True for _ in tensors_in(made)):
            return made  # the result is a property of tensors, not a tensor
        return self._write(func, args, kwargs, made, key)

    def _as_operator(self, func: Any, args: Any) -> tuple[Any, Any]:
        """Return the function of ``operator`` for a tensor method, if there is one, and the arguments."""
        name = getattr(func, "__name__", "")
        if name in REFLECTED:
            return REFLECTED[name], (args[1], args[0])
        if name == "__getitem__":
            return operator.getitem, (args[0], self._indices(args[1]))
        if name == "__setitem__":
            return operator.setitem, (args[0], self._indices(args[1]), args[2])
        if name == "masked_select" and len(args) == 2:
            with self:
                x, mask = torch.broadcast_tensors(*args)  # type: ignore[no-untyped-call]  # torch gives no types
            return operator.getitem, (x, self._indices(mask))
        return func, args

    def _as_size(self, value: Any) -> Any:
        """Replace integer tensors in a size by their values; anything else is returned as it is."""
        if not isinstance(value, (tuple, list)) or not any(isinstance(x, Tensor) for x in value):
            return value
        if any(isinstance(x, Tensor) and (x.dim() or x.is_floating_point()) for x in value):
            return value
        return [int(self._real(x, "a size is computed from values")) if isinstance(x, Tensor) else x for x in value]

    def _key(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, dict[int, Tensor]]:
        """Return a key that identifies a call, and the real tensors that this call is the first to read."""
        pending, fresh, numbers = self.pending, dict[int, Tensor](), list[int]()
        index = pending.script.index

        def leaf(x: Any) -> Any:
            if isinstance(x, Deferred) and x.computed is None:
                return index[x.node]
            tensor, crossing = self._computed_tensor(x)
            if id(tensor) in pending.inputs:
                return index[pending.inputs[id(tensor)][0]]
            fresh.setdefault(id(tensor), x)
            return list(fresh).index(id(tensor)), self._owner(tensor), crossing, facts_of(tensor)

        arguments = frozen((args, kwargs), leaf, numbers)
        modes = torch.is_grad_enabled(), _torch.autocast_modes()
        return (func, self.code.module, self.region, arguments, numbers, modes), fresh

    def _repeat(self, call: Call, func: Any, args: Any, kwargs: Any, fresh: dict[int, Tensor]) -> Any:
        """Do what :meth:`_write` does, for a call that is in the script."""
        pending = self.pending
        for node, x in zip(call.inputs, fresh.values(), strict=True):
            pending.hold_input(node, self._computed_tensor(x)[0])
        given = list(tensors_in((args, kwargs))) if call.changed else []
        self._note_changes([given[number] for number in call.changed], call.parametric, draws=call.draws)
        if func is operator.setitem:
            return None
        owners = {id(self._node(x).meta["example_value"]): x for x in given}
        script = pending.script
        parts = iter(script.nodes[script.index[call.node] + 1 : call.end[0]])
        return self._wrap(call.node, call.made, owners, call.parametric, lambda *_: next(parts))

    def _inlined(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Record the calls inside a Python function of torch instead of the function itself."""
        with self:
            return _torch.unchecked(func)(*args, **kwargs)

    def _write(self, func: Any, args: Any, kwargs: Any, made: Any, key: Any) -> Any:
        """Add a node for a function and return deferred tensors for its results."""
        pending, name = self.pending, getattr(func, "__name__", "")
        pending.leave_script()
        pending.follow_modes()
        given = list(tensors_in((args, kwargs)))
        owners = {id(self._fake(x)): x for x in given}
        known = len(pending.inputs)
        node_args, node_kwargs = with_tensors(self._node, (args, kwargs))
        inputs = [node for node, _ in list(pending.inputs.values())[known:]]
        node = self._add(func, node_args, node_kwargs)
        node.meta["example_value"] = made
        parametric = any(map(self._is_parametric, owners.values()))
        changed = [owners[id(x)] for x in tensors_in(made) if id(x) in owners]
        if func is operator.setitem:
            changed = [args[0]]
        self._note_changes(changed, parametric, draws=name in DRAWING)
        result = self._wrap(node, made, owners, parametric, self._add_part)
        places = tuple(next(place for place, x in enumerate(given) if x is each) for each in changed)
        facts = {"changed": places, "parametric": parametric, "draws": name in DRAWING}
        pending.note(key, node, made, inputs, **facts)
        return result

    def _note_changes(self, changed: Sequence[Tensor], parametric: bool, *, draws: bool) -> None:
        """Record which tensors an operator has changed in place."""
        pending = self.pending
        pending.draws |= draws
        pending.unrepeatable |= bool(changed) or draws
        for x in changed:
            if isinstance(x, Deferred):
                x.parametric |= parametric
                self._check_shape(x)
            else:
                memory = _torch.memory_of(x)
                pending.dirty[memory] = pending.dirty.get(memory, False) or (parametric and self.grad)

    def _add(self, func: Any, args: Any, kwargs: Any) -> fx.Node:
        return self.pending.add(func, args, kwargs, path=self.code.module, region=self.region, frames=frames())

    def _add_part(self, node: fx.Node, position: int, made: Any) -> fx.Node:
        part = self._add(operator.getitem, (node, position), {})
        part.meta["example_value"] = made
        return part

    def _wrap(
        self,
        node: fx.Node,
        made: Any,
        owners: dict[int, Tensor],
        parametric: bool,
        part: Callable[[fx.Node, int, Any], fx.Node],
    ) -> Any:
        """Return the results of a node with deferred tensors; each part of a tuple gets its own node."""
        if isinstance(made, Tensor):
            return owners[id(made)] if id(made) in owners else self._deferred(node, made, parametric)
        if isinstance(made, (tuple, list)):
            parts = []
            for position, each in enumerate(made):
                if isinstance(each, (Tensor, tuple, list)):
                    parts.append(self._wrap(part(node, position, each), each, owners, parametric, part))
                else:
                    parts.append(each)
            return like(made, parts)
        return made

    def _deferred(self, node: fx.Node, made: Tensor, parametric: bool) -> Deferred:
        x: Deferred = _torch.wrapper_like(Deferred, made)
        x.setup(self, node, made, parametric)
        self.pending.deferred.append(weakref.ref(x))
        return x

    def _fake(self, x: Tensor) -> Tensor:
        if isinstance(x, Deferred):
            return x.fake
        if id(x) not in self.fakes:
            self.fakes[id(x)] = (x, self._without_data(x))
        return self.fakes[id(x)][1]

    def _without_data(self, x: Tensor) -> Tensor:
        """Return a fake tensor like ``x``, which is a leaf of autograd only if ``x`` is one."""
        if x.is_leaf:
            return self.fake_mode.from_tensor(x, static_shapes=True)
        leaf = self.fake_mode.from_tensor(x.detach().requires_grad_(), static_shapes=True)
        with self.fake_mode, torch.enable_grad():
            return leaf.clone()

    def _node(self, x: Tensor) -> fx.Node:
        """Return the node of a tensor in the pending piece: the node of its operator, or an input of the piece."""
        pending = self.pending
        if isinstance(x, Deferred) and x.computed is None:
            return x.node
        tensor, crossing = self._computed_tensor(x)
        if id(tensor) not in pending.inputs:
            pending.add_input(tensor, self._fake(x), owner=self._owner(tensor), crossing=crossing)
        return pending.inputs[id(tensor)][0]

    def _computed_tensor(self, x: Tensor) -> tuple[Tensor, Crossing | None]:
        """Return the real tensor (for a deferred tensor, its computed value) and what is known about it."""
        if isinstance(x, Deferred):
            assert x.computed is not None
            return x.computed, x.crossing
        return x, self._crossing(x)

    def _owner(self, x: Tensor) -> Any:
        """Return the identity of an input: its id if it belongs to the model, "batch" if to the batch, else None."""
        if id(x) in self.batch:
            return "batch"
        return id(x) if id(x) in self.parameters or id(x) in self.buffers else None

    def _crossing(self, x: Tensor) -> Crossing | None:
        """Return what is known about a tensor that an earlier piece read or an operator outside all pieces made."""
        if id(x) in self.entered:
            return Crossing(key=self.entered[id(x)], parametric=False, depends=True)
        made_outside = x.requires_grad and id(x) not in self.parameters and id(x) not in self.batch
        return Crossing(key="", parametric=True, depends=True) if made_outside else None

    def _is_parametric(self, x: Tensor) -> bool:
        if isinstance(x, Deferred):
            return x.parametric
        return id(x) in self.parameters or x.requires_grad

    def _indices(self, index: Any) -> Any:
        """Return an index with its masks replaced by the positions they select, which fix the shape of the result."""
        parts: list[Any] = []
        for part in index if isinstance(index, tuple) else (index,):
            if isinstance(part, Tensor) and part.dtype == torch.bool and part.dim():
                known = self._real(part, "the shape of what a mask selects depends on its values")
                parts += plain(known.nonzero, (), {"as_tuple": True})
            else:
                parts.append(part)
        return tuple(parts) if len(parts) != 1 or isinstance(index, tuple) else parts[0]

    def _apply_function(self, function: type[torch.autograd.Function], args: Any, kwargs: Any) -> Any:
        """Record a user's own ``autograd.Function`` as one operator, whose parts AOTAutograd traces.

        A function that a custom operator calls is not the user's: there the operator is recorded.
        """
        if _torch.is_plain() or not any(map(self._is_recorded, tensors_in((args, kwargs)))):
            return None
        applied = self.recorder.applied.setdefault(function, _torch.AppliedFunction(function))
        hidden = any(isinstance(each, nn.Module) for each in _torch.pytree.tree_leaves((args, kwargs)))
        with _torch.without_functions():  # AOTAutograd would not see the parameters of a module
            if hidden:
                return self._run_outside(applied, args, kwargs, "reads a module")
            return self.record(applied, args, kwargs)

    @contextlib.contextmanager
    def _checkpointed(self) -> Iterator[None]:
        before, self.region = self.region, self.region or self.pieces * 1000 + self.pending.size + 1
        try:
            yield
        finally:
            self.region = before

    def _run_outside(self, func: Any, args: Any, kwargs: Any, reason: str) -> Any:
        """Run an operator on real tensors, outside every captured graph."""
        name, line = getattr(func, "__name__", str(func)), place()
        real_args, real_kwargs = self._real((args, kwargs), f"{name} {reason}")
        made = plain(func, real_args, real_kwargs)
        carrying = [x for x in tensors_in(made) if x.is_floating_point() or x.is_complex()]
        if carrying and self._leads_to_parameters((args, kwargs)):
            elements = sum(x.numel() for x in carrying)
            known = f"{name} {line}" in self.recorder.outside
            outside = Outside(op=name, place=line, elements=elements)
            self.recorder.outside[f"{name} {line}"] = outside
            if not known:
                self._note_outside(outside)
            made = with_tensors(self._with_gradient, made)
        return made

    def _note_outside(self, outside: Outside) -> None:
        """Warn once per operator that it runs outside every piece."""
        warnings.warn(
            f"assign: {outside.op} at {outside.place} cannot be captured and runs outside the plan.",
            stacklevel=2,
        )

    def _with_gradient(self, x: Tensor) -> Tensor:
        """Return a result of an operator outside every piece in the form that later pieces take."""
        return x

    def _leads_to_parameters(self, values: Any) -> bool:
        """Whether arguments depend on a trained parameter, or are modules with one."""
        leaves = _torch.pytree.tree_leaves(values)
        modules = [each for each in leaves if isinstance(each, nn.Module)]
        trained = any(p.requires_grad for module in modules for p in module.parameters())
        return trained or any(self._is_parametric(x) for x in leaves if isinstance(x, Tensor))

    def _check_shape(self, x: Deferred) -> None:
        if x.fake.shape != x.shape:
            raise TraceError(
                f"trace: an operator changes the shape of a tensor in place, from {tuple(x.shape)} to "
                f"{tuple(x.fake.shape)}, in a step that is captured in several pieces.\n"
                f"  at: {place()}\n  Hint: use the operator that returns a new tensor."
            )

    # ---- closing a piece

    def _results(self, returned: Sequence[Deferred]) -> list[Deferred]:
        """Return the deferred tensors that the ending piece must compute: all that the user's code still holds."""
        return list(self.pending.alive())

    def close(self, reason: str, returned: Sequence[Deferred] = ()) -> None:
        """Compile and run the recorded operators.

        Args:
            reason: why the piece ends here; ``''`` at the end of the step.
            returned: the deferred tensors that the step returns.
        """
        pending, alive = self.pending, self._results(returned)
        if not alive and not pending.dirty:
            self.pending = self._next_piece()
            return
        if reason:
            self.recorder.reasons.setdefault(place(), reason)
        inputs = [tensor for _, tensor in pending.inputs.values()]
        modes = torch.set_grad_enabled(self.grad), _torch.without_autocast(), _torch.as_if_compiling(False)
        with modes[0], modes[1], modes[2], _torch.plain_functions():
            found, nodes = self._compiled(alive)
            results = dict(zip(nodes, found.run(*inputs), strict=True))
        self.pieces += 1
        self.counts.update(found.counts - self.counts)
        self.entered |= {id(inputs[position]): key for position, key in found.entered.items()}
        positions = {node: position for position, node in enumerate(nodes)}
        for x in alive:
            x.computed, x.crossing = results[x.node], found.results[positions[x.node]]
        self.pending = self._next_piece()

    def _compiled(self, wanted: Sequence[Deferred]) -> tuple[CompiledPiece, list[fx.Node]]:
        """Return the function of the pending piece, and the nodes that it computes: those of the wanted tensors."""
        pending, recorder, context = self.pending, self.recorder, (self.recorder.step.training, self.grad)
        nodes = list(dict.fromkeys(x.node for x in wanted))
        found = pending.ends_as_before(nodes, self.counts, context)
        if found is None:
            pending.leave_script()
            nodes = list(dict.fromkeys(x.node for x in wanted))
            pending.end(nodes)
            known: dict[str, Any] = {"context": context, "whole": recorder.whole, "place": place()}
            found = recorder.compiled.find(pending, self.counts, recorder.fake_mode, **known)
            pending.script.compiled = pending.script.relevant(self.counts), context, found
            recorder.scripts[self.pieces] = pending.script
        return found, nodes

    def _next_piece(self) -> Pending:
        """Return a new piece, which is recorded along the script of the previous step."""
        return Pending(script=self.recorder.scripts.get(self.pieces, Script()), grad=self.grad)


class _WholeRecording(_Recording):
    """One run of a step that is recorded as one graph; values that the code needs are computed in addition to it."""

    def _end_piece(self, reason: str) -> None:
        """Record that a piece would end here and which tensors the code holds; reset ``draws`` for the next piece."""
        self.recorder.reasons.setdefault(place(), reason)
        self.pending.held |= {x.node for x in self.pending.alive()}
        self.pending.draws = False

    def _results(self, returned: Sequence[Deferred]) -> list[Deferred]:
        return list({id(x): x for x in returned}.values())

    def _on_leaf(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Ignore hooks, and ``requires_grad_`` on a deferred tensor: they change neither names nor sizes."""
        x = args[0]
        if func.__name__ == "requires_grad_" and not isinstance(x, Deferred):
            return plain(func, args, kwargs)
        return (
            x
            if func.__name__ == "requires_grad_"
            else plain(torch.zeros(1, requires_grad=True).register_hook, (id,), {})
        )

    def _real(self, values: Any, reason: str) -> Any:
        tensors = [
            x for x in tensors_in(values) if isinstance(x, Deferred) or _torch.memory_of(x) in self.pending.dirty
        ]
        if any(map(self._is_parametric, tensors)):
            self._end_piece(reason)
        return with_tensors(self._computed, values)

    def _run_outside(self, func: Any, args: Any, kwargs: Any, reason: str) -> Any:
        """Return the operator's real results, with stand-ins that connect the graph before and after the operator."""
        made = super()._run_outside(func, args, kwargs, reason)
        read = [x for x in tensors_in((args, kwargs)) if self._is_parametric(x) and _torch.is_strided(x)]
        carrying = [x for x in tensors_in(made) if (x.is_floating_point() or x.is_complex()) and _torch.is_strided(x)]
        if not read or not carrying:
            return made
        deferred = self.record(_torch.OutsideFunction(carrying), tuple(read), {})
        stand_ins = {id(x): stand_in for x, stand_in in zip(carrying, deferred, strict=True)}
        for x, stand_in in zip(carrying, deferred, strict=True):
            self.pending.values[stand_in.node] = x.detach()
            self.pending.values.setdefault(stand_in.node.args[0], tuple(each.detach() for each in carrying))
        return with_tensors(lambda x: stand_ins.get(id(x), x), made)

    def _note_outside(self, outside: Outside) -> None:
        pass  # the trace's table lists it

    def _with_gradient(self, x: Tensor) -> Tensor:
        """Return the result with a gradient, as tracing runs without; not a leaf, so it can be changed in place."""
        if not (x.is_floating_point() or x.is_complex()):
            return x
        with torch.enable_grad():
            return x.requires_grad_().clone()

    def _known_value(self, x: Deferred) -> Tensor:
        found = super()._known_value(x)
        return self._computed(x) if found is None else found

    def _computed(self, x: Tensor) -> Tensor:
        """Return the value of a tensor after all operators recorded so far."""
        pending = self.pending
        if not isinstance(x, Deferred) and id(x) not in pending.inputs:
            return x
        for node in pending.script.nodes[: pending.size]:  # the rest is from the previous step
            if node not in pending.values:
                pending.values[node] = _run_node(node, pending.values)
        found: Tensor = pending.values[self._node(x)]
        return found.detach()

    def close(self, reason: str, returned: Sequence[Deferred] = ()) -> None:
        if not reason:
            super().close(reason, returned)


def _is_deferred(x: Tensor) -> bool:
    return isinstance(x, Deferred)


def _run_node(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """Return the result of one node on real values."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    if node.target is _torch.SET_GRAD_MODE:
        return None
    with torch.no_grad():
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)


__all__ = ["Outside", "Recorder"]
