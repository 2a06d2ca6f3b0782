"""What several test modules do: plans from tables, a few training steps, bytes measured by the profiler."""

import dataclasses

import torch
from models import class_loss
from torch import Tensor

from assign.executor.passes.pack import pack
from assign.numerics.rounding import quantize
from assign.plan.plan import Assignment, Entry
from assign.plan.recipes import get_recipe, initial
from assign.tracing.measuring import measure_peak
from assign.tracing.tracer import trace


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3)


def traced(model, batch, loss=class_loss, optimizer=sgd):
    return trace(model, batch, loss, optimizer)


def everything(table, format_name):
    entries = {info.key: Entry(format_name, False) for info in table.paper_tensors}
    return Assignment(entries=entries, recipe="native", fingerprint=table.fingerprint)


def all_low(table, recipe="native"):
    low = frozenset(group.id for group in table.groups)
    return Assignment(entries=initial(table, get_recipe(recipe), low), recipe=recipe, fingerprint=table.fingerprint)


def all_high(table, recipe="native"):
    return Assignment(entries=initial(table, get_recipe(recipe)), recipe=recipe, fingerprint=table.fingerprint)


def steps(model, step, batch, count=5, optimizer=sgd):
    """Losses and gradients of a few optimizer steps."""
    instance = optimizer(model.parameters())
    losses, grads = [], []
    for number in range(count):
        torch.manual_seed(number)
        instance.zero_grad()
        loss = step(batch)
        loss.backward()
        losses.append(loss.item())
        grads.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
        instance.step()
    return losses, grads


def measured_peak(model, batch, step, optimizer):
    """Bytes alive at the worst moment of a whole step, once the optimizer has its states."""

    def one():
        optimizer.zero_grad()
        step(batch).backward()
        optimizer.step()

    one()
    one()
    optimizer.zero_grad()
    states = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    return measure_peak(one, [*model.parameters(), *model.buffers(), *batch, *states])


def packed_channels_last(joint, context):
    """The packing as it is where Inductor lays images out channels-last."""
    return pack(joint, dataclasses.replace(context, channels_last=True))


def rounded(name):
    """A function that rounds a tensor to a format, and its gradient in the backward pass, without saturation."""

    class Rounded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor):
            return quantize(tensor, name)

        @staticmethod
        def backward(ctx, gradient):
            return quantize(gradient, name, saturate=False)

    return Rounded.apply


def squares(model, batch):
    return model(batch).square().mean()


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal bit for bit, the signs of zeros too; one NaN is as good as another."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    if actual.is_floating_point():
        nan = expected.isnan()
        assert torch.equal(actual.isnan(), nan)
        bits = torch.int32 if actual.dtype == torch.float32 else torch.int16
        actual, expected = actual[~nan].view(bits), expected[~nan].view(bits)
    assert torch.equal(actual, expected)


def trained(step, batch, optimizer, steps):
    """The parameters after some steps on one batch."""
    for _ in range(steps):
        optimizer.zero_grad()
        step(batch).backward()
        optimizer.step()
    return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
