"""Group the tensors that share one decision, with the rule of the paper on any graph.

A group is the output of one matrix product and everything computed from it, up to and including the inputs and the
parameters of the next matrix product. A whole group is high or low, so a product never has one operand of each kind.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from assign.plan.ops import GROUP_STARTS, INPUT
from assign.plan.table import Role, TensorInfo


def assign_groups(tensors: Sequence[TensorInfo]) -> tuple[TensorInfo, ...]:
    """Return the rows, in the same order, with the group of each.

    Activations are visited in the order of execution. Inputs and matrix products start a new group; every other
    activation belongs to the current one. A weight belongs to the group of the first activation that its first reader
    reads (for a convolution: the group *before* the convolution's own), or to its reader's own group if the reader
    reads no activation, as for an embedding. A weight without readers belongs to group 0. Gradients, saved copies,
    masters and optimizer states belong to the group of their tensor.

    Source: arXiv 2301.13464, Algorithm 1, and the grouping in the authors' code.
    """
    activations = {row.key: row for row in tensors if row.role is Role.ACTIVATION}
    group_of = _groups_of_activations(activations.values())
    weights = {row.key: _group_of_weight(row, activations, group_of) for row in tensors if row.role is Role.WEIGHT}
    group_of.update(weights)
    return tuple(dataclasses.replace(row, group=group_of.get(row.parts.name, 0)) for row in tensors)


def _groups_of_activations(activations: Iterable[TensorInfo]) -> dict[str, int]:
    group_of: dict[str, int] = {}
    running = -1
    for row in activations:
        if running < 0 or row.op == INPUT or row.op in GROUP_STARTS:
            running += 1
        group_of[row.key] = running
    return group_of


def _group_of_weight(row: TensorInfo, activations: Mapping[str, TensorInfo], group_of: Mapping[str, int]) -> int:
    reader = next((activations[key] for key in row.consumers if key in activations), None)
    if reader is None:
        return 0
    first_input = next((key for key in reader.inputs if key in activations), reader.key)
    return group_of[first_input]
