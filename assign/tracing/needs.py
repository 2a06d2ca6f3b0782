"""Find the precision that the values of each tensor need, from the graphs alone.

* *float32*: tensors that stay in float32 by default (:mod:`assign.plan.precision`); tensors that the user's own code
  computes in float32; tensors that lead to the pole of a logarithm, a root or a quotient, because rounding ``1 - p +
  eps`` would lose all of it; and tensors that lead to a sine, because the noise of its argument must be small against a
  period.
* *high*: a constant like −1e9 or −inf masks some elements, so that one scale does not fit the others.
* *exact*, for saved activations: the backward pass compares the saved value with another one, divides by it or takes
  its exponential.
"""

import operator
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor, fx

from assign import _torch
from assign.plan.ops import (
    CARRY_MASKS,
    MASK_FROM_CONSTANT,
    MATRIX_PRODUCTS,
    PERIODIC,
    SELECTING,
    SHIFTS,
    SINGULAR,
    SLICE,
    WRITTEN,
    WRITTEN_BY_NAME,
)
from assign.plan.precision import stays_float32
from assign.plan.table import Need
from assign.tracing.capture import Capture
from assign.tracing.constants import numbers_in
from assign.tracing.functionalize import written
from assign.tracing.joint import COMPARISONS, aten
from assign.tracing.tensor_sites import Walk, operator_name

_MASK = 1e4
"""Magnitude from which a constant is a mask. Source: the first BERT uses −10000, later models use larger ones."""


def find_needs(capture: Capture, walked: Walk) -> dict[str, Need]:
    """Return the precision that each activation of a captured graph needs, by key, without those that need nothing."""
    masked, singular, angles = _find_masked(capture, walked), _find_singular(walked), _find_angles(walked)
    readers: dict[str, set[str]] = {}
    for site in walked.sites:
        for key in site.inputs:
            readers.setdefault(key, set()).add(site.op)
    found = {}
    for site in walked.sites:
        own = readers.get(site.key, set())
        is_product = not MATRIX_PRODUCTS.isdisjoint({site.op, *own})
        computed = site.op not in ("input", SLICE)
        poles = site.key in singular
        wide = poles or stays_float32(site.key, site.op, own) or _in_float32(site.node, walked)
        if site.key in angles and not is_product:
            found[site.key] = Need.FLOAT32
        elif site.op == "parameter":
            continue
        elif computed and not is_product and wide:
            found[site.key] = Need.FLOAT32
        elif poles or site.node in masked:
            found[site.key] = Need.HIGH
    return found


def _in_float32(node: fx.Node, walked: Walk) -> bool:
    """Whether the user's code computes a tensor in float32 and does not convert it back at once."""
    return node in walked.float32 and any(user not in walked.back for user in node.users)


def _nodes(graph: fx.GraphModule, tables: Collection[set[fx.Node]]) -> Iterator[fx.Node]:
    """Yield the operators of a graph in order, those of checkpointed bodies included.

    If one of ``tables`` contains a value outside a body, the same value inside is added, and the other way round.
    """
    for node in graph.graph.nodes:
        if node.target is not _torch.CHECKPOINT_OP:
            if node.op in ("call_function", "call_method"):
                yield node
            continue
        body = _torch.body_of(graph, node)
        inner = [n for n in body.graph.nodes if n.op == "placeholder"]
        _carry(zip(inner, node.args[1:], strict=False), tables)
        yield from _nodes(body, tables)
        outputs: Any = _torch.output_of(body).args[0]
        parts = [user for user in node.users if user.target is operator.getitem]
        _carry(((user, outputs[int(str(user.args[1]))]) for user in parts), tables)


def _carry(pairs: Any, tables: Collection[set[fx.Node]]) -> None:
    for target, source in pairs:
        for table in tables:
            if source in table:
                table.add(target)


def _find_masked(capture: Capture, walked: Walk) -> set[fx.Node]:
    """Return the nodes whose values hold a mask: constants of large magnitude, and tensors made from them by sums."""
    placeholders = capture.graph.graph.find_nodes(op="placeholder")
    pairs = zip(placeholders, capture.inputs, strict=False)
    masked = {node for node, value in pairs if node not in capture.parameters and _is_mask(value)}
    for node in _nodes(capture.graph, [masked]):
        if _writes_mask(node, walked) or _carries_mask(node, masked):
            target = written(node)
            masked |= {node} if target is None else _family(target, walked)
    return masked


