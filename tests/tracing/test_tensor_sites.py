"""One operator in a small model: as plain PyTorch in fp32, near it in bf16. All of torch's: ``test_bench_opdb.py``."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import all_high, everything, traced
from torch import nn

import assign


def powers(h):
    """Both operands of a product are one tensor."""
    return h @ h


def eigenvalues(h):
    """Complex results, of which none has a format."""
    values, vectors = torch.linalg.eig(h)
    return values.abs() + vectors.abs().sum(0)


def pooled(h):
    """There is no bf16 kernel on CPU."""
    return F.avg_pool3d(h.view(1, 1, 2, 4, 8), 2)


def resized(h):
    """There is no bf16 kernel for interpolation with antialiasing on CPU."""
    return F.interpolate(h.view(1, 1, 8, 8), size=5, mode="bilinear", antialias=True)


def bessel(h):
    """Its backward pass subtracts what the rounded result makes from something near it."""
    return torch.special.i1e(h)


def counted(h):
    """A gradient that autograd leaves undefined."""
    return torch.linalg.vector_norm(h, 0) + h.sum()


class Applied(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.weight, self.unseen = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.ones(8))
        self.function = function

    def forward(self, x):
        counted_only = torch.linalg.vector_norm(self.unseen, 0)
        return self.function(x + self.weight) + counted_only


def square_loss(model, x):
    return model(x).square().mean()


@pytest.mark.parametrize("function", [powers, eigenvalues, pooled, resized, bessel, counted], ids=lambda f: f.__name__)
def test_as_plain_in_fp32_and_near_it_in_bf16(function):
    torch.manual_seed(0)
    model, x = Applied(function), torch.randn(8, 8)
    expected = square_loss(model, x)
    gradient, unseen = torch.autograd.grad(expected, [model.weight, model.unseen], allow_unused=True)
    assert unseen is None
    table = traced(model, x, square_loss)
    for plan in (everything(table, "fp32"), all_high(table, "bf16")):
        planned = copy.deepcopy(model)
        found = assign.planned_step(planned, square_loss, plan, backend="eager")(x)
        found.backward()
        assert planned.unseen.grad is None
        if plan.recipe == "native":
            assert torch.equal(found, expected)
            assert torch.equal(planned.weight.grad, gradient)
        error = (planned.weight.grad - gradient).norm() / gradient.norm()
        assert error < 0.02  # a few bf16 ulps (2^-8)
