"""In-place graphs and their functional twins compute the same; nothing but the user's inputs is changed in place."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from assign.tracing.capture import compile_step
from assign.tracing.functionalize import _mutated, functionalize


def view_of_view(x):
    x = x * 1
    x[1:][:, 2].mul_(3)
    return x


def stale_views(x):
    x = x + 0
    row, column = x[0], x[:, 0]
    row.add_(1)
    column.sub_(row[1])
    return x * row.sum() + column[0]


def written_twice(x):
    out = torch.zeros_like(x)
    out[:, 0] = x[:, 1]
    out[:, 1] = out[:, 0] * 2
    return out


def masked(x):
    """``and_`` and ``or_`` of the operator module end like in-place methods and are none."""
    positive = x > 0
    small = x.abs() < 1
    return x * ((positive & small) | ~positive)


def operators(x):
    y = x.clone()
    y += x
    y *= 2
    y -= 1
    y /= 3
    return y


def functions(x):
    return F.relu(F.silu(x * 2, inplace=True) - 0.1, inplace=True) + F.leaky_relu(x + 1, 0.1, True)


def masks(x):
    y = x * 1
    y[y > 0] = 0.5
    y.masked_fill_(x < -1, 7.0)
    y.clamp_(max=1)
    return y


def transposed(x):
    y = x * 1
    y.t()[1].zero_()
    return y.t().contiguous() + y.t().view(x.shape[1], -1)


def without_grad(x):
    """Writes under ``no_grad`` change values alone: the gradient passes as if nothing had been written."""
    y = x * 1
    column, rows = y[:, 0], y.t()[1]
    with torch.no_grad():
        y.clamp_(min=0.1)
        y[1:].mul_(3)
        rows.add_(1)
        detached = y.clone().clamp_(max=1)
    with torch.no_grad():
        y += 0.5
    return y * detached + column.sum() * rows.sum()


def behind_the_back(x):
    y = x * 2
    y.detach().mul_(2)
    with torch.no_grad():
        y.detach()[0].add_(1)
    return y * y


def into_detached(x):
    """What is written has a gradient in the detached tensor, and none in the other, whose own one stays."""
    y, z, w = x * 2, x * 3, x * 4
    loose = y.detach()
    loose += z
    row = w.data[1]
    row.mul_(x[0])
    return loose * z + y * y + w * row


def into_detached_constants(x):
    """Nothing that is detached has a gradient; what is written into it has one."""
    ones = torch.ones_like(x).detach()
    ones += x[:1]
    ones[0].mul_(x[1])
    return ones * ones


@pytest.mark.parametrize(
    "function",
    [
        view_of_view,
        into_detached,
        into_detached_constants,
        stale_views,
        written_twice,
        masked,
        operators,
        functions,
        masks,
        transposed,
        without_grad,
        behind_the_back,
    ],
    ids=lambda f: f.__name__,
)
def test_same_values_and_gradients(function):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3))

        def forward(self):
            return function(self.weight).square().sum()

    model = Model()

    def backend(capture):
        functionalize(capture.graph)
        assert not [node for node in capture.graph.graph.nodes if _mutated(node) is not None]
        return capture.graph.forward

    result = compile_step(model, lambda m: m(), backend)()
    (gradient,) = torch.autograd.grad(result, model.weight)
    expected = model()
    (expected_gradient,) = torch.autograd.grad(expected, model.weight)
    assert torch.equal(result, expected)
    assert torch.equal(gradient, expected_gradient)