def _writes_mask(node: fx.Node, walked: Walk) -> bool:
    op = operator_name(node.target)
    positions = (0, 1) if op in MASK_FROM_CONSTANT and node not in walked.parametric else WRITTEN.get(op, ())
    given = [node.args[place] for place in positions if place < len(node.args)]
    given += [node.kwargs.get(name) for name in WRITTEN_BY_NAME] if positions else []
    return any(abs(number) >= _MASK for number in numbers_in(given))


def _carries_mask(node: fx.Node, masked: set[fx.Node]) -> bool:
    return operator_name(node.target) in CARRY_MASKS and not masked.isdisjoint(node.all_input_nodes)


def _family(node: fx.Node, walked: Walk) -> set[fx.Node]:
    """Return the nodes that share the storage of ``node``."""
    address = _torch.storage_id(walked.values[node].untyped_storage())
    tensors = ((n, value) for n, value in walked.values.items() if isinstance(value, Tensor))
    return {n for n, value in tensors if _torch.storage_id(value.untyped_storage()) == address}


def _is_mask(value: Any) -> bool:
    known = isinstance(value, Tensor) and value.is_floating_point() and value.device.type != "meta"
    if not known or isinstance(value, _torch.FakeTensor) or not value.numel():
        return False
    return bool((value.detach().abs() >= _MASK).any())


def _find_singular(walked: Walk) -> set[str]:
    """Return keys of tensors that an operator with a pole reads, and of tensors that differ from these by scalars."""
    by_key = {site.key: site for site in walked.sites}
    found: set[str] = set()
    for node in walked.labels:
        op = operator_name(node.meta.get("assign_op", node.target))
        for position in SINGULAR.get(op, ()):
            argument = node.args[position] if len(node.args) > position else None
            key = walked.key_of.get(argument) if isinstance(argument, fx.Node) else None
            if key is None or (op == "pow" and _is_polynomial(node)):
                continue
            while key is not None and key not in found and by_key[key].op != "parameter":
                found.add(key)
                site = by_key[key]
                key = site.inputs[0] if site.op in SHIFTS and len(site.inputs) == 1 else None
    return found


def _find_angles(walked: Walk) -> set[str]:
    """Return keys of the arguments of periodic operators, and of the tensors from which arithmetic makes these."""
    by_key = {site.key: site for site in walked.sites}
    pending = [key for site in walked.sites if site.op in PERIODIC for key in site.inputs]
    found: set[str] = set()
    while pending:
        key = pending.pop()
        if key not in found:
            found.add(key)
            pending += by_key[key].inputs if by_key[key].op in SHIFTS | SELECTING else ()
    return found


def _is_polynomial(power: fx.Node) -> bool:
    exponent = power.args[1] if len(power.args) > 1 else None
    return isinstance(exponent, (int, float)) and exponent >= 1


# ---- saved activations


_POLES: Mapping[Any, int] = {  # operator → position of the operand
    aten.div.Tensor: 1, aten.reciprocal.default: 0, aten.rsqrt.default: 0, aten.log.default: 0, aten.exp.default: 0,
    aten._ctc_loss_backward.default: 1, aten._ctc_loss_backward.Tensor: 1,
    aten.binary_cross_entropy_backward.default: 1, aten._log_softmax_backward_data.default: 1,
    aten._cdist_backward.default: 1,
}  # fmt: skip


def find_exact(backward: fx.GraphModule, saved: Mapping[str, fx.Node]) -> set[str]:
    """Return keys of the activations whose saved values must equal the computed ones exactly.

    Args:
        backward: the graph of the backward pass.
        saved: name of a backward graph's input that holds an activation → its probe.
    """
    made_of: dict[fx.Node, frozenset[str]] = {}  # nodes computed from saved values only
    found: set[str] = set()
    for node in backward.graph.nodes:
        if node.op == "placeholder":
            if not _torch.is_tangent(node):
                made_of[node] = frozenset((str(saved[node.name].args[1]) if node.name in saved else node.name,))
            continue
        if node.op != "call_function" or _torch.is_recomputed(node):
            continue
        arguments = node.all_input_nodes
        sources = frozenset(key for each in arguments for key in made_of.get(each, ()))
        if all(each in made_of for each in arguments):
            made_of[node] = sources
            if node.target in COMPARISONS and len(sources) > 1:
                found |= sources
        pole = node.args[_POLES[node.target]] if node.target in _POLES else None
        found |= made_of.get(pole, frozenset()) if isinstance(pole, fx.Node) else frozenset()
    return found
