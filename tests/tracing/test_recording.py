"""Steps that Dynamo cannot capture as one graph: recorded in pieces, with the same names and the same numbers."""

import copy
import io
import random
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import adamw, everything, measured_peak, sgd, traced
from models import (
    GPT,
    MLP,
    Complex,
    Explicit,
    Gated,
    OwnFunction,
    Recurrent,
    ResNet,
    Upsampling,
    class_loss,
    images,
    tokens,
    vectors,
)
from torch import library, nn
from torch.utils.checkpoint import checkpoint

import assign
from assign.errors import TraceError
from assign.planner import search_table
from assign.report.tables import trace_table
from assign.report.terminal import Terminal
from assign.tracing import recording
from assign.tracing.capture import compile_step
from assign.tracing.functionalize import functionalize
from assign.tracing.tensor_sites import walk


def square_loss(model, x):
    return model(x).square().mean()


def broken(loss):
    """The same loss, which Dynamo does not capture."""

    def step(model, batch):
        torch._dynamo.graph_break()
        return loss(model, batch)

    return step


def run(model, step, batch):
    torch.manual_seed(1)
    loss = step(batch)
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()], [b.clone() for b in model.buffers()]


def plain_backend(capture):
    functionalize(capture.graph)
    walk(capture)
    return capture.graph.forward


def same(found, expected):
    return found is expected is None or torch.equal(found, expected)


def assert_same(found, expected):
    assert torch.equal(found[0], expected[0])
    assert all(map(same, found[1], expected[1]))
    assert all(map(same, found[2], expected[2]))


MODELS = {
    "mlp": (MLP, vectors),
    "gated": (Gated, vectors),
    "resnet": (ResNet, images),
    "gpt": (GPT, tokens),
    "own function": (OwnFunction, vectors),
    "upsampling": (Upsampling, images),
    "explicit": (Explicit, vectors),
    "complex": (Complex, vectors),
    "recurrent": (Recurrent, vectors),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_graph_break_changes_neither_names_nor_numbers(name):
    make, batches = MODELS[name]
    model, batch = make(), batches()
    table, other = (traced(model, batch, loss) for loss in (class_loss, broken(class_loss)))
    assert other.fingerprint == table.fingerprint
    assert [row.key for row in other.paper_tensors] == [row.key for row in table.paper_tensors]
    for format_name in ("fp32", "bf16"):
        plan, results = everything(table, format_name), []
        for loss in (class_loss, broken(class_loss)):
            copied = copy.deepcopy(model)
            results.append(run(copied, assign.planned_step(copied, loss, plan, backend="eager"), batch))
        assert_same(results[1], results[0])


class Checked(nn.Module):
    """Looks at its batch and at its own activations; draws random numbers in between."""

    def __init__(self, look="both"):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 4)
        self.norm, self.look, self.calls = nn.BatchNorm1d(32), look, 0

    def forward(self, batch):
        x, labels = batch
        self.calls += 1
        if labels.max() >= 4:
            raise ValueError("label out of range")
        h = F.dropout(self.norm(self.first(x)).relu(), 0.25)
        if self.look != "batch" and h.abs().max().item() > 1e3:
            return h.sum()
        noise = torch.rand(1)
        h = h + self.second(h * noise)
        if self.look != "batch" and bool((h > 0).any()):
            h = h.tanh()
        return F.cross_entropy(self.head(h), labels)


def call(model, batch):
    return model(batch)


@pytest.mark.parametrize(("look", "pieces"), [("batch", 2), ("both", 3)])
def test_branches_on_values(look, pieces):
    """What depends on the batch alone ends no piece; random numbers are drawn in the order of the code."""
    model, batch = Checked(look), vectors()
    plain, table = copy.deepcopy(model), traced(model, batch, call)
    expected = run(plain, lambda each: call(plain, each), batch)
    step = assign.planned_step(model, call, everything(table, "fp32"), backend="eager")
    assert_same(run(model, step, batch), expected)
    low = copy.deepcopy(model)
    low.zero_grad()
    found = run(low, assign.planned_step(low, call, everything(table, "bf16"), backend="eager"), batch)
    assert float(found[0]) == pytest.approx(float(expected[0]), rel=0.02)  # a few bf16 ulps (2^-8) per tensor
    assert len(table.breaks) == pieces - 1
    assert all("test_recording.py" in each for each in table.breaks)
    compiled = compile_step(model, call, plain_backend)
    compiled(batch)
    assert compiled.recorder.pieces == pieces


