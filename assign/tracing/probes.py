"""Insert probes: after every operator that makes a tensor, nodes that name it and its gradient.

They have the same places as the executor's marks, and do not change values: they identify tensors in the joint graph.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, library

from assign import _torch
from assign.plan.keys import grad_key
from assign.plan.table import MARK
from assign.tracing.layout import Layout
from assign.tracing.tensor_sites import Site, Walk


@library.custom_op("assign::probe", mutates_args=())
def probe(x: Tensor, key: str) -> Tensor:
    """Return a copy of a tensor of the table, which identifies the tensor in the joint graph."""
    return x.clone()


@probe.register_fake
def _(x: Tensor, key: str) -> Tensor:
    return torch.empty_like(x)


class _Probe(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, key: str) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.key = key
        probed: Tensor = torch.ops.assign.probe(x, key)
        return probed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        if grads[0] is None:
            return None, None
        return torch.ops.assign.probe(grads[0], grad_key(ctx.key)), None


def probe_tensor(x: Tensor, key: str) -> Tensor:
    """Return ``x``; the joint graph has a node for it, and one for its gradient."""
    return _torch.apply_function(_Probe, x, key)


def insert_probes(graph: fx.GraphModule, walked: Walk) -> None:
    """Insert a probe after every site of a captured graph; readers of the tensor then read the probe."""
    for node, key in walked.labels.items():
        _torch.label(node, key)
    layouts: dict[fx.GraphModule, Layout] = {}
    for site in walked.sites:
        layout = layouts.get(site.owner) or layouts.setdefault(site.owner, Layout(site.owner.graph))
        for group in site.groups(layout):
            _insert_probe(site, layout, group)
    for owner in layouts:
        owner.recompile()
    graph.recompile()


def _insert_probe(site: Site, layout: Layout, readers: Sequence[fx.Node]) -> None:
    graph, is_input = site.owner.graph, site.node.op == "placeholder"
    with graph.inserting_before(readers[0] if is_input else site.after.next):
        probed = graph.call_function(probe_tensor, (site.node, site.key))
    neighbour = readers[0] if is_input else site.after
    if site.value.requires_grad and neighbour in layout.without_grad:
        _torch.enable_grad_around(graph, probed)
    _torch.label(probed, MARK + site.key)
    _torch.stand_in_block_of(probed, neighbour)
    for reader in readers:
        reader.replace_input_with(site.node, probed)
