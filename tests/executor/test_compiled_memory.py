"""The bytes of a compiled step, said before it runs, beside those that it takes."""

import dataclasses

import pytest
import torch
from helpers import adamw, everything, measured_peak, traced
from models import GPT, MLP, Checkpointed, ResNet, class_loss, images, tokens, vectors
from torch import nn

import assign
from assign.errors import PlanError
from assign.memory.replay import Replay
from assign.optim.optimizers import follow
from assign.plan.recipes import store


def lm_loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def gpt():
    torch.manual_seed(0)
    batch = torch.randint(1024, (16, 64)), torch.randint(1024, (16, 64))
    return GPT(vocabulary=1024, width=64, layers=2, length=64), batch


def in_16_bit(table):
    plan = everything(table, "bf16")
    return dataclasses.replace(plan, entries={**plan.entries, **store(table, master="bf16", states="bf16")})


def said_and_measured(model, batch, loss, plan, table):
    said = assign.rehearse(model, batch, loss, plan, table)
    step = assign.planned_step(model, loss, plan)
    return said, measured_peak(model, batch, step, follow(adamw(model.parameters()), model, plan))


@pytest.mark.slow
def test_the_peak_of_a_compiled_step():
    model, batch = gpt()
    table = traced(model, batch, lm_loss, adamw)
    plan = in_16_bit(table)
    said, measured = said_and_measured(model, batch, lm_loss, plan, table)
    assert said.peak_bytes == pytest.approx(measured, rel=0.05)
    assert said.peak_bytes < 0.9 * assign.estimate(table, plan).peak_bytes  # Inductor fuses the loss


@pytest.mark.slow
def test_the_backward_pass_knows_how_the_forward_pass_leaves_images():
    """Channels-last, as Inductor computes them, whatever the layout of the model's: what reads them copies nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 4),
    )
    batch = images(batch=32, size=32)
    table = traced(model, batch, class_loss, adamw)
    said, measured = said_and_measured(model, batch, class_loss, everything(table, "bf16"), table)
    assert said.peak_bytes == pytest.approx(measured, rel=0.02)


@pytest.mark.slow
def test_the_peak_of_a_step_with_checkpointed_blocks():
    """Attention that is computed again draws what it drew: an operator of a higher order in the program."""
    torch.manual_seed(0)
    model, batch = Checkpointed(width=128, length=64), tokens(batch=16, length=64)
    table = traced(model, batch, class_loss, adamw)
    said, measured = said_and_measured(model, batch, class_loss, everything(table, "bf16"), table)
    assert said.peak_bytes == pytest.approx(measured, rel=0.02)


def test_what_is_counted():
    """Of two linear layers with tanh between: its results, which wait; gradients of the weights; the 16-bit copies."""
    torch.manual_seed(0)
    model, batch = MLP(width=512), vectors(batch=256)
    table = traced(model, batch)
    plain = assign.rehearse(model, batch, class_loss, everything(table, "fp32"), table)
    hidden, logits = 256 * 512 * 4, 256 * 4 * 4
    assert plain.saved_bytes == pytest.approx(hidden + logits, rel=0.01)
    assert plain.backward_bytes == pytest.approx(2 * hidden + logits, rel=0.1)
    half = assign.rehearse(model, batch, class_loss, everything(table, "bf16"), table)
    assert half.saved_bytes == pytest.approx(plain.saved_bytes / 2, rel=0.1)
    resident = Replay(table, {}).resident_bytes
    assert (plain.peak_in, plain.peak_bytes) == ("backward", resident + plain.backward_bytes)


def test_gradients_of_16_bit_masters_are_half_as_wide():
    torch.manual_seed(0)
    model, batch = MLP(width=4096), vectors(batch=2)
    table = traced(model, batch)
    plain = everything(table, "bf16")
    narrow = dataclasses.replace(plain, entries={**plain.entries, **store(table, master="bf16")})
    wide, half = (assign.rehearse(model, batch, class_loss, plan, table) for plan in (plain, narrow))
    assert half.backward_bytes < 0.6 * wide.backward_bytes
    larger, packed, read = 2 * 4096 * 16, 2 * 4096 * 4, 2 * 4096 * 2
    assert wide.forward_bytes > larger  # a 16-bit copy of the larger weight, in the first product
    assert half.forward_bytes == pytest.approx(packed + read, abs=1024)  # none: the second product packs its weight


def test_the_optimizer_may_be_the_peak():
    torch.manual_seed(0)
    model, batch = MLP(width=4096), vectors(batch=2)
    table = traced(model, batch, optimizer=adamw)
    said = assign.rehearse(model, batch, class_loss, everything(table, "fp32"), table)
    assert said.peak_in == "optimizer"
    assert said.peak_bytes == assign.estimate(table, everything(table, "fp32")).peak_bytes


@pytest.mark.slow
def test_nothing_of_the_user_changes():
    torch.manual_seed(0)
    model, batch = ResNet(), images()
    table = traced(model, batch)
    plan = everything(table, "bf16")
    plan = dataclasses.replace(plan, entries={**plan.entries, **store(table, master="bf16", gradients="bf16")})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    assign.rehearse(model, batch, class_loss, plan, table)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None and p.dtype == torch.float32 for p in model.parameters())
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_refusals():
    model, batch = MLP(), vectors()
    table = traced(model, batch)
    other = everything(traced(ResNet(), images()), "bf16")
    with pytest.raises(PlanError, match="rehearse"):
        assign.rehearse(model, batch, class_loss, other, table)

    def branches(model, batch):
        return class_loss(model, batch) if batch[0].sum() > 0 else model(batch[0]).mean()

    table = traced(model, batch, branches)
    assert assign.rehearse(model, batch, branches, everything(table, "bf16"), table).peak_bytes > 0
