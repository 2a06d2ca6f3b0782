"""Parameters that a backward pass does not reach keep ``.grad`` as it is, as in plain PyTorch.

A captured graph has one backward pass for all its results: where the loss reads only some of them, it would give zeros
to parameters behind the others, and weight decay or momentum would then move these. A hook on the graph's autograd node
sees which results have a gradient, and takes the zeros away.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from assign import _torch
from assign.tracing.capture import Capture
from assign.tracing.functionalize import written
from assign.tracing.layout import views_through

_INPUT = -1  # in the place of a result's position: whether what is read of an input later is used, is not known


def without_unused_gradients(
    run: Callable[..., Sequence[Any]], capture: Capture, needed: Sequence[frozenset[int]]
) -> Callable[..., Sequence[Any]]:
    """``run``, whose backward pass gives no gradient to an input that only unused results depend on.

    Args:
        run: of a captured graph: its inputs → its results.
        needed: for each input, the positions of the results that depend on it (see :func:`results_behind_inputs`).
    Returns:
        ``run`` itself where every input lies behind every result.
    """
    trained = [position for position, node in enumerate(_inputs(capture.graph)) if node in capture.parameters]
    results = frozenset().union(*(needed[position] for position in trained))
    if all(needed[position] in (results, frozenset()) for position in trained):
        return run

    def call(*inputs: Any) -> Sequence[Any]:
        outputs = run(*inputs)
        if torch.is_grad_enabled():
            places = {position: inputs[position] for position in trained}
            _drop_zeros(outputs, [(parameter, needed[position]) for position, parameter in places.items()])
        return outputs

    return call


def results_behind_inputs(graph: fx.GraphModule) -> list[frozenset[int]]:
    """For each input of a captured graph, the positions of the results that depend on it.

    Where an input that the graph changes in place depends on it, -1 is among them.
    """
    reached: dict[fx.Node, set[int]] = {}
    outputs: Any = _torch.output_of(graph).args[0]
    for position, node in enumerate(outputs):
        if isinstance(node, fx.Node):
            reached.setdefault(node, set()).add(position)
    for node in reversed(graph.graph.nodes):
        if written(node) is not None:  # later nodes read what it writes through the tensor that it writes into
            for target in views_through(node)[1:]:
                reached.setdefault(node, set()).update(reached.get(target, ()))
                if target.op == "placeholder":
                    reached[node].add(_INPUT)
        for source in node.all_input_nodes if node.op != "output" else ():
            reached.setdefault(source, set()).update(reached.get(node, ()))
    return [frozenset(reached.get(node, ())) for node in _inputs(graph)]


def _inputs(graph: fx.GraphModule) -> list[fx.Node]:
    return list(graph.graph.find_nodes(op="placeholder"))


def _drop_zeros(outputs: Sequence[Any], parameters: Sequence[tuple[Tensor, frozenset[int]]]) -> None:
    """Let the autograd node behind ``outputs`` return None for parameters none of whose results has a gradient."""
    found = {
        position: _torch.compiled_node(output)
        for position, output in enumerate(outputs)
        if isinstance(output, Tensor) and output.grad_fn is not None
    }
    nodes = {position: place for position, place in found.items() if place is not None}
    if not nodes:
        return
    node = next(iter(nodes.values()))[0]
    behind = {id(parameter): results for parameter, results in parameters}
    edges = [behind.get(id(_torch.leaf_of(function))) for function, _ in node.next_functions]

    def drop(gradients: Sequence[Tensor | None], results: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        used = {position for position, (_, number) in nodes.items() if results[number] is not None} | {_INPUT}
        return tuple(
            None if reached is not None and not reached & used else gradient
            for gradient, reached in zip(gradients, edges, strict=True)
        )

    node.register_hook(drop)
