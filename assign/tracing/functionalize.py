"""Remove in-place operators from a captured graph, so that every value has one node.

``relu(inplace=True)``, ``x += y``, ``x[mask] = v``, ``add_`` on a slice: each is replaced by the operator that makes a
new tensor; later readers of the old tensor, or of a view of it, read the new one. Operators that change an input of the
graph (running statistics, counters) stay in place. Losses are split into the operators that the paper counts.
"""

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from assign import _torch

_IN_PLACE_OPERATORS: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.imod: operator.mod,
    operator.ipow: operator.pow,
    operator.imatmul: operator.matmul,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
    operator.ixor: operator.xor,
}
_INPLACE_FLAG: dict[Any, int] = {  # function → position of its ``inplace`` argument
    F.relu: 1, F.relu6: 1, F.selu: 1, F.celu: 2, F.elu: 2, F.leaky_relu: 2, F.rrelu: 4, F.threshold: 3,
    F.silu: 1, F.mish: 1, F.hardswish: 1, F.hardsigmoid: 1, F.hardtanh: 3,
    F.dropout: 3, F.dropout1d: 3, F.dropout2d: 3, F.dropout3d: 3, F.alpha_dropout: 3, F.feature_alpha_dropout: 3,
}  # fmt: skip


_SPARSE_FLAG: dict[Any, int] = {F.embedding: 6, F.embedding_bag: 7, torch.embedding: 4, torch.embedding_bag: 5}


class Aliases:
    """Which nodes of a graph share storage; computed once, on values without data."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self.values: dict[fx.Node, Any] = {}
        self.root: dict[fx.Node, fx.Node] = {}
        self._first: dict[int, fx.Node] = {}
        self._keep: list[Any] = []  # storages stay alive, so that an address identifies one storage
        self._propagate(graph)

    def _propagate(self, graph: fx.GraphModule) -> None:
        examples = {n: _torch.fake_value(n) for n in graph.graph.nodes if n.op == "placeholder"}
        mode = next((v.fake_mode for v in examples.values() if isinstance(v, _torch.FakeTensor)), None)
        with mode or _torch.FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad():
            _Propagation(graph, self).run(*examples.values())

    def record(self, node: fx.Node, value: Any) -> None:
        """Record the value of a node; a tensor of known storage belongs to that storage's first node."""
        self.values[node] = value
        if isinstance(value, Tensor):
            address = _torch.storage_id(value.untyped_storage())
            self._keep.append(value.untyped_storage())
            self.root[node] = self._first.setdefault(address, node)
        else:
            self.root[node] = node


class _Propagation(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule, aliases: Aliases) -> None:
        super().__init__(graph)
        self.aliases = aliases

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op != "output":
            self.aliases.record(n, value)
        return value

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is _torch.CHECKPOINT_OP:  # its body, without the recomputation
            body, *inputs = args
            keywords = {k: v for k, v in kwargs.items() if k in body.forward.__code__.co_varnames}
            return body(*inputs, **keywords)
        return super().call_function(target, args, kwargs)


def functionalize(graph: fx.GraphModule) -> None:
    """Rewrite the graph in place, including the bodies of checkpointed blocks."""
    for node in list(graph.graph.nodes):
        if node.op == "call_function" and node.target is _torch.CHECKPOINT_OP:
            functionalize(_torch.body_of(graph, node))
    _split_cross_entropy(graph)
    _make_gradients_dense(graph)
    while _rewrite_first_mutation(graph):
        pass
    graph.graph.lint()
    graph.recompile()


def written(node: fx.Node) -> fx.Node | None:
    """Return the tensor that a node writes to if the node stays in place, else None."""
    if not node.meta.get("assign_in_place"):
        return None
    target: Any = node.kwargs.get("out") or node.args[0]
    return target if isinstance(target, fx.Node) else None


def _rewrite_first_mutation(graph: fx.GraphModule) -> bool:
    if not any(_mutated(node) is not None for node in graph.graph.nodes):
        return False
    aliases = Aliases(graph)
    for node in list(graph.graph.nodes):
        target = _mutated(node)
        if target is None or node.meta.get("assign_in_place"):
            continue
        if aliases.root[target].op in ("placeholder", "get_attr"):
            node.meta["assign_in_place"] = True  # a buffer or an input of the user stays as it is
            continue
        _rewrite(graph.graph, node, target, aliases)
        return True
    return False