class GrowsInItsFirstStep(nn.Module):
    """Makes a layer behind its dropout, the first time it runs; looks at its batch, so that it is recorded."""

    def __init__(self):
        super().__init__()
        self.first, self.mix = nn.Linear(16, 8), None

    def forward(self, batch):
        x, labels = batch
        assert labels.max() < 8
        h = F.dropout(self.first(x), 0.25)
        if self.mix is None:
            self.mix = nn.Linear(8, 8).weight.detach()
        return F.cross_entropy(F.dropout(h @ self.mix, 0.25), labels)


def test_layers_made_in_a_step_draw_in_the_order_of_the_code():
    """The dropout mask of the first layer is drawn before the initial weights of a layer that is made after it."""
    model, batch = GrowsInItsFirstStep(), vectors()
    plan, plain = everything(traced(model, batch, call), "fp32"), copy.deepcopy(model)
    expected = run(plain, lambda each: call(plain, each), batch)
    assert_same(run(model, assign.planned_step(model, call, plan, backend="eager"), batch), expected)


class SeedsItself(nn.Module):
    """Draws twice by one seed, as reversible layers do; looks at its batch, so that it is recorded."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 8)

    def forward(self, batch):
        x, labels = batch
        assert labels.max() < 8
        h = F.dropout(self.first(x), 0.25)
        state = torch.get_rng_state()
        torch.manual_seed(3)
        h = F.dropout(h, 0.25)
        torch.random.set_rng_state(state)
        return F.cross_entropy(F.dropout(h, 0.25), labels)


def test_a_generator_that_is_set_within_a_step():
    model, batch = SeedsItself(), vectors()
    table, plain = traced(model, batch, call), copy.deepcopy(model)
    expected = run(plain, lambda each: call(plain, each), batch)
    step = assign.planned_step(model, call, everything(table, "fp32"), backend="eager")
    assert_same(run(model, step, batch), expected)
    assert any("generator" in each for each in table.breaks)


def test_an_error_of_the_users_code_stays_the_users_error():
    model, (x, labels) = Checked(), vectors()
    plan = everything(traced(model, (x, labels), call), "bf16")
    step = assign.planned_step(model, call, plan, backend="eager")
    step((x, labels)).backward()
    with pytest.raises(ValueError, match="label out of range"):
        step((x, labels + 4))
    step((x, labels)).backward()


def test_tracing_leaves_everything_as_it_was():
    model, batch = Checked(), vectors()
    before, state = {n: v.clone() for n, v in model.state_dict().items()}, torch.random.get_rng_state()
    python, numpy = random.getstate(), np.random.get_state()[1].copy()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    hooks = len(model._forward_hooks)
    traced(model, batch, call, adamw)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert random.getstate() == python
    assert np.array_equal(np.random.get_state()[1], numpy)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert (model.calls, len(model._forward_hooks)) == (0, hooks)


class Experts(nn.Module):
    """Tokens go to the experts that a router chooses: how many, depends on the weights."""

    def __init__(self, how):
        super().__init__()
        self.router, self.how = nn.Linear(16, 3), how
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        weights, chosen = self.router(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            if self.how == "mask":
                mine = chosen == number
                y[mine] = expert(x[mine]) * weights[mine, None]
            else:
                (mine,) = torch.where(chosen == number)
                if len(mine):
                    y.index_add_(0, mine, expert(x[mine]) * weights[mine, None])
        return self.head(y)


@pytest.mark.parametrize("how", ["mask", "where"])
def test_experts_that_a_router_chooses(how):
    model, batch = Experts(how), vectors()
    table = traced(model, batch)
    assert {"experts.0/linear", "experts.2/linear", "/softmax"} <= table.by_key.keys()
    plain = copy.deepcopy(model)
    expected = run(plain, lambda each: class_loss(plain, each), batch)
    step = assign.planned_step(model, class_loss, everything(table, "fp32"), backend="eager")
    found = run(model, step, batch)
    assert torch.equal(found[0], expected[0])
    for gradient, other in zip(found[1], expected[1], strict=True):
        assert torch.allclose(gradient, other, rtol=1e-5, atol=1e-7)  # parts are summed in another order


def counting(compiled):
    """A backend that runs what was captured, and notes the line of its first operator."""

    def backend(capture):
        compiled.append(
            next(node for node in capture.graph.graph.nodes if "stack_trace" in node.meta).meta["stack_trace"]
        )
        return plain_backend(capture)

    return backend


@pytest.mark.parametrize("how", ["mask", "where"])
def test_an_expert_loop_compiles_each_part_for_any_number_of_tokens(how):
    torch.manual_seed(0)
    model, compiled = Experts(how), []
    plain, step = copy.deepcopy(model), compile_step(model, class_loss, counting(compiled))
    for number in range(50):
        torch.manual_seed(number)
        batch = torch.randn(24 + 5 * number, 16), torch.randint(0, 4, (24 + 5 * number,))
        found, expected = step(batch), class_loss(plain, batch)
        assert torch.equal(found, expected)
        found.backward()
        expected.backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-6)  # parts are summed in another order
    pieces = 1 + 3 + 1
    assert len(compiled) <= 3 * pieces


class Lengths(nn.Module):
    """Attention by hand over sequences of any length, with shapes that the code computes."""

    def __init__(self):
        super().__init__()
        self.embed, self.qkv, self.head = nn.Embedding(20, 16), nn.Linear(16, 48), nn.Linear(16, 20)

    def forward(self, ids):
        rows, length = ids.shape
        if ids.max() >= 20:
            raise ValueError("no such token")
        q, k, v = self.qkv(self.embed(ids)).view(rows, length, 6, 8).permute(0, 2, 1, 3).chunk(3, dim=1)
        scores = (q @ k.mT).masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf"))
        if float(scores[:, :, -1].detach().max()) > 1e6:
            raise ValueError("scores explode")
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(rows * length, 16)
        return self.head(mixed[: length - 1]), self.head(mixed.view(rows, length * 16)[:, -16:])


def last_loss(model, ids):
    first, last = model(ids)
    return first.square().mean() + F.cross_entropy(last, ids[:, 0])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_batches_of_any_size_share_the_compiled_pieces(backend):
    torch.manual_seed(0)
    model = Lengths()
    batches = [torch.randint(0, 20, (2 + number % 3, 5 + number)) for number in range(12 if backend == "eager" else 4)]
    table = traced(model, batches[0], last_loss)
    plain, compiled = copy.deepcopy(model), []
    step = assign.planned_step(model, last_loss, everything(table, "fp32"), backend=backend)
    for batch in batches:
        found, expected = run(model, step, batch), run(plain, lambda each: last_loss(plain, each), batch)
        assert torch.equal(found[0], expected[0]) or backend == "inductor"
        assert found[0] == pytest.approx(expected[0].item(), rel=1e-5)
        for one, other in zip(found[1], expected[1], strict=True):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)
    model, compiled = Lengths(), []
    step = compile_step(model, last_loss, counting(compiled))
    for batch in batches:
        step(batch)
    assert len(compiled) <= 3 * 2


def test_numbers_that_change_in_every_batch_are_refused_in_the_end():
    model, (x, _) = MLP(), vectors()

    def loss(model, batch):
        y = model(x)
        if float(y.detach().sum()) > 1e9:
            raise ValueError
        return (y * batch).sum()

    step = compile_step(model, loss, plain_backend)
    for number in range(torch._dynamo.config.recompile_limit):
        assert step(1 + number**3).item() == pytest.approx(loss(model, 1 + number**3).item(), rel=1e-5)
    with pytest.raises(TraceError, match=r"(?s)compiled 8 times for the same operators.*test_recording.py:\d+"):
        step(10**6)


class Winding(nn.Module):
    """In-place operators, several results of one function, a buffer, and a way that depends on the step."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.register_buffer("seen", torch.zeros(()))
        self.way = 0

    def forward(self, x):
        self.seen += 1
        y = torch.zeros_like(x)
        left, right = self.first(x).chunk(2, dim=-1)
        y[:, :8], y[:, 8:] = left.tanh(), right
        if y.detach().abs().max() > 1e6:
            raise ValueError("explodes")
        best, _ = y.max(-1, keepdim=True)
        if self.way == 1:
            y = y.relu_()
        elif self.way == 2:
            with torch.no_grad():
                y = y + self.second(x)
        y = y + best
        if self.way != 3:
            y = self.second(y)
            y.mul_(0.5)
        return self.head(y)


