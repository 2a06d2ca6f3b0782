"""Group the tensors that share one decision, with the rule of the paper on any graph.

A group is one matrix product's output and all that follows it, up to and including the inputs and the parameters of the
next matrix product. All of a group is high or all of it is low, so a product never meets one operand of each kind.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from assign.plan.ops import GROUP_STARTS, INPUT
from assign.plan.table import Role, TensorInfo


def assign_groups(tensors: Sequence[TensorInfo]) -> tuple[TensorInfo, ...]:
    """Set the group of every row; the order of the rows stays.

    Activations are walked in the order of the rows, which is the order of execution. Inputs and matrix products start a
    new group, every other activation falls into the running one. A weight falls into the group of the first activation
    that its first reader reads (for a convolution: the group *before* the convolution's own), or into its
    reader's own group where that reads no activation, as an embedding does. A weight that nobody reads goes
    to group 0. Gradients, saved copies, masters and optimizer states follow the tensor that they belong to.

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
