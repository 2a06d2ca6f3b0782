"""PositNN's trainings (arXiv 2105.00053): how many bits must the optimizer, the loss and the other stages have?

Method: LeNet-5 on Fashion-MNIST (10 epochs), or the paper's small network on CIFAR-10 (20 epochs), trained as there:
SGD with a rate of 1/16 that is halved every 4 epochs, momentum 0.5, batches of 64. Every variant starts from the same
seeds and sees the same batches. It has one format for each stage: O for masters and velocities, F for values and
weights, B for the gradients of values, G for those of weights, L for the loss and its gradient. ``quire`` sums exactly,
``noquire`` rounds each partial sum, and without either sums are float32. Assumptions: images are normalised by the mean
and deviation of their pixels; the step of the optimizer is float32 and rounded at its end. ``--data`` has the data sets
as ``assign train`` reads them.

    python benchmarks/paper/positnn.py fashion-mnist --data DIR
    python benchmarks/paper/positnn.py cifar10 --data DIR --variants fp32 'posit8 O16-L16 quire'

Run the same command again after an interruption: finished runs are kept, and an interrupted run resumes from its last
checkpoint. ``noquire`` takes one pass over a result for each summed product: hours per epoch on a CPU.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

sys.path.insert(0, str(Path(__file__).parents[2]))

from assign.numerics.promotion import PromotionOptions
from assign.plan.plan import Assignment
from assign.plan.recipes import POSIT, initial, store
from assign.plan.table import Role, TensorTable
from assign.tasks.builtin import CIFAR_MOMENTS, photographs
from assign.tasks.data import Images, read_cifar, read_fashion_mnist
from assign.tasks.task import Task, TaskOptions
from assign.tracing.tracer import trace
from assign.training.compare import FP32, Variant, compare
from assign.training.comparison import Comparison
from assign.training.options import TrainOptions
from benchmarks import facts

EPOCHS = {"fashion-mnist": 10, "cifar10": 20}
BATCH, RATE, MOMENTUM, HALVED_EVERY = 64, 1 / 16, 0.5, 4
MOMENTS = {"fashion-mnist": ((0.2860,), (0.3530,)), "cifar10": CIFAR_MOMENTS[10]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """The format of each stage, by name.

    Attributes:
        compute: of the stages F, B and G, which are the same in the paper.
    """

    optimizer: str
    compute: str
    loss: str


def _uniform(name: str) -> Stages:
    """One format in all stages."""
    return Stages(optimizer=name.partition(":")[0], compute=name, loss=name)


VARIANTS: Mapping[str, Stages | None] = MappingProxyType(
    {
        FP32: None,
        "posit8 O16-L16 quire": Stages(optimizer="posit(16,2)", compute="posit(8,2):quire", loss="posit(16,2):quire"),
        "posit8 O16-L12 quire": Stages(optimizer="posit(16,2)", compute="posit(8,2):quire", loss="posit(12,2):quire"),
        "posit8 O12-L12 quire": Stages(optimizer="posit(12,2)", compute="posit(8,2):quire", loss="posit(12,2):quire"),
        "posit(16,1)": _uniform("posit(16,1)"),
        "posit(16,1) quire": _uniform("posit(16,1):quire"),
        "posit(8,2)": _uniform("posit(8,2)"),
        "posit(8,2) quire": _uniform("posit(8,2):quire"),
        "posit(8,2) noquire": _uniform("posit(8,2):noquire"),
    }
)
_SLOW = ("posit(8,2) noquire",)


def plan_of(table: TensorTable, stages: Stages) -> Assignment:
    """The plan with a format for each stage."""
    pair = (stages.compute, stages.compute)
    loss = dict.fromkeys((Role.ACTIVATION, Role.ACTIVATION_GRAD), (stages.loss, stages.loss))
    recipe = dataclasses.replace(
        POSIT, by_role=dict.fromkeys(POSIT.by_role, pair), overrides=dict.fromkeys(POSIT.overrides, loss)
    )
    entries = initial(table, recipe, {group.id for group in table.groups})
    return Assignment(
        entries=entries | store(table, master=stages.optimizer), recipe=POSIT.name, fingerprint=table.fingerprint
    )


def network(dataset: str) -> nn.Module:
    """LeNet-5 for one colour and 28×28 pixels; the paper's network for three colours and 32×32."""
    grey = dataset == "fashion-mnist"
    colours, first, flat, widths = (1, 6, 400, (120, 84)) if grey else (3, 8, 1024, (384, 192))
    return nn.Sequential(
        *(nn.Conv2d(colours, first, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(first, 16, 5, padding=0 if grey else 2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(flat, widths[0]), nn.ReLU(), nn.Linear(*widths), nn.ReLU(), nn.Linear(widths[1], 10)),
    )


def task(options: argparse.Namespace, seed: int) -> Task:
    """The task of one run."""
    mean, deviation = MOMENTS[options.dataset]
    made = photographs(
        TaskOptions(seed=seed, device=options.device, epochs=options.epochs, batch_size=BATCH),
        name=f"PositNN on {options.dataset}",
        data=read_images(options.dataset, options.data, options.examples, options.test_examples),
        mean=mean,
        deviation=deviation,
        model=partial(network, options.dataset),
        pad=0,
        epochs=EPOCHS[options.dataset],
    )
    return dataclasses.replace(
        made,
        optimizer=partial(torch.optim.SGD, lr=RATE, momentum=MOMENTUM),
        scheduler=partial(StepLR, step_size=HALVED_EVERY, gamma=0.5),
    )


@functools.cache
def read_images(dataset: str, directory: Path, examples: int | None, test_examples: int | None) -> Images:
    """The images of a data set; with a number of examples, only the first so many."""
    data = read_fashion_mnist(directory) if dataset == "fashion-mnist" else read_cifar(directory, 10)
    return Images(
        train_images=data.train_images[:examples],
        train_labels=data.train_labels[:examples],
        test_images=data.test_images[:test_examples],
        test_labels=data.test_labels[:test_examples],
    )


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train all variants that are not trained yet; return the result."""
    make_task = partial(task, options)
    first = make_task(0)
    table = trace(first.make_model(), first.first_batch(), first.loss, first.optimizer)
    stages = {name: VARIANTS[name] for name in options.variants}
    variants = [
        Variant(name=name, plan=plan_of(table, each) if each else None, promotion=PromotionOptions(every=0))
        for name, each in stages.items()
    ]
    size = f"e{first.epochs}_n{options.examples or 'all'}"
    comparison = compare(
        make_task,
        variants,
        seeds=range(options.seeds),
        file=folder / f"positnn_{options.dataset}_{size}.runs.json",
        options=TrainOptions(backend="eager", device=options.device, epochs=first.epochs),
        on_run=lambda run: print(
            f"{run.variant}, seed {run.seed}: {run.facts.metrics} {run.facts.message}", flush=True
        ),
    )
    return {
        "facts": facts.gather(options.device),
        "dataset": options.dataset,
        "epochs": first.epochs,
        "examples": len(first.train) * BATCH,
        "stages": {name: dataclasses.asdict(each) if each else FP32 for name, each in stages.items()},
        "runs": rows(comparison),
    }


def rows(comparison: Comparison) -> list[dict[str, Any]]:
    """One row per run: what it reached, and whether it diverged."""
    return [
        {
            "variant": run.variant,
            "seed": run.seed,
            "metrics": run.facts.metrics,
            "losses": run.result["losses"],
            "message": run.facts.message,
        }
        for run in comparison.runs
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=sorted(EPOCHS))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=[each for each in VARIANTS if each not in _SLOW]
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, help="in place of the paper's 10 or 20")
    parser.add_argument("--examples", type=int, help="of the training images, the first so many")
    parser.add_argument("--test-examples", type=int, help="of the test images")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", type=Path, default=facts.RESULTS, help="folder of the result and of its runs")
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    result = run(options, options.results)
    path = options.results / facts.default_path(f"positnn-{options.dataset}", options.device).name
    facts.write(path, result)
    print(path)


if __name__ == "__main__":
    main()