def test_a_step_that_goes_as_the_one_before_is_not_recorded_again(monkeypatch):
    torch.manual_seed(0)
    model, batch = Winding(), vectors()
    plain, recorded = copy.deepcopy(model), []
    step = compile_step(model, class_loss, plain_backend)
    write = recording._Recording._write
    monkeypatch.setattr(
        recording._Recording, "_write", lambda self, func, *rest: (recorded.append(func), write(self, func, *rest))[1]
    )
    counts = []
    for way in (0, 0, 0, 1, 1, 2, 2, 3, 3, 0, 0):
        recorded.clear()
        model.way = plain.way = way
        assert_same(run(model, step, batch), run(plain, lambda each: class_loss(plain, each), batch))
        counts.append(len(recorded))
    assert counts[0] > 10
    assert counts[1] == counts[2] == counts[4] == counts[6] == counts[8] == counts[10] == 0
    assert 0 < counts[3] < counts[0]  # the piece before the other way is as it was


class Dropped(nn.Module):
    """Layers are left out at random, as by LayerDrop."""

    def __init__(self, layers=6):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(layers))
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        for layer in self.layers:
            if torch.rand([]) < 0.5:
                continue
            x = x + layer(x).tanh()
        return self.head(x)


def test_branches_that_vary_compile_each_part_a_few_times():
    """Not a graph for each of the 2^6 ways through the layers; parameters that are left out have no gradient."""
    torch.manual_seed(8)  # one layer of six
    model, batch = Dropped(), vectors()
    plan = assign.search(GivenAll(model), batch, class_loss, low_ratio=0.0)
    plain, compiled = copy.deepcopy(model), []

    def backend(capture):
        compiled.append(capture)
        return plain_backend(capture)

    step = compile_step(model, class_loss, backend)
    for number in range(40):
        torch.manual_seed(number)
        found = step(batch)
        torch.manual_seed(number)
        assert torch.equal(found, class_loss(plain, batch))
    assert len(compiled) <= 4 * 6 + 8
    assert plan.entries


