"""Does training with every byte in 16 bits reach the accuracy of fp32, and what does the rounding of updates change?

Method: plain PyTorch models, ``model.to(dtype)``: weights, activations, gradients, optimizer states and the statistics
of batch normalisation are all stored in 16 bits; no master weights, no loss scaling. The same seeds, data order and
learning rates for all; each seed's accuracy at the end is compared with fp32's of the same seed. What the audit of
constants finds is set as it says: eps 1e-3 in batch normalisation and beta2 = 0.99 for every contender; an eps of 1e-4
in AdamW for fp16 and, to tell its effect from that of the format, for one more fp32. "Lost" is the share of updates,
looked at in every tenth step, that left a weight as it was (with stochastic rounding they lose nothing in the mean).

Data: scikit-learn's digits (1280 to train with, 517 to judge) and a convolutional network; Fashion-MNIST (the first
8000 and the 10000 test images), if ``--data`` has it, and a multilayer perceptron.

Assumptions: none about speed; on CPU 16-bit arithmetic may be emulated.

    python benchmarks/bench_pure16.py --data DIR
    python benchmarks/bench_pure16.py --small           # a smoke test; writes nothing without --output
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

sys.path.insert(0, str(Path(__file__).parents[1]))

from assign.analysis.audit import audit_constants
from assign.errors import TaskError
from assign.optim.monitor import LostUpdates
from assign.optim.updates import SGD, AdamW
from assign.tasks.builtin import SPLIT_SEED
from assign.tasks.data import read_digits, read_fashion_mnist
from benchmarks import facts

CONTENDERS = {
    "fp32": (torch.float32, "nearest"),
    "fp32, eps 1e-4": (torch.float32, "nearest"),
    "bf16, nearest": (torch.bfloat16, "nearest"),
    "bf16, stochastic": (torch.bfloat16, "stochastic"),
    "bf16, Kahan": (torch.bfloat16, "kahan"),
    "fp16, nearest": (torch.float16, "nearest"),
}
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD, lr 0.05": lambda parameters, **k: SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4, **k),
    "SGD, lr 0.002": lambda parameters, **k: SGD(parameters, lr=0.002, momentum=0.9, weight_decay=5e-4, **k),
    "AdamW, lr 0.001": lambda parameters, **k: AdamW(parameters, lr=1e-3, betas=(0.9, 0.99), **k),
}
ADAM_EPSILONS = {"fp16, nearest": 1e-4, "fp32, eps 1e-4": 1e-4}
SEEDS = 3
BATCH = 128
EVERY = 10


@dataclass(frozen=True, kw_only=True)
class Data:
    """Images, labels, and the model and epochs for them."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    model: Callable[[], nn.Module]
    epochs: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="directory with Fashion-MNIST")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    data, left_out = gather_data(options.data, small=options.small)
    runs = [
        run(name, each, optimizer, contender, seed)
        for name, each in data.items()
        for optimizer in OPTIMIZERS
        for contender in CONTENDERS
        if optimizer.startswith("AdamW") or contender != "fp32, eps 1e-4"
        for seed in range(1 if options.small else options.seeds)
    ]
    result = {"facts": facts.gather("cpu"), "left_out": left_out, "summary": summarise(runs), "runs": runs}
    print(table(result["summary"]))
    for name, why in left_out.items():
        print(f"\nleft out: {name}: {why}")
    path = options.output or (None if options.small else facts.default_path("pure16", "cpu"))
    if path:
        facts.write(path, result)
        print(f"\nwrote {path.name}")


def gather_data(directory: Path | None, *, small: bool) -> tuple[dict[str, Data], dict[str, str]]:
    """Normalised images in float32, and what is missing, with the reason."""
    images, labels = read_digits()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    images, labels = ((images - 0.305) / 0.376)[order], labels[order]
    held_out = 517
    digits = Data(
        train=(images[held_out:], labels[held_out:]),
        test=(images[:held_out], labels[:held_out]),
        model=convolutional,
        epochs=2 if small else 12,
    )
    if directory is None:
        return {"digits": digits}, {"Fashion-MNIST": "no --data was given"}
    try:
        read = read_fashion_mnist(directory)
    except TaskError as error:
        return {"digits": digits}, {"Fashion-MNIST": str(error)}
    count = 1280 if small else 8_000
    train, test = ((x.float() / 255 - 0.286) / 0.353 for x in (read.train_images[:count], read.test_images))
    fashion = Data(
        train=(train, read.train_labels[:count].long()),
        test=(test, read.test_labels.long()),
        model=perceptron,
        epochs=1 if small else 5,
    )
    return {"digits": digits, "Fashion-MNIST": fashion}, {}


