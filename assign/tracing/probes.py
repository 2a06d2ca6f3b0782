"""Probes: after every operator that makes a tensor, a node that names it, and another that names its gradient.

They stand where the executor marks, and compute nothing: in the joint graph, tensors are found by them.
"""

from typing import Any

import torch
from torch import Tensor, fx, library

from assign import _torch
from assign.plan.tensors import MARK, grad_key
from assign.tracing.operators import Walk


@library.custom_op("assign::probe", mutates_args=())
def probe(x: Tensor, key: str) -> Tensor:
    """A tensor of the table, to be found again in the joint graph."""
    return x.clone()


@probe.register_fake
def _(x: Tensor, key: str) -> Tensor:
    return torch.empty_like(x)


class _Probe(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, key: str) -> Tensor:
        ctx.key = key
        probed: Tensor = torch.ops.assign.probe(x, key)
        return probed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return torch.ops.assign.probe(grads[0], grad_key(ctx.key)), None


def probe_tensor(x: Tensor, key: str) -> Tensor:
    """``x``; the joint graph has a node for it, and one for its gradient."""
    return _torch.apply_function(_Probe, x, key)


def insert_probes(graph: fx.GraphModule, walked: Walk) -> None:
    """Put a probe behind every site of a captured graph; whoever read the tensor reads the probe."""
    for node, key in walked.labels.items():
        _torch.label(node, key)
    for site in walked.sites:
        owner = site.owner.graph
        readers = list(site.readers if site.readers is not None else site.node.users)
        order = {n: i for i, n in enumerate(owner.nodes)}
        readers = [n for n in readers if n in order and order[n] > order[site.after]]
        first = min(readers, key=order.__getitem__, default=None)
        if first is None:
            continue
        with owner.inserting_before(first if site.node.op == "placeholder" else site.after.next):
            marked = owner.call_function(probe_tensor, (site.node, site.key))
        _torch.label(marked, MARK + site.key)
        for reader in readers:
            reader.replace_input_with(site.node, marked)
        site.owner.recompile()
    graph.recompile()
