"""Train with many batch sizes in random order, and compare resident memory with that of the largest size alone.

    python tests/attack/sizes.py [--sizes 80] [--recipes native hfp8 ...] [--width 1024]

``float32`` and ``autocast`` are plain training without a plan, for comparison. Each row is a process of its own, with
one thread. Products in fp16 are slow on many CPUs: give a smaller width for that recipe. Sizes come twice, in two
orders. ``ratio``: largest resident memory over that of the largest size alone.
"""

import argparse
import json
import multiprocessing
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import assign
from assign.planner import search_table

PLAIN = ("float32", "autocast")
RECIPES = ("native", "native-delayed", "bf16", "fp16", "hfp8")
PAGE = 4096


def resident() -> float:
    """Return the resident memory of this process in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 1e6


def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``16 * size`` rows of 256 numbers, and their classes."""
    return torch.randn(size * 16, 256), torch.arange(size * 16) % 10


def make_step(recipe: str, width: int = 1024) -> tuple[nn.Module, Callable[[Any], torch.Tensor]]:
    """Return a model of three layers and its loss under a plan in which every tensor is low."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(256, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 10)
    )

    def loss(module: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(module(batch[0]), batch[1])

    def plain(batch: Any) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe == "autocast"):
            return loss(model, batch)

    if recipe in PLAIN:
        return model, plain
    plan = search_table(assign.trace(model, batch(8), loss), space=recipe, low_ratio=1.0)
    return model, assign.planned_step(model, loss, plan, backend="eager")


def largest_resident(recipe: str, width: int, sizes: list[int], sender: Any) -> None:
    """Train two steps of each size in turn, and send the largest resident memory in MB."""
    torch.set_num_threads(1)
    model, step = make_step(recipe, width)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    largest = 0.0
    for size in sizes:
        for _ in range(2):
            step(batch(size)).backward()
            optimizer.step()
            optimizer.zero_grad()
        largest = max(largest, resident())
    sender.send(largest)


def measure(recipe: str, width: int, sizes: list[int]) -> float:
    """Return what :func:`largest_resident` finds in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=largest_resident, args=(recipe, width, sizes, sender))
    process.start()
    sender.close()
    found: float = receiver.recv()
    process.join()
    return found


def compare(recipe: str, count: int, width: int = 1024) -> dict[str, Any]:
    """Return the resident memory with ``count`` sizes and with the largest of them alone."""
    sizes = list(range(4, 4 + 3 * count, 3))
    shuffled = [*random.Random(0).sample(sizes, count), *random.Random(1).sample(sizes, count)]
    alone, together = measure(recipe, width, [max(sizes)] * 20), measure(recipe, width, shuffled)
    return {
        "recipe": recipe,
        "width": width,
        "alone_mb": round(alone),
        "all_mb": round(together),
        "ratio": round(together / alone, 3),
    }


def main() -> None:
    """Print a line of JSON for each recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, default=80)
    parser.add_argument("--recipes", nargs="+", choices=[*PLAIN, *RECIPES], default=[*PLAIN, *RECIPES])
    parser.add_argument("--width", type=int, default=1024)
    options = parser.parse_args()
    for recipe in options.recipes:
        print(json.dumps(compare(recipe, options.sizes, options.width)), flush=True)


if __name__ == "__main__":
    main()
