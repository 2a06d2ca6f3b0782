"""Capture model and loss as one graph with Dynamo, and explain errors to the user.

The graph from Dynamo has torch-level operators (``conv2d``, ``relu``, …), with the module path and the line of the
user's code on every node. Parameters and buffers are inputs of the graph and are recognized by identity.

Parameters that a plan stores in another dtype are captured as if they had their loaded dtype. The user's code and the
graph are therefore the same for every plan. In the resulting graph, readers of the converted parameter read the
parameter itself. Buffers that a plan stores in 16 bits are captured as if they were float32; they are converted to
float32 when the graph is called, and rounded again afterwards.
"""

import contextlib
import itertools
import os
import re
import types
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from assign import _torch
from assign.errors import AssignError, TraceError
from assign.numerics.torch_dtypes import COMPUTED
from assign.tracing.heap import Heap
from assign.tracing.loaded import stored_otherwise
from assign.tracing.pieces import Piece
from assign.tracing.recording import Recorder

Loss = Callable[[nn.Module, Any], Tensor]

_PREFIX = "L['self'].model"
_GETATTR = re.compile(r"getattr\(([^()]*), '([^']*)'\)")  # how Dynamo writes a.b where parameters are replaced
_NUMBERS = itertools.count()  # for steps: Dynamo remembers varying sizes by function name
_OPERATOR = "\nWhile executing "  # how torch.fx names the node that failed
_PACKAGES = tuple(f'File "{Path(each).parent}{os.sep}' for each in (torch.__file__, Path(__file__).parent))


@dataclass(frozen=True, slots=True, kw_only=True)
class Capture:
    """One captured graph and the facts about its inputs.

    Attributes:
        graph: torch-level FX graph, which may be edited.
        inputs: example values of its placeholders, in order.
        parameters: placeholder → name of the parameter (one name for tied weights).
        buffers: placeholder → name of the buffer.
        widened: positions of the buffers that the graph reads and changes in float32, though they are stored narrower.
        dtypes: stored dtypes of the parameters, and of the results of earlier pieces, that a plan stores in another
            dtype; the graph's own values have the dtypes of the loaded model.
        training: whether the model was in training mode with gradients on.
        piece: what is known about the graph if it was recorded; None if Dynamo captured it.
    """

    graph: fx.GraphModule
    inputs: Sequence[Any]
    parameters: dict[fx.Node, str]
    buffers: dict[fx.Node, str]
    widened: tuple[int, ...]
    dtypes: dict[fx.Node, torch.dtype]
    training: bool
    piece: Piece | None = None

    @property
    def is_part(self) -> bool:
        """Whether other graphs contain the rest of the step."""
        return self.piece is not None and not self.piece.whole


