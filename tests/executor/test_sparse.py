"""Embeddings with sparse gradients: traced, planned and trained; the gradient stays sparse."""

import pytest
import torch
from helpers import all_low, everything, traced
from torch import nn
from torch.nn import functional as F

from assign.executor.apply import apply, planned_step
from assign.optim.optimizers import optimizer
from assign.plan.plan import Entry
from assign.plan.table import Role


class Bag(nn.Module):
    def __init__(self, mode="mean"):
        super().__init__()
        self.bag, self.fc = nn.EmbeddingBag(50, 16, sparse=True, mode=mode), nn.Linear(16, 1)

    def forward(self, x):
        return self.fc(self.bag(x))


class Functional(nn.Module):
    """The flag by position, and a table that something else reads too: its gradient is dense in plain PyTorch."""

    def __init__(self):
        super().__init__()
        self.sparse, self.tied = nn.Embedding(50, 16), nn.Embedding(50, 16, sparse=True, padding_idx=0)

    def forward(self, x):
        y = F.embedding(x, self.sparse.weight, None, None, 2.0, False, True)
        return (y + self.tied(x)) @ self.tied.weight.T


MODELS = {
    "embedding": lambda: nn.Sequential(nn.Embedding(50, 16, sparse=True), nn.Linear(16, 1)),
    "bag": Bag,
    "sum": lambda: Bag("sum"),
    "functional": Functional,
}


def loss(model, x):
    return model(x).square().mean()


def indices(seed=0):
    return torch.randint(0, 50, (8, 4), generator=torch.Generator().manual_seed(seed))


def made(name):
    torch.manual_seed(0)
    return MODELS[name]()


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_plain_pytorch_and_as_sparse(name):
    plain, model = made(name), made(name)
    step = planned_step(model, loss, everything(traced(model, indices(), loss), "fp32"), backend="eager")
    for seed in (0, 1):  # the second gradient is added to the first
        x = indices(seed)
        expected, found = loss(plain, x), step(x)
        assert torch.equal(found, expected)
        expected.backward()
        found.backward()
    for own, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert own.grad.is_sparse == other.grad.is_sparse
        # plain PyTorch adds the rows of both steps in one order, a sum of two sums has another: one bit or two
        torch.testing.assert_close(own.grad.to_dense(), other.grad.to_dense(), rtol=1e-5, atol=1e-7)
    assert any(p.grad.is_sparse for p in model.parameters())


@pytest.mark.parametrize("kind", [torch.optim.SparseAdam, torch.optim.SGD])
def test_a_planned_embedding_trains(kind):
    model, x = made("embedding"), indices()
    plan = all_low(traced(model, x, loss))
    planned = apply(model, plan, backend="eager")
    table = optimizer(kind, planned, plan, params=[model[0].weight], lr=0.05)
    rest = torch.optim.SGD([*model[1].parameters()], lr=0.05)
    losses = []
    for _ in range(20):
        for each in (table, rest):
            each.zero_grad()
        value = loss(planned, x)
        value.backward()
        assert model[0].weight.grad.is_sparse
        for each in (table, rest):
            each.step()
        losses.append(value.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_gradient_stored_in_another_dtype_is_dense():
    model, x = made("embedding"), indices()
    plan = everything(traced(model, x, loss), "fp32").replace({"0.weight.grad.stored": Entry("bf16", False)})
    planned_step(model, loss, plan, backend="eager")(x).backward()
    assert (model[0].weight.grad.is_sparse, model[0].weight.grad.dtype) == (False, torch.bfloat16)


def test_states_of_an_optimizer_for_sparse_gradients_are_rows():
    model = nn.Sequential(nn.Embedding(50, 16, sparse=True))
    table = traced(model, indices(), loss, torch.optim.SparseAdam)
    states = [row.shape for row in table.tensors if row.role is Role.OPTIM_STATE]
    assert states == [(50, 16), (50, 16)]
