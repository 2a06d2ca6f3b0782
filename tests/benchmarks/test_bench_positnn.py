"""The stages of PositNN's trainings are those of the plan, and a short one runs, stops and resumes."""

import argparse
from pathlib import Path

import pytest
import torch

from assign.plan.keys import master_key
from assign.plan.table import Role
from assign.tasks.data import Images
from assign.tracing.tracer import trace
from benchmarks.paper import positnn


@pytest.fixture
def options(monkeypatch) -> argparse.Namespace:
    """A data set of noise in place of Fashion-MNIST."""
    images = torch.randint(0, 256, (192, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(192) % 10
    data = Images(train_images=images, train_labels=labels, test_images=images[:20], test_labels=labels[:20])
    monkeypatch.setattr(positnn, "read_images", lambda *_: data)
    return argparse.Namespace(
        dataset="fashion-mnist",
        data=Path("nowhere"),
        variants=["fp32", "posit8 O16-L12 quire"],
        seeds=1,
        epochs=1,
        examples=None,
        test_examples=None,
        device="cpu",
    )


def test_each_stage_has_its_format(options) -> None:
    task = positnn.task(options, 0)
    table = trace(task.make_model(), task.first_batch(), task.loss, task.optimizer)
    stages = positnn.VARIANTS["posit8 O12-L12 quire"]
    plan = positnn.plan_of(table, stages)
    loss = {"log_softmax", "nll_loss", "nll_loss_nd", "cross_entropy"}
    for row in table.paper_tensors:
        is_loss = row.op in loss and row.role in (Role.ACTIVATION, Role.ACTIVATION_GRAD)
        assert plan.entries[row.key].format == (stages.loss if is_loss else stages.compute), row.key
    assert any(row.op in loss for row in table.paper_tensors)
    masters = [entry.format for key, entry in plan.entries.items() if key.endswith(master_key(""))]
    assert masters == ["posit(12,2)"] * 10


@pytest.mark.parametrize(
    ("dataset", "parameters"), [("fashion-mnist", 61_706), ("cifar10", 608 + 3_216 + 393_600 + 73_920 + 1_930)]
)
def test_the_networks(dataset: str, parameters: int) -> None:
    network = positnn.network(dataset)
    assert sum(each.numel() for each in network.parameters()) == parameters
    shape = (2, 1, 28, 28) if dataset == "fashion-mnist" else (2, 3, 32, 32)
    assert network(torch.zeros(shape)).shape == (2, 10)


def test_the_schedule(options) -> None:
    task = positnn.task(options, 0)
    optimizer = task.make_optimizer(task.make_model())
    schedule, rates = task.scheduler(optimizer), []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == [1 / 16] * 4 + [1 / 32] * 4 + [1 / 64] * 2
    assert optimizer.param_groups[0]["momentum"] == 0.5


@pytest.mark.slow
def test_a_short_run_resumes_and_says_where_it_comes_from(options, tmp_path) -> None:
    result = positnn.run(options, tmp_path)
    assert [row["variant"] for row in result["runs"]] == options.variants
    assert all("accuracy" in row["metrics"] for row in result["runs"])
    assert {"date", "commit", "device", "versions"} <= result["facts"].keys()
    assert positnn.run(options, tmp_path)["runs"] == result["runs"]  # nothing is trained again