def call_model(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Return the model's output: the "loss" of a step that is the model alone."""
    return model(*args, **kwargs)


class Step(nn.Module):
    """``loss(model, …)`` as a module, so that module paths and parameters have one prefix.

    Dynamo keeps its compiled code per code object. Each step gets its own copy, so that two models do not compete for
    the same cache entries.
    """

    def __init__(self, model: nn.Module, loss: Callable[..., Any], buffers: Collection[str] = ()) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.stored_otherwise = stored_otherwise(model)
        self.stored_otherwise |= {name: torch.float32 for name, _ in model.named_buffers() if name in buffers}
        function = Step._forward
        code = function.__code__.replace(co_name=f"step_{next(_NUMBERS)}")
        own = types.FunctionType(code, function.__globals__, code.co_name, None, function.__closure__)
        self.forward = types.MethodType(own, self)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.stored_otherwise:
            return self.loss(self.model, *args, **kwargs)
        stored = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        own = {name: stored[name].to(dtype) for name, dtype in self.stored_otherwise.items()}
        with _torch.replaced_parameters(self.model, own):
            result = self.loss(self.model, *args, **kwargs)
            for name, buffer in self.model.named_buffers():
                if buffer is not own.get(name, stored[name]):  # the model has replaced the buffer
                    stored[name].copy_(buffer)
        return result


class CompiledStep:
    """``loss(model, …)``, compiled by a backend at the first call and whenever shapes or modes change.

    Dynamo captures the step as one graph. If it cannot, :class:`Recorder` captures this and all later calls in several
    pieces.
    """

    def __init__(self, step: Step, receive: Callable[..., Callable[..., Any]], *, whole: bool) -> None:
        self.recorder = Recorder(step, receive, whole=whole)
        self._model = step.model
        self._compiled = _torch.compile_step(step, receive)
        self._in_pieces = False
        self._heap = Heap()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the result of the step.

        Raises:
            TraceError: the step cannot be captured; names the user's line.
        """
        self._heap.next_step((args, kwargs))
        try:
            with _hidden_gradients(self._model):
                if not self._in_pieces:
                    try:
                        return self._compiled(*args, **kwargs)
                    except _torch.CAPTURE_FAILURES as error:
                        self._check_recordable(error)
                        self._in_pieces = True
                return self.recorder(*args, **kwargs)
        except _torch.CAPTURE_FAILURES as error:
            inner = _torch.inner_exception(error)
            if isinstance(inner, AssignError):
                raise inner from None
            if isinstance(inner, _torch.VALUES_MISSING):
                raise TraceError(
                    "trace: the shape of a tensor, or a branch of the code, depends on values, and a model on the meta "
                    "device has none.\n  Trace the model on a device with memory."
                ) from error
            if isinstance(error, _torch.GRAPH_BREAKS):
                raise _explain(error) from error
            if _OPERATOR in str(inner):
                raise _explain_operator(inner) from error
            raise

    def _check_recordable(self, error: BaseException) -> None:
        """Raise Dynamo's exception again if running the user's code would not help."""
        refused = isinstance(_torch.inner_exception(error), AssignError)
        if refused or any(parameter.is_meta for parameter in self._model.parameters()):
            raise error


def compile_step(
    model: nn.Module,
    loss: Callable[..., Any],
    backend: Callable[[Capture], Callable[..., Any]],
    *,
    buffers: Collection[str] = (),
    whole: bool = False,
) -> CompiledStep:
    """Return ``loss(model, …)`` compiled by ``backend``.

    Args:
        model: the user's model, the first argument of ``loss``.
        loss: called with the model and the arguments of the compiled step.
        backend: takes each captured graph and returns the function that runs in its place.
        buffers: names of the buffers that are stored in 16 bits and computed in float32.
        whole: record one graph even for a step that Dynamo cannot capture, with the branches that the code takes for
            these inputs. This is for inspecting a step, not for training.
    """

    def receive(graph: fx.GraphModule, inputs: Sequence[Any], piece: Piece | None = None) -> Callable[..., Any]:
        if piece is None and _torch.has_sizes_from_data(graph):
            raise _torch.PendingUnbackedSymbolNotFound("a shape depends on values")  # then recorded in pieces
        capture = _describe(model, graph, inputs, buffers, piece)
        with _torch.unrolled_lstm():
            return _widening(backend(capture), capture.widened)

    return CompiledStep(Step(model, loss, buffers), receive, whole=whole)


def _widening(run: Callable[..., Any], positions: Collection[int]) -> Callable[..., Any]:
    """Return ``run`` applied to float32 copies of the inputs at these positions, which are then written back."""
    if not positions:
        return run

    def call(*inputs: Any) -> Any:
        wide = {position: inputs[position].float() for position in positions}
        result = run(*(wide.get(position, value) for position, value in enumerate(inputs)))
        for position, value in wide.items():
            inputs[position].copy_(value)
        return result

    return call


@contextlib.contextmanager
def _hidden_gradients(model: nn.Module) -> Iterator[None]:
    """Remove gradients whose dtype is not their parameter's, because Dynamo does not capture a parameter with one."""
    hidden = [(p, p.grad) for p in model.parameters() if p.grad is not None and p.grad.dtype != p.dtype]
    for parameter, _ in hidden:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in hidden:
            parameter.grad = gradient


def check_parameters(model: nn.Module) -> None:
    """Reject an object that is no model, and trained parameters in dtypes that no plan supports.

    Raises:
        TraceError: names the first such parameter.
    """
    if not isinstance(model, nn.Module):
        raise TraceError(
            f"trace: the model is a {type(model).__name__}, a torch.nn.Module is needed. Pass the module itself."
        )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.is_floating_point() and parameter.dtype not in COMPUTED:
            raise TraceError(
                f"trace: parameter {name!r} is {parameter.dtype} and requires a gradient, for which torch has no "
                f"arithmetic.\n  Allowed: {', '.join(map(str, COMPUTED))}; frozen parameters in any dtype.\n"
                "  Convert it, or call requires_grad_(False) on it."
            )


def strip_module_path(path: str) -> str | None:
    """Return the module path below the model from Dynamo's path; None for code outside the model."""
    while _GETATTR.search(path):
        path = _GETATTR.sub(r"\1.\2", path)
    if path != _PREFIX and not path.startswith((_PREFIX + ".", _PREFIX + "[", _PREFIX + "_")):
        return None
    rest = path.removeprefix(_PREFIX).replace("._modules", "").replace("_modules", "")
    rest = rest.replace("['", ".").replace("']", "").replace("[", ".").replace("]", "")
    return rest.strip(".")


def _describe(
    model: nn.Module,
    graph: fx.GraphModule,
    inputs: Sequence[Any],
    stored_narrow: Collection[str],
    piece: Piece | None,
) -> Capture:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    buffers = {id(buffer): name for name, buffer in model.named_buffers()}
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    pairs = list(zip(placeholders, inputs, strict=True))
    otherwise = stored_otherwise(model)
    dtypes = {node: value.dtype for node, value in pairs if names.get(id(value)) in otherwise}
    narrow = {node: value.dtype for node, value in pairs if piece and node in piece.crossing}
    widened = [position for position, value in enumerate(inputs) if buffers.get(id(value)) in stored_narrow]
    for node in (*dtypes, *(placeholders[position] for position in widened)):
        _drop_widening(graph, node)
    graph.recompile()
    return Capture(
        graph=graph,
        inputs=[value.float() if position in widened else value for position, value in enumerate(inputs)],
        parameters={node: names[id(value)] for node, value in pairs if id(value) in names},
        buffers={node: buffers[id(value)] for node, value in pairs if id(value) in buffers},
        widened=tuple(widened),
        dtypes={**dtypes, **{n: dtype for n, dtype in narrow.items() if dtype != _torch.fake_value(n).dtype}},
        training=model.training and torch.is_grad_enabled(),
        piece=piece,
    )


def _drop_widening(graph: fx.GraphModule, parameter: fx.Node) -> None:
    """Make the readers of a parameter that :class:`Step` widened read the parameter itself."""
    for widened in [user for user in parameter.users if user.op == "call_method" and user.target == "to"]:
        _torch.copy_fake_value(widened, parameter)
        widened.replace_all_uses_with(parameter)
        graph.graph.erase_node(widened)


def _explain(error: BaseException) -> TraceError:
    """Return the error for a graph break: what cannot be captured, at which line, and what to change."""
    lines = [line.strip() for line in str(error).splitlines()]
    reason = " ".join(line for line in lines[:2] if line and not line.lower().startswith("hint:"))
    hints = [line for line in lines if line.lower().startswith("hint:")]
    advice = (
        "\n  ".join(dict.fromkeys(hints)) or "Hint: move this code out of forward, or express it with torch operators."
    )
    return TraceError(
        f"trace: the model or the loss cannot be captured as one graph: {reason}\n"
        f"  at: {_places(lines)}\n"
        "  A plan needs the whole step in one graph: no prints of tensors, no .item(), no branch on a tensor's value.\n"
        f"  {advice}"
    )


def _explain_operator(error: BaseException) -> TraceError:
    """Return the error for a user's operator that prevents the captured graph from being prepared."""
    reason, _, rest = str(error).partition(_OPERATOR)
    node, *lines = map(str.strip, rest.splitlines())
    what = f"{type(error).__name__}: {reason.strip()} while executing {node}"
    return TraceError(
        f"trace: the captured step cannot be prepared: {what}\n"
        f"  at: {_places(lines)}\n"
        "  Hint: express this line with other torch operators; torch.func transforms are not supported in a step."
    )


def _places(lines: Sequence[str]) -> str:
    """Return the last line of the user's code in a traceback, and the line of another package (not torch) below it."""
    frames = [
        f"{line}: {code}"
        for line, code in zip(lines, [*lines[1:], ""], strict=True)
        if line.startswith("File ") and not line.startswith(_PACKAGES)
    ]
    own = [frame for frame in frames if "site-packages" not in frame]
    found = [*own[-1:], *(frame for frame in frames[-1:] if frame not in own)]
    return "\n  in: ".join(found) or "unknown line"
