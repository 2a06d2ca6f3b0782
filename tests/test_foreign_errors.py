"""What a user can give by mistake is refused in words of this package, not with an error of torch or of Python."""

import os
from functools import partial

import pytest
import torch
from models import class_loss
from shell import fails
from torch import nn

import assign
from assign.errors import AssignError, PlanError, TaskError, TraceError
from assign.noise.options import NoiseOptions
from assign.tasks import Task, TaskOptions, load_task
from assign.training.loop import train
from assign.training.options import TrainOptions

adamw = partial(torch.optim.AdamW, lr=1e-2)


def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator)


def make_model():
    torch.manual_seed(0)
    return nn.Linear(4, 3)


class Nothing(nn.Module):
    def forward(self, x):
        return x[:, :3] * 2


def make_task(batches, **options):
    return Task(
        **{"name": "t", "model": make_model, "loss": class_loss, "train": batches, "optimizer": adamw, "epochs": 1}
        | options
    )


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (lambda model, batch: class_loss(model, batch).detach(), "without a gradient"),
        (lambda model, batch: (model(batch[0]) > 0).sum(), "int64 tensor without a gradient"),
        (lambda model, batch: model(batch[0]).sum(1), "scalar"),
        (lambda model, batch: 1.0, "does not use the model"),
    ],
    ids=["detached", "integer", "vector", "number"],
)
def test_losses_that_cannot_be_trained_with(loss, says):
    for ask in (
        lambda: assign.trace(make_model(), batch(), loss, adamw),
        lambda: assign.search(make_model(), batch(), loss, low_ratio=0.5, optimizer=adamw),
        lambda: assign.measure_noise(make_model(), [batch()], loss),
    ):
        with pytest.raises(TraceError, match=says):
            ask()
    with pytest.raises(AssignError, match=r"gradient|does not use|scalar"):
        assign.measure_noise(make_model(), [batch()] * 2, loss, optimizer=adamw, options=NoiseOptions(warm_up=1))
    with pytest.raises(TaskError, match="scalar tensor with a gradient"):
        train(make_task([batch()], loss=loss))


def test_a_model_without_parameters_under_adamw():
    for warm_up in (0, 1):
        with pytest.raises(TraceError, match="no parameter"):
            assign.measure_noise(
                Nothing(), [batch()] * 2, class_loss, optimizer=adamw, options=NoiseOptions(warm_up=warm_up)
            )


@pytest.mark.parametrize("seed", [10**22, -(10**22), 2**32])
def test_seeds_that_no_generator_takes(seed):
    with pytest.raises(TaskError, match=r"the seed is .*\n.*4294967295"):
        load_task("digits", TaskOptions(seed=seed))
    with pytest.raises(TaskError, match="the seed is"):
        train(make_task([batch()]), options=TrainOptions(seed=seed))


def test_a_negative_warm_up(capsys, monkeypatch):
    with pytest.raises(PlanError, match="warm_up is -1"):
        assign.measure_noise(make_model(), [batch()], class_loss, optimizer=adamw, options=NoiseOptions(warm_up=-1))
    assert "--warm-up" in fails(capsys, monkeypatch, "noise", "digits", "--warm-up", "-1")


@pytest.mark.parametrize(
    "name", ["a" * 300, f"{'a' * 300}.py", "a\0.py", "a\0b:c", "a\udcffb:c", "around", "around/x.py"]
)
def test_names_of_tasks_that_no_file_can_have(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.symlink("round", "around")
    os.symlink("around", "round")
    with pytest.raises(TaskError, match=r"Built-in|built-in"):
        load_task(name)


# ---- infinities that formats would hide


def infinite():
    values, labels = batch()
    values[0, 0] = torch.inf
    return values, labels


def test_an_infinite_input_is_divergence_under_every_plan():
    for recipe in ("hfp8", "native"):
        plan = assign.search(make_model(), batch(), class_loss, low_ratio=1, space=recipe)
        result = train(make_task([batch(), infinite(), batch()]), plan)
        assert result.diverged
        assert result.steps == 1
        assert "infinite values" in result.message
    assert train(make_task([batch(), infinite()])).diverged  # as without a plan


def masked_loss(model, batch):
    values, labels, mask = batch
    return nn.functional.cross_entropy(model(values) + mask, labels)


def test_infinities_of_a_mask_are_no_divergence():
    values, labels = batch()
    mask = torch.zeros(8, 3)
    mask[labels != 0, 0] = -torch.inf
    plan = assign.search(make_model(), (values, labels, mask), masked_loss, low_ratio=0, space="native")
    result = train(make_task([(values, labels, mask)] * 3, loss=masked_loss), plan)
    assert result.steps == 3
    assert not result.diverged


# ---- short trainings


def test_the_only_step_is_measured_and_changes_nothing():
    long = train(make_task([batch()], epochs=4))
    short = train(make_task([batch()]))
    assert short.steps == 1
    assert short.measured_peak_bytes == long.measured_peak_bytes
    model = make_model()
    optimizer = adamw(model.parameters())
    class_loss(model, batch()).backward()
    optimizer.step()
    for mine, plain in zip(short.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, plain)
