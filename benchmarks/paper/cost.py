"""What emulating the paper's formats and promotion cost: seconds per step against plain fp32, eager and compiled.

Method: one model, one batch, every configuration built in one process; then the steps (forward, backward, optimizer,
promotion) go round and round through the configurations, so that a slow minute meets them all; medians of the steps.
At the end the batch is made so large that the input is promoted, and the steps behind that are timed: with formats
read at run time nothing is compiled again. Assumptions: nothing else runs on the machine.

    python benchmarks/paper/cost.py --model resnet18 --width 0.25
"""

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from assign import Promotion, planned_step
from assign.planner import search_table
from assign.tasks.builtin import classification_loss
from assign.tracing.tracer import trace
from benchmarks.paper.models import MODELS

LOW_EVERYWHERE, HIGH_EVERYWHERE = 1.0, 0.0
EVERY = {"no promotion": 0, "promotion every 100 steps": 100, "promotion every step": 1}


class Configuration:
    """A model of its own with its optimizer and one way to compute its step."""

    def __init__(self, make: Callable[[], nn.Module], batch: tuple[Tensor, Tensor], plan, backend: str, every: int):
        torch.manual_seed(0)
        self.model = make()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0, momentum=0.9)  # every step alike
        self.promotion = Promotion(plan, every=every) if plan else None
        if plan:
            self.loss = planned_step(
                self.model, classification_loss, plan, backend=backend, promotion=self.promotion if every else None
            )
        else:
            step = torch.compile(classification_loss) if backend == "inductor" else classification_loss
            self.loss = lambda batch: step(self.model, batch)
        self.seconds: list[float] = []
        self.first = self.step(batch)

    def step(self, batch: tuple[Tensor, Tensor]) -> float:
        """One whole step; its seconds."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.loss(batch)
        (loss * 1024).backward()
        self.optimizer.step()
        if self.promotion:
            self.promotion.step()
        if batch[0].is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="resnet18")
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    def make() -> nn.Module:
        return MODELS[options.model](10, options.width).to(options.device)

    torch.manual_seed(0)
    images = torch.randn(options.batch_size, 3, 32, 32, device=options.device)
    batch = images, torch.randint(10, (options.batch_size,), device=options.device)
    table = trace(make(), batch, classification_loss)
    low = search_table(table, space="hfp8", low_ratio=LOW_EVERYWHERE)
    high = search_table(table, space="hfp8", low_ratio=HIGH_EVERYWHERE)
    found: dict[str, Configuration] = {}
    for backend in ("eager", "inductor"):
        found[f"{backend}: fp32"] = Configuration(make, batch, None, backend, 0)
        found[f"{backend}: all high"] = Configuration(make, batch, high, backend, 0)
        for name, every in EVERY.items():
            found[f"{backend}: all low, {name}"] = Configuration(make, batch, low, backend, every)
    for number in range(options.steps + 3):
        for configuration in found.values():
            seconds = configuration.step(batch)
            if number >= 3:
                configuration.seconds.append(seconds)

    rows = {}
    for name, configuration in found.items():
        baseline = found[f"{name.partition(':')[0]}: fp32"]
        row = {
            "seconds_per_step": statistics.median(configuration.seconds),
            "ratio_to_fp32": statistics.median(configuration.seconds) / statistics.median(baseline.seconds),
            "first_step_seconds": configuration.first,
        }
        if name.endswith("every step"):
            row |= promote(configuration, (images * 100, batch[1]))
        rows[name] = row
        print(name, {key: round(value, 3) for key, value in row.items()}, flush=True)
    write(options, rows)


def promote(configuration: Configuration, batch: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Make the input overflow; the seconds of the step that sees it and of the two behind it."""
    assert configuration.promotion
    before = len(configuration.promotion.promoted)
    seconds = [configuration.step(batch) for _ in range(3)]
    promoted = len(configuration.promotion.promoted) - before
    return {"promoted": promoted} | {f"promotion_step_{n}_seconds": each for n, each in enumerate(seconds)}


def write(options: argparse.Namespace, rows: dict[str, dict[str, float]]) -> None:
    sha = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    today = datetime.date.today().isoformat()
    cuda = options.device.startswith("cuda")
    facts = {
        "date": today,
        "commit": sha,
        "device": torch.cuda.get_device_name() if cuda else f"cpu, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "model": options.model,
        "width": options.width,
        "batch_size": options.batch_size,
    }
    name = f"paper_cost_{options.model}_w{options.width:g}_{options.device.partition(':')[0]}.json"
    path = Path(__file__).parents[1] / "results" / name
    path.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    print(f"wrote {path.name}")


if __name__ == "__main__":
    main()