class Unread(nn.Module):
    """Of the best values only the places are read, and one of two slices; all of them live on in the code."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        y = self.first(x)
        best, places = y.mean(0).topk(2)
        unread, read = y[:3], y[3:]
        if int(places[0]) > 100:
            raise ValueError
        return self.head(y * y[:, places].sum(1, keepdim=True) + read.sum()), best, unread


def test_results_that_nothing_reads_have_their_names_in_every_piece():
    torch.manual_seed(0)
    model, batch = Unread(), vectors()

    def loss(model, batch):
        y, _, _ = model(batch[0])
        return F.cross_entropy(y, batch[1])

    table = traced(model, batch, loss)
    assert {"/topk", "/slice", "/slice#2"} <= table.by_key.keys()
    plain = copy.deepcopy(model)
    step = assign.planned_step(model, loss, everything(table, "fp32"), backend="eager")
    assert_same(run(model, step, batch), run(plain, lambda each: loss(plain, each), batch))


def test_a_step_without_gradients_before_training_costs_no_gradient():
    torch.manual_seed(0)
    model, batch = MLP(), vectors()
    plain, loss = copy.deepcopy(model), broken(class_loss)
    step = assign.planned_step(model, loss, everything(traced(model, batch, loss), "fp32"), backend="eager")
    with torch.no_grad():
        assert torch.equal(step(batch), class_loss(plain, batch))
    assert_same(run(model, step, batch), run(plain, lambda each: class_loss(plain, each), batch))
    with torch.no_grad():
        assert not step(batch).requires_grad


class Remade(nn.Module):
    """A layer that makes another of its kind while it runs, with its own weights."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        other = nn.Linear(16, 16)
        other.weight, other.bias = self.layer.weight, self.layer.bias
        return self.head(other(x).tanh())


def test_modules_may_be_made_while_the_code_runs():
    torch.manual_seed(0)
    model, batch = Remade(), vectors()
    plain, loss = copy.deepcopy(model), broken(class_loss)
    step = assign.planned_step(model, loss, everything(traced(model, batch, loss), "fp32"), backend="eager")
    assert_same(run(model, step, batch), run(plain, lambda each: class_loss(plain, each), batch))


class GivenAll(nn.Module):
    """A model whose random branches are all taken."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        for layer in self.model.layers:
            x = x + layer(x).tanh()
        return self.model.head(x)


class Wrapped(torch.autograd.Function):
    """Runs a module within a function of its own: autograd does not see the module's parameters in the arguments."""

    @staticmethod
    def forward(ctx, x, module):
        ctx.module = module
        with torch.enable_grad():
            ctx.x = x.detach().requires_grad_()
            ctx.y = module(ctx.x)
        return ctx.y.detach()

    @staticmethod
    def backward(ctx, grad):
        torch.autograd.backward(ctx.y, grad)
        return ctx.x.grad, None


