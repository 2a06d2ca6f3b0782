"""Leave ``.grad`` of parameters that a backward pass does not reach unchanged, as in plain PyTorch.

A captured graph has one backward pass for all its results. If the loss reads only some of them, it would give zero
gradients to inputs that only the other results depend on. Weight decay or momentum would then change parameters, also
those of an earlier graph that made the input. A hook on the graph's autograd node sees which results have a gradient,
and removes the zeros.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from assign import _torch
from assign.tracing.capture import Capture
from assign.tracing.functionalize import detaches, written
from assign.tracing.layout import views_through


def without_unused_gradients(
    run: Callable[..., Sequence[Any]], capture: Capture, needed: Sequence[frozenset[int]]
) -> Callable[..., Sequence[Any]]:
    """Return ``run`` with a backward pass that gives no gradient to an input on which only unused results depend.

    Args:
        run: function of a captured graph: its inputs → its results.
        capture: the captured graph, whose inputs ``run`` takes.
        needed: for each input, the positions of the results that depend on it (see :func:`results_behind_inputs`).
    Returns:
        A function like ``run``; ``run`` itself if every result depends on every input and no other graph can leave all
            results unused.
    """
    floating = [
        position
        for position, x in enumerate(capture.inputs)
        if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())
    ]
    results = frozenset().union(*(needed[position] for position in floating))
    if not capture.is_part and all(needed[position] == results for position in floating):
        return run

    changed = sorted({-1 - place for places in needed for place in places if place < 0})

    def call(*inputs: Any) -> Sequence[Any]:
        if not torch.is_grad_enabled():
            return run(*inputs)
        trained = [position for position in floating if inputs[position].requires_grad]
        behind = {_torch.gradient_edge(inputs[position]): needed[position] for position in trained}
        earlier = {place[0] for position in trained for place in _torch.compiled_nodes(inputs[position])}
        outputs = run(*inputs)
        made = dict(enumerate(outputs)) | {-1 - position: inputs[position] for position in changed}
        _drop_zeros(made, behind, earlier)
        return outputs

    return call


def results_behind_inputs(graph: fx.GraphModule) -> list[frozenset[int]]:
    """Return, for each input of a captured graph, the positions of the results whose gradient reaches it.

    If the graph changes the input at position p in place and its new value has a gradient, -1 - p is included.
    """
    without_grad = _torch.nodes_without_grad(graph.graph)
    reached: dict[fx.Node, set[int]] = {}
    places = {node: position for position, node in enumerate(_inputs(graph))}
    outputs: Any = _torch.output_of(graph).args[0]
    for position, node in enumerate(outputs):
        if isinstance(node, fx.Node):
            reached.setdefault(node, set()).add(position)
    for node in reversed(graph.graph.nodes):
        if written(node) is not None:  # later nodes read the written values through the tensor that it writes to
            for target in views_through(node)[1:]:
                reached.setdefault(node, set()).update(reached.get(target, ()))
                if target.op == "placeholder":
                    reached[node].add(-1 - places[target])
        if node.op == "output" or node in without_grad or detaches(node) or _counts(node):
            continue
        for source in node.all_input_nodes:
            reached.setdefault(source, set()).update(reached.get(node, ()))
    return [frozenset(reached.get(node, ())) for node in places]


def _counts(node: fx.Node) -> bool:
    """Whether the value of a node is known and consists of integers or booleans."""
    value = _torch.fake_value(node)
    return isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())


def _inputs(graph: fx.GraphModule) -> list[fx.Node]:
    return list(graph.graph.find_nodes(op="placeholder"))


def _drop_zeros(
    made: Mapping[int, Any], behind: Mapping[tuple[Any, int], frozenset[int]], earlier: Collection[Any]
) -> None:
    """Make a graph's autograd node return None for inputs if none of the results that depend on them has a gradient.

    Args:
        made: the graph's results by position, and the inputs that it has changed by negative numbers.
        behind: edge of an input → the positions of the results whose gradient reaches it.
        earlier: autograd nodes of graphs that made the inputs.
    """
    numbers: dict[int, int] = {}
    node = None
    for position, x in made.items():
        for function, number in _torch.compiled_nodes(x):
            if function not in earlier:
                node, numbers[position] = function, number
    if node is None:
        return
    edges = [behind.get(_torch.edge_of(edge), _through_tap(edge[0], behind)) for edge in node.next_functions]

    def drop(gradients: Sequence[Tensor | None], results: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        used = {position for position, number in numbers.items() if results[number] is not None}
        return tuple(
            None if reached is not None and not reached & used else gradient
            for gradient, reached in zip(gradients, edges, strict=True)
        )

    node.register_hook(drop)


def _through_tap(function: Any, behind: Mapping[tuple[Any, int], frozenset[int]]) -> frozenset[int] | None:
    """Return the positions for the parameter that a tap reads; None if the autograd node is no tap."""
    edges = [] if function is None else [edge for edge in function.next_functions if edge[0] is not None]
    return behind.get(_torch.edge_of(edges[0])) if len(edges) == 1 and hasattr(edges[0][0], "variable") else None