def _mutated(node: fx.Node) -> fx.Node | None:
    """Return the argument that a node changes in place, or None."""
    if node.meta.get("assign_in_place"):
        return None
    first = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    if node.op == "call_method":
        name = str(node.target)
        changes = (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
        return first if changes and name not in ("requires_grad_", "detach_") else None
    if node.op != "call_function":
        return None
    out = node.kwargs.get("out")
    if isinstance(out, fx.Node):
        return out
    name = getattr(node.target, "__name__", "")
    if node.target in _IN_PLACE_OPERATORS or node.target is operator.setitem:
        return first
    if node.target in _INPLACE_FLAG and _inplace_flag(node):
        return first
    if getattr(node.target, "__module__", "") == operator.and_.__module__:  # and_, or_, not_: not in place
        return None
    return first if name.endswith("_") and not name.endswith("__") and not name.startswith("_") else None


def _inplace_flag(node: fx.Node) -> bool:
    position = _INPLACE_FLAG[node.target]
    return bool(node.kwargs.get("inplace", node.args[position] if len(node.args) > position else False))


def _rewrite(graph: fx.Graph, node: fx.Node, target: fx.Node, aliases: Aliases) -> None:
    """Replace one in-place node; every later reader of its storage reads the new tensor.

    Under ``torch.no_grad``, the write changes only the values: the new tensor has the gradient of the old one. If a
    value with a gradient is written to ``x.detach()``, the detached tensor gets that gradient, and only the values of
    ``x`` change.
    """
    root = aliases.root[target]
    unseen = node in _torch.nodes_without_grad(graph)
    order = {n: i for i, n in enumerate(graph.nodes)}
    shared = [n for n in aliases.root if aliases.root[n] is root and isinstance(aliases.values[n], Tensor)]
    family = [n for n in shared if order[n] <= order[node]]  # later nodes follow their own source
    detached = next((n for n in _views(target, root) if detaches(n)), None)
    if detached is None or unseen or not aliases.values[target].requires_grad:
        hidden = unseen and aliases.values[root].requires_grad
        updated = _write(graph, node, target, root, hidden=hidden)
        _read_instead(graph, node, target, root, updated, family, aliases if hidden else None)
    else:
        inside = [n for n in family if n is node or detached in _views(n, root)]
        updated = _write(graph, node, target, detached, hidden=False)
        _read_instead(graph, node, target, detached, updated, inside)
        outside = [n for n in family if n not in inside]
        if any(order.get(user, -1) > order[node] for n in outside for user in n.users):
            copied = _write_values(graph, node, detached, root, updated)
            _read_instead(graph, node, target, root, copied, outside)
    if not node.users:
        graph.erase_node(node)


def _write(graph: fx.Graph, node: fx.Node, target: fx.Node, root: fx.Node, *, hidden: bool) -> fx.Node:
    """Return the new value of ``root`` after the in-place node has written to its view ``target``.

    Args:
        graph: graph of the nodes; it is edited.
        node: the in-place operator.
        target: the tensor that it writes to: ``root`` or a view of it.
        root: the tensor, or the detached view, that gets a new value.
        hidden: whether the write changes only the values, so that the new value has the gradient of ``root``.
    """
    with graph.inserting_before(node):
        updated = _out_of_place(graph, node) if target is root and not hidden else None
        if updated is None:
            updated = graph.call_method("clone", (root,))
            updated.meta = dict(node.meta)
            updated.meta["assign_op"] = node.target
            if hidden:
                _torch.enable_grad_around(graph, updated)
            view = _replay(graph, target, root, updated)
            _in_place_on(graph, node, target, view)
            barrier = node.prev
        else:
            barrier = updated
    updated.meta["assign_after"] = barrier  # the mark comes after the write
    return updated


def _write_values(graph: fx.Graph, node: fx.Node, detached: fx.Node, root: fx.Node, values: fx.Node) -> fx.Node:
    """Return a copy of ``root`` with ``values`` written to its detached view; the copy has the gradient of ``root``."""
    with graph.inserting_before(node):
        updated = graph.call_method("clone", (root,))
        view = _replay(graph, detached, root, updated)
        write = graph.call_method("copy_", (view, graph.call_method("detach", (values,))))
    updated.meta = {**node.meta, "assign_op": node.target, "assign_after": write}
    write.meta = {**node.meta, "assign_in_place": True}
    return updated


def _read_instead(
    graph: fx.Graph,
    node: fx.Node,
    target: fx.Node,
    root: fx.Node,
    updated: fx.Node,
    family: Iterable[fx.Node],
    hidden_in: Aliases | None = None,
) -> None:
    """Replace a family of views of ``root`` by the same views of ``updated`` in all nodes after the in-place node.

    Args:
        graph: graph of the nodes; it is edited.
        node: the in-place operator.
        target: the tensor that it writes to: ``root`` or a view of it.
        root: the tensor, or the detached view, that has a new value.
        updated: the new value of ``root``.
        family: nodes that share memory with ``root``, in the order of the graph.
        hidden_in: given if the write changed values but no gradient; its values show which views have a gradient.
    """
    order = {n: i for i, n in enumerate(graph.nodes)}
    replayed = {root: updated}
    for member in family:
        later = list(node.users) if member is node else [u for u in member.users if order.get(u, -1) > order[node]]
        if not later:
            continue
        source = target if member is node else member
        if source not in replayed:
            with graph.inserting_before(node):
                shows = hidden_in is not None and hidden_in.values[source].requires_grad
                replayed[source] = _replay(graph, source, root, updated, with_grad=shows)
        for user in later:
            user.replace_input_with(member, replayed[source])


def _views(member: fx.Node, root: fx.Node) -> list[fx.Node]:
    """Return a view of ``root``, the tensor that it is a view of, and so on."""
    chain = [member]
    while chain[-1] is not root:
        sources = [n for n in chain[-1].all_input_nodes if not n.meta.get("assign_in_place")]
        if not sources:
            break
        chain.append(sources[0])
    return chain


def detaches(node: fx.Node) -> bool:
    """Whether a node is ``x.detach()`` or ``x.data``."""
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return name in ("detach", "_get_data_attr")


def _out_of_place(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """Return the same operator making a new tensor; None if torch has none."""
    new: fx.Node | None = None
    if node.target in _IN_PLACE_OPERATORS:
        new = graph.call_function(_IN_PLACE_OPERATORS[node.target], node.args, node.kwargs)
    elif node.target in _INPLACE_FLAG:
        position = _INPLACE_FLAG[node.target]
        args = tuple(False if i == position else a for i, a in enumerate(node.args))
        kwargs = {k: v for k, v in node.kwargs.items() if k != "inplace"}
        function: Any = node.target
        new = graph.call_function(function, args, kwargs)
    elif node.op == "call_method" and node.target not in ("copy_", "fill_", "zero_", "normal_", "uniform_"):
        name = str(node.target).rstrip("_")
        if hasattr(Tensor, name) and not str(node.target).startswith("__"):
            new = graph.call_method(name, node.args, node.kwargs)
    elif node.op == "call_function" and "out" not in node.kwargs:
        twin = _namesake(node.target)
        new = graph.call_function(twin, node.args, node.kwargs) if twin is not None else None
    if new is not None:
        new.meta = dict(node.meta)
    return new


def _namesake(function: Any) -> Callable[..., Any] | None:
    name = getattr(function, "__name__", "").rstrip("_")
    for home in (F, torch):
        twin: Callable[..., Any] | None = getattr(home, name, None)
        if callable(twin) and name:
            return twin
    return None


def _in_place_on(graph: fx.Graph, node: fx.Node, target: fx.Node, view: fx.Node) -> None:
    """Add the node's own in-place operator, on a new tensor instead of the user's."""
    swap = {target: view}
    args = fx.map_arg(node.args, lambda n: swap.get(n, n))
    kwargs = fx.map_arg(node.kwargs, lambda n: swap.get(n, n))
    written = graph.create_node(node.op, node.target, args, kwargs)
    written.meta = dict(node.meta)
    written.meta["assign_in_place"] = True


def _replay(graph: fx.Graph, member: fx.Node, root: fx.Node, updated: fx.Node, *, with_grad: bool = False) -> fx.Node:
    """Return the view ``member`` of ``root``, taken of ``updated`` instead."""
    if member is root:
        return updated
    sources = [n for n in member.all_input_nodes if not n.meta.get("assign_in_place")]
    base = _replay(graph, sources[0], root, updated, with_grad=with_grad)
    new = graph.node_copy(member, lambda n: base if n is sources[0] else n)
    new.meta = dict(member.meta)
    if with_grad:
        _torch.enable_grad_around(graph, new)
    return new


def _make_gradients_dense(graph: fx.GraphModule) -> None:
    """Make embeddings compute dense gradients, because a joint graph has no sparse ones; see :func:`is_sparse`."""
    for node in graph.graph.nodes:
        place = _SPARSE_FLAG.get(node.target, 0)
        if place and node.kwargs.get("sparse", node.args[place] if len(node.args) > place else False):
            node.args = tuple(False if at == place else value for at, value in enumerate(node.args))
            node.kwargs = {name: value for name, value in node.kwargs.items() if name != "sparse"}
            node.meta["assign_sparse"] = True


def is_sparse(parameter: fx.Node) -> bool:
    """Whether the user's code makes a sparse gradient of a parameter, i.e. all its readers are sparse embeddings."""
    return bool(parameter.users) and all(user.meta.get("assign_sparse") for user in parameter.users)


def _split_cross_entropy(graph: fx.GraphModule) -> None:
    """Replace ``cross_entropy`` by ``log_softmax`` and ``nll_loss``, torch's own operators in the same order."""
    values = None
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or node.target is not F.cross_entropy:
            continue
        values = values or Aliases(graph).values
        names = ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing")
        given = dict(zip(names, node.args, strict=False)) | node.kwargs
        if given.get("label_smoothing") or values[given["target"]].is_floating_point():
            continue
        source = given["input"]
        with graph.graph.inserting_before(node):
            dim = 1 if values[source].dim() > 1 else 0
            log = graph.graph.call_function(F.log_softmax, (source, dim))
            rest = {k: v for k, v in given.items() if k not in ("input", "label_smoothing", "target")}
            loss = graph.graph.call_function(F.nll_loss, (log, given["target"]), rest)
        log.meta = {k: v for k, v in node.meta.items() if k != "example_value"}
        loss.meta = dict(node.meta)
        node.replace_all_uses_with(loss)
        graph.graph.erase_node(node)