class Hidden(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.first, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(Wrapped.apply(self.first(x), self.inner).tanh())


def test_an_operator_outside_every_piece_is_listed_and_trained():
    model, batch = Hidden(), vectors()
    table = traced(model, batch)
    assert len(table.outside) == 1
    assert "test_recording.py" in table.outside[0]
    assert "autograd_function_apply, 256 elements" in table.outside[0]
    plain = copy.deepcopy(model)
    expected = run(plain, lambda each: class_loss(plain, each), batch)
    plan = everything(table, "fp32")
    with pytest.warns(UserWarning, match=r"autograd_function_apply at .*test_recording.*runs outside the plan"):
        found = run(model, assign.planned_step(model, class_loss, plan, backend="eager"), batch)
    assert_same(found, expected)


class LooksAtHidden(Hidden):
    """Reads a value that an operator outside every piece has computed, and ``requires_grad`` of a pending result."""

    def forward(self, x):
        h = Wrapped.apply(self.first(x), self.inner)
        if h.abs().sum() == 0:
            return h
        scaled = h * 2
        return self.head(scaled.tanh() if scaled.requires_grad and not scaled.is_leaf else scaled)


@pytest.mark.filterwarnings("ignore:assign. autograd_function_apply")
def test_values_and_gradients_of_what_an_operator_outside_has_computed():
    model, batch = LooksAtHidden(), vectors()
    table, plain = traced(model, batch), copy.deepcopy(model)
    assert {"/tanh", "head/linear"} <= table.by_key.keys()
    expected = run(plain, lambda each: class_loss(plain, each), batch)
    step = assign.planned_step(model, class_loss, everything(table, "fp32"), backend="eager")
    assert_same(run(model, step, batch), expected)


def test_a_checkpointed_block_is_computed_again_in_pieces_too():
    class Block(nn.Module):
        def __init__(self, reentrant):
            super().__init__()
            self.a, self.b, self.head, self.reentrant = (
                nn.Linear(16, 64),
                nn.Linear(64, 16),
                nn.Linear(16, 4),
                reentrant,
            )

        def inner(self, x):
            return self.b(self.a(x).tanh())

        def forward(self, x):
            return self.head(checkpoint(self.inner, x + 0, use_reentrant=self.reentrant))

    for reentrant in (False, True):
        model, batch = Block(reentrant), vectors()
        saved = [
            {key for key in traced(model, batch, loss).by_key if key.endswith(".saved")}
            for loss in (class_loss, broken(class_loss))
        ]
        assert saved[0] == saved[1]
        assert "a/linear.saved" not in saved[1]


def test_a_second_backward_pass_is_refused_with_its_line():
    def penalty(model, batch):
        x = batch[0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return slope.square().sum()

    with pytest.raises(TraceError, match=r"(?s)differentiated twice.*test_recording\.py"):
        traced(MLP(), vectors(), penalty)


def test_hooks_and_inputs_that_require_gradients():
    """What users of frozen models do: an activation is made to require gradients."""
    seen = []

    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.f, self.head = nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 4)
            self.tokens.requires_grad_(False)

        def forward(self, ids):
            h = self.tokens(ids)
            h.requires_grad_(True)
            h.register_hook(lambda gradient: seen.append(gradient))
            return self.head(self.f(h).tanh())

    model, batch = Frozen(), tokens(length=8)
    model.tokens, batch = nn.Embedding(65, 8).requires_grad_(False), (batch[0], batch[1] % 4)
    plan = everything(traced(model, batch), "fp32")
    plain = copy.deepcopy(model)
    expected = run(plain, lambda each: class_loss(plain, each), batch)
    assert_same(run(model, assign.planned_step(model, class_loss, plan, backend="eager"), batch), expected)
    assert len(seen) == 2
    assert torch.equal(seen[0], seen[1])


def test_evaluation_and_outputs_that_are_kept():
    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.head, self.last = nn.Linear(16, 16), nn.Linear(16, 4), None

        def forward(self, x):
            self.last = self.f(x)
            torch._dynamo.graph_break()
            return {"logits": self.head(self.last.relu()), "hidden": [self.last]}

    model, (x, _) = Keeping(), vectors()
    plan = assign.search(model, x, lambda m, x: m(x)["logits"].square().mean(), low_ratio=0.0)
    planned = assign.apply(model, plan, backend="eager")
    with torch.no_grad():
        out = planned.eval()(x)
    assert type(out["logits"]) is torch.Tensor
    assert out["hidden"][0].dtype == torch.float32
    assert (model.last + 1).sum().isfinite()  # what the model keeps is a tensor too
    planned.train()
    planned(x)["logits"].sum().backward()
    assert model.f.weight.grad is not None


def test_the_peak_of_a_step_in_several_pieces():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(256, 256) for _ in range(6))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x).tanh()
                if x.sum().isnan():
                    break
            return x

    table_with_right_peaks(Deep(), (torch.randn(2048, 256),), lambda model, batch: model(batch[0]).square().mean())


def table_with_right_peaks(model, batch, loss):
    """The table of a step, whose peaks in fp32 and bf16 are predicted to 5 %."""
    table = traced(model, batch, loss, sgd)
    for format_name in ("fp32", "bf16"):
        plan, copied = everything(table, format_name), copy.deepcopy(model)
        step = assign.planned_step(copied, loss, plan, backend="eager")
        measured = measured_peak(copied, batch, step, sgd(copied.parameters()))
        assert assign.estimate(table, plan).peak_bytes == pytest.approx(measured, rel=0.05), format_name
    return table


