"""Positions of nodes in a captured graph: order, regions without gradients, writes to inputs.

They are computed once, before marks or probes are inserted. Nodes inserted later have no position, but they do not
change the order of the others.
"""

from collections.abc import Collection

from torch import fx

from assign import _torch
from assign.tracing.functionalize import written


class Layout:
    """Positions of the nodes of one graph.

    Attributes:
        order: node → position.
        without_grad: the nodes that run under ``torch.no_grad``.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.order = {node: position for position, node in enumerate(graph.nodes)}
        self.without_grad = _torch.nodes_without_grad(graph)
        self._writes: dict[fx.Node, list[list[fx.Node]]] = {}
        for node in graph.nodes:
            if written(node) is not None:
                *chain, source = views_through(node)
                self._writes.setdefault(source, []).append(chain)

    def split_at_writes(self, source: fx.Node, readers: Collection[fx.Node]) -> list[list[fx.Node]]:
        """Return the readers of an input in groups, so that all readers of one group see the same values of it.

        A write into the input, or into a view of it, ends a group. The nodes that write, and the views that they write
        through, are in no group: they must keep the input itself.

        Returns:
            The groups in order of execution, each sorted, none of them empty.
        """
        writes = self._writes.get(source, [])
        writing = {node for chain in writes for node in chain}
        ends = [self.order[chain[0]] for chain in writes]
        groups: dict[int, list[fx.Node]] = {}
        for node in sorted((n for n in readers if n in self.order and n not in writing), key=self.order.__getitem__):
            groups.setdefault(sum(end < self.order[node] for end in ends), []).append(node)
        return list(groups.values())


def views_through(node: fx.Node) -> list[fx.Node]:
    """Return the node that writes, the views through which it writes, and the tensor that owns the memory."""
    chain, target = [node], written(node)
    while target is not None:
        chain.append(target)
        sources = [] if "assign_after" in target.meta else target.all_input_nodes  # a copy that was made for the write
        target = sources[0] if sources else None
    return chain
