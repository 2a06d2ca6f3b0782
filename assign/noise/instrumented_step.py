"""Run a training step as one graph in which every tensor can be changed.

The graph is the same joint graph as in tracer and executor, with a probe at every tensor and every saved activation.
Run node by node with torch's own operators, it is an ordinary differentiable function from batch and parameters to the
loss and the parameters' gradients. So the output of a probe can be rounded (the measured method), or the gradients can
be differentiated with respect to it (the first-order method). Formats are arguments of the run, not of the graph.
"""

import contextlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from assign import _torch
from assign.errors import TraceError
from assign.noise import relu_flips
from assign.noise.relu_flips import Slopes
from assign.plan.keys import saved_key
from assign.tracing.capture import Capture, Loss, check_parameters, compile_step
from assign.tracing.functionalize import functionalize
from assign.tracing.joint import describe, origin, read_marked_outputs
from assign.tracing.probes import insert_probes, probe_tensor
from assign.tracing.tensor_sites import walk

Touch = Callable[[Tensor, str], Tensor]
"""``touch(tensor, key)`` → the value to compute with instead."""

_PROBE = torch.ops.assign.probe.default
_LOSS = "loss!"  # cannot be a key of the table: those of activations contain a slash


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Result of one step.

    Attributes:
        gradients: of the parameters that have one, in the order of the graph's inputs.
        slopes: switch for the slopes of relu's gates while the gradients are differentiated.
    """

    loss: Tensor
    gradients: tuple[Tensor, ...]
    slopes: Slopes


class ProbedStep:
    """``run(batch, touch)``: one forward and backward pass of ``loss(model, batch)``; ``touch`` gets every tensor.

    The model does not change, running statistics included.

    Args:
        model: captured in its current mode.
        loss: ``loss(model, batch)`` → scalar tensor.
        fused: whether attention is one operator, as in training, which torch cannot differentiate twice; else its
            parts.
    Raises:
        TraceError: as for :func:`assign.trace`.
    """

    def __init__(self, model: nn.Module, loss: Loss, *, fused: bool = False) -> None:
        check_parameters(model)
        self._step = compile_step(model, loss, self._receive, whole=True)
        self._fused = fused
        self._found: list[tuple[_Joint, Sequence[Any]]] = []  # of the current run; a compiled step must not hold self
        self._avoided: dict[
            Any, Callable[..., Any] | None
        ] = {}  # operator → its replacement; None: its result is a constant
        self._hidden: frozenset[str] = frozenset()
        self._joint: _Joint | None = None

    @property
    def hidden(self) -> frozenset[str]:
        """Keys of tensors on which gradients depend through operators that are constants here: see :meth:`avoid`."""
        return self._hidden

    def avoid(self, name: str) -> bool:
        """Replace an operator that cannot be differentiated twice by differentiable ones.

        If torch has none, or they cannot be differentiated either, its result is a constant from now on.

        Args:
            name: as in torch, e.g. ``native_group_norm_backward``.
        Returns:
            Whether anything has changed.
        """
        assert self._joint is not None
        targets = self._joint.operators(name)
        for target in targets:
            parts = _torch.decomposition(target) if target not in self._avoided else None
            if target in self._avoided and self._avoided[target] is None:
                return False
            self._avoided[target] = parts
        constants = {target for target, parts in self._avoided.items() if parts is None}
        self._hidden = self._joint.before(constants)
        return bool(targets)

    def run(self, batch: Any, touch: Touch, *, seed: int) -> Result:
        """Return loss and gradients, with random numbers from ``seed``; differentiable if gradients are enabled.

        Raises:
            TraceError: the step cannot be captured, or its loss is not a scalar.
        """
        self._found.clear()
        with torch.enable_grad(), contextlib.nullcontext() if self._fused else sdpa_kernel(SDPBackend.MATH):
            self._step(batch)
        if not self._found:
            raise TraceError("noise: the loss does not use the model. loss(model, batch) must call model.")
        joint, inputs = self._found.pop()
        self._joint = joint
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return joint.run([x.detach() if isinstance(x, Tensor) else x for x in inputs], touch, self._avoided)

    def _receive(self, capture: Capture) -> Callable[..., Any]:
        outputs: Any = _torch.output_of(capture.graph).args[0]
        examples = [_torch.make_dense_output(_torch.fake_value(n) if isinstance(n, fx.Node) else n) for n in outputs]
        functionalize(capture.graph)
        insert_probes(capture.graph, walk(capture))
        _probe_loss(capture.graph)
        joints: list[_Joint] = []
        found = self._found

        def partition(joint: fx.GraphModule, split: Callable[[fx.GraphModule], _torch.Graphs]) -> _torch.Graphs:
            joints.append(_Joint(joint))
            return split(joint)

        _torch.eager_backend(partition, lambda graph, _: graph)(capture.graph, capture.inputs)
        if not joints:
            raise TraceError("noise: no parameter of the model requires a gradient. Unfreeze one, or train nothing.")

        def run(*inputs: Any) -> Any:
            found[:] = [(joints[0], inputs)]
            return examples

        return run


def _probe_loss(graph: fx.GraphModule) -> None:
    """Add a separate probe at each result of the graph that has a gradient."""
    output = _torch.output_of(graph)
    found = [n for n in output.all_input_nodes if n.op != "placeholder"]
    with graph.graph.inserting_before(output):
        for node in found:
            output.replace_input_with(node, graph.graph.call_function(probe_tensor, (node, _LOSS)))
    graph.recompile()


class _Joint:
    """A joint graph of torch, to be run with other values at its probes."""

    def __init__(self, joint: fx.GraphModule) -> None:
        graph = fx.Graph()
        graph.output(graph.graph_copy(joint.graph, {}))
        self.module = fx.GraphModule(joint, graph)
        read_marked_outputs(graph, _PROBE)
        _probe_saved(graph)
        _torch.reshape_views(graph)
        graph.lint()
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        self.tangents = [_torch.joint_value(node) for node in inputs if _torch.is_tangent(node)]
        self.primals = len(inputs) - len(self.tangents)

    def operators(self, name: str) -> list[Any]:
        """Return the operators of the graph with this name."""
        targets = {node.target: None for node in self.module.graph.nodes if node.op == "call_function"}
        return [target for target in targets if getattr(target, "__name__", "").partition(".")[0] == name]

    def before(self, targets: Collection[Any]) -> frozenset[str]:
        """Return the keys of all probes that these operators depend on."""
        above: set[fx.Node] = set()
        for node in reversed(self.module.graph.nodes):
            if node.target in targets or node in above:
                above.update(node.all_input_nodes)
        return frozenset(str(node.args[1]) for node in above if node.target is _PROBE)

    def run(self, inputs: Sequence[Any], touch: Touch, avoided: Mapping[Any, Callable[..., Any] | None]) -> Result:
        if len(self.tangents) != 1 or math.prod(self.tangents[0].shape) != 1:
            raise TraceError(
                f"noise: the step returns {len(self.tangents)} tensors with a gradient; noise is measured for one "
                "scalar loss. Return only the loss, and detach tensors that the model keeps."
            )
        runner = _Runner(self.module, touch, avoided)
        one = torch.ones(tuple(self.tangents[0].shape), dtype=self.tangents[0].dtype, device=self.tangents[0].device)
        results = runner.run(*inputs[: self.primals], one)
        gradients = tuple(x for x in results[len(results) - self.primals :] if isinstance(x, Tensor))
        assert runner.loss is not None
        return Result(loss=runner.loss, gradients=gradients, slopes=runner.slopes)


class _Runner(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, touch: Touch, avoided: Mapping[Any, Callable[..., Any] | None]) -> None:
        super().__init__(module)
        self.touch = touch
        self.avoided = avoided
        self.loss: Tensor | None = None
        self.slopes = Slopes()
        self.touched: set[str] = set()

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is _PROBE:
            value, key = args
            if key == _LOSS:
                self.loss = value
            if key.startswith(_LOSS) or key in self.touched:  # a value that enters a checkpointed block has two probes
                return value
            self.touched.add(key)
            return self.touch(value, key)
        if target is relu_flips.OPERATOR and torch.is_grad_enabled():
            grad, y, threshold = args
            return relu_flips.gate(grad, y, threshold, self.slopes)
        if target in self.avoided and torch.is_grad_enabled():
            return self._in_place_of(target, args, kwargs)
        return super().call_function(target, args, kwargs)

    def _in_place_of(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        parts = self.avoided[target]
        if parts is not None:
            return parts(*args, **kwargs)
        with torch.no_grad():
            return super().call_function(target, args, kwargs)


def _probe_saved(graph: fx.Graph) -> None:
    """Add a probe at every saved activation, where the executor packs it."""
    by_source: dict[fx.Node, list[fx.Node]] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or _torch.is_backward(node) or not any(map(_torch.is_backward, node.users)):
            continue
        source = origin(node)
        if source.target is _PROBE and not _torch.is_backward(source):
            by_source.setdefault(source, []).append(node)
    for source, nodes in by_source.items():
        with graph.inserting_after(source):
            copied = graph.call_function(_PROBE, (source, saved_key(str(source.args[1]))))
        describe(copied, _torch.joint_value(source), source, backward=False)
        for node in nodes:
            for reader in [user for user in node.users if _torch.is_backward(user)]:
                reader.replace_input_with(node, _replay(graph, node, {source: copied}, reader))


def _replay(graph: fx.Graph, node: fx.Node, made: dict[fx.Node, fx.Node], reader: fx.Node) -> fx.Node:
    """Return ``node`` recomputed from the replacement of its origin, right before ``reader``."""
    if node in made:
        return made[node]
    parent = _torch.source_of(node)
    source = _replay(graph, parent, made, reader)
    with graph.inserting_before(reader):
        new = graph.node_copy(node, lambda n: source if n is parent else n)
    describe(new, _torch.joint_value(node), node, backward=True)
    return new
