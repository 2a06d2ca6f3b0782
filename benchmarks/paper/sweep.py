"""The paper's experiments (arXiv 2301.13464): one command per figure and model, resumable run by run.

Method: every variant of a figure is trained from the same seeds on the same batches, as the paper trains (A5 of its
code: SGD 0.1 with momentum 0.9 and weight decay 5e-4, cosine schedule, batch 128, crops and flips on the device, loss
scale 65536), and judged after every epoch under its plan and, with the same weights, in fp32. Assumptions: `--data` has
CIFAR as `assign train` reads it. On small machines, `--width`, `--examples`, `--test-examples` and `--epochs` make
it smaller; what was used stands in the JSON and in the file's name.

    python benchmarks/paper/sweep.py accuracy --model resnet18 --data DIR     # figures 4, 10 to 12 and 17
    python benchmarks/paper/sweep.py orders --model resnet18 --data DIR       # figures 5 and 16

Run the same command again after an interruption: finished runs are kept, and an interrupted run resumes from its last
checkpoint. `python benchmarks/paper/table.py FILE …` prints the tables.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from assign.numerics.promotion import PromotionOptions
from assign.plan.plan import Assignment
from assign.plan.table import TensorTable
from assign.planner import search_table
from assign.report.pictures import draw, picture_paths
from assign.tasks.builtin import CIFAR_MOMENTS, photographs
from assign.tasks.data import Images, read_cifar, read_fashion_mnist
from assign.tasks.task import Task, TaskOptions
from assign.tracing.tracer import trace
from assign.training.compare import FP32, Variant, compare
from assign.training.options import TrainOptions
from benchmarks.paper.models import MODELS

RATIOS = (0.3, 0.5, 0.7, 0.9, 1.0)
RANDOM_ORDERS = (123, 456, 789)
RESULTS = Path(__file__).parents[1] / "results"

Search = Callable[..., Assignment]


def accuracy(search: Search) -> list[Variant]:
    """The paper's assignment at several low ratios, with and without promotion, against every baseline."""
    variants = [
        Variant(name=FP32, plan=None, promotion=PromotionOptions(every=0)),
        Variant(name="π_op", plan=search(strategy="operator"), promotion=PromotionOptions(every=0)),
        Variant(name="π_op′", plan=search(strategy="operator-prime"), promotion=PromotionOptions(every=0)),
    ]
    for ratio in RATIOS:
        plan = search(low_ratio=ratio)
        variants.append(Variant(name=f"greedy {ratio}", plan=plan, promotion=PromotionOptions(every=1)))
        variants.append(Variant(name=f"greedy {ratio}, no promotion", plan=plan, promotion=PromotionOptions(every=0)))
    return variants


def orders(search: Search) -> list[Variant]:
    """Which group is demoted first: the largest (the paper's), the smallest, or one drawn."""
    variants = [Variant(name=FP32, plan=None, promotion=PromotionOptions(every=0))]
    for ratio in RATIOS[:-1]:
        for order in ("greedy", "greedy-smallest"):
            plan = search(strategy=order, low_ratio=ratio)
            variants.append(Variant(name=f"{order} {ratio}", plan=plan, promotion=PromotionOptions(every=1)))
        for seed in RANDOM_ORDERS:
            plan = search(strategy="greedy-random", low_ratio=ratio, seed=seed)
            variants.append(
                Variant(name=f"greedy-random {seed} {ratio}", plan=plan, promotion=PromotionOptions(every=1))
            )
    return variants


FIGURES = {"accuracy": accuracy, "orders": orders}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=sorted(FIGURES))
    parser.add_argument("--model", choices=sorted(MODELS), default="resnet18")
    parser.add_argument("--dataset", choices=["cifar10", "cifar100", "fashion-mnist"], default="cifar10")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--examples", type=int, help="of the training images, the first so many")
    parser.add_argument("--test-examples", type=int, help="of the test images")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", default="eager")
    options = parser.parse_args()

    make_task = partial(task, options)
    first = make_task(0)
    table = trace(first.make_model(), first.first_batch(), first.loss, first.optimizer)
    variants = FIGURES[options.figure](partial(paper_search, table))
    size = f"w{options.width:g}_e{options.epochs}_n{options.examples or 'all'}"
    name = f"paper_{options.figure}_{options.model}_{options.dataset}_{size}_{options.device.partition(':')[0]}"
    file = RESULTS / f"{name}.json"
    comparison = compare(
        make_task,
        variants,
        seeds=range(options.seeds),
        file=file,
        options=TrainOptions(backend=options.backend, device=options.device, epochs=options.epochs),
        on_run=lambda run: print(
            f"{run.variant}, seed {run.seed}: {run.facts.metrics} {run.facts.message}".rstrip(), flush=True
        ),
    )
    for line in draw(comparison, picture_paths(file, None), required=False):
        print(line)


def paper_search(table: TensorTable, **options: object) -> Assignment:
    """A plan of the paper's recipe."""
    return search_table(table, space="hfp8", **options)


def task(options: argparse.Namespace, seed: int) -> Task:
    """The task of one run: the paper's training of one model on one data set."""
    images = _images(options.dataset, options.data, options.examples, options.test_examples)
    grey = options.dataset == "fashion-mnist"
    mean, deviation = ((0.2860,), (0.3530,)) if grey else CIFAR_MOMENTS[_classes(options.dataset)]
    made = photographs(
        TaskOptions(seed=seed, device=options.device, epochs=options.epochs),
        name=f"{options.model} on {options.dataset}, width {options.width:g}, {len(images.train_labels)} examples",
        data=images,
        mean=mean,
        deviation=deviation,
        model=partial(MODELS[options.model], _classes(options.dataset), options.width),
        pad=4,
        epochs=options.epochs,
    )
    return dataclasses.replace(made, loss=_nll) if options.model == "squeezenet" else made


def _nll(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The loss of a model that ends in a log-softmax of its own."""
    return torch.nn.functional.nll_loss(model(batch[0]), batch[1])


def _classes(dataset: str) -> int:
    return 100 if dataset == "cifar100" else 10


@functools.cache
def _images(dataset: str, directory: Path, examples: int | None, test_examples: int | None) -> Images:
    if dataset == "fashion-mnist":  # the models take three colours and 32×32 pixels
        data = read_fashion_mnist(directory)
        pad = partial(torch.nn.functional.pad, pad=(2, 2, 2, 2))
        grown = {name: pad(getattr(data, name)).expand(-1, 3, -1, -1) for name in ("train_images", "test_images")}
        data = dataclasses.replace(data, **grown)
    else:
        data = read_cifar(directory, _classes(dataset))
    return Images(
        train_images=data.train_images[:examples].contiguous(),
        train_labels=data.train_labels[:examples],
        test_images=data.test_images[:test_examples].contiguous(),
        test_labels=data.test_labels[:test_examples],
    )


if __name__ == "__main__":
    main()