@pytest.mark.filterwarnings("ignore:assign. ctc_loss")
def test_the_peak_of_a_step_with_an_operator_outside_every_piece():
    """Activations saved before the operator count, although the operator is in no captured graph."""

    class Speech(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(64, 512), nn.Linear(512, 32)

        def forward(self, x):
            logits = self.head(self.body(x).tanh()).log_softmax(-1).transpose(0, 1)
            sizes = torch.full((x.shape[0],), x.shape[1]), torch.full((x.shape[0],), 5)
            return F.ctc_loss(logits, torch.arange(1, 6).expand(x.shape[0], 5), *sizes)

    table = table_with_right_peaks(Speech(), (torch.randn(8, 200, 64),), lambda model, batch: model(batch[0]))
    assert "ctc_loss" in table.outside[0]
    assert not any("ctc" in row.op for row in table.tensors)


def test_nothing_warns_where_all_runs_under_the_plan():
    model, batch = Checked(), vectors()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = everything(traced(model, batch, call), "bf16")
        assign.planned_step(model, call, plan, backend="eager")(batch)


def test_a_table_says_where_the_code_needs_a_value():
    table = traced(Sign(), torch.randn(4, 4), square_loss)
    console = Terminal(width=200, record=True, file=io.StringIO())
    console.print(trace_table(table))
    text = console.export_text()
    assert "because the code needs a value at" in text
    assert "test_recording.py" in text
    assert assign.TensorTable.from_json(table.to_json()).breaks == table.breaks


class Sign(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x):
        h = self.f(x)
        return h if h.sum() > 0 else -h


class Graph(nn.Module):
    """A layer on a graph whose adjacency matrix is sparse."""

    def __init__(self, layout="coo"):
        super().__init__()
        self.layer, self.head = nn.Linear(16, 32), nn.Linear(32, 4)
        adjacency = (torch.rand(16, 16) > 0.7).float()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, of its compressed layouts
            self.register_buffer("adjacency", adjacency.to_sparse() if layout == "coo" else adjacency.to_sparse_csr())

    def forward(self, x):
        return self.head(torch.sparse.mm(self.adjacency, self.layer(x)).relu())


@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_sparse_tensors_are_multiplied_outside_the_plan(layout):
    model, batch = Graph(layout), vectors()
    table = traced(model, batch)
    assert {"head/linear", "layer/linear"} <= table.by_key.keys()
    assert "mm" in table.outside[0]
    assert table.schedule.buffer_bytes > 0
    expected = run(model, lambda each: class_loss(model, each), batch)
    for format_name in ("fp32", "bf16"):
        model.zero_grad()
        step = assign.planned_step(model, class_loss, everything(table, format_name), backend="eager")
        with pytest.warns(UserWarning, match=r"at .*test_recording.*runs outside the plan"):
            found = run(model, step, batch)
        if format_name == "fp32":
            assert_same((*found[:2], []), (*expected[:2], []))
        assert found[0].item() == pytest.approx(expected[0].item(), rel=0.02)  # a few bf16 ulps (2^-8) per tensor


def selected(h):
    return torch.masked_select(h, h[:, :1] > 0)


def split(h):
    return torch.tensor_split(h, torch.tensor([1, 3]))[1]


def likely(h):
    """A loss of torch's own that looks at its argument's values."""
    return F.gaussian_nll_loss(h[:, 0], h[:, 1], h[:, 2].square(), eps=0.5)


def correlated(h):
    return torch.corrcoef(h.t())


@pytest.mark.parametrize("function", [selected, split, likely, correlated], ids=lambda f: f.__name__)
def test_operators_of_torch_that_look_at_values(function):
    """An all-fp32 plan computes what plain PyTorch does. Only tensor_split and corrcoef cannot be captured at all."""
    model, x = nn.Linear(16, 8), torch.randn(6, 16)

    def loss(model, x):
        return function(model(x)).square().sum()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = traced(model, x, loss)
        planned = copy.deepcopy(model)
        step = assign.planned_step(planned, loss, everything(table, "fp32"), backend="eager")
        assert_same(run(planned, step, x), run(model, lambda each: loss(model, each), x))
    assert bool(table.outside) == (function in (split, correlated))


def test_parameters_that_only_an_operator_outside_reads():
    """The table names none of the parameters, and the plan is the model's all the same."""

    class Cloud(nn.Module):
        def __init__(self):
            super().__init__()
            self.points = nn.Parameter(torch.randn(3, 8))

        def forward(self, x):
            return torch.corrcoef(self.points) * x

    model, x = Cloud(), torch.randn(())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = traced(model, x, square_loss)
        planned = copy.deepcopy(model)
        step = assign.planned_step(planned, square_loss, everything(table, "fp32"), backend="eager")
        assert_same(run(planned, step, x), run(model, lambda each: square_loss(model, each), x))


def test_shapes_that_depend_on_values_need_values():
    model, x = nn.Linear(4, 4, device="meta"), torch.randn(2, 4, device="meta")
    with pytest.raises(TraceError, match=r"depends on values, and a model on the meta device has none"):
        assign.trace(model, x, lambda m, x: torch.masked_select(m(x), m(x) > 0).sum())


@library.custom_op("assign_tests::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    """A custom operator with a backward pass."""
    return x * 2


@doubled.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


doubled.register_autograd(lambda ctx, gradient: gradient * 2)


def equals_plain(model, loss, batch, *, pieces):
    """Check that a step under an all-fp32 plan equals the plain step bit for bit, and has so many pieces."""
    table = traced(model, batch, loss)
    assert len(table.breaks) == pieces - 1
    assert not table.outside
    planned = copy.deepcopy(model)
    found = run(planned, assign.planned_step(planned, loss, everything(table, "fp32"), backend="eager"), batch)
    expected = run(model, lambda each: loss(model, each), batch)
    assert torch.equal(found[0], expected[0])
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))
    return table


def test_a_users_own_operator_keeps_its_name_in_several_pieces():
    def loss(model, x):
        return (torch.ops.assign_tests.doubled(model(x)) + doubled(model(x))).square().mean()

    torch.manual_seed(0)
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    table = equals_plain(model, broken(loss), x, pieces=1)
    assert {info.key for info in table.tensors} == {info.key for info in traced(model, x, loss).tensors}
    assert {"loss/doubled", "loss/doubled.default"} <= table.by_key.keys()


@dataclass
class Scaling:
    """Not hashable, as dataclasses are by default."""

    factor: float


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scaling):
        ctx.factor = scaling.factor
        return x * scaling.factor

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


def test_an_autograd_function_takes_arguments_that_are_not_hashable():
    def loss(model, x):
        return Scaled.apply(model(x), Scaling(factor=3.0)).square().mean()

    torch.manual_seed(0)
    equals_plain(nn.Linear(4, 3), broken(loss), torch.randn(6, 4), pieces=1)


def test_sizes_may_be_numbers_in_tensors():
    """The code computes a size with ``torch.div``, which returns a tensor."""

    def loss(model, x):
        hidden = model(x)
        rows = torch.div(torch.tensor(len(hidden)), 2, rounding_mode="trunc")
        torch._dynamo.graph_break()
        pairs = hidden.view(rows, 2, 3)
        space = hidden.new_zeros((rows, 2, 4))
        space[:, :, 1:] = pairs
        return space.square().mean()

    torch.manual_seed(0)
    equals_plain(nn.Linear(4, 3), loss, torch.randn(6, 4), pieces=1)


def test_a_tensor_that_the_code_writes_results_into_requires_a_gradient():
    def loss(model, x):
        torch._dynamo.graph_break()
        collected = torch.zeros(2, 6, 3)
        assert not collected.requires_grad
        for row in range(2):
            collected[row] = model(x) * (row + 1)
        assert collected.requires_grad
        assert not collected.is_leaf
        return collected.square().mean()

    torch.manual_seed(0)
    equals_plain(nn.Linear(4, 3), loss, torch.randn(6, 4), pieces=1)


def test_random_results_that_nothing_reads_are_drawn_if_torch_is_told_to_draw_as_in_eager_mode():
    def loss(model, x):
        hidden = model(x)
        F.dropout(hidden, 0.5)
        return F.dropout(hidden, 0.5).square().mean()

    torch.manual_seed(0)
    with torch._inductor.config.patch(fallback_random=True):
        equals_plain(nn.Linear(4, 3), loss, torch.randn(6, 4), pieces=1)


class Shared(nn.Module):
    """Layers that share one activation module; each layer is skipped at random."""

    def __init__(self, keep=1.0):
        super().__init__()
        activation = nn.GELU()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), activation) for _ in range(6))
        self.head, self.keep = nn.Linear(8, 4), keep

    def forward(self, x):
        for layer in self.layers:
            if self.keep == 1 or torch.rand([]) < self.keep:
                x = x + layer(x).relu()
        return self.head(x)


def test_a_module_that_layers_share_is_named_in_each():
    torch.manual_seed(0)
    model, x = Shared(), torch.randn(5, 8)
    tables = [traced(model, x, loss) for loss in (square_loss, broken(square_loss))]
    assert tables[0].fingerprint == tables[1].fingerprint
    assert {"layers.0.1/gelu", "layers.5.1/gelu"} <= tables[1].by_key.keys()


def test_an_operator_may_be_called_more_often_or_less_often_than_in_the_planned_step():
    torch.manual_seed(0)
    model, x = Shared(keep=0.5), torch.randn(5, 8)
    torch.manual_seed(8)  # one layer of six
    table = traced(model, x, square_loss)
    step = assign.planned_step(model, square_loss, everything(table, "fp32"), backend="eager")
    calls, warned = set(), []
    for seed in range(8):
        plain = copy.deepcopy(model)
        torch.manual_seed(seed)
        expected = square_loss(plain, x)
        expected.backward()
        calls.add(sum(layer[0].weight.grad is not None for layer in plain.layers))
        model.zero_grad()
        torch.manual_seed(seed)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = step(x)
        found.backward()
        warned += [str(each.message) for each in caught]
        assert torch.equal(found, expected)
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            assert (one.grad is None) == (other.grad is None)
            assert one.grad is None or torch.equal(one.grad, other.grad)
    assert len(calls) > 1
    assert any("/relu#" in each and "not narrowed" in each for each in warned)


class StartsOtherwise(nn.Module):
    """Takes another branch in its first step than in the second, as layers that observe ranges do."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.register_buffer("range", torch.zeros(1))

    def forward(self, x):
        h = self.body(x)
        seen = h.detach().abs().max()
        assert not seen.isnan()
        if self.range.item() == 0:
            self.range += seen
            return self.head(h.relu())
        return self.head((h * self.range).tanh())


def test_a_later_step_may_take_another_branch_than_the_planned_one():
    torch.manual_seed(0)
    model, x = StartsOtherwise(), torch.randn(5, 8)
    table, plain = traced(model, x, square_loss), copy.deepcopy(model)
    assert table.breaks
    step = assign.planned_step(model, square_loss, everything(table, "fp32"), backend="eager")
    assert_same(run(model, step, x), run(plain, lambda batch: square_loss(plain, batch), x))
    with pytest.warns(UserWarning, match="not narrowed: /mul"):
        assert_same(run(model, step, x), run(plain, lambda batch: square_loss(plain, batch), x))


class CutOff(nn.Module):
    """Writes what a first piece computes into a tensor that later pieces detach or compare: it gets no gradient."""

    def __init__(self, how):
        super().__init__()
        self.points, self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.how = how

    def forward(self, x):
        points = self.points(x)
        count = (points > 0).nonzero().shape[0]
        padded = torch.zeros(x.shape[0] + 2, 8)
        padded[: x.shape[0]] = points + count * 0.01
        known = padded.reshape(x.shape[0] + 2, 8)
        if self.how == "detached":
            known = known.detach().contiguous()
        elif self.how == "compared":
            known = torch.where(known > 0, 1.0, x.mean())
        h = self.body(known)
        if h.sum().item() > 1e9:
            return h
        return self.head(h).square().mean(), padded, known


@pytest.mark.parametrize("how", ["detached", "compared", "as it is"])
def test_no_gradient_passes_what_cuts_it_off_in_a_later_piece(how):
    torch.manual_seed(0)
    model, x = CutOff(how), torch.randn(5, 8)
    plain = copy.deepcopy(model)

    def loss(model, batch):
        return model(batch)[0]

    table = traced(model, x, loss)
    assert len(table.breaks) == 2
    expected = run(plain, lambda batch: loss(plain, batch), x)
    assert_same(run(model, assign.planned_step(model, loss, everything(table, "fp32"), backend="eager"), x), expected)
    assert (plain.points.weight.grad is None) is (how != "as it is")
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)


def test_a_size_that_the_code_compares_with_a_known_one_ends_a_piece_each_time():
    """Dynamo knows the size then, AOTAutograd does not: tracing and running must take the same way."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.other = nn.Embedding(8, 4), nn.Linear(3, 4)

        def forward(self, ids, features):
            embedded, found = self.embed(ids), self.other(features)
            mask = (ids == 7).unsqueeze(-1).expand_as(embedded)
            torch._check(embedded[mask].numel() == found.numel())
            return embedded.masked_scatter(mask, found)

    batch = torch.tensor([[1, 7, 7, 2]]), torch.randn(2, 3)

    def loss(model, batch):
        return model(*batch).square().mean()

    torch.manual_seed(0)
    model = Model()
    table = assign.trace(model, batch, loss)
    plan = search_table(table, strategy="as-loaded")
    expected = loss(model, batch)
    expected.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    found = assign.planned_step(model, loss, plan, backend="eager")(batch)
    found.backward()
    assert torch.equal(found, expected)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
