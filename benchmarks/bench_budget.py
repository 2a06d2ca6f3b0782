"""How long does a search take on a deep model, and how long does it take to say that a budget cannot be met?

Method: one table, of a transformer with some 400 groups of tensors; for each strategy a budget half-way between all
high and all low, and one of half the lowest peak, which no plan meets. The noise of ``milp`` is drawn at random, since
the time of the program is asked for, not the quality of its plan. Each search runs in a process of its own, so that its
peak memory is its own; seconds are of that process's CPU, without the trace.

Target: 10 seconds and 2 GB for each.

    python benchmarks/bench_budget.py               # two minutes on one core
    python benchmarks/bench_budget.py --layers 2    # a smoke test
"""

import argparse
import json
import multiprocessing
import random
import resource
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from assign.errors import BudgetError
from assign.memory.estimate import peak_bytes
from assign.plan.measured import Measured
from assign.plan.noise_table import Cell, Method, NoiseTable, Sample
from assign.plan.recipes import candidates_of, get_recipe, initial
from assign.plan.space import SearchSpace
from assign.plan.table import TensorTable
from assign.planner import search_table
from assign.tracing.tracer import trace
from benchmarks import facts

ASKED = (("greedy", "group"), ("milp", "group"), ("milp", "tensor"))


class Block(nn.Module):
    """A gated transformer block: eight matrix products that begin a group each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.between = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, 3 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        q, k, v = (each(y).unflatten(-1, (4, -1)).transpose(1, 2) for each in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(y)
        y = self.between(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def make_table(layers: int) -> TensorTable:
    """The table of a model with ``layers`` blocks."""
    model = nn.Sequential(nn.Embedding(512, 64), *(Block(64) for _ in range(layers)), nn.Linear(64, 512))
    symbols = torch.zeros(16, 256, dtype=torch.long)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return F.cross_entropy(model(batch).flatten(0, 1), batch.flatten())

    return trace(model, symbols, loss, partial(torch.optim.AdamW, lr=1e-3))


def draw_noise(table: TensorTable, recipe: str) -> NoiseTable:
    """Noise that differs by four orders of magnitude between tensors, and as much between 16 and 8 bits."""
    rng = random.Random(0)
    cells = {}
    for key, formats in candidates_of(table, get_recipe(recipe)).items():
        for fmt in formats:
            noise = 10.0 ** (rng.uniform(-2, 2) - fmt.mantissa_bits)
            cells[Cell(key, fmt.name)] = (Sample(noise, 1.0, 0.0),)
    return NoiseTable(fingerprint=table.fingerprint, method=Method.FIRST_ORDER, cells=cells)


def measure(path: Path, recipe: str, strategy: str, granularity: str, reachable: bool) -> dict[str, Any]:
    """Seconds and bytes of one search."""
    table, rules = TensorTable.load(path), get_recipe(recipe)
    low, high = (peak_bytes(table, initial(table, rules, ids)) for ids in ({g.id for g in table.groups}, ()))
    noise = draw_noise(table, recipe) if strategy == "milp" else None
    start = time.process_time()
    found: dict[str, Any] = {"strategy": strategy, "granularity": granularity, "reachable": reachable}
    try:
        plan = search_table(
            table,
            budget=(low + high) // 2 if reachable else min(low, high) // 2,
            space=SearchSpace(recipe=recipe, granularity=granularity if strategy == "milp" else "group"),
            strategy=strategy,
            measured=Measured(noise=noise),
        )
        found["peak_bytes"] = plan.provenance.estimate["peak_bytes"]
    except BudgetError as error:
        found["floor"] = error.floor
    found["seconds"] = time.process_time() - start
    found["memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=51)
    parser.add_argument("--recipe", default="native")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        table, path = make_table(options.layers), Path(directory) / "table.json"
        table.save(path)
        print(f"{len(table.groups)} groups, {len(table.tensors)} tensors", flush=True)
        for strategy, granularity in ASKED:
            for reachable in (True, False):
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    row = pool.apply(measure, (path, options.recipe, strategy, granularity, reachable))
                rows.append(row)
                print(
                    f"{strategy:8} {granularity:8} {'reachable' if reachable else 'unreachable':12}"
                    f"{row['seconds']:8.1f} s {row['memory_bytes'] / 1e9:6.2f} GB",
                    flush=True,
                )
    if options.output:
        size = {"groups": len(table.groups), "tensors": len(table.tensors)}
        options.output.write_text(json.dumps({"facts": facts.gather("cpu", 1), **size, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
