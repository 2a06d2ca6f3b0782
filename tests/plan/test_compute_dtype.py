"""The dtype in which each operator runs: what the table predicts, and what the marked graph computes."""

import contextlib

import pytest
import torch
from helpers import all_high, all_low, everything, traced
from models import MODELS, Checkpointed, Complex, Gated, Recurrent, Upsampling, class_loss, images, tokens, vectors
from torch import fx

from assign import _torch
from assign.executor.context import Context, Step
from assign.executor.passes.mark import mark
from assign.numerics.delayed import DelayedScales
from assign.numerics.promotion import Promotion
from assign.plan.compute_dtype import ComputeDtypes
from assign.plan.plan import Assignment, Entry
from assign.plan.recipes import promotable
from assign.strategies.baselines import as_loaded
from assign.tracing.capture import compile_step
from assign.tracing.functionalize import functionalize
from assign.tracing.loaded import complete
from assign.tracing.tensor_sites import dtype_of, walk


class WithBuffers(torch.nn.Module):
    """Buffers and constants beside activations; a small one and one as large as an activation."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(16, 16), torch.nn.Linear(16, 4)
        self.register_buffer("offset", torch.randn(16))
        self.register_buffer("table", torch.randn(16, 16))

    def forward(self, x):
        x = (self.first(x) + self.offset).tanh() * self.table
        return self.second(torch.maximum(x, torch.full((16,), -0.5, dtype=x.dtype)))


class Converting(torch.nn.Module):
    """A user's own conversions, up and down, some of which change nothing."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = torch.nn.Linear(16, 16), torch.nn.Linear(16, 4), torch.nn.LayerNorm(16)

    def forward(self, x):
        x = self.first(x.to(self.first.weight.dtype))
        y = self.norm(x.float().to(self.norm.weight.dtype)).type_as(x)
        return self.second((x + y.to(torch.bfloat16).to(x.dtype)).to(self.second.weight.dtype)).float()


OTHERS = {
    "checkpointed": (Checkpointed, tokens),
    "complex": (Complex, vectors),
    "slices": (Gated, vectors),
    "recurrent": (Recurrent, vectors),
    "upsampling": (Upsampling, images),
    "buffers": (WithBuffers, vectors),
    "conversions": (Converting, vectors),
}
ALL = MODELS | OTHERS
PLANS = {
    "as loaded": lambda table: Assignment(
        entries=as_loaded(table, None), recipe="native", fingerprint=table.fingerprint
    ),
    "fp32": lambda table: everything(table, "fp32"),
    "bf16": lambda table: everything(table, "bf16"),
    "emulated": lambda table: everything(table, "fp(4,3,4)"),
    "high": all_high,
    "low": all_low,
    "mixed": lambda table: Assignment(
        entries={
            row.key: Entry(("fp32", "bf16", "e4m3:pow2", "bf16", "fp16")[number % 5], False)
            for number, row in enumerate(table.paper_tensors)
        },
        recipe="native",
        fingerprint=table.fingerprint,
    ),
    "promotable": lambda table: Assignment(  # e4m3 lives in bf16, but the recipe's high format needs float32
        entries={row.key: Entry("e4m3", True) for row in table.paper_tensors},
        recipe="hfp8",
        fingerprint=table.fingerprint,
    ),
}


class Recorder(fx.Interpreter):
    """Runs a graph on values without data, bodies of checkpointed blocks included, and notes what each node makes."""

    def __init__(self, graph, values):
        super().__init__(graph)
        self.values = values

    def run_node(self, n):
        self.values[n] = super().run_node(n)
        return self.values[n]

    def call_function(self, target, args, kwargs):
        if target is _torch.CHECKPOINT_OP:
            return Recorder(args[0], self.values).run(*args[1:])
        return super().call_function(target, args, kwargs)


def executed(model, batch, plan, promotion):
    """Key → dtype that its operator makes, and dtype in which its mark leaves it."""
    made, marked = {}, {}

    def receive(capture):
        functionalize(capture.graph)
        walked = walk(capture)
        step = Step(capture=capture, walked=walked, promotion=promotion, scales=DelayedScales(plan))
        inputs = capture.graph.graph.find_nodes(op="placeholder")
        mark(capture.graph, Context(plan=complete(plan, model), step=step))
        examples = [_torch.fake_value(n) for n in inputs]
        stored = [capture.dtypes.get(n) for n in inputs]
        examples = [x if dtype is None else x.to(dtype) for x, dtype in zip(examples, stored, strict=True)]
        values = {}
        with _torch.without_data(examples), torch.enable_grad():
            added = [value for each in step.added for value in each.make(capture.inputs)]
            Recorder(capture.graph, values).run(*examples, *added)
        for site in walked.sites:
            made.setdefault(site.key, dtype_of(values[site.node]))  # the first, where it enters a checkpointed block
        for node, key in walked.key_of.items():
            if node in values and getattr(node.target, "__name__", "") == "mark_tensor":
                marked[key] = dtype_of(values[node])
        for node in (
            node for each in step.added for node in each.nodes
        ):  # Dynamo counts the inputs of its graph once more
            _torch.drop_input(capture.graph, node)
        return stop

    def stop(*_inputs):
        raise Done

    with contextlib.suppress(Done):
        compile_step(model, class_loss, receive)(batch)
    return made, marked


class Done(Exception):
    """All is known; the step itself need not run."""


@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_predicted_dtypes_are_those_that_run(name, loaded):
    make, batch = ALL[name]
    if loaded != torch.float32 and name in ("complex", "explicit dtypes", "in place"):
        pytest.skip("its code makes float32 tensors, which plain torch does not multiply with bf16 either")
    torch.manual_seed(0)
    model, batch = make(), batch()
    model = model if loaded == torch.float32 else model.to(loaded)
    batch = tuple(x.to(loaded) if x.is_floating_point() else x for x in batch)
    table = traced(model, batch)
    for title, plan in PLANS.items():
        chosen = plan(table)
        later = promotable(table, chosen)
        assert later or title != "promotable"
        for every in (0, 1) if later else (0,):
            lowered = ComputeDtypes.of_table(table, chosen.entries, later if every else {})
            made, marked = executed(model, batch, chosen, Promotion(chosen, every=every))
            rows = [row for row in table.paper_tensors if row.key in made and row.op not in ("parameter", "input")]
            assert {r.key: lowered.compute(r.key) for r in rows} == {r.key: made[r.key] for r in rows}, title
            assert {key: lowered.carrier(key) for key in marked} == marked, title
