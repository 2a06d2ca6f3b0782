"""Write one file of each kind with the installed version, and the numbers that it gives, for ``test_golden.py``.

    python tests/golden/make.py DIRECTORY

The files in ``tests/golden/2026-11-30`` were written by commit d91d2cd. They are never written anew: a later version
must read them. A new kind of file, or a new version of a layout, gets a directory of its own.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import assign
from assign.memory.estimate import estimate
from assign.noise.options import NoiseOptions
from assign.plan.noise_table import NoiseTable
from assign.plan.plan import Assignment
from assign.plan.space import SearchSpace
from assign.plan.table import TensorTable
from assign.planner import search_table
from assign.training.loop import train
from assign.training.options import TrainOptions
from assign.training.trials import Settings
from assign.training.tuning import StudyOptions, tune

PLANS: dict[str, dict[str, Any]] = {
    "native": {"low_ratio": 0.5},
    "hfp8": {"space": SearchSpace(recipe="hfp8", saved="int4:block64"), "low_ratio": 1.0},
    "delayed": {"space": "native-delayed", "low_ratio": 1.0},
    "stored": {
        "space": SearchSpace(recipe="bf16", master="bf16", gradients="bf16", optimizer_states="bf16"),
        "low_ratio": 1.0,
    },
    "standalone": {"space": "bf16", "strategy": "standalone"},
}
"""Name of a plan → how it is searched."""


class Net(nn.Module):
    """A convolution with a normalization whose statistics a plan may store, an activation and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))
        return features


def make_task(_seed: int = 0) -> assign.Task:
    """Return a task of four batches."""
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(16, 1, 8, 8, generator=generator), torch.arange(16) % 4) for _ in range(4)]
    return assign.Task(
        model=Net,
        loss=lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
        train=data,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        evaluate=lambda model: {"accuracy": float((model(data[0][0]).argmax(-1) == data[0][1]).float().mean())},
        epochs=2,
        name="golden",
    )


def numbers(directory: Path) -> dict[str, Any]:
    """Return what the files of a directory give: predicted bytes, losses, noise, and the best plan of the study."""
    task = make_task()
    table = TensorTable.load(directory / "table.json")
    found: dict[str, Any] = {"elements": table.elements, "fingerprint": table.fingerprint}
    noise = NoiseTable.load(directory / "noise.json")
    for name in PLANS:
        plan = Assignment.load(directory / f"{name}.json")
        costs = estimate(table, plan)
        trained = train(task, plan, options=TrainOptions(backend="eager"), table=table)
        found[name] = {
            "peak_bytes": costs.peak_bytes,
            "saved_bytes": costs.saved_bytes,
            "loss": trained.loss,
            "accuracy": trained.metrics["accuracy"],
        }
    found["noise"] = noise.of(Assignment.load(directory / "native.json").entries)
    resumed = train(
        task,
        Assignment.load(directory / "native.json"),
        options=TrainOptions(backend="eager", checkpoint=_copy(directory), resume=True),
    )
    found["resumed"] = {"loss": resumed.loss, "steps": resumed.steps}
    studied = tune(make_task, storage=directory / "study.db", options=StudyOptions(trials=2))
    found["study"] = {"trained": studied.trained, "front": [[each.peak_bytes, each.metric] for each in studied.front]}
    return found


def _copy(directory: Path) -> Path:
    """Return a copy of the checkpoint, because a resumed training overwrites its file."""
    path = directory / "resumed.pt"
    path.write_bytes((directory / "run.pt").read_bytes())
    return path


def main() -> None:
    """Write the files and their numbers."""
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True)
    task = make_task()
    model, batch = task.make_model(), task.first_batch()
    table = assign.trace(model, batch, task.loss, task.optimizer)
    table.save(directory / "table.json")
    for name, options in PLANS.items():
        search_table(table, **options).save(directory / f"{name}.json")
    assign.measure_noise(model, [batch], task.loss, options=NoiseOptions(max_batches=1)).save(directory / "noise.json")
    plan = Assignment.load(directory / "native.json")
    train(task, plan, options=TrainOptions(backend="eager", checkpoint=directory / "run.pt", max_steps=5))
    tune(make_task, storage=directory / "study.db", options=StudyOptions(trials=2), settings=Settings(epochs=1))
    (directory / "numbers.json").write_text(json.dumps(numbers(directory), indent=2) + "\n")
    (directory / "resumed.pt").unlink()


if __name__ == "__main__":
    main()