def convolutional() -> nn.Module:
    """Two 3×3 convolutions, each halving the image."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16, eps=1e-3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32, eps=1e-3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def perceptron() -> nn.Module:
    """784-256-128-10 with batch normalisation."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 256),
        nn.BatchNorm1d(256, eps=1e-3),
        nn.ReLU(),
        nn.Linear(256, 128),
        nn.BatchNorm1d(128, eps=1e-3),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def run(name: str, data: Data, optimizer_name: str, contender: str, seed: int) -> dict[str, Any]:
    """Train once; the accuracy at the end, and what was lost on the way."""
    dtype, rounding = CONTENDERS[contender]
    torch.manual_seed(seed)
    model = data.model().to(dtype)
    optimizer = OPTIMIZERS[optimizer_name](model.parameters(), rounding=rounding)
    for group in optimizer.param_groups:
        if "eps" in group:
            group["eps"] = ADAM_EPSILONS.get(contender, group["eps"])
    audit_constants(model, optimizer, action="raise")
    scheduler = CosineAnnealingLR(optimizer, T_max=data.epochs)
    (images, labels), (test_images, test_labels) = ((x.to(dtype), y) for x, y in (data.train, data.test))
    generator = torch.Generator().manual_seed(seed)
    loss = torch.zeros(())
    with LostUpdates(model, optimizer, every=EVERY) as lost:
        for _ in range(data.epochs):
            for chosen in torch.randperm(len(labels), generator=generator).split(BATCH):
                if len(chosen) == BATCH:
                    optimizer.zero_grad()
                    loss = F.cross_entropy(model(images[chosen]), labels[chosen])
                    loss.backward()
                    optimizer.step()
            scheduler.step()
    model.eval()
    with torch.no_grad():
        right = (model(test_images).argmax(1) == test_labels).double().mean().item()
    print(f"{name}, {optimizer_name}, {contender}, seed {seed}: {right:.4f}", file=sys.stderr, flush=True)
    return {
        "data": name,
        "optimizer": optimizer_name,
        "contender": contender,
        "seed": seed,
        "accuracy": right,
        "last_loss": float(loss.detach()),
        "lost_updates": lost.share,
        "parameter_and_state_bytes": stored_bytes(model, optimizer),
    }


def stored_bytes(model: nn.Module, optimizer: Optimizer) -> int:
    """Of parameters, buffers and states."""
    states = [s for state in optimizer.state.values() for s in state.values() if isinstance(s, Tensor)]
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers(), *states))


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the seeds, and the differences to fp32 in the same seed."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for each in runs:
        found.setdefault((each["data"], each["optimizer"], each["contender"]), []).append(each)
    rows = []
    for (data, optimizer, contender), group in found.items():
        accuracies = [each["accuracy"] for each in group]
        baseline = [each["accuracy"] for each in found[data, optimizer, "fp32"]]
        points = [100 * (a - b) for a, b in zip(accuracies, baseline, strict=True)]
        rows.append(
            {
                "data": data,
                "optimizer": optimizer,
                "contender": contender,
                "accuracy": statistics.mean(accuracies),
                "deviation": statistics.stdev(accuracies) if len(group) > 1 else 0.0,
                "points_from_fp32": statistics.mean(points),
                "points_from_fp32_deviation": statistics.stdev(points) if len(group) > 1 else 0.0,
                "lost_updates": statistics.mean(each["lost_updates"] or 0.0 for each in group),
                "bytes_over_fp32": group[0]["parameter_and_state_bytes"]
                / found[data, optimizer, "fp32"][0]["parameter_and_state_bytes"],
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """A markdown table."""
    lines = [
        "| data | optimizer | | accuracy, % | points from fp32 | updates lost | bytes |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        accuracy = f"{100 * r['accuracy']:.2f} ± {100 * r['deviation']:.2f}"
        points = f"{r['points_from_fp32']:+.2f} ± {r['points_from_fp32_deviation']:.2f}"
        lost, size = f"{r['lost_updates']:.1%}", f"{r['bytes_over_fp32']:.3f} ×"
        lines.append(f"| {r['data']} | {r['optimizer']} | {r['contender']} | {accuracy} | {points} | {lost} | {size} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
