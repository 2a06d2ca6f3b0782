"""Habits of real training code under a plan: what is written in plain PyTorch must mean the same here."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import adamw, all_low, everything, sgd, traced
from torch import nn

import assign


def square_loss(model, batch):
    return model(batch).square().mean()


def near(found, expected):
    return (found - expected).norm() <= 0.05 * expected.norm() + 1e-6  # a few bf16 ulps (2^-8) per operator


class Recycled(nn.Module):
    """A layer is used without gradients first, as in recycling and self-conditioning, and trained afterwards."""

    def __init__(self, twice=False):
        super().__init__()
        self.f, self.out, self.twice = nn.Linear(8, 8), nn.Linear(8, 1), twice

    def forward(self, x):
        with torch.no_grad():
            x = self.f(x)
            if self.twice:
                x = self.f(x)
        return self.out(self.f(x).tanh())


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("format_name", ["fp32", "bf16", "fp(6,7,8)"])
def test_a_weight_that_is_used_without_gradients_first_is_trained(twice, format_name):
    model, x = Recycled(twice), torch.randn(4, 8)
    plan = everything(traced(model, x, square_loss), format_name)
    plain = copy.deepcopy(model)
    square_loss(plain, x).backward()
    assign.planned_step(model, square_loss, plan, backend="eager")(x).backward()
    for parameter, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert (
            torch.equal(parameter.grad, expected.grad) if format_name == "fp32" else near(parameter.grad, expected.grad)
        )


class Teacher(nn.Module):
    """The weights of a teacher follow those of the student within the forward pass."""

    def __init__(self, how, order):
        super().__init__()
        self.student, self.how, self.order = nn.Linear(4, 4), how, order
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    @torch.no_grad()
    def follow(self):
        for own, other in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            if self.how == "lerp":
                own.lerp_(other + 1, 0.1)
            elif self.how == "view":
                own.view(-1)[:2].add_(1)
            else:
                own.copy_(0.9 * own + 0.1 * (other + 1))

    def forward(self, x):
        if self.order == "first":
            self.follow()
        before = self.teacher(x)
        if self.order == "between":
            self.follow()
        y = self.student(x) - before - self.teacher(x)
        if self.order == "last":
            self.follow()
        return y


@pytest.mark.parametrize("how", ["lerp", "copy", "view"])
@pytest.mark.parametrize("order", ["first", "between", "last"])
@pytest.mark.parametrize("format_name", ["fp32", "bf16"])
def test_weights_written_in_the_forward_pass_are_written(how, order, format_name):
    model, x = Teacher(how, order), torch.randn(4, 4)
    plan = everything(traced(model, x, square_loss), format_name)
    plain, before = copy.deepcopy(model), model.teacher.weight.clone()
    step = assign.planned_step(model, square_loss, plan, backend="eager")
    for _ in range(2):  # the second step reads what the first one wrote
        found, expected = step(x), square_loss(plain, x)
        found.backward()
        expected.backward()
    assert not torch.equal(model.teacher.weight, before)
    if format_name == "fp32":
        assert torch.equal(found, expected)
        assert torch.equal(model.teacher.weight, plain.teacher.weight)
    else:
        assert near(found, expected)
        assert near(model.teacher.weight, plain.teacher.weight)


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(16, 2)

    def forward(self, x):
        h = self.f(x).relu()
        written = torch.zeros(len(x), 6)
        written[:, :2] = self.b(h)
        return {"a": self.a(h), "b": [self.b(h), written], "h": h[:, 1:]}


@pytest.mark.parametrize("read", [("a",), ("b",), ("a", "b"), ("h",), ("written",)])
@pytest.mark.parametrize("gradients", [None, "bf16"])
def test_parameters_behind_unread_results_have_no_gradient(read, gradients):
    def loss(model, x):
        out = model(x)
        found = {"a": out["a"], "b": out["b"][0], "written": out["b"][1], "h": out["h"]}
        return sum(found[name].square().mean() for name in read)

    model, x = Heads(), torch.randn(16, 8)
    stored = {} if gradients is None else {"gradients": gradients}
    plan = assign.search(model, x, square_of_all, low_ratio=0.0, optimizer=sgd, space=assign.SearchSpace(**stored))
    plain = copy.deepcopy(model)
    planned = assign.apply(model, plan, backend="eager")
    for _ in range(2):  # gradients accumulate
        loss(plain, x).backward()
        loss(planned, x).backward()
    for (name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), name
        assert other.grad is None or near(parameter.grad.float(), other.grad), name


def square_of_all(model, x):
    out = model(x)
    return sum(each.square().mean() for each in (out["a"], *out["b"], out["h"]))


class Counting(nn.Module):
    """Sizes and expert numbers are made from an activation, and masks from sizes: none of them carries a gradient."""

    def __init__(self):
        super().__init__()
        self.tokens, self.router, self.out = nn.Embedding(16, 8), nn.Linear(8, 4), nn.Linear(8, 2)

    def forward(self, ids):
        h = self.tokens(ids)
        positions = torch.arange(h.shape[1])
        mask = torch.where(positions[:, None] >= positions, 0.0, -1e4)
        chosen = self.router(h).argmax(-1)
        load = F.one_hot(chosen, 4).float().mean((0, 1))
        scores = (h @ h.transpose(1, 2) + mask).softmax(-1)
        return self.out(scores @ h) * load.sum()


def test_keys_do_not_depend_on_earlier_shapes_and_integers_are_no_tensors_of_a_plan():
    model = Counting()
    first = traced(model, torch.randint(0, 16, (2, 5)), square_loss)
    assert not any(name in key for key in first.by_key for name in ("where", "one_hot", "argmax", "float"))
    step = assign.planned_step(model, square_loss, all_low(first), backend="eager")
    for length in (5, 7, 3, 9):
        step(torch.randint(0, 16, (2, length))).backward()
    assert traced(model, torch.randint(0, 16, (2, 8)), square_loss).fingerprint == first.fingerprint


def test_tables_are_the_same_in_an_old_process_and_with_weights_that_follow():
    model, x = Teacher("lerp", "between"), torch.randn(4, 4)
    table = traced(model, x, square_loss, adamw)
    assert traced(Teacher("lerp", "between"), torch.randn(9, 4), square_loss, adamw).fingerprint == table.fingerprint


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.head, self.criterion = nn.Linear(8, 16), nn.Linear(16, 4), nn.MSELoss()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.head(self.f(x).tanh())

    def encode(self, x):
        return self.f(x).tanh()

    def described(self):
        return f"{sum(p.numel() for p in self.parameters())} parameters"

    def both(self, x):
        return self(x), self.encode(x)


PAIR = (torch.arange(32.0).reshape(4, 8) / 16 - 1, torch.arange(32.0).reshape(4, 8).flip(0) / 32)


def far(model, batch):
    return 1 - F.cosine_similarity(model(batch[0]), model(batch[1])).mean()


def with_reference(model, batch):
    with torch.no_grad():
        reference = model(batch[1])
    return (model(batch[0]) - reference).square().mean()


def inside(model, batch):
    return model.criterion(model(batch[0]), model.head(model.f(batch[1]))) * model.scale


def two_encodings(model, batch):
    return F.mse_loss(model.encode(batch[0]), model.encode(batch[1]))


@pytest.mark.parametrize("loss", [far, with_reference, inside, two_encodings])
def test_a_plan_of_a_loss_that_calls_the_model_twice_applies(loss):
    model = Siamese()
    plan = assign.search(model, PAIR, loss, low_ratio=0.0)
    plain = copy.deepcopy(model)
    found, expected = loss(assign.apply(model, plan, backend="eager"), PAIR), loss(plain, PAIR)
    found.backward()
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=0.03)  # a few bf16 ulps (2^-8) per tensor
    assert found.item() != expected.item()
    for (name, parameter), other in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert (parameter.grad is None) == (other[1].grad is None), name


def test_methods_run_under_the_plan():
    model = Siamese()
    plan = assign.search(model, PAIR, two_encodings, low_ratio=0.0)
    planned = assign.apply(model, plan, backend="eager")
    encoded = planned.encode(PAIR[0])
    assert not torch.equal(encoded, model.encode(PAIR[0]))
    assert near(encoded, model.encode(PAIR[0]))
    assert planned.described() == model.described()
    assert torch.equal(copy.deepcopy(planned).encode(PAIR[0]), encoded)
    with torch.no_grad():  # it calls the model, and so is no method of its own
        assert torch.equal(planned.both(PAIR[0])[1], encoded)


def test_a_method_that_the_plan_does_not_know_says_so():
    model = Siamese()
    plan = assign.search(model, PAIR[0], square_loss, low_ratio=0.0)
    planned = assign.apply(model, plan, backend="eager")
    with pytest.warns(UserWarning, match=r"loss/tanh.* not narrowed|not narrowed.*loss/tanh"):
        planned.encode(PAIR[0]).sum().backward()
    assert near(planned.encode(PAIR[0]), model.encode(PAIR[0]))


class Alternating(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.heads = nn.Linear(8, 16), nn.ModuleDict({"a": nn.Linear(16, 4), "b": nn.Linear(16, 2)})

    def forward(self, x, head):
        return self.heads[head](self.f(x).relu())


def by_head(model, batch):
    return model(batch["x"], batch["head"]).square().mean()


@pytest.mark.parametrize("planned_for", ["a", "both"])
def test_heads_that_take_turns(planned_for):
    model, x = Alternating(), torch.randn(4, 8)

    def both(model, batch):
        return by_head(model, {"x": batch["x"], "head": "a"}) + by_head(model, {"x": batch["x"], "head": "b"})

    batch = {"x": x, "head": "a"}
    plan = assign.search(model, batch, by_head if planned_for == "a" else both, low_ratio=0.0)
    planned, plain = assign.apply(model, plan, backend="eager"), copy.deepcopy(model)
    for head in ("a", "b", "a"):
        model.zero_grad()
        plain.zero_grad()
        if head == "b" and planned_for == "a":
            with pytest.warns(UserWarning, match=r"the plan does not contain.*heads\.b"):
                by_head(planned, {"x": x, "head": head}).backward()
        else:
            by_head(planned, {"x": x, "head": head}).backward()
        by_head(plain, {"x": x, "head": head}).backward()
        for parameter, other in zip(model.parameters(), plain.parameters(), strict=True):
            assert (parameter.grad is None) == (other.grad is None)
            assert other.grad is None or near(parameter.grad, other.grad)


def test_parameters_that_are_trained_later_and_evaluation_before_training():
    model, x = Siamese(), PAIR[0]
    model.f.requires_grad_(False)
    plan = assign.search(model, x, square_loss, low_ratio=0.0)
    planned = assign.apply(model, plan, backend="eager")
    with torch.no_grad():
        planned.eval()(x)
    planned.train()
    square_loss(planned, x).backward()
    assert model.f.weight.grad is None
    model.f.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"f\.weight\.grad.*|were not trained when the plan was made"):
        square_loss(planned, x).backward()
    plain = copy.deepcopy(model)
    plain.zero_grad()
    square_loss(plain, x).backward()
    assert near(model.f.weight.grad, plain.f.weight.grad)


def test_a_plan_of_another_model_is_still_refused():
    class Other(Siamese):
        def forward(self, x):
            return self.head(self.f(x).relu())

    plan = assign.search(Other(), PAIR[0], square_loss, low_ratio=0.0)
    planned = assign.apply(Siamese(), plan, backend="eager")
    with pytest.raises(assign.AssignError, match=r"(?s)no entry for .*'/tanh'"):
        planned(PAIR[0])
